"""The options of the main job, ``planrt run``, and those of a run that goes on."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from planrt.command_line import Parser, one_line, positive_number, seconds, whole_number
from planrt.deadlines import LONGEST_ROUND
from planrt.errors import OptionError
from planrt.fl.data import digits as data
from planrt.fl.runs.identity import add_identity, named_address
from planrt.fl.runs.run_folder import OPTIONS
from planrt.workers.serving.metrics_options import add_metrics

FIXED = (
    "batch_size", "federate_after_n_batches", "lr", "seed", "device", "fast_kernels", "dataset", "aggregation",
    "secure_aggregation", "max_update_norm",
)  # fmt: skip
"""Options that make a run what it is: one that goes on keeps them."""


def parser(prog: str = "mnist_async", kind: type[Parser] = Parser) -> Parser:
    """Returns the parser of the command's options."""
    parser = kind(prog=prog, description="Train the MNIST network on federated workers.")
    count = whole_number(at_least=1)
    seed = whole_number(at_least=0)
    add = parser.add_argument
    add("--rounds", type=count, default=40, help="rounds of training and averaging (%(default)s)")
    add("--batch-size", type=count, default=32, help="training images per batch (%(default)s)")
    add(
        "--federate-after-n-batches",
        type=count,
        default=10,
        help="batches per worker and round (%(default)s)",
    )
    add(
        "--lr",
        type=positive_number,
        default=0.1,
        help="learning rate at first (%(default)s); 2%% less each round",
    )
    add("--test-batch-size", type=count, default=128, help="test images per batch (%(default)s)")
    add("--seed", type=seed, default=1, help="what every random choice derives from (%(default)s)")
    add("--device", default="cpu", help="where the workers started here compute (%(default)s)")
    add(
        "--fast-kernels",
        action="store_true",
        help="on a GPU: the fastest kernels, though runs then need not repeat bit for bit",
    )
    add(
        "--secure-aggregation",
        action="store_true",
        help="the workers' models are added up masked: nobody sees a single one",
    )
    add("--save-model", metavar="PATH", help="save the model there too: .safetensors, .pt or .pth")
    add("--verbose", action="store_true", help="show the workers' logs, and tracebacks of errors")
    add("--data", metavar="DIR", help="folder that holds MNIST/raw")
    add("--dataset", choices=data.DATASETS, default="auto", help="which images to train on (%(default)s)")
    add(
        "--worker",
        action="append",
        type=named_address,
        metavar="NAME=URI",
        help="use this worker (repeatable)",
    )
    add_identity(add)
    add_metrics(add)
    add("--report", metavar="PATH", help="where report.json goes instead of the run folder")
    add("--run-dir", metavar="DIR", help="run folder (runs/<time>-seed<seed>)")
    add("--resume", metavar="DIR", help="go on with the run in this folder, with its options")
    add(
        "--checkpoint-every",
        type=whole_number(at_least=0),
        default=1,
        metavar="N",
        help="rounds from one checkpoint to the next, 0 for one at the end (%(default)s)",
    )
    add("--min-workers", type=count, metavar="N", help="workers that must answer in a round (default: all)")
    add(
        "--round-timeout",
        type=seconds(at_most=LONGEST_ROUND),
        metavar="SECONDS",
        help="how long a round waits for its workers (default: an hour)",
    )
    add(
        "--aggregation",
        default="mean",
        metavar="HOW",
        help="what is made of the workers' models: mean, median, trimmed-mean:N, krum:N or multi-krum:N, where N "
        "workers may be bad (%(default)s)",
    )
    add("--max-update-norm", type=positive_number, metavar="NORM", help="leave longer updates out")
    return parser


def parsed(arguments: Sequence[str] | None, prog: str) -> tuple[argparse.Namespace, set[str]]:
    """Returns the options in `arguments`, and the names of those that stand there."""
    options = parser(prog).parse_args(arguments)
    given = parser(prog)
    for action in given._actions:
        action.default = argparse.SUPPRESS
    return options, set(vars(given.parse_args(arguments)))


def resumed(options: argparse.Namespace, chosen: set[str]) -> argparse.Namespace:
    """Returns the options of a run that goes on: those of its folder, but for what was `chosen` now.

    Raises:
        OptionError: the folder has no run, or another option than was chosen where that makes another run.
    """
    if options.resume is None:
        return options
    folder = Path(options.resume)
    if "run_dir" in chosen:
        raise OptionError("--resume names the run folder: leave --run-dir out")
    kept = _kept(folder)
    for name in FIXED:
        if name in chosen and name in kept and getattr(options, name) != kept[name]:
            option = "--" + name.replace("_", "-")
            raise OptionError(
                f"{option} {getattr(options, name)}: the run in {folder} has {option} {kept[name]}"
            )
    taken = {name: value for name, value in kept.items() if name not in chosen}
    return argparse.Namespace(**{**vars(options), **taken, "run_dir": str(folder), "resume": str(folder)})


class _KeptParser(Parser):
    """Takes options of a run folder; one that is wrong is an OptionError."""

    def error(self, message: str) -> NoReturn:
        raise OptionError(message)


def _kept(folder: Path) -> dict[str, Any]:
    """Returns the options that the run in `folder` was started with, held to what they must be on a command line.

    Raises:
        OptionError: there are none, or no such ones.
    """
    try:
        written = json.loads((folder / OPTIONS).read_text())
        if not isinstance(written, dict):
            raise ValueError("it has no names and values")
    except (OSError, ValueError) as error:
        raise OptionError(
            f"--resume: there is no run to go on with in {folder} ({one_line(error)})"
        ) from None
    arguments: list[str] = []
    for name, value in written.items():
        for each in value if isinstance(value, list) else [value]:
            if each is True:
                arguments.append(f"--{name}")
            elif each is not None and each is not False:
                arguments.append(f"--{name}={each}")
    try:
        taken = vars(parser(kind=_KeptParser).parse_args(arguments))
    except OptionError as error:
        raise OptionError(
            f"--resume: {folder / OPTIONS} is not what a run has written there: {error}"
        ) from None
    return {name: taken[name] for name in (one.replace("-", "_") for one in written)}


def by_option_name(options: argparse.Namespace) -> dict[str, object]:
    """Returns the options as the command line names them."""
    plain = {name.replace("_", "-"): value for name, value in vars(options).items()}
    if options.worker is not None:
        plain["worker"] = [f"{name}={uri}" for name, uri in options.worker]
    return plain

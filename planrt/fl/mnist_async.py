"""The main job: ``planrt run --rounds 40`` trains the MNIST network on workers.

``python -m planrt.fl.mnist_async`` is the same command. Three workers train on digits 0-3, 4-6 and 7-9, their
models are averaged every round, and a fourth, called testing, evaluates. Workers that already run are used
(`--worker`, or ports 8777-8780); otherwise four processes are started and stopped again. Exit codes: see
`planrt.command_line`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import platform
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from planrt.command_line import Parser, positive_number, run_command, whole_number
from planrt.errors import OptionError
from planrt.extras import check_installed, needed
from planrt.fl.data import digits as data
from planrt.fl.report import FEDERATED, Evaluation, Report, Round, plot
from planrt.fl.runs.children import ChildOptions, WorkerProcesses, mnist_children
from planrt.fl.runs.discovery import (
    Identity,
    add_identity,
    connect,
    dataset_of,
    given_addresses,
    named_address,
    running_addresses,
)

if TYPE_CHECKING:
    import torch

    from planrt.plans.training import EvaluationResult

EVALUATE_EVERY = 10
LR_DECAY = 0.98
LR_FLOOR = 0.01  # of the initial learning rate
DIGIT_GROUPS = ((0, 3), (4, 6), (7, 9))


def main(arguments: Sequence[str] | None = None, *, prog: str = "mnist_async") -> int:
    """Runs the command; returns its exit code. `prog` is what it was called by."""
    options = parser(prog).parse_args(arguments)
    return run_command(prog, lambda: run(options), verbose=options.verbose)


def parser(prog: str = "mnist_async") -> Parser:
    """Returns the parser of the command's options."""
    parser = Parser(prog=prog, description="Train the MNIST network on federated workers.")
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
    add("--report", metavar="PATH", help="where report.json goes instead of the run folder")
    add("--run-dir", metavar="DIR", help="run folder (runs/<time>-seed<seed>)")
    return parser


def run(options: argparse.Namespace) -> None:
    """Trains, evaluates, writes the run folder and says what came out.

    Raises:
        MissingPackageError: a package is not installed that the extra ``run`` brings. Nothing was started.
    """
    began = time.perf_counter()
    check_installed("tqdm", "matplotlib", by="this run")
    with _run_folder(options) as folder:
        identity = Identity.of(options)
        addresses = given_addresses(options.worker) if options.worker else running_addresses(identity)
        with contextlib.ExitStack() as stack:
            children = None
            if addresses is None:
                children = stack.enter_context(WorkerProcesses(_children(options)))
            elif options.data is not None or options.device != "cpu" or options.fast_kernels:
                print(
                    "Notice: --data, --device and --fast-kernels do nothing here: the workers that run hold data and "
                    "device"
                )
            # Only now, so that this process imports torch at the same time as its children.
            import torch

            from planrt.fl.runs.networks import seeded_net
            from planrt.logs import configure

            configure(verbose=options.verbose)
            torch.set_num_threads(1)  # averaging is light, and the workers on this machine need the cores
            network = seeded_net(options.seed)
            if children is not None:
                addresses = {worker.id: worker.uri for worker in children.wait_ready().values()}
                identity = Identity()  # they have no users
            report, state = asyncio.run(_train(options, addresses or {}, identity, network, began))
        _write(options, folder, report, state)
    _print_summary(options, folder, report, time.perf_counter() - began)


async def _train(
    options: argparse.Namespace,
    addresses: Mapping[str, str],
    identity: Identity,
    network: torch.nn.Module,
    began: float,
) -> tuple[Report, Mapping[str, torch.Tensor]]:
    import torch.nn.functional as F

    from planrt.fl.config import TrainConfig
    from planrt.fl.rounds import ModelEvaluator, RoundScheduler

    async with contextlib.AsyncExitStack() as stack:
        workers = await connect(addresses, stack, identity)
        report = Report(
            dataset_of(workers, options.dataset), options.seed, _by_option_name(options), _versions()
        )
        testing = workers.pop(data.TESTING)
        config = TrainConfig(
            network,
            F.nll_loss,
            batch_size=options.batch_size,
            optimizer="SGD",
            optimizer_args={"lr": options.lr},
            max_nr_batches=options.federate_after_n_batches,
        )
        scheduler = RoundScheduler(
            list(workers.values()),
            config,
            dataset_key=data.TRAIN_KEY,
            seed=options.seed,
            secure_aggregation=options.secure_aggregation,
        )
        evaluator = ModelEvaluator(
            testing, config, dataset_key=data.TEST_KEY, batch_size=options.test_batch_size
        )
        await scheduler.prepare()
        await evaluator.prepare()
        print(
            f"Training on {', '.join(workers)}; ready after {time.perf_counter() - began:.1f} s", flush=True
        )

        state: Mapping[str, torch.Tensor] = config.state
        lr = options.lr
        # The bar shows on terminals and in notebooks only; what is printed goes above it.
        with _bars()(total=options.rounds, unit="round", mininterval=0, disable=None, leave=False) as bar:
            for number in range(1, options.rounds + 1):
                evaluating = number % EVALUATE_EVERY == 1 or number == options.rounds
                result = await scheduler.run_round(
                    number,
                    state,
                    lr=lr,
                    keep_worker_states=evaluating and not options.secure_aggregation,
                )
                state = result.state
                bar.update()
                title = f"Training round {number}/{options.rounds}"
                _say(f"{title}: loss {result.loss:.4f}, {result.seconds:.2f} s")
                evaluations = {}
                started = time.perf_counter()
                if evaluating:
                    _say("Evaluating models")
                    for name, model in [*result.worker_states.items(), (FEDERATED, state)]:
                        evaluations[name] = _evaluated(name, await evaluator.evaluate(model))
                report.rounds.append(
                    Round(
                        number,
                        result.seconds,
                        result.workers,
                        time.perf_counter() - started,
                        evaluations,
                    )
                )
                lr = max(LR_DECAY * lr, LR_FLOOR * options.lr)
    return report, state


def _children(options: argparse.Namespace) -> list[ChildOptions]:
    source = data.find(options.dataset, options.data)  # found once, so that all four serve the same
    if source.notice:
        print(f"Notice: {source.notice}")
    print("No workers are running: starting alice, bob, charlie and testing", flush=True)
    return mnist_children(
        source, device=options.device, fast_kernels=options.fast_kernels, verbose=options.verbose
    )


# ------------------------------------------------------------------------------------------- output


def _bars() -> Any:
    """tqdm's class of progress bars, for terminals or for notebooks."""
    return needed("tqdm.auto", by="this run").tqdm


def _say(text: str) -> None:
    _bars().write(text)
    sys.stdout.flush()


def _evaluated(name: str, result: EvaluationResult) -> Evaluation:
    """Prints a model's evaluation and keeps what the report needs."""
    title = "Federated model" if name == FEDERATED else f"Model update {name}"
    histogram, correct = result.histogram or [], result.correct or 0
    shares = [
        f"{first}-{last}: {100 * sum(histogram[first : last + 1]) / max(1, result.samples):.0f}%"
        for first, last in DIGIT_GROUPS
    ]
    accuracy = correct / max(1, result.samples)
    _say(f"  {title}: Percentage numbers {', '.join(shares)}")
    _say(
        f"  {title}: Average loss: {result.loss:.4f}, "
        f"Accuracy: {correct}/{result.samples} ({100 * accuracy:.2f}%)"
    )
    return Evaluation(result.loss, accuracy, histogram)


@contextlib.contextmanager
def _run_folder(options: argparse.Namespace) -> Iterator[Path]:
    """Makes the run folder and sees that everything can be written, before hours go into training.

    A folder made here goes again if nothing was written to it.

    Raises:
        OptionError: some place cannot be written, or the model's suffix is unknown.
    """
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    folder = Path(options.run_dir or Path("runs", f"{stamp}-seed{options.seed}"))
    if options.save_model and Path(options.save_model).suffix not in (".safetensors", ".pt", ".pth"):
        raise OptionError(f"--save-model {options.save_model}: end the name in .safetensors, .pt or .pth")
    existed = folder.exists()
    try:
        _check_writable("--run-dir", folder)
        for option, path in (("--report", options.report), ("--save-model", options.save_model)):
            if path is not None and Path(path).is_dir():
                raise OptionError(f"{option} {path} is a folder: give the name of a file")
            if path is not None:
                _check_writable(option, Path(path).parent)
        yield folder
    finally:
        if not existed:
            with contextlib.suppress(OSError):  # not empty: the run left its files
                folder.rmdir()


def _check_writable(option: str, folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OptionError(
            f"{option}: cannot write to {folder} ({error.strerror}): choose another place"
        ) from error


def _write(
    options: argparse.Namespace, folder: Path, report: Report, state: Mapping[str, torch.Tensor]
) -> None:
    import torch
    from safetensors.torch import save

    tensors = {name: tensor.contiguous() for name, tensor in state.items()}
    content = save(tensors)
    (folder / "model.safetensors").write_bytes(content)
    if options.save_model and options.save_model.endswith(".safetensors"):
        Path(options.save_model).write_bytes(content)
    elif options.save_model:
        torch.save(tensors, options.save_model)
    Path(options.report or folder / "report.json").write_text(report.to_json(), encoding="utf-8")
    plot(report, folder / "accuracy.png")


def _print_summary(options: argparse.Namespace, folder: Path, report: Report, seconds: float) -> None:
    print(
        f"\nFinal accuracy {100 * report.final_accuracy:.2f}% on {report.dataset} "
        f"after {len(report.rounds)} rounds\n"
        f"  time:    {seconds:.1f} s in all; {report.median_seconds:.3f} s a round, not evaluating (median)\n"
        f"  traffic: {report.median_bytes:,} bytes per round and worker (median, both ways)\n"
        f"  report:  {options.report or folder / 'report.json'}\n"
        f"  model:   {folder / 'model.safetensors'}"
        + (f" and {options.save_model}" if options.save_model else "")
        + f"\n  plot:    {folder / 'accuracy.png'}",
        flush=True,
    )


def _by_option_name(options: argparse.Namespace) -> dict[str, object]:
    """The options as the command line names them."""
    plain = {name.replace("_", "-"): value for name, value in vars(options).items()}
    if options.worker is not None:
        plain["worker"] = [f"{name}={uri}" for name, uri in options.worker]
    return plain


def _versions() -> dict[str, str]:
    import numpy as np
    import torch

    from planrt.version import VERSION

    return {
        "planrt": VERSION,
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
    }


if __name__ == "__main__":
    sys.exit(main())

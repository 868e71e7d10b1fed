"""``planrt``: serve a worker, run the main job, and for data owners: look into plans, approve and deny them.

What needs no torch starts without it: `pending`, `approve`, `deny`, `decisions`, `audit`, `users` and `status` answer
at once.

Exit codes (those of `serve` and `run` are in `planrt.command_line`): 0 done (for ``inspect``: the plan keeps
the policy), 1 it breaks the policy (``audit --check``: the
log is broken), 2 wrong options or a file that cannot be read, 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from planrt.command_line import Parser, leave, run_command
from planrt.commands import audit, certs, sum_keys, users
from planrt.errors import OptionError, PlanrtError
from planrt.fl.runs import status
from planrt.shown import shown
from planrt.version import VERSION

if TYPE_CHECKING:
    from planrt.plans.ir.constants import Constant
    from planrt.plans.ir.graph import Graph
    from planrt.plans.ir.record import PlanRecord
    from planrt.plans.policy.approvals import Approvals, Asking, Pending
    from planrt.types import TensorSpec

DEFAULT_FOLDER = "approvals"
_BROKEN = 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] == ["serve"]:
        from planrt.fl import serve

        return serve.main(words[1:], prog="planrt serve", alone=arguments is None)
    if words[:1] == ["run"]:
        from planrt.fl import mnist_async

        return mnist_async.main(words[1:], prog="planrt run")
    options = _parser().parse_args(words)
    action: Callable[[argparse.Namespace], int] = options.action
    outcome = 0

    def act() -> None:
        nonlocal outcome
        try:
            outcome = action(options)
        except OptionError:
            raise
        except PlanrtError as error:  # everything here is about what was given on the command line
            raise OptionError(str(error)) from error

    code = run_command("planrt", act, verbose=options.verbose)
    return code or outcome


def command() -> NoReturn:
    """Runs the command `planrt` of a terminal."""
    leave(main())


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="planrt", description="Serve workers, look into plans, and decide which may run on your data."
    )
    parser.add_argument("--version", action="version", version=f"planrt {VERSION}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, help in (  # handed on before this parser sees them: for --help
        ("serve", "serve one worker (planrt serve --help)"),
        ("run", "train the MNIST network on workers (planrt run --help)"),
    ):
        commands.add_parser(name, help=help, description=help)

    inspect = _command(commands, "inspect", _inspect, "say what a plan does, and whether it keeps a policy")
    inspect.add_argument(
        "file", metavar="FILE", help="a plan's file, or the hash of one that waits in --approvals"
    )
    inspect.add_argument("--policy", metavar="FILE", help="hold it against this policy (TOML)")
    inspect.add_argument(
        "--input",
        action="append",
        default=[],
        metavar="NAME=SIZES",
        help="sizes of an input by its name or number, as images=32x1x28x28; needed where the plan leaves them free",
    )
    inspect.add_argument(
        "--tag",
        action="append",
        default=[],
        metavar="NAME=#TAG",
        help="this input is private data with that tag (release rules are about these)",
    )
    inspect.add_argument("--graph", metavar="NAME", help="of a file with several graphs only this one")
    inspect.add_argument(
        "--training",
        action="store_true",
        help="the plan gives a loss to train with: look at its gradients as well",
    )
    inspect.add_argument("--json", action="store_true", help="print JSON")
    _folder(inspect)

    approve = _command(commands, "approve", _approve, "record that a plan may run")
    deny = _command(commands, "deny", _deny, "record that a plan may not run")
    for one in (approve, deny):
        one.add_argument(
            "plan",
            metavar="HASH",
            nargs="?" if one is deny else None,
            help="the plan's hash, or its first 8 digits or more",
        )
        one.add_argument("--by", metavar="NAME", help="who decides (default: the user of this computer)")
        one.add_argument("--policy", metavar="FILE", help="record that this policy held at the time")
        _folder(one)
    approve.add_argument("--why", default="", metavar="TEXT", help="a remark")
    deny.add_argument(
        "--all-of",
        metavar="USER",
        help="deny all plans that wait and only this user asked for; '' is everybody without a token",
    )
    deny.add_argument("--why", required=True, metavar="TEXT", help="the reason; the plan's author is told")

    waiting = _command(commands, "pending", _pending, "list the plans that wait for a decision")
    decided = _command(commands, "decisions", _decisions, "list what was decided")
    for one in (waiting, decided):
        one.add_argument("--json", action="store_true", help="print JSON")
        _folder(one)
    users.register(commands, _command)
    certs.register(commands, _command)
    sum_keys.register(commands, _command)
    audit.register(commands, _command)
    status.register(commands, _command)
    return parser


def _command(commands: Any, name: str, action: Callable[[argparse.Namespace], int], help: str) -> Any:
    made = commands.add_parser(name, help=help, description=f"{help[0].upper()}{help[1:]}.")
    made.add_argument("--verbose", action="store_true", help="show tracebacks of errors")
    made.set_defaults(action=action)
    return made


def _folder(parser: Any) -> None:
    parser.add_argument(
        "--approvals",
        "--folder",  # as it was called here before it had the name that `planrt serve` has for it
        dest="folder",
        default=DEFAULT_FOLDER,
        metavar="DIR",
        help=f"where the worker keeps plans and decisions (default: {DEFAULT_FOLDER})",
    )


# The commands


def _inspect(options: argparse.Namespace) -> int:
    from planrt.plans.analysis.analysing import analyse
    from planrt.plans.policy.rules import Policy
    from planrt.plans.policy.verify import check

    policy = Policy.from_file(options.policy) if options.policy else None
    path, askings = _plan_file(options)
    if path.suffix == ".joint":
        return _inspect_joint(path, askings)
    graphs, constants = _graphs(path)
    if options.graph is not None:
        if options.graph not in graphs:
            raise OptionError(f"--graph: the file holds {', '.join(graphs)}, not {options.graph!r}")
        graphs = {options.graph: graphs[options.graph]}
    reports = {}
    for name, graph in graphs.items():
        inputs = _inputs(graph, options.input)
        tags = _tags(graph, options.tag)
        if policy is None:
            report = analyse(graph, inputs, gradients=options.training).with_constants(constants)
            reports[name] = report.with_violations((), None, tags)
        else:
            reports[name] = check(
                graph, policy, inputs, tags, constants=constants, gradients=options.training
            )
    if options.json:
        print(json.dumps({name: report.as_json() for name, report in reports.items()}, indent=1))
    else:
        if policy is not None:
            print(f"{policy}\n")
        for line in _asked(askings):
            print(line[0].upper() + line[1:])
        print("\n\n".join(str(report) for report in reports.values()))
    return 0 if all(report.ok for report in reports.values()) else _BROKEN


def _inspect_joint(path: Path, askings: Sequence[Asking]) -> int:
    """Shows a joint run with other workers: it is text, and what a policy says of plans is not about it."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"{path} cannot be read: {error}") from None
    for line in _asked(askings):
        print(line[0].upper() + line[1:])
    for line in lines:
        print(shown(line, 400))
    return 0


def _approve(options: argparse.Namespace) -> int:
    decision = _record(options).approve(
        options.plan, by=options.by, why=options.why, policy=_policy_version(options)
    )
    print(f"approved {decision.plan} by {decision.by}, {decision.time}")
    return 0


def _deny(options: argparse.Namespace) -> int:
    if (options.plan is None) == (options.all_of is None):
        raise OptionError("name one plan by its hash, or a user with --all-of USER")
    record, about = _record(options), {"by": options.by, "policy": _policy_version(options)}
    left: list[Pending] = []
    if options.all_of is None:
        decisions = [record.deny(options.plan, why=options.why, **about)]
    else:
        decisions, left = record.deny_all_of(options.all_of, why=options.why, **about)
    for decision in decisions:
        print(f"denied {decision.plan} by {decision.by}, {decision.time}: {decision.why}")
    for one in left:
        print(f"not denied, as others asked for it too: {one.plan}")
    if options.all_of is not None and not decisions:
        print(f"no plan waits that only {_who(options.all_of)} asked for")
    return 0


def _pending(options: argparse.Namespace) -> int:
    record = _record(options)
    waiting = record.pending()
    if options.json:
        rows = [
            {
                "plan": one.plan, "file": str(one.path), "bytes": one.size, "since": one.since,
                "asked": [asdict(asking) for asking in record.askings(one.plan)],
            }
            for one in waiting
        ]  # fmt: skip
        print(json.dumps(rows, indent=1))
        return 0
    for one in waiting:
        print(f"{one.plan}  {one.since}  {one.size:,} bytes")
        for line in _asked(record.askings(one.plan)):
            print(f"  {line}")
        print(f"  planrt inspect {one.path}")
    if waiting:
        print("Names and purposes are what the askers say; users are proved by their tokens.")
    else:
        print("no plan waits")
    return 0


def _asked(askings: Sequence[Asking]) -> list[str]:
    """What is said of a plan, a line each: names and inputs once, then who asks."""
    lines = []
    for name, inputs in dict.fromkeys((one.name, one.inputs) for one in askings):
        takes = ", ".join(shown(text, 40) for text in inputs)
        lines.append(f"called {shown(name, 80) or '(no name)'}({takes})")
    asked: dict[tuple[str, str], dict[str, None]] = {}
    for one in askings:
        asked.setdefault((one.user, one.purpose), {}).update(dict.fromkeys(one.data))
    for (user, purpose), data in asked.items():
        who = _who(user)
        on = f", on {', '.join(shown(text, 80) for text in data)}" if data else ""
        lines.append(f"asked for by {who}{on}" + (f", for: {shown(purpose, 400)}" if purpose else ""))
    return lines


def _who(user: str) -> str:
    return f"user {shown(user, 80)}" if user else "somebody without a token"


def _decisions(options: argparse.Namespace) -> int:
    record = _record(options)
    decisions = record.decisions()
    if options.json:
        print(json.dumps({"head": record.head, "decisions": [asdict(one) for one in decisions]}, indent=1))
        return 0
    for one in decisions:
        policy = f", policy {shown(one.policy)}" if one.policy else ""
        why = f": {shown(one.why)}" if one.why else ""
        print(f"{shown(one.time)}  {one.decision:<8}  {one.plan}  by {shown(one.by)}{policy}{why}")
    print(f"{len(decisions)} decisions, the record's hash is {record.head}")
    return 0


# What options mean


def _record(options: argparse.Namespace) -> Approvals:
    from planrt.plans.policy.approvals import Approvals

    if not Path(options.folder).is_dir():
        raise OptionError(f"--approvals: there is no folder {options.folder}")
    return Approvals(options.folder)


def _policy_version(options: argparse.Namespace) -> str:
    if not options.policy:
        return ""
    from planrt.plans.policy.rules import Policy  # needs torch only for what it says of ops

    return Policy.from_file(options.policy).version


def _plan_file(options: argparse.Namespace) -> tuple[Path, list[Asking]]:
    """The file to look into, and who asked for the plan where it is one that waits."""
    path = Path(options.file)
    if path.exists() or not re.fullmatch(r"[0-9a-f]{8,64}", options.file):
        return path, _askings_beside(path)
    record = _record(options)
    plan = record.resolve(options.file)
    for folder in ("pending", "decided"):
        for found in (record.folder / folder).glob(f"{plan}.*"):
            return found, record.askings(plan)
    raise OptionError(f"the plan {plan} is not in {record.folder}")


def _askings_beside(path: Path) -> list[Asking]:
    """Who asked for the plan in a file of a worker's folder."""
    from planrt.plans.policy.approvals import Approvals

    folder = path.absolute().parent
    if folder.name not in ("pending", "decided") or not (folder.parent / "asked").is_dir():
        return []
    return Approvals(folder.parent).askings(path.stem)


def _graphs(path: Path) -> tuple[dict[str, Graph], tuple[Constant, ...] | None]:
    """What a plan's file holds: its graphs by mode, and its constants if they are known.

    Plans that wait have no other state: they are a record, or a graph alone, and the constants where it has
    some.
    """
    from planrt.plans.forms.files import is_plan_file, load_file
    from planrt.plans.ir.constants import constants_of, decoded, has_constants, is_waiting, plan_that_waits
    from planrt.plans.ir.graph import MAX_BYTES, Graph
    from planrt.plans.ir.record import PlanRecord, is_record
    from planrt.plans.saving import load_plan

    try:
        if is_plan_file(path):
            record = load_file(path).record
            if not has_constants(record.graphs[0]):
                return _modes(record), ()
            return _modes(record), constants_of(record.graphs[0], load_plan(path).state_tensors())
        with open(path, "rb") as file:
            data = file.read(2 * MAX_BYTES + 1)
        data, kept = plan_that_waits(data) if is_waiting(data) else (data, None)
        graphs = _modes(PlanRecord.from_bytes(data)) if is_record(data) else {"plan": Graph.from_bytes(data)}
        graph = next(iter(graphs.values()))
        return graphs, None if kept is None and has_constants(graph) else decoded(graph, kept or [])
    except OSError as error:
        raise OptionError(f"{path}: {error.strerror or error}") from None
    except OptionError:
        raise
    except PlanrtError as error:
        said = str(error)  # of a plan file it begins with the path
        raise OptionError(said if said.startswith(f"{path}:") else f"{path}: {said}") from None


def _modes(record: PlanRecord) -> dict[str, Graph]:
    if len(record.graphs) == 1:
        return {"plan": record.graphs[0]}
    return {"training": record.graph(training=True), "evaluation": record.graph(training=False)}


def _inputs(graph: Graph, texts: Sequence[str]) -> list[TensorSpec]:
    from planrt.types import FREE, TensorSpec

    specs = list(graph.inputs)
    for text in texts:
        place, sizes = _assigned(graph, "--input", text)
        if not re.fullmatch(r"(\d{1,12}(x\d{1,12})*)?", sizes):
            raise OptionError(f"--input: {text!r}: sizes are written as 32x1x28x28")
        specs[place] = TensorSpec(tuple([int(size) for size in sizes.split("x") if size]), specs[place].dtype)
    for place, like in enumerate(specs):
        if FREE in like.shape:
            name = graph.input_name(place) if place < len(graph.input_names) else str(place)
            example = "x".join("32" if size == FREE else str(size) for size in like.shape)
            raise OptionError(
                f"{graph.input_name(place)} is {like}: say its sizes, for example --input {name}={example}"
            )
    return specs


def _tags(graph: Graph, texts: Sequence[str]) -> dict[int, tuple[str, ...]]:
    tags: dict[int, tuple[str, ...]] = {}
    for text in texts:
        place, tag = _assigned(graph, "--tag", text)
        if not re.fullmatch(r"#\S+", tag):
            raise OptionError(f"--tag: {text!r}: a tag is written as #patients")
        tags[place] = (*tags.get(place, ()), tag)
    return tags


def _assigned(graph: Graph, option: str, text: str) -> tuple[int, str]:
    """The place of the input that ``NAME=value`` names, and the value."""
    name, equals, value = text.partition("=")
    names = {graph.input_name(place): place for place in range(len(graph.inputs))}
    names |= {str(place): place for place in range(len(graph.inputs))}
    if not equals or name not in names:
        known = ", ".join(graph.input_name(place) for place in range(len(graph.inputs)))
        raise OptionError(
            f"{option}: {text!r} does not name an input: write NAME=..., where NAME is one of {known}"
        )
    return names[name], value


if __name__ == "__main__":
    command()

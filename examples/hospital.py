"""A hospital approves a plan: researchers train on patients whom they never see, and only what its owner allowed.

The hospital's worker has a policy (`hospital_policy.toml`): plans wait until somebody there has read and approved
them, and what leaves of `#patients` must be an aggregate over at least 20 rows. The patients are scikit-learn's breast
cancer data: 569 rows of 30 measurements.

    python examples/hospital.py [--websocket] [--epochs 100]
"""

from __future__ import annotations

import argparse
import contextlib
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from _workers import options_of
from torch import nn

import planrt as sy
from planrt.command_line import positive_number, run_command, whole_number
from planrt.errors import GetNotPermittedError, NotApprovedError, PolicyRefusedError, RemoteError
from planrt.extras import needed
from planrt.fl.runs.children import ChildOptions, WorkerProcesses
from planrt.plans.policy import Policy
from planrt.workers import BaseWorker
from planrt.workers.serving import users_file

POLICY = Path(__file__).with_name("hospital_policy.toml")
TOKEN = "only the hospital's own staff knows this"  # noqa: S105 - it guards nothing but this example

Connect = Callable[[str], BaseWorker]
"""Takes a token, or "" for nobody; gives a client of the hospital's worker."""


class Study(sy.Plan):
    """One step of a logistic regression: learns from all rows, gives the loss and the share that it got right."""

    def __init__(self, lr: float) -> None:
        super().__init__()
        self.lr = lr
        self.layer = nn.Linear(30, 1)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Measurements [B, 30] and diagnoses [B, 1] of 0 and 1."""
        score = self.layer(x)
        loss = F.binary_cross_entropy_with_logits(score, y)
        loss.backward()
        with torch.no_grad():
            for parameter in self.layer.parameters():
                parameter -= self.lr * parameter.grad
        return loss, ((score > 0) == (y > 0.5)).float().mean()


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the example; returns its exit code."""
    parser = options_of("hospital", __doc__)
    add = parser.add_argument
    add("--epochs", type=whole_number(at_least=1), default=100, help="training steps (%(default)s)")
    add("--lr", type=positive_number, default=0.5, help="learning rate (%(default)s)")
    add("--seed", type=whole_number(at_least=0), default=1, help="of models and data (%(default)s)")
    options = parser.parse_args(argv)
    return run_command(parser.prog, lambda: run(options), verbose=options.verbose)


def run(options: argparse.Namespace) -> None:
    """The hospital's side and the researchers' side, in turn."""
    torch.manual_seed(options.seed)
    with tempfile.TemporaryDirectory() as name, hospital(Path(name), websocket=options.websocket) as connect:
        folder = Path(name)
        owner = connect(TOKEN)  # its objects stay as long as it is connected
        admit_patients(owner)
        researcher = connect("")
        x, y = look_around(researcher)
        study = Study(options.lr).build(torch.zeros(4, 30), torch.zeros(4, 1))
        ask(researcher, study, x, y)
        decide(folder, study)
        learn(researcher, study, x, y, options.epochs)
        try_more(researcher, x, folder)
        print("\n== The hospital: what was decided, each line sealed by the hash of the one before")
        planrt(folder, "decisions")


@contextlib.contextmanager
def hospital(folder: Path, *, websocket: bool) -> Iterator[Connect]:
    """The hospital's worker, in this process or in one of its own; `folder` is where its owner keeps records."""
    hook = sy.TorchHook(torch)
    with contextlib.ExitStack() as stack:
        if not websocket:
            worker = stack.enter_context(
                sy.VirtualWorker(
                    hook,
                    id="hospital",
                    users={"staff": TOKEN},
                    policy=Policy.from_file(POLICY),
                    approvals=folder / "approvals",
                )
            )
            yield lambda token: stack.enter_context(worker.connect_as(token))
            return
        users = folder / "users.txt"
        users_file.add(users, "staff", TOKEN)  # as `planrt users add staff --token-stdin` does
        child = ChildOptions(
            "hospital",
            options=("--empty", "--threads", "1", "--users", str(users), "--policy", str(POLICY),
                     "--approvals", str(folder / "approvals")),
        )  # fmt: skip
        ready = stack.enter_context(WorkerProcesses([child])).wait_ready()["hospital"]
        print(f"Worker processes: hospital at {ready.uri}")
        yield lambda token: stack.enter_context(
            sy.WebsocketClientWorker("hospital", uri=ready.uri, token=token)
        )


def admit_patients(owner: BaseWorker) -> None:
    """The hospital's staff puts its data on its worker; only they may read it."""
    found = needed("sklearn.datasets", by="this example").load_breast_cancer()
    x = torch.from_numpy(found.data).float()
    x = (x - x.mean(0)) / x.std(0)
    y = torch.from_numpy(found.target).float().view(-1, 1)
    for tensor, tag, about in (
        (x, "#measurements", "thirty measurements of cells, standardised"),
        (y, "#diagnosis", "1 for benign"),
    ):
        tensor.tag("#patients", tag).describe(about).send(owner, allowed_users=["staff"])
    print(f"== The hospital has {owner.objects_count()} private tensors on its worker")


def look_around(researcher: BaseWorker) -> tuple[torch.Tensor, torch.Tensor]:
    """What researchers find: shapes, tags and descriptions, and nothing of the values."""
    print("\n== A researcher searches #patients, and asks for the values")
    (x,), (y,) = researcher.search("#patients", "#measurements"), researcher.search("#patients", "#diagnosis")
    print(f"found {x.description!r} {tuple(x.shape)} and {y.description!r} {tuple(y.shape)}")
    refused(GetNotPermittedError, x.get)
    print("... or computes on them by hand")
    refused(NotApprovedError, lambda: (x.mean(0) + 0).get())
    return x, y


def ask(researcher: BaseWorker, study: Study, x: torch.Tensor, y: torch.Tensor) -> None:
    """Sends the plan: it is there, and does not run."""
    print(f"\n== The researcher sends a plan of {len(study.graph.ops)} ops, and is told to wait")
    refused(NotApprovedError, lambda: study.send(researcher)(x, y)[0].get())
    print(f"status: {researcher.approval(study).status}")


def decide(folder: Path, study: Study) -> None:
    """Somebody at the hospital reads the plan, and approves it."""
    print("\n== The hospital: what waits?")
    planrt(folder, "pending")
    print("\n== The hospital: what would it do to our data?")
    hash = study.hash[:12]
    planrt(folder, "inspect", hash, "--policy", str(POLICY), "--input", "x=569x30", "--input", "y=569x1",
           "--tag", "x=#patients", "--tag", "y=#patients")  # fmt: skip
    print("\n== The hospital: fine")
    planrt(folder, "approve", hash, "--by", "dr. grey", "--policy", str(POLICY))


def learn(researcher: BaseWorker, study: Study, x: torch.Tensor, y: torch.Tensor, steps: int) -> None:
    """Training: each step is one message. What was learnt may be taken home."""
    print(f"\n== The researcher trains: {steps} steps on all patients")
    there = study.send(researcher)
    figures = [there(x, y) for _ in range(steps)]
    for number in sorted({1, (steps + 1) // 2, steps}):
        loss, right = (value.get().item() for value in figures[number - 1])
        print(f"Step {number}: loss {loss:.4f}, {right:.1%} right")
    trained = there.get()
    print(f"The model came back: weights of {tuple(trained.layer.weight.shape)}")


def try_more(researcher: BaseWorker, x: torch.Tensor, folder: Path) -> None:
    """Plans that go too far: one is denied, one is refused although it was approved."""

    @sy.func2plan(args_shape=[(-1, 30)])
    def first_rows(x: torch.Tensor) -> torch.Tensor:
        return x[:5]

    @sy.func2plan(args_shape=[(-1, 30)])
    def largest(x: torch.Tensor) -> torch.Tensor:
        return x.max(0).values

    for plan in (first_rows, largest):
        plan.send(researcher)
    researcher.objects_count()  # everything has arrived
    print("\n== The researcher would like to see five patients; the hospital says no")
    planrt(folder, "deny", first_rows.hash, "--by", "dr. grey", "--why", "these are five patients")
    refused(NotApprovedError, lambda: first_rows.send(researcher)(x).get())
    print("\n== Somebody there approves the largest values by mistake; the rules hold all the same")
    planrt(folder, "approve", largest.hash, "--by", "dr. hasty")
    refused(PolicyRefusedError, lambda: largest.send(researcher)(x).get())


def refused(kind: type[RemoteError], action: Callable[[], object]) -> None:
    """Does what the hospital must refuse, and shows how it does."""
    try:
        action()
    except kind as error:
        print(f"{type(error).__name__}: {error}")
    else:
        raise RuntimeError("the hospital's worker gave out what it must not")


def planrt(folder: Path, *arguments: str) -> None:
    """Shows and runs a command of the hospital's, in its folder."""
    shown = shlex.join(Path(one).name if one == str(POLICY) else one for one in arguments)
    print(f"$ planrt {shown}", flush=True)
    done = subprocess.run(
        [sys.executable, "-m", "planrt", *arguments], cwd=folder, capture_output=True, text=True, check=False
    )
    print(done.stdout + done.stderr, end="")


if __name__ == "__main__":
    sys.exit(main())

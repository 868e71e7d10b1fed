"""Plans: a training step from a plan against eager PyTorch, and how long tracing and checking take."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn.functional as F

from benchmarks.measure import Goal, Row, in_turns
from benchmarks.plain import PlainWorkers, batches_of
from benchmarks.workloads import BATCH_SIZE, BATCHES, LR, SEED, Size
from planrt.fl.data import digits as data
from planrt.fl.runs.networks import seeded_net
from planrt.plans import Graph, Op, trace
from planrt.plans.analysis import effects
from planrt.plans.policy.rules import Policy, ReleaseRule
from planrt.plans.policy.verify import check
from planrt.plans.running.interpreter import execute, local_state
from planrt.plans.training import trace_model, train
from planrt.types import Ref, TensorSpec
from planrt.workers.datasets import BaseDataset


def measure(size: Size) -> list[Row]:
    """The rows of this group."""
    # A thread of its own, so that torch's number of threads stays as it is for the others.
    with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        return pool.submit(_measure, size).result()


def _measure(size: Size) -> list[Row]:
    batches = 2 if size.quick else 2 * BATCHES
    images = torch.randint(0, 256, (batches * BATCH_SIZE, 28, 28), dtype=torch.uint8)
    dataset = BaseDataset(images, torch.randint(0, 10, (len(images),)), batch_transform=data.normalize)
    plain = PlainWorkers({"worker": dataset}, batches=batches)
    network = seeded_net(SEED)
    state = {name: value.clone() for name, value in network.state_dict().items()}
    plan = trace_model(
        network, F.nll_loss, torch.zeros(2, 1, 28, 28), torch.zeros(2, dtype=torch.int64)
    ).training

    def from_plan() -> None:
        values = [state[entry.name].clone() for entry in plan.state]
        train(
            plan,
            values,
            batches_of(dataset, SEED, batches),
            optimizer="SGD",
            optimizer_args={"lr": LR},
            seed=SEED,
        )

    times = in_turns(
        {"plan": from_plan, "eager": lambda: plain.train("worker", state)}, repeats=2 * size.repeats
    )
    steps = {name: sample.map(lambda seconds: 1000 * seconds / batches) for name, sample in times.items()}
    return [
        Row(
            "training step",
            "ms",
            steps["plan"],
            steps["eager"],
            "eager PyTorch",
            Goal(at_most=1.1),
            f"MNIST network, batch of 32, SGD, one thread, {batches} steps",
        ),
        *_interpreter_rows(size),
        _tracing_row(size),
        *_checking_rows(size),
    ]


def _interpreter_rows(size: Size) -> list[Row]:
    """Plans that do all the work, against the function they were recorded from: what the interpreter costs."""
    network = seeded_net(SEED)
    optimizer = torch.optim.SGD(network.parameters(), lr=LR)
    batch = torch.randn(BATCH_SIZE, 1, 28, 28), torch.randint(0, 10, (BATCH_SIZE,))

    def step(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.nll_loss(network(images), labels)
        loss.backward()
        optimizer.step()
        return loss

    def small(x: torch.Tensor) -> torch.Tensor:
        for _ in range(50):
            x = x.add(1).mul(0.5)
        return x

    vector = torch.randn(4)
    training = trace(step, batch, modules=[network], free_dims=[[0], [0]])
    chain = trace(small, [vector])
    state = [tensor.clone() for tensor in local_state(training)]
    steps, chains = (2, 20) if size.quick else (10, 500)

    def repeated(function: Callable[[], object], times: int) -> Callable[[], None]:
        def run() -> None:
            for _ in range(times):
                function()

        return run

    runs = {
        "step": repeated(lambda: execute(training, batch, state), steps),
        "eager step": repeated(lambda: step(*batch), steps),
        "chain": repeated(lambda: execute(chain, [vector]), chains),
        "eager chain": repeated(lambda: small(vector), chains),
    }
    times = in_turns(runs, repeats=2 * size.repeats)
    each = {
        name: sample.map(lambda seconds, times=steps if "step" in name else chains: 1000 * seconds / times)
        for name, sample in times.items()
    }
    return [
        Row(
            "whole step as a plan",
            "ms",
            each["step"],
            each["eager step"],
            "eager PyTorch",
            Goal(at_most=1.1),
            "forward, loss, backward and SGD update of the MNIST network in one plan, batch of 32, one thread",
        ),
        Row(
            "100 small ops",
            "ms",
            each["chain"],
            each["eager chain"],
            "eager PyTorch",
            note="on a vector of 4: what the interpreter adds to an op",
        ),
    ]


def _tracing_row(size: Size) -> Row:
    from torchvision.models import resnet18

    model = resnet18(weights=None)
    example = torch.zeros(2, 3, 64, 64), torch.zeros(2, dtype=torch.int64)

    def eager() -> None:
        for training in (True, False):
            F.cross_entropy(model.train(training)(example[0]), example[1])

    times = in_turns(
        {"trace": lambda: trace_model(model, F.cross_entropy, *example), "eager": eager}, repeats=size.repeats
    )
    return Row(
        "tracing ResNet-18",
        "s",
        times["trace"],
        times["eager"],
        "eager forward, twice",
        Goal(at_most=2.0, absolute=True),
        note="training and evaluation plan, with the loss, 64x64 images",
    )


def _checking_rows(size: Size) -> list[Row]:
    """Checking a plan of 1,000 ops against a policy, with nothing known of its ops before."""
    policy = Policy(release=(ReleaseRule("#patients", 5),))
    few, distinct = _long_plan(50), _long_plan(1000)

    def check_cold(graph: Graph) -> None:
        effects.forget()
        check(graph, policy, tags={0: ["#patients"]}).raise_for_violations()

    check_cold(few)  # imports and torch's own tables
    times = in_turns(
        {
            "few": lambda: check_cold(few),
            "distinct": lambda: check_cold(distinct),
            "known": lambda: check(distinct, policy, tags={0: ["#patients"]}),
        },
        repeats=2 * size.repeats,
    )
    note = "1,000 ops with a release rule, nothing cached before"
    milliseconds = times["few"].map(lambda seconds: 1000 * seconds)
    known = times["known"].map(lambda seconds: 1000 * seconds)
    return [
        Row("checking, 50 shapes", "ms", milliseconds, goal=Goal(at_most=50, absolute=True), note=note),
        Row("checking, 1,000 shapes", "s", times["distinct"], goal=Goal(at_most=1, absolute=True), note=note),
        Row("checking again", "ms", known, note="1,000 shapes, every kind of op seen before"),
    ]


def _long_plan(shapes: int) -> Graph:
    """1,000 ops on inputs of this many shapes, each shape with an op of its own; one output, an aggregate."""
    kinds = ["torch.add", "torch.mul", "torch.tanh", "torch.sub"]
    inputs = tuple([TensorSpec((8, 4 + index), torch.float32) for index in range(shapes)])
    latest = list(range(shapes))
    ops = []
    for step in range(999):
        which = step % shapes
        name = kinds[which % len(kinds)]
        args = (Ref(latest[which]),) if name == "torch.tanh" else (Ref(latest[which]), Ref(which))
        latest[which] = shapes + step
        ops.append(Op(name, args, {}, Ref(latest[which])))
    ops.append(Op("torch.mean", (Ref(latest[0]), 0), {}, Ref(shapes + 999)))
    return Graph(inputs, (), tuple(ops), Ref(shapes + 999))

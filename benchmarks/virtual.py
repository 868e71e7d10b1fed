"""A thousand virtual workers in one round, against a plain loop; and their memory.

As a child process (``python -m benchmarks.virtual WORKERS``) it holds that many and answers ``time`` with the
seconds of both in turns, and ``memory`` with the peak of a round. Its own process, because the plain loop needs
torch to have one thread.
"""

from __future__ import annotations

import sys
from typing import Any

import torch

from benchmarks import child
from benchmarks.measure import Goal, PeakMemory, Row, Sample, in_turns, resident_bytes
from benchmarks.plain import PlainLoop
from benchmarks.rounds import Rounds
from benchmarks.workloads import MODEL_BYTES, Size, mnist_config
from planrt.fl.data import digits as data
from planrt.workers import BaseDataset, VirtualWorker

MANY, FEW = 1000, 100


def measure(size: Size) -> list[Row]:
    """The rows of this group."""
    many, few = (40, 20) if size.quick else (MANY, FEW)
    with child.Child("virtual", many) as worker:
        seconds = worker.ask({"time": min(size.repeats, 3)})
    peaks = {}
    for count in (few, many):
        with child.Child("virtual", count) as worker:
            peaks[count] = worker.ask({"rounds": 2})
    return [
        Row(
            f"{many:,} virtual workers",
            "s",
            Sample(tuple(seconds["ours"])),
            Sample(tuple(seconds["plain"])),
            "plain loop, 1 thread",
            Goal(at_most=1.3),
            "one batch of 32 each",
        ),
        Row(
            f"peak memory, {many:,} virtual workers",
            "MB",
            Sample((peaks[many]["peak"] / 1e6,)),
            Sample((peaks[few]["peak"] / 1e6,)),
            f"{few} workers",
            Goal(at_most=1.1),
            f"above before the workers: {peaks[many]['above'] / 1e6:.0f} and {peaks[few]['above'] / 1e6:.0f} MB; "
            f"the model takes {MODEL_BYTES / 1e6:.1f} MB",
        ),
    ]


def shares(count: int) -> dict[str, BaseDataset]:
    """The training images in `count` slices that share their memory."""
    loaded = data.load()
    images = torch.from_numpy(loaded.train_images.copy())
    labels = torch.from_numpy(loaded.train_labels.astype("int64"))
    return {
        f"worker{number:04}": BaseDataset(part, targets, batch_transform=data.normalize)
        for number, (part, targets) in enumerate(
            zip(images.tensor_split(count), labels.tensor_split(count), strict=True)
        )
    }


def main() -> None:
    """See the module."""
    torch.set_num_threads(1)
    parts = shares(int(sys.argv[1]))

    def answer(request: dict[str, int]) -> dict[str, Any]:
        before = resident_bytes()
        workers = [VirtualWorker(name, datasets={data.TRAIN_KEY: part}) for name, part in parts.items()]
        rounds = Rounds(workers, mnist_config(1))
        if repeats := request.get("time"):
            plain = PlainLoop(parts, batches=1)
            times = in_turns(
                {"ours": rounds.run, "plain": lambda: plain.round(rounds.state)}, repeats=repeats, warmup=1
            )
            return {name: sample.values for name, sample in times.items()}
        with PeakMemory() as watched:
            for number in range(request["rounds"]):
                rounds.state = rounds.run(number).state
        return {"peak": watched.bytes, "above": watched.bytes - before}

    child.answer_with(answer)


if __name__ == "__main__":
    main()

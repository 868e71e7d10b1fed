"""What a party of a joint run does, as a generator: it yields what it sends and what it waits for. No I/O.

A role is written once, as `planrt.sharing` writes its protocols, and runs between workers
(`planrt.workers.machine.joint`) or between the parties of one process (`run_here`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from planrt.errors import JointError


@dataclass(frozen=True, slots=True)
class Send:
    """Send `tensors` to party `to`, as what `kind` names."""

    to: int
    kind: str
    tensors: Sequence[torch.Tensor]


@dataclass(frozen=True, slots=True)
class Take:
    """Wait for what party `source` sends next, which must be of `kind`."""

    source: int
    kind: str


@dataclass(frozen=True, slots=True)
class Turn:
    """Let others have their turn: this much computing was enough at a time. Says how far it is, where that is known."""

    what: str = ""
    done: int = 0
    of: int = 0


Tensors: TypeAlias = list[torch.Tensor]
Role: TypeAlias = Generator[Send | Take | Turn, Tensors | None, dict[str, Any]]
"""What one party does. A `Take` gives it the tensors; what it returns is its result."""


def take(source: int, kind: str) -> Generator[Send | Take | Turn, Tensors | None, Tensors]:
    """Waits for the next parcel of party `source`: to be used with ``yield from``."""
    got = yield Take(source, kind)
    assert got is not None  # noqa: S101 - that is what a Take gives
    return got


def take_one(
    source: int, kind: str, dtype: torch.dtype, shape: Sequence[int | None], names: Sequence[str]
) -> Generator[Send | Take | Turn, Tensors | None, torch.Tensor]:
    """Waits for a parcel of one tensor of that dtype and shape (None: any size), as `take`.

    Raises:
        JointError: it is another; names the party.
    """
    tensors = yield from take(source, kind)
    if len(tensors) == 1:
        (tensor,) = tensors
        sizes = zip(tensor.shape, shape, strict=False)
        if tensor.dtype == dtype and tensor.dim() == len(shape) and all(w in (None, n) for n, w in sizes):
            return tensor
    found = ", ".join(f"{str(one.dtype).removeprefix('torch.')}{list(one.shape)}" for one in tensors)
    wanted = ["any" if size is None else size for size in shape]
    raise JointError(
        f"party {names[source]!r} sent {found or 'nothing'} as its {kind}, where "
        f"{str(dtype).removeprefix('torch.')}{wanted} is due: parties run the same protocol"
    )


def run_here(
    roles: Sequence[Role], *, seen: Callable[[int, Send], None] | None = None
) -> list[Mapping[str, Any]]:
    """Runs all parties in this process, and returns their results; `seen` is told of each parcel and its sender.

    Raises:
        JointError: they wait for each other, or a parcel is of another kind than its taker wants.
    """
    boxes: dict[tuple[int, int], deque[Send]] = {}
    results: dict[int, Mapping[str, Any]] = {}
    wanted: dict[int, Take | None] = dict.fromkeys(range(len(roles)))
    while len(results) < len(roles):
        moved = False
        for number, role in enumerate(roles):
            if number in results:
                continue
            want, given = wanted[number], None
            if want is not None:
                box = boxes.get((want.source, number))
                if not box:
                    continue
                parcel = box.popleft()
                if parcel.kind != want.kind:
                    raise JointError(f"party {want.source} sent {parcel.kind!r} where {want.kind!r} is due")
                given, wanted[number] = list(parcel.tensors), None
            moved = True
            try:
                step = role.send(given)
                while not isinstance(step, Take):
                    if isinstance(step, Send):
                        if seen is not None:
                            seen(number, step)
                        boxes.setdefault((number, step.to), deque()).append(step)
                    step = role.send(None)
                wanted[number] = step
            except StopIteration as done:
                results[number] = done.value
        if not moved:
            raise JointError("the parties wait for each other")
    return [results[number] for number in range(len(roles))]

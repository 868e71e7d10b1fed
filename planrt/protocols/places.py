"""What a run is given: which worker stands for which name, where the inputs are, what random ops draw
from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from planrt.errors import LocalError, MixedLocationsError, ProtocolError
from planrt.workers.base import BaseWorker
from planrt.workers.pointers.handle import alive
from planrt.workers.pointers.multi import MultiPointerTensor
from planrt.workers.pointers.tensor import PointerTensor


def resolve(
    places: Sequence[str], fixed: Mapping[str, BaseWorker], workers: Sequence[Any]
) -> dict[str, BaseWorker]:
    """Finds a worker for each place: those that are `fixed`, those whose id is the place, and the others in
    order.

    Raises:
        ProtocolError: too few or too many workers, the same one twice, or something that is no worker.
    """
    for worker in workers:
        if not isinstance(worker, BaseWorker):
            hint = ": write deploy(*workers)" if isinstance(worker, list | tuple) else ""
            raise ProtocolError(f"deploy takes workers, not {type(worker).__name__}{hint}")
    ids = [worker.id for worker in workers]
    for id in ids:
        if ids.count(id) > 1:
            raise ProtocolError(
                f"worker {id!r} twice: different names are different workers; give steps that shall share one the same "
                "name"
            )
    open_places = [place for place in places if place not in fixed]
    found = {worker.id: worker for worker in workers if worker.id in open_places}
    rest = [worker for worker in workers if worker.id not in found and fixed.get(worker.id) is not worker]
    unnamed = [place for place in open_places if place not in found]
    if len(rest) != len(unnamed):
        few = "few" if len(rest) < len(unnamed) else "many"
        raise ProtocolError(
            f"too {few} workers: the protocol has {len(open_places)} places to fill "
            f"({', '.join(open_places) or 'none'}), got {len(workers)} workers ({', '.join(ids) or 'none'})"
        )
    found.update(zip(unnamed, rest, strict=True))
    taken = {worker.id for worker in fixed.values()}
    for place, worker in found.items():
        if worker.id in taken and place != worker.id:
            raise ProtocolError(
                f"worker {worker.id!r} has steps of its own already, and cannot be {place!r} too: give those steps the "
                "same name"
            )
    return {place: fixed[place] if place in fixed else found[place] for place in places}


def bound(names: Sequence[str], inputs: Sequence[Any], named: Mapping[str, Any]) -> list[Any]:
    """Returns the inputs of a run in the protocol's order.

    Raises:
        ProtocolError: too many, missing or unknown ones, or something that is no tensor.
    """
    takes = f"the protocol takes {', '.join(names) or 'no inputs'}"
    if len(inputs) > len(names):
        raise ProtocolError(f"{takes}: {len(inputs)} inputs are too many")
    values = dict(zip(names, inputs, strict=False))
    for name, value in named.items():
        if name not in names:
            raise ProtocolError(f"{takes}: there is no input {name!r}")
        if name in values:
            raise ProtocolError(f"input {name!r} was given twice, in order and by name")
        values[name] = value
    missing = [name for name in names if name not in values]
    if missing:
        raise ProtocolError(f"{takes}: {', '.join(missing)} is missing")
    for name, value in values.items():
        if not isinstance(value, torch.Tensor):
            raise ProtocolError(f"input {name!r} is a tensor or a pointer to one, not {type(value).__name__}")
    return [values[name] for name in names]


def seed_of_run(seed: int | None) -> int:
    """Returns the seed that a run draws from: as given, or drawn from torch's generator here.

    Raises:
        ProtocolError: no seed.
    """
    if seed is None:
        return int(torch.randint(2**63 - 1, ()).item())
    if type(seed) is not int or not 0 <= seed < 2**63:
        raise ProtocolError(f"seed is a whole number in [0, 2**63), not {seed!r}")
    return seed


def placed_at(value: torch.Tensor, places: Mapping[str, BaseWorker], name: str) -> dict[str, int] | None:
    """Place -> id there, for an input that is on workers already; None for a tensor of this process.

    Raises:
        MixedLocationsError: a pointer to a worker where no step takes it.
    """
    parts: list[PointerTensor]
    if isinstance(value, MultiPointerTensor):
        parts = list(value.child.values())
    elif isinstance(value, PointerTensor):
        parts = [value]
    else:
        return None
    placed = {}
    for pointer in parts:
        handle = alive(pointer)
        if handle.via:
            raise LocalError(f"{name} is a pointer to a pointer: get() it first, and give what that returns")
        placed.update({place: handle.id for place, worker in places.items() if worker is handle.worker})
    if not placed:
        where = ", ".join(repr(alive(pointer).worker.id) for pointer in parts)
        takers = ", ".join(repr(worker.id) for worker in dict.fromkeys(places.values()))
        raise MixedLocationsError(
            f"{name} is on worker {where}, and taken on {takers}: move it there with .move(worker), or get() it and "
            "give the tensor"
        )
    return placed

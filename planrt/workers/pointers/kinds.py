"""Kinds of objects as clients see them: what makes a pointer to an object that a search found, by its kind on the wire.

A new kind is one call, in the module of its pointers::

    register("share", lambda worker, found: SharePointer(Handle(worker, found.id, owned=found.snapshot)))

and a line in `_HOMES`, where this process may meet an object of that kind before it imports that module.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any, Final, TypeAlias

from planrt.errors import LocalError, OptionError
from planrt.workers.pointers.workplace import Location
from planrt.workers.wire import messages as m

MakePointer: TypeAlias = Callable[[Location, m.FoundItem], Any]
"""(worker, what it found) -> a pointer. Where `FoundItem.snapshot` is False the object stays when the pointer goes."""

_HOMES: Final = {
    "tensor": "planrt.workers.pointers.tensor",
    "plan": "planrt.workers.pointers.plan",
    "protocol": "planrt.protocols.pointer",
}
"""The modules that register these kinds, imported at first use."""

_makers: dict[str, MakePointer] = {}


def register(kind: str, make: MakePointer) -> None:
    """Makes `make` the one that makes pointers to objects of `kind`.

    Raises:
        OptionError: something else does already.
    """
    if kind in _makers:
        raise OptionError(f"objects of kind {kind!r} have pointers already")
    _makers[kind] = make


def pointer_to(worker: Location, found: m.FoundItem) -> Any:
    """Returns a pointer to an object that a search found on `worker`.

    Raises:
        LocalError: no kind that this process knows, or an object that is not like others of its kind.
    """
    kind: str = found.kind
    if kind not in _makers and kind in _HOMES:
        import_module(_HOMES[kind])
    if kind not in _makers:
        raise LocalError(
            f"worker {worker.id!r} holds an object of kind {kind!r}, which this planrt does not know"
        )
    return _makers[kind](worker, found)

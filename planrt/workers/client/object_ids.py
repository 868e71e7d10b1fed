"""Which id an object gets on a worker: that of the tensor that was sent, if nothing of this process has it there.

Ids are unique in a process, so what is asked is whether something of this process is on that worker under the id
already, and may still be when the next message arrives. Messages of one client arrive in their order, and so what it
frees is gone before what it sends next; what another client of the same worker frees may arrive later, or never. So an
id that one client has used there is for that client alone. No I/O.
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict

from planrt.workers.pointers.handle import Handle

_LEFT = 100_000
"""Ids remembered of objects that nobody here points at, and that may be on the worker still; and of those that one
client has used."""

_choosing = threading.RLock()


class ObjectIds:
    """The ids that objects of this process have, or may have, on the workers of one name."""

    def __init__(self) -> None:
        self._handles: weakref.WeakValueDictionary[int, Handle] = weakref.WeakValueDictionary()
        self._left: OrderedDict[int, None] = OrderedDict()
        self._used: OrderedDict[int, tuple[weakref.ref[object], str]] = OrderedDict()
        """Ids that something had there, as far as they are remembered -> the client that sent it, and where it went:
        another worker of that name is another one."""

    def holder(self, id: int) -> Handle | None:
        """Returns the handle of the object that was given `id`, if somebody holds one."""
        handle = self._handles.get(id)
        return handle if handle is not None and handle.alive and handle.id == id else None

    def free(self, id: int, client: object) -> bool:
        """Returns whether no object of this process can have `id` there once what `client` sends next arrives."""
        used = self._used.get(id)
        anothers = used is not None and used[0]() is not client and used[1] == _address(client)
        return id not in self._left and self.holder(id) is None and not anothers

    def claim(self, handle: Handle, wanted: int) -> bool:
        """Gives `handle` the id `wanted` if that is free; says whether it is."""
        with _choosing:
            if not self.free(wanted, handle.worker):
                return False
            handle.id = wanted
            self._used[wanted] = weakref.ref(handle.worker), _address(handle.worker)
            self._used.move_to_end(wanted)
            if len(self._used) > _LEFT:
                self._used.popitem(last=False)
            self._handles[wanted] = handle
            return True

    def leave(self, id: int) -> None:
        """Notes that object `id` stays when its pointers go, or belongs to somebody else now. Finalizers call it,
        too.
        """
        self._left[id] = None
        if len(self._left) > _LEFT:
            self._left.popitem(last=False)

    def gone(self, id: int) -> None:
        """Notes that object `id` has been removed."""
        self._left.pop(id, None)


def _address(client: object) -> str:
    """Where the worker of a client is reached; ``""`` of one that does not say so."""
    return str(getattr(client, "link_address", ""))


_by_worker: dict[str, ObjectIds] = {}


def ids_of(worker_id: str) -> ObjectIds:
    """Returns the ids on workers called `worker_id`: one table, however many clients of them this process has."""
    with _choosing:
        return _by_worker.setdefault(worker_id, ObjectIds())

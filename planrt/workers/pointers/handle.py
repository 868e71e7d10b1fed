"""What every pointer has, whatever it points to: a handle on the object, its place, its tags."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn, Protocol, Self, cast

import torch

from planrt.errors import GonePointerError, OptionError, RemoteOpError
from planrt.shown import shown
from planrt.types import as_whole, plain
from planrt.workers.pointers.workplace import Location
from planrt.workers.wire.objects import new_id

if TYPE_CHECKING:
    from planrt.workers.base import BaseWorker


class Handle:
    """A pointer's hold on the object `id` on `worker`. When nobody refers to it any more, the worker may free
    the object.
    """

    __slots__ = ("__weakref__", "alive", "id", "owned", "place", "via", "worker")

    def __init__(
        self, worker: Location, id: int, via: tuple[Location, ...] = (), *, owned: bool = True
    ) -> None:
        self.worker = worker
        self.place = worker.workplace
        """The session there that the object belongs to; the worker has another one after it was connected again."""
        self.id = id
        self.via = via
        """The workers that the object itself points through, in order; empty for a tensor."""
        self.owned = owned
        """Whether the object goes with the handle; what somebody else has published does not."""
        self.alive = True
        """Whether there is an object: `get` and `move` leave a handle of nothing."""

    def __del__(self) -> None:
        if self.alive and self.place is self.worker.workplace:
            if self.owned:
                self.place.forget(self.id)
            else:
                self.place.ids.leave(self.id)


class Pointer(Protocol):
    """A pointer to an object on a worker: to a tensor, a plan, a protocol."""

    _handle: Handle


def alive(pointer: Pointer) -> Handle:
    """Returns the handle of a pointer that still points somewhere.

    Raises:
        GonePointerError: after `get` or `move`, or when its session has ended.
    """
    handle = pointer._handle
    if not handle.alive:
        raise GonePointerError(
            f"this pointer to {handle.id} on worker {handle.worker.id!r} was used up by get() or send(): use what that "
            "returned"
        )
    if handle.place is not handle.worker.workplace:
        raise GonePointerError(
            f"object {handle.id}{_tagged(pointer)} went with the earlier session on worker {handle.worker.id!r} "
            f"({handle.place.why_ended}): a session's objects do not outlive it, unless they are tagged and the worker "
            "still runs; send it again, or search() for it"
        )
    return handle


def _tagged(pointer: Pointer) -> str:
    """The tags of a pointer, in brackets."""
    tags = [str(tag) for tag in getattr(pointer, "_tags", ())]
    return f" ({shown(' '.join(tags), 100)})" if tags else ""


def handle_at(location: object, id_at_location: object) -> Handle:
    """Returns a handle of what worker `location` holds under that id, which stays there when the handle goes.

    Raises:
        OptionError: no worker, or no id.
    """
    if not hasattr(location, "workplace") or id_at_location is None:
        raise OptionError("a pointer is made with location=worker and id_at_location=the object's id there")
    worker: Any = location
    number = as_whole(id_at_location, "id_at_location")
    held: Handle | None = worker.workplace.ids.holder(number)
    return held or Handle(worker, number, owned=False)


class PointsToObject:
    """The names that all pointers have for users: the place of the object, its tags, and how long it stays.

    Tags and description are in the attributes ``_tags`` and ``_description``, as those of tensors that are here.
    """

    __slots__ = ()

    _handle: Handle

    @property
    def location(self) -> BaseWorker:
        """The worker that holds the object."""
        return cast("BaseWorker", self._handle.worker)

    @property
    def id_at_location(self) -> int:
        """The object's id on its worker."""
        return self._handle.id

    @property
    def garbage_collection(self) -> bool:
        """True if the object goes from the worker when the last pointer to it does."""
        return self._handle.owned

    @garbage_collection.setter
    def garbage_collection(self, value: bool) -> None:
        self._handle.owned = bool(value)

    gc = garbage_collection
    garbage_collect_data = garbage_collection

    @property
    def disable_gc(self) -> Self:
        """This pointer, whose object stays from here on when the last pointer to it goes."""
        self._handle.owned = False
        return self

    @property
    def tags(self) -> set[str]:
        """The object's tags, as far as this pointer knows them."""
        return set(self.__dict__.get("_tags", ()))

    @property
    def description(self) -> str:
        """The object's description, as far as this pointer knows it."""
        found: str = self.__dict__.get("_description", "")
        return found

    def tag(self, *tags: str) -> Self:
        """Tags the object, which publishes it: others find it by these tags, and it outlives this session."""
        every = (*self.__dict__.get("_tags", ()), *tags)
        alive(self).place.objects.describe(self, every, self.description)
        self.__dict__["_tags"] = tuple(plain(tag) for tag in every)
        return self

    def describe(self, description: str) -> Self:
        """Gives the object a description, whose words `search` finds."""
        alive(self).place.objects.describe(self, self.__dict__.get("_tags", ()), description)
        self.__dict__["_description"] = plain(description)
        return self

    def __deepcopy__(self, memo: Any) -> NoReturn:
        not_copied()

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        not_copied()


def not_copied() -> NoReturn:
    """Refuses `copy.deepcopy` and `pickle` of a pointer."""
    raise RemoteOpError(
        "a pointer cannot be pickled or deep-copied, it would point to an object that nobody keeps: copy() the object "
        "on its worker, or get() it; of a model, get() it before you save it or its optimizer, whose state comes along"
    )


class ObjectPointer(PointsToObject):
    """A pointer to a plan or a protocol: it is no tensor, and stands for a worker's object.

    Attributes:
        id: the pointer's own id, here.
    """

    _tags: tuple[str, ...]
    _description: str

    def __init__(self, handle: Handle, tags: Sequence[str], description: str) -> None:
        self._handle = handle
        self._tags = tuple(tags)
        self._description = description
        self.id = new_id()

    @property
    def owner(self) -> BaseWorker:
        """The worker that stands for this process."""
        here: BaseWorker = getattr(torch.empty(0), "owner", None) or self.location
        return here

"""What is on a worker: listings that fetch no values, and objects by their ids."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from planrt.errors import LocalError
from planrt.loop import on_loop, run
from planrt.plans.running.inference import spec
from planrt.workers.client import registry
from planrt.workers.pointers import kinds
from planrt.workers.pointers.handle import Handle
from planrt.workers.pointers.tensor import make_pointer
from planrt.workers.wire import messages as m

if TYPE_CHECKING:
    from planrt.workers.client.workplace import RemoteWorkplace

_INSTEAD = "await worker.async_list_objects()"
_NOTHING = spec((), (), torch.float32, False, True)
"""Of what is only fetched."""


@dataclass(frozen=True, slots=True)
class HeldPointer:
    """A pointer that a worker holds to an object on another worker.

    Attributes:
        id: the pointer's id on its own worker. owner: the id of that worker.
        location: the worker it points to; its id, where this process does not know that worker.
        id_at_location: the object's id there.
    """

    id: int
    owner: str
    location: Any
    id_at_location: int

    def __repr__(self) -> str:
        there = self.location if isinstance(self.location, str) else self.location.id
        return f"(Wrapper)>[PointerTensor | {self.owner}:{self.id} -> {there}:{self.id_at_location}]"


def held_pointer(owner: str, id: int, peer: m.PeerAddress, object: int) -> HeldPointer:
    """Returns what stands in listings for a pointer that worker `owner` holds."""
    return HeldPointer(id, owner, registry.find(peer.worker) or peer.worker, object)


class Contents:
    """Listings of one session's objects."""

    def __init__(self, place: RemoteWorkplace) -> None:
        self._place = place

    @on_loop
    async def listing(self) -> dict[int, Any]:
        """Returns what the worker holds for this client, by id, without values; to be awaited on any loop.

        Tensors, plans and protocols are pointers, which keep nothing there; a `HeldPointer` is what points to another
        worker, and None a part of a secret, or what an op should have made that failed.
        """
        await self._place.gradients.settle_async()
        listed, _ = await self._place.ask(m.Listed, m.ListObjects(), drops=True)
        try:
            return {item.id: self._listed(item) for item in listed.objects}
        except (LocalError, KeyError) as error:
            raise self._place.unexpected(listed) from error

    def _listed(self, item: m.ListedItem) -> Any:
        worker = self._place.worker
        if item.peer is not None:
            return held_pointer(worker.id, item.id, item.peer, item.object)
        if item.kind == "failed" or item.kind == "pointer" or item.kind == "share":
            return None
        found = m.FoundItem(item.id, item.spec, item.tags, item.description, False, False, item.kind)
        return kinds.pointer_to(worker, found)

    def at(self, id: int) -> Any:
        """Returns what the worker holds under that id, as its listing shows it; for any thread but planrt's own.

        Raises:
            UnknownObjectError: there is nothing under that id.
        """
        found = run(self.listing(), instead=_INSTEAD)
        if id not in found:
            self._place.ask_and_wait(m.Message, m.Fetch(id, False), instead=_INSTEAD)  # it says what is wrong
        return found[id]

    def taken(self, id: int) -> Any:
        """Returns the value of object `id`, which the worker forgets; for any thread but planrt's own.

        Raises:
            UnknownObjectError: this client has no such object there. GetNotPermittedError: it is private.
        """
        handle = self._place.ids.holder(id) or Handle(self._place.worker, id, owned=False)
        return self._place.objects.fetch(make_pointer(handle, _NOTHING))

"""What is on a worker: listings that fetch no values, and objects by their ids. `BaseWorker` inherits this."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from planrt.errors import OptionError
from planrt.loop import on_loop, run
from planrt.plans.running.inference import spec
from planrt.types import as_whole
from planrt.workers.client import registry
from planrt.workers.client.objects import maker_of
from planrt.workers.client.plans import RemotePlans
from planrt.workers.pointers.tensor import Handle, PointerTensor, make_pointer, refuse_user
from planrt.workers.wire import messages as m
from planrt.workers.wire.objects import spec_from_wire

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
    """What stands in listings for a pointer that worker `owner` holds."""
    return HeldPointer(id, owner, registry.find(peer.worker) or peer.worker, object)


class Contents(RemotePlans):
    """The part of a worker's client that shows what is there."""

    @on_loop
    async def async_list_objects(self) -> dict[int, Any]:
        """What the worker holds for this client, by id, without values.

        Tensors, plans and protocols are pointers, which keep nothing there; a `HeldPointer` is what points to another
        worker, and None what an op should have made that failed.
        """
        await self.gradients.settle_async()
        body, _ = await self._connection.finish(self._ask(m.ListObjects(), drops=True))
        if not isinstance(body, m.Listed):
            raise self._unexpected(body)
        return {item.id: self._listed(item) for item in body.objects}

    def _listed(self, item: m.ListedItem) -> Any:
        if item.peer is not None:
            return held_pointer(self.id, item.id, item.peer, item.object)
        if item.kind == "plan" or maker_of(item.kind) is not None:
            found = m.FoundItem(item.id, None, item.tags, item.description, False, False, item.kind)  # type: ignore[arg-type]
            return self._found(found)
        if item.spec is None:
            return None
        pointer = make_pointer(Handle(self, item.id, owned=False), spec_from_wire(item.spec))  # type: ignore[arg-type]
        pointer.__dict__["_tags"], pointer.__dict__["_description"] = tuple(item.tags), item.description
        return pointer

    @property
    def _objects(self) -> dict[int, Any]:
        """What the worker holds for this client, by id; see `async_list_objects`."""
        return run(self.async_list_objects(), instead="await worker.async_list_objects()")

    @_objects.setter
    def _objects(self, value: object) -> None:
        self._replace_objects(value)

    def _replace_objects(self, value: object) -> None:
        if value:
            raise OptionError(
                "_objects is a listing: worker.set_obj(x) puts something there, rm_obj(id) removes it"
            )
        run(self.async_clear_objects(), instead="await worker.async_clear_objects()")

    def tensor_at(self, id: int) -> PointerTensor:
        """A pointer to this client's tensor of that id, which stays there when the pointer goes.

        Raises:
            UnknownObjectError: there is nothing under that id. OptionError: it is no tensor.
        """
        number = as_whole(id, "id_at_location")
        found = run(self.async_list_objects(), instead="await worker.async_list_objects()")
        if number not in found:
            self._request(m.Fetch(number, False), instead="await worker.async_list_objects()")
        if not isinstance(found.get(number), PointerTensor):
            raise OptionError(f"object {number} on worker {self.id!r} is no tensor: search for it")
        pointer: PointerTensor = found[number]
        return pointer

    def list_objects(self) -> str:
        """What the worker holds, in words."""
        return str(self._objects)

    def list_objects_remote(self) -> str:
        """The same as `list_objects`."""
        return self.list_objects()

    def objects_count_remote(self) -> int:
        """The same as `objects_count`."""
        return self.objects_count()

    def clear_objects_remote(self) -> Any:
        """The same as `clear_objects`."""
        return self.clear_objects()

    def get_obj(self, id: int) -> Any:
        """What the worker holds under that id, as its listing shows it.

        Raises:
            UnknownObjectError: there is nothing under that id.
        """
        found = self._objects
        number = as_whole(id, "an object's id")
        if number not in found:
            self._request(
                m.Fetch(number, False), instead="await worker.async_list_objects()"
            )  # says what is wrong
        return found[number]

    def request_obj(self, id: int, location: Contents, user: str | None = None, reason: str = "") -> Any:
        """The value of object `id` on worker `location`, which forgets it: ``me.request_obj(x.id_at_location, bob)``.

        Raises:
            UnknownObjectError: this client has no such object there. GetNotPermittedError: it is private.
        """
        if not isinstance(location, Contents):
            raise OptionError(f"request_obj takes the worker that holds it, not {type(location).__name__}")
        refuse_user(user)
        number = as_whole(id, "an object's id")
        handle = location.ids.holder(number) or Handle(location, number, owned=False)  # type: ignore[arg-type]
        return location.fetch(make_pointer(handle, _NOTHING))

"""A worker's objects as its clients see them: sending, fetching, searching."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

import torch

from planrt.errors import LocalError, OptionError, WorkerLostError
from planrt.loop import on_loop, on_loop_thread, refuse_to_block, run
from planrt.types import as_text, as_whole, plain
from planrt.workers.pointers import kinds
from planrt.workers.pointers.handle import Handle, Pointer, alive
from planrt.workers.pointers.tensor import PointerTensor, give_id, make_pointer, pointer_id
from planrt.workers.wire import messages as m
from planrt.workers.wire.objects import check_travels, contiguous, new_id

if TYPE_CHECKING:
    from planrt.workers.client.workplace import RemoteWorkplace

COPIED_BYTES = 1 << 16
"""Tensors up to this size are copied and posted; for larger ones `send` waits until their bytes have left."""


class RemoteObjects:
    """The objects of one session."""

    def __init__(self, place: RemoteWorkplace) -> None:
        self._place = place

    # ------------------------------------------------------------------------------------------ values

    def put(
        self, tensors: Sequence[torch.Tensor], *, allowed: list[str] | None = None, confirm: bool = False
    ) -> list[Handle]:
        """Sends tensors, with their gradients, tags and descriptions, in one message.

        They may change once this returns. `allowed`: the users who may read them, None for everyone. Where a failure
        would lose the values, `confirm` waits until the worker has them.

        Raises:
            UnsupportedTensorError: one that cannot travel. MessageTooLargeError, OptionError: the message cannot be
            sent, and was not. WorkerLostError: the worker is gone. RemoteError: it has no room.
        """
        refuse_to_block("await tensor.async_send(worker)")
        body, payload, handles = self._put_message(tensors, allowed)
        if confirm:
            run(self._place.ask(m.Done, body, payload), instead="await tensor.async_send(worker)")
        elif sum(tensor.nbytes for tensor in payload) <= COPIED_BYTES:
            self._place.connection.post(body, [tensor.clone() for tensor in payload])
        else:
            run(self._place.connection.send(body, payload), instead="await tensor.async_send(worker)")
        if not confirm and any(item.tags for item in body.items):
            run(self.published(), instead="await tensor.async_send(worker)")
        return handles

    @on_loop
    async def put_async(
        self, tensors: Sequence[torch.Tensor], *, allowed: list[str] | None = None, confirm: bool = False
    ) -> list[Handle]:
        """`put`, to be awaited on any loop."""
        body, payload, handles = self._put_message(tensors, allowed)
        if confirm:
            await self._place.ask(m.Done, body, payload)
        else:
            await self._place.connection.send(body, payload)
        if not confirm and any(item.tags for item in body.items):
            await self.published()
        return handles

    def _put_message(
        self, tensors: Sequence[torch.Tensor], allowed: list[str] | None
    ) -> tuple[m.Put, list[torch.Tensor], list[Handle]]:
        items: list[m.PutItem] = []
        payload: list[torch.Tensor] = []
        handles: list[Handle] = []
        for tensor in tensors:
            check_travels(tensor)
            grad = tensor.grad if tensor.is_leaf else None
            handle = self.new_handle(tensor)
            handles.append(handle)
            tags = list(tensor.__dict__.get("_tags", ()))
            if tags:
                self._place.ids.leave(handle.id)
            items.append(
                m.PutItem(
                    handle.id, tensor.requires_grad, grad is not None, tags,
                    tensor.__dict__.get("_description", ""), allowed,
                )
            )  # fmt: skip
            payload.append(tensor.detach())
            if grad is not None:
                check_travels(grad)
                payload.append(grad.detach())
                self._place.gradients.note(handle.id, contiguous(grad))
        return m.Put(items), payload, handles

    # -------------------------------------------------------------------------------- what objects are called

    def new_handle(self, tensor: torch.Tensor) -> Handle:
        """Makes a handle for a tensor (or pointer) that is to come here, under its id where that is free. Where it is
        not, because it was sent before, say, the tensor gets a new id, too.
        """
        handle = self.handle_called(pointer_id(tensor))
        give_id(tensor, handle.id)
        return handle

    def handle_called(self, wanted: int) -> Handle:
        """Makes a handle for an object that is to come here under the id `wanted`, or, where that is taken, under
        another one.
        """
        handle = Handle(self._place.worker, new_id())
        self._place.connection.post_drop_of(wanted)
        if not self._place.ids.claim(handle, wanted):
            self._place.ids.claim(handle, handle.id)
        return handle

    async def settle_drop_of(self, id: int) -> None:
        """Returns when object `id`, if it was to be dropped, is gone."""
        if self._place.connection.post_drop_of(id):
            await self._place.ask(m.Counted, m.CountObjects())

    def removed(self, handle: Handle, *, published: bool, nbytes: int = 0) -> None:
        """Removes the object of `handle` here, since it has arrived elsewhere."""
        self._place.gradients.forget(handle.id)
        with contextlib.suppress(WorkerLostError):  # it went with the connection
            if published:
                self._place.connection.post(m.Remove([handle.id]))
            else:
                self._place.connection.drop(handle.id)
                if nbytes > COPIED_BYTES:
                    self._place.connection.flush_drops()
        self._place.ids.gone(handle.id)
        handle.alive = False  # and from here on the id is free

    # ------------------------------------------------------------------------------------------- fetching

    def fetch(self, pointer: PointerTensor, *, delete: bool = True) -> Any:
        """Returns the value behind a pointer, or what it points to. The worker keeps it until it has arrived here."""
        refuse_to_block("await pointer.async_get()")
        return run(self.fetch_async(pointer, delete=delete), instead="await pointer.async_get()")

    @on_loop
    async def fetch_async(self, pointer: PointerTensor, *, delete: bool = True) -> Any:
        """`fetch`, to be awaited on any loop."""
        place, connection = self._place, self._place.connection
        asked = connection.enqueue(
            m.Fetch(alive(pointer).id, False)
        )  # it removes nothing, and so need not wait
        try:
            await place.gradients.settle_async()
        except BaseException:
            connection.forget(asked)
            raise
        return await self.fetched(pointer, await place.answer(m.Message, asked), delete=delete)

    async def fetched(
        self, pointer: PointerTensor, answer: tuple[m.Message, list[torch.Tensor]], *, delete: bool
    ) -> Any:
        """Returns what the worker answered to a `Fetch`, as it is here: a tensor, or the pointer that it was."""
        handle, (body, tensors) = pointer._handle, answer
        if isinstance(body, m.FetchedPointer):
            there = handle.via[0]
            await there.workplace.moves.claim([body.object], body.token)
            found = make_pointer(Handle(there, body.object, handle.via[1:]), pointer._spec)
            give_id(found, handle.id)
            self.removed(handle, published=False)  # what it pointed to is this client's now
            return found
        if not isinstance(body, m.Fetched) or len(tensors) != 1 + body.has_grad:
            raise self._place.unexpected(body)
        value = tensors[0]
        if body.requires_grad:
            value.requires_grad_()
        if body.has_grad:
            value.grad = tensors[1]
        if body.tags or body.description:
            value.__dict__["_tags"], value.__dict__["_description"] = tuple(body.tags), body.description
        give_id(value, handle.id)
        if delete:
            self.removed(handle, published=bool(body.tags), nbytes=value.nbytes)
        return value

    # ------------------------------------------------------------------------------------------- finding

    @on_loop
    async def search(self, terms: Sequence[object]) -> list[Any]:
        """Returns pointers to the objects that match every term; to be awaited on any loop.

        Raises:
            OptionError: a term is no string and no number.
        """
        wanted = [_term(one) for one in terms]
        found, _ = await self._place.ask(m.Found, m.Search(wanted), drops=True)
        try:
            return [kinds.pointer_to(self._place.worker, item) for item in found.objects]
        except (LocalError, KeyError) as error:
            raise self._place.unexpected(found) from error

    def tensor_at(self, id: int) -> PointerTensor:
        """Returns a pointer to this client's tensor of that id, which stays there when the pointer goes.

        Raises:
            UnknownObjectError: there is nothing under that id. OptionError: it is no tensor.
        """
        number = as_whole(id, "id_at_location")
        found = self._place.contents.at(number)
        if not isinstance(found, PointerTensor):
            raise OptionError(
                f"object {number} on worker {self._place.worker.id!r} is no tensor: search for it"
            )
        return found

    def describe(self, pointer: Pointer, tags: Sequence[str], description: str) -> None:
        """Gives an object tags and a description; tagged ones are published once this returns, unless it is called on
        planrt's own loop, which waits for nothing.
        """
        handle = alive(pointer)
        self._place.connection.post(m.Describe(handle.id, list(tags), description))
        if tags:
            self._place.ids.leave(handle.id)
        if tags and not on_loop_thread():
            run(self.published(), instead="pointer.tag, from a thread")

    async def published(self) -> None:
        """Returns when what was sent before is where others find it: a search that begins then sees it, whoever's."""
        await self._place.ask(m.Counted, m.CountObjects())

    @on_loop
    async def gradient(self, pointer: PointerTensor) -> PointerTensor | None:
        """Returns ``pointer.grad`` without blocking while a backward pass is under way; to be awaited on any loop."""
        await self._place.gradients.settle_async()
        return pointer.grad  # type: ignore[return-value]

    @on_loop
    async def count(self) -> int:
        """Returns how many objects the worker holds for this client; to be awaited on any loop."""
        await self._place.gradients.settle_async()
        counted, _ = await self._place.ask(m.Counted, m.CountObjects(), drops=True)
        return counted.objects

    @on_loop
    async def clear(self) -> None:
        """Removes every object that this client has there, published ones too; to be awaited on any loop."""
        await self._place.gradients.settle_async()
        await self._place.ask(m.Done, m.Clear(), drops=True)

    def remove(self, id: int) -> None:
        """Removes what this client has there under that id, published or not. Nothing happens if there is nothing."""
        place = self._place
        place.ask_and_wait(m.Done, m.Remove([id]), instead="del pointer")
        holder = place.ids.holder(id)
        if holder is not None and holder.worker is place.worker:
            holder.alive = False
        place.gradients.forget(id)
        place.ids.gone(id)


def _term(value: Any) -> str:
    """A term of a search, as it is sent."""
    term = plain(value)
    return str(term) if type(term) is int else as_text(term, "a term of a search")


def allowed_users(private: bool, users: Sequence[str] | None) -> list[str] | None:
    """Returns the users who may read an object that is sent with these options; None for everyone.

    Raises:
        OptionError: `users` is no list of strings, or given together with `private`.
    """
    if isinstance(users, str):
        raise OptionError(f"allowed_users is a list of user names: write [{users!r}]")
    if users is not None and private:
        raise OptionError("private=True means nobody, and allowed_users names some: give one of them")
    if users is not None and not isinstance(users, Collection):
        raise OptionError(f"allowed_users is a list of user names, not {type(users).__name__}")
    if users is not None:
        return [as_text(user, "a name in allowed_users") for user in users]
    return [] if private else None

"""From worker to worker: objects that move, and pointers that are handed on. `BaseWorker` inherits this.

An object is at its old place until its new owner has it, and the pointer here follows it only then. So whatever fails
on the way, the pointer points to the object.
"""

from __future__ import annotations

import contextlib
import secrets
from typing import Any

from planrt.errors import LocalError, OptionError, RemoteError, WorkerLostError
from planrt.loop import on_loop, run
from planrt.plans.running.inference import spec
from planrt.workers.client.objects import RemoteObjects
from planrt.workers.pointers.tensor import Handle, PointerTensor, alive, make_pointer, take_place
from planrt.workers.transport.addresses import reaches
from planrt.workers.wire import messages as m
from planrt.workers.wire.objects import contiguous_stride, new_id


class MovingObjects(RemoteObjects):
    """The part of a worker's client that moves objects."""

    # ------------------------------------------------------------------------------- pointers to pointers

    def hand_pointer(self, pointer: PointerTensor, to: MovingObjects) -> PointerTensor:
        """The blocking form of `hand_pointer_async`."""
        return run(self.hand_pointer_async(pointer, to), instead="await pointer.async_send(worker)")

    @on_loop
    async def hand_pointer_async(self, pointer: PointerTensor, to: MovingObjects) -> PointerTensor:
        """Makes worker `to` hold a pointer to the object here; returns a pointer to that."""
        handle, token = alive(pointer), secrets.token_hex(16)
        check_worker(to, "send")
        to.check_open()
        await self.gradients.settle_async()
        await self._connection.request(m.HandOver([handle.id], token))
        peer = m.PeerAddress(self.id, self.link_address)
        made = to._new_handle(pointer)
        made.via = (self, *handle.via)  # type: ignore[arg-type]
        try:
            await to._connection.request(m.PutPointer(made.id, peer, handle.id, token))
        except BaseException:
            made.alive = False
            raise
        handle.alive = False
        self.gradients.forget(handle.id)
        self.ids.leave(handle.id)
        return make_pointer(made, pointer._spec)

    @on_loop
    async def remote_get_async(self, pointer: PointerTensor) -> PointerTensor:
        """Brings what the pointer on this worker points to here; see `PointerTensor.remote_get`."""
        if not alive(pointer).via:
            raise LocalError(
                f"remote_get() is for a pointer to a pointer, and on worker {self.id!r} is a tensor: move() brings it "
                "elsewhere"
            )
        inner = await self.fetch_async(pointer)
        take_place(pointer, inner)  # whatever comes, the pointer points to the object
        await pointer._handle.worker.move_async(pointer, self)
        return pointer

    # ------------------------------------------------------------------------------------------- moving

    def move(self, pointer: PointerTensor, to: MovingObjects) -> PointerTensor:
        """The blocking form of `move_async`."""
        return run(self.move_async(pointer, to), instead="await pointer.async_move(worker)")

    @on_loop
    async def move_async(self, pointer: PointerTensor, to: MovingObjects) -> PointerTensor:
        """Moves an object from this worker to `to`, directly where this one can reach it; `pointer` follows it."""
        handle = alive(pointer)
        check_worker(to, "move")
        if to is self:
            return pointer
        to.check_open()
        await self.gradients.settle_async()
        if handle.via:
            inner = await self.fetch_async(pointer)
            take_place(pointer, inner)
            there = pointer._handle.worker
            if there is not to:
                take_place(pointer, await there.hand_pointer_async(pointer, to))
            return pointer
        s = pointer._spec
        after = spec(s.shape, contiguous_stride(s.shape), s.dtype, s.requires_grad, True)
        if not reaches(self.link_address, to.link_address):  # through here, then
            body, tensors = await self._connection.finish(self._ask(m.Fetch(handle.id, False)))
            value = await self._fetched(pointer, body, tensors, delete=False)
            allowed = body.allowed if isinstance(body, m.Fetched) else None
            (moved,) = await to.put_async([value], allowed=allowed, confirm=True)
        else:
            moved = await self._send_on(handle, to)
            if (grad := self.gradients.known(pointer)) is not None:
                to.gradients.note(moved.id, grad)
            if pointer.__dict__.get("_tags"):
                to.ids.leave(moved.id)
        await self._forget_moved(handle)
        take_place(pointer, make_pointer(moved, after))
        return pointer

    async def _send_on(self, handle: Handle, to: MovingObjects) -> Handle:
        """Makes worker `to` hold the object of `handle`, which stays here; under the same id there if that is free."""
        moved, token = Handle(to, new_id()), secrets.token_hex(16)  # type: ignore[arg-type]
        moved.alive = False  # nothing is there yet
        for id in (handle.id, new_id()):
            if not to.ids.free(id):
                continue
            await to.settle_drop_of(id)
            address = m.PeerAddress(to.id, to.link_address)
            try:
                await self._connection.request(m.Move(handle.id, address, id, token, keep=True))
            except RemoteError as error:
                if error.kind == "DuplicateIdError" and id == handle.id:
                    continue
                raise
            await to._connection.request(m.Claim([id], token))
            to.ids.claim(moved, id)
            moved.id, moved.alive = id, True
            return moved
        raise LocalError(f"no id is free on worker {to.id!r}")  # never: new ids are

    async def _forget_moved(self, handle: Handle) -> None:
        """The object of `handle` has arrived elsewhere."""
        handle.alive = False
        self.gradients.forget(handle.id)
        self.ids.gone(handle.id)
        with contextlib.suppress(WorkerLostError):  # it went with the connection
            await self._connection.request(m.Remove([handle.id]))


def check_worker(worker: Any, verb: str) -> None:
    """Raises OptionError for what is no worker."""
    if not isinstance(worker, MovingObjects):
        raise OptionError(
            f"{verb} takes a worker, not {type(worker).__name__}: make one with VirtualWorker(hook, id=...)"
        )

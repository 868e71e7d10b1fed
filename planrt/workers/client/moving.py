"""From worker to worker: objects that move, and pointers that are handed on.

An object is at its old place until its new owner has it, and the pointer here follows it only then. So whatever fails
on the way, the pointer points to the object.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from planrt.errors import LocalError, OptionError, RemoteError, WorkerLostError
from planrt.loop import on_loop, run
from planrt.plans.running.inference import spec
from planrt.workers.client.registry import KnowsWorkers
from planrt.workers.pointers.handle import Handle, alive
from planrt.workers.pointers.plan import PointerPlan
from planrt.workers.pointers.tensor import PointerTensor, make_pointer, take_place
from planrt.workers.transport.addresses import reaches
from planrt.workers.wire import messages as m
from planrt.workers.wire.objects import contiguous_stride, new_id

if TYPE_CHECKING:
    from planrt.workers.client.workplace import ReachedWorker, RemoteWorkplace


class MovingObjects:
    """Moves one session's objects to other workers, and hands pointers on to them."""

    def __init__(self, place: RemoteWorkplace) -> None:
        self._place = place

    # ------------------------------------------------------------------------------- pointers to pointers

    def hand_over(self, pointer: PointerTensor, to: Any) -> PointerTensor:
        """Blocks where `hand_over_async` awaits."""
        return run(self.hand_over_async(pointer, to), instead="await pointer.async_send(worker)")

    @on_loop
    async def hand_over_async(self, pointer: PointerTensor, to: Any) -> PointerTensor:
        """Makes worker `to` hold a pointer to the object here; returns a pointer to that."""
        here, there = self._place, place_of(to, "send")
        handle, token = alive(pointer), secrets.token_hex(16)
        there.check_open()
        await here.gradients.settle_async()
        await here.ask(m.Done, m.HandOver([handle.id], token))
        peer = m.PeerAddress(here.worker.id, here.worker.link_address)
        made = there.objects.new_handle(pointer)
        made.via = (here.worker, *handle.via)
        try:
            asking = m.PutPointer(made.id, peer, handle.id, token)
            await here.acting.let(there, "compute", lambda: there.ask(m.Done, asking))
        except BaseException:
            made.alive = False
            raise
        handle.alive = False
        here.gradients.forget(handle.id)
        here.ids.leave(handle.id)
        return make_pointer(made, pointer._spec)

    async def claim(self, ids: list[int], token: str) -> None:
        """Takes over objects of this worker that were handed to whoever shows `token`; runs on planrt's loop."""
        await self._place.ask(m.Done, m.Claim(ids, token))

    @on_loop
    async def remote_get_async(self, pointer: PointerTensor) -> PointerTensor:
        """Brings what the pointer on this worker points to here; see `PointerTensor.remote_get`."""
        worker = self._place.worker
        if not alive(pointer).via:
            raise LocalError(
                f"remote_get() is for a pointer to a pointer, and on worker {worker.id!r} is a tensor: move() brings "
                "it elsewhere"
            )
        inner = await self._place.objects.fetch_async(pointer)
        take_place(pointer, inner)  # whatever comes, the pointer points to the object
        await pointer._handle.place.moves.move_async(pointer, worker)
        return pointer

    # ------------------------------------------------------------------------------------------- moving

    def move(self, pointer: PointerTensor, to: Any) -> PointerTensor:
        """Blocks where `move_async` awaits."""
        return run(self.move_async(pointer, to), instead="await pointer.async_move(worker)")

    @on_loop
    async def move_async(self, pointer: PointerTensor, to: Any) -> PointerTensor:
        """Moves an object to worker `to`; `pointer` follows it."""
        handle, there = alive(pointer), place_of(to, "move")
        if to is self._place.worker:
            return pointer
        there.check_open()
        await self._place.gradients.settle_async()
        if handle.via:
            inner = await self._place.objects.fetch_async(pointer)
            take_place(pointer, inner)
            owner = pointer._handle
            if owner.worker is not to:
                take_place(pointer, await owner.place.moves.hand_over_async(pointer, to))
            return pointer
        s = pointer._spec
        after = spec(s.shape, contiguous_stride(s.shape), s.dtype, s.requires_grad, True)

        async def through_here() -> Handle:
            answer = await self._place.ask(m.Fetched, m.Fetch(handle.id, False))
            value = await self._place.objects.fetched(pointer, answer, delete=False)
            (moved,) = await there.objects.put_async([value], allowed=answer[0].allowed, confirm=True)
            return moved

        tagged = bool(pointer.__dict__.get("_tags"))
        moved = await self._moved(handle, to, through_here, tagged=tagged)
        take_place(pointer, make_pointer(moved, after))
        return pointer

    @on_loop
    async def move_plan_async(self, pointer: PointerPlan, to: Any) -> PointerPlan:
        """Moves a plan to worker `to`; `pointer` follows it."""
        here, handle = self._place, alive(pointer)
        if handle.via:
            raise LocalError("a pointer to a pointer cannot be moved: get() it, and move what it points to")
        there = place_of(to, "move")
        if to is here.worker:
            return pointer
        there.check_open()
        moved = await self._moved(
            handle, to, lambda: here.plans.copied_to(pointer, there), tagged=bool(pointer._tags)
        )
        if here.plans.state_exposed(handle):
            there.plans.expose_state(moved)
        pointer._handle = moved
        pointer._forms.clear()  # they are where the plan was
        return pointer

    async def _moved(
        self,
        handle: Handle,
        to: ReachedWorker,
        through_here: Callable[[], Awaitable[Handle]],
        *,
        tagged: bool,
    ) -> Handle:
        """Moves the object of `handle` to worker `to`: straight from worker to worker, or `through_here` where they do
        not reach each other. Returns what holds it there.
        """
        here, there = self._place, place_of(to, "move")
        if not reaches(here.worker.link_address, to.link_address):
            moved = await through_here()
        else:
            moved = await self._send_on(handle, to)
            if (grad := here.gradients.of(handle.id)) is not None:
                there.gradients.note(moved.id, grad)
        if tagged:
            there.ids.leave(moved.id)
        handle.alive = False
        here.gradients.forget(handle.id)
        here.ids.gone(handle.id)
        with contextlib.suppress(WorkerLostError):  # it went with the connection
            await here.ask(m.Done, m.Remove([handle.id]))
        return moved

    async def _send_on(self, handle: Handle, to: ReachedWorker) -> Handle:
        """Makes worker `to` hold the object of `handle`, which stays here; under the same id there if that is free."""
        there = place_of(to, "move")
        moved, token = Handle(to, new_id()), secrets.token_hex(16)
        moved.alive = False  # nothing is there yet
        for id in (handle.id, new_id()):
            if not there.ids.free(id, to):
                continue
            await there.objects.settle_drop_of(id)
            address = m.PeerAddress(to.id, to.link_address)
            try:
                asking = m.Move(handle.id, address, id, token, keep=True)
                await there.acting.let(self._place, "put", partial(self._place.ask, m.Done, asking))
            except RemoteError as error:
                if error.kind == "DuplicateIdError" and id == handle.id:
                    continue
                raise
            await there.moves.claim([id], token)
            there.ids.claim(moved, id)
            moved.id, moved.alive = id, True
            return moved
        raise LocalError(f"no id is free on worker {to.id!r}")  # never: new ids are


def place_of(worker: Any, verb: str) -> RemoteWorkplace:
    """Returns where the objects of `worker` are.

    Raises:
        OptionError: it is no worker.
    """
    check_worker(worker, verb)
    place: RemoteWorkplace = worker.workplace
    return place


def check_worker(worker: Any, verb: str) -> None:
    """Raises OptionError for what is no worker."""
    if not isinstance(worker, KnowsWorkers):
        raise OptionError(
            f"{verb} takes a worker, not {type(worker).__name__}: make one with VirtualWorker(hook, id=...)"
        )

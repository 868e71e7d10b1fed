"""A worker's plans as its clients see them: sending, reading, taking back. `BaseWorker` inherits this."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Sequence
from typing import Any

import torch

from planrt.errors import LocalError, OptionError, PlanFormatError
from planrt.loop import on_loop, run
from planrt.plans.ir.record import PlanRecord, state_hash
from planrt.plans.plan import Plan
from planrt.types import as_text, as_whole
from planrt.workers.client.moving import MovingObjects, check_worker
from planrt.workers.client.objects import COPIED_BYTES, allowed_users
from planrt.workers.pointers.plan import PointerPlan
from planrt.workers.pointers.tensor import Handle, alive
from planrt.workers.transport.addresses import reaches
from planrt.workers.wire import messages as m
from planrt.workers.wire.objects import check_travels, new_id

Fetched = tuple[PlanRecord, list[torch.Tensor], bool]
"""A plan, its state, and whether it is in training mode."""


class RemotePlans(MovingObjects):
    """The part of a worker's client that plans use."""

    def _init_plans(self) -> None:
        self._init_objects()
        self._sent: weakref.WeakValueDictionary[tuple[Any, ...], Handle] = weakref.WeakValueDictionary()
        self._exposed: weakref.WeakSet[Handle] = weakref.WeakSet()
        """Plans whose state there may be another than what was sent, since there are pointers to it."""

    def send_plan(
        self,
        plan: Plan,
        *,
        private: bool = False,
        allowed_users: Sequence[str] | None = None,
        purpose: str = "",
    ) -> PointerPlan:
        """Sends a plan with its state; returns a pointer, at once. What is there already is not sent again.

        `purpose` says what the plan is for, to an owner who has to approve it.

        Raises:
            PlanError: not built yet. WorkerLostError: the connection has ended.
        """
        state, key = plan.state_here(), self._key(plan, private, allowed_users, purpose)
        if (known := self._known(plan, key)) is not None:
            return known
        handle, body, payload = self._message(plan, state, key)
        if sum(tensor.nbytes for tensor in payload) <= COPIED_BYTES:
            self._connection.post(body, [tensor.clone() for tensor in payload])
        else:
            run(self._connection.send(body, payload), instead="await plan.async_send(worker)")
        return self._pointer(plan, handle, key)

    async def async_send_plan(
        self,
        plan: Plan,
        *,
        private: bool = False,
        allowed_users: Sequence[str] | None = None,
        purpose: str = "",
    ) -> PointerPlan:
        """`send_plan`, to be awaited on any loop."""
        key = await asyncio.to_thread(self._key, plan, private, allowed_users, purpose)
        if (known := self._known(plan, key)) is not None:
            return known
        handle, body, payload = self._message(plan, plan.state_tensors(), key)
        await self._send_async(body, payload)
        return self._pointer(plan, handle, key)

    @on_loop
    async def _send_async(self, body: m.StorePlan, payload: Sequence[torch.Tensor]) -> None:
        await self._connection.send(body, payload)

    def _key(self, plan: Plan, private: bool, users: Sequence[str] | None, purpose: str) -> tuple[Any, ...]:
        """What makes two plans the same on a worker: ops, names, state, who may get it, and what it is for."""
        state = plan.state_here()
        for tensor in state:
            check_travels(tensor)
        allowed = allowed_users(private, users)
        return (
            plan.record.hash, state_hash(state), None if allowed is None else tuple(sorted(allowed)), plan._tags,
            plan.description, purpose_text(purpose),
        )  # fmt: skip

    def _known(self, plan: Plan, key: tuple[Any, ...]) -> PointerPlan | None:
        handle = self._sent.get(key)
        if handle is None or not handle.alive:
            return None
        self.check_open()
        last = plan._sent_to.get(self.id)
        if last is not None and last._handle is handle and last.training == plan.training:
            return last  # type: ignore[no-any-return]
        return self._pointer(plan, handle, key)

    def expose_state(self, handle: Handle) -> None:
        """There are pointers to the state of the plan of `handle`: it stands for what was sent no longer."""
        self._exposed.add(handle)
        for key, held in list(self._sent.items()):
            if held is handle:
                del self._sent[key]

    def state_exposed(self, handle: Handle) -> bool:
        """Whether there are, or were, pointers to the state of the plan of `handle`."""
        return handle in self._exposed

    def _message(
        self, plan: Plan, state: Sequence[torch.Tensor], key: tuple[Any, ...]
    ) -> tuple[Handle, m.StorePlan, list[torch.Tensor]]:
        handle = self.handle_called(plan.id)
        plan.id = handle.id
        if plan._tags:
            self.ids.leave(handle.id)
        self._sent[key] = handle
        allowed = None if key[2] is None else list(key[2])
        body = m.StorePlan(
            handle.id, plan.training, list(plan._tags), plan.description, allowed, purpose=key[5]
        )
        return handle, body, [_as_tensor(plan.record), *(tensor.detach() for tensor in state)]

    @staticmethod
    def _pointer(plan: Plan, handle: Handle, key: tuple[Any, ...]) -> PointerPlan:
        pointer = PointerPlan(
            handle, name=plan.name, record=plan.record, origin=plan, training=plan.training, tags=plan._tags,
            description=plan.description,
        )  # fmt: skip
        pointer._sent = key[1:3]
        return pointer

    def _found(self, item: m.FoundItem) -> Any:
        if item.kind != "plan":
            return super()._found(item)
        return PointerPlan(
            Handle(self, item.id, owned=item.snapshot), name=item.name, training=item.training,  # type: ignore[arg-type]
            tags=item.tags, description=item.description,
        )  # fmt: skip

    # ------------------------------------------------------------------------------------ bringing back

    def read_plan(self, pointer: PointerPlan) -> PlanRecord:
        """The record of a plan that was found on the worker."""
        reply = self._request(m.ReadPlan(alive(pointer).id), instead="pointer.record, from a thread")
        return self._fetched_plan(*reply)[0]

    def take_plan(self, pointer: PointerPlan) -> Fetched:
        """A plan with its state; the worker forgets it."""
        reply = self._request(m.Fetch(alive(pointer).id, False), instead="await pointer.async_get()")
        return self._taken(pointer, *reply)

    @on_loop
    async def take_plan_async(self, pointer: PointerPlan) -> Fetched:
        """`take_plan`, to be awaited on any loop."""
        await self.gradients.settle_async()
        return self._taken(
            pointer, *await self._connection.finish(self._ask(m.Fetch(alive(pointer).id, False)))
        )

    def _taken(self, pointer: PointerPlan, body: m.Body, tensors: list[torch.Tensor]) -> Fetched:
        fetched = self._fetched_plan(body, tensors)
        self.removed(pointer._handle, published=bool(pointer._tags))
        return fetched

    def _fetched_plan(self, body: m.Body, tensors: list[torch.Tensor]) -> Fetched:
        if not isinstance(body, m.FetchedPlan) or not tensors or tensors[0].dtype != torch.uint8:
            raise self._unexpected(body)
        try:
            record = PlanRecord.from_bytes(tensors[0].numpy().tobytes())
        except PlanFormatError as error:
            raise self._unexpected(body) from error
        return record, tensors[1:], body.training

    def fetch_plan(self, plan_id: int, location: RemotePlans, copy: bool = False) -> Plan:
        """The plan that worker `location` holds under that id, which stays there: ``plan.owner.fetch_plan(id, bob)``.

        What comes is a plan of its own either way, as ``copy=True`` says; `PointerPlan.get` takes a plan back instead.

        Raises:
            UnknownObjectError: this client has nothing there under that id. GetNotPermittedError: its state is private.
            OptionError: `location` is no worker, or what is there is no plan.
        """
        fetching = self.async_fetch_plan(plan_id, location, copy)
        return run(fetching, instead="await worker.async_fetch_plan(plan_id, location)")

    @on_loop
    async def async_fetch_plan(self, plan_id: int, location: RemotePlans, copy: bool = False) -> Plan:
        """`fetch_plan`, to be awaited on any loop."""
        number = as_whole(plan_id, "a plan's id")
        if not isinstance(location, RemotePlans):
            raise OptionError(
                f"fetch_plan takes the worker that holds the plan, not {type(location).__name__}: write "
                "fetch_plan(pointer.id_at_location, pointer.location)"
            )
        await location.gradients.settle_async()
        body, tensors = await location._connection.finish(location._ask(m.Fetch(number, False)))
        if not isinstance(body, m.FetchedPlan):
            raise OptionError(f"object {number} on worker {location.id!r} is no plan: get() a pointer to it")
        record, state, training = location._fetched_plan(body, tensors)
        return Plan.from_record(record, state, training=training)

    # ------------------------------------------------------------------------------------------- moving

    def move_plan(self, pointer: PointerPlan, to: RemotePlans) -> PointerPlan:
        """Moves a plan from this worker to `to`, directly where this one can reach it; `pointer` follows it."""
        return run(self.async_move_plan(pointer, to), instead="await worker.async_move_plan(pointer, to)")

    @on_loop
    async def async_move_plan(self, pointer: PointerPlan, to: RemotePlans) -> PointerPlan:
        """`move_plan`, to be awaited on any loop."""
        handle = alive(pointer)
        if handle.via:
            raise LocalError("a pointer to a pointer cannot be moved: get() it, and move what it points to")
        check_worker(to, "move")
        if to is self:
            return pointer
        to.check_open()
        if not reaches(self.link_address, to.link_address):  # through here, then
            reply = await self._connection.request(m.Fetch(handle.id, False))
            record, state, training = self._fetched_plan(*reply)
            allowed = reply[0].allowed if isinstance(reply[0], m.FetchedPlan) else None
            moved = Handle(to, new_id())  # type: ignore[arg-type]
            body = m.StorePlan(moved.id, training, list(pointer._tags), pointer.description, allowed)
            await to._connection.request(body, [_as_tensor(record), *state])
        else:
            moved = await self._send_on(handle, to)
        if pointer._tags:
            to.ids.leave(moved.id)
        if self.state_exposed(handle):
            to.expose_state(moved)
        await self._forget_moved(handle)
        pointer._handle = moved
        pointer._forms.clear()  # they are where the plan was
        return pointer


def _as_tensor(record: PlanRecord) -> torch.Tensor:
    return torch.frombuffer(bytearray(record.to_bytes()), dtype=torch.uint8)


def purpose_text(given: object) -> str:
    """What a plan is for, as a text that travels.

    Raises:
        OptionError: it is no string, or longer than 1,000 characters.
    """
    text = as_text(given, "purpose")
    if len(text) > 1000:
        raise OptionError(f"purpose is a sentence or two, of at most 1,000 characters, not {len(text):,}")
    return text

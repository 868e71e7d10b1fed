"""A worker's plans as its clients see them: sending, reading, taking back."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from planrt.errors import OptionError, PlanFormatError
from planrt.loop import on_loop, run
from planrt.plans.ir.record import PlanRecord, state_hash
from planrt.plans.plan import Plan
from planrt.types import as_text
from planrt.workers.client.objects import COPIED_BYTES, allowed_users
from planrt.workers.pointers.handle import Handle, alive
from planrt.workers.pointers.plan import PointerPlan
from planrt.workers.wire import messages as m
from planrt.workers.wire.objects import check_travels, new_id

if TYPE_CHECKING:
    from planrt.workers.client.workplace import RemoteWorkplace

Fetched = tuple[PlanRecord, list[torch.Tensor], bool]
"""A plan, its state, and whether it is in training mode."""


class RemotePlans:
    """The plans of one session."""

    def __init__(self, place: RemoteWorkplace) -> None:
        self._place = place
        self._sent: weakref.WeakValueDictionary[tuple[Any, ...], Handle] = weakref.WeakValueDictionary()
        self._exposed: weakref.WeakSet[Handle] = weakref.WeakSet()
        """Plans whose state there may be another than what was sent, since there are pointers to it."""

    def send(
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
            self._place.connection.post(body, [tensor.clone() for tensor in payload])
        else:
            run(self._place.connection.send(body, payload), instead="await plan.async_send(worker)")
        if body.tags:
            run(self._place.objects.published(), instead="await plan.async_send(worker)")
        return self._pointer(plan, handle, key)

    async def send_async(
        self,
        plan: Plan,
        *,
        private: bool = False,
        allowed_users: Sequence[str] | None = None,
        purpose: str = "",
    ) -> PointerPlan:
        """`send`, to be awaited on any loop."""
        key = await asyncio.to_thread(self._key, plan, private, allowed_users, purpose)
        if (known := self._known(plan, key)) is not None:
            return known
        handle, body, payload = self._message(plan, plan.state_tensors(), key)
        await self._send_async(body, payload)
        return self._pointer(plan, handle, key)

    @on_loop
    async def _send_async(self, body: m.StorePlan, payload: Sequence[torch.Tensor]) -> None:
        await self._place.connection.send(body, payload)
        if body.tags:
            await self._place.objects.published()

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
        self._place.check_open()
        last = plan._sent_to.get(self._place.worker.id)
        if last is not None and last._handle is handle and last.training == plan.training:
            return last  # type: ignore[no-any-return]
        return self._pointer(plan, handle, key)

    def expose_state(self, handle: Handle) -> None:
        """Notes that there are pointers to the state of the plan of `handle`: from here on it may differ from the
        state that was sent.
        """
        self._exposed.add(handle)
        for key, held in list(self._sent.items()):
            if held is handle:
                del self._sent[key]

    def state_exposed(self, handle: Handle) -> bool:
        """Returns whether there are, or were, pointers to the state of the plan of `handle`."""
        return handle in self._exposed

    def _message(
        self, plan: Plan, state: Sequence[torch.Tensor], key: tuple[Any, ...]
    ) -> tuple[Handle, m.StorePlan, list[torch.Tensor]]:
        handle = self._place.objects.handle_called(plan.id)
        plan.id = handle.id
        if plan._tags:
            self._place.ids.leave(handle.id)
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

    # ------------------------------------------------------------------------------------ bringing back

    def read(self, pointer: PointerPlan) -> PlanRecord:
        """Returns the record of a plan that was found on the worker."""
        answer = self._place.ask_and_wait(
            m.FetchedPlan, m.ReadPlan(alive(pointer).id), instead="pointer.record, from a thread"
        )
        return self._plan_in(*answer)[0]

    def take(self, pointer: PointerPlan) -> Fetched:
        """Returns a plan with its state; the worker forgets it."""
        answer = self._place.ask_and_wait(
            m.FetchedPlan, m.Fetch(alive(pointer).id, False), instead="await pointer.async_get()"
        )
        return self._taken(pointer, *answer)

    @on_loop
    async def take_async(self, pointer: PointerPlan) -> Fetched:
        """`take`, to be awaited on any loop."""
        await self._place.gradients.settle_async()
        answer = await self._place.ask(m.FetchedPlan, m.Fetch(alive(pointer).id, False))
        return self._taken(pointer, *answer)

    def _taken(self, pointer: PointerPlan, body: m.FetchedPlan, tensors: list[torch.Tensor]) -> Fetched:
        fetched = self._plan_in(body, tensors)
        self._place.objects.removed(pointer._handle, published=bool(pointer._tags))
        return fetched

    def _plan_in(self, body: m.FetchedPlan, tensors: list[torch.Tensor]) -> Fetched:
        if not tensors or tensors[0].dtype != torch.uint8:
            raise self._place.unexpected(body)
        try:
            record = PlanRecord.from_bytes(tensors[0].numpy().tobytes())
        except PlanFormatError as error:
            raise self._place.unexpected(body) from error
        return record, tensors[1:], body.training

    @on_loop
    async def copied(self, id: int) -> Plan:
        """Returns the plan that the worker holds under that id, which stays there; to be awaited on any loop.

        Raises:
            UnknownObjectError: this client has nothing there under that id. GetNotPermittedError: its state is private.
            OptionError: what is there is no plan.
        """
        await self._place.gradients.settle_async()
        body, tensors = await self._place.ask(m.Message, m.Fetch(id, False))
        if not isinstance(body, m.FetchedPlan):
            raise OptionError(
                f"object {id} on worker {self._place.worker.id!r} is no plan: get() a pointer to it"
            )
        record, state, training = self._plan_in(body, tensors)
        return Plan.from_record(record, state, training=training)

    async def copied_to(self, pointer: PointerPlan, there: RemoteWorkplace) -> Handle:
        """Stores a plan of this worker at `there`, through here; returns what holds it. Runs on planrt's loop."""
        body, tensors = await self._place.ask(m.FetchedPlan, m.Fetch(alive(pointer).id, False))
        record, state, training = self._plan_in(body, tensors)
        made = Handle(there.worker, new_id())
        stored = m.StorePlan(made.id, training, list(pointer._tags), pointer.description, body.allowed)
        await there.ask(m.Done, stored, [_as_tensor(record), *state])
        return made


def _as_tensor(record: PlanRecord) -> torch.Tensor:
    return torch.frombuffer(bytearray(record.to_bytes()), dtype=torch.uint8)


def purpose_text(given: object) -> str:
    """Checks a plan's purpose, and returns it as a text that travels.

    Raises:
        OptionError: it is no string, or longer than 1,000 characters.
    """
    text = as_text(given, "purpose")
    if len(text) > 1000:
        raise OptionError(f"purpose is a sentence or two, of at most 1,000 characters, not {len(text):,}")
    return text

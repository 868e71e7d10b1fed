"""Which gradients there are on one worker, mostly known without asking.

A backward pass is one message. Whoever then reads ``.grad`` has to know whether there is a gradient: an optimizer
skips a parameter that has none. The worker's answer tells; but waiting for it would leave the worker idle while the
next ops are made here. So which leaves get one is *foreseen* where the graph is known here
(`planrt.workers.pointers.histories`), and the caller goes on at once; elsewhere it waits.

A pass that was foreseen and fails is like an exception that has not arrived yet: what was posted after it must not
run, or an optimizer would step with the gradients of the pass before. The worker skips it, until the client has heard
of the failure, raised it, and said so (`planrt.workers.wire.messages.Resume`).
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from planrt.deadlines import in_time
from planrt.loop import keep_unless_heard, run, unheard
from planrt.plans.running.inference import Spec, spec
from planrt.workers.pointers.handle import alive
from planrt.workers.pointers.histories import Histories
from planrt.workers.pointers.tensor import PointerTensor
from planrt.workers.wire import messages as m
from planrt.workers.wire.objects import spec_from_wire

if TYPE_CHECKING:
    from planrt.workers.client.connection import Connection
    from planrt.workers.client.outbox import QueuedMessage

_KEPT_DONE: Final = 64
"""Passes that went well, before what the connection keeps of them is freed."""


@dataclass(frozen=True, slots=True)
class _Pass:
    """A backward pass under way."""

    connection: Connection
    asked: QueuedMessage
    foreseen: bool

    @property
    def went_well(self) -> bool | None:
        """None: it is not answered yet."""
        reply = self.asked.reply
        if reply is None or not reply.done():
            return None
        return not reply.cancelled() and reply.exception() is None


class GradientTable:
    """The gradients on a worker that are known here."""

    def __init__(self) -> None:
        self.epoch = 0
        """Grows when the gradients there may be other tensors than before."""
        self.histories = Histories()
        self._specs: dict[int, Spec] = {}
        self._pending: deque[_Pass] = deque()
        self._done: list[_Pass] = []
        self._taking = threading.Lock()
        self._untold: BaseException | None = None
        """A failure whose caller was cancelled before it heard of it."""

    def foresee(self, roots: Sequence[PointerTensor]) -> dict[int, Spec] | None:
        """Returns the gradients that a pass from `roots` leaves, by id, without create_graph; None where only the
        worker knows.
        """
        if any(not one.foreseen for one in list(self._pending)):
            return None
        reached = self.histories.reached(roots)
        if reached is None:
            return None
        found: dict[int, Spec] = {}
        for id, like in reached.items():
            there = self._specs.get(id)
            if there is not None and there.requires_grad:  # the sum would be another tensor
                return None
            found[id] = there or spec(like.shape, like.stride, like.dtype, False, True)
        return found

    def expect(
        self, connection: Connection, asked: QueuedMessage, foreseen: Mapping[int, Spec] | None
    ) -> None:
        """Notes a backward pass under way; `foreseen` are the gradients that it leaves, where these are known."""
        self.epoch += 1
        if foreseen is not None:
            self._specs.update(foreseen)
        self._pending.append(_Pass(connection, asked, foreseen is not None))

    def settle(self) -> None:
        """Waits for backward passes under way.

        Raises:
            RemoteError: one of them failed.
        """
        if self._pending or self._untold is not None:
            run(self.settle_async(), instead="await pointer.async_grad()")

    async def settle_async(self) -> None:
        """`settle`, on planrt's loop."""
        self._tell()
        while (one := next(iter(list(self._pending)), None)) is not None:
            # Who is cancelled here leaves the pass to others: a worker that halted at a failure must hear of it.
            if (reply := one.asked.reply) is not None:
                waits = asyncio.ensure_future(asyncio.wait({reply}))
                connection, body = one.connection, one.asked.body
                await in_time(waits, connection.timeout, functools.partial(connection.late, body))
            if not self._take(one):
                continue
            try:
                body, _ = await one.connection.finish(one.asked)
            except Exception as error:  # if nobody hears of it now, the next one to look does
                keep_unless_heard(error, self._keep)
                if one.foreseen:
                    resuming = asyncio.ensure_future(self._resume(one.connection))
                    try:
                        await asyncio.shield(resuming)
                    except asyncio.CancelledError:
                        unheard(error)
                        raise
                raise
            if isinstance(body, m.Gradients) and not one.foreseen:  # a backward pass only adds gradients
                self._specs.update({id: spec_from_wire(wire) for id, wire in body.objects})

    def spec_of(self, pointer: PointerTensor) -> Spec | None:
        """Returns the spec of an object's gradient; None where it has none. It may wait for a backward pass."""
        self._look()
        return self.known(pointer)

    def set(self, id: int, like: Spec | None) -> None:
        """Notes that the client itself set or removed a gradient."""
        self._look()
        self.epoch += 1
        if like is None:
            self._specs.pop(id, None)
        else:
            self._specs[id] = like

    def note(self, id: int, like: Spec) -> None:
        """Notes that a new object came with a gradient."""
        self._specs[id] = like

    def known(self, pointer: PointerTensor) -> Spec | None:
        """Returns what `spec_of` does, as far as it is known, without waiting."""
        return self.of(alive(pointer).id)

    def of(self, id: int) -> Spec | None:
        """Returns what the gradient of object `id` looks like, without waiting; None where none is known."""
        return self._specs.get(id)

    def forget(self, id: int) -> None:
        """Notes that the object is gone."""
        self._specs.pop(id, None)

    def _take(self, one: _Pass) -> bool:
        """Takes a pass that is answered from those under way; False if somebody else did."""
        with self._taking:
            if not self._pending or self._pending[0] is not one:
                return False
            self._pending.popleft()
            return True

    def _keep(self, error: BaseException) -> None:
        self._untold = self._untold or error

    def _tell(self) -> None:
        """Raises the failure that whoever waited for it did not hear of any more."""
        error, self._untold = self._untold, None
        if error is not None:
            raise error

    def _look(self) -> None:
        """Raises what a pass has failed with, if that is known; waits only for passes that were not foreseen."""
        self._tell()
        if not self._pending:
            return
        if any(not one.foreseen for one in list(self._pending)):
            self.settle()
            return
        for one in list(self._pending):
            if one.went_well is not True or not self._take(one):
                break
            self._done.append(one)
        if len(self._done) > _KEPT_DONE:
            done, self._done = self._done, []
            for connection in {one.connection for one in done}:
                connection.forget_soon([one.asked for one in done if one.connection is connection])
        oldest = next(iter(list(self._pending)), None)
        if oldest is not None and oldest.went_well is False:
            self.settle()

    async def _resume(self, connection: Connection) -> None:
        """Its client has heard of a failure: the worker goes on, and says which gradients there are."""
        with self._taking:
            after = list(self._pending)
            self._pending.clear()
        with contextlib.suppress(
            Exception
        ):  # the first failure is raised; a lost worker shows at the next request
            body, _ = await connection.request(m.Resume())
            if isinstance(body, m.Gradients):
                self._specs = {id: spec_from_wire(wire) for id, wire in body.objects}
        self.epoch += 1
        for one in after:
            with contextlib.suppress(Exception):
                await one.connection.finish(one.asked)

"""`RemoteWorkplace`: one session's objects on a worker, reached over a connection. What a worker's client is made of.

It implements `planrt.workers.pointers.workplace.Workplace`. Requests are made by ``ask``, the one way to ask a worker
something and have its answer checked.
"""

from __future__ import annotations

import weakref
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import torch

from planrt.errors import LocalError, RemoteError, UnknownPlanError, WireError
from planrt.loop import refuse_to_block, run
from planrt.plans.ir.graph import Graph
from planrt.plans.ir.record import with_names
from planrt.plans.running.inference import Spec
from planrt.serde.frames import Allocate
from planrt.serde.values import decode
from planrt.types import Ref, map_leaves
from planrt.workers.client.connection import Connection
from planrt.workers.client.contents import Contents
from planrt.workers.client.gradients import GradientTable
from planrt.workers.client.moving import MovingObjects
from planrt.workers.client.object_ids import ids_of
from planrt.workers.client.objects import RemoteObjects
from planrt.workers.client.outbox import QueuedMessage, Response
from planrt.workers.client.plans import RemotePlans
from planrt.workers.client.tickets import ActingWorkers
from planrt.workers.pointers.handle import Handle
from planrt.workers.pointers.tensor import make_pointer
from planrt.workers.pointers.workplace import Location
from planrt.workers.wire import messages as m
from planrt.workers.wire.objects import spec_from_wire
from planrt.workers.wire.posted import Line

B = TypeVar("B", bound=m.Message)


class ReachedWorker(Location, Protocol):
    """A worker that other workers may be told to dial."""

    @property
    def link_address(self) -> str:
        """The address at which they reach it."""


class RemoteWorkplace:
    """One connection to a worker, and what is known here of the objects behind it; both end together.

    Attributes:
        connection: what everything is sent over.
        ids: which ids are taken there.
        gradients: which objects have gradients.
        objects, plans, moves, contents: what is done with objects, with plans, from worker to worker, and with
            listings.
        acting: which other workers may act there in this session's name.
    """

    def __init__(self, worker: ReachedWorker, connection: Connection) -> None:
        self.connection = connection
        self.ids = ids_of(worker.id)
        self.gradients = GradientTable()
        self._worker = weakref.ref(worker)
        """Weak: a worker that nobody refers to any more goes at once. Whoever calls methods here refers to it."""
        self._plans_there: set[str] = set()
        """Hashes of the plans that rounds were sent, and hashes with purposes."""
        self.objects = RemoteObjects(self)
        self.plans = RemotePlans(self)
        self.moves = MovingObjects(self)
        self.contents = Contents(self)
        self.acting = ActingWorkers(self)

    @property
    def worker(self) -> ReachedWorker:
        """The worker, as pointers' `location`."""
        worker = self._worker()
        assert worker is not None  # noqa: S101 - its caller holds it
        return worker

    @property
    def closed(self) -> bool:
        """True once the connection has ended."""
        return self.connection.closed

    @property
    def why_ended(self) -> str:
        """The reason why the connection has ended, safe to show; ``""`` while it has not."""
        return self.connection.why_ended

    def check_open(self) -> None:
        """Raises WorkerLostError if the connection has ended."""
        self.connection.check_open()

    # ----------------------------------------------------------------------------------------- asking

    def ask(
        self, kind: type[B], body: m.Body, tensors: Sequence[torch.Tensor] = (), *, drops: bool = False
    ) -> Coroutine[Any, Any, tuple[B, list[torch.Tensor]]]:
        """Queues a request at once, from any thread, after everything posted before. What it returns is to be awaited
        on planrt's loop, and is the answer, which is of `kind`, with its tensors.

        With `drops`, what nobody points at is freed first.

        Raises:
            RemoteError: the worker could not do it. WorkerLostError: the connection ended first. WireError: the answer
            is of another kind. OptionError, LocalError, MessageTooLargeError: the request cannot be sent, and was not.
        """
        return self.answer(kind, self.connection.enqueue(body, tensors, drops=drops))

    async def answer(self, kind: type[B], asked: QueuedMessage) -> tuple[B, list[torch.Tensor]]:
        """Returns the answer to a request that `Connection.enqueue` queued; see `ask`."""
        return self.checked(kind, await self.connection.finish(asked))

    def ask_and_wait(self, kind: type[B], body: m.Body, *, instead: str) -> tuple[B, list[torch.Tensor]]:
        """Blocks where `ask` awaits; for any thread but planrt's own, where `instead` is to be written.

        It waits for backward passes under way before it asks anything: what a pass that failed interrupts must not be
        lost.
        """
        refuse_to_block(instead)
        self.gradients.settle()
        return run(self.answer(kind, self.connection.enqueue(body)), instead=instead)

    async def ask_about_plan(
        self,
        kind: type[B],
        body: m.Body,
        tensors: Sequence[torch.Tensor],
        plan: Graph,
        allocate: Allocate[m.Envelope],
    ) -> tuple[B, list[torch.Tensor]]:
        """`ask` for what runs `plan`, which `body` names: in turn with other workers of this process that compute. If
        the worker has lost the plan, it is sent again, and then the request. `allocate` says where the tensors of the
        answer go.
        """
        try:
            reply = await self._computed(body, tensors, allocate)
        except UnknownPlanError:
            self._plans_there.discard(plan.hash)
            await self.put_plan(plan)
            reply = await self._computed(body, tensors, allocate)
        except RemoteError as error:
            if error.index is not None:
                error.found_at(plan.place(error.index))
            raise
        return self.checked(kind, reply)

    async def _computed(
        self, body: m.Body, tensors: Sequence[torch.Tensor], allocate: Allocate[m.Envelope]
    ) -> Response:
        return await self.connection.request(body, tensors, allocate=allocate, in_turn=True)

    def checked(self, kind: type[B], reply: Response) -> tuple[B, list[torch.Tensor]]:
        """Returns `reply`, if it is of the kind that was asked for.

        Raises:
            WireError: it is of another kind.
        """
        body, tensors = reply
        if not isinstance(body, kind):
            raise self.unexpected(body, f"instead of {kind.__name__}")
        return body, tensors

    def unexpected(self, body: object, wanted: str = "that does not fit what was asked") -> WireError:
        """Returns the error for an answer that a worker of ours does not give."""
        session = self.connection.session
        return WireError(
            f"worker {session.worker_id!r} answered with {type(body).__name__} {wanted}",
            address=session.address,
        )

    async def put_plan(self, plan: Graph, *, purpose: str = "") -> None:
        """Sends `plan`, and what it is for, unless this connection has sent it before; runs on planrt's loop."""
        named = f"{plan.hash} {purpose}"
        if plan.hash in self._plans_there and (not purpose or named in self._plans_there):
            return
        data = torch.frombuffer(bytearray(with_names(plan)), dtype=torch.uint8)
        await self.ask(m.Done, m.PutPlan(plan.hash, purpose), [data])
        self._plans_there |= {plan.hash, named}

    def post(self, body: m.Body, tensors: Sequence[torch.Tensor] = ()) -> None:
        """Hands over a message that is not answered; its tensors must not change from here on.

        Raises:
            WorkerLostError: the connection has ended. OptionError, LocalError, MessageTooLargeError: it cannot be sent.
        """
        self.connection.post(body, tensors)

    async def send(self, body: m.Body, tensors: Sequence[torch.Tensor]) -> None:
        """`post`, and waits until the message has left: then its tensors may change. Runs on planrt's loop."""
        await self.connection.send(body, tensors)

    # -------------------------------------------------------------------------------- ops, for pointers

    def post_op(self, packed: bytes, line: Line | None = None) -> None:
        """Posts a packed op. It waits only if very many are waiting to be sent.

        Raises:
            WorkerLostError: the connection has ended.
        """
        if not self.connection.post_op(packed, line):
            run(self.connection.drained(), instead="await something between so many operations")

    @property
    def op_bytes(self) -> int:
        """The longest packed op that the worker takes, in bytes."""
        return self.connection.op_bytes

    def take_drops(self) -> tuple[int, ...]:
        """Returns the ids of objects that the next op takes along to be freed."""
        return self.connection.take_drops()

    def flush_drops(self) -> None:
        """Frees what nobody points at without waiting for the next op."""
        self.connection.flush_drops()

    def draw_seed(self) -> int:
        """Returns a seed for an op that draws random numbers, from torch's generator here."""
        return int(torch.randint(2**63 - 1, ()).item())

    def forget(self, id: int) -> None:
        """Notes that nobody points at object `id` any more. Called by finalizers, in any thread, at any time."""
        self.gradients.forget(id)
        self.connection.drop(id)

    def call(self, packed: bytes, *, via: tuple[Any, ...] = ()) -> Any:
        """Runs a packed op whose results only the worker can tell, and waits for them; returns pointers.

        Raises:
            RemoteError: the op failed. WorkerLostError: the connection ended first.
        """
        made, _ = self.ask_and_wait(
            m.Made, m.Call(packed), instead="ops whose results' sizes do not depend on values"
        )
        return self.pointers_in(made, [Handle(self.worker, id, via) for id, _ in made.objects])

    def pointers_in(self, made: m.Made, handles: Sequence[Handle]) -> Any:
        """Returns what `made` says was returned there, with pointers in place of its objects; `handles` hold these.

        Raises:
            WireError: `made` refers to objects that it does not have.
        """
        try:
            pointers = [
                make_pointer(handle, spec_from_wire(like))
                for handle, (_, like) in zip(handles, made.objects, strict=True)
            ]
            return map_leaves(
                decode(made.results), lambda leaf: pointers[leaf.index] if isinstance(leaf, Ref) else leaf
            )
        except (LocalError, KeyError, IndexError) as error:
            raise self.unexpected(made) from error

    def backward(
        self,
        roots: list[int],
        given: list[int | None],
        retain_graph: bool,
        create_graph: bool,
        inputs: list[int] | None,
        foreseen: Mapping[int, Spec] | None = None,
    ) -> None:
        """Starts a backward pass there. Whoever asks for a gradient afterwards waits for it, unless it was
        `foreseen`.
        """
        halts = foreseen is not None
        asked = self.connection.enqueue(m.Backward(roots, given, retain_graph, create_graph, inputs, halts))
        self.gradients.expect(self.connection, asked, foreseen)

    @property
    def halts(self) -> bool:
        """True if the worker stops at a backward pass that failed until its client has heard of it."""
        return self.connection.session.versions.halts

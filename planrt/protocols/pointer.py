"""`PointerProtocol`: a protocol on a worker, which runs it from there."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

import torch

from planrt.deadlines import bounded
from planrt.errors import (
    MixedLocationsError,
    PlanFormatError,
    PlanrtError,
    ProtocolError,
    RemoteError,
)
from planrt.loop import on_loop, run
from planrt.plans.ir.chain import Chain, ChainStep
from planrt.plans.ir.graph import refs_in
from planrt.plans.plan import Plan
from planrt.protocols.acting import ActingPlaces
from planrt.protocols.places import bound, resolve, seed_of_run
from planrt.protocols.progress import OnProgress, Progress
from planrt.protocols.shapes import check_inputs
from planrt.workers.base import BaseWorker
from planrt.workers.client.objects import allowed_users as allowed_list
from planrt.workers.client.tickets import is_over
from planrt.workers.pointers import kinds
from planrt.workers.pointers.handle import Handle, ObjectPointer, alive, handle_at
from planrt.workers.pointers.plan import PointerPlan
from planrt.workers.pointers.printing import gone_words, pointer_card
from planrt.workers.pointers.tensor import PointerTensor
from planrt.workers.pointers.workplace import Location
from planrt.workers.wire import messages as m
from planrt.workers.wire.objects import check_travels, new_id

if TYPE_CHECKING:
    from planrt.protocols.protocol import Protocol

_ASK_EVERY = 0.02
"""Seconds between two questions for the progress of a run elsewhere."""

NewProgress = Callable[[Mapping[str, BaseWorker], OnProgress | None], Progress]


class PointerProtocol(ObjectPointer):
    """A protocol on a worker: what `Protocol.send` returns, and what `search` finds.

    ``PointerProtocol(location=bob, id_at_location=protocol.id)`` points to one that is there, which stays
    when it goes.

    Attributes:
        id: the pointer's own id, here. tags, description: as the protocol was given them.
    """

    def __init__(
        self,
        handle: Handle | None = None,
        *,
        chain: Chain | None = None,
        workers: Mapping[str, BaseWorker] | None = None,
        tags: Sequence[str] = (),
        description: str = "",
        location: BaseWorker | None = None,
        id_at_location: int | None = None,
    ) -> None:
        super().__init__(handle_at(location, id_at_location) if handle is None else handle, tags, description)
        self._chain = chain
        self._workers = dict(workers or {})

    # -------------------------------------------------------------------------------------- deploying

    @bounded
    def deploy(self, *workers: BaseWorker, timeout: float | None = None) -> Self:
        """Tells the worker which workers stand at the protocol's places; see `Protocol.deploy`.

        Raises:
            ProtocolError: too few or too many workers, or one twice.
        """
        return run(self.async_deploy(*workers), instead="await pointer.async_deploy(...)")

    @bounded
    @on_loop
    async def async_deploy(self, *workers: BaseWorker, timeout: float | None = None) -> Self:
        """`deploy`, to be awaited on any loop."""
        chain = await self._read()
        self._workers = resolve(chain.places, {}, workers)
        worker, body = self.location, m.DeployProtocol(alive(self).id, _addresses(self._workers))
        await worker.ask(m.Done, body)
        return self

    @on_loop
    async def _read(self) -> Chain:
        if self._chain is None:
            asking = m.ReadPlan(alive(self).id)
            self._chain = _chain_of(*await self.location.ask(m.FetchedProtocol, asking))
        return self._chain

    # ---------------------------------------------------------------------------------------- running

    @bounded
    def run(
        self,
        *inputs: Any,
        seed: int | None = None,
        on_progress: OnProgress | None = None,
        timeout: float | None = None,
        **named: Any,
    ) -> Any:
        """Has the worker run the protocol on objects that it holds; see `Protocol.run`.

        Tensors of this process are sent to it first. The results are pointers to the worker, which point to
        where the results are: ``get`` returns a pointer to that.

        Raises:
            ProtocolError: not deployed by this client, missing inputs. MixedLocationsError: an input on
                another worker. RemoteError: a step failed; its `step` is the step's name.
                GetNotPermittedError.
        """
        grad = torch.is_grad_enabled()  # here: the loop's thread has a mode of its own
        start = self._start(inputs, named, seed, on_progress, grad, _quiet, verbose=False)
        return run(start, instead="await pointer.async_run(...)")

    @bounded
    async def async_run(
        self,
        *inputs: Any,
        seed: int | None = None,
        on_progress: OnProgress | None = None,
        timeout: float | None = None,
        **named: Any,
    ) -> Any:
        """`run`, to be awaited on any loop. Cancelled, the worker drops all that was made."""
        grad = torch.is_grad_enabled()
        return await self._start(inputs, named, seed, on_progress, grad, _quiet, verbose=False)

    async def _start(
        self,
        inputs: Sequence[Any],
        named: Mapping[str, Any],
        seed: int | None,
        on_progress: OnProgress | None,
        grad: bool,
        new_progress: NewProgress,
        *,
        verbose: bool,
    ) -> Any:
        seed = seed_of_run(seed)
        chain, worker = await self._read(), alive(self).worker
        if not self._workers:
            raise ProtocolError(
                "deploy the protocol first, to workers that this process is connected to: "
                f"deploy({', '.join(chain.places)})"
            )
        values = bound(chain.inputs, inputs, named)
        check_inputs(chain, dict(enumerate(values)))
        for name, value in zip(chain.inputs, values, strict=True):
            if isinstance(value, PointerTensor) and alive(value).worker is not worker:
                raise MixedLocationsError(
                    f"input {name!r} is on worker {value.location.id!r}, and the protocol on {worker.id!r}, which runs "
                    "it: move the input there, or get() the protocol"
                )
            if not isinstance(value, PointerTensor):
                check_travels(value)
        if verbose:
            print(f"send remote run request to {worker.id}")
        progress = new_progress(self._workers, on_progress)
        return await self._on_worker(chain, values, seed, grad, progress, watched=on_progress is not None)

    @on_loop
    async def _on_worker(
        self,
        chain: Chain,
        values: Sequence[Any],
        seed: int,
        grad: bool,
        progress: Progress,
        *,
        watched: bool,
    ) -> Any:
        workers = dict(self._workers)
        worker, place = self.location, self.location.workplace
        await place.gradients.settle_async()
        handles = []
        for value in values:
            handles += (
                [alive(value)] if isinstance(value, PointerTensor) else await place.objects.put_async([value])
            )
        acting = ActingPlaces(chain, workers, worker)
        await acting.let()
        results = {}
        for ref in refs_in(chain.outputs):
            maker = chain.maker(ref.index)
            assert maker is not None  # noqa: S101 - outputs are results of steps
            handle = Handle(worker, new_id(), (workers[chain.steps[maker].place],))
            results[handle.id] = handle
        number = new_id()
        body = m.RunProtocol(alive(self).id, number, [one.id for one in handles], list(results), grad, seed)
        for step in chain.steps:
            progress.on_step(step.name, step.place, "waiting")
        running = asyncio.ensure_future(place.ask(m.Made, body))
        watching = asyncio.create_task(self._watch(worker, number, chain, progress)) if watched else None
        if watching is not None:
            watching.add_done_callback(
                lambda done: done.cancelled() or (done.exception() and running.cancel())
            )
        try:
            made, _ = await running
            if watching is not None and watching.done():
                watching.result()  # raises what ended it: the results go with their handles
        except asyncio.CancelledError:
            with contextlib.suppress(PlanrtError):
                place.post(m.CancelRun(number))
            if watching is not None and watching.done():
                watching.result()  # raises what ended it
            raise
        except RemoteError as error:
            if is_over(error):
                acting.forget()
            for handle in results.values():  # nothing was made
                handle.alive = False
            if (failed := _step(chain, error.step)) is not None:
                progress.on_step(failed.name, failed.place, "failed")
                progress.tell()
            raise
        finally:
            handles.clear()  # an error would keep them, with what was sent for this run, as long as it is looked at
            if watching is not None:
                watching.cancel()
        for step in chain.steps:
            progress.on_step(step.name, step.place, "done")
        progress.tell()
        kept = [id for id, _ in made.objects]
        if not set(kept) <= set(results):
            raise place.unexpected(made)
        for id, handle in results.items():
            handle.alive = id in kept
        return place.pointers_in(made, [results[id] for id in kept])

    async def _watch(self, worker: BaseWorker, number: int, chain: Chain, progress: Progress) -> None:
        """Asks where a run stands, as long as it runs."""
        places = {step.name: step.place for step in chain.steps}
        while True:
            progress.tell()
            await asyncio.sleep(_ASK_EVERY)
            states, _ = await worker.ask(m.RunStates, m.ReadRun(number))
            for step, state in states.steps:
                if step in places:
                    progress.on_step(step, places[step], state)

    # -------------------------------------------------------------------------------------- travelling

    @bounded
    def get(self, *, timeout: float | None = None) -> Protocol:
        """Brings the protocol back with its plans and their state, as they were sent; the worker forgets it.

        Raises:
            GetNotPermittedError: its state is private. GonePointerError.
        """
        return run(self.async_get(), instead="await pointer.async_get()")

    @bounded
    @on_loop
    async def async_get(self, *, timeout: float | None = None) -> Protocol:
        """`get`, to be awaited on any loop."""
        handle = alive(self)
        made = _rebuilt(*await self.location.ask(m.FetchedProtocol, m.Fetch(handle.id, False)))
        handle.place.objects.removed(handle, published=bool(self._tags))
        made.id = handle.id
        made._tags, made._text = self._tags, self._description
        return made

    def __repr__(self) -> str:
        handle = self._handle
        return f"[PointerProtocol | me:{self.id} -> {handle.worker.id}:{handle.id}]{gone_words(handle)}"

    def _repr_html_(self) -> str:
        return pointer_card(self, "PointerProtocol", self._tags, self._description)


def _quiet(workers: Mapping[str, BaseWorker], on_progress: OnProgress | None) -> Progress:
    return Progress({place: worker.id for place, worker in workers.items()}, on_progress, verbose=False)


async def send_protocol(
    worker: BaseWorker,
    id: int,
    chain: Chain,
    plans: Sequence[Plan | PointerPlan],
    workers: Mapping[str, BaseWorker],
    *,
    tags: Sequence[str],
    description: str,
    private: bool,
    allowed_users: Sequence[str] | None,
) -> PointerProtocol:
    """Stores a protocol on `worker`, under `id` if that is free. State of plans on workers is brought here
    for it."""
    place = worker.workplace
    handle = place.objects.handle_called(id)
    if tags:
        place.ids.leave(handle.id)
    body = m.StoreProtocol(handle.id, list(tags), description, allowed_list(private, allowed_users))
    states = [plan.state_tensors() if isinstance(plan, Plan) else None for plan in plans]

    @on_loop
    async def send() -> None:
        payload: list[torch.Tensor] = [torch.frombuffer(bytearray(chain.to_bytes()), dtype=torch.uint8)]
        for plan, state in zip(plans, states, strict=True):
            if isinstance(plan, PointerPlan):
                _, fetched = await plan.location.ask(m.FetchedPlan, m.Fetch(alive(plan).id, False))
                state = fetched[1:]
            for tensor in state or ():
                check_travels(tensor)
                payload.append(tensor.detach())
        await place.send(body, payload)
        if workers:
            place.post(m.DeployProtocol(handle.id, _addresses(workers)))
        if tags:
            await place.objects.published()

    await send()
    return PointerProtocol(handle, chain=chain, workers=workers, tags=tags, description=description)


def _step(chain: Chain, name: str | None) -> ChainStep | None:
    return next((step for step in chain.steps if step.name == name), None)


def _addresses(workers: Mapping[str, BaseWorker]) -> dict[str, m.PeerAddress]:
    return {place: m.PeerAddress(worker.id, worker.link_address) for place, worker in workers.items()}


def _chain_of(body: m.Body, tensors: Sequence[torch.Tensor]) -> Chain:
    if not tensors or tensors[0].dtype != torch.uint8:
        raise PlanFormatError("a protocol came without its chain")
    return Chain.from_bytes(tensors[0].numpy().tobytes())


def _rebuilt(body: m.Body, tensors: Sequence[torch.Tensor]) -> Protocol:
    """The protocol that a worker sent."""
    from planrt.protocols.protocol import Protocol  # it imports this module

    chain = _chain_of(body, tensors)
    rest = list(tensors[1:])
    plans = []
    for plan in chain.plans:
        count = len(plan.record.state)
        if len(rest) < count:
            raise PlanFormatError("a protocol came without the state of its plans")
        plans.append(Plan.from_record(plan.record, rest[:count], training=plan.training))
        rest = rest[count:]
    return Protocol.from_chain(chain, plans)


def _found(worker: Location, found: m.FoundItem) -> PointerProtocol:
    """Returns a pointer to a protocol that a search found."""
    handle = Handle(worker, found.id, owned=found.snapshot)
    return PointerProtocol(handle, tags=found.tags, description=found.description)


kinds.register("protocol", _found)

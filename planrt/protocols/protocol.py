"""`Protocol`: plans chained over workers, run by one call, with results that go from worker to worker."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Self

import torch

from planrt.deadlines import bounded
from planrt.errors import LocalError, ProtocolError, RemoteError
from planrt.loop import on_loop, run
from planrt.plans.ir.chain import Chain, ChainPlan
from planrt.plans.ir.graph import refs_in
from planrt.plans.plan import Plan
from planrt.protocols.acting import ActingPlaces
from planrt.protocols.driver import Driver
from planrt.protocols.places import bound, placed_at, resolve, seed_of_run
from planrt.protocols.pointer import PointerProtocol, send_protocol
from planrt.protocols.progress import OnProgress, Progress, StepProgress
from planrt.protocols.shapes import check_inputs
from planrt.protocols.steps import HELD, Description, Step, build_description, is_line
from planrt.types import Ref, map_leaves
from planrt.workers.base import BaseWorker
from planrt.workers.client.tickets import is_over
from planrt.workers.pointers.handle import Handle, alive
from planrt.workers.pointers.plan import PointerPlan
from planrt.workers.pointers.tensor import make_pointer
from planrt.workers.transport.addresses import reaches
from planrt.workers.wire import messages as m
from planrt.workers.wire.chain_runs import ChainRun, Given, Output
from planrt.workers.wire.objects import check_travels, spec_from_wire


class Protocol:
    """Plans on several workers, each of which takes what others returned.

    In a line, every step takes the result of the one before::

        protocol = Protocol([("worker1", inc1), ("worker2", inc2), ("worker3", inc3)])
        protocol.deploy(alice, bob, charlie)
        pointer = protocol.run(x)                   # on charlie

    With `Step`s that say what they take, any other shape: here two workers compute at the same time, and a
    third has the mean::

        protocol = Protocol(
            [*(Step(name, local_update, ["model"], name=name) for name in ("alice", "bob")),
             Step("charlie", average, ["alice", "bob"])],
            inputs=["model"],
        )

    The workers hand results to each other directly; none comes here. The results of a step go to each worker
    that needs it, as a copy where it is needed on its own worker too, and is freed after its last use. Steps
    start as soon as they have what they take.

    Args:
        steps: `Step`s, or (worker, plan) pairs. A step may take results of steps before it.
        inputs: names of the inputs, for steps to name and in the order in which `run` takes them. By default
            those of the first step's plan.
        outputs: the steps (or parts of their results) that `run` returns: a name, or a list, tuple or dict of
            names. By default the last step.
        name: what it is called when printed.
        verbose: whether runs print what goes where: ``send alice``, ``move alice -> bob``.

    Attributes:
        id: its number in this process. tags, description: what `search` finds it by, once it is sent.

    Raises:
        ProtocolError: a description that cannot work: unknown or unused names, circles, results that do not
            fit what takes them. PlanError: a plan that is not built. PlanArgumentError: a wrong number of
            arguments.
    """

    def __init__(
        self,
        steps: Sequence[Step | tuple[BaseWorker | str, Plan | PointerPlan]],
        *,
        inputs: Sequence[str] | None = None,
        outputs: str | Sequence[str] | Mapping[str, str] | None = None,
        name: str = "",
        verbose: bool = False,
    ) -> None:
        steps = list(steps) if isinstance(steps, Sequence) else steps
        self._set_up(lambda: build_description(steps, inputs, outputs), name, verbose=verbose)

    def _set_up(self, describe: Callable[[], Description], name: str = "", *, verbose: bool = False) -> None:
        self._describe = describe
        self._description = describe()
        self.id = secrets.randbits(40)
        self.name = name
        self.verbose = verbose
        self._workers: dict[str, BaseWorker] = {}
        self._pointers: dict[tuple[int, str], PointerPlan] = {}
        self._sent: PointerProtocol | None = None
        self._progress: Progress | None = None
        self._tags: tuple[str, ...] = ()
        self._text = ""
        if set(self._description.workers) == set(self.places):
            self._workers = dict(self._description.workers)

    @classmethod
    def from_chain(cls, chain: Chain, plans: Sequence[Plan]) -> Self:
        """Makes the protocol that a chain describes, with `plans` in the place of those of the chain."""

        def describe() -> Description:
            now = replace(chain, plans=tuple(ChainPlan(plan.record, plan.training) for plan in plans))
            return Description(now, chain.inputs, tuple(plans), (), {})

        made = cls.__new__(cls)
        made._set_up(describe)
        return made

    # --------------------------------------------------------------------------------------- deploying

    @property
    def places(self) -> tuple[str, ...]:
        """The names of its workers, in the order in which the steps have them."""
        return self._description.chain.places

    @property
    def plans(self) -> list[tuple[str, Plan | PointerPlan]]:
        """(place, plan) of every step, in their order."""
        return [(step.place, self._description.plans[step.plan]) for step in self._description.chain.steps]

    @property
    def is_resolved(self) -> bool:
        """Tells whether it is known which worker stands at each place."""
        return bool(self._workers)

    @property
    def workers_resolved(self) -> bool:
        """The same as `is_resolved`."""
        return self.is_resolved

    @property
    def owner(self) -> Any:
        """The worker that stands for this process."""
        return getattr(torch.empty(0), "owner", None)

    @property
    def workers(self) -> dict[str, BaseWorker]:
        """Place -> worker, once resolved."""
        return dict(self._workers)

    @bounded
    def deploy(self, *workers: BaseWorker, timeout: float | None = None) -> Self:
        """Puts workers in the places of the names, and sends each its plans. Doing it again sends nothing
        new.

        A worker whose id is one of the names takes that place; the others take the places that are left, in
        order. Different names are different workers.

        Raises:
            ProtocolError: too few or too many workers, or one twice; plans or held objects that are on
                others.
            WorkerLostError: a worker's connection has ended.
        """
        self._resolve(workers)
        if self._sent is not None:
            self._sent.deploy(*self._workers.values())
            return self
        made = self._there()
        for number, place in self._needed():
            if (number, place) not in made:
                made[number, place] = self._workers[place].workplace.plans.send(self._plan(number))
        self._pointers = made
        return self

    @bounded
    async def async_deploy(self, *workers: BaseWorker, timeout: float | None = None) -> Self:
        """`deploy`, to be awaited on any loop."""
        self._resolve(workers)
        if self._sent is not None:
            await self._sent.async_deploy(*self._workers.values())
            return self
        made = self._there()
        for number, place in self._needed():
            if (number, place) not in made:
                plans = self._workers[place].workplace.plans
                made[number, place] = await plans.send_async(self._plan(number))
        self._pointers = made
        return self

    def _resolve(self, workers: Sequence[BaseWorker]) -> None:
        self._description = self._describe()  # plans may have been built again, or changed their mode
        given = workers or tuple(self._workers.values())
        resolved = resolve(self.places, self._description.workers, given)
        for plan, place in self._needed():
            there = self._description.plans[plan]
            if isinstance(there, PointerPlan) and alive(there).worker is not resolved[place]:
                raise ProtocolError(
                    f"plan {there.name!r} is on worker {there.location.id!r}, and its step on "
                    f"{resolved[place].id!r}: move() it there, or get() it and give the protocol the plan"
                )
        for number, pointer in enumerate(self._description.held, start=len(self._description.names)):
            self._placed(number, pointer, resolved)
        self._workers = resolved

    def _needed(self) -> list[tuple[int, str]]:
        """Which plan is needed at which place."""
        return list(dict.fromkeys((step.plan, step.place) for step in self._description.chain.steps))

    def _there(self) -> dict[tuple[int, str], PointerPlan]:
        """The plans that are at their places without being sent."""
        pairs = [(where, self._description.plans[where[0]]) for where in self._needed()]
        return {where: plan for where, plan in pairs if isinstance(plan, PointerPlan)}

    def _plan(self, number: int) -> Plan:
        plan = self._description.plans[number]
        assert isinstance(plan, Plan)  # noqa: S101 - pointers to plans are where they should be
        return plan

    # ----------------------------------------------------------------------------------------- running

    @bounded
    def run(
        self,
        *inputs: Any,
        seed: int | None = None,
        on_progress: OnProgress | None = None,
        timeout: float | None = None,
        **named: Any,
    ) -> Any:
        """Runs all steps; returns pointers to the results, on the workers that made them.

        Inputs are given in order or by name: tensors, which are sent to the workers that need them, or
        pointers, on a worker where a step takes them. Pointers stay usable; what a plan changes in place is
        changed. After `send`, the worker that has the protocol runs it, inputs are there, and the results are
        pointers to it, which point to where they are.

        Args:
            seed: what random ops draw from; by default drawn from torch's generator here.
            on_progress: called with the name of a step, its worker's id, and "waiting", "running", "done" or
                "failed", whenever that changes; on planrt's own thread, where blocking calls are refused.

        Raises:
            ProtocolError: not deployed; missing inputs, or such as do not fit. MixedLocationsError: an input
                that is on another worker. RemoteError: a step failed; its `step` is the step's name.
                GetNotPermittedError: a private value would have to go to another worker. WorkerLostError: a
                worker is gone.
        """
        grad = torch.is_grad_enabled()  # here: the loop's thread has a mode of its own
        return run(
            self._start(inputs, named, seed, on_progress, grad), instead="await protocol.async_run(...)"
        )

    @bounded
    async def async_run(
        self,
        *inputs: Any,
        seed: int | None = None,
        on_progress: OnProgress | None = None,
        timeout: float | None = None,
        **named: Any,
    ) -> Any:
        """`run`, to be awaited on any loop. Cancelled, it drops all that was made and what is still being
        made."""
        return await self._start(inputs, named, seed, on_progress, torch.is_grad_enabled())

    async def _start(
        self,
        inputs: Sequence[Any],
        named: Mapping[str, Any],
        seed: int | None,
        on_progress: OnProgress | None,
        grad: bool,
    ) -> Any:
        if self._sent is not None:
            return await self._sent._start(
                inputs, named, seed, on_progress, grad, self._new_progress, verbose=self.verbose
            )
        seed = seed_of_run(seed)
        if not self._workers:
            raise ProtocolError(f"deploy the protocol first: deploy({', '.join(self.places)})")
        if not self._pointers:
            await self.async_deploy()
        values = bound(self._description.names, inputs, named)
        check_inputs(self._description.chain, dict(enumerate(values)))
        return await self._run(values, self._new_progress(self._workers, on_progress), seed, grad)

    def _new_progress(self, workers: Mapping[str, BaseWorker], on_progress: OnProgress | None) -> Progress:
        ids = {place: worker.id for place, worker in workers.items()}
        self._progress = Progress(ids, on_progress, verbose=self.verbose)
        return self._progress

    @on_loop
    async def _run(self, values: Sequence[Any], progress: Progress, seed: int, grad: bool) -> Any:
        chain, workers = self._description.chain, dict(self._workers)
        held = [*values, *self._description.held]  # referred to from here until the run ends
        for worker in dict.fromkeys(workers.values()):
            await worker.workplace.gradients.settle_async()
        a_run = ChainRun(
            chain,
            {place: m.PeerAddress(worker.id, worker.link_address) for place, worker in workers.items()},
            [self._given(number, value) for number, value in enumerate(held)],
            {where: alive(pointer).id for where, pointer in self._pointers.items()},
            grad=grad,
            seed=seed,
            reaches=reaches,
            on_step=progress.on_step,
            on_transfer=progress.on_transfer,
        )
        acting = ActingPlaces(chain, workers)
        await acting.let()
        try:
            await Driver(a_run, workers, progress.tell).to_the_end()
        except RemoteError as error:
            if is_over(error):
                acting.forget()
            raise
        handles: dict[tuple[str, int], Handle] = {}
        values = []
        for one in a_run.outputs:
            if isinstance(one, Output):
                handle = handles.setdefault((one.place, one.id), Handle(workers[one.place], one.id))
                one = make_pointer(handle, spec_from_wire(one.spec))
            values.append(one)
        rest = iter(values)
        return map_leaves(chain.outputs, lambda leaf: next(rest) if isinstance(leaf, Ref) else leaf)

    def _given(self, number: int, value: Any) -> Given:
        """An input as a run takes it."""
        placed = self._placed(number, value, self._workers)
        if placed is not None:
            return Given(placed=placed)
        check_travels(value)
        return Given(value)

    def _placed(self, number: int, value: Any, workers: Mapping[str, BaseWorker]) -> dict[str, int] | None:
        chain = self._description.chain
        takers = [step for step in chain.steps if number in {ref.index for ref in step.arguments}]
        name = chain.name_of(number)
        if number >= len(self._description.names):
            name = f"an object that step {takers[0].name!r} takes"
        return placed_at(value, {step.place: workers[step.place] for step in takers}, name)

    @property
    def progress(self) -> dict[str, StepProgress]:
        """The state of each step of the latest run: its worker's id, and "waiting", "running", "done" or
        "failed"."""
        return dict(self._progress.steps) if self._progress is not None else {}

    # -------------------------------------------------------------------------------------- travelling

    @bounded
    def send(
        self,
        worker: BaseWorker,
        *,
        private: bool = False,
        allowed_users: Sequence[str] | None = None,
        timeout: float | None = None,
    ) -> PointerProtocol:
        """Sends the protocol, with its plans and their state, to a worker, which runs it from then on.

        If it is deployed, that worker sends the plans to the workers of the places, and values between itself
        and them. `private` and `allowed_users` say who may have the plans' state.

        Raises:
            ProtocolError: steps take objects that this process holds on workers: those cannot go along.
            WorkerLostError: the worker's connection has ended.
        """
        return run(
            self.async_send(worker, private=private, allowed_users=allowed_users),
            instead="await protocol.async_send(worker)",
        )

    @bounded
    async def async_send(
        self,
        worker: BaseWorker,
        *,
        private: bool = False,
        allowed_users: Sequence[str] | None = None,
        timeout: float | None = None,
    ) -> PointerProtocol:
        """`send`, to be awaited on any loop."""
        if not isinstance(worker, BaseWorker):
            raise LocalError(f"send takes a worker, not {type(worker).__name__}")
        self._description = self._describe()
        if self._description.held:
            raise ProtocolError(
                "steps of the protocol take objects that belong to this process, on their workers: run it from here, "
                "or make them inputs"
            )
        self._sent = await send_protocol(
            worker,
            self.id,
            self._description.chain,
            self._description.plans,
            self._workers,
            tags=self._tags,
            description=self._text,
            private=private,
            allowed_users=allowed_users,
        )
        self.id = self._sent.id_at_location
        return self._sent

    @bounded
    def get(self, *, timeout: float | None = None) -> Self:
        """Takes the protocol back from the worker it was sent to, which forgets it; runs start here again.

        Raises:
            ProtocolError: it is here. GetNotPermittedError: it is private.
        """
        self._of_sent().get()
        self._sent = None
        return self

    @bounded
    async def async_get(self, *, timeout: float | None = None) -> Self:
        """`get`, to be awaited on any loop."""
        await self._of_sent().async_get()
        self._sent = None
        return self

    def _of_sent(self) -> PointerProtocol:
        if self._sent is None:
            raise ProtocolError("the protocol is here already: get() brings back one that was sent")
        return self._sent

    @property
    def location(self) -> BaseWorker | None:
        """The worker that it was sent to; None while it is here."""
        return None if self._sent is None else self._sent.location

    def tag(self, *tags: str) -> Self:
        """Tags the protocol; the tags travel with it, and publish it where it is sent."""
        if not all(isinstance(one, str) and 0 < len(one) <= 200 for one in tags):
            raise LocalError("tags are strings of 1 to 200 characters")
        self._tags = (*self._tags, *tags)
        if self._sent is not None:
            self._sent.tag(*tags)
        return self

    def describe(self, description: str) -> Self:
        """Gives the protocol a description, whose words `search` finds."""
        self._text = str(description)
        if self._sent is not None:
            self._sent.describe(self._text)
        return self

    @property
    def tags(self) -> set[str]:
        """Its tags."""
        return set(self._tags)

    @property
    def description(self) -> str:
        """Its description."""
        return self._text

    # -------------------------------------------------------------------------------------- for people

    def __repr__(self) -> str:
        location = f" location:{self.location.id}" if self.location is not None else ""
        name = f" {self.name}" if self.name else ""
        resolved = " resolved" if self._workers else ""
        lines = [f"<Protocol{name} id:{self.id} owner:me{location}{resolved}>"]
        chain = self._description.chain
        for step in chain.steps:
            place = self._workers[step.place].id if self._workers else step.place
            if not is_line(self._description.chain):
                takes = ", ".join(
                    dict.fromkeys(_argument_name(chain.short_name(ref.index)) for ref in step.arguments)
                )
                place = f"{step.name} on {place} ({takes})"
            plan = self._pointers.get((step.plan, step.place), self._description.plans[step.plan])
            lines.append(f" - {place}: {plan}")
        if not is_line(self._description.chain):
            gives = dict.fromkeys(chain.short_name(ref.index) for ref in refs_in(chain.outputs))
            lines.append(f" gives {', '.join(gives) or 'nothing'}")
        return "\n".join(lines)


def _argument_name(name: str) -> str:
    """An argument's name; for a held object that of the argument it is given for, for a module just one."""
    return name.split(HELD)[1].partition(".")[0] if HELD in name else name

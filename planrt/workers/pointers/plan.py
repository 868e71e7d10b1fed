"""`PointerPlan`: a plan on a worker. Calling it posts one op and returns pointers, at once."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from planrt.deadlines import bounded
from planrt.errors import LocalError, OptionError, PlanArgumentError
from planrt.loop import run
from planrt.plans import other_sizes as forms
from planrt.plans.ir.graph import Graph
from planrt.plans.ir.record import PlanRecord, state_hash
from planrt.plans.plan import Plan
from planrt.shown import shown
from planrt.types import as_whole
from planrt.workers.pointers import kinds
from planrt.workers.pointers.handle import Handle, ObjectPointer, alive, handle_at
from planrt.workers.pointers.multi import MultiPointerTensor
from planrt.workers.pointers.plan_calls import call_plan, copy_plan, state_pointers
from planrt.workers.pointers.printing import gone_words, pointer_card, tag_lines
from planrt.workers.pointers.tensor import PointerTensor

if TYPE_CHECKING:
    from planrt.workers.base import BaseWorker
    from planrt.workers.pointers.workplace import Location
    from planrt.workers.wire import messages as m


class PointerPlan(ObjectPointer):
    """A plan on a worker: ``pointer = plan.send(bob)``, and then ``pointer(x_on_bob)``.

    ``PointerPlan(location=bob, id_at_location=plan.id)`` points to one that is there; the plan stays when it goes.

    Attributes:
        training: the mode that calls run in.
        tags, description: as the plan was given them.
    """

    def __init__(
        self,
        handle: Handle | None = None,
        *,
        name: str = "plan",
        record: PlanRecord | None = None,
        origin: Plan | None = None,
        training: bool = True,
        tags: Sequence[str] = (),
        description: str = "",
        location: BaseWorker | None = None,
        id_at_location: int | None = None,
    ) -> None:
        super().__init__(handle_at(location, id_at_location) if handle is None else handle, tags, description)
        self._record = record
        self._origin = origin
        self._sent: tuple[str, tuple[str, ...] | None] | None = None
        """The hash of the state that was sent from here, and who may get it."""
        self._forms: weakref.WeakKeyDictionary[Plan, PointerPlan] = weakref.WeakKeyDictionary()
        self.name = name
        self.training = training

    def __call__(self, *args: Any, seed: int | None = None, **kwargs: Any) -> Any:
        """Runs the plan on its worker, in one message that nobody waits for; returns pointers to the results.

        Arguments are as the plan was built with them, its tensors on the plan's worker. `seed` is for plans that
        draw random numbers; by default it is drawn from torch's generator here.

        Raises:
            PlanArgumentError: wrong number, shape or dtype of arguments. MixedLocationsError: some are elsewhere.
            GonePointerError: the plan was taken back. Failures on the worker are raised by the results' `get`.
        """
        if seed is not None and not 0 <= (seed := as_whole(seed, "seed")) < 2**63:
            raise OptionError(f"seed is a whole number in [0, 2**63), not {seed!r}")
        try:
            return call_plan(self, args, kwargs, seed)
        except PlanArgumentError as error:
            form = self._form_for(args, kwargs, error)
        return form(*args, seed=seed, **kwargs)

    def _form_for(self, args: Any, kwargs: Any, error: PlanArgumentError) -> PointerPlan:
        """A pointer to the form of the plan that takes these arguments, which is sent if it is not there yet.

        Raises:
            PlanArgumentError: `error`, where a form could not stand for the plan.
        """
        origin = self._origin
        inputs = self.record.signature.bind(self.name, args, kwargs)
        if forms.fits(self, inputs):
            raise error
        if (
            origin is None
            or self._sent is None
            or not origin.is_built
            or origin.record.hash != self.record.hash
        ):
            raise PlanArgumentError(
                f"{error}. It came from a worker, and takes what it was built with: {forms.INSTEAD}"
            )
        form = forms.form_for(origin, args, kwargs, inputs, error)
        pointer = self._forms.get(form)
        if pointer is None or not pointer._handle.alive:
            state, allowed = self._sent
            if self.record.state and (
                self._handle.place.plans.state_exposed(self._handle)
                or forms.writes(self.graph)
                or forms.writes(form.graph)
                or state_hash(origin.state_tensors()) != state
            ):
                raise PlanArgumentError(
                    f"{error}. A form of it for these would have a state of its own, apart from what is on worker "
                    f"{self.location.id!r}: {forms.INSTEAD}"
                )
            options: Any = (
                {} if allowed is None else {"allowed_users": allowed} if allowed else {"private": True}
            )
            pointer = self._forms[form] = self._handle.place.plans.send(form, **options)
        pointer.training = self.training
        return pointer

    # ------------------------------------------------------------------------------------- what it is

    @property
    def record(self) -> PlanRecord:
        """All of the plan but the values of its state; asks the worker, if the plan was found there."""
        if self._record is None:
            self._record = alive(self).place.plans.read(self)
        return self._record

    @property
    def graph(self) -> Graph:
        """The graph that runs in the pointer's mode."""
        return self.record.graph(training=self.training)

    @property
    def hash(self) -> str:
        """The identity of what runs; see `Graph.hash`."""
        return self.graph.hash

    @property
    def code(self) -> str:
        """The recorded ops, one per line."""
        return self.graph.code

    @property
    def readable_plan(self) -> str:
        """The same as `code`, by the name that PySyft 0.2 had for it."""
        return self.code

    def parameters(self) -> list[PointerTensor]:
        """Pointers to the plan's parameters, where they are: what is written to one changes the plan there, so
        ``torch.optim.SGD(pointer.parameters(), lr=0.1)`` trains it. Each call returns new pointers.
        """
        alive(self).place.plans.expose_state(self._handle)
        kinds = [entry.kind for entry in self.record.state]
        return [one for one, kind in zip(state_pointers(self), kinds, strict=True) if kind == "parameter"]

    # ------------------------------------------------------------------------------------- what it does

    def train(self, mode: bool = True) -> PointerPlan:
        """Calls run in training mode from here on."""
        self.training = bool(mode)
        return self

    def eval(self) -> PointerPlan:
        """Calls run in evaluation mode from here on."""
        return self.train(False)

    @bounded
    def get(self, *, timeout: float | None = None) -> Plan:
        """Returns the plan with the state that it has there; the worker forgets it.

        Raises:
            GetNotPermittedError: its state is private, or private data was written to it. GonePointerError.
        """
        return self._taken(*alive(self).place.plans.take(self))

    @bounded
    async def async_get(self, *, timeout: float | None = None) -> Plan:
        """`get`, to be awaited on any loop."""
        return self._taken(*await alive(self).place.plans.take_async(self))

    def _taken(self, record: PlanRecord, state: Sequence[torch.Tensor], training: bool) -> Plan:
        if self._origin is None or self._origin.record.hash != record.hash:
            made = Plan.from_record(record, state, training=training)
        else:
            made = self._origin.copy()
            with torch.no_grad():
                for own, value in zip(made.state_tensors(), state, strict=True):
                    own.copy_(value)
        made._tags, made._description = self._tags, self._description
        return made

    def copy(self) -> PointerPlan:
        """Makes a copy on the same worker, with a state of its own; returns a pointer to it."""
        return copy_plan(self)

    @bounded
    def move(self, worker: BaseWorker, *, timeout: float | None = None) -> PointerPlan:
        """Moves the plan to `worker`, straight from its own, in place: returns this pointer, which points there.

        The plan keeps its id, if that is free there. If it fails, this still points to the plan.

        Raises:
            GetNotPermittedError: its state is private. RemoteError: one of the workers could not.
        """
        return run(self.async_move(worker), instead="await pointer.async_move(worker)")

    @bounded
    async def async_move(self, worker: BaseWorker, *, timeout: float | None = None) -> PointerPlan:
        """`move`, to be awaited on any loop."""
        return await alive(self).place.moves.move_plan_async(self, worker)

    def send(self, worker: BaseWorker) -> NoReturn:
        """Not for plans that are on a worker."""
        raise LocalError(
            f"plan {self.name!r} is on worker {self.location.id!r} already: move() it, or get() it and send the plan"
        )

    @staticmethod
    def several(pointers: Sequence[PointerPlan]) -> MultiPointerPlan:
        """Returns one pointer that stands for all of `pointers`."""
        return MultiPointerPlan(pointers)

    def __repr__(self) -> str:
        handle = self._handle
        chain = "".join(f" -> {worker.id}" for worker in handle.via)
        text = f"[PointerPlan | me:{self.id} -> {handle.worker.id}:{handle.id}{chain}]{gone_words(handle)}"
        if self._tags or self._description:
            text += f"\n\tPlan: {shown(self.name)}{tag_lines(self._tags, self._description)}"
        return text

    def _repr_html_(self) -> str:
        known = self._record is not None  # of a plan that was found it would have to be asked for
        return pointer_card(
            self, f"PointerPlan {self.name}", self._tags, self._description,
            [("hash", self.hash if known else None)], self.code if known else "",
        )  # fmt: skip


class MultiPointerPlan:
    """One plan that was sent to several workers. ``child`` maps worker ids to the pointers."""

    def __init__(self, pointers: Sequence[PointerPlan]) -> None:
        self.child = {pointer.location.id: pointer for pointer in pointers}
        if len(self.child) < len(pointers):
            raise LocalError("the same worker twice: send a plan to each worker once")

    def __call__(self, *args: Any, seed: int | None = None, **kwargs: Any) -> Any:
        """Runs the plan on every worker, on that worker's part of each `MultiPointerTensor`; returns such again."""

        def part(value: Any, worker: str) -> Any:
            if not isinstance(value, MultiPointerTensor):
                return value
            if worker not in value.child:
                raise LocalError(f"an argument has no part on worker {worker!r}, where the plan is")
            return value.child[worker]

        done = []
        for worker, pointer in self.child.items():
            there = [part(value, worker) for value in args]
            done.append(
                pointer(*there, seed=seed, **{key: part(value, worker) for key, value in kwargs.items()})
            )
        return MultiPointerTensor.together(done)

    def __iter__(self) -> Any:
        return iter(self.child.values())

    def __len__(self) -> int:
        return len(self.child)

    @property
    def location(self) -> list[BaseWorker]:
        """The workers."""
        return [pointer.location for pointer in self.child.values()]

    @bounded
    def get(self, *, timeout: float | None = None) -> list[Plan]:
        """Returns the plans, in the order of the workers."""
        return [pointer.get() for pointer in self.child.values()]

    def __repr__(self) -> str:
        return "[MultiPointerPlan]" + "".join(f"\n\t-> {pointer!r}" for pointer in self.child.values())


def _found(worker: Location, found: m.FoundItem) -> PointerPlan:
    """Returns a pointer to a plan that a search found."""
    return PointerPlan(
        Handle(worker, found.id, owned=found.snapshot), name=found.name, training=found.training, tags=found.tags,
        description=found.description,
    )  # fmt: skip


kinds.register("plan", _found)

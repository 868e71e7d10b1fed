"""How protocols are written down, and what becomes of it: `Step`s, checked and turned into a `Chain`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch

from planrt.errors import PlanError, ProtocolError
from planrt.plans.ir.chain import Chain, ChainPlan, ChainStep
from planrt.plans.ir.graph import refs_in
from planrt.plans.ir.signature import Signature
from planrt.plans.plan import Plan
from planrt.protocols.shapes import check_shapes
from planrt.types import Nested, Ref, leaves, map_leaves
from planrt.workers.base import BaseWorker
from planrt.workers.pointers.plan import PointerPlan
from planrt.workers.pointers.tensor import PointerTensor

HELD: Final = "\x1f"
"""Stands between the parts of the name that a held object has among a chain's inputs: step, argument,
number."""


@dataclass(frozen=True, eq=False)
class Step:
    """One step of a protocol: ``Step("alice", plan, ["x", "front"], name="back")``, or ``("alice", plan)``.

    Args:
        worker: where it runs: a worker, or a name for one given to `Protocol.deploy`. Equal names mean the
            same worker.
        plan: a built `Plan`, or a `PointerPlan` on that worker.
        inputs: the arguments of the plan: a list of them, or a dict for keyword arguments. A string names an
            input of the protocol or an earlier step, whose result it stands for; a part of a result is named
            ``"front.0"`` or ``"front.loss"``. Pointers, and modules that were sent, stand for themselves:
            they are on the step's worker already. By default the result of the step before, or for the first
            step the inputs of the protocol.
        name: what others call its result; by default the plan's name.
    """

    worker: BaseWorker | str
    plan: Plan | PointerPlan
    inputs: Sequence[Any] | Mapping[str, Any] | None = None
    name: str | None = None


@dataclass(frozen=True, eq=False)
class Description:
    """A protocol, checked. `plans` are those of the chain; `held` the pointers that its last inputs stand
    for."""

    chain: Chain
    names: tuple[str, ...]
    plans: tuple[Plan | PointerPlan, ...]
    held: tuple[PointerTensor, ...]
    workers: Mapping[str, BaseWorker]
    """Places whose worker is given."""


def is_line(chain: Chain) -> bool:
    """Returns whether each step just takes what the one before returned."""
    before: list[int] = list(range(len(chain.inputs)))
    for step, results in zip(chain.steps, chain.results, strict=True):
        if [ref.index for ref in step.arguments] != before:
            return False
        before = list(results)
    return [ref.index for ref in refs_in(chain.outputs)] == before


def build_description(
    steps: Sequence[Any],
    inputs: Sequence[str] | None,
    outputs: str | Sequence[str] | Mapping[str, str] | None,
) -> Description:
    """Checks a description and puts it together.

    Raises:
        ProtocolError: names that are unknown, twice there, or never used; results that fit no argument.
        PlanError: a plan that is not built. PlanArgumentError: a wrong number of arguments for a plan.
    """
    return _DescriptionBuilder(steps, inputs).finish(outputs)


@dataclass(frozen=True, slots=True)
class _Key:
    """A value before the chain's numbering: an input ("in", n), a held pointer ("held", n), or (step, n)."""

    kind: str | int
    number: int


class _DescriptionBuilder:
    def __init__(self, steps: Sequence[Any], inputs: Sequence[str] | None) -> None:
        if isinstance(steps, Step) or not isinstance(steps, Sequence) or not steps:
            raise ProtocolError(
                'a protocol is a list of steps: write Protocol([("alice", plan), ("bob", other)])'
            )
        self.steps = [_as_step(one, number) for number, one in enumerate(steps)]
        self.names = _names(self.steps)
        self.plans: list[Plan | PointerPlan] = []
        self.workers: dict[str, BaseWorker] = {}
        self.held: list[PointerTensor] = []
        self.held_names: list[str] = []
        self.stand_ins: dict[int, tuple[torch.Tensor, _Key]] = {}
        """id of a tensor that stands for a value -> the tensor, which keeps that id, and the value."""
        self.results: dict[str, Nested] = {}
        self.used: set[str] = set()
        first = self.steps[0]
        self.inputs = _input_names(first, _record_of(first).signature, inputs)
        for name in set(self.inputs) & set(self.names):
            raise ProtocolError(
                f"{name!r} is an input and a step: give the step another name, Step(..., name=...)"
            )
        for number, name in enumerate(self.inputs):
            self.results[name] = self.stand_in(_Key("in", number))
        self.arguments = [self.add(number, step) for number, step in enumerate(self.steps)]

    def stand_in(self, key: _Key) -> torch.Tensor:
        made = torch.empty(0)
        self.stand_ins[id(made)] = (made, key)
        return made

    def add(self, number: int, step: Step) -> list[_Key]:
        """A step's arguments: one value for each input tensor of its plan."""
        name, record = self.names[number], _record_of(step)
        place = step.worker if isinstance(step.worker, str) else step.worker.id
        if (
            isinstance(step.worker, BaseWorker)
            and self.workers.setdefault(place, step.worker) is not step.worker
        ):
            raise ProtocolError(f"step {name!r}: there are two different workers called {place!r}")
        if not any(step.plan is one for one in self.plans):
            self.plans.append(step.plan)
        given = step.inputs
        if given is None:
            given = [self.names[number - 1]] if number else list(self.inputs)
        if isinstance(given, str) or not isinstance(given, Sequence | Mapping):
            raise ProtocolError(f"step {name!r}: inputs is a list: write inputs=[{given!r}]")
        if isinstance(given, Mapping):
            args, kwargs = [], {word: self.value(one, number) for word, one in given.items()}
        else:
            args, kwargs = [self.value(one, number) for one in given], {}
        try:
            tensors = record.signature.bind(record.name, args, kwargs)
        except PlanError as error:
            raise type(error)(f"step {name!r}: {error}") from error
        keys = [
            self.key(tensor, name, of)
            for tensor, of in zip(tensors, record.signature.input_names, strict=True)
        ]
        outputs = record.graph(training=step.plan.training).outputs
        counter = iter(range(sum(1 for _ in refs_in(outputs))))
        self.results[name] = map_leaves(
            outputs,
            lambda leaf: self.stand_in(_Key(number, next(counter))) if isinstance(leaf, Ref) else leaf,
        )
        return keys

    def value(self, given: Any, number: int) -> Any:
        """What `given`, in the inputs of a step, stands for."""
        if isinstance(given, str):
            return self.named(given, f"step {self.names[number]!r}")
        if isinstance(given, torch.nn.Module):
            return given
        if isinstance(given, tuple | list):
            return type(given)(self.value(one, number) for one in given)
        if isinstance(given, dict):
            return {word: self.value(one, number) for word, one in given.items()}
        return given

    def named(self, text: str, who: str) -> Any:
        """The value that `text` names, in the description of `who`."""
        head, *path = text.split(".")
        if head not in self.results:
            if head in self.names:
                raise ProtocolError(
                    f"{who} takes {head!r}, which does not come before it: put that step first (steps cannot go round "
                    "in a circle)"
                )
            known = ", ".join(map(repr, self.results))
            raise ProtocolError(
                f"{who} takes {text!r}, and no input or earlier step is called that; there are {known}. Inputs are "
                "named in Protocol(..., inputs=[...])"
            )
        self.used.add(head)
        found = self.results[head]
        for part in path:
            if isinstance(found, dict) and part in found:
                found = found[part]
            elif isinstance(found, tuple | list) and part.isdecimal() and int(part) < len(found):
                found = found[int(part)]
            else:
                raise ProtocolError(
                    f"{who} takes {text!r}: {head!r} has no part {part!r}; it is {_structure_of(found)}"
                )
        return found

    def key(self, tensor: torch.Tensor, name: str, argument: str) -> _Key:
        if id(tensor) in self.stand_ins:
            return self.stand_ins[id(tensor)][1]
        if not isinstance(tensor, PointerTensor):
            raise ProtocolError(
                f"step {name!r} is given a tensor of this process: send it to the step's worker first, or make it an "
                "input of the protocol"
            )
        for number, one in enumerate(self.held):
            if one is tensor:
                return _Key("held", number)
        self.held.append(tensor)
        self.held_names.append(f"{name}{HELD}{argument}"[:180] + f"{HELD}{len(self.held)}")
        return _Key("held", len(self.held) - 1)

    def finish(self, outputs: Any) -> Description:
        for name in self.inputs:
            if name not in self.used:
                raise ProtocolError(f"no step takes input {name!r}: leave it out")
        wanted = self.outputs(outputs)
        inputs = (*self.inputs, *self.held_names)
        first: list[int] = []
        known = len(inputs)
        for name in self.names:
            first.append(known)
            known += sum(1 for leaf in leaves(self.results[name]) if id(leaf) in self.stand_ins)

        def ref(key: _Key) -> Ref:
            if key.kind == "in":
                return Ref(key.number)
            return Ref(
                len(self.inputs) + key.number if key.kind == "held" else first[int(key.kind)] + key.number
            )

        def numbered(leaf: Any) -> Any:
            return ref(self.stand_ins[id(leaf)][1]) if id(leaf) in self.stand_ins else leaf

        chain = Chain(
            inputs,
            tuple(ChainPlan(plan.record, plan.training) for plan in self.plans),
            tuple(
                ChainStep(
                    name,
                    step.worker if isinstance(step.worker, str) else step.worker.id,
                    next(number for number, plan in enumerate(self.plans) if plan is step.plan),
                    tuple(ref(key) for key in keys),
                )
                for name, step, keys in zip(self.names, self.steps, self.arguments, strict=True)
            ),
            map_leaves(wanted, numbered),
        )
        check_shapes(chain)
        return Description(chain, tuple(self.inputs), tuple(self.plans), tuple(self.held), self.workers)

    def outputs(self, outputs: Any) -> Nested:
        """What a run returns."""
        last = self.names[-1]
        who = "the outputs of the protocol"
        if outputs is None:
            wanted = self.results[last]
            self.used.add(last)
        else:
            wanted = map_leaves(outputs, lambda one: self.named(one, who) if isinstance(one, str) else one)
        for leaf in leaves(wanted):
            found = self.stand_ins.get(id(leaf))
            if found is None and isinstance(leaf, torch.Tensor | PointerTensor):
                raise ProtocolError(f"{who} are results of its steps")
            if found is not None and found[1].kind == "in":
                raise ProtocolError(f"{who} are results of its steps, not {self.inputs[found[1].number]!r}")
        for name in self.names:
            if name not in self.used and any(
                id(leaf) in self.stand_ins for leaf in leaves(self.results[name])
            ):
                raise ProtocolError(
                    f"no step takes the result of step {name!r}: leave the step out, or name it in Protocol(..., "
                    "outputs=[...])"
                )
        return wanted


def _as_step(given: Any, number: int) -> Step:
    if isinstance(given, tuple | list) and len(given) == 2:
        given = Step(*given)
    if not isinstance(given, Step):
        raise ProtocolError(f"step {number} is neither (worker, plan) nor a Step: {type(given).__name__}")
    worker: Any = given.worker
    if not isinstance(worker, BaseWorker) and not (isinstance(worker, str) and 0 < len(worker) <= 200):
        raise ProtocolError(
            f"step {number}: its worker is a worker, its id, or a name for one, not {type(worker).__name__}"
        )
    if not isinstance(given.plan, Plan | PointerPlan):
        raise ProtocolError(
            f"step {number}: {type(given.plan).__name__} is no plan: make one with func2plan, or of a class derived "
            "from Plan"
        )
    if given.name is not None and not (isinstance(given.name, str) and _is_name(given.name)):
        raise ProtocolError(
            f"step {number}: {given.name!r} is no name: use up to 200 characters, and no dots"
        )
    return given


def _is_name(text: str) -> bool:
    return 0 < len(text) <= 200 and "." not in text


def _names(steps: Sequence[Step]) -> list[str]:
    """A name for each step: its own, or its plan's; with a number where another step has that already."""
    chosen = [step.name for step in steps if step.name is not None]
    for name in chosen:
        if chosen.count(name) > 1:
            raise ProtocolError(f"two steps are called {name!r}: give each a name of its own")
    taken = set(chosen)
    names = []
    for step in steps:
        name = base = step.name or step.plan.name.replace(".", "_")[:190]
        number = 1
        while step.name is None and name in taken:
            number += 1
            name = f"{base}_{number}"
        taken.add(name)
        names.append(name)
    return names


def _record_of(step: Step) -> Any:
    return step.plan.record


def _input_names(first: Step, signature: Signature, given: Sequence[str] | None) -> list[str]:
    """The inputs of a protocol: as given, or what the first step's plan takes."""
    if given is not None:
        if isinstance(given, str):
            raise ProtocolError(f"inputs is a list of names: write inputs=[{given!r}]")
        for name in given:
            if not isinstance(name, str) or not _is_name(name):
                raise ProtocolError(
                    f"{name!r} is no name for an input: use up to 200 characters, and no dots"
                )
        if len(set(given)) != len(given):
            raise ProtocolError("two inputs have the same name")
        return list(given)
    if first.inputs is not None:
        if isinstance(first.inputs, str):
            raise ProtocolError(f"step 0: inputs is a list: write inputs=[{first.inputs!r}]")
        if any(isinstance(leaf, str) for leaf in leaves(_as_container(first.inputs))):
            raise ProtocolError("name the inputs of the protocol: Protocol([...], inputs=['x', 'y'])")
        return []
    names = []
    for parameter in signature.parameters:
        value = signature.arguments.get(parameter.name)
        if isinstance(value, Ref):
            names.append(parameter.name)
        elif any(isinstance(leaf, Ref) for leaf in leaves(value)):
            raise ProtocolError(
                f"the first plan takes several tensors in {parameter.name!r}: name the inputs of the protocol, and say "
                "which goes where: Protocol([Step(worker, plan, [['x', 'y']]), ...], inputs=['x', 'y'])"
            )
    return names


def _as_container(inputs: Any) -> Any:
    return (
        dict(inputs)
        if isinstance(inputs, Mapping)
        else list(inputs)
        if not isinstance(inputs, str)
        else inputs
    )


def _structure_of(value: Any) -> str:
    if isinstance(value, dict):
        return f"a dict of {', '.join(value)}"
    return f"a {type(value).__name__} of {len(value)}" if isinstance(value, tuple | list) else "one value"

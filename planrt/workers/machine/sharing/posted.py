"""What a client posted for the parties to run: a program of its own, or a plan that is lowered here. No I/O."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from planrt.errors import SharingError
from planrt.plans.ir.graph import Graph
from planrt.sharing.kernels import Share
from planrt.sharing.kernels.sizes import as_operand
from planrt.sharing.programs.calls import Program
from planrt.sharing.programs.looks import check_numbers
from planrt.sharing.programs.lowering import Looks
from planrt.sharing.programs.running import Failed
from planrt.types import Ref, TensorSpec
from planrt.workers.machine.admission import admit_shared
from planrt.workers.machine.failures import OpFailedError
from planrt.workers.machine.kinds.base import StoredObject
from planrt.workers.machine.kinds.plan import PlanObject
from planrt.workers.machine.kinds.share import SharedPart
from planrt.workers.machine.kinds.tensor import tensor_of
from planrt.workers.machine.objects import KeptObjects
from planrt.workers.machine.sessions import Session
from planrt.workers.machine.sharing.groups import Group
from planrt.workers.machine.waiting import Exchange
from planrt.workers.wire import shared_plan
from planrt.workers.wire.posted import PostedOp
from planrt.workers.wire.refusals import GetNotPermitted


@dataclass(slots=True)
class PostedProgram:
    """A program with its operands."""

    program: Program
    values: list[Any]
    """In the order of the program: `Share`s, tensors and numbers that all know, or `Failed`."""
    stored: list[StoredObject | None]
    """The objects that these are; None of numbers, and of what was computed from others."""
    what: str
    """What it is, as messages call it."""


class PostedPrograms:
    """Finds what is to run and its operands among the objects of one worker, and asks its owner."""

    def __init__(self, objects: KeptObjects) -> None:
        self._objects = objects
        self._store = objects.store

    def find(self, session: Session, group: Group, op: PostedOp, operands: list[StoredObject]) -> Exchange:
        """Returns what `op` runs, a `PostedProgram`; `operands` is given its operands as they are found.

        Raises:
            NotApproved, PolicyError: the owner does not allow it. SharingError, UnknownObject: it cannot run.
        """
        if op.name != shared_plan.CALL:
            return self._program(session, group, op, operands)
        return (yield from self._plan(session, group, op, operands))

    def _program(
        self, session: Session, group: Group, op: PostedOp, operands: list[StoredObject]
    ) -> PostedProgram:
        args: tuple[Any, ...] = op.args if len(op.args) in (3, 4) else ("", None, None)
        text, refs, told = args[1], args[2], args[3] if len(args) == 4 else ""
        refs_fit = isinstance(refs, tuple) and {Ref, float, int}.issuperset(map(type, refs))
        if not refs_fit or not isinstance(text, str) or not isinstance(told, str):
            raise SharingError("a program on shares is posted with its group, its text and its operands")
        program = group.programs.read(text, told)
        if program.operands != len(refs):
            raise SharingError(f"the program takes {program.operands} operands, not {len(refs)}")
        if self._objects.gate is not None:
            for name in dict.fromkeys(call.name for call in program.calls):
                self._objects.gate.admit_kernel(name)
        stored = [self._store.find(session.id, one.index) if type(one) is Ref else None for one in refs]
        operands += [one for one in stored if one is not None]
        copies = all(call.name == "clone" for call in program.calls)
        values = [
            as_operand(ref) if one is None else self._operand(session, group, one, copies=copies)
            for ref, one in zip(refs, stored, strict=True)
        ]
        check_numbers(program, values)
        named = ", ".join(dict.fromkeys(call.name for call in program.calls))
        return PostedProgram(program, values, stored, f"{named[:100] or 'nothing'} on shares")

    def _operand(self, session: Session, group: Group, stored: StoredObject, *, copies: bool = False) -> Any:
        try:
            self._objects.check_failure(session, stored)
        except OpFailedError as error:
            return Failed(error)
        if isinstance(stored.value, SharedPart):
            if stored.value.group is not group and copies:
                return _taken_over(stored.value, group)
            if stored.value.group is not group:
                raise SharingError("its operands are shared in different groups, by different parties")
            return stored.value.share
        if not session.may_read(self._store.label_of(stored)):
            raise GetNotPermitted("what all parties are to know is private, and not for this session's user")
        return tensor_of(stored).detach()

    # ---------------------------------------------------------------------------------------- plans

    def _plan(self, session: Session, group: Group, op: PostedOp, operands: list[StoredObject]) -> Exchange:
        graph, identity, looks, refs = self._called(session, op)
        operands += [self._store.find(session.id, one.index) for one in refs]
        values = [self._operand(session, group, one) for one in operands]
        tensors = [_tensor(one, value) for one, value in zip(looks, values, strict=True)]
        if self._objects.gate is not None:
            given = [
                one if isinstance(one, torch.Tensor) else TensorSpec(one.shape, one.dtype) for one in tensors
            ]
            admit_shared(self._objects.gate, session, graph, given, _about(group))
        scale = group.about.scale
        if not shared_plan.is_lowered(graph, tensors, scale=scale, grad=op.grad):
            yield from group.turn()
        lowered = shared_plan.lowered_plan(graph, tensors, scale=scale, grad=op.grad)
        group.pace.go_on()
        if lowered is None or lowered.identity != identity:
            raise SharingError(
                f"plan {graph.name!r} is another program here than at its client: both need the same versions of "
                "planrt and of torch, and processors that round alike"
            )
        shared = [number for number, one in enumerate(tensors) if isinstance(one, Looks)]
        places = [shared[one] if isinstance(one, int) else None for one in lowered.operands]
        return PostedProgram(
            lowered.program,
            [
                one if place is None else values[place]
                for one, place in zip(lowered.operands, places, strict=True)
            ],
            [None if place is None else operands[place] for place in places],
            f"plan {graph.name!r} on shares",
        )

    def _called(self, session: Session, op: PostedOp) -> tuple[Graph, str, list[Looks | None], Sequence[Ref]]:
        if len(op.args) != 6:
            raise SharingError("a plan on shares is posted with its group, its mode and its operands")
        _, plan, training, identity, looks, refs = op.args
        fits = type(plan) is Ref and type(training) is bool and isinstance(identity, str) and _are_refs(refs)
        if not fits or not isinstance(looks, tuple) or len(looks) != len(refs):
            raise SharingError("a plan on shares is posted with its group, its mode and its operands")
        held = self._objects.ready(session, plan.index).value
        if not isinstance(held, PlanObject):
            raise SharingError(f"object {plan.index} is no plan")
        graph = held.record.graph(training=training)
        if len(refs) != len(graph.inputs) + len(graph.state):
            raise SharingError(f"plan {graph.name!r} takes {len(graph.inputs)} inputs and its state")
        return graph, identity, [_looks(one) for one in looks], refs


def _are_refs(refs: Any) -> bool:
    return isinstance(refs, tuple | list) and {Ref}.issuperset(map(type, refs))


def _looks(data: Any) -> Looks | None:
    if data is None:
        return None
    if isinstance(data, tuple) and len(data) == 3:
        shape, dtype, requires_grad = data
        whole = isinstance(shape, tuple) and {int}.issuperset(map(type, shape))
        sizes = whole and min(shape, default=0) >= 0
        if sizes and isinstance(dtype, torch.dtype) and type(requires_grad) is bool:
            return Looks(shape, dtype, requires_grad)
    raise SharingError("an operand in shares has a shape and a dtype")


def _tensor(looks: Looks | None, value: Any) -> Looks | torch.Tensor:
    """What lowering takes for an operand."""
    if looks is None:
        if not isinstance(value, torch.Tensor):
            raise SharingError("what all parties are to know of a plan's arguments is not there")
        return value
    if isinstance(value, torch.Tensor):
        raise SharingError("an argument is to be in shares, and is not")
    if not isinstance(value, Failed) and tuple(value.shape) != looks.shape:
        raise SharingError(
            f"an argument in shares has the shape {list(value.shape)}, not {list(looks.shape)}"
        )
    return looks


def _taken_over(part: SharedPart, group: Group) -> Share:
    """A part of whole numbers that another group of the same parties holds, for a copy in this one. What was opened of
    it there is not taken along: that group's randomness belongs to its masks.

    Raises:
        SharingError: other parties, another dealer or client, or fractions, whose scale is that of their group.
    """
    one, other = part.group.about, group.about
    part.group.check()
    same = one.parties == other.parties and one.dealer == other.dealer and part.group.owner == group.owner
    if not same or part.share.scale != 1:
        raise SharingError("its operands are shared in different groups, by different parties")
    return Share(part.share.part, 1)


def _about(group: Group) -> str:
    parties = ", ".join(one.worker for one in group.about.parties)
    return f"shares (opened to who asks) of {parties}, with the crypto provider {group.about.dealer.worker}"

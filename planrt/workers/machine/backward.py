"""Backward passes on a worker, and who may read the gradients that they leave. No I/O.

A pass returns no results. It leaves gradients at tensors that its client did not name: at leaves, and at inner tensors
that retain theirs. So its label goes to the memory of these gradients. Ops label what they return and what they write
to in `planrt.workers.machine.eager`; `autograd.grad`, which is such an op, takes from here what it leaves at inner
tensors.

Why a gradient that is missed is for nobody, and not for everybody:

1. A pass can write to any tensor of its graphs, which can be tensors without an id here, of any session that ever
   handed an object to this one. To name all of them, all ways into a graph must be known.
2. So each pass notes the gradients that it can find before and after (`_written_by`: leaves of the graph, tensors that
   retain theirs, objects that have gradients), and gives its label to those that it made or changed: they are accounted
   for (`account`), and so are those that were there before the first private value (`MemoryLabels.watch`).
3. A gradient that a pass made and that step 2 missed is in memory that nobody accounted for. `of_gradient` answers
   "nobody" for such memory. A way into a graph that is not known costs a user a gradient, and tells nobody a value.
4. That holds for new memory only: a pass that adds to a gradient in place keeps its memory, which may be accounted for
   already. So step 2 looks at all objects with gradients of all sessions that share these graphs, whether the pass
   reaches them or not. It sees such a change by the version, and joins the labels.
5. Gradients are computed from what the graph has kept, not from what its operands hold now. Writes of private values
   that autograd does not see are in the label of the session's graphs (`Graphs`), which joins that of every pass.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TypeAlias

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from planrt.errors import LocalError, PolicyError
from planrt.workers.machine.events import Answer, Steps
from planrt.workers.machine.failures import OpFailedError, failure_of, failure_of_op
from planrt.workers.machine.kinds.tensor import grad_of, spec_of, tensor_of
from planrt.workers.machine.labels import Label, join
from planrt.workers.machine.objects import KeptObjects
from planrt.workers.machine.peers import PeerOps
from planrt.workers.machine.private import leaf_tensors
from planrt.workers.machine.sessions import Session
from planrt.workers.wire import messages as m
from planrt.workers.wire.posted import PostedOp

GradientsBefore: TypeAlias = Sequence[tuple[torch.Tensor, torch.Tensor | None, int, Label]]
"""Tensors with their gradients before a pass: the tensor, its gradient, that one's version, and who may read it."""


class BackwardPasses:
    """Backward passes over the objects of one worker."""

    def __init__(self, objects: KeptObjects, peers: PeerOps) -> None:
        self._objects = objects
        self._store = objects.store
        self._peers = peers
        self._retaining = WeakTensorKeyDictionary()
        """Tensors on which `retain_grad` was called, with ids here or without."""

    def run(self, session: Session, body: m.Backward) -> Steps:
        """Runs a backward pass; answers which objects of the session have gradients then."""
        if session.halted is not None:
            raise OpFailedError(session.halted)
        try:
            return (yield from self._run(session, body))
        except Exception as error:
            if body.halts:
                session.halted = failure_of(error)
            raise

    def resume(self, session: Session) -> Answer:
        """Goes on with the ops of a client that knows of the pass that failed; answers which of its objects have
        gradients."""
        session.halted = None
        return m.Gradients(list(self._gradients(session))), ()

    def _run(self, session: Session, body: m.Backward) -> Steps:
        if not body.roots:
            raise LocalError("a backward pass starts somewhere: no tensors were given")
        if len(body.roots) != len(body.gradients):
            raise LocalError(
                f"{len(body.roots)} tensors and {len(body.gradients)} gradients for them do not fit"
            )
        roots = [self._objects.ready(session, id) for id in body.roots]
        given = [None if id is None else self._objects.ready(session, id) for id in body.gradients]
        inputs = None if body.inputs is None else [self._objects.ready(session, id) for id in body.inputs]
        everything = [*roots, *(one for one in given if one is not None), *(inputs or [])]
        if any(self._store.kinds.of(stored.value).elsewhere for stored in everything):
            return (yield from self._peers.backward(session, body, everything))
        label = session.graphs.label
        for stored in everything:
            label = join(label, self._store.label_of(stored))
        if self._objects.gate is not None:
            self._objects.gate.admit_op("Tensor.backward")
            flops = self._objects.gate.admit_pass(
                "Tensor.backward",
                [tensor_of(stored) for stored in roots],
                None if inputs is None else [tensor_of(stored) for stored in inputs],
                create_graph=body.create_graph,
            )
            self._store.spend(session.id, "Tensor.backward", flops)
        for id, stored in zip(body.inputs or (), inputs or (), strict=True):
            session.leaves[id] = None  # has a gradient afterwards, wherever it is in the graph
            if not tensor_of(stored).is_leaf:  # torch retains its gradient, from this pass on
                self.retain(tensor_of(stored))
        if self._store.limits(session.id):
            self._check_room(session, [tensor_of(stored) for stored in roots])
        written = self._written_by([tensor_of(stored) for stored in roots], session)
        before = self.gradients_before(written)
        reached = leaf_tensors([tensor_of(stored) for stored in roots]) if body.create_graph else []
        with torch.enable_grad():
            try:
                torch.autograd.backward(
                    [tensor_of(stored) for stored in roots],
                    [None if one is None else tensor_of(one) for one in given],
                    retain_graph=body.retain_graph,
                    create_graph=body.create_graph,
                    inputs=None if inputs is None else [tensor_of(stored) for stored in inputs],
                )
            except Exception as error:
                op = PostedOp("Tensor.backward", (), {}, None, True)
                raise OpFailedError(failure_of_op(error, op, None, private=label is not None)) from error
            finally:  # a pass that fails may have left gradients before
                self.account(before, label)
                for tensor in (*reached, *(self._retaining if reached else ())):
                    self._store.may_keep_itself(tensor)
                self._keep(session)
        return m.Gradients(list(self._gradients(session))), ()

    def _check_room(self, session: Session, roots: Sequence[torch.Tensor]) -> None:
        """Raises unless the session may keep all the gradients that a pass can leave."""
        stored = (self._store.objects.get(id) for id in session.leaves)
        inner = [one.value for one in stored if one is not None and isinstance(one.value, torch.Tensor)]
        new = {id(one): one for one in (*leaf_tensors(roots), *(one for one in inner if not one.is_leaf))}
        nbytes = sum(one.numel() * one.element_size() for one in new.values() if grad_of(one) is None)
        self._store.check_bytes(session.id, nbytes)

    def _keep(self, session: Session) -> None:
        """Counts the gradients that there are now."""
        if self._store.limits(session.id):
            stored = [one for id in session.leaves if (one := self._store.objects.get(id)) is not None]
            for one in stored:
                if one.account is not None and isinstance(one.value, torch.Tensor):
                    grad = grad_of(one.value)
                    if grad is not None:
                        one.account.take([grad])
                        with contextlib.suppress(PolicyError):  # it counts, so whatever comes next is refused
                            one.account.take_graph([grad])

    def retain(self, tensor: torch.Tensor) -> None:
        """`retain_grad` was called on an inner tensor."""
        self._retaining[tensor] = None

    def before_autograd_grad(self) -> GradientsBefore:
        """Returns the gradients at inner tensors that retain theirs: `autograd.grad` may write to any of them."""
        return self.gradients_before(list(self._retaining)) if self._store.memory.watching else []

    def _written_by(self, roots: Sequence[torch.Tensor], session: Session) -> list[torch.Tensor]:
        """Tensors whose gradients a pass from `roots` may write: leaves of the graph, whoever knows them, inner tensors
        that retain theirs, and every object of the sessions that share graphs which has a gradient. Nobody asks
        before there is a private value."""
        if not self._store.memory.watching:
            return []
        found = [*leaf_tensors(roots), *self._retaining]
        for member in {id(member): member for member in (session, *session.graphs.members)}.values():
            for number in member.leaves:
                stored = self._store.objects.get(number)
                if stored is not None and isinstance(stored.value, torch.Tensor):
                    found.append(stored.value)
        return list({id(tensor): tensor for tensor in found}.values())

    def gradients_before(self, tensors: Sequence[torch.Tensor]) -> GradientsBefore:
        """Returns the gradients at `tensors`, before a pass."""
        before = []
        for tensor in tensors:
            grad = grad_of(tensor)
            version, label = (
                (0, None) if grad is None else (grad._version, self._store.memory.of_gradient(grad))
            )
            before.append((tensor, grad, version, label))
        return before

    def account(self, before: GradientsBefore, label: Label) -> None:
        """Labels those gradients that a pass of that label made or changed since `before`."""
        for tensor, old, version, old_label in before:
            grad = grad_of(tensor)
            if grad is not None and (grad is not old or grad._version != version):
                self._store.memory.account(grad, join(label, old_label))

    def _gradients(self, session: Session) -> Iterator[tuple[int, m.ObjectSpec]]:
        """Which objects of the session have gradients, and what these look like."""
        for id in list(session.leaves):
            stored = self._store.objects.get(id)
            if stored is None or stored.owner != session.id:
                del session.leaves[id]  # handed over
            elif isinstance(stored.value, torch.Tensor) and (grad := grad_of(stored.value)) is not None:
                yield id, spec_of(grad)

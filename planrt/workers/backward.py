"""Backward passes on a worker, and who may read the gradients that they leave. No I/O.

A pass gives no results. It leaves gradients at tensors that its client did not name: at leaves, and at inner tensors
that retain theirs. So its label goes to the memory of these gradients. Apart from `planrt.workers.eager`, where ops
label what they give and what they write to; `autograd.grad`, which is such an op, takes from here what it leaves at
inner tensors.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeAlias

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from planrt.errors import LocalError
from planrt.workers import messages as m
from planrt.workers.events import Steps
from planrt.workers.failures import OpFailedError, failure_of_op
from planrt.workers.labels import Label, both
from planrt.workers.objects_kept import KeptObjects, grad_of, tensor_of
from planrt.workers.peer_ops import PeerOps
from planrt.workers.posted import PostedOp
from planrt.workers.private import leaf_tensors
from planrt.workers.sessions import Session
from planrt.workers.store import PeerRef, spec_of

RetainedGradients: TypeAlias = dict[int, tuple[torch.Tensor | None, Label]]
"""id() of an inner tensor -> the gradient that it retains, and who may read it."""


class BackwardPasses:
    """Backward passes over the objects of one worker."""

    def __init__(self, objects: KeptObjects, peers: PeerOps) -> None:
        self._objects = objects
        self._store = objects.store
        self._peers = peers
        self._retaining = WeakTensorKeyDictionary()
        """Tensors on which `retain_grad` was called, with ids here or without."""

    def run(self, session: Session, body: m.Backward) -> Steps:
        """A backward pass; says which objects of the session have gradients then."""
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
        if any(isinstance(stored.value, PeerRef) for stored in everything):
            return (yield from self._peers.backward(session, body, everything))
        label = session.graphs.label
        for stored in everything:
            label = both(label, self._store.label_of(stored))
        if self._objects.gate is not None:
            self._objects.gate.admit_op("Tensor.backward")
        labelled = label is not None or bool(self._store.memory)
        reached = leaf_tensors([tensor_of(stored) for stored in inputs or roots]) if labelled else []
        labels = [both(label, self._label_of_gradient(tensor)) for tensor in reached]
        retained = self.retained() if labelled else {}
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
                raise OpFailedError(failure_of_op(error, op, None, everything, self._store)) from error
            finally:  # a pass that fails may have left gradients before
                for tensor, its_label in zip(reached, labels, strict=True):
                    if tensor.grad is not None:  # the old one and what was added to it
                        self._store.memory.add(tensor.grad, its_label)
                self.label_retained(retained, label)
        return m.Gradients(list(self._gradients(session))), ()

    def retain(self, tensor: torch.Tensor) -> None:
        """`retain_grad` was called on an inner tensor."""
        self._retaining[tensor] = None

    def retained(self) -> RetainedGradients:
        """The gradients at inner tensors, before a pass."""
        return {
            id(tensor): (tensor.grad, self._label_of_gradient(tensor))
            for tensor in self._retaining
            if tensor.retains_grad
        }

    def label_retained(self, before: RetainedGradients, label: Label) -> None:
        """Labels the gradients that a pass left at inner tensors, `before` being what `retained` gave."""
        for tensor in list(self._retaining):
            grad = tensor.grad if tensor.retains_grad else None
            old, old_label = before.get(id(tensor), (None, None))
            if grad is not None and grad is not old:
                self._store.memory.add(grad, both(label, old_label))

    def _label_of_gradient(self, tensor: torch.Tensor) -> Label:
        grad = grad_of(tensor)
        return None if grad is None else self._store.memory.of(grad)

    def _gradients(self, session: Session) -> Iterator[tuple[int, m.ObjectSpec]]:
        """Which objects of the session have gradients, and what these look like."""
        for id in list(session.leaves):
            stored = self._store.objects.get(id)
            if stored is None or stored.owner != session.id:
                del session.leaves[id]  # handed over
            elif isinstance(stored.value, torch.Tensor) and (grad := grad_of(stored.value)) is not None:
                yield id, spec_of(grad)

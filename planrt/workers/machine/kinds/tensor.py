"""Tensors as objects of a worker: by far the most. No I/O."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch

from planrt.errors import LocalError
from planrt.serde.dtypes import DTYPE_NAMES
from planrt.workers.machine.events import Steps
from planrt.workers.machine.kinds.base import ObjectKind, StoredObject
from planrt.workers.machine.labels import Label, MemoryLabels, join
from planrt.workers.machine.sessions import Session, allowed_list, ask, users_of
from planrt.workers.wire import messages as m
from planrt.workers.wire.refusals import GetNotPermitted


class TensorKind(ObjectKind[torch.Tensor]):
    """Tensors, with their gradients."""

    python_type = torch.Tensor
    name: ClassVar[Literal["tensor"]] = "tensor"
    made_by_ops = True

    def tensors(self, value: torch.Tensor) -> Sequence[torch.Tensor]:
        """Returns the tensor itself."""
        return (value,)

    def gains_gradient(self, value: torch.Tensor) -> bool:
        """Returns whether it is a leaf that requires a gradient."""
        return value.requires_grad and value.is_leaf

    def can_be_found(self, value: torch.Tensor) -> bool:
        """Returns True, but for a view that autograd can say nothing about."""
        try:
            return value.is_leaf in (True, False)
        except RuntimeError:  # a view whose base was changed in a way that leaves autograd at a loss
            return False

    def snapshot(self, value: torch.Tensor) -> torch.Tensor:
        """Returns a copy that shares the memory until somebody writes."""
        with torch.no_grad():
            return shared_copy(value).requires_grad_(value.requires_grad)

    def listed(self, id: int, stored: StoredObject) -> m.ListedItem:
        """Returns what it looks like, with its tags."""
        return m.ListedItem(id, self.name, spec_of(stored.value), list(stored.tags), stored.description)

    def found(self, id: int, stored: StoredObject, *, private: bool, snapshot: bool) -> m.FoundItem:
        """Returns what it looks like, with its tags."""
        spec = spec_of(stored.value)
        return m.FoundItem(id, spec, list(stored.tags), stored.description, private, snapshot)

    def fetch(
        self, session: Session, id: int, stored: StoredObject, label: Label, memory: MemoryLabels
    ) -> Steps:
        """Returns the value and its gradient; each has a label of its own."""
        yield from ()  # asks nobody
        value: torch.Tensor = stored.value
        tensors = [value.detach()]
        grad = grad_of(value)
        if grad is not None:
            of_gradient = memory.of_gradient(grad)
            if not session.may_read(of_gradient):
                raise GetNotPermitted(
                    f"the gradient of object {id} was computed from private data: {users_of(of_gradient)} may "
                    "get it; set .grad = None to fetch the value alone"
                )
            tensors.append(grad.detach())
            label = join(label, of_gradient)
        return m.Fetched(
            value.requires_grad, grad is not None, list(stored.tags), stored.description, allowed_list(label)
        ), tensors

    def label_with_gradient(self, value: torch.Tensor, label: Label, memory: MemoryLabels) -> Label:
        """Returns who may read both the value and its gradient."""
        grad = grad_of(value)
        return label if grad is None else join(label, memory.of_gradient(grad))

    def move(self, stored: StoredObject, body: m.Move, label: Label) -> Steps:
        """Sends the value with its gradient, or as a copy without."""
        value: torch.Tensor = stored.value
        if body.copy:
            item = m.PutItem(body.target, value.requires_grad, allowed=allowed_list(label))
            tensors = [value.detach()]
        else:
            grad = grad_of(value)
            item = m.PutItem(
                body.target, value.requires_grad, grad is not None, list(stored.tags), stored.description,
                allowed_list(label),
            )  # fmt: skip
            tensors = [value.detach(), *([] if grad is None else [grad.detach()])]
        if body.copy or body.keep:  # ops that come after this one may change it while it waits to be sent
            if stored.account is not None:
                stored.account.check(beside=sum(one.numel() * one.element_size() for one in tensors))
            tensors = [one.clone() for one in tensors]
            if stored.account is not None:  # they are there until they have been sent
                stored.account.take(tensors)
        yield from ask(body.peer, m.Put([item], body.token), tensors)
        return m.Done(), ()


def shared_copy(tensor: torch.Tensor) -> torch.Tensor:
    """Returns a copy that shares the memory of `tensor` until either is written to, where torch can do that.

    It cannot where the memory is not of its own allocator: large messages arrive in blocks that are used again.
    """
    try:
        return torch._lazy_clone(tensor)
    except RuntimeError:
        return tensor.detach().clone()


def spec_of(tensor: torch.Tensor) -> m.ObjectSpec:
    """Returns what may be known of `tensor` without its values: sizes, strides, dtype and autograd flags."""
    return m.ObjectSpec(
        list(tensor.shape),
        list(tensor.stride()),
        DTYPE_NAMES[tensor.dtype],
        tensor.requires_grad,
        tensor.is_leaf,
    )


def grad_of(value: torch.Tensor) -> torch.Tensor | None:
    """Returns the gradient, where a tensor can have one: torch warns about the question elsewhere."""
    return value.grad if value.is_leaf or value.retains_grad else None


def tensor_of(stored: StoredObject) -> torch.Tensor:
    """Returns the value, if it is a tensor.

    Raises:
        LocalError: it is none.
    """
    if not isinstance(stored.value, torch.Tensor):
        raise LocalError("not a tensor")
    return stored.value

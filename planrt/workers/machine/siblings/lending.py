"""Objects as they go from one process of a worker to another one of the same worker. No I/O.

Everything that the worker keeps of an object goes along: who may read it and its gradient, the tags that it came with,
the failure that is not to be told. What cannot go is refused by name: autograd's graphs, memory that another object
shows too, and pointers, which belong to a session of theirs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, Final, Literal

import torch

from planrt.errors import LocalError
from planrt.workers.machine.kinds.base import StoredObject
from planrt.workers.machine.kinds.plan import PlanObject, new_plan_object, record_of
from planrt.workers.machine.kinds.protocol import ProtocolObject, new_protocol_object
from planrt.workers.machine.kinds.tensor import grad_of
from planrt.workers.machine.labels import Label
from planrt.workers.machine.sessions import allowed_list
from planrt.workers.machine.store import ObjectStore
from planrt.workers.wire import messages as m

OFF: Final = (
    "this worker runs each user's work in a process of its own; start it with --isolation off for that"
)


def check_goes(store: ObjectStore, id: int) -> None:
    """Raises LocalError unless the object `id` can go to another process as it is."""
    stored = store.objects[id]
    value = stored.value
    if value is None or isinstance(value, ProtocolObject) or not _has_form(value):
        kind = store.kinds.of(value).name
        raise LocalError(f"object {id} (kind: {kind}) cannot be handed to another user or worker here: {OFF}")
    tensors = store.tensors_of(stored)
    if any(not one.is_leaf for one in tensors):
        raise LocalError(
            f"object {id} has a history that gradients go back through, and cannot be handed to another user or worker "
            f"here: detach() it, or get() it and send the value; {OFF}"
        )
    memory = {one.untyped_storage()._cdata for one in tensors}
    for other, held in store.of(stored.owner):
        if other == id:
            continue
        if any(one.untyped_storage()._cdata in memory for one in store.tensors_of(held)):
            raise LocalError(
                f"object {id} shares its memory with object {other}, and cannot be handed to another user or worker "
                f"here: clone() it first; {OFF}"
            )


def _has_form(value: Any) -> bool:
    return isinstance(value, torch.Tensor | PlanObject | ProtocolObject)


def snapshot(store: ObjectStore, id: int) -> tuple[m.LentItem, list[torch.Tensor]] | None:
    """Returns a published object as who finds it gets it; None for one that is not found."""
    stored = store.objects[id]
    kind = store.kinds.of(stored.value)
    if not _has_form(stored.value) or not kind.can_be_found(stored.value):
        return None
    own = kind.snapshot(stored.value)
    copy = StoredObject(
        own, "", store.label_of(stored), tags=stored.tags, description=stored.description,
        source=store.source_of(stored),
    )  # fmt: skip
    return _packed(id, copy, None)


def whole(store: ObjectStore, id: int) -> tuple[m.LentItem, list[torch.Tensor]]:
    """Returns an object itself, with its gradient, after `check_goes`."""
    stored = store.objects[id]
    grad = grad_of(stored.value) if isinstance(stored.value, torch.Tensor) else None
    of_gradient = None if grad is None else store.memory.of_gradient(grad)
    copy = StoredObject(
        stored.value, "", store.label_of(stored), None, stored.hidden_failure, stored.tags, stored.description,
        source=store.source_of(stored), original=stored.original,
    )  # fmt: skip
    return _packed(id, copy, of_gradient)


def _packed(id: int, stored: StoredObject, of_gradient: Label) -> tuple[m.LentItem, list[torch.Tensor]]:
    value, places = stored.value, {}
    name: Literal["tensor", "plan", "protocol"]
    requires_grad = training = False
    if isinstance(value, torch.Tensor):
        name, requires_grad = "tensor", value.requires_grad
        grad = grad_of(value)
        tensors = [value.detach(), *([] if grad is None else [grad.detach()])]
    elif isinstance(value, PlanObject):
        name, tensors, training = "plan", value.parts(), value.training
    else:
        name, places = "protocol", dict(value.places)
        tensors = [value.chain_bytes(), *(one.detach() for one in value.state)]
    source = None if stored.source is None else sorted(stored.source)
    item = m.LentItem(
        id, name, len(tensors), allowed_list(stored.label), allowed_list(of_gradient), requires_grad, training,
        list(stored.tags), stored.description, source, stored.original, stored.hidden_failure, places,
    )  # fmt: skip
    return item, tensors


def unpacked(
    items: Iterable[m.LentItem], tensors: Sequence[torch.Tensor], device: torch.device
) -> Iterator[tuple[m.LentItem, StoredObject, Label]]:
    """Returns what arrived, as objects that belong to nobody yet, with the label of the gradient of each.

    Raises:
        LocalError, PlanFormatError, PlanArgumentError: it is none.
    """
    rest = iter(tensors)
    for item in items:
        own = [one.to(device) for one in islice(rest, item.count)]
        if len(own) != item.count or not own:
            raise LocalError("objects came without their tensors")
        value: Any
        if item.kind == "tensor":
            value = own[0].clone().requires_grad_(item.requires_grad)
            if len(own) > 1:
                value.grad = own[1].clone()
        elif item.kind == "plan":
            record = record_of(own[0])
            value = new_plan_object(
                record, own[1:], training=item.training, device=device, bare=bool(record.state) and len(own) == 1
            )  # fmt: skip
        else:
            value = new_protocol_object(own, device)
            value.places = dict(item.places)
        label = None if item.allowed is None else frozenset(item.allowed)
        of_gradient = None if item.gradient_allowed is None else frozenset(item.gradient_allowed)
        stored = StoredObject(
            value, "", label, None, item.hidden, tuple(item.tags), item.description,
            source=None if item.source is None else frozenset(item.source), original=item.original,
        )  # fmt: skip
        yield item, stored, of_gradient

"""Autograd on pointers: `requires_grad`, `.grad`, `.data`, backward passes.

Graphs and gradients are on the workers; what is known of them here is in the pointers' specs and in the worker's
`gradients`, so that most questions need no answer from there. Apart from `planrt.workers.pointers.dispatch`, whose
table names these handlers: each has the signature of the torch function or attribute that it stands for.
"""

from __future__ import annotations

from typing import Any

import torch

from planrt.errors import RemoteOpError
from planrt.plans.running.inference import spec
from planrt.types import Ref
from planrt.workers.pointers.handle import Handle, alive
from planrt.workers.pointers.ops import apply, calling_line, packed, refuse_mixed, set_spec
from planrt.workers.pointers.tensor import PointerTensor, make_pointer
from planrt.workers.wire.objects import new_id
from planrt.workers.wire.posted import PostedOp

_Tensor = torch.Tensor


class RemoteGradFn:
    """Stands for the autograd node of a remote tensor, which is on its worker."""

    def __repr__(self) -> str:
        return "<grad_fn on the worker>"

    def name(self) -> str:
        """As autograd nodes have one."""
        return "RemoteGradFn"


_GRAD_FN = RemoteGradFn()


def get_requires_grad(pointer: PointerTensor) -> bool:
    """`pointer.requires_grad`, as its spec has it."""
    return pointer._spec.requires_grad


def set_requires_grad(pointer: PointerTensor, value: bool) -> None:
    """`pointer.requires_grad = value`: the op `requires_grad_`."""
    apply("Tensor.requires_grad_", _Tensor.requires_grad_, (pointer, bool(value)), {})


def get_grad_fn(pointer: PointerTensor) -> RemoteGradFn | None:
    """`pointer.grad_fn`: None for a leaf, else what stands for the node."""
    return None if pointer._spec.leaf else _GRAD_FN


def get_grad(pointer: PointerTensor) -> PointerTensor | None:
    """`pointer.grad`: the same pointer at every read, until there may be another gradient."""
    handle = alive(pointer)
    like = handle.place.gradients.spec_of(pointer)
    if like is None:
        return None
    known = pointer.__dict__.get("_grad_pointer")
    epoch = handle.place.gradients.epoch
    if known is not None and known[0] == epoch and known[1]._handle.alive:
        return known[1]  # type: ignore[no-any-return]
    grad = make_pointer(Handle(handle.worker, new_id(), handle.via), like)
    grad._is_grad = True  # type: ignore[attr-defined]
    op = PostedOp(
        "Tensor.grad", (Ref(handle.id),), {}, Ref(grad._handle.id), torch.is_grad_enabled(), None,
        handle.place.take_drops(),
    )  # fmt: skip
    handle.place.post_op(packed(op, handle), calling_line())
    pointer.__dict__["_grad_pointer"] = (epoch, grad)
    return grad


def set_grad(pointer: PointerTensor, grad: Any) -> None:
    """`pointer.grad = grad`, a gradient on the same worker or None."""
    handle = alive(pointer)
    gradients = handle.place.gradients
    if grad is None and gradients.spec_of(pointer) is None:
        return
    if grad is not None and not isinstance(grad, PointerTensor):
        refuse_mixed("Tensor.grad", (pointer, grad), {})
    _assign("Tensor.grad.__set__", pointer, grad)
    pointer.__dict__.pop("_grad_pointer", None)
    gradients.set(handle.id, None if grad is None else grad._spec)


def delete_grad(pointer: PointerTensor) -> None:
    """`del pointer.grad`."""
    set_grad(pointer, None)


def set_data(pointer: PointerTensor, data: Any) -> None:
    """`pointer.data = data`, a tensor on the same worker; `requires_grad` stays as it is."""
    if not isinstance(data, PointerTensor):
        refuse_mixed("Tensor.data", (pointer, data), {})
    _assign("Tensor.data.__set__", pointer, data)
    old, new = pointer._spec, data._spec
    set_spec(pointer, spec(new.shape, new.stride, new.dtype, old.requires_grad, old.leaf))


def set_memory(pointer: PointerTensor, source: Any = None, *args: Any, **kwargs: Any) -> PointerTensor:
    """`Tensor.set_` from another remote tensor."""
    if args or kwargs or not isinstance(source, PointerTensor):
        if isinstance(source, _Tensor) and not isinstance(source, PointerTensor) and not args and not kwargs:
            refuse_mixed("Tensor.set_", (pointer, source), {})
        raise RemoteOpError("Tensor.set_ takes a remote tensor: its other forms reach raw memory")
    if torch.is_grad_enabled() and pointer._spec.requires_grad and pointer._spec.leaf:
        raise RuntimeError("a leaf Variable that requires grad is being used in an in-place operation.")
    _assign("Tensor.set_", pointer, source)
    alive(pointer).place.gradients.histories.rewrite()
    old, new = pointer._spec, source._spec
    set_spec(pointer, spec(new.shape, new.stride, new.dtype, old.requires_grad, old.leaf))
    return pointer


def _assign(name: str, pointer: PointerTensor, value: PointerTensor | None) -> None:
    """Posts an op that changes `pointer` and gives nothing."""
    handle = alive(pointer)
    if value is not None and (alive(value).worker is not handle.worker or value._handle.via != handle.via):
        refuse_mixed(name, (pointer, value), {})
    args = (Ref(handle.id), None if value is None else Ref(value._handle.id))
    op = PostedOp(name, args, {}, None, torch.is_grad_enabled(), None, handle.place.take_drops())
    handle.place.post_op(packed(op, handle), calling_line())


def retain_grad(pointer: PointerTensor) -> None:
    """`pointer.retain_grad()`."""
    handle = alive(pointer)
    if not pointer._spec.requires_grad:
        raise RuntimeError("can't retain_grad on Tensor that has requires_grad=False")
    op = PostedOp("Tensor.retain_grad", (Ref(handle.id),), {}, None, True, None, handle.place.take_drops())
    handle.place.post_op(packed(op, handle), calling_line())
    handle.place.gradients.histories.rewrite()  # passes leave more gradients from here on


def backward(
    pointer: PointerTensor,
    gradient: Any = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    inputs: Any = None,
) -> PointerTensor:
    """`pointer.backward()`; see `backward_all`. Returns the pointer, as PySyft 0.2 gave one."""
    backward_all((pointer,), (gradient,), retain_graph, create_graph, inputs=inputs)
    return pointer


def backward_all(
    tensors: Any,
    grad_tensors: Any = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    grad_variables: Any = None,
    inputs: Any = None,
) -> None:
    """`torch.autograd.backward`: one message. Its answer, which objects have gradients, is awaited when needed."""
    roots = (tensors,) if isinstance(tensors, _Tensor) else tuple(tensors)
    given = grad_tensors if grad_tensors is not None else grad_variables
    given = (given,) if given is None or isinstance(given, _Tensor) else tuple(given)
    given = given * len(roots) if given == (None,) else given
    only = None if inputs is None else (inputs,) if isinstance(inputs, _Tensor) else tuple(inputs)
    involved = [*roots, *(one for one in given if one is not None), *(only or ())]
    first = alive(next(one for one in involved if isinstance(one, PointerTensor)))
    for one in involved:
        here = not isinstance(one, PointerTensor)
        if here or alive(one).worker is not first.worker or one._handle.via != first.via:
            refuse_mixed("Tensor.backward", tuple(involved), {})
    for root, one in zip(roots, given, strict=True):
        if not root._spec.requires_grad:
            raise RuntimeError("element 0 of tensors does not require grad and does not have a grad_fn")
        if one is None and torch.Size(root._spec.shape).numel() != 1:
            raise RuntimeError("grad can be implicitly created only for scalar outputs")
    simple = only is None and not create_graph and not first.via and first.place.halts
    first.place.backward(
        [root._handle.id for root in roots],
        [None if one is None else one._handle.id for one in given],
        create_graph if retain_graph is None else retain_graph,
        create_graph,
        None if only is None else [one._handle.id for one in only],
        first.place.gradients.foresee(roots) if simple else None,
    )


def autograd_grad(
    outputs: Any,
    inputs: Any,
    grad_outputs: Any = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    only_inputs: bool = True,
    allow_unused: bool | None = None,
    is_grads_batched: bool = False,
    materialize_grads: bool = False,
) -> Any:
    """`torch.autograd.grad`: one op. With ``allow_unused`` the worker is asked which gradients there are."""
    wanted = (inputs,) if isinstance(inputs, _Tensor) else tuple(inputs)
    sources = (outputs,) if isinstance(outputs, _Tensor) else tuple(outputs)
    given = (grad_outputs,) if isinstance(grad_outputs, _Tensor) else grad_outputs
    involved = [*sources, *wanted, *(one for one in (given or ()) if one is not None)]
    handles = [alive(one) if isinstance(one, PointerTensor) else None for one in involved]
    first = handles[0]
    if first is None or any(h is None or h.worker is not first.worker or h.via != first.via for h in handles):
        refuse_mixed("torch.autograd.grad", tuple(involved), {})

    def refs(values: Any) -> Any:
        return (
            None if values is None else tuple([one if one is None else Ref(one._handle.id) for one in values])
        )

    kwargs = {
        "retain_graph": retain_graph, "create_graph": create_graph, "allow_unused": allow_unused,
        "is_grads_batched": is_grads_batched, "materialize_grads": materialize_grads,
    }  # fmt: skip
    args = (refs(sources), refs(wanted), refs(given))
    place = first.place
    if allow_unused or is_grads_batched:
        op = PostedOp("autograd.grad", args, kwargs, None, True, None, place.take_drops())
        return place.call(packed(op, first), via=first.via)
    made = []
    for one in wanted:
        s = one._spec
        like = spec(s.shape, s.stride, s.dtype, create_graph, not create_graph)
        made.append(make_pointer(Handle(first.worker, new_id(), first.via), like))
    results = tuple([Ref(one._handle.id) for one in made])
    op = PostedOp("autograd.grad", args, kwargs, results, True, None, place.take_drops())
    place.post_op(packed(op, first), calling_line())
    return tuple(made)

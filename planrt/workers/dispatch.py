"""What happens to a torch call that has a pointer among its arguments.

`dispatch` is ``PointerTensor.__torch_function__``. A call on the op table is posted to the operands' worker and
gives pointers with what `planrt.plans.inference` foresees; where nothing can be foreseen (sizes that follow
values) the worker is asked. Reads of shape, dtype and the like are answered here; reads of values are refused.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch.overrides import resolve_name

from planrt.errors import (
    MixedLocationsError,
    OptionError,
    PlanFormatError,
    RemoteOpError,
    RemoteValueError,
    UnsupportedTensorError,
)
from planrt.plans import ops, seen
from planrt.plans.inference import Inferred, Same, Spec, infer, rebuild, spec
from planrt.plans.left_out import reason_for
from planrt.plans.source import is_users
from planrt.serde.values import DEVICE
from planrt.types import Ref, leaves, map_leaves
from planrt.workers.pointers import (
    Handle,
    Line,
    PointerTensor,
    alive,
    describe,
    make_pointer,
    new_id,
)
from planrt.workers.posted import PostedOp

if TYPE_CHECKING:
    from planrt.workers.clients import BaseWorker

_Tensor = torch.Tensor


def dispatch(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Does `func` on pointers.

    Raises:
        MixedLocationsError: operands in different places. RemoteValueError: `func` reads values.
        RemoteOpError: `func` cannot run remotely. GonePointerError, WorkerLostError. What torch raises for
        shapes and dtypes that do not fit.
    """
    special = _SPECIAL.get(func) if _hashable(func) else None
    if special is not None:
        return special(*args, **kwargs)
    if func in _METADATA:
        return _metadata(func, args, kwargs)
    name = ops.name_of(func)
    if name is None:
        _refuse(func)
    return apply(name, func, args, kwargs)


def _hashable(func: Any) -> bool:
    try:
        hash(func)
    except TypeError:
        return False
    return True


def apply(name: str, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Posts the op `name` to the worker of its operands; gives what `function` would, in pointers."""
    if kwargs.get("out") is not None:
        return _into(name, function, args, dict(kwargs))
    if name == "Tensor.to":
        args = _on_one_device(args)
    operands: list[PointerTensor] = []
    first: Handle | None = None

    def referred(leaf: Any) -> Any:
        nonlocal first
        if isinstance(leaf, PointerTensor):
            handle = alive(leaf)
            if first is None:
                first = handle
            elif handle.worker is not first.worker or handle.via != first.via:
                _mixed(name, args, kwargs)
            operands.append(leaf)
            return Ref(handle.id)
        if isinstance(leaf, _Tensor):
            _mixed(name, args, kwargs)
        if isinstance(leaf, torch.device):
            return DEVICE
        return seen.without_numpy(leaf)

    wire_args, wire_kwargs = map_leaves(args, referred), map_leaves(kwargs, referred) if kwargs else {}
    if first is None:
        raise RemoteOpError(f"{name}: no pointer among the arguments")
    seed = first.worker.draw_seed() if name in ops.RANDOM else None
    line = calling_line()
    inferred = infer(name, ops.BOUNDED.get(name, function), args, kwargs, PointerTensor)
    return post(name, wire_args, wire_kwargs, first, inferred, operands, seed, line)


def post(
    name: str,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    place: Handle,
    inferred: Inferred | None,
    operands: list[PointerTensor],
    seed: int | None,
    line: Line | None,
) -> Any:
    """Posts an op with wire arguments to the worker of `place`; gives pointers to what was inferred, at once. Where
    nothing was, it waits for the worker to tell.
    """
    worker, via = place.worker, place.via
    if inferred is None:
        op = PostedOp(name, args, kwargs, None, torch.is_grad_enabled(), seed, worker.take_drops())
        return worker.call(_packed(name, op, worker), via=via)
    handles: list[Handle] = []

    def named(leaf: Any) -> Any:
        if type(leaf) is not Spec:
            return None
        handle = Handle(worker, new_id(), via)
        handles.append(handle)
        return Ref(handle.id)

    results = _wire_results(inferred.results, named)
    op = PostedOp(name, args, kwargs, results, torch.is_grad_enabled(), seed, worker.take_drops())
    worker.post_op(_packed(name, op, worker), line)
    for number, after in inferred.changed:
        set_spec(operands[number], after)
    return _made(inferred, operands, handles)


def _into(name: str, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``out=``: the op, and its result copied there."""
    out = kwargs.pop("out")
    result = apply(name, function, args, kwargs)
    if (
        not isinstance(out, PointerTensor)
        or not isinstance(result, PointerTensor)
        or out.shape != result.shape
    ):
        raise RemoteOpError(
            f"{name}: out= takes one pointer, of the result's shape: assign the result instead"
        )
    if not torch.can_cast(result.dtype, out.dtype):
        raise RuntimeError(
            f"{name}: a result of dtype {result.dtype} can't be cast to that of out=, {out.dtype}"
        )
    with torch.no_grad():
        return apply("Tensor.copy_", _Tensor.copy_, (out, result), {})


def _packed(name: str, op: PostedOp, worker: BaseWorker) -> bytes:
    try:
        return op.pack()
    except PlanFormatError as error:
        for id in op.drop:  # it was to take these along
            worker.forget(id)
        raise RemoteOpError(f"{name}: {error}") from None


def _wire_results(results: Any, named: Callable[[Any], Any]) -> Any:
    if type(results) is Spec:
        return named(results)
    if isinstance(results, tuple | list):
        return tuple([_wire_results(part, named) for part in results])
    parts = getattr(results, "parts", None)
    return tuple([_wire_results(part, named) for part in parts]) if parts is not None else None


def _made(inferred: Inferred, operands: list[PointerTensor], handles: list[Handle]) -> Any:
    rest = iter(handles)

    def pointer(leaf: Any) -> Any:
        if type(leaf) is Spec:
            return make_pointer(next(rest), leaf)
        return operands[leaf.operand] if type(leaf) is Same else leaf

    if type(inferred.results) is Spec:
        return make_pointer(handles[0], inferred.results)
    return rebuild(inferred.results, pointer)


def set_spec(pointer: PointerTensor, after: Spec) -> None:
    """Takes down that the tensor behind `pointer` now looks like `after`."""
    pointer._spec = after


def calling_line() -> Line | None:
    """Where in the user's code this op is made."""
    frame = sys._getframe(2)
    while frame is not None and not is_users(frame.f_code.co_filename):
        frame = frame.f_back  # type: ignore[assignment]
    return (frame.f_code, frame.f_lineno) if frame is not None else None


def _on_one_device(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """`x.to("cuda")`, `x.to(0)`: a remote tensor stays on its worker's device."""
    if len(args) > 1 and isinstance(args[1], str | int):
        return (args[0], torch.device("cpu"), *args[2:])
    if len(args) > 1 and isinstance(args[1], _Tensor):
        return (args[0], args[1].dtype, *args[2:])
    return args


def place_of(leaf: Any) -> str:
    """Where a tensor is, for messages."""
    if isinstance(leaf, PointerTensor):
        chain = "".join(f" -> {worker.id}" for worker in leaf._handle.via)
        return f"worker {leaf._handle.worker.id!r}{chain}"
    return "this process"


def _mixed(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> NoReturn:
    places: list[str] = []
    for leaf in leaves((args, kwargs)):
        if isinstance(leaf, _Tensor) and (place := place_of(leaf)) not in places:
            places.append(place)
    for leaf in leaves((args, kwargs)):
        if type(leaf) is _Tensor and (leaf.is_sparse or leaf.is_quantized):
            raise UnsupportedTensorError(f"{name}: sparse and quantised tensors cannot go to a worker")
    where = " and ".join(places) if len(places) > 1 else " and ".join(places * 2)
    advice = (
        "send the local one with .send(worker), or get() the remote one"
        if "this process" in places
        else "move one of them with .move(worker)"
    )
    raise MixedLocationsError(f"{name}: its operands are in {where}; {advice}")


# ------------------------------------------------------------------------------- answered without the worker

_METADATA = seen.METADATA | seen.SHAPE_READS | seen.SIZE_READS | seen.COUNT_READS


def _metadata(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    def twin(leaf: Any) -> Any:
        return _twins(leaf._spec) if isinstance(leaf, PointerTensor) else leaf

    return func(*map_leaves(args, twin), **map_leaves(kwargs, twin))


_twin_cache: dict[Spec, _Tensor] = {}


def _twins(of: Spec) -> _Tensor:
    found = _twin_cache.get(of)
    if found is None:
        if len(_twin_cache) > 5_000:
            _twin_cache.clear()
        found = _twin_cache[of] = of.twin()
    return found


class RemoteGradFn:
    """Stands for the autograd node of a remote tensor, which is on its worker."""

    def __repr__(self) -> str:
        return "<grad_fn on the worker>"

    def name(self) -> str:
        """As autograd nodes have one."""
        return "RemoteGradFn"


_GRAD_FN = RemoteGradFn()

# --------------------------------------------------------------------------------------- refused, with a reason


def _refuse(func: Any) -> NoReturn:
    owner = getattr(getattr(func, "__self__", None), "__name__", "")
    short = getattr(func, "__name__", "")
    if short in ("__get__", "__set__"):
        name = f"Tensor.{owner}"
    else:
        name = (resolve_name(func) or short or repr(func)).removeprefix("torch.")
        name = name if "." in name else f"torch.{name}"
    if seen.reads_values(func):
        raise RemoteValueError(f"{name} reads the value of a tensor that is on a worker: write .get() first")
    reason = reason_for(name)
    raise RemoteOpError(
        f"{name} cannot run on a remote tensor: {reason or 'it is not on the table of ops that workers run'}; get() "
        "the tensor to use it here"
    )


def _value_read(name: str) -> Callable[..., NoReturn]:
    def refuse(*args: Any, **kwargs: Any) -> NoReturn:
        raise RemoteValueError(f"{name} reads the value of a tensor that is on a worker: write .get() first")

    return refuse


# ------------------------------------------------------------------------------------------------- special calls


def _get_requires_grad(pointer: PointerTensor) -> bool:
    return pointer._spec.requires_grad


def _set_requires_grad(pointer: PointerTensor, value: bool) -> None:
    apply("Tensor.requires_grad_", _Tensor.requires_grad_, (pointer, bool(value)), {})


def _get_grad_fn(pointer: PointerTensor) -> RemoteGradFn | None:
    return None if pointer._spec.leaf else _GRAD_FN


def _device(pointer: PointerTensor) -> torch.device:
    """Tensors made to go with a pointer's are made here, or on the worker's own device."""
    return torch.device("cpu")


def _get_grad(pointer: PointerTensor) -> PointerTensor | None:
    handle = alive(pointer)
    like = handle.worker.gradients.spec_of(pointer)
    if like is None:
        return None
    known = pointer.__dict__.get("_grad_pointer")
    epoch = handle.worker.gradients.epoch
    if known is not None and known[0] == epoch and known[1]._handle.alive:
        return known[1]  # type: ignore[no-any-return]
    grad = make_pointer(Handle(handle.worker, new_id(), handle.via), like)
    grad._is_grad = True  # type: ignore[attr-defined]
    op = PostedOp(
        "Tensor.grad", (Ref(handle.id),), {}, Ref(grad._handle.id), torch.is_grad_enabled(), None,
        handle.worker.take_drops(),
    )  # fmt: skip
    handle.worker.post_op(op.pack(), calling_line())
    pointer.__dict__["_grad_pointer"] = (epoch, grad)
    return grad


def _set_grad(pointer: PointerTensor, grad: Any) -> None:
    handle = alive(pointer)
    gradients = handle.worker.gradients
    if grad is None and gradients.spec_of(pointer) is None:
        return
    if grad is not None and not isinstance(grad, PointerTensor):
        _mixed("Tensor.grad", (pointer, grad), {})
    _assign("Tensor.grad.__set__", pointer, grad)
    pointer.__dict__.pop("_grad_pointer", None)
    gradients.set(handle.id, None if grad is None else grad._spec)


def _delete_grad(pointer: PointerTensor) -> None:
    _set_grad(pointer, None)


def _set_data(pointer: PointerTensor, data: Any) -> None:
    if not isinstance(data, PointerTensor):
        _mixed("Tensor.data", (pointer, data), {})
    _assign("Tensor.data.__set__", pointer, data)
    old, new = pointer._spec, data._spec
    set_spec(pointer, spec(new.shape, new.stride, new.dtype, old.requires_grad, old.leaf))


def set_memory(pointer: PointerTensor, source: Any = None, *args: Any, **kwargs: Any) -> PointerTensor:
    """`Tensor.set_` from another remote tensor."""
    if args or kwargs or not isinstance(source, PointerTensor):
        if isinstance(source, _Tensor) and not isinstance(source, PointerTensor) and not args and not kwargs:
            _mixed("Tensor.set_", (pointer, source), {})
        raise RemoteOpError("Tensor.set_ takes a remote tensor: its other forms reach raw memory")
    if torch.is_grad_enabled() and pointer._spec.requires_grad and pointer._spec.leaf:
        raise RuntimeError("a leaf Variable that requires grad is being used in an in-place operation.")
    _assign("Tensor.set_", pointer, source)
    old, new = pointer._spec, source._spec
    set_spec(pointer, spec(new.shape, new.stride, new.dtype, old.requires_grad, old.leaf))
    return pointer


def _assign(name: str, pointer: PointerTensor, value: PointerTensor | None) -> None:
    """Posts an op that changes `pointer` and gives nothing."""
    handle = alive(pointer)
    if value is not None and (alive(value).worker is not handle.worker or value._handle.via != handle.via):
        _mixed(name, (pointer, value), {})
    args = (Ref(handle.id), None if value is None else Ref(value._handle.id))
    op = PostedOp(name, args, {}, None, torch.is_grad_enabled(), None, handle.worker.take_drops())
    handle.worker.post_op(op.pack(), calling_line())


def _retain_grad(pointer: PointerTensor) -> None:
    handle = alive(pointer)
    if not pointer._spec.requires_grad:
        raise RuntimeError("can't retain_grad on Tensor that has requires_grad=False")
    op = PostedOp("Tensor.retain_grad", (Ref(handle.id),), {}, None, True, None, handle.worker.take_drops())
    handle.worker.post_op(op.pack(), calling_line())


def _backward(
    pointer: PointerTensor,
    gradient: Any = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    inputs: Any = None,
) -> None:
    _backward_all((pointer,), (gradient,), retain_graph, create_graph, inputs=inputs)


def _backward_all(
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
            _mixed("Tensor.backward", tuple(involved), {})
    for root, one in zip(roots, given, strict=True):
        if not root._spec.requires_grad:
            raise RuntimeError("element 0 of tensors does not require grad and does not have a grad_fn")
        if one is None and torch.Size(root._spec.shape).numel() != 1:
            raise RuntimeError("grad can be implicitly created only for scalar outputs")
    first.worker.backward(
        [root._handle.id for root in roots],
        [None if one is None else one._handle.id for one in given],
        create_graph if retain_graph is None else retain_graph,
        create_graph,
        None if only is None else [one._handle.id for one in only],
    )


def _autograd_grad(
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
        _mixed("torch.autograd.grad", tuple(involved), {})

    def refs(values: Any) -> Any:
        return (
            None if values is None else tuple([one if one is None else Ref(one._handle.id) for one in values])
        )

    kwargs = {
        "retain_graph": retain_graph, "create_graph": create_graph, "allow_unused": allow_unused,
        "is_grads_batched": is_grads_batched, "materialize_grads": materialize_grads,
    }  # fmt: skip
    args = (refs(sources), refs(wanted), refs(given))
    worker = first.worker
    if allow_unused or is_grads_batched:
        op = PostedOp("autograd.grad", args, kwargs, None, True, None, worker.take_drops())
        return worker.call(op.pack(), via=first.via)
    made = []
    for one in wanted:
        s = one._spec
        like = spec(s.shape, s.stride, s.dtype, create_graph, not create_graph)
        made.append(make_pointer(Handle(worker, new_id(), first.via), like))
    results = tuple([Ref(one._handle.id) for one in made])
    op = PostedOp("autograd.grad", args, kwargs, results, True, None, worker.take_drops())
    worker.post_op(op.pack(), calling_line())
    return tuple(made)


def _to_here(pointer: PointerTensor, *args: Any, **kwargs: Any) -> PointerTensor:
    """`cpu()`, `cuda()`: a remote tensor stays on its worker's device."""
    return pointer


def _type(pointer: PointerTensor, dtype: Any = None, non_blocking: bool = False, **kwargs: Any) -> Any:
    if dtype is None:
        return _twins(pointer._spec).to("meta").type().replace("torch.meta.", "torch.")
    if not isinstance(dtype, torch.dtype):
        raise OptionError(f"pointer.type() takes a torch.dtype, not {dtype!r}")
    return apply("Tensor.to", _Tensor.to, (pointer, dtype), {})


def _iterate(pointer: PointerTensor) -> Any:
    if not pointer._spec.shape:
        raise RemoteValueError("iteration over a 0-d tensor")
    return iter(apply("Tensor.unbind", _Tensor.unbind, (pointer, 0), {}))


def _reversed(pointer: PointerTensor) -> Any:
    return apply("Tensor.flip", _Tensor.flip, (pointer, 0), {}) if pointer._spec.shape else pointer


def _format(pointer: PointerTensor, spec: str = "") -> str:
    try:
        return format(describe(pointer), spec)
    except ValueError:  # a spec for numbers
        raise RemoteValueError(
            f"the format {spec!r} reads the value of a tensor that is on a worker: write .get() first"
        ) from None


def _assert(condition: Any, message: Any = "") -> None:
    """`torch._assert`, in modules of torchvision: it would read a value, and the worker's op checks its input."""


def _getter(name: str) -> Any:
    return getattr(_Tensor, name).__get__


def _setter(name: str) -> Any:
    return getattr(_Tensor, name).__set__


def _deleter(name: str) -> Any:
    return getattr(_Tensor, name).__delete__


_SPECIAL: dict[Any, Callable[..., Any]] = {
    _getter("requires_grad"): _get_requires_grad,
    _setter("requires_grad"): _set_requires_grad,
    _getter("is_leaf"): lambda pointer: pointer._spec.leaf,
    _getter("grad_fn"): _get_grad_fn,
    _getter("device"): _device,
    _getter("is_cpu"): lambda pointer: True,
    _getter("is_meta"): lambda pointer: False,
    _Tensor.get_device: lambda pointer: -1,
    torch.get_device: lambda pointer: -1,
    _getter("grad"): _get_grad,
    _setter("grad"): _set_grad,
    _deleter("grad"): _delete_grad,
    _getter("_grad"): _get_grad,
    _setter("_grad"): _set_grad,
    _setter("data"): _set_data,
    _Tensor.retain_grad: _retain_grad,
    _Tensor.backward: _backward,
    torch.autograd.backward: _backward_all,
    torch.autograd.grad: _autograd_grad,
    _Tensor.cpu: _to_here,
    _Tensor.cuda: _to_here,
    _Tensor.type: _type,
    _Tensor.__iter__: _iterate,
    _Tensor.__reversed__: _reversed,
    _Tensor.__repr__: lambda pointer, **kwargs: describe(pointer),
    _Tensor.__format__: _format,
    torch._assert: _assert,
    **{getattr(_Tensor, name): _value_read(f"Tensor.{name}") for name in (
        "__bool__", "__float__", "__int__", "__index__", "__complex__", "__contains__", "__array__", "item", "tolist",
        "numpy", "equal", "allclose", "is_nonzero", "__dlpack__",
    ) if hasattr(_Tensor, name)},
    torch.equal: _value_read("torch.equal"),
    torch.allclose: _value_read("torch.allclose"),
    torch.is_nonzero: _value_read("torch.is_nonzero"),
}  # fmt: skip

"""What happens to a torch call that has a pointer among its arguments.

`dispatch` is ``PointerTensor.__torch_function__``. A call on the op table is an op for the operands' worker
(`planrt.workers.pointers.ops`). Reads of shape, dtype and the like are answered here; reads of values are refused. The
table at the end names the calls that are something else, those of autograd first of all.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NoReturn

import torch
from torch.overrides import resolve_name

from planrt.errors import OptionError, PlanWarning, RemoteOpError, RemoteValueError
from planrt.plans.ir import ops
from planrt.plans.ir.left_out import reason_for
from planrt.plans.ir.source import frames_to_user
from planrt.plans.recording import foreach, torch_calls, torch_code
from planrt.plans.running.inference import Spec
from planrt.types import map_leaves
from planrt.workers.pointers import autograd as remote_autograd
from planrt.workers.pointers import packed_rows
from planrt.workers.pointers.ops import apply
from planrt.workers.pointers.tensor import PointerTensor, describe

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
    if func in foreach.ON_EACH:
        return [dispatch(one, its, options) for one, its, options in foreach.calls(func, args, kwargs)]
    name = ops.name_of(func)
    if name is None:
        if func is torch_code.CHOOSES_NESTED and torch_code.asker() is not None:
            warnings.warn(torch_code.NOT_NESTED, PlanWarning, stacklevel=frames_to_user() + 1)
            return False
        _refuse(func)
    return apply(name, func, args, kwargs)


def _hashable(func: Any) -> bool:
    try:
        hash(func)
    except TypeError:
        return False
    return True


# ------------------------------------------------------------------------------- answered without the worker

_METADATA = torch_calls.METADATA | torch_calls.SHAPE_READS | torch_calls.SIZE_READS | torch_calls.COUNT_READS


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


# --------------------------------------------------------------------------------------- refused, with a reason


def _refuse(func: Any) -> NoReturn:
    owner = getattr(getattr(func, "__self__", None), "__name__", "")
    short = getattr(func, "__name__", "")
    if short in ("__get__", "__set__"):
        name = f"Tensor.{owner}"
    else:
        name = (resolve_name(func) or short or repr(func)).removeprefix("torch.")
        name = name if "." in name else f"torch.{name}"
    if name.startswith(("torch._foreach", "torch._fused")):
        raise RemoteOpError(
            f"{name.removeprefix('torch.')}, a call on a list of tensors at once, is no op of workers: of an "
            "optimizer, make it with foreach=False and without fused=True"
        )
    if torch_calls.reads_values(func):
        raise RemoteValueError(f"{name} reads the value of a tensor that is on a worker: write .get() first")
    reason = reason_for(name)
    raise RemoteOpError(
        f"{name} cannot run on a remote tensor: {reason or 'it is not on the table of ops that workers run'}; get() "
        "the tensor to use it here"
    )


def _value_read(name: str) -> Callable[..., Any]:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        if torch_code.answer(name.rpartition(".")[2]) is False:
            return False  # torch's own code, which looks for a faster way
        advice = packed_rows.advice() or "write .get() first"
        raise RemoteValueError(f"{name} reads the value of a tensor that is on a worker: {advice}")

    return refuse


# ------------------------------------------------------------------------------------------------- special calls


def _device(pointer: PointerTensor) -> torch.device:
    """Tensors made to go with a pointer's are made here, or on the worker's own device."""
    return torch.device("cpu")


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


_HOOKS_OF_MODULES = os.path.join("torch", "utils", "hooks.py")


def _frames(most: int) -> Iterator[FrameType]:
    """The callers, at most that many."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and most > 0:
        yield frame
        frame, most = frame.f_back, most - 1


def _grad_fn(pointer: PointerTensor) -> Any:
    """Stands for the node, except for torch's code that hangs backward hooks of modules on it."""
    if any(frame.f_code.co_filename.endswith(_HOOKS_OF_MODULES) for frame in _frames(8)):
        raise RemoteOpError(
            "a backward hook of a module (register_full_backward_hook) does not run on a worker: remove it, and "
            "compute with the gradients after backward()"
        )
    return remote_autograd.get_grad_fn(pointer)


def _getter(name: str) -> Any:
    return getattr(_Tensor, name).__get__


def _setter(name: str) -> Any:
    return getattr(_Tensor, name).__set__


def _deleter(name: str) -> Any:
    return getattr(_Tensor, name).__delete__


_SPECIAL: dict[Any, Callable[..., Any]] = {
    _getter("requires_grad"): remote_autograd.get_requires_grad,
    _setter("requires_grad"): remote_autograd.set_requires_grad,
    _getter("is_leaf"): lambda pointer: pointer._spec.leaf,
    _getter("grad_fn"): _grad_fn,
    _getter("device"): _device,
    _getter("is_cpu"): lambda pointer: True,
    _getter("is_meta"): lambda pointer: False,
    _Tensor.get_device: lambda pointer: -1,
    torch.get_device: lambda pointer: -1,
    _getter("grad"): remote_autograd.get_grad,
    _setter("grad"): remote_autograd.set_grad,
    _deleter("grad"): remote_autograd.delete_grad,
    _getter("_grad"): remote_autograd.get_grad,
    _setter("_grad"): remote_autograd.set_grad,
    _setter("data"): remote_autograd.set_data,
    _Tensor.retain_grad: remote_autograd.retain_grad,
    _Tensor.backward: remote_autograd.backward,
    torch.autograd.backward: remote_autograd.backward_all,
    torch.autograd.grad: remote_autograd.autograd_grad,
    _Tensor.cpu: _to_here,
    _Tensor.cuda: _to_here,
    _Tensor.type: _type,
    _Tensor.__iter__: _iterate,
    _Tensor.__reversed__: _reversed,
    _Tensor.__repr__: lambda pointer, **kwargs: describe(pointer),
    _Tensor.__format__: _format,
    torch._assert: _assert,
    torch._has_compatible_shallow_copy_type: lambda tensor, other: True,
    **{getattr(_Tensor, name): _value_read(f"Tensor.{name}") for name in (
        "__bool__", "__float__", "__int__", "__index__", "__complex__", "__contains__", "__array__", "item", "tolist",
        "numpy", "equal", "allclose", "is_nonzero", "__dlpack__",
    ) if hasattr(_Tensor, name)},
    torch.equal: _value_read("torch.equal"),
    torch.allclose: _value_read("torch.allclose"),
    torch.is_nonzero: _value_read("torch.is_nonzero"),
}  # fmt: skip

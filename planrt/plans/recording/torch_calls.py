"""What the tracer does with torch calls that are not ops: metadata passes, sizes are remembered, the rest is
refused with a reason. Fixed sets of torch's own function objects; nothing here runs on a worker.
"""

from __future__ import annotations

from typing import Any

import torch

from planrt.errors import TraceError
from planrt.plans.ir.source import user_line

_Tensor = torch.Tensor


def _getters(*names: str) -> set[Any]:
    found = (getattr(_Tensor, name, None) for name in names)
    return {descriptor.__get__ for descriptor in found if descriptor is not None}


def _accessor(name: str, kind: str) -> Any:
    """What a recorder sees when a property of tensors is read, set or deleted."""
    return getattr(getattr(_Tensor, name), kind)


def _functions(home: Any, *names: str) -> set[Any]:
    return {getattr(home, name) for name in names if hasattr(home, name)}


SHAPE_READS = frozenset(_getters("shape"))
SIZE_READS = frozenset({_Tensor.size})
COUNT_READS = frozenset({_Tensor.numel, _Tensor.nelement, torch.numel})
TO_DEVICE = frozenset({_Tensor.cpu, _Tensor.cuda})
GRAD_FN = _accessor("grad_fn", "__get__")
SETS_DATA = _accessor("data", "__set__")
SETS_GRAD = _accessor("grad", "__set__")
DELETES_GRAD = _accessor("grad", "__delete__")
SETS_REQUIRES_GRAD = _accessor("requires_grad", "__set__")
PASSES = frozenset(
    {torch.ops.profiler._record_function_enter_new, torch.ops.profiler._record_function_exit._RecordFunction}
)
"""Marks for the profiler, which `torch.optim` leaves around its steps."""

METADATA = frozenset(
    _getters(
        "dtype", "device", "layout", "ndim", "is_cuda", "is_cpu", "is_meta", "is_sparse", "is_sparse_csr",
        "is_quantized", "is_nested", "is_leaf", "requires_grad", "is_mkldnn", "is_mps", "is_xla", "is_xpu",
        "is_ipu", "is_maia", "is_mtia", "is_vulkan", "itemsize", "nbytes", "output_nr", "names", "name",
        "_version", "retains_grad",
    )
    | _functions(
        _Tensor, "dim", "ndimension", "is_floating_point", "is_complex", "is_signed", "is_contiguous",
        "is_same_size", "is_conj", "is_neg", "is_inference", "element_size", "get_device", "stride",
        "storage_offset", "__len__", "__repr__", "__format__", "is_pinned", "is_shared", "has_names",
        "_is_view",
    )
    | _functions(
        torch, "is_floating_point", "is_complex", "is_signed", "is_same_size", "is_conj", "is_inference",
        "result_type", "can_cast", "promote_types", "get_device",
    )
)  # fmt: skip
"""Reads of dtype, layout and the like: their answers are constants of the plan. Numbers among them that
follow a free size (`stride`, `nbytes`) differ between the tracer's runs, which catches them."""

_BACKWARD_DEFAULTS: dict[str, Any] = {
    "gradient": None, "grad_tensors": None, "grad_outputs": None, "inputs": None, "retain_graph": None,
    "create_graph": False, "allow_unused": None, "only_inputs": True, "is_grads_batched": False,
    "materialize_grads": False,
}  # fmt: skip
"""Arguments of backward passes that torch passes on though nobody wrote them."""

FROM_ARRAY = frozenset({torch.tensor, torch.as_tensor, torch.asarray})
"""Functions that turn arrays from outside into tensors, which then become state."""

PYTHON_DTYPES: dict[type, torch.dtype] = {
    float: torch.float64,
    int: torch.int64,
    bool: torch.bool,
    complex: torch.complex128,
}

_ACCESSORS = ("__get__", "__set__", "__delete__")
_VALUE_READS = frozenset(
    ["item", "tolist", "numpy", "__bool__", "__nonzero__", "__float__", "__int__", "__long__", "__index__",
     "__complex__", "__array__", "__contains__", "__dlpack__", "equal", "allclose", "is_nonzero", "_assert",
     "data_ptr", "cpu_numpy"]
)  # fmt: skip
_PLAIN_READS = frozenset(
    ["item", "tolist", "__bool__", "__nonzero__", "__float__", "__int__", "__long__", "__index__", "__complex__",
     "__contains__", "equal", "allclose", "is_nonzero"]
)  # fmt: skip
_HOOKS = frozenset(
    ["register_hook", "register_post_accumulate_grad_hook", "_backward_hooks", "_post_accumulate_grad_hooks"]
)
_OTHER_MEMORY = (
    "gives a tensor other memory, and a plan changes its state by writing into it: use .copy_() under "
    "torch.no_grad()"
)
LOST_HOOK = (
    "a backward hook of a module (register_full_backward_hook) cannot be recorded: compute with the gradients after "
    "backward() instead"
)
NO_HOOKS = "a plan would lose the hook: compute with the gradient after backward() instead"


def reads_values(func: Any) -> bool:
    """Returns whether `func` brings a tensor's values into Python."""
    owner = getattr(getattr(func, "__self__", None), "__name__", "")
    name = getattr(func, "__name__", "")
    return (owner if name in _ACCESSORS else name) in _VALUE_READS


def reads_plain_values(func: Any) -> bool:
    """Returns whether `func` reads values as Python's own numbers and lists, which share no memory with the
    tensor."""
    return getattr(func, "__name__", "") in _PLAIN_READS


def why_refused(func: Any, public_name: str | None, asker: tuple[str, str] | None = None) -> str:
    """Explains in one line why a torch call cannot go into a plan. `asker`: what in torch makes the call, and
    what to write instead, as `torch_code.asker` returns them."""
    owner = getattr(getattr(func, "__self__", None), "__name__", "")
    short = owner if getattr(func, "__name__", "") in _ACCESSORS else getattr(func, "__name__", "")
    name = public_name or short or repr(func)
    if asker is not None and short not in _HOOKS:
        if short in _VALUE_READS:
            what = f"reads the value of a tensor ({name})"
        elif name.rpartition(".")[2].startswith("_"):
            what = "does what no plan can"
        else:
            what = f"calls {name}, which is not on the table of ops that plans may use"
        return f"{asker[0]} {what}: {asker[1] or 'use another module or function'}"
    if short in _VALUE_READS:
        return (
            f"{name} reads the value of a tensor: a plan has no values while it is recorded; compute with "
            "tensors (torch.where instead of `if`) or pass the number as an argument"
        )
    if short in _HOOKS:
        return f"{name}: {NO_HOOKS}"
    if func == SETS_DATA:
        return f"assigning to .data {_OTHER_MEMORY}"
    return f"{name} is not on the table of ops that plans may use"


def why_unseen(kernel: str) -> str:
    """Explains in one line why a write cannot go into a plan that torch told nobody of but the kernel."""
    if kernel == "aten::set_":
        return f"Tensor.set_ {_OTHER_MEMORY}"
    return (
        f"{kernel} writes to a tensor behind torch's public functions (as `z.real = x` does), so the plan would "
        "miss it: write it with functions, for instance torch.complex(x, z.imag)"
    )


def why_from_nowhere(tensor: torch.Tensor) -> str:
    """Explains in one line why a tensor of which the recorder saw nothing cannot go into a plan."""
    if isinstance(tensor, torch.nn.Parameter):
        return "a parameter made in the function: make modules and parameters before, and use them in it"
    return (
        "a tensor that no recorded op made: by from_numpy or FloatTensor (use torch.tensor), by a custom "
        "autograd.Function, in an earlier call (functools.lru_cache), or by a library that works behind torch's"
    )


def why_lost(tensor: torch.Tensor) -> str | None:
    """Explains in one line what was lost of a tensor that came through a backward hook of a module; None for
    any other."""
    return LOST_HOOK if "BackwardHookFunction" in type(tensor.grad_fn).__name__ else None


class RecordedNode:
    """Stands for `grad_fn` while recording: it is there, and has a name. Its hooks and its neighbours would
    be used behind the recorder's back."""

    def __init__(self, node: Any) -> None:
        self._node = node

    def name(self) -> str:
        """Returns the name of the real node."""
        return str(self._node.name())

    def __getattr__(self, name: str) -> Any:
        raise TraceError(f"grad_fn.{name} cannot be recorded; {NO_HOOKS}", line=user_line())

    def __repr__(self) -> str:
        return f"<{self.name()}>"


def without_numpy(leaf: Any) -> Any:
    """Converts a numpy scalar to a Python number; anything else is returned as it is."""
    if type(leaf).__module__ == "numpy" and getattr(leaf, "shape", None) == () and hasattr(leaf, "item"):
        return leaf.item()
    return leaf


def hooked(tensor: torch.Tensor) -> bool:
    """Returns whether somebody gets to see, or changes, the gradient of `tensor`."""
    return bool(tensor._backward_hooks or getattr(tensor, "_post_accumulate_grad_hooks", None))


def backward_hooks(module: torch.nn.Module) -> str | None:
    """Returns the name of the method that registered the backward hooks of `module`; None where it has
    none."""
    if module._backward_hooks:
        return "register_full_backward_hook"
    return "register_full_backward_pre_hook" if module._backward_pre_hooks else None


def is_backward_default(key: str, value: Any) -> bool:
    """Returns whether a backward pass is the same without this argument."""
    return key in _BACKWARD_DEFAULTS and value is _BACKWARD_DEFAULTS[key]


def share_all_memory(tensor: torch.Tensor, other: Any) -> bool:
    """Returns whether `other` is all of the memory of `tensor`, laid out alike."""
    return isinstance(other, torch.Tensor) and (
        (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        == (other.data_ptr(), other.shape, other.stride(), other.dtype)
    )


def holds_array(args: tuple[Any, ...]) -> bool:
    """Returns whether the data argument of a factory is a numpy array (or anything else torch reads like
    one)."""
    return bool(args) and not isinstance(args[0], torch.Tensor) and hasattr(args[0], "__array_interface__")

"""From ATen operators, as traced graphs have them, to ops of the table: names and argument forms differ."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from planrt.errors import TraceError
from planrt.plans.ir.ops import TABLE
from planrt.serde.values import DEVICE

AtenCall = tuple[str, tuple[Any, ...], dict[str, Any]]
"""Name in the table, arguments, keyword arguments."""

# Numbers that stand for enumerations in graphs (c10::ScalarType, c10::MemoryFormat).
_DTYPES = {
    0: torch.uint8, 1: torch.int8, 2: torch.int16, 3: torch.int32, 4: torch.int64, 5: torch.float16,
    6: torch.float32, 7: torch.float64, 9: torch.complex64, 10: torch.complex128, 11: torch.bool,
    15: torch.bfloat16,
}  # fmt: skip
_MEMORY_FORMATS = {
    0: torch.contiguous_format,
    1: torch.preserve_format,
    2: torch.channels_last,
    3: torch.channels_last_3d,
}

_SIZE_ARITHMETIC = {
    "add": "operator.add",
    "sub": "operator.sub",
    "mul": "operator.mul",
    "floor_divide": "operator.floordiv",
    "floordiv": "operator.floordiv",
    "remainder": "operator.mod",
    "neg": "operator.neg",
    "div": "operator.truediv",
}

# ATen operators that the table knows as layers, with the same arguments in the same order.
_LAYERS = {
    "adaptive_avg_pool2d": "adaptive_avg_pool2d",
    "adaptive_avg_pool3d": "adaptive_avg_pool3d",
    "avg_pool2d": "avg_pool2d",
    "avg_pool3d": "avg_pool3d",
    "col2im": "fold",
    "gelu": "gelu",
    "glu": "glu",
    "hardsigmoid": "hardsigmoid",
    "hardswish": "hardswish",
    "hardtanh": "hardtanh",
    "hardtanh_": "hardtanh_",
    "im2col": "unfold",
    "leaky_relu": "leaky_relu",
    "leaky_relu_": "leaky_relu_",
    "linear": "linear",
    "log_sigmoid": "logsigmoid",
    "mish": "mish",
    "one_hot": "one_hot",
    "pad": "pad",
    "relu6": "relu6",
    "scaled_dot_product_attention": "scaled_dot_product_attention",
    "silu": "silu",
    "softplus": "softplus",
    "softshrink": "softshrink",
}
_IN_PLACE_LAYERS = {
    "silu_": "silu",
    "mish_": "mish",
    "hardswish_": "hardswish",
    "hardsigmoid_": "hardsigmoid",
}
_LOSSES = {
    "binary_cross_entropy": "binary_cross_entropy",
    "binary_cross_entropy_with_logits": "binary_cross_entropy_with_logits",
    "cross_entropy_loss": "cross_entropy",
    "huber_loss": "huber_loss",
    "l1_loss": "l1_loss",
    "mse_loss": "mse_loss",
    "nll_loss": "nll_loss",
    "nll_loss_nd": "nll_loss",
    "nll_loss2d": "nll_loss",
    "smooth_l1_loss": "smooth_l1_loss",
}
_REDUCTIONS = {0: "none", 1: "mean", 2: "sum"}
_UPSAMPLE = {
    "upsample_nearest": "nearest",
    "_upsample_nearest_exact": "nearest-exact",
    "upsample_linear": "linear",
    "upsample_bilinear": "bilinear",
    "upsample_bicubic": "bicubic",
    "upsample_trilinear": "trilinear",
}


def call_for(operator: str, arguments: Sequence[tuple[Any, Any]], *, on_sizes: bool) -> AtenCall:
    """Returns the call in the table that does what ATen's `operator` does.

    Args:
        operator: its name without ``aten::`` and overload.
        arguments: (schema argument, value) in schema order.
        on_sizes: whether its operands are sizes rather than tensors.

    Raises:
        TraceError: the table has nothing like it.
    """
    values = {argument.name: value for argument, value in arguments}
    if on_sizes and operator in _SIZE_ARITHMETIC:
        return _size_arithmetic(operator, [value for _, value in arguments], values)
    adapter = _ADAPTERS.get(operator)
    if adapter is not None:
        return adapter(values)
    if operator in _LOSSES:
        return _loss(operator, values)
    for prefix, mode in _UPSAMPLE.items():
        if operator.startswith(prefix) and operator.removeprefix(prefix) in ("1d", "2d", "3d"):
            return _interpolate(values, mode)
    if operator in _IN_PLACE_LAYERS:
        return f"nn.functional.{_IN_PLACE_LAYERS[operator]}", (values["self"],), {"inplace": True}
    return _by_schema(_table_name(operator), arguments)


def _table_name(operator: str) -> str:
    candidates = [f"torch.{operator}", f"Tensor.{operator}"]
    if operator in _LAYERS:
        candidates = [f"nn.functional.{_LAYERS[operator]}"]
    elif operator.endswith("_"):
        candidates.reverse()
    for home in ("linalg", "fft", "special"):
        if operator.startswith(f"{home}_"):
            candidates.append(f"{home}.{operator.removeprefix(f'{home}_')}")
    for candidate in candidates:
        if candidate in TABLE:
            return candidate
    raise TraceError(
        f"aten::{operator} in a traced module is not on the table of ops that plans may use: pass the "
        "nn.Module itself"
    )


def _by_schema(name: str, arguments: Sequence[tuple[Any, Any]]) -> AtenCall:
    """Arguments as the schema orders them; defaults at the end are left out."""
    positional: list[Any] = []
    defaults = 0
    kwargs: dict[str, Any] = {}
    for argument, value in arguments:
        converted = _converted(argument.name, value)
        is_default = argument.has_default_value() and _same(argument.default_value, value)
        if not argument.kwarg_only:
            positional.append(converted)
            defaults = defaults + 1 if is_default else 0
        elif (
            not is_default and value is not None and argument.name not in ("implicit", "pin_memory", "layout")
        ):
            kwargs[argument.name] = converted
    return name, tuple(positional[: len(positional) - defaults]), kwargs


def _same(default: Any, value: Any) -> bool:
    return type(default) is type(value) and bool(default == value)


def _converted(name: str, value: Any) -> Any:
    if name == "dtype" and type(value) is int:
        return _dtype(value)
    if name == "memory_format" and type(value) is int:
        return _MEMORY_FORMATS[value]
    return DEVICE if isinstance(value, torch.device) else value


def _dtype(number: int) -> torch.dtype:
    if number not in _DTYPES:
        raise TraceError(f"the traced module uses a dtype that plans do not know (number {number})")
    return _DTYPES[number]


def _size_arithmetic(operator: str, operands: list[Any], values: dict[str, Any]) -> AtenCall:
    rounding = values.get("rounding_mode")
    if rounding is not None:  # sizes are not negative: floor and trunc are the same
        operator = "floor_divide"
    wanted = 1 if operator == "neg" else 2
    if values.get("alpha", 1) != 1:
        raise TraceError("arithmetic on sizes with alpha in a traced module cannot be translated")
    return _SIZE_ARITHMETIC[operator], tuple(operands[:wanted]), {}


def _convolution(values: dict[str, Any]) -> AtenCall:
    names = (
        "input",
        "weight",
        "bias",
        "stride",
        "padding",
        "dilation",
        "transposed",
        "output_padding",
        "groups",
    )
    return "torch.convolution", tuple(values[name] for name in names), {}


def _slice(values: dict[str, Any]) -> AtenCall:
    part = slice(values["start"], None if values["end"] == 2**63 - 1 else values["end"], values["step"])
    return _at_dim(values["self"], values["dim"], part)


def _at_dim(tensor: Any, dim: int, index: Any) -> AtenCall:
    if dim < 0:  # count from the end: x[..., part, :, :]
        return "Tensor.__getitem__", (tensor, (Ellipsis, index, *[slice(None)] * (-dim - 1))), {}
    return "Tensor.__getitem__", (tensor, (*[slice(None)] * dim, index)), {}


def _index(values: dict[str, Any]) -> AtenCall:
    indices = tuple(slice(None) if index is None else index for index in values["indices"])
    return "Tensor.__getitem__", (values["self"], indices), {}


def _to(values: dict[str, Any]) -> AtenCall:
    target: list[Any] = []
    if "other" in values:
        target.append(values["other"])
    if values.get("device") is not None:
        target.append(DEVICE)
    if values.get("dtype") is not None:
        target.append(_dtype(values["dtype"]) if type(values["dtype"]) is int else values["dtype"])
    kwargs = {"copy": True} if values.get("copy") else {}
    return "Tensor.to", (values["self"], *target), kwargs


def _spread(operator: str) -> Callable[[dict[str, Any]], AtenCall]:
    return lambda values: (f"torch.{operator}", tuple(values["tensors"]), {})


def _elu(values: dict[str, Any]) -> AtenCall:
    if values["scale"] != 1 or values["input_scale"] != 1:
        raise TraceError("aten::elu with scales in a traced module cannot be translated: pass the nn.Module")
    return "nn.functional.elu", (values["self"], values["alpha"]), {}


def _adaptive_max_pool(values: dict[str, Any]) -> AtenCall:
    return "nn.functional.adaptive_max_pool2d", (values["self"], values["output_size"], True), {}


def _loss(operator: str, values: dict[str, Any]) -> AtenCall:
    kwargs = {name: value for name, value in values.items() if name not in ("self", "target", "reduction")}
    kwargs = {name: value for name, value in kwargs.items() if value is not None}
    kwargs["reduction"] = _REDUCTIONS[values["reduction"]]
    return f"nn.functional.{_LOSSES[operator]}", (values["self"], values["target"]), kwargs


def _interpolate(values: dict[str, Any], mode: str) -> AtenCall:
    kwargs: dict[str, Any] = {"mode": mode}
    scale = values.get("scale_factors")
    if scale is not None:
        kwargs["scale_factor"] = list(scale)
    else:
        kwargs["size"] = values["output_size"]
    if values.get("align_corners") is not None:
        kwargs["align_corners"] = values["align_corners"]
    return "nn.functional.interpolate", (values.get("input", values.get("self")),), kwargs


_ADAPTERS: dict[str, Callable[[dict[str, Any]], AtenCall]] = {
    "_convolution": _convolution,
    "slice": _slice,
    "index": _index,
    "to": _to,
    "elu": _elu,
    **{operator: _spread(operator) for operator in ("broadcast_tensors", "cartesian_prod", "block_diag")},
    "adaptive_max_pool2d": _adaptive_max_pool,
}

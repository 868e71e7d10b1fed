"""Tensors at a fixed precision, here and not yet shared: values rounded to multiples of 1 / scale.

PySyft 0.2 holds integers there; here the values themselves are held, so that every function of torch works on them, and
results are rounded like the operands.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from planrt.errors import OptionError, SharingError
from planrt.sharing.fixed_point import encode, scale_of

_KEEP = frozenset(
    one
    for name in (
        "__repr__",
        "__str__",
        "__deepcopy__",
        "__reduce_ex__",
        "requires_grad_",
        "backward",
        "register_hook",
    )
    for one in [getattr(torch.Tensor, name)]
)
"""What is done to the tensor itself, or reads it; nothing is rounded."""


class FixedPrecisionTensor(torch.Tensor):
    """Values at a fixed precision: what ``x.fix_precision()`` returns, for `share` to take."""

    scale: int
    """Values are multiples of 1 / scale."""
    base: int
    precision_fractional: int

    @staticmethod
    def of(values: torch.Tensor, base: int, digits: int) -> FixedPrecisionTensor:
        """Returns `values` rounded to `digits` digits in `base`; whole numbers as fractions of torch's default dtype.

        Raises:
            ValueRangeError: a value is too large for the precision, infinite or not a number.
            OptionError: a base or a number of digits that no scale below 2**31 has.
        """
        scale = scale_of(base=base, precision_fractional=digits)
        dtype = values.dtype if values.is_floating_point() else torch.get_default_dtype()
        rounded = (encode(values.detach(), scale).double() / scale).to(dtype)
        made: FixedPrecisionTensor = torch.Tensor._make_subclass(
            FixedPrecisionTensor, rounded, values.requires_grad
        )
        made.scale, made.base, made.precision_fractional = scale, base, digits
        return made

    @property
    def plain(self) -> torch.Tensor:
        """Returns the values as an ordinary tensor."""
        with torch._C.DisableTorchFunctionSubclass():
            return self.as_subclass(torch.Tensor)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs torch's function on the values, and rounds what comes out as the operands are rounded.

        Raises:
            SharingError: operands of different precisions.
        """
        fixed = [one for one in (*args, *(kwargs or {}).values()) if isinstance(one, FixedPrecisionTensor)]
        if len({one.scale for one in fixed}) > 1:
            raise SharingError(
                "operands of different precisions: write fix_precision() of both with one precision_fractional"
            )
        with torch._C.DisableTorchFunctionSubclass():
            made = func(*args, **(kwargs or {}))
        if func in _KEEP or not fixed or not hasattr(fixed[0], "scale"):
            return made
        return _rounded(made, fixed[0])

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        with torch._C.DisableTorchFunctionSubclass():
            if not hasattr(self, "scale"):
                return str(super().__repr__())  # type: ignore[no-untyped-call]
            whole = encode(self.detach().as_subclass(torch.Tensor), self.scale)
        return f"(Wrapper)>FixedPrecisionTensor>{whole}"


def _rounded(made: Any, like: FixedPrecisionTensor) -> Any:
    if isinstance(made, tuple | list):
        return type(made)(_rounded(one, like) for one in made) if type(made) in (tuple, list) else made
    if type(made) not in (torch.Tensor, FixedPrecisionTensor) or not made.is_floating_point():
        return made
    with torch._C.DisableTorchFunctionSubclass():
        if not made.isfinite().all():
            raise OptionError("a result is infinite or not a number, which no fixed precision has")
        off = (made.detach().double() * like.scale).round_().div_(like.scale).to(made.dtype) - made.detach()
        if bool(off.any()):
            made = made + off if made.requires_grad else made.add_(off)
        found: FixedPrecisionTensor = made.as_subclass(FixedPrecisionTensor)
    found.scale, found.base = like.scale, like.base
    found.precision_fractional = like.precision_fractional
    return found

"""Into which of several bins values fall, by comparisons; and the quantiles, by sorting.

The first three take what operations of ATen take, and are called below autograd (`rewritten`); `quantile` above it.
"""

from __future__ import annotations

from typing import Any

import torch

from planrt.errors import SharingError


def bucketize(x: Any, boundaries: Any, *, out_int32: bool = False, right: bool = False) -> Any:
    """Returns how many boundaries, (B,) in ascending order, are below each value, or not above it if `right`: int64.

    One comparison for each value and boundary; any of them may be in shares.
    """
    values = torch.as_tensor(x).unsqueeze(-1)
    return _counted(values, boundaries, right).to(torch.int32 if out_int32 else torch.int64)


def searchsorted(
    sequence: Any, x: Any, *, out_int32: bool = False, right: bool = False, side: str | None = None,
    sorter: torch.Tensor | None = None,
) -> Any:  # fmt: skip
    """Returns the same, of boundaries (..., B) and values (..., V): int64, (..., V)."""
    if sorter is not None:
        sequence = sequence.gather(-1, sorter)
    values = torch.as_tensor(x).unsqueeze(-1)
    rows = sequence if sequence.dim() == 1 else sequence.unsqueeze(-2)
    return _counted(values, rows, right or side == "right").to(torch.int32 if out_int32 else torch.int64)


def _counted(values: Any, boundaries: Any, right: bool) -> Any:
    return ((boundaries <= values) if right else (boundaries < values)).sum(-1)


def histc(x: Any, bins: int = 100, min: float = 0, max: float = 0) -> Any:
    """Returns how many values are in each of `bins` parts of equal length from `min` to `max`: (bins,), of x's dtype.

    Raises:
        SharingError: without `min` and `max`, torch takes those of the values.
    """
    if min >= max:
        raise SharingError(
            "histc has no protocol on shares without a range, it would show values: give min and max"
        )
    edges = torch.linspace(min, max, bins + 1, dtype=torch.float64)
    row = x.reshape(-1, 1)
    from_edge = (row >= edges[:-1]).sum(0)
    beyond = (row > max).sum(0)
    return (from_edge - torch.cat([from_edge[1:], beyond])).to(x.dtype)


def quantile(
    input: Any, q: Any, dim: int | None = None, keepdim: bool = False, *, interpolation: str = "linear", out: Any = None
) -> Any:  # fmt: skip
    """Returns the quantiles at `q`, a number or (Q,), which all know, of up to 256 values along `dim`: (Q, ...)."""
    if not getattr(input, "in_shares", False) or getattr(q, "in_shares", False) or out is not None:
        return NotImplemented
    # torch checks the arguments, and says what shape the result has.
    like = torch.zeros(input.shape, dtype=input.dtype)
    shape = torch.quantile(like, q, dim, keepdim, interpolation=interpolation).shape
    rows = input.reshape(-1) if dim is None else input.movedim(dim, 0)
    at = torch.as_tensor(q, dtype=torch.float64).reshape(-1) * (len(rows) - 1)
    if interpolation in ("lower", "higher", "nearest"):
        at = {"lower": at.floor, "higher": at.ceil, "nearest": at.round}[interpolation]()
    below, above = at.floor().long(), at.ceil().long()
    share = torch.where(below == above, 0.0, 0.5) if interpolation == "midpoint" else at - below
    ordered = rows.sort(0).values
    found = ordered[below]
    if bool(share.any()):
        part = share.to(input.dtype).reshape(-1, *[1] * (rows.dim() - 1))
        found = found + (ordered[above] - found) * part
    return found.reshape(shape)

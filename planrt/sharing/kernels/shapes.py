"""PyTorch's changes of shape and order on shares, and what is taken or put at public places: local, exact.

Places are public here, or the shares' own order would have to be opened; `ordering` takes and puts at secret places.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from planrt.errors import SharingError
from planrt.sharing.additive import refresh
from planrt.sharing.kernels.arithmetic import Kernel, One, linear
from planrt.sharing.kernels.parts import Context, Public, Share, Value, aligned, at, at_slice, fractional
from planrt.sharing.kernels.sizes import Drawn, needs_fractions
from planrt.sharing.randomness import Stream
from planrt.sharing.rounds import Protocol


def view(name: str) -> One:
    """Returns the kernel of a view, also of what was opened under a mask where `Masked` has it."""

    def kernel(context: Context, value: Share, *arguments: Public, **_: Public) -> Protocol[Share]:
        yield from ()
        return value.view(name, *arguments)

    return kernel


def _sliced(
    context: Context,
    value: Share,
    dim: int = 0,
    start: int | None = None,
    end: int | None = None,
    step: int = 1,
) -> Protocol[Share]:
    yield from ()
    return value.view("slice", dim, start, end, step)


def _split(context: Context, value: Share, size: int, dim: int = 0) -> Protocol[tuple[Share, ...]]:
    length = value.shape[dim]
    sizes = [min(size, length - start) for start in range(0, length, size)] if size else [0]
    return (yield from _split_with_sizes(context, value, sizes or [0], dim))


def _split_with_sizes(
    context: Context, value: Share, sizes: Sequence[int], dim: int = 0
) -> Protocol[tuple[Share, ...]]:
    yield from ()
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    return tuple(value.view("narrow", dim, start, size) for start, size in zip(starts, sizes, strict=True))


def _unbind(context: Context, value: Share, dim: int = 0) -> Protocol[tuple[Share, ...]]:
    yield from ()
    return tuple(value.view("select", dim, index) for index in range(value.shape[dim]))


def _t(context: Context, value: Share) -> Protocol[Share]:
    yield from ()
    return value.view("transpose", 0, 1) if value.part.dim() == 2 else value.view("same")


def _reshaped(context: Context, value: Share, size: Sequence[int], stride: Sequence[int]) -> Protocol[Share]:
    yield from ()
    return value.view("reshape", tuple(size))


def _strided(
    context: Context, value: Share, size: Sequence[int], stride: Sequence[int], offset: int | None = None
) -> Protocol[Share]:
    """What autograd takes back to the gradient of a tensor that was assigned to: of contiguous tensors."""
    yield from ()
    return value.view("strided", tuple(size), tuple(stride), offset or 0)


def _joined(
    function: Callable[[Sequence[torch.Tensor], int], torch.Tensor],
) -> Kernel:
    def kernel(context: Context, values: Sequence[Value], dim: int = 0) -> Protocol[Share]:
        shares = [context.share_of(one) for one in values]
        scale = yield from aligned(context, *shares)
        return Share(function([at(one, scale) for one in shares], dim), scale)

    return kernel


# ----------------------------------------------------------------------------------- what is made, copied, converted


def filled(value: float) -> One:
    """Returns the kernel of tensors like another that are full of what all know."""

    def kernel(context: Context, like: Share, **_: Any) -> Protocol[Share]:
        yield from ()
        return context.share_of(torch.full(like.shape, value, dtype=torch.float64))

    return kernel


def _fill(context: Context, value: Share, known: Value) -> Protocol[Share]:
    yield from ()
    if isinstance(known, Share):
        return Share(known.part.expand(value.shape).clone(), known.scale)
    return context.share_of(torch.as_tensor(known, dtype=torch.float64).expand(value.shape))


def _full_like(context: Context, like: Share, known: float, **_: Any) -> Protocol[Share]:
    return (yield from _fill(context, like, known))


def _zeros(context: Context, like: Share, size: Sequence[int], *_: Any, **__: Any) -> Protocol[Share]:
    """Memory that torch asks for to fill it: zeros, never what was there."""
    yield from ()
    return context.share_of(torch.zeros(tuple(size), dtype=torch.float64))


def _new_ones(context: Context, like: Share, size: Sequence[int], **_: Any) -> Protocol[Share]:
    yield from ()
    return context.share_of(torch.ones(tuple(size), dtype=torch.float64))


def _new_full(context: Context, like: Share, size: Sequence[int], known: float, **_: Any) -> Protocol[Share]:
    yield from ()
    return context.share_of(torch.full(tuple(size), known, dtype=torch.float64))


def _copy(context: Context, value: Share, source: Value, non_blocking: bool = False) -> Protocol[Share]:
    yield from ()
    source = context.share_of(source)
    if source.shape == value.shape:
        found = Share(source.part, source.scale, source.masked, bit=source.bit, known=source.known)
        found.fine = source.fine
        return found
    return Share(source.part.expand(value.shape), source.scale)


def _clone(context: Context, value: Share, **_: Any) -> Protocol[Share]:
    yield from ()
    return value.copied()


def _refreshed(context: Context, value: Share) -> Protocol[Share]:
    yield from ()
    return Share(refresh(context.party, value.part), value.scale)


def _converted(
    context: Context, value: Share, *, dtype: torch.dtype | None = None, **_: Any
) -> Protocol[Share]:
    if dtype is None or dtype.is_floating_point or (value.scale == 1 and dtype == torch.int64):
        yield from ()
        return value.copied()
    raise SharingError(
        f"shares of fractions are not rounded to {dtype}: get() them, or compare them; whole numbers are int64"
    )


def flags_of(seed: int, shape: Sequence[int], p: float) -> torch.Tensor:
    """Returns truth values of `shape`, each true with probability `p`, which follow from the seed (0 .. 2**128 - 1)."""
    bits = Stream(seed.to_bytes(16, "little")).ring(tuple(shape))
    if p >= 1:  # 2**63 is no int64
        return torch.ones(bits.shape, dtype=torch.bool)
    return (bits >> 1 & 0x7FFFFFFFFFFFFFFF) < int(p * 2**63)


def are_mixed(flags: torch.Tensor) -> bool:
    """Returns whether some are true, and some are not."""
    return 0 < int(flags.sum()) < flags.numel()


def _bernoulli(context: Context, like: Share, p: float = 0.5, *, seed: int, **_: Any) -> Protocol[Share]:
    """Draws what dropout keeps: all know it, and it follows from the seed that came with the call."""
    yield from ()
    keep = flags_of(seed, like.shape, p)
    if isinstance(seed, Drawn) and not are_mixed(keep):  # on which the size of their products depends
        raise SharingError(
            "a seed of flags that are all the same is no operand of a program: write it in the call"
        )
    return context.share_of(keep.long())


# ------------------------------------------------------------------------------------------------- public places


def _places(indices: Sequence[torch.Tensor | None]) -> tuple[Any, ...]:
    if any(isinstance(one, Share) for one in indices):
        raise SharingError(
            "shares are indexed at public places only: take secret ones with gather, or by where and sums"
        )
    return tuple(slice(None) if one is None else one for one in indices)


def _index(context: Context, value: Value, indices: Sequence[torch.Tensor | None]) -> Protocol[Share]:
    yield from ()
    places = _places(indices)
    return Share(value.part[places], value.scale)


def _index_select(context: Context, value: Share, dim: int, index: Public) -> Protocol[Share]:
    yield from ()
    return Share(value.part.index_select(dim, index), value.scale)


def _index_put(
    context: Context,
    value: Value,
    indices: Sequence[torch.Tensor | None],
    values: Value,
    accumulate: bool = False,
    unsafe: bool = False,
) -> Protocol[Share]:
    _places(indices)
    value, values = context.share_of(value), context.share_of(values)
    scale = yield from aligned(context, value, values)
    put = torch.ops.aten.index_put.default  # which also takes None, for a whole dimension
    return Share(put(at(value, scale), indices, at(values, scale), accumulate), scale)


def _written(function: Callable[..., torch.Tensor], source_at: int = 2) -> One:
    """The kernel of what writes a second share into a first at public places; linear in both."""

    def kernel(context: Context, value: Value, *args: Any, **kwargs: Any) -> Protocol[Share]:
        if any(isinstance(one, Share) for index, one in enumerate(args) if index != source_at):
            raise SharingError(
                "shares are written at public places only: take masks and torch.where for secret ones"
            )
        value, source = context.share_of(value), context.share_of(args[source_at])
        scale = yield from aligned(context, value, source)
        given = [at(source, scale) if index == source_at else one for index, one in enumerate(args)]
        return Share(function(at(value, scale), *given, **kwargs), scale)

    return kernel


def _scatter(value: torch.Tensor, dim: int, index: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    if source.dim() == 0 and index.dim():
        source = source.expand(index.shape)
    return value.scatter(dim, index, source)


def _scatter_add(value: torch.Tensor, dim: int, index: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    return value.scatter_add(dim, index, source)


def _index_add(
    value: torch.Tensor, dim: int, index: torch.Tensor, source: torch.Tensor, *, alpha: int = 1
) -> torch.Tensor:
    if alpha != 1:
        raise SharingError("index_add of shares adds what it is given: multiply the source by alpha first")
    return value.index_add(dim, index, source)


def _index_copy(value: torch.Tensor, dim: int, index: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    return value.index_copy(dim, index, source)


def _index_fill(value: torch.Tensor, dim: int, index: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    if not value.dim():
        return source.clone() if index.numel() else value.clone()
    size = list(value.shape)
    size[dim] = index.numel()
    places = index.reshape(-1)
    from_start = torch.where(places < 0, places + value.shape[dim], places)  # as index_copy counts
    return value.index_copy(dim, from_start, source.expand(size))


def _slice_scatter(
    value: torch.Tensor,
    source: torch.Tensor,
    dim: int = 0,
    start: int | None = None,
    end: int | None = None,
    step: int = 1,
) -> torch.Tensor:
    made = value.clone()
    at_slice(made, dim, start, end, step).copy_(source)
    return made


def _select_scatter(value: torch.Tensor, source: torch.Tensor, dim: int, index: int) -> torch.Tensor:
    made = value.clone()
    made.select(dim, index).copy_(source)
    return made


def _back(function: Callable[..., None]) -> Kernel:
    """The gradient of a view: zeros with the gradient where the view was."""

    def kernel(context: Context, gradient: Share, sizes: Sequence[int], *args: Any) -> Protocol[Share]:
        yield from ()
        part = torch.zeros(tuple(sizes), dtype=torch.int64)
        function(part, gradient.part, *args)
        return Share(part, gradient.scale)

    return kernel


def _slice_back(
    part: torch.Tensor, gradient: torch.Tensor, dim: int, start: int, end: int, step: int
) -> None:
    at_slice(part, dim, start, end, step).copy_(gradient)


def _select_back(part: torch.Tensor, gradient: torch.Tensor, dim: int, index: int) -> None:
    part.select(dim, index).copy_(gradient)


def _diagonal_back(part: torch.Tensor, gradient: torch.Tensor, offset: int, first: int, second: int) -> None:
    part.diagonal(offset, first, second).copy_(gradient)


def _unfold_back(part: torch.Tensor, gradient: torch.Tensor, dim: int, size: int, step: int) -> None:
    places = torch.arange(part.shape[dim]).unfold(0, size, step).reshape(-1)
    windows = gradient.movedim(-1, dim + 1 if dim >= 0 else dim).flatten(
        dim % part.dim(), dim % part.dim() + 1
    )
    part.index_add_(dim, places, windows)


def _padded(value: torch.Tensor, pad: Sequence[int]) -> torch.Tensor:
    return torch.nn.functional.pad(value, list(pad))


def _pad(context: Context, value: Share, pad: Sequence[int], fill: float = 0) -> Protocol[Share]:
    if fill == 0:
        yield from ()
        return Share(_padded(value.part, pad), value.scale)
    border = 1 - _padded(torch.ones(value.shape, dtype=torch.int64), pad)
    if value.scale == 1 and needs_fractions(fill):
        (value,) = yield from fractional(context, value)
    known = context.public(torch.tensor(fill), value.scale)
    return Share(_padded(value.part, pad) + context.party.public(border * known), value.scale)


scatter_public = _written(_scatter)
scatter_add_public = _written(_scatter_add)
"""Both at public places; `ordering` has secret ones."""

_SAME_NAME = ("transpose", "permute", "expand", "unsqueeze", "squeeze", "select", "diagonal", "unfold")

SHAPES: dict[str, Kernel] = {
    **{name: view(name) for name in _SAME_NAME},
    "view": view("reshape"),
    "_unsafe_view": view("reshape"),
    "_reshape_alias": _reshaped,
    "t": _t,
    "slice": _sliced,
    "split": _split,
    "split_with_sizes": _split_with_sizes,
    "unbind": _unbind,
    "as_strided": _strided,
    "cat": _joined(lambda parts, dim: torch.cat(list(parts), dim)),
    "stack": _joined(lambda parts, dim: torch.stack(list(parts), dim)),
    **{name: linear(getattr(torch, name)) for name in ("flip", "roll", "tril", "triu", "diag_embed", "trace", "rot90")},
    "repeat": linear(lambda value, sizes: value.repeat(sizes)),
    "constant_pad_nd": _pad,
    "ones_like": filled(1),
    "zeros_like": filled(0),
    "zero": filled(0),
    "empty_like": filled(0),
    "full_like": _full_like,
    "fill": _fill,
    "new_zeros": _zeros,
    "new_empty": _zeros,
    "new_empty_strided": _zeros,
    "new_ones": _new_ones,
    "new_full": _new_full,
    "copy": _copy,
    "clone": _clone,
    "refresh": _refreshed,
    "_to_copy": _converted,
    "bernoulli": _bernoulli,
    "index": _index,
    "index_put": _index_put,
    "_index_put_impl": _index_put,
    "index_select": _index_select,
    "index_add": _written(_index_add),
    "index_copy": _written(_index_copy),
    "index_fill": _written(_index_fill),
    "slice_scatter": _written(_slice_scatter, 0),
    "select_scatter": _written(_select_scatter, 0),
    "slice_backward": _back(_slice_back),
    "select_backward": _back(_select_back),
    "diagonal_backward": _back(_diagonal_back),
    "unfold_backward": _back(_unfold_back),
}  # fmt: skip
"""ATen name -> protocol; see `kernels.ARITHMETIC`."""

_OTHER_NAMES = "view _unsafe_view _reshape_alias t slice split split_with_sizes unbind as_strided"
VIEWS = frozenset([*_SAME_NAME, *_OTHER_NAMES.split()])
"""Those whose results are views of the first argument."""

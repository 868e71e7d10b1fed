"""Checks of values in front of kernels that an index out of range brings down.

On the CPU, torch checks indices, classes and probabilities as it goes, and raises. On a GPU a kernel finds the bad
value when the call has long returned: it trips an assertion on the device, and from then on every call of the process
fails, whoever makes it. One client could end a worker's GPU for all by an index of 10 into a row of three. So where
tensors are not in the CPU's memory, what these kernels rely on is looked at first, which waits for the device once.

Three ops trust their callers on the CPU as well, and are checked everywhere: `ctc_loss` reads where its targets say,
`_pad_packed_sequence` where its batch sizes say, and `binomial` counts up to what may be no number.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, Final

import torch

Function = Callable[..., Any]
Check = Callable[..., None]


def elsewhere(value: Any) -> bool:
    """Returns whether `value` is a tensor with values, outside the CPU's memory."""
    return isinstance(value, torch.Tensor) and not value.is_cpu and not value.is_meta


def _guard(names: str, check: Check, *, everywhere: bool = False) -> Callable[[Function], Function]:
    """Puts `check` before a function that takes arguments of these `names`, in this order; None where one is missing.

    It sees only calls with a tensor outside the CPU's memory, or all whose tensors have values.
    """
    order = names.split()

    def guard(function: Function) -> Function:
        @wraps(function, updated=())
        def guarded(*args: Any, **kwargs: Any) -> Any:
            first = args[0] if args else next(iter(kwargs.values()), None)
            if everywhere or elsewhere(first) or any(map(elsewhere, args)):
                given: dict[str, Any] = dict.fromkeys(order)
                given.update(zip(order, args, strict=False))
                given.update({"input" if key == "self" else key: value for key, value in kwargs.items()})
                if not any(isinstance(one, torch.Tensor) and one.is_meta for one in given.values()):
                    check(function.__name__, *(given[name] for name in order))
            return function(*args, **kwargs)

        return guarded

    return guard


def _within(name: str, what: str, values: Any, low: float, high: float) -> None:
    """Raises where a value is below `low` or above `high` (both allowed), or not a number: IndexError for indices and
    classes, as torch does on the CPU, ValueError for other numbers.

    An expanded view is looked at once, not as often as it repeats.
    """
    if not isinstance(values, torch.Tensor) or not values.numel():
        return
    if values.is_complex() or values.dtype is torch.bool:
        return
    values = values.detach()
    for dim, stride in enumerate(values.stride()):
        if stride == 0 and values.shape[dim] > 1:
            values = values.narrow(dim, 0, 1)
    least, most = (float(one) for one in torch.stack(torch.aminmax(values)).tolist())
    if not (low <= least and most <= high):  # nan is neither
        kind = IndexError if what.startswith(("indices", "classes")) else ValueError
        raise kind(
            f"{name}: {what} out of range: they reach from {least:g} to {most:g}, and may from {low:g} to {high:g}"
        )


def _size(tensor: torch.Tensor, dim: Any) -> int:
    """The size along `dim`, as kernels count it: a number has one entry. -1 for a dimension that torch will refuse."""
    if not isinstance(dim, int) or not -max(1, tensor.dim()) <= dim < max(1, tensor.dim()):
        return -1
    return tensor.shape[dim] if tensor.dim() else 1


def _along(low: int) -> Check:
    """Indices along a dimension: from 0, or from minus the size (`low` = -1)."""

    def check(name: str, input: Any, dim: Any, index: Any, *_: Any) -> None:
        if isinstance(input, torch.Tensor) and (size := _size(input, dim)) >= 0:
            _within(name, "indices", index, low * size, size - 1)

    return check


def _take_along(name: str, input: Any, indices: Any, dim: Any) -> None:
    size = input.numel() if dim is None else _size(input, dim)
    if size >= 0:
        _within(name, "indices", indices, -size, size - 1)


def _flat(name: str, input: Any, index: Any, *_: Any) -> None:
    _within(name, "indices", index, -input.numel(), input.numel() - 1)


def _placed(name: str, input: Any, key: Any, *_: Any) -> None:
    """What stands between brackets: integers that torch checks itself, slices, masks, and tensors or lists of indices.

    Torch's versions differ in whether a list of lists is one tensor or several: it has to fit as both.
    """
    if isinstance(key, list) and key and all(isinstance(one, list) for one in key):
        _within(name, "indices", torch.as_tensor(key), -(least := min(input.shape[: len(key)])), least - 1)
        return
    keys = list(key) if isinstance(key, tuple | list) and not _is_row(key) else [key]
    used = sum(_consumed(one) for one in keys)
    dim = 0
    for one in keys:
        if one is Ellipsis:
            dim += input.dim() - used
            continue
        if isinstance(one, list | tuple | range) and _is_row(one):
            one = torch.as_tensor(one)
        if isinstance(one, torch.Tensor) and one.dtype not in (torch.bool, torch.uint8) and dim < input.dim():
            _within(name, f"indices along dimension {dim}", one, -input.shape[dim], input.shape[dim] - 1)
        dim += _consumed(one)


def _is_row(key: Any) -> bool:
    """Whether a list is indices itself, not several of them for as many dimensions."""
    return isinstance(key, list | range) and not any(
        isinstance(one, slice | torch.Tensor) or one is None or one is Ellipsis for one in key
    )


def _consumed(key: Any) -> int:
    if key is None or key is Ellipsis or isinstance(key, bool):
        return 0
    masks = isinstance(key, torch.Tensor) and key.dtype in (torch.bool, torch.uint8)
    return key.dim() if masks else 1


def _put(name: str, input: Any, indices: Any, *_: Any) -> None:
    _placed(name, input, tuple(slice(None) if one is None else one for one in indices))


def _embedded(name: str, one: Any, other: Any, *rest: Any) -> None:
    """`nn.functional` takes the indices first, `torch` the weight; offsets cut a row of indices.

    Without, on the CPU: of offsets that go down, sums of memory that others freed; of none, or no row, a crash.
    """
    if not (isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor)):
        return
    weight, index = (other, one) if other.is_floating_point() else (one, other)
    _within(name, "indices", index, 0, _size(weight, 0) - 1)
    for offsets in rest[:1]:
        if isinstance(offsets, torch.Tensor) and not offsets.is_floating_point():
            if offsets.dim() != 1:
                raise ValueError(f"{name}: offsets are a row, not of shape {list(offsets.shape)}")
            if not offsets.numel() and index.numel():
                raise ValueError(f"{name}: offsets that are empty, of {index.numel()} indices")
            _within(name, "offsets", offsets, 0, index.numel())
            if offsets.numel() > 1:
                _within(name, "steps between offsets", offsets.diff(), 0, math.inf)


def _classes(name: str, input: Any, target: Any, weight: Any, _: Any, ignore_index: Any, *__: Any) -> None:
    if not isinstance(target, torch.Tensor) or target.is_floating_point():
        return
    ignored = -100 if ignore_index is None else ignore_index
    classes = input.shape[1 if input.dim() > 1 else 0] if input.dim() else 0
    _within(name, "classes", target.masked_fill(target == ignored, 0), 0, max(0, classes - 1))


def _margins(least: int) -> Check:
    def check(name: str, input: Any, target: Any, *_: Any) -> None:
        _within(name, "classes", target, least, _size(input, -1) - 1)

    return check


def _one_hot(name: str, tensor: Any, num_classes: Any) -> None:
    classes = math.inf if num_classes in (None, -1) else num_classes - 1
    _within(name, "classes", tensor, 0, classes)


def _weights(name: str, input: Any, *_: Any) -> None:
    _within(name, "probabilities", input, 0, torch.finfo(torch.float64).max)


def _probabilities(name: str, *values: Any) -> None:
    for one in values:
        _within(name, "probabilities", one, 0, 1)


def _probabilities_to_draw(name: str, input: Any, p: Any, *_: Any) -> None:
    _probabilities(name, input if p is None else p)


def _draw_in_place(name: str, input: Any, p: Any, *_: Any) -> None:
    _probabilities(name, p)


def _rates(name: str, input: Any, *_: Any) -> None:
    _within(name, "rates", input, 0, math.inf)


def _binomial(name: str, count: Any, prob: Any, *_: Any) -> None:
    """The CPU takes counts and probabilities as they come, and adds up until it is past the count.

    Without: where that is no number, it never is.
    """
    if elsewhere(count) or elsewhere(prob):
        _within(name, "counts", count, 0, math.inf)
        _probabilities(name, prob)
    elif isinstance(count, torch.Tensor) and bool(torch.isnan(count.detach()).any()):
        raise ValueError(f"{name}: counts are numbers, and some of these are nan")


def _repeats(name: str, input: Any, repeats: Any, *_: Any) -> None:
    _within(name, "repeats", input if repeats is None else repeats, 0, math.inf)


def _masked_scatter(name: str, input: Any, mask: Any, source: Any) -> None:
    if isinstance(mask, torch.Tensor) and isinstance(source, torch.Tensor):
        wanted = int(mask.sum()) * (input.numel() // max(1, mask.numel()))
        if wanted > source.numel():
            raise ValueError(f"{name}: the mask takes {wanted} numbers, and there are {source.numel()}")


def _unpooled(dims: int) -> Check:
    def check(
        name: str, input: Any, indices: Any, kernel: Any, stride: Any, padding: Any, output_size: Any
    ) -> None:
        if output_size is None:
            whole = [_each(one, dims) for one in (kernel, stride or kernel, padding or 0)]
            sizes = [
                (size - 1) * step - 2 * pad + reach
                for size, reach, step, pad in zip(input.shape[-dims:], *whole, strict=True)
            ]
        else:
            sizes = list(output_size)[-dims:]
        _within(name, "indices", indices, 0, math.prod(sizes) - 1)

    return check


def _each(value: Any, dims: int) -> Sequence[int]:
    return list(value) if isinstance(value, tuple | list) else [value] * dims


def _ctc(
    name: str, log_probs: Any, targets: Any, input_lengths: Any, target_lengths: Any, blank: Any, *_: Any
) -> None:
    """The kernel reads the log-probabilities at the classes that the targets name, as far as the lengths say.

    Without: it reads past them, memory that is not its own.
    """
    if not (
        isinstance(log_probs, torch.Tensor) and isinstance(targets, torch.Tensor) and log_probs.dim() > 1
    ):
        return
    classes, time = log_probs.shape[-1], log_probs.shape[0]
    blank = 0 if blank is None else blank
    if not 0 <= blank < classes:
        raise ValueError(f"{name}: blank is class {blank} of {classes}")
    _within(name, "targets", targets, 0, classes - 1)
    longest = targets.shape[-1] if targets.dim() > 1 else targets.numel()
    for what, lengths, most in (
        ("input_lengths", input_lengths, time),
        ("target_lengths", target_lengths, longest),
    ):
        lengths = torch.as_tensor(lengths)
        _within(name, what, lengths, 0, most)
    if targets.dim() == 1 and log_probs.dim() == 3:
        total = int(torch.as_tensor(target_lengths).sum())
        if total > targets.numel():
            raise ValueError(
                f"{name}: target_lengths add up to {total}, and there are {targets.numel()} targets"
            )


def _unpacked(name: str, input: Any, batch_sizes: Any, *_: Any) -> None:
    """The kernel counts on batch sizes that only fall, are above 0, and add up to the rows of its input.

    Without: it reads before its list of sizes (a crash).
    """
    if not (isinstance(input, torch.Tensor) and isinstance(batch_sizes, torch.Tensor)):
        return
    if (
        batch_sizes.dtype is not torch.int64
        or batch_sizes.dim() != 1
        or not len(batch_sizes)
        or not input.dim()
    ):
        raise ValueError(f"{name} takes packed rows, and batch sizes as a row of int64")
    sizes = batch_sizes.tolist()
    falling = all(after <= before for before, after in itertools.pairwise(sizes))
    if sizes[-1] < 1 or not falling or sum(sizes) != len(input):
        raise ValueError(f"{name}: batch sizes fall, are above 0, and add up to the {len(input)} packed rows")


def _batch_matrices(name: str, input: Any, batch1: Any, batch2: Any, *_: Any) -> None:
    """The kernel gives `input` another shape where it does not fit, and then looks at the dtypes.

    Without: what it failed on holds memory that others freed.
    """
    tensors = [one for one in (input, batch1, batch2) if isinstance(one, torch.Tensor)]
    if len({one.dtype for one in tensors}) > 1:
        raise ValueError(
            f"{name} takes tensors of one dtype, not {', '.join(str(one.dtype) for one in tensors)}"
        )
    if len(tensors) == 3 and batch1.dim() == batch2.dim() == 3:
        shape = [batch1.shape[1], batch2.shape[2]]
        if list(input.shape) != shape:
            raise ValueError(f"{name} writes a result of {shape} into {list(input.shape)}")


_LOSS: Final = "input target weight size_average ignore_index reduce reduction label_smoothing"
_ALONG: Final = "input dim index source"


def _both(words: str) -> list[str]:
    """The function, the method and the method in place."""
    return [f"{home}.{word}{end}" for word in words.split() for home, end in (
        ("torch", ""), ("Tensor", ""), ("Tensor", "_"), ("torch", "_")
    )]  # fmt: skip


INDEX_GUARDS: Final[dict[str, Callable[[Function], Function]]] = {
    **dict.fromkeys(
        _both("gather index_select index_add index_copy index_reduce scatter scatter_add scatter_reduce"),
        _guard(_ALONG, _along(0)),
    ),
    **dict.fromkeys(_both("index_fill"), _guard(_ALONG, _along(-1))),
    **dict.fromkeys(_both("take_along_dim"), _guard("input indices dim", _take_along)),
    **dict.fromkeys(_both("take put"), _guard("input index source accumulate", _flat)),
    **dict.fromkeys(_both("index_put"), _guard("input indices values accumulate", _put)),
    "Tensor.__getitem__": _guard("input key", _placed),
    "Tensor.__setitem__": _guard("input key value", _placed),
    "nn.functional.embedding": _guard("input weight offsets", _embedded),
    "torch.embedding": _guard("weight indices offsets", _embedded),
    "nn.functional.embedding_bag": _guard("input weight offsets", _embedded, everywhere=True),
    "torch.embedding_bag": _guard("weight indices offsets", _embedded, everywhere=True),
    **dict.fromkeys(["nn.functional.nll_loss", "nn.functional.cross_entropy"], _guard(_LOSS, _classes)),
    "nn.functional.multi_margin_loss": _guard("input target", _margins(0)),
    "nn.functional.multilabel_margin_loss": _guard("input target", _margins(-1)),
    "nn.functional.one_hot": _guard("tensor num_classes", _one_hot),
    **dict.fromkeys(_both("multinomial"), _guard("input num_samples", _weights)),
    **dict.fromkeys(["torch.bernoulli", "Tensor.bernoulli"], _guard("input p", _probabilities_to_draw)),
    "Tensor.bernoulli_": _guard("input p", _draw_in_place),
    "nn.functional.binary_cross_entropy": _guard("input target", _probabilities),
    "torch.poisson": _guard("input", _rates),
    "torch.binomial": _guard("count prob", _binomial, everywhere=True),
    **dict.fromkeys(_both("repeat_interleave"), _guard("input repeats dim", _repeats)),
    **dict.fromkeys(_both("masked_scatter"), _guard("input mask source", _masked_scatter)),
    **{
        f"nn.functional.max_unpool{dims}d": _guard(
            "input indices kernel_size stride padding output_size", _unpooled(dims)
        )
        for dims in (1, 2, 3)
    },
    **dict.fromkeys(
        ["nn.functional.ctc_loss", "torch.ctc_loss"],
        _guard("log_probs targets input_lengths target_lengths blank", _ctc, everywhere=True),
    ),
    "torch._pad_packed_sequence": _guard("input batch_sizes", _unpacked, everywhere=True),
    "Tensor.addbmm_": _guard("input batch1 batch2", _batch_matrices, everywhere=True),
}
"""Name of an op -> what puts the check around its function. Names that torch does not have are skipped."""

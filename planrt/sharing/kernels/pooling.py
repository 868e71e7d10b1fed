"""Pooling on shares: windows are places in the plane, which all know; any size, stride and padding is one case."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from planrt.errors import SharingError
from planrt.sharing.fixed_point import LIMIT
from planrt.sharing.kernels.arithmetic import Kernel, multiply
from planrt.sharing.kernels.ordering import one_hot
from planrt.sharing.kernels.parts import Context, Share
from planrt.sharing.masked import mask
from planrt.sharing.products import bit_times
from planrt.sharing.rounds import Protocol
from planrt.sharing.selection import leading


def _pair(value: Sequence[int] | int, default: Sequence[int] = ()) -> tuple[int, int]:
    found = [value] if isinstance(value, int) else list(value) or list(default)
    return (found[0], found[-1])


def _line(size: int, kernel: int, stride: int, padding: int, dilation: int, ceil: bool) -> torch.Tensor:
    """The places of each window along one dimension, -1 for padding: (windows, kernel)."""
    reach = size + 2 * padding - dilation * (kernel - 1) - 1
    count = (reach + (stride - 1 if ceil else 0)) // stride + 1
    if ceil and (count - 1) * stride >= size + padding:
        count -= 1
    places = torch.arange(count)[:, None] * stride - padding + torch.arange(kernel) * dilation
    return places.where((places >= 0) & (places < size), -1)


def _adaptive_line(size: int, count: int) -> torch.Tensor:
    starts = [index * size // count for index in range(count)]
    ends = [-(-(index + 1) * size // count) for index in range(count)]
    most = max((end - start for start, end in zip(starts, ends, strict=True)), default=0)
    places = torch.tensor(starts)[:, None] + torch.arange(most)
    return places.where(places < torch.tensor(ends)[:, None], -1)


def _plane(rows: torch.Tensor, columns: torch.Tensor, width: int) -> torch.Tensor:
    """The places of each window in a plane, -1 for padding: (height, width, kernel)."""
    high, wide = rows[:, None, :, None], columns[None, :, None, :]
    places = (high * width + wide).where((high >= 0) & (wide >= 0), -1)
    return places.reshape(len(rows), len(columns), -1)


def _windows(value: torch.Tensor, places: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
    """(..., h, w) -> (..., height, width, kernel); `padding`, without dimensions, stands where there is nothing."""
    flat = torch.cat([value.flatten(-2), padding.expand(*value.shape[:-2], 1)], -1)
    return flat[..., places.where(places >= 0, flat.shape[-1] - 1)]


def _back(windows: torch.Tensor, places: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """The inverse: adds up what each place was given."""
    high, wide = shape[-2:]
    flat = torch.zeros(math.prod(shape[:-2]), high * wide + 1, dtype=torch.int64)
    chosen = places.where(places >= 0, high * wide).reshape(-1)
    flat.index_add_(1, chosen, windows.reshape(len(flat), -1))
    return flat[:, :-1].reshape(tuple(shape))


_NOTHING = torch.tensor(0)


def _max_pool(
    context: Context, value: Share, kernel_size: Sequence[int], stride: Sequence[int] = (),
    padding: Sequence[int] = (0,), dilation: Sequence[int] = (1,), ceil_mode: bool = False,
) -> Protocol[tuple[Share, Share]]:  # fmt: skip
    """The largest of each window and its place in the plane; padding is the least value that is held."""
    places = _pool_places(value.shape, kernel_size, stride, padding, dilation, ceil_mode)
    least = context.party.public(torch.tensor(-(LIMIT // 2)))
    windows = _windows(value.part, places, least)
    found = yield from leading(context.party, windows, -1, labels=places.expand(windows.shape))
    return Share(found.value, value.scale), Share(found.place, 1, winners=found.winners)


def _pool_places(
    shape: Sequence[int], kernel_size: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], ceil_mode: bool,
) -> torch.Tensor:  # fmt: skip
    kernel = _pair(kernel_size)
    options = zip(shape[-2:], kernel, _pair(stride, kernel), _pair(padding), _pair(dilation), strict=True)
    rows, columns = (_line(*one, ceil_mode) for one in options)
    return _plane(rows, columns, shape[-1])


def _max_pool_backward(
    context: Context, gradient: Share, value: Share, kernel_size: Sequence[int], stride: Sequence[int],
    padding: Sequence[int], dilation: Sequence[int], ceil_mode: bool, indices: Share,
) -> Protocol[Share]:  # fmt: skip
    places = _pool_places(value.shape, kernel_size, stride, padding, dilation, ceil_mode)
    (opened,) = yield from mask(context.party, gradient.part)
    if indices.winners is not None:
        hot = indices.winners.reshape((places.shape[-1], *indices.shape))
        windows = bit_times(context.party, hot, opened.expand(hot.shape)).movedim(0, -1)
        return Share(_back(windows, places, value.shape), gradient.scale)
    size = value.shape[-2] * value.shape[-1]
    hot = yield from one_hot(context, indices, size)  # windows of more than 16: by their place in the plane
    part = bit_times(context.party, hot, opened.expand(hot.shape)).sum((-2, -1)).movedim(0, -1)
    return Share(part.reshape(value.shape), gradient.scale)


def _areas(
    places: torch.Tensor, shape: Sequence[int], kernel: Sequence[int], stride: Sequence[int],
    padding: Sequence[int], ceil_mode: bool, count_padding: bool, divisor: int | None,
) -> torch.Tensor:  # fmt: skip
    """What each window's sum is divided by, as torch counts."""
    if divisor is not None:
        if divisor == 0:
            raise SharingError("divisor_override is not 0")
        return torch.full(places.shape[:2], divisor)
    if not count_padding:
        return (places >= 0).sum(-1)
    counts = []
    for size, one, step, pad, number in zip(
        shape[-2:], kernel, stride, padding, places.shape[:2], strict=True
    ):
        starts = torch.arange(number) * step - pad
        counts.append((starts + one).clamp(max=size + pad) - starts)
    return counts[0][:, None] * counts[1]


def _average_of(context: Context, value: Share, places: torch.Tensor, areas: torch.Tensor) -> Protocol[Share]:
    summed = Share(_windows(value.part, places, _NOTHING).sum(-1), value.scale)
    return (yield from multiply(context, summed, 1 / areas.double()))


def _average_back(
    context: Context, gradient: Share, value: Share, places: torch.Tensor, areas: torch.Tensor
) -> Protocol[Share]:
    each = yield from multiply(context, gradient, 1 / areas.double())
    windows = each.part.unsqueeze(-1).expand(*each.shape, places.shape[-1])
    return Share(_back(windows, places, value.shape), each.scale)


def _average_pool(
    context: Context, value: Share, kernel_size: Sequence[int], stride: Sequence[int] = (),
    padding: Sequence[int] = (0,), ceil_mode: bool = False, count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Protocol[Share]:  # fmt: skip
    kernel = _pair(kernel_size)
    steps, pads = _pair(stride, kernel), _pair(padding)
    places = _pool_places(value.shape, kernel, steps, pads, (1,), ceil_mode)
    areas = _areas(places, value.shape, kernel, steps, pads, ceil_mode, count_include_pad, divisor_override)
    return (yield from _average_of(context, value, places, areas))


def _average_pool_backward(
    context: Context, gradient: Share, value: Share, kernel_size: Sequence[int], stride: Sequence[int],
    padding: Sequence[int], ceil_mode: bool, count_include_pad: bool, divisor_override: int | None,
) -> Protocol[Share]:  # fmt: skip
    kernel = _pair(kernel_size)
    steps, pads = _pair(stride, kernel), _pair(padding)
    places = _pool_places(value.shape, kernel, steps, pads, (1,), ceil_mode)
    areas = _areas(places, value.shape, kernel, steps, pads, ceil_mode, count_include_pad, divisor_override)
    return (yield from _average_back(context, gradient, value, places, areas))


def _adaptive_places(shape: Sequence[int], size: Sequence[int]) -> torch.Tensor:
    rows, columns = (_adaptive_line(*one) for one in zip(shape[-2:], size, strict=True))
    return _plane(rows, columns, shape[-1])


def _adaptive_average(context: Context, value: Share, output_size: Sequence[int]) -> Protocol[Share]:
    places = _adaptive_places(value.shape, output_size)
    return (yield from _average_of(context, value, places, (places >= 0).sum(-1)))


def _adaptive_average_backward(context: Context, gradient: Share, value: Share) -> Protocol[Share]:
    places = _adaptive_places(value.shape, gradient.shape[-2:])
    return (yield from _average_back(context, gradient, value, places, (places >= 0).sum(-1)))


def _adaptive_max(
    context: Context, value: Share, output_size: Sequence[int]
) -> Protocol[tuple[Share, Share]]:
    places = _adaptive_places(value.shape, output_size)
    least = context.party.public(torch.tensor(-(LIMIT // 2)))
    windows = _windows(value.part, places, least)
    found = yield from leading(context.party, windows, -1, labels=places.expand(windows.shape))
    return Share(found.value, value.scale), Share(found.place, 1)


def _adaptive_max_backward(
    context: Context, gradient: Share, value: Share, indices: Share
) -> Protocol[Share]:
    return (yield from _max_pool_backward(context, gradient, value, (1,), (1,), (0,), (1,), False, indices))


POOLING: dict[str, Kernel] = {
    "max_pool2d_with_indices": _max_pool,
    "max_pool2d_with_indices_backward": _max_pool_backward,
    "avg_pool2d": _average_pool,
    "avg_pool2d_backward": _average_pool_backward,
    "_adaptive_avg_pool2d": _adaptive_average,
    "_adaptive_avg_pool2d_backward": _adaptive_average_backward,
    "adaptive_max_pool2d": _adaptive_max,
    "adaptive_max_pool2d_backward": _adaptive_max_backward,
}
"""ATen name -> protocol; see `kernels.ARITHMETIC`."""

"""Pooling on shares: windows are places in a plane or a volume, which all know; any size, stride and padding is one
case."""

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


def _each(value: Sequence[int] | int, dims: int, default: Sequence[int] = ()) -> list[int]:
    """One number for each dimension, where one may be given for all."""
    found = [value] if isinstance(value, int) else list(value) or list(default)
    return found * dims if len(found) == 1 else found


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


def _volume(lines: Sequence[torch.Tensor], sizes: Sequence[int]) -> torch.Tensor:
    """The places of each window in what has these sizes, counted row by row, -1 for padding: (*windows, kernel)."""
    dims = len(lines)
    places, there = torch.tensor(0), torch.tensor(True)
    for dim, (line, size) in enumerate(zip(lines, sizes, strict=True)):
        shape = [1] * (2 * dims)
        shape[dim], shape[dims + dim] = line.shape
        wide = line.reshape(shape)
        places, there = places * size + wide, there & (wide >= 0)
    places = places.where(there, -1)
    return places.reshape(*places.shape[:dims], math.prod(places.shape[dims:]))


def _windows(value: torch.Tensor, places: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
    """(..., d, h, w) -> (..., *windows, kernel); `padding`, without dimensions, stands where there is nothing."""
    flat = value.flatten(1 - places.dim())
    flat = torch.cat([flat, padding.expand(*flat.shape[:-1], 1)], -1)
    return flat[..., places.where(places >= 0, flat.shape[-1] - 1)]


def _back(windows: torch.Tensor, places: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """The inverse: adds up what each place was given."""
    dims = places.dim() - 1
    rows, size = math.prod(shape[:-dims]), math.prod(shape[-dims:])
    flat = torch.zeros(rows, size + 1, dtype=torch.int64)
    chosen = places.where(places >= 0, size).reshape(-1)
    flat.index_add_(1, chosen, windows.reshape(rows, len(chosen)))
    return flat[:, :-1].reshape(tuple(shape))


_NOTHING = torch.tensor(0)


def _max_pool(dims: int) -> Kernel:
    """The largest of each window and its place; padding is the least value that is held."""

    def kernel(
        context: Context, value: Share, kernel_size: Sequence[int], stride: Sequence[int] = (),
        padding: Sequence[int] = (0,), dilation: Sequence[int] = (1,), ceil_mode: bool = False,
    ) -> Protocol[tuple[Share, Share]]:  # fmt: skip
        places = _pool_places(value.shape[-dims:], kernel_size, stride, padding, dilation, ceil_mode)
        return (yield from _largest(context, value, places))

    return kernel


def _largest(context: Context, value: Share, places: torch.Tensor) -> Protocol[tuple[Share, Share]]:
    least = context.party.public(torch.tensor(-(LIMIT // 2)))
    windows = _windows(value.part, places, least)
    found = yield from leading(context.party, windows, -1, labels=places.expand(windows.shape))
    return Share(found.value, value.scale), Share(found.place, 1, winners=found.winners)


def _pool_places(
    sizes: Sequence[int], kernel_size: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], ceil_mode: bool,
) -> torch.Tensor:  # fmt: skip
    dims = len(sizes)
    kernel = _each(kernel_size, dims)
    steps, pads, gaps = _each(stride, dims, kernel), _each(padding, dims), _each(dilation, dims)
    options = zip(sizes, kernel, steps, pads, gaps, strict=True)
    return _volume([_line(*one, ceil_mode) for one in options], sizes)


def _max_pool_backward(dims: int) -> Kernel:
    def kernel(
        context: Context, gradient: Share, value: Share, kernel_size: Sequence[int], stride: Sequence[int],
        padding: Sequence[int], dilation: Sequence[int], ceil_mode: bool, indices: Share,
    ) -> Protocol[Share]:  # fmt: skip
        places = _pool_places(value.shape[-dims:], kernel_size, stride, padding, dilation, ceil_mode)
        return (yield from _largest_back(context, gradient, value, places, indices))

    return kernel


def _largest_back(
    context: Context, gradient: Share, value: Share, places: torch.Tensor, indices: Share
) -> Protocol[Share]:
    (opened,) = yield from mask(context.party, gradient.part)
    if indices.winners is not None:
        hot = indices.winners.reshape((places.shape[-1], *indices.shape))
        windows = bit_times(context.party, hot, opened.expand(hot.shape)).movedim(0, -1)
        return Share(_back(windows, places, value.shape), gradient.scale)
    dims = places.dim() - 1
    size = math.prod(value.shape[-dims:])
    hot = yield from one_hot(context, indices, size)  # windows of more than 16: by their place
    summed = bit_times(context.party, hot, opened.expand(hot.shape)).sum(list(range(-dims, 0)))
    return Share(summed.movedim(0, -1).reshape(value.shape), gradient.scale)


def _areas(
    places: torch.Tensor, sizes: Sequence[int], kernel: Sequence[int], stride: Sequence[int],
    padding: Sequence[int], count_padding: bool, divisor: int | None,
) -> torch.Tensor:  # fmt: skip
    """What each window's sum is divided by, as torch counts."""
    if divisor is not None:
        if divisor == 0:
            raise SharingError("divisor_override is not 0")
        return torch.full(places.shape[:-1], divisor)
    if not count_padding:
        return (places >= 0).sum(-1)
    areas = torch.tensor(1)
    for size, one, step, pad, number in zip(sizes, kernel, stride, padding, places.shape[:-1], strict=True):
        starts = torch.arange(number) * step - pad
        areas = areas.unsqueeze(-1) * ((starts + one).clamp(max=size + pad) - starts)
    return areas


def _average_of(context: Context, value: Share, places: torch.Tensor, areas: torch.Tensor) -> Protocol[Share]:
    summed = Share(_windows(value.part, places, _NOTHING).sum(-1), value.scale)
    return (yield from multiply(context, summed, 1 / areas.double()))


def _average_back(
    context: Context, gradient: Share, value: Share, places: torch.Tensor, areas: torch.Tensor
) -> Protocol[Share]:
    each = yield from multiply(context, gradient, 1 / areas.double())
    windows = each.part.unsqueeze(-1).expand(*each.shape, places.shape[-1])
    return Share(_back(windows, places, value.shape), each.scale)


def _average_options(
    sizes: Sequence[int], kernel_size: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    ceil_mode: bool, count_include_pad: bool, divisor_override: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """The places of the windows, and what their sums are divided by."""
    dims = len(sizes)
    kernel = _each(kernel_size, dims)
    steps, pads = _each(stride, dims, kernel), _each(padding, dims)
    places = _pool_places(sizes, kernel, steps, pads, (1,), ceil_mode)
    return places, _areas(places, sizes, kernel, steps, pads, count_include_pad, divisor_override)


def _average_pool(dims: int) -> Kernel:
    def kernel(
        context: Context, value: Share, kernel_size: Sequence[int], stride: Sequence[int] = (),
        padding: Sequence[int] = (0,), ceil_mode: bool = False, count_include_pad: bool = True,
        divisor_override: int | None = None,
    ) -> Protocol[Share]:  # fmt: skip
        options = (kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)
        return (yield from _average_of(context, value, *_average_options(value.shape[-dims:], *options)))

    return kernel


def _average_pool_backward(dims: int) -> Kernel:
    def kernel(
        context: Context, gradient: Share, value: Share, kernel_size: Sequence[int], stride: Sequence[int],
        padding: Sequence[int], ceil_mode: bool, count_include_pad: bool, divisor_override: int | None,
    ) -> Protocol[Share]:  # fmt: skip
        options = (kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)
        found = _average_options(value.shape[-dims:], *options)
        return (yield from _average_back(context, gradient, value, *found))

    return kernel


def _adaptive_places(sizes: Sequence[int], counts: Sequence[int]) -> torch.Tensor:
    lines = [_adaptive_line(*one) for one in zip(sizes, counts, strict=True)]
    return _volume(lines, sizes)


def _adaptive_average(dims: int) -> Kernel:
    def kernel(context: Context, value: Share, output_size: Sequence[int]) -> Protocol[Share]:
        places = _adaptive_places(value.shape[-dims:], _each(output_size, dims))
        return (yield from _average_of(context, value, places, (places >= 0).sum(-1)))

    return kernel


def _adaptive_average_backward(dims: int) -> Kernel:
    def kernel(context: Context, gradient: Share, value: Share) -> Protocol[Share]:
        places = _adaptive_places(value.shape[-dims:], gradient.shape[-dims:])
        return (yield from _average_back(context, gradient, value, places, (places >= 0).sum(-1)))

    return kernel


def _adaptive_max(dims: int) -> Kernel:
    def kernel(context: Context, value: Share, output_size: Sequence[int]) -> Protocol[tuple[Share, Share]]:
        places = _adaptive_places(value.shape[-dims:], _each(output_size, dims))
        return (yield from _largest(context, value, places))

    return kernel


def _adaptive_max_backward(dims: int) -> Kernel:
    def kernel(context: Context, gradient: Share, value: Share, indices: Share) -> Protocol[Share]:
        places = _adaptive_places(value.shape[-dims:], indices.shape[-dims:])
        return (yield from _largest_back(context, gradient, value, places, indices))

    return kernel


def _pools(dims: int) -> dict[str, Kernel]:
    return {
        f"max_pool{dims}d_with_indices": _max_pool(dims),
        f"max_pool{dims}d_with_indices_backward": _max_pool_backward(dims),
        f"avg_pool{dims}d": _average_pool(dims),
        f"avg_pool{dims}d_backward": _average_pool_backward(dims),
        f"_adaptive_avg_pool{dims}d": _adaptive_average(dims),
        f"_adaptive_avg_pool{dims}d_backward": _adaptive_average_backward(dims),
        f"adaptive_max_pool{dims}d": _adaptive_max(dims),
        f"adaptive_max_pool{dims}d_backward": _adaptive_max_backward(dims),
    }


POOLING: dict[str, Kernel] = {**_pools(2), **_pools(3)}
"""ATen name -> protocol; see `kernels.ARITHMETIC`."""

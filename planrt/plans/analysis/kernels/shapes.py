"""What kernels that move entries about do with dimensions: views, rearrangements, indexing."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from planrt.plans.analysis.kernels.call import Call, Links, aligned, all_lost, dims_of, inner, linked, shifted
from planrt.plans.analysis.rows import Axis, Digit, Trace, keep, moved, reshaped

# Views and rearrangements


def reshape(call: Call) -> Links:
    """Keeps the entries in row-major order, in another shape."""
    source = call.tensors[0]
    shape, target = call.shape(source), list(call.outputs[0].shape)
    if call.kernel.overload == "dtype":  # the same bytes, read as numbers of another size
        return [[linked(call, source, lambda dim, size: dim if dim < len(shape) - 1 else None)]]
    if 0 in shape:
        return all_lost(call)
    strides = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
    return [[linked(call, source, lambda dim, size: reshaped(strides[dim], size, target, call.kernel.name))]]


def permute(call: Call) -> Links:
    """Dimensions in another order."""
    source = call.tensors[0]
    rank = len(call.shape(source))
    if call.kernel.name in ("permute", "permute_copy"):
        order = dims_of(call["dims"], rank)
    else:
        one, two = (0, rank - 1) if call.kernel.name.startswith("t") and rank < 2 else (0, 1)
        if "dim0" in call.kernel.positions:
            one, two = dims_of([call["dim0"], call["dim1"]], rank)
        order = list(range(rank))
        if rank:
            order[one], order[two] = order[two], order[one]
    return [[linked(call, source, lambda dim, size: order.index(dim))]]


def unsqueeze(call: Call) -> Links:
    """Adds a dimension."""
    dim = call["dim"] % call.outputs[0].dim()
    return [[linked(call, call.tensors[0], lambda old, size: old + (old >= dim))]]


def squeeze(call: Call) -> Links:
    """Dimensions of size 1 go."""
    source = call.tensors[0]
    shape = call.shape(source)
    asked = dims_of(call["dim"] if "dim" in call.kernel.positions else None, len(shape))
    gone = [dim for dim in asked if shape[dim] == 1] if len(shape) else []
    place = shifted(gone, keepdim=False)
    return [[linked(call, source, lambda dim, size: None if dim in gone else place(dim))]]


def select_view(call: Call) -> Links:
    """Takes one entry of a dimension: one row, if that holds the rows."""
    source = call.tensors[0]
    (gone,) = dims_of(call["dim"], len(call.shape(source)))
    place = shifted([gone], keepdim=False)
    link = linked(call, source, lambda dim, size: None if dim == gone else place(dim))
    return [[link] for _ in call.outputs]


def slicing(call: Call) -> Links:
    """Takes some entries of a dimension."""
    source = call.tensors[0]
    (cut,) = dims_of(call["dim"], len(call.shape(source)))
    left = call.outputs[0].shape[cut]
    start, step = call["start"] or 0, call["step"]

    def to(dim: int, size: int) -> Trace | int:
        return moved(dim, left, "slice", start, step, left) if dim == cut and left != size else dim

    return [[linked(call, source, to)]]


def split(call: Call) -> Links:
    """Consecutive parts of a dimension."""
    source = call.tensors[0]
    (cut,) = dims_of(call["dim"], len(call.shape(source)))
    result: Links = []
    start = 0
    for output in call.outputs:
        left = output.shape[cut]

        def to(dim: int, size: int, left: int = left, start: int = start) -> Trace | int:
            return moved(dim, left, "slice", start, 1, left) if dim == cut and left != size else dim

        result.append([linked(call, source, to)])
        start += left
    return result


def expand(call: Call) -> Links:
    """Repeats dimensions of size 1."""
    return [[aligned(call, call.tensors[0], call.outputs[0].shape)]]


def diagonal(call: Call) -> Links:
    """Two dimensions become one."""
    source = call.tensors[0]
    rank = len(call.shape(source))
    pair = dims_of([call["dim1"], call["dim2"]], rank)
    place = shifted(pair, keepdim=False)
    return [[linked(call, source, lambda dim, size: None if dim in pair else place(dim))]]


def unfold(call: Call) -> Links:
    """Overlapping windows along a dimension."""
    (cut,) = dims_of(call["dimension"], len(call.shape(call.tensors[0])))
    return [[linked(call, call.tensors[0], lambda dim, size: None if dim == cut else dim)]]


def windows(call: Call) -> Links:
    """`im2col` and `col2im`: only a batch stays apart."""
    batched = len(call.shape(call.tensors[0])) == (4 if call.kernel.name == "im2col" else 3)
    return [[linked(call, call.tensors[0], lambda dim, size: 0 if batched and dim == 0 else None)]]


def flip(call: Call) -> Links:
    """Turns dimensions the other way round."""
    source = call.tensors[0]
    turned = dims_of(call["dims"], len(call.shape(source)))
    return [[linked(call, source, lambda dim, size: moved(dim, size, "flip") if dim in turned else dim)]]


def roll(call: Call) -> Links:
    """Turned in a circle."""
    source = call.tensors[0]
    if not call["dims"]:
        return all_lost(call)
    by = dict(zip(dims_of(call["dims"], len(call.shape(source))), call["shifts"], strict=True))
    return [[linked(call, source, lambda dim, size: moved(dim, size, "roll", by[dim]) if dim in by else dim)]]


def cat(call: Call) -> Links:
    """Joined along a dimension: each part has its own rows there."""
    output = call.outputs[0]
    (along,) = dims_of(call["dim"], output.dim())
    every, start = [], 0
    for tensor in call.tensors:
        shape = call.shape(tensor)
        if len(shape) != output.dim():  # torch skips empty tensors of one dimension
            continue
        if shape[along] == output.shape[along]:
            every.append(linked(call, tensor, lambda dim, size: dim))
        else:
            joins = _joining(along, output.shape[along], start)
            every.append(linked(call, tensor, joins))
        start += shape[along]
    return [every]


def _joining(along: int, whole: int, start: int) -> Callable[[int, int], Trace | int]:
    def to(dim: int, size: int) -> Trace | int:
        if dim != along:
            return dim
        return Trace((Axis(size, (Digit(dim, 1, whole, 1),), 1, (("cat", start, whole),), True),))

    return to


def stack(call: Call) -> Links:
    """Joined along a new dimension."""
    new = call["dim"] % call.outputs[0].dim()
    return [[linked(call, tensor, lambda dim, size: dim + (dim >= new)) for tensor in call.tensors]]


def repeat(call: Call) -> Links:
    """Copies: what is repeated no longer stands for different rows."""
    source = call.tensors[0]
    offset = call.outputs[0].dim() - len(call.shape(source))
    times = call["repeats"]
    return [[linked(call, source, lambda dim, size: dim + offset if times[dim + offset] == 1 else None)]]


def pad(call: Call) -> Links:
    """Dimensions that are padded or cut are lost."""
    pad = call["pad"]  # pairs, from the last dimension on
    rank = call.outputs[0].dim()

    def to(dim: int, size: int) -> int | None:
        place = 2 * (rank - 1 - dim)
        return dim if not any(pad[place : place + 2]) else None

    return [[linked(call, call.tensors[0], to)]]


def slice_backward(call: Call) -> Links:
    """Put back among zeros."""
    shape = call.outputs[0].shape
    return [[linked(call, call.tensors[0], lambda dim, size: dim if size == shape[dim] else None)]]


def triangle(call: Call) -> Links:
    """Entries set to zero by their place: a sum over what is left need not be one over all rows."""
    return inner(2)(call)


def slice_scatter(call: Call) -> Links:
    """Put into a part of another tensor."""
    dim = call["dim"] if "dim" in call.kernel.positions else None
    rank = call.outputs[0].dim()
    source = call["src"]
    if dim is None or len(call.shape(source)) not in (rank, rank - 1):
        return all_lost(call)
    (cut,) = dims_of(dim, rank)
    missing = len(call.shape(source)) < rank

    def to(old: int, size: int) -> int | None:
        new = old + (missing and old >= cut)
        return None if new == cut else new

    return [[linked(call, call["self"], lambda old, size: old), linked(call, source, to)]]


def select_backward(call: Call) -> Links:
    """Put back among zeros, in a dimension of its own."""
    (cut,) = dims_of(call["dim"], call.outputs[0].dim())
    return [[linked(call, call.tensors[0], lambda dim, size: dim + (dim >= cut))]]


# Indexing


def indexing(call: Call) -> Links:
    """`x[i, j]`: what indices select may be any row, any number of times."""
    indices = call["indices"]
    where = [place for place, index in enumerate(indices) if index is not None]
    source = call["self"]
    rank = len(call.shape(source))
    wide = max(len(call.shape(indices[place])) for place in where)
    together = where == list(range(where[0], where[0] + len(where)))
    first = where[0] if together else 0

    def of_source(dim: int, size: int) -> int | None:
        if dim in where:
            return None
        before = sum(1 for place in where if place < dim)
        return dim - before + wide if before or not together else dim

    if rank < len(indices) or any(indices[place].dtype in (torch.bool, torch.uint8) for place in where):
        return all_lost(call)
    shape = call.outputs[0].shape[first : first + wide]
    every = [linked(call, source, of_source)]
    for place in where:
        tensor, fates = aligned(call, indices[place], shape)
        size_of = call.shape(tensor)
        shifted = tuple(
            fate if fate.lost else keep(first + dim + wide - len(fates), size_of[dim])
            for dim, fate in enumerate(fates)
        )
        every.append((tensor, shifted))
    return [every]


def index_select(call: Call) -> Links:
    """As `indexing`, along one dimension."""
    source, index = call["self"], call["index"]
    (cut,) = dims_of(call["dim"], len(call.shape(source)))
    return [
        [
            linked(call, source, lambda dim, size: None if dim == cut else dim),
            linked(call, index, lambda dim, size: cut),
        ]
    ]


def gather(call: Call) -> Links:
    """`gather` and the scatters: other dimensions run in step, as far as the index goes along them whole.

    The index says how far: a shorter one takes the first rows only, whatever the other sizes are.
    """
    shape = call.outputs[0].shape
    (cut,) = dims_of(call["dim"], len(shape))
    index = call.shape(call["index"])
    in_place = (
        "index" if call.kernel.name == "gather" else "self"
    )  # has the entries where the result has them
    every = []
    for tensor in call.tensors:
        whole = tensor is call[in_place]

        def to(dim: int, size: int, whole: bool = whole) -> int | None:
            if dim >= len(shape) or size != shape[dim]:
                return None
            return dim if whole or (dim != cut and index[dim] == size) else None

        every.append(linked(call, tensor, to))
    return [every]


def index_put(call: Call) -> Links:
    """Keeps the place of what stays where it was, masks included. Values may come from anywhere in their
    tensor."""
    shape = call.outputs[0].shape
    first = call["indices"][0]
    mask = first if first is not None and first.dtype == torch.bool else None
    every = []
    for tensor in call.tensors:
        if tensor is call["self"] or tensor is mask:
            every.append(linked(call, tensor, lambda dim, size: dim if size == shape[dim] else None))
        else:
            every.append(linked(call, tensor, lambda dim, size: None))
    return [every]


def embedding(call: Call) -> Links:
    """Picks rows of the weight."""
    last = call.outputs[0].dim() - 1
    return [
        [
            linked(call, call["weight"], lambda dim, size: last if dim == 1 else None),
            linked(call, call["indices"], lambda dim, size: dim),
        ]
    ]

"""What products, convolutions, losses and normalisations do with dimensions."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from planrt.plans.analysis.kernels.call import Call, Link, Links, aligned, elementwise, linked
from planrt.plans.analysis.rows import Trace, fold

# Products


def contract(names: str, equation: str) -> Callable[[Call], Links]:
    """Multiplies by letters, as einsum has it: ("self mat2", "ik,kj->ij"). A letter that goes is an
    aggregate."""
    inputs, result = equation.split("->")
    pairs = list(zip(names.split(), inputs.split(","), strict=True))

    def rule(call: Call) -> Links:
        every = []
        for name, letters in pairs:
            tensor = call[name]
            if letters == "*":
                every.append(aligned(call, tensor, call.outputs[0].shape))
            else:
                every.append(linked(call, tensor, by_letter(letters)))
        return [every]

    def by_letter(letters: str) -> Callable[[int, int], Trace | int]:
        return lambda dim, size: (
            result.index(letters[dim]) if letters[dim] in result else fold(size, "matmul")
        )

    return rule


def cdist(call: Call) -> Links:
    """Distances of all pairs of points."""
    rank = call.outputs[0].dim()
    p = call["p"]
    near = fold if not math.isinf(p) else None

    def side(name: str, place: int) -> Link:
        shape = call.shape(call[name])
        offset = rank - len(shape)

        def to(dim: int, size: int) -> Trace | int | None:
            if dim == len(shape) - 1:
                return near(size, "norm") if near else None
            if dim == len(shape) - 2:
                return place
            return dim + offset if call.outputs[0].shape[dim + offset] == size else None

        return linked(call, call[name], to)

    return [[side("x1", rank - 2), side("x2", rank - 1)]]


def convolution(call: Call) -> Links:
    """Sums over input channels; places along the spatial dimensions are mixed."""
    whole = call["groups"] == 1
    transposed = call["transposed"]
    channels = fold

    def of_input(dim: int, size: int) -> Trace | int | None:
        return 0 if dim == 0 else channels(size, "convolution") if dim == 1 and whole else None

    def of_weight(dim: int, size: int) -> Trace | int | None:
        out, into = (1, 0) if transposed else (0, 1)
        return 1 if dim == out and whole else fold(size, "convolution") if dim == into and whole else None

    every = [linked(call, call["input"], of_input), linked(call, call["weight"], of_weight)]
    if call["bias"] is not None:
        every.append(linked(call, call["bias"], lambda dim, size: 1))
    return [every]


def convolution_backward(call: Call) -> Links:
    """Returns links of the gradients of input, weight and bias: that of the weight sums over the batch."""
    gradient, source, weight = call["grad_output"], call["input"], call["weight"]
    whole = call["groups"] == 1
    out, into = (1, 0) if call["transposed"] else (0, 1)

    def into_input(dim: int, size: int) -> Trace | int | None:
        return 0 if dim == 0 else fold(size, "convolution") if dim == 1 and whole else None

    def weight_into_input(dim: int, size: int) -> Trace | int | None:
        return fold(size, "convolution") if dim == out and whole else 1 if dim == into and whole else None

    def into_weight(place: int) -> Callable[[int, int], Trace | int | None]:
        return lambda dim, size: (
            fold(size, "convolution") if dim == 0 else place if dim == 1 and whole else None
        )

    def into_bias(dim: int, size: int) -> Trace | int:
        return 0 if dim == 1 else fold(size, "sum")

    return asked_for(
        call,
        [
            [linked(call, gradient, into_input), linked(call, weight, weight_into_input)],
            [linked(call, gradient, into_weight(out)), linked(call, source, into_weight(into))],
            [linked(call, gradient, into_bias)],
        ],
    )


def asked_for(call: Call, every: Links) -> Links:
    """Of the links for all possible outputs those whose output is there.

    That is what was asked for, but on meta tensors some kernels return all the same
    (`native_batch_norm_backward`).
    """
    if len(call.outputs) == len(every):
        return every
    mask = call["output_mask"]
    return [part for part, wanted in zip(every, mask, strict=True) if wanted]


# Losses and normalisation


def loss(call: Call) -> Links:
    """Elementwise, then by `reduction` (0 none, 1 mean, 2 sum) an aggregate over everything."""
    if call["reduction"] == 0:
        return elementwise(call)
    kind = "loss"
    return [
        [linked(call, tensor, lambda dim, size: fold(size, kind)) for tensor in call.tensors]
        for _ in call.outputs
    ]


def nll(call: Call) -> Links:
    """nll_loss: picks the class (dimension 1, or 0 without a batch), then as `_loss`."""
    source, target, weight = call["self"], call["target"], call["weight"]
    batched = len(call.shape(source)) > 1
    reduced = call["reduction"] != 0

    def of_source(dim: int, size: int) -> Trace | int | None:
        if dim == 1 or not batched:
            return None
        return fold(size, "loss") if reduced else dim - (dim > 1)

    def of_target(dim: int, size: int) -> Trace | int:
        return fold(size, "loss") if reduced else dim

    weights = [linked(call, weight, lambda dim, size: None)] if weight is not None else []
    targets = linked(call, target, of_target)
    return [[linked(call, source, of_source), targets, *weights], [targets, *weights] if reduced else []]


def nll_backward(call: Call) -> Links:
    """Reads the target, and of the input only its shape."""
    gradient, target, weight = call["grad_output"], call["target"], call["weight"]
    rank = call.outputs[0].dim()

    def into(dim: int, size: int) -> int | None:
        place = dim + (dim > 0)
        return place if rank > 1 and call.outputs[0].shape[place] == size else None

    every = [linked(call, one, into) for one in (gradient, target)]
    every += [
        linked(call, one, lambda dim, size: None) for one in (weight, call["total_weight"]) if one is not None
    ]
    return [every]


def layer_norm(call: Call) -> Links:
    """Mixes the last dimensions. The statistics aggregate over them."""
    rank = len(call.shape(call["input"]))
    lead = rank - len(call["normalized_shape"])
    statistic = linked(call, call["input"], lambda dim, size: dim if dim < lead else fold(size, "layer_norm"))
    out = [linked(call, call["input"], lambda dim, size: dim if dim < lead else None)]
    for name in ("weight", "bias"):
        if isinstance(call[name], torch.Tensor):
            out.append(linked(call, call[name], lambda dim, size: lead + dim))
    return [out, [statistic], [statistic]]


def layer_norm_backward(call: Call) -> Links:
    """Sums the gradients of weight and bias over all other dimensions."""
    rank = len(call.shape(call["input"]))
    lead = rank - len(call["normalized_shape"])
    whole = [call[name] for name in ("grad_out", "input")]
    statistics = [call[name] for name in ("mean", "rstd")]
    weights = [call["weight"]] if call["weight"] is not None else []

    def into_input(dim: int, size: int) -> int | None:
        return dim if dim < lead else None

    def into_weight(dim: int, size: int) -> Trace | int:
        return fold(size, "sum") if dim < lead else dim - lead

    def of_statistic(dim: int, size: int) -> Trace | None:
        return fold(size, "sum") if dim < lead else None

    return asked_for(
        call,
        [
            [
                *[linked(call, one, into_input) for one in (*whole, *statistics)],
                *[linked(call, one, lambda dim, size: None) for one in weights],
            ],
            [
                *[linked(call, one, into_weight) for one in whole],
                *[linked(call, one, of_statistic) for one in statistics],
            ],
            [linked(call, call["grad_out"], into_weight)],
        ],
    )


def batch_norm(call: Call) -> Links:
    """Statistics aggregate over the batch. An entry of the output depends on its own row and, in training, on
    them.

    The kernel also writes the running statistics, which its schema does not say: see `hidden_writes`.
    """
    source = call["input"]
    training = call["training"]
    statistic = [linked(call, source, _into_statistic)]
    out = [linked(call, source, lambda dim, size: dim)]
    if training:
        out.append(linked(call, source, lambda dim, size: 1 if dim == 1 else fold(size, "batch_norm")))
    for name in ("weight", "bias", "running_mean", "running_var"):
        one = call[name] if name in call.kernel.positions else None
        if isinstance(one, torch.Tensor) and not (training and name.startswith("running")):
            out.append(linked(call, one, lambda dim, size: 1))
    statistics = statistic if training else []
    return [out, statistics, statistics][: len(call.outputs)] + [[] for _ in call.outputs[3:]]


def _into_statistic(dim: int, size: int) -> Trace | int:
    return 0 if dim == 1 else fold(size, "batch_norm")


def hidden_writes(call: Call) -> list[tuple[torch.Tensor, list[Link]]]:
    """Arguments that a kernel writes to besides those its schema names, with what they depend on
    afterwards."""
    if call.kernel.name not in ("native_batch_norm", "_native_batch_norm_legit", "_batch_norm_with_update"):
        return []
    if not ("training" not in call.kernel.positions or call["training"]):
        return []
    statistic = linked(call, call["input"], _into_statistic)
    running = [call[name] for name in ("running_mean", "running_var") if name in call.kernel.positions]
    return [
        (one, [statistic, linked(call, one, lambda dim, size: dim)])
        for one in running
        if isinstance(one, torch.Tensor)
    ]


def batch_norm_backward(call: Call) -> Links:
    """As `batch_norm`; the gradients of weight and bias sum over the batch."""
    whole = [call["grad_out"], call["input"]]
    vectors = [
        call[name]
        for name in ("weight", "running_mean", "running_var", "save_mean", "save_invstd")
        if isinstance(call[name], torch.Tensor) and len(call.shape(call[name])) == 1
    ]
    statistic = [linked(call, one, _into_statistic) for one in whole]
    into_input = [linked(call, one, lambda dim, size: dim) for one in whole]
    if call["train"]:
        into_input += [
            linked(call, one, lambda dim, size: 1 if dim == 1 else fold(size, "batch_norm")) for one in whole
        ]
    return asked_for(
        call,
        [
            [*into_input, *[linked(call, one, lambda dim, size: 1) for one in vectors]],
            [*statistic, *[linked(call, one, lambda dim, size: 0) for one in vectors]],
            statistic[:1],
        ],
    )


def group_norm(call: Call) -> Links:
    """Mixes all but the batch."""
    of_input = linked(call, call["input"], lambda dim, size: 0 if dim == 0 else None)
    weights = [call[name] for name in ("weight", "bias") if isinstance(call[name], torch.Tensor)]
    out = [of_input, *[linked(call, one, lambda dim, size: 1) for one in weights]]
    return [out, [of_input], [of_input]]


def group_norm_backward(call: Call) -> Links:
    """Sums the gradients of weight and bias over the batch."""
    whole = [call[name] for name in ("grad_out", "input", "mean", "rstd")]
    weights = [call["weight"]] if isinstance(call["weight"], torch.Tensor) else []
    into_input = [linked(call, one, lambda dim, size: 0 if dim == 0 else None) for one in whole]
    into_input += [linked(call, one, lambda dim, size: None) for one in weights]
    into_weight = [
        linked(call, one, lambda dim, size: fold(size, "sum") if dim == 0 else None) for one in whole
    ]
    return asked_for(call, [into_input, into_weight, into_weight[:1]])


def attention(call: Call) -> Links:
    """Batch and heads stay; tokens and features are mixed."""
    lead = list(call.outputs[0].shape[:2])
    every = []
    for one in call.tensors:
        shape = call.shape(one)
        if len(shape) == 4 and list(shape[:2]) == lead:
            every.append(linked(call, one, lambda dim, size: dim if dim < 2 else None))
        else:
            every.append(linked(call, one, lambda dim, size: None))
    return [every for _ in call.outputs]

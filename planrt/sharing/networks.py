"""What the layers of networks need beyond products: softmax, its logarithm, losses, means and norms."""

from __future__ import annotations

import torch

from planrt.errors import SharingError
from planrt.sharing.additive import add_public
from planrt.sharing.curves import curve
from planrt.sharing.masked import mask
from planrt.sharing.products import product, square
from planrt.sharing.quotients import truncate
from planrt.sharing.roots import log, quotient, rsqrt
from planrt.sharing.rounds import Party, Protocol
from planrt.sharing.selection import largest


def mean(party: Party, value: torch.Tensor, dim: int) -> Protocol[torch.Tensor]:
    """Returns the mean along `dim`, kept with size 1, off by less than one unit, in one round."""
    if not value.shape[dim]:
        raise SharingError("the mean of nothing has no value")
    return (yield from truncate(party, value.sum(dim, keepdim=True), value.shape[dim]))


def fixed_product(
    party: Party, function: str, left: torch.Tensor, right: torch.Tensor, scale: int
) -> Protocol[torch.Tensor]:
    """Returns f(x, y) of fixed-point values at their scale, off by less than one unit, in two rounds."""
    factors = yield from mask(party, left, right)
    return (yield from truncate(party, product(party, function, *factors), scale))


def _below_largest(party: Party, value: torch.Tensor, dim: int) -> Protocol[torch.Tensor]:
    top, _ = yield from largest(party, value, dim)
    return value - top.unsqueeze(dim)


def softmax(party: Party, value: torch.Tensor, dim: int, scale: int) -> Protocol[torch.Tensor]:
    """Returns e**x / sum(e**x) along `dim`, off by 1e-4 at a scale of 2**16, for any x with differences below 2**45.

    1. Subtract the largest (`selection.largest`).
    2. e**x of what is left, none above 0 (8 rounds).
    3. Divide by the sum, which lies between 1 and the number of items (16 rounds).
    """
    rest = yield from _below_largest(party, value, dim)
    powers = yield from curve(party, rest, "exp_negative", scale)
    total = powers.sum(dim, keepdim=True)
    return (yield from quotient(party, powers, total, scale, positive=True))


def log_softmax(party: Party, value: torch.Tensor, dim: int, scale: int) -> Protocol[torch.Tensor]:
    """Returns x - log(sum(e**x)) along `dim`, off by 1e-4 and n * 3e-5 for n items, at a scale of 2**16."""
    rest = yield from _below_largest(party, value, dim)
    powers = yield from curve(party, rest, "exp_negative", scale)
    return rest - (yield from log(party, powers.sum(dim, keepdim=True), scale))


def cross_entropy(
    party: Party, logits: torch.Tensor, target: torch.Tensor, scale: int
) -> Protocol[torch.Tensor]:
    """Returns the mean over the batch of -sum(target * log_softmax(logits)), for (batch, classes) both.

    `target` holds a share of probabilities, one-hot rows as a rule, at the scale.
    """
    logged = yield from log_softmax(party, logits, 1, scale)
    factors = yield from mask(party, logged, target)
    total = product(party, "mul", *factors).sum()
    return -(yield from truncate(party, total, scale * len(logits)))


def layer_norm(
    party: Party,
    value: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    scale: int,
    eps: float = 1e-5,
) -> Protocol[torch.Tensor]:
    """Returns (x - mean) / sqrt(var + eps) * weight + bias over the last dimension.

    1. The mean (1 round), the squares of the differences (1 round), their mean with `eps` (1 round).
    2. Its inverse root (14 rounds).
    3. The products (2 rounds, 4 with `weight`).
    """
    size = value.shape[-1]
    centred = value - (yield from mean(party, value, -1))
    (masked,) = yield from mask(party, centred)
    squares = product(party, "mul", masked, masked).sum(-1, keepdim=True)
    variance = yield from truncate(party, squares, scale * size)
    root = yield from rsqrt(party, add_public(party, variance, max(1, round(eps * scale))), scale)
    (factor,) = yield from mask(party, root)
    result = yield from truncate(party, product(party, "mul", masked, factor), scale)
    if weight is not None:
        result = yield from fixed_product(party, "mul", result, weight, scale)
    return result if bias is None else result + bias


def variance(party: Party, value: torch.Tensor, dim: int, scale: int) -> Protocol[torch.Tensor]:
    """Returns the mean square of what differs from the mean along `dim`, kept with size 1, in three rounds."""
    centred = value - (yield from mean(party, value, dim))
    squares = yield from square(party, centred)
    return (yield from truncate(party, squares.sum(dim, keepdim=True), scale * value.shape[dim]))

"""Functions of torch that are written with others before autograd sees them: they come down to operations that would
show values, and need not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import torch.nn.functional as F


def _cross_entropy(
    input: Any,
    target: Any,
    weight: Any = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Any:
    """With class weights and smoothing, of classes in shares: torch selects weights of those that it does not ignore.

    It is (1 - e) times the loss without smoothing, and e / C times that of all C classes, each with its weight; the
    mean is over the weights of the targets.
    """
    secret = getattr(target, "in_shares", False) and not target.is_floating_point()
    legacy = size_average is not None or reduce is not None
    if not secret or weight is None or not label_smoothing or legacy or ignore_index != -100:
        return NotImplemented
    at = 1 if input.dim() > 1 else 0
    line = [-1 if dim == at else 1 for dim in range(input.dim())]
    logarithms = F.log_softmax(input, at)
    # The weights at the scale of the logarithms: that of the classes may be another one.
    known = logarithms.detach() * 0 + weight.reshape(line)
    weights = F.one_hot(target, input.shape[at]).movedim(-1, at).to(input.dtype) * known
    chosen, smooth = (weights * logarithms).sum(at), (logarithms * weight.reshape(line)).sum(at)
    losses = chosen * -(1 - label_smoothing) - smooth * (label_smoothing / input.shape[at])
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.sum() / weights.sum()


_ABOVE: Final[Mapping[Any, Any]] = {F.cross_entropy: _cross_entropy}


def written(func: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
    """Returns what `func` gives where it is written with others for these arguments, else NotImplemented."""
    found = _ABOVE.get(func)
    return NotImplemented if found is None else found(*args, **kwargs)

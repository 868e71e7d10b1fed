"""What all workers of a secure aggregation are asked, as one digest: their masks cancel only where it is the same."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import torch

from planrt.sharing.secure_sum.masks import context_of
from planrt.workers.wire import messages as m


def context(body: m.FitMasked, tensors: Sequence[torch.Tensor]) -> bytes:
    """Returns the digest of a `FitMasked` and its tensors, without what each worker has of its own: the seed of its
    random choices, and the shares that were sealed for it. The tensors are read, so call it before they are trained.
    """
    fit = msgspec.structs.replace(body.fit, seed=0)
    request = msgspec.json.encode([body.sum, body.weighted, body.scale_bits, fit], order="deterministic")
    return context_of(request, tensors)

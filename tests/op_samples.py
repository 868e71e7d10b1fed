"""torch's own samples of its functions, without what its own tests do around each one.

``OpInfo.sample_inputs`` walks the call stack for every function, and seeds all generators, the GPU's too, before each
sample: within a test that takes longer than to make the samples and to run them. Here the generators are seeded once
for each function, so its samples are the same wherever they are made.
"""

from __future__ import annotations

import random
import warnings

import numpy as np
import torch
from torch.testing._internal.opinfo.core import OpInfo, SampleInput


def samples_of(
    op: OpInfo, dtype: torch.dtype, count: int | None = None, *, requires_grad: bool = False
) -> list[SampleInput]:
    """The first `count` samples of `op` on the CPU; all, if that is None."""
    torch.default_generator.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = op.sample_inputs_func(op, "cpu", dtype, requires_grad)
        return list(made) if count is None else [one for _, one in zip(range(count), made, strict=False)]

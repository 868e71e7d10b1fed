"""PyTorch's code for packed sequences, which computes sizes from values: it runs in a plan, and not on pointers."""

from __future__ import annotations

import sys
from types import FrameType

IN_A_PLAN = (
    "rows of several lengths are packed by values: record a plan of the whole, from pack_padded_sequence on "
    "(@planrt.func2plan()), and send that"
)
LAYERS = frozenset(["torch.lstm", "torch.gru", "torch.rnn_tanh", "torch.rnn_relu"])
"""Ops that take packed rows as well."""
_PACKS = ("pack_padded_sequence", "pad_packed_sequence")


def advice() -> str:
    """Returns `IN_A_PLAN` where PyTorch packs rows, or runs a recurrent layer on packed ones, else ``""``: it looks at
    the calls under way.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        file, code = frame.f_code.co_filename.replace("\\", "/"), frame.f_code.co_name
        packs = file.endswith("torch/nn/utils/rnn.py") and code in _PACKS
        if packs or (
            file.endswith("torch/nn/modules/rnn.py") and frame.f_locals.get("batch_sizes") is not None
        ):
            return IN_A_PLAN
        frame = frame.f_back
    return ""

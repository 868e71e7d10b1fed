"""Torch's own Python code under a recorder: where it looks at values, and what it is told.

Modules and functions of torch that are written in Python look at values in a few places, and so do those of
transformers. Some choose a faster way to the same result: they are told to take the general one. Some check
their arguments: a check that only raises sees the values of the run. Everything else is refused under the
public name of what the user called, with what to write.
"""

from __future__ import annotations

import os
import re
import sys
from types import FrameType
from typing import Final

import torch

from planrt.plans.ir.source import is_users

_TORCH: Final = os.path.dirname(os.path.abspath(torch.__file__)) + os.sep

CHOOSES_NESTED: Final = getattr(torch, "_nested_tensor_from_mask_left_aligned", None)
"""What `nn.TransformerEncoder` asks in evaluation mode, given a padding mask: whether to compute on nested
tensors."""

NOT_NESTED: Final = (
    "nn.TransformerEncoder with src_key_padding_mask computes on nested tensors where nobody wants gradients, and "
    "then gives zeros in padded places. A plan does what it does where gradients are wanted; "
    "nn.TransformerEncoder(..., enable_nested_tensor=False) does that everywhere (in nn.Transformer: "
    "encoder.use_nested_tensor = False)"
)

_CHOICES: Final = {
    ("torch.nn.modules.transformer", "_detect_is_causal_mask"),
    ("transformers.masking_utils", "_ignore_causal_mask_sdpa"),
    ("transformers.masking_utils", "_ignore_bidirectional_mask_sdpa"),
    ("transformers.modeling_utils", "warn_if_padding_and_no_attention_mask"),
}
"""(module, function) where False takes a general way, which returns what the special one returns."""

_CHECKS: Final = {
    ("torch.nn.modules.rnn", "get_expected_hidden_size"),
    ("torch.nn.modules.rnn", "get_expected_cell_size"),
}
"""(module, function) whose only use of a value is to raise, as the op that follows does."""

_INSTEAD: Final = {
    **dict.fromkeys(("nn.BatchNorm", "nn.SyncBatchNorm"), "with momentum=None it averages by its count of batches: "
    "give it a number, such as momentum=0.1"),
    "nn.CrossMapLRN2d": "use nn.LocalResponseNorm",
    "nn.TripletMarginWithDistanceLoss": "use nn.TripletMarginLoss, or write it out: F.relu(d(a, p) - d(a, n) + 1)",
    "nn.utils.rnn.p": "pad with F.pad and torch.stack, or before the plan",
    "distributions.": "it checks its arguments: pass validate_args=False",
}  # fmt: skip
"""Beginning of a public name (without ``torch.``) -> why, and what to write."""


def answer(read: str) -> bool | None:
    """Returns what the code that reads a value just now is told: False; True where it may see the value; None
    to refuse.

    `read` is the last part of the name of what reads (``__bool__``).
    """
    frame = _caller()
    place = frame.f_globals.get("__name__", ""), frame.f_code.co_name
    if place in _CHOICES and read in ("__bool__", "__contains__"):
        return False
    return True if place in _CHECKS else None


def asker() -> tuple[str, str] | None:
    """Returns the public name of what in torch makes the call that a recorder sees just now, and what to
    write instead.

    None where the user's own code makes it, or nothing that has a public name.
    """
    frame: FrameType | None = _caller()
    function, module = None, None
    while frame is not None and _is_torchs(frame):
        found = frame.f_locals.get("self")
        if module is None and isinstance(found, torch.nn.Module) and _is_of_torch(type(found)):
            module = f"nn.{type(found).__name__}"
        if not re.search(r"(^|\.)_(?!_init__)|<", frame.f_code.co_qualname):
            function = _public_name(frame.f_globals.get("__name__", "torch"), frame.f_code.co_qualname)
        frame = frame.f_back
    name = module or function
    if name is None:
        return None
    return name, next((text for start, text in _INSTEAD.items() if name.startswith(start)), "")


def is_in(file: str) -> bool:
    """Returns whether the call that a recorder sees just now is made under that file of torch."""
    frame: FrameType | None = _caller()
    while frame is not None and _is_torchs(frame):
        if frame.f_code.co_filename == _TORCH + file.replace("/", os.sep):
            return True
        frame = frame.f_back
    return False


def _public_name(home: str, qualname: str) -> str:
    """``distributions.Normal`` for ``Normal.__init__`` in ``torch.distributions.normal``: what users
    write."""
    word, parts = qualname.partition(".")[0], home.split(".")
    for end in range(1, len(parts)):
        package = ".".join(parts[:end])
        if getattr(sys.modules.get(package), word, None) is not None:
            home = package
            break
    return f"{home}.{qualname}".removeprefix("torch.").removesuffix(".__init__")


def _caller() -> FrameType:
    """The innermost frame above the recorder's own, and above what torch's methods go through."""
    frame = sys._getframe(1)
    while frame.f_back is not None and (
        not (is_users(frame.f_code.co_filename) or _is_torchs(frame))
        or frame.f_globals.get("__name__") in ("torch.overrides", "torch._tensor")
    ):
        frame = frame.f_back
    return frame


def _is_torchs(frame: FrameType) -> bool:
    return frame.f_code.co_filename.startswith(_TORCH)


def _is_of_torch(kind: type) -> bool:
    return kind.__module__.startswith("torch.nn.")

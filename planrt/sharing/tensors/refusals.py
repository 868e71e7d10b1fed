"""What users are told of torch's functions that do not run on shares: by the name that they wrote, with the reason."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.overrides import resolve_name

from planrt.errors import SharingError
from planrt.sharing.tensors.twins import COMPUTED, like
from planrt.types import leaves, map_leaves

_CPU = torch.device("cpu")
_COMPARISONS = frozenset(
    ["lt", "gt", "le", "ge", "eq", "ne", "logical_not", "logical_and", "logical_or", "logical_xor"]
)


_VALUES = "values are with the parties: x.get() opens them"
_MEMORY = "a tensor in shares has no memory here: x.get() has"
NO_MEMORY = {
    **{getattr(torch.Tensor, name): _VALUES for name in ("numpy", "tolist", "__array__", "item")},
    **{
        getattr(torch.Tensor, name): _MEMORY
        for name in ("share_memory_", "is_shared", "storage", "untyped_storage", "data_ptr", "__dlpack__",
                     "__dlpack_device__", "pin_memory", "is_pinned", "set_", "const_data_ptr")
        if hasattr(torch.Tensor, name)
    },
    torch.Tensor.__reduce_ex__: "shares of all parties are not saved in one place: save what x.get() returns",
    torch.Tensor.new: "write x.new_zeros(...)",
}  # fmt: skip
"""Functions that read memory directly, which has no operation below to refuse, and what to write."""


def public_name(func: Any) -> str:
    """Returns a function's name as users write it: ``torch.nn.functional.relu``."""
    found = resolve_name(func) or getattr(func, "__name__", None) or str(func)
    return str(found).removesuffix(".__get__").removesuffix(".__set__")


def named(error: SharingError, func: Any) -> SharingError:
    """Returns `error`, whose message now begins with the function's name or an operation of the same name."""
    name, text = public_name(func), str(error)
    if text.split(" ")[0].strip("_:") != name.rpartition(".")[2].strip("_") and not text.startswith("torch."):
        error.args = (f"{name}: {text}",)
    return error


def explained(error: Exception, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Exception:
    """Returns what to raise where `func` failed with `error` on shares: `error` itself where it fails on plain tensors
    like these, for then it is the call that is wrong; else a SharingError.
    """
    text = str(error)
    if not any(one in text for one in _INSIDE) and (
        any(one in text for one in _OF_AUTOGRAD) or _fails_too(func, args, kwargs)
    ):
        return error
    return SharingError(
        f"{public_name(func)} has no protocol on shares with these arguments, it asks for values: get() the tensor "
        f"first ({text.splitlines()[0][:120] if text else type(error).__name__})"
    )


_INSIDE = ("INTERNAL ASSERT", "data is not allocated", "doesn't have storage", "data pointer")
"""What torch says where it looks for values of tensors that have none."""


_OF_AUTOGRAD = (
    "modified by an inplace operation",
    "backward through the graph a second time",
    "a leaf Variable",
)
"""What it says of what was done to tensors before the call, which the call's arguments do not show."""


def check_drawn(func: Any) -> None:
    """Checks that `func`, an overload of ``bernoulli``, draws with one probability, which all know.

    Raises:
        SharingError: with those of a tensor. What is drawn with a secret one comes of numbers that all parties know,
            and opened with them it tells more of the probability than a draw does.
    """
    if func._overloadname not in ("p", "float"):
        raise SharingError(
            "bernoulli has no protocol on shares with the probabilities of a tensor: draw with those that all know by "
            "torch.bernoulli(p) on a plain tensor; with secret ones write (x > torch.rand(x.shape)), whose numbers all "
            "parties know"
        )


def _fails_too(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Returns whether `func` fails on plain tensors like these, or they are too large to try."""
    tensors = [leaf for leaf in leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    if sum(one.numel() for one in tensors) > COMPUTED:
        return True

    def plain(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        made = (
            like(leaf, leaf.dtype, _CPU).detach()
            if getattr(leaf, "in_shares", False)
            else leaf.detach().clone()
        )
        return made.requires_grad_(leaf.requires_grad)

    try:
        with torch._C.DisableTorchFunctionSubclass(), torch.enable_grad():
            func(*map_leaves(tuple(args), plain), **map_leaves(dict(kwargs), plain))
    except Exception:
        return True
    return False


def check_made(module: torch.nn.Module) -> None:
    """Raises SharingError unless all parameters of a module are there."""
    if any(torch.nn.parameter.is_lazy(one) for one in (*module.parameters(), *module.buffers())):
        raise SharingError(
            f"{type(module).__name__}: its parameters are not there yet: call it once on a plain tensor, then share it"
        )


MOST_ENTRIES = 1 << 27
"""Entries of a result in shares (8 bytes each at a party, and several times that while it is computed)."""


def check_size(kernel: str, result: Any) -> None:
    """Raises SharingError where a result is larger than parties have memory for: they would end, not say so."""
    for one in leaves(result):
        if isinstance(one, torch.Tensor) and one.numel() > MOST_ENTRIES:
            raise SharingError(
                f"{kernel}: the result has {one.numel():,} entries, of shape {list(one.shape)}; in shares it has "
                f"{MOST_ENTRIES:,} at most: compute with fewer at a time"
            )


def check_shared_size(shape: Sequence[int]) -> None:
    """Raises SharingError where a tensor of that shape has more entries than shares have: parties would say so later,
    and the session be over."""
    if (entries := math.prod(shape)) > MOST_ENTRIES:
        raise SharingError(
            f"the tensor has {entries:,} entries, of shape {list(shape)}; in shares it has {MOST_ENTRIES:,} at most: "
            "share it in pieces"
        )


def check_whole(
    kernel: str, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any, *, in_place: bool
) -> None:
    """Checks that whole numbers in shares stay such: torch would cut fractions off, which nobody can see to here.

    Raises:
        SharingError: the result has whole numbers, and an operand is a fraction.
    """
    if not isinstance(result, torch.Tensor) or result.dtype != torch.int64 or kernel in _COMPARISONS:
        return
    if kernel == "pow" and getattr(args[1], "in_shares", False):
        raise SharingError("pow: powers with an exponent in shares are fractions there: write x.float() ** y")
    if "avg_pool" in kernel or any(_is_fraction(one, secret=in_place) for one in leaves((args, kwargs))):
        raise SharingError(
            f"{kernel}: the result has whole numbers in shares, which are not rounded there: write x.float(), or give "
            "whole numbers"
        )


def _is_fraction(leaf: Any, *, secret: bool) -> bool:
    if isinstance(leaf, float):
        return not leaf.is_integer()
    if not isinstance(leaf, torch.Tensor) or not leaf.is_floating_point():
        return False
    return secret if getattr(leaf, "in_shares", False) else bool((leaf != leaf.round()).any())

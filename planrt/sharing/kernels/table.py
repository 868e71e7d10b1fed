"""The table of kernels, and the one way to call one: in this process or at a party, in place or not."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Any

import torch

from planrt.errors import SharingError
from planrt.sharing.kernels.arithmetic import ARITHMETIC, Kernel
from planrt.sharing.kernels.layers import LAYERS
from planrt.sharing.kernels.losses import LOSSES
from planrt.sharing.kernels.ordering import ORDERING
from planrt.sharing.kernels.orders import ORDERS
from planrt.sharing.kernels.parts import Context, Share, aligned
from planrt.sharing.kernels.pooling import POOLING
from planrt.sharing.kernels.powers import POWERS
from planrt.sharing.kernels.shapes import SHAPES, VIEWS
from planrt.sharing.rounds import Protocol
from planrt.types import leaves, map_leaves

KERNELS: dict[str, Kernel] = {
    **ARITHMETIC,
    **POWERS,
    **SHAPES,
    **ORDERING,
    **ORDERS,
    **POOLING,
    **LAYERS,
    **LOSSES,
}
"""ATen name, without "aten::" and the underscore of operations in place -> protocol."""

__all__ = ["KERNELS", "VIEWS", "call_kernel", "check_arguments"]


_CURVES = "write it with relu, sigmoid, tanh, exp or gelu"
_VALUES = "it would show values: get() the tensor first"
_ORDER = "take sort, topk, median or kthvalue, or compare and add up"
_ROUNDED = "nothing is rounded to whole numbers there: get() the tensor first"
_BITS = (
    "of bits a and b write a * b, a + b - a * b and 1 - a, or torch.logical_and, logical_or and logical_not"
)
_DRAWN = (
    "numbers that nobody knows are not drawn there: write torch.rand(x.shape), or another public tensor, and add or "
    "multiply it"
)
_INSTEAD: dict[str, tuple[str, str]] = {
    "_local_scalar_dense": ("reading a value (item, float, if, a place in public tensors)", _VALUES),
    "_unique2": ("unique", _VALUES),
    **{name: (name, _VALUES) for name in ("nonzero", "equal", "allclose", "is_nonzero")},
    "bincount": ("bincount", "its length would show values: write torch.nn.functional.one_hot(x, classes).sum(0)"),
    **{name: (name, _ORDER) for name in ("mode", "cummax", "cummin")},
    **{name: (name, _ROUNDED) for name in ("round", "floor", "ceil", "trunc", "frac", "remainder", "fmod")},
    "floor_divide": ("//", _ROUNDED),
    **{f"bitwise_{name}": (sign, _BITS) for name, sign in (("and", "&"), ("or", "|"), ("xor", "^"), ("not", "~"))},
    **{
        name: (name, _DRAWN)
        for name in ("rand_like", "randn_like", "randint_like", "uniform", "normal", "random", "exponential", "cauchy",
                     "log_normal", "geometric", "poisson", "binomial", "multinomial", "rrelu_with_noise")
    },
    **{name: (name, _CURVES) for name in ("sin", "cos", "tan", "atan", "erfinv", "lgamma")},
}  # fmt: skip
"""ATen name of what is often asked for and not there -> what people call it, and what to write instead."""


def no_protocol(name: str, called: str = "") -> SharingError:
    """Returns the error for an operation of ATen that has no kernel; `called` is what to call it, if not as usual."""
    public, instead = _INSTEAD.get(name, (name, "open the operands with get(), or write it without"))
    return SharingError(f"{called or public} has no protocol on shares: {instead}")


_NESTED = (tuple, list, dict, slice)


@cache
def signature(name: str) -> inspect.Signature:
    """Returns what a kernel takes, its context first."""
    return inspect.signature(KERNELS[name])


def check_arguments(
    name: str, args: Sequence[Any], kwargs: dict[str, Any], *, shares: type = Share
) -> frozenset[int | str]:
    """Returns which arguments (by place or name) are shares alone; what stands for a secret is of the class `shares`.

    Raises:
        SharingError: there is no kernel `name`, it does not take so many and such named arguments, or one is in shares
            that all parties are to know.
    """
    if name not in KERNELS:
        raise no_protocol(name)
    misfit, known, secret = _form(name, len(args), tuple(kwargs))
    if misfit:
        raise SharingError(f"{name} has no protocol on shares with these arguments: {misfit}")
    for place, parameter in known:
        given = args[place] if isinstance(place, int) else kwargs[place]
        if isinstance(given, (shares, *_NESTED)) and any(isinstance(one, shares) for one in leaves(given)):
            which = (
                "operands besides the first"
                if parameter in ("args", "kwargs", "arguments", "_")
                else parameter
            )
            raise SharingError(
                f"{name} has no protocol on shares with {which} in shares: get() that, so that all parties know it"
            )
    return secret


@lru_cache(maxsize=4096)
def _form(
    name: str, count: int, names: tuple[str, ...]
) -> tuple[str, tuple[tuple[int | str, str], ...], frozenset[int | str]]:
    """Of a call with so many and such named arguments: why a kernel does not take them, if it does not; those that all
    parties know, with their parameters; and those that are shares alone. By the annotations; asked at every call.
    """
    places: list[int | str] = [*range(count), *names]
    try:
        bound = signature(name).bind(None, *places[:count], **dict(zip(names, names, strict=True)))
    except TypeError as error:
        return str(error), (), frozenset()
    known, secret = [], []
    for parameter, given in list(bound.arguments.items())[1:]:
        told = str(signature(name).parameters[parameter].annotation)
        found = list(given) if isinstance(given, tuple | dict) else [given]
        if not re.search(r"\b(Value|Share|Any)\b", told):
            known += [(one, parameter) for one in found]
        elif told == "Share":
            secret += found
    return "", tuple(known), frozenset(secret)


def call_kernel(
    context: Context, name: str, args: Sequence[Any], kwargs: dict[str, Any], *, in_place: bool = False
) -> Protocol[Any]:
    """Runs a kernel on a party's shares: `Share`s among nested arguments, everything else as all know it.

    Returns:
        A `Share`, None where there is no result, or a tuple of these, none of them an argument; the first argument,
        changed, if `in_place`.

    Raises:
        SharingError: no such kernel, other arguments, or a result of another shape than what it is to replace.
    """
    if any(type(one) is torch.Tensor for one in (*args, *kwargs.values())):
        args, kwargs = [_wide(one) for one in args], {key: _wide(one) for key, one in kwargs.items()}
    for place in check_arguments(name, args, kwargs):
        given = args[place] if isinstance(place, int) else kwargs[place]
        if not isinstance(given, torch.Tensor | int | float):
            continue
        if isinstance(place, int):
            args = [*args[:place], context.share_of(given), *args[place + 1 :]]
        else:
            kwargs = {**kwargs, place: context.share_of(given)}
    changed = args[0] if args else None
    if name not in VIEWS and any(map(_is_fine, (*args, *kwargs.values()))):
        args, kwargs = _kept_fine(args, kwargs)
    made = yield from KERNELS[name](context, *args, **kwargs)
    if not in_place:
        return _apart(made, args)
    if not isinstance(changed, Share) or not isinstance(made, Share) or made.shape != changed.shape:
        raise SharingError(f"{name}: the result does not fit in place")
    yield from aligned(context, changed, made)
    changed.become(made)
    return changed


_NARROW = frozenset({torch.uint8, torch.int8, torch.int16, torch.int32, torch.uint16, torch.uint32})


def _wide(given: Any) -> Any:
    """Whole numbers that all know as int64, as those in shares are: a kernel's product or difference of narrower ones
    would wrap. Places in a list stay as they are: of uint8 they are a mask.
    """
    return given.long() if type(given) is torch.Tensor and given.dtype in _NARROW else given


def _is_fine(given: Any) -> bool:
    """Whether an argument is, or has in it, a share that is kept fine."""
    if isinstance(given, Share):
        return given.fine
    return isinstance(given, _NESTED) and any(isinstance(one, Share) and one.fine for one in leaves(given))


def _kept_fine(args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Sequence[Any], dict[str, Any]]:
    """The arguments with others for those shares that are kept fine: an operation that brings its operands back to the
    session's scale must not do that to an optimizer's means.
    """
    twins: dict[int, Share] = {}

    def twin(leaf: Any) -> Any:
        if not isinstance(leaf, Share) or not leaf.fine:
            return leaf
        if id(leaf) not in twins:
            made = twins[id(leaf)] = Share(leaf.part, leaf.scale, leaf.masked, bit=leaf.bit, known=leaf.known)
            made.fine = True
        return twins[id(leaf)]

    return map_leaves(tuple(args), twin), map_leaves(kwargs, twin)


def _apart(made: Any, args: Sequence[Any]) -> Any:
    """A share that a kernel gives as it took it, as one of its own."""
    if isinstance(made, tuple):
        return tuple(_apart(one, args) for one in made)
    for one in args:
        if made is one and isinstance(made, Share):
            return made.copied()
    return made

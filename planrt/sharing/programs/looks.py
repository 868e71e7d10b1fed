"""What a run of a program depends on, of the numbers and tensors that all know: their sizes, in most places.

A training loop gives other batches, labels and step sizes to the same program. Where a kernel's rounds and requests do
not depend on such a value itself, what was found out about one step (`needs`) serves the next one, though its values
are others. Where they do, or where that is not known, the value itself counts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import lru_cache
from typing import Any, Final, NamedTuple

import torch

from planrt.errors import SharingError
from planrt.sharing.kernels.parts import Share, digest
from planrt.sharing.kernels.sizes import Drawn, Varying, is_short, size_of
from planrt.sharing.kernels.table import VIEWS
from planrt.sharing.programs.calls import Call, Program
from planrt.sharing.programs.running import Failed
from planrt.types import Ref, leaves

Place = int | str
"""Of an argument: by position, or by name."""

NUMBERS: Final[dict[str, frozenset[Place]]] = {
    "add": frozenset({1, "alpha"}),
    "sub": frozenset({1, "alpha"}),
    "mul": frozenset({1}),
    "div": frozenset({1}),
    "addcdiv": frozenset({"value"}),
    "lerp": frozenset({2}),
    "bernoulli": frozenset({"seed"}),
}
"""Kernel -> where it takes a `Varying` number, of which nothing but its result depends on more than the exponent, or a
`Drawn` seed.
"""


def may_vary(name: str, place: Place, args: Sequence[Any], is_share: Callable[[Any], bool]) -> bool:
    """Returns whether a call of kernel `name` takes a `Varying` number at a place; `is_share` tells it of arguments."""
    if place not in NUMBERS.get(name, ()):
        return False
    return place != "alpha" or (len(args) > 1 and is_share(args[1]))


def varies(number: Any) -> bool:
    """Returns whether an argument can be a `Varying` number, or is a `Drawn` seed; other numbers are taken exactly."""
    if type(number) in (float, Varying):
        return math.isfinite(number) and not is_short(number)
    return type(number) is Drawn


class _Use(NamedTuple):
    """Of an operand, by a call: as the argument at a place, or in a list among its arguments."""

    call: Call
    place: Place | None


@lru_cache(maxsize=256)
def _uses(program: Program) -> tuple[tuple[_Use, ...], ...]:
    """The uses of each operand."""
    found: list[list[_Use]] = [[] for _ in range(program.operands)]
    for call in program.calls:
        arguments: list[tuple[Place, Any]] = [*enumerate(call.args), *call.kwargs.items()]
        for place, one in arguments:
            where = place if type(one) is Ref else None
            for number in dict.fromkeys(ref.index for ref in leaves(one) if type(ref) is Ref):
                if number < program.operands:
                    found[number].append(_Use(call, where))
    return tuple(tuple(one) for one in found)


def check_numbers(program: Program, operands: Sequence[Any]) -> None:
    """Raises SharingError unless those `operands` that are numbers are used where such may be."""
    uses = _uses(program)

    def is_share(one: Any) -> bool:
        return type(one) is Ref and (
            one.index >= program.operands or isinstance(operands[one.index], Share | Failed)
        )

    for number, value in enumerate(operands):
        if not isinstance(value, Varying | Drawn):
            continue
        if not varies(value):
            raise SharingError(
                f"the number {float(value)} is no operand of a program on shares: write it in the call"
            )
        for call, place in uses[number]:
            fits = (place == "seed") == isinstance(value, Drawn)
            if place is None or not fits or not may_vary(call.name, place, call.args, is_share):
                raise SharingError(
                    f"{call.name} takes no number there that is an operand: write it in the call"
                )


_HIDES: Final = frozenset({
    "add", "sub", "rsub", "mul", "div", "neg", "mm", "bmm", "mv", "dot", "addmm", "addmv", "baddbmm", "addcmul",
    "addcdiv", "lerp", "sum", "mean", "cumsum", "var", "std", "convolution", "convolution_backward", "relu", "sigmoid",
    "tanh", "silu", "gelu", "erf", "exp", "log", "sqrt", "rsqrt", "reciprocal", "_softmax", "_log_softmax", "logsumexp",
    "threshold_backward", "sigmoid_backward", "tanh_backward", "_softmax_backward_data", "_log_softmax_backward_data",
    "gelu_backward", "silu_backward", "mse_loss", "mse_loss_backward", "nll_loss_backward", "nll_loss2d_backward",
    "native_layer_norm", "avg_pool2d", "where", "masked_fill", "maximum", "minimum",
    "abs", "index", "index_put", "_index_put_impl", "index_select", "gather", "embedding", "embedding_dense_backward",
    "cat", "stack", "flip", "roll", "repeat", "clone", "refresh", *VIEWS,
})  # fmt: skip
"""Kernels whose results nobody knows, if nobody knows one of their operands; of a convolution's gradients that is the
first one, which both of them come of.
"""


@lru_cache(maxsize=256)
def secret_values(program: Program, public: frozenset[int]) -> frozenset[int]:
    """Returns values of `program` that nobody knows, if nobody knows the operands that are not `public`: no kernel
    keeps with them what they are (`Share.known`). There may be more.
    """
    found = {number for number in range(program.operands) if number not in public}
    for call, reads, makes in zip(program.calls, program.reads, program.makes, strict=True):
        of: Sequence[int] = reads
        if call.name == "convolution_backward":
            of = [one for place, one in call.direct if place == 0]
        if call.name in _HIDES and not found.isdisjoint(of):
            found.update(makes)
        elif call.in_place:  # what it changed may be known from here on, by whatever name
            found.difference_update([*range(program.operands), call.args[0].index])
    return frozenset(found)


def _is_power_of_two(scale: int) -> bool:
    return not scale & (scale - 1)


def _range(largest: float, scale: int) -> tuple[int, ...]:
    """Tells whether a value is in the range of shares, at every scale that comes up: powers of `scale`, times those of
    two. Of a power of two the exponent of the value itself does.
    """
    if _is_power_of_two(scale):
        return ()
    return tuple(math.frexp(largest * scale**power)[1] for power in (1, 2, 3))


class _Given(NamedTuple):
    """A public tensor among the arguments of a call."""

    value: torch.Tensor
    call: Call
    place: int | None
    secret: frozenset[int]
    scale: int

    def size(self, value: torch.Tensor | None = None) -> Hashable:
        """What a product with it, or a sum, depends on; of another `value` that is computed from it."""
        one = self.value if value is None else value
        if _is_power_of_two(self.scale):
            return size_of(one)
        return (size_of(one), *_range(float(one.double().abs().max()), self.scale))

    def other_is_secret(self, place: int) -> bool:
        one = self.call.args[place] if place < len(self.call.args) else None
        return type(one) is Ref and one.index in self.secret

    def lacks(self, *places: Place) -> bool:
        """Whether the call has no such arguments."""
        args, kwargs = self.call.args, self.call.kwargs
        return all(
            kwargs.get(one) is None if isinstance(one, str) else one >= len(args) or args[one] is None
            for one in places
        )


def _size(given: _Given) -> Hashable:
    return given.size()


def _factor(first: int, second: int) -> Callable[[_Given], Hashable]:
    """The size of one of two factors; where all know the other one, too, they know the product."""

    def look(given: _Given) -> Hashable:
        other = second if given.place == first else first
        return given.size() if given.other_is_secret(other) else None

    return look


def _term(given: _Given) -> Hashable:
    return given.size() if given.call.kwargs.get("alpha", 1) == 1 or given.place == 0 else None


def _bias(given: _Given) -> Hashable:
    return given.size() if given.lacks("beta", "alpha") else None


def _divisor(given: _Given) -> Hashable:
    if not given.other_is_secret(0) or bool((given.value == 0).any()):
        return None
    return given.size(1 / given.value.double())


def _target(weights: tuple[Place, ...]) -> Callable[[_Given], Hashable]:
    """Of a loss, which has no weights beside it."""
    return lambda given: given.size() if given.other_is_secret(0) and given.lacks(*weights) else None


def _loss_gradient(given: _Given) -> Hashable:
    return given.size() if given.other_is_secret(1) and given.lacks(3) else None


def _classes(place: int, weight: int) -> Callable[[_Given], Hashable]:
    """How many are not ignored: a mean divides by that."""

    def look(given: _Given) -> Hashable:
        whole = not given.value.is_floating_point() and len(given.call.args) > place + 3
        if not whole or not given.lacks(weight) or not given.other_is_secret(place - 1):
            return None
        return int((given.value != given.call.args[place + 3]).sum())

    return look


def _anything(given: _Given) -> Hashable:
    return "any"


def _places(given: _Given) -> Hashable:
    """Of places that are read or written, each by a number: how many, and not which."""
    return None if given.value.dtype in (torch.bool, torch.uint8) else "any"


_TENSORS: Final[dict[tuple[str, int | None], Callable[[_Given], Hashable]]] = {
    **{(name, place): _factor(0, 1) for name in ("mul", "mm", "bmm", "mv", "dot", "convolution") for place in (0, 1)},
    **{(name, place): _factor(1, 2) for name in ("addmm", "addmv", "baddbmm") for place in (1, 2)},
    **{("convolution_backward", place): _factor(0, place) for place in (1, 2)},
    **{(name, 0): _bias for name in ("addmm", "addmv", "baddbmm")},
    ("convolution", 2): _size,
    **{(name, place): _term for name in ("add", "sub") for place in (0, 1)},
    ("div", 1): _divisor,
    **{(name, place): _size for name in ("lt", "gt", "le", "ge", "eq", "ne") for place in (0, 1)},
    ("mse_loss", 1): _size,
    ("mse_loss_backward", 2): _size,
    ("binary_cross_entropy", 1): _target((2,)),
    ("binary_cross_entropy_backward", 2): _loss_gradient,
    ("binary_cross_entropy_with_logits", 1): _target((2, 3)),
    **{(name, 1): _classes(1, 2) for name in ("nll_loss_forward", "nll_loss2d_forward")},
    **{(name, 2): _classes(2, 3) for name in ("nll_loss_backward", "nll_loss2d_backward")},
    ("where", 0): _anything,
    ("masked_fill", 1): _anything,
    ("index_select", 2): _places,
    ("gather", 2): _places,
    ("embedding", 1): _places,
    ("embedding_dense_backward", 1): _places,
    ("index", None): _places,
    ("index_put", None): _places,
    ("_index_put_impl", None): _places,
}  # fmt: skip
"""Kernel and place of an argument (None in a list) -> what its rounds and requests depend on, of a tensor that all know
there: None where that is the tensor itself.
"""


_PLAIN: Final = frozenset({
    torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.bool, torch.uint8, torch.int8, torch.int16,
    torch.int32, torch.int64,
})  # fmt: skip


def public_looks(program: Program, operands: Sequence[Any], *, scale: int) -> Iterator[Hashable]:
    """Yields what a run of `program` depends on, of each of its `operands` that is no `Share`."""
    public = frozenset(number for number, one in enumerate(operands) if not isinstance(one, Share))
    exact = any(isinstance(one, Share) and one.known is not None for one in operands)
    for number in sorted(public):
        one = operands[number]
        if isinstance(one, Varying):
            yield number, "number", one.exponent, *_range(one, scale)
        elif isinstance(one, Drawn):
            yield number, "seed"
        elif isinstance(one, torch.Tensor):
            looks = None if exact else _looks(program, number, one, public, scale)
            yield number, one.dtype, one.shape, digest(one) if looks is None else looks
        else:
            yield number, type(one), str(one.error) if isinstance(one, Failed) else repr(one)


def _looks(
    program: Program, number: int, value: torch.Tensor, public: frozenset[int], scale: int
) -> Hashable:
    """None where it is the tensor itself."""
    if value.dtype not in _PLAIN or not value.numel():
        return None
    if value.is_floating_point() and not bool(value.isfinite().all()):
        return None
    secret = secret_values(program, public)
    found = []
    for call, place in _uses(program)[number]:
        if isinstance(place, str):
            return None
        look = _TENSORS.get((call.name, place))
        one = None if look is None else look(_Given(value, call, place, secret, scale))
        if one is None:
            return None
        found.append(one)
    return tuple(found)

"""What an op's results will be like, told from its arguments' specs, without any values.

Ops run on *meta* tensors (shape, stride, dtype and autograd flags, no memory), so torch itself says what
comes out, and raises its own errors for shapes and dtypes that do not fit, at the line that made the mistake.
Results are cached by (op, grad mode, specs and constants of the arguments).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from planrt.plans.ir.ops import RESULTS_FOLLOW_FLOATS
from planrt.serde.dtypes import DTYPE_NAMES
from planrt.serde.values import DEVICE
from planrt.tracebacks import shorten
from planrt.types import leaves, map_leaves


class Spec:
    """Shape, stride, dtype and autograd flags of a remote tensor. Equal specs are the same object
    (`spec`)."""

    __slots__ = ("dtype", "leaf", "requires_grad", "shape", "stride")

    def __init__(
        self,
        shape: tuple[int, ...],
        stride: tuple[int, ...],
        dtype: torch.dtype,
        requires_grad: bool,
        leaf: bool,
    ) -> None:
        self.shape = shape
        self.stride = stride
        self.dtype = dtype
        self.requires_grad = requires_grad
        self.leaf = leaf

    def __repr__(self) -> str:
        return f"{DTYPE_NAMES[self.dtype]}{list(self.shape)}"

    @staticmethod
    def of(tensor: torch.Tensor) -> Spec:
        """Returns the spec of a tensor that is here, or on the meta device."""
        return spec(tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.requires_grad, tensor.is_leaf)

    def twin(self) -> torch.Tensor:
        """Makes a new meta tensor like the remote one."""
        made = torch.empty_strided(
            self.shape,
            self.stride,
            dtype=self.dtype,
            device="meta",
            requires_grad=self.requires_grad and self.leaf,
        )
        if self.requires_grad and not self.leaf:  # in-place ops may change it, unlike a leaf
            with torch.enable_grad():
                made = made.requires_grad_().clone().as_strided(self.shape, self.stride)
        return made


_specs: dict[tuple[Any, ...], Spec] = {}


def spec(
    shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype, requires_grad: bool, leaf: bool
) -> Spec:
    """Returns the one `Spec` with these properties."""
    key = (shape, stride, dtype, requires_grad, leaf)
    found = _specs.get(key)
    if found is None:
        if len(_specs) >= _CACHE_SIZE:
            _specs.clear()
            _cache.clear()
        found = _specs[key] = Spec(*key)
    return found


@dataclass(frozen=True, slots=True)
class Same:
    """A result that is one of the operands itself, changed in place or not at all."""

    operand: int


@dataclass(frozen=True, slots=True)
class Inferred:
    """The foreseen results of an op: `results` nests `Spec`s, `Same`s and constants as the op nests its
    results."""

    results: Any
    changed: tuple[tuple[int, Spec], ...]
    """Operands whose own shape, dtype or flags change in place."""


class _UnforeseeableError(Exception):
    """The results cannot be told without values: the worker must be asked."""


_CACHE_SIZE = 20_000
_CACHED_LENGTH = 1_000
"""Arguments of an op, lists counted by their items and texts by their characters."""
_cache: dict[Any, Inferred] = {}


def infer(
    name: str,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    operand_type: type,
) -> Inferred | None:
    """Infers what `function` returns for arguments whose tensors are of `operand_type` and carry a `_spec`.

    None where only the worker can tell. Operands are numbered in the order of `planrt.types.leaves`, args
    before kwargs.

    Raises:
        Whatever torch raises for arguments that do not fit.
    """
    floats = name in RESULTS_FOLLOW_FLOATS
    try:
        key = (
            name,
            torch.is_grad_enabled(),
            *[argument_key(arg, operand_type, floats) for arg in args],
            *[(word, argument_key(arg, operand_type, floats)) for word, arg in kwargs.items()],
        )
        found = _cache.get(key)
    except TypeError:  # an argument without a hash: not cached
        key, found = (), None
    if found is None:
        try:
            found = _infer(function, args, kwargs, operand_type)
        except _UnforeseeableError:
            return None
        if key and is_short(args, kwargs):
            if len(_cache) >= _CACHE_SIZE:
                _cache.clear()
            _cache[key] = found
    return found


def is_short(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Returns whether arguments are few and short enough to be kept as the key of a cache: who may choose them must
    not fill memory with them."""
    length = 0
    for leaf in leaves((tuple(args), dict(kwargs))):
        length += 1 + (len(leaf) if isinstance(leaf, str) else 0)
        if length > _CACHED_LENGTH:
            return False
    return True


def argument_key(value: Any, operand_type: type, floats: bool) -> Any:
    """Returns what an argument adds to the key of a cache of results. Finite floats count only with
    `floats`."""
    kind = type(value)
    if issubclass(kind, operand_type):
        return value._spec
    if kind is int or kind is bool or kind is str:
        return (kind, value)
    if value is None:
        return None
    if kind is float and not floats and math.isfinite(value):
        return float
    if issubclass(kind, tuple | list):
        return (kind, *[argument_key(item, operand_type, floats) for item in value])
    if kind is slice:
        return (
            "slice",
            *[argument_key(part, operand_type, floats) for part in (value.start, value.stop, value.step)],
        )
    if kind is dict:
        return ("dict", *[(word, argument_key(item, operand_type, floats)) for word, item in value.items()])
    return (kind, getattr(value, "cache_key", value))  # what is large is not kept for a key's sake


def _infer(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], operand_type: type
) -> Inferred:
    twins: list[torch.Tensor] = []
    specs: list[Spec] = []
    by_identity: dict[int, torch.Tensor] = {}

    def twin_of(leaf: Any) -> Any:
        if isinstance(leaf, operand_type):
            twin = by_identity.get(id(leaf))
            if twin is None:
                twin = by_identity[id(leaf)] = leaf._spec.twin()  # type: ignore[attr-defined]
            twins.append(twin)
            specs.append(leaf._spec)  # type: ignore[attr-defined]
            return twin
        return "meta" if leaf is DEVICE or isinstance(leaf, torch.device) else leaf

    twin_args, twin_kwargs = map_leaves(args, twin_of), map_leaves(kwargs, twin_of)
    try:
        result = function(*twin_args, **twin_kwargs)
    except Exception as error:
        if needs_values(error):
            raise _UnforeseeableError from error
        shorten(error)
        raise error.with_traceback(None) from None  # torch's way through its meta kernels helps nobody

    def seen(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        for number, twin in enumerate(twins):
            if leaf is twin:
                return Same(number)
        if leaf.device.type != "meta":
            raise _UnforeseeableError
        return Spec.of(leaf)

    results = _map_results(result, seen)
    changed = []
    for number, (twin, before) in enumerate(zip(twins, specs, strict=True)):
        after = Spec.of(twin)
        if after is not before:
            changed.append((number, after))
    return Inferred(results, tuple(changed))


def needs_values(error: Exception) -> bool:
    """Returns whether an op that failed on meta tensors did so because it needs values, not because its
    arguments are wrong."""
    if isinstance(error, NotImplementedError):
        return True
    return "meta" in str(error).lower() or type(error).__module__.startswith("torch.")


def _map_results(value: Any, change: Callable[[Any], Any]) -> Any:
    """`value` with `change` applied to its leaves; torch's named tuples stay what they are."""
    if isinstance(value, tuple):
        parts = [_map_results(item, change) for item in value]
        return tuple(parts) if type(value) is tuple else _Named(type(value), tuple(parts))
    if isinstance(value, list):
        return [_map_results(item, change) for item in value]
    return change(value)


@dataclass(frozen=True, slots=True)
class _Named:
    kind: type
    parts: tuple[Any, ...]


def rebuild(results: Any, change: Callable[[Any], Any]) -> Any:
    """Rebuilds the nested value that `results` of an `Inferred` describes, with `change` applied to its
    leaves, in order."""
    if isinstance(results, _Named):
        return results.kind([rebuild(part, change) for part in results.parts])
    if isinstance(results, tuple):
        return tuple([rebuild(part, change) for part in results])
    if isinstance(results, list):
        return [rebuild(part, change) for part in results]
    return change(results)

"""Hostile arguments for an op of the table: from torch's samples and signatures, drawn from a seed.

What torch itself takes as an example of a function reaches deep into its kernels, so most calls are such a sample with
some of its arguments exchanged for hostile ones. Functions without samples get arguments of the kinds that their
signatures name.
"""

from __future__ import annotations

import inspect
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any, Final

import numpy
import torch

from planrt.serde.dtypes import DTYPE_NAMES, DTYPES
from planrt.types import leaves, map_leaves

Arguments = tuple[tuple[Any, ...], dict[str, Any]]

_SAMPLES: Final = 6
_SEED: Final = 1234
"""The seed that torch's samples have before each one."""
_SMALL: Final = (-3, -2, -1, 0, 0, 1, 1, 1, 2, 2, 3, 4, 5, 8, 16)
_LARGE: Final = (
    -(2**63), -(2**31), -1000, -100, 63, 64, 65, 127, 255, 257, 1000, 2**15, 65_537, 2**31 - 1, 2**31, 2**32 + 1,
    2**40, 2**62, 2**63 - 1,
)  # fmt: skip
_FLOATS: Final = (
    0.0,
    -0.0,
    1.0,
    -1.0,
    0.5,
    2.0,
    1e-8,
    1e30,
    1e300,
    -1e300,
    float("nan"),
    float("inf"),
    float("-inf"),
)
_WORDS: Final = (
    "none", "mean", "sum", "batchmean", "amax", "amin", "prod", "reflect", "replicate", "constant", "circular", "zeros",
    "border", "bilinear", "nearest", "nearest-exact", "bicubic", "trilinear", "area", "linear", "ij", "xy", "left",
    "right", "trunc", "floor", "reduced", "complete", "r", "full", "same", "valid", "fro", "nuc", "tanh", "relu",
    "backward", "forward", "ortho", "unknown",
)  # fmt: skip
_EQUATIONS: Final = (
    "ij,jk->ik",
    "ii",
    "ii->i",
    "i,i->",
    "...i->...",
    "ij",
    "i,j",
    "abc,cd->abd",
    "",
    ",",
    "->",
    "ij->zz",
)
_SIZES: Final = (0, 1, 1, 1, 2, 2, 3, 3, 4, 5, 7)
_DTYPES: Final = tuple(DTYPES.values())


class Draw:
    """Random arguments; the same for the same seed, in any process."""

    def __init__(self, seed: str) -> None:
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(self.random.getrandbits(40))
        self._shape: tuple[int, ...] = ()

    def chance(self, probability: float) -> bool:
        """True with that probability."""
        return self.random.random() < probability

    def integer(self) -> int:
        """Mostly small, at times as large as a message can carry."""
        return self.random.choice(_SMALL if self.chance(0.75) else _LARGE)

    def number(self) -> Any:
        """Any number, or a truth value."""
        kind = self.random.randrange(3)
        return (self.integer(), self.random.choice(_FLOATS), self.chance(0.5))[kind]

    def shape(self) -> tuple[int, ...]:
        """Often that of the tensor before, or one that broadcasts with it; at times a size is large."""
        known = self._shape
        if known and self.chance(0.5):
            made = tuple([1 if self.chance(0.2) else size for size in known])
            made = made[self.random.randrange(len(made)) :] if self.chance(0.2) else made
        else:
            made = tuple([self.random.choice(_SIZES) for _ in range(self.random.randrange(6))])
        if made and self.chance(0.1):
            place = self.random.randrange(len(made))
            made = (*made[:place], self.random.choice((0, 17, 64, 129)), *made[place + 1 :])
        self._shape = made
        return made

    def tensor(self, shape: tuple[int, ...] | None = None, dtype: torch.dtype | None = None) -> torch.Tensor:
        """A tensor that can be sent, with values that kernels do not expect among them."""
        shape = self.shape() if shape is None else shape
        if dtype is None:
            common = self.random.choice((torch.float32, torch.float32, torch.float64, torch.int64))
            dtype = common if self.chance(0.8) else self.random.choice(_DTYPES)
        if dtype.is_floating_point or dtype.is_complex:
            values = torch.randn(shape, generator=self.generator, dtype=torch.float64)
            if values.numel() and self.chance(0.15):
                values.view(-1)[self.random.randrange(values.numel())] = self.random.choice(_FLOATS)
            return values.to(dtype)
        low, high = self.random.choice(((0, 2), (0, 5), (-3, 4), (0, 200), (-(2**62), 2**62)))
        return torch.randint(low, high, shape, generator=self.generator).to(dtype)

    def like(self, value: Any) -> Any:
        """Something to stand where `value` stood."""
        if self.chance(0.08):
            return self.anything()
        if isinstance(value, torch.Tensor):
            return self._tensor_like(value)
        if isinstance(value, bool):
            return not value
        if isinstance(value, int):
            return value + self.random.choice((-1, 1)) if self.chance(0.2) else self.integer()
        if isinstance(value, float | complex):
            return self.number()
        if isinstance(value, str):
            return self.random.choice(_EQUATIONS if "," in value or "->" in value else _WORDS)
        if isinstance(value, torch.dtype):
            return self.random.choice(_DTYPES)
        return self.anything() if value is None else value

    def _tensor_like(self, value: torch.Tensor) -> torch.Tensor:
        kind = self.random.randrange(7)
        if kind == 0:
            return self.tensor(tuple(value.shape))
        if kind == 1:
            return self.tensor(dtype=value.dtype if value.dtype in DTYPE_NAMES else None)
        if kind == 2:
            return self.tensor()
        if kind == 3 and value.dim():
            sizes = list(value.shape)
            sizes[self.random.randrange(len(sizes))] = self.random.choice(_SIZES)
            return self.tensor(tuple(sizes), value.dtype)
        if kind == 4:
            return value.reshape(-1) if self.chance(0.5) else value.unsqueeze(0)
        if kind == 5:
            return value.to(self.random.choice(_DTYPES))
        changed = value.detach().clone(memory_format=torch.contiguous_format)
        if changed.numel():
            wide = torch.float64 if changed.is_floating_point() or changed.is_complex() else torch.int64
            new = self.random.choice(_FLOATS) if wide == torch.float64 else self.integer()
            changed.view(-1)[self.random.randrange(changed.numel())] = torch.tensor(new, dtype=wide).to(
                changed.dtype
            )
        return changed

    def anything(self) -> Any:
        """A value of any kind that an op's arguments can hold."""
        kinds: list[Callable[[], Any]] = [
            self.integer, self.number, self.tensor, lambda: None, lambda: self.random.choice(_WORDS),
            lambda: [self.integer() for _ in range(self.random.randrange(5))],
            lambda: [self.tensor() for _ in range(self.random.randrange(4))],
            lambda: self.random.choice(_DTYPES), lambda: slice(None, self.integer(), self.integer() or 1), lambda: ...,
        ]  # fmt: skip
        return self.random.choice(kinds)()


def draw(name: str, seed: str, *, plain: bool = False) -> Arguments:
    """Arguments for the op `name`, drawn from `seed`; if `plain` without torch's samples, which take long to make."""
    drawn = Draw(seed)
    samples = [] if plain else _samples(name)
    signatures = _signatures(name)
    if samples and (not signatures or drawn.chance(0.75)):
        args, kwargs = drawn.random.choice(samples)
        return _changed(drawn, args, kwargs)
    if signatures:
        return drawn.random.choice(signatures)(drawn)
    return tuple([drawn.anything() for _ in range(drawn.random.randrange(1, 5))]), {}


def _changed(drawn: Draw, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    count = len(list(leaves((args, kwargs))))
    chosen = {drawn.random.randrange(count) for _ in range(drawn.random.randrange(4))} if count else set()
    place = -1

    def change(leaf: Any) -> Any:
        nonlocal place
        place += 1
        return drawn.like(leaf) if place in chosen else leaf

    args, kwargs = map_leaves(args, change), map_leaves(kwargs, change)
    if args and drawn.chance(0.05):
        args = args[:-1] if drawn.chance(0.5) else (*args, drawn.anything())
    return args, kwargs


# torch's samples


@cache
def _infos() -> dict[str, Any]:
    from torch.testing._internal.common_methods_invocations import op_db

    found: dict[str, Any] = {}
    for info in op_db:
        for name in (info.name, *(alias.name for alias in info.aliases)):
            found.setdefault(name, info)
    return found


def warm(names: Sequence[str] = ()) -> None:
    """Imports all that `draw` needs, and makes the samples of these ops."""
    _infos()
    for name in names:
        _samples(name)
        _signatures(name)


@cache
def _samples(name: str) -> list[Arguments]:
    home, _, word = name.partition(".")
    if home in ("torch", "Tensor"):
        word = word.strip("_").removesuffix(".__set__") or word
        names = [word, word.removeprefix("r"), word.removeprefix("i")] if "__" in name else [word]
    else:
        names = [name, name.rstrip("_"), word]
    info = next((_infos()[one] for one in names if one in _infos()), None)
    if info is None:
        return []
    made: list[Arguments] = []
    for dtype in (torch.float32, torch.int64, torch.complex64):
        if not info.supports_dtype(dtype, "cpu"):
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                samples = list(_made(info, dtype))
            except Exception:  # noqa: S112 - a sample that cannot be made here is none
                continue
        made += [
            ((sample.input, *sample.args), dict(sample.kwargs)) for sample in samples if _can_be_sent(sample)
        ]
    return made


def _made(info: Any, dtype: torch.dtype) -> Iterator[Any]:
    """The first samples of ``info.sample_inputs``, without the walk up the stack that it begins each of them with."""
    made = iter(info.sample_inputs_func(info, "cpu", dtype, False))
    for _ in range(_SAMPLES):
        torch.default_generator.manual_seed(_SEED)
        random.seed(_SEED)
        numpy.random.seed(_SEED)
        try:
            yield next(made)
        except StopIteration:
            return


def _can_be_sent(sample: Any) -> bool:
    known = int | float | complex | str | slice | torch.dtype | torch.Tensor | None | type(...)
    for leaf in leaves(((sample.input, *sample.args), sample.kwargs)):
        if not isinstance(leaf, known):
            return False
        if isinstance(leaf, torch.Tensor) and (leaf.layout != torch.strided or leaf.dtype not in DTYPE_NAMES):
            return False
    return True


# Signatures

_Signature = Callable[[Draw], Arguments]


@cache
def _signatures(name: str) -> list[_Signature]:
    home, _, word = name.partition(".")
    native = f"{home}_{word}" if home in ("linalg", "fft", "special") else word
    schemas: list[Any] = torch._C._jit_get_schemas_for_operator(f"aten::{native}")
    made: list[_Signature] = [_of_schema(one) for one in schemas if not _is_out(one)]
    return made or list(_of_python(name))


def _is_out(schema: Any) -> bool:
    return any(one.is_out for one in schema.arguments) or "Dimname" in str(schema)


def _of_schema(schema: Any) -> _Signature:
    arguments = [
        (one.name, str(one.type), one.kwarg_only, one.has_default_value()) for one in schema.arguments
    ]

    def make(drawn: Draw) -> Arguments:
        args: list[Any] = []
        kwargs: dict[str, Any] = {}
        for name, kind, named, has_default in arguments:
            if named or (has_default and drawn.chance(0.1)):
                if kind.startswith("Optional[Generator") or (has_default and drawn.chance(0.6)):
                    continue
                kwargs[name] = _of_kind(drawn, kind, name)
            elif not kwargs:
                args.append(_of_kind(drawn, kind, name))
        return tuple(args), kwargs

    return make


def _of_kind(drawn: Draw, kind: str, name: str) -> Any:
    if drawn.chance(0.03):
        return drawn.anything()
    if kind.startswith("Optional["):
        return None if drawn.chance(0.4) else _of_kind(drawn, kind[9:-1], name)
    if kind.startswith("List["):
        return [_of_kind(drawn, kind[5:-1], name) for _ in range(drawn.random.randrange(5))]
    if kind == "Tensor":
        index = any(part in name for part in ("ind", "target", "length", "offset", "mask"))
        return drawn.tensor(dtype=torch.int64 if index and drawn.chance(0.7) else None)
    if "dtype" in name:
        return drawn.random.choice(_DTYPES)
    if kind in ("int", "SymInt"):
        return drawn.integer()
    if kind == "float":
        return drawn.random.choice(_FLOATS)
    if kind == "bool":
        return drawn.chance(0.5)
    if kind == "str":
        return drawn.random.choice(_EQUATIONS if name == "equation" else _WORDS)
    return drawn.number() if kind in ("number", "Scalar") else None


def _of_python(name: str) -> Iterator[_Signature]:
    from planrt.plans.ir import ops

    try:
        parameters = list(inspect.signature(ops.lookup_eager(name)).parameters.values())
    except (TypeError, ValueError):
        return

    def make(drawn: Draw) -> Arguments:
        args: list[Any] = []
        for parameter in parameters:
            if parameter.kind not in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
                break
            default = parameter.default
            if default is parameter.empty:
                text = str(parameter.annotation)
                kind = "int" if "int" in text and "Tensor" not in text else "Tensor"
                args.append(_of_kind(drawn, kind, parameter.name))
            elif drawn.chance(0.5):
                args.append(default)
            elif default is None and parameter.name in ("weight", "bias", "running_mean", "running_var"):
                args.append(drawn.tensor())
            else:
                args.append(drawn.like(default))
        return tuple(args), {}

    yield make


def described(value: Any) -> str:
    """Arguments in a line: of tensors their dtype and shape, and few values."""
    if isinstance(value, torch.Tensor):
        name = str(value.dtype).removeprefix("torch.")
        few = f"={value.tolist()}" if value.numel() <= 8 else ""
        return f"{name}{list(value.shape)}{few}"
    if isinstance(value, tuple | list):
        inside = ", ".join(described(one) for one in value)
        return f"({inside})" if isinstance(value, tuple) else f"[{inside}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}={described(one)}" for key, one in value.items()) + "}"
    return repr(value)

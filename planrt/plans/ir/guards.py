"""Checks in front of kernels that trust their callers.

torch's public functions check their arguments in Python (`torch.nn.functional`), in a kernel's structured
part, or not at all. A kernel of the last kind reads or writes memory that is not its own, ends the process,
or computes for ever, when it is given arguments that no user of torch would write. On a worker anybody may
write them. So the ops below are checked first: shapes and modes, the one overflow that a processor traps, and
integers that say how often a loop runs.

Each check says what its kernel leaves out; `tests/plans/test_guards.py` shows what happens without. What has
no cheap check is off the table (`planrt.plans.ir.left_out`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any, Final

import torch

Function = Callable[..., Any]

_FARTHEST: Final = 1e9
"""How far from the image, in halves of it, `grid_sample` is asked for an entry."""
MAX_LOOP: Final = 10_000
"""How often an integer argument may make a kernel go round, for each entry."""


def _checked(check: Callable[..., None]) -> Callable[[Function], Function]:
    """A guard: `check` sees the arguments by name, as the kernel does, and raises ValueError."""
    signature = inspect.signature(check)

    def guard(function: Function) -> Function:
        @wraps(function, updated=())
        def guarded(*args: Any, **kwargs: Any) -> Any:
            given = signature.bind(*args, **{_RENAMED.get(key, key): one for key, one in kwargs.items()})
            check(*given.args, **given.kwargs)
            return function(*args, **kwargs)

        return guarded

    return guard


_RENAMED: Final = {"self": "input", "x": "input", "from": "least"}


@_checked
def _weight_norm(v: torch.Tensor, g: torch.Tensor, dim: int = 0) -> None:
    """The kernel takes it that `g` has one number for each slice of `v` along `dim`, and that there are some.

    Without: it reads past `g`, and writes norms past the room it made for them (an overflow of the heap).
    """
    if not v.dim() or not v.numel():
        raise ValueError("_weight_norm takes a weight with entries")
    if not -1 <= dim < v.dim():
        raise ValueError(f"_weight_norm along dimension {dim} of a weight of {v.dim()} dimensions")
    norms = [size if place == dim else 1 for place, size in enumerate(v.shape)]
    if list(g.shape) != ([] if dim == -1 else norms):
        raise ValueError(
            f"_weight_norm of {list(v.shape)} along {dim} takes norms {norms}, not {list(g.shape)}"
        )


@_checked
def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> None:
    """The kernel takes it that there are as many values as keys, and divides by the number of heads.

    Without: it reads past the shorter one, or the process is aborted.
    """
    if min(query.dim(), key.dim(), value.dim()) < 2:
        return  # which torch says
    if key.shape[-2] != value.shape[-2] or key.shape[-1] != query.shape[-1]:
        raise ValueError(
            f"scaled_dot_product_attention of keys {list(key.shape)} takes as many values, and queries as long: got "
            f"values {list(value.shape)} and queries {list(query.shape)}"
        )
    if enable_gqa:
        if min(query.dim(), key.dim(), value.dim()) < 3:
            raise ValueError("scaled_dot_product_attention of groups takes heads, along dimension -3")
        heads = [one.shape[-3] for one in (query, key, value)]
        if 0 in heads[1:] or any(heads[0] % one for one in heads[1:]):
            raise ValueError(
                f"scaled_dot_product_attention of {heads[0]} heads in groups takes a divisor of it of keys and of "
                f"values, not {heads[1]} and {heads[2]}"
            )


@_checked
def _divisors(input: torch.Tensor, other: torch.Tensor, *, out: torch.Tensor | None = None) -> None:
    """The least integer has no absolute value, and is divided by -1 on the way, which processors trap.

    Without: SIGFPE, the end of the process.
    """
    for one in (input, other):
        whole = isinstance(one, torch.Tensor) and one.dtype in (torch.int32, torch.int64)
        if whole and not one.is_meta and bool((one == torch.iinfo(one.dtype).min).any()):
            raise ValueError(f"gcd and lcm take no {torch.iinfo(one.dtype).min}, which has no absolute value")


@_checked
def _eigenvalues(input: torch.Tensor, *, out: torch.Tensor | None = None) -> None:
    """Eigenvectors are looked for in finite numbers alone, by torch itself; eigenvalues are not.

    Without: of a matrix with what is no number, LAPACK reads memory that is not its own, and the process ends.
    """
    if not input.is_meta and not bool(torch.isfinite(input.detach()).all()):
        raise ValueError("eigvals takes finite numbers, and these have infinite ones or some that are none")


_STEPS: Final = 2**31 - 1


def _convolution(function: Function) -> Function:
    """Steps, margins and dilations below what the libraries behind convolutions count with.

    Without: their backward pass of the largest 32-bit step overflows, and the process is aborted.
    """

    @wraps(function, updated=())
    def guarded(*args: Any, **kwargs: Any) -> Any:
        for one in (*args[3:], *kwargs.values()):
            steps = one if isinstance(one, tuple | list) else (one,)
            if any(isinstance(step, int) and abs(step) >= _STEPS for step in steps):
                raise ValueError(
                    f"{function.__name__} takes strides, padding and dilation below {_STEPS:,}, not {one}"
                )
        return function(*args, **kwargs)

    return guarded


def _factors(function: Function) -> Function:
    """Without its data, factors are empty tensors with a history, whose backward pass takes it that they are matrices.

    Without: it frees memory that nobody gave it, and the process ends.
    """

    @wraps(function, updated=())
    def guarded(
        LU_data: torch.Tensor,  # noqa: N803 - torch's name
        LU_pivots: torch.Tensor,  # noqa: N803
        unpack_data: bool = True,
        unpack_pivots: bool = True,
        **options: Any,
    ) -> Any:
        data = LU_data if unpack_data else LU_data.detach()
        return function(data, LU_pivots, unpack_data, unpack_pivots, **options)

    return guarded


@_checked
def _drawn(
    input: torch.Tensor, least: int = 0, to: int | None = None, *, generator: torch.Generator | None = None
) -> None:
    """Of fractions the kernel looks for the next number above the least one, and what it counts with wraps around.

    Without: it never ends.
    """
    if input.is_floating_point() and least == torch.iinfo(torch.int64).max:
        raise ValueError(f"random_ of {input.dtype} begins below {least}")


@_checked
def _distances(input: torch.Tensor, p: float = 2.0) -> None:
    """Without: the backward pass of the distances between no rows ends the process."""
    if input.dim() == 2 and not input.shape[0] and input.shape[1]:
        raise ValueError("pdist takes rows, and there are none")


def _check_places(grid: torch.Tensor, padded_with_entries: bool) -> None:
    """Where places outside are moved inside, the vectorized backward pass takes it that this works, and writes there.

    Without: of places that are no numbers, infinite or very large, it writes to memory that is not its own.
    """
    if padded_with_entries and not grid.is_meta and grid.numel():
        least, most = torch.aminmax(grid.detach())
        if not (float(least) >= -_FARTHEST and float(most) <= _FARTHEST):  # nan is neither
            raise ValueError(
                f"grid_sample with padding takes a grid of numbers from {-_FARTHEST:g} to {_FARTHEST:g}, and these "
                f"reach from {float(least):g} to {float(most):g}"
            )


@_checked
def _grid_sample(
    input: torch.Tensor,
    grid: torch.Tensor,
    mode: str = "bilinear",
    padding_mode: str = "zeros",
    align_corners: bool | None = None,
) -> None:
    """See `_check_places`."""
    if grid.is_floating_point():
        _check_places(grid, padding_mode != "zeros")


def _grid_sampler(*spatial: int) -> Callable[[Function], Function]:
    """The kernels know modes by their numbers, and leave the output as it was allocated for any other.

    Without: memory that others freed.
    """

    @_checked
    def check(
        input: torch.Tensor,
        grid: torch.Tensor,
        interpolation_mode: int,
        padding_mode: int,
        align_corners: bool,
    ) -> None:
        dims = input.dim() - 2
        if dims not in spatial or grid.dim() != input.dim() or grid.shape[-1] != dims:
            raise ValueError(
                f"grid_sampler takes no input {list(input.shape)} with a grid {list(grid.shape)}"
            )
        if interpolation_mode not in ((0, 1, 2) if dims == 2 else (0, 1)):
            raise ValueError(f"grid_sampler knows no interpolation mode {interpolation_mode}")
        if padding_mode not in (0, 1, 2):
            raise ValueError(f"grid_sampler knows no padding mode {padding_mode}")
        if input.shape[0] != grid.shape[0] or not all(input.shape[2:]):
            raise ValueError(
                f"grid_sampler takes no input {list(input.shape)} with a grid {list(grid.shape)}"
            )
        _check_places(grid, padding_mode != 0)

    return check


def _truncated_division(function: Function) -> Function:
    """The least integer divided by -1 has no result, and processors trap (SIGFPE, the end of the process).

    torch checks for zero only; its other divisions of integers go round the trap.
    """

    @wraps(function, updated=())
    def guarded(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("rounding_mode") == "trunc":  # nearly never
            _check_division(*args, *(kwargs[key] for key in ("input", "self", "other") if key in kwargs))
        return function(*args, **kwargs)

    return guarded


def _check_division(whole: Any, divisor: Any, *_: Any) -> None:
    if any(isinstance(one, float | complex) or _is_floating(one) for one in (whole, divisor)):
        return
    whole, divisor = (torch.as_tensor(one).detach() for one in (whole, divisor))
    kind = torch.result_type(whole, divisor)
    if kind is torch.bool or not kind.is_signed or divisor.is_meta or whole.is_meta:
        return
    minus_one = divisor == -1
    if bool(minus_one.any()) and bool(((whole.to(kind) == torch.iinfo(kind).min) & minus_one).any()):
        raise ValueError(f"the least {kind} divided by -1 is no {kind}")


def _is_floating(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex())


def _limit_count(name: str, position: int, most: int = MAX_LOOP) -> Callable[[Function], Function]:
    """The number of times that a kernel goes round, as a number or a tensor of numbers.

    Without: one op keeps the compute thread for as long as its client likes.
    """

    def guard(function: Function) -> Function:
        @wraps(function, updated=())
        def guarded(*args: Any, **kwargs: Any) -> Any:
            count = args[position] if len(args) > position else kwargs.get(name, 0)
            largest = _largest(count)
            if largest > most:
                raise ValueError(f"{name} of {function.__name__} may be {most:,} at most, not {largest:,}")
            return function(*args, **kwargs)

        return guarded

    return guard


def _largest(count: Any) -> float:
    if isinstance(count, torch.Tensor):
        if count.is_meta or not count.numel() or count.is_complex():
            return 0
        return float(count.detach().double().abs().nan_to_num().max())
    return abs(count) if isinstance(count, int | float) and count == count else 0


def _limit_window(word: str, position: int = 1) -> Callable[[Function], Function]:
    """The kernel goes round once for each place of its window, or of its result, those beyond the input included.

    Without: one op keeps the compute thread for ever.
    """

    def guard(function: Function) -> Function:
        name = getattr(function, "__name__", "this op")

        @wraps(function, updated=())
        def guarded(*args: Any, **kwargs: Any) -> Any:
            window = args[position] if len(args) > position else kwargs.get(word, 0)
            first = args[0] if args else kwargs.get("input", kwargs.get("self"))
            sizes = first.shape[1:] if isinstance(first, torch.Tensor) else ()
            most = max(MAX_LOOP, 4 * max(sizes, default=0))
            for one in window if isinstance(window, tuple | list) else [window]:
                if isinstance(one, int) and one > most:
                    raise ValueError(f"{word} of {name} may be {most:,} at most here, not {one:,}")
            return function(*args, **kwargs)

        return guarded

    return guard


_PADDED: Final = [
    "input",
    "hx",
    "params",
    "has_biases",
    "num_layers",
    "dropout",
    "train",
    "bidirectional",
    "batch_first",
]
_PACKED: Final = [
    "data",
    "batch_sizes",
    "hx",
    "params",
    "has_biases",
    "num_layers",
    "dropout",
    "train",
    "bidirectional",
]


def _recurrent(gates: int) -> Callable[[Function], Function]:
    """The kernels count on as many states and weights, of the right sizes, as layers and directions are
    named.

    Without: they read past the ends of both lists (a crash, or memory that is not theirs).
    """

    def guard(function: Function) -> Function:
        @wraps(function, updated=())
        def guarded(*args: Any, **kwargs: Any) -> Any:
            packed = "batch_sizes" in kwargs or (len(args) > 3 and isinstance(args[3], list | tuple))
            given = dict(zip(_PACKED if packed else _PADDED, args, strict=False)) | kwargs
            if len(given) == len(_PADDED) == len(args) + len(kwargs):  # if not, torch says so
                _check_recurrent(function.__name__, gates, packed, given)
            return function(*args, **kwargs)

        return guarded

    return guard


def _check_recurrent(name: str, gates: int, packed: bool, given: dict[str, Any]) -> None:
    def refused(why: str) -> ValueError:
        return ValueError(f"{name} takes {why}")

    lists = given["hx"] if gates == _LSTM else [given["hx"]], given["params"]
    if not all(isinstance(one, list | tuple) for one in lists):
        raise refused("its states and weights as lists")
    states, weights = lists
    inputs = given["data" if packed else "input"]
    if not all(isinstance(one, torch.Tensor) for one in (inputs, *states, *weights)):
        raise refused("tensors")
    layers, biases = given["num_layers"], bool(given["has_biases"])
    if type(layers) is not int or layers < 1:
        raise refused("1 layer or more")
    directions = 2 if given["bidirectional"] else 1
    if len(states) != (2 if gates == _LSTM else 1) or inputs.dim() != (2 if packed else 3):
        raise refused("one input, and for each kind of state one tensor")
    if any(state.dim() != 3 or state.shape[0] != layers * directions for state in states):
        raise refused(f"states of {layers * directions} layers and directions")
    out, hidden = states[0].shape[2], states[-1].shape[2]
    projected = gates == _LSTM and out != hidden
    wanted: list[list[int]] = []
    for layer in range(min(layers, len(weights))):
        width = inputs.shape[-1] if layer == 0 else out * directions
        one = [[gates * hidden, width], [gates * hidden, out], *[[gates * hidden]] * (2 * biases)]
        wanted += [*one, *[[out, hidden]] * projected] * directions
    if len(weights) != layers * directions * (2 + 2 * biases + projected) or wanted != [
        list(weight.shape) for weight in weights
    ]:
        raise refused(f"weights that fit {layers} layers of {directions} directions and states of {hidden}")
    if packed:
        sizes = given["batch_sizes"]
        if (
            not isinstance(sizes, torch.Tensor)
            or sizes.dim() != 1
            or sizes.dtype != torch.int64
            or not len(sizes)
        ):
            raise refused("batch sizes as a row of int64")
        batch = None if sizes.is_meta else int(sizes[0])
    else:
        batch = inputs.shape[0 if given["batch_first"] else 1]
    if batch is not None and any(state.shape[1] != batch for state in states):
        raise refused(f"states for a batch of {batch}")


def _cell(gates: int) -> Callable[[Function], Function]:
    """One step of a recurrent net: a row of inputs for each row of states, and weights that fit both.

    Without: torch up to 2.11 reads states and weights that are not there (a crash).
    """

    @_checked
    def check(
        input: torch.Tensor,
        hx: Any,
        w_ih: torch.Tensor,
        w_hh: torch.Tensor,
        b_ih: torch.Tensor | None = None,
        b_hh: torch.Tensor | None = None,
    ) -> None:
        states = list(hx) if isinstance(hx, list | tuple) else [hx]
        if len(states) != (2 if gates == _LSTM else 1) or not all(
            isinstance(one, torch.Tensor) and one.dim() == 2 for one in (input, *states, w_ih, w_hh)
        ):
            raise ValueError(
                "a cell takes a batch of inputs, as many states as it has, and weights: all of 2 dimensions"
            )
        hidden = states[0].shape[1]
        wanted = [[len(input), hidden]] * len(states) + [
            [gates * hidden, input.shape[1]],
            [gates * hidden, hidden],
        ]
        if [list(one.shape) for one in (*states, w_ih, w_hh)] != wanted or any(
            one is not None and list(one.shape) != [gates * hidden] for one in (b_ih, b_hh)
        ):
            raise ValueError(f"a cell of {hidden} hidden units takes states, weights and biases of its sizes")

    return check


def _with_its_own_memory(function: Function) -> Function:
    """The kernel sorts a copy in place, and takes it that an expanded view's copy has an entry for each repeat.

    Without: the medians are wrong, and are read from memory beyond the copy.
    """

    @wraps(function, updated=())
    def guarded(*args: Any, **kwargs: Any) -> Any:
        if args and isinstance(args[0], torch.Tensor) and 0 in args[0].stride():
            args = (args[0].contiguous(), *args[1:])
        elif (given := kwargs.get("input")) is not None and 0 in given.stride():
            kwargs["input"] = given.contiguous()
        return function(*args, **kwargs)

    return guarded


_LSTM: Final = 4

_POLYNOMIALS = """
    chebyshev_polynomial_t chebyshev_polynomial_u chebyshev_polynomial_v chebyshev_polynomial_w
    hermite_polynomial_h hermite_polynomial_he laguerre_polynomial_l legendre_polynomial_p
    shifted_chebyshev_polynomial_t shifted_chebyshev_polynomial_u shifted_chebyshev_polynomial_v
    shifted_chebyshev_polynomial_w
"""

GUARDS: Final[dict[str, Callable[[Function], Function]]] = {
    "torch._weight_norm": _weight_norm,
    "nn.functional.grid_sample": _grid_sample,
    "torch.grid_sampler": _grid_sampler(2, 3),
    "torch.grid_sampler_2d": _grid_sampler(2),
    "torch.grid_sampler_3d": _grid_sampler(3),
    **{
        f"{home}.{word}": _truncated_division
        for home, words in (("torch", "div divide"), ("Tensor", "div div_ divide divide_"))
        for word in words.split()
    },
    "nn.functional.scaled_dot_product_attention": _attention,
    **{
        f"{home}.{word}": _divisors for home in ("torch", "Tensor") for word in ("gcd", "lcm", "gcd_", "lcm_")
    },
    "Tensor.random_": _drawn,
    "torch.convolution": _convolution,
    **{
        f"{home}.conv{kind}{dims}d": _convolution
        for home in ("torch", "nn.functional")
        for kind in ("", "_transpose")
        for dims in (1, 2, 3)
    },
    "linalg.eigvals": _eigenvalues,
    "torch.lu_unpack": _factors,
    "torch.pdist": _distances,
    "nn.functional.pdist": _distances,
    "torch.lstm": _recurrent(_LSTM),
    "torch.gru": _recurrent(3),
    "torch.rnn_tanh": _recurrent(1),
    "torch.rnn_relu": _recurrent(1),
    "torch.lstm_cell": _cell(_LSTM),
    "torch.gru_cell": _cell(3),
    "torch.rnn_tanh_cell": _cell(1),
    "torch.rnn_relu_cell": _cell(1),
    **{
        f"{home}.{word}": _with_its_own_memory
        for home in ("torch", "Tensor")
        for word in ("median", "nanmedian")
    },
    **{f"{home}.matrix_power": _limit_count("n", 1, 2**62) for home in ("torch", "Tensor", "linalg")},
    **{
        f"{home}.{word}": _limit_window("kernel_size")
        for home in ("torch", "nn.functional")
        for word in ("max_pool1d", "max_pool1d_with_indices")
    },
    **{f"nn.functional.lp_pool{dims}d": _limit_window("kernel_size", 2) for dims in (1, 2, 3)},
    **{
        name: _limit_window("output_size")
        for dims in (1, 2, 3)
        for name in (
            f"nn.functional.adaptive_avg_pool{dims}d",
            f"nn.functional.adaptive_max_pool{dims}d",
            f"nn.functional.adaptive_max_pool{dims}d_with_indices",
        )
    },
    "torch.adaptive_avg_pool1d": _limit_window("output_size"),
    "torch.adaptive_max_pool1d": _limit_window("output_size"),
    "torch.combinations": _limit_count("r", 1, 32),
    **{f"special.{word}": _limit_count("n", 1) for word in _POLYNOMIALS.split()},
    "special.polygamma": _limit_count("n", 0),
    "torch.polygamma": _limit_count("n", 0),
    "Tensor.polygamma": _limit_count("n", 1),
    "Tensor.polygamma_": _limit_count("n", 1),
    "special.multigammaln": _limit_count("p", 1),
    "torch.mvlgamma": _limit_count("p", 1),
    "Tensor.mvlgamma": _limit_count("p", 1),
    "Tensor.mvlgamma_": _limit_count("p", 1),
    "torch.svd_lowrank": _limit_count("niter", 2),
    "torch.pca_lowrank": _limit_count("niter", 3),
}
"""Name of an op -> what puts the check around its function."""

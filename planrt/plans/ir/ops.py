"""The fixed table of ops: name -> callable. Whatever runs on a worker is on it; nothing is ever added to it.

Names are spelled as users know them: `torch.add`, `Tensor.view`, `Tensor.T` (a property),
`nn.functional.relu`, `linalg.inv`. The lists are checked in, so that the table cannot widen when torch grows;
a name that the installed torch does not have is simply absent, and `TABLE_HASH` tells two sides whether their
tables agree. What torch has and the table has not stands in `planrt.plans.ir.left_out`, with the reasons.

The callables are torch's own, with these exceptions: `torch.empty` and its like return zeros, because
uninitialised memory on a worker holds what other clients freed; `operator.*` is 64-bit arithmetic on sizes
and checks of how they compare, nothing else; `torch.set_grad_enabled` is the switch behind `torch.no_grad`;
`unbind`, `split` and their like (`planrt.plans.ir.result_limits`) refuse to return more results than memory
holds; and kernels that trust their callers are checked first (`planrt.plans.ir.guards`).
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Callable
from types import ModuleType
from typing import Any, Final

import torch
import torch.nn.functional as F

from planrt.errors import OpNotAllowedError
from planrt.plans.ir.guards import GUARDS
from planrt.plans.ir.index_guards import INDEX_GUARDS
from planrt.plans.ir.result_limits import MANY, bounded
from planrt.plans.ir.traits import OpTraits

# Functions of torch: pointwise maths, reductions, comparison, shape, indexing, products, convolution,
# pooling, normalisation, recurrent nets, random draws. Left out: quantised, sparse, nested and vendor kernels
# (a data owner cannot follow them), and anything with files, storages, threads, callables or global settings.
_TORCH = """
    _pack_padded_sequence _pad_packed_sequence
    _weight_norm abs absolute acos acosh adaptive_avg_pool1d adaptive_max_pool1d add addbmm addcdiv
    addcmul addmm addmv addr adjoint affine_grid_generator alias_copy all alpha_dropout amax amin aminmax
    angle any arccos arccosh arcsin arcsinh arctan arctan2 arctanh argmax argmin argsort argwhere asin
    asinh atan atan2 atanh atleast_1d atleast_2d atleast_3d avg_pool1d baddbmm batch_norm bernoulli
    bilinear binary_cross_entropy_with_logits bincount binomial bitwise_and bitwise_left_shift bitwise_not
    bitwise_or bitwise_right_shift bitwise_xor block_diag bmm broadcast_tensors broadcast_to bucketize
    cartesian_prod cat cdist ceil celu channel_shuffle cholesky cholesky_inverse cholesky_solve chunk
    clamp clamp_max clamp_min clip clone column_stack combinations complex concat concatenate conj
    conj_physical constant_pad_nd conv1d conv2d conv3d conv_tbc conv_transpose1d conv_transpose2d
    conv_transpose3d convolution copysign corrcoef cos cosh cosine_embedding_loss cosine_similarity
    count_nonzero cov cross ctc_loss cummax cummin cumprod cumsum cumulative_trapezoid deg2rad det detach
    detach_copy diag diag_embed diagflat diagonal diagonal_copy diagonal_scatter diff digamma dist div
    divide dot dropout dsplit dstack einsum embedding embedding_bag empty_like eq erf erfc erfinv exp exp2
    expand_copy expm1 feature_alpha_dropout feature_dropout fill fix flatten flip fliplr flipud
    float_power floor floor_divide fmax fmin fmod frac frexp full_like gather gcd ge geqrf ger gradient
    greater greater_equal grid_sampler grid_sampler_2d grid_sampler_3d group_norm gru gru_cell gt
    hardshrink heaviside hinge_embedding_loss histc histogram histogramdd hsplit hstack hypot i0 igamma
    igammac imag index_add index_copy index_fill index_put index_reduce index_select inner instance_norm
    inverse isclose isfinite isin isinf isnan isneginf isposinf isreal istft kl_div kron kthvalue
    layer_norm lcm ldexp le lerp less less_equal lgamma log log10 log1p log2 log_softmax logaddexp
    logaddexp2 logcumsumexp logdet logical_and logical_not logical_or logical_xor logit logsumexp lstm
    lstm_cell lt lu_solve lu_unpack margin_ranking_loss masked_fill masked_scatter masked_select matmul
    matrix_exp matrix_power max max_pool1d max_pool1d_with_indices max_pool2d max_pool3d maximum mean
    median meshgrid min minimum mm mode moveaxis movedim msort mul multinomial multiply mv mvlgamma
    nan_to_num nanmean nanmedian nanquantile nansum narrow narrow_copy ne neg negative nextafter nonzero
    nonzero_static norm norm_except_dim not_equal ones_like orgqr ormqr outer pairwise_distance
    pca_lowrank pdist permute permute_copy pinverse pixel_shuffle pixel_unshuffle poisson poisson_nll_loss
    polar polygamma positive pow prelu prod put quantile rad2deg ravel real reciprocal relu remainder
    renorm repeat_interleave reshape resolve_conj resolve_neg rms_norm rnn_relu rnn_relu_cell rnn_tanh
    rnn_tanh_cell roll rot90 round row_stack rrelu rsqrt rsub scatter scatter_add scatter_reduce
    searchsorted select select_copy select_scatter selu sgn sigmoid sign signbit sin sinc sinh slice_copy
    slice_scatter slogdet softmax sort split split_copy split_with_sizes split_with_sizes_copy sqrt square
    squeeze squeeze_copy stack std std_mean stft sub subtract sum svd svd_lowrank swapaxes swapdims t
    t_copy take take_along_dim tan tanh tensor_split tensordot threshold tile topk trace transpose
    transpose_copy trapezoid trapz tril triplet_margin_loss triu true_divide trunc unbind unbind_copy
    unflatten unfold_copy unique unique_consecutive unravel_index unsqueeze unsqueeze_copy vander var
    var_mean vdot view_as_complex view_as_complex_copy view_as_real view_as_real_copy view_copy vsplit
    vstack where xlogy zeros_like
"""

# The same, changing their first argument in place.
_TORCH_IN_PLACE = """
    abs_ acos_ acosh_ addmv_ alpha_dropout_ arccos_ arccosh_ arcsin_ arcsinh_ arctan_ arctanh_ asin_
    asinh_ atan_ atanh_ ceil_ celu_ clamp_ clamp_max_ clamp_min_ clip_ conj_physical_ cos_ cosh_ deg2rad_
    detach_ dropout_ erf_ erfc_ exp2_ exp_ expm1_ feature_alpha_dropout_ feature_dropout_ fill_ fix_
    floor_ frac_ gcd_ i0_ index_put_ lcm_ ldexp_ log10_ log1p_ log2_ log_ logit_ nan_to_num_ neg_
    negative_ rad2deg_ reciprocal_ relu_ round_ rrelu_ rsqrt_ selu_ sigmoid_ sin_ sinc_ sinh_ sqrt_
    square_ tan_ tanh_ threshold_ trunc_ xlogy_ zero_
"""

# Factories with their own device argument; `torch.empty` and its like stand below.
_FACTORIES = """
    arange as_tensor asarray bartlett_window blackman_window eye full hamming_window hann_window
    kaiser_window linspace logspace normal ones rand randint randn randperm scalar_tensor tensor
    tril_indices triu_indices zeros
"""

# ... and those that take the device from their tensor argument.
_FACTORIES_LIKE = """
    rand_like randint_like randn_like
"""

# Methods. Left out: reads of values into Python (`item`, `tolist`, `numpy`, `__bool__`, ...: a worker's data
# must not steer or leave the plan by a side door), raw memory (`set_`, `as_strided`, `data_ptr`, `storage`,
# `resize_`), callables (`apply_`, `map_`, `register_hook`), `type` (parses names; recorded as `to`), `new`.
_METHODS = """
    abs abs_ absolute absolute_ acos acos_ acosh acosh_ add add_ addbmm addbmm_ addcdiv addcdiv_ addcmul
    addcmul_ addmm addmm_ addmv addmv_ addr addr_ adjoint all amax amin aminmax angle any arccos arccos_
    arccosh arccosh_ arcsin arcsin_ arcsinh arcsinh_ arctan arctan2 arctan2_ arctan_ arctanh arctanh_
    argmax argmin argsort argwhere asin asin_ asinh asinh_ atan atan2 atan2_ atan_ atanh atanh_ baddbmm
    baddbmm_ bernoulli bernoulli_ bfloat16 bincount bitwise_and bitwise_and_ bitwise_left_shift
    bitwise_left_shift_ bitwise_not bitwise_not_ bitwise_or bitwise_or_ bitwise_right_shift
    bitwise_right_shift_ bitwise_xor bitwise_xor_ bmm bool broadcast_to byte cauchy_ cdouble ceil ceil_
    cfloat chalf char cholesky_inverse cholesky_solve chunk clamp clamp_ clamp_max clamp_max_ clamp_min
    clamp_min_ clip clip_ clone conj conj_physical conj_physical_ contiguous copy_ copysign copysign_
    corrcoef cos cos_ cosh cosh_ count_nonzero cov cross cummax cummin cumprod cumprod_ cumsum cumsum_
    deg2rad deg2rad_ det detach detach_ diag diag_embed diagflat diagonal diagonal_scatter diff digamma
    digamma_ dist div div_ divide divide_ dot double dsplit eq eq_ erf erf_ erfc erfc_ erfinv erfinv_ exp
    exp2 exp2_ exp_ expand expand_as expm1 expm1_ exponential_ fill_ fill_diagonal_ fix fix_ flatten flip
    fliplr flipud float float_power float_power_ floor floor_ floor_divide floor_divide_ fmax fmin fmod
    fmod_ frac frac_ frexp gather gcd gcd_ ge ge_ geometric_ geqrf ger greater greater_ greater_equal
    greater_equal_ gt gt_ half hardshrink heaviside heaviside_ histc histogram hsplit hypot hypot_ i0 i0_
    igamma igamma_ igammac igammac_ index_add index_add_ index_copy index_copy_ index_fill index_fill_
    index_put index_put_ index_reduce index_reduce_ index_select inner int inverse isclose isfinite isinf
    isnan isneginf isposinf isreal istft kron kthvalue lcm lcm_ ldexp ldexp_ le le_ lerp lerp_ less less_
    less_equal less_equal_ lgamma lgamma_ log log10 log10_ log1p log1p_ log2 log2_ log_ log_normal_
    log_softmax logaddexp logaddexp2 logcumsumexp logdet logical_and logical_and_ logical_not logical_not_
    logical_or logical_or_ logical_xor logical_xor_ logit logit_ logsumexp long lt lt_ lu_solve
    masked_fill masked_fill_ masked_scatter masked_scatter_ masked_select matmul matrix_exp matrix_power
    max maximum mean median min minimum mm mode moveaxis movedim msort mul mul_ multinomial multiply
    multiply_ mv mvlgamma mvlgamma_ nan_to_num nan_to_num_ nanmean nanmedian nanquantile nansum narrow
    narrow_copy ne ne_ neg neg_ negative negative_ nextafter nextafter_ nonzero nonzero_static norm
    normal_ not_equal not_equal_ orgqr ormqr outer permute pinverse polygamma polygamma_ positive pow pow_
    prelu prod put put_ quantile rad2deg rad2deg_ random_ ravel reciprocal reciprocal_ relu relu_
    remainder remainder_ renorm renorm_ repeat repeat_interleave requires_grad_ reshape reshape_as
    resolve_conj resolve_neg roll rot90 round round_ rsqrt rsqrt_ scatter scatter_ scatter_add
    scatter_add_ scatter_reduce scatter_reduce_ select select_scatter sgn sgn_ short sigmoid sigmoid_ sign
    sign_ signbit sin sin_ sinc sinc_ sinh sinh_ slice_scatter slogdet softmax sort split split_with_sizes
    sqrt sqrt_ square square_ squeeze squeeze_ std stft sub sub_ subtract subtract_ sum sum_to_size svd
    swapaxes swapaxes_ swapdims swapdims_ t t_ take take_along_dim tan tan_ tanh tanh_ tensor_split tile
    to topk trace transpose transpose_ tril tril_ triu triu_ true_divide true_divide_ trunc trunc_ type_as
    unbind unflatten unfold uniform_ unique unique_consecutive unsqueeze unsqueeze_ var vdot view view_as
    vsplit where xlogy xlogy_ zero_
"""

_NEW = """
    new_full new_ones new_tensor new_zeros
"""

# Operators that Python writes for the user; `x + 1` itself arrives as `Tensor.add`. The last three are older
# names of a division; standing last, they leave it the name that `name_of` returns.
_DUNDERS = """
    __and__ __eq__ __floordiv__ __ge__ __getitem__ __gt__ __iadd__ __iand__ __ifloordiv__ __ilshift__
    __imod__ __imul__ __invert__ __ior__ __ipow__ __irshift__ __isub__ __itruediv__ __ixor__ __le__
    __lshift__ __lt__ __matmul__ __mod__ __ne__ __or__ __pow__ __radd__ __rand__ __reversed__
    __rfloordiv__ __rlshift__ __rmatmul__ __rmod__ __rmul__ __ror__ __rpow__ __rrshift__ __rshift__
    __rsub__ __rtruediv__ __rxor__ __setitem__ __xor__ __add__ __sub__ __mul__ __truediv__
    __div__ __idiv__ __rdiv__
"""

_PROPERTIES = "H T data imag mH mT real"

# Layers and losses. Left out: `triplet_margin_with_distance_loss` (takes a callable), `upsample*` (deprecated
# names of `interpolate`), scaled and grouped products (hardware kernels).
_FUNCTIONAL = """
    adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d
    adaptive_max_pool1d_with_indices adaptive_max_pool2d adaptive_max_pool2d_with_indices
    adaptive_max_pool3d adaptive_max_pool3d_with_indices affine_grid alpha_dropout avg_pool1d avg_pool2d
    avg_pool3d batch_norm bilinear binary_cross_entropy binary_cross_entropy_with_logits celu celu_
    channel_shuffle conv1d conv2d conv3d conv_tbc conv_transpose1d conv_transpose2d conv_transpose3d
    cosine_embedding_loss cosine_similarity cross_entropy ctc_loss dropout dropout1d dropout2d dropout3d
    elu elu_ embedding embedding_bag feature_alpha_dropout fold fractional_max_pool2d
    fractional_max_pool2d_with_indices fractional_max_pool3d fractional_max_pool3d_with_indices
    gaussian_nll_loss gelu glu grid_sample group_norm gumbel_softmax hardshrink hardsigmoid hardswish
    hardtanh hardtanh_ hinge_embedding_loss huber_loss instance_norm interpolate kl_div l1_loss layer_norm
    leaky_relu leaky_relu_ linear linear_cross_entropy local_response_norm log_softmax logsigmoid
    lp_pool1d lp_pool2d lp_pool3d margin_ranking_loss max_pool1d max_pool1d_with_indices max_pool2d
    max_pool2d_with_indices max_pool3d max_pool3d_with_indices max_unpool1d max_unpool2d max_unpool3d mish
    mse_loss multi_head_attention_forward multi_margin_loss multilabel_margin_loss
    multilabel_soft_margin_loss nll_loss normalize one_hot pad pairwise_distance pdist pixel_shuffle
    pixel_unshuffle poisson_nll_loss prelu relu relu6 relu_ rms_norm rrelu rrelu_
    scaled_dot_product_attention selu selu_ silu smooth_l1_loss soft_margin_loss softmax softmin softplus
    softshrink softsign tanhshrink threshold threshold_ triplet_margin_loss unfold
"""

# Initialisers that arrive whole; the others of `torch.nn.init` are made of ops on the table.
_INIT = "constant_ kaiming_uniform_ normal_ uniform_"

_LINALG = """
    cholesky cholesky_ex cond cross det diagonal eig eigh eigvals eigvalsh householder_product inv inv_ex
    ldl_factor ldl_factor_ex lstsq lu lu_factor lu_factor_ex lu_solve matmul matrix_exp
    matrix_norm matrix_power matrix_rank matrix_sqrth multi_dot norm pinv polar qr slogdet solve solve_ex
    solve_triangular svd svdvals tensorinv tensorsolve vander vecdot vector_norm
"""

_FFT = """
    fft fft2 fftn fftshift hfft hfft2 hfftn ifft ifft2 ifftn ifftshift ihfft ihfft2 ihfftn irfft irfft2
    irfftn rfft rfft2 rfftn
"""

_FFT_FACTORIES = "fftfreq rfftfreq"

_SPECIAL = """
    airy_ai bessel_j0 bessel_j1 bessel_y0 bessel_y1 chebyshev_polynomial_t chebyshev_polynomial_u
    chebyshev_polynomial_v chebyshev_polynomial_w digamma entr erf erfc erfcx erfinv exp2 expit expm1
    gammainc gammaincc gammaln hermite_polynomial_h hermite_polynomial_he i0 i0e i1 i1e
    laguerre_polynomial_l legendre_polynomial_p log1p log_ndtr log_softmax logit logsumexp
    modified_bessel_i0 modified_bessel_i1 modified_bessel_k0 modified_bessel_k1 multigammaln ndtr ndtri
    polygamma psi round scaled_modified_bessel_k0 scaled_modified_bessel_k1 shifted_chebyshev_polynomial_t
    shifted_chebyshev_polynomial_u shifted_chebyshev_polynomial_v shifted_chebyshev_polynomial_w sinc
    softmax spherical_bessel_j0 xlog1py xlogy zeta
"""


def _zeroed(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """`factory`, its memory cleared before anyone can look at it: that and no more, as strides may show each entry any
    number of times.
    """

    def zeroed(*args: Any, **kwargs: Any) -> torch.Tensor:
        with torch.no_grad():
            made = factory(*args, **kwargs).detach()
            if made.is_contiguous() or made.is_meta:
                made.zero_()
            else:
                memory = made.untyped_storage()
                torch.empty(0, dtype=torch.uint8, device=made.device).set_(memory).zero_()
        return made.requires_grad_(bool(kwargs.get("requires_grad", False)))

    zeroed.__name__ = factory.__name__
    return zeroed


def _on_sizes(function: Callable[..., Any]) -> Callable[..., int | float]:
    """`function` for ints and floats only, refusing results that leave the 64-bit range."""

    def checked(*numbers: Any) -> int | float:
        if not all(type(number) in (int, float) for number in numbers):
            raise ValueError(f"operator.{function.__name__} in a plan takes sizes, not tensors")
        result: int | float = function(*numbers)
        if isinstance(result, int) and not -(2**63) <= result < 2**63:
            raise ValueError(f"operator.{function.__name__} left the 64-bit range")
        return result

    checked.__name__ = function.__name__
    return checked


SIZE_ARITHMETIC: Final[dict[str, Callable[..., Any]]] = {
    f"operator.{function.__name__}": function
    for function in (
        operator.add, operator.sub, operator.mul, operator.floordiv, operator.mod, operator.truediv,
        operator.neg,
    )
}  # fmt: skip
"""Name -> plain Python function of the ops on sizes."""

COMPARISONS: Final[dict[str, Callable[[Any, Any], bool]]] = {
    function.__name__: function
    for function in (operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge)
}
"""Word -> comparison of two sizes."""


def _assumed(word: str) -> Callable[[Any, Any], None]:
    """Checks that two sizes compare as they did when the plan was recorded."""
    compare = COMPARISONS[word]

    def assume(left: Any, right: Any) -> None:
        if not all(type(number) in (int, float) for number in (left, right)):
            raise ValueError(f"operator.assume_{word} in a plan takes sizes, not tensors")
        if not compare(left, right):
            raise ValueError(
                f"with these sizes it is {left} and {right}, for which the function that was recorded goes another "
                "way: build the plan with an example of such sizes"
            )

    assume.__name__ = f"assume_{word}"
    return assume


ASSUMPTIONS: Final = {f"operator.assume_{word}": _assumed(word) for word in COMPARISONS}
"""Name -> check of the ops that stand for a comparison of free sizes in the function."""

_EMPTY: dict[str, Callable[..., torch.Tensor]] = {
    "torch.empty": torch.empty,
    "torch.empty_like": torch.empty_like,
    "torch.empty_strided": torch.empty_strided,
    "torch.empty_permuted": torch.empty_permuted,
    "Tensor.new_empty": torch.Tensor.new_empty,
    "Tensor.new_empty_strided": torch.Tensor.new_empty_strided,
}

_MANY: dict[str, Callable[..., Any]] = {
    f"{prefix}.{word}": getattr(home, word)
    for prefix, home in (("torch", torch), ("Tensor", torch.Tensor))
    for word in MANY
    if hasattr(home, word)
}

BOUNDED: Final = {name: bounded(name.rpartition(".")[2], function) for name, function in _MANY.items()}
"""Name -> torch's function that first counts what it would return."""


def _pack_padded_sequence(input: torch.Tensor, lengths: torch.Tensor, batch_first: bool) -> Any:
    """torch's, which wants lengths in the CPU's memory, wherever the plan runs."""
    lengths = lengths if lengths.is_meta else lengths.cpu()
    return torch._pack_padded_sequence(input, lengths, batch_first)


_ON_CPU: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "torch._pack_padded_sequence": (torch._pack_padded_sequence, _pack_padded_sequence)
}


def _home(prefix: str) -> Any:
    return {
        "torch": torch,
        "Tensor": torch.Tensor,
        "special": torch.special,
        "nn.functional": F,
        "linalg": torch.linalg,
    }[prefix]


_ALL_GUARDS: Final = {**INDEX_GUARDS, **GUARDS}
_GUARDED: dict[str, Callable[..., Any]] = {
    name: function
    for name in _ALL_GUARDS
    if (function := getattr(_home(name.rpartition(".")[0]), name.rpartition(".")[2], None)) is not None
}
CHECKED: Final = {**BOUNDED, **{name: _ALL_GUARDS[name](function) for name, function in _GUARDED.items()}}
"""Name -> torch's function behind a check of its arguments."""

UNWRAPPED: Final[dict[str, Callable[..., Any]]] = {
    **_GUARDED,
    **SIZE_ARITHMETIC,
    **_MANY,
    **{name: function for name, (function, _) in _ON_CPU.items()},
    **{f"operator.assume_{word}": compare for word, compare in COMPARISONS.items()},
    **_EMPTY,
}
"""Name -> plain function of the ops that planrt puts a check around: for running a plan under a recorder,
which sees the calls that are made."""


def _build_table() -> tuple[dict[str, Callable[..., Any]], dict[Any, str]]:
    """(name -> callable, torch function as a tracing mode sees it -> name)."""
    table: dict[str, Callable[..., Any]] = {}
    names: dict[Any, str] = {}

    def add(prefix: str, home: ModuleType | type, words: str) -> None:
        for word in words.split():
            function = getattr(home, word, None)  # words are the checked-in lists above
            if function is not None:
                table[f"{prefix}.{word}"] = function
                names.setdefault(function, f"{prefix}.{word}")

    add("torch", torch, " ".join((_TORCH, _TORCH_IN_PLACE, _FACTORIES, _FACTORIES_LIKE)))
    add("Tensor", torch.Tensor, " ".join((_METHODS, _NEW, _DUNDERS, "size numel")))
    add("nn.functional", F, _FUNCTIONAL)
    add("nn.init", torch.nn.init, _INIT)
    add("linalg", torch.linalg, _LINALG)
    add("fft", torch.fft, f"{_FFT} {_FFT_FACTORIES}")
    add("special", torch.special, _SPECIAL)
    for word in _PROPERTIES.split():
        getter = getattr(torch.Tensor, word).__get__
        table[f"Tensor.{word}"] = getter
        names[getter] = f"Tensor.{word}"
    for name, factory in _EMPTY.items():
        table[name] = _zeroed(factory)
        names[factory] = name
    table.update({name: function for name, function in CHECKED.items() if name in table})
    for name, function in SIZE_ARITHMETIC.items():
        table[name] = _on_sizes(function)
    table.update({name: function for name, (_, function) in _ON_CPU.items()})
    table.update(ASSUMPTIONS)
    # What torch.meshgrid calls itself by the time anybody can look.
    names.setdefault(torch._C._VariableFunctions.meshgrid, "torch.meshgrid")  # type: ignore[attr-defined]
    table["torch.set_grad_enabled"] = torch._C._set_grad_enabled
    names[torch._C._set_grad_enabled] = "torch.set_grad_enabled"
    table.update(GRADIENTS)
    for function in (torch.Tensor.backward, torch.Tensor.retain_grad):
        names[function] = f"Tensor.{function.__name__}"
    for function in (torch.autograd.backward, torch.autograd.grad):
        names[function] = f"autograd.{function.__name__}"
    grad: Any = torch.Tensor.grad
    names[grad.__get__], names[grad.__set__] = "Tensor.grad", "Tensor.grad.__set__"
    return table, names


GRADIENTS: Final[dict[str, Callable[..., Any]]] = {
    "Tensor.backward": torch.Tensor.backward,
    "Tensor.grad": lambda tensor: tensor.grad,
    "Tensor.grad.__set__": lambda tensor, grad: setattr(tensor, "grad", grad),
    "Tensor.retain_grad": torch.Tensor.retain_grad,
    "autograd.backward": torch.autograd.backward,
    "autograd.grad": torch.autograd.grad,
}
"""What differentiates: part of the table. A plan with one of these works on gradients of its own, which begin
empty at every run; see `planrt.plans.ir.graph.Graph.differentiates`."""

TABLE, _NAMES = _build_table()


def _set_from_tensor(tensor: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """`Tensor.set_` from a tensor; its other forms reach raw memory."""
    if not isinstance(source, torch.Tensor):
        raise ValueError("Tensor.set_ takes a tensor")
    return tensor.set_(source)  # type: ignore[call-overload, no-any-return]


EAGER: Final[dict[str, Callable[..., Any]]] = {
    "Tensor.data.__set__": lambda tensor, data: setattr(tensor, "data", data),
    "Tensor.set_": _set_from_tensor,
}
"""What pointers can do besides, and plans cannot: giving a tensor other memory. A plan changes its state by
writing into it; state that took other memory would not be what the plan's owner holds."""

PLANS_ONLY: Final = frozenset({"Tensor.backward", "autograd.backward"})
"""What plans can do besides, and posted ops cannot: a backward pass. Clients ask for one by a request of its
own (`planrt.workers.wire.messages.Backward`), because it labels the gradients it leaves."""

REQUIRES_GRAD: Final = "Tensor.requires_grad_"
"""The op that makes a leaf. On the table like any method; it makes a plan one that differentiates."""

TABLE_HASH: Final = hashlib.sha256("\n".join(sorted({*TABLE, *EAGER})).encode()).hexdigest()
"""SHA-256 (hex) over the sorted names: equal on two sides exactly when they know the same ops."""

FACTORIES: Final = frozenset(
    {f"torch.{word}" for word in _FACTORIES.split()}
    | {f"fft.{word}" for word in _FFT_FACTORIES.split()}
    | {"torch.empty", "torch.empty_strided", "torch.empty_permuted"}
) - {"torch.as_tensor", "torch.asarray"}
"""Ops that make a tensor from nothing: the interpreter puts what they make on the plan's device."""

_RANDOM_TORCH = """
    alpha_dropout alpha_dropout_ bernoulli binomial dropout dropout_ feature_alpha_dropout
    feature_alpha_dropout_ feature_dropout feature_dropout_ gru lstm multinomial normal pca_lowrank
    poisson rand rand_like randint randint_like randn randn_like randperm rnn_relu rnn_tanh rrelu rrelu_
    svd_lowrank
"""
_RANDOM_METHODS = """
    bernoulli bernoulli_ cauchy_ exponential_ geometric_ log_normal_ multinomial normal_ random_ uniform_
"""
_RANDOM_FUNCTIONAL = """
    alpha_dropout dropout dropout1d dropout2d dropout3d feature_alpha_dropout fractional_max_pool2d
    fractional_max_pool2d_with_indices fractional_max_pool3d fractional_max_pool3d_with_indices gumbel_softmax
    multi_head_attention_forward rrelu rrelu_ scaled_dot_product_attention
"""
_RANDOM_INIT = "kaiming_uniform_ normal_ uniform_"

RANDOM: Final = frozenset(
    [f"torch.{word}" for word in _RANDOM_TORCH.split()]
    + [f"Tensor.{word}" for word in _RANDOM_METHODS.split()]
    + [f"nn.functional.{word}" for word in _RANDOM_FUNCTIONAL.split()]
    + [f"nn.init.{word}" for word in _RANDOM_INIT.split()]
)
"""Ops that draw random numbers. A pointer's op of these carries a seed, drawn from torch's generator where
the pointer is: the same `torch.manual_seed` there gives the same numbers, whatever else the worker does."""

RESULTS_FOLLOW_FLOATS: Final = FACTORIES | {
    "nn.functional.interpolate",
    "nn.functional.fractional_max_pool2d",
    "nn.functional.fractional_max_pool2d_with_indices",
    "nn.functional.fractional_max_pool3d",
    "nn.functional.fractional_max_pool3d_with_indices",
}
"""Ops where a float among the arguments can change the results' shape."""

_STATISTICS = {
    "torch.batch_norm": ((3, "running_mean"), (4, "running_var")),
    "torch.instance_norm": ((3, "running_mean"), (4, "running_var")),
    "nn.functional.batch_norm": ((1, "running_mean"), (2, "running_var")),
    "nn.functional.instance_norm": ((1, "running_mean"), (2, "running_var")),
}
MEMORY_WRITES: Final = ("Tensor.data.__set__", "Tensor.set_")
"""Ops that give a tensor other memory."""

_NEW_VERSION_COUNTERS = (*MEMORY_WRITES, "Tensor.data", "torch.as_tensor", "torch.asarray")
_RENORMING = ("nn.functional.embedding", "nn.functional.embedding_bag")


def _traits(name: str) -> OpTraits:
    word = name.rpartition(".")[2]
    in_place = word.endswith("_") and not word.endswith("__")
    in_place = in_place or (word.startswith("__i") and word != "__invert__") or word == "__setitem__"
    return OpTraits(
        name,
        random=name in RANDOM,
        factory=name in FACTORIES,
        plans_only=name in PLANS_ONLY,
        in_place=in_place or name in MEMORY_WRITES,
        statistics=_STATISTICS.get(name, ()),
        renorms=name in _RENORMING,
        writes_unseen=name in _STATISTICS or name in MEMORY_WRITES,
        new_version_counter=name in _NEW_VERSION_COUNTERS,
        data_independent=name in GRADIENTS or name in EAGER,
        computes_gradients=name == "autograd.grad",
        reads_gradient=name == "Tensor.grad",
        sets_gradient=name == "Tensor.grad.__set__",
        retains_gradient=name == "Tensor.retain_grad",
        gains_gradient=name in ("Tensor.retain_grad", REQUIRES_GRAD),
    )


TRAITS: Final = {name: _traits(name) for name in (*TABLE, *EAGER)}
"""Name -> what sets the op apart; every op that there is has an entry."""


def written_operands(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """Returns those of an op's arguments that it may write to, whether it succeeds or fails on the way."""
    return (TRAITS.get(name) or _traits(name)).written_arguments(args, kwargs)


def writes_unseen(name: str) -> bool:
    """Returns whether an op changes operands without counting that in their versions, by which autograd sees
    writes."""
    return (TRAITS.get(name) or _traits(name)).writes_unseen


SIZE_OPS: Final = frozenset({"Tensor.size", "Tensor.numel", *SIZE_ARITHMETIC})
"""Ops whose results are numbers (sizes and what is computed from them), not tensors."""

PEER_OPS: Final[frozenset[str]] = frozenset()
"""Ops that need another worker: the interpreter yields a `PeerRequest` for them. None yet."""


def lookup(name: str) -> Callable[..., Any]:
    """Returns the callable behind `name`.

    Raises:
        OpNotAllowedError: `name` is not on the table.
    """
    try:
        return TABLE[name]
    except KeyError:
        raise OpNotAllowedError(f"op {name[:80]!r} is not on the table of ops that plans may use") from None


def lookup_eager(name: str) -> Callable[..., Any]:
    """Returns the callable behind `name`, for an op that a pointer posted.

    Raises:
        OpNotAllowedError: `name` is neither on the table nor in `EAGER`, or only plans have it.
    """
    function = TABLE.get(name) or EAGER.get(name)
    if function is None or name in PLANS_ONLY:
        raise OpNotAllowedError(f"op {name[:80]!r} is not on the table of ops that workers run")
    return function


def name_of(function: Any) -> str | None:
    """Returns the name of a torch function as a `TorchFunctionMode` sees it; None when it is off the
    table."""
    try:
        return _NAMES.get(function)
    except TypeError:  # unhashable: certainly none of ours
        return None

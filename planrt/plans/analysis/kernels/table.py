"""The closed table: kernel -> rule. Reviewed by hand, never extended at run time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from planrt.plans.analysis.kernels.call import (
    Call,
    Links,
    aggregate,
    all_lost,
    along,
    complex_pair,
    copied,
    drawn,
    elementwise,
    fill,
    independent,
    inner,
    norm_of,
    select,
)
from planrt.plans.analysis.kernels.maths import (
    attention,
    batch_norm,
    batch_norm_backward,
    cdist,
    contract,
    convolution,
    convolution_backward,
    group_norm,
    group_norm_backward,
    layer_norm,
    layer_norm_backward,
    loss,
    nll,
    nll_backward,
)
from planrt.plans.analysis.kernels.shapes import (
    cat,
    diagonal,
    embedding,
    expand,
    flip,
    gather,
    index_put,
    index_select,
    indexing,
    pad,
    permute,
    repeat,
    reshape,
    roll,
    select_backward,
    select_view,
    slice_backward,
    slice_scatter,
    slicing,
    split,
    squeeze,
    stack,
    triangle,
    unfold,
    unsqueeze,
    windows,
)

_ELEMENTWISE = """
    __and__ __ilshift__ __ixor__ __lshift__ __or__ __rshift__ __xor__ _conj _conj_physical _fused_dropout _neg_view
    _prelu_kernel _prelu_kernel_backward _to_copy _unsafe_masked_index abs acos acosh add addcdiv addcmul
    alias alias_copy angle asin asinh atan atan2 atanh
    bitwise_and
    bitwise_left_shift bitwise_not bitwise_or bitwise_right_shift bitwise_xor ceil celu clamp clamp_max clamp_min clip
    clone complex conj_physical copysign cos cosh deg2rad detach detach_copy digamma div elu elu_backward eq erf erfc
    erfinv exp exp2 expm1 float_power floor floor_divide fmax fmin fmod frac frexp gcd ge gelu gelu_backward gt
    hardshrink hardshrink_backward hardsigmoid hardsigmoid_backward hardswish hardswish_backward hardtanh
    hardtanh_backward heaviside hypot i0 igamma igammac imag isfinite isinf isnan isneginf isposinf lcm ldexp le
    leaky_relu leaky_relu_backward lerp lgamma lift lift_fresh lift_fresh_copy log log10 log1p log2 log_sigmoid_backward
    log_sigmoid_forward logaddexp logaddexp2 logical_and logical_not logical_or logical_xor logit logit_backward lt
    masked_fill maximum minimum mish mish_backward mul mvlgamma nan_to_num native_dropout native_dropout_backward ne
    neg nextafter polar polygamma positive pow rad2deg real reciprocal relu relu6 remainder resolve_conj resolve_neg
    round rrelu_with_noise_backward rsqrt rsub selu sgn sigmoid sigmoid_backward sign signbit silu silu_backward sin
    sinc sinh softplus softplus_backward softshrink softshrink_backward special_airy_ai special_bessel_j0
    special_bessel_j1 special_bessel_y0 special_bessel_y1 special_chebyshev_polynomial_t special_chebyshev_polynomial_u
    special_chebyshev_polynomial_v special_chebyshev_polynomial_w special_entr special_erfcx
    special_hermite_polynomial_h special_hermite_polynomial_he special_i0e special_i1 special_i1e
    special_laguerre_polynomial_l special_legendre_polynomial_p special_log_ndtr special_modified_bessel_i0
    special_modified_bessel_i1 special_modified_bessel_k0 special_modified_bessel_k1 special_ndtri
    special_scaled_modified_bessel_k0 special_scaled_modified_bessel_k1 special_shifted_chebyshev_polynomial_t
    special_shifted_chebyshev_polynomial_u special_shifted_chebyshev_polynomial_v
    special_shifted_chebyshev_polynomial_w special_spherical_bessel_j0 special_xlog1py special_zeta sqrt square sub
    tan tanh tanh_backward threshold threshold_backward true_divide trunc where xlogy
"""

_INDEPENDENT = """
    arange bartlett_window blackman_window cauchy empty empty_like empty_permuted empty_strided
    exponential eye full full_like geometric hamming_window hann_window kaiser_window linspace log_normal logspace
    _efficientzerotensor _linalg_check_errors
    new_empty new_empty_strided new_full new_ones new_zeros ones ones_like rand rand_like randint
    randint_like randn randn_like random randperm scalar_tensor tril_indices triu_indices uniform zero zeros zeros_like
"""


def named(words: str, rule: Callable[[Call], Links]) -> dict[str, Callable[[Call], Links]]:
    """Gives several kernels the same rule."""
    return dict.fromkeys(words.split(), rule)


RULES: Final[dict[str, Callable[[Call], Links]]] = {
    **named(_ELEMENTWISE, elementwise),
    **named(_INDEPENDENT, independent),
    **named("bernoulli normal", drawn),
    **named("copy", copied),
    **named("fill", fill),
    **named("poisson binomial", elementwise),
    **named("view_as_complex view_as_complex_copy view_as_real view_as_real_copy", complex_pair),
    # aggregates
    **named("sum nansum", aggregate("sum")),
    **named("mean nanmean", aggregate("mean")),
    **named("var var_mean", aggregate("var")),
    **named("std std_mean", aggregate("std")),
    **named("logsumexp", aggregate("logsumexp")),
    **named("count_nonzero", aggregate("count")),
    **named("linalg_vector_norm", norm_of("norm", "ord")),
    **named("norm", norm_of("norm", "p")),
    **named("trace", all_lost),
    **named("bincount histc", all_lost),  # how many have this value: a row's value wherever that is one
    # selections
    **named("max min amax amin aminmax argmax argmin median nanmedian mode kthvalue all any prod", select),
    **named(
        "_softmax _log_softmax _safe_softmax _softmax_backward_data _log_softmax_backward_data sort topk argsort"
        " cumsum cumprod cummax cummin logcumsumexp _cummax_helper glu glu_backward linalg_cross",
        along("dim"),
    ),
    **named("renorm", all_lost),
    # views and rearrangements
    **named("view _unsafe_view reshape _reshape_alias _reshape_copy view_copy", reshape),
    **named("permute permute_copy transpose transpose_copy t t_copy", permute),
    **named("unsqueeze unsqueeze_copy", unsqueeze),
    **named("squeeze squeeze_copy", squeeze),
    **named("select select_copy unbind unbind_copy", select_view),
    **named("slice slice_copy", slicing),
    **named(
        "split split_copy unsafe_split split_with_sizes split_with_sizes_copy unsafe_split_with_sizes chunk"
        " unsafe_chunk",
        split,
    ),
    **named("expand expand_copy", expand),
    **named("diagonal diagonal_copy", diagonal),
    **named("unfold unfold_copy", unfold),
    **named("im2col col2im", windows),
    **named("flip", flip),
    **named("roll", roll),
    **named("cat", cat),
    **named("stack", stack),
    **named("repeat", repeat),
    **named("constant_pad_nd", pad),
    **named("tril triu", triangle),
    **named("select_scatter slice_scatter", slice_scatter),
    **named("select_backward", select_backward),
    **named("slice_backward", slice_backward),
    # indexing
    **named("index", indexing),
    **named("index_select", index_select),
    **named("gather scatter scatter_add scatter_reduce", gather),
    **named("index_put _index_put_impl _unsafe_index_put", index_put),
    **named("embedding", embedding),
    # products
    **named("mm", contract("self mat2", "ik,kj->ij")),
    **named("addmm", contract("self mat1 mat2", "*,ik,kj->ij")),
    **named("bmm", contract("self mat2", "bik,bkj->bij")),
    **named("baddbmm", contract("self batch1 batch2", "*,bik,bkj->bij")),
    **named("addbmm", contract("self batch1 batch2", "*,bik,bkj->ij")),
    **named("mv", contract("self vec", "ik,k->i")),
    **named("addmv", contract("self mat vec", "*,ik,k->i")),
    **named("dot", contract("self tensor", "k,k->")),
    **named("vdot", contract("self other", "k,k->")),
    **named("addr", contract("self vec1 vec2", "*,i,j->ij")),
    **named("_cdist_forward", cdist),
    **named("convolution convolution convolution_overrideable", convolution),
    **named("convolution_backward convolution_backward_overrideable", convolution_backward),
    # losses and normalisation
    **named(
        "mse_loss smooth_l1_loss huber_loss binary_cross_entropy binary_cross_entropy_with_logits soft_margin_loss",
        loss,
    ),
    **named(
        "mse_loss_backward smooth_l1_loss_backward huber_loss_backward binary_cross_entropy_backward"
        " soft_margin_loss_backward",
        elementwise,
    ),
    **named("nll_loss_forward nll_loss2d_forward", nll),
    **named("nll_loss_backward nll_loss2d_backward", nll_backward),
    **named("native_layer_norm", layer_norm),
    **named("native_layer_norm_backward", layer_norm_backward),
    **named("native_batch_norm _native_batch_norm_legit", batch_norm),
    **named("native_batch_norm_backward", batch_norm_backward),
    **named("native_group_norm", group_norm),
    **named("native_group_norm_backward", group_norm_backward),
    **named(
        "_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention"
        " _scaled_dot_product_efficient_attention",
        attention,
    ),
    # the last dimensions mixed, the others kept
    **named(
        "adaptive_avg_pool1d adaptive_max_pool1d avg_pool1d max_pool1d upsample_linear1d upsample_nearest1d"
        " reflection_pad1d replication_pad1d reflection_pad1d_backward replication_pad1d_backward"
        " upsample_linear1d_backward upsample_nearest1d_backward _upsample_nearest_exact1d"
        " _upsample_nearest_exact1d_backward",
        inner(1),
    ),
    **named(
        "_adaptive_avg_pool2d _adaptive_avg_pool2d_backward adaptive_max_pool2d adaptive_max_pool2d_backward avg_pool2d"
        " avg_pool2d_backward max_pool2d_with_indices max_pool2d_with_indices_backward upsample_bilinear2d"
        " upsample_bilinear2d_backward upsample_nearest2d upsample_nearest2d_backward upsample_bicubic2d"
        " upsample_bicubic2d_backward reflection_pad2d reflection_pad2d_backward replication_pad2d"
        " replication_pad2d_backward _upsample_nearest_exact2d _upsample_nearest_exact2d_backward linalg_inv_ex"
        " linalg_cholesky_ex"
        " _linalg_svd _linalg_eigh linalg_qr linalg_matrix_exp _linalg_det _linalg_slogdet _linalg_solve_ex"
        " linalg_lu_factor_ex linalg_lu_solve linalg_pinv linalg_solve_triangular cholesky_solve cholesky_inverse",
        inner(2),
    ),
    **named(
        "_adaptive_avg_pool3d _adaptive_avg_pool3d_backward adaptive_max_pool3d adaptive_max_pool3d_backward avg_pool3d"
        " avg_pool3d_backward max_pool3d_with_indices max_pool3d_with_indices_backward upsample_trilinear3d"
        " upsample_trilinear3d_backward upsample_nearest3d upsample_nearest3d_backward reflection_pad3d"
        " replication_pad3d pixel_shuffle pixel_unshuffle channel_shuffle",
        inner(3),
    ),
    **named("_fft_c2c _fft_r2c _fft_c2r", along("dim")),
}
"""Kernel -> rule. In-place forms have the rule of the name without the underscore."""

_AGGREGATES = "sum mean var std logsumexp count norm matmul convolution loss layer_norm batch_norm"

AGGREGATES: Final = frozenset(_AGGREGATES.split())
"""The kinds of aggregates that rows can go through, by the names that reports and policies use."""

_VIEWS = """
    view _unsafe_view _reshape_alias permute transpose t unsqueeze squeeze select unbind slice split split_with_sizes
    chunk expand diagonal unfold detach alias as_strided view_as_real view_as_complex real imag _conj _neg_view
    lift_fresh lift resolve_conj resolve_neg
"""

VIEWS: Final = frozenset(_VIEWS.split())
"""Kernels that compute nothing."""

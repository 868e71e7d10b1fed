"""torch's own samples of (nearly) every function, run on a worker and here: the same results.

The samples are torch's `OpInfo` database: edge cases of shapes, dtypes and arguments for some 600 functions, with
their method and in-place forms.
"""

import collections
import gc

import pytest
import torch
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.opinfo.core import OpInfo

from planrt.errors import RemoteOpError, RemoteValueError
from planrt.plans.ir.ops import RANDOM
from planrt.types import leaves, map_leaves
from tests.op_samples import samples_of

SAMPLES = {torch.float32: 2, torch.int64: 1, torch.bool: 1, torch.bfloat16: 1, torch.complex64: 1}
"""dtype -> samples of each function; for the first one also its method and in-place forms."""

CHECKED_LATER_HERE = {("addbmm", "in place")}
"""On the CPU, torch lets this one change its operand's shape; its own inference does not."""

FACTORIES = {
    "arange", "linspace", "logspace", "randn", "randint", "ones", "zeros", "full", "empty_strided", "empty", "eye",
    "empty_permuted", "scalar_tensor", "normal", "triu_indices", "tril_indices", "rand", "uniform",
}  # fmt: skip
"""Functions without a tensor among their arguments run here, where they are called."""

RANDOM_DRAWS = {name.split(".")[-1].rstrip("_") for name in RANDOM} | {"normal", "uniform"}
"""Another generator draws there: same shape and dtype, other numbers."""

UNINITIALISED = {"empty_like", "new_empty", "new_empty_strided"}

READS_VALUES = {"item", "allclose", "equal"}

LEFT_OUT = {
    "as_strided": "raw memory", "as_strided_copy": "raw memory", "as_strided_scatter": "raw memory",
    "resize_": "uninitialised memory", "resize_as_": "uninitialised memory",
    "unsafe_chunk": "chunk", "unsafe_split": "split", "lu": "linalg.lu_factor",
    "triangular_solve": "linalg.solve_triangular", "linalg.ldl_solve": "takes pivots as they come",
    "to_sparse": "sparse", "hash_tensor": "gives uint64", "_segment_reduce": "can read out of bounds",
    "nn.functional.triplet_margin_with_distance_loss": "takes a callable",
    "nn.functional.linear_cross_entropy": "takes an options object",
    "native_group_norm": "a kernel", "native_layer_norm": "a kernel", "native_batch_norm": "a kernel",
    "chalf": "complex32 does not travel",
    **dict.fromkeys(
        [
            "_softmax_backward_data", "_native_batch_norm_legit", "_batch_norm_with_update", "_upsample_bilinear2d_aa",
            "max_pool2d_with_indices_backward", "torch.ops.aten._safe_softmax.default", "slice", "_chunk_cat",
            "torch.ops.aten._scaled_dot_product_flash_attention_for_cpu", "_unsafe_masked_index",
            "_unsafe_masked_index_put_accumulate", "native_dropout_backward", "torch._scaled_mm", "torch._scaled_mm_v2",
            "sparse.sampled_addmm", "sparse.mm", "torch.ops.aten._flash_attention_forward",
            "torch.ops.aten._efficient_attention_forward",
        ],
        "torch's own internals",
    ),
}  # fmt: skip
"""Refused on remote tensors, and why (see planrt/plans/ir/left_out.py)."""


def usable(tensor):
    return tensor.layout == torch.strided and not tensor.is_quantized and tensor.dtype != torch.complex32


def skipped(op):
    return (
        op.name in FACTORIES | READS_VALUES | set(LEFT_OUT)
        or op.name.startswith(("signal.windows.", "masked.", "_refs.", "torch.ops."))  # masks are made here
    )


def tensors_to(value, change):
    return map_leaves(value, lambda leaf: change(leaf) if isinstance(leaf, torch.Tensor) else leaf)


def forms(op, dtype):
    """The function, its method and its in-place method."""
    yield "function", op.op
    if dtype != torch.float32:
        return
    method, in_place = op.get_method(), op.get_inplace()
    if method is not None:
        yield "method", method
    if in_place is not None:
        yield "in place", in_place


def plain(result):
    return tuple(plain(part) for part in result) if isinstance(result, tuple | list) else result


def compare(op, there, here):
    here, there = plain(here), plain(there)
    if op.name.split(".")[-1].rstrip("_") in RANDOM_DRAWS | UNINITIALISED or op.name in RANDOM_DRAWS:
        for one, other in zip(leaves(there), leaves(here), strict=True):
            assert (one.shape, one.dtype) == (other.shape, other.dtype)
        return
    torch.testing.assert_close(there, here, equal_nan=True)


def walk(bob, dtype):
    """Runs every op's samples there and here: how many agree, and what does not."""
    done, wrong = collections.Counter(), []
    torch.manual_seed(0)
    for op in op_db:
        assert isinstance(op, OpInfo)
        if skipped(op) or not op.supports_dtype(dtype, "cpu"):
            continue
        for sample in samples_of(op, dtype, SAMPLES[dtype]):
            arguments = ((sample.input, *sample.args), sample.kwargs)
            if not all(usable(leaf) for leaf in leaves(arguments) if isinstance(leaf, torch.Tensor)):
                continue
            for form, function in forms(op, dtype):
                if (op.name, form) in CHECKED_LATER_HERE:
                    continue
                args, kwargs = tensors_to(arguments, torch.clone)
                try:
                    here = tensors_to(plain(function(*args, **kwargs)), torch.detach)
                except Exception:  # this form does not take this sample, here either
                    done["not here either"] += 1
                    continue
                args, kwargs = tensors_to(arguments, lambda tensor: tensor.clone().send(bob))
                try:
                    result = plain(function(*args, **kwargs))
                    there = tensors_to(result, lambda pointer: pointer.clone().get().detach())
                    compare(op, there, here)
                    done["same"] += 1
                except Exception as error:
                    wrong.append(f"{op.name} ({form}): {type(error).__name__}: {str(error)[:200]}")
    return done, wrong


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("transport", "dtype"),
    [*[("memory", dtype) for dtype in SAMPLES], ("websocket", torch.float32)],
    indirect=["transport"],
    ids=str,
)
def test_every_op_gives_what_it_gives_here(bob, dtype):
    done, wrong = walk(bob, dtype)
    assert not wrong, "\n".join(wrong)
    assert done["same"] > (1000 if dtype == torch.float32 else 250), done
    gc.collect()
    assert bob.objects_count() == 0


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name", sorted(READS_VALUES | {"as_strided", "resize_", "to_sparse", "unsafe_split"})
)
def test_what_is_left_out_says_why(bob, name):
    op = next(op for op in op_db if op.name == name)
    (sample,) = samples_of(op, torch.float32, 1)
    args, kwargs = tensors_to(((sample.input, *sample.args), sample.kwargs), lambda tensor: tensor.send(bob))
    with pytest.raises((RemoteOpError, RemoteValueError), match=r"get\(\)"):
        op.op(*args, **kwargs)

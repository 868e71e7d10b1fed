"""The table: what is on it, what never is, and that the tracer and the interpreter agree on it."""

import hashlib
import itertools

import pytest
import torch

from planrt.errors import OpNotAllowedError
from planrt.plans import ops

NEVER = [
    "item", "tolist", "numpy", "data_ptr", "as_strided", "as_strided_", "set_", "apply_", "map_", "map2_",
    "register_hook", "storage", "untyped_storage", "resize_", "resize_as_", "share_memory_", "pin_memory",
    "__reduce_ex__", "__setstate__", "__array__", "__bool__", "__float__", "__int__", "__dlpack__", "new",
    "backward", "load", "save", "from_file", "frombuffer", "from_numpy", "compile", "equal", "is_nonzero",
    "manual_seed", "set_num_threads", "set_default_dtype", "record_stream", "module_load", "type",
]  # fmt: skip


@pytest.mark.parametrize("name", NEVER)
@pytest.mark.parametrize("home", ["torch", "Tensor"])
def test_what_is_never_on_the_table(home, name):
    with pytest.raises(OpNotAllowedError, match=r"is not on the table"):
        ops.lookup(f"{home}.{name}")


def test_no_function_on_the_table_is_one_that_is_never_allowed():
    forbidden = {
        getattr(home, name) for home, name in itertools.product((torch, torch.Tensor), NEVER)
        if hasattr(home, name)
    }  # fmt: skip
    assert not forbidden & {f for f in ops.TABLE.values() if f.__hash__}


@pytest.mark.parametrize("name", ["os.system", "torch.hub.load", "", "__import__", "Tensor.__class__", "add"])
def test_names_are_never_resolved_by_path(name):
    with pytest.raises(OpNotAllowedError):
        ops.lookup(name)


def test_names_that_the_tracer_finds_are_on_the_table():
    for function in (
        torch.add,
        torch.Tensor.add,
        torch.nn.functional.relu,
        torch.Tensor.T.__get__,
        torch.empty,
    ):
        name = ops.name_of(function)
        assert name in ops.TABLE
    assert ops.name_of(torch.Tensor.item) is None
    assert ops.name_of([]) is None


def test_the_hash_is_over_the_sorted_names():
    assert hashlib.sha256("\n".join(sorted(ops.TABLE)).encode()).hexdigest() == ops.TABLE_HASH


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("torch.empty", (64,)), ("torch.empty_like", (torch.full((64,), 5.0),)),
        ("torch.empty_strided", ((8, 8), (8, 1))), ("torch.empty_permuted", ((8, 8), (1, 0))),
        ("Tensor.new_empty", (torch.full((64,), 5.0), (64,))),
        ("Tensor.new_empty_strided", (torch.full((64,), 5.0), (8, 8), (8, 1))),
    ],
)  # fmt: skip
def test_empty_factories_give_zeros_never_old_memory(name, args, monkeypatch):
    for dirty in [torch.full((64,), 9.0) for _ in range(50)]:
        del dirty
    for kwargs in ({}, {"dtype": torch.int64}, {"requires_grad": True}):
        made = ops.lookup(name)(*args, **kwargs)
        assert not made.any()
        assert made.requires_grad == bool(kwargs.get("requires_grad"))
        assert made.is_leaf


def test_size_arithmetic_is_64_bit_integers_and_floats():
    assert ops.lookup("operator.floordiv")(7, 2) == 3
    assert ops.lookup("operator.truediv")(7, 2) == 3.5
    assert ops.lookup("operator.neg")(3) == -3
    for operands in [(2**62, 2), (torch.ones(1), 1), ("a", 3), ([1], 2**30), (True, 1)]:
        with pytest.raises(ValueError, match=r"operator\.mul"):
            ops.lookup("operator.mul")(*operands)

"""What kernels rely on is looked at before they run, where an index out of range would end the device for all.

There need be no such device here: the checks are told that the CPU's memory is one.
"""

from __future__ import annotations

import collections
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch.testing._internal.common_methods_invocations import op_db

import planrt
from planrt.errors import ExecutionError, PlanrtError
from planrt.plans import Graph, Op
from planrt.plans.ir import index_guards, ops
from planrt.plans.ir.index_guards import INDEX_GUARDS
from planrt.plans.running.interpreter import execute
from planrt.types import Ref, TensorSpec
from tests.op_samples import samples_of

ROW, TABLE = torch.arange(3.0), torch.arange(12.0).reshape(3, 4)
FAR, BELOW = torch.tensor([0, 10**9]), torch.tensor([-1, 0])
OUT_OF_RANGE = {
    "brackets": ("Tensor.__getitem__", (ROW, FAR), {}),
    "brackets, of a list": ("Tensor.__getitem__", (ROW, [0, 3]), {}),
    "brackets, of lists": ("Tensor.__getitem__", (TABLE, [[0, 1], [1, 4]]), {}),
    "brackets, after a slice": ("Tensor.__getitem__", (TABLE, (slice(None), torch.tensor([4]))), {}),
    "brackets, after dots": ("Tensor.__getitem__", (TABLE, (..., torch.tensor([-5]))), {}),
    "brackets, after a new dimension": ("Tensor.__getitem__", (TABLE, (None, torch.tensor([3]))), {}),
    "brackets, after a mask": ("Tensor.__getitem__", (TABLE, (torch.tensor([True, False, True]), FAR)), {}),
    "assignment": ("Tensor.__setitem__", (ROW, FAR, 1.0), {}),
    "gather": ("torch.gather", (TABLE, 1, torch.tensor([[4]])), {}),
    "gather from the end": ("Tensor.gather", (TABLE, 1, torch.tensor([[-1]])), {}),
    "index_select": ("Tensor.index_select", (TABLE, 0, FAR), {}),
    "index_add": ("Tensor.index_add_", (ROW, 0, FAR, torch.ones(2)), {}),
    "index_copy": ("Tensor.index_copy_", (ROW, 0, BELOW, torch.ones(2)), {}),
    "index_fill": ("Tensor.index_fill_", (ROW, 0, torch.tensor([-4]), 1.0), {}),
    "index_reduce": ("Tensor.index_reduce_", (ROW, 0, FAR, torch.ones(2), "amax"), {}),
    "index_put": ("Tensor.index_put_", (ROW, [FAR], torch.ones(2)), {}),
    "scatter": ("Tensor.scatter_", (ROW, 0, FAR, 1.0), {}),
    "scatter_add": ("Tensor.scatter_add", (ROW, 0, FAR, torch.ones(2)), {}),
    "scatter_reduce": ("Tensor.scatter_reduce", (ROW, 0, BELOW, torch.ones(2), "sum"), {}),
    "take": ("torch.take", (TABLE, torch.tensor([12])), {}),
    "put": ("Tensor.put_", (ROW, FAR, torch.ones(2)), {}),
    "take_along_dim": ("torch.take_along_dim", (TABLE, torch.tensor([[4]]), 1), {}),
    "embedding": ("nn.functional.embedding", (FAR, TABLE), {}),
    "embedding_bag": ("nn.functional.embedding_bag", (FAR, TABLE, torch.tensor([0])), {}),
    "offsets": ("nn.functional.embedding_bag", (torch.tensor([0, 1]), TABLE, torch.tensor([0, 9])), {}),
    "classes": ("nn.functional.cross_entropy", (TABLE, torch.tensor([0, 1, 4])), {}),
    "a class below": ("nn.functional.nll_loss", (TABLE, torch.tensor([0, 1, -1])), {}),
    "margins": ("nn.functional.multi_margin_loss", (TABLE, torch.tensor([0, 1, 4])), {}),
    "labels": ("nn.functional.multilabel_margin_loss", (ROW, torch.tensor([0, 3, -1])), {}),
    "one_hot": ("nn.functional.one_hot", (torch.tensor([0, 3]), 3), {}),
    "draws": ("torch.multinomial", (torch.tensor([0.5, -0.5]), 1), {}),
    "coins": ("torch.bernoulli", (torch.tensor([0.5, 1.5]),), {}),
    "coins in place": ("Tensor.bernoulli_", (ROW, torch.tensor([0.5, float("nan"), 1.0])), {}),
    "a loss of probabilities": ("nn.functional.binary_cross_entropy", (ROW, torch.ones(3)), {}),
    "rates": ("torch.poisson", (torch.tensor([-1.0]),), {}),
    "binomial": ("torch.binomial", (torch.tensor([3.0]), torch.tensor([1.5])), {}),
    "repeats": ("Tensor.repeat_interleave", (ROW, torch.tensor([1, -1, 1])), {}),
    "a mask": ("Tensor.masked_scatter_", (ROW, torch.ones(3, dtype=torch.bool), torch.ones(2)), {}),
    "unpooling": ("nn.functional.max_unpool1d", (torch.ones(1, 2), torch.tensor([[0, 99]]), 2), {}),
}
SPEECH = torch.randn(5, 2, 4).log_softmax(-1)
EVERYWHERE = {
    "targets": (
        "nn.functional.ctc_loss",
        (SPEECH, torch.tensor([[1, 2], [50, 3]]), torch.tensor([5, 5]), torch.tensor([2, 2])),
        {},
    ),
    "targets below": (
        "torch.ctc_loss",
        (SPEECH, torch.tensor([1, 2, -9, 3]), torch.tensor([5, 5]), torch.tensor([2, 2])),
        {},
    ),
    "lengths": (
        "nn.functional.ctc_loss",
        (SPEECH, torch.tensor([1, 2, 3]), torch.tensor([5, 5]), torch.tensor([2, 2])),
        {},
    ),
    "a blank": (
        "nn.functional.ctc_loss",
        (SPEECH, torch.tensor([[1], [2]]), torch.tensor([5, 5]), torch.tensor([1, 1])),
        {"blank": 2**40},
    ),
    "batch sizes": (
        "torch._pad_packed_sequence",
        (torch.ones(3, 2, 2, 1), torch.tensor([0, 0, 1]), True, 1.0, -2),
        {},
    ),
    "another shape": ("Tensor.addbmm_", (torch.tensor(1.0), torch.ones(2, 5, 5), torch.ones(2, 5, 9)), {}),
    "another dtype": (
        "Tensor.addbmm_",
        (torch.ones(5, 9), torch.ones(2, 5, 5), torch.ones(2, 5, 9, dtype=torch.complex64)),
        {},
    ),
}


@pytest.fixture
def everything_is_elsewhere(monkeypatch):
    monkeypatch.setattr(
        index_guards, "elsewhere", lambda value: isinstance(value, torch.Tensor) and not value.is_meta
    )


def _copied(value):
    if isinstance(value, torch.Tensor):
        return value.clone()
    return type(value)(map(_copied, value)) if isinstance(value, tuple | list) else value


@pytest.mark.parametrize("name", OUT_OF_RANGE)
def test_the_value_is_told_before_the_kernel_runs(name, everything_is_elsewhere):
    op, args, kwargs = OUT_OF_RANGE[name]
    with pytest.raises(
        (IndexError, ValueError), match=r"out of range: they reach from|the mask takes 3 numbers"
    ):
        ops.TABLE[op](*_copied(args), **kwargs)


@pytest.mark.parametrize("name", EVERYWHERE)
def test_kernels_that_trust_their_callers_on_the_cpu_too(name, make_worker):
    op, args, kwargs = EVERYWHERE[name]
    with pytest.raises(ValueError, match=op.rpartition(".")[2]):
        ops.TABLE[op](*_copied(args), **kwargs)
    tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
    numbers = iter(range(len(tensors)))
    refs = tuple(Ref(next(numbers)) if isinstance(arg, torch.Tensor) else arg for arg in args)
    graph = Graph(
        tuple(map(TensorSpec.of, tensors)), (), (Op(op, refs, kwargs, Ref(len(tensors))),), Ref(len(tensors))
    )
    with pytest.raises(ExecutionError, match=op.rpartition(".")[2]):
        execute(graph, [tensor.clone() for tensor in tensors])
    if op == "torch._pad_packed_sequence":
        return  # nobody calls it on pointers
    planrt.TorchHook(torch)
    worker = make_worker("bob")
    home, _, word = op.rpartition(".")
    function = getattr({"torch": torch, "Tensor": torch.Tensor, "nn.functional": F}[home], word)
    there = [arg.clone().send(worker) if isinstance(arg, torch.Tensor) else arg for arg in args]
    with pytest.raises((PlanrtError, ValueError, RuntimeError)):
        function(*there, **kwargs).get()
    assert there[0].get().shape == args[0].shape  # and holds no memory of others


def test_a_failed_addbmm_leaves_what_it_was_given(make_worker):
    planrt.TorchHook(torch)
    worker = make_worker("bob")
    x = torch.tensor(1.0).send(worker)
    with pytest.raises((PlanrtError, RuntimeError)):
        x.addbmm_(
            torch.ones(2, 5, 5).send(worker), torch.ones(2, 5, 9, dtype=torch.complex64).send(worker)
        ).get()
    assert x.get().shape == ()


def test_torchs_own_samples_pass(everything_is_elsewhere):
    """No check refuses what its kernel takes: all of torch's samples of these ops, valid ones among them."""
    functions = {
        function.__wrapped__: (name, function)
        for name in INDEX_GUARDS
        if (function := ops.TABLE.get(name)) is not None
    }
    seen, wrong = collections.Counter(), []
    torch.manual_seed(0)
    for info in op_db:
        for dtype in (torch.float32, torch.int64):
            if not info.supports_dtype(dtype, "cpu"):
                continue
            forms = [info.op, info.get_method(), info.get_inplace()]
            named = [functions[form] for form in forms if form in functions]
            if (
                info.name in INDEX_GUARDS
                and info.name in ops.TABLE
                and info.name != "nn.functional.embedding"
            ):
                named.append((info.name, ops.TABLE[info.name]))
            if info.name == "__getitem__":
                named.append(("Tensor.__getitem__", ops.TABLE["Tensor.__getitem__"]))
            if not named:
                continue
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                for sample in samples_of(info, dtype):
                    for name, function in named:
                        call = (_copied(sample.input), *_copied(sample.args)), sample.kwargs
                        try:
                            function.__wrapped__(*_copied(call[0]), **call[1])
                        except Exception:  # no sample of this form
                            continue
                        try:
                            function(*call[0], **call[1])
                            seen[name] += 1
                        except (IndexError, ValueError) as error:
                            if name != "Tensor.addbmm_":  # which would take another shape
                                wrong.append(f"{name}: {error}")
    assert not wrong
    assert len(seen) > 45


def test_what_users_write_passes(everything_is_elsewhere):
    look = ops.TABLE["Tensor.__getitem__"]
    cube = torch.arange(24.0).reshape(2, 3, 4)
    keys = [
        0, -1, slice(1), None, ..., True, [0, 1], torch.tensor([1, -2]), torch.tensor(1),
        (0, 2, 3), (..., [3, -4]), (slice(None), None, torch.tensor([2])), (torch.tensor([True, False]), 2),
        (torch.ones(2, 3, dtype=torch.bool), torch.full((6,), 3)), cube > 3, (0, ..., torch.tensor([3])),
        ([0, 1], [2, 0]), (torch.tensor([[0], [1]]), torch.tensor([0, 2])), range(2), (), (None, ..., None),
    ]  # fmt: skip
    for key in keys:
        assert torch.equal(look(cube, key), cube[key]), key
    loss = ops.TABLE["nn.functional.cross_entropy"]
    assert loss(TABLE, torch.tensor([0, -100, 3])) == F.cross_entropy(TABLE, torch.tensor([0, -100, 3]))
    assert loss(TABLE, torch.tensor([0, 7, 3]), ignore_index=7) >= 0
    pairs = ops.TABLE["Tensor.index_select"](TABLE.expand(3, 4), 0, torch.tensor([2]).expand(5))
    assert pairs.shape == (5, 4)
    assert ops.TABLE["Tensor.index_select"](torch.tensor(3.0), 0, torch.tensor([0])) == 3
    assert ops.TABLE["torch.embedding"](TABLE, torch.tensor([], dtype=torch.long)).shape == (0, 4)


def test_every_guard_stands_before_an_op():
    missing = {name for name in INDEX_GUARDS if name not in ops.TABLE}
    assert all(
        not hasattr(torch.Tensor, name.removeprefix("Tensor.")) for name in missing if "Tensor" in name
    )
    assert all(ops.TABLE[name].__wrapped__ is not None for name in INDEX_GUARDS if name in ops.TABLE)

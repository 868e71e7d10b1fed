"""Ops that give any number of results: counted before they run, and refused beyond a number."""

import pytest
import torch

from planrt.errors import ExecutionError
from planrt.plans.analysis.analysing import analyse
from planrt.plans.ir import ops, result_limits
from planrt.plans.ir.parsing import parse
from planrt.plans.running.interpreter import execute

X = torch.arange(24.0).reshape(4, 6)
CUBE = torch.arange(24.0).reshape(2, 3, 4)
CALLS = {
    "unbind": [((X,), {}), ((X, 1), {}), ((X,), {"dim": -1}), ((torch.ones(0, 3),), {})],
    "unbind_copy": [((X,), {}), ((), {"input": X, "dim": 1})],
    "split": [((X, 1), {}), ((X, 4), {"dim": 1}), ((X, [1, 3]), {}), ((X, (1, 1, 1, 1, 1, 1), 1), {})],
    "split_copy": [((X, 1), {}), ((), {"input": X, "split_size": 1, "dim": 1})],
    "chunk": [
        ((X, 3), {}),
        ((X, 9), {"dim": 1}),
        ((X,), {"chunks": 2}),
        ((X, 5, 1), {}),
        ((torch.ones(0), 7), {}),
    ],
    "tensor_split": [
        ((X, 7), {}),
        ((X, 3), {"dim": 1}),
        ((X, [1, 2, 3]), {}),
        ((X, (0, 1, 2, 3, 4, 5, 6), -1), {}),
        ((X, torch.tensor([1, 2, 3])), {}),
        ((X, torch.tensor(6)), {}),
    ],
    "hsplit": [((X, 6), {}), ((X, [1, 2]), {}), ((X,), {"sections": 3})],
    "vsplit": [((X, 4), {}), ((X,), {"indices": [1, 2, 3]})],
    "dsplit": [((CUBE, 4), {}), ((CUBE, [1]), {})],
}
CASES = [(word, *call) for word, calls in CALLS.items() for call in calls]


def many_in_the_table():
    """The words of the table whose results torch declares as a list of any length."""
    words = {name.rpartition(".")[2] for name in ops.TABLE if name.startswith(("torch.", "Tensor."))}
    listing = set()
    for word in words:
        for schema in torch._C._jit_get_schemas_for_operator(f"aten::{word}"):
            if [str(result.type) for result in schema.returns] == ["List[Tensor]"]:
                listing.add(word)
    return listing


def test_every_op_that_gives_a_list_counts_or_is_bounded_by_its_arguments():
    """Of those that do not count, each result has an argument of its own, or a dimension."""
    by_arguments = {
        "atleast_1d", "atleast_2d", "atleast_3d", "broadcast_tensors", "gradient", "meshgrid",
        "split_with_sizes", "split_with_sizes_copy", "where", "nonzero", "align_tensors",
    }  # fmt: skip
    assert many_in_the_table() - by_arguments == set(result_limits.MANY)


@pytest.mark.parametrize(("word", "args", "kwargs"), CASES)
@pytest.mark.parametrize("most", [0, 1, 2, 3, 4, 5, 6, 7, 8])
def test_the_count_is_that_of_torch(monkeypatch, word, args, kwargs, most):
    monkeypatch.setattr(result_limits, "MAX_RESULTS", most)
    results = getattr(torch, word)(*args, **kwargs)
    function = ops.TABLE[f"torch.{word}"]
    if len(results) <= most:
        assert all(map(torch.equal, function(*args, **kwargs), results))
    else:
        with pytest.raises(ValueError, match=f"{word} would give {len(results)} results.* may give {most}$"):
            function(*args, **kwargs)


@pytest.mark.parametrize(
    ("word", "args", "kwargs", "says"),
    [
        ("unbind", (X, 5), {}, "out of range"),
        ("split", (X, 1, 5), {}, "out of range"),
        ("split", (X, 0), {}, "split_size"),
        ("split", (X,), {}, "takes no such arguments|missing"),
        ("chunk", (X, 0), {}, "chunks"),
        ("chunk", (X, 2.5), {}, "must be int"),
        ("split", (X, None), {}, "takes no such|not iterable|invalid combination|argument"),
        ("tensor_split", (X, 0), {}, "number of sections"),
        ("hsplit", (X, 5), {}, "divisible"),
    ],
)
@pytest.mark.parametrize("most", [3, 1 << 16])
def test_wrong_arguments_get_an_error_that_says_so(monkeypatch, word, args, kwargs, says, most):
    monkeypatch.setattr(result_limits, "MAX_RESULTS", most)
    refused = "may give" if most == 3 and word == "hsplit" else says
    with pytest.raises((ValueError, IndexError, RuntimeError, TypeError), match=refused):
        ops.TABLE[f"torch.{word}"](*args, **kwargs)


HOSTILE = """plan hostile
  _0: input x float32[1]
  _1 = _0.expand(1000000000)
  _2, _3 = _1.{call}
  _4 = _2.add(_3)
  return _4
"""


@pytest.mark.parametrize("call", ["unbind()", "split(1)", "chunk(100000000)", "tensor_split(100000000)"])
def test_a_plan_that_would_fill_memory_with_results_is_refused_by_looking_and_by_running(call):
    graph = parse(HOSTILE.format(call=call))
    with pytest.raises(ExecutionError, match="op 1 of plan 'hostile'.*would give 1,?0.*,000 results"):
        execute(graph, [torch.ones(1)])
    with pytest.raises(ExecutionError, match=",000 results"):
        analyse(graph)

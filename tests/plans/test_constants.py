"""Constants as an owner reads them, and as they wait on the owner's disk."""

import pytest
import torch

from planrt.errors import PlanFormatError
from planrt.plans import trace
from planrt.plans.ir.constants import (
    KEPT,
    Constant,
    approval_hash,
    constants_of,
    decoded,
    is_waiting,
    plan_that_waits,
    waiting_bytes,
)

pytestmark = pytest.mark.filterwarnings(
    "ignore::planrt.errors.PlanWarning"
)  # they capture tensors on purpose


def plan_with(*tables):
    graph = trace(
        lambda x: sum((x.sum() * table.to(x.dtype).real.sum() for table in tables), x.sum()), [torch.ones(2)]
    )
    return graph, constants_of(graph, graph.state_values)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (torch.tensor([0.1, -2.0, float("nan")]), "[0.1, -2, nan]"),
        (torch.tensor(12345678901), "[12345678901]"),
        (torch.tensor([True, False]), "[1, 0]"),
        (torch.tensor([1 + 2j]), "[1, 2]"),
        (torch.zeros(0, 3), "[]"),
        (torch.eye(5), "25 numbers, from 0 to 1, 20 of them 0"),
        (torch.full((20,), float("nan")), "20 numbers, 0 of them 0, 20 no number"),
        (torch.arange(20), "20 numbers, from 0 to 19, 1 of them 0"),
    ],
)
def test_a_constant_in_words(values, said):
    assert str(Constant("a" * 64, values)) == f"sha256 {'a' * 16}  {said}"


def test_what_waits_comes_back():
    tables = torch.tensor([1.5, -0.0, float("nan")]), torch.arange(6).reshape(2, 3), torch.zeros(0)
    graph, constants = plan_with(*tables)
    data = waiting_bytes(graph.to_bytes(), constants)
    assert is_waiting(data)
    plan, pairs = plan_that_waits(data)
    assert plan == graph.to_bytes()
    again = decoded(graph, pairs)
    assert [one.digest for one in again] == [one.digest for one in constants]
    for one, table in zip(again, tables, strict=True):
        torch.testing.assert_close(one.values, table, rtol=0, atol=0, equal_nan=True)
    assert approval_hash(graph, again) == approval_hash(graph, constants) != graph.hash


def test_large_ones_wait_as_their_digests():
    graph, constants = plan_with(torch.zeros(KEPT // 4 + 1))
    data = waiting_bytes(graph.to_bytes(), constants)
    assert len(data) < 10_000
    (one,) = decoded(graph, plan_that_waits(data)[1])
    assert one.values is None
    assert approval_hash(graph, [one]) == approval_hash(graph, constants)


def test_without_constants_nothing_is_as_it_was_not():
    graph, constants = plan_with()
    assert constants == ()
    assert approval_hash(graph, ()) == graph.hash
    assert waiting_bytes(b"plan", ()) == b"plan"
    assert not is_waiting(graph.to_bytes())


def test_order_and_number_of_constants_count():
    one, two = torch.ones(2), torch.zeros(2)
    graph, constants = plan_with(one, two)
    hashes = {
        approval_hash(graph, constants),
        approval_hash(graph, constants[::-1]),
        approval_hash(graph, constants[:1]),
    }
    assert len(hashes) == 3


def test_a_file_that_was_changed_is_refused():
    graph, constants = plan_with(torch.ones(2))
    data = waiting_bytes(graph.to_bytes(), constants)
    place = data.rindex(torch.ones(2).numpy().tobytes())
    changed = data[:place] + torch.zeros(2).numpy().tobytes() + data[place + 8 :]
    with pytest.raises(PlanFormatError, match="not what its digest says"):
        decoded(graph, plan_that_waits(changed)[1])
    with pytest.raises(PlanFormatError):
        plan_that_waits(data[:-1])
    with pytest.raises(PlanFormatError, match="another size"):
        decoded(graph, [(constants[0].digest, b"1234")])
    with pytest.raises(PlanFormatError, match="1 constants, and the values of 0"):
        decoded(graph, [])
    with pytest.raises(PlanFormatError, match="the values of 0"):
        constants_of(graph, ())

"""Limits of a policy hold for single ops and for fetches as they do for plans, on either transport."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from planrt.errors import GetNotPermittedError, PolicyError, PolicyRefusedError
from planrt.plans.policy.rules import Policy
from planrt.plans.policy.single_ops import check_op
from planrt.serde.values import DEVICE
from tests.pointers.conftest import OWNER


def small(**keys):
    return Policy(approval="open", **keys)


def refused(rule, op=None):
    """Expects a refusal by that rule that names the op."""
    return pytest.raises(PolicyRefusedError, match=rf"{op or ''}.* breaks the policy: \[{rule}\]")


def test_an_op_that_takes_more_memory_than_is_allowed(hospital):
    worker = hospital(small(max_memory=64 * 2**20))()
    x = torch.ones(3).send(worker)
    with refused("max_memory", "Tensor.new_ones") as raised:
        x.new_ones(2**28).sum().get()
    assert "its peak of memory is 1 GiB, more than the 64 MiB allowed" in str(raised.value)
    assert raised.value.op == "Tensor.new_ones"
    with refused("max_memory"):
        x.expand(2**27, 3).contiguous().get()
    with refused("max_memory"):
        x.repeat(2**26).get()
    assert (x + 1).get().tolist() == [2.0, 2.0, 2.0]  # and it goes on


def test_an_op_that_computes_more_than_is_allowed(hospital):
    worker = hospital(small(max_flops=10**6))()
    x = torch.ones(100, 100).send(worker)
    with refused("max_flops", "Tensor.matmul") as raised:
        (x @ x).get()
    assert "its computation is 2 MFLOP, more than the 1 MFLOP allowed" in str(raised.value)
    assert (x[:10] @ x).get().tolist() == torch.full((10, 100), 100.0).tolist()


def test_a_sum_over_what_was_expanded_counts_its_entries(hospital):
    worker = hospital(small(max_flops=10**9, max_memory=2**20))()
    wide = torch.ones(1).send(worker).expand(2**33)  # takes no memory
    with refused("max_flops", "Tensor.sum"):
        wide.sum().get()
    assert wide[:5].sum().get().item() == 5.0


def test_arguments_count_once_for_their_memory(hospital):
    worker = hospital(small(max_memory=100_000))()
    x = torch.ones(10_000).send(worker)
    assert (x + x).get().sum().item() == 20_000.0  # 40,000 bytes and 40,000 of the result
    assert (x + x.view(10, 1000).view(-1)).get().sum().item() == 20_000.0
    y = torch.ones(10_000).send(worker)
    with refused("max_memory"):
        (x + y).get()
    assert x.add_(y).get().sum().item() == 20_000.0


@pytest.mark.parametrize(
    "write", [lambda x, out: F.relu(x, inplace=True), lambda x, out: x.mul_(2), lambda x, out: x.add_(out)]
)
def test_an_operand_that_a_refused_op_was_to_change_is_as_it_was(hospital, write):
    worker = hospital(small(max_flops=50))()
    x, other = torch.full((100,), -1.0).send(worker), torch.ones(100).send(worker)
    write(x, other)
    with refused("max_flops"):
        worker.objects_count()
    assert x.get().tolist() == [-1.0] * 100


def test_ops_whose_results_depend_on_values(hospital):
    worker = hospital(small(max_memory=2_000))()
    x = torch.arange(20.0).send(worker)
    mask = x > 4
    assert x[mask].get().tolist() == torch.arange(5.0, 20.0).tolist()
    assert torch.nonzero(x).get().shape == (19, 1)
    assert x.masked_select(mask).get().shape == (15,)
    with refused("max_memory", "nonzero"):  # at most 300 times 8 bytes
        torch.nonzero(torch.ones(300).send(worker))
    with refused("max_memory", "bincount") as raised:
        torch.bincount(torch.tensor([2**40]).send(worker))
    assert "cannot be told without values" in str(raised.value)
    with refused("max_memory", "repeat_interleave"):
        torch.repeat_interleave(x, torch.full((20,), 2**40).send(worker))


def test_such_ops_run_where_nothing_is_limited(hospital):
    worker = hospital(small(max_memory=None, max_flops=None))()
    assert torch.bincount(torch.tensor([1, 3]).send(worker)).get().tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize("fill", [0, 1])
def test_a_refusal_tells_nothing_of_private_values(hospital, fill):
    """Whatever the values are, the answers are the same."""
    connect = hospital(small(max_memory=10_000))
    owner = connect(OWNER)
    torch.full((200,), fill).tag("#private").send(owner, allowed_users=["owner"])
    owner.objects_count()
    (there,) = connect().search("#private")
    with refused("max_memory", "Tensor.repeat") as raised:
        there.repeat(100).get()
    assert "its peak of memory is 158 KiB" in str(raised.value)
    for counts in (torch.bincount, torch.nonzero):
        with pytest.raises(GetNotPermittedError):
            counts(there)
    with pytest.raises(GetNotPermittedError):
        (there + 1).get()


def test_an_op_that_names_a_device_is_looked_at_without_being_run():
    """What a plan or a client writes as a device does not make the worker take that memory in order to count it."""
    for device in (DEVICE, "cpu", None):
        with pytest.raises(PolicyError, match=r"\[max_memory\] its peak of memory is 1024 TiB"):
            check_op(small(max_flops=None), "torch.ones", (2**48,), {"device": device})


def test_an_op_that_takes_long_to_look_at_is_refused(hospital):
    """A loop in one op, over an operand that takes no memory: each turn of it is looked at."""
    worker = hospital(small(max_check_seconds=0.01))()
    wide = torch.ones(1, 1, 1).send(worker).expand(1_000, 1, 1)
    weights = [torch.ones(*shape).send(worker) for shape in ((3, 1), (3, 1), (3,), (3,))]
    h = torch.zeros(1, 1, 1).send(worker)
    with refused("max_check_seconds", "gru"):
        torch.gru(wide, h, weights, True, 1, 0.0, False, False, False)[0].get()


def test_a_fetch_brings_no_more_than_is_allowed(hospital):
    worker = hospital(small(max_output_bytes=1_000))()
    x = torch.ones(500, requires_grad=True).send(worker)
    with pytest.raises(
        PolicyRefusedError, match=r"\[max_output_bytes\] what leaves takes 1.95 KiB, more than"
    ):
        x.get()
    assert x[:250].detach().get().shape == (250,)  # it is still there, and can be fetched in parts
    with pytest.raises(PolicyRefusedError, match="max_output_bytes"):
        x.detach()[:1].expand(2**40).get()
    y = torch.ones(200, requires_grad=True).send(worker)
    y.sum().backward()
    with pytest.raises(PolicyRefusedError, match=r"what leaves takes 1.56 KiB"):  # with the gradient
        y.get()
    y.grad = None
    assert y.get().shape == (200,)

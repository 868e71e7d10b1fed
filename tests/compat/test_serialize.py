"""``sy.serde.serialize`` and ``deserialize``: plans and tensors as bytes."""

from __future__ import annotations

import struct
import subprocess
import sys

import pytest
import syft as sy
import torch
from torch import nn

import planrt
from planrt.errors import LocalError, OptionError, PlanError, PlanFormatError, PlanrtError
from planrt.serde.dtypes import DTYPES

serialize, deserialize = sy.serde.serialize, sy.serde.deserialize


def test_a_plan_without_state():
    plan = sy.func2plan(args_shape=[(-1,)])(lambda x: (x * 2).abs())
    back = deserialize(serialize(plan))
    assert back.is_built
    assert back(torch.tensor([-1.0, 2.0])).tolist() == [2.0, 4.0]
    assert (back.hash, back.readable_plan) == (plan.hash, plan.readable_plan)


def test_a_plan_with_state(bob):
    class Net(sy.Plan):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(2, 3)

        def forward(self, x):
            return self.fc(x).relu()

    net = Net().tag("#net").describe("a net")
    net.build(torch.zeros(1, 2))
    back = deserialize(serialize(net))
    x = torch.randn(4, 2)
    assert torch.equal(back(x), net(x))
    assert (back.tags, back.description) == ({"#net"}, "a net")
    assert torch.equal(back.send(bob)(x.send(bob)).get(), net(x))


def test_a_plan_with_state_tensors():
    plan = sy.func2plan(args_shape=[(1,)], state=(torch.tensor([4.2]),))(lambda x, state: x + state.read()[0])
    assert deserialize(serialize(plan))(torch.tensor([1.0])).item() == pytest.approx(5.2)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_tensors_of_every_dtype(dtype):
    x = torch.arange(6).reshape(2, 3).to(dtype)
    back = deserialize(serialize(x))
    assert back.dtype == dtype
    assert torch.equal(back.view(torch.uint8), x.view(torch.uint8))


@pytest.mark.parametrize(
    "x",
    [
        torch.tensor(3.5), torch.empty(0), torch.empty(2, 0, 3), torch.randn(4, 5).t(), torch.randn(6)[::2],
        torch.randn(2, requires_grad=True), nn.Parameter(torch.ones(2)), torch.tensor([True, False]),
    ],
)  # fmt: skip
def test_tensors_of_every_form(x):
    back = deserialize(serialize(x))
    assert torch.equal(back, x)
    assert (back.shape, back.requires_grad, back.dtype) == (x.shape, x.requires_grad, x.dtype)
    with torch.no_grad():
        back.add_(1) if back.dtype != torch.bool else back.logical_not_()


def test_tags_go_along():
    back = deserialize(serialize(torch.ones(2).tag("#a", "#b").describe("two ones")))
    assert (back.tags, back.description) == ({"#a", "#b"}, "two ones")


def test_what_cannot_be_serialised(bob):
    with pytest.raises(OptionError, match="takes plans and tensors, not Linear"):
        serialize(nn.Linear(1, 1))
    with pytest.raises(OptionError, match="not dict"):
        serialize({})
    with pytest.raises(LocalError, match="on worker 'bob': get"):
        serialize(torch.ones(1).send(bob))
    with pytest.raises(PlanError, match="not built"):
        serialize(sy.func2plan()(lambda x: x))
    with pytest.raises(LocalError):
        serialize(torch.ones(2, 2).to_sparse())
    with pytest.raises(OptionError, match="takes no compress"):
        serialize(torch.ones(1), compress=True)


def test_bytes_of_others():
    good = serialize(torch.ones(3, requires_grad=True))
    for bad in (b"", b"x", good[:8], good[:20], good[:-1], good + b"x", b"\x80\x04K\x01."):
        with pytest.raises(PlanrtError):
            deserialize(bad)
    for bad in ("text", 3, None, torch.ones(1)):
        with pytest.raises(OptionError, match="the bytes that serialize gave"):
            deserialize(bad)
    plan = serialize(sy.func2plan(args_shape=[(1,)])(lambda x: x + 1))
    for bad in (plan[:-1], plan[:60], plan[:-40] + b"\0" * 40):
        with pytest.raises(PlanFormatError):
            deserialize(bad)


def test_a_header_that_lies():
    from planrt.serde.values import pack

    def made(*parts):
        header = pack(list(parts))
        return b"\x89ptensor" + struct.pack("<I", len(header)) + header + b"\0" * 8

    assert deserialize(made([["float32", [2]]], False, [], "")).tolist() == [0, 0]
    for parts in (
        ([["float32", [1 << 40]]], False, [], ""), ([["object", [2]]], False, [], ""), ([], False, [], ""),
        ([["int64", [1]]], True, [], ""), ([["float32", [-2]]], False, [], ""), ([["float32", [2]]], 1, [], ""),
        ([["float32", [2]]], False, [3], ""), ([["float32", [2]]], False, ["x" * 300], ""), ("x",),
    ):  # fmt: skip
        with pytest.raises(PlanrtError):
            deserialize(made(*parts))


@pytest.mark.parametrize("first", ["serialize", "deserialize"])
def test_a_process_that_did_nothing_else_knows_plans(tmp_path, first):
    """Nobody imported the format of plans before."""
    plan = planrt.func2plan(args_shape=[(2,)])(lambda x: x + 1)
    data = tmp_path / "plan"
    data.write_bytes(planrt.serde.serialize(plan))
    code = {
        "serialize": "plan = planrt.func2plan(args_shape=[(2,)])(lambda x: x + 1); planrt.serde.serialize(plan)",
        "deserialize": f"planrt.serde.deserialize(open({str(data)!r}, 'rb').read())(torch.ones(2))",
    }[first]
    done = subprocess.run(
        [sys.executable, "-c", f"import torch, planrt; {code}"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr

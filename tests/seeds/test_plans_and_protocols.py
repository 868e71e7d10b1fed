"""Document 3, the two parts about plans and protocols."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import planrt as sy


@pytest.fixture
def devices(make_worker):
    """Two devices that hold published data; what is tagged outlives its pointer."""
    made = make_worker("device_1"), make_worker("device_2")
    for device in made:
        torch.tensor([-1, 2.0]).tag("input_data").send(device)
        torch.tensor([1, -2.0]).tag("input_data2").send(device)
    return made


class Net(sy.Plan):
    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(2, 3)
        self.fc2 = nn.Linear(3, 2)

    def forward(self, x):
        return F.log_softmax(self.fc2(F.relu(self.fc1(x))), dim=0)


def test_a_virtual_worker_made_with_data(hook):
    with sy.VirtualWorker(hook, id="device_3", data=(torch.tensor([-1, 2.0]).tag("input_data"),)) as device:
        assert device.search("input_data")[0].get().tolist() == [-1, 2]


def test_double_abs(devices):
    @sy.func2plan()
    def plan_double_abs(x):
        x = x + x
        return torch.abs(x)

    assert "<Plan plan_double_abs id:" in str(plan_double_abs)
    assert "owner:me" in str(plan_double_abs)
    assert not plan_double_abs.is_built
    with pytest.raises(RuntimeError, match="not built"):
        plan_double_abs.send(devices[0])
    plan_double_abs.build(torch.tensor([1.0, 2.0]))
    assert plan_double_abs.is_built
    pointer = plan_double_abs.send(devices[0])
    assert str(pointer).startswith("[PointerPlan | me:")
    assert "-> device_1:" in str(pointer)
    (data,) = devices[0].search("input_data")
    result = pointer(data)
    assert str(result).startswith("(Wrapper)>[PointerTensor | me:")
    assert str(result.get()) == "tensor([2., 4.])"


def test_one_net_on_two_devices(devices):
    torch.manual_seed(0)
    net = Net()
    assert str(net).startswith("<Plan Net id:")
    net.build(torch.tensor([1.0, 2.0]))
    for device in devices:
        result = net.send(device)(device.search("input_data")[0]).get()
        assert torch.allclose(result, net(torch.tensor([-1, 2.0])))
        assert result.requires_grad


def test_built_from_shapes(devices):
    @sy.func2plan(args_shape=[(-1, 1)])
    def plan_double_abs(x):
        x = x + x
        return torch.abs(x)

    @sy.func2plan(args_shape=[(1, 2), (-1, 2)])
    def plan_sum_abs(x, y):
        return torch.abs(x + y)

    assert plan_double_abs.is_built
    assert plan_sum_abs.is_built
    assert plan_sum_abs(torch.ones(1, 2), -2 * torch.ones(3, 2)).tolist() == [[1, 1]] * 3


def test_a_plan_with_state(devices):
    bias = torch.tensor([1000.0])

    @sy.func2plan(args_shape=[(1,)], state=(bias,))
    def plan_abs(x, state):
        (bias,) = state.read()
        return x.abs() + bias

    pointer = plan_abs.send(devices[0])
    x_ptr = torch.tensor([-1, 0]).send(devices[0])
    assert pointer(x_ptr).get().tolist() == [1001.0, 1000.0]


def three_increments():
    def inc(x):
        return x + 1

    return [sy.func2plan(args_shape=[(1,)])(inc) for _ in range(3)]


def test_a_protocol(make_worker, hook, capsys):
    hook.local_worker.is_client_worker = False
    inc1, inc2, inc3 = three_increments()
    protocol = sy.Protocol([("worker1", inc1), ("worker2", inc2), ("worker3", inc3)], verbose=True)
    workers = [make_worker(id) for id in ("alice", "bob", "charlie")]
    charlie = workers[-1]
    protocol.deploy(*workers)
    lines = str(protocol).splitlines()
    assert lines[0] == f"<Protocol id:{protocol.id} owner:me resolved>"
    assert [line.split(":")[0] for line in lines[1:]] == [" - alice", " - bob", " - charlie"]
    assert all("[PointerPlan | me:" in line for line in lines[1:])
    pointer = protocol.run(torch.tensor([1.0]))
    assert capsys.readouterr().out.splitlines() == ["send alice", "move alice -> bob", "move bob -> charlie"]
    assert pointer.location is charlie
    assert str(pointer.get()) == "tensor([4.])"

    james = make_worker("james")
    protocol.send(james)
    result = protocol.run(torch.tensor([1.0]).send(james))
    assert capsys.readouterr().out.startswith("send remote run request to james")
    assert result.location is james
    inner = result.get()
    assert inner.location is charlie
    assert inner.get().tolist() == [4.0]


def test_searching_for_a_protocol(make_worker, hook):
    workers = [make_worker(id) for id in ("alice", "bob", "charlie")]
    james, me = make_worker("james"), sy.hook.local_worker
    inc1, inc2, inc3 = three_increments()
    protocol = sy.Protocol([("worker1", inc1), ("worker2", inc2), ("worker3", inc3)])
    protocol.tag("my_protocol")
    protocol.send(james)
    responses = me.request_search(["my_protocol"], location=james)
    (found,) = responses
    assert str(found).startswith("[PointerProtocol | me:")
    assert f"-> james:{protocol.id}]" in str(found)
    back = found.get()
    assert back.id == protocol.id
    assert str(back).count(".add(1)") == 3
    assert len(back.plans) == 3
    back.deploy(*workers)
    assert back.run(torch.tensor([1.0])).get().tolist() == [4.0]

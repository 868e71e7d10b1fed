"""What programs of PySyft 0.2 expect of the hook, of parameters and of modules on workers."""

from __future__ import annotations

import pytest
import syft as sy
import torch
import torch.nn.functional as F
from torch import nn

from planrt.errors import LocalError, MixedLocationsError, UnknownWorkerError

# -------------------------------------------------------------------------------------------------- the hook


def test_torch_is_hooked_once(hook):
    assert torch.torch_hooked
    assert hook.torch.__version__ == torch.__version__ == sy.torch.__version__
    assert sy.TorchHook(torch) is hook is sy.hook


def test_a_local_worker_that_others_know(hook, me):
    assert me is hook.local_worker is sy.local_worker
    assert "me" in me._known_workers
    assert me.is_client_worker in (True, False)


def test_a_worker_is_registered(hook, me):
    boris = sy.VirtualWorker(id="boris", hook=hook, is_client_worker=False)
    me.add_workers([boris])
    assert me.get_worker(boris) is boris is me.get_worker("boris")
    assert boris.is_client_worker is False
    boris.close()


def test_an_unknown_worker(me):
    with pytest.raises(sy.exceptions.WorkerNotFoundException, match="Missing"):
        me.get_worker("Missing")
    with pytest.raises(UnknownWorkerError):
        me.remove_worker_from_registry("Missing")


def test_a_tensor_here_knows_its_owner(me):
    x = torch.Tensor([1, 2])
    assert x.owner is me
    assert x.is_wrapper is False
    assert x.id == x.id != torch.Tensor([1, 2]).id


def test_torchs_own_functions_are_as_they_were():
    x = torch.tensor([[1, 2], [3, 4]])
    assert torch.einsum("ij,jk->ik", x, x).tolist() == [[7, 10], [15, 22]]
    assert torch.as_tensor((0.1, 0.2), dtype=torch.float32).tolist() == pytest.approx([0.1, 0.2])
    assert torch.Tensor([1, 2, 3, 4]).reshape((2, 2)).tolist() == [[1, 2], [3, 4]]
    assert (torch.ones(3) == torch.ones(3)).sum().item() == 3


@pytest.mark.parametrize("name", ["abs", "add", "mul", "reshape"])
def test_native_names_are_torchs_methods(name):
    x = torch.tensor([-1.0, 2.0])
    given = {"abs": (), "add": (x,), "mul": (x,), "reshape": (2, 1)}[name]
    assert torch.equal(getattr(x, f"native_{name}")(*given), getattr(x, name)(*given))


def test_a_part_of_a_tensor_with_a_history_is_sent(bob):
    x = torch.tensor([1.0, -1, 3], requires_grad=True)[0:2]
    pointer = x.send(bob)
    assert hasattr(pointer, "child")
    assert pointer.get().tolist() == [1, -1]


# ------------------------------------------------------------------------------------------------ parameters


def test_a_parameter_of_a_pointer(bob):
    parameter = nn.Parameter(torch.tensor([1.0, -1, 3]).send(bob))
    assert isinstance(parameter, nn.Parameter)
    assert parameter.get().data.tolist() == [1, -1, 3]


def test_a_parameter_there_and_back(bob):
    parameter = nn.Parameter(torch.tensor([1.0, -1]))
    back = parameter.send(bob).get()
    assert (back.tolist(), back.requires_grad) == ([1, -1], True)


def test_a_parameter_in_place_there_and_back(bob):
    parameter = nn.Parameter(torch.tensor([1.0, -1]))
    number = parameter.id
    pointer = parameter.send_(bob)
    assert pointer is parameter
    assert pointer.id == number
    assert pointer.get_() is parameter
    assert isinstance(parameter, nn.Parameter)
    assert (parameter.data.tolist(), parameter.id) == ([1, -1], number)


def test_a_parameter_through_two_workers(bob, alice):
    parameter = nn.Parameter(torch.tensor([1.0, -1]))
    assert parameter.send(bob).send(alice).get().get().data.tolist() == [1, -1]


def test_sums_of_parameters(bob, alice):
    tensor = torch.tensor([1.0, -1, 3])
    pointer = nn.Parameter(tensor.clone()).send(bob)
    assert torch.equal((pointer + pointer).get(), tensor + tensor)
    outer = nn.Parameter(tensor.clone()).send(bob).send(alice)
    assert torch.equal((outer + outer).get().get(), tensor + tensor)


def test_a_module_of_ones_own_lists_its_parameters(bob):
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.x = nn.Parameter(torch.Tensor([1, 2, 3]))

    layer = Layer()
    assert [one is layer.x for one in layer.parameters()] == [True]
    layer.send(bob)
    assert [one is layer.x for one in layer.parameters()] == [True]
    assert layer.get().x.tolist() == [1, 2, 3]


# --------------------------------------------------------------------------------------------------- modules


MODULES = {"linear": (lambda: nn.Linear(2, 1), (2,)), "conv": (lambda: nn.Conv2d(1, 3, 3), (1, 1, 6, 6))}


@pytest.mark.parametrize("kind", MODULES)
def test_a_module_computes_where_it_is(bob, kind):
    make, shape = MODULES[kind]
    model, x = make(), torch.randn(shape)
    expected = model(x)
    there = model.send(bob)
    assert there is model
    assert model.location is bob
    assert torch.allclose(there(x.send(bob)).get(), expected)
    assert model.get() is model
    assert model.location is None
    assert torch.equal(model(x), expected)
    assert bob.objects_count() == 0


@pytest.mark.parametrize("kind", MODULES)
def test_a_module_computes_through_two_pointers(bob, alice, kind):
    make, shape = MODULES[kind]
    model, x = make(), torch.randn(shape)
    expected = model(x)
    there = model.send(bob).send(alice)
    assert model.location is alice
    result = there(x.send(bob).send(alice))
    assert torch.allclose(result.get().get(), expected)
    model.get()
    assert model.location is bob
    assert torch.allclose(model(x.send(bob)).get(), expected)
    model.get()
    assert torch.equal(model(x), expected)
    assert bob.objects_count() == alice.objects_count() == 0


def test_a_module_learns_through_two_pointers(bob, alice):
    torch.manual_seed(0)
    model, x, y = nn.Linear(2, 1), torch.randn(4, 2), torch.randn(4, 1)
    twin = nn.Linear(2, 1)
    twin.load_state_dict(model.state_dict())
    optimizers = [torch.optim.SGD(one.parameters(), lr=0.1) for one in (model, twin)]
    model.send(bob).send(alice)
    there = x.send(bob).send(alice), y.send(bob).send(alice)
    for one, optimizer, (data, target) in zip((model, twin), optimizers, (there, (x, y)), strict=True):
        for _ in range(3):
            optimizer.zero_grad()
            ((one(data) - target) ** 2).sum().backward()
            optimizer.step()
    model.get().get()
    assert torch.allclose(model.weight, twin.weight)


def test_what_is_elsewhere_in_a_chain_is_refused(bob, alice):
    model = nn.Linear(2, 1).send(bob).send(alice)
    with pytest.raises(MixedLocationsError):
        model(torch.ones(2).send(alice))
    model.get().get()
    with pytest.raises(LocalError, match="send"):
        model.get()


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.RNN(3, 4)
        self.fc = nn.Linear(4, 2)

    def forward(self, x):
        return self.fc(self.rnn(x)[0][-1])


def test_gradients_of_a_recurrent_net_are_set_there(bob):
    torch.manual_seed(0)
    net = Recurrent()
    x, y = torch.randn(5, 2, 3), torch.tensor([0, 1])
    F.cross_entropy(net(x), y).backward()
    expected = [one.grad.clone() for one in net.parameters()]
    net.zero_grad()
    net.send(bob)
    F.cross_entropy(net(x.send(bob)), y.send(bob)).backward()
    for parameter, grad in zip(net.parameters(), expected, strict=True):
        assert torch.allclose(parameter.grad.copy().get(), grad, atol=1e-6)


@pytest.mark.parametrize("most", [0.01, 2.0])
def test_gradients_are_clipped_there_as_here(bob, most):
    torch.manual_seed(0)
    net = Recurrent()
    x, y = torch.randn(5, 2, 3), torch.tensor([0, 1])
    F.cross_entropy(net(x), y).backward()
    total = nn.utils.clip_grad_norm_(net.parameters(), most)
    expected = [one.grad.clone() for one in net.parameters()]
    net.zero_grad()
    net.send(bob)
    F.cross_entropy(net(x.send(bob)), y.send(bob)).backward()
    there = nn.utils.clip_grad_norm_(net.parameters(), most)
    assert torch.allclose(there.get(), total)
    for parameter, grad in zip(net.parameters(), expected, strict=True):
        assert torch.allclose(parameter.grad.copy().get(), grad, atol=1e-6)


def test_a_copy_of_a_module_and_a_module_that_moves(bob, alice):
    model = nn.Linear(2, 1)
    weight = model.weight.detach().clone()
    copied = model.copy().send(bob)
    copied.move(alice)
    assert (copied.location, model.location) == (alice, None)
    assert torch.equal(copied.get().weight, weight)

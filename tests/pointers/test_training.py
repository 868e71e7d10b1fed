"""Remote autograd, modules on workers, optimizers: the same numbers as local PyTorch."""

import copy
import gc

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from planrt.errors import (
    LocalError,
    MixedLocationsError,
    RemoteError,
    RemoteOpError,
    UnsupportedTensorError,
)

# ------------------------------------------------------------------------------------------------ autograd


def test_gradients_of_leaves(bob):
    x = torch.tensor([1.0, 2.0], requires_grad=True).send(bob)
    y = torch.tensor([3.0, 4.0]).send(bob)
    assert x.requires_grad
    assert x.is_leaf
    assert x.grad is None
    z = (x * y).sum()
    assert z.requires_grad
    assert not z.is_leaf
    assert z.grad_fn is not None
    z.backward()
    assert x.grad.clone().get().tolist() == [3, 4]
    assert repr(x.grad).endswith("::grad")
    assert y.grad is None
    (x * 2).sum().backward()
    assert x.grad.clone().get().tolist() == [5, 6]
    assert x.get().grad.tolist() == [5, 6]


def test_gradients_travel_with_their_tensor(bob):
    x = torch.tensor([1.0], requires_grad=True)
    x.grad = torch.tensor([7.0])
    pointer = x.send(bob)
    (pointer * 2).backward()
    back = pointer.get()
    assert back.grad.item() == 9
    assert back.requires_grad


def test_gradients_can_be_set_and_removed(bob):
    x = torch.ones(2, requires_grad=True).send(bob)
    (x * 3).sum().backward()
    x.grad.mul_(2)
    assert x.grad.clone().get().tolist() == [6, 6]
    x.grad = None
    assert x.grad is None
    x.grad = torch.zeros(2).send(bob)
    x.sum().backward()
    assert x.grad.clone().get().tolist() == [1, 1]
    with pytest.raises(MixedLocationsError):
        x.grad = torch.zeros(2)


def test_backward_with_its_options(bob):
    x = torch.ones(3, requires_grad=True).send(bob)
    y = x * 2
    y.backward(torch.tensor([1.0, 2.0, 3.0]).send(bob), retain_graph=True)
    y.backward(torch.ones(3).send(bob))
    assert x.grad.clone().get().tolist() == [4, 6, 8]
    with pytest.raises(RuntimeError, match="scalar outputs"):
        (x * 2).backward()
    with pytest.raises(RuntimeError, match="does not require grad"):
        torch.ones(1).send(bob).backward()
    z = (x * x).sum()
    z.backward()
    z.backward()
    with pytest.raises(RemoteError, match="second time"):
        x.get()
    assert x.get().grad.tolist() == [6, 8, 10]


def test_non_leaves_keep_gradients_when_asked(bob):
    x = torch.ones(2, requires_grad=True).send(bob)
    y = x * 2
    y.retain_grad()
    (y * 3).sum().backward()
    assert y.grad.get().tolist() == [3, 3]


def test_autograd_grad(bob):
    x = torch.tensor([2.0], requires_grad=True).send(bob)
    unused = torch.tensor([2.0], requires_grad=True).send(bob)
    (first,) = torch.autograd.grad((x**3).sum(), x, create_graph=True)
    assert first.requires_grad
    (second,) = torch.autograd.grad(first.sum(), [x])
    assert (first.detach().get().item(), second.get().item()) == (12, 12)
    grads = torch.autograd.grad((x * 2).sum(), [x, unused], allow_unused=True)
    assert grads[0].get().item() == 2
    assert grads[1] is None
    assert x.grad is None


def test_grad_modes(bob):
    x = torch.ones(2, requires_grad=True).send(bob)
    with torch.no_grad():
        y = x * 2
        x.sub_(0.5)
    assert not y.requires_grad
    assert not x.detach().requires_grad
    with pytest.raises(RuntimeError, match="leaf Variable"):
        x.add_(1)
    frozen = torch.ones(2).send(bob)
    assert frozen.requires_grad_() is frozen
    assert frozen.requires_grad
    (frozen * 3).sum().backward()
    assert frozen.grad.get().tolist() == [3, 3]
    frozen.requires_grad = False
    assert not (frozen * 2).requires_grad
    assert x.get().tolist() == [0.5, 0.5]


def test_data_and_set(bob):
    x = torch.ones(2, requires_grad=True).send(bob)
    x.data.mul_(4)
    x.data = x.data + 1
    assert x.get().tolist() == [5, 5]
    y = torch.zeros(3).send(bob)
    y.set_(torch.ones(2, 2).send(bob))
    assert y.shape == (2, 2)
    assert y.get().tolist() == [[1, 1], [1, 1]]
    with pytest.raises(MixedLocationsError):
        torch.zeros(1).send(bob).set_(torch.zeros(1))


# ------------------------------------------------------------------------------------------------- modules


class Convolutional(nn.Module):
    """A network with batch norm, dropout and an embedding of a parameter of its own."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.3)
        self.out = nn.Linear(4 * 16, 3)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.norm(self.conv(x))), 2)
        return F.log_softmax(self.out(self.drop(x).view(x.shape[0], -1)) * self.scale, dim=1)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 6)
        self.lstm = nn.LSTM(6, 5, num_layers=2, batch_first=True)
        self.out = nn.Linear(5, 3)

    def forward(self, x):
        output, _ = self.lstm(self.embed(x))
        return F.log_softmax(self.out(output[:, -1]), dim=1)


def images(generator):
    return torch.randn(8, 1, 8, 8, generator=generator)


def words(generator):
    return torch.randint(0, 10, (8, 4), generator=generator)


def train(model, optimizer, x, y, steps=3, seed=0):
    losses = []
    for step in range(steps):
        torch.manual_seed(seed + step)
        optimizer.zero_grad()
        loss = F.nll_loss(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss)
    return losses


@pytest.mark.parametrize(("kind", "data"), [(Convolutional, images), (Recurrent, words)], ids=["cnn", "lstm"])
def test_training_there_gives_the_numbers_of_training_here(bob, kind, data):
    generator = torch.Generator().manual_seed(1)
    x, y = data(generator), torch.randint(0, 3, (8,), generator=generator)
    torch.manual_seed(0)
    model = kind()
    for part in model.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0  # its own test: random numbers there are not those drawn here
    local = copy.deepcopy(model)
    torch.set_num_threads(1)
    here = train(local, torch.optim.SGD(local.parameters(), lr=0.1, momentum=0.9), x, y)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    weight = next(model.parameters())
    assert model.send(bob) is model
    assert model.location is bob
    assert next(model.parameters()) is weight
    there = train(model, optimizer, x.send(bob), y.send(bob))
    for one, other in zip(here, there, strict=True):
        torch.testing.assert_close(other.detach().get(), one.detach())
    model.eval()
    local.eval()
    torch.testing.assert_close(model(x.send(bob)).detach().get(), local(x).detach())
    assert model.get() is model
    assert model.location is None
    assert next(model.parameters()) is weight
    assert type(weight) is nn.Parameter
    for (name, one), other in zip(model.state_dict().items(), local.state_dict().values(), strict=True):
        torch.testing.assert_close(one, other, msg=name)
    train(model, optimizer, x, y)  # and the optimizer goes on, here, with its momentum
    train(local, torch.optim.SGD(local.parameters(), lr=0.1), x, y)


def test_dropout_is_reproducible_and_off_in_evaluation(bob):
    model = Convolutional().send(bob)
    x = torch.randn(4, 1, 8, 8).send(bob)

    def output():
        torch.manual_seed(5)
        return model(x).detach().get()

    assert torch.equal(output(), output()) is False or model.training  # batch norm moves on between them
    model.eval()
    assert torch.equal(output(), output())
    assert torch.equal(model.norm.running_mean.clone().get(), model.norm.running_mean.clone().get())


def test_buffers_are_updated_there(bob):
    norm = nn.BatchNorm1d(3)
    running = norm.running_mean
    x = torch.randn(10, 3) + 4
    norm.send(bob)
    norm(x.send(bob))
    norm.get()
    assert norm.running_mean is running
    torch.testing.assert_close(running, 0.1 * x.mean(0))
    assert norm.num_batches_tracked.item() == 1


def test_a_module_with_a_live_graph_can_be_sent(bob):
    model = nn.Linear(2, 1)
    kept = model(torch.ones(1, 2))
    model.send(bob)
    assert model(torch.ones(1, 2).send(bob)).detach().get().item() == pytest.approx(kept.item())
    model.get()


def test_modules_are_copied_and_moved(bob, alice):
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).send(bob)
    twin = model.copy()
    with torch.no_grad():
        model[0].weight.set_(torch.zeros(2, 2).send(bob))
        model[0].weight.add_(1)
    weight = twin[0].weight
    assert twin.move(alice) is twin
    assert twin.location is alice
    assert twin[0].weight is weight
    assert isinstance(weight, nn.Parameter)
    twin(torch.ones(4, 2).send(alice)).sum().backward()
    assert weight.grad is not None
    before = weight.detach().clone().get()
    twin.get()
    assert torch.equal(twin[0].weight.detach(), before)
    assert model.get()[0].weight.tolist() == [[1, 1], [1, 1]]
    here = model.copy()
    assert here[0].weight is not model[0].weight


def test_torchscript_modules_are_refused_whole(bob):
    model = nn.Sequential(nn.Linear(3, 1), torch.jit.trace(nn.Linear(1, 1), torch.ones(1, 1)))
    with pytest.raises(UnsupportedTensorError, match="TorchScript"):
        model.send(bob)
    assert model(torch.ones(1, 3)).shape == (1, 1)
    assert bob.objects_count() == 0


def test_modules_used_wrongly(bob):
    model = nn.Linear(2, 1)
    with pytest.raises(MixedLocationsError, match="this process"):
        model(torch.ones(1, 2).send(bob))
    with pytest.raises(LocalError, match="send\\(\\) it first"):
        model.get()
    model.send(bob)
    with pytest.raises(LocalError, match="already"):
        model.send(bob)
    with pytest.raises(MixedLocationsError, match="this process"):
        model(torch.ones(1, 2))
    with pytest.raises(RemoteOpError, match="deep-copied"):
        copy.deepcopy(model)
    model.get()


OPTIMIZERS = [
    ("SGD", {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "nesterov": True}),
    ("Adam", {"lr": 0.01, "weight_decay": 0.01, "amsgrad": True}),
    ("AdamW", {"lr": 0.01}),
    ("Adamax", {"lr": 0.01}),
    ("NAdam", {"lr": 0.01}),
    ("RAdam", {"lr": 0.01}),
    ("RMSprop", {"lr": 0.01, "momentum": 0.5, "centered": True}),
    ("Rprop", {"lr": 0.01}),
    ("Adagrad", {"lr": 0.1}),
    ("Adadelta", {"lr": 1.0}),
    ("ASGD", {"lr": 0.1}),
    ("Muon", {"lr": 0.01}),
]


def test_every_optimizer_is_here():
    names = {
        name for name, kind in vars(torch.optim).items()
        if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer
    }  # fmt: skip
    assert names - {name for name, _ in OPTIMIZERS} == {"LBFGS", "Adafactor", "SparseAdam"}


@pytest.mark.parametrize(("name", "options"), OPTIMIZERS, ids=[name for name, _ in OPTIMIZERS])
def test_optimizers_step_as_they_do_here(bob, name, options):
    if not hasattr(torch.optim, name):
        pytest.skip(f"this torch has no {name}")
    generator = torch.Generator().manual_seed(2)
    x, y = torch.randn(16, 4, generator=generator), torch.randint(0, 3, (16,), generator=generator)
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Linear(4, 8, bias=False), nn.Tanh(), nn.Linear(8, 3, bias=False), nn.LogSoftmax(dim=1)
    )
    local = copy.deepcopy(model)
    optimizer = getattr(torch.optim, name)(model.parameters(), **options)
    reference = getattr(torch.optim, name)(local.parameters(), **options)
    # A step here, so that state exists, then there, then here again: the state follows the parameters.
    train(model, optimizer, x, y, steps=1)
    model.send(bob)
    train(model, optimizer, x.send(bob), y.send(bob), steps=3)
    model.get()
    train(model, optimizer, x, y, steps=1)
    train(local, reference, x, y, steps=5)
    for one, other in zip(model.parameters(), local.parameters(), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", ["LBFGS", "Adafactor"])
def test_optimizers_that_read_values_say_so(bob, name):
    model = nn.Linear(2, 1)
    optimizer = getattr(torch.optim, name)(model.parameters())
    model.send(bob)
    loss = model(torch.ones(1, 2).send(bob)).sum()
    loss.backward()
    with pytest.raises(RemoteOpError, match=f"{name} cannot step on remote parameters"):
        optimizer.step(lambda: loss)
    model.get()


def test_learning_rate_schedulers_and_clipping(bob):
    model = nn.Linear(2, 1).send(bob)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.1)
    before = model.weight.detach().clone().get()
    for _ in range(2):
        optimizer.zero_grad()
        (model(torch.ones(1, 2).send(bob)) * 100).sum().backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
    assert norm.get().item() == pytest.approx(100 * 3**0.5, rel=1e-4)
    moved = (before - model.weight.detach().get()).norm().item()
    assert moved == pytest.approx(1.1 * (2 / 3) ** 0.5, rel=1e-4)


def test_a_thousand_steps_leave_nothing_behind(bob):
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1)).send(bob)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    x, y = torch.randn(5, 3).send(bob), torch.randn(5, 1).send(bob)

    def steps(count):
        for _ in range(count):
            optimizer.zero_grad()
            loss = F.mse_loss(model(x), y)
            loss.backward()
            optimizer.step()
        gc.collect()
        return bob.objects_count()

    start = steps(5)
    assert steps(1000) == start
    model.get()


def test_the_toy_of_the_tutorial_learns(bob, alice):
    torch.manual_seed(0)
    data = torch.tensor([[0.0, 0], [0, 1], [1, 0], [1, 1]])
    target = torch.tensor([[0.0], [0], [1], [1]])
    parts = [(data[:2].send(bob), target[:2].send(bob)), (data[2:].send(alice), target[2:].send(alice))]
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(10):
        for x, y in parts:
            model.send(x.location)
            optimizer.zero_grad()
            loss = ((model(x) - y) ** 2).sum()
            loss.backward()
            optimizer.step()
            model.get()
            last = loss.get().item()
    assert last < 0.03

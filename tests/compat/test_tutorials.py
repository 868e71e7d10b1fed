"""Small versions of PySyft 0.2's public tutorials, in our words, with the calls as they were typed."""

from __future__ import annotations

import gc

import pytest
import syft as sy
import torch as th
import torch.nn.functional as F
from torch import nn, optim
from torch.utils.data import TensorDataset


@pytest.fixture
def toy():
    data = th.tensor([[0, 0], [0, 1], [1, 0], [1, 1.0]], requires_grad=True)
    target = th.tensor([[0], [0], [1], [1.0]], requires_grad=True)
    return data, target


# --------------------------------------------------------------------------------- part 1: the basic tools


def test_part_1_tensors_on_bob(bob, me, transport):
    x = th.tensor([1, 2, 3, 4, 5])
    y = th.tensor([1, 1, 1, 1, 1])
    x_ptr = x.send(bob)
    y_ptr = y.send(bob)
    assert len(bob._objects) == 2
    assert x_ptr.location is bob
    assert bob == x_ptr.location
    assert x_ptr.location.id == bob.id == "bob"
    assert x_ptr.id_at_location in bob._objects
    assert x_ptr.owner is me
    z = x_ptr + y_ptr
    assert str(z).startswith("(Wrapper)>[PointerTensor | me:")
    assert z.get().tolist() == [2, 3, 4, 5, 6]
    assert th.add(x_ptr, y_ptr).get().tolist() == [2, 3, 4, 5, 6]
    x_ptr.get()
    y_ptr.get()
    assert bob._objects == {}


def test_part_1_gradients(bob):
    x = th.tensor([1, 2, 3, 4, 5.0], requires_grad=True).send(bob)
    y = th.tensor([1, 1, 1, 1, 1.0], requires_grad=True).send(bob)
    z = (x + y).sum()
    z.backward()
    assert x.get().grad.tolist() == [1] * 5


# ------------------------------------------------------------------------------ part 2: federated learning


def test_part_2_a_model_that_travels(bob, alice, toy):
    data, target = toy
    datasets = [
        (data[0:2].send(bob), target[0:2].send(bob)),
        (data[2:].send(alice), target[2:].send(alice)),
    ]
    th.manual_seed(0)
    model = nn.Linear(2, 1)
    opt = optim.SGD(params=model.parameters(), lr=0.1)
    losses = []
    for _ in range(10):
        for data, target in datasets:
            model = model.send(data.location)
            opt.zero_grad()
            pred = model(data)
            loss = ((pred - target) ** 2).sum()
            loss.backward()
            opt.step()
            model.get()
            losses.append(loss.get())
    assert losses[-1].item() < 0.1 < losses[0].item()


# --------------------------------------------------------------------- part 3: pointers to pointers, moves


def test_part_3_pointers_to_pointers(bob, alice, transport):
    x = th.tensor([1, 2, 3, 4])
    x_ptr = x.send(bob)
    pointer_to_x_ptr = x_ptr.send(alice)
    if transport == "memory":
        assert len(bob._objects) == len(alice._objects) == 1
    x_ptr = pointer_to_x_ptr.get()
    assert x_ptr.location is bob
    assert x_ptr.get().tolist() == [1, 2, 3, 4]


def test_part_3_computing_through_two(bob, alice, transport):
    bob.clear_objects()
    alice.clear_objects()
    p2p2x = th.tensor([1, 2, 3, 4, 5]).send(bob).send(alice)
    y = th.add(p2p2x, p2p2x)
    if transport == "memory":
        assert len(alice._objects) == 2  # bob has the sum once alice has passed it on
    assert y.get().get().tolist() == [2, 4, 6, 8, 10]
    assert p2p2x.get().get().tolist() == [1, 2, 3, 4, 5]
    bob.objects_count()
    assert bob._objects == alice._objects == {}


def test_part_3_a_move(bob, alice):
    x = th.tensor([1, 2, 3, 4, 5]).send(bob)
    assert alice._objects == {}
    x = x.move(alice)
    assert bob._objects == {}
    assert x.location is alice
    assert (x + x).get().tolist() == [2, 4, 6, 8, 10]


# ----------------------------------------------------------------- part 4: averaged by a trusted aggregator


def test_part_4_a_trusted_aggregator(bob, alice, make_worker, toy):
    secure_worker = make_worker("secure_worker")
    bob.add_workers([alice, secure_worker])
    alice.add_workers([bob, secure_worker])
    secure_worker.add_workers([alice, bob])
    data, target = toy
    bobs_data, bobs_target = data[0:2].send(bob), target[0:2].send(bob)
    alices_data, alices_target = data[2:].send(alice), target[2:].send(alice)
    th.manual_seed(0)
    model = nn.Linear(2, 1)
    for _ in range(10):
        bobs_model = model.copy().send(bob)
        alices_model = model.copy().send(alice)
        bobs_opt = optim.SGD(params=bobs_model.parameters(), lr=0.1)
        alices_opt = optim.SGD(params=alices_model.parameters(), lr=0.1)
        for _ in range(5):
            bobs_opt.zero_grad()
            bobs_loss = ((bobs_model(bobs_data) - bobs_target) ** 2).sum()
            bobs_loss.backward()
            bobs_opt.step()
            bobs_loss = bobs_loss.get().data
            alices_opt.zero_grad()
            alices_loss = ((alices_model(alices_data) - alices_target) ** 2).sum()
            alices_loss.backward()
            alices_opt.step()
            alices_loss = alices_loss.get().data
        alices_model.move(secure_worker)
        bobs_model.move(secure_worker)
        with th.no_grad():
            model.weight.set_(((alices_model.weight.data + bobs_model.weight.data) / 2).get())
            model.bias.set_(((alices_model.bias.data + bobs_model.bias.data) / 2).get())
    data, target = (one.detach() for one in toy)
    assert ((model(data) - target) ** 2).sum().item() < 0.2
    assert max(bobs_loss.item(), alices_loss.item()) < 0.1


# ------------------------------------------------------------------------------ part 5: the sandbox, a grid


def test_part_5_the_sandbox(make_worker):
    names: dict = {}
    sy.create_sandbox(names, verbose=False, download_data=False, make_worker=make_worker)
    text = "The input datapoints to the boston housing dataset."
    bob, theo, workers = names["bob"], names["theo"], names["workers"]
    x = th.tensor([1, 2, 3, 4, 5]).tag("#fun", "#boston", "#housing").describe(text)
    y = th.tensor([1, 2, 3, 4, 5]).tag("#fun", "#boston", "#housing").describe(text)
    z = th.tensor([1, 2, 3, 4, 5]).tag("#fun", "#mnist").describe("The images in the MNIST training dataset.")
    x, y, z = x.send(bob), y.send(bob), z.send(theo)
    results = bob.search(["#boston", "#housing"])
    assert len(results) == 2
    assert results[0].description == "The input datapoints to the boston housing dataset."
    grid = sy.PrivateGridNetwork(*workers)
    assert {id: len(found) for id, found in grid.search("#fun").items()} == {"bob": 2, "theo": 1}
    assert grid.search("#boston", "#target") == {}


# --------------------------------------------------------------------------- part 6: a CNN on federated data


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 4, 3, 1)
        self.fc1 = nn.Linear(4 * 3 * 3, 10)
        self.fc2 = nn.Linear(10, 2)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv1(x)), 2, 2)
        x = x.view(-1, 4 * 3 * 3)
        return F.log_softmax(self.fc2(F.relu(self.fc1(x))), dim=1)


def pictures(count):
    """Pictures [1, 8, 8] that are bright on the left (0) or on the right (1)."""
    th.manual_seed(3)
    target = th.arange(count) % 2
    data = th.rand(count, 1, 8, 8)
    data[target == 0, :, :, :4] += 1
    data[target == 1, :, :, 4:] += 1
    return TensorDataset(data, target)


def train(model, device, federated_train_loader, optimizer, most=None):
    model.train()
    losses = []
    for batch_idx, (data, target) in enumerate(federated_train_loader):
        if batch_idx == most:
            break
        model.send(data.location)
        data, target = data.to(device), target.to(device)
        optimizer.zero_grad()
        output = model(data)
        loss = F.nll_loss(output, target)
        loss.backward()
        optimizer.step()
        model.get()
        losses.append(loss.get().item())
    return losses


def right(model, test_loader):
    model.eval()
    correct = 0
    with th.no_grad():
        for data, target in test_loader:
            pred = model(data).argmax(1, keepdim=True)
            correct += pred.eq(target.view_as(pred)).sum().item()
    return correct / len(test_loader.dataset)


def test_part_6_a_cnn(bob, alice):
    federated_train_loader = sy.FederatedDataLoader(
        pictures(48).federate((bob, alice)), batch_size=8, shuffle=True
    )
    test_loader = th.utils.data.DataLoader(pictures(20), batch_size=10, shuffle=True)
    th.manual_seed(1)
    model = Net().to("cpu")
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    losses = [
        loss for _ in range(3) for loss in train(model, th.device("cpu"), federated_train_loader, optimizer)
    ]
    assert losses[-1] < losses[0]
    assert right(model, test_loader) > 0.8


# ------------------------------------------------------------------------ part 7: a federated data set by hand


def test_part_7_a_federated_data_set(bob, alice):
    th.manual_seed(0)
    weight = th.tensor([1.0, -2.0, 0.5])
    for worker in (bob, alice):
        data = th.randn(20, 3)
        data.tag("#boston", "#data").send(worker)
        (data @ weight).tag("#boston", "#target").send(worker)
    gc.collect()
    grid = sy.PrivateGridNetwork(bob, alice)
    boston_data = grid.search("#boston", "#data")
    boston_target = grid.search("#boston", "#target")
    model = nn.Linear(boston_data["alice"][0].shape[1], 1)
    datasets = [sy.BaseDataset(boston_data[worker][0], boston_target[worker][0]) for worker in boston_data]
    dataset = sy.FederatedDataset(datasets)
    assert dataset.workers == ["bob", "alice"]
    optimizers = {worker: optim.Adam(params=model.parameters(), lr=1e-1) for worker in dataset.workers}
    train_loader = sy.FederatedDataLoader(dataset, batch_size=10, shuffle=False, drop_last=False)
    totals = []
    for _ in range(5):
        loss_accum = 0.0
        for data, target in train_loader:
            model.send(data.location)
            optimizer = optimizers[data.location.id]
            optimizer.zero_grad()
            loss = ((model(data).view(-1) - target) ** 2).mean()
            loss.backward()
            optimizer.step()
            model.get()
            loss_accum += loss.get().item()
        totals.append(loss_accum)
    assert totals[-1] < totals[0]


# ------------------------------------------------------------------------------- part 8: plans and protocols


def test_part_8_plans(bob, alice, hook):
    hook.local_worker.is_client_worker = False
    for worker in (bob, alice):
        th.tensor([-1, 2.0]).tag("input_data").send(worker)
    gc.collect()

    @sy.func2plan()
    def plan_double_abs(x):
        x = x + x
        return th.abs(x)

    with pytest.raises(RuntimeError, match="not built"):
        plan_double_abs.send(bob)
    plan_double_abs.build(th.tensor([1.0, -2.0]))
    pointer_plan = plan_double_abs.send(bob)
    pointer_to_data = bob.search("input_data")[0]
    pointer_to_result = pointer_plan(pointer_to_data)
    assert pointer_to_result.get().tolist() == [2, 4]
    net = PlanNet()
    net.build(th.tensor([1.0, 2.0]))
    for worker in (bob, alice):
        assert net.send(worker)(worker.search("input_data")[0]).get().shape == (2,)
    hook.local_worker.is_client_worker = True


class PlanNet(sy.Plan):
    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(2, 3)
        self.fc2 = nn.Linear(3, 2)

    def forward(self, x):
        return F.log_softmax(self.fc2(F.relu(self.fc1(x))), dim=0)


def test_part_8_protocols(bob, alice, charlie, james):
    def inc(x):
        return x + 1

    plans = [sy.func2plan(args_shape=[(1,)])(inc) for _ in range(3)]
    protocol = sy.Protocol([("worker1", plans[0]), ("worker2", plans[1]), ("worker3", plans[2])])
    protocol.deploy(alice, bob, charlie)
    assert protocol.run(th.tensor([1.0])).get().tolist() == [4]
    protocol.tag("my_protocol")
    protocol.send(james)
    assert protocol.run(th.tensor([1.0]).send(james)).get().get().tolist() == [4]
    (found,) = sy.hook.local_worker.request_search(["my_protocol"], location=james)
    assert str(found).startswith("[PointerProtocol | me:")


# ------------------------------------------ parts 9 to 13, their encrypted parts: refused, with what to write


def test_parts_9_to_13_encrypted_tensors(bob, alice, james):
    x = th.tensor([25]).share(bob, alice, crypto_provider=james)
    assert (x * x).get().tolist() == [625]
    model = nn.Linear(2, 1).fix_precision().share(bob, alice, crypto_provider=james)
    data = th.ones(3, 2).fix_prec().share(bob, alice, crypto_provider=james)
    found = model(data).get().float_precision()
    assert th.allclose(found, model.get().float_precision()(th.ones(3, 2)), atol=4e-3)
    with pytest.raises(RuntimeError, match="call it on shares"):
        sy.func2plan(args_shape=[(1,)])(lambda x: x).fix_precision()


@pytest.mark.parametrize("name", ["AdditiveSharingTensor", "FixedPrecisionTensor", "keras", "LoggingTensor"])
def test_names_of_the_encrypted_parts_are_refused(name):
    with pytest.raises(AttributeError, match=f"planrt has no syft.{name}: "):
        getattr(sy, name)


def test_part_10_averaging_by_a_third_worker_in_place_of_shares(bob, alice, james):
    """Where the tutorial shares parameters among the workers, a worker that both trust adds them."""
    models = [nn.Linear(2, 1).send(worker) for worker in (bob, alice)]
    new_params = []
    for pair in zip(*(model.parameters() for model in models), strict=True):
        parts = [parameter.data.copy().move(james) for parameter in pair]
        new_params.append(((parts[0] + parts[1]) / 2).get())
    for model in models:
        model.get()
    for new, one, other in zip(new_params, *(model.parameters() for model in models), strict=True):
        assert th.allclose(new, (one + other) / 2)


def test_part_11_a_model_as_a_service_without_encryption(bob):
    """The server's model is private: its clients get what it computes for them, and not itself."""
    model = PlanNet()
    model.build(th.zeros(2))
    served = model.send(bob)
    assert served(th.ones(2).send(bob)).get().shape == (2,)


# ---------------------------------------------------------------------- the course on secure and private AI


def test_course_garbage_collection(bob):
    x = th.tensor([1, 2, 3, 4, 5]).send(bob)
    assert len(bob._objects) == 1
    del x
    assert len(bob._objects) == 0
    x = th.tensor([1, 2, 3, 4, 5]).send(bob)
    x.child.garbage_collect_data = False
    del x
    assert len(bob._objects) == 1
    bob.clear_objects()
    for _ in range(1000):
        x = th.tensor([1, 2, 3, 4, 5]).send(bob)
    assert list(bob._objects) == [x.id_at_location]


def test_course_operations_and_linear_regression(bob, toy):
    x = th.tensor([1.0, 2, 3]).send(bob)
    y = th.tensor([1.0, 1, 1]).send(bob)
    assert (x + y).get().tolist() == [2, 3, 4]
    with pytest.raises(RuntimeError):
        x + th.tensor([1.0, 1, 1])
    inputs, target = (one.detach().send(bob) for one in toy)
    weights = th.tensor([[0.0], [0.0]], requires_grad=True).send(bob)
    losses = []
    for _ in range(10):
        pred = inputs.mm(weights)
        loss = ((pred - target) ** 2).sum()
        loss.backward()
        weights.data.sub_(weights.grad * 0.1)
        weights.grad *= 0
        losses.append(loss.get().data.item())
    assert losses[-1] < 0.1 < losses[0]


def test_course_chains(bob, alice, transport):
    bob.clear_objects()
    alice.clear_objects()
    x = th.tensor([1, 2, 3, 4, 5]).send(bob)
    x.move(alice)
    assert (len(bob._objects), len(alice._objects)) == (0, 1)
    x = th.tensor([1, 2, 3, 4, 5]).send(bob).send(alice)
    x.remote_get()
    assert (len(bob._objects), x.location) == (0, alice)
    x.move(bob)
    assert x.get().tolist() == [1, 2, 3, 4, 5]


# ----------------------------------------------------------------------- federated learning with websockets


LOG_INTERVAL = 2


def train_on_batches(worker, batches, model_in, device, lr):
    model = model_in.copy()
    optimizer = optim.SGD(model.parameters(), lr=lr)
    model.train()
    model.send(worker)
    loss_local = False
    for batch_idx, (data, target) in enumerate(batches):
        loss_local = False
        data, target = data.to(device), target.to(device)
        optimizer.zero_grad()
        output = model(data)
        loss = F.nll_loss(output, target)
        loss.backward()
        optimizer.step()
        if batch_idx % LOG_INTERVAL == 0:
            loss = loss.get()
            loss_local = True
    if not loss_local:
        loss = loss.get()
    model.get()
    return model, loss


def get_next_batches(fdataloader, nr_batches):
    batches = {}
    for worker_id in fdataloader.workers:
        worker = fdataloader.federated_dataset.datasets[worker_id].location
        batches[worker] = []
    try:
        for _ in range(nr_batches):
            next_batches = next(fdataloader)
            for worker in next_batches:
                batches[worker].append(next_batches[worker])
    except StopIteration:
        pass
    return batches


def test_websockets_batches_of_every_worker(make_worker):
    from syft.frameworks.torch.fl import utils

    workers = [make_worker(id) for id in ("alice", "bob", "charlie")]
    for worker in workers:
        worker.clear_objects_remote()
    loader = sy.FederatedDataLoader(
        pictures(48).federate(tuple(workers)), batch_size=4, shuffle=True, iter_per_worker=True
    )
    test_loader = th.utils.data.DataLoader(pictures(20), batch_size=10)
    th.manual_seed(1)
    model = Net()
    losses = []
    for _ in range(4):
        iter(loader)
        batches = get_next_batches(loader, 3)
        counter = 0
        while True:
            models, loss_values = {}, {}
            data_for_all_workers = True
            for worker in batches:
                current = batches[worker]
                if current:
                    models[worker], loss_values[worker] = train_on_batches(worker, current, model, "cpu", 0.1)
                else:
                    data_for_all_workers = False
            counter += 1
            if not data_for_all_workers:
                break
            model = utils.federated_avg(models)
            losses.append({worker.id: loss.item() for worker, loss in loss_values.items()})
            batches = get_next_batches(loader, 3)
        assert counter == 3
    assert sum(losses[-1].values()) < sum(losses[0].values())
    assert right(model, test_loader) > 0.8

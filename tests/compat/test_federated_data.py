"""What programs of PySyft 0.2 expect of data sets, loaders, grids, the sandbox and the utilities."""

from __future__ import annotations

import gc

import pytest
import syft as sy
import torch
from syft.frameworks.torch.fl import utils
from syft.frameworks.torch.fl.dataset import BaseDataset
from torch import nn

from planrt.errors import GonePointerError, LocalError

# ---------------------------------------------------------------------------------------------- BaseDataset


def numbers():
    return BaseDataset(torch.tensor([1, 2, 3, 4.0]), torch.tensor([1, 2, 3, 4.0]))


def test_a_data_set_goes_to_a_worker(bob):
    dataset = numbers()
    assert len(dataset) == 4
    assert dataset[2] == (3, 3)
    pointer = dataset.send(bob)
    assert pointer.data.location.id == pointer.targets.location.id == pointer.location.id == "bob"
    assert pointer.id == dataset.id
    assert pointer.id_at_location == pointer.data.id_at_location
    back = pointer.get()
    assert back[2] == (3, 3)
    assert bob.objects_count() == 0


def test_transformed_at_once():
    dataset = numbers()
    assert dataset.transform(lambda x: x * 2) is dataset
    assert [value.item() for value, _ in dataset] == [2, 4, 6, 8]
    assert dataset.get_data().tolist() == [2, 4, 6, 8]
    assert dataset.get_targets().tolist() == [1, 2, 3, 4]


def test_transformed_item_by_item():
    dataset = BaseDataset(torch.tensor([1, 2.0]), torch.tensor([1, 2.0]), transform=lambda item: item * 3)
    assert [value.item() for value, _ in dataset] == [3, 6]


def test_names_of_a_data_set(me):
    dataset = BaseDataset(torch.ones(2), torch.ones(2), id=1)
    assert (dataset.id, dataset.description, dataset.tags, dataset.owner) == (1, None, set(), me)
    dataset.tag("#a", "#b").describe("two ones")
    assert (dataset.tags, dataset.description) == ({"#a", "#b"}, "two ones")


def test_a_data_set_is_found_by_its_tags(bob):
    numbers().tag("#numbers").describe("a few").send(bob)
    gc.collect()
    found = bob.search("#numbers")
    assert len(found) == 2
    made = BaseDataset(*found)
    assert (len(made), made.description) == (4, "a few")


# ------------------------------------------------------------------------------------------ FederatedDataset


@pytest.fixture
def federated(bob, alice):
    return sy.FederatedDataset([
        BaseDataset(torch.tensor([1, 2]), torch.tensor([1, 2])).send(bob),
        BaseDataset(torch.tensor([3, 4, 5, 6]), torch.tensor([3, 4, 5, 6])).send(alice),
    ])  # fmt: skip


def test_data_on_two_workers(federated):
    assert federated.workers == ["bob", "alice"]
    assert len(federated) == 6
    assert federated["alice"].location.id == "alice"
    assert isinstance(str(federated), str)
    data, target = federated["alice"][2]
    assert (data.get(), target.get()) == (5, 5)


def test_the_data_of_one_worker_is_taken_back(federated, alice):
    back = federated.get_dataset("alice")
    assert back.data.tolist() == [3, 4, 5, 6]
    assert len(back) == 4
    assert back[2] == (5, 5)
    assert (len(federated), federated.workers) == (2, ["bob"])
    assert alice.objects_count() == 0
    assert len(list(sy.FederatedDataLoader(federated, batch_size=2))) == 1


def test_a_part_is_taken_back_by_the_whole_only(federated):
    with pytest.raises(ValueError, match=r"get_dataset\('alice'\)"):
        federated["alice"].get()
    for wrong in ("zed", 3, None):
        with pytest.raises(LocalError, match="no data on"):
            federated.get_dataset(wrong)
    assert len(federated) == 6
    assert len(federated.get_dataset("bob")) == 2


def test_a_part_that_cannot_be_taken_back_stays(bob):
    private = BaseDataset(torch.ones(2), torch.ones(2)).send(bob, private=True)
    federated = sy.FederatedDataset([private])
    with pytest.raises(sy.exceptions.GetNotPermittedError):
        federated.get_dataset("bob")
    assert federated.workers == ["bob"]
    with pytest.raises(ValueError, match="get_dataset"):
        private.get()


def test_spread_over_workers(bob, alice):
    dataset = BaseDataset(torch.tensor([1.0, 2, 3, 4, 5, 6]), torch.tensor([1.0, 2, 3, 4, 5, 6]))
    federated = dataset.federate((bob, alice))
    assert isinstance(federated, sy.FederatedDataset)
    assert federated.workers == ["bob", "alice"]
    assert federated["bob"].location.id == "bob"
    assert len(federated) == 6


def test_found_on_a_grid_and_read(bob, alice):
    grid = sy.PrivateGridNetwork(bob, alice)
    for worker in (bob, alice):
        torch.zeros(10, 3).tag("data").send(worker)
        torch.zeros(10, 1).tag("target").send(worker)
    gc.collect()
    data, target = grid.search("data"), grid.search("target")
    dataset = sy.FederatedDataset([BaseDataset(data[id][0], target[id][0]) for id in ("bob", "alice")])
    loader = sy.FederatedDataLoader(dataset, batch_size=4, shuffle=False, drop_last=False)
    assert sum(1 for _ in loader) == len(loader) == 6


# --------------------------------------------------------------------------------------- FederatedDataLoader


@pytest.mark.parametrize("shuffle", [False, True])
def test_one_worker_after_the_other(federated, shuffle):
    loader = sy.FederatedDataLoader(federated, batch_size=2, shuffle=shuffle)
    for _ in range(3):
        places = [data.location.id for data, _ in loader]
        assert places == ["bob", "alice", "alice"]
        assert len(places) == len(loader)


def test_the_last_batch_is_dropped(federated):
    loader = sy.FederatedDataLoader(federated, batch_size=3, drop_last=True)
    assert [data.shape[0] for data, _ in loader] == [3]
    assert len(loader) == 1


def test_a_batch_of_each_at_every_step(federated, bob, alice):
    loader = sy.FederatedDataLoader(federated, batch_size=2, iter_per_worker=True, shuffle=True)
    for _ in range(3):
        steps = list(loader)
        assert len(steps) == len(loader) == 2
        for batches in steps:
            assert set(batches) == {bob, alice}
            for worker, (data, _) in batches.items():
                assert data.location is worker


def test_several_side_by_side(federated):
    loader = sy.FederatedDataLoader(federated, batch_size=2, num_iterators=2)
    assert [len(batches) for batches in loader] == [2, 1]


def test_one_worker_alone(alice):
    dataset = sy.FederatedDataset([BaseDataset(torch.arange(4), torch.arange(4)).send(alice)])
    loader = sy.FederatedDataLoader(dataset, batch_size=2, shuffle=True)
    assert loader.num_iterators == 1
    assert sum(1 for _ in loader) == 2


def test_the_next_batch_of_a_loader(federated):
    """0.2's websocket example: ``iter(loader)`` once, and then ``next(loader)`` as often as batches are wanted."""
    loader = sy.FederatedDataLoader(federated, batch_size=2)
    iter(loader)
    assert next(loader)[0].get().tolist() == [1, 2]
    assert next(loader)[0].get().tolist() == [3, 4]
    assert [data.get().tolist() for data, _ in loader] == [[1, 2], [3, 4], [5, 6]]
    with pytest.raises(StopIteration):
        next(loader)
    iter(loader)
    assert next(loader)[0].get().tolist() == [1, 2]
    assert next(sy.FederatedDataLoader(federated, batch_size=2))[1].get().tolist() == [1, 2]


def test_a_data_set_that_was_taken_back_is_not_read(federated):
    loader = sy.FederatedDataLoader(federated, batch_size=2)
    part = federated["alice"]
    federated.get_dataset("alice")
    assert [data.location.id for data, _ in loader] == ["bob"]
    with pytest.raises(GonePointerError):
        part.fetch(torch.tensor([0]))


# --------------------------------------------------------------------------------------------------- the grid


def test_a_grid_of_three(bob, alice, james):
    grid = sy.PrivateGridNetwork(*[bob, alice, james])
    torch.tensor([1, 2, 3, 4]).tag("#bob", "#male").send(bob)
    torch.tensor([1, 2, 3, 4]).tag("#alice", "#female").send(alice)
    torch.tensor([1, 2, 3, 4]).tag("#james", "#male").send(james)
    gc.collect()
    assert set(grid.search()) == {"bob", "alice", "james"}
    assert {id: len(found) for id, found in grid.search("#bob").items()} == {"bob": 1}
    assert {id: len(found) for id, found in grid.search("#male").items()} == {"bob": 1, "james": 1}
    assert grid.search("#male", "#female") == {}
    assert sy.VirtualGrid(bob).search("#bob")["bob"][0].get().tolist() == [1, 2, 3, 4]


def test_the_sandbox_without_data(hook):
    names: dict = {}
    sy.create_sandbox(names, verbose=False, download_data=False)
    assert [worker.id for worker in names["workers"]] == ["bob", "theo", "jason", "alice", "andy", "jon"]
    assert names["hook"] is hook
    assert names["grid"].search("#boston") == {}
    for worker in names["workers"]:
        worker.close()


# --------------------------------------------------------------------------------------------- the utilities


def test_batches_by_worker(federated, bob, alice):
    batches = utils.extract_batches_per_worker(sy.FederatedDataLoader(federated, batch_size=2, shuffle=True))
    assert {worker: len(found) for worker, found in batches.items()} == {bob: 1, alice: 2}


def constant(weight):
    model = nn.Linear(2, 1)
    nn.init.constant_(model.weight, weight)
    nn.init.constant_(model.bias, weight)
    return model


def test_models_are_added():
    assert utils.add_model(constant(1.0), constant(2.0)).weight.tolist() == [[3, 3]]


def test_models_are_scaled():
    assert utils.scale_model(constant(2.0), 0.25).bias.tolist() == [0.5]


def test_models_are_averaged():
    models = {"bob": constant(1.0), "alice": constant(3.0), "ann": constant(5.0)}
    averaged = utils.federated_avg(models)
    assert averaged is models["bob"]
    assert averaged.weight.tolist() == [[3, 3]]
    assert models["alice"].weight.tolist() == [[3, 3]]


@pytest.mark.parametrize(("target", "share"), [([0, 1, 2], 1.0), ([2, 0, 1], 0.0), ([0, 1, 0], 2 / 3)])
def test_accuracy(target, share):
    scores = torch.tensor([[0.95, 0.02, 0.03], [0.3, 0.4, 0.3], [0.0, 0.0, 1.0]])
    assert utils.accuracy(scores, torch.tensor(target)) == pytest.approx(share)


def test_toy_data():
    data, labels = utils.create_gaussian_mixture_toy_data(nr_samples=10)
    assert (data.shape, sorted(labels.tolist())) == ((10, 2), [0] * 5 + [1] * 5)


def test_iris_data():
    data, target = utils.iris_data_partial()
    assert data[0].tolist() == pytest.approx([5.1, 3.5, 1.4, 0.2])
    assert target.bincount().tolist() == [10, 10, 10]

"""Data on several workers: sent, split, and read in batches that stay where they are."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn, optim
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, TensorDataset, random_split

import planrt
from planrt.errors import (
    DataError,
    GetNotPermittedError,
    LocalError,
    MixedLocationsError,
    OptionError,
)
from planrt.fl.data.digits import normalize
from planrt.fl.data.federated import FederatedDataLoader, FederatedDataset, _turns
from planrt.fl.data.splitting import federate
from planrt.workers.datasets import BaseDataset
from planrt.workers.machine.rounds.batches import as_batches
from planrt.workers.pointers.tensor import PointerTensor
from tests.processes import write_small_mnist


@pytest.fixture(scope="module", autouse=True)
def hook():
    return planrt.TorchHook(torch)


@pytest.fixture
def bob(make_worker):
    return make_worker("bob")


@pytest.fixture
def alice(make_worker):
    return make_worker("alice")


def numbered(count: int) -> TensorDataset:
    """Items that say which they are: data [i, i] in float32, target i."""
    return TensorDataset(torch.arange(count).repeat(2, 1).T.float(), torch.arange(count))


class Listed:
    """A data set of somebody's own: nothing but a length and items."""

    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


class ListedDataset(Listed, Dataset):
    pass


class Doubling(TensorDataset):
    """Gives other items than its tensors hold."""

    def __getitem__(self, index):
        data, target = super().__getitem__(index)
        return data * 2, target


def targets_by_step(loader) -> list[tuple[str, list[int]]]:
    batches = [(data.location.id, target) for data, target in loader]
    return [(id, target.get().tolist()) for id, target in batches]


# ---------------------------------------------------------------------------------- a data set on one worker


def test_a_data_set_goes_to_a_worker_and_comes_back(bob):
    here = BaseDataset(torch.arange(6.0).view(3, 2), torch.arange(3), batch_transform=lambda batch: batch + 1)
    there = here.send(bob)
    assert isinstance(there.data, PointerTensor)
    assert there.location is bob
    assert here.location is None
    assert len(there) == 3
    assert "on worker 'bob'" in repr(there)
    assert "bob" not in repr(here)
    back = there.get()
    assert torch.equal(back.data, here.data)
    assert torch.equal(back.targets, here.targets)
    assert back.batch_transform is here.batch_transform
    assert bob.objects_count() == 0


def test_batches_of_a_remote_data_set_are_made_and_transformed_there(bob):
    images = torch.randint(0, 256, (9, 28, 28), dtype=torch.uint8)
    there = BaseDataset(images, torch.arange(9), batch_transform=normalize).send(bob)
    data, target = there.fetch(torch.tensor([4, 0, 4]))
    assert data.location is bob
    assert target.location is bob
    assert (data.dtype, list(data.shape)) == (torch.float32, [3, 1, 28, 28])
    assert torch.equal(data.get(), normalize(images[[4, 0, 4]]))
    assert target.get().tolist() == [4, 0, 4]
    one, its_target = there[-1]
    assert torch.equal(one.get(), normalize(images[8:])[0])
    assert its_target.get().item() == 8
    with pytest.raises(IndexError):
        there[9]


def test_a_transform_that_needs_values_says_that_they_are_elsewhere(bob):
    there = BaseDataset(
        torch.ones(3, 2), torch.arange(3), batch_transform=lambda batch: torch.tensor(batch.tolist())
    ).send(bob)
    with pytest.raises(LocalError, match="get"):
        there.fetch(torch.tensor([0]))


def test_a_transform_of_items_runs_before_the_data_leaves(bob, alice):
    images = torch.arange(24, dtype=torch.uint8).view(6, 2, 2)
    here = BaseDataset(images, torch.arange(6), torchvision_like).tag("#small")
    there = here.send(bob)
    expected = images.float().unsqueeze(1) / 255
    assert torch.equal(there.fetch(torch.tensor([2, 5]))[0].get(), expected[[2, 5]])
    assert there.id == here.id
    assert there.id_at_location == there.data.id_at_location
    assert len(bob.search("#small")) == 2
    parts = BaseDataset(images, torch.arange(6), torchvision_like).federate((bob, alice))
    assert torch.equal(parts["alice"].data.get(), expected[3:])
    with pytest.raises(OptionError, match="write a batch_transform"):
        BaseDataset(there.data, there.targets, torchvision_like)
    with pytest.raises(DataError, match="transform it before it is sent"):
        there.transform(torch.relu)


def torchvision_like(image):
    assert type(image).__module__ == "numpy"
    return torch.from_numpy(image).unsqueeze(0).float() / 255


def test_tags_and_descriptions_travel_before_and_after_the_send(bob):
    there = BaseDataset(torch.ones(3, 2), torch.arange(3)).tag("#rings").describe("tree rings").send(bob)
    assert [list(found.shape) for found in bob.search(["#rings", "tree"])] == [[3, 2], [3]]
    assert there.data.tags == {"#rings"}
    there.tag("#old").describe("felled trees")
    assert len(bob.search(["#rings", "#old", "felled"])) == 2
    with pytest.raises(LocalError, match="1 to 200 characters"):
        there.tag("")


def test_found_pointers_make_a_data_set(bob):
    torch.ones(3, 2).tag("#data").send(bob)
    torch.arange(3).tag("#target").send(bob)
    found = BaseDataset(bob.search("#data")[0], bob.search("#target")[0])
    assert found.location is bob
    assert found.fetch(torch.tensor([2]))[1].get().tolist() == [2]


def test_private_data_sets_train_but_do_not_come_back(bob):
    there = BaseDataset(torch.ones(3, 2), torch.arange(3)).send(bob, private=True)
    data, _ = there.fetch(torch.tensor([1, 2]))
    with pytest.raises(GetNotPermittedError):
        data.sum().get()
    with pytest.raises(GetNotPermittedError):
        there.get()


def test_a_data_set_goes_and_comes_on_any_loop(bob):
    async def there_and_back():
        there = await BaseDataset(torch.ones(3, 2), torch.arange(3)).async_send(bob)
        return await there.async_get()

    assert asyncio.run(there_and_back()).targets.tolist() == [0, 1, 2]


def test_misused_data_sets_say_what_to_do(bob, alice):
    here = BaseDataset(torch.ones(3, 2), torch.arange(3))
    there = here.send(bob)
    with pytest.raises(LocalError, match="on worker 'bob' already: get"):
        there.send(alice)
    with pytest.raises(LocalError, match="is here"):
        here.get()
    with pytest.raises(LocalError, match="send takes a worker"):
        here.send("bob")
    with pytest.raises(OptionError, match="allowed_users"):
        here.send(bob, allowed_users="carol")
    with pytest.raises(MixedLocationsError, match="data is on worker 'bob' and its targets are here"):
        BaseDataset(there.data, here.targets)
    with pytest.raises(MixedLocationsError, match="'bob'.*'alice'"):
        BaseDataset(there.data, here.send(alice).targets)
    with pytest.raises(DataError, match="on worker 'bob': get"):
        as_batches(there)


# ------------------------------------------------------------------------------------------------ splitting


def test_federate_sends_each_worker_its_part_in_order(bob, alice):
    federated = numbered(7).federate((bob, alice))
    assert federated.workers == ["bob", "alice"]
    assert len(federated) == 7
    assert federated["bob"].location is bob
    assert repr(federated) == "<FederatedDataset of 7 items (bob: 4, alice: 3)>"
    assert federated["bob"].targets.get().tolist() == [0, 1, 2, 3]
    assert federated["alice"].data.get().tolist() == [[4, 4], [5, 5], [6, 6]]


@given(items=st.integers(3, 50))
def test_parts_differ_by_one_item_at_most(items):
    with planrt.VirtualWorker("a") as a, planrt.VirtualWorker("b") as b, planrt.VirtualWorker("c") as c:
        federated = numbered(items).federate([a, b, c])
        sizes = [len(federated[id]) for id in federated.workers]
    assert sum(sizes) == items
    assert sizes == sorted(sizes, reverse=True)
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(
    "dataset",
    [
        numbered(5),
        BaseDataset(*numbered(5).tensors),
        Subset(numbered(9), range(5)),
        Subset(BaseDataset(*numbered(9).tensors, lambda batch: batch), range(5)),
        Subset(Listed([(torch.tensor([i, i]), i) for i in range(9)]), [0, 1, 2, 3, 4]),
        ListedDataset([(torch.tensor([i, i]), i) for i in range(5)]),
        ListedDataset([([float(i), float(i)], torch.tensor(i)) for i in range(5)]),
        ConcatDataset([numbered(3), Subset(numbered(5), [3, 4])]),
    ],
    ids=[
        "tensors",
        "base",
        "subset",
        "base subset",
        "listed subset",
        "listed",
        "lists of floats",
        "concatenated",
    ],
)
def test_any_map_style_data_set_is_federated(dataset, bob, alice):
    if isinstance(dataset, ListedDataset) and isinstance(dataset.items[0][0], list):
        with pytest.raises(DataError, match="data must be a tensor"):
            dataset.federate((bob, alice))
        return
    federated = dataset.federate((bob, alice))
    assert federated["bob"].data.get().tolist() == [[0, 0], [1, 1], [2, 2]]
    assert federated["alice"].targets.get().tolist() == [3, 4]


def test_a_class_without_torchs_base_is_federated_by_the_function(bob, alice):
    federated = federate(Listed([(torch.ones(2), 1.5)] * 3), [bob, alice])
    assert federated["bob"].targets.get().tolist() == [1.5, 1.5]


def test_what_a_subclass_gives_is_what_is_sent(bob):
    federated = Doubling(*numbered(3).tensors).federate((bob,))
    assert federated["bob"].data.get().tolist() == [[0, 0], [2, 2], [4, 4]]


def test_random_split_parts_are_federated(bob, alice):
    part, rest = random_split(numbered(10), [6, 4], generator=torch.Generator().manual_seed(1))
    federated = part.federate((bob, alice))
    sent = federated["bob"].targets.get().tolist() + federated["alice"].targets.get().tolist()
    assert sent == list(part.indices)
    assert set(sent).isdisjoint(rest.indices)


def test_the_transform_of_a_data_set_goes_on_on_the_workers(bob, alice):
    images = torch.randint(0, 256, (5, 28, 28), dtype=torch.uint8)
    federated = BaseDataset(images, torch.arange(5), batch_transform=normalize).federate((bob, alice))
    assert federated["alice"].data.dtype == torch.uint8
    assert torch.equal(federated["alice"].fetch(torch.tensor([1]))[0].get(), normalize(images[4:]))


def test_federate_awaited_on_any_loop(bob, alice):
    federated = asyncio.run(numbered(3).async_federate((bob, alice)))
    assert federated["alice"].targets.get().tolist() == [2]


def test_private_parts_stay_where_they_are(bob, alice):
    federated = numbered(4).federate((bob, alice), private=True)
    with pytest.raises(GetNotPermittedError):
        federated["alice"].data.get()


@pytest.mark.parametrize(
    ("dataset", "workers", "error", "message"),
    [
        (numbered(4), [], OptionError, "no workers"),
        (numbered(4), "bob", OptionError, r"write federate\(\(bob, alice\)\)"),
        (numbered(4), ["bob"], OptionError, "takes workers, not str"),
        (numbered(4), ["BOB", "BOB"], OptionError, "bob given twice"),
        (numbered(0), ["BOB"], DataError, "0 items for 1 workers"),
        (numbered(1), ["BOB", "ALICE"], DataError, "1 items for 2 workers"),
        (TensorDataset(torch.ones(3)), ["BOB"], DataError, "keep two"),
        (ListedDataset([torch.ones(2)] * 3), ["BOB"], DataError, "must give .data, target. pairs"),
        (ListedDataset([(torch.ones(i), i) for i in range(1, 4)]), ["BOB"], DataError, "one batch"),
        (ListedDataset([("word", 1)] * 3), ["BOB"], DataError, "data must be a tensor"),
    ],
)
def test_what_cannot_be_federated_is_refused(dataset, workers, error, message, bob, alice):
    named = {"BOB": bob, "ALICE": alice}
    workers = [named.get(one, one) for one in workers] if isinstance(workers, list) else workers
    with pytest.raises(error, match=message):
        dataset.federate(workers)
    assert bob.objects_count() == 0


def test_what_is_no_data_set_or_elsewhere_already_is_refused(bob, alice):
    with pytest.raises(DataError, match="map-style"):
        federate(iter([1]), (bob,))
    with pytest.raises(DataError, match="on worker 'bob'"):
        BaseDataset(*numbered(3).tensors).send(bob).federate((alice,))


# --------------------------------------------------------------------------------------- torchvision's MNIST


@pytest.fixture(scope="module")
def mnist_of(tmp_path_factory):
    from torchvision import datasets

    folder = write_small_mnist(tmp_path_factory.mktemp("data") / "small")
    return lambda *transforms, **options: datasets.MNIST(folder, transform=composed(transforms), **options)


def composed(steps):
    from torchvision import transforms

    return transforms.Compose(steps) if len(steps) != 1 else steps[0]


def test_mnist_with_the_usual_transforms_is_sent_whole_with_the_same_bits(mnist_of, bob, alice, monkeypatch):
    from torchvision import transforms

    for steps in (
        [transforms.ToTensor()],
        [transforms.ToTensor(), transforms.Normalize((0.1307,), (0.3081,))],
    ):
        dataset = mnist_of(*steps)
        wanted, labels = next(iter(DataLoader(dataset, batch_size=40)))
        with monkeypatch.context() as patch:
            patch.setattr(transforms.ToTensor, "__call__", lambda *args: pytest.fail("read item by item"))
            federated = dataset.federate((bob, alice))
            subset = Subset(dataset, [39, 2]).federate((bob, alice))
        assert federated["bob"].data.dtype == torch.uint8
        data, target = federated["alice"].fetch(torch.arange(20))
        assert torch.equal(data.get(), wanted[20:])
        assert torch.equal(target.get(), labels[20:])
        assert torch.equal(subset["bob"].fetch(torch.tensor([0]))[0].get(), wanted[39:])


def test_mnist_with_other_transforms_is_read_item_by_item(mnist_of, bob, alice):
    from torchvision import transforms

    for dataset in (
        mnist_of(transforms.ToTensor(), transforms.Lambda(lambda image: image.view(-1)[:10])),
        mnist_of(transforms.ToTensor(), target_transform=lambda digit: digit + 100),
    ):
        wanted, labels = next(iter(DataLoader(dataset, batch_size=40)))
        data, target = dataset.federate((bob, alice))["alice"].fetch(torch.arange(20))
        assert torch.equal(data.get(), wanted[20:])
        assert torch.equal(target.get(), labels[20:])


def test_mnist_without_a_transform_is_refused(mnist_of, bob):
    with pytest.raises(DataError, match="one batch"):
        mnist_of(None).federate((bob,))


# ------------------------------------------------------------------------------------------------ FederatedDataset


def test_data_sets_on_several_workers_make_one(bob, alice):
    parts = [BaseDataset(*numbered(count).tensors).send(worker) for count, worker in ((2, bob), (3, alice))]
    federated = FederatedDataset(parts)
    assert federated.workers == ["bob", "alice"]
    assert federated["alice"] is parts[1]
    assert len(federated) == 5
    for unknown in ("carol", 0, bob):
        with pytest.raises(LocalError, match="one of 'bob', 'alice'"):
            federated[unknown]


def test_what_does_not_make_a_federated_data_set_is_refused(bob):
    here = BaseDataset(*numbered(2).tensors)
    with pytest.raises(DataError, match="no data sets"):
        FederatedDataset([])
    with pytest.raises(DataError, match=r"send\(\) it"):
        FederatedDataset([here])
    with pytest.raises(DataError, match="two data sets on worker 'bob'"):
        FederatedDataset([here.send(bob), here.send(bob)])
    with pytest.raises(DataError, match="not TensorDataset"):
        FederatedDataset([numbered(2)])


# --------------------------------------------------------------------------------------------- FederatedDataLoader


def test_the_loader_reads_one_worker_after_the_other_in_batches_that_stay_there(bob, alice):
    loader = FederatedDataLoader(numbered(9).federate((bob, alice)), batch_size=2)
    assert targets_by_step(loader) == [
        ("bob", [0, 1]), ("bob", [2, 3]), ("bob", [4]), ("alice", [5, 6]), ("alice", [7, 8]),
    ]  # fmt: skip
    assert len(loader) == 5
    for data, target in loader:
        assert isinstance(data, PointerTensor)
        assert data.location is target.location
        assert data.location in (bob, alice)


def test_drop_last_leaves_out_each_workers_short_batch(bob, alice):
    loader = FederatedDataLoader(numbered(9).federate((bob, alice)), batch_size=2, drop_last=True)
    assert targets_by_step(loader) == [("bob", [0, 1]), ("bob", [2, 3]), ("alice", [5, 6]), ("alice", [7, 8])]
    assert len(loader) == 4
    empty = FederatedDataLoader(loader.federated_dataset, batch_size=100, drop_last=True)
    assert len(empty) == len(list(empty)) == 0


def test_shuffled_passes_see_every_item_once_and_follow_torchs_seed(bob, alice):
    loader = FederatedDataLoader(numbered(20).federate((bob, alice)), batch_size=3, shuffle=True)
    torch.manual_seed(5)
    first, second = targets_by_step(loader), targets_by_step(loader)
    torch.manual_seed(5)
    assert targets_by_step(loader) == first
    assert first != second
    for steps in (first, second):
        assert Counter(target for id, targets in steps if id == "bob" for target in targets) == Counter(
            range(10)
        )
        assert sorted(target for _, targets in steps for target in targets) == list(range(20))
    assert [target for _, targets in first for target in targets] != list(range(20))


def test_a_seed_of_its_own_leaves_torchs_generator_alone(bob, alice):
    federated = numbered(20).federate((bob, alice))

    def order(seed):
        return targets_by_step(FederatedDataLoader(federated, 3, shuffle=True, seed=seed))

    before = torch.get_rng_state()
    assert order(1) == order(1)
    assert order(1) != order(2)
    assert torch.equal(torch.get_rng_state(), before)


def test_several_workers_are_read_side_by_side(make_worker):
    workers = [make_worker(id) for id in ("bob", "alice", "carol")]
    federated = FederatedDataset(
        [BaseDataset(*numbered(n).tensors).send(worker) for n, worker in zip((2, 6, 5), workers, strict=True)]
    )
    loader = FederatedDataLoader(federated, batch_size=2, num_iterators=2)
    steps = [{worker.id: target for worker, (_, target) in step.items()} for step in loader]
    assert [{id: target.get().tolist() for id, target in step.items()} for step in steps] == [
        {"bob": [0, 1], "alice": [0, 1]},
        {"alice": [2, 3], "carol": [0, 1]},
        {"alice": [4, 5], "carol": [2, 3]},
        {"carol": [4]},
    ]
    assert len(loader) == 4
    everybody = FederatedDataLoader(federated, batch_size=2, iter_per_worker=True)
    found = [{worker.id: target.get().tolist() for worker, (_, target) in step.items()} for step in everybody]
    assert found == [  # a batch of everybody at every step: who has few starts again
        {"bob": [0, 1], "alice": [0, 1], "carol": [0, 1]},
        {"bob": [0, 1], "alice": [2, 3], "carol": [2, 3]},
        {"bob": [0, 1], "alice": [4, 5], "carol": [4]},
    ]
    assert len(everybody) == 3


@given(
    counts=st.dictionaries(st.sampled_from("abcdef"), st.integers(0, 5)),
    at_a_time=st.integers(1, 6),
)
def test_every_batch_has_one_turn_in_order(counts, at_a_time):
    steps = list(_turns(counts, at_a_time))
    for id, count in counts.items():
        assert [number for step in steps for turn, number in step if turn == id] == list(range(count))
    assert all(0 < len(step) <= at_a_time for step in steps)
    assert all(len({id for id, _ in step}) == len(step) for step in steps)


def test_a_batch_is_a_copy(bob, alice):
    federated = numbered(4).federate((bob, alice))
    data, _ = next(iter(FederatedDataLoader(federated, batch_size=2)))
    data.zero_()
    assert federated["bob"].data.get().tolist() == [[0, 0], [1, 1]]


def test_only_indices_travel_and_batches_are_freed(bob, alice):
    images = TensorDataset(torch.ones(64, 50_000), torch.arange(64))
    loader = FederatedDataLoader(images.federate((bob, alice)), batch_size=8)
    bob.objects_count()
    before = bob.traffic.copy()
    for data, target in loader:
        del data, target
    assert bob.objects_count() == 2
    spent = bob.traffic.since(before)
    assert spent.bytes_sent + spent.bytes_received < 10_000


def test_passes_may_overlap(bob, alice):
    loader = FederatedDataLoader(numbered(4).federate((bob, alice)), batch_size=1)
    pairs = [
        (one.get().item(), other.get().item()) for (_, one), (_, other) in zip(loader, loader, strict=True)
    ]
    assert pairs == [(i, i) for i in range(4)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be a whole number of at least 1, got 0"),
        ({"batch_size": -3}, "batch_size"),
        ({"batch_size": 2.5}, "batch_size"),
        ({"batch_size": True}, "batch_size"),
        ({"num_iterators": 0}, "num_iterators"),
        ({"num_iterators": 3}, "num_iterators is 3, but the data is on 2 workers only"),
        ({"seed": -1}, "seed"),
    ],
)
def test_loader_options_out_of_range_are_refused(options, message, bob, alice):
    with pytest.raises(OptionError, match=message):
        FederatedDataLoader(numbered(4).federate((bob, alice)), **options)


@pytest.mark.parametrize("dataset", [numbered(4), BaseDataset(*numbered(4).tensors), None, []])
def test_a_loader_over_something_else_is_refused(dataset):
    with pytest.raises(DataError, match="federate"):
        FederatedDataLoader(dataset)


def test_a_batch_of_another_worker_names_both_places(bob, alice):
    batches = list(FederatedDataLoader(numbered(4).federate((bob, alice)), batch_size=2))
    with pytest.raises(MixedLocationsError, match="'bob' and worker 'alice'"):
        batches[0][0] + batches[1][0]


def test_a_model_that_visits_the_batches_learns_as_it_would_here(bob, alice):
    torch.manual_seed(0)
    data = torch.randn(24, 3)
    dataset = TensorDataset(data, data @ torch.tensor([1.0, -2.0, 0.5]))
    remote, local = nn.Linear(3, 1), nn.Linear(3, 1)
    local.load_state_dict(remote.state_dict())
    optimizer, plain = optim.SGD(remote.parameters(), lr=0.1), optim.SGD(local.parameters(), lr=0.1)
    loader = FederatedDataLoader(dataset.federate((bob, alice)), batch_size=4)
    for _ in range(2):
        for batch, target in loader:
            remote.send(batch.location)
            optimizer.zero_grad()
            ((remote(batch).view(-1) - target) ** 2).mean().backward()
            optimizer.step()
            remote.get()
        for batch, target in DataLoader(dataset, batch_size=4):
            plain.zero_grad()
            ((local(batch).view(-1) - target) ** 2).mean().backward()
            plain.step()
    torch.testing.assert_close(remote.state_dict(), local.state_dict())
    assert not torch.equal(remote.weight, torch.zeros(1, 3))


def test_public_names():
    assert planrt.FederatedDataLoader is FederatedDataLoader
    assert planrt.FederatedDataset is planrt.fl.FederatedDataset is FederatedDataset

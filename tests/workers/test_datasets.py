"""Data sets in batches: anything map-style in, (data, target) tensors out, in an order the seed decides."""

from __future__ import annotations

from itertools import chain, islice

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset, TensorDataset

from planrt.errors import DataError, LocalError, OptionError
from planrt.types import FREE, TensorSpec
from planrt.workers import VirtualWorker, WebsocketServerWorker
from planrt.workers.datasets import BaseDataset
from planrt.workers.machine.rounds.batches import as_batches, iterate, sample_specs


def numbered(count: int) -> BaseDataset:
    """Items that say which they are: data [i, i], target i."""
    return BaseDataset(torch.arange(count).repeat(2, 1).T.contiguous(), torch.arange(count))


def targets_of(batches) -> list[list[int]]:
    return [target.tolist() for _, target in batches]


class Items(Dataset):
    """A map-style data set over a list of items that counts what is read."""

    def __init__(self, items):
        self.items = items
        self.reads = []

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        self.reads.append(index)
        return self.items[index]


class ManyItems(Items):
    def __getitems__(self, indices):
        self.reads.append(list(indices))
        return [self.items[index] for index in indices]


class Counting:
    """A batch source that counts its fetches."""

    def __init__(self, count):
        self.inner = numbered(count)
        self.fetched = 0

    def __len__(self):
        return len(self.inner)

    def fetch(self, indices):
        self.fetched += 1
        return self.inner.fetch(indices)


# ------------------------------------------------------------------------------------------ BaseDataset


def test_base_dataset_keeps_the_dtype_and_transforms_whole_batches():
    seen = []

    def transform(batch):
        seen.append(tuple(batch.shape))
        return batch.float() / 255

    images = torch.arange(5 * 4, dtype=torch.uint8).view(5, 2, 2)
    dataset = BaseDataset(images, torch.arange(5), batch_transform=transform)
    data, target = dataset.fetch(torch.tensor([3, 1]))
    assert dataset.data.dtype == torch.uint8
    assert seen == [(2, 2, 2)]
    assert torch.equal(data, images[[3, 1]].float() / 255)
    assert target.tolist() == [3, 1]


def test_base_dataset_is_map_style():
    dataset = BaseDataset(
        torch.arange(6).view(3, 2), torch.tensor([7, 8, 9]), batch_transform=lambda batch: batch * 10
    )
    assert len(dataset) == 3
    data, target = dataset[-1]
    assert data.tolist() == [40, 50]
    assert target.item() == 9
    assert [int(target) for _, target in dataset] == [7, 8, 9]  # ends by IndexError, as sequences do
    with pytest.raises(IndexError):
        dataset[3]


@pytest.mark.parametrize(
    ("data", "targets", "message"),
    [
        (torch.zeros(3, 2), torch.zeros(4), "3 items of data but 4 targets"),
        ([1, 2], torch.zeros(2), "data must be a tensor"),
        (torch.zeros(2), torch.tensor(1), "targets must be a tensor"),
    ],
)
def test_base_dataset_refuses_what_does_not_fit(data, targets, message):
    with pytest.raises(DataError, match=message):
        BaseDataset(data, targets)


# ------------------------------------------------------------------------------------------- as_batches


def test_tensor_dataset_is_fetched_by_tensor_indexing():
    x, y = torch.randn(7, 3), torch.arange(7)
    data, target = as_batches(TensorDataset(x, y)).fetch(torch.tensor([6, 0]))
    assert torch.equal(data, x[[6, 0]])
    assert target.tolist() == [6, 0]


@pytest.mark.parametrize("kind", [Items, ManyItems])
def test_other_datasets_are_collated(kind):
    dataset = kind([(np.full((2,), i, dtype=np.float32), i) for i in range(4)])
    data, target = as_batches(dataset).fetch(torch.tensor([2, 0]))
    assert data.dtype == torch.float32
    assert data.tolist() == [[2, 2], [0, 0]]
    assert target.tolist() == [2, 0]
    assert dataset.reads == ([2, 0] if kind is Items else [[2, 0]])


def test_a_source_of_batches_is_taken_as_it_is():
    source = Counting(3)
    assert as_batches(source) is source


@pytest.mark.parametrize(
    ("dataset", "what"),
    [
        (TensorDataset(torch.zeros(2)), "TensorDataset of 1 tensors"),
        (TensorDataset(torch.zeros(2), torch.zeros(2), torch.zeros(2)), "TensorDataset of 3 tensors"),
        (iter([1, 2]), "map-style"),
        (Items([(torch.zeros(1), 1, 2)]), "tuple of 3"),
        (Items([torch.zeros(2)]), "type Tensor"),
        (Items([("text", 1)]), "data must be a tensor or a number, but is a tuple of 1"),
        (
            Items([(torch.zeros(1), {"a": 1})]),
            "target must be a tensor or a number, but is a value of type dict",
        ),
        (Items([(torch.zeros(1), object())]), "cannot be put into one batch"),
        (Items([]), "empty"),
    ],
)
def test_what_is_no_pair_of_tensors_is_refused_by_key(dataset, what):
    with pytest.raises(DataError, match=what) as caught:
        sample_specs(as_batches(dataset, key="pets"), key="pets")
    assert "'pets'" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("made", [VirtualWorker, WebsocketServerWorker])
def test_keys_that_are_none(made):
    worker = made("eve")
    for key, said in [("", "this one is empty"), (3, "key is a string"), (None, "key is a string")]:
        with pytest.raises(OptionError, match=said):
            worker.add_dataset(numbered(3), key)
    assert dict(worker.datasets) == {}


def test_items_of_different_shapes_are_refused():
    source = as_batches(Items([(torch.zeros(1), 0), (torch.zeros(2), 0)]), key="pets")
    with pytest.raises(DataError, match=r"'pets'.*cannot be put into one batch"):
        source.fetch(torch.tensor([0, 1]))


def test_an_error_never_shows_private_values():
    with pytest.raises(DataError) as caught:
        sample_specs(as_batches(Items([("secret diagnosis", "secret name")]), key="patients"))
    assert "secret" not in str(caught.value)


def test_specs_leave_the_batch_dimension_free_and_read_one_item():
    dataset = Items([(torch.zeros(3, 2), 1.5), (torch.zeros(3, 2), 2.5)])
    data, target = sample_specs(as_batches(dataset))
    assert data == TensorSpec((FREE, 3, 2), torch.float32)
    assert target == TensorSpec((FREE,), torch.float64)
    assert dataset.reads == [0]


def test_a_transform_is_per_item_on_arrays_as_torchvisions_are():
    from torchvision import transforms

    steps = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.1307,), (0.3081,))])
    images = torch.randint(0, 256, (4, 28, 28), dtype=torch.uint8)
    dataset = BaseDataset(images, torch.arange(4), transform=steps)
    assert dataset[0][0].shape == (1, 28, 28)
    batch, targets = dataset.fetch(torch.tensor([2, 0]))
    assert torch.equal(batch, torch.stack([steps(images[2].numpy()), steps(images[0].numpy())]))
    assert targets.tolist() == [2, 0]
    assert sample_specs(as_batches(dataset))[0].shape == (FREE, 1, 28, 28)
    with pytest.raises(OptionError, match="not both"):
        BaseDataset(images, torch.arange(4), steps, batch_transform=torch.relu)
    with pytest.raises(OptionError, match="transform must be a function"):
        BaseDataset(images, torch.arange(4), 3)


def test_a_transform_that_fails_names_the_item():
    dataset = BaseDataset(torch.zeros(3, 2), torch.zeros(3), lambda item: item.float())
    with pytest.raises(DataError, match="item 1 failed: AttributeError.*is a batch_transform"):
        dataset.fetch(torch.tensor([1]))


def test_the_methods_of_a_data_set():
    dataset = BaseDataset(torch.ones(3, 2), torch.arange(3), id=7, owner="me", description="three things")
    assert (dataset.id, dataset.owner, dataset.description) == (7, "me", "three things")
    assert dataset.transform(lambda data: data * 2) is dataset
    assert torch.equal(dataset.get_data(), torch.full((3, 2), 2.0))
    assert torch.equal(dataset.get_targets(), torch.arange(3))
    assert BaseDataset(torch.ones(1), torch.ones(1)).id != BaseDataset(torch.ones(1), torch.ones(1)).id
    with pytest.raises(DataError, match="3 items became 1"):
        dataset.transform(lambda data: data[:1])
    with pytest.raises(LocalError, match=r"send\(\) it to a worker"):
        _ = dataset.id_at_location


def test_arrays_are_data_and_other_kinds_say_what_to_write():
    dataset = BaseDataset(np.ones((3, 2), dtype=np.float32), np.arange(3))
    assert torch.equal(dataset.fetch(torch.tensor([1]))[0], torch.ones(1, 2))
    backward = BaseDataset(np.arange(3, dtype=">f4")[::-1], np.arange(3))
    assert backward.data.tolist() == [2, 1, 0]
    frozen = np.ones(3)
    frozen.flags.writeable = False
    assert len(BaseDataset(frozen, frozen)) == 3
    frame = type("DataFrame", (), {"__module__": "pandas.core.frame"})()
    loader = DataLoader(TensorDataset(torch.ones(2), torch.ones(2)))
    dicts = Listed([{"x": 1, "y": 2}])
    for make, says in [
        (lambda: BaseDataset([1.0], [2.0]), r"write torch\.tensor\("),
        (lambda: BaseDataset(frame, torch.ones(1)), r"write torch\.tensor\(df\.values\)"),
        (lambda: BaseDataset(np.array(["a"]), torch.ones(1)), "array of numbers"),
        (lambda: as_batches(frame, key="d"), r"pandas DataFrame: write BaseDataset\("),
        (lambda: as_batches({"a": 1}, key="d"), "data set 'd' is a dict, which is read by names"),
        (
            lambda: sample_specs(as_batches(BaseDataset(np.ones(2, "u2"), np.ones(2)))),
            "uint16, which does not travel",
        ),
        (lambda: as_batches(loader, key="d"), r"data set 'd' is a DataLoader: give its \.dataset"),
        (lambda: sample_specs(as_batches(dicts)), r'returns \(item\["x"\], item\["y"\]\)'),
        (lambda: sample_specs(as_batches(Listed([(1, 2, 3)]))), "a tuple of 3: write a data set whose"),
    ]:
        with pytest.raises(DataError, match=says):
            make()


class Listed:
    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


def test_an_item_that_cannot_be_read_is_named():
    class Broken(Listed):
        def __getitem__(self, index):
            if index == 2:
                raise OSError("no such file")
            return torch.ones(2), 0

    source = as_batches(Broken([0] * 4), key="scans")
    with pytest.raises(DataError, match="data set 'scans': item 2 cannot be read: OSError: no such file"):
        source.fetch(torch.tensor([0, 2]))


def test_an_empty_data_set_has_specs_where_they_are_known():
    data, target = sample_specs(as_batches(TensorDataset(torch.zeros(0, 3), torch.zeros(0))))
    assert (data.shape, target.shape) == ((FREE, 3), (FREE,))
    with pytest.raises(DataError, match=r"'d' is empty, .* BaseDataset\(torch\.zeros\(0, 30\)"):
        sample_specs(as_batches(Listed([]), key="d"), key="d")


def test_the_short_batch_can_be_left_out():
    from planrt.workers.machine.rounds.batches import smallest_batch

    batches = iterate(numbered(7), batch_size=3, shuffle=True, seed=0, epochs=2, drop_last=True)
    assert [len(data) for data, _ in batches] == [3, 3, 3, 3]
    assert smallest_batch(7, 3, drop_last=True) == 3
    assert smallest_batch(2, 3, drop_last=True) == 0
    assert list(iterate(numbered(2), batch_size=3, shuffle=False, seed=0, drop_last=True)) == []


def test_a_transform_that_loses_the_batch_is_refused():
    with pytest.raises(DataError, match=r"data of a batch of 1 item has shape \[3\]"):
        sample_specs(
            BaseDataset(torch.zeros(2, 3), torch.zeros(2), batch_transform=lambda batch: batch.sum(0))
        )


# ---------------------------------------------------------------------------------------------- iterate


def test_without_shuffle_items_come_in_order_and_the_last_batch_is_short():
    batches = iterate(numbered(7), batch_size=3, shuffle=False, seed=0)
    assert targets_of(batches) == [[0, 1, 2], [3, 4, 5], [6]]


def test_data_and_targets_stay_together_when_shuffled():
    for data, target in iterate(numbered(50), batch_size=8, shuffle=True, seed=3):
        assert torch.equal(data[:, 0], target)


def test_each_epoch_is_another_permutation_and_the_seed_decides_it():
    first = targets_of(iterate(numbered(20), batch_size=20, epochs=3, shuffle=True, seed=5))
    again = targets_of(iterate(numbered(20), batch_size=20, epochs=3, shuffle=True, seed=5))
    other = targets_of(iterate(numbered(20), batch_size=20, epochs=3, shuffle=True, seed=6))
    assert first == again
    assert first != other
    assert all(sorted(epoch) == list(range(20)) for epoch in first)
    assert len({tuple(epoch) for epoch in first}) == 3


def test_order_does_not_depend_on_torchs_global_generator():
    torch.manual_seed(1)
    first = targets_of(iterate(numbered(20), batch_size=20, shuffle=True, seed=5))
    torch.manual_seed(2)
    before = torch.random.get_rng_state()
    assert targets_of(iterate(numbered(20), batch_size=20, shuffle=True, seed=5)) == first
    assert torch.equal(torch.random.get_rng_state(), before)


@given(
    count=st.integers(1, 30),
    batch_size=st.integers(1, 40),
    epochs=st.integers(1, 3),
    bound=st.integers(-1, 40),
    seed=st.integers(0, 2**63 - 1),
)
def test_every_item_comes_once_an_epoch_up_to_the_bound(count, batch_size, epochs, bound, seed):
    everything = targets_of(
        iterate(numbered(count), batch_size=batch_size, epochs=epochs, shuffle=True, seed=seed)
    )
    per_epoch = -(-count // batch_size)
    assert len(everything) == per_epoch * epochs
    for epoch in range(epochs):
        items = chain.from_iterable(everything[epoch * per_epoch : (epoch + 1) * per_epoch])
        assert sorted(items) == list(range(count))
    bounded = iterate(
        numbered(count), batch_size=batch_size, epochs=epochs, max_nr_batches=bound, shuffle=True, seed=seed
    )
    assert targets_of(bounded) == (everything if bound == -1 else everything[:bound])


def test_zero_batches_fetch_nothing():
    source = Counting(1000)
    assert list(iterate(source, batch_size=10, max_nr_batches=0, shuffle=True, seed=0)) == []
    assert source.fetched == 0


def test_batches_are_fetched_when_asked_for():
    source = Counting(1000)
    assert len(list(islice(iterate(source, batch_size=10, shuffle=True, seed=0), 2))) == 2
    assert source.fetched == 2


@pytest.mark.parametrize(
    "options",
    [
        {"batch_size": 0},
        {"batch_size": True},
        {"batch_size": 2.5},
        {"max_nr_batches": -2},
        {"epochs": 0},
        {"seed": -1},
        {"seed": 2**63},
    ],
)
def test_options_out_of_range_are_refused_at_the_call(options):
    with pytest.raises(OptionError, match=next(iter(options))):
        iterate(numbered(3), **{"batch_size": 1, "shuffle": True, "seed": 0} | options)

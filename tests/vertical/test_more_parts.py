"""Networks of three and four owners, on both transports, against the whole network: batch norm, optimizers, losses."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from planrt.errors import AlignmentError, JointError
from planrt.seeding import derive_seed
from planrt.vertical import Party, Table, split_network
from tests.vertical.tables import joined, parties, some, whole

COLUMNS = {3: [["a"], ["b", "c"], ["d", "e"]], 4: [["a"], ["b", "c"], ["d"], ["e"]]}
ROWS = [range(50), range(10, 60), range(5, 55), range(60)]
"""Whose rows are in whose table: 10 to 49 are in all."""


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def owners_of(make_worker, table, count):
    """The second of them has the label."""
    found = []
    for place, (names, rows) in enumerate(zip(COLUMNS[count], ROWS, strict=False)):
        label = ["y"] if place == 1 else []
        one = Table(some(table, ["id", *names, *label], rows), "id")
        worker = make_worker(f"owner{place}", {"t": one})
        found.append(Party(worker, "t", "id", names, label="y" if label else None))
    return found


def parts(count, outputs=1):
    torch.manual_seed(1)
    bottoms = [
        nn.Sequential(nn.Linear(len(names), 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2 + place))
        for place, names in enumerate(COLUMNS[count])
    ]
    width = sum(2 + place for place in range(count))
    return bottoms, nn.Sequential(nn.Linear(width, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, outputs))


class Whole(nn.Module):
    """The parts as one network, on all columns side by side."""

    def __init__(self, bottoms, top, widths):
        super().__init__()
        self.bottoms, self.top, self.widths = nn.ModuleList(bottoms), top, widths

    def forward(self, x):
        below = [part(columns) for part, columns in zip(self.bottoms, x.split(self.widths, 1), strict=True)]
        return self.top(torch.cat(below, 1))


def trained(net, optimizer, data, target, loss_fn, *, people, epochs, batch_size, seed):
    """Losses of its epochs, as joint runs order the rows."""
    net.train()
    losses = []
    for epoch in range(epochs):
        generator = torch.Generator().manual_seed(derive_seed(seed, "batches", epoch))
        order, total = torch.randperm(people, generator=generator), 0.0
        for at in range(0, people, batch_size):
            rows = order[at : at + batch_size]
            optimizer.zero_grad()
            loss = loss_fn(net(data[rows]), target[rows])
            loss.backward()
            optimizer.step()
            total += loss.item() * len(rows)
        losses.append(total / people)
    return losses


POS = torch.tensor([4.0])
WEIGHTS = torch.tensor([1.0, 4.0])
CASES = [
    (
        3,
        "SGD",
        {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
        nn.BCEWithLogitsLoss(),
        0.0,
    ),
    (4, "Adam", {"lr": 0.01, "amsgrad": True}, nn.BCEWithLogitsLoss(pos_weight=POS), 0.25),
    (3, "AdamW", {"lr": 0.01}, nn.CrossEntropyLoss(weight=WEIGHTS, label_smoothing=0.1), 0.25),
    (3, "RMSprop", {"lr": 0.01, "centered": True}, nn.MSELoss(), 0.0),
    (
        3,
        "Adagrad",
        {"lr": 0.05},
        lambda found, wanted: ((found - wanted) ** 2 * (1 + 3 * wanted)).mean(),
        0.0,
    ),
]


@pytest.mark.parametrize(("count", "optimizer", "options", "loss_fn", "holdout"), CASES)
def test_parts_are_bit_equal_to_the_whole(make_worker, count, optimizer, options, loss_fn, holdout):
    table = whole()
    owners = owners_of(make_worker, table, count)
    classes = isinstance(loss_fn, nn.CrossEntropyLoss)
    bottoms, top = parts(count, 2 if classes else 1)
    net = Whole(copy.deepcopy(bottoms), copy.deepcopy(top), [len(names) for names in COLUMNS[count]])
    about = {"epochs": 3, "batch_size": 14, "seed": 4}  # 40 people, or 30: the last batch is shorter
    values, labels = joined(table, seed=4, normalise="strip")
    data = torch.from_numpy(values).float()
    target = torch.from_numpy(labels).long() if classes else torch.from_numpy(labels).float()[:, None]
    people = 40 - int(40 * holdout)
    held = torch.arange(people, 40) if holdout else torch.arange(40)
    ids = [table["id"][row] for row in (12, 30, 49)]
    with split_network(
        *owners, bottoms=bottoms, top=top, loss_fn=loss_fn, optimizer=optimizer, optimizer_args=options,
        classes=classes, standardise=False, holdout=holdout, **about,
    ) as run:  # fmt: skip
        assert (run.size, run.people) == (40, people)
        losses = run.fit()
        evaluation = run.evaluate()
        predictions = run.predict(ids)
        run.get()
    stepper = getattr(torch.optim, optimizer)(net.parameters(), **options)
    assert losses == trained(net, stepper, data, target, loss_fn, people=people, **about)
    for mine, theirs in zip((*bottoms, top), (*net.bottoms, net.top), strict=True):
        state = theirs.state_dict()
        for name, value in mine.state_dict().items():
            assert torch.equal(value, state[name]), name
    net.eval()
    with torch.no_grad():
        assert evaluation.people == len(held)
        assert evaluation.loss == loss_fn(net(data[held]), target[held]).item()
        rows = torch.tensor([[table[name][int(id.split()[1])] for name in "abcde"] for id in ids]).float()
        assert torch.equal(predictions, net(rows))
        if classes:
            right = (net(data[held]).argmax(1) == target[held]).float().mean().item()
            assert evaluation.accuracy == right


class Regional(nn.Module):
    """Numbers beside a column of classes, which an embedding takes."""

    def __init__(self):
        super().__init__()
        self.region = nn.Embedding(4, 3)
        self.out = nn.Linear(4, 3)

    def forward(self, x):
        return self.out(torch.cat([x[:, :1], self.region(x[:, 1].long())], 1))


def test_columns_of_classes_are_left_as_they_are(make_worker):
    table = whole()
    table["b"] = np.random.default_rng(0).integers(0, 4, 60).astype(float)
    table["a"] = table["a"] * 900 + 3000
    alice, bob = parties(make_worker, table)
    alice = Party(alice.worker, "t", "id", ["a", "b"], as_is=["b"])
    torch.manual_seed(3)
    bottoms, top = [Regional(), nn.Linear(3, 2)], nn.Linear(5, 1)
    net = Whole(copy.deepcopy(bottoms), copy.deepcopy(top), [2, 3])
    about = {"epochs": 4, "batch_size": 16, "seed": 2}
    with split_network(
        alice, bob, bottoms=bottoms, top=top, loss_fn=nn.BCEWithLogitsLoss(), optimizer="Adam", normalise="casefold",
        holdout=0.25, **about,
    ) as run:  # fmt: skip
        losses = run.fit()
        run.get()
    values, labels = joined(table, seed=2)
    numbers = [0, 2, 3, 4]
    values[:, numbers] = (values[:, numbers] - values[:30, numbers].mean(0)) / values[:30, numbers].std(0)
    data, target = torch.from_numpy(values).float(), torch.from_numpy(labels).float()[:, None]
    stepper = torch.optim.Adam(net.parameters())
    expected = trained(net, stepper, data, target, nn.BCEWithLogitsLoss(), people=30, **about)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    torch.testing.assert_close(bottoms[0].region.weight, net.bottoms[0].region.weight, atol=1e-5, rtol=0)


def test_a_batch_of_one_person_and_batch_norm(make_worker):
    """As torch: such a batch has no variance."""
    owners = owners_of(make_worker, whole(), 3)
    bottoms, top = parts(3)
    with pytest.raises(JointError, match=r"party 'owner[012]': a batch has 1 row.*batch norm wants 2"):
        split_network(
            *owners, bottoms=bottoms, top=top, loss_fn=nn.MSELoss(), batch_size=13, epochs=1
        ).fit()  # fmt: skip


def test_people_who_came_later_are_predicted_for_in_a_new_run(make_worker):
    """By the modules that were trained before; they have no label yet, and nothing looks at what stands there."""
    table = whole()
    bottoms, top = parts(3)
    about = {
        "bottoms": bottoms,
        "top": top,
        "loss_fn": nn.BCEWithLogitsLoss(),
        "standardise": False,
        "epochs": 2,
    }
    with split_network(*owners_of(make_worker, table, 3), **about) as run:
        run.fit()
        run.get()
        with pytest.raises(AlignmentError, match="person 1 of those asked for .* is in a new run"):
            run.predict(["person 30", "person 200"])
    later = {name: list(values) for name, values in whole(70).items()}
    later["id"] = [f"person {200 + place}" for place in range(70)]
    later["y"] = [0.0] * 70
    owners = []
    for place, names in enumerate(COLUMNS[3]):
        label = ["y"] if place == 1 else []
        worker = make_worker(
            f"later{place}", {"t": Table(some(later, ["id", *names, *label], range(70)), "id")}
        )
        owners.append(Party(worker, "t", "id", names, *label))
    with split_network(*owners, **about) as run:
        found = run.predict(["person 200", "person 241"])
    net = Whole(bottoms, top, [1, 2, 2]).eval()
    rows = torch.tensor([[later[name][row] for name in "abcde"] for row in (0, 41)]).float()
    with torch.no_grad():
        assert torch.equal(found, net(rows))

"""Networks in parts over the columns of several owners, on both transports, against the whole network."""

import copy
import traceback

import pytest
import torch
from torch import nn

from planrt.errors import DataError, JointError, OptionError, PolicyRefusedError, RemoteError
from planrt.seeding import derive_seed
from planrt.vertical import Party, Table, split_network
from tests.vertical.tables import joined, parties, whole


def parts():
    torch.manual_seed(1)
    bottoms = [nn.Sequential(nn.Linear(2, 4), nn.ReLU()), nn.Sequential(nn.Linear(3, 3), nn.Tanh())]
    return bottoms, nn.Sequential(nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 1))


def unsplit(bottoms, top, table, optimizer, options, *, epochs, batch_size, seed, loss_fn, classes=False):
    """The whole network on the joined table: losses of its epochs."""
    values, labels = joined(table, seed=seed)
    data = torch.from_numpy(values).float()
    target = torch.from_numpy(labels).long() if classes else torch.from_numpy(labels).float()[:, None]
    stepper = optimizer([one for part in (*bottoms, top) for one in part.parameters()], **options)
    losses = []
    for epoch in range(epochs):
        generator = torch.Generator().manual_seed(derive_seed(seed, "batches", epoch))
        order, total = torch.randperm(len(data), generator=generator), 0.0
        for at in range(0, len(data), batch_size):
            rows = order[at : at + batch_size]
            stepper.zero_grad()
            given = torch.cat([bottoms[0](data[rows][:, :2]), bottoms[1](data[rows][:, 2:])], 1)
            loss = loss_fn(top(given), target[rows])
            loss.backward()
            stepper.step()
            total += loss.item() * len(rows)
        losses.append(total / len(data))
    return losses


@pytest.mark.parametrize(
    ("optimizer", "options"), [("SGD", {"lr": 0.1, "momentum": 0.9}), ("Adam", {"lr": 0.01})]
)
def test_the_parts_are_bit_equal_to_the_whole(make_worker, optimizer, options):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        table = whole()
        alice, bob = parties(make_worker, table)
        bottoms, top = parts()
        whole_bottoms, whole_top = copy.deepcopy(bottoms), copy.deepcopy(top)
        loss_fn, about = nn.BCEWithLogitsLoss(), {"epochs": 3, "batch_size": 16, "seed": 4}
        with split_network(
            alice, bob, bottoms=bottoms, top=top, loss_fn=loss_fn, optimizer=optimizer, optimizer_args=options,
            normalise="casefold", standardise=False, **about,
        ) as run:  # fmt: skip
            losses = run.fit()
            evaluation = run.evaluate()
            predictions = run.predict([table["id"][row] for row in (12, 30)])
            run.get()
        expected = unsplit(
            whole_bottoms,
            whole_top,
            table,
            getattr(torch.optim, optimizer),
            options,
            loss_fn=loss_fn,
            **about,
        )
        assert losses == expected
        for mine, theirs in zip((*bottoms, top), (*whole_bottoms, whole_top), strict=True):
            for one, other in zip(mine.parameters(), theirs.parameters(), strict=True):
                assert torch.equal(one, other)
        assert evaluation.people == 40
        data = torch.tensor([[table[name][row] for name in "abcde"] for row in (12, 30)]).float()
        given = torch.cat([bottoms[0](data[:, :2]), bottoms[1](data[:, 2:])], 1)
        torch.testing.assert_close(predictions, top(given).detach())
    finally:
        torch.set_num_threads(threads)


def test_classes_noise_and_an_owner_without_columns(make_worker):
    table = whole()
    alice, bob = parties(make_worker, table)
    labels_alone = Party(bob.worker, "t", "who", label="y")
    torch.manual_seed(2)
    about = {
        "bottoms": [nn.Linear(2, 4), None], "top": nn.Linear(4, 2), "loss_fn": nn.CrossEntropyLoss(), "classes": True,
        "epochs": 4, "batch_size": 10, "normalise": "casefold", "holdout": 0.25,
    }  # fmt: skip
    with split_network(alice, labels_alone, **about, weights_to_client=False) as run:
        clear = run.fit(2)
        found = run.evaluate()
        assert found.people == 10
        assert 0 <= found.accuracy <= 1
        with pytest.raises(PolicyRefusedError, match="stay there"):
            run.get()
    with split_network(alice, labels_alone, **about, noise=3.0) as run:
        noisy = run.fit(2)
        with pytest.raises(OptionError, match="2 are left"):
            run.fit(3)
    assert noisy != clear
    with split_network(alice, labels_alone, **about) as run:
        assert run.fit(2) == clear


def test_what_cannot_be_a_split_network_is_refused(make_worker):
    table = whole()
    alice, bob = parties(make_worker, table)
    good = {
        "bottoms": [nn.Linear(2, 4), nn.Linear(3, 3)], "top": nn.Linear(7, 1), "loss_fn": nn.MSELoss(),
        "normalise": "casefold",
    }  # fmt: skip

    def refused(kind, match, *owners, **options):
        with pytest.raises(kind, match=match):
            split_network(*(owners or (alice, bob)), **{**good, **options})

    refused(OptionError, "for each of the 2 parties", bottoms=[nn.Linear(2, 4)])
    refused(OptionError, "no part", bottoms=[None, nn.Linear(3, 3)])
    refused(OptionError, "no tensor", bottoms=[nn.Flatten(0), nn.Linear(3, 3)])
    refused(OptionError, "optimizer", optimizer="Rocket")
    refused(OptionError, "noise", noise=-1)
    refused(OptionError, "predictions of a split network", predictions_to="alice")
    refused(Exception, "shape", top=nn.Linear(6, 1))
    bad = Table({"who": table["id"], "c": table["c"], "y": [0.5] * 60}, "who", label="y")
    ben = Party(make_worker("ben", {"t": bad}), "t", "who", ["c"], label="y")
    refused(
        DataError, "ben: label column 'y' has values that are no classes", alice, ben,
        bottoms=[nn.Linear(2, 4), nn.Linear(1, 3)], top=nn.Linear(7, 2), loss_fn=nn.CrossEntropyLoss(), classes=True,
    )  # fmt: skip
    run = split_network(alice, bob, **good, optimizer_args={"lr": 1e30}, standardise=False, epochs=30)
    with pytest.raises(JointError, match="smaller learning rate"):
        run.fit()


def test_what_fails_on_a_table_is_told_without_its_values(make_worker):
    """torch's own text would have the label: "Target 7 is out of bounds"."""
    table = whole()
    table["y"] = table["y"] * 7
    alice, bob = parties(make_worker, table)
    bottoms, _ = parts()

    def crossed(found, wanted):  # a function of one's own: how many classes it takes is not known before
        return nn.functional.cross_entropy(found, wanted)

    about = {
        "top": nn.Linear(7, 2), "loss_fn": crossed, "classes": True, "epochs": 1, "batch_size": 16,
        "normalise": "casefold",
    }  # fmt: skip
    with (
        split_network(alice, bob, bottoms=bottoms, **about) as run,
        pytest.raises((JointError, RemoteError)) as raised,
    ):
        run.fit()
    told = "".join(traceback.format_exception(raised.value))
    assert "for the worker's owner only" in told
    assert "Target" not in told
    assert "out of bounds" not in told

"""The functions of 0.2's `utils`, and data sets that come and go."""

import asyncio
import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

from planrt.errors import OptionError, RemoteError, TraceError, UnknownDatasetError
from planrt.fl import FederatedDataLoader, RoundScheduler, TrainConfig, evaluate_model_on_worker, utils
from planrt.torch_hook import TorchHook
from planrt.workers import BaseDataset, VirtualWorker, WebsocketClientWorker, WebsocketServerWorker
from tests.models import classification_data


def linear(weight, bias=0.0):
    model = nn.Linear(2, 1)
    nn.init.constant_(model.weight, weight)
    nn.init.constant_(model.bias, bias)
    return model


def test_models_are_added_and_scaled_in_place():
    one, other = linear(1.0, 2.0), linear(3.0)
    assert utils.add_model(one, other) is one
    assert utils.scale_model(one, 0.5) is one
    assert one.weight.tolist() == [[2.0, 2.0]]
    assert one.bias.tolist() == [1.0]
    assert other.weight.tolist() == [[3.0, 3.0]]
    with pytest.raises(OptionError, match=r"weight is \(1, 2\) in one model and \(1, 3\) in the other"):
        utils.add_model(one, nn.Linear(3, 1))


def test_accuracy():
    scores = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.7, 0.3], [0.6, 0.4]])
    assert utils.accuracy(scores, torch.tensor([0, 1, 1, 0])) == 0.75
    assert utils.accuracy(scores, torch.tensor([[0], [1], [1], [0]])) == 0.75
    with pytest.raises(OptionError, match="accuracy takes scores"):
        utils.accuracy(scores, torch.tensor([0, 1]))


def test_toy_data():
    data, target = utils.create_gaussian_mixture_toy_data(100)
    assert (data.shape, target.shape, target.sum().item()) == ((100, 2), (100,), 50)
    data, target = utils.iris_data_partial()
    assert (data.shape, data.dtype, sorted(set(target.tolist()))) == ((30, 4), torch.float32, [0, 1, 2])


def test_batches_per_worker(make_worker):
    TorchHook(torch)
    bob, alice = make_worker("bob"), make_worker("alice")
    data = BaseDataset(torch.arange(10.0).view(5, 2), torch.arange(5)).federate((bob, alice))
    for options in ({}, {"num_iterators": 2}):
        batches = utils.extract_batches_per_worker(FederatedDataLoader(data, batch_size=2, **options))
        assert [len(data) for data, _ in batches[bob]] == [2, 1]
        assert [target.get().tolist() for _, target in batches[alice]] == [[3, 4]]


def test_evaluations_are_logged_as_in_the_tutorials(make_worker, caplog):
    data = torch.eye(10)[torch.arange(40) % 10]
    testing = make_worker("testing", {"mnist_testing": BaseDataset(data, torch.arange(40) % 10)})
    model = nn.Sequential(nn.Linear(10, 10, bias=False), nn.LogSoftmax(1))
    nn.init.eye_(model[0].weight)
    with caplog.at_level(logging.INFO, logger="planrt.fl"):
        result = evaluate_model_on_worker(
            model_identifier="Federated model", worker=testing, dataset_key="mnist_testing", model=model,
            nr_bins=10, batch_size=16, print_target_hist=True, device="cpu",
        )  # fmt: skip
    assert [record.message for record in caplog.records] == [
        f"Target histogram: {[4] * 10}",
        "Federated model: Percentage numbers 0-3: 40%, 4-6: 30%, 7-9: 30%",
        f"Federated model: Average loss: {result.loss:.4f}, Accuracy: 40/40 (100.00%)",
    ]


def test_data_sets_go_as_they_came():
    bob = VirtualWorker("bob", datasets={"d": classification_data(0)})
    bob.remove_dataset("d")
    assert "d" not in bob.datasets
    with pytest.raises(OptionError, match="no data set under the key 'd'; it has: none"):
        bob.remove_dataset("d")
    bob.add_dataset(classification_data(1), "d")
    assert bob.datasets["d"].length == 60
    server = WebsocketServerWorker("carol", threads=1)
    server.add_dataset(classification_data(0), "d")
    config = TrainConfig(nn.Linear(6, 3), F.cross_entropy)
    with server.running() as uri, WebsocketClientWorker("carol", uri=uri) as carol:
        server.remove_dataset("d")
        config.send(carol)
        with pytest.raises(UnknownDatasetError, match="it has: none"):
            carol.fit("d")


def test_wide_data_says_what_to_cast(make_worker):
    data = classification_data(0)
    bob = make_worker("bob", {"d": BaseDataset(data.data.double().numpy(), data.targets.numpy())})
    scheduler = RoundScheduler([bob], TrainConfig(nn.Linear(6, 3), F.cross_entropy), dataset_key="d", seed=1)
    with pytest.raises(TraceError, match=r"'d' is float64 and the model float32: .*model\.double\(\)"):
        asyncio.run(scheduler.prepare())


def test_an_item_that_cannot_be_read_is_told_with_its_key(make_worker):
    class Broken:
        def __len__(self):
            return 4

        def __getitem__(self, index):
            if index == 3:
                raise OSError("no such file")
            return torch.ones(6), 0

    bob = make_worker("bob", {"scans": Broken()})
    TrainConfig(nn.Linear(6, 3), F.cross_entropy).send(bob)
    with pytest.raises(RemoteError, match="data set 'scans': item 3 cannot be read: OSError: no such file"):
        bob.fit("scans")


def test_an_owner_sees_the_names_of_a_plan(tmp_path, capsys):
    """What waits for an owner says which model it is of, and what its inputs are."""
    from planrt.cli import main
    from planrt.errors import NotApprovedError
    from planrt.plans.policy.rules import Policy

    folder = tmp_path / "approvals"
    policy = Policy(approval="ask")
    clinic = VirtualWorker("clinic", datasets={"d": classification_data(0)}, policy=policy, approvals=folder)
    config = TrainConfig(nn.Linear(6, 3), F.cross_entropy)
    config.send(clinic)
    with pytest.raises(NotApprovedError, match=r"'Linear \(training\)'"):
        clinic.fit("d")
    hash = config.trace_for(clinic, "d").training.hash
    (waiting,) = [path for path in folder.rglob("*.plan") if hash in path.name]
    assert main(["inspect", str(waiting), "--training", "--input", "data=32x6", "--input", "target=32"]) in (
        0,
        None,
    )
    assert "Linear (training)" in capsys.readouterr().out


def test_a_short_last_batch_that_a_policy_forbids_names_the_way_out():
    from planrt.errors import PolicyRefusedError
    from planrt.plans.policy.rules import Policy

    policy = Policy.from_values({"approval": "open", "release": [{"tag": "#patients", "min_rows": 10}]})
    clinic = VirtualWorker("clinic", policy=policy)
    clinic.add_dataset(classification_data(0, samples=60), "d", tags=["#patients"])
    options = {"batch_size": 16, "optimizer_args": {"lr": 0.1}}
    clinic.add_dataset(classification_data(0, samples=53), "odd", tags=["#patients"])
    TrainConfig(nn.Linear(6, 3), F.cross_entropy, **options).send(clinic)
    assert clinic.fit("d").samples == 60
    with pytest.raises(PolicyRefusedError, match=r"smallest batch has 5 rows: TrainConfig\(drop_last=True\)"):
        clinic.fit("odd")
    TrainConfig(nn.Linear(6, 3), F.cross_entropy, drop_last=True, **options).send(clinic)
    assert clinic.fit("odd").samples == 48


@pytest.mark.parametrize("key", [5, None, b"d", ["d"]])
def test_a_data_set_is_served_under_a_string(key):
    with VirtualWorker("bob") as worker:
        with pytest.raises(OptionError, match="key is a string"):
            worker.add_dataset(TensorDataset(torch.zeros(3, 2), torch.zeros(3)), key)
        with pytest.raises(OptionError, match=r"tags=\['#x'\]"):
            worker.add_dataset(TensorDataset(torch.zeros(3, 2), torch.zeros(3)), "d", tags="#x")
        assert not worker.datasets


def test_workers_come_in_a_list():
    with VirtualWorker("bob") as worker, pytest.raises(OptionError, match=r"RoundScheduler\(\[worker\]"):
        RoundScheduler(worker, TrainConfig(nn.Linear(2, 2), F.mse_loss), dataset_key="d", seed=1)
    with pytest.raises(OptionError, match=r"under 2\*\*63"):
        TrainConfig(nn.Linear(2, 2), F.mse_loss, batch_size=2**70)

"""What programs of PySyft 0.2 expect of workers behind websockets, with its calls and keywords."""

from __future__ import annotations

import contextlib
import gc

import pytest
import syft as sy
import torch
import torch.nn.functional as F
from syft.frameworks.torch.fl import utils
from syft.workers.websocket_client import WebsocketClientWorker
from syft.workers.websocket_server import WebsocketServerWorker
from torch import nn

from planrt.errors import OptionError


@pytest.fixture
def start_remote_worker(hook):
    """``start_remote_worker(id)`` -> (server, client), both made with the keywords of 0.2."""
    with contextlib.ExitStack() as stack:

        def start(id, datasets=None, **options):
            server = WebsocketServerWorker(
                hook=hook, host="localhost", port=0, id=id, verbose=False, threads=1
            )
            for key, dataset in (datasets or {}).items():
                server.add_dataset(dataset, key=key)
            stack.enter_context(server.running())
            client = WebsocketClientWorker(hook=hook, host="localhost", port=server.port, id=id, **options)
            return server, stack.enter_context(client)

        yield start


def test_basic_computation(start_remote_worker):
    _, remote = start_remote_worker("fed1")
    x = torch.ones(5).send(remote)
    assert (x + x).get().tolist() == [2] * 5


def test_search_there(start_remote_worker, me):
    _, remote = start_remote_worker("fed2")
    pointer = torch.tensor([1, 2, 3, 4]).tag("#sample_data", "#another_tag").send(remote)
    del pointer
    gc.collect()
    for query in (("#sample_data",), ("#sample_data", "#another_tag"), (["#sample_data", "#another_tag"],)):
        (found,) = remote.search(*query)
        assert (found.owner.id, found.location.id) == ("me", "fed2")
    assert remote.search(["#sample_data", "#another_tag", "#not_existent"]) == []


def test_objects_are_listed_and_counted_there(start_remote_worker):
    _, remote = start_remote_worker("fed-list-objects")
    remote.clear_objects()
    x = torch.tensor([1, 2, 3]).send(remote)
    assert remote.objects_count_remote() == 1
    y = torch.tensor([4, 5, 6]).send(remote)
    assert remote.objects_count_remote() == 2
    shown = remote.list_objects_remote()
    assert str(x.id_at_location) in shown
    assert str(y.id_at_location) in shown
    x.get()
    assert remote.objects_count_remote() == 1


def test_objects_are_cleared_there(start_remote_worker):
    _, remote = start_remote_worker("fed-clear")
    x = torch.tensor([1, 2, 3]).send(remote, garbage_collect_data=False)
    y = torch.tensor([4, 5, 6]).send(remote, garbage_collect_data=False)
    assert remote.objects_count_remote() == 2
    remote.clear_objects_remote()
    assert remote.objects_count_remote() == 0
    del x, y


def test_closed_and_connected_again(start_remote_worker):
    """As in 0.2: what was there is there."""
    _, remote = start_remote_worker("fed-connect-close")
    x = torch.tensor([1, 2, 3]).send(remote)
    torch.tensor([4, 5, 6]).tag("#kept").send(remote)
    remote.close()
    assert remote.connect() is remote
    assert x.get().tolist() == [1, 2, 3]
    assert remote.search("#kept")[0].get().tolist() == [4, 5, 6]


def test_several_results(start_remote_worker):
    _, remote = start_remote_worker("socket_multiple_output")
    x = torch.tensor([1.0, 3, 2]).send(remote)
    ordered, places = torch.sort(x)
    assert (ordered.get().tolist(), places.get().tolist()) == ([1, 2, 3], [0, 2, 1])


def test_a_plan_and_a_module_plan_there(start_remote_worker):
    _, remote = start_remote_worker("test_plan_worker")

    @sy.func2plan(args_shape=[(1,)])
    def my_plan(data):
        x = data * 2
        y = (x - 2) * 10
        return x + y

    assert my_plan.send(remote)(torch.tensor([-1, 2, 3]).send(remote)).get().tolist() == [-42, 24, 46]

    class Net(sy.Plan):
        def __init__(self):
            super().__init__()
            self.fc1 = nn.Linear(2, 3)
            self.fc2 = nn.Linear(3, 2)

        def forward(self, x):
            return F.log_softmax(self.fc2(F.relu(self.fc1(x))), dim=0)

    net, x = Net(), torch.tensor([-1, 2.0])
    net.build(x)
    pointer = net.send(remote)
    assert torch.allclose(pointer(x.send(remote)).get(), net(x))
    fetched = net.owner.fetch_plan(net.id, remote, copy=True)
    assert torch.allclose(fetched(x), net(x))


def test_another_id_or_kind_of_worker(hook, start_remote_worker):
    """A worker that exists, made again as one of another kind."""
    server, _ = start_remote_worker("fed1")
    with sy.VirtualWorker(hook, "bob") as bob:
        torch.tensor([1, 2, 3]).send(bob).gc = False
        with pytest.raises(RuntimeError, match="is 'fed1', not 'bob'"):
            WebsocketClientWorker(hook=hook, host="localhost", port=server.port, id="bob")


def test_nobody_listens(hook):
    with pytest.raises(ConnectionRefusedError):
        WebsocketClientWorker(hook=hook, host="localhost", port=1, id="alice", timeout=2)


def test_keywords_of_the_client(hook, start_remote_worker):
    _, remote = start_remote_worker(
        "keyword", log_msgs=True, verbose=True, is_client_worker=True, secure=False, message_pending_time=0.0
    )
    assert remote.log_msgs
    assert remote.is_client_worker
    torch.ones(1).send(remote).get()
    assert len(remote.msg_history) >= 2
    with pytest.raises(OptionError, match="data="):
        WebsocketClientWorker(hook, "localhost", 8777, id="x", data=[torch.ones(1)])


def test_data_sets_of_a_server_are_added_and_removed(hook):
    server = WebsocketServerWorker(hook, "localhost", 0, id="fed", data=[torch.ones(2).tag("#there")])
    server.add_dataset(sy.BaseDataset(torch.ones(3, 2), torch.ones(3)), key="string_dataset")
    assert list(server.datasets) == ["string_dataset"]
    server.remove_dataset("string_dataset")
    assert "string_dataset" not in server.datasets
    with pytest.raises(ValueError, match="string_dataset"):
        server.remove_dataset("string_dataset")
    with server.running() as uri, WebsocketClientWorker(hook, uri=uri, id="fed") as remote:
        assert remote.search("#there")[0].get().tolist() == [1, 1]


def loss_fn(pred, target):
    return F.cross_entropy(input=pred, target=target)


def test_evaluation_of_the_iris_data(start_remote_worker):
    data, target = utils.iris_data_partial()
    _, remote = start_remote_worker("evaluate_remote", {"iris": sy.BaseDataset(data, target)})
    torch.manual_seed(0)
    model = torch.jit.trace(nn.Sequential(nn.Linear(4, 20), nn.ReLU(), nn.Linear(20, 3)), data)
    before = loss_fn(target=target, pred=model(data)).item()
    right = model(data).argmax(1).eq(target).sum().item()
    config = sy.TrainConfig(
        batch_size=10, model=model, loss_fn=loss_fn, optimizer_args={"lr": 0.1}, epochs=5, shuffle=True
    )
    config.send(remote)
    result = remote.evaluate(
        dataset_key="iris", return_histograms=True, nr_bins=3, return_loss=True, return_raw_accuracy=True
    )
    assert result["loss"] == pytest.approx(before, abs=1e-5)
    assert result["nr_correct_predictions"] == right
    assert result["nr_predictions"] == len(data) == 30
    assert list(result["histogram_target"]) == [10, 10, 10]
    assert sum(result["histogram_predictions"]) == 30
    for _ in range(10):
        remote.fit(dataset_key="iris")
    after = remote.evaluate(dataset_key="iris", return_histograms=True, nr_bins=3)
    assert after["loss"] < result["loss"]
    assert after["nr_correct_predictions"] > 20
    with pytest.raises(ValueError, match="nowhere"):
        remote.fit(dataset_key="nowhere")

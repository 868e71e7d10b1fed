"""Deterministic kernels: on while a worker computes that asks for them, off again afterwards."""

import os
import subprocess
import sys

import pytest
import torch

from planrt.errors import DeviceLostError, OptionError, RemoteError
from planrt.fl.serve import parser as serve_parser
from planrt.torch_hook import TorchHook
from planrt.workers import VirtualWorker, WebsocketClientWorker, WebsocketServerWorker
from planrt.workers.machine import devices
from planrt.workers.machine.devices import deterministic_kernels, explained, wanted


class Watched(torch.utils.data.Dataset):
    """Notes the settings whenever an item is read."""

    def __init__(self):
        self.seen = []

    def __len__(self):
        return 2

    def __getitem__(self, index):
        self.seen.append((torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark))
        return torch.ones(3), 0


def fit(worker):
    from planrt.fl import TrainConfig

    TrainConfig(torch.nn.Linear(3, 2), torch.nn.functional.cross_entropy).send(worker)
    worker.fit("d")


@pytest.fixture(autouse=True)
def flags_that_can_be_set():
    """torch's own test tools freeze them for the whole process, and other tests import these."""
    from torch.backends import __allow_nonbracketed_mutation

    with __allow_nonbracketed_mutation():
        yield


@pytest.mark.parametrize("deterministic", [True, False, None])
def test_the_settings_hold_while_a_worker_computes_and_not_after(deterministic, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    virtual, remote = Watched(), Watched()
    with VirtualWorker("bob", datasets={"d": virtual}, deterministic=deterministic) as bob:
        virtual.seen.clear()
        fit(bob)
    server = WebsocketServerWorker("carol", threads=1, deterministic=deterministic)
    server.add_dataset(remote, "d")
    remote.seen.clear()
    with server.running() as uri, WebsocketClientWorker("carol", uri=uri) as carol:
        fit(carol)
    expected = (True, False) if deterministic else (False, True)  # None: this is a CPU
    assert set(virtual.seen) == set(remote.seen) == {expected}
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.backends.cudnn.benchmark


def test_settings_are_put_back_as_they_were():
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with deterministic_kernels(True):
            assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled()
        with pytest.raises(KeyError), deterministic_kernels(True):
            raise KeyError
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def test_an_op_without_a_deterministic_kernel_names_the_flag():
    TorchHook(torch)
    with VirtualWorker("bob", deterministic=True) as bob, VirtualWorker("alice") as alice:
        for worker in (bob, alice):
            x = torch.zeros(3).send(worker)
            index, values = torch.tensor([0, 2]).send(worker), torch.ones(2).send(worker)
            y = torch.put(x, index, values)
            if worker is alice:
                assert y.get().tolist() == [1, 0, 1]
                continue
            with pytest.raises(RemoteError, match=r"put_.*--fast-kernels \(deterministic=False\)"):
                y.get()


def test_who_asks_for_it(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    assert not wanted(torch.device("cpu"), None)
    assert wanted(torch.device("cpu"), True)
    assert not wanted(torch.device("cuda"), False)
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    assert wanted(torch.device("cuda"), None)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    assert wanted(torch.device("cuda:1"), None)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
    assert explained("no such file") == "no such file"


def test_the_flag_of_the_commands():
    from planrt.fl.data.digits import DataSource
    from planrt.fl.mnist_async import parser
    from planrt.fl.runs.children import mnist_children

    assert serve_parser("planrt serve").parse_args(["--id", "alice", "--fast-kernels"]).fast_kernels
    assert not serve_parser("planrt serve").parse_args(["--id", "alice"]).fast_kernels
    assert parser().parse_args(["--fast-kernels"]).fast_kernels
    source = DataSource("digits", None)
    assert all("--fast-kernels" in child.options for child in mnist_children(source, fast_kernels=True))
    assert not any("--fast-kernels" in child.options for child in mnist_children(source))


@pytest.mark.parametrize("device", ["cuda:63", "cudda", "mps:9", "meta", "", 3.5])
def test_a_device_that_is_not_there_is_refused_when_the_worker_is_made(device):
    with pytest.raises(OptionError, match=r"device .* (cannot be used here|would hold no values)"):
        VirtualWorker("nowhere", device=device)
    with pytest.raises(OptionError, match=r"device .* (cannot be used here|would hold no values)"):
        WebsocketServerWorker("nowhere", device=device)


def test_the_compiler_that_deterministic_kernels_need_is_imported_before_there_are_threads():
    """Two threads that import parts of it at once wait for each other: a worker on a GPU ended in its first round."""
    code = (
        "import sys, torch, threading; from planrt.workers.machine.devices import wanted;"
        "assert 'torch._inductor.config' not in sys.modules;"
        "wanted(torch.device('cuda'), None);"
        "assert 'torch._inductor.config' in sys.modules and threading.active_count() == 1"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_server_whose_device_is_gone_ends_so_that_it_can_be_started_again(monkeypatch):
    """There need be no GPU: the server believes that it has one, and that it does not answer."""
    TorchHook(torch)
    tried = []
    monkeypatch.setattr(devices, "answers", lambda device: bool(tried.append(device)))
    server = WebsocketServerWorker("carol", threads=1)
    server._state.device = torch.device("cuda")
    serving = server.running()
    with WebsocketClientWorker("carol", uri=serving.__enter__()) as carol:
        x, far = torch.ones(3).send(carol), torch.tensor([5]).send(carol)
        assert x.clone().get().tolist() == [1, 1, 1]
        assert not tried
        with pytest.raises(RemoteError, match="out of bounds|out of range"):
            x[far].get()
    with pytest.raises(DeviceLostError, match="start worker 'carol' again"):
        serving.__exit__(None, None, None)
    assert tried == [torch.device("cuda")]


def test_a_failed_op_alone_ends_nothing(monkeypatch):
    TorchHook(torch)
    server = WebsocketServerWorker("carol", threads=1)
    server._state.device = torch.device("cuda")
    monkeypatch.setattr(devices, "answers", lambda device: True)
    with server.running() as uri, WebsocketClientWorker("carol", uri=uri) as carol:
        x, far = torch.ones(3).send(carol), torch.tensor([5]).send(carol)
        with pytest.raises(RemoteError):
            x[far].get()
        assert torch.ones(3).send(carol).get().tolist() == [1, 1, 1]


def test_a_device_that_computes_answers():
    assert devices.answers(torch.device("cpu"))
    assert not devices.answers(torch.device("cuda:63"))

"""A worker that serves no data set: ``python -m planrt.fl.serve --id bob --empty``."""

from __future__ import annotations

import pytest
import torch

import planrt
from planrt.errors import GetNotPermittedError, HandshakeError
from planrt.fl import serve
from planrt.fl.runs.children import ChildOptions, WorkerProcesses
from planrt.workers import WebsocketClientWorker

pytestmark = pytest.mark.usefixtures("warm_workers")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--testing"], "leave out --testing, --data, --key and --tag"),
        (["--data", "."], "leave out --testing"),
        (["--key", "k"], "leave out --testing"),
        (["--tag", "#x"], "leave out --testing"),
        (["--dataset", "digits"], "leave out --dataset"),
        (["--dataset", "package:factory"], "leave out --dataset"),
    ],
)
def test_options_about_data_are_refused(options, message, capsys):
    assert serve.main(["--id", "bob", "--empty", *options]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert "--empty serves no data set" in printed.err
    assert message in printed.err


def test_a_tag_without_its_sign_is_refused(capsys):
    """No release rule would ever be about it."""
    with pytest.raises(SystemExit) as ended:
        serve.main(["--id", "bob", "--dataset", "package:factory", "--key", "k", "--tag", "patients"])
    assert ended.value.code == 2
    assert "a tag is written as #patients, got 'patients'" in capsys.readouterr().err


def test_any_id_will_do_and_clients_send_what_it_holds(capfd):
    planrt.TorchHook(torch)
    with WorkerProcesses([ChildOptions("dora", options=("--empty", "--threads", "1"))]) as processes:
        ready = processes.wait_ready()["dora"]
        assert (ready.key, ready.images, ready.digits) == ("", 0, {})
        with WebsocketClientWorker("dora", uri=ready.uri) as dora:
            assert dict(dora.datasets) == {}
            assert (torch.ones(3).send(dora) + 1).get().tolist() == [2, 2, 2]
    assert capfd.readouterr().err == ""


def test_by_hand_it_says_what_it_holds(monkeypatch, capsys):
    from planrt.workers import websocket_server as server

    monkeypatch.setattr(server.WebsocketServerWorker, "start", lambda self, *, ready: ready(1234))
    assert serve.main(["--id", "dora", "--empty"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "dora holds no data set: clients send it what it needs",
        "Worker dora serves at ws://127.0.0.1:1234; Ctrl-C stops it",
    ]


def test_users_come_from_a_file(tmp_path):
    planrt.TorchHook(torch)
    users = tmp_path / "users"
    users.write_text("# who may see private data\nann: the long token of ann\n\nben:the long token of ben\n")
    users.chmod(0o600)
    child = ChildOptions("dora", options=("--empty", "--threads", "1", "--users", str(users)))
    with WorkerProcesses([child]) as processes:
        uri = processes.wait_ready()["dora"].uri
        with (
            WebsocketClientWorker("dora", uri=uri, token="the long token of ann") as ann,
            WebsocketClientWorker("dora", uri=uri, token="the long token of ben") as ben,
        ):
            x = torch.ones(2).tag("#private").send(ann, allowed_users=["ann"])
            ann.objects_count()
            (found,) = ben.search("#private")
            with pytest.raises(GetNotPermittedError, match="ann may get it"):
                (found * 2).get()
            assert (x * 2).get().tolist() == [2, 2]
        with pytest.raises(HandshakeError, match="token"):
            WebsocketClientWorker("dora", uri=uri, token="guess")


LONG = "a token that is long enough"
TWICE = [f"ann: {LONG}\nann: {LONG}x", f"ann: {LONG}\nben: {LONG}"]


@pytest.mark.parametrize("text", ["ann", "ann:", ":token", *TWICE, "ann: a"])
def test_malformed_users_are_refused(tmp_path, capsys, text):
    users = tmp_path / "users"
    users.write_text(text)
    users.chmod(0o600)
    assert serve.main(["--id", "bob", "--empty", "--port", "0", "--users", str(users)]) == 2
    assert "token" in capsys.readouterr().err
    assert serve.main(["--id", "bob", "--empty", "--port", "0", "--users", str(tmp_path / "none")]) == 2
    assert "cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (["--max-session-memory", "0"], "--max-session-memory must be at least 1 byte"),
        (["--host", "0.0.0.0"], "other machines reach 0.0.0.0"),
        (["--policy", "nowhere.toml"], "nowhere.toml"),
        (["--users", "nowhere"], "nowhere"),
    ],
    ids=lambda given: given[0] if isinstance(given, list) else "",
)
def test_options_are_looked_at_before_data_are_fetched(monkeypatch, capfd, wrong, told):
    def load(*args):
        raise AssertionError("it fetches data")

    monkeypatch.setattr(serve.data, "load", load)
    assert serve.main(["--id", "alice", "--port", "0", *wrong]) == 2
    error = capfd.readouterr().err
    assert told in error
    assert error.count("\n") == 1

"""``worker.status()`` and ``planrt status``: what a worker tells of itself, and to whom."""

import asyncio
import contextlib
import http.server
import json
import threading

import pytest
import torch

import planrt
from planrt.cli import main
from planrt.errors import RemoteError, WorkerLostError
from planrt.workers import VirtualWorker, WebsocketClientWorker, WebsocketServerWorker
from planrt.workers.wire import messages as m

ANN, BEN = "the long token of ann, which nobody guesses", "and that of ben, which is another one"


@pytest.fixture(scope="module", autouse=True)
def hook():
    return planrt.TorchHook(torch)


@pytest.fixture
def connect(transport):
    """``connect("clinic", users=...)`` -> ``client(token)``"""
    with contextlib.ExitStack() as stack:

        def start(id, **options):
            if transport == "memory":
                worker = stack.enter_context(VirtualWorker(id, auto_add=False, **options))
                worker.__exit__(None, None, None)  # its own session would be one more of nobody's
                return lambda token="": stack.enter_context(worker.connect_as(token))
            uri = stack.enter_context(WebsocketServerWorker(id, threads=1, **options).running())
            return lambda token="": stack.enter_context(
                WebsocketClientWorker(id, uri=uri, token=token, auto_add=False)
            )

        yield start


def figures(status):
    return status.user, status.sessions, status.objects, status.waiting


def test_a_user_sees_what_is_its_own_in_all_sessions(connect):
    client = connect("clinic", users={"ann": ANN, "ben": BEN})
    ann, ann_too, ben, nobody, other = client(ANN), client(ANN), client(BEN), client(), client()
    kept = [torch.ones(100).send(ann), torch.ones(100).send(ann_too), torch.ones(300).send(ben)]
    kept.append(torch.ones(5).send(nobody))
    assert figures(ann.status()) == ("ann", 2, 2, 0)
    assert ann.status().bytes == 800
    assert (figures(ben.status()), ben.status().bytes) == (("ben", 1, 1, 0), 1200)
    assert (figures(nobody.status()), nobody.status().bytes) == (("", 1, 1, 0), 20)
    assert figures(other.status()) == ("", 1, 0, 0)
    ann_too.close()
    assert figures(ann.status())[1:3] == (2, 2)  # it may come back
    ann_too.connect()
    ann_too.__exit__(None, None, None)
    assert figures(ann.status())[1:3] == (1, 1)
    del kept


def test_where_nobody_has_a_name_all_are_one(connect):
    client = connect("bob")
    one, other = client(), client()
    kept = torch.ones(100).send(one)
    assert figures(other.status()) == figures(one.status()) == ("", 2, 1, 0)
    del kept


def test_status_says_what_the_worker_is(connect):
    bob = connect("bob")()
    status = bob.status()
    assert (status.worker_id, status.device, status.planrt) == ("bob", "cpu", planrt.__version__)
    assert status.address == bob.address
    assert asyncio.run(bob.async_status()).since == status.since
    bob.close()
    with pytest.raises(WorkerLostError):
        bob.status()


def test_an_older_worker_is_told_from_one_that_answers(connect, monkeypatch):
    bob = connect("bob")()
    older = m.Versions(3, "0.0.9", "2.6", "0" * 64)
    monkeypatch.setattr(bob._connection.session, "versions", older)
    with pytest.raises(RemoteError, match=r"runs planrt 0\.0\.9, which does not tell its status"):
        bob.status()


def test_status_and_its_answer_are_each_others_only(connect):
    bob = connect("bob")()
    assert asyncio.run(bob.ask(m.WorkerStatus, m.AskStatus()))[0].sessions == 1
    with pytest.raises(RemoteError):
        asyncio.run(bob.ask(m.WorkerStatus, m.WorkerStatus(0.0, "cpu", "", 1, 1, 1, 1)))


# ------------------------------------------------------------------------------------ the command


@pytest.fixture(scope="module")
def served():
    server = WebsocketServerWorker("clinic", threads=1, users={"ann": ANN}, metrics_port=0)
    with server.running() as uri:
        yield uri, server.metrics_address


def test_the_command_asks_a_worker(served, tmp_path, capsys):
    uri, _ = served
    token = tmp_path / "token"
    token.write_text(ANN)
    token.chmod(0o600)
    with WebsocketClientWorker("clinic", uri=uri, token=ANN, auto_add=False) as ann:
        kept = torch.ones(100).send(ann)
        assert main(["status", f"clinic={uri}", "--token-file", str(token)]) == 0
        told = capsys.readouterr().out
        assert f"clinic at {uri}: serves since" in told
        assert "for user ann: 2 sessions, 1 object, 400 bytes" in told
        assert main(["status", f"clinic={uri}", "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        assert (told["user"], told["sessions"], told["objects"]) == ("", 1, 0)
        del kept


def test_the_command_asks_where_metrics_are(served, capsys):
    _, url = served
    for form in (url, f"{url}/", f"{url}/health", f"{url}/metrics"):
        assert main(["status", form]) == 0
        assert "serving" in capsys.readouterr().out
    assert main(["status", url, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["worker"] == "clinic"


def test_where_metrics_are_is_asked_without_a_proxy(served, capsys, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    assert main(["status", served[1]]) == 0
    assert "serving" in capsys.readouterr().out


@pytest.mark.parametrize("answer", [b"[]", b"{}", b"hello", b'{"status": 3}', b"", b"\xff", b"9" * 5000])
def test_a_server_that_is_none_of_planrts_tells_no_status(answer, capsys):
    class Other(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *args):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Other) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        assert main(["status", f"http://127.0.0.1:{server.server_port}"]) == 2
    assert "tells no status" in capsys.readouterr().err


def test_a_worker_in_trouble_is_exit_code_1(capsys):
    with VirtualWorker("bob", auto_add=False) as bob, planrt.MetricsServer(bob.watched) as server:
        bob._host.device_lost.set()
        assert main(["status", server.address]) == 1
        assert "device lost" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["ws://127.0.0.1:9"], "name the worker too, as alice=ws://127.0.0.1:9"),
        (["alice=ws://127.0.0.1:9"], "nobody answers"),
        (["alice=ws://127.0.0.1"], "no worker address"),
        (["alice=ftp://127.0.0.1:9"], "there is no folder"),
        (["http://127.0.0.1:9"], "tells no status"),
        (["http://"], "tells no status"),
        (["alice=ws://127.0.0.1:9", "--timeout", "0"], "--timeout"),
        (["alice=ws://127.0.0.1:9", "--ca", "/nowhere.pem"], "ca="),
        (["alice=ws://127.0.0.1:9", "--token-file", "/nowhere"], "/nowhere"),
        ([""], "there is no"),
    ],
)
def test_what_cannot_be_asked_is_one_line(words, said, capsys):
    try:
        code = main(["status", *words])
    except SystemExit as error:
        code = error.code
    told = capsys.readouterr().err
    assert code in (1, 2)
    assert said in told
    assert len(told.strip().splitlines()) == 1


def test_another_name_and_a_wrong_token_are_told(served, tmp_path, capsys):
    uri, url = served
    assert main(["status", f"alice={uri}"]) in (1, 2)
    assert "is 'clinic', not 'alice'" in capsys.readouterr().err
    token = tmp_path / "token"
    token.write_text("a token that is none of this worker's users")
    token.chmod(0o600)
    assert main(["status", f"clinic={uri}", "--token-file", str(token)]) in (1, 2)
    assert "token" in capsys.readouterr().err
    assert main(["status", uri.replace("ws://", "http://")]) == 2  # a worker, and no metrics
    assert "tells no status" in capsys.readouterr().err
    assert main(["status", f"clinic={url.replace('http://', 'ws://')}"]) in (1, 2)
    assert "does not speak websocket" in capsys.readouterr().err


def test_one_that_computes_does_not_answer_and_that_is_said(capsys):
    began, go_on = threading.Event(), threading.Event()

    class Slow(torch.utils.data.Dataset):
        slow = False

        def __len__(self):
            return 4

        def __getitem__(self, place):
            if self.slow:
                began.set()
                go_on.wait(300)
            return torch.ones(2), torch.tensor(1)

    dataset = Slow()
    server = WebsocketServerWorker("bob", threads=1)
    server.add_dataset(dataset, "slow")
    config = planrt.TrainConfig(
        torch.nn.Linear(2, 2), torch.nn.functional.cross_entropy, batch_size=4, optimizer_args={"lr": 0.1}
    )
    with server.running() as uri, WebsocketClientWorker("bob", uri=uri, auto_add=False) as bob:
        config.send(bob)
        dataset.slow = True
        fitting = threading.Thread(target=lambda: bob.fit("slow"))
        fitting.start()
        try:
            assert began.wait(60)
            assert main(["status", f"bob={uri}", "--timeout", "10"]) in (1, 2)
            assert "gave no answer within 10 s: it computes, or is frozen" in capsys.readouterr().err
        finally:
            go_on.set()
            fitting.join()
        assert main(["status", f"bob={uri}"]) == 0

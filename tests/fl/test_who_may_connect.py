"""Users and TLS of real worker processes, from the commands that make them; and what is wrong before they start."""

import contextlib
import io
import os
import re
import stat
import subprocess
import sys

import psutil
import pytest
import torch
import trustme

import planrt
from planrt import cli
from planrt.errors import GetNotPermittedError, HandshakeError
from planrt.fl import serve
from planrt.fl.runs.children import ChildOptions, WorkerProcesses
from planrt.workers import WebsocketClientWorker
from planrt.workers.serving import users_file
from planrt.workers.wire import messages as m
from planrt.workers.wire.messages import own_versions

pytestmark = pytest.mark.usefixtures("warm_workers")


OLD = "a token of the old kind"


def planrt_says(*words, stdin=""):
    """The exit code, and what a command of `planrt` writes."""
    before, sys.stdin = sys.stdin, io.StringIO(stdin)
    try:
        with (
            contextlib.redirect_stdout(io.StringIO()) as out,
            contextlib.redirect_stderr(io.StringIO()) as err,
        ):
            try:
                code = cli.main(list(words))
            except SystemExit as end:
                code = end.code
    finally:
        sys.stdin = before
    return code, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("federation")


@pytest.fixture(scope="module")
def authority(folder):
    made = trustme.CA()
    made.cert_pem.write_to_path(folder / "ca.pem")
    pair = made.issue_cert("localhost", "127.0.0.1")
    pair.private_key_pem.write_to_path(folder / "key.pem")
    pair.cert_chain_pems[0].write_to_path(folder / "cert.pem")
    return made


@pytest.fixture(scope="module")
def users(folder):
    """A file of users: ann's token was made, and ben's given."""
    path = folder / "users.txt"
    code, out, _ = planrt_says("users", "add", "ann", "--users", str(path))
    assert code == 0
    path.write_text(f"{path.read_text()}ben: {OLD}\n")
    return path, out.strip()


@pytest.fixture(scope="module")
def clinic(folder, authority, users):
    options = [
        "--users",
        users[0],
        "--require-user",
        "--tls-cert",
        folder / "cert.pem",
        "--tls-key",
        folder / "key.pem",
    ]
    child = ChildOptions("clinic", options=("--empty", "--threads", "1", *map(str, options)))
    with WorkerProcesses([child]) as processes:
        yield processes.wait_ready()["clinic"].uri, processes.pids["clinic"]


def connect(clinic, folder, token="", **options):
    return WebsocketClientWorker(
        "clinic", uri=clinic[0], token=token, ca=folder / "ca.pem", timeout=30, **options
    )


# ------------------------------------------------------------------------------------------ a worker's process


def test_users_of_a_file_get_in_over_tls_and_nobody_else(clinic, folder, users):
    assert clinic[0].startswith("wss://")
    planrt.TorchHook(torch)
    with connect(clinic, folder, users[1]) as ann, connect(clinic, folder, OLD) as ben:
        x = torch.ones(2).tag("#private").send(ann, allowed_users=["ann"])
        ann.objects_count()
        (found,) = ben.search("#private")
        with pytest.raises(GetNotPermittedError, match="ann may get it"):
            (found * 2).get()
        assert (x * 2).get().tolist() == [2, 2]
    with pytest.raises(HandshakeError, match="users only"):
        connect(clinic, folder)
    with pytest.raises(HandshakeError, match="none of this worker's users"):
        connect(clinic, folder, "a token of somebody else")


def test_no_secret_is_in_a_process_list_or_an_environment(clinic, users):
    process = psutil.Process(clinic[1])
    seen = " ".join([*process.cmdline(), *process.environ().values()])
    assert users[1] not in seen
    assert OLD not in seen


def test_an_older_clients_token_is_refused_by_name(clinic, folder, monkeypatch):
    from planrt.workers.client.session import ClientSession

    def hello(self, token="", binding=None, **options):
        return self.request(m.Hello(self.id, own_versions(), token))

    monkeypatch.setattr(ClientSession, "hello", hello)
    with pytest.raises(HandshakeError, match="sent in clear") as caught:
        connect(clinic, folder, OLD)
    assert OLD not in str(caught.value)


# ------------------------------------------------------------------------------------------------- planrt users


def test_a_token_is_shown_once_and_its_file_holds_none(tmp_path):
    path = tmp_path / "users.txt"
    code, token, _ = planrt_says("users", "add", "ann", "--users", str(path))
    assert code == 0
    assert len(token.strip()) >= 32  # 192 bits
    assert token.strip() not in path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    out = tmp_path / "ben.token"
    assert planrt_says("users", "add", "ben", "--users", str(path), "--out", str(out))[0] == 0
    assert stat.S_IMODE(out.stat().st_mode) == 0o600
    assert planrt_says("users", "list", "--users", str(path))[1].split() == ["ann", "ben"]
    assert planrt_says("users", "remove", "ann", "--users", str(path))[0] == 0
    assert planrt_says("users", "list", "--users", str(path))[1].split() == ["ben"]


def test_tokens_in_a_file_become_what_checks_them(tmp_path, capsys):
    path = tmp_path / "users.txt"
    path.write_text(f"# ours\nann: {OLD}\n")
    path.chmod(0o600)
    assert "planrt users convert" in planrt_says("users", "list", "--users", str(path))[1]
    assert users_file.read(str(path)).users == {"ann": OLD}
    serve._notice_tokens(str(path))
    said = capsys.readouterr().err
    assert f"planrt users convert --users {path}" in said
    assert OLD not in said
    assert planrt_says("users", "convert", "--users", str(path))[0] == 0
    text = path.read_text()
    assert text.startswith("# ours\nann: SCRAM-SHA-256$")
    assert OLD not in text
    serve._notice_tokens(str(path))
    assert not capsys.readouterr().err
    assert planrt_says("users", "convert", "--users", str(path))[0] == 2


def test_users_commands_wrongly(tmp_path):
    path, shared = tmp_path / "users.txt", tmp_path / "shared.txt"
    assert planrt_says("users", "add", "ann", "--users", str(path))[0] == 0
    before = path.read_text()
    shared.write_text(before)
    shared.chmod(0o640)
    for words, says, given in (
        (("add", "ann"), "has a user 'ann'", ""),
        (("add", "a:b"), "no name of a user", ""),
        (("add", ""), "no name of a user", ""),
        (("add", "#x"), "no name of a user", ""),
        (("add", "ben", "--token-stdin"), "easy to guess", "short\n"),
        (("add", "ben", "--token-stdin"), "easy to guess", ""),
        (("add", "ben", "--token-stdin", "--out", str(tmp_path / "t")), "--out is for a new token", "x" * 20),
        (("add", "ann", "--out", str(tmp_path / "t")), "has a user 'ann'", ""),
        (("add", "ben", "--out", str(path)), "is there already", ""),
        (("add", "ben", "--out", str(tmp_path / "no" / "t")), "cannot be written", ""),
        (("remove", "carl"), "no user 'carl'", ""),
        (("list", "--users", str(tmp_path / "none")), "cannot be read", ""),
        (("list", "--users", str(shared)), f"chmod 600 {shared}", ""),
        (("add", "ben", "--users", str(shared)), f"chmod 600 {shared}", ""),
    ):
        users = () if "--users" in words else ("--users", str(path))
        code, _, err = planrt_says("users", *words, *users, stdin=given)
        assert code == 2, words
        assert says in err
        assert len(err.strip().splitlines()) == 1
    assert path.read_text() == before
    assert not (tmp_path / "t").exists()
    assert not list(tmp_path.glob(".*"))


# ---------------------------------------------------------------------------------------- wrong before anything starts


def test_a_worker_does_not_start_with_what_is_wrong(tmp_path, folder, authority, capsys):
    other = trustme.CA().issue_cert("localhost")
    other.private_key_pem.write_to_path(tmp_path / "other.pem")
    shared, weak, bad = tmp_path / "shared.txt", tmp_path / "weak.txt", tmp_path / "bad.txt"
    for path, text, mode in (
        (shared, f"ann: {OLD}", 0o644), (weak, "ann: a", 0o600), (bad, f"ann: {OLD}\nann: SCRAM-SHA-256$x", 0o600),
    ):  # fmt: skip
        path.write_text(f"{text}\n")
        path.chmod(mode)
    pair = ["--tls-cert", folder / "cert.pem", "--tls-key", folder / "key.pem"]
    for options, says in (
        (["--users", shared], f"chmod 600 {shared}"),
        (["--users", weak], "line 1: the token of user 'ann' is easy to guess"),
        (["--users", bad], "line 2"),
        (["--tls-cert", folder / "cert.pem"], "both"),
        (["--tls-cert", folder / "cert.pem", "--tls-key", tmp_path / "other.pem"], "do not belong together"),
        ([*pair, "--tls-client-ca", weak], "client_ca"),
        ([*pair, "--tls-client-ca", folder / "ca.pem", "--tls-deny", weak], "line 1"),
        (["--tls-client-ca", folder / "ca.pem"], "TLS"),
        (["--host", "0.0.0.0"], "--insecure"),
        (["--require-user"], "add --users"),
        (["--peer-ca", weak], "weak.txt"),
        (["--peer-ca", tmp_path / "none"], "none"),
        (["--peers", "bad"], "HOST:PORT"),
        (["--peer-token-file", shared], f"chmod 600 {shared}"),
        (["--access", tmp_path / "none"], "access"),
        (["--host", "0.0.0.0", *pair], "users"),
    ):
        code = serve.main(["--id", "bob", "--empty", "--port", "0", *map(str, options)])
        told = capsys.readouterr()
        assert code == 2, options
        assert says in told.err
        assert len(told.err.strip().splitlines()) == 1
        assert OLD not in told.err


@pytest.mark.parametrize("command", ["serve", "script"])
def test_other_machines_are_not_let_in_by_mistake(command):
    start = {
        "serve": ["-m", "planrt.fl.serve", "--id", "bob", "--empty", "--port", "0"],
        "script": ["scripts/start_websocket_servers.py", "--port", "20777"],
    }[command]
    ended = subprocess.run(
        [sys.executable, *start, "--host", "0.0.0.0"], capture_output=True, text=True, timeout=120, check=False,
        env={**os.environ, "PLANRT_DATA": ""},
    )  # fmt: skip
    assert ended.returncode in (1, 2)
    assert "--insecure" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_token_comes_from_a_file_or_the_environment(tmp_path, monkeypatch):
    from planrt.fl.mnist_async import parser
    from planrt.fl.runs.identity import Identity

    def identity(*words):
        return Identity.of(parser().parse_args([*words]))

    monkeypatch.delenv("PLANRT_TOKEN", raising=False)
    path = tmp_path / "token"
    path.write_text(f"{OLD}\n")
    path.chmod(0o600)
    assert identity().token == ""
    assert identity("--token-file", str(path)).token == OLD
    assert OLD not in repr(identity("--token-file", str(path)))
    monkeypatch.setenv("PLANRT_TOKEN", "of the environment")
    assert identity().token == "of the environment"
    path.chmod(0o644)
    assert planrt_says("run", "--token-file", str(path))[0] == 2
    assert re.search("chmod 600", planrt_says("run", "--token-file", str(path))[2])
    path.chmod(0o600)
    path.write_text("")
    assert "holds no token" in planrt_says("run", "--token-file", str(path))[2]

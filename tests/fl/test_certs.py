"""`planrt certs`: workers and users that know each other by certificates; and workers that dial workers."""

import contextlib
import stat
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import torch

import planrt
from planrt.errors import GetNotPermittedError, HandshakeError, OptionError, RemoteError
from planrt.fl.runs.children import ChildOptions, WorkerProcesses
from planrt.loop import run
from planrt.sharing.tensors.shared import share
from planrt.workers import VirtualWorker, WebsocketClientWorker, WebsocketServerWorker
from planrt.workers.shares.session import sharing_session
from planrt.workers.wire import messages as m
from planrt.workers.wire.messages import own_versions
from planrt.workers.wire.objects import new_id
from tests.fl.test_who_may_connect import planrt_says

NAMES = ("--worker", "alice", "--worker", "bob=localhost,127.0.0.1", "--user", "ann", "--user", "ben")
TOKENS = {"ann": "the long token of ann", "relay": "the long token of a worker"}


@pytest.fixture(scope="module", autouse=True)
def hook():
    return planrt.TorchHook(torch)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("federation") / "certs"
    code, out, _ = planrt_says("certs", "make", *NAMES, "--dir", str(path))
    assert code == 0
    assert "planrt serve --id alice --tls-cert" in out
    return path


def pair(folder, name):
    return {"cert": folder / f"{name}.pem", "key": folder / f"{name}-key.pem"}


def serving(folder, name, **options):
    shown = {f"{what}_path": path for what, path in pair(folder, name).items()}
    return WebsocketServerWorker(name, threads=1, **shown, **options)


@pytest.fixture
def federation(folder):
    """Connects to alice and bob, who know clients by certificates and nobody else."""
    with contextlib.ExitStack() as stack:
        known = {"client_ca": folder / "ca.pem", "peer_ca": folder / "ca.pem", "require_user": True}
        uris = {
            name: stack.enter_context(serving(folder, name, **known).running()) for name in ("alice", "bob")
        }

        def connect(name, user):
            shown = {"ca": folder / "ca.pem", **pair(folder, user)}
            return stack.enter_context(WebsocketClientWorker(name, uri=uris[name], auto_add=False, **shown))

        yield connect


# ---------------------------------------------------------------------------------------------- the command


def test_keys_are_for_their_owner_and_certificates_for_everybody(folder):
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
    assert {name for name, mode in modes.items() if mode == 0o600} == {
        name for name in modes if "-key" in name
    }
    assert len(modes) == 10
    for name in ("alice", "bob", "ann", "ben"):
        checked = subprocess.run(
            ["openssl", "verify", "-CAfile", folder / "ca.pem", "-purpose", "sslclient", folder / f"{name}.pem"],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert checked.returncode == 0, checked.stderr


def test_certs_commands_wrongly(folder, tmp_path):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    broken = tmp_path / "broken"
    assert planrt_says("certs", "make", "--user", "x", "--dir", str(broken))[0] == 0
    (broken / "ca-key.pem").write_text("nothing\n")
    for words, says in (
        (("make", "--dir", str(folder)), "name workers and users"),
        (("make", "--user", "ann", "--dir", str(folder)), "'ann' is taken"),
        (("make", "--user", "ca", "--dir", str(folder)), "'ca' is taken"),
        (("make", "--user", "x", "--worker", "x", "--dir", str(folder)), "'x' is taken"),
        (("make", "--user", "../x", "--dir", str(folder)), "no name here"),
        (("make", "--worker", "x=no host!", "--dir", str(folder)), "no host name"),
        (("make", "--worker", "x=", "--dir", str(folder)), "no host name"),
        (("make", "--user", "y", "--days", "0", "--dir", str(folder)), "at least 1|from 1"),
        (("make", "--user", "y", "--days", "9999", "--dir", str(folder)), "from 1 to 398"),
        (("renew", "carl", "--dir", str(folder)), "no certificate of 'carl'"),
        (("deny", "carl", "--dir", str(folder)), "no certificate of 'carl'"),
        (("list", "--dir", str(tmp_path)), "no authority"),
        (("make", "--user", "y", "--dir", str(broken)), "no private key"),
    ):
        code, _, err = planrt_says("certs", *words)
        assert code == 2, words
        assert any(one in err for one in says.split("|")), err
        assert len(err.strip().splitlines()) == 1
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_renewed_and_denied(folder, tmp_path):
    known = {"client_ca": folder / "ca.pem", "deny": tmp_path / "denied.txt"}
    (tmp_path / "denied.txt").write_text("")
    ben = {"ca": folder / "ca.pem", **pair(folder, "ben")}
    with serving(folder, "bob", **known).running() as uri:
        WebsocketClientWorker("bob", uri=uri, **ben).close()
        assert planrt_says("certs", "deny", "ben", "--dir", str(folder), "--list", str(known["deny"]))[0] == 0
        with pytest.raises(HandshakeError, match="takes this certificate no longer"):
            WebsocketClientWorker("bob", uri=uri, **ben)
        assert planrt_says("certs", "renew", "ben", "--dir", str(folder), "--days", "7")[0] == 0
        WebsocketClientWorker("bob", uri=uri, **ben).close()
    listed = planrt_says("certs", "list", "--dir", str(folder))[1].splitlines()
    assert [line.split()[:2] for line in listed] == [
        ["ca", "authority"], ["alice", "worker"], ["ann", "user"], ["ben", "user"], ["bob", "worker"],
    ]  # fmt: skip
    assert "6 days" in listed[3]


def test_the_commands_that_it_prints_serve_workers(folder, tmp_path):
    """As it prints them, but for the port, in a process of its own."""
    said = planrt_says("certs", "make", "--worker", "carl", "--user", "eve", "--dir", str(folder))[1]
    line = next(line for line in said.splitlines() if line.startswith("planrt serve"))
    words = line.split()[4:]
    with WorkerProcesses([ChildOptions("carl", options=("--empty", "--threads", "1", *words))]) as processes:
        ready = processes.wait_ready()["carl"]
        assert ready.uri.startswith("wss://")
        shown = {"ca": folder / "ca.pem", **pair(folder, "eve")}
        with WebsocketClientWorker("carl", uri=ready.uri, **shown) as carl:
            x = torch.ones(2).send(carl, allowed_users=["eve"])
            assert (x + 1).get().tolist() == [2, 2]
        with pytest.raises(HandshakeError):
            WebsocketClientWorker("carl", uri=ready.uri, ca=folder / "ca.pem")
    for path in folder.glob("*"):
        if path.name.startswith(("carl", "eve")):
            path.unlink()


# ---------------------------------------------------------------------------------------- workers dial workers


def test_workers_know_each_other_by_their_certificates(federation):
    alice, bob = federation("alice", "ann"), federation("bob", "ann")
    moved = torch.tensor([1.0, 2.0]).send(alice).move(bob)
    assert (moved * 2).get().tolist() == [2, 4]
    chained = torch.tensor([1.0]).send(bob).send(alice)
    assert (chained + 1).get().get().tolist() == [2]


def test_workers_that_are_known_by_certificates_compute_together_for_their_clients(federation, folder):
    """carl takes anybody, and has a certificate: alice and bob, who take nobody without one, let him in for ann
    alone."""
    pem = {f"{what}_path": path for what, path in pair(folder, "bob").items()}
    with (
        WebsocketServerWorker("carl", threads=1, peer_ca=folder / "ca.pem", **pem).running() as carl_at,
        WebsocketClientWorker("carl", uri=carl_at, ca=folder / "ca.pem", auto_add=False) as carl,
    ):
        alice, bob = federation("alice", "ann"), federation("bob", "ann")
        x = share(sharing_session([alice, bob], carl), torch.tensor([1.0, 2.0]))
        assert torch.allclose((x * x).get(), torch.tensor([1.0, 4.0]), atol=1e-3)
        inc = planrt.func2plan(lambda x: x + 1, args_shape=[(-1,)])
        there = planrt.Protocol([("alice", inc), ("bob", inc)]).deploy(alice, bob).send(carl)
        assert there.run(torch.ones(2)).get().get().tolist() == [3, 3]
        with WebsocketClientWorker("carl", uri=carl_at, ca=folder / "ca.pem", auto_add=False) as another:
            theirs = planrt.Protocol([("bob", inc)]).send(another)
            address = m.PeerAddress("bob", bob.link_address)
            another.workplace.post(m.DeployProtocol(theirs.id_at_location, {"bob": address}))
            y = torch.ones(2).send(another)
            body = m.RunProtocol(theirs.id_at_location, 1, [y.id_at_location], [new_id()], False, 0)
            with pytest.raises(RemoteError, match="takes users only.* acts for nobody"):
                run(another.workplace.ask(m.Message, body), instead="await")


def test_a_worker_has_no_rights_of_its_own_at_another(federation):
    """What alice's certificate would open to alice, none of her clients reads through her."""
    bob, alice = federation("bob", "ann"), federation("alice", "ben")
    named = ["planrt:worker:alice", "ben"]
    torch.tensor([1.0, -2.0]).tag("#named").send(bob, allowed_users=named)
    (found,) = bob.search("#named")
    chained = found.send(alice)
    for ask in (lambda: chained[chained > 0], lambda: chained.nonzero()):  # whose shapes tell of values
        with pytest.raises(GetNotPermittedError):
            ask()


def test_a_worker_proves_a_token_to_others_and_is_nobody_there():
    with (
        WebsocketServerWorker("bob", threads=1, users=TOKENS, require_user=True).running() as bob_at,
        WebsocketServerWorker("alice", threads=1, peer_token=TOKENS["relay"]).running() as alice_at,
        WebsocketServerWorker("carl", threads=1).running() as carl_at,
        WebsocketClientWorker("bob", uri=bob_at, token=TOKENS["ann"]) as bob,
        WebsocketClientWorker("alice", uri=alice_at) as alice,
        WebsocketClientWorker("carl", uri=carl_at) as carl,
    ):
        moved = torch.tensor([1.0]).send(alice).move(bob)
        assert (moved + 1).get().tolist() == [2]
        moved = torch.tensor([1.0]).send(carl).move(bob)  # carl shows nothing there, but ann's ticket
        assert (moved + 1).get().tolist() == [2]
        x = torch.tensor([1.0]).send(carl)
        asking = m.Move(x.id_at_location, m.PeerAddress("bob", bob_at), 1, "a token of 16", keep=True)
        carl.workplace.connection.post(m.ActFor(asking.peer, "put", "0" * 32, "0" * 64))
        with pytest.raises(RemoteError, match="no ticket of this worker's"):
            run(carl.workplace.ask(m.Done, asking), instead="await")
    with (
        WebsocketServerWorker("bob", threads=1, users=TOKENS, require_user=True).running() as bob_at,
        WebsocketServerWorker("alice", threads=1, peer_token=TOKENS["relay"]).running() as alice_at,
        WebsocketServerWorker("carl", threads=1).running() as carl_at,
        WebsocketClientWorker("bob", uri=bob_at, token=TOKENS["ann"]) as bob,
        WebsocketClientWorker("alice", uri=alice_at) as alice,
        WebsocketClientWorker("carl", uri=carl_at) as carl,
    ):
        bob.workplace.connection.session.versions = own_versions()  # as of a worker that gives no tickets
        for worker in (alice, carl):  # whether it has a token there or not
            with pytest.raises(RemoteError, match="users only"):
                torch.tensor([1.0]).send(worker).move(bob)
    with (  # where others than users get in, too, that one is nobody
        WebsocketServerWorker("bob", threads=1, users=TOKENS).running() as bob_at,
        WebsocketServerWorker("alice", threads=1, peer_token=TOKENS["relay"]).running() as alice_at,
        WebsocketClientWorker("bob", uri=bob_at, token=TOKENS["ann"]) as bob,
        WebsocketClientWorker("alice", uri=alice_at) as alice,
    ):
        bob.workplace.connection.session.versions = own_versions()
        moved = torch.tensor([1.0]).send(alice).move(bob)
        assert (moved + 1).get().tolist() == [2]
        torch.tensor([5.0, -1.0]).tag("#relays").send(bob, allowed_users=["relay"])
        chained = bob.search("#relays")[0].send(alice)
        with pytest.raises(GetNotPermittedError):
            chained[chained > 0]


def test_a_certificate_for_servers_alone_is_not_shown_to_other_workers(tmp_path):
    """As public authorities issue them: the other worker, which asks for none, is reached all the same."""
    authority = tmp_path / "ca.pem"
    pair = {"key_path": tmp_path / "key.pem", "cert_path": tmp_path / "cert.pem"}
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
         "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1",
         "-addext", "extendedKeyUsage=serverAuth", "-keyout", pair["key_path"], "-out", pair["cert_path"]],
        check=True, capture_output=True,
    )  # fmt: skip
    authority.write_bytes(pair["cert_path"].read_bytes())
    with (
        WebsocketServerWorker("bob", threads=1, **pair).running() as bob_at,
        WebsocketServerWorker("alice", threads=1, peer_ca=authority, **pair).running() as alice_at,
        WebsocketClientWorker("bob", uri=bob_at, ca=authority) as bob,
        WebsocketClientWorker("alice", uri=alice_at, ca=authority) as alice,
    ):
        assert torch.tensor([1.0]).send(alice).move(bob).get().tolist() == [1]


PEERS = {
    "none": ([], "127.0.0.1:{port}"),
    "another port": (["127.0.0.1:1", "localhost:*"], "127.0.0.1:{port}"),
    "another host": (["10.0.0.5:{port}"], "127.0.0.1:{port}"),
}


@pytest.mark.parametrize("peers", PEERS)
def test_a_worker_dials_what_its_owner_listed(peers):
    listed, shown = PEERS[peers]
    with (
        WebsocketServerWorker("bob", threads=1).running() as bob_at,
        WebsocketClientWorker("bob", uri=bob_at) as bob,
    ):
        port = bob_at.rpartition(":")[2]
        for allowed in (listed, ["127.0.0.1:*"], [f"127.0.0.1:{port}"], None):
            given = None if allowed is None else [text.format(port=port) for text in allowed]
            with (
                WebsocketServerWorker("alice", threads=1, peers=given).running() as alice_at,
                WebsocketClientWorker("alice", uri=alice_at) as alice,
            ):
                x = torch.tensor([1.0]).send(alice)
                if allowed is listed:
                    with pytest.raises(
                        RemoteError, match=f"does not dial {shown.format(port=port)}.*--peers"
                    ):
                        x.move(bob)
                    assert x.get().tolist() == [1]  # it is where it was
                else:
                    assert x.move(bob).get().tolist() == [1]


@pytest.mark.parametrize(
    "address",
    ["ws://10.0.0.1:80", "ws://worker.example:80", "ws://127.0.0.1:80@10.0.0.1:80", "ws://[::ffff:10.0.0.1]:80", "ws://0.0.0.0:1",
     "ws://127.0.0.1.example:80", "ws://2130706433:80", "ws://[::]:80", "wss://10.0.0.1:443", "ws://"],
)  # fmt: skip
def test_by_default_it_dials_this_machine_only(address):
    """Whatever a client writes: nothing is dialled, and the client is told at once."""
    from planrt.errors import ConnectError
    from planrt.workers.serving.dialling import Dialling
    from planrt.workers.wire.messages import PeerAddress

    dialling = Dialling()
    with pytest.raises(ConnectError, match="--peers"):
        dialling._check("alice", PeerAddress("bob", address))


@pytest.mark.parametrize("address", ["ws://127.0.0.1:99999", "ws://127.0.0.1:x", "ws://[::1:80"])
def test_what_is_no_address_is_told_as_such(address):
    from planrt.errors import ConnectError
    from planrt.workers.serving.dialling import Dialling
    from planrt.workers.wire.messages import PeerAddress

    for peers in (None, ["10.0.0.5:80"]):
        with pytest.raises(ConnectError, match="is no worker address: write ws://HOST:PORT"):
            Dialling(peers)._check("alice", PeerAddress("bob", address))


@pytest.mark.parametrize(
    "bad", ["10.0.0.5", "10.0.0.5:", ":80", "10.0.0.5:x", "ws://10.0.0.5:80", "a b:1x", 3, ""]
)
def test_peers_that_are_no_addresses(bad):
    with pytest.raises(OptionError, match="peers is a list|no address of a worker"):
        WebsocketServerWorker("alice", peers=[bad])
    with pytest.raises(OptionError, match="peers is a list"):
        WebsocketServerWorker("alice", peers="10.0.0.5:80")


def test_no_redirection_is_followed():
    """A server at an allowed address that sends whoever dials it to another one."""
    with WebsocketServerWorker("bob", threads=1).running() as elsewhere:

        class Redirect(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                self.send_response(302)
                self.send_header("Location", elsewhere)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *given):
                pass

        with HTTPServer(("127.0.0.1", 0), Redirect) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            with pytest.raises(HandshakeError, match="302"):
                WebsocketClientWorker("bob", uri=f"ws://127.0.0.1:{server.server_port}", timeout=20)
            server.shutdown()


def test_a_virtual_worker_dials_for_its_own_program():
    with (
        WebsocketServerWorker("bob", threads=1, users=TOKENS).running() as uri,
        WebsocketClientWorker("bob", uri=uri, token=TOKENS["ann"]) as bob,
        VirtualWorker("virtual", auto_add=False) as virtual,
    ):
        assert torch.tensor([1.0]).send(virtual).move(bob).get().tolist() == [1]

"""TLS at both ends, over real sockets: who gets in, as whom, and what is said to everybody else."""

import contextlib
import datetime
import logging
import socket
import ssl
import subprocess
from urllib.parse import urlsplit

import pytest
import torch
import trustme

import planrt
from planrt.errors import HandshakeError, OptionError, TransportError
from planrt.serde.frames import Limits
from planrt.workers import VirtualWorker, WebsocketClientWorker, WebsocketServerWorker
from planrt.workers.transport import places, websocket
from planrt.workers.transport.tls import USER, WORKER, user_of

TOKEN = "the long token of ann"
TOKENS = {"ann": TOKEN, "ben": "the long token of ben"}


@pytest.fixture(scope="module", autouse=True)
def hook():
    return planrt.TorchHook(torch)


class Files:
    """Certificates of one authority, and of another one, in files."""

    def __init__(self, folder):
        self.folder = folder
        self.authority, self.other = trustme.CA(), trustme.CA()
        self.ca = self._write("ca", self.authority.cert_pem)
        self.other_ca = self._write("other-ca", self.other.cert_pem)

    def _write(self, name, *blobs):
        path = self.folder / f"{name}.pem"
        path.write_bytes(b"".join(blob.bytes() for blob in blobs))
        path.chmod(0o600)
        return path

    def pair(self, name, *names, authority=None, **options):
        made = (authority or self.authority).issue_cert(*names, **options)
        return self._write(f"{name}", *made.cert_chain_pems), self._write(f"{name}-key", made.private_key_pem)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return Files(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="module")
def server_pair(files):
    return files.pair("server", "localhost", "127.0.0.1")


@pytest.fixture
def serve(server_pair):
    with contextlib.ExitStack() as stack:

        def start(**options):
            cert, key = server_pair
            options = {"cert_path": cert, "key_path": key, "threads": 1, **options}
            return stack.enter_context(WebsocketServerWorker("bob", **options).running())

        yield start


@contextlib.contextmanager
def client(uri, **options):
    with WebsocketClientWorker("bob", uri=uri, timeout=20, **options) as worker:
        yield worker


def works(worker):
    x = torch.arange(300_000.0)
    return torch.equal((x.send(worker) * 2).get(), x * 2)


# --------------------------------------------------------------------------------------------------- TLS


def test_work_over_tls_with_and_without_a_token(serve, files):
    uri = serve(users=TOKENS)
    with client(uri, ca=files.ca) as nobody, client(uri, ca=files.ca, token=TOKEN) as ann:
        assert works(nobody)
        assert works(ann)
        hers = torch.tensor([1.0]).tag("#hers").send(ann, allowed_users=["ann"])
        assert hers.shape == (1,)
        assert ann.objects_count() > 0  # it has arrived: what another client asks does not wait for it
        with pytest.raises(planrt.errors.GetNotPermittedError):
            nobody.search("#hers")[0].get()
        assert ann.search("#hers")[0].get().tolist() == [1]
        ann.close()
        assert works(ann.connect())
    with pytest.raises(HandshakeError, match="none of this worker's users"):
        WebsocketClientWorker("bob", uri=uri, ca=files.ca, token="some other token of nobody")


def test_a_token_is_bound_to_the_certificate_that_its_client_saw(serve, files, monkeypatch):
    """Somebody in between with a certificate that the client trusts passes the proof on."""
    from planrt.workers.transport import websocket

    uri = serve(users=TOKENS)
    monkeypatch.setattr(websocket, "fingerprint", lambda certificate: b"x" * 32)  # as if that were another's
    with pytest.raises(HandshakeError, match="in between"):
        WebsocketClientWorker("bob", uri=uri, ca=files.ca, token=TOKEN)


def test_certificates_are_checked_unless_nobody_could(serve, files):
    uri = serve()
    for wrong, says in (
        ({}, "not trusted.*ca="),
        ({"ca": files.other_ca}, "not trusted.*ca="),
    ):
        with pytest.raises(HandshakeError, match=says):
            WebsocketClientWorker("bob", uri=uri, **wrong)
    elsewhere = serve(
        **dict(zip(("cert_path", "key_path"), files.pair("named", "elsewhere.example"), strict=True))
    )
    with pytest.raises(HandshakeError, match="a name or an address that its certificate is for"):
        WebsocketClientWorker("bob", uri=elsewhere, ca=files.ca)


def test_no_side_takes_an_old_version(serve, files):
    import socket
    import ssl
    import warnings

    uri = serve()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(files.ca)
    port = int(uri.rpartition(":")[2])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        context.minimum_version = ssl.TLSVersion.TLSv1
        context.maximum_version = ssl.TLSVersion.TLSv1_1
    with pytest.raises(ssl.SSLError), socket.create_connection(("127.0.0.1", port)) as opened:
        context.wrap_socket(opened, server_hostname="localhost")
    context = ssl.create_default_context(cafile=str(files.ca))
    with (
        socket.create_connection(("127.0.0.1", port)) as opened,
        context.wrap_socket(opened, server_hostname="localhost") as wrapped,
    ):
        assert wrapped.version() == "TLSv1.3"


def test_tls_to_a_plain_server_and_the_reverse(serve, files):
    with (
        WebsocketServerWorker("bob", threads=1).running() as plain,
        pytest.raises(HandshakeError, match="does not speak TLS"),
    ):
        WebsocketClientWorker("bob", uri=plain.replace("ws:", "wss:"), ca=files.ca, timeout=10)
    with pytest.raises(HandshakeError, match="wss://"):
        WebsocketClientWorker("bob", uri=serve().replace("wss:", "ws:"), timeout=10)
    with pytest.raises(OptionError, match="cert= is for TLS"):
        WebsocketClientWorker("bob", uri="ws://127.0.0.1:1", cert="cert.pem", key="key.pem")


# -------------------------------------------------------------------------------------- certificates of clients


def test_a_certificate_says_whose_it_is(serve, files):
    uri = serve(client_ca=files.ca, require_user=True)
    cert, key = files.pair("ann", "ann@example.org", common_name="ann")
    with client(uri, ca=files.ca, cert=cert, key=key) as ann:
        assert works(ann)
        x = torch.tensor([1.0]).send(ann, allowed_users=["ann"])
        assert x.get().tolist() == [1]
        y = torch.tensor([1.0]).send(ann, allowed_users=["ben"])
        with pytest.raises(planrt.errors.GetNotPermittedError):
            y.get()


def test_who_shows_no_certificate_or_anothers_does_not_get_in(serve, files):
    uri = serve(client_ca=files.ca)
    with pytest.raises(HandshakeError, match="knows its clients by certificates.*cert=.*key="):
        WebsocketClientWorker("bob", uri=uri, ca=files.ca)
    cert, key = files.pair("stranger", "x@example.org", authority=files.other)
    with pytest.raises(HandshakeError, match="does not take your certificate"):
        WebsocketClientWorker("bob", uri=uri, ca=files.ca, cert=cert, key=key)


def test_a_denied_certificate_gets_in_no_longer(serve, files, tmp_path):
    deny = tmp_path / "denied.txt"
    deny.write_text("# nobody yet\n")
    uri = serve(client_ca=files.ca, deny=deny)
    cert, key = files.pair("leaver", "leaver@example.org", common_name="leaver")
    with client(uri, ca=files.ca, cert=cert, key=key) as leaver:
        assert works(leaver)
    shown = subprocess.run(
        ["openssl", "x509", "-in", cert, "-noout", "-fingerprint", "-sha256"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    deny.write_text(f"{shown.partition('=')[2]}")
    with pytest.raises(HandshakeError, match="takes this certificate no longer"):
        WebsocketClientWorker("bob", uri=uri, ca=files.ca, cert=cert, key=key)
    deny.unlink()  # a list that cannot be read lets nobody in
    with pytest.raises(HandshakeError, match="takes this certificate no longer"):
        WebsocketClientWorker("bob", uri=uri, ca=files.ca, cert=cert, key=key)


@pytest.mark.parametrize(
    ("names", "user"),
    [
        ({"subject": ((("commonName", "ann"),),)}, "ann"),
        (
            {"subject": ((("commonName", "x"),),), "subjectAltName": (("DNS", "h"), ("URI", f"{USER}ann"))},
            "ann",
        ),
        (
            {"subject": ((("commonName", "x"),),), "subjectAltName": (("URI", f"{WORKER}bob"),)},
            f"{WORKER}bob",
        ),
        ({"subject": ((("commonName", f"{WORKER}bob"),),)}, None),
        ({"subject": ((("organizationName", "ann"),),)}, None),
        ({}, None),
    ],
)
def test_names_in_certificates(names, user):
    assert user_of(names) == user


# ---------------------------------------------------------------------------------- wrong before anything starts


def expired(files, name, **options):
    past = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=1)
    return files.pair(
        name, "localhost", not_before=past - datetime.timedelta(days=9), not_after=past, **options
    )


def test_files_that_cannot_be_used(files, server_pair, tmp_path):
    cert, key = server_pair
    _, other_key = files.pair("second", "localhost")
    empty = tmp_path / "empty.pem"
    empty.write_text("nothing\n")
    old_cert, old_key = expired(files, "old")
    (tmp_path / "deny.txt").write_text("zz\n")
    for wrong, says in (
        ({"cert_path": cert}, "both a certificate and its private key"),
        ({"cert_path": cert, "key_path": tmp_path / "none"}, "none.*cannot be read"),
        ({"cert_path": cert, "key_path": other_key}, "do not belong together"),
        ({"cert_path": empty, "key_path": key}, "no certificate and its key"),
        ({"cert_path": cert, "key_path": empty}, "no certificate and its key"),
        ({"cert_path": old_cert, "key_path": old_key}, "old.pem.*expired"),
        ({"client_ca": files.ca}, "are for TLS"),
        ({"cert_path": cert, "key_path": key, "client_ca": empty}, "client_ca=.*empty.pem"),
        ({"cert_path": cert, "key_path": key, "deny": empty}, "name their authority"),
        (
            {"cert_path": cert, "key_path": key, "client_ca": files.ca, "deny": tmp_path / "deny.txt"},
            "deny.txt, line 1",
        ),
        (
            {"cert_path": cert, "key_path": key, "client_ca": files.ca, "deny": tmp_path / "none"},
            "none cannot be read",
        ),
        ({"users": {"ann": "short"}}, "easy to guess"),
        ({"users": {"ann": "a" * 40}}, "easy to guess"),
        ({"users": {"ann": "SCRAM-SHA-256$1"}}, "cut or changed"),
    ):
        with pytest.raises(OptionError, match=says) as caught:
            WebsocketServerWorker("bob", **wrong)
        assert "\n" not in str(caught.value)
    for wrong, says in (
        ({"ca": empty}, "ca=.*empty.pem"),
        ({"ca": files.ca, "cert": cert}, "both cert= and key="),
        ({"ca": files.ca, "cert": cert, "key": other_key}, "do not belong together"),
        ({"ca": files.ca, "cert": old_cert, "key": old_key}, "old.pem.*expired"),
    ):
        with pytest.raises(OptionError, match=says):
            WebsocketClientWorker("bob", uri="wss://localhost:1", **wrong)


def test_an_expired_servers_certificate(serve, files, monkeypatch):
    from planrt.workers.transport import tls

    monkeypatch.setattr(
        tls, "_check_own", lambda *given, **options: None
    )  # it was good when the server started
    old_cert, old_key = expired(files, "old-server")
    uri = serve(cert_path=old_cert, key_path=old_key)
    with pytest.raises(HandshakeError, match="expired.*renew"):
        WebsocketClientWorker("bob", uri=uri.replace("127.0.0.1", "localhost"), ca=files.ca)


OPEN = ["0.0.0.0", "", "::", "192.0.2.1", "worker.example", "010.0.0.1"]


@pytest.mark.parametrize("host", OPEN)
def test_other_machines_are_let_in_over_tls_and_known_only(host, files, server_pair):
    cert, key = server_pair
    secure = {"cert_path": cert, "key_path": key}
    for options, says in (
        ({}, "a certificate .*users"),
        ({"users": TOKENS}, "a certificate"),
        (secure, "users"),
    ):
        with pytest.raises(OptionError, match=says) as caught:
            WebsocketServerWorker("bob", host, **options)
        assert "--insecure" in str(caught.value)
        WebsocketServerWorker("bob", host, **options, insecure=True)
    WebsocketServerWorker("bob", host, **secure, users=TOKENS)
    WebsocketServerWorker("bob", host, **secure, client_ca=files.ca)
    with pytest.raises(OptionError, match="insecure"):
        WebsocketServerWorker("bob", uri=f"ws://[{host}]:1" if ":" in host else f"ws://{host or '0.0.0.0'}:1")


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.3.2.1"])
def test_this_machine_needs_none_of_it(host):
    WebsocketServerWorker("bob", host)


# --------------------------------------------------------------------------------------------- secrets and guesses


def test_secrets_are_shown_nowhere(serve, files, caplog):
    caplog.set_level(logging.DEBUG)
    uri = serve(users=TOKENS)
    with client(uri, ca=files.ca, token=TOKEN, log_msgs=True) as ann:
        shown = [repr(ann), str(ann), repr(ann._opening), repr(ann.msg_history), repr(vars(ann))]
    virtual = VirtualWorker("virtual-bob", users=TOKENS, token=TOKEN)
    shown += [repr(virtual), repr(virtual.connect_as(TOKENS["ben"]))]
    with pytest.raises(HandshakeError) as caught:
        WebsocketClientWorker("bob", uri=uri, ca=files.ca, token="a secret that is wrong")
    shown += [str(caught.value), caplog.text]
    virtual.close()
    for secret in (*TOKENS.values(), "a secret that is wrong"):
        assert not [text for text in shown if secret in text]


def test_who_guesses_is_logged_and_waits(serve, files, caplog):
    uri = serve(users=TOKENS)
    for number in range(5):
        with pytest.raises(HandshakeError, match="none of this worker's users"):
            WebsocketClientWorker(
                "bob", uri=uri, ca=files.ca, token=f"a wrong token, number {number}", timeout=30
            )
    waits = [record.next_one_waits for record in caplog.records if record.getMessage() == "wrong_proof"]
    assert len(waits) == 5
    assert waits == sorted(waits)
    assert waits[0] == 0 < waits[-1]
    with client(uri, ca=files.ca, token=TOKEN) as ann:  # waits its turn, and gets in
        assert works(ann)


def test_a_server_that_skips_the_proof_is_no_worker_of_ours():
    """Whoever listens there takes the token's user for granted, and asks for no proof."""
    with WebsocketServerWorker("bob", threads=1).running() as uri:
        from planrt.workers.machine import handshakes

        patched = pytest.MonkeyPatch()
        patched.setattr(
            handshakes.Handshakes,
            "hello",
            lambda self, connection, hello: handshakes.Opened(self._session(connection, hello, "ann")),
        )
        try:
            with pytest.raises(HandshakeError, match="did not prove that it knows the token"):
                WebsocketClientWorker("bob", uri=uri, token=TOKEN)
        finally:
            patched.undo()
    with pytest.raises(TransportError):
        WebsocketClientWorker("bob", uri=uri, timeout=2)


# ------------------------------------------------------------------------ before the handshake is over


def client_hello():
    """The first bytes of a client."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    context = ssl.create_default_context()
    with contextlib.suppress(ssl.SSLWantReadError):
        context.wrap_bio(incoming, outgoing, server_hostname="localhost").do_handshake()
    return outgoing.read()


def place(uri):
    parts = urlsplit(uri)
    return parts.hostname, parts.port


def gets_in(opened):
    """Whether the worker answers the first bytes of a handshake."""
    opened.settimeout(60)
    try:
        opened.sendall(client_hello())
        return opened.recv(1) != b""
    except ConnectionError:
        return False


def was_cut(opened, seconds):
    opened.settimeout(seconds)
    try:
        return opened.recv(1) == b""
    except ConnectionResetError:
        return True
    except (TimeoutError, BlockingIOError):
        return False


@pytest.mark.parametrize("said", ["nothing", "half a hello", "no hello"])
def test_who_does_not_finish_the_handshake_is_cut_off(serve, files, monkeypatch, said):
    made, of_websocket = [], websocket.Handshakes
    monkeypatch.setattr(websocket, "Handshakes", lambda *about: made.append(of_websocket(*about)) or made[-1])
    uri = serve()
    hello = client_hello()
    first = {"nothing": b"", "half a hello": hello[: len(hello) // 2], "no hello": b"GET / HTTP/1.1\r\n\r\n"}
    with client(uri, ca=files.ca) as honest, contextlib.ExitStack() as stack:
        made[0]._seconds = 0.5  # from now on: who is honest may be slow
        opened = stack.enter_context(socket.create_connection(place(uri)))
        opened.sendall(first[said])
        if said == "no hello":  # who speaks no TLS is told so by an alert
            opened.settimeout(30)
            with contextlib.suppress(ConnectionResetError):
                while opened.recv(100):
                    pass
        else:
            assert was_cut(opened, 30)
        assert works(honest)


def test_handshakes_have_the_places_of_their_address(serve, files, monkeypatch):
    """From the first moment on: each takes a file of the process. Others get in meanwhile."""
    monkeypatch.setattr(places, "caller", str)  # else all addresses of this machine are one
    monkeypatch.setattr(websocket, "_TLS_SECONDS", 600.0)
    uri = serve(limits=Limits(connections=2))
    there, half = place(uri), client_hello()[:20]
    with contextlib.ExitStack() as stack:

        def reach(host):
            return stack.enter_context(socket.create_connection(there, timeout=5, source_address=(host, 0)))

        silent = [reach("127.0.0.2") for _ in range(66)]
        for one in silent[::2]:
            one.sendall(half)
        assert was_cut(reach("127.0.0.2"), 60)
        assert not any(was_cut(one, 0) for one in silent)
        with client(uri, ca=files.ca) as honest:  # from 127.0.0.1
            assert works(honest)
        for one in silent[:10]:
            one.close()
        assert any(gets_in(reach("127.0.0.2")) for _ in range(200))  # they have given their places back


def test_places_are_given_back_however_a_handshake_ends(serve, files):
    uri = serve(limits=Limits(connections=2))
    for number in range(150):  # more than an address has
        with socket.create_connection(place(uri), timeout=5) as opened:
            if number % 2:
                opened.sendall(b"no hello at all")
    with contextlib.ExitStack() as stack:
        for _ in range(2):
            assert works(stack.enter_context(client(uri, ca=files.ca)))


def test_a_server_that_stops_waits_for_no_handshake(server_pair):
    cert, key = server_pair
    with contextlib.ExitStack() as stack:
        with WebsocketServerWorker("bob", cert_path=cert, key_path=key, threads=1).running() as uri:
            silent = stack.enter_context(socket.create_connection(place(uri), timeout=5))
        assert was_cut(silent, 60)

"""Who may open a connection: programs, and no web page that the worker's owner did not name."""

from __future__ import annotations

import base64
import http.server
import os
import shutil
import socket
import subprocess
import threading
from urllib.parse import urlsplit

import pytest
import torch

import planrt
from planrt.errors import HandshakeError, OptionError
from planrt.workers import WebsocketClientWorker, WebsocketServerWorker
from planrt.workers.transport.callers import Callers


def answer(uri, *lines):
    """The status line of the answer to an opening handshake with these header lines."""
    address = urlsplit(uri)
    key = base64.b64encode(os.urandom(16)).decode()
    head = ["GET / HTTP/1.1", "Upgrade: websocket", "Connection: Upgrade", f"Sec-WebSocket-Key: {key}"]
    head += ["Sec-WebSocket-Version: 13", *lines, "", ""]
    with socket.create_connection((address.hostname, address.port), timeout=30) as opened:
        opened.sendall("\r\n".join(head).encode())
        return opened.recv(1000).decode().partition("\r\n")[0]


@pytest.fixture
def uri():
    server = WebsocketServerWorker(
        id="bob", threads=1, origins=["https://own.example"], hosts=["bob.example"]
    )
    with server.running() as uri:
        yield uri


LOCAL = "Host: 127.0.0.1"
REFUSED = {
    "a page": [LOCAL, "Origin: https://evil.example"],
    "a page without an origin of its own": [LOCAL, "Origin: null"],
    "a page of this machine": [LOCAL, "Origin: http://127.0.0.1"],
    "an allowed page without TLS": [LOCAL, "Origin: http://own.example"],
    "an allowed page with a port": [LOCAL, "Origin: https://own.example:8443"],
    "two origins": [LOCAL, "Origin: https://own.example", "Origin: https://evil.example"],
    "an empty origin": [LOCAL, "Origin: "],
    "another name": ["Host: evil.example"],
    "another name with a port": ["Host: evil.example:8777"],
    "a name that looks like an address": ["Host: 127.0.0.1.evil.example"],
    "an allowed name at the end": ["Host: evil-bob.example"],
    "no name": ["Host: "],
    "two names": [LOCAL, "Host: evil.example"],
}
WELCOME = {
    "a program": [LOCAL],
    "a program on a port": [LOCAL + ":8777"],
    "localhost": ["Host: localhost:1"],
    "an address of version 6": ["Host: [::1]:8777"],
    "this machine's name": [f"Host: {socket.gethostname()}"],
    "an allowed name": ["Host: BOB.example:80"],
    "an allowed page": [LOCAL, "Origin: https://own.example"],
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(uri, name):
    assert "403" in answer(uri, *REFUSED[name]) or "400" in answer(uri, *REFUSED[name])


@pytest.mark.parametrize("name", WELCOME)
def test_welcome(uri, name):
    assert "101" in answer(uri, *WELCOME[name])


def test_a_client_is_told_why(uri):
    planrt.TorchHook(torch)
    with WebsocketClientWorker("bob", uri=uri) as worker:
        assert torch.ones(2).send(worker).get().tolist() == [1, 1]
    with pytest.raises(HandshakeError, match="not called '127.1'.*--allow-host"):
        WebsocketClientWorker(
            "bob", uri=uri.replace("127.0.0.1", "127.1")
        )  # the same, as a resolver reads it


def test_with_tls_the_certificate_says_the_names():
    assert Callers("127.0.0.1", tls=True).refusal({"Host": "worker.example"}) is None
    assert "web pages" in Callers("127.0.0.1", tls=True).refusal({"Host": "worker.example", "Origin": "null"})


@pytest.mark.parametrize(
    "options",
    [
        {"origins": ["evil.example"]},
        {"origins": ["https://evil.example/page"]},
        {"origins": ["ftp://evil.example"]},
        {"origins": ["*"]},
        {"origins": [5]},
        {"hosts": ["a:80"]},
        {"hosts": [""]},
        {"hosts": ["https://a.example"]},
        {"hosts": [None]},
    ],
)
def test_what_is_no_origin_or_host_is_refused_at_once(options):
    with pytest.raises(OptionError):
        WebsocketServerWorker(id="bob", **options)


PAGE = """<script>
const socket = new WebSocket("URI");
socket.onopen = () => fetch("/opened");
socket.onerror = () => fetch("/refused");
</script>"""


def browser():
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        reason = "needs Chromium on the PATH"
        if os.environ.get("PLANRT_REQUIRE_BROWSER") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    return found


@pytest.mark.parametrize("allowed", [False, True])
def test_a_page_in_a_real_browser_opens_no_session(tmp_path, allowed):
    program = browser()
    told: list[str] = []
    heard = threading.Event()

    class Pages(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path in ("/opened", "/refused"):
                told.append(self.path)
                heard.set()
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(page.encode() if self.path == "/" else b"")

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Pages) as pages:
        origin = f"http://127.0.0.1:{pages.server_port}"
        server = WebsocketServerWorker(id="bob", threads=1, origins=[origin] if allowed else [])
        with server.running() as uri:
            page = PAGE.replace("URI", uri)
            threading.Thread(target=pages.serve_forever, daemon=True).start()
            shown = subprocess.Popen(
                [
                    program, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
                    "--disable-background-networking", "--disable-component-update", "--disable-sync",
                    f"--user-data-dir={tmp_path}", "--remote-debugging-port=0", origin,
                ],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )  # fmt: skip
            try:
                assert heard.wait(120)
            finally:
                shown.terminate()
                shown.wait(30)
                pages.shutdown()
    assert told == ["/opened" if allowed else "/refused"]

"""``/health`` and ``/metrics`` of workers, read over HTTP as Prometheus reads them."""

import contextlib
import socket
import sys
import threading

import pytest
import torch

import planrt
from planrt.errors import ConnectError, GetNotPermittedError, MissingPackageError, OptionError, RemoteError
from planrt.metrics import OTHER, Counter, Family, Health, Histogram, gauge, merged
from planrt.workers import VirtualWorker, WebsocketClientWorker, WebsocketServerWorker
from planrt.workers.serving.counts import HostCounts
from planrt.workers.wire import messages as m
from tests.processes import eventually
from tests.watching import ask, health, samples

ANN, BEN = "the long token of ann, which nobody guesses", "and that of ben, which is another one"


@pytest.fixture(scope="module", autouse=True)
def hook():
    return planrt.TorchHook(torch)


@pytest.fixture
def watched(transport):
    """``watched("bob", users=...)`` -> (``connect(token)``, address of its metrics)"""
    with contextlib.ExitStack() as stack:

        def start(id, **options):
            if transport == "memory":
                worker = stack.enter_context(VirtualWorker(id, auto_add=False, **options))
                address = stack.enter_context(planrt.MetricsServer(worker.watched)).address
                return lambda token="": stack.enter_context(worker.connect_as(token)), address
            server = WebsocketServerWorker(id, threads=1, metrics_port=0, **options)
            uri = stack.enter_context(server.running())
            client = lambda token="": stack.enter_context(  # noqa: E731
                WebsocketClientWorker(id, uri=uri, token=token, auto_add=False)
            )
            return client, server.metrics_address

        yield start


def test_a_worker_tells_what_it_holds_and_moved(watched):
    connect, address = watched("bob")
    before = samples(address)
    bob = connect()
    pointers = [torch.ones(1000).send(bob) for _ in range(3)]
    view = pointers[0][:10]  # of the same memory
    assert bob.objects_count() == 4
    found = samples(address)
    grown = {
        name: found.of(name, worker="bob") - before.of(name, worker="bob")
        for name in ("planrt_worker_sessions", "planrt_worker_objects", "planrt_worker_connections_total")
    }
    assert grown == {
        "planrt_worker_sessions": 1,
        "planrt_worker_objects": bob.objects_count(),
        "planrt_worker_connections_total": 1,
    }
    assert found.of("planrt_worker_object_bytes", worker="bob") >= 3 * 4000
    assert found.of("planrt_worker_object_bytes", worker="bob") < 4 * 4000 + 4096
    assert found.of("planrt_worker_bytes_total", worker="bob", direction="in") >= 3 * 4000
    assert found.of("planrt_worker_messages_total", worker="bob", direction="out") >= 1
    assert found.of("planrt_worker_up", worker="bob") == 1
    with pytest.raises(RemoteError):
        torch.linalg.inv(torch.zeros(2, 2).send(bob)).get()
    found = samples(address)
    assert found.of("planrt_worker_failures_total", worker="bob", kind="ExecutionError") == 1
    assert found.of("planrt_worker_answers_total", worker="bob", kind="failure") == 1
    assert "process_resident_memory_bytes" in found.names() or not sys.platform.startswith("linux")
    del view, pointers
    bob.__exit__(None, None, None)  # for good
    assert eventually(
        lambda: (
            samples(address).of("planrt_worker_sessions", worker="bob")
            == before.of("planrt_worker_sessions", worker="bob")
        )
    )


def test_traffic_of_connections_that_ended_still_counts(watched):
    connect, address = watched("bob")
    bob = connect()
    torch.ones(500).send(bob).get()
    used = bob.traffic.copy()
    bob.close()

    def told():
        return samples(address).of("planrt_worker_bytes_total", worker="bob", direction="in")

    assert eventually(lambda: told() >= used.bytes_sent)
    assert told() >= used.bytes_sent


def test_refusals_are_counted_by_kind_and_no_name_is_told(watched):
    connect, address = watched("clinic", users={"ann": ANN, "ben": BEN})
    ann, ben = connect(ANN), connect(BEN)
    kept = torch.ones(3).tag("#rare-disease").describe("of ward 7").send(ann, allowed_users=["ann"])  # noqa: F841
    ann.objects_count()
    (found,) = ben.search("#rare-disease")
    with pytest.raises(GetNotPermittedError):
        found.get()
    status, body = ask(address, "/metrics")
    assert status == 200
    assert (
        samples(address).of("planrt_worker_refusals_total", worker="clinic", kind="GetNotPermittedError") == 1
    )
    told = body + ask(address, "/health")[1]
    for secret in ("ann", "ben", "disease", "ward", ANN, BEN, ann._connection.session.id):
        assert secret not in told.replace("planrt", ""), secret


def test_health_says_what_is_the_matter(watched):
    connect, address = watched("bob")
    connect()
    status, told = health(address)
    assert (status, told["status"], told["ok"], told["worker"]) == (200, "serving", True, "bob")
    assert told["seconds"] >= 0


@pytest.mark.parametrize("trouble", ["device lost", "stopping"])
def test_a_worker_in_trouble_is_unwell(trouble):
    with VirtualWorker("bob", auto_add=False) as bob, planrt.MetricsServer(bob.watched) as server:
        if trouble == "stopping":
            bob._host.stop()
        else:
            bob._host.device_lost.set()
        status, told = health(server.address)
        assert (status, told["status"], told["ok"]) == (503, trouble, False)
        assert samples(server.address).of("planrt_worker_up", worker="bob") == 0


def test_a_certificate_that_expires_shows_before_and_after():
    with VirtualWorker("bob", auto_add=False) as bob, planrt.MetricsServer(bob.watched) as server:
        assert "planrt_worker_certificate_expiry_time_seconds" not in samples(server.address).names()
        bob.watched.certificate_until = 4e9
        assert (
            samples(server.address).of("planrt_worker_certificate_expiry_time_seconds", worker="bob") == 4e9
        )
        assert health(server.address)[0] == 200
        bob.watched.certificate_until = 1e9
        status, told = health(server.address)
        assert (status, told["status"], told["certificate_until"]) == (503, "certificate expired", 1e9)


def test_health_is_told_while_the_worker_computes():
    began, go_on = threading.Event(), threading.Event()

    class Slow(torch.utils.data.Dataset):
        def __len__(self):
            return 4

        def __getitem__(self, place):
            if place == 3 and armed.is_set():
                began.set()
                go_on.wait(60)
            return torch.ones(2), torch.tensor(1)

    armed = threading.Event()
    server = WebsocketServerWorker("bob", threads=1, metrics_port=0)
    server.add_dataset(Slow(), "slow")
    armed.set()
    config = planrt.TrainConfig(
        torch.nn.Linear(2, 2), torch.nn.functional.cross_entropy, batch_size=4, optimizer_args={"lr": 0.1}
    )
    with server.running() as uri, WebsocketClientWorker("bob", uri=uri, auto_add=False) as bob:
        fitting = threading.Thread(target=lambda: (config.send(bob), bob.fit("slow")))
        fitting.start()
        try:
            assert began.wait(60)
            assert health(server.metrics_address)[1]["computing"] is True
            assert samples(server.metrics_address).of("planrt_worker_computing", worker="bob") == 1
        finally:
            go_on.set()
            fitting.join()
        assert eventually(lambda: health(server.metrics_address)[1]["computing"] is False)
        assert (
            samples(server.metrics_address).of("planrt_worker_answers_total", worker="bob", kind="fitted")
            == 1
        )


def test_several_workers_are_told_apart():
    with (
        VirtualWorker("a", auto_add=False) as a,
        VirtualWorker("b", auto_add=False) as b,
        planrt.MetricsServer(a.watched, b.watched) as server,
    ):
        kept = torch.ones(3).send(a)
        assert a.objects_count() == 1  # what was posted has arrived
        found = samples(server.address)
        assert (
            found.of("planrt_worker_objects", worker="a"),
            found.of("planrt_worker_objects", worker="b"),
        ) == (1, 0)
        b._host.device_lost.set()
        status, told = health(server.address)
        assert (status, told["status"], [one["status"] for one in told["parts"]]) == (
            503, "device lost", ["serving", "device lost"],
        )  # fmt: skip
        del kept


# ------------------------------------------------------------------------------- who may read it


@pytest.fixture(scope="module")
def end():
    class Thing:
        def metrics(self):
            return [gauge("planrt_thing", "A thing.", 3)]

        def health(self):
            return Health(True, "fine")

    with planrt.MetricsServer(Thing(), hosts=["metrics.example"]) as server:
        yield server.address


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"host": "localhost:1"}, 200),
        ({"host": "metrics.example"}, 200),
        ({"host": "evil.example"}, 403),  # a name that its owner points to 127.0.0.1
        ({"origin": "https://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"sec_fetch_site": "cross-site"}, 403),
        ({"sec_fetch_site": "same-site"}, 403),
        ({"sec_fetch_site": "none"}, 200),  # typed into the address bar
    ],
)
@pytest.mark.parametrize("path", ["/health", "/metrics"])
def test_web_pages_may_not_read(end, path, headers, status):
    found, body = ask(end, path, **headers)
    assert found == status, body
    assert ("planrt_thing" in body or "fine" in body) == (status == 200)


def test_only_two_paths_and_one_method(end):
    assert ask(end, "/")[0] == 404
    assert ask(end, "/metrics/../../etc/passwd")[0] == 404
    assert ask(end, "/metrics?x=1")[0] == 200
    assert ask(end, "/metrics", method="POST")[0] in (400, 405)
    assert ask(end, "/metrics", method="DELETE")[0] in (400, 405)


@pytest.mark.parametrize(
    "bytes_sent",
    [
        b"\x00" * 100,
        b"GET /metrics\r\n\r\n",
        b"GET /metrics HTTP/1.1\r\n" + b"x: y\r\n" * 1000 + b"\r\n",
        b"\r\n",
    ],
)
def test_garbage_ends_its_own_connection_and_no_other(end, bytes_sent):
    host, port = end.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        connection.sendall(bytes_sent)
        connection.shutdown(socket.SHUT_WR)
        answer = b""
        with contextlib.suppress(ConnectionResetError):
            while part := connection.recv(65536):
                answer += part
    assert b"planrt_thing" not in answer
    assert ask(end, "/health")[0] == 200


def test_an_address_has_so_many_connections(end):
    """Each takes a file of the process that holds the data."""
    host, port = end.removeprefix("http://").split(":")
    with contextlib.ExitStack() as stack:
        opened = [
            stack.enter_context(socket.create_connection((host, int(port)), timeout=60)) for _ in range(65)
        ]
        with contextlib.suppress(ConnectionResetError):
            assert opened[-1].recv(1) == b""
    assert eventually(lambda: answers(end))


def answers(end):
    with contextlib.suppress(OSError):
        return ask(end, "/health")[0] == 200
    return False


def test_a_server_serves_once_at_a_time_and_again():
    server = planrt.MetricsServer()
    for _ in range(2):
        with server:
            assert health(server.address) == (200, {"status": "idle", "ok": True})
            with pytest.raises(OptionError, match="serves already"), server:
                pass
            assert health(server.address)[0] == 200
        assert server.address == ""


def test_figures_that_cannot_be_read_are_an_answer_too(caplog):
    class Broken:
        def metrics(self):
            raise ValueError("of ward 7")

        def health(self):
            raise KeyError("of ward 7")

    with planrt.MetricsServer(Broken()) as server:
        assert ask(server.address, "/metrics") == (503, "this cannot be told now: ValueError\n")
        assert ask(server.address, "/health") == (503, "this cannot be told now: KeyError\n")
    assert "metrics_unread" in caplog.text


@pytest.mark.parametrize("id", ['a"b', "x\\y", "\u00fc", "new\nline"])
def test_any_id_of_a_worker_is_told_as_it_is(id):
    with VirtualWorker(id, auto_add=False) as worker, planrt.MetricsServer(worker.watched) as server:
        assert samples(server.address).of("planrt_worker_up", worker=id) == 1
        assert health(server.address)[1]["worker"] == id


def test_scrapes_at_once_while_ops_run():
    server = WebsocketServerWorker("bob", threads=1, metrics_port=0)
    with server.running() as uri, WebsocketClientWorker("bob", uri=uri, auto_add=False) as bob:
        failed = []

        def scrape():
            try:
                for _ in range(3):
                    samples(server.metrics_address)
            except Exception as error:
                failed.append(error)

        scraping = [threading.Thread(target=scrape) for _ in range(6)]
        for one in scraping:
            one.start()
        x = torch.ones(10).send(bob)
        for _ in range(100):
            x = x + 1
        assert x.get()[0] == 101
        for one in scraping:
            one.join()
        assert failed == []


def test_openmetrics_where_prometheus_asks_for_it(end):
    assert ask(end, "/metrics", accept="application/openmetrics-text;version=1.0.0")[1].endswith("# EOF\n")


# -------------------------------------------------------------------------------- wrong options


@pytest.mark.parametrize("host", ["0.0.0.0", "", "192.168.0.1", "::", "example.org"])
def test_other_machines_only_with_consent(host):
    with pytest.raises(OptionError, match="--metrics-insecure"):
        planrt.MetricsServer(host=host)
    with pytest.raises(OptionError, match="--metrics-insecure"):
        WebsocketServerWorker("bob", metrics_port=0, metrics_host=host)


def test_options_without_a_port_say_so():
    for options in ({"metrics_host": "127.0.0.1"}, {"metrics_insecure": True}):
        with pytest.raises(OptionError, match="--metrics-port"):
            WebsocketServerWorker("bob", **options)


@pytest.mark.parametrize("port", [-1, 65536, "nine", 2.5])
def test_a_port_is_a_port(port):
    with pytest.raises((OptionError, TypeError)):
        planrt.MetricsServer(port=port)


def test_a_worker_is_not_watched_itself():
    with VirtualWorker("bob", auto_add=False) as bob, pytest.raises(OptionError, match=r"worker\.watched"):
        planrt.MetricsServer(bob)


def test_a_port_that_is_taken_is_one_line(end):
    port = int(end.rpartition(":")[2])
    with pytest.raises(ConnectError, match=f"port {port} is taken"), planrt.MetricsServer(port=port):
        pass
    server = WebsocketServerWorker("bob", metrics_port=port)
    with pytest.raises(ConnectError, match=f"port {port} is taken"), server.running():
        pass


def test_without_the_package_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(MissingPackageError, match=r"prometheus-client: pip install 'planrt\[metrics\]'"):
        planrt.MetricsServer()
    with pytest.raises(MissingPackageError, match="--metrics-port needs"):
        WebsocketServerWorker("bob", metrics_port=0)
    WebsocketServerWorker("bob")  # which needs none


# ------------------------------------------------------------------------------------ the parts


def test_labels_are_bounded_whatever_a_peer_calls_its_failures():
    counts = HostCounts()
    for number in range(1000):
        counts.told(m.Failure(f"Kind{number}", "made up"))
        counts.bad_messages.add(f"Error{number}")
    for family in counts.families():
        assert len(family.samples) < 100, family.name
    assert counts.failures.family().samples[OTHER,] == 1000


def test_a_histogram_counts_up_to_each_bound():
    histogram = Histogram("x", "X.", bounds=(1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 7.0):
        histogram.add(value)
    told = histogram.family().samples[()]
    assert (told.bounds, told.counts, told.total) == ((1.0, 2.0), (2, 3, 4), 10.0)


def test_a_counter_without_a_label_counts():
    counter = Counter("x", "X.")
    counter.add()
    counter.add(amount=2)
    assert counter.family().samples == {(): 3.0}


def test_merged_keeps_all_samples():
    one = Family("a", "gauge", "A.", (), {(): 1.0}).of("worker", "x")
    other = Family("a", "gauge", "A.", (), {(): 2.0}).of("worker", "y")
    (both,) = merged([one, other])
    assert both.samples == {("x",): 1.0, ("y",): 2.0}

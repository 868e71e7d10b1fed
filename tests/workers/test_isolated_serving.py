"""With isolation a worker is watched, asked for its status, and keeps joint runs, as it is and does without."""

import asyncio
import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import trustme
from cryptography.hazmat.primitives import serialization
from torch import nn

from planrt.cli import main
from planrt.errors import HandshakeError, JointError, OptionError, PlanrtError, RemoteError, SessionLostError
from planrt.fl import RoundScheduler, TrainConfig, serve
from planrt.vertical import Party, split_network
from planrt.workers import WebsocketClientWorker, WebsocketServerWorker
from planrt.workers.serving import users_file
from planrt.workers.serving.counts import Figures
from planrt.workers.serving.isolation import watching
from planrt.workers.wire.proofs import Checking, Verifier, new_token
from tests.watching import ask, health, samples
from tests.workers.test_isolation import Net, Server, children, fit, gone, hook, of_user, until, works  # noqa: F401

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="isolation is for Linux"),
]

USERS = {"ann": "the long token of ann", "ben": "the long token of ben"}


def served(request, **options):
    started = Server(isolation=True, **options)
    request.addfinalizer(started.end)
    return started


# ------------------------------------------------------------------------------------------------- figures


@pytest.fixture(scope="module")
def clinic(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("owner")
    return served(request, id="clinic", users=USERS, metrics_port=0, folder=str(folder))


class Told:
    """What the worker tells whoever watches it."""

    def __init__(self, server):
        self._samples = samples(server.metrics)

    def __call__(self, name, **labels):
        return self._samples.get(
            (f"planrt_worker_{name}", frozenset({"worker": "clinic", **labels}.items())), 0
        )

    def counts(self):
        return {key: value for key, value in self._samples.items() if key[0].endswith("_total")}


def test_the_figures_are_those_of_all_processes_and_stay_when_one_ends(clinic):
    until(lambda: clinic.metrics)
    before = Told(clinic)
    with clinic.connect("ann") as ann, clinic.connect("ben") as ben:
        kept = [torch.ones(1000).send(ann), torch.ones(500).send(ben)]
        for worker in (ann, ben):
            with pytest.raises(RemoteError):
                torch.linalg.inv(torch.zeros(2, 2).send(worker)).get()
            assert fit(worker, "rows").samples == 4
        until(lambda: Told(clinic)("answers_total", kind="fitted") == 2)  # which came last
        now = Told(clinic)
        assert now("failures_total", kind="ExecutionError") == 2
        assert now("sessions") - before("sessions") == 2
        assert now("connections_total") - before("connections_total") == 2
        assert now("objects") - before("objects") >= 2
        assert 6000 <= now("object_bytes") - before("object_bytes") < 12_000
        assert now("bytes_total", direction="in") - before("bytes_total", direction="in") >= 6000
        assert now("processes") == 2
        assert now("processes_lost_total") == 0
        assert now("up") == 1
        found = health(clinic.metrics)
        assert found[0] == 200
        assert (found[1]["sessions"], found[1]["processes"]) == (2, 2)
        with pytest.raises(SessionLostError):
            fit(ann, "crash")
        until(lambda: Told(clinic)("processes_lost_total") == 1)
        after = Told(clinic)
        assert all(after.counts()[key] >= value for key, value in now.counts().items() if "cpu" not in key[0])
        assert after("sessions") == now("sessions") - 1
        assert after("answers_total", kind="fitted") == 2
        with clinic.connect("ann") as again:
            assert fit(again, "rows").samples == 4
            until(lambda: Told(clinic)("answers_total", kind="fitted") == 3)
        assert kept[1].sum().get() == 500
    until(lambda: Told(clinic)("sessions") == before("sessions"))
    assert "ann" not in ask(clinic.metrics, "/metrics")[1]


def test_what_a_process_counted_just_before_it_was_killed_is_not_lost(request):
    """It is told every second. Here the process ends at once after an answer."""
    clinic = served(request, id="clinic", users=USERS, metrics_port=0)
    until(lambda: clinic.metrics)
    ann = clinic.connect("ann")
    x = torch.ones(1000).send(ann)
    (process,) = clinic.processes()
    time.sleep(1.5)  # what it counts from here on is told in a second at the earliest
    answers = [x.sum().get().item() for _ in range(20)]
    with pytest.raises(RemoteError):
        torch.linalg.inv(torch.zeros(2, 2).send(ann)).get()
    os.kill(process, signal.SIGKILL)
    assert answers == [1000.0] * 20
    until(lambda: Told(clinic)("processes_lost_total") == 1)
    after = Told(clinic)
    assert after("answers_total", kind="fetched") == 20
    assert after("failures_total", kind="ExecutionError") == 1
    assert after("bytes_total", direction="in") >= 4_000
    with contextlib.suppress(PlanrtError):
        ann.close()


def test_counts_outlive_a_process_and_what_it_made_up_does_not_go_down():
    page = watching.new_page()
    slot = watching.Slot(page, 7)
    slot.clear()
    told = Figures(bytes_sent=10, answers={"done": 3, "fetched": 2}, sessions=4)
    slot.count(Figures(bytes_sent=7, messages_sent=5, answers={"done": 4}, failures={"WireError": 1}))
    found = slot.counted(told)
    assert (found.bytes_sent, found.messages_sent, found.sessions) == (10, 5, 4)
    assert (found.answers, found.failures) == ({"done": 4, "fetched": 2}, {"WireError": 1})
    start, end = 7 * 4096, 8 * 4096
    page[start:end] = b"\xff" * 4096  # a process that was taken over
    assert slot.counted(told) == told
    slot.clear()
    assert slot.counted(Figures()) == Figures()


def test_what_processes_say_to_each_other_is_no_clients(clinic):
    with clinic.connect("ann") as ann, clinic.connect("ben") as ben:
        x = torch.ones(300_000).tag("#large").send(ann)
        before = Told(clinic)
        found = []
        until(lambda: found.extend(ben.search("#large")) or found)
        assert found[0].sum().get() == 300_000
        until(lambda: Told(clinic)("answers_total", kind="found") > before("answers_total", kind="found"))
        now = Told(clinic)
        assert now("connections_total") == before("connections_total")
        assert now("bytes_total", direction="out") - before("bytes_total", direction="out") < 1_000_000
        assert now("answers_total", kind="lent") == 0
        del x


def test_its_status(clinic, tmp_path, capsys):
    token = tmp_path / "token"
    token.write_text(USERS["ann"])
    token.chmod(0o600)
    with clinic.connect("ann") as ann, clinic.connect("ben") as ben:
        kept = [torch.ones(100).send(ann), torch.ones(100).send(ben)]
        assert main(["status", f"clinic={clinic.uri}", "--token-file", str(token)]) == 0
        told = capsys.readouterr().out
        assert f"clinic at {clinic.uri}: serves since" in told
        assert "for user ann: 2 sessions, 1 object, 400 bytes" in told
        assert main(["status", f"clinic={clinic.uri}", "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        assert (told["user"], told["sessions"], told["objects"]) == ("", 1, 0)
        until(lambda: health(clinic.metrics)[1]["sessions"] == 2)
        assert main(["status", clinic.metrics]) == 0
        assert "sessions: 2" in capsys.readouterr().out
        del kept


# ---------------------------------------------------------------------------------------------- joint runs


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = tmp_path_factory.mktemp("kept")
    return {id: str(made / id) for id in ("alice", "jim")}


@pytest.fixture(scope="module")
def parties(request, folders):
    """``parties(name)``: the worker of that name, begun when it is not there."""
    tables, started = {"alice": 0, "jim": 1}, {}

    def start(id):
        if id not in started or started[id].process.poll() is not None:
            started[id] = served(request, id=id, users=USERS, table=tables[id], joint_runs=folders[id])
        return started[id]

    def party(id, user, *about, **more):
        worker = start(id).connect(user)
        request.addfinalizer(worker.close)
        return Party(worker, "t", *about, **more)

    start.party = party
    return start


def network(parties, user, **more):
    torch.manual_seed(1)
    left = parties.party("alice", user, "id", ["a", "b"])
    right = parties.party("jim", user, "who", ["c", "d", "e"], label="y")
    return split_network(
        left, right, bottoms=[nn.Linear(2, 3), nn.Linear(3, 3)], top=nn.Linear(6, 1), loss_fn=nn.BCEWithLogitsLoss(),
        optimizer="Adam", optimizer_args={"lr": 0.01}, normalise="casefold", epochs=3, batch_size=20, seed=5, **more,
    )  # fmt: skip


def test_a_joint_run_goes_on_after_a_process_and_a_worker_were_killed(parties, folders):
    with network(parties, "ann") as whole:
        losses = whole.fit()
    with network(parties, "ann", keep="credit") as first:
        assert first.fit(1) == losses[:1]
    for one in parties("alice").processes():
        os.kill(one, signal.SIGKILL)
    until(lambda: gone(parties("alice").processes()))
    with pytest.raises(JointError, match="has kept nothing under the name 'credit'"):
        network(parties, "ben", keep="credit", resume=True)
    with network(parties, "ann", keep="credit", resume=True) as second:
        assert second.fit(1) == losses[:2]
    parties("jim").process.kill()
    parties("jim").process.wait(20)
    with network(parties, "ann", keep="credit", resume=True) as third:
        assert third.fit() == losses
    assert all(len(os.listdir(folder)) == 2 for folder in folders.values())
    assert all(os.stat(folder).st_mode & 0o777 == 0o700 for folder in folders.values())


def test_a_secure_round_of_isolated_workers(clinic, parties):
    """Whose server sees the sum alone: of these workers as of others."""
    servers = [clinic, parties("alice"), parties("jim")]
    torch.manual_seed(0)
    example = torch.zeros(2, 3), torch.zeros(2)
    config = TrainConfig(Net(), F.mse_loss, batch_size=2, example=example, optimizer_args={"lr": 0.01})
    workers = [one.connect("ann") for one in servers]
    states = []
    for secure in (False, True):
        made = RoundScheduler(workers, config, dataset_key="rows", seed=7, secure_aggregation=secure)
        asyncio.run(made.prepare())
        states.append(asyncio.run(made.run_round(1, config.state)).state)
    for name, plain in states[0].items():
        assert torch.allclose(plain, states[1][name], atol=1e-6)
        assert not torch.equal(plain, config.state[name])
    for one in workers:
        one.close()


# ------------------------------------------------------------------------------------------------- secrets


def needle(secret):
    secret = secret.encode() if isinstance(secret, str) else secret
    return secret[:6].hex(), len(secret), hashlib.sha256(secret).hexdigest()


def test_no_secret_of_the_owner_is_in_the_memory_of_a_users_process(request, tmp_path):
    """Keys, what proves users and their names, and the worker's own token are read when the process is there of which
    the others are copies."""
    authority = trustme.CA()
    made = authority.issue_cert("127.0.0.1")
    users, ca, cert, key, token = (tmp_path / name for name in ("users", "ca", "cert", "key", "token"))
    ben, own = new_token(), new_token()
    users.write_text(f"ann: {USERS['ann']}\n")
    users.chmod(0o600)
    users_file.add(users, "benedikta-of-the-north", ben)
    token.write_text(own)
    ca.write_bytes(authority.cert_pem.bytes())
    cert.write_bytes(b"".join(one.bytes() for one in made.cert_chain_pems))
    key.write_bytes(made.private_key_pem.bytes())
    for path in (key, token):
        path.chmod(0o600)
    verifier = Verifier.parse(users_file.read(users).users["benedikta-of-the-north"])
    private = serialization.load_pem_private_key(key.read_bytes(), None).private_numbers().private_value
    secrets = {
        "ann": USERS["ann"], "ben": ben, "own": own, "name": "benedikta-of-the-north",
        "stored": verifier.stored_key, "server": verifier.server_key, "line": str(verifier),
        "pem": key.read_text().splitlines()[1],
        "big": private.to_bytes(32, "big"), "little": private.to_bytes(32, "little"),
        "there": str(tmp_path),
    }  # fmt: skip
    granted = tmp_path / "granted"
    granted.mkdir()
    (granted / "needles").write_text(json.dumps({name: needle(one) for name, one in secrets.items()}))
    server = served(
        request, folder=str(tmp_path), users=str(users), cert_path=str(cert), key_path=str(key),
        peer_token=str(token), readable=[str(granted), "/proc"], require_user=True,
    )  # fmt: skip
    with server.connect("ann", ca=ca) as worker:
        assert works(worker)
        with pytest.raises(RemoteError, match="went on: 'there'"):
            fit(worker, "secrets")
    with pytest.raises(HandshakeError):
        server.connect(None, ca=ca)


def test_a_process_proves_the_workers_token_once_for_each_connection_and_never_has_it(of_user):  # noqa: F811
    call, _, process, dialling = of_user("ann", everything=True)
    dialling.token = "the token of this worker at others"
    assert call("prove", None)[0] is False
    process.bindings.append(None)
    process.bindings.append(b"a certificate")
    answered, (number, first) = call("prove", b"a certificate")
    assert answered
    assert "the token" not in first
    checking = Checking(first, lambda _: Verifier.of(dialling.token), b"a certificate")
    answered, proof = call("prove_answer", number, checking.challenge)
    assert call("prove_check", number, checking.verify(proof)) == (True, None)
    assert call("prove", b"a certificate")[0] is False
    answered, (number, first) = call("prove", None)
    assert call("prove_answer", number, "r=x,s=y,i=1")[0] is False
    assert call("prove_check", number, "v=AAAA")[0] is False
    assert call("prove_check", number, "v=AAAA")[0] is False


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"users": "no/such/file"}, "cannot be read"),
        ({"users": {"ann": "x"}}, "easy to guess"),
        ({"cert_path": "no/such/file", "key_path": "nor/such"}, "cannot be read"),
        ({"peer_token": Path("no/such/file")}, "cannot be read"),
        ({"users": {"ann": USERS["ann"], "ben": USERS["ann"]}}, "token of its own"),
    ],
)
def test_what_is_read_late_is_refused_before_anything_is_served(options, says):
    worker = WebsocketServerWorker("bob", isolation=True, **options)
    with pytest.raises(OptionError, match=says):
        worker._take(worker._credentials.read())
    with pytest.raises(OptionError, match=says):
        WebsocketServerWorker("bob", **options)


def test_who_lets_nobody_in_or_everybody_is_refused_at_once():
    with pytest.raises(OptionError, match="lets nobody in"):
        WebsocketServerWorker("bob", isolation=True, require_user=True)
    with pytest.raises(OptionError, match="other machines reach"):
        WebsocketServerWorker("bob", "0.0.0.0", isolation=True)


# --------------------------------------------------------------------------------------- whether there is any


def said(*options, alone=True):
    return serve._is_isolated(serve.parser("x").parse_args(["--id", "bob", *options]), alone=alone)


@pytest.mark.parametrize("who", [("--users", "u"), ("--policy", "p"), ("--tls-client-ca", "c")])
def test_with_users_or_a_policy_there_is_isolation_unless_the_owner_says_otherwise(who, monkeypatch):
    assert said() == (False, "")
    on, line = said(*who)
    assert on
    assert line.startswith("Isolation: on, with ")
    assert said(*who, "--isolation", "off") == (False, "")
    assert said("--isolation", "on") == said(*who, "--isolation", "on") == (True, "")
    for options, more, why in (
        ((), {"alone": False}, "there for other things"),
        (("--sum-key", "k"), {}, "the key to sign with"),
        (("--device", "cuda"), {}, "it is for the CPU, and this worker computes on cuda"),
    ):
        on, line = said(*who, *options, **more)
        assert not on
        assert line.startswith("Isolation: off, though the worker has ")
        assert why in line
    monkeypatch.setattr(serve, "can_isolate", lambda: False)
    assert said(*who)[0] is False
    assert "no way to confine" in said(*who)[1]


def test_on_a_gpu_it_is_refused_by_name(monkeypatch):
    monkeypatch.setattr("planrt.workers.machine.state.prepared", lambda *about: (torch.device("cuda"), True))
    with pytest.raises(OptionError, match="isolation is for workers that compute on the CPU"):
        WebsocketServerWorker("bob", isolation=True, device="cuda")


def test_the_command_isolates_its_users_by_default_and_says_so(tmp_path):
    users = tmp_path / "users"
    for name, token in USERS.items():
        users_file.add(users, name, token)
    command = [
        sys.executable,
        "-m",
        "planrt.fl.serve",
        "--id",
        "bob",
        "--empty",
        "--port",
        "0",
        "--users",
        str(users),
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as worker:
        try:
            lines = []
            while not lines or "serves at" not in lines[-1]:
                lines.append(worker.stdout.readline())
                assert lines[-1], lines
            assert "Isolation: on, with users; each user's work runs in a process of its own\n" in lines
            uri = lines[-1].split(" serves at ")[1].partition(";")[0]
            (zygote,) = children(worker.pid)
            for name, token in USERS.items():
                with WebsocketClientWorker("bob", uri=uri, token=token, auto_add=False) as client:
                    assert (torch.ones(2).send(client) * 2).get().tolist() == [2, 2], name
            assert len(children(zygote)) == 2
        finally:
            worker.terminate()

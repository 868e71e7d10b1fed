"""Isolation: what happens to one user's process stays with that user, and the process can do nothing but compute."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import trustme
from torch import nn

import planrt
from planrt.cli import main
from planrt.errors import (
    IsolationError,
    NotApprovedError,
    OptionError,
    RemoteError,
    SessionLostError,
    WorkerLostError,
)
from planrt.fl import TrainConfig
from planrt.plans.policy.approvals import Approvals, Status
from planrt.serde.frames import Limits
from planrt.workers import BaseDataset, VirtualWorker, WebsocketClientWorker, WebsocketServerWorker
from planrt.workers.machine.sessions import Session
from planrt.workers.machine.state import WorkerState
from planrt.workers.serving.counts import Figures
from planrt.workers.serving.dialling import Dialling
from planrt.workers.serving.isolation import confining
from planrt.workers.serving.isolation.answering import Answers
from planrt.workers.serving.isolation.trial import try_out
from planrt.workers.serving.joint_folder import JointFolder
from planrt.workers.wire.proofs import Verifier
from tests.watching import whole_lines
from tests.workers.isolated_server import Reading

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="isolation is for Linux")

USERS = {"ann": "the long token of ann", "ben": "the long token of ben"}
TIMEOUT = 600.0
ROWS = torch.arange(12.0).reshape(4, 3)
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module", autouse=True)
def hook():
    return planrt.TorchHook(torch)


class Server:
    """A worker in a process of its own, and the processes that come of it."""

    def __init__(self, **options):
        self.id, self.options = options.get("id", "bob"), options
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.workers.isolated_server", json.dumps(options)],
            stdout=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True,
        )  # fmt: skip
        line = self.process.stdout.readline()
        assert line, "it did not start"
        self.uri, self.adding, self.metrics = json.loads(line)

    def connect(self, user="ann", **options):
        token = USERS[user] if user else ""
        return WebsocketClientWorker(
            self.id, uri=self.uri, token=token, auto_add=False, timeout=60, **options
        )

    def processes(self):
        """The processes for clients' work: copies of the one that the worker copied itself to."""
        return [one for zygote in children(self.process.pid) for one in children(zygote)]

    def end(self):
        self.process.kill()
        self.process.wait(120)
        self.process.stdout.close()


def children(process):
    with contextlib.suppress(OSError):
        tasks = Path(f"/proc/{process}/task").iterdir()
        return [int(one) for task in tasks for one in (task / "children").read_text().split()]
    return []


def gone(processes):
    """Whether all of these have ended; one that waits for its parent to hear of it has."""
    return all(not Path(f"/proc/{one}").exists() or state(one) == "Z" for one in processes)


def state(process):
    with contextlib.suppress(OSError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    return "Z"


def until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it does not come"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("owner")
    (made / "granted").mkdir()
    for name in ("secret", "granted/file"):
        (made / name).write_text("of the owner")
    (made / "mapped").write_bytes(struct.pack("4f", 1, 1, 1, 1))
    return made


@pytest.fixture(scope="module")
def server(folder):
    started = Server(
        folder=str(folder), users=USERS, isolation=True, kernel_timeout=TIMEOUT, process_memory=1 << 30,
        readable=[str(folder / "granted")], audit=str(folder / "audit.jsonl"),
    )  # fmt: skip
    yield started
    started.end()


@pytest.fixture
def ann(server):
    with server.connect("ann") as worker:
        yield worker


@pytest.fixture
def ben(server):
    with server.connect("ben") as worker:
        yield worker


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.layer = nn.Linear(3, 1)

    def forward(self, x):
        return self.layer(x).squeeze(1)


def fit(worker, key, **options):
    options = {"batch_size": 2, **options}
    config = TrainConfig(Net(), F.mse_loss, example=(torch.zeros(2, 3), torch.zeros(2)), **options)
    config.send(worker)
    return worker.fit(key)


def works(worker):
    x = torch.arange(300_000.0)
    return torch.equal((x.send(worker) * 2).get(), x * 2)


# ---------------------------------------------------------------------------------- one's own and the others'


def test_each_user_has_a_process_of_its_own_and_all_of_them_work(server, ann, ben):
    with server.connect("ann") as again:
        assert works(ann)
        assert works(ben)
        assert works(again)
        assert len(server.processes()) == 2
        assert fit(ann, "rows").samples == fit(ben, "rows").samples == 4
        x = torch.ones(2).tag("#mine").send(ann)
        ann.objects_count()
        assert [one.id for one in again.search("#mine")]
        assert [one.id for one in ben.search("#mine")]
        assert torch.equal(x.get(), torch.ones(2))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT])
def test_a_process_that_ends_costs_its_user_and_no_other(server, ann, ben, number):
    x, y = torch.ones(3).send(ann), torch.ones(3).send(ben)
    assert torch.equal(y.copy().get(), torch.ones(3))
    assert torch.equal(x.copy().get(), torch.ones(3))
    with server.connect("ben") as other:
        before = set(server.processes())
        z = torch.ones(3).send(other)
        third = torch.ones(3).send(other)
        assert set(server.processes()) == before
    own = whose(server, ann)
    os.kill(own, number)
    with pytest.raises(
        SessionLostError, match=rf"was ended by {signal.Signals(number).name}.*objects are gone"
    ):
        until(lambda: x.copy().get() is None)
    assert torch.equal((y + 1).get(), torch.full((3,), 2.0))
    del z, third
    with server.connect("ann") as again:
        assert works(again)
        assert own not in server.processes()


def whose(server, worker):
    """The process that serves `worker`, found by what it computes."""
    x = torch.ones(1500, 1500).send(worker)
    used = {one: ticks(one) for one in server.processes()}
    while True:
        for _ in range(8):
            x.mm(x).sum().get()
        most = max(used, key=lambda one: ticks(one) - used[one])
        if ticks(most) - used[most] > 10:
            return most


def ticks(process):
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def test_a_kernel_that_crashes_is_named_and_the_owner_is_told(server, ann, ben, folder):
    y = torch.ones(3).send(ben)
    x = torch.ones(3).send(ann)
    with pytest.raises(
        WorkerLostError, match=r"SIGSEGV while a batch of .*crash.* ran: its objects are gone"
    ):
        fit(ann, "crash")
    assert torch.equal(y.get(), torch.ones(3))
    with pytest.raises(SessionLostError):
        x.get()
    until(lambda: "process_lost" in (folder / "audit.jsonl").read_text())
    assert main(["audit", str(folder / "audit.jsonl"), "--check"]) == 0


def test_others_go_on_while_one_never_ends(server, ann, ben):
    own = whose(server, ann)
    failed = []

    def hang():
        with pytest.raises(WorkerLostError, match="was ended by SIGKILL while a batch of .*endless.* ran"):
            fit(ann, "endless")
        failed.append(True)

    thread = threading.Thread(target=hang)
    thread.start()
    until(lambda: never_ends(own))
    for _ in range(3):
        assert works(ben)
        assert fit(ben, "rows").samples == 4
    assert not failed
    os.kill(own, signal.SIGKILL)
    thread.join()
    assert failed
    with server.connect("ann") as again:
        assert works(again)


def never_ends(process):
    """Whether a thread of a process has come to what never ends: it has said so by its name."""
    return any(
        (Path(f"/proc/{process}/task") / one / "comm").read_text().strip() == "endless"
        for one in os.listdir(f"/proc/{process}/task")
    )


def test_one_that_never_ends_is_ended(folder):
    server = Server(folder=str(folder), users=USERS, isolation=True, kernel_timeout=3.0)
    try:
        with (
            server.connect("ann") as worker,
            pytest.raises(WorkerLostError, match=r"batch of .*endless.* ran for more than the 3 s"),
        ):
            fit(worker, "endless")
        with server.connect("ann") as again:
            assert works(again)
    finally:
        server.end()


def test_memory_beyond_the_limit_fails_its_op(server, ann, ben):
    x = torch.ones(1).send(ann)
    large = x.expand(1 << 29).clone()
    with pytest.raises(RemoteError, match="memory"):
        large.get()
    assert torch.equal(x.get(), torch.ones(1))
    assert works(ann)
    assert works(ben)


# ------------------------------------------------------------------------------------------- what is closed


@pytest.mark.parametrize(
    "action",
    [
        "read",
        "write",
        "overwrite",
        "list",
        "truncate",
        "tcp",
        "udp",
        "unix",
        "fork",
        "program",
        "debug",
        "memory_of_others",
        "ring",
        "ring_of_before",
        "memory_file",
        "more_files",
        "write_to_what_is_open",
    ],
)
def test_a_process_does_nothing_but_compute(server, ann, action):
    if (
        action in ("read", "write", "overwrite", "list", "memory_of_others")
        and not confining.landlock_version()
    ):
        assert any("Landlock:" in one for one in confining.missing())  # what the worker's log says of it
        return
    with pytest.raises(RemoteError, match=r"refused with (PermissionError|OSError|ValueError)"):
        fit(ann, action)


def test_no_signals_to_others(server, ann):
    if confining.landlock_version() < 6:
        assert confining.missing()  # what the worker's log says of it
        return
    with pytest.raises(RemoteError, match="refused with PermissionError"):
        fit(ann, "signal")


def test_what_the_owner_grants_is_read_and_modules_are_found(server, ann):
    with pytest.raises(RemoteError, match="went on: 'of the owner'"):
        fit(ann, "granted")
    with pytest.raises(RemoteError, match="went on: 'wave'"):
        fit(ann, "module")


def test_each_process_has_a_place_of_its_own_in_a_file_that_is_open(ann, ben):
    for worker in (ann, ben, ann):
        with pytest.raises(RemoteError, match=r"went on: [12]\b" if worker is ann else r"went on: 1\b"):
            fit(worker, "place")


@pytest.mark.parametrize("kind", ["file", "memory"])
def test_what_is_mapped_to_be_shared_is_not_written_to(folder, ann, ben, kind):
    for worker in (ann, ben):  # each finds what the owner put there
        with pytest.raises(RemoteError, match=r"went on: \[1\.0, 1\.0, 1\.0, 1\.0\]"):
            fit(worker, f"mapped_{kind}")
    with pytest.raises(RemoteError, match=r"went on: \[7\.0, 7\.0, 7\.0, 7\.0\]"):  # its own copy
        fit(ann, f"mapped_{kind}")
    assert (folder / "mapped").read_bytes() == struct.pack("4f", 1, 1, 1, 1)


def test_a_process_cannot_write_what_others_are_at(server, ann, ben):
    """Or it could have their processes ended, as if they took too long."""
    before = works(ben) and server.processes()
    with pytest.raises(RemoteError, match="went on: 'wrote'"):
        fit(ann, "slots")
    time.sleep(1.0)  # the worker has looked meanwhile
    assert works(ben)
    assert set(before) <= set(server.processes())


def test_shared_memory_that_has_no_name_becomes_a_copy():
    program = """
import mmap
from planrt.workers.serving.isolation import mappings
mappings._opened = lambda one: -1  # as where map_files may not be read
page = mmap.mmap(-1, 3 * mmap.PAGESIZE)
page[:3] = b"abc"
import ctypes, os
start = ctypes.addressof(ctypes.c_char.from_buffer(page))
child = os.fork()
if not child:
    mappings.make_private((start + mmap.PAGESIZE, start + 2 * mmap.PAGESIZE))
    assert page[:3] == b"abc"
    page[:3] = b"xyz"
    page[mmap.PAGESIZE : mmap.PAGESIZE + 3] = b"def"
    assert [end - start for start, end, _ in mappings.shared_mappings()] == [mmap.PAGESIZE]
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
print(page[:3], page[mmap.PAGESIZE : mmap.PAGESIZE + 3])
"""
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=60
    )
    assert ended.stdout.strip() == "b'abc' b'def'", ended.stderr


def test_a_data_set_that_reads_files_which_are_not_granted_is_refused_before_it_is_served(folder):
    def server(**more):
        worker = WebsocketServerWorker("bob", isolation=True, **more)
        worker.add_dataset(Reading(folder / "secret"), "images")
        return worker

    state = server()._state
    if confining.landlock_version():
        with pytest.raises(
            OptionError, match=r"'images': item 0 cannot be read: PermissionError.*--readable"
        ):
            try_out(state, None, [])
    try_out(state, None, [folder / "secret"])
    with pytest.raises(IsolationError, match="confined here: .*no/such"):
        try_out(state, None, [Path("no/such")])


def test_files_that_are_open_do_not_grow(tmp_path):
    program = """
import sys
from planrt.workers.serving.isolation.confining import confine
with open(sys.argv[1], "w") as file:
    confine(memory=None, readable=[])
    file.write("more")
"""
    target = tmp_path / "file"
    command = [sys.executable, "-c", program, str(target)]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert "File too large" in ended.stderr
    assert target.read_text() == ""
    with open(tmp_path / "log", "w") as log:  # where the worker's log is a file it goes on
        assert subprocess.run(command, stdout=log, cwd=ROOT, timeout=60).returncode == 0
    assert target.read_text() == "more"


@pytest.mark.parametrize(
    ("version", "machine", "says"),
    [
        (7, "x86_64", []),
        (5, "x86_64", ["Landlock has version 5, not 6: signals"]),
        (0, "aarch64", ["no Landlock: files"]),
        (4, "riscv64", ["Landlock has version 4", "no system call filter for riscv64: only TCP is closed"]),
        (
            3,
            "riscv64",
            ["Landlock has version 3", "no system call filter for riscv64: sockets of every kind"],
        ),
    ],
)
def test_each_part_that_a_kernel_lacks_is_said_once(monkeypatch, version, machine, says):
    monkeypatch.setattr(confining, "landlock_version", lambda: version)
    monkeypatch.setattr("platform.machine", lambda: machine)
    lacks = confining.missing()
    assert len(lacks) == len(says)
    assert all(lack.startswith(said) for lack, said in zip(lacks, says, strict=True))


def test_a_failure_on_data_is_in_the_owners_log_before_its_client_hears_of_it(folder):
    """So that a process which its client then crashes takes nothing along that the owner is to know."""
    path = folder / "failures.jsonl"
    server = Server(
        folder=str(folder), users=USERS, isolation=True, audit=str(path),
        policy={"approval": "open", "max_failures": 2},
    )  # fmt: skip
    try:
        with server.connect("ann") as ann:
            with pytest.raises(RemoteError):
                fit(ann, "read")
            for process in server.processes():  # at once
                os.kill(process, signal.SIGKILL)
        lines = [json.loads(line) for line in whole_lines(path)]
        assert any(line.get("outcome") == "failed" or line["event"] == "failed" for line in lines), lines
        assert main(["audit", str(path), "--check"]) == 0
    finally:
        server.end()


def test_what_this_kernel_lacks_is_named():
    assert all(isinstance(one, str) for one in confining.missing())
    assert (confining.landlock_version() == 0) == any("Landlock:" in one for one in confining.missing())


# ------------------------------------------------------------------------- everything else is as it was before


@pytest.fixture(scope="module")
def hospital(tmp_path_factory):
    """A worker without users, whose plans its owner approves; what is under way ends when the worker is killed."""
    folder = tmp_path_factory.mktemp("hospital")
    started = Server(
        folder=str(folder), isolation=True, policy={"approval": "ask"}, approvals=str(folder / "approvals"),
        audit=str(folder / "audit.jsonl"),
    )  # fmt: skip
    started.folder = folder
    yield started
    started.end()


@planrt.func2plan(args_shape=[(4,)])
def doubled(x):
    return x * 2


def test_plans_are_put_before_the_owner_and_run_once_approved(hospital):
    x = torch.arange(4.0)
    folder = str(hospital.folder / "approvals")
    with hospital.connect(None) as worker:
        there = doubled.send(worker)
        with pytest.raises(NotApprovedError, match="waits for the owner's approval"):
            there(x.send(worker)).get()
        assert worker.approval(doubled).status == "pending"
        assert main(["approve", doubled.hash, "--folder", folder, "--by", "the owner"]) == 0
        assert torch.equal(there(x.send(worker)).get(), x * 2)
    lines = [json.loads(line) for line in whole_lines(hospital.folder / "audit.jsonl")]
    told = [(one["event"], one.get("outcome")) for one in lines]
    assert ("asked", None) in told
    assert ("call", "done") in told
    assert ("opened", None) in told
    until(lambda: '"ended"' in (hospital.folder / "audit.jsonl").read_text())
    assert main(["audit", str(hospital.folder / "audit.jsonl"), "--check"]) == 0


def test_without_users_each_session_has_its_own_process_and_goes_on_over_another_connection(hospital):
    until(lambda: gone(hospital.processes()))  # of sessions before
    with hospital.connect(None, reconnect=30) as one, hospital.connect(None) as other:
        x, y = torch.ones(3).send(one), torch.ones(3).send(other)
        assert len([each for each in hospital.processes() if not gone([each])]) == 2
        cut(one)
        assert torch.equal(x.get(), torch.ones(3))
        assert torch.equal(y.get(), torch.ones(3))


def cut(worker):
    """Breaks the connection of a client, as a network would."""
    pipe = worker._connection._pipe
    planrt.loop.background_loop().call_soon_threadsafe(pipe._connection.transport.abort)
    until(lambda: worker._connection._pipe is not pipe)


def test_the_same_bits_with_and_without(server, ann):
    plain = WebsocketServerWorker("bob", threads=1)
    plain.add_dataset(BaseDataset(ROWS, ROWS.sum(1)), "rows")
    with plain.running() as uri, WebsocketClientWorker("bob", uri=uri, auto_add=False) as other:
        results = []
        for worker in (ann, other):
            torch.manual_seed(11)
            x = torch.randn(64, 64).send(worker).requires_grad_()
            (x @ x).softmax(1).std().backward()
            trained = fit(worker, "rows", optimizer_args={"lr": 0.01}, epochs=3)
            torch.manual_seed(12)
            drawn = torch.nn.functional.dropout(x.detach(), 0.3).sum()
            results.append([x.grad.get(), torch.tensor(trained.loss), drawn.get()])
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


def test_objects_move_to_workers_without_isolation_and_back(server, ann):
    with (
        WebsocketServerWorker("jim", threads=1).running() as uri,
        WebsocketClientWorker("jim", uri=uri) as jim,
    ):
        x = torch.arange(5.0).send(ann)
        x.move(jim)
        assert torch.equal((x.move(ann) + 1).get(), torch.arange(1.0, 6))


def test_a_worker_acts_in_the_name_of_its_client_in_that_ones_process(server):
    with (
        WebsocketServerWorker("alice", threads=1).running() as uri,
        WebsocketClientWorker("alice", uri=uri, auto_add=False) as alice,
        server.connect("ann") as bob,
    ):
        chained = torch.tensor([1.0, -1.0]).send(bob, allowed_users=["ann"]).send(alice)
        assert chained[chained > 0].get().get().tolist() == [1]
        for _ in range(2):
            assert torch.ones(2).send(alice).move(bob).get().tolist() == [1, 1]
    assert ("ann", "alice") in acted_for(server)


def acted_for(server):
    path = Path(server.options["audit"])
    lines = [json.loads(line) for line in whole_lines(path)]
    return {(one["user"], one["by"]) for one in lines if "by" in one}


def test_a_wrong_token_is_refused_as_before(server):
    with pytest.raises(planrt.errors.HandshakeError, match="token"):
        WebsocketClientWorker("bob", uri=server.uri, token="nobody's token at all", auto_add=False)


@pytest.fixture(scope="module")
def secure(folder, tmp_path_factory):
    """A worker that is reached over TLS."""
    tmp_path = tmp_path_factory.mktemp("certificates")
    authority = trustme.CA()
    made = authority.issue_cert("127.0.0.1")
    paths = {name: tmp_path / name for name in ("ca", "cert", "key")}
    blobs = {"ca": [authority.cert_pem], "cert": made.cert_chain_pems, "key": [made.private_key_pem]}
    for name, path in paths.items():
        path.write_bytes(b"".join(one.bytes() for one in blobs[name]))
        path.chmod(0o600)
    started = Server(
        folder=str(folder), users=USERS, isolation=True, cert_path=str(paths["cert"]), key_path=str(paths["key"])
    )  # fmt: skip
    started.ca = paths["ca"]
    yield started
    started.end()


def test_over_tls(secure):
    with secure.connect("ann", ca=secure.ca) as ann, secure.connect("ben", ca=secure.ca) as ben:
        large = torch.arange(3_000_000.0)
        assert torch.equal((large.send(ann) * 2).get(), large * 2)
        assert works(ben)
        with pytest.raises(SessionLostError, match="SIGSEGV while a batch of"):
            fit(ann, "crash")
        assert works(ben)
        with secure.connect("ann", ca=secure.ca) as again:
            assert works(again)


# ------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"isolation": "on"}, "isolation is True or False"),
        ({"isolation": 1}, "isolation is True or False"),
        ({"isolation": True, "kernel_timeout": 0}, "number of seconds above 0"),
        ({"isolation": True, "kernel_timeout": float("nan")}, "number of seconds above 0"),
        ({"isolation": True, "kernel_timeout": True}, "number of seconds above 0"),
        ({"isolation": True, "process_memory": 5}, "at least 67,108,864"),
        ({"isolation": True, "process_memory": "4 GiB"}, "number of bytes"),
        ({"isolation": True, "readable": "/tmp"}, "list of files"),
        ({"isolation": True, "readable": ["/no/such/folder"]}, "is not there"),
        ({"kernel_timeout": 5.0}, "are for workers with isolation=True"),
    ],
)
def test_what_is_wrong_is_said_before_anything_starts(options, says):
    with pytest.raises(OptionError, match=says):
        WebsocketServerWorker("bob", **options)


def test_a_worker_within_another_process_has_no_isolation_and_says_so():
    server = WebsocketServerWorker("bob", isolation=True)
    with pytest.raises(OptionError, match=r"call start\(\) in a process of its own"), server.running():
        pass
    with pytest.raises(OptionError, match="isolation"):
        server.start()  # this process has threads
    with pytest.raises(TypeError):
        VirtualWorker("bob", isolation=True)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--isolation", "yes"], "invalid choice"),
        (["--kernel-timeout", "5"], "add --isolation on"),
        (["--isolation", "on", "--kernel-timeout", "0"], "above 0"),
        (["--isolation", "on", "--process-memory", "lots"], "process-memory"),
        (["--isolation", "on", "--readable", "/no/such/file"], "is not there"),
    ],
)
def test_the_command_says_what_is_wrong(options, says, capsys):
    with contextlib.suppress(SystemExit):
        assert main(["serve", "--id", "bob", "--empty", "--port", "0", *options]) != 0
    assert says in capsys.readouterr().err


def test_data_sets_stay_as_they_are_while_it_serves(server):
    assert server.adding == ["OptionError: with isolation data sets are added before the worker starts"] * 2


# ---------------------------------------------------------------------------- how they end: the last of these servers


def test_ctrl_c_leaves_no_process(server):
    with server.connect("ann") as worker:
        assert works(worker)
        family = [*children(server.process.pid), *server.processes()]
        os.killpg(server.process.pid, signal.SIGINT)  # as a terminal does
        assert server.process.wait(120) == 0
        assert len(family) >= 2
        until(lambda: gone(family))
        with pytest.raises(WorkerLostError, match="has stopped"):
            works(worker)


def test_a_worker_that_is_killed_leaves_no_process_not_even_a_busy_one(secure):
    with secure.connect("ann", ca=secure.ca) as worker:
        assert works(worker)
        family = [*children(secure.process.pid), *secure.processes()]
        x = torch.ones(3000, 3000).send(worker)
        for _ in range(20):
            x = x.mm(x)
        secure.process.kill()
        until(lambda: gone(family))


def test_without_the_process_that_makes_others_the_worker_ends(hospital):
    with hospital.connect(None) as worker:
        (zygote,) = children(hospital.process.pid)
        family = hospital.processes()
        os.kill(zygote, signal.SIGKILL)
        assert hospital.process.wait(120) != 0
        assert family
        until(lambda: gone(family))
        with pytest.raises(WorkerLostError):
            worker.approval(doubled)


# -------------------------------------------------------------------------------- what a process says is looked at


class Recorded:
    """A log, and decisions, that keep what they are told."""

    def __init__(self):
        self.told = []

    def record(self, event):
        self.told.append(event)

    def full(self, user):
        return ""

    def write(self):
        pass

    def submit(self, plan, data, **asking):
        self.told.append((plan, data, asking))
        return Status("pending")


@pytest.fixture
def of_user(tmp_path):
    """``of_user(name)``: what answers the calls of a process for that user, and what is told then."""
    ours, theirs = socket.socketpair()
    state = WorkerState("bob")
    with ours, theirs:

        def start(user, everything=False):
            told, dialling = Recorded(), Dialling()
            answers = Answers(
                "bob", Limits(), dialling, told, told, state, lambda *about: None, lambda *about: None,
                joint_runs=JointFolder(tmp_path / "joint", "bob"),
            )  # fmt: skip
            giver = Session("process 1", user)
            process = SimpleNamespace(
                bindings=[],
                proofs={},
                user=user,
                key="it",
                connections={},
                dials=set(),
                gifts=ours,
                giver=giver,
                figures=Figures(),
            )
            call = lambda *call: asyncio.run(answers.answer(process, list(call)))  # noqa: E731
            return (call, told.told, process, dialling) if everything else (call, told.told)

        yield start


def asking(user):
    return {"name": "mean", "inputs": ["x"], "user": user, "data": [], "purpose": "", "time": ""}


def test_a_process_gives_tickets_for_its_user_only_and_so_many(of_user):
    asked = {"type": "delegate", "worker": "alice", "permits": "put"}
    checks = str(Verifier.of_secret("0" * 32, "a secret"))
    call, _ = of_user("ann")
    assert call("ticket", "0" * 32, "no verifier", asked)[0] is False
    assert call("ticket", "0" * 32, checks, {**asked, "permits": "everything"})[0] is False
    for number in range(4096):
        assert call("ticket", f"{number:032x}", checks, asked) == (True, None)
    assert call("ticket", "f" * 32, checks, asked)[0] is False
    call("ticket_over", "0" * 32)
    assert call("ticket", "f" * 32, checks, asked) == (True, None)
    other, _ = of_user("ben")
    other("ticket_over", "f" * 32)  # which is none of ben's
    assert call("ticket", "e" * 32, checks, asked)[0] is False


def test_a_process_cannot_speak_for_another_user(of_user):
    call, told = of_user("ann")
    assert call("audit", [{"event": "fetch", "user": "ben"}])[0] is False
    assert call("audit", [{"event": "fetch", "user": "ann"}, {"event": "fetch", "user": "ben"}])[0] is False
    assert call("submit", "0" * 64, b"", asking("ben"))[0] is False
    assert [one for one in told if "ben" in repr(one)] == []
    assert call("audit", [{"event": "fetch", "user": "ann"}]) == (True, "")
    assert call("audit", [{"event": "made up", "user": "ann"}]) == (False, "no event of the log")
    assert call("audit", [{"event": "fetch", "user": "ann", "op": "x" * 70_000}])[0] is False
    assert call("submit", "0" * 64, b"", asking("ann")) == (True, ["said", ["pending", ""]])
    assert call("submit", "0" * 64, b"", {**asking("ann"), "purpose": "x" * 70_000})[0] is False
    call, told = of_user(None)
    assert call("audit", [{"event": "fetch", "user": "ann"}])[0] is False
    assert told == []


@pytest.mark.parametrize(
    "call",
    [
        ("audit", 5), ("audit", ["line"]), ("submit", "x", b"", {"name": 5}), ("submit", "x", "y", None),
        ("submit", "x", b"", None, None), ("submit", "0" * 64, b"", None),
        ("status",), ("dial", "x", 1, 2), ("opened", "x", 3), ("closed", 99),
        ("closed", None), ("stop",), ("nonsense", {}), ("figures", None), ("figures", {"sessions": -1}),
        ("figures", {"sessions": 1 << 60}), ("figures", {"answers": {"ann has a rare disease": 1}}),
        ("figures", {"names": 1}), ("joint", "epochs"), ("joint", "read", "x", -1), ("joint", "read", "x", 10**9),
        ("joint", "write", "x", 1, "text"), ("joint", "write", "x", -1, b""), ("joint", "path", "x"),
        ("prove", None), ("prove", b"x"), ("prove_answer", 1, "x"), ("prove_check", 1, "x"),
    ],
)  # fmt: skip
def test_nonsense_from_a_process_does_nothing(of_user, call):
    answer, told = of_user("ann")
    given = answer(*call)
    assert given is None or given[0] is False
    assert told == []


def test_a_process_that_was_taken_over_does_not_fill_the_owners_queue(tmp_path):
    """How many plans of its user may wait is what the owner's policy says, and not what the process does."""
    approvals = Approvals(tmp_path / "approvals")
    process = SimpleNamespace(user="ann", key="it", connections={})
    answers = Answers(
        "bob", Limits(), Dialling(), None, approvals, WorkerState("bob"), lambda *about: None, lambda *about: None,
        max_pending=3,
    )  # fmt: skip

    def submit(number, *more):
        return asyncio.run(answers.answer(process, ["submit", f"{number:064x}", b"x", asking("ann"), *more]))

    assert [submit(number)[1][0] for number in range(5)] == ["said", "said", "said", "full", "full"]
    assert submit(6, None) is None  # as it was said before
    assert len(approvals.pending()) == 3


def test_counts_of_a_process_do_not_go_down(of_user):
    call, _ = of_user("ann")
    assert call("figures", {"answers": {"done": 3}, "sessions": 2}) is None
    assert call("figures", {"answers": {"done": 2}})[0] is False
    assert call("figures", {})[0] is False
    assert call("figures", {"answers": {"done": 3, "failure": 1}, "sessions": 0}) is None


def test_what_a_process_keeps_of_joint_runs_is_its_users(of_user):
    ann, _ = of_user("ann")
    assert ann("joint", "write", "credit", 1, b"anything") == (True, ["said", None])
    assert ann("joint", "epochs", "credit") == (True, ["said", [1]])
    assert ann("joint", "read", "credit", 1) == (True, ["said", b"anything"])
    for user in ("ben", None):
        other, _ = of_user(user)
        assert other("joint", "epochs", "credit") == (True, ["said", []])
        assert other("joint", "read", "credit", 1)[1][0] == "failed"
        assert other("joint", "forget", "credit") == (True, ["said", None])
    assert ann("joint", "epochs", "credit") == (True, ["said", [1]])

"""Encrypted tensors at workers that `planrt serve` runs, as their owners start them: with users, and so with isolation,
and with a list of whom they dial. Each is a process of its own, which is stopped and killed here.
"""

import contextlib
import copy
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import planrt
from planrt.errors import PlanrtError, SharingError
from planrt.workers import WebsocketClientWorker
from planrt.workers.serving import users_file

USERS = {"ann": "pTq7-Lm2x_VzR9sK", "ben": "hW4k+Jd8y/NcB3fG"}
NAMES = ("bob", "alice", "james")
PRECISION = {"base": 2, "precision_fractional": 16}
TIME = 15
"""Seconds that workers wait for one another here, where one stands still."""
PATIENT = 120
"""Seconds after which a test gives up; a connection that nothing bounds takes 80 to notice that the other side is
silent."""


@pytest.fixture(autouse=True, scope="module")
def hook():
    """Tensors have `send` and `share` from here on."""
    return planrt.TorchHook(torch)


class Served:
    """One worker's `planrt serve`, which may be stopped and killed, and started again at its address."""

    def __init__(self, name, users):
        self.name, self.users, self.port = name, users, 0
        self.start()

    def start(self):
        command = ["-m", "planrt", "serve", "--id", self.name, "--empty", "--port", str(self.port)]
        more = ["--users", str(self.users), "--peers", "127.0.0.1:*", "--threads", "1"]
        self.process = subprocess.Popen(
            [sys.executable, *command, *more],
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
            cwd="/",
        )

    def wait(self):
        lines = []
        while not lines or " serves at " not in lines[-1]:
            lines.append(self.process.stdout.readline())
            assert lines[-1], lines
        assert any(line.startswith("Isolation: on, with users") for line in lines)
        self.uri = lines[-1].split(" serves at ")[1].partition(";")[0].strip()
        self.port = int(self.uri.rpartition(":")[2])

    def signal(self, number):
        """Sends it to the worker and to the processes of its users."""
        first = psutil.Process(self.process.pid)
        for one in (first, *first.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                one.send_signal(number)

    @contextlib.contextmanager
    def stopped(self):
        self.signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.signal(signal.SIGCONT)

    def kill(self):
        self.signal(signal.SIGKILL)
        self.process.wait()
        self.process.stdout.close()

    def stop(self):
        self.process.terminate()
        self.process.wait()
        self.process.stdout.close()


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    users = tmp_path_factory.mktemp("served") / "users"
    for name, token in USERS.items():
        users_file.add(users, name, token)
    made = {}
    try:
        for name in NAMES:
            made[name] = Served(name, users)
        for one in made.values():
            one.wait()
        yield made
    finally:
        for one in made.values():
            one.stop()


@pytest.fixture
def connect(served):
    """``connect("ann")`` -> her clients of bob, alice and james."""
    with contextlib.ExitStack() as stack:

        def made(user):
            return [
                stack.enter_context(
                    WebsocketClientWorker(name, uri=served[name].uri, token=USERS[user], auto_add=False)
                )
                for name in NAMES
            ]

        yield made


class Sequences(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(3, 4, batch_first=True)
        self.head = nn.Linear(4, 1)

    def forward(self, x):
        return self.head(self.lstm(x)[0][:, -1])


def images():
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8, 3))


def trained(model, optimizer, loss, x, y, steps=3):
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        found = loss(model(x), y)
        found.backward()
        optimizer.step()
        losses.append(found.detach())
    return losses


def beside_plain(bob, alice, james, make, x, y, loss, seed=0):
    """Trains on shares and in the clear; what differs, at most, of losses and parameters."""
    torch.manual_seed(seed)
    plain = make()
    there = copy.deepcopy(plain).fix_precision(**PRECISION)
    there = there.share(bob, alice, crypto_provider=james, requires_grad=True)
    given = [
        one.fix_precision(**PRECISION).share(bob, alice, crypto_provider=james)
        if one.is_floating_point()
        else one.share(bob, alice, crypto_provider=james)
        for one in (x, y)
    ]
    mine = trained(plain, torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.5), loss, x, y)
    found = trained(there, torch.optim.SGD(there.parameters(), lr=0.1, momentum=0.5), loss, *given)
    pairs = [*zip(mine, found, strict=True), *zip(plain.parameters(), there.parameters(), strict=True)]
    return max(float((one.detach() - other.get()).abs().max()) for one, other in pairs)


def data(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def sequences(bob, alice, james, seed=0):
    x, y = data(4, 3, 3, seed=seed), data(4, 1, seed=seed + 1)
    return beside_plain(bob, alice, james, Sequences, x, y, F.mse_loss, seed)


def test_an_lstm_is_trained_beside_plain_pytorch(connect):
    assert sequences(*connect("ann")) < 2e-3


def test_a_convolutional_network_is_trained_beside_plain_pytorch(connect):
    x, y = data(4, 1, 6, 6, seed=1), torch.tensor([0, 2, 1, 2])
    assert beside_plain(*connect("ben"), images, x, y, F.cross_entropy) < 2e-3


def test_two_users_compute_with_the_same_parties_at_once(connect):
    found = {}

    def run(user, workers, seed):
        try:
            found[user] = [sequences(*workers, seed=seed + number) for number in range(2)]
        except BaseException as error:
            found[user] = error

    threads = [
        threading.Thread(target=run, args=(user, connect(user), seed))
        for user, seed in (("ann", 10), ("ben", 20))
    ]
    for one in threads:
        one.start()
    for one in threads:
        one.join(120)
    for user in USERS:
        assert not isinstance(found[user], BaseException), found[user]
        assert max(found[user]) < 2e-3, user


# ------------------------------------------------------------------------------- a party that stops, or is gone


def shared(values, bob, alice, james, **options):
    return values.fix_precision(**PRECISION).share(bob, alice, crypto_provider=james, **options)


def works(workers):
    x = data(20, seed=3)
    return bool(((shared(x, *workers) * 2).relu().get() - (2 * x).relu()).abs().max() < 1e-3)


CALLS = {
    "an operation": lambda x, there, workers: (x * x).relu().get(),
    "get": lambda x, there, workers: x.get(),
    "get of what was computed": lambda x, there, workers: (x + x).get(),
    "share at a worker": lambda x, there, workers: (
        there.fix_precision(**PRECISION)
        .share(*workers[:2], crypto_provider=workers[2], timeout=TIME)
        .get()
        .get()
    ),
    "share anew": lambda x, there, workers: (
        shared(torch.ones(3), *workers, timeout=TIME + 0.5).get(),
        pytest.fail("nobody was missed"),
    ),
}


@pytest.mark.parametrize("name", NAMES)
def test_a_worker_that_stands_still_ends_every_wait_by_the_time_out(name, served, connect):
    """Whatever is waited for: an opening, corrections, a part, or what another worker hands over. All is waited for at
    once, each by clients of its own: so the time can be one that the others, who only are slow, do not need."""
    given = {}
    for what in CALLS:
        if name == "james" and what.startswith("get"):
            continue  # who only opens has no need of the dealer
        workers = connect("ann")
        x, there = shared(data(20, seed=4), *workers, timeout=TIME), data(20, seed=5).send(workers[0])
        assert x.get().shape == there.shape
        given[what] = x, there, workers

    def waits(what):
        with planrt.waiting(PATIENT):
            if name == "james" and what == "share at a worker":
                CALLS[what](*given[what])
                return
            with pytest.raises(SharingError, match=f"'{name}'.* did not answer within"):
                pytest.fail(f"{what}: {CALLS[what](*given[what])}")

    with ThreadPoolExecutor(len(given)) as pool, served[name].stopped():
        for waiting in [pool.submit(waits, what) for what in given]:
            waiting.result()
    for what, (_, _, workers) in given.items():
        assert works(workers), what


@pytest.mark.parametrize("name", ["alice", "james"])
def test_a_worker_that_is_killed_meanwhile_is_named_and_new_work_goes_on(name, served, connect):
    workers = connect("ben")
    x = shared(data(40, 40, seed=6), *workers, timeout=60)
    x.get()
    for _ in range(40):  # it computes for a while
        x = (x @ x).relu() * 0.01
    x.session.flush()
    served[name].kill()
    try:
        with planrt.waiting(PATIENT), pytest.raises(SharingError, match=name):
            x.get()
        with planrt.waiting(PATIENT), pytest.raises(PlanrtError):
            (x + 1).get()
    finally:
        served[name].start()
        served[name].wait()
    assert works(connect("ben"))
    assert works(connect("ann"))

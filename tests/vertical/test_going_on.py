"""Joint runs that go on: after the client, a party or a link was gone, with the same bits as without the break."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from torch import nn

from planrt.errors import JointError, OptionError
from planrt.fl.runs.children import ChildOptions, WorkerProcesses
from planrt.sharing.columns.regression import Terms
from planrt.vertical import Party, Table, linear_regression, logistic_regression, split_network
from planrt.workers import VirtualWorker, WebsocketClientWorker, WebsocketServerWorker
from tests.vertical.tables import SHORT, halves, joined, some, whole

pytestmark = pytest.mark.filterwarnings("ignore:a key of 1024 bits")


class Site:
    """Workers with folders of their own, which can all be stopped and started again."""

    def __init__(self, transport, folder, tables):
        self.transport, self.folder, self.tables = transport, folder, tables
        self._stack = contextlib.ExitStack()
        self.workers = {}

    def start(self):
        for id, table in self.tables.items():
            options = {"joint_runs": self.folder / id}
            if self.transport == "memory":
                worker = VirtualWorker(id, datasets={} if table is None else {"t": table}, **options)
            else:
                server = WebsocketServerWorker(id, threads=1, **options)
                if table is not None:
                    server.add_dataset(table, "t")
                worker = WebsocketClientWorker(id, uri=self._stack.enter_context(server.running()))
            self.workers[id] = self._stack.enter_context(worker)
        return self

    def stop(self):
        self._stack.close()

    def restart(self):
        self.stop()
        return self.start()

    def party(self, id, ids, columns, label=None):
        return Party(self.workers[id], "t", ids, columns, label=label)

    def two(self):
        return self.party("alice", "id", ["a", "b"]), self.party("bob", "who", ["c", "d", "e"], "y")

    @contextlib.contextmanager
    def as_it_was(self):
        """What the workers keep now is what they keep afterwards."""
        before = self.folder.with_name("before")
        shutil.copytree(self.folder, before)
        yield
        shutil.rmtree(self.folder)
        before.rename(self.folder)


@pytest.fixture
def site(transport, tmp_path):
    left, right = halves(whole())
    made = Site(transport, tmp_path / "kept", {"alice": left, "bob": right, "carol": None})
    yield made.start()
    made.stop()


ABOUT = {"normalise": "casefold", "epochs": 4, "batch_size": 20, "seed": 5, "keep": "credit"}


def regression(site, model=logistic_regression, **options):
    return model(*site.two(), key_holder=site.workers["carol"], **{**ABOUT, **SHORT, **options})


@pytest.mark.parametrize("model", [linear_regression, logistic_regression])
def test_a_regression_goes_on_with_the_same_bits(site, model):
    with regression(site, model, holdout=0.25, keep="") as run:
        losses, weights, figures = run.fit(), run.weights(), run.evaluate()
    with regression(site, model, holdout=0.25) as run:
        assert run.fit(2) == losses[:2]
    site.restart()
    with regression(site, model, holdout=0.25, resume=True) as run:
        assert run.resumed
        assert (run.size, run.people) == (40, 30)
        assert run.losses == losses[:2]
        assert run.fit() == losses
        assert run.weights() == weights
        assert run.evaluate() == figures
    with regression(site, model, holdout=0.25, resume=True) as run:  # it is finished, and still predicts
        assert run.weights() == weights
        with pytest.raises(OptionError, match="0 are left"):
            run.fit(1)


def test_the_learning_rate_is_lowered_from_epoch_to_epoch(site):
    """As by hand in plain PyTorch: batches of 20 and 12, and more epochs than the run was opened for at first."""
    rates = [0.4, 0.2, 0.1]
    for epoch, lr in enumerate(rates):
        about = {"epochs": epoch + 1, "lr": lr, "holdout": 0.2, "standardise": False, "resume": epoch > 0}
        with regression(site, **about) as run:
            assert len(run.fit()) == epoch + 1
            found = run.weights()
    values, labels = joined(whole(), seed=5, holdout=0.2)
    data, target = torch.from_numpy(values), torch.from_numpy(labels)
    net = nn.Linear(5, 1, dtype=torch.float64)
    nn.init.zeros_(net.weight)
    nn.init.zeros_(net.bias)
    terms = Terms("logistic", ("a", "b", "c"), 1, 32, 20, 0.1, 0.0, 5)
    for epoch, lr in enumerate(rates):
        optimizer = torch.optim.SGD(net.parameters(), lr=lr)
        for rows in terms.batches(epoch):
            optimizer.zero_grad()
            score, sign = net(data[rows])[:, 0], 2 * target[rows] - 1
            (np.log(2) - sign * score / 2 + score**2 / 8).mean().backward()
            optimizer.step()
    flat = [weight for owned in found.values() for weight in owned.values()]
    expected = torch.cat([net.weight[0], net.bias]).detach().numpy()
    np.testing.assert_allclose(flat, expected, atol=2e-6)


def test_an_early_stop_is_where_it_would_have_been(site):
    stop = {"tolerance": 1e-2, "patience": 2}
    with regression(site, epochs=30, lr=0.5, keep="") as run:
        losses = run.fit(**stop)
    assert 4 < len(losses) < 30
    with regression(site, epochs=30, lr=0.5) as run:
        run.fit(len(losses) - 1)
    with regression(site, epochs=30, lr=0.5, resume=True) as run:
        assert run.fit(**stop) == losses
        assert run.fit(1)[:-1] == losses


def network(site, *, optimizer="Adam", options=None, **more):
    torch.manual_seed(1)
    bottoms = [
        nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Dropout(0.5)),
        nn.Sequential(nn.Linear(3, 3), nn.Tanh()),
    ]
    top = nn.Sequential(nn.Linear(7, 5), nn.Dropout(0.2), nn.ReLU(), nn.Linear(5, 1))
    run = split_network(
        *site.two(), bottoms=bottoms, top=top, loss_fn=nn.BCEWithLogitsLoss(), optimizer=optimizer,
        optimizer_args=options or {"lr": 0.01}, **{**ABOUT, **more},
    )  # fmt: skip
    return run, nn.ModuleList([*bottoms, top])


@pytest.mark.parametrize(
    ("optimizer", "options"), [("Adam", {"lr": 0.01}), ("SGD", {"lr": 0.1, "momentum": 0.9})]
)
def test_a_network_in_parts_goes_on_with_the_same_bits(site, optimizer, options):
    """Also what the optimizers keep, running means, and the owners' own noise, which no seed of the client's gives."""
    more = {"optimizer": optimizer, "options": options, "noise": 0.3}
    run, modules = network(site, **more)
    run.fit(2)
    with site.as_it_was():
        losses = run.fit()
        predictions = run.predict(["person 30"])
        run.get()
        run.close()
    weights = {name: value.clone() for name, value in modules.state_dict().items()}
    assert int(weights["0.1.num_batches_tracked"]) == 8
    site.restart()
    run, modules = network(site, **more, resume=True)
    with run:
        assert run.losses == losses[:2]
        assert run.fit() == losses
        assert torch.equal(run.predict(["person 30"]), predictions)
        run.get()
    for name, value in modules.state_dict().items():
        assert torch.equal(value, weights[name]), name


def test_a_party_that_had_not_kept_the_last_epoch_is_waited_for(site):
    with regression(site, keep="") as run:
        losses, weights = run.fit(), run.weights()
    with regression(site) as run:
        run.fit(3)
    for path in (site.folder / "bob").glob("*-0000003.run"):
        path.unlink()
    site.restart()
    with regression(site, resume=True) as run:
        assert run.losses == losses[:2]
        assert run.fit() == losses
        assert run.weights() == weights


def test_three_owners_go_on(transport, tmp_path):
    table = whole(90)
    tables = {
        "alice": Table(some(table, ["id", "a", "b"], range(70)), "id"),
        "bob": Table(some(table, ["id", "c"], range(5, 85)), "id"),
        "dan": Table(some(table, ["id", "d", "e", "y"], range(10, 90)), "id"),
        "carol": None,
    }
    site = Site(transport, tmp_path / "kept", tables).start()

    def opened(**more):
        owners = (
            site.party("alice", "id", ["a", "b"]),
            site.party("bob", "id", ["c"]),
            site.party("dan", "id", ["d", "e"], "y"),
        )
        return logistic_regression(*owners, key_holder=site.workers["carol"], **{**ABOUT, **SHORT, **more})  # fmt: skip

    try:
        with opened(keep="") as run:
            losses, weights = run.fit(), run.weights()
        with opened() as run:
            run.fit(1)
        site.restart()
        with opened(resume=True) as run:
            assert run.size == 60
            assert run.fit() == losses
            assert run.weights() == weights
    finally:
        site.stop()


def test_what_cannot_go_on_is_refused_by_name(site):
    def refused(match, kind=JointError, **options):
        with pytest.raises(kind, match=match):
            regression(site, **options)

    refused("alice.*has kept nothing under the name 'credit'", resume=True)
    refused("keep='that name'", OptionError, keep="", resume=True)
    refused("keep is a name", OptionError, keep="x" * 300)
    with regression(site) as run:
        pass  # nothing was trained: the name is free
    with regression(site) as run:
        run.fit(2)
        with pytest.raises(JointError, match="has ended|known here|has kept"):
            regression(site)
    refused("has kept 'credit' after 2 epochs: go on with it")
    refused("other terms", resume=True, l2=0.2)
    refused("other terms", resume=True, holdout=0.5)
    refused("has kept nothing under the name 'debit'", resume=True, keep="debit")
    whose = site.folder / "bob"
    with site.as_it_was():
        for path in whose.glob("*.run"):
            path.write_bytes(path.read_bytes()[:-7])
        refused("bob.*is damaged", resume=True)
    with site.as_it_was():
        for path in whose.glob("*-0000002.run"):
            path.rename(path.with_name(path.name.replace("0000002", "0000009")))
        for path in whose.glob("*-0000001.run"):
            path.unlink()
        refused("no epoch that all of them have .*bob 9", resume=True)
    site.tables["bob"].columns["c"][7] += 1e-9
    site.restart()
    refused("the table at party 'bob' is not the one", resume=True)
    with VirtualWorker("plain", datasets={"t": site.tables["alice"]}) as plain:
        _, bob = site.two()
        with pytest.raises(
            JointError, match="'plain' keeps no joint runs: its owner starts it with --joint-runs"
        ):
            logistic_regression(
                Party(plain, "t", "id", ["a", "b"]), bob, key_holder=site.workers["carol"], **ABOUT, **SHORT
            )


def test_parties_that_kept_different_runs_do_not_go_on_together(site):
    with regression(site) as run:
        run.fit(1)
    shutil.copytree(site.folder / "bob", site.folder / "other")
    with regression(site, resume=True) as run:
        run.forget()
    with regression(site) as run:
        run.fit(1)
    shutil.rmtree(site.folder / "bob")
    (site.folder / "other").rename(site.folder / "bob")
    with pytest.raises(JointError, match="go on from one run"):
        regression(site, resume=True)


def test_a_run_is_forgotten_and_only_its_newest_epochs_are_there(site):
    with regression(site) as run:
        run.fit(4)
        names = sorted(path.name[-11:] for path in (site.folder / "alice").iterdir())
        assert names == ["0000003.run", "0000004.run"]
        run.forget()
    assert not any(path.is_file() for path in site.folder.rglob("*.run"))
    with pytest.raises(JointError, match="has kept nothing"):
        regression(site, resume=True)


def test_a_folder_that_is_full_ends_the_run_and_keeps_what_was_there(site, monkeypatch):
    from planrt.serde.disk import Disk

    with regression(site, keep="") as run:
        losses = run.fit()
    run = regression(site)
    run.fit(2)

    def full(self, file, data):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Disk, "write", full)
        with pytest.raises(
            JointError, match="cannot keep 'credit': No space left.*what it kept before is there"
        ):
            run.fit()
    with regression(site, resume=True) as run:
        assert run.losses == losses[:2]
        assert run.fit() == losses


CLIENT = """
    import sys, time, warnings
    warnings.simplefilter("ignore")
    from planrt.vertical import Party, logistic_regression
    from planrt.workers import WebsocketClientWorker
    alice, bob, carol = [WebsocketClientWorker(id, uri=uri) for id, uri in zip(("alice", "bob", "carol"), sys.argv[1:])]
    run = logistic_regression(
        Party(alice, "left", "id", ["a", "b"]), Party(bob, "right", "who", ["c", "d", "e"], label="y"),
        key_holder=carol, normalise="casefold", epochs=10, batch_size=20, seed=5, keep="credit", key_bits=1024,
        allow_short_key=True,
    )
    for _ in range(5):
        run.fit(1)
        print("epoch", flush=True)
    time.sleep(600)
"""
"""It trains on while it is killed, unless that takes long; the other epochs are for who goes on."""


def test_a_run_goes_on_after_its_client_and_a_party_were_killed(tmp_path):
    left, right = halves(whole())
    for name, one in (("left", left), ("right", right)):
        columns = {**one.ids, **{key: values.tolist() for key, values in one.columns.items()}}
        lines = [",".join(columns), *[",".join(map(str, row)) for row in zip(*columns.values(), strict=True)]]
        (tmp_path / f"{name}.csv").write_text("\n".join(lines) + "\n")

    def child(id, *options):
        return ChildOptions(id, 0, (*options, "--threads", "1", "--joint-runs", str(tmp_path / id)))

    tables = [
        child("alice", "--dataset", str(tmp_path / "left.csv"), "--id-column", "id"),
        child("bob", "--dataset", str(tmp_path / "right.csv"), "--id-column", "who", "--label-column", "y"),
    ]

    def opened(workers, **more):
        alice, bob, carol = workers
        return logistic_regression(
            Party(alice, "left", "id", ["a", "b"]), Party(bob, "right", "who", ["c", "d", "e"], label="y"),
            key_holder=carol, normalise="casefold", epochs=10, batch_size=20, seed=5, **SHORT, **more,
        )  # fmt: skip

    with contextlib.ExitStack() as stack:
        rest = stack.enter_context(WorkerProcesses([tables[1], child("carol", "--empty")]))
        with WorkerProcesses([tables[0]]) as mortal:
            at = mortal.wait_ready() | rest.wait_ready()
            uris = [at[id].uri for id in ("alice", "bob", "carol")]
            client = subprocess.Popen(
                [sys.executable, "-c", textwrap.dedent(CLIENT), *uris], stdout=subprocess.PIPE, text=True
            )
            try:
                for _ in range(3):
                    assert client.stdout.readline() == "epoch\n"
            finally:
                client.send_signal(signal.SIGKILL)
                client.wait()
                client.stdout.close()
            workers = [WebsocketClientWorker(id, uri=at[id].uri, auto_add=False) for id in at]
            for one in workers:
                stack.callback(one.close)
            workers.sort(key=lambda one: one.id)
            run = opened(workers, keep="credit", resume=True)
            assert len(run.losses) >= 3
            run.fit(2)
            os.kill(mortal.pids["alice"], signal.SIGKILL)
            with pytest.raises(JointError, match=r"'alice' is gone.*keep='credit', resume=True"):
                run.fit()
            done = run.losses
        with WorkerProcesses([tables[0]]) as again:
            uri = again.wait_ready()["alice"].uri
            workers[0] = stack.enter_context(WebsocketClientWorker("alice", uri=uri, auto_add=False))
            with opened(workers, keep="credit", resume=True) as run:
                assert run.losses[: len(done)] == done
                losses, weights = run.fit(), run.weights()
            with opened(workers) as run:
                assert run.fit() == losses
                assert run.weights() == weights

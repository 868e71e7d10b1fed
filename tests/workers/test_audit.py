"""The owner's audit log of a worker: what is in it, what never is, and what happens where it cannot be written."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import stat
import time
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import planrt
from planrt.chained import FIRST, sealed
from planrt.cli import main
from planrt.errors import (
    GetNotPermittedError,
    HandshakeError,
    NotApprovedError,
    OptionError,
    PlanrtError,
    PolicyRefusedError,
    RemoteError,
    TransportError,
)
from planrt.fl import TrainConfig
from planrt.plans.policy.rules import Policy, ReleaseRule
from planrt.shown import hidden
from planrt.types import Ref
from planrt.workers import BaseDataset, VirtualWorker, WebsocketClientWorker, WebsocketServerWorker
from planrt.workers.machine.events import Received
from planrt.workers.machine.state import WorkerState
from planrt.workers.serving import audit_file, summing
from planrt.workers.serving.audit_file import AuditFile
from planrt.workers.wire import messages as m
from planrt.workers.wire.plan_call import CALL
from planrt.workers.wire.posted import PostedOp
from tests.proving import open_session

OWNER, ALICE = "the owner's token: 4711", "the token of alice: 0815"
SECRET = 189_930.0
COVERED = Policy(approval="open", release=(ReleaseRule("#patients", min_rows=20),))


@pytest.fixture(scope="module", autouse=True)
def hook():
    return planrt.TorchHook(torch)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "audit.jsonl"


@pytest.fixture
def hospital(transport, path):
    """``hospital(policy, ...)`` -> ``connect(token)``, which gives a client; the log is at `path`."""
    with contextlib.ExitStack() as stack:

        def start(policy=None, *, approvals=None, datasets=None):
            given = {
                "users": {"owner": OWNER, "alice": ALICE}, "policy": policy, "approvals": approvals, "audit": path,
            }  # fmt: skip
            if transport == "memory":
                worker = stack.enter_context(VirtualWorker("hospital", auto_add=False, **given))
                add = worker
            else:
                add = WebsocketServerWorker("hospital", threads=1, **given)
                uri = stack.enter_context(add.running())
            for key, dataset in (datasets or {}).items():
                add.add_dataset(dataset, key, tags=("#patients",))
            if transport == "memory":
                return lambda token="": stack.enter_context(worker.connect_as(token))
            return lambda token="": stack.enter_context(
                WebsocketClientWorker("hospital", uri=uri, token=token, auto_add=False)
            )

        yield start


def told(path, *events):
    """Returns the lines of the log that are of these events, or all."""
    lines = [json.loads(line) for line in path.read_bytes().splitlines()]
    return [line for line in lines if not events or line["event"] in events]


def came(path, event, number):
    """Returns the lines of an event once there are so many: a worker sees a socket's end when it sees it."""
    for _ in range(6000):
        if len(lines := told(path, event)) >= number:
            return lines
        time.sleep(0.01)
    raise AssertionError(f"{len(lines)} lines of {event}")


def patients(secret=SECRET):
    values = torch.zeros(64, 3)
    values[0, 0] = secret
    return BaseDataset(values, torch.zeros(64, dtype=torch.int64))


def job(model):
    return TrainConfig(model=model, loss_fn=F.cross_entropy, batch_size=64, shuffle=False, optimizer="SGD",
                       optimizer_args={"lr": 0.1})  # fmt: skip


class Takes(nn.Linear):
    """Reads a place of one number that a row of the data names."""

    def forward(self, x):
        torch.zeros(1).take(x[0, 0].long())
        return super().forward(x)


@planrt.func2plan(args_shape=[(-1, 3)])
def mean_of(x):
    return x.mean(0)


def test_sessions(hospital, path):
    connect = hospital()
    with connect(ALICE), connect():
        pass
    opened = told(path, "opened")[-2:]
    assert [one["user"] for one in opened] == ["alice", ""]
    assert all(one["worker"] == "hospital" for one in opened)
    ended = came(path, "ended", 2)
    assert {one["session"] for one in opened} <= {one["session"] for one in ended}


def test_the_file_is_for_its_owner_only(hospital, path):
    hospital()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_wrong_proof(hospital, path):
    connect = hospital()
    with pytest.raises(HandshakeError):
        connect("a token that is nobody's: 1234")
    (line,) = told(path, "wrong_proof")
    assert line["outcome"] == "refused"
    assert b"1234" not in path.read_bytes()


def test_runs_on_a_data_set(hospital, path):
    worker = hospital(COVERED, datasets={"patients": patients()})(ALICE)
    job(nn.Linear(3, 2)).send(worker)
    worker.fit("patients")
    fit, evaluate = *told(path, "fit"), None
    assert (fit["user"], fit["data"], fit["rows"], fit["released"], fit["outcome"]) == (
        "alice", ["patients"], 64, True, "done",
    )  # fmt: skip
    assert len(fit["plan"]) == len(fit["filed"]) == 64
    worker.evaluate("patients")
    (evaluate,) = told(path, "evaluate")
    assert (evaluate["data"], evaluate["rows"], evaluate["outcome"]) == (["patients"], 64, "done")


def test_a_run_that_fails_on_private_data(hospital, path):
    worker = hospital(COVERED, datasets={"patients": patients()})(ALICE)
    job(Takes(3, 2)).send(worker)
    with pytest.raises(RemoteError):
        worker.fit("patients")
    (line,) = told(path, "fit")
    assert (line["outcome"], line["kind"], line["op"]) == ("failed", "ExecutionError", "Tensor.take")
    assert b"189930" not in path.read_bytes()
    worker.__exit__(None, None, None)
    assert came(path, "ended", 1)[-1]["failures"] == 1


def test_what_is_refused_by_a_rule(hospital, path):
    worker = hospital(COVERED, datasets={"patients": patients()})(ALICE)
    config = job(nn.Linear(3, 2))
    config.batch_size = 2
    config.send(worker)
    with pytest.raises(PolicyRefusedError):
        worker.fit("patients")
    (line,) = told(path, "fit")
    assert (line["outcome"], line["kind"], line["rule"]) == ("refused", "PolicyError", "release")


def published(connect, rows=64):
    owner = connect(OWNER)
    values = torch.full((rows, 3), SECRET).tag("#patients")
    return owner, values.send(owner, allowed_users=["owner"])


def test_a_call_of_a_plan_that_is_released(hospital, path):
    connect = hospital(COVERED)
    _owner, _kept = published(connect)
    guest = connect(ALICE)
    (found,) = guest.search("#patients")
    result = mean_of.send(guest)(found)
    assert result.get().tolist() == [SECRET] * 3
    (line,) = told(path, "call")
    assert (line["user"], line["data"], line["rows"], line["released"], line["outcome"], line["name"]) == (
        "alice", ["#patients"], 64, True, "done", "mean_of",
    )  # fmt: skip
    assert line["plan"] == mean_of.hash
    assert line["shapes"] == ["float32[3]"]


def test_what_leaves_and_what_does_not(hospital, path):
    connect = hospital()
    _owner, kept = published(connect)
    guest = connect(ALICE)
    (found,) = guest.search("#patients")
    with pytest.raises(GetNotPermittedError):
        found.get()
    kept.get()
    refused, fetched = told(path, "refused", "fetch")
    assert (refused["user"], refused["request"], refused["kind"]) == (
        "alice",
        "fetch",
        "GetNotPermittedError",
    )
    assert (fetched["user"], fetched["data"], fetched["shapes"], fetched["bytes"]) == (
        "owner", ["#patients"], ["float32[64, 3]"], 768,
    )  # fmt: skip
    before = len(told(path))
    torch.ones(3).send(guest).get()
    assert len(told(path)) == before  # nobody else's affair


def test_an_op_that_fails_on_private_values(hospital, path):
    connect = hospital()
    _owner, _kept = published(connect)
    guest = connect(ALICE)
    (found,) = guest.search("#patients")
    kept = torch.zeros(2).send(guest).take(found[0].long())
    guest.objects_count()
    (line,) = told(path, "failed")
    assert (line["user"], line["op"]) == ("alice", "Tensor.take")
    del kept


def test_approvals_that_are_asked_for(hospital, path, tmp_path):
    worker = hospital(Policy(approval="ask"), approvals=tmp_path / "decisions")(ALICE)
    sent = torch.ones(2, 3)
    with pytest.raises(NotApprovedError):
        mean_of.send(worker)(sent.send(worker)).get()
    asked, *_ = told(path, "asked")
    assert (asked["user"], asked["plan"], asked["filed"], asked["name"]) == (
        "alice", mean_of.hash, mean_of.hash, "mean_of",
    )  # fmt: skip
    (call,) = told(path, "call")
    assert (call["outcome"], call["kind"]) == ("refused", "NotApprovedError")


def test_a_single_op_that_is_refused(hospital, path):
    worker = hospital(Policy(approval="list"))(ALICE)
    with pytest.raises(NotApprovedError):
        (torch.ones(2).send(worker) + 1).get()
    (line,) = told(path, "refused")
    assert (line["user"], line["kind"], line["op"]) == ("alice", "NotApprovedError", "Tensor.add")


def test_names_do_not_act_on_the_terminal_of_who_looks_at_the_file(hospital, path):
    """Nor turn words round there: names of plans, data and tags are their clients'."""
    evil = "x\x1b[2J\x07\nowner approved\u202e\x9b31m\x7f\u2066\U000e0041 größer 🙂"
    worker = hospital(COVERED, datasets={evil: patients()})(ALICE)

    def function(x):
        return x + 1

    function.__name__ = evil
    sent = torch.ones(2).tag(f"#{evil}").describe(evil).send(worker)
    planrt.func2plan(args_shape=[(2,)])(function).send(worker)(sent).get()
    job(Takes(3, 2)).send(worker)
    with contextlib.suppress(PlanrtError):
        worker.fit(evil)
    sent.get()
    text = path.read_text(encoding="utf-8")
    assert {char for char in text if hidden(char)} == {"\n"}
    assert "größer 🙂" in text
    assert {line["name"] for line in told(path, "call")} == {evil}
    assert [line["data"] for line in told(path, "fit")] == [[evil]]
    assert main(["audit", str(path), "--check"]) == 0


def test_neither_values_nor_secrets_nor_paths_are_in_it(hospital, path):
    connect = hospital(COVERED, datasets={"patients": patients()})
    _owner, kept = published(connect)
    guest = connect(ALICE)
    (found,) = guest.search("#patients")
    mean_of.send(guest)(found).get()
    with contextlib.suppress(PlanrtError):
        found.get()
    job(Takes(3, 2)).send(guest)
    with contextlib.suppress(PlanrtError):
        guest.fit("patients")
    kept.get()
    data = path.read_bytes()
    assert told(path, "call", "fit", "fetch", "refused")
    marks = [OWNER, ALICE, "189930", "1.8993", str(path.parent), os.getcwd(), "planrt/", "Traceback"]
    assert [mark for mark in marks if mark.encode() in data] == []


def test_a_private_value_that_goes_to_another_worker(hospital, path, make_worker):
    other = make_worker("other")
    connect = hospital()
    _owner, kept = published(connect)
    kept.move(other)
    (line,) = told(path, "move")
    assert (line["user"], line["to"], line["data"]) == ("owner", "other", ["#patients"])


class Kept(list):
    """The events that a machine tells, without a file."""

    record = list.append

    def full(self, user):
        return ""


@pytest.mark.parametrize("args", [(Ref(1), False), (Ref(1),), (), (3, False), (Ref(7), False)])
def test_calls_of_what_is_no_plan_fail_as_without_a_log(args):
    def told_by(state):
        def ask(id, body, *tensors):
            return state.handle(Received(1, m.Envelope(id, body), list(tensors)))

        open_session(state, 1, "")
        item = m.PutItem(1, requires_grad=False, has_grad=False, tags=[], description="", allowed=None)
        ask(0, m.Put([item]), torch.ones(2))
        ask(0, m.Post([PostedOp(CALL, args, {}, Ref(9), grad=True).pack()], []))
        return [one.envelope.body.kind for one in ask(1, m.Fetch(9, False))]

    assert told_by(WorkerState("bob", audit=Kept())) == told_by(WorkerState("bob"))


def test_sizes_that_depend_on_private_values_are_in_it():
    kept = Kept()
    state = WorkerState("bob", users={"alice": ALICE}, audit=kept)
    open_session(state, 1, ALICE)
    item = m.PutItem(1, requires_grad=False, has_grad=False, tags=[], description="", allowed=["alice"])
    state.handle(Received(1, m.Envelope(0, m.Put([item])), [torch.ones(2)]))
    call = m.Call(PostedOp("torch.nonzero", (Ref(1),), {}, None, grad=True).pack())
    (reply,) = state.handle(Received(1, m.Envelope(1, call), []))
    assert isinstance(reply.envelope.body, m.Made)
    assert [(one["event"], one.get("op")) for one in kept[1:]] == [("fetch", "torch.nonzero")]


# Where it cannot be written


def test_where_it_cannot_be_written_nothing_leaves(hospital, path, caplog):
    connect = hospital()
    owner, kept = published(connect)
    path.rename(path.with_suffix(".away"))
    with caplog.at_level(logging.ERROR, logger="planrt.worker"):
        with pytest.raises((RemoteError, TransportError), match="audit log cannot be written"):
            kept.get()
        with pytest.raises(PlanrtError):
            connect(ALICE)
    assert [one.getMessage() for one in caplog.records].count("audit_log_cannot_be_written") == 1
    del owner
    path.with_suffix(".away").rename(path)
    connect(ALICE)  # and goes on
    assert told(path, "fetch")  # what waited is there
    assert main(["audit", str(path), "--check"]) == 0


def test_lines_that_are_cut_off_while_it_runs_are_noticed(hospital, path):
    connect = hospital()
    connect(ALICE)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-1]))
    with pytest.raises(PlanrtError):
        connect(ALICE)


# The command


@pytest.fixture
def whole(path):
    """A log of three sessions."""
    worker = VirtualWorker("clinic", users={"alice": ALICE}, audit=path, auto_add=False)
    with worker, worker.connect_as(ALICE):
        pass
    return path


def test_the_table(whole, capsys):
    assert main(["audit", str(whole)]) == 0
    shown = capsys.readouterr().out
    assert "clinic" in shown
    assert "opened" in shown
    assert main(["audit", str(whole), "--user", "alice"]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 4  # the head, opened, ended, the sum
    assert all("alice" in row for row in rows[1:3])
    assert main(["audit", str(whole), "--since", "2999-01-01"]) == 0
    assert "0 of" in capsys.readouterr().out
    assert main(["audit", str(whole), "--plan", "0" * 8]) == 0
    assert "0 of" in capsys.readouterr().out
    assert main(["audit", str(whole), "--json", "--user", "alice"]) == 0
    assert [json.loads(line)["event"] for line in capsys.readouterr().out.splitlines()] == ["opened", "ended"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda a, b, c: [a.replace(b"started", b"stopped"), b, c], "line 2: the chain is broken"),
        (lambda a, b, c: [a, c], "line 2: the chain is broken"),
        (lambda a, b, c: [a, a, b, c], "line 2: the chain is broken"),
        (lambda a, b, c: [a, b, c[:-9]], "line 3: it is not complete"),
        (lambda a, b, c: [a, b"\x00\n", c], "line 2: not JSON"),
        (lambda a, b, c: [b"[]\n", b, c], "line 1: not an entry"),
    ],
)
def test_tampering_shows_and_the_worker_does_not_start_with_it(whole, change, said, capsys):
    lines = whole.read_bytes().splitlines(keepends=True)
    whole.write_bytes(b"".join(change(*lines[:3])))
    assert main(["audit", str(whole), "--check"]) == 1
    assert said in capsys.readouterr().err
    with pytest.raises(OptionError, match=said):
        WebsocketServerWorker("clinic", audit=whole)


def test_checking_a_whole_one(whole, capsys):
    assert main(["audit", str(whole), "--check"]) == 0
    said = capsys.readouterr().out
    assert "the chain holds" in said
    assert str(len(told(whole))) in said


def test_it_goes_on_where_it_ended(whole, capsys):
    before = len(told(whole))
    with VirtualWorker("clinic", audit=whole, auto_add=False):
        pass
    assert len(told(whole)) > before
    assert main(["audit", str(whole), "--check"]) == 0


def test_two_workers_share_a_file(path):
    with (
        VirtualWorker("one", audit=path, auto_add=False) as one,
        VirtualWorker("two", audit=path, auto_add=False) as two,
    ):
        for _ in range(2):
            one.connect_as().close()
            two.connect_as().close()
    assert {line["worker"] for line in told(path)} == {"one", "two"}
    assert main(["audit", str(path), "--check"]) == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--since", "yesterday"], "--since"),
        (["--plan", "xyz"], "--plan"),
        (["--plan", "abc"], "--plan"),
        (["--check", "--user", "alice"], "--check"),
        (["--check", "--json"], "--check"),
    ],
)
def test_wrong_options(whole, words, said, capsys):
    assert main(["audit", str(whole), *words]) == 2
    assert said in capsys.readouterr().err


def test_a_file_that_is_not_there(tmp_path, capsys):
    assert main(["audit", str(tmp_path / "none")]) == 2
    assert "cannot be read" in capsys.readouterr().err


def test_files_that_a_worker_refuses(tmp_path):
    readable = tmp_path / "readable"
    readable.touch(0o644)
    os.chmod(readable, 0o644)
    for path, said in (
        (readable, "chmod 600"), (tmp_path, "directory"), (tmp_path / "none" / "x", "No such file"),
        ("/dev/null", "no regular file"),
    ):  # fmt: skip
        with pytest.raises(OptionError, match=said):
            WebsocketServerWorker("clinic", audit=path)


def test_the_command_takes_the_flag(tmp_path, capsys):
    assert main(["serve", "--id", "clinic", "--empty", "--port", "0", "--audit", str(tmp_path)]) == 2
    assert "directory" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------ many of a kind


class Timers:
    """In place of `threading.Timer`: what was to be called, and after how many seconds, until the test calls it."""

    def __init__(self):
        self.started = []

    def __call__(self, seconds, function):
        return Timer(self.started, seconds, function)


@dataclass
class Timer:
    started: list
    seconds: float
    function: Callable
    daemon: bool = False

    def start(self):
        self.started.append(self)

    def cancel(self):
        self.started.remove(self)


def test_many_refusals_of_a_user_are_summed_up_and_others_have_their_lines(
    hospital, path, monkeypatch, capsys
):
    monkeypatch.setattr(summing, "MOST_A_MINUTE", 5)
    monkeypatch.setattr(summing, "MINUTE", math.inf)  # of the events; what writes the sums is its own timer
    monkeypatch.setattr(audit_file, "Timer", timers := Timers())
    connect = hospital()
    owner, alice = connect(OWNER), connect(ALICE)
    torch.tensor([SECRET]).tag("#secret").send(owner, allowed_users=["owner"])
    (found,) = alice.search("#secret")
    for _ in range(40):
        with pytest.raises(GetNotPermittedError):
            found.get()
    assert (len(told(path, "refused")), told(path, "summed")) == (5, [])
    (timer,) = timers.started
    assert (timer.seconds, timer.daemon) == (60.0, True)
    timer.function()
    (line,) = told(path, "summed")
    assert (line["of"], line["user"], line["outcome"]) == ("refused", "alice", "refused")
    assert (line["lines"], line["kinds"]) == (35, {"GetNotPermittedError": 35})
    with pytest.raises(GetNotPermittedError):
        found.get()
    assert len(timers.started) == 1, "what comes after it has a timer of its own"
    (mine,) = owner.search("#secret")
    mine.get()
    assert [one["user"] for one in told(path, "fetch")] == ["owner"]
    assert main(["audit", str(path), "--check"]) == 0
    assert "35 more events are summed up in them), the chain holds" in capsys.readouterr().out
    assert main(["audit", str(path), "--user", "alice"]) == 0
    assert "kinds=GetNotPermittedError 35" in capsys.readouterr().out


def test_what_left_is_never_summed_up_and_a_user_has_so_much_of_it(hospital, path, monkeypatch):
    monkeypatch.setattr(summing, "MOST_A_MINUTE", 5)
    monkeypatch.setattr(summing, "MOST_AN_HOUR", 20)
    connect = hospital()
    owner, alice = connect(OWNER), connect(ALICE)
    torch.tensor([SECRET]).tag("#shared").send(owner, allowed_users=["owner", "alice"])
    for _ in range(20):
        (found,) = alice.search("#shared")
        assert found.copy().get().item() == pytest.approx(SECRET)
    with pytest.raises(PlanrtError, match="20 lines of the owner's audit log this hour"):
        alice.search("#shared")
    assert [one["user"] for one in told(path, "fetch")] == ["alice"] * 20
    (mine,) = owner.search("#shared")
    assert mine.get().item() == pytest.approx(SECRET)  # another user has their own share


def test_a_worker_that_stops_tells_what_it_has_summed_up(hospital, path, monkeypatch):
    monkeypatch.setattr(summing, "MOST_OF_NOBODY", 3)
    log = AuditFile(path, "bob")
    for number in range(10):
        log.record({"event": "opened", "user": "", "session": number, "address": "10.0.0.1"})
    log.finish()
    assert [one["session"] for one in told(path, "opened")] == [0, 1, 2]
    (line,) = told(path, "summed")
    assert (line["lines"], line["sessions"], line["addresses"]) == (7, [3, 4, 5, 6, 7, 8, 9], ["10.0.0.1"])


@pytest.mark.parametrize(
    ("event", "said"),
    [
        ({"of": "fetch", "lines": 3}, "what always has a line of its own"),
        ({"of": "call", "outcome": "done", "lines": 3}, "what always has a line of its own"),
        ({"of": "refused", "lines": 0}, "does not say how many"),
        ({"of": "refused", "lines": "many"}, "does not say how many"),
    ],
)
def test_sums_that_no_worker_writes_are_noticed(path, event, said, capsys):
    line, _ = sealed({"event": "summed", **event}, FIRST)
    path.write_bytes(line)
    assert main(["audit", str(path), "--check"]) == 1
    assert said in capsys.readouterr().err

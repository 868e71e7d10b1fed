"""The record of decisions: an append-only chain, shared by a worker and its owner's commands."""

import getpass
import json
import subprocess
import sys

import pytest

from planrt.errors import ApprovalError
from planrt.plans.policy import approvals as module
from planrt.plans.policy.approvals import Approvals

A, B, C = (letter * 64 for letter in "abc")


@pytest.fixture
def record(tmp_path):
    return Approvals(tmp_path / "owner" / "approvals")


def lines(record):
    return (record.folder / "decisions.jsonl").read_bytes().splitlines(keepends=True)


def test_a_plan_goes_through_its_states(record):
    assert record.status(A) == ("unknown", "")
    assert record.submit(A, b"the plan") == ("pending", "")
    assert record.status(A) == ("pending", "")
    (waiting,) = record.pending()
    assert (waiting.plan, waiting.size, waiting.path.read_bytes()) == (A, 8, b"the plan")
    assert waiting.since.endswith("Z")
    made = record.approve(A, by="Ann", why="looked at it", policy="abc123")
    assert record.status(A) == ("approved", "looked at it")
    assert record.pending() == []
    assert (record.folder / "decided" / f"{A}.plan").read_bytes() == b"the plan"
    assert record.decisions() == [made]
    assert (made.plan, made.decision, made.by, made.policy) == (A, "approved", "Ann", "abc123")
    assert made.time.endswith("Z")
    record.deny(A, why="no longer")
    assert record.status(A) == ("denied", "no longer")
    assert [one.decision for one in record.decisions()] == ["approved", "denied"]


def test_who_decides_is_the_systems_user_by_default(record):
    assert record.approve(A).by == getpass.getuser()


def test_a_decision_made_elsewhere_is_seen(record):
    other = Approvals(record.folder)
    other.approve(A)
    assert record.status(A).status == "approved"
    call = f"Approvals({str(record.folder)!r}).deny({A!r}, why='no')"
    code = f"from planrt.plans.policy.approvals import Approvals; {call}"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert record.status(A) == ("denied", "no")
    assert len(other.decisions()) == 2


def test_the_record_is_read_again_only_when_it_changed(record, monkeypatch):
    record.approve(A)
    record.status(A)

    def read(*_):
        raise AssertionError("read")

    monkeypatch.setattr(module, "_read", read)
    for _ in range(3):
        assert record.status(A).status == "approved"
        assert record.status(B).status == "unknown"


def test_many_writers_make_one_chain(record):
    code = (
        "import sys; from planrt.plans.policy.approvals import Approvals\n"
        f"record = Approvals({str(record.folder)!r})\n"
        "for number in range(20): record.deny(sys.argv[1] * 64, why=str(number))"
    )
    running = [subprocess.Popen([sys.executable, "-c", code, letter]) for letter in "abc"]
    assert [process.wait(120) for process in running] == [0, 0, 0]
    decisions = record.decisions()
    assert len(decisions) == 60
    for plan in (A, B, C):
        assert [one.why for one in decisions if one.plan == plan] == [str(number) for number in range(20)]


# Tampering


def test_the_chain_is_what_the_docs_say(record):
    import hashlib

    record.approve(A)
    record.deny(B, why="no")
    first, second = lines(record)
    assert json.loads(first)["previous"] == "0" * 64
    assert json.loads(second)["previous"] == hashlib.sha256(first.rstrip(b"\n")).hexdigest()
    assert record.head == hashlib.sha256(second.rstrip(b"\n")).hexdigest()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a, b, c: [a.replace(b"approved", b"denied"), b, c], "line 2: the chain is broken"),
        (lambda a, b, c: [a, c], "line 2: the chain is broken"),
        (lambda a, b, c: [b, a, c], "line 1: the chain is broken"),
        (lambda a, b, c: [a, b, b, c], "line 3: the chain is broken"),
        (lambda a, b, c: [a, b, c[:-1]], "line 3: it is not complete"),
        (lambda a, b, c: [a, b[:20] + b"\n", c], "line 2: not JSON"),
        (lambda a, b, c: [a, b"[]\n", c], "line 2: not a decision"),
        (lambda a, b, c: [a, b"[" * 100_000 + b"\n", c], "line 2: not JSON"),
        (lambda a, b, c: [a, b"\n", c], "line 2: not JSON"),
        (lambda a, b, c: [a.replace(b'"why"', b'"how"'), b, c], "line 1: not a decision"),
        (lambda a, b, c: [a.replace(A.encode(), b"abc"), b, c], "line 1: not a decision about a plan"),
        (lambda a, b, c: [a.replace(b'"why": ""', b'"why": 3'), b, c], "line 1: not a decision"),
        (lambda a, b, c: [b"\xff\xfe\n", b, c], "line 1: not JSON"),
    ],
)
def test_a_changed_record_is_an_error_that_names_the_line(record, change, message):
    record.approve(A)
    record.deny(B, why="no")
    record.approve(C)
    (record.folder / "decisions.jsonl").write_bytes(b"".join(change(*lines(record))))
    with pytest.raises(ApprovalError, match=message):
        Approvals(record.folder)
    with pytest.raises(ApprovalError, match=message):
        record.status(A)
    with pytest.raises(ApprovalError, match=message):
        record.approve(A)


def test_a_running_worker_notices_lines_that_are_cut_off(record):
    record.approve(A)
    record.deny(A, why="no")
    path = record.folder / "decisions.jsonl"
    path.write_bytes(lines(record)[0])
    with pytest.raises(ApprovalError, match="no longer holds the decisions"):
        record.status(A)
    path.unlink()
    with pytest.raises(ApprovalError, match="is gone"):
        record.status(A)


# Hostile clients


def test_what_waits_is_bounded_in_number_and_bytes(tmp_path):
    record = Approvals(tmp_path, max_pending=2, max_pending_bytes=10)
    record.submit(A, b"12345")
    assert record.submit(A, b"x" * 100).status == "pending"  # it waits already
    with pytest.raises(
        ApprovalError, match="a plan of 6 bytes, with those that wait for the owner, is more than 10"
    ):
        record.submit(B, b"123456")
    record.submit(B, b"12345")
    with pytest.raises(ApprovalError, match="2 plans wait for the owner already"):
        record.submit(C, b"")
    record.deny(A, why="no")
    record.submit(C, b"")
    assert record.submit(A, b"again").status == "denied"
    assert {one.plan for one in record.pending()} == {B, C}
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("incoming-")]


@pytest.mark.parametrize(
    ("plan", "suffix"),
    [
        ("../../etc/passwd", ".plan"),
        ("A" * 64, ".plan"),
        (A + "a", ".plan"),
        (A, "/../x"),
        (A, ""),
        (A, ".p/q"),
    ],
)
def test_names_of_files_are_hashes(record, plan, suffix):
    with pytest.raises(ApprovalError, match="is not a plan's file"):
        record.submit(plan, b"", suffix=suffix)
    assert record.pending() == []
    assert record.status(plan).status == "unknown"


# Misuse


def test_prefixes(record):
    one, two = "12345678" + "0" * 56, "12345678" + "1" * 56
    record.submit(one, b"")
    record.submit(two, b"")
    record.approve(B)
    assert record.resolve("1234567800") == one
    assert record.resolve("bbbbbbbb") == B
    assert record.resolve(C) == C
    for prefix, message in [
        ("12345678", "2 plans begin with 12345678: give more digits"),
        ("1234567", "the first 8 digits or more"),
        ("cccccccc", "no plan that begins with cccccccc"),
        ("CCCCCCCC", "does not name a plan"),
        ("", "does not name a plan"),
        ("*" * 8, "does not name a plan"),
    ]:
        with pytest.raises(ApprovalError, match=message):
            record.resolve(prefix)


def test_reasons_and_names(record):
    with pytest.raises(ApprovalError, match="say why"):
        record.deny(A, why=" ")
    with pytest.raises(ApprovalError, match="the reason must be one line"):
        record.deny(A, why="two\nlines")
    with pytest.raises(ApprovalError, match="the name must be one line"):
        record.approve(A, by="\x1b[2J")
    with pytest.raises(ApprovalError, match="at most 1000"):
        record.deny(A, why="x" * 1001)
    with pytest.raises(ApprovalError, match="who decides"):
        record.approve(A, by="")
    assert record.decisions() == []
    record.deny(A, why='quotes " and ünïcödé 🙂')
    assert Approvals(record.folder).status(A).why == 'quotes " and ünïcödé 🙂'


def test_folders_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ApprovalError, match="cannot hold decisions"):
        Approvals(tmp_path / "file")
    with pytest.raises(ApprovalError, match="cannot hold decisions"):
        Approvals(tmp_path / "file" / "below")


def test_a_record_that_cannot_be_written(record):
    record.approve(A)
    path = record.folder / "decisions.jsonl"
    before = path.read_bytes()
    path.unlink()
    path.mkdir()
    with pytest.raises(ApprovalError, match="decisions.jsonl: Is a directory"):
        Approvals(record.folder)
    path.rmdir()
    path.write_bytes(before)
    assert Approvals(record.folder).status(A).status == "approved"

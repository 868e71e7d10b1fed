"""An audit log in several files: one chain over all of them, which a worker begins the next of when one is full."""

from __future__ import annotations

import multiprocessing
import os
import shutil

import pytest

from planrt.cli import main
from planrt.errors import OptionError
from planrt.fl.serve import parser, serve
from planrt.workers import VirtualWorker, WebsocketClientWorker, WebsocketServerWorker
from planrt.workers.serving import audit_parts
from planrt.workers.serving.audit_file import AuditError, AuditFile

SIZE = 1 << 16


@pytest.fixture
def path(tmp_path):
    return tmp_path / "audit.jsonl"


def filled(path, lines=1_000, worker="bob"):
    """A log in several files; returns it."""
    log = AuditFile(path, worker, SIZE)
    for number in range(lines):
        log.record({"event": "fetch", "user": "ann", "session": f"{number}", "about": "x" * 100})
        log.write()
    return log


def said(path):
    return [link.values for _, link in audit_parts.entries(path)]


def checked(path, capsys):
    found = main(["audit", str(path), "--check"])
    told = capsys.readouterr()
    return found, told.out + told.err


def test_the_chain_goes_over_from_one_file_to_the_next(path, capsys):
    filled(path)
    files = audit_parts.parts(path)
    assert len(files) > 3
    assert all(one.stat().st_size <= SIZE and not one.stat().st_mode & 0o077 for one in files)
    sessions = [one["session"] for one in said(path) if one["event"] == "fetch"]
    assert sessions == [str(number) for number in range(1_000)]
    continued = [one["after"] for one in said(path) if one["event"] == "continued"]
    assert continued == [one.name for one in files[:-1]]
    assert checked(path, capsys)[0] == 0
    assert main(["audit", str(path), "--json", "--user", "ann"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1_000  # it shows all of them


@pytest.mark.parametrize("transport_", ["memory", "websocket"])
def test_a_worker_goes_on_in_the_next_file(path, capsys, transport_):
    options = {"audit": path, "audit_size": SIZE}
    if transport_ == "memory":
        with VirtualWorker("bob", auto_add=False, **options) as bob:
            for _ in range(300):
                bob.connect_as().close()
    else:
        with WebsocketServerWorker("bob", threads=1, **options).running() as uri:
            for _ in range(300):
                WebsocketClientWorker("bob", uri=uri, auto_add=False).close()
    assert len(audit_parts.parts(path)) > 1
    assert checked(path, capsys)[0] == 0
    before = len(said(path))
    WebsocketServerWorker("bob", **options)  # which goes on there
    assert [one["event"] for one in said(path)[before:]] == ["started"]


def change(path):
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([lines[0], lines[1].replace(b"ann", b"ben"), *lines[2:]]))


def cut(path):
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))


def swap(path):
    other = path.with_suffix(".3")
    kept = path.read_bytes()
    path.write_bytes(other.read_bytes())
    other.write_bytes(kept)


@pytest.mark.parametrize(
    ("which", "how", "told"),
    [
        ("audit.jsonl.1", os.unlink, "audit.jsonl.1: the file is missing"),
        ("audit.jsonl.2", os.unlink, "audit.jsonl.2: the file is missing"),
        ("last", os.unlink, "line 1: it goes on after audit.jsonl."),
        ("audit.jsonl", os.unlink, "audit.jsonl cannot be read"),
        ("audit.jsonl.2", change, "audit.jsonl.2, line 3: the chain is broken"),
        ("audit.jsonl.2", cut, "audit.jsonl.3, line 1: the chain is broken"),
        (
            "audit.jsonl.2",
            swap,
            "audit.jsonl.2, line 1: it goes on after audit.jsonl.2, which is missing or not",
        ),
    ],
)
def test_a_file_that_is_missing_or_altered_or_in_another_place_is_found(path, capsys, which, how, told):
    filled(path)
    last = audit_parts.parts(path)[-2]
    how(last if which == "last" else path.with_name(which))
    found, text = checked(path, capsys)
    assert found != 0
    assert told in text


def test_a_worker_does_not_begin_where_the_file_before_is_missing(path):
    filled(path)
    audit_parts.parts(path)[-2].unlink()
    with pytest.raises(OptionError, match="it goes on after"):
        AuditFile(path, "bob", SIZE)


def test_a_running_one_notices_another_file(path):
    log = filled(path)
    kept = path.with_name("kept")
    shutil.copy(path, kept)
    path.unlink()
    kept.rename(path)
    log.record({"event": "fetch"})
    with pytest.raises(AuditError, match="cannot be written"):
        log.write()


def test_an_old_file_goes_on_as_it_is(path, capsys):
    AuditFile(path, "bob")
    assert [one.name for one in audit_parts.parts(path)] == ["audit.jsonl"]
    filled(path, 500)
    assert said(path)[0]["event"] == "started"
    assert checked(path, capsys)[0] == 0


class Killed(BaseException):
    pass


@pytest.mark.parametrize("at", ["fsync", "link", "replace"])
@pytest.mark.parametrize("after", [False, True])
def test_a_crash_in_between_loses_nothing(path, capsys, monkeypatch, at, after):
    """The process ends before or after one step of beginning the next file."""
    real, log = getattr(os, at), AuditFile(path, "bob", SIZE)

    def ends(*args, **kwargs):
        if after:
            real(*args, **kwargs)
        raise Killed

    monkeypatch.setattr(audit_parts.os, at, ends)
    written = 0
    try:
        while written < 1_000:
            log.record({"event": "fetch", "user": "ann", "session": f"{written}", "about": "x" * 100})
            log.write()
            written += 1
    except Killed:
        pass
    assert written < 1_000
    monkeypatch.undo()
    assert checked(path, capsys)[0] == 0
    assert [one["session"] for one in said(path) if "session" in one] == [str(one) for one in range(written)]
    filled(path, 1_000, "bob")
    assert checked(path, capsys)[0] == 0
    assert len([one for one in said(path) if "session" in one]) == written + 1_000
    assert not path.with_name("audit.jsonl.new").exists()


def _fill(path, worker):
    filled(path, 600, worker)


def test_several_processes_share_the_files(path, capsys):
    """Each begins the next one where it is full, and goes on in that of another one."""
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_fill, args=(path, name)) for name in ("one", "two")]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    assert checked(path, capsys)[0] == 0
    for name in ("one", "two"):
        mine = [one["session"] for one in said(path) if one["worker"] == name and "session" in one]
        assert mine == [str(number) for number in range(600)]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--audit-size", "64 MiB"], "add --audit FILE"),
        (["--audit", "a.jsonl", "--audit-size", "0"], "--audit-size must be at least 1 byte"),
        (["--audit", "a.jsonl", "--audit-size", "1 KiB"], "at least 64 KiB"),
        (["--audit", "a.jsonl", "--audit-size", "much"], "--audit-size"),
    ],
)
def test_wrong_sizes_are_one_line_before_anything_starts(tmp_path, monkeypatch, options, told):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OptionError, match=told):
        serve(parser("planrt serve").parse_args(["--id", "bob", "--empty", "--port", "0", *options]))
    assert not list(tmp_path.iterdir())

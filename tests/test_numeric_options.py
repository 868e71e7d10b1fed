"""Every option that takes a number: what a refusal says of its range is what the command takes."""

from __future__ import annotations

import argparse
import re

import pytest

from planrt import cli
from planrt.errors import OptionError
from planrt.fl import serve
from planrt.fl.runs import job_options, serve_options
from planrt.plans.policy.rules import Policy, read_bytes
from planrt.workers import websocket_server

PROBES = (
    "-1e9", "-3", "-1", "-0.5", "-0.0", "0", "0.0", "1e-9", "0.5", "1", "2", "63", "65535", "65536", "3650", "100000",
    "2592000", "2592001", "315360000", "315360001", "9223372036854775807", "9223372036854775808", "1e20", "1e400",
    "inf", "nan", "many", "", " ",
)  # fmt: skip
HUGE = 2**63 - 1


def parsers():
    """Every parser of a command, by its name."""
    found = {"serve": serve_options.parser("planrt serve"), "run": job_options.parser("planrt run")}
    waiting = [cli._parser()]
    while waiting:
        parser = waiting.pop()
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                found |= {
                    f"{parser.prog} {name}": one
                    for name, one in action.choices.items()
                    if name not in ("serve", "run")
                }
                waiting += action.choices.values()
    return found


def numeric():
    """The options whose type refuses what is no number."""
    for name, parser in parsers().items():
        for action in parser._actions:
            if action.type is not None:
                try:
                    action.type("2")
                except argparse.ArgumentTypeError:
                    continue  # a tag, or an address
                yield pytest.param(action.type, id=f"{name} {action.option_strings[0]}")


def claimed(text):
    """What a refusal says of the range: whether a number is in it."""
    text = text.replace(",", "")
    if found := re.search(r"must be from (-?\d+) to (\d+)", text):
        return lambda value: int(found[1]) <= value <= int(found[2])
    if found := re.search(r"must be at least (-?\d+)", text):
        return lambda value: int(found[1]) <= value <= HUGE
    if found := re.search(r"seconds from 0 and of at most (\d+)", text):
        return lambda value: 0 <= value <= int(found[1])
    if found := re.search(r"seconds above 0 and of at most (\d+)", text):
        return lambda value: 0 < value <= int(found[1])
    if "must be a number above 0" in text:
        return lambda value: 0 < value < float("inf")
    return None


def taken(kind, text):
    try:
        kind(text)
    except argparse.ArgumentTypeError as error:
        return str(error)
    return None


def number(text):
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return None


@pytest.mark.parametrize("kind", list(numeric()))
def test_a_refusal_names_the_true_range(kind):
    refusals = {text: told for text in PROBES if (told := taken(kind, text)) is not None}
    assert refusals, "it takes everything"
    ranges = 0
    for told in refusals.values():
        assert "\n" not in told
        inside = claimed(told)
        if inside is None:  # it is no number, or no whole one
            assert re.match(r"must be a (whole )?number, got ", told), told
            continue
        ranges += 1
        for text in PROBES:
            value = number(text)
            if value is not None and not (taken(kind, text) or "").startswith("must be a whole number"):
                assert (text not in refusals) == inside(value), (text, told)
    assert ranges


def test_there_are_such_options():
    """Or the test above would look at none, and pass."""
    names = {one.id for one in numeric()}
    assert {"serve --keep-sessions", "serve --port", "run --rounds", "run --round-timeout"} <= names
    assert len(names) > 15


BYTES = sorted(
    action.option_strings[0]
    for action in serve_options.parser("planrt serve")._actions
    if action.metavar == "BYTES"
)
NEEDED = {"--audit-size": ["--audit", "log.jsonl"], "--process-memory": ["--isolation", "on"]}


@pytest.mark.parametrize("option", BYTES)
@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("0", "must be at least 1 byte"),
        ("0 GiB", "must be at least 1 byte"),
        ("-1", "must be a number of bytes"),
        ("much", "must be a number of bytes"),
        ("5 parsecs", "must be a number of bytes"),
        ("", "must be a number of bytes"),
        ("nan GiB", "must be a number of bytes"),
        ("1e400 GiB", "must be a number of bytes"),
        ("9" * 400, "must be at most"),
        ("9" * 400 + " GiB", "must be at most"),
        ("9" * 5000, "must be at most"),
    ],
)
def test_numbers_of_bytes_wrongly(option, value, says, capsys, monkeypatch, tmp_path):
    """One line, before anything starts."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(websocket_server.WebsocketServerWorker, "start", lambda self, *, ready: ready(1))
    code = serve.main(["--id", "bob", "--empty", *NEEDED.get(option, []), f"{option}={value}"])
    assert code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert option in line
    assert says in line
    assert len(line) < 600
    assert not list(tmp_path.iterdir())


def test_sessions_may_be_kept_for_no_time(capsys):
    assert (
        serve_options.parser("planrt serve").parse_args(["--id", "a", "--keep-sessions", "0"]).keep_sessions
        == 0
    )
    with pytest.raises(SystemExit):
        serve_options.parser("planrt serve").parse_args(["--id", "a", "--keep-sessions", "-1"])
    assert "must be a number of seconds from 0 and of at most 315,360,000, got -1" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text",
    [
        "max_memory = " + "9" * 5000,
        f'max_memory = "{"9" * 400} GiB"',
        'max_memory = "9223372036854775808 B"',
        "max_flops = " + "9" * 4000,
        "max_flops = 9223372036854775808",
        "max_session_flops = " + "9" * 31,
        "max_seconds = " + "9" * 400,
        "max_check_seconds = 1e300",
        "max_failures = " + "9" * 400,
        "[[release]]\ntag = '#x'\nmin_rows = " + "9" * 400,
    ],
)
def test_numbers_of_a_policy_that_no_machine_has(text, tmp_path):
    path = tmp_path / "policy.toml"
    path.write_text(text)
    with pytest.raises(OptionError) as caught:
        Policy.from_file(path)
    assert str(caught.value).startswith(f"policy {path}")
    assert len(str(caught.value)) < 600


def test_the_largest_numbers_of_a_policy_can_be_shown():
    largest = Policy(max_flops=HUGE, max_memory=HUGE, max_seconds=315_360_000)
    assert "computation: at most" in str(largest)
    assert read_bytes("x", "8191 TiB") == 8191 * 2**40


@pytest.mark.parametrize("name", ["--approvals", "--folder"])
def test_the_folder_of_decisions_has_one_name_everywhere(name, tmp_path, capsys):
    for command in (["pending"], ["decisions"], ["approve", "0" * 64], ["deny", "0" * 64, "--why", "no"]):
        missing = str(tmp_path / "missing")
        assert cli.main([*command, name, missing]) == 2
        assert f"--approvals: there is no folder {missing}" in capsys.readouterr().err
    assert cli.main(["pending", name, str(tmp_path)]) == 0
    parsed = serve_options.parser("planrt serve").parse_args(["--id", "a", name, str(tmp_path)])
    assert parsed.approvals == str(tmp_path)

"""``planrt status``: what a run folder says of its run, and who is waited for until when; or how a worker is.

A worker is asked at its own address, ``alice=wss://10.0.0.5:8777``, and tells what is its asker's own. Where it serves
its metrics, ``http://127.0.0.1:9101``, its owner sees it whole, and while it computes as well.
"""

from __future__ import annotations

import argparse
import http.client
import json
import shlex
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any

from planrt.command_line import one_line, seconds
from planrt.errors import HandshakeError, OptionError
from planrt.fl.runs.identity import Identity, add_identity, named_address
from planrt.fl.runs.run_folder import NOW, OPTIONS, Journal, checkpoints_in, is_held
from planrt.shown import shown
from planrt.workers.transport.addresses import scheme_of, schemes

if TYPE_CHECKING:
    from planrt.workers.results import WorkerStatus


def register(commands: Any, command: Callable[..., Any]) -> None:
    """Adds the command to the parser of `planrt`."""
    parser = command(
        commands, "status", _status, "say how far a run has come, and who is waited for, or how a worker is"
    )
    parser.add_argument(
        "run",
        metavar="RUN|NAME=URI|URL",
        help="the run's folder; a worker, as alice=wss://HOST:PORT; or where metrics are, http://HOST:PORT",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_identity(parser.add_argument)
    parser.add_argument(
        "--timeout",
        type=seconds(),
        default=10.0,
        metavar="SECONDS",
        help="how long to wait for a worker's answer (%(default)s)",
    )


def _status(options: argparse.Namespace) -> int:
    whom = options.run
    if whom.startswith(("http://", "https://")):
        found, well = asked_over_http(whom, options.timeout)
        print(json.dumps(found, indent=1) if options.json else "\n".join(_http_lines(whom, found)))
        return 0 if well else 1
    if scheme_of(whom.partition("=")[2]) in schemes():
        id, uri = named_address(whom)
        about = asdict(asked_worker(id, uri, Identity.of(options), options.timeout))
        print(json.dumps(about, indent=1) if options.json else "\n".join(_worker_lines(about)))
        return 0
    if scheme_of(whom) in schemes():
        raise OptionError(f"{whom}: name the worker too, as alice={whom}")
    found = status_of(Path(whom))
    print(json.dumps(found, indent=1) if options.json else "\n".join(lines_of(found)))
    return 0


def asked_worker(id: str, uri: str, identity: Identity, timeout: float) -> WorkerStatus:
    """Returns what the worker `id` at `uri` tells this user, within `timeout` seconds.

    Raises:
        ConnectError, HandshakeError: nobody answers, or it is another one. WorkerLostError: no answer in time.
    """
    from planrt.workers import WebsocketClientWorker

    try:
        with WebsocketClientWorker(
            id, uri=uri, timeout=timeout, auto_add=False, **identity.shown()
        ) as worker:
            return worker.status()
    except HandshakeError as error:
        if "gave no answer to the handshake" not in str(error):
            raise
        raise HandshakeError(
            f"worker {id!r} at {uri} takes connections, and gave no answer within {timeout:g} s: it computes, or is "
            "frozen; where it serves metrics, its owner sees that there",
            address=uri,
        ) from None


def asked_over_http(url: str, timeout: float) -> tuple[dict[str, Any], bool]:
    """Returns what ``/health`` says at `url`, and whether all is well.

    Raises:
        OptionError: no metrics of planrt are served there.
    """
    address = f"{url.rstrip('/').removesuffix('/health').removesuffix('/metrics')}/health"
    try:
        try:
            direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy knows no loopback
            with direct.open(address, timeout=timeout) as answer:
                found, well = json.loads(answer.read(1 << 20)), True
        except urllib.error.HTTPError as error:
            if error.code != HTTPStatus.SERVICE_UNAVAILABLE:
                raise
            found, well = json.loads(error.read(1 << 20)), False
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise OptionError(f"{address} tells no status: {one_line(error)}") from None
    if not isinstance(found, dict) or not isinstance(found.get("status"), str):
        raise OptionError(f"{address} tells no status: it is none of planrt's")
    return found, well


def _worker_lines(about: dict[str, Any]) -> list[str]:
    who = f"user {shown(about['user'], 80)}" if about["user"] else "nobody"
    seconds = max(0.0, time.time() - about["since"])
    lines = [
        f"{shown(about['worker_id'])} at {shown(about['address'])}: serves since {seconds:.0f} s, planrt "
        f"{shown(about['planrt'], 40)} on {shown(about['device'], 40)}",
        f"  for {who}: {about['sessions']} session{'s' * (about['sessions'] != 1)}, {about['objects']:,} "
        f"object{'s' * (about['objects'] != 1)}, {about['bytes']:,} bytes",
    ]
    if about["waiting"]:
        lines.append(f"  under way: {about['waiting']} request{'s' * (about['waiting'] != 1)}")
    return lines


def _http_lines(url: str, found: dict[str, Any]) -> list[str]:
    facts = {name: value for name, value in found.items() if name not in ("status", "ok")}
    lines = [f"{shown(url)}: {shown(found['status'], 200)}"]
    return lines + [
        f"  {shown(str(name), 80)}: {shown(json.dumps(value), 300)}" for name, value in facts.items()
    ]


def status_of(folder: Path) -> dict[str, Any]:
    """Returns what a run folder says, as plain values.

    "state" is "running", "finished" or "stopped"; "round" the newest round that is done, and "of" how many there are to
    be, if that is known. Of a running one, "waiting" are the workers that are waited for, "since" and "until" times
    (seconds, as of `time.time`; None for no end).

    Raises:
        OptionError: there is no run in it. RunFolderError: it is of a newer planrt, or cannot be read.
    """
    if not folder.is_dir():
        raise OptionError(f"there is no folder {folder}")
    journal = Journal(folder)
    if journal.began is None:
        raise OptionError(f"there is no run in {folder}: it has no journal")
    running = is_held(folder)
    last = max(journal.rounds, default=0)
    done = journal.rounds.get(last, {})
    found: dict[str, Any] = {
        "run": str(folder),
        "state": "running" if running else "finished" if journal.finished else "stopped",
        "round": last,
        "of": _read(folder / OPTIONS).get("rounds"),
        "loss": done.get("loss"),
        "missing": {id: f"{why['kind']}: {why['why']}" for id, why in done.get("missing", {}).items()},
        "checkpoint": next((number for number, _ in checkpoints_in(folder)), None),
        "failed": journal.failed,
    }
    if running:
        now = _read(folder / NOW)
        found |= {name: now.get(name) for name in ("waiting", "since", "until")}
    return found


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def lines_of(found: dict[str, Any]) -> list[str]:
    """Returns the status as lines to read."""
    of = f" of {found['of']}" if isinstance(found["of"], int) else ""
    loss = f", loss {found['loss']:.4f}" if isinstance(found["loss"], float) else ""
    if found["round"] and found["loss"] is None:  # what JSON has no word for
        loss = ", loss nan"
    lines = [f"{shown(found['run'])}: {found['state']}, {found['round']}{of} rounds done{loss}"]
    for id, why in found["missing"].items():
        lines.append(f"  without {shown(id)} ({shown(why, 300)})")
    if found["state"] == "running" and found.get("waiting"):
        who = ", ".join(shown(str(id)) for id in found["waiting"])
        since = f" since {max(0.0, time.time() - found['since']):.0f} s" if found.get("since") else ""
        until = f", until {_clock(found['until'])} at most" if found.get("until") else ""
        lines.append(f"  waits for {who}{since}{until}")
    if found["failed"]:
        lines.append(f"  the last round failed: {shown(found['failed'], 500)}")
    if found["state"] == "stopped":
        checkpoint = found["checkpoint"]
        place = f"from round {checkpoint + 1}" if checkpoint is not None else "from its beginning"
        how = f"planrt run --resume {shlex.quote(found['run'])}" if found["of"] else "RoundScheduler.resume"
        lines.append(f"  goes on {place}: {how}")
    return lines


def _clock(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%H:%M:%S UTC")

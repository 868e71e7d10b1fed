"""``planrt status RUN``: what a run folder says of its run, who is waited for at the moment, and until when."""

from __future__ import annotations

import argparse
import json
import shlex
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from planrt.errors import OptionError
from planrt.fl.runs.run_folder import NOW, OPTIONS, Journal, checkpoints_in, is_held
from planrt.shown import shown


def register(commands: Any, command: Callable[..., Any]) -> None:
    """Adds the command to the parser of `planrt`."""
    parser = command(commands, "status", _status, "say how far a run has come, and who is waited for")
    parser.add_argument("run", metavar="RUN", help="the run's folder")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _status(options: argparse.Namespace) -> int:
    found = status_of(Path(options.run))
    print(json.dumps(found, indent=1) if options.json else "\n".join(lines_of(found)))
    return 0


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

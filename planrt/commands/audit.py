"""``planrt audit FILE``: what clients did on a worker that is started with ``--audit FILE``, and whether the log is
whole."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any, Final

from planrt.chained import FIRST, ChainError, Link
from planrt.errors import OptionError
from planrt.shown import shown
from planrt.workers.serving.audit_parts import entries
from planrt.workers.serving.summing import NEVER, WHOLE

New = Callable[[Any, str, Callable[[argparse.Namespace], int], str], Any]
"""Makes a command of a name, an action and a help text."""

_BROKEN: Final = 1
_COLUMNS: Final = ("time", "worker", "session", "user", "event", "plan", "outcome")
_ELSEWHERE: Final = {*_COLUMNS, "filed"}


def register(commands: Any, new: New) -> None:
    """Puts the command among those of the command line."""
    made = new(
        commands, "audit", _audit, "show what clients did on a worker, and check that its log is whole"
    )
    made.add_argument("file", metavar="FILE", help="the log, as planrt serve --audit FILE keeps it")
    made.add_argument(
        "--user", metavar="NAME", help="only what this user did; '' is everybody without a token"
    )
    made.add_argument(
        "--plan", metavar="HASH", help="only what is about the plan whose hash begins so (8 digits or more)"
    )
    made.add_argument(
        "--since", metavar="TIME", help="only from then on: 2026-03-01, or 2026-03-01T08:00 (UTC)"
    )
    made.add_argument("--json", action="store_true", help="print JSON lines")
    made.add_argument(
        "--check",
        action="store_true",
        help="only say whether the chain holds, and else where it breaks (exit 1)",
    )


def _audit(options: argparse.Namespace) -> int:
    chosen = (options.user, options.plan, options.since)
    if options.check and (options.json or any(one is not None for one in chosen)):
        raise OptionError("--check is of the whole log: leave out --user, --plan, --since and --json")
    if options.plan is not None and not re.fullmatch(r"[0-9a-f]{8,64}", options.plan):
        raise OptionError(
            f"--plan: {shown(options.plan, 80)!r} does not name a plan: 8 to 64 digits of its hash"
        )
    since = None if options.since is None else _time(options.since)
    number, head, rows, summed = 0, FIRST, [], 0
    try:
        for file, link in entries(options.file):
            number, values, head = number + 1, link.values, link.hash
            summed += _summed(link, str(file))
            if options.check or not _wanted(values, options.user, options.plan, since):
                continue
            if options.json:
                print(json.dumps(values))
            else:
                rows.append(_row(values))
    except ChainError as error:
        _table(rows)
        print(f"planrt audit: {error}", file=sys.stderr)
        return _BROKEN
    _table(rows)
    more = f" ({summed:,} more events are summed up in them)" if summed else ""
    if options.check:
        print(f"{number} lines{more}, the chain holds; the hash of the last one is {head}")
    elif not options.json:
        print(f"{len(rows)} of {number} lines{more}; the hash of the last one is {head}")
    return 0


def _summed(link: Link, where: str) -> int:
    """Returns how many events a line sums up; 0 for one that is an event of its own.

    Raises:
        ChainError: it says that of what always has its own line, or no number.
    """
    values = link.values
    if values.get("event") != "summed":
        return 0
    lines = values.get("lines")
    if values.get("of") in NEVER or values.get("outcome") in WHOLE:
        raise ChainError(f"{where}, line {link.number}: it sums up what always has a line of its own")
    if not isinstance(lines, int) or isinstance(lines, bool) or lines < 1:
        raise ChainError(f"{where}, line {link.number}: it does not say how many events it sums up")
    return lines


def _time(text: str) -> datetime:
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        raise OptionError(
            f"--since: {shown(text, 80)!r} is no time: write 2026-03-01, or 2026-03-01T08:00"
        ) from None
    return found if found.tzinfo is not None else found.replace(tzinfo=UTC)


def _wanted(values: Mapping[str, Any], user: str | None, plan: str | None, since: datetime | None) -> bool:
    if user is not None and values.get("user") != user:
        return False
    if plan is not None and not any(str(values.get(key, "")).startswith(plan) for key in ("plan", "filed")):
        return False
    if since is None:
        return True
    try:
        return datetime.fromisoformat(str(values.get("time"))) >= since
    except (ValueError, TypeError):
        return True  # a line of somebody else's: it is shown


def _row(values: Mapping[str, Any]) -> list[str]:
    cells = [shown(str(values.get(key, "")), 64) for key in _COLUMNS]
    hash = str(values.get("filed") or values.get("plan") or "")
    cells[_COLUMNS.index("plan")] = shown(hash, 64)[:12]
    rest = []
    for key, value in values.items():
        if key not in _ELSEWHERE and value not in ("", []):
            listed = [f"{one} {n}" for one, n in value.items()] if isinstance(value, dict) else value
            said = ", ".join(map(str, listed)) if isinstance(listed, list) else str(listed)
            rest.append(f"{shown(key, 40)}={shown(said, 80)}")
    return [*cells, " ".join(rest)]


def _table(rows: list[list[str]]) -> None:
    if not rows:
        return
    table = [[*_COLUMNS, "about"], *rows]
    widths = [max(len(row[place]) for row in table) for place in range(len(_COLUMNS))]
    for row in table:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        print("  ".join([*cells, row[-1]]).rstrip())

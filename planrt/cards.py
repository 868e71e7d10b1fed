"""HTML for notebooks: a title, facts, a table, text. Whatever is shown is escaped, and what cannot be seen as
escapes.

Names, tags, descriptions and reasons may come from others. Nothing here is a link, a style of theirs, or
runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Final

from planrt.shown import shown

LONGEST: Final = 300
"""Longest fact, in characters."""
MOST: Final = 100
"""Most rows of a table, and lines of text; the rest is counted."""

_CELL: Final = 'style="text-align: left; padding: 1px 1em 1px 0; white-space: pre-wrap"'


def card(
    title: str,
    facts: Sequence[tuple[str, object]] = (),
    *,
    columns: Sequence[str] = (),
    rows: Sequence[Sequence[object]] = (),
    text: str = "",
) -> str:
    """Renders one object as HTML.

    Args:
        title: what it is.
        facts: name and value of each; those that are None or ``""`` are left out.
        columns, rows: a table below the facts.
        text: lines in a monospaced block, such as the ops of a plan.
    """
    parts = [f"<div><b>{_safe(title)}</b>"]
    lines = [
        f"<tr><td {_CELL}>{_safe(name)}</td><td {_CELL}>{_safe(value)}</td></tr>"
        for name, value in facts
        if value is not None and value != ""
    ]
    if lines:
        parts.append(f"<table>{''.join(lines)}</table>")
    if rows:
        head = "".join(f"<th {_CELL}>{_safe(name)}</th>" for name in columns)
        body = ["".join(f"<td {_CELL}>{_safe(value)}</td>" for value in row) for row in rows[:MOST]]
        if len(rows) > MOST:
            body.append(f'<td {_CELL} colspan="{len(columns)}">... {len(rows) - MOST:,} more</td>')
        parts.append(f"<table><tr>{head}</tr>{''.join(f'<tr>{row}</tr>' for row in body)}</table>")
    if text:
        every = text.splitlines()
        kept = [escape(shown(line, LONGEST)) for line in every[:MOST]]
        if len(every) > MOST:
            kept.append(f"... {len(every) - MOST:,} more lines")
        parts.append("<pre>" + "\n".join(kept) + "</pre>")
    return "".join([*parts, "</div>"])


def _safe(value: object) -> str:
    return escape(shown(str(value), LONGEST))

"""How pointers look when they are printed, and in notebooks. Nothing is asked of the worker for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from planrt.cards import card
from planrt.shown import shown

if TYPE_CHECKING:
    from planrt.workers.pointers.handle import Handle, Pointer


def tag_lines(tags: Sequence[str], description: str, between: str = "") -> str:
    """Returns the printed lines of tags and description, with `between` between them."""
    text = f"\n\tTags: {' '.join(shown(tag) for tag in tags)}{between}"
    if description:
        text += f"\n\tDescription: {shown((description.strip().splitlines() or [''])[0], 100)}..."
    return text


def gone_words(handle: Handle) -> str:
    """`` (used up)`` or `` (gone: WHY)`` of a pointer that points to nothing any more, else ``""``."""
    if not handle.alive:
        return " (used up)"
    why = handle.place.why_ended
    return f" (gone: {why})" if why else ""


def pointer_card(
    pointer: Pointer,
    kind: str,
    tags: Sequence[str],
    description: str,
    facts: Sequence[tuple[str, object]] = (),
    code: str = "",
) -> str:
    """Returns the HTML of a pointer, for notebooks."""
    handle = pointer._handle
    why = "used up" if not handle.alive else handle.place.why_ended
    place = " -> ".join([f"{handle.worker.id}:{handle.id}", *(worker.id for worker in handle.via)])
    return card(
        kind,
        [
            ("on", place),
            ("gone", why),
            *facts,
            ("tags", " ".join(tags)),
            ("description", description.strip().partition("\n")[0]),
        ],
        text=code,
    )

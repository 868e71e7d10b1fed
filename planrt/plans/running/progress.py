"""What this process computes right now, said to whoever watches it.

Nobody does, unless `watch` was called: then each op of a plan, each single op and each batch is told before it begins.
It is one watcher for a process, since a process that is watched computes one thing at a time.
"""

from __future__ import annotations

from collections.abc import Callable

Watcher = Callable[[str], None]
"""Is told the name of what begins; must be quick, and raise nothing."""

watcher: Watcher | None = None
"""Whom to tell; set by `watch` only."""


def watch(told: Watcher | None) -> None:
    """Lets `told` hear of everything that begins from now on; None ends that."""
    global watcher
    watcher = told


def began(what: str) -> None:
    """Tells that `what` begins."""
    if watcher is not None:
        watcher(what)

"""Joint runs that something happens to while they train, however long it takes until they do."""

import asyncio
import contextlib
import threading

from tests.processes import eventually

PATIENCE = 240.0
"""Seconds, within the suite's own limit: several runs may train at once, on a slow machine."""


def _trains(runs):
    """What says whether each of them has trained for another epoch since: its parties are in the next one then."""
    before = [len(run.losses) for run in runs]
    return lambda: all(len(run.losses) > count for run, count in zip(runs, before, strict=True))


@contextlib.contextmanager
def once_it_trains(run, happens, *args):
    """Calls ``happens(*args)`` in a thread of its own while the block trains `run`, in the midst of an epoch."""
    trains = _trains([run])

    def wait():
        if eventually(trains, PATIENCE):
            happens(*args)

    thread = threading.Thread(target=wait)
    thread.start()
    try:
        yield
    finally:
        thread.join()


async def under_way(*runs):
    """Waits until all of them are in the midst of an epoch."""
    assert await asyncio.to_thread(eventually, _trains(runs), PATIENCE)

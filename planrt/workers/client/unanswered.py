"""The errors of calls whose answer does not come, in words: the worker is gone, has lost the session, or is late."""

from __future__ import annotations

from planrt.errors import SessionLostError, WorkerLostError, WorkerTimeoutError
from planrt.workers.wire import messages as m


def lost(worker: str, address: str, what: str, why: str, *, session_lost: bool) -> WorkerLostError:
    """Returns the error for `what` was asked of a worker when the connection to it had ended for good; with
    `session_lost`, since it has the session no longer."""
    if session_lost:
        return SessionLostError(
            f"worker {worker!r} at {address} has lost this session ({why}), with its objects: no answer to {what}",
            address=address,
            worker_id=worker,
        )
    return WorkerLostError(
        f"worker {worker!r} at {address} is gone ({why}): no answer to {what}",
        address=address,
        worker_id=worker,
    )


def late(worker: str, address: str, what: str, seconds: float, away: str) -> WorkerTimeoutError:
    """Returns the error for an answer that did not come within so many seconds; `away` says why there is no connection
    now, where there is none."""
    why = f"; the connection was lost ({away}) and is tried again" if away else ""
    return WorkerTimeoutError(
        f"worker {worker!r} at {address} gave no answer to {what} within {seconds:g} s{why}",
        address=address,
        worker_id=worker,
        seconds=seconds,
    )


def described(body: m.Body) -> str:
    """Returns a message in words, with the objects that it names."""
    ids = [getattr(body, "id", None), *getattr(body, "ids", ()), *getattr(body, "roots", ())]
    named = [str(id) for id in ids if id is not None]
    more = "" if len(named) <= 8 else f" and {len(named) - 8} more"
    return type(body).__name__ + (f" of object {', '.join(named[:8])}{more}" if named else "")

"""The errors of calls whose answer does not come, in words: the worker is gone, has lost the session, or is late."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from planrt.errors import PlanrtError, SessionLostError, WorkerLostError, WorkerTimeoutError
from planrt.workers.wire import messages as m

if TYPE_CHECKING:
    from planrt.workers.client.connection import Connection


def failed(reply: asyncio.Future[Any] | None) -> BaseException | None:
    """Returns the error that a reply has, if it has come and is one."""
    return None if reply is None or not reply.done() or reply.cancelled() else reply.exception()


def keeper(connection: Connection) -> Callable[[BaseException], None]:
    """Returns what has the connection's next request raise an error; the error does not keep the connection."""
    to = weakref.ref(connection)

    def keep(error: BaseException) -> None:
        if (there := to()) is not None and isinstance(error, PlanrtError):
            there.keep(error)

    return keep


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

"""How a worker tells a client of what failed: errors as `Failure` messages. No I/O.

Requests and ops fail in many modules. What a client may hear of it is decided here: where it happened and why, with
the traceback, but nothing that follows from values which are not for it.
"""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from typing import Any

from planrt.errors import ExecutionError, LocalError, PolicyError
from planrt.workers import messages as m
from planrt.workers.determinism import explained
from planrt.workers.gate import NotApprovedError
from planrt.workers.posted import PostedOp
from planrt.workers.private import GetNotPermittedError
from planrt.workers.store import ObjectStore, StoredObject

_LONGEST = 60_000
"""Characters of a message or a traceback that are told: a header has to hold them."""


class OpFailedError(LocalError):
    """Carries a failure that is already in the client's words."""

    def __init__(self, failure: m.Failure) -> None:
        super().__init__(failure.message)
        self.failure = failure


def cut(text: str) -> str:
    """As much of `text` as a client is told, in characters that travel."""
    return text[:_LONGEST].encode(errors="backslashreplace").decode()


def failure_of(error: Exception) -> m.Failure:
    """`error` as the client is told of it."""
    if isinstance(error, OpFailedError):
        return error.failure
    kind = type(error).__name__.removeprefix("_")
    text = explained(str(error) if isinstance(error, LocalError) else f"{kind}: {error}")
    trace = "".join(traceback.format_exception(error))
    if isinstance(error, PolicyError):
        return m.Failure(kind, cut(text), error.op, error.line, index=error.index)
    return m.Failure(kind, cut(text), traceback=cut(trace[-_LONGEST:]), **in_plan(error))


def failure_of_op(
    error: Exception, op: PostedOp, number: int | None, used: Sequence[StoredObject], store: ObjectStore
) -> m.Failure:
    """`error`, of an op on the objects `used`, as the client is told of it; of private operands nothing is told."""
    if isinstance(error, OpFailedError):
        return error.failure
    kind = type(error).__name__
    if isinstance(error, GetNotPermittedError | NotApprovedError):
        return m.Failure(kind, cut(str(error)), op.name, number=number)
    if isinstance(error, PolicyError):  # of shapes and ops, never of values
        return m.Failure(
            kind, cut(str(error)), error.op or op.name, error.line, index=error.index, number=number
        )
    if any(store.label_of(stored) is not None for stored in used):
        return m.Failure(
            "ExecutionError", f"op {op.name} failed; its operands are private, so the worker does not say why",
            op.name, number=number,
        )  # fmt: skip
    reason = (str(error).strip().splitlines() or [kind])[0]
    text = explained(reason if isinstance(error, LocalError) else f"op {op.name} failed: {reason}")
    trace = "".join(traceback.format_exception(error))
    kind = kind if isinstance(error, LocalError) else "ExecutionError"
    inside = in_plan(error) if isinstance(error, ExecutionError) else {"op": op.name}
    return m.Failure(kind, cut(text), traceback=cut(trace[-_LONGEST:]), number=number, **inside)


def in_plan(error: Exception) -> dict[str, Any]:
    """Where in a plan `error` happened, as fields of a `Failure`."""
    if not isinstance(error, ExecutionError):
        return {}
    cause = error.__cause__
    said = "" if cause is None else cut(f"{type(cause).__name__}: {cause}"[:2_000])
    return {"op": error.op, "line": cut(error.line[:2_000]), "index": error.index, "cause": said}


def replace_message(failure: m.Failure, message: str) -> m.Failure:
    """`failure` with another text; it was not this session's op that failed, so the number goes."""
    return m.Failure(
        failure.kind,
        cut(message),
        failure.op,
        failure.line,
        failure.traceback,
        failure.index,
        failure.cause,
    )

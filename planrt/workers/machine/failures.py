"""How a worker tells a client of what failed: errors as `Failure` messages. No I/O.

Requests and ops fail in many modules. What a client may hear of it is decided here: where it happened and why, with
the traceback, but nothing that follows from values which are not for it (`failure_on_data`, `failure_of_op`), and
nothing of where the worker's files are: tracebacks name modules, and texts the last part of a path.
"""

from __future__ import annotations

import linecache
import re
import traceback
from functools import lru_cache
from pathlib import PurePath
from typing import Any

import msgspec

from planrt.errors import ExecutionError, LocalError, PolicyError
from planrt.workers.machine.devices import explained
from planrt.workers.wire import messages as m
from planrt.workers.wire.posted import PostedOp
from planrt.workers.wire.refusals import GetNotPermitted, NotApproved, kind_of

_LONGEST = 60_000
"""Characters of a message or a traceback that are told: a header has to hold them."""


_DIRECTORIES = re.compile(
    r"""(?P<quote>['"])(?:[A-Za-z]:\\|/)[^'"\n]*[/\\](?P<last>[^'"/\\\n]*)(?P=quote)"""  # in quotes: may have spaces
    r"""|(?<![\w/.:*])(?:[A-Za-z]:\\|/)(?:[^\s/\\'"`,;()<>]+[/\\])+"""
)


class OpFailedError(LocalError):
    """Carries a failure that is already in the client's words."""

    def __init__(self, failure: m.Failure) -> None:
        super().__init__(failure.message)
        self.failure = failure


def cut(text: str) -> str:
    """As much of `text` as a client is told, in characters that travel."""
    return text[:_LONGEST].encode(errors="backslashreplace").decode()[:_LONGEST]


def as_sent(failure: m.Failure) -> m.Failure:
    """`failure` with no text that is longer than its client takes: names and lines in it can be a client's own."""
    texts = {
        name: cut(text)
        for name in ("message", "op", "line", "traceback", "cause", "step")
        if isinstance(text := getattr(failure, name), str)
    }
    return msgspec.structs.replace(failure, **texts)


def without_directories(text: str) -> str:
    """`text` with only the last part of each absolute path in it."""

    def last(found: re.Match[str]) -> str:
        quote = found["quote"]
        return f"{quote}{found['last']}{quote}" if quote else ""

    return _DIRECTORIES.sub(last, text)


_CAUSED = "\nThe above exception was the direct cause of the following exception:\n\n"
_MEANWHILE = "\nDuring handling of the above exception, another exception occurred:\n\n"


def _trace_of(error: BaseException) -> str:
    """The traceback, with files named by their modules: where the worker keeps them is its own affair.

    A hostile client makes failures by the thousand, so this is not `traceback.format_exception`, which looks for each
    file on disk and parses each line again, for its carets.
    """
    return without_directories(_chain_of(error, set()))


def _chain_of(error: BaseException, seen: set[int]) -> str:
    """`error` and what was before it, each once."""
    told: list[str] = []
    link = ""
    now: BaseException | None = error
    while now is not None and id(now) not in seen:
        seen.add(id(now))
        parts = now.exceptions if isinstance(now, BaseExceptionGroup) else ()
        inside = "".join(_chain_of(part, seen) for part in parts)
        told.append(f"{_frames_of(now)}{_last_lines(now)}{inside}{link}")
        link = _MEANWHILE if now.__cause__ is None else _CAUSED
        now = now.__cause__ or (None if now.__suppress_context__ else now.__context__)
    return "".join(reversed(told))


def _frames_of(error: BaseException) -> str:
    frames = [
        traceback.FrameSummary(
            _module_file(code.co_filename), line, code.co_name,
            line=linecache.getline(code.co_filename, line, frame.f_globals),
        )
        for frame, line in traceback.walk_tb(error.__traceback__)
        for code in (frame.f_code,)
    ]  # fmt: skip
    lines = traceback.StackSummary.from_list(frames).format()
    return "".join(["Traceback (most recent call last):\n", *lines]) if lines else ""


def _last_lines(error: BaseException) -> str:
    """Which error, its words, and the notes on it."""
    kind = type(error)
    name = (
        kind.__qualname__
        if kind.__module__ in ("builtins", "__main__")
        else f"{kind.__module__}.{kind.__qualname__}"
    )
    words = [_words_of(error), *map(str, getattr(error, "__notes__", ()))]
    return "\n".join([f"{name}: {words[0]}" if words[0] else name, *words[1:], ""])


def _words_of(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:
        return "<exception str() failed>"


@lru_cache(maxsize=4096)
def _module_file(name: str) -> str:
    """``planrt/workers/machine/state.py`` for that file, wherever that is; of other files the last part."""
    parts = PurePath(name).parts
    for place in range(len(parts) - 1, 0, -1):
        if parts[place - 1] in ("site-packages", "dist-packages") or (parts[place] == "planrt" and place > 1):
            return "/".join(parts[place:])
    return parts[-1] if parts else name


def failure_on_data(error: Exception) -> m.Failure:
    """`error`, of a run on data that its client may not see: the op, its place and its line, which the client knows.

    Why it failed, and in which batch, can be a value of that data. Only that its time was over is said.
    """
    if isinstance(error, ExecutionError):
        late = (
            ": the time that the plan may take is over" if isinstance(error.__cause__, TimeoutError) else ""
        )
        text = f"op {error.index} of the plan failed: {error.line}{late or _UNSAID}"
        return m.Failure("ExecutionError", cut(text), error.op, cut(error.line[:2_000]), index=error.index)
    return m.Failure("ExecutionError", f"{_ELSEWHERE}{_UNSAID}")


_ELSEWHERE = "the run failed in the data set, a backward pass, the optimizer or the counting of classes"
_UNSAID = "; why can depend on the data, so it is for the worker's owner only"


def failure_of(error: Exception) -> m.Failure:
    """`error` as the client is told of it."""
    if isinstance(error, OpFailedError):
        return error.failure
    kind = kind_of(error)
    text = explained(str(error) if isinstance(error, LocalError) else f"{kind}: {error}")
    text = cut(without_directories(text))
    if isinstance(error, PolicyError):
        return m.Failure(kind, text, error.op, error.line, index=error.index)
    return m.Failure(kind, text, traceback=cut(_trace_of(error)[-_LONGEST:]), **in_plan(error))


def failure_of_op(error: Exception, op: PostedOp, number: int | None, *, private: bool) -> m.Failure:
    """Returns `error`, of an op, as the client is told of it; where its operands are `private`, not why it failed.

    `number` counts the ops of the session, from 0; None for one that is answered.
    """
    if isinstance(error, OpFailedError):
        return error.failure
    kind = kind_of(error)
    if isinstance(error, GetNotPermitted | NotApproved):
        return m.Failure(kind, cut(str(error)), op.name, number=number)
    if isinstance(error, PolicyError):  # of shapes and ops, never of values
        return m.Failure(
            kind, cut(str(error)), error.op or op.name, error.line, index=error.index, number=number
        )
    if private:
        return m.Failure(
            "ExecutionError", f"op {op.name} failed; its operands are private, so the worker does not say why",
            op.name, number=number,
        )  # fmt: skip
    reason = (str(error).strip().splitlines() or [kind])[0]
    text = explained(reason if isinstance(error, LocalError) else f"op {op.name} failed: {reason}")
    kind = kind if isinstance(error, LocalError) else "ExecutionError"
    inside = in_plan(error) if isinstance(error, ExecutionError) else {"op": op.name}
    text, trace = cut(without_directories(text)), cut(_trace_of(error)[-_LONGEST:])
    return m.Failure(kind, text, traceback=trace, number=number, **inside)


def in_plan(error: Exception) -> dict[str, Any]:
    """Returns where in a plan `error` happened, as fields of a `Failure`."""
    if not isinstance(error, ExecutionError):
        return {}
    cause = error.__cause__
    said = "" if cause is None else without_directories(f"{type(cause).__name__}: {cause}")
    return {"op": error.op, "line": cut(error.line[:2_000]), "index": error.index, "cause": cut(said[:2_000])}


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

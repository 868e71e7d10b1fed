"""The one background thread that does planrt's I/O, and the ways in from other threads and loops.

Blocking calls go through `run`; `await` forms through `on_loop`, which works from any caller's event loop
(a script's `asyncio.run`, a notebook's running loop) and from planrt's own.
"""

from __future__ import annotations

import asyncio
import atexit
import functools
import threading
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, Final, ParamSpec, TypeVar, cast

import torch

from planrt.errors import BlockingCallError

T = TypeVar("T")
P = ParamSpec("P")

_lock = threading.Lock()
_loop: asyncio.AbstractEventLoop | None = None
_thread: threading.Thread | None = None


def new_event_loop() -> asyncio.AbstractEventLoop:
    """Returns a uvloop where it is installed (not on Windows), else asyncio's own."""
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()


def background_loop() -> asyncio.AbstractEventLoop:
    """Returns the loop of the background thread, started at the first call."""
    global _loop, _thread
    with _lock:
        if _loop is None or _thread is None or not _thread.is_alive():
            _loop = new_event_loop()
            _thread = threading.Thread(target=_loop.run_forever, name="planrt-io", daemon=True)
            _thread.start()
            _use_one_torch_thread(_loop)
        return _loop


def _use_one_torch_thread(loop: asyncio.AbstractEventLoop) -> None:
    """Averages are added up on the loop thread, while workers may need the cores: no helpers for it there.

    torch keeps the number of OpenMP threads per thread, but everything else about threads per process: that
    is put back. A thread's first question for its number sets it to the process's, so it is asked before.
    """
    elsewhere = torch.get_num_threads()

    async def limit() -> None:
        torch.get_num_threads()
        torch.set_num_threads(1)

    asyncio.run_coroutine_threadsafe(limit(), loop).result()
    torch.set_num_threads(elsewhere)


def on_loop_thread() -> bool:
    """Returns whether the caller is on planrt's own loop thread, where nothing may block."""
    return threading.current_thread() is _thread


def refuse_to_block(instead: str) -> None:
    """Raises BlockingCallError on planrt's own loop thread, before a blocking call has done anything."""
    if on_loop_thread():
        raise BlockingCallError(f"a blocking call on planrt's own loop thread: write `{instead}` there")


def run(coroutine: Coroutine[Any, Any, T], *, instead: str) -> T:
    """Runs `coroutine` on the background loop and waits for its result.

    `instead` is the `await` form to name when called on the background thread itself.

    Raises:
        BlockingCallError: called on the background thread, which would wait for itself for ever.
    """
    loop = background_loop()
    if on_loop_thread():
        coroutine.close()
        refuse_to_block(instead)
    telling = _Telling()
    future = asyncio.run_coroutine_threadsafe(telling.watched(coroutine), loop)
    try:
        return future.result()
    except BaseException as error:  # Ctrl-C while waiting: the work must not go on unseen
        future.cancel()
        telling.raises(error)
        raise


def on_loop(
    function: Callable[P, Coroutine[Any, Any, T]],
) -> Callable[P, Coroutine[Any, Any, T]]:
    """Makes a coroutine function awaitable from any loop: its body always runs on the background loop.

    `help` and `inspect.signature` show the function as it was written.
    """

    @functools.wraps(function)
    async def call(*args: P.args, **kwargs: P.kwargs) -> T:
        loop = background_loop()
        if asyncio.get_running_loop() is loop:
            return await function(*args, **kwargs)
        telling = _Telling()
        future = asyncio.run_coroutine_threadsafe(telling.watched(function(*args, **kwargs)), loop)
        try:
            return await asyncio.wrap_future(future)
        except BaseException as error:
            telling.raises(error)
            raise

    return call


# ------------------------------------------------------------------------ errors that somebody has to hear of

_KEEP: Final = "_planrt_keep"


def keep_unless_heard(error: BaseException, keep: Callable[[BaseException], None]) -> None:
    """Has `keep` called with `error`, of which there is no trace elsewhere, if the call that raises it has been given
    up: cancelled, or interrupted, perhaps in the very moment in which it failed. `keep` is called in any thread."""
    error.__dict__[_KEEP] = keep


def unheard(error: BaseException) -> None:
    """Notes that nobody will hear of `error`: where it has to be, it is kept for another call."""
    keep = error.__dict__.pop(_KEEP, None)
    if keep is not None:
        keep(error)


async def all_answers(asked: Sequence[Awaitable[T]]) -> list[T]:
    """Awaits all of `asked` at once; returns what they give, in their order.

    Once all have ended, the error of the first one that failed is raised, with a note for each other thing that went
    wrong: so whoever catches it by its kind does, and reads which others failed.
    """
    done = await asyncio.gather(*asked, return_exceptions=True)
    errors = [one for one in done if isinstance(one, BaseException)]
    if not errors:
        return cast("list[T]", done)
    first, *others = errors
    for error in others:
        unheard(error)
    for text in dict.fromkeys(
        f"{type(error).__name__}: {error}" for error in others if str(error) != str(first)
    ):
        first.add_note(f"And {text}")
    raise first


class _Telling:
    """Whether the error of one call reaches the caller, who may have gone when it is raised on planrt's loop."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._error: Exception | None = None
        self._gone = False

    async def watched(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Awaits `coroutine`, on planrt's loop."""
        try:
            return await coroutine
        except Exception as error:
            if _KEEP in error.__dict__:
                with self._lock:
                    gone = self._gone
                    self._error = None if gone else error
                if gone:
                    unheard(error)
            raise

    def raises(self, error: BaseException) -> None:
        """Notes what the caller hears: this error, which need not be that of the coroutine."""
        with self._lock:
            self._gone = True
            mine, self._error = self._error, None
        if mine is error:
            error.__dict__.pop(_KEEP, None)
        elif mine is not None:
            unheard(mine)


@atexit.register
def _stop() -> None:
    if _loop is not None and _thread is not None and _thread.is_alive():
        asyncio.run_coroutine_threadsafe(_cancel_all(), _loop)
        _thread.join(timeout=3)


async def _cancel_all() -> None:
    """Cancels what still runs, so that connections close properly, then stops the loop."""
    tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks, timeout=2) if tasks else None
    asyncio.get_running_loop().stop()

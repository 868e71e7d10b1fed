"""One run of a function under a recorder, and whether one is going on in this thread."""

from __future__ import annotations

import gc
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from planrt.errors import PlanrtError, TraceError
from planrt.plans.ir.source import line_of_error, user_line
from planrt.plans.recording import torch_calls
from planrt.plans.recording.lifting import StateRegistry
from planrt.plans.recording.optimizers import OptimizerWatch
from planrt.plans.recording.python_state import Left
from planrt.plans.recording.recorder import Recorder, Run
from planrt.types import TensorSpec

_SEED: Final = 0x706C616E  # of torch's generator during a run: a function that sets its own is found out


class SeededError(TraceError):
    """Somebody seeded torch's generator during a run: the function, or another thread, as workers of this
    process do while they compute."""


class _UnseenWrites(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch has no hints there
    """Below the recorder: refuses writes to tensors that are part of no call which it sees, such as
    `Tensor.set_` and ``z.real = x``. They would be missing in the plan."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """torch asks; True would import its compiler at the first kernel: 70 MB, and a second or two."""
        return False

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._recorder = recorder

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Called by torch for every kernel, below autograd."""
        if self._recorder.in_call:
            return func(*args, **(kwargs or {}))
        if func._schema.is_mutable:
            self._recorder.fail(torch_calls.why_unseen(func._schema.name), user_line())
        with torch._C.DisableTorchFunction():  # or the recorder would take the kernel for the user's call
            return func(*args, **(kwargs or {}))


_collecting = threading.Lock()
_runs = 0
_collected_before = True


@contextmanager
def _nothing_collected() -> Iterator[None]:
    """Python's cyclic collector waits: it would finalize in this thread, at any moment, what the function
    knows nothing of, and the recorder would take what that does (a ``no_grad`` block that ends, say) for the
    function's."""
    global _runs, _collected_before
    with _collecting:
        if _runs == 0:
            _collected_before = gc.isenabled()
            gc.disable()
        _runs += 1
    try:
        yield
    finally:
        with _collecting:
            _runs -= 1
            if _runs == 0 and _collected_before:
                gc.enable()


class _Active(threading.local):
    recorder: Recorder | None = None


_active = _Active()


def active_recorder() -> Recorder | None:
    """Returns the recorder under which this thread runs a function."""
    return _active.recorder


def recording() -> bool:
    """Returns whether this thread is recording a plan: a plan that is called then is to be inlined."""
    return _active.recorder is not None


def run_once(
    function: Callable[..., Any],
    examples: Sequence[torch.Tensor],
    specs: Sequence[TensorSpec],
    registry: StateRegistry,
    optimizers: OptimizerWatch,
    values: list[torch.Tensor] | None = None,
    left: Left | None = None,
) -> Run:
    """Run `function` on copies of `examples` under a recorder. `values` are those of the first run, in a
    later one; `left` is what an earlier run left behind, in one that begins there.

    Raises:
        TraceError: whatever went wrong, with the user's line.
    """
    inputs = [example.detach().clone().requires_grad_(example.requires_grad) for example in examples]
    recorder = Recorder(inputs, specs, registry, values, optimizers, left)
    torch.default_generator.manual_seed(_SEED)
    try:
        with _nothing_collected(), torch.enable_grad(), _UnseenWrites(recorder), recorder:
            _active.recorder = recorder
            outputs = function(*inputs)
        if recorder.failure is not None:
            raise recorder.failure
        recorder.check_draws(None)
        if torch.initial_seed() != _SEED:
            raise SeededError(
                "the function seeds torch's generator, which a plan cannot: seed the plan where it runs "
                "(torch.manual_seed here, a request's seed on a worker)"
            )
        return recorder.finish(outputs)
    except PlanrtError:
        raise recorder.failure or sys.exc_info()[1] from None  # type: ignore[misc]
    except Exception as error:
        if recorder.failure is not None:
            raise recorder.failure from error
        recorder.check_draws(line_of_error(error))
        reason = (str(error).strip().splitlines() or [""])[0]
        raise TraceError(
            f"the function failed on its example arguments: {type(error).__name__}: {reason}",
            line=line_of_error(error),
        ) from error
    finally:
        _active.recorder = None

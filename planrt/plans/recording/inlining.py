"""A plan called while another one is recorded: its ops become ops of that plan.

The inner plan runs on the interpreter, as ever; what it calls is seen by the recorder. So sizes that are free
stay free, no-grad regions stay, and the lines are those of the inner function.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from planrt.errors import ExecutionError, PlanError
from planrt.plans.ir import ops
from planrt.plans.ir.graph import Graph, Op
from planrt.plans.recording.recorder import Recorder
from planrt.plans.recording.traced_run import active_recorder
from planrt.plans.running.interpreter import Program, check_arguments, drive
from planrt.types import Nested


def inline(
    graph: Graph, inputs: Sequence[torch.Tensor], state: Sequence[torch.Tensor], *, name: str | None = None
) -> Nested:
    """Record the ops of `graph` on `inputs` and `state`, and return their results.

    Args:
        graph: the inner plan.
        inputs: tensors of the function that is being recorded.
        state: the tensors that the inner plan holds, themselves and not copies: a tensor that the outer plan
            knows already (both use one module) is one state entry. Others become state of the outer plan.
        name: what the new entries' names begin with, the plan's name by default: ``inner.weight``.

    Raises:
        PlanError: nothing is being recorded, or an op needs another worker.
        PlanArgumentError: inputs or state that do not fit `graph`.
        TraceError: an op failed on these inputs; names the inner line.
    """
    recorder = active_recorder()
    if recorder is None:
        raise PlanError("no plan is being recorded: execute the plan instead of inlining it")
    with torch._C.DisableTorchFunction():  # nothing of this is the function's
        check_arguments(graph, inputs, state)
        prefix = graph.name if name is None else name
        for entry, tensor in zip(graph.state, state, strict=True):
            recorder.registry.name(tensor, f"{prefix}.{entry.name}", entry.kind)
            recorder.hold(tensor)
        given = [*inputs, *state]
        device = given[0].device if given else torch.device("cpu")
    program = _Inlined(graph, device, recorder)
    try:
        return drive(program.run(inputs, state, isolated=graph.differentiates))
    except ExecutionError as error:
        line = graph.lines[error.index] if error.index < len(graph.lines) else None
        recorder.fail(f"plan {graph.name!r}, called in the function, failed: {error}", line)


class _Inlined(Program):
    """A plan whose steps are seen by a recorder, each with its own line."""

    def __init__(self, graph: Graph, device: torch.device, recorder: Recorder) -> None:
        self._recorder = recorder
        super().__init__(graph, device, functions=ops.UNWRAPPED)

    def _function(self, index: int, op: Op) -> Callable[..., Any]:
        function = super()._function(index, op)
        line = self._plan.lines[index] if index < len(self._plan.lines) else None

        def seen(*args: Any, **kwargs: Any) -> Any:
            with self._recorder.at(line):
                return function(*args, **kwargs)

        return seen

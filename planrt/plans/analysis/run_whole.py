"""The analysis of a plan that differentiates, or is to be differentiated: it runs whole, on meta tensors.

One of the two ways of `planrt.plans.analysis.analyse`, for plans that cannot be put together from single ops.
The interpreter runs them under autograd, as it would a real call, watched by `planrt.plans.analysis.tracker`.
So this is the way that makes tensors and runs kernels; it costs far more than looking ops up, and stops at
the first that needs values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from planrt.errors import ExecutionError
from planrt.plans.analysis.effects import on_meta
from planrt.plans.analysis.findings import (
    COPIES_BY_STRIDES,
    Clock,
    Findings,
    Output,
    bytes_of,
    paths,
    source_info,
)
from planrt.plans.analysis.flow import INDEPENDENT, all_lost, joined
from planrt.plans.analysis.report import Report, Unforeseen, ValueReport
from planrt.plans.analysis.tracker import Tracker
from planrt.plans.ir import ops as table
from planrt.plans.ir.graph import Graph, refs_in
from planrt.plans.running.inference import needs_values
from planrt.plans.running.interpreter import Program, drive
from planrt.types import Nested, Ref, TensorSpec, leaves, map_leaves


class Whole(Findings):
    """A plan that differentiates, or is to be differentiated."""

    def __init__(self, graph: Graph, inputs: tuple[TensorSpec, ...], clock: Clock, gradients: bool) -> None:
        super().__init__(graph, inputs, clock)
        self.gradients = gradients
        self.tracker = Tracker(clock.check)
        self.index = 0

    def report(self) -> Report:
        """Runs the plan, and where `gradients` says so a backward pass from its loss.

        Raises:
            ExecutionError: an op cannot run on such inputs; names it.
        """
        graph, tracker = self.graph, self.tracker
        followed = len(self.inputs)
        tensors = []
        for source, like in enumerate(self.sources):
            entry = graph.state[source - followed] if source >= followed else None
            tensor = torch.empty(
                like.shape,
                dtype=like.dtype,
                device="meta",
                requires_grad=self.gradients and entry is not None and entry.trainable,
            )
            tracker.register(tensor, source_info(source, like, entry is None))
            tensors.append(tensor)
        self.owners = {tracker.memory(tensor): source for source, tensor in enumerate(tensors)}
        functions = {op.name: self._watched(op.name, table.lookup(op.name)) for op in graph.ops}
        program = Program(graph, torch.device("meta"), functions=functions)
        try:
            with torch.enable_grad(), tracker:
                results = drive(program.run(tensors[:followed], tensors[followed:]))
                gradients = self._gradients(results, tensors[followed:])
        except ExecutionError as error:
            if not isinstance(error.__cause__, Exception) or not needs_values(error.__cause__):
                raise
            return self._cut_off(tensors)
        outputs: list[Output] = []
        output_bytes = 0
        for path, leaf in paths(results):
            if isinstance(leaf, torch.Tensor):
                like = TensorSpec.of(leaf)
                outputs.append((path, like, tracker.info(leaf)))
                output_bytes += bytes_of(like)
            else:
                outputs.append((path, None, INDEPENDENT))
        self.unknown = tracker.unknown
        report = self.make(outputs, [tracker.info(one) for one in tensors], output_bytes, tracker.peak)
        return replace(report, gradients=gradients)

    def _gradients(self, results: Nested, state: Sequence[torch.Tensor]) -> tuple[ValueReport, ...]:
        """What a training loop gets by a backward pass from the loss."""
        loss = next((leaf for _, leaf in paths(results)), None)
        trained = [place for place, tensor in enumerate(state) if tensor.requires_grad]
        if not trained or not isinstance(loss, torch.Tensor) or loss.dim() or not loss.requires_grad:
            return ()
        tracker, before = self.tracker, self.tracker.flops
        tracker.op = -1
        made = torch.autograd.grad(
            loss, [state[place] for place in trained], retain_graph=True, allow_unused=True
        )
        self.flops += tracker.flops - before
        return tuple(
            [
                self.value_report(
                    f"gradient of {self.graph.state[place].name}", TensorSpec.of(one), tracker.info(one)
                )
                for place, one in zip(trained, made, strict=True)
                if one is not None
            ]
        )

    def _watched(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, taking notes. The interpreter calls one function for each op, in their order."""

        def watched(*args: Any, **kwargs: Any) -> Any:
            index, self.index = self.index, self.index + 1
            tracker = self.tracker
            tracker.op = index
            tracker.written.clear()
            flops = tracker.flops
            result = map_leaves(function(*args, **kwargs), on_meta)
            made = [leaf for leaf in leaves(result) if isinstance(leaf, torch.Tensor)]
            tracker.settle(made, [leaf for leaf in leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)])
            operand = args[0] if args else None
            if name in COPIES_BY_STRIDES and made and isinstance(operand, torch.Tensor):
                tracker.tie(made[0], operand)
                owner = self.owners.get(tracker.memory(operand))
                if owner is not None:
                    self.owners[tracker.memory(made[0])] = owner
            for source in sorted({self.owners.get(key, -1) for key in tracker.written} - {-1}):
                self.written.setdefault(source, []).append(index)
            size = sum(tracker.allocated(made).values())
            self.note(index, tuple([TensorSpec.of(one) for one in made]), size, tracker.flops - flops)
            return result

        return watched

    def _cut_off(self, tensors: Sequence[torch.Tensor]) -> Report:
        """An op needed values: nothing is known from there on, so everything may depend on everything,
        raw."""
        first = len(self.ops)
        everything = INDEPENDENT
        for tensor in tensors:
            everything = joined(everything, self.tracker.info(tensor))
        everything = all_lost(everything, self.graph.ops[first].name, first)
        for index in range(first, len(self.graph.ops)):
            op = self.graph.ops[index]
            self.note(index, tuple([Unforeseen()] * len(list(refs_in(op.results)))), None, None)
            written = table.written_operands(op.name, op.args, op.kwargs)
            if any(isinstance(leaf, Ref) for leaf in written):  # through views it may be any source
                for source in range(len(self.sources)):
                    self.written.setdefault(source, []).append(index)
        outputs: list[Output] = [
            (path, Unforeseen() if isinstance(leaf, Ref) else None, everything)
            for path, leaf in paths(self.graph.outputs)
        ]
        return self.make(outputs, [everything] * len(self.sources), 0, self.tracker.peak)

"""Watches ATen kernels run on meta tensors: what depends on what, memory, and floating-point operations.

`Tracker` is a `TorchDispatchMode`, so it sees what happens below autograd: compound functions as the kernels
they are made of, and backward passes as well. Nothing is computed: meta tensors have shapes and no values.
What it knows of a tensor hangs on the tensor's memory (autograd makes new tensor objects for the values it
saved), and goes when that memory is freed, which is also how it knows how much is in use.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from planrt.plans.analysis.flow import INDEPENDENT, Info, Node, all_lost, joined
from planrt.plans.analysis.kernels import VIEWS, Call, Kernel, Link, hidden_writes, kernel, links
from planrt.plans.analysis.rows import Trace, lost

_Layout = tuple[Any, ...]


class _Cell:
    """A piece of memory and the tensors that look at it."""

    __slots__ = ("nodes", "op", "reference", "size")

    def __init__(self, reference: Any, size: int, op: int) -> None:
        self.nodes: dict[_Layout, Node] = {}
        self.reference = reference  # its callback needs it alive
        self.size = size
        self.op = op


class Tracker(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows everything that runs under it. Tensors that come from outside are announced by `register`.

    Args:
        check: called before each kernel; what it raises ends the run.

    Attributes:
        flops: floating-point operations so far. Products and convolutions by torch's formulas (a
            multiplication and an addition are two), everything else one for each entry of the larger of
            arguments and results.
        live: bytes in use that were allocated under this mode; `peak` the most since it was last set.
        unknown: names of kernels without a rule that ran.
        written: memory that was written to; the caller clears it.
        op: the plan's op that is running; its bit is added to what results depend on.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """torch asks; True would import its compiler at the first kernel: 70 MB, and a second or two."""
        return False

    def __init__(self, check: Callable[[], None] = lambda: None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._check = check
        self.flops = 0
        self.live = 0
        self.peak = 0
        self.unknown: set[str] = set()
        self.written: set[int] = set()
        self.op = -1
        self._cells: dict[int, _Cell] = {}
        self._everything = Info()

    def register(self, tensor: torch.Tensor, info: Info) -> None:
        """Announce a tensor from outside, with memory of its own."""
        self._add(tensor, info, counted=False)
        self._everything = joined(self._everything, all_lost(info, "out of sight"))

    def info(self, tensor: torch.Tensor) -> Info:
        """Returns what a tensor depends on."""
        return self._node(tensor).info

    def memory(self, tensor: torch.Tensor) -> int:
        """Returns a number that tensors share which share memory."""
        return int(tensor.untyped_storage()._cdata)

    def settle(self, results: Sequence[torch.Tensor], operands: Sequence[torch.Tensor]) -> None:
        """Take in what an op returned that no kernel was seen to make, as `torch.tensor` does with its
        constants."""
        for tensor in results:
            if self.memory(tensor) not in self._cells:
                self._add(tensor, self._everything if operands else INDEPENDENT, counted=True)

    def tie(self, result: torch.Tensor, base: torch.Tensor) -> None:
        """From now on, what is written into `result`, a copy of `base`, counts as written into `base` as
        well."""
        if self.memory(result) == self.memory(base):
            return
        node, parent = self._node(result), self._node(base)
        while node.parent is not None:
            node = node.parent
        node.attach(parent, tuple([lost("a copy")] * len(parent.shape)))

    def allocated(self, tensors: Sequence[torch.Tensor]) -> dict[int, int]:
        """Memory -> bytes, of those of these tensors whose memory the running op allocated."""
        found = {}
        for tensor in tensors:
            key = self.memory(tensor)
            cell = self._cells.get(key)
            if cell is not None and cell.op == self.op:
                found[key] = cell.size
        return found

    # One kernel

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Called by torch for each kernel."""
        self._check()
        kwargs = kwargs or {}
        about = kernel(func)
        tensors = [*_tensors(args), *_tensors(tuple(kwargs.values()))] if kwargs else list(_tensors(args))
        shapes = {id(tensor): tuple(tensor.shape) for tensor in tensors}
        nodes = {id(tensor): self._node(tensor) for tensor in tensors}
        result = func(*args, **kwargs)
        outputs = [result] if isinstance(result, torch.Tensor) else list(_tensors(result))
        call = Call(about, args, kwargs, tensors, shapes, outputs)
        if about.rule is None:
            self.unknown.add(about.name)
        self._count(about, args, kwargs, result, call)
        every = links(call)
        infos = [self._gathered(part, nodes, shapes) for part in every]
        written = {id(one): self._gathered(part, nodes, shapes) for one, part in hidden_writes(call)}
        for output, part, info in zip(outputs, every, infos, strict=True):
            self._result(about, output, part, info, nodes, tensors)
        for position, name in about.writes:
            target = args[position] if position < len(args) else kwargs.get(name)
            self._written(about, target, outputs, nodes, written, infos)
        for tensor in tensors:
            if id(tensor) in written:
                nodes[id(tensor)].write(written[id(tensor)])
                self.written.add(self.memory(tensor))
        return result

    def _count(
        self, about: Kernel, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any, call: Call
    ) -> None:
        if about.name in VIEWS:
            return
        if about.flops is not None:
            self.flops += int(about.flops(*args, **kwargs, out_val=result))
        elif call.tensors:
            sizes = [_entries(call.shape(tensor)) for tensor in call.tensors]
            self.flops += max([*sizes, *[output.numel() for output in call.outputs]])

    def _gathered(
        self, part: Sequence[Link], nodes: Mapping[int, Node], shapes: Mapping[int, tuple[int, ...]]
    ) -> Info:
        """What a result with these links depends on."""
        total = INDEPENDENT
        for tensor, fates in part:
            total = joined(total, nodes[id(tensor)].info.through(shapes[id(tensor)], fates))
        if self.op < 0:
            return total if total is INDEPENDENT or not part else Info(total.sources, total.ops, total.rows)
        rows = total.rows
        if any(trace.lost for trace in rows.values()):
            rows = {source: self._blamed(trace) for source, trace in rows.items()}
        return Info(total.sources, total.ops | 1 << self.op, rows)

    def _blamed(self, trace: Trace) -> Trace:
        if trace.lost and trace.lost[1] < 0 <= self.op:
            return trace._replace(lost=(trace.lost[0], self.op))
        return trace

    def _result(
        self,
        about: Kernel,
        output: torch.Tensor,
        part: Sequence[Link],
        info: Info,
        nodes: Mapping[int, Node],
        tensors: Sequence[torch.Tensor],
    ) -> None:
        cell = self._cells.get(self.memory(output))
        if cell is None:
            self._add(output, info, counted=True)
            return
        if (
            id(output) in nodes and about.name not in VIEWS
        ):  # changed in place (`_written`), or handed through
            return
        layout = _layout(output)
        if layout in cell.nodes:
            return
        mine = self.memory(output)
        base = next((tensor for tensor in tensors if self.memory(tensor) == mine), None)
        fates = next((fates for tensor, fates in part if tensor is base), None)
        if base is None or fates is None:
            fates = tuple([lost(about.name)] * (base.dim() if base is not None else 0))
        cell.nodes[layout] = Node(
            info, tuple(output.shape), nodes[id(base)] if base is not None else None, fates
        )

    def _written(
        self,
        about: Kernel,
        target: Any,
        outputs: Sequence[torch.Tensor],
        nodes: Mapping[int, Node],
        written: Mapping[int, Info],
        infos: Sequence[Info],
    ) -> None:
        if about.name in VIEWS or about.name in _STATISTICS:
            return
        for tensor in _tensors([target]):
            if id(tensor) in written:
                continue
            info = next((one for output, one in zip(outputs, infos, strict=True) if output is tensor), None)
            if info is None:  # an `out=` or a helper's argument
                info = INDEPENDENT
                for node in nodes.values():
                    info = joined(info, all_lost(node.info, about.name))
            nodes[id(tensor)].write(info)
            self.written.add(self.memory(tensor))

    # Memory

    def _add(self, tensor: torch.Tensor, info: Info, *, counted: bool) -> Node:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes() if counted else 0
        cell = _Cell(weakref.ref(storage, partial(self._freed, key, size)), size, self.op)
        node = cell.nodes[_layout(tensor)] = Node(info, tuple(tensor.shape))
        self._cells[key] = cell
        self.live += size
        self.peak = max(self.peak, self.live)
        return node

    def _freed(self, key: int, size: int, _reference: Any) -> None:
        self._cells.pop(key, None)
        self.live -= size

    def _node(self, tensor: torch.Tensor) -> Node:
        cell = self._cells.get(tensor.untyped_storage()._cdata)
        if cell is None:  # a number that torch wrapped, or something made behind our back
            number = tensor.dim() == 0 and tensor.device.type == "cpu"
            return self._add(tensor, INDEPENDENT if number else self._everything, counted=False)
        layout = _layout(tensor)
        node = cell.nodes.get(layout)
        if node is None:
            info = INDEPENDENT
            for other in cell.nodes.values():
                info = joined(info, all_lost(other.info, "an alias"))
            root = next(iter(cell.nodes.values()))
            unknown = tuple([lost("an alias")] * len(root.shape))
            node = cell.nodes[layout] = Node(info, tuple(tensor.shape), root, unknown)
        return node


_STATISTICS = frozenset({"native_batch_norm", "_native_batch_norm_legit", "_batch_norm_with_update"})


def _layout(tensor: torch.Tensor) -> _Layout:
    """Equal for tensors that show the same entries of their memory at the same places."""
    shape = tuple(tensor.shape)
    stride = tensor.stride()
    if 1 in shape or 0 in shape:
        stride = tuple([step if size > 1 else 0 for step, size in zip(stride, shape, strict=True)])
    return tensor.storage_offset(), shape, stride


def _entries(shape: Sequence[int]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    for value in values if isinstance(values, tuple | list) else ():
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, tuple | list):
            yield from _tensors(value)

"""What a client knows of the gradients on one worker, mostly without asking.

A backward pass is one message. Whoever then reads ``.grad`` has to know whether there is a gradient: an optimizer
skips a parameter that has none. The worker's answer tells; but waiting for it would leave the worker idle while the
next ops are made here. So the client keeps the graph of its own ops (`Histories`), and where every op on the way from
the loss is one that passes gradients to all of its operands, it *foresees* which leaves get one, and goes on at once.
Elsewhere (ops in place, hooks for inner gradients, plans, results with several parts, ...) it waits, as ever.

A pass that was foreseen and fails is like an exception that has not arrived yet: what was posted after it must not
run, or an optimizer would step with the gradients of the pass before. The worker skips it, until the client has heard
of the failure, raised it, and said so (`planrt.workers.wire.messages.Resume`).
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import weakref
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from planrt.loop import run
from planrt.plans.running.inference import Spec, spec
from planrt.types import leaves
from planrt.workers.pointers.tensor import PointerTensor, alive
from planrt.workers.wire import messages as m
from planrt.workers.wire.objects import spec_from_wire

if TYPE_CHECKING:
    from planrt.workers.client.connection import Connection, Outgoing

_KEPT_DONE = 64
"""Passes that went well, before what the connection keeps of them is freed."""

# ------------------------------------------------------------------------------- the graph of one's own ops

_SHARED = """
    abs add addcdiv addcmul addmm addmv baddbmm bmm chunk clone cos cosh cumsum diagonal div divide dot erf exp expm1
    flatten flip index_select log log10 log1p log2 log_softmax logsumexp masked_fill matmul mean mm movedim mul multiply
    mv narrow neg negative permute pow reciprocal relu reshape roll rsqrt
    select sigmoid sin sinh softmax split sqrt
    square squeeze std sub subtract sum swapaxes t tan tanh transpose tril triu true_divide unbind unflatten unsqueeze
    var
"""
_TORCH = """
    adaptive_avg_pool1d avg_pool1d cat concat concatenate conv1d conv2d conv3d conv_transpose1d conv_transpose2d
    conv_transpose3d hstack stack vstack
"""
_TENSOR = """
    T __add__ __getitem__ __matmul__ __mul__ __pow__ __radd__ __rmul__ __rpow__ __rsub__ __rtruediv__ __sub__
    __truediv__ contiguous double expand float mT to view
"""
_FUNCTIONAL = """
    adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d avg_pool2d
    avg_pool3d batch_norm dropout dropout2d elu embedding gelu group_norm hardsigmoid hardswish hardtanh instance_norm
    interpolate layer_norm leaky_relu linear log_softmax logsigmoid max_pool1d max_pool2d max_pool3d mish normalize pad
    relu relu6 selu silu softmax softplus softsign
"""
_LOSSES = """
    binary_cross_entropy binary_cross_entropy_with_logits cross_entropy huber_loss kl_div l1_loss mse_loss nll_loss
    smooth_l1_loss soft_margin_loss
"""

PASSES_TO_FIRST: Final = frozenset(f"nn.functional.{word}" for word in _LOSSES.split())
"""Ops that pass a gradient to their first operand; not always to a target or a weight."""

PASSES_TO_ALL: Final = (
    frozenset(f"{home}.{word}" for home in ("torch", "Tensor") for word in _SHARED.split())
    | {f"torch.{word}" for word in _TORCH.split()}
    | {f"Tensor.{word}" for word in _TENSOR.split()}
    | {f"nn.functional.{word}" for word in _FUNCTIONAL.split()}
)
"""Ops each of whose results passes a gradient to every operand that requires one, and that write to none of them
(unless they return one: ``inplace=True``)."""

_PASSES = PASSES_TO_ALL | PASSES_TO_FIRST
_ONLY_VIEWS = frozenset({"Tensor.to", "Tensor.float", "Tensor.double", "Tensor.contiguous"})
"""Ops that may return their operand as it is."""

_COMPARISONS = (
    "__eq__ __ne__ __lt__ __le__ __gt__ __ge__ eq ne lt le gt ge argmax argmin isnan isfinite detach"
)
_READS = frozenset(f"{home}.{word}" for home in ("torch", "Tensor") for word in _COMPARISONS.split())
"""Ops whose results have no gradient, and that write to nothing."""


class Node:
    """An inner tensor's place in the graph: how old it is, and what it was made from."""

    __slots__ = ("number", "sources")

    def __init__(self, number: int, sources: Sequence[Source]) -> None:
        self.number = number
        self.sources = sources


LeafSource: TypeAlias = "tuple[weakref.ref[PointerTensor], int, Spec]"
"""A leaf: its pointer, its id on the worker, and what it looked like when it was used."""
Source: TypeAlias = "Node | LeafSource | None"
"""None: nobody here knows where it comes from."""


class Histories:
    """The graph of the ops that one client makes on one worker, as far as it is known here."""

    def __init__(self) -> None:
        self._numbers = itertools.count(1)
        self._rewritten = 0
        """Nodes up to this number may be other ones by now: an op wrote in place."""

    def record(
        self,
        name: str,
        sources: list[Source],
        operands: Sequence[PointerTensor],
        result: Any,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
    ) -> None:
        """An op was made that some operands with gradients went into; `sources` are theirs, from before, and `result`
        nests the pointers that it returned.
        """
        if name not in _PASSES or any(result is one for one in operands):
            if name not in _READS and name not in _ONLY_VIEWS:
                self._rewritten = next(self._numbers)
            return
        if name in PASSES_TO_FIRST and (len(sources) > 1 or not (args and operands[0] is args[0])):
            sources = [None]
        elif name == "nn.functional.embedding" and (True in kwargs.values() or True in args[2:]):
            sources = [None]  # its gradient is sparse
        node = Node(next(self._numbers), sources)
        for one in (result,) if isinstance(result, PointerTensor) else leaves(result):
            if isinstance(one, PointerTensor):
                one.__dict__["_node"] = node

    def rewrite(self) -> None:
        """Something happened that changes graphs, or what passes leave in them."""
        self._rewritten = next(self._numbers)

    def reached(self, roots: Sequence[PointerTensor]) -> dict[int, Spec] | None:
        """The leaves that a pass from `roots` gives a gradient: id -> what they look like; None where that is not
        known here.
        """
        found: dict[int, Spec] = {}
        seen: set[int] = set()
        left = [_source(root) for root in roots]
        while left:
            one = left.pop()
            if one is None:
                return None
            if isinstance(one, Node):
                if one.number <= self._rewritten:
                    return None
                if id(one) not in seen:
                    seen.add(id(one))
                    left.extend(one.sources)
                continue
            pointer, number, like = one[0](), one[1], one[2]
            if pointer is None or pointer._spec is not like:
                return None
            handle = pointer._handle
            if handle.id != number or handle.via or not handle.owned or not _dense(like):
                return None
            found[number] = like
        return found


def sources_of(operands: Sequence[PointerTensor]) -> list[Source]:
    """Where those of `operands` come from that require gradients."""
    return [_source(one) for one in operands if one._spec.requires_grad]


def _source(pointer: PointerTensor) -> Source:
    if pointer._spec.leaf:
        return weakref.ref(pointer), pointer._handle.id, pointer._spec
    return pointer.__dict__.get("_node")


def _dense(of: Spec) -> bool:
    """Whether the tensor fills its memory without gaps: then its gradient has the same strides (torch's gradient
    layout contract, ``torch/csrc/autograd/functions/accumulate_grad.h``)."""
    expected = 1
    for stride, size in sorted(zip(of.stride, of.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


# -------------------------------------------------------------------------------------- which gradients there are


@dataclass(frozen=True, slots=True)
class _Pass:
    """A backward pass under way."""

    connection: Connection
    asked: Outgoing
    foreseen: bool

    @property
    def went_well(self) -> bool | None:
        """None: it is not answered yet."""
        reply = self.asked.reply
        if reply is None or not reply.done():
            return None
        return not reply.cancelled() and reply.exception() is None


class GradientTable:
    """Which objects on a worker have gradients."""

    def __init__(self) -> None:
        self.epoch = 0
        """Grows when the gradients there may be other tensors than before."""
        self.histories = Histories()
        self._specs: dict[int, Spec] = {}
        self._pending: deque[_Pass] = deque()
        self._done: list[_Pass] = []
        self._taking = threading.Lock()

    def foresee(self, roots: Sequence[PointerTensor]) -> dict[int, Spec] | None:
        """The gradients that a pass from `roots` leaves, without create_graph; None where only the worker knows."""
        if any(not one.foreseen for one in self._pending):
            return None
        reached = self.histories.reached(roots)
        if reached is None:
            return None
        found: dict[int, Spec] = {}
        for id, like in reached.items():
            there = self._specs.get(id)
            if there is not None and there.requires_grad:  # the sum would be another tensor
                return None
            found[id] = there or spec(like.shape, like.stride, like.dtype, False, True)
        return found

    def expect(self, connection: Connection, asked: Outgoing, foreseen: Mapping[int, Spec] | None) -> None:
        """A backward pass is under way; `foreseen` are the gradients that it leaves, where they are known."""
        self.epoch += 1
        if foreseen is not None:
            self._specs.update(foreseen)
        self._pending.append(_Pass(connection, asked, foreseen is not None))

    def settle(self) -> None:
        """Waits for backward passes under way.

        Raises:
            RemoteError: one of them failed.
        """
        if self._pending:
            run(self.settle_async(), instead="await pointer.async_grad()")

    async def settle_async(self) -> None:
        """`settle`, on planrt's loop."""
        while (one := self._take()) is not None:
            try:
                body, _ = await one.connection.finish(one.asked)
            except Exception:
                if one.foreseen:
                    await self._resume(one.connection)
                raise
            if isinstance(body, m.Gradients) and not one.foreseen:  # a backward pass only adds gradients
                self._specs.update({id: spec_from_wire(wire) for id, wire in body.objects})

    def spec_of(self, pointer: PointerTensor) -> Spec | None:
        """What the gradient of an object looks like; None where it has none. May wait for a backward pass."""
        self._look()
        return self.known(pointer)

    def set(self, id: int, like: Spec | None) -> None:
        """The client itself set or removed a gradient."""
        self._look()
        self.epoch += 1
        if like is None:
            self._specs.pop(id, None)
        else:
            self._specs[id] = like

    def note(self, id: int, like: Spec) -> None:
        """A new object came with a gradient."""
        self._specs[id] = like

    def known(self, pointer: PointerTensor) -> Spec | None:
        """As `spec_of`, without waiting."""
        return self._specs.get(alive(pointer).id)

    def forget(self, id: int) -> None:
        """The object is gone."""
        self._specs.pop(id, None)

    def _take(self, *, done: bool = False) -> _Pass | None:
        """The oldest pass under way, with `done` only if it went well."""
        with self._taking:
            if not self._pending or (done and self._pending[0].went_well is not True):
                return None
            return self._pending.popleft()

    def _look(self) -> None:
        """Raises what a pass has failed with, if that is known; waits only for passes that were not foreseen."""
        if not self._pending:
            return
        if any(not one.foreseen for one in list(self._pending)):
            self.settle()
            return
        while (one := self._take(done=True)) is not None:
            self._done.append(one)
        if len(self._done) > _KEPT_DONE:
            done, self._done = self._done, []
            for connection in {one.connection for one in done}:
                connection.forget_soon([one.asked for one in done if one.connection is connection])
        oldest = next(iter(list(self._pending)), None)
        if oldest is not None and oldest.went_well is False:
            self.settle()

    async def _resume(self, connection: Connection) -> None:
        """Its client has heard of a failure: the worker goes on, and says which gradients there are."""
        after = []
        while (one := self._take()) is not None:
            after.append(one)
        with contextlib.suppress(
            Exception
        ):  # what failed first is raised; a lost worker shows at the next request
            body, _ = await connection.request(m.Resume())
            if isinstance(body, m.Gradients):
                self._specs = {id: spec_from_wire(wire) for id, wire in body.objects}
        self.epoch += 1
        for one in after:
            with contextlib.suppress(Exception):
                await one.connection.finish(one.asked)

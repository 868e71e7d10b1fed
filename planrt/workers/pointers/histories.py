"""The autograd graph of a worker's tensors, as far as the client that makes them can know it without asking.

The graph itself is on the worker. Here each result of an op remembers which tensors that require gradients it was made
from, where the op is one of those that pass a gradient to all of them (`PASSES_TO_ALL`). Then a walk from a loss tells
which leaves a backward pass gives a gradient. Wherever that is not certain (ops in place, inner tensors that retain
their gradients, plans, results with several parts, ...) the walk returns nothing, and the worker is asked.

Why the walk is right where it returns something:

1. A `Node` is made only for an op that passes a gradient to every source that it names. So what the walk reaches is
   reached by the pass, and by 2 nothing else is.
2. Whatever a result was made from and requires gradients is among its node's sources, or the source is None: unknown.
   The walk stops with nothing at the first None.
3. Nodes are numbered in the order of the ops. An op in place, or anything else that may change nodes that are there,
   sets `_rewritten` to a number above all of theirs; the walk returns nothing if it meets a node up to that number.
4. A leaf must still be what it was when it was used: the same object under the same id, with the same spec, owned by
   this session. Otherwise somebody may have replaced it, and the walk returns nothing.
5. The gradient of a leaf has its shape and dtype, and its strides if the leaf is dense (`_dense`): this is what the
   walk returns as the gradient's spec. For leaves with gaps it returns nothing.

Example: of ``y = x * w`` and ``loss = y.sum()`` only the leaf ``w`` requires a gradient. ``y`` gets node 1 with the
source ``w``, ``loss`` node 2 with the source node 1; the walk from ``loss`` reaches ``w`` alone. After ``y.add_(1)``,
`_rewritten` is 3, and for this ``loss`` the worker is asked.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, Final, TypeAlias

from planrt.plans.running.inference import Spec
from planrt.types import leaves
from planrt.workers.pointers.tensor import PointerTensor

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
        """Notes an op that some operands with gradients went into; `sources` are theirs, from before, and `result`
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
        """Notes that graphs, or the gradients that passes leave in them, may be others than the ops before tell."""
        self._rewritten = next(self._numbers)

    def reached(self, roots: Sequence[PointerTensor]) -> dict[int, Spec] | None:
        """Returns the leaves that a pass from `roots` gives a gradient: id -> what they look like; None where that is
        not known here.
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
    """Returns the sources of those of `operands` that require gradients."""
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

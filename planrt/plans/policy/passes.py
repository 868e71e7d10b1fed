"""Holds a backward pass to the limits of a policy before it runs.

What a pass takes is told from the graph that it goes over, without a value: every node says what the gradients look
like that come into it, and the nodes after it what those look like that it gives. Products and convolutions count as
they do among ops (`planrt.plans.analysis.tracker`), all other nodes one operation for each entry of the largest of
these gradients. Memory is followed in the order in which autograd goes: latest op first, a gradient from where it is
made until it is used, what stays at leaves until the end; and whatever a pass with ``create_graph=True`` makes.

Counted are nodes, so it does not matter which ops, plans or passes made the graph, or how often it has been gone over.
Whatever is told here depends on shapes alone.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch.autograd.graph import get_gradient_edge

from planrt.errors import PolicyError
from planrt.plans.analysis.findings import AnalysisTimeError, Clock
from planrt.plans.analysis.report import count_bytes, count_flops
from planrt.plans.policy.rules import Policy

_Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Cost:
    """The cost of a backward pass: floating-point operations, and bytes at its peak beside what is there before."""

    flops: int
    peak: int


def check_pass(
    policy: Policy,
    name: str,
    roots: Sequence[torch.Tensor],
    inputs: Sequence[torch.Tensor] | None,
    *,
    create_graph: bool,
    times: int = 1,
) -> int:
    """Raises unless a backward pass from `roots` keeps to `policy.max_flops` and `policy.max_memory`; returns how many
    operations it computes, 0 where nothing limits that.

    `name` is that of the op, as errors have it; `inputs` are the tensors whose gradients are wanted, None for all
    leaves; `times` how many passes it makes at once (``is_grads_batched=True``).

    Raises:
        PolicyError: it takes more than a limit allows, or to look at it takes longer than
            `policy.max_check_seconds`.
    """
    if policy.max_memory is None and not policy.counted:
        return 0
    try:
        cost = cost_of(roots, inputs, create_graph=create_graph, check=Clock(policy.max_check_seconds).check)
    except AnalysisTimeError:
        text = f"looking at the graph takes more than {policy.max_check_seconds:g} s"
        raise _beyond(name, "max_check_seconds", text) from None
    flops, peak = cost.flops * times, cost.peak * times
    if policy.max_flops is not None and flops > policy.max_flops:
        text = (
            f"the pass computes {count_flops(flops)}, more than the {count_flops(policy.max_flops)} allowed"
        )
        raise _beyond(name, "max_flops", text)
    if policy.max_memory is not None and peak > policy.max_memory:
        text = f"the pass takes {count_bytes(peak)}, more than the {count_bytes(policy.max_memory)} allowed"
        raise _beyond(name, "max_memory", text)
    return flops


def _beyond(name: str, rule: str, message: str) -> PolicyError:
    return PolicyError(f"{name} breaks the policy: [{rule}] {message}", rule=rule, op=name)


def cost_of(
    roots: Sequence[torch.Tensor],
    inputs: Sequence[torch.Tensor] | None = None,
    *,
    create_graph: bool = False,
    check: Callable[[], None] = lambda: None,
) -> Cost:
    """Returns what a backward pass from `roots` takes. `check` is called before each node; what it raises ends it."""
    starts = [get_gradient_edge(root) for root in roots if root.requires_grad]
    ends = None if inputs is None else [get_gradient_edge(one).node for one in inputs if one.requires_grad]
    nodes = _on_the_way([edge.node for edge in starts], ends, check)
    awaited = Counter(
        following for node in nodes for following, _ in node.next_functions if following in nodes
    )
    arrived: dict[Any, dict[int, int]] = {}
    live = peak = flops = 0
    for edge in starts:
        if edge.node in nodes:
            slots = arrived.setdefault(edge.node, {})
            shape, size = _sizes(edge.node)[edge.output_nr]
            flops += math.prod(shape)  # roots may be named again and again, and are added up
            live += size if edge.output_nr not in slots else 0
            slots[edge.output_nr] = size
    numbers = {node: number for number, node in enumerate(nodes)}  # a node has no order of its own
    ready: list[tuple[int, int, Any]] = [
        (-_turn(node), numbers[node], node) for node in dict.fromkeys(edge.node for edge in starts)
        if node in nodes and not awaited[node]
    ]  # fmt: skip
    heapq.heapify(ready)
    while ready:
        check()
        _, _, node = heapq.heappop(ready)
        held = sum(arrived.pop(node, {}).values())
        coming = [shape for shape, _ in _sizes(node)]
        given: list[_Shape | None] = []
        made = 0
        for following, slot in node.next_functions:
            if following not in nodes:
                given.append(None)
                continue
            shape, size = _sizes(following)[slot]
            given.append(shape)
            made += size
            slots = arrived.setdefault(following, {})
            if slot not in slots:
                slots[slot] = size
                live += size
            awaited[following] -= 1
            if not awaited[following]:
                heapq.heappush(ready, (-_turn(following), numbers[following], following))
        flops += _flops(node, coming, given)
        peak = max(peak, live + made + max(held, made))  # kernels work in memory of their own meanwhile
        leaf = getattr(node, "variable", None)
        if not (create_graph or (leaf is not None and leaf.grad is None)):
            live -= held
    return Cost(flops, max(peak, live))


def _on_the_way(
    starts: Iterable[Any], ends: Sequence[Any] | None, check: Callable[[], None]
) -> dict[Any, None]:
    """The nodes that a pass from `starts` runs: all, or those from which one of `ends` can be reached."""
    found: dict[Any, None] = dict.fromkeys(starts)
    before: dict[Any, list[Any]] = {}
    waiting = list(found)
    while waiting:
        check()
        node = waiting.pop()
        for following, _ in node.next_functions:
            if following is None:
                continue
            if ends is not None:
                before.setdefault(following, []).append(node)
            if following not in found:
                found[following] = None
                waiting.append(following)
    if ends is None:
        return found
    wanted: dict[Any, None] = dict.fromkeys(node for node in ends if node in found)
    waiting = list(wanted)
    while waiting:
        for node in before.get(waiting.pop(), ()):
            if node not in wanted:
                wanted[node] = None
                waiting.append(node)
    return wanted


def _turn(node: Any) -> int:
    """Autograd runs the node first that was made last, and leaves before all others."""
    return int(node._sequence_nr()) if getattr(node, "variable", None) is None else 1 << 64


def _sizes(node: Any) -> list[tuple[_Shape, int]]:
    """Shape and bytes of each gradient that comes into a node."""
    found = []
    for one in node._input_metadata:
        shape = tuple(map(int, one.shape))
        found.append((shape, math.prod(shape) * one.dtype.itemsize))
    return found


# Operations


def _flops(node: Any, coming: Sequence[_Shape], given: Sequence[_Shape | None]) -> int:
    word = node.name()
    formula = next((count for part, count in _FORMULAS.items() if part in word), None)
    linear = max([math.prod(shape) for shape in (*coming, *given) if shape is not None], default=0)
    if formula is None:
        return linear
    try:
        return max(linear, formula(node, coming, given))
    except RuntimeError:  # what the node kept was freed or written to since, and the pass itself will say so
        return linear


def _of_product(node: Any, coming: Sequence[_Shape], given: Sequence[_Shape | None]) -> int:
    """Of a product of matrices, perhaps of a batch of them, perhaps added to something: its factors are last."""
    rows, columns = coming[0][-2:]
    left, right = given[-2:]
    count = 2 * math.prod(left) * columns if left is not None else 0
    return count + (2 * math.prod(right) * rows if right is not None else 0)


def _of_convolution(node: Any, coming: Sequence[_Shape], given: Sequence[_Shape | None]) -> int:
    from torch.utils.flop_counter import conv_flop_count

    grad = node._saved_grad_output.shape if hasattr(node, "_saved_grad_output") else coming[0]
    once: int = conv_flop_count(
        list(node._saved_input.shape), list(node._saved_weight.shape), list(grad), node._saved_transposed
    )
    results = sum(shape is not None for shape in given)
    return once * max(1, results)


def _of_attention(node: Any, coming: Sequence[_Shape], given: Sequence[_Shape | None]) -> int:
    query, key = node._saved_query.shape, node._saved_key.shape
    return 10 * int(math.prod(query)) * int(key[-2])  # five products


def _of_factors(node: Any, coming: Sequence[_Shape], given: Sequence[_Shape | None]) -> int:
    """Of an inverse, a solution or a factorisation: a dozen products of matrices as large as those at hand."""
    shapes = [shape for shape in (*coming, *given) if shape]
    return 24 * max([math.prod(shape) * max(shape[-2:]) for shape in shapes], default=0)


def _of_distances(node: Any, coming: Sequence[_Shape], given: Sequence[_Shape | None]) -> int:
    return 4 * math.prod(coming[0]) * max((shape[-1] for shape in given if shape), default=1)


def _of_recurrence(node: Any, coming: Sequence[_Shape], given: Sequence[_Shape | None]) -> int:
    steps = math.prod(coming[0][:-1])
    return 4 * steps * sum(math.prod(shape) for shape in given if shape is not None and len(shape) == 2)


_FORMULAS: Final[dict[str, Callable[[Any, Sequence[_Shape], Sequence[_Shape | None]], int]]] = {
    "mmBackward": _of_product,  # mm, bmm, addmm, baddbmm, addbmm
    "MmBackward": _of_product,
    "BmmBackward": _of_product,
    "Convolution": _of_convolution,
    "ScaledDotProduct": _of_attention,
    "RnnLayer": _of_recurrence,
    "Cdist": _of_distances,
    "EuclideanDist": _of_distances,
    **dict.fromkeys(
        ("Linalg", "Cholesky", "Triangular", "LuSolve", "LuUnpack", "Svd", "Householder", "Ormqr"),
        _of_factors,
    ),
}
"""Part of a node's name -> how many operations it takes, where that is more than one for each entry."""

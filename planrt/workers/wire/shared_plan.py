"""A plan that runs on shares: the program that it lowers to, at its client and at every party alike. No I/O.

The client sends the plan's record once, and each party lowers it by the one interpreter, so what runs is the plan
that the owner sees. What it lowers to follows from the record and from what its arguments are like; the client says
what came out there (`Lowered.identity`), and a party where another program comes out says so instead of running it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from typing import Any, Final, TypeAlias

import torch

from planrt.errors import SharingError
from planrt.plans.ir.graph import Graph, Op
from planrt.plans.ir.ops import RANDOM
from planrt.plans.running import interpreter
from planrt.sharing.kernels.parts import digest
from planrt.sharing.programs.lowering import Looks, Lowered, lower
from planrt.sharing.tensors.shared import SharedTensor
from planrt.types import leaves

CALL: Final = "sharing.plan"
"""Posted to run a plan on shares: group, the plan's object, its mode, `Lowered.identity`, and for each input and entry
of the state its `Looks` as a tuple, or None of a tensor that all know; then their objects, as a tuple. The results are
one for each value that the program makes: its id, or None where nobody wants it.
"""

Known: TypeAlias = Looks | torch.Tensor

_KEPT: OrderedDict[Any, Lowered | None] = OrderedDict()
_MOST: Final = 128
"""Plans for certain arguments that are kept lowered in this process."""


def lowered_plan(graph: Graph, tensors: Sequence[Known], *, scale: int, grad: bool) -> Lowered | None:
    """Returns what a plan on shares lowers to, for its inputs and then its state.

    None of one that runs op by op alone: it draws random numbers, returns nothing in shares, or changes in place what
    all know.

    Raises:
        SharingError: an operation that has no protocol. PlanArgumentError: inputs that do not fit the plan.
    """
    key = _key_of(graph, tensors, scale, grad)
    if key in _KEPT:
        _KEPT.move_to_end(key)
        return _KEPT[key]
    found = _KEPT[key] = None if draws(graph) else _lowered(graph, tensors, scale, grad)
    if len(_KEPT) > _MOST:
        _KEPT.popitem(last=False)
    return found


_RATES: Final = {
    "scaled_dot_product_attention": ((4, "dropout_p", 0.0), None),
    "multi_head_attention_forward": ((10, "dropout_p", 0.5), (13, "training", True)),
    "lstm": ((5, "dropout", 0.5), (6, "train", True)),
    "gru": ((5, "dropout", 0.5), (6, "train", True)),
    "rnn_tanh": ((5, "dropout", 0.5), (6, "train", True)),
    "rnn_relu": ((5, "dropout", 0.5), (6, "train", True)),
}
"""Of operations that may drop some: where the rate is among their arguments, and whether they train."""

_DROPOUT: Final = ("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout")


def draws(graph: Graph) -> bool:
    """Returns whether a plan draws random numbers, by its ops and their arguments: an attention that drops nothing does
    not, nor does dropout in evaluation.
    """
    return graph.is_random and any(_draws(op) for op in graph.ops)


def _draws(op: Op) -> bool:
    if op.name not in RANDOM:
        return False
    name = op.name.rpartition(".")[2]
    if name in _DROPOUT:
        return _given(op, (2, "training", True)) is not False
    if name not in _RATES:
        return True
    rate, trains = _RATES[name]
    return _given(op, rate) != 0 and (trains is None or _given(op, trains) is not False)


def _given(op: Op, argument: tuple[int, str, Any]) -> Any:
    place, name, default = argument
    return op.args[place] if place < len(op.args) else op.kwargs.get(name, default)


def is_lowered(graph: Graph, tensors: Sequence[Known], *, scale: int, grad: bool) -> bool:
    """Returns whether what `lowered_plan` returns is known already: to find out may take long."""
    return _key_of(graph, tensors, scale, grad) in _KEPT


def _key_of(graph: Graph, tensors: Sequence[Known], scale: int, grad: bool) -> Hashable:
    return (graph.hash, scale, grad, *[one if isinstance(one, Looks) else _known(one) for one in tensors])


def _known(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.dtype, tuple(tensor.shape), tensor.requires_grad, digest(tensor)


def _lowered(graph: Graph, tensors: Sequence[Known], scale: int, grad: bool) -> Lowered | None:
    count = len(graph.inputs)
    given = [
        one if isinstance(one, Looks) else one.detach().clone().requires_grad_(one.requires_grad)
        for one in tensors
    ]
    public = False

    def run(*operands: torch.Tensor) -> Any:
        nonlocal public
        made = interpreter.execute(graph, operands[:count], list(operands[count:]))
        public = not any(isinstance(one, SharedTensor) for one in leaves(made))
        return made

    versions = [one._version for one in given if isinstance(one, torch.Tensor)]
    try:
        with torch.set_grad_enabled(grad):
            found = lower(run, given, scale=scale)
    except SharingError:
        if public:  # nothing of what is in shares is used
            return None
        raise
    if versions != [one._version for one in given if isinstance(one, torch.Tensor)]:
        return None
    return found

"""How much a party computes for a step of a joint run, before it does (`planrt.workers.machine.counting.work`). No I/O.

What depends on how many people others have is paid for when that arrives.
"""

from __future__ import annotations

from typing import Final, Protocol

import torch

from planrt.plans.ir.graph import Graph
from planrt.sharing.columns import descent, linear, regression, shared
from planrt.types import TensorSpec
from planrt.workers.machine.counting.work import (
    CURVE,
    DRAWN,
    PERSON,
    decryption,
    encryption,
    entries,
    key_pair,
    product,
)
from planrt.workers.machine.joint.networks import SplitOwner
from planrt.workers.machine.joint.owners import LinearOwner
from planrt.workers.machine.joint.run import Run
from planrt.workers.wire import messages as m

_HASHED: Final = 40_000
"""An id that becomes a point of the curve: two powers of 255 bits or so, to look whether it is one."""
_WINDOW: Final = 5
_STEP: Final = 100
"""An entry of a batch in shares: its masks, and two products that are computed three times."""
_EXACT: Final = 5_000
"""A row of a batch in shares, where the loss is the exact one: comparisons, and pieces of curves."""
_COMPARED: Final = 1_000
"""A number in shares that is held against two limits."""


class Counts(Protocol):
    """Says what one run of a plan takes, if it may run at all."""

    def __call__(self, graph: Graph, inputs: list[TensorSpec], *, gradients: bool) -> float:
        """See `Gate.admit_part`."""


def of_opening(about: m.OpenJoint, rows: int) -> float:
    """Returns what it takes to read a table: its ids and columns."""
    return float(rows * (PERSON * len(about.ids) + len(about.features) + 1))


def of_step(run: Run, body: m.WorkJoint, count: Counts) -> float:
    """Returns what a step takes at this party; `count` says what a plan of a network takes.

    Raises:
        PolicyError: a plan of a network breaks the owner's policy.
    """
    match body.step:
        case "align":
            return _aligning(run) + _beginning(run)
        case "resume":
            return _beginning(run)
        case "epoch":
            return _epoch(run, count)
        case "evaluate" | "predict":
            people = len(body.people) if body.step == "predict" else _held_out(run)
            return _predicting(run, people, count)
        case "release" | "weights":
            return 0.0 if run.model is None else float(1 + _columns(run))
        case _:
            return 0.0


def of_parcel(kind: str, tensors: list[torch.Tensor]) -> float:
    """Returns what it takes to go on with what another party has sent."""
    if kind == "blinded ids":
        return float(CURVE * sum(len(one) for one in tensors if one.dim()))
    return float(entries(tensors))


def _aligning(run: Run) -> float:
    """Own ids, blinded once for each party that they are compared with; what comes back is looked up."""
    if run.table is None:
        return 0.0
    others = 1 if run.me or run.about.size_only else run.about.owners - 1
    return float(others * len(run.table.keys) * (CURVE + _HASHED))


def _beginning(run: Run) -> float:
    model, table = run.about.model, run.table
    if table is None:
        return key_pair(model.key_bits) if isinstance(model, m.LinearTerms) else 0.0
    copied = len(table.keys) * (1 + len(run.about.features))
    if isinstance(model, m.SharedTerms):
        return float(copied * DRAWN * run.about.owners)
    return float(copied)


def _columns(run: Run) -> int:
    return sum(run.about.columns)


def _held_out(run: Run) -> int:
    return 0 if run.table is None else len(run.table.evaluated())


def _epoch(run: Run, count: Counts) -> float:
    if isinstance(run.model, SplitOwner):
        return _split(run, run.model, count)
    if isinstance(run.model, LinearOwner):
        owner = run.model.owner
        if isinstance(owner, linear.Owner):
            return _encrypted(owner.terms, len(owner.columns) + (owner.labels is not None))
        return _on_shares(owner.terms)
    if isinstance(run.holder, linear.KeyHolder):
        return _decrypted(run, run.holder.terms)
    if isinstance(run.holder, shared.Provider):
        return run.holder.terms.owners * _on_shares(run.holder.terms)
    return 0.0


def _sizes(rows: int, batch: int) -> list[int]:
    return [min(batch, rows - at) for at in range(0, rows, batch)]


def _encrypted(terms: regression.Terms, columns: int) -> float:
    """An owner's: its residuals are encrypted, and each group of columns is an inner product with those of all."""
    layout, bits, total = terms.layout, terms.key_bits, 0.0
    for rows in _sizes(terms.rows, terms.batch_size):
        chunks, groups = layout.chunks(rows), layout.groups(columns)
        products = bits + chunks * (bits / _WINDOW + 2**_WINDOW)
        total += (chunks + groups) * encryption(bits) + groups * products * product(2 * bits)
    return total


def _decrypted(run: Run, terms: regression.Terms) -> float:
    """The key holder's: a decryption for each group of columns of each owner and batch."""
    layout, groups = terms.layout, 0
    for owner, columns in enumerate(run.about.columns):
        groups += layout.groups(columns + (2 if owner == terms.label_owner else 0))
    return len(_sizes(terms.rows, terms.batch_size)) * groups * decryption(terms.key_bits)


def _on_shares(terms: descent.Terms) -> float:
    columns = sum(terms.columns)
    each = _STEP * columns + (_EXACT if terms.loss_kind == "exact" else _STEP)
    return float(terms.rows * (each + _COMPARED) + len(terms.sizes) * columns * _COMPARED)


def _split(run: Run, model: SplitOwner, count: Counts) -> float:
    sizes = _sizes(model.train_rows, model.terms.batch_size)
    total = 0.0
    for size in set(sizes):
        total += sizes.count(size) * _network(run, model, size, count, training=True)
    return total


def _predicting(run: Run, people: int, count: Counts) -> float:
    found = float(people * (PERSON + _columns(run)))
    if isinstance(run.model, SplitOwner) and people:
        found += _network(run, run.model, people, count, training=False)
    return found


def _network(run: Run, model: SplitOwner, rows: int, count: Counts, *, training: bool) -> float:
    """What the parts of a network that are here take for so many rows."""
    terms, plans, total = model.terms, list(run.plans), 0.0
    if terms.bottom:
        graph, plans = plans[0 if training else 1], plans[2:]
        data = TensorSpec((rows, len(run.about.features)), torch.float32)
        total += count(graph, [data, TensorSpec((rows,), torch.float32)], gradients=training)
    if terms.top:
        target = TensorSpec((rows,), torch.int64) if terms.classes else TensorSpec((rows, 1), torch.float32)
        wide = TensorSpec((rows, sum(terms.widths)), torch.float32)
        total += count(plans[0 if training else 1], [wide, target], gradients=training)
    return total

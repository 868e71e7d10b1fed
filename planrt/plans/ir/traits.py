"""Traits: one frozen record per op of what sets it apart. Pure data: no torch.

Whoever runs ops asks an op's traits and never compares its name, as jax registers rules per primitive. The
records are built once, from the reviewed tables of `planrt.plans.ir.ops` (`ops.TRAITS`); what is done to
plans as objects of a worker has traits too (`planrt.workers.wire.plan_call`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class OpTraits:
    """A record of what sets the op `name` apart. An op that nothing sets apart, as most are, has only its
    name."""

    name: str

    # What it needs.
    random: bool = False
    """It draws random numbers: it needs a seed."""
    factory: bool = False
    """It makes a tensor from nothing, on the device of whoever runs it."""
    plans_only: bool = False
    """Plans can have it, and posted ops cannot: clients have a request of their own for it."""

    # What it writes to.
    in_place: bool = False
    """It writes to its first argument; with ``inplace=True`` every op does."""
    statistics: tuple[tuple[int, str], ...] = ()
    """Running statistics that it writes to, each as its position and its keyword among the arguments."""
    renorms: bool = False
    """It writes to the weights of an embedding (its second argument) if it is given a ``max_norm``."""
    writes_unseen: bool = False
    """It does not count its writes in the version counters of tensors, by which autograd sees writes."""
    new_version_counter: bool = False
    """After it two tensors share memory, but no version counter: autograd does not see what one writes to the
    other."""

    # How it goes with gradients.
    data_independent: bool = False
    """Whether it fails, and what its results look like, does not depend on values."""
    computes_gradients: bool = False
    """It runs a backward pass over the graphs of its operands, and returns gradients."""
    reads_gradient: bool = False
    """It returns the gradient of its operand: no result of its values, but memory that has a label of its
    own."""
    sets_gradient: bool = False
    """It makes its second operand the gradient of the first."""
    retains_gradient: bool = False
    """Its operand, an inner tensor of a graph, keeps the gradient that passes leave at it."""
    gains_gradient: bool = False
    """Backward passes may leave a gradient at its operand from then on."""

    # What is done to plans as objects of a worker.
    calls_plan: bool = False
    """It runs the plan that is its first operand."""
    copies_plan: bool = False
    """It makes a plan out of its operand, with a state of its own."""
    needs_no_policy: bool = False
    """It computes nothing, so that an owner's policy has no say over it."""

    def written_arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        """Returns those of an op's arguments that it may write to, whether it succeeds or fails on the
        way."""
        written = []
        if self.in_place or kwargs.get("inplace"):
            written.append(args[0] if args else next(iter(kwargs.values()), None))
        for position, keyword in self.statistics:
            written.append(args[position] if position < len(args) else kwargs.get(keyword))
        if self.renorms and (args[3] if len(args) > 3 else kwargs.get("max_norm")) is not None:
            written.append(args[1] if len(args) > 1 else kwargs.get("weight"))
        return written

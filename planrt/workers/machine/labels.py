"""Labels: who may read what. No I/O.

None stands for everyone, else a label is a set of users; the empty set stands for nobody. Labels are a lattice, as in
D. E. Denning, "A Lattice Model of Secure Information Flow" (1976): what is computed from several objects may be read
by those who may read all of them, their `join`.

Every object has the label of the operation that made it. That is not enough, because two objects can show the same
memory. Say ``x`` is for everybody, and ``s`` is for alice::

    y = x.view(2, 2)      y is another object, label None, and shows the memory of x
    y.add_(s)             the op's label is {alice}: it writes values of s into that memory
    x.get()               x has no label of its own, and would now tell s

So labels follow memory too. The op's label goes to the block of memory (torch's storage) that it wrote to, and an
object's label is the join of its own and those of the memory of its tensors (`ObjectStore.label_of`), asked anew each
time. The label of memory only ever gets stricter: nobody knows whether what was written has been overwritten since.
What follows from both:

1. A view that existed before the write (``x``) and one made after it have the label, without anybody looking for them.
2. A copy made before the write has not: its memory is another one, and holds values from before.
3. A copy made after the write has it, from its operand, as its own label.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch.multiprocessing.reductions import StorageWeakRef

Label = frozenset[str] | None

_PRUNE_EVERY = 1_000


def join(first: Label, second: Label) -> Label:
    """Returns the label of what was computed from two things: those may read it who may read both."""
    if first is None:
        return second
    return first if second is None else first & second


class MemoryLabels:
    """Labels of blocks of memory (torch storages), for as long as these exist."""

    def __init__(self) -> None:
        # The weak references keep an address from being given to another storage as long as it has a label.
        self._labels: dict[StorageWeakRef, frozenset[str]] = {}
        self._added = 0
        self._gradients: set[StorageWeakRef] | None = None
        """Memory of the gradients whose label is known; None before the first private value comes."""

    def __bool__(self) -> bool:
        """Whether any memory has a label."""
        return bool(self._labels)

    def of(self, tensor: torch.Tensor) -> Label:
        """Returns the label of the memory that `tensor` shows."""
        return self._labels.get(_memory(tensor)) if self._labels else None

    def add(self, tensor: torch.Tensor, label: Label) -> None:
        """Something with that label was written into the memory that `tensor` shows."""
        shared = join(self.of(tensor), label)
        if shared is None:
            return
        self._labels[_memory(tensor)] = shared
        self._prune()

    # Gradients

    @property
    def watching(self) -> bool:
        """True where gradients are accounted for: from the first private value on."""
        return self._gradients is not None

    def watch(self, gradients: Iterable[torch.Tensor]) -> None:
        """There is a private value: `gradients`, which were there before it, are as public as their labels say."""
        self._gradients = {_memory(grad) for grad in gradients}

    def account(self, gradient: torch.Tensor, label: Label) -> None:
        """Something with that label was written into a gradient, by who knows its label."""
        self.add(gradient, label)
        if self._gradients is not None:
            self._gradients.add(_memory(gradient))
            self._prune()

    def of_gradient(self, gradient: torch.Tensor) -> Label:
        """Returns the label of a gradient; a gradient that nobody accounted for is for nobody (see
        `planrt.workers.machine.backward`)."""
        label = self.of(gradient)
        if label is None and self._gradients is not None and _memory(gradient) not in self._gradients:
            return frozenset()
        return label

    def _prune(self) -> None:
        self._added += 1
        if self._added % _PRUNE_EVERY:
            return
        self._labels = {memory: label for memory, label in self._labels.items() if not memory.expired()}  # type: ignore[no-untyped-call]
        if self._gradients is not None:
            self._gradients = {memory for memory in self._gradients if not memory.expired()}  # type: ignore[no-untyped-call]


def _memory(tensor: torch.Tensor) -> StorageWeakRef:
    return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]

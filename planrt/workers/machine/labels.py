"""Labels: who may read what. No I/O.

None stands for everyone, else a label is a set of users. What is computed from several objects may be read by
those who may read all of them. Every object has the label of the operation that made it; besides, labels follow
memory: what was written into a block of memory labels whatever shows that memory, now or later.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch.multiprocessing.reductions import StorageWeakRef

Label = frozenset[str] | None

_PRUNE_EVERY = 1_000


def both(first: Label, second: Label) -> Label:
    """Who may read what was computed from two things."""
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

    def __bool__(self) -> bool:
        """Whether any memory has a label."""
        return bool(self._labels)

    def of(self, tensor: torch.Tensor) -> Label:
        """The label of the memory that `tensor` shows."""
        return self._labels.get(_memory(tensor)) if self._labels else None

    def add(self, tensor: torch.Tensor, label: Label) -> None:
        """Something with that label was written into the memory that `tensor` shows."""
        shared = both(self.of(tensor), label)
        if shared is None:
            return
        self._labels[_memory(tensor)] = shared
        self._prune()

    # Gradients

    @property
    def watching(self) -> bool:
        """Whether gradients are accounted for: from the first private value on."""
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
        """The label of a gradient. It fails closed: autograd writes to tensors that nobody named, so a gradient that no
        pass accounted for since there are private values is for nobody."""
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

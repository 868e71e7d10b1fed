"""Which tensors of a recording have values that are the same at every run of the plan.

A causal mask, made of constants, is one: no input, no state, no free size and no random number has a part in
it. Its values may be read while recording, because a plan that froze what was read is right for ever.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from planrt.plans.ir.ops import RANDOM
from planrt.plans.recording.traced_sizes import TracedNumber
from planrt.types import leaves

_Watched = tuple[bool, bool, list[tuple[torch.Tensor, int]]]


class KnownValues:
    """Takes note of every op of one run. Memory counts, not tensors: a view is known as what it looks at is.

    Every tensor must stay alive as long as this does: memory is told apart by its address.
    """

    def __init__(self) -> None:
        self._memory: set[int] = set()
        self._sized: set[int] = set()  # also where free sizes have a part

    def knows(self, tensor: torch.Tensor) -> bool:
        """Returns whether the values of `tensor` are the same at every run."""
        return _address(tensor) in self._memory

    def knows_all(self, values: Any) -> bool:
        """Returns whether every tensor in `values` is known, and no number among them follows a free size."""
        return all(
            self.knows(leaf) if isinstance(leaf, torch.Tensor) else not isinstance(leaf, TracedNumber)
            for leaf in leaves(values)
        )

    def follows_sizes_only(self, tensor: torch.Tensor) -> bool:
        """Returns whether nothing but sizes has a part in the values of `tensor`."""
        return _address(tensor) in self._sized

    def before(self, values: Any) -> _Watched:
        """Returns what `after` needs of an op's arguments: call it before the op may change them."""
        tensors = [leaf for leaf in leaves(values) if isinstance(leaf, torch.Tensor)]
        watched = [(tensor, tensor._version) for tensor in tensors if self.follows_sizes_only(tensor)]
        return self.knows_all(values), all(map(self.follows_sizes_only, tensors)), watched

    def after(self, name: str, watched: _Watched, results: Any) -> None:
        """Takes note of what the op `name` made, and of what it wrote to."""
        all_known, all_sized, operands = watched
        made = [leaf for leaf in leaves(results) if isinstance(leaf, torch.Tensor)]
        written = _addresses([tensor for tensor, version in operands if tensor._version != version])
        fixed = name not in RANDOM and "empty" not in name
        for memory, holds in ((self._memory, fixed and all_known), (self._sized, fixed and all_sized)):
            if holds:
                memory.update(address for address in _addresses(made) if address)
            else:
                memory.difference_update(written)


def _addresses(tensors: Iterable[torch.Tensor]) -> list[int]:
    return [_address(tensor) for tensor in tensors]


def _address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr() if tensor.layout is torch.strided else 0

"""What the autograd graph of a session's tensors keeps, so that it counts: its nodes, and what kernels saved in them.

A node may save tensors that no object is: the logarithms of a cross entropy, the mask of a dropout, indices of a
maximum. They are there for as long as the node is, or until a backward pass frees them, whether or not anybody has a
pointer to what the node made. Each node is looked at once, when it is new. A mark in its metadata says that it was, and
when that mark goes the node has gone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterable
from typing import Any, Final, cast

import torch

NODE_BYTES: Final = 1024
"""Bytes that a node counts besides what it saves: it and its mark take some 700."""

_MARK: Final = "planrt"
_SAVED: Final = "_saved_"


class _Mark:
    """Is in the metadata of a node, and tells when that goes."""

    __slots__ = ("_gone",)

    def __init__(self, gone: Callable[[], None]) -> None:
        self._gone = gone

    def __del__(self) -> None:
        self._gone()


class NewNodes:
    """The nodes behind `tensors` that have no mark yet, and the tensors that these have `saved`."""

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        self._nodes: list[Any] = []
        self.saved: list[torch.Tensor] = []
        seen: set[Any] = set()
        waiting = [tensor.grad_fn for tensor in tensors]
        while waiting:
            node = waiting.pop()
            # What accumulates a leaf's gradient goes with the leaf.
            if node is None or node in seen or hasattr(node, "variable") or _MARK in _metadata(node):
                continue
            seen.add(node)
            self._nodes.append(node)
            self.saved += _saved_by(node)
            waiting += [following for following, _ in node.next_functions]

    def __len__(self) -> int:
        return len(self._nodes)

    def mark(self, gone: Callable[[], None]) -> None:
        """Marks them; `gone` is called once for each when it has gone, on whatever thread lets go of it."""
        for node in self._nodes:
            _metadata(node)[_MARK] = _Mark(gone)


def _metadata(node: Any) -> dict[Any, Any]:
    return node.metadata  # type: ignore[no-any-return]


def _saved_by(node: Any) -> Iterable[torch.Tensor]:
    for name in _names(cast(Hashable, type(node))):
        try:
            saved = getattr(node, name)
        except RuntimeError:  # a pass has freed it, or it was written to since
            continue
        for one in saved if isinstance(saved, tuple | list) else (saved,):
            if isinstance(one, torch.Tensor):
                yield one


@functools.cache
def _names(kind: Hashable) -> tuple[str, ...]:
    own = ("saved_tensors",) if hasattr(kind, "saved_tensors") else ()  # of a torch.autograd.Function
    return (*own, *(name for name in dir(kind) if name.startswith(_SAVED)))

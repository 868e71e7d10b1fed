"""`MultiPointerTensor`: one tensor that was sent to several workers, used as one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch

from planrt.cards import card
from planrt.deadlines import bounded
from planrt.errors import MixedLocationsError, RemoteOpError
from planrt.types import leaves, map_leaves
from planrt.workers.pointers.fetching import fetch_all, fetch_all_async
from planrt.workers.pointers.tensor import PointerTensor


class MultiPointerTensor(torch.Tensor):
    """Pointers to the tensors of several workers; every torch call happens on each of them.

    ``child`` maps worker ids to the pointers.
    """

    child: dict[str, PointerTensor]

    @classmethod
    def of(cls, pointers: Sequence[PointerTensor]) -> MultiPointerTensor:
        """One pointer that stands for `pointers`, each on a worker of its own.

        Raises:
            MixedLocationsError: two on the same worker.
        """
        by_worker = {pointer.location.id: pointer for pointer in pointers}
        if len(by_worker) < len(pointers):
            raise MixedLocationsError("the same worker twice: send to each worker once")
        like = pointers[0]._spec
        wrapped: Any = torch.Tensor._make_wrapper_subclass
        made: MultiPointerTensor = wrapped(cls, like.shape, strides=like.stride, dtype=like.dtype)
        made.child = by_worker
        return made

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Does `func` on each worker: results are multi-pointers, what is no tensor comes from the first."""
        kwargs = kwargs or {}
        if func is torch.Tensor.__repr__:
            return _show(args[0])
        many = [leaf for leaf in leaves((args, kwargs)) if isinstance(leaf, MultiPointerTensor)]
        workers = list(many[0].child)
        for other in many[1:]:
            if list(other.child) != workers:
                raise MixedLocationsError(
                    f"operands on different workers: {', '.join(workers)} and {', '.join(other.child)}"
                )
        done = []
        for worker in workers:

            def of_worker(leaf: Any, worker: str = worker) -> Any:
                return leaf.child[worker] if isinstance(leaf, MultiPointerTensor) else leaf

            done.append(func(*map_leaves(args, of_worker), **map_leaves(kwargs, of_worker)))
        return MultiPointerTensor.together(done)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:  # type: ignore[override]
        """Reached only by code that goes around ``__torch_function__``."""
        raise RemoteOpError(f"{func} was called below torch's Python functions: pointers have no values here")

    def __hash__(self) -> int:
        """As `torch.Tensor` has it."""
        return id(self)

    @bounded
    def get(self, sum_results: bool = False, *, timeout: float | None = None) -> Any:
        """Returns the values, as a list in the order of the workers; with `sum_results`, their sum."""
        values = fetch_all(list(self.child.values()))
        return _sum(values) if sum_results else values

    @bounded
    async def async_get(self, sum_results: bool = False, *, timeout: float | None = None) -> Any:
        """`get`, to be awaited on any loop."""
        values = await fetch_all_async(list(self.child.values()))
        return _sum(values) if sum_results else values

    @bounded
    def sum_results(self, *, timeout: float | None = None) -> torch.Tensor:
        """Returns the sum of the values, brought here."""
        total: torch.Tensor = self.get(sum_results=True)
        return total

    @bounded
    def average(self, *, timeout: float | None = None) -> torch.Tensor:
        """Returns the mean of the values, brought here."""
        return torch.stack([value.detach() for value in self.get()]).mean(0)

    @staticmethod
    def together(done: Sequence[Any]) -> Any:
        """Returns the results of several workers as one: multi-pointers for pointers, the first's answer for the
        rest.
        """
        first = done[0]
        if isinstance(first, PointerTensor):
            return MultiPointerTensor.of(done)
        if isinstance(first, tuple | list):
            return type(first)(MultiPointerTensor.together(part) for part in zip(*done, strict=True))
        if isinstance(first, dict):
            return {key: MultiPointerTensor.together([one[key] for one in done]) for key in first}
        return first

    def _repr_html_(self) -> str:
        rows = [
            (id, one._handle.id, list(one._spec.shape), one._spec.dtype) for id, one in self.child.items()
        ]
        return card("MultiPointerTensor", columns=("worker", "object", "shape", "dtype"), rows=rows)

    @property
    def location(self) -> list[Any]:
        """The workers."""
        return [pointer.location for pointer in self.child.values()]


def _sum(values: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.stack([value.detach() for value in values]).sum(0)


def _show(multi: MultiPointerTensor) -> str:
    parts = [repr(pointer) for pointer in multi.child.values()]
    return "(Wrapper)>[MultiPointerTensor]" + "".join(f"\n\t-> {part}" for part in parts)

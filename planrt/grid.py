"""`PrivateGridNetwork`: several workers, searched as one."""

from __future__ import annotations

from typing import Any

from planrt.deadlines import bounded
from planrt.errors import OptionError
from planrt.loop import all_answers, run
from planrt.workers.base import BaseWorker
from planrt.workers.pointers.tensor import PointerTensor


class PrivateGridNetwork:
    """A group of known workers: ``PrivateGridNetwork(bob, alice).search("#boston", "#data")``.

    Attributes:
        workers: the workers, in the order given.

    Raises:
        OptionError: no workers, two with the same id, or something that is no worker.
    """

    def __init__(self, *workers: BaseWorker) -> None:
        if not workers:
            raise OptionError("PrivateGridNetwork: no workers: write PrivateGridNetwork(bob, alice)")
        seen: set[str] = set()
        worker: Any
        for worker in workers:
            if not isinstance(worker, BaseWorker):
                hint = ": write PrivateGridNetwork(*workers)" if isinstance(worker, list | tuple) else ""
                raise OptionError(f"PrivateGridNetwork takes workers, not {type(worker).__name__}{hint}")
            if worker.id in seen:
                raise OptionError(
                    f"PrivateGridNetwork: two workers are called {worker.id!r}: results are told apart by id"
                )
            seen.add(worker.id)
        self.workers = list(workers)

    @bounded
    def search(self, *query: str, timeout: float | None = None) -> dict[str, list[PointerTensor]]:
        """Searches all workers at the same time for objects that match every term of `query`.

        Args:
            query: tags, ids, or words of descriptions, exactly as they are there. Without any, what is
                tagged.

        Returns:
            Worker id -> pointers, for the workers that have some, in the workers' order.

        Raises:
            OptionError: a term is no text. RemoteError, WorkerLostError: one of the workers could not answer; what
                others say who could not either is in its notes.
        """
        return run(self.async_search(*query), instead="await grid.async_search(...)")

    @bounded
    async def async_search(self, *query: str, timeout: float | None = None) -> dict[str, list[PointerTensor]]:
        """`search`, to be awaited on any loop."""
        terms = _terms(query)
        answers = await all_answers([worker.async_search(terms) for worker in self.workers])
        if not terms:
            answers = [[one for one in found if one.tags] for found in answers]
        return {worker.id: found for worker, found in zip(self.workers, answers, strict=True) if found}

    def __repr__(self) -> str:
        return f"<PrivateGridNetwork of {', '.join(worker.id for worker in self.workers)}>"


def _terms(query: tuple[Any, ...]) -> list[str]:
    terms = list(query[0]) if len(query) == 1 and isinstance(query[0], list | tuple) else list(query)
    if not all(isinstance(term, str) and term for term in terms):
        raise OptionError('search takes the tags or words to look for: write grid.search("#boston", "#data")')
    return terms

"""The workers that this process knows, by their ids. In PySyft 0.2 each worker kept a list; here all share this one."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Self

from planrt.errors import OptionError, UnknownWorkerError
from planrt.types import plain

if TYPE_CHECKING:
    from planrt.workers.base import BaseWorker

_known: weakref.WeakValueDictionary[str, BaseWorker] = weakref.WeakValueDictionary()


def find(id: str) -> BaseWorker | None:
    """Returns the worker of that id, the latest if there were several; None if there is none."""
    return _known.get(id)


def add(worker: BaseWorker) -> None:
    """Makes `worker` known to this process, for as long as it exists."""
    _known[worker.id] = worker


class KnowsWorkers:
    """The part of a worker's client that knows others."""

    id: str

    def add_worker(self, worker: Any) -> Self:
        """Makes `worker` known. Workers made with ``auto_add=True``, the default, are known already.

        Raises:
            OptionError: it is no worker.
        """
        if not isinstance(worker, KnowsWorkers):
            raise OptionError(
                f"add_worker takes a worker, not {type(worker).__name__}: make one with VirtualWorker(hook, id=...)"
            )
        add(worker)  # type: ignore[arg-type]
        return self

    def add_workers(self, workers: Iterable[Any]) -> Self:
        """`add_worker` for several."""
        if isinstance(workers, KnowsWorkers | str) or not isinstance(workers, Iterable):
            raise OptionError(
                f"add_workers takes a list of workers, not {type(workers).__name__}: write [worker]"
            )
        for worker in workers:
            self.add_worker(worker)
        return self

    def get_worker(self, id_or_worker: Any) -> Any:
        """Returns the worker of an id; a worker is returned as it is.

        Raises:
            UnknownWorkerError: this process knows none of that id.
        """
        if isinstance(id_or_worker, KnowsWorkers):
            self.add_worker(id_or_worker)
            return id_or_worker
        id = plain(id_or_worker)
        found = find(id) if isinstance(id, str) else None
        if found is None:
            raise UnknownWorkerError(
                f"no worker {id!r} is known here: make it first; there are {', '.join(sorted(_known)) or 'none'}"
            )
        return found

    @property
    def _known_workers(self) -> dict[str, Any]:
        """id -> worker, of all that this process knows."""
        return dict(_known)

    def remove_worker_from_registry(self, worker_id: str) -> None:
        """Forgets a worker; nothing happens to what it holds.

        Raises:
            UnknownWorkerError: none of that id is known.
        """
        _known.pop(self.get_worker(worker_id).id, None)

    def remove_worker_from_local_worker_registry(self) -> None:
        """Forgets this worker."""
        if _known.get(self.id) is self:
            del _known[self.id]

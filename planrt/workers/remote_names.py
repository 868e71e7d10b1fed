"""``worker.remote.torch.zeros(2, 3)``: torch's functions on a worker, by their names."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from planrt.errors import MixedLocationsError, UnknownNameError
from planrt.plans.ir import ops
from planrt.plans.ir.left_out import reason_for
from planrt.types import leaves
from planrt.workers.pointers.ops import apply
from planrt.workers.pointers.tensor import PointerTensor

if TYPE_CHECKING:
    from planrt.workers.base import BaseWorker

_MODULES = frozenset(
    ".".join(("torch", *name.removeprefix("torch.").split("."))[:depth])
    for name in ops.TABLE
    if not name.startswith("Tensor.")
    for depth in range(1, name.removeprefix("torch.").count(".") + 2)
)


class RemoteNames:
    """``worker.remote``, and the modules below it: each name is one of the table of ops, or a module with some."""

    def __init__(self, worker: BaseWorker, path: str = "") -> None:
        self._worker = worker
        self._path = path

    def __getattr__(self, name: str) -> Any:
        if name == "frameworks" and not self._path:
            return {"torch"}
        path = f"{self._path}.{name}" if self._path else name
        op = path if path in ops.TABLE else path.removeprefix("torch.")
        if self._path.startswith("torch") and op in ops.TABLE and not op.startswith("Tensor."):
            return self._function(op, path)
        if path in _MODULES:
            return RemoteNames(self._worker, path)
        reason = reason_for(path) if path.startswith("torch.") else None
        raise UnknownNameError(
            f"worker.remote.{path}: {reason or 'it is not on the table of ops that workers run'}"
        )

    def _function(self, op: str, path: str) -> Callable[..., Any]:
        worker, function = self._worker, ops.lookup(op)

        def call(*args: Any, **kwargs: Any) -> Any:
            from planrt.workers.modules import make_remote  # it imports the clients, which import this

            pointers = [leaf for leaf in leaves((args, kwargs)) if isinstance(leaf, PointerTensor)]
            for pointer in pointers:
                if pointer.location is not worker:
                    raise MixedLocationsError(
                        f"worker.remote.{path}: an argument is on worker {pointer.location.id!r}, not {worker.id!r}: "
                        "move() it there"
                    )
            if pointers or op not in ops.FACTORIES:
                return apply(op, function, args, kwargs)
            return make_remote(worker, op, function, args, kwargs)

        call.__name__ = call.__qualname__ = path
        return call

    def __dir__(self) -> list[str]:
        prefix = f"{self._path}." if self._path else ""
        table = [name for name in ops.TABLE if not name.startswith("Tensor.")]
        names = {*_MODULES, *(name if name.startswith("torch.") else f"torch.{name}" for name in table)}
        return sorted({one.removeprefix(prefix).split(".")[0] for one in names if one.startswith(prefix)})

    def __repr__(self) -> str:
        return f"<{self._path or 'remote'} on {self._worker.id}>"

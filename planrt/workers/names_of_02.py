"""What scripts of PySyft 0.2 ask workers for, by the names it had there. `BaseWorker` inherits this.

Each does with planrt's own messages what its namesake did. Whatever these put on a worker belongs to this client, as
what `send` puts there does, but stays until it is removed.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Self

import torch

from planrt.deadlines import bounded
from planrt.errors import OptionError, UnknownNameError
from planrt.loop import run
from planrt.plans.plan import Plan
from planrt.types import as_whole, plain
from planrt.workers.client.workplace import RemoteWorkplace
from planrt.workers.datasets import BaseDataset
from planrt.workers.pointers.tensor import PointerTensor, give_id, refuse_user
from planrt.workers.wire import messages as m

_OPS = "call torch's functions on pointers, or worker.remote.torch.zeros(2, 3)"
_MESSAGES = "messages are made by what is called: write x.send(worker), pointer.get(), worker.search(...)"
_INSTEAD = {
    "send_msg": _MESSAGES, "recv_msg": _MESSAGES, "_send_msg": _MESSAGES, "_recv_msg": _MESSAGES,
    "_get_msg": "worker.log_msgs = True, and see worker.msg_history", "send_command": _OPS, "execute_command": _OPS,
    "respond_to_obj_req": "write pointer.get()", "create_pointer": "x.send(worker) gives a pointer",
    "generate_triple": "the crypto provider hands them out by itself",
    "find_by_id": "write worker.search(id)", "find_by_tag": "write worker.search(tag)",
    "object_store": "see worker._objects", "serve_model": "write plan.send(worker)",
    "execute_worker_function": "nothing from a peer is run by its name: send a Plan made with func2plan",
}  # fmt: skip
"""What workers had in PySyft 0.2 and have not here, and what to write."""


class NamesOf02:
    """The part of a worker's client that has PySyft 0.2's names, and nothing that others need."""

    id: str
    workplace: RemoteWorkplace
    is_client_worker: bool
    train_job: Any
    msg_history: list[m.Body]
    """What was sent to this worker while `log_msgs` was set, oldest first: messages of planrt, without tensors."""

    if not TYPE_CHECKING:  # or any attribute would be one to type checkers

        def __getattr__(self, name: str) -> Any:
            """Says of names of PySyft 0.2 what to write instead."""
            if name in _INSTEAD:
                raise UnknownNameError(f"workers have no {name}: {_INSTEAD[name]}")
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    # ------------------------------------------------------------------------------------ objects

    def send(self, obj: Any, *workers: Any, **options: Any) -> Any:
        """``me.send(x, bob)``, the same as ``x.send(bob)``."""
        _check_sendable(obj)
        return obj.send(*workers, **options)

    def send_obj(self, obj: Any, location: NamesOf02) -> None:
        """Puts `obj` on worker `location`, where it stays: see `set_obj`."""
        if not isinstance(location, NamesOf02):
            raise OptionError(f"send_obj takes an object and a worker, not {type(location).__name__}")
        location.set_obj(obj)

    def set_obj(self, obj: Any) -> None:
        """Puts a tensor, plan, protocol, data set or TrainConfig on this worker; it stays until `rm_obj` of its id.

        Raises:
            OptionError: it is nothing of the kind. WorkerLostError.
        """
        _check_sendable(obj)
        sent = obj.send(self)
        for pointer in (sent.data, sent.targets) if isinstance(sent, BaseDataset) else (sent,):
            if hasattr(pointer, "garbage_collection"):
                pointer.garbage_collection = False

    def register_obj(self, obj: Any, obj_id: int | None = None) -> None:
        """`set_obj`, under the id `obj_id` where one is given, which becomes that of a tensor."""
        if obj_id is not None:
            number = as_whole(obj_id, "obj_id")
            if isinstance(obj, torch.Tensor):
                give_id(obj, number)
            else:
                _check_sendable(obj)
                obj.id = number
        self.set_obj(obj)

    def load_data(self, data: Iterable[Any]) -> None:
        """`set_obj` for each of `data`."""
        if isinstance(data, torch.Tensor) or not isinstance(data, Iterable):
            raise OptionError(f"load_data takes a list of objects, not {type(data).__name__}: write [x]")
        for one in data:
            self.set_obj(one)

    @bounded
    def rm_obj(self, id: int, *, timeout: float | None = None) -> None:
        """Removes what this client has there under that id, published or not. Nothing happens if there is nothing."""
        self.workplace.objects.remove(as_whole(id, "an object's id"))

    @bounded
    def de_register_obj(
        self, obj: Any, _recurse_torch_objs: bool = True, *, timeout: float | None = None
    ) -> None:
        """`rm_obj` of `obj`, which was put there from here, or is a pointer to it."""
        number = getattr(obj, "id_at_location", None) or getattr(obj, "id", None)
        if number is None:
            raise OptionError(f"de_register_obj takes an object that was sent, not {type(obj).__name__}")
        self.rm_obj(number)

    # ------------------------------------------------------------------------------ what is there

    @bounded
    def request_search(
        self, query: str | Sequence[str], *more: str, location: Any, timeout: float | None = None
    ) -> list[Any]:
        """Searches `location`: ``me.request_search(["#boston"], location=bob)``."""
        found: list[Any] = location.search(query, *more)
        return found

    @property
    def _objects(self) -> dict[int, Any]:
        """What the worker holds for this client, by id; see `BaseWorker.async_list_objects`."""
        return run(self.workplace.contents.listing(), instead="await worker.async_list_objects()")

    @_objects.setter
    def _objects(self, value: object) -> None:
        self._replace_objects(value)

    def _replace_objects(self, value: object) -> None:
        if value:
            raise OptionError(
                "_objects is a listing: worker.set_obj(x) puts something there, rm_obj(id) removes it"
            )
        run(self.workplace.objects.clear(), instead="await worker.async_clear_objects()")

    @bounded
    def list_objects(self, *, timeout: float | None = None) -> str:
        """Returns a text that lists the objects on the worker."""
        return str(self._objects)

    @bounded
    def list_objects_remote(self, *, timeout: float | None = None) -> str:
        """Does the same as `list_objects`."""
        return self.list_objects()

    @bounded
    def objects_count_remote(self, *, timeout: float | None = None) -> int:
        """Does the same as `objects_count`."""
        return run(self.workplace.objects.count(), instead="await worker.async_objects_count()")

    @bounded
    def clear_objects_remote(self, *, timeout: float | None = None) -> Self:
        """Does the same as `clear_objects`."""
        run(self.workplace.objects.clear(), instead="await worker.async_clear_objects()")
        return self

    @bounded
    def get_obj(self, id: int, *, timeout: float | None = None) -> Any:
        """Returns the object that the worker holds under that id, as its listing shows it.

        Raises:
            UnknownObjectError: there is nothing under that id.
        """
        found = self._objects
        number = as_whole(id, "an object's id")
        return found[number] if number in found else self.workplace.contents.at(number)

    @bounded
    def request_obj(
        self,
        id: int,
        location: NamesOf02,
        user: str | None = None,
        reason: str = "",
        *,
        timeout: float | None = None,
    ) -> Any:
        """Returns the value of object `id` on worker `location`, which forgets it, as in
        ``me.request_obj(x.id_at_location, bob)``.

        Raises:
            UnknownObjectError: this client has no such object there. GetNotPermittedError: it is private.
        """
        if not isinstance(location, NamesOf02):
            raise OptionError(f"request_obj takes the worker that holds it, not {type(location).__name__}")
        refuse_user(user)
        return location.workplace.contents.taken(as_whole(id, "an object's id"))

    @property
    def train_config(self) -> Any:
        """The `TrainConfig` that was sent here last, as it was then; None before."""
        return None if self.train_job is None else self.train_job.config

    @contextlib.contextmanager
    def registration_enabled(self) -> Iterator[None]:
        """`is_client_worker` is False for the block. Objects go with their pointers either way."""
        before, self.is_client_worker = self.is_client_worker, False
        try:
            yield
        finally:
            self.is_client_worker = before

    # ----------------------------------------------------------------------------------- messages

    @property
    def log_msgs(self) -> bool:
        """True while `msg_history` gets the messages that are sent to this worker."""
        return self.workplace.connection.history is not None

    @log_msgs.setter
    def log_msgs(self, value: bool) -> None:
        self.workplace.connection.history = self.msg_history if value else None

    @property
    def message_pending_time(self) -> float:
        """Seconds that every message to this worker waits before it leaves, to try a slow network; 0 by default."""
        return self.workplace.connection.latency

    @message_pending_time.setter
    def message_pending_time(self, seconds: float) -> None:
        number = plain(seconds)
        if isinstance(number, bool) or not isinstance(number, int | float) or not 0 <= number < math.inf:
            raise OptionError(f"message_pending_time is a number of seconds of at least 0, not {seconds!r}")
        self.workplace.connection.latency = float(number)

    @staticmethod
    def is_framework_supported(framework: str) -> bool:
        """Returns whether workers run ops of `framework`: those of "torch"."""
        return framework == "torch"


def _check_sendable(obj: Any) -> None:
    """Raises OptionError for what a worker cannot hold, or not by this name."""
    if isinstance(obj, torch.nn.Module) and not isinstance(obj, Plan):
        raise OptionError(
            f"a {type(obj).__name__} goes to a worker in place, by module.send(worker); or send planrt.Plan(module)"
        )
    if not isinstance(obj, PointerTensor | torch.Tensor) and not hasattr(obj, "send"):
        raise OptionError(
            f"workers hold tensors, plans, protocols, data sets and TrainConfigs, not {type(obj).__name__}: "
            "nothing else of a peer is run"
        )

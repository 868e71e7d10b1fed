"""`VirtualWorker`: a worker inside this process, and its client."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import sys
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar

import torch

from planrt.deadlines import bounded
from planrt.errors import OptionError
from planrt.logs import get_logger
from planrt.loop import on_loop_thread, run
from planrt.metrics import Watched
from planrt.plans.policy.approvals import Approvals
from planrt.plans.policy.rules import Policy
from planrt.serde.frames import Limits
from planrt.shown import shown
from planrt.types import as_text, as_whole
from planrt.workers.base import DEFAULT_TIMEOUT, BaseWorker, decisions_in, worker_id
from planrt.workers.client import registry
from planrt.workers.client.connection import Connection
from planrt.workers.client.contents import held_pointer
from planrt.workers.client.redialling import Redialling
from planrt.workers.machine.access import Access
from planrt.workers.machine.kinds.pointer import PeerRef
from planrt.workers.machine.state import WorkerState
from planrt.workers.pointers.tensor import pointer_id
from planrt.workers.serving.audit_file import AuditFile
from planrt.workers.serving.audit_parts import SIZE as AUDIT_SIZE
from planrt.workers.serving.dialling import Dialling
from planrt.workers.serving.host import WorkerHost, virtual_compute
from planrt.workers.serving.joint_folder import JointFolder
from planrt.workers.serving.sum_keys import identity_of
from planrt.workers.transport import addresses, memory
from planrt.workers.transport.pipes import Pipe
from planrt.workers.wire.objects import check_travels

V = TypeVar("V", bound="VirtualWorker")

log = get_logger("planrt.client")

_virtual_turns: asyncio.Semaphore | None = None


class VirtualWorker(BaseWorker):
    """A worker inside this process: ``VirtualWorker(hook, id="bob")``, or ``VirtualWorker("bob")``.

    It takes and gives the same bytes as one behind a socket. All virtual workers of a process compute one
    after the other on one thread, with one torch thread.

    Made again under the id of one that is not closed, it is that one, with its objects, and a line in the log says so
    (logger "planrt.client"; where it holds something a warning, which Python shows). Data sets and tensors that it has
    not yet are added; arguments that contradict it are refused.

    Args:
        hook: the `TorchHook`, as the tutorials pass it, or the id.
        id: the worker's name.
        data: tensors that it holds from the start, with their tags and descriptions; `search` finds them.
        datasets: key -> map-style data set of (data, target) pairs to train on.
        users: user name -> token; private data names the users who may see it.
        token: which of these users this client is.
        policy: what its owner allows; `approvals` the folder of the owner's decisions about plans.
        access: which user may do what with which data; see `planrt.workers.machine.access`.
        audit: a file where the owner's log of what clients do is kept. audit_size: bytes of one, about, before the
            next one is begun.
        joint_runs: a folder where it keeps its part of joint runs (docs/vertical.md), to go on after a break.
        sum_key, sum_peers: the key by which it signs in secure aggregations, a file, and those of the workers that it
            adds up with, a file or name -> 64 hex digits; see docs/secure_aggregation.md.
        device, limits: where it computes; the sizes of messages it takes.
        deterministic: whether only torch's deterministic kernels run. None: on everything but a CPU.
        is_client_worker: kept as an attribute; objects are freed with their pointers either way.
        log_msgs: keep what is sent to the worker in `msg_history`.
        verbose: taken, and without effect: planrt logs to the logger "planrt".
        message_pending_time: seconds that every message waits before it leaves, to try a slow network.
        call_timeout: seconds that each call may wait for the worker, unless `planrt.waiting` says less; None for as
            long as it takes.
        auto_add: whether `get_worker` finds it, and making it again returns the same.

    Raises:
        OptionError: no id, or arguments that contradict a living worker of that id.
    """

    _serving: asyncio.Task[None]
    """Serves the latest connection."""

    def __new__(cls, hook: object = None, id: str | None = None, *args: Any, **options: Any) -> Self:
        """The living worker of that id, or a new one."""
        if options.get("auto_add", True):
            name = hook if id is None and isinstance(hook, str) else id
            if _living(cls, name):
                gc.collect()  # one that nobody refers to any more is in nobody's way
                if (living := _living(cls, name)) is not None:
                    return living
        return super().__new__(cls)

    def __init__(
        self,
        hook: object = None,
        id: str | None = None,
        data: Sequence[torch.Tensor] = (),
        is_client_worker: bool = False,
        log_msgs: bool = False,
        verbose: bool = False,
        auto_add: bool = True,
        message_pending_time: float = 0.0,
        *,
        call_timeout: float | None = None,
        datasets: Mapping[str, Any] | None = None,
        users: Mapping[str, str] | None = None,
        token: str = "",
        policy: Policy | None = None,
        approvals: Approvals | str | Path | None = None,
        access: Access | Mapping[str, Any] | str | Path | None = None,
        audit: str | Path | None = None,
        audit_size: int = AUDIT_SIZE,
        joint_runs: str | Path | None = None,
        sum_key: str | Path | None = None,
        sum_peers: str | Path | Mapping[str, str] | None = None,
        device: str | torch.device = "cpu",
        deterministic: bool | None = None,
        limits: Limits | None = None,
    ) -> None:
        id = worker_id(hook, id, 'VirtualWorker(hook, id="bob")')
        made_with: dict[str, Any] = {
            "users": users, "token": token or None, "policy": policy, "approvals": approvals, "access": access,
            "audit": audit, "audit_size": audit_size, "device": str(device),
            "limits": limits, "deterministic": deterministic, "joint_runs": joint_runs, "sum_key": sum_key,
            "sum_peers": sum_peers,
        }  # fmt: skip
        if "_made_with" in self.__dict__:
            self._made_again(made_with, data, datasets or {})
            return
        log_file = None if audit is None else AuditFile(audit, id, audit_size)
        state = WorkerState(
            id,
            device=device,
            users=users,
            policy=policy,
            approvals=decisions_in(approvals),
            limits=limits,
            deterministic=deterministic,
            reaches=addresses.reaches,
            access=Access.of(access),
            audit=log_file,
            joint_runs=None if joint_runs is None else JointFolder(joint_runs, id),
            signs_sums=identity_of(id, sum_key, sum_peers),
        )
        for key, dataset in (datasets or {}).items():
            state.add_dataset(dataset, key)
        for tensor in data:
            check_travels(tensor)
            state.add_tensor(pointer_id(tensor), tensor)
        self._host = WorkerHost(
            state, virtual_compute(), limits=limits, dialling=Dialling(everywhere=True), audit=log_file
        )
        self._clients: weakref.WeakSet[VirtualWorker] = weakref.WeakSet([self])
        """All clients of the host, this one included."""
        self._link_address = memory.new_address(id, self._host)
        self._token, self._datasets_given = token, dict(datasets or {})
        opening = self._open_memory(id, limits or Limits())
        connection = run(opening, instead="a thread of its own: VirtualWorker(...) blocks")
        super().__init__(
            id, connection, is_client_worker=is_client_worker, auto_add=auto_add, log_msgs=log_msgs,
            message_pending_time=message_pending_time, call_timeout=call_timeout,
        )  # fmt: skip
        self._made_with = made_with

    def _made_again(
        self, options: Mapping[str, Any], data: Sequence[torch.Tensor], datasets: Mapping[str, Any]
    ) -> None:
        """The program makes a worker that it has: nothing may contradict, and what is new is added."""
        advice = "close() it first, or give the new one another id"
        for name, value in options.items():
            if value is not None and value != self._made_with[name]:
                raise OptionError(f"worker {self.id!r} is there already, with another {name}: {advice}")
        for key, dataset in datasets.items():
            if key in self.datasets and self._datasets_given.get(key) is not dataset:
                raise OptionError(
                    f"worker {self.id!r} is there already, with another data set {key!r}: {advice}"
                )
        for key, dataset in datasets.items():
            if key not in self.datasets:
                self.add_dataset(dataset, key)
                self._datasets_given[key] = dataset
        for tensor in data:
            check_travels(tensor)
            if not self._host.state.has_tensor(tensor):
                self._host.state.add_tensor(pointer_id(tensor), tensor)
        held = len(self._objects)
        tell = log.warning if held else log.info
        tell(f"worker {self.id!r} is there already: this is the same one, with its objects ({held})")

    def __repr__(self) -> str:
        return f"<{type(self).__name__} id:{shown(self.id)} #objects:{len(self._objects)}{self._gone()}>"

    @property
    def link_address(self) -> str:
        """The address at which other workers of this process reach this one."""
        return self._link_address

    @property
    def _objects(self) -> dict[int, Any]:
        """What the worker holds, whoever's it is, by id: tensors, plans, protocols, and a `HeldPointer` for what is on
        other workers."""
        if not self._connection.closed and not on_loop_thread():
            self.objects_count()  # everything posted has been done then
        return {
            id: held_pointer(self.id, id, stored.value.plain, stored.value.id)
            if isinstance(stored.value, PeerRef)
            else stored.value
            for id, stored in list(self._host.state.store.objects.items())
        }

    @_objects.setter
    def _objects(self, value: object) -> None:
        self._replace_objects(value)

    @property
    def watched(self) -> Watched:
        """The worker with all of its clients as monitoring sees it; see `planrt.MetricsServer`."""
        return self._host.watched

    def connect_as(self, token: str = "") -> VirtualWorker:
        """Another client of this worker, with a session of its own: as the user whose `token` it shows, or nobody.

        Raises:
            HandshakeError: the token is none of the worker's users'.
        """
        other = object.__new__(type(self))
        other._host = self._host
        other._link_address, other._clients = self._link_address, self._clients
        other._clients.add(other)
        other._token = token
        opening = other._open_memory(self.id, self._connection.limits)
        connection = run(opening, instead="a thread of its own: connect_as(...) blocks")
        BaseWorker.__init__(
            other, self.id, connection, is_client_worker=self.is_client_worker, auto_add=False
        )
        return other

    def connect(self) -> Self:
        """Connects again after `close`. The objects are there still, for as long as a worker keeps sessions
        (``limits=Limits(session_seconds=...)``, two minutes).
        """
        if self._connection.closed:
            connection = run(self._connection.reopen(), instead="a thread of its own: connect() blocks")
            self._reconnected(connection)
        return self

    async def _open_memory(self, id: str, limits: Limits) -> Connection:
        """Opens a connection to this worker's own host; runs on planrt's loop."""
        global _virtual_turns
        if _virtual_turns is None:
            _virtual_turns = asyncio.Semaphore(2)  # one computes, the next one's request is already there
        me, host = weakref.ref(self), self._host

        async def dial() -> Pipe:
            pipe, serving = memory.connect(f"memory://{id}", host, limits)
            if (worker := me()) is not None:
                worker._serving = serving
            return pipe

        return await Connection.open(
            await dial(),
            id,
            timeout=DEFAULT_TIMEOUT,
            limits=limits,
            turns=_virtual_turns,
            token=self._token,
            redialling=Redialling(dial, token=self._token, seconds=0),
        )

    def add_dataset(self, dataset: Any, key: str, *, tags: Sequence[str] = (), description: str = "") -> None:
        """Serves a map-style data set under `key`; see `WorkerState.add_dataset`."""
        info = self._host.state.add_dataset(dataset, key, tags=tags, description=description)
        self._connection.session.datasets[as_text(key, "key")] = info

    def remove_dataset(self, key: str) -> None:
        """Serves the data set `key` no longer.

        Raises:
            OptionError: there is none under that key.
        """
        self._host.state.remove_dataset(key)
        self._connection.session.datasets.pop(key, None)

    @bounded
    def rm_obj(self, id: int, *, timeout: float | None = None) -> None:
        """Removes what is there under that id, if it is this client's or the worker's own."""
        super().rm_obj(id)
        self._host.state.store.discard("", as_whole(id, "an object's id"))

    async def _close(self, *, forget: bool = False) -> None:
        await super()._close(forget=forget)
        with contextlib.suppress(asyncio.CancelledError):
            await self._serving

    def __del__(self) -> None:
        """A worker that nobody refers to any more: its tasks must end, whether it has been closed or not, and with its
        last client its connections to other workers.
        """
        place = self.__dict__.get("workplace")
        if place is not None and not sys.is_finalizing():
            connection = place.connection
            last = all(one is self for one in self._clients)
            with contextlib.suppress(RuntimeError):  # the loop is gone
                connection.loop.call_soon_threadsafe(
                    _close_soon, connection, self._serving, self._host if last else None
                )


def _living(kind: type[V], id: object) -> V | None:
    """The virtual worker of that id, if there is one that is not closed."""
    found = registry.find(id) if isinstance(id, str) else None
    return found if type(found) is kind and not found._connection.closed else None


_closing: set[asyncio.Task[None]] = set()


def _close_soon(connection: Connection, serving: asyncio.Task[None], host: WorkerHost | None) -> None:
    async def close() -> None:
        await connection.close(forget=True)
        await asyncio.wait([serving])
        if host is not None:
            host.stop()

    task = asyncio.create_task(close())
    _closing.add(task)  # a loop keeps weak references only
    task.add_done_callback(_closing.discard)

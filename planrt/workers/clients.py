"""Workers as their clients see them: `VirtualWorker` in this process, `WebsocketClientWorker` anywhere.

Both do the same things over the same messages; only the pipe differs. Every method that waits has an
``async_`` form to await from any event loop, and a blocking form for scripts and threads.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import math
import re
import sys
import time
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self, TypeVar

import torch

from planrt.errors import LocalError, OptionError, RemoteError, UnknownPlanError, WireError
from planrt.logs import get_logger
from planrt.plans.approvals import Approvals, Status
from planrt.plans.graph import Graph, refs_in
from planrt.plans.interpreter import check_inputs, local_state
from planrt.plans.plan import Plan
from planrt.plans.policy import Policy
from planrt.plans.record import with_names
from planrt.serde.frames import Allocate, Limits, in_memory
from planrt.types import Ref, as_text, as_whole, map_leaves, plain
from planrt.workers import messages as m
from planrt.workers import registry
from planrt.workers.connection import Connection, Reply
from planrt.workers.contents import Contents, held_pointer
from planrt.workers.host import WorkerHost, virtual_compute
from planrt.workers.links import register_virtual
from planrt.workers.loop import on_loop, on_loop_thread, run
from planrt.workers.objects import check_travels
from planrt.workers.pipes import Traffic, memory_pipes
from planrt.workers.pointers import pointer_id
from planrt.workers.registry import KnowsWorkers
from planrt.workers.remote_names import RemoteNames
from planrt.workers.state import WorkerState
from planrt.workers.store import PeerRef
from planrt.workers.websocket import dial

B = TypeVar("B", bound=m.Message)
V = TypeVar("V", bound="VirtualWorker")

log = get_logger("planrt.client")

DEFAULT_TIMEOUT = 10.0
"""Seconds to wait for a connection and its handshake."""


class TrainJob(Protocol):
    """What `planrt.fl.TrainConfig.send` leaves with a worker, for `fit` and `evaluate`."""

    async def fit_on(self, worker: BaseWorker, dataset_key: str, *, seed: int) -> Any:
        """Trains the model on `worker`, from where it is."""

    async def evaluate_on(self, worker: BaseWorker, dataset_key: str, **options: Any) -> Any:
        """The model as it is on `worker`, evaluated there; `options` as of `BaseWorker.evaluate`."""


class Reconnecting:
    """`connect`, which is two things: of the class, it connects to a worker, to be awaited; of a worker, which it
    returns, it connects again.
    """

    def __init__(self, first: Any) -> None:
        self._first = first

    def __get__(self, worker: WebsocketClientWorker | None, kind: type[WebsocketClientWorker]) -> Any:
        if worker is None:
            return self._first.__get__(None, kind)
        again: WebsocketClientWorker = worker

        def connect() -> WebsocketClientWorker:
            """Connects again after `close`, or after the connection was lost; see `async_reconnect`."""
            return run(again.async_reconnect(), instead="await worker.async_reconnect()")

        return connect


class BaseWorker(Contents, KnowsWorkers):
    """A worker at the other end of a connection. Use one of its subclasses."""

    def __init__(
        self, id: str, connection: Connection, *, is_client_worker: bool = False, auto_add: bool = True
    ) -> None:
        self.id = id
        self.is_client_worker = is_client_worker
        self.train_job: TrainJob | None = None
        self._connection = connection
        self._plans: set[str] = set()
        self._init_plans()
        if auto_add:
            registry.add(self)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.id} at {self.address}>"

    @property
    def address(self) -> str:
        """``ws://host:port`` or ``memory://id``."""
        return self._connection.session.address

    @property
    def datasets(self) -> Mapping[str, m.DatasetInfo]:
        """The data sets the worker announced in the handshake: lengths and specs, by key."""
        return self._connection.session.datasets

    @property
    def versions(self) -> m.Versions:
        """What the worker runs."""
        return self._connection.session.versions

    @property
    def traffic(self) -> Traffic:
        """Messages and bytes to and from this worker so far."""
        return self._connection.traffic

    @property
    def remote(self) -> RemoteNames:
        """torch's functions on the worker: ``worker.remote.torch.zeros(2, 3)`` gives a pointer."""
        return RemoteNames(self)

    # ------------------------------------------------------------------------------------- approval

    @on_loop
    async def async_approval(self, plan: Plan | Graph | str) -> Status:
        """How it stands with a plan (or its hash) at the worker's owner: (status, why).

        The status is "approved", "denied", "pending", or "unknown" where it was never sent there.
        """
        if not isinstance(plan, str | Plan | Graph):
            raise OptionError(f"approval is of a plan or its hash, not of {type(plan).__name__}")
        hash = plan if isinstance(plan, str) else plan.hash
        if not re.fullmatch("[0-9a-f]{64}", hash):
            raise OptionError(f"{hash[:80]!r} is not a plan's hash: give the plan, or 64 hex digits")
        answer, _ = expect(m.Approval, await self._connection.request(m.AskApproval(hash)), self)
        return Status(answer.status, answer.why)

    def approval(self, plan: Plan | Graph | str) -> Status:
        """The blocking form of `async_approval`."""
        return run(self.async_approval(plan), instead="await worker.async_approval(plan)")

    async def async_wait_for_approval(
        self, plan: Plan, *, timeout: float | None = None, every: float = 1.0
    ) -> Status:
        """Sends the plan to be looked at, and waits until its owner has decided: (status, why).

        Asks `every` so many seconds; after `timeout` seconds it gives "pending" back.

        Raises:
            PlanError: the plan is not built. WorkerLostError.
        """
        pointer = await self.async_send_plan(plan)
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        while (status := await self.async_approval(plan)).status == "pending":
            left = deadline - time.monotonic()
            if left <= 0:
                break
            await asyncio.sleep(min(every, left))
        del pointer  # it was to keep the plan there meanwhile
        return status

    def wait_for_approval(self, plan: Plan, *, timeout: float | None = None, every: float = 1.0) -> Status:
        """The blocking form of `async_wait_for_approval`."""
        waiting = self.async_wait_for_approval(plan, timeout=timeout, every=every)
        return run(waiting, instead="await worker.async_wait_for_approval(plan)")

    def leave_job(self, job: TrainJob) -> None:
        """`fit` and `evaluate` are about `job` from here on; the one before goes, if nobody points at its model."""
        self.train_job = job
        self._connection.post_drops()

    # ------------------------------------------------------------------------------------- requests

    async def request(
        self,
        body: m.Body,
        tensors: Sequence[torch.Tensor] = (),
        *,
        plan: Graph | None = None,
        allocate: Allocate[m.Envelope] = in_memory,
    ) -> Reply:
        """One request, one reply; runs on planrt's loop.

        If the worker has lost `plan`, which `body` names, it is sent again, and then the request.

        Raises:
            RemoteError: the worker could not do it; says where in the model's code, if an op of `plan` failed.
            WorkerLostError: it is gone.
        """
        try:
            return await self._connection.request(body, tensors, allocate=allocate, in_turn=True)
        except UnknownPlanError:
            if plan is None:
                raise
            self._plans.discard(plan.hash)
            await self.put_plan(plan)
            return await self._connection.request(body, tensors, allocate=allocate, in_turn=True)
        except RemoteError as error:
            if plan is not None and error.index is not None:
                error.found_at(plan.place(error.index))
            raise

    async def put_plan(self, plan: Graph) -> None:
        """Sends `plan` unless this connection has sent it before; runs on planrt's loop."""
        if plan.hash in self._plans:
            return
        data = torch.frombuffer(bytearray(with_names(plan)), dtype=torch.uint8)
        expect(m.Done, await self._connection.request(m.PutPlan(plan.hash), [data]), self)
        self._plans.add(plan.hash)

    async def async_run(self, plan: Plan | Graph, *args: Any, seed: int = 0, **kwargs: Any) -> Any:
        """Runs `plan` on the worker with `args` and the plan's state, and brings its outputs back.

        The arguments and the state are here; the worker keeps the ops alone. Sends these at the first use, then one
        message each way. Random ops draw from `seed`. What the plan writes in place is not brought back.

        Raises:
            PlanArgumentError: wrong number, shape or dtype of arguments; nothing is sent.
            PlanError: the plan is not built.
            RemoteError: an op failed on the worker.
        """
        if isinstance(plan, Plan):
            inputs = plan.record.signature.bind(plan.name, args, kwargs)
            return await self._run(plan.graph, inputs, plan.state_tensors(), seed)
        if not isinstance(plan, Graph):
            raise OptionError(f"run takes a plan, not {type(plan).__name__}: make one with func2plan")
        return await self._run(plan, args, local_state(plan), seed)

    @on_loop
    async def _run(
        self, plan: Graph, inputs: Sequence[torch.Tensor], state: Sequence[torch.Tensor], seed: int
    ) -> Any:
        check_inputs(plan, inputs)
        await self.put_plan(plan)
        body = m.RunPlan(plan.hash, seed)
        answer, tensors = expect(m.Values, await self.request(body, [*inputs, *state], plan=plan), self)
        wanted = sum(1 for _ in refs_in(plan.outputs))
        if len(answer.numbers) != wanted or answer.numbers.count(None) != len(tensors):
            raise WireError(
                f"worker {self.id!r} returned {len(answer.numbers)} values of {wanted}", address=self.address
            )
        rest = iter(tensors)
        values = iter([next(rest) if number is None else number for number in answer.numbers])
        return map_leaves(plan.outputs, lambda leaf: next(values) if isinstance(leaf, Ref) else leaf)

    def run(self, plan: Plan | Graph, *args: Any, seed: int = 0, **kwargs: Any) -> Any:
        """The blocking form of `async_run`."""
        return run(self.async_run(plan, *args, seed=seed, **kwargs), instead="await worker.async_run(...)")

    @on_loop
    async def async_fit(
        self,
        dataset_key: str,
        device: str | torch.device | None = None,
        return_ids: Sequence[int] | None = None,
        *,
        seed: int = 0,
    ) -> Any:
        """Trains what ``TrainConfig.send(worker)`` left here, on the worker's data set `dataset_key`.

        It goes on from where the last fit ended; ``config.model_ptr.get().obj`` is the trained model. `seed` decides
        the order of samples and every random op, together with how many fits there were. `device` is taken as scripts
        of the 0.2 era give it: a worker computes on the device that its owner chose.

        Returns:
            A `planrt.fl.FitResult`; or with `return_ids`, as 0.2 did, the loss as a tensor: the mean over the samples.

        Raises:
            LocalError: no TrainConfig was sent. UnknownDatasetError, RemoteError, WorkerLostError.
        """
        check_device(device)
        result = await self._job("fit").fit_on(self, dataset_key, seed=_seed(seed))
        return result if return_ids is None else torch.tensor(result.loss)

    def fit(
        self,
        dataset_key: str,
        device: str | torch.device | None = None,
        return_ids: Sequence[int] | None = None,
        *,
        seed: int = 0,
    ) -> Any:
        """The blocking form of `async_fit`."""
        fitting = self.async_fit(dataset_key, device, return_ids, seed=seed)
        return run(fitting, instead="await worker.async_fit(...)")

    @on_loop
    async def async_evaluate(
        self,
        dataset_key: str,
        return_histograms: bool = False,
        nr_bins: int = -1,
        return_loss: bool = True,
        return_raw_accuracy: bool = True,
        device: str | torch.device | None = None,
        *,
        bins: int = 0,
    ) -> Any:
        """Evaluates what ``TrainConfig.send(worker)`` left here, as it is now, on the data set `dataset_key`.

        `nr_bins` classes are counted for `return_histograms`; `bins` says both at once. Right answers are counted where
        there are classes. `device` as of `async_fit`.

        Returns:
            A `planrt.plans.training.EvaluationResult`, which is also a mapping with the keys of the 0.2 era.

        Raises:
            LocalError: no TrainConfig was sent. OptionError: histograms without a number of classes.
            UnknownDatasetError, RemoteError, WorkerLostError.
        """
        check_device(device)
        return await self._job("evaluate").evaluate_on(
            self,
            dataset_key,
            bins=bins,
            return_histograms=return_histograms,
            nr_bins=nr_bins,
            return_loss=return_loss,
            return_raw_accuracy=return_raw_accuracy,
        )

    def evaluate(
        self,
        dataset_key: str,
        return_histograms: bool = False,
        nr_bins: int = -1,
        return_loss: bool = True,
        return_raw_accuracy: bool = True,
        device: str | torch.device | None = None,
        *,
        bins: int = 0,
    ) -> Any:
        """The blocking form of `async_evaluate`."""
        evaluating = self.async_evaluate(
            dataset_key, return_histograms, nr_bins, return_loss, return_raw_accuracy, device, bins=bins
        )
        return run(evaluating, instead="await worker.async_evaluate(...)")

    @on_loop
    async def async_close(self) -> None:
        """Closes the connection; the worker frees what it held for it."""
        await self._close()

    def close(self) -> None:
        """The blocking form of `async_close`."""
        run(self.async_close(), instead="await worker.async_close()")

    def _reconnected(self, connection: Connection) -> None:
        """What was known of the earlier connection's objects and plans goes with it."""
        self._connection = connection
        self._plans = set()
        self._init_plans()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    async def _close(self) -> None:
        await self._connection.close()

    def _job(self, verb: str) -> TrainJob:
        if self.train_job is None:
            raise LocalError(
                f"nothing to {verb} on worker {self.id!r}: call TrainConfig(...).send(worker) first"
            )
        return self.train_job


def _seed(value: Any) -> int:
    number = plain(value)
    if isinstance(number, bool) or not isinstance(number, int) or number < 0:
        raise OptionError(f"a seed must be a whole number of at least 0, got {value!r}")
    return number


def check_device(device: Any) -> None:
    """Raises OptionError for what is no device."""
    try:
        _ = device is None or torch.device(device)
    except (RuntimeError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise OptionError(
            f"{device!r} is no device ({reason}); a worker computes on its own: leave it out"
        ) from error


def expect(kind: type[B], reply: Reply, worker: BaseWorker) -> tuple[B, list[torch.Tensor]]:
    """`reply`, if it is of the kind that was asked for.

    Raises:
        WireError: it is of another kind.
    """
    body, tensors = reply
    if not isinstance(body, kind):
        raise WireError(
            f"worker {worker.id!r} answered with {type(body).__name__} instead of {kind.__name__}",
            address=worker.address,
        )
    return body, tensors


class WebsocketClientWorker(BaseWorker):
    """A worker behind a websocket: ``WebsocketClientWorker("alice", "127.0.0.1", 8777)``, or as in PySyft 0.2
    ``WebsocketClientWorker(hook, "127.0.0.1", 8777, id="alice")``.

    Connects and shakes hands at once; ``await WebsocketClientWorker.connect(id, uri)`` is the form for event loops.
    ``worker.connect()`` connects again after `close`, or after the connection was lost; the objects of the session
    before are gone then.

    Args:
        hook: the `TorchHook`, as the tutorials pass it, or the id.
        host, port: where it listens; or `uri`, ``ws://host:port`` or ``wss://host:port``.
        secure: over TLS, ``wss://``. The server's certificate is checked against the system's authorities, or against
            those in the file `ca`.
        id: the worker's name, which it must answer with.
        is_client_worker: kept as an attribute; objects are freed with their pointers either way.
        log_msgs, verbose: taken, and without effect: `traffic` counts messages, and planrt logs to the logger "planrt".
        data: not taken: a server holds its own data.
        timeout: seconds to wait for the connection and its handshake. limits: the sizes of messages that it takes.
        token: tells the worker which of its users this is.
        auto_add: whether `get_worker` finds it.

    Raises:
        ConnectError: nobody answers there. HandshakeError: not a planrt worker called `id`, or an unknown token.
        OptionError: an argument that cannot be used.
    """

    def __init__(
        self,
        hook: object = None,
        host: str = "127.0.0.1",
        port: int = 8777,
        secure: bool = False,
        id: str | None = None,
        is_client_worker: bool = False,
        log_msgs: bool = False,
        verbose: bool = False,
        data: Sequence[torch.Tensor] | None = None,
        timeout: float | None = None,
        *,
        uri: str | None = None,
        token: str = "",
        limits: Limits | None = None,
        ca: str | Path | None = None,
        auto_add: bool = True,
    ) -> None:
        id = worker_id(hook, id, 'WebsocketClientWorker(hook, host, port, id="alice")')
        if data:
            raise OptionError(
                "data= is for the worker that holds it: give it to WebsocketServerWorker(data=...), or send() tensors"
            )
        if uri is None:
            uri = f"{'wss' if secure else 'ws'}://{as_text(host, 'host')}:{as_whole(port, 'port')}"
        elif secure and not uri.startswith("wss://"):
            raise OptionError(f"secure=True means wss://, and uri is {uri!r}: write wss:// there")
        self._opening = Opening(uri, timeout or DEFAULT_TIMEOUT, limits or Limits(), token, ca)
        opened = run(self._opening.open(id), instead="await WebsocketClientWorker.connect(id, uri)")
        super().__init__(id, opened, is_client_worker=is_client_worker, auto_add=auto_add)

    @classmethod
    async def _connect(
        cls,
        id: str,
        uri: str,
        *,
        token: str = "",
        timeout: float = DEFAULT_TIMEOUT,
        limits: Limits | None = None,
        ca: str | Path | None = None,
    ) -> Self:
        """Connects to the worker `id` at `uri` within `timeout` seconds; awaitable from any loop."""
        worker = cls.__new__(cls)
        worker._opening = Opening(uri, timeout, limits or Limits(), token, ca)
        BaseWorker.__init__(worker, id, await worker._opening.open(id))
        return worker

    connect = Reconnecting(_connect)

    @on_loop
    async def async_reconnect(self) -> Self:
        """Connects again, if the connection has ended. The objects of the session before are gone.

        Raises:
            ConnectError, HandshakeError: as when it was made.
        """
        if self._connection.closed:
            self._reconnected(await self._opening.open(self.id))
        return self


@dataclass(frozen=True, slots=True)
class Opening:
    """How the connection to a worker is opened, every time."""

    uri: str
    timeout: float
    limits: Limits
    token: str
    ca: str | Path | None = None

    @on_loop
    async def open(self, id: str) -> Connection:
        """A new connection, and a new session."""
        pipe = await dial(self.uri, timeout=self.timeout, limits=self.limits, ca=self.ca)
        return await Connection.open(pipe, id, timeout=self.timeout, limits=self.limits, token=self.token)


def worker_id(hook: object, id: object, write: str) -> str:
    """The id of a worker that is made with these arguments, the first of which may be a hook or the id itself.

    Raises:
        OptionError: no id, two of them, or one that is no string.
    """
    if isinstance(hook, str):
        if id is not None:
            raise OptionError(f"two ids, {hook!r} and {id!r}: write {write}")
        return hook
    if id is None:
        raise OptionError(f"a worker needs an id: write {write}")
    return as_text(id, "a worker's id")


def decisions_in(approvals: Approvals | str | Path | None) -> Approvals | None:
    """The decisions in a folder, or as they are given."""
    return Approvals(approvals) if isinstance(approvals, str | Path) else approvals


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
        device, limits: where it computes; the sizes of messages it takes.
        deterministic: whether only torch's deterministic kernels run. None: on everything but a CPU.
        is_client_worker: kept as an attribute; objects are freed with their pointers either way.
        log_msgs, verbose: taken, and without effect: `traffic` counts messages, and planrt logs to the logger "planrt".
        auto_add: whether `get_worker` finds it, and making it again gives the same.

    Raises:
        OptionError: no id, or arguments that contradict a living worker of that id.
    """

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
        *,
        datasets: Mapping[str, Any] | None = None,
        users: Mapping[str, str] | None = None,
        token: str = "",
        policy: Policy | None = None,
        approvals: Approvals | str | Path | None = None,
        device: str | torch.device = "cpu",
        deterministic: bool | None = None,
        limits: Limits | None = None,
    ) -> None:
        id = worker_id(hook, id, 'VirtualWorker(hook, id="bob")')
        made_with: dict[str, Any] = {
            "users": users, "token": token or None, "policy": policy, "approvals": approvals,
            "device": torch.device(device), "limits": limits, "deterministic": deterministic,
        }  # fmt: skip
        if "_made_with" in self.__dict__:
            self._made_again(made_with, data, datasets or {})
            return
        state = WorkerState(
            id,
            device=device,
            users=users,
            policy=policy,
            approvals=decisions_in(approvals),
            limits=limits,
            deterministic=deterministic,
        )
        for key, dataset in (datasets or {}).items():
            state.add_dataset(dataset, key)
        for tensor in data:
            check_travels(tensor)
            state.own(pointer_id(tensor), tensor)
        self._host = WorkerHost(state, virtual_compute(), limits=limits)
        self._clients: weakref.WeakSet[VirtualWorker] = weakref.WeakSet([self])
        """All clients of the host, this one included."""
        self._link_address = register_virtual(id, self._host)
        self._token, self._datasets_given = token, dict(datasets or {})
        opening = _open_memory(id, self._host, limits or Limits(), token)
        connection, self._serving = run(opening, instead="a thread of its own: VirtualWorker(...) blocks")
        super().__init__(id, connection, is_client_worker=is_client_worker, auto_add=auto_add)
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
            if not self._host.state.owns(tensor):
                self._host.state.own(pointer_id(tensor), tensor)
        held = len(self._objects)
        tell = log.warning if held else log.info
        tell(f"worker {self.id!r} is there already: this is the same one, with its objects ({held})")

    def __repr__(self) -> str:
        return f"<{type(self).__name__} id:{self.id} #objects:{len(self._objects)}>"

    @property
    def link_address(self) -> str:
        """Where other workers of this process reach this one."""
        return self._link_address

    @property
    def _objects(self) -> dict[int, Any]:
        """What the worker holds, whoever's it is, by id: tensors, plans, protocols, and a `HeldPointer` for what is on
        other workers."""
        if not self._connection.closed and not on_loop_thread():
            self.objects_count()  # everything posted has been done then
        return {
            id: held_pointer(self.id, id, stored.value.peer, stored.value.id)
            if isinstance(stored.value, PeerRef)
            else stored.value
            for id, stored in list(self._host.state.store.objects.items())
        }

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
        opening = _open_memory(self.id, self._host, self._connection.limits, token)
        connection, other._serving = run(opening, instead="a thread of its own: connect_as(...) blocks")
        BaseWorker.__init__(
            other, self.id, connection, is_client_worker=self.is_client_worker, auto_add=False
        )
        return other

    def connect(self) -> Self:
        """Connects again after `close`. The objects of the session before are gone, those with tags excepted."""
        if self._connection.closed:
            opening = _open_memory(self.id, self._host, self._connection.limits, self._token)
            connection, self._serving = run(opening, instead="a thread of its own: connect() blocks")
            self._reconnected(connection)
        return self

    def add_dataset(self, dataset: Any, key: str, *, tags: Sequence[str] = (), description: str = "") -> None:
        """Serves a map-style data set under `key`; see `WorkerState.add_dataset`."""
        info = self._host.state.add_dataset(dataset, key, tags=tags, description=description)
        self._connection.session.datasets[key] = info

    def remove_dataset(self, key: str) -> None:
        """Serves the data set `key` no longer.

        Raises:
            OptionError: there is none under that key.
        """
        self._host.state.remove_dataset(key)
        self._connection.session.datasets.pop(key, None)

    async def _close(self) -> None:
        await super()._close()
        with contextlib.suppress(asyncio.CancelledError):
            await self._serving

    def __del__(self) -> None:
        """A worker that nobody refers to any more: its tasks must end, whether it has been closed or not, and with its
        last client its connections to other workers.
        """
        connection = self.__dict__.get("_connection")
        if connection is not None and not sys.is_finalizing():
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
        await connection.close()
        await asyncio.wait([serving])
        if host is not None:
            host.stop()

    task = asyncio.create_task(close())
    _closing.add(task)  # a loop keeps weak references only
    task.add_done_callback(_closing.discard)


async def _open_memory(
    id: str, host: WorkerHost, limits: Limits, token: str
) -> tuple[Connection, asyncio.Task[None]]:
    global _virtual_turns
    if _virtual_turns is None:
        _virtual_turns = asyncio.Semaphore(2)  # one computes, the next one's request is already there
    near, far = memory_pipes(f"memory://{id}", limits)
    serving = asyncio.create_task(host.serve(far))
    connection = await Connection.open(
        near, id, timeout=DEFAULT_TIMEOUT, limits=limits, turns=_virtual_turns, token=token
    )
    return connection, serving


def close_all(workers: Sequence[BaseWorker]) -> None:
    """Closes the connections of all `workers`."""

    async def close() -> None:
        await asyncio.gather(*(worker.async_close() for worker in workers))

    run(close(), instead="await worker.async_close() for each")

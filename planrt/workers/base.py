"""Workers as their clients see them: what `VirtualWorker` in this process and `WebsocketClientWorker` anywhere share.

Both do the same things over the same messages; only the pipe differs. Every method that waits has an
``async_`` form to await from any event loop, and a blocking form for scripts and threads.
"""

from __future__ import annotations

import asyncio
import math
import re
import time
import weakref
from collections.abc import Coroutine, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self, TypeVar, overload

import torch

from planrt.cards import card
from planrt.deadlines import bounded, seconds_of
from planrt.errors import OptionError, RemoteError, WireError
from planrt.loop import on_loop, run
from planrt.plans.ir.constants import approval_hash, constants_of, has_constants
from planrt.plans.ir.graph import Graph, refs_in
from planrt.plans.plan import P, Plan, R
from planrt.plans.policy.approvals import Approvals, Status
from planrt.plans.running.interpreter import check_inputs, local_state
from planrt.plans.training import EvaluationResult
from planrt.serde.frames import Allocate, in_memory
from planrt.shown import shown
from planrt.types import Ref, as_text, as_whole, map_leaves, plain
from planrt.workers.client import registry
from planrt.workers.client.connection import Connection
from planrt.workers.client.registry import KnowsWorkers
from planrt.workers.client.workplace import RemoteWorkplace
from planrt.workers.names_of_02 import NamesOf02
from planrt.workers.remote_names import RemoteNames
from planrt.workers.results import FitResult, WorkerStatus
from planrt.workers.transport.pipes import Traffic
from planrt.workers.wire import messages as m

B = TypeVar("B", bound=m.Message)


DEFAULT_TIMEOUT = 10.0
"""Seconds to wait for a connection and its handshake."""


class TrainJob(Protocol):
    """A job that `planrt.fl.TrainConfig.send` leaves with a worker, for `fit` and `evaluate`."""

    config: Any
    """The TrainConfig, as it was sent."""

    async def fit_on(self, worker: BaseWorker, dataset_key: str, *, seed: int) -> FitResult:
        """Trains the model on `worker`, from where it is."""

    async def evaluate_on(self, worker: BaseWorker, dataset_key: str, **options: Any) -> EvaluationResult:
        """Evaluates the model as it is on `worker`, there; `options` as of `BaseWorker.evaluate`."""


class BaseWorker(NamesOf02, KnowsWorkers):
    """A worker at the other end of a connection. Use one of its subclasses."""

    def __init__(
        self,
        id: str,
        connection: Connection,
        *,
        is_client_worker: bool = False,
        auto_add: bool = True,
        log_msgs: bool = False,
        message_pending_time: float = 0.0,
        call_timeout: float | None = None,
    ) -> None:
        self.id = id
        self.is_client_worker = is_client_worker
        self.train_job: TrainJob | None = None
        self._take_up(connection)
        self.call_timeout = call_timeout
        self.msg_history = []
        self.log_msgs, self.message_pending_time = log_msgs, message_pending_time
        if auto_add:
            registry.add(self)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {shown(self.id)} at {self.address}{self._gone()}>"

    def _gone(self) -> str:
        """``, gone: WHY`` of a worker whose connection has ended, else ``""``."""
        return f", gone: {self._connection.why_ended}" if self._connection.closed else ""

    def _repr_html_(self) -> str:
        session = self._connection.session
        rows = [
            (key, f"{info.length:,}", info.data, info.target, " ".join(info.tags), info.description)
            for key, info in session.datasets.items()
        ]
        return card(
            f"{type(self).__name__} {self.id}",
            [
                ("address", self.address),
                ("gone", self._connection.why_ended),
                (
                    "messages",
                    f"{self.traffic.messages_sent:,} sent, {self.traffic.messages_received:,} received",
                ),
                ("bytes", f"{self.traffic.bytes_sent:,} sent, {self.traffic.bytes_received:,} received"),
            ],
            columns=("data set", "items", "data", "target", "tags", "description"),
            rows=rows,
        )

    def _take_up(self, connection: Connection) -> None:
        """Begins with a new session: what was known of the one before goes with it."""
        me = weakref.ref(self)

        def renewed(another: Connection) -> None:
            if (worker := me()) is not None:
                worker._take_up(another)

        connection.on_renewed = renewed
        self.workplace = RemoteWorkplace(self, connection)

    @property
    def call_timeout(self) -> float | None:
        """Seconds that each call may wait for this worker, unless `planrt.waiting` says less; None, the
        default, for as long as it takes. A call that waits longer raises `WorkerTimeoutError`.
        """
        return self._connection.timeout

    @call_timeout.setter
    def call_timeout(self, seconds: float | None) -> None:
        self._connection.timeout = seconds_of(seconds, "call_timeout")

    @property
    def _connection(self) -> Connection:
        return self.workplace.connection

    @property
    def address(self) -> str:
        """``ws://host:port`` or ``memory://id``."""
        return self._connection.session.address

    @property
    def link_address(self) -> str:
        """The address at which other workers reach this one."""
        return self.address

    @property
    def datasets(self) -> Mapping[str, m.DatasetInfo]:
        """The data sets the worker announced in the handshake: lengths and specs, by key."""
        return self._connection.session.datasets

    @property
    def versions(self) -> m.Versions:
        """The versions that the worker runs."""
        return self._connection.session.versions

    @property
    def traffic(self) -> Traffic:
        """Messages and bytes to and from this worker so far."""
        return self._connection.traffic

    @property
    def remote(self) -> RemoteNames:
        """torch's functions on the worker: ``worker.remote.torch.zeros(2, 3)`` returns a pointer."""
        return RemoteNames(self)

    # ------------------------------------------------------------------------------------- approval

    @bounded
    @on_loop
    async def async_approval(self, plan: Plan | Graph | str, *, timeout: float | None = None) -> Status:
        """Asks what the worker's owner has decided about a plan, or about its hash; returns (status, why).

        The status is "approved", "denied", "pending", or "unknown" where it was never sent there.
        """
        answer, _ = await self.workplace.ask(m.Approval, m.AskApproval(_filed_under(plan)))
        return Status(answer.status, answer.why)

    @bounded
    def approval(self, plan: Plan | Graph | str, *, timeout: float | None = None) -> Status:
        """Blocks where `async_approval` awaits."""
        return run(self.async_approval(plan), instead="await worker.async_approval(plan)")

    async def async_wait_for_approval(
        self, plan: Plan, *, timeout: float | None = None, every: float = 1.0, purpose: str = ""
    ) -> Status:
        """Sends the plan to be looked at, and waits until its owner has decided: (status, why).

        The owner reads `purpose`, what it is for, next to it.

        Asks `every` so many seconds; after `timeout` seconds it returns "pending".

        Raises:
            PlanError: the plan is not built. WorkerLostError.
        """
        pointer = await self.workplace.plans.send_async(plan, purpose=purpose)
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        while (status := await self.async_approval(plan)).status == "pending":
            left = deadline - time.monotonic()
            if left <= 0:
                break
            await asyncio.sleep(min(every, left))
        del pointer  # it was to keep the plan there meanwhile
        return status

    def wait_for_approval(
        self, plan: Plan, *, timeout: float | None = None, every: float = 1.0, purpose: str = ""
    ) -> Status:
        """Blocks where `async_wait_for_approval` awaits."""
        waiting = self.async_wait_for_approval(plan, timeout=timeout, every=every, purpose=purpose)
        return run(waiting, instead="await worker.async_wait_for_approval(plan)")

    def leave_job(self, job: TrainJob) -> None:
        """`fit` and `evaluate` are about `job` from here on; the one before goes, if nobody points at its model."""
        self.train_job = job
        self._connection.post_drops()

    # ------------------------------------------------------------------------------ what is there

    @bounded
    @on_loop
    async def async_search(
        self, query: str | Sequence[str], *more: str, timeout: float | None = None
    ) -> list[Any]:
        """Returns pointers to this session's objects and to published ones that match every term exactly.

        A term is a tag, an id, or a word of the description.

        Raises:
            OptionError: a term is no string and no number. WorkerLostError.
        """
        asked = query if isinstance(query, list | tuple | set | frozenset) else [query]
        return await self.workplace.objects.search([*asked, *more])

    @bounded
    def search(self, query: str | Sequence[str], *more: str, timeout: float | None = None) -> list[Any]:
        """Blocks where `async_search` awaits."""
        return run(self.async_search(query, *more), instead="await worker.async_search(...)")

    @bounded
    @on_loop
    async def async_objects_count(self, *, timeout: float | None = None) -> int:
        """Returns how many objects the worker holds for this client."""
        return await self.workplace.objects.count()

    @bounded
    def objects_count(self, *, timeout: float | None = None) -> int:
        """Blocks where `async_objects_count` awaits."""
        return run(self.async_objects_count(), instead="await worker.async_objects_count()")

    @bounded
    @on_loop
    async def async_status(self, *, timeout: float | None = None) -> WorkerStatus:
        """Returns how the worker is: what this client's user has there in all sessions, in numbers.

        Raises:
            WorkerLostError: it is gone. RemoteError: an older planrt runs there.
        """
        if not self.versions.tells_status:
            raise RemoteError(
                f"worker {self.id!r} runs planrt {self.versions.planrt}, which does not tell its status",
                worker_id=self.id,
                kind="LocalError",
            )
        told, _ = await self.ask(m.WorkerStatus, m.AskStatus())
        return WorkerStatus.of(self.id, self.address, self.versions.planrt, told)

    @bounded
    def status(self, *, timeout: float | None = None) -> WorkerStatus:
        """Blocks where `async_status` awaits."""
        return run(self.async_status(), instead="await worker.async_status()")

    @bounded
    @on_loop
    async def async_clear_objects(self, *, timeout: float | None = None) -> Self:
        """Removes every object that this client has there, published ones too; returns the worker."""
        await self.workplace.objects.clear()
        return self

    @bounded
    def clear_objects(self, *, timeout: float | None = None) -> Self:
        """Blocks where `async_clear_objects` awaits."""
        return run(self.async_clear_objects(), instead="await worker.async_clear_objects()")

    @bounded
    @on_loop
    async def async_list_objects(self, *, timeout: float | None = None) -> dict[int, Any]:
        """Returns what the worker holds for this client, by id, without values.

        Tensors, plans and protocols are pointers, which keep nothing there; a `HeldPointer` is what points to another
        worker, and None what an op should have made that failed.
        """
        return await self.workplace.contents.listing()

    @bounded
    @on_loop
    async def async_fetch_plan(
        self, plan_id: int, location: BaseWorker, copy: bool = False, *, timeout: float | None = None
    ) -> Plan:
        """Returns the plan that worker `location` holds under that id, which stays there.

        What comes is a plan of its own either way, as ``copy=True`` says; `PointerPlan.get` takes a plan back instead.

        Raises:
            UnknownObjectError: this client has nothing there under that id. GetNotPermittedError: its state is private.
            OptionError: `location` is no worker, or what is there is no plan.
        """
        number = as_whole(plan_id, "a plan's id")
        if not isinstance(location, BaseWorker):
            raise OptionError(
                f"fetch_plan takes the worker that holds the plan, not {type(location).__name__}: write "
                "fetch_plan(pointer.id_at_location, pointer.location)"
            )
        return await location.workplace.plans.copied(number)

    @bounded
    def fetch_plan(
        self, plan_id: int, location: BaseWorker, copy: bool = False, *, timeout: float | None = None
    ) -> Plan:
        """Blocks where `async_fetch_plan` awaits: ``plan.owner.fetch_plan(id, bob)``."""
        fetching = self.async_fetch_plan(plan_id, location, copy)
        return run(fetching, instead="await worker.async_fetch_plan(plan_id, location)")

    # -------------------------------------------------------------------------------------- asking

    @bounded
    @on_loop
    async def ask(
        self,
        kind: type[B],
        body: m.Body,
        tensors: Sequence[torch.Tensor] = (),
        *,
        plan: Graph | None = None,
        allocate: Allocate[m.Envelope] = in_memory,
        timeout: float | None = None,
    ) -> tuple[B, list[torch.Tensor]]:
        """Sends one message of `planrt.workers.wire.messages` and returns its answer; to be awaited on any loop::

            counted, _ = await worker.ask(m.Counted, m.CountObjects())

        Args:
            kind: what it is answered by, as the docstring of the message says.
            tensors: those that travel along. They must not change before this returns.
            plan: the plan that `body` runs there, and names by its hash: see `RemoteWorkplace.put_plan`. If the worker
                has lost it, it is sent again.
            allocate: where the tensors of the answer to a request with a `plan` go.

        Returns:
            The answer, of `kind`, and its tensors.

        Raises:
            RemoteError: the worker could not do it; says where in the model's code, if an op of `plan` failed.
            WireError: the answer is of another kind. WorkerLostError: the worker is gone.
            OptionError, LocalError, MessageTooLargeError: the message cannot be sent, and was not.
        """
        if not (isinstance(kind, type) and issubclass(kind, m.Message)) or not isinstance(body, m.Message):
            raise OptionError(
                f"ask takes a kind of answer and a message, not {shown(repr(kind), 80)} and {type(body).__name__}: "
                "write ask(m.Counted, m.CountObjects()), of planrt.workers.wire.messages as m"
            )
        if not isinstance(tensors, list | tuple) or not all(isinstance(one, torch.Tensor) for one in tensors):
            raise OptionError(f"tensors= is a list of tensors, not {type(tensors).__name__}: write [tensor]")
        if plan is None:
            return await self.workplace.ask(kind, body, tensors)
        return await self.workplace.ask_about_plan(kind, body, tensors, plan, allocate)

    @overload
    async def async_run(self, plan: Plan[P, R], *args: P.args, **kwargs: P.kwargs) -> R: ...

    @overload
    async def async_run(
        self, plan: Plan[..., R], *args: Any, seed: int, timeout: float | None = None, **kwargs: Any
    ) -> R: ...

    @overload
    async def async_run(
        self, plan: Graph, *args: Any, seed: int = 0, timeout: float | None = None, **kwargs: Any
    ) -> Any: ...

    @bounded  # type: ignore[misc]
    async def async_run(  # `seed` is never one of a plan's own arguments
        self, plan: Plan | Graph, *args: Any, seed: int = 0, timeout: float | None = None, **kwargs: Any
    ) -> Any:
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
        await self.workplace.put_plan(plan)
        body = m.RunPlan(plan.hash, seed)
        answer, tensors = await self.ask(m.Values, body, [*inputs, *state], plan=plan)
        wanted = sum(1 for _ in refs_in(plan.outputs))
        if len(answer.numbers) != wanted or answer.numbers.count(None) != len(tensors):
            raise WireError(
                f"worker {self.id!r} returned {len(answer.numbers)} values of {wanted}", address=self.address
            )
        rest = iter(tensors)
        values = iter([next(rest) if number is None else number for number in answer.numbers])
        return map_leaves(plan.outputs, lambda leaf: next(values) if isinstance(leaf, Ref) else leaf)

    @overload
    def run(self, plan: Plan[P, R], *args: P.args, **kwargs: P.kwargs) -> R: ...

    @overload
    def run(
        self, plan: Plan[..., R], *args: Any, seed: int, timeout: float | None = None, **kwargs: Any
    ) -> R: ...

    @overload
    def run(
        self, plan: Graph, *args: Any, seed: int = 0, timeout: float | None = None, **kwargs: Any
    ) -> Any: ...

    @bounded  # type: ignore[misc]
    def run(  # `seed` is never one of a plan's own arguments
        self, plan: Plan | Graph, *args: Any, seed: int = 0, timeout: float | None = None, **kwargs: Any
    ) -> Any:
        """Blocks where `async_run` awaits."""
        return run(self.async_run(plan, *args, seed=seed, **kwargs), instead="await worker.async_run(...)")

    @overload
    async def async_fit(
        self,
        dataset_key: str,
        device: str | torch.device | None = None,
        return_ids: None = None,
        *,
        seed: int = 0,
        timeout: float | None = None,
    ) -> FitResult: ...

    @overload
    async def async_fit(
        self,
        dataset_key: str,
        device: str | torch.device | None = None,
        *,
        return_ids: Sequence[int],
        seed: int = 0,
        timeout: float | None = None,
    ) -> torch.Tensor: ...

    @bounded
    @on_loop
    async def async_fit(
        self,
        dataset_key: str,
        device: str | torch.device | None = None,
        return_ids: Sequence[int] | None = None,
        *,
        seed: int = 0,
        timeout: float | None = None,
    ) -> FitResult | torch.Tensor:
        """Trains what ``TrainConfig.send(worker)`` left here, on the worker's data set `dataset_key`.

        It goes on from where the last fit ended; ``config.model_ptr.get().obj`` is the trained model. `seed` decides
        the order of samples and every random op, together with how many fits there were. `device` is taken as scripts
        of the 0.2 era give it: a worker computes on the device that its owner chose.

        Returns:
            A `FitResult`; or with `return_ids`, as 0.2 did, the loss as a tensor: the mean over the samples.

        Raises:
            LocalError: no TrainConfig was sent. UnknownDatasetError, RemoteError, WorkerLostError.
        """
        check_device(device)
        result = await self._job("fit").fit_on(self, dataset_key, seed=_seed(seed))
        return result if return_ids is None else torch.tensor(result.loss)

    @overload
    def fit(
        self,
        dataset_key: str,
        device: str | torch.device | None = None,
        return_ids: None = None,
        *,
        seed: int = 0,
        timeout: float | None = None,
    ) -> FitResult: ...

    @overload
    def fit(
        self,
        dataset_key: str,
        device: str | torch.device | None = None,
        *,
        return_ids: Sequence[int],
        seed: int = 0,
        timeout: float | None = None,
    ) -> torch.Tensor: ...

    @bounded
    def fit(
        self,
        dataset_key: str,
        device: str | torch.device | None = None,
        return_ids: Sequence[int] | None = None,
        *,
        seed: int = 0,
        timeout: float | None = None,
    ) -> FitResult | torch.Tensor:
        """Blocks where `async_fit` awaits."""
        fitting: Coroutine[Any, Any, FitResult | torch.Tensor]
        fitting = self.async_fit(dataset_key, device, return_ids, seed=seed)  # type: ignore[arg-type]
        return run(fitting, instead="await worker.async_fit(...)")

    @bounded
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
        timeout: float | None = None,
    ) -> EvaluationResult:
        """Evaluates what ``TrainConfig.send(worker)`` left here, as it is now, on the data set `dataset_key`.

        `nr_bins` classes are counted for `return_histograms`; `bins` says both at once. Right answers are counted where
        there are classes. `device` as of `async_fit`.

        Returns:
            An `EvaluationResult`, which is also a mapping with the keys of the 0.2 era.

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

    @bounded
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
        timeout: float | None = None,
    ) -> EvaluationResult:
        """Blocks where `async_evaluate` awaits."""
        evaluating = self.async_evaluate(
            dataset_key, return_histograms, nr_bins, return_loss, return_raw_accuracy, device, bins=bins
        )
        return run(evaluating, instead="await worker.async_evaluate(...)")

    @on_loop
    async def async_close(self) -> None:
        """Closes the connection. The worker keeps what it holds for this client for some time, for ``connect()``;
        leaving a ``with`` block frees it at once.
        """
        await self._close()

    def close(self) -> None:
        """Blocks where `async_close` awaits."""
        run(self.async_close(), instead="await worker.async_close()")

    def _reconnected(self, connection: Connection) -> None:
        """There is a connection again: the one before, with its session, or another one."""
        if connection is not self._connection:
            self._take_up(connection)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        run(self._leave(), instead="await worker.async_close()")

    @on_loop
    async def _leave(self) -> None:
        """Closes the connection for good: the worker frees at once what it held for it."""
        await self._close(forget=True)

    async def _close(self, *, forget: bool = False) -> None:
        await self._connection.close(forget=forget)

    def _job(self, verb: str) -> TrainJob:
        if self.train_job is None:
            raise OptionError(
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


def _filed_under(plan: Plan | Graph | str) -> str:
    """The hash of what an owner decides about.

    Raises:
        OptionError: it is no plan and no hash, or a graph with constants whose values are not known.
    """
    if isinstance(plan, str):
        if not re.fullmatch("[0-9a-f]{64}", plan):
            raise OptionError(f"{plan[:80]!r} is not a plan's hash: give the plan, or 64 hex digits")
        return plan
    if isinstance(plan, Plan):
        graph, state = plan.graph, tuple(plan.state_tensors())
    elif isinstance(plan, Graph):
        graph, state = plan, plan.state_values or ()
    else:
        raise OptionError(f"approval is of a plan or its hash, not of {type(plan).__name__}")
    if not has_constants(graph):
        return graph.hash
    if not state:
        raise OptionError(
            f"an approval of plan {graph.name!r} is of its constants too, and this graph came without their values: "
            "give the hash that the worker named when it refused"
        )
    return approval_hash(graph, constants_of(graph, state))


def worker_id(hook: object, id: object, write: str) -> str:
    """Returns the id of a worker that is made with these arguments, the first of which may be a hook or the id itself.

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
    """Returns the decisions in a folder, or as they are given."""
    return Approvals(approvals) if isinstance(approvals, str | Path) else approvals


def close_all(workers: Sequence[BaseWorker]) -> None:
    """Closes the connections of all `workers` for good; they free what they held."""

    async def close() -> None:
        await asyncio.gather(*(worker._leave() for worker in workers))

    run(close(), instead="await worker.async_close() for each")

"""`WebsocketServerWorker`: the process that holds the data and runs what clients send, behind a websocket."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from planrt.allocator import CLEARING, clear_new_memory, keep_freed_memory
from planrt.errors import DeviceLostError, IsolationError, OptionError
from planrt.logs import get_logger
from planrt.loop import background_loop, new_event_loop
from planrt.plans import training
from planrt.plans.policy.approvals import Approvals
from planrt.plans.policy.quotas import Quota
from planrt.plans.policy.rules import Policy
from planrt.serde.frames import Limits
from planrt.stopping import signal_came
from planrt.types import as_text, as_whole
from planrt.workers.base import decisions_in, worker_id
from planrt.workers.machine.access import Access
from planrt.workers.machine.events import UsersChanged
from planrt.workers.machine.state import WorkerState
from planrt.workers.pointers.tensor import pointer_id
from planrt.workers.serving.audit_file import AuditFile
from planrt.workers.serving.audit_parts import SIZE as AUDIT_SIZE
from planrt.workers.serving.compute import ComputeThread
from planrt.workers.serving.credentials import Credentials, Known
from planrt.workers.serving.dialling import Dialling
from planrt.workers.serving.host import WorkerHost
from planrt.workers.serving.isolation.options import KERNEL_TIMEOUT, Isolating
from planrt.workers.serving.joint_folder import JointFolder
from planrt.workers.serving.metrics_end import serving
from planrt.workers.serving.metrics_options import MetricsOptions
from planrt.workers.serving.sum_keys import identity_of
from planrt.workers.serving.users_file import WatchedUsers
from planrt.workers.transport import addresses
from planrt.workers.transport.addresses import ListenOptions
from planrt.workers.transport.callers import Callers
from planrt.workers.transport.places import take_files
from planrt.workers.transport.tls import ServerTls
from planrt.workers.wire.messages import DatasetInfo
from planrt.workers.wire.objects import check_travels

if TYPE_CHECKING:
    from planrt.workers.serving.isolation.supervisor import Isolation

log = get_logger("planrt.worker")

USERS_SECONDS = 1.0
"""Seconds from one look at the file of users to the next."""

Ready = Callable[[int], None]
"""Called with the port once the worker listens."""


class WebsocketServerWorker:
    """A worker served over websockets: ``WebsocketServerWorker("alice", port=8777)``, or as in PySyft 0.2
    ``WebsocketServerWorker(hook, "127.0.0.1", 8777, id="alice")``.

    `port` 0 takes a free port. `threads` is the number of torch threads: None for as many as torch takes by
    itself (all cores). Give workers that share a machine ``cores // workers`` each, at least 1, or they fight
    over the cores. Results are bit-identical only between workers with the same number of threads. `deterministic`
    says whether only torch's deterministic kernels run; None: on everything but a CPU.

    `users` maps user names to the tokens that prove them: private data names the users who may see it. As the path of a
    file (`planrt users add` writes one) it is looked at while the worker runs: who is taken out loses the sessions that
    are open, and a file that is broken leaves the users as they were. With
    `require_user` nobody gets in who is none of them. `policy` is what the owner allows, and `approvals` the folder of
    the owner's decisions about plans. `access` says which user may do what with which data
    (`planrt.workers.machine.access`). `audit` is a file where the owner's log of what clients do is kept
    (`planrt.workers.serving.audit_file`); with more than `audit_size` bytes the next one is begun. `joint_runs` is a
    folder where it keeps its part of joint runs (docs/vertical.md), to go on after a break. `data` are tensors that it
    holds from the start, with tags and descriptions.

    `cert_path` and `key_path` are files in PEM, the certificate and its private key: with them the worker is reached at
    ``wss://``, and no longer at ``ws://``. With `client_ca`, a file of authorities, only who shows a certificate of one
    of them gets in, as the user that this names; `deny` is a file of the SHA-256 fingerprints of those that do not. A
    worker that other machines reach needs a certificate, and users or a `client_ca`, unless it is to be `insecure`.

    `sum_key` is a file with the key by which it signs its part in secure aggregations, and `sum_peers` a file of the
    workers that it adds up with and their keys, or name -> 64 hex digits; `planrt sum-keys` makes them. With peers it
    takes part only where all sign (docs/secure_aggregation.md).

    For its clients the worker dials others: those of this machine, or those of `peers` (``["10.0.0.5:8777"]``). To them
    it shows its own certificate, or proves `peer_token` (a `Path`: the token in that file); theirs are of an authority
    in the file `peer_ca`.

    `max_session_memory` (bytes) and `max_session_objects` bound what the sessions of one user may keep
    (`planrt.plans.policy.quotas` says what counts), `max_worker_memory` and `max_worker_objects` what all
    users may keep together; a policy has such limits of its own, and the stricter counts.

    Web pages may not connect, unless `origins` names them (``https://dashboard.example``); `hosts` are names by which
    the worker may be addressed, besides IP addresses and those of this machine.

    With a `metrics_port` it serves ``/health`` and ``/metrics`` over HTTP there, on `metrics_host` (this machine only,
    unless `metrics_insecure`): see `planrt.workers.serving.metrics_end`.

    `uri` says where it listens in place of `host` and `port`, over any transport that this process knows
    (`planrt.workers.transport.addresses`).

    With `isolation` the work of each user, and of each session of nobody's, runs in a process of its own that can do
    nothing but compute: an op that crashes, or runs for more than `kernel_timeout` seconds, ends that process and the
    sessions in it, and no others. A process may take `process_memory` bytes beside what all share. Data sets that read
    files while they are served need these, or their folders, in `readable`. It is for Linux, for the CPU, and for
    `start`. It is off unless it is asked for, since a process can be copied only before it has threads (`planrt serve`
    has it by default, with users or a policy). `start` reads keys, users and tokens only once these processes can no
    longer have them, as long as they are given as files; docs/isolation.md says what clients cannot do then.

    `log_msgs` and `verbose` are taken as the tutorials give them, without effect: planrt logs to the logger "planrt".
    """

    def __init__(
        self,
        hook: object = None,
        host: str = "127.0.0.1",
        port: int = 0,
        id: str | None = None,
        log_msgs: bool = False,
        verbose: bool = False,
        data: Sequence[torch.Tensor] = (),
        loop: None = None,
        cert_path: str | Path | None = None,
        key_path: str | Path | None = None,
        *,
        threads: int | None = None,
        device: str = "cpu",
        deterministic: bool | None = None,
        limits: Limits | None = None,
        users: Mapping[str, str] | str | Path | None = None,
        require_user: bool = False,
        client_ca: str | Path | None = None,
        deny: str | Path | None = None,
        insecure: bool = False,
        peers: Sequence[str] | None = None,
        peer_ca: str | Path | None = None,
        peer_token: str | Path = "",
        policy: Policy | None = None,
        approvals: Approvals | str | Path | None = None,
        access: Access | Mapping[str, Any] | str | Path | None = None,
        audit: str | Path | None = None,
        audit_size: int = AUDIT_SIZE,
        joint_runs: str | Path | None = None,
        sum_key: str | Path | None = None,
        sum_peers: str | Path | Mapping[str, str] | None = None,
        origins: Sequence[str] = (),
        hosts: Sequence[str] = (),
        uri: str | None = None,
        max_session_memory: int | None = None,
        max_session_objects: int | None = None,
        max_worker_memory: int | None = None,
        max_worker_objects: int | None = None,
        metrics_port: int | None = None,
        metrics_host: str | None = None,
        metrics_insecure: bool = False,
        isolation: bool = False,
        kernel_timeout: float = KERNEL_TIMEOUT,
        process_memory: int | None = None,
        readable: Sequence[str | Path] = (),
    ) -> None:
        id = worker_id(hook, id, 'WebsocketServerWorker(hook, host, port, id="alice")')
        if loop is not None:
            raise OptionError(
                "loop= is not taken: start() has a loop of its own, and `await serve()` runs on yours"
            )
        host, port = as_text(host, "host"), as_whole(port, "port")
        scheme = "ws" if cert_path is None else "wss"
        if uri is not None:
            addresses.transport_of(uri)  # refuses one that means none
            host, port = _host_and_port(uri)
        if not 0 <= port <= 65_535:
            raise OptionError(f"a port is a number from 0 (any free one) to 65535, not {port}")
        if threads is not None and threads < 1:
            raise OptionError(f"a worker needs at least 1 thread, not {threads}")
        self.id = id
        self.host = host
        self.port = port
        self.address = uri or f"{scheme}://{host}:{port}"
        """Where it listens, or will; with the port that it got once it does."""
        self._isolates = Isolating.checked(isolation, kernel_timeout, process_memory, readable)
        if self._isolates is not None and sum_key is not None:
            raise OptionError(
                "with isolation the processes for clients' work would have the key to sign with: leave out sum_key "
                "(--sum-key), or isolation"
            )
        self._credentials = Credentials(
            users,
            require_user,
            cert_path,
            key_path,
            client_ca,
            deny,
            peer_token,
            host if uri is None or host else None,  # some transports have no hosts
            addresses.transport_of(self.address).encrypted,
            insecure,
        )
        self._tls: ServerTls | None = None
        self._watched: WatchedUsers | None = None
        known = None
        if self._isolates is None:
            known = self._credentials.read()
        else:
            self._credentials.check()
        self._callers = Callers(host, origins=origins, hosts=hosts, tls=cert_path is not None)
        self._dialling = Dialling(peers, ca=peer_ca, cert=cert_path, key=key_path, token=peer_token)
        self._metrics = MetricsOptions(metrics_port, metrics_host, metrics_insecure, hosts)
        self.metrics_address = ""
        """Where it serves its metrics, while it does: ``http://host:port``."""
        self._threads = threads
        self._limits = limits or Limits()
        self._guarded = bool(users) or policy is not None
        self._audit = None if audit is None else AuditFile(audit, id, audit_size)
        approvals_of_owner = decisions_in(approvals)
        self._joint_runs = None if joint_runs is None else JointFolder(joint_runs, id)
        self._state = WorkerState(
            id,
            device=device,
            knows_users=bool(users) or require_user,
            require_user=require_user,
            policy=policy,
            approvals=approvals_of_owner,
            limits=limits,
            deterministic=deterministic,
            reaches=addresses.reaches,
            access=Access.of(access),
            audit=self._audit,
            quota=Quota(max_session_memory, max_session_objects, max_worker_memory, max_worker_objects),
            joint_runs=self._joint_runs,
            certificates=client_ca is not None,
            dials=self._dialling.dials,
            signs_sums=identity_of(id, sum_key, sum_peers),
        )
        for tensor in data:
            check_travels(tensor)
            self._state.add_tensor(pointer_id(tensor), tensor)
        if known is not None:
            self._take(known)
        if self._isolates is not None and self._state.device.type != "cpu":
            raise OptionError(
                "isolation is for workers that compute on the CPU: processes cannot share a GPU's memory"
            )
        self._approvals = approvals_of_owner
        self._isolation: Isolation | None = None
        self._alone = False
        """Whether this process is there for the worker."""
        self.computing = False
        """Whether a computation was still running when `serve` ended; it cannot be interrupted."""

    def _take(self, known: Known) -> None:
        """Knows what its owner has told it now."""
        self._tls, self._watched, self._dialling.token = known.tls, known.watched, known.token
        self._state.handle(UsersChanged(known.users))

    def add_dataset(self, dataset: Any, key: str, *, tags: Sequence[str] = (), description: str = "") -> None:
        """Serves a map-style data set of (data, target) pairs under `key`, found by `tags` as well.

        Raises:
            DataError: its items are no pairs of tensors or numbers. OptionError: the key is taken.
        """
        self._check_not_copied()
        self._state.add_dataset(dataset, key, tags=tags, description=description)

    def remove_dataset(self, key: str) -> None:
        """Serves the data set `key` no longer; clients that are connected are told when they ask for it.

        Raises:
            OptionError: there is none under that key.
        """
        self._check_not_copied()
        self._state.remove_dataset(key)

    def _check_not_copied(self) -> None:
        if self._isolation is not None:
            raise OptionError("with isolation data sets are added before the worker starts")

    @property
    def datasets(self) -> Mapping[str, DatasetInfo]:
        """key -> what clients are told about the data set."""
        return self._state.datasets

    async def serve(self, *, ready: Ready | None = None, stop: asyncio.Event | None = None) -> None:
        """Serves clients until `stop` is set, or for ever.

        Raises:
            OptionError: with isolation, which takes `start`.
            ConnectError: a port is taken, or the host is not this machine's.
            DeviceLostError: its GPU computes no more. Whoever starts workers can start this one again.
        """
        if self._isolates is not None and self._isolation is None:
            raise OptionError(
                "isolation needs a process that is there for the worker, and has no threads yet: call start() in a "
                "process of its own, or run planrt serve --isolation on"
            )
        compute = ComputeThread(f"planrt-{self.id}", threads=self._threads)
        host = WorkerHost(
            self._state,
            compute,
            limits=self._limits,
            dialling=self._dialling,
            audit=self._audit,
            isolation=self._isolation,
        )
        host.watched.certificate_until = None if self._tls is None else self._tls.until
        ends = [stop or asyncio.Event(), host.device_lost]
        watching = None
        if self._watched is not None:
            watching = asyncio.create_task(self._watch(self._watched, host))
        try:
            if self._isolation is not None:
                await self._isolation.start()
                ends.append(self._isolation.failed)
            options = ListenOptions(self._limits, self._tls, self._callers)
            async with (
                addresses.listen(self.address, host.serve, options) as self.address,
                serving(self._metrics, host.watched) as self.metrics_address,
            ):
                self.port = _host_and_port(self.address)[1]
                # While nobody computes yet, and beside the compute thread: a handshake would have to wait there for
                # imports that take many seconds on a busy machine.
                if self._isolation is None:
                    name = f"planrt-{self.id}-warm-up"
                    threading.Thread(target=self._warm_up, name=name, daemon=True).start()
                if ready is not None:
                    ready(self.port)
                waits = [asyncio.create_task(one.wait()) for one in ends]
                try:
                    await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    for end in waits:
                        end.cancel()
                    if self._isolation is not None:
                        await self._isolation.stop()
                host.stop()
                if self._isolation is not None and self._isolation.failed.is_set():
                    raise IsolationError(
                        f"the process that makes others is gone: start worker {self.id!r} again"
                    )
                if host.device_lost.is_set():
                    raise DeviceLostError(
                        f"device {self._state.device} has failed, and computes no more in this process: start "
                        f"worker {self.id!r} again"
                    )
        finally:
            if watching is not None:
                watching.cancel()
            if self._isolation is not None:
                await self._isolation.stop()
            compute.close()
            self.computing = compute.busy

    async def _watch(self, watched: WatchedUsers, host: WorkerHost) -> None:
        """Lets the users be those that their file has, from at most `USERS_SECONDS` after it was changed."""
        while True:
            await asyncio.sleep(USERS_SECONDS)
            try:
                users = await asyncio.to_thread(watched.changed)
                if users is not None:
                    await host.change_users(users)
                    if self._isolation is not None:
                        self._isolation.end_revoked()
                    log.warning("users_changed", worker=self.id, users=len(users))
            except OptionError as error:
                log.error("users_not_read", worker=self.id, error=str(error), instead="the users before")

    def _warm_up(self) -> None:
        training.warm_up()
        if self._alone:
            # What is imported by now stays. Python looks for garbage in cycles, as connections leave it, when there is
            # a quarter of all objects of it: of these 350,000 that would be 40 MB, and each look would take 0.2 s.
            gc.collect()
            gc.freeze()
            gc.set_threshold(700, 10, 2)

    def start(self, *, ready: Ready | None = None) -> None:
        """Serves clients until SIGINT or SIGTERM; blocks. For the main thread of a process of its own.

        A process that was started with SIGINT ignored, as jobs in the background of a shell script are, goes on
        ignoring it.

        The process keeps some of the memory that it frees, and clears it where there are users, a policy or private
        data: see `planrt.allocator`.
        """
        if self._isolates is not None:
            self._isolates.check_process()
        keep_freed_memory()
        take_files()
        self._alone = True
        if self._guarded:
            _clear()
        else:
            self._state.store.when_private = _clear

        if self._isolates is not None:
            self._isolation = self._isolates.begin(
                self._state,
                self._limits,
                self._dialling,
                self._threads,
                self._audit,
                self._approvals,
                self._joint_runs,
                counted=self._metrics.port is not None,
            )
            try:
                self._take(self._credentials.read())  # which no copy of this process has from here on
            except BaseException:
                self._isolation.abandon()
                raise
            self._state.hand_on_sessions()

        async def until_signal() -> None:
            stop = asyncio.Event()
            loop = asyncio.get_running_loop()

            def end(number: int) -> None:
                stop.set()
                signal_came(number)

            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) == signal.SIG_IGN:
                    continue
                with contextlib.suppress(NotImplementedError):  # Windows has no signal handlers on loops
                    loop.add_signal_handler(number, end, number)
            await self.serve(ready=ready, stop=stop)

        with asyncio.Runner(loop_factory=new_event_loop) as runner:
            runner.run(until_signal())

    @contextlib.contextmanager
    def running(self) -> Iterator[str]:
        """Serves on planrt's background loop for the block; yields the address. For tests and notebooks."""
        stop = asyncio.Event()
        listening = threading.Event()
        loop = background_loop()
        serving = asyncio.run_coroutine_threadsafe(
            self.serve(ready=lambda port: listening.set(), stop=stop), loop
        )
        serving.add_done_callback(lambda done: listening.set())
        listening.wait()
        try:
            if serving.done():
                serving.result()  # raises why it does not listen
            yield self.address
        finally:
            # Not so where a block that nobody left is taken apart at the process's end: the server is gone then.
            if loop.is_running():
                loop.call_soon_threadsafe(stop.set)
                serving.result()


def _host_and_port(address: str) -> tuple[str, int]:
    """The host and the port in an address, ``""`` and 0 where it has none."""
    host, _, port = address.partition("://")[2].rpartition(":")
    return (host.removeprefix("[").removesuffix("]"), int(port)) if port.isdecimal() else ("", 0)


def _clear() -> None:
    if not clear_new_memory():
        log.warning("small_memory_is_not_cleared", instead=f"start it with GLIBC_TUNABLES={CLEARING}")

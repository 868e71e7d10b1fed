"""Sharing between workers: a session whose parties are workers, and that runs every program by one message to each.

The parts of a secret are objects of the parties, under one id at all of them. Nothing of a secret comes here but by
`open`, which fetches the parts of all parties and adds them up.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import math
import secrets
import threading
import weakref
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch

from planrt.deadlines import SLOWEST, waiting
from planrt.errors import (
    OptionError,
    PlanrtError,
    RandomnessError,
    RemoteError,
    SharingError,
    TransportError,
    ValueRangeError,
    WorkerTimeoutError,
)
from planrt.loop import on_loop, refuse_to_block, run
from planrt.plans.ir.graph import Graph
from planrt.plans.ir.record import PlanRecord
from planrt.sharing.additive import reconstruct
from planrt.sharing.fixed_point import DEFAULT_SCALE
from planrt.sharing.programs.calls import Program
from planrt.sharing.programs.preflight import Preflight
from planrt.sharing.randomness import Stream, new_seed
from planrt.sharing.tensors.batches import BatchedSession, Number, Operand, Value
from planrt.sharing.tensors.refusals import check_shared_size
from planrt.sharing.tensors.sessions import Secret, SharingSession
from planrt.sharing.tensors.shared import SharedTensor, home_of
from planrt.types import Ref
from planrt.workers.client.tickets import among, forget_all, is_over, let_all
from planrt.workers.client.workplace import ReachedWorker, RemoteWorkplace
from planrt.workers.pointers.handle import Handle, alive
from planrt.workers.pointers.tensor import PointerTensor
from planrt.workers.shares.plans import SharedPlans, check_shared
from planrt.workers.wire import messages as m
from planrt.workers.wire.objects import new_id
from planrt.workers.wire.posted import PROGRAM, PostedOp
from planrt.workers.wire.shared_programs import SentPrograms

T = TypeVar("T")

DEFAULT_TIMEOUT = 60.0
"""Seconds that a party waits for another one."""
_GRACE = 2.0
"""Seconds that each has to show that it is there, once somebody has not answered in time."""
_AT_ONCE = 512
"""Calls that wait at most before they are sent."""
_GROUP_FAILED = "GroupFailedError"

_posting = threading.Lock()
"""Held while a program is posted: every party is to have the programs of all groups in one order, or two that wait for
each other's would wait for ever.
"""


class WorkersSession(BatchedSession):
    """Workers who compute on shares together, with a dealer. Made by `sharing_session`; ends with its last share."""

    def __init__(
        self,
        workers: Sequence[ReachedWorker],
        dealer: ReachedWorker,
        *,
        scale: int = DEFAULT_SCALE,
        timeout: float = DEFAULT_TIMEOUT,
    ) -> None:
        super().__init__(at_once=_AT_ONCE)
        self.scale = scale
        self.timeout = timeout
        self.group = secrets.token_hex(8)
        self._workers, self._dealer = list(workers), dealer
        self._places: list[RemoteWorkplace] = [_place(one) for one in workers]
        self._dealing = _place(dealer)
        self._plans = SharedPlans(self)
        self._programs = SentPrograms()
        self.broken = False
        """Whether the parties have said that they cannot go on."""
        run(self._make(), instead="a thread of its own: sharing between workers blocks when it begins")
        weakref.finalize(self, _end, [*self._places, self._dealing], self.group)

    async def _make(self) -> None:
        """Makes the group, waiting as long as a party waits for another one.

        Raises:
            SharingError: who has not answered by then is named.
        """
        await self._in_time(self._make_in_time, self.timeout)

    async def _in_time(
        self, ask: Callable[[], Coroutine[Any, Any, None]], seconds: float, holder: Handle | None = None
    ) -> None:
        """Awaits what parties, dealer and the `holder` of a value do, for `seconds` at most.

        Raises:
            SharingError: who has not answered by then is named.
        """
        try:
            with waiting(seconds):
                await ask()
        except WorkerTimeoutError as error:
            silent = await self._silent(holder) if error.seconds == seconds else []
            whose = " and ".join(silent) or f"worker {error.worker_id!r}"
            raise SharingError(f"{whose} did not answer within {error.seconds:.3g} s") from error

    async def _silent(self, holder: Handle | None) -> list[str]:
        """Returns who does not answer at all: a dealer that waits for a party has not answered either."""
        asked: dict[Any, str] = {one: self._name(number) for number, one in enumerate(self._places)}
        asked.setdefault(self._dealing, self._dealers_name)
        if holder is not None:
            asked.setdefault(holder.place, f"worker {holder.worker.id!r}")

        async def ask(place: Any) -> object:  # a connection that has ended says so here
            return await place.ask(m.Counted, m.CountObjects())

        tasks = [asyncio.create_task(ask(one), context=contextvars.Context()) for one in asked]
        _, late = await asyncio.wait(tasks, timeout=_GRACE)
        for one in late:
            one.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        return [name for name, one in zip(asked.values(), tasks, strict=True) if one in late]

    async def _make_in_time(self) -> None:
        """Makes the group, whose parties and dealer act for this client at each other where it has a name there."""
        everybody = [*self._places, self._dealing]
        acting = [(who, there) for who, there in among(everybody) if there is not self._dealing]
        await let_all(acting, "share")
        try:
            await self._make_group()
        except RemoteError as error:
            if not is_over(error):
                raise
            forget_all(acting, "share")
            await let_all(acting, "share")
            self.group, self.broken = secrets.token_hex(8), False
            await self._make_group()

    async def _make_group(self) -> None:
        token = secrets.token_hex(16)
        parties, dealer = [_address(one) for one in self._workers], _address(self._dealer)
        versions = [one.connection.session.versions for one in self._places]
        tells_waits = all(one.tells_waits for one in versions)
        self.numbers_vary = all(one.takes_numbers for one in versions)
        try:
            await self._of_all(
                m.Done,
                [
                    m.MakeGroup(
                        self.group, token, number, parties, dealer, self.scale, self.timeout, tells_waits
                    )
                    for number in range(len(parties))
                ],
            )
            try:
                await self._dealing.ask(m.Done, m.MakeDealer(self.group, token, parties))
            except WorkerTimeoutError:
                raise
            except PlanrtError as error:
                raise self._failed(error, self._dealers_name) from error
        except BaseException:  # those who have taken it would keep it until their sessions end
            _end([*self._places, self._dealing], self.group)
            raise
        self._dealing.connection.post(m.Deal(self.group))

    @property
    def parties(self) -> Sequence[str]:
        """The ids of the workers."""
        return [one.id for one in self._workers]

    @property
    def provider(self) -> str:
        """The id of the worker that is the dealer."""
        return self._dealer.id

    @property
    def is_open(self) -> bool:
        """True while all connections last and nobody has said that it cannot go on."""
        return not self.broken and not any(one.closed for one in (*self._places, self._dealing))

    # ------------------------------------------------------------------------------- secrets come and go

    def share(self, values: torch.Tensor, scale: int) -> Value:
        """Returns `values` in fresh shares, each of which goes to its party alone; see `SharingSession.share`."""
        id, shape = new_id(), list(values.shape)
        seeds = [new_seed() for _ in self._places[:-1]]
        last = values.contiguous()
        for seed in seeds:
            last = Stream(seed).taken_from(last)
        made = Value(self, place=id)  # goes, and its parts with it, where one party is gone
        self._post_to(-1, m.PutShare(id, self.group, scale, shape), [last])
        for number, seed in enumerate(seeds):
            self._post_to(number, m.PutShare(id, self.group, scale, shape, seed))
        return made

    def share_from(self, pointer: PointerTensor) -> SharedTensor:
        """Returns what `pointer` points to in fresh shares: its worker makes them, and sends each to its party.

        Raises:
            GetNotPermittedError: the tensor is private, and not this user's to read.
            SharingError: a value does not fit the scale, there are more entries than shares have, or a party is not
                reached from there.
        """
        refuse_to_block("a thread of its own: sharing what is on a worker blocks")
        handle = alive(pointer)
        id, token = new_id(), secrets.token_hex(16)
        parties = [_address(one) for one in self._workers]
        spec = pointer._spec
        check_shared_size(spec.shape)
        fractions = spec.dtype.is_floating_point  # whole numbers are shared exactly
        scale, dtype = (self.scale, spec.dtype) if fractions else (1, torch.int64)
        body = m.ShareOut(handle.id, self.group, scale, parties, [id] * len(parties), token)
        seconds = self.timeout + math.prod(spec.shape) * len(parties) * 8 / SLOWEST
        try:
            run(
                self._in_time(lambda: self._shared_out(handle.place, body), seconds, handle),
                instead="a thread of its own",
            )
        except PlanrtError as error:
            raise self._failed(error, f"worker {handle.worker.id!r}") from error
        for number in range(len(parties)):
            self._post_to(number, m.Claim([id], token))
        return SharedTensor(
            self, Value(self, place=id), spec.shape, dtype, requires_grad=spec.requires_grad and spec.leaf
        )

    async def _shared_out(self, place: Any, body: m.ShareOut) -> None:
        """Has a worker share what it holds, in this client's name; nothing was shared where its tickets are over."""
        acting = [(place, there) for there in self._places if there is not place]
        await let_all(acting, "share")
        try:
            await place.ask(m.Done, body)
        except RemoteError as error:
            if not is_over(error):
                raise
            forget_all(acting, "share")
            await let_all(acting, "share")
            await place.ask(m.Done, body)

    def open(self, handle: Value) -> tuple[torch.Tensor, int]:
        """Returns the secret and its scale: fetches the parts of all parties; see `SharingSession.open`."""
        refuse_to_block("await tensor.async_get()")
        self.flush()
        return run(self._open(handle), instead="await tensor.async_get()")

    @on_loop
    async def open_async(self, handle: Value) -> tuple[torch.Tensor, int]:
        """`open`, to be awaited on any loop."""
        self.flush()
        return await self._open(handle)

    async def _open(self, handle: Value) -> tuple[torch.Tensor, int]:
        answers = await self._of_all(m.FetchedShare, [m.Fetch(handle.place, False)] * len(self._places))
        held = [
            (body.scale, None if len(tensors) != 1 else (list(tensors[0].shape), tensors[0].dtype))
            for body, tensors in answers
        ]
        if any(one != held[0] for one in held) or held[0][1] is None or held[0][1][1] != torch.int64:
            whose = ", ".join(f"{self._name(number)} {one}" for number, one in enumerate(held))
            raise SharingError(
                f"the parties hold parts of different secrets under one name, by scale and shape: {whose}: nothing was "
                "opened"
            )
        return reconstruct([tensors[0] for _, tensors in answers]), held[0][0]

    def _forget(self, place: Any) -> None:
        for one in self._places:
            one.connection.drop(place)

    def copied_from(self, handle: Value) -> Value | None:
        """Returns whole numbers of another session of the same parties here; see `SharingSession.copied_from`."""
        other = handle.session
        if not self.is_of(other):
            return None
        other.flush()
        with self._lock:
            self.flush()
            made: Value = self.run("clone", (Secret(handle),), {}, torch.Size(()), in_place=False)
            self.flush()  # alone: a program that only copies may take what is another session's
        return made

    @property
    def _company(self) -> list[int]:
        return [id(one) for one in (*self._places, self._dealing)]

    # ----------------------------------------------------------------------------------------- programs

    def _run_program(
        self, program: Program, operands: Sequence[Operand], results: Sequence[Value | None]
    ) -> None:
        """Posts the program: the same bytes to every party."""
        refs: list[Ref | Number] = []
        public: list[tuple[int, torch.Tensor]] = []
        for operand in operands:
            if isinstance(operand, torch.Tensor):
                public.append((new_id(), operand))
                refs.append(Ref(public[-1][0]))
            else:
                refs.append(Ref(operand.place) if isinstance(operand, Value) else operand)
        made: list[Ref | None] = []
        for value in results:
            if value is not None:
                value.place = new_id()
            made.append(None if value is None else Ref(value.place))
        with _posting:
            text = program.text
            known = self._programs.known(text)
            args = (self.group, "", tuple(refs), known) if known else (self.group, text, tuple(refs))
            op = PostedOp(PROGRAM, args, {}, tuple(made), False)
            for id, tensor in public:
                self.post_to_all(m.Put([m.PutItem(id)]), [tensor])
            self.post_op(op)
            for id, _ in public:
                self._forget(id)

    def call_plan(
        self,
        record: PlanRecord,
        inputs: Sequence[torch.Tensor],
        state: Sequence[torch.Tensor],
        *,
        training: bool,
    ) -> Any:
        """Runs a plan at the parties; see `SharingSession.call_plan`."""
        home: Any = _home_of_plan([*inputs, *state])
        found: Any = home._plans.call(record, inputs, state, training=training)
        return found

    def check_plan(
        self,
        graph: Graph,
        inputs: Sequence[torch.Tensor],
        state: Sequence[torch.Tensor],
        bounds: Mapping[str, Any],
    ) -> Preflight:
        """Returns what a plan will cost, and where values may leave the range. Nothing is sent."""
        home: Any = _home_of_plan([*inputs, *state])
        return check_shared(home, graph, inputs, state, bounds)

    def is_of(self, other: SharingSession) -> bool:
        """Returns whether `other` has the same parties and the same dealer."""
        return isinstance(other, WorkersSession) and other._company == self._company

    @contextlib.contextmanager
    def in_turn(self) -> Iterator[None]:
        """While it lasts nobody else posts; what waited has been posted before."""
        with self._lock:
            self.flush()
            with _posting:
                yield

    def post_op(self, op: PostedOp) -> None:
        """Posts an op, the same bytes to every party; `_posting` is held. The last party is told first: it has more to
        do, and the dealer waits for it.
        """
        packed = op.pack()
        for number in reversed(range(len(self._places))):
            try:
                self._places[number].connection.post_op(packed)
            except TransportError as error:
                raise self._failed(error, self._name(number)) from error

    def post_to_all(self, body: m.Body, tensors: Sequence[torch.Tensor]) -> None:
        """Posts a message to every party."""
        for number in range(len(self._places)):
            self._post_to(number, body, tensors)

    def traffic(self) -> dict[str, m.GroupTraffic]:
        """Returns how much each party has sent and received in this session: openings, and bytes of parts."""
        self.flush()
        asking = self._of_all(m.GroupTraffic, [m.ReadTraffic(self.group)] * len(self._places))
        answers = run(asking, instead="a thread of its own")
        return {worker.id: body for worker, (body, _) in zip(self._workers, answers, strict=True)}

    # ---------------------------------------------------------------------------------------- messages

    @property
    def _dealers_name(self) -> str:
        return f"the dealer, worker {self._dealer.id!r}"

    def _name(self, number: int) -> str:
        return f"party {self._workers[number].id!r}"

    def _post_to(self, number: int, body: m.Body, tensors: Sequence[torch.Tensor] = ()) -> None:
        try:
            self._places[number].connection.post(body, tensors)
        except TransportError as error:
            raise self._failed(error, self._name(number)) from error

    async def _of_all(self, kind: Any, bodies: Sequence[m.Body]) -> list[tuple[Any, list[torch.Tensor]]]:
        """Asks all parties at once; returns their answers, or raises what the first one says that cannot."""
        asked: list[Coroutine[Any, Any, Any]] = []
        for number, (place, body) in enumerate(zip(self._places, bodies, strict=True)):
            try:
                asked.append(place.ask(kind, body))
            except PlanrtError as error:
                for one in asked:
                    one.close()
                raise self._failed(error, self._name(number)) from error
        answers = await self._answers(asked)
        failed = [
            (self._failed(answer, self._name(number)), answer)
            for number, answer in enumerate(answers)
            if isinstance(answer, BaseException)
        ]
        if failed and not self.broken and kind is not m.GroupTraffic:
            await self._look_whether_broken()
        if failed:  # who says more than that the group has failed knows why
            told, cause = min(failed, key=lambda one: _follows(one[1]))
            raise told from (cause if cause is not told else None)
        return answers

    async def _answers(self, asked: Sequence[Coroutine[Any, Any, Any]]) -> list[Any]:
        """Returns the answer of each party, or what it fails with, as long as all give signs of life: a computation and
        a large part may take as long as they take.

        Raises:
            SharingError: one has given none for as long as a party waits for another one.
        """
        tasks = [asyncio.ensure_future(one) for one in asked]
        try:
            while True:
                _, late = await asyncio.wait(tasks, timeout=self.timeout / 2)
                if not late:
                    return await asyncio.gather(*tasks, return_exceptions=True)
                seconds = max(self.timeout / 2, _GRACE)
                signs = [
                    place.connection.answers(seconds)
                    for place, task in zip(self._places, tasks, strict=True)
                    if task in late
                ]
                told = iter(await asyncio.gather(*signs))
                for number, (place, task) in enumerate(zip(self._places, tasks, strict=True)):
                    if task in late and not next(told) and not task.done():
                        error = place.connection.late(m.Fetch(0, False), self.timeout)
                        raise self._failed(error, self._name(number)) from error
        finally:
            for task in tasks:
                task.cancel()

    async def _look_whether_broken(self) -> None:
        """Finds out whether the parties cannot go on after what has failed: who says why does not say that."""

        async def ask(place: RemoteWorkplace) -> object:
            return await place.ask(m.GroupTraffic, m.ReadTraffic(self.group))

        try:
            answers = await self._answers([ask(place) for place in self._places])
        except SharingError:
            return  # and `broken` says so
        for answer in answers:
            ended = isinstance(answer, RemoteError) and answer.kind in (_GROUP_FAILED, "SharingError")
            self.broken = self.broken or ended or isinstance(answer, TransportError)

    def _failed(self, error: BaseException, whose: str) -> BaseException:
        """What is raised for an error of one party's: as what it is, with the party in its words."""
        if isinstance(error, WorkerTimeoutError):
            self.broken = True
            return SharingError(f"{whose} did not answer within {error.seconds:g} s")
        if isinstance(error, TransportError):
            self.broken = True
            return SharingError(f"{whose} is gone: {error}")
        if isinstance(error, RemoteError):
            self.broken = self.broken or error.kind == _GROUP_FAILED
            kind = _KINDS.get(error.kind)
            if kind is not None:
                return kind(f"{whose}: {error.reason}")
        return error


_KINDS: dict[str, type[SharingError]] = {
    "SharingError": SharingError,
    "RandomnessError": RandomnessError,
    "ValueRangeError": ValueRangeError,
    _GROUP_FAILED: SharingError,
}
"""Kinds of failures of workers that are raised here as what they are there."""


def _follows(answer: BaseException) -> int:
    """0 for who knows why it failed, 1 for who is gone, 2 for who was told that the group has failed."""
    if isinstance(answer, RemoteError):
        return 2 if answer.kind == _GROUP_FAILED else 0
    return 1


def _home_of_plan(tensors: Sequence[torch.Tensor]) -> SharingSession:
    """The session that a plan on these arguments, some of them in shares, runs in: that of its fractions."""
    shared = [one for one in tensors if isinstance(one, SharedTensor)]
    return home_of((), shared)


def _place(worker: ReachedWorker) -> RemoteWorkplace:
    place: RemoteWorkplace = worker.workplace  # type: ignore[assignment]  # what a worker has that others may dial
    return place


def _address(worker: ReachedWorker) -> m.PeerAddress:
    return m.PeerAddress(worker.id, worker.link_address)


def _end(places: Sequence[RemoteWorkplace], group: str) -> None:
    """Nobody has a share of the group any more."""
    for place in places:
        with contextlib.suppress(PlanrtError):
            place.connection.post(m.EndGroup(group))


class _Lock:
    """Held while a session is made, so that there is one of each."""

    def __init__(self) -> None:
        self.lock = threading.Lock()


_sessions: weakref.WeakValueDictionary[Any, WorkersSession] = weakref.WeakValueDictionary()
_locks: weakref.WeakValueDictionary[Any, _Lock] = weakref.WeakValueDictionary()
_making = threading.Lock()


def sharing_session(
    workers: Sequence[ReachedWorker],
    crypto_provider: ReachedWorker,
    *,
    scale: int = DEFAULT_SCALE,
    timeout: float = DEFAULT_TIMEOUT,
) -> WorkersSession:
    """Returns the session of these parties with this dealer and scale: the one that there is, in whatever order it was
    made, or a new one in this order. `timeout` is how many seconds a party waits for another one before it gives up.

    Raises:
        SharingError: fewer than two parties, one of them twice, or the dealer among them; or one cannot be reached by
            the others. OptionError: one that is no worker.
    """
    everybody = [*workers, crypto_provider]
    for one in everybody:
        if not hasattr(one, "workplace") or not hasattr(one, "link_address"):
            raise OptionError(
                f"tensors are shared between workers, not {type(one).__name__}: write share(bob, alice)"
            )
    names = [one.id for one in workers]
    if len(names) < 2:
        raise SharingError(f"sharing takes two parties or more, not {len(names)}: write share(bob, alice)")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise SharingError(
            f"worker {twice[0]!r} is given twice: each party holds one part, so all are different"
        )
    if crypto_provider.id in names:
        raise SharingError(
            f"worker {crypto_provider.id!r} is a party and the crypto provider: whoever is both could see the secret"
        )
    places = [id(one.workplace) for one in workers]
    key = (*sorted(places), id(crypto_provider.workplace), scale, timeout)
    with _making:
        mine = _locks.setdefault(key, _Lock())
    with mine.lock:  # threads that share at once share in one session: what they make may meet
        found = _sessions.get(key)
        if found is None or not found.is_open:
            found = _sessions[key] = WorkersSession(workers, crypto_provider, scale=scale, timeout=timeout)
        return found

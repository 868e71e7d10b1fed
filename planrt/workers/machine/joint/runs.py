"""A worker as a party of joint runs: runs come and go, parcels arrive, steps run. No I/O.

A client opens a run at each party and asks all of them for one step after another (`WorkJoint`). A party's part of a
step is a generator of `planrt.sharing.columns`, which sends parcels and waits for those of others; meanwhile other
sessions go on. What belongs to a run is taken from the sessions alone that have shown its token. Whatever keeps one
party from going on ends the run: the others would wait for it.
"""

from __future__ import annotations

import hmac
import secrets
import time
from collections import deque
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

import torch

from planrt.errors import AlignmentError, ExecutionError, JointError, PlanrtError, PolicyError
from planrt.plans.ir.graph import Graph
from planrt.serde.tensors import payload_bytes
from planrt.sharing.columns import linear, packing, paillier
from planrt.sharing.columns.intersection import MAX_IDS, align, intersect
from planrt.sharing.columns.steps import Role, Send, Turn, take_one
from planrt.workers.machine.access import Access
from planrt.workers.machine.admission import failed_on_data
from planrt.workers.machine.audit import Auditor
from planrt.workers.machine.events import Alarm, Answer, PeerAnswered, Steps, TimePassed, ToPeer, Wait, Wake
from planrt.workers.machine.failures import OpFailedError, cut, failure_of, failure_on_data
from planrt.workers.machine.gate import Gate
from planrt.workers.machine.joint import terms
from planrt.workers.machine.joint.networks import SplitOwner
from planrt.workers.machine.joint.owners import AlignedTable, LinearOwner, Model, linear_terms
from planrt.workers.machine.kinds.base import StoredObject
from planrt.workers.machine.sessions import Session, ask
from planrt.workers.machine.store import ObjectStore, new_id
from planrt.workers.machine.training import TrainingOps
from planrt.workers.wire import messages as m

MAX_RUNS: Final = 100
"""Joint runs that a worker is a party of."""
MOST_WAITING: Final = 1 << 31
"""Bytes of parcels that wait to be taken."""
PREDICTIONS: Final = "#predictions"
"""The tag of what an owner keeps of predictions that are for it alone."""
_EARLY: Final = 0.01
"""Seconds that a timer may be early."""

Exchange: TypeAlias = Generator[ToPeer | Wait | Alarm | Wake, PeerAnswered | TimePassed | None, Any]


class JointFailedError(JointError):
    """A run that has ended already: whoever ended it has said why."""


@dataclass(slots=True, eq=False)
class Run:
    """One joint run at one of its parties."""

    about: m.OpenJoint
    owner: str
    """The client's session here."""
    table: AlignedTable | None
    """None for who holds the key."""
    plans: list[Graph] = field(default_factory=list)
    model: Model | None = None
    holder: linear.KeyHolder | None = None
    members: dict[str, int] = field(default_factory=dict)
    """Session of another party here -> its number."""
    boxes: dict[int, deque[tuple[str, list[torch.Tensor]]]] = field(default_factory=dict)
    """Party -> what it has sent that was not taken yet."""
    came: dict[int, int] = field(default_factory=dict)
    sent: dict[int, int] = field(default_factory=dict)
    """Party -> how many parcels came from it, and went there."""
    waiting_bytes: int = 0
    failure: str = ""
    busy: bool = False
    epochs: int = 0
    alarm: float = 0.0

    @property
    def key(self) -> str:
        """The key that its steps wait under."""
        return f"joint:{self.about.joint}"

    @property
    def me(self) -> int:
        """This party's number."""
        return self.about.number

    @property
    def others(self) -> list[m.PeerAddress]:
        """The other parties."""
        return [one for number, one in enumerate(self.about.parties) if number != self.me]

    def name_of(self, number: int) -> str:
        """Returns a party as messages call it."""
        return f"party {self.about.parties[number].worker!r}"

    def check(self) -> None:
        """Raises JointFailedError once the run has failed."""
        if self.failure:
            raise JointFailedError(self.failure)

    def fail(self, reason: str) -> None:
        """Ends the run; the first reason stays."""
        self.failure = self.failure or reason
        self.boxes.clear()
        self.model = self.holder = self.table = None

    def arrived(self, session: str, body: m.Parcel, tensors: list[torch.Tensor]) -> None:
        """Takes a parcel of another party.

        Raises:
            JointError: it comes from somebody else, out of order, or more wait than there is room for.
        """
        number = self.members.get(session)
        if number is None:
            raise JointError(f"a parcel of joint run {body.joint!r} came from none of its parties")
        if body.number != self.came.get(number, 0):
            raise JointError(f"{self.name_of(number)} sent its parcels out of order")
        self.waiting_bytes += payload_bytes(tensors)
        if self.waiting_bytes > MOST_WAITING:
            raise JointError(
                f"{self.name_of(number)} sends more than is taken: {self.waiting_bytes:,} bytes wait"
            )
        self.came[number] = body.number + 1
        self.boxes.setdefault(number, deque()).append((body.kind, tensors))


class JointOps:
    """The joint runs that one worker is a party of."""

    def __init__(
        self, training: TrainingOps, gate: Gate | None, access: Access, audit: Auditor, store: ObjectStore
    ) -> None:
        self._training = training
        self._gate = gate
        self._access = access
        self._audit = audit
        self._store = store
        self._runs: dict[str, Run] = {}

    # --------------------------------------------------------------------------------- runs begin

    def read_table(self, session: Session, body: m.ReadTable) -> Answer:
        """Answers which columns a table has."""
        table = self._training.table(session, body.dataset)
        return m.TableColumns(len(table), list(table.ids), list(table.columns), table.label or ""), ()

    def open(self, session: Session, body: m.OpenJoint) -> Answer:
        """Makes this worker a party, if its owner lets it; nobody else is told of anything yet.

        Raises:
            JointError, OptionError: it is no joint run. DataError: the table does not have what is asked for.
            NotApproved, PolicyError: the owner does not want it.
        """
        terms.check(body)
        if body.joint in self._runs:
            raise JointError(f"joint run {body.joint!r} is known here already")
        if len(self._runs) >= MAX_RUNS:
            raise JointError(f"the worker is a party of {MAX_RUNS} joint runs, its limit")
        table = self._training.table(session, body.dataset) if body.dataset else None
        if isinstance(body.model, m.LinearTerms):
            paillier.check_bits(body.model.key_bits, allow_short=body.model.allow_short_key)
            packing.layout_for(body.model.key_bits, body.model.batch_size, body.model.precision)
        hashes = (
            [body.model.bottom, body.model.bottom_evaluation, body.model.top, body.model.top_evaluation]
            if isinstance(body.model, m.SplitTerms)
            else []
        )
        plans = {hash: self._training.plan(hash) for hash in hashes if hash}
        if self._gate is not None:
            tags = self._training.tags(body.dataset) if body.dataset else ()
            text = terms.described(body, plans)
            self._gate.admit_joint(
                text, features=body.features, size_only=body.size_only, owner=bool(body.dataset), tags=tags,
                dataset=body.dataset, user=session.user, purpose=body.purpose,
            )  # fmt: skip
        aligned = None if table is None else AlignedTable(table, body)
        if len(() if aligned is None else aligned.keys) > MAX_IDS:
            raise JointError(f"a table has at most {MAX_IDS:,} rows")
        self._runs[body.joint] = Run(body, session.id, aligned, [plans[hash] for hash in hashes if hash])
        self._audit.joint(
            session,
            "open",
            data=[body.dataset] if body.dataset else [],
            to=self._others(self._runs[body.joint]),
        )
        return m.Done(), ()

    def _others(self, run: Run) -> str:
        return ", ".join(one.worker for one in run.others)

    def join(self, session: Session, body: m.JoinJoint) -> Answer:
        """Takes note of the session that another party speaks from.

        Raises:
            AlignmentError: that party was told something else by the client.
        """
        run = self._runs.get(body.joint)
        if (
            run is None
            or run.failure
            or not hmac.compare_digest(run.about.token.encode(), body.token.encode())
        ):
            raise JointError(f"there is no joint run {body.joint!r} here that this token is of")
        if (
            session.id in run.members
            or body.number in run.members.values()
            or body.number == run.me
            or body.number >= len(run.about.parties)
        ):
            raise JointError(
                f"party {body.number} of joint run {body.joint!r} is here already, or there is none"
            )
        if body.terms != terms.shared_hash(run.about):
            raise AlignmentError(
                f"{run.name_of(run.me)} and {run.name_of(body.number)} were told different things of the run: they "
                "must normalise ids alike, and agree on the model"
            )
        run.members[session.id] = body.number
        return m.Done(), ()

    # ------------------------------------------------------------------ what others send unasked

    def heard(
        self, session: Session, body: m.Parcel | m.FailJoint, tensors: list[torch.Tensor]
    ) -> tuple[list[ToPeer], list[str]]:
        """Takes what another party sends; returns what is to be sent, and the keys of what may go on."""
        run = self._runs.get(body.joint)
        if run is None or run.failure:
            return [], []
        known = session.id in run.members
        try:
            if isinstance(body, m.FailJoint):
                if not known:
                    raise JointError(f"joint run {body.joint!r} is not this session's")
                return self._fail(run, body.reason, tell=False)
            run.arrived(session.id, body, tensors)
        except PlanrtError as error:
            if not known:
                raise
            return self._fail(run, str(error))
        return [], [run.key]

    def _fail(self, run: Run, reason: str, *, tell: bool = True) -> tuple[list[ToPeer], list[str]]:
        if run.failure:
            return [], []
        run.fail(cut(reason))
        ended = m.FailJoint(run.about.joint, run.failure)
        return ([ToPeer(other, ended) for other in run.others] if tell else []), [run.key]

    def gone(self, session: Session) -> tuple[list[ToPeer], list[str]]:
        """Ends the runs of a session that is over: of another party, or of the client."""
        sends: list[ToPeer] = []
        keys: list[str] = []
        for id, run in list(self._runs.items()):
            if run.owner == session.id:
                more = self._fail(run, f"the client's session at {run.name_of(run.me)} is over")
                del self._runs[id]
            elif session.id in run.members:
                more = self._fail(run, f"{run.name_of(run.members[session.id])} is gone")
            else:
                continue
            sends += more[0]
            keys += more[1]
        return sends, keys

    def end(self, session: Session, body: m.EndJoint) -> tuple[list[ToPeer], list[str]]:
        """Frees a run that its client needs no more."""
        run = self._runs.get(body.joint)
        if run is None or run.owner != session.id:
            return [], []
        del self._runs[body.joint]
        return self._fail(run, "its client has ended it", tell=False)

    # ---------------------------------------------------------------------------------- its steps

    def work(self, session: Session, body: m.WorkJoint, tensors: Sequence[torch.Tensor]) -> Steps:
        """Does this party's part of a step.

        Raises:
            JointError: another step comes next, a party is gone, or it does not follow the protocol.
        """
        run = self._runs.get(body.joint)
        if run is None or run.owner != session.id:
            raise JointError(f"this session has no joint run {body.joint!r} here")
        run.check()
        if run.busy:
            raise JointError("a step of this run is under way here: one comes after the other")
        run.busy = True
        try:
            if body.step == "join":
                shared = terms.shared_hash(run.about)
                for other in run.others:
                    yield from ask(other, m.JoinJoint(run.about.joint, run.about.token, run.me, shared))
                return m.JointDone(), ()
            if body.step == "load":
                self._load(run, tensors)
                return m.JointDone(), ()
            if body.step == "weights":
                return self._weights(session, run)
            result = yield from self._drive(run, self._role(session, run, body))
            return self._answer(session, run, body, result)
        except Exception as failed:  # whatever it raises ends the run, never the worker
            error = self._untold(session, run, failed)
            reason = f"{run.name_of(run.me)}: {failure_of(error).message}"
            sends, keys = self._fail(run, reason)
            yield from sends
            for key in keys:
                yield Wake(key)
            if error is failed:
                raise
            raise error from failed
        finally:
            run.busy = False

    def _untold(self, session: Session, run: Run, error: Exception) -> Exception:
        """Returns `error` as the client and the other parties may hear of it.

        Errors of planrt name parties and columns. Those of torch, in ops on a table or anywhere else, can have a value
        in their text ("Target 7 is out of bounds").
        """
        if isinstance(error, PlanrtError) and not isinstance(error, ExecutionError):
            return error
        if self._gate is not None:
            failed_on_data(self._gate, session, error, joint=run.about.joint)
        return OpFailedError(failure_on_data(error))

    def _load(self, run: Run, tensors: Sequence[torch.Tensor]) -> None:
        if not isinstance(run.model, SplitOwner):
            raise JointError(
                "only a split network has a state to be loaded, once its owners' tables are aligned"
            )
        run.model.load(run.plans, tensors)

    def _weights(self, session: Session, run: Run) -> Answer:
        if run.model is None:
            raise JointError(
                f"{run.name_of(run.me)} has no weights: it holds no table, or nothing was aligned yet"
            )
        if not run.about.weights_to_client:
            raise PolicyError(
                f"the weights of {run.name_of(run.me)} stay there: the run was opened with weights_to_client=False",
                rule="joint",
            )
        state = run.model.state
        self._audit.joint(session, "weights", bytes=payload_bytes(state))
        return m.JointDone(), state

    def _role(self, session: Session, run: Run, body: m.WorkJoint) -> Role:
        table, model = run.table, run.model
        if body.step == "align":
            return self._align(run) if table is not None else self._key(session, run)
        if body.step == "epoch":
            limit = run.about.model.epochs if run.about.model is not None else 0
            if body.epoch != run.epochs or body.epoch >= limit:
                raise JointError(
                    f"epoch {body.epoch} is not the next one: {run.epochs} of at most {limit} are done"
                )
            if run.holder is not None:
                return run.holder.epoch(body.epoch)
            if model is not None:
                return model.epoch(body.epoch)
        elif table is None:
            return _nothing()
        elif model is not None:
            rows = table.evaluated() if body.step == "evaluate" else table.rows_of(body.people)
            if isinstance(model, SplitOwner):
                return model.predict(rows)
            return model.predict(rows, evaluate=body.step == "evaluate")
        raise JointError("nothing is aligned yet: the step 'align' comes first")

    def _align(self, run: Run) -> Role:
        """An owner's part of finding who is in all tables, and what follows before the first epoch."""
        table, about = run.table, run.about
        assert table is not None  # noqa: S101 - the caller has looked
        names = [one.worker for one in about.parties]
        if about.size_only:
            return (yield from intersect(table.keys, 1 - run.me, names, size_only=True))
        found = yield from align(table.keys, run.me, about.owners, names, about.seed)
        if about.model is None:
            table.places = {table.keys[row]: place for place, row in enumerate(found["rows"].tolist())}
            return {"size": found["size"]}
        table.align(found["rows"])
        if isinstance(about.model, m.SplitTerms):
            run.model = SplitOwner(about, about.model, table.values, table.labels, table.train_rows)
        else:
            run.model = LinearOwner(table, about.model)
            if run.me == 0:
                yield Send(about.owners, "people", [torch.tensor([table.train_rows])])
            yield from run.model.owner.take_key()
        return {"size": found["size"], "people": table.train_rows}

    def _key(self, session: Session, run: Run) -> Role:
        """The key holder's part of that: it learns how many people there are, and makes the key."""
        about, model = run.about, run.about.model
        assert isinstance(model, m.LinearTerms)  # noqa: S101 - or there would be none
        names = [one.worker for one in about.parties]
        people = int((yield from take_one(0, "people", torch.int64, [1], names))[0])
        if not 2 <= people <= MAX_IDS:
            raise JointError(f"party {names[0]!r} says that {people} people are in all tables")

        def told(whose: str, count: int) -> None:
            self._audit.joint(session, "decrypt", to=whose, rows=count)

        run.holder = linear.KeyHolder(linear_terms(about, model, people), list(about.columns), told)
        yield from run.holder.give_key()
        return {}

    def _answer(self, session: Session, run: Run, body: m.WorkJoint, result: dict[str, Any]) -> Answer:
        """What the client may have of a step's result."""
        told = {name: float(value) for name, value in result.items() if isinstance(value, int | float)}
        if body.step == "epoch":
            run.epochs += 1
        data = [run.about.dataset] if run.about.dataset else []
        self._audit.joint(session, body.step, data=data, to=self._others(run))
        predictions = result.get("predictions")
        if body.step == "evaluate" or predictions is None:
            return m.JointDone(told), ()
        if run.about.predictions_to == terms.CLIENT:
            return m.JointDone({}), [predictions.detach()]
        label = self._access.label([PREDICTIONS])  # nobody, unless the owner's file names somebody
        kept = StoredObject(
            predictions.detach(), "", frozenset() if label is None else label,
            tags=(PREDICTIONS, f"#{run.about.joint}"), description="predictions of a joint run",
        )  # fmt: skip
        self._store.add(new_id(), kept)
        return m.JointDone({"kept": float(len(predictions))}), ()

    def _drive(self, run: Run, role: Role) -> Exchange:
        """Runs a role: what it sends goes to other workers, and what it waits for comes from them."""
        given: list[torch.Tensor] | None = None
        while True:
            try:
                step = role.send(given)
            except StopIteration as done:
                return done.value
            given = None
            if isinstance(step, Send):
                number = run.sent.get(step.to, 0)
                run.sent[step.to] = number + 1
                yield ToPeer(
                    run.about.parties[step.to], m.Parcel(run.about.joint, number, step.kind), step.tensors
                )
            elif isinstance(step, Turn):
                key = f"turn:{secrets.token_hex(8)}"
                yield Alarm(0.0, key)
                yield Wait(key)
                run.check()
            else:
                yield from self._wait(run, step.source)
                kind, given = run.boxes[step.source].popleft()
                run.waiting_bytes -= payload_bytes(given)
                if kind != step.kind:
                    raise JointError(
                        f"{run.name_of(step.source)} sent its {kind} where its {step.kind} is due: parties run the "
                        "same protocol"
                    )

    def _wait(self, run: Run, source: int) -> Exchange:
        """Waits until there is a parcel of that party.

        Raises:
            JointError: the run has failed, or the party takes too long.
        """
        timeout = run.about.timeout
        deadline = time.monotonic() + timeout
        while True:
            run.check()
            if run.boxes.get(source):
                return
            now = time.monotonic()
            if now >= deadline:
                raise JointError(f"{run.name_of(source)} did not answer within {timeout:g} s")
            if run.alarm <= now + _EARLY:
                run.alarm = deadline
                yield Alarm(deadline - now, run.key)
            yield Wait(run.key)


def _nothing() -> Role:
    """The part of who has nothing to do in a step."""
    yield from ()
    return {}

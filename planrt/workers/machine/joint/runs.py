"""A worker as a party of joint runs: runs come and go, parcels arrive, steps run. No I/O.

A client opens a run at each party and asks all of them for one step after another (`WorkJoint`). A party's part of a
step is a generator of `planrt.sharing.columns`, which sends parcels and waits for those of others; meanwhile other
sessions go on. What belongs to a run is taken from the sessions alone that have shown its token. Whatever keeps one
party from going on ends the run: the others would wait for it.
"""

from __future__ import annotations

import hmac
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch

from planrt.errors import AlignmentError, ExecutionError, JointError, PlanrtError, PolicyError
from planrt.serde.tensors import payload_bytes
from planrt.sharing.columns import packing, paillier
from planrt.sharing.columns.intersection import MAX_IDS
from planrt.workers.machine.access import Access
from planrt.workers.machine.admission import check_failures, failed_on_data
from planrt.workers.machine.audit import Auditor
from planrt.workers.machine.events import Answer, Steps, ToPeer, Wake
from planrt.workers.machine.failures import OpFailedError, failure_of, failure_on_data
from planrt.workers.machine.gate import Gate
from planrt.workers.machine.joint import costs, terms
from planrt.workers.machine.joint.kept import Keeps, KeptRun
from planrt.workers.machine.joint.networks import SplitOwner
from planrt.workers.machine.joint.owners import AlignedTable
from planrt.workers.machine.joint.roles import keep, role_of
from planrt.workers.machine.joint.run import JointFailedError, Run, StepRefusedError, turn
from planrt.workers.machine.keeping.tickets import check_speaks
from planrt.workers.machine.kinds.base import StoredObject
from planrt.workers.machine.rounds.training import TrainingOps
from planrt.workers.machine.sessions import Session, ask
from planrt.workers.machine.store import ObjectStore, new_id
from planrt.workers.wire import messages as m

MAX_RUNS: Final = 100
"""Joint runs that a worker is a party of."""
MAX_OF_USER: Final = 20
"""Those of one user; where there are no users, of one session."""
MAX_ENDED: Final = 100
"""Runs that have failed, of which a worker still knows why."""
MAX_ENDED_OF_SESSION: Final = 10
MOST_WAITING_HERE: Final = 2 << 30
"""Bytes of parcels that wait to be taken, in all runs of a worker."""
PREDICTIONS: Final = "#predictions"
"""The tag of what an owner keeps of predictions that are for it alone."""


@dataclass(frozen=True, slots=True)
class Ended:
    """A run that has failed, as far as those who still ask for it are told."""

    owner: str
    token: str
    failure: JointFailedError


class JointOps:
    """The joint runs that one worker is a party of; those that are kept are kept in `folder`."""

    def __init__(
        self,
        training: TrainingOps,
        gate: Gate | None,
        access: Access,
        audit: Auditor,
        store: ObjectStore,
        folder: Keeps | None = None,
    ) -> None:
        self._training = training
        self._gate = gate
        self._access = access
        self._audit = audit
        self._store = store
        self.folder = folder
        """Where parts of runs are kept; None for nowhere."""
        self._runs: dict[str, Run] = {}
        self._opening: dict[str, tuple[str, str]] = {}
        """Runs that are being opened: of which session, and for whom they count."""
        self._ended: dict[str, Ended] = {}
        """Runs that have failed, oldest first."""

    @property
    def names(self) -> list[str]:
        """Its runs, as one process of the worker tells another one of them."""
        return [f"joint {id}" for id in self._runs]

    # --------------------------------------------------------------------------------- runs begin

    def read_table(self, session: Session, body: m.ReadTable) -> Answer:
        """Answers which columns a table has."""
        table = self._training.table(session, body.dataset)
        return m.TableColumns(len(table), list(table.ids), list(table.columns), table.label or ""), ()

    def open(self, session: Session, body: m.OpenJoint) -> Steps:
        """Makes this worker a party, if its owner lets it; nobody else is told of anything yet.

        Raises:
            JointError, OptionError: it is no joint run. DataError: the table does not have what is asked for.
            NotApproved, PolicyError: the owner does not want it, or a user keeps too much.
        """
        terms.check(body)
        user = session.user or session.id
        self._check_room(body.joint, user)
        table = self._training.table(session, body.dataset) if body.dataset else None
        if len(() if table is None else table) > MAX_IDS:
            raise JointError(f"a table has at most {MAX_IDS:,} rows")
        if isinstance(body.model, m.LinearTerms):
            paillier.check_bits(body.model.key_bits, allow_short=body.model.allow_short_key)
            packing.layout_for(body.model.key_bits, body.model.batch_size, body.model.precision)
        hashes = (
            [body.model.bottom, body.model.bottom_evaluation, body.model.top, body.model.top_evaluation]
            if isinstance(body.model, m.SplitTerms)
            else []
        )
        plans = {hash: self._training.plan(hash) for hash in hashes if hash}
        kept = self._kept(session, body)
        text = terms.described(body, plans)
        least = self._admit(session, body, text)
        if table is not None:
            self._store.spend(session.id, "reading a table", costs.of_opening(body, len(table)))
        self._opening[body.joint] = (session.id, user)
        try:
            aligned = None if table is None else AlignedTable(table, body)
            if aligned is not None:
                for _ in aligned.read_keys():
                    yield from turn()
            if body.joint not in self._opening:
                raise JointError("the run was ended while it was opened")
            if aligned is not None and kept is not None:
                kept.table = aligned.digest()
            freed = self._store.keep_bytes(session.id, 0 if aligned is None else aligned.nbytes)
        finally:
            self._opening.pop(body.joint, None)
        self._runs[body.joint] = Run(
            body,
            session,
            [session.reached(one, "joint") for one in body.parties],
            aligned,
            [plans[hash] for hash in hashes if hash],
            least,
            kept,
            text,
            lambda what, flops: self._store.spend(session.id, what, flops),
            freed,
        )
        data = [body.dataset] if body.dataset else []
        self._audit.joint(session, "open", data=data, to=self._others(self._runs[body.joint]))
        return m.Done(), ()

    def _check_room(self, joint: str, user: str) -> None:
        """Raises JointError if there are so many runs already that no other one is taken."""
        if joint in self._runs or joint in self._opening or joint in self._ended:
            raise JointError(f"joint run {joint!r} is known here already")
        users = [run.user for run in self._runs.values()] + [user for _, user in self._opening.values()]
        if len(users) >= MAX_RUNS:
            raise JointError(f"the worker is a party of {MAX_RUNS} joint runs, its limit")
        if users.count(user) >= MAX_OF_USER:
            raise JointError(
                f"the worker is a party of {MAX_OF_USER} joint runs of this client, its limit: close() some"
            )

    def _kept(self, session: Session, body: m.OpenJoint) -> KeptRun | None:
        """How a run is kept, if it is to be.

        Raises:
            JointError: this worker keeps none, has nothing to go on from, or has something under the name already.
        """
        if not body.keep:
            return None
        whose, user = f"party {body.parties[body.number].worker!r}", session.user or ""
        if self.folder is None:
            raise JointError(
                f"{whose} keeps no joint runs: its owner starts it with --joint-runs FOLDER (joint_runs=)"
            )
        kept = KeptRun(self.folder, user, body.keep, whose, terms.kept_hash(body), body.joint)
        epochs = self.folder.epochs(user, body.keep)
        if not body.resume:
            if epochs and epochs[0]:
                raise JointError(
                    f"{whose} has kept {body.keep!r} after {epochs[0]} epochs: go on with it (resume=True), or take "
                    "another name"
                )
            self.folder.check_room(user, body.keep)
        elif not epochs:
            raise JointError(
                f"{whose} has kept nothing under the name {body.keep!r}: begin without resume=True"
            )
        else:
            kept.origin = str(self.folder.read(user, body.keep, epochs[0]).facts.get("origin", ""))
        return kept

    def _admit(self, session: Session, body: m.OpenJoint, text: str) -> int:
        """Raises unless the owner lets the run begin; returns of how many rows all must be that leaves."""
        if self._gate is None:
            return 0
        tags = self._training.tags(body.dataset) if body.dataset else ()
        self._gate.admit_joint(
            text, features=body.features, size_only=body.size_only, owner=bool(body.dataset), tags=tags,
            dataset=body.dataset, user=session.user, purpose=body.purpose,
        )  # fmt: skip
        return self._gate.least_rows(tags) if body.dataset else 0

    def _others(self, run: Run) -> str:
        return ", ".join(one.worker for one in run.others)

    def join(self, session: Session, body: m.JoinJoint) -> Answer:
        """Takes note of the session that another party speaks from.

        Raises:
            AlignmentError: that party was told something else by the client. JointFailedError: the run has failed.
            PolicyError: whoever asks does not act for that client.
        """
        run, ended = self._runs.get(body.joint), self._ended.get(body.joint)
        token = run.about.token if run is not None else "" if ended is None else ended.token
        if not token or not hmac.compare_digest(token.encode(), body.token.encode()):
            raise JointError(f"there is no joint run {body.joint!r} here that this token is of")
        if run is None:
            assert ended is not None  # noqa: S101 - the token is of one of the two
            raise ended.failure
        if (
            session.id in run.members
            or body.number in run.members.values()
            or body.number == run.me
            or body.number >= len(run.about.parties)
        ):
            raise JointError(
                f"party {body.number} of joint run {body.joint!r} is here already, or there is none"
            )
        check_speaks(session, run.client, f"joint run {body.joint!r}", run.about.parties[body.number].worker)
        if body.terms != self._shared(run):
            raise AlignmentError(
                f"{run.name_of(run.me)} and {run.name_of(body.number)} were told different things of the run: they "
                "must normalise ids alike, agree on the model, and go on from one run if from any"
            )
        run.members[session.id] = body.number
        return m.Done(), ()

    def _shared(self, run: Run) -> str:
        origin = run.kept.origin if run.kept is not None and run.about.resume else ""
        return terms.shared_hash(run.about, origin)

    def told_waits(self, session: Session, body: m.AskJoint) -> Answer:
        """Answers another party of a run for whom this one waits.

        Raises:
            JointError: whoever asks is no party of such a run.
        """
        run = self._runs.get(body.joint)
        if run is None or session.id not in run.members:
            raise JointError(f"who asks is no party of a joint run {body.joint!r} here")
        return m.Waits([] if run.awaited is None else [run.awaited]), ()

    # ------------------------------------------------------------------ what others send unasked

    def heard(
        self, session: Session, body: m.Parcel | m.FailJoint, tensors: list[torch.Tensor]
    ) -> tuple[list[ToPeer], list[str]]:
        """Takes what another party sends; returns what is to be sent, and the keys of what may go on."""
        run = self._runs.get(body.joint)
        if run is None:
            return [], []
        known = session.id in run.members
        try:
            if isinstance(body, m.FailJoint):
                if not known:  # a party that failed before it could join tells all; a stranger ends nothing
                    return [], []
                return self._fail(run, body.reason, body.kind, tell=False)
            run.arrived(session.id, body, tensors)
            theirs = sum(one.waiting_bytes for one in self._runs.values() if one.owner == run.owner)
            self._store.check_bytes(run.owner, theirs)
            waiting = sum(one.waiting_bytes for one in self._runs.values())
            if waiting > MOST_WAITING_HERE:
                raise JointError(
                    f"{run.name_of(run.me)} has {waiting:,} bytes of joint runs waiting, more than it takes"
                )
        except PlanrtError as error:
            if not known:
                raise
            return self._fail(run, failure_of(error).message, failure_of(error).kind)
        return [], [run.key]

    def _fail(
        self, run: Run, reason: str, kind: str = JointError.__name__, *, tell: bool = True
    ) -> tuple[list[ToPeer], list[str]]:
        """Ends a run for a reason; returns what the others are sent, and the keys of what hears of it here."""
        if run.failure is not None:
            return [], []
        failure = run.fail(reason, kind)
        self._runs.pop(run.about.joint, None)
        self._ended[run.about.joint] = Ended(run.owner, run.about.token, failure)
        mine = [id for id, one in self._ended.items() if one.owner == run.owner]
        if len(mine) > MAX_ENDED_OF_SESSION:
            del self._ended[mine[0]]
        elif len(self._ended) > MAX_ENDED:
            del self._ended[next(iter(self._ended))]
        ended = m.FailJoint(run.about.joint, failure.failure.message, failure.failure.cause)
        return ([ToPeer(other, ended) for other in run.others] if tell else []), [run.key]

    def gone(self, session: Session) -> tuple[list[ToPeer], list[str]]:
        """Ends the runs of a session that is over: of another party, or of the client."""
        sends: list[ToPeer] = []
        keys: list[str] = []
        for run in list(self._runs.values()):
            if run.owner == session.id:
                more = self._fail(run, f"the client's session at {run.name_of(run.me)} is over")
            elif session.id in run.members:
                more = self._fail(run, f"{run.name_of(run.members[session.id])} is gone")
            else:
                continue
            sends += more[0]
            keys += more[1]
        for joint in [joint for joint, (owner, _) in self._opening.items() if owner == session.id]:
            del self._opening[joint]
        for joint in [joint for joint, one in self._ended.items() if one.owner == session.id]:
            del self._ended[joint]
        return sends, keys

    def end(self, session: Session, body: m.EndJoint) -> tuple[list[ToPeer], list[str]]:
        """Frees a run that its client needs no more."""
        if (opening := self._opening.get(body.joint)) is not None and opening[0] == session.id:
            del self._opening[body.joint]
        if (ended := self._ended.get(body.joint)) is not None and ended.owner == session.id:
            del self._ended[body.joint]
        run = self._runs.get(body.joint)
        if run is None or run.owner != session.id:
            return [], []
        found = self._fail(run, "its client has ended it", tell=False)
        self._ended.pop(body.joint, None)
        return found

    # ---------------------------------------------------------------------------------- its steps

    def work(self, session: Session, body: m.WorkJoint, tensors: Sequence[torch.Tensor]) -> Steps:
        """Does this party's part of a step.

        Raises:
            JointError: another step comes next, a party is gone, or it does not follow the protocol.
        """
        run = self._runs.get(body.joint)
        if run is None or run.owner != session.id:
            ended = self._ended.get(body.joint)
            if ended is not None and ended.owner == session.id:
                raise ended.failure
            raise JointError(f"this session has no joint run {body.joint!r} here")
        if run.busy:
            raise JointError("a step of this run is under way here: one comes after the other")
        run.busy = True
        try:
            return (yield from self._step(session, run, body, tensors))
        except StepRefusedError as refused:
            raise refused.error from None
        except Exception as failed:  # whatever it raises ends the run, never the worker
            error = self._untold(session, run, failed)
            told = failure_of(error)
            sends, keys = self._fail(run, f"{run.name_of(run.me)}: {told.message}", told.kind)
            yield from sends
            for key in keys:
                yield Wake(key)
            if error is failed:
                raise
            raise error from failed
        finally:
            run.busy = False

    def _step(self, session: Session, run: Run, body: m.WorkJoint, tensors: Sequence[torch.Tensor]) -> Steps:
        if body.step == "join":
            shared = self._shared(run)
            for other in run.others:
                joins = m.JoinJoint(run.about.joint, run.about.token, run.me, shared)
                yield from ask(other, joins, seconds=run.about.timeout, late=JointError)
            return m.JointDone(self._epochs_kept(run)), ()
        if body.step != "forget":
            self._admit(session, run.about, run.text)  # who has allowed it may have denied it since
        if body.step == "forget":
            if run.kept is not None:
                run.kept.folder.forget(run.kept.user, run.kept.name)
                run.kept = None
            return m.JointDone(), ()
        if self._gate is not None:
            check_failures(self._gate, session)
            run.pays(
                f"the step {body.step!r} of a joint run", costs.of_step(run, body, self._gate.admit_part)
            )
        if body.step == "load":
            self._load(run, tensors)
            keep(run)
            return m.JointDone(), ()
        if body.step == "weights":
            return self._weights(session, run)

        def told(whose: str, count: int, refused: bool) -> None:
            outcome = "refused" if refused else "done"
            self._audit.joint(session, "decrypt", outcome=outcome, to=whose, rows=count)

        result = yield from run.drive(role_of(run, body, told), costs.of_parcel)
        if body.step == "epoch":
            run.epochs += 1
            if "loss" in result:
                run.losses.append(float(result["loss"]))
        if body.step == "epoch" or (body.step == "align" and not isinstance(run.about.model, m.SplitTerms)):
            keep(run)
        return self._answer(session, run, body, result)

    def _epochs_kept(self, run: Run) -> dict[str, float]:
        """After which epochs this party has kept the run that goes on: the newest, and the one before."""
        if run.kept is None or not run.about.resume:
            return {}
        epochs = run.kept.folder.epochs(run.kept.user, run.kept.name)
        return dict(zip(("kept", "kept_before"), map(float, epochs), strict=False))

    def _untold(self, session: Session, run: Run, error: Exception) -> Exception:
        """Returns `error` as the client and the other parties may hear of it.

        Errors of planrt name parties and columns. Those of torch, in ops on a table or anywhere else, can have a value
        in their text ("Target 7 is out of bounds").
        """
        can_be_told = isinstance(error, PlanrtError) and not isinstance(error, ExecutionError)
        computed = error.__cause__ if isinstance(error.__cause__, ExecutionError) else error
        if self._gate is not None and (computed is not error or not can_be_told):
            failed_on_data(self._gate, session, computed, joint=run.about.joint)
        return error if can_be_told else OpFailedError(failure_on_data(error))

    def _load(self, run: Run, tensors: Sequence[torch.Tensor]) -> None:
        if not isinstance(run.model, SplitOwner):
            raise JointError(
                "only a split network has a state to be loaded, once its owners' tables are aligned"
            )
        if run.epochs:
            raise JointError("a state is loaded before the first epoch")
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

    def _answer(self, session: Session, run: Run, body: m.WorkJoint, result: dict[str, Any]) -> Answer:
        """What the client may have of a step's result."""
        told = {name: float(value) for name, value in result.items() if isinstance(value, int | float)}
        data = [run.about.dataset] if run.about.dataset else []
        self._audit.joint(session, body.step, data=data, to=self._others(run))
        if body.step == "resume":
            return m.JointDone(told), [torch.tensor(result["losses"], dtype=torch.float64)]
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

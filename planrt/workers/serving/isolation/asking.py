"""What a process for clients' work asks of the worker's own one, in the place of what it may not do itself.

Each class stands for one of the worker's own, and has its methods. `answering.py` has the other side.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Final

import msgspec

from planrt.errors import ApprovalError, IsolationError, JointError, LocalError
from planrt.plans.policy.approvals import Asking, QueueFullError, Status
from planrt.serde.checkpoints import Checkpoint, checkpoint_bytes, checkpoint_size
from planrt.workers.serving.audit_file import AuditError
from planrt.workers.serving.isolation.messages import MAX_CALL, Calls
from planrt.workers.serving.joint_folder import kept_in
from planrt.workers.wire import messages as m
from planrt.workers.wire.proofs import ProofError, Prover, Verifier

MOST_KEPT: Final = MAX_CALL - (16 << 20)
"""Bytes of the tensors that are kept of a joint run after one epoch."""


class RelayedAudit:
    """The owner's log, as a process for clients' work has it; see `AuditFile`."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls
        self._events: list[dict[str, Any]] = []
        self._full = ""

    @property
    def waiting(self) -> bool:
        """True where there are events to write."""
        return bool(self._events)

    def record(self, event: Mapping[str, Any]) -> None:
        """Takes an event, which `write` writes."""
        self._events.append(dict(event))

    def finish(self) -> None:
        """See `AuditFile.finish`: the worker's own process sums up."""

    def full(self, user: str) -> str:
        """See `AuditFile.full`: of this process's user, as it was after the last events."""
        full, self._full = self._full, ""  # the next events say it again
        return full

    def write(self) -> None:
        """Has the events written that were taken.

        Raises:
            AuditError: they cannot be written, now; the worker's own process keeps them.
        """
        events, self._events = self._events, []
        try:
            self._full = self._calls.ask("audit", events)
        except IsolationError as error:
            raise AuditError(str(error)) from None


class RelayedApprovals:
    """The owner's decisions, as a process for clients' work asks for them; see `Approvals`."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    def status(self, plan: str) -> Status:
        """See `Approvals.status`."""
        return Status(*self._ask("status", plan))

    def askings(self, plan: str) -> list[Asking]:
        """Returns none: who asked in other sessions is not told here, so a session has to send the plan itself."""
        return []

    def submit(
        self, plan: str, data: bytes, *, asking: Asking | None = None, most: int | None = None
    ) -> Status:
        """See `Approvals.submit`."""
        assert asking is not None  # noqa: S101 - a plan is somebody's; how many of them may wait is known there
        return Status(*self._ask("submit", plan, data, asdict(asking)))

    def _ask(self, what: str, *about: Any) -> Any:
        try:
            kind, answer = self._calls.ask(what, *about)
        except IsolationError as error:
            raise ApprovalError(str(error)) from None
        if kind == "full":
            raise QueueFullError(answer)
        if kind == "failed":
            raise ApprovalError(answer)
        return answer


class RelayedBoard:
    """Tells what is where, as the worker's own process knows it; see `Board` of the machine."""

    def __init__(self, worker_id: str, calls: Calls) -> None:
        self._worker_id, self._calls = worker_id, calls

    def keeps(self, id: int, tags: Sequence[str], description: str, token: str) -> None:
        """See `Board.keeps`."""
        self._ask("keeps", id, list(tags), description, token)

    def computes(self, names: Sequence[str]) -> None:
        """See `Board.computes`."""
        self._ask("computes", list(names))

    def find(self, terms: Sequence[str]) -> Sequence[tuple[m.PeerAddress, list[int]]]:
        """See `Board.find`."""
        return [
            (m.PeerAddress(self._worker_id, address), ids) for address, ids in self._ask("find", list(terms))
        ]

    def holder(self, ids: Sequence[int], token: str) -> m.PeerAddress | None:
        """See `Board.holder`."""
        return self._at(self._ask("holder", list(ids), token))

    def computing(self, name: str) -> m.PeerAddress | None:
        """See `Board.computing`."""
        return self._at(self._ask("computing", name))

    def _at(self, address: str) -> m.PeerAddress | None:
        return m.PeerAddress(self._worker_id, address) if address else None

    def _ask(self, what: str, *about: Any) -> Any:
        try:
            return self._calls.ask(what, *about)
        except IsolationError as error:
            raise LocalError(str(error)) from None


class RelayedRoom:
    """Asks how much of what all users of the worker may keep is for this process; see `More`. `at_address`: of what
    clients without a user may keep where its client is."""

    def __init__(self, calls: Calls, *, at_address: bool = False) -> None:
        self._calls, self._what = calls, "room_at_address" if at_address else "room"

    def __call__(self, objects: int, memory: int) -> str:
        """See `More`."""
        try:
            return str(self._calls.ask(self._what, objects, memory))
        except IsolationError as error:
            raise LocalError(str(error)) from None


class RelayedBudget:
    """Draws on what the user of this process may compute; see `Draw`. The worker's own process knows whose it is."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    def __call__(self, whose: str, flops: int, most: int) -> tuple[str, float]:
        """See `Draw`."""
        try:
            rule, number = self._calls.ask("spend", flops, most)
        except IsolationError as error:
            raise LocalError(str(error)) from None
        return str(rule), float(number)


class RelayedFailures:
    """Counts runs that failed on data, for the user of this process; see `Failures`. The worker's own process knows
    whose it is."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    def seconds(self, whose: str, *, nobody: bool) -> float:
        """See `Failures.seconds`."""
        return self._ask("may_fail")

    def add(self, whose: str, *, nobody: bool) -> float:
        """See `Failures.add`."""
        return self._ask("run_failed")

    def _ask(self, what: str) -> float:
        try:
            return float(self._calls.ask(what))
        except IsolationError as error:
            raise LocalError(str(error)) from None


class RelayedTickets:
    """The tickets that sessions here give, for the worker's own process, which is shown them."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    def given(self, id: str, verifier: Verifier, asked: m.Delegate) -> None:
        """Has note taken of a ticket.

        Raises:
            LocalError: it cannot be.
        """
        try:
            self._calls.ask("ticket", id, str(verifier), msgspec.to_builtins(asked))
        except IsolationError as error:
            raise LocalError(str(error)) from None

    def over(self, id: str) -> None:
        """Has a ticket forgotten."""
        self._calls.tell("ticket_over", id)


class RelayedToken:
    """The token that the worker proves to others, which the worker's own process has; see `HeldElsewhere`."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    def proving(self, binding: bytes | None) -> Prover:
        """See `HeldElsewhere.proving`."""
        return _RelayedProving(self._calls, binding)


class _RelayedProving:
    """See `Proving`."""

    def __init__(self, calls: Calls, binding: bytes | None) -> None:
        self._calls = calls
        number, self.first = calls.ask("prove", binding)
        self._number = int(number)

    def answer(self, challenge: str) -> str:
        """See `Proving.answer`."""
        return str(self._ask("prove_answer", challenge))

    def check(self, final: str) -> None:
        """See `Proving.check`."""
        self._ask("prove_check", final)

    def _ask(self, what: str, about: str) -> Any:
        try:
            return self._calls.ask(what, self._number, about)
        except IsolationError as error:
            raise ProofError(str(error)) from None


class RelayedJointRuns:
    """The owner's folder for joint runs, as a process for clients' work has it: that of its own user; see `Keeps`.

    The worker's own process knows whose it is. What a process says of that, with `user`, is not passed on.
    """

    def __init__(self, worker_id: str, calls: Calls) -> None:
        self._worker_id, self._calls = worker_id, calls

    def epochs(self, user: str, name: str) -> Sequence[int]:
        """See `Keeps.epochs`."""
        found: list[int] = self._ask("epochs", name)
        return found

    def read(self, user: str, name: str, epoch: int) -> Checkpoint:
        """See `Keeps.read`."""
        return kept_in(self._ask("read", name, epoch), self._worker_id, name)

    def check_room(self, user: str, name: str) -> None:
        """See `Keeps.check_room`."""
        self._ask("room", name)

    def write(self, user: str, name: str, epoch: int, kept: Checkpoint) -> None:
        """See `Keeps.write`."""
        if (nbytes := checkpoint_size(kept)) > MOST_KEPT:
            raise JointError(
                f"party {self._worker_id!r} cannot keep {name!r}: its part has {nbytes:,} bytes, and with isolation "
                f"{MOST_KEPT:,} are kept at most"
            )
        self._ask("write", name, epoch, checkpoint_bytes(kept))

    def forget(self, user: str, name: str) -> None:
        """See `Keeps.forget`."""
        self._ask("forget", name)

    def _ask(self, what: str, *about: Any) -> Any:
        try:
            kind, answer = self._calls.ask("joint", what, *about)
        except IsolationError as error:
            raise JointError(str(error)) from None
        if kind == "failed":
            raise JointError(answer)
        return answer

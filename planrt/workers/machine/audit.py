"""What a worker's owner is told for the audit log: one event for each thing that they care about. No I/O.

The machine tells an `Audit` what happened, as it happens; who keeps it is the host's affair
(`planrt.workers.serving.audit_file`). Events hold names, hashes, shapes, counts and kinds of errors: never a value, a
token, a path, or the words of an error, which can hold a value.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, Protocol

import torch

from planrt.errors import ExecutionError, LocalError, PolicyError
from planrt.plans.ir.constants import Constant, approval_hash
from planrt.plans.ir.graph import Graph
from planrt.serde.tensors import payload_bytes
from planrt.types import leaves
from planrt.workers.machine.failures import OpFailedError
from planrt.workers.machine.kinds.base import StoredObject
from planrt.workers.machine.labels import Label
from planrt.workers.machine.sessions import Session
from planrt.workers.wire import messages as m
from planrt.workers.wire.refusals import GetNotPermitted, NotApproved, UnknownDataset, kind_of

_LONGEST: Final = 200
"""Characters of a text from a client."""
_MOST: Final = 32
"""Names or shapes in a list."""
_REFUSED: Final = frozenset({GetNotPermitted.kind, NotApproved.kind, UnknownDataset.kind, "PolicyError"})
_RUNS: Final[dict[type, str]] = {
    m.Fit: "fit", m.FitMasked: "fit", m.Evaluate: "evaluate", m.RunPlan: "run"
}  # fmt: skip


class Audit(Protocol):
    """A place where events go. It must not block, and raise nothing."""

    def record(self, event: Mapping[str, Any]) -> None:
        """Takes one event."""

    def full(self, user: str) -> str:
        """Returns why nothing more is done for that user (``""``: nobody) for a while; ``""`` where all is well."""


class AuditFullError(LocalError):
    """A user has had so many lines of the owner's log that nothing more is done now that would need one."""


class Auditor:
    """Puts what happens on one worker into events; without an `audit` it does nothing."""

    def __init__(self, audit: Audit | None = None) -> None:
        self._audit = audit
        self.on = audit is not None
        """Whether anybody keeps them."""

    def to(self, audit: Audit | None) -> None:
        """Puts everything there from now on, for whoever has this auditor."""
        self._audit = audit
        self.on = audit is not None

    def check_room(self, session: Session) -> None:
        """Raises AuditFullError where its user has filled their share of the log: what is done would have its line."""
        if self._audit is not None and (why := self._audit.full(session.user or "")):
            raise AuditFullError(why)

    def _record(self, event: str, session: Session | None, **facts: Any) -> None:
        if self._audit is None or (session is not None and session.sibling):  # told where its client is
            return
        about: dict[str, Any] = {"event": event}
        if session is not None:
            about |= {"session": int(session.id.partition(":")[0]), "user": session.user or ""}
            if session.by is not None:
                about |= {"by": _cut(session.by.worker), "proved": session.by.user}
        facts = {key: _cut(value) for key, value in facts.items()}
        self._audit.record({**about, **{key: value for key, value in facts.items() if value is not None}})

    # Sessions

    def opened(self, session: Session, address: str) -> None:
        """Records that a session was opened, from an address; ``""`` is within the worker's own process."""
        self._record("opened", session, address=address)

    def resumed(self, session: Session, address: str) -> None:
        """Records that a session goes on over another connection, from an address."""
        self._record("resumed", session, address=address)

    def ended(self, session: Session) -> None:
        """Records that a session is over."""
        self._record("ended", session, failures=session.failures)

    def not_opened(self, address: str, *, wrong_proof: bool) -> None:
        """Records that somebody got no session. A proof that does not hold tells nobody's name."""
        self._record(
            "wrong_proof" if wrong_proof else "refused", None, address=address, request="hello",
            outcome="refused", kind="HandshakeError",
        )  # fmt: skip

    # Runs

    def asked(self, user: str | None, plan: Graph, filed: str, data: Sequence[str], purpose: str) -> None:
        """Records that a plan was put before the owner; its name and purpose are what the client says."""
        self._record(
            "asked", None, user=user or "", plan=plan.hash, filed=filed, name=plan.name, data=data, purpose=purpose
        )  # fmt: skip

    def no_more_failures(self, session: Session) -> None:
        """Records that so many runs of its user failed on data that nothing more of it runs there, for a while."""
        self._record("no_more_failures", session, outcome="refused", rule="max_daily_failures")

    def ran(
        self, session: Session, event: str, plan: Graph, constants: Sequence[Constant], **facts: Any
    ) -> None:
        """Records that a plan ran; `filed` is what decisions about it are filed under."""
        if self.on:
            filed = approval_hash(plan, constants)
            self._record(
                event, session, plan=plan.hash, filed=filed, name=plan.name, **{"outcome": "done", **facts}
            )

    def called(
        self,
        session: Session,
        graph: Graph,
        constants: Sequence[Constant],
        operands: Sequence[StoredObject],
        labels: Iterable[Label],
        **facts: Any,
    ) -> None:
        """Records a call of a plan that is an object, on `operands` of these labels; `facts` say how it went."""
        private = [
            one
            for one, label in zip(operands, labels, strict=True)
            if label is not None and isinstance(one.value, torch.Tensor)
        ]
        data = sorted({tag for one in private for tag in (*(one.source or ()), *one.tags)})
        rows = max((one.value.shape[0] for one in private if one.value.dim()), default=None)
        self.ran(session, "call", graph, constants, **{"data": data, "rows": rows, **facts})

    def request_failed(self, session: Session, body: m.Body, error: Exception) -> None:
        """Records that a request, or what a message asked for, was refused; or that a run failed."""
        if not self.on or isinstance(body, m.Call):  # told where the op ran
            return
        run = _RUNS.get(type(body))
        facts = about(error)
        if run is None and (isinstance(error, OpFailedError) or facts["outcome"] != "refused"):
            return  # told when the op failed, or no affair of the owner's
        asked = body.fit if isinstance(body, m.FitMasked) else body
        plan, dataset = getattr(asked, "plan", None), getattr(asked, "dataset", None)
        data = [dataset] if isinstance(dataset, str) else None
        request = None if run else type(body).__name__.lower()
        plan = plan if isinstance(plan, str) else None
        self._record(run or "refused", session, request=request, plan=plan, data=data, **facts)

    def op_failed(self, session: Session, op: str, error: Exception, *, private: bool) -> None:
        """Records that an op of a client's was refused, or failed on private data."""
        if not self.on or isinstance(error, OpFailedError):  # the latter is of something before it
            return
        facts = about(error)
        if private or facts["outcome"] == "refused":
            facts["op"] = facts["op"] or op
            self._record("refused" if facts["outcome"] == "refused" else "failed", session, **facts)

    def joint(self, session: Session, step: str, *, outcome: str = "done", **facts: Any) -> None:
        """Records a step of a joint run with other workers; `facts` say on which data, and with whom."""
        self._record("joint", session, request=step, outcome=outcome, **facts)

    # What leaves

    def left(
        self, session: Session, event: str, stored: StoredObject, label: Label, tensors: Sequence[torch.Tensor],
        to: str | None = None,
    ) -> None:  # fmt: skip
        """Records that a labelled or published value was handed to the client, or to the worker `to`."""
        if not self.on or (label is None and not stored.source and stored.owner == session.id):
            return
        self._record(
            event, session, data=sorted({*(stored.source or ()), *stored.tags}),
            kind=type(stored.value).__name__, shapes=shapes_of(tensors), bytes=payload_bytes(tensors),
            outcome="done" if to is None else "begun", to=to,
        )  # fmt: skip

    def told(self, session: Session, op: str, operands: Sequence[StoredObject], label: Label) -> None:
        """Records that the client was told how large a result of labelled or published values is."""
        sources = {tag for one in operands for tag in (*(one.source or ()), *one.tags)}
        if label is not None or any(one.source for one in operands):
            self._record("fetch", session, data=sorted(sources), op=op, outcome="done")


def shapes_of(value: Any) -> list[str]:
    """Returns what the tensors in `value` look like, as ``float32[2, 3]``."""
    return [
        f"{str(one.dtype).removeprefix('torch.')}{list(one.shape)}"
        for one in leaves(value)
        if isinstance(one, torch.Tensor)
    ]


def about(error: Exception) -> dict[str, Any]:
    """Returns what is told of an error: its kind, and not its words."""
    failure = error.failure if isinstance(error, OpFailedError) else None
    kind = failure.kind if failure is not None else kind_of(error)
    op = failure.op if failure is not None else getattr(error, "op", None)
    known = isinstance(error, PolicyError | ExecutionError) or failure is not None
    rule = error.rule if isinstance(error, PolicyError) else None
    outcome = "refused" if kind in _REFUSED else "failed"
    return {"outcome": outcome, "kind": kind, "rule": rule, "op": (op or None) if known else None}


def _cut(value: Any) -> Any:
    if isinstance(value, str):
        return value[:_LONGEST]
    if isinstance(value, list | tuple):
        return [_cut(one) for one in value[:_MOST]]
    return value

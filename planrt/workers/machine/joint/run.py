"""One joint run at one of its parties: what it has, what others have sent, and how its steps are driven. No I/O."""

from __future__ import annotations

import secrets
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

import torch

from planrt.errors import JointError, PlanrtError
from planrt.logs import get_logger
from planrt.plans.ir.graph import Graph
from planrt.serde.tensors import payload_bytes
from planrt.sharing.columns import linear, shared
from planrt.sharing.columns.steps import Role, Send, Turn
from planrt.workers.machine.events import Alarm, ToPeer, Wait
from planrt.workers.machine.failures import OpFailedError, cut
from planrt.workers.machine.joint.kept import KeptRun
from planrt.workers.machine.joint.owners import AlignedTable, Model
from planrt.workers.machine.sessions import Session
from planrt.workers.machine.waiting import Exchange, Late, wait
from planrt.workers.wire import messages as m

MOST_WAITING: Final = 1 << 31
"""Bytes of parcels of one run that wait to be taken."""
_TELL_EVERY: Final = 5.0
"""Seconds between two lines of the log that say how far a step is."""
_LONGEST: Final = 4_000
"""Characters of the reason that a run has ended for."""

log = get_logger("planrt.joint")


class JointFailedError(OpFailedError):
    """A run that has ended already, for a reason that is known: whoever ended it has said so."""

    def __init__(self, reason: str, kind: str) -> None:
        super().__init__(m.Failure(type(self).__name__, reason, cause=kind))


class StepRefusedError(Exception):
    """A step that no party does, as all of them know: the run goes on. `error` is what the client is told."""

    def __init__(self, error: PlanrtError) -> None:
        super().__init__(str(error))
        self.error = error


@dataclass(slots=True, eq=False)
class Run:
    """One joint run at one of its parties."""

    about: m.OpenJoint
    client: Session
    """The client's session here."""
    parties: list[m.PeerAddress]
    """The parties as they are reached in that client's name."""
    table: AlignedTable | None
    """None for who holds the key, or hands out randomness."""
    plans: list[Graph] = field(default_factory=list)
    least: int = 0
    """Rows that all that leaves must be of, by the release rules of the table's owner."""
    kept: KeptRun | None = None
    """How its part is kept, if it is."""
    text: str = ""
    """What it does in words, as its owner's decision is filed."""
    pays: Callable[[str, float], None] = lambda what, flops: None
    """Pays for what it computes."""
    freed: Callable[[], None] = lambda: None
    """Called once, when it holds nothing any more."""
    model: Model | None = None
    holder: linear.KeyHolder | shared.Provider | None = None
    members: dict[str, int] = field(default_factory=dict)
    """Session of another party here -> its number."""
    boxes: dict[int, deque[tuple[str, list[torch.Tensor]]]] = field(default_factory=dict)
    """Party -> what it has sent that was not taken yet."""
    came: dict[int, int] = field(default_factory=dict)
    sent: dict[int, int] = field(default_factory=dict)
    """Party -> how many parcels came from it, and went there."""
    waiting_bytes: int = 0
    failure: JointFailedError | None = None
    busy: bool = False
    size: int = 0
    epochs: int = 0
    losses: list[float] = field(default_factory=list)
    """Of the epochs that are done, where this party is told."""
    alarm: float = 0.0
    """When somebody will look whether it has waited too long, on `time.monotonic`'s clock."""
    awaited: int | None = None
    """The party that it waits for now."""
    told: float = field(default_factory=time.monotonic)

    @property
    def owner(self) -> str:
        """The name of the client's session here."""
        return self.client.id

    @property
    def user(self) -> str:
        """For whom it counts: the client's user, or its session."""
        return self.client.user or self.client.id

    @property
    def key(self) -> str:
        """The key that its steps wait under."""
        return f"joint:{self.about.joint}"

    @property
    def me(self) -> int:
        """This party's number."""
        return self.about.number

    @property
    def names(self) -> list[str]:
        """The parties' workers."""
        return [one.worker for one in self.about.parties]

    @property
    def others(self) -> list[m.PeerAddress]:
        """The other parties."""
        return [one for number, one in enumerate(self.parties) if number != self.me]

    def name_of(self, number: int) -> str:
        """Returns a party as messages call it."""
        return f"party {self.about.parties[number].worker!r}"

    def begin_anew(self) -> None:
        """Raises JointError if there is a model already."""
        if self.epochs or self.model is not None or self.holder is not None:
            raise JointError("a run finds who is in all tables, or takes up what was kept, once")

    def check(self) -> None:
        """Raises JointFailedError once the run has failed."""
        if self.failure is not None:
            raise self.failure

    def fail(self, reason: str, kind: str) -> JointFailedError:
        """Ends the run, and lets go of all that it had; the first reason stays."""
        if self.failure is None:
            self.failure = JointFailedError(cut(reason)[:_LONGEST], kind)
            self.boxes.clear()
            self.plans.clear()
            self.model = self.holder = self.table = self.kept = None
            self.waiting_bytes = 0
            self.freed()
        return self.failure

    def arrived(self, session: str, body: m.Parcel, tensors: list[torch.Tensor]) -> None:
        """Takes a parcel of another party.

        Raises:
            JointError: it comes from somebody else, out of order, or more wait than there is room for.
        """
        number = self.members.get(session)
        if number is None:
            raise JointError(f"a parcel of joint run {body.joint!r} came from none of its parties")
        due = self.came.get(number, 0)
        if body.number != due:
            raise JointError(
                f"parcel {body.number} of {self.name_of(number)} came where {due} is due: parties send each parcel "
                "once and in order, so what came before was lost on the way"
            )
        self.waiting_bytes += payload_bytes(tensors)
        if self.waiting_bytes > MOST_WAITING:
            raise JointError(
                f"{self.name_of(number)} sends more than is taken: {self.waiting_bytes:,} bytes wait"
            )
        self.came[number] = body.number + 1
        self.boxes.setdefault(number, deque()).append((body.kind, tensors))

    def drive(self, role: Role, takes: Callable[[str, list[torch.Tensor]], float]) -> Exchange:
        """Runs a role: what it sends goes to other workers, and what it waits for comes from them, which is paid for
        then: `takes` says how much of it."""
        given: list[torch.Tensor] | None = None
        while True:
            try:
                step = role.send(given)
            except StopIteration as done:
                return done.value
            given = None
            if isinstance(step, Send):
                number = self.sent.get(step.to, 0)
                self.sent[step.to] = number + 1
                yield ToPeer(
                    self.parties[step.to], m.Parcel(self.about.joint, number, step.kind), step.tensors
                )
            elif isinstance(step, Turn):
                self._tell(step)
                yield from turn()
                self.check()
            else:
                yield from self._wait(step.source)
                kind, given = self.boxes[step.source].popleft()
                self.waiting_bytes -= payload_bytes(given)
                self.pays("a step of a joint run", takes(kind, given))
                if kind != step.kind:
                    raise JointError(
                        f"{self.name_of(step.source)} sent its {kind} where its {step.kind} is due: parties run the "
                        "same protocol"
                    )

    def _tell(self, turn: Turn) -> None:
        """Writes into the worker's log how far a step is, now and then."""
        if turn.of and time.monotonic() >= self.told + _TELL_EVERY:
            self.told = time.monotonic()
            log.info("joint_progress", joint=self.about.joint, what=turn.what, done=turn.done, of=turn.of)

    def _wait(self, source: int) -> Exchange:
        """Waits until there is a parcel of that party.

        Raises:
            JointError: the run has failed, or the party takes too long.
        """
        if self._has(source):
            return
        self.awaited = source
        question = m.AskJoint(self.about.joint) if self.about.tells_waits else None
        try:
            late: Late | None = yield from wait(
                self,
                self.me,
                self.about.timeout,
                question,
                is_over=lambda: self._has(source),
                awaited=lambda: [source],
            )
        finally:
            self.awaited = None
        if late is not None:
            raise JointError(late.told(self.name_of))

    def _has(self, source: int) -> bool:
        self.check()
        return bool(self.boxes.get(source))


def turn() -> Exchange:
    """Lets others have their turn."""
    key = f"turn:{secrets.token_hex(8)}"
    yield Alarm(0.0, key)
    yield Wait(key)

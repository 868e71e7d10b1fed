"""What a session needs to outlive its connection: counts of messages, and its answers until they have arrived. No I/O.

An answer may share its memory with objects of the session. It is kept as it is, and copied only when the session is
about to write while the answer has not been acknowledged (`before_writing`): clients acknowledge with the very next
message, and large answers at once, so that hardly ever happens.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Sequence
from operator import attrgetter
from typing import Final

import torch

from planrt.errors import PolicyError
from planrt.plans.policy.quotas import Account
from planrt.serde.frames import Limits
from planrt.workers.wire import messages as m
from planrt.workers.wire.delivery import LARGE, MESSAGES, Unacknowledged

READS: Final = frozenset({
    m.Fetch, m.ReadPlan, m.ReadRun, m.ListObjects, m.CountObjects, m.AskApproval, m.Ack, m.Bye,
})  # fmt: skip
"""Messages that write to no object."""

_NBYTES: Final = attrgetter("nbytes")


def _has_room(account: Account, tensors: Sequence[torch.Tensor] = (), *, beside: int = 0) -> bool:
    try:
        account.check(tensors, beside=beside)
    except PolicyError:
        return False
    return True


class Answer:
    """An answer that may have to be sent again."""

    __slots__ = ("account", "envelope", "nbytes", "own", "tensors")

    def __init__(
        self, envelope: m.Envelope, tensors: Sequence[torch.Tensor], account: Account | None = None
    ) -> None:
        self.envelope = envelope
        self.account = account
        self.tensors = tensors
        self.nbytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors)  # some do not travel
        self.own = not tensors
        """Whether nobody writes to the memory of its tensors any more."""


class Keeping:
    """The part of a session that lets it go on. `client` is whose it is, as sessions are counted; `limits` say how many
    answers it may leave unacknowledged."""

    __slots__ = (
        "_digest",
        "_limits",
        "absence",
        "answers",
        "broken",
        "client",
        "gives_way",
        "name",
        "taken",
        "told",
        "untold_bytes",
    )

    def __init__(self, client: str, limits: Limits) -> None:
        self.client, self._limits = client, limits
        self.name = secrets.token_hex(16)
        self._digest = b""
        self.taken = 0
        """Messages of the client, each handled or under way."""
        self.told = 0
        """How many of these the client has been told of."""
        self.untold_bytes = 0
        """What those brought that it has not been told of, once it was to be (`due`)."""
        self.answers: Unacknowledged[Answer] = Unacknowledged()
        self.absence = 0
        """How often its connection has ended."""
        self.broken = False
        """Whether it cannot go on over another connection: answers are no longer kept."""
        self.gives_way = False
        """Whether its client has closed it: it may come back, as long as nobody needs the room."""

    def new_secret(self) -> str:
        """Draws the secret, and returns it: here only its hash stays."""
        secret = secrets.token_bytes(32)
        self._digest = hashlib.sha256(secret).digest()
        return secret.hex()

    def proves(self, secret: str) -> bool:
        """Returns whether that is the secret; takes as long either way."""
        return hmac.compare_digest(hashlib.sha256(bytes.fromhex(secret)).digest(), self._digest)

    def takes(self, envelope: m.Envelope) -> None:
        """Notes a message of the client, before it is handled.

        Raises:
            WireError: it acknowledges what was never sent.
        """
        answers, kind = self.answers, type(envelope.body)
        left = len(answers)
        if not self.broken and (left or envelope.seen > answers.sent):
            left -= len(answers.acknowledge(envelope.seen))
        if kind is not m.Ack and kind is not m.Bye:
            self.taken += 1
        if left and kind not in READS:
            self.before_writing()

    def before_writing(self) -> None:
        """Gives answers that were not acknowledged memory of their own: the session may write to its objects now. Where
        its user may not keep so much, the session ends with its connection."""
        for answer in self.answers:
            if not answer.own:
                if answer.account is not None and not _has_room(answer.account, beside=answer.nbytes):
                    return self.give_up()
                answer.tensors = [tensor.detach().clone() for tensor in answer.tensors]
                answer.own = True
                if answer.account is not None:
                    answer.account.take(answer.tensors)
        return None

    def answered(
        self, id: int, body: m.Body, tensors: Sequence[torch.Tensor], account: Account | None = None
    ) -> m.Envelope:
        """Keeps an answer that is about to be sent; returns it as it is sent. It counts for `account` until it has
        arrived; where that has no room for it, the session ends with its connection."""
        self.told, self.untold_bytes = self.taken, 0
        envelope = m.Envelope(id, body, self.taken)
        if self.broken:
            return envelope
        if (
            self.answers
            and (
                len(self.answers) >= self._limits.unread_answers
                or sum(one.nbytes for one in self.answers) > self._limits.unread_memory
            )
        ) or (account is not None and tensors and not _has_room(account, tensors)):
            self.give_up()
        else:
            if account is not None and tensors:
                account.take(tensors)
            self.answers.add(Answer(envelope, tensors, account))
        return envelope

    def give_up(self) -> None:
        """Lets the session end with its connection."""
        self.broken = True
        self.answers = Unacknowledged()

    def arrived(self, id: int) -> None:
        """Forgets the answer to request `id` and those before: the client has them, as the connection knows."""
        self.answers.until(lambda answer: answer.envelope.id == id)

    def due(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Returns whether the client is to be told now that its messages were taken, the latest with `tensors`."""
        untold = self.taken - self.told  # an answer may just have said it
        if untold:
            self.untold_bytes += sum(map(_NBYTES, tensors))
        if untold == 0 or (untold < MESSAGES and self.untold_bytes < LARGE):
            return False
        self.told, self.untold_bytes = self.taken, 0
        return True

"""What a worker refuses in a way that its client can tell from other failures: one table, for both sides. No I/O.

The machine raises a `Refusal`; its `kind` travels, and the client raises the error of `planrt.errors` that stands here
beside it. Every other failure arrives as a plain `RemoteError`.
"""

from __future__ import annotations

from typing import ClassVar, Final

import planrt.errors as errors
from planrt.errors import LocalError, RemoteError

SESSION_ENDED: Final = "SessionLostError"
"""Kind of the failure, under the number 0, that says why a session is over: the process that served it has ended."""

SESSION_IN_USE: Final = "SessionInUseError"
"""Kind of the failure that a client gets while another connection has its session: the only one in a handshake that may
be another one soon."""


TICKET_REFUSED: Final = "TicketRefusedError"
"""Kind of the failure of a ticket that opens nothing: its client may ask for another one, and try again."""


class Refusal(LocalError):  # noqa: N818 - its kinds below are errors
    """Something that a client asked for, and does not get."""

    kind: ClassVar[str]
    """As messages call it."""
    raised: ClassVar[type[RemoteError]]
    """What the client raises."""


class UnknownPlan(Refusal):
    """A plan that the worker does not hold, or no more."""

    kind, raised = "UnknownPlanError", errors.UnknownPlanError


class UnknownDataset(Refusal):
    """A data set that the worker does not have."""

    kind, raised = "UnknownDatasetError", errors.UnknownDatasetError


class UnknownObject(Refusal):
    """An object that is not there, or is not the session's."""

    kind, raised = "UnknownObjectError", errors.UnknownObjectError


class GetNotPermitted(Refusal):
    """A value, or what depends on one, that is not for the session's user."""

    kind, raised = "GetNotPermittedError", errors.GetNotPermittedError


class NotApproved(Refusal):
    """The owner has not approved, or has denied, what was to run."""

    kind, raised = "NotApprovedError", errors.NotApprovedError


class ReplyTooLarge(Refusal):
    """The client does not take an answer of that many bytes."""

    kind, raised = "ReplyTooLargeError", errors.ReplyTooLargeError


RAISED: Final[dict[str, type[RemoteError]]] = {
    **{one.kind: one.raised for one in Refusal.__subclasses__()},
    "PolicyError": errors.PolicyRefusedError,
    "SignatureError": errors.SignatureRefusedError,
}
"""Kind -> what the client raises. A `PolicyError` is no refusal of the machine's: `plan.check` raises it here, too.
Nor is a `SignatureError`, which the protocol of secure sums raises."""


def kind_of(error: BaseException) -> str:
    """Returns the kind of `error`, as messages call it."""
    return error.kind if isinstance(error, Refusal) else type(error).__name__

"""Every error that planrt raises on purpose, in one tree.

    PlanrtError
    ├── LocalError                 you misused this: says which call, and what to write instead
    │   ├── TraceError             a function or module could not be recorded; names the source line
    │   ├── PlanError              a plan that is not built, malformed or given the wrong arguments
    │   │   ├── PlanFormatError        bytes or op lists that are not a valid plan
    │   │   ├── PlanArgumentError      wrong number, shape or dtype of arguments (also a ValueError)
    │   │   ├── OpNotAllowedError      an op that is not in the fixed table
    │   │   └── PolicyError            a plan breaks a rule of a data owner; names op, line and rule
    │   ├── ApprovalError          the record of an owner's decisions is broken, full, or cannot take this one
    │   ├── ProtocolError          a protocol described, deployed or run in a way that cannot work (also a ValueError)
    │   ├── ExecutionError         an op of a plan failed; names the op, its place and its plan line
    │   ├── OptionError            an option or configuration value out of range (also a ValueError)
    │   │   └── UnknownWorkerError     no worker of that id in this process (also a KeyError)
    │   ├── UnknownNameError       no op of the table has that name (also an AttributeError)
    │   ├── DataError              a data set that is missing, incomplete or malformed
    │   ├── MissingPackageError    a package that a job needs is not installed (also an ImportError)
    │   ├── SharingError           secret shares that do not fit each other, or parties who do not (also a ValueError)
    │   │   ├── ValueRangeError        a value that shares cannot hold (also an OverflowError); names the range
    │   │   ├── RandomnessError        correlated randomness of the wrong shape, used up, or asked for twice
    │   │   ├── AggregationError       a secure aggregation that came to no sum; nothing was revealed
    │   │   └── SignatureError         a worker in a secure aggregation did not sign what is said to be its; names it
    │   ├── JointError             workers who compute together on their tables cannot begin or go on; names the party
    │   │   ├── AlignmentError         tables that have nobody in common, or parties who compare ids differently
    │   │   └── CiphertextError        ciphertexts of another key, or what their holder does not decrypt
    │   ├── BlockingCallError      a blocking call on planrt's own loop thread; names the `await` form
    │   └── PointerError           a pointer was used in a way that pointers cannot be
    │       ├── RemoteValueError       its value was read here: write `.get()` first
    │       ├── MixedLocationsError    operands of one op in different places; names the places
    │       ├── GonePointerError       used after `get`, `move` or the end of its worker's connection
    │       ├── RemoteOpError          a torch function that cannot run on a remote tensor; says why
    │       ├── DuplicateIdError       an object id that the worker already uses
    │       └── UnsupportedTensorError a tensor that cannot travel: sparse, quantised, nested, unknown dtype
    ├── RemoteError                the worker says: worker id, kind, op, plan line, remote traceback
    │   ├── UnknownPlanError       the worker does not hold that plan (the client sends it again)
    │   ├── UnknownDatasetError    the worker has no data set under that key
    │   ├── UnknownObjectError     the worker holds no object under that id for this session
    │   ├── NotApprovedError       the worker's owner has not approved, or has denied, what was to run
    │   ├── PolicyRefusedError     what was to run breaks a rule of the worker's owner; names op, line and rule
    │   ├── SignatureRefusedError  the worker adds up with nobody whose signature it misses; names that one
    │   ├── ReplyTooLargeError     the answer is over this client's limit; what was asked for stays there
    │   └── GetNotPermittedError   private data, or what is computed from it, was asked for by someone not allowed
    └── TransportError             the pipe: address and what was tried
        ├── ConnectError           nobody listens there, wrong address, refused, timed out
        ├── HandshakeError         somebody answered, but not a worker that fits this client
        ├── WireError              bytes that are not a valid planrt message
        ├── MessageTooLargeError   a message over a configured limit; on the way out, nothing was sent
        └── WorkerLostError        the connection to a worker ended while an answer was due

Many derive from a class of Python's as well, so that what catches these there catches them here, retry loops
above all: `PlanError`, `PointerError`, `RemoteError` and `BlockingCallError` from RuntimeError,
`ProtocolError` from that and ValueError; wrong values from ValueError, names that are not there from KeyError
or AttributeError, and what happens to connections from ConnectionRefusedError and ConnectionResetError. None
derives from TypeError: operators swallow that type to try the reflected operand.
"""

from __future__ import annotations

import linecache
from collections.abc import Mapping, Sequence
from typing import Self

from planrt.tracebacks import number_of, place_shown, rendered


class PlanrtError(Exception):
    """Root of every error raised by planrt."""

    def __str__(self) -> str:
        """The message as it was given: KeyError, which some derive from, would put it in quotes."""
        return Exception.__str__(self)

    def _render_traceback_(self) -> list[str]:
        """What IPython and Jupyter show of this error, in place of every frame with its neighbouring
        lines."""
        return rendered(self)


class PlanWarning(UserWarning):
    """A plan was recorded, with something in it that its author may not have meant; the message says what."""


class LocalError(PlanrtError):
    """The caller misused planrt; the message says which call and what to write instead."""


class TraceError(LocalError):
    """A function or module could not be recorded into a plan.

    `line` is ``file:line`` of the user's code where recording broke, where known.
    """

    def __init__(self, message: str, *, line: str | None = None) -> None:
        super().__init__(f"{message} (at {place_shown(line)})" if line else message)
        self.message = message
        self.line = line
        if line and (source := linecache.getline(line.rpartition(":")[0], number_of(line)).strip()):
            self.add_note(f"    {source}")  # what tracebacks show below


class PlanError(LocalError, RuntimeError):
    """A plan cannot be used in the way it was."""


class PlanFormatError(PlanError, ValueError):
    """Bytes or an op list that are not a valid plan."""


class PlanArgumentError(PlanError, ValueError):
    """A plan was called with the wrong number, shape or dtype of arguments."""


class OpNotAllowedError(PlanError):
    """An op that is not in the fixed table of `planrt.plans.ir.ops`."""


class PolicyError(PlanError):
    """A plan breaks a rule of a data owner's policy.

    `rule` is the rule's name; `op`, `index` and `line` say at which op, where it is one op's.
    """

    def __init__(
        self,
        message: str,
        *,
        rule: str,
        op: str | None = None,
        index: int | None = None,
        line: str | None = None,
    ) -> None:
        super().__init__(message)
        self.rule = rule
        self.op = op
        self.index = index
        self.line = line


class ApprovalError(LocalError):
    """The record of a data owner's decisions is broken or full, or a decision cannot be made."""


class ProtocolError(LocalError, ValueError, RuntimeError):
    """A protocol was described, deployed or run in a way that cannot work; names the step or the worker."""


class ExecutionError(LocalError):
    """An op of a plan failed while running.

    `op` is the op's name in the table, `index` its place in the plan, `line` the plan line as printed.
    """

    def __init__(self, message: str, *, op: str, index: int, line: str) -> None:
        super().__init__(message)
        self.op = op
        self.index = index
        self.line = line


class DeviceLostError(LocalError, RuntimeError):
    """A worker's GPU answers this process no more; a new process can use it."""


class IsolationError(LocalError, RuntimeError):
    """A worker cannot make, or confine, a process of its own for clients' work."""


class OptionError(LocalError, ValueError):
    """An option or configuration value that cannot be used."""


class UnknownWorkerError(OptionError, KeyError):
    """This process knows no worker of that id."""


class UnknownNameError(LocalError, AttributeError):
    """A name that does not stand for an op that workers run."""


class RunFolderError(LocalError):
    """A run folder cannot be used: another run's, in use, damaged, of a newer planrt, or on a full disk."""


class DataError(LocalError):
    """A data set that is missing, incomplete or malformed."""


class MissingPackageError(LocalError, ImportError):
    """A job needs a package that is not installed; says which, and what to install. `name` is the module."""


class SharingError(LocalError, ValueError):
    """Secret shares, or the parties who hold them, do not fit each other."""


class ValueRangeError(SharingError, OverflowError):
    """A value cannot be held in shares: too large for its scale, infinite or not a number; names the
    range."""


class RandomnessError(SharingError):
    """Correlated randomness is missing, of the wrong shape, or was used before."""


class AggregationError(SharingError, RuntimeError):
    """A secure aggregation came to no sum: too many workers dropped out, or what they sent does not fit. No worker's
    values were revealed."""


class SignatureError(SharingError):
    """A worker in a secure aggregation has not signed what is said to be its: its keys, or its list of survivors."""


class JointError(LocalError, RuntimeError):
    """Workers who compute together on their tables cannot begin, or cannot go on; names the party."""


class AlignmentError(JointError, ValueError):
    """Tables have nobody in common, or their parties compare ids in different ways."""


class CiphertextError(JointError, ValueError):
    """A ciphertext is of another key or malformed, or is not what the holder of the key decrypts."""


class BlockingCallError(LocalError, RuntimeError):
    """A blocking call was made on planrt's own loop thread; use the `await` form it names."""


class PointerError(LocalError, RuntimeError):
    """A pointer was used in a way that pointers cannot be."""


class RemoteValueError(PointerError):
    """The value of a remote tensor was read here; `.get()` brings it back first."""


class MixedLocationsError(PointerError):
    """The operands of one operation are in different places."""


class GonePointerError(PointerError):
    """The pointer points at nothing any more."""


class RemoteOpError(PointerError):
    """A torch function that cannot run on a remote tensor."""


class DuplicateIdError(PointerError):
    """The worker already holds an object under that id."""


class UnsupportedTensorError(PointerError):
    """A tensor of a kind that cannot travel."""


class RemoteError(PlanrtError, RuntimeError):
    """A worker reports that it could not do what was asked.

    `kind` names the class of the error on the worker. Where the failure was inside a plan, `op`, `index` and
    `line` are the failing op, its place in the plan and its plan line. `cause` is what torch said, and
    `remote_traceback` the worker's traceback, both as text.
    """

    def __init__(
        self,
        message: str,
        *,
        worker_id: str,
        kind: str = "RemoteError",
        op: str | None = None,
        line: str | None = None,
        remote_traceback: str = "",
        index: int | None = None,
        cause: str = "",
        step: str | None = None,
    ) -> None:
        super().__init__(f"worker {worker_id!r}: {message}")
        self.reason = message
        self.worker_id = worker_id
        self.kind = kind
        self.op = op
        self.line = line
        self.remote_traceback = remote_traceback
        self.index = index
        self.cause = cause
        self.step = step

    def found_at(self, place: str) -> Self:
        """This error, saying as well where the op came from; workers do not know the lines of a plan."""
        if place and place not in self.reason:
            self.reason = f"{self.reason} ({place})"
            self.args = (f"worker {self.worker_id!r}: {self.reason}",)
        return self


class UnknownPlanError(RemoteError, KeyError):
    """The worker does not hold a plan with that hash."""


class UnknownDatasetError(RemoteError, ValueError, KeyError):
    """The worker has no data set under that key."""


class UnknownObjectError(RemoteError, KeyError):
    """The worker holds no object under that id for this session."""


class NotApprovedError(RemoteError):
    """The worker's owner has not approved the plan yet, or has denied it; says which, and why."""


class PolicyRefusedError(RemoteError):
    """The program that was to run breaks a rule of the worker's owner; `op`, `index` and `line` say where."""


class GetNotPermittedError(RemoteError):
    """Private data, or something computed from it, was asked for by a user who may not see it."""


class SignatureRefusedError(RemoteError):
    """The worker takes part in a secure aggregation only with workers that sign, and one did not; says which."""


class ReplyTooLargeError(RemoteError):
    """The answer is over the size that this client takes; what it would have brought stays on the worker."""


class UpdateRefusedError(PlanrtError, ValueError):
    """The update that a worker returned from a round cannot count: another shape, no number, too many samples.

    `worker_id` is the worker; the message says which entry of its update, and what is wrong with it.
    """

    def __init__(self, message: str, *, worker_id: str) -> None:
        super().__init__(f"worker {worker_id!r}: {message}")
        self.reason = message
        self.worker_id = worker_id


class QuorumError(PlanrtError, RuntimeError):
    """A round had too few workers that count, and made nothing; the state that it was given is as it was.

    `missing` says of each worker that does not count why (id -> reason), `answered` are the ids of those that do, and
    `needed` is how many it takes.
    """

    def __init__(
        self, message: str, *, missing: Mapping[str, str], answered: Sequence[str], needed: int
    ) -> None:
        super().__init__(message)
        self.missing = dict(missing)
        self.answered = tuple(answered)
        self.needed = needed


class TransportError(PlanrtError):
    """A connection could not be made or broke; `address` says which."""

    def __init__(self, message: str, *, address: str) -> None:
        super().__init__(message)
        self.address = address


class ConnectError(TransportError, ConnectionRefusedError):
    """Nobody listens at the address, it is malformed, refused the connection or did not answer in time."""


class HandshakeError(TransportError, RuntimeError):
    """The other side answered, but is not a worker (or client) that fits this one."""


class WireError(TransportError):
    """Bytes that are not a valid planrt message."""


class MessageTooLargeError(TransportError):
    """A message is over a configured limit. On the way out, nothing was sent, and the connection goes on."""


class WorkerLostError(TransportError, ConnectionResetError):
    """The connection to a worker ended while an answer was due; `worker_id` names it, `step` a protocol's
    step."""

    def __init__(self, message: str, *, address: str, worker_id: str, step: str | None = None) -> None:
        super().__init__(message, address=address)
        self.worker_id = worker_id
        self.step = step


class SessionLostError(WorkerLostError):
    """The worker is there, and has nothing of the session before: it was started again, or kept the session no longer.

    What was under way is lost, and so are the objects of that session; the message names them. New work goes on.
    """


class WorkerTimeoutError(TransportError, TimeoutError):
    """A worker did not answer in time; `worker_id` names it, `seconds` is how long that was, `step` a protocol's step.

    The connection stays, and the answer is not waited for any more. What was asked may have been done there.
    """

    def __init__(
        self, message: str, *, address: str, worker_id: str, seconds: float, step: str | None = None
    ) -> None:
        super().__init__(message, address=address)
        self.worker_id = worker_id
        self.seconds = seconds
        self.step = step

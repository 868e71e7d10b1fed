"""What a data owner decided about plans, on disk: an append-only file of decisions, and the plans that wait.

    FOLDER/
      decisions.jsonl     one decision a line, each with the SHA-256 of the line before
      pending/HASH.plan   plans that clients asked for and nobody has decided yet
      decided/HASH.plan   the same after a decision, to look at later
      asked/HASH.jsonl    who asked for the plan, on which data, and what for: an `Asking` a line

HASH is what decisions are filed under: the plan's hash, or where the plan has constants one of the plan and
their values (`planrt.plans.ir.constants`).

A line is a JSON object with the keys of `Decision` and ``previous``: 64 hex digits, the SHA-256 of the line
before without its newline, zeros for the first. So a line that was changed, removed or put in between later
shows, and is an error. The last lines can be cut off unseen, and who may write the file may write a new one:
keep a copy of the last line's hash elsewhere if that matters (`planrt decisions` prints it).

The worker reads here while `planrt approve` writes: writers hold a lock and write a line in one piece,
readers look whether the file changed.
"""

from __future__ import annotations

import getpass
import io
import json
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple, Protocol

from planrt.chained import FIRST, ChainError, links, sealed, write_whole
from planrt.errors import ApprovalError

Verdict = Literal["approved", "denied"]
Standing = Literal["approved", "denied", "pending", "unknown"]

MAX_PENDING: Final = 100
"""Most plans that wait at a time."""
MAX_PENDING_BYTES: Final = 256 * 2**20
"""Most bytes of all plans that wait."""
MIN_PREFIX: Final = 8
"""Fewest digits by which a plan may be named."""
MAX_TEXT: Final = 1000
"""Longest reason or name, in characters."""
MAX_ASKINGS: Final = 20
"""Most different askings that are kept of a plan; later ones are not."""
MAX_ASKINGS_OF_ONE: Final = 5
"""Most of them by one user; clients without a token are one."""

JOINT_SUFFIX: Final = ".joint"
"""Of the file of a joint run that waits: text, which says what it does."""
JOINT_HEAD: Final = b"joint run of "
"""The bytes that such a text begins with, and no plan."""


class QueueFullError(ApprovalError):
    """No more plans can wait for the owner: of this user, or of all."""


class Status(NamedTuple):
    """The decision about a plan, or that there is none yet, and the owner's words if there are any."""

    status: Standing
    why: str = ""


@dataclass(frozen=True, slots=True)
class Decision:
    """One line of the record. `time` is ISO 8601 in UTC; `policy` the version of the policy at that time, or
    ``""``."""

    plan: str
    decision: Verdict
    why: str
    by: str
    time: str
    policy: str


@dataclass(frozen=True, slots=True)
class Pending:
    """A plan that waits: its hash, its file, its length in bytes and when it came (ISO 8601 in UTC)."""

    plan: str
    path: Path
    size: int
    since: str


@dataclass(frozen=True, slots=True)
class Asking:
    """The facts known of somebody who asked for a plan. `time` is ISO 8601 in UTC.

    `user` was proved by a token, and is ``""`` for a client that showed none; `data` (keys of data sets, or
    tags of private tensors) is what the worker was asked to run it on. The rest is what the asker says: the
    plan's name, those of its inputs, and the purpose.
    """

    name: str = ""
    inputs: tuple[str, ...] = ()
    user: str = ""
    data: tuple[str, ...] = ()
    purpose: str = ""
    time: str = ""


class Decisions(Protocol):
    """Answers a worker about plans: `Approvals` does, or who asks them for it."""

    def status(self, plan: str) -> Status:
        """See `Approvals.status`."""

    def submit(
        self, plan: str, data: bytes, *, asking: Asking | None = None, most: int | None = None
    ) -> Status:
        """See `Approvals.submit`."""

    def askings(self, plan: str) -> list[Asking]:
        """See `Approvals.askings`."""


class Approvals:
    """The decisions in `folder`, which is made if it is not there.

    `max_pending` and `max_pending_bytes` bound what clients can put on the owner's disk.

    Raises:
        ApprovalError: the folder cannot be used, or its record is broken.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        max_pending: int = MAX_PENDING,
        max_pending_bytes: int = MAX_PENDING_BYTES,
    ) -> None:
        self.folder = Path(folder)
        self.max_pending = max_pending
        self.max_pending_bytes = max_pending_bytes
        self._file = self.folder / "decisions.jsonl"
        self._waiting = self.folder / "pending"
        self._asked = self.folder / "asked"
        self._seen: tuple[int, int, int] | None = None
        self._decisions: list[Decision] = []
        self._latest: dict[str, Decision] = {}
        self._last_hash = FIRST
        try:
            self._waiting.mkdir(parents=True, exist_ok=True)
            (self.folder / "decided").mkdir(exist_ok=True)
            self._asked.mkdir(exist_ok=True)
        except OSError as error:
            raise ApprovalError(f"{self.folder} cannot hold decisions: {error.strerror or error}") from None
        self._refresh()

    # Reading

    def status(self, plan: str) -> Status:
        """Returns the decision about a plan. It is cheap: the record is read only when it changed.

        Raises:
            ApprovalError: the record is broken.
        """
        self._refresh()
        latest = self._latest.get(plan)
        if latest is not None:
            return Status(latest.decision, latest.why)
        waits = _is_hash(plan) and any(self._waiting.glob(f"{plan}.*"))
        return Status("pending") if waits else Status("unknown")

    def decisions(self) -> list[Decision]:
        """Returns every decision, the oldest first."""
        self._refresh()
        return list(self._decisions)

    @property
    def head(self) -> str:
        """The SHA-256 of the last line: it stands for the whole record."""
        self._refresh()
        return self._last_hash

    def pending(self) -> list[Pending]:
        """Returns the plans that wait, the oldest first."""
        found = []
        for path in self._waiting.iterdir():
            plan = path.name.partition(".")[0]
            if _is_hash(plan):
                about = path.stat()
                found.append((about.st_mtime_ns, Pending(plan, path, about.st_size, _iso(about.st_mtime))))
        return [one for _, one in sorted(found, key=lambda pair: (pair[0], pair[1].plan))]

    def askings(self, plan: str) -> list[Asking]:
        """Lists who asked for a plan, the first one first. Entries that cannot be read are left out: nothing
        depends on them."""
        try:
            lines = (self._asked / f"{plan}.jsonl").read_bytes().splitlines()
        except OSError:
            return []
        return [found for line in lines[:MAX_ASKINGS] if (found := _asking(line)) is not None]

    def resolve(self, prefix: str) -> str:
        """Returns the hash that begins with `prefix`, among the plans that wait and those decided. A whole
        hash is itself.

        Raises:
            ApprovalError: too short, none, or more than one.
        """
        if _is_hash(prefix):
            return prefix
        if not re.fullmatch(r"[0-9a-f]*", prefix) or len(prefix) < MIN_PREFIX:
            raise ApprovalError(
                f"{_shortened(prefix)!r} does not name a plan: give its hash, or the first {MIN_PREFIX} digits or more"
            )
        self._refresh()
        known = {one.plan for one in self.pending()} | set(self._latest)
        found = sorted(plan for plan in known if plan.startswith(prefix))
        if not found:
            raise ApprovalError(f"no plan that begins with {prefix} waits or was decided in {self.folder}")
        if len(found) > 1:
            raise ApprovalError(f"{len(found)} plans begin with {prefix}: give more digits")
        return found[0]

    # Writing

    def submit(
        self,
        plan: str,
        data: bytes,
        *,
        asking: Asking | None = None,
        most: int | None = None,
        suffix: str = ".plan",
    ) -> Status:
        """Put a plan before the owner, unless it waits already or was decided. Returns how it stands.

        `asking` is noted next to it, as `asked` does. `most` bounds the plans that wait and that its user was
        the first to ask for, and their bytes in proportion; clients without a token are one user.

        Raises:
            QueueFullError: no more can wait. ApprovalError: no hash, or it cannot be written.
        """
        if data.startswith(JOINT_HEAD):
            suffix = JOINT_SUFFIX
        if not _is_hash(plan) or not re.fullmatch(r"\.[a-z]{1,16}", suffix):
            raise ApprovalError(
                f"{_shortened(plan)!r}{_shortened(suffix)} is not a plan's file: its hash has 64 digits"
            )
        with self._writing():
            standing = self.status(plan)
            if standing.status == "unknown":
                waiting = self.pending()
                self._check_room(waiting, len(data), self.max_pending, "wait")
                if asking is not None and most is not None:
                    own = [
                        one
                        for one in waiting
                        if [each.user for each in self.askings(one.plan)][:1] == [asking.user]
                    ]
                    self._check_room(own, len(data), most, "of one user wait")
                self._add(self._waiting / f"{plan}{suffix}", data)
                standing = Status("pending")
            if asking is not None and standing.status == "pending":
                self._note(plan, asking)
            return standing

    def _check_room(self, waiting: Sequence[Pending], size: int, most: int, what: str) -> None:
        if len(waiting) >= most:
            raise QueueFullError(f"{len(waiting)} plans {what} for the owner already: ask again later")
        limit = self.max_pending_bytes * min(most, self.max_pending) // self.max_pending
        if sum(one.size for one in waiting) + size > limit:
            raise QueueFullError(
                f"a plan of {size:,} bytes, with those that {what} for the owner, is more than {limit:,} bytes"
            )

    def _add(self, path: Path, data: bytes) -> None:
        handle, name = tempfile.mkstemp(dir=self.folder, prefix="incoming-")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(name, path)
        except BaseException:
            os.unlink(name)
            raise

    def asked(self, plan: str, asking: Asking) -> None:
        """Note who asks for a plan that waits. Texts are cut; the same is noted once, `MAX_ASKINGS` in all,
        and `MAX_ASKINGS_OF_ONE` of one user.

        Raises:
            ApprovalError: it cannot be written.
        """
        if self.status(plan).status == "pending":
            with self._writing():
                self._note(plan, asking)

    def _note(self, plan: str, asking: Asking) -> None:
        cut, before = _cut(asking), self.askings(plan)
        of_one = sum(one.user == cut.user for one in before)
        if (
            len(before) >= MAX_ASKINGS
            or of_one >= MAX_ASKINGS_OF_ONE
            or any(_same(cut, one) for one in before)
        ):
            return
        line = json.dumps(asdict(replace(cut, time=_iso()))) + "\n"
        with open(self._asked / f"{plan}.jsonl", "a", encoding="utf-8") as file:
            file.write(line)

    def approve(self, plan: str, *, by: str | None = None, why: str = "", policy: str = "") -> Decision:
        """Record that the plan (its hash, or enough of it) may run; a later decision about it counts.

        Raises:
            ApprovalError: an unknown plan, an unusable name or reason, a broken record, or it cannot be
                written.
        """
        return self._decide(plan, "approved", by, why, policy)

    def deny(self, plan: str, *, why: str, by: str | None = None, policy: str = "") -> Decision:
        """Record that the plan may not run, and why: its author is told. Otherwise as `approve`."""
        if not why.strip():
            raise ApprovalError("say why the plan is denied: its author is told")
        return self._decide(plan, "denied", by, why, policy)

    def deny_all_of(
        self, user: str, *, why: str, by: str | None = None, policy: str = ""
    ) -> tuple[list[Decision], list[Pending]]:
        """Deny every plan that waits and that only `user` asked for; ``""`` is everybody without a token.

        Returns the decisions, and the plans that wait still because others asked for them as well.

        Raises:
            ApprovalError: as `deny`.
        """
        made, left = [], []
        for one in self.pending():
            users = {asking.user for asking in self.askings(one.plan)}
            if users == {user}:
                made.append(self.deny(one.plan, why=why, by=by, policy=policy))
            elif user in users:
                left.append(one)
        return made, left

    def _decide(self, plan: str, verdict: Verdict, by: str | None, why: str, policy: str) -> Decision:
        full = self.resolve(plan)
        who = _user() if by is None else by
        for name, text in (("the name", who), ("the reason", why)):
            if len(text) > MAX_TEXT or not text.isprintable():
                raise ApprovalError(f"{name} must be one line of at most {MAX_TEXT} printable characters")
        if not who.strip():
            raise ApprovalError("say who decides")
        decision = Decision(full, verdict, why, who, _iso(), policy)
        with self._locked():
            self._refresh()
            self._append(decision)
            self._refresh()
            for path in self._waiting.glob(f"{full}.*"):
                os.replace(path, self.folder / "decided" / path.name)
        return decision

    def _append(self, decision: Decision) -> None:
        line, _ = sealed(asdict(decision), self._last_hash)
        try:
            file = os.open(self._file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                write_whole(file, line)
                os.fsync(file)
            finally:
                os.close(file)
        except OSError as error:
            raise ApprovalError(f"{self._file}: {error.strerror or error}") from None

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """`_locked`; what the system says against it is an `ApprovalError`."""
        try:
            with self._locked():
                yield
        except OSError as error:
            raise ApprovalError(f"{self.folder} cannot be written: {error.strerror or error}") from None

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Keeps other writers away, in this process and others."""
        import fcntl  # only where there is a record to write: Windows has no such module

        with open(self.folder / "lock", "w", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    # The record

    def _refresh(self) -> None:
        try:
            about = os.stat(self._file)
        except FileNotFoundError:
            if self._decisions:
                raise ApprovalError(f"{self._file} is gone") from None
            return
        seen = (about.st_ino, about.st_size, about.st_mtime_ns)
        if seen == self._seen:
            return
        try:
            data = self._file.read_bytes()
        except OSError as error:
            raise ApprovalError(f"{self._file}: {error.strerror or error}") from None
        decisions, last = _read(data, str(self._file))
        if decisions[: len(self._decisions)] != self._decisions:
            raise ApprovalError(f"{self._file} no longer holds the decisions that it held before")
        self._decisions, self._last_hash = decisions, last
        self._latest = {one.plan: one for one in decisions}
        self._seen = seen if len(data) == about.st_size else None  # grown meanwhile: look again


def _read(data: bytes, where: str) -> tuple[list[Decision], str]:
    """The decisions in the bytes of a record, and the hash of its last line.

    Raises:
        ApprovalError: names the first line that is not what it should be.
    """
    decisions: list[Decision] = []
    last = FIRST
    wanted = sorted(one.name for one in fields(Decision))
    try:
        for link in links(io.BytesIO(data), where, what="a decision"):
            number, values, last = link
            if sorted(values) != wanted:
                raise ApprovalError(f"{where}, line {number}: not a decision")
            decisions.append(_decision(values, f"{where}, line {number}"))
    except ChainError as error:
        raise ApprovalError(str(error)) from None
    return decisions, last


def _decision(values: dict[str, Any], where: str) -> Decision:
    if not all(isinstance(value, str) for value in values.values()):
        raise ApprovalError(f"{where}: not a decision")
    if not _is_hash(values["plan"]) or values["decision"] not in ("approved", "denied"):
        raise ApprovalError(f"{where}: not a decision about a plan")
    return Decision(**values)


def _cut(asking: Asking) -> Asking:
    """An asking of bounded size, in characters that can be written."""

    def text(value: str, longest: int = 200) -> str:
        return value.encode(errors="backslashreplace").decode()[:longest]

    return Asking(
        text(asking.name),
        tuple(text(one) for one in asking.inputs[:32]),
        text(asking.user),
        tuple(text(one) for one in asking.data[:32]),
        text(asking.purpose, MAX_TEXT),
    )


def _same(one: Asking, other: Asking) -> bool:
    """Whether `other` says all that `one` does."""
    return replace(one, time="", data=()) == replace(other, time="", data=()) and set(one.data) <= set(
        other.data
    )


def _asking(line: bytes) -> Asking | None:
    try:
        values = json.loads(line)
        made = Asking(**{**values, "inputs": tuple(values["inputs"]), "data": tuple(values["data"])})
    except (ValueError, TypeError, KeyError, AttributeError):
        return None
    texts = [made.name, made.user, made.purpose, made.time, *made.inputs, *made.data]
    return made if all(isinstance(text, str) for text in texts) else None


def _is_hash(text: str) -> bool:
    return re.fullmatch(r"[0-9a-f]{64}", text) is not None


def _shortened(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:77]}..."


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container without a user database
        return f"uid {os.getuid()}" if hasattr(os, "getuid") else "unknown"


def _iso(seconds: float | None = None) -> str:
    now = datetime.now(UTC) if seconds is None else datetime.fromtimestamp(seconds, UTC)
    return now.isoformat(timespec="seconds").replace("+00:00", "Z")

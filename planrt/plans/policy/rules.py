"""What a data owner allows: which ops, how much of the machine, who must have said yes, and what may be
released.

A policy is a TOML file (`examples/hospital_policy.toml` explains every key) or a `Policy`. It is checked
before a plan runs, by `planrt.plans.policy.verify.check`, on what `planrt.plans.analysis.analyse` finds out
from shapes alone.

**What release rules mean.** ``min_rows = 20`` for a tag: whatever leaves a plan and depends on an input with
that tag went through aggregates (sums, means, products over rows, losses, ...) over at least 20 rows each.
Rows are the entries of dimension 0. A maximum, a median or a sorted value is one row's value and no
aggregate. A gradient with respect to shared parameters is one; a gradient with respect to something with a
place for each row is not. Nor is one of an embedding's table: each of its entries is about those rows alone that have
that word, and there may be one. Train such a model with its table frozen (`requires_grad_(False)`).

**What they do not stop.** They look at the form of a program. They catch mistakes and plain requests for
data; they are no proof of privacy:

A rule is about the form of one run. Against an attacker who is patient it is a price on each question, not a
lock. Counts by value (``bincount``, ``histc``) are a table to look values up in, so they lose the rows. An
evaluation's counts of classes leave only where each is of none or of at least ``min_rows`` rows, and a
batch's predictions must each be about its own row.

* *Weights.* A weighted sum whose weights are 0 but for one row is that row. Masks, `where`, losses with
  weights, an `ignore_index` and writes of zeros into a copy do the same, and the weights may be computed
  inside the plan.
* *Differences.* The sum over 100 rows and the sum over 99 of them, in one plan or in two, give the last one.
* *Extremes in disguise.* ``logsumexp(1000 * x) / 1000`` is a maximum to three digits, a high norm likewise.
* *Gradients.* A permitted gradient over k rows can often be inverted to the rows it came from when k is
  small, and a trained model can remember them. What is learnt over many rounds adds up.
* *Repetition.* A row may appear in the data more than once, and one person may own many rows: the rule counts
  rows.
* *Lookup by hand.* ``(x == k).float().sum(0)`` counts who has the value k, and nobody sees how few they are.
* *Facts besides values.* Sizes of results, time, whether counts were withheld, and at which op a plan fails:
  the logarithm of the number of its ops in bits, `Policy.max_failures` times a session, and
  `Policy.max_daily_failures` times a day in all sessions of a user. The owner finds each in the worker's log.

Against somebody who wants to find out about a single person only noise helps (differential privacy), or
reading the plan before approving it. That is what ``approval = "ask"`` is for.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Literal, get_args

from planrt.deadlines import MOST_SECONDS
from planrt.errors import OptionError
from planrt.toml_files import read_toml

Approval = Literal["open", "list", "ask"]
Intersection = Literal["ids", "size", "none"]

_UNITS: Final = {
    "B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40,
    "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
}  # fmt: skip
_WHOLE: Final = (
    "max_ops", "max_flops", "max_memory", "max_input_bytes", "max_output_bytes", "max_failures",
    "max_daily_failures", "max_pending", "max_session_memory", "max_session_objects", "max_worker_memory",
    "max_worker_objects", "max_session_flops", "max_worker_flops",
)  # fmt: skip
"""Limits that are whole numbers above 0."""
MOST: Final = 2**63 - 1
"""The largest number that a limit may be; "none" is for no limit."""
ALL_PRIVATE: Final = "*"
"""The tag of a release rule for everything private, tagged or not."""


@dataclass(frozen=True)
class ReleaseRule:
    """A rule on what may leave a plan of what depends on inputs tagged `tag`: aggregates over at least
    `min_rows` rows.

    `aggregates` names the kinds that are allowed, of `planrt.plans.analysis.kernels.AGGREGATES`; None for
    all.

    Raises:
        OptionError: a value that cannot be used; names it.
    """

    tag: str
    min_rows: int
    aggregates: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.tag, str) or not (self.tag == ALL_PRIVATE or re.fullmatch(r"#\S+", self.tag)):
            raise OptionError(f'release.tag must be a tag such as "#patients", or "*": got {_cut(self.tag)}')
        _integer("release.min_rows", self.min_rows, 1)
        if self.aggregates is not None:
            _strings("release.aggregates", self.aggregates)
            from planrt.plans.analysis.kernels import AGGREGATES  # it needs torch, which most policies do not

            unknown = [name for name in self.aggregates if name not in AGGREGATES]
            if unknown:
                known = ", ".join(sorted(AGGREGATES))
                raise OptionError(f"release.aggregates: {unknown[0]!r} is none of {known}")

    def __str__(self) -> str:
        of = "all private data" if self.tag == ALL_PRIVATE else self.tag
        kinds = f" ({', '.join(self.aggregates)})" if self.aggregates is not None else ""
        return f"of {of} only aggregates over at least {self.min_rows} rows{kinds}"


@dataclass(frozen=True)
class Policy:
    """The rules of one data owner. The defaults ask before anything runs and keep a plan to a workstation's
    size.

    An owner who lets every plan run at once, and nothing of the patients out but aggregates of 20 rows::

        policy = Policy(approval="open", release=(ReleaseRule("#patients", 20),))
        report = mean.check(policy, tags={"x": ["#patients"]})
        report.ok, report.violations

    A worker gets it as ``WebsocketServerWorker(id, policy=policy)`` or ``planrt serve --policy FILE``, and
    holds each plan against it before it runs.

    Attributes:
        approval: "open": any plan within the rules runs. "list": only those whose hash is in `approved`.
            "ask": those, and others once the owner approved them; until then they wait.
        approved: hashes of plans (64 hex digits), as `planrt inspect` prints them: those of plans with
            constants are of the constants too.
        allow, deny: patterns (``nn.functional.*``) of op names: an op must match one of `allow` and none of
            `deny`.
        max_ops: ops of a plan.
        max_flops: floating-point operations of one run.
        max_memory: bytes at the peak of one run, inputs and state included.
        max_input_bytes, max_output_bytes: of one run.
        max_seconds: that one run may take.
        max_check_seconds: of processor time that holding a plan against these rules may take, before it runs.
        max_failures: runs of one session that may fail on data which it may not see, before the session is
            ended. Each failure tells one of the plan's ops, or that it was none of them.
        max_daily_failures: those of one user in a day, over all of its sessions; clients without a token or a
            certificate are one user for each address, and together have ten times as many. Who has none left runs
            nothing on such data until some come back: so many are there at first, and as many come in within a day.
            With isolation a process for a user's work that crashed, or took too long, counts as one.
        max_pending: plans that one user was the first to ask for and that wait for the owner; clients without
            a token are one user. They may take the same part of the bytes that are there for plans that wait.
        require_secure_aggregation: the fewest workers over which the sum of a training round must go. What this
            worker has learnt then leaves in secure aggregations only, and rounds without are refused. None: it may
            leave as it is. Evaluations tell figures of this worker alone either way.
        max_session_memory, max_session_objects: bytes and objects that the sessions of one user may keep, all of them
            together (`planrt.plans.policy.quotas` says what counts); clients without a token or a certificate are
            one user for each address that they come from.
        max_worker_memory, max_worker_objects: those that all users may keep together; the owner's own data do not
            count. By default what four users may keep who keep as much as they may, and the million objects that a
            worker holds in any case.
        max_session_flops, max_worker_flops: floating-point operations an hour that one user may compute, in all its
            sessions, and that all users may together (`planrt.plans.policy.budgets`). By default a hundred runs of the
            largest size that `max_flops` allows by default; for all users none, as a machine computes no more than it
            can.
        intersection: what parties of a joint run may learn of who is in this worker's tables. "ids": which of their
            own people are in it too, "size": how many, "none": nothing, so that there are no joint runs.
        release: rules for private data.

    `max_flops` and `max_memory` hold for a single op on pointers as well, for a backward pass, and for all batches of a
    round together, as for an evaluation's; `max_output_bytes` holds for a fetch and for a move to another worker.

    A limit of None is none. Bytes of memory and time are those that a run needs for the inputs it is given.

    Raises:
        OptionError: a value that cannot be used; names the key.
    """

    approval: Approval = "ask"
    approved: tuple[str, ...] = ()
    allow: tuple[str, ...] = ("*",)
    deny: tuple[str, ...] = ()
    max_ops: int | None = 10_000
    max_flops: int | None = 10**14
    max_memory: int | None = 8 * 2**30
    max_input_bytes: int | None = 4 * 2**30
    max_output_bytes: int | None = 2**30
    max_seconds: float | None = 600.0
    max_check_seconds: float | None = 10.0
    max_failures: int | None = 20
    max_daily_failures: int | None = 100
    max_pending: int | None = 20
    require_secure_aggregation: int | None = None
    max_session_memory: int | None = 16 * 2**30
    max_session_objects: int | None = 100_000
    max_worker_memory: int | None = 64 * 2**30
    max_worker_objects: int | None = 1_000_000
    max_session_flops: int | None = 10**16
    max_worker_flops: int | None = None
    intersection: Intersection = "ids"
    release: tuple[ReleaseRule, ...] = ()

    def __post_init__(self) -> None:
        if self.approval not in get_args(Approval):
            raise OptionError(f'approval must be "open", "list" or "ask", got {_cut(self.approval)}')
        if self.intersection not in get_args(Intersection):
            raise OptionError(f'intersection must be "ids", "size" or "none", got {_cut(self.intersection)}')
        for name in ("approved", "allow", "deny"):
            _strings(name, getattr(self, name))
        for text in self.approved:
            if not re.fullmatch(r"[0-9a-f]{64}", text):
                raise OptionError(f"approved: {text[:80]!r} is not a plan's hash (64 hex digits, lower case)")
        for name in ("allow", "deny"):
            for pattern in getattr(self, name):
                if pattern != "*" and not fnmatch.filter(_table(), pattern):
                    raise OptionError(f"{name}: {pattern!r} matches no op of the table")
        for name in _WHOLE:
            if getattr(self, name) is not None:
                _integer(name, getattr(self, name), 1)
        if self.require_secure_aggregation is not None:
            _integer("require_secure_aggregation", self.require_secure_aggregation, 2)
        for name in ("max_seconds", "max_check_seconds"):
            seconds = getattr(self, name)
            if seconds is not None and (
                isinstance(seconds, bool)
                or not isinstance(seconds, int | float)
                or not 0 < seconds <= MOST_SECONDS
            ):
                raise OptionError(
                    f"{name} must be a number of seconds above 0 and of at most {MOST_SECONDS:,}, got {_cut(seconds)}"
                )
        if not isinstance(self.release, tuple) or not all(
            isinstance(one, ReleaseRule) for one in self.release
        ):
            raise OptionError("release must be a tuple of ReleaseRule")

    @classmethod
    def from_file(cls, path: str | Path) -> Policy:
        """Reads the policy in a TOML file.

        Raises:
            OptionError: not there, not TOML, an unknown key, a wrong type or a value out of range; names file,
                line and key.
        """
        return read_toml(path, "policy", cls.from_values)

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> Policy:
        """Makes the policy that a mapping describes, as a TOML file holds it.

        Raises:
            OptionError: names the key.
        """
        known = [one.name for one in fields(cls)]
        arguments: dict[str, Any] = {}
        for key, value in values.items():
            if key not in known:
                raise OptionError(f"unknown key {key!r}; known are {', '.join(known)}")
            arguments[key] = _READERS.get(key, _as_is)(key, value)
        return cls(**arguments)

    @cached_property
    def version(self) -> str:
        """12 hex digits that tell this policy from others: of the SHA-256 of its canonical form.

        Keys that policies did not have from the beginning count where they differ from their defaults.
        """
        values = asdict(self)
        for name in (
            "max_failures", "max_daily_failures", "max_pending", "max_check_seconds", "max_session_memory",
            "max_session_objects", "max_worker_memory", "max_worker_objects", "max_session_flops", "max_worker_flops",
            "require_secure_aggregation", "intersection",
        ):  # fmt: skip
            if getattr(self, name) == getattr(type(self), name):
                del values[name]
        canonical = json.dumps(values, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()[:12]

    @property
    def counted(self) -> str:
        """The name of a limit of computation, for which operations are counted; ``""`` where there is none."""
        names = ("max_flops", "max_session_flops", "max_worker_flops")
        return next((name for name in names if getattr(self, name) is not None), "")

    @cached_property
    def allowed_ops(self) -> frozenset[str]:
        """The names of the table that plans may use."""
        table = _table()
        allowed = {name for pattern in self.allow for name in fnmatch.filter(table, pattern)}
        return frozenset(allowed - {name for pattern in self.deny for name in fnmatch.filter(table, pattern)})

    def __str__(self) -> str:
        from planrt.plans.analysis.report import count_bytes, count_flops

        limits: list[tuple[str, float | None, Callable[[Any], str]]] = [
            ("ops", self.max_ops, "{:,}".format),
            ("computation", self.max_flops, count_flops),
            ("memory", self.max_memory, count_bytes),
            ("bytes in", self.max_input_bytes, count_bytes),
            ("bytes out", self.max_output_bytes, count_bytes),
            ("seconds", self.max_seconds, "{:g}".format),
            ("seconds of the check before", self.max_check_seconds, "{:g}".format),
            ("failures on private data, a session", self.max_failures, "{:,}".format),
            ("failures on private data, a user and day", self.max_daily_failures, "{:,}".format),
            ("plans that wait, a user", self.max_pending, "{:,}".format),
            ("memory that a user's sessions keep", self.max_session_memory, count_bytes),
            ("objects that a user's sessions keep", self.max_session_objects, "{:,}".format),
            ("memory that all users keep", self.max_worker_memory, count_bytes),
            ("objects that all users keep", self.max_worker_objects, "{:,}".format),
            ("computation of a user, an hour", self.max_session_flops, count_flops),
            ("computation of all users, an hour", self.max_worker_flops, count_flops),
        ]
        says = {
            "open": "any plan within these rules runs",
            "list": f"only the {len(self.approved)} listed plans run",
            "ask": f"the owner is asked ({len(self.approved)} plans approved here)",
        }
        lines = [
            f"Policy {self.version}",
            f"  approval: {self.approval}: {says[self.approval]}",
            f"  ops: {len(self.allowed_ops):,} of {len(_table()):,} allowed",
            *[
                f"  {name}: {'no limit' if limit is None else 'at most ' + show(limit)}"
                for name, limit, show in limits
            ],
            *(
                [f"  intersection: others learn {_INTERSECTIONS[self.intersection]} of who is in a table"]
                if self.intersection != "ids"
                else []
            ),
            *(
                [
                    f"  training: in secure aggregations only, over at least {self.require_secure_aggregation} workers"
                ]
                if self.require_secure_aggregation is not None
                else []
            ),
            *[
                f"  release: {rule}"
                for rule in self.release or ["no rules: private data is not looked after"]
            ],
        ]
        return "\n".join(lines)


_INTERSECTIONS: Final = {"size": "the number", "none": "nothing"}


def _table() -> Mapping[str, Any]:
    """The table of ops. It is made of torch's functions, so it is imported by those who need it."""
    from planrt.plans.ir.ops import TABLE

    return TABLE


def _cut(value: Any) -> str:
    """Values as errors show them: of long ones the beginning."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _integer(name: str, value: Any, at_least: int) -> None:
    if type(value) is not int or value < at_least:
        raise OptionError(f"{name} must be a whole number, at least {at_least}: got {_cut(value)}")
    if value > MOST:
        raise OptionError(f"{name} must be a whole number of at most {MOST}: got one that is larger")


def _strings(name: str, value: Any) -> None:
    if not isinstance(value, tuple) or not all(isinstance(item, str) for item in value):
        raise OptionError(f"{name} must be a tuple of strings, got {_cut(value)}")


# Values as TOML has them


def _as_is(key: str, value: Any) -> Any:
    return value


def _limit(key: str, value: Any) -> Any:
    return None if value == "none" else value


def read_bytes(key: str, value: Any) -> Any:
    """Returns the number of bytes that a limit says: a number, ``"512 MiB"``, or ``"none"`` for None.

    Raises:
        OptionError: none of these; names the key.
    """
    if not isinstance(value, str) or value == "none":
        return _limit(key, value)
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]+)", value.strip())
    size = _UNITS.get(found[2]) if found else None
    if found is None or size is None:
        raise OptionError(f'{key} must be a number of bytes, or as "512 MiB", or "none": got {_cut(value)}')
    nbytes = float(found[1]) * size
    if nbytes > MOST:
        raise OptionError(f"{key} must be at most {MOST} bytes: got {_cut(value)}")
    return int(nbytes)


def _list(key: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise OptionError(f"{key} must be a list of strings, got {_cut(value)}")
    return tuple(value)


def _rules(key: str, value: Any) -> tuple[ReleaseRule, ...]:
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise OptionError("release must be tables: write [[release]]")
    rules = []
    for item in value:
        unknown = [name for name in item if name not in ("tag", "min_rows", "aggregates")]
        if unknown:
            raise OptionError(f"unknown key 'release.{unknown[0]}'; known are tag, min_rows, aggregates")
        for name in ("tag", "min_rows"):
            if name not in item:
                raise OptionError(f"release.{name} is missing")
        kinds = _list("release.aggregates", item["aggregates"]) if "aggregates" in item else None
        rules.append(ReleaseRule(item["tag"], item["min_rows"], kinds))
    return tuple(rules)


_READERS: Final[dict[str, Callable[[str, Any], Any]]] = {
    "approved": _list,
    "allow": _list,
    "deny": _list,
    "max_ops": _limit,
    "max_flops": _limit,
    "max_seconds": _limit,
    "max_check_seconds": _limit,
    "max_failures": _limit,
    "max_daily_failures": _limit,
    "max_pending": _limit,
    "require_secure_aggregation": _limit,
    "max_memory": read_bytes,
    "max_session_memory": read_bytes,
    "max_session_objects": _limit,
    "max_worker_memory": read_bytes,
    "max_worker_objects": _limit,
    "max_session_flops": _limit,
    "max_worker_flops": _limit,
    "max_input_bytes": read_bytes,
    "max_output_bytes": read_bytes,
    "release": _rules,
}

"""The owner's say over what runs: a worker with a policy asks its gate before every plan. No sockets, no loop.

A plan must have been approved, where the policy asks for that, and keep the policy's rules for the inputs at hand.
Where it computes on private data that its client may not read, and release rules cover all of that data, it may
give its results out: they went through the aggregates that the rules ask for. Everything else about private values
stays as it is without a policy (`planrt.workers.machine.private`).

Single operations (of pointers) are no plans that anybody could read beforehand: a worker that wants plans approved
runs none of them.
"""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any, Final

import torch

from planrt.errors import OptionError, PolicyError
from planrt.plans.analysis.findings import bytes_of
from planrt.plans.analysis.report import Report, Unforeseen, count_bytes, count_flops
from planrt.plans.ir import ops
from planrt.plans.ir.constants import Constant
from planrt.plans.ir.graph import Graph, Op
from planrt.plans.policy.approvals import (
    Approvals,
)
from planrt.plans.policy.budgets import CountsFailures, Failures
from planrt.plans.policy.passes import check_pass
from planrt.plans.policy.rules import ALL_PRIVATE, Policy, ReleaseRule
from planrt.plans.policy.single_ops import check_op
from planrt.plans.policy.verify import check_rules
from planrt.plans.training import check_classes
from planrt.types import Ref, TensorSpec, leaves
from planrt.workers.machine.approving import Approving
from planrt.workers.machine.audit import Auditor
from planrt.workers.wire.refusals import NotApproved

_REPORTS: Final = 1_000
_REPORTED_OPS: Final = 200_000
"""Reports that are kept, and ops in these: a plan is checked once for inputs of one size."""


@cache
def _named_alike() -> dict[str, tuple[str, ...]]:
    """The last part of a name, without underscores -> the ops of the table that are called so."""
    found: dict[str, list[str]] = {}
    for name in ops.TABLE:
        found.setdefault(name.rpartition(".")[2].strip("_"), []).append(name)
    return {key: tuple(sorted(names)) for key, names in found.items()}


class Gate:
    """Holds what clients want to run against one owner's policy.

    Args:
        policy: the rules.
        approvals: the folder of the owner's decisions; needed where the policy says ``approval = "ask"``.
        audit: is told what is put before the owner, and whose runs have failed too often.

    Raises:
        OptionError: plans would have to wait, and there is no place for them.
    """

    def __init__(
        self, policy: Policy, approvals: Approvals | None = None, audit: Auditor | None = None
    ) -> None:
        if policy.approval == "ask" and approvals is None:
            raise OptionError(
                'a policy with approval = "ask" needs a folder where plans wait for the owner: approvals=...'
            )
        self.policy = policy
        self.auditor = audit or Auditor()
        self.approving = Approving(policy, approvals, self.auditor)
        """The owner's decisions about plans."""
        self.failures: CountsFailures = Failures(policy.max_daily_failures)
        """Of runs on data, over all sessions."""
        self._reports: OrderedDict[object, Report] = OrderedDict()
        self._reported_ops = 0

    def admit_joint(
        self,
        text: str,
        *,
        features: Sequence[str],
        size_only: bool,
        owner: bool,
        tags: Iterable[str],
        dataset: str,
        user: str | None,
        purpose: str,
    ) -> None:
        """Raises unless a joint run may begin, which `text` says in words; puts it before the owner where it has to be.

        Raises:
            PolicyError: the policy has no such intersections, or release rules are about the table and nobody read what
                the run does. NotApproved: the owner has not said yes.
        """
        allowed = self.policy.intersection
        if owner and (allowed == "none" or (allowed == "size" and not size_only)):
            what = {"none": "nothing", "size": "the number of common people alone"}[allowed]
            raise PolicyError(
                f"of who is in this worker's tables others may learn {what}: intersection = {allowed!r}",
                rule="intersection",
            )
        if self.policy.approval == "open":
            if self.covers(tags):
                raise PolicyError(
                    "release rules are about this table, and what a joint run tells of it cannot be foreseen from its "
                    'form: its owner must read it first (approval = "ask" or "list")',
                    rule="release",
                )
            return
        self.approving.check_joint(text, features, dataset, user, purpose)

    # --------------------------------------------------------------------------------------- rules

    def admit(
        self,
        graph: Graph,
        inputs: Sequence[TensorSpec],
        tags: Mapping[int, Iterable[str]] | None = None,
        *,
        constants: Sequence[Constant],
        gradients: bool = False,
    ) -> Report:
        """Returns the report on a plan that may run on such inputs. `tags` are as `planrt.plans.policy.verify.check`
        takes them, `constants` as the method of that name returns them.

        Raises:
            NotApproved: the owner has not said yes. PolicyError: it breaks a rule; names op, line and rule.
        """
        self.approving.check(graph, constants)
        return self._report(graph, inputs, tags or {}, gradients).raise_for_violations()

    def _report(
        self, graph: Graph, inputs: Sequence[TensorSpec], tags: Mapping[int, Iterable[str]], gradients: bool
    ) -> Report:
        key = (graph.hash, tuple(inputs), tuple((place, tuple(sorted(names))) for place, names in tags.items()),
               gradients)  # fmt: skip
        found = self._reports.get(key)
        if found is None:
            found = self._reports[key] = check_rules(graph, self.policy, inputs, tags, gradients=gradients)
            self._reported_ops += len(graph.ops)
            while len(self._reports) > _REPORTS or self._reported_ops > _REPORTED_OPS:
                _, oldest = self._reports.popitem(last=False)
                self._reported_ops -= len(oldest.graph.ops)
        return found

    def least_rows(self, tags: Iterable[str]) -> int:
        """Returns of how many rows at least all is that release rules let leave of data with these tags; 0 without."""
        return max((rule.min_rows for rule in self._about(tags)), default=0)

    def covers(self, tags: Iterable[str]) -> bool:
        """Returns whether a release rule is about private data with these tags."""
        return bool(self._about(tags))

    def admit_training(
        self,
        graph: Graph,
        inputs: Sequence[TensorSpec],
        tags: Iterable[str],
        smallest: int,
        *,
        constants: Sequence[Constant],
        passes: float = 1,
        kept: float = 0,
    ) -> float:
        """Raises unless rounds of training may run on a data set with these tags; returns how many operations they
        compute.

        What leaves are sums over batches, of the gradients of which the smallest has `smallest` rows. Training makes
        `passes` forward and backward passes at most, and its optimizer keeps `kept` numbers for each parameter.

        Raises:
            NotApproved, PolicyError: as `admit`.
        """
        report = self.admit(graph, inputs, constants=constants, gradients=True)
        trained = sum(bytes_of(entry.spec) for entry in graph.state if entry.trainable)
        flops = self._check_all("training", report, passes, kept * trained)
        if self.covers(tags):
            self._check_release(graph, inputs, tags, smallest, gradients=True)
        return flops

    def admit_part(self, graph: Graph, inputs: Sequence[TensorSpec], *, gradients: bool) -> float:
        """Raises unless a part of a network may run in a joint run, which the owner was asked for as a whole; returns
        how many operations it computes.

        Raises:
            PolicyError: it breaks a rule; names op, line and rule.
        """
        report = self._report(graph, inputs, {}, gradients).raise_for_violations()
        return float(report.totals.flops)

    def _check_all(self, what: str, report: Report, passes: float, beside: float = 0) -> float:
        """Raises unless so many passes of a plan, one after the other, keep to the limits of one run, with so many
        bytes `beside` that stay from pass to pass; returns how many operations they compute."""
        once, most = report.totals.flops, self.policy.max_flops
        if most is not None and once * passes > most:
            raise PolicyError(
                f"{what} breaks the policy: [max_flops] {_number(passes)} passes over batches of {count_flops(once)} "
                f"each are more than the {count_flops(most)} allowed in one run: fewer batches a round",
                rule="max_flops",
            )
        peak, room = report.totals.peak_bytes, self.policy.max_memory
        if room is not None and peak + beside > room:
            raise PolicyError(
                f"{what} breaks the policy: [max_memory] {count_bytes(peak)} for a batch, and {_bytes(beside)} that "
                f"the optimizer keeps, are more than the {count_bytes(room)} allowed",
                rule="max_memory",
            )
        return once * passes if once else 0

    def admit_evaluation(
        self,
        graph: Graph,
        inputs: Sequence[TensorSpec],
        tags: Iterable[str],
        smallest: int,
        rows: int,
        *,
        bins: int,
        constants: Sequence[Constant],
        passes: int = 1,
    ) -> float:
        """Raises unless a plan may be evaluated on a data set with these tags; returns how many operations it computes.

        What leaves are the loss, of batches of which the smallest has `smallest` rows, and with `bins` counts of the
        predicted and the target classes over all `rows` (see `counts_leave`). Each of a batch's predictions must be
        about its own row: else they spell one row's value, a digit in each place. It makes `passes` passes.

        Raises:
            NotApproved, PolicyError: as `admit`. PlanArgumentError: there are no classes to count.
        """
        report = self.admit(graph, inputs, constants=constants)
        flops = self._check_all("evaluating", report, passes)
        prediction = report.outputs[1:2]
        if bins and not (prediction and isinstance(prediction[0].spec, Unforeseen)):
            spec = prediction[0].spec if prediction and isinstance(graph.outputs[1], Ref) else None
            check_classes(spec if isinstance(spec, TensorSpec) else None, inputs[1])
        if not self.covers(tags):
            return flops
        loss: Graph = replace(graph, outputs=(graph.outputs[0],))
        self._check_release(loss, inputs, tags, smallest, gradients=False)
        if bins:
            self._check_release(
                _counted(graph), inputs, tags, smallest, gradients=False, check_aggregates=False
            )
        for rule in self._about(tags):
            if rows < rule.min_rows:
                raise PolicyError(
                    f"counts over {rows} rows; the release of {rule.tag} asks for at least {rule.min_rows}",
                    rule="release",
                )
        return flops

    def counts_leave(self, tags: Iterable[str], counts: Iterable[int]) -> bool:
        """Returns whether counts of rows with these tags may leave: each is of none, or as many as rules ask for."""
        least = 0
        for rule in self._about(tags):
            if rule.aggregates is not None and "count" not in rule.aggregates:
                return False
            least = max(least, rule.min_rows)
        return all(count == 0 or count >= least for count in counts)

    def without_rule(self, tags: Iterable[str]) -> dict[str, str]:
        """Returns what to tell an owner who has release rules, and none about data with these tags; empty where all is
        well."""
        if not self.policy.release or self.covers(tags):
            return {}
        return {
            "tags": ", ".join(tags) or "none",
            "rules_are_about": ", ".join(sorted({rule.tag for rule in self.policy.release})),
            "so": "no rule holds what may leave of it",
        }

    def _about(self, tags: Iterable[str]) -> list[ReleaseRule]:
        names = set(tags)
        return [rule for rule in self.policy.release if rule.tag == ALL_PRIVATE or rule.tag in names]

    def _check_release(
        self,
        graph: Graph,
        inputs: Sequence[TensorSpec],
        tags: Iterable[str],
        smallest: int,
        *,
        gradients: bool,
        check_aggregates: bool = True,
    ) -> None:
        """Raises if release rules are broken for batches of `smallest` rows with these tags, data and targets.

        Without `check_aggregates` any kind of aggregate will do.
        """
        fewest = [_with_rows(spec, smallest) for spec in inputs]
        marked = dict.fromkeys(range(len(inputs)), tuple(tags))
        if check_aggregates:
            report = self._report(graph, fewest, marked, gradients)
        else:
            rules = tuple([replace(rule, aggregates=None) for rule in self.policy.release])
            policy = replace(self.policy, release=rules)
            report = check_rules(graph, policy, fewest, marked, gradients=gradients)
        broken = [one for one in report.violations if one.rule == "release"]
        try:
            report.with_violations(broken, report.policy_version, report.tags).raise_for_violations()
        except PolicyError as error:
            raise PolicyError(
                f"{error}; the smallest batch has {smallest} rows", rule=error.rule, op=error.op, index=error.index,
                line=error.line,
            ) from None  # fmt: skip

    def admit_op(self, name: str) -> None:
        """Raises unless single operations of that name may run; what they may take is for `admit_size`.

        Raises:
            NotApproved: the worker runs approved plans only. PolicyError: the policy does not allow the op.
        """
        if self.policy.approval != "open":
            raise NotApproved(
                f"{name}: this worker runs plans that its owner approved, and no single operations: write a plan "
                "(planrt.func2plan), and send it"
            )
        if name in ops.TABLE and name not in self.policy.allowed_ops:
            raise PolicyError(f"the policy does not allow {name}", rule="ops", op=name)

    def admit_kernel(self, kernel: str) -> None:
        """Raises unless single operations on shares by that kernel may run.

        One of the ops of the same name has to be allowed: function, method or in place. Kernels without a name of their
        own, which gradients are made of, may run.

        Raises:
            NotApproved, PolicyError: as `admit_op`.
        """
        self.admit_op(f"{kernel} on shares")
        names = _named_alike().get(kernel.strip("_"), ())
        if names and not any(name in self.policy.allowed_ops for name in names):
            raise PolicyError(
                f"the policy does not allow {names[0]}, on shares neither", rule="ops", op=names[0]
            )

    def admit_size(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
        """Raises unless op `name` keeps to the owner's limits on these arguments, and returns how many operations it
        computes: as `single_ops.check_op` does."""
        return check_op(self.policy, name, args, kwargs) if name in ops.TABLE else 0

    def admit_pass(
        self,
        name: str,
        roots: Sequence[torch.Tensor],
        inputs: Sequence[torch.Tensor] | None,
        *,
        create_graph: bool,
        times: int = 1,
    ) -> int:
        """Raises unless a backward pass keeps to the owner's limits, and returns how many operations it computes: as
        `passes.check_pass` does."""
        return check_pass(self.policy, name, roots, inputs, create_graph=create_graph, times=times)

    def admit_copy(self, tensors: Sequence[torch.Tensor]) -> None:
        """Raises unless these tensors may be there twice.

        Raises:
            PolicyError: they and their copies are more than one run may take.
        """
        most, nbytes = self.policy.max_memory, 2 * _size_of(tensors)
        if most is not None and nbytes > most:
            raise PolicyError(
                f"a copy breaks the policy: [max_memory] with what it is of it takes {count_bytes(nbytes)}, more than "
                f"the {count_bytes(most)} allowed",
                rule="max_memory",
            )

    def admit_answer(self, tensors: Sequence[torch.Tensor], what: str = "a fetch") -> None:
        """Raises unless tensors may leave in one piece, in an answer to a fetch or to another worker.

        Raises:
            PolicyError: they are more than the owner allows.
        """
        most, nbytes = self.policy.max_output_bytes, _size_of(tensors)
        if most is not None and nbytes > most:
            raise PolicyError(
                f"{what} breaks the policy: [max_output_bytes] what leaves takes {count_bytes(nbytes)}, more than the "
                f"{count_bytes(most)} allowed; nothing was removed: let it leave in parts",
                rule="max_output_bytes",
            )

    def deadline(self) -> float:
        """Returns when a run that begins now must be over, on `time.monotonic`'s clock."""
        limit = self.policy.max_seconds
        return math.inf if limit is None else time.monotonic() + limit


def _size_of(tensors: Iterable[torch.Tensor]) -> int:
    return sum(one.numel() * one.element_size() for one in tensors)


def _number(count: float) -> str:
    return f"{count:,}" if math.isfinite(count) else "endless"


def _bytes(count: float) -> str:
    return count_bytes(int(count)) if math.isfinite(count) else "endless memory"


def _counted(graph: Graph) -> Graph:
    """The plan with a sum over its predicted classes as its one output: for release rules what their counts are."""
    first = (
        len(graph.inputs)
        + len(graph.state)
        + sum(isinstance(leaf, Ref) for op in graph.ops for leaf in leaves(op.results))
    )
    ops = (
        Op("torch.argmax", (graph.outputs[1], 1), {}, Ref(first)),
        Op("torch.sum", (Ref(first), 0), {}, Ref(first + 1)),
    )
    return replace(graph, ops=(*graph.ops, *ops), outputs=(Ref(first + 1),), lines=(), modules=())


def _with_rows(spec: TensorSpec, rows: int) -> TensorSpec:
    return TensorSpec((rows, *spec.shape[1:]), spec.dtype) if spec.shape else spec

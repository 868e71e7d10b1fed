"""The owner's say over what runs: a worker with a policy asks its gate before every plan. No sockets, no loop.

A plan must have been approved, where the policy asks for that, and keep the policy's rules for the inputs at hand.
Where it computes on private data that its client may not read, and release rules cover all of that data, it may
give its results out: they went through the aggregates that the rules ask for. Everything else about private values
stays as it is without a policy (`planrt.workers.private`).

Single operations (of pointers) are no plans that anybody could read beforehand: a worker that wants plans approved
runs none of them.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Final

import torch

from planrt.errors import ApprovalError, LocalError, OptionError, PolicyError
from planrt.plans import ops
from planrt.plans.approvals import Approvals, Asking, Status
from planrt.plans.graph import Graph, Op
from planrt.plans.policy import ALL_PRIVATE, Policy, ReleaseRule
from planrt.plans.record import approval_hash, has_constants
from planrt.plans.report import Report, Unforeseen
from planrt.plans.training import check_classes
from planrt.plans.verify import check
from planrt.types import Ref, TensorSpec, leaves

_REPORTS: Final = 1_000
"""Reports that are kept: a plan is checked once for inputs of one size."""


class NotApprovedError(LocalError):
    """Reported to the client under this kind: the owner has not approved, or has denied, what was to run."""


class Gate:
    """Holds what clients want to run against one owner's policy.

    Args:
        policy: the rules.
        approvals: the folder of the owner's decisions; needed where the policy says ``approval = "ask"``.

    Raises:
        OptionError: plans would have to wait, and there is no place for them.
    """

    def __init__(self, policy: Policy, approvals: Approvals | None = None) -> None:
        if policy.approval == "ask" and approvals is None:
            raise OptionError(
                'a policy with approval = "ask" needs a folder where plans wait for the owner: approvals=...'
            )
        self.policy = policy
        self._approvals = approvals
        self._reports: OrderedDict[object, Report] = OrderedDict()

    # ------------------------------------------------------------------------------------ approval

    def arrived(
        self, graphs: Iterable[Graph], data: bytes, state: Sequence[torch.Tensor] | None = None
    ) -> None:
        """A client sent a plan: it is put before the owner, if it has to be. `data` is the file of it.

        A plan with constants is asked for with their values; without `state`, when it is to run.
        """
        if self.policy.approval != "ask" or self._approvals is None:
            return
        for graph in graphs:
            if state is None and has_constants(graph):
                continue
            asked = approval_hash(graph, state or ())
            if asked not in self.policy.approved:
                self._approvals.submit(asked, data)

    def asked(self, graph: Graph, user: str | None, data: Iterable[str] = (), purpose: str = "") -> None:
        """Tells the owner who asks for a plan that waits, for which data sets or tags of data, and what they say it is
        for.
        """
        if self.policy.approval == "ask" and self._approvals is not None:
            asking = Asking(graph.name, graph.input_names, user or "", tuple(data), purpose)
            with contextlib.suppress(ApprovalError):  # it is for the owner to read, and decides nothing
                self._approvals.asked(graph.hash, asking)

    def standing(self, plan: str) -> Status:
        """How it stands with the plan of that hash: approved, denied, pending or unknown, and the owner's words."""
        if self.policy.approval == "open" or plan in self.policy.approved:
            return Status("approved")
        if self.policy.approval == "list" or self._approvals is None:
            return Status("denied", "it is not on the owner's list")
        return self._approvals.status(plan)

    def _check_approved(self, graph: Graph, state: Sequence[torch.Tensor]) -> None:
        if self.policy.approval == "open":
            return
        asked = approval_hash(graph, state)
        try:
            status, why = self.standing(asked)
            if status == "unknown" and has_constants(graph) and self._approvals is not None:
                status, why = self._approvals.submit(asked, graph.to_bytes())
        except ApprovalError:
            raise NotApprovedError(
                "the record of the owner's decisions cannot be read, so nothing runs: the owner must look at it"
            ) from None
        if status == "approved":
            return
        said = {"denied": "was not approved", "pending": "waits for the owner's approval"}.get(
            status, "is not known to the owner yet: send it first"
        )
        raise NotApprovedError(f"plan {graph.name!r} ({asked}) {said}{f': {why}' if why else ''}")

    # --------------------------------------------------------------------------------------- rules

    def admit(
        self,
        graph: Graph,
        inputs: Sequence[TensorSpec],
        tags: Mapping[int, Iterable[str]] | None = None,
        *,
        state: Sequence[torch.Tensor],
        gradients: bool = False,
    ) -> Report:
        """The report on a plan that may run on such inputs; `tags` as `planrt.plans.verify.check` takes them. With the
        values of its `state`, of which the constants are part of what is approved.

        Raises:
            NotApprovedError: the owner has not said yes. PolicyError: it breaks a rule; names op, line and rule.
        """
        self._check_approved(graph, state)
        return self._report(graph, inputs, tags or {}, gradients).raise_for_violations()

    def _report(
        self, graph: Graph, inputs: Sequence[TensorSpec], tags: Mapping[int, Iterable[str]], gradients: bool
    ) -> Report:
        key = (graph.hash, tuple(inputs), tuple((place, tuple(sorted(names))) for place, names in tags.items()),
               gradients)  # fmt: skip
        found = self._reports.get(key)
        if found is None:
            found = check(graph, self.policy, inputs, tags, gradients=gradients)
            others = [
                one for one in found.violations if one.rule != "approval"
            ]  # asked for with its constants
            found = self._reports[key] = found.with_violations(others, found.policy_version, found.tags)
            while len(self._reports) > _REPORTS:
                self._reports.popitem(last=False)
        return found

    def covers(self, tags: Iterable[str]) -> bool:
        """Whether a release rule is about private data with these tags."""
        return bool(self._about(tags))

    def admit_training(
        self,
        graph: Graph,
        inputs: Sequence[TensorSpec],
        tags: Iterable[str],
        smallest: int,
        *,
        state: Sequence[torch.Tensor],
    ) -> None:
        """Raises unless rounds of training may run on a data set with these tags.

        What leaves are sums over batches, of the gradients of which the smallest has `smallest` rows.

        Raises:
            NotApprovedError, PolicyError: as `admit`.
        """
        self.admit(graph, inputs, state=state, gradients=True)
        if self.covers(tags):
            self._check_release(graph, inputs, tags, smallest, gradients=True)

    def admit_evaluation(
        self,
        graph: Graph,
        inputs: Sequence[TensorSpec],
        tags: Iterable[str],
        smallest: int,
        rows: int,
        *,
        bins: int,
        state: Sequence[torch.Tensor],
    ) -> None:
        """Raises unless a plan may be evaluated on a data set with these tags.

        What leaves are the loss, of batches of which the smallest has `smallest` rows, and with `bins` counts of the
        predicted and the target classes over all `rows` (see `counts_leave`). Each of a batch's predictions must be
        about its own row: else they spell one row's value, a digit in each place.

        Raises:
            NotApprovedError, PolicyError: as `admit`. PlanArgumentError: there are no classes to count.
        """
        prediction = self.admit(graph, inputs, state=state).outputs[1:2]
        if bins and not (prediction and isinstance(prediction[0].spec, Unforeseen)):
            spec = prediction[0].spec if prediction and isinstance(graph.outputs[1], Ref) else None
            check_classes(spec if isinstance(spec, TensorSpec) else None, inputs[1])
        if not self.covers(tags):
            return
        loss: Graph = replace(graph, outputs=(graph.outputs[0],))
        self._check_release(loss, inputs, tags, smallest, gradients=False)
        if bins:
            self._check_release(_counted(graph), inputs, tags, smallest, gradients=False, kinds=False)
        for rule in self._about(tags):
            if rows < rule.min_rows:
                raise PolicyError(
                    f"counts over {rows} rows; the release of {rule.tag} asks for at least {rule.min_rows}",
                    rule="release",
                )

    def counts_leave(self, tags: Iterable[str], counts: Iterable[int]) -> bool:
        """Whether counts of rows with these tags may leave: each is of none, or of as many as the rules ask for."""
        least = 0
        for rule in self._about(tags):
            if rule.aggregates is not None and "count" not in rule.aggregates:
                return False
            least = max(least, rule.min_rows)
        return all(count == 0 or count >= least for count in counts)

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
        kinds: bool = True,
    ) -> None:
        """Raises if release rules are broken for batches of `smallest` rows with these tags, data and targets.

        Without `kinds` any kind of aggregate will do.
        """
        fewest = [_with_rows(spec, smallest) for spec in inputs]
        marked = dict.fromkeys(range(len(inputs)), tuple(tags))
        if kinds:
            report = self._report(graph, fewest, marked, gradients)
        else:
            rules = tuple([replace(rule, aggregates=None) for rule in self.policy.release])
            report = check(graph, replace(self.policy, release=rules), fewest, marked, gradients=gradients)
        broken = [one for one in report.violations if one.rule == "release"]
        try:
            report.with_violations(broken, report.policy_version, report.tags).raise_for_violations()
        except PolicyError as error:
            raise PolicyError(
                f"{error}; the smallest batch has {smallest} rows", rule=error.rule, op=error.op, index=error.index,
                line=error.line,
            ) from None  # fmt: skip

    def admit_op(self, name: str) -> None:
        """Raises unless single operations of that name may run.

        Raises:
            NotApprovedError: the worker runs approved plans only. PolicyError: the policy does not allow the op.
        """
        if self.policy.approval != "open":
            raise NotApprovedError(
                f"{name}: this worker runs plans that its owner approved, and no single operations: write a plan "
                "(planrt.func2plan), and send it"
            )
        if name in ops.TABLE and name not in self.policy.allowed_ops:
            raise PolicyError(f"the policy does not allow {name}", rule="ops", op=name)

    def deadline(self) -> float:
        """When a run that begins now must be over, on `time.monotonic`'s clock."""
        limit = self.policy.max_seconds
        return math.inf if limit is None else time.monotonic() + limit


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

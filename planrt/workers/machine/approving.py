"""The owner's yes to plans, as a worker asks for it before it runs one: filed, waiting, given. No sockets, no threads.

Apart from `planrt.workers.machine.gate`, which holds what may run against the rules.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Final

import torch

from planrt.errors import ApprovalError
from planrt.logs import get_logger
from planrt.plans.ir.constants import Constant, approval_hash, constants_of, has_constants, waiting_bytes
from planrt.plans.ir.graph import Graph
from planrt.plans.ir.record import with_names
from planrt.plans.policy.approvals import Asking, Decisions, QueueFullError, Status
from planrt.plans.policy.rules import Policy
from planrt.workers.machine.audit import Auditor
from planrt.workers.wire.refusals import NotApproved

log = get_logger("planrt.worker")

_PROGRAMS: Final = 10_000
"""Plans with constants whose own hash is known by the one that decisions are filed under."""

_UNREADABLE: Final = (
    "the record of the owner's decisions cannot be read or written: the owner must look there"
)


class Approving:
    """The owner's decisions about plans, where a worker has a policy.

    Args:
        policy: the rules, which say whether plans need a yes.
        approvals: the owner's decisions, where plans wait for them.
        audit: is told what is put before the owner.
    """

    def __init__(self, policy: Policy, approvals: Decisions | None, audit: Auditor) -> None:
        self.policy = policy
        self._approvals = approvals
        self._audit = audit
        self._programs: OrderedDict[str, str] = OrderedDict()
        self._logged = ""
        """Why the record could not be read, as the owner was told last."""

    def ask(self, approvals: Decisions | None) -> None:
        """Asks these about plans from now on."""
        self._approvals = approvals

    def arrived(
        self,
        graphs: Iterable[Graph],
        data: bytes,
        state: Sequence[torch.Tensor] | None,
        user: str | None,
        purpose: str = "",
    ) -> list[str]:
        """Puts a plan that a client sent before the owner, if it has to be, with who asks and what they say it is for.

        `data` is the file of it. `state` is None where its values are to come when it runs: a plan with constants is
        put before the owner then (`asked`). Returns what decisions about it are filed under.

        Raises:
            NotApproved: it cannot wait for the owner.
        """
        filed = []
        for graph in graphs:
            if state is not None or not has_constants(graph):
                constants = self.constants(graph, state or ())
                filed.append(self._put_before_owner(graph, constants, data, user, (), purpose))
        return filed

    def asked(
        self,
        graph: Graph,
        constants: Sequence[Constant],
        user: str | None,
        data: Iterable[str] = (),
        purpose: str = "",
    ) -> str:
        """Asks the owner, if that was not done before, for a plan that a client wants to run; tells who asks, and for
        which data sets or tags of data. Returns what decisions about it are filed under.

        Raises:
            NotApproved: it cannot wait for the owner.
        """
        return self._put_before_owner(graph, constants, None, user, tuple(data), purpose)

    def constants(self, graph: Graph, state: Sequence[torch.Tensor]) -> tuple[Constant, ...]:
        """Returns the plan's constants, where approvals are of plans."""
        if self.policy.approval == "open" or not has_constants(graph):
            return ()
        return constants_of(graph, state)

    def _put_before_owner(
        self,
        graph: Graph,
        constants: Sequence[Constant],
        data: bytes | None,
        user: str | None,
        on: tuple[str, ...],
        purpose: str,
    ) -> str:
        filed = self._filed(graph, constants)
        if self.policy.approval != "ask" or self._approvals is None:
            return filed
        if self.standing(filed).status not in ("unknown", "pending"):
            return filed
        try:
            asking = Asking(graph.name, graph.input_names, user or "", on, purpose)
            waiting = waiting_bytes(with_names(graph) if data is None else data, constants)
            self._approvals.submit(filed, waiting, asking=asking, most=self.policy.max_pending)
            self._audit.asked(user, graph, filed, on, purpose)
        except QueueFullError as error:
            raise NotApproved(f"plan {graph.name!r} ({filed}) cannot wait for the owner: {error}") from None
        except ApprovalError as error:
            raise self._unreadable(error) from None
        return filed

    def standing(self, filed: str) -> Status:
        """Returns how it stands with what is filed under it: approved, denied, pending or unknown, and the reason.

        A denial of a plan's own hash is one of the plan with any constants.

        Raises:
            NotApproved: the record cannot be read.
        """
        if self.policy.approval == "open" or filed in self.policy.approved:
            return Status("approved")
        if self.policy.approval == "list" or self._approvals is None:
            return Status("denied", "it is not on the owner's list")
        try:
            program = self._programs.get(filed)
            if program is not None and (whole := self._approvals.status(program)).status == "denied":
                return whole
            return self._approvals.status(filed)
        except ApprovalError as error:
            raise self._unreadable(error) from None

    def _unreadable(self, error: ApprovalError) -> NotApproved:
        """What a client is told; the owner's log has the reason, once, however often clients ask."""
        if str(error) != self._logged:
            self._logged = str(error)
            log.error("decisions_not_read", error=str(error), instead="no plan runs that needs one")
        return NotApproved(_UNREADABLE)

    def told(self, filed: str, user: str | None, *, sent: bool) -> Status:
        """Returns how it stands with what is filed under it, as a client of that `user` is told: as `standing` where
        the client `sent` it, or a client of the same user asked for it once. To others nobody ever asked: they could
        guess at somebody else's plan, and read the owner's words about it.

        Raises:
            NotApproved: as `standing`.
        """
        standing = self.standing(filed)
        asks = self.policy.approval == "ask" and filed not in self.policy.approved
        if asks and not sent and self._approvals is not None:
            askings = self._approvals.askings(filed) if user is not None else ()
            if not any(one.user == user for one in askings):
                return Status("unknown")
        return standing

    def _filed(self, graph: Graph, constants: Sequence[Constant]) -> str:
        """The hash under which decisions about the plan are filed."""
        filed = approval_hash(graph, constants)
        if constants:
            self._programs[filed] = graph.hash
            self._programs.move_to_end(filed)
            while len(self._programs) > _PROGRAMS:
                self._programs.popitem(last=False)
        return filed

    def check(self, graph: Graph, constants: Sequence[Constant]) -> None:
        """Raises NotApproved unless the owner has said yes to a plan with these constants."""
        if self.policy.approval == "open":
            return
        filed = self._filed(graph, constants)
        status, why = self.standing(filed)
        if status == "approved":
            return
        if constants and self.standing(graph.hash).status == "approved":
            own = "its ops were approved, and an approval is of a plan's constants too"
            why = f"{why}; {own}" if why else own
        said = {"denied": "was not approved", "pending": "waits for the owner's approval"}.get(
            status, "is not known to the owner yet: send it first"
        )
        raise NotApproved(f"plan {graph.name!r} ({filed}) {said}{f': {why}' if why else ''}")

    def check_joint(
        self, text: str, features: Sequence[str], dataset: str, user: str | None, purpose: str
    ) -> None:
        """Raises unless the owner has said yes to a joint run, which `text` says in words; puts it before the owner
        where it has to be.

        Raises:
            NotApproved: the owner has not said yes.
        """
        filed = hashlib.sha256(text.encode()).hexdigest()
        standing = self.standing(filed)
        if standing.status == "unknown" and self.policy.approval == "ask" and self._approvals is not None:
            asking = Asking("joint run", tuple(features), user or "", (dataset,) if dataset else (), purpose)
            try:
                standing = self._approvals.submit(
                    filed, text.encode(), asking=asking, most=self.policy.max_pending
                )
            except QueueFullError as error:
                raise NotApproved(f"the joint run ({filed}) cannot wait for the owner: {error}") from None
            except ApprovalError as error:
                raise self._unreadable(error) from None
        if standing.status == "approved":
            return
        said = {"denied": "was not approved", "pending": "waits for the owner's approval"}
        why = f": {standing.why}" if standing.why else ""
        raise NotApproved(f"the joint run ({filed}) {said.get(standing.status, 'is not on the list')}{why}")

"""Plans that rounds send to a worker, kept for all of its sessions, and known by their hashes. No I/O.

So many are kept, and so many bytes of them; the least recently used goes first, and its client sends it again when it
needs it. A plan counts for the user who sent it, where there are quotas, for as long as it is there: with the memory
that its ops take, which is some `PLAN_BYTES` times what it takes as a file. Plans give way to whatever else their
user wants to keep.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Final

import torch

from planrt.errors import PlanError
from planrt.plans.ir.graph import Graph
from planrt.plans.policy.quotas import PLAN_BYTES, Account
from planrt.serde.frames import Limits
from planrt.workers.wire.refusals import UnknownPlan

MAX_PLAN_BYTES: Final = 64 << 20
"""Bytes as a file of any one plan that a worker takes."""


@dataclass(slots=True, eq=False)
class _Kept:
    graph: Graph
    nbytes: int
    accounts: list[Account] = field(default_factory=list)
    """Of the users who sent it, where they have quotas."""
    unlimited: bool = False
    """Whether a session without a quota has sent it, too."""

    def counts(self) -> int:
        return self.nbytes * PLAN_BYTES


class SentPlans:
    """The plans of one worker that rounds have sent. `limits` say how many are kept."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._plans: OrderedDict[str, _Kept] = OrderedDict()
        self._nbytes = 0

    @property
    def longest(self) -> int:
        """Bytes as a file of the longest plan that is taken."""
        return min(MAX_PLAN_BYTES, self._limits.round_plan_memory)

    def __len__(self) -> int:
        return len(self._plans)

    def find(self, hash: str) -> Graph:
        """Returns the plan of that hash.

        Raises:
            UnknownPlan: it is not here.
        """
        kept = self._plans.get(hash)
        if kept is None:
            raise UnknownPlan(f"no plan with the hash {hash}: send it first")
        self._plans.move_to_end(hash)
        return kept.graph

    def add(self, graph: Graph, nbytes: int, account: Account | None) -> None:
        """Keeps a plan of so many bytes for who has sent it; others may have to go.

        Raises:
            PolicyError: its user may not keep so much, though nothing else of theirs gives way any more.
        """
        kept = self._plans.get(graph.hash)
        if account is not None and (kept is None or account not in kept.accounts):
            account.check(beside=nbytes * PLAN_BYTES)  # which may let others go, this one included
            kept = self._plans.get(graph.hash)
        if kept is None:
            kept = self._plans[graph.hash] = _Kept(graph, nbytes)
            self._nbytes += nbytes
        if account is None:
            kept.unlimited = True
        elif account not in kept.accounts:
            account.take(beside=kept.counts())
            kept.accounts.append(account)
        self._plans.move_to_end(graph.hash)
        while len(self._plans) > self._limits.round_plans or self._nbytes > self._limits.round_plan_memory:
            self._forget(next(iter(self._plans)))

    def give_way(self, account: Account) -> bool:
        """Lets the plan go that a user has used longest ago; returns whether there was one."""
        for hash, kept in self._plans.items():
            if account in kept.accounts:
                kept.accounts.remove(account)
                account.give_back(beside=kept.counts())
                if not kept.accounts and not kept.unlimited:
                    self._forget(hash)
                return True
        return False

    def _forget(self, hash: str) -> None:
        kept = self._plans.pop(hash)
        self._nbytes -= kept.nbytes
        for account in kept.accounts:
            account.give_back(beside=kept.counts())


def check_size(data: torch.Tensor, most: int = MAX_PLAN_BYTES) -> None:
    """Raises PlanError if a plan that arrived takes more bytes than a worker reads of one."""
    if data.nbytes > most:
        raise PlanError(
            f"a plan of {data.nbytes:,} bytes is over the limit of {most:,}: values belong in its state"
        )

"""Who acts for a client in the runs of a protocol: tickets, for whoever sends something on to another worker.

A value goes straight from the worker that has it to the one that needs it; and where a worker runs a protocol, plans
and calls come from there. All of it is done in the client's name where the client has one.
"""

from __future__ import annotations

from collections.abc import Mapping

from planrt.plans.ir.chain import Chain
from planrt.workers.base import BaseWorker
from planrt.workers.client.tickets import Acts, forget_all, let_all
from planrt.workers.transport.addresses import reaches


class ActingPlaces:
    """The workers that a run of `chain` has act for its client: those of its places, and `host`, which runs it."""

    def __init__(
        self, chain: Chain, workers: Mapping[str, BaseWorker], host: BaseWorker | None = None
    ) -> None:
        ways = [
            (source, target)
            for source, target in _ways(chain)
            if reaches(workers[source].link_address, workers[target].link_address)
        ]
        self._puts: list[Acts] = [(workers[one].workplace, workers[other].workplace) for one, other in ways]
        self._computes: list[Acts] = (
            []
            if host is None
            else [(host.workplace, one.workplace) for one in dict.fromkeys(workers.values())]
        )

    async def let(self) -> None:
        """Gives each the tickets that it has not yet; it has them when this returns.

        Raises:
            RemoteError: a worker could not do it. WorkerLostError: a connection ended first.
        """
        await let_all(self._computes, "compute", confirm=True)
        await let_all(self._puts, "put", confirm=True)

    def forget(self) -> None:
        """Notes that tickets were over: the next run asks for others. This one cannot begin again by itself, as its
        plans may have changed what they were given."""
        forget_all(self._computes, "compute")
        forget_all(self._puts, "put")


def _ways(chain: Chain) -> list[tuple[str, str]]:
    """From which place to which one values may go: from who makes one, or takes it as an input, to who takes it."""
    found: dict[tuple[str, str], None] = {}
    for step in chain.steps:
        for ref in step.arguments:
            maker = chain.maker(ref.index)
            sources = (
                [chain.steps[maker].place]
                if maker is not None
                else [
                    other.place
                    for other in chain.steps
                    if ref.index in {one.index for one in other.arguments}
                ]
            )
            found.update({(source, step.place): None for source in sources if source != step.place})
    return list(found)

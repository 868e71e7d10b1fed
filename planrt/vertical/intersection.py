"""How many people two tables have in common, and nothing else."""

from __future__ import annotations

from planrt.loop import on_loop, run
from planrt.vertical.opening import DEFAULT_TIMEOUT, Plan
from planrt.vertical.parties import Party
from planrt.vertical.runs import JointRun


@on_loop
async def async_intersection_size(
    one: Party, other: Party, *, normalise: str = "strip", timeout: float = DEFAULT_TIMEOUT, purpose: str = ""
) -> int:
    """Returns what `intersection_size` does, to be awaited on any loop."""
    plan = Plan([one, other], normalise=normalise, size_only=True, timeout=timeout, purpose=purpose)
    joint = JointRun(plan.workers(), plan.opens(None))
    with joint:
        await joint._begin()
    return joint.size


def intersection_size(
    one: Party, other: Party, *, normalise: str = "strip", timeout: float = DEFAULT_TIMEOUT, purpose: str = ""
) -> int:
    """Returns how many people are in both tables.

    Both owners learn that number and the number of rows of the other's table; neither learns who it is
    (`planrt.sharing.columns.intersection`). So does this client. Owners whose policy says ``intersection = "size"``
    allow this and nothing more.

    Args:
        one, other: the tables, with their id columns; other columns are not looked at.
        normalise: what is done with ids before they are compared: "exact", "strip", "casefold" or "alphanumeric"
            (`planrt.sharing.columns.ids.NORMALISATIONS`).
        timeout: seconds that a party waits for the other one.
        purpose: what it is for, for the owners to read.

    Raises:
        DataError: an id column that is not there, or has duplicates; names party and column.
        NotApprovedError, PolicyRefusedError: an owner does not want it. JointError: a party is gone.
    """
    return run(
        async_intersection_size(one, other, normalise=normalise, timeout=timeout, purpose=purpose),
        instead="await async_intersection_size(one, other)",
    )

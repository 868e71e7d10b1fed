"""What a data owner allows: the rules, a check of a plan against them, and the owner's decisions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from planrt.lazy import names_of

if TYPE_CHECKING:
    from planrt.plans.policy.rules import Policy, ReleaseRule

_HOMES = {
    "Policy": "planrt.plans.policy.rules",
    "ReleaseRule": "planrt.plans.policy.rules",
}
"""Public name -> module, imported at first use: the list of plans that wait needs no torch."""

__all__ = ["Policy", "ReleaseRule"]

__getattr__ = names_of(__name__, _HOMES)

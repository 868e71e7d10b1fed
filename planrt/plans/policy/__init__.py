"""What a data owner allows: the rules, a check of a plan against them, and the owner's decisions."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from planrt.plans.policy.rules import Policy, ReleaseRule

_HOMES = {
    "Policy": "planrt.plans.policy.rules",
    "ReleaseRule": "planrt.plans.policy.rules",
}
"""Public name -> module, imported at first use: the list of plans that wait needs no torch."""

__all__ = ["Policy", "ReleaseRule"]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'planrt.plans.policy' has no attribute {name!r}")
    value = getattr(import_module(home), name)
    globals()[name] = value
    return value

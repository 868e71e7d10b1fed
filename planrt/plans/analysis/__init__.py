"""What a plan does, told without running it: sizes, cost, dependences, and where the rows of an input go."""

from __future__ import annotations

from typing import TYPE_CHECKING

from planrt.lazy import names_of

if TYPE_CHECKING:
    from planrt.plans.analysis.analysing import analyse
    from planrt.plans.analysis.report import Report

_HOMES = {
    "analyse": "planrt.plans.analysis.analysing",
    "Report": "planrt.plans.analysis.report",
}
"""Public name -> module, imported at first use."""

__all__ = ["analyse", "Report"]

__getattr__ = names_of(__name__, _HOMES)

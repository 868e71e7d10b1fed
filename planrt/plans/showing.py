"""How a plan looks when it is printed, and in notebooks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from planrt.cards import card
from planrt.plans.ir.text import show_name

if TYPE_CHECKING:
    from planrt.plans.plan import Plan


def plan_text(plan: Plan) -> str:
    """Returns what `print` shows: the head of the plan, and its ops, one a line."""
    name = show_name(plan.name)
    if plan._record is None:
        return f"<Plan {name} id:{plan.id} owner:me not built: call {name}.build(...)>"
    return f"<Plan {name} id:{plan.id} owner:me built>\n{plan.graph}"


def plan_line(plan: Plan) -> str:
    """Returns what `repr` shows: the plan on one line."""
    if plan._record is None:
        return plan_text(plan)
    graph = plan._record.graphs[-1]
    inside = f"{len(graph.inputs)} inputs, {len(graph.ops)} ops"
    return f"<Plan {show_name(plan.name)} id:{plan.id} owner:me built: {inside}>"


def plan_html(plan: Plan) -> str:
    """Returns what a notebook shows: facts about the plan, and its ops."""
    graph = plan._record.graph(training=plan.training) if plan._record is not None else None
    takes = [f"{graph.input_name(place)}: {spec}" for place, spec in enumerate(graph.inputs)] if graph else []
    return card(
        f"Plan {plan.name}",
        [
            ("built", "yes" if graph else f"no: call {plan.name}.build(...)"),
            ("hash", graph and graph.hash),
            ("takes", ", ".join(takes)),
            ("state", graph and f"{len(graph.state)} tensors"),
            ("ops", graph and len(graph.ops)),
            ("tags", " ".join(plan._tags)),
            ("description", plan._description.strip().partition("\n")[0]),
        ],
        text=graph.code if graph else "",
    )

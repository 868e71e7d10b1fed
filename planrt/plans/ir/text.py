"""Plans as text: the printed form, complete and readable, one value per line. `planrt.plans.ir.parsing` reads
it.

    plan Net sha256:32eb6db7aab057c19f1345d1bd2069bbfce85f032fb231f9f40e15df5b04a19d
      # The docstring, one comment a line.
      _0: input x float32[*, 2]
      _1: parameter fc.weight float32[3, 2]
      _2: parameter fc.bias float32[3] frozen
      _3 = torch.nn.functional.linear(_0, _1, _2)
      _4 = _3.add(1, alpha=2.0)
      return {'logits': _4}

The lines stand in the order of the numbers: inputs, state, ops, and what is returned. ``*`` is a free size.
State is a ``parameter``, a ``buffer`` or a ``constant``; a parameter that is not trained is ``frozen``,
anything else that asks for gradients is marked ``requires_grad``.

An op is written as PyTorch code would have it: ``torch.add(...)``, ``torch.nn.functional.relu(...)``; a
method (``Tensor.add`` in the table of ops) as ``_3.add(...)``, a property as ``_3.T``. Where a method's first
argument is no value of the plan, it is written ``torch.Tensor.add(...)``. Several results are ``_5, _6 = ``,
one that is not kept is ``_``, and a sequence of one is ``(_5,) = ``. `show` says how arguments are written.

Text that is not ASCII is escaped, but for docstrings, where control characters are: what an owner reads is
what is there. The hash (`Graph.hash`) stands in the first line only, so a plain text diff of two plans shows
what differs between them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

import torch

from planrt.serde.values import DEVICE
from planrt.shown import shown
from planrt.types import Nested, Ref

if TYPE_CHECKING:
    from planrt.plans.ir.graph import Graph, Op, StateSpec

PROPERTIES: Final = frozenset(
    f"Tensor.{word}" for word in ("H", "T", "data", "grad", "imag", "mH", "mT", "real")
)
"""Ops that are written without parentheses."""

PLAIN_NAME: Final = re.compile(r"[A-Za-z0-9_.]+")
"""Names of plans, inputs and state that are written without quotes."""
KEYWORD: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
"""Names of keyword arguments that are written ``name=value``."""


def show(value: Nested) -> str:
    """Writes a nested value as a line of source would have it.

    None, True, numbers, strings, ``...``, ``slice(0, 2, None)``, tuples, lists and dicts are written as in
    Python, dtypes, memory formats and layouts as in PyTorch. ``_3`` is a value of the plan, ``complex(1.0,
    2.0)`` a complex number, and ``DEVICE`` the device that the plan runs on.
    """
    if isinstance(value, str):
        return ascii(str(value))
    if isinstance(value, bool) or value is None:
        return str(value)
    if isinstance(value, int):
        return str(int(value))
    if isinstance(value, float):
        return repr(float(value))
    if isinstance(value, complex):
        return f"complex({value.real!r}, {value.imag!r})"
    if isinstance(value, tuple):
        return f"({', '.join(show(item) for item in value)}{',' if len(value) == 1 else ''})"
    if isinstance(value, list):
        return f"[{', '.join(show(item) for item in value)}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{show(key)}: {show(item)}' for key, item in value.items())}}}"
    if isinstance(value, slice):
        return f"slice({show(value.start)}, {show(value.stop)}, {show(value.step)})"
    if value is Ellipsis:
        return "..."
    return repr(DEVICE if isinstance(value, torch.device) else value)


def show_name(name: str) -> str:
    """Writes a name of a plan, an input or a state entry; in quotes unless it is plain."""
    return name if PLAIN_NAME.fullmatch(name) else ascii(name)


def op_line(op: Op) -> str:
    """Writes one op as a line: ``_5 = torch.nn.functional.linear(_0, _1, _2)``, ``_2 = _1.add(1)``."""
    positional = list(op.args)
    if op.name.startswith("Tensor.") and positional and isinstance(positional[0], Ref):
        called = f"{positional.pop(0)}.{op.name.removeprefix('Tensor.')}"
        if op.name in PROPERTIES:
            if not positional and not op.kwargs:
                return f"{_assigned(op.results)}{called}"
            called, positional = f"torch.{op.name}", list(op.args)
    else:
        called = op.name if op.name.startswith(("torch.", "operator.")) else f"torch.{op.name}"
    arguments = [show(argument) for argument in positional]
    for key, value in op.kwargs.items():
        plain = KEYWORD.fullmatch(key)
        arguments.append(f"{key}={show(value)}" if plain else f"**{show({key: value})}")
    return f"{_assigned(op.results)}{called}({', '.join(arguments)})"


def _assigned(results: Nested) -> str:
    if results is None:
        return ""
    if isinstance(results, tuple) and len(results) > 1:
        return f"{', '.join(_target(item) for item in results)} = "
    return f"{_target(results)} = "


def _target(results: Nested) -> str:
    if isinstance(results, tuple):
        return f"({', '.join(_target(item) for item in results)}{',' if len(results) == 1 else ''})"
    return "_" if results is None else show(results)


def input_line(number: int, name: str | None, spec: Any) -> str:
    """``_0: input x float32[*, 2]``; without a name where the plan has none."""
    return f"_{number}: input {'' if name is None else f'{show_name(name)} '}{spec}"


def state_line(number: int, entry: StateSpec) -> str:
    """``_1: parameter fc.bias float32[3] frozen``."""
    usual = entry.kind == "parameter"
    mark = "" if entry.requires_grad == usual else " frozen" if usual else " requires_grad"
    return f"_{number}: {entry.kind} {show_name(entry.name)} {entry.spec}{mark}"


def code_lines(graph: Graph) -> Iterator[str]:
    """Yields the lines of the ops, and of what is returned."""
    for op in graph.ops:
        yield op_line(op)
    yield f"return {show(graph.outputs)}"


def graph_text(graph: Graph) -> str:
    """Writes the whole plan as text; see the module's docstring."""
    lines = [f"plan {show_name(graph.name)} sha256:{graph.hash}"]
    lines += [f"  # {shown(line)}".rstrip() for line in graph.doc.split("\n") if graph.doc]
    for index, spec in enumerate(graph.inputs):
        name = graph.input_names[index] if index < len(graph.input_names) else None
        lines.append(f"  {input_line(index, name, spec)}")
    for index, entry in enumerate(graph.state, start=len(graph.inputs)):
        lines.append(f"  {state_line(index, entry)}")
    return "\n".join([*lines, *(f"  {line}" for line in code_lines(graph))])

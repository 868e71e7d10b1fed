"""Reads the printed form of a plan: `parse` is the inverse of `str(graph)`; `planrt.plans.ir.text` shows the
form.

A reader of its own, one line at a time: it evaluates nothing, builds plain values only, and takes names of
ops from the fixed table. Each line has one spelling, the printed one: what is parsed is printed again and
compared, so a plan has one text. Free are the spaces around lines, empty lines, and whether the hash is
given.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Final, get_args

from planrt.errors import PlanFormatError
from planrt.plans.ir import ops as table
from planrt.plans.ir.graph import MAX_BYTES, MAX_OPS, Graph, Op, StateKind, StateSpec
from planrt.plans.ir.line_reader import NUMBERED, SPEC, LineReader
from planrt.plans.ir.text import (
    KEYWORD,
    PROPERTIES,
    input_line,
    op_line,
    show,
    show_name,
    state_line,
)
from planrt.serde.values import MAX_DEPTH
from planrt.types import FREE, Nested, Ref, TensorSpec

MAX_CHARACTERS: Final = 4 * MAX_BYTES
"""Longest text that `parse` reads."""

_ASSIGNMENT = re.compile(r"([_0-9(), ]+) = ")
_CALLED = re.compile(r"[A-Za-z_][A-Za-z0-9_.]*")


def parse(text: str) -> Graph:
    """Parses the printed form of a graph, names and docstring included; the result has no state values.

    The hash in the first line may be left out; where it stands, it must be that of the lines below. The line
    ``<Plan ...>`` that `print(plan)` puts on top is passed over.

    Raises:
        PlanFormatError: anything else; says which line, and what was expected there.
    """
    if not isinstance(text, str):
        raise PlanFormatError(f"parse takes the text of a plan, not {type(text).__name__}")
    if len(text) > MAX_CHARACTERS:
        raise PlanFormatError(
            f"a text of {len(text)} characters is longer than the limit of {MAX_CHARACTERS}"
        )
    return _Reader(text).graph()


class _Reader:
    """Reads a text from top to bottom; `_known` values have numbers so far."""

    def __init__(self, text: str) -> None:
        self._lines = _lines(text)
        self._last = 0
        self._known = 0

    def graph(self) -> Graph:
        first = self._next("'plan NAME'")
        if first.text.startswith("<Plan ") and first.text.endswith(">"):
            first = self._next("'plan NAME'")
        name, digest = self._header(first)
        line = self._next("an input, state, an op, or what is returned")
        doc: list[str] = []
        while line.text.startswith("#"):
            doc.append(line.unescaped(line.text.removeprefix("#").removeprefix(" ")))
            line = self._next("an input, state, an op, or what is returned")
        inputs: list[TensorSpec] = []
        names: list[str] = []
        state: list[StateSpec] = []
        while re.match(r"_[0-9]+:", line.text):
            self._declaration(line, inputs, names, state)
            line = self._next("an op, or what is returned")
        ops: list[Op] = []
        while not line.accept("return "):
            if len(ops) == MAX_OPS:
                raise line.wrong(f"a plan has at most {MAX_OPS} ops")
            ops.append(self._op(line))
            line = self._next("an op, or what is returned")
        outputs = line.value(self._known, 0)
        line.end(f"return {show(outputs)}")
        for extra in self._lines:
            raise extra.fail("nothing after what is returned")
        made = Graph(
            tuple(inputs),
            tuple(state),
            tuple(ops),
            outputs,
            name=name,
            input_names=tuple(names),
            doc="\n".join(doc),
        )
        found = made.hash  # also when it is not asked for: what has no bytes is no plan
        if digest not in (None, found):
            raise first.wrong(
                f"the hash is that of another plan; that of the lines below is {found}: leave it out if you "
                "changed them"
            )
        return made

    def _next(self, expected: str) -> LineReader:
        line = next(self._lines, None)
        if line is None:
            raise PlanFormatError(f"line {self._last + 1}: expected {expected}, found the end of the text")
        self._last = line.number
        return line

    def _header(self, line: LineReader) -> tuple[str, str | None]:
        line.expect("plan ", "'plan NAME'")
        name = line.name("the plan's name")
        digest = None
        if line.accept(" sha256:"):
            found = line.match(re.compile("[0-9a-f]{64}"))
            if found is None:
                raise line.fail("the 64 hex digits of a SHA-256")
            digest = found[0]
        line.end(f"plan {show_name(name)}{'' if digest is None else f' sha256:{digest}'}")
        return name, digest

    def _declaration(
        self, line: LineReader, inputs: list[TensorSpec], names: list[str], state: list[StateSpec]
    ) -> None:
        line.expect(f"_{self._known}: ", f"'_{self._known}: ', the next number")
        self._known += 1
        if line.accept("input "):
            if state:
                raise line.wrong("inputs stand before the state")
            name = None if line.sees(SPEC) else line.name("the input's name, or its dtype and shape")
            if name is not None:
                line.expect(" ", "a dtype and a shape")
                if len(names) < len(inputs):
                    raise line.wrong("an input with a name after one without")
                names.append(name)
            inputs.append(line.spec())
            line.end(input_line(self._known - 1, name, inputs[-1]))
            return
        kind: StateKind | None = next((one for one in get_args(StateKind) if line.accept(f"{one} ")), None)
        if kind is None:
            raise line.fail("input, parameter, buffer or constant")
        name = line.name("the state's name")
        line.expect(" ", "a dtype and a shape")
        spec = line.spec()
        if FREE in spec.shape:
            raise line.wrong("state has no free sizes")
        usual = kind == "parameter"
        is_marked = line.accept(" frozen" if usual else " requires_grad")
        state.append(StateSpec(name, spec, kind, usual != is_marked))
        line.end(state_line(self._known - 1, state[-1]))

    def _op(self, line: LineReader) -> Op:
        known = self._known  # an op cannot take its own results
        results = self._results(line) if line.sees(_ASSIGNMENT) else None
        args: list[Any] = []
        if line.sees(NUMBERED):
            args.append(line.ref(known))
            line.expect(".", "a method of the value, such as .add(1)")
            found = line.match(_CALLED)
            if found is None:
                raise line.fail("the name of a method")
            name = f"Tensor.{found[0]}"
            has_arguments = name not in PROPERTIES
        else:
            found = line.match(_CALLED)
            if found is None:
                raise line.fail("an op: torch.NAME(...) or _0.NAME(...)")
            home, _, short = found[0].partition(".")
            name = short if home == "torch" and "." in short else found[0]
            has_arguments = True
        if name not in table.TABLE:
            raise line.wrong(f"{found[0][:80]} is no op that plans may use")
        kwargs = self._arguments(line, args, known) if has_arguments else {}
        op = Op(name, tuple(args), kwargs, results)
        line.end(op_line(op))
        return op

    def _arguments(self, line: LineReader, args: list[Any], known: int) -> dict[str, Any]:
        kwargs: dict[str, Any] = {}

        def argument() -> None:
            if line.accept("**"):
                named = line.value(known, 0)
                if not isinstance(named, dict) or named.keys() & kwargs.keys():
                    raise line.wrong("after ** stands a dict with keys of its own")
                kwargs.update(named)
            elif line.sees(_KEYWORD_EQUALS):
                found = line.match(KEYWORD)
                line.expect("=")
                assert found is not None  # noqa: S101 - it was seen
                if found[0] in kwargs:
                    raise line.wrong(f"the argument {found[0]} stands twice")
                kwargs[found[0]] = line.value(known, 1)
            elif kwargs:
                raise line.fail("an argument with a name, after one that has one")
            else:
                args.append(line.value(known, 1))

        line.expect("(")
        line.listed(")", argument)
        return kwargs

    def _results(self, line: LineReader) -> Nested:
        items = [self._target(line, 0)]
        while line.accept(", "):
            items.append(self._target(line, 1))
        line.expect(" = ")
        return items[0] if len(items) == 1 else tuple(items)

    def _target(self, line: LineReader, depth: int) -> Nested:
        if depth > MAX_DEPTH:
            raise line.wrong(f"results nested more than {MAX_DEPTH} levels deep")
        if line.accept("("):
            items: list[Any] = []
            line.listed(")", lambda: items.append(self._target(line, depth + 1)))
            return tuple(items)
        if not line.sees(NUMBERED):
            line.expect("_", "the number of a result, or _")
            return None
        self._known += 1
        if not line.accept(f"_{self._known - 1}"):
            raise line.fail(f"_{self._known - 1}, the next number")
        return Ref(self._known - 1)


_KEYWORD_EQUALS = re.compile(KEYWORD.pattern + "=")


def _lines(text: str) -> Iterator[LineReader]:
    """The lines that are not empty, without the spaces around them."""
    start, number = 0, 1
    while start <= len(text):
        stop = text.find("\n", start)
        stop = len(text) if stop < 0 else stop
        line = text[start:stop].strip(" \r")
        if line:
            yield LineReader(line, number)
        start, number = stop + 1, number + 1

"""``python -m fuzz.ops --calls N --seed S``: calls every op of the table with hostile arguments.

Two processes make the same calls through a worker's checks (`fuzz.calls`); wherever malloc hands out memory, one finds
another byte in it than the other. A finding is a call that ends its process or takes too long, or whose outcomes
differ: then a kernel gave out memory that it did not write, or read past what it was given. Each finding is tried again
by itself before it is told, with the seed and the number that repeat it.

Exit codes: 0 nothing found, 1 findings, 2 wrong options.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from fuzz.calls import cannot
from fuzz.child import SHORT, Child, Lost

FILLS: Final = 0x55, 0x2A
SECONDS: Final = 20.0
"""How much processor time a call may take."""
MEMORY: Final = 512 << 20
STRETCH: Final = 5_000
"""Calls of one forked process: what one leaves behind cannot bend many others."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What a call did that none may. `alone`: it does so again in a process that made no other call before."""

    index: int
    op: str
    kind: str
    alone: bool
    outcomes: tuple[str, str]


@dataclass(slots=True)
class Summary:
    """What became of so many calls."""

    calls: int
    made: int
    refused_for_memory: int
    ops: int
    ops_that_gave_results: int
    findings: list[Finding]


class Pair:
    """Two processes that make the same calls.

    Args:
        seed: of all calls.
        pattern: ops are those whose names hold it.
        seconds: of processor time that a call may take.
        memory: bytes that calls may take.
        plain: whether to do without torch's samples, which take most of a minute to make.
        many: whether there will be thousands of calls.
        tell: is told of each finding.
    """

    def __init__(
        self,
        seed: int,
        *,
        pattern: str = "",
        seconds: float = SECONDS,
        memory: int = MEMORY,
        plain: bool = False,
        many: bool = False,
        tell: Callable[[Finding], None] = lambda finding: None,
    ) -> None:
        self._children = [Child(fill, seed, pattern, memory, plain=plain, many=many) for fill in FILLS]
        self._seconds = seconds
        self._tell = tell

    def run(self, calls: range) -> Summary:
        """Makes the calls with these numbers."""
        findings: list[Finding] = []
        done, made, short = 0, 0, 0
        tried: Counter[str] = Counter()
        gave: Counter[str] = Counter()
        for index, outcomes in self._outcomes(calls):
            done += 1
            name = outcomes[0].partition(" ")[0]
            kind = _kind(outcomes)
            if kind is not None:
                finding = self._again(index, kind, outcomes)
                if finding is not None:
                    findings.append(finding)
                    self._tell(finding)
                continue
            tried[name] += 1
            gave[name] += outcomes[0].startswith(f"{name} made")
            made += outcomes[0].startswith(f"{name} made")
            short += any(one.endswith(SHORT) for one in outcomes)
        return Summary(done, made, short, len(tried), sum(count > 0 for count in gave.values()), findings)

    def close(self) -> None:
        """Ends both processes."""
        for child in self._children:
            child.close()

    def _outcomes(self, calls: range) -> Iterator[tuple[int, tuple[str, str]]]:
        first = calls.start
        while first < calls.stop:
            stop = min(first + STRETCH, calls.stop)
            for child in self._children:
                child.prepare()
            for child in self._children:
                child.start(first, stop)
            for index in range(first, stop):
                one, other = (self._next(child, index) for child in self._children)
                yield index, (one, other)
                first = index + 1
                # It was tried again: both go on together, with the next call.
                if _kind((one, other)) is not None:
                    break
            for child in self._children:
                child.end_stretch()

    def _next(self, child: Child, index: int) -> str:
        try:
            while not (line := child.line(self._seconds)).startswith((f"{index} ", "ended ")):
                pass  # a kernel wrote to stdout
        except Lost:
            return "hangs"
        number, _, outcome = line.partition(" ")
        return f"ended {outcome}" if number == "ended" else outcome

    def _again(self, index: int, kind: str, outcomes: tuple[str, str]) -> Finding | None:
        """The finding, tried by itself; None for what only took long, and does not again."""
        for child in self._children:
            child.end_stretch()
            child.start(index, index + 1)
        one, other = (self._next(child, index) for child in self._children)
        for child in self._children:
            child.end_stretch()
        again = _kind((one, other))
        if again is None and kind == "hangs":
            return None
        name = next((text.split()[0] for text in (*outcomes, one, other) if not _ended(text)), "")
        return Finding(index, name, again or kind, again is not None, (one, other) if again else outcomes)


def _ended(outcome: str) -> bool:
    return outcome == "hangs" or outcome.startswith("ended ")


def _kind(outcomes: tuple[str, str]) -> str | None:
    if any(one.startswith("ended ") for one in outcomes):
        return "ends its process"
    if "hangs" in outcomes:
        return "hangs"
    if any(one.endswith(SHORT) for one in outcomes):
        return None
    return "differs" if outcomes[0] != outcomes[1] else None


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the fuzzer; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m fuzz.ops", description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--calls", type=int, default=10_000, metavar="N", help="how many (%(default)s)")
    add("--seed", type=int, default=0, metavar="S", help="of all calls (%(default)s)")
    add("--first", type=int, default=0, metavar="N", help="number of the first call (%(default)s)")
    add("--op", default="", metavar="TEXT", help="only ops whose names hold this text")
    add("--seconds", type=float, default=SECONDS, help="of processor time that a call may take (%(default)s)")
    add("--memory", type=int, default=MEMORY, metavar="BYTES", help="that calls may take (%(default)s)")
    add("--plain", action="store_true", help="without torch's samples: starts at once, and reaches less")
    add("--json", type=Path, metavar="FILE", help="write what was found there, and as it is found")
    options = parser.parse_args(arguments)
    if options.calls < 1 or options.first < 0 or options.seconds <= 0 or options.memory < 1 << 20:
        parser.error("--calls and --seconds must be above 0, --first at least 0, --memory at least a MiB")
    if reason := cannot(options.op, plain=options.plain):
        parser.error(reason)
    began = time.monotonic()
    pair = Pair(
        options.seed,
        pattern=options.op,
        seconds=options.seconds,
        memory=options.memory,
        plain=options.plain,
        many=options.calls > 2_000,
        tell=lambda finding: print(_told(finding, options.seed), flush=True),
    )
    total = Summary(0, 0, 0, 0, 0, [])
    stop = options.first + options.calls
    try:
        for first in range(options.first, stop, STRETCH):
            part = pair.run(range(first, min(first + STRETCH, stop)))
            total.calls += part.calls
            total.made += part.made
            total.refused_for_memory += part.refused_for_memory
            total.ops = max(total.ops, part.ops)
            total.ops_that_gave_results = max(total.ops_that_gave_results, part.ops_that_gave_results)
            total.findings += part.findings
            print(f"{total.calls:,} calls in {time.monotonic() - began:,.0f} s, {total.made:,} gave results, "
                  f"{len(total.findings)} findings", flush=True)  # fmt: skip
            if options.json is not None:
                options.json.write_text(json.dumps(asdict(total), indent=1) + "\n", encoding="utf-8")
    finally:
        pair.close()
    return 1 if total.findings else 0


def _told(finding: Finding, seed: int) -> str:
    how = "" if finding.alone else " (after other calls; not by itself)"
    lines = [f"FOUND {finding.op or 'an op'} {finding.kind}{how}: call {finding.index} of seed {seed}"]
    return "\n".join([*lines, *(f"    {one[:200]}" for one in finding.outcomes)])


if __name__ == "__main__":
    sys.exit(main())

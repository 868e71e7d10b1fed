"""Tries what somebody wrote on those who read it: what the fuzzers of texts and files have in common.

A try calls a reader. It reads, or refuses with one of the errors that it says it raises, in words that a terminal can
show. A finding is anything else: another exception, a process that ends, more processor time or memory than a try may
take. Tries are made in a process of their own, which is started again after each finding.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import select
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

SECONDS: Final = 10.0
"""How much processor time a try may take."""
MEMORY: Final = 1 << 30
_ASLEEP: Final = 20
"""How many times its processor time a try may take in all."""
_STARTING: Final = 300.0
_LONGEST: Final = 20_000
"""Characters of an error that somebody has to read."""


class Wrong(AssertionError):  # noqa: N818 - a finding, not an error of ours
    """Something was read that cannot be right."""


@dataclass(frozen=True, slots=True)
class Try:
    """One thing to read: what it is about, the call that reads it, and the errors that it may raise."""

    about: str
    read: Callable[[], object]
    errors: tuple[type[BaseException], ...]


@dataclass(slots=True)
class Summary:
    """What became of so many tries: how many were read, and how often each error refused one."""

    tries: int = 0
    read: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    abouts: Counter[str] = field(default_factory=Counter)
    findings: list[str] = field(default_factory=list)


Draws = Callable[[random.Random, Path], Try]
"""Draws a try; files go into the folder."""


def outcome(drawn: Try) -> str:
    """What comes of a try: ``read``, the name of the error that refused it, or ``FOUND`` and what is wrong."""
    try:
        drawn.read()
    except drawn.errors as error:
        text = str(error)
        if not text.strip() or len(text) > _LONGEST:
            return f"FOUND an error of {len(text)} characters: {type(error).__name__} {text[:100]!a}"
        shown = text.replace("\n", "").replace("\t", "")  # a plan's error shows its line below
        if not shown.isprintable():
            return f"FOUND an error that no terminal can show: {type(error).__name__} {text[:200]!a}"
        return type(error).__name__
    except MemoryError:
        return "FOUND it takes more memory than a try may"
    except BaseException as error:  # whatever it is, nobody said that it may be raised
        return f"FOUND {type(error).__name__}: {str(error)[:300]!a}"
    return "read"


def run_here(draws: Draws, seed: int, numbers: range, folder: Path) -> Summary:
    """Makes tries in this process, without bounds of time and memory."""
    summary = Summary()
    for number in numbers:
        drawn = draws(random.Random(f"{seed}/{number}"), folder)
        _count(summary, number, seed, f"{drawn.about}\t{outcome(drawn)}")
    return summary


def _count(summary: Summary, number: int, seed: int, line: str) -> None:
    about, _, said = line.partition("\t")
    summary.tries += 1
    summary.abouts[about] += 1
    if said == "read":
        summary.read += 1
    elif said.startswith("FOUND "):
        summary.findings.append(f"try {number} of seed {seed} ({about}): {said.removeprefix('FOUND ')}")
    else:
        summary.refused[said] += 1


def run(
    module: str,
    seed: int,
    numbers: range,
    *,
    seconds: float = SECONDS,
    memory: int = MEMORY,
    tell: Callable[[str], None] = lambda finding: None,
) -> Summary:
    """Makes the tries of ``python -m module`` in a process of their own.

    Args:
        module: the fuzzer.
        seed, numbers: which tries.
        seconds: of processor time that each may take; twenty times as much by the clock.
        memory: bytes that tries may take.
        tell: is told of each finding.
    """
    summary = Summary()
    first = numbers.start
    while first < numbers.stop:
        first = _stretch(module, seed, range(first, numbers.stop), seconds, memory, summary, tell)
    return summary


def _stretch(
    module: str,
    seed: int,
    numbers: range,
    seconds: float,
    memory: int,
    summary: Summary,
    tell: Callable[[str], None],
) -> int:
    """Makes tries until one ends the process; returns the number of the one to go on with."""
    command = [sys.executable, "-m", module, "--tries", str(len(numbers)), "--first", str(numbers.start)]
    command += ["--seed", str(seed), "--seconds", str(seconds), "--memory", str(memory), "--child"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert process.stdout is not None
    number, patience, rest = numbers.start, _STARTING, b""
    try:
        while number < numbers.stop:
            ready, _, _ = select.select([process.stdout], [], [], patience)
            part = os.read(process.stdout.fileno(), 1 << 16) if ready else b""
            if not part:
                if ready and process.wait() == 1:  # what a reader raises does not end it
                    raise RuntimeError(f"{module} failed before try {number} of seed {seed} was made")
                why = "hangs" if not ready else _ended(process.wait())
                _count(summary, number, seed, f"a process\tFOUND {why}")
                tell(summary.findings[-1])
                return number + 1
            *lines, rest = (rest + part).split(b"\n")
            for line in lines:
                known = len(summary.findings)
                _count(summary, number, seed, line.decode("ascii", "replace"))
                if len(summary.findings) > known:
                    tell(summary.findings[-1])
                number, patience = number + 1, _ASLEEP * seconds
        return number
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def _ended(code: int) -> str:
    if code in (-signal.SIGVTALRM, -signal.SIGPROF):
        return "takes more processor time than a try may"
    return f"ends its process ({code})"


def _child(draws: Draws, seed: int, numbers: range, seconds: float, memory: int) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        draws(random.Random("the first imports all that readers need"), Path(folder))
        with open("/proc/self/statm", encoding="ascii") as file:
            have = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (have + memory, have + memory))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        for number in numbers:
            signal.setitimer(signal.ITIMER_PROF, seconds)
            drawn = draws(random.Random(f"{seed}/{number}"), Path(folder))
            said = outcome(drawn)
            os.write(1, f"{drawn.about}\t{said}\n".encode("ascii", "replace"))


def main(module: str, doc: str, draws: Draws, arguments: Sequence[str] | None = None) -> int:
    """Runs a fuzzer of readers; returns the exit code: 0 nothing found, 1 findings, 2 wrong options."""
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=doc.splitlines()[0])
    add = parser.add_argument
    add("--tries", type=int, default=10_000, metavar="N", help="how many (%(default)s)")
    add("--seed", type=int, default=0, metavar="S", help="of all tries (%(default)s)")
    add("--first", type=int, default=0, metavar="N", help="number of the first try (%(default)s)")
    add("--seconds", type=float, default=SECONDS, help="of processor time that a try may take (%(default)s)")
    add("--memory", type=int, default=MEMORY, metavar="BYTES", help="that tries may take (%(default)s)")
    add("--json", type=Path, metavar="FILE", help="write what was found there")
    add("--child", action="store_true", help=argparse.SUPPRESS)
    options: Any = parser.parse_args(arguments)
    if options.tries < 1 or options.first < 0 or not options.seconds > 0 or options.memory < 1 << 20:
        parser.error("--tries and --seconds must be above 0, --first at least 0, --memory at least a MiB")
    numbers = range(options.first, options.first + options.tries)
    if options.child:
        _child(draws, options.seed, numbers, options.seconds, options.memory)
        return 0
    began = time.monotonic()
    summary = run(
        module, options.seed, numbers, seconds=options.seconds, memory=options.memory,
        tell=lambda finding: print(f"FOUND {finding}", flush=True),
    )  # fmt: skip
    refused = ", ".join(f"{name} {count:,}" for name, count in summary.refused.most_common())
    print(
        f"{summary.tries:,} tries in {time.monotonic() - began:,.0f} s: {summary.read:,} read, refused with "
        f"{refused or 'nothing'}, {len(summary.findings)} findings"
    )
    if options.json is not None:
        values = {"tries": summary.tries, "read": summary.read, "refused": dict(summary.refused),
                  "findings": summary.findings}  # fmt: skip
        options.json.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    return 1 if summary.findings else 0


def _probe(rng: random.Random, folder: Path) -> Try:
    """Readers that do what none may: to see that it would be found."""
    kind = rng.choice(("aborts", "spins", "fills memory", "raises", "refuses in secret", "reads"))

    def read() -> None:
        match kind:
            case "aborts":
                os.abort()
            case "spins":
                while True:
                    pass
            case "fills memory":
                bytearray(1 << 62)
            case "raises":
                raise KeyError("x")
            case "refuses in secret":
                raise ValueError("\x1b[2J")

    return Try(kind, read, (ValueError,))


if __name__ == "__main__":
    sys.exit(main("fuzz.reading", __doc__ or "", _probe))

"""``python -m benchmarks``: measures every speed and memory claim and prints ours, the floor and the goal.

Ends with exit code 0 whether goals are met or not: it is a measurement, not a test. 1: something failed.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks import (
    calls,
    going_on,
    isolation,
    memory,
    plans,
    pointers,
    protocols,
    rounds,
    sharing,
    startup,
    throughput,
    tls,
    vertical,
    virtual,
)
from benchmarks.measure import Row, table
from benchmarks.workloads import Size
from planrt.command_line import available_cores

GROUPS: dict[str, Callable[[Size], list[Row]]] = {
    "rounds": rounds.measure,
    "throughput": throughput.measure,
    "memory": memory.measure,
    "virtual": virtual.measure,
    "startup": startup.measure,
    "plans": plans.measure,
    "pointers": pointers.measure,
    "calls": calls.measure,
    "protocols": protocols.measure,
    "tls": tls.measure,
    "isolation": isolation.measure,
    "going-on": going_on.measure,
    "sharing": sharing.measure,
    "vertical": vertical.measure,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmarks; returns the exit code."""
    options = _parser().parse_args(arguments)
    size = Size(
        repeats=1 if options.quick else options.repeats,
        quick=options.quick,
        ids=300 if options.quick else options.ids,
    )
    chosen = options.only or list(GROUPS)
    results: dict[str, list[Row]] = {}
    for name in chosen:
        began = time.perf_counter()
        try:
            results[name] = GROUPS[name](size)
        except Exception:  # the others' figures are worth having
            traceback.print_exc()
            print(f"\n{name}: NOT MEASURED, see the error above", flush=True)
            continue
        print(f"\n{name} ({time.perf_counter() - began:.0f} s)\n{table(results[name])}", flush=True)
    rows = [row for group in results.values() for row in group]
    judged = [row for row in rows if row.goal]
    missed = [row.name for row in judged if not row.met]
    print(f"\n{len(judged) - len(missed)} of {len(judged)} goals met", end="")
    print(f"; missed: {', '.join(missed)}" if missed else "")
    if options.quick:
        print("--quick: these figures mean nothing")
    options.json.write_text(json.dumps(_report(results, size), indent=1) + "\n", encoding="utf-8")
    print(f"Written to {options.json}")
    return 0 if len(results) == len(set(chosen)) else 1


def _report(results: dict[str, list[Row]], size: Size) -> dict[str, object]:
    return {
        "quick": size.quick,
        "repeats": size.repeats,
        "machine": {
            "cores": available_cores(),
            "platform": platform.platform(),
            "python": platform.python_version(),
            "torch": str(torch.__version__),
        },
        "groups": {name: [row.as_json() for row in rows] for name, rows in results.items()},
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="benchmarks",
        description="Measure planrt against its floors.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="smallest sizes, once: does everything run?")
    parser.add_argument(
        "--only",
        action="append",
        choices=list(GROUPS),
        metavar="NAME",
        help=f"one group of {', '.join(GROUPS)}",
    )
    parser.add_argument("--repeats", type=int, default=15, help="measurements of each figure")
    parser.add_argument(
        "--ids", type=int, default=100_000, help="ids of either table, where it is found who is in both"
    )
    parser.add_argument(
        "--json",
        type=Path,
        metavar="PATH",
        default=Path(__file__).with_name("results.json"),
        help="results file",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())

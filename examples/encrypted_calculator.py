"""Sums, products, comparisons and maxima of numbers that nobody sees: shared by bob and alice.

Each of the two holds one random part of every number; a third worker, the crypto provider, hands out randomness.

    python examples/encrypted_calculator.py [--websocket]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch
from _workers import options_of, workers

from planrt.command_line import run_command


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the example; returns its exit code."""
    parser = options_of("encrypted_calculator", __doc__)
    options = parser.parse_args(argv)
    return run_command(parser.prog, lambda: run(options), verbose=options.verbose)


def run(options: argparse.Namespace) -> None:
    """Calculates, and opens the results."""
    with workers("bob", "alice", "bill", "james", websocket=options.websocket) as (bob, alice, bill, james):
        x = torch.tensor([25]).share(bob, alice, bill, crypto_provider=james)
        print(x)
        print(x.get())
        x = torch.tensor([25]).share(bob, alice, crypto_provider=james)
        y = torch.tensor([5]).share(bob, alice, crypto_provider=james)
        for name, result in {
            "x + y": x + y, "x - y": x - y, "x * y": x * y, "x > y": x > y, "x < y": x < y, "x == y": x == y,
        }.items():  # fmt: skip
            print(f"{name}: {result.get()}")
        x = torch.tensor([[1, 2], [3, 4]]).share(bob, alice, crypto_provider=james)
        y = torch.tensor([[2, 0], [0, 2]]).share(bob, alice, crypto_provider=james)
        print(f"x.mm(y): {x.mm(y).get().tolist()}")
        values, places = torch.tensor([[2, 3], [4, 1]]).share(bob, alice, crypto_provider=james).max(dim=0)
        print(f"x.max(dim=0): {values.get()} at {places.get()}")
        x = torch.tensor([0.5, -1.25]).fix_precision().share(bob, alice, crypto_provider=james)
        print(f"x * x: {(x * x).get().float_precision()}")


if __name__ == "__main__":
    sys.exit(main())

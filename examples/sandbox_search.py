"""A sandbox of six workers with data on them: search for a data set, and train on what was found.

Without Boston Housing (see `planrt.fl.data.boston`) it is the diabetes data of scikit-learn.

    python examples/sandbox_search.py [--websocket] [--epochs 20]
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence
from typing import Any

import torch
from _workers import options_of, workers
from torch import nn, optim

import planrt as sy
from planrt.command_line import run_command, whole_number
from planrt.sandbox import WORKERS


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the example; returns its exit code."""
    parser = options_of("sandbox_search", __doc__)
    parser.add_argument("--epochs", type=whole_number(at_least=1), default=20, help="passes (%(default)s)")
    parser.add_argument("--data", metavar="DIR", help="folder that holds boston_housing.npz")
    parser.add_argument(
        "--seed", type=whole_number(at_least=0), default=1, help="of models and data (%(default)s)"
    )
    options = parser.parse_args(argv)
    return run_command(parser.prog, lambda: run(options), verbose=options.verbose)


def run(options: argparse.Namespace) -> None:
    """Makes the sandbox, searches it and trains."""
    torch.manual_seed(options.seed)
    if options.data is not None:
        os.environ["PLANRT_DATA"] = options.data
    sandbox: dict[str, Any] = {}  # in a notebook: sy.create_sandbox(globals())
    with contextlib.ExitStack() as stack:
        ready = {}
        if options.websocket:
            made = stack.enter_context(workers(*WORKERS, websocket=True, in_turn=True))
            ready = {worker.id: worker for worker in made}
        sy.create_sandbox(sandbox, make_worker=ready.get if ready else None)
        search_and_train(sandbox["grid"], epochs=options.epochs)


def search_and_train(grid: sy.PrivateGridNetwork, *, epochs: int) -> None:
    """Finds a data set by its tags, and lets a linear model visit its workers in turn."""
    name = "#boston" if grid.search("#boston") else "#diabetes"
    data, target = grid.search(name, "#data"), grid.search(name, "#target")
    print(f"{name} is on {', '.join(data)}")
    dataset = sy.FederatedDataset([sy.BaseDataset(data[id][0], target[id][0]) for id in data])
    loader = sy.FederatedDataLoader(dataset, batch_size=32, shuffle=True)

    model = nn.Sequential(nn.BatchNorm1d(data["alice"][0].shape[1]), nn.Linear(data["alice"][0].shape[1], 1))
    optims = sy.Optims(dataset.workers, optim=optim.Adam(params=model.parameters(), lr=0.1))
    for epoch in range(1, epochs + 1):
        total = 0.0
        for batch, wanted in loader:
            model.send(batch.location)
            optimizer = optims.get_optim(batch.location.id)
            optimizer.zero_grad()
            loss = ((model(batch).view(-1) - wanted) ** 2).mean()
            loss.backward()
            optimizer.step()
            model.get()
            total += loss.get().item()
        print(f"Epoch {epoch}: mean loss {total / len(loader):.2f}")


if __name__ == "__main__":
    sys.exit(main())

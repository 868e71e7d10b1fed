"""Two owners with different columns about overlapping people train one model: on encrypted values, or on shares.

The bank has half of the columns, the clinic the other half and the labels; 70 % of the people are in both tables. Carol
holds the key. Breast cancer (scikit-learn's) is told by logistic regression, Boston's house prices by linear. Beside
them: the same training on the joined table, and each owner's columns alone. With --shares also without a key: on secret
shares, where carol hands out randomness; of the breast cancer data with the exact logistic loss, too.

    python examples/vertical.py [--websocket] [--shares] [--epochs 20] [--key-bits 2048] [--data DIR] [--plot FILE.png]

With --keep DIR each party keeps its part of the encrypted runs after every epoch, in a folder of its own below that.
What was interrupted goes on with the same options and --resume, and has the weights that it would have had.

    python examples/vertical.py --keep kept --epochs 20
    python examples/vertical.py --keep kept --epochs 20 --resume
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import math
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _workers import options_of

import planrt as sy
from planrt.command_line import positive_number, run_command, whole_number
from planrt.errors import OptionError
from planrt.extras import needed
from planrt.fl.data import boston
from planrt.fl.runs.children import ChildOptions, WorkerProcesses
from planrt.sharing.columns.ids import keys_of, order_of
from planrt.vertical import Party, Table, linear_regression, logistic_regression
from planrt.workers import BaseWorker, WebsocketClientWorker

SEED, HELD_OUT = 1, 0.2
Array = np.ndarray[Any, Any]


@dataclass
class People:
    """A data set: ids, columns by name, and the label."""

    name: str
    model: str
    ids: list[str]
    columns: dict[str, Array]
    label: Array

    @property
    def halves(self) -> tuple[list[str], list[str]]:
        """The names of the bank's columns and of the clinic's."""
        names = list(self.columns)
        return names[: len(names) // 2], names[len(names) // 2 :]

    @property
    def parts(self) -> tuple[range, range]:
        """The rows of the bank and of the clinic: 70 % are in both."""
        alone = round(len(self.ids) * 0.15)
        return range(len(self.ids) - alone), range(alone, len(self.ids))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the example; returns its exit code."""
    parser = options_of("vertical", __doc__)
    add = parser.add_argument
    add("--epochs", type=whole_number(at_least=1), default=20, help="passes over all people (%(default)s)")
    add("--lr", type=positive_number, default=0.1, help="learning rate (%(default)s)")
    add("--key-bits", type=whole_number(at_least=1024), default=2048, help="of the key (%(default)s)")
    add("--shares", action="store_true", help="trains on secret shares, too")
    add("--data", metavar="DIR", help="folder that holds boston_housing.npz")
    add("--plot", metavar="FILE", help="write a figure of the losses")
    add("--keep", metavar="DIR", help="each party keeps its part of a run in a folder below this one")
    add(
        "--resume",
        action="store_true",
        help="goes on from what the parties have kept in the folder of --keep",
    )
    options = parser.parse_args(argv)
    return run_command(parser.prog, lambda: run(options), verbose=options.verbose)


def run(options: argparse.Namespace) -> None:
    """Trains on both data sets and shows what came of it."""
    if options.resume and options.keep is None:
        raise OptionError("--resume goes on from what was kept: give its folder with --keep DIR")
    if options.key_bits < 2048:
        print(f"Notice: a key of {options.key_bits} bits keeps no secrets")
        warnings.filterwarnings("ignore", "a key of")
    sets = [breast_cancer()]
    found = boston.find(options.data)
    if found is None:
        print(f"Notice: no {boston.FILE}: house prices are left out")
    else:
        sets.append(house_prices(boston.load(options.data)))
    losses = {people.name: train(people, options) for people in sets}
    if options.plot:
        plot(losses, options.plot)


def breast_cancer() -> People:
    """scikit-learn's breast cancer data: 569 people, 30 columns; 1 is benign."""
    data = needed("sklearn.datasets", by="this example").load_breast_cancer()
    columns = {str(name): data.data[:, place] for place, name in enumerate(data.feature_names)}
    ids = [f"P{number:04}" for number in range(len(data.target))]
    return People("breast cancer", "logistic", ids, columns, data.target.astype(float))


def house_prices(data: boston.BostonHousing) -> People:
    """Boston's house prices: 404 tracts, 13 columns."""
    columns = {name: data.train_data[:, place].double().numpy() for place, name in enumerate(boston.COLUMNS)}
    ids = [f"T{number:04}" for number in range(len(data.train_targets))]
    return People("house prices", "linear", ids, columns, data.train_targets.double().numpy())


def train(people: People, options: argparse.Namespace) -> dict[str, list[float]]:
    """Trains together, on the joined table, and each alone; returns the losses of each epoch."""
    rows = aligned(people)
    count = len(rows) - int(len(rows) * HELD_OUT)
    open_run = logistic_regression if people.model == "logistic" else linear_regression
    keep = Path(options.keep, people.name) if options.keep else None
    resume = options.resume and keep is not None and any(keep.glob("*/*.run"))
    with owners(people, websocket=options.websocket, keep=keep) as (bank, clinic, carol):
        about: dict[str, Any] = {
            "normalise": "casefold", "epochs": options.epochs, "batch_size": count, "lr": options.lr,
            "holdout": HELD_OUT, "seed": SEED,
        }  # fmt: skip
        keys: dict[str, Any] = {"key_bits": options.key_bits, "allow_short_key": options.key_bits < 2048}
        kept = {} if keep is None else {"keep": people.name, "resume": resume}
        with open_run(bank, clinic, key_holder=carol, **keys, **kept, **about) as joint:
            if joint.resumed:
                print(f"{people.name}: goes on after epoch {len(joint.losses)}")
            together = joint.fit()
            weights, evaluation = joint.weights(), joint.evaluate()
            print(f"{people.name}: {joint!r}, {joint.people} to train on and {evaluation.people} held out")
        shared = on_shares(people, open_run, (bank, clinic, carol), about) if options.shares else {}
    left, right = people.halves
    losses = {"together": together}
    figure = "accuracy" if people.model == "logistic" else "mean squared error"
    value = evaluation.accuracy if people.model == "logistic" else evaluation.loss
    print(f"  together: loss {together[-1]:.6f}, {figure} {value:.4f}")
    ways = {"joined table": left + right, "bank's columns alone": left, "clinic's columns alone": right}
    if people.model == "logistic":
        truth, _, exact = plain(people, left + right, rows, count, options, exact=True)
        print(f"  joined table, exact logistic loss: {figure} {exact:.4f}")
        if shared:
            off = np.abs(shared["exact"] - truth).max()
            print(f"  Largest difference of a weight on shares, exact loss, to the joined table: {off:.1e}")
    for name, columns in ways.items():
        expected, losses[name], measure = plain(people, columns, rows, count, options)
        print(f"  {name}: loss {losses[name][-1]:.6f}, {figure} {measure:.4f}")
        if columns == left + right:
            mine = np.array([weight for owned in weights.values() for weight in owned.values()])
            for place, column in enumerate([*columns, "intercept"]):
                third = f"  on shares {shared['shares'][place]:+.6f}" if shared else ""
                print(f"    {column:<24} {mine[place]:+.6f}  joined {expected[place]:+.6f}{third}")
            if shared:
                off = np.abs(shared["shares"] - expected).max()
                print(f"  Largest difference of a weight on shares to the joined table: {off:.1e}")
            print(
                f"  Largest difference of a weight to the joined table: {np.abs(mine - expected).max():.1e}"
            )
    return losses


def on_shares(
    people: People, open_run: Any, parties: tuple[Party, Party, BaseWorker], about: dict[str, Any]
) -> dict[str, Array]:
    """The weights of the same run on secret shares, and of a logistic one with the exact loss."""
    bank, clinic, carol = parties
    found = {}
    for name in ("shares", "exact") if people.model == "logistic" else ("shares",):
        more = {"exact": True} if name == "exact" else {}
        began = time.perf_counter()
        with open_run(bank, clinic, method="shares", crypto_provider=carol, **more, **about) as joint:
            joint.fit()
            weights, evaluation = joint.weights(), joint.evaluate()
        seconds = time.perf_counter() - began
        what = "on shares, exact loss" if name == "exact" else "on shares"
        print(f"  {what}: loss over those held out {evaluation.loss:.6f}, in {seconds:.1f} s")
        found[name] = np.array([weight for owned in weights.values() for weight in owned.values()])
    return found


def aligned(people: People) -> list[int]:
    """The rows that are in both tables, in the order of joint runs."""
    common = sorted(set(people.parts[0]) & set(people.parts[1]))
    keys = keys_of([("id", [people.ids[row] for row in common])], "casefold", whose="everybody")
    return [common[place] for place in order_of(keys, SEED)]


def plain(
    people: People, columns: Sequence[str], rows: Sequence[int], count: int, options: argparse.Namespace,
    *, exact: bool = False,
) -> tuple[Array, list[float], float]:  # fmt: skip
    """Plain PyTorch on some columns: weights, losses, and the figure over those held out.

    Joint runs have the logistic loss to the second order; `exact` is with the loss itself.
    """
    values = torch.from_numpy(np.stack([people.columns[name][rows] for name in columns], 1))
    label = torch.from_numpy(people.label[rows])
    values = (values - values[:count].mean(0)) / values[:count].std(0, correction=0)
    logistic = people.model == "logistic"
    shift, scale = label[:count].mean(), label[:count].std(correction=0)
    truth = label if logistic else (label - shift) / scale
    net = torch.nn.Linear(len(columns), 1, dtype=torch.float64)
    torch.nn.init.zeros_(net.weight)
    torch.nn.init.zeros_(net.bias)
    optimizer = torch.optim.SGD(net.parameters(), lr=options.lr)
    losses = []
    for _ in range(options.epochs):
        optimizer.zero_grad()
        score = net(values[:count])[:, 0]
        sign = 2 * truth[:count] - 1
        if exact:
            loss = torch.nn.functional.softplus(-sign * score).mean()
        elif logistic:
            loss = (math.log(2) - sign * score / 2 + score**2 / 8).mean()
        else:
            loss = torch.nn.functional.mse_loss(score, truth[:count])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    with torch.no_grad():
        score = net(values[count:])[:, 0]
        if logistic:
            figure = ((score > 0) == (label[count:] > 0.5)).double().mean()
        else:
            figure = torch.nn.functional.mse_loss(score * scale + shift, label[count:])
    weights = torch.cat([net.weight.detach()[0], net.bias.detach()]).numpy()
    return weights, losses, float(figure)


@contextlib.contextmanager
def owners(
    people: People, *, websocket: bool, keep: Path | None = None
) -> Iterator[tuple[Party, Party, BaseWorker]]:
    """The bank, the clinic and carol: each table is a file of its owner's, served by a worker. Each keeps its part of
    runs in a folder below `keep`."""
    left, right = people.halves
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        files = [Path(folder, "bank.csv"), Path(folder, "clinic.csv")]
        write(
            files[0],
            {"customer": people.ids, **{name: people.columns[name] for name in left}},
            people.parts[0],
        )
        clinic = {
            "patient": [id.lower() for id in people.ids],
            **{name: people.columns[name] for name in right},
        }
        write(files[1], {**clinic, "label": people.label}, people.parts[1])
        ids, keys = ("bank", "clinic", "carol"), ("customer", "patient")
        folders = {id: keep / id if keep else None for id in ids}
        workers: list[BaseWorker] = []
        if websocket:
            served = [
                ("--dataset", str(file), "--id-column", key) for file, key in zip(files, keys, strict=True)
            ]
            children = [
                ChildOptions(id, 0, (*given, "--threads", "1", *joint_runs(folders[id])))
                for id, given in zip(ids, [*served, ("--empty",)], strict=True)
            ]
            ready = stack.enter_context(WorkerProcesses(children)).wait_ready()
            for id in ids:
                workers.append(stack.enter_context(WebsocketClientWorker(id, uri=ready[id].uri)))
        else:
            for id, file, key in zip(ids, files, keys, strict=False):
                tables = {file.stem: Table.from_file(file, key)}
                worker = sy.VirtualWorker(id=id, datasets=tables, joint_runs=folders[id])
                workers.append(stack.enter_context(worker))
            workers.append(stack.enter_context(sy.VirtualWorker(id="carol", joint_runs=folders["carol"])))
        yield (
            Party(workers[0], "bank", "customer", left),
            Party(workers[1], "clinic", "patient", right, label="label"),
            workers[2],
        )


def joint_runs(folder: Path | None) -> tuple[str, ...]:
    """The option of a worker that keeps its part of runs."""
    return () if folder is None else ("--joint-runs", str(folder))


def write(path: Path, columns: dict[str, Any], rows: range) -> None:
    """A table as CSV, its rows in an order of their own."""
    shuffled = np.random.default_rng(len(rows)).permutation(list(rows))
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows([values[row] for values in columns.values()] for row in shuffled.tolist())


def plot(losses: dict[str, dict[str, list[float]]], path: str) -> None:
    """A figure of the losses over epochs."""
    needed("matplotlib", by="--plot").use("Agg")
    pyplot = needed("matplotlib.pyplot", by="--plot")
    figure, axes = pyplot.subplots(1, len(losses), figsize=(5 * len(losses), 3.5), squeeze=False)
    for axis, (name, ways) in zip(axes[0], losses.items(), strict=True):
        for way, values in ways.items():
            marker = {"together": "o", "joined table": "x"}.get(way, "")
            axis.plot(range(1, len(values) + 1), values, marker=marker, markersize=5, label=way)
        axis.set(title=name, xlabel="epoch", ylabel="training loss")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    print(f"Wrote {path}")


if __name__ == "__main__":
    sys.exit(main())

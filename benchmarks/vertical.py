"""Owners with different columns: who is in both tables, and an epoch on encrypted residuals, between processes."""

from __future__ import annotations

import csv
import math
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.measure import Goal, Row, Sample, in_turns, resident_bytes
from benchmarks.workloads import Size
from planrt.extras import needed
from planrt.fl.runs.children import ChildOptions, WorkerProcesses
from planrt.sharing.columns import packing
from planrt.vertical import Party, intersection_size, logistic_regression
from planrt.workers import WebsocketClientWorker

PEOPLE, COLUMNS, BATCH = 569, 30, 64
"""The shape of scikit-learn's breast cancer data."""

Workers = dict[str, WebsocketClientWorker]


def measure(size: Size) -> list[Row]:
    """The rows of this group."""
    return [_intersection(size), *_epoch(size)]


# -------------------------------------------------------------------------------------------------- intersection


def _intersection(size: Size) -> Row:
    count = 300 if size.quick else 100_000
    ids = [f"person {number:07}" for number in range(count * 3 // 2)]
    tables = {"bank": {"id": ids[:count]}, "clinic": {"id": ids[-count:]}}
    with _served(tables) as (workers, processes):
        bank, clinic = (Party(workers[name], name, "id") for name in tables)
        times = in_turns(
            {
                "ours": partial(intersection_size, bank, clinic),
                "alone": partial(_curve_alone, *(table["id"] for table in tables.values())),
            },
            repeats=min(size.repeats, 2),
            warmup=0,
        )
        peak = max(resident_bytes(pid) for pid in processes.pids.values())
    name = f"intersection of {count:,} ids with as many"
    return Row(
        name, "s", times["ours"], times["alone"], "X25519 of `cryptography` alone, one process", Goal(at_most=1.3),
        details={"a worker's memory afterwards, bytes": peak},
    )  # fmt: skip


def _curve_alone(one: list[str], two: list[str]) -> int:
    """The products on the curve that both sides make, and nothing besides: both tables', each by both secrets."""
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

    secrets = X25519PrivateKey.generate(), X25519PrivateKey.generate()
    found = []
    for ids, (first, second) in ((one, secrets), (two, secrets[::-1])):
        points = (name.encode().ljust(32, b"\1")[:32] for name in ids)
        blinded = [first.exchange(X25519PublicKey.from_public_bytes(point)) for point in points]
        found.append({second.exchange(X25519PublicKey.from_public_bytes(point)) for point in blinded})
    return len(found[0] & found[1])


# --------------------------------------------------------------------------------------------------------- epoch


def _epoch(size: Size) -> list[Row]:
    people, bits = (64, 1024) if size.quick else (PEOPLE, 2048)
    generator = np.random.default_rng(0)
    values = generator.normal(size=(people, COLUMNS))
    label = (values @ generator.normal(size=COLUMNS) > 0).astype(float)
    names = [f"c{number}" for number in range(COLUMNS)]
    half = COLUMNS // 2
    ids = [f"person {number}" for number in range(people)]
    left = {"id": ids, **dict(zip(names[:half], values.T[:half].tolist(), strict=True))}
    right = {
        "id": ids,
        **dict(zip(names[half:], values.T[half:].tolist(), strict=True)),
        "label": label.tolist(),
    }
    with _served({"bank": left, "clinic": right}, key_holder="carol") as (workers, _), logistic_regression(
        Party(workers["bank"], "bank", "id", names[:half]),
        Party(workers["clinic"], "clinic", "id", names[half:], label="label"),
        key_holder=workers["carol"], epochs=1_000, batch_size=BATCH, lr=0.1, key_bits=bits,
        allow_short_key=bits < 2048,
    ) as run:  # fmt: skip
        work = Arithmetic(people, half, bits)
        times = in_turns(
            {"ours": partial(run.fit, 1), "phe": work.run, "plain": partial(_plain, values, label)},
            repeats=min(size.repeats, 3),
            warmup=1,
        )
    what = f"an epoch of logistic regression, {people} x {COLUMNS}, {bits} bits"
    fewer = work.values / work.ciphertexts
    return [
        Row(what, "s", times["ours"], times["phe"], "`phe` for as much arithmetic, one core", Goal(at_most=1.5)),
        Row(what, "s", times["ours"], times["plain"], "the same steps in plain PyTorch"),
        Row(
            "values for each encryption and decryption", "", Sample((fewer,)), goal=Goal(at_least=5, absolute=True),
        ),
    ]  # fmt: skip


class Arithmetic:
    """The encryptions, powers and decryptions of an epoch, with `phe` alone."""

    def __init__(self, people: int, half: int, bits: int) -> None:
        phe = needed("phe", by="this benchmark", extra="vertical")
        self._power = needed("phe.util", by="this benchmark", extra="vertical").powmod
        self._public, self._private = phe.generate_paillier_keypair(n_length=bits)
        layout = packing.layout_for(bits, min(BATCH, people))
        generator = np.random.default_rng(1)
        self._factors: list[int] = []
        self.encryptions = self.decryptions = self.values = 0
        for begin in range(0, people, BATCH):
            rows = min(BATCH, people - begin)
            for columns in (half, half + 2):  # the owner of the labels has an intercept, and its labels
                whole = packing.fixed(generator.normal(size=(rows, columns)), layout.value_bits)
                for group in packing.packed_columns(whole, layout):
                    self._factors += [abs(factor) for factor in group]
                self.encryptions += layout.chunks(rows) + layout.groups(columns)
                self.decryptions += layout.groups(columns)
                self.values += rows + 2 * columns
        self._cipher = self._public.raw_encrypt(12345)

    @property
    def ciphertexts(self) -> int:
        """How many are encrypted and decrypted."""
        return self.encryptions + self.decryptions

    def run(self) -> None:
        """Does all of it."""
        square = self._public.n**2
        for number in range(self.encryptions):
            self._public.raw_encrypt(number + 1)
        for factor in self._factors:
            self._power(self._cipher, factor, square)
        for _ in range(self.decryptions):
            self._private.raw_decrypt(self._cipher)


def _plain(values: Any, label: Any) -> None:
    x, sign = torch.from_numpy(values), torch.from_numpy(2 * label - 1)
    net = torch.nn.Linear(x.shape[1], 1, dtype=torch.float64)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for rows in torch.randperm(len(x)).split(BATCH):
        optimizer.zero_grad()
        score = net(x[rows])[:, 0]
        (math.log(2) - sign[rows] * score / 2 + score**2 / 8).mean().backward()
        optimizer.step()


# ------------------------------------------------------------------------------------------------------- workers


@contextmanager
def _served(
    tables: dict[str, dict[str, Any]], *, key_holder: str | None = None
) -> Iterator[tuple[Workers, WorkerProcesses]]:
    """Each table is a file that a worker process serves; the key holder has none."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        children = []
        for name, columns in tables.items():
            file = Path(folder, f"{name}.csv")
            with open(file, "w", newline="", encoding="utf-8") as written:
                writer = csv.writer(written)
                writer.writerow(columns)
                writer.writerows(zip(*columns.values(), strict=True))
            children.append(
                ChildOptions(name, 0, ("--dataset", str(file), "--id-column", "id", "--threads", "1"))
            )
        if key_holder is not None:
            children.append(ChildOptions(key_holder, 0, ("--empty",)))
        processes = stack.enter_context(WorkerProcesses(children))
        ready = processes.wait_ready()
        workers = {
            one.id: stack.enter_context(WebsocketClientWorker(one.id, uri=ready[one.id].uri, auto_add=False))
            for one in children
        }
        yield workers, processes

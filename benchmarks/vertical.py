"""Owners with different columns: who is in both tables, and an epoch of regression, between processes: on encrypted
residuals, and on secret shares."""

from __future__ import annotations

import csv
import math
import tempfile
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.measure import Goal, Row, Sample, in_turns, peak_resident_bytes
from benchmarks.workloads import Size
from planrt.extras import needed
from planrt.fl.runs.children import ChildOptions, WorkerProcesses
from planrt.sharing.columns import descent, linear, packing, shared
from planrt.sharing.columns.steps import Role, Send, Take, run_here
from planrt.vertical import Party, intersection_size, logistic_regression
from planrt.workers import WebsocketClientWorker

PEOPLE, COLUMNS, BATCH = 569, 30, 64
"""The shape of scikit-learn's breast cancer data."""

LATENCIES = (0, 10)
"""Milliseconds that a parcel takes from one party to another one."""

Workers = dict[str, WebsocketClientWorker]


def measure(size: Size) -> list[Row]:
    """The rows of this group."""
    return [*_intersection(size), *_epoch(size)]


# -------------------------------------------------------------------------------------------------- intersection


def _intersection(size: Size) -> list[Row]:
    count = size.ids
    ids = [f"person {number:07}" for number in range(count * 3 // 2)]
    tables = {"bank": {"id": ids[:count]}, "clinic": {"id": ids[-count:]}}
    with _served(tables) as (workers, processes):
        before = {name: peak_resident_bytes(pid) for name, pid in processes.pids.items()}
        bank, clinic = (Party(workers[name], name, "id") for name in tables)
        found: list[int] = []
        times = in_turns(
            {
                "ours": lambda: found.append(intersection_size(bank, clinic)),
                "alone": partial(_curve_alone, *(table["id"] for table in tables.values())),
            },
            repeats=min(size.repeats, 2 if count <= 100_000 else 1),
            warmup=0,
        )
        peaks = {name: peak_resident_bytes(pid) for name, pid in processes.pids.items()}
    if set(found) != {len(set(ids[:count]) & set(ids[-count:]))}:
        raise ValueError(f"{found} people were found")
    higher = max(peaks, key=lambda name: peaks[name])
    what = f"intersection of {count:,} ids with as many"
    return [
        Row(
            what, "s", times["ours"], times["alone"], "X25519 of `cryptography` alone, one process",
            Goal(at_most=1.3),
        ),
        Row(
            f"{what}: a worker's peak", "MB", Sample((peaks[higher] / 1e6,)), goal=Goal(at_most=2000, absolute=True),
            note=f"resident memory of a worker's process, {before[higher] / 1e6:.0f} MB of it with its table read",
            details={"peaks": peaks, "with their tables read": before},
        ),
    ]  # fmt: skip


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
    about: dict[str, Any] = {"epochs": 1_000, "batch_size": BATCH, "lr": 0.1}
    with _served({"bank": left, "clinic": right}, key_holder="carol") as (workers, _), ExitStack() as stack:
        bank = Party(workers["bank"], "bank", "id", names[:half])
        clinic = Party(workers["clinic"], "clinic", "id", names[half:], label="label")
        carol = workers["carol"]
        keys: dict[str, Any] = {"key_holder": carol, "key_bits": bits, "allow_short_key": bits < 2048}
        shares: dict[str, Any] = {"method": "shares", "crypto_provider": carol}
        encrypted, on_shares, exact = (
            stack.enter_context(logistic_regression(bank, clinic, **about, **more))
            for more in (keys, shares, shares | {"exact": True})
        )
        work = Arithmetic(people, half, bits)
        times = in_turns(
            {
                "ours": partial(encrypted.fit, 1), "phe": work.run, "plain": partial(_plain, values, label),
                "shares": partial(on_shares.fit, 1), "exact": partial(exact.fit, 1),
            },
            repeats=min(size.repeats, 3),
            warmup=1,
        )  # fmt: skip
    traffic = {
        "ours": _traffic(_encrypted_roles(values, label, bits)),
        "shares": _traffic(_shared_roles(values, label, "second order")),
        "exact": _traffic(_shared_roles(values, label, "exact")),
    }
    what = f"an epoch of logistic regression, {people} x {COLUMNS}, {bits} bits"
    on = f"an epoch of logistic regression, {people} x {COLUMNS}, on secret shares"
    fewer = work.values / work.ciphertexts
    return [
        Row(what, "s", times["ours"], times["phe"], "`phe` for as much arithmetic, one core", Goal(at_most=1.5)),
        Row(what, "s", times["ours"], times["plain"], "the same steps in plain PyTorch"),
        Row(
            "values for each encryption and decryption", "", Sample((fewer,)), goal=Goal(at_least=5, absolute=True),
        ),
        _beside(on, "shares", times, traffic, bits),
        _beside(f"{on}, exact loss", "exact", times, traffic, bits),
    ]  # fmt: skip


def _beside(
    what: str, way: str, times: dict[str, Sample], traffic: dict[str, tuple[int, list[int]]], bits: int
) -> Row:
    """An epoch on shares beside one on encrypted values: here, and with latency between the parties, by the longest
    chain of parcels that wait for each other."""
    (hops, sent), (other_hops, other_sent) = traffic[way], traffic["ours"]
    slower = ", ".join(
        f"{times[way].median + hops * latency / 1000:.2f} s against "
        f"{times['ours'].median + other_hops * latency / 1000:.2f} s at {latency} ms"
        for latency in LATENCIES
    )
    return Row(
        what, "s", times[way], times["ours"], f"on encrypted residuals, {bits} bits", None,
        f"{hops} parcels one after another against {other_hops}: {slower}; an owner sends {max(sent[:2]) / 1e3:.0f} kB "
        f"against {max(other_sent[:2]) / 1e3:.0f} kB, the third party {sent[2] / 1e3:.0f} kB against "
        f"{other_sent[2] / 1e3:.0f} kB",
        {"hops": hops, "sent": sent, "hops encrypted": other_hops, "sent encrypted": other_sent},
    )  # fmt: skip


def _halves(values: Any) -> tuple[Any, Any]:
    return values[:, : COLUMNS // 2], values[:, COLUMNS // 2 :]


def _encrypted_roles(values: Any, label: Any, bits: int) -> list[Role]:
    names = ("bank", "clinic", "carol")
    terms = linear.Terms("logistic", names, 1, len(values), BATCH, 0.1, 0.0, 0, bits)
    left, right = _halves(values)
    columns = [f"c{number}" for number in range(COLUMNS // 2)]
    owners = [linear.Owner(terms, 0, left, columns, small_batches=True)]
    owners.append(linear.Owner(terms, 1, right, columns, label, "label", small_batches=True))
    holder = linear.KeyHolder(terms, [COLUMNS // 2] * 2)
    run_here([*(one.take_key() for one in owners), holder.give_key()])
    return [one.epoch(0) for one in (*owners, holder)]


def _shared_roles(values: Any, label: Any, loss: descent.Loss) -> list[Role]:
    half = COLUMNS // 2
    terms = descent.Terms(
        "logistic", ("bank", "clinic", "carol"), 1, len(values), BATCH, 0.1, 0.0, 0, loss_kind=loss,
        columns=(half, half + 1),
    )  # fmt: skip
    left, right = _halves(values)
    columns = [f"c{number}" for number in range(half)]
    parties = [
        shared.Owner(terms, 0, left, columns, small_batches=True),
        shared.Owner(terms, 1, right, columns, label, "label", small_batches=True),
        shared.Provider(terms),
    ]
    run_here([one.begin() for one in parties])
    return [one.epoch(0) for one in parties]


def _traffic(roles: Sequence[Role]) -> tuple[int, list[int]]:
    """Runs the parties of an epoch here; returns how many parcels follow one another at most, each sent once the one
    before has come, and the bytes that each party sends."""
    clocks, sent = [0] * len(roles), [0] * len(roles)
    under_way: dict[tuple[int, int], deque[int]] = defaultdict(deque)

    def counted(me: int, role: Role) -> Role:
        got: Any = None
        while True:
            try:
                step = role.send(got)
            except StopIteration as done:
                return done.value  # type: ignore[no-any-return]
            if isinstance(step, Send):
                under_way[me, step.to].append(clocks[me] + 1)
                sent[me] += sum(tensor.nbytes for tensor in step.tensors)
            got = yield step
            if isinstance(step, Take):
                clocks[me] = max(clocks[me], under_way[step.source, me].popleft())

    run_here([counted(number, role) for number, role in enumerate(roles)])
    return max(clocks), sent


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

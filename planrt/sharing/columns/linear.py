"""Linear and logistic regression over the columns of several owners, on encrypted residuals.

After Hardy et al., "Private federated learning on vertically partitioned data via entity resolution and additively
homomorphic encryption" (2017), with values packed (`packing`). For each batch, with one owner having the labels ``y``:

1. each other owner encrypts its part of the residuals, ``slope * X w``, and sends it to the owner of the labels;
2. that one adds its own part, ``slope * X w - offset * y``, with fresh randomness, and sends the sum to all owners:
   encrypted residuals ``d`` of everybody, which no owner can read;
3. each owner computes its encrypted gradient ``X^T d``, adds a mask that is uniform modulo n, and has the key holder
   decrypt that; it takes the mask off and makes its step. The key holder sees uniform numbers;
4. the sum of ``d**2``, which the loss follows from, is a sum over owners of ``w . g``: they tell the key holder their
   parts plus masks that add up to 0. So the key holder learns the loss of each batch, and nothing else.

**Linear**: ``d = X w - y``, the loss is `torch.nn.functional.mse_loss`. **Logistic**: the second-order Taylor
approximation of the loss at 0, ``log 2 - s u / 2 + u**2 / 8`` with ``s = 2 y - 1``, so ``d = u / 4 - s / 2``.
Weights change as by `torch.optim.SGD` with `weight_decay` on all but the intercept, which is the label owner's.

**What a party learns.** The owner of the labels and each other owner: its own gradient of each batch (so something
about the residuals, if it has many columns for few rows: `check_batch` wants twice as many rows as columns), and its
weights. The key holder: the loss of each batch. All: how many people there are, and who (each about its own rows).
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import numpy as np
import torch

from planrt.errors import CiphertextError, DataError, JointError, OptionError
from planrt.seeding import derive_seed
from planrt.sharing.columns import packing
from planrt.sharing.columns.paillier import PrivateKey, PublicKey
from planrt.sharing.columns.steps import Role, Send, Take, Tensors, Turn, take, take_one

Model = Literal["linear", "logistic"]
_LOSS_BITS: Final = 24
"""Fractional bits of what the key holder is told of the loss."""
_AT_ONCE: Final = 4
"""Encryptions between two turns."""

_Steps = Generator[Send | Take | Turn, Tensors | None, Any]
Array = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True)
class Terms:
    """The facts of a run that all parties know."""

    model: Model
    names: tuple[str, ...]
    """Of the parties: owners first, the key holder last."""
    label_owner: int
    rows: int
    """People to train on."""
    batch_size: int
    lr: float
    l2: float
    seed: int
    key_bits: int = 0
    """Of the key; 0 where there is none."""
    precision: int = packing.DEFAULT_PRECISION

    @property
    def owners(self) -> int:
        """The number of owners; the key holder has that number."""
        return len(self.names) - 1

    @property
    def layout(self) -> packing.Layout:
        """The packing that all parties use."""
        return packing.layout_for(self.key_bits, min(self.batch_size, self.rows), self.precision)

    @property
    def slope(self) -> float:
        """Residuals are slope * prediction - offset * label."""
        return 1.0 if self.model == "linear" else 0.25

    @property
    def offset(self) -> float:
        """See `slope`."""
        return 1.0 if self.model == "linear" else 0.5

    @property
    def factor(self) -> float:
        """A gradient of the loss is factor * the mean of residual times value."""
        return 2.0 if self.model == "linear" else 1.0

    def loss(self, squares: float, rows: int) -> float:
        """Returns the loss from the sum of squared residuals."""
        mean = squares / rows
        return mean if self.model == "linear" else math.log(2) - 0.5 + 2 * mean

    def batches(self, epoch: int) -> list[Array]:
        """Returns the rows of each batch of an epoch: a permutation that all parties know."""
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "batches", epoch))
        order = torch.randperm(self.rows, generator=generator).numpy()
        return [order[at : at + self.batch_size] for at in range(0, self.rows, self.batch_size)]


@dataclass(slots=True)
class Counts:
    """The number of times that a party did what costs time, in values and in ciphertexts."""

    encrypted: int = 0
    decrypted: int = 0
    products: int = 0
    """Ciphertexts that were raised to a power."""
    values_encrypted: int = 0
    values_decrypted: int = 0


@dataclass(slots=True)
class Owner:
    """One owner's side of a run, which lasts over its epochs.

    Args:
        terms: what all know.
        number: its place among the parties.
        values: its columns, float64 [rows, columns], rows in the common order.
        columns: their names.
        labels: of the owner of the labels [rows]; None of others.
        insecure: batches may have fewer rows than twice the columns.

    Raises:
        DataError: labels of a logistic model that are not 0 or 1; OptionError: batches too small for the columns.
    """

    terms: Terms
    number: int
    values: Array
    columns: Sequence[str]
    labels: Array | None = None
    label: str = ""
    small_batches: bool = False
    counts: Counts = field(default_factory=Counts)
    weights: Array = field(init=False)
    """Of its columns; the last one of the owner of the labels is the intercept."""
    key: PublicKey | None = None
    _whole: Array = field(init=False)

    def __post_init__(self) -> None:
        if self.labels is not None:
            check_labels(self.terms.model, self.labels, whose=self.name, column=self.label)
            self.values = np.concatenate([self.values, np.ones((len(self.values), 1))], 1)
            self.columns = [*self.columns, "intercept"]
        check_batch(self.terms, len(self.columns), whose=self.name, small_batches=self.small_batches)
        self._whole = packing.fixed(self.values, self.terms.layout.value_bits)
        self.weights = np.zeros(len(self.columns))

    @property
    def name(self) -> str:
        """Its name."""
        return self.terms.names[self.number]

    def take_key(self) -> Role:
        """Takes the public key from its holder."""
        holder, bits = self.terms.owners, self.terms.key_bits
        raw = yield from take_one(holder, "public key", torch.uint8, [bits // 8], self.terms.names)
        self.key = PublicKey(int.from_bytes(raw.numpy().tobytes(), "big"), bits)
        return {}

    def scores(self, rows: Array) -> Array:
        """Returns this owner's part of the predictions for some of its rows, before any link function."""
        found: Array = self.values[rows] @ self.weights
        return found

    def epoch(self, epoch: int) -> Role:
        """Trains for one epoch; all owners and the key holder run it at the same time."""
        for rows in self.terms.batches(epoch):
            yield from self._batch(rows)
        decided = yield from take_one(self.terms.owners, "loss", torch.float64, [1], self.terms.names)
        return {"loss": float(decided[0])}

    def _batch(self, rows: Array) -> _Steps:
        terms, key, layout = self.terms, self.key, self.terms.layout
        if key is None:
            raise JointError(f"{self.name} has no public key yet")
        values = self._whole[rows]
        packing.check_columns(self.values[rows], self.columns, layout, whose=self.name)
        mine = terms.slope * self.scores(rows)
        if self.labels is not None:
            mine = mine - terms.offset * self._signed(rows)
        packing.check_residuals(mine, terms.owners, layout, whose=self.name)
        plain = packing.packed_residuals(packing.fixed(mine, layout.residual_bits), layout)
        if self.labels is None:
            ciphers = yield from self._encrypted(plain, None)
            self.counts.values_encrypted += len(rows)
            yield Send(terms.label_owner, "encrypted predictions", [key.to_rows(ciphers)])
            whole = yield from self._take_ciphers(terms.label_owner, "encrypted residuals", len(plain))
            mask = yield from take_one(terms.label_owner, "mask of the loss", torch.int64, [1], terms.names)
            loss_mask = int(mask[0])
        else:
            whole, loss_mask = yield from self._residuals(plain, len(rows))
        factors = values if self.labels is None else np.concatenate([values, self._label_column(rows)], 1)
        sums = yield from self._gradient(whole, factors)
        scale = math.ldexp(1.0, -layout.value_bits - layout.residual_bits)
        gradient = np.array([float(one) for one in sums[: len(self.columns)]]) * scale
        squares = terms.slope * float(self.weights @ gradient)
        if self.labels is not None:
            squares -= terms.offset * float(sums[-1]) * scale
        told = (round(math.ldexp(squares, _LOSS_BITS)) + loss_mask + 2**63) % 2**64 - 2**63
        yield Send(terms.owners, "part of the loss", [torch.tensor([told])])
        step = terms.factor * gradient / len(rows) + terms.l2 * self._penalised()
        self.weights = self.weights - terms.lr * step

    def _signed(self, rows: Array) -> Array:
        assert self.labels is not None  # noqa: S101 - its callers have looked
        labels: Array = self.labels[rows]
        return labels if self.terms.model == "linear" else 2 * labels - 1

    def _label_column(self, rows: Array) -> Array:
        return packing.fixed(self._signed(rows), self.terms.layout.value_bits)[:, None]

    def _penalised(self) -> Array:
        if self.labels is None:
            return self.weights
        return np.concatenate([self.weights[:-1], np.zeros(1)])

    def _encrypted(self, plain: Sequence[int], onto: Sequence[Any] | None) -> _Steps:
        """Ciphertexts of plain values, or of their sums with those of others."""
        assert self.key is not None  # noqa: S101 - the caller has looked
        made = []
        for place, value in enumerate(plain):
            made.append(self.key.encrypt(value) if onto is None else self.key.add(onto[place], value))
            if place % _AT_ONCE == _AT_ONCE - 1:
                yield Turn()
        self.counts.encrypted += len(plain)
        return made

    def _take_ciphers(self, source: int, kind: str, count: int) -> _Steps:
        assert self.key is not None  # noqa: S101 - the caller has looked
        tensors = yield from take(source, kind)
        whose = self.terms.names[source]
        if len(tensors) != 1 or len(tensors[0].shape) != 2 or len(tensors[0]) != count:
            raise CiphertextError(
                f"party {whose!r} sent another number of ciphertexts than the {count} of its {kind}"
            )
        return self.key.from_rows(tensors[0], whose=whose)

    def _residuals(self, plain: Sequence[int], rows: int) -> _Steps:
        """The label owner's: everybody's parts added up, and the mask of its part of the loss."""
        terms, key = self.terms, self.key
        assert key is not None  # noqa: S101 - the caller has looked
        others = [number for number in range(terms.owners) if number != self.number]
        total: list[Any] | None = None
        for other in others:
            theirs = yield from self._take_ciphers(other, "encrypted predictions", len(plain))
            total = (
                theirs if total is None else [a * b % key.square for a, b in zip(total, theirs, strict=True)]
            )
        whole = yield from self._encrypted(plain, total)
        self.counts.values_encrypted += rows
        sent = key.to_rows(whole)
        rest = 0
        for other in others:
            mask = secrets.randbits(64) - 2**63
            rest -= mask
            yield Send(other, "encrypted residuals", [sent])
            yield Send(other, "mask of the loss", [torch.tensor([mask])])
        return whole, rest

    def _gradient(self, residuals: Sequence[Any], factors: Array) -> _Steps:
        """Inner products of encrypted residuals with plain columns: masked, decrypted by the key holder, unmasked."""
        terms, key, layout = self.terms, self.key, self.terms.layout
        assert key is not None  # noqa: S101 - the caller has looked
        masks, sent = [], []
        for group in packing.packed_columns(factors, layout):
            product = key.product(residuals, group)
            masks.append(secrets.randbelow(int(key.n)))
            sent.append(key.add(product, masks[-1]))
            self.counts.products += len(group)
            yield Turn()
        self.counts.encrypted += len(sent)
        self.counts.values_encrypted += factors.shape[1]
        yield Send(terms.owners, "masked gradient", [key.to_rows(sent)])
        opened = yield from take_one(
            terms.owners, "decrypted", torch.uint8, [len(sent), terms.key_bits // 8], terms.names
        )
        raw, width = opened.numpy().tobytes(), terms.key_bits // 8
        sums: list[int] = []
        for place, mask in enumerate(masks):
            value = int.from_bytes(raw[place * width : (place + 1) * width], "big")
            count = min(layout.columns, factors.shape[1] - len(sums))
            sums += packing.unpacked(packing.centred(value - mask, int(key.n)), count, layout)
        return sums


@dataclass(slots=True)
class KeyHolder:
    """The side of the party that has the private key: it decrypts masked gradients of a fixed shape, and nothing else.

    `told` is called for each decryption: with the party's name and the number of ciphertexts.
    """

    terms: Terms
    columns: Sequence[int]
    """How many columns each owner has, as was agreed; the label owner's without its intercept and label."""
    told: Callable[[str, int], None] = lambda name, count: None
    counts: Counts = field(default_factory=Counts)
    losses: list[float] = field(default_factory=list)
    """Of each epoch, before each batch's step; what an early stop looks at."""
    _key: PrivateKey | None = None

    def give_key(self) -> Role:
        """Makes a key pair and hands out the public half."""
        self._key = PrivateKey(self.terms.key_bits)
        raw = int(self._key.public.n).to_bytes(self.terms.key_bits // 8, "big")
        public = torch.from_numpy(np.frombuffer(raw, np.uint8).copy())
        for owner in range(self.terms.owners):
            yield Send(owner, "public key", [public])
        return {}

    def epoch(self, epoch: int) -> Role:
        """Decrypts what one epoch needs; returns its loss."""
        squares, terms = 0.0, self.terms
        for rows in terms.batches(epoch):
            for owner in range(terms.owners):
                yield from self._decrypt(owner)
            total = 0
            for owner in range(terms.owners):
                part = yield from take_one(owner, "part of the loss", torch.int64, [1], terms.names)
                total += int(part[0])
            total = (total + 2**63) % 2**64 - 2**63
            squares += math.ldexp(float(total), -_LOSS_BITS)
            del rows
        loss = terms.loss(squares, terms.rows)
        self.losses.append(loss)
        for owner in range(terms.owners):
            yield Send(owner, "loss", [torch.tensor([loss], dtype=torch.float64)])
        return {"loss": loss}

    def _decrypt(self, owner: int) -> _Steps:
        terms, layout, key = self.terms, self.terms.layout, self._key
        if key is None:
            raise JointError(f"{terms.names[terms.owners]} has made no key yet")
        columns = self.columns[owner] + (2 if owner == terms.label_owner else 0)
        whose, count = terms.names[owner], layout.groups(columns)
        tensors = yield from take(owner, "masked gradient")
        if len(tensors) != 1 or tensors[0].dim() != 2 or len(tensors[0]) != count:
            raise CiphertextError(
                f"party {whose!r} asks for something else to be decrypted than the {count} ciphertexts of its masked "
                "gradient: refused"
            )
        ciphers = key.public.from_rows(tensors[0], whose=whose)
        self.told(whose, count)
        opened = []
        for cipher in ciphers:
            value = key.decrypt(cipher)
            if packing.looks_unmasked(value, int(key.public.n), layout):
                raise CiphertextError(
                    f"party {whose!r} asks for a value to be decrypted that has no mask: refused, and told to nobody"
                )
            opened.append(value.to_bytes(terms.key_bits // 8, "big"))
            yield Turn()
        self.counts.decrypted += count
        self.counts.values_decrypted += columns
        raw = np.frombuffer(b"".join(opened), np.uint8).reshape(count, -1).copy()
        yield Send(owner, "decrypted", [torch.from_numpy(raw)])


def check_labels(model: Model, labels: Array, *, whose: str, column: str) -> None:
    """Raises DataError if a logistic model's labels are not all 0 or 1; names party and column."""
    if model == "logistic" and not np.isin(labels, (0.0, 1.0)).all():
        raise DataError(f"{whose}: label column {column!r} has values that are neither 0 nor 1")


def check_batch(terms: Terms, columns: int, *, whose: str, small_batches: bool) -> None:
    """Raises OptionError if a batch has fewer rows than twice a party's columns: its gradients would tell the residuals
    of single people."""
    sizes = [len(one) for one in terms.batches(0)]
    if not small_batches and min(sizes) < 2 * columns:
        raise OptionError(
            f"{whose}: a batch of {min(sizes)} rows has fewer than twice as many as its {columns} columns, so that its "
            "gradients tell about single people: take a batch_size that leaves no short last batch, or "
            "allow_small_batches=True"
        )

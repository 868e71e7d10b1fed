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

**Ciphertexts of another key.** Every message with ciphertexts has the fingerprint of its sender's key
(`paillier.PublicKey`), and who takes it compares: parties whose keys differ by mistake are named before anything is
computed. A fingerprint does not show what a ciphertext was made with. But whatever is a ciphertext of the key stands
for some value, and one that was made with another key stands for a value that is uniform modulo n, as far as anybody
can tell. A gradient leaves the `packing.SPARE_BITS` top bits of a plaintext empty, so once the mask is off each owner
looks whether they are: of such a ciphertext they are with a chance of 2**-36 at most. Each inner product must also be
within the product of two lengths (Cauchy and Schwarz): that of the owner's column, and that of residuals in range. This
costs no ciphertext, and what it looks at are the values that are used; a known value in a slot of its own would tell
only how it was encrypted itself.

*What a malicious party can still do*: encrypt wrong values in range, under the right key; the key holder can answer
with a wrong gradient in range. Both spoil the model. Whether a run ends tells whoever sends residuals at the edge of
the range something of the length of a column over that batch, once.

**What a party learns.** The owner of the labels and each other owner: its own gradient of each batch (so something
about the residuals, if it has many columns for few rows: `check_batch` wants twice as many rows as columns), and its
weights. The key holder: the loss of each batch. All: how many people there are, and who (each about its own rows).
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import torch

from planrt.errors import CiphertextError, JointError, OptionError
from planrt.sharing.columns import packing
from planrt.sharing.columns.paillier import PrivateKey, PublicKey
from planrt.sharing.columns.regression import Array, Columns, Terms
from planrt.sharing.columns.steps import Role, Send, Take, Tensors, Turn, take, take_one

_LOSS_BITS: Final = 24
"""Fractional bits of what the key holder is told of the loss."""
_AT_ONCE: Final = 4
"""Encryptions between two turns."""

_Steps = Generator[Send | Take | Turn, Tensors | None, Any]


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
class Owner(Columns):
    """One owner's side of a run, which lasts over its epochs; `Columns` has its arguments.

    Raises:
        DataError: labels of a logistic model that are not 0 or 1. ValueRangeError: a column that no batch can hold.
            OptionError: batches too small for the columns.
    """

    counts: Counts = field(default_factory=Counts)
    key: PublicKey | None = None
    _whole: Array = field(init=False)
    """Its columns as whole numbers, of the rows that are trained on."""

    def __post_init__(self) -> None:
        terms = self.terms
        self.with_intercept()
        check_batch(terms, len(self.columns), whose=self.name, small_batches=self.small_batches)
        packing.check_values(self.values[: terms.rows], self.columns, terms.layout, whose=self.name)
        self._whole = packing.fixed(self.values[: terms.rows], terms.layout.value_bits)

    def take_key(self) -> Role:
        """Takes the public key from its holder.

        Raises:
            CiphertextError: it is shorter than was agreed on; names the holder.
        """
        holder, bits = self.terms.owners, self.terms.key_bits
        raw = yield from take_one(holder, "public key", torch.uint8, [bits // 8], self.terms.names)
        modulus = int.from_bytes(raw.numpy().tobytes(), "big")
        self.key = PublicKey(modulus, bits, whose=self.terms.names[holder])
        return {}

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
            yield Send(terms.label_owner, "encrypted predictions", key.packed(ciphers))
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
        return self.key.taken(tensors, count, kind, whose=self.terms.names[source], by=self.name)

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
        sent = key.packed(whole)
        rest = 0
        for other in others:
            mask = secrets.randbits(64) - 2**63
            rest -= mask
            yield Send(other, "encrypted residuals", sent)
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
        yield Send(terms.owners, "masked gradient", key.packed(sent))
        opened = yield from take_one(
            terms.owners, "decrypted", torch.uint8, [len(sent), terms.key_bits // 8], terms.names
        )
        raw, width = opened.numpy().tobytes(), terms.key_bits // 8
        sums: list[int] = []
        for place, mask in enumerate(masks):
            value = int.from_bytes(raw[place * width : (place + 1) * width], "big")
            product = packing.centred(value - mask, int(key.n))
            part = factors[:, len(sums) : len(sums) + layout.columns]
            found = packing.unpacked(product, part.shape[1], layout)
            if not packing.is_product(product, found, part, terms.owners, layout):
                raise CiphertextError(self._no_gradient())
            sums += found
        return sums

    def _no_gradient(self) -> str:
        """What is said of a decrypted value that no residuals in range and no column of this owner's give."""
        names, me, label_owner = self.terms.names, self.number, self.terms.label_owner
        senders = range(self.terms.owners) if me == label_owner else [label_owner]
        sent = " or ".join(repr(names[one]) for one in senders if one != me)
        return (
            f"what party {names[-1]!r} decrypted for {self.name!r} is no gradient: party {sent} sent ciphertexts of "
            f"another key or of values that are out of range, or {names[-1]!r} has decrypted something else"
        )


@dataclass(slots=True)
class KeyHolder:
    """The side of the party that has the private key: it decrypts masked gradients of a fixed shape, and nothing else.

    `told` is called for each decryption, before it is answered: with the party's name, the number of ciphertexts, and
    whether it is refused.
    """

    terms: Terms
    columns: Sequence[int]
    """How many columns each owner has, as was agreed; the label owner's without its intercept and label."""
    told: Callable[[str, int, bool], None] = lambda name, count, refused: None
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
        try:
            opened = yield from self._opened(key, tensors, count, whose)
        except CiphertextError:
            self.told(whose, count, True)
            raise
        self.told(whose, count, False)
        self.counts.decrypted += count
        self.counts.values_decrypted += columns
        raw = np.frombuffer(b"".join(opened), np.uint8).reshape(count, -1).copy()
        yield Send(owner, "decrypted", [torch.from_numpy(raw)])

    def _opened(self, key: PrivateKey, tensors: Tensors, count: int, whose: str) -> _Steps:
        """Decrypted values as bytes.

        Raises:
            CiphertextError: they are something else than a masked gradient.
        """
        terms, public = self.terms, key.public
        ciphers = public.taken(tensors, count, "masked gradient", whose=whose, by=terms.names[terms.owners])
        opened = []
        for cipher in ciphers:
            value = key.decrypt(cipher)
            if packing.looks_unmasked(value, int(public.n), terms.layout):
                raise CiphertextError(
                    f"party {whose!r} asks for a value to be decrypted that has no mask: refused, and told to nobody"
                )
            opened.append(value.to_bytes(terms.key_bits // 8, "big"))
            yield Turn()
        return opened


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

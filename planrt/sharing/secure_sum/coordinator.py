"""The coordinator's side of a secure sum: what workers send goes in, what the next message says comes out.

    sum = Coordinator("7f3a...", ["alice", "bob", "charlie"], threshold=2)
    sum.joined(name, keys)           of each worker that answers; then
    sum.group()                      goes to each of them
    sum.shared(name, sealed)         of each that answers, which are then the sharers(); then
    sum.sealed_for(name)             goes to each of them, with what to compute
    sum.masked(name, values)         of each that answers; then
    sum.survivors()                  goes to each of them; where `sum.signs`,
    sum.signed(name, signature)      of each that answers, which are then the revealers(); then
    sum.signatures()                 goes with the survivors to each of these
    sum.revealed(name, revealed)     of `threshold` of them or more; then
    sum.total(context)               is the sum over the survivors

The order in which answers of one step come in makes no difference to the sum: not in one bit.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch

from planrt.errors import AggregationError, SharingError
from planrt.sharing.randomness import SEED_BYTES
from planrt.sharing.secure_sum.group import Group, check_threshold
from planrt.sharing.secure_sum.keys import PRIVATE_BYTES, KeyPair, PublicKeys, agree
from planrt.sharing.secure_sum.masks import add_mask, pair_seed, subtracts
from planrt.sharing.secure_sum.member import SEALED_BYTES, Revealed
from planrt.sharing.secure_sum.shamir import Restorer

_STEPS = ("join", "share", "mask", "sign", "reveal")


class Coordinator:
    """Keeps one aggregation over the workers `names`, of which `threshold` must stay to the end.

    Each step ends when what comes next is asked for: who has not answered by then has dropped out.

    Raises:
        OptionError: see `planrt.sharing.secure_sum.group.check_threshold`. Methods raise AggregationError where fewer
            than `threshold` are left, or what comes out is no sum, and SharingError for an answer that does not fit,
            with the name of the worker.
    """

    def __init__(self, id: str, names: Sequence[str], *, threshold: int) -> None:
        check_threshold(len(set(names)), threshold)
        self.id = id
        self.threshold = threshold
        self._step = 0
        self._left = sorted(names)
        """Who has answered all steps so far."""
        self._keys: dict[str, PublicKeys] = {}
        self._sealed: dict[str, Mapping[str, bytes]] = {}
        self._masked: set[str] = set()
        self._signed: dict[str, bytes] = {}
        self._revealed: dict[str, Revealed] = {}
        self._group: Group | None = None
        self._sum: torch.Tensor | None = None

    def joined(self, name: str, keys: PublicKeys) -> None:
        """Takes the keys that a worker advertises."""
        self._expect("join", name, self._keys)
        self._keys[name] = keys

    def group(self) -> Group:
        """Returns the group of those who joined."""
        if self._group is None:
            self._next("join", self._keys)
            self._group = Group(self.id, self.threshold, {name: self._keys[name] for name in self._left})
            self._check_owners()
        return self._group

    def shared(self, name: str, sealed: Mapping[str, bytes]) -> None:
        """Takes the shares that a worker sealed for the others."""
        self._expect("share", name, self._sealed)
        if sealed.keys() != set(self._left) - {name} or any(
            len(one) != SEALED_BYTES for one in sealed.values()
        ):
            raise SharingError(f"worker {name!r} did not seal a share for each other worker")
        self._sealed[name] = sealed

    def sharers(self) -> list[str]:
        """Returns the workers whose shares are in the others' hands: these are asked for values."""
        if self._step == _STEPS.index("share"):
            self._next("share", self._sealed)
            self._check_owners()
        return sorted(self._sealed)

    def sealed_for(self, name: str) -> dict[str, bytes]:
        """Returns the shares that other `sharers` sealed for a worker."""
        return {other: self._sealed[other][name] for other in self.sharers() if other != name}

    def masked(self, name: str, values: torch.Tensor) -> None:
        """Takes the masked values of a worker (int64, 1-D); the first one's memory becomes the sum."""
        self._expect("mask", name, self._masked)
        if values.dtype != torch.int64 or values.dim() != 1:
            raise SharingError(
                f"masked values are int64 in one dimension, not {values.dtype}, as of {name!r}"
            )
        if self._sum is None:
            self._sum = values
        elif values.shape != self._sum.shape:
            raise SharingError(f"worker {name!r} answers with {len(values)} values, others {len(self._sum)}")
        else:
            self._sum += values
        self._masked.add(name)

    def survivors(self) -> list[str]:
        """Returns who is in the sum."""
        if self._step == _STEPS.index("mask"):
            self._next("mask", self._masked)
            self._check_owners()
            if not self.signs:
                self._step += 1
        return sorted(self._masked)

    @property
    def signs(self) -> bool:
        """True where members are to sign the list of survivors: all have signed their keys."""
        return self.group().signed

    def signed(self, name: str, signature: bytes) -> None:
        """Takes a survivor's signature of the list of survivors."""
        self._expect("sign", name, self._signed)
        self._signed[name] = signature

    def revealers(self) -> list[str]:
        """Returns who is asked to reveal shares: the survivors, or those of them who signed."""
        if self._step == _STEPS.index("sign"):
            self._next("sign", self._signed)
        return list(self._left)

    def signatures(self) -> dict[str, bytes]:
        """Returns the signatures of the list of survivors; none where keys are not signed."""
        return dict(self._signed)

    def revealed(self, name: str, revealed: Revealed) -> None:
        """Takes what a worker reveals."""
        self._expect("reveal", name, self._revealed)
        alive, gone = self._masked, self._sealed.keys() - self._masked
        if revealed.seeds.keys() != alive or revealed.keys.keys() != gone:
            raise SharingError(f"worker {name!r} did not reveal the shares that it was asked for")
        self._revealed[name] = revealed

    @property
    def enough(self) -> bool:
        """True once as many workers have revealed their shares as are needed."""
        return len(self._revealed) >= self.threshold

    def total(self, context: bytes) -> torch.Tensor:
        """Returns the sum of the survivors' values, modulo 2**64. `context` is that of `Member.mask`.

        1. Restore the seed of each survivor and take its own mask away.
        2. Restore the key of each who dropped out after others had made masks with it, and take these away.
        """
        self._next("reveal", self._revealed)
        group, values = self.group(), self._sum
        assert values is not None  # noqa: S101 - there are survivors
        digest, places = group.digest(), group.places
        revealing = self._left[: self.threshold]
        restorer = Restorer([places[name] for name in revealing])

        def restored(kind: str, of: str, length: int) -> bytes:
            shares = {places[name]: getattr(self._revealed[name], kind)[of] for name in revealing}
            try:
                return restorer.restore(shares, length)
            except SharingError as error:
                raise AggregationError(
                    f"the secret of worker {of!r} could not be restored: {error}"
                ) from error

        for name in sorted(self._masked):
            add_mask(values, restored("seeds", name, SEED_BYTES), negative=True)
        for gone in sorted(self._sealed.keys() - self._masked):
            pair = KeyPair.of(restored("keys", gone, PRIVATE_BYTES))
            if pair.public != group.keys[gone].mask:
                raise AggregationError(f"the shares of the key of worker {gone!r} do not give that key")
            for name in sorted(self._masked):
                agreed = agree(pair, group.keys[name].mask, name)
                # What the survivor added is taken away, and the other way round.
                add_mask(
                    values, pair_seed(agreed, digest, context, gone, name), negative=not subtracts(name, gone)
                )
        self._sum = None
        return values

    # ------------------------------------------------------------------------------------------ steps

    def _expect(self, step: str, name: str, answered: Collection[str]) -> None:
        if _STEPS[self._step : self._step + 1] != (step,):
            raise SharingError(f"worker {name!r} answers too late, or too early: {step}")
        if name not in self._left or name in answered:
            raise SharingError(f"worker {name!r} answers twice, or was not asked: {step}")

    def _next(self, step: str, answered: Collection[str]) -> None:
        if _STEPS[self._step : self._step + 1] != (step,):
            raise SharingError(f"a secure aggregation whose step is no more, or not yet, to {step}")
        gone = [name for name in self._left if name not in answered]
        left = [name for name in self._left if name in answered]
        if len(left) < self.threshold:
            raise AggregationError(
                f"{len(left)} of the workers answered when asked to {step}, and the secure aggregation needs "
                f"{self.threshold}: without {', '.join(map(repr, gone))} there is no sum, and nothing was revealed"
            )
        self._left = left
        self._step += 1

    def _check_owners(self) -> None:
        if wanting := self.group().wanting_more(len(self._left)):
            raise AggregationError(f"{wanting}: there is no sum, and nothing was revealed")

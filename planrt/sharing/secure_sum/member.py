"""One worker's side of a secure sum: four answers, each given once, in this order; five where keys are signed.

member = Member("alice", least=2)
member.join("7f3a...")             -> PublicKeys
member.share(group)                -> other worker -> two shares of this one's secrets, sealed
member.mask(values, sealed, ...)   -> values, masked
member.sign(survivors)             -> a signature of that list
member.reveal(survivors, ...)      -> Revealed
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import torch

from planrt.errors import PolicyError, SharingError
from planrt.sharing.randomness import new_seed
from planrt.sharing.secure_sum.group import Group
from planrt.sharing.secure_sum.keys import TAG_BYTES, KeyPair, PublicKeys, agree, seal, unseal
from planrt.sharing.secure_sum.masks import add_mask, pair_seed, subtracts
from planrt.sharing.secure_sum.shamir import SHARE_BYTES, split
from planrt.sharing.secure_sum.signing import Identity

SEALED_BYTES = 2 * SHARE_BYTES + TAG_BYTES
"""Two sealed shares take this many bytes."""


@dataclass(frozen=True, slots=True)
class Revealed:
    """The shares that a worker reveals: of the survivors' own seeds, and of the mask keys of those who dropped out."""

    seeds: Mapping[str, bytes] = field(repr=False)
    keys: Mapping[str, bytes] = field(repr=False)


class Member:
    """One worker in one aggregation, called `name`. Its owner wants at least `least` workers in the sum. With an
    `identity` it signs its keys and the list of survivors, and checks what the others signed if it has their keys.

    Every method raises SharingError where it is called out of turn, a second time, or with what does not fit,
    SignatureError where another member did not sign, and PolicyError where there are fewer workers than its owner
    wants, or another member's.
    """

    def __init__(self, name: str, *, least: int = 2, identity: Identity | None = None) -> None:
        self.name = name
        self._identity = identity
        self._alive: frozenset[str] | None = None
        """The survivors that it has signed."""
        self._seal = KeyPair.fresh()
        self._mask = KeyPair.fresh()
        self._least = least
        self._seed = new_seed()
        self._next = "join"
        self._group: Group | None = None
        self._digest = b""
        self._agreed: dict[str, bytes] = {}
        self._sealed: dict[str, bytes] = {}
        self._own: bytes = b""

    def __repr__(self) -> str:
        return f"<Member {self.name!r}, next: {self._next}>"

    def _turn(self, step: str, then: str) -> None:
        if self._next != step:
            raise self._out_of_turn(step)
        self._next = then  # before anything is done: what fails is not done again

    def _out_of_turn(self, step: str) -> SharingError:
        return SharingError(
            f"worker {self.name!r} was asked to {step} in a secure aggregation where its next step is to "
            f"{self._next}: each is done once, in order"
        )

    def join(self, sum: str = "") -> PublicKeys:
        """Returns this worker's keys for this aggregation, which is called `sum`."""
        self._turn("join", "share")
        if self._identity is None:
            return self._keys
        return replace(self._keys, signature=self._identity.sign_keys(sum, self._keys))

    @property
    def _keys(self) -> PublicKeys:
        return PublicKeys(self._seal.public, self._mask.public, self._least)

    def share(self, group: Group) -> dict[str, bytes]:
        """Returns for each other member its shares of this worker's seed and mask key, sealed."""
        self._turn("share", "mask")
        if group.keys.get(self.name) != self._keys:
            raise SharingError(f"the group does not have the keys that worker {self.name!r} advertised")
        self._check_enough(group, group.names, "the group")
        if self._identity is not None:
            self._identity.check_keys(group)
        self._group, self._digest = group, group.digest()
        places = group.places
        seeds = split(self._seed, group.threshold, list(places.values()))
        keys = split(self._mask.private, group.threshold, list(places.values()))
        shares = {name: seeds[place - 1] + keys[place - 1] for name, place in places.items()}
        self._own = shares.pop(self.name)
        self._agreed = {name: agree(self._seal, group.keys[name].seal, name) for name in shares}
        return {
            name: seal(self._agreed[name], share, self._digest, self.name, name)
            for name, share in shares.items()
        }

    def check_sealed(self, sealed: Mapping[str, bytes]) -> None:
        """Raises unless `mask` is next, and could be done with these shares."""
        if self._next != "mask":
            raise self._out_of_turn("mask")
        group = self._grouped()
        if unknown := sealed.keys() - (group.keys.keys() - {self.name}):
            raise SharingError(f"shares of {sorted(unknown)[0]!r}, who is no other member of the group")
        if any(len(one) != SEALED_BYTES for one in sealed.values()):
            raise SharingError(f"sealed shares have {SEALED_BYTES} bytes")
        self._check_enough(group, [self.name, *sealed], "the group")

    def mask(self, values: torch.Tensor, sealed: Mapping[str, bytes], context: bytes) -> torch.Tensor:
        """Returns `values` (int64, 1-D, contiguous), masked in place.

        `sealed` are the shares that other members sealed for this one; who sent none has dropped out. `context` is a
        digest of what all were asked, or masks do not cancel.
        """
        self.check_sealed(sealed)
        self._turn("mask", "reveal" if self._identity is None else "sign")
        group = self._grouped()
        self._sealed = dict(sealed)
        add_mask(values, self._seed)
        for name in sealed:
            agreed = agree(self._mask, group.keys[name].mask, name)
            pair = pair_seed(agreed, self._digest, context, self.name, name)
            add_mask(values, pair, negative=subtracts(self.name, name))
        self._seed, self._mask = b"", KeyPair(b"", self._mask.public)  # used up
        return values

    def sign(self, survivors: Collection[str]) -> bytes:
        """Returns this worker's signature of the list of those who are in the sum: it signs one list, and reveals what
        belongs to that one."""
        if self._identity is None:
            raise SharingError(f"worker {self.name!r} has no key to sign with")
        self._turn("sign", "reveal")
        group, alive = self._grouped(), self._checked(survivors)
        self._alive = alive
        return self._identity.sign_survivors(group, alive)

    def reveal(
        self, survivors: Collection[str], signatures: Mapping[str, bytes] = MappingProxyType({})
    ) -> Revealed:
        """Returns this worker's shares: of the seeds of `survivors`, who have answered with masked values, and of the
        mask keys of those who sent shares and no values. `signatures` are those of this list."""
        unsigned = self._identity is None or (self._next == "sign" and not self._identity.checks)
        if unsigned and self._next == "sign":  # the others do not sign
            self._next = "reveal"
        self._turn("reveal", "be done")
        group, alive = self._grouped(), self._checked(survivors)
        if self._identity is not None and not unsigned:
            if alive != self._alive:
                raise SharingError(
                    f"worker {self.name!r} reveals shares for the survivors that it signed, and these are others"
                )
            self._identity.check_survivors(group, alive, signatures)
        masked = {self.name, *self._sealed}
        opened = {
            name: unseal(self._agreed[name], one, self._digest, name, self.name)
            for name, one in self._sealed.items()
        }
        opened[self.name] = self._own
        self._forget()
        return Revealed(
            {name: opened[name][:SHARE_BYTES] for name in sorted(alive)},
            {name: opened[name][SHARE_BYTES:] for name in sorted(masked - alive)},
        )

    def _checked(self, survivors: Collection[str]) -> frozenset[str]:
        alive = frozenset(survivors)
        if self.name not in alive or not alive <= {self.name, *self._sealed} or len(alive) < len(survivors):
            raise SharingError(f"worker {self.name!r} cannot reveal shares for these survivors")
        self._check_enough(self._grouped(), alive, "the sum")
        return alive

    def _check_enough(self, group: Group, names: Collection[str], what: str) -> None:
        if wanting := group.wanting_more(len(names)):
            raise PolicyError(wanting, rule="require_secure_aggregation")
        if len(names) < group.threshold:
            raise SharingError(
                f"{what} has {len(names)} workers, fewer than its threshold of {group.threshold}"
            )

    def _grouped(self) -> Group:
        assert self._group is not None  # noqa: S101 - by the order of the steps
        return self._group

    def _forget(self) -> None:
        self._seal = KeyPair(b"", self._seal.public)
        self._own = b""
        self._agreed, self._sealed = {}, {}

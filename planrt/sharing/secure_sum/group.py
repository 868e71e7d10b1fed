"""A group: the workers of one aggregation, what they advertised, and how many of them restore a secret."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

from planrt.errors import OptionError, SharingError
from planrt.sharing.secure_sum.keys import PUBLIC_BYTES, PublicKeys
from planrt.shown import shown

MOST_MEMBERS = 1000
"""Each member seals a share for every other, so that messages and work grow with the square of their number."""


def default_threshold(members: int) -> int:
    """Returns floor(2n / 3) + 1 for `members` = n: then fewer than a third who collude learn nothing (CCS 2017,
    section 6.2)."""
    return 2 * members // 3 + 1


def check_threshold(members: int, threshold: int) -> None:
    """Raises OptionError unless more than half and at most all of two members or more restore a secret."""
    if not 2 <= members <= MOST_MEMBERS:
        raise OptionError(
            f"a secure aggregation takes from 2 to {MOST_MEMBERS} workers, not {members}: a sum over one is its value"
        )
    if not members // 2 < threshold <= members:
        raise OptionError(
            f"the threshold of {members} workers is from {members // 2 + 1} to {members}, not {threshold}: half of "
            "them must never be enough, or a coordinator that tells two halves different things learns their values"
        )


@dataclass(frozen=True)
class Group:
    """The members of one aggregation, by name, with their keys; the same for all of them.

    Raises:
        OptionError: too few or too many, or a threshold that is no majority of them.
        SharingError: a key of the wrong length, or twice.
    """

    id: str
    threshold: int
    keys: Mapping[str, PublicKeys]

    def __post_init__(self) -> None:
        check_threshold(len(self.keys), self.threshold)
        every = [key for one in self.keys.values() for key in (one.seal, one.mask)]
        if any(len(key) != PUBLIC_BYTES for key in every) or len(set(every)) < len(every):
            raise SharingError(f"keys have {PUBLIC_BYTES} bytes each, and no two are the same")

    @property
    def names(self) -> list[str]:
        """The members' names, in order."""
        return sorted(self.keys)

    @property
    def signed(self) -> bool:
        """True where every member has signed its keys; by whom, only they can tell."""
        return all(one.signature for one in self.keys.values())

    @property
    def places(self) -> dict[str, int]:
        """name -> the place of its shares."""
        return {name: place for place, name in enumerate(self.names, 1)}

    def digest(self) -> bytes:
        """Returns the SHA-256 of all of it: every key that members agree on depends on it."""
        digest = hashlib.sha256()
        for part in (self.id.encode(), str(self.threshold).encode()):
            digest.update(len(part).to_bytes(8, "big") + part)
        for name in self.names:
            spelt = name.encode()
            digest.update(len(spelt).to_bytes(8, "big") + spelt)
            digest.update(self.keys[name].seal + self.keys[name].mask)
            digest.update(self.keys[name].least.to_bytes(8, "big"))
        return digest.digest()

    def wanting_more(self, count: int) -> str:
        """Returns which members' owners want more than `count` workers in a sum, in words; ``""`` if none does."""
        wanting = {name: keys.least for name, keys in self.keys.items() if keys.least > count}
        if not wanting:
            return ""
        names = shown(", ".join(repr(name) for name in sorted(wanting)), 300)
        return (
            f"the owner{'s' * (len(wanting) > 1)} of {names} want{'s' * (len(wanting) == 1)} at least "
            f"{max(wanting.values())} workers in a sum, and there are {count}"
        )

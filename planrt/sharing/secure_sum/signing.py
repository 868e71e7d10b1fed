"""Signatures in a secure sum: whose the keys are that a coordinator passes on, and who it says has survived.

Each worker has a key that lasts, and its owner has been given the others' public ones, not by the coordinator.

Sources: Bonawitz et al. (CCS 2017), section 4 and figure 4, what is red and underlined there, and section 6.2 on what
it is for: a coordinator that does not follow the protocol. Ed25519 is RFC 8032, of the package `cryptography`.

Two texts are signed. Both name the signer, and neither can be taken for the other:

    keys         the name of the sum, the two public keys, the least number of workers that the owner wants
    survivors    the digest of the group, which has the threshold and all keys in it, and the list of the survivors
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from planrt.errors import OptionError, SignatureError
from planrt.sharing.secure_sum.group import Group
from planrt.sharing.secure_sum.keys import PublicKeys

SIGNATURE_BYTES: Final = 64
VERIFYING_BYTES: Final = 32
_LABEL: Final = b"planrt secure sum signature 1"


class Identity:
    """The worker `name` with its key for signatures, and the public keys of the `peers` that its owner was given.

    Without `peers` (None) it signs and checks nothing. With them it adds up with these workers alone.

    Raises:
        OptionError: a public key is none, or `peers` has another one for this worker itself.
    """

    def __init__(self, name: str, key: Ed25519PrivateKey, peers: Mapping[str, bytes] | None = None) -> None:
        self.name = name
        self._key = key
        self.public = key.public_key().public_bytes_raw()
        """What others check its signatures with, 32 bytes."""
        self._peers: dict[str, Ed25519PublicKey] | None = None
        if peers is not None:
            if peers.get(name, self.public) != self.public:
                raise OptionError(
                    f"the key of {name!r} among those of its peers is not the public part of its own key: one of the "
                    "two is of before"
                )
            self._peers = {
                other: _loaded(other, public) for other, public in {**peers, name: self.public}.items()
            }

    def __repr__(self) -> str:
        return f"<Identity {self.name!r}, {'checks nobody' if self._peers is None else sorted(self._peers)}>"

    @property
    def checks(self) -> bool:
        """True where it takes part only with workers whose keys it has been given."""
        return self._peers is not None

    def sign_keys(self, sum: str, keys: PublicKeys) -> bytes:
        """Returns the signature (64 bytes) of the keys that it advertises in that sum."""
        return self._key.sign(_keys_text(sum, self.name, keys))

    def sign_survivors(self, group: Group, survivors: Collection[str]) -> bytes:
        """Returns the signature (64 bytes) of the list of those who are in the sum."""
        return self._key.sign(_survivors_text(self.name, group, survivors))

    def check_keys(self, group: Group) -> None:
        """Checks that every member signed its own keys; nothing where it `checks` nobody.

        Raises:
            SignatureError: one did not, or is none whose key was given; names it.
        """
        for name in group.names if self._peers is not None else ():
            keys = group.keys[name]
            if not keys.signature:
                self._peer(name)
                raise SignatureError(
                    f"the keys of worker {name!r} are not signed: worker {self.name!r} adds up only with those who "
                    f"sign theirs. Start {name!r} with --sum-key"
                )
            if not self._signed(name, keys.signature, _keys_text(group.id, name, keys)):
                raise SignatureError(
                    f"the keys that were passed on as those of worker {name!r} are not signed by it: somebody put "
                    f"others in their place, or worker {self.name!r} was given an old key of {name!r}"
                )

    def check_survivors(
        self, group: Group, survivors: Collection[str], signatures: Mapping[str, bytes]
    ) -> None:
        """Checks that `group.threshold` of the survivors signed this list; nothing where it `checks` nobody.

        Raises:
            SignatureError: a signature is not of this list, and names whose; or there are too few.
        """
        if self._peers is None:
            return
        for name, signature in sorted(signatures.items()):
            if name not in survivors or not self._signed(
                name, signature, _survivors_text(name, group, survivors)
            ):
                raise SignatureError(
                    f"worker {name!r} did not sign this list of survivors ({', '.join(sorted(survivors))}): it was "
                    "told of another one, or somebody signed in its name"
                )
        if (count := len({*signatures, self.name})) < group.threshold:
            raise SignatureError(
                f"{count} workers signed the list of survivors, and worker {self.name!r} reveals its shares when "
                f"{group.threshold} have: without {', '.join(sorted(set(survivors) - set(signatures) - {self.name}))}"
            )

    def _signed(self, name: str, signature: bytes, text: bytes) -> bool:
        try:
            self._peer(name).verify(signature, text)
        except InvalidSignature:
            return False
        return True

    def _peer(self, name: str) -> Ed25519PublicKey:
        assert self._peers is not None  # noqa: S101 - its callers have seen it
        if name not in self._peers:
            raise SignatureError(
                f"worker {self.name!r} was given no key of worker {name!r}, and adds up only with those of whom it "
                f"was: add {name!r} to --sum-peers, or leave one of the two out"
            )
        return self._peers[name]


def _loaded(name: str, public: bytes) -> Ed25519PublicKey:
    try:
        return Ed25519PublicKey.from_public_bytes(public)
    except ValueError:
        raise OptionError(f"the key of {name!r} is no public key of Ed25519, 32 bytes") from None


def _keys_text(sum: str, name: str, keys: PublicKeys) -> bytes:
    return _text("keys", sum.encode(), name.encode(), keys.seal, keys.mask, keys.least.to_bytes(8, "big"))


def _survivors_text(name: str, group: Group, survivors: Collection[str]) -> bytes:
    return _text("survivors", group.digest(), name.encode(), *(one.encode() for one in sorted(survivors)))


def _text(purpose: str, *parts: bytes) -> bytes:
    return b"".join(len(part).to_bytes(8, "big") + part for part in (_LABEL, purpose.encode(), *parts))

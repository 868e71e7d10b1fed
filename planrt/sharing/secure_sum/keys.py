"""Keys that two workers agree on, and what they seal for each other under them.

Sources: X25519 is RFC 7748, section 5; keys are made of what was agreed by HKDF with SHA-256 (RFC 5869); shares are
sealed with ChaCha20-Poly1305 (RFC 8439). All three are the package `cryptography`'s.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from planrt.errors import SharingError

PUBLIC_BYTES = 32
PRIVATE_BYTES = 32
TAG_BYTES = 16
_LABEL = b"planrt secure sum 1"
_NONCE = bytes(12)
"""A sealing key is used for one message: each aggregation has fresh keys, and each direction its own."""


@dataclass(frozen=True, slots=True)
class PublicKeys:
    """The two keys that a worker advertises, 32 bytes each: others seal shares for it with `seal`, and make masks with
    `mask`. Its owner wants at least `least` workers in a sum. With a `signature` it says that they are its own; without
    it they are the same keys."""

    seal: bytes
    mask: bytes
    least: int = 2
    signature: bytes = field(default=b"", compare=False)


@dataclass(frozen=True, slots=True)
class KeyPair:
    """An X25519 key of one aggregation."""

    private: bytes = field(repr=False)
    public: bytes

    @classmethod
    def fresh(cls) -> KeyPair:
        """Returns a new pair, of the operating system's entropy."""
        return cls.of(X25519PrivateKey.generate().private_bytes_raw())

    @classmethod
    def of(cls, private: bytes) -> KeyPair:
        """Returns the pair that `private` (32 bytes) belongs to."""
        return cls(private, X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw())


def agree(own: KeyPair, other: bytes, name: str) -> bytes:
    """Returns the secret that `own` and the key `other`, of the worker `name`, give both of them alone.

    Raises:
        SharingError: `other` is no key, or one with which everybody would agree on the same.
    """
    try:
        return X25519PrivateKey.from_private_bytes(own.private).exchange(
            X25519PublicKey.from_public_bytes(other)
        )
    except ValueError as error:
        raise SharingError(f"the key of worker {name!r} cannot be used: {error}") from error


def derive(agreed: bytes, purpose: str, *about: bytes, length: int) -> bytes:
    """Returns a key of `length` bytes for one `purpose`, of a secret and all that it depends on."""
    info = b"".join(len(part).to_bytes(8, "big") + part for part in (_LABEL, purpose.encode(), *about))
    return HKDF(algorithm=SHA256(), length=length, salt=None, info=info).derive(agreed)


def seal(agreed: bytes, text: bytes, group: bytes, sender: str, receiver: str) -> bytes:
    """Returns `text`, sealed by `sender` for `receiver`; once for each two and aggregation."""
    key = derive(agreed, "seal", group, sender.encode(), receiver.encode(), length=32)
    return ChaCha20Poly1305(key).encrypt(_NONCE, text, None)


def unseal(agreed: bytes, sealed: bytes, group: bytes, sender: str, receiver: str) -> bytes:
    """Returns what `seal` was given.

    Raises:
        SharingError: it was changed, or sealed for another group, by or for somebody else.
    """
    key = derive(agreed, "seal", group, sender.encode(), receiver.encode(), length=32)
    try:
        return ChaCha20Poly1305(key).decrypt(_NONCE, sealed, None)
    except InvalidTag:
        raise SharingError(
            f"what worker {sender!r} sealed for {receiver!r} cannot be opened: it was changed on the way, or the two "
            "were told of different groups"
        ) from None

"""The files of signed secure aggregation: a worker's own key, and those of its peers in words.

A worker's key is a private key of Ed25519 in PEM, for its owner only. A file of peers has a line ``name: key`` for each
worker, where the key is the public one in 64 hex digits, and lines that begin with ``#``. Nothing in it is secret, but
who could write to it could put in other keys.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from planrt.errors import OptionError
from planrt.workers.serving.secret_files import read_secret, write_secret

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from planrt.sharing.secure_sum.signing import Identity


def identity_of(
    name: str, key: str | Path | None, peers: str | Path | Mapping[str, str] | None
) -> Identity | None:
    """Returns who the worker `name` is in secure aggregations: with its key in the file `key`, and with the keys of
    `peers`, a file or name -> 64 hex digits; None where it has no key.

    Raises:
        OptionError: `peers` without a key, a file that cannot be read or that others may change, or that holds
            something else.
    """
    if key is None:
        if peers is not None:
            raise OptionError(
                "sum_peers (--sum-peers) needs the worker's own key as well: sum_key (--sum-key)"
            )
        return None
    from planrt.sharing.secure_sum.signing import Identity

    given = None
    if isinstance(peers, Mapping):
        given = {other: _public(text, f"sum_peers[{other!r}]") for other, text in peers.items()}
    elif peers is not None:
        given = read_peers(peers)
    return Identity(name, read_key(key), given)


def write_key(path: str | Path) -> str:
    """Writes a new key to a file that only its owner may read; returns the public one in hex digits.

    Raises:
        OptionError: it cannot be written, or is there already.
    """
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    key = Ed25519PrivateKey.generate()
    write_secret(path, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode())
    return key.public_key().public_bytes_raw().hex()


def read_key(path: str | Path) -> Ed25519PrivateKey:
    """Returns the key of a file.

    Raises:
        OptionError: it cannot be read, others may read it or write to it, or it holds another kind of key.
    """
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    text = read_secret(path)
    try:
        key = load_pem_private_key(text.encode(), None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, Ed25519PrivateKey):
        raise OptionError(
            f"{path} holds no private key of Ed25519 in PEM without a password: planrt sum-keys make NAME makes one"
        )
    return key


def read_peers(path: str | Path) -> dict[str, bytes]:
    """Returns name -> public key (32 bytes) of a file of peers.

    Raises:
        OptionError: it cannot be read, others may write to it, or a line is none; names the line.
    """
    try:
        with open(path, encoding="utf-8") as file:
            mode = os.fstat(file.fileno()).st_mode
            lines = file.read().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no text"
        raise OptionError(f"{path} cannot be read: {why}") from None
    if os.name == "posix" and mode & 0o022:
        raise OptionError(f"others may write to {path}, and put in other keys: chmod go-w {path}")
    peers: dict[str, bytes] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.startswith("#"):
            continue
        name, colon, text = (part.strip() for part in line.rpartition(":"))
        if not colon or not name or name in peers:
            raise OptionError(f"{path}, line {number}: write `name: key`, each name once")
        peers[name] = _public(text, f"{path}, line {number}")
    if not peers:
        raise OptionError(
            f"{path} names no workers: write `name: key` for each, as planrt sum-keys prints it"
        )
    return peers


def _public(text: str, where: str) -> bytes:
    try:
        public = bytes.fromhex(text)
    except (ValueError, TypeError):
        public = b""
    if len(public) != 32:
        raise OptionError(f"{where}: a key has 64 hex digits, as planrt sum-keys prints it")
    return public

"""Proofs of tokens: a client shows that it has one, and the worker that it knows it, and the token never travels.

This is SCRAM-SHA-256 (RFC 5802 and RFC 7677), as its messages are written there. A worker keeps a `Verifier`: who
reads that can neither tell the token nor prove it. Both sides draw a nonce, so that what was recorded proves nothing
again, and a client's proof is no worker's: each is made with a key of its own.

Over TLS a proof is bound to the channel (``tls-server-end-point``, RFC 5929, with SHA-256 whatever the certificate was
signed with): passed on by somebody in between, who has another certificate, it is worth nothing. TLS 1.3 has no better
binding that Python can ask for (``tls-exporter``, RFC 9266).

In the place of a user's name stands the token's own id, a salted hash as slow as the verifier's: `connect_as` takes a
token and no name, and no name travels either.
"""

from __future__ import annotations

import base64
import binascii
import functools
import hashlib
import hmac
import re
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, Protocol

from planrt.errors import OptionError, PlanrtError

ITERATIONS: Final = 15_000
"""Of PBKDF2. Tokens are random and long: this is for those that people made up."""
FEWEST_ITERATIONS: Final = 4096
MOST_ITERATIONS: Final = 1_000_000
"""That a client does for a worker: with fewer its answer helps whoever guesses, with more it would be kept busy."""
_ID_SALT: Final = b"planrt: the id of a token"
_SCHEME: Final = "SCRAM-SHA-256"
_BOUND: Final = "p=tls-server-end-point,,"
_UNBOUND: Final = "n,,"

LEAST_LENGTH: Final = 16
LEAST_VARIETY: Final = 8
"""Characters, and different ones, of a token that somebody else might guess at."""


class ProofError(PlanrtError):
    """A proof that does not hold, or no proof at all."""


def new_token() -> str:
    """A token with 192 random bits, as `planrt users add` makes them."""
    return secrets.token_urlsafe(24)


def check_strength(user: str, token: str) -> None:
    """Raises OptionError if a token is easy to guess."""
    if len(token) < LEAST_LENGTH or len(set(token)) < LEAST_VARIETY:
        raise OptionError(
            f"the token of user {user!r} is easy to guess: it needs {LEAST_LENGTH} characters, {LEAST_VARIETY} of them "
            f"different; `planrt users add {user}` makes one"
        )


@functools.lru_cache(maxsize=256)
def token_id(token: str) -> str:
    """The id of a token, which tells nothing of it: 32 hexadecimal digits."""
    return hashlib.pbkdf2_hmac("sha256", token.encode(), _ID_SALT, ITERATIONS, 16).hex()


@dataclass(frozen=True, slots=True)
class Verifier:
    """What a worker keeps of a token."""

    id: str
    iterations: int
    salt: bytes = field(repr=False)
    stored_key: bytes = field(repr=False)
    server_key: bytes = field(repr=False)

    @classmethod
    def of(cls, token: str) -> Verifier:
        """The verifier of a token, with a salt of its own."""
        salt = secrets.token_bytes(16)
        return _verifier(token_id(token), token, salt, ITERATIONS)

    @classmethod
    def of_secret(cls, id: str, secret: str) -> Verifier:
        """The verifier of random bytes that nobody can guess at, so that it need not be slow."""
        return _verifier(id, secret, secrets.token_bytes(16), FEWEST_ITERATIONS)

    @classmethod
    def parse(cls, text: str) -> Verifier:
        """The inverse of ``str``.

        Raises:
            OptionError: it is not one.
        """
        found = re.fullmatch(r"SCRAM-SHA-256\$(\d{4,7}):([^$:]+)\$([^$:]+):([^$:]+)\$([0-9a-f]{32})", text)
        try:
            if found is not None and int(found[1]) <= MOST_ITERATIONS:
                salt, stored, server = (_decoded(found[number]) for number in (2, 3, 4))
                if len(stored) == len(server) == 32:
                    return cls(found[5], int(found[1]), salt, stored, server)
        except ProofError:
            pass
        raise OptionError(f"{_SCHEME}$... is cut or changed: make it anew with `planrt users add`")

    def __str__(self) -> str:
        salt, stored, server = map(_encoded, (self.salt, self.stored_key, self.server_key))
        return f"{_SCHEME}${self.iterations}:{salt}${stored}:{server}${self.id}"


def is_verifier(text: str) -> bool:
    """Whether this is meant as a verifier, and not as a token."""
    return text.startswith(f"{_SCHEME}$")


def fake_verifier(id: str, secret: bytes, iterations: int = ITERATIONS) -> Verifier:
    """What is answered for the id of no token: always the same, so that it cannot be told from another."""
    return Verifier(id, iterations, _hmac(secret, b"salt" + id.encode())[:16], bytes(32), bytes(32))


@dataclass(frozen=True, slots=True)
class TicketProof:
    """What a worker has of a ticket (`planrt.workers.machine.keeping.tickets`), to prove it."""

    id: str
    secret: str = field(repr=False)


class Prover(Protocol):
    """The client's side of one handshake; see `Proving`."""

    first: str

    def answer(self, challenge: str) -> str:
        """See `Proving.answer`."""

    def check(self, final: str) -> None:
        """See `Proving.check`."""


class HeldElsewhere(Protocol):
    """A token that another process has, which proves it in this one's place."""

    def proving(self, binding: bytes | None) -> Prover:
        """Returns the client's side of one handshake over a channel with that binding."""


Token = str | HeldElsewhere
"""What a client proves."""


def proving(token: Token, binding: bytes | None) -> Prover:
    """Returns the client's side of one handshake over a channel with that binding."""
    return Proving(token, binding) if isinstance(token, str) else token.proving(binding)


class Proving:
    """The client's side of one handshake. `binding` is its channel's, over TLS; `nonce` and `id` are drawn and computed
    if they are not given.
    """

    def __init__(
        self, token: str, binding: bytes | None = None, *, nonce: str | None = None, id: str | None = None
    ) -> None:
        self._token = token
        self._header, self._binding = (_UNBOUND, b"") if binding is None else (_BOUND, binding)
        self._nonce = nonce or secrets.token_urlsafe(24)
        self._bare = f"n={id or token_id(token)},r={self._nonce}"
        self._awaited = b""
        self.first = f"{self._header}{self._bare}"
        """The first message."""

    def answer(self, challenge: str) -> str:
        """The proof that answers the worker's challenge.

        Raises:
            ProofError: that is none, or not for this client.
        """
        nonce, salt, count = _fields(challenge, "rsi")
        if not nonce.startswith(self._nonce) or nonce == self._nonce:
            raise ProofError("the challenge is an answer to somebody else")
        if not re.fullmatch(r"[1-9]\d{0,8}", count) or not FEWEST_ITERATIONS <= int(count) <= MOST_ITERATIONS:
            raise ProofError(f"the challenge asks for {count[:20]} iterations")
        keys = _keys(self._token, _decoded(salt), int(count))
        without_proof = f"c={_encoded(self._header.encode() + self._binding)},r={nonce}"
        said = f"{self._bare},{challenge},{without_proof}".encode()
        self._awaited = _hmac(keys.server, said)
        proof = _xor(keys.client, _hmac(keys.stored, said))
        return f"{without_proof},p={_encoded(proof)}"

    def check(self, final: str) -> None:
        """Raises ProofError unless the worker knows the token as well."""
        (signature,) = _fields(final, "v")
        if not self._awaited or not hmac.compare_digest(self._awaited, _decoded(signature)):
            raise ProofError("the worker does not know the token")


class Checking:
    """The worker's side of one handshake: `find` gives the verifier of a token's id, also of one that there is not.

    Raises:
        ProofError: `first` is no first message, or not one for this channel.
    """

    def __init__(
        self,
        first: str,
        find: Callable[[str], Verifier],
        binding: bytes | None = None,
        *,
        nonce: str | None = None,
    ) -> None:
        header = _BOUND if first.startswith("p=") else _UNBOUND
        if not first.startswith(header):
            raise ProofError("no proof of a token begins like this")
        if (header == _BOUND) != (binding is not None):
            raise ProofError(
                "the proof is for a connection without TLS, and this one has it"
                if binding is not None
                else "TLS ends before this worker, which cannot see the certificate that its client sees"
            )
        self._bound = header.encode() + (binding or b"")
        self._bare = first.removeprefix(header)
        self.id, theirs = _fields(self._bare, "nr")
        if not 16 <= len(theirs) <= 128:
            raise ProofError("a nonce has 16 to 128 characters")
        self._verifier = find(self.id)
        self._nonce = theirs + (nonce or secrets.token_urlsafe(24))
        self.challenge = f"r={self._nonce},s={_encoded(self._verifier.salt)},i={self._verifier.iterations}"
        """What the client has to answer."""

    def verify(self, final: str) -> str:
        """The worker's own proof, for a client whose proof holds.

        Raises:
            ProofError: it does not.
        """
        bound, nonce, proof = _fields(final, "crp")
        without_proof = final.rpartition(",p=")[0]
        said = f"{self._bare},{self.challenge},{without_proof}".encode()
        signature = _hmac(self._verifier.stored_key, said)
        given = _decoded(proof)
        key = _xor(signature, given) if len(given) == len(signature) else b""
        right = hmac.compare_digest(hashlib.sha256(key).digest(), self._verifier.stored_key)
        if not hmac.compare_digest(_decoded(bound), self._bound):
            raise ProofError("the proof was made for another connection: somebody may be in between")
        if not right or not hmac.compare_digest(nonce.encode(), self._nonce.encode()):
            raise ProofError("the token is none of this worker's users': check it")
        return f"v={_encoded(_hmac(self._verifier.server_key, said))}"


@dataclass(frozen=True, slots=True)
class _Keys:
    client: bytes = field(repr=False)
    stored: bytes = field(repr=False)
    server: bytes = field(repr=False)


@functools.lru_cache(maxsize=64)
def _keys(token: str, salt: bytes, iterations: int) -> _Keys:
    salted = hashlib.pbkdf2_hmac("sha256", token.encode(), salt, iterations)
    client = _hmac(salted, b"Client Key")
    return _Keys(client, hashlib.sha256(client).digest(), _hmac(salted, b"Server Key"))


def _verifier(id: str, token: str, salt: bytes, iterations: int) -> Verifier:
    keys = _keys(token, salt, iterations)
    return Verifier(id, iterations, salt, keys.stored, keys.server)


def _fields(message: str, names: str) -> list[str]:
    """The values of a message ``r=...,s=...`` that has exactly these fields in this order."""
    parts = message.split(",")
    if not message.isascii() or [part[:2] for part in parts] != [f"{name}=" for name in names]:
        raise ProofError("a message of the proof is malformed")
    return [part[2:] for part in parts]


def _hmac(key: bytes, message: bytes) -> bytes:
    return hmac.digest(key, message, "sha256")


def _xor(one: bytes, other: bytes) -> bytes:
    return bytes(left ^ right for left, right in zip(one, other, strict=True))


def _encoded(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _decoded(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise ProofError("a message of the proof is malformed") from None

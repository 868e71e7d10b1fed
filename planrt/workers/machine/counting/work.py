"""What a worker computes for its clients besides ops, plans, rounds and backward passes, in operations. No I/O.

Those are counted by the owner's policy before they run (`planrt.plans.policy`). Here is what the rest takes, so that
all that a client can ask for is paid for in one way, by `ObjectStore.spend`. The figures are those of one core, as
multiplications and additions; they are to be of the right size, not exact.

- Large numbers: Menezes, van Oorschot and Vanstone, "Handbook of Applied Cryptography" (1996). A product modulo a
  number of n words of 64 bits takes 2 n (n + 1) products of words (algorithm 14.36), each with an addition; a power
  takes about 1.2 products for each bit of its exponent (14.85, windows of 5 bits). So one power modulo 2048 bits takes
  10 million.
- Curve25519: a step of the ladder for each of 255 bits (RFC 7748, section 5), each of about 10 products of numbers of
  5 words (Bernstein et al., "High-speed high-security signatures", 2011, section 3).
- Random numbers: AES-128, ten rounds for two numbers of 64 bits, a round being one instruction.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import torch

from planrt.sharing.programs.needs import Needs
from planrt.sharing.requests import Product, Request, size_of
from planrt.workers.machine.sessions import Session
from planrt.workers.machine.store import ObjectStore
from planrt.workers.wire import messages as m

CURVE: Final = 255 * 10 * 2 * 5**2
"""A multiplication on Curve25519: 127,500."""
DRAWN: Final = 10
"""A random number of 64 bits."""
READ: Final = 100
"""A byte of a plan, a protocol or a program that is read."""
LOOKED_AT: Final = 10
"""An object that is looked at, for a search or a list."""
PERSON: Final = 2_000
"""A row of a table whose ids are normalised and hashed."""
_BITS: Final = 100
"""A byte of bits and words that comparisons of shares are made of: each is a gate for eight pairs of bits."""
_LIMBS: Final = 5
"""An int64 product is five of float64, on processors that have none of their own."""
_FIELD: Final = 2 * 9 * 10 * 2
"""A product modulo 2**521 - 1, of shares of a worker's secrets."""


def power(bits: int, exponent: int) -> float:
    """Returns what a power modulo a number of so many bits takes, with an exponent of so many bits."""
    return 1.2 * exponent * product(bits)


def product(bits: int) -> float:
    """Returns what one product modulo a number of so many bits takes."""
    words = bits / 64
    return 4 * words * (words + 1)


def encryption(key_bits: int) -> float:
    """Returns what an encryption by Paillier's scheme takes: a power modulo the square of the modulus."""
    return power(2 * key_bits, key_bits)


def decryption(key_bits: int) -> float:
    """Returns what a decryption takes: a power modulo the square of each of two primes."""
    return 2 * power(key_bits, key_bits // 2)


def key_pair(key_bits: int) -> float:
    """Returns what a key pair takes: two primes, each found among about 100 candidates that have no small factor."""
    return 200 * power(key_bits // 2, key_bits // 2)


# -------------------------------------------------------------------------------- messages

_PAID_ELSEWHERE: Final = frozenset({m.Opening, m.Corrections, m.Parcel, m.PutShare})
"""Messages that are paid for by whose computation it is, where they are taken."""


def pay_for_message(
    store: ObjectStore, session: Session, body: m.Body, tensors: Sequence[torch.Tensor]
) -> None:
    """Pays for what a message takes that can be told from itself. What it has run is paid for where that is known.

    Raises:
        PolicyError: its user has not so much left.
    """
    if type(body) in _PAID_ELSEWHERE or not store.limits(session.id):
        return
    if flops := _of_message(store, session, body, tensors):
        store.spend(session.id, _WORDS.get(type(body), "a message"), flops)


def _of_message(store: ObjectStore, session: Session, body: m.Body, tensors: Sequence[torch.Tensor]) -> float:
    flops = float(entries(tensors))
    match body:
        case m.PutPlan() | m.StorePlan() | m.StoreProtocol():
            flops += READ * sum(one.nbytes for one in tensors[:1])
        case m.Search():
            flops += LOOKED_AT * len(store.objects) * max(1, len(body.query))
        case m.ListObjects() | m.AskStatus():
            flops += LOOKED_AT * (1 + store.count(session.id))
        case m.JoinSum():
            flops += 3 * CURVE  # two pairs of keys, and a signature
        case m.ShareSecrets():
            members = len(body.keys)
            flops += members * (4 * CURVE + 2 * _FIELD * body.threshold)
        case m.FitMasked():
            flops += len(body.sealed) * (2 * CURVE + DRAWN * entries(tensors))
        case m.SignSurvivors():
            flops += CURVE
        case m.RevealShares():
            flops += CURVE * (1 + 2 * len(body.signatures))
        case _:
            pass
    return flops


def entries(tensors: Sequence[torch.Tensor]) -> int:
    """Returns what it takes to copy, send or take in tensors: as a copying op, one for each entry."""
    return sum(one.numel() for one in tensors)


_WORDS: Final[dict[type, str]] = {
    m.Put: "storing tensors",
    m.PutPlan: "reading a plan",
    m.StorePlan: "reading a plan",
    m.StoreProtocol: "reading a protocol",
    m.Search: "a search",
    m.ListObjects: "listing objects",
    m.AskStatus: "telling the status",
    m.JoinSum: "joining a secure aggregation",
    m.ShareSecrets: "sharing secrets of a secure aggregation",
    m.FitMasked: "masking an update",
    m.SignSurvivors: "signing in a secure aggregation",
    m.RevealShares: "ending a secure aggregation",
    m.PutOptimizer: "taking an optimizer's state",
    m.WorkJoint: "taking the state of a network",
}

# ------------------------------------------------------------------------ computing on shares


def of_program(needs: Needs, parties: int) -> float:
    """Returns what one party computes to run a program on shares: its correlated randomness, what is opened, and the
    products of what was opened."""
    requests = sum(of_request(one) for one in needs.requests)
    return requests + parties * sum(needs.sent) / 8


def of_request(request: Request) -> float:
    """Returns what one party, or the dealer for it, computes for a piece of correlated randomness."""
    specs = [*request.free, *request.fixed]
    numbers = [one for one in specs if one.kind in ("ring", "short")]
    bits = [one for one in specs if one not in numbers]
    flops = float(DRAWN * sum(math.prod(one.shape) for one in numbers) + _BITS * size_of(bits))
    if isinstance(request, Product):  # it is computed three times, of masks and of what was opened
        flops += 3 * _LIMBS * 2 * _products(request)
    return flops


def _products(request: Product) -> float:
    """How many pairs of numbers are multiplied, in a product of two known values."""
    left, right = request.left.shape, request.right.shape
    (made,) = request.fixed
    terms = 1  # of each entry of the result
    if request.function == "matmul":
        terms = left[-1]
    elif request.function in ("conv1d", "conv2d"):
        terms = math.prod(right[1:])
    elif request.function != "mul":  # the gradients of a convolution
        terms = right[0] * math.prod(right[2:])
    return max(math.prod(made.shape) * terms, math.prod(left), math.prod(right))

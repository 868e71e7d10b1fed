"""A secret that was opened under a mask: what all other protocols start from.

All parties know c = x + r, each holds a part of r, only the dealer knows r. Opened once, c serves any number of
products (forward and backward), quotients and comparisons of x: each takes its own correlated randomness about r.
Source: Beaver (CRYPTO 1991), section 2, for the masks; reuse of an opened operand as in Mohassel and Zhang, "SecureML"
(S&P 2017), section 4.1, where a matrix keeps one mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from planrt.errors import SharingError
from planrt.sharing import ring
from planrt.sharing.requests import Known, Mask
from planrt.sharing.rounds import Party, Protocol


@dataclass(frozen=True, slots=True)
class Masked:
    """x as x + r, which all know, and this party's part of r. Changes of shape apply to both, and cost nothing."""

    opened: torch.Tensor
    part: torch.Tensor
    mask: Known

    @property
    def shape(self) -> torch.Size:
        """The shape of x."""
        return self.opened.shape

    def share(self, party: Party) -> torch.Tensor:
        """Returns this party's part of x."""
        return ring.minus(self.opened, self.part) if party.first else -self.part

    def plus(self, value: torch.Tensor | int) -> Masked:
        """Returns x plus something that all know, of a shape that broadcasts to x's."""
        return Masked(self.opened + value, self.part, self.mask)

    def times(self, factor: int) -> Masked:
        """Returns x times an integer that all know."""
        mask = self.mask.changed("times", factor)
        return Masked(self.opened * factor, self.part * factor, mask)

    def _viewed(self, name: str, *arguments: object) -> Masked:
        opened = getattr(self.opened, name)(*arguments)
        mask = self.mask.changed(name, *arguments, shape=opened.shape)
        return Masked(opened, getattr(self.part, name)(*arguments), mask)

    def transpose(self, first: int, second: int) -> Masked:
        """As `torch.Tensor.transpose`."""
        return self._viewed("transpose", first, second)

    def permute(self, dims: Sequence[int]) -> Masked:
        """As `torch.Tensor.permute`."""
        return self._viewed("permute", tuple(dims))

    def reshape(self, shape: Sequence[int]) -> Masked:
        """As `torch.Tensor.reshape`."""
        return self._viewed("reshape", tuple(shape))

    def expand(self, shape: Sequence[int]) -> Masked:
        """As `torch.Tensor.expand`."""
        return self._viewed("expand", tuple(shape))

    def narrow(self, dim: int, start: int, length: int) -> Masked:
        """As `torch.Tensor.narrow`."""
        return self._viewed("narrow", dim, start, length)

    def flip(self, dims: Sequence[int]) -> Masked:
        """As `torch.Tensor.flip`."""
        return self._viewed("flip", tuple(dims))


@dataclass(frozen=True, slots=True)
class Bit:
    """A secret bit b as d = b XOR beta, which all know, and this party's part of beta in the ring.

    Source: Rotaru and Wood (INDOCRYPT 2019), section 3 (daBits).
    """

    opened: torch.Tensor
    """d, as int64 of 0 and 1."""
    part: torch.Tensor
    coin: Known

    @property
    def shape(self) -> torch.Size:
        """The shape of b."""
        return self.opened.shape

    @property
    def turn(self) -> torch.Tensor:
        """1 - 2d: b = d + (1 - 2d) * beta."""
        return 1 - 2 * self.opened

    def turned(self, plain: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """Returns d y + (1 - 2d) z, a part of a product with b, for parts y of the value and z of its product with
        beta.
        """
        if plain.shape != hidden.shape or plain.shape != self.opened.shape:
            return self.opened * plain + self.turn * hidden
        return ring.chosen(-self.opened, ring.minus(plain, hidden), hidden)

    def share(self, party: Party) -> torch.Tensor:
        """Returns this party's part of b, as the integer 0 or 1."""
        return party.public(self.opened) + self.turn * self.part

    def negated(self) -> Bit:
        """Returns 1 - b."""
        return Bit(1 - self.opened, self.part, self.coin)

    def reshape(self, shape: Sequence[int]) -> Bit:
        """As `torch.Tensor.reshape`."""
        return self._viewed("reshape", tuple(shape))

    def narrow(self, dim: int, start: int, length: int) -> Bit:
        """As `torch.Tensor.narrow`."""
        return self._viewed("narrow", dim, start, length)

    def transpose(self, first: int, second: int) -> Bit:
        """As `torch.Tensor.transpose`."""
        return self._viewed("transpose", first, second)

    def permute(self, dims: Sequence[int]) -> Bit:
        """As `torch.Tensor.permute`."""
        return self._viewed("permute", tuple(dims))

    def expand(self, shape: Sequence[int]) -> Bit:
        """As `torch.Tensor.expand`."""
        return self._viewed("expand", tuple(shape))

    def _viewed(self, name: str, *arguments: object) -> Bit:
        opened = getattr(self.opened, name)(*arguments)
        coin = self.coin.changed(name, *arguments, shape=opened.shape)
        return Bit(opened, getattr(self.part, name)(*arguments), coin)


def mask(party: Party, *secrets: torch.Tensor) -> Protocol[list[Masked]]:
    """Open secrets under fresh masks, all in one round.

    1. Take a mask r for each x.
    2. Open x + r.

    Raises:
        SharingError: a part is not int64; nothing was opened.
    """
    for secret in secrets:
        if secret.dtype != torch.int64:
            raise SharingError(
                f"parts of secrets are int64, not {secret.dtype}: encode with fixed_point.encode"
            )
    requests = [Mask(tuple(secret.shape)) for secret in secrets]
    taken = [party.supply.take(request) for request in requests]
    opened = yield [ring.plus(secret, one.free[0]) for secret, one in zip(secrets, taken, strict=True)]
    return [
        Masked(value, one.free[0], Known(one.number, request, request.shape))
        for value, one, request in zip(opened, taken, requests, strict=True)
    ]


def open_together(*parts: torch.Tensor) -> Protocol[list[torch.Tensor]]:
    """Open secrets as they are: for results that all may know."""
    opened = yield list(parts)
    return opened

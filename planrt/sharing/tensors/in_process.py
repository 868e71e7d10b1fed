"""All parties in this process: the session for trying things out and for tests. Nothing is hidden from its caller."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from planrt.errors import SharingError
from planrt.sharing.additive import reconstruct, share
from planrt.sharing.fixed_point import DEFAULT_SCALE
from planrt.sharing.kernels import Context, Share
from planrt.sharing.layers import KERNELS
from planrt.sharing.randomness import Stream, new_seed
from planrt.sharing.rounds import Transcript, new_parties, run_together
from planrt.sharing.tensors.sessions import Secret, SharingSession
from planrt.types import map_leaves


class InProcessSession(SharingSession):
    """Parties in this process. A handle is the list of their `Share`s; `transcript` counts their traffic.

    `seeds`, of the dealer's streams, and `own_seed`, of the parts of what is shared here, are for tests.
    """

    def __init__(
        self,
        count: int = 2,
        *,
        scale: int = DEFAULT_SCALE,
        seeds: Sequence[bytes] | None = None,
        own_seed: bytes | None = None,
    ) -> None:
        self.contexts = [Context(party, scale) for party in new_parties(count, seeds=seeds)]
        self.scale = scale
        self.transcript = Transcript(count)
        self._stream = Stream(new_seed() if own_seed is None else own_seed)

    @property
    def parties(self) -> Sequence[str]:
        """The parties' numbers: they have no names."""
        return [str(context.party.number) for context in self.contexts]

    @property
    def provider(self) -> str:
        """``"dealer"``."""
        return "dealer"

    def share(self, values: torch.Tensor, scale: int) -> list[Share]:
        """Returns `values` in fresh shares; see `SharingSession.share`."""
        return [Share(part, scale) for part in share(values, len(self.contexts), self._stream)]

    def run(
        self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], shapes: Any, *, in_place: bool
    ) -> Any:
        """Runs a kernel at every party, round by round; see `SharingSession.run`."""

        def of(number: int, value: Any) -> Any:
            return map_leaves(value, lambda leaf: leaf.handle[number] if isinstance(leaf, Secret) else leaf)

        kernel = KERNELS[name]
        protocols = [
            kernel(context, *of(number, args), **of(number, kwargs))
            for number, context in enumerate(self.contexts)
        ]
        made = run_together(protocols, self.transcript)
        if not in_place:
            return self._handles(name, made, shapes)
        self._check(name, made[0], shapes)
        for old, new in zip(args[0].handle, made, strict=True):
            old.become(new)
        return None

    def open(self, handle: list[Share]) -> tuple[torch.Tensor, int]:
        """Returns the secret and its scale; see `SharingSession.open`."""
        return reconstruct([one.part for one in handle]), handle[0].scale

    def _handles(self, name: str, made: list[Any], shapes: Any) -> Any:
        if isinstance(shapes, tuple) and not isinstance(shapes, torch.Size):
            return tuple(
                self._handles(name, list(parts), shape)
                for parts, shape in zip(zip(*made, strict=True), shapes, strict=True)
            )
        self._check(name, made[0], shapes)
        return None if shapes is None else made

    @staticmethod
    def _check(name: str, share: Share | None, shape: torch.Size | None) -> None:
        if (None if share is None else share.part.shape) != shape:
            got = "nothing" if share is None else str(list(share.part.shape))
            raise SharingError(
                f"{name} of shares gives {got} where torch gives {'nothing' if shape is None else list(shape)}"
            )

"""Where shares are and who computes on them: the one interface that `shared.SharedTensor` speaks to.

`in_process.InProcessSession` has all parties in this process. Between workers another session posts the same kernels to
the parties. Below, a *handle* is what a session gives out for one secret: opaque to everybody else, with the parts at
the parties behind it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch

from planrt.errors import SharingError

Handle: TypeAlias = Any
"""One secret of a session. Two names for the same secret share one handle."""
Shapes: TypeAlias = Any
"""The shapes of results: a torch.Size, None where there is no result, or a tuple of these for several."""


class SharingSession(ABC):
    """Parties who compute on shares together, at one scale, with a dealer."""

    scale: int
    """The scale that values are brought back to after products."""

    @property
    @abstractmethod
    def parties(self) -> Sequence[str]:
        """The names of the parties, in order."""

    @property
    @abstractmethod
    def provider(self) -> str:
        """The name of the dealer: 0.2's crypto provider."""

    @abstractmethod
    def share(self, values: torch.Tensor, scale: int) -> Handle:
        """Returns `values` (int64, encoded at `scale`) in fresh shares; it may write over them."""

    @abstractmethod
    def run(
        self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], shapes: Shapes, *, in_place: bool
    ) -> Any:
        """Runs a kernel at every party: `table.call`.

        Args:
            name: of the kernel.
            args, kwargs: its arguments after the context, nested, with a `Secret` in place of each shared operand.
            shapes: what shapes the results have.
            in_place: whether the first operand takes the (one) result as its value.

        Returns:
            Handles in the nesting of `shapes`; None of an operation in place.

        Raises:
            SharingError: the kernel does not take these arguments, or a party cannot go on.
        """

    def copied_from(self, handle: Handle) -> Handle | None:
        """Returns whole numbers that the same parties hold in another session, at another scale, as a secret of this
        one; None where that has other parties.
        """
        return None

    def call_plan(
        self, record: Any, inputs: Sequence[torch.Tensor], state: Sequence[torch.Tensor], *, training: bool
    ) -> Any:
        """Runs a plan on its arguments, some of them shared in this session, and returns its outputs; NotImplemented
        where it is to run op by op, as any code does on shares.
        """
        return NotImplemented

    def check_plan(
        self,
        graph: Any,
        inputs: Sequence[torch.Tensor],
        state: Sequence[torch.Tensor],
        bounds: Mapping[str, Any],
    ) -> Any:
        """Returns a `Preflight` of a plan on arguments some of which are shared in this session."""
        raise SharingError("plans are checked on shares between workers")

    def draw_seed(self, generator: torch.Generator | None = None) -> int:
        """Returns a seed of 63 bits for what all parties draw alike, from `generator`, or torch's own."""
        return int(torch.randint(2**63 - 1, (), generator=generator))

    def names_of(self, handle: Handle) -> Sequence[tuple[int, str, int]]:
        """Returns what tensors print of a secret: for each party an id here, its name, and the id of its part."""
        return [(0, party, 0) for party in self.parties]

    async def open_async(self, handle: Handle) -> tuple[torch.Tensor, int]:
        """`open`, to be awaited on any loop."""
        return self.open(handle)

    @abstractmethod
    def open(self, handle: Handle) -> tuple[torch.Tensor, int]:
        """Returns the secret (int64) and its scale: the only thing that shows one to whoever asks."""


class Secret:
    """A shared operand among the arguments of `SharingSession.run`."""

    __slots__ = ("handle",)

    def __init__(self, handle: Handle) -> None:
        self.handle = handle

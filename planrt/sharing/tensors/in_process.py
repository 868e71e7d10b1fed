"""All parties in this process: the session for trying things out and for tests. Nothing is hidden from its caller."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from planrt.sharing.additive import reconstruct, share
from planrt.sharing.fixed_point import DEFAULT_SCALE
from planrt.sharing.kernels.parts import Context, Share
from planrt.sharing.kernels.sizes import as_operand
from planrt.sharing.programs.calls import Program
from planrt.sharing.programs.needs import alike
from planrt.sharing.programs.running import MANY, Failed, run_program
from planrt.sharing.randomness import Stream, new_seed
from planrt.sharing.rounds import Protocol, Transcript, new_parties, run_together
from planrt.sharing.tensors.batches import BatchedSession, Operand, Value


class InProcessSession(BatchedSession):
    """Parties in this process. `transcript` counts their traffic. Calls run one by one, unless there are more
    `at_once`.

    `seeds`, of the dealer's streams, and `own_seed`, of the parts of what is shared here, are for tests.
    """

    def __init__(
        self,
        count: int = 2,
        *,
        scale: int = DEFAULT_SCALE,
        at_once: int = 1,
        seeds: Sequence[bytes] | None = None,
        own_seed: bytes | None = None,
    ) -> None:
        super().__init__(at_once=at_once)
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

    def share(self, values: torch.Tensor, scale: int) -> Value:
        """Returns `values` in fresh shares; see `SharingSession.share`."""
        parts = share(values, len(self.contexts), self._stream)
        return Value(self, place=[Share(part, scale) for part in parts])

    def open(self, handle: Value) -> tuple[torch.Tensor, int]:
        """Returns the secret and its scale; see `SharingSession.open`."""
        self.flush()
        place = handle.place
        if isinstance(place, Failed):
            raise place.error
        return reconstruct([one.part for one in place]), place[0].scale

    def _run_program(
        self, program: Program, operands: Sequence[Operand], results: Sequence[Value | None]
    ) -> None:
        def at(number: int, operand: Operand) -> Any:
            if isinstance(operand, Value):
                return operand.place if isinstance(operand.place, Failed) else operand.place[number]
            return operand if isinstance(operand, torch.Tensor) else as_operand(operand)

        def run(number: int, context: Context) -> Protocol[list[Any]]:
            given = [at(number, one) for one in operands]
            count = context.party.count
            many = len(program.calls) >= MANY
            key = alike(program, given, party=number, count=count, scale=context.scale) if many else None
            return run_program(context, program, given, key)

        everywhere = run_together(
            [run(number, context) for number, context in enumerate(self.contexts)], self.transcript
        )
        failed: Exception | None = None
        for number, value in enumerate([*operands, *results]):
            made = [values[number] for values in everywhere]
            if isinstance(made[0], Failed):
                failed = failed or made[0].error
                if isinstance(value, Value) and number >= len(operands):
                    value.place = made[0]
            elif isinstance(value, Value) and number >= len(operands):
                value.place = made
        if failed is not None:
            raise failed

    def _forget(self, place: Any) -> None:
        """Nothing: the parts go with the handle."""

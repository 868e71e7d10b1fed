"""A network over the columns of several owners: parts below at each, one part above at the owner of the labels.

Split learning: Gupta and Raskar, "Distributed learning of deep neural network over multiple agents" (2018). In each
step what the parts below give goes to the part above, and gradients come back. Without noise it computes what the whole
network does, bit for bit. What leaves an owner are its part's outputs for each person, which the owner of the labels
sees: they are not encrypted, and can tell much of the columns they come from. Noise blurs them, and is no proof of
privacy. A part's gradients, which come back, depend on the labels.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import torch

from planrt.errors import DataError, ExecutionError, JointError
from planrt.plans import optimizer_states
from planrt.plans.ir.graph import Graph
from planrt.plans.optimizer_options import check_optimizer
from planrt.plans.running.interpreter import check_inputs, check_state, drive, program
from planrt.plans.training import optimizer_of
from planrt.seeding import derive_seed, seeded
from planrt.serde.checkpoints import Checkpoint
from planrt.sharing.columns.steps import Role, Send, Turn, take_one
from planrt.workers.machine.joint.kept import named, taken
from planrt.workers.wire import messages as m

Array = np.ndarray[Any, Any]
_LARGEST: Final = float(np.finfo(np.float32).max)


class Part:
    """One part of a network on this worker: its plans, its state and its optimizer."""

    def __init__(
        self, training: Graph, evaluation: Graph, state: Sequence[torch.Tensor], terms: m.SplitTerms
    ) -> None:
        check_state(training, state)
        check_state(evaluation, state)
        self._training, self._evaluation = training, evaluation
        self.state = [
            one.detach().clone().requires_grad_(entry.trainable)
            for entry, one in zip(training.state, state, strict=True)
        ]
        self._name = terms.optimizer
        self._args = check_optimizer(terms.optimizer, terms.optimizer_args)
        trained = [one for one in self.state if one.requires_grad]
        self.optimizer = optimizer_of(self._name, self._args, trained, None) if trained else None

    def __call__(
        self, data: torch.Tensor, target: torch.Tensor, *, training: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns (loss, prediction) of a batch; of a part below only the second means anything.

        Raises:
            JointError: it cannot be trained on a single row.
        """
        plan = self._training if training else self._evaluation
        check_inputs(plan, [data, target])
        values = self.state if training else [one.detach().clone() for one in self.state]
        try:
            loss, prediction = drive(program(plan, torch.device("cpu")).run([data, target], values))
        except ExecutionError as error:
            if not training or len(data) > 1:
                raise
            raise JointError(
                "a batch has 1 row, which this part of the network is not trained on (batch norm wants 2): take a "
                "batch_size that leaves no such batch"
            ) from error
        return loss, prediction

    def begin(self) -> None:
        """Clears gradients before a step."""
        if self.optimizer is not None:
            self.optimizer.zero_grad()

    def step(self) -> None:
        """Makes the optimizer's step."""
        if self.optimizer is not None:
            self.optimizer.step()

    def captured(self) -> tuple[list[tuple[int, str, Any]], list[torch.Tensor]]:
        """Returns what the optimizer keeps, as `planrt.plans.optimizer_states` packs it."""
        if self.optimizer is None:
            return [], []
        return optimizer_states.packed(self.optimizer.state_dict()["state"])

    def restore(self, values: list[tuple[int, str, Any]], tensors: list[torch.Tensor]) -> None:
        """Gives the optimizer what it kept."""
        trained = [one for one in self.state if one.requires_grad]
        if self.optimizer is not None:
            state = optimizer_states.unpacked(values, tensors, parameters=len(trained))
            self.optimizer = optimizer_of(self._name, self._args, trained, state)


@dataclass(slots=True)
class SplitOwner:
    """One owner's side of a split network.

    Args:
        about: what was opened; `values` are its columns [rows, columns], `labels` those of the owner of the labels.

    Raises:
        DataError: labels that are no classes, where they are to be classes.
    """

    about: m.OpenJoint
    terms: m.SplitTerms
    values: Array
    labels: Array | None
    train_rows: int
    bottom: Part | None = None
    top: Part | None = None
    noise_seed: int = field(default_factory=lambda: secrets.randbits(62))
    """What the noise is drawn from: this owner's secret. Steps that are made again have the same noise, and so have
    predictions for the same person: nobody gets rid of it by asking again."""
    _epochs: int = 0
    _data: torch.Tensor = field(init=False)
    _target: torch.Tensor | None = field(init=False)

    def __post_init__(self) -> None:
        for column, values in zip(self.about.features, self.values.T, strict=True):
            self._check_range(column, values)
        self._data = torch.from_numpy(self.values).float()
        self._target = None
        if self.labels is not None:
            self._check_range(self.about.label, self.labels)
            if self.terms.classes:
                self._check_classes(self.labels)
            target = torch.from_numpy(self.labels)
            self._target = target.long() if self.terms.classes else target.float()[:, None]

    def _check_range(self, column: str, values: Array) -> None:
        if float(np.abs(values).max()) > _LARGEST:
            raise DataError(
                f"{self.name}: column {column!r} has values that float32 does not hold: divide them, or take "
                "standardise=True"
            )

    def _check_classes(self, labels: Array) -> None:
        if not ((labels == np.rint(labels)) & (labels >= 0)).all():
            raise DataError(
                f"{self.name}: label column {self.about.label!r} has values that are no classes (0, 1, 2, ...)"
            )
        most = self.terms.class_count
        if most and float(labels.max()) >= most:
            raise DataError(
                f"{self.name}: label column {self.about.label!r} has classes beyond the {most} of the network, which "
                f"are 0 to {most - 1}"
            )

    @property
    def name(self) -> str:
        """Its worker's name."""
        return self.names[self.about.number]

    @property
    def names(self) -> list[str]:
        """The names of the parties."""
        return [one.worker for one in self.about.parties]

    def load(self, plans: Sequence[Graph], state: Sequence[torch.Tensor]) -> None:
        """Takes the plans of its parts (training and evaluation of each) and their state.

        Raises:
            PlanArgumentError: the state does not fit.
        """
        rest = list(state)
        for place, has in ((0, bool(self.terms.bottom)), (2, bool(self.terms.top))):
            if has:
                training, evaluation, *plans = plans
                mine, rest = rest[: len(training.state)], rest[len(training.state) :]
                part = Part(training, evaluation, mine, self.terms)
                if place == 0:
                    self.bottom = part
                else:
                    self.top = part
        if rest:
            raise JointError(
                f"{self.name} was sent {len(rest)} tensors more than its part of the network has"
            )

    def captured(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """Returns what is kept of it: plain facts, and tensors."""
        facts: dict[str, Any] = {"noise": self.noise_seed, "optimizers": []}
        tensors = named("state", self.state)
        for number, part in enumerate(one for one in (self.bottom, self.top) if one is not None):
            values, named_there = part.captured()
            facts["optimizers"].append([list(one) for one in values])
            tensors |= named(f"optimizer/{number}", named_there)
        return facts, tensors

    def restore(self, plans: Sequence[Graph], kept: Checkpoint, epoch: int) -> None:
        """Takes over what was kept after so many epochs.

        Raises:
            KeyError, TypeError, ValueError: it is of another model.
        """
        self.load(plans, taken("state", kept))
        for number, part in enumerate(one for one in (self.bottom, self.top) if one is not None):
            values = [(int(a), str(b), c) for a, b, c in kept.facts["optimizers"][number]]
            part.restore(values, taken(f"optimizer/{number}", kept))
        self.noise_seed, self._epochs = int(kept.facts["noise"]), epoch

    @property
    def state(self) -> list[torch.Tensor]:
        """The state of its parts: below, then above."""
        return [
            one.detach().clone() for part in (self.bottom, self.top) if part is not None for one in part.state
        ]

    def _below(self, rows: Array, *, training: bool) -> torch.Tensor | None:
        if self.bottom is None:
            return None
        data = self._data[torch.from_numpy(rows)]
        _, given = self.bottom(data, torch.zeros(len(data)), training=training)
        width = self.terms.widths[self.about.number]
        if list(given.shape) != [len(data), width]:
            raise JointError(
                f"{self.name}'s part of the network gives {list(given.shape)}, where [{len(data)}, {width}] is due"
            )
        return given

    def _leaves(self, given: torch.Tensor, *where: int | str, rows: Array | None = None) -> torch.Tensor:
        """What leaves of a part's outputs: with noise, if there is to be any. `where` says what it is drawn for; with
        `rows` each of them has the noise that belongs to it."""
        out = given.detach().clone()
        if self.terms.noise:
            generator = torch.Generator().manual_seed(derive_seed(self.noise_seed, "noise", *where))
            if rows is None:
                out += self.terms.noise * torch.randn(out.shape, generator=generator)
            else:
                noise = torch.randn([len(self._data), *out.shape[1:]], generator=generator)
                out += self.terms.noise * noise[torch.from_numpy(rows)]
        return out

    def epoch(self, epoch: int) -> Role:
        """Trains for one epoch."""
        generator = torch.Generator().manual_seed(derive_seed(self.about.seed, "batches", epoch))
        order = torch.randperm(self.train_rows, generator=generator).numpy()
        losses: list[float] = []
        for number, at in enumerate(range(0, self.train_rows, self.terms.batch_size)):
            rows = order[at : at + self.terms.batch_size]
            seed = derive_seed(self.about.seed, "step", epoch, number, self.about.number)
            if self.labels is None:
                yield from self._step_below(rows, seed, epoch, number)
            else:
                losses.append((yield from self._step_above(rows, seed)) * len(rows))
            yield Turn("rows trained on", int(at), self.train_rows)
        self._epochs = epoch + 1
        return {"loss": sum(losses) / self.train_rows} if self.labels is not None else {}

    def _step_below(self, rows: Array, seed: int, epoch: int, number: int) -> Any:
        if self.bottom is None:
            return
        with seeded(seed), torch.enable_grad():
            self.bottom.begin()
            given = self._below(rows, training=True)
        assert given is not None  # noqa: S101 - there is a part
        yield Send(self.about.label_owner, "outputs", [self._leaves(given, "step", epoch, number)])
        shape = list(given.shape)
        gradient = yield from take_one(self.about.label_owner, "gradient", torch.float32, shape, self.names)
        if given.requires_grad:
            given.backward(gradient)  # type: ignore[no-untyped-call]
        self.bottom.step()

    def _step_above(self, rows: Array, seed: int) -> Any:
        assert self.top is not None  # noqa: S101 - loaded before
        assert self._target is not None  # noqa: S101 - it is the owner of the labels
        with seeded(seed), torch.enable_grad():
            if self.bottom is not None:
                self.bottom.begin()
            mine = self._below(rows, training=True)
        parts = yield from self._gathered(mine, rows)
        with seeded(derive_seed(seed, "top")), torch.enable_grad():
            whole = torch.cat(list(parts.values()), 1).detach().requires_grad_()
            self.top.begin()
            loss, _ = self.top(whole, self._target[torch.from_numpy(rows)], training=True)
            if loss.dim() or not torch.isfinite(loss):
                raise JointError("the loss is no finite number: take a smaller learning rate")
            loss.backward()  # type: ignore[no-untyped-call]
        assert whole.grad is not None  # noqa: S101 - backward has been called
        slices = torch.split(whole.grad, [one.shape[1] for one in parts.values()], 1)
        for owner, gradient in zip(parts, slices, strict=True):
            if owner != self.about.number:
                yield Send(owner, "gradient", [gradient.contiguous()])
            elif mine is not None and mine.requires_grad:
                mine.backward(gradient)  # type: ignore[no-untyped-call]
        self.top.step()
        if self.bottom is not None:
            self.bottom.step()
        return float(loss.detach())

    def _gathered(self, mine: torch.Tensor | None, rows: Array) -> Any:
        """Owner -> what its part gives, in the order of the owners."""
        parts: dict[int, torch.Tensor] = {}
        for owner, width in enumerate(self.terms.widths):
            if owner == self.about.number:
                if mine is not None:
                    parts[owner] = mine.detach()
            elif width:
                shape = [len(rows), width]
                parts[owner] = yield from take_one(owner, "outputs", torch.float32, shape, self.names)
                if not torch.isfinite(parts[owner]).all():
                    raise JointError(
                        f"party {self.names[owner]!r} gives outputs that are no finite numbers: take a smaller "
                        "learning rate"
                    )
        return parts

    def predict(self, rows: Array) -> Role:
        """Runs the network on some rows; at the owner of the labels it gives their predictions, the mean loss and, of
        classes, how many are right."""
        with torch.no_grad():
            mine = self._below(rows, training=False)
        if self.labels is None:
            if mine is not None:
                sent = self._leaves(mine, "prediction", self._epochs, rows=rows)
                yield Send(self.about.label_owner, "outputs", [sent])
            return {}
        parts = yield from self._gathered(mine, rows)
        assert self.top is not None  # noqa: S101 - loaded before
        assert self._target is not None  # noqa: S101 - it is the owner of the labels
        target = self._target[torch.from_numpy(rows)]
        with torch.no_grad():
            loss, prediction = self.top(torch.cat(list(parts.values()), 1), target, training=False)
        found: dict[str, Any] = {"predictions": prediction, "loss": float(loss), "people": len(rows)}
        if self.terms.classes and prediction.dim() == 2:
            found["accuracy"] = float((prediction.argmax(1) == target).float().mean())
        return found

"""A joint run as its client sees it: opened at each party, asked for one step after another, ended."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import math
import secrets
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self, TypeVar

import torch

from planrt.errors import (
    AlignmentError,
    CiphertextError,
    DataError,
    JointError,
    OptionError,
    PlanrtError,
    RemoteError,
    TransportError,
    ValueRangeError,
)
from planrt.loop import on_loop, run
from planrt.vertical.parties import Party, people_of
from planrt.workers.base import BaseWorker
from planrt.workers.wire import messages as m

DEFAULT_TIMEOUT = 600.0
"""Seconds that a party waits for another one."""
CLIENT = "client"
_FAILED = "JointFailedError"
_KINDS: Mapping[str, type[PlanrtError]] = {
    one.__name__: one
    for one in (AlignmentError, CiphertextError, DataError, JointError, OptionError, ValueRangeError)
}
"""Kinds of failures of workers that are raised here as what they are there."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Figures of an evaluation: the mean loss, of how many people, and the share of right classes where there are
    any."""

    loss: float
    people: int
    accuracy: float | None = None


class JointRun:
    """Workers who compute together on their tables; what all kinds of runs share. A context manager (`with`, or
    `async with`) that ends it.

    Attributes:
        size: how many people are in all tables.
        people: how many of them are trained on; the others are held out for evaluations.
        resumed: whether it goes on from what its parties had kept.
    """

    def __init__(self, workers: Sequence[BaseWorker], opens: Sequence[m.OpenJoint]) -> None:
        self.id = opens[0].joint
        self.resumed = opens[0].resume
        self.size = 0
        self.people = 0
        self._workers, self._opens = list(workers), list(opens)
        self._ended = False

    @property
    def is_open(self) -> bool:
        """True until the run has ended or failed."""
        return not self._ended

    @on_loop
    async def _opened(self) -> Self:
        """Opens the run; returns it."""
        await self._begin()
        return self

    async def _begin(self) -> None:
        """Opens the run at all parties and has them find who is in all tables."""
        try:
            await self._each(m.Done, self._opens)
            joined = await self._step("join")
            if self.resumed:
                answers = await self._step("resume", epoch=self._common_epoch(joined))
            else:
                answers = await self._step("align")
            self._began(answers)
        except BaseException:
            self._end()
            raise

    def _began(self, answers: Sequence[tuple[m.JointDone, list[torch.Tensor]]]) -> None:
        """Takes note of what the parties told when the run began, or went on."""
        figures = answers[0][0].figures
        self.size, self.people = int(figures.get("size", 0)), int(figures.get("people", 0))

    def _common_epoch(self, joined: Sequence[tuple[m.JointDone, list[torch.Tensor]]]) -> int:
        """The newest epoch that all parties have kept: they are at most one apart, and each keeps two."""
        kept = [set(map(int, done.figures.values())) for done, _ in joined]
        common = set.intersection(*kept)
        if not common:
            told = ", ".join(
                f"{worker.id} {max(one, default=0)}" for worker, one in zip(self._workers, kept, strict=True)
            )
            raise JointError(
                f"the parties have kept no epoch that all of them have ({told}): begin a new run"
            )
        return max(common)

    async def _step(
        self, step: Any, *, tensors: Sequence[Sequence[torch.Tensor]] | None = None, **more: Any
    ) -> list[tuple[m.JointDone, list[torch.Tensor]]]:
        self._check_open()
        body = m.WorkJoint(self.id, step, **more)
        return await self._each(m.JointDone, [body] * len(self._workers), tensors)

    async def _ask_one(self, number: int, step: Any) -> tuple[m.JointDone, list[torch.Tensor]]:
        self._check_open()
        try:
            return await self._workers[number].ask(m.JointDone, m.WorkJoint(self.id, step))
        except PlanrtError as error:
            raise self._told(error, number) from error

    async def _each(
        self,
        kind: type[Any],
        bodies: Sequence[m.Body],
        tensors: Sequence[Sequence[torch.Tensor]] | None = None,
    ) -> list[tuple[Any, list[torch.Tensor]]]:
        """Asks all parties at once; returns their answers, or raises what the first one says that knows why."""
        given = tensors or [()] * len(self._workers)
        asked: list[Coroutine[Any, Any, Any]] = [
            worker.ask(kind, body, sent)
            for worker, body, sent in zip(self._workers, bodies, given, strict=True)
        ]
        answers = await asyncio.gather(*asked, return_exceptions=True)
        failed = [(number, one) for number, one in enumerate(answers) if isinstance(one, BaseException)]
        if failed:
            number, error = min(failed, key=lambda one: _follows(one[1]))
            self._end()
            raise self._told(error, number) from error
        return answers  # type: ignore[return-value]

    def _told(self, error: BaseException, number: int) -> BaseException:
        """An error of one party's, as what it is, with the party in its words."""
        name = self._workers[number].id
        if isinstance(error, TransportError):
            return JointError(f"party {name!r} is gone: {error}{self._advice()}")
        if isinstance(error, RemoteError) and type(error) is RemoteError:
            kind = _KINDS.get(error.cause, JointError) if error.kind == _FAILED else _KINDS.get(error.kind)
            if kind is not None:
                said = error.reason if name in error.reason else f"party {name!r}: {error.reason}"
                return kind(said + (self._advice() if kind is JointError else ""))
        return error

    def _advice(self) -> str:
        """How to go on, once a run has trained."""
        if not self.people:
            return ""
        keep = self._opens[0].keep
        if isinstance(self._opens[0].model, m.SharedTerms):
            return "; begin a new one"
        if keep:
            return (
                f"; each party has kept its part: open the run again with keep={keep!r}, resume=True to go on"
            )
        return "; begin a new one (one that is opened with keep='a name' can go on)"

    def _check_open(self) -> None:
        if self._ended:
            raise JointError(f"joint run {self.id!r} has ended{self._advice() or ': begin a new one'}")

    def _end(self) -> None:
        if not self._ended:
            self._ended = True
            for worker in self._workers:
                with contextlib.suppress(PlanrtError):
                    worker.workplace.post(m.EndJoint(self.id))

    def close(self) -> None:
        """Ends the run: the parties forget its keys, its rows and its weights."""
        self._end()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    @on_loop
    async def async_forget(self) -> None:
        """Does what `forget` does, to be awaited on any loop."""
        await self._step("forget")

    def forget(self) -> None:
        """Has the parties remove what they keep of this run; it goes on, and is kept no longer.

        Raises:
            JointError: a party is gone, or cannot remove it.
        """
        run(self.async_forget(), instead="await run.async_forget()")

    def __del__(self) -> None:
        with contextlib.suppress(Exception):
            self._end()

    def __repr__(self) -> str:
        names = ", ".join(worker.id for worker in self._workers)
        state = "ended" if self._ended else f"{self.size:,} people in common"
        return f"<{type(self).__name__} of {names}: {state}>"


def _follows(error: BaseException) -> int:
    """0 for who knows why it failed, 1 for who was told why, 2 for who is gone or finds the run in another state than
    it should be, which can follow from that, 3 for who was told that."""
    if not isinstance(error, RemoteError):
        return 2
    told = error.kind == _FAILED
    vague = (error.cause if told else error.kind) == JointError.__name__
    return vague * 2 + told


@dataclass(frozen=True, slots=True)
class Plan:
    """The options of a run, before it is opened."""

    owners: Sequence[Party]
    holder: BaseWorker | None = None
    normalise: str = "strip"
    size_only: bool = False
    standardise: bool = False
    holdout: float = 0.0
    seed: int = 0
    predictions_to: str = CLIENT
    weights_to_client: bool = True
    timeout: float = DEFAULT_TIMEOUT
    purpose: str = ""
    keep: str = ""
    resume: bool = False

    def workers(self) -> list[BaseWorker]:
        """Returns the parties' workers: owners, then who holds the key or hands out randomness.

        Raises:
            OptionError: fewer than two owners, or one worker twice.
        """
        if len(self.owners) < 2 or not all(isinstance(one, Party) for one in self.owners):
            raise OptionError("a joint run takes two or more planrt.vertical.Party(...)")
        found = [one.worker for one in self.owners] + ([] if self.holder is None else [self.holder])
        names = [one.id for one in found]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise OptionError(
                f"worker {twice[0]!r} is given twice: the parties of a joint run are all different"
            )
        if len({len(one.id_columns) for one in self.owners}) > 1:
            raise OptionError("all parties name equally many id columns: they are compared in their order")
        return found

    def label_owner(self) -> int:
        """Returns the number of the party with the label.

        Raises:
            OptionError: there is none, or more than one.
        """
        found = [number for number, one in enumerate(self.owners) if one.label is not None]
        if len(found) != 1:
            raise OptionError(f"one party names the label, not {len(found)}: Party(..., label='paid')")
        return found[0]

    def opens(
        self, model: Mapping[int, Any] | m.LinearTerms | m.SharedTerms | None, *, label_owner: int = 0
    ) -> list[m.OpenJoint]:
        """Returns what each party is told: `model` is the same for all, or number -> what that one is told.

        Raises:
            OptionError: a value out of range; names it.
        """
        workers, joint, token = self.workers(), secrets.token_hex(8), secrets.token_hex(16)
        for name, value, least, most in (
            ("holdout", self.holdout, 0.0, 0.999), ("timeout", self.timeout, 1e-3, 86_400.0),
        ):  # fmt: skip
            if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
                raise OptionError(f"{name} must be a number from {least:g} to {most:g}, got {value!r}")
        if type(self.seed) is not int or not 0 <= self.seed < 2**63:
            raise OptionError(f"seed must be a whole number from 0 and below 2**63, got {self.seed!r}")
        if not isinstance(self.keep, str) or len(self.keep) > 200:
            raise OptionError(f"keep is a name of up to 200 characters, got {self.keep!r}")
        if self.resume and not self.keep:
            raise OptionError("resume=True goes on from what was kept under a name: give keep='that name'")
        parties = [m.PeerAddress(one.id, one.link_address) for one in workers]
        trains = model is not None
        opens = []
        for number in range(len(workers)):
            owner = self.owners[number] if number < len(self.owners) else None
            opens.append(
                m.OpenJoint(
                    joint=joint,
                    token=token,
                    number=number,
                    parties=parties,
                    owners=len(self.owners),
                    dataset="" if owner is None else owner.dataset,
                    ids=[] if owner is None else owner.id_columns,
                    normalise=self.normalise,
                    size_only=self.size_only,
                    features=list(owner.columns) if owner is not None and trains else [],
                    label=owner.label or "" if owner is not None and trains else "",
                    label_owner=label_owner,
                    columns=[len(one.columns) if trains else 0 for one in self.owners],
                    model=model[number] if isinstance(model, Mapping) else model,
                    standardise=self.standardise,
                    holdout=float(self.holdout),
                    seed=self.seed,
                    predictions_to=self.predictions_to,
                    weights_to_client=self.weights_to_client,
                    timeout=float(self.timeout),
                    purpose=self.purpose,
                    keep=self.keep,
                    resume=bool(self.resume),
                )
            )
        return opens


def whole(name: str, value: Any, *, least: int = 1, most: int = 2**31) -> int:
    """Returns a whole number within bounds.

    Raises:
        OptionError: it is none; names it.
    """
    if type(value) is not int or not least <= value <= most:
        raise OptionError(f"{name} must be a whole number from {least} to {most}, got {value!r}")
    return value


def number(name: str, value: Any, *, above: float | None = None) -> float:
    """Returns a finite number of at least 0, or above `above`.

    Raises:
        OptionError: it is none; names it.
    """
    fits = (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and math.isfinite(value)
        and value <= 1e9
    )
    if not fits or value < 0 or (above is not None and value <= above):
        raise OptionError(
            f"{name} must be a number {'above' if above is not None else 'of at least'} 0, got {value!r}"
        )
    return float(value)


R = TypeVar("R", bound=JointRun)


class TrainedRun(JointRun):
    """A joint run that trains a model; see `linear_regression` and `split_network`.

    Attributes:
        losses: the mean loss of each epoch so far, each batch's before its step.
    """

    def __init__(
        self, workers: Sequence[BaseWorker], opens: Sequence[m.OpenJoint], *, label_owner: int, epochs: int
    ) -> None:
        super().__init__(workers, opens)
        self.losses: list[float] = []
        self._label_owner = label_owner
        self._epochs = epochs
        self._teller = label_owner
        """Who tells the loss."""
        self._counted = 0
        """Losses that an early stop does not look at: of earlier calls of `fit`."""

    def _began(self, answers: Sequence[tuple[m.JointDone, list[torch.Tensor]]]) -> None:
        super()._began(answers)
        if self.resumed:
            self.losses = [float(one) for one in answers[self._teller][1][0].tolist()]

    @on_loop
    async def async_fit(
        self, epochs: int | None = None, *, tolerance: float | None = None, patience: int = 3
    ) -> list[float]:
        """Does what `fit` does, to be awaited on any loop."""
        left = self._epochs - len(self.losses)
        wanted = left if epochs is None else whole("epochs", epochs)
        whole("patience", patience)
        if tolerance is not None:
            number("tolerance", tolerance)
        if wanted > left:
            raise OptionError(f"the run was opened for {self._epochs} epochs, of which {left} are left")
        first = self._counted
        for _ in range(wanted):
            if tolerance is not None and _waited(self.losses[first:], tolerance) >= patience:
                break
            answers = await self._step("epoch", epoch=len(self.losses))
            self.losses.append(float(answers[self._teller][0].figures["loss"]))
        self._counted = len(self.losses)
        return list(self.losses)

    def fit(
        self, epochs: int | None = None, *, tolerance: float | None = None, patience: int = 3
    ) -> list[float]:
        """Trains for so many more epochs (all that the run was opened for), and returns the losses of all so far.

        With a `tolerance` it stops early: once the loss has not fallen by more than that for `patience` epochs. In a
        run that goes on, the epochs that were kept count for the first call.

        Raises:
            JointError: a party is gone, or does not follow the protocol; the run has ended.
            ValueRangeError: a value is out of the range of encrypted ones; names the party.
            OptionError: more epochs than the run was opened for.
        """
        return run(
            self.async_fit(epochs, tolerance=tolerance, patience=patience), instead="await run.async_fit()"
        )

    @on_loop
    async def async_evaluate(self) -> Evaluation:
        """Does what `evaluate` does, to be awaited on any loop."""
        answers = await self._step("evaluate")
        figures = answers[self._label_owner][0].figures
        return Evaluation(figures["loss"], int(figures["people"]), figures.get("accuracy"))

    def evaluate(self) -> Evaluation:
        """Returns figures over the people who were held out; over all, if nobody was.

        The owner of the labels gets the other owners' parts of these predictions, and tells the figures alone.

        Raises:
            JointError: as `fit`.
        """
        return run(self.async_evaluate(), instead="await run.async_evaluate()")

    @on_loop
    async def async_predict(self, people: Sequence[Any]) -> torch.Tensor | None:
        """Does what `predict` does, to be awaited on any loop."""
        self._check_open()
        named = people_of(people, len(self._opens[0].ids))
        answers = await self._step("predict", people=named)
        found = [tensors[0] for _, tensors in answers if tensors]
        return found[0] if found else None

    def predict(self, people: Sequence[Any]) -> torch.Tensor | None:
        """Returns predictions for people in all tables, who are named by id (or a tuple of the id columns' values).

        With ``predictions_to`` an owner's worker it returns None: the result is a tensor on that worker, tagged
        ``#predictions`` and with the id of the run, for those alone whom that owner's access file names.

        Raises:
            AlignmentError: somebody is not in all tables. JointError: as `fit`.
        """
        return run(self.async_predict(people), instead="await run.async_predict(people)")


def _waited(losses: Sequence[float], tolerance: float) -> int:
    """For how many epochs the loss has not fallen by more than `tolerance` below the best one before."""
    best, since = math.inf, 0
    for loss in losses:
        since = 0 if loss < best - tolerance else since + 1
        best = min(best, loss)
    return since


def with_defaults(function: Callable[..., Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the options of a function: its defaults, and those that are given.

    Raises:
        TypeError: it takes no such option, or one is missing.
    """
    bound = inspect.signature(function).bind_partial(**given)
    bound.apply_defaults()
    return {name: value for name, value in bound.arguments.items() if name != "parties"}


def begun(made: R, instead: str) -> R:
    """Opens a run, blocking; returns it. `instead` is what is to be awaited on planrt's own loop."""
    return run(made._opened(), instead=instead)

"""A joint run as its client sees it: opened at each party, asked for one step after another, ended."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self, TypeVar

import torch

from planrt.deadlines import waiting
from planrt.errors import (
    AlignmentError,
    CiphertextError,
    DataError,
    JointError,
    OptionError,
    PlanrtError,
    PolicyRefusedError,
    RemoteError,
    TransportError,
    ValueRangeError,
    WorkerTimeoutError,
)
from planrt.loop import on_loop, run
from planrt.vertical.opening import number, whole
from planrt.vertical.parties import people_of
from planrt.workers.base import BaseWorker
from planrt.workers.client.tickets import Acts, among, forget_all, is_over, let_all
from planrt.workers.wire import messages as m

_GRACE = 2.0
"""Seconds that parties have to say why a run has failed, once one of them has said so."""
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
        self._why = ""
        """Why it has ended, where nobody was told."""

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
        """Opens the run at all parties, which act for this client at each other where it has a name there, and has them
        find who is in all tables."""
        try:
            joined = await self._join()
            if self.resumed:
                answers = await self._step("resume", epoch=self._common_epoch(joined))
            else:
                answers = await self._step("align")
            self._began(answers)
        except BaseException:
            self._end()
            raise

    async def _join(self) -> list[tuple[m.JointDone, list[torch.Tensor]]]:
        """Opens the run and has its parties make themselves known to each other; once more where tickets were over."""
        acting = among([one.workplace for one in self._workers])
        try:
            return await self._joined(acting)
        except RemoteError as error:
            if not is_over(error):
                raise
        forget_all(acting, "joint")
        self._ended = False
        return await self._joined(acting)

    async def _joined(self, acting: Sequence[Acts]) -> list[tuple[m.JointDone, list[torch.Tensor]]]:
        """Each of these waits is as long as a party waits for another one, who says first whom it waited for."""
        timeout = self._opens[0].timeout
        with waiting(timeout):
            try:
                await let_all(acting, "joint")
            except WorkerTimeoutError as error:
                raise self._told(error, [one.id for one in self._workers].index(error.worker_id)) from error
            await self._each(m.Done, self._opens)
        with waiting(timeout + _GRACE):
            return await self._step("join")

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
        """Asks all parties at once; returns their answers, or raises what the first one says that knows why.

        Once a party has failed the others hear of it from one another; who does not answer then is waited for no more.
        That ends the run, but for predictions and figures that all parties know to be refused. A run that is
        interrupted meanwhile has ended, too: its parties are in the middle of a step.
        """
        asks = any(isinstance(one, m.WorkJoint) and one.step in ("predict", "evaluate") for one in bodies)
        given = tensors or [()] * len(self._workers)
        asked: list[asyncio.Task[Any]] = [
            asyncio.ensure_future(worker.ask(kind, body, sent))
            for worker, body, sent in zip(self._workers, bodies, given, strict=True)
        ]
        try:
            _, late = await asyncio.wait(asked, return_when=asyncio.FIRST_EXCEPTION)
            if late:
                await asyncio.wait(late, timeout=_GRACE)
        except BaseException:
            self._why = "it was interrupted in a step"
            self._end()
            raise
        finally:
            for one in asked:
                one.cancel()
        errors = {place: one.exception() for place, one in enumerate(asked) if one.done()}
        failed = [(place, error) for place, error in errors.items() if error is not None]
        if failed:
            place, error = min(failed, key=lambda one: _follows(one[1]))
            told = self._told(error, place)
            if not (asks and len(errors) == len(asked) and _refused(told, [one for _, one in failed])):
                self._end()
            raise told from error
        return [one.result() for one in asked]

    def _told(self, error: BaseException, number: int) -> BaseException:
        """An error of one party's, as what it is, with the party in its words."""
        name = self._workers[number].id
        if isinstance(error, WorkerTimeoutError):
            return JointError(f"party {name!r} did not answer within {error.seconds:g} s{self._advice()}")
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
            why = f": {self._why}" if self._why else ""
            raise JointError(f"joint run {self.id!r} has ended{why}{self._advice() or '; begin a new one'}")

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


def _refused(told: BaseException, errors: Sequence[BaseException]) -> bool:
    """Whether that is a step that the parties agreed not to do: none of them has heard that the run has failed."""
    ended = any(not isinstance(one, RemoteError) or one.kind == _FAILED for one in errors)
    return isinstance(told, AlignmentError | PolicyRefusedError) and not ended


def _follows(error: BaseException) -> int:
    """0 for who knows why it failed, 1 for who was told why, 2 for who is gone or finds the run in another state than
    it should be, which can follow from that, 3 for who was told that."""
    if not isinstance(error, RemoteError):
        return 2
    told = error.kind == _FAILED
    vague = (error.cause if told else error.kind) == JointError.__name__
    return vague * 2 + told


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
            AlignmentError: somebody is not in all tables. PolicyRefusedError: of fewer people than an owner's rules ask
                for. The run goes on after either. JointError: as `fit`.
        """
        return run(self.async_predict(people), instead="await run.async_predict(people)")


def _waited(losses: Sequence[float], tolerance: float) -> int:
    """For how many epochs the loss has not fallen by more than `tolerance` below the best one before."""
    best, since = math.inf, 0
    for loss in losses:
        since = 0 if loss < best - tolerance else since + 1
        best = min(best, loss)
    return since


def begun(made: R, instead: str) -> R:
    """Opens a run, blocking; returns it. `instead` is what is to be awaited on planrt's own loop."""
    return run(made._opened(), instead=instead)

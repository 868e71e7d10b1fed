"""Linear and logistic regression over the columns of several owners, on encrypted values, with a third party's key."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from planrt.errors import OptionError
from planrt.loop import on_loop, run
from planrt.sharing.columns import packing, paillier
from planrt.vertical.parties import Party, check_worker
from planrt.vertical.runs import (
    CLIENT,
    DEFAULT_TIMEOUT,
    Plan,
    TrainedRun,
    begun,
    number,
    whole,
    with_defaults,
)
from planrt.workers.base import BaseWorker
from planrt.workers.wire import messages as m


class Regression(TrainedRun):
    """A regression that several owners train together; made by `linear_regression` and `logistic_regression`."""

    @on_loop
    async def async_weights(self) -> dict[str, dict[str, float]]:
        """Does what `weights` does, to be awaited on any loop."""
        found: dict[str, dict[str, float]] = {}
        for place, about in enumerate(self._opens[: self._opens[0].owners]):
            _, tensors = await self._ask_one(place, "weights")
            names = [*about.features, *(["intercept"] if about.label else [])]
            found[self._workers[place].id] = dict(zip(names, tensors[0].tolist(), strict=True))
        return found

    def weights(self) -> dict[str, dict[str, float]]:
        """Returns each owner's weights, by worker and column; the owner of the label has the ``intercept`` too. Where
        columns were standardised, these are weights of the standardised ones.

        Raises:
            PolicyRefusedError: the run was opened with weights_to_client=False: they stay where they are.
        """
        return run(self.async_weights(), instead="await run.async_weights()")


def _regression(
    model: Any, parties: Sequence[Party], key_holder: BaseWorker, options: dict[str, Any]
) -> Regression:
    """A regression that is not open yet."""
    check_worker(key_holder)
    linear = {
        name: options.pop(name) for name in ("epochs", "batch_size", "lr", "l2", "key_bits", "precision")
    }
    short, small = options.pop("allow_short_key"), options.pop("allow_small_batches")
    plan = Plan(parties, key_holder, **options)
    label_owner = plan.label_owner()
    for one in parties:
        if one.label is None and not one.columns:
            raise OptionError(f"party {one.worker.id!r} gives no columns: name some, or leave it out")
    paillier.check_bits(linear["key_bits"], allow_short=short, warn=True)
    whole("batch_size", linear["batch_size"], least=2)
    packing.layout_for(linear["key_bits"], linear["batch_size"], linear["precision"])
    terms = m.LinearTerms(
        model,
        linear["batch_size"],
        whole("epochs", linear["epochs"], most=1_000_000),
        number("lr", linear["lr"], above=0),
        number("l2", linear["l2"]),
        linear["key_bits"],
        linear["precision"],
        allow_short_key=bool(short),
        allow_small_batches=bool(small),
    )
    made = Regression(
        plan.workers(),
        plan.opens(terms, label_owner=label_owner),
        label_owner=label_owner,
        epochs=terms.epochs,
    )
    made._teller = len(parties)
    return made


def linear_regression(
    *parties: Party,
    key_holder: BaseWorker,
    epochs: int = 10,
    batch_size: int = 64,
    lr: float = 0.1,
    l2: float = 0.0,
    normalise: str = "strip",
    standardise: bool = True,
    holdout: float = 0.0,
    seed: int = 0,
    key_bits: int = paillier.SAFE_BITS,
    precision: int = packing.DEFAULT_PRECISION,
    predictions_to: str = CLIENT,
    weights_to_client: bool = True,
    timeout: float = DEFAULT_TIMEOUT,
    purpose: str = "",
    keep: str = "",
    resume: bool = False,
    allow_short_key: bool = False,
    allow_small_batches: bool = False,
) -> Regression:
    """Opens a run that trains a linear model of one party's label on the columns of all, by gradient descent.

    The parties find who is in all tables, and `key_holder` makes a key, before this returns; `Regression.fit` trains.
    Weights are those of `torch.optim.SGD` on the joined table (with `weight_decay` `l2`, but not of the intercept),
    within the precision of the encoding: column values are rounded to multiples of 2**-precision, residuals to half of
    that. What each party learns: `planrt.sharing.columns.linear`. Needs the extra ``vertical`` on the workers.

    Args:
        parties: two or more, one with the label.
        key_holder: another worker, which must not work together with any of them: it has the private key.
        epochs: passes at most; `fit` may do fewer.
        batch_size: rows of a batch, at least twice as many as any party's columns.
        lr, l2: learning rate, and L2 penalty of the weights.
        normalise: see `intersection_size`.
        standardise: each owner takes the mean from its columns and divides them by their standard deviation, over the
            people who are trained on; also from the label.
        holdout: the share of common people who are kept for `evaluate`, by a hash of their ids.
        seed: of the order of rows in batches, and who is held out.
        key_bits: of Paillier's key.
        precision: fractional bits of column values.
        predictions_to: "client", or the id of the owner's worker that alone gets predictions.
        weights_to_client: whether `Regression.weights` works.
        timeout: seconds that a party waits for another one.
        purpose: what it is for, for the owners to read.
        keep: a name that each party keeps its own part under, in a folder of its own, after every epoch.
        resume: goes on from what was kept under that name, with the same options: weights have the same bits as
            without the break.
        allow_short_key: takes keys below 2048 bits, for tests.
        allow_small_batches: takes batches whose gradients tell about single people.

    Raises:
        OptionError: a value out of range. DataError: a column that is not there, holds text, or has missing values, or
            duplicate ids; names party and column. AlignmentError: nobody is in all tables.
        NotApprovedError, PolicyRefusedError: an owner does not want it. JointError: a party is gone.
        MissingPackageError: a worker of this process lacks the extra.
    """
    made = _regression("linear", parties, key_holder, _options(locals()))
    return begun(made, "await async_linear_regression(...)")


def logistic_regression(
    *parties: Party,
    key_holder: BaseWorker,
    epochs: int = 10,
    batch_size: int = 64,
    lr: float = 0.1,
    l2: float = 0.0,
    normalise: str = "strip",
    standardise: bool = True,
    holdout: float = 0.0,
    seed: int = 0,
    key_bits: int = paillier.SAFE_BITS,
    precision: int = packing.DEFAULT_PRECISION,
    predictions_to: str = CLIENT,
    weights_to_client: bool = True,
    timeout: float = DEFAULT_TIMEOUT,
    purpose: str = "",
    keep: str = "",
    resume: bool = False,
    allow_short_key: bool = False,
    allow_small_batches: bool = False,
) -> Regression:
    """Opens a run that trains a logistic model of one party's label (0 or 1) on the columns of all.

    The loss is the second-order Taylor approximation of the logistic one at 0, which encrypted values can be computed
    with: ``log 2 - s u / 2 + u**2 / 8``, with ``s = 2 y - 1``. `Regression.evaluate` tells the exact loss, and the
    accuracy. Everything else is as of `linear_regression`, which describes the arguments.

    Raises:
        DataError: a label that is neither 0 nor 1; else as `linear_regression`.
    """
    made = _regression("logistic", parties, key_holder, _options(locals()))
    return begun(made, "await async_logistic_regression(...)")


async def async_linear_regression(*parties: Party, key_holder: BaseWorker, **options: Any) -> Regression:
    """Does what `linear_regression` does, with its options, to be awaited on any loop."""
    return await _regression(
        "linear", parties, key_holder, with_defaults(linear_regression, options)
    )._opened()


async def async_logistic_regression(*parties: Party, key_holder: BaseWorker, **options: Any) -> Regression:
    """Does what `logistic_regression` does, with its options, to be awaited on any loop."""
    return await _regression(
        "logistic", parties, key_holder, with_defaults(logistic_regression, options)
    )._opened()


def _options(given: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in given.items() if name not in ("parties", "key_holder")}


def score(weights: dict[str, dict[str, float]], columns: dict[str, torch.Tensor]) -> torch.Tensor:
    """Returns what a regression's weights give for columns that are all here, by name: before any link function."""
    total = torch.zeros(())
    for owned in weights.values():
        for name, weight in owned.items():
            total = total + weight * (1.0 if name == "intercept" else columns[name])
    return total

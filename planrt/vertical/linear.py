"""Linear and logistic regression over the columns of several owners: on encrypted values, or on secret shares."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, Literal

import torch

from planrt.errors import OptionError
from planrt.loop import on_loop, run
from planrt.sharing.columns import descent, packing, paillier
from planrt.vertical.opening import (
    CLIENT,
    DEFAULT_TIMEOUT,
    Plan,
    awaited_form_of,
    number,
    whole,
    with_defaults,
)
from planrt.vertical.parties import Party, check_worker
from planrt.vertical.runs import TrainedRun, begun
from planrt.workers.base import BaseWorker
from planrt.workers.wire import messages as m

Method = Literal["paillier", "shares"]
METHODS: Final[tuple[Method, ...]] = ("paillier", "shares")


class Regression(TrainedRun):
    """A regression that several owners train together; made by `linear_regression` and `logistic_regression`."""

    @on_loop
    async def async_weights(self) -> dict[str, dict[str, float]]:
        """Does what `weights` does, to be awaited on any loop."""
        found: dict[str, dict[str, float]] = {}
        if isinstance(self._opens[0].model, m.SharedTerms):
            await self._step("release")
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
    model: Literal["linear", "logistic"], parties: Sequence[Party], given: dict[str, Any]
) -> Regression:
    """A regression that is not open yet."""
    method, key_holder, provider = given.pop("method"), given.pop("key_holder"), given.pop("crypto_provider")
    chosen = {
        name: given.pop(name)
        for name in (
            "epochs", "batch_size", "lr", "l2", "precision", "exact", "key_bits", "allow_short_key",
            "allow_small_batches",
        )
    }  # fmt: skip
    if method not in METHODS:
        raise OptionError(f"method is {' or '.join(map(repr, METHODS))}, not {method!r}")
    needed, other = (
        ("key_holder", "crypto_provider") if method == "paillier" else ("crypto_provider", "key_holder")
    )
    third, left_over = (key_holder, provider) if method == "paillier" else (provider, key_holder)
    if third is None or left_over is not None:
        raise OptionError(f"method={method!r} takes {needed}=, another worker, and no {other}")
    check_worker(third)
    if method == "shares" and (given["keep"] or given["resume"]):
        raise OptionError(
            "keep= and resume= are for method='paillier': shares, and what masked them, are kept nowhere"
        )
    plan = Plan(parties, third, **given)
    label_owner = plan.label_owner()
    for one in parties:
        if one.label is None and not one.columns:
            raise OptionError(f"party {one.worker.id!r} gives no columns: name some, or leave it out")
    whole("batch_size", chosen["batch_size"], least=2)
    whole("epochs", chosen["epochs"], most=1_000_000)
    chosen["lr"], chosen["l2"] = number("lr", chosen["lr"], above=0), number("l2", chosen["l2"])
    terms: m.LinearTerms | m.SharedTerms
    if method == "paillier":
        terms = _on_encrypted_values(model, **chosen)
    else:
        terms = _on_shares(model, plan, label_owner, **chosen)
    made = Regression(
        plan.workers(),
        plan.opens(terms, label_owner=label_owner),
        label_owner=label_owner,
        epochs=terms.epochs,
    )
    if method == "paillier":
        made._teller = len(parties)
    return made


def _on_encrypted_values(
    model: Literal["linear", "logistic"], *, exact: bool, key_bits: int | None, precision: int, **chosen: Any
) -> m.LinearTerms:
    bits = paillier.SAFE_BITS if key_bits is None else key_bits
    if exact:
        raise OptionError(
            "exact=True is for method='shares': on encrypted values there is the second-order approximation alone"
        )
    paillier.check_bits(bits, allow_short=chosen["allow_short_key"], warn=True)
    packing.layout_for(bits, chosen["batch_size"], precision)
    return m.LinearTerms(
        model,
        chosen["batch_size"],
        chosen["epochs"],
        chosen["lr"],
        chosen["l2"],
        bits,
        precision,
        allow_short_key=bool(chosen["allow_short_key"]),
        allow_small_batches=bool(chosen["allow_small_batches"]),
    )


def _on_shares(
    model: Literal["linear", "logistic"],
    plan: Plan,
    label_owner: int,
    *,
    exact: bool,
    key_bits: int | None,
    precision: int,
    **chosen: Any,
) -> m.SharedTerms:
    if key_bits is not None or chosen["allow_short_key"]:
        raise OptionError(
            "key_bits and allow_short_key are for method='paillier': on shares nobody has a key"
        )
    if type(exact) is not bool:
        raise OptionError(f"exact must be True or False, got {exact!r}")
    descent.check_precision(precision)
    loss: descent.Loss = "squares" if model == "linear" else "exact" if exact else "second order"
    columns = [len(one.columns) + (owner == label_owner) for owner, one in enumerate(plan.owners)]
    rows = chosen["batch_size"]
    few = min(rows, 1024)  # there may be fewer people than that; who owns tables looks again
    descent.numbers_for(
        descent.Terms(
            model, ("",), label_owner, few, few, chosen["lr"], chosen["l2"], 0, precision=precision,
            loss_kind=loss, columns=tuple(columns),
        ),
        few,
    )  # fmt: skip
    return m.SharedTerms(
        loss,
        rows,
        chosen["epochs"],
        chosen["lr"],
        chosen["l2"],
        precision,
        allow_small_batches=bool(chosen["allow_small_batches"]),
    )


def linear_regression(
    *parties: Party,
    key_holder: BaseWorker | None = None,
    method: Method = "paillier",
    crypto_provider: BaseWorker | None = None,
    epochs: int = 10,
    batch_size: int = 64,
    lr: float = 0.1,
    l2: float = 0.0,
    normalise: str = "strip",
    standardise: bool = True,
    holdout: float = 0.0,
    seed: int = 0,
    key_bits: int | None = None,
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

    The parties find who is in all tables, and agree on a key or share their columns, before this returns;
    `Regression.fit` trains. Weights are those of `torch.optim.SGD` on the joined table (with `weight_decay` `l2`, but
    not of the intercept), within the precision of the encoding: columns are rounded to multiples of 2**-precision.

    There are two methods. With ``"paillier"`` owners exchange encrypted residuals, `key_holder` has the key, and each
    owner sees its own gradient of each batch (`planrt.sharing.columns.linear`; needs the extra ``vertical`` on the
    workers). With ``"shares"`` owners compute on secret shares with randomness of `crypto_provider`, and see nothing
    before they are asked for weights or predictions (`planrt.sharing.columns.shared`).

    Args:
        parties: two or more, one with the label.
        key_holder, crypto_provider: another worker, which must not work together with any of them. It has the private
            key, or hands out randomness.
        method: "paillier" takes a `key_holder`, "shares" a `crypto_provider`.
        epochs: passes at most; `fit` may do fewer.
        batch_size: rows of a batch; of encrypted ones at least twice as many as any party's columns.
        lr, l2: learning rate, and L2 penalty of the weights.
        normalise: see `intersection_size`.
        standardise: each owner takes the mean from its columns and divides them by their standard deviation, over the
            people who are trained on; also from the label. A column that is the same for all becomes 0. See
            `Party.as_is`.
        holdout: the share of common people who are kept for `evaluate`, by a hash of their ids.
        seed: of the order of rows in batches, and who is held out.
        key_bits: of Paillier's key; 2048 without a word.
        precision: fractional bits of column values, on shares from 8 to 20.
        predictions_to: "client", or the id of the owner's worker that alone gets predictions.
        weights_to_client: whether `Regression.weights` works.
        timeout: seconds that a party waits for another one.
        purpose: what it is for, for the owners to read.
        keep: a name that each party keeps its own part under, in a folder of its own, after every epoch.
        resume: goes on from what was kept under that name, with the same options: weights have the same bits as
            without the break. `lr` may be another one from then on, and `epochs` more.
        allow_short_key: takes keys below 2048 bits, for tests.
        allow_small_batches: takes batches whose gradients tell about single people; on shares, tables with fewer than
            twice as many people as a party has columns.

    Raises:
        OptionError: a value out of range. DataError: a column that is not there, holds text, or has missing values, or
            duplicate ids; names party and column. AlignmentError: nobody is in all tables.
        NotApprovedError, PolicyRefusedError: an owner does not want it. JointError: a party is gone.
        MissingPackageError: a worker of this process lacks the extra.
    """
    made = _regression("linear", parties, _options(locals()) | {"exact": False})
    return begun(made, "await async_linear_regression(...)")


def logistic_regression(
    *parties: Party,
    key_holder: BaseWorker | None = None,
    method: Method = "paillier",
    crypto_provider: BaseWorker | None = None,
    exact: bool = False,
    epochs: int = 10,
    batch_size: int = 64,
    lr: float = 0.1,
    l2: float = 0.0,
    normalise: str = "strip",
    standardise: bool = True,
    holdout: float = 0.0,
    seed: int = 0,
    key_bits: int | None = None,
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
    with: ``log 2 - s u / 2 + u**2 / 8``, with ``s = 2 y - 1``. With ``method="shares"`` and `exact` it is the logistic
    loss itself: its slope is off by less than 1e-4, and a batch takes twelve rounds in place of four.
    `Regression.evaluate` tells the exact loss, and the accuracy. Everything else is as of `linear_regression`, which
    describes the arguments.

    Raises:
        DataError: a label that is neither 0 nor 1; else as `linear_regression`.
    """
    made = _regression("logistic", parties, _options(locals()))
    return begun(made, "await async_logistic_regression(...)")


@awaited_form_of(linear_regression)
async def async_linear_regression(*parties: Party, **options: Any) -> Regression:
    """Does what `linear_regression` does, with its options, to be awaited on any loop."""
    given = with_defaults(linear_regression, options) | {"exact": False}
    return await _regression("linear", parties, given)._opened()


@awaited_form_of(logistic_regression)
async def async_logistic_regression(*parties: Party, **options: Any) -> Regression:
    """Does what `logistic_regression` does, with its options, to be awaited on any loop."""
    return await _regression("logistic", parties, with_defaults(logistic_regression, options))._opened()


def _options(given: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in given.items() if name != "parties"}


def score(weights: dict[str, dict[str, float]], columns: dict[str, torch.Tensor]) -> torch.Tensor:
    """Returns what a regression's weights give for columns that are all here, by name: before any link function."""
    total = torch.zeros(())
    for owned in weights.values():
        for name, weight in owned.items():
            total = total + weight * (1.0 if name == "intercept" else columns[name])
    return total

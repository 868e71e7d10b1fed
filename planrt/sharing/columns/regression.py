"""What regressions have in common, on encrypted values (`linear`) and on secret shares (`shared`)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch

from planrt.errors import DataError
from planrt.seeding import derive_seed
from planrt.sharing.columns import packing

Model = Literal["linear", "logistic"]
Array = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True)
class Terms:
    """The facts of a run that all parties know."""

    model: Model
    names: tuple[str, ...]
    """Of the parties: owners first, the key holder last."""
    label_owner: int
    rows: int
    """People to train on."""
    batch_size: int
    lr: float
    l2: float
    seed: int
    key_bits: int = 0
    """Of the key; 0 where there is none."""
    precision: int = packing.DEFAULT_PRECISION

    @property
    def owners(self) -> int:
        """The number of owners; the key holder has that number."""
        return len(self.names) - 1

    @property
    def layout(self) -> packing.Layout:
        """The packing that all parties use."""
        return packing.layout_for(self.key_bits, min(self.batch_size, self.rows), self.precision)

    @property
    def slope(self) -> float:
        """Residuals are slope * prediction - offset * label."""
        return 1.0 if self.model == "linear" else 0.25

    @property
    def offset(self) -> float:
        """See `slope`."""
        return 1.0 if self.model == "linear" else 0.5

    @property
    def factor(self) -> float:
        """A gradient of the loss is factor * the mean of residual times value."""
        return 2.0 if self.model == "linear" else 1.0

    def loss(self, squares: float, rows: int) -> float:
        """Returns the loss from the sum of squared residuals."""
        mean = squares / rows
        return mean if self.model == "linear" else math.log(2) - 0.5 + 2 * mean

    def batches(self, epoch: int) -> list[Array]:
        """Returns the rows of each batch of an epoch: a permutation that all parties know."""
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "batches", epoch))
        order = torch.randperm(self.rows, generator=generator).numpy()
        return [order[at : at + self.batch_size] for at in range(0, self.rows, self.batch_size)]


@dataclass(slots=True)
class Columns:
    """The columns, and labels, that an owner brings to a run; its side of the run is a subclass.

    Args:
        terms: what all know.
        number: its place among the parties.
        values: its columns, float64 [rows, columns]; rows to train on first, in the common order.
        columns: their names.
        labels: of the owner of the labels [rows]; None of others.
        label: their column's name.
        small_batches: there may be too few rows for the columns: each module says how many are enough.

    Raises:
        DataError: labels of a logistic model that are not 0 or 1; names party and column.
    """

    terms: Terms
    number: int
    values: Array
    columns: Sequence[str]
    labels: Array | None = None
    label: str = ""
    small_batches: bool = False
    weights: Array = field(init=False)
    """Of its columns, as far as it knows them; the last one of the owner of the labels is the intercept."""

    @property
    def name(self) -> str:
        """Its name."""
        return self.terms.names[self.number]

    def with_intercept(self) -> None:
        """Looks at the labels, gives their owner its intercept, and makes weights of zeros."""
        if self.labels is not None:
            check_labels(self.terms.model, self.labels, whose=self.name, column=self.label)
            self.values = np.concatenate([self.values, np.ones((len(self.values), 1))], 1)
            self.columns = [*self.columns, "intercept"]
        self.weights = np.zeros(len(self.columns))

    def scores(self, rows: Array) -> Array:
        """Returns this owner's part of the predictions for some of its rows, before any link function."""
        found: Array = self.values[rows] @ self.weights
        return found


def check_labels(model: Model, labels: Array, *, whose: str, column: str) -> None:
    """Raises DataError if a logistic model's labels are not all 0 or 1; names party and column."""
    if model == "logistic" and not np.isin(labels, (0.0, 1.0)).all():
        raise DataError(f"{whose}: label column {column!r} has values that are neither 0 nor 1")

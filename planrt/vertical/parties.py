"""Who takes part in a joint run, as its client names them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from planrt.errors import DataError, OptionError
from planrt.loop import run
from planrt.sharing.columns.ids import as_id
from planrt.workers.base import BaseWorker
from planrt.workers.wire import messages as m

MOST_PEOPLE = 100_000
"""People that predictions are asked for at a time."""


@dataclass(frozen=True)
class Party:
    """An owner of a table, for one run.

    Args:
        worker: the worker that holds it.
        dataset: the key that it is served under.
        ids: the column, or columns, that say who a row is about. Those of all parties are compared in their order, so
            they may have other names in each table.
        columns: those that it gives to the model.
        label: the column to predict, at one party of a run.
        as_is: those of `columns` that `standardise` leaves as they are: numbers of classes for an `nn.Embedding`, say.

    Raises:
        OptionError: no worker, no id column, a column that is named twice, names that are no strings, or `as_is` of
            columns that it does not give.
    """

    worker: BaseWorker
    dataset: str
    ids: str | Sequence[str]
    columns: Sequence[str] = ()
    label: str | None = None
    as_is: Sequence[str] = ()

    def __post_init__(self) -> None:
        check_worker(self.worker)
        for option, given in (("columns", self.columns), ("as_is", self.as_is)):
            if isinstance(given, str) or not isinstance(given, Iterable):
                raise OptionError(f"{option} is a list of names: write {option}=[{given!r}]")
        if not isinstance(self.ids, Iterable) or not self.id_columns:
            raise OptionError(
                "a party names the column, or columns, that say who a row is about: ids='patient'"
            )
        for name in (
            self.dataset,
            *self.id_columns,
            *self.columns,
            *((self.label,) if self.label is not None else ()),
        ):
            if not isinstance(name, str) or not name:
                raise OptionError(f"data sets and columns are named by strings, not {name!r}")
        if len(set(self.id_columns)) < len(self.id_columns):
            raise OptionError(f"an id column is named twice: {', '.join(self.id_columns)}")
        if self.label is not None and self.label in self.columns:
            raise OptionError(f"{self.label!r} is the label, and no column to predict it from")
        if len(set(self.columns)) < len(self.columns):
            raise OptionError(f"a column is named twice: {', '.join(self.columns)}")
        others = [name for name in self.as_is if name not in self.columns]
        if others:
            raise OptionError(f"as_is names columns of columns=, and {others[0]!r} is none of them")

    @property
    def id_columns(self) -> list[str]:
        """The id columns, as a list."""
        return [self.ids] if isinstance(self.ids, str) else list(self.ids)


def check_worker(worker: object) -> None:
    """Raises OptionError unless it is a worker that others may be told to dial."""
    if not isinstance(worker, BaseWorker):
        raise OptionError(f"a joint run is between workers, not {type(worker).__name__}")


async def async_table_columns(worker: BaseWorker, dataset: str) -> m.TableColumns:
    """Returns what `table_columns` does, to be awaited on any loop."""
    columns, _ = await worker.ask(m.TableColumns, m.ReadTable(dataset))
    return columns


def table_columns(worker: BaseWorker, dataset: str) -> m.TableColumns:
    """Returns the facts of a table that its worker tells: ``rows``, ``ids``, ``columns`` and ``label``; no values.

    Raises:
        UnknownDatasetError: the worker has no such data set, or not for this user.
        RemoteError: it is no table.
    """
    return run(async_table_columns(worker, dataset), instead="await async_table_columns(worker, dataset)")


def people_of(people: Iterable[Any], id_columns: int) -> list[list[str]]:
    """Returns people as messages have them: for each the values of the id columns, as tables have them.

    Raises:
        OptionError: somebody is named by another number of values, or by none.
    """
    if isinstance(people, str) or not isinstance(people, Iterable):
        raise OptionError(f"people is a list of ids: write [{people!r}]")
    found = []
    if isinstance(people, torch.Tensor):
        people = people.tolist()
    for place, one in enumerate(people):
        several = isinstance(one, list | tuple) or (isinstance(one, np.ndarray) and one.ndim == 1)
        values = list(one) if several else [one]
        if len(values) != id_columns:
            raise OptionError(
                f"each person is named by the values of {id_columns} id columns: person {place} has {len(values)}"
            )
        try:
            named = [as_id(value) for value in values]
        except DataError as error:
            raise OptionError(f"person {place} is named by {error}") from None
        if None in named:
            raise OptionError(f"person {place} has no id")
        found.append([str(value) for value in named])
    if not found:
        raise OptionError("there is nobody to predict for: name at least one person")
    if len(found) > MOST_PEOPLE:
        raise OptionError(f"predict takes up to {MOST_PEOPLE:,} people at a time, not {len(found):,}")
    return found

"""A table of an owner's: columns about people, of which one or more say who they are. Ids never leave it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from planrt.errors import DataError, OptionError
from planrt.extras import needed
from planrt.sharing.columns.ids import as_id

SUFFIXES: Final = (".csv", ".parquet")


class Table(torch.utils.data.Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Columns of equal length about people, with columns that hold their ids; what vertical training runs on.

    As a data set it is what rounds of other kinds take: `data` are its numeric columns but the label, in order, as
    float32, and `targets` its label (zeros without one).

    Args:
        columns: name -> values: a list, a NumPy array or a tensor of one dimension; or a pandas DataFrame.
        ids: the column, or columns, that say who a row is about; no others are ever compared with another table.
        label: the column that `targets` is, if there is one.

    Raises:
        DataError: columns of different lengths, of two dimensions or of one name; none at all; an id column that is not
            there, or has missing values.
        OptionError: names that are no strings.
    """

    reads_no_items = True

    def __init__(self, columns: Any, ids: str | Sequence[str], *, label: str | None = None) -> None:
        names, found = _names(ids), _arrays(columns)
        for name in names:
            if name not in found:
                raise DataError(f"there is no id column {name!r}; the table has {', '.join(found) or 'none'}")
        if len(set(names)) < len(names):
            raise OptionError(f"an id column is named twice: {', '.join(names)}")
        self.ids: dict[str, list[str]] = {name: _ids(name, found.pop(name)) for name in names}
        self.columns = {name: _numbers(values) for name, values in found.items()}
        """Name -> float64 values, or strings where a column holds text."""
        if label is not None and label not in self.columns:
            raise DataError(f"there is no label column {label!r}; the table has {', '.join(self.columns)}")
        self.label = label

    @classmethod
    def from_file(cls, path: str | Path, ids: str | Sequence[str], *, label: str | None = None) -> Table:
        """Reads a table from a CSV or Parquet file, by its suffix; ids are read as text, so that "007" stays.

        Raises:
            MissingPackageError: pandas (for Parquet also pyarrow) is not installed.
            DataError: the file cannot be read, or does not hold such a table.
        """
        file, names = Path(path), _names(ids)
        if file.suffix.lower() not in SUFFIXES:
            raise DataError(f"{file}: a table is a file that ends in {' or '.join(SUFFIXES)}")
        pandas = needed("pandas", by="reading a table", extra="vertical")
        try:
            if file.suffix.lower() == ".csv":
                frame = _read_csv(pandas, file, names)
            else:
                needed("pyarrow", by="reading a Parquet file", extra="vertical")
                frame = pandas.read_parquet(file)
        except OSError as error:
            raise DataError(f"{file}: {error.strerror or error}") from None
        except DataError as error:
            raise DataError(f"{file}: {error}") from None
        except (ValueError, UnicodeError) as error:  # what pandas says of a file that is none
            raise DataError(f"{file} cannot be read as a table: {str(error).splitlines()[0]}") from None
        try:
            return cls(frame, names, label=label)
        except DataError as error:
            raise DataError(f"{file}: {error}") from None

    def __len__(self) -> int:
        return len(next(iter(self.ids.values())))

    @property
    def numeric(self) -> list[str]:
        """The names of the numeric columns, the label included."""
        return [name for name, values in self.columns.items() if values.dtype == np.float64]

    def fetch(self, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the rows at `indices` as a batch."""
        names = [name for name in self.numeric if name != self.label]
        rows = indices.numpy()
        data = [self.columns[name][rows] for name in names]
        stacked = np.stack(data, 1) if data else np.zeros((len(rows), 0))
        targets = self.columns[self.label][rows] if self.label is not None else np.zeros(len(rows))
        return torch.from_numpy(stacked).float(), torch.from_numpy(targets).float()

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} is out of range for {len(self)} rows")
        data, targets = self.fetch(torch.tensor([index % len(self)]))
        return data[0], targets[0]

    def __repr__(self) -> str:
        return f"<Table of {len(self):,} rows, ids {', '.join(self.ids)}, columns {', '.join(self.columns)}>"

    def values(self, names: Sequence[str], *, whose: str) -> np.ndarray[Any, Any]:
        """Returns these columns as float64 [rows, columns].

        Raises:
            DataError: a column that is not there, holds text, or has values that are missing or infinite; names `whose`
                and the column.
        """
        for name in names:
            if name in self.ids:
                raise DataError(f"{whose}: {name!r} is an id column, and ids are never computed with")
            if name not in self.columns:
                raise DataError(
                    f"{whose}: there is no column {name!r}; the table has {', '.join(self.columns)}"
                )
            column = self.columns[name]
            if column.dtype != np.float64:
                raise DataError(
                    f"{whose}: column {name!r} holds text: turn it into numbers first, one column for each value, say"
                )
            bad = int((~np.isfinite(column)).sum())
            if bad:
                raise DataError(
                    f"{whose}: column {name!r} has {bad} values that are missing or infinite: fill them, or leave "
                    "these rows out"
                )
        if not names:
            return np.zeros((len(self), 0))
        return np.stack([self.columns[name] for name in names], 1)


def _names(ids: str | Sequence[str]) -> list[str]:
    names = [ids] if isinstance(ids, str) else list(ids) if isinstance(ids, Sequence) else []
    if not names or not all(isinstance(name, str) for name in names):
        raise OptionError("a table needs one or more id columns, by name: Table(columns, ids='patient')")
    return names


def _read_csv(pandas: Any, file: Path, names: Sequence[str]) -> Any:
    """A CSV file as a DataFrame, with ids as the texts that they are: somebody may be called "NA", or "None"."""
    frame = pandas.read_csv(file, dtype=dict.fromkeys(names, str))
    if not isinstance(frame.index, pandas.RangeIndex):  # what pandas makes of the values in front
        raise DataError("its rows have more values than the first line has names")
    known = [name for name in names if name in frame.columns]
    if frame[known].isna().any(axis=None):
        texts = pandas.read_csv(file, usecols=known, dtype=str, na_filter=False)
        frame[known] = texts[known].mask(texts[known] == "")
    return frame


def _arrays(columns: Any) -> dict[str, Any]:
    """The columns as arrays of one dimension and one length."""
    if hasattr(columns, "columns") and hasattr(columns, "to_dict"):  # a DataFrame, without importing pandas
        levels = [name for name in columns.index.names if name is not None]
        if levels and not set(levels) & set(columns.columns):
            columns = columns.reset_index(levels)
        names = [str(name) for name in columns.columns]
        if len(set(names)) < len(names):
            raise DataError("a table has two columns of one name")
        columns = {name: columns.iloc[:, place].to_numpy() for place, name in enumerate(names)}
    if not isinstance(columns, Mapping) or not all(isinstance(name, str) for name in columns):
        raise DataError("a table is given as a mapping of names to values, or as a DataFrame")
    found = {
        name: np.asarray(values.detach().cpu() if isinstance(values, torch.Tensor) else values)
        for name, values in columns.items()
    }
    for name, values in found.items():
        if values.ndim != 1:
            raise DataError(
                f"column {name!r} has {values.ndim} dimensions: a column has one value for each row"
            )
    lengths = {name: len(values) for name, values in found.items()}
    if len(set(lengths.values())) > 1:
        raise DataError(
            "the columns have different lengths: "
            + ", ".join(f"{name} {length}" for name, length in lengths.items())
        )
    return found


def _ids(name: str, values: np.ndarray[Any, Any]) -> list[str]:
    if values.dtype.kind == "M":  # whose nanoseconds Python would have as numbers
        values = values.astype("datetime64[us]")
    try:
        texts = [as_id(value) for value in values.tolist()]
    except DataError as error:
        raise DataError(f"id column {name!r} has {error}") from None
    missing = sum(text is None for text in texts)
    if missing:
        raise DataError(f"id column {name!r} has {missing} missing values: every row needs an id")
    return [text for text in texts if text is not None]


def _numbers(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Values as float64 where they are numbers, as strings otherwise: days and times, too."""
    if values.dtype.kind in "biuf":
        return values.astype(np.float64)
    try:
        if values.dtype.kind in "Mm":  # Python would have their nanoseconds as numbers
            raise TypeError
        return np.array([_number(one) for one in values.tolist()], np.float64)
    except (TypeError, ValueError):
        return np.array([str(one) for one in values.tolist()], dtype=np.str_)


def _number(value: Any) -> float:
    if value is None or (not isinstance(value, str) and str(value) == "<NA>"):  # as pandas has it
        return float("nan")
    if isinstance(value, str):
        raise TypeError("text")
    return float(value)

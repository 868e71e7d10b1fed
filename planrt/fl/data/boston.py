"""The Boston Housing data set: found, read and standardised.

Harrison and Rubinfeld, "Hedonic housing prices and the demand for clean air", Journal of Environmental
Economics and Management 5 (1978), 81-102. 506 census tracts around Boston with 13 columns each; the target is
the median value of owner-occupied homes in thousands of dollars. scikit-learn no longer brings it, so it
comes from a file, ``boston_housing.npz`` with the arrays x_train, y_train, x_test and y_test.
"""

from __future__ import annotations

import zipfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from planrt.errors import DataError
from planrt.fl.data.digits import usual_places

FILE = "boston_housing.npz"
"""The file's name, in the folder given, in ``PLANRT_DATA`` or in the user's cache folder."""

COLUMNS = (
    "CRIM", "ZN", "INDUS", "CHAS", "NOX", "RM", "AGE", "DIS", "RAD", "TAX", "PTRATIO", "B", "LSTAT",
)  # fmt: skip
"""The columns of the data, in order."""

_CHAS = COLUMNS.index("CHAS")

DESCRIPTION = f"""Boston housing prices: census tracts around Boston, as of 1970.

Columns of the data: {", ".join(COLUMNS)}.
Target: the median value of owner-occupied homes, in thousands of dollars.
Source: Harrison and Rubinfeld, J. Environ. Economics and Management 5, 81-102, 1978."""


@dataclass(frozen=True)
class BostonHousing:
    """Data as float32 [N, 13], targets as float32 [N]: 404 items to train on and 102 to test with."""

    train_data: torch.Tensor
    train_targets: torch.Tensor
    test_data: torch.Tensor
    test_targets: torch.Tensor

    def standardized(self) -> BostonHousing:
        """Scales each column to mean 0 and standard deviation 1 over the training items; CHAS, a yes or no,
        stays as it is."""
        mean, deviation = self.train_data.mean(0), self.train_data.std(0)
        mean[_CHAS], deviation[_CHAS] = 0.0, 1.0
        return replace(
            self,
            train_data=(self.train_data - mean) / deviation,
            test_data=(self.test_data - mean) / deviation,
        )


def find(folder: str | Path | None = None) -> Path | None:
    """Returns the path of the file: in `folder`, or without one in ``PLANRT_DATA`` or the user's cache
    folder. None if there is none.

    Raises:
        DataError: ``PLANRT_DATA`` names no folder.
    """
    found = [place / FILE for place in _places(folder) if (place / FILE).is_file()]
    return found[0] if found else None


def load(folder: str | Path | None = None) -> BostonHousing:
    """Reads what `find` finds.

    Raises:
        DataError: there is no such file, or it is not what its name says.
    """
    path = find(folder)
    if path is None:
        places = " or ".join(str(place) for place in _places(folder))
        raise DataError(f"no {FILE} in {places}: put it there, or name its folder with PLANRT_DATA or --data")
    try:
        with path.open("rb") as file, np.load(file) as arrays:  # numpy leaves a damaged file open
            read = [
                torch.from_numpy(arrays[name]).float() for name in ("x_train", "y_train", "x_test", "y_test")
            ]
    except (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} cannot be read ({error}): replace it with a fresh copy") from error
    for data, targets in (read[:2], read[2:]):
        if (
            data.dim() != 2
            or data.shape[1] != len(COLUMNS)
            or targets.shape != data.shape[:1]
            or not len(data)
        ):
            raise DataError(
                f"{path} holds data of shape {list(data.shape)} with targets of shape {list(targets.shape)}, wanted "
                f"[N, {len(COLUMNS)}] and [N]: replace it with a fresh copy"
            )
    return BostonHousing(*read)


def _places(folder: str | Path | None) -> list[Path]:
    return usual_places() if folder is None else [Path(folder)]

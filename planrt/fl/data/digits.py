"""MNIST and its stand-in: found, read and split over the workers.

`find` says which data set there is and checks its files, `read` loads it, `load` does both, with numpy only.
Torch is imported by `partition_for` alone, which makes the data set that a worker serves, torchvision only to
download, and scikit-learn only for the digits, so that a worker process finds out early and fast whether it
has data.

Search order: the folder given; else the folder in ``PLANRT_DATA``, then the user's cache folder, then a
download into that. A folder given by hand is the only place looked at, and nothing is downloaded for it. A
variable that names no folder is an error, and not passed over.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import math
import os
import shutil
import socket
import struct
import sys
import tempfile
import textwrap
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt

from planrt.errors import DataError, MissingPackageError, OptionError
from planrt.extras import needed

if TYPE_CHECKING:
    import torch

    from planrt.workers.datasets import BaseDataset

Bytes: TypeAlias = npt.NDArray[np.uint8]

VARIABLE = "PLANRT_DATA"
"""The environment variable that names the folder of data sets."""

DATASETS = ("auto", "mnist", "digits")
"""What `find` takes: one of the two by name, or MNIST if it can be had and the digits if not."""

PARTITIONS: dict[str, tuple[int, ...]] = {"alice": (0, 1, 2, 3), "bob": (4, 5, 6), "charlie": (7, 8, 9)}
"""Training worker -> the digits whose training images it holds."""

TESTING = "testing"
"""The worker that holds the test images."""

TRAIN_KEY = "mnist"
"""Key of a training partition on its worker, whichever of the two data sets it comes from."""

TEST_KEY = "mnist_testing"
"""Key of the test images on the testing worker."""

MNIST_MEAN, MNIST_STD = 0.1307, 0.3081
"""Mean and standard deviation of MNIST's training pixels, scaled to [0, 1]."""

DOWNLOAD_TIMEOUT = 5.0
"""Seconds a mirror may stay silent before the download is given up."""

_CONTRAST = 1.8
"""By how much the stand-in's grey levels are drawn apart, from the middle."""

_TRAIN_FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte")
_TEST_FILES = ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
_IMAGES_MAGIC, _LABELS_MAGIC = 0x0803, 0x0801  # IDX: uint8 (0x08) in three dimensions or one


@dataclass(frozen=True)
class DataSource:
    """A data set that was found: `name` is "mnist" or "digits", `folder` the root of MNIST's files."""

    name: str
    folder: Path | None = None
    notice: str = ""


@dataclass(frozen=True)
class LoadedData:
    """Images as uint8 [N, 28, 28], labels as uint8 [N]; `notice` says why these are not MNIST, if so."""

    name: str
    train_images: Bytes = field(repr=False)
    train_labels: Bytes = field(repr=False)
    test_images: Bytes = field(repr=False)
    test_labels: Bytes = field(repr=False)
    notice: str = ""


def load(dataset: str = "auto", folder: str | Path | None = None) -> LoadedData:
    """`find`, then `read`."""
    return read(find(dataset, folder))


def find(dataset: str = "auto", folder: str | Path | None = None) -> DataSource:
    """Decides which data set to use and checks that MNIST's files are all there and of the right size.

    Raises:
        OptionError: `dataset` is not one of `DATASETS`.
        DataError: MNIST was asked for and cannot be had, some of its files are missing or damaged, or
            ``PLANRT_DATA`` names no folder.
    """
    if dataset not in DATASETS:
        raise OptionError(f"unknown data set {dataset!r}: use one of {', '.join(DATASETS)}")
    if dataset == "digits":
        return DataSource("digits")
    if folder is not None and not Path(folder).is_dir():
        raise DataError(f"data folder {str(folder)!r} does not exist: give the folder that holds MNIST/raw")
    places = [Path(folder)] if folder is not None else usual_places()
    for place in places:
        if _mnist_files(place) is not None:
            return DataSource("mnist", place)
    reason = f"no MNIST in {' or '.join(str(place) for place in places)}"
    if folder is None:
        problem = _download(cache_folder())
        if problem is None:
            return DataSource("mnist", cache_folder())
        reason += f", and it could not be downloaded ({problem})"
    if dataset == "mnist":
        raise DataError(
            f"{reason}: give --data a folder with MNIST/raw/{_TRAIN_FILES[0]} and its three siblings"
        )
    return DataSource("digits", notice=f"{reason}: using scikit-learn's 1,797 handwritten digits instead")


def read(source: DataSource) -> LoadedData:
    """Loads what `find` found.

    Raises:
        DataError: a file is truncated or not what its name says.
    """
    if source.name == "digits":
        return _read_digits(source.notice)
    files = _mnist_files(source.folder) if source.folder is not None else None
    if files is None:
        raise DataError(f"no MNIST in {source.folder}")
    train_images, train_labels = _read_pair(*(files[name] for name in _TRAIN_FILES))
    test_images, test_labels = _read_pair(*(files[name] for name in _TEST_FILES))
    return LoadedData("mnist", train_images, train_labels, test_images, test_labels, source.notice)


def partition_for(worker_id: str, loaded: LoadedData, *, testing: bool = False) -> BaseDataset:
    """Returns the data set that `worker_id` serves: its digits' training images, or with `testing` all test
    images.

    The worker `TESTING` holds the test images in any case. Batches of data are float32 [B, 1, 28, 28]
    (see `normalize`), targets int64 [B].

    Raises:
        DataError: no partition is meant for `worker_id`.
    """
    import torch

    from planrt.workers.datasets import BaseDataset

    if testing or worker_id == TESTING:
        images, labels = loaded.test_images.copy(), loaded.test_labels
    elif worker_id in PARTITIONS:
        mine = np.isin(loaded.train_labels, PARTITIONS[worker_id])
        images, labels = loaded.train_images[mine], loaded.train_labels[mine]
    else:
        raise DataError(no_partition(worker_id))
    return BaseDataset(
        torch.from_numpy(images), torch.from_numpy(labels.astype(np.int64)), batch_transform=normalize
    )


def no_partition(worker_id: str) -> str:
    """Returns the message for a worker that no part of the data is meant for."""
    return (
        f"no data is meant for worker {worker_id!r}: call it {', '.join(PARTITIONS)} for a part of the "
        "training images, add --testing for the test images, serve your own data set with --dataset "
        "package.module:factory, or none with --empty"
    )


def normalize(images: torch.Tensor) -> torch.Tensor:
    """Images as uint8 [B, 28, 28] to float32 [B, 1, 28, 28] with MNIST's mean 0 and standard deviation 1.

    The same numbers, bit for bit, as torchvision's ``ToTensor`` and ``Normalize((0.1307,), (0.3081,))``.
    """
    return images.unsqueeze(1).float().div_(255).sub_(MNIST_MEAN).div_(MNIST_STD)


def digit_counts(labels: npt.ArrayLike) -> dict[int, int]:
    """Counts the images of each digit that occurs in `labels`."""
    digits, counts = np.unique(np.asarray(labels), return_counts=True)
    return {int(digit): int(count) for digit, count in zip(digits, counts, strict=True)}


def cache_folder() -> Path:
    """Returns the folder that downloads go to: the user's cache folder as the platform has it."""
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "planrt"


def usual_places() -> list[Path]:
    """Lists the folders in which data is looked for if none is given: that of ``PLANRT_DATA``, and the user's
    cache folder.

    Raises:
        DataError: ``PLANRT_DATA`` names no folder.
    """
    named = os.environ.get(VARIABLE)
    if not named:
        return [cache_folder()]
    if not Path(named).is_dir():
        raise DataError(f"{VARIABLE} names {named!r}, which is no folder: correct the variable, or unset it")
    return [Path(named), cache_folder()]


def _mnist_files(folder: Path) -> dict[str, Path] | None:
    """MNIST's four files in `folder`, plain or gzipped; None when there is not one of them.

    Raises:
        DataError: only some are there, or one does not start or end as it should.
    """
    raw = folder / "MNIST" / "raw"
    files = {}
    for name in _TRAIN_FILES + _TEST_FILES:
        for path in (raw / name, raw / f"{name}.gz"):
            if path.is_file():
                files[name] = path
                break
    if not files:
        return None
    missing = [name for name in _TRAIN_FILES + _TEST_FILES if name not in files]
    if missing:
        raise DataError(
            f"only a part of MNIST is in {raw}: add the missing {', '.join(missing)}, or remove the rest"
        )
    for path in files.values():
        shape = _idx_shape(path, _content(path, 16))
        if path.suffix != ".gz":  # how much is in a gzipped file is known only when it is read
            _check_size(path, shape, path.stat().st_size)
    return files


def _read_pair(images_path: Path, labels_path: Path) -> tuple[Bytes, Bytes]:
    images, labels = _read_idx(images_path), _read_idx(labels_path)
    if len(images) != len(labels):
        raise _damaged(labels_path, f"has {len(labels)} labels for {len(images)} images")
    if labels.max() > 9:
        raise _damaged(labels_path, "holds labels other than 0-9")
    return images, labels


def _read_idx(path: Path) -> Bytes:
    """The array in an IDX file (http://yann.lecun.com/exdb/mnist/ describes the format), read-only."""
    content = _content(path)
    shape = _idx_shape(path, content)
    _check_size(path, shape, len(content))
    return np.frombuffer(content, np.uint8, offset=_idx_offset(shape)).reshape(shape)


def _content(path: Path, size: int = -1) -> bytes:
    try:
        if path.suffix == ".gz":
            with gzip.open(path) as file:
                return file.read(size)
        with path.open("rb") as file:
            return file.read(size)
    except (EOFError, OSError, zlib.error) as error:
        raise _damaged(path, f"cannot be read ({error})") from error


def _idx_shape(path: Path, content: bytes) -> tuple[int, ...]:
    magic = _IMAGES_MAGIC if "images" in path.name else _LABELS_MAGIC
    dimensions = magic & 0xFF
    if len(content) < 4 + 4 * dimensions or struct.unpack_from(">I", content)[0] != magic:
        raise _damaged(path, "does not start like an MNIST file")
    shape: tuple[int, ...] = struct.unpack_from(f">{dimensions}I", content, 4)
    if 0 in shape or (magic == _IMAGES_MAGIC and shape[1:] != (28, 28)):
        raise _damaged(path, f"holds an array of shape {list(shape)}, wanted images of 28x28 or their labels")
    return shape


def _idx_offset(shape: tuple[int, ...]) -> int:
    return 4 + 4 * len(shape)


def _check_size(path: Path, shape: tuple[int, ...], size: int) -> None:
    announced = _idx_offset(shape) + math.prod(shape)
    if size != announced:
        raise _damaged(path, f"has {size} bytes where its header announces {announced}")


def _damaged(path: Path, what: str) -> DataError:
    return DataError(f"{path} {what}: replace it with a fresh copy")


def _download(folder: Path) -> str | None:
    """Brings MNIST into `folder`; None when it is there, else why it could not be had.

    Files arrive in a temporary folder beside their place and move in whole, so that a broken download leaves
    nothing behind.
    """
    print(f"Looking for MNIST on the network, to keep in {folder}", file=sys.stderr)
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)  # torchvision takes no time-out of its own
    arrived = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        arrived = Path(tempfile.mkdtemp(prefix="download-", dir=folder))
        datasets = needed("torchvision.datasets", by="the download of MNIST")
        with contextlib.redirect_stdout(io.StringIO()):  # what went wrong is told once, below
            datasets.MNIST(arrived, download=True)
        raw = folder / "MNIST" / "raw"
        raw.mkdir(parents=True, exist_ok=True)
        for name in _TRAIN_FILES + _TEST_FILES:
            (arrived / "MNIST" / "raw" / name).replace(raw / name)
    except (OSError, RuntimeError, EOFError, MissingPackageError) as error:
        return _in_short(error)
    finally:
        socket.setdefaulttimeout(before)
        if arrived is not None:
            shutil.rmtree(arrived, ignore_errors=True)
    return None


def _in_short(error: Exception) -> str:
    """What `error` says, without the addresses that torchvision tried one after the other."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = [line for line in lines if not line.startswith(("Error downloading ", "Tried "))] or lines
    words = told[0].removeprefix("<urlopen error ").removesuffix(">") if told else type(error).__name__
    return textwrap.shorten(words, 120, placeholder=" ...")


def _read_digits(notice: str) -> LoadedData:
    """scikit-learn's digits (8x8, values 0-16) as images like MNIST's: a 20x20 digit centred in 28x28.

    Interpolation leaves strokes with softer edges than MNIST's; more contrast gives the pixels about MNIST's
    standard deviation (0.32 and 0.31, in [0, 1]; 0.28 without). Of each digit every sixth image is for
    testing.
    """
    what = f"{notice}, which" if notice else "the data set of handwritten digits"
    datasets = needed("sklearn.datasets", by=what)
    small, labels = datasets.load_digits(return_X_y=True)
    enlarge = _linear_interpolation(8, 20)
    digits = enlarge @ small.reshape(-1, 8, 8) @ enlarge.T / 16
    digits = np.clip((digits - 0.5) * _CONTRAST + 0.5, 0, 1)
    images = np.zeros((len(digits), 28, 28), np.uint8)
    images[:, 4:24, 4:24] = np.rint(digits * 255)
    labels = labels.astype(np.uint8)
    testing = np.zeros(len(labels), bool)
    for digit in range(10):
        testing[np.flatnonzero(labels == digit)[::6]] = True
    return LoadedData("digits", images[~testing], labels[~testing], images[testing], labels[testing], notice)


def _linear_interpolation(source: int, target: int) -> npt.NDArray[np.float64]:
    """The [target, source] matrix that stretches `source` samples to `target`, pixel centres aligned."""
    centres = np.clip((np.arange(target) + 0.5) * source / target - 0.5, 0, source - 1)
    return np.maximum(0.0, 1.0 - np.abs(centres[:, None] - np.arange(source)[None, :]))

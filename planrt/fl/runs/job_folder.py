"""The folder of the main job: whether all that it is to hold can be written, before hours go into training."""

from __future__ import annotations

import argparse
import contextlib
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from planrt.errors import OptionError
from planrt.fl.runs.run_folder import JOURNAL, LOCK, NOW, OPTIONS, Journal
from planrt.serde.disk import Disk


@contextlib.contextmanager
def job_folder(options: argparse.Namespace) -> Iterator[Path]:
    """Makes the run folder and sees that everything can be written, before hours go into training.

    A folder made here goes again if nothing was written to it.

    Raises:
        OptionError: some place cannot be written, or the model's suffix is unknown.
    """
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    folder = Path(options.run_dir or Path("runs", f"{stamp}-seed{options.seed}"))
    if options.save_model and Path(options.save_model).suffix not in (".safetensors", ".pt", ".pth"):
        raise OptionError(f"--save-model {options.save_model}: end the name in .safetensors, .pt or .pth")
    existed = folder.exists()
    try:
        _check_writable("--run-dir", folder)
        for option, path in (("--report", options.report), ("--save-model", options.save_model)):
            if path is not None and Path(path).is_dir():
                raise OptionError(f"{option} {path} is a folder: give the name of a file")
            if path is not None and _is_the_runs_own(Path(path), folder):
                raise OptionError(f"{option} {path} is a file of the run itself: give it another name")
            if path is not None:
                _check_writable(option, Path(path).parent)
        if not options.resume and Journal(folder).began is not None:
            raise OptionError(
                f"--run-dir {folder} has a run already: go on with it by --resume, or name another folder"
            )
        if not existed:
            with contextlib.suppress(OSError):
                folder.rmdir()  # who ends the command before it has begun finds none
        yield folder
    finally:
        with contextlib.suppress(OSError):  # there may be no folder, and no run in it
            if not (folder / JOURNAL).exists():
                (folder / LOCK).unlink()
        if not existed:
            with contextlib.suppress(OSError):  # not empty: the run left its files
                folder.rmdir()


def _is_the_runs_own(path: Path, folder: Path) -> bool:
    """Whether a file would take the place of one that the run needs to go on."""
    own = path.name in (JOURNAL, LOCK, NOW, OPTIONS, "accuracy.png")
    return (own or path.suffix == ".run") and path.absolute().parent.resolve() == folder.resolve()


def _check_writable(option: str, folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OptionError(
            f"{option}: cannot write to {folder} ({error.strerror}): choose another place"
        ) from error


def check_room(options: argparse.Namespace, folder: Path, nbytes: int) -> None:
    """Checks that there is room for the model, and for checkpoints, before hours go into training.

    Raises:
        OptionError: there is none.
    """
    places = {folder: 4 * nbytes}  # the model, two checkpoints, and one that is being written
    if options.save_model:
        places.setdefault(Path(options.save_model).parent, nbytes)
    for place, wanted in places.items():
        try:
            place.mkdir(parents=True, exist_ok=True)
            Disk().try_room(place, wanted)
        except OSError as error:
            raise OptionError(
                f"no room for the model and its checkpoints in {place} ({wanted:,} bytes: {error.strerror}): make "
                "room, or choose another place"
            ) from error

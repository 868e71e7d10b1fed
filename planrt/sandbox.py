"""`create_sandbox`: workers with data on them, for trying things out."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch

from planrt.errors import OptionError
from planrt.extras import needed
from planrt.fl.data import boston
from planrt.grid import PrivateGridNetwork
from planrt.torch_hook import TorchHook
from planrt.workers.base import BaseWorker
from planrt.workers.virtual import VirtualWorker

WORKERS = ("bob", "theo", "jason", "alice", "andy", "jon")
"""The ids of a sandbox's workers."""

_BUNDLED = {
    "Diabetes": ("load_diabetes", ("#diabetes",)),
    "Breast Cancer": ("load_breast_cancer", ("#breast_cancer", "#breast", "#cancer")),
    "Digits": ("load_digits", ("#digits",)),
    "Iris": ("load_iris", ("#iris",)),
    "Wine": ("load_wine", ("#wine",)),
    "Linnerud": ("load_linnerud", ("#linnerud",)),
}
"""Name of a data set that comes with scikit-learn -> its loader there, and its tags."""

_BOSTON_TAGS = ("#boston", "#housing", "#boston_housing")


def create_sandbox(
    gbs: dict[str, Any],
    verbose: bool = True,
    download_data: bool = True,
    *,
    make_worker: Callable[[str], BaseWorker] | None = None,
) -> None:
    """Fills a program's globals with a hook, six workers and a grid of them: ``create_sandbox(globals())``.

    The data sets that come with scikit-learn, and Boston Housing's training part where ``PLANRT_DATA`` holds
    it, are split over the workers in their order, and tagged: ``#data`` or ``#target``, and the data set's
    name (``#boston``, ``#iris``, ...). Data are float32 [N, columns], targets float32, or int64 for classes.

    Afterwards `gbs` has ``hook``, ``bob``, ``theo``, ``jason``, ``alice``, ``andy``, ``jon``, ``workers``
    (the list of them), ``grid``, ``torch`` and ``sy``.

    Args:
        gbs: the globals to fill; names that are there are replaced.
        verbose: print what happens.
        download_data: put data on the workers. All of it is on this machine; nothing is downloaded.
        make_worker: makes the worker of an id, where they are not to be virtual ones.

    Raises:
        OptionError: `gbs` is no dict.
        MissingPackageError: there is to be data, and scikit-learn is not installed.
        DataError: ``PLANRT_DATA`` names no folder.
    """
    if not isinstance(gbs, dict):
        raise OptionError(
            f"create_sandbox fills a dict: write create_sandbox(globals()), not {type(gbs).__name__}"
        )

    def say(line: str) -> None:
        if verbose:
            print(line)

    bundled = None
    if download_data:  # what is missing is told before anything is made
        bundled = needed("sklearn.datasets", by="a sandbox with data")
        boston.find()
    say("Setting up the sandbox")
    hook = TorchHook(torch)
    say("  torch is hooked: tensors and modules can be sent")
    workers = [make_worker(id) if make_worker else VirtualWorker(hook, id=id) for id in WORKERS]
    say(f"  workers: {', '.join(WORKERS)}")
    if download_data:
        for name, data, targets in _datasets(bundled, say):
            _distribute(data, workers)
            _distribute(targets, workers)
            say(f"  {name}: {len(data):,} items of {data.shape[1]} columns, split over the workers")
    gbs.update({worker.id: worker for worker in workers})
    gbs.update(
        hook=hook, workers=workers, grid=PrivateGridNetwork(*workers), torch=torch, sy=sys.modules["planrt"]
    )
    say("Done: hook, the workers by their names, workers, grid, torch and sy are in your globals")


def _datasets(bundled: Any, say: Callable[[str], None]) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Name, data and targets of each data set, tagged and described. `bundled` is ``sklearn.datasets``."""
    if boston.find() is not None:
        loaded = boston.load()
        yield (
            "Boston Housing",
            _labelled(loaded.train_data, *_BOSTON_TAGS, "#data", text=boston.DESCRIPTION),
            _labelled(loaded.train_targets, *_BOSTON_TAGS, "#target", text=boston.DESCRIPTION),
        )
    else:
        say(f"  Boston Housing: left out, set PLANRT_DATA to a folder that holds {boston.FILE}")

    for name, (loader, tags) in _BUNDLED.items():
        bunch = getattr(bundled, loader)()
        target = torch.from_numpy(bunch.target)
        yield (
            name,
            _labelled(torch.from_numpy(bunch.data).float(), *tags, "#data", text=bunch.DESCR),
            _labelled(
                target.float() if target.is_floating_point() else target, *tags, "#target", text=bunch.DESCR
            ),
        )


def _labelled(tensor: Any, *tags: str, text: str) -> torch.Tensor:
    labelled: torch.Tensor = tensor.tag(*tags).describe(text)
    return labelled


def _distribute(whole: Any, workers: list[BaseWorker]) -> None:
    """Sends each worker its part of `whole`, with the whole's tags and description, unless it has that
    already."""
    for part, worker in zip(whole.tensor_split(len(workers)), workers, strict=True):
        if worker.search(sorted(whole.tags)):
            continue
        part.tag(*sorted(whole.tags)).describe(whole.description).send(worker, garbage_collection=False)

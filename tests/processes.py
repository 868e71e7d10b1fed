"""Helpers for tests of real processes: a tiny MNIST, and finding out who is still alive."""

from __future__ import annotations

import struct
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil

MNIST_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)

PATIENCE = 60.0
"""Seconds after which a test gives up waiting: a bound for hangs, not a claim about speed."""


def idx(array: np.ndarray) -> bytes:
    """`array` in MNIST's file format."""
    header = struct.pack(f">{1 + array.ndim}I", 0x0800 | array.ndim, *array.shape)
    return header + array.astype(np.uint8).tobytes()


def write_small_mnist(folder: Path) -> Path:
    """40 training and 20 test images of noise in MNIST's files, labels 0-9 in turn."""
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    random = np.random.default_rng(0)
    for prefix, count in (("train", 40), ("t10k", 20)):
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(idx(random.integers(0, 256, (count, 28, 28))))
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(idx(np.arange(count) % 10))
    return folder


def alive(pid: int) -> bool:
    """Whether the process runs; one that ended and was not waited for yet does not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def marked(token: str) -> list[int]:
    """Processes whose environment holds ``PLANRT_TEST_TOKEN=token``: those a test started, and their children."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("PLANRT_TEST_TOKEN") == token and alive(process.pid):
                found.append(process.pid)
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            continue
    return found


def eventually(condition: Callable[[], bool], patience: float = PATIENCE) -> bool:
    """Whether `condition` becomes true before the test's patience (seconds) ends."""
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.05)
    return False

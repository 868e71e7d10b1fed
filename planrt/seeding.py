"""Every random choice of a run derives from (run seed, round, worker): the same run has the same bits."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from planrt.types import as_whole


def derive_seed(seed: int, *parts: int | str) -> int:
    """Derives a seed in [0, 2**63) from `seed` and `parts`: SHA-256 of their text, so that no two streams are
    related.

    Raises:
        OptionError: `seed` is no whole number.
    """
    seed = as_whole(seed, "seed")
    text = "\x1f".join(str(part) for part in (seed, *parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


@contextmanager
def seeded(seed: int, device: torch.device | str = "cpu") -> Iterator[None]:
    """Seeds torch's generators (the CPU's and `device`'s) for the block and puts them back after it.

    The generators belong to the process: whoever else draws from them meanwhile changes what is drawn.
    Workers compute one at a time per process (`planrt.workers.serving.compute.ComputeThread`) for this reason.
    """
    device = torch.device(device)
    devices = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"):
        # Not torch.manual_seed: that also queues a formatted stack trace for each kind of device not in use.
        torch.default_generator.manual_seed(seed)
        if devices:
            torch.get_device_module(device).manual_seed(seed)
        yield

"""Where a worker computes, and the same bits twice there: torch's deterministic kernels, while it computes.

Some CUDA kernels add numbers in whatever order their threads finish. A worker on anything but a CPU therefore asks
torch for the deterministic ones, unless its owner trades repeatable bits for speed (``--fast-kernels``). The settings
belong to the process, so they are put back after each piece of work.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import torch

from planrt.errors import OptionError

_WORKSPACE: Final = "CUBLAS_WORKSPACE_CONFIG"
_FLAG_HINT: Final = (
    "; the worker computes with deterministic kernels: its owner can start it with --fast-kernels "
    "(deterministic=False), and results then need not repeat bit for bit"
)
_SIGNS: Final = ("use_deterministic_algorithms", _WORKSPACE)


def prepared(device: str | torch.device, deterministic: bool | None) -> tuple[torch.device, bool]:
    """Returns a worker's device, and whether it computes deterministically there; see `wanted`.

    Raises:
        OptionError: there is no such device here, or it holds no values (meta).
    """
    try:
        found = torch.device(device)
        if found.type == "meta":
            raise OptionError("a worker on device 'meta' would hold no values: give it 'cpu' or 'cuda'")
        chosen = wanted(found, deterministic)  # before CUDA starts
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, TypeError) as error:  # torch without CUDA raises the second
        reason = str(error).partition("\n")[0]
        raise OptionError(f"device {str(device)!r} cannot be used here: {reason}") from error
    return found, chosen


def wanted(device: torch.device, deterministic: bool | None) -> bool:
    """Returns whether a worker on `device` computes deterministically: as it was told, or on everything but a CPU.

    Also prepares the process for it, which must happen before it first uses CUDA and before it has threads.
    """
    chosen = device.type != "cpu" if deterministic is None else deterministic
    if chosen and device.type != "cpu":
        prepare_process()
    return chosen


def prepare_process() -> None:
    """Sets what cuBLAS reads when CUDA starts; whoever has set it otherwise keeps that.

    torch's switch for deterministic kernels imports its compiler at first use (seconds). Here it does so before there
    are threads: two of them that import parts of it at once can each wait for the other, and Python ends the import.
    """
    os.environ.setdefault(_WORKSPACE, ":4096:8")
    import torch._inductor.config  # noqa: F401


@contextmanager
def deterministic_kernels(on: bool) -> Iterator[None]:
    """torch's deterministic kernels for the block, if `on`; then the settings are as they were."""
    if not on:
        yield
        return
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    benchmark = torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(True)
    if benchmark:  # by default it is off, and a process can have frozen the flag that way
        torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        if benchmark:
            torch.backends.cudnn.benchmark = True


def answers(device: torch.device) -> bool:
    """Returns whether `device` still computes. A kernel that failed on a GPU ends it for this process."""
    try:
        return torch.zeros(1, device=device).item() == 0
    except RuntimeError:
        return False


def explained(text: str) -> str:
    """`text` of an error, with what to do where an op has no deterministic kernel."""
    return text + _FLAG_HINT if any(sign in text for sign in _SIGNS) else text

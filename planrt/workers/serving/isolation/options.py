"""What an owner says about isolation, checked, and how it begins."""

from __future__ import annotations

import math
import os
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from planrt.errors import OptionError
from planrt.logs import get_logger

if TYPE_CHECKING:
    from planrt.plans.policy.approvals import Approvals
    from planrt.serde.frames import Limits
    from planrt.workers.machine.state import WorkerState
    from planrt.workers.serving.audit_file import AuditFile
    from planrt.workers.serving.dialling import Dialling
    from planrt.workers.serving.isolation.supervisor import Isolation
    from planrt.workers.serving.joint_folder import JointFolder

log = get_logger("planrt.worker")

KERNEL_TIMEOUT: Final = 600.0
"""Seconds that one op may take, unless the owner says otherwise."""
WAITS_FOR_PARENT: Final = "end-with-parent"
"""Name of the thread that may be there when a process is copied: it waits for the end of a file, and holds nothing."""
LEAST_MEMORY: Final = 64 << 20
"""Bytes without which a process does not begin."""


def can_isolate() -> bool:
    """Returns whether this system has what isolation needs at least."""
    if sys.platform != "linux" or not hasattr(os, "pidfd_open"):
        return False
    try:
        os.close(os.pidfd_open(os.getpid()))
    except OSError:  # a kernel before 5.3, or one that keeps it from this process
        return False
    return True


@dataclass(frozen=True)
class Isolating:
    """The owner's options: seconds for one op (inf: any), bytes for one process (None: any), files to be read."""

    kernel_timeout: float
    memory: int | None
    readable: tuple[Path, ...]

    @classmethod
    def checked(
        cls, isolation: object, kernel_timeout: Any, memory: Any, readable: Sequence[str | Path]
    ) -> Isolating | None:
        """Returns the options; None where there is to be no isolation.

        Raises:
            OptionError: one of them is none, or this system has no isolation.
        """
        if not isinstance(isolation, bool):
            raise OptionError(f"isolation is True or False, not {isolation!r}")
        if isinstance(readable, str | Path):
            raise OptionError(f"readable is a list of files and folders, such as [{str(readable)!r}]")
        given = kernel_timeout != KERNEL_TIMEOUT or memory is not None or bool(readable)
        if not isolation:
            if given:
                raise OptionError(
                    "kernel_timeout, process_memory and readable are for workers with isolation=True"
                )
            return None
        if (
            isinstance(kernel_timeout, bool)
            or not isinstance(kernel_timeout, int | float)
            or math.isnan(kernel_timeout)
            or kernel_timeout <= 0
        ):
            raise OptionError(f"kernel_timeout is a number of seconds above 0, not {kernel_timeout!r}")
        if memory is not None and (
            isinstance(memory, bool) or not isinstance(memory, int) or memory < LEAST_MEMORY
        ):
            raise OptionError(
                f"process_memory is a number of bytes, at least {LEAST_MEMORY:,} (64 MiB), not {memory!r}"
            )
        paths = tuple(Path(one).resolve() for one in readable)
        for path in paths:
            if not path.exists():
                raise OptionError(f"{path} is to be readable, and is not there")
        if not can_isolate():
            raise OptionError(
                "isolation is for Linux: this system has no way to confine a process as planrt does"
            )
        return cls(float(kernel_timeout), memory, paths)

    def check_process(self) -> None:
        """Raises OptionError unless this process can be copied: only the thread that makes a copy is in it."""
        threads = [one.name for one in threading.enumerate() if one is not threading.main_thread()]
        others = [name for name in threads if name != WAITS_FOR_PARENT]
        if others or threading.current_thread() is not threading.main_thread():
            raise OptionError(
                "isolation copies this process, which works from its only thread; these run as well: "
                f"{', '.join(others)}. Start the worker before anything else of planrt, or with planrt serve, or write "
                "--isolation off"
            )

    def begin(
        self,
        state: WorkerState,
        limits: Limits,
        dialling: Dialling,
        threads: int | None,
        audit: AuditFile | None,
        approvals: Approvals | None,
        joint_runs: JointFolder | None = None,
        *,
        counted: bool = False,
    ) -> Isolation:
        """Makes the process that all others are copies of, after `check_process`. `counted`: somebody watches what
        they count.

        Raises:
            IsolationError: no process can be made, or confined. OptionError: a data set cannot be read in one.
        """
        from planrt.workers.serving.isolation import child, confining, trial, watching, zygote
        from planrt.workers.serving.isolation.supervisor import Isolation

        trial.try_out(state, self.memory, self.readable)
        for what in confining.missing():
            log.warning("isolation_lacks", what=what)
        work = child.Work(
            state,
            limits,
            dialling,
            threads,
            audit is not None,
            approvals is not None,
            self.memory,
            self.readable,
            counted,
            joint_runs is not None,
        )
        page = watching.new_page()
        return Isolation(
            state.id,
            zygote.start(work, page),
            page,
            kernel_timeout=self.kernel_timeout,
            limits=limits,
            dialling=dialling,
            audit=audit,
            approvals=approvals,
            access=state.access,
            knows=state.knows,
            tickets=state,
            joint_runs=joint_runs,
            quota=state.accounts.quota,
            failures=state.failures,
            max_pending=state.max_pending,
        )

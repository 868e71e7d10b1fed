"""The kinds of objects that a worker holds, one module each; `KINDS` lists them. No I/O.

Another kind is one class, derived from `planrt.workers.machine.kinds.base.ObjectKind`, and one entry here. What
clients make of it is up to the messages and to the client's own side.
"""

from __future__ import annotations

from typing import Any, Final

from planrt.workers.machine.kinds.base import NoValue, ObjectKind
from planrt.workers.machine.kinds.plan import PlanKind
from planrt.workers.machine.kinds.pointer import PointerKind
from planrt.workers.machine.kinds.protocol import ProtocolKind
from planrt.workers.machine.kinds.share import ShareKind
from planrt.workers.machine.kinds.tensor import TensorKind

KINDS: Final[tuple[ObjectKind[Any], ...]] = (
    TensorKind(), PlanKind(), ProtocolKind(), PointerKind(), ShareKind(), NoValue()
)  # fmt: skip
"""Every kind that a worker knows when it starts."""

"""Modules that moved into rooms, found under their old paths too: imports of planrt 0.1 go on working.

Each old path is a module that looks names up in the new one when they are asked for. Nothing is imported
before.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import Any, Final

from planrt.lazy import AliasFinder

_ROOMS: Final = (
    ("planrt.fl", "planrt", "command=command_line"),
    ("planrt.fl", "planrt.fl.data", "boston federated splitting"),
    ("planrt.fl", "planrt.fl.runs", "children discovery networks"),
    ("planrt.plans", "planrt.plans.analysis", "composed effects findings flow report rows tracker whole"),
    ("planrt.plans", "planrt.plans.forms", "aten export files holding torchscript"),
    ("planrt.plans", "planrt.plans.ir", """
        chain counts graph guards left_out lines ops parsing record signature source text
    """),
    ("planrt.plans", "planrt.plans.policy", "approvals verify"),
    ("planrt.plans", "planrt.plans.recording", """
        building chance foreach inlining kept known lifting notices optimizers probing recorder runs seen
        sizes torch_code tracer
    """),
    ("planrt.plans", "planrt.plans.running", "inference interpreter modes"),
    ("planrt.workers", "planrt", "allocator loop"),
    ("planrt.workers", "planrt.workers", "clients=base server=websocket_server"),
    ("planrt.workers", "planrt.workers.client", """
        connection contents moving object_ids objects registry remote_plans=plans session
    """),
    ("planrt.workers", "planrt.workers.machine", """
        admission backward determinism=devices eager events failures gate labels objects_kept=objects peer_ops=peers
        private protocol_ops=protocols sessions state store
    """),
    ("planrt.workers", "planrt.workers.machine.rounds", "training_ops=training"),
    ("planrt.workers.machine", "planrt.workers.machine.rounds", "batches secure_sums training"),
    ("planrt.workers", "planrt.workers.machine.kinds", "plan_objects=plan protocol_objects=protocol"),
    ("planrt.workers.machine", "planrt.workers.machine.kinds", "plan_objects=plan protocol_objects=protocol"),
    ("planrt.workers", "planrt.workers.pointers", """
        dispatch multipointer=multi plan_calls plan_pointers=plan remote_autograd=autograd remote_ops=ops
    """),
    ("planrt.workers", "planrt.workers.serving", "host links"),
    ("planrt.workers", "planrt.workers.transport", "callers pipes websocket websocket_frames websocket_stream"),
    ("planrt.workers", "planrt.workers.wire", "chain_runs messages posted sendable"),
)  # fmt: skip
"""(old package, new package, modules); "old=new" where the module has another name there."""

_RENAMED: Final = (
    ("planrt.fl", "recorded=recording_cache"),
    ("planrt.plans.analysis", "composed=op_by_op whole=run_whole"),
    ("planrt.plans.forms", "holding=state_tree"),
    ("planrt.plans.ir", "counts=result_limits lines=line_reader"),
    ("planrt.plans.recording", """
        chance=python_rng kept=python_state known=known_values notices=trace_warnings probing=size_probing
        runs=traced_run seen=torch_calls sizes=traced_sizes
    """),
    ("planrt.protocols", "runs=driver"),
    ("planrt.serde", "whole=objects"),
)  # fmt: skip
"""(package, modules as "old=new"): modules that later got another name where they are."""


def _table() -> dict[str, tuple[str, ...]]:
    table: dict[str, tuple[str, ...]] = {}
    for package, words in _RENAMED:
        for word in words.split():
            before, _, after = word.partition("=")
            table[f"{package}.{before}"] = (f"{package}.{after}",)
    for old, new, words in _ROOMS:
        for word in words.split():
            before, _, after = word.partition("=")
            home = f"{new}.{after or before}"
            table[f"{old}.{before}"] = table.get(home, (home,))
    table["planrt.plans.files"] += ("planrt.plans.saving",)
    table["planrt.workers.objects"] += ("planrt.workers.pointers.fetching", "planrt.workers.wire.objects")
    table["planrt.workers.state"] += ("planrt.workers.wire.messages",)
    table["planrt.workers.store"] += (
        "planrt.workers.machine.kinds.base", "planrt.workers.machine.kinds.pointer",
        "planrt.workers.machine.kinds.tensor",
    )  # fmt: skip
    table["planrt.workers.objects_kept"] += ("planrt.workers.machine.kinds.tensor",)
    table["planrt.workers.private"] += ("planrt.workers.machine.sessions",)
    table["planrt.workers.plan_objects"] += ("planrt.workers.wire.plan_call",)
    return table


MOVED: Final = _table()
"""Old path -> the modules that have its names, looked through in this order."""


class _Moved(ModuleType):
    """A module under its old path."""

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("__"):  # Python asks every module for those
            for home in MOVED[self.__name__]:
                module = import_module(home)
                if hasattr(module, name):
                    return getattr(module, name)
        raise AttributeError(
            f"module {self.__name__!r}, now {MOVED[self.__name__][0]}, has no attribute {name!r}"
        )

    def __dir__(self) -> list[str]:
        return dir(import_module(MOVED[self.__name__][0]))


class _OldPaths(AliasFinder):
    """Finds what is not where it was."""

    def origin_of(self, fullname: str) -> str | None:
        """Returns where the module is now; None for one that did not move."""
        return MOVED[fullname][0] if fullname in MOVED else None

    def make(self, fullname: str) -> ModuleType:
        """Returns a module that looks names up where they are now."""
        return _Moved(fullname, f"Moved to {MOVED[fullname][0]}.")


def install() -> None:
    """Makes old paths found from here on; calling it again changes nothing."""
    _OldPaths().install()

"""planrt: PyTorch where the data lives.

Functions and modules are traced into plans; plans go to workers that hold private data, and only what was
asked for comes back. See README.md for a first program and ARCHITECTURE.md for the rooms.
"""

from __future__ import annotations

# ruff: noqa: E402 - Ctrl-C comes before the other imports
from planrt import stopping

stopping.in_a_command()

from importlib import import_module
from typing import TYPE_CHECKING, Any

from planrt import moved
from planrt.tracebacks import install
from planrt.version import VERSION

if TYPE_CHECKING:
    from planrt import errors, exceptions, serde, version
    from planrt.deadlines import waiting
    from planrt.fl import FederatedDataLoader, FederatedDataset, Optims, TrainConfig, federated_avg
    from planrt.fl.local import local_workers
    from planrt.grid import PrivateGridNetwork
    from planrt.placing import fix_precision, float_precision, get, move, send, share
    from planrt.plans import Plan, func2plan, load_plan, method2plan
    from planrt.protocols import PointerProtocol, Protocol, Step
    from planrt.sandbox import create_sandbox
    from planrt.torch_hook import TorchHook
    from planrt.workers import BaseDataset, VirtualWorker, WebsocketClientWorker, WebsocketServerWorker
    from planrt.workers.pointers.multi import MultiPointerTensor
    from planrt.workers.pointers.tensor import ID_PROVIDER, PointerTensor, combine_pointers
    from planrt.workers.serving.metrics_end import MetricsServer

    hook: TorchHook
    local_worker: VirtualWorker

_HOMES = {
    "Plan": "planrt.plans",
    "func2plan": "planrt.plans",
    "load_plan": "planrt.plans",
    "method2plan": "planrt.plans",
    "PointerProtocol": "planrt.protocols",
    "Protocol": "planrt.protocols",
    "Step": "planrt.protocols",
    "BaseDataset": "planrt.workers",
    "VirtualWorker": "planrt.workers",
    "WebsocketClientWorker": "planrt.workers",
    "WebsocketServerWorker": "planrt.workers",
    "MetricsServer": "planrt.workers.serving.metrics_end",
    "TorchHook": "planrt.torch_hook",
    "PointerTensor": "planrt.workers.pointers.tensor",
    "combine_pointers": "planrt.workers.pointers.tensor",
    "ID_PROVIDER": "planrt.workers.pointers.tensor",
    "MultiPointerTensor": "planrt.workers.pointers.multi",
    "waiting": "planrt.deadlines",
    "FederatedDataLoader": "planrt.fl",
    "FederatedDataset": "planrt.fl",
    "Optims": "planrt.fl",
    "PrivateGridNetwork": "planrt.grid",
    "create_sandbox": "planrt.sandbox",
    "local_workers": "planrt.fl.local",
    "send": "planrt.placing",
    "get": "planrt.placing",
    "move": "planrt.placing",
    "fix_precision": "planrt.placing",
    "float_precision": "planrt.placing",
    "share": "planrt.placing",
    "TrainConfig": "planrt.fl",
    "federated_avg": "planrt.fl",
}
"""Public name -> the module that defines it, imported at first use (PEP 562): commands start before torch
loads."""

_MODULES = {"errors": "errors", "exceptions": "exceptions", "serde": "plans", "version": "version"}
"""Public module -> the module to import for it: what is serialised, plans say."""

__version__ = VERSION

install()
moved.install()

__all__ = [
    "__version__",
    "errors",
    "exceptions",
    "serde",
    "version",
    "Plan",
    "func2plan",
    "load_plan",
    "method2plan",
    "Protocol",
    "Step",
    "PointerProtocol",
    "BaseDataset",
    "VirtualWorker",
    "WebsocketClientWorker",
    "WebsocketServerWorker",
    "MetricsServer",
    "TorchHook",
    "PointerTensor",
    "combine_pointers",
    "ID_PROVIDER",
    "MultiPointerTensor",
    "waiting",
    "hook",
    "local_worker",
    "FederatedDataset",
    "FederatedDataLoader",
    "Optims",
    "PrivateGridNetwork",
    "create_sandbox",
    "local_workers",
    "send",
    "get",
    "move",
    "share",
    "TrainConfig",
    "federated_avg",
    "fix_precision",
    "float_precision",
]


def __getattr__(name: str) -> Any:
    if name in ("hook", "local_worker"):
        made = import_module("planrt.torch_hook").current_hook()
        return made if name == "hook" else made.local_worker
    if name in _MODULES:
        import_module(f"planrt.{_MODULES[name]}")
        return import_module(f"planrt.{name}")
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'planrt' has no attribute {name!r}")
    value = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__

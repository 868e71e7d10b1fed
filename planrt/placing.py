"""`send`, `get`, `move`, `fix_precision`, `float_precision` and `share` as functions, with types: what type checkers
cannot see of torch's classes.

``planrt.send(x, bob)`` is ``x.send(bob)``, and so on. The methods are added to torch's classes while a
program runs (`planrt.torch_hook`), where mypy and editors do not find them; these functions say what comes
back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar, overload

import torch
from torch import nn

from planrt.deadlines import bounded
from planrt.errors import LocalError
from planrt.plans.plan import Plan
from planrt.protocols.pointer import PointerProtocol
from planrt.protocols.protocol import Protocol
from planrt.sharing.tensors.fixed import FixedPrecisionTensor
from planrt.sharing.tensors.shared import SharedTensor
from planrt.torch_hook import current_hook
from planrt.workers.base import BaseWorker
from planrt.workers.pointers.multi import MultiPointerTensor
from planrt.workers.pointers.plan import MultiPointerPlan, PointerPlan
from planrt.workers.pointers.tensor import PointerTensor
from planrt.workers.shares.session import DEFAULT_TIMEOUT
from planrt.workers.shares.surface import BASE, DIGITS, FixedPrecisionPointer, SharedPointer

Module = TypeVar("Module", bound=nn.Module)
Movable = TypeVar("Movable", bound=PointerPlan | PointerProtocol | nn.Module)


@overload
def send(  # type: ignore[overload-overlap]  # of a plan, which is a module too, a pointer comes back
    thing: Plan[..., Any],
    worker: BaseWorker,
    *,
    private: bool = False,
    allowed_users: Sequence[str] | None = None,
    purpose: str = "",
    timeout: float | None = None,
) -> PointerPlan: ...


@overload
def send(
    thing: Protocol,
    worker: BaseWorker,
    *,
    private: bool = False,
    allowed_users: Sequence[str] | None = None,
    timeout: float | None = None,
) -> PointerProtocol: ...


@overload
def send(thing: Module, worker: BaseWorker, *, timeout: float | None = None) -> Module: ...


@overload
def send(
    thing: torch.Tensor,
    worker: BaseWorker,
    *,
    private: bool = False,
    allowed_users: Sequence[str] | None = None,
    garbage_collection: bool = True,
    timeout: float | None = None,
) -> PointerTensor: ...


@overload
def send(
    thing: torch.Tensor,
    worker: BaseWorker,
    second: BaseWorker,
    /,
    *workers: BaseWorker,
    private: bool = False,
    allowed_users: Sequence[str] | None = None,
    garbage_collection: bool = True,
    timeout: float | None = None,
) -> MultiPointerTensor: ...


@bounded
def send(thing: Any, *workers: Any, timeout: float | None = None, **options: Any) -> Any:
    """Sends a tensor, a module, a plan or a protocol to a worker: ``planrt.send(x, bob)`` is ``x.send(bob)``.

    Options are those of the method: of tensors and plans `private` and `allowed_users`, of plans `purpose`.

    Returns:
        A pointer; the module itself, whose tensors are pointers then; of a tensor that goes to several workers, one
        pointer that stands for all.

    Raises:
        LocalError: nothing that can be sent, or no worker. Otherwise as the method.
    """
    return _method(thing, "send", "a tensor, a module, a plan or a protocol")(*workers, **options)


@overload
def get(thing: PointerPlan, *, timeout: float | None = None) -> Plan[..., Any]: ...


@overload
def get(thing: MultiPointerPlan, *, timeout: float | None = None) -> list[Plan[..., Any]]: ...


@overload
def get(thing: PointerProtocol, *, timeout: float | None = None) -> Protocol: ...


@overload
def get(thing: SharedPointer, *, timeout: float | None = None) -> SharedTensor: ...


@overload
def get(thing: FixedPrecisionPointer, *, timeout: float | None = None) -> FixedPrecisionTensor: ...


@overload
def get(thing: Module, *, timeout: float | None = None) -> Module: ...


@overload
def get(thing: MultiPointerTensor, *, timeout: float | None = None) -> list[torch.Tensor]: ...  # type: ignore[overload-overlap]  # a tensor, too


@overload
def get(thing: torch.Tensor, *, timeout: float | None = None) -> torch.Tensor: ...


@bounded
def get(thing: Any, *, timeout: float | None = None) -> Any:
    """Brings back what is on a worker, or opens what is in shares: ``planrt.get(x)`` is ``x.get()``, for pointers,
    tensors in shares, and modules that were sent or shared.

    Results of torch's functions on pointers are pointers too, though type checkers call them tensors.

    Returns:
        The tensor, the plan or the protocol; the module itself, which is here then.

    Raises:
        LocalError: nothing that comes from a worker. Otherwise as the method.
    """
    return _method(thing, "get", "a pointer, or a module that was sent")()


@overload
def move(thing: Movable, worker: BaseWorker, *, timeout: float | None = None) -> Movable: ...


@overload
def move(thing: torch.Tensor, worker: BaseWorker, *, timeout: float | None = None) -> PointerTensor: ...


@bounded
def move(thing: Any, worker: BaseWorker, *, timeout: float | None = None) -> Any:
    """Moves what is on a worker to another one, in place: ``planrt.move(x, alice)`` is ``x.move(alice)``.

    Returns:
        The same pointer or module.

    Raises:
        LocalError: nothing that is on a worker. Otherwise as the method.
    """
    return _method(thing, "move", "a pointer, or a module that was sent")(worker)


@overload
def fix_precision(  # type: ignore[overload-overlap]  # a pointer is a tensor, too
    thing: PointerTensor, *, precision_fractional: int = DIGITS, base: int = BASE
) -> FixedPrecisionPointer: ...


@overload
def fix_precision(
    thing: torch.Tensor, *, precision_fractional: int = DIGITS, base: int = BASE
) -> FixedPrecisionTensor: ...


@overload
def fix_precision(thing: Module, *, precision_fractional: int = DIGITS, base: int = BASE) -> Module: ...


def fix_precision(thing: Any, *, precision_fractional: int = DIGITS, base: int = BASE) -> Any:
    """Rounds values to `precision_fractional` digits in `base`: ``planrt.fix_precision(x)`` is ``x.fix_precision()``.

    Returns:
        The rounded tensor; of a pointer what its worker can `share`; the module itself, whose tensors are rounded then.

    Raises:
        LocalError: nothing that has values. Otherwise as the method.
    """
    method = _method(thing, "fix_precision", "a tensor, a pointer or a module")
    return method(precision_fractional=precision_fractional, base=base)


@overload
def float_precision(thing: Module) -> Module: ...


@overload
def float_precision(thing: torch.Tensor) -> torch.Tensor: ...


def float_precision(thing: Any) -> Any:
    """Makes ordinary floating-point tensors of rounded ones: ``planrt.float_precision(x)`` is ``x.float_precision()``.

    Returns:
        The tensor; the module itself, whose tensors are ordinary ones then.

    Raises:
        LocalError: nothing that has values. Otherwise as the method.
    """
    return _method(thing, "float_precision", "a tensor or a module")()


@overload
def share(  # type: ignore[overload-overlap]  # a pointer is a tensor, too
    thing: PointerTensor | FixedPrecisionPointer,
    *workers: BaseWorker,
    crypto_provider: BaseWorker | None = None,
    requires_grad: bool = False,
    timeout: float = DEFAULT_TIMEOUT,
) -> SharedPointer: ...


@overload
def share(
    thing: torch.Tensor,
    *workers: BaseWorker,
    crypto_provider: BaseWorker | None = None,
    requires_grad: bool = False,
    timeout: float = DEFAULT_TIMEOUT,
) -> SharedTensor: ...


@overload
def share(
    thing: Module,
    *workers: BaseWorker,
    crypto_provider: BaseWorker | None = None,
    requires_grad: bool = False,
    timeout: float = DEFAULT_TIMEOUT,
) -> Module: ...


def share(
    thing: Any,
    *workers: BaseWorker,
    crypto_provider: BaseWorker | None = None,
    requires_grad: bool = False,
    timeout: float = DEFAULT_TIMEOUT,
) -> Any:
    """Shares values among two workers or more: ``planrt.share(x, bob, alice, crypto_provider=james)`` is
    ``x.share(bob, alice, crypto_provider=james)``.

    `crypto_provider` is the worker that hands out correlated randomness, the one of this process if not given. A party
    waits `timeout` seconds for another one.

    Returns:
        The tensor in shares; of a pointer what stands for it (`get` returns it, still in shares); the module itself,
        whose tensors are in shares then.

    Raises:
        LocalError: nothing that can be shared. Otherwise as the method.
    """
    method = _method(thing, "share", "a tensor, a pointer or a module")
    return method(*workers, crypto_provider=crypto_provider, requires_grad=requires_grad, timeout=timeout)


def _method(thing: Any, name: str, wanted: str) -> Any:
    current_hook()
    method = getattr(thing, name, None) if not isinstance(thing, type) else None
    if method is None or isinstance(thing, BaseWorker):
        said = f"the class {thing.__name__}" if isinstance(thing, type) else type(thing).__name__
        raise LocalError(f"{name} takes {wanted}, not {said}: write planrt.{name}({_EXAMPLES[name]})")
    return method


_EXAMPLES = {
    "send": "x, worker",
    "get": "pointer",
    "move": "pointer, worker",
    "fix_precision": "x",
    "float_precision": "x",
    "share": "x, worker, another",
}

"""`TorchHook`: gives `torch.Tensor`, `torch.nn.Module` and `torch.utils.data.Dataset` their remote methods,
and this process a worker.

These methods are all that planrt adds to torch; none of its functions is replaced. Names that begin with
``native_``, as PySyft 0.2 called torch's own functions, are the tensors' methods, or say what to write.
"""

from __future__ import annotations

import operator
import threading
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import nn
from torch.optim import optimizer as torch_optimizer

from planrt.deadlines import bounded
from planrt.errors import LocalError, OptionError, PointerError, UnknownNameError
from planrt.fl.data import splitting
from planrt.plans.ir import ops
from planrt.protocols import pointer as _pointer  # noqa: F401 - searches know protocols then
from planrt.types import as_text, as_whole, plain
from planrt.workers import modules
from planrt.workers.base import BaseWorker
from planrt.workers.client.objects import allowed_users
from planrt.workers.optimizers import before_step
from planrt.workers.pointers.handle import Handle
from planrt.workers.pointers.multi import MultiPointerTensor
from planrt.workers.pointers.ops import refuse_hooks
from planrt.workers.pointers.tensor import (
    PointerTensor,
    become_pointer,
    give_id,
    make_pointer,
    pointer_id,
    refuse_options,
)
from planrt.workers.shares import shared_modules, surface
from planrt.workers.shares.optimizers import before_shared_step
from planrt.workers.virtual import VirtualWorker
from planrt.workers.wire.objects import contiguous

_lock = threading.Lock()
_hook: TorchHook | None = None


def current_hook() -> TorchHook:
    """Returns the hook of this process, made at the first call."""
    return TorchHook(torch)


class TorchHook:
    """``hook = planrt.TorchHook(torch)``. Making it again returns the same one: a process has one hook.

    Args:
        module: `torch`.
        local_worker: the worker that stands for this process, in place of the one called ``me``.
        is_client: kept as `is_client_worker`.
        verbose: taken, and without effect.
        seed: refused: ids must differ, and torch's own random numbers are seeded with `torch.manual_seed`.

    Attributes:
        local_worker: the worker ``me``, for this process; it can hold objects too.
        is_client_worker: as the tutorials set it; planrt frees objects by their pointers either way.
        torch: the module.

    Raises:
        LocalError: given anything but `torch`, or a local worker that is no virtual one.
    """

    local_worker: VirtualWorker
    is_client_worker: bool
    torch = torch

    def __new__(cls, module: Any = torch, *args: Any, **options: Any) -> TorchHook:
        """The one hook of this process."""
        global _hook
        if module is not torch:
            raise LocalError(f"TorchHook hooks torch: write TorchHook(torch), not TorchHook({module!r})")
        with _lock:
            if _hook is None:
                made = super().__new__(cls)
                made.local_worker = VirtualWorker("me")
                made.is_client_worker = True
                _add_methods()
                torch_optimizer.register_optimizer_step_pre_hook(before_step)
                torch_optimizer.register_optimizer_step_pre_hook(before_shared_step)
                _hook = made
        return _hook

    def __init__(
        self,
        module: Any = torch,
        local_worker: VirtualWorker | None = None,
        is_client: bool = True,
        verbose: bool = False,
        seed: int | None = None,
    ) -> None:
        if seed is not None:
            raise OptionError(
                "seed= is not taken: ids must differ; for random tensors write torch.manual_seed"
            )
        if local_worker is not None and not isinstance(local_worker, VirtualWorker):
            raise OptionError(
                f"local_worker is a VirtualWorker, not {type(local_worker).__name__}: it stands for this process"
            )
        self.is_client_worker = is_client
        if local_worker is not None:
            self.local_worker = local_worker

    def __repr__(self) -> str:
        return "<TorchHook of this process>"


# ------------------------------------------------------------------------------------------------------- tensors


@bounded
def send(
    self: torch.Tensor,
    *workers: BaseWorker,
    private: bool = False,
    allowed_users: Sequence[str] | None = None,
    garbage_collection: bool = True,
    inplace: bool = False,
    garbage_collect_data: bool = True,
    no_wrap: bool = False,
    requires_grad: bool = False,
    local_autograd: bool = False,
    preinitialize_grad: bool = False,
    user: object = None,
    timeout: float | None = None,
) -> PointerTensor | MultiPointerTensor:
    """Sends the tensor, with `requires_grad`, `.grad`, tags and description; returns a pointer, at once.

    Sent to several workers, it returns one pointer that stands for all. `private`: nobody may read it or what
    is computed from it. `allowed_users`: only these may. With ``garbage_collection=False``, which may be
    written ``garbage_collect_data=False``, the object stays when its last pointer goes. The object has the
    tensor's `id` on the worker; while one is there that was sent before, both the tensor and the new object
    get another one. `inplace` is `send_`. `no_wrap` is without effect, and the other options of PySyft 0.2
    are refused, saying what to write instead.

    Raises:
        UnsupportedTensorError: sparse, quantised, nested, or of a dtype that does not travel.
        WorkerLostError: the worker's connection has ended.
    """
    refuse_options(
        "send",
        requires_grad=requires_grad,
        local_autograd=local_autograd,
        preinitialize_grad=preinitialize_grad,
        user=user,
    )
    allowed = _check_send(self, workers, private, allowed_users, inplace)
    if inplace:
        (handle,) = workers[0].workplace.objects.put([self], allowed=allowed, confirm=True)
        become_pointer(self, handle, contiguous(self))
        return self  # type: ignore[return-value]
    owned = garbage_collection and garbage_collect_data
    handles = [worker.workplace.objects.put([self], allowed=allowed)[0] for worker in workers]
    return _pointers_to(self, handles, owned)


@bounded
async def async_send(
    self: torch.Tensor,
    *workers: BaseWorker,
    private: bool = False,
    allowed_users: Sequence[str] | None = None,
    garbage_collection: bool = True,
    inplace: bool = False,
    garbage_collect_data: bool = True,
    no_wrap: bool = False,
    requires_grad: bool = False,
    local_autograd: bool = False,
    preinitialize_grad: bool = False,
    user: object = None,
    timeout: float | None = None,
) -> PointerTensor | MultiPointerTensor:
    """`send`, to be awaited on any loop."""
    refuse_options(
        "send",
        requires_grad=requires_grad,
        local_autograd=local_autograd,
        preinitialize_grad=preinitialize_grad,
        user=user,
    )
    allowed = _check_send(self, workers, private, allowed_users, inplace)
    if inplace:
        (handle,) = await workers[0].workplace.objects.put_async([self], allowed=allowed, confirm=True)
        become_pointer(self, handle, contiguous(self))
        return self  # type: ignore[return-value]
    owned = garbage_collection and garbage_collect_data
    handles = [(await worker.workplace.objects.put_async([self], allowed=allowed))[0] for worker in workers]
    return _pointers_to(self, handles, owned)


@bounded
def send_(
    self: torch.Tensor, worker: BaseWorker, *, timeout: float | None = None, **options: Any
) -> torch.Tensor:
    """`send` in place: this object becomes the pointer, and ``get_()`` turns it back."""
    _check_workers([worker])
    refuse_hooks(self, "this tensor")
    allowed = allowed_users(options.pop("private", False), options.pop("allowed_users", None))
    if options:
        raise LocalError(f"send_ takes private and allowed_users, not {', '.join(options)}")
    (handle,) = worker.workplace.objects.put([self], allowed=allowed, confirm=True)
    become_pointer(self, handle, contiguous(self))
    return self


def _check_send(
    tensor: torch.Tensor,
    workers: Sequence[Any],
    private: bool,
    users: Sequence[str] | None,
    inplace: bool,
) -> list[str] | None:
    """Who may read what is sent, None for everyone; raises what `send` refuses."""
    if inplace and len(workers) != 1:
        raise LocalError("inplace=True is for one worker: a tensor becomes one pointer")
    allowed = _allowed(private, users)
    _check_workers(workers)
    refuse_hooks(tensor, "this tensor")
    return allowed


def _pointers_to(
    tensor: torch.Tensor, handles: Sequence[Handle], owned: bool
) -> PointerTensor | MultiPointerTensor:
    pointers = []
    for handle in handles:
        handle.owned = owned
        pointers.append(_pointer_to(tensor, handle))
    return pointers[0] if len(pointers) == 1 else MultiPointerTensor.of(pointers)


def tag(self: torch.Tensor, *tags: str) -> torch.Tensor:
    """Tags the tensor; the tags travel with it, and publish it where it is sent."""
    texts = [plain(one) for one in tags]
    if not all(isinstance(one, str) and 0 < len(one) <= 200 for one in texts):
        raise LocalError("tags are strings of 1 to 200 characters")
    self.__dict__["_tags"] = (*self.__dict__.get("_tags", ()), *texts)
    return self


def describe(self: torch.Tensor, description: str) -> torch.Tensor:
    """Gives the tensor a description, whose words `search` finds."""
    self.__dict__["_description"] = as_text(description, "a description")
    return self


def _pointer_to(tensor: torch.Tensor, handle: Any) -> PointerTensor:
    pointer = make_pointer(handle, contiguous(tensor))
    for name in ("_tags", "_description"):
        if name in tensor.__dict__:
            pointer.__dict__[name] = tensor.__dict__[name]
    return pointer


def _check_workers(workers: Sequence[Any]) -> None:
    if not workers:
        raise LocalError("send to whom? write x.send(worker)")
    for worker in workers:
        if not isinstance(worker, BaseWorker):
            raise LocalError(
                f"send takes workers, not {type(worker).__name__}: make one with VirtualWorker(hook, id=...)"
            )


def _allowed(private: bool, users: Sequence[str] | None) -> list[str] | None:
    return allowed_users(private, users)


class _NotReplaced:
    """Stands for ``torch.native_...``: torch's own functions have their own names here."""

    def __init__(self, word: str) -> None:
        self._word = word

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise UnknownNameError(
            f"torch.native_{self._word}: planrt replaces none of torch's functions, so write torch.{self._word}"
        )

    def __repr__(self) -> str:
        return f"<not there: write torch.{self._word}>"


def _private_tensor(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """Not here: who may see a tensor is said when it is sent."""
    raise PointerError(
        "private_tensor() is not taken: write x.send(worker, allowed_users=[...]), or private=True for nobody; the "
        "worker tells users by their tokens, and results of private data are private too"
    )


def _allow(self: torch.Tensor, *args: Any, **kwargs: Any) -> NoReturn:
    """Not here: who may see a tensor is said when it is sent."""
    raise PointerError(
        "allow() is not taken: allowed_users= of send says who may read, and a token shows who asks: "
        "worker.connect_as(token)"
    )


def _ser(self: torch.Tensor, *args: Any, **kwargs: Any) -> NoReturn:
    """Not here: see `planrt.serde.serialize`."""
    raise PointerError("ser() is not taken: write planrt.serde.serialize(x)")


def _create_pointer(self: torch.Tensor, *args: Any, **kwargs: Any) -> NoReturn:
    """Not here: a pointer is made by sending."""
    raise PointerError(
        "create_pointer() is not taken: x.send(worker) gives a pointer, and PointerTensor(location=worker, "
        "id_at_location=id) one to what is there"
    )


def _set_id(self: torch.Tensor, number: int) -> None:
    id = as_whole(number, "a tensor's id")
    if not 0 <= id < 2**63:
        raise OptionError(f"a tensor's id is in [0, 2**63), not {id}")
    give_id(self, id)


def _not_remote(name: str) -> Any:
    def refuse(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        raise PointerError(f"{name}() is for pointers, and this tensor is here: send() it first")

    refuse.__name__ = name
    refuse.__doc__ = f"For pointers only: see `PointerTensor.{name}`."
    return refuse


def _owner(self: torch.Tensor) -> VirtualWorker:
    """The worker that stands for this process."""
    return current_hook().local_worker


def _add_methods() -> None:
    """The methods that planrt adds to torch's classes."""
    splitting.install()
    additions: dict[str, Any] = {
        "send": send,
        "async_send": async_send,
        "send_": send_,
        "tag": tag,
        "describe": describe,
        "get": _not_remote("get"),
        "get_": _not_remote("get_"),
        "move": _not_remote("move"),
        "id": property(
            pointer_id, _set_id, doc="A number of this tensor in this process; under which it is sent."
        ),
        "create_pointer": _create_pointer,
        "allow": _allow,
        "ser": _ser,
        "owner": property(_owner),
        "tags": property(lambda self: set(self.__dict__.get("_tags", ()))),
        "description": property(lambda self: self.__dict__.get("_description", "")),
        "copy": torch.Tensor.clone,
        "is_wrapper": property(lambda self: False, doc="False: this is no pointer."),
        "private_tensor": _private_tensor,
        "remote_get": _not_remote("remote_get"),
        "remote_send": _not_remote("remote_send"),
    }
    for name in ops.TABLE:  # PySyft 0.2 replaced torch's functions, and called torch's own by these names
        home, _, word = name.rpartition(".")
        if hasattr(torch.Tensor if home == "Tensor" else torch, f"native_{word}"):
            continue  # torch has a few of its own
        if home == "Tensor" and not word.startswith("_") and callable(getattr(torch.Tensor, word, None)):
            additions[f"native_{word}"] = property(operator.attrgetter(word), doc=f"`Tensor.{word}`.")
        elif home == "torch":
            setattr(torch, f"native_{word}", _NotReplaced(word))
    setattr(torch, "torch_hooked", True)  # noqa: B010 - torch declares no such name
    additions |= surface.TENSORS
    surface.local_worker = lambda: current_hook().local_worker
    for word in ("encrypt", "decrypt"):
        additions[word] = surface.not_encrypted(word)
        setattr(nn.Module, word, surface.not_encrypted(word))
    for word, method in shared_modules.MODULES.items():
        setattr(nn.Module, word, method)
    for word, method in surface.OPTIMIZERS.items():
        setattr(torch.optim.Optimizer, word, method)
    for name, value in additions.items():
        setattr(torch.Tensor, name, value)
    for name, value in {
        "send": modules.send_module,
        "get": modules.get_module,
        "move": modules.move_module,
        "async_send": modules.send_module_async,
        "async_get": modules.get_module_async,
        "async_move": modules.move_module_async,
        "copy": modules.copy_module,
        "share": modules.share_module,
        "share_": modules.share_module,
        "location": property(modules.location_of),
    }.items():
        setattr(nn.Module, name, value)
    # TorchScript compiles every property that it is not told to leave alone.
    unused = getattr(nn.Module, "__jit_unused_properties__", [])
    setattr(nn.Module, "__jit_unused_properties__", [*unused, "location"])  # noqa: B010 - torch declares no such name

"""Modules on workers: every parameter and buffer becomes a pointer, in place, and the module goes on as before.

A parameter stays the same object, so an optimizer made before `send` goes on stepping. While the module's forward
runs, factories such as `torch.zeros` (as in `nn.LSTM`) make their tensors on the module's worker.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from planrt.deadlines import bounded
from planrt.errors import LocalError, MixedLocationsError, UnsupportedTensorError
from planrt.plans.forms.torchscript import is_torchscript
from planrt.plans.ir import ops
from planrt.plans.recording import torch_calls
from planrt.plans.running.inference import Spec
from planrt.serde.values import DEVICE
from planrt.sharing.tensors.shared import SharedTensor
from planrt.types import Ref, map_leaves
from planrt.workers.base import BaseWorker
from planrt.workers.client.moving import check_worker
from planrt.workers.optimizers import RemoteState, states_of
from planrt.workers.pointers.fetching import fetch_all, fetch_all_async
from planrt.workers.pointers.handle import Handle
from planrt.workers.pointers.ops import packed, place_of, refuse_autocast, refuse_hooks
from planrt.workers.pointers.tensor import (
    PointerParameter,
    PointerTensor,
    become_pointer,
    become_tensor,
    is_swapped,
    make_pointer,
    take_place,
)
from planrt.workers.shares import shared_modules
from planrt.workers.wire.objects import contiguous, new_id
from planrt.workers.wire.posted import PostedOp


def tensors_of(module: nn.Module) -> list[torch.Tensor]:
    """Parameters and buffers, each once."""
    return list(dict.fromkeys(itertools.chain(module.parameters(), module.buffers())))


def location_of(module: nn.Module) -> BaseWorker | None:
    """Returns the worker that holds the module; None while it is here, or in shares, which no single worker holds.

    Raises:
        MixedLocationsError: its tensors are in several places.
    """
    places = {
        place_of(tensor): tensor for tensor in tensors_of(module) if not isinstance(tensor, SharedTensor)
    }
    if len(places) > 1:
        raise MixedLocationsError(f"the module's tensors are in {' and '.join(sorted(places))}")
    for tensor in places.values():
        return tensor.location if isinstance(tensor, PointerTensor) else None
    return None


@bounded
def send_module(module: nn.Module, worker: BaseWorker, *, timeout: float | None = None) -> nn.Module:
    """Sends every parameter and buffer to `worker` in one message; returns the module itself.

    Of a module that is on another worker, `worker` gets pointers, and `get` brings these back.

    Raises:
        LocalError: it is on `worker` already, or cannot be sent as it is.
    """
    check_worker(worker, "send")
    if (place := location_of(module)) is not None:
        _refuse_again(place, worker)
        for pointer in _remote(module):
            take_place(pointer, pointer.send(worker))
        return _placed(module, worker)
    local = _local(module)
    if local:
        _become_remote(module, local, worker, worker.workplace.objects.put(local, confirm=True))
    return module


@bounded
async def send_module_async(
    module: nn.Module, worker: BaseWorker, *, timeout: float | None = None
) -> nn.Module:
    """`send_module`, to be awaited on any loop."""
    check_worker(worker, "send")
    if (place := location_of(module)) is not None:
        _refuse_again(place, worker)
        for pointer in _remote(module):
            take_place(pointer, await pointer.async_send(worker))
        return _placed(module, worker)
    local = _local(module)
    if local:
        _become_remote(module, local, worker, await worker.workplace.objects.put_async(local, confirm=True))
    return module


def _refuse_again(place: BaseWorker, worker: BaseWorker) -> None:
    """Raises LocalError for a module that is on `worker`: a cell that runs twice would give it pointers to itself."""
    if place is worker:
        raise LocalError(f"the module is on worker {worker.id!r} already: get() or move() it")


def _local(module: nn.Module) -> list[torch.Tensor]:
    if any(is_torchscript(part) for part in module.modules()):
        raise UnsupportedTensorError(
            "TorchScript runs below torch's Python functions, where pointers have no values: send the module it was "
            "made from, or a plan"
        )
    if shared_modules.is_shared(module):
        raise LocalError("the module is in shares, which its parties have: get() it before send()")
    tensors = tensors_of(module)
    for tensor in tensors:
        if isinstance(tensor, PointerTensor):
            raise LocalError(f"the module is on {place_of(tensor)} already: get() or move() it")
    _refuse_hooks(module)
    return tensors


def _refuse_hooks(module: nn.Module) -> None:
    """Raises LocalError for hooks that nobody would call: backward passes run on the worker."""
    for path, part in module.named_modules():
        what = torch_calls.backward_hooks(part)
        if what is not None:
            raise LocalError(
                f"module {path or type(part).__name__} has a backward hook ({what}), which would not run on a worker: "
                "remove it before send(), and compute with the gradients after backward()"
            )
    for name, parameter in module.named_parameters():
        refuse_hooks(parameter, f"parameter {name!r}")


def _become_remote(
    module: nn.Module, tensors: list[torch.Tensor], worker: BaseWorker, handles: list[Handle]
) -> None:
    for tensor, handle in zip(tensors, handles, strict=True):
        become_pointer(tensor, handle, contiguous(tensor))
    _add_hooks(module, worker)


@bounded
def get_module(module: nn.Module, *, timeout: float | None = None) -> nn.Module:
    """Brings every parameter and buffer back, in place; those that are in shares are opened."""
    if shared_modules.is_shared(module):
        return shared_modules.get_shared_module(module)
    pointers = _remote(module)
    states = states_of(pointers)
    _become_local(module, pointers, states, fetch_all([*pointers, *(one.pointer for one in states)]))
    return _placed(module, location_of(module))


def _become_local(
    module: nn.Module,
    pointers: list[PointerTensor],
    states: list[RemoteState],
    values: list[torch.Tensor],
) -> None:
    """Puts `values` where `pointers` are: in place, or for buffers that forward bound anew (``self.n = self.n + 1``)
    in the place of the result that stands there. The values after these are the state of optimizers."""
    rest = iter(values)
    results: dict[int, torch.Tensor] = {}
    for pointer in pointers:
        value = next(rest)
        if isinstance(value, PointerTensor):
            take_place(pointer, value)
        elif is_swapped(pointer):
            become_tensor(pointer, value)
        else:
            results[id(pointer)] = value
    for state, value in zip(states, rest, strict=True):
        state.entries[state.key] = value
    for part in module.modules() if results else ():
        for name, buffer in part._buffers.items():
            if id(buffer) in results:
                part._buffers[name] = results[id(buffer)]


def share_module(module: nn.Module, *workers: Any, **options: Any) -> nn.Module:
    """Shares the parameters and floating-point buffers, in place; see `shared_modules.share_module_parameters`."""
    shared_modules.share_module_parameters(module, *workers, **options)
    _remove_hooks(module)  # they were of a module on a worker
    return module


@bounded
async def get_module_async(module: nn.Module, *, timeout: float | None = None) -> nn.Module:
    """`get_module`, to be awaited on any loop."""
    if shared_modules.is_shared(module):
        return await shared_modules.get_shared_module_async(module)
    pointers = _remote(module)
    states = states_of(pointers)
    values = await fetch_all_async([*pointers, *(one.pointer for one in states)])
    _become_local(module, pointers, states, values)
    return _placed(module, location_of(module))


@bounded
async def move_module_async(
    module: nn.Module, worker: BaseWorker, *, timeout: float | None = None
) -> nn.Module:
    """`move_module`, to be awaited on any loop."""
    pointers = _remote(module)
    for pointer in [*(one.pointer for one in states_of(pointers)), *pointers]:
        await pointer.async_move(worker)
    return _placed(module, worker)


@bounded
def move_module(module: nn.Module, worker: BaseWorker, *, timeout: float | None = None) -> nn.Module:
    """Moves every parameter and buffer to `worker`, straight from where they are."""
    pointers = _remote(module)
    for pointer in [*(one.pointer for one in states_of(pointers)), *pointers]:
        pointer.move(worker)
    return _placed(module, worker)


def _placed(module: nn.Module, worker: BaseWorker | None) -> nn.Module:
    """The module, which is on `worker` now, or here."""
    _remove_hooks(module)
    if worker is not None:
        _add_hooks(module, worker)
    return module


def copy_module(module: nn.Module) -> nn.Module:
    """Returns a module of the same kind with copies of parameters and buffers on the same worker (or here)."""
    if location_of(module) is None:
        return copy.deepcopy(module)
    copies: dict[int, Any] = {}
    for tensor in tensors_of(module):
        cloned = tensor.detach().clone()
        handle, cloned._handle = cloned._handle, Handle(cloned._handle.worker, 0, owned=False)  # type: ignore[attr-defined]
        like = cloned._spec  # type: ignore[attr-defined]
        if isinstance(tensor, PointerParameter):
            blank: torch.Tensor = nn.Parameter(torch.empty(0, dtype=like.dtype), requires_grad=False)
        else:
            blank = torch.empty(0, dtype=like.dtype)
        become_pointer(blank, handle, like)
        if tensor.requires_grad:
            blank.requires_grad_()
        copies[id(tensor)] = blank
    worker = location_of(module)
    copied = copy.deepcopy(_without_hooks(module), copies)
    assert worker is not None  # noqa: S101 - asked above
    _add_hooks(module, worker)
    _add_hooks(copied, worker)
    return copied


def _without_hooks(module: nn.Module) -> nn.Module:
    _remove_hooks(module)
    return module


def _remote(module: nn.Module) -> list[PointerTensor]:
    tensors = tensors_of(module)
    for tensor in tensors:
        if not isinstance(tensor, PointerTensor):
            raise LocalError("the module is not on a worker: send() it first")
    return [tensor for tensor in tensors if isinstance(tensor, PointerTensor)]


# ---------------------------------------------------------------------------------- factories in a module's forward


class RemoteFactories(TorchFunctionMode):
    """While active, torch's factories make their tensors on `worker`."""

    def __init__(self, worker: BaseWorker) -> None:
        super().__init__()
        self._worker = worker

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Called by torch in place of `func`."""
        kwargs = kwargs or {}
        name = ops.name_of(func)
        if name is None or name not in ops.FACTORIES:
            return func(*args, **kwargs)
        return make_remote(self._worker, name, func, args, kwargs)


def make_remote(
    worker: BaseWorker, name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Makes a tensor on `worker` by the factory `name`."""
    refuse_autocast(name)
    like = func(*args, **{**kwargs, "device": "meta"})
    if like.dtype == torch.get_default_dtype():  # of this process
        kwargs = {**kwargs, "dtype": like.dtype}
    handle = Handle(worker, new_id())
    wire = map_leaves(kwargs, lambda leaf: DEVICE if isinstance(leaf, torch.device) else leaf)
    wire.pop("device", None)
    place = worker.workplace
    seed = place.draw_seed() if name in ops.RANDOM else None
    op = PostedOp(name, args, wire, Ref(handle.id), torch.is_grad_enabled(), seed, place.take_drops())
    place.post_op(packed(op, handle))
    return make_pointer(handle, Spec.of(like))


class _Hooks:
    """The forward hooks of one module that is on a worker."""

    def __init__(self, module: nn.Module, worker: BaseWorker) -> None:
        self._worker = worker
        self._active: list[RemoteFactories] = []
        self._handles = [
            module.register_forward_pre_hook(self._enter, prepend=True),
            module.register_forward_hook(self._leave, always_call=True),
        ]

    def _enter(self, module: nn.Module, args: Any) -> None:
        mode = RemoteFactories(self._worker)
        mode.__enter__()  # type: ignore[no-untyped-call]
        self._active.append(mode)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._active:
            self._active.pop().__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


_HOOKS = "_planrt_hooks"


def _hooked(module: nn.Module) -> Iterator[nn.Module]:
    """The modules whose forward makes tensors from nothing, as torch's recurrent ones and many of users' own do."""
    for part in module.modules():
        if type(part).forward not in _PLAIN_FORWARDS:
            yield part


_PLAIN_FORWARDS = frozenset(
    kind.forward
    for kind in (
        nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ReLU, nn.Sequential, nn.Dropout, nn.MaxPool2d, nn.BatchNorm1d,
        nn.BatchNorm2d, nn.Embedding, nn.LayerNorm, nn.Identity, nn.Flatten, nn.Sigmoid, nn.Tanh, nn.GELU, nn.Softmax,
    )
)  # fmt: skip


def _add_hooks(module: nn.Module, worker: BaseWorker) -> None:
    for part in _hooked(module):
        if _HOOKS not in part.__dict__:
            part.__dict__[_HOOKS] = _Hooks(part, worker)


def _remove_hooks(module: nn.Module) -> None:
    for part in module.modules():
        hooks = part.__dict__.pop(_HOOKS, None)
        if hooks is not None:
            hooks.remove()

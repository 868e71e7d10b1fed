"""Modules on shares, by PySyft 0.2's names: parameters and buffers are rounded, shared and opened in place.

A module that is on a worker is shared there: its worker makes the parts and sends each to its party. Nothing of it
comes here but buffers of whole numbers and masks, which all know then as those of a module that was here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from planrt.errors import PlanError, SharingError
from planrt.plans import Plan
from planrt.sharing.tensors.fixed import FixedPrecisionTensor
from planrt.sharing.tensors.refusals import check_made
from planrt.sharing.tensors.shared import SharedTensor
from planrt.workers.pointers.fetching import fetch_all
from planrt.workers.pointers.tensor import PointerTensor, become_tensor, is_swapped
from planrt.workers.shares.surface import (
    FixedPrecisionPointer,
    become,
    fix_precision,
    share_tensor,
)

_PRECISION = "_precision"
"""What a parameter on a worker is given by `fix_module_precision`: the base and the digits to be shared with."""


def _each(module: nn.Module) -> list[torch.Tensor]:
    if isinstance(module, Plan):
        raise PlanError("a plan is not shared: call it on shares, plan(x.fix_precision().share(bob, alice))")
    check_made(module)
    return [
        one
        for one in dict.fromkeys([*module.parameters(), *module.buffers()])
        if one.is_floating_point() or isinstance(one, SharedTensor)
    ]


def _put(tensor: torch.Tensor, made: torch.Tensor, requires_grad: bool) -> None:
    """In the place of a parameter, which stays the same object: optimizers keep stepping it."""
    if isinstance(tensor, PointerTensor):
        tensor.__dict__.pop(_PRECISION, None)
        become_tensor(tensor, torch.empty(0, dtype=made.dtype))
    if isinstance(tensor, nn.Parameter) or getattr(tensor, "_is_param", False):
        made = nn.Parameter(made.detach(), requires_grad)
    become(tensor, made)


def _check_can_change(tensor: torch.Tensor) -> None:
    """Raises SharingError where a parameter could not change in place, before the first one of a module does."""
    other: torch.Tensor = torch.empty(0)
    if isinstance(tensor, nn.Parameter) or getattr(tensor, "_is_param", False):
        other = nn.Parameter(other, requires_grad=False)
    become(tensor, other)
    become(tensor, other)  # and back


def _put_all(
    module: nn.Module, tensors: Sequence[torch.Tensor], made: Sequence[Any], train: Sequence[bool]
) -> None:
    """Puts each into its place. Recurrent layers refer to their weights weakly, which forbids that: they do so anew."""
    bound = {  # a buffer that forward bound anew is a result on a worker, which has no memory to be another's
        id(tensor): one
        for tensor, one in zip(tensors, made, strict=True)
        if isinstance(tensor, PointerTensor) and not is_swapped(tensor)
    }
    for part in module.modules() if bound else ():
        part._buffers.update(
            {name: bound[id(one)] for name, one in part._buffers.items() if id(one) in bound}
        )
    recurrent = [one for one in module.modules() if isinstance(one, nn.RNNBase)]
    for layer in recurrent:
        layer._flat_weight_refs = []
    try:
        for tensor in tensors:
            if not isinstance(tensor, PointerTensor):
                _check_can_change(tensor)
        for tensor, one, requires_grad in zip(tensors, made, train, strict=True):
            if id(tensor) not in bound:
                _put(tensor, one, requires_grad)
    finally:
        for layer in recurrent:
            layer._init_flat_weights()


def fix_module_precision(self: nn.Module, **options: Any) -> nn.Module:
    """Rounds the parameters and floating-point buffers to a precision, in place; see `fix_precision`. Those that are on
    a worker are rounded there when they are shared.
    """
    tensors = _each(self)
    made = [fix_precision(_bare(one), **options) for one in tensors]
    for tensor, fixed in zip(tensors, made, strict=True):
        if isinstance(fixed, FixedPrecisionPointer):
            tensor.__dict__[_PRECISION] = fixed.precision
    here = [pair for pair in zip(tensors, made, strict=True) if not isinstance(pair[0], PointerTensor)]
    _put_all(
        self, [one for one, _ in here], [made for _, made in here], [one.requires_grad for one, _ in here]
    )
    return self


def _bare(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` without autograd's history; a pointer as it is, since that would be an operation on its worker."""
    return tensor if isinstance(tensor, PointerTensor) else tensor.detach()


def share_module_parameters(
    self: nn.Module,
    *workers: Any,
    crypto_provider: Any = None,
    requires_grad: bool = False,
    **options: Any,
) -> nn.Module:
    """Shares the parameters and floating-point buffers, in place; they train with `requires_grad`, except for those
    that are frozen: that do not require gradients before. `get` gives what did as such again. Those that are on a
    worker are shared from there, and leave it; its buffers of whole numbers come here.

    Raises:
        SharingError: as `share_tensor`; nothing has changed then.
        GetNotPermittedError: what is on a worker is private, and not this user's to read.
    """
    tensors = _each(self)
    trains = [one.requires_grad for one in tensors]

    def shared(tensor: torch.Tensor) -> torch.Tensor:
        if isinstance(tensor, PointerTensor) and _PRECISION in tensor.__dict__:
            there = FixedPrecisionPointer(tensor, *tensor.__dict__[_PRECISION])
            return there.share(*workers, crypto_provider=crypto_provider, **options).get()
        found = share_tensor(_bare(tensor), *workers, crypto_provider=crypto_provider, **options)
        return found if isinstance(found, SharedTensor) else found.get()

    made = [shared(one) for one in tensors]
    _fetch_whole(self)
    _put_all(self, tensors, made, [requires_grad and one for one in trains])
    for tensor, one in zip(tensors, trains, strict=True):
        tensor.set_aside = one and not requires_grad  # type: ignore[attr-defined]
    return self


def _fetch_whole(module: nn.Module) -> None:
    """Brings buffers of whole numbers and masks here that are on a worker: all know them, as those of other modules."""
    remote = [
        (part, name, buffer)
        for part in module.modules()
        for name, buffer in part._buffers.items()
        if isinstance(buffer, PointerTensor) and not buffer.is_floating_point()
    ]
    values = dict(
        zip([id(one) for _, _, one in remote], fetch_all([one for _, _, one in remote]), strict=True)
    )
    for part, name, buffer in remote:
        part._buffers[name] = values[id(buffer)]


def is_shared(module: nn.Module) -> bool:
    """Returns whether parameters of the module are in shares."""
    return any(isinstance(one, SharedTensor) for one in (*module.parameters(), *module.buffers()))


def get_shared_module(module: nn.Module) -> nn.Module:
    """Opens the parameters and buffers that are in shares, in place."""
    tensors = _in_shares(module)
    _put_opened(module, tensors, [one.get() for one in tensors])
    return module


async def get_shared_module_async(module: nn.Module) -> nn.Module:
    """`get_shared_module`, to be awaited on any loop."""
    tensors = _in_shares(module)
    _put_opened(module, tensors, [await one.async_get() for one in tensors])
    return module


def _in_shares(module: nn.Module) -> list[SharedTensor]:
    return [one for one in _each(module) if isinstance(one, SharedTensor)]


def _put_opened(module: nn.Module, tensors: Sequence[SharedTensor], values: Sequence[torch.Tensor]) -> None:
    """Puts values where their shares were; what trained before trains again."""
    _put_all(module, tensors, values, [one.requires_grad or one.set_aside for one in tensors])


def float_module_precision(self: nn.Module) -> nn.Module:
    """Turns parameters at a fixed precision into ordinary ones, in place.

    Raises:
        SharingError: they are in shares.
    """
    if is_shared(self):
        raise SharingError("the module is in shares: model.get().float_precision()")
    for one in _each(self):
        one.__dict__.pop(_PRECISION, None)
    tensors = [one for one in _each(self) if isinstance(one, FixedPrecisionTensor)]
    values = [one.detach().plain for one in tensors]  # type: ignore[attr-defined]
    _put_all(self, tensors, values, [one.requires_grad for one in tensors])
    return self


MODULES: dict[str, Any] = {
    "fix_precision": fix_module_precision,
    "fix_prec": fix_module_precision,
    "fix_precision_": fix_module_precision,
    "fix_prec_": fix_module_precision,
    "float_precision": float_module_precision,
    "float_prec": float_module_precision,
    "float_precision_": float_module_precision,
    "float_prec_": float_module_precision,
}
"""What torch.nn.Module is given, besides `planrt.workers.modules.share_module`."""

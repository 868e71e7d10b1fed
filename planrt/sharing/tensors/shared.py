"""SharedTensor: shares under PyTorch's own autograd, modules and optimizers.

The class stands below autograd (`__torch_dispatch__`): torch records what is differentiated, and hands down ATen
operations, which `kernels` and `layers` have as protocols. A tensor has a shape, a dtype and a handle; where the parts
are, and who runs the protocols on them, is its session's affair (`sessions.SharingSession`).
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch

from planrt.errors import SharingError
from planrt.sharing.fixed_point import decode, encode
from planrt.sharing.layers import KERNELS
from planrt.sharing.tensors.sessions import Handle, Secret, Shapes, SharingSession
from planrt.types import leaves, map_leaves


def share(session: SharingSession, values: torch.Tensor) -> SharedTensor:
    """Returns `values` in shares of `session`; a leaf that requires gradients where `values` does.

    Raises:
        ValueRangeError: a value is too large for the scale, infinite or not a number.
    """
    handle = session.share(encode(values, session.scale), session.scale)
    dtype = values.dtype if values.is_floating_point() else torch.get_default_dtype()
    return SharedTensor(session, handle, values.shape, dtype, requires_grad=values.requires_grad)


def share_module(session: SharingSession, module: torch.nn.Module) -> torch.nn.Module:
    """Puts the parameters and floating-point buffers of `module` into shares, in place, and returns it."""
    for inner in module.modules():
        for name, parameter in inner._parameters.items():
            if parameter is not None:
                shared = share(session, parameter.detach())
                inner._parameters[name] = torch.nn.Parameter(shared, parameter.requires_grad)
        for name, buffer in inner._buffers.items():
            if buffer is not None and buffer.is_floating_point():
                inner._buffers[name] = share(session, buffer)
    return module


class SharedTensor(torch.Tensor):
    """A tensor of fixed-point values that parties hold in shares. It has a shape and a dtype, and no data here."""

    session: SharingSession
    handle: Handle
    """What the session knows the parts by."""
    shows_other: bool
    """Whether it is a view of another tensor."""

    @staticmethod
    def __new__(
        cls: type[SharedTensor],
        session: SharingSession,
        handle: Handle,
        shape: Sequence[int],
        dtype: torch.dtype,
        *,
        requires_grad: bool = False,
        shows_other: bool = False,
    ) -> SharedTensor:
        """Makes the wrapper."""
        made: SharedTensor = torch.Tensor._make_wrapper_subclass(
            cls, tuple(shape), dtype=dtype, device=torch.device("cpu"), requires_grad=requires_grad
        )
        made.session, made.handle, made.shows_other = session, handle, shows_other
        return made

    def get(self) -> torch.Tensor:
        """Returns the values, which the parties open to the caller."""
        whole, scale = self.session.open(self.handle)
        return decode(whole, scale, self.dtype)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        session = self.session
        return f"SharedTensor({list(self.shape)}, {len(session.parties)} parties, scale {session.scale})"

    def __deepcopy__(self, memo: dict[int, Any]) -> SharedTensor:
        """Returns a copy in shares of the same parties."""
        copied = self.session.run("clone", (Secret(self.handle),), {}, self.shape, in_place=False)
        found = SharedTensor(self.session, copied, self.shape, self.dtype, requires_grad=self.requires_grad)
        memo[id(self)] = found
        return found

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise SharingError("shares of all parties are not saved in one place: save what get() returns")

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs an ATen operation by its protocol.

        Raises:
            SharingError: there is none for it, operands are of different sessions, or it would change a view in place.
        """
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        operands = [leaf for leaf in leaves((args, kwargs)) if isinstance(leaf, SharedTensor)]
        first = operands[0]
        if any(one.session is not first.session for one in operands):
            raise SharingError(f"{name}: its operands are shared in different sessions, by different parties")
        if name in ("detach", "alias"):  # the same value: what was opened of it stays known
            return SharedTensor(
                first.session, first.handle, first.shape, first.dtype, shows_other=first.shows_other
            )
        in_place = name.endswith("_") and not name.endswith("__")
        kernel_name = name.removesuffix("_") if in_place else name
        if kernel_name not in KERNELS:
            raise SharingError(
                f"{name} has no protocol on shares: open the operands with get(), or write it without"
            )
        if in_place and (not isinstance(args[0], SharedTensor) or args[0].shows_other):
            raise SharingError(
                f"{name} would change a view, or what all know, in place: write it out of place"
            )
        given, options = map_leaves(tuple(args), _secret), map_leaves(kwargs, _secret)
        _check_arguments(name, kernel_name, given, options)
        shapes = _shapes(func, args, kwargs)
        if in_place and shapes != args[0].shape:
            raise SharingError(f"{name}: a result of shape {list(shapes)} does not fit in place")
        made = first.session.run(kernel_name, given, options, shapes, in_place=in_place)
        if in_place:
            return args[0]
        is_view = any(one.alias_info is not None for one in func._schema.returns)
        return _wrapped(first, made, shapes, is_view)


def _secret(leaf: Any) -> Any:
    return Secret(leaf.handle) if isinstance(leaf, SharedTensor) else leaf


@cache
def _signature(name: str) -> inspect.Signature:
    return inspect.signature(KERNELS[name])


def _check_arguments(name: str, kernel: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raises SharingError unless the kernel takes such arguments: here, before anything is asked of the parties."""
    try:
        _signature(kernel).bind(None, *args, **kwargs)
    except TypeError as error:
        raise SharingError(f"{name} has no protocol on shares with these arguments: {error}") from None


_META = torch.device("meta")


def _shapes(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Shapes:
    """The shapes of the results, which torch tells from tensors without values."""

    def twin(leaf: Any) -> Any:
        if isinstance(leaf, SharedTensor):
            return torch.empty(leaf.shape, dtype=leaf.dtype, device=_META)
        if isinstance(leaf, torch.Tensor):
            return leaf.to(_META)
        return _META if isinstance(leaf, torch.device) else leaf

    return _shape_of(func(*map_leaves(tuple(args), twin), **map_leaves(kwargs, twin)))


def _shape_of(result: Any) -> Shapes:
    if isinstance(result, tuple | list):
        return tuple(_shape_of(one) for one in result)
    return result.shape if isinstance(result, torch.Tensor) else None


def _wrapped(like: SharedTensor, made: Any, shapes: Shapes, is_view: bool) -> Any:
    """Tensors of handles, in their nesting."""
    if shapes is None:
        return None
    if isinstance(shapes, torch.Size):
        return SharedTensor(like.session, made, shapes, like.dtype, shows_other=is_view)
    return tuple(_wrapped(like, one, shape, is_view) for one, shape in zip(made, shapes, strict=True))

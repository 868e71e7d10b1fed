"""SharedTensor: shares under PyTorch's own autograd, modules and optimizers. Internal, until parties are real.

The class stands below autograd (`__torch_dispatch__`): torch records what is differentiated, and hands down ATen
operations, which `kernels` has as protocols. All parties are in this process here; the same kernels run one party each
where an `open` between workers answers what they yield.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from planrt.errors import SharingError
from planrt.sharing.additive import reconstruct, share
from planrt.sharing.fixed_point import DEFAULT_SCALE, decode, encode
from planrt.sharing.kernels import Context, Share
from planrt.sharing.layers import KERNELS
from planrt.sharing.randomness import Stream, new_seed
from planrt.sharing.rounds import Transcript, new_parties, run_together
from planrt.types import map_leaves


class Session:
    """Parties in this process, who compute on shares together, at one scale. `transcript` counts their traffic."""

    def __init__(self, count: int = 2, *, scale: int = DEFAULT_SCALE) -> None:
        self.contexts = [Context(party, scale) for party in new_parties(count)]
        self.scale = scale
        self.transcript = Transcript(count)
        self._stream = Stream(new_seed())

    def share(self, values: torch.Tensor) -> SharedTensor:
        """Returns `values` in shares; a leaf that requires gradients where `values` does.

        Raises:
            ValueRangeError: a value is too large for the scale, infinite or not a number.
        """
        parts = share(encode(values, self.scale), len(self.contexts), self._stream)
        shares = [Share(part, self.scale) for part in parts]
        dtype = values.dtype if values.is_floating_point() else torch.get_default_dtype()
        return SharedTensor(self, shares, dtype, requires_grad=values.requires_grad)

    def share_module(self, module: torch.nn.Module) -> torch.nn.Module:
        """Puts the parameters and floating-point buffers of `module` into shares, in place, and returns it."""
        for inner in module.modules():
            for name, parameter in inner._parameters.items():
                if parameter is not None:
                    shared = self.share(parameter.detach())
                    inner._parameters[name] = torch.nn.Parameter(shared, parameter.requires_grad)
            for name, buffer in inner._buffers.items():
                if buffer is not None and buffer.is_floating_point():
                    inner._buffers[name] = self.share(buffer)
        return module

    def run(self, name: str, kernel: Callable[..., Any], args: Any, kwargs: Any) -> list[Any]:
        """Runs a kernel at every party; returns what each has then.

        Raises:
            SharingError: the kernel does not take these arguments.
        """
        protocols = []
        for number, context in enumerate(self.contexts):

            def mine(leaf: Any, number: int = number) -> Any:
                return leaf.shares[number] if isinstance(leaf, SharedTensor) else leaf

            try:
                protocols.append(kernel(context, *map_leaves(args, mine), **map_leaves(kwargs, mine)))
            except TypeError as error:  # of the call alone: a generator has not begun
                raise SharingError(
                    f"{name} has no protocol on shares with these arguments: {error}"
                ) from None
        return run_together(protocols, self.transcript)


class SharedTensor(torch.Tensor):
    """A tensor of fixed-point values that parties hold in shares. It has a shape and a dtype, and no data here."""

    session: Session
    shares: list[Share]

    @staticmethod
    def __new__(
        cls: type[SharedTensor],
        session: Session,
        shares: list[Share],
        dtype: torch.dtype,
        *,
        requires_grad: bool = False,
    ) -> SharedTensor:
        """Makes the wrapper: the shape is that of the parts."""
        made: SharedTensor = torch.Tensor._make_wrapper_subclass(
            cls, shares[0].part.shape, dtype=dtype, device=torch.device("cpu"), requires_grad=requires_grad
        )
        made.session, made.shares = session, shares
        return made

    def get(self) -> torch.Tensor:
        """Returns the values, which all parties open."""
        whole = reconstruct([one.part for one in self.shares])
        return decode(whole, self.shares[0].scale, self.dtype)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"SharedTensor({list(self.shape)}, {len(self.shares)} parties, scale {self.session.scale})"

    def __deepcopy__(self, memo: dict[int, Any]) -> SharedTensor:
        """Returns a copy in shares of the same parties."""
        made = [Share(one.part.clone(), one.scale, one.masked) for one in self.shares]
        found = SharedTensor(self.session, made, self.dtype, requires_grad=self.requires_grad)
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
        name = func._schema.name.removeprefix("aten::")
        operands = _operands((args, kwargs or {}))
        first = operands[0]
        if any(one.session is not first.session for one in operands):
            raise SharingError(f"{name}: its operands are shared in different sessions, by different parties")
        if name in ("detach", "alias"):  # the same value: what was opened of it stays known
            return SharedTensor(first.session, first.shares, first.dtype)
        in_place = name.endswith("_") and not name.endswith("__")
        kernel = KERNELS.get(name.removesuffix("_") if in_place else name)
        if kernel is None:
            raise SharingError(
                f"{name} has no protocol on shares: open the operands with get(), or write it without"
            )
        if in_place and (not isinstance(args[0], SharedTensor) or args[0].shares[0].is_view):
            raise SharingError(
                f"{name} would change a view, or what all know, in place: write it out of place"
            )
        made = first.session.run(name, kernel, tuple(args), kwargs or {})
        if not in_place:
            return _wrapped(first, made)
        if made[0].part.shape != args[0].shape:
            raise SharingError(f"{name}: a result of shape {list(made[0].part.shape)} does not fit in place")
        for old, new in zip(args[0].shares, made, strict=True):
            old.become(new)
        return args[0]


def _wrapped(like: SharedTensor, made: list[Any]) -> Any:
    """One tensor of what each party has; of several results, as many."""
    if isinstance(made[0], tuple):
        return tuple(_wrapped(like, list(one)) for one in zip(*made, strict=True))
    return None if made[0] is None else SharedTensor(like.session, made, like.dtype)


def _operands(value: Any) -> list[SharedTensor]:
    found: list[SharedTensor] = []

    def look(leaf: Any) -> Any:
        if isinstance(leaf, SharedTensor):
            found.append(leaf)
        return leaf

    map_leaves(value, look)
    return found

"""Encrypted tensors by PySyft 0.2's names: what tensors, pointers and optimizers are given for them.

`x.fix_precision().share(bob, alice, crypto_provider=james)`, `get`, `float_precision` and what goes with them; what of
0.2's arguments has no meaning here is refused by name. Modules have theirs in `shared_modules`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch

from planrt.deadlines import bounded
from planrt.errors import LocalError, OptionError, PointerError, SharingError, UnknownNameError
from planrt.sharing.fixed_point import scale_of
from planrt.sharing.tensors.fixed import FixedPrecisionTensor
from planrt.sharing.tensors.refusals import public_name
from planrt.sharing.tensors.sessions import SharingSession
from planrt.sharing.tensors.shared import SharedTensor, share
from planrt.types import as_whole
from planrt.workers.pointers.multi import MultiPointerTensor
from planrt.workers.pointers.tensor import PointerTensor
from planrt.workers.shares.optimizers import get_optimizer
from planrt.workers.shares.session import DEFAULT_TIMEOUT, sharing_session

BASE, DIGITS = 10, 3
"""What fix_precision() means without arguments, as in 0.2: thousandths."""


def _nobody() -> NoReturn:
    raise SharingError("write crypto_provider=, or make a TorchHook: its worker is the crypto provider else")


local_worker: Callable[[], Any] = _nobody
"""Returns the worker of this process, which is the crypto provider where none is named. `torch_hook` sets it."""


class _NoTensor:
    """What stands for a tensor and is none: torch's functions, methods and operators say what to write."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:
        raise UnknownNameError(f"{public_name(func)}: {cls._instead()}")

    def __getattr__(self, name: str) -> NoReturn:
        told = f": {self._instead()}" if hasattr(torch.Tensor, name) else ""
        raise UnknownNameError(f"{type(self).__name__} has no {name}{told}")

    @classmethod
    def _instead(cls) -> str:
        raise NotImplementedError

    def _operator(self, *_: Any) -> NoReturn:
        raise UnknownNameError(f"operators: {self._instead()}")

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = _operator
    __matmul__ = __rmatmul__ = __pow__ = __rpow__ = __neg__ = __abs__ = __getitem__ = __len__ = _operator
    __lt__ = __gt__ = __le__ = __ge__ = __float__ = __int__ = __bool__ = __iter__ = _operator


class SharedPointer(_NoTensor):
    """Stands for shares that a pointer's worker made: ``pointer.fix_precision().share(bob, alice)``.

    ``get()`` returns them as a tensor in shares; the values stay hidden.
    """

    @classmethod
    def _instead(cls) -> str:
        return "x = pointer.share(...) stands for shares that its worker made: write x = x.get(), which opens nothing"

    def __init__(self, tensor: SharedTensor) -> None:
        self._tensor = tensor

    @property
    def shape(self) -> torch.Size:
        """The shape of the tensor."""
        return self._tensor.shape

    @bounded
    def get(self, *, timeout: float | None = None) -> SharedTensor:
        """Returns the tensor in shares. ``get().get()`` opens it."""
        return self._tensor

    def __repr__(self) -> str:
        return repr(self._tensor)


class FixedPrecisionPointer(_NoTensor):
    """Stands for a tensor on a worker that is to be shared at a precision: ``pointer.fix_precision()``."""

    @classmethod
    def _instead(cls) -> str:
        return (
            "x = pointer.fix_precision() stands for a tensor that its worker is to share: write "
            "x.share(bob, alice).get(), or compute on the pointer before"
        )

    def __init__(self, pointer: PointerTensor, base: int, digits: int) -> None:
        self._pointer, self._base, self._digits = pointer, base, digits

    @property
    def shape(self) -> torch.Size:
        """The shape of the tensor."""
        return self._pointer.shape

    @property
    def location(self) -> Any:
        """The worker that holds the tensor."""
        return self._pointer.location

    @property
    def precision(self) -> tuple[int, int]:
        """The base and the number of digits."""
        return self._base, self._digits

    def copy(self) -> FixedPrecisionPointer:
        """Makes a copy on the same worker; returns what stands for that."""
        return FixedPrecisionPointer(self._pointer.copy(), *self.precision)

    def share(
        self,
        *workers: Any,
        crypto_provider: Any = None,
        requires_grad: bool = False,
        timeout: float = DEFAULT_TIMEOUT,
        **options: Any,
    ) -> SharedPointer:
        """Has the worker share its tensor among `workers`; see `share_tensor`. No part of it comes here.

        Raises:
            SharingError: fewer than two workers, one twice, or a value that does not fit.
            GetNotPermittedError: the tensor is private, and not this user's to read.
        """
        _refuse("share", options)
        scale = scale_of(base=self._base, precision_fractional=self._digits)
        session = sharing_session(workers, _provider(crypto_provider), scale=scale, timeout=timeout)
        made: Any = session.share_from(self._pointer).detach()
        return SharedPointer(made.requires_grad_(requires_grad))

    def float_precision(self) -> PointerTensor:
        """Returns the pointer."""
        return self._pointer

    @bounded
    def get(self, *, timeout: float | None = None) -> FixedPrecisionTensor:
        """Returns the tensor, rounded."""
        return FixedPrecisionTensor.of(self._pointer.get(), self._base, self._digits)

    def __repr__(self) -> str:
        return f"(Wrapper)>FixedPrecisionTensor>{str(self._pointer).removeprefix('(Wrapper)>')}"


def fix_precision(
    self: torch.Tensor,
    *,
    precision_fractional: int = DIGITS,
    base: int = BASE,
    **options: Any,
) -> FixedPrecisionTensor | FixedPrecisionPointer:
    """Returns the values rounded to `precision_fractional` digits in `base`: thousandths, if not told otherwise.

    Of a pointer, its worker does so when the tensor is shared.

    Raises:
        ValueRangeError: a value is too large for the precision, infinite or not a number.
        OptionError: no such precision, or an argument of PySyft 0.2 that has no meaning here.
    """
    _refuse("fix_precision", options)
    digits, base = as_whole(precision_fractional, "precision_fractional"), as_whole(base, "base")
    if isinstance(self, PointerTensor):
        scale_of(base=base, precision_fractional=digits)
        return FixedPrecisionPointer(self, base, digits)
    if isinstance(self, SharedTensor):
        raise SharingError("the tensor is shared already: fix_precision() comes before share()")
    _refuse_several(self)
    return FixedPrecisionTensor.of(self, base, digits)


def _refuse_several(tensor: torch.Tensor) -> None:
    if isinstance(tensor, MultiPointerTensor):
        raise PointerError(
            "a pointer to several workers is several tensors: share each one, "
            "pointer.child['bob'].fix_precision().share(...)"
        )


def fix_precision_in_place(self: torch.Tensor, **options: Any) -> torch.Tensor:
    """`fix_precision`, of this object."""
    return become(self, fix_precision(self, **options))


def float_precision(self: torch.Tensor) -> torch.Tensor:
    """Returns the values as an ordinary tensor of floating-point numbers; what is one already, as it is.

    Raises:
        SharingError: the tensor is in shares.
    """
    if isinstance(self, FixedPrecisionTensor):
        return self.plain
    if isinstance(self, SharedTensor):
        raise SharingError("the tensor is in shares: open it first, x.get().float_precision()")
    if isinstance(self, PointerTensor) or self.is_floating_point():
        return self
    return self.to(torch.get_default_dtype())


def float_precision_in_place(self: torch.Tensor) -> torch.Tensor:
    """`float_precision`, of this object."""
    if isinstance(self, FixedPrecisionTensor):
        return become(self, self.plain.detach().clone())
    return become(self, float_precision(self))


def share_tensor(
    self: torch.Tensor,
    *workers: Any,
    crypto_provider: Any = None,
    requires_grad: bool = False,
    timeout: float = DEFAULT_TIMEOUT,
    **options: Any,
) -> SharedTensor | SharedPointer:
    """Returns the tensor in shares of `workers`, two or more: each holds one uniformly random part.

    Whole numbers are shared as they are, fractions with `fix_precision` before. `crypto_provider` is the worker that
    hands out what products and comparisons need; the worker of this process, if not given. A party waits `timeout`
    seconds for another one.

    Raises:
        SharingError: fewer than two workers, one twice, the provider among them; fractions without a precision; or
            the tensor is shared already.
    """
    _refuse("share", options)
    if isinstance(self, SharedTensor):
        raise SharingError("the tensor is shared already: get() opens it, refresh() draws new parts")
    if isinstance(self, PointerTensor):
        if self.dtype.is_floating_point:
            raise SharingError(_NO_PRECISION)
        if requires_grad:
            raise SharingError(_NO_GRADIENTS)
        made = FixedPrecisionPointer(self, BASE, DIGITS).share(
            *workers, crypto_provider=crypto_provider, timeout=timeout
        )
        found = made.get()
        return SharedPointer(SharedTensor(found.session, found.handle, found.shape, torch.int64))
    _refuse_several(self)
    session = _session(self, workers, crypto_provider, timeout)
    plain = self.plain if isinstance(self, FixedPrecisionTensor) else self
    if requires_grad and not plain.is_floating_point():
        raise SharingError(_NO_GRADIENTS)
    return share(session, plain.detach()).requires_grad_(requires_grad)  # type: ignore[return-value]


_NO_GRADIENTS = "whole numbers have no gradients: fix_precision() before share(requires_grad=True)"
_NO_PRECISION = (
    "shares hold whole numbers: write x.fix_precision().share(...), or fix_precision(precision_fractional=5) for finer "
    "fractions"
)


def _session(
    tensor: torch.Tensor, workers: tuple[Any, ...], crypto_provider: Any, timeout: float
) -> SharingSession:
    if isinstance(tensor, FixedPrecisionTensor):
        scale = tensor.scale
    elif tensor.is_complex() or tensor.is_floating_point():
        raise SharingError(_NO_PRECISION)
    else:
        scale = scale_of(base=BASE, precision_fractional=DIGITS)  # what they may meet
    return sharing_session(workers, _provider(crypto_provider), scale=scale, timeout=timeout)


def _provider(worker: Any) -> Any:
    return worker if worker is not None else local_worker()


def share_in_place(self: torch.Tensor, *workers: Any, **options: Any) -> torch.Tensor:
    """`share_tensor`, of this object."""
    return become(self, share_tensor(self, *workers, **options))


def become(tensor: torch.Tensor, made: Any) -> torch.Tensor:
    """Makes `tensor` what `made` is."""
    if isinstance(tensor, PointerTensor) or not isinstance(made, torch.Tensor):
        raise PointerError("a pointer does not change in place: write x = x.fix_precision().share(...)")
    if made is tensor:
        return tensor
    try:
        with torch._C.DisableTorchFunctionSubclass():
            torch.utils.swap_tensors(tensor, made)  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        raise SharingError(
            "the tensor cannot change in place while results computed from it are there, with their graph: do it "
            f"before, or compute these under torch.no_grad() ({error})"
        ) from None
    return tensor


# ---------------------------------------------------------------------------------------------------- optimizers


def fix_optimizer_precision(self: torch.optim.Optimizer, **options: Any) -> torch.optim.Optimizer:
    """Returns the optimizer: its numbers are known to all, and rounded where they meet shares."""
    options.pop("precision_fractional", None)
    _refuse("fix_precision", options)
    return self


# ---------------------------------------------------------------------------------------------- what 0.2 had besides

_ACCEPTED: dict[str, tuple[Any, ...]] = {
    "dtype": (None, "long"),
    "field": (None, 2**64),
    "protocol": (None, "snn"),
    "no_wrap": (False,),
    "verbose": (True, False),
    "storage": (None, "auto"),
    "kappa": (1,),
}
"""Arguments of 0.2 and the values that mean what planrt does."""

_INSTEAD = {
    "dtype": "shares are integers of 64 bits",
    "field": "shares are modulo 2**64",
    "protocol": "planrt has one protocol, see docs/sharing.md",
    "storage": "shares are integers of 64 bits; for larger values take fewer digits",
}


def _refuse(name: str, options: dict[str, Any]) -> None:
    for option, value in options.items():
        if option not in _ACCEPTED:
            raise OptionError(f"{name}() has no argument {option}=")
        if value not in _ACCEPTED[option]:
            raise OptionError(
                f"{name}({option}={value!r}) is not taken: {_INSTEAD.get(option, 'leave it out')}"
            )


def not_encrypted(name: str) -> Any:
    """Returns what stands for a name of 0.2 that is not here."""

    def refuse(self: object, *args: Any, **kwargs: Any) -> NoReturn:
        raise LocalError(
            f"{name}() is not taken: write x.fix_precision().share(bob, alice), and get() to open it"
        )

    refuse.__name__ = name
    refuse.__doc__ = "Not here: tensors are encrypted by sharing them."
    return refuse


TENSORS: dict[str, Any] = {
    "fix_precision": fix_precision,
    "fix_prec": fix_precision,
    "fix_precision_": fix_precision_in_place,
    "fix_prec_": fix_precision_in_place,
    "float_precision": float_precision,
    "float_prec": float_precision,
    "float_precision_": float_precision_in_place,
    "float_prec_": float_precision_in_place,
    "share": share_tensor,
    "share_": share_in_place,
}
"""What torch.Tensor is given."""

OPTIMIZERS: dict[str, Any] = {
    "fix_precision": fix_optimizer_precision,
    "fix_prec": fix_optimizer_precision,
    "fix_precision_": fix_optimizer_precision,
    "get": get_optimizer,
}
"""What torch.optim.Optimizer is given."""

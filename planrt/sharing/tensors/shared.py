"""SharedTensor: shares under PyTorch's own autograd, modules and optimizers.

The class stands below autograd (`__torch_dispatch__`): torch records what is differentiated, and hands down ATen
operations, which the kernels of `table` have as protocols. A tensor has a shape, a dtype and a handle; where the parts
are, and who runs the protocols on them, is its session's affair (`sessions.SharingSession`).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from planrt.deadlines import bounded
from planrt.errors import SharingError
from planrt.sharing.fixed_point import decode, encode
from planrt.sharing.kernels.table import KERNELS, VIEWS, check_arguments
from planrt.sharing.tensors.above import written
from planrt.sharing.tensors.fixed import FixedPrecisionTensor
from planrt.sharing.tensors.lists import of_each
from planrt.sharing.tensors.overloads import out_of_place, without_out
from planrt.sharing.tensors.places import check_places
from planrt.sharing.tensors.refusals import (
    NO_MEMORY,
    check_drawn,
    check_made,
    check_shared_size,
    check_size,
    check_whole,
    explained,
    named,
    public_name,
)
from planrt.sharing.tensors.rewritten import batch_norm, hiding, prims, rewriting
from planrt.sharing.tensors.sessions import Handle, Secret, SharingSession
from planrt.sharing.tensors.twins import shapes_of, twin_of
from planrt.types import leaves, map_leaves


def share(session: SharingSession, values: torch.Tensor) -> SharedTensor:
    """Returns `values` in shares of `session`: whole numbers exactly, fractions at the session's scale.

    It is a leaf that requires gradients where `values` does.

    Raises:
        ValueRangeError: a value is too large for the scale, infinite or not a number.
        SharingError: more entries than shares have.
    """
    check_shared_size(values.shape)
    fractions = values.is_floating_point()
    scale = session.scale if fractions else 1
    dtype = values.dtype if fractions else torch.int64
    handle = session.share(encode(values.detach().cpu(), scale), scale)
    return SharedTensor(session, handle, values.shape, dtype, requires_grad=values.requires_grad)


def share_module(session: SharingSession, module: torch.nn.Module) -> torch.nn.Module:
    """Puts the parameters and floating-point buffers of `module` into shares, in place, and returns it.

    Raises:
        SharingError: a module that makes its parameters at its first call has not been called yet.
    """
    check_made(module)
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
    """A tensor that parties hold in shares: fixed-point values, or whole numbers. It has a shape and a dtype, and no
    data here. Comparisons give whole numbers, 0 or 1.
    """

    in_shares = True
    """What plans tell such tensors by."""
    session: SharingSession
    handle: Handle
    """What the session knows the parts by."""
    flags: bool = False
    """Whether it is the result of a comparison, which has 0 and 1 only."""
    whole: bool = False
    """Whether it has whole numbers as torch's floating-point numbers: ``x.float()`` of whole numbers."""
    set_aside: bool = False
    """Whether it is a parameter that trained before it was shared, and is to do so again."""

    @staticmethod
    def __new__(
        cls: type[SharedTensor],
        session: SharingSession,
        handle: Handle,
        shape: Sequence[int],
        dtype: torch.dtype,
        *,
        strides: Sequence[int] | None = None,
        offset: int | None = None,
        requires_grad: bool = False,
    ) -> SharedTensor:
        """Makes the wrapper. Strides and offset are what torch takes views and gradients of assignments by.

        To torch's own code it is a meta tensor, so that ``plain.data = shared``, where torch asks nobody, is an error
        and no tensor without memory. It says that it is on the CPU.
        """
        made: SharedTensor = torch.Tensor._make_wrapper_subclass(
            cls,
            tuple(shape),
            strides,
            offset,
            dtype=dtype,
            device=_META,
            dispatch_device=True,
            requires_grad=requires_grad,
        )
        made.session, made.handle = session, handle
        return made

    @bounded
    def get(self, *, timeout: float | None = None) -> torch.Tensor:
        """Returns the values, which the parties open to the caller."""
        return self._opened(*self.session.open(self.handle))

    def get_(self) -> torch.Tensor:
        """`get`, of this object."""
        torch.utils.swap_tensors(self, self.get())  # type: ignore[no-untyped-call]
        return self

    @bounded
    async def async_get(self, *, timeout: float | None = None) -> torch.Tensor:
        """`get`, to be awaited on any loop."""
        return self._opened(*await self.session.open_async(self.handle))

    def _opened(self, whole: torch.Tensor, scale: int) -> torch.Tensor:
        if whole.shape != self.shape:
            raise SharingError(
                f"parties {', '.join(self.session.parties)} hold parts of shape {list(whole.shape)} of a tensor of "
                f"shape {list(self.shape)}"
            )
        return decode(whole, scale, self.dtype)

    def send(self, *workers: Any, **options: Any) -> Any:
        """Refuses: the parts are with the parties.

        Raises:
            SharingError: always.
        """
        raise SharingError("the tensor is in shares and has no values here to send: get() it before send()")

    send_ = async_send = move = send

    def refresh(self) -> SharedTensor:
        """Returns the same values in new parts, which say nothing about the old ones; gradients pass through."""
        made: SharedTensor = _Refreshed.apply(self)
        return made

    def copy(self) -> SharedTensor:
        """Returns the same values in shares of their own."""
        return self.clone()  # type: ignore[return-value]

    @property
    def child(self) -> SharedTensor:
        """Returns the tensor itself: PySyft 0.2 wrapped what had the shares."""
        return self

    @property
    def field(self) -> int:
        """Returns 2**64: shares add up modulo it."""
        return 2**64

    @property
    def is_wrapper(self) -> bool:
        """Returns True, as PySyft 0.2 did."""
        return True

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        """As PySyft 0.2 showed it: what wraps the shares, a pointer to each, and the crypto provider."""
        session, is_parameter = self.session, getattr(self, "_is_param", False)
        chain = "Parameter>" if is_parameter else "(Wrapper)>"
        if self.requires_grad:
            chain += "AutogradTensor>"
        if self.dtype.is_floating_point:
            chain += "FixedPrecisionTensor>"
        names = session.names_of(self.handle)
        lines = [f"\n\t-> [PointerTensor | me:{here} -> {party}:{there}]" for here, party, there in names]
        heading = "Parameter containing:\n" if is_parameter else ""
        return f"{heading}{chain}[AdditiveSharingTensor]{''.join(lines)}\n\t*crypto provider: {session.provider}*"

    def __deepcopy__(self, memo: dict[int, Any]) -> SharedTensor:
        """Returns a copy in shares of the same parties: of a parameter one, else with its gradient, as torch does."""
        if not self.is_leaf:
            raise RuntimeError(
                "only tensors in shares that are no results of others have deep copies: write x.detach() or x.clone()"
            )
        copied = self.session.run("clone", (Secret(self.handle),), {}, self.shape, in_place=False)
        found = self._like(copied)
        memo[id(self)] = found
        if self.grad is not None and not getattr(self, "_is_param", False):
            found.grad = copy.deepcopy(self.grad, memo)
        return found

    def __copy__(self) -> SharedTensor:
        """Returns another tensor of the same shares: what changes one in place changes both."""
        return self._like(self.handle)

    def _like(self, handle: Handle) -> SharedTensor:
        """A leaf of that handle, a parameter where this is one."""
        found = SharedTensor(self.session, handle, self.shape, self.dtype, requires_grad=self.requires_grad)
        found.flags, found.whole, found.set_aside = self.flags, self.whole, self.set_aside
        if getattr(self, "_is_param", False):
            found._is_param = True  # how torch tells parameters of other classes
        return found

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise SharingError("shares of all parties are not saved in one place: save what get() returns")

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs torch's function, which comes down to operations of `__torch_dispatch__`. What fails there is told by
        the name that the caller wrote.

        Raises:
            SharingError: shares have no protocol for it.
        """
        if not all(one in _PLAIN or issubclass(one, SharedTensor | FixedPrecisionTensor) for one in types):
            return NotImplemented  # a pointer's: it says so
        if func in NO_MEMORY:
            raise SharingError(f"{public_name(func)} has no protocol on shares: {NO_MEMORY[func]}")
        if torch._C._is_tracing():
            raise SharingError(
                "torch.jit.trace needs values, which shares have not: write planrt.func2plan, and build it on plain "
                "tensors"
            )
        if func == _SET_DATA:
            return _put_data(*args)
        if func is torch.Tensor.new_tensor:
            return _new_tensor(*args, **(kwargs or {}))
        if func is torch.nn.functional.multi_head_attention_forward:
            kwargs = hiding(kwargs or {})
        try:
            with torch._C.DisableTorchFunctionSubclass():
                found = written(func, args, kwargs or {})
                return func(*args, **(kwargs or {})) if found is NotImplemented else found
        except SharingError as error:
            raise named(error, func) from error.__cause__
        except Exception as error:
            failed = explained(error, func, args, kwargs or {})
            if failed is error:
                raise
            raise failed from error

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs an ATen operation by its protocol.

        Raises:
            SharingError: there is none for it, operands are of different sessions, or it would change in place what all
                know.
        """
        if func is _DEVICE:
            return _CPU
        with torch._C.DisableTorchFunctionSubclass():
            return cls._run(func, args, kwargs or {})

    @classmethod
    def _run(cls, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        name = func._schema.name.removeprefix("aten::")
        if name.startswith("_foreach_"):
            return of_each(name, args, kwargs)
        operands = [leaf for leaf in leaves((args, kwargs)) if isinstance(leaf, SharedTensor)]
        first = operands[0]
        if any(one.session is not first.session for one in operands):
            home = home_of(args, operands, in_place=name.endswith("_") and not name.endswith("__"))

            def at_home(leaf: Any) -> Any:
                return brought(leaf, home, name, operands) if isinstance(leaf, SharedTensor) else leaf

            return cls._run(func, map_leaves(tuple(args), at_home), map_leaves(kwargs, at_home))
        if name.startswith("prims::"):  # torch calls them where a gradient is nothing
            return prims(name.removeprefix("prims::"), args)
        if name in ("is_same_size", "_has_same_storage_numel"):
            return args[0].shape == args[1].shape
        if "out" in kwargs:
            return _written_to(func, name, args, kwargs)
        if name in _SAME:  # what was opened of it stays known
            return _marked(_wrapped(first, first.handle, first), first)
        in_place = name.endswith("_") and not name.endswith("__")
        kernel = name.removesuffix("_") if in_place else name
        if in_place and not isinstance(args[0], SharedTensor):
            instead = (
                "model.load_state_dict(state, assign=True), or y = x.clone()"
                if name == "copy_"
                else "it out of place"
            )
            raise SharingError(f"{name} would change what all know, in place: write {instead}")
        if torch.Tag.inplace_view in func.tags:
            shown = out_of_place(func, kernel)(*args, **kwargs)
            with torch._C._DisableTorchDispatch():
                func(*args, **kwargs)
            args[0].handle = shown.handle
            return args[0]
        if kernel == "native_batch_norm" and args[5] and args[3] is not None and args[4] is not None:
            return batch_norm(first.session.scale, *args)
        if kernel == "bernoulli":  # all parties draw the same, after torch.manual_seed the same again
            check_drawn(func)
            seed = first.session.draw_seed(kwargs.pop("generator", None))
            kwargs = {**kwargs, "seed": seed}
        if kernel == "_to_copy" and kwargs.get("dtype") == torch.bool:
            return first.clone() if first.flags else first != 0
        if kernel == "_to_copy" and first.flags and not kwargs.get("dtype", torch.int64).is_floating_point:
            kwargs = {**kwargs, "dtype": torch.int64}  # 0 and 1 are so in all
        check_places(func, kernel, args, kwargs)
        if "index" in kernel:
            if kernel in _PUTS and (filled := _where_masked(args)) is not None:
                return args[0].copy_(filled) if in_place else filled
            args = _at_places(args)
            if any(
                isinstance(one, SharedTensor) for arg in args if isinstance(arg, list | tuple) for one in arg
            ):
                raise SharingError(
                    f"{kernel}: shares are indexed at public places only: choose by torch.where and sums, "
                    "or take secret places with gather"
                )
        if kernel in _LOGICAL and all(_is_flag(one) for one in args):
            func = getattr(torch.ops.aten, _LOGICAL[kernel]).default
            name = kernel = _LOGICAL[kernel]
        if kernel not in KERNELS and (rewritten := rewriting(func)) is not None:
            return rewritten(*args, **kwargs)
        if (
            kernel not in KERNELS
            and in_place
            and (rewritten := rewriting(out_of_place(func, kernel))) is not None
        ):
            return args[0].copy_(rewritten(*args, **kwargs))
        given, options = map_leaves(tuple(args), _secret), map_leaves(kwargs, _secret)
        check_arguments(kernel, given, options, shares=Secret)
        twin = twin_of(func, args, {key: one for key, one in kwargs.items() if key != "seed"})
        if in_place and (twin.shape != args[0].shape or (0 in args[0].stride() and args[0].numel() > 1)):
            raise SharingError(f"{name}: a result of shape {list(twin.shape)} does not fit in place")
        check_size(kernel, twin)
        check_whole(kernel, args, kwargs, twin, in_place=in_place)
        made = first.session.run(kernel, given, options, shapes_of(twin), in_place=in_place)
        flags = kernel in _OF_FLAGS and all(_is_flag(one) for one in args)
        if not in_place:
            found = _wrapped(first, made, twin)
            if flags:
                found.flags = True
            if kernel in _OF_WHOLE and all(_is_whole(one) for one in leaves((args, kwargs))):
                _marked(found, first)
            if kernel in VIEWS or kernel in _COPIES:
                _marked(found, first)
            return found
        args[0].flags, args[0].whole = flags, False
        return args[0]


class _Refreshed(torch.autograd.Function):
    """New parts, whose gradient is the old ones'."""

    @staticmethod
    def forward(context: Any, value: SharedTensor) -> SharedTensor:
        made = value.session.run("refresh", (Secret(value.handle),), {}, value.shape, in_place=False)
        return SharedTensor(value.session, made, value.shape, value.dtype)

    @staticmethod
    def backward(context: Any, gradient: Any) -> Any:
        return gradient


_CPU, _META = torch.device("cpu"), torch.device("meta")
_DEVICE = torch.ops.prim.device.default
_PLAIN = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)
"""Classes of tensors with no ways of their own."""
_LOGICAL = {f"bitwise_{one}": f"logical_{one}" for one in ("and", "or", "xor", "not")}
"""What & | ^ ~ of results of comparisons are: PyTorch has those as bool, shares as 0 and 1."""
_OF_FLAGS = frozenset(["mul", *_LOGICAL.values()])
"""What gives 0 and 1 where all operands have these only."""
_OF_WHOLE = frozenset(["add", "sub", "rsub", "mul", "neg", "abs", "relu", "sum", "cumsum"])
"""What gives whole numbers where all operands have these only."""
_SAME = ("detach", "alias", "lift_fresh")
_COPIES = ("_to_copy", "clone")
_PUTS = ("index_put", "_index_put_impl")
_SET_DATA = torch.Tensor.data.__set__  # type: ignore[attr-defined]


def _put_data(tensor: torch.Tensor, data: torch.Tensor) -> None:
    """``tensor.data = data``: torch moves what it keeps of a tensor, and the secret has to go along.

    Raises:
        SharingError: one of them is in shares, the other one is not.
    """
    if not isinstance(tensor, SharedTensor) or not isinstance(data, SharedTensor):
        raise SharingError(
            "x.data = y takes a tensor in shares for one in shares: write x.data.copy_(y), or share y before"
        )
    with torch._C.DisableTorchFunctionSubclass():
        _SET_DATA(tensor, data)
    tensor.session, tensor.handle = data.session, data.handle
    tensor.flags, tensor.whole = data.flags, data.whole


def _new_tensor(
    like: SharedTensor, data: Any, *, dtype: torch.dtype | None = None, device: Any = None, requires_grad: bool = False
) -> torch.Tensor:  # fmt: skip
    """``x.new_tensor(data)``, of what all know or of shares: torch makes it where `like` has its memory, on meta."""
    if isinstance(data, SharedTensor):
        made: torch.Tensor = data.detach().clone()
        made = made if dtype is None else made.to(dtype)
    else:
        made = torch.tensor(data, dtype=dtype or like.dtype, device=device or like.device)
    return made.requires_grad_(requires_grad)


def _written_to(func: Any, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """An operation whose result goes to ``out=``, as the operation and a copy.

    Raises:
        SharingError: that is a plain tensor, which would show the result, or of another shape.
    """
    out = kwargs["out"]
    if not isinstance(out, SharedTensor):
        raise SharingError(f"{name}: out= would change what all know, in place: leave out= out")
    made = without_out(func)(*args, **{key: one for key, one in kwargs.items() if key != "out"})
    if made.shape != out.shape or made.dtype != out.dtype:
        raise SharingError(
            f"{name}: out= has shape {list(out.shape)} and {out.dtype}, the result {list(made.shape)} and {made.dtype}"
        )
    return out.copy_(made)


def _where_masked(args: Sequence[Any]) -> torch.Tensor | None:
    """What ``x[mask] = value`` makes of x, by a secret mask and one value for all places; None of other places."""
    target, places, value = args[:3]
    mask, adds = places[0], len(args) > 3 and args[3]
    if len(places) != 1 or adds or value.numel() != 1 or not getattr(mask, "flags", False):
        return None
    if mask.shape != target.shape[: mask.dim()]:
        return None
    wide = mask.reshape((*mask.shape, *[1] * (target.dim() - mask.dim())))
    return torch.where(wide, value.reshape(()), target)


def home_of(
    args: Sequence[Any], operands: Sequence[SharedTensor], *, in_place: bool = False
) -> SharingSession:
    """Returns the session that an operation runs in: that of what it changes, of its fractions, or the finest."""
    if in_place and isinstance(args[0], SharedTensor):
        return args[0].session
    fractions = [one.session for one in operands if one.is_floating_point() and not one.whole]
    return fractions[0] if fractions else max((one.session for one in operands), key=lambda one: one.scale)


def brought(
    tensor: SharedTensor, home: SharingSession, name: str, operands: Sequence[SharedTensor]
) -> SharedTensor:
    """Returns `tensor` in the session `home`: whole numbers are the same at all scales.

    Raises:
        SharingError: it has fractions, or is held by other parties.
    """
    if tensor.session is home:
        return tensor
    handle = home.copied_from(tensor.handle) if tensor.whole or not tensor.is_floating_point() else None
    if handle is None:
        raise SharingError(_mixed(name, operands))
    made = SharedTensor(
        home, handle, tensor.shape, tensor.dtype, strides=tensor.stride(), offset=int(tensor.storage_offset())
    )
    made.flags, made.whole = tensor.flags, tensor.whole
    return made


def _mixed(name: str, operands: Sequence[SharedTensor]) -> str:
    first, other = operands[0], next(one for one in operands if one.session is not operands[0].session)
    parties = [list(one.session.parties) for one in (first, other)]
    if sorted(parties[0]) != sorted(parties[1]):
        return f"{name}: its operands are shared by different parties, {parties[0]} and {parties[1]}: get() one first"
    if first.session.scale != other.session.scale and first.session.provider == other.session.provider:
        return (
            f"{name}: its operands have different precisions, scales {first.session.scale} and {other.session.scale}: "
            "write fix_precision() of both alike"
        )
    if first.session.provider == other.session.provider:
        return f"{name}: its operands are shared in different sessions: share both with the same timeout= and workers"
    return (
        f"{name}: its operands are shared in different sessions, with the providers {first.session.provider} and "
        f"{other.session.provider}: share both with one"
    )


def _is_flag(one: Any) -> bool:
    return (
        one.flags if isinstance(one, SharedTensor) else getattr(one, "dtype", type(one)) in (torch.bool, bool)
    )


def _is_whole(one: Any) -> bool:
    """Whether an argument has whole numbers, or says nothing of numbers."""
    if isinstance(one, SharedTensor):
        return one.whole or not one.is_floating_point()
    return not (one.is_floating_point() if isinstance(one, torch.Tensor) else isinstance(one, float))


def _secret(leaf: Any) -> Any:
    if isinstance(leaf, SharedTensor):
        return Secret(leaf.handle)
    if isinstance(leaf, torch.Tensor) and type(leaf) is not torch.Tensor:
        with torch._C.DisableTorchFunctionSubclass():
            return leaf.detach().as_subclass(torch.Tensor)
    return leaf


def _at_places(args: Sequence[Any]) -> tuple[Any, ...]:
    """Public masks among indices as the places that they choose, so that what is left is known without values."""

    def places(one: Any) -> Any:
        if not isinstance(one, torch.Tensor) or isinstance(one, SharedTensor):
            return [one]
        if one.dtype not in (torch.bool, torch.uint8):
            return [one]
        return list(one.nonzero(as_tuple=True))

    return tuple(
        [place for one in arg for place in places(one)] if isinstance(arg, list | tuple) else arg
        for arg in args
    )


def _marked(found: Any, first: SharedTensor) -> Any:
    """`found`, a view or a copy of `first`, or several, which have whole numbers where that has."""
    for one in leaves(found):
        if isinstance(one, SharedTensor) and one.is_floating_point():
            one.whole = first.whole or not first.is_floating_point()
    return found


def _wrapped(like: SharedTensor, made: Any, twin: Any) -> Any:
    """Tensors of handles, in their nesting."""
    if isinstance(twin, tuple | list):
        return type(twin)(_wrapped(like, *pair) for pair in zip(made, twin, strict=True))
    if not isinstance(twin, torch.Tensor):
        return None
    dtype = twin.dtype if twin.is_floating_point() else torch.int64
    found = SharedTensor(
        like.session, made, twin.shape, dtype, strides=twin.stride(), offset=int(twin.storage_offset())
    )
    found.flags = twin.dtype == torch.bool
    return found

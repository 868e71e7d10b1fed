"""`PointerTensor`: a tensor that lives on a worker, used like any other.

Every torch call on a pointer becomes one posted op (`planrt.workers.pointers.dispatch`); the result is a pointer at
once, with shape and dtype, and the values stay where they are until `get`. A pointer sits above autograd
(``__torch_function__``): gradients are computed by the worker that owns the data.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

import torch

from planrt.deadlines import bounded
from planrt.errors import LocalError, OptionError, RemoteOpError, RemoteValueError
from planrt.loop import run
from planrt.plans.running.inference import Spec
from planrt.types import as_whole
from planrt.workers.pointers import kinds
from planrt.workers.pointers.handle import (  # noqa: F401 - some were here, and are imported from here
    Handle,
    ObjectPointer,
    Pointer,
    PointsToObject,
    alive,
    handle_at,
    not_copied,
)
from planrt.workers.pointers.printing import gone_words, pointer_card, tag_lines
from planrt.workers.pointers.workplace import Location
from planrt.workers.wire import messages as m
from planrt.workers.wire.objects import new_id, spec_from_wire

if TYPE_CHECKING:
    from planrt.workers.base import BaseWorker


class IdProvider:
    """New ids, by the name that PySyft 0.2 had for it: ``planrt.ID_PROVIDER.pop()``."""

    def pop(self, *args: object) -> int:
        """See `new_id`."""
        return new_id()


ID_PROVIDER = IdProvider()


class PointerTensor(PointsToObject, torch.Tensor):
    """A tensor on a worker.

    Attributes (besides those of `torch.Tensor`, which answer without asking the worker):
        location: the worker. id_at_location: the object's id there. id: the pointer's own id, here.
        owner: the worker that stands for this process. tags, description: as the object was given them.
    """

    _handle: Handle
    _spec: Spec
    _id: int

    def __new__(
        cls,
        location: Any = None,
        id_at_location: Any = None,
        owner: object = None,
        id: int | None = None,
        garbage_collect_data: bool = False,
    ) -> PointerTensor:
        """``PointerTensor(location=bob, id_at_location=x.id)`` points to a tensor of this client that is there. It
        stays when the pointer goes, unless with `garbage_collect_data`. `owner` is taken, and is this process.

        Raises:
            OptionError: no worker, no id, or no tensor. UnknownObjectError: there is nothing under that id.
        """
        handle_at(location, id_at_location)
        pointer: PointerTensor = location.workplace.objects.tensor_at(id_at_location)
        if garbage_collect_data:
            pointer._handle.owned = True
        if id is not None:
            give_id(pointer, as_whole(id, "id"))
        return pointer

    def __init__(self, *args: Any, **options: Any) -> None:
        """All was done when it was made."""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        from planrt.workers.pointers.dispatch import dispatch

        return dispatch(func, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:  # type: ignore[override]
        """Reached only by code that goes around ``__torch_function__``: there is no data here to compute on."""
        raise RemoteOpError(
            f"{func} was called below torch's Python functions (by TorchScript or a C++ extension, say): pointers "
            "have no values here; get() them first"
        )

    def __array_function__(self, function: Any, types: Any, args: Any, kwargs: Any) -> NoReturn:
        """NumPy's functions need the values."""
        raise RemoteValueError(
            f"numpy.{function.__name__} reads the value of a tensor that is on a worker: write .get() first, or use "
            f"torch's function"
        )

    def __hash__(self) -> int:
        """As `torch.Tensor` has it: dictionaries find a parameter again after it was sent."""
        return id(self)

    @property
    def child(self) -> PointerTensor:
        """This pointer: in PySyft 0.2 a wrapper held the pointer, here it is both."""
        return self

    @property
    def is_wrapper(self) -> bool:
        """True, as of what held a pointer in PySyft 0.2."""
        return True

    @bounded
    def get(self, user: str | None = None, reason: str = "", *, timeout: float | None = None) -> Any:
        """Returns the value, with the `requires_grad` and `.grad` that it has there; the worker forgets the object.

        Of a pointer to a pointer, that is the pointer. The object goes once its value has arrived: whatever
        fails, it is still there. `user` is refused, with what to write instead; `reason` is taken, and not passed on.

        Raises:
            RemoteError: the op that made it, or one before it, failed; names the op, its line and the worker.
            GetNotPermittedError: it is private. GonePointerError: it was used up before. WorkerLostError.
            ReplyTooLargeError: it is larger than this client takes.
        """
        refuse_user(user)
        return alive(self).place.objects.fetch(self)

    @bounded
    async def async_get(
        self, user: str | None = None, reason: str = "", *, timeout: float | None = None
    ) -> Any:
        """`get`, to be awaited on any loop."""
        refuse_user(user)
        return await alive(self).place.objects.fetch_async(self)

    def combine(self, *others: PointerTensor) -> Any:
        """This pointer and `others`, each on a worker of its own, as one `MultiPointerTensor`."""
        return combine_pointers(self, *others)

    @bounded
    def get_(self, *, timeout: float | None = None) -> PointerTensor:
        """`get` in place: this object, made a pointer by ``send_``, becomes a tensor again."""
        become_tensor(self, alive(self).place.objects.fetch(self))
        return self

    def set_(self, source: Any = None, *args: Any, **kwargs: Any) -> PointerTensor:
        """Takes the memory of another remote tensor. torch lets `Tensor.set_` be overridden only here."""
        from planrt.workers.pointers.autograd import set_memory

        return set_memory(self, source, *args, **kwargs)

    def copy(self) -> PointerTensor:
        """Makes a copy on the same worker; returns a pointer to it."""
        return self.clone()  # type: ignore[return-value]

    @bounded
    def move(
        self, worker: BaseWorker, requires_grad: bool = False, *, timeout: float | None = None
    ) -> PointerTensor:
        """Moves the object to `worker`, straight from its own, in place: returns this pointer, which points there.

        The object keeps its id, if that is free there. What moved is a leaf of autograd again. Of a pointer to a
        pointer, the pointer moves that it points to. If it fails, this still points to the object. `requires_grad`, by
        which PySyft 0.2 passed gradients on from worker to worker, is refused.

        Raises:
            RemoteError: one of the workers could not. GetNotPermittedError: it is private. WorkerLostError.
        """
        refuse_options("move", requires_grad=requires_grad)
        return alive(self).place.moves.move(self, worker)

    @bounded
    def remote_send(self, worker: BaseWorker, *, timeout: float | None = None) -> PointerTensor:
        """Moves the object to `worker` and leaves a pointer to it where it was, which this pointer points to."""
        here = alive(self)
        here.place.moves.move(self, worker)
        if worker is not here.worker:
            take_place(self, self._handle.place.moves.hand_over(self, here.worker))
        return self

    @bounded
    def remote_get(self, *, timeout: float | None = None) -> PointerTensor:
        """Brings what the pointer on the worker points to there, in place: ``x.send(bob).send(alice).remote_get()``
        points to a tensor on alice.

        Raises:
            LocalError: this points to a tensor. RemoteError, WorkerLostError: as of `move`.
        """
        return run(self.async_remote_get(), instead="await pointer.async_remote_get()")

    @bounded
    async def async_remote_get(self, *, timeout: float | None = None) -> PointerTensor:
        """`remote_get`, to be awaited on any loop."""
        return await alive(self).place.moves.remote_get_async(self)

    @bounded
    async def async_move(
        self, worker: BaseWorker, requires_grad: bool = False, *, timeout: float | None = None
    ) -> PointerTensor:
        """`move`, to be awaited on any loop."""
        refuse_options("move", requires_grad=requires_grad)
        return await alive(self).place.moves.move_async(self, worker)

    @bounded
    def send(self, worker: BaseWorker, *, timeout: float | None = None) -> PointerTensor:
        """Gives `worker` this pointer: the result points to it there. `get` brings it back."""
        return alive(self).place.moves.hand_over(self, worker)

    @bounded
    async def async_send(self, worker: BaseWorker, *, timeout: float | None = None) -> PointerTensor:
        """`send`, to be awaited on any loop."""
        return await alive(self).place.moves.hand_over_async(self, worker)

    def send_(self, worker: BaseWorker, **options: Any) -> NoReturn:
        """Not for pointers: `send` returns a new one."""
        raise RemoteOpError(
            "this is a pointer already: send() makes a pointer to it, move() moves what it points to"
        )

    @bounded
    async def async_grad(self, *, timeout: float | None = None) -> PointerTensor | None:
        """`grad`, to be awaited on any loop: it may have to wait for a backward pass."""
        return await alive(self).place.objects.gradient(self)

    def _repr_html_(self) -> str:
        attributes, spec = self.__dict__, self._spec
        facts = [("shape", list(spec.shape)), ("dtype", spec.dtype), ("requires grad", spec.requires_grad)]
        return pointer_card(
            self, "PointerTensor", attributes.get("_tags", ()), attributes.get("_description", ""), facts
        )


def combine_pointers(*pointers: PointerTensor) -> Any:
    """One `MultiPointerTensor` that stands for `pointers`, each on a worker of its own.

    Raises:
        OptionError: one of them is no pointer. MixedLocationsError: two are on the same worker.
    """
    from planrt.workers.pointers.multi import MultiPointerTensor  # it imports this module

    if not pointers or not all(isinstance(one, PointerTensor) for one in pointers):
        raise OptionError("combine_pointers takes pointers: send() the tensors first")
    return MultiPointerTensor.of(pointers)


def refuse_user(user: object) -> None:
    """Says how a client shows whose it is, where PySyft 0.2 took anybody's word."""
    if user is not None:
        raise OptionError(
            "user= is not taken: a client shows a token when it connects, with WebsocketClientWorker(..., token=...) "
            "or worker.connect_as(token), and gets what its user may see"
        )


_GRADIENTS_STAY = (
    "gradients do not pass from worker to worker: send y.detach().requires_grad_() instead, and after the backward "
    "pass there write y.backward(pointer.grad.get())"
)
_NOT_TAKEN = {
    "requires_grad": _GRADIENTS_STAY,
    "local_autograd": "gradients of pointers are computed on their worker: call loss.backward()",
    "preinitialize_grad": "gradients are there after a backward pass: set x.grad before send()",
    "user": "a token says who asks: worker.connect_as(token), or WebsocketClientWorker(..., token=...)",
}


def refuse_options(call: str, **options: object) -> None:
    """Says what to write instead of options of PySyft 0.2's that were set; those that are false are its defaults.

    Raises:
        OptionError: one of them is set.
    """
    for name, value in options.items():
        if value:
            raise OptionError(f"{call} takes no {name}=: {_NOT_TAKEN[name]}")


_base: Any = torch.Tensor._make_wrapper_subclass
_no_function = torch._C.DisableTorchFunctionSubclass


def make_pointer(handle: Handle, spec: Spec) -> PointerTensor:
    """Makes a pointer to the object that `handle` holds."""
    pointer: PointerTensor = _base(PointerTensor, spec.shape, strides=spec.stride, dtype=spec.dtype)
    pointer._handle = handle
    pointer._spec = spec
    return pointer


class PointerParameter(PointerTensor, torch.nn.Parameter):
    """A module's parameter while its module is on a worker: the same object, of another class."""

    def __new__(cls, *args: Any, **kwargs: Any) -> PointerParameter:
        """Never made like this: `become_pointer` turns parameters into these."""
        raise RemoteOpError("send a module to get remote parameters: module.send(worker)")


def become_pointer(tensor: torch.Tensor, handle: Handle, spec: Spec) -> None:
    """Turns `tensor`, in place, into a pointer: whoever refers to it goes on doing so (as torch's own
    `UninitializedParameter` does). Its memory here is freed.
    """
    with _no_function():
        if isinstance(tensor, PointerTensor):
            pass
        elif isinstance(tensor, torch.nn.Parameter):
            tensor.grad = None
            tensor.data = torch.empty(0, dtype=tensor.dtype)
            tensor.__class__ = PointerParameter
        else:
            tensor.grad = None
            if tensor.grad_fn is not None:
                tensor.detach_()
            tensor.data = torch.empty(0, dtype=tensor.dtype)
            tensor.__class__ = PointerTensor
    tensor._handle = handle  # type: ignore[attr-defined]
    tensor._spec = spec  # type: ignore[attr-defined]


def take_place(pointer: PointerTensor, other: PointerTensor) -> None:
    """Makes `pointer` point to what `other` points to, which points to nothing from here on."""
    pointer._handle, pointer._spec = other._handle, other._spec
    pointer.__dict__.pop("_grad_pointer", None)
    other._handle = Handle(other._handle.worker, 0, owned=False)
    other._handle.alive = False


def become_tensor(pointer: PointerTensor, value: torch.Tensor) -> None:
    """Turns a pointer that `become_pointer` made back into the tensor it was, with `value`'s data and gradient."""
    with _no_function():
        if not is_swapped(pointer):
            raise RemoteOpError("get_() needs a pointer made by send_(): write x = x.get()")
        is_parameter = isinstance(pointer, PointerParameter)
        del pointer._handle, pointer._spec
        pointer.__class__ = torch.nn.Parameter if is_parameter else torch.Tensor  # type: ignore[assignment]
        pointer.requires_grad_(False)
        pointer.data = value.detach()
        pointer.requires_grad_(value.requires_grad)
        pointer.grad = value.grad
        pointer.__dict__.pop("_grad_pointer", None)
        give_id(pointer, pointer_id(value))


def is_swapped(pointer: PointerTensor) -> bool:
    """Returns whether a pointer has memory of its own: those of `make_pointer` have none."""
    return not torch._C._dispatch_keys(pointer).has(torch._C.DispatchKey.Python)


# How a pointer prints: nothing is asked of the worker. Tags and descriptions of what was found are others' words.


def describe(pointer: PointerTensor) -> str:
    """``(Wrapper)>[PointerTensor | me:ID -> bob:ID]`` and what tags, description and shape are known."""
    handle = pointer._handle
    chain = "".join(f" -> {worker.id}" for worker in handle.via)
    suffix = ("::grad" if pointer.__dict__.get("_is_grad") else "") + gone_words(handle)
    text = f"[PointerTensor | me:{pointer_id(pointer)} -> {handle.worker.id}:{handle.id}{chain}]{suffix}"
    tags = pointer.__dict__.get("_tags", ())
    description = pointer.__dict__.get("_description", "")
    if tags or description:
        text += tag_lines(tags, description, f"\n\tShape: {list(pointer._spec.shape)}")
    return f"(Wrapper)>{text}"


def pointer_id(tensor: torch.Tensor) -> int:
    """Returns the id of a tensor or pointer in this process, which it gets at the first question."""
    found = tensor.__dict__.get("_id")
    if found is None or found[1] != id(tensor):  # a deep copy takes its original's attributes along
        return give_id(tensor, new_id())
    return int(found[0])


def give_id(tensor: torch.Tensor, number: int) -> int:
    """Makes `number` the id of `tensor`."""
    tensor.__dict__["_id"] = (number, id(tensor))
    return number


def _found(worker: Location, found: m.FoundItem) -> PointerTensor:
    """Returns a pointer to a tensor that a search found."""
    if found.spec is None:
        raise LocalError(f"worker {worker.id!r} found a tensor without its shape")
    pointer = make_pointer(Handle(worker, found.id, owned=found.snapshot), spec_from_wire(found.spec))
    pointer.__dict__["_tags"], pointer.__dict__["_description"] = tuple(found.tags), found.description
    return pointer


kinds.register("tensor", _found)

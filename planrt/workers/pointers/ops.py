"""One op on pointers: its operands checked, its results foreseen, and the op posted to the worker that holds them.

Nothing is awaited where `planrt.plans.running.inference` foresees what the results will be like; where they follow
the values, the worker is asked. Apart from `planrt.workers.pointers.dispatch`, which finds out what op a torch call
is, because others come here with an op at hand: `planrt.workers.pointers.autograd` and calls of plans.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NoReturn

import numpy as np
import torch

from planrt.errors import (
    LocalError,
    MixedLocationsError,
    PlanFormatError,
    RemoteOpError,
    UnsupportedTensorError,
)
from planrt.plans.ir import ops
from planrt.plans.ir.source import is_users
from planrt.plans.recording import torch_calls
from planrt.plans.running.inference import Inferred, Same, Spec, infer, rebuild
from planrt.plans.running.modes import any_autocast, default_changed
from planrt.serde.values import DEVICE
from planrt.types import Ref, leaves, map_leaves
from planrt.workers.pointers import packed_rows
from planrt.workers.pointers.handle import Handle, alive
from planrt.workers.pointers.histories import sources_of
from planrt.workers.pointers.tensor import PointerTensor, make_pointer
from planrt.workers.wire.objects import new_id
from planrt.workers.wire.posted import Line, PostedOp

_Tensor = torch.Tensor


def apply(name: str, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Posts the op `name` to the worker of its operands; returns what `function` would, in pointers."""
    if kwargs.get("out") is not None:
        return _into(name, function, args, dict(kwargs))
    refuse_autocast(name)
    if name == "Tensor.to":
        args = _on_one_device(args)
    operands: list[PointerTensor] = []
    first: Handle | None = None

    def referred(leaf: Any) -> Any:
        nonlocal first
        if isinstance(leaf, PointerTensor):
            handle = alive(leaf)
            if first is None:
                first = handle
            elif handle.worker is not first.worker or handle.via != first.via:
                refuse_mixed(name, args, kwargs)
            operands.append(leaf)
            return Ref(handle.id)
        if isinstance(leaf, _Tensor):
            refuse_mixed(name, args, kwargs)
        if isinstance(leaf, torch.device):
            return DEVICE
        return torch_calls.without_numpy(leaf)

    wire_args, wire_kwargs = map_leaves(args, referred), map_leaves(kwargs, referred) if kwargs else {}
    if first is None:
        raise RemoteOpError(f"{name}: no pointer among the arguments")
    sources = sources_of(operands) if torch.is_grad_enabled() else None
    if name in packed_rows.LAYERS and (advice := packed_rows.advice()):
        raise RemoteOpError(f"{name} cannot run on packed rows that are on a worker: {advice}")
    seed = first.place.draw_seed() if name in ops.RANDOM else None
    line = calling_line()
    inferred = infer(name, ops.CHECKED.get(name, function), args, kwargs, PointerTensor)
    if default_changed():
        _refuse_default_dtype(name, operands, (args, kwargs), inferred)
    result = post(name, wire_args, wire_kwargs, first, inferred, operands, seed, line)
    if sources:
        first.place.gradients.histories.record(name, sources, operands, result, args, kwargs)
    return result


def refuse_autocast(name: str) -> None:
    """Raises RemoteOpError under `torch.autocast`, which is this thread's and does not reach the worker."""
    if any_autocast():
        raise RemoteOpError(
            f"{name}: torch.autocast does not reach workers, where the op would run in its operands' dtypes: leave the "
            "block, and write pointer.to(torch.bfloat16) or model.to(torch.bfloat16)"
        )


def refuse_hooks(tensor: torch.Tensor, name: str) -> None:
    """Raises LocalError for hooks on the gradient of `tensor`: backward passes run on the worker, and call none."""
    if torch_calls.hooked(tensor):
        raise LocalError(
            f"{name} has hooks on its gradient (register_hook or register_post_accumulate_grad_hook), which would not "
            "run on a worker: remove them before send(), and change the gradient (pointer.grad) after backward()"
        )


def _refuse_default_dtype(
    name: str, operands: list[PointerTensor], given: Any, inferred: Inferred | None
) -> None:
    """Raises RemoteOpError where a result would have the default dtype of this process, which workers do not have."""
    default = torch.get_default_dtype()
    if any(one.dtype == default for one in operands) or torch.dtype in map(type, leaves(given)):
        return
    made = leaves(inferred.results) if inferred is not None else ()
    if any(type(one) is Spec and one.dtype == default for one in made):
        raise RemoteOpError(
            f"{name}: its result follows torch.set_default_dtype({default}), which workers do not have: give the "
            f"dtype, for instance pointer.to({default})"
        )


def post(
    name: str,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    at: Handle,
    inferred: Inferred | None,
    operands: list[PointerTensor],
    seed: int | None,
    line: Line | None,
) -> Any:
    """Posts an op with wire arguments to where the object of `at` is; returns pointers to what was inferred, at once.
    Where nothing was, it waits for the worker to tell.
    """
    place, worker, via = at.place, at.worker, at.via
    if inferred is None:
        op = PostedOp(name, args, kwargs, None, torch.is_grad_enabled(), seed, place.take_drops())
        return place.call(packed(op, at), via=via)
    handles: list[Handle] = []

    def named(leaf: Any) -> Any:
        if type(leaf) is not Spec:
            return None
        handle = Handle(worker, new_id(), via)
        handles.append(handle)
        return Ref(handle.id)

    results = _wire_results(inferred.results, named)
    op = PostedOp(name, args, kwargs, results, torch.is_grad_enabled(), seed, place.take_drops())
    place.post_op(packed(op, at), line)
    for number, after in inferred.changed:
        set_spec(operands[number], after)
    return _made(inferred, operands, handles)


def _into(name: str, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``out=``: the op, and its result copied there."""
    out = kwargs.pop("out")
    result = apply(name, function, args, kwargs)
    if (
        not isinstance(out, PointerTensor)
        or not isinstance(result, PointerTensor)
        or out.shape != result.shape
    ):
        raise RemoteOpError(
            f"{name}: out= takes one pointer, of the result's shape: assign the result instead"
        )
    if not torch.can_cast(result.dtype, out.dtype):
        raise RuntimeError(
            f"{name}: a result of dtype {result.dtype} can't be cast to that of out=, {out.dtype}"
        )
    with torch.no_grad():
        return apply("Tensor.copy_", _Tensor.copy_, (out, result), {})


def packed(op: PostedOp, at: Handle) -> bytes:
    """Returns `op` as bytes, for where the object of `at` is. If it does not travel, another op frees the objects that
    it was to free.

    Raises:
        RemoteOpError: its arguments do not travel.
    """
    try:
        data = op.pack()
        if len(data) > at.place.op_bytes:
            raise PlanFormatError(f"an op of {len(data):,} bytes, over the limit of {at.place.op_bytes:,}")
        return data
    except PlanFormatError as error:
        for id in op.drop:
            at.place.forget(id)
        for leaf in leaves((op.args, op.kwargs)):
            if isinstance(leaf, np.ndarray):
                raise RemoteOpError(
                    f"{op.name}: one of its arguments is a NumPy array, which is here and not on worker "
                    f"{at.worker.id!r}: write torch.from_numpy(array).send(worker)"
                ) from None
        reason = str(error).replace("cannot stand in a plan", "cannot go to a worker with an op")
        advice = packed_rows.advice()
        raise RemoteOpError(f"{op.name}: {reason}{advice and '; '}{advice}") from None


def _wire_results(results: Any, named: Callable[[Any], Any]) -> Any:
    if type(results) is Spec:
        return named(results)
    if isinstance(results, tuple | list):
        return tuple([_wire_results(part, named) for part in results])
    parts = getattr(results, "parts", None)
    return tuple([_wire_results(part, named) for part in parts]) if parts is not None else None


def _made(inferred: Inferred, operands: list[PointerTensor], handles: list[Handle]) -> Any:
    rest = iter(handles)

    def pointer(leaf: Any) -> Any:
        if type(leaf) is Spec:
            return make_pointer(next(rest), leaf)
        return operands[leaf.operand] if type(leaf) is Same else leaf

    if type(inferred.results) is Spec:
        return make_pointer(handles[0], inferred.results)
    return rebuild(inferred.results, pointer)


def set_spec(pointer: PointerTensor, after: Spec) -> None:
    """Sets what is known here of the tensor behind `pointer`, which an op has changed in place: it looks like `after`
    now.
    """
    pointer._spec = after


def calling_line() -> Line | None:
    """Returns the line of the user's code that makes this op."""
    frame = sys._getframe(2)
    while frame is not None and not is_users(frame.f_code.co_filename):
        frame = frame.f_back  # type: ignore[assignment]
    return (frame.f_code, frame.f_lineno) if frame is not None else None


def _on_one_device(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """`x.to("cuda")`, `x.to(0)`: a remote tensor stays on its worker's device."""
    if len(args) > 1 and isinstance(args[1], str | int):
        return (args[0], torch.device("cpu"), *args[2:])
    if len(args) > 1 and isinstance(args[1], _Tensor):
        return (args[0], args[1].dtype, *args[2:])
    return args


def place_of(leaf: Any) -> str:
    """Returns the place of a tensor in words, for messages."""
    if isinstance(leaf, PointerTensor):
        chain = "".join(f" -> {worker.id}" for worker in leaf._handle.via)
        return f"worker {leaf._handle.worker.id!r}{chain}"
    return "shares" if getattr(leaf, "in_shares", False) else "this process"


def refuse_mixed(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> NoReturn:
    """Says where the operands of `name` are, which are not in one place, and what to do.

    Raises:
        UnsupportedTensorError: one of them could not go to a worker. MixedLocationsError: otherwise.
    """
    places: list[str] = []
    for leaf in leaves((args, kwargs)):
        if isinstance(leaf, _Tensor) and (place := place_of(leaf)) not in places:
            places.append(place)
    for leaf in leaves((args, kwargs)):
        if type(leaf) is _Tensor and (leaf.is_sparse or leaf.is_quantized):
            raise UnsupportedTensorError(f"{name}: sparse and quantised tensors cannot go to a worker")
    where = " and ".join(places) if len(places) > 1 else " and ".join(places * 2)
    advice = packed_rows.advice() or (
        "write pointer.fix_precision().share(...).get() with the same workers, of a model "
        "model.fix_precision().share(...), or get() one of them"
        if "shares" in places
        else "send the local one with .send(worker), or get() the remote one"
        if "this process" in places
        else "move one of them with .move(worker)"
    )
    raise MixedLocationsError(f"{name}: its operands are in {where}; {advice}")

"""Objects as bytes, and back: `serialize` and `deserialize`. Data only; nothing in the bytes can run.

A tensor is ``89 70 74 65 6E 73 6F 72`` ("\\x89ptensor"), the length of a header (4 bytes, little-endian), the
header (MessagePack: the layout as in a frame's header, `requires_grad`, tags, description), and its elements.
Other rooms add what they have with `register`; plans are the bytes of a plan file.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from importlib import import_module
from typing import Any, Final

import torch

from planrt.errors import LocalError, OptionError, WireError
from planrt.serde.tensors import header_entries, parse_layouts, raw_bytes, tensors_in
from planrt.serde.values import pack, unpack

_TENSOR: Final = b"\x89ptensor"
_LENGTH: Final = struct.Struct("<I")
_WHERE: Final = "the bytes given to deserialize"

_OTHERS: Final = ("planrt.plans.saving",)
"""Modules of later rooms that `register` what they have. They are imported at the first call, since nothing
else that a program did need have imported them."""

_kinds: list[tuple[type, bytes, Callable[[Any], bytes], Callable[[bytes], Any]]] = []


def register(kind: type, magic: bytes, write: Callable[[Any], bytes], read: Callable[[bytes], Any]) -> None:
    """Objects of class `kind` are written by `write`, as bytes that begin with `magic`, and read by
    `read`."""
    _kinds.append((kind, magic, write, read))


def serialize(value: Any, **options: Any) -> bytes:
    """`value`, a built plan or a tensor that is here, as bytes for `deserialize`: another format than PySyft
    0.2's.

    Raises:
        OptionError: it is nothing of the kind, or options are given. LocalError: the tensor is on a worker,
            or cannot travel. PlanError: the plan is not built.
    """
    if options:
        raise OptionError(f"serialize takes no {', '.join(options)}: there is one format")
    _import_others()
    for kind, _, write, _ in _kinds:
        if isinstance(value, kind):
            return write(value)
    raise OptionError(
        f"serialize takes plans and tensors, not {type(value).__name__}: of a module, write "
        "planrt.Plan(module).build(x), or torch.save(module.state_dict(), path)"
    )


def deserialize(data: bytes, **options: Any) -> Any:
    """Returns the object that `serialize` was given.

    Raises:
        OptionError: not bytes. WireError, PlanFormatError: bytes that `serialize` did not make.
    """
    if options:
        raise OptionError(f"deserialize takes no {', '.join(options)}: there is one format")
    if not isinstance(data, bytes | bytearray | memoryview):
        raise OptionError(f"deserialize takes the bytes that serialize gave, not {type(data).__name__}")
    whole = bytes(data)
    _import_others()
    for _, magic, _, read in _kinds:
        if whole.startswith(magic):
            return read(whole)
    raise WireError("these bytes are no plan and no tensor of planrt's serialize", address=_WHERE)


def _import_others() -> None:
    for name in _OTHERS:
        import_module(name)


def _write_tensor(tensor: torch.Tensor) -> bytes:
    where = getattr(tensor, "location", None)
    if where is not None:
        raise LocalError(f"the tensor is on worker {where.id!r}: get() it first")
    labels = tensor.__dict__
    header = pack(
        [
            header_entries([tensor]),
            tensor.requires_grad,
            list(labels.get("_tags", ())),
            labels.get("_description", ""),
        ]
    )
    return b"".join([_TENSOR, _LENGTH.pack(len(header)), header, raw_bytes(tensor)])


def _read_tensor(data: bytes) -> torch.Tensor:
    start = len(_TENSOR) + _LENGTH.size
    if len(data) < start:
        raise WireError("truncated", address=_WHERE)
    (length,) = _LENGTH.unpack_from(data, len(_TENSOR))
    header, rest = data[start : start + length], data[start + length :]
    try:
        parts = unpack(header)
    except Exception as error:  # whatever MessagePack makes of it
        raise WireError("malformed header", address=_WHERE) from error
    match parts:
        case [list(layout), bool(requires_grad), list(tags), str(description)] if len(layout) == 1:
            pass
        case _:
            raise WireError("malformed header", address=_WHERE)
    layouts, size = parse_layouts(layout, address=_WHERE)
    dtype = layouts[0].dtype
    if size != len(rest) or not all(isinstance(tag, str) and 0 < len(tag) <= 200 for tag in tags):
        raise WireError(f"{size} bytes of elements were announced, and {len(rest)} came", address=_WHERE)
    if requires_grad and not (dtype.is_floating_point or dtype.is_complex):
        raise WireError(f"a tensor of {dtype} cannot require gradients", address=_WHERE)
    payload = torch.frombuffer(bytearray(rest), dtype=torch.uint8) if rest else torch.empty(0).byte()
    (tensor,) = tensors_in(payload, layouts, address=_WHERE)
    if tags:
        tensor.__dict__["_tags"] = tuple(tags)
    if description:
        tensor.__dict__["_description"] = description
    return tensor.requires_grad_(requires_grad)


register(torch.Tensor, _TENSOR, _write_tensor, _read_tensor)

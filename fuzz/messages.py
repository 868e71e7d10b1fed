"""Messages that a hostile client sends: drawn from the types of the wire, then changed.

Every type of the union of messages is among them, those of workers' answers too: whoever adds one there adds it here.
"""

from __future__ import annotations

import random
import struct
from typing import Any, Final

import msgpack
import msgspec.inspect
import torch

from fuzz.changes import changed_bytes, changed_value
from planrt.plans import func2plan
from planrt.plans.ir.chain import Chain, ChainPlan, ChainStep
from planrt.serde.dtypes import DTYPES
from planrt.serde.frames import MAGIC
from planrt.types import Ref
from planrt.workers.wire import messages as m
from planrt.workers.wire.messages import own_versions
from planrt.workers.wire.posted import PostedOp

_ENVELOPE: Final = msgspec.inspect.type_info(m.Envelope)
_BODIES: Final[list[Any]] = [
    one
    for one in next(field.type for field in _ENVELOPE.fields if field.name == "body").types  # type: ignore[attr-defined]
    if one.tag != "prove"  # of which an address has so many each second
]
_WORDS: Final = "x", "#tag", "SGD", "alice", "#", "a b", "ws://127.0.0.1:1", "float32", "é\u202e"
_OPS: Final = (
    "torch.add", "torch.mul", "Tensor.sum", "Tensor.neg_", "Tensor.t", "torch.cat", "Tensor.backward", "torch.stack",
    "Tensor.requires_grad_", "Tensor.__getitem__", "Tensor.grad", "Tensor.no_such", "os.system", "",
)  # fmt: skip
"""Small ones: what all the others do with hostile arguments is for `fuzz.ops`."""
_IDS: Final = 12
"""Objects have these ids and few others, or nothing that is asked for would be there."""
_LAST: Final = 1 << 40
"""The number of a request that ends a conversation; `asking` makes it."""


@func2plan(args_shape=[(-1,)])
def _double(x: Any) -> Any:
    return x + x


def _programs() -> tuple[bytes, ...]:
    record = _double.record
    steps = (ChainStep("first", "a", 0, (Ref(0),)), ChainStep("second", "b", 0, (Ref(1),)))
    chain = Chain(("x",), (ChainPlan(record, True),), steps, Ref(2))
    return record.to_bytes(), _double.graph.to_bytes(), chain.to_bytes()


class Messages:
    """Frames of planrt's own format, as bytes."""

    def __init__(self) -> None:
        self._programs = _programs()
        self._hashes = (_double.graph.hash, "0" * 64)

    def hello(self) -> bytes:
        """Returns a good first message."""
        hello = m.Hello("f" * 32, own_versions())
        return _frame(msgspec.to_builtins(m.Envelope(1, hello)), [], b"")

    def asking(self) -> bytes:
        """Returns a good request, answered under `LAST`."""
        return _frame(msgspec.to_builtins(m.Envelope(_LAST, m.CountObjects())), [], b"")

    def hostile(self, rng: random.Random) -> bytes:
        """Returns a frame that is wrong somewhere, or that nobody would send."""
        message, entries, payload = self.drawn(rng)
        match rng.randrange(8):
            case 0 | 1:
                message = changed_value(rng, message)
            case 2:
                entries = changed_value(rng, entries)
            case 3:
                payload = changed_bytes(rng, payload)
            case 4 | 5:
                return changed_bytes(rng, _frame(message, entries, payload))
            case 6:
                return _with_header(changed_bytes(rng, _packed([message, entries])), payload)
            case _:  # well formed, in the wrong place and about what is not there
                pass
        return _frame(message, entries, payload)

    def drawn(self, rng: random.Random) -> tuple[Any, list[Any], bytes]:
        """Returns a message of a random type that a worker's decoder takes, with the entries of its tensors and their
        bytes."""
        kind = rng.choice(_BODIES)
        body = self._value(rng, kind, kind.tag, 0)
        number = 0 if rng.random() < 0.3 else rng.choice((1, 2, 3, _LAST - 1))
        entries, payload = self._tensors(rng, kind.tag)
        return {"id": number, "body": body}, entries, payload

    def _tensors(self, rng: random.Random, tag: str) -> tuple[list[Any], bytes]:
        tensors: list[tuple[str, list[int], bytes]] = []
        if tag in ("put_plan", "store_plan", "store_protocol") and rng.random() < 0.9:
            program = rng.choice(self._programs)
            if rng.random() < 0.7:
                program = changed_bytes(rng, program)
            tensors.append(("uint8", [len(program)], program))
        for _ in range(rng.choice((0, 0, 1, 1, 2, 3))):
            name = rng.choice(list(DTYPES))
            shape = [rng.randrange(4) for _ in range(rng.randrange(4))]
            nbytes = torch.Size(shape).numel() * DTYPES[name].itemsize
            tensors.append((name, shape, rng.randbytes(nbytes) if name != "bool" else bytes(nbytes)))
        payload = b""
        for _, _, data in tensors:
            payload += bytes(-len(payload) % 64) + data
        return [[name, shape] for name, shape, _ in tensors], payload

    def _op(self, rng: random.Random) -> bytes:
        def argument() -> Any:
            return rng.choice(
                (Ref(rng.randrange(_IDS)), rng.randrange(-2, 4), 0.5, None, (0, 1), slice(None), "x")
            )

        args = tuple(argument() for _ in range(rng.randrange(4)))
        results = rng.choice((None, Ref(rng.randrange(_IDS)), (Ref(0), Ref(1))))
        drop = tuple(rng.randrange(_IDS) for _ in range(rng.choice((0, 0, 2))))
        packed = PostedOp(rng.choice(_OPS), args, {}, results, rng.random() < 0.5, None, drop).pack()
        return changed_bytes(rng, packed) if rng.random() < 0.6 else packed

    def _value(self, rng: random.Random, kind: Any, name: str, depth: int) -> Any:
        """A builtin that stands for a value of that type."""
        match kind:
            case msgspec.inspect.StructType():
                values = {
                    field.encode_name: self._value(rng, field.type, field.name, depth + 1)
                    for field in kind.fields
                    if field.required or kind.array_like or rng.random() < 0.6
                }
                if kind.array_like:
                    return list(values.values())
                return values if kind.tag is None else {"type": kind.tag, **values}
            case msgspec.inspect.UnionType():
                return self._value(rng, rng.choice(kind.types), name, depth)
            case msgspec.inspect.LiteralType():
                return rng.choice(kind.values)
            case msgspec.inspect.BoolType():
                return rng.random() < 0.5
            case msgspec.inspect.IntType():
                low = -3 if kind.ge is None else kind.ge
                return min(rng.randrange(low, low + _IDS), 2**63 - 1 if kind.le is None else kind.le)
            case msgspec.inspect.FloatType():
                if (kind.gt, kind.ge, kind.lt, kind.le) == (None,) * 4:
                    return rng.choice((0.0, 1.5, float("nan")))
                return min(1.5, 1.5 if kind.le is None else kind.le)
            case msgspec.inspect.StrType():
                if kind.pattern is not None:
                    digits = 32 if "{32}" in kind.pattern else 64  # a ticket's id, or a hash
                    return rng.choice(self._hashes)[:digits]
                if name in ("token", "proof") and not kind.min_length:
                    return ""  # wrong ones are slowed down
                return rng.choice(_WORDS)[: kind.max_length or 200].ljust(kind.min_length or 0, "x")
            case msgspec.inspect.BytesType():
                if name in ("op", "ops"):
                    return self._op(rng)
                least = kind.min_length or 0
                return rng.randbytes(rng.randrange(least, 1 + min(least + 40, kind.max_length or 2**20)))
            case msgspec.inspect.ListType():
                # What has a tag stays when its session ends: a worker that is full of that has not grown by mistake.
                most = 3 if kind.max_length is None else min(3, kind.max_length)
                count = 0 if name == "tags" else max(kind.min_length or 0, rng.randint(0, most))
                return [self._value(rng, kind.item_type, name, depth + 1) for _ in range(count)]
            case msgspec.inspect.TupleType():
                return [self._value(rng, item, name, depth + 1) for item in kind.item_types]
            case msgspec.inspect.DictType():
                return {
                    self._value(rng, kind.key_type, name, depth + 1): self._value(rng, kind.value_type, name, depth + 1)
                    for _ in range(rng.randrange(3))
                }  # fmt: skip
            case _:
                return None


LAST: Final = _LAST


def _packed(value: Any) -> bytes:
    packed = msgpack.packb(value, unicode_errors="surrogatepass")
    assert isinstance(packed, bytes)
    return packed


def _frame(message: Any, entries: Any, payload: bytes) -> bytes:
    try:
        header = _packed([message, entries])
    except (ValueError, OverflowError, RecursionError):  # beyond what msgpack packs
        header = b"\xc1"
    return _with_header(header, payload)


def _with_header(header: bytes, payload: bytes) -> bytes:
    return MAGIC + struct.pack("<I", len(header)) + header + payload

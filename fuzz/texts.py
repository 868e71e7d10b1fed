"""``python -m fuzz.texts --tries N --seed S``: plans as text, as bytes and as files, changed and made up.

What is read has to be what was written: a text is printed again as it was, bytes are encoded again to the same bytes, a
file that is saved again is the same file. Files are changed with and without digests that fit.

Exit codes: 0 nothing found, 1 findings, 2 wrong options.
"""

from __future__ import annotations

import hashlib
import io
import random
import struct
import sys
import warnings
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Final

import msgpack

from fuzz.changes import changed_bytes, changed_text, changed_value
from fuzz.reading import Try, Wrong, main
from fuzz.rows import names, random_plan
from planrt.errors import ExecutionError, OpNotAllowedError, PlanArgumentError, PlanFormatError
from planrt.plans.forms import files
from planrt.plans.ir.graph import Graph
from planrt.plans.ir.parsing import parse
from planrt.plans.ir.record import PlanRecord, state_hash, with_names
from planrt.plans.policy.rules import Policy
from planrt.plans.policy.verify import check

_REFUSED: Final = (PlanFormatError, OpNotAllowedError)
_PLANS: Final = 12
_LARGE: Final = (0, 1, 2, 200, 5_000, 60_000)


@cache
def _sources() -> list[tuple[Graph, bytes, bytes]]:
    """Plans, each as its graph, the bytes of its record, and those of a file that holds it."""
    made = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number in range(_PLANS):
            graph, state = random_plan(f"texts {number}", names())
            data = with_names(replace(graph, name="f", doc="What it does.", input_names=("x", "y")))
            record = PlanRecord.from_bytes(data)
            file = io.BytesIO()
            described = files.PlanFile(
                record, False, ("#a",), "a plan", state_hash(state), {},
                sum(one.numel() * one.element_size() for one in state),
            )  # fmt: skip
            files.write(file, described, state)
            made.append((record.graphs[0], data, file.getvalue()))
    return made


def draws(rng: random.Random, folder: Path) -> Try:
    """A text, bytes or a file, and what reads it."""
    graph, record, file = rng.choice(_sources())
    match rng.randrange(7):
        case 0 | 1:
            others = str(rng.choice(_sources())[0])
            lines = _text(graph)
            return _of_text("a changed text", changed_text(rng, lines, others))
        case 2:
            return _of_text("a text made up", _made_up(rng))
        case 3:
            return Try("bytes of a record", lambda: _record(changed_bytes(rng, record)), _REFUSED)
        case 4:
            data = _changed_record(rng, record)
            return Try("values of a record", lambda: _record(data), _REFUSED)
        case 5:
            return _of_file("bytes of a file", changed_bytes(rng, file), folder)
        case _:
            return _of_file("values of a file", _file(rng, file), folder)


def _text(graph: Graph) -> str:
    """The text of a plan, without its hash, which every change would break."""
    first, _, rest = str(graph).partition("\n")
    return f"{first.partition(' sha256:')[0]}\n{rest}"


def _of_text(about: str, text: str) -> Try:
    def read() -> None:
        graph = parse(text)
        if parse(str(graph)) != graph or Graph.from_bytes(graph.to_bytes()).hash != graph.hash:
            raise Wrong("what was read is printed as something else")
        _check(graph)

    return Try(about, read, _REFUSED)


def _check(graph: Graph) -> None:
    """What an owner's policy makes of it, in bounded time."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            report = check(graph, Policy(approval="open", max_check_seconds=2.0))
            text = str(report)
    except (PlanArgumentError, ExecutionError):
        return
    if not text.replace("\n", "").isprintable():
        raise Wrong("its page has characters that no terminal can show")


def _made_up(rng: random.Random) -> str:
    count = rng.choice(_LARGE)
    opening, closing = rng.choice((("(", ")"), ("[", "]"), ("{'a': ", "}"), ("slice(", ")"), ("'", "'")))
    argument = rng.choice((
        opening * count + "1" + closing * count, "9" * count, "-" * count + "1", "1e" + "9" * count, "'" + "x" * count,
        ", ".join(["_0"] * count), "_" + "1" * count, '"' + "\\x00" * count + '"', "0." + "0" * count, "_0" * count,
    ))  # fmt: skip
    lines = ["plan " + rng.choice(("f", "f" * count, "", "\u202e", "f sha256:" + "0" * count))]
    lines += [f"    _{number} x{number}: input float32[{rng.choice(('3', '*', '-1', '9' * 30, argument))}]"
              for number in range(rng.choice((0, 1, 1, 3)))]  # fmt: skip
    name = rng.choice(
        ("torch.add", "Tensor.add_", "torch.relu", "os.system", "torch", "nn.functional.linear")
    )
    op = f"    _{len(lines) - 1} = {name}({argument})"
    lines += [op] * rng.choice((0, 1, 1, 2, 300))
    lines.append(rng.choice(("    return _0", "    return", f"    return {argument}", "")))
    return rng.choice(("\n", "\n", "\r\n", "\n\n\n")).join(lines)[:300_000]


# Bytes


def _record(data: bytes) -> None:
    if PlanRecord.from_bytes(data).to_bytes() != data:
        raise Wrong("a record is encoded again to other bytes")


def _of_file(about: str, data: bytes, folder: Path) -> Try:
    path = folder / "plan"
    path.write_bytes(data)

    def read() -> None:
        files.load_file(path)
        described, state = files.read(path)
        again = io.BytesIO()
        files.write(again, described, state)
        if again.getvalue() != data:
            raise Wrong("a file is written again with other bytes")

    return Try(about, read, _REFUSED)


_PREFIX: Final = struct.Struct("<8sIQQ")


def _file(rng: random.Random, data: bytes) -> bytes:
    """A file whose parts are others, and whose lengths and digests mostly fit these."""
    magic, version, length, size = _PREFIX.unpack_from(data)
    header = msgpack.unpackb(data[_PREFIX.size : _PREFIX.size + length], strict_map_key=False)
    state = data[_PREFIX.size + length + 32 :][:size]
    match rng.randrange(4):
        case 0:
            header[0] = _changed_record(rng, header[0])
        case 1:
            state = rng.choice((b"", state * 2, changed_bytes(rng, state)))
        case _:
            header = changed_value(rng, header)
    packed = _packed(header)
    version = version if rng.random() < 0.9 else rng.choice((0, 2, 2**32 - 1))
    told = [len(packed), len(state)]
    if rng.random() < 0.1:
        told[rng.randrange(2)] = rng.choice((0, 2**31, 2**63, 2**64 - 1))
    whole = _PREFIX.pack(magic, version, *told) + packed
    whole += hashlib.sha256(whole).digest() + state
    return whole + hashlib.sha256(whole).digest()


def _changed_record(rng: random.Random, data: bytes) -> bytes:
    """The bytes of a record with other values in it, or in the graph that it holds."""
    values = msgpack.unpackb(data, strict_map_key=False)
    if rng.random() < 0.3:
        return _packed(changed_value(rng, values))
    graph = msgpack.unpackb(values[-1], strict_map_key=False)
    values[-1] = _packed(changed_value(rng, graph))
    return _packed(values)


def _packed(value: object) -> bytes:
    """MessagePack bytes of any values; what it cannot hold is left to be a text."""
    try:
        packed: bytes = msgpack.packb(value, default=str)
    except (ValueError, OverflowError, RecursionError, UnicodeEncodeError):
        packed = msgpack.packb([str(type(value))])
    return packed


if __name__ == "__main__":
    sys.exit(main("fuzz.texts", __doc__ or "", draws))

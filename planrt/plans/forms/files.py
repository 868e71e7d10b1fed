"""Plans as files: `Plan.save` writes one, `load_plan` reads it. Data only; nothing in a file can run on
loading.

Format 1, all numbers little-endian and unsigned:

    offset    bytes  what
    0         8      magic: 89 70 6C 61 6E 72 74 0A  ("\\x89planrt\\n")
    8         4      format version: 1
    12        8      length of the header, H
    20        8      length of the state, S
    28        H      header, MessagePack (below)
    28+H      32     SHA-256 of all bytes before it
    60+H      S      state: the tensors of the record's state, in its order, nothing between them; each is its
                     elements in row-major order, in the dtype and shape that the record gives
    60+H+S    32     SHA-256 of all bytes before it

The header is the array ``[record, training, tags, description, state hash, keys]``: the bytes of a
`PlanRecord`; whether the plan is in training mode; a list of strings; a string; the hex digits that
`Plan.state_hash` returns; and pairs ``[key, name]``, which say what `state_dict()` calls the state. Tied
weights are one tensor with two keys, what a function captured is a tensor with none.

The first digest lets `load_file` trust the header without reading the state. Every length is compared with
the size of the file, and with what the record needs, before memory is taken for it.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import secrets
import stat
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final, TypeAlias, cast

import torch

from planrt.errors import OptionError, PlanFormatError
from planrt.plans.ir.record import PlanRecord, state_hash
from planrt.serde.tensors import raw_bytes
from planrt.serde.values import pack, unpack

if TYPE_CHECKING:
    from _hashlib import HASH

FILE_VERSION: Final = 1
MAX_HEADER: Final = 256 * 2**20
"""Longest header, in bytes, that is read."""

MAGIC: Final = b"\x89planrt\n"
_PREFIX: Final = struct.Struct("<8sIQQ")
_DIGEST: Final = hashlib.sha256().digest_size
_MAX_TAG, _MAX_DESCRIPTION = 200, 64_000

AnyPath: TypeAlias = "str | os.PathLike[str]"


@dataclass(frozen=True)
class PlanFile:
    """All of a plan file but the values of the state.

    Attributes:
        record: the plan: its name, signature and ops.
        training: whether it was saved in training mode.
        tags, description: as `Plan.tag` and `Plan.describe` set them.
        state_hash: what `Plan.state_hash` returns once it is loaded.
        keys: what `state_dict()` calls the state: key -> name in the record.
        state_bytes: size of the state in bytes.
    """

    record: PlanRecord
    training: bool
    tags: tuple[str, ...]
    description: str
    state_hash: str
    keys: Mapping[str, str]
    state_bytes: int


def write(path: AnyPath | BinaryIO, described: PlanFile, state: Sequence[torch.Tensor]) -> None:
    """Writes a plan and its state to a file. What stands at `path` is replaced at the end, or not at all.

    Raises:
        OptionError: it is too large for a file, or the file cannot be written.
    """
    if len(described.description) > _MAX_DESCRIPTION:
        raise OptionError(
            f"a plan with a description of more than {_MAX_DESCRIPTION} characters cannot be saved"
        )
    values = [raw_bytes(tensor) for tensor in state]
    header = pack(
        [
            described.record.to_bytes(),
            described.training,
            sorted(described.tags),
            described.description,
            described.state_hash,
            [[key, name] for key, name in described.keys.items()],
        ]
    )
    if len(header) > MAX_HEADER:
        name = described.record.name
        raise OptionError(f"plan {name!r} is too large for a file: its ops take {len(header)} bytes")
    with _written_to(path) as file:
        digest = hashlib.sha256()
        prefix = _PREFIX.pack(MAGIC, FILE_VERSION, len(header), sum(value.nbytes for value in values))
        for part in (prefix, header):
            _write(file, part, digest)
        _write(file, digest.digest(), digest)
        for value in values:
            _write(file, value, digest)
        file.write(digest.digest())


def read(path: AnyPath | BinaryIO) -> tuple[PlanFile, list[torch.Tensor]]:
    """Reads a plan file, and the state in it, onto the CPU.

    Raises:
        OptionError, PlanFormatError, OpNotAllowedError: as `planrt.load_plan`.
    """
    with _reading(path) as (file, size):
        digest = hashlib.sha256()
        found = _header(file, size, digest)
        state = [
            _tensor(file, entry.spec.shape, entry.spec.dtype, digest, entry.name)
            for entry in found.record.state
        ]
        if _read(file, _DIGEST) != digest.digest():
            raise PlanFormatError("its SHA-256 is not that of its bytes: the file has been altered")
        if state_hash(state) != found.state_hash:
            raise PlanFormatError("malformed plan file: the hash of the state is not the one it announces")
        return found, state


def is_plan_file(path: AnyPath) -> bool:
    """Returns whether the file at `path` begins as a plan file does.

    Raises:
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def load_file(path: AnyPath) -> PlanFile:
    """Reads a plan file without its state: for those who want to know what they have before they load it.

    Raises:
        OptionError, PlanFormatError, OpNotAllowedError: as `load_plan`; an altered state is not noticed.
    """
    with _reading(path) as (file, size):
        return _header(file, size, hashlib.sha256())


# Writing


@contextlib.contextmanager
def _written_to(target: AnyPath | BinaryIO) -> Iterator[BinaryIO]:
    """`target` itself where it is a binary file that is open for writing, or else a new file; see
    `replacing`."""
    if isinstance(target, io.TextIOBase):
        raise OptionError("cannot save to a text file: open it in binary mode, or give its path")
    if isinstance(target, str | os.PathLike) or not hasattr(target, "write"):
        with replacing(cast(AnyPath, target)) as file:  # or what is neither, which is refused
            yield file
        return
    whole = io.BytesIO()
    yield whole
    try:
        target.write(whole.getbuffer())
    except (OSError, ValueError) as error:
        raise OptionError(f"cannot save to {target!r}: {error}") from error


@contextlib.contextmanager
def replacing(path: AnyPath) -> Iterator[BinaryIO]:
    """Opens a new file that takes the place of `path` when all has been written, and goes if it has not.

    Raises:
        OptionError: a place that cannot be written.
    """
    path = Path(os.path.realpath(_path(path)))  # a link stays, what it points to is replaced
    if path.is_dir():
        raise OptionError(f"cannot save to {path}: it is a directory; name a file in it")
    beside = path.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        try:
            with open(beside, "xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, path)
        except BaseException:
            beside.unlink(missing_ok=True)
            raise
        _sync_directory(path.parent)
    except OSError as error:
        raise OptionError(f"cannot save to {path}: {error.strerror or error}") from error


def _sync_directory(directory: Path) -> None:
    """So that the new name survives a power cut, where the system can do that."""
    with contextlib.suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _write(file: BinaryIO, part: bytes | memoryview, digest: HASH) -> None:
    file.write(part)
    digest.update(part)


# Reading


def _path(path: AnyPath) -> Path:
    try:
        return Path(path)
    except TypeError:
        raise OptionError(f"a plan file is named by its path, not by {type(path).__name__}") from None


@contextlib.contextmanager
def _reading(path: AnyPath | BinaryIO) -> Iterator[tuple[BinaryIO, int]]:
    """The open file and its size; errors inside name the file."""
    if not isinstance(path, str | os.PathLike) and hasattr(path, "read"):
        data = path.read()
        if not isinstance(data, bytes):
            raise OptionError("a plan is read from a file that is open in binary mode")
        yield io.BytesIO(data), len(data)
        return
    where = _path(cast(AnyPath, path))
    try:
        mode = os.stat(where).st_mode  # before it is opened: opening a pipe would wait
        if stat.S_ISDIR(mode):
            raise OptionError(f"{where} is a directory: name the file that plan.save(...) wrote")
        if not stat.S_ISREG(mode):
            raise OptionError(f"{where} is no ordinary file")
        with open(where, "rb") as file:
            yield file, os.fstat(file.fileno()).st_size
    except FileNotFoundError:
        raise OptionError(f"there is no file {where}") from None
    except OSError as error:
        raise OptionError(f"cannot read {where}: {error.strerror or error}") from error
    except PlanFormatError as error:
        raise PlanFormatError(f"{where}: {error}") from error


def _read(file: BinaryIO, count: int) -> bytes:
    data = file.read(count)
    if len(data) < count:
        raise PlanFormatError("the file ended while it was read")
    return data


def _header(file: BinaryIO, size: int, digest: HASH) -> PlanFile:
    prefix = file.read(_PREFIX.size)
    if not prefix.startswith(MAGIC):
        raise PlanFormatError("not a plan file: plan.save(...) writes them")
    if len(prefix) < _PREFIX.size:
        raise PlanFormatError(f"truncated: {size} bytes are not even the beginning")
    _, version, header_bytes, state_bytes = _PREFIX.unpack(prefix)
    if version > FILE_VERSION:
        raise PlanFormatError(
            f"the file has format {version}, newer than {FILE_VERSION}: update planrt on this side"
        )
    if version < 1:
        raise PlanFormatError("malformed plan file: no version number")
    announced = _PREFIX.size + header_bytes + _DIGEST + state_bytes + _DIGEST
    if size < announced:
        raise PlanFormatError(f"truncated: it announces {announced} bytes and has {size}")
    if size > announced:
        raise PlanFormatError(f"{size - announced} bytes more than it announces")
    if header_bytes > MAX_HEADER:
        raise PlanFormatError(f"a header of {header_bytes} bytes is longer than the limit of {MAX_HEADER}")
    header = _read(file, header_bytes)
    digest.update(prefix)
    digest.update(header)
    expected = digest.digest()
    digest.update(expected)
    if _read(file, _DIGEST) != expected:
        raise PlanFormatError("its header's SHA-256 is not that of its bytes: the file has been altered")
    found = _decoded(unpack(header), state_bytes)
    needed = sum(prod(entry.spec.shape) * entry.spec.dtype.itemsize for entry in found.record.state)
    if needed != state_bytes:
        raise PlanFormatError(f"malformed plan file: its state takes {needed} bytes, not {state_bytes}")
    return found


def _decoded(parts: Any, state_bytes: int) -> PlanFile:
    match parts:
        case [bytes(record), bool(training), list(tags), str(description), str(hashed), list(pairs)]:
            pass
        case _:
            raise PlanFormatError("malformed plan file: its header cannot be read")
    if not all(isinstance(tag, str) and 0 < len(tag) <= _MAX_TAG for tag in tags):
        raise PlanFormatError("malformed plan file: its tags cannot be read")
    if len(description) > _MAX_DESCRIPTION:
        raise PlanFormatError("malformed plan file: its description is too long")
    decoded = PlanRecord.from_bytes(record)
    names = {entry.name for entry in decoded.state}
    keys: dict[str, str] = {}
    for pair in pairs:
        match pair:
            case [str(key), str(name)] if name in names and key not in keys:
                keys[key] = name
            case _:
                raise PlanFormatError("malformed plan file: the keys of its state cannot be read")
    return PlanFile(decoded, training, tuple(tags), description, hashed, keys, state_bytes)


def _tensor(
    file: BinaryIO, shape: tuple[int, ...], dtype: torch.dtype, digest: HASH, name: str
) -> torch.Tensor:
    """A tensor with memory of its own, filled from the file."""
    made = torch.empty(shape, dtype=dtype)
    if not made.numel():
        return made
    flat = made.view(-1).view(torch.uint8)
    memory = memoryview(flat.numpy())  # type: ignore[arg-type]
    if file.readinto(memory) < memory.nbytes:  # type: ignore[attr-defined]
        raise PlanFormatError("the file ended while it was read")
    digest.update(memory)
    if dtype == torch.bool and bool((flat > 1).any()):  # undefined behaviour in torch
        raise PlanFormatError(f"malformed plan file: state {name!r} holds truth values other than 0 and 1")
    return made

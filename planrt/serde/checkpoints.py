"""Checkpoints: everything that a run goes on from, in one file. Data only; nothing in a file can run on loading.

Format 1, all numbers little-endian and unsigned:

    offset    bytes  what
    0         8      magic: 89 70 72 75 6E 0D 0A 1A  ("\\x89prun\\r\\n\\x1a")
    8         4      format version: 1
    12        8      length of the header, H
    20        8      length of the payload, P
    28        H      header, MessagePack: the array ``[facts, names, layouts]``
    28+H      P      payload: the tensors as in a frame, each at a multiple of 64 bytes from its start
    28+H+P    32     SHA-256 of all bytes before it

`facts` are plain values by name, `names` are the tensors' names, and `layouts` their dtypes and sizes as in a frame's
header. Nothing is used before the digest has been compared.
"""

from __future__ import annotations

import hashlib
import io
import os
import queue
import struct
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgpack
import torch

from planrt.errors import RunFolderError, WireError
from planrt.serde.disk import Disk
from planrt.serde.tensors import aligned, header_entries, parse_layouts, raw_bytes, tensors_in

VERSION: Final = 1
MAGIC: Final = b"\x89prun\r\n\x1a"
_PREFIX: Final = struct.Struct("<8sIQQ")
_DIGEST: Final = 32
_PIECE: Final = 1 << 22
"""Bytes that are hashed and written at a time."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint: plain values by name, and tensors by name."""

    facts: Mapping[str, Any]
    tensors: Mapping[str, torch.Tensor]


def write_checkpoint(disk: Disk, path: Path, checkpoint: Checkpoint) -> None:
    """Writes `checkpoint` to `path`: all of it, or what was there before stays.

    Raises:
        OSError: it could not be written.
    """
    disk.write_whole(path, _parts(checkpoint))


def checkpoint_size(checkpoint: Checkpoint) -> int:
    """Returns about how many bytes a checkpoint takes: those of its tensors."""
    return sum(tensor.nbytes for tensor in checkpoint.tensors.values())


def checkpoint_bytes(checkpoint: Checkpoint) -> bytes:
    """Returns the bytes of the file that `write_checkpoint` writes."""
    return b"".join(_parts(checkpoint))


def _parts(checkpoint: Checkpoint) -> Iterator[bytes | memoryview]:
    names, tensors = list(checkpoint.tensors), list(checkpoint.tensors.values())
    header = msgpack.packb([dict(checkpoint.facts), names, header_entries(tensors)])
    views = [raw_bytes(tensor) for tensor in tensors]
    payload = 0
    for view in views:
        payload = aligned(payload) + len(view)

    def pieces() -> Iterator[bytes | memoryview]:
        yield _PREFIX.pack(MAGIC, VERSION, len(header), payload)
        yield header
        position = 0
        for view in views:
            yield bytes(aligned(position) - position)
            for start in range(0, len(view), _PIECE):
                yield view[start : start + _PIECE]
            position = aligned(position) + len(view)

    hashing = _Hashing()
    try:
        for piece in pieces():
            hashing.update(piece)
            yield piece
    finally:
        digest = hashing.end()
    yield digest


class _Hashing:
    """SHA-256 of pieces that is taken in a thread of its own, while the caller writes them: nothing is copied, and
    neither waits for the other."""

    def __init__(self) -> None:
        self._sha256 = hashlib.sha256()
        self._pieces: queue.SimpleQueue[bytes | memoryview | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = threading.Thread(
            target=self._run, name="planrt-hash", daemon=True
        )
        try:
            self._thread.start()
        except RuntimeError:  # the interpreter ends: no new threads
            self._thread = None

    def _run(self) -> None:
        while (piece := self._pieces.get()) is not None:
            self._sha256.update(piece)

    def update(self, piece: bytes | memoryview) -> None:
        """Adds a piece, which must not change before `end`."""
        if self._thread is None:
            self._sha256.update(piece)
        else:
            self._pieces.put(piece)

    def end(self) -> bytes:
        """Waits for the thread, and returns the digest."""
        if self._thread is not None:
            self._pieces.put(None)
            self._thread.join()
        return self._sha256.digest()


def read_checkpoint(path: Path) -> Checkpoint:
    """Reads the checkpoint at `path`.

    Raises:
        RunFolderError: it is torn, altered, of a newer version, or no checkpoint at all; the message says which.
    """
    try:
        with open(path, "rb") as file:
            return _read(file, os.fstat(file.fileno()).st_size, str(path))
    except OSError as error:
        raise RunFolderError(f"cannot read {path}: {error.strerror or error}") from error


def checkpoint_from(data: bytes, where: str) -> Checkpoint:
    """Returns the checkpoint that a file with these bytes is; `where` names it.

    Raises:
        RunFolderError: as `read_checkpoint`.
    """
    return _read(io.BytesIO(data), len(data), where)


def _read(file: io.BufferedIOBase, size: int, where: str) -> Checkpoint:
    prefix = file.read(_PREFIX.size)
    if len(prefix) < _PREFIX.size or not prefix.startswith(MAGIC):
        raise RunFolderError(f"{where} is no checkpoint of planrt, or only its beginning")
    _, version, header_size, payload_size = _PREFIX.unpack(prefix)
    if version > VERSION:
        raise RunFolderError(
            f"{where} is of a newer planrt (checkpoints of version {version}; this one reads {VERSION})"
        )
    if size != _PREFIX.size + header_size + payload_size + _DIGEST:
        raise RunFolderError(f"{where} is torn: it has {size:,} bytes, and announces another size")
    header = file.read(header_size)
    payload = torch.empty(payload_size, dtype=torch.uint8)
    file.readinto(memoryview(payload.numpy()))  # type: ignore[arg-type]
    wanted = file.read(_DIGEST)
    digest = hashlib.sha256(prefix)
    digest.update(header)
    digest.update(memoryview(payload.numpy()))  # type: ignore[arg-type]
    if digest.digest() != wanted:
        raise RunFolderError(f"{where}: its SHA-256 is not that of its bytes: it was altered")
    try:
        facts, names, described = msgpack.unpackb(header, strict_map_key=True)
        layouts, needed = parse_layouts(described, address=where)
        if not isinstance(facts, dict) or len(names) != len(layouts) or needed != payload_size:
            raise ValueError("not what a checkpoint has")
        tensors = tensors_in(payload, layouts, address=where)
    except (ValueError, TypeError, WireError, msgpack.UnpackException) as error:
        raise RunFolderError(f"{where} is no checkpoint of this version: {error}") from error
    return Checkpoint(facts, dict(zip(names, tensors, strict=True)))

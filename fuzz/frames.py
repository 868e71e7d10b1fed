"""``python -m fuzz.frames --frames N --seed S``: sends malformed frames to a live worker, over loopback.

The worker is a process of its own, as `planrt serve` starts it. Each conversation is a connection: mostly a good
opening and a good `Hello`, then frames that are wrong in the websocket's bytes, in planrt's header, in a message, or
that nobody would send. Meanwhile a healthy client asks the same worker, ten times a second. A finding is

* *exit*: the worker's process ended;
* *grown*: its memory is larger by more than `--growth` than it was after the first conversations, once all are over;
* *slow*: the healthy client waited longer than `--answer` seconds, or got no answer;
* *hangs*: a connection that was at its end was not closed within `--patience` seconds, or a good request got no answer;
* *foreign*: a request failed with an error that says that planrt made a mistake, or the worker logged one.

Each is told with the seed and the numbers of the conversations that were under way: `--first` repeats them.

Exit codes: 0 nothing found, 1 findings, 2 wrong options.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import resource
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Final

import torch

from fuzz.changes import changed_bytes
from fuzz.messages import LAST, Messages
from planrt.errors import WireError
from planrt.placing import get, send
from planrt.serde.frames import FrameAssembler
from planrt.workers import WebsocketClientWorker
from planrt.workers.transport.websocket_frames import BINARY, CONTINUATION, header_bytes, mask, read_header
from planrt.workers.wire import messages as m

WARMING: Final = 3_000
"""Conversations before the worker's memory is first looked at: it has imported by then what it imports late."""
GROWTH: Final = 5 << 20
AT_ONCE: Final = 8
_STRIDE: Final = 10_000_000
"""Between the numbers of conversations of one worker and the next, with `--workers`."""
_CLOSE, _PING = 0x8, 0x9
_MISTAKES: Final = frozenset({
    "AttributeError", "KeyError", "NameError", "UnboundLocalError", "AssertionError", "RecursionError", "SystemError",
    "ZeroDivisionError", "StopIteration", "UnicodeDecodeError", "UnicodeEncodeError", "WireError", "OSError", "error",
})  # fmt: skip
"""Kinds of failures that no client's message may bring about."""
_OF_WEBSOCKETS: Final = '"event": "unexpected internal error"', '"error": "AssertionError"'
"""What websockets logs where it refuses an opening whose sender has hung up already; it ends that connection."""
_OPENING: Final = (
    "GET / HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)


@dataclass(frozen=True, slots=True)
class Conversation:
    """All that is sent on one connection."""

    opening: bytes
    parts: tuple[bytes, ...]
    """Sent once the opening was answered."""
    frames: int
    in_step: bool
    """Whether each websocket message is a whole one, so that a request at the end has to be answered or refused."""


class Conversations:
    """The conversations of one seed, by their numbers."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._messages = Messages()
        self._hello, self._asking = self._messages.hello(), self._messages.asking()

    def one(self, number: int, port: int) -> Conversation:
        """Returns conversation `number`, with a worker that listens on `port`."""
        rng = random.Random(f"{self._seed}/{number}")
        opening = _OPENING.format(port=port).encode()
        if rng.random() < 0.03:
            return Conversation(changed_bytes(rng, opening), (rng.randbytes(rng.randrange(60)),), 1, False)
        parts = []
        if rng.random() < 0.9:
            parts.append(_binary(rng, self._hello))
        in_step, frames = True, rng.choice((1, 2, 4, 8, 16, 16))
        for _ in range(frames):
            frame = self._messages.hostile(rng)
            if rng.random() < 0.12:
                parts.append(_broken(rng, frame))
                in_step = False
            elif rng.random() < 0.03:
                parts.append(header_bytes(_PING, 5, final=True, key=bytes(4)) + b"hello")
            else:
                parts.append(_binary(rng, frame))
        if in_step:
            parts.append(_binary(rng, self._asking))
        return Conversation(opening, tuple(parts), frames, in_step)


def _binary(rng: random.Random, data: bytes) -> bytes:
    """A good websocket message, in one frame or several."""
    cuts = sorted(rng.randrange(len(data) + 1) for _ in range(rng.choice((0, 0, 0, 1, 5))))
    result = b""
    for number, (start, end) in enumerate(zip([0, *cuts], [*cuts, len(data)], strict=True)):
        final = number == len(cuts)
        result += _masked(rng, CONTINUATION if number else BINARY, data[start:end], final=final)
    return result


def _masked(rng: random.Random, opcode: int, data: bytes, *, final: bool) -> bytes:
    key = rng.choice((bytes(4), rng.randbytes(4)))
    payload = bytearray(data)
    mask(memoryview(payload), key)
    return header_bytes(opcode, len(data), final=final, key=key) + payload


def _broken(rng: random.Random, data: bytes) -> bytes:
    """A websocket frame that is none, or in the wrong place, or that nobody expects."""
    match rng.randrange(8):
        case 0:
            return changed_bytes(rng, _binary(rng, data)[:14]) + data
        case 1:  # any opcode and any bits, masked or not
            return bytes([rng.randrange(256), rng.randrange(256)]) + rng.randbytes(rng.randrange(14)) + data
        case 2:  # lengths that do not fit
            length = rng.choice((0, 1, 125, 2**16, 2**20 + 1, 2**31, 2**63, 2**64 - 1))
            return b"\x82\xff" + length.to_bytes(8, "big") + bytes(4) + data
        case 3:  # out of order
            return _masked(rng, rng.choice((CONTINUATION, BINARY)), data, final=False) * 2
        case 4:  # a control frame that is long, in pieces or malformed
            opcode = rng.choice((_CLOSE, _PING, 0xA))
            return _masked(
                rng, opcode, rng.randbytes(rng.choice((0, 1, 2, 125, 126))), final=rng.random() < 0.7
            )
        case 5:  # empty pieces
            return _masked(rng, BINARY, b"", final=False) + _masked(rng, CONTINUATION, b"", final=False) * 300
        case 6:
            return _binary(rng, data)[: rng.randrange(len(data) + 1)]
        case _:
            return rng.randbytes(rng.choice((1, 2, 10, 1_000)))


@dataclass(slots=True)
class Summary:
    """What became of so many conversations."""

    conversations: int = 0
    frames: int = 0
    closed: int = 0
    """Conversations that the worker ended itself."""
    failures: Counter[str] = field(default_factory=Counter)
    """Failures that it answered with, by their kinds."""
    asked: int = 0
    """Questions of the healthy client."""
    slowest: float = 0.0
    """Seconds that the slowest of its answers took."""
    grown: int = 0
    """Bytes that the worker has more at the end than after the first conversations."""
    findings: list[str] = field(default_factory=list)


class Served:
    """A worker in a process of its own, and what it logged as mistakes."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "planrt.fl.serve", "--id", "fuzzed", "--empty", "--port", "0"]
        self.process = subprocess.Popen(
            [*command, "--peers", "none", "--supervised", "--json-logs", "--threads", "1"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        self.mistakes: deque[str] = deque(maxlen=20)
        self.last_lines: deque[str] = deque(maxlen=20)
        self._reader = threading.Thread(target=self._read_log, daemon=True)
        self._reader.start()
        said = _pipe(self.process.stdout).readline()
        self.port = int(json.loads(said)["port"])

    def _read_log(self) -> None:
        for line in _pipe(self.process.stderr):
            text = line.decode(errors="replace").rstrip()
            self.last_lines.append(text)
            if '"level": "error"' in text and not all(word in text for word in _OF_WEBSOCKETS):
                self.mistakes.append(text)

    @property
    def memory(self) -> int:
        """The bytes of memory that its process has; 0 if it has ended."""
        try:
            pages = int(Path(f"/proc/{self.process.pid}/statm").read_text(encoding="ascii").split()[1])
        except (OSError, IndexError):
            return 0
        return pages * resource.getpagesize()

    def settled_memory(self) -> int:
        """Returns the least that it has within two seconds, for what is being freed."""
        least = self.memory
        for _ in range(10):
            time.sleep(0.2)
            least = min(least, self.memory)
        return least

    def close(self) -> None:
        """Ends it."""
        self.process.kill()
        self.process.wait()
        self._reader.join()
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            _pipe(pipe).close()


class _Healthy(threading.Thread):
    """A client that asks for small things, ten times a second."""

    def __init__(self, port: int, patience: float) -> None:
        super().__init__(name="healthy", daemon=True)
        self.asked, self.slowest, self.failure = 0, 0.0, ""
        self._port, self._patience = port, patience
        self._over = threading.Event()

    def run(self) -> None:
        try:
            with WebsocketClientWorker("fuzzed", port=self._port, timeout=self._patience) as worker:
                there = send(torch.ones(3), worker)
                over = False
                while not over:
                    began = time.monotonic()
                    if get(there + 1).tolist() != [2.0, 2.0, 2.0]:
                        raise ValueError("a wrong answer")
                    self.slowest = max(self.slowest, time.monotonic() - began)
                    self.asked += 1
                    over = self._over.wait(0.1)
        except Exception as error:  # whatever it is is told
            self.failure = f"{type(error).__name__}: {error}"

    def end(self) -> None:
        """Ends it, once it has its answer."""
        self._over.set()
        self.join(self._patience)


async def _converse(conversation: Conversation, port: int, patience: float, summary: Summary) -> str:
    """Holds a conversation; returns what was wrong with the worker's part, or nothing."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    seen = _Seen(summary)
    try:
        writer.write(conversation.opening)
        sending: asyncio.Future[None] | None = None
        try:
            async with asyncio.timeout(patience):
                with contextlib.suppress(TimeoutError):  # a head without an end waits for the rest
                    async with asyncio.timeout(0.2 if not conversation.in_step else patience):
                        while not seen.opened and (data := await reader.read(1 << 16)):
                            seen.take(data)
                sending = asyncio.ensure_future(_send(writer, conversation))
                while not seen.over and (data := await reader.read(1 << 16)):
                    seen.take(data)
                if not seen.answered:
                    summary.closed += 1
        except TimeoutError:
            return "a good request at the end got no answer" if conversation.in_step else "it was not closed"
        except ConnectionError:
            summary.closed += 1
        finally:
            if sending is not None:
                sending.cancel()
                with contextlib.suppress(asyncio.CancelledError, ConnectionError):
                    await sending
    finally:
        writer.transport.abort()
    return seen.wrong


async def _send(writer: asyncio.StreamWriter, conversation: Conversation) -> None:
    for part in conversation.parts:
        writer.write(part)
        await writer.drain()
    if not conversation.in_step:
        writer.write_eof()


class _Seen:
    """What a worker sent on one connection."""

    def __init__(self, summary: Summary) -> None:
        self.answered = False
        """Whether it answered the request at the end."""
        self.over = False
        self.wrong = ""
        self.opened = False
        """Whether the connection is a websocket."""
        self._summary = summary
        self._data = b""
        self._message = b""

    def take(self, data: bytes) -> None:
        self._data += data
        if not self.opened:
            head, ends, rest = self._data.partition(b"\r\n\r\n")
            if not ends:
                return
            self.opened = head.startswith(b"HTTP/1.1 101")
            self._data = rest if self.opened else b""
        while self.opened and (header := read_header(memoryview(self._data))) is not None:
            end = header.size + header.nbytes
            if len(self._data) < end:
                return
            payload, self._data = self._data[header.size : end], self._data[end:]
            if header.opcode == _CLOSE:
                self.over = True
            elif not header.control:
                self._message += payload
                if header.final:
                    message, self._message = self._message, b""
                    self._read(message)

    def _read(self, message: bytes) -> None:
        assembler: FrameAssembler[m.Envelope] = FrameAssembler(m.from_wire)
        try:
            assembler.feed(message)
            envelope = assembler.finish().message
        except WireError as error:
            self.wrong = f"WireError: an answer that no client takes: {error}"
            return
        if isinstance(envelope.body, m.Failure):
            self._summary.failures[envelope.body.kind] += 1
            if envelope.body.kind in _MISTAKES and envelope.id:
                self.wrong = f"{envelope.body.kind}: {envelope.body.message[:200]}"
        if envelope.id == LAST:
            self.answered = self.over = True


class Fuzzer:
    """Sends conversations to one worker.

    Args:
        seed: of all conversations.
        answer: seconds that the healthy client may wait for an answer.
        patience: seconds after which a connection counts as one that hangs.
        growth: bytes by which the worker may grow.
        warming: conversations before its memory is first looked at.
    """

    def __init__(
        self,
        seed: int,
        *,
        answer: float = 0.5,
        patience: float = 60.0,
        growth: int = GROWTH,
        warming: int = WARMING,
    ) -> None:
        self.served = Served()
        self._seed = seed
        self._conversations = Conversations(seed)
        self._answer, self._patience, self._growth, self._warming = answer, patience, growth, warming

    def run(self, frames: int, first: int = 0, *, tell: bool = False) -> Summary:
        """Sends at least so many frames, from conversation `first` on, after those that warm the worker up."""
        summary = Summary()
        healthy = _Healthy(self.served.port, self._patience)
        healthy.start()
        if self._warming:
            warming = Summary()
            asyncio.run(self._run(warming, iter(range(-self._warming, 0)), 1 << 60, tell=False))
            summary.findings += warming.findings
        before = self.served.settled_memory()
        healthy.slowest = 0.0
        numbers = iter(range(first, first + _STRIDE))
        asyncio.run(self._run(summary, numbers, frames, tell=tell))
        healthy.end()
        summary.asked, summary.slowest = healthy.asked, healthy.slowest
        if healthy.failure or healthy.is_alive():
            summary.findings.append(f"slow: the healthy client: {healthy.failure or 'no answer'}")
        elif healthy.slowest > self._answer:
            summary.findings.append(f"slow: an answer to the healthy client took {healthy.slowest:.2f} s")
        summary.grown = self.served.settled_memory() - before
        if summary.grown > self._growth:
            summary.findings.append(f"grown: by {summary.grown:,} bytes")
        summary.findings += [f"foreign: the worker logged {line[:500]}" for line in self.served.mistakes]
        return summary

    async def _run(self, summary: Summary, numbers: Iterator[int], frames: int, *, tell: bool) -> None:
        under_way: dict[int, None] = {}
        began, told = time.monotonic(), 0

        async def some() -> None:
            nonlocal told
            for number in numbers:
                if summary.frames >= frames or self.served.process.poll() is not None:
                    return
                under_way[number] = None
                conversation = self._conversations.one(number, self.served.port)
                try:
                    wrong = await _converse(conversation, self.served.port, self._patience, summary)
                except OSError as error:
                    wrong = f"cannot connect: {error}"
                if wrong and self.served.process.poll() is None:
                    kind = "foreign" if ": " in wrong else "hangs"
                    summary.findings.append(f"{kind}: {wrong}: conversation {number} of seed {self._seed}")
                summary.conversations += 1
                summary.frames += conversation.frames
                if self.served.process.poll() is None:
                    del under_way[number]
                if tell and summary.frames >= told + 25_000:
                    told = summary.frames
                    print(f"{told:,} frames in {time.monotonic() - began:,.0f} s, {summary.closed:,} of "
                          f"{summary.conversations:,} conversations were ended by the worker, memory "
                          f"{self.served.memory:,}, {len(summary.findings)} findings", flush=True)  # fmt: skip

        await asyncio.gather(*(some() for _ in range(AT_ONCE)))
        if (code := self.served.process.poll()) is not None:
            log = "\n    ".join(self.served.last_lines)
            summary.findings.append(
                f"exit: the worker ended with {code} in one of the conversations {list(under_way)} of seed "
                f"{self._seed}; its log ends with\n    {log}"
            )

    def close(self) -> None:
        """Ends the worker."""
        self.served.close()


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the fuzzer; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m fuzz.frames", description=(__doc__ or "").splitlines()[0]
    )
    add = parser.add_argument
    add(
        "--frames",
        type=int,
        default=100_000,
        metavar="N",
        help="how many, of all workers together (%(default)s)",
    )
    add("--seed", type=int, default=0, metavar="S", help="of all conversations (%(default)s)")
    add("--first", type=int, default=0, metavar="N", help="number of the first conversation (%(default)s)")
    add(
        "--workers",
        type=int,
        default=1,
        metavar="N",
        help="workers to send to at the same time (%(default)s)",
    )
    add(
        "--answer",
        type=float,
        default=0.5,
        metavar="SECONDS",
        help="that a healthy client may wait (%(default)s)",
    )
    add(
        "--patience",
        type=float,
        default=60.0,
        metavar="SECONDS",
        help="that a connection may hang (%(default)s)",
    )
    add("--growth", type=int, default=GROWTH, metavar="BYTES", help="that a worker may grow (%(default)s)")
    add("--warming", type=int, default=WARMING, metavar="N", help="conversations before that (%(default)s)")
    add("--json", type=Path, metavar="FILE", help="write what was found there")
    options = parser.parse_args(arguments)
    if min(options.frames, options.workers) < 1 or min(options.first, options.growth, options.warming) < 0:
        parser.error("--frames and --workers must be above 0, --first, --growth and --warming at least 0")
    if options.answer <= 0 or options.patience <= 0:
        parser.error("--answer and --patience must be above 0")
    if options.workers > 1:
        return _several(options)
    fuzzer = Fuzzer(
        options.seed,
        answer=options.answer,
        patience=options.patience,
        growth=options.growth,
        warming=options.warming,
    )
    try:
        summary = fuzzer.run(options.frames, options.first, tell=True)
    finally:
        fuzzer.close()
    for finding in summary.findings:
        print(f"FOUND {finding}")
    print(f"{summary.frames:,} frames in {summary.conversations:,} conversations: the worker grew by {summary.grown:,} "
          f"bytes, the slowest of {summary.asked:,} answers to the healthy client took {summary.slowest:.3f} s, "
          f"{len(summary.findings)} findings; {dict(summary.failures.most_common(20))}", flush=True)  # fmt: skip
    if options.json is not None:
        options.json.write_text(json.dumps(asdict(summary), indent=1) + "\n", encoding="utf-8")
    return 1 if summary.findings else 0


def _several(options: argparse.Namespace) -> int:
    """Runs one fuzzer for each worker, in processes of their own."""
    each = -(-options.frames // options.workers)
    running = []
    for number in range(options.workers):
        command = [sys.executable, "-m", "fuzz.frames", "--frames", str(each), "--seed", str(options.seed)]
        command += ["--first", str(options.first + number * _STRIDE), "--answer", str(options.answer)]
        command += ["--patience", str(options.patience), "--growth", str(options.growth)]
        command += ["--warming", str(options.warming)]
        if options.json is not None:
            command += ["--json", str(options.json.with_suffix(f".{number}{options.json.suffix}"))]
        running.append(subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}))
    return max(one.wait() for one in running)


def _pipe(file: IO[bytes] | None) -> IO[bytes]:
    assert file is not None
    return file


if __name__ == "__main__":
    sys.exit(main())

"""One fuzzed call, as a hostile client makes it: through the worker's state machine, and so through all its checks.

What comes of it is one line: the kind and text of the failure, or a digest over every result, every operand that may
have been written to, and gradients. No line depends on anything but the seed, unless a kernel gave memory away that it
did not write.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import re
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch

from fuzz.arguments import Draw, described, draw
from fuzz.child import SHORT
from planrt.errors import LocalError
from planrt.plans.ir import ops
from planrt.serde.tensors import raw_bytes
from planrt.types import Ref, map_leaves
from planrt.workers.machine.events import Received, Reply
from planrt.workers.machine.state import WorkerState
from planrt.workers.wire import messages as m
from planrt.workers.wire.messages import own_versions
from planrt.workers.wire.posted import PostedOp

PROBES = UNINITIALISED, CRASH, HANG = "fuzz.uninitialised", "fuzz.crash", "fuzz.hang"
"""Ops that are on no table, to see that the pair of processes would tell: memory that nobody wrote, and two others."""

_NO_MEMORY = "allocate memory", "MemoryError", "bad_alloc"
_MOST_BYTES = 4 << 20
_CONNECTION = 1


def chosen(pattern: str = "") -> list[str]:
    """The ops that pointers may post and whose names hold `pattern`."""
    if probes := [name for name in PROBES if pattern and name.startswith(pattern)]:
        return probes
    known = {*ops.TABLE, *ops.EAGER} - ops.PLANS_ONLY - {"torch.set_grad_enabled"}
    return sorted(name for name in known if pattern in name)


def cannot(pattern: str, *, plain: bool) -> str:
    """Returns why no calls of such ops can be made; empty where they can."""
    if not chosen(pattern):
        return f"--op: no op that pointers may post has {pattern!r} in its name"
    if not plain and importlib.util.find_spec("expecttest") is None:
        return "torch's samples need expecttest: pip install '.[dev]', or add --plain, which reaches less"
    return ""


class Caller:
    """A client without a token, and the worker it plays against."""

    def __init__(self, seed: int, names: Sequence[str], *, plain: bool = False) -> None:
        torch.set_num_threads(1)
        self._seed = seed
        self._names = names
        self._plain = plain
        self._short = False
        self._state = WorkerState("fuzzed")
        self._state.handle(Received(_CONNECTION, m.Envelope(1, m.Hello("fuzz", own_versions())), []))

    def made(self, index: int) -> tuple[str, tuple[Any, ...], dict[str, Any]]:
        """The op and the arguments of a call."""
        seed = f"{self._seed}/{index}"
        name = Draw(f"{seed} op").random.choice(self._names)
        args, kwargs = ((), {}) if name in PROBES else draw(name, seed, plain=self._plain)
        return name, args, kwargs

    def show(self, index: int) -> str:
        """The call in a line."""
        name, args, kwargs = self.made(index)
        return f"{name}{described(args)}{described(kwargs) if kwargs else ''}"

    def outcome(self, index: int) -> str:
        """What comes of the call, in a line."""
        name, args, kwargs = self.made(index)
        if name == CRASH:
            os.abort()
        while name == HANG:
            time.sleep(1)
        if name == UNINITIALISED:
            return f"{name} {hashlib.sha256(raw_bytes(torch.empty(1000))).hexdigest()[:20]}"
        self._short = False
        try:
            came = self._played(name, args, kwargs, Draw(f"{self._seed}/{index} how"))
            return f"{name} {came} {SHORT}" if self._short else f"{name} {came}"
        finally:
            self._ask(m.Clear())

    def _played(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], drawn: Draw) -> str:
        operands: list[torch.Tensor] = []

        def operand(leaf: Any) -> Any:
            if not isinstance(leaf, torch.Tensor):
                return leaf
            operands.append(leaf.detach().clone(memory_format=torch.contiguous_format))
            return Ref(len(operands))

        args, kwargs = map_leaves(args, operand), map_leaves(kwargs, operand)
        differentiates = drawn.chance(0.3)
        items = [
            m.PutItem(number, differentiates and (one.is_floating_point() or one.is_complex()))
            for number, one in enumerate(operands, 1)
        ]
        told = self._ask(m.Put(items), operands)
        if isinstance(told, m.Failure):
            return _failed(told)
        numbers = list(range(1, len(items) + 1))
        where = {number: self._strided(number, drawn) if drawn.chance(0.1) else number for number in numbers}
        args = map_leaves(args, lambda leaf: Ref(where[leaf.index]) if isinstance(leaf, Ref) else leaf)
        try:
            packed = PostedOp(name, args, kwargs, Ref(100), True, drawn.random.getrandbits(40)).pack()
        except Exception as error:  # it cannot be sent at all
            return f"unsendable {type(error).__name__}"
        digest = hashlib.sha256()
        made = self._ask(m.Call(packed))
        fetched = [*numbers]
        if isinstance(made, m.Made):
            digest.update(repr(made.results).encode())
            results = [id for id, _ in made.objects[:20]]
            roots = [id for id, spec in made.objects[:20] if spec.requires_grad]
            if differentiates and roots:
                self._differentiate(roots, drawn, digest)
            fetched += results
        for id in fetched:
            self._fetch(id, digest)
        return f"{_failed(made) if isinstance(made, m.Failure) else 'made'} {digest.hexdigest()[:20]}"

    def _strided(self, number: int, drawn: Draw) -> int:
        """Another view of an operand: transposed, expanded far beyond its memory, or every other entry."""
        name, args = drawn.random.choice(
            [
                ("Tensor.mT", ()),
                ("Tensor.unsqueeze", (-1,)),
                ("Tensor.expand", (drawn.random.choice((3, 100, 2**16)), *[-1] * 2)),
                ("Tensor.__getitem__", (slice(None, None, 2),)),
                ("Tensor.__getitem__", (slice(1, None, None),)),
                ("Tensor.real", ()),
            ]
        )
        made = self._ask(m.Call(PostedOp(name, (Ref(number), *args), {}, Ref(100), True).pack()))
        return made.objects[0][0] if isinstance(made, m.Made) and made.objects else number

    def _differentiate(self, roots: list[int], drawn: Draw, digest: Any) -> None:
        again = drawn.chance(0.2)
        root = drawn.random.choice(roots)
        ones = self._ask(m.Call(PostedOp("torch.ones_like", (Ref(root),), {}, Ref(100), False).pack()))
        if isinstance(ones, m.Made):
            told = self._ask(m.Backward([root], [ones.objects[0][0]], again, again))
            digest.update((_failed(told) if isinstance(told, m.Failure) else "passed").encode())

    def _fetch(self, id: int, digest: Any) -> None:
        body, tensors = self._answer(m.Fetch(id, False))
        digest.update((_failed(body) if isinstance(body, m.Failure) else "fetched").encode())
        for tensor in tensors:
            digest.update(repr(list(tensor.shape)).encode())
            if tensor.numel() * tensor.element_size() > 16 * _MOST_BYTES:
                continue  # expanded: it has no such memory
            try:
                data = raw_bytes(tensor)
            except (LocalError, RuntimeError):  # sparse gradients do not travel, nor do older torch's names
                digest.update(b"stays")
                continue
            digest.update(data[:_MOST_BYTES])
            digest.update(data[-_MOST_BYTES:])

    def _ask(self, body: m.Body, tensors: Sequence[torch.Tensor] = ()) -> m.Body:
        return self._answer(body, tensors)[0]

    def _answer(
        self, asked: m.Body, tensors: Sequence[torch.Tensor] = ()
    ) -> tuple[m.Body, Sequence[torch.Tensor]]:
        (reply,) = self._state.handle(Received(_CONNECTION, m.Envelope(5, asked), list(tensors)))
        assert isinstance(reply, Reply)
        body = reply.envelope.body
        if isinstance(body, m.Failure):
            self._short |= any(word in f"{body.kind} {body.message}" for word in _NO_MEMORY)
        return body, reply.tensors


def _failed(failure: m.Failure) -> str:
    """A failure without what is another in each process: ids and addresses."""
    text = re.sub(r"0x[0-9a-f]+|\d{8,}", "N", f"{failure.kind}: {failure.message}")
    return " ".join(ascii(text)[1:300].split())


def main(arguments: Sequence[str] | None = None) -> int:
    """Shows calls; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m fuzz.calls",
        description="Shows calls of fuzz.ops, and makes them in this process: what it found may end it.",
    )
    parser.add_argument("seed", type=int, metavar="SEED", help="as fuzz.ops was given it")
    parser.add_argument("indices", type=int, nargs="+", metavar="INDEX", help="numbers of calls")
    parser.add_argument("--op", default="", metavar="TEXT", help="as fuzz.ops was given it")
    parser.add_argument("--plain", action="store_true", help="without torch's samples, as fuzz.ops was")
    options = parser.parse_args(arguments)
    if reason := cannot(options.op, plain=options.plain):
        parser.error(reason)
    if min(options.indices) < 0:
        parser.error("numbers of calls begin with 0")
    caller = Caller(options.seed, chosen(options.op), plain=options.plain)
    for index in options.indices:
        print(f"{index}: {caller.show(index)}", flush=True)
        print(f"   {caller.outcome(index)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

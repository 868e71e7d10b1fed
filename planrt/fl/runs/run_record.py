"""What a scheduler writes down of its run, and goes on from: `RunRecord`.

After a round: a line of the journal, then a checkpoint, in a thread while the next round begins. So a crash at any
moment leaves the checkpoint of some round, and the rounds after it are made again, with the same bits.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import msgpack
import numpy as np
import torch

from planrt.errors import OptionError, RunFolderError
from planrt.fl.runs.run_folder import VERSION, RunFolder, no_room, time_now
from planrt.logs import get_logger
from planrt.serde.checkpoints import Checkpoint, read_checkpoint, write_checkpoint
from planrt.serde.disk import Disk
from planrt.shown import shown

log = get_logger("planrt.fl")

SMALL: Final = 8 << 20
"""Bytes of a checkpoint up to which it is copied, and written while the run goes on."""

NEW_DISK: Callable[[], Disk] = Disk
"""Makes what changes the disk; tests put something in its place that fails."""


class RunRecord:
    """The folder of one run.

    Attributes:
        next_round: the number of the round that comes next.
        restored: the checkpoint that the run goes on from; None of a run that begins.
        checkpoints: how many were written by now, and when the last one was (seconds, as of `time.time`).
    """

    def __init__(self, path: str | os.PathLike[str], *, every: int = 1, resuming: bool = False) -> None:
        self.folder = RunFolder(path, disk=NEW_DISK())
        self.every = every
        self.next_round = 1
        self.restored: Checkpoint | None = None
        self.checkpoints = (0, 0.0)
        self._saved = 0
        self._resuming = resuming
        self._saving: asyncio.Task[None] | None = None
        journal = self.folder.journal
        try:
            if journal.broken and journal.began is not None:
                log.warning("journal_cut", why=journal.broken)
            if resuming:
                self._restore()
            elif journal.began is not None:
                raise RunFolderError(
                    f"the run folder {self.path} has a run already, of {len(journal.rounds)} rounds: go on with it "
                    "(RoundScheduler.resume, --resume), or name another folder"
                )
        except BaseException:
            self.folder.close()
            raise

    @property
    def path(self) -> Path:
        """The folder."""
        return self.folder.path

    @property
    def began(self) -> Mapping[str, Any]:
        """The first line of the journal."""
        return self.folder.journal.began or {}

    def history(self) -> list[dict[str, Any]]:
        """Returns the lines of the rounds that are behind the place where the run goes on, in order."""
        return self.folder.journal.until(self.next_round - 1)

    def _restore(self) -> None:
        if self.folder.journal.began is None:
            raise RunFolderError(
                f"there is no run to go on with in {self.path}: its journal has no beginning"
            )
        bad = []
        for number, path in self.folder.checkpoints():
            try:
                self.restored = self._own(number, path)
            except RunFolderError as error:
                if "newer planrt" in str(error):
                    raise
                bad.append(str(error))
                log.warning("checkpoint_left_out", why=str(error))
                continue
            self.next_round, self._saved = number + 1, number
            return
        if bad:
            raise RunFolderError(f"no checkpoint of {self.path} can be used: {'; '.join(bad)}")

    def _own(self, number: int, path: Path) -> Checkpoint:
        checkpoint = read_checkpoint(path)
        if checkpoint.facts.get("run") != self.folder.journal.run:
            raise RunFolderError(f"{path} is of another run")
        if checkpoint.facts.get("round") != number:
            raise RunFolderError(f"{path} is of round {checkpoint.facts.get('round')}, not {number}")
        return checkpoint

    def begin(self, identity: Mapping[str, Any], settings: Mapping[str, Any], *, fewer: bool = False) -> None:
        """Begins the run, or goes on with one that must be the same.

        Args:
            identity: what makes a run what it is. settings: what may be another at the next start. fewer: whether a
                run that goes on may do so without some of its workers.

        Raises:
            RunFolderError: the folder's run has another identity; says where they differ.
        """
        plain = json.loads(json.dumps(identity))
        if self._resuming:
            check_identity(self.path, self.began.get("identity", {}), plain, fewer=fewer)
            self.folder.write_down("resumed", round=self.next_round, settings=dict(settings))
            return
        drawn = secrets.token_hex(16)  # so that no two runs have the same first line
        self.folder.write_down("began", version=VERSION, id=drawn, identity=plain, settings=dict(settings))
        self.folder.journal.began = {"identity": plain, "settings": dict(settings)}

    # ------------------------------------------------------------------------------------------ saving

    @property
    def unsaved(self) -> bool:
        """Tells whether rounds were written down that no checkpoint has."""
        return self._saved < self.next_round - 1

    def due(self, number: int) -> bool:
        """Returns whether there is to be a checkpoint after round `number`."""
        return bool(self.every) and number - self._saved >= self.every

    async def save(
        self, number: int, line: Mapping[str, Any], facts: Mapping[str, Any], tensors: Mapping[str, torch.Tensor],
        *, checkpoint: bool,
    ) -> None:  # fmt: skip
        """Writes down round `number`: `line` into the journal, and a checkpoint of `facts` and `tensors`.

        Small ones are copied, and written while the caller goes on; `settled` waits for that.

        Raises:
            RunFolderError: this or the save before could not be written.
        """
        await self.settled()
        self.next_round = number + 1
        small = sum(tensor.nbytes for tensor in tensors.values()) <= SMALL
        kept = {
            name: tensor.detach().clone() if small else tensor.detach() for name, tensor in tensors.items()
        }
        own = {"run": self.folder.journal.run, "round": number, "random": random_state()}
        whole = Checkpoint({**facts, **own}, kept) if checkpoint else None
        self._saving = asyncio.create_task(asyncio.to_thread(self._write, number, dict(line), whole))
        if checkpoint:
            self._saved = number
        if not small:
            await self.settled()

    def _write(self, number: int, line: dict[str, Any], checkpoint: Checkpoint | None) -> None:
        if line:
            self.folder.write_down("round", **line)
        if checkpoint is not None:
            path = self.folder.checkpoint_path(number)
            try:
                write_checkpoint(self.folder.disk, path, checkpoint)
                self.checkpoints = (self.checkpoints[0] + 1, time.time())
                self.folder.forget_old()
            except OSError as error:
                raise RunFolderError(
                    f"{no_room(path, error)}; the checkpoint before it is as it was: make room, and resume"
                ) from error

    async def settled(self) -> None:
        """Waits until what was saved is on the disk.

        Raises:
            RunFolderError: it could not be written.
        """
        saving, self._saving = self._saving, None
        if saving is not None:
            await asyncio.shield(saving)

    async def failed(self, number: int, error: BaseException) -> None:
        """Notes that round `number` ended with an error."""
        await self.settled()
        await asyncio.to_thread(
            self.folder.write_down, "failed", round=number, why=shown(f"{type(error).__name__}: {error}", 500)
        )

    async def close(self) -> None:
        """Waits until what was saved is on the disk, and lets go of the folder.

        Raises:
            RunFolderError: it could not be written.
        """
        try:
            await self.settled()
        finally:
            self.folder.close()

    # --------------------------------------------------------------------------------------------- now

    def show(self, number: int, waiting: Sequence[str], since: float, until: float | None) -> None:
        """Shows `planrt status` who is waited for in round `number`, since when and until when (times as of
        `time.time`)."""
        self.folder.show(
            {"round": number, "waiting": list(waiting), "since": since, "until": until, "at": time_now()}
        )


def check_identity(
    path: Path, was: Mapping[str, Any], now: Mapping[str, Any], *, fewer: bool = False
) -> None:
    """Raises RunFolderError unless both say the same run; names the first difference. With `fewer`, workers may be
    left out."""

    def other(what: str) -> RunFolderError:
        return RunFolderError(f"the run folder {path} is of another run: {what}")

    if was.get("plan") != now.get("plan"):
        raise other("its model, loss or shapes are not these")
    if was.get("seed") != now.get("seed"):
        raise other(f"its seed is {was.get('seed')}, not {now.get('seed')}")
    if was.get("dataset") != now.get("dataset"):
        raise other(f"it trains on the data set {was.get('dataset')!r}, not {now.get('dataset')!r}")
    for id, about in now.get("data", {}).items():
        before = was.get("data", {}).get(id, about)
        if before != about:
            raise other(f"the data set of worker {id!r} had {before}, and has {about} now")
    gone = was.get("data", {}).keys() - now.get("data", {}).keys()
    if now.get("data", {}).keys() - was.get("data", {}).keys() or (gone and not fewer):
        before, after = ", ".join(was.get("data", {})), ", ".join(now.get("data", {}))
        raise other(f"its workers are {before}, not {after}")
    if gone:
        log.warning("run_goes_on_without", workers=sorted(gone))
    for name in ("training", "rules"):
        for key, value in now.get(name, {}).items():
            if was.get(name, {}).get(key) != value:
                raise other(f"its {key} is {was.get(name, {}).get(key)!r}, not {value!r}")


def random_state() -> dict[str, Any]:
    """Returns where the random number generators of torch (on the CPU), Python and NumPy are, as plain values."""
    kind, keys, place, has_gauss, gauss = np.random.get_state(legacy=True)
    version, numbers, cached = random.getstate()
    return {
        "torch": torch.get_rng_state().numpy().tobytes(),
        "python": [version, list(numbers), cached],
        "numpy": [str(kind), np.asarray(keys).tobytes(), int(place), int(has_gauss), float(gauss)],
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Puts the generators to where `random_state` found them.

    Raises:
        RunFolderError: it is not what that returns.
    """
    try:
        version, numbers, cached = state["python"]
        kind, keys, place, has_gauss, gauss = state["numpy"]
        torch.set_rng_state(torch.frombuffer(bytearray(state["torch"]), dtype=torch.uint8))
        random.setstate((version, tuple(numbers), cached))
        np.random.set_state((kind, np.frombuffer(keys, dtype=np.uint32), place, has_gauss, gauss))
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise RunFolderError(f"the checkpoint's random state cannot be used: {error}") from error


def plain_facts(owner: object, values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Returns a `state_dict` as plain values and tensors.

    Raises:
        OptionError: it has something else in it.
    """
    tensors = {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}
    plain = {name: value for name, value in values.items() if name not in tensors}
    try:
        msgpack.packb(plain)
    except (TypeError, ValueError, OverflowError) as error:
        raise OptionError(
            f"state_dict() of {type(owner).__name__} may hold tensors, numbers, texts, lists and dicts by name: {error}"
        ) from error
    return plain, tensors

"""A worker as a party of sharing groups: groups come and go, parts of secrets arrive, programs run. No I/O.

A program is a posted op. Its run is a request like others, and waits where it needs what another party opens or what
the dealer makes; meanwhile the ops that its client posted after it wait too, and other sessions go on.
"""

from __future__ import annotations

import hashlib
import hmac
import itertools
import math
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from typing import Any

import torch

from planrt.deadlines import SLOWEST
from planrt.errors import LocalError, PlanrtError, SharingError
from planrt.sharing.fixed_point import encode
from planrt.sharing.kernels import Context, Share
from planrt.sharing.programs.needs import Needs, alike, kept_needs, masks_of, needs_of
from planrt.sharing.programs.running import MANY, Failed, run_program
from planrt.sharing.randomness import SEED_BYTES, Stream, new_seed
from planrt.sharing.requests import Base
from planrt.types import Ref
from planrt.workers.machine.counting.work import DRAWN, READ, entries, of_program
from planrt.workers.machine.events import Answer, Steps, ToPeer, Wait, Wake
from planrt.workers.machine.failures import cut, failure_of, failure_of_op
from planrt.workers.machine.keeping.tickets import check_speaks
from planrt.workers.machine.kinds.base import StoredObject
from planrt.workers.machine.kinds.share import SharedPart
from planrt.workers.machine.kinds.tensor import tensor_of
from planrt.workers.machine.labels import Label, join
from planrt.workers.machine.objects import KeptObjects
from planrt.workers.machine.sessions import Session, allowed_list, ask, users_of
from planrt.workers.machine.sharing.groups import Group, check_number
from planrt.workers.machine.sharing.pace import SHORT, known_again
from planrt.workers.machine.sharing.posted import PostedProgram, PostedPrograms
from planrt.workers.machine.waiting import Exchange
from planrt.workers.wire import messages as m
from planrt.workers.wire.posted import PostedOp
from planrt.workers.wire.refusals import GetNotPermitted

_FETCHED = 1 << 20
"""Bytes of a part that comes or is fetched in no time."""

_SEEDS = 10_000
"""Seeds that are told from new ones."""

MAX_DRAWN = 1 << 27
"""Entries of a part that comes of a seed (8 bytes each): a few bytes of a client's must not become any memory."""


class PartyOps:
    """The sharing groups that one worker is a party of."""

    def __init__(self, objects: KeptObjects) -> None:
        self._objects = objects
        self._store = objects.store
        self._groups: dict[str, Group] = {}
        self._seeds: OrderedDict[bytes, None] = OrderedDict()
        """What tells the seeds apart that came lately; none of them can be computed from it."""
        self._programs = PostedPrograms(objects)
        self._looked_at: tuple[PostedOp, Hashable] | None = None
        """What `is_short_run` has found of an op, for `run`."""

    @property
    def names(self) -> list[str]:
        """Its groups, as one process of the worker tells another one of them."""
        return [f"group {id}" for id in self._groups]

    # ------------------------------------------------------------------------------------ groups

    def make(self, session: Session, body: m.MakeGroup) -> Answer:
        """Makes this worker a party; the dealer's seed and the other parties are still to come.

        Raises:
            SharingError: the group is known here, or not one of two parties or more, each once.
        """
        names = [one.worker for one in body.parties]
        if len(names) < 2 or len({*names, body.dealer.worker}) != len(names) + 1:
            raise SharingError(
                f"sharing takes two parties or more and a dealer, all different, not {', '.join(names)} and "
                f"{body.dealer.worker}"
            )
        if not body.number < len(names):
            raise SharingError(f"there is no party {body.number} among {len(names)}")
        if body.group in self._groups:
            raise SharingError(f"group {body.group!r} is known here already")
        check_number(self._groups.values(), session, "is a party of")
        reached = [session.reached(one, "share") for one in body.parties]
        self._groups[body.group] = Group(body, session, reached)
        return m.Done(), ()

    def take_seed(self, session: Session, body: m.GiveSeed) -> Steps:
        """Takes the dealer's seed, and makes itself known to the other parties.

        Raises:
            SharingError: this party has had that seed before, as of a dealer whose machine was copied or set back: what
                is opened under the same mask twice tells the difference of two secrets.
        """
        group = self._proved(body.group, body.token)
        check_speaks(session, group.client, _named(group), group.about.dealer.worker)
        if len(body.seed) != SEED_BYTES:
            raise SharingError(f"a seed has {SEED_BYTES} bytes, not {len(body.seed)}")
        seen = hashlib.blake2b(body.seed, digest_size=16).digest()
        if seen in self._seeds and group.context is None:
            raise SharingError(
                f"the dealer, worker {group.about.dealer.worker!r}, gave a seed that it has given before, so its "
                "randomness repeats: start it anew"
            )
        self._seeds[seen] = None
        if len(self._seeds) > _SEEDS:
            self._seeds.popitem(last=False)
        group.begin(body.seed)
        group.dealer = session.id
        for other in group.others:
            joins = m.JoinGroup(body.group, body.token, group.about.number)
            yield from ask(other, joins, seconds=group.about.timeout, late=SharingError)
        return m.Done(), ()

    def join(self, session: Session, body: m.JoinGroup) -> Answer:
        """Takes note of the session that another party speaks from."""
        group = self._proved(body.group, body.token)
        known = session.id in group.members or body.number in group.members.values()
        if known or body.number == group.about.number or body.number >= len(group.about.parties):
            raise SharingError(
                f"party {body.number} of group {body.group!r} is here already, or there is none"
            )
        check_speaks(session, group.client, _named(group), group.about.parties[body.number].worker)
        group.members[session.id] = body.number
        return m.Done(), ()

    def ask_needs(self, session: Session, body: m.AskNeeds) -> Steps:
        """Tells the dealer what to make, as soon as there is something."""
        group = self._groups.get(body.group)
        if group is None or group.dealer != session.id or not group.is_last:
            raise SharingError(f"group {body.group!r} does not ask this dealer for anything here")
        while True:
            group.check()
            if wanted := group.wanted():
                return m.Needs(wanted), ()
            yield Wait(group.dealing_key)

    def told_waits(self, session: Session, body: m.AskGroup) -> Answer:
        """Answers another party of a group for whom this one waits.

        Raises:
            SharingError: whoever asks is no party of such a group.
        """
        group = self._groups.get(body.group)
        if group is None or session.id not in group.members:
            raise SharingError(f"who asks is no party of a group {body.group!r} here")
        return m.Waits(group.awaited), ()

    def traffic(self, session: Session, body: m.ReadTraffic) -> Answer:
        """Answers how much this party has sent and received.

        Raises:
            GroupFailedError: the group has ended.
        """
        group = self._own(session, body.group)
        group.check()
        return group.traffic, ()

    def _proved(self, id: str, token: str) -> Group:
        group = self._groups.get(id)
        if group is None or not hmac.compare_digest(group.about.token.encode(), token.encode()):
            raise SharingError(f"there is no group {id!r} here, or it has another token")
        return group

    def _own(self, session: Session, id: str) -> Group:
        group = self._groups.get(id)
        if group is None or group.owner != session.id:
            raise SharingError(
                f"this session has no sharing group {id!r} here: one that it had was over with its connection, so "
                "share the values anew"
            )
        return group

    # ------------------------------------------------------------------ what others send unasked

    def heard(
        self, session: Session, body: m.Opening | m.Corrections | m.FailGroup, tensors: list[torch.Tensor]
    ) -> tuple[list[ToPeer], list[str]]:
        """Takes what another party or the dealer sends; returns what is to be sent, and the keys of what may go on."""
        group = self._groups.get(body.group)
        if group is None or group.failure:
            return [], []
        try:
            if isinstance(body, m.Opening):
                group.arrived(session.id, body, tensors)
                if self._store.limits(group.owner):
                    self._check_held(group)
            elif isinstance(body, m.Corrections):
                group.dealt(session.id, body, tensors)
            elif _is_known(group, session) or session.id == group.owner:
                return self.fail(group, body.reason, tell=session.id == group.owner)
            else:
                return [], []  # a party that failed before it could join tells all; a stranger ends nothing
            goes_on = group.waits and group.is_over()
        except PlanrtError as error:
            if not _is_known(group, session):
                raise
            return self.fail(group, str(error))
        return [], [group.key] if goes_on else []

    def is_short(self, body: m.Opening | m.Corrections) -> bool:
        """Returns whether what comes of a message takes no more than `SHORT` seconds, as far as is known."""
        group = self._groups.get(body.group)
        return group is None or not group.waits or group.pace.next <= SHORT

    def is_short_run(self, session: Session, op: PostedOp, dropped: Sequence[int]) -> bool:
        """Returns whether `run` takes no more than `SHORT` seconds for `op` until it waits, as far as is known.

        What is `dropped` beside it must be parts: to free a history of gradients can take long.
        """
        group = self._groups.get(op.args[0]) if op.args and isinstance(op.args[0], str) else None
        if group is None or group.owner != session.id:
            return False
        known = known_again(op, self._shape_of)
        self._looked_at = op, known
        return self.are_parts(dropped) and group.pace.first(known) <= SHORT

    def _known(self, op: PostedOp) -> Hashable:
        looked_at, self._looked_at = self._looked_at, None
        if looked_at is not None and looked_at[0] is op:
            return looked_at[1]
        return known_again(op, self._shape_of)

    def are_parts(self, ids: Sequence[int]) -> bool:
        """Returns whether objects are parts, or not there."""
        for id in ids:
            found = self._store.objects.get(id)
            if found is not None and not isinstance(found.value, SharedPart):
                return False
        return True

    @staticmethod
    def is_short_put(body: m.PutShare) -> bool:
        """Returns whether a part is drawn, or taken in, in no time."""
        return 8 * math.prod(body.shape) <= _FETCHED

    def is_short_fetch(self, id: int) -> bool:
        """Returns whether an object is a part that is fetched in no time."""
        stored = self._store.objects.get(id)
        if stored is None or not isinstance(stored.value, SharedPart):
            return False
        return stored.value.share.part.nbytes <= _FETCHED

    def _shape_of(self, id: int) -> Any:
        stored = self._store.objects.get(id)
        value = None if stored is None else stored.value
        part = value.share.part if isinstance(value, SharedPart) else value
        return part.shape if isinstance(part, torch.Tensor) else None

    def fail(self, group: Group, reason: str, *, tell: bool = True) -> tuple[list[ToPeer], list[str]]:
        """Ends a group; returns what the others are told, and the keys of what waits for it."""
        if group.failure:
            return [], []
        group.fail(reason)
        ended = m.FailGroup(group.about.group, group.failure)
        sends = [ToPeer(other, ended) for other in group.others] if tell else []
        return sends, [group.key, group.dealing_key]

    def gone(self, session: Session) -> tuple[list[ToPeer], list[str]]:
        """Ends the groups of a session that is over: of another party, of a dealer, or of a client."""
        sends: list[ToPeer] = []
        keys: list[str] = []
        for id, group in list(self._groups.items()):
            if group.owner == session.id:
                more = self.fail(
                    group, f"the client's session at {group.name_of(group.about.number)} is over"
                )
                del self._groups[id]
            elif session.id == group.dealer:
                more = self.fail(group, f"the dealer, worker {group.about.dealer.worker!r}, is gone")
            elif session.id in group.members:
                more = self.fail(group, f"{group.name_of(group.members[session.id])} is gone")
            else:
                continue
            sends += more[0]
            keys += more[1]
        return sends, keys

    def end(self, session: Session, body: m.EndGroup) -> tuple[list[ToPeer], list[str]]:
        """Frees a group that its client needs no more."""
        group = self._groups.get(body.group)
        if group is None or group.owner != session.id:
            return [], []
        del self._groups[body.group]
        return self.fail(group, "its client has ended it", tell=False)

    # ------------------------------------------------------------------------- parts of secrets

    def put(self, session: Session, body: m.PutShare, tensors: Sequence[torch.Tensor]) -> Answer:
        """Stores a part that the client sends, or a worker that holds the value."""
        group = self._groups.get(body.group)
        if group is None or not (group.owner == session.id or body.handover):
            raise SharingError(f"this session has no sharing group {body.group!r} here")
        if group.owner != session.id:
            check_speaks(session, group.client, _named(group))
        if len(tensors) != (not body.seed) or (body.seed and len(body.seed) != SEED_BYTES):
            raise SharingError("a part is one tensor, or the seed that it comes of")
        if body.seed and (entries := math.prod(body.shape)) > MAX_DRAWN:
            raise SharingError(f"a part has {MAX_DRAWN:,} entries at most, not {entries:,}: share in pieces")
        size = math.prod(body.shape)
        self._store.spend(group.owner, "taking a part of a secret", (DRAWN if body.seed else 1) * size)
        if body.seed:
            part = Stream(body.seed).ring(body.shape)
        else:
            (part,) = tensors
        if part.dtype != torch.int64 or list(part.shape) != body.shape:
            raise SharingError("a part is int64, of the shape that is said")
        label = None if body.allowed is None else frozenset(body.allowed)
        stored = StoredObject(SharedPart(group, Share(part, body.scale)), session.id, label)
        stored.handover = body.handover
        self._store.add(body.id, stored)
        return m.Done(), ()

    def share_out(self, session: Session, body: m.ShareOut) -> Steps:
        """Shares a tensor that is here: each part goes to its party, and what all parts add up to to nobody.

        Raises:
            GetNotPermitted: the session may not read it. ValueRangeError: it does not fit the scale.
        """
        stored = self._objects.ready(session, body.id)
        label = self._store.label_of(stored)
        if not session.may_read(label):
            raise GetNotPermitted(
                f"object {body.id} is private, or was computed from private data: {users_of(label)} may share it"
            )
        value = tensor_of(stored).detach()
        self._objects.check_leaves(stored)
        self._objects.audit.left(
            session, "move", stored, label, [value], to=", ".join(one.worker for one in body.parties)
        )
        if len(body.targets) != len(body.parties):
            raise SharingError("each party gets one part")
        self._store.spend(session.id, "sharing a tensor", len(body.parties) * DRAWN * value.numel())
        seeds = [new_seed() for _ in body.parties[:-1]]
        shape = list(value.shape)
        last = encode(value.cpu(), body.scale)
        for seed in seeds:
            last = Stream(seed).taken_from(last)
        allowed = allowed_list(label)
        here = self._number_here(session, body)
        seconds = None if here is None else self._groups[body.group].about.timeout + last.nbytes / SLOWEST
        reached = [session.reached(one, "share") for one in body.parties]
        for number, (party, target, seed) in enumerate(
            zip(reached, body.targets, [*seeds, b""], strict=True)
        ):
            given = m.PutShare(target, body.group, body.scale, shape, seed, allowed, body.token)
            sent = [] if seed else [last]
            try:
                if number == here:
                    self.put(session, given, sent)
                else:
                    yield from ask(party, given, sent, seconds=seconds, late=SharingError)
            except Exception:  # what the others have taken is of no use to anybody
                for other in range(number):
                    gone = m.Remove([body.targets[other]])
                    yield from (
                        self._objects.remove(session, gone)
                        if other == here
                        else [ToPeer(reached[other], gone)]
                    )
                raise
        return m.Done(), ()

    def _number_here(self, session: Session, body: m.ShareOut) -> int | None:
        """Which part stays here: that of this party, where the group is this session's own."""
        group = self._groups.get(body.group)
        if group is None or group.owner != session.id or group.me not in body.parties:
            return None
        return body.parties.index(group.me)

    # --------------------------------------------------------------------------------- programs

    def run(self, session: Session, op: PostedOp, number: int) -> Exchange:
        """Runs a program, or a plan on shares, that a client posted, and keeps its results, or why they are not there.

        Whatever keeps one party from going on ends the group: the others would wait for it.
        """
        operands: list[StoredObject] = []
        group: Group | None = None
        try:
            group = self._group_of(session, op)
            group.pace.begin(self._known(op))
            given = yield from self._programs.find(session, group, op, operands)
            if self._store.limits(group.owner):
                self._check_held(group)
            if len(_ids(op)) != given.program.values - given.program.operands:
                raise SharingError(f"the program has {given.program.values - given.program.operands} results")
            values = yield from self._run(group, given)
            self._keep(session, op, number, group, given, operands, values)
        except Exception as error:  # whatever it raises is its client's to hear, never the worker's end
            self._keep_failure(session, op, number, operands, error)
            if group is not None:
                reason = f"{group.name_of(group.about.number)}: {failure_of(error).message}"
                sends, keys = self.fail(group, cut(reason))
                yield from sends
                for key in keys:
                    yield Wake(key)

    def _check_held(self, group: Group) -> None:
        """Raises PolicyError if the groups of a session hold more than its user may keep."""
        held = sum(one.held_bytes for one in self._groups.values() if one.owner == group.owner)
        self._store.check_bytes(group.owner, held)

    def _group_of(self, session: Session, op: PostedOp) -> Group:
        group = self._own(session, op.args[0] if op.args and isinstance(op.args[0], str) else "")
        group.check()
        return group

    def _run(self, group: Group, posted: PostedProgram) -> Exchange:
        context = group.context
        if context is None:
            raise SharingError(f"{group.name_of(len(group.about.parties))} has given this party no seed")
        program, given = posted.program, posted.values
        taken: Sequence[int] = ()
        start = context.party.supply.next_number
        counts = self._store.counts_work(group.owner)
        if counts:  # to look at it takes something, too: at least that is paid for before
            size = sum(entries([one.part]) for one in given if isinstance(one, Share))
            self._store.spend(group.owner, posted.what, size + READ * len(program.calls))
        key: Hashable = None
        if group.is_last or counts or len(program.calls) >= MANY:
            me = group.about.number
            key = alike(program, given, party=me, count=context.party.count, scale=context.scale)
        if group.is_last or counts:
            needs: Needs = yield from self._needs(group, context, posted, key)
        if counts:
            flops = of_program(needs, context.party.count)
            self._store.spend(group.owner, posted.what, flops, seen=True)
        if group.is_last:
            taken = needs.taken
            group.want(needs, Base(start, masks_of(given)))
            yield Wake(group.dealing_key)
        protocol = run_program(context, program, given, key)
        answer: list[torch.Tensor] | None = None
        for step in itertools.count():
            if taken:
                group.needed = start + taken[step]
                if not group.is_over():
                    group.pace.rest()
                    group.went_on((yield from group.wait()))
                    group.pace.go_on()
            try:
                parts = next(protocol) if answer is None else protocol.send(answer)
            except StopIteration as done:
                group.pace.end_step()
                return done.value
            opening = group.sending(parts)
            for other in group.others:
                yield ToPeer(other, opening, parts)
            group.pace.end_step()
            if not group.is_over():
                group.went_on((yield from group.wait()))
            group.pace.go_on()
            answer = group.combined(parts)

    def _needs(self, group: Group, context: Context, posted: PostedProgram, key: Hashable) -> Exchange:
        """Returns the needs of a run; to find them out is a turn of its own."""
        needs = kept_needs(key)
        if needs is None:
            yield from group.turn()
            me, count, scale = group.about.number, context.party.count, context.scale
            needs = needs_of(posted.program, posted.values, party=me, count=count, scale=scale)
            group.pace.go_on()
        return needs

    # -------------------------------------------------------------------------------- what is kept

    def _keep(
        self,
        session: Session,
        op: PostedOp,
        number: int,
        group: Group,
        posted: PostedProgram,
        operands: Sequence[StoredObject],
        values: Sequence[Any],
    ) -> None:
        program = posted.program
        label: Label = None
        for stored in operands:
            label = join(label, self._store.label_of(stored))
        for place in {call.args[0].index for call in program.calls if call.in_place}:
            changed = posted.stored[place] if place < program.operands else None
            if changed is not None:
                changed.label = join(changed.label, label)
                if isinstance(values[place], Failed):
                    failure = self._failure(op, number, values[place].error)
                    changed.failure = changed.failure or failure
        for id, value in zip(_ids(op), values[program.operands :], strict=True):
            if id is None:
                continue
            if isinstance(value, Failed):
                kept = StoredObject(None, session.id, failure=self._failure(op, number, value.error))
            else:
                kept = StoredObject(SharedPart(group, value), session.id, label)
            self._add(session, id, kept)

    def _keep_failure(
        self, session: Session, op: PostedOp, number: int, operands: Sequence[StoredObject], error: Exception
    ) -> None:
        """A program that did not run: its results have the failure, and so have its operands, which it may have been
        about to change: the group has failed, and nothing is opened any more."""
        failure = self._failure(op, number, error)
        ids = [id for id in _ids(op) if id is not None]
        for id in ids:
            self._add(session, id, StoredObject(None, session.id, failure=failure))
        if not ids and not operands:
            session.failure = session.failure or failure

    def _failure(self, op: PostedOp, number: int, error: Exception) -> m.Failure:
        return failure_of_op(error, op, number, private=False)

    def _add(self, session: Session, id: int, kept: StoredObject) -> None:
        try:
            self._store.add(id, kept)
        except LocalError as error:  # the id is in use, or the worker is full
            session.failure = session.failure or failure_of(error)


def _is_known(group: Group, session: Session) -> bool:
    """Whether it is a party of the group or its dealer that speaks from a session."""
    return session.id in group.members or session.id == group.dealer


def _named(group: Group) -> str:
    return f"group {group.about.group!r}"


def _ids(op: PostedOp) -> list[int | None]:
    results = op.results if isinstance(op.results, tuple | list) else ()
    return [one.index if type(one) is Ref else None for one in results]

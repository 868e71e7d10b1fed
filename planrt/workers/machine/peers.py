"""What a worker passes on where operands are pointers to objects on another worker. No I/O.

The op goes on to that worker, with the ids that its operands have there, and the results are pointers again: a chain
of any length works alike. Apart from `planrt.workers.machine.eager` and `planrt.workers.machine.backward`, which do
the same with tensors that are here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from planrt.errors import LocalError
from planrt.types import Ref, map_leaves
from planrt.workers.machine.events import Steps, ToPeer
from planrt.workers.machine.kinds.base import StoredObject
from planrt.workers.machine.kinds.pointer import PeerRef
from planrt.workers.machine.sessions import Session, ask
from planrt.workers.machine.store import ObjectStore, new_id
from planrt.workers.wire import messages as m
from planrt.workers.wire.posted import PostedOp


class Forwarded:
    """A batch's ops and drops for other workers: one `Post` for each worker, sent when the batch is done."""

    def __init__(self) -> None:
        self._ops: dict[m.PeerAddress, list[bytes]] = {}
        self._drops: dict[m.PeerAddress, list[int]] = {}

    def op(self, peer: m.PeerAddress, packed: bytes) -> None:
        """Adds an op, in the bytes that `peer` gets."""
        self._ops.setdefault(peer, []).append(packed)

    def drop(self, peer: m.PeerAddress, ids: Sequence[int]) -> None:
        """Adds objects that `peer` can free, by the ids that they have there."""
        self._drops.setdefault(peer, []).extend(ids)

    def messages(self) -> list[ToPeer]:
        """Returns the messages. A worker runs the ops of one before it frees what is dropped."""
        peers = dict.fromkeys([*self._ops, *self._drops])
        return [ToPeer(peer, m.Post(self._ops.get(peer, []), self._drops.get(peer, []))) for peer in peers]


class PeerOps:
    """Ops and backward passes of one worker's sessions on what is elsewhere."""

    def __init__(self, worker_id: str, store: ObjectStore) -> None:
        self._worker_id = worker_id
        self._store = store

    def pass_on(
        self, session: Session, op: PostedOp, operands: Sequence[StoredObject]
    ) -> tuple[m.PeerAddress, bytes]:
        """Keeps pointers as the results of a posted op; returns the worker that runs it, and the op's bytes there.

        Raises:
            LocalError: its operands are not all on one other worker.
        """
        peer = self._common_peer(operands)

        def there(leaf: Any) -> Any:
            return Ref(self._peer_id(session, leaf.index)) if isinstance(leaf, Ref) else leaf

        refs: list[tuple[int, PeerRef]] = []

        def made(leaf: Any) -> Any:
            if not isinstance(leaf, Ref):
                return leaf
            refs.append((leaf.index, PeerRef(peer, new_id())))
            return Ref(refs[-1][1].id)

        passed = replace(
            op, args=map_leaves(op.args, there), kwargs=map_leaves(op.kwargs, there),
            results=map_leaves(op.results, made), drop=(),
        )  # fmt: skip
        packed = passed.pack()  # before the pointers are kept: an op that fails has none
        for id, ref in refs:
            self._store.add(id, StoredObject(ref, session.id))
        return peer, packed

    def call(self, session: Session, op: PostedOp, operands: Sequence[StoredObject]) -> Steps:
        """Asks for an op whose results nobody could foresee; they are pointers, with what the other worker tells."""
        peer = self._common_peer(operands)

        def there(leaf: Any) -> Any:
            return Ref(self._peer_id(session, leaf.index)) if isinstance(leaf, Ref) else leaf

        passed = replace(op, args=map_leaves(op.args, there), kwargs=map_leaves(op.kwargs, there), drop=())
        answer = yield from ask(peer, m.Call(passed.pack()))
        if not isinstance(answer, m.Made):
            raise LocalError(f"worker {peer.worker!r} answered with {type(answer).__name__}")
        made = []
        for there_id, spec in answer.objects:
            id = new_id()
            self._store.add(id, StoredObject(PeerRef(peer, there_id), session.id))
            made.append((id, spec))
        return m.Made(answer.results, made), ()

    def backward(self, session: Session, body: m.Backward, everything: Sequence[StoredObject]) -> Steps:
        """Asks for a backward pass; says which pointers here are to objects that have gradients then."""
        peer = self._common_peer(everything)
        answer = yield from ask(
            peer,
            m.Backward(
                [self._peer_id(session, id) for id in body.roots],
                [None if id is None else self._peer_id(session, id) for id in body.gradients],
                body.retain_graph,
                body.create_graph,
                None if body.inputs is None else [self._peer_id(session, id) for id in body.inputs],
            ),
        )
        if not isinstance(answer, m.Gradients):
            raise LocalError(f"worker {peer.worker!r} answered with {type(answer).__name__}")
        here = {
            stored.value: id for id, stored in self._store.of(session.id) if isinstance(stored.value, PeerRef)
        }
        found = [(here.get(PeerRef(peer, id)), spec) for id, spec in answer.objects]
        return m.Gradients([(id, spec) for id, spec in found if id is not None]), ()

    def _common_peer(self, operands: Sequence[StoredObject]) -> m.PeerAddress:
        peers = {stored.value.peer if isinstance(stored.value, PeerRef) else None for stored in operands}
        if len(peers) > 1:
            places = sorted(self._worker_id if peer is None else peer.worker for peer in peers)
            raise LocalError(f"operands on different workers: {' and '.join(places)}")
        (peer,) = peers
        if peer is None:
            raise LocalError("not a pointer to another worker")
        return peer

    def _peer_id(self, session: Session, id: int) -> int:
        value = self._store.find(session.id, id).value
        if not isinstance(value, PeerRef):
            raise LocalError(f"object {id} is not a pointer to another worker")
        return value.id

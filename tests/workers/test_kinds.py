"""Kinds of objects: what another one takes, shown with one that only this test has."""

import ast
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import planrt.workers.machine
from planrt.errors import LocalError
from planrt.types import Ref
from planrt.workers.machine.events import Disconnected, Received, Reply, ToPeer
from planrt.workers.machine.kinds import KINDS
from planrt.workers.machine.kinds.base import ObjectKind, ObjectKinds, StoredObject
from planrt.workers.machine.state import WorkerState
from planrt.workers.wire import messages as m
from planrt.workers.wire.posted import PostedOp

ELSEWHERE = m.PeerAddress("carol", "memory://carol")


@dataclass
class Shared:
    """A value of which this worker has one part, and carol another."""

    part: torch.Tensor
    id_there: int


class SharedKind(ObjectKind[Shared]):
    python_type = Shared
    name = "shared"

    def tensors(self, value):
        return [value.part]

    def can_be_found(self, value):
        return True

    def snapshot(self, value):
        return Shared(value.part.clone(), value.id_there)

    def freed(self, value):
        return [(ELSEWHERE, [value.id_there])]

    def fetch(self, session, id, stored, label, memory):
        yield from ()
        return m.Fetched(False, False, [], ""), [stored.value.part]


class Worker:
    """A machine with the toy kind, and two sessions of nobody's, 1 and 2."""

    def __init__(self):
        self.state = WorkerState("bob")
        self.state.store.kinds.register(SharedKind())
        for connection in (1, 2):
            hello = m.Hello(f"s{connection}", m.own_versions())
            self.state.handle(Received(connection, m.Envelope(1, hello), []))

    def keep(self, id, *, label=None, tags=()):
        stored = StoredObject(Shared(torch.ones(2), 70 + id), "1:s1", label, tags=tags)
        self.state.store.add(id, stored)
        return stored

    def ask(self, body, connection=1):
        *others, reply = self.state.handle(Received(connection, m.Envelope(5, body), []))
        assert isinstance(reply, Reply)
        return reply.envelope.body, reply.tensors, others

    def post(self, op, connection=1):
        return self.state.handle(Received(connection, m.Envelope(0, m.Post([op.pack()], [])), []))


@pytest.fixture
def worker():
    return Worker()


def test_it_is_listed_counted_and_dropped(worker):
    worker.keep(1)
    (item,) = worker.ask(m.ListObjects())[0].objects
    assert (item.id, item.kind) == (1, "shared")
    assert worker.ask(m.CountObjects())[0].objects == 1
    (freed,) = worker.state.handle(Received(1, m.Envelope(0, m.Post([], [1])), []))
    assert freed == ToPeer(ELSEWHERE, m.Post([], [71]))
    assert worker.ask(m.CountObjects())[0].objects == 0


def test_others_find_snapshots_of_it(worker):
    kept = worker.keep(1, tags=("#s",))
    (item,) = worker.ask(m.Search(["#s"]), connection=2)[0].objects
    assert (item.kind, item.snapshot, item.private) == ("shared", True, False)
    kept.value.part += 1
    assert worker.ask(m.Fetch(item.id, False), connection=2)[1][0].tolist() == [1, 1]


def test_its_label_follows_the_memory_of_its_tensors(worker):
    kept = worker.keep(1)
    worker.state.store.memory.add(kept.value.part, frozenset({"somebody"}))
    assert worker.state.store.label_of(kept) == {"somebody"}
    assert worker.ask(m.Fetch(1, False))[0].kind == "GetNotPermittedError"


@pytest.mark.parametrize(("label", "permitted"), [(None, True), (frozenset({"alice"}), False)])
def test_it_is_fetched_by_those_who_may_read_it(worker, label, permitted):
    worker.keep(1, label=label)
    answer, tensors, others = worker.ask(m.Fetch(1, True))
    if permitted:
        assert tensors[0].tolist() == [1, 1]
        assert others == [ToPeer(ELSEWHERE, m.Post([], [71]))]
    else:
        assert (answer.kind, others) == ("GetNotPermittedError", [])
    assert (1 in worker.state.store.objects) is not permitted


def test_what_it_does_not_do_is_refused(worker):
    worker.keep(1)
    move = m.Move(1, ELSEWHERE, 9, "token", False, False)
    assert "cannot be moved" in worker.ask(move)[0].message
    assert "is no plan" in worker.ask(m.ReadPlan(1))[0].message
    assert 1 in worker.state.store.objects


def test_an_op_of_torch_on_it_fails_as_on_anything_that_is_no_tensor(worker):
    worker.keep(1)
    worker.post(PostedOp("Tensor.add", (Ref(1), 1), {}, Ref(2), True))
    failure = worker.ask(m.Fetch(2, False))[0]
    assert (failure.kind, failure.op) == ("ExecutionError", "Tensor.add")


@pytest.mark.parametrize(("tags", "stays"), [((), False), (("#s",), True)])
def test_it_outlives_its_session_where_it_is_published(worker, tags, stays):
    worker.keep(1, tags=tags)
    freed = worker.state.handle(Disconnected(1))
    assert freed == ([] if stays else [ToPeer(ELSEWHERE, m.Post([], [71]))])
    assert (1 in worker.state.store.objects) is stays


def test_a_kind_is_registered_once_and_for_one_worker(worker):
    with pytest.raises(LocalError, match="a kind of objects for Shared already"):
        worker.state.store.kinds.register(SharedKind())
    kept = StoredObject(Shared(torch.ones(1), 1), "")
    with pytest.raises(LocalError, match="keeps no objects of type Shared"):
        WorkerState("dora").store.tensors_of(kept)


def test_kinds_differ_in_types_and_names():
    assert len({kind.python_type for kind in KINDS}) == len({kind.name for kind in KINDS}) == len(KINDS)


def test_subclasses_are_of_their_base_kind():
    kinds = ObjectKinds(KINDS)
    assert kinds.of(torch.nn.Parameter(torch.ones(1))).name == "tensor"
    assert kinds.of(None).name == "failed"
    assert kinds.find(3) is None


ASKED_FOR = {"kinds", "peers.py", "private.py", "protocols.py", "sharing", "siblings"}
"""Where a worker may ask for one kind by its class: what calls plans, passes on pointers, runs protocols, shares, and
writes objects down for another process."""


def test_only_what_is_about_one_kind_asks_for_its_class():
    names = {kind.python_type.__name__ for kind in KINDS} - {"Tensor", "NoneType"}
    machine = Path(planrt.workers.machine.__file__).parent
    for path in machine.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("isinstance", "issubclass"):
                asked = {inner.id for inner in ast.walk(node.args[1]) if isinstance(inner, ast.Name)}
                assert not asked & names or path.relative_to(machine).parts[0] in ASKED_FOR, (
                    path,
                    node.lineno,
                )

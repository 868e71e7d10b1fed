"""Sessions are apart: to one session, what another holds is absent; and what is asked twice counts once.

Random programs of raw messages from two hostile sessions run on two workers: on one a third session holds objects, on
the other it holds none. All that comes back must be equal, and what the third session holds must be as it was.
"""

import random
import re

import pytest
import torch

from planrt.plans import Plan, func2plan
from planrt.plans.ir.chain import Chain, ChainPlan, ChainStep
from planrt.serde.values import encode
from planrt.types import Ref
from planrt.workers.machine.events import Disconnected, PeerAnswered, Received, Reply, ToPeer, Wait
from planrt.workers.machine.state import WorkerState
from planrt.workers.wire import messages as m
from planrt.workers.wire.posted import PostedOp
from planrt.workers.wire.proofs import Verifier
from tests.proving import open_session

VICTIM, MALLORY, EVE = 1, 2, 3
USERS = {name: str(Verifier.of(f"the long token of {name}")) for name in ("victim", "eve")}
HELD = (101, 102, 103, 104, 105)
"""Ids of the victim's: two tensors (one is trained), one that it hands over, a plan, a private tensor."""
SECRET = "a handover token of the victim's"
PEER = m.PeerAddress("elsewhere", "ws://127.0.0.1:1")
MINE = (1, 2, 3)
PROGRAMS, STEPS = 60, 40
OPS = ["Tensor.add", "Tensor.add_", "Tensor.copy_", "Tensor.nonzero", "Tensor.data.__set__", "plan"]


def double():
    return func2plan(args_shape=[(2,)])(lambda x: x * 2)


RECORD = torch.frombuffer(bytearray(double().record.to_bytes()), dtype=torch.uint8)


class World:
    """A worker on which the victim holds its objects, or none."""

    def __init__(self, *, held):
        self.state = WorkerState("bob", users=USERS)
        self.seen = []
        for connection, token in ((VICTIM, "victim"), (MALLORY, ""), (EVE, "eve")):
            answer = open_session(self.state, connection, token and f"the long token of {token}")
            assert isinstance(answer, m.Welcome)
        if held:
            items = [
                m.PutItem(101),
                m.PutItem(102, requires_grad=True),
                m.PutItem(103),
                m.PutItem(105, allowed=[]),
            ]
            self.tell(VICTIM, m.Put(items), [torch.full((2,), float(item.id)) for item in items])
            self.tell(VICTIM, m.StorePlan(104, False), [RECORD])
            self.tell(VICTIM, m.HandOver([103], SECRET))
        for connection in (MALLORY, EVE):
            ids = [connection * 10 + number for number in MINE]
            self.tell(
                connection, m.Put([m.PutItem(id, requires_grad=True) for id in ids]), [torch.ones(2)] * 3
            )

    def tell(self, connection, body, tensors=(), number=0):
        """Sends a message, and writes down all that the worker does about it."""
        for one in self.state.handle(Received(connection, m.Envelope(number, body), list(tensors))):
            match one:
                case Reply(to, envelope, answer):
                    self.seen.append((to, _masked(repr(envelope)), [tensor.tolist() for tensor in answer]))
                case ToPeer(peer, sent, _, _):
                    self.seen.append((peer, type(sent).__name__, _masked(repr(sent))))
                case other:
                    self.seen.append(type(other).__name__)

    def held(self):
        """What the victim finds of its own."""
        before, self.seen = self.seen, []
        for id in HELD[:2]:
            self.tell(VICTIM, m.Fetch(id, False), number=9)
        self.tell(VICTIM, m.ListObjects(), number=9)
        self.tell(VICTIM, m.CountObjects(), number=9)
        found, self.seen = self.seen, before
        return found


def _masked(text):
    """Ids that the worker drew, and addresses in memory, differ from run to run."""
    return re.sub(r"\b\d{7,}\b|0x[0-9a-f]+|[0-9a-f]{16,}", "N", text)


def program(seed):
    """(connection, message, tensors, number) of a hostile program: it names its own objects and the victim's."""
    draw = random.Random(seed)
    for _ in range(STEPS):
        who = draw.choice([MALLORY, EVE])
        own = [who * 10 + number for number in MINE]

        def pick(ids=(*own, *HELD, *HELD), draw=draw):
            return draw.choice(ids)

        def some(ids=(*own, *HELD), draw=draw):
            return [draw.choice(ids) for _ in range(draw.randrange(1, 4))]

        def op(draw=draw, pick=pick, some=some):
            name = draw.choice(
                ["Tensor.add", "Tensor.add_", "Tensor.copy_", "Tensor.nonzero", "Tensor.data.__set__", "plan"]
            )
            if name == "plan":
                args = (Ref(104), False, Ref(pick()))
            else:
                args = (Ref(pick()),) if name == "Tensor.nonzero" else (Ref(pick()), Ref(pick()))
            drop = tuple(some(HELD)) if draw.random() < 0.3 else ()
            return PostedOp(name, args, {}, Ref(draw.randrange(1000, 1_000_000)), True, None, drop).pack()

        body = draw.choice(
            [
                lambda: m.Post([op(), op()], some(HELD)),
                lambda: m.Call(op()),
                lambda: m.Fetch(pick(), draw.random() < 0.5),
                lambda: m.Backward(
                    [pick()], [draw.choice([None, pick()])], False, False, draw.choice([None, some()])
                ),
                lambda: m.Describe(pick(HELD), draw.choice([[], ["#mine"]]), "mine"),
                lambda: m.Search([draw.choice(["101", "102", "104", "#mine", "mine"])]),
                lambda: m.Move(pick(HELD), PEER, draw.randrange(1000, 2000), "t", draw.random() < 0.5),
                lambda: m.HandOver(some(HELD), draw.choice(["mine", "", SECRET])),
                lambda: m.Claim(some(HELD), draw.choice(["mine", "", SECRET[:-1]])),
                lambda: m.Remove(some(HELD)),
                lambda: m.ReadPlan(pick(HELD)),
                lambda: m.PutPointer(draw.randrange(1000, 1_000_000), PEER, pick(), "t"),
                lambda: m.DeployProtocol(pick(HELD), {"a": PEER}),
                lambda: m.RunProtocol(pick(HELD), 7, some(), [draw.randrange(1000, 1_000_000)], True, 0),
                lambda: m.CancelRun(7),
                lambda: m.ReadRun(7),
                lambda: m.Fit("0" * 64, "d", 1, 1, -1, False, "SGD", {}, False, 0, False, some()),
                lambda: m.Resume(),
                lambda: m.CountObjects(),
                lambda: m.ListObjects(),
                lambda: m.Clear(),
            ]
        )()
        yield who, body, [], draw.choice([0, 5])


def test_what_another_session_holds_is_absent():
    kinds = set()
    for seed in range(PROGRAMS):
        there, absent = World(held=True), World(held=False)
        before = there.held()
        for who, body, tensors, number in program(seed):
            for world in (there, absent):
                world.tell(who, body, tensors, number)
            assert there.seen == absent.seen, (seed, body)
            kinds.add((type(body), number == 0))
        assert there.held() == before, seed
    assert len(kinds) > 35  # nearly all of them, posted and asked


def test_ids_in_use_are_refused_and_what_is_there_stays():
    """That a number is in use is all that there is to learn, and gives no right."""
    for number in (0, 5):
        world = World(held=True)
        before = world.held()
        for id in HELD:
            world.tell(MALLORY, m.Put([m.PutItem(id)]), [torch.zeros(2)], number)
            world.tell(MALLORY, m.StorePlan(id, True), [RECORD], number)
            taken = PostedOp("Tensor.add", (Ref(21), Ref(22)), {}, Ref(id), True)
            world.tell(MALLORY, m.Post([taken.pack()]))
            world.tell(MALLORY, m.PutPointer(id, PEER, 1, "t"), (), number)
            world.tell(MALLORY, m.Fetch(id, True), (), 5)
        assert world.held() == before


def test_a_handed_over_object_is_claimed_once():
    world = World(held=True)
    world.seen.clear()
    for who in (EVE, MALLORY, EVE):
        world.tell(who, m.Claim([103], SECRET), number=5)
    assert [("Failure" in text, to) for to, text, _ in world.seen] == [
        (False, EVE),
        (True, MALLORY),
        (True, EVE),
    ]
    world.seen.clear()
    world.tell(VICTIM, m.Fetch(103, False), number=5)
    assert "no object 103 here for this session" in world.seen[0][1]


def test_what_ends_with_a_session_is_gone_for_all():
    world = World(held=True)
    world.state.handle(Disconnected(VICTIM))
    open_session(
        world.state, 9, "the long token of victim", session="1" * 32
    )  # as the one before called itself
    world.seen.clear()
    world.tell(9, m.CountObjects(), number=5)
    assert "objects=0" in world.seen[0][1]
    for who in (9, EVE):
        world.tell(who, m.Claim([103], SECRET), number=5)
    assert all("was handed over" in text for _, text, _ in world.seen[1:])


# ------------------------------------------------------------------------------------------- runs of protocols


@pytest.fixture
def running():
    """A worker on which the victim's run 7 of a protocol waits for another worker."""
    world = World(held=False)
    plan = ChainPlan(Plan(torch.nn.Linear(2, 1)).build(torch.ones(1, 2)).record, True)
    chain = Chain(("x",), (plan,), (ChainStep("only", "a", 0, (Ref(0),)),), Ref(1))
    tensors = [
        torch.frombuffer(bytearray(chain.to_bytes()), dtype=torch.uint8),
        torch.ones(1, 2),
        torch.ones(1),
    ]
    world.tell(VICTIM, m.StoreProtocol(10), tensors, 5)
    world.tell(VICTIM, m.DeployProtocol(10, {"a": PEER}), (), 5)
    world.tell(VICTIM, m.Put([m.PutItem(11)]), [torch.ones(1, 2)], 5)
    *_, wait = world.state.handle(Received(VICTIM, m.Envelope(5, RUN), []))
    assert isinstance(wait, Wait)
    world.seen.clear()
    return world, wait.key


RUN = m.RunProtocol(10, 7, [11], [12], True, 0)


def test_anothers_run_is_neither_read_nor_cancelled(running):
    world, key = running
    for who in (MALLORY, EVE):
        world.tell(who, m.CancelRun(7))
        world.tell(who, m.ReadRun(7), (), 5)
    assert [text for _, text, _ in world.seen] == [repr(m.Envelope(5, m.RunStates([])))] * 2
    world.tell(VICTIM, m.ReadRun(7), (), 5)
    assert "running" in world.seen[-1][1]
    (reply,) = [one for one in world.state.handle(PeerAnswered(key, _made(), [])) if isinstance(one, Reply)]
    assert isinstance(reply.envelope.body, m.Made)


def test_a_run_and_its_answers_count_once(running):
    world, key = running
    world.tell(VICTIM, RUN, (), 6)
    assert "under way" in world.seen[-1][1]
    made = world.state.handle(PeerAnswered(key, _made(), []))
    assert [type(one.envelope.body) for one in made if isinstance(one, Reply)] == [m.Made]
    assert world.state.handle(PeerAnswered(key, _made(), [])) == []
    world.tell(VICTIM, RUN, (), 7)  # its results are there
    assert "12" in world.seen[-1][1]
    assert "Failure" in world.seen[-1][1]


def _made():
    return m.Made(encode((Ref(0),)), [(8, m.ObjectSpec([1, 1], [1, 1], "float32"))])

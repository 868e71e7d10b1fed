"""Processes of one worker as each other's clients: what they may ask, and what they are told. No processes here."""

import msgspec
import pytest
import torch

from planrt.errors import LocalError
from planrt.types import Ref
from planrt.workers.machine.events import Connected, Disconnected, PeerAnswered, Received, Reply, ToPeer
from planrt.workers.machine.siblings.neighbours import TAKEN
from planrt.workers.machine.state import WorkerState
from planrt.workers.serving.isolation import board as boards
from planrt.workers.serving.isolation.board import Board
from planrt.workers.wire import messages as m
from planrt.workers.wire.channel import Channel, Shown
from planrt.workers.wire.messages import own_versions
from planrt.workers.wire.posted import PostedOp


class Part:
    """The board, as the process of that number asks it."""

    def __init__(self, board, number):
        self.board, self.number = board, number

    def keeps(self, *about):
        self.board.keeps(self.number, *about)

    def computes(self, names):
        self.board.computes(self.number, names)

    def find(self, terms):
        found = self.board.find(self.number, terms, lambda tags: True)
        return [(m.PeerAddress("bob", str(number)), ids) for number, ids in found.items()]

    def holder(self, ids, token):
        return self._at(self.board.holder(ids, token))

    def computing(self, name):
        return self._at(self.board.computing(name))

    def _at(self, number):
        return None if number is None else m.PeerAddress("bob", str(number))


class Process:
    """A process of worker bob for one user's work, and whoever talks to it."""

    def __init__(self, board, number):
        self.state = WorkerState("bob")
        self.state.serve_alone(None, None, Part(board, number))
        self.numbers = 1

    def connect(self, connection, user, *, sibling=False):
        self.state.handle(Connected(connection, Channel(user=user, sibling=sibling)))
        self.ask(m.Hello("s" * 32, own_versions()), connection)

    def ask(self, body, connection=1, tensors=()):
        """The answer, or what it asks of others first."""
        self.numbers += 1
        said = self.state.handle(Received(connection, m.Envelope(self.numbers, body), list(tensors)))
        replies = [one for one in said if isinstance(one, Reply)]
        return (replies[0].envelope.body, replies[0].tensors) if replies else said


@pytest.fixture
def processes():
    board = Board()
    ann, ben = Process(board, 1), Process(board, 2)
    ann.connect(1, "ann")
    ben.connect(1, "ben")
    ann.connect(-1, "ben", sibling=True)  # ben's process talks to ann's
    return ann, ben


SAMPLES = {
    m.Post: m.Post([PostedOp("torch.neg", (Ref(5),), {}, Ref(6), True).pack()]),
    m.Call: m.Call(PostedOp("torch.neg", (Ref(5),), {}, None, True).pack()),
    m.Fetch: m.Fetch(5, False), m.Put: m.Put([m.PutItem(7)], ""), m.Search: m.Search(["#x"]), m.Clear: m.Clear(),
    m.Claim: m.Claim([5], "t"), m.ListObjects: m.ListObjects(), m.Backward: m.Backward([5], [None], False, False),
}  # fmt: skip


@pytest.mark.parametrize("kind", SAMPLES)
def test_a_process_takes_nothing_that_runs_from_another(processes, kind):
    ann, _ = processes
    ann.ask(m.Put([m.PutItem(5, tags=["#x"])], ""), tensors=[torch.ones(2)])
    answer, _ = ann.ask(SAMPLES[kind], -1, [torch.ones(2)] if kind is m.Put else ())
    assert isinstance(answer, m.Failure)
    assert "does not take" in answer.message
    assert kind not in TAKEN


def test_clients_do_not_ask_for_what_is_between_processes(processes):
    ann, _ = processes
    assert "does not take" in ann.ask(m.Lend([5]))[0].message
    alone = WorkerState("bob")
    alone.handle(Received(1, m.Envelope(1, m.Hello("s" * 32, own_versions())), []))
    (reply,) = alone.handle(Received(1, m.Envelope(2, m.Lend([5])), []))
    assert "does not take" in reply.envelope.body.message


def test_what_is_found_is_lent_with_all_that_is_known_of_it(processes):
    ann, ben = processes
    ann.ask(
        m.Put([m.PutItem(5, tags=["#x"], description="two ones", allowed=["ann"])], ""),
        tensors=[torch.ones(2)],
    )
    dials = [one for one in ben.ask(m.Search(["#x", "ones"])) if isinstance(one, ToPeer)]
    assert dials[0].peer.address == "1"
    lent, tensors = ann.ask(dials[0].body, -1)
    (item,) = lent.objects
    assert (item.allowed, item.source, item.original, item.tags) == (["ann"], ["#x"], False, ["#x"])
    (reply,) = ben.state.handle(PeerAnswered(dials[0].key, lent, tensors))
    (found,) = reply.envelope.body.objects
    assert (found.private, found.snapshot, found.tags, found.description) == (True, True, ["#x"], "two ones")
    assert ben.ask(m.Fetch(found.id, False))[0].kind == "GetNotPermittedError"
    assert ben.state.store.objects[found.id].source == frozenset({"#x"})


def test_what_is_claimed_is_gone_there_once_it_has_arrived_and_comes_back_if_it_cannot(processes):
    ann, ben = processes
    ann.ask(m.Put([m.PutItem(5, tags=["#x"])], "token"), tensors=[torch.ones(2)])
    assert "handed over" in ben.ask(m.Claim([5], "another"))[0].message
    (dial,) = (one for one in ben.ask(m.Claim([5], "token")) if isinstance(one, ToPeer))
    lent, tensors = ann.ask(dial.body, -1)
    assert "handed over" in ann.ask(m.Lend([5], "token"), -1)[0].message  # once
    broken = msgspec.structs.replace(lent, objects=[msgspec.structs.replace(lent.objects[0], count=3)])
    *sends, reply = ben.state.handle(PeerAnswered(dial.key, broken, tensors))
    assert isinstance(reply.envelope.body, m.Failure)
    ann.ask(sends[0].body, -1)  # given back
    assert ann.state.store.objects[5].tags == ("#x",)
    (dial,) = (one for one in ben.ask(m.Claim([5], "token")) if isinstance(one, ToPeer))
    lent, tensors = ann.ask(dial.body, -1)
    *sends, reply = ben.state.handle(PeerAnswered(dial.key, lent, tensors))
    assert reply.envelope.body == m.Done()
    ann.ask(sends[0].body, -1)
    assert 5 not in ann.state.store.objects
    assert torch.equal(ben.ask(m.Fetch(5, False))[1][0], torch.ones(2))
    assert ben.state.store.objects[5].tags == ("#x",)


def test_what_a_ticket_does_not_permit_is_not_passed_on(processes):
    ann, ben = processes
    ann.ask(m.Put([m.PutItem(5)], "token"), tensors=[torch.ones(2)])
    ticket, _ = ben.ask(m.Delegate("alice", "put"))
    ben.state.handle(Connected(7, Channel(user="ben", shown=Shown(ticket.id, "", ""))))
    ben.ask(m.Hello("t" * 32, own_versions()), 7)
    said = ben.state.handle(Received(7, m.Envelope(0, m.Claim([5], "token")), []))
    assert not [one for one in said if isinstance(one, ToPeer)]
    assert "which does not include Claim" in ben.ask(m.Put([m.PutItem(8)], ""), 7, [torch.ones(1)])[0].message


def test_what_cannot_go_is_refused_and_stays(processes):
    ann, ben = processes
    ann.ask(m.Put([m.PutItem(5)], "token"), tensors=[torch.ones(2)])
    ann.ask(m.HandOver([5], "token"))
    ann.state.handle(
        Received(
            1,
            m.Envelope(0, m.Post([PostedOp("torch.reshape", (Ref(5), (2, 1)), {}, Ref(6), True).pack()])),
            [],
        )
    )
    (dial,) = (one for one in ben.ask(m.Claim([5], "token")) if isinstance(one, ToPeer))
    answer, _ = ann.ask(dial.body, -1)
    assert "shares its memory with object 6" in answer.message
    (reply,) = ben.state.handle(PeerAnswered(dial.key, answer, []))
    assert "clone() it" in reply.envelope.body.message
    assert torch.equal(ann.ask(m.Fetch(5, False))[1][0], torch.ones(2))


PARTIES = [m.PeerAddress("bob", "x"), m.PeerAddress("carl", "y")]


def test_parties_are_heard_wherever_their_connection_comes_in():
    """Where the client is nobody, each connection of nobody's has a process of its own."""
    board = Board()
    one, other = Process(board, 1), Process(board, 2)
    one.connect(1, None)
    other.connect(1, None)
    one.connect(-1, None, sibling=True)
    made = m.MakeGroup("g", "token", 0, PARTIES, m.PeerAddress("dealer", "z"), 1, 5.0)
    assert one.ask(made)[0] == m.Done()
    assert "known here already" in other.ask(made)[0].message
    (dial,) = (said for said in other.ask(m.JoinGroup("g", "token", 1)) if isinstance(said, ToPeer))
    assert (dial.peer.address, dial.body) == ("1", m.JoinGroup("g", "token", 1))
    assert one.ask(dial.body, -1)[0] == m.Done()
    (reply,) = other.state.handle(PeerAnswered(dial.key, m.Done(), []))
    assert reply.envelope.body == m.Done()
    ended = [said for said in other.state.handle(Disconnected(1)) if isinstance(said, ToPeer)]
    assert [type(said.body) for said in ended] == [m.FailGroup]


def test_another_process_takes_no_part_in_what_a_user_computes(processes):
    """Its parties act for that user, and so their connections come in where the user's own do."""
    ann, ben = processes
    assert ann.ask(m.MakeGroup("g", "token", 0, PARTIES, m.PeerAddress("dealer", "z"), 1, 5.0))[0] == m.Done()
    (dial,) = (one for one in ben.ask(m.JoinGroup("g", "token", 1)) if isinstance(one, ToPeer))
    part = m.PutShare(7, "g", 1, [2], b"0" * 16, handover="t")
    for body in (dial.body, m.GiveSeed("g", "token", b"0" * 16), part):
        assert "group 'g' is of user 'ann'" in ann.ask(body, -1)[0].message


# ------------------------------------------------------------------------------------------------ the board


def test_the_board_takes_no_more_than_it_may(monkeypatch):
    monkeypatch.setattr(boards, "MOST_OBJECTS", 2)
    monkeypatch.setattr(boards, "MOST_TEXT", 20)
    board = Board()
    board.keeps(1, 1, ["#a"], "", "")
    board.keeps(1, 2, ["#b"], "", "")
    with pytest.raises(LocalError, match="at most 2"):
        board.keeps(1, 3, ["#c"], "", "")
    with pytest.raises(LocalError, match="characters"):
        board.keeps(1, 2, ["#b"], "much that is said about it", "")
    with pytest.raises(LocalError, match="choose another id"):
        board.keeps(2, 1, ["#mine"], "", "")
    board.keeps(2, 1, [], "", "")  # of which nothing is another's to take away
    board.keeps(1, 2, [], "", "")
    board.keeps(1, 3, ["#c"], "", "")
    assert board.find(2, ["#c"], lambda tags: True) == {1: [3]}
    assert board.find(2, ["#c"], lambda tags: False) == {}
    assert board.find(1, ["#c"], lambda tags: True) == {}
    board.over(1)
    assert board.find(2, [], lambda tags: True) == {}
    assert not board.publishes(1)


def test_computations_belong_to_who_had_them_first():
    board = Board()
    board.computes(1, ["group a"])
    board.computes(2, ["group a", "group b"])
    assert (board.computing("group a"), board.computing("group b"), board.computing("c")) == (1, 2, None)
    board.computes(2, [])
    assert (board.computing("group a"), board.computing("group b")) == (1, None)
    with pytest.raises(LocalError, match="too many|limit"):
        board.computes(1, [str(one) for one in range(3000)])

"""Parties and dealers as state machines: messages in any order, lost, out of order, of other shapes, of strangers."""

import itertools
import time
from random import Random

import pytest
import torch

from planrt.sharing.programs.calls import Call, Program
from planrt.types import Ref
from planrt.workers.machine.events import PeerAnswered, Received, Reply, ToPeer
from planrt.workers.machine.sessions import Session
from planrt.workers.machine.sharing import dealers
from planrt.workers.machine.sharing.groups import Group
from planrt.workers.wire import messages as m
from planrt.workers.wire.posted import PROGRAM, PostedOp
from tests.workers.sharing_net import CLIENT, Net

X, Y = torch.tensor([[1.5, -2.0], [0.25, 3.0]]), torch.tensor([[-1.0, 0.5], [2.0, -4.0]])
PRODUCT = [Call("mul", (Ref(0), Ref(1)), {}, Ref(2)), Call("relu", (Ref(2),), {}, Ref(3))]


@pytest.fixture(autouse=True)
def seeds(monkeypatch):
    """The dealers' seeds are 1, 2, 3 ..."""
    numbers = itertools.count(1)
    monkeypatch.setattr(dealers, "new_seed", lambda: next(numbers).to_bytes(16, "big"))


def started(*names, **options):
    net = Net(*names, **options)
    assert net.begin() == m.Done()
    net.share(1, X)
    net.share(2, Y)
    return net


@pytest.mark.parametrize("count", [2, 3, 4])
def test_bits_do_not_depend_on_the_order_in_which_messages_arrive(count, monkeypatch):
    found = []
    for seed in range(8):
        numbers = itertools.count(1)
        monkeypatch.setattr(dealers, "new_seed", lambda numbers=numbers: next(numbers).to_bytes(16, "big"))
        net = started(*"abcd"[:count], "dealer", seed=seed)
        net.post(PRODUCT, [1, 2], [3, 4])
        net.post([Call("mm", (Ref(0), Ref(1)), {}, Ref(2))], [4, 1], [5])
        found.append(net.get(5))
    expected = (X * Y).relu() @ X
    assert (found[0] - expected).abs().max() < 1e-3
    assert all(torch.equal(one, found[0]) for one in found)


def test_what_a_party_opens_leaves_before_it_computes_on(monkeypatch):
    """Where the other's part is there already, nothing makes it wait: it would compute to the next opening first."""
    earlier = started("a", "b", "dealer")
    earlier.post(PRODUCT, [1, 2], [3, 4])
    earlier.run()  # from here on it is known what the program needs
    net = started("a", "b", "dealer")
    events = []
    net.changed = lambda sender, to, body, tensors: (
        None if to == "a" and isinstance(body, m.Opening) else (body, tensors)
    )
    net.post(PRODUCT, [1, 2], [3, 4], names=["a"])
    net.run()  # it has opened the first and waits
    combined = Group.combined
    monkeypatch.setattr(Group, "combined", lambda *args: (events.append("on"), combined(*args))[1])
    op = PostedOp(PROGRAM, ("g", Program.of(2, PRODUCT).text, (Ref(1), Ref(2))), {}, (Ref(3), Ref(4)), False)
    waiting, queue = [Received(net.connections[CLIENT, "b"], m.Envelope(0, m.Post([op.pack()])), [])], []

    def deliver(one):
        if isinstance(one, Reply):
            replies.append(one)
            events.append(one.envelope.body)
        else:
            events.append(one.body)

    while waiting:
        replies = []
        left = net.states["b"].handle(waiting.pop(), deliver=deliver)
        assert not [one for one in left if isinstance(one, ToPeer) and isinstance(one.body, m.Opening)]
        queue += replies
        for one in [*left, *replies]:
            if isinstance(one, Reply):  # to the dealer, who asked what is needed
                net.handle("dealer", PeerAnswered(net.keys.popitem()[1], one.envelope.body, []))
                while link := net.queues["dealer", "b"]:
                    envelope, tensors, _ = link.popleft()
                    waiting.append(Received(net.connections["dealer", "b"], envelope, list(tensors)))
    assert queue
    assert isinstance(events[0], m.Needs), "the dealer is told before anything is computed"
    openings = [
        one if one == "on" else one.number for one in events if one == "on" or isinstance(one, m.Opening)
    ]
    assert openings[:3] == [0, "on", 1]


def test_other_sessions_go_on_while_a_program_waits():
    net = started("a", "b", "dealer")
    net.changed = lambda sender, to, body, tensors: None if isinstance(body, m.Opening) else (body, tensors)
    net.post(PRODUCT, [1, 2], [3, 4])
    net.run()
    assert net.held["a"]
    net.tell("a", m.Put([m.PutItem(77)]), [torch.ones(2)], sender="somebody")
    _, (tensor,) = net.ask("a", m.Fetch(77, False), sender="somebody")
    assert tensor.tolist() == [1, 1]
    assert net.ask("a", m.CountObjects()) == (None, None)  # this client's own questions wait
    assert net.held["a"]


def failed(net, *says):
    for told in net.get(4):
        assert isinstance(told, str), told
        assert any(one in told for one in says), told


@pytest.mark.parametrize("kind", ["shape", "dtype", "fewer", "number", "twice"])
def test_openings_that_do_not_fit_end_the_group(kind):
    net = started("a", "b", "dealer")
    seen = []

    def change(sender, to, body, tensors):
        if not isinstance(body, m.Opening) or sender != "b":
            return body, tensors
        seen.append(body)
        if kind == "number":
            return m.Opening("g", body.number + 1), tensors
        if kind == "twice":
            net.queues[sender, to].appendleft((m.Envelope(0, body), tensors, ""))
            net.changed = lambda sender, to, body, tensors: (body, tensors)
        other = {
            "shape": lambda: [one.reshape(-1) for one in tensors],
            "dtype": lambda: [one.to(torch.int32) for one in tensors],
            "fewer": lambda: tensors[:-1],
        }
        return body, other.get(kind, lambda: tensors)()

    net.changed = change
    net.post(PRODUCT, [1, 2], [3, 4])
    failed(net, "party 'b'")
    net.changed = lambda sender, to, body, tensors: (body, tensors)
    net.post(PRODUCT, [1, 2], [5, 6])
    assert all("party 'b'" in told for told in net.get(6))
    assert all("party 'b'" in told for told in net.get(1))  # nothing is opened any more
    assert not any(net.held.values())


def test_strangers_open_nothing():
    net = started("a", "b", "dealer")
    for body in (m.Opening("g", 0), m.Corrections("g", [0]), m.FailGroup("g", "because")):
        net.tell("a", body, [torch.ones(2, dtype=torch.int64)], sender="stranger")
        net.run()
    for body in (m.JoinGroup("g", "guess", 1), m.GiveSeed("g", "guess", bytes(16)), m.ReadTraffic("g"),
                 m.AskNeeds("g"), m.PutShare(9, "g", 1, [1], bytes(16))):  # fmt: skip
        told, _ = net.ask("a", body, sender="another")
        assert told.kind == "SharingError"
    net.tell(
        "a", m.FailGroup("g", "because"), [], sender="late"
    )  # as a party that failed before it had joined
    net.run()
    assert isinstance(net.ask("a", m.CountObjects(), sender="late")[0], m.Counted)
    net.post(PRODUCT, [1, 2], [3, 4])
    assert (net.get(4) - (X * Y).relu()).abs().max() < 1e-3


def test_a_seed_does_not_become_any_memory():
    net = started("a", "b", "dealer")
    for shape in ([2**27 + 1], [2**40, 2**40], [2**20, 2**20, 0, 5]):
        told, _ = net.ask("a", m.PutShare(9, "g", 1, shape, bytes(16)))
        if 0 in shape:
            assert isinstance(told, m.Done)
        else:
            assert told.kind == "SharingError"
            assert "share in pieces" in told.message


@pytest.mark.parametrize("lost", [("b", "a"), ("dealer", "b"), ("dealer", "a")])
def test_a_member_that_is_gone_ends_the_group_at_once(lost):
    net = started("a", "b", "dealer")
    net.changed = lambda sender, to, body, tensors: None if isinstance(body, m.Opening) else (body, tensors)
    net.post(PRODUCT, [1, 2], [3, 4])
    net.run()
    net.lose(*lost)
    net.changed = lambda sender, to, body, tensors: (body, tensors)
    failed(net, "is gone")
    assert not any(net.held.values())


@pytest.mark.parametrize("missing", [m.Opening, m.Corrections])
def test_who_takes_too_long_is_named(missing):
    net = started("a", "b", "dealer", timeout=0.3)
    net.changed = lambda sender, to, body, tensors: None if isinstance(body, missing) else (body, tensors)
    net.post(PRODUCT, [1, 2], [3, 4])
    net.run()
    assert net.held["a"]
    time.sleep(0.35)
    net.ring()
    failed(net, "did not answer within 0.3 s")
    assert not any(net.held.values())


def test_a_dealer_deals_until_the_last_party_has_ended_the_group():
    """A client that needs a group no more tells all; parties are in the middle of what it posted before."""
    for _ in range(10):
        net = started("a", "b", "dealer")
        dealt = net.states["dealer"]._parts.dealers._groups
        net.post(PRODUCT, [1, 2], [3, 4])
        net.tell("dealer", m.EndGroup("g"))
        net.run()
        assert isinstance(net.get(3), torch.Tensor)
        assert list(dealt) == ["g"]
        for name in ("b", "a"):
            net.tell(name, m.EndGroup("g"))
        net.run()
        assert not dealt


def test_a_party_that_does_not_answer_who_joins_it_is_named():
    net = Net("alice", "bob", "james", timeout=5.0)
    net.changed = lambda sender, to, body, tensors: (
        None if isinstance(body, m.JoinGroup) and to == "bob" else (body, tensors)
    )
    assert net.begin() is None
    net.ring()
    (failure,) = [body for body, _ in net.answers.values() if isinstance(body, m.Failure)]
    assert "worker 'bob' did not answer within 5 s" in failure.message
    net.changed = lambda sender, to, body, tensors: (body, tensors)


def test_garbage_from_the_last_party_ends_the_group_and_not_the_dealer():
    for garbage in ([7], [[9, [], [[0, "Mask"]]]], [[9, [], [[5, "Zero", ["t", 1 << 38]]]]], [[9, [], 1000]],
                    [[9, [], [[0, "Given", "x"]]]], [[0, [], [[0, "Zero", ["t", 3]]]]]):  # fmt: skip
        net = started("a", "b", "dealer")
        asked = m.Needs(garbage)
        dealer = net.states["dealer"]
        real = net.states["b"]._parts.parties.ask_needs

        def answer(session, body, real=real, asked=asked):
            yield from real(session, body)
            return asked, ()

        net.states["b"]._parts.parties.ask_needs = answer
        net.post(PRODUCT, [1, 2], [3, 4])
        net.run()
        # the question that waited before was answered as it should be; the next one is not
        net.post(PRODUCT, [1, 2], [5, 6])
        told = net.get(6)
        assert not isinstance(told, list) or all("dealer" in one for one in told), told
        assert dealer._parts.dealers._groups.keys() <= {"g"}


def test_a_group_ends_with_its_client_and_its_parts_go():
    net = started("a", "b", "dealer")
    net.post(PRODUCT, [1, 2], [3, 4])
    net.run()
    assert net.keep("a") == 4
    net.lose(CLIENT, "a")
    net.run()
    assert net.keep("a") == 0
    assert net.states["a"]._parts.parties._groups == {}
    assert "client's session" in net.ask("b", m.Fetch(4, False))[0].message
    for name in ("b", "dealer"):
        net.tell(name, m.EndGroup("g"))
    net.run()
    assert net.states["b"]._parts.parties._groups == {}
    assert net.states["dealer"]._parts.dealers._groups == {}


@pytest.mark.parametrize("secret", [torch.zeros(8, 8), torch.full((8, 8), -30000.0), torch.eye(8) * 1000])
def test_what_a_party_receives_is_uniform_whatever_the_secret(secret, monkeypatch):
    """Its own seed is the same in every run; bytes of all openings are counted, and held against equal shares."""
    random = Random(7)
    counts = torch.zeros(256, dtype=torch.int64)

    def seen(sender, to, body, tensors):
        if isinstance(body, m.Opening) and to == "a":
            for tensor in tensors:
                octets = tensor.reshape(-1).contiguous().view(torch.uint8)
                counts.add_(torch.bincount(octets.to(torch.int64), minlength=256))
        return body, tensors

    for _ in range(20):
        drawn = iter([bytes(16), random.randbytes(16)])
        monkeypatch.setattr(dealers, "new_seed", lambda drawn=drawn: next(drawn))
        net = Net("a", "b", "dealer")
        net.begin()
        net.share(1, secret)
        net.changed = seen
        net.post(
            [Call("mm", (Ref(0), Ref(0)), {}, Ref(1)), Call("relu", (Ref(1),), {}, Ref(2))], [1], [None, 3]
        )
        net.run()
    expected = counts.sum() / 256
    assert expected > 50
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert abs(chi_square - 255) < 6 * (2 * 255) ** 0.5


def test_what_all_are_to_know_may_be_read_by_who_says_so():
    net = started("a", "b", "dealer")
    for name in net.names:
        net.tell(name, m.Put([m.PutItem(7, allowed=["somebody"])]), [torch.full((2, 2), 1e30)])
    net.post([Call("add", (Ref(0), Ref(1)), {}, Ref(2))], [1, 7], [4])
    for told in net.get(4):
        assert "private" in told
        assert "1e+30" not in told


def test_a_seed_is_taken_once():
    net = started("a", "b", "dealer")
    net.tell("a", m.GiveSeed("g", "secret", bytes(16)), sender="dealer", id=900, key="k")
    net.run()
    told = net.ask("a", m.GiveSeed("g", "secret", bytes(16)))[0]
    assert "has its seed already" in told.message


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda names: [names[0]], "two parties or more"),
        (lambda names: [names[0], names[0]], "all different"),
        (lambda names: [*names, "dealer"], "all different"),
    ],
)
def test_groups_that_are_none(change, says):
    net = Net("a", "b", "dealer")
    parties = [m.PeerAddress(name, "memory://x") for name in change(["a", "b"])]
    body = m.MakeGroup("h", "t", 0, parties, net.addresses["dealer"], 10, 1.0)
    assert says in net.ask("a", body)[0].message


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ((), "no sharing group"), (("h", "", ()), "no sharing group"), (("g", "zz", (Ref(1),)), "two fields"),
        (("g", "", (Ref(1),), "0" * 64), "no program on shares has the hash '00"),
        (("g", 7, ()), "posted with its group"), (("g", "zz", ("1",)), "posted with its group"),
    ],
)  # fmt: skip
def test_programs_that_are_none_end_the_group_where_there_is_one(args, says):
    net = started("a", "b", "dealer")
    for name in net.names:
        net.tell(name, m.Post([PostedOp(PROGRAM, args, {}, (Ref(4),), False).pack()]))
    told = net.get(4)
    assert all(isinstance(one, str) for one in told)
    assert any(says in one or "malformed" in one or "not readable" in one for one in told), told


def test_parts_are_for_their_own_session():
    net = started("a", "b", "dealer")
    net.run()
    for body in (m.Fetch(1, False), m.Move(1, net.addresses["b"], 9, "t")):
        told, _ = net.ask("a", body, sender="stranger")
        assert told.kind == "UnknownObjectError"
    told = net.ask("a", m.Move(1, net.addresses["b"], 9, "t"))[0]
    assert "stays with its party" in told.message
    found = net.ask("a", m.Search(["1"]))[0]
    assert found.objects == []


def test_what_is_shared_halfway_leaves_nothing_behind():
    net = started("a", "b", "c", "dealer")
    net.tell("c", m.EndGroup("g"))
    net.tell("dealer", m.Put([m.PutItem(7)]), [torch.ones(3)])
    net.run()
    before = [net.keep(name) for name in net.names]
    addresses = [net.addresses[name] for name in net.names]
    body, _ = net.ask("dealer", m.ShareOut(7, "g", net.scale, addresses, [8] * 3, "token"))
    assert "no sharing group 'g'" in body.message
    assert [net.keep(name) for name in net.names] == before
    net.tell("a", m.Claim([8], "token"))  # nobody gets what was to be one of its parts
    net.run()
    assert net.keep("a") == before[0]


@pytest.mark.parametrize("seed", range(5))
def test_an_opening_is_over_with_the_last_part_that_is_missing_in_whatever_order_they_come(seed):
    """Four parties, of which others may be ahead by one: what a group counts is what it would see by looking."""
    draws = Random(seed)
    addresses = [m.PeerAddress(name, f"memory://{name}") for name in ("bob", "alice", "carol", "dan")]
    about = m.MakeGroup("g", "secret", 1, addresses, m.PeerAddress("james", "memory://james"), 2**16, 5.0)
    group = Group(about, Session("client"), addresses)
    group.members = {"of bob": 0, "of carol": 2, "of dan": 3}
    sent = dict.fromkeys(group.members, 0)
    for number in range(20):
        mine = [torch.tensor([number])]
        assert group.sending(mine).number == number
        while group.missing():
            assert not group.is_over()
            who = draws.choice([one for one, count in sent.items() if count <= number + 1])
            group.arrived(who, m.Opening("g", sent[who]), [torch.tensor([100 * sent[who]])])
            sent[who] += 1
        assert group.is_over()
        assert group.combined(mine)[0].item() == number + 300 * number
        ahead = sum(count > number + 1 for count in sent.values())
        assert group.held_bytes == 8 * ahead
        assert group.traffic == m.GroupTraffic(number + 1, 24 * (number + 1), 24 * (number + 1))

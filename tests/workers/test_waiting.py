"""Whom parties name that wait for each other (`planrt.workers.machine.waiting`), on a clock that is counted."""

import heapq
import itertools
import random

import pytest

from planrt.workers.machine import waiting
from planrt.workers.machine.events import Alarm, PeerAnswered, TimePassed, ToPeer, Wait
from planrt.workers.machine.kinds.protocol import PeerError
from planrt.workers.machine.waiting import wait
from planrt.workers.wire import messages as m

TIMEOUT = 10.0


class Parties:
    """Parties that follow a program, a list of parcels (from, to): each sends its own, and waits for those that are for
    it, in this order. The first `Late` ends all."""

    def __init__(self, count, program, monkeypatch, *, seed=0, stopped=None, at=0.0, asks=True, answer=None):
        self.random = random.Random(seed)
        self.count, self.now, self.serial = count, 0.0, itertools.count()
        self.events, self.late = [], None
        self.stopped, self.at = stopped, at
        self.question = m.AskJoint("j") if asks else None
        self.answer = answer or (lambda whose, told: told)
        self.addresses = [m.PeerAddress(str(number), "memory://x") for number in range(count)]
        self.members = [Member(self, number, program) for number in range(count)]
        monkeypatch.setattr(waiting.time, "monotonic", lambda: self.now)

    def later(self, seconds, whose, what):
        heapq.heappush(self.events, (self.now + seconds, next(self.serial), whose, what))

    def delay(self):
        return self.random.uniform(0.0, 0.1)

    def run(self, until=100.0):
        for one in self.members:
            one.go_on()
        while self.events and self.late is None:
            self.now, _, whose, what = heapq.heappop(self.events)
            if self.now > until:
                break
            if whose != self.stopped or self.now < self.at:
                what()
        return self.late


class Member:
    def __init__(self, net, number, program):
        self.net, self.number = net, number
        self.steps = iter([one for one in program if number in one])
        self.parties, self.alarm, self.key = net.addresses, 0.0, f"member {number}"
        self.came = dict.fromkeys(range(net.count), 0)
        self.awaited = self.waits = None
        self.keys = ()

    def go_on(self):
        """Sends what comes next, and begins to wait where something is to come."""
        step = next(self.steps, None)
        if step is None:
            return
        whom, to = step
        if whom == self.number:
            other = self.net.members[to]
            self.net.later(self.net.delay(), to, lambda: other.took(self.number))
            self.net.later(self.net.delay(), self.number, self.go_on)
            return
        if self.came[whom] > 0:
            self.came[whom] -= 1
            self.net.later(self.net.delay(), self.number, self.go_on)
            return
        self.awaited = whom
        self.waits = wait(
            self,
            self.number,
            TIMEOUT,
            self.net.question,
            is_over=lambda: self.came[whom] > 0,
            awaited=lambda: [whom],
        )
        self.drive(None)

    def drive(self, sent):
        try:
            step = self.waits.throw(sent) if isinstance(sent, Exception) else self.waits.send(sent)
            while not isinstance(step, Wait):
                self.carry_out(step)
                step = self.waits.send(None)
            self.keys = (step.key, *step.others)
        except StopIteration as stop:
            self.keys = ()
            if stop.value is not None:
                self.net.late = self.number, stop.value
                return
            self.came[self.awaited] -= 1
            self.awaited = None
            self.net.later(self.net.delay(), self.number, self.go_on)

    def carry_out(self, step):
        if isinstance(step, Alarm):
            self.net.later(step.seconds, self.number, lambda: self.wake(TimePassed(step.key)))
            return
        assert isinstance(step, ToPeer)
        other = self.net.members[int(step.peer.worker)]

        def asked():
            told = self.net.answer(other.number, [] if other.awaited is None else [other.awaited])
            if told is None:
                return
            back = (
                PeerError("gone", step.key) if told == "gone" else PeerAnswered(step.key, m.Waits(told), [])
            )
            self.net.later(self.net.delay(), self.number, lambda: self.wake(back))

        self.net.later(self.net.delay(), other.number, asked)

    def wake(self, sent):
        if sent.key in self.keys:
            self.drive(sent)

    def took(self, source):
        self.came[source] += 1
        self.wake(TimePassed(self.key))


def started(count, monkeypatch, *, seed=0, **options):
    """Parties with a long program that the seed draws."""
    draw = random.Random(seed)
    program = [tuple(draw.sample(range(count), 2)) for _ in range(2000)]
    return Parties(count, program, monkeypatch, seed=seed, **options)


@pytest.mark.parametrize("count", [3, 4, 6])
def test_whoever_stops_at_any_time_is_the_one_that_is_named(count, monkeypatch):
    draw = random.Random(count)
    for seed in range(100):
        stopped, at = draw.randrange(count), draw.uniform(0.0, 30.0)
        net = started(count, monkeypatch, seed=seed, stopped=stopped, at=at)
        named_by, late = net.run()
        assert list(late.parties) == [stopped], (seed, at)
        assert named_by != stopped
        assert late.told(str) in {f"{stopped} did not answer within {seconds} s" for seconds in (10, 20)}


def test_without_questions_one_that_waits_is_named_too(monkeypatch):
    """What the questions are for: where a party does not know them, somebody else is named now and then."""
    found = set()
    for seed in range(100):
        _, late = started(4, monkeypatch, seed=seed, stopped=2, at=5.0 + seed / 10, asks=False).run()
        found |= set(late.parties)
    assert 2 in found
    assert found - {2}


def test_the_end_comes_within_twice_the_time_whatever_the_others_say(monkeypatch):
    for seed in range(25):
        for lie in ([3], [0, 1, 2, 3], [64], [], None, "gone"):
            net = started(
                4, monkeypatch, seed=seed, stopped=2, at=5.0, answer=lambda whose, told, lie=lie: lie
            )
            assert net.run(until=1000.0) is not None
            assert net.now < 10.0 + 2 * TIMEOUT  # on the counted clock


def test_parties_that_wait_in_a_circle_give_up_and_say_who_waits_for_whom(monkeypatch):
    net = Parties(3, [], monkeypatch)
    for one in net.members:  # nobody sends
        one.steps = iter([((one.number - 1) % 3, one.number)])
    _, late = net.run()
    ((named, whom),) = late.parties.items()
    assert late.told(str) == f"{named} did not answer within 20 s, and waits for {(named - 1) % 3}"
    assert whom == [(named - 1) % 3]


def test_two_that_wait_for_each_other_give_up_after_the_time(monkeypatch):
    net = Parties(2, [], monkeypatch)
    for one in net.members:
        one.steps = iter([(1 - one.number, one.number)])
    _, late = net.run()
    ((named, _),) = late.parties.items()
    assert late.told(str) == f"{named} did not answer within 10 s, and waits for {1 - named}"


def test_who_was_stopped_itself_asks_before_it_names_anybody(monkeypatch):
    """After a pause of its own its time is over, and it has heard nothing: that is nobody's fault."""
    net = Parties(2, [(1, 0)], monkeypatch)
    member = net.members[0]
    member.go_on()
    net.events.clear()
    net.now = 50.0
    member.wake(TimePassed(member.key))
    assert net.late is None
    assert [whose for _, _, whose, _ in net.events] == [1, 0]  # the question, and when it will look again
    net.later(1.0, 0, lambda: member.took(1))
    while net.events:
        net.now, _, _, what = heapq.heappop(net.events)
        what()
    assert net.late is None

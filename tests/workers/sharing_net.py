"""Workers without sockets, who send each other messages in an order that a seed draws: each link in its own order."""

import random
from collections import deque

import torch

from planrt.sharing.additive import reconstruct
from planrt.sharing.programs.calls import Program
from planrt.sharing.randomness import Stream
from planrt.types import Ref
from planrt.workers.machine.events import (
    Again,
    Alarm,
    Disconnected,
    Hold,
    PeerAnswered,
    Received,
    Release,
    Reply,
    TimePassed,
    ToPeer,
)
from planrt.workers.machine.state import WorkerState
from planrt.workers.wire import messages as m
from planrt.workers.wire.messages import from_wire, to_wire
from planrt.workers.wire.posted import PROGRAM, PostedOp
from tests.proving import open_session

CLIENT = "client"


class Net:
    def __init__(self, *names, seed=0, timeout=60.0, scale=2**16):
        self.random = random.Random(seed)
        self.names, self.dealer, self.scale = names[:-1], names[-1], scale
        self.states = {name: WorkerState(name) for name in names}
        self.addresses = {name: m.PeerAddress(name, f"memory://{name}") for name in names}
        self.queues = {}
        """(from, to) -> (envelope, tensors, key) that are on their way."""
        self.connections = {}
        """(from, to) -> number of the connection at the latter."""
        self.keys = {}
        """(from, to, number of the request) -> what the former waits under."""
        self.alarms = []
        self.held = {}
        self.answers = {}
        self.next_id = 100
        self.changed = lambda sender, to, body, tensors: (body, tensors)
        """What becomes of a message on its way; None is lost."""
        for name in names:
            self.connection(CLIENT, name)
        addresses = [self.addresses[name] for name in self.names]
        for number, name in enumerate(self.names):
            made = m.MakeGroup("g", "secret", number, addresses, self.addresses[self.dealer], scale, timeout)
            assert isinstance(self.ask(name, made)[0], m.Done)

    def begin(self):
        body, _ = self.ask(
            self.dealer, m.MakeDealer("g", "secret", [self.addresses[name] for name in self.names])
        )
        self.tell(self.dealer, m.Deal("g"))
        return body

    def connection(self, sender, to):
        if (sender, to) not in self.connections:
            number = self.connections[sender, to] = len(self.connections) + 1
            open_session(self.states[to], number)
            self.queues[sender, to] = deque()
        return self.connections[sender, to]

    def tell(self, to, body, tensors=(), sender=CLIENT, key="", id=0):
        self.connection(sender, to)
        self.queues[sender, to].append((m.Envelope(id, body), list(tensors), key))

    def ask(self, to, body, tensors=(), sender=CLIENT):
        id = self.next_id = self.next_id + 1
        self.tell(to, body, tensors, sender, id=id)
        self.run()
        return self.answers.pop(id, (None, None))

    def run(self):
        """Until nothing is on its way."""
        while True:
            ready = [
                link
                for link, queue in self.queues.items()
                if queue and self.connections[link] not in self.held.get(link[1], {})
            ]
            now = [alarm for alarm in self.alarms if alarm[0] == 0]
            if not ready and not now:
                return
            if now and (not ready or self.random.random() < 0.5):
                self.alarms.remove(now[0])
                self.handle(now[0][1], TimePassed(now[0][2]))
                continue
            sender, to = self.random.choice(ready)
            envelope, tensors, key = self.queues[sender, to].popleft()
            arrived = self.changed(sender, to, envelope.body, tensors)
            if arrived is None:
                continue
            body, tensors = arrived
            envelope = from_wire(to_wire(m.Envelope(envelope.id, body)))
            if key:
                self.keys[sender, to, envelope.id] = key
            self.handle(
                to, Received(self.connections[sender, to], envelope, [one.clone() for one in tensors])
            )

    def handle(self, name, event):
        delivered = (
            self.random.random() < 0.5
        )  # who hands in events may take what is posted at once, or all at the end

        def deliver(one):
            if isinstance(one, Reply):
                answered.append(one)
                return
            assert isinstance(one, ToPeer)
            assert not one.key
            self.tell(one.peer.worker, one.body, one.tensors, name)

        answered = []

        left = self.states[name].handle(event, deliver=deliver if delivered else None)
        for one in [*answered, *left]:
            match one:
                case ToPeer(peer, body, tensors, key):
                    self.next_id += 1
                    self.tell(peer.worker, body, tensors, name, key, self.next_id if key else 0)
                case Reply(connection, envelope, tensors):
                    found = [link[0] for link, number in self.connections.items() if number == connection]
                    if not found:
                        continue  # it is gone
                    (sender,) = found
                    key = self.keys.pop((sender, name, envelope.id), "")
                    if key:
                        self.handle(sender, PeerAnswered(key, envelope.body, list(tensors)))
                    else:
                        self.answers[envelope.id] = envelope.body, tensors
                case Alarm(seconds, key):
                    self.alarms.append((seconds, name, key))
                case Hold(connection, left):
                    self.held.setdefault(name, {})[connection] = left
                case Release(connection):
                    left = self.held[name].pop(connection)
                    if left is not None:
                        self.handle(name, left)
                case Again(left):
                    self.handle(name, left)

    def lose(self, sender, to):
        """The connection from `sender` to `to` ends."""
        self.queues.pop((sender, to), None)
        self.handle(to, Disconnected(self.connections.pop((sender, to))))

    def ring(self):
        """All alarms are over."""
        alarms, self.alarms = self.alarms, []
        for _, name, key in alarms:
            self.handle(name, TimePassed(key))
        self.run()

    # What a client does

    def share(self, id, values):
        encoded = (values.double() * self.scale).round().to(torch.int64)
        stream = Stream(id.to_bytes(16, "big"))
        rest = encoded
        for name in self.names[1:]:
            part = stream.ring(values.shape)
            rest = rest - part
            self.tell(name, m.PutShare(id, "g", self.scale, list(values.shape)), [part])
        self.tell(self.names[0], m.PutShare(id, "g", self.scale, list(values.shape)), [rest])

    def post(self, calls, operands, results, names=None):
        program = Program.of(len(operands), calls)
        refs, made = tuple(Ref(one) for one in operands), tuple(one and Ref(one) for one in results)
        op = PostedOp(PROGRAM, ("g", program.text, refs), {}, made, False)
        for name in names or self.names:
            self.tell(name, m.Post([op.pack()]))

    def get(self, id):
        """The value, or what the parties say instead."""
        answers = [self.ask(name, m.Fetch(id, False)) for name in self.names]
        if all(isinstance(body, m.FetchedShare) for body, _ in answers):
            whole = reconstruct([tensors[0] for _, tensors in answers])
            return whole.double() / answers[0][0].scale
        return [getattr(body, "message", body) for body, _ in answers]

    def keep(self, name):
        return len(self.states[name].store.objects)

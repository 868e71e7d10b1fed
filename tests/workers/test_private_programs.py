"""Noninterference (Goguen and Meseguer, 1982): what a client sees does not depend on values it may not read.

Random programs of a hostile client run twice, on workers that differ in the private values only. Whatever comes
back, values, shapes, refusals and error texts, must be equal.
"""

import random
import re
import warnings

import torch

from planrt.plans.ir.graph import Graph, Op, StateSpec
from planrt.plans.ir.record import PlanRecord
from planrt.plans.ir.signature import Parameter, Signature
from planrt.types import Ref, TensorSpec
from planrt.workers.machine import eager, store
from planrt.workers.machine.events import Disconnected, Received, Reply
from planrt.workers.machine.state import WorkerState
from planrt.workers.wire import messages as m
from planrt.workers.wire.posted import PostedOp
from planrt.workers.wire.proofs import Verifier
from tests.proving import open_session

PROGRAMS = 200
"""Random programs a test."""

OWNER, MALLORY, ACCOMPLICE = 1, 2, 3
USERS = {"dr": str(Verifier.of("secret"))}

OPS = [
    "Tensor.add",
    "Tensor.mul",
    "torch.matmul",
    "torch.where",
    "Tensor.t",
    "Tensor.detach",
    "Tensor.data",
    "Tensor.contiguous",
    "Tensor.sum",
    "Tensor.expand_as",
    "Tensor.type_as",
    "Tensor.sigmoid",
    "torch.cat",
    "torch.broadcast_tensors",
    "torch.as_tensor",
    "torch.zeros_like",
    "torch.rand_like",
    "torch.poisson",
    "Tensor.grad",
    "Tensor.clone",
    "Tensor.view_as",
    "torch.stack",
    "Tensor.__getitem__",
]
WRITES = [
    "Tensor.add_",
    "Tensor.mul_",
    "Tensor.copy_",
    "Tensor.data.__set__",
    "Tensor.set_",
    "Tensor.grad.__set__",
    "Tensor.__iadd__",
    "Tensor.masked_fill_",
    "Tensor.lerp_",
    "Tensor.zero_",
    "Tensor.detach_",
    "Tensor.requires_grad_",
    "Tensor.retain_grad",
]
STATISTICS = ["nn.functional.batch_norm", "torch.batch_norm"]
BY_VALUE = [
    "torch.nonzero",
    "torch.masked_select",
    "torch.unique",
    "Tensor.index_select",
    "linalg.cholesky",
    "Tensor.index_put_",
    "nn.functional.embedding",
    "torch.bincount",
    "torch.repeat_interleave",
    "torch.zeros",
]
"""Ops whose sizes or failures depend on values."""

SQUARE, INDICES = TensorSpec((3, 3), torch.float32), TensorSpec((3,), torch.int64)


def random_plan(random):
    """A plan of two squares and three indices, with a square of state; ops in place and ops that may fail."""
    ops, known, squares = [], 4, [0, 1, 3]

    def square():
        return Ref(random.choice(squares))

    def add(name, *args, **kwargs):
        nonlocal known
        ops.append(Op(name, args, kwargs, Ref(known)))
        squares.append(known)
        known += 1

    for _ in range(random.randrange(1, 5)):
        match random.randrange(12):
            case 0 | 1:
                add(random.choice(["Tensor.add", "Tensor.mul", "torch.matmul"]), square(), square())
            case 2:
                add(random.choice(["Tensor.sigmoid", "Tensor.t", "Tensor.detach", "Tensor.clone"]), square())
            case 3 | 4:
                add(random.choice(["Tensor.add_", "Tensor.copy_", "Tensor.__imul__"]), square(), square())
            case 5:
                add("Tensor.index_select", square(), 0, Ref(2))
            case 6:
                add("Tensor.__getitem__", square(), Ref(2))
            case 7:
                add("linalg.cholesky", square())
            case 8:
                add("nn.functional.embedding", Ref(2), square(), None, random.choice([None, 0.1]))
            case 9:
                add("torch.rand_like", square())
            case 10:
                mean, var = known, known + 1
                for _ in range(2):
                    add("Tensor.__getitem__", square(), 0)
                squares.pop(), squares.pop()
                add("nn.functional.batch_norm", square(), Ref(mean), Ref(var), None, None, True, 0.5, 1e-5)
            case 11:
                add("torch.nonzero", square())
                squares.pop()
    outputs = tuple(square() for _ in range(random.randrange(1, 4)))
    graph = Graph(
        (SQUARE, SQUARE, INDICES), (StateSpec("s", SQUARE, "buffer", False),), tuple(ops), outputs,
        input_names=("x", "y", "i"),
    )  # fmt: skip
    names = [Parameter(name, "positional", False) for name in ("x", "y", "i")]
    signature = Signature(tuple(names), {name: Ref(number) for number, name in enumerate(("x", "y", "i"))})
    return PlanRecord("p", "", signature, graph, None), len(outputs)


class Program:
    """One random program of a client who was told of private objects `p` (3, 3), `n` (3, 3) and `i` (3,)."""

    def __init__(self, seed, private):
        self.random = random.Random(seed)
        self.seen = []
        self.state = WorkerState("bob", users=USERS)
        self.next = 10
        for connection, token in ((OWNER, "secret"), (MALLORY, ""), (ACCOMPLICE, "")):
            open_session(self.state, connection, token)
        items = [
            m.PutItem(id, False, False, [tag], "", ["dr"])
            for id, tag in ((1, "#p"), (2, "#n"), (3, "#i"))
        ]  # fmt: skip
        self.tell(OWNER, m.Put(items), private)
        self.private = [item.id for item in self.ask(m.Search(["#p"])).objects]
        self.private += [item.id for item in self.ask(m.Search(["#n"])).objects]
        self.pool = []
        self.indices = self.ask(m.Search(["#i"])).objects[0].id
        self.plans = []
        public = [m.PutItem(self.next, False, False, ["#mine"], "", None)]
        self.tell(MALLORY, m.Put(public), [torch.tensor([0, 1, 2])])
        self.fitting = self.take_id()
        for requires_grad in (True, True, False, False):
            self.tell(
                MALLORY,
                m.Put([m.PutItem(self.next, requires_grad, False, ["#mine"], "", None)]),
                [torch.rand(3, 3, generator=torch.Generator().manual_seed(self.next))],
            )
            self.pool.append(self.take_id())

    def take_id(self):
        self.next += 1
        return self.next - 1

    def tell(self, connection, body, tensors=()):
        assert self.state.handle(Received(connection, m.Envelope(0, body), list(tensors))) == []

    def ask(self, body, connection=MALLORY):
        (reply,) = self.state.handle(Received(connection, m.Envelope(5, body), []))
        assert isinstance(reply, Reply)
        body = reply.envelope.body
        if isinstance(body, m.Failure):
            self.seen.append((body.kind, body.message, body.op, re.sub(r"0x[0-9a-f]+", "", body.traceback)))
        else:
            self.seen.append((repr(body), [tensor.tolist() for tensor in reply.tensors]))
        return body

    def post(self, name, args, results, kwargs=None):
        op = PostedOp(
            name, args, kwargs or {}, results, self.random.random() < 0.8, self.random.choice([7, 7, None])
        )
        self.tell(MALLORY, m.Post([op.pack()]))

    def pick(self):
        if self.random.random() < 0.06:
            return Ref(self.random.choice(self.private))
        return Ref(self.random.choice(self.pool[-14:] + self.pool[:4]))

    def step(self):
        match self.random.randrange(18):
            case 14 | 15 | 16 | 17:
                self.use_plan()
            case 0 | 1 | 2 | 3:
                self.operate(self.random.choice(OPS))
            case 4 | 5 | 6:
                self.write(self.random.choice(WRITES))
            case 7:
                self.backward()
            case 9:
                self.by_value(self.random.choice(BY_VALUE))
            case 8:
                self.differentiate()
            case 10:
                self.ask(m.Fetch(self.pick().index, False))
            case 11:
                x, mean, var = self.pick(), self.pick(), self.pick()
                id, name = self.take_id(), self.random.choice(STATISTICS)
                tail = (None, None, True, 0.1, 1e-5)
                args = (
                    (x, mean, var, *tail)
                    if name.startswith("nn")
                    else (x, None, None, mean, var, True, 0.1, 1e-5, False)
                )
                self.post(name, args, Ref(id))
                self.pool.append(id)
            case 12:
                self.odd_message()
            case _:
                self.tell(MALLORY, m.Post([], [self.pick().index]))

    def backward(self):
        """With inner tensors as inputs, graphs of gradients, and graphs that are gone afterwards."""
        roots = [self.pick().index for _ in range(self.random.randrange(1, 3))]
        given = [self.random.choice([None, self.pick().index]) for _ in roots]
        inputs = [self.pick().index for _ in range(self.random.randrange(1, 3))]
        if self.random.random() < 0.5:  # from a graph made for it, in which something private stands
            leaf, inner, outer, total = (
                self.pool[self.random.randrange(2)],
                *(self.take_id() for _ in range(3)),
            )
            self.post("Tensor.mul", (Ref(leaf), self.pick()), Ref(inner))
            private = self.pick() if self.random.random() < 0.5 else Ref(self.random.choice(self.private))
            self.post("Tensor.mul", (Ref(inner), private), Ref(outer))
            self.post("Tensor.sum", (Ref(outer),), Ref(total))
            self.pool += [inner, outer, total]
            roots, given = [self.random.choice([total, outer])], [None]
            inputs = self.random.sample([leaf, inner, outer, self.pick().index], 2)
        self.ask(
            m.Backward(
                roots,
                given,
                self.random.random() < 0.8,
                self.random.random() < 0.3,
                self.random.choice([None, inputs]),
            )
        )

    def differentiate(self):
        """A gradient, sometimes with a graph, from which another one (a row of a hessian) is taken."""
        id, source = self.take_id(), self.pick()
        options = {"retain_graph": True, "create_graph": self.random.random() < 0.5, "allow_unused": True}
        self.post("autograd.grad", ((self.pick(),), (source,)), (Ref(id),), options)
        self.pool.append(id)
        if options["create_graph"]:
            second, total = self.take_id(), self.take_id()
            self.post("Tensor.sum", (Ref(id),), Ref(total))
            self.post("autograd.grad", ((Ref(total),), (source,)), (Ref(second),), {"retain_graph": True})
            self.pool += [total, second]

    def use_plan(self):
        choice = self.random.randrange(10)
        if not self.plans or choice == 0:
            record, outputs = random_plan(self.random)
            id, tags = self.take_id(), self.random.choice([[], ["#mine"]])
            bytes_of = torch.frombuffer(bytearray(record.to_bytes()), dtype=torch.uint8)
            state = torch.rand(3, 3, generator=torch.Generator().manual_seed(id))
            self.tell(MALLORY, m.StorePlan(id, False, tags), [bytes_of, state])
            self.plans.append((id, outputs))
            return
        plan, outputs = self.random.choice(self.plans[-3:])
        if choice == 1:
            self.ask(m.Fetch(plan, False))
        elif choice == 2:
            id = self.take_id()
            self.post("plan.copy", (Ref(plan),), Ref(id))
            self.plans.append((id, outputs))
        elif choice == 3:
            self.ask(m.ReadPlan(plan))
        else:
            indices = Ref(self.random.choice([self.indices, self.fitting]))
            args = (Ref(plan), False, self.pick(), self.pick(), indices)
            if choice == 4:
                op = PostedOp("plan", args, {}, None, True, 7)
                self.ask(m.Call(op.pack()))
                return
            ids = [self.take_id() for _ in range(outputs)]
            self.post("plan", args, tuple(map(Ref, ids)))
            self.pool += ids

    def operate(self, name):
        arity = {"Tensor.add": 2, "Tensor.mul": 2, "torch.matmul": 2, "Tensor.expand_as": 2, "Tensor.type_as": 2,
                 "Tensor.view_as": 2}.get(name, 1)  # fmt: skip
        args = tuple(self.pick() for _ in range(arity))
        if name in ("torch.cat", "torch.stack"):
            args = ([self.pick(), self.pick()],)
        elif name == "torch.where":
            condition = self.take_id()
            self.post("Tensor.gt", (self.pick(), 0.5), Ref(condition))
            args = (Ref(condition), self.pick(), self.pick())
        elif name == "Tensor.__getitem__":
            args = (self.pick(), Ref(self.indices))
        elif name == "torch.broadcast_tensors":
            args = (self.pick(), self.pick())
        ids = [self.take_id() for _ in range(2 if name == "torch.broadcast_tensors" else 1)]
        self.post(name, args, tuple(map(Ref, ids)) if len(ids) == 2 else Ref(ids[0]))
        self.pool += ids

    def write(self, name):
        extra = {"Tensor.zero_": (), "Tensor.detach_": (), "Tensor.requires_grad_": (), "Tensor.retain_grad": (),
                 "Tensor.lerp_": (self.pick(), 0.5)}.get(name, (self.pick(),))  # fmt: skip
        target = self.pick()
        if name == "Tensor.masked_fill_":
            mask = self.take_id()
            self.post("Tensor.gt", (self.pick(), 0.5), Ref(mask))
            extra = (Ref(mask), 7.0)
        if self.random.random() < 0.3 and name not in ("Tensor.data.__set__", "Tensor.grad.__set__"):
            id = self.take_id()  # a second name for the same tensor
            self.post(name, (target, *extra), Ref(id))
            self.pool.append(id)
        else:
            self.post(name, (target, *extra), None)

    def by_value(self, name):
        id, i = self.take_id(), Ref(self.indices)
        kwargs = {}
        args = {
            "Tensor.index_select": (self.pick(), 0, i), "torch.masked_select": (self.pick(), self.pick()),
            "Tensor.index_put_": (self.pick(), (i,), self.pick()), "nn.functional.embedding": (i, self.pick()),
            "torch.bincount": (i,), "torch.repeat_interleave": (self.pick(), i, 0), "torch.zeros": (i,),
        }.get(name, (self.pick(),))  # fmt: skip
        if name == "nn.functional.embedding":
            kwargs = {"max_norm": 0.1}
        self.post(name, args, Ref(id), kwargs)
        self.pool.append(id)

    def odd_message(self):
        target = self.pick().index
        match self.random.randrange(13):
            case 6:
                self.tell(MALLORY, m.Remove([target]))
            case 7:
                self.ask(m.Fetch(target, True))
            case 8:
                self.ask(m.ListObjects())
            case 9:
                id = self.take_id()
                item = m.PutItem(id, True, True, [], "", self.random.choice([None, None, ["dr"]]))
                values = [torch.full((3, 3), float(id % 7)), torch.ones(3, 3)]
                self.tell(MALLORY, m.Put([item]), values)
                self.pool.append(id)
            case 10:
                self.ask(m.Fetch(target, self.random.random() < 0.5))
            case 11:
                self.ask(self.random.choice([m.ReadPlan(target), m.AskApproval("0" * 64), m.ReadRun(target)]))
            case 12:
                if self.random.random() < 0.05:
                    self.ask(m.Clear())
            case 0:
                self.tell(MALLORY, m.Describe(target, ["#found"], "again"))
            case 1:
                self.pool += [item.id for item in getattr(self.ask(m.Search(["#found"])), "objects", [])]
            case 2:
                self.ask(m.Search([str(target)]))
            case 3:
                op = PostedOp("torch.nonzero", (Ref(target),), {}, None, True)
                self.ask(m.Call(op.pack()))
            case 4:
                self.tell(MALLORY, m.HandOver([target], "t" * 16))
                self.tell(ACCOMPLICE, m.Claim([target], "t" * 16))
                if self.random.random() < 0.5:  # there and back, or not
                    self.tell(ACCOMPLICE, m.HandOver([target], "u" * 16))
                    self.tell(MALLORY, m.Claim([target], "u" * 16))
            case 5:
                self.ask(m.CountObjects())

    def finish(self):
        for connection in (MALLORY, ACCOMPLICE):
            for id in range(10, self.next):
                grad = PostedOp("Tensor.grad", (Ref(id),), {}, Ref(100_000 + id), True)
                self.tell(connection, m.Post([grad.pack()]))
                self.ask(m.Fetch(id, False), connection)
                self.ask(m.Fetch(100_000 + id, False), connection)
            for query in ([], ["#found"], ["#mine"]):
                self.ask(m.Search(query), connection)
            self.ask(m.CountObjects(), connection)
        self.state.handle(Disconnected(MALLORY))
        self.ask(m.Search([]), ACCOMPLICE)
        return self.seen


def private_values(secret):
    """What the two workers hold: other numbers, other counts of ones, indices that fit and one that does not."""
    generator = torch.Generator().manual_seed(secret)
    return [
        torch.rand(3, 3, generator=generator) + torch.eye(3) * secret * 3,
        torch.rand(3, 3, generator=generator).round(),
        torch.tensor([0, 2, 1] if secret else [1, 3, 0]),
    ]


def run(seed, secret, monkeypatch, steps=60):
    numbers = iter(range(1_000_000, 2_000_000))
    for module in (eager, store):
        monkeypatch.setattr(module, "new_id", lambda: next(numbers))
    program = Program(seed, private_values(secret))
    for _ in range(steps):
        program.step()
    return program.finish()


def test_nothing_private_shows(monkeypatch):
    told = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for seed in range(PROGRAMS):
            one, other = (run(seed, secret, monkeypatch) for secret in (0, 1))
            assert one == other, seed
            told += sum(isinstance(item[1], list) and item[1] != [] for item in one)
    assert told > 5 * PROGRAMS  # the programs do read something

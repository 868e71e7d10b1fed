"""What a worker does with the messages of pointers, hostile ones too: the state machine alone, no loop."""

import random

import msgpack
import pytest
import torch

from planrt.plans.ir import ops
from planrt.types import Ref
from planrt.workers.machine.events import (
    Disconnected,
    PeerAnswered,
    PeerFailed,
    Received,
    Reply,
    ToPeer,
    Wait,
)
from planrt.workers.machine.state import WorkerState
from planrt.workers.wire import messages as m
from planrt.workers.wire.messages import own_versions
from planrt.workers.wire.posted import PostedOp
from tests.proving import open_session

ANN, BEN, DR = 1, 2, 3
SHARED = m.PeerAddress("carol", "ws://127.0.0.1:1")


class Worker:
    """A worker with three sessions; Ann holds `x` (id 1) and Ben `y` (id 2), each ``[1, 2, 3]``."""

    def __init__(self):
        self.state = WorkerState("bob", users={"dr": "secret"})
        for connection in (ANN, BEN, DR):
            open_session(self.state, connection, "secret" if connection == DR else "")
        self.put(1)
        self.put(2, by=BEN)

    def put(self, id, value=(1.0, 2.0, 3.0), by=ANN, **item):
        fields = {
            "requires_grad": False,
            "has_grad": False,
            "tags": [],
            "description": "",
            "allowed": None,
            **item,
        }
        self.tell(m.Put([m.PutItem(id, **fields)]), [torch.tensor(value)], by=by)

    def tell(self, body, tensors=(), by=ANN):
        """Posts a message: nothing may come back."""
        return self.state.handle(Received(by, m.Envelope(0, body), list(tensors)))

    def ask(self, body, tensors=(), by=ANN):
        (reply,) = self.state.handle(Received(by, m.Envelope(9, body), list(tensors)))
        assert isinstance(reply, Reply)
        assert (reply.connection, reply.envelope.id) == (by, 9)
        return reply.envelope.body, reply.tensors

    def post(self, name, args, results=None, by=ANN, seed=None, grad=True, drop=(), **kwargs):
        return self.tell(m.Post([PostedOp(name, args, kwargs, results, grad, seed, drop).pack()]), by=by)

    def value(self, id, by=ANN):
        body, tensors = self.ask(m.Fetch(id, False), by=by)
        return tensors[0].tolist() if isinstance(body, m.Fetched) else (body.kind, body.message)

    def check_others(self):
        """Nobody else noticed anything."""
        assert self.value(2, by=BEN) == [1, 2, 3]
        assert self.ask(m.CountObjects(), by=BEN)[0] == m.Counted(1)
        assert torch.is_grad_enabled()


@pytest.fixture
def bob():
    worker = Worker()
    before = torch.random.get_rng_state()
    yield worker
    worker.check_others()
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_posted_op(bob):
    assert bob.post("torch.add", (Ref(1), 1), Ref(10)) == []
    assert bob.value(10) == [2, 3, 4]
    assert bob.ask(m.CountObjects())[0] == m.Counted(2)


GOOD = PostedOp("torch.add", (Ref(1), 1), {}, Ref(10), True).pack()


@pytest.mark.parametrize(
    "packed",
    [
        b"", b"\xc1", b"\x00" * 100, GOOD[:-1], GOOD + b"\x00", msgpack.packb([]), msgpack.packb({"op": 1}),
        msgpack.packb([[], "torch.add", [], {}, None, True]),
        msgpack.packb([["1"], "torch.add", ["t", []], ["m", {}], None, True, None]),
        msgpack.packb([[], 7, ["t", []], ["m", {}], None, True, None]),
        msgpack.packb([[], "torch.add", ["t", []], ["m", {}], None, 1, None]),
        msgpack.packb([[], "torch.add", ["t", []], ["m", {}], None, True, -1]),
        msgpack.packb([[], "torch.add", [[[[[[]]]]]] * 3, ["m", {}], None, True, None]),
    ],
)  # fmt: skip
def test_bytes_that_are_no_op(bob, packed):
    bob.tell(m.Post([packed, PostedOp("torch.neg", (Ref(1),), {}, Ref(11), True).pack()]))
    kind, message = bob.value(1)
    assert kind == "PlanFormatError"
    assert "memory" not in message
    assert bob.value(11) == [-1, -2, -3]  # the next op of the batch ran
    assert bob.value(1) == [1, 2, 3]  # told once


def test_random_bytes_never_end_the_worker(bob):
    draw = random.Random(0)
    for _ in range(300):
        broken = bytearray(GOOD)
        for _ in range(draw.randrange(1, 4)):
            broken[draw.randrange(len(broken))] = draw.randrange(256)
        bob.tell(m.Post([bytes(broken), draw.randbytes(draw.randrange(40))]))
        bob.ask(m.Call(bytes(broken)))
        bob.ask(m.CountObjects())


@pytest.mark.parametrize(
    "name",
    [
        "os.system", "torch.load", "torch.ops.aten.add", "Tensor.__class__", "Tensor.add.__globals__", "add", "",
        "builtins.eval", "Tensor.__reduce_ex__", "torch.manual_seed", "Tensor.data_ptr", "Tensor.register_hook",
        "Tensor.backward", "autograd.backward", "Tensor.item", "Tensor.tolist", "Tensor.numpy", "torch.save",
        "x" * 5_000,
    ],
)  # fmt: skip
def test_names_off_the_table(bob, name):
    bob.post(name, (Ref(1),), Ref(10))
    kind, message = bob.value(10)
    assert (kind, len(message) < 300) == ("OpNotAllowedError", True)


def test_every_eager_op_with_arguments_that_do_not_fit(bob):
    for number, name in enumerate([*ops.EAGER, *(ops.GRADIENTS.keys() - ops.PLANS_ONLY)]):
        for place, args in enumerate(
            ((), (1,), (None,), ("x", "y"), (Ref(1), "y"), (Ref(1), 3, 4), (Ref(99),))
        ):
            id = 1_000 + 10 * number + place
            bob.post(name, args, Ref(id))
            kind, _ = bob.value(id)
            assert kind in ("ExecutionError", "LocalError", "UnknownObjectError"), (name, args)
            bob.ask(m.CountObjects())
    assert bob.value(1) == [1, 2, 3]


def test_grad_mode_is_an_ops_own(bob):
    bob.post("torch.set_grad_enabled", (False,))
    bob.post("Tensor.requires_grad_", (Ref(1),))
    bob.post("torch.mul", (Ref(1), 2), Ref(10))
    bob.post("torch.mul", (Ref(1), 2), Ref(11), grad=False)
    wanted = [bob.ask(m.Fetch(id, False))[0].requires_grad for id in (10, 11)]
    assert wanted == [True, False]
    bob.ask(m.Call(PostedOp("torch.set_grad_enabled", (False,), {}, None, True).pack()))
    assert torch.is_grad_enabled()


def test_results_that_do_not_fit_what_was_announced(bob):
    bob.post("torch.split", (Ref(1), 1), (Ref(10), Ref(11)))
    assert bob.value(10) == ("LocalError", "the op gave 3 results, not as many as were expected")
    bob.post("torch.add", (Ref(1), 1), (Ref(12),))
    assert bob.value(12)[1] == "the op gave 1 results, not as many as were expected"
    bob.post("Tensor.size", (Ref(1),), Ref(13))
    assert bob.value(13)[1] == "the op gave a Size, not a tensor"
    bob.post("torch.add", (Ref(1), 1), (Ref(14), "x", 5))
    assert bob.value(14)[0] == "LocalError"


def test_ids_in_use_are_left_alone(bob):
    bob.post("torch.add", (Ref(1), 1), Ref(1))
    assert bob.value(1)[0] == "DuplicateIdError"
    bob.post("torch.add", (Ref(1), 1), Ref(2))  # Ben's
    assert bob.value(1)[0] == "DuplicateIdError"
    bob.put(2, (9.0,))
    assert bob.value(1)[0] == "DuplicateIdError"
    bob.post("torch.unbind", (Ref(1),), (Ref(20), Ref(20), Ref(21)))
    assert bob.value(1)[0] == "DuplicateIdError"
    assert bob.value(1) == [1, 2, 3]


def test_what_belongs_to_others_is_unknown(bob):
    foreign = "no object 2 here for this session: was it taken back by get() or dropped?"
    bob.post("torch.add", (Ref(2), 1), Ref(10))
    assert bob.value(10) == ("UnknownObjectError", foreign)
    bob.post("Tensor.zero_", (Ref(2),), drop=(2,))
    bob.tell(m.Post([], [2, 77]))
    for body in (
        m.Fetch(2, True), m.Backward([2], [None], False, False), m.Backward([1], [2], False, False),
        m.Move(2, SHARED, 5, "t"), m.HandOver([2], "t"),
        m.Call(PostedOp("torch.nonzero", (Ref(2),), {}, None, True).pack()),
    ):  # fmt: skip
        bob.ask(m.CountObjects())
        failure, _ = bob.ask(body)
        assert (failure.kind, failure.message) == ("UnknownObjectError", foreign), body
    bob.tell(m.Describe(2, ["#mine"], ""))
    bob.tell(m.Claim([2], ""))
    bob.tell(m.Claim([2], "wrong"))
    assert bob.value(1)[0] == "UnknownObjectError"
    assert bob.ask(m.Search(["#mine"]))[0] == m.Found([])


def test_handed_over_to_the_bearer_of_the_token(bob):
    bob.tell(m.HandOver([1], "tökén"))
    bob.tell(m.Claim([1], "t"))
    assert bob.value(1) == ("UnknownObjectError", "no object 1 was handed over to this session")
    bob.tell(m.Claim([1], "tökén"), by=DR)
    assert bob.value(1, by=DR) == [1, 2, 3]
    assert bob.value(1)[0] == "UnknownObjectError"
    bob.tell(m.Claim([1], "tökén"), by=ANN)  # a token works once
    assert bob.value(1, by=DR) == [1, 2, 3]


def test_a_leaf_handed_over_is_forgotten_here(bob):
    bob.put(10, requires_grad=True)
    bob.put(11, requires_grad=True)
    bob.tell(m.HandOver([10], "t"))
    bob.tell(m.Claim([10], "t"), by=DR)
    bob.tell(m.Post([], [10]), by=DR)
    bob.post("Tensor.sum", (Ref(11),), Ref(12))
    body, _ = bob.ask(m.Backward([12], [None], False, False))
    assert [id for id, _ in body.objects] == [11]


def test_a_full_worker_says_so_and_loses_nothing(bob):
    bob.state.store.limit = 3
    bob.tell(m.Post([
        PostedOp("torch.add", (Ref(1), 1), {}, Ref(10), True).pack(),
        PostedOp("torch.add", (Ref(1), 2), {}, Ref(11), True).pack(),
        PostedOp("torch.add", (Ref(10), 5), {}, None, True, drop=(10,)).pack(),
        PostedOp("torch.add", (Ref(1), 3), {}, Ref(12), True).pack(),
    ]))  # fmt: skip
    kind, message = bob.value(12)
    assert (kind, "holds 3 objects, its limit" in message) == ("LocalError", True)
    assert bob.value(12) == [4, 5, 6]
    assert bob.value(11)[0] == "UnknownObjectError"


@pytest.mark.parametrize(
    ("item", "tensors", "message"),
    [
        ({}, [], "0 tensors do not fit 1 items"),
        ({}, [torch.ones(1)] * 2, "2 tensors do not fit 1 items"),
        ({"has_grad": True}, [torch.ones(1)], "1 tensors do not fit 1 items"),
        ({"requires_grad": True}, [torch.ones(1, dtype=torch.int64)], "only Tensors of floating point"),
        ({"has_grad": True}, [torch.ones(2), torch.ones(3)], "grad"),
    ],
)
def test_puts_that_do_not_fit(bob, item, tensors, message):
    fields = {
        "requires_grad": False,
        "has_grad": False,
        "tags": [],
        "description": "",
        "allowed": None,
        **item,
    }
    bob.tell(m.Put([m.PutItem(10, **fields)]), tensors)
    assert message in bob.value(1)[1]
    assert message in bob.ask(m.Put([m.PutItem(10, **fields)]), tensors)[0].message
    assert bob.value(10)[0] == "UnknownObjectError"


def test_backward_that_cannot_be(bob):
    for body, message in (
        (m.Backward([1], [None], False, False), "does not require grad"),
        (m.Backward([1, 1], [None], False, False), "2 tensors and 1 gradients"),
        (m.Backward([], [], False, False), "a backward pass starts somewhere"),
        (m.Backward([77], [None], False, False), "no object 77 here"),
    ):
        failure, _ = bob.ask(body)
        assert isinstance(failure, m.Failure), body
        assert message in failure.message
    assert bob.value(1) == [1, 2, 3]


def test_no_out_and_no_unseeded_draw(bob):
    bob.post("torch.add", (Ref(1), 1), Ref(10), out=Ref(1))
    assert bob.value(10) == ("LocalError", "workers take no out=: use the result")
    bob.post("torch.rand_like", (Ref(1),), Ref(11))
    assert bob.value(11) == ("LocalError", "an op that draws random numbers needs a seed")
    bob.post("torch.rand_like", (Ref(1),), Ref(12), seed=4)
    bob.post("torch.rand_like", (Ref(1),), Ref(13), seed=4)
    assert bob.value(12) == bob.value(13)
    assert bob.value(1) == [1, 2, 3]


def test_messages_that_are_no_requests_and_the_other_way_round(bob):
    bob.tell(m.CountObjects())
    assert bob.value(1) == ("LocalError", "messages of type CountObjects are requests: number them")
    for body in (m.Done(), m.Welcome("bob", own_versions(), {}), m.Counted(3), m.Describe(1, [], "")):
        assert bob.ask(body)[0].kind == "LocalError"


def test_a_second_hello_ends_the_connection_only(bob):
    instructions = bob.state.handle(Received(ANN, m.Envelope(1, m.Hello("x" * 32, own_versions())), []))
    assert instructions[0].envelope.body.kind == "HandshakeError"
    assert bob.value(1) == [1, 2, 3]


def waiting(bob, body):
    to_peer, wait = bob.state.handle(Received(ANN, m.Envelope(9, body), []))
    assert (type(to_peer), type(wait), to_peer.key) == (ToPeer, Wait, wait.key)
    return to_peer


def test_a_peer_that_answers_with_something_else(bob):
    bob.tell(m.PutPointer(10, SHARED, 5, "t"))
    asked = waiting(bob, m.Call(PostedOp("torch.nonzero", (Ref(10),), {}, None, True).pack()))
    (reply,) = bob.state.handle(PeerAnswered(asked.key, m.Counted(4), []))
    assert reply.envelope.body.message == "worker 'carol' answered with Counted"
    asked = waiting(bob, m.Backward([10], [None], False, False))
    (reply,) = bob.state.handle(PeerAnswered(asked.key, m.Done(), []))
    assert reply.envelope.body.message == "worker 'carol' answered with Done"
    assert bob.state.handle(PeerAnswered(asked.key, m.Done(), [])) == []  # nobody waits for that any more


def test_a_peer_that_never_answers_costs_nothing_but_the_request(bob):
    asked = waiting(bob, m.Move(1, SHARED, 5, "t"))
    (reply,) = bob.state.handle(PeerFailed(asked.key, "cannot reach worker 'carol'"))
    assert (reply.envelope.body.kind, reply.envelope.body.message) == (
        "PeerError",
        "cannot reach worker 'carol'",
    )
    assert bob.value(1) == [1, 2, 3]


def test_who_leaves_while_waiting(bob):
    asked = waiting(bob, m.Move(1, SHARED, 5, "t"))
    assert bob.state.handle(Disconnected(ANN)) == []
    assert bob.state.handle(PeerAnswered(asked.key, m.Done(), [])) == []
    assert 1 not in bob.state.store.objects


def test_what_is_dropped_while_it_moves(bob):
    asked = waiting(bob, m.Move(1, SHARED, 5, "t"))
    bob.tell(m.Post([], [1]))
    (reply,) = bob.state.handle(PeerAnswered(asked.key, m.Done(), []))
    assert reply.envelope.body == m.Done()


# ------------------------------------------------------------------------------------- private values


@pytest.fixture
def clinic(bob):
    """Ann finds `s` (id returned), three private values of the doctor's; her own `w` (id 10) is a leaf."""
    bob.put(5, (7.0, 8.0, 9.0), by=DR, tags=["#s"], allowed=["dr"])
    (item,) = bob.ask(m.Search(["#s"]))[0].objects
    bob.put(10, requires_grad=True)
    return item.id


DENIED = "GetNotPermittedError"


@pytest.mark.parametrize("handed", [False, True], ids=["here", "through another session"])
@pytest.mark.parametrize("by", ["copy_ past the version counter", "data =", "set_"])
def test_gradients_of_a_graph_whose_tensors_were_replaced(bob, clinic, by, handed):
    bob.put(11)
    bob.post("torch.mul", (Ref(10), Ref(11)), Ref(12))
    bob.post("torch.sum", (Ref(12),), Ref(13))
    writer, source = ANN, clinic
    if handed:
        (item,) = bob.ask(m.Search(["#s"]), by=BEN)[0].objects
        bob.tell(m.HandOver([11], "t"))
        bob.tell(m.Claim([11], "t"), by=BEN)
        writer, source = BEN, item.id
    if by == "data =":
        bob.post("Tensor.data.__set__", (Ref(11), Ref(source)), by=writer)
    elif by == "set_":
        bob.post("Tensor.set_", (Ref(11), Ref(source)), by=writer)
    else:
        bob.post("Tensor.data", (Ref(11),), Ref(14), by=writer)
        bob.post("Tensor.copy_", (Ref(14), Ref(source)), by=writer)
    bob.ask(m.Backward([13], [None], True, False))
    bob.post("autograd.grad", ((Ref(13),), (Ref(10),)), (Ref(15),))
    bob.post("Tensor.grad", (Ref(10),), Ref(16))
    kinds = [bob.value(id)[0] for id in (10, 15, 16)]
    if by == "set_":  # autograd itself sees that
        assert kinds == [1.0, "ExecutionError", "LocalError"]
        assert not bob.ask(m.Fetch(10, False))[0].has_grad
    else:
        assert kinds == [DENIED] * 3
    if handed:
        bob.tell(m.Post([], [11, 14]), by=BEN)
        bob.post("Tensor.add", (Ref(2), 1), None, by=BEN, drop=(source,))


def test_whether_an_op_failed_on_private_values_does_not_show(bob, clinic):
    """Else every private value could be found by bisection: the index is 0 or 1 by comparison with a limit."""
    seen = []
    for number, limit in enumerate((0.0, 100.0)):
        a = 100 * (number + 1)
        bob.put(a, (1.0,), requires_grad=True)
        bob.post("torch.gt", (Ref(clinic), limit), Ref(a + 1))
        bob.post("Tensor.long", (Ref(a + 1),), Ref(a + 2))
        bob.post("Tensor.__getitem__", (Ref(a), Ref(a + 2)), Ref(a + 3))  # out of range, or not
        bob.post("Tensor.sum", (Ref(a + 3),), Ref(a + 4))
        body, _ = bob.ask(m.Backward([a + 4], [None], False, False))
        seen.append([
            type(body), a in [id for id, _ in body.objects], bob.value(a)[0], bob.value(a + 4)[0],
            bob.ask(m.Search([str(a + 3)]))[0].objects[0].spec, bob.ask(m.CountObjects())[0].objects - 4 * number,
        ])  # fmt: skip
        bob.tell(m.HandOver([a + 4], "t"))
        bob.tell(m.Claim([a + 4], "t"), by=DR)
        told = bob.value(a + 4, by=DR)
        if limit == 0:
            assert told == ("ExecutionError", "op Tensor.__getitem__ failed; its operands are private, so the worker "
                            "does not say why")  # fmt: skip
        else:
            assert told == 3
        bob.tell(m.Post([], [a + 4]), by=DR)
    assert seen[0] == seen[1]


def test_ops_whose_results_sizes_depend_on_private_values(bob, clinic):
    bob.post("torch.nonzero", (Ref(clinic),), Ref(20))
    bob.post("torch.zeros", (Ref(clinic),), Ref(21))
    bob.post("Tensor.__getitem__", (Ref(1), Ref(clinic)), Ref(22))
    for id in (20, 21, 22):
        assert bob.value(id)[0] == DENIED
    assert bob.ask(m.Search([]))[0].objects[-1].id == 10  # none of the three has a size to be seen


def test_a_gradient_is_as_private_as_what_was_added_to_it(bob, clinic):
    bob.post("Tensor.grad.__set__", (Ref(10), Ref(clinic)))
    bob.post("Tensor.grad", (Ref(10),), Ref(20))
    assert bob.value(10)[0] == bob.value(20)[0] == DENIED
    bob.post("torch.sum", (Ref(10),), Ref(21))
    bob.ask(m.Backward([21], [None], False, True))  # public, but added to what is there, in new memory
    bob.post("Tensor.grad", (Ref(10),), Ref(22))
    assert bob.value(10)[0] == bob.value(22)[0] == DENIED
    bob.post("Tensor.grad.__set__", (Ref(10), None))
    assert bob.value(10) == [1, 2, 3]


def test_a_failed_write_leaves_its_label(bob, clinic):
    bob.post("torch.gt", (Ref(clinic), 8.5), Ref(20))
    bob.post("Tensor.long", (Ref(20),), Ref(21))
    bob.post("Tensor.mul", (Ref(21), 50), Ref(22))  # the last index is out of range
    bob.post("Tensor.index_put_", (Ref(1), (Ref(22),), Ref(clinic)), Ref(23))
    assert bob.value(1)[0] == bob.value(23)[0] == DENIED

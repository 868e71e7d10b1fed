"""The scheduler of chains by itself: what it sends, in which order, and what it drops. No workers, no loop."""

import pytest
import torch

from planrt.errors import RemoteError
from planrt.plans import func2plan
from planrt.plans.ir.chain import Chain, ChainPlan, ChainStep
from planrt.serde.values import encode
from planrt.types import Ref
from planrt.workers.transport.addresses import reaches
from planrt.workers.wire import messages as m
from planrt.workers.wire.chain_runs import ChainRun, Given, Output
from planrt.workers.wire.posted import PostedOp

SPEC = m.ObjectSpec([2], [1], "float32")


def plan_of(function, inputs=1, *, state=None):
    return ChainPlan(func2plan(function, args_shape=[(-1,)] * inputs, state=state).record, True)


def add_to(x, state):
    (total,) = state.read()
    return total.add_(x.sum()) * x


INC = plan_of(lambda x: x + 1)
ADD = plan_of(lambda a, b: a + b, 2)
STATEFUL = plan_of(add_to, state=(torch.zeros(1),))


def step(name, place, plan, *values):
    return ChainStep(name, place, plan, tuple(Ref(value) for value in values))


def run_of(steps, outputs, *, plans=(INC, ADD, STATEFUL), inputs=("x",), given=None, store=None, kinds=()):
    plans = plans[: 1 + max(one.plan for one in steps)]
    chain = Chain(inputs, plans, tuple(steps), outputs)
    places = {
        place: m.PeerAddress(f"w_{place}", f"{kinds[0] if kinds else 'ws'}://{place}")
        for place in chain.places
    }
    if len(kinds) > 1:
        places["b"] = m.PeerAddress("w_b", f"{kinds[1]}://b")
    held = (
        {}
        if store
        else {(number, place): 100 + number for number in range(len(plans)) for place in chain.places}
    )
    events = []
    run = ChainRun(
        chain,
        places,
        given or [Given(torch.ones(2))] * len(inputs),
        held,
        grad=True,
        seed=5,
        store=store,
        reaches=reaches,
        on_step=lambda *what: events.append(what),
    )
    run.events = events
    return run


def kinds_of(sends):
    return [(one.place, type(one.body).__name__) for one in sends]


def key_of(sends, kind, place):
    (key,) = [one.key for one in sends if type(one.body).__name__ == kind and one.place == place and one.key]
    return key


def made(*ids):
    return m.Made(encode(tuple(map(Ref, range(len(ids))))), [(id, SPEC) for id in ids])


def test_a_line_is_sent_step_by_step():
    run = run_of([step("a", "a", 0, 0), step("b", "b", 0, 1)], Ref(2))
    first = run.start()
    assert kinds_of(first) == [("a", "Put"), ("a", "Call")]
    called = PostedOp.unpack(first[1].body.op)
    assert called.args == (Ref(100), True, Ref(first[0].body.items[0].id))
    then = run.answered(first[1].key, made(7))
    assert kinds_of(then) == [("a", "Move"), ("a", "Post")]
    move = then[0].body
    assert (move.id, move.peer) == (7, m.PeerAddress("w_b", "ws://b"))
    assert then[1].body == m.Post([], [first[0].body.items[0].id])  # the input has been used
    then = run.answered(then[0].key, m.Done())
    assert kinds_of(then) == [("b", "Claim"), ("b", "Call")]
    assert then[0].body == m.Claim([move.target], move.token)
    last = run.answered(then[1].key, made(8))
    assert [one.body for one in last] == [m.Post([], [move.target])]
    assert run.outstanding == ()
    assert run.failure is None
    assert run.outputs == [Output("b", 8, SPEC)]
    assert run.events == [
        ("a", "a", "waiting"), ("b", "b", "waiting"), ("a", "a", "running"), ("a", "a", "done"), ("b", "b", "running"),
        ("b", "b", "done"),
    ]  # fmt: skip


def test_what_is_needed_here_too_is_copied_first():
    run = run_of([step("a", "a", 0, 0), step("b", "b", 0, 1), step("c", "a", 0, 1)], [Ref(2), Ref(3)])
    first = run.start()
    then = run.answered(first[1].key, made(7))
    assert kinds_of(then) == [("a", "Move"), ("a", "Call"), ("a", "Post")]
    assert (then[0].body.id, then[0].body.copy) == (7, True)


def test_steps_that_do_not_depend_on_each_other_are_under_way_together():
    run = run_of([step(name, name, 0, 0) for name in "abc"] + [step("d", "a", 1, 1, 2)], [Ref(4), Ref(3)])
    sends = run.start()
    assert [one.place for one in sends if isinstance(one.body, m.Call)] == ["a", "b", "c"]
    assert len(run.outstanding) == 3
    run.answered(key_of(sends, "Call", "c"), made(9))
    then = run.answered(key_of(sends, "Call", "b"), made(8))
    assert ("b", "Move") in kinds_of(then)


def test_steps_that_share_state_keep_their_order():
    steps = [
        step("slow", "b", 0, 0),
        step("first", "a", 2, 1),
        step("second", "a", 2, 0),
        step("free", "a", 0, 0),
    ]
    run = run_of(steps, [Ref(2), Ref(3), Ref(4)])
    sends = run.start()
    calls = [
        (one.place, PostedOp.unpack(one.body.op).args[0]) for one in sends if isinstance(one.body, m.Call)
    ]
    assert calls == [("b", Ref(100))]  # the others must wait for `first`, which changes the input and a state
    then = run.answered(key_of(sends, "Call", "b"), made(7))
    then = run.answered(key_of(then, "Move", "b"), m.Done())
    calls = [PostedOp.unpack(one.body.op).args[0] for one in then if isinstance(one.body, m.Call)]
    assert calls == [Ref(102), Ref(102), Ref(100)]


def test_steps_that_only_read_need_no_order():
    steps = [step("slow", "b", 0, 0), step("join", "a", 1, 0, 1), step("free", "a", 0, 0)]
    sends = run_of(steps, [Ref(2), Ref(3)]).start()
    assert [one.place for one in sends if isinstance(one.body, m.Call)] == ["b", "a"]


def test_after_a_failure_what_was_made_is_dropped_once_all_has_answered():
    run = run_of([step("a", "a", 0, 0), step("b", "b", 0, 0), step("c", "a", 1, 1, 2)], Ref(3))
    sends = run.start()
    put = {one.place: one.body.items[0].id for one in sends if isinstance(one.body, m.Put)}
    error = RemoteError("no", worker_id="w_a")
    assert run.failed(key_of(sends, "Call", "a"), error) == []
    assert (run.failure.name, run.failure.worker, run.failure.error) == ("a", "w_a", error)
    assert run.outstanding == (key_of(sends, "Call", "b"),)
    last = run.answered(run.outstanding[0], made(8))
    assert {one.place: sorted(one.body.drop) for one in last} == {"a": [put["a"]], "b": sorted([put["b"], 8])}
    assert run.outstanding == ()


def test_a_move_that_fails_names_who_waits_for_it():
    run = run_of([step("a", "a", 0, 0), step("b", "b", 0, 1)], Ref(2))
    sends = run.answered(run.start()[1].key, made(7))
    last = run.failed(key_of(sends, "Move", "a"), RemoteError("private", worker_id="w_a"))
    assert run.failure.where(worker=True) == (
        "step 'b' on worker 'w_b', which takes the result of step 'a' from worker 'w_a'"
    )
    assert [one.body.drop for one in last] == [[7]]


def test_a_cancelled_run_claims_what_is_on_its_way_to_drop_it():
    run = run_of([step("a", "a", 0, 0), step("b", "b", 0, 1)], Ref(2))
    sends = run.answered(run.start()[1].key, made(7))
    assert run.cancel() == []
    assert not run.failure
    target = next(one.body.target for one in sends if isinstance(one.body, m.Move))
    last = run.answered(key_of(sends, "Move", "a"), m.Done())
    assert kinds_of(last) == [("b", "Claim"), ("b", "Post")]
    assert last[1].body.drop == [target]
    assert run.cancelled


def test_between_a_process_and_a_virtual_worker_values_come_through_here():
    run = run_of([step("a", "a", 0, 0), step("b", "b", 0, 1)], Ref(2), kinds=("ws", "memory"))
    sends = run.answered(run.start()[1].key, made(7))
    assert next(one.body for one in sends if isinstance(one.body, m.Fetch)) == m.Fetch(7, True)
    then = run.answered(key_of(sends, "Fetch", "a"), m.Fetched(True, False), [torch.ones(2)])
    assert kinds_of(then) == [("b", "Put"), ("b", "Call")]
    assert then[0].body.items[0].requires_grad


def test_plans_that_are_not_there_are_stored_once():
    stored = []

    def store(number, id):
        stored.append((number, id))
        return m.StorePlan(id, True), []

    run = run_of(
        [step("a", "a", 0, 0), step("b", "a", 0, 1), step("c", "b", 0, 1)], [Ref(2), Ref(3)], store=store
    )
    sends = run.start()
    assert kinds_of(sends) == [("a", "Put"), ("a", "StorePlan"), ("a", "Call")]
    again = run.failed(sends[-1].key, RemoteError("gone", worker_id="w_a"), "UnknownObjectError")
    assert kinds_of(again) == [("a", "StorePlan"), ("a", "Call")]
    assert run.failure is None
    run.failed(again[-1].key, RemoteError("gone", worker_id="w_a"), "UnknownObjectError")
    assert run.failure.name == "a"
    assert len(stored) == 2


@pytest.mark.parametrize(
    "answer",
    [m.Done(), m.Made(encode((Ref(0), Ref(1))), [(7, SPEC), (8, SPEC)]), m.Made(encode((Ref(1),)), [(7, SPEC)]),
     m.Made(encode(Ref(0)), [(7, SPEC)]), m.Made(encode((Ref(0),)), [])],
)  # fmt: skip
def test_answers_that_make_no_sense_end_the_run(answer):
    run = run_of([step("a", "a", 0, 0)], Ref(1))
    sends = run.start()
    run.answered(sends[-1].key, answer)
    assert "unexpected" in str(run.failure.error)
    assert run.outstanding == ()

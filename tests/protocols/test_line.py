"""Protocols in a line: described, deployed, run from here."""

import pytest
import torch

import planrt
from planrt import Protocol, Step
from planrt.errors import MixedLocationsError, PlanError, ProtocolError, RemoteError
from planrt.workers.pointers.tensor import PointerTensor

THREE = ("worker1", "worker2", "worker3")


@pytest.fixture
def plans():
    @planrt.func2plan(args_shape=[(1,)])
    def inc1(x):
        return x + 1

    @planrt.func2plan(args_shape=[(1,)])
    def inc2(x):
        return x + 1

    @planrt.func2plan(args_shape=[(1,)])
    def inc3(x):
        return x + 1

    return inc1, inc2, inc3


def test_a_line_as_the_tutorial_has_it(plans, alice, bob, charlie, capsys, count):
    protocol = Protocol(list(zip(THREE, plans, strict=True)), verbose=True)
    assert not protocol.is_resolved
    protocol.deploy(alice, bob, charlie)
    assert count(alice, bob, charlie) == [1, 1, 1]
    pointer = protocol.run(torch.tensor([1.0]))
    assert isinstance(pointer, PointerTensor)
    assert pointer.location is charlie
    assert pointer.shape == (1,)
    assert count(alice, bob, charlie) == [1, 1, 2]
    assert pointer.get().tolist() == [4]
    assert count(alice, bob, charlie) == [1, 1, 1]
    assert capsys.readouterr().out.splitlines() == ["send alice", "move alice -> bob", "move bob -> charlie"]


def test_runs_are_quiet_unless_asked(plans, alice, bob, charlie, capsys):
    Protocol(list(zip(THREE, plans, strict=True))).deploy(alice, bob, charlie).run(torch.tensor([1.0]))
    assert capsys.readouterr().out == ""


def test_it_prints_its_plans_and_then_where_they_are(plans, alice, bob, charlie):
    protocol = Protocol(list(zip(THREE, plans, strict=True)))
    before = str(protocol)
    assert before.startswith(
        f"<Protocol id:{protocol.id} owner:me>\n - worker1: <Plan inc1 id:{plans[0].id} "
    )
    assert " - worker3: <Plan inc3" in before
    assert "_1 = _0.add(1)" in before
    lines = str(protocol.deploy(alice, bob, charlie)).splitlines()
    assert lines[0] == f"<Protocol id:{protocol.id} owner:me resolved>"
    for line, worker in zip(lines[1:], (alice, bob, charlie), strict=True):
        assert line.startswith(f" - {worker.id}: [PointerPlan | me:")
        assert f"-> {worker.id}:" in line


def test_values_do_not_pass_through_the_caller(alice, bob, charlie):
    @planrt.func2plan(args_shape=[(-1,)])
    def grow(x):
        return x.repeat(20_000)

    @planrt.func2plan(args_shape=[(-1,)])
    def shrink(x):
        return x.sum()

    protocol = Protocol([("a", grow), ("b", grow2 := shrink.copy()), ("c", shrink)][:2]).deploy(alice, bob)
    assert grow2 is not shrink
    before = [worker.traffic.copy() for worker in (alice, bob)]
    assert protocol.run(torch.ones(5)).get() == 100_000
    for worker, then in zip((alice, bob), before, strict=True):
        since = worker.traffic.since(then)
        assert since.bytes_sent + since.bytes_received < 3_000


def test_equal_names_are_one_worker(inc, double, alice, bob, count):
    protocol = Protocol([("x", inc), ("y", double), ("x", inc)])
    assert protocol.places == ("x", "y")
    protocol.deploy(alice, bob)
    pointer = protocol.run(torch.tensor([1.0, 2.0]))
    assert pointer.location is alice
    assert count(alice, bob) == [2, 1]  # inc went there once
    assert pointer.get().tolist() == [5, 7]


def test_workers_and_their_ids_name_places_as_well(inc, alice, bob):
    protocol = Protocol([(alice, inc), ("bob", inc), ("alice", inc)])
    assert protocol.places == ("alice", "bob")
    protocol.deploy(bob)
    assert protocol.workers == {"alice": alice, "bob": bob}
    assert Protocol([("bob", inc), ("other", inc)]).deploy(alice, bob).workers == {"bob": bob, "other": alice}
    assert Protocol([(alice, inc), ("bob", inc)]).deploy(alice, bob).workers == {"alice": alice, "bob": bob}


def test_without_names_it_deploys_by_itself(inc, alice, bob):
    protocol = Protocol([(alice, inc), (bob, inc)])
    assert protocol.run(torch.zeros(2)).get().tolist() == [2, 2]


def test_deploying_again_sends_nothing_new(inc, double, alice, bob, charlie, count):
    protocol = Protocol([("a", inc), ("b", double)]).deploy(alice, bob)
    alice.objects_count()  # a request: what was posted before it has left
    sent = alice.traffic.messages_sent
    protocol.deploy(alice, bob).deploy()
    alice.objects_count()
    assert alice.traffic.messages_sent == sent + 1
    protocol.deploy(bob, charlie)
    assert protocol.run(torch.ones(1)).location is charlie
    assert count(alice) == [0]


def test_pointers_to_plans_are_steps_too(inc, double, alice, bob):
    pointer = double.send(bob)
    protocol = Protocol([("a", inc), ("b", pointer)]).deploy(alice, bob)
    assert protocol.run(torch.ones(1)).get().tolist() == [4]
    with pytest.raises(ProtocolError, match="'double' is on worker 'bob', and its step on 'alice'"):
        protocol.deploy(bob, alice)


def test_a_pointer_is_used_where_it_is_and_stays(inc, alice, bob):
    protocol = Protocol([("a", inc), ("b", inc)]).deploy(alice, bob)
    x = torch.tensor([1.0]).send(alice)
    assert protocol.run(x).get().tolist() == [3]
    assert protocol.run(x).get().tolist() == [3]
    assert x.get().tolist() == [1]


def test_a_pointer_elsewhere_names_both_places(inc, alice, bob):
    protocol = Protocol([("a", inc), ("b", inc)]).deploy(alice, bob)
    with pytest.raises(MixedLocationsError, match="input 'x' is on worker 'bob', and taken on 'alice'"):
        protocol.run(torch.tensor([1.0]).send(bob))
    chained = torch.tensor([1.0]).send(bob).send(alice)
    with pytest.raises(planrt.errors.LocalError, match="pointer to a pointer"):
        protocol.run(chained)


@pytest.mark.parametrize(
    ("names", "match"),
    [
        ([], r"too few workers: the protocol has 2 places to fill \(a, b\), got 0 workers"),
        (["alice"], r"too few .* got 1 workers \(alice\)"),
        (
            ["alice", "bob", "charlie"],
            r"too many workers: .* 2 places .* got 3 workers \(alice, bob, charlie\)",
        ),
        (["alice", "alice"], "'alice' twice: different names are different workers"),
    ],
)
def test_the_number_of_workers_must_fit(names, match, inc, alice, bob, charlie):
    workers = {"alice": alice, "bob": bob, "charlie": charlie}
    protocol = Protocol([("a", inc), ("b", inc)])
    with pytest.raises(ProtocolError, match=match):
        protocol.deploy(*[workers[name] for name in names])
    assert not protocol.is_resolved


def test_one_worker_for_two_names_is_refused(inc, alice):
    protocol = Protocol([(alice, inc), ("b", inc)])
    with pytest.raises(ProtocolError, match="too few"):
        protocol.deploy(alice)
    other = Protocol([(alice, inc), ("b", inc)])
    with pytest.raises(ProtocolError, match="too few"):
        other.deploy()


def test_only_workers_are_deployed_to(inc, alice, bob):
    with pytest.raises(ProtocolError, match=r"deploy\(\*workers\)"):
        Protocol([("a", inc), ("b", inc)]).deploy([alice, bob])


def test_running_before_deploying_says_how(inc):
    with pytest.raises(ProtocolError, match=r"deploy\(a, b\)"):
        Protocol([("a", inc), ("b", inc)]).run(torch.ones(1))


def test_plans_must_be_built():
    @planrt.func2plan()
    def later(x):
        return x

    with pytest.raises(PlanError, match=r"'later' is not built: call later.build"):
        Protocol([("a", later)])


@pytest.mark.parametrize(
    ("inputs", "named", "match"),
    [
        ((), {}, "takes x: x is missing"),
        ((torch.ones(1), torch.ones(1)), {}, "2 inputs are too many"),
        ((), {"y": torch.ones(1)}, "there is no input 'y'"),
        ((torch.ones(1),), {"x": torch.ones(1)}, "given twice"),
        ((3,), {}, "is a tensor or a pointer to one, not int"),
        ((torch.ones(1, 1),), {}, r"input 'x' is float32\[1, 1\], and step 'inc' wants float32\[\*\] for x"),
        ((torch.ones(1, dtype=torch.int64),), {}, r"is int64\[1\], and step 'inc' wants float32"),
    ],
)
def test_inputs_that_do_not_fit_are_refused_here(inputs, named, match, inc, alice, count):
    protocol = Protocol([("a", inc)]).deploy(alice)
    with pytest.raises(ProtocolError, match=match):
        protocol.run(*inputs, **named)
    assert count(alice) == [1]


def test_a_seed_makes_a_run_repeatable(alice, bob):
    @planrt.func2plan(args_shape=[(-1,)])
    def noisy(x):
        return x + torch.rand_like(x)

    protocol = Protocol([("a", noisy), ("b", noisy)]).deploy(alice, bob)
    x = torch.zeros(4)
    one, two, other = (protocol.run(x, seed=seed).get() for seed in (1, 1, 2))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    with pytest.raises(ProtocolError, match="seed is a whole number"):
        protocol.run(x, seed=-1)


def test_modes_are_those_of_the_plans(alice):
    class Net(planrt.Plan):
        def __init__(self):
            super().__init__()
            self.drop = torch.nn.Dropout(0.9)

        def forward(self, x):
            return self.drop(x)

    net = Net().build(torch.ones(50))
    protocol = Protocol([("a", net)]).deploy(alice)
    assert set(protocol.run(torch.ones(50)).get().tolist()) == {0.0, 10.0}
    net.eval()
    assert set(protocol.deploy(alice).run(torch.ones(50)).get().tolist()) == {1.0}


def test_a_step_that_fails_is_named_with_op_and_line(inc, pick, alice, bob, count):
    protocol = Protocol([("a", inc), Step("b", pick, name="choose")]).deploy(alice, bob)
    with pytest.raises(RemoteError) as caught:
        protocol.run(torch.tensor([0.0, 7.0]))
    error = caught.value
    assert (error.step, error.worker_id, error.index) == ("choose", "bob", 2)
    assert error.line == "_3 = _1.__getitem__(_2)"
    assert "IndexError" in error.cause
    assert "worker 'bob': step 'choose': op 2 of plan 'pick' failed" in str(error)
    assert count(alice, bob) == [1, 1]
    assert protocol.run(torch.tensor([0.0, -1.0])).get().tolist() == [0, 1]

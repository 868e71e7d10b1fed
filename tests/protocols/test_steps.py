"""Protocols beyond a line: joins, branches, parts of results, objects that are there already."""

import pytest
import torch

import planrt
from planrt import Protocol, Step
from planrt.errors import MixedLocationsError, PlanArgumentError, ProtocolError
from planrt.workers.pointers.multi import MultiPointerTensor
from tests.protocols.conftest import plan

pytestmark = pytest.mark.filterwarnings(
    "ignore::planrt.errors.PlanWarning"
)  # they capture tensors on purpose


def test_a_branch_and_a_join(inc, double, add, alice, bob, charlie, count, capsys):
    protocol = Protocol(
        [
            Step("a", inc, name="start"),
            Step("b", double, ["start"], name="left"),
            Step("a", double, ["start"], name="right"),
            Step("c", add, ["left", "right"]),
        ],
        verbose=True,
    ).deploy(alice, bob, charlie)
    held = count(alice, bob, charlie)
    pointer = protocol.run(torch.tensor([1.0, 2.0]))
    assert pointer.location is charlie
    assert pointer.get().tolist() == [8, 12]
    assert count(alice, bob, charlie) == held
    said = capsys.readouterr().out.splitlines()
    assert said[:2] == ["send alice", "copy alice -> bob"]  # the result is needed on alice as well
    assert sorted(said[2:]) == ["move alice -> charlie", "move bob -> charlie"]


def test_one_plan_on_many_workers_and_then_an_aggregate(make_worker, count):
    workers = [make_worker(name) for name in ("w0", "w1", "w2")]

    @planrt.func2plan(args_shape=[(3,), (-1, 3)])
    def local_mean(model, data):
        return (model + data.mean(0), data.shape[0])

    @planrt.func2plan(args_shape=[(3,), (3,), (3,)])
    def average(*parts):
        return sum(parts) / len(parts)

    names = [worker.id for worker in workers]
    protocol = Protocol(
        [
            *(Step(name, local_mean, ["model", f"data_{name}"], name=name) for name in names),
            Step("w0", average, [f"{name}.0" for name in names]),
        ],
        inputs=["model", *(f"data_{name}" for name in names)],
    ).deploy(*workers)
    data = [torch.full((2, 3), float(index)) for index in range(3)]
    remote = [one.send(worker) for one, worker in zip(data, workers, strict=True)]
    held = count(*workers)
    result = protocol.run(torch.ones(3), *remote)
    assert result.location is workers[0]
    assert result.get().tolist() == [2, 2, 2]
    assert count(*workers) == held


def test_a_multi_pointer_is_taken_where_each_part_is(inc, add, alice, bob, capsys):
    x = torch.tensor([1.0]).send(alice, bob)
    protocol = Protocol(
        [
            Step("alice", inc, ["x"], name="one"),
            Step("bob", inc, ["x"], name="two"),
            Step("bob", add, ["one", "two"]),
        ],
        inputs=["x"],
        verbose=True,
    ).deploy(alice, bob)
    assert protocol.run(x).get().tolist() == [4]
    assert capsys.readouterr().out.splitlines() == ["move alice -> bob"]


def test_parts_of_results_by_key_and_index(both, inc, alice, bob):
    protocol = Protocol(
        [Step("a", both, name="parts"), Step("b", inc, ["parts.pair.1"], name="next")],
        outputs={"all": "parts", "next": ["next", "parts.sum"]},
    ).deploy(alice, bob)
    found = protocol.run(torch.tensor([1.0, 2.0]))
    assert found["all"]["pair"][0] == 2
    assert found["all"]["sum"].get() == 3
    assert found["all"]["pair"][1].get().tolist() == [10, 20]
    assert found["next"][0].get().tolist() == [11, 21]
    assert found["next"][1].location is alice


def test_results_that_nobody_takes_are_freed(both, inc, alice, bob, count):
    protocol = Protocol([("a", both), Step("b", inc, ["both.pair.1"])]).deploy(alice, bob)
    result = protocol.run(torch.tensor([1.0, 2.0]))
    assert count(alice, bob) == [1, 2]
    assert result.get().tolist() == [11, 21]


def test_nested_arguments_and_keywords(alice):
    @planrt.func2plan()
    def mixed(pair, *, scale, power=2):
        return (pair[0] + pair[1]["y"]) * scale**power

    mixed.build((torch.ones(2), {"y": torch.ones(2)}), scale=torch.ones(2))
    protocol = Protocol(
        [Step("a", mixed, {"pair": ("x", {"y": "y"}), "scale": "x"})], inputs=["x", "y"]
    ).deploy(alice)
    assert protocol.run(torch.tensor([1.0, 2.0]), y=torch.tensor([3.0, 4.0])).get().tolist() == [4, 24]


def test_a_result_may_be_a_nested_argument(both, alice, bob):
    @planrt.func2plan()
    def total(parts):
        return parts["sum"] + parts["pair"][1].sum()

    total.build({"sum": torch.tensor(1.0), "pair": (2, torch.ones(2))})
    with pytest.raises(PlanArgumentError, match=r"step 'total': parts.pair.0 of plan 'total' is fixed at 2"):
        Protocol([("a", both), ("b", total)])


def test_held_pointers_and_sent_modules(alice, bob, count):
    model = torch.nn.Linear(2, 1)
    reference = torch.nn.Linear(2, 1)
    reference.load_state_dict(model.state_dict())

    @planrt.func2plan()
    def forward(model, x, shift):
        return model(x) + shift

    forward.build(model, torch.ones(3, 2), torch.ones(1))
    shift = torch.tensor([5.0]).send(bob)
    model.send(bob)
    protocol = Protocol([Step("b", forward, [model, "x", shift])], inputs=["x"]).deploy(bob)
    held = count(bob)
    x = torch.ones(3, 2)
    assert torch.equal(protocol.run(x).get().detach(), reference(x).detach() + 5)
    assert count(bob) == held
    with pytest.raises(
        MixedLocationsError, match="object that step 'forward' takes is on worker 'bob', and taken on"
    ):
        Protocol([Step("a", forward, [model, "x", shift])], inputs=["x"]).deploy(alice).run(x)


def test_plans_change_in_place_in_the_order_of_the_description(alice, bob):
    @planrt.func2plan(args_shape=[(1,)], state=(torch.zeros(1),))
    def add_to(x, state):
        (counter,) = state.read()
        counter.add_(x)
        return counter * 1

    @planrt.func2plan(args_shape=[(1,)])
    def slow(x):
        return x * 10

    protocol = Protocol(
        [
            Step("b", slow, ["x"], name="ten"),
            Step("a", add_to, ["ten"], name="first"),  # waits for bob
            Step("a", add_to, ["x"], name="second"),  # could start at once, but shares the counter
        ],
        inputs=["x"],
        outputs=["first", "second"],
    ).deploy(alice, bob)
    one, two = protocol.run(torch.ones(1))
    assert (one.get().item(), two.get().item()) == (10, 11)


def test_a_step_may_take_and_give_nothing(alice):
    @planrt.func2plan(args_shape=[], state=(torch.zeros(1),))
    def tick(state):
        state.read()[0].add_(1)

    @planrt.func2plan(args_shape=[], state=(torch.zeros(1),))
    def read(state):
        return state.read()[0] + 0

    protocol = Protocol([Step("a", tick, []), Step("a", read, [])]).deploy(alice)
    assert protocol.run().get().tolist() == [0]  # each plan has a counter of its own


def test_independent_steps_run_at_the_same_time(alice, bob, add):
    """Both steps are under way before either has ended."""
    double = plan(lambda x: x * 2)
    protocol = Protocol(
        [Step("a", double, ["x"], name="l"), Step("b", double, ["x"], name="r"), Step("a", add, ["l", "r"])],
        inputs=["x"],
    ).deploy(alice, bob)
    seen = []
    protocol.run(torch.ones(2), on_progress=lambda *what: seen.append(what)).get()
    running = [seen.index((step, worker, "running")) for step, worker in (("l", "alice"), ("r", "bob"))]
    done = [seen.index((step, worker, "done")) for step, worker in (("l", "alice"), ("r", "bob"))]
    assert max(running) < min(done)
    assert seen[-1] == ("add", "alice", "done")


# ----------------------------------------------------------------------------------------- what cannot work


def one(x):
    return x + 1


def wrong(inc, add, both):
    """(description, the beginning of what it says)."""
    yield [], "a protocol is a list of steps"
    yield [("a", inc, "x", 3)], "step 0 is neither"
    yield [(3, inc)], "step 0: its worker is a worker, its id, or a name for one, not int"
    yield [("", inc)], "step 0: its worker"
    yield [("a", one)], "step 0: function is no plan: make one with func2plan"
    yield [Step("a", inc, "x")], "step 0: inputs is a list: write inputs=['x']"
    yield [Step("a", inc, ["x"])], "name the inputs of the protocol"
    yield [Step("a", inc, name="b.c")], "step 0: 'b.c' is no name"
    yield [Step("a", inc, name="s"), Step("b", inc, name="s")], "two steps are called 's'"
    yield [("a", inc), Step("b", inc, ["start"])], "step 'inc_2' takes 'start', and no input or earlier step"
    yield (
        [("a", inc), Step("b", inc, ["late"]), Step("c", inc, name="late")],
        "step 'inc_2' takes 'late', which does not",
    )
    yield [("a", inc), Step("b", inc, ["inc_2"])], "step 'inc_2' takes 'inc_2', which does not come before it"
    yield (
        [("a", inc), Step("b", inc, ["inc.0"])],
        "step 'inc_2' takes 'inc.0': 'inc' has no part '0'; it is one value",
    )
    yield (
        [("a", both), Step("b", inc, ["both.pair.2"])],
        "step 'inc' takes 'both.pair.2': 'both' has no part '2'; it is a",
    )
    yield [("a", inc), ("b", inc), Step("c", inc, ["inc"])], "no step takes the result of step 'inc_2'"
    yield (
        [("a", both), Step("b", inc, ["both.sum"])],
        r"step 'inc' wants float32[*] for x, and the result of step 'both'",
    )
    yield [("a", inc), Step("b", inc, [torch.ones(2)])], "step 'inc_2' is given a tensor of this process"
    yield [("a", inc), Step("b", inc, "inc")], "step 'inc_2': inputs is a list: write inputs=['inc']"


def test_descriptions_that_cannot_work(inc, add, both):
    for steps, says in wrong(inc, add, both):
        with pytest.raises(ProtocolError) as caught:
            Protocol(steps)
        assert str(caught.value).startswith(says), (str(caught.value), says)


def test_counts_of_arguments_are_checked(inc, add):
    with pytest.raises(PlanArgumentError, match=r"step 'add': add takes \(a, b\), got 1"):
        Protocol([("a", inc), ("b", add)])
    with pytest.raises(PlanArgumentError, match="step 'inc': inc takes"):
        Protocol([Step("a", inc, [])])


def test_inputs_and_outputs_are_checked(inc, add):
    for options, says in [
        ({"inputs": "x"}, "inputs is a list of names: write inputs=['x']"),
        ({"inputs": ["x", "x"]}, "two inputs have the same name"),
        ({"inputs": ["a.b"]}, "'a.b' is no name for an input"),
        ({"inputs": ["inc"]}, "'inc' is an input and a step"),
        ({"inputs": ["x", "y"], "steps": [Step("a", inc, ["x"])]}, "no step takes input 'y': leave it out"),
        (
            {"outputs": ["nothing"]},
            "the outputs of the protocol takes 'nothing', and no input or earlier step",
        ),
        ({"outputs": ["x"]}, "the outputs of the protocol are results of its steps, not 'x'"),
        ({"outputs": [torch.ones(1)]}, "the outputs of the protocol are results of its steps"),
    ]:
        with pytest.raises(ProtocolError) as caught:
            Protocol(options.pop("steps", [("a", inc)]), **options)
        assert str(caught.value).startswith(says), str(caught.value)


def test_shapes_are_checked_where_they_are_known():
    wide = plan(lambda x: x.view(-1, 4) * 2, (-1, 4))
    narrow = plan(lambda x: x * 2, (-1, 3))
    flat = plan(lambda x: x * 2, (-1,))
    whole = planrt.func2plan(lambda x: x * 2).build(torch.ones(2, 4, dtype=torch.int64))
    for steps, says in [
        (
            [("a", wide), Step("b", narrow)],
            r"wants float32\[\*, 3\] for x, and the result of step .* is float32\[\*, 4\]",
        ),
        ([("a", wide), Step("b", flat)], r"wants float32\[\*\] for x"),
        ([("a", wide), Step("b", whole)], r"wants int64\[\*, 4\] for x"),
    ]:
        with pytest.raises(ProtocolError, match=says):
            Protocol(steps)
    with pytest.raises(
        ProtocolError, match=r"step 'n' wants float32\[\*, 3\] for x, and step 'w' wants float32\[\*, 4\]"
    ):
        Protocol(
            [Step("a", wide, ["x"], name="w"), Step("b", narrow, ["x"], name="n")],
            inputs=["x"],
            outputs=["w", "n"],
        )
    Protocol([("a", wide), ("b", wide)])


def test_numbers_are_not_handed_on(both, inc):
    with pytest.raises(ProtocolError, match="is a number there: steps hand on tensors only"):
        Protocol([("a", both), Step("b", inc, ["both.pair.0"])])


def test_a_multi_pointer_elsewhere_names_all_its_places(inc, alice, bob, charlie):
    protocol = Protocol([("a", inc)]).deploy(alice)
    x = torch.ones(1).send(bob, charlie)
    assert isinstance(x, MultiPointerTensor)
    with pytest.raises(MixedLocationsError, match="is on worker 'bob', 'charlie', and taken on 'alice'"):
        protocol.run(x)

"""Canonical bytes: they round-trip, identify a plan, and are safe to read from anyone."""

import msgpack
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nets import MnistNet, make
from torch import nn

from planrt.errors import OpNotAllowedError, PlanError, PlanFormatError
from planrt.plans import Graph, Op, StateSpec, trace
from planrt.plans.running.interpreter import execute
from planrt.plans.training import trace_model
from planrt.types import Ref, TensorSpec


def simple():
    def f(x, y):
        total = torch.cat([x, y]).sum(0)
        return {"sum": total, "both": [x, (y[1:, None], x.shape[0] * 2)]}

    return trace(f, [torch.randn(4, 3), torch.randn(2, 3)], free_dims=[[0], [0]], input_names=("x", "y"))


PLAN = simple()
DATA = PLAN.to_bytes()


@pytest.mark.parametrize("name", ["resnet18", "transformer", "frozen"])
def test_bytes_round_trip(name):
    net, loss_fn, batches = make(name)
    plan = trace_model(net, loss_fn, *batches[0]).training
    again = Graph.from_bytes(plan.to_bytes())
    assert again == plan
    assert again.hash == plan.hash
    assert hash(again) == hash(plan)
    assert again.inputs == plan.inputs
    assert again.ops == plan.ops
    assert again.outputs == plan.outputs
    assert [(s.spec, s.kind, s.requires_grad) for s in again.state] == [
        (s.spec, s.kind, s.requires_grad) for s in plan.state
    ]
    assert again.state_values is None


def test_tracing_again_gives_the_same_hash_whatever_the_names_and_values():
    def g(first, second):
        total = torch.cat([first, second]).sum(0)
        return {"sum": total, "both": [first, (second[1:, None], first.shape[0] * 2)]}

    assert trace(g, [torch.ones(6, 3), torch.ones(1, 3)], free_dims=[[0], [0]], name="g").hash == PLAN.hash
    hashes = set()
    for _ in range(2):
        net = MnistNet()
        batch = (torch.randn(3, 1, 28, 28), torch.randint(0, 10, (3,)))
        hashes.add(trace_model(net, F.nll_loss, *batch).training.hash)
    assert len(hashes) == 1


def test_what_decides_the_result_decides_the_hash():
    x = torch.randn(2, 3)
    plans = [
        trace(lambda x: x + 1, [x]),
        trace(lambda x: x + 2, [x]),
        trace(lambda x: x + 1.0, [x]),
        trace(lambda x: x - 1, [x]),
        trace(lambda x: [x + 1], [x]),
        trace(lambda x: (x + 1,), [x]),
        trace(lambda x: x + 1, [x], free_dims=[[0]]),
        trace(lambda x: x + 1, [x.double()]),
        trace(lambda x: x + True, [x]),
        trace(lambda x: x + 0.0, [x]),
        trace(lambda x: x + -0.0, [x]),
    ]
    assert len({plan.hash for plan in plans}) == len(plans)


def test_printing_shows_the_signature_and_one_line_per_op():
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU())
    net[0].bias.requires_grad_(False)
    plan = trace(
        net, [torch.randn(2, 1, 5, 5)], modules=[net], free_dims=[[0]], name="net", input_names=["x"]
    )
    assert str(plan).splitlines() == [
        f"plan net sha256:{plan.hash}",
        "  _0: input x float32[*, 1, 5, 5]",
        "  _1: parameter 0.weight float32[2, 1, 3, 3]",
        "  _2: parameter 0.bias float32[2] frozen",
        "  _3 = torch.conv2d(_0, _1, _2, (1, 1), (0, 0), (1, 1), 1)",
        "  _4 = torch.nn.functional.relu(_3, inplace=False)",
        "  return _4",
    ]
    assert PLAN.code.splitlines() == [
        "_2 = torch.cat([_0, _1])",
        "_3 = _2.sum(0)",
        "_4 = _1.__getitem__((slice(1, None, None), None))",
        "_5 = _0.size(0)",
        "_6 = operator.mul(_5, 2)",
        "return {'sum': _3, 'both': [_0, (_4, _6)]}",
    ]
    assert trace(lambda x: x.T, [torch.ones(2, 2)]).code.splitlines()[0] == "_1 = _0.T"


def altered(position, value):
    parts = msgpack.unpackb(DATA)
    where = parts
    for step in position[:-1]:
        where = where[step]
    where[position[-1]] = value
    return msgpack.packb(parts)


@pytest.mark.parametrize(
    ("position", "value", "error", "message"),
    [
        ((0,), "something", PlanFormatError, "not a plan"),
        ((1,), 2, PlanFormatError, "newer than 1: update planrt"),
        ((1,), "1", PlanFormatError, "no version"),
        ((2, 0, 0), "float31", PlanFormatError, "unknown dtype 'float31'"),
        ((2, 0, 1, 0), -2, PlanFormatError, "malformed shape"),
        ((2, 0, 1), [2**40, 2**40], PlanFormatError, "more than 2"),
        ((2, 0, 1), [1] * 65, PlanFormatError, "65 dimensions is over the limit of 64"),
        ((2,), [["float32", []]] * 100_001, PlanFormatError, "100001 inputs is over the limit"),
        (
            (3,),
            [["float32", [1], "buffer", False]] * 100_001,
            PlanFormatError,
            "100001 state entries is over",
        ),
        ((4,), [0] * 1_000_000, PlanFormatError, "1000000 ops is over the limit of 100000"),
        ((4, 0, 1), ["t"] + [1] * 1_000_001, PlanFormatError, "msgpack.*1000002.*max_array_len"),
        ((4, 0, 1), ["t", *[["t", *[1] * 600_000]] * 2], PlanFormatError, "more than 1000000 items"),
        ((4, 0, 0), "torch.serialization.load", OpNotAllowedError, "'torch.serialization.load', is not on"),
        ((4, 0, 0), "Tensor.__class__", OpNotAllowedError, "'Tensor.__class__'"),
        ((4, 0, 0), "Tensor.grad.__class__", OpNotAllowedError, "'Tensor.grad.__class__'"),
        ((4, 0, 0), "x" * 1_000_000, OpNotAllowedError, "'x{80}', is not on the table"),
        ((2, 0), [], PlanFormatError, "malformed input"),
        ((3,), [["float32", [-1], "parameter", True]], PlanFormatError, "free dimension"),
        ((3,), [["float32", [1], "weight", True]], PlanFormatError, "malformed state entry 0"),
        ((4, 0, 0), "Tensor.item", OpNotAllowedError, "op 0 .*'Tensor.item', is not on the table"),
        ((4, 0, 0), "os.system", OpNotAllowedError, "'os.system'"),
        ((4, 0, 0), 7, PlanFormatError, "name is not a string"),
        ((4, 0, 1), ["l"], PlanFormatError, "not a tuple and a dict"),
        ((4, 1, 1, 1), ["r", 9], PlanFormatError, r"op 1 \(Tensor.sum\) refers to _9, which no earlier"),
        ((4, 1, 1, 1), ["r", 3], PlanFormatError, "refers to _3, which no earlier"),
        ((4, 1, 1, 1), ["r", -1], PlanFormatError, "malformed reference"),
        ((4, 1, 1, 1), ["x", 1], PlanFormatError, "unknown tag 'x'"),
        ((4, 1, 3), ["r", 2], PlanFormatError, "the number 2, not 3"),
        ((4, 1, 3), ["l", ["r", 3]], PlanFormatError, "malformed result"),
        ((5,), ["r", 99], PlanFormatError, "output refers to _99"),
        ((4, 0), [], PlanFormatError, "malformed op"),
        ((4,), 3, PlanFormatError, "ops are not an array"),
    ],
)
def test_altered_plans_are_refused_with_a_reason(position, value, error, message):
    with pytest.raises(error, match=message):
        Graph.from_bytes(altered(position, value))


def test_bytes_that_are_no_plan():
    for data in (b"", b"\xc1", b"\x93", DATA[:-1], DATA + b"\x00", b"\x81\x01\x02", msgpack.packb([1])):
        with pytest.raises(PlanFormatError):
            Graph.from_bytes(data)
    with pytest.raises(PlanFormatError, match="sections"):
        Graph.from_bytes(msgpack.packb(["planrt-plan", 1]))


def test_a_second_spelling_of_the_same_plan_is_refused():
    longer = DATA.replace(b"\xabplanrt-plan", b"\xd9\x0bplanrt-plan", 1)
    assert msgpack.unpackb(longer) == msgpack.unpackb(DATA)
    with pytest.raises(PlanFormatError, match="canonical"):
        Graph.from_bytes(longer)


def test_deep_nesting_is_refused_not_recursed_into():
    value = ["r", 0]
    for _ in range(100):
        value = ["l", value]
    with pytest.raises(PlanFormatError, match="levels deep"):
        Graph.from_bytes(altered((5,), value))
    with pytest.raises(PlanFormatError):
        Graph.from_bytes(b"\x91" * 100_000)


def test_limits(monkeypatch):
    monkeypatch.setattr("planrt.plans.ir.graph.MAX_OPS", 4)
    with pytest.raises(PlanFormatError, match="with 5 ops is over the limit of 4"):
        Graph.from_bytes(DATA)
    monkeypatch.setattr("planrt.plans.ir.graph.MAX_BYTES", 10)
    with pytest.raises(PlanFormatError, match="longer than the limit of 10"):
        Graph.from_bytes(DATA)


def test_plans_made_by_hand_are_checked_like_those_from_bytes():
    spec = TensorSpec((2,), torch.float32)
    with pytest.raises(OpNotAllowedError):
        Graph((spec,), (), (Op("Tensor.tolist", (Ref(0),), {}, Ref(1)),), Ref(1))
    with pytest.raises(PlanFormatError):
        Graph((spec,), (), (Op("Tensor.neg", (Ref(1),), {}, Ref(1)),), Ref(1))
    with pytest.raises(PlanFormatError, match="float8"):
        Graph((TensorSpec((2,), torch.float8_e5m2),), (), (), Ref(0))
    state = StateSpec("w", TensorSpec((2, -1), torch.float32), "buffer", False)
    with pytest.raises(PlanFormatError, match="free dimension"):
        Graph((spec,), (state,), (), Ref(0))


def looped():
    endless = []
    endless.append(endless)
    return endless


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ops": (Op("Tensor.neg", (looped(),), {}, Ref(1)),)}, "levels deep"),
        ({"ops": (Op("Tensor.neg", (Ref(0),), {}, looped()),)}, "levels deep"),
        ({"outputs": looped()}, "levels deep"),
        ({"ops": (Op("Tensor.neg", (print,), {}, Ref(1)),)}, "type builtin_function_or_method cannot stand"),
        ({"ops": (Op("Tensor.neg", (torch.ones(1),), {}, Ref(1)),)}, "type Tensor cannot stand"),
        ({"ops": (Op("Tensor.neg", [Ref(0)], {}, Ref(1)),)}, "not a tuple and a dict"),
        ({"ops": (Op("Tensor.neg", (Ref(0),), {1: 2}, Ref(1)),)}, "keys in a plan are strings"),
        ({"ops": (Op(["Tensor.neg"], (Ref(0),), {}, Ref(1)),)}, "not an Op with a name"),
        ({"ops": ("Tensor.neg",)}, "not an Op with a name"),
        ({"ops": (Op("Tensor.neg", (Ref(0),), {}, Ref(True)),)}, "gives its result the number True, not 1"),
        ({"ops": (Op("Tensor.neg", (Ref("0"),), {}, Ref(1)),)}, "which no earlier step makes"),
        ({"ops": (Op("Tensor.neg", (Ref(0.0),), {}, Ref(1)),)}, "which no earlier step makes"),
        ({"inputs": ("float32",)}, "described by a TensorSpec"),
        ({"inputs": (TensorSpec([2], torch.float32),)}, "whose shape is a tuple"),
        ({"state": (TensorSpec((2,), torch.float32),)}, "a state entry is a StateSpec"),
    ],
)  # fmt: skip
def test_op_lists_that_no_tracer_makes(change, message):
    fields = {
        "inputs": (TensorSpec((2,), torch.float32),),
        "state": (),
        "ops": (),
        "outputs": Ref(0),
        **change,
    }
    with pytest.raises(PlanFormatError, match=message):
        Graph(**fields)


def test_what_is_no_bytes():
    for data in ("text", None, 7, [1]):
        with pytest.raises(PlanFormatError, match="read from bytes, not from"):
            Graph.from_bytes(data)


# Whatever bytes arrive: a plan or a PlanError, never another exception.

FUZZ = settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def read(data):
    try:
        plan = Graph.from_bytes(data)
    except PlanError:
        return
    assert plan.to_bytes() == data
    str(plan)


@FUZZ
@given(flips=st.lists(st.tuples(st.integers(0, len(DATA) - 1), st.integers(0, 255)), min_size=1, max_size=4))
def test_flipped_bytes(flips):
    data = bytearray(DATA)
    for position, value in flips:
        data[position] = value
    read(bytes(data))


@FUZZ
@given(start=st.integers(0, len(DATA)), stop=st.integers(0, len(DATA)))
def test_cut_out_bytes(start, stop):
    read(DATA[:start] + DATA[stop:])


@FUZZ
@given(st.binary(max_size=64))
def test_random_bytes(data):
    read(data)


MSGPACK = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=4)
    | st.binary(max_size=4) | st.sampled_from(["t", "l", "d", "r", "s", "y", "Tensor.add", "float32"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
    max_leaves=12,
)  # fmt: skip


@FUZZ
@given(section=st.integers(2, 5), value=MSGPACK)
def test_sections_replaced_by_other_values(section, value):
    parts = msgpack.unpackb(DATA)
    parts[section] = value
    read(msgpack.packb(parts))


@FUZZ
@given(op=st.integers(0, 4), part=st.integers(0, 3), value=MSGPACK)
def test_parts_of_ops_replaced_by_other_values(op, part, value):
    parts = msgpack.unpackb(DATA)
    parts[4][op][part] = value
    read(msgpack.packb(parts))


def test_a_plan_from_bytes_computes_the_same():
    x, y = torch.randn(5, 3), torch.randn(1, 3)
    result = execute(Graph.from_bytes(DATA), [x, y])
    assert torch.equal(result["sum"], torch.cat([x, y]).sum(0))
    assert result["both"][0] is x
    assert result["both"][1][1] == 10

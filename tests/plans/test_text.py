"""The printed form of plans: readable, complete, read back to an equal plan, and safe to read from anyone."""

import difflib
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nets import make
from torch import nn

from planrt.errors import PlanFormatError
from planrt.plans import Graph, Op, Plan, StateSpec, parse, trace
from planrt.plans.ir import text as text_module
from planrt.plans.ir.ops import TABLE
from planrt.plans.training import trace_model
from planrt.serde.dtypes import DTYPES
from planrt.serde.values import DEVICE
from planrt.types import FREE, Ref, TensorSpec

F32 = TensorSpec((FREE, 2), torch.float32)


FIRST = Ref(1)


def one_op(name, *args, results=FIRST, **kwargs):
    return Graph((F32,), (), (Op(name, args, kwargs, results),), Ref(0), input_names=("x",))


def line_of(*args, **kwargs):
    return str(one_op(*args, **kwargs).ops[0])


def same(graph):
    """`graph` after printing and parsing, found equal in everything that a text holds."""
    again = parse(str(graph))
    assert again.to_bytes() == graph.to_bytes()
    assert (again.name, again.doc, again.state) == (graph.name, graph.doc, graph.state)
    assert again.input_names == graph.input_names[: len(graph.inputs)]
    assert again.state_values is None
    assert str(again) == str(graph)
    return again


SAMPLE = """\
plan Net
  # Adds, and \\\\ more.
  #
  # Ends.
  _0: input x float32[*, 2]
  _1: input 'a b' int64[]
  _2: parameter fc.weight float32[3, 2]
  _3: parameter fc.bias float32[3] frozen
  _4: buffer mean bfloat16[0, 4]
  _5: constant captured.5 complex128[1] requires_grad
  _6 = torch.nn.functional.linear(_0, _2, _3)
  _7 = _6.add(-0.0, alpha=complex(nan, -1.0))
  _8, _, _9 = _7.max(1)
  _10, (_11,) = torch.Tensor.sum([_9, {'k': (slice(None, 2, -1), ...)}, ()], **{'a b': 'it\\'s "\\n\\u03bc"'})
  _11.add_(torch.float32)
  (_12,) = torch.stack(_8, torch.channels_last, torch.strided, DEVICE, inf, 1e-05, True, None)
  return {'out': (_12,), 'none': None}
"""


def test_a_sample_shows_every_form():
    graph = parse(SAMPLE)
    assert str(graph) == SAMPLE.replace("plan Net", f"plan Net sha256:{graph.hash}").rstrip("\n")
    assert graph.doc == "Adds, and \\ more.\n\nEnds."
    assert graph.inputs == (F32, TensorSpec((), torch.int64))
    assert graph.input_names == ("x", "a b")
    assert [(e.name, e.kind, e.requires_grad) for e in graph.state] == [
        ("fc.weight", "parameter", True), ("fc.bias", "parameter", False), ("mean", "buffer", False),
        ("captured.5", "constant", True),
    ]  # fmt: skip
    assert [op.results for op in graph.ops] == [
        Ref(6), Ref(7), (Ref(8), None, Ref(9)), (Ref(10), (Ref(11),)), None, (Ref(12),)
    ]  # fmt: skip
    assert graph.ops[3].kwargs == {"a b": 'it\'s "\n\u03bc"'}
    assert graph.ops[5].args[1:5] == (torch.channels_last, torch.strided, DEVICE, float("inf"))
    assert graph.outputs == {"out": (Ref(12),), "none": None}
    same(graph)


@pytest.mark.parametrize("name", ["mnist", "resnet18", "transformer", "lstm", "unet", "embedding", "frozen"])
def test_networks_round_trip(name):
    net, loss_fn, batches = make(name)
    plans = trace_model(net, loss_fn, *batches[0])
    for graph in (plans.training, plans.evaluation):
        same(graph)
        same(Graph.from_bytes(graph.to_bytes()))  # without names


def test_every_op_of_the_table_round_trips():
    for name in TABLE:
        for args in ((Ref(0),), (Ref(0), 1), (1,), (), ([Ref(0)],)):
            same(one_op(name, *args))
            same(one_op(name, *args, results=None, dim=1))


def test_ops_look_like_pytorch():
    x = Ref(0)
    assert line_of("Tensor.add", x, 1, alpha=2.5) == "_1 = _0.add(1, alpha=2.5)"
    assert line_of("Tensor.add", 1, x) == "_1 = torch.Tensor.add(1, _0)"
    assert line_of("Tensor.add", self=x) == "_1 = torch.Tensor.add(self=_0)"
    assert line_of("torch.add", x, 1) == "_1 = torch.add(_0, 1)"
    assert line_of("nn.init.normal_", x, 0, 1, results=None) == "torch.nn.init.normal_(_0, 0, 1)"
    assert line_of("operator.mul", x, 2) == "_1 = operator.mul(_0, 2)"
    assert line_of("Tensor.T", x) == "_1 = _0.T"
    assert line_of("Tensor.T", x, 1) == "_1 = torch.Tensor.T(_0, 1)"
    assert line_of("Tensor.max", x, 0, results=(Ref(1), Ref(2))) == "_1, _2 = _0.max(0)"
    assert line_of("Tensor.unbind", x, results=(Ref(1),)) == "(_1,) = _0.unbind()"
    assert line_of("Tensor.unbind", x, results=()) == "() = _0.unbind()"
    # As plans that differentiate have them; they are not on this table.
    assert str(Op("Tensor.grad.__set__", (x, None), {}, None)) == "_0.grad.__set__(None)"
    assert str(Op("Tensor.grad", (x,), {}, Ref(1))) == "_1 = _0.grad"
    assert str(Op("autograd.grad", ([x],), {}, Ref(1))) == "_1 = torch.autograd.grad([_0])"


def test_print_gives_the_plan_and_its_text():
    plan = Plan(lambda x: x + 1, name="add one").build(torch.ones(3))
    assert str(plan).splitlines() == [
        f"<Plan 'add one' id:{plan.id} owner:me built>",
        f"plan 'add one' sha256:{plan.hash}",
        "  _0: input x float32[*]",
        "  _1 = _0.add(1)",
        "  return _1",
    ]
    assert plan.code == "_1 = _0.add(1)\nreturn _1"
    assert parse(str(plan)) == plan.graph


def test_the_text_of_a_module_in_both_modes():
    class Net(Plan):
        """A net.

        Two lines.
        """

        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Dropout(0.5))

        def forward(self, x, scale=2.0):
            return self.body(x * scale)

    net = Net().build(torch.randn(4, 2))
    training = same(net.graph)
    assert training.doc == "A net.\n\nTwo lines."
    assert same(net.eval().graph) != training


def test_a_diff_of_two_plans_shows_what_differs():
    def text(rate, width):
        return str(trace(lambda x: F.dropout(x, rate).relu().sum(1), [torch.ones(2, width)]))

    assert changes(text(0.1, 2), text(0.1, 2)) == []
    header, *others = changes(text(0.1, 2), text(0.2, 3))[::2]
    assert header.startswith("- plan plan sha256:")
    assert others == [
        "-   _0: input float32[2, 2]",
        "-   _1 = torch.nn.functional.dropout(_0, p=0.1, training=True, inplace=False)",
    ]


def changes(one, other):
    compared = difflib.ndiff(one.splitlines(), other.splitlines())
    return [line for line in compared if line[0] in "-+"]


def test_names_and_docs_cannot_imitate_lines():
    evil = "x\n  _9 = torch.add(_0, 1)\x1b[2J\u202e"
    graph = replace(
        one_op("Tensor.relu", Ref(0)), name=evil, input_names=(evil,), doc=evil,
        state=(StateSpec(evil, TensorSpec((1,), torch.float32), "buffer", False),),
        ops=(), outputs=Ref(0),
    )  # fmt: skip
    lines = str(graph).split("\n")
    assert all(line.isprintable() for line in lines)
    assert [line for line in lines if line.startswith("  _9")] == []
    same(graph)
    assert ascii(evil) in str(replace(Plan(lambda x: x, name=evil).build(torch.ones(1)).graph, doc=""))


def test_what_is_free_in_a_text():
    graph = trace(lambda x: x + 1, [torch.ones(2)], input_names=["x"], name="f")
    lines = str(graph).splitlines()
    assert parse("\r\n\n".join(f"    {line}  " for line in lines)) == graph
    assert parse("\n".join([lines[0].partition(" sha256")[0], *lines[1:]])) == graph
    assert parse(f"\n<Plan f id:7 owner:me built>\n{graph}\n") == graph


PLAIN = str(trace(lambda x: (x + 1).max(0), [torch.ones(2)], input_names=["x"], name="f"))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (PLAIN, "", r"line 1: expected 'plan NAME', found the end of the text"),
        ("plan f", "plam f", r"line 1: expected 'plan NAME', found 'plam f"),
        ("sha256:", "sha256:0", r"line 1: expected the end of the line"),
        (" sha256:", " sha256:x", r"line 1: expected the 64 hex digits"),
        (".add(1)", ".add(2)", r"line 1: the hash is that of another plan; .* leave it out if you changed"),
        ("float32[2]", "float33[2]", r"line 2: expected a dtype and a shape.*found 'float33"),
        ("float32[2]", "float32[-1]", r"line 2: expected a dtype and a shape"),
        ("float32[2]", "float32[02]", r"line 2: this is written .*float32\[2\]"),
        (
            "float32[2]",
            f"float32[{'9' * 15}, {'9' * 15}]",
            r"line 2: a tensor with more than 2\*\*48 elements",
        ),
        ("float32[2]", f"float32[{'9' * 30}]", r"line 2: .* is no shape"),
        ("_0: input", "_1: input", r"line 2: expected '_0: ', the next number"),
        ("_0: input x", "_0: tensor x", r"line 2: expected input, parameter, buffer or constant"),
        ("_0: input x float32[2]", "_0: buffer x float32[*]", r"line 2: state has no free sizes"),
        ("_1 = _0.add(1)", "_1 = _1.add(1)", r"line 3: _1 is made by no earlier line"),
        ("_1 = _0.add(1)", "_2 = _0.add(1)", r"line 3: expected _1, the next number"),
        ("_1 = _0.add(1)", "_1 = _0.item()", r"line 3: item is no op that plans may use"),
        ("_1 = _0.add(1)", "_1 = os.system('ls')", r"line 3: os.system is no op"),
        ("_1 = _0.add(1)", "_1 = torch.os.system('ls')", r"line 3: torch.os.system is no op"),
        ("_1 = _0.add(1)", "_1 = _0.add(1", r"line 3: expected ', ' or '\)', found the end of the line"),
        ("_1 = _0.add(1)", "_1 = _0.add(1) ", None),
        ("_1 = _0.add(1)", "_1 = _0.add( 1)", r"line 3: expected a value, found ' 1\)'"),
        ("_1 = _0.add(1)", "_1 = _0.add(01)", r"line 3: this is written '_1 = _0.add\(1\)', not"),
        ("_1 = _0.add(1)", "_1 = torch.Tensor.add(_0, 1)", r"line 3: this is written '_1 = _0.add\(1\)'"),
        ("_1 = _0.add(1)", "_1 = _0.add(1 + 1)", r"line 3: expected ', ' or '\)', found ' \+ 1"),
        ("_1 = _0.add(1)", "_1 = _0.add(open)", r"line 3: expected a value, found 'open\)'"),
        ("_1 = _0.add(1)", "_1 = _0.add(torch.float8_e5m2)", r"line 3: expected a value"),
        ("_1 = _0.add(1)", f"_1 = _0.add({2**63})", r"line 3: the integer .* 64-bit range"),
        ("_1 = _0.add(1)", f"_1 = _0.add({'9' * 10_000})", r"line 3: the integer 9+ is outside"),
        ("_1 = _0.add(1)", "_1 = _0.add(1e999)", r"line 3: this is written .*inf"),
        ("_1 = _0.add(1)", "_1 = _0.add(a=1, 2)", r"line 3: expected an argument with a name"),
        ("_1 = _0.add(1)", "_1 = _0.add(a=1, a=2)", r"line 3: the argument a stands twice"),
        ("_1 = _0.add(1)", "_1 = _0.add({'a': 1, 'a': 2})", r"line 3: the key 'a' stands twice"),
        ("_1 = _0.add(1)", "_1 = _0.add(**{'a': 1})", r"line 3: this is written '_1 = _0.add\(a=1\)'"),
        ("_1 = _0.add(1)", "_1 = _0.add(**_0)", r"line 3: after \*\* stands a dict"),
        ("_1 = _0.add(1)", "_1 = _0.add(slice(1))", r"line 3: a slice has three parts"),
        ("_1 = _0.add(1)", "_1 = _0.add(complex(1, 2))", r"line 3: expected two numbers with a point"),
        ("_1 = _0.add(1)", "_1 = _0.add('\\d')", r"line 3: no character is written \\\\d"),
        ("_1 = _0.add(1)", "_1 = _0.add('\\ud800')", r"line 3: no character is written"),
        ("_1 = _0.add(1)", "_1 = _0.add('\\U00110000')", r"line 3: no character is written"),
        ("_1 = _0.add(1)", "_1 = _0.add('\\x41')", r"line 3: this is written .*'A'"),
        ("_1 = _0.add(1)", f"_1 = _0.add({'(' * 99})", r"line 3: values nested more than 16 levels"),
        ("_1 = _0.add(1)", f"{'(' * 99} = _0.add(1)", r"line 3: results nested more than 16 levels"),
        ("_1 = _0.add(1)", "_1 = _0.T(1)", r"line 3: expected the end of the line"),
        ("return (_2, _3)", "return (_2, _4)", r"line 5: _4 is made by no earlier line"),
        ("  return (_2, _3)", "", r"line 5: expected an op, or what is returned, found the end of the text"),
        ("return (_2, _3)", "return (_2, _3)\nreturn _2", r"line 6: expected nothing after"),
    ],
)
def test_text_that_is_no_plan(old, new, message):
    assert old in PLAIN
    text = PLAIN.replace(old, new, 1)
    if message is None:
        assert str(parse(text)) == PLAIN
        return
    with pytest.raises(PlanFormatError, match=message):
        parse(text)


def test_what_is_no_text_or_too_long(monkeypatch):
    with pytest.raises(PlanFormatError, match="takes the text of a plan, not bytes"):
        parse(PLAIN.encode())
    monkeypatch.setattr("planrt.plans.ir.parsing.MAX_OPS", 1)
    with pytest.raises(PlanFormatError, match="line 4: a plan has at most 1 ops"):
        parse(PLAIN)
    monkeypatch.setattr("planrt.plans.ir.parsing.MAX_CHARACTERS", 10)
    with pytest.raises(PlanFormatError, match="longer than the limit of 10"):
        parse(PLAIN)


def test_every_deletion_and_swap_of_a_character_is_a_plan_or_an_error():
    for sample in (SAMPLE, PLAIN):
        parse(sample)
        for position in range(len(sample)):
            for text in (
                sample[:position] + sample[position + 1 :],
                sample[:position] + sample[position + 1 : position + 2] + sample[position]
                + sample[position + 2 :],
            ):  # fmt: skip
                try:
                    graph = parse(text)
                except PlanFormatError as error:
                    assert str(error).startswith("line ")
                else:
                    same(graph)


# Whatever graph there can be: its text is read back to an equal one.

FUZZ = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
TEXT = st.text(st.characters(codec="utf-8"), max_size=6)
CONSTANTS = (
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats() | TEXT
    | st.complex_numbers() | st.sampled_from([*DTYPES.values(), ..., DEVICE, torch.strided, -0.0])
    | st.sampled_from([torch.channels_last, torch.contiguous_format, complex(-0.0, float("nan"))])
)  # fmt: skip


def values(known):
    leaf = CONSTANTS | st.builds(Ref, st.integers(0, known - 1)) if known else CONSTANTS
    return st.recursive(
        leaf,
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.lists(inner, max_size=3).map(tuple)
            | st.dictionaries(TEXT, inner, max_size=2)
            | st.builds(slice, inner, inner, inner)
        ),
        max_leaves=6,
    )


RESULT_SHAPES = st.recursive(
    st.booleans(), lambda inner: st.lists(inner, max_size=3).map(tuple), max_leaves=4
)


@st.composite
def graphs(draw):
    def spec(low):
        return TensorSpec(
            tuple(draw(st.lists(st.integers(low, 70), max_size=3))),
            draw(st.sampled_from(list(DTYPES.values()))),
        )

    inputs = tuple(spec(FREE) for _ in range(draw(st.integers(0, 3))))
    state = tuple(
        StateSpec(
            draw(TEXT),
            spec(0),
            draw(st.sampled_from(["parameter", "buffer", "constant"])),
            draw(st.booleans()),
        )
        for _ in range(draw(st.integers(0, 3)))
    )
    known = len(inputs) + len(state)

    def numbered(shape):
        nonlocal known
        if isinstance(shape, tuple):
            return tuple(numbered(item) for item in shape)
        known += shape
        return Ref(known - 1) if shape else None

    ops = []
    for _ in range(draw(st.integers(0, 4))):
        args = draw(st.lists(values(known), max_size=3).map(tuple))
        kwargs = draw(st.dictionaries(TEXT | st.sampled_from(["dim", "_3", "a1"]), values(known), max_size=2))
        name = draw(st.sampled_from(sorted(TABLE)))
        ops.append(Op(name, args, kwargs, numbered(draw(RESULT_SHAPES))))
    return Graph(
        inputs, state, tuple(ops), draw(values(known)),
        name=draw(TEXT), input_names=tuple(draw(TEXT) for _ in inputs)[: draw(st.integers(0, 3))],
        doc=draw(TEXT).strip(" "),
    )  # fmt: skip


@FUZZ
@given(graphs())
def test_random_graphs_round_trip(graph):
    same(graph)
    assert str(graph).count("\n") == str(graph).replace("\r", "\n").count("\n")


@FUZZ
@given(graphs(), st.data())
def test_random_changes_of_a_text_are_a_plan_or_an_error(graph, data):
    text = str(replace(graph, name="f")).replace(f" sha256:{graph.hash}", "")
    start = data.draw(st.integers(0, len(text)))
    stop = data.draw(st.integers(start, min(len(text), start + 4)))
    text = (
        text[:start] + data.draw(st.text(st.sampled_from("_01.,()[]{}='\\*#x\n "), max_size=3)) + text[stop:]
    )
    try:
        changed = parse(text)
    except PlanFormatError:
        return
    assert parse(str(changed)) == changed


@FUZZ
@given(st.text(max_size=60))
def test_random_text(text):
    with pytest.raises(PlanFormatError):
        parse(text)
    with pytest.raises(PlanFormatError):
        parse(f"plan f\n{text}")


def test_the_example_of_the_documentation():
    lines = (text_module.__doc__ or "").split("\n")
    example = "\n".join(line[4:] for line in lines if line.startswith("    "))
    assert str(same(parse(example))) == example

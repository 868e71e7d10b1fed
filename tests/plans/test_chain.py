"""Chains of plans as data: canonical bytes, and bytes from anyone."""

import msgpack
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from planrt.errors import OpNotAllowedError, PlanFormatError, PlanrtError
from planrt.plans import func2plan
from planrt.plans.ir.chain import Chain, ChainPlan, ChainStep
from planrt.types import Ref


def plan_of(function, count=1):
    return ChainPlan(func2plan(function, args_shape=[(-1,)] * count).record, True)


INC = plan_of(lambda x: x + 1)
ADD = plan_of(lambda a, b: {"sum": a + b, "both": (a * 2, a.shape[0])}, 2)


def a_chain(**changes):
    parts = {
        "inputs": ("x",),
        "plans": (INC, ADD),
        "steps": (
            ChainStep("first", "alice", 0, (Ref(0),)),
            ChainStep("second", "bob", 0, (Ref(0),)),
            ChainStep("join", "alice", 1, (Ref(1), Ref(2))),
        ),
        "outputs": {"out": (Ref(3), [Ref(5)]), "n": 3},
    }
    return Chain(**{**parts, **changes})


def test_bytes_and_back():
    chain = a_chain()
    again = Chain.from_bytes(chain.to_bytes())
    assert again.to_bytes() == chain.to_bytes()
    assert again.hash == chain.hash
    assert again.steps == chain.steps
    assert again.inputs == ("x",)
    assert again.outputs == chain.outputs
    assert again.plans[1].record.to_bytes() == ADD.record.to_bytes()
    assert again.places == ("alice", "bob")
    assert [list(made) for made in again.results] == [[1], [2], [3, 4, 5]]
    assert [again.maker(value) for value in range(6)] == [None, 0, 1, 2, 2, 2]


def test_whatever_differs_has_another_hash():
    hashes = {
        a_chain(**changes).hash
        for changes in (
            {},
            {"inputs": ("y",)},
            {"outputs": Ref(3)},
            {"plans": (INC, ChainPlan(ADD.record, False))},
            {"steps": (*a_chain().steps[:2], ChainStep("join", "bob", 1, (Ref(1), Ref(2))))},
            {"steps": (*a_chain().steps[:2], ChainStep("join", "alice", 1, (Ref(2), Ref(1))))},
        )
    }
    assert len(hashes) == 6


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"steps": ()}, "without steps"),
        ({"inputs": ("x", "x")}, "two inputs have the same name"),
        ({"inputs": ("",)}, "inputs: names are texts"),
        ({"steps": (ChainStep("a", "p", 0, (Ref(1),)),)}, "takes a value that no earlier step gives"),
        ({"steps": (ChainStep("a", "p", 0, (Ref(-1),)),)}, "takes a value that no earlier step gives"),
        ({"steps": (ChainStep("a", "p", 0, ()),)}, "has 0 arguments, its plan takes 1"),
        ({"steps": (ChainStep("a", "p", 2, (Ref(0),)),)}, "step 'a' has no plan"),
        ({"steps": (ChainStep("a", "p", -1, (Ref(0),)),)}, "step 'a' has no plan"),
        ({"steps": (ChainStep("a", "p", True, (Ref(0),)),)}, "step 'a' has no plan"),
        ({"steps": (ChainStep("a", "", 0, (Ref(0),)),)}, "place: names are texts"),
        ({"steps": (ChainStep("a" * 201, "p", 0, (Ref(0),)),)}, "steps: names are texts"),
        ({"steps": (ChainStep("a", "p", 0, (Ref(0),)),) * 2}, "two steps have the same name"),
        ({"outputs": Ref(0)}, "outputs of a protocol are results"),
        ({"outputs": [Ref(6)]}, "outputs of a protocol are results"),
        ({"plans": (INC, ChainPlan(ADD.record, 1))}, "the mode of a plan is no bool"),
    ],
)
def test_what_cannot_be_a_chain(changes, says):
    with pytest.raises(PlanFormatError, match=says):
        a_chain(**changes)


def spoiled(change):
    parts = msgpack.unpackb(a_chain().to_bytes(), raw=False, strict_map_key=True)
    change(parts)
    return msgpack.packb(parts, use_bin_type=True)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda parts: parts.__setitem__(0, "planrt-plan"), "not a protocol"),
        (lambda parts: parts.__setitem__(1, 2), "newer than 1: update planrt"),
        (lambda parts: parts.__setitem__(1, "1"), "no version number"),
        (lambda parts: parts.append(1), "7 sections instead of 6"),
        (lambda parts: parts.__setitem__(2, 3), "a section is no array"),
        (lambda parts: parts[2].append([]), "names are texts"),
        (lambda parts: parts[3].__setitem__(0, 3), "expected an array of 2"),
        (lambda parts: parts[3][0].__setitem__(0, "text"), "a plan is no bytes"),
        (lambda parts: parts[3].extend([parts[3][0]] * 9), "3 steps, of at most .* and 11 plans"),
        (lambda parts: parts[4][0].__setitem__(3, ["0"]), "an argument is no number"),
        (lambda parts: parts[4][0].__setitem__(3, [0.0]), "an argument is no number"),
        (lambda parts: parts[4][0].__setitem__(1, 3), "place: names are texts"),
        (lambda parts: parts.__setitem__(4, parts[4] * 4000), "12000 steps"),
        (lambda parts: parts.__setitem__(5, ["r", 99]), "outputs of a protocol"),
        (lambda parts: parts.__setitem__(5, {"r": 1}), "malformed value"),
    ],
)
def test_altered_bytes_are_refused(change, says):
    with pytest.raises(PlanFormatError, match=says):
        Chain.from_bytes(spoiled(change))


def test_a_second_spelling_is_refused():
    with pytest.raises(PlanFormatError, match="canonical"):
        Chain.from_bytes(a_chain().to_bytes().replace(b"\xa5first", b"\xd9\x05first"))


def test_ops_off_the_table_are_refused():
    with pytest.raises(OpNotAllowedError):
        Chain.from_bytes(a_chain().to_bytes().replace(b"Tensor.add", b"Tensor.adx"))


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_flipped_and_truncated_bytes_are_refused_in_one_way(data):
    raw = bytearray(a_chain().to_bytes())
    if data.draw(st.booleans()):
        raw = raw[: data.draw(st.integers(0, len(raw) - 1))]
    else:
        raw[data.draw(st.integers(0, len(raw) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    try:
        found = Chain.from_bytes(bytes(raw))
    except PlanrtError:
        return
    assert found.to_bytes() == bytes(raw)  # another chain, not another spelling


def test_plans_without_the_mode_are_refused():
    class Norm(torch.nn.Module):
        def forward(self, x):
            return x if self.training else x[:, 3]

    from planrt.plans import Plan

    record = Plan(Norm()).build(torch.ones(2)).record
    assert record.evaluation is None
    with pytest.raises(PlanFormatError, match="could be recorded in training mode only"):
        Chain(("x",), (ChainPlan(record, False),), (ChainStep("a", "p", 0, (Ref(0),)),), Ref(1))

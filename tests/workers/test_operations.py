"""What a worker knows of single ops is in their traits, never in comparisons of names."""

import ast
from dataclasses import fields
from pathlib import Path

import pytest

import planrt.workers.machine
from planrt.plans.ir import ops
from planrt.plans.ir.traits import OpTraits
from planrt.workers.machine.operations import OPERATIONS
from planrt.workers.wire import plan_call

MACHINE = Path(planrt.workers.machine.__file__).parent
TRAITS = [field.name for field in fields(OpTraits) if field.name != "name"]


def machine_modules():
    return sorted(MACHINE.glob("*.py"))


def everything_in_the_machine():
    return [node for path in machine_modules() for node in ast.walk(ast.parse(path.read_text()))]


def test_every_op_has_traits_and_a_function():
    posted = {name for name in (*ops.TABLE, *ops.EAGER) if name not in ops.PLANS_ONLY}
    assert {*ops.TRAITS} == {*ops.TABLE, *ops.EAGER}
    assert {*OPERATIONS} == posted | {plan_call.CALL, plan_call.COPY, plan_call.STATE}
    assert all(operation.traits.name == name for name, operation in OPERATIONS.items())
    assert all(OPERATIONS[name].function is ops.lookup_eager(name) for name in posted)


@pytest.mark.parametrize("trait", TRAITS)
def test_every_trait_sets_some_op_apart_and_not_all(trait):
    everything = {**ops.TRAITS, **plan_call.TRAITS}.values()
    having = [traits.name for traits in everything if getattr(traits, trait)]
    assert 0 < len(having) < len(everything) / 2


@pytest.mark.parametrize("trait", TRAITS)
def test_every_trait_is_asked_for_by_the_machine(trait):
    own = ast.walk(ast.parse(Path(ops.__file__).with_name("traits.py").read_text()))
    read = {
        node.attr
        for node in [*everything_in_the_machine(), *own]
        if isinstance(node, ast.Attribute) and ast.unparse(node.value).endswith(("traits", "self"))
    }
    assert trait in read


NAMES = {*ops.TABLE, *ops.EAGER, *plan_call.TRAITS}
CONSTANTS = {
    "CALL",
    "COPY",
    "STATE",
    "RANDOM",
    "FACTORIES",
    "GRADIENTS",
    "EAGER",
    "MEMORY_WRITES",
    "REQUIRES_GRAD",
}


def names_an_op(node):
    """Whether an expression is an op's name, or a table of names."""
    for inner in ast.walk(node):
        if isinstance(inner, ast.Constant) and inner.value in NAMES:
            return True
        if isinstance(inner, ast.Attribute) and (
            inner.attr in CONSTANTS
            or (inner.attr == "name" and ast.unparse(inner.value).endswith(("op", "traits", "operation")))
        ):
            return True
    return False


@pytest.mark.parametrize("path", machine_modules(), ids=lambda path: path.name)
def test_the_machine_compares_no_names_of_ops(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Compare) and (path.name, ast.unparse(node)) not in OF_A_POLICY:
            assert not names_an_op(node), f"{path.name}:{node.lineno} {ast.unparse(node)}"
        if isinstance(node, ast.Match):
            assert not names_an_op(node.subject), f"{path.name}:{node.lineno}"


OF_A_POLICY = {
    ("gate.py", "name in ops.TABLE"), ("gate.py", "name not in self.policy.allowed_ops")
}  # fmt: skip
"""An owner's list of ops is a list of names."""


@pytest.mark.parametrize(
    "line", ['op.name == "torch.add"', "op.name in ops.RANDOM", "traits.name == word", 'word == "Tensor.grad"',
             "plan_call.CALL != word"]
)  # fmt: skip
def test_a_comparison_of_names_would_be_found(line):
    assert names_an_op(ast.parse(line).body[0].value)


@pytest.mark.parametrize(
    ("name", "args", "kwargs", "written"),
    [
        ("Tensor.add_", ("a", "b"), {}, ["a"]),
        ("Tensor.__iadd__", ("a", "b"), {}, ["a"]),
        ("Tensor.__invert__", ("a",), {}, []),
        ("Tensor.__setitem__", ("a", 0, "b"), {}, ["a"]),
        ("Tensor.set_", ("a", "b"), {}, ["a"]),
        ("nn.functional.relu", ("a",), {"inplace": True}, ["a"]),
        ("nn.functional.relu", (), {"input": "a", "inplace": True}, ["a"]),
        ("nn.functional.batch_norm", ("a", "mean", "var"), {}, ["mean", "var"]),
        ("nn.functional.batch_norm", ("a",), {"running_mean": "mean", "running_var": None}, ["mean", None]),
        ("nn.functional.embedding", ("i", "w"), {"max_norm": 1.0}, ["w"]),
        ("nn.functional.embedding", ("i", "w"), {}, []),
        ("torch.add", ("a", "b"), {}, []),
    ],
)
def test_traits_say_which_arguments_are_written(name, args, kwargs, written):
    assert ops.TRAITS[name].written_arguments(args, kwargs) == written

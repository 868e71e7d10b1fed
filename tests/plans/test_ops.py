"""The table: what is on it, what never is, and that the tracer and the interpreter agree on it."""

import contextlib
import hashlib
import inspect
import itertools
import re
import warnings

import pytest
import torch
from torch.overrides import (
    TorchFunctionMode,
    get_ignored_functions,
    get_overridable_functions,
    get_testing_overrides,
)
from torch.testing._internal.common_methods_invocations import op_db

from planrt.errors import OpNotAllowedError
from planrt.plans.ir import ops
from planrt.plans.ir.left_out import LEFT_OUT, reason_for
from planrt.plans.recording import torch_calls
from planrt.plans.recording.tracer import trace
from planrt.plans.running.interpreter import execute
from planrt.types import leaves, map_leaves
from tests.op_samples import samples_of

NEVER = [
    "item", "tolist", "numpy", "data_ptr", "as_strided", "as_strided_", "set_", "apply_", "map_", "map2_",
    "register_hook", "storage", "untyped_storage", "resize_", "resize_as_", "share_memory_", "pin_memory",
    "__reduce_ex__", "__setstate__", "__array__", "__bool__", "__float__", "__int__", "__dlpack__", "new",
    "load", "save", "from_file", "frombuffer", "from_numpy", "compile", "equal", "is_nonzero",
    "manual_seed", "set_num_threads", "set_default_dtype", "record_stream", "module_load", "type",
]  # fmt: skip


@pytest.mark.parametrize("name", NEVER)
@pytest.mark.parametrize("home", ["torch", "Tensor"])
def test_what_is_never_on_the_table(home, name):
    with pytest.raises(OpNotAllowedError, match=r"is not on the table"):
        ops.lookup(f"{home}.{name}")


def test_no_function_on_the_table_is_one_that_is_never_allowed():
    forbidden = {
        getattr(home, name) for home, name in itertools.product((torch, torch.Tensor), NEVER)
        if hasattr(home, name)
    }  # fmt: skip
    assert not forbidden & {f for f in ops.TABLE.values() if f.__hash__}


@pytest.mark.parametrize("name", ["os.system", "torch.hub.load", "", "__import__", "Tensor.__class__", "add"])
def test_names_are_never_resolved_by_path(name):
    with pytest.raises(OpNotAllowedError):
        ops.lookup(name)


def test_names_that_the_tracer_finds_are_on_the_table():
    for function in (
        torch.add,
        torch.Tensor.add,
        torch.nn.functional.relu,
        torch.Tensor.T.__get__,
        torch.empty,
    ):
        name = ops.name_of(function)
        assert name in ops.TABLE
    assert ops.name_of(torch.Tensor.item) is None
    assert ops.name_of([]) is None


def test_the_hash_is_over_the_sorted_names():
    names = sorted({*ops.TABLE, *ops.EAGER})
    assert hashlib.sha256("\n".join(names).encode()).hexdigest() == ops.TABLE_HASH


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("torch.empty", (64,)), ("torch.empty_like", (torch.full((64,), 5.0),)),
        ("torch.empty_strided", ((8, 8), (8, 1))), ("torch.empty_permuted", ((8, 8), (1, 0))),
        ("Tensor.new_empty", (torch.full((64,), 5.0), (64,))),
        ("Tensor.new_empty_strided", (torch.full((64,), 5.0), (8, 8), (8, 1))),
    ],
)  # fmt: skip
def test_empty_factories_give_zeros_never_old_memory(name, args, monkeypatch):
    for dirty in [torch.full((64,), 9.0) for _ in range(50)]:
        del dirty
    for kwargs in ({}, {"dtype": torch.int64}, {"requires_grad": True}):
        made = ops.lookup(name)(*args, **kwargs)
        assert not made.any()
        assert made.requires_grad == bool(kwargs.get("requires_grad"))
        assert made.is_leaf


@pytest.mark.parametrize("name", ["torch.empty_strided", "Tensor.new_empty_strided"])
def test_memory_that_strides_show_again_and_again_is_cleared_once(name):
    """It would take hours to write a zero for each entry that can be seen."""
    for dirty in [torch.full((16,), 9.0) for _ in range(50)]:
        del dirty
    given = (torch.ones(1),) if name.startswith("Tensor") else ()
    made = ops.lookup(name)(*given, (5, 2**40, 5), (3, 0, 1))
    assert made.shape == (5, 2**40, 5)
    assert not made[:, 0].any()
    assert not ops.lookup(name)(*given, (3, 4), (1, 3)).any()


def test_size_arithmetic_is_64_bit_integers_and_floats():
    assert ops.lookup("operator.floordiv")(7, 2) == 3
    assert ops.lookup("operator.truediv")(7, 2) == 3.5
    assert ops.lookup("operator.neg")(3) == -3
    for operands in [(2**62, 2), (torch.ones(1), 1), ("a", 3), ([1], 2**30), (True, 1)]:
        with pytest.raises(ValueError, match=r"operator\.mul"):
            ops.lookup("operator.mul")(*operands)


def test_assumptions_compare_sizes():
    for name, fits, fails in (("eq", (4, 4), (4, 5)), ("ne", (1, 2), (1, 1)), ("lt", (1, 1.5), (2, 2)),
                              ("le", (2, 2), (3, 2)), ("gt", (3, 2), (2, 2)), ("ge", (2, 2), (1, 2))):  # fmt: skip
        assume = ops.lookup(f"operator.assume_{name}")
        assert assume(*fits) is None
        with pytest.raises(
            ValueError, match=f"with these sizes it is {fails[0]} and {fails[1]}, .* another way"
        ):
            assume(*fails)
        for operands in [(torch.ones(1), 1), ("a", 3), (True, 1), ([1], [1])]:
            with pytest.raises(ValueError, match=rf"operator\.assume_{name} in a plan takes sizes"):
                assume(*operands)


# The review: every public function and method of torch is on the table, or left out for a reason.

HOMES = {
    "torch": torch,
    "Tensor": torch.Tensor,
    "nn.functional": torch.nn.functional,
    "nn.init": torch.nn.init,
    "linalg": torch.linalg,
    "fft": torch.fft,
    "special": torch.special,
}
LEFT_OUT_NAMES = [name for names in LEFT_OUT.values() for name in names.split()]


def function_at(name):
    """What torch calls for a name spelled as in the table (a property's getter); None where torch lacks it."""
    home, _, word = name.rpartition(".")
    # Of a module only what it holds: asked for deprecated names, torch makes them on the spot, and warns.
    found = getattr(torch.Tensor, word, None) if home == "Tensor" else vars(HOMES[home]).get(word)
    return found.__get__ if not callable(found) and hasattr(found, "__get__") else found


def is_torchs(function):
    """Whether `function`, or the property it reads, is torch's own: `TorchHook` adds methods to `torch.Tensor`."""
    getter = getattr(getattr(function, "__self__", None), "fget", None) or function
    return not (getattr(getter, "__module__", None) or "").startswith("planrt")


def overridable():
    listed = {function for functions in get_overridable_functions().values() for function in functions}
    return {function for function in listed if is_torchs(function)}


def torchs_own_list():
    """Spelled name -> function, of what torch says can be overridden, and of its public functions that it says
    cannot (most make tensors, or are settings), or forgets (in-place functions).
    """
    certain = overridable()
    # Not its constants: True and False are on that list too.
    others = {
        function for function in get_ignored_functions() | {*get_testing_overrides()} if callable(function)
    }
    listed = {}
    for home, word in [(home, word) for home, holder in HOMES.items() for word in dir(holder)]:
        name = f"{home}.{word}"
        if word.startswith("native_") and isinstance(vars(HOMES[home]).get(word), property):
            continue  # a name of 0.2 that planrt's hook gives tensors
        function = function_at(name)
        if not callable(function) or not getattr(function, "__hash__", None):
            continue
        public = not word.startswith("_") and not isinstance(function, type)
        native = home == "torch" and hasattr(torch._C._VariableFunctions, word)
        if function in certain or (public and (native or function in others)):
            listed[name] = function
    return listed


def is_reviewed(name, function):
    return ops.name_of(function) is not None or name in ops.EAGER or reason_for(name) is not None


def test_every_function_that_torch_lists_has_been_reviewed():
    listed = torchs_own_list()
    given = {
        value.__get__
        for name, value in vars(torch.Tensor).items()
        if name.startswith("native_") and isinstance(value, property)
    }  # names of 0.2, by planrt's hook
    assert overridable() - given <= {*listed.values()}, "torch lists functions of a home that HOMES lacks"
    unreviewed = sorted(name for name, function in listed.items() if not is_reviewed(name, function))
    assert not unreviewed, (
        f"torch {torch.__version__} has functions that nobody has reviewed: {' '.join(unreviewed)}. Put each into the "
        "lists of planrt/plans/ir/ops.py if it makes sense on a remote tensor, else into planrt/plans/ir/left_out.py "
        "under its reason"
    )


def test_a_name_that_nobody_reviewed_is_found(monkeypatch):
    def brand_new(input):
        """Stands for a function of a newer torch."""

    known = get_overridable_functions()
    monkeypatch.setattr(torch, "brand_new", brand_new, raising=False)
    monkeypatch.setitem(globals(), "get_overridable_functions", lambda: {**known, "newer": [brand_new]})
    with pytest.raises(AssertionError, match=r"nobody has reviewed: torch\.brand_new\. Put each"):
        test_every_function_that_torch_lists_has_been_reviewed()


def test_nothing_is_both_on_the_table_and_left_out():
    assert len(LEFT_OUT_NAMES) == len({*LEFT_OUT_NAMES}), "a name is left out for two reasons"
    assert not {*LEFT_OUT_NAMES} & {*ops.TABLE, *ops.EAGER}


def test_nothing_left_out_is_reached_by_another_name():
    on_the_table = {function for function in ops.TABLE.values() if function.__hash__}
    reached = [
        name for name in LEFT_OUT_NAMES
        if (function := function_at(name)) is not None
        and (function in on_the_table or ops.name_of(function) is not None)
    ]  # fmt: skip
    assert not reached


def test_no_function_on_the_table_is_a_class_or_takes_callables_or_storages():
    for name, function in ops.TABLE.items():
        assert not isinstance(function, type), name
        try:
            parameters = inspect.signature(function).parameters.values()
        except ValueError:  # in C++: NEVER has those to look out for
            continue
        kinds = " ".join(str(parameter.annotation) for parameter in parameters)
        assert not re.search(r"Callable|Storage|Stream|Module\b|IO\b", kinds), f"{name} takes {kinds}"


def test_every_listed_name_is_well_formed_though_this_torch_may_lack_it():
    well_formed = re.compile(rf"({'|'.join(map(re.escape, HOMES))})\.[A-Za-z_]\w*")
    assert [name for name in LEFT_OUT_NAMES if not well_formed.fullmatch(name)] == []
    assert [
        name for name in ops.TABLE
        if not well_formed.fullmatch(name) and name not in {*ops.SIZE_ARITHMETIC, *ops.ASSUMPTIONS, *ops.GRADIENTS}
    ] == []  # fmt: skip
    for reason in LEFT_OUT:
        assert re.fullmatch(r"[a-z].*[^.\s]", reason), f"{reason!r} ends up in the middle of a sentence"
    for listed in (ops._TORCH, ops._TORCH_IN_PLACE, ops._METHODS, ops._FUNCTIONAL, ops._LINALG, ops._SPECIAL):
        assert listed.split() == sorted({*listed.split()}), "sorted, each name once"


def test_the_review_agrees_with_what_recorders_and_pointers_answer_themselves():
    by_reason = {reason: {*names.split()} for reason, names in LEFT_OUT.items()}
    metadata = by_reason["it is metadata, answered without the worker"]
    answered = (
        torch_calls.METADATA
        | torch_calls.SHAPE_READS
        | torch_calls.SIZE_READS
        | torch_calls.COUNT_READS
        | {torch_calls.GRAD_FN}
    )
    present = {name: function_at(name) for name in metadata if function_at(name) is not None}
    assert {*present.values()} <= answered
    assert {name for name, function in torchs_own_list().items() if function in answered} <= (
        metadata | {"Tensor.size", "Tensor.numel"}
    )
    reads = [function_at(name) for name in by_reason["it reads values into Python: write .get() first"]]
    assert all(torch_calls.reads_values(function) for function in reads if function is not None)


def test_reasons_are_found_by_the_names_that_torch_has_for_its_functions():
    assert reason_for("Tensor.item") == "it reads values into Python: write .get() first"
    assert reason_for("functional.chain_matmul") == reason_for("torch.chain_matmul") is not None
    assert reason_for("torch.add") is reason_for("item") is reason_for("") is None


def test_random_ops_are_on_the_table():
    here = {name for name in ops.RANDOM if function_at(name) is not None}
    assert here <= {*ops.TABLE}


def test_old_names_of_operators_do_not_become_their_names():
    for word, usual in (("__rdiv__", "__rtruediv__"), ("__idiv__", "__itruediv__")):
        assert ops.name_of(getattr(torch.Tensor, word)) == f"Tensor.{usual}"
        assert ops.lookup(f"Tensor.{word}") is getattr(torch.Tensor, word)


def test_initialisers_are_ops_like_any_other():
    def initialised(x):
        return torch.nn.init.constant_(torch.empty_like(x), 2.0) * x

    plan = trace(initialised, [torch.ones(2, 3)])
    assert "nn.init.constant_" in [op.name for op in plan.ops]
    assert torch.equal(execute(plan, [torch.full((2, 3), 3.0)]), torch.full((2, 3), 6.0))


class Writes(TorchFunctionMode):
    """Notes ops that changed an argument which `written_operands` does not name."""

    def __init__(self):
        super().__init__()
        self.seen, self.unnamed, self.unversioned = set(), set(), set()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, ops.name_of(func)
        operands = [leaf for leaf in leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        before = [(operand, operand.detach().clone(), operand._version) for operand in operands]
        try:
            return func(*args, **kwargs)
        finally:
            named = {id(one) for one in ops.written_operands(name, args, kwargs)} if name else set()
            for operand, value, version in before:
                now = operand.detach()
                same = value.shape == now.shape and (
                    torch.equal(value, now) or torch.equal(value.nan_to_num(7), now.nan_to_num(7))
                )
                if name and not same:
                    self.seen.add(name)
                    if id(operand) not in named:
                        self.unnamed.add(name)
                    if operand._version == version and not ops.writes_unseen(name):
                        self.unversioned.add(name)


def test_ops_that_write_are_known():
    noted = Writes()
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for op in op_db:
            if not op.supports_dtype(torch.float32, "cpu") or op.name.startswith(("signal.", "_refs.")):
                continue
            forms = [form for form in (op.op, op.get_method(), op.get_inplace()) if form is not None]
            for sample in samples_of(op, torch.float32, 6):
                for form in forms:
                    args, kwargs = map_leaves(
                        ((sample.input, *sample.args), sample.kwargs),
                        lambda leaf: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf,
                    )
                    with noted, contextlib.suppress(Exception):  # not every form takes every sample
                        form(*args, **kwargs)
        with noted:
            mean = torch.zeros(3)
            torch.instance_norm(torch.rand(2, 3, 4), None, None, mean, mean.clone(), True, 0.1, 1e-5, False)
            torch.nn.functional.embedding(torch.tensor([0]), torch.ones(2, 4), max_norm=1.0)
    assert len(noted.seen) > 100
    assert (noted.unnamed, noted.unversioned) == (set(), set())

"""PyTorch's lists of its functions, methods and modules, on shares: what plain tensors give, or a refusal by name.

Nothing else: no other number, no tensor that is not in shares, no error from the inside. The arguments are torch's own
samples (`OpInfo`, `ModuleInfo`); names without samples are called with a few arguments that they take.
"""

from __future__ import annotations

import collections
import types

import pytest
import torch
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import module_db

from planrt.errors import SharingError, ValueRangeError
from planrt.sharing.tensors.in_process import InProcessSession
from planrt.sharing.tensors.shared import SharedTensor, share, share_module
from planrt.types import leaves, map_leaves
from tests.op_samples import samples_of

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def apart(tmp_path, monkeypatch):
    """One thread, which is faster for tensors this small, and a folder for functions that write files."""
    monkeypatch.chdir(tmp_path)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def new_session():
    """Parties whose random numbers are the same in every run."""
    return InProcessSession(2, seeds=[bytes([1] * 16), bytes([2] * 16)], own_seed=bytes(16))


MOST = 2_000
"""Elements of a sample's tensor: larger ones show nothing more."""

DRAWS = {
    "bernoulli", "rand_like", "randn_like", "randint_like", "multinomial", "dropout", "dropout1d", "dropout2d",
    "dropout3d", "alpha_dropout", "feature_alpha_dropout", "feature_dropout", "native_dropout", "rrelu",
    "multi_head_attention_forward", "scaled_dot_product_attention",
}  # fmt: skip
"""Random: the parties draw by another generator, so shapes and dtypes alone are compared here; what is drawn, in
`tests.workers.test_encrypted_draws`.
"""

OF_EQUALS = {"topk", "kthvalue", "median", "nanmedian"}
"""Which of equal entries they tell the place of is not promised: values alone are compared."""

OF_POWERS = {"pow", "float_power", "__rpow__"}
"""With an exponent in shares they reach as far as exp does."""

UNINITIALISED = {"empty_like", "new_empty", "new_empty_strided", "resize_", "resize_as_", "new"}


def tensors_to(value, change):
    return map_leaves(value, lambda leaf: change(leaf) if isinstance(leaf, torch.Tensor) else leaf)


def plain(result):
    return tuple(plain(one) for one in result) if isinstance(result, tuple | list) else result


def usable(tensor):
    return (
        tensor.layout == torch.strided and not tensor.is_quantized and not tensor.is_complex()
        and tensor.numel() <= MOST
    )  # fmt: skip


def told_apart(name, found, expected, slack):
    """What differs between a result on shares and the plain one, in words; None if they agree."""
    loose = name.rpartition(".")[2].rstrip("_") in {one.rstrip("_") for one in DRAWS | UNINITIALISED}
    ours, theirs = list(leaves(plain(found))), list(leaves(plain(expected)))
    if name.rpartition(".")[2] in OF_EQUALS:
        ours, theirs = ours[:1], theirs[:1]
    if len(ours) != len(theirs):
        return f"{len(ours)} results, not {len(theirs)}"
    for one, other in zip(ours, theirs, strict=True):
        if not isinstance(other, torch.Tensor):
            if one != other and not callable(other):
                return f"{one!r:.80} is not {other!r:.80}"
            continue
        if not isinstance(one, torch.Tensor) or one.shape != other.shape:
            return f"{type(one).__name__} {getattr(one, 'shape', '')}, not {other.shape}"
        wanted = torch.int64 if other.dtype == torch.bool and isinstance(one, SharedTensor) else other.dtype
        if one.dtype != wanted:
            return f"{one.dtype}, not {wanted}"
        values = one.get() if isinstance(one, SharedTensor) else one
        if values.shape != other.shape:
            return f"holds {values.shape}, not {other.shape}"
        finite = other.isfinite()
        if name.rpartition(".")[2] in OF_POWERS and not other.is_complex():
            finite &= other.abs() < 1e5
        if loose or other.is_complex() or not finite.any():
            continue
        off = (values.double() - other.double()).abs()[finite]
        if bool((off > slack + 0.01 * other[finite].double().abs()).any()):
            return f"off by {off.max()}"
    return None


class Walk:
    def __init__(self):
        self.done, self.wrong = collections.Counter(), []

    def compare(self, name, form, function, arguments, expected, change):
        """Calls `function` on shares; `change` makes those of its arguments that are to be in shares."""
        try:
            args, kwargs = tensors_to(arguments, change)
        except ValueRangeError:  # an argument has infinities, or too large numbers
            return
        if not any(isinstance(one, SharedTensor) for one in leaves((args, kwargs))):
            return
        torch.manual_seed(0)
        try:
            found = function(*args, **kwargs)
            apart = told_apart(name, found, expected, 0.15 if form == "gradient" else 0.03)
        except SharingError as error:
            said = str(error)
            ours = name.rpartition(".")[2].strip("_")
            if "torch." not in said and ours not in said and "has no protocol" not in said:
                self.wrong.append(f"{name} ({form}) is refused without its name: {said[:150]}")
            self.done["refused"] += 1
            return
        except BaseException as error:
            apart = f"{type(error).__name__}: {str(error)[:150]}"
        if apart is None:
            self.done["same"] += 1
        else:
            self.wrong.append(f"{name} ({form}): {apart}")


def sharing(which):
    """Returns what shares the tensors it is given: the first, or all; masks stay public."""
    session, seen = new_session(), []

    def change(tensor):
        seen.append(tensor)
        if tensor.dtype == torch.bool or (which == "first" and len(seen) > 1):
            return tensor.clone()
        return share(session, tensor.detach().clone())

    return change


def forms(op):
    yield "function", op.op
    if op.get_method() is not None:
        yield "method", op.get_method()
    if op.get_inplace() is not None:
        yield "in place", op.get_inplace()


@pytest.mark.parametrize(("dtype", "count"), [(torch.float32, 1), (torch.int64, 1)], ids=str)
def test_functions_with_samples(dtype, count):
    walk = Walk()
    for op in op_db:
        if not op.supports_dtype(dtype, "cpu") or op.name.startswith(("_refs.", "torch.ops.")):
            continue
        for sample in samples_of(op, dtype, count):
            arguments = ((sample.input, *sample.args), sample.kwargs)
            if not all(usable(leaf) for leaf in leaves(arguments) if isinstance(leaf, torch.Tensor)):
                continue
            for form, function in forms(op):
                args, kwargs = tensors_to(arguments, torch.clone)
                torch.manual_seed(0)
                try:
                    expected = tensors_to(plain(function(*args, **kwargs)), torch.detach)
                except Exception:  # this form does not take this sample, on plain tensors either
                    continue
                several = sum(isinstance(one, torch.Tensor) for one in leaves((args, kwargs))) > 1
                for which in ("first", "all") if form == "function" and several else ("all",):
                    walk.compare(op.name, f"{form}, {which}", function, arguments, expected, sharing(which))
    assert not walk.wrong, "\n".join(walk.wrong)
    assert walk.done["same"] > 400, walk.done
    assert walk.done["refused"] > 300, walk.done


def test_gradients_of_functions_with_samples():
    walk = Walk()
    for op in op_db:
        if (
            not op.supports_autograd
            or not op.supports_dtype(torch.float32, "cpu")
            or op.name.startswith("_refs.")
        ):
            continue
        for sample in samples_of(op, torch.float32, 1, requires_grad=True):
            arguments = ((sample.input, *sample.args), sample.kwargs)
            tensors = [leaf for leaf in leaves(arguments) if isinstance(leaf, torch.Tensor)]
            loose = op.name.rpartition(".")[2] in DRAWS | UNINITIALISED
            if loose or not all(usable(one) for one in tensors) or op.name.startswith("torch.ops."):
                continue
            if any(
                bool((one.double().abs() > 20).any()) for one in tensors
            ):  # products leave the range of shares
                continue

            def gradients(*args, function=op.op, **kwargs):
                given = [one for one in leaves((args, kwargs)) if getattr(one, "requires_grad", False)]
                made = [
                    one for one in leaves(plain(function(*args, **kwargs))) if getattr(one, "grad_fn", None)
                ]
                torch.stack([(one * one).sum() for one in made]).sum().backward()
                return [one.grad for one in given if one.grad is not None]

            def leaf(tensor):
                return tensor.detach().clone().requires_grad_(tensor.requires_grad)

            try:
                args, kwargs = tensors_to(arguments, leaf)
                expected = gradients(*args, **kwargs)
            except Exception:
                continue
            session = new_session()

            def secret(tensor, session=session):
                if not tensor.is_floating_point():
                    return tensor.clone()
                return share(session, tensor.detach().clone()).requires_grad_(tensor.requires_grad)

            if expected and all(bool((one.abs() < 1e4).all()) for one in expected):
                walk.compare(op.name, "gradient", gradients, arguments, expected, secret)
    assert not walk.wrong, "\n".join(walk.wrong)
    assert walk.done["same"] > 100, walk.done


# -------------------------------------------------------------------------------------------- names without samples

SPACES = {
    "torch": torch, "torch.Tensor": torch.Tensor, "torch.nn.functional": torch.nn.functional,
    "torch.special": torch.special, "torch.linalg": torch.linalg, "torch.fft": torch.fft,
}  # fmt: skip

OTHERWISE = {
    "about classes and objects": {
        "__class__", "__dir__", "__getattribute__", "__getstate__", "__hash__", "__init__", "__init_subclass__",
        "__new__", "__setattr__", "__delattr__", "__subclasshook__", "__str__", "__repr__", "__format__",
        "as_subclass", "classproperty", "vmap", "__iter__", "__sizeof__", "__setstate__", "__reduce__",
    },
    "about overrides, which plain tensors have none of": {
        "has_torch_function", "has_torch_function_unary", "has_torch_function_variadic", "handle_torch_function",
    },
    "changes how this process prints": {"set_printoptions"},
    "asks no class of tensors, and fails by itself": {"to_dlpack", "sparse_coo_tensor"},
}  # fmt: skip
"""Names that are not compared, and why."""

VALUES = torch.tensor([[0.5, 1.5], [3.0, 0.25]])
WHOLE = torch.tensor([[1, 2], [2, 3]])


def calls(values):
    """Arguments that functions may take, the first of them tensors like `values`."""
    x, y, z = values.clone(), values.clone(), values.clone()
    return [
        (x,),
        (x, y),
        (x, 1),
        (x, y, z),
        ([x, y],),
        (x, 0, 1),
        (x, [0, 1]),
        (x, torch.float64),
        (x, "cpu"),
    ]


def names():
    with_samples = {one for op in op_db for one in (op.name, *(alias.name for alias in op.aliases))}
    known = {one.rpartition(".")[2] for one in with_samples}
    left_out = set().union(*OTHERWISE.values())
    for space, where in SPACES.items():
        for name in dir(where):
            function = getattr(where, name, None)
            if str(getattr(function, "__module__", "")).startswith("planrt"):  # TorchHook's, not torch's
                continue
            hidden = name.startswith("_") and not (space == "torch.Tensor" and name.startswith("__"))
            if hidden or not callable(function) or isinstance(function, type | types.ModuleType):
                continue
            if name not in left_out and name.rstrip("_") not in known:
                yield f"{space}.{name}", function


def test_functions_without_samples():
    walk, tried = Walk(), 0
    for name, function in names():
        tried += 1
        for values in (VALUES, WHOLE):
            for arguments in calls(values)[: 9 if values is VALUES else 1]:
                torch.manual_seed(0)
                try:
                    expected = function(*tensors_to(arguments, torch.clone))
                except BaseException:
                    continue
                walk.compare(name, "called", function, (arguments, {}), expected, sharing("all"))
    assert tried > 200
    assert not walk.wrong, "\n".join(walk.wrong)
    assert walk.done["same"] > 400, walk.done
    assert walk.done["refused"] > 80, walk.done


# ---------------------------------------------------------------------------------------------------------- modules

HEAVY = {"nn.Transformer", "nn.TransformerEncoder", "nn.TransformerDecoderLayer", "nn.TransformerEncoderLayer",
         "nn.GRU", "nn.LSTM", "nn.RNN"}  # fmt: skip


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_modules(training):
    walk = Walk()
    for info in module_db:
        inputs = info.module_inputs_func(info, "cpu", torch.float32, False, training)
        for chosen in [one for one in inputs if one.forward_input is not None][
            : 1 if info.name in HEAVY else 2
        ]:
            made = chosen.constructor_input
            arguments = chosen.forward_input.args, chosen.forward_input.kwargs

            def run(*args, cls=info.module_cls, made=made, **kwargs):
                torch.manual_seed(0)
                module = cls(*made.args, **made.kwargs).train(training)
                shared = [one for one in leaves((args, kwargs)) if isinstance(one, SharedTensor)]
                if shared:
                    share_module(shared[0].session, module)
                torch.manual_seed(0)
                found = module(*args, **kwargs)
                kept = [one for one in module.buffers() if one.is_floating_point()]
                return tensors_to(plain(found), torch.detach), kept

            try:
                expected = run(
                    *tensors_to(arguments[0], torch.clone), **tensors_to(arguments[1], torch.clone)
                )
            except Exception:
                continue
            session = new_session()

            def secret(tensor, session=session):
                return share(session, tensor.detach()) if tensor.is_floating_point() else tensor.clone()

            draws = training and any(
                word in info.name for word in ("Dropout", "RReLU", "Transformer", "Multihead")
            )
            walk.compare("dropout" if draws else info.name, info.name, run, arguments, expected, secret)
    assert not walk.wrong, "\n".join(walk.wrong)
    assert walk.done["same"] > 80, walk.done

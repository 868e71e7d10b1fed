"""The table of kernels against torch: what its rules claim, tried out on torch's own samples of every function.

A rule that says "this dimension becomes that one" is wrong if a change in one slice of the argument shows anywhere
but in the one place of the result that the rule says. A link that is missing is wrong if anything shows at all.
"""

import collections
import itertools
import warnings

import pytest
import torch
from torch.testing._internal.common_methods_invocations import op_db

from planrt.plans.analysis.flow import Info
from planrt.plans.analysis.kernels import AGGREGATES, RULES, VIEWS
from planrt.plans.analysis.rows import NO_AGGREGATE, keep
from planrt.plans.analysis.tracker import Tracker
from planrt.types import leaves, map_leaves
from tests.op_samples import samples_of

SAMPLES = 2
LARGEST = 400  # entries of a sample's tensors

READS_OR_INVENTS = {
    "empty_like",
    "new_empty",
    "new_empty_strided",
    "empty",
    "empty_strided",
    "empty_permuted",
    "resize_",
}
"""Functions whose results are other bytes at every call."""


def with_gradients(function):
    """`function`, and the gradients of a fixed sum of its results for all arguments that require them."""

    def run(*args, **kwargs):
        result = function(*args, **kwargs)
        made = [leaf for leaf in leaves(plain(result)) if isinstance(leaf, torch.Tensor)]
        wanted = [
            leaf for leaf in leaves((args, kwargs)) if isinstance(leaf, torch.Tensor) and leaf.requires_grad
        ]
        total = None
        for one in made:
            if one.requires_grad and one.is_floating_point():
                weights = torch.arange(one.numel(), device=one.device, dtype=one.dtype).view(one.shape)
                part = (one * (1 + weights.cos() / 2)).sum()
                total = part if total is None else total + part
        if total is None or not wanted:
            return made
        return made + [
            one for one in torch.autograd.grad(total, wanted, allow_unused=True) if one is not None
        ]

    return run


def plain(result):
    return tuple(plain(part) for part in result) if isinstance(result, tuple | list) else result


def observe(function, args, kwargs):
    """The traces of every result for every dimension of every argument: {(argument, dimension): trace}."""
    tracker, sources = Tracker(), []

    def twin(leaf):
        if not isinstance(leaf, torch.Tensor):
            return "meta" if isinstance(leaf, torch.device) else leaf
        made = torch.empty_strided(
            leaf.shape, leaf.stride(), dtype=leaf.dtype, device="meta", requires_grad=leaf.requires_grad
        )
        first = len(sources) * 100
        rows = {first + dim: keep(dim, size) for dim, size in enumerate(leaf.shape)}
        tracker.register(made, Info(1 << len(sources), 0, rows))
        sources.append(leaf)
        return made

    args, kwargs = map_leaves((args, kwargs), twin)
    with tracker:
        results = function(*args, **kwargs)
    return [(tracker.info(one).sources, tracker.info(one).rows) for one in results], sources, tracker.unknown


def changed(function, args, kwargs, which, dim, index):
    """The results with one slice of one argument changed a little."""
    count = itertools.count()

    def other(leaf):
        if not isinstance(leaf, torch.Tensor):
            return leaf
        made = leaf.detach().clone()
        if next(count) == which:
            made.select(dim, index).mul_(1.001).add_(1e-4)
        return made.requires_grad_(leaf.requires_grad)

    args, kwargs = map_leaves((args, kwargs), other)
    torch.default_generator.manual_seed(0)  # torch.manual_seed walks the stack, for GPUs that wake up later
    return [one.detach() for one in function(*args, **kwargs)]


def positions(axis, shape):
    """Where along the axis each entry of a result lies."""
    place = torch.zeros(tuple(shape), dtype=torch.int64)
    for digit in axis.digits:
        sizes = [1] * len(shape)
        sizes[digit.dim] = -1
        along = torch.arange(shape[digit.dim]).view(sizes)
        place += (along // digit.inner % digit.size) * digit.weight
    return place


def contradiction(trace, links, which, touched):
    """What is wrong with a claim, given for each slice which entries of the result it touched."""
    if not links >> which & 1:
        return "independent, but touched" if touched.any() else None
    if trace.lost or trace.least != NO_AGGREGATE or len(trace.axes) != 1:
        return None
    (axis,) = trace.axes
    if axis.done != 1:
        return None
    where = positions(axis, touched.shape[1:])
    homes = collections.defaultdict(set)
    for index in range(len(touched)):
        for place in set(where[touched[index]].tolist()):
            homes[place].add(index)
    if any(len(indices) > 1 for indices in homes.values()):
        return "two slices at one place"
    if len({next(iter(indices)) for indices in homes.values()}) != len(homes):
        return "one slice at two places"
    return None


def attempt(name, function, sample, done, wrong):
    args, kwargs = (sample.input, *sample.args), sample.kwargs
    tensors = [leaf for leaf in leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    if any(one.layout != torch.strided or one.numel() > LARGEST for one in tensors):
        return
    try:
        found, sources, unknown = observe(function, args, kwargs)
        before = changed(function, args, kwargs, -1, 0, 0)
    except Exception:  # needs values, or is no function for this sample
        done["not on meta"] += 1
        return
    done["unknown kernels"] += bool(unknown)
    for which, tensor in enumerate(sources):
        if not tensor.is_floating_point():
            continue
        for dim, size in enumerate(tensor.shape):
            if not 1 < size <= 12:
                continue
            tried = sorted({0, 1, size - 1})
            after = [changed(function, args, kwargs, which, dim, index) for index in tried]
            for place, ((links, rows), was) in enumerate(zip(found, before, strict=True)):
                if any(one[place].shape != was.shape for one in after):
                    continue
                slack = 1e-9 * (1 + was.double().abs().nan_to_num(0, 0, 0).max()) if was.numel() else 0
                touched = torch.stack(
                    [
                        ~torch.isclose(one[place], was, rtol=0, atol=float(slack), equal_nan=True)
                        for one in after
                    ]
                )
                done["claims"] += 1
                error = contradiction(rows.get(which * 100 + dim), links, which, touched)
                if error:
                    wrong.append(f"{name}: result {place}, argument {which}, dimension {dim}: {error}")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("part", range(4))
def test_no_claim_is_contradicted_by_torchs_samples(part):
    done, wrong = collections.Counter(), []
    torch.manual_seed(0)
    for op in sorted(op_db, key=lambda op: op.full_name)[part::4]:
        if not op.supports_dtype(torch.float64, "cpu") or op.name in READS_OR_INVENTS:
            continue
        samples = samples_of(op, torch.float64, SAMPLES, requires_grad=op.supports_autograd)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for sample in samples:
                attempt(op.full_name, with_gradients(op.op), sample, done, wrong)
    assert not wrong, "\n".join(wrong)
    assert done["claims"] > 500, done


def test_the_table_names_kernels_that_torch_has():
    missing = [
        name
        for name in RULES
        if not hasattr(torch.ops.aten, name) and not hasattr(torch.ops.aten, f"{name}_")
    ]
    assert missing == []
    assert not [name for name in VIEWS if not hasattr(torch.ops.aten, name)]


def test_the_kinds_of_aggregates_are_those_that_policies_know():
    x = torch.rand(6, 4)
    kinds = set()
    for function in (
        lambda x: x.sum(0),
        lambda x: x.mean(0),
        lambda x: x.var(0),
        lambda x: x.std(0),
        lambda x: x.logsumexp(0),
        lambda x: (x > 1).count_nonzero(0),
        lambda x: x.norm(dim=0),
        lambda x: x.t() @ x,
        lambda x: torch.conv1d(x.t().view(1, 4, 6).transpose(1, 2), torch.ones(2, 6, 3)),
        lambda x: torch.nn.functional.mse_loss(x, x * 2),
        lambda x: torch.nn.functional.batch_norm(x, None, None, training=True),
        lambda x: torch.native_layer_norm(x.t(), (6,), None, None, 1e-5)[1],
    ):
        results, _, _ = observe(lambda x, f=function: [f(x)], (x,), {})
        kinds |= results[0][1][0].kinds
    assert kinds == AGGREGATES

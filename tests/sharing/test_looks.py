"""Programs that are given other public values need what they needed for values of the same sizes, and give theirs."""

import random as rng

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from planrt.errors import SharingError
from planrt.sharing.kernels.parts import Context, Share, digest
from planrt.sharing.kernels.shapes import are_mixed, flags_of
from planrt.sharing.kernels.sizes import Drawn, Varying, size_of
from planrt.sharing.programs import looks, needs
from planrt.sharing.programs.calls import Call, Program
from planrt.sharing.programs.lowering import Looks, lower
from planrt.sharing.rounds import new_parties, run_together
from planrt.sharing.tensors.in_process import InProcessSession
from planrt.sharing.tensors.shared import share, share_module
from planrt.types import Ref

SCALE = 2**16


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def classes(seed):
    return torch.randint(0, 4, (6,), generator=torch.Generator().manual_seed(seed))


def batch(seed):
    """Of one size: its largest entry is the same in each."""
    values = random(6, 5, seed=seed).clamp(-3, 3)
    values[seed % 6, seed % 5] = 3.5
    return values


def flags(seed):
    return random(6, 5, seed=seed) > 0


def network(x, weight, bias):
    return F.relu(F.linear(x, weight, bias))


def gradients_of(loss):
    def function(*args):
        found = loss(*args)
        found.backward()
        return [found, *[one.grad for one in args if isinstance(one, torch.Tensor) and one.requires_grad]]

    return function


def shared(*shape, grad=False, dtype=torch.float32):
    return Looks(shape, dtype, grad)


def image(seed):
    values = random(2, 3, 5, 5, seed=seed).clamp(-3, 3)
    values.view(-1)[seed] = 3.5
    return values


def filters(seed):
    values = random(2, 3, 3, 3, seed=seed)
    return values / values.abs().max()


W, B = shared(4, 5, grad=True), shared(4, grad=True)
STEPS = {
    "a linear layer": (gradients_of(lambda x, w, b: network(x, w, b).sum()), batch, [W, B]),
    "a fixed layer": (lambda w, x: network(x, w, torch.ones(6)), batch, [shared(6, 5)]),
    "mean square": (
        gradients_of(lambda y, w, x: F.mse_loss(x @ w, y)), batch, [shared(5, 5, grad=True), shared(6, 5)],
    ),
    "classes": (
        gradients_of(lambda y, w, x: F.cross_entropy(x @ w, y)), classes, [shared(5, 4, grad=True), shared(6, 5)],
    ),
    "classes of pixels": (
        gradients_of(lambda y, x: F.cross_entropy(x, y.reshape(2, 3))), classes, [shared(2, 4, 3, grad=True)],
    ),
    "likelihoods": (
        gradients_of(lambda y, x: F.binary_cross_entropy_with_logits(x, y.float())), flags, [shared(6, 5, grad=True)],
    ),
    "probabilities": (
        gradients_of(lambda y, x: F.binary_cross_entropy(x.sigmoid(), y.float())), flags, [shared(6, 5, grad=True)],
    ),
    "hidden entries": (lambda y, x: x.masked_fill(y, -4.0).softmax(1), flags, [shared(6, 5)]),
    "chosen entries": (lambda y, x: torch.where(y, x, x * 2), flags, [shared(6, 5)]),
    "a mask": (lambda y, x: (x.relu() * y).sum(), lambda seed: flags(seed).float(), [shared(6, 5)]),
    "rows": (gradients_of(lambda y, x: x[y].relu().sum()), classes, [shared(6, 5, grad=True)]),
    "rows and columns": (lambda y, x: x[y, y.flip(0)] * 2, classes, [shared(6, 5)]),
    "words": (gradients_of(lambda y, w: F.embedding(y, w).tanh().sum()), classes, [shared(4, 5, grad=True)]),
    "gathered": (lambda y, x: x.gather(1, y[:, None]), classes, [shared(6, 5)]),
    "compared": (lambda y, x: (x > y).float() + (x - 1 == y), batch, [shared(6, 5)]),
    "divided": (lambda y, x: x.relu() / y.abs().clamp(min=0.25), batch, [shared(6, 5)]),
    "convolution": (
        gradients_of(lambda y, w, b: F.conv2d(y, w, b, padding=1).relu().sum()), image,
        [shared(2, 3, 3, 3, grad=True), shared(2, grad=True)],
    ),
    "a fixed convolution": (
        gradients_of(lambda w, x: F.conv2d(x, w).relu().sum()), filters, [shared(2, 3, 5, 5, grad=True)],
    ),
}  # fmt: skip


def operands_of(lowered, given):
    """Those of a dry run: shares of zeros, and what all know."""
    made = []
    for one in lowered.operands:
        if isinstance(one, torch.Tensor):
            made.append(one)
        else:
            scale = SCALE if given[one].dtype.is_floating_point else 1
            made.append(Share(torch.zeros(given[one].shape, dtype=torch.int64), scale))
    return made


def fresh_needs(program, operands):
    found, values = needs.dry_run(program, operands, party=1, count=2, scale=SCALE)
    assert not any(type(one).__name__ == "Failed" for one in values)
    return found.requests, found.taken, found.sent


@pytest.mark.parametrize("name", STEPS)
def test_another_batch_of_the_same_size_needs_the_same(name):
    function, values, others = STEPS[name]
    keys, found = set(), []
    for seed in range(5):
        lowered = lower(function, [values(seed), *others], scale=SCALE)
        program = lowered.program if not found else found[0][0]  # equal ones are one in a session
        assert lowered.program.text == program.text
        operands = operands_of(lowered, others)
        found.append((program, fresh_needs(program, operands)))
        keys.add(needs.alike(program, operands_of(lowered, others), party=1, count=2, scale=SCALE))
    assert len(keys) == 1
    assert all(one[1] == found[0][1] for one in found)


SIZES = [
    ("fractions and whole numbers", lambda x, y: x * y, torch.full((3,), 0.7), torch.full((3,), 2.0)),
    ("other magnitudes", lambda x, y: x * y, torch.full((3,), 0.7), torch.full((3,), 700.1)),
    ("how many classes count", F.cross_entropy, torch.tensor([0, 1, 2]), torch.tensor([0, 1, -100])),
    ("exponents", lambda x, y: x**y, torch.full((3, 1), 2.0), torch.full((3, 1), 3.0)),
    ("rows of a mask", lambda x, y: x[y], torch.tensor([True, True, False]), torch.tensor([True, False, False])),
    ("bounds", lambda x, y: torch.maximum(x, y), torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 2.0, 3.5])),
]  # fmt: skip


@pytest.mark.parametrize(
    ("function", "one", "other"), [one[1:] for one in SIZES], ids=[one[0] for one in SIZES]
)
def test_what_a_run_does_depend_on_is_told_apart(function, one, other):
    given = [shared(3, 3)]
    keys = set()
    program = lower(function, [given[0], one], scale=SCALE).program
    for values in (one, other):
        lowered = lower(function, [given[0], values], scale=SCALE)
        keys.add(needs.alike(program, operands_of(lowered, given), party=1, count=2, scale=SCALE))
    assert len(keys) == 2


def test_what_leaves_the_range_is_told_apart_from_what_does_not():
    program = Program.of(2, [Call("mul", (Ref(0), Ref(1)), {}, Ref(2))])

    def key(values, scale):
        operands = [Share(torch.zeros(len(values), dtype=torch.int64), scale), values]
        return needs.alike(program, operands, party=1, count=2, scale=scale)

    one, other = torch.tensor([0.3, 0.7, 0.9]), torch.tensor([0.4, 0.7, 0.9])
    assert key(one, 2**16) == key(other, 2**16)
    assert key(one, 1000) == key(other, 1000)
    assert key(torch.tensor([4.55e15]), 2**16) == key(torch.tensor([4.7e15]), 2**16)
    assert key(torch.tensor([4.55e15]), 1000) != key(
        torch.tensor([4.7e15]), 1000
    )  # which is beyond the range
    bad = torch.tensor([0.4, 0.7, float("nan")])
    assert key(bad, 2**16) != key(torch.tensor([0.3, 0.7, float("nan")]), 2**16)


# ------------------------------------------------------------------------------------------------- numbers that vary

PLACES = {
    "mul": lambda number: Call("mul", (Ref(0), number), {}, Ref(3)),
    "div": lambda number: Call("div", (Ref(0), number), {}, Ref(3)),
    "add": lambda number: Call("add", (Ref(0), number), {}, Ref(3)),
    "sub": lambda number: Call("sub", (Ref(0), number), {}, Ref(3)),
    "add alpha": lambda number: Call("add", (Ref(0), Ref(1)), {"alpha": number}, Ref(3)),
    "sub alpha": lambda number: Call("sub", (Ref(0), Ref(1)), {"alpha": number}, Ref(3)),
    "addcdiv": lambda number: Call("addcdiv", (Ref(0), Ref(1), Ref(1)), {"value": number}, Ref(3)),
    "lerp": lambda number: Call("lerp", (Ref(0), Ref(1), number), {}, Ref(3)),
}
KINDS = ["plain", "a product", "a mean", "a mean of squares", "whole numbers", "the ones of gradients"]


def value_of(kind, base):
    """Values of that kind, their scale in a session at the scale `base`, and what else there is to say."""
    values = random(4, seed=1).abs() + 0.5
    if kind == "whole numbers":
        return values.ceil(), 1, {}
    if kind == "the ones of gradients":
        return torch.ones(4), base, {"known": torch.ones(4, dtype=torch.float64)}
    scales = {"plain": base, "a product": base**2}
    scales["a mean"], scales["a mean of squares"] = (
        (2**26, 2**42) if base == SCALE else (base << 17, base**2 << 23)
    )
    scale = scales[kind]
    return values, scale, {"fine": kind.startswith("a mean")}


def run_with(call, kind, number, base):
    """The result of a call, and what the last party asked the dealer for."""
    values, scale, about = value_of(kind, base)
    second = random(4, seed=2).abs() + 0.5
    parties = new_parties(2)
    program = Program.of(3, [call(Ref(2)), Call("mul", (Ref(3), Ref(3)), {}, Ref(4))])
    requests = parties[1].supply.record = []

    def operand(party, values, scale, known=None, fine=False):
        made = Share(party.public((values.double() * scale).round().long()), scale, known=known)
        made.fine = fine
        return made

    def run(party):
        given = [operand(party, values, scale, **about), operand(party, second, base), number]
        return needs.run_program(Context(party, base), program, given)

    one, other = run_together([run(party) for party in parties])
    found = (one[3].part + other[3].part).double() / one[3].scale
    plain = {0: values.double(), 1: second.double(), 2: float(number)}
    call_ = call(Ref(2))
    args = [plain[ref.index] if isinstance(ref, Ref) else ref for ref in call_.args]
    kwargs = {name: plain[ref.index] for name, ref in call_.kwargs.items()}
    return found, getattr(torch, call_.name)(*args, **kwargs), requests


@pytest.mark.parametrize("base", [SCALE, 1000])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", PLACES)
def test_a_number_that_varies_counts_by_its_exponent_alone_and_is_right(place, kind, base):
    draw = rng.Random(f"{place} {kind}")
    for exponent in (-9, 0, 3):
        seen = []
        for _ in range(2):
            number = Varying(draw.choice([-1, 1]) * draw.uniform(0.501, 0.999) * 2.0**exponent)
            found, want, requests = run_with(PLACES[place], kind, number, base)
            units = 3 if place != "addcdiv" else 12
            assert (found - want).abs().max() < units / base * max(1, abs(number), want.abs().max().item())
            seen.append(requests)
        assert seen[0] == seen[1]


def steps(session, optimizer, schedule, count=12):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4))
    if session:
        model = share_module(session, model)
    optimizer = optimizer(model.parameters())
    schedule = schedule(optimizer)
    losses = []
    for step in range(count):
        x, y = batch(step), classes(step)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.get() if session else loss.detach())
    return torch.stack(losses), [one.get() if session else one.detach() for one in model.parameters()]


TRAINING = {
    "Adam": (
        lambda p: torch.optim.Adam(p, lr=0.05),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.05, total_steps=12),
    ),
    "AdamW": (
        lambda p: torch.optim.AdamW(p, lr=0.05),
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 12),
    ),
    "SGD": (
        lambda p: torch.optim.SGD(p, lr=0.3, momentum=0.9, weight_decay=0.01),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=12),
    ),
    "RMSprop": (
        lambda p: torch.optim.RMSprop(p, lr=0.02),
        lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.93),
    ),
}


@pytest.mark.parametrize("name", TRAINING)
def test_training_with_a_schedule_is_one_program_after_a_few_steps_and_as_in_pytorch(name):
    optimizer, schedule = TRAINING[name]
    session = InProcessSession(2, at_once=10_000)
    ran = []
    run = session._run_program
    session._run_program = lambda program, *rest: (ran.append(program), run(program, *rest))
    losses, weights = steps(session, optimizer, schedule)
    plain_losses, plain_weights = steps(None, optimizer, schedule)
    assert (losses - plain_losses).abs().max() < 5e-3
    for one, other in zip(weights, plain_weights, strict=True):
        assert (one - other).abs().max() < 2e-2
    assert len({id(one) for one in ran[5:12]}) == 1, "of the steps from the fifth on"


def test_one_number_that_changes_leaves_the_others_in_the_program():
    session = InProcessSession(2, at_once=10_000)
    ran = []
    run = session._run_program
    session._run_program = lambda *args: (ran.append(args[:2]), run(*args))
    x = share(session, random(3))
    for number in (0.3, 0.7, 0.9, 0.4, 0.5, 2.0, 0.3):
        y = x * number + 0.1
        assert (y.get() - (random(3) * number + 0.1)).abs().max() < 1e-3
    programs = [one for one, _ in ran]
    assert programs[1] is programs[2] is programs[3] is programs[6]
    assert [one[1] for one in (ran[1][1], ran[2][1], ran[6][1])] == [0.7, 0.9, 0.3]
    assert (
        programs[0].operands == programs[4].operands == programs[5].operands == 1
    )  # 1 / 2 and 2 are taken exactly


@pytest.mark.parametrize("number", [float("inf"), float("nan"), 1e300, -1.7e308])
def test_numbers_beyond_the_range_fail_as_they_did_whatever_came_before(number):
    session = InProcessSession(2, at_once=10_000)
    x = share(session, random(3))
    for one in (0.3, 0.7):
        (x * one).get()
    with pytest.raises(SharingError):
        (x * number).get()
    assert ((x * 0.9).get() - random(3) * 0.9).abs().max() < 1e-3


def test_dropout_draws_anew_in_each_step_of_one_program():
    def masks(session, count):
        torch.manual_seed(5)
        x = share(session, torch.ones(200))
        return [F.dropout(x * 1, 0.5).get() for _ in range(count)]

    session = InProcessSession(2, at_once=10_000)
    ran = []
    run = session._run_program
    session._run_program = lambda program, *rest: (ran.append(program), run(program, *rest))
    found = masks(session, 6)
    assert len({id(one) for one in ran[1:]}) == 1
    assert all(set(one.round().tolist()) == {0.0, 2.0} for one in found)
    assert len({tuple(one.tolist()) for one in found}) == 6
    apart = InProcessSession(2)  # where each call is a program, with its seed
    assert all((one - other).abs().max() < 1e-3 for one, other in zip(found, masks(apart, 6), strict=True))


@pytest.mark.parametrize("size", [1, 2, 3])
def test_dropout_of_a_few_entries_of_which_all_or_none_stay(size):
    session = InProcessSession(2, at_once=10_000)
    x = share(session, torch.ones(size))
    seen = {tuple((F.dropout(x * 3, 0.5) * x).get().round().tolist()) for _ in range(40)}
    assert (0.0,) * size in seen
    assert (6.0,) * size in seen
    assert all(set(one) <= {0.0, 6.0} for one in seen)


def test_seeds_whose_flags_are_mixed_need_the_same():
    program = Program.of(2, [
        Call("bernoulli", (Ref(0), 0.7), {"seed": Ref(1)}, Ref(2)),
        Call("div", (Ref(2), 0.7), {}, Ref(3)),
        Call("mul", (Ref(0), Ref(3)), {}, Ref(4)),
        Call("mul", (Ref(4), Ref(0)), {}, Ref(5)),
    ])  # fmt: skip
    seeds = [seed for seed in range(40) if are_mixed(flags_of(seed, (6,), 0.7))]
    assert len(seeds) > 20
    found, keys = [], set()
    for seed in seeds:
        operands = [Share(torch.zeros(6, dtype=torch.int64), SCALE), Drawn(seed)]
        looks.check_numbers(program, operands)
        keys.add(needs.alike(program, operands, party=1, count=2, scale=SCALE))
        found.append(fresh_needs(program, operands))
    assert len(keys) == 1
    assert all(one == found[0] for one in found)
    one_sided = next(seed for seed in range(1000) if not are_mixed(flags_of(seed, (6,), 0.7)))
    _, values = needs.dry_run(
        program,
        [Share(torch.zeros(6, dtype=torch.int64), SCALE), Drawn(one_sided)],
        party=1,
        count=2,
        scale=SCALE,
    )
    assert "flags that are all the same" in str(values[2].error)


def test_numbers_are_operands_where_kernels_take_them_only():
    operands = [Share(torch.zeros(3, dtype=torch.int64), SCALE), Varying(0.3)]
    for call in (
        Call("pow", (Ref(0), Ref(1)), {}, Ref(2)),
        Call("sum", (Ref(0), [Ref(1)]), {}, Ref(2)),
        Call("mul", (Ref(1), Ref(0)), {}, Ref(2)),
        Call("add", (Ref(0), 2), {"alpha": Ref(1)}, Ref(2)),
        Call("mul", (Ref(1), 2), {}, None, True),
    ):
        with pytest.raises(SharingError, match="write it in the call"):
            looks.check_numbers(Program.of(2, [call]), operands)
    good = Program.of(2, [Call("mul", (Ref(0), Ref(1)), {}, Ref(2))])
    looks.check_numbers(good, operands)
    with pytest.raises(SharingError, match="write it in the call"):
        looks.check_numbers(good, [operands[0], Drawn(7)])
    draw = Program.of(2, [Call("bernoulli", (Ref(0), 0.5), {"seed": Ref(1)}, Ref(2))])
    with pytest.raises(SharingError, match="write it in the call"):
        looks.check_numbers(draw, operands)
    with pytest.raises(SharingError, match="write it in the call"):
        looks.check_numbers(good, [operands[0], Varying(0.5)])


def test_a_size_is_a_power_of_two_above_all_values():
    assert size_of(torch.tensor([3.0, -200.0])) == size_of(torch.tensor([1.0, 255.0])) == (None, 256.0)
    assert size_of(256) == (None, 512.0)
    assert size_of(Varying(0.3)).bound == 0.5
    assert size_of(1.7e308).bound == size_of(Varying(-1.7e308)).bound == float("inf")
    assert size_of(torch.tensor(float("inf"))).bound == float("inf")


@pytest.mark.parametrize(
    "values", [torch.arange(8.0)[3::8], torch.ones(()).expand(1), torch.zeros(2, 1, 3)[:, :, ::3]]
)
def test_what_tells_tensors_apart_takes_any_strides(values):
    assert digest(values) == digest(values.clone(memory_format=torch.contiguous_format)) == digest(values + 0)

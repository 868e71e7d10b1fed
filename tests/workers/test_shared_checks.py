"""`plan.check` on arguments in shares: costs as a run has them, and intervals that hold what comes out."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import planrt as sy
from planrt.errors import OptionError, PlanArgumentError, SharingError, ValueRangeError
from planrt.sharing.kernels import Share
from planrt.sharing.programs.lowering import Looks, lower
from planrt.sharing.programs.needs import dry_run, widest_scales
from planrt.sharing.programs.preflight import preflight
from planrt.sharing.programs.ranges import Ranges, shape_of
from planrt.sharing.tensors.shared import share
from planrt.workers.shares.session import sharing_session

sy.TorchHook(torch)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def session(make_worker):
    return sharing_session([make_worker("bob"), make_worker("alice")], make_worker("james"))


@sy.func2plan(args_shape=[(4, 6), (6, 3)])
def product(x, w):
    return (x @ w).relu() * 2 + 1


def test_a_check_says_what_a_call_costs_and_sends_nothing(session):
    x, w = share(session, random(4, 6)), share(session, random(6, 3))
    session.traffic()
    sent = [one.traffic.messages_sent for one in session._workers]
    found = product.check(inputs=[x, w])
    assert [one.traffic.messages_sent for one in session._workers] == sent
    assert (found.calls > 2, found.parties, found.bounded, found.overflows) == (True, 2, False, ())
    product(x, w).get()
    traffic = session.traffic()
    assert {one.rounds for one in traffic.values()} == {found.rounds}
    assert {one.sent for one in traffic.values()} == {found.bytes_sent}
    assert traffic["alice"].dealt == found.bytes_dealt
    assert f"rounds              {found.rounds}" in str(found)


def test_ranges(session):
    x, w = share(session, random(4, 6)), share(session, random(6, 3))
    fine = product.check(inputs=[x, w], bounds={"x": (-10, 10), "w": (-1, 1)})
    assert fine.raise_for_overflows() is fine
    assert "all values stay in it" in str(fine)
    may = product.check(inputs=[x, w], bounds={"x": (-1e6, 1e6), "w": (-1e3, 1e3)})
    assert [one.name for one in may.overflows] == ["mm"]
    assert not may.overflows[0].certain
    assert "may leave the range, which ends at 1.074e+09" in str(may)
    with pytest.raises(ValueRangeError, match="mm.*from -6e.09 to 6e.09.*take fewer digits"):
        may.raise_for_overflows()
    with pytest.raises(ValueRangeError, match="mm.*leaves the range"):
        product.check(inputs=[x, w], bounds={"x": (1e6, 2e6), "w": (1e3, 2e3)})
    half = product.check(inputs=[x, w], bounds={"x": (-1, 1)})  # nothing is known of w
    assert half.overflows == ()


def test_a_model_with_its_state_in_bounds(session):
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(2 * 36, 3), nn.Sigmoid())
    plan = sy.func2plan(args_shape=[(4, 1, 8, 8)])(model)
    x = share(session, random(4, 1, 8, 8))
    with torch.no_grad():
        found = plan.check(inputs=[x], bounds={"input": (0, 1)})
        assert found.unknown == ()
        assert found.raise_for_overflows().rounds > 5
        worse = plan.check(inputs=[x], bounds={"input": (0, 1e12)})
        assert worse.overflows


@pytest.mark.parametrize(
    ("given", "kind", "says"),
    [
        ({"bounds": {"v": (0, 1)}}, OptionError, "'v' is no argument in shares; there are x, w"),
        ({"bounds": {"x": 3}}, OptionError, r"x has a least and a greatest value, \(low, high\)"),
        ({"bounds": {"x": (2, 1)}}, OptionError, "from 2 to 1, which is no range"),
        ({"bounds": {"x": (0, float("inf"))}}, OptionError, "no range"),
        ({"bounds": {"x": (0, float("nan"))}}, OptionError, "no range"),
    ],
)
def test_wrong_bounds(session, given, kind, says):
    x, w = share(session, random(4, 6)), share(session, random(6, 3))
    with pytest.raises(kind, match=says):
        product.check(inputs=[x, w], **given)


def test_wrong_arguments(session):
    x = share(session, random(4, 6))
    with pytest.raises(OptionError, match="bounds are of arguments in shares"):
        product.check(inputs=[random(4, 6), random(6, 3)], bounds={"x": (0, 1)})
    with pytest.raises(PlanArgumentError, match="takes 2 inputs"):
        product.check(inputs=[x])
    with pytest.raises(PlanArgumentError, match="w of plan 'product'"):
        product.check(inputs=[x, x])
    other = sharing_session(session._workers, session._dealer, scale=1000)
    with pytest.raises(SharingError, match="different parties, precisions or providers"):
        product.check(inputs=[x, share(other, random(6, 3))])


FUNCTIONS = {
    "arithmetic": lambda x, y: (x + 2 * y - 3, 1 - x, x * y, x * x, -x / 4, y.neg() * 0.5),
    "products": lambda x, y: (x @ y.t(), F.linear(x, y[:4], y[0, :4]), torch.bmm(x[None], y.t()[None])),
    "sums": lambda x, y: (x.sum(), y.sum(1), x.mean(), x.mean(0), y.cumsum(1)),
    "curves": lambda x, y: (x.relu(), y.sigmoid(), x.tanh(), y.exp(), x.abs(), F.gelu(x), F.softplus(y), F.silu(x)),
    "choices": lambda x, y: (
        torch.where(x > 0, x, y), torch.maximum(x, y), torch.cat([x, y]), x.amax(1), x.clamp(-0.5, 0.7), x.argmax(1),
    ),
    "windows": lambda x, y: (
        F.max_pool2d(x[None, None], 2), F.avg_pool2d(y[None, None], 2), F.conv2d(x[None, None], y[None, None, :2, :2]),
        F.conv2d(x[None, None], y[None, None, :2, :2], padding=1),
    ),
    "powers": lambda x, y: (x**2, y**3, x.softmax(1), F.mse_loss(x, y), F.pad(x, (1, 1)), x.masked_fill(y > 0, 7.0)),
    "places": lambda x, y: (x[1:], x[:, [0, 2]], y.t().reshape(-1), torch.stack([x, y]), x.flip(0), x.repeat(2, 1)),
}  # fmt: skip


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("bound", [(-3.0, 3.0), (0.5, 2.0), (-4.0, -1.0)])
def test_intervals_hold_what_comes_out(name, bound):
    low, high = bound
    looks = [Looks((5, 5), torch.float32)] * 2
    lowered = lower(FUNCTIONS[name], looks, scale=2**16)
    looks = [[one if isinstance(one, torch.Tensor) else Share(torch.zeros(5, 5, dtype=torch.int64), 2**16)
              for one in lowered.operands] for _ in range(2)]  # fmt: skip
    _, values = dry_run(lowered.program, looks[0], party=1, count=2, scale=2**16)
    scales = widest_scales(lowered.program, looks[1], scale=2**16)
    bounds = [bound if not isinstance(one, torch.Tensor) else (float(one.min()), float(one.max()))
              for one in lowered.operands]  # fmt: skip
    ranges = Ranges(lowered.program, bounds, [shape_of(one) for one in values], scales)
    intervals = [ranges.intervals[one.number] for one in lowered.results]
    assert None not in intervals or name in ("powers",)
    generator = torch.Generator().manual_seed(1)
    for trial in range(20):
        x, y = (low + (high - low) * torch.rand(5, 5, generator=generator) for _ in range(2))
        if trial == 0:
            x, y = torch.full((5, 5), high), torch.full((5, 5), high)
        if trial == 1:
            x, y = torch.full((5, 5), low), torch.full((5, 5), high)
        for interval, result in zip(intervals, FUNCTIONS[name](x, y), strict=True):
            if interval is not None:
                assert interval[0] - 1e-3 <= result.min()
                assert result.max() <= interval[1] + 1e-3


def test_what_changes_in_place_is_followed():
    def function(x):
        y = x * 1
        view = y[0]
        view.mul_(100)
        return y * 100

    found = preflight(function, [Looks((2, 2), torch.float32)], parties=2, scale=2**16, bounds=[(0, 1e11)])
    (one,) = found.overflows  # of the product at the end: the one in place changed y
    assert (one.name, one.high) == ("mul", 1e15)

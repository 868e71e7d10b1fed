"""Operations that are written with others, by their names in torch: values and gradients as on plain tensors."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from planrt.errors import SharingError
from planrt.sharing.tensors.in_process import InProcessSession
from planrt.sharing.tensors.shared import SharedTensor, share, share_module
from tests.sharing.test_kernels import UNIT, random

IMAGES = random(2, 4, 6, 6)
SLOPES = torch.tensor([0.2, 0.3, 0.1, 0.5])
SIGNS = torch.sign(random(4, 6, 6, seed=4))


def _around(x):
    return F.fold(F.unfold(x, 2, padding=1, stride=2), (6, 6), 2, padding=1, stride=2)


def _pair(function):
    return lambda x: torch.stack(function(x))


REWRITTEN = {
    "elu": (10, F.elu),
    "elu, alpha": (40, lambda x: F.elu(x * 3, 2.0)),
    "elu in place": (10, lambda x: F.elu(x * 1, inplace=True)),
    "hardswish in place": (10, lambda x: F.hardswish(x * 1, inplace=True)),
    "selu": (10, F.selu),
    "celu": (10, lambda x: F.celu(x, 0.7)),
    "mish": (20, F.mish),
    "hardswish": (10, F.hardswish),
    "hardsigmoid": (10, F.hardsigmoid),
    "glu": (20, F.glu),
    "softshrink": (10, F.softshrink),
    "hardshrink": (10, F.hardshrink),
    "prelu": (10, lambda x: F.prelu(x, torch.tensor([0.2]))),
    "prelu, channels": (10, lambda x: F.prelu(x, SLOPES)),
    "group_norm": (60, lambda x: F.group_norm(x, 2, SLOPES, SLOPES)),
    "instance_norm": (60, F.instance_norm),
    "batch_norm, of the batch": (60, lambda x: F.batch_norm(x, None, None, SLOPES, SLOPES, True)),
    "pixel_shuffle": (1, lambda x: F.pixel_shuffle(x, 2)),
    "pixel_unshuffle": (1, lambda x: F.pixel_unshuffle(x, 2)),
    "channel_shuffle": (1, lambda x: torch.channel_shuffle(x, 2)),
    "nearest": (1, lambda x: F.interpolate(x, scale_factor=2)),
    "nearest, a size": (1, lambda x: F.interpolate(x, size=(9, 4))),
    "nearest, one dimension": (1, lambda x: F.interpolate(x[0], scale_factor=3)),
    "nearest-exact": (1, lambda x: F.interpolate(x, size=(9, 4), mode="nearest-exact")),
    "linear": (4, lambda x: F.interpolate(x[0], scale_factor=2, mode="linear")),
    "bilinear": (4, lambda x: F.interpolate(x, scale_factor=2, mode="bilinear")),
    "bilinear, corners": (4, lambda x: F.interpolate(x, size=(9, 11), mode="bilinear", align_corners=True)),
    "bicubic": (4, lambda x: F.interpolate(x, size=(9, 11), mode="bicubic")),
    "reflect": (1, lambda x: F.pad(x, (2, 1, 0, 3), mode="reflect")),
    "reflect, one dimension": (1, lambda x: F.pad(x[0], (2, 1), mode="reflect")),
    "replicate": (1, lambda x: F.pad(x, (2, 1, 0, 3), mode="replicate")),
    "replicate, one dimension": (1, lambda x: F.pad(x[0], (2, 1), mode="replicate")),
    "circular": (1, lambda x: F.pad(x, (1, 1, 1, 1), mode="circular")),
    "unfold": (1, lambda x: F.unfold(x, 3, dilation=2, padding=1)),
    "fold": (8, _around),
    "conv_transpose2d": (60, lambda x: F.conv_transpose2d(x, random(4, 3, 2, 2, seed=3), random(3))),
    "conv_transpose2d, strides": (
        60, lambda x: F.conv_transpose2d(x, random(4, 3, 3, 3, seed=3), stride=2, padding=1, output_padding=1),
    ),
    "conv_transpose2d, groups": (
        60, lambda x: F.conv_transpose2d(x, random(4, 2, 3, 3, seed=3), groups=2, dilation=2),
    ),
    "conv_transpose2d, both secret": (60, lambda x: F.conv_transpose2d(x, x[0, :, None, :3, :2])),
    "conv_transpose1d": (60, lambda x: F.conv_transpose1d(x[0].reshape(1, 6, 24), random(6, 2, 3), stride=2)),
    "huber": (20, lambda x: F.huber_loss(x[0], x[1])),
    "smooth_l1": (20, lambda x: F.smooth_l1_loss(x[0], x[1], beta=0.5)),
    "soft_margin": (20, lambda x: F.soft_margin_loss(x[0], SIGNS)),
    "pairwise_distance": (20, lambda x: F.pairwise_distance(x[0], x[1])),
    "triplet_margin": (20, lambda x: F.triplet_margin_loss(x[0], x[1], x[0] * 2)),
    "kl_div": (60, lambda x: F.kl_div(x[0].log_softmax(-1), x[1].softmax(-1).detach(), reduction="sum")),
    "cdist": (20, lambda x: torch.cdist(x[0], x[1])),
    "var_mean": (20, lambda x: torch.cat([one.flatten() for one in torch.var_mean(x, 0)])),
    "std_mean": (20, _pair(torch.std_mean)),
    "aminmax": (4, _pair(torch.aminmax)),
    "cross": (20, lambda x: torch.linalg.cross(x[..., :3], x[..., 3:])),
    "expm1": (80, torch.expm1),
    "exp2": (40, torch.exp2),
    "log1p": (20, lambda x: x.abs().log1p()),
    "log2": (20, lambda x: (x.abs() + 1).log2()),
    "log10": (20, lambda x: (x.abs() + 1).log10()),
    "hypot": (20, lambda x: torch.hypot(x[0], x[1] + 3)),
    "logit": (60, lambda x: x.sigmoid().logit()),
    "bilinear of two": (40, lambda x: F.bilinear(x[0], x[1], torch.ones(2, 6, 6))),
    "attention": (60, lambda x: F.scaled_dot_product_attention(x, x, x)),
    "attention, causal": (60, lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True)),
    "attention, mask": (60, lambda x: F.scaled_dot_product_attention(x, x, x, attn_mask=torch.eye(6).bool())),
    "flags": (1, lambda x: (((x > 0) & (x < 1)) | (x > 2) ^ (x > 1.5)).float() * x),
}  # fmt: skip


@pytest.mark.parametrize("name", REWRITTEN)
def test_what_is_written_with_others(name, parties):
    units, function = REWRITTEN[name]
    plain = IMAGES.clone().requires_grad_()
    shared = share(InProcessSession(parties), plain)
    expected, found = function(plain), function(shared)
    assert isinstance(found, SharedTensor)
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    assert (found.get() - expected).abs().max() <= units * UNIT
    weights = random(*expected.shape, seed=5)
    (expected * weights).sum().backward()
    (found * weights).sum().backward()
    off = (shared.grad.get() - plain.grad).abs()
    assert (off <= 4 * (units + 4) * UNIT * plain.grad.abs().clamp(min=1)).all()


def _layer(**options):
    torch.manual_seed(1)
    return nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, **options).eval()


MODULES = {
    "TransformerEncoderLayer": _layer,
    "TransformerEncoderLayer, norm first": lambda: _layer(norm_first=True, activation="gelu"),
    "MultiheadAttention": lambda: nn.MultiheadAttention(8, 2, batch_first=True).eval(),
    "GroupNorm": lambda: nn.GroupNorm(3, 3),
    "ConvTranspose1d": lambda: nn.ConvTranspose1d(3, 2, 3),
    "PReLU": nn.PReLU,
}


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", MODULES)
def test_modules(name, grad):
    torch.manual_seed(0)
    module, values = MODULES[name](), random(2, 3, 8)
    with torch.set_grad_enabled(grad):
        given = (values,) * (3 if "Multihead" in name else 1)
        expected = module(*given)
        expected = expected[0] if isinstance(expected, tuple) else expected
        expected = expected.detach()
        session = InProcessSession(2)
        module.zero_grad()
        hidden = share(session, values)
        found = share_module(session, module)(*(hidden for _ in given))
        found = found[0] if isinstance(found, tuple) else found
    assert found.requires_grad == grad
    assert (found.get() - expected).abs().max() <= 400 * UNIT


@pytest.mark.parametrize("momentum", [0.1, None])
def test_batch_norm_moves_its_statistics_as_on_plain_tensors(momentum):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(4, 3, 3), nn.BatchNorm2d(3, momentum=momentum), nn.ReLU(), nn.Flatten())
    session = InProcessSession(2, seeds=[bytes([1] * 16), bytes([2] * 16)], own_seed=bytes(16))
    shared = share_module(session, copy.deepcopy(plain))
    for step in range(3):
        images = random(2, 4, 6, 6, seed=step) * 2
        expected, found = plain(images), shared(share(session, images))
        (expected**2).mean().backward()
        (found**2).mean().backward()
        assert (found.get() - expected).abs().max() <= 60 * UNIT
    for one, other in zip(plain.parameters(), shared.parameters(), strict=True):  # sums of three gradients
        assert (other.grad.get() - one.grad).abs().max() <= 120 * UNIT
    for name, kept in plain[1].named_buffers():
        there = getattr(shared[1], name)
        assert (((there.get() if kept.is_floating_point() else there) - kept).abs() <= 10 * UNIT).all(), name
    expected, found = plain.eval()(images), shared.eval()(share(session, images))
    assert (found.get() - expected).abs().max() <= 60 * UNIT


def test_batch_norm_tells_no_statistics_of_what_is_shared():
    layer = nn.BatchNorm1d(3)
    with pytest.raises(SharingError, match=r"batch_norm: .*share the module as well.*model.eval"):
        layer(share(InProcessSession(2), random(4, 3)))
    assert torch.equal(layer.running_mean, torch.zeros(3))


@pytest.mark.parametrize(
    "change", [lambda x: x.squeeze_(), lambda x: x.unsqueeze_(0), lambda x: x.transpose_(0, 2)]
)
def test_shapes_that_change_in_place(change):
    values = random(1, 3, 2)
    x = share(InProcessSession(2), values)
    before = x[0, 1]
    expected = change(values.clone())
    assert change(x) is x
    x.mul_(2)
    assert (x.get() - 2 * expected).abs().max() <= 2 * UNIT
    assert (before.get() - 2 * values[0, 1]).abs().max() <= 2 * UNIT


def test_masks_of_attention_modules():
    torch.manual_seed(0)
    module, x = nn.MultiheadAttention(8, 2), random(3, 2, 8)
    padding = torch.tensor([[False, False, True], [False, True, True]])
    causal = torch.ones(3, 3).triu(1).bool()
    expected, weights = module(x, x, x, key_padding_mask=padding, attn_mask=causal)
    session = InProcessSession(2)
    hidden = share(session, x)
    found, told = share_module(session, module)(
        hidden, hidden, hidden, key_padding_mask=padding, attn_mask=causal
    )
    assert (found.get() - expected).abs().max() <= 60 * UNIT
    assert (told.get() - weights).abs().max() <= 60 * UNIT


def test_digits_of_whole_numbers_are_not_shared():
    session = InProcessSession(2)
    whole, flags = share(session, torch.tensor([5, 6])), share(session, torch.tensor([0.5, 1.5])) > 1
    for function in (lambda: whole & whole, lambda: whole | flags, lambda: ~whole):
        with pytest.raises(SharingError, match="logical_"):
            function()
    flags += 5
    with pytest.raises(SharingError, match="logical_"):
        flags & flags


RECURRENT = {
    "LSTM": lambda: nn.LSTM(8, 3),
    "LSTM, both directions": lambda: nn.LSTM(8, 3, num_layers=2, bidirectional=True),
    "LSTM, batch first": lambda: nn.LSTM(8, 3, batch_first=True),
    "GRU": lambda: nn.GRU(8, 3, num_layers=2),
    "RNN": lambda: nn.RNN(8, 3, nonlinearity="relu"),
}


@pytest.mark.parametrize("name", RECURRENT)
def test_recurrent_layers_and_their_gradients(name):
    torch.manual_seed(0)
    module, values = RECURRENT[name](), random(3, 2, 8)
    session = InProcessSession(2)

    def run(model, x):
        output, state = model(x)
        total = output.pow(2).sum() + sum(
            one.sum() for one in (state if isinstance(state, tuple) else [state])
        )
        total.backward()
        return output

    expected = run(module, values)
    wanted = {key: one.grad for key, one in module.named_parameters()}
    module.zero_grad()
    found = run(share_module(session, module), share(session, values))
    assert (found.get() - expected).abs().max() <= 40 * UNIT
    for key, one in module.named_parameters():
        assert (one.grad.get() - wanted[key]).abs().max() <= 400 * UNIT, key

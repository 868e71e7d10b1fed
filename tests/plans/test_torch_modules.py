"""Every module of `torch.nn`, and what torch's own Python code does in them: recorded as torch runs it, or refused by
its public name with what to write.
"""

from __future__ import annotations

import copy
import inspect
import re
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence, pad_packed_sequence
from torch.testing._internal.common_modules import module_db

import planrt
from planrt.errors import PlanWarning, TraceError

ABSTRACT = {nn.Module, nn.Container, nn.RNNBase, nn.RNNCellBase}  # they have no forward
SAMPLES = 4  # of torch's own samples of each module and mode

REFUSED = {
    "CrossMapLRN2d": r"^nn\.CrossMapLRN2d calls torch\.Tensor\.new, .*: use nn\.LocalResponseNorm",
    "TripletMarginWithDistanceLoss": r"^nn\.TripletMarginWithDistanceLoss calls .*: use nn\.TripletMarginLoss",
    "LinearCrossEntropyLoss": r"LinearCrossEntropyOptions cannot stand in a plan; leave it out",
    **{
        f"BatchNorm{d}d": rf"^nn\.BatchNorm{d}d reads the value of a tensor .*: with momentum=None .* momentum=0\.1"
        for d in (1, 2, 3)
    },
}
"""Module -> what the error says where it cannot be recorded; samples of these may work."""

IMAGE = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))
ROWS = IMAGE[:, 0]
EXTRA = {
    nn.AdaptiveLogSoftmaxWithLoss: (lambda: nn.AdaptiveLogSoftmaxWithLoss(6, 12, [4]), ROWS[0], torch.arange(1, 12, 2)),
    nn.AlphaDropout: (nn.AlphaDropout, IMAGE),
    nn.ChannelShuffle: (lambda: nn.ChannelShuffle(2), IMAGE),
    nn.CosineSimilarity: (nn.CosineSimilarity, ROWS, ROWS.flip(0)),
    nn.CrossMapLRN2d: (lambda: nn.CrossMapLRN2d(2), IMAGE),
    nn.DataParallel: (lambda: nn.DataParallel(nn.Linear(6, 2)), IMAGE),
    nn.Dropout: (nn.Dropout, IMAGE),
    nn.Dropout1d: (nn.Dropout1d, ROWS),
    nn.Dropout2d: (nn.Dropout2d, IMAGE),
    nn.Dropout3d: (nn.Dropout3d, IMAGE[None]),
    nn.EmbeddingBag: (lambda: nn.EmbeddingBag(9, 3, mode="max"), torch.arange(8).reshape(2, 4)),
    nn.FeatureAlphaDropout: (nn.FeatureAlphaDropout, IMAGE),
    nn.Flatten: (nn.Flatten, IMAGE),
    nn.Fold: (lambda: nn.Fold((4, 4), 2), torch.randn(2, 8, 9)),
    nn.FractionalMaxPool2d: (lambda: nn.FractionalMaxPool2d(2, output_ratio=0.5), IMAGE),
    nn.FractionalMaxPool3d: (lambda: nn.FractionalMaxPool3d(2, output_size=(2, 3, 3)), IMAGE[None]),
    nn.Hardsigmoid: (nn.Hardsigmoid, IMAGE),
    nn.Identity: (nn.Identity, IMAGE),
    nn.MaxUnpool1d: (lambda: nn.MaxUnpool1d(2), *nn.MaxPool1d(2, return_indices=True)(ROWS)),
    nn.MaxUnpool2d: (lambda: nn.MaxUnpool2d(2), *nn.MaxPool2d(2, return_indices=True)(IMAGE)),
    nn.MaxUnpool3d: (lambda: nn.MaxUnpool3d(2), *nn.MaxPool3d(2, return_indices=True)(IMAGE[None])),
    nn.ModuleDict: (lambda: Holding(nn.ModuleDict({"a": nn.Linear(6, 6)})), IMAGE),
    nn.ModuleList: (lambda: Holding(nn.ModuleList([nn.Linear(6, 6)])), IMAGE),
    nn.NLLLoss2d: (nn.NLLLoss2d, IMAGE, torch.zeros(2, 6, 6, dtype=torch.int64)),
    nn.PairwiseDistance: (nn.PairwiseDistance, ROWS, ROWS.flip(0)),
    nn.ParameterDict: (lambda: Holding(nn.ParameterDict({"a": torch.ones(6)})), IMAGE),
    nn.ParameterList: (lambda: Holding(nn.ParameterList([torch.ones(6)])), IMAGE),
    nn.PixelShuffle: (lambda: nn.PixelShuffle(2), IMAGE),
    nn.PixelUnshuffle: (lambda: nn.PixelUnshuffle(2), IMAGE),
    nn.RReLU: (nn.RReLU, IMAGE),
    nn.Sequential: (lambda: nn.Sequential(nn.Linear(6, 2), nn.ReLU()), IMAGE),
    nn.SyncBatchNorm: (lambda: nn.SyncBatchNorm(4), IMAGE),
    nn.TransformerDecoder: (lambda: nn.TransformerDecoder(nn.TransformerDecoderLayer(6, 2, 8), 2), ROWS, ROWS.flip(0)),
    nn.TripletMarginLoss: (nn.TripletMarginLoss, ROWS, ROWS.flip(0), ROWS.flip(1)),
    nn.TripletMarginWithDistanceLoss: (nn.TripletMarginWithDistanceLoss, ROWS, ROWS.flip(0), ROWS.flip(1)),
    nn.Unflatten: (lambda: nn.Unflatten(1, (2, 2)), IMAGE),
    nn.Unfold: (lambda: nn.Unfold(2), IMAGE),
    nn.Upsample: (lambda: nn.Upsample(scale_factor=2, mode="bilinear"), IMAGE),
    nn.UpsamplingBilinear2d: (lambda: nn.UpsamplingBilinear2d(scale_factor=2), IMAGE),
    nn.UpsamplingNearest2d: (lambda: nn.UpsamplingNearest2d(size=(3, 3)), IMAGE),
    **{
        getattr(nn, f"Lazy{word}"): (getattr(nn, f"Lazy{word}"), example)
        for word, example in (
            ("BatchNorm1d", ROWS), ("BatchNorm2d", IMAGE), ("BatchNorm3d", IMAGE[None]), ("InstanceNorm1d", ROWS),
            ("InstanceNorm2d", IMAGE), ("InstanceNorm3d", IMAGE[None]),
        )
    },
    nn.LazyLinear: (lambda: nn.LazyLinear(3), IMAGE),
}  # fmt: skip
"""Module -> how to make one, and what to call it with: where torch's own list has no samples."""


class Holding(nn.Module):
    """Uses a container as containers are used."""

    def __init__(self, container):
        super().__init__()
        self.held = container

    def forward(self, x):
        for part in self.held.values() if hasattr(self.held, "values") else self.held:
            x = part(x) if isinstance(part, nn.Module) else x * part
        return x


def public_modules():
    """The classes of modules that `torch.nn` shows."""
    return {
        found for name in dir(nn)
        if inspect.isclass(found := getattr(nn, name)) and issubclass(found, nn.Module)
    } - ABSTRACT  # fmt: skip


def samples(kind, training):
    """(module, args, kwargs) for a class of `torch.nn`, from torch's list of samples or from `EXTRA`."""
    if kind in EXTRA:
        make, *args = EXTRA[kind]
        yield make(), tuple(args), {}
        return
    for info in module_db:
        if info.module_cls is kind:
            made = info.module_inputs_func(info, "cpu", torch.float32, False, training)
            for one in made[:: -(-len(made) // SAMPLES)]:
                module = kind(*one.constructor_input.args, **one.constructor_input.kwargs)
                yield module, one.forward_input.args, one.forward_input.kwargs


def tensors_in(value):
    if isinstance(value, torch.Tensor):
        return [value]
    return [tensor for item in value for tensor in tensors_in(item)]


def assert_same(got, want):
    """The same values in the same dtypes, bit for bit."""
    for one, other in zip(tensors_in(got), tensors_in(want), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    "kind", sorted(public_modules(), key=lambda kind: kind.__name__), ids=lambda k: k.__name__
)
@pytest.mark.filterwarnings("ignore")  # of deprecated modules, and of what they warn of
def test_every_module_of_torch_records_or_is_refused_by_name(kind):
    equal = 0
    for training in (True, False):
        for module, args, kwargs in samples(kind, training):
            module.train(training)
            if kind.__name__.startswith("Lazy"):
                module(*args, **kwargs)
            eager = copy.deepcopy(module)
            plan = planrt.Plan(module)
            plan.train(training)
            try:
                plan.build(*args, **kwargs)
            except TraceError as error:
                assert kind.__name__ in REFUSED, f"{kind.__name__} was refused: {error}"
                with pytest.raises(TraceError, match=REFUSED[kind.__name__]):
                    raise
                continue
            torch.manual_seed(1)
            want = eager(*copy.deepcopy(args), **copy.deepcopy(kwargs))
            torch.manual_seed(1)
            assert_same(plan(*args, **kwargs), want)
            assert_same(module.state_dict().values(), eager.state_dict().values())
            equal += 1
    assert equal or kind.__name__ in REFUSED, f"no sample of {kind.__name__} ran"


# ----------------------------------------------------------------------------------------------- transformers


class Masked(nn.Module):
    """A transformer as in torch's tutorials; `masks` says which it gets."""

    def __init__(self, masks, **options):
        super().__init__()
        self.masks, self.embed, self.out = masks, nn.Embedding(9, 8), nn.Linear(8, 3)
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, **options)
        layer = nn.TransformerDecoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
        self.decoder = nn.TransformerDecoder(layer, 1)
        self.whole = nn.Transformer(8, 2, 1, 1, 16, dropout=0.1, batch_first=True)
        self.whole.encoder.use_nested_tensor = False
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        e, padding = self.embed(x), x == 0
        causal = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        if self.masks == "padding":
            e = self.encoder(e, src_key_padding_mask=padding)
        elif self.masks == "causal":
            e = self.encoder(e, mask=causal)
        elif self.masks == "both":
            e = self.encoder(e, mask=causal.isinf(), src_key_padding_mask=padding, is_causal=True)
        elif self.masks == "per row":
            e = self.encoder(e, mask=padding[:, None].expand(-1, x.shape[1], -1).repeat(2, 1, 1))
        elif self.masks == "decoder":
            e = self.decoder(e, e, tgt_mask=causal, memory_key_padding_mask=padding)
        elif self.masks == "whole":
            e = self.whole(
                e, e, tgt_mask=causal.isinf(), src_key_padding_mask=padding, tgt_key_padding_mask=padding
            )
        elif self.masks == "weights":
            e, weights = self.attention(e, e, e, key_padding_mask=padding)
            e = e + weights.sum(-1, keepdim=True)
        return self.out(e.mean(1))


def sentences():
    x = torch.randint(1, 9, (4, 6), generator=torch.Generator().manual_seed(3))
    x[1:, 4:] = 0
    return x


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("masks", ["padding", "causal", "both", "per row", "decoder", "whole", "weights"])
def test_transformers_with_masks(masks, training):
    torch.manual_seed(0)
    x, model = sentences(), Masked(masks, enable_nested_tensor=False).train(training)
    plan = planrt.Plan(model).train(training).build(x)
    for batch in (x, x.flip(1).repeat(2, 1)):
        torch.manual_seed(1)
        want = model(batch)
        torch.manual_seed(1)
        assert_same(plan(batch), want)


def test_the_nested_way_of_an_encoder_is_named_where_a_plan_takes_the_other():
    x, model = sentences(), Masked("padding").eval()
    with pytest.warns(
        PlanWarning, match=r"nn\.TransformerEncoder with src_key_padding_mask.*enable_nested_tensor=False"
    ) as w:
        plan = planrt.Plan(model).eval().build(x)
    assert [one.filename for one in w] == [__file__]
    assert_same(plan(x), model(x))  # with gradients, torch takes that way too


def test_a_mask_that_is_an_argument_is_applied_as_given():
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
    causal = nn.Transformer.generate_square_subsequent_mask(5)
    x = torch.randn(2, 5, 8)

    class Net(planrt.Plan):
        def __init__(self):
            super().__init__()
            self.encoder = encoder

        def forward(self, x, mask):
            return self.encoder(x, mask=mask)

    plan = Net().build(x, torch.zeros(5, 5), free_dims=[(), ()])
    for mask in (causal, torch.zeros(5, 5), causal.T.contiguous()):
        torch.testing.assert_close(plan(x, mask), encoder(x, mask=mask))


@pytest.mark.parametrize("masks", ["padding", "causal", "whole"])
def test_transformers_with_masks_that_were_sent(masks, make_worker):
    planrt.TorchHook(torch)
    bob = make_worker("bob")
    torch.manual_seed(0)
    x, model = sentences(), Masked(masks, enable_nested_tensor=False).eval()
    want = model(x)
    model.send(bob)
    torch.testing.assert_close(model(x.send(bob)).get(), want)


# ------------------------------------------------------------------------------------------- packed sequences


class Packed(nn.Module):
    def __init__(self, kind, **options):
        super().__init__()
        self.embed, self.rnn = nn.Embedding(9, 4), kind(4, 5, batch_first=True, **options)

    def forward(self, x):
        lengths = (x != 0).sum(1).cpu()
        packed = pack_padded_sequence(self.embed(x), lengths, batch_first=True, enforce_sorted=False)
        out, hidden = self.rnn(packed)
        out, _ = pad_packed_sequence(out, batch_first=True, total_length=x.shape[1])
        last = hidden[0] if isinstance(hidden, tuple) else hidden
        return out.sum(1) + last[-1].repeat(1, out.shape[-1] // last.shape[-1])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_packed_sequences(kind, training):
    torch.manual_seed(0)
    x = sentences()
    x[0, 2:] = 0
    model = Packed(kind, num_layers=2, dropout=0.3, bidirectional=True).train(training)
    plan = planrt.Plan(model).train(training).build(x)
    others = x.clone()
    others[2, 1:] = 0
    for batch in (x, others, x.repeat(3, 1), x.clamp(max=5)):
        torch.manual_seed(1)
        want = model(batch)
        torch.manual_seed(1)
        assert_same(plan(batch), want)
    assert planrt.plans.parse(str(plan.graph)) == plan.graph


def test_packed_sequences_of_fixed_lengths():
    lstm = nn.LSTM(3, 2)

    class Packs(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = lstm

        def forward(self, x):
            return self.lstm(pack_padded_sequence(x, [4, 2]))[0].data

    x = torch.randn(4, 2, 3)
    assert_same(planrt.Plan(Packs()).build(x, free_dims=[()])(x), Packs()(x))


def test_sequences_that_are_padded_in_the_function_are_refused_by_name():
    def f(a, b):
        return pack_sequence([a, b]).data

    with pytest.raises(TraceError, match=r"^nn\.utils\.rnn\.pack_sequence .*: pad with F\.pad"):
        planrt.func2plan()(f).build(torch.randn(4, 3), torch.randn(2, 3))


# ----------------------------------------------------------------------------------- values that may be read


def test_values_that_nothing_has_a_part_in_may_be_read():
    def f(x):
        mask = torch.triu(torch.ones(3, 3), 1).bool()
        if mask.all() or float(mask.sum()) != 3.0:
            return x
        return x.masked_fill(mask, torch.arange(4).tolist()[3])

    x = torch.randn(3, 3)
    assert_same(planrt.func2plan()(f).build(x)(x), f(x))


@pytest.mark.parametrize(
    "value",
    [
        lambda x: x.sum(),
        lambda x: torch.zeros(3).add_(x[0]).sum(),
        lambda x: (lambda made: (made[:1].copy_(x[0, :1]), made)[1])(torch.zeros(3)).sum(),  # through a view
        lambda x: (lambda made: (made.data.copy_(x[0]), made)[1])(torch.zeros(3)).sum(),
        lambda x: torch.rand(3).sum(),
        lambda x: torch.zeros(3).uniform_().sum(),
        lambda x: torch.empty(3).sum(),
        lambda x: torch.ones(x.shape[0]).sum(),  # a free size
        lambda x: CAPTURED.sum(),
    ],
)
def test_other_values_may_not(value):
    def f(x):
        return x if value(x).item() > 1 else x + 1

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what it captures
        with pytest.raises(TraceError, match=r"Tensor\.item reads the value of a tensor"):
            planrt.func2plan()(f).build(torch.ones(2, 3), free_dims=[(0,)])


CAPTURED = torch.ones(3)


def test_distributions_are_refused_with_what_to_write():
    def f(x):
        return torch.distributions.Normal(x, x.exp()).rsample()

    def unchecked(x):
        return torch.distributions.Normal(x, x.exp(), validate_args=False).rsample()

    x = torch.randn(3, 2)
    with pytest.raises(TraceError, match=r"^distributions\.Normal .*validate_args=False"):
        planrt.func2plan()(f).build(x)
    plan = planrt.func2plan()(unchecked).build(x)
    torch.manual_seed(0)
    want = unchecked(x)
    torch.manual_seed(0)
    assert_same(plan(x), want)


@pytest.mark.parametrize(
    "f",
    [
        lambda x: torch.distributions.Categorical(x.softmax(-1)).log_prob(torch.zeros(2)),
        lambda x: pack_sequence([x, x]).data,
        lambda x: torch.distributions.kl_divergence(*[torch.distributions.Normal(x, 1.0)] * 2),
        lambda x: nn.TransformerEncoder(nn.TransformerEncoderLayer(3, 1, 4), 1)(x, x @ x.T),
    ],
)
def test_no_private_name_of_torch_is_in_the_message(f):
    with pytest.raises(TraceError) as caught:
        planrt.func2plan()(f).build(torch.randn(2, 3))
    message = str(caught.value).partition(" (at ")[0]
    assert not re.search(r"(^|[ .(])_[a-z]", message), message

"""Networks that the plan tests trace, with a loss and a maker of batches for each; where a line of a function is."""

from __future__ import annotations

import inspect

import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence


def line_of(f, marker="# here"):
    """``file:line`` of the line of `f` that `marker` stands in."""
    lines, start = inspect.getsourcelines(f)
    (offset,) = [index for index, line in enumerate(lines) if marker in line]
    return f"{inspect.getsourcefile(f)}:{start + offset}"


class MnistNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 20, 5)
        self.conv2 = nn.Conv2d(20, 50, 5)
        self.fc1 = nn.Linear(800, 500)
        self.fc2 = nn.Linear(500, 10)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv1(x)), 2, 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2, 2)
        x = x.view(-1, 4 * 4 * 50)
        return F.log_softmax(self.fc2(F.relu(self.fc1(x))), dim=1)


class Transformer(nn.Module):
    """Uses the sizes of its input, dropout, layer norm and attention."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        self.position = nn.Parameter(torch.randn(12, 16) * 0.1)
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.2, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        return self.head(self.encoder(self.embed(x) + self.position[: x.shape[1]]).mean(1))


class MaskedTransformer(Transformer):
    """Uses a causal mask, which torch looks at, and a padding mask."""

    def forward(self, x):
        causal = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        embedded = self.embed(x) + self.position[: x.shape[1]]
        padding = torch.zeros_like(x, dtype=torch.float32).masked_fill(x == 0, -1e9)
        return self.head(self.encoder(embedded, mask=causal, src_key_padding_mask=padding).mean(1))


class PackedGru(nn.Module):
    """Takes sentences of different lengths as packed sequences."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 6, padding_idx=0)
        self.gru = nn.GRU(6, 8, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        lengths = (x != 0).sum(1).clamp(min=1)
        packed = pack_padded_sequence(self.embed(x), lengths, batch_first=True, enforce_sorted=False)
        padded, _ = pad_packed_sequence(self.gru(packed)[0], batch_first=True, total_length=x.shape[1])
        return self.head(padded.sum(1))


class LstmClassifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(6, 10, num_layers=2, batch_first=True, dropout=0.3, bidirectional=True)
        self.head = nn.Linear(20, 3)

    def forward(self, x):
        out, _ = self.lstm(x)
        return self.head(out[:, -1])


class UNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.down1 = self._block(1, 4)
        self.down2 = self._block(4, 8)
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.merge = self._block(8, 4)
        self.out = nn.Conv2d(4, 3, 1)

    @staticmethod
    def _block(a, b):
        return nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU(inplace=True))

    def forward(self, x):
        high = self.down1(x)
        low = self.down2(F.max_pool2d(high, 2))
        grown = self.up(low)
        also = F.interpolate(low, scale_factor=2, mode="bilinear", align_corners=False)
        return self.out(self.merge(torch.cat([high, grown + also[:, :4]], 1)))


class EmbeddingNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(30, 8, padding_idx=0)
        self.norm = nn.BatchNorm1d(8)
        self.drop = nn.Dropout(0.4)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.drop(F.gelu(self.norm(self.embed(x).sum(1)))))


class TiedNet(nn.Module):
    """An autoencoder whose decoder is the encoder's weight."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(8, 8, bias=False)
        self.decoder = nn.Linear(8, 8)
        self.decoder.weight = self.encoder.weight

    def forward(self, x):
        return self.decoder(torch.tanh(self.encoder(x)))


class FrozenNet(nn.Module):
    """A frozen layer, an unused one, and a buffer that forward assigns anew."""

    def __init__(self):
        super().__init__()
        self.frozen = nn.Linear(8, 8)
        self.frozen.requires_grad_(False)
        self.unused = nn.Linear(3, 3)
        self.head = nn.Linear(8, 3)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, x):
        if self.training:
            self.calls = self.calls + 1
            with torch.no_grad():
                self.mean.mul_(0.9).add_(x.mean(0), alpha=0.1)
        return self.head(torch.relu(self.frozen(x) - self.mean))


def classes(shape, count=3, *, ids=0):
    def batch(size, generator):
        x = (
            torch.randint(0, ids, (size, *shape), generator=generator)
            if ids
            else torch.randn(size, *shape, generator=generator)
        )
        return x, torch.randint(0, count, (size,), generator=generator)

    return batch


def pixels(size, generator):
    return torch.randn(size, 1, 8, 8, generator=generator), torch.randint(
        0, 3, (size, 8, 8), generator=generator
    )


def reconstruction(size, generator):
    x = torch.randn(size, 8, generator=generator)
    return x, x.clone()


NETS = {
    "mnist": (MnistNet, F.nll_loss, classes((1, 28, 28), 10)),
    "resnet18": (
        lambda: torchvision.models.resnet18(weights=None, num_classes=5),
        nn.CrossEntropyLoss(),
        classes((3, 32, 32), 5),
    ),
    "transformer": (Transformer, F.cross_entropy, classes((7,), ids=20)),
    "masked": (MaskedTransformer, F.cross_entropy, classes((7,), ids=20)),
    "packed": (PackedGru, F.cross_entropy, classes((7,), ids=20)),
    "lstm": (LstmClassifier, F.cross_entropy, classes((5, 6))),
    "unet": (UNet, F.cross_entropy, pixels),
    "embedding": (EmbeddingNet, nn.CrossEntropyLoss(label_smoothing=0.1), classes((4,), ids=30)),
    "tied": (TiedNet, nn.MSELoss(), reconstruction),
    "frozen": (FrozenNet, nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.5])), classes((8,))),
}
"""Name -> (maker of the network, loss, maker of batches)."""


def make(name):
    """(network with fixed initial values, loss, list of three batches of different sizes)."""
    build, loss_fn, batch = NETS[name]
    with torch.random.fork_rng():
        torch.manual_seed(5)
        net = build()
    generator = torch.Generator().manual_seed(6)
    return net, loss_fn, [batch(size, generator) for size in (6, 3, 5)]

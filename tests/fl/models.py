"""Models that people bring: those of `tests/plans/nets.py` and more, each with a loss and a maker of batches."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from tests.plans.nets import NETS, classes


class MiniGpt(nn.Module):
    """Tied embeddings, a causal mask and positions in buffers that are not saved."""

    def __init__(self, words=17, width=16, length=6):
        super().__init__()
        self.wte = nn.Embedding(words, width)
        self.register_buffer("mask", torch.full((length, length), -math.inf).triu(1), persistent=False)
        self.register_buffer(
            "angles", torch.arange(length)[:, None] / torch.arange(1, width + 1), persistent=False
        )
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.norm = nn.LayerNorm(width)
        self.lm_head = nn.Linear(width, words, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self, tokens):
        length = tokens.shape[1]
        x = self.wte(tokens) + torch.sin(self.angles[:length])
        mixed, _ = self.attention(x, x, x, attn_mask=self.mask[:length, :length], need_weights=False)
        return self.lm_head(self.norm(x + mixed)).transpose(1, 2)


class Detector(nn.Module):
    """Boxes and classes from one trunk, for a loss of two parts."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2)
        )
        self.boxes = nn.Linear(32, 4)
        self.kinds = nn.Linear(32, 3)

    def forward(self, images):
        seen = self.trunk(images).flatten(1)
        return {"boxes": self.boxes(seen).sigmoid(), "kinds": self.kinds(seen)}


def detection_loss(prediction, target):
    boxes = F.smooth_l1_loss(prediction["boxes"], target[:, :4])
    return F.cross_entropy(prediction["kinds"], target[:, 4].long()) + 5 * boxes


def detections(size, generator):
    boxes = torch.rand(size, 4, generator=generator)
    kinds = torch.randint(0, 3, (size, 1), generator=generator)
    return torch.randn(size, 3, 16, 16, generator=generator), torch.cat([boxes, kinds.float()], 1)


class Lora(nn.Module):
    """A frozen base with a trained low-rank part beside it."""

    def __init__(self):
        super().__init__()
        self.base = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))
        self.base.requires_grad_(False)
        self.down = nn.Linear(8, 2, bias=False)
        self.up = nn.Linear(2, 3, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


class Siamese(nn.Module):
    """One layer under two names."""

    def __init__(self):
        super().__init__()
        self.left = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        self.right = self.left

    def forward(self, x):
        return self.left(x[:, :4]) - self.right(x[:, 4:])


class Counts(nn.Module):
    """Buffers that forward changes, saved and not, and a tensor that is a plain attribute."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 3)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(8), persistent=False)
        self.scale = torch.full((8,), 2.0)

    def forward(self, x):
        if self.training:
            self.seen += x.shape[0]
            with torch.no_grad():
                self.mean.lerp_(x.mean(0), 0.1)
        return self.layer((x - self.mean) * self.scale)


class Averaged(nn.Module):
    """A frozen copy that forward moves towards the trained layer."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 3)
        self.average = nn.Linear(8, 3).requires_grad_(False)

    def forward(self, x):
        if self.training:
            with torch.no_grad():
                for mean, weight in zip(self.average.parameters(), self.layer.parameters(), strict=True):
                    mean.lerp_(weight, 0.1)
        return self.layer(x) + 0.1 * self.average(x)


class LinearFirstNorm(nn.Module):
    """Two batch norms behind two linear layers: what broke rounds once."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.BatchNorm1d(8), nn.Linear(8, 8), nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)
        )

    def forward(self, x):
        return self.layers(x)


def one_hot(size, generator):
    return torch.randn(size, 8, generator=generator), torch.randint(
        0, 2, (size, 3), generator=generator
    ).float()


MODELS = {
    **NETS,
    "mobilenet": (
        lambda: torchvision.models.mobilenet_v3_small(num_classes=4),
        F.cross_entropy,
        classes((3, 32, 32), 4),
    ),
    "vit": (
        lambda: torchvision.models.VisionTransformer(16, 8, 2, 2, 16, 32, num_classes=4),
        F.cross_entropy,
        classes((3, 16, 16), 4),
    ),
    "gpt": (MiniGpt, F.cross_entropy, lambda size, g: tuple(torch.randint(0, 17, (2, size, 6), generator=g))),
    "detector": (Detector, detection_loss, detections),
    "lora": (Lora, F.cross_entropy, classes((8,))),
    "siamese": (Siamese, F.cross_entropy, classes((8,), 4)),
    "counts": (Counts, F.cross_entropy, classes((8,))),
    "averaged": (Averaged, F.cross_entropy, classes((8,))),
    "norms": (LinearFirstNorm, nn.CrossEntropyLoss(torch.tensor([1.0, 4.0, 2.0])), classes((8,))),
    "multilabel": (
        lambda: nn.Sequential(nn.Linear(8, 6), nn.GELU(), nn.Linear(6, 3)),
        nn.BCEWithLogitsLoss(pos_weight=torch.tensor([1.0, 5.0, 2.0])),
        one_hot,
    ),
}
"""Name -> (maker of the model, loss, maker of batches)."""


def make(name, samples=12):
    """(model with fixed initial values, loss, data, target)."""
    build, loss_fn, batch = MODELS[name]
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = build()
    data, target = batch(samples, torch.Generator().manual_seed(6))
    return model, loss_fn, data, target

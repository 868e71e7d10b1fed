"""Small networks and data sets that several test files use."""

import torch
import torch.nn.functional as F
from torch import nn

from planrt.workers import BaseDataset


class Classifier(nn.Module):
    """Linear, batch norm (buffers of both kinds), dropout (random): every way in which rounds can go wrong."""

    def __init__(self, features: int = 6, classes: int = 3, p: float = 0.3) -> None:
        super().__init__()
        self.first = nn.Linear(features, 16)
        self.norm = nn.BatchNorm1d(16)
        self.drop = nn.Dropout(p)
        self.last = nn.Linear(16, classes)

    def forward(self, x):
        return F.log_softmax(self.last(self.drop(F.relu(self.norm(self.first(x))))), dim=1)


def seeded_classifier(seed: int = 0, **options) -> Classifier:
    torch.manual_seed(seed)
    return Classifier(**options)


def classification_data(seed: int, samples: int = 60, features: int = 6, classes: int = 3) -> BaseDataset:
    generator = torch.Generator().manual_seed(seed)
    data = torch.randn(samples, features, generator=generator)
    return BaseDataset(data, data[:, :classes].argmax(dim=1))

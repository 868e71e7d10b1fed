"""The network of the MNIST example."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class Net(nn.Module):
    """Two convolutions and two linear layers, 431,080 parameters.

    Takes images as float32 [B, 1, 28, 28], returns log-probabilities of the ten digits as float32 [B, 10]
    (for `torch.nn.functional.nll_loss`).
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 20, 5, 1)
        self.conv2 = nn.Conv2d(20, 50, 5, 1)
        self.fc1 = nn.Linear(4 * 4 * 50, 500)
        self.fc2 = nn.Linear(500, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Log-probabilities of `images`."""
        x = F.max_pool2d(F.relu(self.conv1(images)), 2, 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2, 2)
        x = F.relu(self.fc1(x.view(-1, 4 * 4 * 50)))
        return F.log_softmax(self.fc2(x), dim=1)


def seeded_net(seed: int) -> Net:
    """Returns a `Net` whose initial weights depend on `seed` alone; torch's global generator is left as it
    was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Net()

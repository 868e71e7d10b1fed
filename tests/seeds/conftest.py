"""The programs of the tutorials that planrt's users come from, in our words, with the values printed there."""

from __future__ import annotations

import pytest
import torch

import planrt as sy


@pytest.fixture(scope="session", autouse=True)
def hook():
    return sy.TorchHook(torch)


@pytest.fixture
def four_points():
    """The four points that all the tutorials start with: the class is the first coordinate."""
    data = torch.tensor([[0.0, 0], [0, 1], [1, 0], [1, 1]], requires_grad=True)
    target = torch.tensor([[0.0], [0], [1], [1]], requires_grad=True)
    return data, target

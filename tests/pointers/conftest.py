"""Two workers of the test's transport, and torch with planrt's methods."""

from __future__ import annotations

import pytest
import torch

import planrt


@pytest.fixture(scope="session", autouse=True)
def hook():
    return planrt.TorchHook(torch)


@pytest.fixture
def bob(make_worker):
    return make_worker("bob")


@pytest.fixture
def alice(make_worker):
    return make_worker("alice")

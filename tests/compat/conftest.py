"""Scripts of PySyft 0.2 against planrt, by its own names."""

from __future__ import annotations

import pytest
import torch

import planrt.compat  # noqa: F401 - so that `import syft` is planrt


@pytest.fixture(scope="session", autouse=True)
def hook():
    import syft as sy

    return sy.TorchHook(torch)


@pytest.fixture
def me(hook):
    return hook.local_worker

"""Two workers of the test's transport, and torch with planrt's methods."""

from __future__ import annotations

import contextlib

import pytest
import torch

import planrt
from planrt.workers import VirtualWorker, WebsocketClientWorker, WebsocketServerWorker


@pytest.fixture(scope="session", autouse=True)
def hook():
    return planrt.TorchHook(torch)


OWNER = "the owner's token"


@pytest.fixture
def hospital(transport):
    """``hospital(policy, approvals=..., datasets=...)`` -> ``connect(token)``, which gives a client of it."""
    with contextlib.ExitStack() as stack:

        def start(policy, *, approvals=None, datasets=None, tags=()):
            users = {"owner": OWNER}
            if transport == "memory":
                worker = stack.enter_context(
                    VirtualWorker("hospital", users=users, policy=policy, approvals=approvals)
                )
                for key, dataset in (datasets or {}).items():
                    worker.add_dataset(dataset, key, tags=tags)
                return lambda token="": stack.enter_context(worker.connect_as(token))
            server = WebsocketServerWorker(
                "hospital", threads=1, users=users, policy=policy, approvals=approvals
            )
            for key, dataset in (datasets or {}).items():
                server.add_dataset(dataset, key, tags=tags)
            uri = stack.enter_context(server.running())
            return lambda token="": stack.enter_context(
                WebsocketClientWorker("hospital", uri=uri, token=token)
            )

        yield start

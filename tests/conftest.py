"""Fixtures for all tests."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import warm

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A job in the background ignores Ctrl-C, and so would every process that tests start and interrupt.
    signal.signal(signal.SIGINT, signal.default_int_handler)


LONGEST = (
    "examples/test_examples", "scripts/test_commands", "plans/test_training",
    "fl/test_mnist_accuracy", "workers/test_isolated_serving", "workers/test_allocator",
    "scripts/test_interrupts", "scripts/test_going_on", "test_benchmarks",
    "plans/test_torch_modules", "plans/test_export", "docs/test_snippets",
    "test_fuzz", "test_soak", "deploy/test_compose",
    "plans/test_kernels", "test_architecture", "workers/test_isolation",
    "workers/test_websocket", "workers/test_isolated_users", "sharing/test_every_function",
    "fl/test_models", "fl/test_quorum", "fl/test_resume",
)  # fmt: skip
"""The files that take longest, in CPU time or in waiting, the longest first."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begins with the files that take longest, so that no process has a long one left when the others are done."""
    tests = Path(__file__).parent
    place = {tests / f"{name}.py": number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path, len(LONGEST)))


def pytest_collection_finish() -> None:
    """What torch and the tests' modules consist of stays: the collections of garbage that tests ask for look at what
    came later alone, and take a twentieth of the time."""
    gc.collect()
    gc.freeze()


_LEVELS = {"": logging.WARNING, "planrt": logging.NOTSET, "planrt.fl": logging.NOTSET}


@pytest.fixture(autouse=True)
def _logs_are_heard() -> None:
    """planrt's commands, which some tests call in this process, configure logging; others look for what is logged."""
    logging.disable(logging.NOTSET)
    for name, level in _LEVELS.items():
        logger = logging.getLogger(name)
        logger.setLevel(level)
        logger.disabled, logger.propagate = False, True


@pytest.fixture(scope="session")
def mnist_folder() -> Path:
    """The folder that holds the real MNIST, from PLANRT_DATA.

    Without it the test is skipped, or fails where PLANRT_REQUIRE_DATA=1 says that the data must be there.
    """
    folder = os.environ.get("PLANRT_DATA")
    if folder and (Path(folder) / "MNIST" / "raw").is_dir():
        return Path(folder).resolve()
    reason = "needs the real MNIST: set PLANRT_DATA to the folder that holds MNIST/raw"
    if os.environ.get("PLANRT_REQUIRE_DATA") == "1":
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def warm_python() -> Iterator[str]:
    """A Python as `sys.executable` that has loaded torch already: see `tests.warm`."""
    with warm.python() as path:
        yield path


@pytest.fixture(scope="module")
def warm_workers(warm_python: str) -> Iterator[None]:
    """Whatever a file's tests start by ``sys.executable``, planrt's own worker processes too, is run by a warm Python.

    A signal that stops a process reaches its launcher alone: tests of that start by `tests.warm.REAL`.
    """
    before, sys.executable = sys.executable, warm_python
    yield
    sys.executable = before


@pytest.fixture(params=["memory", "websocket"])
def transport(request) -> str:
    """Every behaviour test runs once per transport."""
    return request.param


@pytest.fixture
def make_worker(transport):
    """``make_worker("bob", {"key": dataset})`` -> a connected worker of the test's transport, closed at the end.

    The websocket server runs in this process with one torch thread, as virtual workers have, but behind a real
    socket. PLANRT_TEST_DEVICE says where workers compute (cpu); what they give back is on the CPU.
    """
    device = os.environ.get("PLANRT_TEST_DEVICE", "cpu")
    from planrt.workers import VirtualWorker, WebsocketClientWorker, WebsocketServerWorker

    with contextlib.ExitStack() as stack:

        def make(id, datasets=None, **options):
            if transport == "memory":
                return stack.enter_context(VirtualWorker(id, datasets=datasets, device=device, **options))
            server = WebsocketServerWorker(id, threads=1, device=device, **options)
            for key, dataset in (datasets or {}).items():
                server.add_dataset(dataset, key)
            uri = stack.enter_context(server.running())
            return stack.enter_context(WebsocketClientWorker(id, uri=uri))

        yield make


@pytest.fixture
def alice(make_worker):
    return make_worker("alice")


@pytest.fixture
def bob(make_worker):
    return make_worker("bob")


@pytest.fixture
def charlie(make_worker):
    return make_worker("charlie")


@pytest.fixture
def james(make_worker):
    return make_worker("james")

"""Workers with options of their own, and what ends each of them."""

import contextlib

import pytest

from planrt.workers import VirtualWorker, WebsocketClientWorker, WebsocketServerWorker


@pytest.fixture
def make_owned(transport):
    """``make_owned("bob", datasets, policy=...)`` -> (a worker of the test's transport, what ends it)."""
    with contextlib.ExitStack() as stack:

        def make(id, datasets=None, **options):
            running = contextlib.ExitStack()
            stack.enter_context(running)
            if transport == "memory":
                return running.enter_context(VirtualWorker(id, datasets=datasets, **options)), running.close
            server = WebsocketServerWorker(id, threads=1, **options)
            for key, dataset in (datasets or {}).items():
                server.add_dataset(dataset, key)
            uri = running.enter_context(server.running())
            return stack.enter_context(WebsocketClientWorker(id, uri=uri, auto_add=False)), running.close

        yield make

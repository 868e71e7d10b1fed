"""Workers of the test's transport, some plans, and what shows that nothing is left behind."""

from __future__ import annotations

import gc

import pytest
import torch

import planrt
from tests.processes import eventually


@pytest.fixture(scope="session", autouse=True)
def hook():
    return planrt.TorchHook(torch)


def _count(workers) -> list[int]:
    gc.collect()
    return [len(one._objects) if hasattr(one, "_host") else one.objects_count() for one in workers]


@pytest.fixture
def count():
    """``count(alice, bob)`` -> how many objects each holds (in all, or for this client), once that stands still."""

    def count(*workers) -> list[int]:
        seen = [_count(workers)]

        def still() -> bool:
            seen.append(_count(workers))
            return len(seen) > 3 and seen[-1] == seen[-2] == seen[-3]

        assert eventually(still)
        return seen[-1]

    return count


@pytest.fixture
def settles():
    """``settles([1, 1], alice, bob)``: whether the counts become these."""

    def settles(wanted, *workers) -> bool:
        return eventually(lambda: _count(workers) == wanted)

    return settles


def plan(function, *shapes):
    """A plan of `function` for float tensors of these shapes, by default one of any length."""
    return planrt.func2plan(function, args_shape=list(shapes) or [(-1,)])


@pytest.fixture
def inc():
    def inc(x):
        return x + 1

    return plan(inc)


@pytest.fixture
def double():
    def double(x):
        return x * 2

    return plan(double)


@pytest.fixture
def add():
    def add(a, b):
        return a + b

    return plan(add, (-1,), (-1,))


@pytest.fixture
def both():
    """Gives a dict of a sum and a pair, of which one is a size."""

    def both(x):
        return {"sum": x.sum(), "pair": (x.shape[0], x * 10)}

    return plan(both)


@pytest.fixture
def pick():
    """Fails for an index that is out of range."""

    def pick(x):
        y = x * 1
        return y[x.long()]

    return plan(pick)

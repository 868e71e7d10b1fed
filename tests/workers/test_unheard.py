"""Failures that the worker tells once: whoever is to hear of one may be gone, and then the next call raises it."""

from __future__ import annotations

import asyncio
import threading

import pytest
import torch

import planrt
from planrt import loop
from planrt.errors import RemoteError
from planrt.workers.pointers.fetching import fetch_all


@pytest.fixture
def bob(make_worker):
    planrt.TorchHook(torch)
    return make_worker("bob")


def raised_by(*calls):
    """The errors of a worker's that these calls raise; others are no part of it."""
    errors = []
    for call in calls:
        try:
            call()
        except RemoteError as error:
            errors.append(error)
    return errors


# ---------------------------------------------------------------------------------------------- the mechanism


def failing(kept, ended):
    @loop.on_loop
    async def call():
        try:
            error = RemoteError("it broke", worker_id="bob", kind="X")
            loop.keep_unless_heard(error, kept.append)
            raise error
        finally:
            loop.background_loop().call_soon(ended.set)  # after the task has ended

    return call


def test_an_error_that_is_heard_is_not_kept():
    kept = []
    call = failing(kept, threading.Event())
    with pytest.raises(RemoteError):
        asyncio.run(call())
    with pytest.raises(RemoteError):
        loop.run(call.__wrapped__(), instead="")
    assert kept == []


@pytest.mark.parametrize("arrived", [False, True], ids=["on its way", "it has come"])
def test_a_call_that_is_cancelled_in_the_moment_in_which_it_fails(arrived):
    kept, ended = [], threading.Event()

    async def main():
        task = asyncio.create_task(failing(kept, ended)())
        await asyncio.sleep(0)
        assert ended.wait(60)  # it has failed, and this loop has not been told yet
        if arrived:  # after it has been told, and before the task runs again
            asyncio.get_running_loop().call_soon(task.cancel)
        else:
            task.cancel()
        await asyncio.wait({task})
        assert task.cancelled()

    asyncio.run(main())
    assert [error.reason for error in kept] == ["it broke"]


def test_a_call_that_is_cancelled_before_it_fails():
    kept, begun, may_fail = [], threading.Event(), threading.Event()

    @loop.on_loop
    async def stubborn():
        begun.set()
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:  # such as a failure that a clean-up has found
            error = RemoteError("it broke", worker_id="bob", kind="X")
            loop.keep_unless_heard(error, kept.append)
            raise error from None
        finally:
            may_fail.set()

    async def main():
        task = asyncio.create_task(stubborn())
        await asyncio.sleep(0)
        assert begun.wait(60)
        task.cancel()
        await asyncio.wait({task})

    asyncio.run(main())
    assert may_fail.wait(60)
    loop.run(asyncio.sleep(0), instead="")
    assert [error.reason for error in kept] == ["it broke"]


# ----------------------------------------------------------------------------------------- through the public calls


async def given_up(coroutine):
    """Starts a call, and gives it up when it has been answered (or not yet), before this loop hears of the answer."""
    task = asyncio.create_task(coroutine)
    await asyncio.sleep(0)
    loop.run(asyncio.sleep(0.1), instead="")  # which this loop waits for
    task.cancel()
    await asyncio.wait({task})


def test_a_change_in_place_that_failed_is_told_though_the_get_was_given_up(bob):
    x, y = torch.zeros(3).send(bob), torch.ones(2).send(bob)
    x.index_add_(0, torch.tensor([7]).send(bob), torch.ones(1).send(bob))  # no such place
    asyncio.run(given_up(x.async_get()))
    (error,) = raised_by(*[lambda: y.copy().get()] * 3)
    assert "index_add_" in str(error)
    assert torch.equal(x.get(), torch.zeros(3))
    assert torch.equal(y.get(), torch.ones(2))


def test_a_backward_pass_that_failed_is_told_though_whoever_waited_was_given_up(bob):
    weight = torch.ones(3, requires_grad=True).send(bob)
    y = torch.ones(2).send(bob)
    loss = (weight * 3).exp().sum()
    loss.backward()
    loss.backward()  # its graph is gone

    asyncio.run(given_up(weight.async_grad()))
    (error,) = raised_by(*[lambda: y.copy().get(), lambda: weight.grad] * 2)
    assert "backward" in str(error)


def test_a_poisoned_result_is_told_by_its_own_get_only(bob):
    y = torch.ones(2).send(bob)
    bad = torch.ones(2, 2).send(bob).index_select(0, torch.tensor([9]).send(bob))
    asyncio.run(given_up(bad.async_get()))
    assert raised_by(*[lambda: y.copy().get()] * 3) == []
    with pytest.raises(RemoteError, match="index_select"):
        bad.get()


def test_of_several_that_fail_at_once_each_is_told(make_worker):
    planrt.TorchHook(torch)
    alice, bob = make_worker("alice"), make_worker("bob")
    both = [torch.zeros(3).send(alice), torch.zeros(3).send(bob)]
    for x in both:
        x.index_add_(0, torch.tensor([7]).send(x.location), torch.ones(1).send(x.location))
    with pytest.raises(RemoteError, match="alice"):
        fetch_all(both)
    (error,) = raised_by(lambda: both[1].copy().get(), lambda: both[1].copy().get())
    assert error.worker_id == "bob"

"""torch's warnings while something is recorded: each once, with the user's line."""

from __future__ import annotations

import threading
import traceback
import warnings

import pytest
import torch
import torch.nn.functional as F
from nets import line_of
from torch import nn

import planrt
from planrt.errors import TraceError
from planrt.fl import TrainConfig

X, WIDE = torch.randn(4, 1), torch.randn(4)


def loss(x, y):
    return F.mse_loss(x, y)  # here


def told(action):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        action()
    return [(f"{one.filename}:{one.lineno}", str(one.message)) for one in caught]


@pytest.mark.parametrize(
    "action",
    [
        lambda: planrt.func2plan()(loss).build(X, WIDE),
        lambda: planrt.func2plan()(loss).build(X, WIDE, free_dims=[(0,), (0,)]),
        lambda: TrainConfig(nn.Linear(1, 1), loss, example=(X, WIDE)),
        lambda: planrt.plans.training.trace_model(nn.Linear(1, 1), loss, X, WIDE),
    ],
)
def test_a_warning_of_torch_is_told_once_with_the_users_line(action):
    ((line, message),) = told(action)
    assert line == line_of(loss)
    assert "Using a target size" in message


def test_users_filters_are_obeyed():
    plan = planrt.func2plan()(loss)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert told_nothing(lambda: plan.build(X, WIDE))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="Using a target size"):
            plan.build(X, WIDE)


def told_nothing(action):
    seen = []
    shown, warnings.showwarning = warnings.showwarning, lambda *args, **kwargs: seen.append(args)
    try:
        action()
    finally:
        warnings.showwarning = shown
    return not seen


def test_two_lines_are_two_warnings():
    def f(x, y):
        first = F.mse_loss(x, y)
        return first + F.mse_loss(x, y)

    assert len(told(lambda: planrt.func2plan()(f).build(X, WIDE))) == 2


def test_what_another_thread_warns_of_is_not_lost():
    def f(x):
        thread = threading.Thread(target=lambda: warnings.warn("from a thread", UserWarning, stacklevel=1))
        thread.start()
        thread.join()
        return x + 1

    assert "from a thread" in {message for _, message in told(lambda: planrt.func2plan()(f).build(X))}


def test_a_trace_error_quotes_the_line_in_its_traceback():
    def f(x):
        return x if x.sum() > 0 else -x  # here

    with pytest.raises(TraceError) as caught:
        planrt.func2plan()(f).build(X)
    assert str(caught.value).endswith(f"(at {line_of(f)})")
    shown = "".join(traceback.format_exception(caught.value))
    assert "    return x if x.sum() > 0 else -x" in shown.rpartition("TraceError")[2]

"""What a client is told of a failure on data that it may not see: which op, and nothing of the data or the worker."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import planrt
from planrt.errors import OptionError, RemoteError, TransportError
from planrt.fl import TrainConfig
from planrt.plans.policy.rules import Policy, ReleaseRule
from planrt.workers import BaseDataset
from planrt.workers.machine.failures import without_directories
from tests.pointers.conftest import OWNER

ROWS = 64
COVERED = Policy(approval="open", release=(ReleaseRule("#patients", min_rows=20),), max_failures=3)
SECRET = 189_930


class Takes(nn.Module):
    """Reads a place of one number that a row of the data names."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x):
        torch.zeros(1).take(x[0, 0].long())
        return self.linear(x)


class Scatters(Takes):
    def forward(self, x):
        torch.zeros(1, 1).scatter(0, x[:1, :1].long(), 1.0)
        return self.linear(x)


class Counts(Takes):
    def forward(self, x):
        F.one_hot(x[:1, 0].long(), 7)
        return self.linear(x)


class ByClass(Takes):
    """The loss meets a class that is none."""

    def forward(self, x):
        return self.linear(x)


def patients(secret=SECRET):
    values = torch.zeros(ROWS, 3)
    values[0, 0] = secret
    targets = torch.zeros(ROWS, dtype=torch.int64)
    targets[7] = secret
    return BaseDataset(values, targets)


def job(model):
    return TrainConfig(model=model, loss_fn=F.cross_entropy, batch_size=ROWS, shuffle=False, optimizer="SGD",
                       optimizer_args={"lr": 0.1})  # fmt: skip


def everything_told(error):
    return "\n".join(
        [str(error), error.reason, error.cause, error.remote_traceback, *getattr(error, "__notes__", ())]
    )


def failing_fit(worker, model):
    config = job(model)
    config.send(worker)
    with pytest.raises(RemoteError) as caught:
        worker.fit("patients")
    return caught.value


@pytest.mark.parametrize("attack", [Takes, Scatters, Counts, ByClass])
def test_a_failing_round_tells_the_op_and_no_value(hospital, attack):
    worker = hospital(COVERED, datasets={"patients": patients()}, tags=("#patients",))()
    error = failing_fit(worker, attack())
    told = everything_told(error)
    assert str(SECRET) not in told
    assert "out of" not in told
    assert "IndexError" not in told
    assert error.remote_traceback == ""
    assert error.cause == ""
    assert error.op is not None
    assert f"op {error.index} of the plan failed" in told
    assert "for the worker's owner only" in told


def test_failures_do_not_differ_by_the_value_that_they_are_about(hospital):
    connect = hospital(COVERED, datasets={"patients": patients(123_456)}, tags=("#patients",))
    first = everything_told(failing_fit(connect(), Takes()))
    assert "123456" not in first
    assert "in batch" not in first  # which batch it was would tell which rows


def test_an_evaluation_tells_no_more_than_a_round(hospital):
    worker = hospital(COVERED, datasets={"patients": patients()}, tags=("#patients",))()
    job(Takes()).send(worker)
    with pytest.raises(RemoteError) as caught:
        worker.evaluate("patients")
    assert str(SECRET) not in everything_told(caught.value)
    assert caught.value.remote_traceback == ""


def test_a_policy_without_rules_hides_as_much(hospital):
    worker = hospital(Policy(approval="open"), datasets={"patients": patients()})()
    assert str(SECRET) not in everything_told(failing_fit(worker, Takes()))


def test_without_a_policy_the_reason_is_told(hospital):
    worker = hospital(None, datasets={"patients": patients()})()
    assert str(SECRET) in str(failing_fit(worker, Takes()))


class Unreadable:
    """A data set of the owner's whose items are files, one of which is gone."""

    def __len__(self):
        return ROWS

    def __getitem__(self, index):
        if index == 11:
            Path("/srv/hospital one/patients/anna.png").read_bytes()
        return torch.zeros(3), 0


def test_errors_of_the_owners_own_code_are_the_owners(hospital):
    worker = hospital(COVERED, datasets={"patients": Unreadable()}, tags=("#patients",))()
    error = failing_fit(worker, ByClass())
    for word in ("anna", "srv", "11", "FileNotFound", "test_told"):
        assert word not in everything_told(error)
    assert "the run failed in the data set" in str(error)


def test_of_the_workers_files_only_the_last_part_is_told(hospital):
    worker = hospital(None, datasets={"patients": Unreadable()})()
    told = everything_told(failing_fit(worker, ByClass()))
    assert "'anna.png'" in told
    assert "srv" not in told
    assert os.getcwd() not in told
    assert os.path.dirname(torch.__file__) not in told
    assert 'File "planrt/workers/' in told


def test_tracebacks_name_modules_and_not_places(make_worker):
    bob = make_worker("bob")
    with pytest.raises(RemoteError) as caught:
        torch.ones(2).send(bob).take(torch.tensor([9]).send(bob)).get()
    told = caught.value.remote_traceback
    assert 'File "planrt/workers/machine/eager.py"' in told
    assert os.path.dirname(os.path.dirname(planrt.__file__)) not in told
    assert "/site-packages" not in told


def test_what_fails_before_the_data_is_asked_for_says_why(hospital):
    worker = hospital(COVERED, datasets={"patients": patients(1)}, tags=("#patients",))()
    config = job(ByClass())
    config.optimizer_args = {"lr": -1.0}
    config.send(worker)
    with pytest.raises(RemoteError, match="Invalid learning rate") as caught:
        worker.fit("patients")
    assert "for the worker's owner only" not in str(caught.value)


def test_so_many_failures_and_the_session_is_ended(hospital, caplog):
    connect = hospital(COVERED, datasets={"patients": patients()}, tags=("#patients",))
    worker = connect()
    with caplog.at_level(logging.WARNING, logger="planrt.worker"):
        for _ in range(3):
            failing_fit(worker, Takes())
        with pytest.raises(TransportError):
            worker.objects_count()
    records = [one for one in caplog.records if one.getMessage() == "failed_on_private_data"]
    assert [(one.failures, one.ended, one.op) for one in records] == [
        (1, False, "Tensor.take"), (2, False, "Tensor.take"), (3, True, "Tensor.take"),
    ]  # fmt: skip
    assert str(SECRET) not in "".join(str(vars(one)) for one in records)
    assert connect(OWNER).objects_count() == 0  # others go on


@planrt.func2plan(args_shape=[(-1, 3)])
def mean_if(x):
    torch.zeros(1).take(x[0, 0].long())
    return x.mean(0)


def test_a_released_plan_that_fails_counts_and_says_nothing(hospital, caplog):
    connect = hospital(COVERED)
    owner = connect(OWNER)
    patients().data.clone().add_(SECRET).tag("#patients").send(owner, allowed_users=["owner"])
    owner.objects_count()
    worker = connect()
    (x,) = worker.search("#patients")
    there = mean_if.send(worker)
    with caplog.at_level(logging.WARNING, logger="planrt.worker"):
        for _ in range(2):
            with pytest.raises(RemoteError, match="is private, or was computed from private data") as caught:
                there(x).get()
            assert str(SECRET) not in everything_told(caught.value)
            assert "take" not in everything_told(caught.value)
        there(x)
        with pytest.raises((RemoteError, TransportError)):
            worker.objects_count()
        with pytest.raises(TransportError):
            worker.objects_count()
    assert sum(one.getMessage() == "failed_on_private_data" for one in caplog.records) == 3


LIMITS = {"max_failures": (20, "a session"), "max_daily_failures": (100, "a user and day")}


@pytest.mark.parametrize("value", [0, -1, 1.5, "many", True, 2**63])
@pytest.mark.parametrize("name", LIMITS)
def test_a_limit_of_failures_that_is_none(name, value):
    with pytest.raises(OptionError, match=f"{name} must be a whole number"):
        Policy(**{name: value})


@pytest.mark.parametrize("name", LIMITS)
def test_a_limit_of_failures_in_a_file(name):
    most, whose = LIMITS[name]
    assert getattr(Policy.from_values({name: "none"}), name) is None
    assert getattr(Policy.from_values({}), name) == most
    assert f"failures on private data, {whose}: at most {most}" in str(Policy())


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("No such file: '/data/hospital one/17.png'", "No such file: '17.png'"),
        ('assert at "/pytorch/aten/src/x.cpp":123', 'assert at "x.cpp":123'),
        (r"open 'C:\Users\anna b\x.csv'", "open 'x.csv'"),
        ("at ws://host/path/x: and/or 1 / 2 / 3", "at ws://host/path/x: and/or 1 / 2 / 3"),
    ],
)
def test_texts_without_directories(text, told):
    assert without_directories(text) == told

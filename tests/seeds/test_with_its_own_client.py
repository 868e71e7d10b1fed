"""Document 2, and section 14 of document 3: the job with the client module that users have beside their notebook."""

from __future__ import annotations

import asyncio
import logging
import re

import pytest
import torch

import planrt as sy
import planrt.compat
from planrt.fl.data import digits as digits

PER_WORKER, TESTED = 640, 500


@pytest.fixture
def parts(mnist_folder):
    """worker's id -> a few of its digits; "testing" -> test images."""
    mnist = digits.load("mnist", mnist_folder)
    found = {}
    for id in ("alice", "bob", "charlie", "testing"):
        whole = digits.partition_for(id, mnist)
        few = TESTED if id == "testing" else PER_WORKER
        found[id] = sy.BaseDataset(
            whole.data[:few], whole.targets[:few], batch_transform=whole.batch_transform
        )
    return found


@pytest.mark.parametrize(
    "ids", [("alice", "bob", "charlie"), ("alice", "bob")], ids=["document2", "section14"]
)
def test_its_rounds(make_worker, parts, ids, caplog):
    from tests.seeds import run_websocket_client as rwc

    workers = [make_worker(id, {"mnist": parts[id]}) for id in ids]
    testing = make_worker("testing", {"mnist_testing": parts["testing"]})
    args = rwc.define_and_get_arguments(args=["--training_rounds", "2", "--federate_after_n_batches", "8"])
    assert (args.batch_size, args.lr, args.seed) == (32, 0.1, 1)
    with caplog.at_level(logging.INFO, logger="run_websocket_client"):
        model, history = asyncio.run(rwc.main(args, workers, testing))
    assert [set(losses) for losses in history] == [set(ids)] * 2
    lines = [record.getMessage() for record in caplog.records if record.name == "run_websocket_client"]
    assert lines[:2] == ["Training round 1/2", "Evaluating models"]
    shares = [line for line in lines if "Percentage numbers" in line]
    assert len(shares) == 2 * (len(ids) + 1)
    first = {"alice": "0-3: 100%, 4-6: 0%, 7-9: 0%", "bob": "0-3: 0%, 4-6: 100%, 7-9: 0%"}
    for id, share in first.items():
        assert f"Model update {id}: Percentage numbers {share}" in lines
    assert all(
        re.search(rf"Average loss: \d+\.\d{{4}}, Accuracy: \d+/{TESTED} \(", line)
        for line in lines
        if "Average" in line
    )
    assert model(torch.zeros(1, 1, 28, 28)).shape == (1, 10)

"""`PrivateGridNetwork`: several workers searched as one."""

from __future__ import annotations

import asyncio

import pytest
import torch

import planrt
from planrt.errors import OptionError, WorkerLostError
from planrt.grid import PrivateGridNetwork


@pytest.fixture(scope="module", autouse=True)
def hook():
    return planrt.TorchHook(torch)


@pytest.fixture
def workers(make_worker):
    workers = [make_worker(id) for id in ("bob", "alice", "carol")]
    for worker, size in zip(workers[:2], (2, 3), strict=True):
        torch.ones(size, 4).tag("#boston", "#data").describe("prices of houses").send(worker)
        torch.ones(size).tag("#boston", "#target").send(worker)
    torch.ones(7).tag("#iris", "#data").send(workers[1])
    return workers


def found_in(results) -> dict[str, list[list[int]]]:
    return {id: [list(pointer.shape) for pointer in pointers] for id, pointers in results.items()}


def test_search_gives_what_each_worker_has_and_leaves_out_the_others(workers):
    grid = PrivateGridNetwork(*workers)
    assert found_in(grid.search("#boston", "#data")) == {"bob": [[2, 4]], "alice": [[3, 4]]}
    assert found_in(grid.search("#boston")) == {"bob": [[2, 4], [2]], "alice": [[3, 4], [3]]}
    assert found_in(grid.search("#iris")) == {"alice": [[7]]}
    assert found_in(grid.search("houses", "#data")) == {"bob": [[2, 4]], "alice": [[3, 4]]}
    assert grid.search("#mnist") == {}
    assert grid.search("#bosto") == {}


def test_what_was_found_can_be_used_where_it_is(workers):
    found = PrivateGridNetwork(*workers).search("#boston", "#data")
    assert found["alice"][0].location is workers[1]
    assert found["alice"][0].sum().get().item() == 12
    assert found["alice"][0].tags == {"#boston", "#data"}


def test_terms_may_come_in_a_list_and_the_search_may_be_awaited(workers):
    grid = PrivateGridNetwork(*workers)
    assert found_in(grid.search(["#boston", "#data"])) == {"bob": [[2, 4]], "alice": [[3, 4]]}
    assert found_in(asyncio.run(grid.async_search("#iris"))) == {"alice": [[7]]}


def test_a_worker_that_is_gone_is_an_error(workers):
    workers[2].close()
    with pytest.raises(WorkerLostError, match="carol"):
        PrivateGridNetwork(*workers).search("#boston")


def test_all_workers_that_are_gone_are_named(workers):
    for gone in workers[1:]:
        gone.close()
    for search in (
        lambda grid: grid.search("#boston"),
        lambda grid: asyncio.run(grid.async_search("#boston")),
    ):
        with pytest.raises(WorkerLostError, match="alice") as caught:
            search(PrivateGridNetwork(*workers))
        (note,) = caught.value.__notes__
        assert note.startswith("And WorkerLostError: ")
        assert "carol" in note


def test_it_says_whom_it_is_made_of(workers):
    grid = PrivateGridNetwork(*workers)
    assert grid.workers == workers
    assert repr(grid) == "<PrivateGridNetwork of bob, alice, carol>"


def test_wrong_workers_are_refused(workers):
    with pytest.raises(OptionError, match="no workers"):
        PrivateGridNetwork()
    with pytest.raises(OptionError, match=r"PrivateGridNetwork\(\*workers\)"):
        PrivateGridNetwork(workers)
    with pytest.raises(OptionError, match="not str"):
        PrivateGridNetwork("bob")
    with pytest.raises(OptionError, match="two workers are called 'bob'"):
        PrivateGridNetwork(workers[0], workers[0])


@pytest.mark.parametrize("query", [("",), (3,), ("#boston", None)])
def test_a_search_for_what_is_no_text_is_refused(workers, query):
    with pytest.raises(OptionError, match="tags or words to look for"):
        PrivateGridNetwork(*workers).search(*query)


@pytest.mark.parametrize("query", [(), ([],)])
def test_a_search_without_terms_gives_all_that_is_tagged(workers, query):
    untagged = torch.ones(3).send(workers[2])
    found = PrivateGridNetwork(*workers).search(*query)
    assert found_in(found) == {"bob": [[2, 4], [2]], "alice": [[3, 4], [3], [7]]}
    assert untagged.get().tolist() == [1, 1, 1]


def test_public_names():
    assert planrt.PrivateGridNetwork is PrivateGridNetwork

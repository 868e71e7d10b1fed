"""All parties in one process: share, run, reconstruct."""

import pytest
import torch

from planrt.sharing.additive import reconstruct, share
from planrt.sharing.randomness import Stream, new_seed
from planrt.sharing.rounds import new_parties, run_together


@pytest.fixture(autouse=True)
def one_thread():
    """Small tensors gain nothing from threads, and lose where processes share the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=[2, 3, 4], ids=lambda count: f"{count}parties")
def parties(request):
    return request.param


@pytest.fixture
def run(parties):
    """run(protocol, *secrets): what the parties' results add up to."""

    def with_all(protocol, *secrets, transcript=None, count=parties):
        return run_parties(count, protocol, *secrets, transcript=transcript)

    return with_all


def run_parties(count, protocol, *secrets, transcript=None):
    stream = Stream(new_seed())
    shares = [share(secret, count, stream) for secret in secrets]
    everyone = new_parties(count)
    results = run_together(
        [protocol(party, *(parts[party.number] for parts in shares)) for party in everyone], transcript
    )
    if isinstance(results[0], torch.Tensor):
        return reconstruct(results)
    return [reconstruct(list(parts)) for parts in zip(*results, strict=True)]


@pytest.fixture
def anything():
    """Random values of the whole ring, with its edges among them."""

    def of(*shape, bits=64):
        high = 2 ** (bits - 1)
        values = torch.randint(-high, high - 1, shape)
        edges = torch.tensor([0, 1, -1, high - 1, -high, high // 2, -(high // 2), 2])
        flat = values.reshape(-1)
        flat[: len(edges)] = edges[: len(flat)]
        return values

    return of

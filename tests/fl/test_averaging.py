"""Averages of models: plain and weighted, every dtype, order that does not matter, bad input."""

import copy

import pytest
import torch
from torch import nn

from planrt.errors import OptionError
from planrt.fl.averaging import StreamingAverage, federated_avg
from tests.models import seeded_classifier


def models(count=3):
    return {f"worker{number}": seeded_classifier(number) for number in range(count)}


def test_the_average_is_the_first_model_changed():
    """As in PySyft 0.2, whose scripts go on with models[0]."""
    given = dict(reversed(models().items()))
    expected = federated_avg(given, copy=True)
    first = given["worker2"]
    parameters = list(first.parameters())
    assert federated_avg(given) is first
    assert all(one is other for one, other in zip(first.parameters(), parameters, strict=True))
    for name, value in first.state_dict().items():
        assert torch.equal(value, expected.state_dict()[name])
    for id in ("worker0", "worker1"):
        assert torch.equal(given[id].first.weight, models()[id].first.weight)


def test_a_sequence_of_models_is_averaged_too():
    average = federated_avg([{"w": torch.tensor([0.0])}, {"w": torch.tensor([4.0])}], [3, 1])
    assert average["w"].item() == 1.0
    one, two = seeded_classifier(0), seeded_classifier(1)
    assert federated_avg([one, two]) is one


def test_the_plain_average_can_be_a_new_module():
    given = models()
    before = {id: copy.deepcopy(model.state_dict()) for id, model in given.items()}
    average = federated_avg(given, copy=True)
    assert type(average) is type(given["worker0"])
    for name, value in average.state_dict().items():
        if value.is_floating_point():
            expected = torch.stack([model.state_dict()[name].double() for model in given.values()]).mean(0)
            torch.testing.assert_close(value.double(), expected, atol=1e-7, rtol=1e-6)
    for id, model in given.items():
        assert model is not average
        for name, value in model.state_dict().items():
            assert torch.equal(value, before[id][name])


def test_the_weighted_average():
    states = {"a": {"w": torch.tensor([0.0])}, "b": {"w": torch.tensor([4.0])}}
    assert federated_avg(states, {"a": 3, "b": 1})["w"].item() == 1.0
    assert federated_avg(states)["w"].item() == 2.0


def test_the_order_of_arrival_does_not_change_a_bit():
    given = models(4)
    forward = federated_avg(given, copy=True).state_dict()
    backward = federated_avg(dict(reversed(given.items()))).state_dict()
    assert all(torch.equal(forward[name], backward[name]) for name in forward)


def test_integer_buffers_are_the_first_workers():
    states = {
        "b": {"steps": torch.tensor(9), "on": torch.tensor(False), "w": torch.ones(1)},
        "a": {"steps": torch.tensor(5), "on": torch.tensor(True), "w": torch.zeros(1)},
    }
    average = federated_avg(states)
    assert average["steps"].item() == 5
    assert average["on"].item() is True
    assert average["w"].item() == 0.5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_accumulates_in_single(dtype):
    count = 3000  # in half precision the sum would stop growing at 2048 (256 for bfloat16)
    average = StreamingAverage()
    for _ in range(count):
        average.add({"w": torch.ones(2, dtype=dtype)})
    result = average.result()["w"]
    assert result.dtype == dtype
    assert torch.equal(result, torch.ones(2, dtype=dtype))


def test_complex_parameters_are_averaged():
    states = {"a": {"w": torch.tensor([1 + 1j])}, "b": {"w": torch.tensor([3 - 1j])}}
    assert federated_avg(states)["w"].item() == 2 + 0j


def test_tied_and_frozen_parameters_stay_so():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(5, 4)
            self.out = nn.Linear(4, 5, bias=False)
            self.out.weight = self.embed.weight
            self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)

    average = federated_avg({"a": Tied(), "b": Tied()})
    assert average.out.weight is average.embed.weight
    assert not average.frozen.requires_grad


def test_one_model_is_its_own_average():
    model = seeded_classifier()
    average = federated_avg({"a": model})
    assert all(torch.equal(value, average.state_dict()[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("states", "weights", "says"),
    [
        ({}, None, "at least one"),
        ({"a": {"w": torch.ones(1)}, "b": {"v": torch.ones(1)}}, None, "these differ: v, w"),
        ({"a": {"w": torch.ones(1)}, "b": {"w": torch.ones(2)}}, None, "same shapes"),
        ({"a": {"w": torch.ones(1)}, "b": {"w": torch.ones(1).double()}}, None, "same shapes and dtypes"),
        ({"a": {"w": torch.ones(1)}}, {"b": 1}, "no weight for a"),
        ({"a": {"w": torch.ones(1)}}, {"a": 0}, "positive"),
        ({"a": {"w": torch.ones(1)}}, {"a": float("nan")}, "positive"),
        ({"a": {"w": torch.ones(1)}}, {"a": -1.0}, "positive"),
    ],
)
def test_what_cannot_be_averaged(states, weights, says):
    with pytest.raises(OptionError, match=says):
        federated_avg(states, weights)


def test_an_empty_average_has_no_result():
    with pytest.raises(OptionError, match="nothing to average"):
        StreamingAverage().result()

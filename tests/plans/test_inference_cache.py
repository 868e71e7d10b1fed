"""What is kept of how ops look does not grow with what somebody writes as their arguments."""

import pytest
import torch

from planrt.plans.analysis import effects
from planrt.plans.running import inference


class _Operand(effects.Operand):
    __slots__ = ("_spec",)

    def __init__(self, *shape):
        self._spec = inference.Spec.of(torch.ones(*shape))


LONG = {
    "a list": ("Tensor.__getitem__", torch.Tensor.__getitem__, lambda: (_Operand(3), [0] * 2_000)),
    "a list of lists": (
        "Tensor.__getitem__",
        torch.Tensor.__getitem__,
        lambda: (_Operand(3), [[0] * 40] * 40),
    ),
    "a text": ("torch.einsum", torch.einsum, lambda: (" " * 2_000 + "i->i", _Operand(3))),
}


@pytest.mark.parametrize("name", LONG)
def test_long_arguments_are_not_kept(name):
    op, function, arguments = LONG[name]
    inference._cache.clear()
    effects.forget()
    assert inference.infer(op, function, arguments(), {}, _Operand) is not None
    effects.effect(op, arguments(), {})
    assert not inference._cache
    assert not effects._cache


def test_short_ones_are():
    inference._cache.clear()
    effects.forget()
    inference.infer("torch.add", torch.add, (_Operand(3), 1), {}, _Operand)
    effects.effect("torch.add", (_Operand(3), 1), {})
    assert len(inference._cache) == len(effects._cache) == 1

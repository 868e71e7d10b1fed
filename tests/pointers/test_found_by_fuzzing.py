"""What `fuzz/` found, through the calls a user would write."""

import pytest
import torch


def test_gradients_that_autograd_knows_to_be_zero(bob):
    """Such a gradient has no memory (a "ZeroTensor"): it can be fetched all the same."""
    for function in (torch.sgn, torch.Tensor.sgn):
        here = torch.tensor([1.0, -2.0], requires_grad=True)
        there = here.detach().clone().requires_grad_().send(bob)
        for x in (here, there):
            function(x).sum().backward()
        assert there.grad.clone().get().tolist() == here.grad.clone().tolist() == [0.0, 0.0]
        assert there.get().grad.clone().tolist() == [0.0, 0.0]


@pytest.mark.parametrize("name", ["lstm", "gru", "rnn_tanh", "rnn_relu"])
def test_recurrent_kernels_get_as_many_weights_as_they_read(bob, name):
    """Without the check the first of these ends the process, and others read past their lists."""
    function, gates = getattr(torch, name), {"lstm": 4, "gru": 3}.get(name, 1)
    x = torch.randn(2, 3, 5).send(bob)

    def states(layers, batch=2, size=4):
        one = torch.zeros(layers, batch, size).send(bob)
        return [one, one.clone()] if name == "lstm" else one

    def weights(layers, size=4):
        made = []
        for layer in range(layers):
            width = 5 if layer == 0 else size
            made += [(gates * size, width), (gates * size, size), (gates * size,), (gates * size,)]
        return [torch.randn(shape).send(bob) for shape in made]

    rest = (0.0, False, False, True)
    result = function(x, states(2), weights(2), True, 2, *rest)[0]
    assert result.get().shape == (2, 3, 4)
    for wrong in (
        (states(4), [], True, 4),
        (states(1), weights(2), True, 2),
        (states(2), weights(1), True, 2),
        (states(2), weights(2), True, 0),
        (states(2, batch=7), weights(2), True, 2),
        (states(2, size=9), weights(2), True, 2),
        (states(2), weights(2), False, 2),
    ):
        with pytest.raises(Exception, match=f"{name} takes"):
            torch.as_tensor(function(x, *wrong, *rest)[0].get())
    assert bob.objects_count() > 0  # it is there still

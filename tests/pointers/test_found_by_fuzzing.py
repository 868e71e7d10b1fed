"""What `fuzz/` found, through the calls a user would write."""

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

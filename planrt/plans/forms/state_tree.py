"""Tensors in a tree of modules, under their dotted names: what `state_dict` then returns."""

from __future__ import annotations

from collections.abc import Mapping

import torch


def hold(module: torch.nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Puts each tensor where its name says, making the modules on the way.

    Tensors that require gradients become parameters, others buffers; `nn.Parameter`s stay what they are.
    """
    for path, tensor in tensors.items():
        *parents, name = path.split(".")
        place = module
        for parent in parents:
            child = place._modules.get(parent)
            if child is None:
                child = place._modules[parent] = torch.nn.Module()
            place = child
        if isinstance(tensor, torch.nn.Parameter):
            place._parameters[name] = tensor
        elif tensor.requires_grad:
            place._parameters[name] = tensor  # type: ignore[assignment]  # a parameter but for its class
        else:
            place._buffers[name] = tensor

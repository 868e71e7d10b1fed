"""`PlanState`: the tensors that a plan of a function keeps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from planrt.errors import PlanArgumentError


class PlanState(torch.nn.Module):
    """Tensors that a function plan keeps: ``func2plan(state=(t,))``. The function gets it as its last
    argument."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        super().__init__()
        for index, tensor in enumerate(tensors):
            if not isinstance(tensor, torch.Tensor):
                raise PlanArgumentError(f"state holds tensors, not {type(tensor).__name__} (item {index})")
            if tensor.requires_grad and tensor.is_leaf:
                self._parameters[str(index)] = tensor  # type: ignore[assignment]  # a parameter but for its class
            else:
                self._buffers[str(index)] = tensor.detach()

    def read(self) -> list[torch.Tensor]:
        """Returns the tensors, in the order in which they were given."""
        held: dict[str, Any] = {**self._parameters, **self._buffers}
        return [held[key] for key in sorted(held, key=int)]

    def tensors(self) -> list[torch.Tensor]:
        """Returns the same tensors as `read`."""
        return self.read()

    def __len__(self) -> int:
        return len(self._parameters) + len(self._buffers)

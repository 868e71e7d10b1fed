"""Which overload of an ATen operation does the same out of place, or without ``out=``."""

from __future__ import annotations

from typing import Any

import torch

from planrt.sharing.kernels.table import no_protocol


def out_of_place(func: Any, kernel: str) -> Any:
    """Returns the operation that `func` is in place.

    Raises:
        SharingError: there is none.
    """
    packet = getattr(torch.ops.aten, kernel, None)
    names = [] if packet is None else packet.overloads()
    for name in (func._overloadname, "Tensor", "int"):
        if name in names:
            return getattr(packet, name)
    raise no_protocol(kernel, f"{kernel}_")


def without_out(func: Any) -> Any:
    """Returns the overload that takes what `func` takes, but for ``out=``."""
    packet, taken = func.overloadpacket, _takes(func)
    others = (getattr(packet, name) for name in packet.overloads())
    return next(one for one in others if one is not func and _takes(one) == taken)


def _takes(func: Any) -> list[tuple[str, str]]:
    return [(one.name, str(one.type)) for one in func._schema.arguments if not one.is_out]

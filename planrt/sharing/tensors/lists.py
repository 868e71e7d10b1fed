"""Operations on lists of tensors, `torch._foreach_*`, as the same on one after the other: calls that do not depend on
each other share their rounds anyway.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

_SCALED = ("addcmul", "addcdiv")
"""Their last argument is a keyword of the operation on one."""


def of_each(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any] | None:
    """Runs ``_foreach_`` + an operation of ATen; in place it returns None, as torch's."""
    in_place = name.endswith("_")
    single = name.removeprefix("_foreach_")
    missing = in_place and not hasattr(
        torch.ops.aten, single
    )  # torch has no maximum_ of one tensor, for instance
    function = getattr(torch.ops.aten, single.removesuffix("_") if missing else single)

    def nth(value: Any, number: int) -> Any:
        return value[number] if isinstance(value, list | tuple) else value

    made = []
    for number in range(len(args[0])):
        given = [nth(one, number) for one in args]
        options = {key: nth(one, number) for key, one in kwargs.items()}
        if single.removesuffix("_") in _SCALED and len(given) > 3:
            options["value"] = given.pop()
        result = function(*given, **options)
        made.append(args[0][number].copy_(result) if missing else result)
    return None if in_place else made

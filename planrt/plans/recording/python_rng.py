"""Random numbers that a plan cannot draw: Python's and NumPy's. A recorded function that draws them is found
out."""

from __future__ import annotations

import random
import sys
from typing import Any, Final

INSTEAD: Final = "draw with torch.rand(()) and choose with torch.where, which a plan does anew at every run"


class Draws:
    """A watch over Python's and NumPy's own generators: `found` tells whose were drawn from since it was
    made."""

    def __init__(self) -> None:
        self._python, self._numpy = _python(), _numpy()

    def found(self) -> str | None:
        """Returns whose random numbers were drawn; None where nobody's were."""
        if _python() != self._python:
            return "Python's random numbers (random.random() and its kin)"
        if _numpy() != self._numpy:
            return "NumPy's random numbers (numpy.random)"
        return None


def why_not(whose: str) -> str:
    """Explains why a plan cannot draw random numbers of theirs, and what to write."""
    return f"the function draws {whose}, and a plan would freeze what it drew: {INSTEAD}"


def generator_state(value: Any) -> Any:
    """Returns the state of a random generator of Python or NumPy that a module or function holds; None for
    anything else."""
    if isinstance(value, random.Random):
        return hash(value.getstate())
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        if isinstance(value, numpy.random.Generator):
            return repr(value.bit_generator.state)
        if isinstance(value, numpy.random.RandomState):
            return _legacy(value.get_state(legacy=False))
    return None


def _python() -> int:
    return hash(random.getstate())


def _numpy() -> Any:
    numpy = sys.modules.get("numpy")
    return None if numpy is None else _legacy(numpy.random.get_state(legacy=False))


def _legacy(state: dict[str, Any]) -> Any:
    key = state["state"]
    return key["key"].tobytes(), key["pos"], state["has_gauss"], state["gauss"]

"""Robust averages: what a round can make of its states where some workers send whatever they like.

Each is a small pure function over the states of a round, `coordinate_median`, `trimmed_mean`, `krum` and
`multi_krum`, and an `Aggregation` of the same name for ``RoundScheduler(aggregation=...)``. They count every worker
the same, and hold all states of a round at once. States are mappings of tensors by name, all with the same names,
shapes and dtypes; the result has them too. Entries of whole numbers and of bools are those of the first state; of
Krum's of the first state that it takes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from planrt.errors import OptionError
from planrt.fl.averaging import Aggregation, StreamingAverage
from planrt.fl.options import whole

State = Mapping[str, torch.Tensor]


def coordinate_median(states: Sequence[State]) -> dict[str, torch.Tensor]:
    """Returns the median of each coordinate; of an even number of states the mean of the middle two.

    Yin, Chen, Ramchandran and Bartlett, "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates",
    ICML 2018 (arXiv:1803.01498), algorithm 1, option I. It stands less than half of the workers.

    Raises:
        OptionError: no states.
    """
    _at_least(1, states, "the coordinate median")
    low, high = (len(states) - 1) // 2, len(states) // 2
    return _by_coordinate(states, lambda ordered: (ordered[low] + ordered[high]) / 2)


def trimmed_mean(states: Sequence[State], trim: int) -> dict[str, torch.Tensor]:
    """Returns the mean of each coordinate without its `trim` smallest and its `trim` largest values.

    Yin et al., ICML 2018 (arXiv:1803.01498), algorithm 1, option II, where `trim` is beta times the number of
    workers. It stands `trim` workers.

    Raises:
        OptionError: fewer than 2 * `trim` + 1 states.
    """
    _at_least(2 * trim + 1, states, f"a trimmed mean of trim={trim}")
    return _by_coordinate(states, lambda ordered: ordered[trim : len(states) - trim].mean(dim=0))


def krum_scores(states: Sequence[State], byzantine: int) -> list[float]:
    """Returns Krum's score of each state: the sum of its squared Euclidean distances to the n - `byzantine` - 2 states
    that are nearest to it. The lower, the more of the others agree with it.

    Raises:
        OptionError: fewer than 2 * `byzantine` + 3 states.
    """
    _at_least(2 * byzantine + 3, states, f"Krum with byzantine={byzantine}")
    count = len(states)
    squares = torch.zeros(count, count, dtype=torch.float64)
    for name, first in states[0].items():
        if first.is_floating_point() or first.is_complex():
            for one in range(count):
                for other in range(one + 1, count):
                    wide = torch.promote_types(first.dtype, torch.float32)
                    away = states[one][name].to(wide) - states[other][name].to(wide)
                    squares[one, other] += (
                        torch.linalg.vector_norm(
                            torch.view_as_real(away) if away.is_complex() else away, dtype=torch.float64
                        )
                        ** 2
                    )
    squares = torch.nan_to_num(squares + squares.T, nan=torch.inf, posinf=torch.inf)
    squares.fill_diagonal_(torch.inf)  # a state is no neighbour of its own
    nearest = squares.sort(dim=1).values[:, : count - byzantine - 2]
    return [float(score) for score in nearest.sum(dim=1)]


def krum(states: Sequence[State], byzantine: int) -> dict[str, torch.Tensor]:
    """Returns the one state with the lowest of the `krum_scores`; of equals, the first.

    Blanchard, El Mhamdi, Guerraoui and Stainer, "Machine Learning with Adversaries: Byzantine Tolerant Gradient
    Descent", NeurIPS 2017, section 4. It stands `byzantine` workers.

    Raises:
        OptionError: fewer than 2 * `byzantine` + 3 states.
    """
    scores = krum_scores(states, byzantine)
    return dict(states[scores.index(min(scores))])


def multi_krum(states: Sequence[State], byzantine: int, keep: int | None = None) -> dict[str, torch.Tensor]:
    """Returns the mean of the `keep` states with the lowest `krum_scores`; by default n - `byzantine` - 2.

    Blanchard et al., NeurIPS 2017, section 5; that `keep` must be at most n - `byzantine` - 2 is from El Mhamdi,
    Guerraoui and Rouault, "The Hidden Vulnerability of Distributed Learning in Byzantium", ICML 2018
    (arXiv:1802.07927).

    Raises:
        OptionError: fewer than 2 * `byzantine` + 3 states, or `keep` is out of range.
    """
    scores = krum_scores(states, byzantine)
    most = len(states) - byzantine - 2
    keep = most if keep is None else keep
    if not 1 <= keep <= most:
        raise OptionError(
            f"multi-Krum of {len(states)} states, {byzantine} of them bad, keeps 1 to {most}, not {keep}"
        )
    best = sorted(sorted(range(len(states)), key=lambda index: scores[index])[:keep])
    average = StreamingAverage()
    for index in best:  # in the order of the states, so that equal rounds have equal bits
        average.add(states[index])
    return average.result()


def _at_least(count: int, states: Sequence[State], what: str) -> None:
    if len(states) < count:
        raise OptionError(f"{what} needs at least {count} workers that count, and there are {len(states)}")


def _by_coordinate(
    states: Sequence[State], of: Callable[[torch.Tensor], torch.Tensor]
) -> dict[str, torch.Tensor]:
    """`of` gets all values of an entry, [states, ...], each coordinate in ascending order."""
    result = {}
    for name, first in states[0].items():
        if first.is_complex():
            parts = torch.stack([torch.view_as_real(state[name].resolve_conj()) for state in states])
            result[name] = torch.view_as_complex(of(parts.sort(dim=0).values).contiguous())
        elif first.is_floating_point():
            wide = torch.promote_types(first.dtype, torch.float32)
            values = torch.stack([state[name].to(wide) for state in states])
            result[name] = of(values.sort(dim=0).values).to(first.dtype)
        else:
            result[name] = first
    return result


class _Gathering:
    """An aggregation that gathers all states of a round, and makes one of them at its end."""

    fewest = 1
    """How many workers it takes."""

    def init(self) -> list[State]:
        """Returns no states."""
        return []

    def add(self, states: list[State], entries: dict[str, torch.Tensor], weight: float) -> list[State]:
        """Adds one worker's state.

        Raises:
            OptionError: the round is weighted.
        """
        if weight != 1.0:
            raise OptionError(f"{type(self).__name__} counts every worker the same: leave weighted=True out")
        states.append(entries)
        return states

    def __repr__(self) -> str:
        options = ", ".join(f"{name}={value}" for name, value in vars(self).items() if name != "fewest")
        return f"{type(self).__name__}({options})"


class CoordinateMedian(_Gathering):
    """The aggregation of `coordinate_median`."""

    def result(self, states: list[State]) -> dict[str, torch.Tensor]:
        """Returns the median of each coordinate."""
        return coordinate_median(states)


class TrimmedMean(_Gathering):
    """The aggregation of `trimmed_mean`: without the `trim` smallest and largest values of each coordinate."""

    def __init__(self, trim: int) -> None:
        self.trim = whole("trim", trim, at_least=0)
        self.fewest = 2 * self.trim + 1

    def result(self, states: list[State]) -> dict[str, torch.Tensor]:
        """Returns the trimmed mean of each coordinate."""
        return trimmed_mean(states, self.trim)


class Krum(_Gathering):
    """The aggregation of `krum`, for rounds with up to `byzantine` bad workers."""

    def __init__(self, byzantine: int) -> None:
        self.byzantine = whole("byzantine", byzantine, at_least=0)
        self.fewest = 2 * self.byzantine + 3

    def result(self, states: list[State]) -> dict[str, torch.Tensor]:
        """Returns the state that most others agree with."""
        return krum(states, self.byzantine)


class MultiKrum(_Gathering):
    """The aggregation of `multi_krum`, for rounds with up to `byzantine` bad workers; it keeps `keep` states."""

    def __init__(self, byzantine: int, keep: int | None = None) -> None:
        self.byzantine = whole("byzantine", byzantine, at_least=0)
        self.keep = None if keep is None else whole("keep", keep, at_least=1)
        self.fewest = max(2 * self.byzantine + 3, self.byzantine + 2 + (self.keep or 0))

    def result(self, states: list[State]) -> dict[str, torch.Tensor]:
        """Returns the mean of the states that most others agree with."""
        return multi_krum(states, self.byzantine, self.keep)


def aggregation_called(text: str) -> Aggregation[Any] | None:
    """Returns the aggregation that a command's option names: "mean" (None), "median", "trimmed-mean:N", "krum:N" or
    "multi-krum:N", where N is how many bad workers it stands.

    Raises:
        OptionError: another text.
    """
    name, colon, number = text.partition(":")
    kinds: dict[str, Callable[[int], Aggregation[Any]]] = {
        "trimmed-mean": TrimmedMean,
        "krum": Krum,
        "multi-krum": MultiKrum,
    }
    if text == "mean":
        return None
    if text == "median":
        return CoordinateMedian()
    if name in kinds and colon and number.isascii() and number.isdigit() and len(number) < 10:
        return kinds[name](int(number))
    raise OptionError(
        f"--aggregation {text!r}: use mean, median, trimmed-mean:N, krum:N or multi-krum:N, N is the number of workers "
        "that may be bad"
    )

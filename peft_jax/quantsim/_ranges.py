"""Ranges of grids from what calibration knows: one row of `METHODS` each. On the host, in numpy."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from peft_jax.quantsim._grid import last_code, scale_and_offset
from peft_jax.quantsim._statistics import HALF, Total, merge, of_array

HostArray = np.ndarray[Any, Any]

Ends = tuple[HostArray, HostArray]  # low and high

RATIOS = (np.arange(100, 0, -1) / 100).astype(np.float32)

AT_A_TIME = 2**16  # points that are quantized at a time: what comes in between fits a core's cache


def least_error_range(
    points: HostArray, weights: HostArray, ends: Ends, bitwidth: int, symmetric: bool
) -> Ends:
    """The range, of those tried, whose grid has the smallest mean squared error.

    Tried are the given one, extended to zero, times 1, 0.99, ... and 0.01; unless symmetric, then
    the upper end alone, times each of these, the lower end, and both once more. Of equal errors,
    the wider range counts.

    Args:
      points: float32 (C, P), values of C groups.
      weights: float32 (C, P), what part of the group each stands for: their sums are 1.
      ends: low and high of each group, float32 (C,).
      bitwidth: of the grid.
      symmetric: whether the grid is.

    Returns:
      low and high, float32 (C,).
    """
    low, high = np.minimum(ends[0], 0), np.maximum(ends[1], 0)
    step = max(1, AT_A_TIME // max(1, points.shape[1]))
    for start in range(0, len(points), step):
        part = slice(start, start + step)
        search = _Search(points[part], weights[part], bitwidth, symmetric)
        low[part], high[part] = search.best((low[part], high[part]))
    return low, high


@dataclasses.dataclass(frozen=True)
class _Search:
    """See `least_error_range`."""

    points: HostArray
    weights: HostArray
    bitwidth: int
    symmetric: bool

    def best(self, ends: Ends) -> Ends:
        ratios = [np.ones(len(self.points), np.float32) for _ in ends]
        for moved in ((0, 1),) if self.symmetric else ((0, 1), (1,), (0,), (1,), (0,)):
            chosen = self._best_ratio(ends, ratios, moved)
            ratios = [chosen if i in moved else ratio for i, ratio in enumerate(ratios)]
        return _times(ends, ratios)

    def _best_ratio(
        self, ends: Ends, ratios: Sequence[HostArray], moved: Sequence[int]
    ) -> HostArray:
        """For the ends that move, the ratio that suits each group; the other has its own."""
        least, chosen = np.full(len(self.points), np.inf), np.ones(len(self.points), np.float32)
        for tried in RATIOS:
            both = [tried if i in moved else ratio for i, ratio in enumerate(ratios)]
            error = self._error(_times(ends, both))
            better = error < least
            least[better], chosen[better] = error[better], tried
        return chosen

    def _error(self, ends: Ends) -> HostArray:
        """The mean squared error of each group's grid, in float64."""
        scale, offset = scale_and_offset(*ends, self.bitwidth, self.symmetric)
        ratio = self.points * (1 / scale)[:, None]
        away = np.rint(ratio)
        np.clip(away, offset[:, None], offset[:, None] + last_code(self.bitwidth), out=away)
        away -= ratio
        away *= away
        away *= self.weights
        return np.sum(away, -1).astype(np.float64) * np.square(scale.astype(np.float64))


def _times(ends: Ends, ratios: Sequence[Any]) -> Ends:
    low, high = (end * ratio for end, ratio in zip(ends, ratios, strict=True))
    return low, high


Ranges = tuple[HostArray, HostArray]  # low and high, float32 (L, C)

GROUPS = 1024  # whose histograms are read at a time


def _min_max(total: Total, bitwidth: int, symmetric: bool) -> Ranges:
    """From the smallest to the largest value."""
    return total["min"], total["max"]


def _percentile(total: Total, bitwidth: int, symmetric: bool, percentile: float) -> Ranges:
    """The range without ``(100 - percentile)%`` of the values at each end, rounded down.

    The ends are edges of the bins where the outermost values that are kept lie, and no farther out
    than values were: 100 is `_min_max`.
    """
    low, high = total["min"].copy(), total["max"].copy()
    for at, counts, unit in _histograms(total):
        upto = np.cumsum(counts, -1)
        count = upto[:, -1:]
        cut = np.floor(np.round(count * ((100 - percentile) / 100), 6)).astype(np.int64)
        first = np.sum(upto <= cut, -1) - HALF
        last = np.sum(upto < count - cut, -1) - HALF + 1
        low[at] = np.maximum(low[at], first * unit)
        high[at] = np.minimum(high[at], last * unit)
    return low, high


def _mse(total: Total, bitwidth: int, symmetric: bool) -> Ranges:
    """`least_error_range`, the values taken as the centres of their bins."""
    low, high = total["min"].copy(), total["max"].copy()
    for at, counts, unit in _histograms(total):
        ends = low[at], high[at]
        points, weights = _occupied(counts, unit, *ends)
        low[at], high[at] = least_error_range(points, weights, ends, bitwidth, symmetric)
    return low, high


def _occupied(
    counts: HostArray, unit: HostArray, low: HostArray, high: HostArray
) -> tuple[HostArray, HostArray]:
    """Centres of the bins that hold values, and their parts of all, in rows as long as the longest.

    No centre lies farther out than the values did.
    """
    rows, bins = np.nonzero(counts)
    filled = np.bincount(rows, minlength=len(counts))
    columns = np.arange(len(rows)) - np.repeat(np.cumsum(filled) - filled, filled)
    shape = (len(counts), int(np.max(filled, initial=0)))
    points, weights = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    points[rows, columns] = np.clip((bins - HALF + 0.5) * unit[rows], low[rows], high[rows])
    weights[rows, columns] = counts[rows, bins] / np.sum(counts, -1)[rows]
    return points, weights


def _histograms(total: Total) -> Iterator[tuple[Any, HostArray, HostArray]]:
    """Some groups with values at a time: where they are, counts (groups, BINS), widths of bins."""
    some = np.isfinite(total["min"])
    for layer in range(len(some)):
        groups = np.flatnonzero(some[layer])
        for start in range(0, len(groups), GROUPS):
            at = (layer, groups[start : start + GROUPS])
            yield at, total["counts"][at], np.ldexp(1.0, total["exponent"][at])


def _averaged(total: Total | None, state: Mapping[str, Any], momentum: float) -> Total:
    """Extremes, averaged: ``momentum * total + (1 - momentum) * batch``, batch by batch.

    The first batch of a group counts in full; groups that a batch does not reach stay as they are.
    """
    merged = merge("extremes", total, state)
    if total is None:
        return merged
    both = np.isfinite(total["min"]) & np.isfinite(np.asarray(state["min"]))
    for name in ("min", "max"):
        old, new = total[name][both], np.asarray(state[name])[both]
        merged[name][both] = old + (1 - momentum) * (new - old)
    return merged


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to choose ranges.

    Attributes:
      statistic: the kind that it needs.
      range: ``(total, bitwidth, symmetric, **settings)`` to low and high, float32 (L, C), for
        `scale_and_offset`; infinity and minus infinity where nothing was seen.
      accumulate: ``(total, state, **settings)`` to the sum with one more batch; the total before
        the first is None.
    """

    statistic: str
    range: Callable[..., Ranges]
    accumulate: Callable[..., Total]


METHODS: Mapping[str, Method] = {
    "min_max": Method("extremes", _min_max, functools.partial(merge, "extremes")),
    "percentile": Method("histogram", _percentile, functools.partial(merge, "histogram")),
    "mse": Method("histogram", _mse, functools.partial(merge, "histogram")),
    "moving_average": Method("extremes", _min_max, _averaged),
}


def range_of_array(
    method: str, groups: Any, bitwidth: int, symmetric: bool, **settings: Any
) -> Ranges:
    """The ranges for values known at once, such as a weight's, with memory for some groups only.

    Args:
      method: a row of `METHODS`.
      groups: (C, N) finite floats.
      bitwidth: of the grid.
      symmetric: whether the grid is.
      settings: of the method's ``range``.

    Returns:
      low and high, float32 (1, C).
    """
    row = METHODS[method]
    values = np.asarray(groups)
    parts = [values[start : start + GROUPS] for start in range(0, len(values), GROUPS)]
    ranges = [
        row.range(of_array(row.statistic, part), bitwidth, symmetric, **settings) for part in parts
    ]
    low, high = (np.concatenate(ends, 1) for ends in zip(*ranges, strict=True))
    return low, high

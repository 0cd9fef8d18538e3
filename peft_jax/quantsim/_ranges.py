"""Ranges of grids from what calibration knows: one row of `METHODS` each. On the host, in numpy."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from peft_jax.quantsim._least_error import least_error_range
from peft_jax.quantsim._statistics import HALF, HostArray, Total, merge, of_array

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

"""The search for ranges whose grids have the smallest mean squared error. On the host, in numpy."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from peft_jax.quantsim._grid import last_code, scale_and_offset

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

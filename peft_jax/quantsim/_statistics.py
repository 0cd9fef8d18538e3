"""What calibration knows of the values seen. Arrays only.

Statistics are gathered by ``fold`` on devices, batch by batch, and summed up by ``merge`` on the
host; the sum does not depend on how values were split into batches, nor on their order. A state is
a dict of arrays, for the L layers of a stack and C groups of values in each:

=========== ================ ====================================================================
``min``     float32 (L, C)   the smallest finite value; infinity where there was none
``max``     float32 (L, C)   the largest one; minus infinity
``finite``  bool (L,)        whether all values were finite; those that were not are left out
``seen``    bool (L,)        whether there were values
``counts``  (L, C, BINS)     how many lay in each bin; int32 on devices, int64 in sums
``exponent`` int32 (L, C)    bin i holds ``i - BINS / 2 <= value / 2**exponent < i + 1 - BINS / 2``
=========== ================ ====================================================================

The last two belong to histograms only. The exponent is the smallest one, from -126 on, for which
``2**exponent * BINS / 2`` exceeds every magnitude; bins of an older, smaller one are joined.
Magnitudes below 2**-126, which most devices flush to zero, count as zeros.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array
HostArray = np.ndarray[Any, Any]
State = dict[str, Array]
Total = dict[str, HostArray]

BINS = 4096
HALF = BINS // 2
SMALLEST = float(np.finfo(np.float32).tiny)  # 2**-126
LOWEST_EXPONENT = -126
FARTHEST = BINS.bit_length()  # joining 2**FARTHEST bins leaves nothing to join


# --- On devices ----------------------------------------------------------------------------------


def empty(kind: str, layers: int, groups: int) -> State:
    """The state before any value: of "extremes" or of a "histogram"."""
    return STATISTICS[kind].empty(layers, groups)


def fold(kind: str, state: State, index: Any, values: Array) -> State:
    """The state with the values of one layer added, for instance inside ``jax.jit``.

    Args:
      kind: "extremes" or "histogram".
      state: from `empty` or `fold`.
      index: int32, which layer.
      values: (C, N) floats; read as float32.
    """
    if values.size == 0:
        return state
    return STATISTICS[kind].fold(state, jnp.asarray(index), values.astype(jnp.float32))


def _empty_extremes(layers: int, groups: int) -> State:
    return {
        "min": jnp.full((layers, groups), jnp.inf, jnp.float32),
        "max": jnp.full((layers, groups), -jnp.inf, jnp.float32),
        "finite": jnp.ones((layers,), bool),
        "seen": jnp.zeros((layers,), bool),
    }


def _empty_histogram(layers: int, groups: int) -> State:
    return _empty_extremes(layers, groups) | {
        "counts": jnp.zeros((layers, groups, BINS), jnp.int32),
        "exponent": jnp.full((layers, groups), LOWEST_EXPONENT, jnp.int32),
    }


def _fold_extremes(state: State, index: Array, values: Array) -> State:
    finite = jnp.isfinite(values)
    low = jnp.min(jnp.where(finite, values, jnp.inf), 1)
    high = jnp.max(jnp.where(finite, values, -jnp.inf), 1)
    return state | {
        "min": state["min"].at[index].min(low),
        "max": state["max"].at[index].max(high),
        "finite": state["finite"].at[index].set(state["finite"][index] & jnp.all(finite)),
        "seen": state["seen"].at[index].set(True),
    }


def _fold_histogram(state: State, index: Array, values: Array) -> State:
    usable = jnp.isfinite(values)
    numbers = jnp.where(usable & (jnp.abs(values) >= SMALLEST), values, 0)
    older = state["exponent"][index]
    exponent = jnp.maximum(older, _exponent(jnp.max(jnp.abs(numbers), 1)))
    factor = jax.lax.bitcast_convert_type((127 - exponent) << 23, jnp.float32)  # 2**-exponent
    place = jnp.floor(numbers * factor[:, None])
    place = jnp.where(numbers < 0, jnp.minimum(place, -1), place)  # products may underflow to zero
    bins = jnp.where(usable, place.astype(jnp.int32) + HALF, BINS)
    counts = jax.lax.cond(
        jnp.any(exponent > older), _joined, lambda c, _: c, state["counts"][index], exponent - older
    )
    return _fold_extremes(state, index, values) | {
        "counts": state["counts"].at[index].set(_added(counts, bins, 1)),
        "exponent": state["exponent"].at[index].set(exponent),
    }


def _exponent(peak: Array) -> Array:
    """The smallest exponent of bins for this largest magnitude, read from its bits."""
    above = ((jax.lax.bitcast_convert_type(peak, jnp.int32) >> 23) & 255) - 126  # peak < 2**above
    return jnp.maximum(above - (HALF.bit_length() - 1), LOWEST_EXPONENT)


def _joined(counts: Array, apart: Array) -> Array:
    """Counts of (C, BINS) for bins that are ``2**apart`` times as wide."""
    steps = jnp.minimum(apart, FARTHEST)[:, None]
    bins = ((jnp.arange(BINS)[None] - HALF) >> steps) + HALF
    return _added(jnp.zeros_like(counts), bins, counts)


def _added(counts: Array, bins: Array, amounts: Any) -> Array:
    """Counts of (C, BINS) with amounts added to the bins of each row; bins beyond are left out."""
    rows = jnp.arange(counts.shape[0])[:, None]
    return counts.at[rows, bins].add(amounts, mode="drop")


# --- On the host ---------------------------------------------------------------------------------


def merge(kind: str, total: Total | None, state: Mapping[str, Any]) -> Total:
    """Two states or sums as one; in any order and grouping, the result is the same.

    Args:
      kind: "extremes" or "histogram".
      total: from `merge` or `of_array`; None before the first.
      state: what comes from devices, or another sum.

    Raises:
      ValueError: where a batch had so many values in one bin that an int32 did not hold them.
    """
    return STATISTICS[kind].merge(total, {name: np.asarray(value) for name, value in state.items()})


def _merge_extremes(total: Total | None, state: Total) -> Total:
    if total is None:
        return dict(state)
    return {
        "min": np.minimum(total["min"], state["min"]),
        "max": np.maximum(total["max"], state["max"]),
        "finite": total["finite"] & state["finite"],
        "seen": total["seen"] | state["seen"],
    }


def _merge_histogram(total: Total | None, state: Total) -> Total:
    if np.any(state["counts"] < 0):
        raise ValueError(
            "A batch had 2**31 values or more in one bin of a histogram, more than int32 counts. "
            "Calibrate on smaller batches."
        )
    if total is None:
        return state | {"counts": state["counts"].astype(np.int64)}
    exponent = np.maximum(total["exponent"], state["exponent"])
    counts = sum(_joined_on_host(of["counts"], exponent - of["exponent"]) for of in (total, state))
    extremes = _merge_extremes(total, state)
    return extremes | {"counts": np.asarray(counts), "exponent": exponent}


def _joined_on_host(counts: HostArray, apart: HostArray) -> HostArray:
    joined = counts.astype(np.int64)
    for at in zip(*np.nonzero(apart), strict=True):
        bins = ((np.arange(BINS) - HALF) >> min(int(apart[at]), FARTHEST)) + HALF
        starts = np.flatnonzero(np.diff(bins, prepend=-1))
        row = np.add.reduceat(joined[at], starts)
        joined[at] = 0
        joined[at][bins[starts]] = row
    return joined


def of_array(kind: str, groups: Any) -> Total:
    """The sum for values known at once: (C, N) floats, as those of one layer."""
    values = np.asarray(groups, np.float32)
    finite = np.isfinite(values)
    total = {
        "min": np.min(values, 1, initial=np.inf, where=finite)[None],
        "max": np.max(values, 1, initial=-np.inf, where=finite)[None],
        "finite": np.array([finite.all()]),
        "seen": np.array([values.size > 0]),
    }
    if kind == "extremes":
        return total
    values = np.where(finite & (np.abs(values) >= SMALLEST), values, np.float32(0))
    _, above = np.frexp(np.max(np.abs(values), 1, initial=SMALLEST / 2))
    exponent = np.maximum(above - (HALF.bit_length() - 1), LOWEST_EXPONENT).astype(np.int32)
    place = np.floor(np.ldexp(values.astype(np.float64), -exponent[:, None])).astype(np.int64)
    rows = np.arange(len(values))[:, None] * BINS
    counts = np.bincount((place + HALF + rows)[finite], minlength=len(values) * BINS)
    return total | {"counts": counts.reshape(1, -1, BINS), "exponent": exponent[None]}


@dataclasses.dataclass(frozen=True)
class Statistic:
    """How one kind of statistic is gathered; see `empty`, `fold` and `merge`."""

    empty: Callable[[int, int], State]
    fold: Callable[[State, Array, Array], State]
    merge: Callable[[Total | None, Total], Total]


STATISTICS: Mapping[str, Statistic] = {
    "extremes": Statistic(_empty_extremes, _fold_extremes, _merge_extremes),
    "histogram": Statistic(_empty_histogram, _fold_histogram, _merge_histogram),
}

"""Weights made of several: sums, complex pairs, stacks and concatenations stay lazy."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any

import jax.numpy as jnp
import numpy as np

from peft_jax._numerics.lazy.dense import settled
from peft_jax._numerics.lazy.views import Bind, View, multiplied_by, rebuilt, scaled
from peft_jax._numerics.lazy.weight import Factor, LazyWeight, Part


def added(left: Any, right: Any, bind: Bind, *, subtract: bool = False, **_: Any) -> View:
    """The sum of two weights.

    That of a weight and an array is no view: ``x + positions[:n]`` would make activations lazy.
    """
    if not (isinstance(left, LazyWeight) and isinstance(right, LazyWeight)):
        return None
    left, right = settled(left), settled(right)
    base = bind(left.base, right.base)
    right = scaled(right, right.base, lambda value: -value) if subtract else right
    return LazyWeight(base, (*left.parts, *right.parts))


def complex_(left: Any, right: Any, bind: Bind, **_: Any) -> View:
    """A complex weight from its real and its imaginary part, either of which may be an array."""
    weights = [settled(x) if isinstance(x, LazyWeight) else x for x in (left, right)]
    base = bind(*(x.base if isinstance(x, LazyWeight) else x for x in weights))
    parts: list[Part] = []
    for weight, unit in zip(weights, (1.0, 1j), strict=True):
        if isinstance(weight, LazyWeight):
            by = np.asarray(unit, base.dtype if unit == 1j else weight.dtype)
            times_by = functools.partial(multiplied_by, other=by)
            parts += scaled(weight, weight.base, times_by).parts
    return LazyWeight(base, tuple(parts))


def stack(operands: Iterable[Any], bind: Bind, *, axis: int, **_: Any) -> View:
    """Weights along a new axis, and arrays between them."""
    operands = [settled(x) if isinstance(x, LazyWeight) else x for x in operands]
    base = bind(*(x.base if isinstance(x, LazyWeight) else x for x in operands))
    parts: list[Part] = []
    for i, operand in enumerate(operands):
        if isinstance(operand, LazyWeight):
            for part in _expanded(operand, axis).parts:
                window = (*part.window[:axis], (i, i + 1), *part.window[axis + 1 :])
                parts.append(dataclasses.replace(part, window=window))
    return LazyWeight(base, tuple(parts))


def _expanded(weight: LazyWeight, axis: int) -> LazyWeight:
    """The weight with a new axis of length 1."""

    def change(factor: Factor) -> Factor:
        return Factor(factor.value, tuple(i + (i >= axis) for i in factor.axes))

    made_of: list[tuple[int, ...]] = [(i,) for i in range(weight.ndim)]
    made_of.insert(axis, ())
    expanded = rebuilt(weight, jnp.expand_dims(weight.base, axis), change, made_of)
    assert expanded is not None
    return expanded


def concatenate(operands: Iterable[Any], bind: Bind, *, dimension: int, **_: Any) -> View:
    """Weights side by side, and arrays between them: each parameter fills a window."""
    operands = [settled(x) if isinstance(x, LazyWeight) else x for x in operands]
    base = bind(*(x.base if isinstance(x, LazyWeight) else x for x in operands))
    parts: list[Part] = []
    start = 0
    for operand in operands:
        length = operand.shape[dimension]
        if isinstance(operand, LazyWeight):
            for part in operand.parts:
                low, high = part.window[dimension] or (0, length)
                window = list(part.window)
                window[dimension] = (start + low, start + high)
                parts.append(dataclasses.replace(part, window=tuple(window)))
        start += length
    return LazyWeight(base, tuple(parts))

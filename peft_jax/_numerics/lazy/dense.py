"""The dense sum of a lazy weight, and weights without windows or gains."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from peft_jax._numerics.einsum import widest
from peft_jax._numerics.lazy.weight import Factor, LazyWeight, Part, Scaled, Term, Window, named

Array = jax.Array


def dense(weight: LazyWeight | Scaled) -> Any:
    """The sum itself, in float32 or wider, rounded once to the dtype of the base."""
    if isinstance(weight, Scaled):
        return dense(weight.weight) * weight.other
    terms = [(part.window, term) for part in weight.parts for term in part.terms]
    if not terms and weight.gain is None:
        return weight.base
    total = weight.base.astype(widest(weight.dtype))
    if weight.gain is not None:
        total = total * placed(weight.gain, total.dtype, weight.ndim)
    for window, term in terms:
        total = total + _padded(_change(term, weight.ndim), window, weight.shape)
    return total.astype(weight.dtype)


def placed(factor: Factor, dtype: Any, ndim: int) -> Array:
    """A factor without a rank, to be multiplied with arrays of the view's axes."""
    missing = [axis for axis in range(ndim) if axis not in factor.axes]
    return jnp.expand_dims(factor.value[..., 0], missing).astype(dtype)


def settled(weight: LazyWeight) -> LazyWeight:
    """The same weight with its gain in the base, which is formed."""
    if weight.gain is None:
        return weight
    base = weight.base * placed(weight.gain, weight.dtype, weight.ndim)
    return LazyWeight(base, weight.parts)


def _change(term: Term, ndim: int) -> Array:
    """The summand, with axes of length 1 along which it is constant."""
    dtype = widest(term.a.value.dtype, term.b.value.dtype)
    change = jnp.einsum(
        f"{term.a.letters},{term.b.letters}->{named(sorted({*term.a.axes, *term.b.axes}))}",
        term.a.value.astype(dtype),
        term.b.value.astype(dtype),
        precision=jax.lax.Precision.HIGHEST,
    )
    missing = [axis for axis in range(ndim) if axis not in {*term.a.axes, *term.b.axes}]
    change = jnp.expand_dims(change, missing) * jnp.asarray(term.scaling, dtype)
    return change if term.gain is None else change * placed(term.gain, dtype, ndim)


def _padded(change: Array, window: tuple[Window, ...], shape: tuple[int, ...]) -> Array:
    """A summand with zeros outside of its window."""
    if all(part is None for part in window):
        return change
    lengths = [
        size if part is None else part[1] - part[0]
        for size, part in zip(shape, window, strict=True)
    ]
    change = jnp.broadcast_to(
        change,
        [
            n if part is not None else m
            for m, n, part in zip(change.shape, lengths, window, strict=True)
        ],
    )
    return jnp.pad(
        change,
        [
            (0, 0) if part is None else (part[0], size - part[1])
            for size, part in zip(shape, window, strict=True)
        ],
    )


def without_windows(weight: LazyWeight, axes: Sequence[int]) -> LazyWeight:
    """The same weight, whose terms reach over all of these axes, with zeros outside of windows."""
    parts = tuple(_filled(part, weight.shape, axes) for part in weight.parts)
    return dataclasses.replace(weight, parts=parts)


def _filled(part: Part, shape: tuple[int, ...], axes: Sequence[int]) -> Part:
    terms = part.terms
    for axis in axes:
        window = part.window[axis]
        if window is not None:
            pad = functools.partial(_fill, axis=axis, window=window, length=shape[axis])
            terms = tuple(pad(term) for term in terms)
    windows = tuple(None if i in axes else one for i, one in enumerate(part.window))
    return dataclasses.replace(part, terms=terms, window=windows)


def _fill(term: Term, *, axis: int, window: tuple[int, int], length: int) -> Term:
    if axis not in term.a.axes + term.b.axes:
        term = dataclasses.replace(term, b=with_axis(term.b, axis, window[1] - window[0]))

    def padded(factor: Factor) -> Factor:
        if axis not in factor.axes:
            return factor
        pad = [(0, 0)] * factor.value.ndim
        pad[factor.axes.index(axis)] = (window[0], length - window[1])
        return Factor(jnp.pad(factor.value, pad), factor.axes)

    gain = None if term.gain is None else padded(term.gain)
    return dataclasses.replace(term, a=padded(term.a), b=padded(term.b), gain=gain)


def with_axis(factor: Factor, axis: int, length: int) -> Factor:
    """The factor with this axis, along which it is constant if it lacked it."""
    if axis in factor.axes:
        return factor
    axes = tuple(sorted((*factor.axes, axis)))
    place = axes.index(axis)
    value = jnp.expand_dims(factor.value, place)
    shape = (*value.shape[:place], length, *value.shape[place + 1 :])
    return Factor(jnp.broadcast_to(value, shape), axes)

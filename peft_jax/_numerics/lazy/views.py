"""Views of lazy weights: what transposes, slices, reshapes, scales or joins them stays lazy.

Each function takes the operands of a JAX operation, its parameters and ``bind``, which runs the
operation on arrays. It returns a `LazyWeight` (or `Scaled`), or None if the result has no such form
and the operation needs the dense weight.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from peft_jax._numerics.einsum import common_dtype
from peft_jax._numerics.lazy.dense import settled, with_axis, without_windows
from peft_jax._numerics.lazy.weight import Factor, LazyWeight, Part, Scaled, Term, Window

Bind = Callable[..., Any]
View = LazyWeight | Scaled | None
Groups = list[tuple[list[int], list[int]]]

# --- Axes that move ------------------------------------------------------------------------------


def rebuilt(
    weight: LazyWeight,
    base: Any,
    change: Callable[[Factor], Factor | None],
    made_of: Sequence[Sequence[int]],
) -> LazyWeight | None:
    """A view of a view.

    Args:
      weight: the view.
      base: of the new view.
      change: what becomes of each factor; None if it has no form in the new view.
      made_of: for each axis of the new view, the axes of the old one that it is made of; axes with
        windows stay by themselves.
    """
    parts = []
    for part in weight.parts:
        terms = [new for term in part.terms if (new := term.map(change)) is not None]
        if len(terms) < len(part.terms):
            return None
        origin = tuple(tuple(o for i in axes for o in part.origin[i]) for axes in made_of)
        ranges = tuple(part.window[axes[0]] if axes else None for axes in made_of)
        parts.append(dataclasses.replace(part, origin=origin, window=ranges, terms=tuple(terms)))
    gain = None if weight.gain is None else change(weight.gain)
    if weight.gain is not None and gain is None:
        return None
    return LazyWeight(base, tuple(parts), gain)


def transpose(weight: LazyWeight, bind: Bind, *, permutation: Sequence[int], **_: Any) -> View:
    def change(factor: Factor) -> Factor:
        axes = tuple(j for j, i in enumerate(permutation) if i in factor.axes)
        order = [factor.axes.index(permutation[j]) for j in axes]
        return Factor(jnp.transpose(factor.value, [*order, factor.value.ndim - 1]), axes)

    return rebuilt(weight, bind(weight.base), change, [(i,) for i in permutation])


def squeeze(weight: LazyWeight, bind: Bind, *, dimensions: Sequence[int], **_: Any) -> View:
    weight = without_windows(weight, dimensions)
    kept = [i for i in range(weight.ndim) if i not in dimensions]

    def change(factor: Factor) -> Factor:
        gone = tuple(j for j, i in enumerate(factor.axes) if i in dimensions)
        axes = tuple(kept.index(i) for i in factor.axes if i in kept)
        return Factor(jnp.squeeze(factor.value, gone), axes)

    return rebuilt(weight, bind(weight.base), change, [(i,) for i in kept])


def broadcast_in_dim(
    weight: LazyWeight,
    bind: Bind,
    *,
    shape: Sequence[int],
    broadcast_dimensions: Sequence[int],
    **_: Any,
) -> View:
    stretched = [i for i, j in enumerate(broadcast_dimensions) if shape[j] != weight.shape[i]]
    weight = without_windows(weight, stretched)

    def change(factor: Factor) -> Factor:
        gone = tuple(j for j, i in enumerate(factor.axes) if i in stretched)
        axes = tuple(broadcast_dimensions[i] for i in factor.axes if i not in stretched)
        return Factor(jnp.squeeze(factor.value, gone), axes)

    made_of: list[tuple[int, ...]] = [()] * len(shape)
    for i, j in enumerate(broadcast_dimensions):
        made_of[j] = (i,)
    return rebuilt(weight, bind(weight.base), change, made_of)


def reshape(
    weight: LazyWeight, bind: Bind, *, new_sizes: Sequence[int], dimensions: Any = None, **_: Any
) -> View:
    """Axes may be split, or neighbours merged that belong to the same factor."""
    if dimensions is not None or 0 in weight.shape:
        return None
    groups = _groups(weight.shape, new_sizes)
    changed = [i for ins, outs in groups for i in ins if len(ins) != 1 or len(outs) != 1]
    weight = without_windows(weight, changed)
    varying = {axis for part in weight.parts for term in part.terms for axis in term.axes}
    varying |= set(weight.gain.axes if weight.gain else ())
    constant = set(range(weight.ndim)) - varying

    def change(factor: Factor) -> Factor | None:
        sizes: list[int] = []
        axes: list[int] = []
        for ins, outs in groups:
            long = {i for i in ins if weight.shape[i] != 1}
            if long & set(factor.axes):
                for axis in sorted(long & constant):  # along which nothing changes, as of a tile
                    factor = with_axis(factor, axis, weight.shape[axis])
            own = {i for i in ins if i in factor.axes}
            if long & own and not long <= own:
                return None  # the merged axis would belong to two factors
            if own and long <= own:  # axes of length 1 go with the factor that has the others
                kept = len(ins) == len(outs) == 1
                sizes += [length_of(factor, ins[0])] if kept else [new_sizes[j] for j in outs]
                axes += outs
        return Factor(factor.value.reshape(*sizes, factor.value.shape[-1]), tuple(axes))

    made_of: list[tuple[int, ...]] = [()] * len(new_sizes)
    for ins, outs in groups:
        for j in outs:
            made_of[j] = tuple(ins)
    return rebuilt(weight, bind(weight.base), change, made_of)


def length_of(factor: Factor, axis: int) -> int:
    """Length of one of the factor's axes, which is shorter than the view's inside a window."""
    return factor.value.shape[factor.axes.index(axis)]


def _groups(old: Sequence[int], new: Sequence[int]) -> Groups:
    """The shortest runs of neighbouring axes, of both shapes, that hold as many numbers."""
    groups: Groups = []
    i = j = 0
    while i < len(old) or j < len(new):
        ins, outs, left, right = [], [], 1, 1
        if i < len(old):
            ins.append(i)
            left, i = old[i], i + 1
        if j < len(new):
            outs.append(j)
            right, j = new[j], j + 1
        while left != right:
            if left < right:
                ins.append(i)
                left, i = left * old[i], i + 1
            else:
                outs.append(j)
                right, j = right * new[j], j + 1
        groups.append((ins, outs))
    return groups


def tile(weight: LazyWeight, bind: Bind, *, reps: Sequence[int], **_: Any) -> View:
    if len(reps) != weight.ndim:
        return None
    weight = without_windows(weight, [i for i, count in enumerate(reps) if count != 1])

    def change(factor: Factor) -> Factor:
        return Factor(jnp.tile(factor.value, [*(reps[i] for i in factor.axes), 1]), factor.axes)

    return rebuilt(weight, bind(weight.base), change, [(i,) for i in range(weight.ndim)])


def rev(weight: LazyWeight, bind: Bind, *, dimensions: Sequence[int], **_: Any) -> View:
    weight = without_windows(weight, dimensions)

    def change(factor: Factor) -> Factor:
        own = [j for j, i in enumerate(factor.axes) if i in dimensions]
        return Factor(jax.lax.rev(factor.value, own), factor.axes)

    return rebuilt(weight, bind(weight.base), change, [(i,) for i in range(weight.ndim)])


# --- A part of an axis ---------------------------------------------------------------------------


def slice_(
    weight: LazyWeight,
    bind: Bind,
    *,
    start_indices: Sequence[int],
    limit_indices: Sequence[int],
    strides: Sequence[int] | None,
    **_: Any,
) -> View:
    steps = strides or (1,) * weight.ndim
    weight = without_windows(weight, [i for i, step in enumerate(steps) if step != 1])
    parts = []
    for part in weight.parts:
        ranges = [
            (start, stop) if window is None else (max(start, window[0]), min(stop, window[1]))
            for window, start, stop in zip(part.window, start_indices, limit_indices, strict=True)
        ]
        if any(start >= stop for start, stop in ranges):
            continue  # the slice passes this parameter by
        offsets = [0 if window is None else window[0] for window in part.window]

        def change(factor: Factor, ranges: Any = ranges, offsets: Any = offsets) -> Factor:
            own = tuple(
                slice(ranges[i][0] - offsets[i], ranges[i][1] - offsets[i], steps[i])
                for i in factor.axes
            )
            return Factor(factor.value[own], factor.axes)

        window = tuple(
            None if old is None else (low - start, high - start)
            for old, (low, high), start in zip(part.window, ranges, start_indices, strict=True)
        )
        parts.append(_replaced(part, change, window))

    def gain_change(factor: Factor) -> Factor:
        own = tuple(slice(start_indices[i], limit_indices[i], steps[i]) for i in factor.axes)
        return Factor(factor.value[own], factor.axes)

    gain = None if weight.gain is None else gain_change(weight.gain)
    return LazyWeight(bind(weight.base), tuple(parts), gain)


def split(weight: LazyWeight, bind: Bind, *, sizes: Sequence[int], axis: int, **_: Any) -> Any:
    """The slices of a weight along an axis."""
    bases, start, found = bind(weight.base), 0, []
    for base, size in zip(bases, sizes, strict=True):
        first, last = [0] * weight.ndim, list(weight.shape)
        first[axis], last[axis] = start, start + int(size)
        found.append(
            slice_(
                weight,
                lambda _, base=base: base,
                start_indices=first,
                limit_indices=last,
                strides=None,
            )
        )
        start += int(size)
    return found


def _replaced(part: Part, change: Callable[[Factor], Factor], window: tuple[Window, ...]) -> Part:
    terms = [new for term in part.terms if (new := term.map(change)) is not None]
    return dataclasses.replace(part, window=window, terms=tuple(terms))


def dynamic_slice(
    weight: LazyWeight, starts: Sequence[Any], bind: Bind, *, slice_sizes: Sequence[int], **_: Any
) -> View:
    weight = without_windows(weight, range(weight.ndim))

    def change(factor: Factor) -> Factor:
        first = [*(starts[i] for i in factor.axes), jnp.zeros_like(starts[0])]
        sizes = [*(slice_sizes[i] for i in factor.axes), factor.value.shape[-1]]
        return Factor(jax.lax.dynamic_slice(factor.value, first, sizes), factor.axes)

    base = bind(weight.base, *starts)
    return rebuilt(weight, base, change, [(i,) for i in range(weight.ndim)])


# --- Numbers that change -------------------------------------------------------------------------


def carried(weight: LazyWeight, bind: Bind, **_: Any) -> View:
    """Operations that return their operand: copies, barriers, constraints."""
    found = bind(weight.base)
    base = found[0] if isinstance(found, list | tuple) else found
    return dataclasses.replace(weight, base=base)


def convert_element_type(weight: LazyWeight, bind: Bind, *, new_dtype: Any, **_: Any) -> View:
    """Factors keep their precision; products promote."""
    was_complex, is_complex = (
        jnp.issubdtype(dtype, jnp.complexfloating) for dtype in (weight.dtype, new_dtype)
    )
    if not jnp.issubdtype(new_dtype, jnp.inexact) or (was_complex and not is_complex):
        return None
    return dataclasses.replace(weight, base=bind(weight.base))


def scaled(weight: LazyWeight, base: Any, by: Callable[[Any], Any]) -> LazyWeight:
    """The base is scaled already, ``by`` scales one factor of each term."""

    def scale(term: Term) -> Term:
        return dataclasses.replace(term, a=dataclasses.replace(term.a, value=by(term.a.value)))

    parts = tuple(
        dataclasses.replace(part, terms=tuple(map(scale, part.terms))) for part in weight.parts
    )
    return dataclasses.replace(weight, base=base, parts=parts)


def neg(weight: LazyWeight, bind: Bind, **_: Any) -> View:
    return scaled(weight, bind(weight.base), lambda value: -value)


def times(weight: LazyWeight, other: Any, bind: Bind, spread: Any = None, **_: Any) -> View:
    """The product with a number, with an array along axes of one factor, or with any other array.

    Args:
      weight: the weight.
      other: of the same shape, or a scalar.
      bind: takes the base.
      spread: ``(array, axes)`` if ``other`` was broadcast from an array along some axes.
    """
    if jnp.ndim(other) == 0:
        return scaled(weight, bind(weight.base), lambda value: multiplied_by(value, other))
    if spread is not None:
        array, axes = spread
        long = [i for i, axis in enumerate(axes) if array.shape[i] != 1]
        along = tuple(axes[i] for i in long)
        array = jnp.squeeze(array, [i for i in range(array.ndim) if i not in long])
        found = _times_along(weight, bind, Factor(array[..., None], along))
        if found is not None:
            return found
    return Scaled(settled(weight), other)


def multiplied_by(value: Any, other: Any) -> Any:
    """A factor times numbers; it keeps its dtype, unless they are complex."""
    is_complex = jnp.issubdtype(jnp.asarray(other).dtype, jnp.complexfloating)
    dtype = common_dtype(value, other) if is_complex else value.dtype
    return value.astype(dtype) * jnp.asarray(other).astype(dtype)


def _times_along(weight: LazyWeight, bind: Bind, along: Factor) -> LazyWeight | None:
    weight = without_windows(weight, along.axes)

    def scale(term: Term) -> Term | None:
        for name in "ab":
            factor = getattr(term, name)
            if set(along.axes) <= set(factor.axes):
                missing = [i for i, axis in enumerate(factor.axes) if axis not in along.axes]
                by = jnp.expand_dims(along.value, missing)
                value = multiplied_by(factor.value, by)
                return term.with_factor(name, Factor(value, factor.axes))
        return None

    parts = []
    for part in weight.parts:
        terms = [new for term in part.terms if (new := scale(term)) is not None]
        if len(terms) < len(part.terms):
            return None
        parts.append(dataclasses.replace(part, terms=tuple(terms)))
    return dataclasses.replace(weight, base=bind(weight.base), parts=tuple(parts))


def divided(weight: LazyWeight, other: Any, bind: Bind, spread: Any = None, **_: Any) -> View:
    inverse = None if spread is None else (1 / spread[0], spread[1])
    if jnp.ndim(other) != 0 and inverse is None:
        return None
    found = times(weight, 1 / other, bind, inverse)
    return None if isinstance(found, Scaled) else found

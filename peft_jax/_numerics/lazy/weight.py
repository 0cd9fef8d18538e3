"""A weight ``W + sum_k gain_k * scaling_k * a_k·b_k`` whose sum is not formed.

Arrays only: no tracer and no Flax. A `LazyWeight` is a *view* of one parameter, or of several that
were added or concatenated: its axes may be permuted, split, sliced or joined with regard to the
axes that are stored. Every factor follows: it has some of the view's axes, in the view's order,
and one axis more, the rank.
"""

from __future__ import annotations

import dataclasses
import string
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

__all__ = [
    "Factor",
    "LazyWeight",
    "Term",
    "factor_of",
    "lazy_weight",
]

Array = jax.Array
Window = tuple[int, int] | None

RANK = "Z"  # the letter of the rank; the axes of a view have lowercase letters


def register(*data: str) -> Callable[[type], type]:
    """Makes a dataclass a pytree: these fields hold arrays, all others are static."""

    def decorate(cls: type) -> type:
        static = [field.name for field in dataclasses.fields(cls) if field.name not in data]
        return jax.tree_util.register_dataclass(cls, list(data), static)

    return decorate


@register("value")
@dataclasses.dataclass(frozen=True)
class Factor:
    """An array along some of a view's axes.

    Attributes:
      value: the array; its last axis is the rank, of length 1 for factors without a rank.
      axes: the view's axes that it has, rising.
    """

    value: Any
    axes: tuple[int, ...]

    @property
    def letters(self) -> str:
        """A letter for each axis, the rank last."""
        return named(self.axes) + RANK


@register("a", "b", "gain", "key")
@dataclasses.dataclass(frozen=True)
class Term:
    """A summand ``gain * scaling * a·b``.

    Attributes:
      a: one factor.
      b: the other; together they have every axis along which the summand varies.
      scaling: a number.
      gain: a factor without a rank, or None for 1.
      key: of the dropout on the inputs of products, or None for none.
      rate: of the dropout.
      dtype: of the computation; None: that of the input and of both factors together.
    """

    a: Factor
    b: Factor
    scaling: float = 1.0
    gain: Factor | None = None
    key: Any = None
    rate: float = 0.0
    dtype: Any = None

    @property
    def factors(self) -> tuple[Factor, ...]:
        return (self.a, self.b) if self.gain is None else (self.a, self.b, self.gain)

    @property
    def axes(self) -> tuple[int, ...]:
        """The view's axes that any factor has, rising."""
        return tuple(sorted({axis for factor in self.factors for axis in factor.axes}))

    def map(self, change: Callable[[Factor], Factor | None]) -> Term | None:
        """The term with each factor changed; None if one cannot be."""
        a, b = change(self.a), change(self.b)
        gain = None if self.gain is None else change(self.gain)
        if a is None or b is None or (gain is None and self.gain is not None):
            return None
        return dataclasses.replace(self, a=a, b=b, gain=gain)

    def with_factor(self, name: str, factor: Factor) -> Term:
        """The term with another ``a`` or ``b``."""
        return dataclasses.replace(self, **{name: factor})  # type: ignore[arg-type]


@register("terms")
@dataclasses.dataclass(frozen=True)
class Part:
    """What one parameter contributes to a view.

    Attributes:
      source: names the parameter.
      shape: as it is stored.
      origin: for each axis of the view, the stored axes that it is made of.
      window: for each axis of the view, the range that this parameter fills, or None for all of it;
        outside, its terms are zero. Factors have the length of the range.
      terms: of its adapters.
    """

    source: Hashable
    shape: tuple[int, ...]
    origin: tuple[tuple[int, ...], ...]
    window: tuple[Window, ...]
    terms: tuple[Term, ...] = ()


@register("base", "parts", "gain")
@dataclasses.dataclass(frozen=True)
class LazyWeight:
    """``gain * base`` and the terms of its parts.

    Attributes:
      base: the array that this view shows without adapters.
      parts: of the parameters that it is made of.
      gain: a factor without a rank, or None for 1.
    """

    base: Any
    parts: tuple[Part, ...]
    gain: Factor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    @property
    def dtype(self) -> Any:
        return self.base.dtype

    @property
    def ndim(self) -> int:
        return len(self.base.shape)


@register("weight", "other")
@dataclasses.dataclass(frozen=True)
class Scaled:
    """``other * weight``, elementwise, with an array of the same shape: a product in the making.

    Summed over some axes it is a matrix product; see `products.summed`.
    """

    weight: LazyWeight
    other: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape

    @property
    def dtype(self) -> Any:
        return self.weight.dtype


def lazy_weight(value: Any, source: Hashable, terms: Sequence[Term] = ()) -> LazyWeight:
    """A parameter ``W`` as it is stored, and its adapters, which add up.

    One with a gain makes ``gain * (W + scaling * a·b)`` of the weight, and so adds the difference.
    """
    axes = range(value.ndim)
    part = Part(source, value.shape, tuple((i,) for i in axes), (None,) * value.ndim, tuple(terms))
    return LazyWeight(value, (part,), _total_gain([t.gain for t in terms if t.gain is not None]))


def _total_gain(gains: Sequence[Factor]) -> Factor | None:
    """Of the weight itself: ``1 + sum(gain - 1)``."""
    if not gains:
        return None
    axes = tuple(sorted({axis for gain in gains for axis in gain.axes}))
    total: Any = 1
    for gain in gains:
        missing = [i for i, axis in enumerate(axes) if axis not in gain.axes]
        total = total + (jnp.expand_dims(gain.value, missing) - 1)
    return Factor(total, axes)


def factor_of(array: Any, letters: str, kernel: str) -> Factor:
    """An array with named axes, of which those of the kernel are the weight's and one is the rank.

    Args:
      array: of the axes ``letters``.
      letters: such as ``ir``; without a letter that the kernel lacks, the factor has no rank.
      kernel: letters of the weight's axes, such as ``io``.
    """
    axes = [i for i, letter in enumerate(kernel) if letter in letters]
    rank = [i for i, letter in enumerate(letters) if letter not in kernel]
    order = [*(letters.index(kernel[axis]) for axis in axes), *rank]
    value = jnp.transpose(array, order)
    return Factor(value if rank else value[..., None], tuple(axes))


def with_keys(weight: LazyWeight, change: Callable[[Any, int], Any]) -> LazyWeight:
    """The weight with other keys of dropout: ``change(key, number of the term)``."""
    number = 0

    def changed(term: Term) -> Term:
        nonlocal number
        number += 1
        return term if term.key is None else dataclasses.replace(term, key=change(term.key, number))

    parts = tuple(
        dataclasses.replace(part, terms=tuple(map(changed, part.terms))) for part in weight.parts
    )
    return dataclasses.replace(weight, parts=parts)


def has_dropout(weight: LazyWeight) -> bool:
    """Whether a product with the weight draws masks."""
    return any(term.key is not None for part in weight.parts for term in part.terms)


def named(axes: Sequence[int]) -> str:
    """Letters of axes."""
    return "".join(string.ascii_lowercase[axis] for axis in axes)

"""A weight as a layer reads it: an array, or stored values and their scale."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from peft_jax._numerics.quantized.dot import quantized_einsum, quantized_rows
from peft_jax._numerics.quantized.encoding import dequantize
from peft_jax._numerics.quantized.values import StoredValues

__all__ = [
    "Weight",
    "map_pieces",
    "weight_einsum",
    "weight_rows",
]


Array = jax.Array


@dataclasses.dataclass(frozen=True, eq=False)
class Weight:
    """A stored weight on its way through a layer's own forward, in the place of an array.

    Attributes:
      values: what is stored.
      scale: of the values.
      dtype: that of the array whose place it takes.
    """

    values: StoredValues
    scale: Array
    dtype: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array whose place it takes."""
        return self.values.shape

    def astype(self, dtype: Any) -> Weight:
        """The same weight, to be computed with in this dtype."""
        return dataclasses.replace(self, dtype=jnp.dtype(dtype))

    def dequantized(self) -> Array:
        """The array."""
        return dequantize(self.values, self.scale, self.dtype)


def map_pieces(function: Callable[[Array], Array], weight: Weight) -> tuple[Array, int]:
    """What a function makes of each piece of a stored weight, dequantized one after the other.

    Args:
      function: of a piece.
      weight: is cut in up to `PIECES` equal pieces along one axis, at the edges of blocks.

    Returns:
      The results, with an axis of pieces in front, and the axis along which the weight was cut.
    """
    layout, array, scale = weight.values.layout, weight.values.array, weight.scale
    packed = None if layout.axis is None else layout.axis % array.ndim
    counts = [1 if axis == packed else _count(weight, axis) for axis in range(array.ndim)]
    axis = counts.index(max(counts))
    step, scales = array.shape[axis] // counts[axis], scale.shape[axis] // counts[axis]

    def piece(i: Array) -> Array:
        part = jax.lax.dynamic_slice_in_dim(array, i * step, step, axis)
        its = jax.lax.dynamic_slice_in_dim(scale, i * scales, scales, axis) if scales else scale
        return function(dequantize(StoredValues(layout, part), its))

    return jax.lax.map(piece, jnp.arange(counts[axis])), axis


PIECES = 16


def _count(weight: Weight, axis: int) -> int:
    """In how many pieces, at most `PIECES`, a weight can be cut along an axis."""
    length, scales = weight.shape[axis], weight.scale.shape[axis]
    cuts = length if scales == 1 else scales
    return max(count for count in range(1, PIECES + 1) if cuts % count == 0)


def weight_rows(weight: Array | Weight, rows: Array) -> Array:
    """Some rows of a weight with two axes."""
    if isinstance(weight, Weight):
        return quantized_rows(weight.values, weight.scale, rows, weight.dtype)
    return jnp.take(weight, rows, axis=0)


def weight_einsum(equation: str, x: Array, weight: Array | Weight) -> Array:
    """`einsum(equation, x, weight)` in float32; ``x`` is rounded to the dtype of an array."""
    if isinstance(weight, Weight):
        return quantized_einsum(equation, x.astype(jnp.float32), weight.values, weight.scale)
    return jnp.einsum(
        equation, x.astype(weight.dtype), weight, preferred_element_type=jnp.float32
    ).astype(jnp.float32)

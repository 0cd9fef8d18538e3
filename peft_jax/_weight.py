"""A weight as a layer reads it: an array, or stored values and their scale."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from peft_jax._quantize import dequantize
from peft_jax._quantized_dot import quantized_einsum, quantized_rows
from peft_jax._stored import StoredValues

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


def as_array(weight: Array | Weight) -> Array:
    """The weight as a whole."""
    return weight.dequantized() if isinstance(weight, Weight) else weight


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

"""Functions of an input and a stored weight, as data that compares by value."""

from __future__ import annotations

import abc
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from peft_jax._numerics.einsum import is_contraction, split_terms, widest
from peft_jax._numerics.quantized.encoding import scaled
from peft_jax._numerics.quantized.tiled_einsum import tiled_einsum
from peft_jax._numerics.quantized.values import Layout, unpack

__all__ = [
    "Convolution",
]


Array = jax.Array
Type = jax.ShapeDtypeStruct


@dataclasses.dataclass(frozen=True)
class Product(abc.ABC):
    """A function of an input and a weight, linear in both."""

    @abc.abstractmethod
    def __call__(self, x: Array, weight: Array) -> Array:
        """The product with a weight of the input's dtype."""

    def evaluate(
        self, x: Array, array: Array, scale: Array, *, layout: Layout, backward: bool, on_cpu: bool
    ) -> Array:
        """The product with stored values, by dequantizing all of them."""
        if backward or on_cpu:
            array = _apart(array, x, on_cpu)
        weight = scaled(layout.row.values(unpack(array, layout)), scale)
        return self(x, weight.astype(x.dtype))

    def transposed(self, x: Type) -> Product:
        """From the cotangent of the output to that of an input of this type."""
        return _Transposed(self, x.shape, x.dtype)


@dataclasses.dataclass(frozen=True)
class Einsum(Product):
    """``einsum(equation, x, weight)``; every axis has a letter.

    Attributes:
      equation: with a letter for every axis.
      precision: as in ``jax.lax.dot_general``.
      dtype: of the output.
    """

    equation: str
    precision: Any
    dtype: Any

    def __call__(self, x: Array, weight: Array) -> Array:
        return jnp.einsum(
            self.equation,
            x,
            weight,
            precision=self.precision,
            preferred_element_type=self.dtype,
        )

    def evaluate(
        self, x: Array, array: Array, scale: Array, *, layout: Layout, backward: bool, on_cpu: bool
    ) -> Array:
        """The product: in tiles on CPU, and elsewhere with the scale beside it where it can be."""
        if on_cpu and is_contraction(self.equation) and x.dtype.itemsize <= 4:
            # In float32, whatever the precision asked for.
            y = tiled_einsum(self.equation, x, array, scale, layout)
            if y is not None:
                return y.astype(self.dtype)
        if backward or on_cpu:
            array = _apart(array, x, on_cpu)
        numbers = layout.row.values(unpack(array, layout))
        left, right, out = split_terms(self.equation)
        diagonal = len(set(left)) < len(left)
        if _varies_along(scale, right) <= set(out):
            exact = dataclasses.replace(self, dtype=widest(self.dtype))
            y = exact(x, numbers.astype(x.dtype))
            return (y * _factor(scale, right, out, numbers.shape, y.dtype)).astype(self.dtype)
        if _varies_along(scale, right) <= set(left) and not diagonal:
            factor = _factor(scale, right, left, numbers.shape, widest(x.dtype))
            x = (x.astype(factor.dtype) * factor).astype(x.dtype)
            return self(x, numbers.astype(x.dtype))
        return self(x, scaled(numbers, scale).astype(x.dtype))

    def transposed(self, x: Type) -> Product:
        """The equation with input and output in each other's place."""
        left, right, out = split_terms(self.equation)
        if not is_contraction(self.equation):
            return super().transposed(x)
        return Einsum(f"{out},{right}->{left}", self.precision, x.dtype)


def _varies_along(scale: Array, letters: str) -> set[str]:
    """The axes along which there is more than one scale."""
    return {c for c, n in zip(letters, scale.shape, strict=True) if n > 1}


def _factor(scale: Array, letters: str, target: str, shape: tuple[int, ...], dtype: Any) -> Array:
    """The scale of a weight as a factor of an array with the axes ``target``."""
    for axis, (n, length) in enumerate(zip(scale.shape, shape, strict=True)):
        if n not in (1, length):
            scale = jnp.repeat(scale, length // n, axis=axis)
    kept = [c for c in target if c in letters]
    others = [c for c in letters if c not in kept]
    scale = scale.transpose([letters.index(c) for c in (*others, *kept)])
    scale = scale.reshape(scale.shape[len(others) :])
    lengths = dict(zip(kept, scale.shape, strict=True))
    return scale.reshape([lengths.get(c, 1) for c in target]).astype(dtype)


@dataclasses.dataclass(frozen=True)
class Convolution(Product):
    """``lax.conv_general_dilated(x, weight, **options)``.

    Attributes:
      options: names and values, which are hashable.
    """

    options: tuple[tuple[str, Any], ...]

    def __call__(self, x: Array, weight: Array) -> Array:
        return jax.lax.conv_general_dilated(x, weight, **dict(self.options))


@dataclasses.dataclass(frozen=True)
class _Transposed(Product):
    product: Product
    shape: tuple[int, ...]
    dtype: Any

    def __call__(self, x: Array, weight: Array) -> Array:
        (y,) = jax.linear_transpose(
            lambda x: self.product(x, weight.astype(self.dtype)), Type(self.shape, self.dtype)
        )(x)
        return y

    def transposed(self, x: Type) -> Product:
        return self.product


@dataclasses.dataclass(frozen=True)
class Vmapped(Product):
    """A product for each index of a leading axis of some of the operands.

    Attributes:
      product: that of one index.
      mapped: whether ``x``, the stored array and the scale have the axis.
    """

    product: Product
    mapped: tuple[bool, bool, bool]

    def __call__(self, x: Array, weight: Array) -> Array:
        in_axes = (0 if self.mapped[0] else None, 0 if any(self.mapped[1:]) else None)
        return jax.vmap(self.product, in_axes)(x, weight)

    def evaluate(
        self, x: Array, array: Array, scale: Array, *, layout: Layout, backward: bool, on_cpu: bool
    ) -> Array:
        """One by one on CPU, where XLA (jaxlib 0.10.2) aborts on some products with batch axes."""
        one = functools.partial(
            self.product.evaluate, layout=layout, backward=backward, on_cpu=on_cpu
        )
        if not on_cpu:
            return jax.vmap(one, tuple(0 if mapped else None for mapped in self.mapped))(
                x, array, scale
            )
        operands = (x, array, scale)

        def run(given: tuple[Array, ...]) -> Array:
            slices = iter(given)
            pairs = zip(operands, self.mapped, strict=True)
            return one(*(next(slices) if mapped else whole for whole, mapped in pairs))

        pairs = zip(operands, self.mapped, strict=True)
        return jax.lax.map(run, tuple(operand for operand, mapped in pairs if mapped))

    def transposed(self, x: Type) -> Product:
        return Vmapped(self.product.transposed(Type(x.shape[1:], x.dtype)), self.mapped)


def _apart(array: Array, x: Array, on_cpu: bool) -> Array:
    """The same bits, which XLA cannot tell to be those of another product.

    Otherwise it would dequantize once, and keep the weight of every layer until the backward pass;
    on CPU it would also dequantize all layers before the first one runs.
    """
    if not on_cpu:
        return jax.lax.optimization_barrier((array, x))[0]
    # On CPU barriers are gone before equal expressions are merged. No number is both NaN and
    # infinite, but XLA does not know.
    first = jax.lax.slice(x.reshape(-1), (0,), (1,))[0] if x.size else jnp.zeros((), x.dtype)
    never = jnp.isnan(first) & jnp.isinf(first)
    return array ^ never.astype(array.dtype)

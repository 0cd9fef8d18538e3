"""Products with a quantized weight that never hold it dequantized for longer than they run.

A product here is linear in its input and in the scale. It is a primitive, so that every platform
has its own lowering, and so that derivatives keep the stored values and not the weight: the
backward pass dequantizes again.
"""

from __future__ import annotations

import dataclasses
import functools
import string
from typing import Any

import jax
import jax.numpy as jnp

from peft_jax._numerics.einsum import (
    broadcasts,
    is_contraction,
    is_laid_out,
    split_terms,
    without_ellipsis,
)
from peft_jax._numerics.jax_internals import (
    ShapedArray,
    define_derivative,
    is_unknown,
    is_zero,
    new_primitive,
)
from peft_jax._numerics.quantized.encoding import check_scale, scaled
from peft_jax._numerics.quantized.products import Einsum, Product, Vmapped
from peft_jax._numerics.quantized.values import Layout, StoredValues, halves, unpack

__all__ = [
    "quantized_einsum",
    "quantized_product",
    "quantized_rows",
]


Array = jax.Array
Type = jax.ShapeDtypeStruct


# --- The primitive -------------------------------------------------------------------------------


def _evaluate(
    x: Array,
    array: Array,
    scale: Array,
    *,
    product: Product,
    layout: Layout,
    backward: bool,
    on_cpu: bool,
) -> Array:
    return product.evaluate(x, array, scale, layout=layout, backward=backward, on_cpu=on_cpu)


@functools.lru_cache(maxsize=4096)
def _output_type(*types: Type, **params: Any) -> ShapedArray:
    out = jax.eval_shape(functools.partial(_evaluate, **params, on_cpu=False), *types)
    return ShapedArray(out.shape, out.dtype)


def _abstract(*operands: Any, **params: Any) -> ShapedArray:
    return _output_type(*(Type(operand.shape, operand.dtype) for operand in operands), **params)


@functools.lru_cache(maxsize=4096)
def _compiled(**params: Any) -> Any:
    return jax.jit(functools.partial(_product_p.bind, **params))


def _run(*operands: Any, **params: Any) -> Array:
    return _compiled(**params)(*operands)


def _derivative(primals: tuple[Any, ...], tangents: tuple[Any, ...], **params: Any) -> Any:
    x, array, scale = primals
    dx, _, dscale = tangents
    terms = [
        _product_p.bind(a, array, b, **params)
        for a, b, tangent in ((dx, scale, dx), (x, dscale, dscale))
        if not is_zero(tangent)
    ]
    return _product_p.bind(x, array, scale, **params), functools.reduce(jnp.add, terms)


def _transpose(
    cotangent: Any, x: Any, array: Any, scale: Any, *, product: Product, **params: Any
) -> Any:
    if is_zero(cotangent):
        return None, None, None
    if is_unknown(x):
        transposed = product.transposed(Type(x.aval.shape, x.aval.dtype))
        params = {**params, "backward": True}
        return _product_p.bind(cotangent, array, scale, product=transposed, **params), None, None

    def of_scale(scale: Array) -> Array:
        return _evaluate(x, array, scale, product=product, **params, on_cpu=False)

    (dscale,) = jax.linear_transpose(of_scale, Type(scale.aval.shape, scale.aval.dtype))(cotangent)
    return None, None, dscale


def _batch(operands: Any, axes: Any, *, product: Product, **params: Any) -> tuple[Array, int]:
    x, array, scale = operands
    if isinstance(product, Einsum) and is_contraction(product.equation) and axes[1:] == (None,) * 2:
        left, right, out = split_terms(product.equation)
        new = next((c for c in string.ascii_letters if c not in product.equation), None)
        if new is not None:
            left = left[: axes[0]] + new + left[axes[0] :]
            product = dataclasses.replace(product, equation=f"{left},{right}->{new}{out}")
            return _product_p.bind(x, array, scale, product=product, **params), 0
    size = next(
        operand.shape[axis]
        for operand, axis in zip(operands, axes, strict=True)
        if axis is not None
    )
    moved = [
        operand if axis is None else jnp.moveaxis(operand, axis, 0)
        for operand, axis in zip(operands, axes, strict=True)
    ]
    if axes[0] is None:  # so that its cotangent is summed over the axis
        moved[0] = jnp.broadcast_to(x, (size, *x.shape))
    mapped = (True, axes[1] is not None, axes[2] is not None)
    return _product_p.bind(*moved, product=Vmapped(product, mapped), **params), 0


_product_p = new_primitive(
    "quantized_product",
    _run,
    output_type=_abstract,
    batch=_batch,
    lowered=functools.partial(_evaluate, on_cpu=False),
    on_cpu=functools.partial(_evaluate, on_cpu=True),
)
define_derivative(_product_p, _derivative, _transpose)


# --- For layers ----------------------------------------------------------------------------------


def quantized_einsum(
    equation: str,
    x: Array,
    values: StoredValues,
    scale: Array,
    *,
    precision: Any = None,
    dtype: Any = None,
) -> Array:
    """``einsum(equation, x, dequantize(values, scale))``, with the weight in tiles where it helps.

    Args:
      equation: ``inputs,weight->outputs``; an ellipsis may stand in input and output.
      x: the layer's input.
      values: the stored weight.
      scale: of the weight.
      precision: as in ``jax.lax.dot_general``.
      dtype: of the output; None: that of ``x``.

    Returns:
      The product. Its derivatives by ``x`` and ``scale`` are exact, and keep no dequantized weight.
    """
    equation = without_ellipsis(equation, x.ndim)
    product = Einsum(equation, precision, jnp.dtype(x.dtype if dtype is None else dtype))
    if broadcasts(equation, x.shape, values.shape):
        check_scale(values.shape, scale.shape)
        return product.evaluate(
            x, values.array, scale, layout=values.layout, backward=False, on_cpu=False
        )
    return quantized_product(product, x, values, scale)


def quantized_product(product: Product, x: Array, values: StoredValues, scale: Array) -> Array:
    """``product(x, dequantize(values, scale))``."""
    check_scale(values.shape, scale.shape)
    params: dict[str, Any] = {"product": product, "layout": values.layout, "backward": False}
    if is_laid_out(x) or is_laid_out(values.array):
        return _evaluate(x, values.array, scale, **params, on_cpu=False)
    return _product_p.bind(x, values.array, scale, **params)


def quantized_rows(values: StoredValues, scale: Array, ids: Array, dtype: Any) -> Array:
    """``jnp.take(dequantize(values, scale), ids, axis=0)``, of which only the rows are dequantized.

    Args:
      values: a stored table of shape ``(rows, features)``.
      scale: of the table.
      ids: integers of any shape; rows that are not there are NaN, as ``jnp.take`` has it.
      dtype: of the result.
    """
    check_scale(values.shape, scale.shape)
    rows, features = values.shape
    layout, array = values.layout, values.array
    if not ids.size:
        return jnp.zeros((*ids.shape, features), dtype)
    if ids.dtype.itemsize >= 4:  # what is out of range stays so in 32 bits
        ids = jnp.clip(ids, -rows - 1 if jnp.issubdtype(ids.dtype, jnp.signedinteger) else 0, rows)
    ids = ids.astype(jnp.int32)
    ids = jnp.where(ids < 0, ids + rows, ids)
    there = (ids >= 0) & (ids < rows)
    ids = jnp.where(there, ids, 0)
    if layout.axis is not None and layout.axis % 2 == 0:
        half = array.shape[0]
        low, high = halves(jnp.take(array, ids % half, axis=0))
        codes = jnp.where((ids >= half)[..., None], high, low)
    else:
        layout = dataclasses.replace(layout, axis=layout.axis and -1)
        codes = unpack(jnp.take(array, ids, axis=0), layout)
    factors = jnp.take(scale, ids // (rows // scale.shape[0]), axis=0)
    numbers = layout.row.values(codes).reshape(-1, features)
    found = scaled(numbers, factors.reshape(-1, scale.shape[1])).reshape(codes.shape)
    return jnp.where(there[..., None], found, jnp.nan).astype(dtype)

"""The low-rank product `x·a·b`, the weight delta, and the matrix inside a kernel: arrays only."""

import itertools
import math
import string
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from peft_jax._numerics.einsum import (
    broadcasts,
    is_contraction,
    is_laid_out,
    sizes,
    split_terms,
    widest,
    without_ellipsis,
)
from peft_jax._numerics.jax_internals import ShapedArray, define_bilinear, new_primitive

__all__ = [
    "add_once",
    "delta",
    "low_rank_product",
    "matricize",
    "scaled_along",
    "unmatricize",
]


Array = jax.Array
Precision = Any  # whatever `jax.lax.dot_general` takes


# --- The product ---------------------------------------------------------------------------------


def low_rank_product(
    x: Array,
    a: Array,
    b: Array,
    first: str,
    second: str,
    *,
    precision: Precision = None,
    between: Callable[[Array], Array] = lambda hidden: hidden,
) -> Array:
    """Send `x` through the rank: `einsum(second, einsum(first, x, a), b)`.

    On CPU, tokens that span several axes are merged into one: XLA would otherwise transpose all of
    `x` and of the output's cotangent for the gradients of `a` and `b`, and a step of training takes
    twice the time. On accelerators the axes stay as they are, for merging sharded axes gathers
    them. The platform that counts is the one the program is lowered for.

    Args:
        x: The layer's input, of the dtype of `a` and `b`.
        a: From the input to the rank.
        b: From the rank to the output.
        first: An equation such as `...i,ir->...r` or `btnh,nhr->btr`.
        second: An equation such as `...r,ro->...o`.
        precision: As in `jax.lax.dot_general`.
        between: What becomes of `x·a` before it meets `b`.

    Returns:
        The product without its scaling, of the dtype of the operands.
    """
    return _product(between(_product(x, a, first, precision)), b, second, precision)


def _product(x: Array, weight: Array, equation: str, precision: Precision) -> Array:
    letters = without_ellipsis(equation, x.ndim)
    sizes(letters, x.shape, weight.shape)
    plain = (
        broadcasts(letters, x.shape, weight.shape)
        or not is_contraction(letters)
        or x.dtype != weight.dtype
        or is_laid_out(x)
        or is_laid_out(weight)
    )
    if plain:
        return jnp.einsum(equation, x, weight, precision=precision)
    return _contract_p.bind(x, weight, equation=letters, precision=precision)


def scaled_along(x: Array, factors: Array, axes: str, letters: str) -> Array:
    """Multiply `x` by factors that lie along some of its axes.

    On CPU, XLA would compute the cotangent of `x` once more inside the sum that is the gradient of
    the factors, with all that led to it; there it is computed first.

    Args:
        x: An array.
        factors: Of the dtype of `x`.
        axes: A letter, or a dot, for each axis of `x`.
        letters: Of the axes of `factors`, each an axis of `x`.

    Returns:
        An array like `x`.
    """
    names = _named(axes)
    stretched = any(
        length != x.shape[names.index(letter)]
        for letter, length in zip(letters, factors.shape, strict=True)
    )
    if stretched or is_laid_out(x) or is_laid_out(factors):
        return x * _broadcast(factors, letters, names)
    return _contract_p.bind(x, factors, equation=f"{names},{letters}->{names}", precision=None)


def _named(axes: str) -> str:
    """Axes with a letter in the place of each dot."""
    free = iter(letter for letter in string.ascii_letters if letter not in axes)
    return "".join(next(free) if axis == "." else axis for axis in axes)


def _broadcast(values: Array, letters: str, axes: str) -> Array:
    """Values with axes named by `letters`, to be multiplied with an array that has these `axes`."""
    values = values.transpose([letters.index(axis) for axis in axes if axis in letters])
    return jax.lax.expand_dims(values, [i for i, axis in enumerate(axes) if axis not in letters])


# --- A contraction that is lowered by platform ---------------------------------------------------
# A primitive rather than `jax.lax.platform_dependent`: reverse mode through the latter carries the
# residuals of every branch, zeros for those not taken, and leaves a `case` in every program.


def _contract(lhs: Array, rhs: Array, *, equation: str, precision: Precision) -> Array:
    """`einsum(equation, lhs, rhs)` as one `dot_general`, or as a plain multiplication."""
    left, right, out = split_terms(equation)
    if _is_scaling(equation) or set(left) == set(right):
        return _multiplied(lhs, rhs, equation)
    both = [letter for letter in left if letter in right]
    batch = [letter for letter in both if letter in out]
    summed = [letter for letter in both if letter not in out]
    product = jax.lax.dot_general(
        lhs,
        rhs,
        (
            ([left.index(i) for i in summed], [right.index(i) for i in summed]),
            ([left.index(i) for i in batch], [right.index(i) for i in batch]),
        ),
        precision=precision,
    )
    order = batch + [i for i in left + right if i not in both]
    return jax.lax.transpose(product, [order.index(i) for i in out])


def _is_scaling(equation: str) -> bool:
    """Whether one operand has all letters of the output, and nothing is summed."""
    left, right, out = map(set, split_terms(equation))
    return out in (left, right) and left | right == out


def _multiplied(lhs: Array, rhs: Array, equation: str) -> Array:
    """A contraction in which one operand has all letters that there are."""
    left, right, out = split_terms(equation)
    axes = left if set(right) <= set(left) else right
    product = _broadcast(lhs, left, axes) * _broadcast(rhs, right, axes)
    summed = jnp.sum(product, [i for i, letter in enumerate(axes) if letter not in out])
    kept = [letter for letter in axes if letter in out]
    return summed.transpose([kept.index(letter) for letter in out])


def _contract_on_cpu(lhs: Array, rhs: Array, *, equation: str, precision: Precision) -> Array:
    """The same, with neighbouring axes merged and the narrower operand first."""
    left, right, out = split_terms(equation)
    if set(left) == set(right):  # the gradient of factors; see `scaled_along`
        return _multiplied(lhs, jax.lax.optimization_barrier(rhs), equation)
    if _is_scaling(equation):
        return _multiplied(lhs, rhs, equation)
    if set(left) & set(right) & set(out):
        # XLA's CPU compiler (jaxlib 0.10.2) aborts the process on some batched products whose
        # operands or result it lays out anew, so they stay as `einsum` has them.
        return jnp.einsum(equation, lhs, rhs, precision=precision)
    size = sizes(equation, lhs.shape, rhs.shape)
    shape = tuple(size[letter] for letter in out)
    while pair := _neighbours(equation):
        first, second = pair
        equation = equation.replace(first + second, first)
        size[first] *= size.pop(second)
    left, right, out = split_terms(equation)
    lhs = lhs.reshape([size[letter] for letter in left])
    rhs = rhs.reshape([size[letter] for letter in right])

    rows = [letter for letter in left if letter not in right]
    columns = [letter for letter in right if letter not in left]
    if not _sums_leading_axes(left, out) or _count(rows, size) <= _count(columns, size):
        product = _contract(lhs, rhs, equation=equation, precision=precision)
        return product.reshape(shape)
    # The gradient of `a`, `x^T·c`, is of this kind: transposing a wide left operand costs nine
    # times what transposing a narrow one does. The barrier keeps XLA from turning it round again.
    turned = "".join([letter for letter in out if letter not in rows + columns] + columns + rows)
    product = _contract(rhs, lhs, equation=f"{right},{left}->{turned}", precision=precision)
    product = jax.lax.optimization_barrier(product)
    return product.transpose([turned.index(letter) for letter in out]).reshape(shape)


def _sums_leading_axes(left: str, out: str) -> bool:
    return left[-1:] in out


def _count(letters: list[str], size: dict[str, int]) -> int:
    return math.prod(size[letter] for letter in letters)


def _neighbours(equation: str) -> tuple[str, str] | None:
    """Two letters that stand side by side, in this order, in every term that has either."""
    for term in split_terms(equation):
        for first, second in itertools.pairwise(term):
            if equation.count(first) == equation.count(second) == equation.count(first + second):
                return first, second
    return None


def _contract_type(
    lhs: ShapedArray, rhs: ShapedArray, *, equation: str, precision: Precision
) -> ShapedArray:
    size = sizes(equation, lhs.shape, rhs.shape)
    _, _, out = split_terms(equation)
    return ShapedArray(tuple(size[letter] for letter in out), lhs.dtype)


def _transpose_lhs(
    cotangent: Array, lhs: Any, rhs: Array, *, equation: str, precision: Precision
) -> Array:
    left, right, out = split_terms(equation)
    return _contract_p.bind(cotangent, rhs, equation=f"{out},{right}->{left}", precision=precision)


def _transpose_rhs(
    cotangent: Array, lhs: Array, rhs: Any, *, equation: str, precision: Precision
) -> Array:
    left, right, out = split_terms(equation)
    return _contract_p.bind(lhs, cotangent, equation=f"{left},{out}->{right}", precision=precision)


def _batch(
    operands: tuple[Array, Array],
    axes: tuple[int | None, int | None],
    *,
    equation: str,
    precision: Precision,
) -> tuple[Array, int]:
    new = next(letter for letter in string.ascii_letters if letter not in equation)
    *terms, out = split_terms(equation)
    left, right = (
        term if axis is None else term[:axis] + new + term[axis:]
        for term, axis in zip(terms, axes, strict=True)
    )
    equation = f"{left},{right}->{new}{out}"
    return _contract_p.bind(*operands, equation=equation, precision=precision), 0


_contract_p = new_primitive(
    "low_rank_contraction",
    _contract,
    output_type=_contract_type,
    batch=_batch,
    lowered=_contract,
    on_cpu=_contract_on_cpu,
)
define_bilinear(_contract_p, _transpose_lhs, _transpose_rhs)


# --- The weight delta ----------------------------------------------------------------------------


def delta(a: Array, b: Array, equation: str, scaling: float | Array) -> Array:
    """What the adapter adds to the kernel: `scaling * einsum(equation, a, b)`.

    Args:
        a: From the input to the rank.
        b: From the rank to the output.
        equation: Such as `ir,ro->io`, or `...ir,...ro->...io` for layers stacked along the leading
            axes.
        scaling: A number, or an array that holds one for each stacked layer.

    Returns:
        The delta in float32, or in the operands' dtype where that is wider: rounding to the
        kernel's dtype is left to the caller, who does it once, after the sum.
    """
    dtype = widest(a.dtype, b.dtype)
    product = jnp.einsum(
        equation, a.astype(dtype), b.astype(dtype), precision=jax.lax.Precision.HIGHEST
    )
    factor = jnp.asarray(scaling, dtype)
    return product * factor.reshape(factor.shape + (1,) * (product.ndim - factor.ndim))


def add_once(kernel: Array, change: Array, sign: int = 1) -> Array:
    """`kernel + sign * change` in float32 or wider, rounded once to the dtype of the kernel."""
    dtype = widest(kernel.dtype, change.dtype)
    return (kernel.astype(dtype) + sign * change.astype(dtype)).astype(kernel.dtype)


# --- The matrix inside a kernel ------------------------------------------------------------------


def matricize(
    kernel: Array, inputs: tuple[int, ...], outputs: tuple[int, ...], batch: tuple[int, ...]
) -> Array:
    """View a kernel as one matrix for each index of its batch axes; see `unmatricize`.

    Args:
        kernel: Any kernel; every axis is in one of the three groups.
        inputs: The axes that the layer contracts.
        outputs: The axes that the layer adds to its output.
        batch: The axes that input, kernel and output share.

    Returns:
        An array of shape `(batch, in, out)`, axes of a group merged in the order given.
    """
    sizes = [math.prod(kernel.shape[axis] for axis in axes) for axes in (batch, inputs, outputs)]
    return kernel.transpose((*batch, *inputs, *outputs)).reshape(sizes)


def unmatricize(
    matrix: Array,
    shape: tuple[int, ...],
    inputs: tuple[int, ...],
    outputs: tuple[int, ...],
    batch: tuple[int, ...],
) -> Array:
    """Give the `(batch, in, out)` matrices of `matricize` the kernel's `shape` again."""
    order = (*batch, *inputs, *outputs)
    unmerged = matrix.reshape(tuple(shape[axis] for axis in order))
    return unmerged.transpose(tuple(order.index(axis) for axis in range(len(order))))

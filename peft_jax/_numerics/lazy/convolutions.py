"""Convolutions and ragged products of lazy weights; see `products`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from peft_jax._numerics.einsum import common_dtype
from peft_jax._numerics.lazy.dense import settled, without_windows
from peft_jax._numerics.lazy.products import (
    CONTRACTED,
    PRODUCED,
    Product,
    along,
    dropped,
    gained,
    scaled_by,
)
from peft_jax._numerics.lazy.weight import Factor, LazyWeight, Term

Array = jax.Array
STACKED = "stacked"


# --- Convolutions --------------------------------------------------------------------------------


def conv_general_dilated(
    weight: LazyWeight, x: Array, bind: Callable[..., Any], **params: Any
) -> Product | None:
    """``conv(x, W) + s * conv(x, a)·b``: the kernel's window lies in one factor.

    The other factor has the input features or the output features alone. With groups, ``a`` is
    shared by them, and the groups lie along the outputs of ``b``.
    """
    if params["batch_group_count"] != 1:
        return None
    weight = without_windows(weight, range(weight.ndim))
    numbers = params["dimension_numbers"]
    out, into, *_ = numbers.rhs_spec
    roles = tuple(PRODUCED if i == out else CONTRACTED for i in range(weight.ndim))
    terms = [term for part in weight.parts for term in part.terms]
    groups = params["feature_group_count"]
    arranged = [_arranged(term, weight, groups, out, into) for term in terms]
    if any(pair is None for pair in arranged):
        return None
    letters = _feature_last(numbers.out_spec[1], x.ndim)
    if weight.gain is not None and weight.gain.axes != (out,):
        weight = settled(weight)
    y = bind(x, weight.base)
    if weight.gain is not None:
        y = y * along(_renamed(weight.gain), letters, y.dtype)
    for term in terms:
        if term.gain is not None and term.gain.axes != (out,):
            term = gained(term)
        wide, narrow = _arranged(term, weight, groups, out, into)
        more = _convolved(term, wide, narrow, dropped(x, term), out, into, params)
        if term.gain is not None:
            more = more * along(_renamed(term.gain), letters, more.dtype)
        y = y + more.astype(y.dtype)
    return Product(y, roles, x)


def _arranged(term: Term, weight: LazyWeight, groups: int, out: int, into: int) -> Any:
    """The factor with the window, and the one without; None if there is no such pair."""
    everything = set(range(weight.ndim))
    if term.gain is not None and not any(
        set(term.gain.axes) <= set(factor.axes) for factor in (term.a, term.b)
    ):
        return None
    for lone in (out, into) if groups == 1 else (out,):
        for wide, narrow in ((term.a, term.b), (term.b, term.a)):
            if narrow.axes == (lone,) and set(wide.axes) == everything - {lone}:
                return wide, narrow
    return None


def _renamed(gain: Factor) -> Factor:
    """A gain along the output features, as the letter a names them."""
    return Factor(gain.value, (0,))


def _feature_last(feature: int, ndim: int) -> str:
    """Letters of a convolution's output, the feature axis a, all others capitals."""
    others = iter("ABCDEFGH")
    return "".join("a" if i == feature else next(others) for i in range(ndim))


def _convolved(
    term: Term, wide: Factor, narrow: Factor, x: Array, out: int, into: int, params: dict[str, Any]
) -> Array:
    dtype = common_dtype(x, term.a.value, term.b.value) if term.dtype is None else term.dtype
    x = x.astype(dtype)
    numbers, groups = params["dimension_numbers"], params["feature_group_count"]
    in_feature, out_feature = numbers.lhs_spec[1], numbers.out_spec[1]
    rank = wide.value.shape[-1]
    kernel = wide.value.astype(dtype)
    matrix = scaled_by(narrow.value.astype(dtype), term.scaling)

    def convolve(x: Array, kernel: Array, groups: int) -> Array:
        return jax.lax.conv_general_dilated(
            x,
            kernel,
            window_strides=params["window_strides"],
            padding=params["padding"],
            lhs_dilation=params["lhs_dilation"],
            rhs_dilation=params["rhs_dilation"],
            dimension_numbers=numbers,
            feature_group_count=groups,
            precision=params["precision"],
        )

    if narrow.axes == (out,):
        kernel = jnp.moveaxis(kernel, -1, out)  # the rank in the place of the outputs
        if groups == 1:
            hidden = jnp.moveaxis(convolve(x, kernel, 1), out_feature, -1)
            return jnp.moveaxis(jnp.einsum("...r,or->...o", hidden, matrix), -1, out_feature)
        kernel = jnp.concatenate([kernel] * groups, axis=out)  # every group meets all of `a`
        hidden = jnp.moveaxis(convolve(x, kernel, groups), out_feature, -1)
        hidden = hidden.reshape(*hidden.shape[:-1], groups, rank)
        grouped = matrix.reshape(groups, -1, rank)
        y = jnp.einsum("...gr,gor->...go", hidden, grouped)
        return jnp.moveaxis(y.reshape(*y.shape[:-2], -1), -1, out_feature)
    hidden = jnp.einsum("...i,ir->...r", jnp.moveaxis(x, in_feature, -1), matrix)
    kernel = jnp.moveaxis(kernel, -1, into)  # the rank in the place of the inputs
    return convolve(jnp.moveaxis(hidden, -1, in_feature), kernel, 1)


# --- Ragged products -----------------------------------------------------------------------------


def ragged_dot(
    weight: LazyWeight, x: Array, sizes: Array, bind: Callable[..., Any], **params: Any
) -> Product | None:
    """Rows of ``x`` in groups, each times a matrix of its own ``(group, in, out)``."""
    numbers = params["ragged_dot_dimension_numbers"]
    (x_summed, w_summed), (x_batch, _) = numbers.dot_dimension_numbers
    groups = tuple(numbers.rhs_group_dimensions)
    plain = (
        weight.ndim == 3
        and x.ndim == 2
        and groups == (0,)
        and tuple(w_summed) == (1,)
        and tuple(x_summed) == (1,)
        and not x_batch
        and tuple(numbers.lhs_ragged_dimensions) == (0,)
        and params.get("group_offset") is None
    )
    if not plain:
        return None
    weight = settled(without_windows(weight, range(3)))
    terms = [gained(t) if t.gain is not None else t for part in weight.parts for t in part.terms]
    roles = (STACKED, CONTRACTED, PRODUCED)
    if not all(_is_matrix_pair(term) for term in terms):
        return None
    y = bind(x, weight.base, sizes)
    for term in terms:
        first, second = (term.a, term.b) if 1 in term.a.axes else (term.b, term.a)
        dtype = common_dtype(x, first.value, second.value) if term.dtype is None else term.dtype
        hidden = _rows_times(dropped(x, term).astype(dtype), first, sizes, dtype, params)
        turned = Factor(jnp.swapaxes(scaled_by(second.value, term.scaling), -1, -2), second.axes)
        y = y + _rows_times(hidden, turned, sizes, dtype, params).astype(y.dtype)
    return Product(y, roles, x)


def _is_matrix_pair(term: Term) -> bool:
    pair = {axes for factor in (term.a, term.b) for axes in factor.axes if axes}
    return pair == {1, 2} and not {1, 2} <= set(term.a.axes) and not {1, 2} <= set(term.b.axes)


def _rows_times(
    x: Array, factor: Factor, sizes: Array, dtype: Any, params: dict[str, Any]
) -> Array:
    matrix = factor.value.astype(dtype)
    if 0 in factor.axes:
        return jax.lax.ragged_dot(x, matrix, sizes, precision=params.get("precision"))
    return jnp.matmul(x, matrix, precision=params.get("precision"))

"""Products of lazy weights: ``x·(W + s*a·b)`` is ``x·W + s*(x·a)·b``, whatever spells it.

Each function takes the operands of a JAX operation, one of which is lazy, and returns a `Product`,
or None if it is not linear in the weight in a way that the factors can be taken apart.
"""

from __future__ import annotations

import dataclasses
import string
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from peft_jax._numerics.einsum import common_dtype
from peft_jax._numerics.lazy.dense import dense, placed, settled, without_windows
from peft_jax._numerics.lazy.flow import DOTS
from peft_jax._numerics.lazy.views import rebuilt
from peft_jax._numerics.lazy.weight import RANK, Factor, LazyWeight, Scaled, Term, Window, named
from peft_jax._numerics.low_rank import low_rank_product

Array = jax.Array
BATCH, CONTRACTED, PRODUCED = "batch", "contracted", "produced"
# Names of JAX's operations: lookups of rows, and all that multiply a weight. A sum is one if its
# operand is `Scaled`.
LOOKUPS = frozenset({"gather"})
PRODUCTS = DOTS | LOOKUPS | {"conv_general_dilated", "reduce_sum"}
FILLING = (jax.lax.GatherScatterMode.FILL_OR_DROP,)


@dataclasses.dataclass(frozen=True)
class Product:
    """A product with a lazy weight.

    Attributes:
      value: the result.
      roles: what the product does with each axis of the view.
      operand: the other operand, or the indices of a lookup.
    """

    value: Any
    roles: tuple[str, ...]
    operand: Any


# --- dot_general ---------------------------------------------------------------------------------


def dot_general(
    weight: LazyWeight,
    x: Array,
    bind: Callable[..., Any],
    *,
    weight_first: bool,
    dimension_numbers: Any,
    precision: Any = None,
    **_: Any,
) -> Product:
    """A matrix product with the weight on either side; ``bind(x, base)`` is the base's."""
    (left_summed, right_summed), (left_batch, right_batch) = dimension_numbers
    w_summed, x_summed = (left_summed, right_summed)[:: 1 if weight_first else -1]
    w_batch, x_batch = (left_batch, right_batch)[:: 1 if weight_first else -1]
    roles = tuple(
        BATCH if i in w_batch else CONTRACTED if i in w_summed else PRODUCED
        for i in range(weight.ndim)
    )
    letters = named(range(weight.ndim))
    free = iter(string.ascii_uppercase.replace(RANK, ""))
    places = dict(zip((*x_summed, *x_batch), (*w_summed, *w_batch), strict=True))
    x_letters = "".join(letters[places[i]] if i in places else next(free) for i in range(x.ndim))
    x_free = "".join(c for i, c in enumerate(x_letters) if i not in places)
    w_free = "".join(letters[i] for i in range(weight.ndim) if roles[i] == PRODUCED)
    out = "".join(letters[i] for i in w_batch) + (
        w_free + x_free if weight_first else x_free + w_free
    )
    value = multiplied(weight, x, x_letters, out, bind, precision=precision)
    return Product(value, roles, x)


def summed(
    weight: Scaled, bind: Callable[..., Any], *, axes: Sequence[int], **_: Any
) -> Product | None:
    """``sum(other * weight)`` over axes: a matrix product that is written by hand."""
    view, x = weight.weight, weight.other
    roles = tuple(CONTRACTED if i in axes else BATCH for i in range(view.ndim))
    letters = named(range(view.ndim))
    out = "".join(c for i, c in enumerate(letters) if i not in axes)

    def base_product(x: Array, base: Array) -> Array:
        return bind(x * base)

    return Product(multiplied(view, x, letters, out, base_product), roles, x)


def multiplied(
    weight: LazyWeight,
    x: Array,
    x_letters: str,
    out: str,
    base_product: Callable[[Array, Array], Array],
    *,
    precision: Any = None,
) -> Array:
    """The einsum of ``x`` with a weight whose axes have the letters a, b, c, ..."""
    letters = named(range(weight.ndim))
    if weight.gain is not None:
        gained = [letters[axis] for axis in weight.gain.axes]
        if any(c in out for c in gained) and any(c not in out for c in gained):
            weight = settled(weight)
    gain = weight.gain
    if gain is None:
        y = base_product(x, weight.base)
    elif all(letters[axis] in out for axis in gain.axes):
        y = base_product(x, weight.base)
        y = y * along(gain, out, y.dtype)
    else:
        y = base_product(x * along(gain, x_letters, x.dtype), weight.base)
    for part in weight.parts:
        for term in part.terms:
            y = y + _term(term, part.window, weight.shape, x, x_letters, out, precision).astype(
                y.dtype
            )
    return y


def along(factor: Factor, letters: str, dtype: Any) -> Array:
    """A factor without a rank, to be multiplied with an array of axes of these letters."""
    own = named(factor.axes)
    order = sorted(range(len(own)), key=lambda i: letters.index(own[i]))
    value = factor.value[..., 0].transpose(order).astype(dtype)
    return jnp.expand_dims(value, [i for i, c in enumerate(letters) if c not in own])


def _term(
    term: Term,
    window: tuple[Window, ...],
    shape: tuple[int, ...],
    x: Array,
    x_letters: str,
    out: str,
    precision: Any,
) -> Array:
    """What one adapter adds to a product: ``gain * scaling * (x·a)·b``."""
    ranges = {named([i]): one for i, one in enumerate(window) if one is not None}
    inside = tuple(slice(*ranges[c]) if c in ranges else slice(None) for c in x_letters)
    x = x[inside] if any(c in ranges for c in x_letters) else x
    x = dropped(x, term)
    gain = term.gain
    if gain is not None and not all(named([axis]) in out for axis in gain.axes):
        if any(named([axis]) in out for axis in gain.axes):
            # The gain reaches over axes of both kinds: it joins one of the factors.
            term, gain = gained(term), None
        else:
            x, gain = x * along(gain, x_letters, x.dtype), None
    dtype = common_dtype(x, term.a.value, term.b.value) if term.dtype is None else term.dtype
    first, second = _in_order(term, x_letters, out)
    kept = "".join(
        dict.fromkeys(c for c in x_letters + first.letters if c in out or c in second.letters)
    )
    target = "".join(c for c in out if c in kept + second.letters)
    y = low_rank_product(
        x.astype(dtype),
        first.value.astype(dtype),
        scaled_by(second.value.astype(dtype), term.scaling),
        f"{x_letters},{first.letters}->{kept}",
        f"{kept},{second.letters}->{target}",
        precision=precision,
    )
    if gain is not None:
        y = y * along(gain, target, y.dtype)
    y = jnp.expand_dims(y, [i for i, c in enumerate(out) if c not in target])
    lengths = dict(zip(named(range(len(shape))), shape, strict=True))
    return _placed_in(y, out, ranges, lengths)


def scaled_by(factor: Array, scaling: float) -> Array:
    """A factor times the scaling, which costs less than the product times it."""
    return factor if scaling == 1 else factor * jnp.asarray(scaling, factor.dtype)


def _placed_in(y: Array, out: str, ranges: dict[str, Any], lengths: dict[str, int]) -> Array:
    """A result with zeros beside the windows of its axes."""
    if not any(c in ranges for c in out):
        return y
    full = [
        ranges[c][1] - ranges[c][0] if c in ranges else n for c, n in zip(out, y.shape, strict=True)
    ]
    pad = [(ranges[c][0], lengths[c] - ranges[c][1]) if c in ranges else (0, 0) for c in out]
    return jnp.pad(jnp.broadcast_to(y, full), pad)


def _in_order(term: Term, x_letters: str, out: str) -> tuple[Factor, Factor]:
    """The factor that ``x`` meets first: the one with more of the axes that are summed."""
    summed_in = [sum(c not in out for c in named(factor.axes)) for factor in (term.a, term.b)]
    return (term.a, term.b) if summed_in[0] >= summed_in[1] else (term.b, term.a)


def gained(term: Term) -> Term:
    """The same term without a gain, which multiplies the factor that has its axes."""
    assert term.gain is not None
    for name in "ab":
        factor = getattr(term, name)
        if set(term.gain.axes) <= set(factor.axes):
            missing = [i for i, axis in enumerate(factor.axes) if axis not in term.gain.axes]
            value = factor.value * jnp.expand_dims(term.gain.value, missing)
            new = Factor(value.astype(factor.value.dtype), factor.axes)
            return dataclasses.replace(term.with_factor(name, new), gain=None)
    raise AssertionError("a gain lies along axes of one factor")


def dropped(x: Array, term: Term) -> Array:
    """The input of ``x·a``, with dropout."""
    if term.key is None or not term.rate:
        return x
    keep = jax.random.bernoulli(term.key, 1 - term.rate, x.shape)
    return jnp.where(keep, x / (1 - term.rate), 0).astype(x.dtype)


# --- Rows of a table -----------------------------------------------------------------------------


def gather(
    weight: LazyWeight, indices: Array, bind: Callable[..., Any], **params: Any
) -> LazyWeight | Product | None:
    """A lookup: the rows of one factor, times the other. A single row is a view."""
    numbers, sizes = params["dimension_numbers"], params["slice_sizes"]
    indexed = [i for i in numbers.start_index_map if sizes[i] == 1]
    whole = [i for i in range(weight.ndim) if i not in indexed]
    # A slice of a whole axis starts at 0, unless rows outside are filled with another value.
    moved = set(numbers.start_index_map) - set(indexed) and params["mode"] in FILLING
    if (
        numbers.operand_batching_dims
        or not set(numbers.collapsed_slice_dims) <= set(indexed)
        or any(sizes[i] != weight.shape[i] for i in whole)
        or moved
    ):
        return None
    weight = without_windows(weight, range(weight.ndim))
    batch = indices.shape[:-1]
    ndim = len(batch) + len(numbers.offset_dims)
    batch_at = [j for j in range(ndim) if j not in numbers.offset_dims]
    at = {axis: indices[..., k] for k, axis in enumerate(numbers.start_index_map)}
    kept = [i for i in range(weight.ndim) if i not in numbers.collapsed_slice_dims]
    place = dict(zip(kept, numbers.offset_dims, strict=True))

    def change(factor: Factor) -> Factor:
        mine = [i for i in factor.axes if i in indexed]
        others = [i for i in factor.axes if i in whole]
        value, axes = factor.value, [place[i] for i in others]
        if mine:
            order = [factor.axes.index(i) for i in (*mine, *others)]
            value = jnp.transpose(value, [*order, value.ndim - 1])
            value = value.at[tuple(at[i] for i in mine)].get(
                mode=params["mode"], fill_value=params.get("fill_value")
            )
            axes = [*batch_at, *axes]
        order = sorted(range(len(axes)), key=axes.__getitem__)
        value = jnp.transpose(value, [*order, value.ndim - 1])
        return Factor(value, tuple(sorted(axes)))

    made_of: list[tuple[int, ...]] = [()] * ndim
    for i in kept:
        made_of[place[i]] = (i,) if i in whole else ()
    view = rebuilt(weight, bind(weight.base, indices), change, made_of)
    if not batch or view is None:
        return view
    roles = tuple(CONTRACTED if i in indexed else PRODUCED for i in range(weight.ndim))
    return Product(_looked_up(view), roles, indices)


def _looked_up(view: LazyWeight) -> Array:
    """Rows of a table with their adapters, each dropped by itself."""
    total = view.base
    if view.gain is not None:
        total = total * placed(view.gain, total.dtype, view.ndim)
    for part in view.parts:
        for term in part.terms:
            rows = dataclasses.replace(term.a, value=dropped(term.a.value, term))
            plain = LazyWeight(
                jnp.zeros_like(total),
                (dataclasses.replace(part, terms=(dataclasses.replace(term, a=rows),)),),
            )
            total = total + dense(plain).astype(total.dtype)
    return total

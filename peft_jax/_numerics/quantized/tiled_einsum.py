"""Einsum equations as products with one stored matrix, for CPUs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from peft_jax._numerics.einsum import split_terms
from peft_jax._numerics.quantized.cpu_tiles import Part, product, transposed_product
from peft_jax._numerics.quantized.encoding import scaled
from peft_jax._numerics.quantized.methods import Method
from peft_jax._numerics.quantized.values import Layout, unpack

Array = jax.Array


def tiled_einsum(
    equation: str, x: Array, array: Array, scale: Array, layout: Layout
) -> Array | None:
    """``einsum(equation, x, dequantize(...))`` in float32, in tiles of the weight.

    The weight is read as a matrix: contracted axes are its rows and the others its columns, or the
    other way round. Where its axes do not lie so, or some are shared with input and output, the
    product runs for one index of an axis after the other.

    Returns:
      The product; None where the weight is better dequantized as a whole.
    """
    left, right, out = split_terms(equation)
    contracted = "".join(c for c in right if c in left and c not in out)
    produced = "".join(c for c in right if c not in left)
    if not contracted or not produced or layout.odd or not x.size or not array.size:
        return None
    if right not in (contracted + produced, produced + contracted):
        return _one_by_one(equation, x, array, scale, layout)
    forward = right == contracted + produced
    matrix = _matrix(array, scale, layout, len(contracted if forward else produced))
    if matrix is None:
        return None
    free = [c for c in left if c not in contracted]
    x = x.transpose([left.index(c) for c in (*free, *contracted)]).astype(jnp.float32)
    lengths = x.shape[: len(free)]
    y = (_forward if forward else _backward)(x.reshape(-1, *x.shape[len(free) :]), matrix)
    if y is None:
        return None
    y = y.reshape(*lengths, *y.shape[1:])
    return y.transpose([[*free, *produced].index(c) for c in out])


@dataclasses.dataclass(frozen=True)
class _Half:
    """Codes in the bytes, as one matrix.

    Attributes:
      part: what the tiles need to know.
      rows: a factor for each row, of the shape of the row axes or one that broadcasts; None: 1.
      columns: the same for columns.
    """

    part: Part
    rows: Array | None
    columns: Array | None


@dataclasses.dataclass(frozen=True)
class _Matrix:
    """A stored weight as one or two matrices.

    Attributes:
      array: the bytes, ``(rows, columns)``.
      row_axes: lengths of the row axes in the bytes.
      column_axes: of the column axes.
      halves: the matrix, or that of the low and that of the high codes.
      split_rows: the row axis along which the halves lie behind each other.
      split_columns: the column axis, counted among those.
    """

    array: Array
    row_axes: tuple[int, ...]
    column_axes: tuple[int, ...]
    halves: tuple[_Half, ...]
    split_rows: int | None
    split_columns: int | None


def _matrix(array: Array, scale: Array, layout: Layout, rows: int) -> _Matrix | None:
    method, packed = layout.row, None
    if layout.axis is not None:
        packed = layout.axis % array.ndim
    scales = [scale] if packed is None else _halved(scale, packed, array.shape[packed])
    differ = packed is not None and packed < rows and scale.shape[packed] > 1
    halves = [
        _half(method, array.shape, each, rows, None if packed is None else shift, differ)
        for each, shift in zip(scales, (0, 4), strict=False)
    ]
    if any(half is None for half in halves):
        return None
    return _Matrix(
        array.reshape(math.prod(array.shape[:rows]), -1),
        array.shape[:rows],
        array.shape[rows:],
        tuple(half for half in halves if half is not None),
        packed if packed is not None and packed < rows else None,
        packed - rows if packed is not None and packed >= rows else None,
    )


def _halved(scale: Array, axis: int, half: int) -> list[Array]:
    """The scales of the low and of the high codes."""
    if scale.shape[axis] == 1:
        return [scale, scale]
    block = 2 * half // scale.shape[axis]
    finer = block // math.gcd(half, block)  # a block that both halves share is cut
    if finer > 1:
        scale = jnp.repeat(scale, finer, axis=axis)
    return jnp.split(scale, 2, axis=axis)


def _half(
    method: Method,
    shape: tuple[int, ...],
    scale: Array,
    rows: int,
    shift: int | None,
    differ: bool,
) -> _Half | None:
    """How the codes in some bits are read as a matrix.

    Args:
      method: by which the codes are stored.
      shape: of the bytes.
      scale: of these codes.
      rows: how many axes are rows.
      shift: which bits; None: all.
      differ: whether halves that lie behind each other have scales of their own, which cannot be
        factors of their sum then.
    """

    def values(bytes_: Array) -> Array:
        if shift is None:
            return method.values(bytes_)
        return method.values(bytes_ >> 4 if shift else bytes_ & 15)

    stackable = shift if method.decode is None else None
    groups = scale.shape[:rows], scale.shape[rows:]
    lengths = shape[:rows], shape[rows:]
    if math.prod(groups[0]) == 1 and not differ:
        column = _repeated(scale.reshape(groups[1]), lengths[1])
        return _Half(Part(values, None, stackable), None, column)
    if math.prod(groups[1]) == 1:
        row = _repeated(scale.reshape(groups[0]), lengths[0])
        return _Half(Part(values, None, stackable), row, None)
    if not all(map(_in_a_row, groups, lengths)):
        return None
    merged = scale.reshape(math.prod(groups[0]), math.prod(groups[1]))
    return _Half(Part(values, merged, stackable), None, None)


def _repeated(scale: Array, lengths: Sequence[int]) -> Array:
    """A factor for each place along axes of these lengths."""
    for axis, length in enumerate(lengths):
        if scale.shape[axis] not in (1, length):
            scale = jnp.repeat(scale, length // scale.shape[axis], axis=axis)
    return scale.astype(jnp.float32)


def _in_a_row(scale: Sequence[int], lengths: Sequence[int]) -> bool:
    """Whether blocks stay blocks when the axes are merged: whole axes after the first cut one."""
    cut = next((i for i, n in enumerate(lengths) if scale[i] != n), len(lengths))
    return all(n == 1 for n in scale[cut + 1 :])


def _forward(x: Array, matrix: _Matrix) -> Array | None:
    """``(m, *rows) @ matrix -> (m, *columns)``."""
    split = matrix.split_rows
    xs = [x] * len(matrix.halves) if split is None else jnp.split(x, 2, axis=split + 1)
    inputs = [
        (part if half.rows is None else part * half.rows[None]).reshape(x.shape[0], -1)
        for part, half in zip(xs, matrix.halves, strict=True)
    ]
    parts = [half.part for half in matrix.halves]
    if matrix.split_columns is None:
        runs = [(inputs, parts)]
    else:
        runs = [([one], [part]) for one, part in zip(inputs, parts, strict=True)]
    ys = [product(given, matrix.array, of) for given, of in runs]
    shaped = []
    for y, half in zip(ys, matrix.halves, strict=False):
        if y is None:
            return None
        y = y.reshape(-1, *matrix.column_axes)
        shaped.append(y if half.columns is None else y * half.columns[None])
    if matrix.split_columns is None:
        return shaped[0]
    return jnp.concatenate(shaped, axis=matrix.split_columns + 1)


def _backward(x: Array, matrix: _Matrix) -> Array | None:
    """``(m, *columns) @ matrix.T -> (m, *rows)``."""
    split = matrix.split_columns
    xs = [x] * len(matrix.halves) if split is None else jnp.split(x, 2, axis=split + 1)
    inputs = [
        (part if half.columns is None else part * half.columns[None]).reshape(x.shape[0], -1)
        for part, half in zip(xs, matrix.halves, strict=True)
    ]
    parts = [half.part for half in matrix.halves]
    if split is None:  # all halves have the same columns, and so the same factors
        ys = transposed_product(inputs[0], matrix.array, parts)
    else:
        runs = [
            transposed_product(one, matrix.array, [part])
            for one, part in zip(inputs, parts, strict=True)
        ]
        ys = None if None in runs else tuple(run[0] for run in runs if run is not None)
    if ys is None:
        return None
    shaped = []
    for y, half in zip(ys, matrix.halves, strict=True):
        y = y.reshape(-1, *matrix.row_axes)
        shaped.append(y if half.rows is None else y * half.rows[None])
    if split is not None:
        return sum(shaped[1:], start=shaped[0])
    if matrix.split_rows is None:
        return shaped[0]
    return jnp.concatenate(shaped, axis=matrix.split_rows + 1)


def _one_by_one(
    equation: str, x: Array, array: Array, scale: Array, layout: Layout
) -> Array | None:
    """The product for one index of a kernel axis after the other; the shortest axis will do."""
    left, right, out = split_terms(equation)
    packed = None if layout.axis is None else layout.axis % array.ndim
    axes = [i for i in range(len(right)) if i != packed]
    axis = min(axes, key=lambda i: array.shape[i])
    letter, length = right[axis], array.shape[axis]
    if packed is not None:
        place = packed - (packed > axis) - (array.ndim - 1)
        layout = dataclasses.replace(layout, axis=place)
    inner = ",".join([left.replace(letter, ""), right.replace(letter, "")])
    inner = f"{inner}->{out.replace(letter, '')}"
    block = length // scale.shape[axis]

    def at(operand: Array, axis: int, i: Array) -> Array:
        return jax.lax.dynamic_index_in_dim(operand, i, axis, keepdims=False)

    def one(i: Array) -> Array:
        given = at(x, left.index(letter), i) if letter in left else x
        bytes_, factor = at(array, axis, i), at(scale, axis, i // block)
        y = tiled_einsum(inner, given, bytes_, factor, layout)
        if y is None:
            weight = scaled(layout.row.values(unpack(bytes_, layout)), factor)
            y = jnp.einsum(inner, given.astype(jnp.float32), weight)
        return y

    if letter in out:
        ys = jax.lax.map(one, jnp.arange(length))
        return jnp.moveaxis(ys, 0, out.index(letter))
    start = jnp.zeros(jax.eval_shape(one, jnp.zeros((), jnp.int32)).shape, jnp.float32)
    return jax.lax.fori_loop(0, length, lambda i, sum: sum + one(i), start)

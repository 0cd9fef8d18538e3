"""Products of a matrix with one that is stored in few bits, for CPUs: in tiles that fit the cache.

What runs fast here was found by measurement (`benchmarks/quantized_matmul.py`), with jaxlib 0.10.2:

- A loop over tiles keeps dequantized numbers in the cache, and XLA cannot merge the loops of the
  forward and the backward pass, which would keep the dequantized matrix in between.
- Few rows of input: whole rows of the matrix; in the transposed product the weights stand left.
- Many rows of input: tiles of 512 x 1024, or 128 columns of bytes.
- One row of input: no dot of the row, which XLA computes naively, but sums of 16 products at a
  time, and a dot with ones for the rest; a plain sum would be merged into the naive one.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

Array = jax.Array

_FEW = 64  # rows of input
_UNROLLED = 16


@dataclasses.dataclass(frozen=True)
class Part:
    """One of the matrices in an array of bytes: all of it, or the low or the high codes.

    Attributes:
      values: from bytes to numbers in float32.
      scale: of shape ``(rows / b, columns / c)``; None: numbers are used as they are.
      shift: which bits of the bytes hold the codes, if values come from the codes alone.
    """

    values: Callable[[Array], Array]
    scale: Array | None
    shift: int | None = None

    def blocks(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """How many rows and columns share a scale."""
        if self.scale is None:
            return 1, 1
        rows, columns = self.scale.shape
        return shape[0] // rows, shape[1] // columns

    def tile(self, array: Array, row: Array | int, column: Array | int, size: _Size) -> Array:
        """Dequantized numbers of shape ``size``."""
        numbers = self.values(jax.lax.dynamic_slice(array, (row, column), size))
        if self.scale is None:
            return numbers
        b, c = self.blocks(array.shape)
        at, sizes = (row // b, column // c), (size[0] // b, size[1] // c)
        split, unit = _split(size, (b, c))
        scale = jax.lax.dynamic_slice(self.scale, at, sizes).astype(jnp.float32)
        return (numbers.reshape(split) * scale.reshape(unit)).reshape(size)


_Size = tuple[int, int]


def product(xs: Sequence[Array], array: Array, parts: Sequence[Part]) -> Array | None:
    """``sum(x @ part)``, in float32; None where the matrix is too small for tiles.

    Args:
      xs: for each part an input of shape ``(m, rows)``.
      array: bytes of shape ``(rows, columns)``.
      parts: the matrices in it.
    """
    m = xs[0].shape[0]
    if m == 1:
        y = _row_product(xs, array, parts)
        if y is not None:
            return y
    rows, columns = array.shape
    size = _tile_size(array, parts, few=m <= _FEW, transposed=False)
    if size is None:
        return None
    high, wide = size
    stacked = m <= _FEW and all(part.shift is not None for part in parts) and len(parts) > 1
    scales = _stacked_scales(parts) if stacked else None

    def tile(i: Array | int, column: Array | int) -> Array:
        row = _start(i, high, rows)
        slices = [jax.lax.dynamic_slice_in_dim(x, row, high, 1) for x in xs]
        if rows % high:  # the last tile begins earlier: its first rows have been counted
            fresh = row + jnp.arange(high) >= i * high
            slices = [jnp.where(fresh[None], x, 0.0) for x in slices]
        if stacked:
            weight = _stacked_tile(array, parts, scales, row, column, size)
            return jnp.concatenate(slices, axis=1) @ weight
        tiles = [part.tile(array, row, column, size) for part in parts]
        return sum(
            (x @ weight for x, weight in zip(slices[1:], tiles[1:], strict=True)),
            start=slices[0] @ tiles[0],
        )

    def column_of_tiles(column: Array | int) -> Array:
        if high == rows:
            return tile(0, column)
        start = jnp.zeros((m, wide), jnp.float32)
        return jax.lax.fori_loop(0, -(-rows // high), lambda i, sum: sum + tile(i, column), start)

    if wide == columns:
        return column_of_tiles(0)

    def write(j: Array, y: Array) -> Array:
        column = _start(j, wide, columns)
        return jax.lax.dynamic_update_slice_in_dim(y, column_of_tiles(column), column, 1)

    start = jnp.zeros((m, columns), jnp.float32)
    return jax.lax.fori_loop(0, -(-columns // wide), write, start)


def transposed_product(y: Array, array: Array, parts: Sequence[Part]) -> tuple[Array, ...] | None:
    """``y @ part.T`` for each part, in float32; None where the matrix is too small for tiles.

    Args:
      y: of shape ``(m, columns)``.
      array: bytes of shape ``(rows, columns)``.
      parts: the matrices in it.
    """
    m, (rows, columns) = y.shape[0], array.shape
    if m == 1:
        found = _transposed_row_product(y, array, parts)
        if found is not None:
            return found
    size = _tile_size(array, parts, few=m <= _FEW, transposed=True)
    if size is None:
        return None
    high, wide = size
    weights_left = m <= _FEW

    def tile(row: Array | int, column: Array | int) -> tuple[Array, ...]:
        slice = jax.lax.dynamic_slice_in_dim(y, column, wide, 1)
        pairs = [(part.tile(array, row, column, size), slice) for part in parts]
        if not weights_left:
            pairs = [(right, left) for left, right in pairs]
        return tuple(
            jax.lax.dot_general(left, right, (((1,), (1,)), ((), ()))) for left, right in pairs
        )

    def row_of_tiles(row: Array | int) -> tuple[Array, ...]:
        if wide == columns:
            return tile(row, 0)
        shape = (high, m) if weights_left else (m, high)
        start = tuple(jnp.zeros(shape, jnp.float32) for _ in parts)

        def add(j: Array, sums: tuple[Array, ...]) -> tuple[Array, ...]:
            return tuple(map(jnp.add, sums, tile(row, j * wide)))

        return jax.lax.fori_loop(0, columns // wide, add, start)

    axis = 0 if weights_left else 1

    def write(i: Array, outs: tuple[Array, ...]) -> tuple[Array, ...]:
        row = _start(i, high, rows)
        return tuple(
            jax.lax.dynamic_update_slice_in_dim(out, sums, row, axis)
            for out, sums in zip(outs, row_of_tiles(row), strict=True)
        )

    start = tuple(jnp.zeros((rows, m) if weights_left else (m, rows), jnp.float32) for _ in parts)
    outs = jax.lax.fori_loop(0, -(-rows // high), write, start)
    return tuple(out.T for out in outs) if weights_left else outs


# --- Tiles ---------------------------------------------------------------------------------------


def _tile_size(
    array: Array, parts: Sequence[Part], *, few: bool, transposed: bool
) -> tuple[int, int] | None:
    """Rows and columns of a tile; None where there would be one tile alone.

    A loop of one trip is no loop to XLA.
    """
    rows, columns = array.shape
    b, c = parts[0].blocks(array.shape)
    share = 3 - len(parts)  # bytes of one code each make half the numbers
    if not few and not transposed and len(parts) == 1 and c == 1 and b == 1:
        wide = min(128, columns // 2)
        return (min(rows, 8192), wide) if wide else None
    numbers = share << (20 if few else 19)
    wide = _evenly(columns, c, 8192 if few or transposed else 1024, whole=transposed)
    most = min(numbers // wide, 512 * share if few else rows, -(-rows // 2))
    high = _evenly(rows, b, max(most, 1))
    if high >= rows and wide >= columns:
        return None
    return high, wide


def _evenly(length: int, block: int, most: int, *, whole: bool = False) -> int:
    """The length of tiles: multiples of a block, nearly equal, at most ``most`` where that can be.

    Args:
      length: to be cut into tiles, of which the last may begin earlier to end with it.
      block: what is not cut.
      most: the longest tile.
      whole: whether tiles must divide the length.
    """
    tiles = max(1, -(-length // max(most, block)))
    tile = -(-length // (tiles * block)) * block
    if not whole or length % tile == 0:
        return min(tile, length)
    return next(n for n in range(tile, length + 1, block) if length % n == 0)


def _start(i: Array | int, tile: int, length: int) -> Array | int:
    """Where a tile begins: the last one so that it ends with the matrix."""
    return i * tile if length % tile == 0 else jnp.minimum(i * tile, length - tile)


def _stacked_scales(parts: Sequence[Part]) -> Array | None:
    """The scales of all parts in one array: slices of several cannot be told at run time."""
    found = [part.scale for part in parts if part.scale is not None]
    return jnp.stack(found) if found else None


def _stacked_tile(
    array: Array,
    parts: Sequence[Part],
    scales: Array | None,
    row: Array | int,
    column: Array | int,
    size: _Size,
) -> Array:
    """Tiles of all parts above each other, as one expression: a concatenation is not vectorised."""
    b, c = parts[0].blocks(array.shape)
    split, unit = (size, size) if scales is None else _split(size, (b, c))
    bytes_ = jax.lax.dynamic_slice(array, (row, column), size).reshape(1, *split)
    shifts = jnp.array([part.shift for part in parts], jnp.int32)
    codes = bytes_.astype(jnp.int32) >> shifts.reshape(-1, *(1 for _ in split)) & 15
    numbers = parts[0].values(codes)
    if scales is not None:
        sizes = (len(parts), size[0] // b, size[1] // c)
        scale = jax.lax.dynamic_slice(scales, (0, row // b, column // c), sizes)
        numbers = numbers * scale.astype(jnp.float32).reshape(-1, *unit)
    return numbers.reshape(-1, size[1])


def _split(size: _Size, blocks: _Size) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shape of a tile with axes for its blocks, and that of its scales beside it."""
    split: list[int] = []
    unit: list[int] = []
    for length, block in zip(size, blocks, strict=True):
        split += [length // block, block] if block > 1 else [length]
        unit += [length // block, 1] if block > 1 else [length]
    return tuple(split), tuple(unit)


# --- One row of input ----------------------------------------------------------------------------


def _row_product(xs: Sequence[Array], array: Array, parts: Sequence[Part]) -> Array | None:
    rows, columns = array.shape
    b, c = parts[0].blocks(array.shape)
    unrolled = math.gcd(rows if b == 1 else b, _UNROLLED)
    one_axis = parts[0].scale is None or (b > 1) != (c > 1)
    if unrolled < 4 or not one_axis or rows < 2 * unrolled:
        return None
    groups = rows // unrolled
    folded = array.reshape(groups, unrolled, columns // c, c)
    sums = []
    for x, part in zip(xs, parts, strict=True):
        factors = x.reshape(rows, 1)
        scale = None if part.scale is None else part.scale.astype(jnp.float32)
        if c > 1 and scale is not None:
            factors = factors * scale
        factors = factors.reshape(groups, unrolled, -1, 1)
        sum = factors[:, 0] * part.values(folded[:, 0])
        for r in range(1, unrolled):
            sum = sum + factors[:, r] * part.values(folded[:, r])
        sum = sum.reshape(groups, columns)
        if c == 1 and scale is not None:
            sum = sum * jnp.repeat(scale, b // unrolled, axis=0)
        sums.append(sum)
    total = sums[0] if len(sums) == 1 else sums[0] + sums[1]
    return jnp.ones((1, groups), jnp.float32) @ total


def _transposed_row_product(
    y: Array, array: Array, parts: Sequence[Part]
) -> tuple[Array, ...] | None:
    rows, columns = array.shape
    b, c = parts[0].blocks(array.shape)
    lanes = math.gcd(columns, 256 if parts[0].scale is None else 512)
    if c > 1 or lanes < 64 or columns // lanes > 64:
        return None
    chunks = array.reshape(rows // b, b, columns // lanes, lanes)
    ones = jnp.ones((lanes, 1), jnp.float32)
    outs = []
    for part in parts:
        factors = y.reshape(1, 1, -1, lanes)
        if part.scale is not None:
            scaled = (part.scale.astype(jnp.float32) * y).reshape(rows // b, 1, -1, lanes)
            factors = jax.lax.optimization_barrier(scaled)  # once for a block, not for each row
        sum = factors[:, :, 0] * part.values(chunks[:, :, 0])
        for r in range(1, columns // lanes):
            sum = sum + factors[:, :, r] * part.values(chunks[:, :, r])
        outs.append((sum.reshape(rows, lanes) @ ones).reshape(1, rows))
    return tuple(outs)

"""A weight to few bits, some rows at a time, as `peft.quantize` does it at once."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from peft_jax._numerics import (
    METHODS,
    Layout,
    QuantizationMethod,
    axes_for,
    blocks_of,
    check_range,
    encode,
    packed_axis,
)
from peft_jax.io.checkpoints.read import Checkpoint, row_ranges
from peft_jax.io.files.formats import Array
from peft_jax.io.files.safetensors import TensorStream

_CHUNK = 2**23  # values that are encoded at once


@dataclasses.dataclass(frozen=True)
class Encoding:
    """How a weight of a checkpoint is stored: `peft.quantize`, in slices of rows.

    Attributes:
      checkpoint: with the weight.
      name: of the weight.
      method: any but ``NONE``.
      blocks: for each axis, how many values in a row share a scale.
      packed: the axis along which two values share a byte, counted from the end, or None.
    """

    checkpoint: Checkpoint
    name: str
    method: QuantizationMethod
    blocks: tuple[int, ...]
    packed: int | None

    @classmethod
    def of(
        cls, checkpoint: Checkpoint, name: str, method: QuantizationMethod, *, inputs_last: bool
    ) -> Encoding:
        """The encoding of a weight.

        Args:
          checkpoint: with the weight.
          name: of the weight.
          method: any but ``NONE``.
          inputs_last: whether the weight is ``(out, in)``: blocks and scales run along its last
            axis then.

        Raises:
          ValueError: with the name, where the method does not go with the weight's dtype or shape.
        """
        shape, dtype = checkpoint.shape(name), checkpoint.dtype(name)
        try:
            if not jnp.issubdtype(dtype, jnp.floating) or 0 in shape:
                raise ValueError(f"it is {dtype} of shape {shape}, and no floats to be quantized")
            plan = _along_inputs if inputs_last else _as_it_lies
            return cls(checkpoint, name, *plan(method, shape))
        except ValueError as error:
            raise ValueError(f"{name!r}: {error} Or leave it out by --exclude.") from error

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""
        return self.checkpoint.shape(self.name)

    @property
    def layout(self) -> Layout:
        """The name of the stored values in a tree."""
        length = None if self.packed is None else self.shape[self.packed]
        return Layout(self.method.value, self.packed, length)

    @property
    def values(self) -> TensorStream:
        """The stored values."""
        shape = list(self.shape)
        if self.packed is not None:
            shape[self.packed] = -(-shape[self.packed] // 2)
        dtype = np.dtype(METHODS[self.method].dtype)
        return TensorStream(dtype, tuple(shape), self._value_chunks)

    @property
    def scale(self) -> TensorStream:
        """The scale, as long along each axis as there are blocks."""
        shape = tuple(n // block for n, block in zip(self.shape, self.blocks, strict=True))
        return TensorStream(np.dtype(METHODS[self.method].scale_dtype), shape, self._scale_chunks)

    @property
    def _row_bytes(self) -> int:
        return max(int(np.prod(self.shape[1:], dtype=np.int64)), 1) * 4

    @property
    def _whole_columns(self) -> bool:
        """Whether all rows together share their scales."""
        return self.blocks[0] == self.shape[0] > 1

    def _ranges(self, rows: int, multiple: int = 1) -> Iterator[tuple[int, int]]:
        return row_ranges(rows, self._row_bytes, 4 * _CHUNK, multiple)

    def _scale_chunks(self) -> Iterator[Array]:
        if self._whole_columns:
            yield self._scale_of(self._peak[None])
            return
        for start, stop in self._ranges(self.shape[0], self.blocks[0]):
            yield self._scale_of(self.checkpoint.read_rows(self.name, start, stop))

    def _scale_of(self, rows: Array) -> Array:
        blocks = (min(self.blocks[0], len(rows)), *self.blocks[1:])
        scale, found = _scale(rows, self.method.value, blocks)
        try:
            check_range(self.method, found)
        except ValueError as error:
            raise ValueError(f"{self.name!r}: {error}") from error
        return np.asarray(scale)

    @functools.cached_property
    def _peak(self) -> Array:
        """The largest magnitude in each column, all NaN where one of its numbers is."""
        peak = np.zeros(self.shape[1:], np.float32)
        for start, stop in self._ranges(self.shape[0]):
            rows = self.checkpoint.read_rows(self.name, start, stop)
            peak = np.maximum(peak, np.max(np.abs(rows.astype(np.float32)), axis=0))
        return peak

    def _value_chunks(self) -> Iterator[Array]:
        codes = self._encoder()
        rows, dtype = self.shape[0], METHODS[self.method].dtype
        if self.packed is None or self.packed + len(self.shape) > 0:
            for start, stop in self._ranges(rows):
                chunk = codes(start, stop)
                yield (chunk if self.packed is None else _packed(chunk, self.packed)).astype(dtype)
            return
        half = -(-rows // 2)  # a byte holds this row and the one that lies half of them on
        for start, stop in row_ranges(half, 2 * self._row_bytes, 4 * _CHUNK):
            low = codes(start, stop)
            high = np.zeros_like(low)
            end = min(stop + half, rows)
            high[: end - start - half] = codes(start + half, end)
            yield (low | high << 4).astype(dtype)

    def _encoder(self) -> Callable[[int, int], Array]:
        """From a range of rows to its codes."""
        peak = self._peak[None] if self._whole_columns else None
        block = 1 if self._whole_columns else self.blocks[0]

        def codes(start: int, stop: int) -> Array:
            first, last = start // block * block, -(-stop // block) * block
            rows = self.checkpoint.read_rows(self.name, first, last)
            blocks = self.blocks
            if peak is not None:  # one row more, by which all rows have the scale of the weight
                rows = np.concatenate([rows.astype(np.float32), peak.astype(np.float32)])
                blocks = (len(rows), *self.blocks[1:])
            found, _, _ = encode(jnp.asarray(rows), self.method.value, blocks, None, False)
            return np.asarray(found)[start - first : stop - first]

        return codes


_Plan = tuple[QuantizationMethod, tuple[int, ...], int | None]


def _as_it_lies(method: QuantizationMethod, shape: tuple[int, ...]) -> _Plan:
    """Method, blocks and packed axis of a weight ``(in, out)``."""
    among = tuple(range(len(shape)))[-2:]  # the axes before may be those of a stack
    return method, blocks_of(method, shape, None), packed_axis(method, shape, None, among=among)


def _along_inputs(method: QuantizationMethod, shape: tuple[int, ...]) -> _Plan:
    """The same of a weight ``(out, in)``: what its transpose has, the other way round."""
    if method in (QuantizationMethod.Q4_0, QuantizationMethod.Q4_0_TRANSPOSE):
        method, of_transpose = QuantizationMethod.Q4_0, QuantizationMethod.Q4_0_TRANSPOSE
    else:
        of_transpose = method
    *front, out, inputs = range(len(shape))
    turned = tuple(shape[axis] for axis in (*front, inputs, out))
    blocks = blocks_of(of_transpose, turned, axes_for(of_transpose, None))
    packed = packed_axis(method, shape, -1, among=(out, inputs))
    return method, (*blocks[:-2], blocks[-1], blocks[-2]), packed


@functools.partial(jax.jit, static_argnames=("method", "blocks"))
def _scale(
    x: jax.Array, method: str, blocks: tuple[int, ...]
) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
    _, scale, found = encode(x, method, blocks, None, True)
    return scale, found


def _packed(codes: Array, axis: int) -> Array:
    """Two codes in each byte along an axis; see `Layout`."""
    length = codes.shape[axis]
    half = -(-length // 2)
    low = np.take(codes, range(half), axis)
    widths = [(0, 0)] * codes.ndim
    widths[axis] = (0, 2 * half - length)
    return low | np.pad(np.take(codes, range(half, length), axis), widths) << 4

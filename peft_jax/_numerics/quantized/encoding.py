"""Quantization of arrays: what all methods share. Arrays only."""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from peft_jax._numerics.jax_internals import is_traced
from peft_jax._numerics.quantized.methods import METHODS, QuantizationMethod
from peft_jax._numerics.quantized.values import Layout, StoredValues, as_stored, pack, unpack
from peft_jax._numerics.sharding import without_explicit_axes

__all__ = [
    "axes_for",
    "blocks_of",
    "check_range",
    "check_scale",
    "dequantize",
    "encode",
    "is_known",
    "packed_axis",
    "quantize",
    "quantize_layer",
    "simulate_quantize",
]


Array = jax.Array
Blocks = tuple[int, ...]  # for each axis, how many values in a row share a scale
Range = tuple[Array, Array]  # whether all numbers are finite, and all scales


def quantize(
    x: Array, method: QuantizationMethod | str, axes: Sequence[int] | int | None = None
) -> tuple[Any, Array]:
    """Stores an array in few bits: ``x ~ value(q) * scale``. Inverse: `dequantize`.

    Q4_0 is GGML's format, bit for bit; NF4 is that of QLoRA (https://arxiv.org/abs/2305.14314);
    SFP8 is gemma.cpp's switching float. Groups of zeros give zeros; groups whose largest magnitude
    is below 1e-36 count as zeros.

    Args:
      x: floats of any shape; computed in float32.
      method: see `QuantizationMethod`.
      axes: for methods with a scale per output channel, the axes that the layer contracts; None:
        the axis before last, of arrays of two axes. The other methods take none.

    Returns:
      ``(values, scale)``: `StoredValues`, a pytree node of one int8 or uint8 array, and an array of
      as many axes as ``x``, along each of which the length of ``x`` is a multiple of its own. For
      ``NONE``, ``x`` itself and ones.

    Raises:
      ValueError: on lengths that blocks do not divide, axes that do not fit, and, outside of
        ``jax.jit``, on NaN and infinity and on scales beyond float16.
    """
    method, x = QuantizationMethod(method), _checked(x)
    if method is QuantizationMethod.NONE:
        return x, jnp.ones((1,) * x.ndim, x.dtype)
    return _stored(x, method, blocks_of(method, x.shape, axes), axes)


def quantize_layer(
    x: Any, method: QuantizationMethod, contracted: Sequence[int]
) -> tuple[StoredValues, Array]:
    """`quantize` for a layer that contracts these axes, by any method but ``NONE``."""
    x = _checked(x)
    return _stored(x, method, blocks_of(method, x.shape, axes_for(method, contracted)), contracted)


def axes_for(method: QuantizationMethod, contracted: Sequence[int] | None) -> Any:
    """The ``axes`` that a method takes for a layer: those that it contracts, or None."""
    return contracted if method.per_channel else None


def _stored(
    x: Array, method: QuantizationMethod, blocks: Blocks, contracted: Any
) -> tuple[StoredValues, Array]:
    packed = packed_axis(method, x.shape, contracted)
    (x,), back = without_explicit_axes(x)
    array, scale, found = encode(x, method.value, blocks, packed, is_known(x))
    check_range(method, found)
    layout = Layout(method.value, packed, None if packed is None else x.shape[packed])
    return StoredValues(layout, back(array)), back(scale)


def dequantize(values: Any, scale: Array, dtype: Any = jnp.float32) -> Array:
    """The array that stored values stand for: ``value(q) * scale``, rounded once to ``dtype``.

    Args:
      values: from `quantize`, or a plain array, whose numbers are the values.
      scale: an array of as many axes, whose lengths divide those of the values.
      dtype: of the result.

    Raises:
      ValueError: where the scale does not fit the values.
    """
    return scaled(decoded(values), jnp.asarray(scale)).astype(dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
@functools.partial(jax.jit, static_argnames=("method", "blocks"))
def _simulated(x: Array, method: str, blocks: Blocks) -> Array:
    codes, scale, _ = _encode(x, method, blocks, False)
    return scaled(METHODS[method].values(codes), scale).astype(x.dtype)


@_simulated.defjvp
def _straight_through(
    method: str, blocks: Blocks, primals: tuple[Array], tangents: tuple[Array]
) -> tuple[Array, Array]:
    return _simulated(*primals, method, blocks), tangents[0]


def simulate_quantize(
    x: Array, method: QuantizationMethod | str, axes: Sequence[int] | int | None = None
) -> Array:
    """What an array becomes by storing it in few bits, with straight-through gradients.

    Equal, bit for bit, to ``dequantize(*quantize(x, method, axes))`` rounded to the dtype of
    ``x``; its derivative is the identity
    (https://arxiv.org/abs/1308.3432). ``NONE`` changes nothing.

    Args:
      x: floats of any shape.
      method: see `QuantizationMethod`.
      axes: as for `quantize`.

    Raises:
      ValueError: as `quantize`.
    """
    method, x = QuantizationMethod(method), _checked(x)
    if method is QuantizationMethod.NONE:
        return x
    blocks = blocks_of(method, x.shape, axes)
    if is_known(x):
        (known,), _ = without_explicit_axes(x)
        check_range(method, _range(known, method.value, blocks))
    return _simulated(x, method.value, blocks)


def _checked(x: Any) -> Array:
    if as_stored(x) is not None:
        raise ValueError(f"The values are quantized already: {x!r}. Dequantize them first.")
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating) or x.size == 0:
        raise ValueError(
            f"Floating-point numbers are quantized, got {x.dtype}{list(x.shape)}. Leave other "
            "parameters out."
        )
    return x


def blocks_of(
    method: QuantizationMethod, shape: Sequence[int], axes: Sequence[int] | int | None
) -> Blocks:
    """How many values share a scale along each axis."""
    rank, block = len(shape), METHODS[method].block
    if block is not None:
        axis, length = block
        if axes is not None:
            raise ValueError(
                f"{method.name} has blocks of {length} along axis {axis}, whatever the layer "
                f"contracts: axes={axes!r} has no meaning. Leave it out."
            )
        if rank < -axis or shape[axis] % length:
            raise ValueError(
                f"{method.name} has blocks of {length} along axis {axis}, which do not divide the "
                f"shape {tuple(shape)}. Leave this weight out (`select=`), choose a method with a "
                "scale per output channel (INT4, INT8, SFP8), or pad the weight."
            )
        return tuple(length if i == axis % rank else 1 for i in range(rank))
    if axes is None:
        if rank != 2:
            raise ValueError(
                f"{method.name} has a scale for each output channel; which axes of a weight of "
                f"shape {tuple(shape)} are inputs cannot be told. Pass `axes`, the contracted ones."
            )
        axes = -2
    chosen = _positions(axes, shape)
    if not chosen:
        raise ValueError(
            f"{method.name} has a scale for each output channel, and the layer contracts no axis "
            f"of its weight of shape {tuple(shape)}. Choose a method with blocks, or leave it out."
        )
    if not all(-rank <= axis < rank for axis in chosen):
        raise ValueError(
            f"axes={axes!r} does not name axes of a weight of shape {tuple(shape)}. Name those "
            "that the layer contracts."
        )
    chosen = {axis % rank for axis in chosen}
    return tuple(length if i in chosen else 1 for i, length in enumerate(shape))


def _positions(axes: Any, shape: Sequence[int]) -> set[int]:
    """Axes, given as one integer or several."""
    try:
        return {operator.index(axis) for axis in (axes if isinstance(axes, Iterable) else [axes])}
    except TypeError as error:
        raise ValueError(
            f"axes={axes!r} does not name axes of a weight of shape {tuple(shape)}: they are one "
            "integer or several."
        ) from error


def packed_axis(
    method: QuantizationMethod,
    shape: Sequence[int],
    axes: Sequence[int] | int | None,
    avoid: Sequence[int] = (),
    among: Sequence[int] | None = None,
) -> int | None:
    """Along which axis two values share a byte: the longest even one of those contracted.

    Products run along contracted axes, so their tiles are rows of bytes then.

    Args:
      method: a method of four or eight bits.
      shape: of the values.
      axes: the contracted axes; None: the axis before last.
      avoid: axes that are taken only where nothing else is left (they are spread over devices).
      among: the axes that may be taken; None: all.

    Returns:
      An axis counted from the end; None for values of eight bits.
    """
    if METHODS[method].bits == 8:
        return None
    rank = len(shape)
    wanted = {max(-2, -rank)} if axes is None else _positions(axes, shape)
    contracted = {axis % rank for axis in wanted}
    avoided = {axis % rank for axis in avoid}

    def rating(axis: int) -> tuple[bool, bool, bool, int]:
        return shape[axis] % 2 == 0, axis not in avoided, axis in contracted, shape[axis]

    if among is not None and not among:
        raise ValueError(
            f"Each of its axes, of lengths {tuple(shape)}, lies between axes along which the layer "
            "is stacked, where packed values cannot be told. Move the stack to axis 0."
        )
    return max(range(rank) if among is None else among, key=rating) - rank


@functools.partial(jax.jit, static_argnames=("method", "blocks", "packed", "check"))
def encode(
    x: Array, method: str, blocks: Blocks, packed: int | None, check: bool
) -> tuple[Array, Array, Range | None]:
    """Stored array, scale, and, where they are to be checked, what is known of the numbers."""
    codes, scale, found = _encode(x, method, blocks, check)
    if packed is not None:
        codes = pack(codes, packed)
    return codes.astype(METHODS[method].dtype), scale, found


@functools.partial(jax.jit, static_argnames=("method", "blocks"))
def _range(x: Array, method: str, blocks: Blocks) -> Range | None:
    """What `check_range` needs; XLA computes nothing else."""
    return _encode(x, method, blocks, True)[2]


def _encode(
    x: Array, method: str, blocks: Blocks, check: bool
) -> tuple[Array, Array, Range | None]:
    row = METHODS[method]
    groups, axes, scale_shape = _groups(x.shape, blocks)
    x32 = x.astype(jnp.float32).reshape(groups)
    high, low = (reduce(x32, axes, keepdims=True) for reduce in (jnp.max, jnp.min))
    peak = jnp.maximum(high, -low)
    if row.scale_dtype == jnp.float32:  # the reciprocal of a huge peak would be rounded to zero
        factor = jnp.where(peak > 2.0**100, 2.0**-8, 1.0)
        codes, scale = row.encode(x32 * factor, peak * factor, axes)
        scale = scale / factor
    else:
        codes, scale = row.encode(x32, peak, axes)
    kept = scale.astype(row.scale_dtype)
    found = (_all_finite(x), jnp.all(jnp.isfinite(kept))) if check else None
    return codes.reshape(x.shape), kept.reshape(scale_shape), found


def _all_finite(x: Array) -> Array:
    """Whether no number is NaN or infinite: zero times one of these is NaN.

    A maximum does not tell: on CPU, jaxlib 0.10.2 loses NaN in those of larger arrays.
    """
    rows = x.reshape(-1, x.shape[-1])
    return jnp.all(jnp.isfinite(jnp.zeros((1, rows.shape[0]), x.dtype) @ rows))


def _groups(
    shape: Sequence[int], blocks: Blocks
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """The shape in which groups have axes of their own, those axes, and the shape of the scale."""
    split: list[int] = []
    axes: list[int] = []
    for length, block in zip(shape, blocks, strict=True):
        split += [length] if block in (1, length) else [length // block, block]
        if block > 1:
            axes.append(len(split) - 1)
    scale = tuple(length // block for length, block in zip(shape, blocks, strict=True))
    return tuple(split), tuple(axes), scale


def is_known(x: Any) -> bool:
    """Whether the numbers of an array are known, and not those of a program being traced."""
    return not is_traced(x)


def check_range(method: QuantizationMethod, found: Range | None) -> None:
    """Refuses what has no scale; numbers are not known inside ``jax.jit``."""
    if found is None or not all(map(is_known, found)):
        return
    finite, fits = found
    if not finite:
        raise ValueError(
            "NaN or infinity cannot be quantized, and the array holds one. Mend it first."
        )
    if not fits:
        raise ValueError(
            f"{method.name} keeps its scales in float16, at most 65504, and a block of this array "
            "needs a larger one. Scale the weight down, or choose another method."
        )


def decoded(values: Any) -> Array:
    """The numbers of stored values before scaling, in float32."""
    stored = as_stored(values)
    if stored is None:
        return jnp.asarray(values).astype(jnp.float32)
    return stored.layout.row.values(unpack(stored.array, stored.layout))


def scaled(numbers: Array, scale: Array) -> Array:
    """``numbers * scale`` in float32, each scale for a block of numbers."""
    check_scale(numbers.shape, jnp.shape(scale))
    blocks = tuple(n // m for n, m in zip(numbers.shape, scale.shape, strict=True))
    groups, axes, _ = _groups(numbers.shape, blocks)
    shape = tuple(1 if i in axes else length for i, length in enumerate(groups))
    product = numbers.reshape(groups) * scale.astype(jnp.float32).reshape(shape)
    return product.reshape(numbers.shape)


def check_scale(shape: Sequence[int], scale: Sequence[int]) -> None:
    """A scale says what it scales by its shape."""
    if len(shape) != len(scale) or any(m == 0 or n % m for n, m in zip(shape, scale, strict=True)):
        raise ValueError(
            f"A scale of shape {tuple(scale)} does not fit values of shape {tuple(shape)}: it has "
            "as many axes, and its lengths divide theirs. Keep each scale with its values."
        )

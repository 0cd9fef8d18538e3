"""Affine grids, as AIMET has them: codes from 0 to ``2**bitwidth - 1``, a scale and an offset.

``value = (code + offset) * scale``, where the offset is a whole number from ``1 - 2**bitwidth`` to
0: the grid holds zero. That of a symmetric grid is ``-2**(bitwidth - 1)``. Scale and offset have as
many axes as what they quantize, whose lengths are multiples of theirs, as for `dequantize`.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from peft_jax._numerics import check_scale, is_known

Array = jax.Array

BITWIDTHS = range(2, 17)
MINIMUM_SCALE = float(np.finfo(np.float32).eps)


def last_code(bitwidth: int) -> int:
    """``2**bitwidth - 1``.

    Raises:
      ValueError: on anything but a whole number from 2 to 16.
    """
    if isinstance(bitwidth, bool) or bitwidth not in BITWIDTHS:
        raise ValueError(
            f"A grid has {BITWIDTHS[0]} to {BITWIDTHS[-1]} bits, got bitwidth={bitwidth!r}. "
            "Choose one of these, or leave the array out."
        )
    return int(2**bitwidth - 1)


def scale_and_offset(low: Any, high: Any, bitwidth: int, symmetric: bool) -> tuple[Any, Any]:
    """The grid for values from ``low`` to ``high``: AIMET's, bit for bit, where they are known.

    With ``n = 2**bitwidth - 1`` steps, ``m = 2**(bitwidth - 1)`` of them below zero where the grid
    is symmetric, and the range widened to hold zero and ``n`` steps of float32's epsilon, 2**-23:

    - symmetric: ``d = max(high / (m - 1), -low / m)``, but ``high / m`` for two bits, where every
      code is worth more than the end of the range; ``scale = ((m - 1) * d + m * d) / n``,
      ``offset = -m``;
    - otherwise: ``scale = (high - low) / n``, ``offset = clip(round(low / scale), -n, 0)``.

    Inverse, but for rounding: `grid_range`.

    Args:
      low: float32, of any shape; at most ``high``.
      high: of the same shape.
      bitwidth: from 2 to 16.
      symmetric: whether the grid reaches equally far on both sides of zero, but for one step.

    Returns:
      Scale and offset, float32: in numpy, computed on the host, for numbers that are known. Inside
      ``jax.jit`` they are computed by XLA, whose divisions may differ in the last bit.

    Raises:
      ValueError: on other bitwidths, and, outside of ``jax.jit``, on ranges that are not finite.
    """
    n, below = last_code(bitwidth), 2 ** (bitwidth - 1)
    known = is_known(low) and is_known(high)
    xp: Any = np if known else jnp
    lowest, highest = xp.asarray(low, np.float32), xp.asarray(high, np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        low, high = xp.minimum(lowest, np.float32(0)), xp.maximum(highest, np.float32(0))
        narrow = (high - low) / n < MINIMUM_SCALE
        missing = xp.where(narrow, np.float32(MINIMUM_SCALE), np.float32(0))
        if symmetric:
            high, low = high + (below - 1) * missing, low - below * missing
            step = xp.maximum(high / (2 if bitwidth == 2 else below - 1), -low / below)
            low = -below * step
            high = -low - step  # (below - 1) * step, in a form that no fused operation changes
        else:
            high = high + n * missing
        scale = xp.maximum((high - low) / n, np.float32(MINIMUM_SCALE))
        offset = xp.full_like(scale, -below) if symmetric else xp.clip(xp.rint(low / scale), -n, 0)
    if known:
        _check(lowest, highest, scale)
    return scale, offset + np.float32(0)  # no zero with a sign


def _check(low: Any, high: Any, scale: Any) -> None:
    fits = np.isfinite(low) & np.isfinite(high) & np.isfinite(scale) & (low <= high)
    if not np.all(fits):
        at = tuple(int(i) for i in np.argwhere(~fits)[0])
        raise ValueError(
            "A grid covers a finite range, of a width that float32 holds, got "
            f"[{low[at]}, {high[at]}]{f' at {at}' if at else ''}. Calibrate on finite values that "
            "reach this quantizer."
        )


def grid_range(scale: Any, offset: Any, bitwidth: int) -> tuple[Any, Any]:
    """The values of the first and of the last code; numpy for numpy."""
    return scale * offset, scale * (offset + last_code(bitwidth))


def codes(x: Array, scale: Array, offset: Array, bitwidth: int) -> Array:
    """``clip(round(x / scale) - offset, 0, 2**bitwidth - 1)``, in int32; halves go to even.

    ``x / scale`` is ``x * (1 / scale)`` in float32, as XLA computes it in most programs; so results
    do not depend on whether they are compiled.

    Args:
      x: finite floats of any shape.
      scale: positive; as many axes, whose lengths divide those of ``x``.
      offset: of the shape of ``scale``; rounded.
      bitwidth: from 2 to 16.

    Raises:
      ValueError: where scale or offset do not fit, and on other bitwidths.
    """
    _, code, _ = _positions(x, scale, offset, bitwidth)
    return jnp.clip(code, 0, last_code(bitwidth)).astype(jnp.int32).reshape(jnp.shape(x))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def fake_quantize(x: Array, scale: Array, offset: Array, bitwidth: int) -> Array:
    """``(codes(x) + offset) * scale`` in float32, rounded once to the dtype of ``x``.

    Gradients are those of LSQ (https://arxiv.org/abs/1902.08153) and LSQ+
    (https://arxiv.org/abs/2004.09576), summed over the values that share a scale:

    ============ ============ ============================== ===========
    values       to ``x``     to ``scale``                   to ``offset``
    ============ ============ ============================== ===========
    on the grid  1            ``round(x/scale) - x/scale``   0
    clipped      0            ``code + offset``              ``scale``
    ============ ============ ============================== ===========

    NaN stays NaN. Backward, ``x``, ``scale`` and ``offset`` are kept, and nothing else.

    Args:
      x: floats of any shape.
      scale: see `codes`.
      offset: see `codes`; rounded, straight through.
      bitwidth: from 2 to 16.

    Raises:
      ValueError: as `codes`.
    """
    _, code, (scales, offsets) = _positions(x, scale, offset, bitwidth)
    value = (jnp.clip(code, 0, last_code(bitwidth)) + offsets) * scales
    return value.reshape(jnp.shape(x)).astype(x.dtype)


def _forward(
    x: Array, scale: Array, offset: Array, bitwidth: int
) -> tuple[Array, tuple[Array, Array, Array]]:
    return fake_quantize(x, scale, offset, bitwidth), (x, scale, offset)


def _backward(
    bitwidth: int, kept: tuple[Array, Array, Array], cotangent: Array
) -> tuple[Array, Array, Array]:
    x, scale, offset = kept
    ratio, code, (scales, offsets) = _positions(x, scale, offset, bitwidth)
    clipped = jnp.clip(code, 0, last_code(bitwidth))
    inside = code == clipped
    flowing = cotangent.astype(jnp.float32).reshape(code.shape)
    slope = jnp.where(inside, code + offsets - ratio, clipped + offsets)
    shared = tuple(i for i, length in enumerate(scales.shape) if length < code.shape[i])

    def collected(gradient: Array, like: Array) -> Array:
        return jnp.sum(gradient, shared).reshape(like.shape).astype(like.dtype)

    return (
        jnp.where(inside, flowing, 0).reshape(x.shape).astype(x.dtype),
        collected(flowing * slope, scale),
        collected(jnp.where(inside, 0, flowing * scales), offset),
    )


fake_quantize.defvjp(_forward, _backward)


def _positions(
    x: Array, scale: Array, offset: Array, bitwidth: int
) -> tuple[Array, Array, tuple[Array, Array]]:
    """``x / scale``, codes before clipping, and scale and offset, with axes for the blocks."""
    last_code(bitwidth)
    if jnp.shape(scale) != jnp.shape(offset):
        raise ValueError(
            f"A grid has an offset for each scale, got shapes {jnp.shape(scale)} of scales and "
            f"{jnp.shape(offset)} of offsets. Broadcast one to the other."
        )
    groups, factors = _blocks(jnp.shape(x), jnp.shape(scale))
    scales = jnp.asarray(scale).astype(jnp.float32).reshape(factors)
    offsets = jnp.round(jnp.asarray(offset).astype(jnp.float32)).reshape(factors)
    ratio = jnp.asarray(x).astype(jnp.float32).reshape(groups) * (1 / scales)
    return ratio, jnp.round(ratio) - offsets, (scales, offsets)


def _blocks(
    shape: tuple[int, ...], scale: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes in which blocks have axes of their own: of the values, and of the scale."""
    check_scale(shape, scale)
    groups: list[int] = []
    factors: list[int] = []
    for n, m in zip(shape, scale, strict=True):
        groups += [n] if m in (1, n) else [m, n // m]
        factors += [m] if m in (1, n) else [m, 1]
    return tuple(groups), tuple(factors)

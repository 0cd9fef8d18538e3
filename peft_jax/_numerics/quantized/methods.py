"""The table of quantization methods: how numbers become codes of few bits, and codes numbers."""

from __future__ import annotations

import dataclasses
import enum
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

__all__ = [
    "METHODS",
    "QuantizationMethod",
]


Array = jax.Array


class QuantizationMethod(enum.StrEnum):
    """How weights are stored in few bits; a string serves as well (``"q4_0"``).

    ==================  ====  ==========================================  ===============
    method              bits  one scale for                               scale
    ==================  ====  ==========================================  ===============
    ``NONE``                  (the identity)
    ``INT4``            4     each output channel                         float32
    ``INT8``            8     each output channel                         float32
    ``Q4_0``            4     32 values along the last axis               float16
    ``Q4_0_TRANSPOSE``  4     32 values along the axis before last        float16
    ``SFP8``            8     each output channel                         float32
    ``NF4``             4     64 values along the axis before last        float32
    ==================  ====  ==========================================  ===============
    """

    NONE = "none"
    INT4 = "int4"
    INT8 = "int8"
    Q4_0 = "q4_0"
    Q4_0_TRANSPOSE = "q4_0_transpose"
    SFP8 = "sfp8"
    NF4 = "nf4"

    @property
    def block(self) -> tuple[int, int] | None:
        """The axis of the method's blocks and how many values each holds; None: it has none."""
        return METHODS[self].block if self in METHODS else None

    @property
    def per_channel(self) -> bool:
        """Whether the scale is one for each output channel, so that the layer's axes matter."""
        return self in METHODS and self.block is None

    @classmethod
    def _missing_(cls, value: object) -> QuantizationMethod | None:
        if isinstance(value, str) and value.lower() in {member.value for member in cls}:
            return cls(value.lower())
        raise ValueError(
            f"{value!r} is no quantization method. There are {[member.value for member in cls]}."
        )


# --- How each encodes and decodes ----------------------------------------------------------------
# Each encodes `(x, peak, axes)`, float32 values in groups, the largest magnitude of each group and
# the axes along which groups extend, as `(codes, scale)`; `scale * decode(codes)` approximates x.
# Codes are int32 until they are packed: XLA on CPU is several times slower in bytes.

# Where the peak is smaller, 1 / scale may overflow: such a group is all zeros.
_TINY = 1e-36
# The largest magnitude of SFP8, and the step below which its grid is even.
_SFP8_MAX, _SFP8_STEP = 1.875, 2.0**-22
# The quantiles of a normal distribution, from the paper's appendix E.
_NF4 = np.ravel(
    np.array(
        [
            [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453],
            [-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0],
            [0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224],
            [0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0],
        ],
        np.float32,
    )
)


def _reciprocal(x: Array, tiny: float = _TINY) -> Array:
    """``1 / x``, and 0 where x is tiny."""
    return jnp.where(jnp.abs(x) < tiny, 0.0, 1 / jnp.where(x == 0, 1.0, x))


def _encode_integers(
    x: Array, peak: Array, axes: tuple[int, ...], *, largest: int, offset: int
) -> tuple[Array, Array]:
    """Symmetric integers; the peak becomes the largest."""
    codes = jnp.clip(jnp.round(x * (largest * _reciprocal(peak))), -largest - 1, largest)
    scale = jnp.where(peak < _TINY, 0.0, peak * np.float32(1 / largest))
    return codes.astype(jnp.int32) + offset, scale


def _encode_q4_0(x: Array, peak: Array, axes: tuple[int, ...]) -> tuple[Array, Array]:
    """GGML's Q4_0: the value of largest magnitude, the first such one, becomes -8."""
    (axis,) = axes
    high, low = (reduce(x, axis, keepdims=True) for reduce in (jnp.max, jnp.min))

    def first_is_negative() -> Array:
        place = 2 * jax.lax.broadcasted_iota(jnp.int32, x.shape, axis) + (x < 0).astype(jnp.int32)
        last = 2 * x.shape[axis]
        return jnp.min(jnp.where(jnp.abs(x) == peak, place, last), axis, keepdims=True) % 2 == 1

    tied = jnp.any((high == -low) & (high > 0))  # seldom, but for numbers of few bits
    negative = jax.lax.cond(tied, first_is_negative, lambda: -low > high)
    scale = jnp.where(negative, peak, -peak) / 8
    # XLA contracts a product and a sum into one rounding, which GGML does not; the clip, which
    # changes nothing, stands between them.
    scaled = jnp.clip(x * _reciprocal(scale, _TINY / 8), -9.0, 9.0)
    return jnp.minimum((scaled + 8.5).astype(jnp.int32), 15), scale


def _encode_nf4(x: Array, peak: Array, axes: tuple[int, ...]) -> tuple[Array, Array]:
    """The nearest entry of the code book, which the peak scales to the range of -1 to 1."""
    scaled = x * _reciprocal(peak)
    codes = jnp.zeros(x.shape, jnp.int32)
    for middle in (_NF4[:-1] + _NF4[1:]) / 2:
        codes += (scaled > middle).astype(jnp.int32)
    return codes, jnp.where(peak < _TINY, 0.0, peak)


def _decode_nf4(codes: Array) -> Array:
    """The entries of the code book, by four choices of two."""
    entries: list[Any] = list(_NF4)
    for bit in range(4):
        odd = codes & (1 << bit) != 0
        entries = [jnp.where(odd, b, a) for a, b in zip(entries[::2], entries[1::2], strict=True)]
    return jnp.asarray(entries[0])


def _encode_sfp8(x: Array, peak: Array, axes: tuple[int, ...]) -> tuple[Array, Array]:
    """The nearest number of gemma.cpp's switching float; the peak becomes 1.875."""
    factor = _SFP8_MAX / jnp.maximum(peak, 1e-6)
    scaled = jnp.minimum(jnp.abs(x * factor), _SFP8_MAX)
    # Three bits of mantissa from 2^-7 on, two below; an even grid below 2^-20, and between the
    # smallest number and zero the threshold of gemma.peft's simulation.
    coarse = jax.lax.reduce_precision(scaled, 8, 2)
    fine = jnp.where(scaled < 2.0**-7, coarse, jax.lax.reduce_precision(scaled, 8, 3))
    even = jnp.round(scaled / _SFP8_STEP) * _SFP8_STEP
    smallest, zero = 0.625 * _SFP8_STEP, (0.5 - 1 / 32) * _SFP8_STEP
    small = jnp.where(scaled < smallest, jnp.where(scaled < zero, 0.0, smallest), even)
    rounded = jnp.where(scaled < 2.0**-20, small, fine)
    bits = jax.lax.bitcast_convert_type(rounded, jnp.int32)
    low, high = (bits >> 21) - (127 - 23) * 4, (bits >> 20) - (127 - 15) * 8
    code = jnp.where(rounded < 2.0**-7, low, high)
    code = jnp.where(rounded == 0, 0, jnp.where(x < 0, code | 128, code))
    scale = jnp.maximum(peak, 1e-6) * np.float32(1 / _SFP8_MAX)
    return code, jnp.where(peak == 0, 0.0, scale)


def _decode_sfp8(codes: Array) -> Array:
    """Sign, exponent and mantissa in the places of float32."""
    code = codes.astype(jnp.int8).astype(jnp.int32)  # extends the sign
    size = code & 127
    low, high = (size << 21) + ((127 - 23) << 23), (size << 20) + ((127 - 15) << 23)
    bits = jnp.where(size == 0, 0, jnp.minimum(low, high)) | (code & -(2**31))
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


@dataclasses.dataclass(frozen=True)
class Method:
    """One way to store values in few bits.

    Attributes:
      encode: from values to codes and scale; see above.
      decode: from codes to float32. None: codes are integers.
      offset: what is taken off a code to give its integer.
      bits: 4, two codes in a byte, or 8.
      block: the axis, and how many values along it share a scale; None: the scale is that of an
        output channel.
      any_layout: whether the blocks are meant to lie so whichever axes a layer contracts.
      scale_dtype: the dtype in which the scale is kept.
    """

    encode: Callable[[Array, Array, tuple[int, ...]], tuple[Array, Array]]
    bits: int
    decode: Callable[[Array], Array] | None = None
    offset: int = 0
    block: tuple[int, int] | None = None
    any_layout: bool = False
    scale_dtype: Any = jnp.float32

    @property
    def dtype(self) -> Any:
        """Of the stored array."""
        return jnp.int8 if self.decode is None and not self.offset else jnp.uint8

    def values(self, codes: Array) -> Array:
        """The numbers that the codes stand for, before scaling, in float32."""
        if self.decode is not None:
            return self.decode(codes)
        # In float32: jaxlib 0.10.2 sums `float32(int8(codes & 15) - 8)` wrongly on CPU.
        values = codes.astype(jnp.float32)
        return values - self.offset if self.offset else values


METHODS: Mapping[str, Method] = {
    QuantizationMethod.INT4: Method(
        functools.partial(_encode_integers, largest=7, offset=8), 4, offset=8
    ),
    QuantizationMethod.INT8: Method(functools.partial(_encode_integers, largest=127, offset=0), 8),
    QuantizationMethod.Q4_0: Method(
        _encode_q4_0, 4, offset=8, block=(-1, 32), any_layout=True, scale_dtype=jnp.float16
    ),
    QuantizationMethod.Q4_0_TRANSPOSE: Method(
        _encode_q4_0, 4, offset=8, block=(-2, 32), any_layout=True, scale_dtype=jnp.float16
    ),
    QuantizationMethod.SFP8: Method(_encode_sfp8, 8, decode=_decode_sfp8),
    QuantizationMethod.NF4: Method(_encode_nf4, 4, decode=_decode_nf4, block=(-2, 64)),
}

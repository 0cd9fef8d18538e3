"""Initializers of adapters that need nothing but the shape of an array."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Array, Dtype, Initializer

# Uniform within ±1/sqrt(fan-in): Kaiming's for a negative slope of sqrt(5).
_UNIFORM = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
_ZEROS = nn.initializers.zeros_init()
_NORMAL = nn.initializers.normal(1.0)


def first_values(
    method: bool | str, rank: int, kind: str | None = None
) -> tuple[Initializer, Initializer]:
    """The initializers of ``a``, as a matrix ``(in, rank)``, and of ``b``, ``(rank, out)``.

    They are the same objects for equal arguments, so that rules that hold them compare equal.

    Args:
      method: ``init_lora_weights`` of a config. Those that look at weights or data start as
        ``True`` does, until `init_lora_weights` is called.
      rank: of the adapter.
      kind: kind of the layer; tables (``embed``) draw ``b`` and leave ``a`` zero.
    """
    if method == "orthogonal":
        return _orthogonal(rank, 0), _orthogonal(rank, 1)
    if kind == "embed":
        return (_NORMAL if method is False else _ZEROS), _NORMAL
    if method is False:
        return _UNIFORM, _UNIFORM
    return (_gaussian(rank) if method == "gaussian" else _UNIFORM), _ZEROS


@functools.cache
def _gaussian(rank: int) -> Initializer:
    return nn.initializers.normal(1 / rank)


@functools.cache
def _orthogonal(rank: int, half: int) -> Initializer:
    """Rows or columns in one half of an orthogonal basis of the rank: ``a·b`` is zero."""

    def draw(key: Array, shape: tuple[int, ...], dtype: Dtype = jnp.float32) -> Any:
        basis = nn.initializers.orthogonal()(jax.random.key(0), (rank, rank), jnp.float32)[half::2]
        length = shape[half]  # of the axis that is not the rank
        drawn = jax.random.normal(key, (length, len(basis))) @ basis / 10
        return (drawn if half == 0 else drawn.T).astype(dtype)

    return draw

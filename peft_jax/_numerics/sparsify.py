"""Task vectors, made sparse and merged: arrays only.

A task vector is what one adapter holds in one place, flattened; ``vectors (n, size)`` has a row for
each of ``n`` adapters. Zeros have no say in a merge, so an adapter that lacks a layer counts there
as zero and as absent alike.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

__all__ = [
    "MAJORITY_SIGN_METHODS",
    "elected_mean",
    "keep_all",
    "keep_largest",
    "keep_random",
    "rescaled",
    "weighted_sum",
]


Array = jax.Array

MAJORITY_SIGN_METHODS = ("total", "frequency")


def keep_all(vectors: Array, density: float | None, key: Any) -> Array:
    """The vectors as they are."""
    return vectors


def keep_largest(vectors: Array, density: float | None, key: Any) -> Array:
    """Of each vector the ``floor(density * size)`` numbers of the largest magnitude, else zero.

    Of equal magnitudes those that come first. TIES, https://arxiv.org/abs/2306.01708, section 4.
    """
    assert density is not None
    count = int(density * vectors.shape[-1])
    return jnp.where(jax.vmap(lambda row: _are_largest(row, count))(vectors), vectors, 0)


def _are_largest(row: Array, count: int) -> Array:
    """Which numbers are the ``count`` of the largest magnitude.

    The smallest of them is found bit by bit, for the bits of positive floats have their order: a
    sort of as many numbers as a weight has takes many times as long.
    """
    bits = jnp.finfo(row.dtype).bits
    integer = jnp.dtype(f"uint{bits}")
    values = jax.lax.bitcast_convert_type(jnp.abs(row), integer)

    def refine(i: Array, found: Array) -> Array:
        bit = found | (jnp.ones((), integer) << (bits - 2 - i).astype(integer))
        return jnp.where(jnp.sum(values >= bit) >= count, bit, found)

    smallest = jax.lax.fori_loop(0, bits - 1, refine, jnp.zeros((), integer))
    above, even = values > smallest, values == smallest
    return above | (even & (jnp.cumsum(even) <= count - jnp.sum(above)))


def keep_random(vectors: Array, density: float | None, key: Any) -> Array:
    """Each number with the probability ``density``; see `rescaled`."""
    assert density is not None
    return rescaled(vectors, jax.random.bernoulli(key, density, vectors.shape), density)


def rescaled(vectors: Array, kept: Array, density: float) -> Array:
    """``vectors * kept / density``, whose mean over the masks is ``vectors``.

    DARE, https://arxiv.org/abs/2311.03099, section 3.
    """
    return jnp.where(kept, vectors / density, 0)


def weighted_sum(vectors: Array, weights: Array, majority: str) -> Array:
    """``sum_i weights_i * vectors_i``: task arithmetic, https://arxiv.org/abs/2212.04089."""
    return jnp.sum(weights[:, None] * vectors, axis=0)


def elected_mean(vectors: Array, weights: Array, majority: str) -> Array:
    """The mean of ``weights_i * vectors_i`` over those adapters that have the elected sign.

    At each place the vectors elect a sign, before they are weighted: that of their sum (``total``)
    or that of most of them (``frequency``); an even vote is for the plus. TIES,
    https://arxiv.org/abs/2306.01708, section 4.
    """
    signs = jnp.sign(vectors)
    votes = jnp.sum(vectors if majority == "total" else signs, axis=0)
    agree = signs == jnp.where(votes >= 0, 1, -1).astype(signs.dtype)[None]
    total = jnp.sum(jnp.where(agree, weights[:, None] * vectors, 0), axis=0)
    mean = total / jnp.maximum(jnp.sum(agree, axis=0), 1).astype(total.dtype)
    return jnp.where(jnp.isnan(votes), votes, mean)  # what is no number has no sign to disagree by

"""The table of combinations: what of the adapters is combined, and how. Arrays only."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from peft_jax._numerics import (
    elected_mean,
    keep_all,
    keep_largest,
    keep_random,
    padded,
    weighted_sum,
)

Array = jax.Array
Factors = tuple[Array, Array]


@dataclasses.dataclass(frozen=True)
class Settings:
    """The options of `add_weighted_adapter` that arrays do not see.

    Attributes:
      density: the part of each task vector that is kept.
      majority: how the sign is elected, ``total`` or ``frequency``.
      svd_rank: of the result where it is decomposed.
      svd_clamp: the quantile beyond which the numbers of a decomposition are cut.
    """

    density: float | None = None
    majority: str = "total"
    svd_rank: int | None = None
    svd_clamp: float | None = None


class Terms(NamedTuple):
    """One matrix of one layer, in each of ``n`` adapters that change it.

    Attributes:
      factors: ``a (in, r_i)`` and ``b (r_i, out)`` of each.
      weights: ``(n,)``.
      scalings: ``(n,)``; the change is ``sum_i weights_i * scalings_i * a_i·b_i``.
      key: where something is drawn.
    """

    factors: Sequence[Factors]
    weights: Array
    scalings: Array
    key: Any


@dataclasses.dataclass(frozen=True)
class Operands:
    """What of the adapters is combined.

    Attributes:
      combine: from a combination, settings, the result's rank and terms to ``a`` and ``b``.
      rank: of the result, from the adapters' ranks and ``svd_rank``; None where there is none.
    """

    combine: Callable[[Combination, Settings, int, Terms], Factors]
    rank: Callable[[Sequence[int], int | None], int | None]


@dataclasses.dataclass(frozen=True)
class Combination:
    """One way to combine adapters.

    Attributes:
      operands: the factors one by one, the factors side by side, or their product.
      sparsify: the task vectors before they are merged.
      merge: the task vectors into one.
    """

    operands: Operands
    sparsify: Callable[[Array, float | None, Any], Array] = keep_all
    merge: Callable[[Array, Array, str], Array] = weighted_sum

    @property
    def needs_density(self) -> bool:
        """Whether part of each task vector is dropped."""
        return self.sparsify is not keep_all

    @property
    def needs_key(self) -> bool:
        """Whether that part is drawn."""
        return self.sparsify is keep_random

    def merged(
        self, settings: Settings, arrays: Sequence[Array], weights: Array, key: Any
    ) -> Array:
        """Arrays of one shape, one from each adapter, made sparse and merged."""
        vectors = jnp.stack([array.reshape(-1) for array in arrays])
        sparse = self.sparsify(vectors, settings.density, key)
        return self.merge(sparse, weights, settings.majority).reshape(arrays[0].shape)


# --- What is combined ----------------------------------------------------------------------------


def _one_by_one(row: Combination, settings: Settings, rank: int, terms: Terms) -> Factors:
    """``a`` of all ``a``, and ``b`` of all ``b``: each gets the root of the weight, a its sign."""
    keys = (None, None) if terms.key is None else jax.random.split(terms.key)
    products = terms.weights * terms.scalings
    root = jnp.sqrt(jnp.abs(products))
    a, b = zip(*terms.factors, strict=True)
    return (
        row.merged(settings, a, jnp.sign(products) * root, keys[0]),
        row.merged(settings, b, root, keys[1]),
    )


def _side_by_side(row: Combination, settings: Settings, rank: int, terms: Terms) -> Factors:
    """``[w_1 s_1 a_1, w_2 s_2 a_2, ...]`` and ``[b_1; b_2; ...]``."""
    products = terms.weights * terms.scalings
    a = [a * products[i] for i, (a, _) in enumerate(terms.factors)]
    return jnp.concatenate(a, -1), jnp.concatenate([b for _, b in terms.factors])


def _decomposed(row: Combination, settings: Settings, rank: int, terms: Terms) -> Factors:
    """The best ``a·b`` of a rank for the merged changes ``s_i a_i·b_i``."""
    changes = [(a * terms.scalings[i]) @ b for i, (a, b) in enumerate(terms.factors)]
    change = row.merged(settings, changes, terms.weights, terms.key)
    u, s, v = jnp.linalg.svd(change.mT, full_matrices=False)
    return _best(v.mT, s, u.mT, rank, settings.svd_clamp)


def _decomposed_sum(row: Combination, settings: Settings, rank: int, terms: Terms) -> Factors:
    """The best ``a·b`` of a rank for the sum of all changes, which is not formed.

    The sum is ``A·B`` with the factors side by side; with ``A = Q_1 R_1`` and ``B^T = Q_2 R_2`` its
    singular values are those of the small ``R_1 R_2^T``. Clamping looks at single numbers, whose
    signs are a matter of how the matrix is decomposed: it then is decomposed as a whole.
    """
    if settings.svd_clamp is not None:
        return _decomposed(row, settings, rank, terms)
    a, b = _side_by_side(row, settings, rank, terms)
    left, right = jnp.linalg.qr(a), jnp.linalg.qr(b.mT)
    u, s, v = jnp.linalg.svd(left.R @ right.R.mT, full_matrices=False)
    return _best(left.Q @ u, s, v @ right.Q.mT, rank, None)


def _best(u: Array, s: Array, v: Array, rank: int, clamp: float | None) -> Factors:
    """``a`` and ``b`` of ``u (in, k)``, ``s (k,)`` and ``v (k, out)``, filled up with zeros."""
    a, b = u[:, :rank], s[:rank, None] * v[:rank]
    if clamp is not None:
        numbers = jnp.concatenate([a.reshape(-1), b.reshape(-1)])
        bound = jnp.maximum(jnp.quantile(numbers, clamp), 0)
        a, b = jnp.clip(a, -bound, bound), jnp.clip(b, -bound, bound)
    return padded(a, rank, -1), padded(b, rank, -2)


def _common(ranks: Sequence[int], svd_rank: int | None) -> int | None:
    return ranks[0] if len(set(ranks)) == 1 else None


def _total(ranks: Sequence[int], svd_rank: int | None) -> int | None:
    return sum(ranks)


def _chosen(ranks: Sequence[int], svd_rank: int | None) -> int | None:
    return max(ranks) if svd_rank is None else svd_rank


FACTORS = Operands(_one_by_one, _common)
CHANGES = Operands(_decomposed, _chosen)

COMBINATIONS: Mapping[str, Combination] = {
    "linear": Combination(FACTORS),
    "cat": Combination(Operands(_side_by_side, _total)),
    "svd": Combination(Operands(_decomposed_sum, _chosen)),
    "ties": Combination(FACTORS, keep_largest, elected_mean),
    "ties_svd": Combination(CHANGES, keep_largest, elected_mean),
    "dare_linear": Combination(FACTORS, keep_random),
    "dare_linear_svd": Combination(CHANGES, keep_random),
    "dare_ties": Combination(FACTORS, keep_random, elected_mean),
    "dare_ties_svd": Combination(CHANGES, keep_random, elected_mean),
    "magnitude_prune": Combination(FACTORS, keep_largest),
    "magnitude_prune_svd": Combination(CHANGES, keep_largest),
}


# --- All matrices of a layer ---------------------------------------------------------------------


@jax.jit(static_argnames=("row", "settings", "rank"))  # once for all layers of a shape
def combined_factors(
    row: Combination,
    settings: Settings,
    rank: int,
    factors: Sequence[Factors],
    weights: Array,
    scalings: Array,
    key: Any,
) -> Factors:
    """Combines each matrix by itself, one after the other, so that one alone is formed at a time.

    Args:
      row: of `COMBINATIONS`.
      settings: of the combination.
      rank: of the result.
      factors: of each adapter ``a (m, in, r_i)`` and ``b (m, r_i, out)``.
      weights: ``(n,)``.
      scalings: ``(n,)``.
      key: where the row draws, or None.

    Returns:
      ``a (m, in, rank)`` and ``b (m, rank, out)``.
    """
    count = factors[0][0].shape[0]
    keys = None if key is None else jax.random.split(key, count)

    def one(at: tuple[Sequence[Factors], Any]) -> Factors:
        return row.operands.combine(row, settings, rank, Terms(at[0], weights, scalings, at[1]))

    return jax.lax.map(one, (factors, keys))


@jax.jit(static_argnames=("row", "settings"))
def combined_biases(
    row: Combination,
    settings: Settings,
    biases: Sequence[Array],
    weights: Array,
    key: Any,
) -> Array:
    """Merges the biases ``(m, size)``, scalings in them, of each layer of a stack by itself."""
    keys = None if key is None else jax.random.split(key, biases[0].shape[0])
    return jax.lax.map(
        lambda at: row.merged(settings, at[0], weights, at[1]), (tuple(biases), keys)
    )

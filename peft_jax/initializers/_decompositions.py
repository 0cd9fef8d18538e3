"""Adapters that take part of the weight: PiSSA, OLoRA, CorDA."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from peft_jax.initializers._start import Start, Target

Array = jax.Array

# Columns beyond the rank in the random sketch; Halko et al. recommend 5 or 10.
_OVERSAMPLING = 10
# The damping of a covariance, in units of its mean variance, and the largest error of an inverse.
_DAMPING, _INVERSE_ERROR, _DOUBLINGS = 0.01, 0.05, 40


def pissa(target: Target) -> Start:
    """``a·b`` is the part of the weight with the largest singular values, divided by the scaling.

    ``a = U_r sqrt(S_r / s)`` and ``b = sqrt(S_r / s) V_r^T``; the weight keeps the rest. PiSSA,
    https://arxiv.org/abs/2404.02948, section 3.
    """
    u, s, v = jnp.linalg.svd(target.matrices, full_matrices=False)
    return _split(target, u, s, v)


def fast_pissa(target: Target) -> Start:
    """`pissa` by a randomised decomposition; see `randomised_svd`."""
    u, s, v = randomised_svd(target.matrices, target.spec.rank, target.iterations, target.key)
    return _split(target, u, s, v)


@jax.jit(static_argnames=("rank", "iterations"))  # once for all weights of a shape
def randomised_svd(
    matrices: Array, rank: int, iterations: int, key: Array
) -> tuple[Array, Array, Array]:
    """The largest singular values and their vectors, by subspace iteration from a random start.

    Halko, Martinsson and Tropp, https://arxiv.org/abs/0909.4061, algorithms 4.4 and 5.1.

    Args:
      matrices: ``(..., in, out)``.
      rank: how many singular values are wanted.
      iterations: how often the subspace goes through ``M M^T``.
      key: of the random start.

    Returns:
      ``U (..., in, k)``, ``S (..., k)`` and ``V^T (..., k, out)`` with ``k >= min(rank, in, out)``.
    """
    *lead, rows, columns = matrices.shape
    count = min(rank + _OVERSAMPLING, rows, columns)
    start = jax.random.normal(key, (*lead, columns, count), matrices.dtype)
    basis = jnp.linalg.qr(matrices @ start).Q

    def refine(_: int, basis: Array) -> Array:
        return jnp.linalg.qr(matrices @ jnp.linalg.qr(matrices.mT @ basis).Q).Q

    basis = jax.lax.fori_loop(0, iterations, refine, basis)
    u, s, v = jnp.linalg.svd(basis.mT @ matrices, full_matrices=False)
    return basis @ u, s, v


def olora(target: Target) -> Start:
    """``a = R[:r]^T`` and ``b = Q[:, :r]^T`` of ``W^T = Q R``, with ``W^T (out, in)``.

    OLoRA, https://arxiv.org/abs/2406.01775, section 3.
    """
    rank = target.spec.rank
    q, r = jnp.linalg.qr(target.matrices.mT)
    return target.taken_off(r[..., :rank, :].mT, q[..., :rank].mT)


def corda(target: Target) -> Start:
    """The part of the weight that the covariance ``C`` of the inputs points to.

    With ``W^T C = U S V^T``: ``a = (V^T C^-1)^T sqrt(S / s)`` and ``b = sqrt(S / s) U^T``, of the
    first directions (``ipm``) or the last (``kpm``). CorDA, https://arxiv.org/abs/2406.05223,
    section 3; ``C`` is damped until its inverse is one.
    """
    _, _, inputs, outputs = target.view.matrix_shape
    covariance = target.statistics().astype(target.weight.dtype)
    damped, inverse = _damped_inverse(covariance)
    u, s, v = jnp.linalg.svd(target.matrices.mT @ damped, full_matrices=False)
    v = v @ inverse
    if target.config.corda_method == "kpm":
        start = max(min(inputs, outputs) - target.spec.rank, 0)
        u, s, v = u[..., start:], s[..., start:], v[..., start:, :]
    return _split(target, v.mT, s, u.mT)


@jax.jit
@functools.partial(jnp.vectorize, signature="(n,n)->(n,n),(n,n)")
def _damped_inverse(covariance: Array) -> tuple[Array, Array]:
    """``C + damping * mean(diag(C)) * I``, with the least damping that will do, and its inverse.

    Where none does, the inverse is NaN.
    """
    identity = jnp.eye(len(covariance), dtype=covariance.dtype)
    variance = jnp.mean(jnp.diagonal(covariance))

    def goes_on(state: _Damped) -> Array:
        return ~(state.error < _INVERSE_ERROR) & (state.doublings < _DOUBLINGS)

    def double(state: _Damped) -> _Damped:
        matrix = covariance + _DAMPING * 2.0**state.doublings * variance * identity
        inverse = jnp.linalg.inv(matrix)
        error = jnp.linalg.norm(matrix @ inverse - identity)
        return _Damped(state.doublings + 1, matrix, inverse, error)

    none = jnp.zeros((), covariance.dtype)
    start = _Damped(none, covariance, covariance, none + jnp.inf)
    found = jax.lax.while_loop(goes_on, double, start)
    return found.matrix, jnp.where(found.error < _INVERSE_ERROR, found.inverse, jnp.nan)


class _Damped(NamedTuple):
    """A covariance after so many doublings of its damping, and how far its inverse is from one."""

    doublings: Array
    matrix: Array
    inverse: Array
    error: Array


def _split(target: Target, u: Array, s: Array, v: Array) -> Start:
    """The first ``rank`` of ``u (..., in, k)``, ``s (..., k)``, ``v (..., k, out)``, as adapter."""
    scaling, rank = target.check_scaling(), target.spec.rank
    root = jnp.sqrt(s[..., :rank] / abs(scaling))
    signed = root if scaling > 0 else -root
    return target.taken_off(
        u[..., :rank] * root[..., None, :], v[..., :rank, :] * signed[..., None]
    )

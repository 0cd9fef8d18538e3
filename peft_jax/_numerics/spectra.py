"""Norms, spectra and best approximations of matrices, in numpy, float64 where it counts."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

__all__ = [
    "approximated",
    "norm",
    "product_dot",
    "product_norm",
    "product_spectrum",
    "weight_spectrum",
]


Array = np.ndarray[Any, Any]

_ROWS = 1024  # that are taken to float64 at once
_OVERSAMPLING, _ITERATIONS = 16, 4


class Approximation(NamedTuple):
    """The best matrix of a rank, ``left @ right``.

    Attributes:
      left: ``(m, r)``, float32.
      right: ``(r, n)``, float32; both carry the roots of the singular values.
      kept: norm of the product, relative to that of the whole.
    """

    left: Array
    right: Array
    kept: float


def approximated(matrix: Array, rank: int, seed: int | None = None) -> Approximation:
    """The best approximation of a rank, in the Frobenius norm (Eckart and Young, 1936).

    The directions are eigenvectors of the Gram matrix of the shorter side; the other factor is the
    matrix projected on them, so that nothing is lost at full rank.

    Args:
      matrix: ``(m, n)`` floats.
      rank: at most ``min(m, n)``.
      seed: None: exactly; else by a randomized range finder (https://arxiv.org/abs/0909.4061) with
        this seed.
    """
    if matrix.shape[0] < matrix.shape[1]:
        left, right, kept = approximated(matrix.T, rank, seed)
        return Approximation(right.T, left.T, kept)
    if seed is None:
        directions = np.linalg.eigh(_gram(matrix))[1][:, ::-1][:, :rank]
    else:
        directions = _leading(matrix, rank, seed)
    projected = _times(matrix, directions)
    sizes = np.linalg.norm(projected, axis=0)
    roots = np.sqrt(sizes)
    inverse = np.divide(1, roots, out=np.zeros_like(roots), where=roots > 0)
    whole = norm(matrix)
    kept = float(np.linalg.norm(sizes) / whole) if whole else 1.0
    return Approximation(
        np.ascontiguousarray(projected * inverse, np.float32),
        np.ascontiguousarray((directions * roots).T, np.float32),
        min(kept, 1.0),
    )


def _leading(matrix: Array, rank: int, seed: int) -> Array:
    """Leading right singular vectors, by subspace iteration on a random start."""
    width = min(rank + _OVERSAMPLING, matrix.shape[1])
    start = np.random.default_rng(seed).normal(size=(matrix.shape[1], width))
    basis = np.linalg.qr(start)[0]
    for _ in range(_ITERATIONS):
        forward = np.linalg.qr(_times(matrix, basis))[0]
        basis = np.linalg.qr(_transposed_times(matrix, forward))[0]
    _, _, right = np.linalg.svd(_times(matrix, basis), full_matrices=False)
    return np.asarray((basis @ right.T)[:, :rank])


def _blocks(matrix: Array) -> Any:
    for start in range(0, len(matrix), _ROWS):
        yield slice(start, start + _ROWS), matrix[start : start + _ROWS].astype(np.float64)


def _gram(matrix: Array) -> Array:
    total = np.zeros((matrix.shape[1],) * 2)
    for _, block in _blocks(matrix):
        total += block.T @ block
    return total


def _times(matrix: Array, right: Array) -> Array:
    return np.concatenate([block @ right for _, block in _blocks(matrix)])


def _transposed_times(matrix: Array, left: Array) -> Array:
    total = np.zeros((matrix.shape[1], left.shape[1]))
    for rows, block in _blocks(matrix):
        total += block.T @ left[rows]
    return total


def norm(array: Array) -> float:
    """The Frobenius norm, in float64."""
    flat = array.reshape(-1)
    step = 2**20
    squares = [
        float(np.sum(np.square(flat[start : start + step].astype(np.float64))))
        for start in range(0, flat.size, step)
    ]
    return float(np.sqrt(np.sum(squares)))


def product_spectrum(left: Array, right: Array) -> Array:
    """Singular values of ``left @ right``, as many as their inner axis is long.

    Args:
      left: ``(m, r)``.
      right: ``(r, n)``.
    """
    return np.asarray(np.linalg.svd(_inner(left, right), compute_uv=False))


def product_norm(left: Array, right: Array) -> float:
    """The Frobenius norm of ``left @ right``, without forming it."""
    return float(np.linalg.norm(_inner(left, right)))


def _inner(left: Array, right: Array) -> Array:
    """A small matrix with the singular values of ``left @ right``."""
    triangles = (np.asarray(np.linalg.qr(factor, mode="r")) for factor in (left, right.T))
    first, second = triangles
    return np.asarray(first @ second.T)


def product_dot(a: tuple[Array, Array], b: tuple[Array, Array]) -> float:
    """The inner product of ``left @ right`` of one pair with that of another."""
    return float(np.sum((a[0].T @ b[0]) * (a[1] @ b[1].T)))


def weight_spectrum(matrix: Array, most: int) -> Array:
    """Singular values of a matrix, or the largest of a large one."""
    if min(matrix.shape) <= most:
        return np.asarray(np.linalg.svd(matrix.astype(np.float64), compute_uv=False))
    turned = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T
    projected = _times(turned, _leading(turned, most // 4, 0))
    return np.asarray(np.linalg.svd(projected, compute_uv=False))

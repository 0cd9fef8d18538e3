"""What a product of two arrays needs to know of its einsum equation."""

import functools
import string
from typing import Any

import jax
import jax.numpy as jnp

__all__ = [
    "is_laid_out",
    "widest",
]


Array = jax.Array


@functools.lru_cache(maxsize=1024)
def without_ellipsis(equation: str, ndim: int) -> str:
    """Give the axes of the first operand's ellipsis letters of their own."""
    equation = equation.replace(" ", "")
    named = len(equation.split(",")[0].replace("...", ""))
    free = [letter for letter in string.ascii_letters if letter not in equation]
    return equation.replace("...", "".join(free[: ndim - named]))


@functools.lru_cache(maxsize=1024)
def is_contraction(equation: str) -> bool:
    """Whether no term repeats a letter, and every letter stands in two terms or in all three.

    Such equations are closed under transposition, which permutes the terms, and under batching,
    which adds a letter.
    """
    terms = split_terms(equation)
    return all(len(set(term)) == len(term) for term in terms) and all(
        sum(letter in term for term in terms) > 1 for letter in set("".join(terms))
    )


def broadcasts(equation: str, *shapes: tuple[int, ...]) -> bool:
    """Whether an axis of length one meets a longer one, which `einsum` allows."""
    left, right, _ = split_terms(equation)
    pairs = list(zip(left, shapes[0], strict=True)) + list(zip(right, shapes[1], strict=True))
    lengths = {letter: {n for other, n in pairs if other == letter} for letter, _ in pairs}
    return any(len(found) > 1 and 1 in found for found in lengths.values())


def is_laid_out(array: Array) -> bool:
    """Whether the array's type fixes its place on a mesh: explicit axes, and inside `shard_map`."""
    kinds = jax.typeof(array).sharding.mesh.axis_types
    return any(kind != jax.sharding.AxisType.Auto for kind in kinds)


def split_terms(equation: str) -> tuple[str, str, str]:
    operands, out = equation.split("->")
    left, right = operands.split(",")
    return left, right, out


def sizes(equation: str, *shapes: tuple[int, ...]) -> dict[str, int]:
    """Give the length of every axis of the operands; raises where they do not fit."""
    size: dict[str, int] = {}
    for term, shape in zip(split_terms(equation), shapes, strict=False):
        if len(term) != len(shape):
            raise ValueError(f"{equation}: the operand {term} has {len(shape)} axes, {shape}")
        for letter, length in zip(term, shape, strict=True):
            known = size.setdefault(letter, length)
            if known != length and 1 not in (known, length):
                raise ValueError(f"{equation}: {letter} is {size[letter]} and {length} in {shapes}")
    return size


def common_dtype(*values: Any) -> jnp.dtype:
    """The dtype to which JAX promotes values, also where implicit promotion is forbidden."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(*values)


def widest(*dtypes: jnp.dtype) -> jnp.dtype:
    """Float32, or a dtype that is wider; strict promotion of types has no such rule."""
    return max(jnp.dtype(jnp.float32), *dtypes, key=lambda dtype: dtype.itemsize)

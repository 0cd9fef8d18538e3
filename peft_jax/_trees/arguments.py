"""Arguments of a function that runs abstractly: arrays, and whatever else is passed as it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

__all__ = [
    "split_arrays",
]


def split_arrays(tree: Any) -> tuple[list[Any], Callable[[list[Any]], Any]]:
    """The arrays of a tree, and a function that puts others in their place.

    Arrays are those of JAX and numpy, and ``jax.ShapeDtypeStruct``; all other leaves stay.
    """
    leaves, structure = jax.tree.flatten(tree)
    is_array = [
        isinstance(leaf, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct)
        for leaf in leaves
    ]

    def filled(arrays: list[Any]) -> Any:
        given = iter(arrays)
        pairs = zip(leaves, is_array, strict=True)
        return jax.tree.unflatten(structure, [next(given) if own else leaf for leaf, own in pairs])

    return [leaf for leaf, own in zip(leaves, is_array, strict=True) if own], filled

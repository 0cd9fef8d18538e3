"""Trees of parameters as a checkpoint has them: arrays by their paths, and the rest as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax.core import FrozenDict, meta

from peft_jax._numerics import StoredValues, as_stored, is_traced
from peft_jax._trees import Path, SharedStack, children, is_branch, opened_box, slashed

_CONTAINERS: Mapping[str, Any] = {
    "dict": dict,
    "frozen_dict": FrozenDict,
    "list": list,
    "tuple": tuple,
}


def described(tree: Any, path: Path = ()) -> dict[str, Any]:
    """What the arrays of a tree do not say, as JSON. Inverse: `abstract`.

    Boxes are left out, but for shared stacks; named tuples are tuples.

    Raises:
      ValueError: on what is neither a container with names for keys, nor an array of numbers.
    """
    if tree is None:
        return {"none": {}}
    if isinstance(tree, SharedStack):
        value = described(tree.value, path)
        return {"shared": {"value": value, "layers": list(tree.layers), "axis": tree.axis}}
    if isinstance(tree, meta.AxisMetadata):
        return described(opened_box(tree, path)[0], path)
    if isinstance(tree, StoredValues):
        inner = (*path, str(tree.layout))
        return {"stored": {str(tree.layout): _described_array(tree.array, inner)}}
    if isinstance(tree, Mapping):
        kind = "frozen_dict" if isinstance(tree, FrozenDict) else "dict"
        names = [key for key in tree if not isinstance(key, str) or not key]
        if names:
            raise ValueError(
                f"The dict at '{slashed(path)}' has the key {names[0]!r}; in a checkpoint keys "
                "are names. Name it by a string."
            )
        return {kind: {key: described(value, (*path, key)) for key, value in tree.items()}}
    if is_branch(tree):
        kind = "list" if isinstance(tree, list) else "tuple"
        return {kind: [described(value, (*path, str(i))) for i, value in enumerate(tree)]}
    return {"array": _described_array(tree, path)}


def _described_array(leaf: Any, path: Path) -> dict[str, Any]:
    dtype, shape = getattr(leaf, "dtype", None), getattr(leaf, "shape", None)
    concrete = not (is_traced(leaf) or isinstance(leaf, jax.ShapeDtypeStruct))
    deleted = concrete and isinstance(leaf, jax.Array) and leaf.is_deleted()
    if not concrete or deleted or shape is None or dtype is None or not _is_number(dtype):
        found = type(leaf).__name__ if dtype is None else f"{type(leaf).__name__} of {dtype}"
        found += ", deleted" * deleted
        raise ValueError(
            f"'{slashed(path)}' is no array of numbers, but of the type {found}. A checkpoint "
            "holds arrays that are there: make it one (`jnp.asarray`), or leave it out."
        )
    if 0 in shape:
        raise ValueError(
            f"'{slashed(path)}' has the shape {tuple(shape)}: orbax keeps no arrays without "
            "numbers. Leave it out."
        )
    return {"shape": list(shape), "dtype": str(dtype)}


def _is_number(dtype: Any) -> bool:
    kinds = (jnp.number, jnp.bool_)
    return any(jnp.issubdtype(dtype, kind) for kind in kinds)


def abstract(node: Any) -> Any:
    """The tree that was described, with `jax.ShapeDtypeStruct` for arrays.

    Raises:
      ValueError: or another error, on what `described` does not make.
    """
    ((kind, data),) = node.items()
    if kind in ("dict", "frozen_dict"):
        return _CONTAINERS[kind]({key: abstract(value) for key, value in data.items()})
    if kind in ("list", "tuple"):
        return _CONTAINERS[kind](abstract(value) for value in data)
    if kind == "none":
        return None
    if kind == "array":
        return _abstract_array(data)
    if kind == "stored":
        stored = as_stored({name: _abstract_array(array) for name, array in data.items()})
        if stored is None:
            raise ValueError(f"{data} are no stored values.")
        return stored
    if kind == "shared" and set(data) == {"value", "layers", "axis"}:
        return _abstract_stack(abstract(data["value"]), data["layers"], data["axis"])
    raise ValueError(f"A tree has no node {kind!r} with {data!r:.200}.")


def _abstract_stack(value: Any, layers: list[int], axis: int) -> SharedStack:
    shape = jax.tree.leaves(value)[0].shape
    inside = all(type(i) is int and 0 <= i < shape[axis] for i in layers)
    if type(axis) is not int or not 0 <= axis < len(shape) or not inside or not layers:
        raise ValueError(f"A stack of shape {shape} is not read by {layers} along axis {axis}.")
    return SharedStack(value, tuple(layers), axis)


def _abstract_array(data: Mapping[str, Any]) -> jax.ShapeDtypeStruct:
    shape, dtype = data["shape"], jnp.dtype(data["dtype"])
    if len(data) != 2 or not all(type(n) is int and n > 0 for n in shape) or not _is_number(dtype):
        raise ValueError(f"{data} is no shape and dtype.")
    return jax.ShapeDtypeStruct(tuple(shape), dtype)


def stacks(tree: Any, path: Path = ()) -> dict[Path, tuple[tuple[int, ...], int]]:
    """Which layers each shared stack stands for, and along which axis, by its path."""
    if isinstance(tree, SharedStack):
        return {path: (tree.layers, tree.axis)}
    found: dict[Path, tuple[tuple[int, ...], int]] = {}
    if is_branch(tree):
        for key, value in children(tree):
            found |= stacks(value, (*path, str(key)))
    return found

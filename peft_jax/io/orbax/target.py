"""What an orbax checkpoint is restored into: checked before a number is read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jax.sharding import AbstractMesh, Sharding

from peft_jax._trees import Path, leaves, slashed, some, stored_weights
from peft_jax.io.orbax.trees import stacks


def dtypes_of(structure: Any, saved: Mapping[Path, Any], dtype: Any) -> dict[Path, Any]:
    """In which dtype each array is restored."""
    if dtype is None:
        return {path: leaf.dtype for path, leaf in saved.items()}
    try:
        floating = jnp.dtype(dtype)
    except TypeError as error:
        raise ValueError(f"restore_orbax: dtype = {dtype!r} is no dtype.") from error
    if not jnp.issubdtype(floating, jnp.floating):
        raise ValueError(f"restore_orbax: dtype = {floating} is not a floating dtype.")
    kept = {id(leaf) for _, (_, scale) in stored_weights(structure) for _, leaf in leaves(scale)}
    return {
        path: floating
        if jnp.issubdtype(leaf.dtype, jnp.floating) and id(leaf) not in kept
        else leaf.dtype
        for path, leaf in saved.items()
    }


def check_like(
    source: str,
    structure: Any,
    saved: Mapping[Path, Any],
    like: Any,
    wanted: Mapping[Path, Any],
) -> None:
    """Whether `like` has the arrays of the checkpoint, and reads its shared stacks as it does."""
    given = dict(leaves(like))
    missing, surplus = set(saved) - set(given), set(given) - set(saved)
    if missing or surplus:
        raise ValueError(
            f"restore_orbax: `like` and the checkpoint {source!r} are of different models. "
            f"Only in the checkpoint: {some(missing)}; only in `like`: {some(surplus)}."
        )
    for path, leaf in given.items():
        shape, dtype = getattr(leaf, "shape", None), getattr(leaf, "dtype", None)
        if shape is None or tuple(shape) != saved[path].shape:
            raise ValueError(
                f"restore_orbax: '{slashed(path)}' has the shape {saved[path].shape} in the "
                f"checkpoint {source!r} and {shape} in `like`. Restore into the model that "
                "it was saved from."
            )
        if dtype not in (saved[path].dtype, wanted[path]):
            raise ValueError(
                f"restore_orbax: '{slashed(path)}' is of {saved[path].dtype} in the checkpoint "
                f"{source!r} and of {dtype} in `like`. Say in which dtype floats are to come, by "
                "`dtype=`, or give a `like` of the checkpoint's."
            )
    theirs, ours = stacks(structure), stacks(like)
    differing = {path for path in {*theirs, *ours} if theirs.get(path) != ours.get(path)}
    if differing:
        path = min(differing)
        raise ValueError(
            f"restore_orbax: '{slashed(path)}' is a stack read by (layers, axis) "
            f"{theirs.get(path)} in the checkpoint {source!r} and {ours.get(path)} in `like`. "
            "Restore into parameters that were replicated by the same ranges."
        )


def places_of(
    source: str, saved: Mapping[Path, Any], target: Mapping[Path, Any], shardings: Any
) -> dict[Path, Sharding]:
    """On which devices each array comes to lie."""
    default = jnp.zeros(()).sharding
    given = dict(leaves(shardings))
    for path, sharding in given.items():
        if not isinstance(sharding, Sharding):
            raise ValueError(
                f"restore_orbax: shardings hold a {type(sharding).__name__} at '{slashed(path)}', "
                "and not a jax.sharding.Sharding, such as NamedSharding(mesh, PartitionSpec())."
            )
    above = {
        path: next((path[:n] for n in range(len(path), -1, -1) if path[:n] in given), None)
        for path in saved
    }
    without = [path for path, found in above.items() if given and found is None]
    unused = set(given) - set(above.values())
    if without or unused:
        raise ValueError(
            f"restore_orbax: shardings and the checkpoint {source!r} are of different models. "
            f"Arrays without one: {some(without)}; shardings without an array: {some(unused)}."
        )
    places: dict[Path, Sharding] = {}
    for path, leaf in saved.items():
        found = above[path]
        own = _sharding_of(target[path]) or default
        places[path] = own if found is None else given[found]
        try:
            places[path].shard_shape(leaf.shape)
        except (ValueError, TypeError, IndexError) as error:
            raise ValueError(
                f"restore_orbax: '{slashed(path)}' of shape {leaf.shape} cannot be spread as "
                f"{places[path]}: {error} Give a tree of shardings."
            ) from error
    return places


def _sharding_of(leaf: Any) -> Sharding | None:
    sharding = getattr(leaf, "sharding", None)
    on_devices = not isinstance(getattr(sharding, "mesh", None), AbstractMesh)
    return sharding if isinstance(sharding, Sharding) and on_devices else None

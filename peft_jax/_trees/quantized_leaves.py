"""Trees with stored values in them: where the values and their scales lie."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from flax import serialization
from flax.core import meta

from peft_jax._numerics import StoredValues, as_stored
from peft_jax._trees.adapter_leaves import scale_name, unused_scale_name
from peft_jax._trees.paths import Path, children, is_branch, rebuild, slashed

__all__ = [
    "scales_in",
    "stored_weights",
    "with_stored",
]


def with_stored(tree: Any, done: Mapping[Path, tuple[Any, Any]], path: Path = ()) -> Any:
    """The tree with stored values, and their scales beside them, in the places of weights."""
    if not is_branch(tree):
        return tree
    here: dict[Any, Any] = {}
    scales: dict[str, Any] = {}
    for key, value in children(tree):
        inner = (*path, str(key))
        if inner not in done:
            here[key] = with_stored(value, done, inner)
            continue
        if not isinstance(tree, Mapping):
            raise ValueError(
                f"'{slashed(inner)}' lies in a {type(tree).__name__}, where there is no place "
                "beside it for its scale. Keep weights in dicts, or leave it out (`select=`)."
            )
        here[key], scales[key] = done[inner]
    for key in sorted(scales):
        name = unused_scale_name(key, here)
        if name in here or scale_name(key, {**here, name: None}) != name:
            raise ValueError(
                f"'{slashed((*path, key))}' would have its scale at {name!r}, which is taken, or "
                f"could not be told from what lies beside it: {sorted(here)}. Leave it out "
                "(`select=`)."
            )
        here[name] = scales[key]
    return rebuild(tree, here)


def stored_weights(tree: Any, path: Path = ()) -> Iterator[tuple[Path, tuple[Any, Any]]]:
    """Paths of stored values, with them and their scales, both in their boxes."""
    for key, value in children(tree) if is_branch(tree) else ():
        inner = (*path, str(key))
        if as_stored(meta.unbox(value)) is None:
            yield from stored_weights(value, inner)
            continue
        name = scale_name(key, tree) if isinstance(tree, Mapping) else None
        if name is None:
            raise ValueError(
                f"'{slashed(inner)}' holds stored values without their scale. Keep both, as "
                "`peft.quantize_checkpoint` makes them."
            )
        yield inner, (value, tree[name])


def without_stored(tree: Any, done: Mapping[Path, Any], path: Path = ()) -> Any:
    """The tree with weights in the places of stored values, and without their scales."""
    if not is_branch(tree):
        return tree
    here: dict[Any, Any] = {}
    scales: set[Any] = set()
    for key, value in children(tree):
        inner = (*path, str(key))
        here[key] = done[inner] if inner in done else without_stored(value, done, inner)
        if inner in done:
            scales.add(scale_name(key, tree))
    return rebuild(tree, {key: value for key, value in here.items() if key not in scales})


def scales_in(tree: Any) -> set[str]:
    """The names of the scales that lie directly in a container."""
    if not isinstance(tree, Mapping):
        return set()
    stored = [key for key, value in tree.items() if as_stored(meta.unbox(value)) is not None]
    return {name for key in stored if (name := scale_name(key, tree)) is not None}


def _to_state(stored: StoredValues) -> dict[str, Any]:
    return {str(stored.layout): stored.array}


def _from_state(stored: StoredValues, state: dict[str, Any]) -> StoredValues:
    read = as_stored(state)
    if read is None or read.layout != stored.layout:
        raise ValueError(
            f"Stored values named '{stored.layout}' cannot be read from {sorted(state)}. Restore "
            "into parameters that were stored by the same method."
        )
    return read


serialization.register_serialization_state(StoredValues, _to_state, _from_state)

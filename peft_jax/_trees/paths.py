"""Walks over parameter trees of dicts, FrozenDicts, lists and tuples, with adapters in them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
from flax.core import meta

from peft_jax._numerics import StoredValues, as_stored
from peft_jax._trees.adapter_leaves import is_adapter, named_as

__all__ = [
    "Layer",
    "Path",
    "adapter_paths",
    "at",
    "children",
    "containers",
    "filled",
    "is_branch",
    "leaves",
    "map_layers",
    "named_adapters",
    "nested",
    "opened_box",
    "outside_adapters",
    "rebuild",
    "slashed",
    "some",
    "stored_paths",
]


Path = tuple[str, ...]
Layer = dict[str, Any]


def is_branch(tree: Any) -> bool:
    """Whether the node is a container of further nodes, rather than a leaf or a box."""
    return isinstance(tree, Mapping | list | tuple)


def children(tree: Any) -> Iterable[tuple[Any, Any]]:
    """Keys (or positions) and values of a container."""
    return tree.items() if isinstance(tree, Mapping) else enumerate(tree)


def rebuild(like: Any, values: Mapping[Any, Any]) -> Any:
    """A container of the type of ``like`` with these values."""
    if isinstance(like, Mapping):
        kind: Any = type(like)
        return kind(values)
    items = list(values.values())
    return type(like)(*items) if hasattr(like, "_fields") else type(like)(items)


def slashed(path: Iterable[Any]) -> str:
    """A path as one string; ``(the root)`` where it is empty."""
    return "/".join(str(part) for part in path) or "(the root)"


def map_layers(tree: Any, update: Callable[[Path, Layer, Layer], Layer], path: Path = ()) -> Any:
    """Rebuilds a tree, each dict with adapters by ``update(path, the rest, the adapters)``."""
    if not is_branch(tree):
        return tree
    if not isinstance(tree, Mapping):
        return rebuild(
            tree, {i: map_layers(value, update, (*path, str(i))) for i, value in children(tree)}
        )
    adapters = {name: value for name, value in tree.items() if is_adapter(name, value)}
    rest = {
        name: map_layers(value, update, (*path, str(name)))
        for name, value in tree.items()
        if name not in adapters
    }
    return rebuild(tree, update(path, rest, adapters) if adapters else rest)


def adapter_paths(tree: Any) -> list[str]:
    """Slashed paths of all adapters in a tree."""
    paths: list[str] = []

    def note(path: Path, rest: Layer, adapters: Layer) -> Layer:
        paths.extend("/".join((*path, name)) for name in adapters)
        return rest

    map_layers(tree, note)
    return paths


def containers(tree: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """All containers of a tree and their paths, outermost first, without those of adapters."""
    if not is_branch(tree) or as_stored(tree) is not None:
        return
    yield path, tree
    for key, value in children(tree):
        if not (isinstance(tree, Mapping) and is_adapter(key, value)):
            yield from containers(value, (*path, str(key)))


def named_adapters(layer: Any, adapter_name: str) -> list[str]:
    """The names under which a container holds adapters of one name; see `adapter_name`."""
    if not isinstance(layer, Mapping):
        return []
    return [
        key
        for key, value in layer.items()
        if is_adapter(key, value) and named_as(key) == adapter_name
    ]


def stored_paths(tree: Any, path: Path = ()) -> list[Path]:
    """Paths of all values that are stored in few bits."""
    if as_stored(meta.unbox(tree)) is not None:
        return [path]
    if not is_branch(tree):
        return []
    return [
        found for key, value in children(tree) for found in stored_paths(value, (*path, str(key)))
    ]


def at(tree: Any, path: str) -> Any:
    """The branch at a slashed path."""
    for part in path.split("/"):
        tree = {str(key): value for key, value in children(tree)}[part]
    return tree


def outside_adapters(tree: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Slashed paths and values of what lies outside of adapters: parameters trained in place."""
    if not is_branch(tree):
        yield "/".join(path), tree
        return
    for key, value in children(tree):
        if not (isinstance(tree, Mapping) and is_adapter(key, value)):
            yield from outside_adapters(value, (*path, str(key)))


def leaves(tree: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """All leaves with their paths, boxes left out of these. Stored values lie at their layout."""
    if tree is None:
        return
    if isinstance(tree, meta.AxisMetadata):
        yield from leaves(opened_box(tree, path)[0], path)
    elif isinstance(tree, StoredValues):
        yield (*path, str(tree.layout)), tree.array
    elif is_branch(tree):
        for key, value in children(tree):
            yield from leaves(value, (*path, str(key)))
    else:
        yield path, tree


def filled(tree: Any, values: Mapping[Path, Any], path: Path = ()) -> Any:
    """The same containers and boxes with other leaves, by the paths of `leaves`."""
    if tree is None:
        return None
    if isinstance(tree, meta.AxisMetadata):
        inner, box = opened_box(tree, path)
        return jax.tree.unflatten(box, [filled(inner, values, path)])
    if isinstance(tree, StoredValues):
        return StoredValues(tree.layout, values[(*path, str(tree.layout))])
    if is_branch(tree):
        inside = {key: filled(v, values, (*path, str(key))) for key, v in children(tree)}
        return rebuild(tree, inside)
    return values[path]


def opened_box(box: Any, path: Path) -> tuple[Any, Any]:
    """What a box holds, and the way back into it."""
    inner, back = jax.tree.flatten(box, is_leaf=lambda node: node is not box)
    if len(inner) != 1:
        raise ValueError(
            f"The box at '{slashed(path)}' ({type(box).__name__}) holds {len(inner)} values rather "
            "than one. Take it off first, by `flax.linen.meta.unbox`."
        )
    return inner[0], back


def nested(flat: Mapping[Path, Any]) -> dict[str, Any]:
    """Dicts in dicts, out of paths."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        here = tree
        for key in path[:-1]:
            here = here.setdefault(key, {})
        here[path[-1]] = leaf
    return tree


def some(paths: Iterable[Path]) -> list[str]:
    """A few paths, for an error message."""
    ordered = sorted(map(slashed, paths))
    return ordered if len(ordered) <= 5 else [*ordered[:5], f"and {len(ordered) - 5} more"]

"""Walks over parameter trees of dicts, FrozenDicts, lists and tuples, with adapters in them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from flax.core import meta

from peft_jax._names import is_adapter, named_as
from peft_jax._stored import as_stored

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

"""Larger trees out of a tree's own layers: `replicate_layers`."""

from __future__ import annotations

import dataclasses
import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from peft_jax._numerics import as_stored
from peft_jax._trees import (
    Path,
    SharedStack,
    children,
    is_adapter,
    is_branch,
    rebuild,
    slashed,
    taken,
)

__all__ = [
    "replicate_layers",
]


Layers = tuple[int, ...]
_INDEX = re.compile(r"(?:(?P<stem>.+)_)?(?P<index>0|[1-9][0-9]*)")


def replicate_layers(
    params: Any,
    ranges: Sequence[Sequence[int]],
    *,
    pattern: str | None = None,
    axis: int = 0,
) -> Any:
    """Parameters of a larger model, made of the layers of a smaller one, as SOLAR does it.

    The ranges are laid one after the other: of 5 layers, ``[[0, 4], [2, 5]]`` makes the 7 layers
    ``0 1 2 3 2 3 4``. No weight is copied:

    - Layers with names of their own (``layers_0``, ``layers/0``, items of a list): a layer that
      occurs twice has the same array objects in both places. What makes new buffers (a jitted
      function's outputs, ``jax.device_put``, a checkpoint) ends that.
    - Layers stacked by ``nn.scan``: each stack becomes a box (`SharedStack`) of the stack as it is
      and the map of the layers to it. Any Flax model that scans 7 layers reads it; `get_peft_model`
      also keeps the gradient from storing the layers once more. ``flax.linen.meta.unbox`` writes
      out the longer stack, as `fuse_params` does for the weights that it changes.

    Adapters are each layer's own: those on the given layers are copied, so that the larger model
    starts with them. The model is yours to build, with as many layers; or ``layer_replication`` in
    a `LoraConfig` builds it. Quantize the smaller model's parameters before, not after.

    Example::

      big = peft.replicate_layers(params, [[0, 16], [8, 24]], pattern="layers")

    Args:
      params: nested dicts, FrozenDicts, lists and tuples.
      ranges: pairs ``[start, end)`` of indices of layers.
      pattern: regular expression for the end of the dotted path that holds the layers: what
        stands before the index (``h`` of ``h_3`` and of ``h/3``), or the name of the stack. All
        layers that match are replicated (``encoder.layers`` is one of ``layers``). None: the
        layers with names of their own, if there is one family of them.
      axis: along which a stack's layers lie: ``variable_axes={"params": axis}``.

    Raises:
      ValueError: where the ranges are no ranges of the layers, no layers or several families of
        them are found, an index is missing, or what is named is no stack.
    """
    layers = arrangement(ranges)
    if not is_branch(params):
        raise ValueError(
            f"replicate_layers takes a parameter tree, got {type(params).__name__}. Give "
            "variables['params']."
        )
    found = _chosen(params, layers, pattern)
    if found:
        return with_families(params, found, layers)
    assert pattern is not None
    stacks = [path for path, _ in _branches(params) if _ends_in(pattern, path)]
    outer = [path for path in stacks if not any(_is_above(other, path) for other in stacks)]
    if not outer:
        raise ValueError(
            f"replicate_layers(pattern={pattern!r}): no layers and no stack of layers have this "
            f"name. Layers with names of their own: {_listed(families(params))}; other "
            f"containers: {[*map(slashed, (path for path, _ in _branches(params)))][:12]}."
        )
    for path in outer:
        _check_stack(_at(params, path), path, layers, axis)
    return with_stacks(
        params, layers, lambda path: axis if any(_is_above(top, path) for top in outer) else None
    )


def arrangement(ranges: Any) -> Layers:
    """The layers that ranges name, one after the other.

    Raises:
      ValueError: where they are not pairs of integers ``0 <= start < end``.
    """
    try:
        pairs = [tuple(map(operator.index, pair)) for pair in ranges]
    except TypeError:
        pairs = []
    if not pairs or not all(len(pair) == 2 and 0 <= pair[0] < pair[1] for pair in pairs):
        raise ValueError(
            "Layers are replicated by a list of ranges [start, end) with 0 <= start < end, such as "
            f"[[0, 4], [2, 5]], got {ranges!r}."
        )
    return tuple(i for start, end in pairs for i in range(start, end))


# --- Layers with names of their own --------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Family:
    """Layers that are told apart by an index.

    Attributes:
      path: of the container that holds them.
      stem: ``h`` of ``h_3``; None: the index alone is the key, or the place in a list.
      keys: of the layers, by index.
    """

    path: Path
    stem: str | None
    keys: Mapping[int, Any] = dataclasses.field(compare=False)

    @property
    def place(self) -> Path:
        """The path up to the index."""
        return self.path if self.stem is None else (*self.path, self.stem)

    def key(self, index: int) -> Any:
        """The key of a layer."""
        name = str(index) if self.stem is None else f"{self.stem}_{index}"
        return name if any(isinstance(key, str) for key in self.keys.values()) else index


def families(params: Any) -> list[Family]:
    """The families of layers in a tree, but for those inside layers of another."""
    found: list[Family] = []
    for path, tree in _branches(params):
        if not any(_is_layer_of(family, path) for family in found):
            found += _families_in(path, tree)
    return found


def _families_in(path: Path, tree: Any) -> list[Family]:
    grouped: dict[str | None, dict[int, Any]] = {}
    for key, value in children(tree):
        index = _INDEX.fullmatch(str(key))
        if index and _is_module(key, value) and not hasattr(tree, "_fields"):
            grouped.setdefault(index["stem"], {})[int(index["index"])] = key
    return [Family(path, stem, keys) for stem, keys in grouped.items()]


def _is_layer_of(family: Family, path: Path) -> bool:
    """Whether a path is that of a layer of the family, or goes through one."""
    inside = path[len(family.path) :]
    keys = {str(key) for key in family.keys.values()}
    return path[: len(family.path)] == family.path and bool(inside) and inside[0] in keys


def _chosen(params: Any, layers: Layers, pattern: str | None) -> list[Family]:
    """The families to replicate; none where the pattern names none."""
    everything = families(params)
    if pattern is None:
        long = [family for family in everything if len(family.keys) > max(layers)]
        if len(long) != 1:
            raise ValueError(
                f"replicate_layers: {'several' if long else 'no'} families of more than "
                f"{max(layers)} layers have names of their own: {_listed(long or everything)}. "
                "Name what stands before the index, or the module that nn.scan stacks: "
                "`pattern='layers'`."
            )
        found = long
    else:
        every = [f for path, tree in _branches(params) for f in _families_in(path, tree)]
        named = [family for family in every if _ends_in(pattern, family.place)]
        found = [f for f in named if not any(_is_layer_of(other, f.path) for other in named)]
    for family in found:
        _check_family(family, layers)
    return found


def _check_family(family: Family, layers: Layers) -> None:
    there, place = sorted(family.keys), slashed(family.place)
    if there != list(range(len(there))):
        raise ValueError(
            f"replicate_layers: the layers of '{place}' have the indices {there}; they are to "
            f"count from 0, with none left out."
        )
    _check_length(place, len(there), layers)


def _check_length(place: str, length: int, layers: Layers) -> None:
    if max(layers) >= length:
        raise ValueError(
            f"replicate_layers: the ranges go up to layer {max(layers)}, but '{place}' has "
            f"{length} layers, 0 to {length - 1}."
        )


def with_families(tree: Any, found: Sequence[Family], layers: Layers, path: Path = ()) -> Any:
    """The tree with other layers in these families."""
    if not is_branch(tree):
        return tree
    here = [family for family in found if family.path == path]
    done: dict[Any, Any] = {}
    for key, value in children(tree):
        family = next((f for f in here if key in f.keys.values()), None)
        if family is None:
            done[key] = with_families(value, found, layers, (*path, str(key)))
        elif key == family.keys[min(family.keys)]:
            done |= _new_layers(dict(children(tree)), family, layers)
    return rebuild(tree, done)


def _new_layers(tree: Mapping[Any, Any], family: Family, layers: Layers) -> dict[Any, Any]:
    made: dict[Any, Any] = {}
    taken_by = set(map(family.key, range(len(layers)))) & (set(tree) - {*family.keys.values()})
    if taken_by:
        raise ValueError(
            f"replicate_layers: beside the layers of '{slashed(family.place)}' lies something at "
            f"{sorted(map(str, taken_by))}, where new layers would come. Keep layers apart."
        )
    for place, index in enumerate(layers):
        again = index in layers[:place]
        made[family.key(place)] = _replica(tree[family.keys[index]], again)
    return made


def _replica(tree: Any, again: bool) -> Any:
    """The layer with the same arrays in new containers, and adapters of its own."""
    if not is_branch(tree):
        return tree
    return rebuild(
        tree,
        {
            key: jax.tree.map(_copied, value)
            if again and isinstance(tree, Mapping) and is_adapter(key, value)
            else _replica(value, again)
            for key, value in children(tree)
        },
    )


def _copied(leaf: Any) -> Any:
    if isinstance(leaf, np.ndarray):
        return leaf.copy()
    return jnp.copy(leaf) if isinstance(leaf, jax.Array) else leaf


# --- Stacked layers ------------------------------------------------------------------------------


def with_stacks(
    tree: Any, layers: Layers, axis_of: Callable[[Path], int | None], path: Path = ()
) -> Any:
    """The tree with shared stacks, adapters written out.

    Args:
      tree: with stacks of layers in it.
      layers: for each new layer, one of the stack's.
      axis_of: from the path of a leaf to the axis of its layers; None: it is no stack.
      path: of the tree.
    """
    if not is_branch(tree) or as_stored(tree) is not None:
        axis = axis_of(path)
        return tree if axis is None else _shared(tree, layers, axis)
    done: dict[Any, Any] = {}
    for key, value in children(tree):
        inner = (*path, str(key))
        if isinstance(tree, Mapping) and is_adapter(key, value):
            done[key] = _written_out(value, layers, axis_of((*inner, "a")))
        else:
            done[key] = with_stacks(value, layers, axis_of, inner)
    return rebuild(tree, done)


def _written_out(adapter: Any, layers: Layers, axis: int | None) -> Any:
    if axis is None:
        return adapter
    return jax.tree.map(lambda leaf: taken(leaf, layers, axis % len(np.shape(leaf))), adapter)


def _shared(value: Any, layers: Layers, axis: int) -> SharedStack:
    if isinstance(value, SharedStack):
        return SharedStack(value.value, tuple(value.layers[i] for i in layers), value.axis)
    stored = as_stored(value)
    ndim = len(np.shape(jax.tree.leaves(value)[0]))
    return SharedStack(value if stored is None else stored, layers, axis % ndim)


def _check_stack(tree: Any, top: Path, layers: Layers, axis: int) -> None:
    """All leaves of a subtree have layers along the axis, and equally many."""
    shapes = {slashed((*top, *path)): shape for path, shape in _shapes(tree)}
    fits = {s[axis] for s in shapes.values() if -len(s) <= axis < len(s)}
    if len(fits) != 1 or any(not -len(s) <= axis < len(s) for s in shapes.values()):
        shown = dict(list(shapes.items())[:8])
        raise ValueError(
            f"replicate_layers: '{slashed(top)}' holds no layers with an index, and is no stack of "
            f"layers along axis {axis}: its shapes are {shown}. Name what nn.scan stacks (`axis=` "
            "says along which axis), or what stands before the index."
        )
    _check_length(slashed(top), fits.pop(), layers)


def _shapes(tree: Any, path: Path = ()) -> Iterator[tuple[Path, tuple[int, ...]]]:
    if not is_branch(tree) or as_stored(tree) is not None:
        shape = np.shape(jax.tree.leaves(tree)[0])
        if isinstance(tree, SharedStack):
            shape = (*shape[: tree.axis], len(tree.layers), *shape[tree.axis + 1 :])
        yield path, shape
        return
    for key, value in children(tree):
        yield from _shapes(value, (*path, str(key)))


# --- Paths ---------------------------------------------------------------------------------------


def _is_module(key: Any, value: Any) -> bool:
    return is_branch(value) and as_stored(value) is None and not is_adapter(key, value)


def _branches(tree: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """All containers that may stand for modules, outermost first."""
    yield path, tree
    for key, value in children(tree):
        if _is_module(key, value):
            yield from _branches(value, (*path, str(key)))


def _at(tree: Any, path: Path) -> Any:
    for part in path:
        tree = next(value for key, value in children(tree) if str(key) == part)
    return tree


def _is_above(top: Path, path: Path) -> bool:
    return len(path) > len(top) and path[: len(top)] == top


def _ends_in(pattern: str, path: Path) -> bool:
    """Whether the end of a path, from a dot on, matches."""
    try:
        form = re.compile(rf"(?:.*\.)?(?:{pattern.replace('/', '.')})")
    except (re.error, AttributeError) as error:
        raise ValueError(
            f"replicate_layers: pattern is a regular expression, a string, got {pattern!r}."
        ) from error
    return form.fullmatch(".".join(path)) is not None


def _listed(found: Sequence[Family]) -> str:
    names = [f"'{slashed(family.place)}' ({len(family.keys)} layers)" for family in found]
    return ", ".join(names) or "none"

"""Checkpoints of orbax, read and written tensor by tensor."""

from __future__ import annotations

import asyncio
import collections
import functools
import logging
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore

from peft_jax.io.checkpoints.read import ORBAX, Checkpoint, nested
from peft_jax.io.files.formats import Array
from peft_jax.io.files.safetensors import TensorStream

_CHUNK = 2**25  # bytes of an array that are kept in one piece
_HELD = 2  # pieces that were read last


class OrbaxCheckpoint(Checkpoint):
    """The arrays of an orbax directory, opened by tensorstore; names have slashes."""

    format = ORBAX

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._root = _item(path).resolve()
        try:
            found = ocp.PyTreeCheckpointHandler().metadata(self._root)
            leaves = jax.tree.leaves_with_path(found.tree)
        except Exception as error:  # whatever orbax makes of files that it cannot read
            raise ValueError(f"{str(path)!r} is no checkpoint of orbax: {error!r:.300}") from error
        self._ocdbt = (self._root / "manifest.ocdbt").is_file()
        self._driver = "zarr3" if found.use_zarr3 else "zarr"
        self._leaves: dict[str, Any] = {}
        self._stores: dict[str, Any] = {}
        self._held: collections.deque[tuple[Any, Array]] = collections.deque(maxlen=_HELD)
        self.lists = frozenset(
            tuple(map(_part, keys[:place]))
            for keys, _ in leaves
            for place, key in enumerate(keys)
            if isinstance(key, jax.tree_util.SequenceKey)
        )
        for keys, leaf in leaves:
            name = "/".join(map(_part, keys))
            if name in self._leaves:
                raise ValueError(f"{str(path)!r} has two arrays named {name!r}.")
            if not hasattr(leaf, "shape") or leaf.shape is None:
                raise ValueError(f"{str(path)!r}: {name!r} is no array.")
            self._leaves[name] = leaf

    def close(self) -> None:
        """Lets go of what was read."""
        self._stores.clear()
        self._held.clear()

    @property
    def names(self) -> tuple[str, ...]:
        """Slashed paths of all arrays."""
        return tuple(self._leaves)

    @functools.cached_property
    def separator(self) -> str:
        """Orbax names arrays by their paths."""
        return "/"

    def shape(self, name: str) -> tuple[int, ...]:
        """Of one array."""
        return tuple(self._leaf(name).shape)

    def dtype(self, name: str) -> np.dtype[Any]:
        """Of one array."""
        return np.dtype(self._leaf(name).dtype or np.float32)

    def read(self, name: str) -> Array:
        """One array, whole."""
        return self._values(self._store(name), name)

    def read_rows(self, name: str, start: int, stop: int) -> Array:
        """Rows of an array, of which whole pieces are read and held for the next rows."""
        store = self._store(name)
        step = max(store.chunk_layout.read_chunk.shape[0], 1)
        first, last = start // step * step, min(-(-stop // step) * step, store.shape[0])
        piece = next((array for key, array in self._held if key == (name, first, last)), None)
        if piece is None:
            piece = self._values(store[first:last], name)
            self._held.append(((name, first, last), piece))
        return piece[start - first : stop - first]

    def _leaf(self, name: str) -> Any:
        if name not in self._leaves:
            raise ValueError(f"{str(self.path)!r} has no array {name!r}.")
        return self._leaves[name]

    def _values(self, store: Any, name: str) -> Array:
        try:
            return np.asarray(store.read().result())
        except ValueError as error:
            raise ValueError(f"{str(self.path)!r}: {name!r} cannot be read: {error}") from error

    def _store(self, name: str) -> Any:
        if name not in self._stores:
            place = f"{self._leaf(name).name}/"
            root = f"file://{self._root}/"
            kvstore: Any = {"driver": "ocdbt", "base": root, "path": place}
            if not self._ocdbt:
                kvstore = f"{root}{place}"
            spec = {"driver": self._driver, "kvstore": kvstore}
            try:
                self._stores[name] = tensorstore.open(spec, open=True, read=True).result()
            except ValueError as error:
                raise ValueError(f"{str(self.path)!r}: {name!r} cannot be read: {error}") from error
        return self._stores[name]


def _item(path: Path) -> Path:
    """The directory with the tree: the checkpoint itself, or the one item in it."""
    if (path / "_METADATA").is_file():
        return path
    items = sorted(child for child in path.iterdir() if (child / "_METADATA").is_file())
    if len(items) != 1:
        raise ValueError(
            f"{str(path)!r} holds {len(items)} items of orbax: {[item.name for item in items]}. "
            "Name the one that is meant."
        )
    return items[0]


def _part(key: Any) -> str:
    for attribute in ("key", "idx", "name"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


class _Lazy:
    """An array that is made when it is written."""

    def __init__(self, stream: TensorStream) -> None:
        self.stream = stream
        self.shape, self.dtype = stream.shape, np.dtype(stream.dtype)
        self.ndim, self.size = len(self.shape), int(np.prod(self.shape, dtype=np.int64))
        self.nbytes = self.size * self.dtype.itemsize

    def array(self) -> Array:
        """The array, put together from its chunks."""
        array, place = np.empty(self.size, self.dtype), 0
        for chunk in self.stream.chunks():
            flat = np.asarray(chunk).reshape(-1)
            array[place : place + flat.size] = flat
            place += flat.size
        if place != self.size:
            raise ValueError(f"An array of shape {self.shape} ends after {place} values.")
        return array.reshape(self.shape)


class _LazyHandler(ocp.type_handlers.NumpyHandler):
    """Writes one array after another, so that memory holds one at a time."""

    async def serialize(
        self, values: Sequence[Any], infos: Sequence[Any], args: Sequence[Any] | None = None
    ) -> Sequence[Any]:
        for value, info, arg in zip(values, infos, args or [None] * len(values), strict=True):
            save_args = arg or ocp.SaveArgs()
            for done in await super().serialize([value.array()], [info], [save_args]):
                await asyncio.to_thread(done.result)
        return []


def write_orbax(
    path: Path,
    tensors: Mapping[str, TensorStream],
    paths: Mapping[str, tuple[str, ...]],
    lists: Collection[tuple[str, ...]] = (),
) -> None:
    """Writes a tree of arrays as orbax does, one array at a time.

    Args:
      path: of the directory, which is not there yet.
      tensors: by name.
      paths: where in the tree each of them lies.
      lists: paths of containers that are lists.
    """
    joined = collections.Counter(".".join(path) for path in paths.values())
    twins = sorted(name for name, count in joined.items() if count > 1)
    if twins:
        raise ValueError(f"orbax joins keys by dots, and {twins} would be one array. Rename one.")
    tree = _with_lists(
        nested({paths[name]: _Lazy(tensor) for name, tensor in tensors.items()}), lists
    )
    registry = ocp.type_handlers.create_type_handler_registry(
        (_Lazy, _LazyHandler(deepcopy_host_arrays=False)),
        (jax.Array, ocp.type_handlers.ArrayHandler()),
    )
    arguments = jax.tree.map(
        lambda _: ocp.SaveArgs(chunk_byte_size=_CHUNK), tree, is_leaf=lambda x: isinstance(x, _Lazy)
    )
    logging.getLogger("absl").setLevel(logging.ERROR)
    handler = ocp.PyTreeCheckpointHandler(type_handler_registry=registry)
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(path.resolve(), ocp.args.PyTreeSave(tree, save_args=arguments))


def _with_lists(tree: Any, lists: Collection[tuple[str, ...]], path: tuple[str, ...] = ()) -> Any:
    """The tree with lists in the places of dicts whose keys are positions."""
    if not isinstance(tree, dict):
        return tree
    inner = {key: _with_lists(value, lists, (*path, key)) for key, value in tree.items()}
    positions = [str(place) for place in range(len(inner))]
    if path in lists and set(inner) == set(positions):
        return [inner[place] for place in positions]
    return inner

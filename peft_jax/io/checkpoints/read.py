"""Checkpoints on disk, whatever their format: names of tensors, and each read when it is needed."""

from __future__ import annotations

import abc
import contextlib
import functools
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from peft_jax.io.files.formats import Array
from peft_jax.io.files.safetensors import SafetensorsFile, TensorStream

INDEX_SUFFIX = ".safetensors.index.json"
SHARDED, SAFETENSORS, ORBAX = "sharded safetensors", "safetensors", "orbax"
CHUNK_BYTES = 2**25  # of a tensor that is read in slices


class Checkpoint(abc.ABC):
    """Tensors by their names. A context manager.

    Attributes:
      path: of the file or directory.
      format: `SAFETENSORS`, `SHARDED` or `ORBAX`.
      files: the file of each tensor, of a sharded checkpoint.
      metadata: texts that lie beside the tensors.
      lists: paths of the containers whose keys are positions, of a tree.
    """

    format: str
    files: Mapping[str, str]
    metadata: Mapping[str, str]
    lists: frozenset[tuple[str, ...]] = frozenset()

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files = {}
        self.metadata = {}

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @abc.abstractmethod
    def close(self) -> None:
        """Closes what was opened."""

    @property
    @abc.abstractmethod
    def names(self) -> tuple[str, ...]:
        """Names of the tensors."""

    @abc.abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """The lengths of a tensor."""

    @abc.abstractmethod
    def dtype(self, name: str) -> np.dtype[Any]:
        """The dtype of a tensor."""

    @abc.abstractmethod
    def read(self, name: str) -> Array:
        """A whole tensor."""

    @abc.abstractmethod
    def read_rows(self, name: str, start: int, stop: int) -> Array:
        """Rows of a tensor along its first axis."""

    def nbytes(self, name: str) -> int:
        """The size of a tensor."""
        return math.prod(self.shape(name)) * self.dtype(name).itemsize

    @property
    def total_bytes(self) -> int:
        """The size of all tensors."""
        return sum(map(self.nbytes, self.names))

    def __contains__(self, name: object) -> bool:
        return name in self._known

    @functools.cached_property
    def _known(self) -> frozenset[str]:
        return frozenset(self.names)

    @functools.cached_property
    def separator(self) -> str:
        """What stands between the parts of a name: a slash where any name has one, or a dot."""
        return "/" if any("/" in name for name in self.names) else "."

    def path_of(self, name: str) -> tuple[str, ...]:
        """The parts of a name."""
        return tuple(name.split(self.separator))

    def chunks(self, name: str, chunk_bytes: int = CHUNK_BYTES) -> Iterator[Array]:
        """The rows of a tensor, some at a time."""
        shape = self.shape(name)
        if not shape or self.nbytes(name) <= chunk_bytes:
            yield self.read(name)
            return
        for start, stop in row_ranges(shape[0], self.nbytes(name) // shape[0], chunk_bytes):
            yield self.read_rows(name, start, stop)

    def stream(self, name: str) -> TensorStream:
        """The tensor, to be written as it is."""
        return TensorStream(self.dtype(name), self.shape(name), lambda: self.chunks(name))


def paired_chunks(
    a: Checkpoint, b: Checkpoint, name: str, other: str | None = None
) -> Iterator[tuple[Array, Array]]:
    """The same rows of two tensors of one shape.

    Args:
      a: has the one.
      b: has the other.
      name: in ``a``.
      other: in ``b``; None: the same.
    """
    other, shape = other or name, a.shape(name)
    if not shape:
        yield a.read(name), b.read(other)
        return
    row_bytes = max(a.nbytes(name), b.nbytes(other)) // max(shape[0], 1)
    for start, stop in row_ranges(shape[0], row_bytes):
        yield a.read_rows(name, start, stop), b.read_rows(other, start, stop)


def row_ranges(
    rows: int, row_bytes: int, chunk_bytes: int = CHUNK_BYTES, multiple: int = 1
) -> Iterator[tuple[int, int]]:
    """Ranges of rows of about so many bytes, each of so many rows or a multiple of that."""
    step = max(chunk_bytes // max(row_bytes, 1) // multiple, 1) * multiple
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


class FilesCheckpoint(Checkpoint):
    """One safetensors file, or several with an index."""

    def __init__(self, path: Path, format: str, files: Mapping[str, Path] | None = None) -> None:
        super().__init__(path)
        self.format = format
        self._opened = contextlib.ExitStack()
        try:
            if files is None:
                file = self._opened.enter_context(SafetensorsFile(path))
                self._of = dict.fromkeys(file.names, file)
                self.metadata = file.metadata
                return
            shards = {
                shard: self._opened.enter_context(SafetensorsFile(shard))
                for shard in sorted(set(files.values()))
            }
            self._of = {name: shards[shard] for name, shard in files.items()}
            self.files = {name: shard.name for name, shard in files.items()}
            self.metadata = next(iter(shards.values())).metadata if shards else {}
            for name, file in self._of.items():
                file.shape(name)  # which refuses a name that the shard lacks
        except BaseException:
            self._opened.close()
            raise

    def close(self) -> None:
        """Closes the files."""
        self._opened.close()

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the tensors of all files."""
        return tuple(self._of)

    def shape(self, name: str) -> tuple[int, ...]:
        """The lengths of a tensor, from the header of its file."""
        return self._file(name).shape(name)

    def dtype(self, name: str) -> np.dtype[Any]:
        """The dtype of a tensor, from the header of its file."""
        return self._file(name).dtype(name)

    def read(self, name: str) -> Array:
        """A whole tensor."""
        return self._file(name).read(name)

    def read_rows(self, name: str, start: int, stop: int) -> Array:
        """Rows of a tensor along its first axis."""
        return self._file(name).read_rows(name, start, stop)

    def _file(self, name: str) -> SafetensorsFile:
        if name not in self._of:
            raise ValueError(f"{str(self.path)!r} has no tensor {name!r}.")
        return self._of[name]


def is_float(dtype: np.dtype[Any]) -> bool:
    """Whether numbers of this dtype are floats, bfloat16 and its like among them."""
    return dtype.kind == "f" or dtype.name.startswith(("float", "bfloat"))


def check_torch_layout(checkpoint: Checkpoint, name: str, remedy: str) -> None:
    """Refuses a torch `weight` whose bias tells that it is ``(in, out)``, as GPT-2's are.

    Raises:
      ValueError: with the name and the remedy.
    """
    bias = checkpoint.separator.join((*checkpoint.path_of(name)[:-1], "bias"))
    shape = checkpoint.shape(name)
    if bias not in checkpoint or shape[0] == shape[-1] or len(shape) != 2:
        return
    if checkpoint.shape(bias) == shape[1:]:
        raise ValueError(
            f"{name!r} of shape {shape} would be (out, in), but its bias has {shape[1]} numbers: "
            f"it is (in, out). Pass {remedy}."
        )


def nested(values: Mapping[tuple[str, ...], Any]) -> dict[str, Any]:
    """A tree of dicts from paths and values.

    Raises:
      ValueError: where a path leads through the place of another value.
    """
    tree: dict[str, Any] = {}
    for path, value in values.items():
        branch = tree
        for part in path[:-1]:
            branch = branch.setdefault(part, {})
            if not isinstance(branch, dict):
                break
        if not isinstance(branch, dict) or path[-1] in branch:
            raise ValueError(
                f"The name {'/'.join(path)!r} leads through that of another tensor, or is there "
                "twice: the names make up no tree."
            )
        branch[path[-1]] = value
    return tree


def flattened(tree: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Paths and leaves of a tree of dicts; the inverse of `nested`."""
    if not isinstance(tree, dict):
        yield path, tree
        return
    for key, value in tree.items():
        yield from flattened(value, (*path, str(key)))

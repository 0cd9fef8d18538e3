"""Checkpoints to disk: a file, shards or orbax, one tensor after another."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from peft_jax.io.checkpoints.read import INDEX_SUFFIX, ORBAX, SHARDED, Checkpoint
from peft_jax.io.files.safetensors import TensorStream, write_safetensors

_BESIDE = (".json", ".txt", ".model", ".jinja", ".md", ".spm", ".vocab")

ONE_FILE = ".safetensors"


@dataclasses.dataclass(frozen=True)
class NewCheckpoint:
    """A checkpoint that is made from another.

    Attributes:
      source: the other; its files, names and metadata are kept where they can be.
      tensors: in the order of the names.
      origins: for each of them the tensor of the source in whose shard it goes.
    """

    source: Checkpoint
    tensors: Mapping[str, TensorStream]
    origins: Mapping[str, str]


def stream_bytes(stream: TensorStream) -> int:
    """The size of a tensor that is to be written."""
    return math.prod(stream.shape) * np.dtype(stream.dtype).itemsize


def write_directory(place: Path, tensors: Mapping[str, TensorStream], new: NewCheckpoint) -> None:
    """Writes safetensors as the source has them (one file, or its shards), and its small files."""
    source, metadata = new.source, new.source.metadata or None
    place.mkdir()
    folder = source.path if source.path.is_dir() else source.path.parent
    if source.format == SHARDED:
        files = {name: source.files[new.origins[name]] for name in tensors}
        for file in sorted(set(files.values())):
            own = {name: stream for name, stream in tensors.items() if files[name] == file}
            write_safetensors(place / file, own, metadata)
        total = sum(map(stream_bytes, tensors.values()))
        index = {"metadata": {"total_size": total}, "weight_map": files}
        (place / source.path.name).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    else:
        write_safetensors(place / "model.safetensors", tensors, metadata)
    if source.format == ORBAX:
        return
    for beside in sorted(folder.iterdir()) if _is_model_directory(folder) else ():
        is_index = beside.name.endswith(INDEX_SUFFIX)
        if beside.is_file() and beside.suffix in _BESIDE and not is_index:
            shutil.copyfile(beside, place / beside.name)


def _is_model_directory(folder: Path) -> bool:
    """Whether the small files of a directory belong to the checkpoint in it."""
    return (folder / "config.json").is_file()

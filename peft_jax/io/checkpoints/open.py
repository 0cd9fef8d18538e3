"""Opens a checkpoint of whichever format a path has."""

from __future__ import annotations

import json
from pathlib import Path

from peft_jax.io.checkpoints.read import (
    INDEX_SUFFIX,
    SAFETENSORS,
    SHARDED,
    Checkpoint,
    FilesCheckpoint,
)
from peft_jax.io.files.formats import ADAPTER_FILE, is_orbax


def open_checkpoint(path: Path) -> Checkpoint:
    """Opens a safetensors file, a sharded checkpoint or an orbax directory.

    Raises:
      ValueError: where the path is none of these, or what it holds is broken.
    """
    if not path.exists():
        raise ValueError(f"There is no {str(path)!r}.")
    if not path.is_dir():
        if path.name.endswith(INDEX_SUFFIX):
            return _sharded(path)
        return FilesCheckpoint(path, SAFETENSORS)
    if is_orbax(path):
        # Imported here, so that files of safetensors are read without orbax.
        from peft_jax.io.checkpoints.orbax import OrbaxCheckpoint

        return OrbaxCheckpoint(path)
    indices = sorted(path.glob(f"*{INDEX_SUFFIX}"))
    files = sorted(path.glob("*.safetensors"))
    if [file.name for file in files] == [ADAPTER_FILE]:
        raise ValueError(f"{str(path)!r} is an adapter, where a checkpoint is asked for.")
    if len(indices) == 1:
        return _sharded(indices[0])
    if len(indices) > 1 or len(files) != 1:
        found = [file.name for file in indices or files]
        raise ValueError(
            f"{str(path)!r} is no checkpoint: a directory with one *.safetensors file, one "
            f"*{INDEX_SUFFIX}, or what orbax wrote. It has {found or 'none of these'}."
        )
    return FilesCheckpoint(files[0], SAFETENSORS)


def _sharded(index: Path) -> Checkpoint:
    where = f"{str(index)!r}"
    try:
        table = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = {str(name): index.parent / str(file) for name, file in table.items()}
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{where} is no index of shards, which is JSON with a 'weight_map': {error!r:.200}"
        ) from error
    for name, file in files.items():
        if file.name != table[name] or not file.is_file():
            raise ValueError(
                f"{where} says that {name!r} lies in {table[name]!r}, which is no file beside it."
            )
    return FilesCheckpoint(index, SHARDED, files)

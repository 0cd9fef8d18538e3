"""`peft-jax fuse`."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from peft_jax.cli._report import write_checkpoint
from peft_jax.cli._screen import say
from peft_jax.io.any_adapter import has_specs, load, read_adapter
from peft_jax.io.checkpoints import read
from peft_jax.io.checkpoints.fuse import Change, changes_of
from peft_jax.io.checkpoints.fuse_specs import changes_by_specs, speaks_of
from peft_jax.io.checkpoints.open import open_checkpoint
from peft_jax.io.checkpoints.read import Checkpoint, row_ranges
from peft_jax.io.checkpoints.write import NewCheckpoint
from peft_jax.io.files.formats import HUGGINGFACE, Array, require_adapter
from peft_jax.io.files.safetensors import TensorStream


def run(options: argparse.Namespace) -> int:
    """Adds an adapter to the weights of a checkpoint."""
    with open_checkpoint(options.base) as base:
        changes = _changes(options.adapter, base)
        tensors = {
            name: _changed(base, name, changes[name]) if name in changes else base.stream(name)
            for name in base.names
        }
        inputs = [options.base, options.adapter]
        new = NewCheckpoint(base, tensors, {name: name for name in tensors})
        write_checkpoint(new, options.output, options.format, inputs, options)
        say(f"{len(changes)} of {len(tensors)} tensors are changed by the adapter")
    return 0


def _changes(adapter: Path, base: Checkpoint) -> dict[str, Change]:
    """By specs where they were saved and name tensors of the checkpoint; else by modules."""
    if require_adapter(adapter) != HUGGINGFACE or has_specs(adapter):
        loaded = load(adapter)
        if speaks_of(loaded.specs, base):
            return changes_by_specs(loaded.lora, loaded.specs, base)
    return changes_of(read_adapter(adapter), base)


def _changed(base: Checkpoint, name: str, change: Change) -> TensorStream:
    """The new tensor, in slices of rows where that can be."""
    shape, size = base.shape(name), base.nbytes(name)

    def chunks() -> Iterator[Array]:
        if change.rows is None or size <= read.CHUNK_BYTES:
            yield change.whole(base.read(name))
            return
        for start, stop in row_ranges(shape[0], size // shape[0], read.CHUNK_BYTES):
            yield change.rows(base.read_rows(name, start, stop), start, stop)

    return TensorStream(base.dtype(name), shape, chunks)

"""Checkpoints to disk: a file, shards or orbax, one tensor after another."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from peft_jax.cli._checkpoints import INDEX_SUFFIX, ORBAX, SHARDED, Checkpoint, nested
from peft_jax.cli._output import Progress, check_output, new_output, print_table, readable, say
from peft_jax.io._safetensors import TensorStream, write_safetensors

_BESIDE = (".json", ".txt", ".model", ".jinja", ".md", ".spm", ".vocab")
_ONE_FILE = ".safetensors"


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


def write_checkpoint(
    new: NewCheckpoint, output: Path, format: str | None, inputs: Sequence[Path], options: Any
) -> None:
    """Writes the checkpoint, or says what would be written.

    Args:
      new: the checkpoint.
      output: its place.
      format: ``safetensors``, ``orbax``, or None: that of the source.
      inputs: what the output must not touch.
      options: of the command line: ``force``, ``dry_run``, and the command's name.

    Raises:
      ValueError: as `check_output`, and where the format does not go with the output's name.
    """
    check_output(output, inputs, options.force)
    as_orbax = format == "orbax" or (format is None and new.source.format == ORBAX)
    if as_orbax and output.suffix == _ONE_FILE:
        if format is not None:
            raise ValueError(
                f"--format orbax makes a directory, and {str(output)!r} is named as a file. Name a "
                "directory."
            )
        as_orbax = False
    total = sum(map(stream_bytes, new.tensors.values()))
    paths = {name: tuple(name.split(new.source.separator)) for name in new.tensors}
    if as_orbax:
        nested({path: name for name, path in paths.items()})  # so that errors come first
    if options.dry_run:
        list_tensors(new.tensors)
        say(f"would write {output}: {len(new.tensors)} tensors, {readable(total)}")
        return
    with Progress(options.command.name, total) as progress, new_output(output) as place:
        tensors = {name: _counted(stream, progress) for name, stream in new.tensors.items()}
        if as_orbax:
            from peft_jax.cli._orbax import write_orbax

            write_orbax(place, tensors, paths, new.source.lists)
        elif output.suffix == _ONE_FILE:
            write_safetensors(place, tensors, new.source.metadata or None)
        else:
            _write_directory(place, tensors, new)
    say(f"wrote {output}: {len(new.tensors)} tensors, {readable(total)}")


def list_tensors(tensors: Mapping[str, TensorStream]) -> None:
    """A table of what would be written."""
    rows = [
        [name, shown_shape(stream.shape), str(np.dtype(stream.dtype)), f"{stream_bytes(stream):,d}"]
        for name, stream in tensors.items()
    ]
    print_table(("tensor", "shape", "dtype", "bytes"), rows, ("bytes",))


def shown_shape(shape: Iterable[int]) -> str:
    """``64x32``; ``()`` for a single number."""
    return "x".join(map(str, shape)) or "()"


def stream_bytes(stream: TensorStream) -> int:
    """The size of a tensor that is to be written."""
    return math.prod(stream.shape) * np.dtype(stream.dtype).itemsize


def _counted(stream: TensorStream, progress: Progress) -> TensorStream:
    def chunks() -> Iterator[Any]:
        for chunk in stream.chunks():
            yield chunk
            progress.update(chunk.nbytes)

    return stream._replace(chunks=chunks)


def _write_directory(place: Path, tensors: Mapping[str, TensorStream], new: NewCheckpoint) -> None:
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

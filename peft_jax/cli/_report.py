"""Checkpoints to disk: a file, shards or orbax, one tensor after another."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from peft_jax._config import LoraConfig
from peft_jax.cli._screen import Progress, print_table, readable, say
from peft_jax.io.checkpoints.read import ORBAX, nested
from peft_jax.io.checkpoints.write import ONE_FILE, NewCheckpoint, stream_bytes, write_directory
from peft_jax.io.files.atomic import check_output, new_output
from peft_jax.io.files.formats import PREFIX, WEIGHTS_FILE, Array
from peft_jax.io.files.safetensors import TensorStream, write_safetensors


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
    if as_orbax and output.suffix == ONE_FILE:
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
            from peft_jax.io.checkpoints.orbax import write_orbax

            write_orbax(place, tensors, paths, new.source.lists)
        elif output.suffix == ONE_FILE:
            write_safetensors(place, tensors, new.source.metadata or None)
        else:
            write_directory(place, tensors, new)
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


def _counted(stream: TensorStream, progress: Progress) -> TensorStream:
    def chunks() -> Iterator[Any]:
        for chunk in stream.chunks():
            yield chunk
            progress.update(chunk.nbytes)

    return stream._replace(chunks=chunks)


def factor_names(module: str, is_embedding: bool) -> tuple[str, str]:
    """The names of the two factors of a module."""
    ends = ("lora_embedding_A", "lora_embedding_B")
    ends = ends if is_embedding else ("lora_A.weight", "lora_B.weight")
    return f"{PREFIX}{module}.{ends[0]}", f"{PREFIX}{module}.{ends[1]}"


def announced(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, TensorStream]:
    """Tensors of float32 of which only the shapes are known yet."""
    return {
        name: TensorStream(np.dtype(np.float32), shape, tuple) for name, shape in shapes.items()
    }


def would_write(
    output: Path, tensors: Mapping[str, TensorStream], what: str = "an adapter"
) -> None:
    """Says what a dry run would have written."""
    list_tensors(tensors)
    total = readable(sum(map(stream_bytes, tensors.values())))
    say(f"would write {output}: {what} of {len(tensors)} tensors, {total}")


def write_adapter(
    output: Path,
    tensors: Mapping[str, Array],
    config: LoraConfig,
    inputs: Sequence[Path],
    options: Any,
) -> None:
    """Writes an adapter's directory: its config and its tensors."""
    check_output(output, inputs, options.force)
    with new_output(output) as place:
        place.mkdir()
        config.save_pretrained(place)
        write_safetensors(place / WEIGHTS_FILE, tensors, {"format": "pt"})
    total = readable(sum(array.nbytes for array in tensors.values()))
    say(f"wrote {output}: an adapter of {len(tensors)} tensors, {total}")

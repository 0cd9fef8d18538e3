"""Adapters in Hugging Face's layout to disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from peft_jax._config import LoraConfig
from peft_jax.cli._adapter_files import PREFIX, WEIGHTS_FILE
from peft_jax.cli._checkpoints import Array
from peft_jax.cli._output import check_output, new_output, readable, say
from peft_jax.cli._writing import list_tensors, stream_bytes
from peft_jax.io._safetensors import TensorStream, write_safetensors


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

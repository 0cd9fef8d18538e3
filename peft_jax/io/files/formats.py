"""Which format a path has."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from peft_jax._config import CONFIG_FILE

Array = np.ndarray[Any, Any]

ADAPTER_FILE = "adapter_model.safetensors"

_EMBEDDING = re.compile(r"(.*_)?(emb|embed\w*|wte|wpe|shared)")

WEIGHTS_FILE = ADAPTER_FILE

HUGGINGFACE, ORBAX, GGUF = "huggingface", "orbax", "gguf"

PREFIX = "base_model.model."

SUFFIXES = {
    "lora_A.weight": "a",
    "lora_B.weight": "b",
    "lora_embedding_A": "a",
    "lora_embedding_B": "b",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
    "lora_B.bias": "bias",
    "token_adapter.trainable_tokens_delta": "rows",
}


def is_orbax(path: Path) -> bool:
    """Whether orbax wrote the directory."""
    return any((path / file).is_file() for file in ("_METADATA", "_CHECKPOINT_METADATA"))


def is_embedding(module: Sequence[str]) -> bool:
    """Whether torch's module of this path is a table of embeddings, as far as its name tells."""
    return bool(module) and _EMBEDDING.fullmatch(module[-1]) is not None


def adapter_format(path: Path) -> str | None:
    """In which format a path holds an adapter; None where it holds none."""
    if path.is_file():
        return GGUF if path.suffix == ".gguf" else None
    if (path / CONFIG_FILE).is_file() or (path / WEIGHTS_FILE).is_file():
        return HUGGINGFACE
    if is_orbax(path) and (path / "specs").is_dir():
        return ORBAX
    return None


def require_adapter(path: Path) -> str:
    """The format of an adapter.

    Raises:
      ValueError: where the path holds none.
    """
    if not path.exists():
        raise ValueError(f"There is no {str(path)!r}.")
    found = adapter_format(path)
    if found is None:
        raise ValueError(
            f"{str(path)!r} is no adapter: a directory with {CONFIG_FILE} and {WEIGHTS_FILE}, one "
            "of orbax that `peft.save_orbax` wrote with specs, or a GGUF file."
        )
    return found

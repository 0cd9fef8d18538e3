"""Adapters on disk: which format a path has, and the modules of one in Hugging Face's layout.

Nothing here needs a model, or jax: the names of the tensors and the config say it all. In that
layout ``lora_A`` is ``(r, in)`` and ``lora_B`` ``(out, r)``, with the axes of a window behind them
for convolutions, and a module's weight changes by ``scaling * lora_B·lora_A``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from peft_jax._config import LoraConfig, alpha_of, rank_of, scaling_of, tokens_of
from peft_jax.io.files.formats import PREFIX, SUFFIXES, WEIGHTS_FILE, Array
from peft_jax.io.files.safetensors import SafetensorsFile


@dataclasses.dataclass(frozen=True)
class Module:
    """What an adapter adds to one module.

    Attributes:
      name: dotted name of the module.
      arrays: ``a``, ``b``, ``magnitude``, ``bias`` or ``rows``, as they lie in the file.
      is_embedding: whether it changes an embedding, whose weight is ``(rows, features)``.
      alpha: as the config says.
      scaling: factor of ``b·a``.
      tokens: which rows ``rows`` are.
    """

    name: str
    arrays: Mapping[str, Array]
    is_embedding: bool = False
    alpha: float = 1.0
    scaling: float = 1.0
    tokens: tuple[int, ...] = ()

    @property
    def rank(self) -> int:
        """The length that ``a`` and ``b`` share; of rows their number."""
        return len(self.arrays["a"] if "a" in self.arrays else self.arrays["rows"])

    @property
    def factors(self) -> tuple[Array, Array]:
        """``(out, r)`` and ``(r, in)`` in float64, whose product is the change."""
        b = np.asarray(self.arrays["b"], np.float64)
        a = np.asarray(self.arrays["a"], np.float64)
        return b.reshape(len(b), -1) * self.scaling, a.reshape(len(a), -1)


@dataclasses.dataclass(frozen=True)
class HuggingFaceAdapter:
    """An adapter in Hugging Face's layout.

    Attributes:
      config: its ``adapter_config.json``.
      modules: by dotted name; of rows with a word behind it.
      whole: parameters that were trained in place (``modules_to_save``, biases), by dotted name.
    """

    config: LoraConfig
    modules: Mapping[str, Module]
    whole: Mapping[str, Array]


def read_huggingface(directory: Path) -> HuggingFaceAdapter:
    """Reads an adapter in Hugging Face's layout.

    Raises:
      ValueError: where a file is missing or broken, or tensors and config do not fit together.
    """
    config = LoraConfig.from_pretrained(directory)
    found: dict[str, dict[str, Array]] = {}
    embeddings: set[str] = set()
    whole: dict[str, Array] = {}
    with SafetensorsFile(directory / WEIGHTS_FILE) as file:
        for key in file.names:
            name = key.removeprefix(PREFIX).replace(".base_layer.", ".")
            suffix = next((end for end in SUFFIXES if name.endswith(f".{end}")), None)
            if suffix is None:
                if ".lora_" in name:
                    raise ValueError(f"{str(file.path)!r}: nothing is known of {key!r}.")
                whole[name] = file.read(key)
                continue
            module = name.removesuffix(f".{suffix}")
            found.setdefault(module, {})[SUFFIXES[suffix]] = file.read(key)
            if "embedding" in suffix:
                embeddings.add(module)
    if not found and not whole:
        raise ValueError(f"{str(directory)!r} holds no adapter: there are no tensors in it.")
    modules = {
        name if "a" in module.arrays else f"{name} (rows)": module
        for name, arrays in found.items()
        for module in _modules(directory, name, arrays, config, name in embeddings)
    }
    return HuggingFaceAdapter(config, modules, whole)


def _modules(
    directory: Path,
    name: str,
    arrays: Mapping[str, Array],
    config: LoraConfig,
    is_embedding: bool,
) -> Iterator[Module]:
    path = tuple(name.split("."))
    where = f"{str(directory)!r}: {name!r}"
    if "rows" in arrays:
        tokens = tokens_of(config, path, is_table=True)
        if len(tokens) != len(arrays["rows"]):
            raise ValueError(
                f"{where} has {len(arrays['rows'])} rows, but the config's trainable_token_indices "
                f"name {len(tokens)}."
            )
        yield Module(name, {"rows": arrays["rows"]}, True, tokens=tokens)
        arrays = {key: array for key, array in arrays.items() if key != "rows"}
        if not arrays:
            return
    if not {"a", "b"} <= set(arrays):
        raise ValueError(f"{where} has {sorted(arrays)}; an adapter has lora_A and lora_B.")
    a, b, rank = arrays["a"], arrays["b"], rank_of(config, path)
    fits = a.ndim >= 2 and a.ndim == b.ndim and len(a) == b.shape[1] == rank
    if not fits or any(length != 1 for length in b.shape[2:]):
        raise ValueError(
            f"{where} has lora_A {a.shape} and lora_B {b.shape}, but the config's rank there is "
            f"{rank}: they are (r, in, ...) and (out, r, ...)."
        )
    if any(
        len(arrays[key].reshape(-1)) != len(b) for key in ("magnitude", "bias") if key in arrays
    ):
        raise ValueError(f"{where} has a magnitude or bias that is not one number per output.")
    if config.use_dora != ("magnitude" in arrays):
        raise ValueError(
            f"{where} has {sorted(arrays)}, but the config says use_dora={config.use_dora}."
        )
    yield Module(
        name,
        arrays,
        is_embedding,
        alpha=float(alpha_of(config, path)),
        scaling=scaling_of(config, path),
    )


def described(config: Any) -> str:
    """The config's variant, in a word or two."""
    parts = ["DoRA" if config.use_dora else "LoRA"]
    parts += ["rsLoRA"] if config.use_rslora else []
    return ", ".join(parts)

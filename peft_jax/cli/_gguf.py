"""Adapters in GGUF files: the specs that a file implies, and the names that llama.cpp wants."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from peft_jax._specs import LoraSpec
from peft_jax.io import load_gguf_adapter
from peft_jax.io._adapter_names import Renames
from peft_jax.io._gguf_header import opened
from peft_jax.io._gguf_names import A, B, is_table

_ALPHA = "adapter.lora.alpha"


def load_gguf(
    path: Path, permute_heads: Mapping[str, int] | None
) -> tuple[Any, dict[str, LoraSpec]]:
    """Loads the adapters of a GGUF file under its own names: ``blk/0/attn_q``.

    Raises:
      ValueError: where the file is none of adapters, or a pair of tensors is not whole.
    """
    names: dict[str, str] = {}
    specs: dict[str, LoraSpec] = {}
    with opened(path) as file:
        alpha = file.fields.get(_ALPHA) or 0.0
        for tensor in file.tensors:
            if not tensor.endswith(A):
                continue
            name = tensor.removesuffix(A)
            if name + B not in file.tensors:
                raise ValueError(f"{str(path)!r} has {tensor!r} without {name + B!r}.")
            module = name.removesuffix(".weight").replace(".", "/")
            spec = _spec(name, file.tensors[tensor].shape, file.tensors[name + B].shape, alpha)
            specs[f"{module}/lora"] = spec
            names[f"{module}/{spec.param}"] = name
    if not specs:
        raise ValueError(f"{str(path)!r} holds no adapters: no tensor is named '...{A}'.")
    return load_gguf_adapter(path, specs=specs, names=names, permute_heads=permute_heads)


def _spec(name: str, a: tuple[int, ...], b: tuple[int, ...], alpha: Any) -> LoraSpec:
    """The spec of a pair: a matrix, a table of rows, or a matrix for each expert."""
    table = is_table(name)
    if not 2 <= len(a) == len(b) <= 3 or (table and len(a) != 2):
        raise ValueError(f"{name!r} has adapters of shapes {a} and {b}, which are no matrices.")
    rank, inputs = (a[-1], a[-2]) if table else (a[-2], a[-1])
    scaling = float(alpha) / rank if alpha else 1.0
    shape = (*a[:-2], inputs, b[-2])
    equation = "ir,ro->io" if len(a) == 2 else "xir,xro->xio"
    kind = "embed" if table else "dense" if len(a) == 2 else "experts"
    param = "embedding" if table else "kernel"
    return LoraSpec(param, equation, rank, scaling, kind=kind, shape=shape)


def tensor_names(
    renames: Mapping[str, str] | None, architecture: str | None
) -> tuple[Callable[[str], str], Renames]:
    """From the path of a parameter to the name of its tensor; and the table that this goes by.

    Paths are renamed first. With an architecture, what results is looked up in the package's table
    of the names that models have at Hugging Face; names that are llama.cpp's own stay.
    """
    table = Renames(renames)
    gguf_name = (lambda name: name) if architecture is None else _of_architecture(architecture)

    def name_of(path: str) -> str:
        name = table.forward(tuple(path.split("/")))
        parts = name.at([0] * name.places)
        module = ".".join(parts if name.takes_last else parts[:-1]).removesuffix(".weight")
        tensor = f"{gguf_name(module)}.weight"
        return tensor.replace(".0.", ".{}.", 1) if name.places else tensor

    return name_of, table


def _of_architecture(architecture: str) -> Callable[[str], str]:
    try:
        import gguf
    except ImportError as error:
        raise ValueError(
            "--to gguf needs the package `gguf`. Install it by `pip install 'peft_jax[gguf]'`."
        ) from error
    known = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}
    if architecture not in known:
        raise ValueError(f"--architecture {architecture!r} is none of {', '.join(sorted(known))}.")

    def name_of(module: str) -> str:
        blocks = max((int(number) for number in re.findall(r"(?<![\w])\d+", module)), default=0)
        names = gguf.get_tensor_name_map(known[architecture], blocks + 1)
        found = names.get_name(module)
        if found is None:
            raise ValueError(
                f"{module!r} is no module that llama.cpp knows of {architecture!r}. Give its name "
                "at Hugging Face, or that of its tensor (blk.0.attn_q), by --renames."
            )
        return str(found)

    return name_of

"""Adapters of every format, as trees with specs, and as modules to be looked at."""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from peft_jax._config import LoraConfig
from peft_jax._spec import LoraSpec
from peft_jax._trees import adapter_paths, at, outside_adapters
from peft_jax.io.files.formats import GGUF, HUGGINGFACE, WEIGHTS_FILE, Array, require_adapter
from peft_jax.io.files.safetensors import SafetensorsFile
from peft_jax.io.gguf.load_adapter import load_gguf_adapter
from peft_jax.io.gguf.names import A, B, is_table
from peft_jax.io.gguf.read import opened
from peft_jax.io.huggingface.infer_config import inferred_specs
from peft_jax.io.huggingface.keys import read_keys
from peft_jax.io.huggingface.load import load_adapter
from peft_jax.io.huggingface.metadata import Metadata
from peft_jax.io.huggingface.module_names import Renames
from peft_jax.io.huggingface.pairs import HuggingFaceAdapter, Module, read_huggingface
from peft_jax.io.orbax.checkpoint import restore_orbax

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


class Loaded(NamedTuple):
    """An adapter as the library has it.

    Attributes:
      lora: the tree.
      specs: by slashed paths.
      config: in the names of the tree.
      renames: from the names of the tree to those of the files, where they are known.
    """

    lora: Any
    specs: dict[str, LoraSpec]
    config: LoraConfig
    renames: dict[str, str]


def load(path: Path, permute_heads: Mapping[str, int] | None = None) -> Loaded:
    """Loads an adapter of any format.

    Args:
      path: of the adapter.
      permute_heads: as for `peft_jax.io.load_gguf_adapter`.

    Raises:
      ValueError: where the path holds none, or one that is broken.
    """
    found = require_adapter(path)
    if permute_heads and found != GGUF:
        raise ValueError(f"Rows are reordered in GGUF files, and {str(path)!r} is none.")
    if found == HUGGINGFACE:
        return _load_huggingface(path)
    if found == GGUF:
        from peft_jax.io.any_adapter import load_gguf

        lora, specs = load_gguf(path, permute_heads)
        return Loaded(lora, specs, config_for(specs), {})
    lora, saved, config = restore_orbax(path)
    if saved is None:
        raise ValueError(f"{str(path)!r} holds no specs, which say the scaling of adapters.")
    return Loaded(lora, saved, config_for(saved) if config is None else config, {})


def _load_huggingface(path: Path) -> Loaded:
    with SafetensorsFile(path / WEIGHTS_FILE) as file:
        own = Metadata.from_texts(file.metadata)
        shapes = {name: file.shape(name) for name in file.names}
    if own is None:
        config = LoraConfig.from_pretrained(path)
        specs = inferred_specs(read_keys(tuple(shapes)), shapes, config, Renames(None))
        renames: dict[str, str] = {}
    else:
        specs, renames = dict(own.specs), dict(own.renames)
    lora, config = load_adapter(path)
    return Loaded(lora, specs, config, renames)


def has_specs(directory: Path) -> bool:
    """Whether specs lie in the file of an adapter in Hugging Face's layout."""
    with SafetensorsFile(directory / WEIGHTS_FILE) as file:
        return Metadata.from_texts(file.metadata) is not None


def config_for(specs: Mapping[str, LoraSpec]) -> LoraConfig:
    """A config that says what these specs do.

    Raises:
      ValueError: where no config can say it.
    """
    named = {_name(path, spec): spec for path, spec in specs.items() if spec.variant != "tokens"}
    ranks = {name: spec.rank for name, spec in named.items()}
    alphas = {name: _whole(spec.scaling * spec.rank) for name, spec in named.items()}
    variants = {(spec.variant == "dora", spec.bias is not None) for spec in named.values()}
    if len(variants) > 1:
        raise ValueError("Some adapters have DoRA or a bias and others none: no config says so.")
    (use_dora, lora_bias), *_ = [*variants, (False, False)]
    r = collections.Counter(ranks.values()).most_common(1)[0][0]
    alpha = collections.Counter(alphas.values()).most_common(1)[0][0]
    by_parameter = {name for name, spec in named.items() if spec.kind == "experts"}
    tokens = {
        path.rpartition("/")[0].replace("/", "."): list(spec.tokens)
        for path, spec in specs.items()
        if spec.variant == "tokens"
    }
    return LoraConfig(
        r=r,
        lora_alpha=alpha,
        target_modules=sorted(set(named) - by_parameter),
        target_parameters=sorted(by_parameter) or None,
        rank_pattern={_exactly(name): rank for name, rank in ranks.items() if rank != r},
        alpha_pattern={_exactly(name): a for name, a in alphas.items() if a != alpha},
        use_dora=use_dora,
        lora_bias=lora_bias,
        trainable_token_indices=tokens or None,
        inference_mode=True,
    )


def _name(path: str, spec: LoraSpec) -> str:
    module = path.rpartition("/")[0].replace("/", ".")
    return f"{module}.{spec.param}" if spec.kind == "experts" else module


def _whole(alpha: float) -> float:
    near = round(alpha)
    return near if math.isclose(alpha, near, rel_tol=1e-12) else alpha


def _exactly(name: str) -> str:
    return f"^{re.escape(name)}"


# --- To be looked at -----------------------------------------------------------------------------


def read_adapter(path: Path) -> HuggingFaceAdapter:
    """An adapter of any format as modules, each with the matrices ``a`` and ``b``.

    Raises:
      ValueError: where the path holds none, or one that is broken.
    """
    if require_adapter(path) == HUGGINGFACE:
        return read_huggingface(path)
    loaded = load(path)
    modules: dict[str, Module] = {}
    for place in adapter_paths(loaded.lora):
        arrays = {name: np.asarray(array) for name, array in at(loaded.lora, place).items()}
        for module in _modules(place, arrays, loaded.specs[place]):
            is_rows = "rows" in module.arrays
            modules[f"{module.name} (rows)" if is_rows else module.name] = module
    whole = {
        name.replace("/", "."): np.asarray(value) for name, value in outside_adapters(loaded.lora)
    }
    return HuggingFaceAdapter(loaded.config, modules, whole)


def _modules(path: str, arrays: Mapping[str, Array], spec: LoraSpec) -> Iterator[Module]:
    """A module for each matrix of an adapter: of a stack's layers, of a batch axis' indices."""
    name = path.rpartition("/")[0].replace("/", ".") or path
    if spec.variant == "tokens":
        yield Module(name, {"rows": arrays["rows"]}, True, tokens=spec.tokens)
        return
    letters_a, letters_b, kernel = spec.letters
    (rank,) = (set(letters_a) & set(letters_b)) - set(kernel)
    batch = [c for c in kernel if c in letters_a and c in letters_b]
    inputs = [c for c in kernel if c in letters_a and c not in batch]
    outputs = [c for c in kernel if c not in letters_a]
    a = _matrices(arrays["a"], letters_a, spec, (batch, [rank], inputs))
    b = _matrices(arrays["b"], letters_b, spec, (batch, outputs, [rank]))
    alone = {key: value for key, value in arrays.items() if key not in "ab"}
    for place, (right, left) in enumerate(zip(a, b, strict=True)):
        own = {"a": right, "b": left, **(alone if place == 0 else {})}
        yield Module(
            name if len(a) == 1 else f"{name}[{place}]",
            own,
            spec.kind == "embed",
            spec.scaling * spec.rank if spec.alpha is None else spec.alpha,
            spec.scaling,
        )


def _matrices(
    array: Array, letters: str, spec: LoraSpec, groups: tuple[list[str], list[str], list[str]]
) -> Array:
    """Matrices with the axes of the second and third group, one for each index of all others."""
    depth = array.ndim - len(letters)
    axes = spec.stack_axes or (0,) * depth
    for front, axis in enumerate(reversed(axes)):
        array = np.moveaxis(array, front + axis % (array.ndim - front), front)
    order = [depth + letters.index(c) for group in groups for c in group]
    array = array.transpose((*range(depth), *order))
    sizes = [math.prod(array.shape[:depth]) if depth else 1]
    lengths = iter(array.shape[depth:])
    sizes += [math.prod(next(lengths) for _ in group) for group in groups]
    return array.reshape(sizes[0] * sizes[1], *sizes[2:])


def with_base(config: LoraConfig, other: LoraConfig) -> LoraConfig:
    """The config with the other's notes on its base model."""
    fields = ("base_model_name_or_path", "task_type", "revision", "auto_mapping")
    return dataclasses.replace(config, **{name: getattr(other, name) for name in fields})

"""Adapters read from GGUF files."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from peft_jax._numerics import HostArray, PairLayout, permuted
from peft_jax._spec import LoraSpec
from peft_jax._trees import Path, nested
from peft_jax.io.gguf.adapter_rules import (
    ADAPTER_TYPE,
    ALORA,
    ALPHA,
    ARCHITECTURE,
    TYPE,
    cast_finite,
    check_plain,
    dtype_of,
    product,
)
from peft_jax.io.gguf.names import A, B, Names, Place, all_places, heads_of, is_table, name_of
from peft_jax.io.gguf.read import GGUFFile, opened

Specs = Mapping[str, LoraSpec]


def load_gguf_adapter(
    path: str | os.PathLike[str],
    *,
    specs: Specs,
    names: Names,
    dtype: Any = None,
    architecture: str | None = None,
    permute_heads: Mapping[str, int] | None = None,
) -> tuple[dict[str, Any], dict[str, LoraSpec]]:
    """Reads a GGUF file of adapters: one of `export_gguf_adapter`, or of llama.cpp's converter.

    The arrays are those for the model that the specs are of: where the file's ``alpha / r`` is
    another than a spec's scaling, their quotient is multiplied into ``b``, so that
    ``scaling * a·b`` is what llama.cpp adds. (As there, an alpha of 0 or none means a factor of 1.)
    The package ``gguf`` is not needed.

    Args:
      path: of the file; tensors are F32, F16, BF16 or Q8_0.
      specs: from `lora_specs` of the model that is to have the adapters: all of them are read.
      names: as in `export_gguf_adapter`.
      dtype: a floating dtype of the arrays. None: that of each tensor, float32 for Q8_0.
      architecture: what the file's ``general.architecture`` must be. None: anything.
      permute_heads: as in `export_gguf_adapter`; here rows are put back.

    Returns:
      ``(lora, specs)``: a tree for `merge_params`, and the specs as given.

    Raises:
      ValueError: where the file is damaged, no LoRA adapter or of another architecture; where it
        lacks tensors, holds others, or has them in other shapes; or where the specs speak of what
        such files have no place for.
    """
    layouts = _layouts_of(specs)
    kind = None if dtype is None else dtype_of(dtype, "load_gguf_adapter", known=None)
    with opened(path) as file:
        alpha = _file_alpha(file, architecture)
        for adapter, spec in specs.items():
            if layouts[adapter] is None:
                layouts[adapter] = _layout_in_file(adapter, spec, names, file)
        known = {adapter: layout for adapter, layout in layouts.items() if layout is not None}
        places = all_places(known, specs, names, caller="load_gguf_adapter")
        heads = heads_of(places, permute_heads, "load_gguf_adapter")
        _check_tensors(file, places, known)
        flat: dict[Path, Any] = {}
        for adapter, layout in known.items():
            a, b, own = _read(file, adapter, places[adapter], layout, heads, alpha)
            for name, array in (("a", a), ("b", b)):
                cast = cast_finite(f"'{adapter}/{name}' of {file.path!r}", array, kind or own)
                flat[(*adapter.split("/"), name)] = jnp.asarray(cast)
    return nested(flat), dict(specs)


def _layouts_of(specs: Specs) -> dict[str, PairLayout | None]:
    """The layout of each adapter; None where a spec does not know its parameter's shape."""
    is_mapping = isinstance(specs, Mapping) and len(specs) > 0
    if not is_mapping or not all(isinstance(spec, LoraSpec) for spec in specs.values()):
        raise ValueError(
            "load_gguf_adapter: specs map the slashed path of each adapter to its LoraSpec, got "
            f"{specs!r:.200}. `peft.lora_specs(model, *inputs)` makes them."
        )
    layouts: dict[str, PairLayout | None] = {}
    for path, spec in specs.items():
        check_plain(path, spec)
        try:
            layouts[path] = None if spec.shape is None else PairLayout.of_shape(spec, spec.shape)
        except ValueError as error:
            raise ValueError(f"load_gguf_adapter: the spec of '{path}': {error}") from error
    return layouts


def _layout_in_file(path: str, spec: LoraSpec, names: Names, file: GGUFFile) -> PairLayout:
    """The layout of one matrix, of the shape that it has in the file."""
    name = name_of(path, spec, names, "load_gguf_adapter")
    letters_a, letters_b, kernel = spec.letters
    plain = len(letters_a) == len(letters_b) == len(kernel) == 2 and not spec.stack_axes
    pair = [file.tensors.get(f"{name}{suffix}") for suffix in (A, B)]
    if not plain or spec.equation.startswith("...") or not all(pair):
        raise ValueError(
            f"load_gguf_adapter: the spec of '{path}' does not say the shape of its parameter, and "
            f"{file.path!r} has no pair named {name!r} that would. Take specs from "
            "`peft.lora_specs(model, *inputs)`."
        )
    a, b = (tensor.shape for tensor in pair if tensor is not None)
    inputs = a[0] if is_table(str(name)) else a[-1]
    shape = [inputs if letter in letters_a else b[0] for letter in kernel]
    return PairLayout.of_shape(spec, shape)


def _file_alpha(file: GGUFFile, architecture: str | None) -> float:
    """The file's alpha, once its metadata are those of a LoRA adapter."""
    wanted = {TYPE: "adapter", ADAPTER_TYPE: "lora"}
    wanted |= {} if architecture is None else {ARCHITECTURE: architecture}
    for key, value in wanted.items():
        if file.fields.get(key) != value:
            raise ValueError(
                f"load_gguf_adapter: {file.path!r} has {key} = {file.fields.get(key)!r}, which "
                f"should be {value!r}. Give a LoRA adapter for this model."
            )
    if ALORA in file.fields:
        raise ValueError(
            f"load_gguf_adapter: {file.path!r} is an activated LoRA ({ALORA}), which acts from "
            "certain tokens on. There is no such adapter here."
        )
    alpha = file.fields.get(ALPHA, 0.0)
    if not isinstance(alpha, float) or not math.isfinite(alpha):
        raise ValueError(
            f"load_gguf_adapter: {file.path!r} has {ALPHA} = {alpha!r}, which is no finite float."
        )
    return alpha


def _check_tensors(
    file: GGUFFile, places: Mapping[str, list[Place]], layouts: Mapping[str, PairLayout]
) -> None:
    wanted = {
        place.name + suffix: (path, shape)
        for path, found in places.items()
        for place in found
        for suffix, shape in zip((A, B), place.shapes(layouts[path]), strict=True)
    }
    missing = sorted(set(wanted) - set(file.tensors))
    surplus = sorted(set(file.tensors) - set(wanted))
    if missing or surplus:
        raise ValueError(
            f"load_gguf_adapter: {file.path!r} and the specs are of different adapters. Tensors "
            f"that the file lacks: {missing[:5]}; that no spec speaks of: {surplus[:5]}. Give the "
            "specs and the names of the model that the file is for."
        )
    for name, (path, shape) in wanted.items():
        if file.tensors[name].shape != shape:
            raise ValueError(
                f"load_gguf_adapter: {name!r} has the shape {file.tensors[name].shape} in "
                f"{file.path!r}, and '{path}' (rank {layouts[path].rank}) needs {shape}. Give the "
                "specs of the model that the file is for, with adapters of its ranks."
            )


def _read(
    file: GGUFFile,
    path: str,
    places: list[Place],
    layout: PairLayout,
    heads: Mapping[str, int],
    alpha: float,
) -> tuple[HostArray, HostArray, Any]:
    """``a``, ``b`` in float64 where it was scaled, and the dtype that both have in the file."""
    pairs = []
    for place in places:
        a, b = file.read(place.name + A), file.read(place.name + B)
        pairs.append(place.in_file(a, permuted(b, heads.get(place.name), place.name, back=True)))
    dtypes = {array.dtype for pair in pairs for array in pair}
    dtype = dtypes.pop() if len(dtypes) == 1 else np.dtype(np.float32)
    left, right = (
        np.stack([array.astype(dtype) for array in side]) for side in zip(*pairs, strict=True)
    )
    ratio = (alpha or float(layout.rank)) / float(product(path, layout))
    right = right if ratio == 1 else right.astype(np.float64) * ratio
    batch, inputs, outputs = layout.lengths
    try:
        a, b = layout.arrays(
            left.reshape(*layout.stack, batch, inputs, layout.rank),
            right.reshape(*layout.stack, batch, layout.rank, outputs),
        )
    except ValueError as error:
        raise ValueError(
            f"load_gguf_adapter: the adapter at '{path}' cannot hold {places[0].name!r} of "
            f"{file.path!r}: {error}."
        ) from error
    return a, b, dtype

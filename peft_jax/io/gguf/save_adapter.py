"""Adapters written to GGUF files, as llama.cpp reads them."""

from __future__ import annotations

import collections
import functools
import math
import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax.core import meta

from peft_jax._numerics import HostArray, PairLayout, permuted
from peft_jax._spec import LoraSpec
from peft_jax._trees import (
    Layer,
    Path,
    check_specs,
    leaves,
    map_layers,
    slashed,
    some,
    split_params,
)
from peft_jax.io.gguf.adapter_rules import (
    ADAPTER_TYPE,
    ALPHA,
    DTYPES,
    REMEDY,
    TYPE,
    cast_finite,
    check_plain,
    dtype_of,
    product,
)
from peft_jax.io.gguf.names import A, B, Names, all_places, heads_of
from peft_jax.io.gguf.write import FileTensor, write_gguf

Specs = Mapping[str, LoraSpec]


def export_gguf_adapter(
    lora: Any,
    path: str | os.PathLike[str],
    *,
    specs: Specs,
    names: Names,
    architecture: str,
    alpha: float | None = None,
    dtype: Any = np.float32,
    permute_heads: Mapping[str, int] | None = None,
) -> dict[str, list[str]]:
    """Writes adapters to a GGUF file that llama.cpp loads. Inverse: `load_gguf_adapter`.

    For each adapted tensor of the base model the file holds ``<name>.lora_a`` and ``<name>.lora_b``
    of numpy's shapes ``(r, in)`` and ``(out, r)``, by which llama.cpp computes
    ``y = W·x + alpha / r * lora_b·(lora_a·x)``. That of ``token_embd.weight`` is ``(rows, r)`` and
    ``(features, r)``. Of experts in one tensor (``blk.0.ffn_up_exps.weight``) both have the experts
    in front. Several input or output axes, such as heads, are joined in the order of the kernel,
    as `export_gguf` does.

    The file has one alpha, and llama.cpp divides it by each tensor's own rank. What a layer's
    scaling is beyond that (patterns of rank and alpha, rsLoRA) is multiplied into its ``b``, in
    float64 and rounded once to ``dtype``.

    llama.cpp's converter reorders the rows of ``attn_q`` and ``attn_k`` of Llama-like models, for
    its rotary embedding. The names, and whether rows were reordered, are facts about the file of
    the base model: give ``permute_heads`` where it was converted so. A base whose output layer is
    tied to ``token_embd.weight`` looks up the same pair there, where it does not fit: fuse such an
    adapter.

    Args:
      lora: the adapters, from `split_params`.
      path: of the file; it appears whole or not at all.
      specs: from `lora_specs`.
      names: from the slashed path of each adapted parameter (``layers_0/attn/q/kernel``), or of its
        module, to the name of its tensor (``blk.0.attn_q.weight``); or a function of the former.
        For layers stacked by ``nn.scan`` a name with ``{}`` in the place of the layer's index
        (counted through stacks in stacks), or a list of names, one for each layer. A mapping may
        name other parameters too, as that of the whole base does.
      architecture: ``general.architecture`` of the base's file, such as ``llama``.
      alpha: the file's ``adapter.lora.alpha``. None: that which leaves most adapters as they are.
      dtype: of the tensors: float32, float16 or bfloat16.
      permute_heads: from patterns of tensor names (``blk.*.attn_q.weight``, as in `fnmatch`) to
        numbers of heads (for ``attn_k`` that of the keys' heads): rows of their ``lora_b`` are
        reordered as llama.cpp's converter does.

    Returns:
      From each adapter's slashed path to the names of the base's tensors that it adapts.

    Raises:
      ValueError: on what llama.cpp has no place for (DoRA, biases, rows of tokens, parameters
        trained in place, convolutions, tables other than ``token_embd.weight``); where adapters,
        specs and names do not fit, numbers are not finite in ``dtype``, or the package ``gguf`` is
        missing. No file is left then.
    """
    adapters = _adapters(lora, specs)
    if not isinstance(architecture, str) or not architecture:
        raise ValueError(
            f"export_gguf_adapter: architecture = {architecture!r}; it is that of the base's "
            "GGUF file, such as 'llama'."
        )
    kind = dtype_of(dtype, "export_gguf_adapter")
    made = {key: _pairs_of(key, specs[key], arrays) for key, arrays in adapters.items()}
    places = all_places(
        {key: layout for key, (layout, _, _) in made.items()},
        specs,
        names,
        caller="export_gguf_adapter",
    )
    heads = heads_of(places, permute_heads, "export_gguf_adapter")
    products = {key: product(key, layout) for key, (layout, _, _) in made.items()}
    common = _common_alpha(products, alpha)
    tensors: list[FileTensor] = []
    for key, (_, left, right) in made.items():
        ratio = float(products[key]) / float(common)
        right = right if ratio == 1 else right.astype(np.float64) * ratio
        for place in places[key]:
            a, b = place.in_file(place.of(left), place.of(right))
            b = permuted(b, heads.get(place.name), place.name)
            tensors += [
                _tensor(key, place.name + A, a, kind),
                _tensor(key, place.name + B, b, kind),
            ]
    write_gguf(
        path,
        architecture,
        tensors,
        caller="export_gguf_adapter",
        fields={TYPE: "adapter", ADAPTER_TYPE: "lora", ALPHA: float(common)},
    )
    return {key: [place.name for place in found] for key, found in places.items()}


def _adapters(lora: Any, specs: Specs) -> dict[str, dict[str, HostArray]]:
    """The arrays of each adapter, on the host."""
    if specs is None:
        raise ValueError(
            "export_gguf_adapter: specs=None; arrays alone do not tell scalings. Pass "
            "specs=peft.lora_specs(model, *inputs)."
        )
    check_specs(lora, specs, "export_gguf_adapter")
    in_place = [path for path, _ in leaves(split_params(lora).original)]
    if in_place:
        raise ValueError(
            f"Beside adapters the tree holds parameters that were trained in place: "
            f"{some(in_place)}; llama.cpp knows no such. {REMEDY}"
        )
    found: dict[str, dict[str, HostArray]] = {}

    def note(path: Path, rest: Layer, adapters: Layer) -> Layer:
        for name, adapter in adapters.items():
            place = slashed((*path, name))
            check_plain(place, specs[place])
            if set(adapter) != {"a", "b"}:
                raise ValueError(
                    f"The adapter at '{place}' holds {sorted(adapter)}, but its spec is of 'a' and "
                    "'b' alone. Give the specs of this model (`peft.lora_specs`)."
                )
            found[place] = {
                key: np.asarray(jax.device_get(meta.unbox(leaf))) for key, leaf in adapter.items()
            }
        return rest

    map_layers(lora, note)
    if not found:
        raise ValueError(
            "export_gguf_adapter: the tree holds no adapters. Give those that "
            "`peft.split_params(params)` returns second."
        )
    return found


def _pairs_of(path: str, spec: LoraSpec, arrays: Mapping[str, HostArray]) -> Any:
    a, b = arrays["a"], arrays["b"]
    try:
        layout = PairLayout.of_arrays(spec, a, b)
        if layout.rank != spec.rank and spec.alpha is not None:
            raise ValueError(f"the spec's rank is {spec.rank}, by which its scaling was made")
    except ValueError as error:
        raise ValueError(
            f"The adapter at '{path}' (a {a.shape}, b {b.shape}) does not fit its equation "
            f"'{spec.equation}' (stack axes {spec.stack_axes}): {error}. Give the specs of this "
            "model (`peft.lora_specs`)."
        ) from error
    return layout, *layout.pairs(a, b)


def _common_alpha(products: Mapping[str, np.float32], alpha: float | None) -> np.float32:
    if alpha is None:
        return collections.Counter(products.values()).most_common(1)[0][0]
    is_number = isinstance(alpha, int | float | np.number) and not isinstance(alpha, bool)
    with np.errstate(over="ignore"):
        value = np.float32(alpha if is_number else math.nan)
    if not np.isfinite(value) or not value:
        raise ValueError(
            f"export_gguf_adapter: alpha = {alpha!r} is not a number other than 0 in float32; "
            "leave it out to have one chosen."
        )
    return value


def _tensor(path: str, name: str, array: HostArray, dtype: np.dtype[Any]) -> FileTensor:
    array = np.ascontiguousarray(cast_finite(f"'{path}'", array, dtype))
    kind = DTYPES[dtype.name]
    if kind:
        array = array.view(np.uint8)
    return FileTensor(name, array.shape, array.dtype, kind, functools.partial(np.asarray, array))

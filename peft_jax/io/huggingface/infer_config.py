"""What the names and shapes in a file of adapters say of a model that is not known otherwise."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from peft_jax._config import LoraConfig, matches, rank_of, scaling_of, selects, tokens_of
from peft_jax._spec import (
    DENSE,
    EMBED,
    LayerSpec,
    LoraSpec,
    conv_equation,
    experts_equation,
    parse_equation,
    stacked,
)
from peft_jax._trees import LORA, TOKENS
from peft_jax.io.huggingface.keys import Key
from peft_jax.io.huggingface.layout import WEIGHTS, Stack
from peft_jax.io.huggingface.module_names import Path, Renames

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class _Group:
    """What lies at one module, or at one stack of them.

    Attributes:
      module: our path.
      name: theirs, of the first layer.
      lengths: of the stack.
      shapes: of the tensors by how their keys end.
    """

    module: Path
    name: Path
    lengths: Shape
    shapes: Mapping[str, Shape]


def inferred_specs(
    keys: Mapping[str, Key], shapes: Mapping[str, Shape], config: LoraConfig, renames: Renames
) -> dict[str, LoraSpec]:
    """Specs of adapters of which only their tensors are known.

    A layer with ``lora_A`` of two axes is a Dense, of more a Conv; one with ``lora_embedding_A`` is
    an Embed; parameters are matrices, with one for each expert where the rank says so.

    Raises:
      ValueError: where the tensors leave a doubt.
    """
    found: dict[str, LoraSpec] = {}
    for group in _groups({n: k for n, k in keys.items() if k.of_adapter}, shapes, renames):
        path = "/".join(group.module)
        if "token_adapter.trainable_tokens_delta" in group.shapes:
            rows = group.shapes["token_adapter.trainable_tokens_delta"]
            tokens = tokens_of(config, group.name, is_table=True)
            if not tokens:
                raise ValueError(
                    f"there are rows of {'.'.join(group.name)!r}, and the config's "
                    "trainable_token_indices does not say which they are"
                )
            width = rows[-1] if rows else 0
            found[f"{path}/{TOKENS}"] = LoraSpec(
                "embedding",
                parse_equation(EMBED).low_rank().delta,
                len(tokens),
                variant="tokens",
                tokens=tokens,
                kind="embed",
                shape=(max(tokens) + 1, width),
            )
        if len(group.shapes) > ("token_adapter.trainable_tokens_delta" in group.shapes):
            found[f"{path}/{LORA}"] = _low_rank(group, config)
    return found


def _low_rank(group: _Group, config: LoraConfig) -> LoraSpec:
    is_table = "lora_embedding_A" in group.shapes
    ends = (
        ("lora_embedding_A", "lora_embedding_B") if is_table else ("lora_A.weight", "lora_B.weight")
    )
    missing = [end for end in ends if end not in group.shapes]
    if missing:
        raise ValueError(f"{'.'.join(group.name)!r} has no {missing[0]}")
    a, b = (group.shapes[end] for end in ends)
    if len(a) < 2 or len(b) != len(a) or min(*a, *b) < 1:
        raise ValueError(f"{'.'.join(group.name)!r} has {ends[0]} of shape {a}, {ends[1]} of {b}")
    param = None if is_table else _parameter(group, config)
    rank, named = a[0], group.name
    if is_table:
        kind, equation, name = "embed", EMBED, "embedding"
        shape: Shape = (a[1], b[0])
    elif param is not None:
        named = (*group.name, param)
        rank, name, kind = rank_of(config, named), param, "experts"
        experts = a[0] // rank
        equation = experts_equation(2 if experts == 1 else 3)
        shape = (b[0], a[1]) if experts == 1 else (experts, a[1], b[0])
    elif len(a) == 2:
        kind, equation, name, shape = "dense", DENSE, "kernel", (a[1], b[0])
    else:
        if b[1] != a[0]:
            raise ValueError(
                f"{'.'.join(group.name)!r} is a convolution with groups, or its rank is {a[0]} in "
                f"lora_A and {b[1]} in lora_B. With groups, ranks are not shared out so here"
            )
        kind, equation, name = "conv", conv_equation(len(a) - 2), "kernel"
        shape = (*a[2:], a[1], b[0])
    delta = parse_equation(equation).low_rank(batch_in_b=kind == "experts").delta
    return LoraSpec(
        name,
        stacked(delta) if group.lengths else delta,
        rank,
        scaling_of(config, named),
        variant="dora" if "lora_magnitude_vector" in group.shapes else "lora",
        stack_axes=(0,) * len(group.lengths),
        bias="bias" if "lora_B.bias" in group.shapes else None,
        kind=kind,
        shape=group.lengths + shape,
    )


def _parameter(group: _Group, config: LoraConfig) -> str | None:
    """The one parameter of a module that ``target_parameters`` means."""
    by_module = config.target_modules is not None and selects(config, group.name)
    if by_module or not config.target_parameters:
        return None
    dotted = ".".join(group.name)
    split = [entry.replace("/", ".").rpartition(".") for entry in config.target_parameters]
    params = {param for above, _, param in split if not above or matches((above,), dotted)}
    if len(params) != 1:
        raise ValueError(
            f"{dotted!r} may have adapters of {sorted(params)}. Give the specs of the model "
            "(`specs=peft.lora_specs(...)`), by which they are known"
        )
    (param,) = params
    return None if param == "weight" else param


def inferred_whole(
    keys: Mapping[str, Key],
    shapes: Mapping[str, Shape],
    specs: Mapping[str, Any],
    renames: Renames,
    base: Mapping[str, Shape],
) -> dict[str, Shape]:
    """Paths and shapes of the parameters that are trained whole.

    A ``weight`` is the parameter that an adapter or a `LayerSpec` of the same module speaks of, or
    the one that the base has; else a ``kernel``, or with one axis a ``scale``, unless a rename ends
    in another name.

    Raises:
      ValueError: where a shape leaves a doubt.
    """
    found: dict[str, Shape] = {}
    whole = {
        name: dataclasses.replace(key, module=(*key.module, key.end))
        for name, key in keys.items()
        if not key.of_adapter
    }
    known: dict[Path, list[tuple[str, Any]]] = {}
    for path, spec in specs.items():
        module = tuple(path.split("/"))[:-1]
        leaf = path.rpartition("/")[2] if isinstance(spec, LayerSpec) else spec.param
        known.setdefault(module, []).append((leaf, spec))
    for group in _groups(whole, shapes, renames):
        shape = next(iter(group.shapes.values()))
        module, leaf = group.module[:-1], group.module[-1]
        beside = known.get(module, [])
        if not renames.backward(group.name)[2] and leaf == "weight":
            here = [name for name in WEIGHTS if "/".join((*module, name)) in base]
            plain = "kernel" if len(shape) > 1 else "scale"
            leaf = next(iter([*here, *(name for name, _ in beside), plain]))
        spec = next((spec for name, spec in beside if name == leaf), None)
        path = "/".join((*module, leaf))
        if path in base:
            found[path] = base[path]
        else:
            found[path] = _our_shape(leaf, shape, group.lengths, spec)
    return found


def _our_shape(leaf: str, shape: Shape, lengths: Shape, spec: Any) -> Shape:
    if isinstance(spec, LoraSpec) and spec.variant != "tokens" and spec.shape is not None:
        return spec.shape
    if not isinstance(spec, LayerSpec):
        return lengths + (shape[::-1] if leaf == "kernel" and len(shape) == 2 else shape)
    layer = parse_equation(spec.equation)
    if spec.kind == "conv":
        own = (*shape[2:], shape[1], shape[0])
    elif spec.kind == "embed":
        own = shape
    elif len(layer.contracted) == len(layer.kept) == 1 and len(shape) == 2:
        sizes = {layer.kept: shape[0], layer.contracted: shape[1]}
        own = tuple(sizes[c] for c in layer.kernel)
    else:
        raise ValueError(
            f"a whole {leaf!r} of the equation {spec.equation!r} has axes joined there, whose "
            "lengths are not known. Give the base's parameters (`base=`)"
        )
    axes = spec.stack_axes or (0,) * len(lengths)
    return Stack(lengths, axes).back(np.broadcast_to(np.empty(()), lengths + own)).shape


def _groups(keys: Mapping[str, Key], shapes: Mapping[str, Shape], renames: Renames) -> list[_Group]:
    """Tensors by our path of their module, the layers of a stack together."""
    found: dict[Path, dict[Shape, tuple[Path, dict[str, Shape]]]] = {}
    for name, key in keys.items():
        path, indices, _ = renames.backward(key.module)
        layers = found.setdefault(path, {})
        ends = layers.setdefault(indices, (key.module, {}))[1]
        if key.end in ends:
            raise ValueError(
                f"{'.'.join(key.module)!r} has several adapters, of several parameters. Give the "
                "specs of the model (`specs=peft.lora_specs(...)`), by which they are known"
            )
        ends[key.end] = shapes[name]
    return [_group(path, layers) for path, layers in found.items()]


def _group(path: Path, layers: Mapping[Shape, tuple[Path, dict[str, Shape]]]) -> _Group:
    lengths = tuple(max(column) + 1 for column in zip(*layers, strict=True))
    name, shapes = layers[min(layers)]
    if math.prod(lengths) != len(layers):
        raise ValueError(
            f"of '{'/'.join(path)}' there are {len(layers)} layers, numbered up to "
            f"{max(layers)}: some are missing"
        )
    for other, own in layers.values():
        if own != shapes:
            raise ValueError(
                f"the layers {'.'.join(name)!r} and {'.'.join(other)!r} would be stacked, and have "
                f"tensors of other names or shapes: {shapes} and {own}"
            )
    return _Group(path, name, lengths, shapes)

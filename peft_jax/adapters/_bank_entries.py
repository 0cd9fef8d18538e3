"""One adapter, as a bank takes it: its arrays by the path of each layer's bank."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax.core import meta
from flax.traverse_util import unflatten_dict

from peft_jax._numerics import Slots
from peft_jax._spec import LoraSpec
from peft_jax._trees import BANK, check_specs, children, is_branch

Array = jax.Array
Specs = Mapping[str, LoraSpec]
Leaves = dict[str, Any]
Entries = dict[str, tuple[LoraSpec, Leaves]]


def bank_path(path: str) -> str:
    """Where the bank of a layer lies: at ``.../lora.bank`` for an adapter at ``.../lora``."""
    parent, slash, name = path.rpartition("/")
    return f"{parent}{slash}{name.partition('.')[0]}.{BANK}"


def at_bank(specs: Specs) -> dict[str, LoraSpec]:
    return {bank_path(path): spec for path, spec in specs.items()}


def leaves_of(spec: LoraSpec) -> list[str]:
    """Names of the arrays of an adapter."""
    magnitude, bias = spec.variant == "dora", spec.bias is not None
    return ["a", "b"] + ["magnitude"] * magnitude + ["bias"] * bias


def checked_adapter(name: str, lora: Any, specs: Specs) -> Entries:
    """An adapter's specs and arrays, by the path of each layer's bank."""
    check_specs(lora, specs, f"The adapter {name!r}")
    found: Entries = {}
    for path, spec in specs.items():
        if spec.variant == "tokens" or spec.param is None:
            what = (
                "trained token rows" if spec.variant == "tokens" else "an adapter that stands alone"
            )
            raise ValueError(
                f"The adapter {name!r} has {what} at '{path}'; a bank holds products a·b beside "
                "layers. Serve it by a model of its own."
            )
        branch = lora
        for part in path.split("/"):
            branch = branch[part]
        if set(branch) != set(leaves_of(spec)):
            raise ValueError(
                f"The adapter {name!r} holds {sorted(branch)} at '{path}', where its spec speaks "
                f"of {leaves_of(spec)}. Give the specs of this adapter."
            )
        if bank_path(path) in found:
            raise ValueError(
                f"The adapter {name!r} holds two adapters of one weight at '{path}' and beside it. "
                "Stack each as an adapter of its own."
            )
        found[bank_path(path)] = (spec, meta.unbox(dict(branch)))
    paths = set(specs)
    others = ["/".join(p) for p in _leaf_paths(lora) if "/".join(p[:-1]) not in paths]
    if others:
        raise ValueError(
            f"The adapter {name!r} trained whole parameters ({others[:5]}), of which a model has "
            "one for all examples. Leave them out, or serve it by a model of its own."
        )
    return found


def _leaf_paths(tree: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    if not is_branch(tree):
        return [path]
    return [
        found for key, value in children(tree) for found in _leaf_paths(value, (*path, str(key)))
    ]


def fitting(name: str, path: str, layer: Slots, spec: LoraSpec) -> None:
    """Refuses an adapter of another layer than the bank's."""
    own, other = ((s.param, parse_pattern(s), s.stack_axes, s.shape) for s in (layer.spec, spec))
    if own[:3] != other[:3] or (own[3] and other[3] and own[3] != other[3]):
        told = [
            f"{s.param!r} of shape {s.shape} by '{s.equation}' (stack axes {s.stack_axes})"
            for s in (spec, layer.spec)
        ]
        raise ValueError(
            f"The adapter {name!r} is of another model: at '{path}' it adapts {told[0]}, and those "
            f"before it {told[1]}."
        )


def parse_pattern(spec: LoraSpec) -> tuple[int, ...]:
    """An equation and its outputs, up to the choice of letters."""
    text = f"{spec.equation};{spec.output_letters}"
    return tuple(text.index(letter) for letter in text)


def entry_of(name: str, path: str, layer: Slots, leaf: str, leaves: Leaves) -> Array:
    """One adapter's array in its slot; zeros where the adapter has none."""
    if leaf not in leaves:
        return jnp.zeros(layer.shape(leaf))
    try:
        return layer.put(leaf, leaves[leaf])
    except (ValueError, IndexError) as error:
        raise ValueError(
            f"The adapter {name!r} has {error} at '{path}', where the bank has "
            f"{layer.shape(leaf)}: it is of another model, or of another rank than its spec says."
        ) from error


def nested(leaves: Mapping[str, Leaves]) -> dict[str, Any]:
    """A tree of the arrays at these paths."""
    return unflatten_dict(
        {(*p.split("/"), leaf): v for p, own in leaves.items() for leaf, v in own.items()}
    )

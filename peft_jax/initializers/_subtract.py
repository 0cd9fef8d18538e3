"""`subtract_mutated_init`: adapters that took part of the weight, made plain ones."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax.core import meta

from peft_jax._numerics import rank_letter, stack_back, stack_first, widest
from peft_jax._spec import LoraSpec
from peft_jax._trees import Layer, Path, Specs, check_specs, map_layers, slashed, split_params

Array = jax.Array
_CALLER = "subtract_mutated_init"


class PlainLora(NamedTuple):
    """Adapters for a base that none of them changed, and their specs."""

    lora: Any
    specs: dict[str, LoraSpec]


def subtract_mutated_init(initial: Any, trained: Any, specs: Specs) -> PlainLora:
    """Turns trained PiSSA, OLoRA or CorDA adapters into plain ones for the untouched weights.

    The base was ``W - s·a_0·b_0``, so ``W + s·(a_t·b_t - a_0·b_0) = W + s·[a_t, a_0]·[b_t; -b_0]``:
    the rank doubles, and the scaling stays (alpha grows along with what it is divided by).
    ``magnitude``, ``bias`` and ``rows`` are those of the trained adapter: none was taken from the
    base.

    Args:
      initial: the adapters as `init_lora_weights` made them.
      trained: the same adapters after training.
      specs: of both.

    Returns:
      ``(lora, specs)``, for the weights that `init_lora_weights` was given.

    Raises:
      ValueError: where trees and specs do not fit, or hold more than adapters.
    """
    for name, tree in (("initial", initial), ("trained", trained)):
        check_specs(tree, specs, _CALLER)
        others = jax.tree.leaves(split_params(tree).original)
        if others:
            raise ValueError(
                f"{_CALLER}: {name} holds {len(others)} arrays beside its adapters. Pass the "
                "adapters alone, by `split_params`: the trained base is not the untouched one."
            )
    first: dict[str, Mapping[str, Any]] = {}

    def note(path: Path, rest: Layer, adapters: Layer) -> Layer:
        first.update({"/".join((*path, name)): value for name, value in adapters.items()})
        return rest

    map_layers(initial, note)

    def subtract(path: Path, rest: Layer, adapters: Layer) -> Layer:
        own = {name: specs["/".join((*path, name))] for name in adapters}
        _check_rows(path, own)
        for name, spec in own.items():
            where = "/".join((*path, name))
            plain = spec.variant == "tokens"
            rest[name] = (
                adapters[name] if plain else _subtracted(where, first[where], adapters[name], spec)
            )
        return rest

    doubled = {
        path: spec if spec.variant == "tokens" else _doubled(spec) for path, spec in specs.items()
    }
    return PlainLora(map_layers(trained, subtract), doubled)


def _check_rows(path: Path, specs: Specs) -> None:
    """Rows of trained tokens stand for the changed table, where an adapter has changed it."""
    tables = {spec.param for spec in specs.values() if spec.variant == "tokens"}
    shared = [
        name for name, spec in specs.items() if spec.variant != "tokens" and spec.param in tables
    ]
    if shared:
        raise ValueError(
            f"{_CALLER}: {[slashed((*path, name)) for name in shared]} adapt a table of which "
            "single rows are trained too; those rows belong to the table that the adapter has "
            "changed. Fuse them into it by `fuse_params`."
        )


def _subtracted(
    path: str, initial: Mapping[str, Any], trained: Mapping[str, Any], spec: LoraSpec
) -> dict[str, Any]:
    for name in ("a", "b"):
        before, after = (jnp.shape(meta.unbox(tree[name])) for tree in (initial, trained))
        if before != after:
            raise ValueError(
                f"{_CALLER}: {name} of '{path}' has shape {before} in initial and {after} in "
                "trained. Pass two states of one model's adapters."
            )
    a, b = (
        _joined(initial[name], trained[name], spec, letters, sign)
        for name, letters, sign in zip(("a", "b"), spec.letters[:2], (1, -1), strict=True)
    )
    return {**trained, "a": a, "b": b}


def _joined(initial: Any, trained: Any, spec: LoraSpec, letters: str, sign: int) -> Any:
    """The trained factor, with the initial one behind it along the rank."""
    old, new = meta.unbox(initial), meta.unbox(trained)
    dtype = widest(old.dtype, new.dtype) if old.dtype != new.dtype else new.dtype
    parts = [stack_first(x.astype(dtype), spec.stack_axes) for x in (new, sign * old)]
    axis = letters.index(rank_letter(spec)) - len(letters)
    return meta.replace_boxed(trained, stack_back(jnp.concatenate(parts, axis), spec.stack_axes))


def _doubled(spec: LoraSpec) -> LoraSpec:
    """The spec of twice the rank and the same scaling."""
    if spec.alpha is None:
        return dataclasses.replace(spec, rank=2 * spec.rank)
    by_root = math.isclose(spec.scaling, spec.alpha / math.sqrt(spec.rank), rel_tol=1e-6)
    growth: float = math.sqrt(2) if by_root and spec.rank > 1 else 2
    return dataclasses.replace(spec, rank=2 * spec.rank, alpha=growth * spec.alpha)

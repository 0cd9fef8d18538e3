"""Adapters put into a bank: `stack_adapters`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax.core import meta

from peft_jax._numerics import Slots, adapter_shapes, stack_back, stack_first
from peft_jax._spec import LoraSpec
from peft_jax._trees import check_adapter_name
from peft_jax.adapters._bank import AdapterBank
from peft_jax.adapters._bank_entries import (
    Entries,
    Leaves,
    Specs,
    at_bank,
    checked_adapter,
    entry_of,
    fitting,
    leaves_of,
    nested,
)

Array = jax.Array


def stack_adapters(
    adapters: Mapping[str, Any] | Sequence[Any],
    *,
    specs: Any,
    capacity: int | None = None,
    rank: int | None = None,
    room_for: Specs | None = None,
    dtype: Any = None,
) -> AdapterBank:
    """Adapters of one base model in one bank, of which each example of a batch chooses one.

    ``y_i = x_i·W + scaling_n * x_i·a_n·b_n`` with ``n`` the adapter of example ``i``: in one
    program, whose products do not grow with the number of adapters.

    Example::

      bank = peft.stack_adapters({"french": french, "german": german}, specs=specs, capacity=16)
      model = peft.MultiAdapterModel(wrapped=base_model)
      params = bank.merge(base)
      y = model.apply({"params": params}, x, adapters=bank.select(["german", None, "french"]))

    Args:
      adapters: from names to trees of adapters (as `split_params` gives them); a list has the
        names ``"0"``, ``"1"``, ....
      specs: of each adapter, under its name (or in a list); or those of all of them.
      capacity: number of slots; default: as many as there are adapters.
      rank: the largest rank that there is to be room for; default: that of the adapters.
      room_for: specs of layers, variants and ranks that later adapters may have, besides these.
      dtype: of the bank's arrays; default: the adapters' own, promoted for each array.

    Raises:
      ValueError: where a tree does not fit its specs, adapters are of different models, or one has
        what is no product: trained token rows, or parameters trained in place.
    """
    trees, all_specs = _named(adapters, specs)
    capacity = len(trees) if capacity is None else capacity
    if not isinstance(capacity, int) or capacity < max(len(trees), 1):
        raise ValueError(
            "stack_adapters: capacity is an integer of at least 1 and the number of adapters "
            f"({len(trees)}), got {capacity!r}."
        )
    if dtype is not None and not jnp.issubdtype(_dtype(dtype), jnp.floating):
        raise ValueError(f"stack_adapters: dtype is one of floats, got {dtype!r}.")
    entries = {name: checked_adapter(name, tree, all_specs[name]) for name, tree in trees.items()}
    layers, leaves = _layers(entries, rank, room_for)
    params: dict[str, Leaves] = {}
    for path, layer in layers.items():
        own = [entries[name].get(path, (layer.spec, {}))[1] for name in trees]
        params[path] = {}
        for leaf in leaves[path]:
            kinds = [meta.unbox(given[leaf]).dtype for given in own if leaf in given]
            kind = dtype or (jnp.result_type(*kinds) if kinds else jnp.float32)
            pairs = zip(trees, own, strict=True)
            rows = [entry_of(name, path, layer, leaf, given) for name, given in pairs]
            rows += [jnp.zeros(layer.shape(leaf), kind)] * (capacity - len(trees))
            params[path][leaf] = layer.stacked([row.astype(kind) for row in rows])
    free = capacity - len(trees)
    return AdapterBank(
        params=nested(params),
        names=(*trees, *(None,) * free),
        specs=(*(dict(all_specs[name]) for name in trees), *({},) * free),
        layers=layers,
    )


def _named(adapters: Any, specs: Any) -> tuple[dict[str, Any], dict[str, Specs]]:
    """Trees and specs by name."""
    if isinstance(adapters, Mapping):
        trees = dict(adapters)
    elif isinstance(adapters, list | tuple):
        trees = {str(i): tree for i, tree in enumerate(adapters)}
    else:
        raise ValueError(
            "stack_adapters takes a dict from names to trees of adapters, or a list of trees, got "
            f"{type(adapters).__name__}."
        )
    for name in trees:
        check_adapter_name("stack_adapters", name)
    if isinstance(specs, list | tuple) and len(specs) == len(trees):
        return trees, dict(zip(trees, specs, strict=True))
    if isinstance(specs, Mapping) and all(isinstance(s, LoraSpec) for s in specs.values()):
        return trees, dict.fromkeys(trees, specs)
    if isinstance(specs, Mapping) and set(specs) == set(trees):
        return trees, dict(specs)
    raise ValueError(
        f"stack_adapters: specs are those of all adapters, or a dict with the specs of each of "
        f"{list(trees)[:10]}, got {specs!r:.200}."
    )


def _dtype(dtype: Any) -> Any:
    try:
        return jnp.dtype(dtype)
    except TypeError as error:
        raise ValueError(f"stack_adapters: {dtype!r} is no dtype.") from error


def _layers(
    entries: Mapping[str, Entries], rank: int | None, room_for: Specs | None
) -> tuple[dict[str, Slots], dict[str, list[str]]]:
    """How each layer lies in the bank, and which arrays it has."""
    layers: dict[str, Slots] = {}
    leaves: dict[str, set[str]] = {}
    wanted = [("room_for", path, spec, _shapes(spec)) for path, spec in _reserved(room_for)]
    for name, layer_entries in entries.items():
        wanted += [(name, path, spec, found) for path, (spec, found) in layer_entries.items()]
    for name, path, spec, found in wanted:
        layer = layers.setdefault(path, Slots.of(spec, found["a"], found["b"]))
        fitting(name, path, layer, spec)
        most = max(layer.spec.rank, spec.rank, rank or 1)
        layers[path] = dataclasses.replace(
            layer, spec=dataclasses.replace(layer.spec, rank=most, alpha=None)
        )
        leaves.setdefault(path, set()).update(leaves_of(spec))
    if not layers:
        raise ValueError("stack_adapters: there are no adapters, and no room_for= any.")
    if rank is not None and any(layer.spec.rank > rank for layer in layers.values()):
        most = max(layer.spec.rank for layer in layers.values())
        raise ValueError(f"stack_adapters: rank={rank}, but there is an adapter of rank {most}.")
    return layers, {path: sorted(names) for path, names in leaves.items()}


def _reserved(room_for: Specs | None) -> list[tuple[str, LoraSpec]]:
    specs = {} if room_for is None else room_for
    unknown = [path for path, spec in specs.items() if spec.shape is None]
    if unknown:
        raise ValueError(
            f"stack_adapters: room_for takes specs that know shapes, as `lora_specs` gives them; "
            f"unknown at {unknown[:5]}."
        )
    return list(at_bank(specs).items())


def _shapes(spec: LoraSpec) -> Leaves:
    """Arrays of the shapes that an adapter of this spec has, not made."""
    assert spec.shape is not None

    def arrays() -> tuple[Array, Array]:
        first = stack_first(jnp.zeros(spec.shape), spec.stack_axes)
        a, b = (jnp.zeros(shape) for shape in adapter_shapes(spec, first.shape))
        return stack_back(a, spec.stack_axes), stack_back(b, spec.stack_axes)

    return dict(zip("ab", jax.eval_shape(arrays), strict=True))

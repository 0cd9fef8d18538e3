"""Parameter trees: split off the adapters, merge them back, fuse them into the weights."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax.core import meta

from peft_jax._numerics import add_once, as_stored, spec_changes, weight_shape
from peft_jax._spec import LoraSpec
from peft_jax._trees.adapter_leaves import is_adapter
from peft_jax._trees.paths import (
    Layer,
    Path,
    adapter_paths,
    children,
    is_branch,
    map_layers,
    rebuild,
    slashed,
)

__all__ = [
    "Specs",
    "check_specs",
    "dense_spec",
    "fuse_params",
    "fused_layer",
    "merge_params",
    "merged_trees",
    "split_params",
]


Specs = Mapping[str, LoraSpec]


class SplitParams(NamedTuple):
    """The two halves of a parameter tree."""

    original: Any
    lora: Any


def split_params(params: Any) -> SplitParams:
    """Splits a parameter tree into the base's parameters and the adapters.

    Leaves are passed on, not copied. Containers keep their type; lists and tuples keep their length
    in both halves, with ``{}`` in place of what has no adapter. Inverse of `merge_params`, exactly.

    Args:
      params: nested dicts, FrozenDicts, lists and tuples, with adapters (``lora/{a,b}``) in them. A
        user's own module or leaf named ``lora`` is not an adapter and stays in the base, unless it
        holds just two arrays ``a`` and ``b`` that share a rank: then nothing tells it apart.

    Returns:
      ``(original, lora)``; in ``lora`` only the branches that lead to adapters.
    """
    original, lora = _split(params)
    if lora is None:
        lora = rebuild(params, {}) if isinstance(params, Mapping) else {}
    return SplitParams(original, lora)


def _split(tree: Any) -> tuple[Any, Any]:
    if not is_branch(tree):
        return tree, None
    base: dict[Any, Any] = {}
    lora: dict[Any, Any] = {}
    for key, value in children(tree):
        if isinstance(tree, Mapping) and is_adapter(key, value):
            lora[key] = rebuild(value, value)
            continue
        base[key], inside = _split(value)
        if inside is not None:
            lora[key] = inside
    if not lora:
        return rebuild(tree, base), None
    if not isinstance(tree, Mapping):
        lora = {key: lora.get(key, {}) for key in base}
    return rebuild(tree, base), rebuild(tree, lora)


def merge_params(original: Any, lora: Any) -> Any:
    """Puts adapters beside the weights that they adapt. Inverse of `split_params`.

    Args:
      original: the base's parameters.
      lora: a tree of adapters, as `split_params` returns it.

    Returns:
      One tree, of the container types of ``original``.

    Raises:
      ValueError: where the trees do not fit: an adapter for a layer that is not there, an adapter
        that is there already, a leaf that is no adapter.
    """
    return merged_trees(original, lora)


def merged_trees(original: Any, lora: Any, path: Path = (), replaced: Any = None) -> Any:
    """See `merge_params`; leaves of the second tree take the place of those of the first.

    Args:
      original: the base's parameters.
      lora: adapters, and maybe leaves.
      path: where both lie.
      replaced: from a path and both leaves to the new one; None: leaves are refused.
    """
    if is_branch(lora) and not len(lora):
        return original
    if replaced is not None and not is_branch(original) and not is_branch(lora):
        return replaced(path, original, lora)
    if not is_branch(original) or not is_branch(lora):
        raise ValueError(
            f"merge_params: '{slashed(path)}' is {_described(original)} in the base and "
            f"{_described(lora)} in the adapters. The second tree holds adapters alone, at the "
            "paths of the first; `split_params` makes such a pair."
        )
    if isinstance(original, Mapping) != isinstance(lora, Mapping) or (
        not isinstance(original, Mapping) and len(original) != len(lora)
    ):
        raise ValueError(
            f"merge_params: '{slashed(path)}' is {_described(original)} in the base and "
            f"{_described(lora)} in the adapters. Merge adapters of the same model."
        )
    merged = dict(children(original))
    for key, value in children(lora):
        inner = (*path, str(key))
        if isinstance(lora, Mapping) and is_adapter(key, value):
            if key in merged:
                raise ValueError(
                    f"merge_params: the base has something at '{slashed(inner)}' already. Take "
                    "its adapters off first, by `split_params`."
                )
            merged[key] = rebuild(value, value)
        elif key not in merged:
            close = difflib.get_close_matches(str(key), [str(name) for name in merged], 3)
            raise ValueError(
                f"merge_params: the base has no '{slashed(inner)}', for which there are "
                f"{_described(value)}. Close names: {close}. Merge adapters of the same model."
            )
        else:
            merged[key] = merged_trees(merged[key], value, inner, replaced)
    return rebuild(original, merged)


def _described(tree: Any) -> str:
    if isinstance(tree, Mapping):
        return f"a dict of {sorted(map(str, tree))}"
    if is_branch(tree):
        return f"a {type(tree).__name__} of {len(tree)}"
    return f"a leaf ({type(tree).__name__})"


def fuse_params(params: Any, *, specs: Specs | None = None) -> Any:
    """Adds every adapter to the weight beside it: ``W + scaling * a·b``.

    The sum is taken in float32 (or wider) and rounded once to the dtype of ``W``. The result is a
    tree for the plain model. Inverse: `unfuse_params`. Works under ``jax.jit``.

    Args:
      params: a parameter tree with adapters.
      specs: from `lora_specs`. Without them each weight is read as that of a Dense layer, ``(in,
        out)`` with a scaling of 1; anything else raises, for arrays alone tell neither the alpha
        nor the layout.

    Returns:
      The tree without adapters; containers and boxes as they were.

    Raises:
      ValueError: where an adapter has no spec, a spec no adapter, shapes do not fit, the arrays
        leave a doubt, or the weight is stored in integers.
    """
    check_specs(params, specs, "fuse_params")

    def fuse(path: Path, layer: Layer, adapters: Layer) -> Layer:
        if specs is None and len(adapters) > 1:
            raise ValueError(
                f"The adapters {[slashed((*path, name)) for name in sorted(adapters)]} lie in one "
                "place, and arrays alone do not tell which weight each belongs to. Pass "
                "specs=peft.lora_specs(model, *inputs)."
            )
        return fused_layer(path, layer, adapters, specs)

    return map_layers(params, fuse)


def fused_layer(path: Path, layer: Layer, adapters: Layer, specs: Specs | None) -> Layer:
    """A layer whose adapters are part of its parameters."""
    changes = layer_changes(path, layer, adapters, specs)
    return layer | {name: rounded_sum(layer[name], change, 1) for name, change in changes.items()}


def check_specs(params: Any, specs: Specs | None, caller: str) -> None:
    """Every adapter has a spec, and every spec an adapter."""
    if specs is None:
        return
    if not isinstance(specs, Mapping) or not all(
        isinstance(spec, LoraSpec) for spec in specs.values()
    ):
        raise ValueError(
            f"{caller}: specs map the slashed path of each adapter to its LoraSpec, got "
            f"{specs!r:.200}. "
            "`peft.lora_specs(model, *inputs)` makes them; those kept as plain data come back by "
            "`peft.LoraSpec.from_dict`."
        )
    there = set(adapter_paths(params))
    needed = {path for path, spec in specs.items() if spec.param is not None}
    missing, surplus = sorted(there - set(specs)), sorted(needed - there)
    if missing or surplus:
        raise ValueError(
            f"{caller}: specs and parameters are of different models. Adapters without a spec: "
            f"{missing}; specs without an adapter: {surplus}. {_hint(params, there, specs)}"
        )


def _hint(params: Any, adapters: set[str], specs: Specs) -> str:
    """What most likely went wrong, and the remedy."""
    if isinstance(params, Mapping) and set(params) == {"params"}:
        return "Pass variables['params'], without the name of the collection."
    if not adapters:
        return "The tree holds no adapters: it is the base alone, or fused already."
    if not specs:
        return "The specs are empty: call `peft.lora_specs` inside the interceptor."
    return "Take the specs from `peft.lora_specs` of the model that made the parameters."


def layer_changes(
    path: Path, layer: Layer, adapters: Layer, specs: Specs | None
) -> dict[str, jax.Array]:
    """What the adapters of one layer, all together, add to each parameter beside them."""
    total: dict[str, jax.Array] = {}
    for name, adapter in adapters.items():
        for param, change in adapter_changes((*path, name), layer, adapter, specs).items():
            total[param] = total[param] + change if param in total else change
    return total


def adapter_changes(
    path: Path, layer: Layer, adapter: Mapping[str, Any], specs: Specs | None
) -> dict[str, jax.Array]:
    """What the adapter adds to each parameter beside it, by name."""
    spec = dense_spec(path, layer, adapter) if specs is None else specs["/".join(path)]
    _check_rank(path, adapter, spec)
    if spec.param is None:
        raise ValueError(
            f"The adapter at '{slashed(path)}' stands alone (a LoRA...Adapter without a layer): "
            "there is no weight that it could be fused into."
        )
    if as_stored(meta.unbox(layer.get(spec.param))) is not None:
        raise ValueError(
            f"The weight at '{slashed((*path[:-1], spec.param))}' is stored in few bits; an "
            "adapter is fused into floating-point weights. Turn the parameters back first, by "
            "`peft.dequantize_checkpoint`."
        )
    if spec.param not in layer or is_branch(layer[spec.param]):
        raise ValueError(
            f"The adapter at '{slashed(path)}' adapts {spec.param!r}, but beside it lie "
            f"{sorted(layer)}. Give the specs of this model."
        )
    kernel = meta.unbox(layer[spec.param])
    if not jnp.issubdtype(kernel.dtype, jnp.floating):
        raise ValueError(
            f"The weight at '{slashed((*path[:-1], spec.param))}' is stored as {kernel.dtype}; an "
            "adapter is fused into floating-point weights. Dequantize stored integers first."
        )
    arrays = {name: meta.unbox(value) for name, value in adapter.items()}
    _check_leaves(path, arrays, spec)
    try:
        changes = spec_changes(kernel, arrays, spec)
    except (ValueError, TypeError, IndexError) as error:
        shapes = ", ".join(f"{name} {jnp.shape(array)}" for name, array in arrays.items())
        raise ValueError(
            f"The adapter at '{slashed(path)}' ({shapes}) does not fit its equation "
            f"'{spec.equation}' (stack axes {spec.stack_axes}) and {spec.param!r} of shape "
            f"{kernel.shape}. Give the specs of this model (`peft.lora_specs`)."
        ) from error
    change = changes[spec.param]
    if change.shape != kernel.shape:
        raise ValueError(
            f"The adapter at '{slashed(path)}' makes a change of shape {change.shape} by "
            f"'{spec.equation}', but {spec.param!r} has shape {kernel.shape}. Give the specs of "
            "this model (`peft.lora_specs`)."
        )
    for param, change in changes.items():
        if param not in layer or jnp.shape(meta.unbox(layer[param])) != change.shape:
            raise ValueError(
                f"The adapter at '{slashed(path)}' has a bias of shape {change.shape} for "
                f"{param!r}, but the layer has none of this shape: beside it lie {sorted(layer)}. "
                "A bias is fused into the layer's own: give the model one, of zeros "
                "(use_bias=True)."
            )
    return changes


def _check_leaves(path: Path, arrays: Mapping[str, Any], spec: LoraSpec) -> None:
    """The adapter has the arrays that its spec speaks of, in the shapes that they need."""
    wanted = {"a", "b"} | ({"magnitude"} if spec.variant == "dora" else set())
    wanted |= set() if spec.bias is None else {"bias"}
    wanted = {"rows"} if spec.variant == "tokens" else wanted
    if set(arrays) != wanted:
        raise ValueError(
            f"The adapter at '{slashed(path)}' holds {sorted(arrays)}, but its spec (variant "
            f"{spec.variant!r}, bias {spec.bias!r}) needs {sorted(wanted)}. Give the specs of this "
            "model (`peft.lora_specs`)."
        )


def _check_rank(path: Path, adapter: Mapping[str, Any], spec: LoraSpec) -> None:
    if "a" not in adapter or spec.stack_axes:
        return
    rank = jnp.shape(meta.unbox(adapter["a"]))[-1]
    if rank != spec.rank and spec.alpha is not None:
        raise ValueError(
            f"The adapter at '{slashed(path)}' has rank {rank}, but its spec has rank {spec.rank}, "
            f"from which the scaling {spec.scaling} was made (alpha {spec.alpha}). Give the specs "
            "of this model (`peft.lora_specs`)."
        )


def dense_spec(path: Path, layer: Layer, adapter: Mapping[str, Any]) -> LoraSpec:
    """The spec of a Dense layer, where nothing speaks against it."""
    weights = [
        name
        for name, value in layer.items()
        if not is_branch(value) and len(weight_shape(meta.unbox(value))) >= 2
    ]
    shapes = {name: jnp.shape(meta.unbox(value)) for name, value in adapter.items()}
    if len(weights) == 1 and set(adapter) == {"a", "b"}:
        shape, a, b = weight_shape(meta.unbox(layer[weights[0]])), shapes["a"], shapes["b"]
        if len(a) == len(b) == 2 and a[1] == b[0] and shape == (a[0], b[1]):
            return LoraSpec(weights[0], "ir,ro->io", a[1])
    found = {name: weight_shape(meta.unbox(layer[name])) for name in weights}
    raise ValueError(
        f"The adapter at '{slashed(path)}' ({shapes}) is not plainly that of one Dense layer; "
        f"beside it lie {found}. Pass specs=peft.lora_specs(model, *inputs)."
    )


def rounded_sum(stored: Any, change: jax.Array, sign: int) -> Any:
    """``stored + sign * change``, rounded once to the stored dtype, in the stored box."""
    return meta.replace_boxed(stored, add_once(meta.unbox(stored), change, sign))

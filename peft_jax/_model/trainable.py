"""Which parameters of an adapted model are trained."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
from flax.core import meta

from peft_jax._config import LoraConfig, check_saved, is_saved
from peft_jax._numerics import as_stored, weight_shape
from peft_jax._trees import (
    Path,
    children,
    containers,
    is_adapter,
    is_branch,
    named_as,
    rebuild,
    scales_in,
    slashed,
)

__all__ = [
    "print_trainable_parameters",
    "trainable_mask",
]


def trainable_mask(
    params: Any, config: LoraConfig | None = None, *, adapter_name: str | None = None
) -> Any:
    """A tree of booleans, of the structure of ``params``: what is trained, for ``optax``.

    Trained are all adapters with their magnitudes, biases and token rows; by ``config.bias`` the
    parameters named ``bias``, all of them or those beside an adapter (``lora_only``); and all below
    ``config.modules_to_save``.

    Example::

      mask = peft.trainable_mask(params, config)
      labels = jax.tree.map(lambda trained: "train" if trained else "freeze", mask)
      optimizer = optax.multi_transform(
          {"train": optax.adam(1e-3), "freeze": optax.set_to_zero()}, labels
      )

    To save the work of the frozen gradients too, and for bases that are stored in few bits, which
    have no gradients, differentiate by the adapters alone (`split_params`).

    Args:
      params: of the adapted model: nested dicts, FrozenDicts, lists and tuples.
      config: None: adapters alone.
      adapter_name: of the adapters that are trained; None: all.

    Raises:
      ValueError: where an entry of ``modules_to_save`` matches nothing, or nothing is trained.
    """
    if config is not None and not isinstance(config, LoraConfig):
        raise ValueError(
            f"trainable_mask takes a LoraConfig or None, got {type(config).__name__}. Read plain "
            "data by `peft.LoraConfig.from_dict`."
        )
    if config is not None:
        check_saved(config, [path for path, _ in containers(params)])
    mask = _mask(params, config, adapter_name, (), False)
    if not any(jax.tree.leaves(mask)):
        raise ValueError(
            "trainable_mask: nothing in the parameters is trained: they hold no adapter"
            f"{'' if adapter_name is None else f' named {adapter_name!r}'}. Give those of the "
            "adapted model."
        )
    return mask


def _mask(
    tree: Any, config: LoraConfig | None, adapter_name: str | None, path: Path, saved: bool
) -> Any:
    if not is_branch(tree) or as_stored(tree) is not None:
        if saved and as_stored(meta.unbox(tree)) is not None:
            raise ValueError(
                f"LoraConfig.modules_to_save would train '{slashed(path)}', which is stored in few "
                "bits. Leave it in floats (`select=` of `quantize_checkpoint`)."
            )
        return jax.tree.map(lambda _: saved, tree)
    saved = saved or (config is not None and bool(path) and is_saved(config, path))
    bias = "none" if config is None else config.bias
    adapted = isinstance(tree, Mapping) and any(is_adapter(k, v) for k, v in tree.items())
    of_bias = saved or bias == "all" or (bias == "lora_only" and adapted)
    marked: dict[Any, Any] = {}
    for key, value in children(tree):
        if isinstance(tree, Mapping) and is_adapter(key, value):
            own = adapter_name in (None, named_as(key))
            marked[key] = jax.tree.map(lambda _, own=own: own, value)
        elif key == "bias" and not is_branch(value):
            marked[key] = jax.tree.map(lambda _: of_bias, value)
        else:
            marked[key] = _mask(value, config, adapter_name, (*path, str(key)), saved)
    return rebuild(tree, marked)


def print_trainable_parameters(
    params: Any, config: LoraConfig | None = None, *, adapter_name: str | None = None
) -> None:
    """Prints how many parameters are trained, of how many; see `trainable_mask`.

    ``trainable params: X || all params: Y || trainable%: Z || matched modules: N of M``. Weights
    that are stored in few bits count by the numbers that they stand for, and arrays that several
    layers share count once. M are the modules that
    hold a weight of two or more axes, N those of them with an adapter.
    """
    print(trainable_parameters(params, config, adapter_name))


def trainable_parameters(
    params: Any, config: LoraConfig | None = None, adapter_name: str | None = None
) -> str:
    """The line that `print_trainable_parameters` prints."""
    mask = _without_scales(trainable_mask(params, config, adapter_name=adapter_name), params)
    nodes = jax.tree.leaves(_without_scales(params, params), is_leaf=_is_one)
    trained = [all(jax.tree.leaves(m)) for m in jax.tree.leaves(mask, is_leaf=_is_one)]
    # An array that several layers share counts once.
    sizes = {id(_leaf(node)): _size(node) for node in nodes}
    counted = {id(_leaf(node)): _size(node) for node, t in zip(nodes, trained, strict=True) if t}
    total, count = sum(sizes.values()), sum(counted.values())
    layers = [layer for _, layer in containers(params) if _has_weight(layer)]
    matched = sum(any(is_adapter(k, v) for k, v in layer.items()) for layer in layers)
    return (
        f"trainable params: {count:,d} || all params: {total:,d} || "
        f"trainable%: {100 * count / total:.4f} || matched modules: {matched} of {len(layers)}"
    )


def _without_scales(tree: Any, like: Any) -> Any:
    """The tree without what lies in the places where another holds scales of stored values."""
    if not is_branch(like) or as_stored(like) is not None:
        return tree
    scales, pairs = scales_in(like), zip(children(tree), children(like), strict=True)
    kept = {key: _without_scales(a, b) for (key, a), (_, b) in pairs if key not in scales}
    return rebuild(tree, kept)


def _is_one(node: Any) -> bool:
    """Whether a node of a tree stands for one parameter."""
    return as_stored(node) is not None or isinstance(node, meta.AxisMetadata)


def _leaf(node: Any) -> Any:
    """The one array of a parameter, in its box or not."""
    return jax.tree.leaves(node)[0]


def _size(node: Any) -> int:
    """How many numbers a parameter stands for; a stack that is read several times counts once."""
    stored = as_stored(node)
    return math.prod(weight_shape(_leaf(node)) if stored is None else stored.shape)


def _has_weight(layer: Any) -> bool:
    return isinstance(layer, Mapping) and any(
        len(weight_shape(meta.unbox(value))) >= 2
        for key, value in layer.items()
        if not is_adapter(key, value) and (not is_branch(value) or as_stored(value) is not None)
    )

"""Adapters by their names, as pure functions of parameter trees; and a switch for all of them."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax.core import meta

from peft_jax._config import LoraConfig
from peft_jax._model.trainable import trainable_mask
from peft_jax._numerics import as_stored, is_traced
from peft_jax._spec import LoraSpec
from peft_jax._surgery import mute_adapters
from peft_jax._trees import (
    DEFAULT,
    Layer,
    Path,
    adapter_paths,
    check_adapter_name,
    check_specs,
    children,
    fused_layer,
    is_branch,
    map_layers,
    merge_params,
    merged_trees,
    named_as,
    progress_bar,
    reboxed,
    rebuild,
    slashed,
    split_params,
)

__all__ = [
    "adapter_names",
    "add_adapter",
    "delete_adapter",
    "disable_adapters",
    "enable_adapters",
    "get_adapter",
    "rename_adapter",
    "without_adapters",
]


Specs = Mapping[str, LoraSpec]


# --- A switch ------------------------------------------------------------------------------------


@contextlib.contextmanager
def disable_adapters() -> Iterator[None]:
    """Within the ``with`` statement no adapter acts: models give what their bases give.

    That goes for adapters of any kind, put there by a config, an interceptor or a wrapper in the
    model; stored weights are still read, simulated ones still simulated. Parameters that were
    trained in place (``modules_to_save``, biases) stay as they are. ``jax.jit`` caches know of it:
    a program traced inside never serves outside, nor the other way round, and each is traced once.
    `PeftModel.init` draws adapters all the same. At the end, what was before holds again.
    """
    with mute_adapters():
        yield


@contextlib.contextmanager
def enable_adapters() -> Iterator[None]:
    """Within the ``with`` statement adapters act, also inside `disable_adapters`."""
    with mute_adapters(muted=False):
        yield


# --- Names in a tree -----------------------------------------------------------------------------


def adapter_names(params: Any) -> tuple[str, ...]:
    """Names of the adapters in a tree, in the order in which they are met."""
    names = [named_as(path.rpartition("/")[2]) for path in adapter_paths(params)]
    return tuple(dict.fromkeys(names))


def rename_adapter(tree: Any, name: str, *, old: str | None = None) -> Any:
    """A tree, or specs, in which an adapter has another name.

    Args:
      tree: parameters, adapters alone, or specs by path.
      name: the new name; ``default`` for none.
      old: the name until now; None: that of all adapters there are, which have the same name.

    Returns:
      The like of ``tree``; arrays are shared.

    Raises:
      ValueError: where there is no adapter of the old name, several names to choose from, or an
        adapter of the new name already.
    """
    check_adapter_name("rename_adapter", name)
    names = _spec_names(tree) if _is_specs(tree) else adapter_names(tree)
    if old is None and len(names) != 1:
        raise ValueError(
            f"rename_adapter: the tree has adapters named {[*names]}: say which, old=."
        )
    old = names[0] if old is None else old
    _refuse_unknown("rename_adapter", old, names)
    if name != old and name in names:
        raise ValueError(f"rename_adapter: there is an adapter named {name!r} already.")

    def renamed(branch: str) -> str:
        return _branch(branch, name) if named_as(branch) == old else branch

    if _is_specs(tree):
        parts = {path: path.rpartition("/") for path in tree}
        return {
            f"{above}{slash}{renamed(own)}": tree[p] for p, (above, slash, own) in parts.items()
        }

    def update(path: Path, rest: Layer, adapters: Layer) -> Layer:
        return rest | {renamed(branch): rebuild(value, value) for branch, value in adapters.items()}

    return map_layers(tree, update)


def get_adapter(params: Any, name: str = DEFAULT, *, config: LoraConfig | None = None) -> Any:
    """One adapter out of a parameter tree, as a tree of its own, without its name.

    Args:
      params: of an adapted model; or its specs, for those of the adapter.
      name: of the adapter.
      config: of the adapter. With it the tree also holds what the adapter trained in place: all
        below ``modules_to_save``, and biases, as ``bias`` says. `add_adapter` puts it back.

    Raises:
      ValueError: where there is no adapter of this name, with close ones.
    """
    if _is_specs(params):
        own = {p: s for p, s in params.items() if named_as(p.rpartition("/")[2]) == name}
        _refuse_unknown("get_adapter", name, _spec_names(params))
        return rename_adapter(own, DEFAULT)
    _refuse_unknown("get_adapter", name, adapter_names(params))
    mask = trainable_mask(params, config, adapter_name=name)
    return rename_adapter(_kept(params, mask), DEFAULT, old=name)


def add_adapter(params: Any, lora: Any, name: str = DEFAULT, *, replace: bool = False) -> Any:
    """A parameter tree with one more adapter, under a name.

    Switching between adapters of one shape so, with one name, keeps the structure of the tree:
    no program is traced anew.

    Args:
      params: of the base, with other adapters or without.
      lora: a tree of adapters, from `get_adapter`, `split_params`, `init_lora_weights` or a file.
        What else it holds replaces the base's (trained in place), where shapes agree.
      name: of the adapter; ``default`` for none.
      replace: whether an adapter of this name makes way. Otherwise it is an error.

    Returns:
      A tree that shares all arrays with those given, which stay as they are: what is trained in
      place can be had back from them.

    Raises:
      ValueError: where the name is taken, ``lora`` holds no adapter, or the base lacks a layer.
    """
    check_adapter_name("add_adapter", name)
    given = adapter_names(lora)
    if len(given) != 1:
        raise ValueError(
            f"add_adapter takes a tree with the adapters of one name, got the names {[*given]}. "
            "Take one out by `get_adapter`."
        )
    if name in adapter_names(params):
        if not replace:
            raise ValueError(
                f"add_adapter: there is an adapter named {name!r} already. Give another name, or "
                "replace=True."
            )
        params = _without(params, name)
    if not _leaves(lora) or _leaves(lora) < _leaves(params):
        return _overlaid(params, rename_adapter(lora, name))
    raise ValueError(
        "add_adapter takes an adapter, and is given all parameters of a model, which would take "
        "the place of the base's. Take the adapter out by `get_adapter` or `split_params`."
    )


def delete_adapter(params: Any, name: str = DEFAULT, *, base: Any = None) -> Any:
    """A parameter tree without the adapters of one name.

    Args:
      params: of an adapted model.
      name: of the adapter.
      base: parameters of the base, where the adapter trained some of them in place
        (``modules_to_save``, biases): they are as in ``base`` again. None: they stay.

    Raises:
      ValueError: where there is no adapter of this name, or ``base`` is of another model.
    """
    _refuse_unknown("delete_adapter", name, adapter_names(params))
    left = _without(params, name)
    return left if base is None else merge_params(base, split_params(left).lora)


def without_adapters(params: Any) -> Any:
    """A parameter tree without any adapter."""
    return map_layers(params, lambda path, rest, adapters: rest)


# --- Merging -------------------------------------------------------------------------------------


def merge_adapters(
    params: Any,
    specs: Specs | None,
    names: Collection[str],
    *,
    safe_merge: bool = False,
    progress: bool = False,
) -> Any:
    """The parameters of the base with some adapters fused into them, and without the others.

    Args:
      params: of an adapted model.
      specs: of all its adapters; None: weights are read as those of Dense layers, see
        `fuse_params`.
      names: of the adapters to fuse.
      safe_merge: whether to refuse a sum that holds NaN or infinity.
      progress: whether to show a bar.

    Raises:
      ValueError: as `fuse_params`; with ``safe_merge``, with the path of the parameter.
    """
    check_specs(params, specs, "merge_and_unload")
    for name in names:
        _refuse_unknown("merge_and_unload", name, adapter_names(params))
    layers = len({path.rpartition("/")[0] for path in adapter_paths(params)})
    with progress_bar(None, "merge adapters", shown=progress, total=layers, leave=False) as bar:

        def fuse(path: Path, rest: Layer, adapters: Layer) -> Layer:
            own = {key: value for key, value in adapters.items() if named_as(key) in names}
            layer = fused_layer(path, rest, own, specs) if own else rest
            if safe_merge:
                _refuse_not_finite(path, rest, layer)
            bar.update()
            return layer

        return map_layers(params, fuse)


def _refuse_not_finite(path: Path, before: Layer, after: Layer) -> None:
    for name, value in after.items():
        if value is before[name]:
            continue
        array = meta.unbox(value)
        if is_traced(array):
            raise ValueError("merge_and_unload: safe_merge looks at numbers, which jit lacks.")
        if not bool(jnp.all(jnp.isfinite(array))):
            raise ValueError(
                f"merge_and_unload: the sum at '{slashed((*path, name))}' is not finite. Nothing "
                "is merged; leave out the adapter (adapter_names=), or mend it."
            )


# --- Walks ---------------------------------------------------------------------------------------


def _leaves(params: Any) -> int:
    """How many parameters a tree holds beside its adapters."""
    return len(jax.tree.leaves(without_adapters(params)))


def _is_specs(tree: Any) -> bool:
    return isinstance(tree, Mapping) and any(isinstance(v, LoraSpec) for v in tree.values())


def _spec_names(specs: Specs) -> tuple[str, ...]:
    return tuple(dict.fromkeys(named_as(path.rpartition("/")[2]) for path in specs))


def _branch(branch: str, name: str) -> str:
    """Where an adapter lies that has another name."""
    own = branch.partition(".")[0]
    return own if name == DEFAULT else f"{own}.{name}"


def _refuse_unknown(caller: str, name: str, names: Collection[str]) -> None:
    if name not in names:
        close = difflib.get_close_matches(str(name), names, 3)
        raise ValueError(
            f"{caller}: there is no adapter named {name!r}. Close names: {close}; there are "
            f"{sorted(names)[:10]}."
        )


def _without(params: Any, name: str) -> Any:
    def update(path: Path, rest: Layer, adapters: Layer) -> Layer:
        return rest | {key: value for key, value in adapters.items() if named_as(key) != name}

    return map_layers(params, update)


def _kept(tree: Any, mask: Any) -> Any:
    """The branches of a tree whose leaves a mask marks; None where there are none."""
    if not is_branch(tree):
        return tree if all(jax.tree.leaves(mask)) else None
    pairs = zip(children(tree), children(mask), strict=True)
    kept = {key: _kept(value, marks) for (key, value), (_, marks) in pairs}
    found = {key: value for key, value in kept.items() if value is not None}
    if not found or isinstance(tree, Mapping):
        return rebuild(tree, found) if found else None
    return rebuild(tree, {key: {} if value is None else value for key, value in kept.items()})


def _overlaid(params: Any, lora: Any) -> Any:
    """Parameters with adapters beside them, and with leaves in the place of theirs."""

    def replaced(path: Path, own: Any, given: Any) -> Any:
        value, other = meta.unbox(own), meta.unbox(given)
        if as_stored(value) is not None or jnp.shape(value) != jnp.shape(other):
            raise ValueError(
                f"The adapter brings '{slashed(path)}', of shape {jnp.shape(other)}, which it "
                f"trained in place, but in the base there is {_shown(value)}. Give the base that "
                "it was trained on."
            )
        return reboxed(own, other)

    return merged_trees(params, lora, replaced=replaced)


def _shown(value: Any) -> str:
    stored = as_stored(value)
    return (
        f"one of shape {jnp.shape(value)}" if stored is None else f"one stored by {stored.method}"
    )

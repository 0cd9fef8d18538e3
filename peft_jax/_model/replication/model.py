"""Models with more layers, as ``layer_replication`` makes them, and their first values."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from peft_jax._model.replication.layers import (
    Family,
    Layers,
    arrangement,
    families,
    with_families,
    with_stacks,
)
from peft_jax._trees import Path, children, is_branch, merge_params, slashed, split_params

__all__ = [
    "Replication",
    "given",
    "replicated_model",
    "with_adapters_of",
]


_COUNT = re.compile(r"(?i)(layers?|blocks?|depth)$")
_CONFIG = re.compile(r"(?i)(config|cfg)$")


@dataclasses.dataclass(frozen=True)
class Replication:
    """How a model was made of the layers of a smaller one.

    Attributes:
      original: the smaller model. (In here Flax does not take it for a part of another.)
      layers: for each layer of the larger model, one of the smaller.
      count: attribute of the model that is its number of layers, as `_counts` finds it.
    """

    original: nn.Module
    layers: Layers
    count: Path

    def base(self, rngs: Any, *args: Any, **kwargs: Any) -> Any:
        """First values: those of the smaller model, its layers shared.

        Args:
          rngs: as for ``init``.
          *args: of the method.
          **kwargs: of ``init`` and of the method.
        """
        params = self.original.init(rngs, *args, **kwargs).get("params", {})
        number = _number(self.original, self.count)
        probe = len(self.layers) if number != len(self.layers) else number + 1

        def shapes(model: nn.Module) -> Any:
            return jax.eval_shape(lambda: model.init(rngs, *args, **kwargs).get("params", {}))

        other = shapes(_with_number(self.original, self.count, probe))
        found = _Differences(number, probe)
        found.note(params, other)
        if not found.families and not found.axes:
            raise ValueError(
                f"LoraConfig.layer_replication: {type(self.original).__name__} has the same "
                f"parameters with {'.'.join(self.count)} = {number} and {probe}: that is not its "
                f"number of layers. {_REMEDY}"
            )
        params = with_families(params, found.families, self.layers)
        return with_stacks(params, self.layers, found.axes.get)


_REMEDY = (
    "Build the model with as many layers as the ranges name, lay out its parameters by "
    "`peft.replicate_layers(params, ranges, pattern=...)`, and leave layer_replication out."
)


def replicated_model(model: nn.Module, ranges: Any) -> tuple[nn.Module, Replication]:
    """The model with as many layers as the ranges name, and how it was made.

    The number of layers is the one attribute of the model, or of its ``config`` (an object or a
    dict), that is an integer, no less than the ranges ask for, and named so that its last word is
    ``layers``, ``blocks`` or ``depth`` (``num_layers``, ``n_layer``, ``num_hidden_layers``). The
    given objects are left as they are.

    Raises:
      ValueError: where there is none, or several; or the model is part of another.
    """
    layers = arrangement(ranges)
    found = dict(_counts(model))
    counts = [path for path, number in found.items() if number > max(layers)]
    if len(counts) != 1 or model.parent is not None:
        shown = {".".join(path): number for path, number in found.items()}
        why = f"{len(counts)} of its attributes may be that number, above {max(layers)}: {shown}"
        if model.parent is not None:
            why = "it is part of another module"
        raise ValueError(
            f"LoraConfig.layer_replication builds a {type(model).__name__} of {len(layers)} "
            f"layers, but {why}. {_REMEDY}"
        )
    (count,) = counts
    return _with_number(model, count, len(layers)), Replication(model, layers, count)


# --- The number of layers ------------------------------------------------------------------------


def _counts(model: nn.Module) -> Iterator[tuple[Path, int]]:
    """Attributes that may be numbers of layers, as ``(name,)`` or ``(config's name, name)``."""
    for name, value in _fields(model).items():
        if _is_count(name, value):
            yield (name,), value
        elif _CONFIG.search(name) and not isinstance(value, nn.Module):
            yield from (
                ((name, inner), number)
                for inner, number in _fields(value).items()
                if _is_count(inner, number)
            )


def _fields(owner: Any) -> dict[str, Any]:
    if isinstance(owner, Mapping):
        return {str(key): value for key, value in owner.items()}
    if dataclasses.is_dataclass(owner):
        return {field.name: getattr(owner, field.name, None) for field in dataclasses.fields(owner)}
    return dict(getattr(owner, "__dict__", {}))


def _is_count(name: str, value: Any) -> bool:
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    return whole and _COUNT.search(name) is not None


def _number(model: nn.Module, count: Path) -> int:
    owner: Any = model
    for name in count:
        owner = _fields(owner)[name]
    return int(owner)


def _with_number(model: nn.Module, count: Path, number: int) -> nn.Module:
    """A copy of the model with another number of layers."""
    field, *inner = count
    change: dict[str, Any] = {field: number}
    if inner:
        change = {field: _changed(getattr(model, field), inner[0], number)}
    return model.clone(**change)


def _changed(config: Any, name: str, number: int) -> Any:
    if isinstance(config, Mapping):
        kind: Any = type(config)
        return kind({**config, name: number})
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return dataclasses.replace(config, **{name: number})
    config = copy.deepcopy(config)
    setattr(config, name, number)
    return config


# --- Where the layers lie ------------------------------------------------------------------------


class _Differences:
    """What in a parameter tree depends on the number of layers.

    Attributes:
      families: layers with names of their own.
      axes: from the paths of stacks to the axes of their layers.
    """

    def __init__(self, number: int, other: int) -> None:
        self.numbers = number, other
        self.families: list[Family] = []
        self.axes: dict[Path, int] = {}

    def note(self, tree: Any, other: Any, path: Path = ()) -> None:
        if not is_branch(tree) or not is_branch(other):
            self._note_leaf(tree, other, path)
            return
        ours, theirs = ({str(key): value for key, value in children(t)} for t in (tree, other))
        apart = set(ours) ^ set(theirs)
        if apart:
            self._note_family(tree, other, apart, path)
        for key in ours:
            if key in theirs:
                self.note(ours[key], theirs[key], (*path, key))

    def _note_family(self, tree: Any, other: Any, apart: set[str], path: Path) -> None:
        found = {family.stem: family for family in families(tree) if family.path == ()}
        grown = {family.stem: family for family in families(other) if family.path == ()}
        for stem, family in found.items():
            pair = (len(family.keys), len(grown[stem].keys)) if stem in grown else None
            if pair == self.numbers:
                self.families.append(dataclasses.replace(family, path=path))
                both = {*family.keys.values(), *grown[stem].keys.values()}
                apart = apart - {str(key) for key in both}
        if apart:
            raise ValueError(
                f"LoraConfig.layer_replication: with {self.numbers[1]} layers in place of "
                f"{self.numbers[0]}, '{slashed(path)}' has others than {sorted(apart)}, and not "
                f"by an index from 0 on. {_REMEDY}"
            )

    def _note_leaf(self, leaf: Any, other: Any, path: Path) -> None:
        ours, theirs = (np.shape(jax.tree.leaves(tree)[0]) for tree in (leaf, other))
        if ours == theirs:
            return
        pairs = zip(ours, theirs, strict=False)
        axes = [axis for axis, (n, m) in enumerate(pairs) if n != m]
        if len(ours) != len(theirs) or [(ours[i], theirs[i]) for i in axes] != [self.numbers]:
            raise ValueError(
                f"LoraConfig.layer_replication: '{slashed(path)}' has shape {ours} in a model of "
                f"{self.numbers[0]} layers, and {theirs} in one of {self.numbers[1]}: no stack of "
                f"layers. {_REMEDY}"
            )
        self.axes[path] = axes[0]


# --- First values --------------------------------------------------------------------------------


def given(base: Any, run: Any) -> Callable[..., Any]:
    """A method, for ``init``, of a model whose parameters are there already."""

    def method(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        # Flax writes into the containers that it is given: they are new ones.
        for name, value in jax.tree.map(lambda leaf: leaf, base).items():
            model.put_variable("params", name, value)
        if run is None or isinstance(run, str):
            return getattr(model, run or "__call__")(*args, **kwargs)
        return run(model, *args, **kwargs)

    return method


def with_adapters_of(base: Any, params: Any) -> Any:
    """The base, with the adapters that ``init`` has put beside it."""
    return merge_params(base, split_params(params).lora)

"""What an adapter does to the tensors of a checkpoint, whichever layout that has."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from peft_jax._spec import LoraSpec
from peft_jax._trees import fuse_params
from peft_jax.io.checkpoints.read import Checkpoint, is_float
from peft_jax.io.files.formats import Array
from peft_jax.io.huggingface.pairs import HuggingFaceAdapter, Module

WEIGHTS = ("weight", "kernel", "embedding")
_WINDOW = "hwd"


@dataclasses.dataclass(frozen=True)
class Change:
    """What becomes of a tensor.

    Attributes:
      whole: from the old tensor to the new.
      rows: the same for a slice of its rows, from a start to a stop; None: the tensor is needed as
        a whole.
    """

    whole: Callable[[Array], Array]
    rows: Callable[[Array, int, int], Array] | None = None

    def after(self, before: Change | None) -> Change:
        """Both changes, the other one first."""
        if before is None:
            return self
        first, second = before.rows, self.rows
        if first is None or second is None:
            return Change(lambda old: self.whole(before.whole(old)))
        return Change(
            lambda old: self.whole(before.whole(old)),
            lambda old, start, stop: second(first(old, start, stop), start, stop),
        )


@dataclasses.dataclass(frozen=True)
class Layers:
    """The tensors of a checkpoint by the module that they belong to.

    Attributes:
      checkpoint: with the tensors.
      tensors: from the dotted name of a module to its own tensors: the last part of each name, and
        the name.
    """

    checkpoint: Checkpoint
    tensors: Mapping[str, Mapping[str, str]]

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Layers:
        """The layers of a checkpoint, without the name of a collection (``params``)."""
        paths = {name: checkpoint.path_of(name) for name in checkpoint.names}
        whole = all(path[0] == "params" for path in paths.values())
        layers: dict[str, dict[str, str]] = {}
        for name, path in paths.items():
            layers.setdefault(".".join(path[whole:-1]), {})[path[-1]] = name
        return cls(checkpoint, layers)

    def find(self, module: str) -> Mapping[str, str]:
        """The tensors of a module: ``layers_0`` and ``layers.0`` are one.

        Raises:
          ValueError: where there is none or more than one.
        """
        if module in self.tensors:
            return self.tensors[module]
        alike = self._alike.get(_indexed(module), [])
        if len(alike) != 1:
            close = difflib.get_close_matches(module, self.tensors, 3, 0.0)
            raise ValueError(
                f"The adapter changes {module!r}, and the checkpoint has no such module; close "
                f"names: {close}. Take the checkpoint that the adapter was trained for."
            )
        return self.tensors[alike[0]]

    @functools.cached_property
    def _alike(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for name in self.tensors:
            found.setdefault(_indexed(name), []).append(name)
        return found

    def weight(self, module: str) -> tuple[str, str]:
        """The last part and the name of the weight of a module.

        Raises:
          ValueError: where there is none, or it is stored in few bits.
        """
        tensors = self.find(module)
        leaf = next((leaf for leaf in WEIGHTS if leaf in tensors), None)
        if leaf is None or not is_float(self.checkpoint.dtype(tensors[leaf])):
            raise ValueError(
                f"The adapter changes {module!r}, where lie {sorted(tensors)}, and no weight of "
                f"floats named one of {WEIGHTS}. Weights that are stored in few bits are to be "
                "turned back first, by `peft.dequantize_checkpoint`."
            )
        return leaf, tensors[leaf]


def _indexed(name: str) -> str:
    return re.sub(r"_(\d+)(?=\.|$)", r".\1", name)


def changes_of(adapter: HuggingFaceAdapter, checkpoint: Checkpoint) -> dict[str, Change]:
    """For each tensor that the adapter changes, a function from the old one to the new.

    Raises:
      ValueError: with the module, where adapter and checkpoint do not fit together.
    """
    layers = Layers.of(checkpoint)
    if adapter.config.target_parameters:
        raise ValueError(
            "The adapter has target_parameters, whose place in a checkpoint its file does not "
            "tell. Load it by `peft.load_adapter` with a model, and fuse by `peft.fuse_params`."
        )
    changes: dict[str, Change] = {}
    for name, value in adapter.whole.items():
        place, _, leaf = name.rpartition(".")
        tensor, change = _replacement(layers, place, leaf, value)
        changes[tensor] = change
    in_order = sorted(adapter.modules.values(), key=lambda module: "rows" not in module.arrays)
    for module in in_order:  # rows are replaced before anything is added to them
        leaf, tensor = layers.weight(module.name)
        layout = _layout(module, leaf, checkpoint.shape(tensor), adapter.config.fan_in_fan_out)
        changes[tensor] = layout.after(changes.get(tensor))
        if "bias" in module.arrays:
            own = layers.find(module.name)
            if "bias" not in own:
                raise ValueError(
                    f"The adapter has a bias for {module.name!r}, and the checkpoint has none "
                    "there. A bias is fused into the layer's own: add one of zeros."
                )
            changes[own["bias"]] = _bias(module).after(changes.get(own["bias"]))
    return changes


def _bias(module: Module) -> Change:
    def change(old: Array) -> Array:
        dtype = np.result_type(np.float32, old.dtype if old.dtype == np.float64 else np.float32)
        added = module.scaling * module.arrays["bias"].astype(dtype).reshape(old.shape)
        return (old.astype(dtype) + added.astype(dtype)).astype(old.dtype)

    return Change(change)


def _replacement(layers: Layers, module: str, leaf: str, value: Array) -> tuple[str, Change]:
    """The tensor that a parameter trained in place stands for."""
    tensors = layers.find(module)
    known = {"weight": ("weight", "kernel", "embedding", "scale")}.get(leaf, (leaf,))
    found = next((name for name in known if name in tensors), None)
    if found == "kernel" and leaf == "weight" and value.ndim >= 2:
        value = np.moveaxis(value, (0, 1), (-1, -2))
    if found is None or not _is_same(value.shape, layers.checkpoint.shape(tensors[found])):
        raise ValueError(
            f"The adapter has a whole {leaf!r} of shape {value.shape} for {module!r}, where lie "
            f"{ {name: layers.checkpoint.shape(full) for name, full in tensors.items()} }."
        )
    return tensors[found], Change(lambda old: value.reshape(old.shape).astype(old.dtype))


def _is_same(shape: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Whether a shape is the other, or that with axes joined to one or to two."""
    if len(shape) == 1:
        return math.prod(other) == shape[0]
    return shape == other or (len(shape) == 2 and shape in _splits(other))


def _splits(shape: tuple[int, ...]) -> list[tuple[int, int]]:
    """The shapes of a matrix with the first axes joined, and the others."""
    return [(math.prod(shape[:k]), math.prod(shape[k:])) for k in range(1, len(shape))]


def _layout(module: Module, leaf: str, shape: tuple[int, ...], fan_in_fan_out: bool) -> Change:
    """The change of a weight of this shape."""
    arrays = module.arrays
    if "rows" in arrays:
        return _rows(module, shape)
    a, b = arrays["a"], arrays["b"]
    b = b.reshape(b.shape[:2])
    rank, inputs, outputs = len(a), a.shape[1], len(b)
    letters = _WINDOW[: a.ndim - 2]
    if a.ndim > 2:  # a window: torch's (out, in, ...), Flax's (..., in, out)
        window = a.shape[2:]
        if shape == (outputs, inputs, *window):
            equation = f"i{letters}r,or->oi{letters}"
            return _added(module, np.moveaxis(a, 0, -1), b, equation, shape)
        if shape == (*window, inputs, outputs):
            turned = np.moveaxis(a, (0, 1), (-1, -2))
            return _added(module, turned, b.T, f"{letters}ir,ro->{letters}io", shape)
    else:
        flat = (outputs, inputs)
        is_torch = leaf == "weight" and not module.is_embedding and not fan_in_fan_out
        if shape == flat and (is_torch or inputs != outputs) and leaf == "weight":
            return _added(module, a.T, b, "ir,or->oi", shape)
        if (inputs, outputs) in _splits(shape) and (not is_torch or inputs != outputs):
            return _added(module, a.T, b.T, "ir,ro->io", shape)
    raise ValueError(
        f"The adapter of {module.name!r} (rank {rank}, {inputs} inputs, {outputs} outputs) does "
        f"not fit the {leaf} of shape {shape}. Take the checkpoint that it was trained for."
    )


def _added(module: Module, a: Array, b: Array, equation: str, shape: tuple[int, ...]) -> Change:
    arrays = {"a": a, "b": b}
    variant = "lora"
    if "magnitude" in module.arrays:
        arrays["magnitude"], variant = module.arrays["magnitude"].reshape(-1), "dora"
    spec = LoraSpec("kernel", equation, module.rank, module.scaling, variant=variant)
    if len(shape) == len(spec.letters[2]):
        return fusing(spec, arrays)
    matrix = (a.shape[0], b.shape[1])  # a kernel with some of its axes joined
    change = fusing(spec, arrays).whole
    return Change(lambda old: change(old.reshape(matrix)).reshape(old.shape))


def fusing(spec: LoraSpec, adapter: Mapping[str, Array]) -> Change:
    """The change of a weight by one adapter, and of its rows where they do not depend on others."""

    def change(old: Array) -> Array:
        return fused_layer({"kernel": old, "lora": adapter}, {"lora": spec}, "kernel")

    terms = dict(zip(("a", "b"), spec.letters, strict=False)) | {"magnitude": spec.output_letters}
    first = spec.letters[2][0]
    needs_all = spec.variant == "dora" and first not in spec.output_letters
    if needs_all or spec.stack_axes or spec.equation.startswith("..."):
        return Change(change)

    def rows(old: Array, start: int, stop: int) -> Array:
        own = {
            name: array.take(range(start, stop), terms[name].index(first))
            if first in terms[name]
            else array
            for name, array in adapter.items()
        }
        return fused_layer({"kernel": old, "lora": own}, {"lora": spec}, "kernel")

    return Change(change, rows)


def fused_layer(layer: Mapping[str, Any], specs: Mapping[str, LoraSpec], param: str) -> Array:
    """A parameter of a layer with adapters in it, fused; in float64 if it is."""
    wide = layer[param].dtype == np.float64
    with jax.enable_x64(wide):
        known = jax.tree.map(lambda x: jax.numpy.asarray(x, np.float64 if wide else None), layer)
        return np.asarray(fuse_params(known, specs=specs)[param])


def _rows(module: Module, shape: tuple[int, ...]) -> Change:
    rows, tokens = module.arrays["rows"], list(module.tokens)
    if len(shape) != 2 or rows.shape[1:] != shape[1:] or max(tokens) >= shape[0]:
        raise ValueError(
            f"The adapter has rows {tokens} of shape {rows.shape} for {module.name!r}, whose "
            f"table has shape {shape}."
        )

    def change(old: Array, start: int = 0, stop: int | None = None) -> Array:
        new = old.copy()
        for place, token in enumerate(tokens):
            if start <= token < (shape[0] if stop is None else stop):
                new[token - start] = rows[place].astype(old.dtype)
        return new

    return Change(change, change)

"""Boxes around parameters: partitioning that carries over, and specs that ride with the arrays."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from flax import struct
from flax.core import meta
from flax.typing import Array, Dtype, Initializer

from peft_jax._equation import stacked
from peft_jax._specs import LoraSpec
from peft_jax._state import record, recording


class SpecBox(struct.PyTreeNode, meta.AxisMetadata[Any]):
    """An array, the spec of its adapter, and the axes along which lifted transforms stacked it."""

    value: Any
    spec: LoraSpec = struct.field(pytree_node=False)
    stack_axes: tuple[int, ...] = struct.field(pytree_node=False, default=())

    def unbox(self) -> Any:
        return self.value

    def replace_boxed(self, val: Any) -> SpecBox:
        return self.replace(value=val)

    def add_axis(self, index: int, params: dict[Any, Any]) -> SpecBox:
        return self.replace(stack_axes=(*self.stack_axes, index))

    def remove_axis(self, index: int, params: dict[Any, Any]) -> SpecBox:
        return self.replace(stack_axes=self.stack_axes[:-1])


def boxed(
    init: Initializer, letters: str, kernel: str, metadata: Any, spec: LoraSpec
) -> Initializer:
    """An initializer whose array carries what is known of it.

    While specs are recorded, that is the spec. Otherwise it is the partitioning of the kernel,
    along the axes (letters) that the array shares with it; boxes that the initializer makes stay.
    """

    def draw(key: Array, shape: tuple[int, ...], dtype: Dtype) -> Any:
        value = init(key, shape, dtype)
        if recording():
            return SpecBox(meta.unbox(value), spec)
        names = getattr(metadata, "names", None)
        if names is None or len(names) != len(kernel) or isinstance(value, meta.AxisMetadata):
            return value
        axes = tuple(names[kernel.index(c)] if c in kernel else None for c in letters)
        return metadata.replace(value=value, names=axes)

    return draw


def traced_specs(init: Callable[..., Any], *given: Any) -> dict[str, LoraSpec]:
    """Specs of the adapters that ``init(*given)`` initializes, found without making an array.

    Args:
      init: from its arguments to a tree of parameters.
      *given: trees. Arrays and ``jax.ShapeDtypeStruct`` are abstract; other leaves pass as
        they are.
    """
    leaves, tree = jax.tree.flatten(given)
    abstract = [_is_array(leaf) for leaf in leaves]

    def run(arrays: list[Any]) -> Any:
        remaining = iter(arrays)
        pairs = zip(leaves, abstract, strict=True)
        filled = [next(remaining) if is_array else leaf for leaf, is_array in pairs]
        return init(*jax.tree.unflatten(tree, filled))

    arrays = [leaf for leaf, is_array in zip(leaves, abstract, strict=True) if is_array]
    with record():
        return _read_specs(jax.eval_shape(run, arrays))


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct)


def _read_specs(params: Mapping[str, Any], prefix: str = "") -> dict[str, LoraSpec]:
    """From the path of each adapter in a recorded tree to its spec."""
    specs: dict[str, LoraSpec] = {}
    for name, value in params.items():
        if isinstance(value, Mapping):
            specs |= _read_specs(value, f"{prefix}{name}/")
        elif isinstance(value, SpecBox) and name == "a":
            specs[prefix[:-1]] = _stacked(value.spec, value.stack_axes)
    return specs


def _stacked(spec: LoraSpec, axes: tuple[int, ...]) -> LoraSpec:
    if not axes:
        return spec
    return dataclasses.replace(spec, equation=stacked(spec.equation), stack_axes=axes)

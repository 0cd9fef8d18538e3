"""Boxes around parameters: partitioning that carries over, and specs that ride with the arrays."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import struct
from flax.core import meta
from flax.typing import Array, Dtype, Initializer

from peft_jax._spec import LoraSpec, stacked
from peft_jax._surgery.active import record, recording
from peft_jax._trees import partitioned_like, split_arrays

__all__ = [
    "SpecBox",
    "boxed",
    "traced_boxes",
    "traced_specs",
]


class SpecBox(struct.PyTreeNode, meta.AxisMetadata[Any]):
    """An array, the spec of its adapter or layer, and the axes along which lifts stacked it."""

    value: Any
    spec: Any = struct.field(pytree_node=False)
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
        fits = len(getattr(metadata, "names", None) or ()) == len(kernel)
        if isinstance(value, meta.AxisMetadata) or not fits:
            return value
        places = [kernel.index(c) if c in kernel else None for c in letters]
        return partitioned_like(metadata, value, places)

    return draw


def traced_specs(init: Callable[..., Any], *given: Any) -> dict[str, LoraSpec]:
    """Specs of the adapters that ``init(*given)`` initializes, by the path of each adapter."""
    places = {path.rpartition("/"): box for path, box in traced_boxes(init, *given).items()}
    return {
        parent: _stacked(box)
        for (parent, _, name), box in places.items()
        if isinstance(box.spec, LoraSpec) and name in ("a", "rows")
    }


def traced_boxes(init: Callable[..., Any], *given: Any) -> dict[str, SpecBox]:
    """What ``init(*given)`` puts into boxes with specs, found without making an array.

    Args:
      init: from its arguments to a tree of parameters.
      *given: trees. Arrays and ``jax.ShapeDtypeStruct`` are abstract; other leaves pass as
        they are.
    """
    arrays, filled = split_arrays(given)
    with record():
        return _boxes(jax.eval_shape(lambda arrays: init(*filled(arrays)), arrays))


def _boxes(params: Mapping[str, Any], prefix: str = "") -> dict[str, SpecBox]:
    """From the path of each recorded array to its box."""
    found: dict[str, SpecBox] = {}
    for name, value in params.items():
        if isinstance(value, Mapping):
            found |= _boxes(value, f"{prefix}{name}/")
        elif isinstance(value, SpecBox):
            found[prefix + name] = value
    return found


def _stacked(box: SpecBox) -> LoraSpec:
    """The spec of a box, with the axes of the stack that its array has."""
    spec, axes = box.spec, box.stack_axes
    if not axes:
        return spec
    array, shape = list(box.value.shape), list(spec.shape or ())
    lengths = [array.pop(axis) for axis in reversed(axes)]
    for axis in axes:  # innermost first, each counted in what is there once it is added
        shape.insert(axis if axis >= 0 else len(shape) + 1 + axis, lengths.pop())
    return dataclasses.replace(
        spec,
        equation=stacked(spec.equation),
        stack_axes=axes,
        shape=tuple(shape) if spec.shape else None,
    )

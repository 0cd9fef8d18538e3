"""A stack of layers that several layers of a larger model share, as a box of Flax's.

A box, so that nothing else has to know: ``nn.scan`` tells boxes when it is about to slice them, and
whoever reads a parameter unboxes it. Sliced is the map of indices; the stack itself is captured by
the loop, as it is.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import serialization
from flax.core import meta

__all__ = [
    "LayerSlice",
    "SharedStack",
    "shared_in",
    "taken",
]


@jax.tree_util.register_pytree_with_keys_class
class SharedStack(meta.AxisMetadata[Any]):
    """A stack of layers, and which of them each layer of a model reads.

    It stands for the longer stack ``stack[layers]``, which `unbox` makes; a lifted transform that
    runs over the layers makes none.

    Attributes:
      value: the stack: an array, `StoredValues`, or a box of either.
      layers: for each layer of the model, an index into the stack.
      axis: along which the stack's layers lie.
    """

    def __init__(self, value: Any, layers: tuple[int, ...], axis: int) -> None:
        self.value = value
        self.layers = layers
        self.axis = axis

    def tree_flatten_with_keys(self) -> tuple[tuple[tuple[Any, Any]], Any]:
        """The stack; which layers read it is no leaf."""
        key = jax.tree_util.GetAttrKey("value")
        return ((key, self.value),), (self.layers, self.axis)

    @classmethod
    def tree_unflatten(cls, aux: Any, children: Any) -> SharedStack:
        """The inverse of flattening."""
        return cls(children[0], *aux)

    def unbox(self) -> Any:
        """The longer stack, in its box if it has one."""
        return jax.tree.map(lambda leaf: taken(leaf, self.layers, self.axis), self.value)

    def replace_boxed(self, val: Any) -> Any:
        """Other values (as `unbox` gives them) are a plain stack of layers of their own."""
        return val

    def remove_axis(self, index: int, params: Any) -> Any:
        """Called by a lifted transform that is about to slice along an axis."""
        axis = index % self._ndim
        if axis == self.axis:
            return LayerSlice(self._indices(index), _Origin(self, index, params))
        stack = meta.remove_axis(self.value, index, params)
        return SharedStack(stack, self.layers, self.axis - (axis < self.axis))

    def add_axis(self, index: int, params: Any) -> Any:
        """The inverse of `remove_axis`, for a lift that went along another axis."""
        stack = meta.add_axis(self.value, index, params)
        return SharedStack(stack, self.layers, self.axis + (index % self._ndim <= self.axis))

    def get_partition_spec(self) -> Any:
        """How the stack is spread over devices: what ``nn.get_partition_spec`` asks for."""
        return nn.get_partition_spec(self.value)

    def get_sharding(self, mesh: jax.sharding.Mesh) -> Any:
        """What ``nn.get_sharding`` asks for."""
        return nn.get_sharding(self.value, mesh)

    @property
    def _ndim(self) -> int:
        return len(np.shape(jax.tree.leaves(self.value)[0]))

    def _indices(self, index: int) -> jax.Array:
        """The map, in a shape that can be sliced along the axis that the stack would be."""
        after, before = (0, index) if index >= 0 else (-index - 1, 0)
        shape = (1,) * before + (len(self.layers),) + (1,) * after
        return jnp.asarray(self.layers, jnp.int32).reshape(shape)

    def __repr__(self) -> str:
        return f"SharedStack({self.value!r}, layers={self.layers}, axis={self.axis})"


class _Origin:
    """Where a slice comes from. It compares by identity, and keeps no array from being freed.

    So functions that were traced with a slice serve for no other, and jit's caches, which hold the
    structure of what they were traced with, hold no tracer.
    """

    def __init__(self, shared: SharedStack, index: int, params: Any) -> None:
        self._shared = weakref.ref(shared)
        self._lift = index, params

    @property
    def shared(self) -> SharedStack:
        shared = self._shared()
        if shared is None:
            raise ValueError("A layer of a shared stack is read after the call that ran on it.")
        return shared

    @property
    def layer(self) -> Any:
        """The stack, in its box as that is inside the lift."""
        return meta.remove_axis(self.shared.value, *self._lift)


@jax.tree_util.register_pytree_node_class
class LayerSlice(meta.AxisMetadata[Any]):
    """One layer of a `SharedStack`, inside the lifted transform that runs over the layers.

    Attributes:
      index: of the layer in the stack, the one leaf.
      origin: the stack.
    """

    def __init__(self, index: Any, origin: _Origin) -> None:
        self.index = index
        self.origin = origin

    def tree_flatten(self) -> tuple[tuple[Any], _Origin]:
        """The index."""
        return (self.index,), self.origin

    @classmethod
    def tree_unflatten(cls, origin: _Origin, children: Any) -> LayerSlice:
        """The inverse of flattening."""
        return cls(children[0], origin)

    def unbox(self) -> Any:
        """The layer's values, in their box if they have one."""
        if getattr(self.index, "dtype", None) != jnp.int32 or self.index.size != 1:
            raise ValueError(
                f"The index of a layer of a shared stack was changed into {self.index!r}: "
                "something computes on parameters in their boxes. Take the boxes off first, by "
                "`flax.linen.meta.unbox`, which writes out the longer stack."
            )
        axis, index = self.origin.shared.axis, jnp.reshape(self.index, ())
        return jax.tree.map(
            lambda leaf: jax.lax.dynamic_index_in_dim(
                leaf, index, axis, keepdims=False, allow_negative_indices=False
            ),
            self.origin.layer,
        )

    def replace_boxed(self, val: Any) -> Any:
        """Other values (as `unbox` gives them) are a layer of its own."""
        return val

    def remove_axis(self, index: int, params: Any) -> Any:
        """A lift inside the layer slices the layer's own values."""
        return meta.remove_axis(self.unbox(), index, params)

    def add_axis(self, index: int, params: Any) -> Any:
        """Outside the lift, it is the shared stack again."""
        return self.origin.shared

    @property
    def slices(self) -> frozenset[tuple[int, ...]]:
        """Shapes of what is sliced to read the layer, and of the slices."""
        shapes = {np.shape(leaf) for leaf in jax.tree.leaves(self.origin.shared.value)}
        axis = self.origin.shared.axis
        return frozenset(shapes | {(*s[:axis], 1, *s[axis + 1 :]) for s in shapes})

    # What a box of partitioning is asked for, beside values.

    @property
    def value(self) -> Any:
        """The stack, in its box if it has one."""
        return self.origin.layer

    @property
    def names(self) -> Any:
        """Names of the axes, where the stack is partitioned."""
        return getattr(self.value, "names", None)

    def replace(self, **fields: Any) -> Any:
        """The stack's own box, with other fields."""
        return self.value.replace(**fields)


def taken(leaf: Any, layers: tuple[int, ...], axis: int) -> Any:
    """Layers of a stack, as a stack."""
    if isinstance(leaf, jax.ShapeDtypeStruct):
        shape = (*leaf.shape[:axis], len(layers), *leaf.shape[axis + 1 :])
        return jax.ShapeDtypeStruct(shape, leaf.dtype)
    if isinstance(leaf, np.ndarray):
        return np.take(leaf, layers, axis)
    return jnp.take(leaf, jnp.asarray(layers, jnp.int32), axis, mode="clip")


def shared_in(params: Any) -> list[Any]:
    """The shared stacks, and layers of such, in a parameter tree."""
    kinds = SharedStack | LayerSlice
    leaves = jax.tree.leaves(params, is_leaf=lambda node: isinstance(node, kinds))
    return [leaf for leaf in leaves if isinstance(leaf, kinds)]


def _to_state(shared: SharedStack) -> dict[str, Any]:
    return {"value": serialization.to_state_dict(shared.value), "layers": np.array(shared.layers)}


def _from_state(shared: SharedStack, state: Mapping[str, Any]) -> SharedStack:
    layers = tuple(np.asarray(state.get("layers", ())).tolist())
    if layers != shared.layers:
        raise ValueError(
            f"A shared stack read as the layers {shared.layers} cannot be restored from one that "
            f"is read as {layers}. Restore into parameters that were replicated by the same ranges."
        )
    value = serialization.from_state_dict(shared.value, state["value"])
    return SharedStack(value, shared.layers, shared.axis)


serialization.register_serialization_state(SharedStack, _to_state, _from_state)

"""Where arrays lie on devices, and where arrays made of them shall lie."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from peft_jax._numerics.jax_internals import is_traced

__all__ = [
    "named_sharding",
    "sharded_like",
    "spread_axes",
    "without_explicit_axes",
]


def named_sharding(x: Any) -> NamedSharding | None:
    """How an array is spread over named axes of devices, if it is and can be told."""
    if is_traced(x) or not isinstance(x, jax.Array):
        return None
    return x.sharding if isinstance(x.sharding, NamedSharding) else None


def sharded_like(sharding: NamedSharding, shape: Sequence[int]) -> NamedSharding:
    """The same sharding, without the axes whose lengths the devices do not divide."""
    names = [*sharding.spec, *[None] * (len(shape) - len(sharding.spec))]
    kept = [
        name if length % _parts(sharding, name) == 0 else None
        for length, name in zip(shape, names, strict=True)
    ]
    return NamedSharding(sharding.mesh, PartitionSpec(*kept), memory_kind=sharding.memory_kind)


def _parts(sharding: NamedSharding, name: Any) -> int:
    """Over how many devices an axis is spread."""
    axes = () if name is None else name if isinstance(name, tuple) else (name,)
    return int(np.prod([sharding.mesh.shape[axis] for axis in axes], dtype=int))


def spread_axes(x: Any) -> list[int]:
    """The axes of an array that are spread over several devices."""
    sharding = named_sharding(x)
    if sharding is None:
        return []
    return [i for i, name in enumerate(sharding.spec) if _parts(sharding, name) > 1]


def without_explicit_axes(*arrays: Any) -> tuple[tuple[Any, ...], Callable[[Any], Any]]:
    """The same arrays, where XLA may lay out intermediate results, and the way back for what comes.

    On a mesh with explicit axes no axis may be cut into blocks that the devices do not divide.
    """
    shardings = [named_sharding(array) for array in arrays]
    meshes = [sharding.mesh for sharding in shardings if sharding is not None]
    mesh = next((mesh for mesh in meshes if AxisType.Explicit in mesh.axis_types), None)
    if not isinstance(mesh, Mesh):
        return arrays, lambda array: array
    auto = Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))

    def moved(array: Any, to: Mesh) -> Any:
        sharding = named_sharding(array)
        if sharding is None:
            return array
        spec, kind = sharding.spec, sharding.memory_kind
        return jax.device_put(array, NamedSharding(to, spec, memory_kind=kind))

    return tuple(moved(array, auto) for array in arrays), lambda array: moved(array, mesh)

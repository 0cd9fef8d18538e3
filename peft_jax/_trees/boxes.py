"""Boxes around parameters: partitioning that carries over to what lies beside them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from flax.core import meta

__all__ = [
    "partitioned_like",
    "reboxed",
    "scale_axes",
]


def partitioned_like(box: Any, value: Any, places: Sequence[int | None]) -> Any:
    """An array in a box that spreads it over devices as the box of a kernel does.

    Args:
      box: of the kernel; anything without names of axes boxes nothing.
      value: the array.
      places: for each of its axes the kernel's, or None for one that is not spread.
    """
    names = getattr(box, "names", None)
    if names is None or any(place is not None and place >= len(names) for place in places):
        return value
    axes = tuple(None if place is None else names[place] for place in places)
    return box.replace(value=value, names=axes)


def scale_axes(weight: Sequence[int], scale: Sequence[int]) -> list[int | None]:
    """For each axis of a scale, the weight's axis that it is spread like, for `partitioned_like`.

    An axis of blocks is not spread: whether the devices divide it depends on the mesh.
    """
    pairs = enumerate(zip(weight, scale, strict=True))
    return [axis if n == m > 1 else None for axis, (n, m) in pairs]


def reboxed(box: Any, value: Any) -> Any:
    """A value, of whatever kind, in the place of the one in a box; itself where there is no box."""
    if not isinstance(box, meta.AxisMetadata):
        return value
    return box.replace_boxed(reboxed(getattr(box, "value", None), value))

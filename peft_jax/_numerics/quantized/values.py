"""Values that are stored in few bits: a node of parameter trees, told by its leaf's name."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from peft_jax._numerics.quantized.methods import METHODS, Method

__all__ = [
    "Layout",
    "StoredValues",
    "as_stored",
    "halves",
    "pack",
    "unpack",
    "weight_shape",
]


Array = jax.Array

_LEAF = re.compile(r"(?P<method>[a-z][a-z0-9_]*?)(?:_axis(?P<axis>-?\d+)_len(?P<length>\d+))?")


@dataclasses.dataclass(frozen=True)
class Layout:
    """How values lie in their array; the name of the leaf in a parameter tree.

    Two values of four bits share a byte: along the packed axis of length ``n``, the low bits of
    place ``i`` hold value ``i`` and the high bits value ``i + ceil(n / 2)``. Where ``n`` is odd,
    the last high bits are empty. The name is ``method`` for values of a byte each and
    ``method_axis-2_len64`` for packed ones.

    Attributes:
      method: a row of the table of methods.
      axis: the packed axis, counted from the end, or from the front where it is not negative (the
        layer is stacked along a later axis: slices of the stack keep their meaning so too). None:
        a byte holds one value.
      length: the number of values along the packed axis.
    """

    method: str
    axis: int | None = None
    length: int | None = None

    def __str__(self) -> str:
        packed = "" if self.axis is None else f"_axis{self.axis}_len{self.length}"
        return self.method + packed

    @property
    def row(self) -> Method:
        """The row of the table of methods."""
        if self.method not in METHODS:
            raise ValueError(
                f"Values are stored as {self.method!r}, which is no method known here: "
                f"{sorted(METHODS)}."
            )
        return METHODS[self.method]

    @property
    def odd(self) -> bool:
        """Whether the last high bits are empty."""
        return self.length is not None and self.length % 2 == 1

    def shape(self, packed: Sequence[int]) -> tuple[int, ...]:
        """The shape of the values, for an array of this shape."""
        shape = list(packed)
        if self.axis is None or self.length is None:
            return tuple(shape)
        inside = -len(shape) <= self.axis < len(shape)
        if not inside or shape[self.axis] != -(-self.length // 2):
            raise ValueError(
                f"Stored values named '{self}' lie in an array of shape {tuple(shape)}, which "
                f"does not hold {self.length} values along axis {self.axis}: it was cut along the "
                "packed axis, or stacked along an axis that the name does not allow for. "
                "Quantize stacked layers by `peft.quantize_checkpoint` with specs, and spread "
                "packed weights over devices by shardings."
            )
        shape[self.axis] = self.length
        return tuple(shape)


@functools.lru_cache(maxsize=256)
def _parse(name: str) -> Layout | None:
    found = _LEAF.fullmatch(name)
    if found is None or found["method"] not in METHODS:
        return None
    if found["axis"] is None:
        return Layout(found["method"])
    return Layout(found["method"], int(found["axis"]), int(found["length"]))


@jax.tree_util.register_pytree_with_keys_class
class StoredValues:
    """Quantized values: a node of a parameter tree with one leaf, named by its `Layout`.

    Not an array: a module that does not know of it fails rather than to compute on packed bits.
    `peft.dequantize` gives the weight that it stands for, together with its scale.

    Attributes:
      layout: how the values lie in ``array``.
      array: the stored bits, int8 or uint8.
    """

    def __init__(self, layout: Layout, array: Any) -> None:
        self.layout = layout
        self.array = array

    @property
    def method(self) -> str:
        """The name of the method that made the values."""
        return self.layout.method

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the values: that of the weight."""
        return self.layout.shape(self.array.shape)

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return len(self.array.shape)

    @property
    def size(self) -> int:
        """The number of values."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The bytes of the stored array."""
        return math.prod(self.array.shape) * self.array.dtype.itemsize

    def tree_flatten_with_keys(self) -> tuple[tuple[tuple[Any, Any]], Layout]:
        """One leaf, under the layout's name: it flattens as a dict does."""
        return ((jax.tree_util.DictKey(str(self.layout)), self.array),), self.layout

    @classmethod
    def tree_unflatten(cls, layout: Layout, children: Sequence[Any]) -> StoredValues:
        """The inverse of flattening."""
        return cls(layout, children[0])

    def __repr__(self) -> str:
        if not hasattr(self.array, "shape"):
            return f"StoredValues({str(self.layout)!r}, {self.array!r})"
        held = f"{self.array.dtype}{list(self.array.shape)}"
        return f"StoredValues({self.layout}, {held})"

    def __jax_array__(self) -> Array:
        raise ValueError(self._refusal())

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        raise ValueError(self._refusal())

    def _refusal(self) -> str:
        return (
            f"{_reader()} reads stored {self.method} values as if they were an array. Wrap the "
            "layer (`peft.Int4Dense(wrapped=..., method=...)` and the like, by "
            "`peft.ModuleInterceptor` for models that are there already), or turn the parameters "
            "back by `peft.dequantize_checkpoint`."
        )


def _reader() -> str:
    """Which module is running, for an error message; the frames of the call know."""
    for frame in _frames():
        module = frame.f_locals.get("self")
        place = getattr(getattr(module, "scope", None), "path", None)
        if isinstance(place, tuple) and hasattr(module, "apply"):
            path = "/".join(place) or "(the model itself)"
            return f"{type(module).__name__} at '{path}'"
    return "Something"


def _frames() -> Iterator[Any]:
    frame = inspect.currentframe()
    while frame is not None:
        yield frame
        frame = frame.f_back


def as_stored(value: Any) -> StoredValues | None:
    """Stored values, also where a checkpoint was read back as plain dicts; None for others."""
    if isinstance(value, StoredValues):
        return value
    if not isinstance(value, Mapping) or len(value) != 1:
        return None
    ((name, array),) = value.items()
    layout = _parse(name) if isinstance(name, str) else None
    if layout is None or getattr(array, "dtype", None) not in (jnp.int8, jnp.uint8):
        return None
    return StoredValues(layout, array)


def weight_shape(value: Any) -> tuple[int, ...]:
    """The shape of a weight, whether it is stored in few bits or not."""
    stored = as_stored(value)
    return jnp.shape(value) if stored is None else stored.shape


def pack(codes: Array, axis: int) -> Array:
    """Puts two codes of four bits into each byte; see `Layout`.

    Args:
      codes: int32 from 0 to 15.
      axis: the packed axis.

    Returns:
      uint8, half as long along the axis.
    """
    axis, length = axis % codes.ndim, codes.shape[axis]
    if length % 2:
        codes = jnp.pad(codes, [(0, i == axis) for i in range(codes.ndim)])
    halves = codes.reshape(*codes.shape[:axis], 2, -(-length // 2), *codes.shape[axis + 1 :])
    places = jnp.array([1, 16], jnp.int32).reshape([1] * axis + [2] + [1] * (codes.ndim - axis))
    # As a sum, XLA on CPU computes every code once and in vectors; slices it would compute apart.
    return jnp.sum(halves * places, axis=axis).astype(jnp.uint8)


def unpack(array: Array, layout: Layout) -> Array:
    """The codes in an array of this layout."""
    if layout.axis is None:
        return array
    axis = layout.axis % array.ndim
    codes = jnp.concatenate(halves(array), axis=axis)
    return jax.lax.slice_in_dim(codes, 0, layout.shape(array.shape)[axis], axis=axis)


def halves(array: Array) -> tuple[Array, Array]:
    """The low and the high codes of packed bytes."""
    return array & 15, array >> 4

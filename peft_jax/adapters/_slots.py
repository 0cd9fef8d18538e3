"""How the adapters of one layer lie in a bank."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta

from peft_jax._matrices import padded, rank_letter
from peft_jax._specs import LoraSpec
from peft_jax._stacked import stack_back, stack_first

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Slots:
    """Arrays of one layer with an axis of slots, one for each adapter.

    The axis stands in front of the layer's own axes, behind those of a stack as `stack_first` has
    them; `stack_back` then brings those to where ``nn.scan`` looks for them.

    Attributes:
      spec: of the adapters, but for what each has of its own (variant, scaling, bias); the rank is
        the largest.
      stack: lengths of the axes along which the layer is stacked, outermost first.
      sizes: length of each of the layer's axes, by its letter.
    """

    spec: LoraSpec
    stack: tuple[int, ...]
    sizes: tuple[tuple[str, int], ...]

    @classmethod
    def of(cls, spec: LoraSpec, a: Any, b: Any) -> Slots:
        """For adapters like the one that has these arrays, or arrays of these shapes."""
        a, b = meta.unbox(a), meta.unbox(b)
        depth = np.ndim(a) - len(spec.letters[0])
        axes = spec.stack_axes or (0,) * depth
        firsts = [jax.eval_shape(lambda leaf: stack_first(leaf, axes), leaf) for leaf in (a, b)]
        sizes: dict[str, int] = {}
        for letters, first in zip(spec.letters, firsts, strict=False):
            sizes |= zip(letters, first.shape[depth:], strict=True)
        del sizes[rank_letter(spec)]
        return cls(spec, firsts[0].shape[:depth], tuple(sorted(sizes.items())))

    @property
    def axes(self) -> tuple[int, ...]:
        """As in `LoraSpec`, and said even where the stack is in front."""
        return self.spec.stack_axes or (0,) * len(self.stack)

    def letters(self, leaf: str) -> str:
        """The axes of one of the layer's arrays."""
        own = {"a": self.spec.letters[0], "b": self.spec.letters[1]}
        return own.get(leaf, self.spec.output_letters)

    def shape(self, leaf: str) -> tuple[int, ...]:
        """Of one adapter's array: (*stack, *layer)."""
        sizes = {**dict(self.sizes), rank_letter(self.spec): self.spec.rank}
        return self.stack + tuple(sizes[letter] for letter in self.letters(leaf))

    def put(self, leaf: str, value: Any) -> Array:
        """One adapter's array as an entry, padded along the rank: (*stack, *layer).

        Raises:
          ValueError: where it is not of the layer's shape.
        """
        array = stack_first(jnp.asarray(meta.unbox(value)), self.axes)
        rank = self._rank_axis(leaf)
        if rank is not None and array.shape[rank] <= self.spec.rank:
            array = padded(array, self.spec.rank, rank)
        if array.shape != self.shape(leaf):
            raise ValueError(f"an array {leaf!r} of shape {np.shape(meta.unbox(value))}")
        return array

    def taken(self, leaf: str, array: Array, slot: int, rank: int) -> Array:
        """The array of the adapter in a slot; inverse of `put`."""
        place = (slice(None),) * len(self.stack) + (slot,)
        entry, axis = stack_first(array, self.axes)[place], self._rank_axis(leaf)
        if axis is not None:
            entry = jax.lax.slice_in_dim(entry, 0, rank, axis=axis)
        return stack_back(entry, self.axes)

    def stacked(self, entries: Sequence[Array]) -> Array:
        """The bank's array of these entries, one for each slot."""
        return stack_back(jnp.stack(entries, axis=len(self.stack)), self.axes)

    def replaced(self, array: Array, slot: int, entry: Array) -> Array:
        """The bank's array with another entry in a slot."""
        place = (slice(None),) * len(self.stack) + (slot,)
        first = stack_first(array, self.axes).at[place].set(entry.astype(array.dtype))
        return stack_back(first, self.axes)

    def everywhere(self, values: Any) -> Array:
        """Values that all layers of the stack share, laid out so that a lift brings them to each.

        They have as many axes as ``a`` in the bank, since a stack axis may stand at any of those.
        """
        values = jnp.reshape(values, (-1,) + (1,) * len(self.spec.letters[0]))
        return stack_back(jnp.broadcast_to(values, self.stack + values.shape), self.axes)

    def slot_axis(self, ndim: int) -> int:
        """Which axis of an array of the bank is that of the slots."""
        order = list(range(ndim))
        for front, axis in enumerate(reversed(self.axes)):
            order.insert(front, order.pop(front + axis % (ndim - front)))
        return order[len(self.stack)]

    def _rank_axis(self, leaf: str) -> int | None:
        if leaf not in ("a", "b"):
            return None
        return len(self.stack) + self.letters(leaf).index(rank_letter(self.spec))

"""An adapter's arrays as the pairs of matrices that llama.cpp multiplies by, and back."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from peft_jax._matrices import MatrixView, rank_letter
from peft_jax._specs import LoraSpec

Array = np.ndarray[Any, Any]
Sizes = Mapping[str, int]


@dataclasses.dataclass(frozen=True)
class PairLayout:
    """How ``a`` and ``b`` become matrices ``(in, r)`` and ``(r, out)``.

    A batch axis stands in ``a`` and in ``b``, or in ``a`` and in the layer's output: then all its
    matrices share ``b``. Axes of a group are joined in the order of the kernel.

    Attributes:
      spec: of the adapter.
      sizes: the length of each axis, by its letter; the rank's too.
      stack: lengths of the axes along which the layer is stacked, outermost first.
    """

    spec: LoraSpec
    sizes: Sizes
    stack: tuple[int, ...]

    @classmethod
    def of_arrays(cls, spec: LoraSpec, a: Array, b: Array) -> PairLayout:
        """The layout of these arrays.

        Raises:
          ValueError: where they do not fit the spec.
        """
        depths = [x.ndim - len(term) for x, term in zip((a, b), spec.letters, strict=False)]
        depth = depths[0]
        fits = depth == len(spec.stack_axes) if spec.stack_axes else depth >= 0
        if depth != depths[1] or not fits or (depth and not spec.equation.startswith("...")):
            raise ValueError("their numbers of axes differ from the equation's")
        axes = spec.stack_axes or (0,) * depth
        shapes = [_stack_first(x, axes).shape for x in (a, b)]
        sizes: dict[str, int] = {}
        for shape, term in zip(shapes, spec.letters, strict=False):
            for letter, length in zip(term, shape[depth:], strict=True):
                if sizes.setdefault(letter, length) != length:
                    raise ValueError(f"the axis '{letter}' has two lengths")
        if shapes[0][:depth] != shapes[1][:depth]:
            raise ValueError("they have stacks of two lengths")
        layout = cls(spec, sizes, shapes[0][:depth])
        if spec.shape is not None:
            view = MatrixView.of(spec, spec.shape)
            if any(sizes[c] != n for c, n in view.sizes.items()) or view.stack != layout.stack:
                raise ValueError(f"the adapted parameter has the shape {spec.shape}")
        return layout

    @classmethod
    def of_shape(cls, spec: LoraSpec, shape: Sequence[int]) -> PairLayout:
        """The layout for a parameter of this shape."""
        view = MatrixView.of(spec, shape)
        return cls(spec, {**view.sizes, rank_letter(spec): spec.rank}, view.stack)

    @property
    def rank(self) -> int:
        """The length of the rank's axis."""
        return self.sizes[rank_letter(self.spec)]

    @property
    def groups(self) -> tuple[str, str, str]:
        """Letters of the batch, of the inputs and of the outputs."""
        a, b, kernel = self.spec.letters
        batched = {*b, *self.spec.output_letters}
        batch = "".join(c for c in kernel if c in a and c in batched)
        inputs = "".join(c for c in kernel if c in a and c not in batch)
        return batch, inputs, "".join(c for c in kernel if c not in a)

    @property
    def lengths(self) -> tuple[int, int, int]:
        """The number of matrices in a batch, of inputs and of outputs."""
        batch, inputs, outputs = (math.prod(self.shape(group)) for group in self.groups)
        return batch, inputs, outputs

    def shape(self, letters: str) -> tuple[int, ...]:
        """The lengths of these axes."""
        return tuple(self.sizes[letter] for letter in letters)

    def pairs(self, a: Array, b: Array) -> tuple[Array, Array]:
        """``(*stack, batch, in, r)`` and ``(*stack, batch, r, out)``."""
        batch, inputs, outputs = self.groups
        rank = rank_letter(self.spec)
        left = self._ordered(a, self.spec.letters[0], (batch, inputs, rank))
        right = self._ordered(b, self.spec.letters[1], (batch, rank, outputs))
        return left, right

    def _ordered(self, x: Array, letters: str, groups: tuple[str, str, str]) -> Array:
        """The axes in groups, each joined; what lacks a batch axis is repeated along it."""
        depth, batch = len(self.stack), groups[0]
        missing = "".join(c for c in batch if c not in letters)
        x = _stack_first(x, self._axes)
        x = np.broadcast_to(x[(..., *(None for _ in missing))], (*x.shape, *self.shape(missing)))
        letters += missing
        order = [depth + letters.index(c) for group in groups for c in group]
        x = x.transpose(*range(depth), *order)
        return x.reshape(*self.stack, *(math.prod(self.shape(group)) for group in groups))

    def arrays(self, left: Array, right: Array) -> tuple[Array, Array]:
        """The inverse of `pairs`.

        Raises:
          ValueError: where matrices differ that share ``b``.
        """
        batch, inputs, outputs = self.groups
        rank = rank_letter(self.spec)
        a = self._back(left, self.spec.letters[0], (batch, inputs, rank))
        b = self._back(right, self.spec.letters[1], (batch, rank, outputs))
        return a, b

    def _back(self, x: Array, letters: str, groups: tuple[str, str, str]) -> Array:
        depth = len(self.stack)
        order = "".join(groups)
        x = x.reshape(*self.stack, *self.shape(order))
        for letter in [c for c in groups[0] if c not in letters]:
            axis = depth + order.index(letter)
            first = x.take([0], axis)
            if not np.array_equal(x, np.broadcast_to(first, x.shape)):
                raise ValueError(f"its matrices differ along the axis '{letter}', which has one b")
            x, order = first.squeeze(axis), order.replace(letter, "")
        x = x.transpose(*range(depth), *(depth + order.index(c) for c in letters))
        return _stack_back(x, self._axes)

    @property
    def _axes(self) -> tuple[int, ...]:
        return self.spec.stack_axes or (0,) * len(self.stack)


# As in `_stacked`, on the host.


def _stack_first(x: Array, axes: tuple[int, ...]) -> Array:
    for front, axis in enumerate(reversed(axes)):
        x = np.moveaxis(x, front + axis % (x.ndim - front), front)
    return x


def _stack_back(x: Array, axes: tuple[int, ...]) -> Array:
    for front, axis in reversed(list(enumerate(reversed(axes)))):
        x = np.moveaxis(x, front, front + axis % (x.ndim - front))
    return x


def permuted(rows: Array, heads: int | None, name: str, *, back: bool = False) -> Array:
    """Rows of each head in llama.cpp's order for its rotary embedding; as they are without heads.

    The order is ``0, d/2, 1, d/2 + 1, ...`` in a head of ``d`` rows: the two halves of a head,
    whose numbers are rotated in pairs, lie by turns.

    Args:
      rows: ``(out, r)``.
      heads: among which the rows are divided.
      name: of the tensor, for error messages.
      back: whether to undo it.
    """
    if heads is None:
        return rows
    if len(rows) % (2 * heads):
        raise ValueError(
            f"permute_heads gives {name!r} {heads} heads, but its {len(rows)} rows are not so many "
            "pairs. Give the number of heads that the tensor has (of keys, for attn_k)."
        )
    parts = (-1, 2) if back else (2, len(rows) // heads // 2)
    return rows.reshape(heads, *parts, rows.shape[-1]).swapaxes(1, 2).reshape(rows.shape)

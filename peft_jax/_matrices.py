"""The matrices inside the kernel of an adapter, and the arrays of the adapter made of matrices."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from peft_jax._low_rank import matricize, unmatricize
from peft_jax._specs import LoraSpec
from peft_jax._stacked import stack_back, stack_first

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class MatrixView:
    """A kernel as matrices ``(stack, batch, in, out)``, one for each layer and each batch index.

    Attributes:
      spec: of the adapter.
      stack: lengths of the axes along which the layer is stacked, outermost first.
      shape: of one layer's kernel.
    """

    spec: LoraSpec
    stack: tuple[int, ...]
    shape: tuple[int, ...]

    @classmethod
    def of(cls, spec: LoraSpec, shape: Sequence[int]) -> MatrixView:
        """The view of a kernel of this shape.

        Raises:
          ValueError: where the shape does not fit the spec.
        """
        depth = len(shape) - len(spec.letters[2])
        fits = depth == len(spec.stack_axes) if spec.stack_axes else depth >= 0
        if not fits or (depth and not spec.equation.startswith("...")):
            raise ValueError(
                f"A kernel of shape {tuple(shape)} does not fit the equation '{spec.equation}' "
                f"(stack axes {spec.stack_axes}). Give the specs of this model."
            )
        first = _stacked_first(shape, spec.stack_axes or (0,) * depth)
        return cls(spec, first[:depth], first[depth:])

    @property
    def stack_axes(self) -> tuple[int, ...]:
        """As in `LoraSpec`, and said even where the stack is in front."""
        return self.spec.stack_axes or (0,) * len(self.stack)

    @property
    def sizes(self) -> dict[str, int]:
        """The length of each axis of the kernel, by its letter."""
        return dict(zip(self.spec.letters[2], self.shape, strict=True))

    @property
    def matrix_shape(self) -> tuple[int, int, int, int]:
        """``(stack, batch, in, out)``, each the product of its axes' lengths."""
        batch, rows, columns = (
            math.prod(self.shape[axis] for axis in axes) for axes in self.spec.matrix_axes
        )
        return math.prod(self.stack), batch, rows, columns

    def matrices(self, kernel: Array) -> Array:
        """The kernel's matrices."""
        batch, rows, columns = self.spec.matrix_axes
        flat = stack_first(kernel, self.stack_axes).reshape((-1, *self.shape))
        return jax.vmap(lambda one: matricize(one, rows, columns, batch))(flat)

    def restacked(self, flat: Array) -> Array:
        """An array with one axis of layers in front, stacked as the kernel is."""
        return stack_back(flat.reshape(self.stack + flat.shape[1:]), self.stack_axes)

    def factors(self, a: Array, b: Array) -> tuple[Array, Array]:
        """Factors ``(stack, batch, in, r)`` and ``(stack, batch, r, out)`` as the spec has them."""
        letters_a, letters_b, kernel = self.spec.letters
        rank = rank_letter(self.spec)
        sizes = self.sizes | {rank: a.shape[-1]}

        def laid_out(factor: Array, letters: str, rank_last: bool) -> Array:
            order = sorted((c for c in letters if c != rank), key=kernel.index)
            batch = tuple(letters.index(c) for c in order if c in letters_a and c in letters_b)
            rest = tuple(letters.index(c) for c in order if letters.index(c) not in batch)
            own = (letters.index(rank),)
            rows, columns = (rest, own) if rank_last else (own, rest)
            shape = tuple(sizes[c] for c in letters)
            return jax.vmap(lambda one: unmatricize(one, shape, rows, columns, batch))(factor)

        left, right = laid_out(a, letters_a, True), laid_out(b, letters_b, False)
        return self.restacked(left), self.restacked(right)

    def places(self, letters: str) -> list[int | None]:
        """For each axis of a stacked array with these letters, the kernel's axis of its name."""
        kernel = self._axes(self.spec.letters[2])
        return [kernel.index(axis) if axis in kernel else None for axis in self._axes(letters)]

    def _axes(self, letters: str) -> list[str | int]:
        """The letter of each axis of a stacked array, and a number for an axis of the stack."""
        axes: list[str | int] = [*range(len(self.stack)), *letters]
        count = len(axes)
        for front, axis in reversed(list(enumerate(reversed(self.stack_axes)))):
            axes.insert(front + axis % (count - front), axes.pop(front))
        return axes


def rank_letter(spec: LoraSpec) -> str:
    """The letter of the axis that ``a`` and ``b`` alone share."""
    a, b, kernel = spec.letters
    (letter,) = (set(a) & set(b)) - set(kernel)
    return letter


def padded(array: Array, length: int, axis: int) -> Array:
    """The array with zeros behind it along an axis, up to a length."""
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, length - array.shape[axis])
    return jnp.pad(array, widths)


def _stacked_first(shape: Sequence[int], axes: tuple[int, ...]) -> tuple[int, ...]:
    """The shape after `stack_first`."""
    lengths = list(shape)
    for front, axis in enumerate(reversed(axes)):
        lengths.insert(front, lengths.pop(front + axis % (len(lengths) - front)))
    return tuple(lengths)

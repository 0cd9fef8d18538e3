"""The matrices inside the kernel of an adapter, and the arrays of the adapter made of matrices."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from peft_jax._numerics.low_rank import matricize, unmatricize
from peft_jax._spec import LoraSpec

__all__ = [
    "HostArray",
    "MatrixView",
    "PairLayout",
    "Slots",
    "adapter_shapes",
    "layer_axes",
    "padded",
    "permuted",
    "rank_letter",
    "stack_back",
    "stack_first",
]


Array = jax.Array


def stack_first(array: Array, axes: tuple[int, ...]) -> Array:
    """Move the stack axes to the front, outermost first; see `stack_back`.

    Args:
        array: An array of stacked layers.
        axes: The axes that were added, innermost first, each counted in the array it was added to.
    """
    for front, axis in enumerate(reversed(axes)):
        array = jnp.moveaxis(array, front + axis % (array.ndim - front), front)
    return array


def stack_back(array: Array, axes: tuple[int, ...]) -> Array:
    """Move the stack axes back to their places: the inverse of `stack_first`."""
    for front, axis in reversed(list(enumerate(reversed(axes)))):
        array = jnp.moveaxis(array, front, front + axis % (array.ndim - front))
    return array


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


def layer_axes(ndim: int, axes: tuple[int, ...]) -> list[int]:
    """Positions of the layer's own axes in an array of stacked layers; see `stack_first`."""
    order = list(range(ndim))
    for front, axis in enumerate(reversed(axes)):
        order.insert(front, order.pop(front + axis % (ndim - front)))
    return order[len(axes) :]


def adapter_shapes(spec: LoraSpec, kernel: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """Shapes of `a` and `b` for a kernel of this shape, stack axes in front (see `stack_first`)."""
    a, b, letters = spec.letters
    stack = len(kernel) - len(letters)
    sizes = dict(zip(letters, kernel[stack:], strict=True))
    return tuple(
        kernel[:stack] + tuple(sizes.get(letter, spec.rank) for letter in term) for term in (a, b)
    )


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
        array = stack_first(jnp.asarray(value), self.axes)
        rank = self._rank_axis(leaf)
        if rank is not None and array.shape[rank] <= self.spec.rank:
            array = padded(array, self.spec.rank, rank)
        if array.shape != self.shape(leaf):
            raise ValueError(f"an array {leaf!r} of shape {np.shape(value)}")
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


HostArray = np.ndarray[Any, Any]

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
    def of_arrays(cls, spec: LoraSpec, a: HostArray, b: HostArray) -> PairLayout:
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
        shapes = [_host_stack_first(x, axes).shape for x in (a, b)]
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

    def pairs(self, a: HostArray, b: HostArray) -> tuple[HostArray, HostArray]:
        """``(*stack, batch, in, r)`` and ``(*stack, batch, r, out)``."""
        batch, inputs, outputs = self.groups
        rank = rank_letter(self.spec)
        left = self._ordered(a, self.spec.letters[0], (batch, inputs, rank))
        right = self._ordered(b, self.spec.letters[1], (batch, rank, outputs))
        return left, right

    def _ordered(self, x: HostArray, letters: str, groups: tuple[str, str, str]) -> HostArray:
        """The axes in groups, each joined; what lacks a batch axis is repeated along it."""
        depth, batch = len(self.stack), groups[0]
        missing = "".join(c for c in batch if c not in letters)
        x = _host_stack_first(x, self._axes)
        x = np.broadcast_to(x[(..., *(None for _ in missing))], (*x.shape, *self.shape(missing)))
        letters += missing
        order = [depth + letters.index(c) for group in groups for c in group]
        x = x.transpose(*range(depth), *order)
        return x.reshape(*self.stack, *(math.prod(self.shape(group)) for group in groups))

    def arrays(self, left: HostArray, right: HostArray) -> tuple[HostArray, HostArray]:
        """The inverse of `pairs`.

        Raises:
          ValueError: where matrices differ that share ``b``.
        """
        batch, inputs, outputs = self.groups
        rank = rank_letter(self.spec)
        a = self._back(left, self.spec.letters[0], (batch, inputs, rank))
        b = self._back(right, self.spec.letters[1], (batch, rank, outputs))
        return a, b

    def _back(self, x: HostArray, letters: str, groups: tuple[str, str, str]) -> HostArray:
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
        return _host_stack_back(x, self._axes)

    @property
    def _axes(self) -> tuple[int, ...]:
        return self.spec.stack_axes or (0,) * len(self.stack)


# `stack_first` and `stack_back`, on the host.


def _host_stack_first(x: HostArray, axes: tuple[int, ...]) -> HostArray:
    for front, axis in enumerate(reversed(axes)):
        x = np.moveaxis(x, front + axis % (x.ndim - front), front)
    return x


def _host_stack_back(x: HostArray, axes: tuple[int, ...]) -> HostArray:
    for front, axis in reversed(list(enumerate(reversed(axes)))):
        x = np.moveaxis(x, front, front + axis % (x.ndim - front))
    return x


def permuted(rows: HostArray, heads: int | None, name: str, *, back: bool = False) -> HostArray:
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

"""Layers stacked by a lifted transform: their axes, and the change of their kernels."""

import jax
import jax.numpy as jnp

from peft_jax._low_rank import delta
from peft_jax._specs import LoraSpec

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


def spec_delta(a: Array, b: Array, spec: LoraSpec) -> Array:
    """What an adapter adds to its kernel, stacked as the kernel is; see `delta`."""
    a, b = stack_first(a, spec.stack_axes), stack_first(b, spec.stack_axes)
    return stack_back(delta(a, b, spec.equation, spec.scaling), spec.stack_axes)

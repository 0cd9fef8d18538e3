"""The decomposition of DoRA, a weight as magnitude and direction: arrays only.

``W' = m * (W + D) / n`` with ``n = ||W + D||`` over all axes of the weight but its outputs
(https://arxiv.org/abs/2402.09353, section 4; as in section 4.3, ``n`` has no gradient). Axes are
named by letters; further axes in front, of stacked layers, are passed through.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from peft_jax._numerics.einsum import widest
from peft_jax._numerics.quantized import Weight, map_pieces, weight_einsum

__all__ = [
    "adapted_norms",
    "along",
    "decomposed_change",
    "gains",
    "norms",
]


Array = jax.Array


def norms(weight: Array | Weight, letters: str, outputs: str) -> Array:
    """The norm of the weight for each of its outputs.

    Args:
        weight: axes named by `letters`, after those of a stack.
        letters: such as `io`.
        outputs: letters of the axes that are kept, in the order of the result.

    Returns:
        An array in float32 or wider: the stack's axes, then the `outputs`.
    """
    return jnp.sqrt(_squares(weight, letters, outputs))


def _squares(weight: Array | Weight, letters: str, outputs: str) -> Array:
    def of(array: Array) -> Array:
        return _summed(jnp.square(array.astype(widest(array.dtype))), letters, outputs)

    if not isinstance(weight, Weight):
        return of(weight)
    pieces, axis = map_pieces(of, weight)
    if letters[axis] not in outputs:
        return jnp.sum(pieces, axis=0)
    place = outputs.index(letters[axis])
    pieces = jnp.moveaxis(pieces, 0, place)
    return pieces.reshape((*pieces.shape[:place], -1, *pieces.shape[place + 2 :]))


def _summed(array: Array, letters: str, outputs: str) -> Array:
    """The sum over all axes that have letters but the `outputs`, in the order of those."""
    summed = tuple(i - len(letters) for i, c in enumerate(letters) if c not in outputs)
    array = jnp.sum(array, axis=summed)
    kept = [c for c in letters if c in outputs]
    stack = array.ndim - len(kept)
    return array.transpose((*range(stack), *(stack + kept.index(c) for c in outputs)))


def adapted_norms(
    weight: Array | Weight,
    a: Array,
    b: Array,
    delta: str,
    scaling: float | Array,
    outputs: str,
) -> Array:
    """`norms` of ``W + scaling * a·b`` without forming it; not for stacked layers.

    By expansion: ``||W||^2 + 2 s <W, a·b> + s^2 ||a·b||^2``, where ``a`` meets the weight first:
    ``rank`` rows more through the layer's product. No gradient goes through it.

    Args:
        weight: of the layer.
        a: From the input to the rank.
        b: From the rank to the output.
        delta: equation of the change, such as `ir,ro->io`.
        scaling: factor of the change.
        outputs: as for `norms`.
    """
    a, b = jax.lax.stop_gradient((a, b))
    if not isinstance(weight, Weight):
        weight = jax.lax.stop_gradient(weight)
    operands, letters = delta.split("->")
    left, right = operands.split(",")
    (rank,) = (set(left) & set(right)) - set(letters)
    a, b = (array.astype(widest(array.dtype)) for array in (a, b))

    kept = rank + "".join(c for c in letters if c not in left or c in right or c in outputs)
    met = weight_einsum(f"{left},{letters}->{kept}", a, weight)

    other = next(c for c in _UNUSED if c not in delta)
    shared = "".join(c for c in left if c != rank and c in kept)
    gram = jnp.einsum(f"{left},{left.replace(rank, other)}->{shared}{rank}{other}", a, a)
    own = jnp.einsum(f"{shared}{rank}{other},{right.replace(rank, other)}->{kept}", gram, b)

    # <2 s W + s^2 a·b, a·b>, what is left of a product with `a` times `b`.
    terms = (2 * scaling * met.astype(own.dtype) + scaling**2 * own) * along(b, right, kept)
    change = _summed(terms, kept, outputs)
    squares = _squares(weight, letters, outputs).astype(change.dtype)
    return jnp.sqrt(jnp.maximum(jax.lax.stop_gradient(squares + change), 0))


_UNUSED = "qpszyxwvutQPSZYXWVUT"


def gains(magnitude: Array, norms: Array) -> Array:
    """``m / n``, the factor of each output; 1 where the weight has no direction, ``n = 0``."""
    is_zero = norms == 0
    safe = jnp.where(is_zero, 1, norms)
    return jnp.where(is_zero, 1, magnitude.astype(norms.dtype) / safe)


def along(values: Array, letters: str, axes: str) -> Array:
    """Values with axes named by `letters`, to be broadcast against an array with `axes`."""
    ordered = [c for c in axes if c in letters]
    stack = values.ndim - len(letters)
    values = values.transpose((*range(stack), *(stack + letters.index(c) for c in ordered)))
    sizes = dict(zip(ordered, values.shape[stack:], strict=True))
    return values.reshape((*values.shape[:stack], *(sizes.get(c, 1) for c in axes)))


def decomposed_change(
    weight: Array, change: Array, magnitude: Array, letters: str, outputs: str
) -> Array:
    """``m * (W + D) / n - W`` for a change ``D`` of the weight, in float32 or wider."""
    dtype = widest(weight.dtype, change.dtype)
    total = weight.astype(dtype) + change.astype(dtype)
    n = jax.lax.stop_gradient(norms(total, letters, outputs))
    return along(gains(magnitude, n), outputs, letters) * total - weight.astype(dtype)

"""Encodings: where the grid of each quantized array lies, as a tree beside the parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from peft_jax._numerics import is_traced
from peft_jax._trees import children
from peft_jax.quantsim._quantizer import Quantizer

Array = jax.Array


class Encoding(struct.PyTreeNode):
    """The grid of one array: values ``(code + offset) * scale``, codes ``0 .. 2**bitwidth - 1``.

    A pytree node, whose leaves are ``scale`` and ``offset``, float32 of one shape. That of a
    parameter's has the parameter's rank, and each of its lengths divides the parameter's. That of
    what flows between layers ends with one number for all, or one for each channel or block of the
    last axis; stacked layers have theirs along the axes of their parameters.

    Attributes:
      scale: distance of the grid's points.
      offset: the first point is ``offset * scale``; an integer, from ``-(2**bitwidth - 1)`` to 0,
        and ``-2**(bitwidth-1)`` for a symmetric grid.
      quantizer: what it was made for.
      of_parameter: whether it is a parameter that is quantized.
      of_adapter: whether it belongs to an adapter.
      is_frozen: whether calibration and gradients leave it alone.
    """

    scale: Any
    offset: Any
    quantizer: Quantizer = struct.field(pytree_node=False)
    of_parameter: bool = struct.field(pytree_node=False)
    of_adapter: bool = struct.field(pytree_node=False)
    is_frozen: bool = struct.field(pytree_node=False, default=False)

    @property
    def bitwidth(self) -> int:
        """Of the codes."""
        return self.quantizer.bitwidth

    @property
    def symmetric(self) -> bool:
        """Whether the grid is symmetric."""
        return self.quantizer.symmetric

    @property
    def min(self) -> Any:
        """The first point of the grid."""
        return self.offset * self.scale

    @property
    def max(self) -> Any:
        """The last point of the grid."""
        return (self.offset + (2**self.bitwidth - 1)) * self.scale

    @property
    def is_learnt(self) -> bool:
        """Whether gradients reach it."""
        return not self.is_frozen and self.quantizer.is_calibrated

    def __repr__(self) -> str:
        scale = self.scale
        if isinstance(scale, jax.Array | np.ndarray) and not is_traced(scale):
            shown = f"scale={np.asarray(scale).ravel()[0]:.4g}" if scale.size == 1 else ""
        else:
            shown = f"scale={scale!r}"
        shape = tuple(getattr(scale, "shape", ()))
        parts = [repr(self.quantizer), shown, f"shape={shape}"]
        parts += ["frozen"] if self.is_frozen else []
        return f"Encoding({', '.join(part for part in parts if part)})"


def check_arrays(path: str, encoding: Encoding) -> None:
    """Refuses an encoding whose leaves are no arrays of floats, of one shape.

    Raises:
      ValueError: with the path.
    """
    for name in ("scale", "offset"):
        leaf = getattr(encoding, name)
        if not (hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)):
            raise ValueError(
                f"The encoding of '{path}' has for its {name} {type(leaf).__name__}, no array of "
                "floats. Give the encodings, rather than a mask or what a transformation left."
            )
    if jnp.shape(encoding.scale) != jnp.shape(encoding.offset):
        raise ValueError(
            f"The encoding of '{path}' has scales of shape {jnp.shape(encoding.scale)} and offsets "
            f"of {jnp.shape(encoding.offset)}, which have to agree."
        )


def check_grid(path: str, encoding: Encoding) -> None:
    """Refuses an encoding that is no grid of its bitwidth; offsets are rounded first.

    Raises:
      ValueError: with the path.
    """
    check_arrays(path, encoding)
    scale, offset = np.asarray(encoding.scale), np.asarray(encoding.offset)
    first = 2 ** (encoding.bitwidth - 1) if encoding.symmetric else 2**encoding.bitwidth - 1
    last = first if encoding.symmetric else 0
    signed = encoding.quantizer.method is not None  # blocks of Q4_0 have scales below zero
    for name, values, allowed, rule in (
        ("scale", scale, np.isfinite(scale) & (signed | (scale > 0)), "a positive, finite number"),
        (
            "offset",
            offset,
            (np.rint(offset) >= -first) & (np.rint(offset) <= -last),
            f"{-first}, for the grid is symmetric" if last else f"from {-first} to 0",
        ),
    ):
        if not np.all(allowed):
            raise ValueError(
                f"The encoding of '{path}' has the {name} {values[~allowed].ravel()[0]}; it is "
                f"{rule} ({encoding.quantizer!r}). Where training has spoilt it, compute it anew, "
                "or train with a smaller learning rate."
            )


def flattened(encodings: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Encoding]]:
    """Encodings by their slashed paths.

    Raises:
      ValueError: on anything in the tree that is no `Encoding`.
    """
    if isinstance(encodings, Encoding):
        yield "/".join(path), encodings
    elif isinstance(encodings, Mapping):
        for key, value in children(encodings):
            yield from flattened(value, (*path, str(key)))
    else:
        raise ValueError(
            f"A tree of encodings holds dicts and Encodings, but '{'/'.join(path)}' is "
            f"{type(encodings).__name__}. Give what `quantsim.compute_encodings` returned."
        )


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """A tree of dicts from slashed paths; inverse of `flattened`."""
    tree: dict[str, Any] = {}
    for path in sorted(flat):
        *parents, name = path.split("/")
        here = tree
        for parent in parents:
            here = here.setdefault(parent, {})
            if not isinstance(here, dict):
                raise ValueError(
                    f"'{path}' lies beneath another path of the tree. A submodule bears the name "
                    "of a site; leave the one or the other out by `QuantizerRule(path, None)`."
                )
        here[name] = flat[path]
    return tree


def merge_encodings(*trees: Any) -> Any:
    """One tree of several, such as that of the base and that of an adapter, from their files.

    Raises:
      ValueError: where two of them hold the same path.
    """
    flat: dict[str, Encoding] = {}
    for tree in trees:
        found = dict(flattened(tree))
        both = sorted(set(flat) & set(found))
        if both:
            raise ValueError(
                f"Two of the trees hold encodings of {both[:5]}. Leave them out of one of both."
            )
        flat |= found
    return nested(flat)


def freeze(
    encodings: Any, *, parameters: bool = True, activations: bool = True, adapters: bool = False
) -> Any:
    """The encodings, of which those of the base no longer move.

    `compute_encodings` keeps frozen ones to the bit, and their gradients are zero.

    Args:
      encodings: a tree of them.
      parameters: whether those of parameters are frozen.
      activations: whether those of inputs, outputs, intermediates and scalings are.
      adapters: whether those of adapters are frozen as well.

    Raises:
      ValueError: where there is nothing of the kind to freeze.
    """
    return _with_frozen(encodings, True, parameters, activations, adapters)


def unfreeze(
    encodings: Any, *, parameters: bool = True, activations: bool = True, adapters: bool = True
) -> Any:
    """The encodings, of which these may move again; see `freeze`."""
    return _with_frozen(encodings, False, parameters, activations, adapters)


def _with_frozen(
    encodings: Any, frozen: bool, parameters: bool, activations: bool, adapters: bool
) -> Any:
    def meant(encoding: Encoding) -> bool:
        of_kind = parameters if encoding.of_parameter else activations
        return of_kind and (adapters or not encoding.of_adapter)

    flat = dict(flattened(encodings))
    chosen = {path for path, encoding in flat.items() if meant(encoding)}
    if not chosen:
        raise ValueError(
            f"There are no encodings to {'freeze' if frozen else 'unfreeze'} among {len(flat)} "
            f"with parameters={parameters}, activations={activations}, adapters={adapters}. "
            "Compute them first, by `quantsim.compute_encodings`."
        )
    return nested(
        {
            path: encoding.replace(is_frozen=frozen) if path in chosen else encoding
            for path, encoding in flat.items()
        }
    )


def learnable_mask(encodings: Any) -> Any:
    """Which leaves can learn: a tree of booleans for ``optax.masked`` or ``optax.multi_transform``.

    Scales of encodings that are not frozen, and offsets of those that are not symmetric; nothing
    of a fixed ``range``, or of a ``method``, whose scales follow the weight. Scales are to stay
    positive, which exports check: give ranges a learning rate that is small against them.
    """
    masks = {}
    for path, encoding in flattened(encodings):
        learns = encoding.is_learnt and not path.endswith("/scaling")  # a number that stays
        masks[path] = encoding.replace(scale=learns, offset=learns and not encoding.symmetric)
    return nested(masks)

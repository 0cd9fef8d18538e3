"""Sites: which arrays of a model are simulated, and how their encodings lie in its tree."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from peft_jax._numerics import stack_back, stack_first
from peft_jax._surgery import SpecBox
from peft_jax.quantsim._quantizer import Quantizer, SimulationConfig

Array = jax.Array
# Where encodings lie in a module's parameters while a model runs.
ENCODINGS = "_peft_jax_encodings"
SCALE, OFFSET, INDEX = "scale", "offset", "index"


@dataclasses.dataclass(frozen=True)
class SiteSpec:
    """What is known of an array where it is read or computed.

    Attributes:
      quantizer: how it is quantized.
      of_parameter: whether it is a parameter.
      of_adapter: whether it belongs to an adapter.
      contracted: of a parameter: the axes, counted from the end, that its product sums over.
    """

    quantizer: Quantizer
    of_parameter: bool
    of_adapter: bool
    contracted: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Site:
    """An array of a model that is simulated.

    Attributes:
      spec: what is known of it.
      shape: of its scale, with the axes of a stack.
      stack_axes: as in `LayerSpec`.
    """

    spec: SiteSpec
    shape: tuple[int, ...]
    stack_axes: tuple[int, ...]

    @property
    def quantizer(self) -> Quantizer:
        """How it is quantized."""
        return self.spec.quantizer

    @property
    def stack(self) -> tuple[int, ...]:
        """Lengths of the axes along which its layer is stacked, outermost first."""
        first = jax.eval_shape(
            lambda x: stack_first(x, self.stack_axes), jax.ShapeDtypeStruct(self.shape, "float32")
        )
        return first.shape[: len(self.stack_axes)]

    @property
    def layers(self) -> int:
        """How many layers the stack has."""
        return math.prod(self.stack)

    @property
    def groups(self) -> int:
        """How many scales each layer has."""
        return math.prod(self.shape) // self.layers

    def laid_out(self, values: Any) -> Array:
        """Values ``(layers, groups)``, or ``(layers, 1)``, as arrays of the tree lie."""
        depth = len(self.stack_axes)
        inner = stack_first(jnp.zeros(self.shape), self.stack_axes).shape[depth:]
        values = jnp.asarray(values)
        inner = inner if values.shape[1] == self.groups else (1,) * len(inner)
        return stack_back(values.reshape(self.stack + inner), self.stack_axes)

    def indices(self) -> Array:
        """The number of each layer in the stack, laid out so that a lift brings it there."""
        return self.laid_out(jnp.arange(self.layers, dtype=jnp.int32)[:, None])


def site_of(box: SpecBox) -> Site:
    """What a box that was filled while the model was traced says."""
    return Site(box.spec, tuple(box.value.shape), box.stack_axes)


def scale_shape(
    shape: Sequence[int], contracted: Sequence[int] | None, quantizer: Quantizer, path: str
) -> tuple[int, ...]:
    """The shape of the scale of an array; see `Encoding`.

    Args:
      shape: of the array.
      contracted: of a parameter, as in `SiteSpec`; None: the array flows between layers, and what
        is returned has one axis.
      quantizer: how it is quantized.
      path: of the array, for errors.

    Raises:
      ValueError: where blocks do not divide the axis.
    """
    if contracted is None:
        if quantizer.axis not in (None, -1):
            raise ValueError(
                f"'{path}' flows between layers, and has its blocks along the last axis; its "
                f"quantizer says axis={quantizer.axis}. Leave axis out."
            )
        last = shape[-1] if shape else 1
        lengths = {"tensor": 1, "channel": last, "block": last // (quantizer.block_size or 1)}
        if quantizer.granularity == "block" and last % (quantizer.block_size or 1):
            _refuse_blocks(path, last, quantizer)
        return (lengths[quantizer.granularity],)
    if quantizer.granularity == "tensor":
        return (1,) * len(shape)
    summed = {axis % len(shape) for axis in contracted}
    if quantizer.granularity == "channel":
        return tuple(1 if i in summed else length for i, length in enumerate(shape))
    axis = quantizer.axis if quantizer.axis is not None else max(summed, default=len(shape) - 1)
    axis = axis + len(shape) if axis < 0 else axis
    if not 0 <= axis < len(shape):
        raise ValueError(
            f"'{path}' of shape {tuple(shape)} has no axis {quantizer.axis}, along which its "
            f"quantizer has blocks ({quantizer!r}). Give it another by a QuantizerRule."
        )
    block = quantizer.block_size or 1
    if shape[axis] % block:
        _refuse_blocks(path, shape[axis], quantizer)
    return (*shape[:axis], shape[axis] // block, *shape[axis + 1 :])


def _refuse_blocks(path: str, length: int, quantizer: Quantizer) -> None:
    raise ValueError(
        f"'{path}': blocks of {quantizer.block_size} do not divide an axis of {length}. Choose "
        "another block_size, or leave it out by a QuantizerRule."
    )


def check_rules(config: SimulationConfig, paths: set[str]) -> None:
    """Refuses a rule that matches none of the paths of what could be simulated."""
    for rule in config.rules:
        if not any(map(rule.matches, paths)):
            close = difflib.get_close_matches(rule.pattern, sorted(paths), 3, 0.0)
            raise ValueError(
                f"The rule {rule.pattern!r} matches nothing that runs. Close paths: {close}."
            )

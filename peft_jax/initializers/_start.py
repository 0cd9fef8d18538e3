"""What an initializer is given, an adapter and its weight, and what it gives back."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from peft_jax._numerics import MatrixView, padded, spec_delta
from peft_jax._spec import LoraSpec
from peft_jax.initializers._parameters import Parameter

Array = jax.Array


class Start(NamedTuple):
    """An adapter at its start.

    Attributes:
      a: as the spec lays it out.
      b: likewise.
      kernel: what the base holds from now on, in float32 or wider; None: what it did.
      stored: the same in few bits, and its scale, both in their boxes.
    """

    a: Array
    b: Array
    kernel: Array | None = None
    stored: tuple[Any, Any] | None = None


@dataclasses.dataclass(frozen=True)
class Target:
    """An adapter that is to start.

    Attributes:
      path: slashed, of the adapter.
      spec: of the adapter.
      parameter: the weight.
      key: for random numbers, where the method draws any.
      config: of the method, where it takes one.
      statistic: of the inputs of this layer, where the method needs one.
      iterations: the number in the method's name.
    """

    path: str
    spec: LoraSpec
    parameter: Parameter
    key: Any = None
    config: Any = None
    statistic: Any = None
    iterations: int = 0

    @functools.cached_property
    def view(self) -> MatrixView:
        """The weight as matrices ``(stack, batch, in, out)``."""
        try:
            return MatrixView.of(self.spec, self.parameter.shape)
        except ValueError as error:
            raise ValueError(f"'{self.path}': {error}") from error

    @functools.cached_property
    def weight(self) -> Array:
        """In float32 or wider."""
        return self.parameter.numbers()

    @functools.cached_property
    def matrices(self) -> Array:
        """The matrices of the weight."""
        return self.view.matrices(self.weight)

    def statistics(self, rows: int | None = None) -> Array:
        """What is known of the inputs: for each matrix an array ``(rows, in)``, in float32.

        Args:
          rows: how many there must be; None: as many as inputs.
        """
        stack, batch, inputs, _ = self.view.matrix_shape
        sizes = tuple(self.view.shape[axis] for axis in self.spec.matrix_axes[0])
        lead, found = self.view.stack + sizes, jnp.shape(self.statistic)
        wanted = "rows of that length, at least the rank" if rows else "rows and columns"
        fits = found[:-2] == lead and found[-1:] == (inputs,) and len(found) == len(lead) + 2
        if not fits or (found[-2] < rows if rows else found[-2] != inputs):
            raise ValueError(
                f"init_lora_weights: the statistics of '{self.path}' have shape {found}; the layer "
                f"needs {(*lead, rows or inputs, inputs)}: axes of the stack and of the batch, "
                f"then {wanted}, one for each of its {inputs} inputs. Collect them on this model."
            )
        values = jnp.asarray(self.statistic).astype(jnp.float32)
        return values.reshape(stack, batch, found[-2], inputs)

    def check_scaling(self) -> float:
        """The scaling, by which the method divides."""
        if self.spec.scaling == 0:
            raise ValueError(
                f"The scaling of '{self.path}' is 0, and an adapter that is multiplied by it "
                "cannot hold part of a weight. Set another alpha."
            )
        return self.spec.scaling

    def factors(self, a: Array, b: Array) -> tuple[Array, Array]:
        """``a (..., in, k)`` and ``b (..., k, out)``, ``k <= rank``, as the spec lays them out."""
        rank = self.spec.rank
        a, b = (x.astype(jnp.float32) for x in (padded(a, rank, -1), padded(b, rank, -2)))
        return self.view.factors(a, b)

    def beside(self, a: Array, b: Array) -> Start:
        """An adapter that leaves the weight as it is."""
        return Start(*self.factors(a, b))

    def taken_off(self, a: Array, b: Array) -> Start:
        """An adapter whose change is taken off the weight, so that their sum stays."""
        a, b = self.factors(a, b)
        return Start(a, b, self.weight - spec_delta(a, b, self.spec).astype(self.weight.dtype))

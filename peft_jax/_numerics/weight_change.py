"""Layers stacked by a lifted transform: their axes, and the change of their kernels."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from peft_jax._numerics.dora import along, decomposed_change, norms
from peft_jax._numerics.einsum import widest
from peft_jax._numerics.layout import stack_back, stack_first
from peft_jax._numerics.low_rank import delta
from peft_jax._spec import LoraSpec

__all__ = [
    "spec_changes",
    "spec_delta",
    "spec_norms",
]


Array = jax.Array


def spec_delta(a: Array, b: Array, spec: LoraSpec) -> Array:
    """``scaling * a·b``, stacked as the kernel is; see `delta`."""
    a, b = stack_first(a, spec.stack_axes), stack_first(b, spec.stack_axes)
    return stack_back(delta(a, b, spec.equation, spec.scaling), spec.stack_axes)


def spec_changes(kernel: Array, adapter: Mapping[str, Array], spec: LoraSpec) -> dict[str, Array]:
    """What an adapter adds to each parameter beside it, stacked as those are.

    Args:
        kernel: the adapted parameter.
        adapter: its arrays `a` and `b`, and `magnitude` and `bias` where the spec has them; or
            `rows`.
        spec: of the adapter; `spec.param` is the kernel.

    Returns:
        From the names of parameters to changes in float32 or wider.
    """
    assert spec.param is not None
    if spec.variant == "tokens":
        return {spec.param: _rows_change(kernel, adapter["rows"], spec)}
    change = spec_delta(adapter["a"], adapter["b"], spec)
    letters, outputs = spec.letters[2], spec.output_letters
    if spec.variant == "dora":
        change = stack_back(
            decomposed_change(
                stack_first(kernel, spec.stack_axes),
                stack_first(change, spec.stack_axes),
                stack_first(adapter["magnitude"], spec.stack_axes),
                letters,
                outputs,
            ),
            spec.stack_axes,
        )
    if spec.bias is None:
        return {spec.param: change}
    bias = adapter["bias"].astype(change.dtype) * spec.scaling
    if spec.bias != spec.param:
        return {spec.param: change, spec.bias: bias}
    bias = along(stack_first(bias, spec.stack_axes), outputs, letters)
    return {spec.param: stack_back(stack_first(change, spec.stack_axes) + bias, spec.stack_axes)}


def _rows_change(table: Array, rows: Array, spec: LoraSpec) -> Array:
    """``rows`` minus the table's own, at their places."""
    tokens, dtype = jnp.asarray(spec.tokens), widest(table.dtype, rows.dtype)
    table, rows = (stack_first(array, spec.stack_axes).astype(dtype) for array in (table, rows))
    change = jnp.zeros_like(table).at[..., tokens, :].set(rows - table[..., tokens, :])
    return stack_back(change, spec.stack_axes)


def spec_norms(kernel: Array, spec: LoraSpec, a: Array | None = None, b: Any = None) -> Array:
    """Norms of a kernel, or of its sum with ``scaling * a·b``: an adapter's first `magnitude`."""
    kernel = kernel.astype(widest(kernel.dtype))
    if a is not None:
        kernel = kernel + spec_delta(a, b, spec).astype(kernel.dtype)
    values = norms(stack_first(kernel, spec.stack_axes), spec.letters[2], spec.output_letters)
    return stack_back(values, spec.stack_axes)

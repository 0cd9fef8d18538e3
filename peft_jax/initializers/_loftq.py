"""LoftQ: adapters that correct what quantization takes from the weight."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax.core import meta

from peft_jax._config import LoftQConfig
from peft_jax._numerics import MatrixView, QuantizationMethod, spec_delta, without_explicit_axes
from peft_jax._spec import LayerSpec
from peft_jax._trees import dequantize_checkpoint, quantize_checkpoint, reboxed, slashed
from peft_jax.initializers._start import Start, Target

Array = jax.Array


def loftq(target: Target) -> Start:
    """``Q + scaling * a·b ~ W`` for a quantized ``Q``, by turns.

    ``Q`` quantizes what ``a·b`` leaves of the weight, and ``a·b`` is the best of its rank for what
    ``Q`` leaves. LoftQ, https://arxiv.org/abs/2310.08659, algorithm 1.
    """
    config = target.config
    remaining, result = target.weight, None
    for _ in range(config.loftq_iter):
        quantized, stored = _quantized(target, remaining, config)
        a, b = fitted(target, target.weight - quantized)
        remaining = target.weight - spec_delta(a, b, target.spec).astype(target.weight.dtype)
        result = Start(a, b, None if config.store else quantized, stored if config.store else None)
    assert result is not None
    return result


def fitted(target: Target, residual: Array) -> tuple[Array, Array]:
    """``a`` and ``b`` whose change is the best of its rank for a residual of the weight."""
    rank, scaling = target.spec.rank, target.check_scaling()
    u, s, v = jnp.linalg.svd(target.view.matrices(residual), full_matrices=False)
    root = jnp.sqrt(s[..., :rank])
    return target.factors(
        u[..., :rank] * root[..., None, :], v[..., :rank, :] * root[..., None] / scaling
    )


def _quantized(target: Target, weight: Array, config: LoftQConfig) -> tuple[Array, tuple]:
    """What a weight becomes in few bits, and the stored values with their scale."""
    method = QuantizationMethod(config.quantization)
    if method is QuantizationMethod.NONE:
        raise ValueError(
            "init_lora_weights: LoftQ corrects a quantization, and LoftQConfig.method = 'none' is "
            "none. Name another, or choose init_lora_weights=True."
        )
    parameter = target.parameter
    name = slashed(parameter.path)
    tree = {name: reboxed(parameter.box, parameter.placed(weight))}
    try:
        stored = quantize_checkpoint(tree, method=method, specs={name: _layer_spec(target.view)})
    except ValueError as error:
        raise ValueError(
            f"init_lora_weights: LoftQ cannot quantize {error} Here that is "
            "LoftQConfig(method=...), or exclude_modules of the config."
        ) from error
    restored = meta.unbox(dequantize_checkpoint(stored, dtype=weight.dtype)[name])
    (restored,), _ = without_explicit_axes(restored)
    return restored, (stored[name], stored["scale"])


def _layer_spec(view: MatrixView) -> LayerSpec:
    """Of the adapted layer, as far as quantization asks."""
    a, _, kernel = view.spec.letters
    inputs = "".join(c for c in kernel if c in a)
    equation = f"...{inputs},{kernel}->...{view.spec.output_letters}"
    return LayerSpec(equation, stack_axes=view.stack_axes)

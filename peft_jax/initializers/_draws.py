"""Adapters that leave the weight as it is: random numbers, and directions of the inputs (EVA)."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from peft_jax._numerics import rank_letter
from peft_jax._surgery import first_values
from peft_jax.initializers._start import Start, Target


def drawn(method: bool | str, target: Target) -> Start:
    """The numbers that the model's own ``init`` draws, afresh for each matrix.

    Axes of a batch do not count as inputs where the spec tells them, by `LoraSpec.outputs`.
    """
    spec, view = target.spec, target.view
    if method == "orthogonal" and spec.rank % 2:
        raise ValueError(
            "init_lora_weights: 'orthogonal' shares an orthogonal basis of the rank between a and "
            f"b, so the rank must be even; '{target.path}' has rank {spec.rank}. Choose another."
        )
    make_a, make_b = first_values(method, spec.rank, spec.kind)
    stack, batch, rows, columns = view.matrix_shape
    apart = set(spec.output_letters) | {rank_letter(spec)} | set(spec.letters[1])
    inputs = math.prod(view.sizes[c] for c in spec.letters[0] if c not in apart)
    keys_a, keys_b = (
        jax.random.split(key, stack * batch * count)
        for key, count in zip(jax.random.split(target.key), (rows // inputs, 1), strict=True)
    )
    a = jax.vmap(lambda key: make_a(key, (inputs, spec.rank), jnp.float32))(keys_a)
    b = jax.vmap(lambda key: make_b(key, (spec.rank, columns), jnp.float32))(keys_b)
    a = jnp.asarray(a).reshape(stack, batch, rows, spec.rank)
    return target.beside(a, jnp.asarray(b).reshape(stack, batch, spec.rank, columns))


def eva(target: Target) -> Start:
    """``a`` holds the directions in which the layer's inputs vary most, ``b`` zeros.

    EVA, https://arxiv.org/abs/2410.07170, section 3.
    """
    rank = target.spec.rank
    components = target.statistics(rank)[..., :rank, :]
    stack, batch, _, columns = target.view.matrix_shape
    return target.beside(components.mT, jnp.zeros((stack, batch, rank, columns)))

"""A step of LoRA does and keeps no more than frozen weights and small adapters ask."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from helpers import key_of

import peft_jax as peft

pytestmark = pytest.mark.optimized

TOKENS, WIDTH, LAYERS, RANK = 256, 128, 4, 4


class Chain(nn.Module):
    """Nothing but products, so that the operations can be counted by hand."""

    @nn.compact
    def __call__(self, x):
        for _ in range(LAYERS):
            x = nn.Dense(WIDTH, use_bias=False)(x)
        return x


@dataclasses.dataclass(frozen=True)
class Adapt:
    alpha: float | None = None

    def __call__(self, module):
        if type(module) is not nn.Dense:
            return module
        return peft.LoRADense(rank=RANK, alpha=self.alpha, wrapped=module)


def loss_of(y):
    return jnp.mean((y - 1) ** 2)


def compiled_step(tokens=TOKENS, interceptor=None):
    """The gradient of the adapters alone, compiled for abstract arrays: nothing is run."""
    model, x = Chain(), jax.ShapeDtypeStruct((1, tokens, WIDTH), jnp.float32)
    interceptor = interceptor or peft.ModuleInterceptor(Adapt())
    with interceptor:
        params = jax.eval_shape(model.init, key_of(0), x)["params"]
        base, lora = peft.split_params(params)

        def loss(lora, base, x):
            return loss_of(model.apply({"params": peft.merge_params(base, lora)}, x))

        return jax.jit(jax.value_and_grad(loss)).lower(lora, base, x).compile()


@functools.cache
def step():
    return compiled_step()


def flops(compiled):
    return compiled.cost_analysis()["flops"]


PRODUCT = 2 * TOKENS * WIDTH * WIDTH  # one layer forward; its cotangent backward costs the same
ADAPTER = 2 * TOKENS * WIDTH * RANK  # one of the two products of an adapter, or of their gradients


def expected_flops():
    """Two forwards (the first layer's input needs no cotangent), and the adapters' own.

    An adapter has two products forward; backward one for `b`, one for the cotangent at the rank,
    one for `a` and one for `x`.
    """
    base = (2 * LAYERS - 1) * PRODUCT
    adapters = LAYERS * (2 + 2 + 1) * ADAPTER + (LAYERS - 1) * ADAPTER
    return base + adapters


def test_flops_are_two_forwards_and_the_adapters_own():
    found = flops(step())
    assert found <= 1.02 * expected_flops(), f"{found / expected_flops():.3f} times as many"
    assert found >= (2 * LAYERS - 1) * PRODUCT, "what is counted includes the base"


def test_a_scaling_costs_nothing():
    scaled = compiled_step(interceptor=peft.ModuleInterceptor(Adapt(alpha=2.5)))
    assert flops(scaled) == pytest.approx(flops(step()), rel=0.002)


def test_nothing_of_the_size_of_the_base_is_kept():
    """The temporaries of a step are activations, never a gradient or a copy of a kernel."""
    tokens = 2
    memory = compiled_step(tokens).memory_analysis()
    kernel = 4 * WIDTH * WIDTH
    assert memory.argument_size_in_bytes >= LAYERS * kernel
    assert memory.temp_size_in_bytes < kernel // 2
    assert memory.output_size_in_bytes < kernel


def test_the_gradient_of_all_parameters_would_be_seen():
    """The check above can fail: differentiating the base keeps gradients of its size."""
    model, x = Chain(), jax.ShapeDtypeStruct((1, 2, WIDTH), jnp.float32)
    params = jax.eval_shape(model.init, key_of(0), x)
    loss = lambda params, x: loss_of(model.apply(params, x))  # noqa: E731
    memory = jax.jit(jax.grad(loss)).lower(params, x).compile().memory_analysis()
    assert memory.output_size_in_bytes >= LAYERS * 4 * WIDTH * WIDTH

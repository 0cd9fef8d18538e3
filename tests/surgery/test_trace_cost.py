"""What LoRA adds to the time of tracing, counted in calls: clocks of shared machines differ."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from helpers import key_of

import peft_jax as peft


class Block(nn.Module):
    """Attention of four projections and a two-layer MLP, each behind a norm."""

    @nn.compact
    def __call__(self, x):
        y = nn.LayerNorm()(x)
        q, k, v = (nn.Dense(16, name=name)(y).reshape(1, 4, 2, 8) for name in "qkv")
        y = nn.dot_product_attention(q, k, v).reshape(x.shape)
        x = x + nn.Dense(16, name="o")(y)
        return x + nn.Dense(16)(nn.gelu(nn.Dense(32)(nn.LayerNorm()(x))))


class Transformer(nn.Module):
    layers: int

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(11, 16)(tokens)
        for _ in range(self.layers):
            x = Block()(x)
        return nn.Dense(11)(nn.LayerNorm()(x))


CONFIG = peft.LoraConfig(r=2, target_modules="all-linear", rank_pattern={"q": 1}, lora_alpha=4)


def calls_of(function):
    """How many functions, of Python and of C, are called."""
    calls = 0

    def count(frame, event, argument):
        nonlocal calls
        calls += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        function()
    finally:
        sys.setprofile(before)
    return calls


def traces(model):
    """Traces the forward pass; a new function each time, so that jax's caches never answer."""
    tokens = jnp.zeros((1, 4), jnp.int32)
    params = jax.eval_shape(model.init, key_of(0), tokens)
    return lambda: jax.make_jaxpr(lambda *args: model.apply(*args))(params, tokens)


def cost(layers, lora):
    model = Transformer(layers)
    trace = traces(peft.get_peft_model(model, CONFIG) if lora else model)
    trace()  # fills the caches that the process keeps: parsed equations, jax's own
    return calls_of(trace)


@pytest.mark.slow
def test_tracing_under_lora_takes_at_most_twice_the_calls():
    plain, lora = cost(24, lora=False), cost(24, lora=True)
    assert plain > 100_000
    assert lora <= 2 * plain, f"{lora} calls, {lora / plain:.2f} times the plain {plain}"


def test_the_cost_of_tracing_grows_with_the_number_of_layers_alone():
    few, many = (cost(layers, lora=True) for layers in (1, 6))
    per_layer = cost(2, lora=True) - few
    assert many - few == pytest.approx(5 * per_layer, rel=0.05)


def test_no_python_runs_once_a_step_is_compiled():
    model, tokens = peft.get_peft_model(Transformer(1), CONFIG), jnp.zeros((1, 4), jnp.int32)
    shapes = jax.eval_shape(model.init, key_of(0), tokens)
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    step = jax.jit(model.apply)
    step(params, tokens)
    assert calls_of(lambda: step(params, tokens)) < 1000

"""Adapters of plain functions of parameters: of JAX, of NNX, with any tree."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import assert_close, key_of, loss_of, numbers, randomised

import peft_jax as peft

ALL = peft.LoraConfig(r=2, lora_alpha=3, target_modules="all-linear")
IDS = jnp.asarray([[0, 3, 6], [6, 1, 0]])


def two_layers(params, x):
    one, two = params["layers"]
    return jnp.einsum("bth,ho->bto", jnp.tanh(x @ one["w"] + one["b"][None]), two["w"])


TWO = {"layers": [{"w": numbers(4, 6), "b": numbers(1, 6)}, {"w": numbers(6, 3)}]}


def language_model(params, ids):
    x = params["table"]["embedding"][ids] + params["positions"]["embedding"][None, : ids.shape[1]]

    def block(x, layer):
        gate, up = (x @ layer["gating"][i] for i in (0, 1))
        hidden = jnp.einsum("btd,dnh->btnh", jnp.tanh(gate) * up, layer["heads"])
        return x + jnp.einsum("btnh,nhd->btd", hidden, layer["out"]), None

    x, _ = jax.lax.scan(block, x, params["blocks"])
    return x @ params["head"]["kernel"]


LANGUAGE = {
    "table": {"embedding": numbers(7, 4)},
    "positions": {"embedding": numbers(5, 4)},
    "blocks": {
        "gating": numbers(3, 2, 4, 6),
        "heads": numbers(3, 6, 2, 3),
        "out": numbers(3, 2, 3, 4),
    },
    "head": {"kernel": numbers(4, 7)},
}


def convolutional(params, x):
    x = jax.lax.conv_general_dilated(
        x, params["conv"]["kernel"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
    )
    return jnp.tanh(x) @ params["out"]["kernel"]


CONVOLUTIONAL = {"conv": {"kernel": numbers(3, 4, 6)}, "out": {"kernel": numbers(6, 2)}}
FUNCTIONS = {
    "two layers": (two_layers, TWO, numbers(2, 5, 4), {"layers/0/lora", "layers/1/lora"}),
    "language model": (
        language_model,
        LANGUAGE,
        IDS,
        {"blocks/lora_gating", "blocks/lora_heads", "blocks/lora_out"},
    ),
    "convolutional": (convolutional, CONVOLUTIONAL, numbers(2, 8, 4), {"out/lora"}),
    "at the root": (
        lambda params, x: x @ params["w"],
        {"w": numbers(4, 5)},
        numbers(3, 4),
        {"lora"},
    ),
}
every_function = pytest.mark.parametrize("name", FUNCTIONS)


def adapted(name, config=ALL, seed=0):
    fn, params, x, paths = FUNCTIONS[name]
    specs = peft.function_specs(fn, params, x, config=config)
    base, lora = peft.init_lora_weights(params, specs, key_of(seed), config=config)
    chex.assert_trees_all_equal(base, params)
    return fn, params, x, paths, specs, lora


@every_function
@pytest.mark.parametrize("fields", [{}, {"use_rslora": True}, {"use_dora": True}], ids=str)
def test_adapted_is_fused(name, fields):
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules="all-linear", **fields)
    fn, params, x, paths, specs, lora = adapted(name, config)
    assert specs.keys() == paths
    run = peft.adapt_function(fn, specs)
    random = randomised(lora)

    def on_fused(lora):
        return fn(peft.fuse_params(peft.merge_params(params, lora), specs=specs), x)

    @jax.jit
    def everything(lora, random):
        loss, gradient = jax.value_and_grad(lambda lora: loss_of(run(params, lora, x)))(random)
        expected = jax.value_and_grad(lambda lora: loss_of(on_fused(lora)))(random)
        return run(params, lora, x), fn(params, x), (loss, gradient), expected

    start, plain, found, expected = everything(lora, random)
    assert_close(start, plain)
    assert_close(found, expected, 1e-4)


@every_function
def test_adapters_may_be_given_by_path(name):
    fn, params, x, _, specs, lora = adapted(name)
    run, flat = peft.adapt_function(fn, specs), {}
    for path in specs:
        at = lora
        for part in path.split("/"):
            at = at[int(part)] if isinstance(at, list) else at[part]
        flat[path] = at
    assert_close(run(params, flat, x), run(params, lora, x))


def test_names_of_leaves_and_of_containers():
    def specs(**fields):
        return set(
            peft.function_specs(two_layers, TWO, numbers(2, 5, 4), config=peft.LoraConfig(**fields))
        )

    assert specs(target_modules=["1"]) == {"layers/1/lora"}
    assert specs(target_modules=["0.w"]) == {"layers/0/lora"}
    assert specs(target_parameters=["w"]) == {"layers/0/lora", "layers/1/lora"}
    assert specs(target_modules="all-linear", exclude_modules=["0"]) == {"layers/1/lora"}


def test_tables_are_adapted_by_name():
    config = peft.LoraConfig(target_modules=["table", "head"])
    specs = peft.function_specs(language_model, LANGUAGE, IDS, config=config)
    assert specs["table/lora"].kind == "embed"
    assert specs["table/lora"].equation == "ar,rb->ab"
    assert set(specs) == {"table/lora", "head/lora"}


def test_rank_and_alpha_patterns():
    config = peft.LoraConfig(
        target_modules="all-linear", r=2, rank_pattern={"0.w": 3}, alpha_pattern={"1.w": 16}
    )
    specs = peft.function_specs(two_layers, TWO, numbers(2, 5, 4), config=config)
    assert {path: (spec.rank, spec.alpha) for path, spec in specs.items()} == {
        "layers/0/lora": (3, 8),
        "layers/1/lora": (2, 16),
    }


def test_one_trace_and_one_program():
    traces = []

    def counted(params, x):
        traces.append(None)
        return two_layers(params, x)

    x = numbers(2, 5, 4)
    specs = peft.function_specs(counted, TWO, x, config=ALL)
    assert len(traces) == 1
    _, lora = peft.init_lora_weights(TWO, specs, key_of(0), config=ALL)
    step = jax.jit(peft.adapt_function(counted, specs))
    for i in range(3):
        step(TWO, jax.tree.map(lambda leaf, i=i: leaf + i, lora), x)
    assert len(traces) == 2


def test_abstract_parameters_and_other_arguments():
    def fn(params, x, activation, *, scale=1.0):
        return activation(x @ params["w"]) * scale

    shapes = {"w": jax.ShapeDtypeStruct((4, 5), jnp.float32)}
    x = jax.ShapeDtypeStruct((3, 4), jnp.float32)
    specs = peft.function_specs(fn, shapes, x, jnp.tanh, scale=2.0, config=ALL)
    assert specs["lora"].shape == (4, 5)


class Net(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(4, 6, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 6, decode=False, rngs=rngs)
        self.norm = nnx.LayerNorm(6, rngs=rngs)
        self.out = nnx.LinearGeneral(6, (2, 3), rngs=rngs)

    def __call__(self, x):
        return self.out(self.norm(self.attention(jnp.tanh(self.up(x)))))


@pytest.mark.usefixtures("relaxed_promotion")
def test_nnx_by_split_and_merge():
    graph, state = nnx.split(Net(nnx.Rngs(0)), nnx.Param)
    x = numbers(2, 3, 4)

    def fn(state, x):
        return nnx.merge(graph, state)(x)

    params = nnx.to_pure_dict(state)

    def on_dict(params, x):
        filled = jax.tree.unflatten(jax.tree.structure(state), jax.tree.leaves(params))
        return fn(filled, x)

    specs = peft.function_specs(on_dict, params, x, config=ALL)
    assert {path.rpartition("/")[0] for path in specs} == {
        "up",
        "out",
        *(f"attention/{name}" for name in ("query", "key", "value", "out")),
    }
    _, lora = peft.init_lora_weights(params, specs, key_of(0), config=ALL)
    random = randomised(lora)
    fused = peft.fuse_params(peft.merge_params(params, random), specs=specs)
    run = jax.jit(peft.adapt_function(on_dict, specs))
    assert_close(run(params, random, x), on_dict(fused, x), 1e-4)


# --- What is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"target_modules": ["nothing"]}, "nothing"),
        ({"target_modules": "all-linear", "lora_dropout": 0.1}, "lora_dropout = 0.1"),
        ({"target_modules": "all-linear", "lora_bias": True}, "lora_bias = True"),
        ({"target_modules": "all-linear", "modules_to_save": ["head"]}, "modules_to_save"),
    ],
)
def test_configs_without_meaning(fields, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        peft.function_specs(two_layers, TWO, numbers(2, 5, 4), config=peft.LoraConfig(**fields))


@pytest.mark.parametrize("params", [[numbers(4, 5)], numbers(4, 5)], ids=["list", "array"])
def test_parameters_without_a_name(params):
    def fn(params, x):
        return x @ (params[0] if isinstance(params, list) else params)

    with pytest.raises(ValueError, match="is no entry of a dict"):
        peft.function_specs(fn, params, numbers(3, 4), config=ALL)


def test_adapters_that_do_not_fit():
    fn, params, x, _, specs, lora = adapted("two layers")
    run = peft.adapt_function(fn, specs)
    with pytest.raises(ValueError, match=r"'layers/0/lora' needs the arrays \['a', 'b'\]"):
        run(params, {}, x)
    wide = jax.tree.map(lambda leaf: np.zeros((9, 9)), lora)
    with pytest.raises(ValueError, match=r"'layers/0/lora' has arrays of shape \(\(9, 9\)"):
        run(params, wide, x)
    with pytest.raises(ValueError, match="'layers/0/w', which the parameters lack"):
        run({"other": params}, lora, x)

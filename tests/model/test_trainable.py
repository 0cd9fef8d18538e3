"""`trainable_mask` and `print_trainable_parameters`: what is trained, and nothing else."""

import dataclasses
import functools

import chex
import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax.core import meta
from helpers import key_of, numbers, scattered

import peft_jax as peft

WIDTH, LENGTH = 4, 6
IDS = np.asarray([[0, 3, 5]])


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(WIDTH, name="up")(nn.LayerNorm(name="norm")(x))


class Model(nn.Module):
    """With biases beside adapters, beside other weights and beside none."""

    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(LENGTH, WIDTH, name="embed")(ids)
        for i in range(2):
            x = Block(name=f"layers_{i}")(x)
        return nn.Dense(3, name="head")(x)


def config_of(**fields):
    return peft.LoraConfig(**{"r": 2, "target_modules": ["up"], **fields})


@functools.cache
def shapes_of(config):
    return jax.eval_shape(lambda: params_of(config))


def params_of(config):
    return jax.jit(peft.get_peft_model(Model(), config).init)(key_of(0), jnp.asarray(IDS))["params"]


def paths(mask):
    """Slashed paths of what is trained."""
    return {
        "/".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in path)
        for path, trained in jax.tree.leaves_with_path(mask)
        if trained
    }


ADAPTERS = {f"layers_{i}/up/lora/{leaf}" for i in (0, 1) for leaf in "ab"}
OPTIONS = {
    "adapters": ({}, ADAPTERS),
    "dora": ({"use_dora": True}, ADAPTERS | {f"layers_{i}/up/lora/magnitude" for i in (0, 1)}),
    "lora bias": ({"lora_bias": True}, ADAPTERS | {f"layers_{i}/up/lora/bias" for i in (0, 1)}),
    "bias, lora_only": ({"bias": "lora_only"}, ADAPTERS | {f"layers_{i}/up/bias" for i in (0, 1)}),
    "bias, all": (
        {"bias": "all"},
        ADAPTERS | {"head/bias"} | {f"layers_{i}/{n}/bias" for i in (0, 1) for n in ("up", "norm")},
    ),
    "saved": ({"modules_to_save": ["head"]}, ADAPTERS | {"head/kernel", "head/bias"}),
    "saved by expression": (
        {"modules_to_save": ["norm", "he.d"]},
        ADAPTERS
        | {"head/kernel", "head/bias"}
        | {f"layers_{i}/norm/{n}" for i in (0, 1) for n in ("scale", "bias")},
    ),
    "saved block": (
        {"modules_to_save": ["layers_1"]},
        {path for path in ADAPTERS if "layers_0" in path}
        | {f"layers_1/{n}" for n in ("up/kernel", "up/bias", "norm/scale", "norm/bias")},
    ),
    "tokens": ({"trainable_token_indices": [1, 2]}, ADAPTERS | {"embed/lora_tokens/rows"}),
    "tokens and an adapter": (
        {"trainable_token_indices": {"embed": [1]}, "target_modules": ["up", "embed"]},
        ADAPTERS | {f"embed/{n}" for n in ("lora/a", "lora/b", "lora_tokens/rows")},
    ),
    "everything": (
        {"bias": "lora_only", "modules_to_save": ["head"], "trainable_token_indices": [0]},
        ADAPTERS
        | {"head/kernel", "head/bias", "embed/lora_tokens/rows"}
        | {f"layers_{i}/up/bias" for i in (0, 1)},
    ),
}


@pytest.mark.parametrize(("fields", "expected"), OPTIONS.values(), ids=OPTIONS)
def test_what_is_trained(fields, expected):
    config = config_of(**fields)
    params = shapes_of(config)
    mask = peft.trainable_mask(params, config)
    assert jax.tree.structure(mask) == jax.tree.structure(params)
    assert all(isinstance(leaf, bool) for leaf in jax.tree.leaves(mask))
    assert paths(mask) == expected
    frozen = peft.trainable_mask(flax.core.freeze(params), config)
    assert isinstance(frozen, flax.core.FrozenDict)
    assert flax.core.unfreeze(frozen) == mask


def test_without_a_config_adapters_alone_are_trained():
    config = config_of(bias="all", trainable_token_indices=[1], modules_to_save=["head"])
    params = shapes_of(config)
    assert paths(peft.trainable_mask(params)) == ADAPTERS | {"embed/lora_tokens/rows"}


def test_all_adapters_of_a_tree_are_trained():
    config = config_of(bias="lora_only")
    model = peft.get_peft_model(Model(), config)
    model = peft.get_peft_model(model, config_of(target_modules=["head"]), "two")
    params = jax.eval_shape(model.init, key_of(0), IDS)["params"]
    expected = ADAPTERS | {f"head/lora.two/{leaf}" for leaf in "ab"} | {"head/bias"}
    expected |= {f"layers_{i}/up/bias" for i in (0, 1)}
    assert paths(peft.trainable_mask(params, config)) == expected


# --- Trees of other kinds ------------------------------------------------------------------------


def layer(adapted=True):
    tree = {"kernel": numbers(4, 5), "bias": numbers(5)}
    return tree | ({"lora": {"a": numbers(4, 2), "b": numbers(2, 5)}} if adapted else {})


def test_lists_and_tuples():
    params = {"layers": [layer(), layer(False)], "pair": (layer(False), {"bias": numbers(3)})}
    mask = peft.trainable_mask(params, config_of(bias="lora_only"))
    assert jax.tree.structure(mask) == jax.tree.structure(params)
    assert paths(mask) == {"layers/0/lora/a", "layers/0/lora/b", "layers/0/bias"}
    every = peft.trainable_mask(params, config_of(bias="all", modules_to_save=["layers.1"]))
    others = {"layers/1/kernel", "layers/1/bias", "pair/0/bias", "pair/1/bias"}
    assert paths(every) == paths(mask) | others


def boxed(value):
    return nn.Partitioned(value, names=(None,) * value.ndim)


def test_boxes():
    """A box is one parameter; what optax sees inside it is what the mask holds inside it."""
    params = jax.tree.map(boxed, {"up": layer(), "head": layer(False)})
    mask = peft.trainable_mask(params, config_of(bias="lora_only", modules_to_save=["head"]))
    assert jax.tree.structure(mask) == jax.tree.structure(params)
    unboxed = peft.trainable_mask(
        meta.unbox(params), config_of(bias="lora_only", modules_to_save=["head"])
    )
    assert meta.unbox(mask) == unboxed
    assert unboxed["up"] == {"kernel": False, "bias": True, "lora": {"a": True, "b": True}}


@pytest.mark.parametrize("plain", [False, True], ids=("node", "dict"))
def test_stored_values(plain):
    kernel = {"up": {"kernel": numbers(64, 64)}}
    up = dict(peft.quantize_checkpoint(kernel, method="q4_0")["up"])
    if plain:  # as a file gives them back
        leaves = jax.tree_util.tree_leaves_with_path(up["kernel"])
        up["kernel"] = {str(path[-1].key): leaf for path, leaf in leaves}
    params = {"up": up | {"lora": {"a": numbers(64, 2), "b": numbers(2, 64)}, "bias": numbers(64)}}
    mask = peft.trainable_mask(params, config_of(bias="lora_only"))
    assert jax.tree.structure(mask) == jax.tree.structure(params)
    assert paths(mask) == {"up/lora/a", "up/lora/b", "up/bias"}


def test_a_module_stored_in_few_bits_is_not_trained_whole():
    stored = peft.quantize_checkpoint({"head": {"kernel": numbers(64, 64)}}, method="int8")
    params = {"up": layer(), **stored}
    with pytest.raises(ValueError, match=r"modules_to_save.*'head/kernel'.*few bits"):
        peft.trainable_mask(params, config_of(modules_to_save=["head"]))


# --- With optax ----------------------------------------------------------------------------------


def multi_transform(mask):
    labels = jax.tree.map(lambda trained: "train" if trained else "freeze", mask)
    return optax.multi_transform({"train": optax.sgd(1e-3), "freeze": optax.set_to_zero()}, labels)


def masked(mask):
    frozen = jax.tree.map(lambda trained: not trained, mask)
    return optax.chain(
        optax.masked(optax.sgd(1e-3), mask), optax.masked(optax.set_to_zero(), frozen)
    )


@pytest.mark.parametrize(
    ("optimizer", "container"), [(multi_transform, dict), (masked, flax.core.freeze)]
)
def test_a_step_trains_what_it_should(optimizer, container):
    config = config_of(
        bias="lora_only",
        use_dora=True,
        modules_to_save=["head"],
        trainable_token_indices=[0, 3],
    )
    model = peft.get_peft_model(Model(), config)
    params = params_of(config)
    drawn = [
        jnp.asarray(scattered(x.size, i).reshape(x.shape))
        for i, x in enumerate(jax.tree.leaves(params))
    ]
    params = container(jax.tree.unflatten(jax.tree.structure(params), drawn))
    mask = peft.trainable_mask(params, config)
    tx = optimizer(mask)

    @jax.jit
    def step(params):
        def loss(params):
            return jnp.mean((model.apply({"params": params}, jnp.asarray(IDS)) - 1) ** 2)

        value, gradient = jax.value_and_grad(loss)(params)
        updates, _ = tx.update(gradient, tx.init(params), params)
        return (
            value,
            optax.apply_updates(params, updates),
            loss(optax.apply_updates(params, updates)),
        )

    before, after, then = step(params)
    moved = jax.tree.map(lambda x, y: bool(jnp.any(x != y)), params, after)
    chex.assert_trees_all_equal(moved, mask)
    assert then < before


def test_adam_keeps_no_state_of_what_is_frozen():
    config = config_of()
    params = shapes_of(config)
    mask = peft.trainable_mask(params, config)
    state = jax.eval_shape(optax.masked(optax.adam(1e-3), mask).init, params)
    kept = sum(x.size for x in jax.tree.leaves(state))
    trained = sum(x.size for x in jax.tree.leaves(peft.split_params(params).lora))
    assert kept == 2 * trained + 1


# --- The line ------------------------------------------------------------------------------------


def test_the_line(capsys):
    params = shapes_of(config_of())
    peft.print_trainable_parameters(params)
    trained = 2 * (4 * 2 + 2 * 4)
    total = LENGTH * WIDTH + 2 * (16 + 4 + 8) + 15 + trained
    assert capsys.readouterr().out == (
        f"trainable params: {trained} || all params: {total} || "
        f"trainable%: {100 * trained / total:.4f} || matched modules: 2 of 4\n"
    )


def test_the_line_counts_by_the_config(capsys):
    config = config_of(modules_to_save=["head"], bias="lora_only", trainable_token_indices=[1])
    params = shapes_of(config)
    peft.print_trainable_parameters(params, config)
    trained = 2 * (4 * 2 + 2 * 4) + 15 + 2 * 4 + 4
    assert capsys.readouterr().out.startswith(f"trainable params: {trained} || ")


def test_large_numbers_have_commas(capsys):
    def array(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16)

    up = {"kernel": array(4096, 4096), "lora": {"a": array(4096, 8), "b": array(8, 4096)}}
    peft.print_trainable_parameters({"up": up, "down": {"kernel": array(4096, 4096)}})
    assert capsys.readouterr().out == (
        "trainable params: 65,536 || all params: 33,619,968 || trainable%: 0.1949 || "
        "matched modules: 1 of 2\n"
    )


@pytest.mark.parametrize("method", ["int4", "int8", "q4_0", "nf4"])
def test_stored_weights_count_by_the_numbers_that_they_stand_for(method, capsys):
    lora = {"a": numbers(64, 2), "b": numbers(2, 64)}
    params = {"up": {"kernel": numbers(64, 64), "bias": numbers(64)}}
    stored = peft.quantize_checkpoint(params, method=method)
    lines = []
    for tree in (params, stored):
        peft.print_trainable_parameters(peft.merge_params(tree, {"up": {"lora": lora}}))
        lines.append(capsys.readouterr().out)
    assert "trainable params: 256 || all params: 4,416 " in lines[0]
    assert "matched modules: 1 of 1" in lines[0]
    assert lines[1] == lines[0], "a scale is no parameter of the model"


def test_boxes_count_once(capsys):
    params = {"up": layer(), "head": layer(False)}
    peft.print_trainable_parameters(params)
    peft.print_trainable_parameters(jax.tree.map(boxed, params))
    first, second = capsys.readouterr().out.splitlines()
    assert first == second


# --- Errors --------------------------------------------------------------------------------------


def test_nothing_trained_raises():
    for params in ({"up": layer(False)}, {}, flax.core.freeze({"up": layer(False)})):
        for ask in (peft.trainable_mask, peft.print_trainable_parameters):
            with pytest.raises(ValueError, match="hold no adapter"):
                ask(params)


def test_a_saved_module_that_is_not_there_raises():
    with pytest.raises(ValueError, match=r"modules_to_save: .*'hed' \(closest: 'head'\)"):
        peft.trainable_mask(
            {"up": layer(), "head": layer(False)}, config_of(modules_to_save=["hed"])
        )


@pytest.mark.parametrize("params", [None, 3, numbers(2, 2), "params"])
def test_what_is_no_tree_raises(params):
    with pytest.raises(ValueError, match="trainable_mask"):
        peft.trainable_mask(params)


@pytest.mark.parametrize("config", [{"r": 2}, "lora", 3])
def test_what_is_no_config_raises(config):
    with pytest.raises(ValueError, match="LoraConfig"):
        peft.trainable_mask({"up": layer()}, config)


def test_the_name_of_the_collection_does_no_harm():
    """All variables, `{"params": ...}`, are a tree like any other."""
    params = {"params": {"up": layer(), "head": layer(False)}}
    mask = peft.trainable_mask(params, config_of(modules_to_save=["head"]))
    assert paths(mask) == {
        f"params/{p}" for p in ("up/lora/a", "up/lora/b", "head/kernel", "head/bias")
    }


def test_a_users_own_branch_named_lora_is_not_trained():
    params = {"up": layer(), "lora": {"kernel": numbers(3, 3)}, "bias": {"kernel": numbers(3, 3)}}
    assert paths(peft.trainable_mask(params, config_of(bias="all"))) == {
        "up/lora/a",
        "up/lora/b",
        "up/bias",
    }


def test_configs_are_data():
    """A mask by a config equals the mask by its copy."""
    config = config_of(bias="all", modules_to_save=["head"])
    params = {"up": layer(), "head": layer(False)}
    twin = peft.LoraConfig.from_dict(config.to_dict())
    assert peft.trainable_mask(params, config) == peft.trainable_mask(params, twin)
    assert dataclasses.replace(config) == twin

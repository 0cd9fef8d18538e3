"""What layers see: moments gathered through lifts, principal components, ranks, covariances."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from helpers import assert_close, key_of, rounding

import peft_jax as peft
from peft_jax._config import rank_of
from peft_jax._numerics import MatrixView
from peft_jax.initializers._observe import Observation, Observer

KEY = key_of(0)
FEATURES = 6


def normal(*shape, seed=0):
    """Numbers of falling variance along the last axis, with a mean that is not zero."""
    rng = np.random.default_rng(seed)
    numbers = rng.normal(size=shape) * np.linspace(3, 0.3, shape[-1]) + 0.5
    return jnp.asarray(numbers, jnp.float32)


def adapted(model, **fields):
    return peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear", **fields))


# --- Moments -------------------------------------------------------------------------------------

LAYERS = {
    "dense": (nn.Dense(4, use_bias=False), normal(3, 5, FEATURES)),
    "heads out": (nn.Einsum((FEATURES, 2, 3), "btd,dnh->btnh", use_bias=False), normal(2, 5, 6)),
    "heads in": (nn.Einsum((2, 3, 4), "btnh,nhd->btd", use_bias=False), normal(2, 5, 2, 3)),
    "batch in a": (nn.Einsum((2, 3, 4), "btnh,nhd->btnd", use_bias=False), normal(2, 5, 2, 3)),
    "batch in both": (
        nn.DenseGeneral(4, axis=-1, batch_dims=(0,), use_bias=False),
        normal(2, 5, FEATURES),
    ),
    "several axes": (nn.DenseGeneral((4, 2), axis=(-2, -1), use_bias=False), normal(5, 2, 3)),
    "conv": (nn.Conv(4, (3,), strides=2, use_bias=False), normal(2, 7, 3)),
    "conv 2d": (nn.Conv(4, (3, 2), padding="VALID", use_bias=False), normal(2, 6, 5, 3)),
    "transposed": (nn.ConvTranspose(4, (3,), strides=(2,), use_bias=False), normal(2, 5, 3)),
    "embed": (nn.Embed(7, 4), jnp.asarray([[1, 2, 2], [6, 0, 1]])),
}


@pytest.mark.parametrize("name", LAYERS)
def test_moments_tell_the_moments_of_the_output(name):
    """With rows ``x`` of a layer ``y = x·W``: ``W^T (sum x^T x) W = sum y^T y``."""
    layer, x = LAYERS[name]
    kinds = {nn.Conv: peft.LoRAConv, nn.ConvTranspose: peft.LoRAConv, nn.Embed: peft.LoRAEmbed}
    wrapper = kinds.get(type(layer), peft.LoRAEinsum)(rank=2, wrapped=layer)
    specs = peft.lora_specs(wrapper, x)
    params = layer.init(KEY, x)["params"]
    observer = Observer(
        lambda params, batch: layer.apply({"params": params}, batch), params, specs, Observation()
    )
    moments = observer(x)["lora"]
    (kernel,) = params.values()
    matrices = MatrixView.of(specs["lora"], kernel.shape).matrices(kernel)[0]
    y = np.asarray(layer.apply({"params": params}, x), np.float64)
    y = y.reshape(len(matrices), -1, matrices.shape[-1])
    expected = np.einsum("bno,bnp->bop", y, y)
    found = np.einsum("bio,bij,bjp->bop", matrices, moments["square"], matrices)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-3)
    total = np.einsum("bio,bi->bo", matrices, moments["sum"])
    np.testing.assert_allclose(total, y.sum(axis=1), rtol=1e-4, atol=1e-3)


def test_every_group_of_a_convolution_gives_rows():
    layer, x = nn.Conv(4, (1,), feature_group_count=2), normal(2, 5, 4)
    specs = peft.lora_specs(peft.LoRAConv(rank=2, wrapped=layer), x)
    params = layer.init(KEY, x)["params"]
    observer = Observer(
        lambda params, batch: layer.apply({"params": params}, batch), params, specs, Observation()
    )
    moments = observer(x)["lora"]
    rows = np.asarray(x).reshape(-1, 2)
    np.testing.assert_allclose(moments["square"][0], rows.T @ rows, rtol=1e-5)
    assert moments["count"] == len(rows)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + nn.Dense(FEATURES, name="up")(jnp.tanh(x)), None


class Stack(nn.Module):
    """Layers under scan and remat, a shared layer, and one of its own."""

    @nn.compact
    def __call__(self, x):
        shared = nn.Dense(FEATURES, name="shared")
        x = shared(jnp.tanh(shared(x)))
        blocks = nn.scan(
            nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=3
        )
        x, _ = blocks(name="layers")(x, None)
        return nn.Dense(2, name="last")(x)


def test_moments_leave_scans_and_count_shared_layers_twice():
    model, x = Stack(), normal(4, 5, FEATURES)
    params = model.init(KEY, x)["params"]
    found = peft.collect_covariances(adapted(model, r=2), params, [x])
    assert found["layers/up/lora"].shape == (3, FEATURES, FEATURES)

    def unrolled():
        dense = nn.Dense(FEATURES)
        seen = [x, jnp.tanh(dense.apply({"params": params["shared"]}, x))]
        h = dense.apply({"params": params["shared"]}, seen[-1])
        inside = []
        for i in range(3):
            inside.append(jnp.tanh(h))
            layer = jax.tree.map(lambda leaf, i=i: leaf[i], params["layers"]["up"])
            h = h + dense.apply({"params": layer}, inside[-1])
        return seen, inside

    def covariance(inputs):
        rows = [np.asarray(one, np.float64).reshape(-1, FEATURES) for one in inputs]
        rows = [one / abs(one.max()) for one in rows]
        return sum(one.T @ one for one in rows) / len(rows)

    seen, inside = unrolled()
    np.testing.assert_allclose(found["shared/lora"], covariance(seen), rtol=1e-4, atol=1e-4)
    for i in range(3):
        expected = covariance(inside[i : i + 1])
        np.testing.assert_allclose(found["layers/up/lora"][i], expected, rtol=1e-4, atol=1e-4)


# --- Components ----------------------------------------------------------------------------------


def test_components_are_those_of_all_data_at_once():
    model, batches = nn.Dense(3), [normal(8, 5, FEATURES, seed=i) for i in range(4)]
    params = model.init(KEY, batches[0])["params"]
    config = peft.EvaConfig(rho=1.0, tau=1.0)
    eva = adapted(model, r=2, init_lora_weights="eva", eva_config=config)
    found = peft.get_eva_state_dict(eva, params, batches)["lora"]
    rows = np.concatenate([np.asarray(batch).reshape(-1, FEATURES) for batch in batches])
    _, _, v = np.linalg.svd(rows - rows.mean(axis=0), full_matrices=False)
    np.testing.assert_allclose(np.abs(found @ v[:2].T), np.eye(2), atol=2e-2)


def test_whitening_divides_by_roots_of_singular_values():
    model, x = nn.Dense(3), normal(40, FEATURES)
    params = model.init(KEY, x)["params"]
    states = []
    for whiten in (False, True):
        config = peft.EvaConfig(rho=1.0, whiten=whiten)
        eva = adapted(model, r=3, init_lora_weights="eva", eva_config=config)
        states.append(peft.get_eva_state_dict(eva, params, [x])["lora"])
    values = np.linalg.svd(np.asarray(x - x.mean(0, keepdims=True)), compute_uv=False)[:3]
    ratio = np.linalg.norm(states[0], axis=1) / np.linalg.norm(states[1], axis=1)
    np.testing.assert_allclose(ratio, np.sqrt(values), rtol=1e-3)


class Two(nn.Module):
    """Inputs of one direction into `narrow`, of many into `wide`."""

    @nn.compact
    def __call__(self, x):
        wide = nn.Dense(8, name="wide")(x)
        return wide + nn.Dense(8, name="narrow")(jnp.sum(x, -1, keepdims=True) * jnp.ones(8)[None])


@pytest.mark.slow
def test_ranks_go_where_variance_is_explained():
    model, x = Two(), jax.random.normal(KEY, (50, 8))
    params = model.init(KEY, x)["params"]
    config = peft.EvaConfig(rho=2.0)
    eva = adapted(model, r=3, init_lora_weights="eva", eva_config=config)
    found = peft.initialize_lora_eva_weights(eva, params, [x], key=KEY)
    assert found.params["narrow"]["lora"]["a"].shape == (8, 1)
    assert found.params["wide"]["lora"]["a"].shape == (8, 5)
    new = found.model.peft_config
    assert new.rank_pattern == {"narrow": 1, "wide": 5}
    scalings = [spec.scaling for spec in peft.lora_specs(found.model, x).values()]
    assert scalings == pytest.approx([8 / 3, 8 / 3])
    plain = model.apply({"params": params}, x)
    np.testing.assert_allclose(found.model.apply({"params": found.params}, x), plain, atol=1e-5)


def test_a_layer_may_lose_its_adapter_and_a_stack_keeps_one_rank():
    config = peft.LoraConfig(
        r=2, target_modules=["a", "b", "layers"], init_lora_weights="eva", lora_alpha=4
    )
    state = {
        "a/lora": jnp.zeros((0, 4)),
        "b/lora": jnp.zeros((4, 4)),
        "layers/lora": jnp.zeros((3, 2, 4)),
    }
    new = peft.redistribute_ranks(config, state)
    assert new.target_modules == ("b", "layers")
    assert (new.rank_pattern, new.alpha_pattern) == ({"b": 4}, {"b": 8})


def test_names_that_end_like_others_keep_their_own_ranks():
    config = peft.LoraConfig(
        r=2, target_modules="all-linear", init_lora_weights="eva", lora_alpha=4
    )
    ranks = {"up": 3, "a/up": 2, "b/a/up": 1, "down": 2}
    state = {f"{path}/lora": jnp.zeros((rank, 4)) for path, rank in ranks.items()}
    new = peft.redistribute_ranks(config, state)
    assert {path: rank_of(new, tuple(path.split("/"))) for path in ranks} == ranks
    assert "down" not in new.rank_pattern


@pytest.mark.slow
def test_data_without_an_end_and_rows_of_tokens():
    class Text(nn.Module):
        @nn.compact
        def __call__(self, ids):
            return nn.Dense(3, name="dense")(nn.Embed(9, FEATURES, name="table")(ids))

    model, ids = Text(), jnp.arange(9)[None]
    eva = peft.get_peft_model(
        model,
        peft.LoraConfig(
            r=2, target_modules=["dense"], init_lora_weights="eva", trainable_token_indices=[1]
        ),
    )
    params = model.init(KEY, ids)["params"]
    found = peft.initialize_lora_eva_weights(eva, params, itertools.cycle([ids]), key=KEY)
    rows = found.params["table"]["lora_tokens"]["rows"]
    np.testing.assert_array_equal(rows, params["table"]["embedding"][1:2])
    plain = model.apply({"params": params}, ids)
    assert_close(found.model.apply({"params": found.params}, ids), plain, rounding(FEATURES))


def test_it_stops_when_components_have_settled():
    model, x = nn.Dense(3), normal(30, FEATURES)
    params = model.init(KEY, x)["params"]
    eva = adapted(model, r=2, init_lora_weights="eva")
    taken = []
    batches = (taken.append(i) or x for i in itertools.count())
    peft.get_eva_state_dict(eva, params, batches)
    assert len(taken) == 2


def test_masked_places_do_not_count():
    class Text(nn.Module):
        @nn.compact
        def __call__(self, input_ids, attention_mask):
            del attention_mask
            table = nn.Embed(9, FEATURES, name="table")
            return nn.Dense(3, name="dense")(table(input_ids))

    ids = jnp.asarray([[1, 2, 3, 8], [4, 5, 6, 8]])
    mask = jnp.asarray([[1, 1, 1, 0], [1, 1, 1, 0]])
    labels = jnp.asarray([[-100, 1, 1, 1], [1, 1, 1, 1]])
    model = Text()
    params = model.init(KEY, ids, mask)["params"]
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    for use_label_mask in (False, True):
        config = peft.EvaConfig(rho=1.0, use_label_mask=use_label_mask)
        eva = adapted(model, r=1, init_lora_weights="eva", eva_config=config)
        found = peft.get_eva_state_dict(eva, params, [batch])["dense/lora"]
        kept = (mask == 1) & (labels != -100) if use_label_mask else mask == 1
        rows = np.asarray(params["table"]["embedding"])[np.asarray(ids)[np.asarray(kept)]]
        _, _, v = np.linalg.svd(rows - rows.mean(axis=0))
        np.testing.assert_allclose(np.abs(found @ v[0]), 1, atol=1e-4)


# --- Bad input -----------------------------------------------------------------------------------


def test_bad_input():
    model, x = nn.Dense(3), normal(4, FEATURES)
    params = model.init(KEY, x)["params"]
    config = peft.LoraConfig(r=2, target_modules="all-linear")
    with pytest.raises(ValueError, match="holds no batches"):
        peft.get_eva_state_dict(model, params, [], config)
    with pytest.raises(ValueError, match="pass peft_config"):
        peft.get_eva_state_dict(model, params, [x])
    with pytest.raises(ValueError, match=re.escape("specs=peft.lora_specs")):
        peft.collect_covariances(model, params, [x], config, forward_fn=lambda *_: x)
    mask = {"mask_fn": lambda batch, config: jnp.ones((3, 2))}
    with pytest.raises(ValueError, match="mask of shape"):
        peft.get_eva_state_dict(model, params, [x], config, **mask)
    with pytest.raises(ValueError, match="Set it to 'eva'"):
        peft.initialize_lora_eva_weights(adapted(model), params, [x], key=KEY)
    eva = adapted(model, r=4, init_lora_weights="eva")
    with pytest.raises(ValueError, match="one of them"):
        peft.initialize_lora_eva_weights(eva, params, key=KEY)
    with pytest.raises(ValueError, match="saw 4 inputs"):
        peft.get_eva_state_dict(eva, params, [x])
    with pytest.raises(ValueError, match=re.escape("Write [batch]")):
        peft.get_eva_state_dict(eva, params, {"x": x})
    with pytest.raises(ValueError, match="does not take this batch"):
        peft.get_eva_state_dict(eva, params, [(x, x)], specs=peft.lora_specs(eva, x))
    with pytest.raises(ValueError, match="not finite"):
        peft.collect_covariances(model, params, [x * jnp.nan], config)


def test_layers_that_nothing_reaches_are_named():
    class Cut(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3, name="last")(jax.lax.stop_gradient(nn.Dense(4, name="first")(x)))

    model, x = Cut(), normal(4, FEATURES)
    params = model.init(KEY, x)["params"]
    with pytest.raises(ValueError, match=r"Nothing was seen .*'first'"):
        peft.collect_covariances(adapted(model, r=2), params, [x])

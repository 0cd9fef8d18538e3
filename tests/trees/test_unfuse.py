"""The way back from fused weights: exact with the original, else close, or the best by SVD."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.core import freeze, meta
from helpers import assert_close, key_of, partly_slow, rounding

import peft_jax as peft
from peft_jax import LoraSpec

DENSE = LoraSpec("kernel", "ir,ro->io", 2)


def array(*shape, dtype=np.float32, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def layer(spec, kernel, a, b, dtype=np.float32):
    """A kernel and its adapter, for shapes of the three."""
    arrays = {"a": array(*a, seed=1), "b": array(*b, seed=2)}
    return {spec.param: array(*kernel, dtype=dtype), "lora": arrays}


def dense(dtype=np.float32):
    return layer(DENSE, (6, 5), (6, 2), (2, 5), dtype) | {"bias": array(5, seed=3)}


KINDS = {
    # spec, and the shapes of the kernel, a and b
    "dense": (DENSE, (6, 5), (6, 2), (2, 5)),
    "scaled": (LoraSpec("kernel", "ir,ro->io", 2, 0.25), (6, 5), (6, 2), (2, 5)),
    "negative": (LoraSpec("kernel", "ir,ro->io", 2, -2.0), (6, 5), (6, 2), (2, 5)),
    "heads out": (LoraSpec("kernel", "ir,rnh->inh", 2), (6, 2, 3), (6, 2), (2, 2, 3)),
    "heads in": (LoraSpec("kernel", "nhr,rd->nhd", 2), (2, 3, 6), (2, 3, 2), (2, 6)),
    "heads out, first": (LoraSpec("w", "dr,rnh->ndh", 2), (2, 6, 3), (6, 2), (2, 2, 3)),
    "conv": (LoraSpec("kernel", "xyir,ro->xyio", 2), (2, 2, 3, 5), (2, 2, 3, 2), (2, 5)),
    "embedding": (LoraSpec("embedding", "vr,rf->vf", 2), (7, 5), (7, 2), (2, 5)),
    "batch": (LoraSpec("kernel", "gir,gro->gio", 2), (3, 6, 5), (3, 6, 2), (3, 2, 5)),
    "batch inside": (LoraSpec("kernel", "igr,gro->igo", 2), (6, 3, 5), (6, 3, 2), (3, 2, 5)),
    "batch in a alone": (LoraSpec("kernel", "gir,ro->gio", 2), (3, 4, 5), (3, 4, 2), (2, 5)),
    "stacked": (LoraSpec("kernel", "...ir,...ro->...io", 2), (3, 6, 5), (3, 6, 2), (3, 2, 5)),
    "stacked at 1": (
        LoraSpec("kernel", "...ir,...ro->...io", 2, 0.5, stack_axes=(1,)),
        (6, 3, 5),
        (6, 3, 2),
        (2, 3, 5),
    ),
    "stacked at the end": (
        LoraSpec("kernel", "...ir,...ro->...io", 2, stack_axes=(-1,)),
        (6, 5, 3),
        (6, 2, 3),
        (2, 5, 3),
    ),
    "stacked twice": (
        LoraSpec("kernel", "...ir,...ro->...io", 2, stack_axes=(1, 0)),
        (4, 6, 3, 5),
        (4, 6, 3, 2),
        (4, 2, 3, 5),
    ),
}
every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


@pytest.mark.parametrize(
    ("name", "dtype"),
    partly_slow(
        [(name, dtype) for name in KINDS for dtype in (jnp.float32, jnp.bfloat16)],
        lambda pair: list(KINDS).index(pair[0]) % 2 == (pair[1] == jnp.float32),
    ),
)
def test_the_base_comes_back(name, dtype):
    spec, *shapes = KINDS[name]
    specs = {"x/lora": spec}
    params = {"x": layer(spec, *shapes, dtype)}
    original, lora = peft.split_params(params)
    fused = peft.fuse_params(params, specs=specs)

    exact = peft.unfuse_params(fused, original=original, lora=lora, specs=specs)
    chex.assert_trees_all_equal(exact, params)
    chex.assert_trees_all_equal_dtypes(exact, params)

    close = peft.unfuse_params(fused, lora=lora, specs=specs)
    chex.assert_trees_all_equal(peft.split_params(close).lora, lora)
    eps = float(jnp.finfo(dtype).eps)
    old, new = (np.asarray(tree["x"][spec.param], np.float32) for tree in (original, close))
    np.testing.assert_allclose(new, old, atol=4 * eps * np.abs(old).max() + 8 * eps)


@pytest.mark.parametrize(
    ("name", "rank"),
    partly_slow(
        [*((name, None) for name in KINDS), ("heads in", 3), ("stacked twice", 3)],
        lambda pair: pair[1] == 3 or list(KINDS).index(pair[0]) % 2 == 0,
    ),
)
def test_adapters_are_recovered(name, rank):
    kind = KINDS[name]
    spec, *shapes = kind
    params = {"x": layer(spec, *shapes)}
    original, _ = peft.split_params(params)
    fused = peft.fuse_params(params, specs={"x/lora": spec})
    found = peft.unfuse_params(fused, original=original, specs={"x/lora": spec}, rank=rank)
    chex.assert_trees_all_equal(peft.split_params(found).original, original)
    if rank is None:
        chex.assert_trees_all_equal_shapes(found, params)
    spec = dataclasses.replace(spec, rank=rank or 2)
    again = peft.fuse_params(found, specs={"x/lora": spec})
    chex.assert_trees_all_close(again, fused, atol=1e-5)


def test_too_low_a_rank_gives_the_best_of_that_rank():
    change = array(6, 5)
    original = {"kernel": jnp.zeros((6, 5))}
    found = peft.unfuse_params({"kernel": change}, original=original, rank=2)
    again = peft.fuse_params(found)["kernel"]
    values = np.linalg.svd(np.asarray(change, np.float64), compute_uv=False)
    np.testing.assert_allclose(
        np.linalg.norm(again - change), np.sqrt(np.sum(values[2:] ** 2)), rtol=1e-4
    )


def test_a_rank_beyond_the_matrix_is_padded_with_zeros():
    params = dense()
    original, _ = peft.split_params(params)
    fused = peft.fuse_params(params)
    found = peft.unfuse_params(fused, original=original, rank=9)
    assert jax.tree.map(jnp.shape, found["lora"]) == {"a": (6, 9), "b": (9, 5)}
    chex.assert_trees_all_close(peft.fuse_params(found), fused, atol=1e-5)


@pytest.mark.parametrize("rank", [1, 2, 4])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_numerical_rank_sees_through_rounding(rank, dtype):
    spec = LoraSpec("kernel", "ir,ro->io", rank)
    kernel = array(64, 48, dtype=dtype) / np.asarray(8, dtype)
    lora = {"a": array(64, rank, seed=1), "b": array(rank, 48, seed=2)}
    fused = peft.fuse_params({"kernel": kernel, "lora": lora}, specs={"lora": spec})
    found = peft.unfuse_params(fused, original={"kernel": kernel})
    assert found["lora"]["a"].shape == (64, rank)
    assert found["lora"]["a"].dtype == jnp.float32


def test_layers_without_a_difference_get_no_adapter():
    params = {"x": dense(), "y": [dense(), dense()], "norm": {"scale": array(4)}}
    original, _ = peft.split_params(params)
    fused = jax.tree.map(lambda leaf: leaf, original)
    fused["y"][1] = peft.fuse_params(params["y"][1])
    found = peft.unfuse_params(fused, original=original)
    assert "lora" not in found["x"]
    assert "lora" not in found["y"][0]
    assert found["y"][1]["lora"]["a"].shape == (6, 2)
    chex.assert_trees_all_close(peft.fuse_params(found), fused, atol=1e-5)
    same = peft.unfuse_params(original, original=original)
    chex.assert_trees_all_equal(same, original)


def test_layers_named_by_specs_without_a_difference_get_zeros_of_their_rank():
    original = {"x": {"kernel": array(6, 5)}, "y": {"kernel": array(6, 5)}}
    specs = {"x/lora": DENSE, "y/lora": DENSE}
    found = peft.unfuse_params(original, original=original, specs=specs)
    for name in ("x", "y"):
        assert jax.tree.map(jnp.shape, found[name]["lora"]) == {"a": (6, 2), "b": (2, 5)}
        assert not np.any(found[name]["lora"]["a"] @ found[name]["lora"]["b"])


def test_containers_and_boxes_stay():
    box = lambda value: nn.Partitioned(value, (None, "model"))  # noqa: E731
    params = freeze({"x": [{"kernel": box(array(6, 5)), "lora": dense()["lora"]}]})
    original, lora = peft.split_params(params)
    fused = peft.fuse_params(params)
    for given in ({"lora": lora}, {"original": original}, {"original": original, "lora": lora}):
        found = peft.unfuse_params(fused, **given)
        assert type(found) is type(params)
        assert type(found["x"]) is list
        assert found["x"][0]["kernel"].names == (None, "model")
        plain = meta.unbox(peft.fuse_params(found))
        chex.assert_trees_all_close(plain, meta.unbox(fused), atol=1e-5)


def test_unfusing_under_jit():
    params = {"x": dense()}
    specs = {"x/lora": DENSE}
    original, lora = peft.split_params(params)
    fused = peft.fuse_params(params)
    exact = jax.jit(lambda f, o, a: peft.unfuse_params(f, original=o, lora=a, specs=specs))
    assert_close(exact(fused, original, lora), params, rounding(2))
    recover = jax.jit(lambda f, o: peft.unfuse_params(f, original=o, specs=specs, rank=2))
    chex.assert_trees_all_close(peft.fuse_params(recover(fused, original)), fused, atol=1e-5)
    with pytest.raises(ValueError, match="pass specs and rank"):
        jax.jit(lambda f, o: peft.unfuse_params(f, original=o))(fused, original)
    with pytest.raises(ValueError, match="Pass rank"):
        jax.jit(lambda f, o: peft.unfuse_params(f, original=o, specs=specs))(fused, original)


BASE, LORA = peft.split_params({"x": dense()})
FUSED = peft.fuse_params({"x": dense()})
OTHER_BIAS = {"x": FUSED["x"] | {"bias": array(5, seed=4)}}
CONV = {"x": {"kernel": array(2, 3, 5)}}
REFUSED = {
    "nothing to go by": (FUSED, {}, "needs `lora`"),
    "fused holds adapters": ({"x": dense()}, {"lora": LORA}, r"fused holds adapters.*'x/lora'"),
    "original holds adapters": (FUSED, {"original": {"x": dense()}}, "original holds adapters"),
    "rank beside lora": (FUSED, {"lora": LORA, "rank": 2}, "Leave one out"),
    "rank zero": (FUSED, {"original": BASE, "rank": 0}, "positive integer or None, got 0"),
    "rank of a bool": (FUSED, {"original": BASE, "rank": True}, "got True"),
    "rank of a float": (FUSED, {"original": BASE, "rank": 2.0}, "got 2.0"),
    "a bias differs": (OTHER_BIAS, {"original": BASE}, "'x/bias'"),
    "a bias differs, specs": (
        OTHER_BIAS,
        {"original": BASE, "specs": {"x/lora": DENSE}},
        "'x/bias'",
    ),
    "another layout": (CONV, {"original": jax.tree.map(jnp.zeros_like, CONV)}, "'x/kernel'.*specs"),
    "another shape": (FUSED, {"original": {"x": BASE["x"] | {"kernel": array(5, 6)}}}, "x/kernel"),
    "leaves missing": (FUSED, {"original": {"x": {"kernel": BASE["x"]["kernel"]}}}, "x/bias"),
    "leaves surplus": (FUSED, {"original": BASE | {"y": array(1)}}, r"only in original \['y'\]"),
    "no such layer": (FUSED, {"lora": {"y": LORA["x"]}}, "no 'y'"),
    "specs of another model": (
        FUSED,
        {"original": BASE, "specs": {"y/lora": DENSE}},
        "y/lora|y/kernel",
    ),
    "specs of another layout": (
        FUSED,
        {"original": BASE, "specs": {"x/lora": LoraSpec("kernel", "gir,ro->gio", 2)}},
        "x/kernel|x/lora",
    ),
    "specs without a spec": (FUSED, {"lora": LORA, "specs": {}}, r"without a spec: \['x/lora'\]"),
    "the wrong original": (FUSED, {"original": {"y": BASE["x"]}, "lora": LORA}, "x/kernel"),
    "scaling of zero": (
        FUSED,
        {"original": BASE, "specs": {"x/lora": dataclasses.replace(DENSE, scaling=0.0)}},
        "scaling",
    ),
    "rank of another model": (
        FUSED,
        {"lora": LORA, "specs": {"x/lora": dataclasses.replace(DENSE, rank=5, alpha=5.0)}},
        "rank",
    ),
    "integers": (
        {"x": {"kernel": jnp.ones((6, 5), jnp.int8)}},
        {"original": {"x": {"kernel": jnp.zeros((6, 5), jnp.int8)}}},
        "int8",
    ),
    "other dtypes": (
        FUSED,
        {"original": {"x": BASE["x"] | {"kernel": jnp.zeros((6, 5), jnp.int8)}}},
        "int8",
    ),
    "not a number": (
        {"x": FUSED["x"] | {"kernel": FUSED["x"]["kernel"].at[0, 0].set(jnp.nan)}},
        {"original": BASE},
        "x/kernel",
    ),
}


@pytest.mark.parametrize(("fused", "given", "message"), REFUSED.values(), ids=REFUSED)
def test_bad_input_is_refused(fused, given, message):
    with pytest.raises(ValueError, match=message):
        peft.unfuse_params(fused, **given)


def test_an_original_that_was_not_fused_into_is_not_taken_for_the_base():
    """Where fusing the original does not give the fused weight, the computed base stands."""
    base, lora = peft.split_params({"x": dense()})
    fused = peft.fuse_params({"x": dense()})
    wrong = {"x": base["x"] | {"kernel": base["x"]["kernel"].at[0, 0].add(1)}}
    found = peft.unfuse_params(fused, original=wrong, lora=lora)
    np.testing.assert_allclose(found["x"]["kernel"], base["x"]["kernel"], atol=1e-5)


def test_the_round_trip_of_a_model():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            x = peft.LoRAEmbed(rank=2, wrapped=nn.Embed(7, 6), alpha=3)(tokens)
            x = nn.MultiHeadDotProductAttention(2)(x)
            x = peft.LoRAConv(rank=2, wrapped=nn.Conv(6, (2,)))(x)
            return peft.LoRADense(rank=3, wrapped=nn.Dense(4), alpha=1)(x)

    tokens = np.zeros((1, 4), np.int32)
    shapes = jax.eval_shape(lambda: Model().init(key_of(0), tokens))["params"]
    params = jax.tree.map(lambda leaf: array(*leaf.shape, seed=leaf.size), shapes)
    specs = peft.lora_specs(Model(), tokens)
    assert len(specs) == 3
    original, lora = peft.split_params(params)
    fused = peft.fuse_params(params, specs=specs)
    exact = peft.unfuse_params(fused, original=original, lora=lora, specs=specs)
    chex.assert_trees_all_equal(exact, params)
    found = peft.unfuse_params(fused, original=original, specs=specs)
    chex.assert_trees_all_equal_shapes(found, params)
    chex.assert_trees_all_close(peft.fuse_params(found, specs=specs), fused, atol=1e-4)

"""Flax's own modules that hold layers, and the ways in which models hold modules."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from helpers import (
    RANK,
    Adapt,
    AdaptWeights,
    assert_close,
    check_adapts,
    initialise,
    intercepting,
    key_of,
    numbers,
    partly_slow,
    randomised,
    scattered,
    shapes,
)

import peft_jax as peft

DENSE = Adapt((nn.Dense,))


# --- Attention and recurrent cells ---------------------------------------------------------------


def test_attention():
    model = nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=6, out_features=5)
    found = check_adapts(model, Adapt(alpha=3), numbers(2, 3, 4))
    assert shapes(found.random) == {
        **{name: {"lora": {"a": (4, 2), "b": (2, 2, 3)}} for name in ("query", "key", "value")},
        "out": {"lora": {"a": (2, 3, 2), "b": (2, 5)}},
    }
    assert {path: spec.param for path, spec in found.specs.items()} == {
        f"{name}/lora": "kernel" for name in ("query", "key", "value", "out")
    }


@pytest.mark.slow
def test_attention_that_decodes_with_a_cache():
    """One token at a time gives what all tokens at once give."""
    model = nn.MultiHeadDotProductAttention(num_heads=2, decode=True)
    whole = nn.MultiHeadDotProductAttention(num_heads=2)
    x = numbers(1, 3, 4)
    with peft.ModuleInterceptor(Adapt()):
        variables = model.init(key_of(0), x)
        params = {**variables["params"]}
        base, lora = peft.split_params(params)
        params = peft.merge_params(base, randomised(lora))
        expected = whole.apply({"params": params}, x, mask=nn.make_causal_mask(x[..., 0]))
        cache, outputs = variables["cache"], []

        @jax.jit
        def step(cache, token):
            return model.apply({"params": params, "cache": cache}, token, mutable=["cache"])

        for i in range(3):
            y, changed = step(cache, x[:, i : i + 1])
            cache = changed["cache"]
            outputs.append(y)
    assert_close(jnp.concatenate(outputs, axis=1), expected)


def test_attention_over_attentions_own_module():
    """A rule may wrap the attention whole, at its weights: the same adapters, the same output."""
    model = nn.MultiHeadDotProductAttention(num_heads=2)
    x = numbers(2, 3, 4)
    inside = initialise(model, x, rule=Adapt())["params"]
    rule = AdaptWeights((nn.MultiHeadDotProductAttention,), ("kernel",))
    around = initialise(model, x, rule=rule)["params"]
    assert shapes(inside) == shapes(around)
    base, lora = peft.split_params(inside)
    params = peft.merge_params(base, randomised(lora))
    outputs = []
    for active in (Adapt(), rule):
        with intercepting(active):
            outputs.append(jax.jit(model.apply)({"params": params}, x))
    assert_close(*outputs)


CELLS = {
    "LSTM": (nn.LSTMCell(3), DENSE, 8),
    "optimized LSTM": (nn.OptimizedLSTMCell(3), AdaptWeights((nn.OptimizedLSTMCell,)), 8),
    "GRU": (nn.GRUCell(3), DENSE, 6),
    "simple": (nn.SimpleCell(3), DENSE, 2),
}


@pytest.mark.parametrize(("cell", "rule", "kernels"), partly_slow(CELLS, ("optimized LSTM", "GRU")))
def test_recurrent_cells(cell, rule, kernels):
    found = check_adapts(nn.RNN(cell), rule, numbers(2, 4, 3), compare_gradients=False)
    assert len(found.specs) == kernels
    assert all(path.startswith("cell/") for path in found.specs)


@pytest.mark.slow
def test_a_recurrent_network_both_ways():
    model = nn.Bidirectional(nn.RNN(nn.GRUCell(3)), nn.RNN(nn.GRUCell(3)))
    found = check_adapts(model, DENSE, numbers(1, 3, 2), compare_gradients=False)
    assert len(found.specs) == 12


def test_the_optimized_cell_takes_nothing_from_a_rule_on_dense():
    """It declares its kernels in modules whose call it does not run: no adapter, no change."""
    model, x = nn.RNN(nn.OptimizedLSTMCell(3)), numbers(2, 4, 3)
    chex.assert_trees_all_equal(initialise(model, x, rule=DENSE), initialise(model, x))


def test_convolutional_cell():
    cell = nn.ConvLSTMCell(features=2, kernel_size=(2, 2))
    found = check_adapts(nn.RNN(cell), Adapt(), numbers(1, 2, 3, 3, 2), compare_gradients=False)
    assert {spec.letters for spec in found.specs.values()} == {("abir", "ro", "abio")}
    assert len(found.specs) == 2


# --- Normalised weights --------------------------------------------------------------------------


class WeightNormed(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.WeightNorm(nn.Dense(5, name="dense"))(x)


class SpectralNormed(nn.Module):
    @nn.compact
    def __call__(self, x, update_stats=False):
        return nn.SpectralNorm(nn.Dense(5, name="dense"))(x, update_stats=update_stats)


def float64(tree):
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)


def test_weight_norm_normalises_the_sum():
    x = numbers(2, 4)
    found = check_adapts(WeightNormed(), Adapt(alpha=3), x)
    dense, norm = float64(found.params["dense"]), float64(found.params["WeightNorm_0"])
    lora = float64(found.random["dense"]["lora"])
    w = dense["kernel"] + 1.5 * lora["a"] @ lora["b"]
    (scale,) = jax.tree.leaves(norm)
    w = w / np.sqrt(np.sum(w**2, axis=0) + 1e-12) * scale
    assert_close(
        found.output, np.asarray(np.asarray(x, np.float64) @ w + dense["bias"], np.float32)
    )


@pytest.mark.slow
def test_spectral_norm_normalises_the_sum():
    """With the stored vectors, and their update by one step of the power iteration."""
    x = numbers(2, 4)
    with peft.ModuleInterceptor(Adapt(alpha=3)):
        variables = SpectralNormed().init(key_of(0), x)
        base, lora = peft.split_params(variables["params"])
        params = peft.merge_params(base, randomised(lora))
        variables = {**variables, "params": params}
        specs = peft.lora_specs(SpectralNormed(), x)
        y = SpectralNormed().apply(variables, x)
        updated, changes = SpectralNormed().apply(
            variables, x, update_stats=True, mutable=["batch_stats"]
        )
    fused = {**variables, "params": peft.fuse_params(params, specs=specs)}
    assert_close(y, SpectralNormed().apply(fused, x))
    expected = SpectralNormed().apply(fused, x, update_stats=True, mutable=["batch_stats"])
    assert_close((updated, changes), expected)

    dense = float64(params["dense"])
    w = dense["kernel"] + 1.5 * dense["lora"]["a"] @ dense["lora"]["b"]
    stats = float64(variables["batch_stats"])["SpectralNorm_0"]
    u = next(value for name, value in stats.items() if name.endswith("u")).reshape(1, -1)
    v = u @ w.T
    v /= np.sqrt(np.sum(v**2) + 1e-12)
    u = v @ w
    u /= np.sqrt(np.sum(u**2) + 1e-12)
    w = w / (v @ w @ u.T)
    assert_close(updated, np.asarray(np.asarray(x, np.float64) @ w + dense["bias"], np.float32))


NORMED = {
    "weight norm of a conv": (lambda: nn.WeightNorm(nn.Conv(3, (2,))), (2, 5, 4)),
    "weight norm of a general": (lambda: nn.WeightNorm(nn.DenseGeneral((2, 3))), (2, 4)),
    "weight norm, other axes": (
        lambda: nn.WeightNorm(nn.Dense(5), feature_axes=(0, 1), use_scale=False),
        (2, 4),
    ),
    "spectral norm of a conv": (lambda: nn.SpectralNorm(nn.Conv(3, (2,))), (2, 5, 4)),
    "a scan of weight norms": (None, (2, 4)),
    "remat of a weight norm": (None, (2, 4)),
}


@pytest.mark.parametrize(("make", "shape"), NORMED.values(), ids=NORMED)
def test_norms_of_other_layers(make, shape, request):
    class Step(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.WeightNorm(nn.Dense(4, name="dense"))(x), None

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            if make is not None:
                norm = make()
                if isinstance(norm, nn.SpectralNorm):
                    return norm(x, update_stats=False)
                return norm(x)
            if "scan" in request.node.name:
                stack = nn.scan(
                    Step, variable_axes={"params": 0}, split_rngs={"params": True}, length=2
                )
                return stack()(x, None)[0]
            return nn.remat(Step)()(x, None)[0]

    # The norm sees `kernel + 0`, the same numbers; but XLA may compute that inside the norm's sums,
    # and add their terms in another order then (jaxlib 0.10.0 does). Under SpectralNorm, 41 terms
    # are summed on the way to an output: 41 * 2**-24 = 2.4e-6 of the largest number, and 1e-5 where
    # three quarters of a sum cancel.
    check_adapts(
        Model(),
        Adapt(),
        numbers(*shape),
        compare_gradients=False,
        compare_start=assert_close,
    )


# --- Statistics ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_batch_statistics_change_as_in_the_fused_model():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            x = nn.Dense(6)(x)
            x = nn.BatchNorm(use_running_average=not train)(x)
            x = nn.Dropout(0.5, deterministic=not train)(nn.relu(x))
            return nn.Dense(2)(x)

    x = numbers(8, 4)
    rngs = {"dropout": key_of(1)}
    variables = initialise(Model(), x, rule=DENSE, train=False)
    base, lora = peft.split_params(variables["params"])
    params = peft.merge_params(base, randomised(lora))
    with peft.ModuleInterceptor(DENSE):
        specs = peft.lora_specs(Model(), x, train=False)
        found = Model().apply(
            {**variables, "params": params}, x, train=True, rngs=rngs, mutable=["batch_stats"]
        )
    fused = {**variables, "params": peft.fuse_params(params, specs=specs)}
    expected = Model().apply(fused, x, train=True, rngs=rngs, mutable=["batch_stats"])
    assert_close(found, expected)
    assert peft.split_params(variables["params"]).original.keys() == base.keys()


# --- How models hold modules ---------------------------------------------------------------------


class CalledTwice(nn.Module):
    @nn.compact
    def __call__(self, x):
        dense = nn.Dense(4)
        return dense(nn.relu(dense(x)))


class InSetup(nn.Module):
    def setup(self):
        self.first = nn.Dense(4)
        self.blocks = [nn.Dense(4), nn.Dense(4)]
        self.named = {"a": nn.Dense(4), "b": (nn.Dense(4),)}

    def __call__(self, x):
        for layer in (self.first, *self.blocks, self.named["a"], *self.named["b"]):
            x = nn.tanh(layer(x))
        return self.first(x)


class Shared(nn.Module):
    """A child that uses its parent's layer, and a field that two children share."""

    @nn.compact
    def __call__(self, x):
        dense = nn.Dense(4, name="dense")
        return User(dense, name="one")(x) + User(dense, name="two")(2 * x)


class User(nn.Module):
    layer: nn.Module

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="own")(self.layer(x))


class OneScope(nn.Module):
    """Two einsums whose kernels lie side by side, in the scope of their parent."""

    def setup(self):
        self.q = Projection("q_w", (4, 2, 3))
        self.k = Projection("k_w", (4, 2, 3))
        nn.share_scope(self, self.q)
        nn.share_scope(self, self.k)

    def __call__(self, x):
        return self.q(x) * self.k(x)


class Projection(nn.Module):
    weight: str
    shape: tuple[int, ...]

    @nn.compact
    def __call__(self, x):
        kernel = self.param(self.weight, nn.initializers.lecun_normal(), self.shape)
        return jnp.einsum("btd,dnh->btnh", x, kernel)


class SharesItsLayersScope(nn.Module):
    def setup(self):
        self.dense = nn.Dense(4)
        nn.share_scope(self, self.dense)

    def __call__(self, x):
        return nn.relu(self.dense(x))


class Methods(nn.Module):
    """Several methods, one of them `nn.compact`, and one that other modules call."""

    def setup(self):
        self.encoder, self.decoder = nn.Dense(3), nn.Dense(4)

    def encode(self, x):
        return self.encoder(x)

    def decode(self, z):
        return self.decoder(z)

    def __call__(self, x):
        return self.decode(nn.relu(self.encode(x)))


class Branches(nn.Module):
    """A layer named as a parameter, layers made for a container, and a parameter alone."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(4, name="kernel")(x)
        x = nn.Sequential([nn.Dense(4), nn.relu, nn.Sequential([nn.Dense(3)])], name="head")(x)
        return x * self.param("scale", nn.initializers.ones, (3,))[None]


X = numbers(2, 4)
MODELS = {
    "called twice": (CalledTwice(), X, {"Dense_0/lora"}),
    "setup": (
        InSetup(),
        X,
        {f"{name}/lora" for name in ("first", "blocks_0", "blocks_1", "named_a", "named_b_0")},
    ),
    "shared": (Shared(), X, {"dense/lora", "one/own/lora", "two/own/lora"}),
    "one scope with its layer": (SharesItsLayersScope(), X, {"lora"}),
    "methods": (Methods(), X, {"encoder/lora", "decoder/lora"}),
    "branches": (
        Branches(),
        X,
        {"kernel/lora", "Dense_0/lora", "Dense_1/lora"},
    ),
    "sequential": (
        nn.Sequential([nn.Dense(5), nn.relu, nn.Dense(3)]),
        X,
        {"layers_0/lora", "layers_2/lora"},
    ),
    "the model is a layer": (nn.Dense(5), X, {"lora"}),
    "the model is a named layer": (nn.Dense(5, name="top"), X, {"lora"}),
}


@pytest.mark.parametrize(("model", "x", "paths"), partly_slow(MODELS, list(MODELS)[::2]))
def test_models_hold_layers(model, x, paths):
    found = check_adapts(model, DENSE, x)
    assert found.specs.keys() == paths


@pytest.fixture
def registered():
    """`Projection` as a registered layer, for this test alone."""
    from peft_jax._surgery import layer_kinds

    before = dict(layer_kinds._LAYERS)
    yield
    layer_kinds._LAYERS.clear()
    layer_kinds._LAYERS.update(before)


def test_adapters_in_one_scope_have_names_of_their_own():
    model, x = OneScope(), numbers(2, 3, 4)
    found = check_adapts(model, AdaptWeights((Projection,)), x)
    assert len(found.specs) == 2
    assert {spec.param for spec in found.specs.values()} == {"q_w", "k_w"}
    one, two = (found.params[path] for path in found.specs)
    assert np.any(np.asarray(one["a"] != two["a"]))


def test_registered_layers_in_one_scope(registered):
    class Q(Projection):
        pass

    class K(Projection):
        pass

    class Model(nn.Module):
        def setup(self):
            self.q, self.k = Q("q_w", (4, 2, 3)), K("k_w", (4, 2, 3))
            nn.share_scope(self, self.q)
            nn.share_scope(self, self.k)

        def __call__(self, x):
            return self.q(x) * self.k(x)

    peft.register_layer(Q, param="q_w", equation="btd,dnh->btnh")
    peft.register_layer(K, param="k_w", equation="btd,dnh->btnh")

    def rule(module):
        if isinstance(module, Projection):
            return peft.LoRAEinsum(rank=RANK, wrapped=module)
        return module

    found = check_adapts(Model(), rule, numbers(2, 3, 4))
    assert {spec.param for spec in found.specs.values()} == {"q_w", "k_w"}


def test_another_method_is_adapted_too():
    model, rule = Methods(), DENSE
    params = initialise(model, X, rule=rule)["params"]
    base, lora = peft.split_params(params)
    params = peft.merge_params(base, randomised(lora))
    with peft.ModuleInterceptor(rule):
        y = model.apply({"params": params}, X, method="encode")
        specs = peft.lora_specs(model, X, method="encode")
    assert specs.keys() == {"encoder/lora"}
    lora = params["encoder"]["lora"]
    plain = model.apply({"params": base}, X, method="encode")
    assert_close(y, plain + X @ lora["a"] @ lora["b"])


def test_a_bound_model_is_adapted():
    params = initialise(InSetup(), X, rule=DENSE)["params"]
    with peft.ModuleInterceptor(DENSE):
        bound = InSetup().bind({"params": params})
        chex.assert_trees_all_equal(bound(X), InSetup().apply({"params": params}, X))


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        y = nn.MultiHeadDotProductAttention(num_heads=2)(nn.LayerNorm()(x))
        x = x + y
        y = nn.Dense(8, name="up")(nn.LayerNorm()(x))
        return x + nn.Dense(4, name="down")(nn.gelu(y))


class Transformer(nn.Module):
    layers: int = 12

    @nn.compact
    def __call__(self, ids):
        embed = nn.Embed(7, 4, name="embed")
        x = embed(ids)
        for i in range(self.layers):
            x = Block(name=f"block_{i}")(x)
        return embed.attend(nn.LayerNorm()(x))


@pytest.mark.slow
def test_a_deep_transformer():
    """Twelve layers, tied embeddings, 73 adapters: identity, and adapted = fused."""
    model, rule = Transformer(), Adapt(alpha=1)
    ids = jnp.asarray([[1, 2, 6]], jnp.int32)
    with peft.ModuleInterceptor(rule):
        specs = peft.lora_specs(model, ids)
        abstract = jax.eval_shape(lambda: model.init(key_of(0), ids))["params"]
    assert len(specs) == 12 * 6 + 1
    # Numbers in place of initial values: a program that draws them all takes long to compile.
    leaves, tree = jax.tree.flatten(abstract)
    params = jax.tree.unflatten(
        tree,
        [
            jnp.asarray(0.5 * scattered(leaf.size, i).reshape(leaf.shape), leaf.dtype)
            for i, leaf in enumerate(leaves)
        ],
    )

    @jax.jit
    def both(params):
        with peft.ModuleInterceptor(rule):
            adapted = model.apply({"params": params}, ids)
        return adapted, model.apply({"params": peft.fuse_params(params, specs=specs)}, ids)

    assert_close(*both(params))
    base, lora = peft.split_params(params)
    start = peft.merge_params(base, jax.tree.map(jnp.zeros_like, lora))
    chex.assert_trees_all_equal(both(start)[0], both(start)[1])

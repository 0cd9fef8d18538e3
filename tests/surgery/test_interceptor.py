"""Model surgery: what a `ModuleInterceptor` changes in a call, and all that it must leave alone."""

import dataclasses
import functools

import chex
import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.core import meta
from helpers import key_of
from models import Doubled

import peft_jax as peft

KEY = key_of(0)
X = np.random.default_rng(0).normal(size=(2, 4)).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Adapt:
    """LoRA on every Dense, by a rule that compares by value."""

    rank: int = 2
    name: str | None = None
    dropout: float = 0.0

    def __call__(self, module):
        if isinstance(module, nn.Dense) and self.name in (None, module.name):
            return peft.LoRADense(rank=self.rank, wrapped=module, dropout=self.dropout)
        return module


LORA = peft.ModuleInterceptor(Adapt())


def identity(module):
    return module


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.relu(nn.Dense(4)(x))
        x = nn.Dropout(0.5, deterministic=not train)(x)
        return nn.Dense(3)(x)


class SetUp(nn.Module):
    """Layers made in `setup`, one of them shared by two methods."""

    def setup(self):
        self.encoder = nn.Dense(4)
        self.blocks = [nn.Dense(4), nn.Dense(4)]
        self.heads = {"one": nn.Dense(3)}

    def __call__(self, x):
        x = self.encode(x)
        for block in self.blocks:
            x = nn.relu(block(x))
        return self.heads["one"](self.encoder(x))

    def encode(self, x):
        return nn.tanh(self.encoder(x))


def randomized(tree, seed=1):
    """The same tree with random values: adapters that do something."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) / 4, leaf.dtype), tree)


def adapted(model, *inputs, interceptor=LORA, **kwargs):
    """Variables of the model with adapters whose `b` is not zero."""
    with interceptor:
        variables = jax.eval_shape(lambda: model.init(KEY, *inputs, **kwargs))
    return {"params": randomized(variables["params"])}


def base_of(variables):
    return {**variables, "params": peft.split_params(variables["params"]).original}


def fused(model, variables, *inputs, interceptor=LORA, **kwargs):
    with interceptor:
        specs = peft.lora_specs(model, *inputs, **kwargs)
    return {**variables, "params": peft.fuse_params(variables["params"], specs=specs)}


def assert_same(actual, expected):
    chex.assert_trees_all_equal(actual, expected)


def assert_close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


# --- The examples that users start from ----------------------------------------------------------


def test_layer_written_into_a_model():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            layer = peft.LoRADense(rank=3, wrapped=nn.Dense(10))
            return layer(x)

    params = Model().init(KEY, X)["params"]
    shapes = {"kernel": (4, 10), "bias": (10,), "lora": {"a": (4, 3), "b": (3, 10)}}
    assert jax.tree.map(jnp.shape, params) == {"Dense_0": shapes}
    _, _ = peft.split_params(params)
    assert Model().apply({"params": params}, X).shape == (2, 10)


def test_adapter_written_into_a_model():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            dense = nn.Dense(4)
            lora = peft.LoRADenseAdapter(rank=3)  # Only do `x @ A @ B`
            return dense(x) + lora(x)

    params = randomized(Model().init(KEY, X)["params"])
    dense, adapter = params["Dense_0"], params["LoRADenseAdapter_0"]
    assert jax.tree.map(jnp.shape, adapter) == {"a": (4, 3), "b": (3, 4)}
    expected = X @ dense["kernel"] + dense["bias"][None] + X @ adapter["a"] @ adapter["b"]
    assert_close(Model().apply({"params": params}, X), expected)


def test_surgery_example():
    def _replace_dense_by_lora(module: nn.Module) -> nn.Module:
        if isinstance(module, nn.Dense):
            return peft.LoRADense(rank=3, wrapped=module)
        return module

    model = MLP()
    with peft.ModuleInterceptor(_replace_dense_by_lora):
        params = model.init(KEY, X)["params"]
        y = model.apply({"params": params}, X)
    assert params["Dense_0"]["lora"]["a"].shape == (4, 3)
    assert_same(y, model.apply(base_of({"params": params}), X))


# --- What stays as it was ------------------------------------------------------------------------


@pytest.mark.parametrize("rule", [identity, Adapt(name="no such layer")], ids=["identity", "none"])
def test_nothing_matched_changes_nothing(rule):
    model = MLP()
    with peft.ModuleInterceptor(rule):
        variables = model.init(KEY, X)
        program = jax.make_jaxpr(model.apply)(variables, X)
    assert_same(variables, model.init(KEY, X))
    assert str(program) == str(jax.make_jaxpr(model.apply)(variables, X))


class Everything(nn.Module):
    """Values and masks from several streams, running averages, sown and perturbed values."""

    @nn.compact
    def __call__(self, x, train=True):
        x = nn.Dense(4)(x)
        x = nn.Dropout(0.5, deterministic=not train)(x)
        x = x + jax.random.normal(self.make_rng("noise"), x.shape)
        x = self.perturb("hidden", nn.Dense(4, name="inner")(x))
        self.sow("losses", "size", jnp.sum(x**2), init_fn=lambda: 0.0, reduce_fn=jnp.add)
        self.sow("intermediates", "hidden", x)
        x = nn.BatchNorm(use_running_average=not train)(x)
        x = nn.Dropout(0.5, deterministic=not train)(x)
        return nn.Dense(3)(x) + self.param("offset", nn.initializers.normal(), (1, 3))


RNGS = {name: key_of(i) for i, name in enumerate(("params", "dropout", "noise"))}
MUTABLE = ("batch_stats", "losses", "intermediates", "perturbations")


def test_initial_values_and_masks_are_those_of_the_plain_model():
    model = Everything()
    plain_output, plain = model.init_with_output(RNGS, X)
    with peft.ModuleInterceptor(Adapt(dropout=0.5)):
        output, variables = model.init_with_output(RNGS, X)
        assert_same(variables, model.init(RNGS, X))
        again = model.apply(variables, X, rngs=RNGS, mutable=MUTABLE)
    assert_same(base_of(variables), plain)
    assert_same(output, plain_output)
    # `b` is zero: whatever is drawn in the adapter, the model's own draws give the same values.
    assert_same(again, model.apply(plain, X, rngs=RNGS, mutable=MUTABLE))


def test_adapter_dropout_acts_in_the_adapter_alone():
    model, interceptor = MLP(), peft.ModuleInterceptor(Adapt(dropout=0.5))
    variables = adapted(model, X, interceptor=interceptor)
    with interceptor:
        off = model.apply(variables, X)
        one, two = (model.apply(variables, X, rngs={"dropout": key_of(i)}) for i in (1, 2))
    with LORA:
        assert_same(off, model.apply(variables, X))
    assert not np.allclose(one, two)


def test_records_are_those_of_the_model_on_fused_weights():
    model = Everything()
    variables = adapted(model, X, interceptor=LORA)
    variables["batch_stats"] = model.init(RNGS, X)["batch_stats"]

    def records(variables):
        return model.apply(
            variables, X, rngs=RNGS, mutable=MUTABLE, capture_intermediates=is_of_the_base
        )

    def is_of_the_base(module, name):
        return not isinstance(module, peft.LoRADenseAdapter)

    with LORA:
        found = records(variables)
        flattened = flax.traverse_util.flatten_dict(found[1]["intermediates"])
    expected = records(fused(model, variables, X))
    chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-5)
    assert all(len(record) == 1 for record in flattened.values())


def test_capturing_all_intermediates_keeps_those_of_the_plain_model():
    model = MLP()
    variables = adapted(model, X)
    with LORA:
        y, state = model.apply(variables, X, capture_intermediates=True)
    found = state["intermediates"]
    expected = model.apply(fused(model, variables, X), X, capture_intermediates=True)[1]
    for path, value in flax.traverse_util.flatten_dict(expected["intermediates"]).items():
        assert_close(functools.reduce(lambda tree, key: tree[key], path, found), value)
    assert_same(found["__call__"], (y,))


@pytest.mark.slow
def test_gradients_of_perturbations():
    model = Everything()
    with LORA:
        variables = model.init(RNGS, X, train=False)

    def loss(perturbations, variables):
        y = model.apply({**variables, "perturbations": perturbations}, X, train=False, rngs=RNGS)
        return jnp.sum(y**2)

    with LORA:
        found = jax.grad(loss)(variables["perturbations"], variables)
    assert jnp.any(found["hidden"] != 0)
    assert_same(found, jax.grad(loss)(variables["perturbations"], base_of(variables)))


@pytest.mark.parametrize("model", [MLP(), SetUp()], ids=["compact", "setup"])
def test_bound_modules(model):
    variables = adapted(model, X)
    with LORA:
        expected = model.apply(variables, X)
        bound = model.bind(variables)
        assert_same(bound(X), expected)
        assert_same(bound(X), expected)
        module, unbound = bound.unbind()
        assert_same(module.apply(unbound, X), expected)
    plain = model.apply(base_of(variables), X)
    assert_same(model.bind(variables)(X), plain)
    assert not np.allclose(expected, plain)


def test_a_module_bound_outside_is_adapted_inside_only():
    model = SetUp()
    variables = adapted(model, X)
    bound = model.bind(variables)
    plain = bound(X)
    with LORA:
        inside = bound(X)
        assert_same(inside, model.apply(variables, X))
        assert_same(bound.encode(X), model.apply(variables, X, method="encode"))
    assert_same(bound(X), plain)
    assert not np.allclose(inside, plain)


def test_tabulate_shows_the_adapters():
    with LORA:
        table = MLP().tabulate(KEY, X, console_kwargs={"width": 200, "force_terminal": False})
    adapters = 2 * (4 + 4) + 2 * (4 + 3)
    assert f"Total Parameters: {4 * 4 + 4 + 4 * 3 + 3 + adapters} " in table
    assert "lora" in table
    rows = [line for line in table.splitlines() if "Dense_1" in line and "lora" not in line]
    assert len(rows) == 1, "each layer has one row"


def test_frozen_dicts():
    model = MLP()
    variables = adapted(model, X)
    with LORA:
        frozen = model.apply(flax.core.freeze(variables), X)
        assert_same(frozen, model.apply(variables, X))


# --- Which calls are adapted ---------------------------------------------------------------------


def test_every_argument_is_forwarded():
    class Odd(nn.Dense):
        @nn.compact
        def __call__(self, x, *rest, power, note="", other=None, scale=2):
            assert note == "seen"
            assert rest == ("second", None, {"third": 3})
            return super().__call__(x) ** power * scale + other(x)

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            other = nn.Dense(4, name="other")
            rest = ("second", None, {"third": 3})
            return Odd(4)(x, *rest, power=2, note="seen", other=other)

    def rule(module):
        return peft.LoRAWeight(rank=2, wrapped=module) if type(module) is Odd else module

    model, interceptor = Model(), peft.ModuleInterceptor(rule)
    variables = adapted(model, X, interceptor=interceptor)
    with interceptor:
        y = model.apply(variables, X)
    assert set(variables["params"]["Odd_0"]) == {"kernel", "bias", "lora"}
    assert_close(y, model.apply(fused(model, variables, X, interceptor=interceptor), X))


METHODS = {
    "by name": "encode",
    "as a function": SetUp.encode,
    "as a lambda": lambda module, x: module.encode(x),
    "of a layer": lambda module, x: module.encoder(x),
    "called on the class": lambda module, x: nn.Dense.__call__(module.encoder, x),
}


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_methods(method):
    model = SetUp()
    variables = adapted(model, X)
    with LORA:
        y = model.apply(variables, X, method=method)
    assert_close(y, model.apply(fused(model, variables, X), X, method=method))
    assert not np.allclose(y, model.apply(variables, X, method=method))


def test_layers_made_in_setup():
    model = SetUp()
    variables = adapted(model, X)
    names = {"encoder", "blocks_0", "blocks_1", "heads_one"}
    assert {name for name, layer in variables["params"].items() if "lora" in layer} == names
    with LORA:
        y = model.apply(variables, X)
    assert_close(y, model.apply(fused(model, variables, X), X))


def test_a_model_that_is_itself_a_layer_keeps_its_paths():
    model = nn.Dense(3)
    variables = adapted(model, X)
    assert set(variables["params"]) == {"kernel", "bias", "lora"}
    with LORA:
        y = model.apply(variables, X)
    assert_close(y, model.apply(fused(model, variables, X), X))


def test_a_layer_that_is_called_twice_has_one_adapter():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            layer = nn.Dense(4)
            return layer(layer(x))

    model = Model()
    variables = adapted(model, X)
    assert set(variables["params"]["Dense_0"]) == {"kernel", "bias", "lora"}
    with LORA:
        y = model.apply(variables, X)
    assert_close(y, model.apply(fused(model, variables, X), X))


def test_subclasses_are_refused_with_the_remedies():
    class MyDense(nn.Dense):
        pass

    with LORA, pytest.raises(ValueError, match="MyDense is not registered") as error:
        MyDense(3).init(KEY, X)
    assert "register_layer(MyDense, like=nn.Dense)" in str(error.value)
    assert "LoRAWeight" in str(error.value)
    peft.register_layer(MyDense, like=nn.Dense)
    with LORA:
        assert set(MyDense(3).init(KEY, X)["params"]) == {"kernel", "bias", "lora"}


def test_a_wrapper_of_another_kind_is_refused_with_the_fitting_one():
    with (
        peft.ModuleInterceptor(lambda module: peft.LoRAConv(rank=1, wrapped=module)),
        pytest.raises(ValueError, match="Use LoRADense or LoRAEinsum"),
    ):
        nn.Dense(3).init(KEY, X)


def test_rules_see_bound_modules_once_for_each_call_of_the_model():
    seen = []

    def look(module):
        seen.append((type(module).__name__, module.path, module.scope is not None))
        return module

    with peft.ModuleInterceptor(look):
        variables = SetUp().init(KEY, X)
        del seen[:]
        SetUp().apply(variables, X)
    assert len(seen) == len(set(seen))
    assert all(bound for *_, bound in seen)
    assert ("Dense", ("heads_one",), True) in seen


class TiedHead(nn.Module):
    """Applies its own layer to parameters of its own making, as tied heads do."""

    made_in_setup: bool

    def setup(self):
        self.table = nn.Embed(7, 4)
        self.inner = nn.Dense(4)
        if self.made_in_setup:
            self.decoder = nn.Dense(7, use_bias=False)

    def __call__(self, tokens):
        h = self.inner(self.table(tokens))
        decoder = self.decoder if self.made_in_setup else nn.Dense(7, use_bias=False, parent=None)
        return decoder.apply({"params": {"kernel": self.table.embedding.T}}, h)


@pytest.mark.parametrize("made_in_setup", [True, False])
def test_modules_applied_on_parameters_of_the_models_own_making_are_left_alone(made_in_setup):
    model, tokens = TiedHead(made_in_setup), np.arange(3)
    variables = adapted(model, tokens)
    assert jax.tree.map(lambda _: 0, variables["params"]).keys() == {"table", "inner"}
    with LORA:
        y = model.apply(variables, tokens)
    assert_close(y, model.apply(fused(model, variables, tokens), tokens))
    assert not np.allclose(y, model.apply(base_of(variables), tokens))


def test_interceptor_inside_a_compact_method():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dense(4, name="before")(x)
            with LORA:
                x = MLP(name="inside")(x)
            return nn.Dense(4, name="after")(x)

    model = Model()
    params = randomized(model.init(KEY, X)["params"])
    assert "lora" in params["inside"]["Dense_0"]
    assert "lora" not in params["before"]
    assert "lora" not in params["after"]
    inside = peft.fuse_params(params["inside"])
    y = model.apply({"params": params}, X)
    expected = nn.Dense(4).apply({"params": params["before"]}, X)
    expected = MLP().apply({"params": inside}, expected)
    assert_close(y, nn.Dense(4).apply({"params": params["after"]}, expected))
    with LORA, pytest.raises(ValueError, match="'inside/Dense_0'"):
        model.init(KEY, X)


# --- Interceptors inside interceptors ------------------------------------------------------------


class Convolutional(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(3, (2,))(x[..., None])
        return nn.Dense(2)(x)


def conv_rule(module):
    return peft.LoRAConv(rank=1, wrapped=module) if type(module) is nn.Conv else module


def test_nesting_in_either_order_gives_the_same():
    model, conv = Convolutional(), peft.ModuleInterceptor(conv_rule)
    with conv, LORA:
        variables = {"params": randomized(model.init(KEY, X)["params"])}
        one = model.apply(variables, X)
    with LORA, conv:
        chex.assert_trees_all_equal_structs(model.init(KEY, X), variables)
        other = model.apply(variables, X)
        specs = peft.lora_specs(model, X)
    assert_same(one, other)
    assert set(specs) == {"Conv_0/lora", "Dense_0/lora"}
    params = peft.fuse_params(variables["params"], specs=specs)
    assert_close(one, model.apply({"params": params}, X))


def weight_rule(module):
    return peft.LoRAWeight(rank=1, wrapped=module) if type(module) is MLP else module


def by_two_wrappers(module):
    inner = Adapt()(module)
    return inner if inner is module else peft.LoRAEinsum(rank=1, wrapped=inner)


CLASHES = {
    "interceptors": (Adapt(), Adapt(rank=3)),
    "the same interceptor": (Adapt(), Adapt()),
    "below LoRAWeight": (weight_rule, Adapt()),
    "above LoRAWeight": (Adapt(), weight_rule),
    "wrappers": (identity, by_two_wrappers),
}


@pytest.mark.parametrize("rules", CLASHES.values(), ids=CLASHES)
def test_two_adapters_on_one_layer_are_refused(rules):
    outer, inner = map(peft.ModuleInterceptor, rules)
    with outer, inner, pytest.raises(ValueError, match=r"'Dense_0'.*2 named 'lora'"):
        MLP().init(KEY, X)


def test_an_interceptor_over_a_model_with_wrappers_is_refused():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return peft.LoRADense(rank=1, wrapped=nn.Dense(3))(x)

    with LORA, pytest.raises(ValueError, match=r"'Dense_0'.*2 named 'lora'"):
        Model().init(KEY, X)


# --- Replacements that are not of this library ---------------------------------------------------


def double(module):
    return Doubled(module) if type(module) is nn.Dense else module


def test_a_users_own_wrapper():
    model = MLP()
    with peft.ModuleInterceptor(double):
        variables = model.init(KEY, X)
        y = model.apply(variables, X)
    assert_same(variables, model.init(KEY, X))
    doubled = jax.tree.map(lambda leaf: 2 * leaf, variables)
    assert_close(y, model.apply(doubled, X))


@pytest.mark.slow
def test_a_users_own_wrapper_and_an_adapter_in_either_order():
    model, own = MLP(), peft.ModuleInterceptor(double)
    variables = adapted(model, X)
    with LORA, own:
        one = model.apply(variables, X)
    with own, LORA:
        other = model.apply(variables, X)
        assert jax.tree.structure(model.init(KEY, X)) == jax.tree.structure(variables)
    assert_same(one, other)
    weights = fused(model, variables, X)
    assert_close(one, model.apply(jax.tree.map(lambda leaf: 2 * leaf, weights), X))


def test_a_copy_with_other_fields_takes_the_place_of_the_layer():
    def halve_precision(module):
        if type(module) is not nn.Dense:
            return module
        return module.clone(dtype=jnp.bfloat16, parent=module.scope, name=module.name)

    model = MLP()
    variables = model.init(KEY, X)
    with peft.ModuleInterceptor(halve_precision):
        assert_same(model.init(KEY, X), variables)
        y = model.apply(variables, X)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(y.astype(jnp.float32), model.apply(variables, X), rtol=0.1, atol=0.1)


def test_another_layer_takes_the_place_of_the_layer():
    def einsum(module):
        if type(module) is not nn.Dense:
            return module
        shape = (4, module.features)
        return nn.Einsum(shape, "...i,io->...o", parent=module.scope, name=module.name)

    model = nn.Dense(4)
    with peft.ModuleInterceptor(einsum):
        variables = model.init(KEY, X)
        y = model.apply(variables, X)
    assert_close(y, model.apply(variables, X))


class Outer(nn.Module):
    @nn.compact
    def __call__(self, x):
        inner = SetUp(name="inner")
        return inner(x), inner.encode(x)


def test_a_replacement_may_hold_a_layer_that_the_rule_matches():
    class Own(nn.Module):
        features: int

        @nn.compact
        def __call__(self, x):
            return nn.Dense(self.features)(x)

    def rule(module):
        if type(module) is not nn.Dense:
            return module
        return Own(module.features, parent=module.scope, name=module.name)

    with peft.ModuleInterceptor(rule):
        params = nn.Dense(3).init(KEY, X)["params"]
    assert set(params["Dense_0"]) == {"kernel", "bias"}


@pytest.mark.parametrize("fields", [(), ("parent", "name")], ids=["plainly", "in its scope"])
def test_methods_that_a_replacement_lacks_go_to_the_original(fields):
    def rule(module):
        if type(module) is not SetUp:
            return module
        given = {"parent": module.scope, "name": module.name}
        return Doubled(module, **{field: given[field] for field in fields})

    variables = randomized(Outer().init(KEY, X))
    called, encoded = Outer().apply(variables, X)
    with peft.ModuleInterceptor(rule):
        found = Outer().apply(variables, X)
    assert_same(found, (2 * called, encoded))


# --- Rules that are refused ----------------------------------------------------------------------


@pytest.mark.parametrize("returned", [None, "module", nn.Dense])
def test_a_rule_that_returns_no_module_is_refused(returned):
    def rule(module):
        return returned if type(module) is nn.Dense else module

    with peft.ModuleInterceptor(rule), pytest.raises(ValueError, match="'Dense_0'"):
        MLP().init(KEY, X)


@pytest.mark.parametrize("rule", [None, 3, {"Dense": "LoRADense"}])
def test_a_rule_that_is_no_function_is_refused(rule):
    with pytest.raises(ValueError, match="takes a function"):
        peft.ModuleInterceptor(rule)


def test_a_rule_that_is_not_hashable_is_refused():
    @dataclasses.dataclass
    class Unhashable:
        rank: int = 1

        def __call__(self, module):
            return module

    with pytest.raises(ValueError, match="frozen dataclass"), peft.ModuleInterceptor(Unhashable()):
        pass
    assert set(nn.Dense(3).init(KEY, X)["params"]) == {"kernel", "bias"}


class Clashing(nn.Module):
    """A layer of the user's with something of its own called `lora`."""

    parameter: bool

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", nn.initializers.ones, (4, 4))
        if self.parameter:
            return x @ kernel * self.param("lora", nn.initializers.ones, (1, 1))
        return nn.Dense(4, name="lora")(x @ kernel)


@pytest.mark.parametrize("parameter", [True, False], ids=["parameter", "module"])
@pytest.mark.parametrize("wrapper", [peft.LoRAWeight, peft.LoRADense])
def test_the_users_own_lora_is_not_overwritten(parameter, wrapper):
    peft.register_layer(Clashing, equation="...i,io->...o")

    def rule(module):
        return wrapper(rank=1, wrapped=module) if type(module) is Clashing else module

    with peft.ModuleInterceptor(rule), pytest.raises(ValueError, match="named 'lora'"):
        Clashing(parameter).init(KEY, X)


def test_a_users_layer_called_lora_is_adapted_like_any_other():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(4, name="lora")(x)

    variables = adapted(Model(), X)
    assert set(variables["params"]["lora"]) == {"kernel", "bias", "lora"}
    with LORA:
        y = Model().apply(variables, X)
    assert_close(y, Model().apply(fused(Model(), variables, X), X))


def test_parameters_without_adapters_are_refused_under_a_rule():
    variables = MLP().init(KEY, X)
    with LORA, pytest.raises(ValueError, match=r"no adapter at 'Dense_0/lora'.*merge_params"):
        MLP().apply(variables, X)


# --- Interceptors of the user's own --------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Scale(peft.Interceptor):
    """Multiplies what every Dense returns."""

    by: float

    def interceptor(self, next_fun, args, kwargs, context):
        y = next_fun(*args, **kwargs)
        is_layer = isinstance(context.module, nn.Dense) and context.method_name == "__call__"
        return y * self.by if is_layer else y


def test_an_interceptor_of_the_users_own_acts_where_it_nests():
    """As in Flax, the inner interceptor is the one nearer to the method."""
    model = nn.Dense(3)
    variables = adapted(model, X)
    plain = model.apply(variables, X)
    expected = model.apply(fused(model, variables, X), X)
    with LORA, Scale(2.0):
        assert_close(model.apply(variables, X), 2 * plain + (expected - plain))
    with Scale(2.0), LORA:
        assert_close(model.apply(variables, X), 2 * expected)


def test_an_interceptor_needs_its_method():
    class Empty(peft.Interceptor):
        pass

    with pytest.raises(TypeError, match="interceptor"):
        Empty()


def test_partitioned_parameters_stay_partitioned():
    init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
    model = nn.Dense(3, kernel_init=init)
    with LORA:
        params = model.init(KEY, X)["params"]
    assert params["kernel"].names == (None, "model")
    assert isinstance(params["lora"]["a"], meta.Partitioned)
    assert params["lora"]["b"].names == (None, "model")
    with LORA:
        assert_same(
            model.apply({"params": params}, X), model.apply({"params": meta.unbox(params)}, X)
        )


# --- Replacements take over the place of the module ----------------------------------------------


@pytest.mark.parametrize(
    "changed",
    [
        lambda module: module.clone(features=5),
        lambda module: module.copy(features=5),
        lambda module: nn.Dense(5),
        lambda module: peft.LoRADense(rank=2, wrapped=nn.Dense(5)),
    ],
    ids=["clone", "copy", "another layer", "a wrapper of another layer"],
)
def test_a_replacement_has_the_paths_of_the_module(changed):
    def rule(module):
        is_wanted = type(module) is nn.Dense and module.features == 3
        return changed(module) if is_wanted else module

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3, name="dense")(x)

    with peft.ModuleInterceptor(rule):
        params = Model().init(KEY, X)["params"]
        assert Model().apply({"params": params}, X).shape == (*X.shape[:-1], 5)
    assert set(params) == {"dense"}
    assert params["dense"]["kernel"].shape == (X.shape[-1], 5)


@pytest.mark.parametrize(
    "rule", [Adapt, peft.LoRADense(rank=2, wrapped=nn.Dense(3)), None], ids=repr
)
def test_a_rule_is_a_function_from_modules_to_modules(rule):
    with pytest.raises(ValueError, match="a function from modules to modules"):
        peft.ModuleInterceptor(rule)

"""Wrappers as modules: how they describe themselves, and that copies of them work."""

import copy
import dataclasses
import pickle

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
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

    def __call__(self, module):
        if isinstance(module, nn.Dense) and self.name in (None, module.name):
            return peft.LoRADense(rank=self.rank, wrapped=module)
        return module


LORA = peft.ModuleInterceptor(Adapt())


class SetUp(nn.Module):
    """Layers made in `setup`."""

    def setup(self):
        self.encoder = nn.Dense(4)
        self.heads = {"one": nn.Dense(3)}

    def __call__(self, x):
        return self.heads["one"](self.encoder(x))


def randomized(tree):
    """The same tree with random values: adapters that do something."""
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) / 4, leaf.dtype), tree)


def assert_same(actual, expected):
    chex.assert_trees_all_equal(actual, expected)


def assert_close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


# --- Description, copies -------------------------------------------------------------------------


def test_descriptions_terminate():
    texts = []

    def rule(module):
        replacement = Adapt()(module)
        texts.extend((repr(module), repr(replacement), str(replacement)))
        return replacement

    interceptor = peft.ModuleInterceptor(rule)
    with interceptor:
        variables = SetUp().init(KEY, X)
        bound = SetUp().bind(variables)
        bound(X)
        texts += [repr(bound), repr(bound.encoder), repr(interceptor), repr(Adapt()(nn.Dense(3)))]
    assert all(0 < len(text) < 5000 for text in texts)
    assert any("LoRADense(" in text and "rank = 2" in text for text in texts)


def test_descriptions_of_a_users_own_wrapper_terminate():
    texts = []

    def rule(module):
        if type(module) is not nn.Dense:
            return module
        own = Doubled(module)
        texts.extend((repr(own), repr(module)))
        return own

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3)(x)

    with peft.ModuleInterceptor(rule):
        Model().init(KEY, X)
    assert all(0 < len(text) < 5000 for text in texts)


def test_repr_names_what_is_wrapped():
    text = repr(peft.LoRADense(rank=3, wrapped=nn.Dense(10)))
    assert "LoRADense(" in text
    assert "rank = 3" in text
    assert "features = 10" in text


COPIES = {
    "pickle": lambda wrapper: pickle.loads(pickle.dumps(wrapper)),
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "clone": lambda wrapper: wrapper.clone(),
    "replace": lambda wrapper: dataclasses.replace(wrapper, parent=None),
}


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_copies_of_wrappers(copied):
    ones = nn.initializers.ones  # Flax's default initializers cannot be pickled
    layer = nn.Dense(3, kernel_init=ones, bias_init=ones)
    wrapper = peft.LoRADense(rank=2, alpha=4, wrapped=layer, a_init=ones, b_init=ones)
    twin = copied(wrapper)
    variables = wrapper.init(KEY, X)
    assert set(variables["params"]) == {"kernel", "bias", "lora"}
    assert_same(twin.init(KEY, X), wrapper.init(KEY, X))
    assert_same(twin.apply(variables, X), wrapper.apply(variables, X))
    assert (twin.rank, twin.features) == (2, 3)
    assert twin == wrapper
    assert hash(twin) == hash(wrapper)


def test_clone_with_other_fields():
    wrapper = peft.LoRADense(rank=2, wrapped=nn.Dense(3)).clone(rank=1)
    assert wrapper.init(KEY, X)["params"]["lora"]["b"].shape == (1, 3)


@pytest.mark.parametrize("wrapped", [True, False], ids=["given", "made in setup"])
def test_wrappers_in_fields_and_unbind(wrapped):
    class Model(nn.Module):
        layer: nn.Module | None = None

        def setup(self):
            self.inner = self.layer or peft.LoRADense(rank=2, wrapped=nn.Dense(3))

        def __call__(self, x):
            return self.inner(x)

    given = peft.LoRADense(rank=2, wrapped=nn.Dense(3)) if wrapped else None
    model = Model(given)
    variables = randomized(jax.eval_shape(lambda: model.init(KEY, X)))
    (layer,) = variables["params"].values()
    assert set(layer) == {"kernel", "bias", "lora"}
    expected = model.apply(variables, X)
    bound = model.bind(variables)
    assert_same(bound(X), expected)
    inner, inside = bound.inner.unbind()
    assert_same(inner.apply(inside, X), expected)
    specs = peft.lora_specs(model, X)
    params = peft.fuse_params(variables["params"], specs=specs)
    (plain,) = params.values()
    assert_close(expected, nn.Dense(3).apply({"params": plain}, X))


def test_a_wrapper_of_a_layer_that_the_model_uses_plainly_too():
    class Model(nn.Module):
        def setup(self):
            self.layer = nn.Dense(3)
            self.adapted = peft.LoRADense(rank=2, wrapped=self.layer)

        def __call__(self, x):
            return self.layer(x), self.adapted(x)

    variables = randomized(jax.eval_shape(lambda: Model().init(KEY, X)))
    assert set(variables["params"]["layer"]) == {"kernel", "bias", "lora"}
    plain, with_adapter = Model().apply(variables, X)
    lora = variables["params"]["layer"]["lora"]
    assert_close(with_adapter, plain + X @ lora["a"] @ lora["b"])


def test_a_wrapper_outside_of_a_call_names_the_remedy():
    with pytest.raises(ValueError, match=r"`\.init` and `\.apply`"):
        peft.LoRADense(rank=2, wrapped=nn.Dense(3))(X)

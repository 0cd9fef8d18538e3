"""Adapters at the weight: `LoRAWeight` on modules whose product cannot be taken apart."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from helpers import (
    RANK,
    AdaptWeights,
    assert_close,
    check_adapts,
    initialise,
    key_of,
    numbers,
    partly_slow,
    randomised,
    shapes,
)

import peft_jax as peft


class DenseRelu(nn.Dense):
    """A subclass that computes something else."""

    def __call__(self, inputs):
        return nn.relu(super().__call__(inputs) + 0.3)


class Own(nn.Module):
    """A module of the user's own, with an activation between two parameters and a bias."""

    @nn.compact
    def __call__(self, x):
        up = self.param("up", nn.initializers.lecun_normal(), (x.shape[-1], 6))
        shift = self.param("shift", nn.initializers.zeros, (6,))
        down = self.param("down", nn.initializers.lecun_normal(), (6, 2, 3))
        return jnp.einsum("...h,hop->...op", nn.tanh(x @ up + shift[None]), down)


class Twice(nn.Module):
    """One parameter, used as it is and transposed."""

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (x.shape[-1], 6))
        return nn.gelu(x @ kernel) @ kernel.T


class TwiceRead(nn.Module):
    """One parameter, read in `setup` and used in two methods."""

    def setup(self):
        self.table = self.param("table", nn.initializers.lecun_normal(), (4, 6))

    def encode(self, x):
        return x @ self.table

    def __call__(self, x):
        return self.encode(x) @ self.table.T


class Inner(nn.Module):
    """Modules inside modules: layers that the library knows, and parameters beside them."""

    @nn.compact
    def __call__(self, x):
        x = DenseRelu(5, name="first")(x)
        x = nn.Dense(4, name="second")(x)
        gate = self.param("gate", nn.initializers.lecun_normal(), (4, 4))
        return x * nn.sigmoid(x @ gate)


class Tied(nn.Module):
    def setup(self):
        self.embed = nn.Embed(7, 4)

    def __call__(self, ids):
        return self.embed.attend(self.embed(ids))


X = numbers(2, 4)
IDS = jnp.asarray([[0, 3, 6]], jnp.int32)
MODULES = {
    "dense": (nn.Dense(5), X, {"lora": "kernel"}),
    "activation inside": (DenseRelu(5), X, {"lora": "kernel"}),
    "several parameters": (Own(), X, {"lora": "up", "lora_down": "down"}),
    "used twice": (Twice(), X, {"lora": "kernel"}),
    "read in setup": (TwiceRead(), X, {"lora": "table"}),
    "modules inside": (
        Inner(),
        X,
        {"lora": "gate", "first/lora": "kernel", "second/lora": "kernel"},
    ),
    "embed": (nn.Embed(7, 5), IDS, {"lora": "embedding"}),
    "tied embeddings": (Tied(), IDS, {"embed/lora": "embedding"}),
    "conv with groups": (
        nn.Conv(6, (3,), feature_group_count=2),
        numbers(2, 5, 4),
        {"lora": "kernel"},
    ),
    "einsum with a batch axis": (
        nn.Einsum((3, 4, 5), "bnd,ndh->bnh", use_bias=False),
        numbers(2, 3, 4),
        {"lora": "kernel"},
    ),
    "dense general with a batch axis": (
        nn.DenseGeneral(5, batch_dims=(0,)),
        numbers(2, 3, 4),
        {"lora": "kernel", "lora_bias": "bias"},
    ),
    "a local conv": (nn.ConvLocal(3, (2,), use_bias=False), numbers(2, 4, 2), {"lora": "kernel"}),
}


@pytest.mark.parametrize(
    ("name", "how"),
    partly_slow(
        [(name, how) for name in MODULES for how in ("by hand", "interceptor")],
        lambda pair: list(MODULES).index(pair[0]) % 2 == (pair[1] == "by hand"),
    ),
)
def test_modules_at_their_weights(name, how):
    module, x, adapters = MODULES[name]
    if how == "by hand":
        model, rule = peft.LoRAWeight(rank=RANK, alpha=3, wrapped=module), None
    else:
        model, rule = module, AdaptWeights((type(module),), alpha=3)
    found = check_adapts(model, rule, x, plain=module, compare_gradients=False)
    assert {path: spec.param for path, spec in found.specs.items()} == adapters
    assert {spec.scaling for spec in found.specs.values()} == {1.5}


def test_layouts_are_those_of_the_layer_or_last_axis_out():
    params = initialise(Own(), X, rule=AdaptWeights((Own,)))["params"]
    assert shapes(params) == {
        "up": (4, 6),
        "shift": (6,),
        "down": (6, 2, 3),
        "lora": {"a": (4, 2), "b": (2, 6)},
        "lora_down": {"a": (6, 2, 2), "b": (2, 3)},
    }
    layer = nn.Einsum((3, 4, 5), "bnd,ndh->bnh", use_bias=False)
    params = initialise(layer, numbers(2, 3, 4), rule=AdaptWeights((nn.Einsum,)))["params"]
    assert shapes(params["lora"]) == {"a": (3, 4, 2), "b": (2, 5)}
    general = nn.DenseGeneral(5, batch_dims=(0,))
    params = initialise(general, numbers(3, 2, 4), rule=AdaptWeights((nn.DenseGeneral,)))["params"]
    assert shapes(params["lora"]) == {"a": (3, 4, 2), "b": (3, 2, 5)}
    # A bias of two axes is a parameter of two axes: name the kernel to leave it alone.
    assert shapes(params["lora_bias"]) == {"a": (3, 2), "b": (2, 5)}


def test_the_module_sees_the_sum():
    """The module's own forward runs on ``kernel + scaling * a·b``, by numpy in float64."""
    model = peft.LoRAWeight(rank=RANK, alpha=1, wrapped=Twice())
    params = initialise(model, X)["params"]
    params["lora"] = randomised(params["lora"])
    kernel, a, b, x = (
        np.asarray(array, np.float64)
        for array in (params["kernel"], params["lora"]["a"], params["lora"]["b"], X)
    )
    w = kernel + 0.5 * a @ b
    h = x @ w
    expected = (0.5 * h * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))) @ w.T
    assert_close(model.apply({"params": params}, X), np.asarray(expected, np.float32))


# --- Which parameters ----------------------------------------------------------------------------


SELECTED = {
    "a name": (["kernel"], {"first/lora", "second/lora"}),
    "the end of a path": (["second/kernel"], {"second/lora"}),
    "two": (["gate", "first/kernel"], {"lora", "first/lora"}),
    "the module's own": (("gate",), {"lora"}),
}


@pytest.mark.parametrize(("params", "paths"), SELECTED.values(), ids=SELECTED)
def test_selected_parameters(params, paths):
    model = peft.LoRAWeight(rank=RANK, params=params, wrapped=Inner())
    found = check_adapts(model, None, X, plain=Inner(), compare_gradients=False)
    assert found.specs.keys() == paths


def test_the_end_of_a_path_is_whole_names():
    """`gate` is not the end of `my_gate`."""

    class Gates(nn.Module):
        @nn.compact
        def __call__(self, x):
            for name in ("gate", "my_gate"):
                x = x @ self.param(name, nn.initializers.lecun_normal(), (4, 4))
            return x

    model = peft.LoRAWeight(rank=RANK, params=["gate"], wrapped=Gates())
    assert [spec.param for spec in peft.lora_specs(model, X).values()] == ["gate"]


def test_a_full_path_inside_a_model():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return Inner(name="two")(Inner(name="one")(x))

    rule = AdaptWeights((Model,), ("two/first/kernel", "one/gate"))
    found = check_adapts(Model(), rule, X, compare_gradients=False)
    assert found.specs.keys() == {"two/first/lora", "one/lora"}


def test_one_parameter_of_several_is_named_lora():
    model = peft.LoRAWeight(rank=RANK, params=["down"], wrapped=Own())
    specs = peft.lora_specs(model, X)
    assert [spec.param for spec in specs.values()] == ["down"]
    params = initialise(model, X)["params"]
    base, lora = peft.split_params(params)
    assert set(base) == {"up", "shift", "down"}
    assert len(lora) == 1


def test_a_name_that_matches_nothing_raises():
    model = peft.LoRAWeight(rank=RANK, params=["first/kernal"], wrapped=Inner())
    with pytest.raises(ValueError, match=r"first/kernal.*Close names.*first/kernel"):
        model.init(key_of(0), X)
    model = peft.LoRAWeight(rank=RANK, params=["gate", "nowhere"], wrapped=Inner())
    with pytest.raises(ValueError, match="'nowhere' is no parameter"):
        model.init(key_of(0), X)


def test_a_parameter_of_one_axis_raises():
    model = peft.LoRAWeight(rank=RANK, params=["shift", "up"], wrapped=Own())
    with pytest.raises(ValueError, match=r"shift.*\(6,\).*two axes or more"):
        model.init(key_of(0), X)


def test_names_are_a_list():
    with pytest.raises(ValueError, match=r"params=\['kernel'\]"):
        peft.LoRAWeight(rank=RANK, params="kernel", wrapped=nn.Dense(5))
    with pytest.raises(ValueError, match="params"):
        peft.LoRAWeight(rank=RANK, params=[], wrapped=nn.Dense(5)).init(key_of(0), X)


def test_dropout_raises():
    with pytest.raises(ValueError, match=r"[Dd]ropout.*0\.1"):
        peft.LoRAWeight(rank=RANK, dropout=0.1, wrapped=nn.Dense(5))


NOTHING = {
    "no parameter": nn.LayerNorm(use_bias=False, use_scale=False),
    "one axis": nn.LayerNorm(),
    "a function": nn.Sequential([nn.relu]),
}


@pytest.mark.parametrize("module", NOTHING.values(), ids=NOTHING)
def test_a_module_with_nothing_to_adapt_raises(module):
    with pytest.raises(ValueError, match="nothing to adapt"):
        peft.LoRAWeight(rank=RANK, wrapped=module).init(key_of(0), X)


def test_two_adapters_on_a_layer_raise():
    model = peft.LoRAWeight(rank=RANK, wrapped=peft.LoRADense(rank=RANK, wrapped=nn.Dense(5)))
    with pytest.raises(ValueError, match="'lora'"):
        model.init(key_of(0), X)

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return peft.LoRADense(rank=RANK, wrapped=nn.Dense(5))(x)

    with pytest.raises(ValueError, match="'lora'"):
        peft.LoRAWeight(rank=RANK, wrapped=Model()).init(key_of(0), X)


# --- Lifted --------------------------------------------------------------------------------------


class Step(nn.Module):
    by_hand: bool

    @nn.compact
    def __call__(self, x, _):
        module = Inner(name="inner")
        return (peft.LoRAWeight(rank=RANK, wrapped=module) if self.by_hand else module)(x), None


def scanned(axis):
    lift = nn.scan(Step, variable_axes={"params": axis}, split_rngs={"params": True}, length=2)
    return lambda by_hand, x: lift(by_hand, name="stack")(x, None)[0]


def mapped(by_hand, x):
    lift = nn.vmap(
        Step,
        variable_axes={"params": 1},
        split_rngs={"params": True},
        in_axes=None,
        axis_size=2,
    )
    return lift(by_hand, name="stack")(x, None)[0]


LIFTS = {
    "scan 0": (scanned(0), (0,)),
    "scan -1": (scanned(-1), (-1,)),
    "vmap 1": (mapped, (1,)),
    "remat": (lambda by_hand, x: nn.remat(Step)(by_hand, name="stack")(x, None)[0], ()),
}


COMBINATIONS = [
    *((lift, "interceptor") for lift in LIFTS),
    *((lift, "by hand") for lift in ("scan -1", "remat")),
    *((lift, "around the lift") for lift in ("scan 0", "vmap 1")),
]


@pytest.mark.parametrize(("lift", "how"), partly_slow(COMBINATIONS, COMBINATIONS[::3]))
def test_under_a_lift(lift, how):
    lift, axes = LIFTS[lift]

    class Model(nn.Module):
        by_hand: bool

        @nn.compact
        def __call__(self, x):
            return lift(self.by_hand, x)

    rules = {
        "by hand": None,
        "interceptor": AdaptWeights((Inner,)),
        "around the lift": AdaptWeights((Model,)),
    }
    model = Model(how == "by hand")
    found = check_adapts(model, rules[how], X, plain=Model(False), compare_gradients=False)
    assert found.specs.keys() == {
        f"stack/inner/{path}" for path in ("lora", "first/lora", "second/lora")
    }
    assert {spec.stack_axes for spec in found.specs.values()} == {axes}


def test_bfloat16_weights_stay_bfloat16():
    module = nn.Dense(5, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    model = peft.LoRAWeight(rank=RANK, wrapped=module)
    params = initialise(model, X)["params"]
    params["lora"] = randomised(params["lora"])
    y = model.apply({"params": params}, X)
    fused = peft.fuse_params(params, specs=peft.lora_specs(model, X))
    assert {params["kernel"].dtype, fused["kernel"].dtype, y.dtype} == {jnp.dtype(jnp.bfloat16)}
    chex.assert_trees_all_equal(y, module.apply({"params": fused}, X))


def test_partitioning_carries_over():
    init = nn.with_partitioning(nn.initializers.lecun_normal(), ("in", "out"))
    params = initialise(DenseRelu(5, kernel_init=init), X, rule=AdaptWeights((DenseRelu,)))[
        "params"
    ]
    assert params["lora"]["a"].names == ("in", None)
    assert params["lora"]["b"].names == (None, "out")


def test_gradients_of_the_frozen_base_are_not_needed():
    """The adapters' gradient is the delta's alone: ``dL/da = dL/dW · bᵀ``."""
    model = peft.LoRAWeight(rank=RANK, wrapped=DenseRelu(5))
    params = initialise(model, X)["params"]
    params["lora"] = randomised(params["lora"])
    gradient = jax.grad(lambda params: jnp.sum(model.apply({"params": params}, X) ** 2))(params)
    b = params["lora"]["b"]
    assert_close(gradient["lora"]["a"], gradient["kernel"] @ b.T)

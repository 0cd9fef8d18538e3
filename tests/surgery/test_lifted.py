"""Every kind of layer under every lifted transform of Flax, and under those of JAX."""

import functools
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from helpers import (
    RANK,
    WRAPPERS,
    Adapt,
    assert_close,
    assert_rounded,
    check_adapts,
    initialise,
    intercepting,
    key_of,
    numbers,
    randomised,
    shapes,
)

import peft_jax as peft

LAYERS = {
    "dense": lambda: nn.Dense(5, name="dense"),
    "einsum": lambda: nn.Einsum((3, 4, 5), name="einsum"),
    "general": lambda: nn.DenseGeneral((2, 5), axis=-2, batch_dims=(0,), name="general"),
    "conv": lambda: nn.Conv(6, (3,), feature_group_count=2, name="conv"),
    "masked": lambda: nn.ConvTranspose(
        3, (2,), mask=np.tril(np.ones((2, 4, 3), np.float32)), name="masked"
    ),
    "embed": lambda: nn.Embed(7, 4, name="embed"),
}
X = numbers(2, 2, 3, 4)


def layer_of(name: str, how: str) -> nn.Module:
    layer = LAYERS[name]()
    return WRAPPERS[type(layer)](rank=RANK, wrapped=layer) if how == "by hand" else layer


class Layers(nn.Module):
    """One layer of each kind, on the same input."""

    how: str = "plain"

    @nn.compact
    def __call__(self, x):
        layer = functools.partial(layer_of, how=self.how)
        embed = layer("embed")
        ids = jnp.arange(6, dtype=jnp.int32).reshape(2, 3)
        return {
            "dense": layer("dense")(x),
            "einsum": layer("einsum")(x, "btnh,nhd->btnd"),
            "general": layer("general")(x),
            "conv": layer("conv")(x),
            "masked": layer("masked")(x),
            "embed": embed(ids),
            "attend": embed.attend(x),
        }


class Step(nn.Module):
    """`Layers` as the body of a scan."""

    how: str = "plain"

    @nn.compact
    def __call__(self, carry, x):
        return carry, Layers(self.how, name="layers")(x)


def stacking(lift, axis, **fields):
    return functools.partial(
        lift, variable_axes={"params": axis}, split_rngs={"params": True}, **fields
    )


def scanned(axis):
    lift = stacking(nn.scan, axis, in_axes=nn.broadcast, length=3)
    return lambda how, x: lift(Step)(how, name="lifted")(None, x)[1]


def mapped(axis):
    lift = stacking(nn.vmap, axis, in_axes=None, axis_size=3)
    return lambda how, x: lift(Layers)(how, name="lifted")(x)


def rematerialised(how, x):
    return nn.remat(Layers)(how, name="lifted")(x)


def jitted(how, x):
    return nn.jit(Layers)(how, name="lifted")(x)


def scan_of_vmap(how, x):
    inner = stacking(nn.vmap, 0, in_axes=(None, None), axis_size=2)
    outer = stacking(nn.scan, 1, in_axes=nn.broadcast, length=3)
    return outer(inner(Step))(how, name="lifted")(None, x)[1]


def remat_in_scan(how, x):
    lift = stacking(nn.scan, 0, in_axes=nn.broadcast, length=3)
    return lift(nn.remat(Step, prevent_cse=False))(how, name="lifted")(None, x)[1]


def jit_of_remat_of_vmap(how, x):
    inner = stacking(nn.vmap, -1, in_axes=None, axis_size=3)
    return nn.jit(nn.remat(inner(Layers)))(how, name="lifted")(x)


def shared_in_scan(how, x):
    """A scan whose steps share their parameters."""
    lift = nn.scan(Step, variable_broadcast="params", split_rngs={"params": False}, in_axes=0)
    return lift(how, name="lifted")(None, jnp.stack([x, 2 * x]))[1]


def lifted_function(how, x):
    """A function on a module, rather than a module's class, under the transform."""
    return nn.remat(lambda layers, x: layers(x))(Layers(how, name="lifted"), x)


LIFTS = {
    "scan 0": (scanned(0), (0,)),
    "scan 1": (scanned(1), (1,)),
    "scan -1": (scanned(-1), (-1,)),
    "vmap 0": (mapped(0), (0,)),
    "vmap 1": (mapped(1), (1,)),
    "remat": (rematerialised, ()),
    "jit": (jitted, ()),
    "scan of vmap": (scan_of_vmap, (0, 1)),
    "remat in scan": (remat_in_scan, (0,)),
    "jit of remat of vmap": (jit_of_remat_of_vmap, (-1,)),
    "shared in scan": (shared_in_scan, ()),
    "function": (lifted_function, ()),
}


class Lifted(nn.Module):
    lift: Callable[..., Any]
    how: str = "plain"

    @nn.compact
    def __call__(self, x):
        return self.lift(self.how, x)


BY_HAND = ("scan -1", "vmap 0", "remat", "jit", "scan of vmap")
QUICK = ("scan 0", "remat")  # of which `make test` checks the interceptor


@pytest.mark.parametrize(
    ("lift", "how"),
    [
        *(
            pytest.param(lift, "interceptor", marks=[pytest.mark.slow] * (lift not in QUICK))
            for lift in LIFTS
        ),
        *(pytest.param(lift, "by hand", marks=pytest.mark.slow) for lift in BY_HAND),
    ],
)
def test_every_layer_under_a_lift(lift, how):
    lift, axes = LIFTS[lift]
    rule = Adapt() if how == "interceptor" else None
    found = check_adapts(Lifted(lift, how), rule, X, plain=Lifted(lift), compare_gradients=False)
    inside = Layers() if "layers" not in found.params["lifted"] else Step()
    unlifted = initialise_specs(inside)
    prefix = "lifted/"
    assert found.specs.keys() == {prefix + path for path in unlifted}
    for path, spec in unlifted.items():
        lifted = found.specs[prefix + path]
        assert lifted.stack_axes == axes, path
        assert lifted.letters == spec.letters, path
        assert (lifted.param, lifted.rank) == (spec.param, spec.rank), path
        assert ("..." in lifted.equation) == bool(axes), path


@functools.cache
def initialise_specs(model):
    with peft.ModuleInterceptor(Adapt()):
        args = (X,) if isinstance(model, Layers) else (None, X)
        return peft.lora_specs(model, *args)


# --- Wrappers as lifted classes ------------------------------------------------------------------


def dense_by(lift_wrapper, lift_layer=lambda cls: cls):
    """A wrapper whose class is lifted, around a layer whose class may be lifted too."""

    class Model(nn.Module):
        adapted: bool

        @nn.compact
        def __call__(self, x):
            if self.adapted:
                layer = lift_layer(nn.Dense)(5, name="dense")
                return lift_wrapper(peft.LoRADense)(rank=RANK, wrapped=layer)(x)
            return lift_wrapper(lift_layer(nn.Dense))(5, name="dense")(x)

    return Model


LIFTED_WRAPPERS = {
    "remat": dense_by(nn.remat),
    "jit": dense_by(nn.jit),
    "around remat": dense_by(lambda cls: cls, nn.remat),
    "around jit": dense_by(lambda cls: cls, nn.jit),
    "remat around jit": dense_by(nn.remat, nn.jit),
}


@pytest.mark.parametrize("model", LIFTED_WRAPPERS.values(), ids=LIFTED_WRAPPERS)
def test_a_lifted_wrapper(model):
    found = check_adapts(model(True), None, numbers(2, 4), plain=model(False))
    assert shapes(found.params) == {
        "dense": {"bias": (5,), "kernel": (4, 5), "lora": {"a": (4, 2), "b": (2, 5)}}
    }


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_a_wrapper_around_a_vmapped_layer(axis):
    """The adapter is stacked as the layer is."""
    stacked = stacking(nn.vmap, axis, in_axes=None, axis_size=3)(nn.Dense)

    class Model(nn.Module):
        adapted: bool

        @nn.compact
        def __call__(self, x):
            layer = stacked(5, name="dense")
            return (peft.LoRADense(rank=RANK, wrapped=layer) if self.adapted else layer)(x)

    found = check_adapts(Model(True), None, numbers(2, 4), plain=Model(False))
    assert found.specs["dense/lora"].stack_axes == (axis,)
    with peft.ModuleInterceptor(Adapt()):
        assert peft.lora_specs(Model(False), numbers(2, 4)) == found.specs


@pytest.mark.parametrize("axis", [0, 1])
def test_a_vmapped_wrapper(axis):
    lift = stacking(nn.vmap, axis, in_axes=None, axis_size=3)

    class Model(nn.Module):
        adapted: bool

        @nn.compact
        def __call__(self, x):
            if self.adapted:
                layer = nn.Dense(5, parent=None)
                return lift(peft.LoRADense)(rank=RANK, wrapped=layer, name="dense")(x)
            return lift(nn.Dense)(5, name="dense")(x)

    found = check_adapts(Model(True), None, numbers(2, 4), plain=Model(False))
    assert found.specs["dense/lora"].stack_axes == (axis,)


@pytest.mark.parametrize("transform", [nn.remat, nn.jit, None])
def test_a_wrapper_passed_through_a_lifted_function(transform):
    """The same wrapper inside and outside of the transform: one adapter."""

    class Model(nn.Module):
        adapted: bool

        @nn.compact
        def __call__(self, x):
            layer = nn.Dense(4, name="dense")
            layer = peft.LoRADense(rank=RANK, wrapped=layer) if self.adapted else layer
            if transform is None:
                scan = nn.scan(
                    lambda layer, x, _: (layer(x), None),
                    variable_broadcast="params",
                    split_rngs={"params": False},
                    length=2,
                )
                x, _ = scan(layer, x, None)
                return layer(x)
            return layer(transform(lambda layer, x: layer(x))(layer, x))

    found = check_adapts(Model(True), None, numbers(2, 4), plain=Model(False))
    assert found.specs.keys() == {"dense/lora"}


def test_a_layer_inside_a_lift_and_outside_of_it():
    """A `setup` layer that a rematerialised method and a plain one call."""

    class Model(nn.Module):
        def setup(self):
            self.dense = nn.Dense(4)

        @nn.remat
        def inside(self, x):
            return self.dense(x)

        def __call__(self, x):
            return self.dense(self.inside(self.dense(x)))

    found = check_adapts(Model(), Adapt(), numbers(2, 4))
    assert found.specs.keys() == {"dense/lora"}


def test_a_stack_of_blocks_with_a_carry():
    """What `nn.scan` is for: layers one after the other, with a dropout that splits its keys."""

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            y = nn.Dense(8, name="up")(nn.LayerNorm()(x))
            y = nn.Dropout(0.3, deterministic=False)(nn.gelu(y))
            return x + nn.Dense(4, name="down")(y), None

    stack = nn.scan(
        nn.remat(Block, prevent_cse=False),
        variable_axes={"params": 1},
        split_rngs={"params": True, "dropout": True},
        length=3,
    )
    rngs = {"dropout": key_of(1)}
    found = check_adapts(stack(), Adapt(alpha=4), numbers(2, 4), None, rngs=rngs)
    assert {spec.stack_axes for spec in found.specs.values()} == {(1,)}
    kernel, lora = found.params["up"]["kernel"], found.random["up"]["lora"]
    a, b, w, fused = (
        np.moveaxis(np.asarray(array, np.float64), 1, 0)
        for array in (lora["a"], lora["b"], kernel, found.fused["up"]["kernel"])
    )
    assert_rounded(fused, w + 2.0 * np.einsum("sir,sro->sio", a, b), RANK)


def test_each_layer_of_a_stack_draws_its_own_adapter():
    stack = stacking(nn.vmap, 0, in_axes=None, axis_size=3)(nn.Dense)(4)
    a = initialise(stack, numbers(2, 4), rule=Adapt())["params"]["lora"]["a"]
    assert a.shape == (3, 4, RANK)
    assert len(np.unique(np.asarray(a))) == a.size


def test_while_loop_and_cond():
    """`nn.while_loop`, `nn.cond` and `nn.switch`, on parameters that exist already."""

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            dense, other = nn.Dense(4, name="dense"), nn.Dense(4, name="other")
            if self.is_initializing():
                return dense(x) + other(x)
            x = nn.cond(x.sum() > 1e6, lambda m, x: dense(x), lambda m, x: other(x), self, x)
            x = nn.switch(jnp.int32(0), [lambda m, x: dense(x), lambda m, x: other(x)], self, x)
            _, x = nn.while_loop(
                lambda m, c: c[0] < 2,
                lambda m, c: (c[0] + 1, dense(c[1])),
                self,
                (jnp.int32(0), x),
                broadcast_variables="params",
            )
            return x

    x = numbers(2, 4)
    params = initialise(Model(), x, rule=Adapt())["params"]
    base, lora = peft.split_params(params)
    chex.assert_trees_all_equal(base, initialise(Model(), x)["params"])
    params = peft.merge_params(base, randomised(lora))
    with peft.ModuleInterceptor(Adapt()):
        y = Model().apply({"params": params}, x)
        specs = peft.lora_specs(Model(), x)
    assert_close(y, Model().apply({"params": peft.fuse_params(params, specs=specs)}, x))


# --- JAX's own transforms ------------------------------------------------------------------------


def test_jaxs_transforms():
    """jit, grad, vmap over inputs and over adapters, checkpoint, jvp: all the same numbers."""
    model, rule = Layers(), Adapt()

    def apply(lora, x):
        with intercepting(rule):
            outputs = model.apply({"params": peft.merge_params(base, lora)}, x)
        return sum(jnp.sum(jnp.square(output)) for output in jax.tree.leaves(outputs))

    base, lora = peft.split_params(jax.jit(lambda: initialise(model, X, rule=rule)["params"])())
    one, two = randomised(lora), randomised(lora, seed=3)

    @jax.jit
    def plainly(x):
        return [jax.value_and_grad(apply)(lora, x) for lora in (one, two)]

    @jax.jit
    def mapped(x):
        both = jax.tree.map(lambda *leaves: jnp.stack(leaves), one, two)
        return jax.vmap(jax.value_and_grad(jax.checkpoint(apply)), (0, None))(both, x)

    expected = plainly(X)
    assert_close(mapped(X), jax.tree.map(lambda *leaves: jnp.stack(leaves), *expected))
    slopes = sum(
        jnp.vdot(gradient, step)
        for gradient, step in zip(
            jax.tree.leaves(expected[0][1]), jax.tree.leaves(two), strict=True
        )
    )
    value, slope = jax.jit(lambda x: jax.jvp(lambda lora: apply(lora, x), (one,), (two,)))(X)
    assert_close((value, slope), (expected[0][0], slopes))


def test_vmap_over_inputs_and_keys():
    x = numbers(3, 2, 4)
    layer = peft.LoRADense(rank=RANK, wrapped=nn.Dense(5))
    params = layer.init(key_of(0), x)["params"]
    params["lora"] = randomised(params["lora"])
    mapped = jax.vmap(lambda x: layer.apply({"params": params}, x))(x)
    assert_close(mapped, layer.apply({"params": params}, x))
    keys = jax.random.split(key_of(0), 3)
    many = jax.vmap(lambda key: layer.init(key, x[0]))(keys)["params"]
    assert shapes(many["lora"]) == {"a": (3, 4, 2), "b": (3, 2, 5)}


def test_eager_and_compiled_outputs_agree():
    x = numbers(2, 4)
    with peft.ModuleInterceptor(Adapt()):
        params = nn.Dense(5).init(key_of(0), x)["params"]
        params["lora"] = randomised(params["lora"])
        eager = nn.Dense(5).apply({"params": params}, x)
        jitted = jax.jit(nn.Dense(5).apply)({"params": params}, x)
        with jax.disable_jit():
            slow = nn.Dense(5).apply({"params": params}, x)
    assert_close(jitted, eager)
    assert_close(slow, eager)


def test_compiled_once_for_equal_rules():
    """A rule that is built anew each step, but equal, is no new program."""

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(params, x):
        return nn.Dense(5).apply({"params": params}, x)

    x = numbers(2, 4)
    params = initialise(nn.Dense(5), x, rule=Adapt())["params"]
    for _ in range(3):
        with peft.ModuleInterceptor(Adapt(rank=RANK)):
            step(params, x)

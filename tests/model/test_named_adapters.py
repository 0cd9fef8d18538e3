"""Adapters by their names: in a model, in a tree, and switched off for a while."""

import concurrent.futures
import contextlib
import dataclasses
import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.core import FrozenDict, freeze, meta
from helpers import assert_close, key_of, numbers, rounding, scattered

import peft_jax as peft

X = numbers(2, 3, 4)
SUMS = rounding(4 + 6 + 4)  # of the layers of `Two`, one after the other
Config = functools.partial(peft.LoraConfig, r=2)
CONFIGS = {
    "first": Config(target_modules=["up"], lora_alpha=3),
    "second": Config(r=1, target_modules=["up", "down"], use_dora=True),
    "third": Config(r=3, target_modules=["down"], use_rslora=True, lora_bias=True),
}


class Two(nn.Module):
    """Two layers, and one that no adapter is on."""

    @nn.compact
    def __call__(self, x, _=None):
        heads = jnp.tanh(nn.DenseGeneral((2, 3), name="up")(x))
        y = nn.Dense(4, name="down")(heads.reshape(*x.shape[:-1], -1))
        return nn.Dense(4, name="head")(y)


class Stack(nn.Module):
    """`Two` stacked along an axis of its parameters."""

    axis: int = 1

    @nn.compact
    def __call__(self, x):
        class Step(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                return x + Two(name="two")(x), None

        lift = functools.partial(
            nn.scan, variable_axes={"params": self.axis}, split_rngs={"params": True}, length=2
        )
        return lift(Step)(name="stack")(x, None)[0]


class Boxed(nn.Module):
    """As `Two`, with parameters in boxes."""

    @nn.compact
    def __call__(self, x):
        init = nn.with_partitioning(nn.initializers.lecun_normal(), ("in", "out"))
        x = jnp.tanh(nn.Dense(5, kernel_init=init, name="up")(x))
        return nn.Dense(4, kernel_init=init, name="down")(x)


def small(tree, seed=0):
    """The tree with scattered numbers in it."""
    leaves, structure = jax.tree.flatten(tree)
    drawn = [
        jnp.asarray((0.5 * scattered(leaf.size, seed + i)).reshape(leaf.shape).astype(leaf.dtype))
        for i, leaf in enumerate(leaves)
    ]
    return jax.tree.unflatten(structure, drawn)


def drawn(model, *inputs, seed=0):
    return small(jax.eval_shape(lambda: model.init(key_of(0), *inputs))["params"], seed)


def adapted(module, configs=None):
    """The model with adapters, one after the other."""
    (first, config), *others = (CONFIGS if configs is None else configs).items()
    model = peft.get_peft_model(module, config, first)
    for name, config in others:
        model = model.add_adapter(name, config)
    return model


@dataclasses.dataclass(frozen=True)
class Three:
    """A model with all adapters, its parameters, and what is known of them."""

    plain: nn.Module
    model: Any
    params: Any
    specs: Any

    @property
    def base(self):
        return peft.split_params(self.params).original

    def run(self, model=None, params=None):
        model = self.model if model is None else model
        return model.apply({"params": self.params if params is None else params}, X)


@functools.cache
def three(plain=None):
    plain = Two() if plain is None else plain
    model = adapted(plain)
    return Three(plain, model, drawn(model, X), peft.lora_specs(model, X))


SUBSETS = [
    (),
    ("second", "first"),
    *(
        pytest.param(names, marks=pytest.mark.slow)
        for names in (("first",), ("second",), ("third",), ("third", "second", "first"))
    ),
]


# --- Which adapters act --------------------------------------------------------------------------


def test_a_model_knows_its_adapters():
    model = three().model
    assert [*model.peft_configs] == [*CONFIGS]
    assert model.active_adapters == tuple(CONFIGS)
    assert model.get_base_model() == Two()
    assert model.set_adapter("second").active_adapters == ("second",)
    assert model.set_adapter(["third", "first"]).active_adapters == ("first", "third")
    off = model.disable_adapter_layers()
    assert off.active_adapters == ()
    assert off.enable_adapter_layers() == model
    assert off.set_adapter("first").set_adapter([*CONFIGS]) == model
    assert {*peft.adapter_names(three().params)} == {*CONFIGS}


@pytest.mark.parametrize("names", SUBSETS, ids=lambda names: "+".join(names) or "none")
def test_active_adapters_add_up_and_merge_to_the_same(names):
    given = three()
    model = given.model.set_adapter(names)
    y, plain = given.run(model), given.plain.apply({"params": given.base}, X)
    # The adapter tree of those names alone, in a model that never had others.
    chosen = {name: CONFIGS[name] for name in names}
    if names:
        params = given.base
        for name in names:
            params = peft.add_adapter(params, peft.get_adapter(given.params, name), name)
        assert_close(y, adapted(Two(), chosen).apply({"params": params}, X), SUMS)
    else:
        chex.assert_trees_all_equal(y, plain)
    for told in ({"specs": given.specs}, {"adapter_names": names}):
        inputs = () if "specs" in told else (X,)
        which = model if "specs" in told else given.model
        module, merged = which.merge_and_unload(given.params, *inputs, **told)
        assert module == Two()
        assert jax.tree.structure(merged) == jax.tree.structure(given.base)
        assert_close(module.apply({"params": merged}, X), y)


@pytest.mark.parametrize("wrap", [freeze, lambda tree: tree], ids=["FrozenDict", "dict"])
def test_changes_add_up_at_each_layer(wrap):
    """Of two adapters, the sum of what each does to the weight."""
    given = three()
    params = wrap(given.params)
    changes = {}
    for names in (["first"], ["second"], ["first", "second"]):
        _, merged = given.model.merge_and_unload(params, specs=given.specs, adapter_names=names)
        assert isinstance(merged, type(params))
        changes[len(names), names[0]] = jax.tree.map(
            lambda new, old: np.asarray(new, np.float64) - np.asarray(old, np.float64),
            merged["up"]["kernel"],
            given.base["up"]["kernel"],
        )
    together = changes[1, "first"] + changes[1, "second"]
    weight = np.max(np.abs(given.base["up"]["kernel"])) + np.max(np.abs(together))
    np.testing.assert_allclose(
        changes[2, "first"],
        together,
        rtol=0,
        atol=3 * rounding(0) * weight,  # three fused weights
    )


@pytest.mark.parametrize(
    "module",
    [Stack(1), pytest.param(Stack(-1), marks=pytest.mark.slow), Boxed()],
    ids=["1", "-1", "boxes"],
)
def test_stacks_and_boxes(module):
    configs = {name: CONFIGS[name] for name in ("first", "second")}
    model = adapted(module, configs)
    params, specs = drawn(model, X), peft.lora_specs(model, X)

    def run(params):
        return [model.set_adapter(n).apply({"params": params}, X) for n in ([*configs], "second")]

    both, one = jax.jit(run)(params)
    plain = jax.jit(lambda params: module.apply({"params": params}, X))
    _, merged = model.merge_and_unload(params, specs=specs)
    assert_close(plain(merged), both)
    less, left = model.delete_adapter(params, "first")
    _, merged = less.merge_and_unload(left, specs=peft.lora_specs(less, X))
    assert_close(plain(merged), one)
    again = peft.add_adapter(left, peft.get_adapter(params, "first"), "first")
    chex.assert_trees_all_equal(again, params)
    boxes = [
        isinstance(leaf, meta.AxisMetadata) for leaf in jax.tree.leaves(params, is_leaf=is_box)
    ]
    assert any(boxes) == isinstance(module, Boxed)


def is_box(leaf):
    return isinstance(leaf, meta.AxisMetadata)


def test_switching_trees_of_one_shape_traces_once():
    model = peft.get_peft_model(Two(), CONFIGS["first"])
    base = drawn(Two(), X)
    made = peft.split_params(drawn(model, X)).lora
    loras = {name: small(made, seed) for seed, name in enumerate(["a", "b", "c"])}

    @jax.jit
    @chex.assert_max_traces(n=1)
    def run(params):
        return model.apply({"params": params}, X)

    outputs = [run(peft.add_adapter(base, lora)) for lora in loras.values()]
    params = peft.add_adapter(base, loras["c"])
    outputs.append(run(peft.add_adapter(params, loras["a"], replace=True)))
    chex.assert_trees_all_equal(outputs[0], outputs[-1])
    assert not np.allclose(outputs[0], outputs[1])


@pytest.mark.slow
def test_a_model_as_a_static_argument_traces_each_choice_once():
    given = three()

    @functools.partial(jax.jit, static_argnums=0)
    @chex.assert_max_traces(n=3)
    def run(model, params):
        return model.apply({"params": params}, X)

    for _ in range(2):
        for names in ("first", ["second", "third"], []):
            y = run(given.model.set_adapter(names), given.params)
            assert_close(y, given.run(given.model.set_adapter(names)), SUMS)


# --- Adapters in trees ---------------------------------------------------------------------------

IN_PLACE = {
    "modules": Config(target_modules=["up"], modules_to_save=["head"]),
    "biases": Config(target_modules=["up"], bias="all"),
    "own biases": Config(target_modules=["up"], bias="lora_only"),
}


@pytest.mark.parametrize("wrap", [freeze, lambda tree: tree], ids=["FrozenDict", "dict"])
@pytest.mark.parametrize("kind", IN_PLACE)
def test_what_was_trained_in_place_goes_and_comes_with_its_adapter(kind, wrap):
    config, base = IN_PLACE[kind], wrap(drawn(Two(), X, seed=50))
    other = peft.get_peft_model(Two(), CONFIGS["third"], "other")
    model = peft.get_peft_model(other, config, "own")
    trained = wrap(drawn(model, X, seed=7))
    mask = peft.trainable_mask(trained, config, adapter_name="own")
    lora = peft.get_adapter(trained, "own", config=config)
    assert len(jax.tree.leaves(lora)) == sum(jax.tree.leaves(mask))
    assert peft.adapter_names(lora) == ("default",)
    # Beside another adapter, on the untouched base.
    alone = peft.add_adapter(base, peft.get_adapter(trained, "other"), "other")
    params = peft.add_adapter(alone, lora, "own")
    assert type(params) is type(base)
    chex.assert_trees_all_equal(peft.get_adapter(params, "own", config=config), lora)
    expected = jax.tree.map(
        lambda own, new, old: new if own else old,
        mask,
        trained,
        peft.add_adapter(alone, peft.get_adapter(trained, "own"), "own"),
    )
    chex.assert_trees_all_equal(params, expected)
    # And off again.
    less, left = model.delete_adapter(params, "own", base=base)
    assert less == other
    chex.assert_trees_all_equal(left, alone)
    assert type(left) is type(base)
    plain, left = model.unload(params, base=base)
    assert plain == Two()
    chex.assert_trees_all_equal(left, base)
    for refused in (lambda: model.delete_adapter(params, "own"), lambda: model.unload(params)):
        with pytest.raises(
            ValueError, match=r"'own' trained parameters of the base in place.*base="
        ):
            refused()


def test_trees_with_lists_keep_them():
    leaf = {"kernel": numbers(3, 4), "lora.b": {"a": numbers(3, 2), "b": numbers(2, 4)}}
    tree = {"layers": [leaf, {"kernel": numbers(2, 2)}], "pair": (leaf, {})}
    lora = peft.get_adapter(tree, "b")
    assert peft.adapter_names(lora) == ("default",)
    base = peft.delete_adapter(tree, "b")
    assert peft.adapter_names(base) == ()
    chex.assert_trees_all_equal(peft.add_adapter(base, lora, "b"), tree)
    both = peft.add_adapter(tree, lora)
    assert peft.adapter_names(both) == ("b", "default")
    chex.assert_trees_all_equal(peft.delete_adapter(both), tree)


def test_renaming():
    given = three()
    params = peft.rename_adapter(given.params, "new", old="second")
    assert {*peft.adapter_names(params)} == {"first", "new", "third"}
    specs = peft.rename_adapter(given.specs, "new", old="second")
    configs = {{"second": "new"}.get(name, name): config for name, config in CONFIGS.items()}
    assert specs == peft.lora_specs(adapted(Two(), configs), X)
    assert_close(given.run(adapted(Two(), configs), params), given.run(), SUMS)
    back = peft.rename_adapter(params, "second", old="new")
    chex.assert_trees_all_equal(back, given.params)
    one = peft.get_adapter(given.params, "first")
    chex.assert_trees_all_equal(peft.rename_adapter(one, "default"), one)
    named = peft.rename_adapter(one, "a")
    assert peft.adapter_names(named) == ("a",)
    for wrong, message in (
        (lambda: peft.rename_adapter(given.params, "x"), r"named \['.*say which, old="),
        (lambda: peft.rename_adapter(given.params, "x", old="secnd"), r"'secnd'.*\['second'\]"),
        (lambda: peft.rename_adapter(given.params, "third", old="first"), "'third' already"),
        (lambda: peft.rename_adapter(one, "a.b"), "without dots and slashes"),
        (lambda: peft.rename_adapter(given.base, "x"), r"named \[\]"),
    ):
        with pytest.raises(ValueError, match=message):
            wrong()


def test_specs_of_one_adapter():
    given = three()
    specs = peft.lora_specs(given.model, X)
    own = peft.get_adapter(specs, "second")
    assert set(own) == set(
        peft.lora_specs(peft.get_peft_model(given.model.get_base_model(), CONFIGS["second"]), X)
    )
    with pytest.raises(ValueError, match=r"'secnd'.*Close names: \['second'\]"):
        peft.get_adapter(specs, "secnd")


def test_trees_share_arrays_and_no_dicts():
    given = three()
    one = peft.get_adapter(given.params, "first")
    before = jax.tree.map(lambda leaf: leaf, one)
    added = peft.add_adapter(given.base, one, "x")
    for branch in (added, peft.split_params(added).lora, peft.merge_params(given.base, one)):
        for layer in branch.values():
            for name in [name for name in layer if name.startswith("lora")]:
                layer[name].clear()
    chex.assert_trees_all_equal(one, before)


def test_switching_layers_off_is_a_with_statement_too():
    given = three()
    model, params = given.model, given.params
    on, off = (model.apply({"params": params}, X) for model in (model, model.get_base_model()))
    assert jnp.abs(on - off).max() > 1e-3
    with model.disable_adapter_layers() as plain:
        assert plain.active_adapters == ()
        chex.assert_trees_all_equal(model.apply({"params": params}, X), off)
        with contextlib.suppress(RuntimeError), model.enable_adapter_layers():
            chex.assert_trees_all_equal(model.apply({"params": params}, X), on)
            raise RuntimeError
        chex.assert_trees_all_equal(model.apply({"params": params}, X), off)
    chex.assert_trees_all_equal(model.apply({"params": params}, X), on)
    with pytest.raises(ValueError, match=r"only \['second'\] act"), model.set_adapter("second"):
        pass


def test_whole_models_and_crowds_are_refused():
    given = three()
    whole = peft.add_adapter(given.base, peft.get_adapter(given.params, "first"))
    with pytest.raises(ValueError, match="given all parameters of a model"):
        peft.add_adapter(given.base, whole, "x")
    crowd = given.model
    for i in range(64 - len(crowd.peft_configs)):
        crowd = crowd.add_adapter(f"n{i}", CONFIGS["first"])
    with pytest.raises(ValueError, match=r"at most 64 adapters.*stack_adapters"):
        crowd.add_adapter("one more", CONFIGS["first"])


def test_bad_names_and_trees():
    given = three()
    model, params = given.model, given.params
    one = peft.get_adapter(params, "first")
    for wrong, message in (
        (
            lambda: model.set_adapter("frist"),
            r"no adapter named 'frist'\. Close names: \['first'\]",
        ),
        (lambda: model.set_adapter(["first", "x"]), "no adapter named 'x'"),
        (lambda: model.delete_adapter(params, "x"), "no adapter named 'x'"),
        (lambda: model.merge_and_unload(params, X, adapter_names=["x"]), "no adapter named 'x'"),
        (lambda: model.add_adapter("first", CONFIGS["first"]), "named 'first' already"),
        (lambda: model.add_adapter("a/b", CONFIGS["first"]), "without dots and slashes"),
        (lambda: peft.get_adapter(params), "no adapter named 'default'"),
        (lambda: peft.delete_adapter(params, "frist"), r"'frist'\. Close names: \['first'\]"),
        (lambda: peft.add_adapter(params, one, "first"), "named 'first' already.*replace=True"),
        (lambda: peft.add_adapter(params, params, "x"), "of one name, got the names .*get_adapter"),
        (lambda: peft.add_adapter(params, {}, "x"), r"names \[\]"),
        (lambda: peft.add_adapter({"down": given.base["down"]}, one, "x"), "no 'up'"),
    ):
        with pytest.raises(ValueError, match=message):
            wrong()
    wrong = {**one, "head": {"kernel": jnp.zeros((4, 5))}}
    with pytest.raises(ValueError, match=r"'head/kernel', of shape \(4, 5\).*shape \(4, 4\)"):
        peft.add_adapter(given.base, wrong)


# --- Merging -------------------------------------------------------------------------------------


def test_a_sum_that_is_not_finite():
    given = three()
    broken = jax.tree.map(lambda leaf: leaf, given.params)
    broken["up"]["lora.second"]["a"] = broken["up"]["lora.second"]["a"].at[0].set(jnp.inf)
    merge = functools.partial(given.model.merge_and_unload, specs=given.specs, safe_merge=True)
    with pytest.raises(ValueError, match="sum at 'up/kernel' is not finite"):
        merge(broken)
    merge(broken, adapter_names=["first", "third"])
    with pytest.raises(ValueError, match="safe_merge looks at numbers, which jit lacks"):
        jax.jit(merge)(given.params)
    _, merged = merge(given.params)
    assert_close(given.run(given.plain, merged), given.run())


def test_merging_without_inputs_reads_dense_layers(capsys):
    class Plain(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(4, name="up")(jnp.tanh(nn.Dense(5, name="down")(x)))

    model = adapted(Plain())
    params = drawn(model, X)
    _, expected = model.merge_and_unload(params, X)
    _, merged = model.merge_and_unload(params, progress=True)
    chex.assert_trees_all_close(merged, expected)
    assert "merge adapters" in capsys.readouterr().err
    with pytest.raises(ValueError, match="not plainly that of one Dense layer"):
        three().model.merge_and_unload(three().params)


def test_stored_weights_are_not_merged_into():
    class Wide(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(32, name="up")(x)

    x, config = numbers(2, 32), Config(target_modules=["up"])
    model = adapted(Wide(), {"a": config, "b": config})
    base, lora = peft.split_params(drawn(model, x))
    specs = peft.lora_specs(model, x)
    params = peft.merge_params(peft.quantize_checkpoint(base, method="q4_0"), lora)
    with pytest.raises(
        ValueError, match=r"'up/kernel' is stored in few bits.*dequantize_checkpoint"
    ):
        model.merge_and_unload(params, specs=specs)
    # Switching and taking off need no arithmetic.
    with peft.ModuleInterceptor(store):
        one = model.set_adapter("b").apply({"params": params}, x)
        less, left = model.delete_adapter(params, "a")
        chex.assert_trees_all_equal(less.apply({"params": left}, x), one)
        plain, left = model.unload(params)
        off = plain.apply({"params": left}, x)
        with peft.disable_adapters():
            chex.assert_trees_all_equal(model.apply({"params": params}, x), off)


def store(module):
    return peft.Int4Dense(wrapped=module, method="q4_0") if type(module) is nn.Dense else module


def simulate(module):
    if type(module) is not nn.Dense:
        return module
    return peft.SimulateQuantizedDense(wrapped=module, method="int4")


# --- Off for a while -----------------------------------------------------------------------------


def dense_lora(module):
    return peft.LoRADense(rank=2, wrapped=module) if type(module) is nn.Dense else module


class Written(nn.Module):
    """Written with an adapter."""

    @nn.compact
    def __call__(self, x):
        return peft.LoRADense(rank=2, wrapped=nn.Dense(4, name="up"))(x)


class Normalised(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.WeightNorm(nn.Dense(4, name="up"))(x)


class Sometimes(nn.Module):
    """Has its layer run without the adapter, inside a call."""

    @nn.compact
    def __call__(self, x):
        up = nn.Dense(4, name="up")
        with peft.disable_adapters():
            off = up(x)
            with peft.enable_adapters():
                inside = up(x)
        return {"off": off, "inside": inside, "on": up(x)}


def test_no_adapter_acts_inside_and_all_do_outside():
    given = three()
    on, off = given.run(), given.plain.apply({"params": given.base}, X)
    assert not np.allclose(on, off)
    with peft.disable_adapters():
        chex.assert_trees_all_equal(given.run(), off)
        with peft.enable_adapters():
            chex.assert_trees_all_equal(given.run(), on)
            with peft.disable_adapters():
                chex.assert_trees_all_equal(given.run(), off)
            chex.assert_trees_all_equal(given.run(), on)
        chex.assert_trees_all_equal(given.run(), off)
    chex.assert_trees_all_equal(given.run(), on)


def test_jitted_programs_know_on_from_off():
    given = three()
    on, off = given.run(), given.plain.apply({"params": given.base}, X)

    @jax.jit
    @chex.assert_max_traces(n=2)
    def run(params):
        return given.run(params=params)

    for _ in range(2):
        assert_close(run(given.params), on, SUMS)
        with peft.disable_adapters():
            assert_close(run(given.params), off, SUMS)
            with peft.enable_adapters():
                assert_close(run(given.params), on, SUMS)

    @jax.jit
    def inside(params):
        with peft.disable_adapters():
            return run(params)

    assert_close(inside(given.params), off, SUMS)
    assert_close(run(given.params), on, SUMS)


def test_exceptions_threads_and_generators_leave_nothing_behind():
    given = three()
    on, off = given.run(), given.plain.apply({"params": given.base}, X)
    with pytest.raises(KeyError), peft.disable_adapters():
        raise KeyError
    chex.assert_trees_all_equal(given.run(), on)

    with peft.disable_adapters(), concurrent.futures.ThreadPoolExecutor(1) as pool:
        chex.assert_trees_all_equal(pool.submit(given.run).result(), on)

        def muted():
            with peft.disable_adapters():
                return given.run()

        chex.assert_trees_all_equal(pool.submit(muted).result(), off)

    def generator():
        with peft.disable_adapters():
            yield given.run()
        yield given.run()

    outputs = generator()
    chex.assert_trees_all_equal(next(outputs), off)
    chex.assert_trees_all_equal(next(outputs), on)
    chex.assert_trees_all_equal(given.run(), on)


def with_rule(rule, model, params):
    with peft.ModuleInterceptor(rule):
        return model.apply({"params": params}, X)


def test_interceptors_and_layers_written_into_a_model():
    with peft.ModuleInterceptor(dense_lora):
        params = drawn(Normalised(), X)
        inner = drawn(Sometimes(), X)
    base = peft.split_params(params).original
    off = Normalised().apply({"params": base}, X)
    on = with_rule(dense_lora, Normalised(), params)
    assert not np.allclose(on, off)
    with peft.disable_adapters():
        chex.assert_trees_all_equal(with_rule(dense_lora, Normalised(), params), off)
    with peft.ModuleInterceptor(dense_lora), peft.disable_adapters():
        chex.assert_trees_all_equal(Normalised().apply({"params": params}, X), off)
    written = drawn(Written(), X)
    expected = nn.Dense(4).apply({"params": peft.split_params(written).original["up"]}, X)
    with peft.disable_adapters():
        chex.assert_trees_all_equal(Written().apply({"params": written}, X), expected)
    # Inside a module's call.
    y = with_rule(dense_lora, Sometimes(), inner)
    plain = Sometimes().apply({"params": peft.split_params(inner).original}, X)
    chex.assert_trees_all_equal(y["off"], plain["on"])
    chex.assert_trees_all_equal(y["inside"], y["on"])
    assert not np.allclose(y["on"], plain["on"])


@pytest.mark.parametrize("rule", [store, simulate])
def test_stored_and_simulated_weights_are_read_all_the_same(rule):
    x = numbers(2, 32)
    with peft.ModuleInterceptor(dense_lora):
        params = drawn(nn.Dense(32), x)
    base, lora = peft.split_params(params)
    if rule is store:
        base = peft.quantize_checkpoint(base, method="q4_0")
    params = peft.merge_params(base, lora)
    with peft.ModuleInterceptor(rule):
        expected = nn.Dense(32).apply({"params": base}, x)
        with peft.ModuleInterceptor(dense_lora):
            assert not np.allclose(nn.Dense(32).apply({"params": params}, x), expected)
            with peft.disable_adapters():
                chex.assert_trees_all_equal(nn.Dense(32).apply({"params": params}, x), expected)


def test_parameters_and_specs_are_made_all_the_same():
    given = three()
    with peft.disable_adapters():
        assert peft.lora_specs(given.model, X) == given.specs
        made = jax.eval_shape(lambda: given.model.init(key_of(0), X))["params"]
        shown = str(peft.summarize(given.model, X, params=given.params))
    assert jax.tree.map(jnp.shape, made) == jax.tree.map(jnp.shape, given.params)
    assert shown == str(peft.summarize(given.model, X, params=given.params))
    off = given.model.disable_adapter_layers()
    assert peft.lora_specs(off, X) == given.specs
    assert isinstance(freeze(given.params), FrozenDict)

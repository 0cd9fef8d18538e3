"""Banks: each row of a batch is what the model with that row's adapter alone gives."""

import dataclasses
import functools
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax.core import freeze
from helpers import SIMULATING, STORING, assert_close, key_of, numbers, rounding, scattered

import peft_jax as peft

X = numbers(5, 3, 4)
IDS = np.arange(15).reshape(5, 3) % 7


# --- Models --------------------------------------------------------------------------------------


class Two(nn.Module):
    """Two layers, the second on what the first makes of heads."""

    features: int = 4

    @nn.compact
    def __call__(self, x, _=None):
        heads = jnp.tanh(nn.DenseGeneral((2, 3), name="up")(x))
        y = nn.Dense(self.features, name="down")(heads.reshape(*x.shape[:-1], -1))
        return x + y if x.shape == y.shape else y


class Body(nn.Module):
    """A layer with a residual, as ``nn.scan`` takes it."""

    kind: str = "dense"

    @nn.compact
    def __call__(self, x, _=None):
        if self.kind == "conv":
            return x + jnp.tanh(nn.Conv(4, (2,), use_bias=False, name="up")(x)), None
        return x + jnp.tanh(nn.Dense(4, name="up")(x)), None


class Stack(nn.Module):
    """Layers stacked along an axis of their parameters."""

    axis: int = 0
    kind: str = "dense"
    remat: bool = False

    @nn.compact
    def __call__(self, x):
        lift = functools.partial(
            nn.scan, variable_axes={"params": self.axis}, split_rngs={"params": True}, length=2
        )
        body = nn.remat(Body, prevent_cse=False) if self.remat else Body
        return lift(body)(self.kind, name="stack")(x)[0]


class StackOfStacks(nn.Module):
    """Stacks along axis 1, stacked along the last."""

    @nn.compact
    def __call__(self, x):
        class Middle(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                return Stack(1, name="inner")(x), None

        lift = nn.scan(Middle, variable_axes={"params": -1}, split_rngs={"params": True}, length=2)
        return lift(name="outer")(x, None)[0]


class Products(nn.Module):
    """One layer of each kind that multiplies, on the same input."""

    @nn.compact
    def __call__(self, x):
        image = x.reshape(x.shape[0], 3, 2, 2)
        return {
            "dense": nn.Dense(5, name="dense")(x),
            "vector": nn.Dense(5, use_bias=False, name="vector")(x[:, 0]),
            "general": nn.DenseGeneral((2, 3), axis=(-2, -1), name="general")(x),
            "einsum": nn.Einsum((3, 4, 2), "bti,tio->bto", name="einsum")(x),
            "low": nn.Dense(3, dtype=jnp.bfloat16, name="low")(x),
        }, {
            "conv": nn.Conv(6, (2,), feature_group_count=2, padding="CAUSAL", name="conv")(x),
            "image": nn.Conv(4, (2, 2), strides=2, feature_group_count=2, name="image")(image),
            "transpose": nn.ConvTranspose(3, (2,), strides=(2,), name="transpose")(x),
        }


class Attention(nn.Module):
    """Attention, from a table, with positions that all examples share."""

    @nn.compact
    def __call__(self, ids):
        table = nn.Embed(7, 4, name="table")
        positions = nn.Embed(3, 4, name="positions")(jnp.arange(ids.shape[1])[None])
        x = table(ids) + nn.Dense(4, name="shared")(positions)
        x = nn.MultiHeadDotProductAttention(2, name="attention")(x)
        return table.attend(x)


class Lifted(nn.Module):
    """Layers under the lifted transforms that stack nothing, and under ``nn.vmap``."""

    @nn.compact
    def __call__(self, x):
        shared = nn.Dense(4, name="shared")  # runs twice
        x = shared(jnp.tanh(shared(x)))
        x = nn.remat(Two)(name="remat")(x)
        x = nn.jit(Two)(name="jit")(x)
        lift = functools.partial(nn.vmap, nn.Dense, in_axes=1, out_axes=1)
        broadcast = lift(variable_axes={"params": None}, split_rngs={"params": False})
        stacked = lift(variable_axes={"params": 1}, split_rngs={"params": True})
        x = stacked(4, name="stacked")(jnp.tanh(broadcast(4, name="broadcast")(x)))
        return nn.RNN(nn.SimpleCell(4), name="cell")(x)


class Setup(nn.Module):
    """A model in ``setup``, with a method of its own."""

    def setup(self):
        self.layers = [nn.Dense(4) for _ in range(2)]

    def __call__(self, x):
        return 1 + self.encode(x)

    def encode(self, x):
        for layer in self.layers:
            x = jnp.tanh(layer(x))
        return x


class Boxed(nn.Module):
    """Parameters in boxes, with and without a stack."""

    @nn.compact
    def __call__(self, x):
        init = nn.with_partitioning(nn.initializers.lecun_normal(), ("in", "out"))

        class Inner(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                return jnp.tanh(nn.Dense(4, kernel_init=init, name="up")(x)), None

        lift = nn.scan(
            Inner,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=2,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        return nn.Dense(4, kernel_init=init, name="down")(lift(name="stack")(x, None)[0])


# --- Adapters ------------------------------------------------------------------------------------

Config = functools.partial(peft.LoraConfig, target_modules="all-linear")


def configs(some, others=None):
    """Adapters of different ranks, targets and variants."""
    return {
        "plain": Config(r=1, lora_alpha=3, target_modules=some),
        "dora": Config(r=2, lora_alpha=2, use_dora=True, target_modules=others or some),
        "bias": Config(r=3, use_rslora=True, lora_bias=True, target_modules=some),
    }


class Served(NamedTuple):
    """A base, and adapters of it."""

    model: nn.Module
    base: Any
    adapted: dict[str, nn.Module]
    trees: dict[str, Any]
    specs: dict[str, Any]

    def bank(self, **options):
        return peft.stack_adapters(self.trees, specs=self.specs, **options)

    def rows(self, params, inputs, adapters, **kwargs):
        """What the model of many adapters gives."""
        many = peft.MultiAdapterModel(wrapped=self.model)
        return many.apply({"params": params}, *inputs, adapters=adapters, **kwargs)

    def alone(self, name, lora, inputs, **kwargs):
        """What the model with one adapter gives, or that without any."""
        if name is None:
            return self.model.apply({"params": self.base}, *inputs, **kwargs)
        params = peft.merge_params(self.base, lora)
        return self.adapted[name].apply({"params": params}, *inputs, **kwargs)


def small(tree, seed):
    leaves, structure = jax.tree.flatten(tree)
    drawn = [
        (0.6 * scattered(leaf.size, seed + i).reshape(leaf.shape)).astype(leaf.dtype)
        for i, leaf in enumerate(leaves)
    ]
    return jax.tree.unflatten(structure, map(jnp.asarray, drawn))


def shapes_made(model, inputs, **kwargs):
    return jax.eval_shape(lambda: model.init(key_of(0), *inputs, **kwargs))["params"]


def served(model, settings, *inputs, base=None, **kwargs):
    adapted, trees, specs = {}, {}, {}
    for seed, (name, config) in enumerate(settings.items()):
        adapted[name] = peft.get_peft_model(model, config)
        specs[name] = peft.lora_specs(adapted[name], *inputs, **kwargs)
        made = shapes_made(adapted[name], inputs, **kwargs)
        trees[name] = small(peft.split_params(made).lora, 5 * seed)
    if base is None:
        base = small(shapes_made(model, inputs, **kwargs), 100)
    return Served(model, base, adapted, trees, specs)


@functools.cache
def two():
    """`Two` with an adapter of each variant."""
    return served(Two(), configs(["up"], ["up", "down"]), X)


@jax.jit
def run_two(params, x, selection):
    return two().rows(params, (x,), selection)


def check_rows(given, *inputs, tolerance=1e-5, **kwargs):
    """Each row is its adapter's own, or that of the plain base."""
    bank = given.bank(capacity=len(given.trees) + 1)
    first, *rest = reversed(given.trees)
    names = [first, None, *rest, first, None][: np.shape(inputs[0])[0]]

    def run(base, params, selection, trees, inputs):
        own = given._replace(base=base)
        together = own.rows(peft.merge_params(base, params), inputs, selection, **kwargs)
        alone = [own.alone(n, trees.get(n), inputs, **kwargs) for n in (*trees, None)]
        return together, dict(zip((*trees, "base"), alone, strict=True))

    arguments = given.base, bank.params, bank.select(names), given.trees, inputs
    together, alone = jax.jit(run)(*arguments)
    for i, name in enumerate(names):
        row, expected = (jax.tree.map(lambda y: y[i], y) for y in (together, alone[name or "base"]))  # noqa: B023
        assert_close(row, expected, 1e-6 if name is None else tolerance)


MODELS = {
    "compact": (Two, ["up"], ["up", "down"], X),
    "attention": (
        Attention,
        ["table", "query", "shared"],
        ["table", "positions", "value", "out"],
        IDS,
    ),
    "lifted": (
        Lifted,
        ["shared", "up", "stacked", "i"],
        ["down", "broadcast", "stacked", "h"],
        X,
    ),
    "scan along -1": (lambda: Stack(-1, remat=True), ["up"], None, X),
    "boxes": (Boxed, ["up"], ["up", "down"], X),
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] * (name in ("compact", "boxes", "attention")))
        for name in MODELS
    ],
)
def test_each_row_is_computed_with_its_own_adapter(name):
    model, some, others, x = MODELS[name]
    check_rows(served(model(), configs(some, others), x), x)


@pytest.mark.parametrize(
    "part", [0, pytest.param(1, marks=pytest.mark.slow)], ids=["products", "convolutions"]
)
def test_each_row_of_every_kind_of_layer(part):
    class Part(nn.Module):
        @nn.compact
        def __call__(self, x):
            return Products(name="all")(x)[part]

    layers = [*jax.eval_shape(Products().init_with_output, key_of(0), X)[0][part]]
    # A step of bfloat16 is 1 / 128 of a number between two powers of two.
    tolerance = 2e-2 if part == 0 else 1e-5
    check_rows(served(Part(), configs(layers[1:], layers), X), X, tolerance=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize(
    "model",
    [Stack(0), Stack(1), StackOfStacks(), Stack(0, remat=True), Stack(-2)],
    ids=["scan along 0", "scan along 1", "nested", "remat in scan", "scan along -2"],
)
def test_each_row_in_stacks(model):
    check_rows(served(model, configs(["up"]), X), X)


@pytest.mark.slow
def test_stacks_along_an_axis_that_only_kernels_and_products_have():
    plain = {"one": Config(r=1, target_modules=["up"]), "two": Config(r=2, target_modules=["up"])}
    check_rows(served(Stack(2, "conv"), plain, X), X)


def test_rows_of_the_plain_base_are_its_own_bit_for_bit():
    given = served(nn.Dense(4), configs("all-linear"), X)
    bank = given.bank()
    y = given.rows(bank.merge(given.base), (X,), bank.select([None, "dora", None, "bias", None]))
    rows = np.asarray([0, 2, 4])
    chex.assert_trees_all_equal(y[rows], given.alone(None, None, (X,))[rows])


@pytest.mark.parametrize(
    "method",
    ["encode", pytest.param(Setup.encode, marks=pytest.mark.slow)],
    ids=["name", "function"],
)
def test_methods_besides_call(method):
    given = served(Setup(), configs(["layers_0"], ["layers_1"]), X, method="encode")
    check_rows(given, X, method=method)


def test_frozen_parameters_and_a_bank_in_bfloat16():
    given = two()
    bank = given.bank(dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(bank.params)} == {jnp.dtype(jnp.bfloat16)}
    names = ["bias", None, "dora", "bias", "plain"]
    y = run_two(bank.merge(given.base), X, bank.select(names))
    frozen = bank.merge(freeze(given.base))
    assert type(frozen) is type(freeze({}))
    chex.assert_trees_all_equal(run_two(frozen, X, bank.select(names)), y)
    full = given.bank()
    assert_close(y, run_two(full.merge(given.base), X, full.select(names)), 2e-2)


# --- Stored and simulated weights ----------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Reads:
    """Has each layer wrapped as a table says."""

    simulated: bool
    method: str

    def __call__(self, module):
        table = SIMULATING if self.simulated else STORING
        if type(module) not in table:
            return module
        return table[type(module)](wrapped=module, method=self.method)


class Wide(nn.Module):
    """Layers whose inputs are whole blocks."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(32, name="down")(jnp.tanh(nn.Dense(64, name="up")(x)))


SLOW = [pytest.param(method, marks=pytest.mark.slow) for method in ("int8", "nf4", "simulated")]
METHODS = ["q4_0", *SLOW]


@pytest.mark.parametrize("method", METHODS)
def test_each_row_over_a_base_of_few_bits(method):
    x, simulated = numbers(5, 64), method == "simulated"
    base = small(shapes_made(Wide(), (x,)), 3)
    if not simulated:
        base = peft.quantize_checkpoint(base, method=method)
    rule = Reads(simulated, "int4" if simulated else method)
    with peft.ModuleInterceptor(rule):
        settings = configs(["up"], ["up", "down"])
        settings.pop("plain")
        check_rows(served(Wide(), settings, x, base=base), x)


# --- One program ---------------------------------------------------------------------------------


def test_choices_and_changes_of_a_bank_trace_nothing_anew():
    given = two()
    bank = given.bank(capacity=5)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def run(params, x, selection):
        return given.rows(params, (x,), selection)

    def rows(bank, names):
        return run(bank.merge(given.base), X, bank.select(names))

    first = rows(bank, ["plain", "bias", None, "dora", "bias"])
    other = rows(bank, [None, "dora", "dora", "plain", None])
    assert_close(run(bank.merge(given.base), X, bank.select(np.asarray([-1, 1, 1, 0, -1]))), other)

    more = bank.with_adapter("new", given.trees["dora"], given.specs["dora"])
    assert_close(rows(more, ["plain", "bias", None, "new", "bias"]), first)
    less = more.without("plain")
    assert less.names == (None, "dora", "bias", "new", None)
    assert_close(rows(less, [None, "dora", "new", "bias", None])[:3], other[:3])

    specs = {
        path: dataclasses.replace(spec, scaling=2 * spec.scaling, alpha=None)
        for path, spec in given.specs["plain"].items()
    }
    halved = jax.tree.map(lambda leaf: leaf, given.trees["plain"])
    halved["up"]["lora"]["b"] = halved["up"]["lora"]["b"] / 2
    rescaled = less.with_adapter("plain", halved, specs)
    assert_close(rows(rescaled, ["plain", "bias", None, "new", "bias"]), first)
    # In place of one of another variant, of which nothing is left.
    replaced = bank.with_adapter("dora", given.trees["bias"], given.specs["bias"])
    replaced = replaced.with_adapter("bias", given.trees["plain"], given.specs["plain"])
    expected = rows(bank, ["plain", "plain", None, "bias", "plain"])
    assert_close(rows(replaced, ["plain", "bias", None, "dora", "bias"]), expected)


@pytest.mark.optimized
def test_work_does_not_grow_with_the_number_of_adapters():
    x, config = numbers(4, 64), Config(r=2, target_modules=["up", "down"])
    given = served(Wide(), {"0": config}, x)

    def program(count):
        trees = [given.trees["0"]] * count
        bank = peft.stack_adapters(trees, specs=given.specs["0"])
        arguments = bank.merge(given.base), (x,), bank.select(["0"] * 4)
        return jax.jit(given.rows).lower(*arguments).compile()

    few, many = program(2), program(32)
    assert "while" not in many.as_text()
    assert many.cost_analysis()["flops"] <= 1.01 * few.cost_analysis()["flops"]


def test_a_group_of_rows_shares_an_adapter():
    given, x = two(), numbers(6, 3, 4)
    bank = given.bank()
    run = run_two
    params = bank.merge(given.base)
    for names in (["dora", None, "bias"], ["bias", "plain"], ["dora"], [None]):
        group = 6 // len(names)
        together = run(params, x, bank.select(names, group_size=group))
        each = [name for name in names for _ in range(group)]
        assert_close(together, run(params, x, bank.select(each)))
    all_of = run(params, x, bank.each(group_size=2))
    each = bank.select([name for name in bank.names for _ in range(2)])
    assert_close(all_of, run(params, x, each))


def rows_and_gradient(given):
    def loss(params, base, x, selection):
        y = given.rows(peft.merge_params(base, params), (x,), selection)
        return jnp.sum(jnp.where(jnp.isnan(y), 0, y) ** 2), y

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


@pytest.mark.parametrize("bad", ["dora", pytest.param("plain", marks=pytest.mark.slow)])
def test_numbers_that_are_not_finite_stay_with_their_adapter(bad):
    given = two()
    bank = given.bank(capacity=5)
    broken = jax.tree.map(lambda leaf: leaf * jnp.nan, given.trees[bad])
    broken = bank.with_adapter(bad, broken, given.specs[bad])
    names = [bad, None, *(name for name in given.trees if name != bad), None]
    run = rows_and_gradient(given)
    (_, expected), sound = run(bank.params, given.base, X, bank.select([None, *names[1:]]))
    (_, y), _ = run(broken.params, given.base, X, broken.select(names))
    assert np.isnan(y[0]).all()
    chex.assert_trees_all_equal(y[1:], expected[1:])
    # Where it is not chosen, there is nothing of it in any gradient.
    (_, y), gradient = run(broken.params, given.base, X, broken.select([None, *names[1:]]))
    chex.assert_trees_all_equal(y, expected)
    slot = bank.slot(bad)
    for own, other in zip(jax.tree.leaves(gradient), jax.tree.leaves(sound), strict=True):
        chex.assert_trees_all_equal(np.delete(own, slot, 0), np.delete(other, slot, 0))


@pytest.mark.parametrize(
    "count",
    [pytest.param(3, marks=pytest.mark.slow), 9],
    ids=["fewer rows than slots", "more rows than slots"],
)
def test_free_slots_have_no_gradient(count):
    given = two()
    bank = given.bank(capacity=5).without("plain")  # its slot is the first
    names = ([None, "dora", "bias"] * 3)[:count]
    x = numbers(count, 3, 4)
    (_, y), gradient = rows_and_gradient(given)(bank.params, given.base, x, bank.select(names))
    assert np.isfinite(y).all()
    for leaf in jax.tree.leaves(gradient):
        np.testing.assert_array_equal(leaf[np.asarray([0, 3, 4])], 0)


@pytest.mark.parametrize("slot", [3, 5, 100, 2**31 - 1, -2, -100])
def test_rows_of_slots_without_an_adapter(slot):
    given = two()
    bank = given.bank(capacity=5)
    slots = np.asarray([0, slot, -1, 2, 1], np.int32)
    with pytest.raises(ValueError, match=rf"slots \[{slot}\] hold no adapter.*\[0, 1, 2\]"):
        bank.select(slots)
    y = traced_rows(bank.merge(given.base), slots)
    assert np.isnan(y[1]).all()
    assert np.isfinite(y[np.asarray([0, 2, 3, 4])]).all()


@jax.jit
def traced_rows(params, slots):
    given = two()
    return given.rows(params, (X,), given.bank(capacity=5).select(slots))


# --- Back out of the bank ------------------------------------------------------------------------


@pytest.mark.parametrize("model", [Two(), Stack(-1)], ids=["compact", "scan"])
def test_adapters_come_out_as_they_went_in(model):
    given = served(model, configs(["up"]), X)
    bank = given.bank(capacity=7, rank=5)
    for name, tree in given.trees.items():
        lora, specs = bank.adapter(name)
        chex.assert_trees_all_equal(lora, tree)
        assert specs == given.specs[name]
    assert bank.capacity == 7
    assert "3 of 7 slots: plain, dora, bias" in repr(bank)


# --- Training ------------------------------------------------------------------------------------


def weigh(y):
    return jnp.sum(y * scattered(y.size, 0.5).reshape(y.shape))


@pytest.mark.parametrize(
    "model", [Two(), pytest.param(Stack(1), marks=pytest.mark.slow)], ids=["compact", "scan"]
)
def test_gradients_are_those_of_each_adapter_alone_and_padding_has_none(model):
    given = served(model, configs(["up"], ["up", "down"] if isinstance(model, Two) else None), X)
    bank = given.bank(capacity=5)
    names = ["bias", "dora", "plain", "bias", None]

    def losses(params, trees, selection):
        def together(params):
            return weigh(given.rows(peft.merge_params(given.base, params), (X,), selection))

        def alone(trees):
            mask = [np.asarray([n == name for n in names])[:, None, None] for name in trees]
            outputs = [given.alone(name, trees[name], (X,)) for name in trees]
            return weigh(sum(jnp.where(m, y, 0) for m, y in zip(mask, outputs, strict=True)))

        return jax.grad(together)(params), jax.grad(alone)(trees)

    gradient, expected = jax.jit(losses)(bank.params, given.trees, bank.select(names))
    found = bank.with_params(gradient)
    own = {name: found.adapter(name)[0] for name in given.trees}
    assert_close(own, expected)
    # Nothing beside what is each adapter's own.
    again = peft.stack_adapters(own, specs=given.specs, capacity=5)
    chex.assert_trees_all_equal(gradient, again.params)


def sweep():
    """Five adapters of a stack along axis 1, each with data of its own."""
    settings = {
        "rank 1": Config(r=1, target_modules=["up"]),
        "rank 3": Config(r=3, use_rslora=True, lora_alpha=2, target_modules=["up"]),
        "dora": Config(r=2, use_dora=True, target_modules=["up"]),
        "bias": Config(r=2, lora_bias=True, lora_alpha=1, target_modules=["up"]),
        "strong": Config(r=2, lora_alpha=6, target_modules=["up"]),
    }
    x, y = numbers(5, 2, 4), numbers(5, 2, 4, seed=1)
    return served(Stack(1), settings, x[0]), x, y


def single_runs(given, optimizer, x, y, steps):
    """Each adapter trained by itself: losses, and the adapters."""

    def loss(lora, name, x, y):
        return jnp.mean(jnp.square(given.alone(name, lora, (x,)) - y))

    def step(trees, states):
        values = {}
        for i, name in enumerate(given.trees):  # jit sorts the names of its arguments
            values[name], gradient = jax.value_and_grad(loss)(trees[name], name, x[i], y[i])
            update, states[name] = optimizer.update(gradient, states[name], trees[name])
            trees[name] = optax.apply_updates(trees[name], update)
        return trees, states, values

    trees = dict(given.trees)
    states = {name: optimizer.init(tree) for name, tree in trees.items()}
    found, step = [], jax.jit(step)
    for _ in range(steps):
        trees, states, values = step(trees, states)
        found.append([values[name] for name in given.trees])
    return np.asarray(found), trees


def bank_run(given, bank, optimizer, x, y, steps, at_once):
    """The adapters of a bank trained in one step."""

    def losses(params, selection, x, y):
        rows = given.rows(
            peft.merge_params(given.base, params), (x.reshape(-1, *x.shape[2:]),), selection
        )
        return jnp.mean(jnp.square(rows.reshape(y.shape) - y), axis=(1, 2))

    value_and_grad = peft.adapter_value_and_grad(losses, bank.axes, at_once=at_once)
    together = peft.per_adapter(optimizer, bank.axes)

    def step(params, state, selection):
        values, gradient = value_and_grad(params, selection, x, y)
        update, state = together.update(gradient, state, params)
        return optax.apply_updates(params, update), state, values

    params, state = bank.params, together.init(bank.params)
    found, step = [], jax.jit(step)
    for _ in range(steps):
        params, state, values = step(params, state, bank.each(group_size=x.shape[1]))
        found.append(values)
    return np.asarray(found), bank.with_params(params)


def adam():
    return optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(1e-2, weight_decay=0.1))


@pytest.mark.slow
@pytest.mark.usefixtures("relaxed_promotion")
def test_a_sweep_trains_as_each_of_its_adapters_alone():
    given, x, y = sweep()
    expected, trees = single_runs(given, adam(), x, y, steps=4)
    assert (expected[-1] < expected[0]).all()
    bank = given.bank(rank=4)
    values, trained = bank_run(given, bank, adam(), x, y, steps=4, at_once=2)
    np.testing.assert_allclose(values, expected, rtol=1e-4)
    own = {name: trained.adapter(name)[0] for name in given.trees}
    assert_close(own, trees, 1e-3)
    again = peft.stack_adapters(own, specs=given.specs, rank=4)
    chex.assert_trees_all_equal(trained.params, again.params)  # padding is zero as before


@pytest.mark.slow
@pytest.mark.usefixtures("relaxed_promotion")
@pytest.mark.parametrize("at_once", [1, 2, 3, 9])
def test_a_sweep_in_turns(at_once):
    given, x, y = sweep()
    bank = given.bank()
    expected, trained = bank_run(given, bank, adam(), x, y, 2, at_once=None)
    values, found = bank_run(given, bank, adam(), x, y, 2, at_once=at_once)
    np.testing.assert_allclose(values, expected, rtol=1e-5)
    assert_close(found.params, trained.params, 1e-4)


# --- What is refused -----------------------------------------------------------------------------


def test_unknown_names_and_values_that_name_no_adapter():
    given = two()
    bank = given.bank(capacity=5)
    with pytest.raises(ValueError, match=r"no adapter named 'dorra'. Close names: \['dora'\]"):
        bank.select(["plain", "dorra"])
    for refused in (bank.adapter, bank.without):
        with pytest.raises(ValueError, match="no adapter named 'dorra'"):
            refused("dorra")
    with pytest.raises(ValueError, match="a name for each example, got one: 'dora'"):
        bank.select("dora")
    with pytest.raises(ValueError, match="a name for each example, got one: None"):
        bank.select(None)
    with pytest.raises(ValueError, match=r"integers with one axis.*float"):
        bank.select(np.asarray([0.0, 1.0]))
    with pytest.raises(ValueError, match=r"integers with one axis.*\(1, 2\)"):
        bank.select(np.asarray([[0, 1]]))
    with pytest.raises(ValueError, match="group_size is a positive integer, got 0"):
        bank.select(["dora"], group_size=0)
    with pytest.raises(ValueError, match=r"each: the slots \[3, 4\] hold no adapter"):
        bank.each()


def test_adapters_that_a_bank_has_no_room_for():
    given = two()
    plain, specs = given.trees["plain"], given.specs
    bank = peft.stack_adapters({"plain": plain}, specs=specs["plain"], capacity=2)
    for name, missing in (("dora", "down"), ("bias", "rank 3")):
        with pytest.raises(ValueError, match=rf"no room for '{name}'.*{missing}"):
            bank.with_adapter(name, given.trees[name], specs[name])
    full = bank.with_adapter("again", plain, specs["plain"])
    with pytest.raises(ValueError, match=r"no free slot for 'third' \(capacity 2\)"):
        full.with_adapter("third", plain, specs["plain"])
    for wrong in ("a.b", "a/b", "", "bank"):
        with pytest.raises(ValueError, match="adapter_name"):
            bank.with_adapter(wrong, plain, specs["plain"])
    # `room_for` makes room.
    roomy = peft.stack_adapters(
        {"plain": plain}, specs=specs["plain"], capacity=4, rank=3, room_for=specs["dora"]
    )
    roomy = roomy.with_adapter("dora", given.trees["dora"], specs["dora"])
    assert roomy.names == ("plain", "dora", None, None)
    chex.assert_trees_all_equal(roomy.adapter("dora")[0], given.trees["dora"])


def test_adapters_that_do_not_fit():
    given = two()
    trees, specs = given.trees, given.specs
    for wrong, message in (
        ({"capacity": 2}, "capacity is an integer.*number of adapters"),
        ({"rank": 2}, "rank=2, but there is an adapter of rank 3"),
        ({"room_for": {"up/lora": peft.LoraSpec("kernel", "ir,ro->io", 2)}}, "that know shapes"),
    ):
        with pytest.raises(ValueError, match=message):
            peft.stack_adapters(trees, specs=specs, **wrong)
    with pytest.raises(ValueError, match="takes a dict from names to trees"):
        peft.stack_adapters(3, specs=specs)
    with pytest.raises(ValueError, match="specs are those of all adapters"):
        peft.stack_adapters(trees, specs={"plain": specs["plain"]})
    with pytest.raises(ValueError, match="there are no adapters"):
        peft.stack_adapters({}, specs={}, capacity=1)
    with pytest.raises(ValueError, match="'x': specs and parameters are of different models"):
        peft.stack_adapters({"x": trees["plain"]}, specs=specs["dora"])
    wider = served(Two(6), {"plain": Config(r=1, target_modules=["down"])}, X)
    with pytest.raises(ValueError, match=r"'wide' is of another model: at 'down/lora\.bank'"):
        peft.stack_adapters(
            {"dora": trees["dora"], "wide": wider.trees["plain"]},
            specs={"dora": specs["dora"], "wide": wider.specs["plain"]},
        )


def test_what_is_no_product_is_refused():
    tokens = Config(r=1, target_modules=["query"], trainable_token_indices={"table": [1, 2]})
    given = served(Attention(), {"tokens": tokens}, IDS)
    with pytest.raises(ValueError, match="trained token rows at 'table/lora_tokens'"):
        given.bank()
    given = two()
    whole = {**given.trees["plain"], "down": {"bias": jnp.zeros(4)}}
    with pytest.raises(ValueError, match=r"trained whole parameters \(\['down/bias'\]\)"):
        peft.stack_adapters({"x": whole}, specs=given.specs["plain"])


def test_layers_that_cannot_tell_examples_apart():
    class Merged(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(4, name="up")(x.reshape(-1, 4)).reshape(x.shape)

    class Turned(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Einsum((5, 4, 2), "bti,bio->bto", name="up")(x)

    class Kernel(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.ConvTranspose(3, (2,), transpose_kernel=True, name="up")(x)

    for model, message in (
        (Merged(), r"'up' has an input of shape \(15, 4\).*number the 5 examples"),
        (Turned(), "'up' has no axis of examples in front"),
        (Kernel(), "'up' is adapted at its weight"),
    ):
        given = served(model, {"one": Config(r=1, target_modules=["up"])}, X)
        bank = given.bank()
        with pytest.raises(ValueError, match=message):
            given.rows(bank.merge(given.base), (X,), bank.select(["one", None, None, None, "one"]))


def test_calls_that_lack_something():
    given = two()
    bank = given.bank()
    many, params = peft.MultiAdapterModel(wrapped=given.model), bank.merge(given.base)
    with pytest.raises(ValueError, match=r"takes adapters=bank\.select"):
        many.apply({"params": params}, X)
    with pytest.raises(ValueError, match=r"takes adapters=bank\.select"):
        many.apply({"params": params}, X, adapters=["dora"] * 5)
    with pytest.raises(ValueError, match=r"no bank at 'up/lora.bank'.*bank\.params"):
        many.apply({"params": given.base}, X, adapters=bank.select([None] * 5))
    with pytest.raises(ValueError, match="does not number the 4 examples"):
        many.apply({"params": params}, X, adapters=bank.select(["dora"] * 4))
    with pytest.raises(ValueError, match="arrays like its own"):
        bank.with_params(given.trees["dora"])


def test_what_training_takes():
    given = two()
    bank = given.bank()
    losses = functools.partial(lambda params, selection, x: x)
    with pytest.raises(ValueError, match="at_once is a positive integer, got 0"):
        peft.adapter_value_and_grad(losses, bank.axes, at_once=0)
    run = peft.adapter_value_and_grad(losses, bank.axes)
    with pytest.raises(ValueError, match=r"takes the selection bank\.each"):
        run(bank.params, bank.select(list(bank.names)), jnp.zeros(3))
    with pytest.raises(ValueError, match=r"axis of 3 adapters in front.*\(4,\)"):
        run(bank.params, bank.each(), jnp.zeros(4))
    with pytest.raises(ValueError, match=r"floats of shape \(3,\), and nothing else"):
        run(bank.params, bank.each(), jnp.zeros((3, 2)))


def test_a_selection_is_of_the_bank_as_it_was():
    given = two()
    bank = given.bank()
    selection = bank.select(["dora"] * 5)
    less = bank.without("dora")
    assert jnp.isnan(run_two(less.merge(given.base), X, selection)).all()
    other = peft.stack_adapters([bank.adapter("dora")[0]], specs=bank.adapter("dora")[1])
    with pytest.raises(ValueError, match=r"has 1 slots, but adapters were chosen of a bank of 3"):
        run_two(other.merge(given.base), X, selection)


def test_a_batch_of_no_examples():
    given = served(nn.Dense(4), configs("all-linear"), X)
    bank = given.bank()
    y = given.rows(bank.merge(given.base), (X[:0],), bank.select([]))
    assert y.shape == (0, *X.shape[1:-1], 4)


def test_dtypes_are_those_of_floats():
    lora, specs = two().bank().adapter("dora")
    for dtype in (jnp.int8, bool, "junk"):
        with pytest.raises(ValueError, match="stack_adapters: "):
            peft.stack_adapters([lora], specs=specs, dtype=dtype)


def test_a_bank_that_is_switched_off():
    given = two()
    bank = given.bank()
    with peft.disable_adapters():
        y = run_two(bank.merge(given.base), X, bank.select(["dora"] * 5))
    assert_close(y, given.alone(None, None, (X,)), rounding(X.shape[-1]))


@pytest.mark.slow
def test_a_bank_and_an_adapter_for_all_rows():
    """What they add to a layer adds up."""
    given = served(nn.Dense(4), configs("all-linear"), X)
    bank = given.bank()
    selection = bank.select(["dora", None, "bias", "dora", "plain"])
    model = peft.get_peft_model(nn.Dense(4), Config(r=1), "own")
    own = small(peft.split_params(shapes_made(model, (X,))).lora, 9)
    params = peft.merge_params(bank.merge(given.base), own)
    both = given._replace(model=model).rows(params, (X,), selection)
    change = model.apply({"params": peft.merge_params(given.base, own)}, X)
    change -= given.alone(None, None, (X,))
    assert_close(both, given.rows(bank.merge(given.base), (X,), selection) + change)


def test_a_bank_beside_layers_of_other_rules():
    """A plain interceptor around the model does not disturb the bank."""
    given = two()
    bank = given.bank()
    selection = bank.select(["dora", None, "bias", "dora", "plain"])
    expected = run_two(bank.merge(given.base), X, selection)
    with peft.ModuleInterceptor(lambda module: module):
        found = run_two(bank.merge(given.base), X, selection)
    chex.assert_trees_all_equal(found, expected)

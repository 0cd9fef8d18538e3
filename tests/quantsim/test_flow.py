"""The flow of quantsim: calibrate the base once, swap adapters, export, train through it."""

import dataclasses
import functools
import json
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from helpers import (
    assert_close,
    encodings_by_path,
    initialise,
    loss_of,
    nested_encodings,
    numbers,
    randomised,
)
from jax.sharding import NamedSharding, PartitionSpec

import peft_jax as peft
from peft_jax import demo, quantsim
from peft_jax.quantsim import Quantizer, QuantizerRule, SimulationConfig

CONFIG = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["one", "two"], init_lora_weights=False)
slow = pytest.mark.slow


class Chain(nn.Module):
    """Three layers, of which the first two are adapted."""

    width: int = 8

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(self.width, name="one")(x))
        x = nn.relu(nn.Dense(self.width, name="two")(x))
        return nn.Dense(self.width, name="three")(x)


def adapted(model, *inputs, modules=("one", "two")):
    """A model with adapters that are not zero, and its parameters."""
    model = peft.get_peft_model(model, dataclasses.replace(CONFIG, target_modules=modules))
    params = initialise(model, *inputs)["params"]
    base, lora = peft.split_params(params)
    return model, peft.merge_params(base, randomised(lora))


def calibrated(sim, params, *batches):
    """Encodings of the base, calibrated alone and frozen, and of the adapters."""
    with peft.disable_adapters():
        base = quantsim.freeze(quantsim.compute_encodings(sim, params, batches))
    return quantsim.compute_encodings(sim, params, batches, encodings=base)


def assert_same(actual, expected):
    """Equal to the bit, and in all that encodings say beside their numbers."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for path, leaf in jax.tree.leaves_with_path(actual):
        other = functools.reduce(lambda tree, key: tree[key.key], path[:-1], expected)
        assert np.array_equal(leaf, getattr(other, path[-1].name)), jax.tree_util.keystr(path)


def select(encodings, **kind):
    """The encodings of a kind, by path."""
    return {
        path: encoding
        for path, encoding in encodings_by_path(encodings).items()
        if all(getattr(encoding, name) == value for name, value in kind.items())
    }


def united(*trees):
    """One tree of encodings from several that share no path."""
    return nested_encodings(
        {path: encoding for tree in trees for path, encoding in encodings_by_path(tree).items()}
    )


# --- The eleven steps ----------------------------------------------------------------------------


def test_base_is_calibrated_once_and_serves_two_adapters(tmp_path):
    images = demo.load_digits(0)[0].images[:24]
    batches = [images[:8], images[8:16], images[16:]]

    # 1. A model with one adapter; 2. and 4. as simulation runs it; 3. what adapters share.
    plain = demo.DigitTransformer(width=8, depth=1, heads=2)
    model, params = adapted(plain, images[:1], modules=["query", "value", "up", "down"])
    config = SimulationConfig(rules=[QuantizerRule("patch/kernel", Quantizer(6, symmetric=True))])
    sim = quantsim.simulate(model, config)
    quantsim.adapter_metadata(peft.lora_specs(model, images[:1])).save(tmp_path / "metadata.json")
    metadata = quantsim.AdapterMetadata.load(tmp_path / "metadata.json")
    assert metadata == quantsim.adapter_metadata(peft.lora_specs(model, images[:1]))
    layers = json.loads((tmp_path / "metadata.json").read_text())["adapters"]["default"]
    assert layers["block_0/up/lora"]["a"] == "block_0/up/lora/a"
    assert (layers["block_0/up/lora"]["alpha"], layers["block_0/up/lora"]["scaling"]) == (4, 2)

    # 5. The base alone; 6. its encodings, which then stay; 7. its files.
    with peft.disable_adapters():
        base = quantsim.compute_encodings(sim, params, batches)
    assert not select(base, of_adapter=True)
    base = quantsim.freeze(base)
    files = quantsim.export_base(tmp_path, params, base)
    written = [file.read_bytes() for file in files]

    # 9. The quantizers of adapters are others.
    finer = dataclasses.replace(
        config,
        adapter_weights=Quantizer(16, symmetric=True, granularity="channel"),
        adapter_hidden=Quantizer(16, symmetric=True),
        adapter_scaling=Quantizer(16, range=(0, 4)),
    )
    other = quantsim.simulate(model, finer)
    sites = quantsim.find_sites(other, images[:1])
    run = jax.jit(lambda params, encodings: other.apply(params, images, encodings=encodings))
    exact = jax.jit(lambda params: model.apply(params, images))
    outputs = []
    for number in (1, 2):
        # 8. An adapter; 10. its encodings and files; 11. the next.
        lora = jax.tree.map(lambda x: x / 12, randomised(peft.get_adapter(params), seed=number))
        tuned = quantsim.use_adapter(params, lora, metadata)
        encodings = quantsim.compute_encodings(other, tuned, batches, encodings=base)
        assert_same(select(encodings, of_adapter=False), encodings_by_path(base))
        added = select(encodings, of_adapter=True)
        assert set(added) | set(encodings_by_path(base)) == set(sites)
        a = encodings["block_0"]["up"]["lora"]["a"]
        assert (a.bitwidth, a.symmetric, a.scale.shape) == (16, True, (1, 2))
        scaling = encodings["block_0"]["up"]["lora"]["scaling"]
        assert np.all(scaling.min == 0)
        np.testing.assert_allclose(scaling.max, 4, rtol=1e-6)

        weights, document = quantsim.export_adapter(
            tmp_path, tuned, encodings, prefix=f"adapter_{number}", metadata=metadata
        )
        fresh = tmp_path / f"again_{number}"
        fresh.mkdir()
        for directory in (tmp_path, fresh):
            again = quantsim.export_base(directory, tuned, encodings)
            assert [file.read_bytes() for file in again] == written

        # What was written makes the same model.
        restored = quantsim.use_adapter(params, weights, metadata)
        chex.assert_trees_all_equal(restored, tuned)
        loaded = united(
            quantsim.freeze(quantsim.load_encodings(files[1], sites)),
            quantsim.load_encodings(document, sites),
        )
        assert_same(loaded, encodings)
        output = run({"params": tuned}, encodings)
        assert np.array_equal(output, run({"params": restored}, loaded))
        outputs.append(output)
        unsimulated = exact({"params": tuned})
        off = np.max(np.abs(output - unsimulated)) / np.max(np.abs(unsimulated))
        assert 0 < off < 0.2, "no simulation, or a bad one"
    assert not np.allclose(*outputs), "the adapters do the same"
    assert [file.read_bytes() for file in files] == written


def test_encodings_of_a_named_adapter_are_loaded_back(tmp_path):
    x = numbers(4, 8)
    config = dataclasses.replace(CONFIG, target_modules=["one"])
    model = peft.get_peft_model(Chain(), config, adapter_name="second")
    params = initialise(model, x)["params"]
    sim = quantsim.simulate(model)
    encodings = quantsim.compute_encodings(sim, params, [x])
    _, document = quantsim.export_adapter(
        tmp_path, params, encodings, prefix="second", adapter_name="second"
    )
    sites = quantsim.find_sites(sim, x)
    loaded = quantsim.load_encodings(document, sites, adapter_name="second")
    assert_same(encodings_by_path(loaded), select(encodings, of_adapter=True))


# --- However batches are cut ---------------------------------------------------------------------

# Quarters, and weights on a grid of 128ths, so that all sums are exact in any order.
EXACT = Quantizer(8, symmetric=True, range=(-1, 127 / 128))


def quarters(tree):
    return jax.tree.map(lambda x: jnp.clip(jnp.round(x * 4), -4, 3) / 4, tree)


def exact_chain(*rules):
    """A model whose values are exact, its parameters and 32 examples."""
    x = quarters(numbers(32, 8))
    model, params = adapted(Chain(), x, modules=["one", "two", "three"])
    config = SimulationConfig(
        weights=EXACT, adapter_weights=EXACT, adapter_scaling=None, rules=rules
    )
    return quantsim.simulate(model, config), quarters(params), x


def calibrations(**settings):
    """A rule for each of the layers: each has another way to its ranges."""
    kinds = {"one": "min_max", "two": "percentile", "three": "mse"}
    return [
        QuantizerRule(f"{layer}/{site}", Quantizer(8, calibration=kind, **settings))
        for layer, kind in kinds.items()
        for site in ("input", "output", "lora/hidden")
    ]


def cuts(x):
    labels = jnp.zeros(8)
    return {
        "8 by 8, dicts": [{"x": part, "labels": labels} for part in np.split(x, 4)],
        "uneven, tuples": [(part,) for part in np.split(x, [1, 20])],
        "a generator": (x[i : i + 16] for i in (16, 0)),
    }


@pytest.mark.parametrize(
    "settings", [{"percentile": 90}, pytest.param({"granularity": "channel"}, marks=slow)]
)
def test_encodings_do_not_depend_on_how_examples_are_cut(settings):
    sim, params, x = exact_chain(*calibrations(**settings))
    expected = quantsim.compute_encodings(sim, params, [x])
    assert len(select(expected, of_parameter=False)) == 9
    for name, batches in cuts(x).items():
        found = quantsim.compute_encodings(sim, params, batches)
        assert_same(found, expected), name


@pytest.mark.parametrize(
    "spread",
    [pytest.param("batches", marks=slow), pytest.param("parameters", marks=slow), "both"],
)
def test_encodings_over_eight_devices_are_those_of_one(spread):
    sim, params, x = exact_chain(*calibrations())
    expected = quantsim.compute_encodings(sim, params, [x[:16], x[16:]])
    mesh = jax.make_mesh((8,), ("all",), axis_types=(jax.sharding.AxisType.Auto,))
    everywhere = NamedSharding(mesh, PartitionSpec())

    def rows(array):
        return jax.device_put(array, NamedSharding(mesh, PartitionSpec("all")))

    def columns(array):
        spec = (None,) * (array.ndim - 1) + ("all",) * (array.shape[-1] % 8 == 0)
        return jax.device_put(array, NamedSharding(mesh, PartitionSpec(*spec)))

    if spread == "batches":
        params = jax.device_put(params, everywhere)
    else:
        params = jax.tree.map(columns, params)
    batches = [rows(part) if spread != "parameters" else part for part in (x[:16], x[16:])]
    assert_same(quantsim.compute_encodings(sim, params, batches), expected)


def test_encodings_on_a_mesh_of_explicit_axes_are_those_without():
    sim, params, x = exact_chain(*calibrations(granularity="channel"))
    expected = quantsim.compute_encodings(sim, params, [x])
    mesh = jax.make_mesh((8,), ("all",), axis_types=(jax.sharding.AxisType.Explicit,))
    params = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
    batch = jax.device_put(x, NamedSharding(mesh, PartitionSpec("all")))
    assert_same(quantsim.compute_encodings(sim, params, [batch]), expected)


class Halves(nn.Module):
    def setup(self):
        self.one, self.two = nn.Dense(4), nn.Dense(2)

    def __call__(self, x):
        return self.two(self.one(x))

    def encode(self, x):
        return self.one(x)


def test_a_method_is_calibrated_by_itself():
    """What it does not reach stays as it was."""
    config = peft.LoraConfig(r=2, target_modules=["one", "two"], init_lora_weights=False)
    model, x = peft.get_peft_model(Halves(), config), numbers(4, 8)
    params = initialise(model, x)["params"]
    sim = quantsim.simulate(model)

    def encode(model, params, batch):
        return model.apply({"params": params}, batch, method="encode")

    half = quantsim.compute_encodings(sim, params, [x], forward_fn=encode)
    whole = quantsim.compute_encodings(sim, params, [x])
    assert set(half) == {"one"}
    assert_same(half["one"], whole["one"])
    again = quantsim.compute_encodings(sim, params, [x / 2], encodings=whole, forward_fn=encode)
    assert_same(again["two"], whole["two"])
    assert again["one"]["input"].scale < whole["one"]["input"].scale


def numpy_grid(values, bitwidth=8):
    """Scale and offset for a range of numbers, by AIMET's formula without its special cases."""
    low, high = min(np.min(values), 0), max(np.max(values), 0)
    scale = (high - low) / (2**bitwidth - 1)
    return scale, np.rint(low / scale)


def test_ranges_are_those_of_what_flows():
    sim, params, x = exact_chain()
    found = quantsim.compute_encodings(sim, params, [x[:5], x[5:]])
    flow = {}
    y = np.asarray(x, np.float64)
    for name in ("one", "two", "three"):
        layer = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params[name])
        flow[f"{name}/input"] = y
        flow[f"{name}/output"] = y @ layer["kernel"] + layer["bias"]
        flow[f"{name}/lora/hidden"] = y @ layer["lora"]["a"]
        y = flow[f"{name}/output"] + 2 * flow[f"{name}/lora/hidden"] @ layer["lora"]["b"]
        y = np.maximum(y, 0)
    observed = select(found, of_parameter=False)
    assert set(observed) == set(flow)
    for path, values in flow.items():
        scale, offset = numpy_grid(values)
        np.testing.assert_allclose(observed[path].scale.ravel(), scale, rtol=1e-6, err_msg=path)
        assert observed[path].offset.ravel() == offset, path


def test_moving_average_follows_the_batches_in_their_order():
    rule = QuantizerRule("one/input", Quantizer(8, calibration="moving_average", momentum=0.75))
    sim, params, x = exact_chain(rule)
    parts = np.split(np.asarray(x) * np.float32([1, 2, 4, 1]).repeat(8)[:, None], 4)
    found = quantsim.compute_encodings(sim, params, parts)["one"]["input"]
    low, high = np.min(parts[0]), np.max(parts[0])
    for part in parts[1:]:
        low, high = 0.75 * low + 0.25 * np.min(part), 0.75 * high + 0.25 * np.max(part)
    scale, offset = numpy_grid([low, high])
    np.testing.assert_allclose(found.scale.ravel(), scale, rtol=1e-6)
    assert found.offset.ravel() == offset


# --- Lifted models -------------------------------------------------------------------------------


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        return x + nn.Dense(4, name="up")(nn.relu(nn.Dense(6, name="down")(x))), None


def scanned(layer, length, axis=0):
    return nn.scan(
        layer, variable_axes={"params": axis}, split_rngs={"params": True}, length=length
    )


class Scanned(nn.Module):
    axis: int = 0
    block: Any = Block

    @nn.compact
    def __call__(self, x):
        return scanned(self.block, 3, self.axis)(name="layers")(x, None)[0]


class Inner(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return scanned(Block, 3, 1)(name="inner")(x, None)[0] / 2, None


class Nested(nn.Module):
    @nn.compact
    def __call__(self, x):
        return scanned(Inner, 2)(name="outer")(x, None)[0]


class Unrolled(nn.Module):
    """Blocks one after another, with a factor after each third of them if they are nested."""

    length: int = 3
    nested: bool = False

    @nn.compact
    def __call__(self, x):
        for i in range(self.length):
            x, _ = Block(name=f"layer_{i}")(x, None)
            x = x / 2 if self.nested and i % 3 == 2 else x
        return x


class Mapped(nn.Module):
    """Blocks side by side, each on its rows."""

    @nn.compact
    def __call__(self, x):
        block = nn.vmap(Block, variable_axes={"params": 1}, split_rngs={"params": True}, in_axes=0)
        return block(name="layers")(x.reshape(3, -1, 4))[0]


class SideBySide(nn.Module):
    @nn.compact
    def __call__(self, x):
        parts = x.reshape(3, -1, 4)
        return jnp.stack([Block(name=f"layer_{i}")(part)[0] for i, part in enumerate(parts)])


class PerExample(nn.Module):
    """One block for all examples, mapped over them."""

    @nn.compact
    def __call__(self, x):
        block = nn.vmap(Block, variable_axes={"params": None}, split_rngs={"params": False})
        return block(name="layer_0")(x)[0]


class Recurrent(nn.Module):
    unrolled: bool = False

    @nn.compact
    def __call__(self, x):
        x = x.reshape(3, -1, 4)  # examples, times, features
        cell = nn.SimpleCell(4, name="cell")
        if not self.unrolled:
            return nn.RNN(cell)(x)
        carry, outputs = jnp.zeros((3, 4)), []
        for t in range(x.shape[1]):
            carry, y = cell(carry, x[:, t])
            outputs.append(y)
        return jnp.stack(outputs, 1)


def layers_of(axis, name="layers"):
    def split(tree):
        def layer(i):
            return jax.tree.map(lambda leaf: jnp.moveaxis(leaf, axis, 0)[i], tree[name])

        return {f"layer_{i}": layer(i) for i in range(3)}

    return split


def nested_layers(tree):
    def layer(i, j):
        # Innermost first: a layer, then the block of it, at axis 1 of each layer's arrays.
        return jax.tree.map(lambda leaf: jnp.take(leaf[i], j, axis=1), tree["outer"]["inner"])

    return {f"layer_{3 * i + j}": layer(i, j) for i in range(2) for j in range(3)}


LIFTED = {
    "scan": (Scanned(), Unrolled(), layers_of(0)),
    "scan, axis 1": (Scanned(1), Unrolled(), layers_of(1)),
    "scan, axis -1": (Scanned(-1), Unrolled(), layers_of(-1)),
    "scan of remat": (Scanned(1, nn.remat(Block)), Unrolled(), layers_of(1)),
    "scan in scan": (Nested(), Unrolled(6, nested=True), nested_layers),
    "vmap": (Mapped(), SideBySide(), layers_of(1)),
    "vmap, one for all": (PerExample(), Unrolled(1), lambda tree: tree),
    "time": (Recurrent(), Recurrent(unrolled=True), lambda tree: tree),
}
QUICK = {("scan, axis 1", "channel")}


@pytest.mark.parametrize(
    ("name", "granularity"),
    [
        pytest.param(name, granularity, marks=[] if (name, granularity) in QUICK else slow)
        for name in LIFTED
        for granularity in ("tensor", "channel")
    ],
)
def test_lifted_layers_have_the_encodings_of_unrolled_ones(name, granularity):
    lifted, unrolled, split = LIFTED[name]
    x = numbers(12, 4)
    modules = ["i", "h"] if name == "time" else ["up", "down"]
    config = SimulationConfig(
        inputs=Quantizer(8, granularity=granularity),
        outputs=Quantizer(8, granularity=granularity, calibration="mse"),
        adapter_weights=Quantizer(8, symmetric=True, granularity=granularity),
    )
    model, params = adapted(lifted, x, modules=modules)
    sim = quantsim.simulate(model, config)
    other = dataclasses.replace(CONFIG, target_modules=modules)
    plain = quantsim.simulate(peft.get_peft_model(unrolled, other), config)

    found = quantsim.compute_encodings(sim, params, [x[:6], x[6:]])
    expected = quantsim.compute_encodings(plain, split(params), [x[:6], x[6:]])
    assert_close(split(found), expected)
    y = jax.jit(sim.apply)({"params": params}, x, encodings=found)
    # A value in the middle of two may be rounded to either: steps of the last grid at most.
    z = jax.jit(plain.apply)({"params": split(params)}, x, encodings=split(found))
    np.testing.assert_allclose(y, z, atol=0.02 * np.max(np.abs(z)))
    assert np.mean(np.abs(y - z) > 1e-5 * np.max(np.abs(z))) < 0.1


class Twice(nn.Module):
    @nn.compact
    def __call__(self, x):
        layer = nn.Dense(8, name="one")
        return layer(3 * layer(x))


def test_layer_that_is_called_twice_has_one_range_for_both():
    x = numbers(5, 8)
    params = initialise(Twice(), x)["params"]
    sim = quantsim.simulate(Twice(), SimulationConfig(weights=None))
    found = quantsim.compute_encodings(sim, params, [x])
    inner = nn.Dense(8).apply({"params": params["one"]}, x)
    outer = Twice().apply({"params": params}, x)
    for site, values in {"input": (x, 3 * inner), "output": (inner, outer)}.items():
        scale, offset = numpy_grid(np.concatenate(values))
        np.testing.assert_allclose(found["one"][site].scale.ravel(), scale, rtol=1e-5)
        assert found["one"][site].offset.ravel() == offset


# --- Training ------------------------------------------------------------------------------------


def positions(x, scale, offset, n):
    ratio = x / scale
    code = np.rint(ratio) - offset
    return ratio, np.clip(code, 0, n), code == np.clip(code, 0, n)


def numpy_gradients(x, scale, offset, cotangent, bitwidth, axes):
    """LSQ's and LSQ+'s gradients by values, scale and offset, in float64."""
    ratio, code, inside = positions(x, scale, offset, 2**bitwidth - 1)
    slope = np.where(inside, code + offset - ratio, code + offset)
    return (
        np.where(inside, cotangent, 0),
        np.sum(cotangent * slope, axes, keepdims=True),
        np.sum(np.where(inside, 0, cotangent * scale), axes, keepdims=True),
    )


@pytest.mark.parametrize("bitwidth", [3, 8])
def test_gradients_are_the_formulas_of_straight_through_and_learnt_ranges(bitwidth):
    x, kernel = numbers(6, 5), numbers(5, 4, seed=1)
    params = {"kernel": kernel}
    per_channel = Quantizer(bitwidth, symmetric=True, granularity="channel")
    config = SimulationConfig(weights=per_channel, inputs=Quantizer(bitwidth), outputs=None)
    sim = quantsim.simulate(nn.Dense(4, use_bias=False), config)
    encodings = quantsim.compute_encodings(sim, params, [x])
    # Narrower, so that some values are clipped.
    encodings = jax.tree.map(
        lambda e: e.replace(scale=e.scale * 0.7, offset=e.offset + jnp.float32(not e.symmetric)),
        encodings,
        is_leaf=lambda node: isinstance(node, quantsim.Encoding),
    )

    def loss(params, encodings, x):
        return loss_of(sim.apply({"params": params}, x, encodings=encodings))

    found = jax.jit(jax.grad(loss, (0, 1, 2)))(params, encodings, x)

    def of(name):
        wide = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(encodings[name])]
        return wide[0], wide[1]

    n = 2**bitwidth - 1
    wide = {"kernel": np.asarray(kernel, np.float64), "input": np.asarray(x, np.float64)}
    rounded, clipped = {}, 0
    for name, values in wide.items():
        _, code, inside = positions(values, *of(name), n)
        rounded[name] = (code + of(name)[1]) * of(name)[0]
        clipped += np.sum(~inside)
    assert clipped >= 3
    cotangent = np.asarray(jax.grad(loss_of)(jnp.zeros((6, 4))), np.float64)
    given = {"kernel": rounded["input"].T @ cotangent, "input": cotangent @ rounded["kernel"].T}
    for name, axes, own in (("kernel", 0, found[0]["kernel"]), ("input", (0, 1), found[2])):
        expected = numpy_gradients(wide[name], *of(name), given[name], bitwidth, axes)
        if encodings[name].symmetric:  # whose offset follows from the bitwidth
            expected = (*expected[:2], np.zeros_like(expected[2]))
        actual = (own, found[1][name].scale, found[1][name].offset)
        for one, other in zip(actual, expected, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-4 * np.max(np.abs(other)))


@functools.cache
def task():
    """A model in few bits, its parameters, encodings of which the base's are frozen, a target."""
    x = numbers(32, 8)
    model, params = adapted(Chain(), x)
    few = Quantizer(4, symmetric=True)
    config = SimulationConfig(
        weights=few, inputs=Quantizer(4), outputs=None, adapter_weights=few, adapter_scaling=None
    )
    sim = quantsim.simulate(model, config)
    base, lora = peft.split_params(params)
    target = model.apply(
        {"params": peft.merge_params(base, jax.tree.map(lambda leaf: -leaf, randomised(lora, 5)))},
        x,
    )
    return sim, params, calibrated(sim, params, x), (x, target)


def trained(sim, params, encodings, data, optimizer, steps=30):
    """What training made of parameters and encodings, and the losses; one trace."""
    x, target = data
    chex.clear_trace_counter()

    def loss(state):
        y = sim.apply({"params": state[0]}, x, encodings=state[1])
        return jnp.mean(jnp.square(y - target))

    @jax.jit
    @chex.assert_max_traces(1)
    def step(state, memory):
        value, gradient = jax.value_and_grad(loss)(state)
        updates, memory = optimizer.update(gradient, memory, state)
        return optax.apply_updates(state, updates), memory, value

    state, losses = (params, encodings), []
    memory = optimizer.init(state)
    for _ in range(steps):
        state, memory, value = step(state, memory)
        losses.append(float(value))
    return *state, losses


def trainer(adapters, ranges):
    """Adam where the masks are true, nothing elsewhere; scales are small, so are their steps."""

    def labels(mask, learns):
        return jax.tree.map(lambda moves: learns if moves else "stays", mask)

    return optax.multi_transform(
        {"adapter": optax.adam(0.02), "range": optax.adam(0.002), "stays": optax.set_to_zero()},
        (labels(adapters, "adapter"), labels(ranges, "range")),
    )


def is_adapter(params):
    return jax.tree_util.tree_map_with_path(
        lambda path, _: any(key.key == "lora" for key in path), params
    )


@pytest.mark.usefixtures("relaxed_promotion")
@pytest.mark.parametrize(
    "learns", ["adapters", pytest.param("ranges", marks=slow), pytest.param("both", marks=slow)]
)
def test_training_through_the_simulation_lowers_the_loss(learns):
    sim, params, encodings, data = task()
    ranges = quantsim.learnable_mask(encodings)
    adapters = is_adapter(params)
    if learns == "adapters":
        ranges = jax.tree.map(lambda _: False, ranges)
    elif learns == "ranges":
        adapters = jax.tree.map(lambda _: False, adapters)
    masks = (adapters, ranges)
    assert any(jax.tree.leaves(masks))
    after, moved, losses = trained(sim, params, encodings, data, trainer(*masks))
    assert losses[-1] < (0.99 if learns == "ranges" else 0.8) * losses[0], losses
    for mask, old, new in zip(
        jax.tree.leaves(masks),
        jax.tree.leaves((params, encodings)),
        jax.tree.leaves((after, moved)),
        strict=True,
    ):
        assert mask or np.array_equal(old, new), "what should stay has moved"
    assert any(
        not np.array_equal(old, new)
        for old, new in zip(
            jax.tree.leaves((params, encodings)), jax.tree.leaves((after, moved)), strict=True
        )
    )
    for path, encoding in encodings_by_path(moved).items():
        assert np.all(encoding.scale > 0), path


def test_frozen_encodings_have_no_gradient_and_others_have():
    sim, params, encodings, (x, target) = task()

    def loss(encodings):
        y = sim.apply({"params": params}, x, encodings=encodings)
        return jnp.sum(jnp.square(y - target))

    gradients = encodings_by_path(jax.jit(jax.grad(loss))(encodings))
    for path, encoding in encodings_by_path(encodings).items():
        moves = bool(np.any(np.asarray(gradients[path].scale) != 0))
        assert moves == (not encoding.is_frozen), path
        assert encoding.is_frozen == (not encoding.of_adapter)


def test_mask_of_what_learns():
    _, _, encodings, _ = task()
    mask = quantsim.learnable_mask(encodings)
    assert jax.tree.structure(mask) == jax.tree.structure(encodings)
    for path, encoding in encodings_by_path(encodings).items():
        own = encodings_by_path(mask)[path]
        learns = not encoding.is_frozen
        assert (own.scale, own.offset) == (learns, learns and not encoding.symmetric), path


@pytest.mark.usefixtures("relaxed_promotion")
def test_mask_serves_optax_masked():
    sim, params, encodings, data = task()
    optimizer = optax.chain(
        optax.masked(optax.adam(0.002), (is_adapter(params), quantsim.learnable_mask(encodings))),
        optax.masked(
            optax.set_to_zero(),
            jax.tree.map(
                lambda learns: not learns,
                (is_adapter(params), quantsim.learnable_mask(encodings)),
            ),
        ),
    )
    _, moved, losses = trained(sim, params, encodings, data, optimizer, steps=10)
    assert losses[-1] < losses[0]
    frozen = select(encodings, is_frozen=True)
    assert_same({p: e for p, e in encodings_by_path(moved).items() if p in frozen}, frozen)


def test_adapters_and_encodings_are_swapped_without_a_new_trace():
    sim, params, encodings, (x, _) = task()
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(1)
    def run(params, encodings, x):
        return sim.apply({"params": params}, x, encodings=encodings)

    first = run(params, encodings, x)
    base, lora = peft.split_params(params)
    tuned = peft.merge_params(base, randomised(lora, 7))
    other = quantsim.compute_encodings(sim, tuned, [x], encodings=encodings)
    second = run(tuned, other, x)
    assert not np.allclose(first, second)
    assert_close(second, sim.apply({"params": tuned}, x, encodings=other), 1e-4)


# --- Freezing, disabling, changing ---------------------------------------------------------------

KINDS = [(parameters, activations) for parameters in (True, False) for activations in (True, False)]


@functools.cache
def calibrated_chain():
    x = numbers(8, 8)
    model, params = adapted(Chain(), x)
    sim = quantsim.simulate(model)
    return model, sim, params, x, quantsim.compute_encodings(sim, params, [x])


@pytest.mark.parametrize("adapters", [True, False])
@pytest.mark.parametrize(("parameters", "activations"), KINDS[:-1])
def test_freezing_marks_what_it_says(parameters, activations, adapters):
    *_, before = calibrated_chain()
    chosen = {"parameters": parameters, "activations": activations, "adapters": adapters}
    frozen = quantsim.freeze(before, **chosen)
    kept = select(frozen, is_frozen=True)
    for path, encoding in encodings_by_path(before).items():
        of_kind = parameters if encoding.of_parameter else activations
        assert (path in kept) == (of_kind and (adapters or not encoding.of_adapter)), path
    assert_same(quantsim.unfreeze(frozen, **chosen), before)


@pytest.mark.parametrize(("parameters", "activations"), KINDS[:-1])
def test_calibration_leaves_frozen_encodings_alone(parameters, activations):
    _, sim, params, x, before = calibrated_chain()
    frozen = quantsim.freeze(before, parameters=parameters, activations=activations)
    louder = jax.tree.map(lambda leaf: 1.5 * leaf, params)
    after = encodings_by_path(quantsim.compute_encodings(sim, louder, [3 * x], encodings=frozen))
    assert set(after) == set(encodings_by_path(before))
    for path, encoding in encodings_by_path(frozen).items():
        same = np.array_equal(after[path].scale, encoding.scale)
        assert same == (encoding.is_frozen or path.endswith("scaling")), path
        assert after[path].is_frozen == encoding.is_frozen


def test_disabled_adapters_leave_the_quantized_base():
    _, sim, params, x, _ = calibrated_chain()
    encodings = calibrated(sim, params, x)
    plain = quantsim.simulate(Chain())
    base, _ = peft.split_params(params)
    own = quantsim.compute_encodings(plain, base, [x])
    expected = plain.apply({"params": base}, x, encodings=own)
    with peft.disable_adapters():
        assert np.array_equal(sim.apply({"params": params}, x, encodings=encodings), expected)
        only = quantsim.compute_encodings(sim, params, [x])
    assert_same(only, own)
    assert not np.allclose(sim.apply({"params": params}, x, encodings=encodings), expected)


@pytest.mark.parametrize("frozen", [True, pytest.param(False, marks=slow)])
def test_another_configuration_needs_other_encodings(frozen):
    model, _, params, x, encodings = calibrated_chain()
    encodings = quantsim.freeze(encodings) if frozen else encodings
    rule = QuantizerRule("two/kernel", Quantizer(4, symmetric=True))
    other = quantsim.simulate(model, SimulationConfig().with_rules(rule))
    with pytest.raises(ValueError, match=r"'two/kernel' was made for Quantizer\(bitwidth=8.*=4"):
        other.apply({"params": params}, x, encodings=encodings)
    if frozen:
        with pytest.raises(ValueError, match=r"frozen encoding of 'two/kernel'.*Unfreeze"):
            quantsim.compute_encodings(other, params, [x], encodings=encodings)
        encodings = quantsim.unfreeze(encodings)
    new = quantsim.compute_encodings(other, params, [x], encodings=encodings)
    assert new["two"]["kernel"].bitwidth == 4
    other.apply({"params": params}, x, encodings=new)


def test_encodings_show_what_they_are():
    encodings = quantsim.freeze(calibrated_chain()[-1])
    shown = repr(encodings["one"]["input"])
    scale = float(encodings["one"]["input"].scale.ravel()[0])
    assert shown.startswith("Encoding(Quantizer(bitwidth=8)")
    assert f"{scale:.4g}" in shown
    assert "frozen" in shown
    assert "frozen" not in repr(encodings["one"]["lora"]["hidden"])
    shown = repr(encodings["one"]["kernel"])
    assert "granularity='channel'" in shown
    assert "(1, 8)" in shown
    jax.jit(lambda encoding: repr(encoding) and encoding.scale)(encodings["one"]["input"])

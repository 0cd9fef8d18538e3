"""Simulated layers of every kind against integer arithmetic in numpy, on exported codes."""

import dataclasses
import functools
import json
from collections.abc import Callable
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.core import meta
from helpers import (
    STORING,
    WRAPPERS,
    assert_close,
    encodings_by_path,
    initialise,
    nested_encodings,
    numbers,
    randomised,
    rounding,
)
from safetensors.numpy import load_file

import peft_jax as peft
from peft_jax import quantsim
from peft_jax.quantsim import Quantizer, QuantizerRule, SimulationConfig

slow = pytest.mark.slow
ALPHA, RANK = 3, 2


# --- Layers in numpy -----------------------------------------------------------------------------


def correlated(x, kernel, stride=1, groups=1):
    """A convolution of (batch, places, in) without padding; kernel (window, in / groups, out)."""
    window = len(kernel)
    places = range(0, x.shape[1] - window + 1, stride)
    patches = np.stack([x[:, at : at + window] for at in places], 1)
    parts = np.split(patches, groups, -1), np.split(kernel, groups, -1)
    return np.concatenate(
        [np.einsum("bpwi,wio->bpo", p, k) for p, k in zip(*parts, strict=True)], -1
    )


def spread(x, window):
    """The input of a transposed convolution of stride 2, as one of stride 1 sees it."""
    wide = np.zeros((x.shape[0], 2 * x.shape[1] - 1, x.shape[2]))
    wide[:, ::2] = x
    return np.pad(wide, [(0, 0), (window - 1, window - 1), (0, 0)])


def grouped(x, a):
    """``x·a`` of a convolution in two groups: the groups in front."""
    return np.stack([correlated(part, a) for part in np.split(x, 2, -1)])


def grouped_up(hidden, b):
    parts = zip(hidden, np.split(b, 2, -1), strict=True)
    return np.concatenate([h @ part for h, part in parts], -1)


def strided(x, kernel):
    return correlated(x, kernel, stride=2)


def einsum(equation):
    return functools.partial(np.einsum, equation)


class Scores(nn.Module):
    """A layer of which the library is told."""

    @nn.compact
    def __call__(self, x):
        w = self.param("w", nn.initializers.normal(1.0), (4, 6))
        return jnp.einsum("...i,oi->...o", x, w)


peft.register_layer(Scores, param="w", equation="...i,oi->...o", bias="")


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """A layer, its input, and in numpy: ``x·W``, ``x·a``, ``hidden·b`` and ``a·b``, by letters.

    ``outputs`` are the axes of the weight that are the layer's outputs; ``prefix`` stands before
    the names of what flows through another method than ``__call__``.
    """

    layer: nn.Module
    x: Any
    product: Callable[..., Any]
    hidden: Callable[..., Any]
    up: Callable[..., Any]
    delta: str
    outputs: str = "o"
    param: str = "kernel"
    method: str = "__call__"

    @property
    def prefix(self):
        return "" if self.method == "__call__" else f"{self.method}_"


def by_einsum(layer, shape, equations, delta, outputs, **fields):
    product, hidden, up = map(einsum, equations.split())
    return Case(layer, numbers(*shape), product, hidden, up, delta, outputs, **fields)


DENSE = "...i,io->...o ...i,ir->...r ...r,ro->...o"
CONV = {"hidden": strided, "up": einsum("...r,ro->...o"), "delta": "xir,ro->xio"}
TABLE = {"delta": "vr,rf->vf", "outputs": "f", "param": "embedding"}
CASES = {
    "dense": by_einsum(nn.Dense(4), (3, 2, 6), DENSE, "ir,ro->io", "o"),
    "dense, no bias": by_einsum(nn.Dense(4, use_bias=False), (3, 6), DENSE, "ir,ro->io", "o"),
    "einsum, heads out": by_einsum(
        nn.Einsum((6, 2, 4), "btd,dnh->btnh"),
        (2, 3, 6),
        "btd,dnh->btnh btd,dr->btr btr,rnh->btnh",
        "dr,rnh->dnh",
        "nh",
    ),
    "einsum, heads in": by_einsum(
        nn.Einsum((2, 4, 6), "btnh,nhd->btd"),
        (2, 3, 2, 4),
        "btnh,nhd->btd btnh,nhr->btr btr,rd->btd",
        "nhr,rd->nhd",
        "d",
    ),
    "einsum, a matrix for each place": by_einsum(
        nn.Einsum((2, 6, 4), "bti,tio->bto"),
        (3, 2, 6),
        "bti,tio->bto bti,tir->btr btr,ro->bto",
        "tir,ro->tio",
        "to",
    ),
    "general, several axes": by_einsum(
        nn.DenseGeneral(6, axis=(-2, -1)),
        (3, 2, 4),
        "bij,ijo->bo bij,ijr->br br,ro->bo",
        "ijr,ro->ijo",
        "o",
    ),
    "general, several features": by_einsum(
        nn.DenseGeneral((2, 4)),
        (3, 6),
        "bi,ino->bno bi,ir->br br,rno->bno",
        "ir,rno->ino",
        "no",
    ),
    "conv, strides": Case(
        nn.Conv(6, (3,), strides=2, padding="VALID"), numbers(2, 9, 4), strided, **CONV
    ),
    "conv, groups": Case(
        nn.Conv(6, (3,), feature_group_count=2, padding="VALID"),
        numbers(2, 7, 8),
        functools.partial(correlated, groups=2),
        grouped,
        grouped_up,
        "xir,ro->xio",
    ),
    "transposed": Case(
        nn.ConvTranspose(6, (3,), strides=(2,), padding="VALID"),
        numbers(2, 4, 4),
        lambda x, kernel: correlated(spread(x, 3), kernel),
        lambda x, a: correlated(spread(x, 3), a),
        einsum("...r,ro->...o"),
        "xir,ro->xio",
    ),
    "embed": Case(
        nn.Embed(6, 4),
        jnp.asarray([[0, 3, 5], [5, 1, 0]]),
        lambda ids, table: table[ids],
        lambda ids, a: a[ids],
        einsum("...r,rf->...f"),
        **TABLE,
    ),
    "attend": Case(
        nn.Embed(6, 4),
        numbers(3, 4),
        einsum("...f,vf->...v"),
        einsum("...f,rf->...r"),
        einsum("...r,vr->...v"),
        method="attend",
        **TABLE,
    ),
    "registered": by_einsum(
        Scores(),
        (3, 6),
        "...i,oi->...o ...i,ir->...r ...r,ro->...o",
        "ir,ro->oi",
        "o",
        param="w",
    ),
}
ADAPTERS: dict[str, Any] = {
    "none": None,
    "lora": {},
    "dora": {"use_dora": True},
    "bias": {"lora_bias": True},
}
GRANULARITIES = {
    "tensor": {},
    "channel": {"granularity": "channel"},
    "block": {"granularity": "block", "block_size": 2},
}


def model_of(case, adapter):
    if adapter is None:
        return case.layer
    wrapper = WRAPPERS.get(type(case.layer), peft.LoRAEinsum)
    return wrapper(rank=RANK, alpha=ALPHA, wrapped=case.layer, **adapter)


def drawn(model, *inputs, method="__call__", seed=0):
    """Parameters with numbers in all adapters, biases and scales of norms."""
    params = initialise(model, *inputs, method=method)["params"]
    base, lora = peft.split_params(params)

    def moved(path, leaf):
        drawn = getattr(path[-1], "key", None) in ("bias", "scale")
        return numbers(*leaf.shape, seed=len(path)).astype(leaf.dtype) if drawn else leaf

    base = jax.tree.map_with_path(moved, base)
    return peft.merge_params(base, randomised(lora, seed))


# --- Integer arithmetic --------------------------------------------------------------------------


def expanded(scale, shape):
    """Scales of blocks, once for each value."""
    wide = np.asarray(scale, np.float64)
    for axis, length in enumerate(shape):
        wide = np.repeat(wide, length // wide.shape[axis], axis)
    return wide


@dataclasses.dataclass(frozen=True)
class Exported:
    """What a runtime has: integers, and scales and offsets of them and of what flows."""

    integers: Any
    plain: Any
    entries: Any
    sites: Any

    def grid(self, path, shape):
        entry = self.entries[path]
        scale = np.asarray(entry["scale"]).reshape(self.sites[path].shape)
        offset = np.asarray(entry["offset"]).reshape(scale.shape)
        if not self.sites[path].spec.of_parameter:
            scale, offset = (
                leaf.reshape((1,) * (len(shape) - 1) + (-1,)) for leaf in (scale, offset)
            )
        return expanded(scale, shape), expanded(offset, shape), entry["bw"], entry["is_sym"]

    def parameter(self, path):
        found = self.integers
        for name in path.split("/"):
            found = found[name]
        if path not in self.entries:
            return np.asarray(found, np.float64)
        integers = np.asarray(found)
        assert np.issubdtype(integers.dtype, np.integer)
        scale, offset, bitwidth, symmetric = self.grid(path, integers.shape)
        code = integers.astype(np.int64) - (offset if symmetric else 0)
        assert code.min() >= 0
        assert code.max() <= 2**bitwidth - 1
        return (code + offset) * scale

    def flowing(self, path, x):
        if path not in self.entries:
            return np.asarray(x, np.float64) if np.asarray(x).dtype.kind == "f" else np.asarray(x)
        x = np.asarray(x, np.float64)
        scale, offset, bitwidth, _ = self.grid(path, x.shape or (1,))
        code = np.clip(np.rint(x / scale) - offset, 0, 2**bitwidth - 1).astype(np.int64)
        return ((code + offset) * scale).reshape(x.shape)


def exported(directory, sim, params, encodings, *inputs, method="__call__"):
    """Reads back what was written, but for shapes and for the adapters' integers."""
    integers = quantsim.integer_params(params, encodings)
    _, document = quantsim.export_base(directory, params, encodings, integers=True)
    documents = [document]
    written = load_file(directory / "base.safetensors")
    for path, array in written.items():
        own = functools.reduce(lambda tree, key: tree[key], path.split("/"), integers)
        assert np.array_equal(own, array)
    if any(encoding.of_adapter for encoding in encodings_by_path(encodings).values()):
        documents += [quantsim.export_adapter(directory, params, encodings, prefix="tuned")[1]]
    entries = {
        entry["name"]: entry
        for file in documents
        for kind in ("activation_encodings", "param_encodings")
        for entry in json.loads(file.read_text())[kind]
    }
    assert set(entries) == set(encodings_by_path(encodings))
    return Exported(integers, params, entries, quantsim.find_sites(sim, *inputs, method=method))


def by_integers(case, found, adapter):
    """What the layer gives, in float64."""
    x = found.flowing(f"{case.prefix}input", case.x)
    weight = found.parameter(case.param)
    bias = np.asarray(found.plain.get("bias", 0.0), np.float64)
    if adapter is None:
        return found.flowing(f"{case.prefix}output", case.product(x, weight) + bias)
    a, b = found.parameter("lora/a"), found.parameter("lora/b")
    scaling = found.flowing("lora/scaling", ALPHA / RANK)
    gain = 1.0
    if "use_dora" in adapter:
        letters = case.delta.split("->")[1]
        total = weight + scaling * np.einsum(case.delta, a, b)
        norm = np.sqrt(np.einsum(f"{letters},{letters}->{case.outputs}", total, total))
        gain = np.asarray(found.plain["lora"]["magnitude"], np.float64) / norm
    if case.method == "attend":  # its outputs are what comes in
        x = x * gain
        hidden = found.flowing("lora/attend_hidden", case.hidden(x, scaling * b))
        y = found.flowing("attend_output", case.product(x, weight)) + case.up(hidden, a)
        own = scaling * np.asarray(found.plain["lora"].get("bias", np.zeros(4)), np.float64)
        return y + np.sum(x * own, -1, keepdims=True)
    y = found.flowing(f"{case.prefix}output", case.product(x, weight) + bias)
    hidden = found.flowing("lora/hidden", case.hidden(x, a))
    y = gain * (y + scaling * case.up(hidden, b) - bias) + bias
    return y + scaling * np.asarray(found.plain["lora"].get("bias", 0.0), np.float64)


def checked(directory, case, adapter, config, tolerance=1e-5):
    """Calibrates, exports and compares."""
    model = model_of(case, adapter)
    params = drawn(model, case.x, method=case.method)
    sim = quantsim.simulate(model, config)

    def forward(model, params, batch):
        return model.apply({"params": params}, batch, method=case.method)

    encodings = quantsim.compute_encodings(sim, params, [case.x], forward_fn=forward)
    y = sim.apply({"params": params}, case.x, encodings=encodings, method=case.method)
    found = exported(directory, sim, params, encodings, case.x, method=case.method)
    expected = by_integers(case, found, adapter)
    assert_close(y, expected.astype(np.float32), tolerance)
    exact = model.apply({"params": params}, case.x, method=case.method)
    assert np.max(np.abs(y - exact)) > 1e-4 * np.max(np.abs(exact)), "nothing was simulated"
    return sim, params, encodings, y


FAST = {
    ("dense", "channel", "dora"),
    ("einsum, a matrix for each place", "block", "lora"),
    ("conv, groups", "tensor", "bias"),
}
CELLS = [
    pytest.param(*cell, marks=() if cell in FAST else slow)
    for cell in ((c, g, a) for c in CASES for g in GRANULARITIES for a in ADAPTERS)
]


@pytest.mark.parametrize(("name", "granularity", "adapter"), CELLS)
def test_simulated_layer_is_integer_arithmetic(tmp_path, name, granularity, adapter):
    weights = Quantizer(5, symmetric=True, **GRANULARITIES[granularity])
    own = Quantizer(6, symmetric=granularity == "tensor", **GRANULARITIES[granularity])
    config = SimulationConfig(
        weights=weights,
        adapter_weights=own,
        outputs=Quantizer(8, symmetric=granularity == "channel"),
    )
    _, _, encodings, _ = checked(tmp_path, CASES[name], ADAPTERS[adapter], config)
    flat = encodings_by_path(encodings)
    sizes = {path: np.size(flat[path].scale) for path in flat if flat[path].of_parameter}
    assert all((size == 1) == (granularity == "tensor") for size in sizes.values()), sizes


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dense", pytest.param("conv, strides", marks=slow)])
@pytest.mark.parametrize("granularity", ["channel", "block"])
def test_what_flows_may_have_scales_of_channels_and_blocks(tmp_path, name, granularity):
    fine = Quantizer(7, **GRANULARITIES[granularity])
    config = SimulationConfig(
        weights=None, inputs=fine, outputs=fine, adapter_hidden=fine, adapter_weights=Quantizer(16)
    )
    case = CASES[name]
    _, _, encodings, y = checked(tmp_path, case, {}, config)
    blocks = 2 if granularity == "block" else 1
    assert np.size(encodings["input"].scale) == case.x.shape[-1] // blocks
    assert np.size(encodings["output"].scale) == y.shape[-1] // blocks
    assert np.size(encodings["lora"]["hidden"].scale) == RANK // blocks


# --- Dtypes, storage, trees ----------------------------------------------------------------------


class Pair(nn.Module):
    """Two layers with a norm between them."""

    dtype: Any = None
    param_dtype: Any = jnp.float32
    kernel_init: Any = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x):
        kinds = {
            "dtype": self.dtype,
            "param_dtype": self.param_dtype,
            "kernel_init": self.kernel_init,
        }
        x = nn.relu(nn.Dense(32, name="one", **kinds)(x))
        x = nn.LayerNorm(name="norm", dtype=self.dtype, param_dtype=self.param_dtype)(x)
        return nn.Dense(4, name="two", **kinds)(x)


X = numbers(5, 32)


def pair(rules=(), *, target_modules=("one", "two"), x=X, **fields):
    """The simulated model, its parameters, encodings and output."""
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=target_modules)
    model = peft.get_peft_model(Pair(**fields), config)
    params = drawn(model, x)
    sim = quantsim.simulate(model, SimulationConfig(rules=rules))
    encodings = quantsim.compute_encodings(sim, params, [x])
    return sim, params, encodings, sim.apply({"params": params}, x, encodings=encodings)


quick_pair = functools.cache(pair)


def reachable(sim):
    return set(quantsim.find_sites(sim, X))


@pytest.mark.slow
@pytest.mark.usefixtures("relaxed_promotion")
@pytest.mark.parametrize("param_dtype", [jnp.bfloat16, pytest.param(jnp.float32, marks=slow)])
def test_bfloat16_stays(param_dtype):
    x = X.astype(jnp.bfloat16)
    sim, params, encodings, y = pair(dtype=jnp.bfloat16, param_dtype=param_dtype, x=x)
    exact = sim.wrapped.apply({"params": params}, x)
    assert y.dtype == exact.dtype == jnp.bfloat16
    assert_close(y.astype(jnp.float32), exact.astype(jnp.float32), 0.1)
    for leaf in jax.tree.leaves(encodings):
        assert leaf.dtype == jnp.float32

    def loss(params, encodings):
        y = sim.apply({"params": params}, x, encodings=encodings)
        return jnp.sum(jnp.square(y.astype(jnp.float32)))

    gradients = jax.jit(jax.grad(loss, (0, 1)))(params, encodings)
    for leaf, own in zip(
        jax.tree.leaves(gradients), jax.tree.leaves((params, encodings)), strict=True
    ):
        assert leaf.dtype == own.dtype
        assert np.all(np.isfinite(np.asarray(leaf, np.float32)))


def test_bfloat16_layer_is_integer_arithmetic_but_for_rounding(tmp_path):
    case = CASES["dense"]
    layer = nn.Dense(4, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    params = initialise(layer, case.x)["params"]
    config = SimulationConfig(outputs=None)
    sim = quantsim.simulate(layer, config)
    x = case.x.astype(jnp.bfloat16)
    encodings = quantsim.compute_encodings(sim, params, [x])
    y = sim.apply({"params": params}, x, encodings=encodings)
    found = exported(tmp_path, sim, params, encodings, x)
    expected = by_integers(dataclasses.replace(case, x=np.asarray(x, np.float32)), found, None)
    assert_close(y.astype(jnp.float32), expected.astype(np.float32), 0.02)


class Stored(nn.Module):
    """`Pair` whose kernels are stored in few bits."""

    method: str

    @nn.compact
    def __call__(self, x):
        def dense(features, name):
            return STORING[nn.Dense](wrapped=nn.Dense(features, name=name), method=self.method)

        x = nn.relu(dense(32, "one")(x))
        x = nn.LayerNorm(name="norm")(x)
        return dense(4, "two")(x)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["int4", pytest.param("q4_0_transpose", marks=slow)])
@pytest.mark.parametrize("adapted", [True, pytest.param(False, marks=slow)])
def test_stored_weights_keep_their_grid_and_the_rest_is_simulated(method, adapted):
    def made(model):
        if not adapted:
            return model
        config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["one", "two"])
        return peft.get_peft_model(model, config)

    plain, stored = made(Pair()), made(Stored(method))
    specs = peft.layer_specs(Pair(), X)
    base, lora = peft.split_params(drawn(plain, X))
    few = peft.quantize_checkpoint(base, method=method, specs=specs)
    wide = peft.dequantize_checkpoint(few)
    sim = quantsim.simulate(stored)
    found = quantsim.compute_encodings(sim, peft.merge_params(few, lora), [X])
    assert "kernel" not in found["one"]
    assert ("a" in found["one"].get("lora", {})) == adapted

    rules = [QuantizerRule(f"{name}/kernel", None) for name in ("one", "two")]
    twin = quantsim.simulate(plain, SimulationConfig(rules=rules))
    params = peft.merge_params(wide, lora)
    expected = quantsim.compute_encodings(twin, params, [X])
    assert_close(found, expected, 1e-5)
    y = sim.apply({"params": peft.merge_params(few, lora)}, X, encodings=found)
    assert_close(y, twin.apply({"params": params}, X, encodings=found), 1e-5)


@pytest.mark.slow
def test_method_of_quantize_checkpoint_is_simulated_to_its_values():
    weights = Quantizer(method="q4_0_transpose")
    sim = quantsim.simulate(Pair(), SimulationConfig(weights=weights, inputs=None, outputs=None))
    params = initialise(Pair(), X)["params"]
    encodings = quantsim.compute_encodings(sim, params, [X])
    specs = peft.layer_specs(Pair(), X)
    few = peft.quantize_checkpoint(params, method="q4_0_transpose", specs=specs)
    expected = Pair().apply({"params": peft.dequantize_checkpoint(few)}, X)
    found = sim.apply({"params": params}, X, encodings=encodings)
    assert_close(found, expected, rounding(X.shape[-1]))
    y = Stored("q4_0_transpose").apply(
        {"params": quantsim.integer_params(params, encodings, specs=specs)}, X
    )
    assert_close(y, expected, 1e-5)


@pytest.mark.slow
def test_frozen_dicts_are_taken():
    sim, params, encodings, y = quick_pair()
    frozen = flax.core.freeze(params)
    found = quantsim.compute_encodings(sim, frozen, [X])
    assert_close(found, encodings, rounding(X.shape[-1]))
    assert_close(sim.apply({"params": frozen}, X, encodings=encodings), y, rounding(X.shape[-1]))
    given = flax.core.freeze(encodings)
    assert_close(sim.apply({"params": params}, X, encodings=given), y, rounding(X.shape[-1]))


@pytest.mark.parametrize("what", ["input", "parameters", "encodings"])
def test_arrays_of_numpy_are_simulated_too(what):
    sim, params, encodings, y = quick_pair()
    given = {"input": X, "parameters": params, "encodings": encodings}
    given[what] = jax.tree.map(np.asarray, given[what])
    found = sim.apply({"params": given["parameters"]}, given["input"], encodings=given["encodings"])
    assert_close(found, y, rounding(X.shape[-1]))


def test_boxes_of_partitioned_parameters_are_taken(tmp_path):
    init = nn.with_partitioning(nn.initializers.lecun_normal(), ("in", "out"))
    _, params, encodings, y = pair(kernel_init=init)
    assert isinstance(params["one"]["kernel"], nn.Partitioned)
    plain, bare = quick_pair()[0], meta.unbox(params)
    expected = quantsim.compute_encodings(plain, bare, [X])
    assert_close(encodings, expected, rounding(X.shape[-1]))
    assert_close(y, plain.apply({"params": bare}, X, encodings=encodings), 1e-5)
    files = []
    for name, tree in (("boxed", params), ("bare", bare)):
        (tmp_path / name).mkdir()
        written = quantsim.export_base(tmp_path / name, tree, encodings, integers=True)
        files.append([file.read_bytes() for file in written])
    assert files[0] == files[1]


# --- Other adapters ------------------------------------------------------------------------------


def test_adapter_at_the_weight_changes_the_quantized_weight(tmp_path):
    case = CASES["dense"]
    model = peft.LoRAWeight(rank=RANK, alpha=ALPHA, wrapped=case.layer)
    params = drawn(model, case.x)
    sim = quantsim.simulate(model)
    encodings = quantsim.compute_encodings(sim, params, [case.x])
    assert set(encodings["lora"]) == {"a", "b", "scaling"}
    y = sim.apply({"params": params}, case.x, encodings=encodings)
    found = exported(tmp_path, sim, params, encodings, case.x)
    change = found.parameter("lora/a") @ found.parameter("lora/b")
    weight = found.parameter("kernel") + found.flowing("lora/scaling", ALPHA / RANK) * change
    exact = found.flowing("input", case.x) @ weight + np.asarray(params["bias"], np.float64)
    assert_close(y, found.flowing("output", exact).astype(np.float32))


class Experts(nn.Module):
    """Weights of experts that no module of their own holds."""

    @nn.compact
    def __call__(self, x):
        up = self.param("up", nn.initializers.normal(1.0), (2, 32, 6))
        return nn.Dense(4, name="out")(jnp.einsum("bi,eio->bo", x, up))


@pytest.mark.slow
def test_adapters_of_parameters_are_simulated():
    config = peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=["out"], target_parameters=["up"]
    )
    model = peft.get_peft_model(Experts(), config)
    params = drawn(model, X)
    sim = quantsim.simulate(model)
    encodings = encodings_by_path(quantsim.compute_encodings(sim, params, [X]))
    specs = peft.lora_specs(model, X)
    assert len(specs) == 2
    for path in specs:
        assert {f"{path}/a", f"{path}/b", f"{path}/scaling"} <= set(encodings), path
    y = sim.apply({"params": params}, X, encodings=nested_encodings(encodings))
    exact = model.apply({"params": params}, X)
    off = np.max(np.abs(y - exact)) / np.max(np.abs(exact))
    assert 1e-4 < off < 0.1


@pytest.mark.slow
def test_two_named_adapters_on_a_layer(tmp_path):
    case = CASES["dense"]
    model = peft.LoRADense(
        rank=4,
        alpha=2,
        adapter_name="two",
        wrapped=peft.LoRADense(rank=RANK, alpha=ALPHA, wrapped=case.layer),
    )
    params = drawn(model, case.x)
    sim = quantsim.simulate(
        model, SimulationConfig(rules=[QuantizerRule("lora.two/a", Quantizer(3, symmetric=True))])
    )
    encodings = quantsim.compute_encodings(sim, params, [case.x])
    assert set(encodings) == {"kernel", "input", "output", "lora", "lora.two"}
    assert encodings["lora.two"]["a"].bitwidth == 3
    y = sim.apply({"params": params}, case.x, encodings=encodings)
    integers = quantsim.integer_params(params, encodings)
    quantsim.export_base(tmp_path, params, encodings)
    files = [
        quantsim.export_adapter(tmp_path, params, encodings, prefix=name, adapter_name=name)[1]
        for name in ("default", "two")
    ]
    entries = [
        {
            entry["name"]: entry
            for kind in ("activation_encodings", "param_encodings")
            for entry in json.loads(file.read_text())[kind]
        }
        for file in (tmp_path / "base.encodings", *files)
    ]
    sites = quantsim.find_sites(sim, case.x)
    base = Exported(integers, params, entries[0], sites)
    x = base.flowing("input", case.x)
    weight, bias = base.parameter("kernel"), np.asarray(params["bias"], np.float64)
    total = base.flowing("output", x @ weight + bias)
    for name, own, scaling in (("lora", entries[1], 1.5), ("lora.two", entries[2], 0.5)):
        here = {f"lora/{leaf}": sites[f"{name}/{leaf}"] for leaf in ("a", "b", "hidden", "scaling")}
        found = Exported({"lora": integers[name]}, params, own, here)
        hidden = found.flowing("lora/hidden", x @ found.parameter("lora/a"))
        total += found.flowing("lora/scaling", scaling) * (hidden @ found.parameter("lora/b"))
    assert_close(y, total.astype(np.float32))


# --- Rules ---------------------------------------------------------------------------------------


def test_rules_leave_out_and_change():
    rules = (
        QuantizerRule("one/*", None),
        QuantizerRule("one/kernel", Quantizer(4, symmetric=True)),
        QuantizerRule("*/output", None),
        QuantizerRule("two/lora/a", Quantizer(16)),
    )
    sim, _, encodings, _ = pair(rules)
    flat = encodings_by_path(encodings)
    assert set(flat) == reachable(sim)
    assert set(flat) == {
        "one/kernel",
        "two/kernel",
        "two/input",
        *(f"two/lora/{leaf}" for leaf in ("a", "b", "hidden", "scaling")),
    }
    assert flat["one/kernel"].bitwidth == 4
    assert flat["two/lora/a"].bitwidth == 16
    assert flat["two/lora/b"].bitwidth == 8


@pytest.mark.slow
def test_rules_name_further_parameters_and_outputs_of_other_modules():
    rules = (
        QuantizerRule("*/bias", Quantizer(6)),
        QuantizerRule("norm/scale", Quantizer(5, symmetric=True)),
        QuantizerRule("norm/output", Quantizer(7)),
        QuantizerRule("*/norm_0/input", None),
    )
    with pytest.raises(ValueError, match=r"'\*/norm_0/input' matches nothing"):
        pair(rules)
    sim, params, encodings, y = pair(rules[:-1])
    flat = encodings_by_path(encodings)
    assert set(flat) == reachable(sim)
    assert set(flat) - set(encodings_by_path(quick_pair()[2])) == {
        "one/bias",
        "two/bias",
        "norm/bias",
        "norm/scale",
        "norm/output",
    }
    # The same, with parameters that are on their grids already and nothing else in their way.
    rounded = jax.tree.map(lambda leaf: leaf, params)
    for path in ("one/bias", "two/bias", "norm/bias", "norm/scale"):
        module, name = path.split("/")
        encoding = flat[path]
        rounded[module][name] = quantsim.fake_quantize(
            params[module][name], encoding.scale, encoding.offset, encoding.bitwidth
        )
        assert not np.array_equal(rounded[module][name], params[module][name])
    only = quantsim.simulate(
        sim.wrapped, SimulationConfig(rules=[QuantizerRule("norm/output", Quantizer(7))])
    )
    kept = {path: flat[path] for path in flat if path in reachable(only)}
    assert_close(y, only.apply({"params": rounded}, X, encodings=nested_encodings(kept)), 1e-5)


@pytest.mark.slow
def test_norms_outputs_lie_on_their_grid():
    rules = (QuantizerRule("norm/output", Quantizer(3)),)
    sim, params, encodings, _ = pair(rules)
    _, state = sim.apply(
        {"params": params}, X, encodings=encodings, capture_intermediates=True, mutable=True
    )
    (seen,) = state["intermediates"]["norm"]["__call__"]
    values = np.unique(np.asarray(seen))
    assert len(values) <= 8

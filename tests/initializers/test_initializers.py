"""How adapters start: what they hold, and that they and the base make up the model as it was."""

import dataclasses
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.core import FrozenDict, freeze, meta
from helpers import key_of, numbers, partly_slow, rounding, shapes
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import peft_jax as peft
from peft_jax import LoraSpec
from peft_jax._config import CordaConfig, EvaConfig, LoftQConfig
from peft_jax._numerics import spec_norms
from peft_jax.initializers import (
    init_lora_weights,
    replace_lora_weights_loftq,
    subtract_mutated_init,
)

RANK, ALPHA = 2, 3.0
KEY = key_of(0)
DRAWN = (True, False, "gaussian", "orthogonal")
TAKING = ("pissa", "olora", "corda")
METHODS = [method.value for method in peft.QuantizationMethod if method.value != "none"]


def stacked(axis):
    """Three Dense layers, scanned over."""

    class Body(nn.Module):
        settings: dict

        @nn.compact
        def __call__(self, x, _):
            dense = peft.LoRADense(wrapped=nn.Dense(5, name="dense"), **self.settings)
            return x + dense(x), None

    def make(**settings):
        lifted = nn.scan(
            Body, variable_axes={"params": axis}, split_rngs={"params": True}, length=3
        )
        return lifted(settings)

    return make, (numbers(2, 5), None)


def wrapped(wrapper, layer, *inputs):
    return (lambda **settings: wrapper(wrapped=layer, **settings)), inputs


LAYERS = {
    "dense": wrapped(peft.LoRADense, nn.Dense(5), numbers(3, 4)),
    "batch in a alone": wrapped(
        peft.LoRAEinsum, nn.Einsum((3, 4, 5), "...ni,nio->...no"), numbers(2, 3, 4)
    ),
    "heads out": wrapped(peft.LoRAEinsum, nn.Einsum((2, 4, 3), "bti,nih->btnh"), numbers(2, 3, 4)),
    "batch": wrapped(peft.LoRADenseGeneral, nn.DenseGeneral(5, batch_dims=(0,)), numbers(3, 2, 4)),
    "heads in": wrapped(peft.LoRADenseGeneral, nn.DenseGeneral(5, axis=(-2, -1)), numbers(2, 3, 4)),
    "conv": wrapped(peft.LoRAConv, nn.Conv(6, (3,), feature_group_count=2), numbers(2, 5, 4)),
    "embed": wrapped(peft.LoRAEmbed, nn.Embed(7, 5), jnp.asarray([[0, 6, 2]])),
    "stacked": stacked(0),
    "stacked at 1": stacked(1),
}
WITH_CORDA = {"batch", "stacked at 1"}  # it takes long to compile


@dataclasses.dataclass
class Case:
    """A model with adapters, its specs, and numbers for its base."""

    model: nn.Module
    inputs: tuple
    specs: dict
    base: dict
    lora: dict
    statistics: dict


def case_of(layer, rank=RANK, **settings):
    make, inputs = layer
    model = make(rank=rank, **{"alpha": ALPHA, **settings})
    specs = peft.lora_specs(model, *inputs)
    params = jax.eval_shape(lambda: model.init(KEY, *inputs))["params"]
    base, lora = peft.split_params(params)
    base = jax.tree.map(lambda leaf: numbers(*leaf.shape) * 0.5, base)
    return Case(model, inputs, specs, base, lora, covariances(specs, base))


def weight_of(base, path, spec):
    for part in path.split("/")[:-1]:
        base = base[part]
    return base[spec.param]


def lead_and_inputs(kernel, spec):
    """The axes in front of a layer's statistics, and the number of its inputs."""
    depth = kernel.ndim - len(spec.letters[2])
    axes = spec.stack_axes or (0,) * depth
    moved = np.moveaxis(kernel, axes[0], 0) if depth else kernel
    batch, inputs, _ = spec.matrix_axes
    own = moved.shape[depth:]
    lead = moved.shape[:depth] + tuple(own[axis] for axis in batch)
    return lead, int(np.prod([own[axis] for axis in inputs]))


def covariances(specs, base):
    """For each layer a covariance that is not a multiple of the identity."""

    def one(path, spec):
        lead, inputs = lead_and_inputs(weight_of(base, path, spec), spec)
        rows = numbers(*lead, 2 * inputs, inputs) * jnp.linspace(0.5, 2.0, inputs).reshape(
            (1,) * (len(lead) + 1) + (inputs,)
        )
        return rows.mT @ rows / (2 * inputs)

    return {path: one(path, spec) for path, spec in specs.items()}


def begun(base, specs, key=KEY, **given):
    """`init_lora_weights` as one program, which compiles faster than its parts."""
    return jax.jit(lambda base, key: init_lora_weights(base, specs, key, **given))(base, key)


def start(case, method, base=None, **given):
    if method in ("eva", "corda"):
        given = {"statistics": case.statistics, **given}
    return init_lora_weights(
        case.base if base is None else base, case.specs, KEY, method=method, **given
    )


def close(actual, expected, tolerance=1e-5):
    """Each array differs by at most ``tolerance`` of the largest number in it."""

    def check(one, other):
        one, other = np.asarray(one, np.float32), np.asarray(other, np.float32)
        np.testing.assert_allclose(one, other, rtol=0, atol=tolerance * np.abs(other).max())

    jax.tree.map(check, actual, expected)


def fused(case, started):
    return peft.fuse_params(peft.merge_params(*started), specs=case.specs)


# --- Every layer, every method -------------------------------------------------------------------


@pytest.mark.parametrize("name", partly_slow(list(LAYERS), list(LAYERS)[::2]))
def test_the_base_and_the_adapters_make_up_the_model_as_it_was(name):
    case = case_of(LAYERS[name], use_dora=True)
    methods = TAKING if name in WITH_CORDA else TAKING[:2]

    def run(base):
        started = [start(case, method, base) for method in methods]
        return started, [fused(case, pair) for pair in started]

    ((path, spec),) = case.specs.items()
    for method, (base, lora), total in zip(methods, *jax.jit(run)(case.base), strict=True):
        chex.assert_trees_all_equal_shapes_and_dtypes(lora, case.lora)
        close(total, case.base)
        moved = weight_of(base, path, spec) - weight_of(case.base, path, spec)
        assert float(jnp.max(jnp.abs(moved))) > 0.1, method


@pytest.mark.parametrize("name", ["dense", "batch in a alone", "conv", "stacked at 1"])
def test_the_adapted_model_computes_what_the_plain_one_does(name):
    case = case_of(LAYERS[name], use_dora=True)
    plain = case_of(LAYERS[name])
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), plain.lora)

    def run(base):
        expected = plain.model.apply({"params": peft.merge_params(base, zeros)}, *case.inputs)
        merged = peft.merge_params(*start(case, "pissa", base))
        return case.model.apply({"params": merged}, *case.inputs), expected

    close(*jax.jit(run)(case.base))


@pytest.mark.parametrize(
    ("rank", "settings", "also"),
    [(6, {"alpha": 3.0, "use_rslora": True}, "pissa_niter_4"), (6, {"alpha": -3.0}, "corda")],
)
def test_scalings_and_ranks_beyond_the_matrix(rank, settings, also):
    case = case_of(LAYERS["dense"], rank=rank, **settings)

    def run(base):
        started = [start(case, method, base) for method in ("pissa", "olora", also)]
        return started[0].lora, [fused(case, pair) for pair in started]

    lora, sums = jax.jit(run)(case.base)
    for total in sums:
        close(total, case.base)
    assert shapes(lora) == {"lora": {"a": (4, rank), "b": (rank, 5)}}
    scaling = case.specs["lora"].scaling
    values = np.linalg.svd(case.base["kernel"], compute_uv=False)[:rank]
    for factor in (lora["lora"]["a"].T, lora["lora"]["b"]):
        norms = np.linalg.norm(factor, axis=1)[: len(values)]
        np.testing.assert_allclose(norms, np.sqrt(values / abs(scaling)), rtol=1e-4)
        assert not np.any(factor[len(values) :])


@pytest.mark.parametrize("name", ["dense", "batch", "stacked at 1"])
def test_one_rounding_in_bfloat16(name):
    case = case_of(LAYERS[name])
    base = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), case.base)

    def run(base):
        started = [start(case, method, base) for method in TAKING[:2]]
        return started, [fused(case, pair) for pair in started]

    for (new, lora), total in zip(*jax.jit(run)(base), strict=True):
        chex.assert_trees_all_equal_dtypes(new, base)
        assert {leaf.dtype for leaf in jax.tree.leaves(lora)} == {jnp.dtype(jnp.float32)}
        close(total, base, 2.0**-7)


# --- What each method draws or takes -------------------------------------------------------------


def big(kind="dense"):
    specs = {"lora": LoraSpec("kernel", "ir,ro->io", 8, kind=kind)}
    return specs, {"kernel": numbers(256, 200)}


@pytest.mark.parametrize("kind", ["dense", "embed"])
def test_the_distributions_of_random_numbers(kind):
    specs, base = big(kind)
    drawn = {
        method: init_lora_weights(base, specs, KEY, method=method).lora["lora"] for method in DRAWN
    }
    for method, arrays in drawn.items():
        a, b = np.asarray(arrays["a"]), np.asarray(arrays["b"])
        if method == "orthogonal":
            bound = rounding(a.shape[1]) * np.max(np.abs(a) @ np.abs(b))
            np.testing.assert_allclose(a @ b, 0, atol=bound)
            assert abs(np.std(a) - 0.1 / np.sqrt(2)) < 0.01
        elif kind == "embed":
            assert abs(np.std(b) - 1) < 0.05
            assert np.std(a) == 0 if method is not False else abs(np.std(a) - 1) < 0.05
        else:
            bound = 1 / 16
            if method == "gaussian":
                assert abs(np.std(a) - 1 / 8) < 0.01
            else:
                assert 0.98 * bound < np.abs(a).max() <= bound
                assert abs(np.std(a) - bound / np.sqrt(3)) < 0.002
            if method is False:
                assert 0.98 / np.sqrt(8) < np.abs(b).max() <= 1 / np.sqrt(8)
            else:
                assert not b.any()


def test_draws_depend_on_the_key_and_the_path_alone():
    one = {"kernel": numbers(4, 5)}
    spec = LoraSpec("kernel", "ir,ro->io", 2)
    both = {"x/lora": spec, "y/lora": spec}
    first = begun({"x": one, "y": one}, both).lora
    alone = begun({"y": one}, {"y/lora": spec}).lora
    chex.assert_trees_all_equal(first["y"], alone["y"])
    assert np.any(first["x"]["lora"]["a"] != first["y"]["lora"]["a"])
    other = begun({"y": one}, {"y/lora": spec}, key_of(1)).lora
    assert np.any(other["y"]["lora"]["a"] != alone["y"]["lora"]["a"])


def test_layers_of_a_stack_and_indices_of_a_batch_draw_apart():
    specs = {"lora": LoraSpec("kernel", "...gir,...gro->...gio", 2)}
    a = begun({"kernel": numbers(3, 2, 4, 5)}, specs).lora["lora"]["a"]
    assert a.shape == (3, 2, 4, 2)
    assert len(np.unique(a)) == a.size


def test_batch_axes_do_not_count_as_inputs_where_the_spec_tells_them():
    spec = LoraSpec("kernel", "nir,ro->nio", 2, outputs="no")
    a = begun({"kernel": numbers(50, 4, 5)}, {"lora": spec}).lora["lora"]["a"]
    assert 0.45 < np.abs(a).max() <= 0.5


def test_pissa_leaves_the_small_singular_values():
    specs, base = big()
    new = begun(base, specs, method="pissa").base["kernel"]
    before, after = (np.linalg.svd(w, compute_uv=False) for w in (base["kernel"], new))
    np.testing.assert_allclose(after[:192], before[8:], rtol=1e-4)
    np.testing.assert_allclose(after[192:], 0, atol=1e-3)


def test_randomised_pissa_comes_near_with_iterations():
    specs, _ = big()
    left, right = (np.linalg.qr(numbers(n, 60, seed=n))[0] for n in (256, 200))
    kernel = jnp.asarray(left * np.exp(-np.arange(60) / 8).astype(np.float32) @ right.T)
    methods = ("pissa", "pissa_niter_0", "pissa_niter_4", "pissa_niter_16")

    def run(base):
        return [init_lora_weights(base, specs, KEY, method=method).lora for method in methods]

    exact, *near = map(fused_change, jax.jit(run)({"kernel": kernel}))
    for change, tolerance in zip(near, (0.2, 1e-3, 1e-5), strict=True):
        assert np.linalg.norm(change - exact) <= tolerance * np.linalg.norm(exact)


def fused_change(lora):
    return np.asarray(lora["lora"]["a"] @ lora["lora"]["b"])


def test_olora_gives_orthonormal_rows_of_b():
    specs, base = big()
    b = begun(base, specs, method="olora").lora["lora"]["b"]
    np.testing.assert_allclose(b @ b.T, np.eye(8), atol=1e-5)


def test_eva_takes_the_first_components():
    case = case_of(LAYERS["stacked at 1"])
    ((path, _),) = case.specs.items()
    components = {path: numbers(3, 4, 5)}
    _, lora = start(case, "eva", statistics=components, config=EvaConfig())
    found = lora["dense"]["lora"]
    for layer in range(3):
        np.testing.assert_array_equal(found["a"][:, layer], components[path][layer, :RANK].T)
    assert not np.any(found["b"])


@pytest.mark.parametrize("corda_method", ["ipm", "kpm"])
def test_corda_takes_the_first_or_the_last_directions(corda_method):
    case = case_of(LAYERS["dense"])
    config = CordaConfig(corda_method=corda_method)
    found = begun(case.base, case.specs, method="corda", config=config, statistics=case.statistics)
    change = case.specs["lora"].scaling * fused_change(found.lora)
    w, c = np.asarray(case.base["kernel"], np.float64), np.asarray(case.statistics["lora"])
    c = c + 0.01 * np.mean(np.diag(c)) * np.eye(4)
    u, s, v = np.linalg.svd(w.T @ c, full_matrices=False)
    chosen = slice(0, 2) if corda_method == "ipm" else slice(2, 4)
    expected = (u[:, chosen] * s[chosen] @ v[chosen] @ np.linalg.inv(c)).T
    np.testing.assert_allclose(change, expected, atol=1e-4)


def test_corda_damps_a_covariance_until_it_has_an_inverse():
    """What the first damping, 0.01 of the mean, makes singular, the second does not."""
    case = case_of(LAYERS["dense"])
    turn = np.linalg.qr(numbers(4, 4))[0]
    covariance = {"lora": turn @ np.diag(np.float32([1, 1, 2.01, -0.01])) @ turn.T}
    found = begun(case.base, case.specs, method="corda", statistics=covariance)
    assert np.abs(found.base["kernel"]).max() < 10
    close(fused(case, found), case.base)


# --- LoftQ ---------------------------------------------------------------------------------------


def quantizable(stack=None):
    """A layer that every method can quantize."""
    equation = "ir,ro->io" if stack is None else "...ir,...ro->...io"
    axes = () if stack is None else (stack,)
    specs = {"x/lora": LoraSpec("kernel", equation, 4, 0.5, 2.0, stack_axes=axes)}
    kernel = numbers(64, 96) if stack is None else numbers(*np.insert((64, 96), stack, 2))
    return specs, {"x": {"kernel": kernel, "bias": numbers(96)}}


def layer_specs(stack=None):
    return {
        "x/kernel": peft.LayerSpec("...i,io->...o", stack_axes=() if stack is None else (stack,))
    }


def error_of(base, lora, specs, original):
    total = peft.fuse_params(peft.merge_params(base, lora), specs=specs)
    return float(jnp.linalg.norm(jnp.ravel(total["x"]["kernel"] - original["x"]["kernel"])))


@pytest.mark.parametrize(
    ("method", "stack"),
    partly_slow(
        [*((method, None) for method in METHODS), ("int4", 1), ("nf4", 0)],
        [("q4_0", None), ("int4", 1)],
    ),
)
def test_loftq_comes_nearer_than_quantization_alone(method, stack):
    specs, original = quantizable(stack)

    def quantized(tree):
        return peft.quantize_checkpoint(tree, method=method, specs=layer_specs(stack))

    def restored(tree):
        return peft.dequantize_checkpoint(quantized(tree))

    def started(**settings):
        config = LoftQConfig(method=method, **settings)
        return init_lora_weights(original, specs, KEY, method="loftq", config=config)

    alone = jnp.linalg.norm(jnp.ravel(restored(original)["x"]["kernel"] - original["x"]["kernel"]))
    once, more = started(), started(loftq_iter=3)
    errors = [error_of(base, lora, specs, original) for base, lora in (more, once)]
    assert errors[0] < errors[1] < 0.97 * float(alone)
    close(restored(more.base), more.base, 1e-6)
    assert more.base["x"]["bias"] is original["x"]["bias"]

    stored = started(store=True)
    chex.assert_trees_all_equal(stored.base, quantized(original))  # the first turn quantizes W
    chex.assert_trees_all_equal(stored.lora, once.lora)
    chex.assert_trees_all_equal(peft.dequantize_checkpoint(stored.base), once.base)


def test_loftq_in_bfloat16_and_under_jit():
    specs, original = quantizable()
    original = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), original)

    def run(base):
        return init_lora_weights(base, specs, KEY, method="loftq")

    base, lora = run(original)
    assert base["x"]["kernel"].dtype == jnp.bfloat16
    again = peft.dequantize_checkpoint(
        peft.quantize_checkpoint(base, method="nf4"), dtype=jnp.bfloat16
    )
    close(again, base, 2.0**-7)
    jitted = jax.jit(run)(original)
    chex.assert_trees_all_equal_shapes_and_dtypes(tuple(jitted), (base, lora))
    close(fused_change(jitted.lora["x"]), fused_change(lora["x"]), 1e-3)


def test_replacing_adapters_over_a_stored_base():
    specs, original = quantizable(1)
    config = LoftQConfig(method="int4", store=True)
    stored, expected = init_lora_weights(original, specs, KEY, method="loftq", config=config)
    zeros = jax.tree.map(lambda leaf: jnp.zeros_like(leaf, jnp.float16), expected)
    params = peft.merge_params(stored, zeros)
    asked = []

    def callback(candidate, path):
        asked.append((path, bool(jnp.any(candidate["x"]["lora"]["a"]))))
        return path != "x/lora"

    kept = replace_lora_weights_loftq(params, original, specs=specs, callback=callback)
    chex.assert_trees_all_equal(kept, params)
    assert asked == [("x/lora", True)]
    found = replace_lora_weights_loftq(params, original, specs=specs, progress=True)
    assert found["x"]["kernel"] is params["x"]["kernel"]
    chex.assert_trees_all_equal_shapes_and_dtypes(found, params)
    close(peft.split_params(found).lora, expected, 1e-2)
    spec = specs["x/lora"]
    dora = {"x/lora": dataclasses.replace(spec, variant="dora")}
    params["x"]["lora"]["magnitude"] = numbers(96, 2)
    found = replace_lora_weights_loftq(params, original, specs=dora)
    assert found["x"]["lora"]["magnitude"] is params["x"]["lora"]["magnitude"]


# --- The way back to plain LoRA ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "use_dora"), [*((name, True) for name in LAYERS), ("dense", False)]
)
def test_trained_adapters_become_plain_ones(name, use_dora):
    case = case_of(LAYERS[name], use_dora=use_dora, use_rslora=use_dora)

    def run(original):
        base, initial = start(case, "pissa", original)
        trained = jax.tree.map(lambda leaf: leaf * 1.25 + 0.125, initial)
        before = peft.fuse_params(peft.merge_params(base, trained), specs=case.specs)
        plain, specs = subtract_mutated_init(initial, trained, case.specs)
        kept.append(specs)
        return before, peft.fuse_params(peft.merge_params(original, plain), specs=specs)

    kept = []
    close(*jax.jit(run)(case.base))
    for path, spec in kept[0].items():
        assert spec.rank == 2 * RANK
        assert spec.scaling == case.specs[path].scaling
        root = spec.rank**0.5 if use_dora else spec.rank
        np.testing.assert_allclose(spec.alpha / root, spec.scaling, rtol=1e-6)


def test_biases_are_those_of_the_trained_adapter():
    case = case_of(LAYERS["dense"], lora_bias=True, alpha=None)
    _, initial = start(case, "pissa")
    assert not initial["lora"]["bias"].any()
    trained = jax.tree.map(lambda leaf: leaf + 1, initial)
    plain, specs = subtract_mutated_init(initial, trained, case.specs)
    assert plain["lora"]["bias"] is trained["lora"]["bias"]
    assert specs["lora"].alpha is None


TOKENS = LoraSpec("embedding", "vr,rf->vf", 2, variant="tokens", tokens=(5, 1))
TABLE = LoraSpec("embedding", "vr,rf->vf", 2)


def test_rows_of_trained_tokens_are_those_of_the_base():
    base = {"embedding": nn.Partitioned(numbers(7, 6), ("vocab", "out"))}
    specs = {"lora_tokens": TOKENS, "lora": TABLE}
    new, lora = init_lora_weights(base, specs, KEY, method="pissa")
    rows = lora["lora_tokens"]["rows"]
    np.testing.assert_array_equal(rows.value, new["embedding"].value[jnp.asarray([5, 1])])
    assert rows.names == (None, "out")
    total = peft.fuse_params(meta.unbox(peft.merge_params(new, lora)), specs=specs)
    close(total, meta.unbox(base))
    with pytest.raises(ValueError, match=r"\['lora'\] adapt a table of which single rows"):
        subtract_mutated_init(lora, lora, specs)
    alone = {"lora_tokens": lora["lora_tokens"]}
    plain, kept = subtract_mutated_init(alone, alone, {"lora_tokens": TOKENS})
    assert plain["lora_tokens"]["rows"] is rows
    assert kept == {"lora_tokens": TOKENS}


# --- Trees, places and programs ------------------------------------------------------------------


def test_only_adapted_weights_are_new():
    layer = lambda: {"kernel": numbers(4, 5), "bias": numbers(5)}  # noqa: E731
    base = freeze({"x": [layer(), layer()], "y": {"scale": numbers(3)}})
    specs = {"x/1/lora": LoraSpec("kernel", "ir,ro->io", 2)}
    new, lora = init_lora_weights(base, specs, KEY, method="pissa", progress=True)
    assert isinstance(new, FrozenDict)
    assert isinstance(lora, FrozenDict)
    assert new["x"][1]["kernel"] is not base["x"][1]["kernel"]
    assert new["x"][0]["kernel"] is base["x"][0]["kernel"]
    assert new["x"][1]["bias"] is base["x"][1]["bias"]
    assert new["y"]["scale"] is base["y"]["scale"]
    assert shapes(lora) == freeze({"x": [{}, {"lora": {"a": (4, 2), "b": (2, 5)}}]})
    chex.assert_trees_all_equal(peft.split_params(peft.merge_params(new, lora)).original, new)


BOXES = {
    "ir,ro->io": ((), (4, 8), ("in", "out"), ("in", None), (None, "out"), ("out",)),
    "...ir,...ro->...io": (
        (1,),
        (4, 3, 8),
        ("in", "layers", "out"),
        ("in", "layers", None),
        (None, "layers", "out"),
        ("out", "layers"),
    ),
    "nir,nro->nio": (
        (),
        (3, 4, 8),
        ("heads", "in", "out"),
        ("heads", "in", None),
        ("heads", None, "out"),
        ("heads", "out"),
    ),
}


@pytest.mark.parametrize("method", [True, "pissa"])
@pytest.mark.parametrize("equation", BOXES)
def test_boxes_carry_over(equation, method):
    stack, shape, names, of_a, of_b, of_outputs = BOXES[equation]
    outputs = "no" if equation.startswith("n") else "o"
    spec = LoraSpec(
        "kernel", equation, 2, variant="dora", outputs=outputs, bias="bias", stack_axes=stack
    )
    base = {"kernel": nn.Partitioned(numbers(*shape), names), "bias": numbers(8)}
    new, lora = begun(base, {"lora": spec}, method=method)
    assert new["kernel"].names == names
    assert lora["lora"]["a"].names == of_a
    assert lora["lora"]["b"].names == of_b
    assert lora["lora"]["magnitude"].names == of_outputs
    assert lora["lora"]["bias"].names == of_outputs
    if stack:
        assert lora["lora"]["magnitude"].value.shape == (8, 3)


AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit


@pytest.mark.parametrize(
    ("method", "kind"),
    [
        (True, EXPLICIT),
        ("pissa", AUTO),
        ("pissa", EXPLICIT),
        ("pissa_niter_2", EXPLICIT),
        ("loftq", EXPLICIT),
        ("stored", AUTO),
        ("stored", EXPLICIT),
    ],
)
def test_weights_spread_over_devices(method, kind):
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind, kind))
    at = lambda *axes: NamedSharding(mesh, PartitionSpec(*axes))  # noqa: E731
    plain = {"kernel": numbers(64, 32), "bias": numbers(32)}
    base = {"kernel": jax.device_put(plain["kernel"], at("x", "y")), "bias": plain["bias"]}
    specs = {"lora": LoraSpec("kernel", "ir,ro->io", 4, variant="dora")}
    given = {"statistics": {"lora": jnp.eye(64)}} if method == "corda" else {}
    given |= {"config": LoftQConfig(method="int4", store=True)} if method == "stored" else {}
    name = "loftq" if method == "stored" else method
    new, lora = init_lora_weights(base, specs, KEY, method=name, **given)
    kernel = new["kernel"].array if method == "stored" else new["kernel"]
    assert kernel.sharding.mesh == mesh
    assert kernel.sharding.spec == PartitionSpec("x", "y")
    assert lora["lora"]["a"].sharding == at("x", None)
    assert lora["lora"]["b"].sharding == at(None, "y")
    assert lora["lora"]["magnitude"].sharding == at("y")
    if method not in ("loftq", "stored"):
        total = np.asarray(new["kernel"]) + fused_change(jax.device_get(lora))
        close(total, plain["kernel"])
    if method == "pissa":
        alone = init_lora_weights(plain, specs, KEY, method=name, **given)
        close(np.asarray(new["kernel"]), alone.base["kernel"])


@pytest.mark.parametrize("name", LAYERS)
def test_shapes_are_found_without_numbers(name):
    case = case_of(LAYERS[name], use_dora=name != "dense", lora_bias=name == "dense")
    for method in (True, False, "eva", *TAKING, "pissa_niter_4"):
        found = jax.eval_shape(lambda base, method=method: start(case, method, base), case.base)
        chex.assert_trees_all_equal_shapes_and_dtypes(found.lora, case.lora)
        chex.assert_trees_all_equal_shapes_and_dtypes(found.base, case.base)


@pytest.mark.parametrize("method", [True, False, "gaussian", "orthogonal", "eva"])
def test_bases_that_are_stored_in_few_bits(method):
    spec = LoraSpec("kernel", "ir,ro->io", 2, variant="dora")
    plain = {"kernel": numbers(8, 6), "bias": numbers(6)}
    base = peft.quantize_checkpoint(plain, method="int4")
    given = {"statistics": {"lora": numbers(3, 8)}} if method == "eva" else {}
    new, lora = init_lora_weights(base, {"lora": spec}, KEY, method=method, **given)
    assert new["kernel"] is base["kernel"]
    assert shapes(lora["lora"]) == {"a": (8, 2), "b": (2, 6), "magnitude": (6,)}
    weight = peft.dequantize_checkpoint(base)["kernel"]
    close(lora["lora"]["magnitude"], spec_norms(weight, spec))


def test_two_adapters_of_one_weight():
    specs = {name: LoraSpec("kernel", "ir,ro->io", 2, 0.5) for name in ("lora", "lora.french")}
    base = {"kernel": numbers(6, 5)}
    _, lora = init_lora_weights(base, specs, KEY)
    assert set(lora) == set(specs)
    one, first = init_lora_weights(base, {"lora": specs["lora"]}, KEY, method="pissa")
    two, second = init_lora_weights(one, {"lora.french": specs["lora.french"]}, KEY, method="pissa")
    close(peft.fuse_params({**two, **first, **second}, specs=specs), base)


# --- What is refused -----------------------------------------------------------------------------

SPEC = LoraSpec("kernel", "ir,ro->io", 3)
SPECS = {"x/lora": SPEC}
BASE = {"x": {"kernel": numbers(6, 4)}}
STORED = peft.quantize_checkpoint(BASE, method="int4")
LORA = {"a": jnp.zeros((6, 3)), "b": jnp.zeros((3, 4))}
BAD = jnp.full((6, 4), jnp.nan)


def altered(**fields):
    return {"x/lora": dataclasses.replace(SPEC, **fields)}


REFUSED = {
    "an unknown method": (
        {"method": "pisa"},
        "init_lora_weights: method='pisa' is none of True, False and ['gaussian', 'orthogonal', "
        "'pissa', 'pissa_niter_N', 'olora', 'loftq', 'eva', 'corda'] (N is a number). Close names: "
        "['pissa'",
    ),
    "a number of nothing": ({"method": "olora_niter_3"}, "method='olora_niter_3' is none of"),
    "no number": ({"method": "pissa_niter_N"}, "method='pissa_niter_N' is none of"),
    "a method that is one": ({"method": 1}, "method=1 is none of"),
    "none": ({"method": None}, "method=None is none of"),
    "a config for nothing": (
        {"config": EvaConfig()},
        "method=True takes no config, got EvaConfig. Pass config=None.",
    ),
    "another's config": (
        {"method": "loftq", "config": CordaConfig()},
        "method='loftq' takes a LoftQConfig, got CordaConfig. Pass config=LoftQConfig.",
    ),
    "no statistics": (
        {"method": "eva"},
        "method='eva' needs `statistics`, a dict from the path of each adapter to its components: "
        "`peft.get_eva_state_dict` finds them; got None.",
    ),
    "no covariances": ({"method": "corda"}, "`peft.collect_covariances` finds them; got None."),
    "statistics for nothing": (
        {"statistics": {}},
        "method=True asks nothing of the inputs. Leave `statistics` out.",
    ),
    "statistics of another layer": (
        {"method": "eva", "statistics": {"y/lora": numbers(3, 6)}},
        "Without statistics: ['x/lora']; without a spec: ['y/lora'].",
    ),
    "too few components": (
        {"method": "eva", "statistics": {"x/lora": numbers(2, 6)}},
        "the statistics of 'x/lora' have shape (2, 6); the layer needs (3, 6)",
    ),
    "components of another width": (
        {"method": "eva", "statistics": {"x/lora": numbers(3, 4)}},
        "have shape (3, 4); the layer needs (3, 6)",
    ),
    "a covariance of the outputs": (
        {"method": "corda", "statistics": {"x/lora": numbers(4, 4)}},
        "have shape (4, 4); the layer needs (6, 6)",
    ),
    "a covariance of zeros": (
        {"method": "corda", "statistics": {"x/lora": jnp.zeros((6, 6))}},
        "method='corda' makes NaN or infinity of the weight 'x/kernel' for 'x/lora'. Mend",
    ),
    "NaN": ({"base": {"x": {"kernel": BAD}}, "method": "pissa"}, "NaN or infinity of the weight"),
    "an odd rank": ({"method": "orthogonal"}, "'x/lora' has rank 3. Choose another."),
    "a scaling of zero": (
        {"method": "pissa", "specs": altered(scaling=0.0, alpha=0.0)},
        "The scaling of 'x/lora' is 0",
    ),
    "no quantization": (
        {"method": "loftq", "config": LoftQConfig(method="none")},
        "LoftQConfig.method = 'none' is none",
    ),
    "blocks that do not divide": (
        {"method": "loftq"},
        "LoftQ cannot quantize 'x/kernel': NF4 has blocks of 64",
    ),
    "no tree": ({"base": numbers(6, 4)}, "the base is a tree of parameters, got ArrayImpl"),
    "adapters in the base": (
        {"base": {"x": BASE["x"] | {"lora": LORA}}},
        "the base holds adapters already (['x/lora']). Take them off by `split_params`.",
    ),
    "no specs": ({"specs": {}}, "the specs are empty"),
    "specs as plain data": ({"specs": {"x/lora": SPEC.to_dict()}}, "path of each adapter to its"),
    "a spec alone": ({"specs": SPEC}, "path of each adapter to its"),
    "an adapter that stands alone": (
        {"specs": altered(param=None)},
        "the adapter at 'x/lora' stands alone",
    ),
    "no such weight": (
        {"specs": altered(param="kernels")},
        "the spec of 'x/lora' speaks of 'x/kernels', which the base lacks. Close names: "
        "['x/kernel'].",
    ),
    "a whole collection": (
        {"base": {"params": BASE}},
        "which the base lacks. Pass variables['params'], without the name of the collection.",
    ),
    "rows that are not there": (
        {"specs": {"x/lora_tokens": dataclasses.replace(TOKENS, param="kernel", tokens=(6, 0))}},
        "the spec of 'x/lora_tokens' trains the rows [6], and the table has rows 0 to 5",
    ),
    "no path of an adapter": (
        {"specs": {"x/adapter": SPEC}},
        "'x/adapter' is no path of an adapter ('x/lora' is one)",
    ),
    "another layout": (
        {"specs": altered(equation="nir,ro->nio")},
        "'x/lora': A kernel of shape (6, 4) does not fit the equation 'nir,ro->nio'",
    ),
    "a stack that is not there": (
        {"specs": altered(equation="...ir,...ro->...io", stack_axes=(0,))},
        "'x/lora': A kernel of shape (6, 4) does not fit",
    ),
    "shapes without numbers": (
        {"base": {"x": {"kernel": jax.ShapeDtypeStruct((6, 4), "float32")}}},
        "'x/kernel' is ShapeDtypeStruct, no array. For shapes alone, call it inside",
    ),
    "integers": (
        {"base": {"x": {"kernel": jnp.ones((6, 4), jnp.int8)}}},
        "'x/kernel' is int8[6, 4]",
    ),
    "a seed for a key": ({"key": 0}, "key is one key from `jax.random.key(seed)`, got 0."),
    "several keys": ({"key": jax.random.split(KEY)}, "key is one key from"),
    "a stored weight": (
        {"base": STORED, "method": "pissa"},
        "method='pissa' changes the weight 'x/kernel', which is stored in few bits. Start the "
        "adapters from the floating-point weights, then store the base by "
        "`peft.quantize_checkpoint`.",
    ),
    "a stored weight, LoftQ": ({"base": STORED, "method": "loftq"}, "is stored in few bits"),
    "a stored weight without its scale": (
        {"base": {"x": {"kernel": STORED["x"]["kernel"]}}},
        "'x/kernel' holds stored values without their scale",
    ),
    "two that take": (
        {"specs": SPECS | {"x/lora.b": SPEC}, "method": "pissa"},
        "the adapters ['x/lora', 'x/lora.b'] share 'x/kernel'",
    ),
}


@pytest.mark.parametrize(("given", "message"), REFUSED.values(), ids=REFUSED)
def test_bad_input_is_refused(given, message):
    given = {"base": BASE, "specs": SPECS, "key": KEY, **given}
    with pytest.raises(ValueError, match=re.escape(message)):
        init_lora_weights(given.pop("base"), given.pop("specs"), given.pop("key"), **given)


MERGED = peft.merge_params(STORED, {"x": {"lora": LORA}})
NOT_REPLACED = {
    "float weights": (peft.merge_params(BASE, {"x": {"lora": LORA}}), BASE, "not stored in few"),
    "stored originals": (MERGED, STORED, "stored in few bits in original too"),
    "another shape": (MERGED, {"x": {"kernel": numbers(4, 6)}}, "shape (4, 6) in original"),
    "no originals": (MERGED, {"y": BASE["x"]}, "'x/kernel', which original lacks"),
    "no adapters": (STORED, BASE, "specs without an adapter: ['x/lora']"),
}


@pytest.mark.parametrize(("params", "original", "message"), NOT_REPLACED.values(), ids=NOT_REPLACED)
def test_what_is_not_replaced(params, original, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        replace_lora_weights_loftq(params, original, specs=SPECS)


TREE = {"x": {"lora": LORA}}
NOT_SUBTRACTED = {
    "merged trees": (TREE, peft.merge_params(BASE, TREE), "trained holds 1 arrays beside"),
    "another rank": (
        {"x": {"lora": {"a": jnp.zeros((6, 2)), "b": jnp.zeros((2, 4))}}},
        TREE,
        "a of 'x/lora' has shape (6, 2) in initial and (6, 3) in trained",
    ),
    "other adapters": ({"y": TREE["x"]}, TREE, "Adapters without a spec: ['y/lora']"),
}


@pytest.mark.parametrize(
    ("initial", "trained", "message"), NOT_SUBTRACTED.values(), ids=NOT_SUBTRACTED
)
def test_what_is_not_subtracted(initial, trained, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        subtract_mutated_init(initial, trained, SPECS)


def test_stored_boxes_stay():
    specs, original = quantizable()
    original["x"]["kernel"] = nn.Partitioned(original["x"]["kernel"], ("in", "out"))
    config = LoftQConfig(store=True)
    base, lora = init_lora_weights(original, specs, KEY, method="loftq", config=config)
    expected = peft.quantize_checkpoint(original, method="nf4")
    chex.assert_trees_all_equal(base, expected)
    assert lora["x"]["lora"]["a"].names == ("in", None)
    found = replace_lora_weights_loftq(peft.merge_params(base, lora), original, specs=specs)
    assert found["x"]["lora"]["a"].names == ("in", None)
    close(meta.unbox(peft.split_params(found).lora), meta.unbox(lora), 1e-3)

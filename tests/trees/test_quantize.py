"""`quantize_checkpoint` and its inverse: any tree, any stack, any mesh, and four bits are four."""

import collections
import functools
import gc
import operator
import os
import re

import chex
import flax
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import linen as nn
from flax.core import FrozenDict, freeze, meta
from helpers import assert_close, key_of, numbers, partly_slow
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file, save_file

import peft_jax as peft
from peft_jax import LayerSpec, QuantizationMethod, StoredValues
from peft_jax._numerics import blocks_of, encode, packed_axis

METHODS = [method for method in QuantizationMethod if method != "none"]
DENSE = LayerSpec("...i,io->...o", "dense")
I, O = 64, 32  # noqa: E741  (the shape of one layer's kernel, fit for the blocks of every method)


def dense(seed=0, **extra):
    return {"kernel": numbers(I, O, seed=seed), "bias": numbers(O, seed=seed), **extra}


def adapter():
    return {"a": numbers(I, 2), "b": numbers(2, O)}


@jax.jit
def codes(stored, scale):
    """The numbers that the stored bits stand for, before scaling."""
    return peft.dequantize(stored, jnp.ones_like(scale))


def assert_stored_alike(actual, expected):
    """The same values and scales, however they are packed. Pairs of stored values and scale."""
    np.testing.assert_array_equal(codes(*actual), codes(*expected))
    np.testing.assert_array_equal(*(np.asarray(scale) for _, scale in (actual, expected)))
    assert actual[1].dtype == expected[1].dtype
    assert actual[0].method == expected[0].method


@functools.cache
def references():
    """By method and seed, what the functions on arrays make of the kernels of `dense`."""

    @jax.jit
    def run(kernels):
        return {
            (method.value, seed): (
                peft.quantize(kernel, method),
                peft.simulate_quantize(kernel, method),
            )
            for method in METHODS
            for seed, kernel in enumerate(kernels)
        }

    return run([numbers(I, O, seed=seed) for seed in (0, 1)])


def quantized(method, seed=0):
    """The stored kernel of `dense` and its scale."""
    return references()[str(method), seed][0]


def simulated(method, seed=0):
    """The kernel of `dense` as quantization leaves it."""
    return references()[str(method), seed][1]


# --- Trees ---------------------------------------------------------------------------------------

Pair = collections.namedtuple("Pair", ["left", "right"])
TREES = {
    "dict": {"x": dense(), "y": {"z": dense(1)}},
    "root": dense(),
    "FrozenDict": freeze({"x": dense(), "y": {"z": dense(1)}}),
    "FrozenDict inside": {"x": [freeze(dense())]},
    "ordered": collections.OrderedDict(b=dense(), a=dense(1)),
    "list": {"layers": [dense(), dense(1)]},
    "tuple at the root": (dense(), (dense(1), {})),
    "namedtuple": {"pair": Pair(dense(), [dense(1)])},
    "numbers as keys": {0: dense(), 1: dense(1)},
    "adapters": {"x": dense(lora=adapter()), "LoRADenseAdapter_0": adapter()},
    "other leaves": {
        "x": dense(step=3, none=None, ids=np.arange(4)),
        "norm": {"scale": numbers(I)},
    },
    "other kernels": {"x": dense(), "y": {"kernel": numbers(I), "embedding": numbers(I, O)}},
    "own scale": {"x": dense(scale=numbers(O))},
    "numpy": {"x": jax.tree.map(np.asarray, dense())},
}


def seed_of(kernel):
    """Which of the two kernels of `dense` it is."""
    return int(not np.array_equal(kernel, numbers(I, O)))


def pairs_in(tree, path=()):
    """Paths of stored values, with them and the scale that lies beside them."""
    if isinstance(tree, list | tuple):
        tree = dict(enumerate(tree))
    if not isinstance(tree, dict | FrozenDict):
        return {}
    found = {}
    for name, value in tree.items():
        if isinstance(meta.unbox(value), StoredValues):
            scale = tree.get(f"scale_{name}", tree.get("scale"))
            found[(*path, name)] = meta.unbox(value), meta.unbox(scale)
        else:
            found |= pairs_in(value, (*path, name))
    return found


def assert_passed_on(after, before):
    """The same containers around the same objects, but for stored values and their scales."""
    if isinstance(after, StoredValues):
        assert after.shape == before.shape
        return
    assert type(after) is type(before)
    if isinstance(before, dict | FrozenDict):
        stored = [name for name in after if isinstance(after[name], StoredValues)]
        assert list(after)[: len(before)] == list(before)
        assert len(after) == len(before) + len(stored)
        for name in before:
            assert_passed_on(after[name], before[name])
    elif isinstance(before, list | tuple):
        for pair in zip(after, before, strict=True):
            assert_passed_on(*pair)
    else:
        assert after is before


@pytest.mark.parametrize("name", TREES)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_on_every_tree(method, name):
    tree = TREES[name]
    before, structure = jax.tree.leaves(tree), jax.tree.structure(tree)
    small = peft.quantize_checkpoint(tree, method=method)
    assert_passed_on(small, tree)
    found = pairs_in(small)
    assert found
    seeds = {path: seed_of(at(tree, path)) for path in found}
    for path, pair in found.items():
        assert_stored_alike(pair, quantized(method, seeds[path]))
    back = peft.dequantize_checkpoint(small)
    assert jax.tree.structure(back) == structure == jax.tree.structure(tree)
    for one, other in zip(jax.tree.leaves(tree), before, strict=True):
        assert one is other
    kernels = {path: at(back, path) for path in found}
    for path, kernel in kernels.items():
        np.testing.assert_array_equal(kernel, simulated(method, seeds[path]))
    rest = [leaf for leaf in jax.tree.leaves(back) if not any(leaf is k for k in kernels.values())]
    assert all(any(leaf is other for other in before) for leaf in rest)


def at(tree, path):
    return functools.reduce(operator.getitem, path, tree)


@pytest.mark.parametrize("box", [nn.Partitioned, nn.LogicallyPartitioned])
@pytest.mark.parametrize("method", METHODS)
def test_boxes_stay(method, box):
    tree = {"x": {"kernel": box(numbers(I, O), ("in", "out")), "bias": box(numbers(O), ("out",))}}
    small = peft.quantize_checkpoint(tree, method=method)["x"]
    assert small["bias"] is tree["x"]["bias"]
    assert type(small["kernel"]) is type(small["scale"]) is box
    assert small["kernel"].names == ("in", "out")
    # Blocks need not divide by the devices of a mesh, so their axes are not spread.
    shape = small["scale"].value.shape
    expected = tuple(
        name if m == n else None for name, m, n in zip(("in", "out"), shape, (I, O), strict=True)
    )
    assert small["scale"].names == expected
    assert_stored_alike(pairs_in({"x": small})["x", "kernel"], quantized(method))


@pytest.mark.parametrize("box", [nn.Partitioned, nn.LogicallyPartitioned])
def test_boxes_stay_on_the_way_back(box):
    tree = {"x": {"kernel": box(numbers(I, O), ("in", "out")), "bias": box(numbers(O), ("out",))}}
    back = peft.dequantize_checkpoint(peft.quantize_checkpoint(tree, method="int8"))
    assert jax.tree.structure(back) == jax.tree.structure(tree)
    kernel = back["x"]["kernel"]
    assert (type(kernel), kernel.names) == (box, ("in", "out"))
    np.testing.assert_array_equal(kernel.value, simulated("int8"))


def test_a_scale_in_a_box_fits_the_mesh():
    """One scale for 32 of 64 columns: the two of them are not spread over four devices."""
    mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,))
    with jax.set_mesh(mesh):
        tree = {"kernel": nn.Partitioned(numbers(64, 64), (None, "x"))}
        meta.unbox(peft.quantize_checkpoint(tree, method="q4_0"))


def test_the_result_is_a_tree_of_arrays():
    small = peft.quantize_checkpoint({"x": dense()}, method="int4")
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(small))
    names = {jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(small)}
    assert names == {"['x']['kernel']['int4_axis-2_len64']", "['x']['bias']", "['x']['scale']"}


def test_dtypes_on_the_way_back():
    small = peft.quantize_checkpoint({"x": dense()}, method="nf4")
    exact = peft.dequantize_checkpoint(small)["x"]["kernel"]
    for dtype in (jnp.bfloat16, "float16"):
        rounded = peft.dequantize_checkpoint(small, dtype=dtype)["x"]["kernel"]
        np.testing.assert_array_equal(rounded, exact.astype(dtype))


def test_bfloat16_weights():
    """Computed in float32, as the same numbers in float32 are; simulation rounds to bfloat16."""

    @jax.jit
    def run(kernel):
        return {
            method.value: (
                [peft.quantize_checkpoint({"kernel": x}, method=method) for x in kernels(kernel)],
                peft.simulate_quantize(kernel, method),
            )
            for method in METHODS
        }

    def kernels(kernel):
        return kernel, kernel.astype(jnp.float32)

    for small, expected in run(numbers(I, O).astype(jnp.bfloat16)).values():
        chex.assert_trees_all_equal(*small)
        back = peft.dequantize_checkpoint(small[0], dtype=jnp.bfloat16)["kernel"]
        assert back.dtype == expected.dtype == jnp.bfloat16
        np.testing.assert_array_equal(back, expected)


@pytest.mark.parametrize("method", METHODS)
def test_storing_again_changes_nothing(method):
    """What the way back gives is stored without a further error, but for that of the scale."""
    back = peft.dequantize_checkpoint(peft.quantize_checkpoint({"x": dense()}, method=method))
    again = peft.dequantize_checkpoint(peft.quantize_checkpoint(back, method=method))
    np.testing.assert_allclose(again["x"]["kernel"], back["x"]["kernel"], rtol=1e-3, atol=1e-6)


def test_none_returns_the_tree():
    tree = {"x": dense()}
    assert peft.quantize_checkpoint(tree, method="none") is tree
    assert peft.dequantize_checkpoint({}) == {}


@pytest.mark.parametrize("method", ["int4", "INT4", QuantizationMethod.INT4])
def test_methods_by_name(method):
    small = peft.quantize_checkpoint({"x": dense()}, method=method)
    assert small["x"]["kernel"].method == "int4"
    with pytest.raises(ValueError, match="'int5' is no quantization method"):
        peft.quantize_checkpoint({"x": dense()}, method="int5")


# --- Stacks --------------------------------------------------------------------------------------


class Step(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x, nn.Einsum((2, I, O), "bi,nio->bno", use_bias=False, name="layer")(x)


def stack(axes):
    block = Step
    for length, axis in axes:
        block = nn.scan(
            block,
            variable_axes={"params": axis},
            split_rngs={"params": True},
            length=length,
        )
    return block(name="blocks")


def stacked_kernels(axes, first=0):
    """Kernels of the layers of `stack`; each holds the two of `dense`, odd ones in reverse."""
    if not axes:
        return np.stack([numbers(I, O, seed=(first + n) % 2) for n in range(2)])
    *inner, (length, axis) = axes
    return np.stack([stacked_kernels(inner, first + i) for i in range(length)], axis)


STACKS = {
    # lengths and axes, innermost first: how to take one layer, and which
    "axis 0": (((3, 0),), lambda i, leaf: leaf[i[0]], [(0,), (2,)]),
    "axis 1": (((3, 1),), lambda i, leaf: leaf[:, i[0]], [(0,), (2,)]),
    "last axis": (((3, -1),), lambda i, leaf: leaf[..., i[0]], [(0,), (2,)]),
    "axis 0 of axis 1": (((3, 1), (2, 0)), lambda i, leaf: leaf[i[0]][:, i[1]], [(0, 2), (1, 1)]),
    "last axis of last": (((3, -1), (2, -1)), lambda i, leaf: leaf[..., i[0]][..., i[1]], [(0, 2)]),
}
X = numbers(2, I)


@pytest.mark.parametrize("name", partly_slow(list(STACKS), ("axis 1", "last axis of last")))
def test_stacked_layers_are_stored_as_each_layer_is(name):
    """The values of each layer are its own, and a slice along the stack keeps its meaning."""
    axes, take, indices = STACKS[name]
    specs = peft.layer_specs(stack(axes), X, None)
    params = {"layer": {"kernel": stacked_kernels(axes)}}
    shapes = jax.eval_shape(stack(axes).init, key_of(0), X, None)["params"]
    chex.assert_trees_all_equal_shapes(params, shapes)

    @jax.jit
    def run(params):
        small = {m: peft.quantize_checkpoint(params, method=m, specs=specs) for m in METHODS}
        return small, {m: peft.dequantize_checkpoint(small[m])["layer"] for m in METHODS}

    small, whole = jax.tree.map(np.asarray, run(params))
    for index in indices:
        cut = functools.partial(take, index)
        for method, layer in of_one_layer(jax.tree.map(cut, small)).items():
            decoded, scale, kernel = layer
            np.testing.assert_array_equal(kernel, cut(whole[method]["kernel"]))
            for n in (0, 1):
                seed = (sum(index) + n) % 2
                values, expected = quantized(method, seed)
                np.testing.assert_array_equal(scale[n], expected)
                np.testing.assert_array_equal(decoded[n], codes(values, expected))
                np.testing.assert_array_equal(kernel[n], simulated(method, seed))


@jax.jit
def of_one_layer(small):
    """Codes, scale and kernel, by method."""
    return {
        method: (
            peft.dequantize(tree["layer"]["kernel"], jnp.ones_like(tree["layer"]["scale"])),
            tree["layer"]["scale"],
            peft.dequantize_checkpoint(tree)["layer"]["kernel"],
        )
        for method, tree in small.items()
    }


@pytest.mark.parametrize("method", ["int4", "q4_0_transpose"])
def test_stacked_layers_outside_of_jit(method):
    spec = LayerSpec("...i,io->...o", stack_axes=(-1,))
    kernel = jnp.stack([numbers(I, O, seed=seed) for seed in (0, 1)], axis=-1)
    small = peft.quantize_checkpoint({"kernel": kernel}, method=method, specs={"kernel": spec})
    back = peft.dequantize_checkpoint(small)["kernel"]
    for i in (0, 1):
        one = jax.tree.map(lambda leaf: np.asarray(leaf)[..., i], small)  # noqa: B023
        assert_stored_alike((one["kernel"], one["scale"]), quantized(method, i))
        np.testing.assert_array_equal(back[..., i], simulated(method, i))


@pytest.mark.parametrize(("shape", "axes"), [((3, 5, 7), (0,)), ((5, 7, 3), (-1,))])
def test_odd_lengths(shape, axes):
    spec = LayerSpec("...i,io->...o", stack_axes=axes)
    kernel = numbers(*shape)
    tree = {"kernel": kernel}
    inputs = {(0,): 1, (-1,): 0}[axes]

    @jax.jit
    def run(tree):
        small = peft.quantize_checkpoint(tree, method="int4", specs={"kernel": spec})
        assert small["kernel"].shape == kernel.shape
        return peft.dequantize_checkpoint(small)["kernel"]

    expected = jax.jit(lambda x: peft.simulate_quantize(x, "int4", inputs))(kernel)
    np.testing.assert_array_equal(run(tree), expected)


class DenseStep(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.Dense(I)(x), None


def test_what_init_stores_along_another_axis_is_refused_later():
    """Inside of the scan the layer names its packed axis as if it stood alone."""
    step = nn.scan(DenseStep, variable_axes={"params": 1}, split_rngs={"params": True}, length=3)()
    with peft.ModuleInterceptor(store):
        own = jax.eval_shape(lambda: step.init(key_of(0), X, None)["params"])
    with pytest.raises(ValueError, match="stacked along an axis that the name does not allow for"):
        jax.eval_shape(peft.dequantize_checkpoint, own)


def store(module, kind=nn.Dense):
    """Reads values that are stored by INT4."""
    return peft.Int4Dense(wrapped=module) if type(module) is kind else module


def test_layers_between_two_stacks():
    """Packed bits between two stacked axes have no name that slices keep; bytes need none."""
    spec = {"x/kernel": LayerSpec("...i,io->...o", stack_axes=(0, -1))}
    tree = {"x": {"kernel": numbers(3, I, O, 2)}}
    with pytest.raises(ValueError, match=r"'x/kernel'.*between.*stacked.*[Mm]ove the stack"):
        peft.quantize_checkpoint(tree, method="int4", specs=spec)
    small = peft.quantize_checkpoint(tree, method="int8", specs=spec)["x"]
    assert small["scale"].shape == (3, 1, O, 2)
    pair = peft.quantize(tree["x"]["kernel"], "int8", axes=1)
    assert_stored_alike((small["kernel"], small["scale"]), pair)


# --- Which weights -------------------------------------------------------------------------------

MODEL = {
    "layer_0": {"attn": dense(), "mlp": {"w_in": numbers(I, O), "w_out": numbers(I, O, seed=1)}},
    "layer_1": {"attn": dense(1), "norm": {"scale": numbers(O)}},
    "embed": {"embedding": numbers(I, O)},
}
EVERY = {
    "layer_0/attn/kernel",
    "layer_0/mlp/w_in",
    "layer_0/mlp/w_out",
    "layer_1/attn/kernel",
    "embed/embedding",
}
SELECT = {
    "regular expression": ("layer_0/", {path for path in EVERY if "layer_0" in path}),
    "searched, not matched": ("kernel$", {path for path in EVERY if "kernel" in path}),
    "compiled": (re.compile("MLP", re.IGNORECASE), {"layer_0/mlp/w_in", "layer_0/mlp/w_out"}),
    "predicate": (lambda path: path.count("/") == 1, {"embed/embedding"}),
    "everything": ("", EVERY),
}


def stored_in(tree):
    return {"/".join(map(str, path)) for path in pairs_in(tree)}


@pytest.mark.parametrize(("select", "expected"), SELECT.values(), ids=SELECT)
def test_select(select, expected):
    small = peft.quantize_checkpoint(MODEL, method="int8", select=select)
    assert stored_in(small) == expected
    assert_passed_on(small, MODEL)
    specs = dict.fromkeys(EVERY - {"embed/embedding"}, DENSE)
    some = expected & set(specs)
    if some:
        both = peft.quantize_checkpoint(MODEL, method="int8", select=select, specs=specs)
        assert stored_in(both) == some


def test_every_kernel_of_two_axes_without_select_and_specs():
    small = peft.quantize_checkpoint(MODEL, method="int4")
    assert stored_in(small) == {"layer_0/attn/kernel", "layer_1/attn/kernel"}


def test_predicates_see_each_weight_once():
    seen = []
    tree = MODEL | {"x": dense(lora=adapter())}
    peft.quantize_checkpoint(tree, method="int8", select=lambda path: seen.append(path) or True)
    assert sorted(seen) == sorted(EVERY | {"x/kernel"})


@pytest.mark.parametrize("method", METHODS)
def test_kernels_of_more_axes_without_specs(method):
    tree = {"x": {"kernel": numbers(2, I, O)}, "y": dense()}
    if method in ("q4_0", "q4_0_transpose"):

        @jax.jit
        def run(tree):
            small = peft.quantize_checkpoint(tree, method=method)
            pair = peft.quantize(tree["x"]["kernel"], method)
            return peft.dequantize_checkpoint(small)["x"]["kernel"], peft.dequantize(*pair)

        np.testing.assert_array_equal(*run(tree))
        return
    message = rf"'x/kernel' has shape \(2, 64, 32\).*{method.name}.*specs=peft.layer_specs"
    for select in (None, "kernel"):
        with pytest.raises(ValueError, match=message):
            peft.quantize_checkpoint(tree, method=method, select=select)
    small = peft.quantize_checkpoint(tree, method=method, select="^y")
    assert stored_in(small) == {"y/kernel"}


NOTHING = {
    "select": (MODEL, {"select": "atn/kernel"}, "'atn/kernel'.*layer_0/attn/kernel"),
    "predicate": (MODEL, {"select": lambda path: False}, "nothing to quantize.*layer_0/"),
    "no kernels": ({"x": {"w": numbers(I, O)}}, {}, "nothing to quantize.*'x/w'"),
    "no weights": ({"x": {"kernel": numbers(I)}}, {"select": "kernel"}, "nothing to quantize"),
    "empty": ({}, {}, "nothing to quantize"),
    "empty specs": (MODEL, {"specs": {}}, "nothing to quantize"),
    "specs and select": (
        MODEL,
        {"specs": {"layer_0/attn/kernel": DENSE}, "select": "embed"},
        "nothing to quantize",
    ),
}


@pytest.mark.parametrize(("tree", "given", "message"), NOTHING.values(), ids=NOTHING)
def test_nothing_to_quantize(tree, given, message):
    with pytest.raises(ValueError, match=message):
        peft.quantize_checkpoint(tree, method="int8", **given)


REFUSED = {
    "no expression": ({"select": "("}, r"select='\(' is no regular expression"),
    "no predicate": ({"select": 3}, "select is a function .* got 3"),
    "other model": ({"specs": {"y/kernel": DENSE, "x/kernel": DENSE}}, r"\['y/kernel'\].*specs"),
    "no specs": ({"specs": {"x/kernel": DENSE.to_dict()}}, "LayerSpec.*peft.layer_specs"),
    "list": ({"specs": [DENSE]}, "LayerSpec.*peft.layer_specs"),
    "stack": (
        {"specs": {"x/kernel": LayerSpec("...i,io->...o", stack_axes=(0,))}},
        r"'x/kernel' has shape .* a stack along \[0\]",
    ),
    "bias": ({"specs": {"x/bias": DENSE}}, "'x/bias' has shape .* tells of 2 axes"),
    "method": ({"method": "int3"}, "'int3' is no quantization method"),
}


@pytest.mark.parametrize(("given", "message"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        peft.quantize_checkpoint({"x": dense()}, **{"method": "int8", **given})


@pytest.mark.parametrize("stack_axes", [(), (7,)])
def test_specs_of_a_model_with_other_axes_are_refused(stack_axes):
    tree = {"x": {"kernel": numbers(3, I, O)}}
    specs = {"x/kernel": LayerSpec("...i,io->...o", stack_axes=stack_axes)}
    with pytest.raises(ValueError, match="'x/kernel'"):
        peft.quantize_checkpoint(tree, method="int8", specs=specs)


def test_the_whole_collection_is_told_from_its_content():
    specs = {"x/kernel": DENSE}
    with pytest.raises(ValueError, match=r"variables\['params'\]"):
        peft.quantize_checkpoint({"params": {"x": dense()}}, method="int8", specs=specs)
    small = peft.quantize_checkpoint({"params": {"x": dense()}}, method="int8")
    assert stored_in(small) == {"params/x/kernel"}


BAD = {
    "NaN": (lambda x: x.at[3, 4].set(jnp.nan), METHODS, "NaN or infinity"),
    "infinity": (lambda x: x.at[0, 0].set(-jnp.inf), METHODS, "NaN or infinity"),
    "beyond float16": (lambda x: x * 1e6, ["q4_0", "q4_0_transpose"], "float16"),
    "indivisible": (lambda x: x[:40, :30], ["q4_0", "q4_0_transpose", "nf4"], "do not divide"),
    "integers": (lambda x: x.astype(jnp.int32), METHODS, r"int32\[64, 32\]; floating-point"),
    "bools": (lambda x: x > 0, ["int8"], "bool"),
}


@pytest.mark.parametrize(
    ("bad", "method"),
    [(bad, method) for bad, (_, methods, _) in BAD.items() for method in methods],
)
def test_bad_weights_are_refused_with_the_path(bad, method):
    spoil, _, message = BAD[bad]
    x = numbers(I, O)
    tree = {"a": {"kernel": x}, "b": [{"kernel": spoil(x)}]}
    with pytest.raises(ValueError, match=f"'b/0/kernel'.*{message}"):
        peft.quantize_checkpoint(tree, method=method)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(tree))
    small = peft.quantize_checkpoint(tree, method=method, select="^a")
    assert small["b"][0]["kernel"] is tree["b"][0]["kernel"]


def test_integers_alone_in_their_dict():
    with pytest.raises(ValueError, match=r"'x/kernel' is int8"):
        peft.quantize_checkpoint({"x": {"kernel": jnp.ones((4, 4), jnp.int8)}}, method="int8")


# --- Names of scales -----------------------------------------------------------------------------

SHARED = {
    "two weights": ({"w_in": numbers(I, O), "w_out": numbers(I, O, seed=1)}, {"scale_w_out"}),
    "own scale": ({"kernel": numbers(I, O), "scale": numbers(O)}, {"scale_kernel"}),
    "three": ({name: numbers(I, O) for name in ("u", "v", "kernel")}, {"scale_u", "scale_v"}),
    "a weight named so": ({"scale": numbers(I, O)}, {"scale_scale"}),
    "and another": ({"scale": numbers(I, O), "w": numbers(I, O)}, {"scale_scale", "scale_w"}),
}


@pytest.mark.parametrize(("layer", "names"), SHARED.values(), ids=SHARED)
@pytest.mark.parametrize("plain", [False, True], ids=["as made", "as plain dicts"])
def test_names_of_scales_and_the_way_back(layer, names, plain):
    small = peft.quantize_checkpoint({"x": layer}, method="int8", select="")
    assert names <= set(small["x"]) <= set(layer) | names | {"scale"}
    if plain:
        small = as_plain_dicts(small)
    back = peft.dequantize_checkpoint(small)["x"]
    assert set(back) == set(layer)
    for name, value in layer.items():
        seed = int(name == "w_out")
        expected = value if value.ndim == 1 else simulated("int8", seed)
        np.testing.assert_array_equal(back[name], expected)


def as_plain_dicts(tree):
    """The tree as a file gives it back: without the library's own nodes."""
    flat = {
        tuple(part.key for part in path): leaf for path, leaf in jax.tree.leaves_with_path(tree)
    }
    return flax.traverse_util.unflatten_dict(flat)


@pytest.mark.parametrize("select", [None, ""])
def test_a_parameter_with_the_name_of_a_scale(select):
    own = numbers(O) if select is None else numbers(I, O)
    layer = {"kernel": numbers(I, O), "scale_kernel": own}
    with pytest.raises(ValueError, match="'x/kernel' would have its scale at 'scale', which is"):
        peft.quantize_checkpoint({"x": layer}, method="int8", select=select)


def test_stored_values_pass_on():
    """A tree is quantized in parts, by several methods."""
    tree = {"x": dense(), "y": dense(1), "z": {"w": numbers(I, O), "v": numbers(I, O)}}
    first = peft.quantize_checkpoint(tree, method="nf4", select="x/")
    second = peft.quantize_checkpoint(first, method="int8")
    assert second["x"]["kernel"] is first["x"]["kernel"]
    assert second["x"]["scale"] is first["x"]["scale"]
    third = peft.quantize_checkpoint(second, method="int4", select="z/w")
    fourth = peft.quantize_checkpoint(third, method="q4_0", select="z/v")
    methods = {"/".join(path): stored.method for path, (stored, _) in pairs_in(fourth).items()}
    assert methods == {"x/kernel": "nf4", "y/kernel": "int8", "z/w": "int4", "z/v": "q4_0"}
    back = peft.dequantize_checkpoint(fourth)
    assert jax.tree.structure(back) == jax.tree.structure(tree)
    for path, method in methods.items():
        layer, name = path.split("/")
        np.testing.assert_array_equal(back[layer][name], simulated(method, int(layer == "y")))


def test_scales_of_stored_values_pass_on():
    tree = {"x": dense(), "y": dense(1)}
    small = peft.quantize_checkpoint(tree, method="int8", select="x/")
    more = peft.quantize_checkpoint(small, method="int8", select="")
    assert more["x"]["scale"] is small["x"]["scale"]


def test_quantizing_again_with_specs_is_refused():
    small = peft.quantize_checkpoint({"x": dense()}, method="int8")
    with pytest.raises(ValueError, match=r"x/kernel.*stored already"):
        peft.quantize_checkpoint(small, method="int8", specs={"x/kernel": DENSE})
    with pytest.raises(ValueError, match="quantized already"):
        peft.quantize(small["x"]["kernel"], "int8")


def test_quantizing_again_is_refused():
    small = peft.quantize_checkpoint({"x": dense()}, method="int8")
    with pytest.raises(ValueError, match="already"):
        peft.quantize_checkpoint(small, method="int8")


def test_the_way_back_refuses_what_has_no_scale():
    small = peft.quantize_checkpoint({"x": dense()}, method="int8")
    scale = small["x"].pop("scale")
    with pytest.raises(ValueError, match=r"'x/kernel'.*without their scale"):
        peft.dequantize_checkpoint(small)
    small["x"]["scale"] = scale[:, :-1]
    with pytest.raises(ValueError, match=r"'x/kernel'.*\(1, 31\) does not fit"):
        peft.dequantize_checkpoint(small)
    with pytest.raises(ValueError, match=r"'0'.*without their scale"):
        peft.dequantize_checkpoint([small["x"]["kernel"]])


def test_the_way_back_passes_integers_on():
    tree = {"tables": {"ids": jnp.arange(4, dtype=jnp.int8)}}
    assert peft.dequantize_checkpoint(tree)["tables"]["ids"] is tree["tables"]["ids"]


def test_weights_in_lists_have_no_place_for_a_scale():
    tree = {"w": [numbers(I, O), numbers(I, O)]}
    with pytest.raises(ValueError, match=r"'w/0' lies in a list.*[Kk]eep weights in dicts"):
        peft.quantize_checkpoint(tree, method="int8", select="w")


def test_weights_in_lists_are_refused_before_they_are_deleted():
    tree = {"w": [numbers(I, O) + 0]}
    with pytest.raises(ValueError, match="'w/0' lies in a list"):
        peft.quantize_checkpoint(tree, method="int8", select="w", donate=True)
    assert not tree["w"][0].is_deleted()


def test_a_weight_without_a_tree_is_refused():
    with pytest.raises(ValueError, match=r"peft\.quantize"):
        peft.quantize_checkpoint(numbers(I, O), method="int8", select="")


# --- Transforms ----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_abstract_trees(method):
    tree = {"x": dense(), "y": [freeze(dense(1))]}
    quantize = functools.partial(peft.quantize_checkpoint, method=method)
    small = quantize(tree)
    abstract = jax.eval_shape(quantize, tree)
    chex.assert_trees_all_equal_shapes_and_dtypes(small, abstract)
    assert jax.tree.structure(small) == jax.tree.structure(abstract)
    back = jax.eval_shape(peft.dequantize_checkpoint, abstract)
    chex.assert_trees_all_equal_shapes_and_dtypes(back, tree)


def test_under_jit():
    @jax.jit
    def both(tree):
        small = {m: peft.quantize_checkpoint(tree, method=m, donate=True) for m in METHODS}
        return small, {m: peft.dequantize_checkpoint(small[m]) for m in METHODS}

    tree = {"x": dense(), "y": [freeze(dense(1))]}
    small, back = both(tree)
    for method in METHODS:
        eager = peft.quantize_checkpoint(tree, method=method)
        chex.assert_trees_all_equal(small[method], eager)
        assert jax.tree.structure(small[method]) == jax.tree.structure(eager)
        chex.assert_trees_all_equal(back[method], peft.dequantize_checkpoint(eager))


def test_numbers_are_not_known_under_jit():
    """NaN does not raise inside of jit; other mistakes do."""
    quantize = jax.jit(functools.partial(peft.quantize_checkpoint, method="int8"))
    small = quantize({"x": {"kernel": jnp.full((I, O), jnp.nan)}})
    assert jnp.isnan(small["x"]["scale"]).all()
    with pytest.raises(ValueError, match="'x/kernel'"):
        quantize({"x": {"kernel": jnp.ones((I, O), jnp.int32)}})


def test_layers_of_one_shape_compile_once():
    tree = {str(i): {"kernel": numbers(48, 6, seed=i)} for i in range(5)}
    events = []

    def note(event, seconds, **_):
        events.extend([event] if "backend_compile" in event else [])

    def compilations(function):
        jax.monitoring.register_event_duration_secs_listener(note)
        try:
            events.clear()
            result = jax.block_until_ready(function())
            return len(events), result
        finally:
            jax.monitoring.unregister_event_duration_listener(note)

    count, small = compilations(lambda: peft.quantize_checkpoint(tree, method="int4"))
    assert count == 1
    assert compilations(lambda: peft.dequantize_checkpoint(small))[0] == 1


# --- Progress ------------------------------------------------------------------------------------


def test_progress(capfd):
    tree = {"x": dense()}
    small = peft.quantize_checkpoint(tree, method="int4")
    peft.dequantize_checkpoint(small)
    silent = capfd.readouterr()
    assert silent.out == silent.err == ""
    peft.quantize_checkpoint(tree, method="int4", progress=True)
    shown = capfd.readouterr()
    assert shown.out == ""
    assert "quantize to int4" in shown.err
    assert "8.19k" in shown.err, "the bar counts bytes"
    peft.dequantize_checkpoint(small, progress=True)
    assert "dequantize" in capfd.readouterr().err


# --- Bytes ---------------------------------------------------------------------------------------

N = 512
BITS = {
    "int4": 4 + 32 / N,
    "int8": 8 + 32 / N,
    "q4_0": 4.5,
    "q4_0_transpose": 4.5,
    "sfp8": 8 + 32 / N,
    "nf4": 4.5,
}


@functools.cache
def large(method):
    return peft.quantize_checkpoint({"x": {"kernel": numbers(N, N)}}, method=method)


@pytest.mark.parametrize("method", METHODS)
def test_bits_for_each_weight(method, tmp_path):
    """In device buffers, in a safetensors file and in orbax's, scales included."""
    small = large(method)
    leaves = jax.tree.leaves(small)
    assert sum(leaf.nbytes for leaf in leaves) == BITS[method] / 8 * N * N
    assert sum(leaf.on_device_size_in_bytes() for leaf in leaves) == BITS[method] / 8 * N * N

    save_file(flat_arrays(small), tmp_path / "small.safetensors")
    size = os.path.getsize(tmp_path / "small.safetensors")
    assert 8 * size / N**2 <= BITS[method] + 0.02

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "orbax", small)
    files = [path for path in (tmp_path / "orbax").rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files)
    assert 8 * size / N**2 <= BITS[method] + 0.3


def flat_arrays(tree):
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {"/".join(part.key for part in path): np.asarray(leaf) for path, leaf in flat}


def test_safetensors_and_back(tmp_path):
    small = peft.quantize_checkpoint({"x": dense(), "y": {"z": dense(1)}}, method="q4_0")
    save_file(flat_arrays(small), tmp_path / "small.safetensors")
    arrays = load_file(tmp_path / "small.safetensors")
    read = flax.traverse_util.unflatten_dict(arrays, sep="/")
    chex.assert_trees_all_equal(peft.dequantize_checkpoint(read), peft.dequantize_checkpoint(small))


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(I, name="dense")(x)
        return nn.Dense(O, name="out")(nn.gelu(x))


def test_orbax_without_a_target(tmp_path):
    """Plain dicts come back, which a model with wrappers takes as they are."""
    params = {"dense": {"kernel": numbers(I, I), "bias": numbers(I)}, "out": dense()}
    specs = peft.layer_specs(Net(), X)
    small = peft.quantize_checkpoint(params, method="int4", specs=specs)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "small", small)
        checkpointer.wait_until_finished()
        read = checkpointer.restore(tmp_path / "small")
    assert type(read["out"]["kernel"]) is dict
    assert pairs_in(read) == {}
    chex.assert_trees_all_equal(as_plain_dicts(small), read)
    back = peft.dequantize_checkpoint(read)
    chex.assert_trees_all_equal(back, peft.dequantize_checkpoint(small))

    @jax.jit
    def run(read, small, back):
        with peft.ModuleInterceptor(store):
            found = [Net().apply({"params": params}, X) for params in (read, small)]
        return *found, Net().apply({"params": back}, X)

    found, as_made, expected = run(read, small, back)
    np.testing.assert_array_equal(found, as_made)
    assert_close(found, expected)


def test_orbax_to_another_number_of_devices(tmp_path):
    spread = jax.tree.map(
        lambda x: jax.device_put(x, on_mesh(8, P(*[None] * (x.ndim - 1), "x"))), {"x": dense()}
    )
    small = peft.quantize_checkpoint(spread, method="int4")
    assert small["x"]["scale"].sharding.spec == P(None, "x")
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "small", small)
        checkpointer.wait_until_finished()
        for devices in (2, 4):
            target = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(
                    x.shape,
                    x.dtype,
                    sharding=on_mesh(devices, x.sharding.spec),  # noqa: B023
                ),
                small,
            )
            read = checkpointer.restore(tmp_path / "small", target)
            assert jax.tree.structure(read) == jax.tree.structure(small)
            chex.assert_trees_all_equal(read, small)
            back = peft.dequantize_checkpoint(read)["x"]["kernel"]
            assert len(back.devices()) == devices
            np.testing.assert_array_equal(back, simulated("int4"))


# --- Devices -------------------------------------------------------------------------------------


def on_mesh(devices, spec, axis_type=AxisType.Auto):
    mesh = jax.make_mesh(
        (devices,), ("x",), devices=jax.devices()[:devices], axis_types=(axis_type,)
    )
    return NamedSharding(mesh, spec)


def grid(spec, axis_type=AxisType.Auto):
    return NamedSharding(jax.make_mesh((4, 2), ("x", "y"), axis_types=2 * (axis_type,)), spec)


@functools.cache
def unspread(method):
    """A weight on one device: dequantized, and its scale."""
    small = peft.quantize_checkpoint({"kernel": numbers(128, 64)}, method=method)
    return peft.dequantize_checkpoint(small)["kernel"], small["scale"]


def check_spread(method, sharding):
    kernel = jax.device_put(numbers(128, 64), sharding)
    small = peft.quantize_checkpoint({"kernel": kernel}, method=method)
    array, scale = small["kernel"].array, small["scale"]
    assert array.sharding.is_equivalent_to(kernel.sharding, 2)
    names = [*sharding.spec, None, None][:2]
    sizes = {"x": 4, "y": 2, None: 1, ("x", "y"): 8}
    kept = [n if m % sizes[n] == 0 else None for n, m in zip(names, scale.shape, strict=True)]
    assert scale.sharding.is_equivalent_to(NamedSharding(sharding.mesh, P(*kept)), 2)
    back = peft.dequantize_checkpoint(small)["kernel"]
    assert back.sharding.is_equivalent_to(kernel.sharding, 2)
    expected, scales = unspread(method)
    np.testing.assert_array_equal(back, expected)
    np.testing.assert_array_equal(scale, scales)
    assert not kernel.is_deleted()
    return small["kernel"].layout


SPREAD = [
    *((method, P("y", "x")) for method in ("int4", "int8", "q4_0", "q4_0_transpose")),
    ("q4_0_transpose", P(("x", "y"))),  # four blocks for eight devices
]


@pytest.mark.parametrize(("method", "spec"), SPREAD, ids=str)
def test_shardings_stay(method, spec):
    check_spread(method, grid(spec))


@pytest.mark.parametrize(("spec", "axis"), [(P("x"), -1), (P(None, "x"), -2)], ids=str)
def test_the_packed_axis_is_one_that_is_not_spread(spec, axis):
    assert check_spread("int4", grid(spec)).axis == axis


EXPLICIT = [
    ("int8", P("x", "y")),
    ("q4_0", P("x", "y")),
    ("q4_0", P(None, "x")),  # two blocks for four devices
    ("nf4", P("x")),
]


@pytest.mark.parametrize(("method", "spec"), EXPLICIT, ids=str)
def test_meshes_of_explicit_axes(method, spec):
    """As `jax.make_mesh` makes them unless it is told otherwise."""
    check_spread(method, grid(spec, AxisType.Explicit))


def test_spread_stacks_without_specs():
    """Q4_0 takes kernels of three axes without specs; slices of them keep their meaning."""
    sharding = grid(P(None, "x", "y"))
    kernel = jnp.stack(2 * [numbers(I, O)])
    small = peft.quantize_checkpoint({"kernel": jax.device_put(kernel, sharding)}, method="q4_0")
    assert small["kernel"].layout.axis in (-1, -2)


def test_one_device_that_is_not_the_first():
    kernel = jax.device_put(numbers(I, O), jax.devices()[3])
    small = peft.quantize_checkpoint({"kernel": kernel}, method="int4")
    leaves = jax.tree.leaves((small, peft.dequantize_checkpoint(small)))
    assert {device for leaf in leaves for device in leaf.devices()} == {jax.devices()[3]}


# --- Memory --------------------------------------------------------------------------------------


def layers_of(length, count=4):
    """Layers of one size, in buffers of their own."""
    draw = np.sin(np.arange(length * length, dtype=np.float32)).reshape(length, length)
    return {str(i): {"kernel": jnp.asarray(draw + np.float32(i))} for i in range(count)}


@pytest.fixture
def growth(monkeypatch):
    """Runs a function; the bytes of all arrays beyond those before, after each leaf."""
    gc.collect()

    def run(function, *args, **kwargs):
        found = []
        with monkeypatch.context() as patch:
            patch.setattr("tqdm.tqdm.update", lambda *_: found.append(alive()))
            before = alive()
            return function(*args, **kwargs), np.asarray(found) - before

    return run


def alive():
    return sum(array.nbytes for array in jax.live_arrays())


@pytest.mark.parametrize("method", ["int4", "q4_0"])
def test_one_leaf_at_a_time(method, growth):
    """Beyond the input and the output so far, nothing stays; with donation, the input goes."""
    params = layers_of(N)
    weight, flags = 4 * N * N, 64
    done = np.arange(1, 5)
    small, grown = growth(peft.quantize_checkpoint, params, method=method)
    stored = sum(part.nbytes for part in jax.tree.leaves(small["0"]))
    assert stored <= 0.15 * weight
    assert np.all(grown >= done * stored)
    assert np.all(grown <= done * stored + flags)
    del small
    small, grown = growth(peft.quantize_checkpoint, params, method=method, donate=True)
    # Each weight goes after its count: one of them is there at most beyond what must be.
    assert np.all(grown <= done * (stored - weight) + weight + flags)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(params))

    back, grown = growth(peft.dequantize_checkpoint, small)
    assert np.all(grown <= done * weight + flags)
    del back
    _, grown = growth(peft.dequantize_checkpoint, small, donate=True)
    assert np.all(grown <= done * (weight - stored) + flags)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(small))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.optimized
def test_a_leaf_needs_at_most_itself_in_float32(method):
    n = 2048
    x = jax.ShapeDtypeStruct((n, n), jnp.float32)
    blocks, packed = blocks_of(method, x.shape, None), packed_axis(method, x.shape, None)
    program = encode.lower(x, method.value, blocks, packed, True).compile()
    assert program.memory_analysis().temp_size_in_bytes <= 1.1 * 4 * n * n


def test_donation_deletes_the_weights_and_nothing_else():
    tree = {"x": dense(), "y": {"kernel": numbers(I, O), "w": numbers(I, O)}}
    expected = peft.quantize_checkpoint(tree, method="int8")
    small = peft.quantize_checkpoint(tree, method="int8", donate=True)
    chex.assert_trees_all_equal(small, expected)
    deleted = jax.tree.map(lambda leaf: leaf.is_deleted(), tree)
    assert deleted == {"x": {"kernel": True, "bias": False}, "y": {"kernel": True, "w": False}}
    kept = peft.dequantize_checkpoint(expected)
    chex.assert_trees_all_equal(peft.dequantize_checkpoint(small, donate=True), kept)
    assert small["x"]["kernel"].array.is_deleted()
    assert small["x"]["scale"].is_deleted()
    assert not small["x"]["bias"].is_deleted()
    with pytest.raises(ValueError, match="do not divide"):
        peft.quantize_checkpoint({"x": kept["x"], "y": {"kernel": numbers(8, 8)}}, method="q4_0",
                                 donate=True)  # fmt: skip
    assert not kept["x"]["kernel"].is_deleted(), "what cannot be done is refused at the start"


def test_donation_of_a_leaf_that_occurs_twice():
    kernel = numbers(I, O)
    small = peft.quantize_checkpoint(
        {"x": {"kernel": kernel}, "y": {"kernel": kernel}}, method="int8", donate=True
    )
    assert kernel.is_deleted()
    for layer in small.values():
        assert_stored_alike((layer["kernel"], layer["scale"]), quantized("int8"))


def test_donation_spares_a_weight_that_is_passed_on_too():
    """An embedding that is the kernel of the head, too, and is not taken there."""
    table = numbers(I, O)
    tree = {"embed": {"embedding": table}, "head": {"kernel": table}}
    small = peft.quantize_checkpoint(tree, method="int8", donate=True)
    assert not small["embed"]["embedding"].is_deleted()


def test_donation_of_a_leaf_in_two_boxes():
    kernel = numbers(I, O)
    tree = {name: {"kernel": nn.Partitioned(kernel, (None, None))} for name in "xy"}
    peft.quantize_checkpoint(tree, method="int8", donate=True)


def test_donation_on_the_way_back_of_a_leaf_that_occurs_twice():
    layer = peft.quantize_checkpoint(dense(), method="int8")
    peft.dequantize_checkpoint({"x": layer, "y": layer}, donate=True)

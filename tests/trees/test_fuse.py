"""Parameter trees: split and merge are exact, fusing rounds once, and doubts are refused."""

import collections
import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.core import FrozenDict, freeze, meta
from helpers import assert_close, assert_rounded, rounding
from hypothesis import given, settings
from hypothesis import strategies as st

import peft_jax as peft
from peft_jax import LoraSpec

RNG = np.random.default_rng(0)
DENSE = LoraSpec("kernel", "ir,ro->io", 2)


def array(*shape, dtype=np.float32, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def adapter(rows=4, columns=3, rank=2, dtype=np.float32):
    return {
        "a": array(rows, rank, dtype=dtype, seed=1),
        "b": array(rank, columns, seed=2, dtype=dtype),
    }


def dense(rows=4, columns=3, **extra):
    return {"kernel": array(rows, columns), "bias": array(columns, seed=3), **extra}


def assert_identical(actual, expected):
    """The same containers, in the same order, around the same objects."""
    assert type(actual) is type(expected)
    if isinstance(expected, dict | FrozenDict):
        assert list(actual) == list(expected)
        for key in expected:
            assert_identical(actual[key], expected[key])
    elif isinstance(expected, list | tuple):
        assert len(actual) == len(expected)
        for pair in zip(actual, expected, strict=True):
            assert_identical(*pair)
    else:
        assert actual is expected


# --- Split and merge -----------------------------------------------------------------------------


def test_split_example():
    params = {
        "dense": {"kernel": 0, "bias": 1, "lora": {"a": 0, "b": 1}},
        "other": 0,
    }
    original, lora = peft.split_params(params)
    assert original == {"dense": {"kernel": 0, "bias": 1}, "other": 0}
    assert lora == {"dense": {"lora": {"a": 0, "b": 1}}}
    assert peft.merge_params(original, lora) == params


Pair = collections.namedtuple("Pair", ["left", "right"])
TREES = {
    "dict": {"x": dense(lora=adapter()), "y": dense()},
    "root": dense(lora=adapter()),
    "FrozenDict": freeze({"x": dense(lora=adapter()), "y": dense()}),
    "ordered": collections.OrderedDict(b=dense(lora=adapter()), a=dense()),
    "list": {"layers": [dense(), dense(lora=adapter())]},
    "list of adapters alone": {"layers": [{"lora": adapter()}, {"lora": adapter()}]},
    "tuple": {"layers": (dense(lora=adapter()), {}, dense())},
    "tuple at the root": (dense(lora=adapter()), dense()),
    "namedtuple": {"pair": Pair(dense(lora=adapter()), [dense()])},
    "nested lists": [[dense(lora=adapter())], [[], dense()]],
    "empty": {},
    "empty branches": {"x": {}, "y": [], "z": (), "w": dense(lora=adapter()), "v": {"u": {}}},
    "no adapters": {"x": dense()},
    "several adapters": {"x": {**dense(), "lora": adapter(), "lora_bias": adapter()}},
    "adapter that stands alone": {"LoRADenseAdapter_0": adapter(), "x": dense()},
    "user's module": {"lora": dense(), "x": dense(lora=adapter())},
    "user's module of modules": {"lora": {"a": dense(), "b": dense()}},
    "user's leaf": {"lora": array(3), "x": {"lora": array(3), "kernel": array(4, 3)}},
    "user's arrays": {"lora": {"a": array(3, 2), "b": array(5, 4)}},
    "user's three arrays": {"lora": {"a": array(3, 2), "b": array(2, 4), "c": array(2)}},
    "user's names": {"lorax": adapter(), "my_lora": adapter(), "x": {"a": array(2), "b": array(2)}},
    "abstract": {
        "x": jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), dense(lora=adapter()))
    },
    "None": {"x": None, "y": dense(lora=adapter())},
    "numbers as keys": {0: dense(lora=adapter()), 1: dense()},
    "boxed": {"x": dense(lora={k: nn.Partitioned(v, (None, "m")) for k, v in adapter().items()})},
}
WITHOUT_ADAPTERS = {"empty", "no adapters"} | {name for name in TREES if "user's" in name} - {
    "user's module"
}


@pytest.mark.parametrize("name", TREES)
def test_merge_undoes_split(name):
    tree = TREES[name]
    original, lora = peft.split_params(tree)
    assert_same_tree(peft.merge_params(original, lora), tree)
    assert not adapters_in(original)
    found = adapters_in(tree)
    assert adapters_in(lora) == found
    assert len(jax.tree.leaves(lora)) == 2 * len(found)
    assert (name in WITHOUT_ADAPTERS) == (not found)
    again = peft.split_params(original)
    assert_identical(again.original, original)
    assert not jax.tree.leaves(again.lora)


def assert_same_tree(actual, expected):
    """As `assert_identical`, but adapters may have moved behind their siblings."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    pairs = zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
    assert all(one is other for one, other in pairs)
    containers = lambda tree: [  # noqa: E731
        type(node) for node in jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, FrozenDict))
    ]
    assert containers(actual) == containers(expected)


def adapters_in(tree):
    """Paths of the adapters, found by what the tests above call so."""
    if isinstance(tree, list | tuple):
        tree = dict(enumerate(tree))
    if not isinstance(tree, dict | FrozenDict):
        return set()
    found = set()
    for key, value in tree.items():
        mine = str(key).startswith(("lora_", "LoRADenseAdapter_")) or key == "lora"
        if mine and isinstance(value, dict | FrozenDict) and set(value) == {"a", "b"}:
            a, b = (meta.unbox(value[leaf]) for leaf in "ab")
            if not isinstance(a, dict) and np.shape(a)[-1:] == np.shape(b)[:1]:
                found.add((key,))
                continue
        found |= {(key, *path) for path in adapters_in(value)}
    return found


NAMES = st.sampled_from(
    ["kernel", "x", "lora", "lora_kernel", "a", "b", "lora_", "LoRADenseAdapter_0"]
)
SHAPES = st.lists(st.integers(1, 3), max_size=3)
LEAVES = SHAPES.map(lambda shape: np.zeros(shape, np.float32)) | st.integers() | st.none()
GENERATED = st.recursive(
    LEAVES
    | st.builds(
        lambda i, r, o: {"a": np.zeros((i, r)), "b": np.zeros((r, o))}, *3 * [st.integers(1, 3)]
    ),
    lambda inner: (
        st.dictionaries(NAMES, inner, max_size=3)
        | st.dictionaries(NAMES, inner, max_size=3).map(freeze)
        | st.lists(inner, max_size=2)
        | st.lists(inner, max_size=2).map(tuple)
        | st.builds(Pair, inner, inner)
    ),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(NAMES, GENERATED, max_size=4) | GENERATED)
def test_merge_undoes_split_for_any_tree(tree):
    original, lora = peft.split_params(tree)
    merged = peft.merge_params(original, lora)
    assert_same_tree(merged, tree)
    assert_same_containers(merged, tree)
    ids = [id(leaf) for half in (original, lora) for leaf in jax.tree.leaves(half)]
    assert sorted(ids) == sorted(id(leaf) for leaf in jax.tree.leaves(tree))


def assert_same_containers(one, other):
    assert type(one) is type(other)
    if isinstance(other, dict | FrozenDict):
        assert set(one) == set(other)
        for key in other:
            assert_same_containers(one[key], other[key])
    elif isinstance(other, list | tuple):
        for pair in zip(one, other, strict=True):
            assert_same_containers(*pair)


def copy_of(tree):
    """New containers around the same leaves, keys in their order."""
    if isinstance(tree, dict):
        return {key: copy_of(value) for key, value in tree.items()}
    return [copy_of(value) for value in tree] if isinstance(tree, list) else tree


def test_split_does_not_change_what_it_is_given():
    tree = {"x": dense(lora=adapter()), "y": [dense(lora=adapter())]}
    before = copy_of(tree)
    original, lora = peft.split_params(tree)
    peft.merge_params(original, lora)
    assert_identical(tree, before)
    assert "lora" not in original["x"]


def test_split_works_under_jit_and_grad():
    params = {"x": dense(lora=adapter())}
    original, lora = jax.jit(peft.split_params)(params)
    chex.assert_trees_all_equal(jax.jit(peft.merge_params)(original, lora), params)
    loss = lambda lora: jnp.sum(peft.merge_params(original, lora)["x"]["lora"]["a"] ** 2)  # noqa: E731
    gradient = jax.grad(loss)(lora)
    chex.assert_trees_all_equal_structs(gradient, lora)


CONFLICTS = {
    "no such layer": ({"dense": dense()}, {"dens": {"lora": adapter()}}, r"no 'dens'.*\['dense'\]"),
    "deep": ({"m": {"x": dense()}}, {"m": {"y": {"lora": adapter()}}}, "no 'm/y'"),
    "there already": ({"x": dense(lora=adapter())}, {"x": {"lora": adapter()}}, "'x/lora' already"),
    "user's leaf in the way": (
        {"x": dense(lora=1)},
        {"x": {"lora": adapter()}},
        "'x/lora' already",
    ),
    "no adapter": ({"x": dense()}, {"x": {"kernel": array(4, 3)}}, "'x/kernel'"),
    "new leaf": ({"x": dense()}, {"x": {"scale": array(3)}}, "no 'x/scale'"),
    "adapter of a leaf": ({"x": array(3)}, {"x": {"lora": adapter()}}, "'x' is a leaf"),
    "leaf for a layer": ({"x": dense()}, {"x": array(3)}, "'x' is a dict"),
    "list for a dict": ({"x": dense()}, {"x": [{"lora": adapter()}]}, "'x' is a dict"),
    "longer list": ({"x": [dense()]}, {"x": [{}, {"lora": adapter()}]}, "'x' is a list of 1"),
    "two leaves": (array(3), array(3), "the root"),
    "half an adapter": ({"x": dense()}, {"x": {"lora": {"a": array(4, 2)}}}, "no 'x/lora'"),
}


@pytest.mark.parametrize(("original", "lora", "message"), CONFLICTS.values(), ids=CONFLICTS)
def test_conflicts_are_refused_with_the_path(original, lora, message):
    with pytest.raises(ValueError, match=message):
        peft.merge_params(original, lora)


# --- Fuse ----------------------------------------------------------------------------------------


def exact(kernel, adapter, scaling=1.0):
    """The sum in float64, not rounded."""
    kernel, a, b = (np.asarray(meta.unbox(x), np.float64) for x in (kernel, *adapter.values()))
    return kernel + scaling * a @ b


@pytest.mark.parametrize("adapter_dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_the_sum_is_rounded_once(dtype, adapter_dtype):
    """Of sums that lie clear of a tie, each is the nearest number of the kernel's dtype."""
    layer = {"kernel": array(64, 32, dtype=dtype), "lora": adapter(64, 32, 4, adapter_dtype)}
    spec = LoraSpec("kernel", "ir,ro->io", 4, 0.3)
    fused = peft.fuse_params(layer, specs={"lora": spec})
    assert set(fused) == {"kernel"}
    assert fused["kernel"].dtype == dtype
    total = exact(layer["kernel"], layer["lora"], 0.3)
    slack = 3e-6 * np.maximum(1, np.abs(total))
    low, high = (jnp.asarray(total + sign * slack).astype(dtype) for sign in (-1, 1))
    found = fused["kernel"].astype(np.float32)
    assert jnp.all((low.astype(np.float32) <= found) & (found <= high.astype(np.float32)))
    if dtype != jnp.float32:
        clear = np.asarray(low == high)
        assert clear.mean() > 0.9
        rounded = jnp.asarray(total, jnp.float32).astype(dtype)
        np.testing.assert_array_equal(
            np.asarray(fused["kernel"])[clear], np.asarray(rounded)[clear]
        )


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.int32, jnp.uint8, jnp.int4, jnp.bool_])
@pytest.mark.parametrize("specs", [None, {"x/lora": DENSE}], ids=["plain", "specs"])
def test_integers_are_refused(dtype, specs):
    params = {"x": {"kernel": jnp.ones((4, 3), dtype), "lora": adapter()}}
    with pytest.raises(ValueError, match=rf"'x/kernel' is stored as {jnp.dtype(dtype).name}"):
        peft.fuse_params(params, specs=specs)


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        ({}, r"without a spec: \['x/lora'\]"),
        ({"x/lora": DENSE, "y/lora": DENSE}, r"without an adapter: \['y/lora'\]"),
        ({"y/lora": DENSE}, r"without a spec: \['x/lora'\].*without an adapter: \['y/lora'\]"),
        ({"x/lora": DENSE.to_dict()}, "LoraSpec"),
        ([DENSE], "LoraSpec"),
        (
            {"x/lora": LoraSpec("weight", "ir,ro->io", 2)},
            r"'x/lora' adapts 'weight'.*\['bias', 'kernel'\]",
        ),
        ({"x/lora": LoraSpec(None, "ir,ro->io", 2)}, "'x/lora' stands alone"),
        ({"x/lora": LoraSpec("bias", "ir,ro->io", 2)}, r"'bias' has shape \(3,\)"),
        ({"x/lora": LoraSpec("kernel", "or,ri->io", 2)}, r"shape \(3, 4\) by 'or,ri->io'"),
        ({"x/lora": LoraSpec("kernel", "nir,ro->nio", 2)}, "'nir,ro->nio'"),
        ({"x/lora": LoraSpec("kernel", "ir,ro->io", 3, 2.0, 6.0)}, "rank 2.*rank 3.*alpha 6"),
        (
            {"x/lora": dataclasses.replace(DENSE, equation="...ir,...ro->...io", stack_axes=(5,))},
            "stack axes",
        ),
    ],
)
def test_specs_of_another_model_are_refused(specs, message):
    with pytest.raises(ValueError, match=message):
        peft.fuse_params({"x": dense(lora=adapter())}, specs=specs)


DOUBTS = {
    "three axes": {"kernel": array(2, 4, 3), "lora": adapter()},
    "two kernels": {"kernel": array(4, 3), "other": array(4, 3), "lora": adapter()},
    "another shape": {"kernel": array(3, 4), "lora": adapter()},
    "no kernel": {"bias": array(3), "lora": adapter()},
    "stacked": {"kernel": array(2, 4, 3), "lora": {"a": array(2, 4, 2), "b": array(2, 2, 3)}},
    "two adapters": {"kernel": array(4, 3), "lora": adapter(), "lora_x": adapter()},
    "stands alone": {"inner": {"kernel": array(4, 3)}, "lora": adapter()},
}


@pytest.mark.parametrize("layer", DOUBTS.values(), ids=DOUBTS)
def test_doubts_without_specs_are_refused(layer):
    with pytest.raises(ValueError, match=r"'x.*specs=peft.lora_specs"):
        peft.fuse_params({"x": layer})


def test_plain_dense_trees_need_no_specs():
    params = freeze({"x": [dense(lora=adapter())], "y": dense(), "empty": {}})
    fused = peft.fuse_params(params)
    assert type(fused) is FrozenDict
    assert type(fused["x"]) is list
    assert set(fused["x"][0]) == {"kernel", "bias"}
    assert fused["y"]["kernel"] is params["y"]["kernel"]
    layer = params["x"][0]
    assert_rounded(fused["x"][0]["kernel"], exact(layer["kernel"], layer["lora"]), 2)


def test_boxes_stay():
    box = lambda value: nn.Partitioned(value, (None, "model"))  # noqa: E731
    layer = {"kernel": box(array(4, 3)), "lora": jax.tree.map(box, adapter())}
    fused = peft.fuse_params({"x": layer})["x"]["kernel"]
    assert isinstance(fused, nn.Partitioned)
    assert fused.names == (None, "model")
    plain = peft.fuse_params(meta.unbox({"x": layer}))
    chex.assert_trees_all_equal(meta.unbox(fused), plain["x"]["kernel"])


def test_fusing_under_jit():
    params = {"x": dense(lora=adapter()), "y": dense()}
    expected = peft.fuse_params(params, specs={"x/lora": DENSE})
    fuse = jax.jit(lambda params: peft.fuse_params(params, specs={"x/lora": DENSE}))
    assert_close(fuse(params), expected, rounding(2))
    chex.assert_trees_all_equal_shapes_and_dtypes(jax.eval_shape(fuse, params), expected)


def test_a_donated_base_is_fused_in_place():
    base, lora = peft.split_params({"x": dense(lora=adapter()), "y": dense()})
    expected = peft.fuse_params(peft.merge_params(base, lora))
    donated = jax.tree.map(jnp.copy, base)

    @functools.partial(jax.jit, donate_argnums=0)
    def fuse(base, lora):
        return peft.fuse_params(peft.merge_params(base, lora))

    assert_close(fuse(donated, lora), expected, rounding(2))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(donated))


def test_a_tree_without_adapters_comes_back():
    params = {"x": dense(), "y": [{}]}
    assert_identical(peft.fuse_params(params), params)
    assert_identical(peft.fuse_params(params, specs={}), params)


def test_fuse_does_not_change_what_it_is_given():
    params = {"x": dense(lora=adapter())}
    before = copy_of(params)
    peft.fuse_params(params)
    assert_identical(params, before)


def test_numpy_arrays_fuse():
    params = jax.tree.map(np.asarray, {"x": dense(lora=adapter())})
    layer = params["x"]
    fused = peft.fuse_params(params)["x"]["kernel"]
    assert_rounded(fused, exact(layer["kernel"], layer["lora"]), 2)


@pytest.mark.parametrize("axes", [(0,), (1,), (2,), (-1,), (0, 0), (1, 0), (0, 2), (2, 1)])
def test_stacked_layers_fuse_as_they_stand(axes):
    """Each slice along the stack fuses as a layer of its own."""
    spec = LoraSpec("kernel", "...ir,...ro->...io", 2, 0.5, stack_axes=axes)
    lengths = (2, 5)[: len(axes)]
    layers = {
        index: {
            "kernel": array(4, 3, seed=i),
            "lora": jax.tree.map(lambda x, i=i: x * i, adapter()),
        }
        for i, index in enumerate(np.ndindex(*lengths))
    }
    plain = {
        i: peft.fuse_params(layer, specs={"lora": LoraSpec("kernel", "ir,ro->io", 2, 0.5)})
        for i, layer in layers.items()
    }
    fused = peft.fuse_params(stack(layers, lengths, axes), specs={"lora": spec})
    assert_close(fused, stack(plain, lengths, axes), rounding(2))


def stack(layers, lengths, axes):
    """Stacks the layers of each multi-index as nested `nn.scan`s do, innermost first."""
    for length, axis in zip(lengths, axes, strict=True):
        rest = sorted({index[1:] for index in layers})
        layers = {
            index: jax.tree.map(
                lambda *leaves, axis=axis: jnp.stack(leaves, axis),
                *(layers[i, *index] for i in range(length)),
            )
            for index in rest
        }
    return layers[()]

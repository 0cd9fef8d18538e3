import copy
import functools
import pickle

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from hypothesis import given, settings
from hypothesis import strategies as st

import peft_jax as peft
from peft_jax._numerics import Layout, as_stored, halves, pack, unpack, weight_shape

pytestmark = pytest.mark.optimized

FOUR_BITS = ("int4", "q4_0", "q4_0_transpose", "nf4")
METHODS = (*FOUR_BITS, "int8", "sfp8")
every_method = pytest.mark.parametrize("method", METHODS)
dequantize = jax.jit(peft.dequantize)


def drawn(*shape, seed=0):
    return np.random.default_rng((*shape, seed)).normal(size=shape).astype(np.float32)


def assert_same(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(functools.partial(np.testing.assert_array_equal, strict=True), actual, expected)


# --- Packing -------------------------------------------------------------------------------------


@st.composite
def nibbles(draw):
    """Draws codes of four bits of any shape, and an axis."""
    shape = draw(st.lists(st.integers(1, 7), min_size=1, max_size=4))
    codes = np.random.default_rng(shape).integers(0, 16, shape, np.int32)
    return codes, draw(st.integers(-codes.ndim, codes.ndim - 1))


@settings(max_examples=12, deadline=None)
@given(nibbles())
def test_packing_along_any_axis(case):
    codes, axis = case
    length = codes.shape[axis]
    layout = Layout("int4", axis, length)

    @jax.jit
    def there_and_back(codes):
        packed = pack(codes, axis)
        return packed, unpack(packed, layout)

    packed, found = there_and_back(codes)
    assert packed.dtype == found.dtype == jnp.uint8
    np.testing.assert_array_equal(found, codes)
    assert packed.shape[axis] == -(-length // 2)
    assert layout.shape(packed.shape) == codes.shape
    low, high = (
        np.take(codes, range(*ends), axis)
        for ends in ((packed.shape[axis],), (packed.shape[axis], length))
    )
    np.testing.assert_array_equal(packed & 15, low)
    np.testing.assert_array_equal(np.take(packed >> 4, range(length // 2), axis), high)
    if length % 2:
        assert not np.any(np.take(packed >> 4, [-1], axis))


def test_every_byte_unpacks():
    every = np.arange(256, dtype=np.uint8)
    low, high = (
        np.tile(np.arange(16, dtype=np.uint8), 16),
        np.repeat(np.arange(16, dtype=np.uint8), 16),
    )
    assert_same(jax.jit(halves)(every), (low, high))
    found = jax.jit(unpack, static_argnums=1)(every, Layout("int4", 0, 512))
    assert_same(found, np.concatenate([low, high]))


@pytest.mark.parametrize(
    ("shape", "axes", "axis"),
    [
        ((6, 4), (0,), -2),  # contracted axes first: products run along them
        ((6, 4), (1,), -1),
        ((5, 4), (0,), -1),  # but even ones before
        ((5, 7), (0,), -2),
        ((4, 6, 8), (0, 1), -2),
        ((8, 6, 4), (0, 1), -3),
        ((3, 5, 7), (0, 1), -2),
        ((2, 3, 5, 7), (1, 2), -4),
        ((1, 1), (0,), -2),
        ((9,), (0,), -1),
    ],
)
def test_values_share_bytes_along_the_longest_even_contracted_axis(shape, axes, axis):
    values, _ = jax.eval_shape(lambda: peft.quantize(jnp.ones(shape), "int4", axes))
    assert values.layout == Layout("int4", axis, shape[axis])
    assert values.array.shape[axis] == -(-shape[axis] // 2)
    assert (values.shape, values.ndim, values.size) == (shape, len(shape), np.prod(shape))


@pytest.mark.parametrize("shape", [(6, 4), (5, 4), (3, 5), (1, 1)])
def test_even_and_odd_lengths_keep_their_numbers(shape):
    values, scale = peft.quantize(drawn(*shape), "int4")
    numbers = np.asarray(dequantize(values, np.ones((1, 1), np.float32)))
    np.testing.assert_array_equal(numbers, np.rint(drawn(*shape) / np.asarray(scale)))


@every_method
def test_bytes_on_the_device(method):
    values, scale = peft.quantize(drawn(64, 32), method)
    bits = 4 if method in FOUR_BITS else 8
    assert values.array.dtype == (jnp.int8 if method == "int8" else jnp.uint8)
    assert values.nbytes == values.array.on_device_size_in_bytes() == 64 * 32 * bits / 8
    scales = {"q4_0": 64 * 2, "q4_0_transpose": 2 * 32 * 2}
    assert scale.on_device_size_in_bytes() == scales.get(method, 32 * 4)
    if method.startswith("q4_0"):
        assert 8 * (values.nbytes + scale.nbytes) == 4.5 * values.size


# --- Names ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_names_say_the_layout(method):
    packed = [Layout(method, axis, length) for axis in (-3, -1, 0, 2) for length in (5, 6)]
    for layout in (Layout(method), *packed):
        stored = as_stored({str(layout): np.zeros((3, 3, 3), np.uint8)})
        assert (stored.layout, stored.method) == (layout, method)
        lengths = [3, 3, 3]
        if layout.axis is not None:
            lengths[layout.axis] = layout.length
        assert stored.shape == tuple(lengths)
        assert dequantize(stored, np.ones((1, 1, 1), np.float32)).shape == stored.shape


def test_names_are_those_that_files_hold():
    """Written files outlive versions: these names do not change."""
    names = {method: str(peft.quantize(drawn(64, 32), method)[0].layout) for method in METHODS}
    assert names == {
        "int4": "int4_axis-2_len64",
        "q4_0": "q4_0_axis-2_len64",
        "q4_0_transpose": "q4_0_transpose_axis-2_len64",
        "nf4": "nf4_axis-2_len64",
        "int8": "int8",
        "sfp8": "sfp8",
    }
    assert str(peft.quantize(drawn(3, 5), "int4")[0].layout) == "int4_axis-2_len3"


@pytest.mark.parametrize("shape", [(31, 32), (33, 32), (16, 32), (32,), (32, 2, 32)], ids=str)
def test_arrays_that_were_cut_or_stacked_do_not_fit_the_name(shape):
    """Cut along the packed axis, values would be paired with others: never silently wrong."""
    stored = {"int4_axis-2_len64": np.zeros(shape, np.uint8)}
    with pytest.raises(ValueError, match=r"does not hold 64 values along axis -2"):
        weight_shape(stored)
    with pytest.raises(ValueError, match=r"does not hold 64 values along axis -2"):
        peft.dequantize(stored, np.ones((1,) * len(shape), np.float32))


NAMES_OF_OTHERS = (
    "",
    "Kernel",
    "kernel",
    "embedding",
    "scale",
    "4bit",
    "int5",
    "int4-axis",
    "int8 ",
)


@pytest.mark.parametrize("name", [*NAMES_OF_OTHERS, "int4_axis-2", "int4_axis_len4"])
def test_names_of_others(name):
    """A layer's only parameter may be of integers, and is not stored values then."""
    assert as_stored({name: np.zeros((2, 2), np.uint8)}) is None


@pytest.mark.parametrize(
    "value",
    [
        np.zeros((2, 2), np.uint8),
        {},
        {"int8": np.zeros((2, 2), np.float32)},
        {"int8": np.zeros((2, 2), np.int32)},
        {"int8": None},
        {"int8": np.zeros((2, 2), np.int8), "scale": np.ones((1, 2), np.float32)},
        {8: np.zeros((2, 2), np.int8)},
        None,
        "int8",
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_not_stored(value):
    assert as_stored(value) is None


def test_dicts_are_stored_values_too():
    values, scale = peft.quantize(drawn(64, 32), "q4_0")
    assert as_stored(values) is values
    name = str(values.layout)
    for held in ({name: values.array}, flax.core.FrozenDict({name: np.asarray(values.array)})):
        stored = as_stored(held)
        assert_same(stored, values)
        assert weight_shape(held) == weight_shape(values) == (64, 32)
        assert_same(dequantize(stored, scale), dequantize(values, scale))
    shapes = jax.eval_shape(lambda: peft.quantize(jnp.ones((64, 32)), "q4_0"))[0]
    assert weight_shape({name: shapes.array}) == (64, 32)
    assert weight_shape(np.ones((3, 4))) == (3, 4)


# --- A node of trees -----------------------------------------------------------------------------


@every_method
def test_a_node_with_one_leaf(method):
    values, _ = peft.quantize(drawn(64, 32), method)
    leaves = jax.tree.leaves_with_path({"layer": {"kernel": values}})
    assert len(leaves) == 1
    path, leaf = leaves[0]
    assert leaf is values.array
    key = jax.tree_util.DictKey
    assert path == (key("layer"), key("kernel"), key(str(values.layout)))
    assert jax.tree_util.keystr(path, simple=True, separator="/") == f"layer/kernel/{values.layout}"
    doubled = jax.tree.map(lambda array: array + array, {"kernel": values})["kernel"]
    assert isinstance(doubled, peft.StoredValues)
    assert doubled.layout == values.layout
    assert jax.tree.structure(doubled) == jax.tree.structure(values)
    assert_same(jax.tree.unflatten(jax.tree.structure(values), [leaf]), values)
    assert hash(jax.tree.structure(values)) == hash(jax.tree.structure(doubled))


def test_layouts_do_not_mix():
    """Values that lie differently are different nodes, of arrays of one shape too."""
    values, _ = peft.quantize(drawn(64, 32), "int4")
    for layout in (Layout("nf4", -2, 64), Layout("int4", -1, 64), Layout("int4", -2, 63)):
        with pytest.raises(ValueError, match=r"int4_axis-2|method='int4', axis=-2"):
            jax.tree.map(lambda a, b: a, values, peft.StoredValues(layout, values.array))


@every_method
def test_into_and_out_of_jit_without_retracing(method):
    traces = []

    @jax.jit
    def through(stored):
        traces.append(None)
        values, scale = stored
        return values, peft.dequantize(values, scale)

    for seed in range(3):
        values, scale = peft.quantize(drawn(64, 32, seed=seed), method)
        out, numbers = through((values, scale))
        assert_same(out, values)
        assert numbers.shape == values.shape
    assert len(traces) == 1


@every_method
def test_scan_and_vmap_take_slices(method):
    axes = -2 if method in ("int4", "int8", "sfp8") else None

    @jax.jit
    def loops(x):
        def body(carry, stored):
            weight = peft.dequantize(*stored)
            return carry, (weight, peft.quantize(weight, method))

        stacked = peft.quantize(x, method, axes)
        _, (weights, again) = jax.lax.scan(body, 0, stacked)
        fresh = jax.lax.map(lambda weight: peft.quantize(weight, method), x)
        mapped = jax.vmap(peft.dequantize)(*stacked)
        return stacked, again, fresh, weights, mapped, peft.dequantize(*stacked)

    stacked, again, fresh, weights, mapped, expected = loops(drawn(3, 64, 32))
    assert_same((weights, mapped), (expected, expected))
    assert_same(fresh, stacked)
    assert jax.tree.structure(again) == jax.tree.structure(stacked)
    for i in range(3):
        one = jax.tree.map(lambda array: np.asarray(array)[i], stacked)  # noqa: B023
        assert one[0].shape == (64, 32)
        assert_same(dequantize(*one), expected[i])


def test_slices_of_a_stack_along_a_later_axis():
    """There the packed axis is counted from the front, and slices keep their meaning too."""
    x = drawn(8, 3, 5)
    codes = np.random.default_rng(0).integers(0, 16, x.shape, np.int32)
    values = peft.StoredValues(Layout("int4", 0, 8), pack(codes, 0))
    scale = drawn(1, 3, 5)
    expected = (codes.astype(np.float32) - 8) * scale
    assert_same(dequantize(values, scale), expected)
    assert_same(jax.jit(jax.vmap(peft.dequantize, (1, 1), 1))(values, scale), expected)


def test_copies():
    values, _ = peft.quantize(drawn(64, 32), "nf4")
    for copied in (copy.copy(values), copy.deepcopy(values), pickle.loads(pickle.dumps(values))):
        assert_same(copied, values)


@pytest.mark.parametrize("method", ["int4", "sfp8"])
def test_shapes_without_arrays(method):
    values, scale = jax.eval_shape(lambda: peft.quantize(jnp.ones((64, 32)), method))
    real, real_scale = peft.quantize(drawn(64, 32), method)
    assert (values.shape, values.size, values.ndim) == ((64, 32), 64 * 32, 2)
    assert values.layout == real.layout
    assert values.nbytes == real.nbytes
    assert (scale.shape, scale.dtype) == (real_scale.shape, real_scale.dtype)
    assert jax.eval_shape(peft.dequantize, values, scale).shape == (64, 32)


def test_repr():
    values, _ = peft.quantize(drawn(64, 32), "q4_0")
    assert repr(values) == "StoredValues(q4_0_axis-2_len64, uint8[32, 32])"
    assert repr(jax.eval_shape(lambda: values)) == repr(values)
    assert repr(jax.tree.map(lambda _: 1, values)) == "StoredValues('q4_0_axis-2_len64', 1)"
    assert "q4_0" in repr({"kernel": values})
    assert "q4_0_axis-2_len64" in str(jax.tree.structure({"kernel": values}))


# --- Not an array --------------------------------------------------------------------------------

READERS = {
    "numpy": np.asarray,
    "numpy, dtype": lambda values: np.asarray(values, np.float32),
    "numpy function": lambda values: np.dot(np.ones((2, 64)), values),
    "jnp.asarray": jnp.asarray,
    "jnp function": lambda values: jnp.dot(np.ones((2, 64), np.float32), values),
    "product": lambda values: jnp.ones((2, 64)) @ values,
    "sum": lambda values: jnp.ones((64, 32)) + values,
    "einsum": lambda values: jnp.einsum("bi,io->bo", np.ones((2, 64), np.float32), values),
    "jit": lambda values: jax.jit(lambda values: jnp.sum(values))(values),
}


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_reading_as_an_array_is_refused(read):
    values, _ = peft.quantize(drawn(64, 32), "int4")
    remedy = r"stored int4 values as if .*Wrap the layer .*dequantize_checkpoint"
    with pytest.raises(ValueError, match=remedy):
        read(values)


class Reader(nn.Module):
    """A module that knows nothing of stored values."""

    @nn.compact
    def __call__(self, x):
        return x @ self.variables["params"]["kernel"]


class Model(nn.Module):
    """Holds a reader."""

    @nn.compact
    def __call__(self, x):
        return Reader(name="head")(x)


def test_the_error_names_the_module_that_reads():
    values, _ = peft.quantize(drawn(64, 32), "int4")
    for model, params, place in (
        (Model(), {"head": {"kernel": values}}, "Reader at 'head'"),
        (Reader(), {"kernel": values}, r"Reader at '\(the model itself\)'"),
    ):
        with pytest.raises(ValueError, match=place):
            model.apply({"params": params}, jnp.ones((2, 64)))

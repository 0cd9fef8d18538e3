"""Affine grids, against numpy: the same steps in float32, and the mathematics in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, rounding
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_jax.quantsim import _grid as grid

pytestmark = pytest.mark.optimized

EPSILON = 2.0**-23
BITWIDTHS = (2, 3, 4, 8, 16)
SHARING = {  # shapes of scales for values of (8, 12)
    "tensor": (1, 1),
    "row": (8, 1),
    "column": (1, 12),
    "blocks": (8, 3),
    "tiles": (4, 6),
    "each": (8, 12),
}
every_bitwidth = pytest.mark.parametrize("bitwidth", BITWIDTHS)
every_kind = pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
every_sharing = pytest.mark.parametrize("shape", SHARING.values(), ids=SHARING.keys())
compiled = jax.jit(grid.fake_quantize, static_argnums=3)


def draw(shape=(8, 12), seed=0):
    rng = np.random.default_rng(seed)
    return (rng.normal(size=shape) * np.exp(rng.normal(size=shape))).astype(np.float32)


def repeated(factor, shape):
    for axis, length in enumerate(shape):
        factor = np.repeat(factor, length // factor.shape[axis], axis)
    return factor


def summed(values, shape):
    """Sums over the values that share a scale."""
    split = [part for n, m in zip(values.shape, shape, strict=True) for part in (m, n // m)]
    return values.reshape(split).sum(tuple(range(1, len(split), 2)))


def ends(x, shape):
    split = [part for n, m in zip(x.shape, shape, strict=True) for part in (m, n // m)]
    blocks = x.reshape(split)
    axes = tuple(range(1, len(split), 2))
    return blocks.min(axes), blocks.max(axes)


def tight_grid(x, shape, bitwidth, symmetric):
    """A grid for the middle of the values, which clips the rest."""
    low, high = ends(x, shape)
    return grid.scale_and_offset(0.6 * low, 0.6 * high, bitwidth, symmetric)


def numpy_codes(x, scale, offset, bitwidth):
    inverse = np.float32(1) / repeated(scale, x.shape)
    return np.clip(np.rint(x * inverse) - repeated(offset, x.shape), 0, 2**bitwidth - 1)


def numpy_fake_quantize(x, scale, offset, bitwidth):
    code = numpy_codes(x, scale, offset, bitwidth)
    return (code + repeated(offset, x.shape)) * repeated(scale, x.shape)


# --- Scale and offset ----------------------------------------------------------------------------

numbers = st.floats(-(2.0**60), 2.0**60, width=32, allow_subnormal=False)


def float64_grid(low, high, bitwidth, symmetric):
    """The formula in float64; the offset before it is rounded."""
    n, below = 2**bitwidth - 1, 2 ** (bitwidth - 1)
    low, high = min(low, 0.0), max(high, 0.0)
    short = (high - low) / n < EPSILON
    if not symmetric:
        scale = (high + short * n * EPSILON - low) / n
        return scale, np.clip(low / scale, -n, 0)
    high, low = high + short * (below - 1) * EPSILON, low - short * below * EPSILON
    return max(high / (below - 1 if bitwidth > 2 else 2), -low / below), -below


@every_kind
@given(low=numbers, high=numbers, bitwidth=st.sampled_from(range(2, 17)))
@settings(max_examples=300, deadline=None)
def test_scale_and_offset_follow_the_formula(symmetric, low, high, bitwidth):
    low, high = min(low, high), max(low, high)
    scale, offset = grid.scale_and_offset(np.float32(low), np.float32(high), bitwidth, symmetric)
    expected, position = float64_grid(low, high, bitwidth, symmetric)
    assert scale == pytest.approx(expected, rel=1e-6)
    assert scale.dtype == offset.dtype == np.float32
    assert offset == np.rint(offset)
    assert abs(offset - position) <= 0.5 + 1e-6 * abs(position)
    first, last = grid.grid_range(scale, offset, bitwidth)
    assert first <= 0 <= last
    if symmetric and bitwidth == 2:
        return  # two bits clip by design
    assert first <= low + 0.5001 * scale
    assert last >= high - 0.5001 * scale


@every_kind
@every_bitwidth
def test_scale_and_offset_inside_jit_differ_by_rounding_alone(bitwidth, symmetric):
    x = draw((64, 8))
    low, high = x.min(1), x.max(1)
    plain = grid.scale_and_offset(low, high, bitwidth, symmetric)
    traced = jax.jit(grid.scale_and_offset, static_argnums=(2, 3))(low, high, bitwidth, symmetric)
    assert all(isinstance(array, np.ndarray) for array in plain)
    np.testing.assert_allclose(traced[0], plain[0], rtol=5e-7)
    assert np.all(np.abs(np.asarray(traced[1]) - plain[1]) <= 1)


@every_kind
@pytest.mark.parametrize(
    ("low", "high"), [(0.0, 0.0), (1e-9, 2e-9), (-1e-30, 0.0), (3.0, 3.0), (-2.0, -1.0)]
)
def test_zero_is_a_value_of_every_grid(low, high, symmetric):
    scale, offset = grid.scale_and_offset(np.float32(low), np.float32(high), 8, symmetric)
    assert scale >= EPSILON
    assert not np.signbit(offset) or offset < 0
    zero = grid.fake_quantize(jnp.zeros(()), scale, offset, 8)
    assert zero == 0


@pytest.mark.parametrize(
    ("low", "high"),
    [(np.nan, 1), (0, np.nan), (-np.inf, 0), (0, np.inf), (np.inf, -np.inf), (2, 1), (-3e38, 3e38)],
)
@every_kind
def test_ranges_that_no_grid_covers_are_refused(low, high, symmetric):
    lows, highs = np.array([[-1, low]], np.float32), np.array([[1, high]], np.float32)
    with pytest.raises(ValueError, match=r"finite range.*at \(0, 1\).*Calibrate"):
        grid.scale_and_offset(lows, highs, 8, symmetric)


@pytest.mark.parametrize("bitwidth", [1, 17, 0, -4, 7.5, True, "8"])
def test_bitwidths_are_whole_numbers_from_2_to_16(bitwidth):
    with pytest.raises(ValueError, match="2 to 16 bits, got bitwidth="):
        grid.scale_and_offset(np.float32(-1), np.float32(1), bitwidth, True)
    x = jnp.ones((2,))
    with pytest.raises(ValueError, match="2 to 16 bits, got bitwidth="):
        grid.fake_quantize(x, x, x, bitwidth)


# --- Values --------------------------------------------------------------------------------------


def assert_is_numpys(function, x, shape, bitwidth, symmetric):
    scale, offset = tight_grid(x, shape, bitwidth, symmetric)
    actual = function(jnp.asarray(x), scale, offset, bitwidth)
    np.testing.assert_array_equal(actual, numpy_fake_quantize(x, scale, offset, bitwidth))


@every_sharing
@every_kind
def test_scales_serve_blocks(symmetric, shape):
    for function in (grid.fake_quantize, compiled):
        assert_is_numpys(function, draw(), shape, 4, symmetric)


@every_kind
@every_bitwidth
def test_compiling_changes_no_bit(bitwidth, symmetric):
    """Nor whether scales are known to the compiler."""
    x = np.random.default_rng(0).uniform(-1, 1, (500, 128)).astype(np.float32)

    def closed_over(x, scale, offset, bitwidth):
        return jax.jit(lambda x: grid.fake_quantize(x, scale, offset, bitwidth))(x)

    for function in (grid.fake_quantize, compiled, closed_over):
        assert_is_numpys(function, x, (500, 4), bitwidth, symmetric)


@every_kind
@every_bitwidth
def test_codes_are_numpys(bitwidth, symmetric):
    x = draw()
    scale, offset = tight_grid(x, (4, 6), bitwidth, symmetric)
    codes = grid.codes(jnp.asarray(x), scale, offset, bitwidth)
    assert codes.dtype == jnp.int32
    np.testing.assert_array_equal(codes, numpy_codes(x, scale, offset, bitwidth))


@every_kind
@every_bitwidth
def test_values_go_to_the_nearest_one_of_the_grid(bitwidth, symmetric):
    x = draw((2000,))
    scale, offset = tight_grid(x, (1,), bitwidth, symmetric)
    points = np.sort((np.arange(2**bitwidth) + np.float64(offset)) * np.float64(scale))
    after = np.searchsorted(points, x).clip(1, len(points) - 1)
    nearest = np.minimum(np.abs(x - points[after - 1]), np.abs(x - points[after]))
    actual = np.abs(x - np.float64(grid.fake_quantize(jnp.asarray(x), scale, offset, bitwidth)))
    np.testing.assert_allclose(actual, nearest, rtol=0, atol=3e-7 * np.abs(x).max())


@every_kind
@every_bitwidth
def test_values_of_the_grid_stay(bitwidth, symmetric):
    scale, offset = grid.scale_and_offset(*np.float32([[-1.7], [2.9]]), bitwidth, symmetric)
    code = np.arange(2**bitwidth)
    points = (code.astype(np.float32) + offset) * scale
    np.testing.assert_array_equal(grid.codes(jnp.asarray(points), scale, offset, bitwidth), code)
    again = grid.fake_quantize(jnp.asarray(points), scale, offset, bitwidth)
    np.testing.assert_array_equal(again, points)
    first, last = grid.grid_range(scale, offset, bitwidth)
    np.testing.assert_array_equal([first[0], last[0]], points[[0, -1]])


def test_halves_go_to_even_codes():
    x = jnp.array([0.5, 1.5, 2.5, 3.5])
    np.testing.assert_array_equal(grid.codes(x, jnp.ones(1), jnp.zeros(1), 4), [0, 2, 2, 4])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_floats_are_rounded_once(dtype):
    x = jnp.asarray(draw()).astype(dtype)
    wide = np.asarray(x.astype(jnp.float32))
    scale, offset = tight_grid(wide, (8, 1), 8, False)
    actual = grid.fake_quantize(x, scale, offset, 8)
    assert actual.dtype == dtype
    expected = numpy_fake_quantize(wide, scale, offset, 8)
    np.testing.assert_array_equal(actual, jnp.asarray(expected).astype(dtype))


def test_nan_stays_and_infinity_is_clipped():
    x = jnp.array([jnp.nan, jnp.inf, -jnp.inf, 1e38])
    actual = grid.fake_quantize(x, jnp.full(1, 0.5), jnp.full(1, -4.0), 3)
    np.testing.assert_array_equal(actual, [np.nan, 1.5, -2.0, 1.5])


@pytest.mark.parametrize("shape", [(), (12,), (8, 5), (1, 1, 1), (0, 1)])
def test_scales_that_do_not_fit_are_refused(shape):
    factor = jnp.ones(shape)
    with pytest.raises(ValueError, match=r"does not fit values of shape \(8, 12\)"):
        grid.fake_quantize(jnp.ones((8, 12)), factor, factor, 8)


def test_offsets_go_with_scales():
    with pytest.raises(ValueError, match=r"\(8, 1\) of scales and \(1, 1\) of offsets"):
        grid.codes(jnp.ones((8, 12)), jnp.ones((8, 1)), jnp.ones((1, 1)), 8)


# --- Gradients -----------------------------------------------------------------------------------


def numpy_gradients(x, scale, offset, bitwidth, cotangent):
    """LSQ+ as it is written in the papers."""
    s, o = (repeated(np.float64(factor), x.shape) for factor in (scale, offset))
    ratio = x / s
    code = np.rint(ratio) - o
    clipped = np.clip(code, 0, 2**bitwidth - 1)
    inside = code == clipped
    to_scale = np.where(inside, np.rint(ratio) - ratio, clipped + o) * cotangent
    to_offset = np.where(inside, 0, s) * cotangent
    return inside * cotangent, summed(to_scale, scale.shape), summed(to_offset, scale.shape)


@functools.partial(jax.jit, static_argnums=3)
def gradients(x, scale, offset, bitwidth, cotangent):
    _, back = jax.vjp(lambda *arrays: grid.fake_quantize(*arrays, bitwidth), x, scale, offset)
    return back(cotangent)


@every_kind
@pytest.mark.parametrize(
    ("shape", "bitwidth"), [*((shape, 4) for shape in SHARING.values()), ((8, 3), 2), ((8, 3), 8)]
)
def test_gradients_are_those_of_lsq(shape, bitwidth, symmetric):
    x, cotangent = draw(), draw(seed=1)
    scale, offset = tight_grid(x, shape, bitwidth, symmetric)
    expected = numpy_gradients(x, scale, offset, bitwidth, cotangent)
    arrays = [jnp.asarray(array) for array in (x, scale, offset)]
    actual = gradients(*arrays, bitwidth, cotangent)
    for ours, theirs in zip(actual, expected, strict=True):
        size = np.abs(theirs).max(initial=1)
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5 * size)


def test_gradients_of_clipped_values_are_derivatives():
    """Where values are clipped, nothing is estimated: finite differences say the same."""
    x = jnp.array([-9.0, 9.0, 20.0])
    scale, offset = jnp.array([0.25]), jnp.array([-3.0])
    cotangent = jnp.array([1.0, 0.5, -2.0])

    def loss(scale, offset):  # with an offset that is not rounded
        return np.sum(cotangent * (np.clip(np.rint(x / scale) - offset, 0, 15) + offset) * scale)

    _, to_scale, to_offset = gradients(x, scale, offset, 4, cotangent)
    step = 2.0**-10
    steps = np.float64([[step, 0], [0, step]])
    at = np.float64([scale[0], offset[0]])
    expected = [(loss(*(at + by)) - loss(*(at - by))) / (2 * step) for by in steps]
    np.testing.assert_allclose([to_scale[0], to_offset[0]], expected, rtol=1e-6)


def test_training_the_scale_lowers_the_error():
    x = jnp.asarray(np.random.default_rng(0).normal(size=512).astype(np.float32))
    scale, offset = jnp.full(1, 4.0), jnp.full(1, -4.0)

    def error(scale):
        return jnp.mean((grid.fake_quantize(x, scale, offset, 3) - x) ** 2)

    step = jax.jit(lambda scale: scale - 0.1 * jax.grad(error)(scale))
    trained = functools.reduce(lambda scale, _: step(scale), range(100), scale)
    assert error(trained) < 0.1 * error(scale)


def test_gradients_have_the_dtypes_of_the_arrays():
    x = jnp.asarray(draw()).astype(jnp.bfloat16)
    scale, offset = (jnp.asarray(leaf) for leaf in tight_grid(draw(), (8, 1), 8, False))
    found = gradients(x, scale, offset, 8, jnp.ones_like(x))
    assert [array.dtype for array in found] == [jnp.bfloat16, jnp.float32, jnp.float32]


def test_nothing_larger_than_the_values_is_kept():
    x = jnp.asarray(draw((64, 32))).astype(jnp.bfloat16)
    scale, offset = (jnp.full((64, 1), value) for value in (0.1, -7.0))
    _, back = jax.vjp(lambda *arrays: grid.fake_quantize(*arrays, 4), x, scale, offset)
    kept = sum(leaf.nbytes for leaf in jax.tree.leaves(back))
    assert x.nbytes <= kept <= x.nbytes + scale.nbytes + offset.nbytes


# --- Transformations -----------------------------------------------------------------------------


def test_vmap_is_a_loop():
    x, cotangent = jnp.asarray(draw((3, 8, 12))), jnp.asarray(draw((3, 8, 12), 1))
    low, high = np.min(x, 2, keepdims=True), np.max(x, 2, keepdims=True)
    scale, offset = (jnp.asarray(leaf) for leaf in grid.scale_and_offset(low, high, 4, False))

    def everything(x, scale, offset, cotangent):
        return compiled(x, scale, offset, 4), *gradients(x, scale, offset, 4, cotangent)

    arrays = x, scale, offset, cotangent
    for i, row in enumerate(zip(*jax.vmap(everything)(*arrays), strict=True)):
        alone = everything(*(array[i] for array in arrays))
        for ours, theirs in zip(row, alone, strict=True):
            assert_close(ours, theirs, rounding(12))


def test_scan_carries_gradients_through():
    x = jnp.asarray(draw())
    scale, offset = jnp.array([0.5, 0.25, 1.0]), jnp.array([-8.0, -5.0, -7.0])

    def layer(x, leaves):
        scale, offset = (leaf.reshape(1, 1) for leaf in leaves)
        return 0.9 * grid.fake_quantize(x, scale, offset, 4), None

    def scanned(scale, offset):
        return jnp.sum(jax.lax.scan(layer, x, (scale, offset))[0] ** 2)

    def unrolled(scale, offset):
        y = x
        for leaves in zip(scale, offset, strict=True):
            y, _ = layer(y, leaves)
        return jnp.sum(y**2)

    actual = jax.jit(jax.grad(scanned, (0, 1)))(scale, offset)
    expected = jax.grad(unrolled, (0, 1))(scale, offset)
    assert all(np.any(np.asarray(array) != 0) for array in expected)
    for ours, theirs in zip(actual, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)

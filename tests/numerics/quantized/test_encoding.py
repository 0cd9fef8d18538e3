import functools
import statistics

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_rounded, partly_slow
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import peft_jax as peft
from peft_jax._numerics import METHODS as TABLE
from peft_jax._numerics import Layout, halves

pytestmark = pytest.mark.optimized

BLOCKS = {"q4_0": (-1, 32), "q4_0_transpose": (-2, 32), "nf4": (-2, 64)}
CHANNELS = ("int4", "int8", "sfp8")
METHODS = (*CHANNELS, *BLOCKS)
every_method = pytest.mark.parametrize("method", METHODS)
DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16]
every_dtype = pytest.mark.parametrize("dtype", DTYPES)

# --- The methods again, in numpy -----------------------------------------------------------------
# From rows, each a group of values that share a scale, to codes and scales.

TINY = 1e-36  # smaller groups count as zeros


def peak_of(rows):
    return np.max(np.abs(rows), -1, keepdims=True)


def inverse(x):
    return np.divide(1, x, out=np.zeros_like(x), where=np.abs(x) >= TINY / 8)


def numpy_integers(rows, largest, offset):
    """As gemma.peft: the factor is rounded, then the product, then to the nearest even integer."""
    peak = peak_of(rows)
    factor = np.float32(largest) * np.where(peak < TINY, np.float32(0), inverse(peak))
    return np.rint(rows * factor) + offset, np.where(peak < TINY, 0, peak / np.float64(largest))


def numpy_q4_0(rows):
    """As GGML's C code: float32 without fused operations; the first largest value leads."""
    lead = np.take_along_axis(rows, np.argmax(np.abs(rows), -1, keepdims=True), -1)
    d = np.where(lead == 0, np.float32(0), lead) / np.float32(-8)
    return np.minimum(15, np.trunc(rows * inverse(d) + np.float32(8.5))), d.astype(np.float16)


def nf4_book():
    """The quantiles of the paper's appendix E, more of them for positive numbers."""
    quantile = statistics.NormalDist().inv_cdf
    positive = [quantile(p) for p in np.linspace(0.9677083, 0.5, 9)[:-1]]
    negative = [-quantile(p) for p in np.linspace(0.9677083, 0.5, 8)[:-1]]
    return np.sort([*negative, 0.0, *positive]) / positive[0]


BOOK = nf4_book()


def numpy_nf4(rows):
    """The nearest entry, by trying all; NaN where two are nearly as near."""
    peak = peak_of(rows).astype(np.float64)
    away = np.abs((rows / np.where(peak < TINY, np.inf, peak))[..., None] - BOOK)
    nearest = np.sort(away, -1)
    doubtful = nearest[..., 1] - nearest[..., 0] < 1e-6
    return np.where(doubtful, np.nan, np.argmin(away, -1)), np.where(peak < TINY, 0, peak)


def sfp8_number(code):
    """gemma.cpp's switching float: a sign, a switch between two sizes, exponent and mantissa."""
    bits, bias = (3, 15) if code & 64 else (2, 23)
    exponent, mantissa = divmod(code & 127, 2**bits)
    size = (1 + mantissa / 2**bits) * 2.0 ** (exponent - bias) if code & 127 else 0.0
    return -size if code & 128 else size


# Below 2^-20 gemma.peft's simulation takes even steps, and the smallest number below the first.
STEP = 2.0**-22
GRID_CODES = np.array([0, 1, 4, 8, 10, *range(12, 128)])
GRID = np.array([sfp8_number(int(code)) for code in GRID_CODES])
GRID_IS_EVEN = np.array([True, True, False, True, False, *(GRID_CODES[5:] % 2 == 0)])
MIDDLES = np.array([0.46875 * STEP, 0.625 * STEP, *(GRID[2:-1] + GRID[3:]) / 2])


def numpy_sfp8(rows):
    """The nearest magnitude of the grid; ties go to the even one."""
    peak = peak_of(rows)
    scaled = rows * (np.float32(1.875) / np.maximum(peak, np.float32(1e-6)))
    size = np.minimum(np.abs(scaled), np.float32(1.875)).astype(np.float64)
    at = np.searchsorted(MIDDLES, size, side="right")
    at = at - ((at > 2) & (size == MIDDLES[at - 1]) & ~GRID_IS_EVEN[at])
    codes = GRID_CODES[at] + np.where((at > 0) & (rows < 0), 128, 0)
    return codes, np.where(peak == 0, 0, np.maximum(peak, 1e-6) / np.float64(1.875))


REFERENCE = {
    "int4": functools.partial(numpy_integers, largest=7, offset=8),
    "int8": functools.partial(numpy_integers, largest=127, offset=0),
    "q4_0": numpy_q4_0,
    "q4_0_transpose": numpy_q4_0,
    "nf4": numpy_nf4,
    "sfp8": numpy_sfp8,
}


def numpy_quantize(x, method, axes=(-2,)):
    """Codes, NaN where they are in doubt, and scale."""
    if method in BLOCKS:
        axis, length = BLOCKS[method]
        moved = np.moveaxis(x, axis, -1)
        codes, scale = REFERENCE[method](moved.reshape(*moved.shape[:-1], -1, length))
        return np.moveaxis(codes.reshape(moved.shape), -1, axis), np.moveaxis(
            scale[..., 0], -1, axis
        )
    axes = sorted(axis % x.ndim for axis in axes)
    last = range(-len(axes), 0)
    moved = np.moveaxis(x, axes, last)
    kept = moved.shape[: -len(axes)]
    codes, scale = REFERENCE[method](moved.reshape(*kept, -1))
    return (
        np.moveaxis(codes.reshape(moved.shape), last, axes),
        np.expand_dims(scale.reshape(kept), axes),
    )


def numpy_codes(values):
    """The codes in stored values, as `Layout` describes them."""
    array, axis = np.asarray(values.array), values.layout.axis
    if axis is None:
        return array
    both = np.concatenate([array & 15, array >> 4], axis)
    return np.take(both, range(2 * array.shape[axis] - values.layout.odd), axis)


@functools.cache
def numbers(method):
    """The number of each code, in float32: read from the library, and tested below."""
    four_bits = method in BLOCKS or method == "int4"
    codes = np.arange(16 if four_bits else 256).astype(np.int8 if method == "int8" else np.uint8)
    stored = peft.StoredValues(Layout(method), codes)
    return np.asarray(dequantize_compiled(stored, np.ones((1,), np.float32)))


def numpy_dequantize(values, scale):
    """Number times scale, rounded once to float32."""
    factors = np.asarray(scale).astype(np.float32)
    for axis, (n, m) in enumerate(zip(values.shape, factors.shape, strict=True)):
        factors = np.repeat(factors, n // m, axis)
    return numbers(values.method)[numpy_codes(values)] * factors


def assert_numpys(x, method, values, scale, axes=(-2,)):
    """The codes of the reference, and its scale: Q4_0's bit for bit, others up to roundings."""
    codes, expected = numpy_quantize(np.asarray(x).astype(np.float32), method, axes)
    assert values.shape == np.shape(x)
    certain = ~np.isnan(codes)
    np.testing.assert_array_equal(numpy_codes(values)[certain], codes[certain])
    if scale.dtype == jnp.float16:
        assert_same_bits(scale, expected)
    else:
        assert scale.dtype == jnp.float32
        np.testing.assert_allclose(scale, expected, rtol=3e-7, atol=TINY)


def assert_same_bits(actual, expected):
    def compare(actual, expected):
        actual, expected = np.asarray(actual), np.asarray(expected)
        assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
        np.testing.assert_array_equal(
            *(array.view(f"u{array.itemsize}") for array in (actual, expected))
        )

    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(compare, actual, expected)


def assert_sums(found, x, weight):
    """Products of float32, summed in any order."""
    x, weight = np.asarray(x, np.float64), np.asarray(weight, np.float64)
    assert_rounded(found, x @ weight, x.shape[-1])


quantize_compiled = jax.jit(peft.quantize, static_argnames=("method", "axes"))
dequantize_compiled = jax.jit(peft.dequantize, static_argnames=("dtype",))
simulate_compiled = jax.jit(peft.simulate_quantize, static_argnames=("method", "axes"))


def messy(dtype=jnp.float32, shape=(128, 64), seed=0):
    """Rows and columns of many magnitudes, ties, zero rows and columns, and denormal scales."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=shape)
    x[..., ::3] = np.round(4 * x[..., ::3]) / 2
    x *= 10 ** rng.uniform(-1.5, 1.5, (*shape[:-2], shape[-2], 1))
    x *= 10 ** rng.uniform(-1.5, 1.5, (*shape[:-2], 1, shape[-1]))
    x[..., 5, :], x[..., 3] = 0.0, -0.0
    x[..., 6, :] *= 1e-7
    x[..., 4] *= 1e-7
    return x.astype(np.float32).astype(dtype)


# --- Codes, scales and numbers -------------------------------------------------------------------


def test_every_code_has_its_number():
    for method, offset in (("int4", 8), ("q4_0", 8), ("q4_0_transpose", 8)):
        np.testing.assert_array_equal(numbers(method), np.arange(16) - offset)
    np.testing.assert_array_equal(numbers("int8"), np.arange(256).astype(np.int8))
    np.testing.assert_array_equal(numbers("sfp8")[GRID_CODES], GRID)
    every = np.delete(np.arange(256), 128)  # gemma.cpp reserves -0
    np.testing.assert_array_equal(numbers("sfp8")[every], [sfp8_number(int(c)) for c in every])
    np.testing.assert_allclose(numbers("nf4"), BOOK, atol=2e-7)
    assert numbers("nf4")[[0, 7, 15]].tolist() == [-1, 0, 1]


@every_method
def test_codes_scales_and_numbers_are_numpys(method):
    x = messy()
    values, scale = peft.quantize(x, method)
    assert_numpys(x, method, values, scale)
    found = peft.dequantize(values, scale)
    assert_same_bits(found, numpy_dequantize(values, scale))
    for dtype in (jnp.bfloat16, jnp.float16):
        rounded = peft.dequantize(values, scale, dtype)
        assert_same_bits(rounded, np.asarray(found).astype(dtype))


@every_method
def test_compiled_or_not(method):
    x = messy()
    stored = peft.quantize(x, method)
    assert_same_bits(quantize_compiled(x, method=method), stored)
    assert_same_bits(dequantize_compiled(*stored), peft.dequantize(*stored))


@every_method
def test_vmap_quantizes_each(method):
    x = messy(shape=(3, 128, 64))

    @jax.jit
    @jax.vmap
    def mapped(x):
        stored = peft.quantize(x, method)
        return stored, peft.dequantize(*stored), peft.simulate_quantize(x, method)

    each = [peft.quantize(slice_, method) for slice_ in x]
    expected = jax.tree.map(lambda *arrays: np.stack(arrays), *each)
    numbers = np.stack([numpy_dequantize(*stored) for stored in each])
    assert_same_bits(mapped(x), (expected, numbers, numbers))


@pytest.mark.parametrize(
    ("method", "shape"),
    [*((method, (4096, 32)) for method in METHODS), ("int4", (64, 4096)), ("q4_0", (64, 4096))],
)
def test_sums_over_4096_values(method, shape):
    rng = np.random.default_rng(0)
    x = rng.normal(size=shape).astype(np.float32)
    values, scale = peft.quantize(x, method)
    assert_numpys(x, method, values, scale)
    weight = numpy_dequantize(values, scale)
    left = rng.normal(size=(1, shape[0])).astype(np.float32)
    right = rng.normal(size=(shape[1], 1)).astype(np.float32)

    @jax.jit
    def sums(left, right, values, scale):
        weight = peft.dequantize(values, scale)
        products = (left.T * weight).sum(0, keepdims=True), (weight * right.T).sum(1, keepdims=True)
        return weight, (left @ weight, weight @ right), products

    found, *both_ways = sums(left, right, values, scale)
    assert_same_bits(found, weight)
    for across, along in both_ways:
        assert_sums(across, left, weight)
        assert_sums(along.T, right.T, weight.T)


@pytest.mark.parametrize("method", ["int4", *BLOCKS])
def test_sums_over_both_halves_of_4096_values(method):
    """With `float32(int8(codes) - 8)`, jaxlib 0.10.2 computes this sum wrongly on CPU."""
    rng = np.random.default_rng(0)
    values, _ = peft.quantize(rng.normal(size=(4096, 32)).astype(np.float32), method)
    assert values.layout.axis == -2
    x = rng.normal(size=(1, 4096)).astype(np.float32)

    @jax.jit
    def total(x, array):
        first, second = jnp.split(x.T, 2)
        low, high = (TABLE[method].values(codes) for codes in halves(array))
        return (first * low + second * high).sum(0, keepdims=True)

    assert_sums(total(x, values.array), x, numbers(method)[numpy_codes(values)])


# Whole numbers give ties; the factors of the columns go from denormal scales to the largest.
whole = st.integers(-(2**20), 2**20) | st.integers(-16, 16).map(lambda k: 2**16 * k)
powers = st.integers(-60, -2).map(lambda k: 2.0**k) | st.sampled_from([0.0, 0.3, 0.4997])


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(METHODS),
    hnp.arrays(np.float32, (128, 64), elements=whole, fill=whole),
    hnp.arrays(np.float32, (64,), elements=powers, fill=powers),
)
@example("q4_0", np.full((128, 64), -1, np.float32), np.full((64,), 8 * 65504, np.float32))
def test_any_values(method, x, factors):
    x = x * factors
    values, scale = peft.quantize(x, method)
    assert_numpys(x, method, values, scale)
    found = dequantize_compiled(values, scale)
    assert_same_bits(found, numpy_dequantize(values, scale))
    assert_same_bits(peft.simulate_quantize(x, method), found)


def restored(x, method, axes=-1):
    """What an array becomes; for methods per channel, one channel along the axes."""
    stored = peft.quantize(np.float32(x), method, axes if method in CHANNELS else None)
    return np.asarray(dequantize_compiled(*stored))


@pytest.mark.parametrize("lead", [-8.0, 8.0])
def test_ties_of_q4_0_go_up_from_the_leading_value(lead):
    halves = np.arange(-7.5, 8)
    up = (
        np.minimum(np.floor(halves + 0.5), 7) if lead < 0 else np.maximum(np.ceil(halves - 0.5), -7)
    )
    found = restored([lead, *15 * [-lead], *halves], "q4_0")
    np.testing.assert_array_equal(found, [lead, *15 * [-lead * 7 / 8], *up])


@pytest.mark.parametrize("method", ["q4_0", "q4_0_transpose"])
def test_products_and_sums_of_q4_0_are_rounded_apart(method):
    """Near ties, a product that is not rounded before 8.5 is added gives other codes."""
    rng = np.random.default_rng(0)
    d = rng.uniform(0.1, 1, (256, 1)).astype(np.float32)
    ties = np.float32(rng.integers(-7, 8, (256, 32)) - 0.5) * d
    x = ties.view(np.int32) + rng.integers(-4, 5, (256, 32), np.int32)
    x = np.concatenate([-8 * d, x.view(np.float32)[:, 1:]], 1)
    exact = np.trunc(np.float64(x) * inverse(d) + 8.5)
    assert np.mean(exact != numpy_q4_0(x)[0]) > 0.01
    x = x.reshape(128, 64) if method == "q4_0" else x.reshape(64, 128).T
    assert_numpys(x, method, *peft.quantize(x, method))
    assert_numpys(x, method, *quantize_compiled(x, method=method))
    simulated = simulate_compiled(x, method=method)
    assert_same_bits(simulated, numpy_dequantize(*peft.quantize(x, method)))


@pytest.mark.parametrize(("method", "largest"), [("int4", 7), ("int8", 127)])
def test_ties_of_integers_go_to_the_even_one(method, largest):
    halves = np.arange(0.5 - largest, largest)
    values, _ = peft.quantize(np.float32([*halves, largest]), method, -1)
    found = numbers(method)[numpy_codes(values)]
    np.testing.assert_array_equal(found, [*np.rint(halves), largest])


@pytest.mark.parametrize("sign", [-1, 1])
def test_ties_of_sfp8_go_to_the_even_one(sign):
    # From the tests of gemma.cpp, and the coarse numbers of gemma.peft at the end.
    pairs = {0.484375: 0.5, 0.96875: 1, 0.296875: 0.3125, 0.59375: 0.625, 0.279296875: 0.28125}
    pairs |= {0.265625: 0.25, 0.53125: 0.5, 0.0068359375: 0.0068359375, 0.00732421875: 0.0078125}
    pairs |= {0.007568359375: 0.0078125, 1.0625: 1, 0.013841: 0.013671875, 1.875: 1.875}
    pairs |= {STEP: STEP, 0.25 * STEP: 0, 0.46875 * STEP: 0.625 * STEP, 0.5 * STEP: 0.625 * STEP}
    pairs |= {0.625 * STEP: STEP, 1.5 * STEP: 2 * STEP, 2.5 * STEP: 2 * STEP, 3.5 * STEP: 4 * STEP}
    x, expected = sign * np.array([*pairs.items()]).T
    whole_grid = sign * np.array([0, *GRID[2:]])
    found = restored([*x, *whole_grid], "sfp8")
    np.testing.assert_array_equal(found, [*expected, *whole_grid])


def test_nf4_takes_the_nearest_entry():
    book = numbers("nf4")
    middles = (book[:-1] + book[1:]) / 2
    below, above = (np.nextafter(middles, way, dtype=np.float32) for way in (-1, 1))
    x = np.concatenate([book, middles, below, above, [0, 0, 0]])[:, None]
    expected = np.concatenate([book, book[:-1], book[:-1], book[1:], [0, 0, 0]])[:, None]
    np.testing.assert_array_equal(restored(x, "nf4"), expected)
    assert not np.any(np.isnan(numpy_nf4(np.asarray(messy())[:, 0])[0]))


@every_method
def test_errors_are_at_most_half_a_step(method):
    x = np.asarray(messy(), np.float64)
    values, scale = peft.quantize(x, method)
    wide = np.asarray(dequantize_compiled(values, scale), np.float64)
    peaks = np.asarray(scale, np.float64)
    for axis, (n, m) in enumerate(zip(x.shape, scale.shape, strict=True)):
        peaks = np.repeat(peaks, n // m, axis)
    # Half the widest step in units of the scale; Q4_0 cuts off at 7, and rounds its scale.
    widest = {"int4": 0.5, "int8": 0.5, "sfp8": 0.0625, "nf4": 0.1520}.get(method, 1.01)
    assert np.all(np.abs(wide - x) <= widest * np.abs(peaks) * (1 + 1e-5) + 3e-7)


# --- The ends of the range -----------------------------------------------------------------------


@every_method
def test_zero_groups_give_zeros(method):
    for x in (messy(), 0 * messy(), -0 * messy()):
        values, scale = peft.quantize(x, method)
        assert np.all(np.isfinite(scale))
        zero = np.asarray(x) == 0
        assert np.all(np.asarray(peft.dequantize(values, scale))[zero] == 0)
        assert np.all(np.asarray(peft.simulate_quantize(x, method))[zero] == 0)


def ramp(peak):
    return np.float32(peak) * np.linspace(-1, 1, 128 * 64, dtype=np.float32).reshape(128, 64)


@every_method
@pytest.mark.parametrize("peak", [1e-45, 1e-40, 1.2e-38, 1e-37, 9e-37, 1.5e-36, 1e-30])
def test_tiny_groups_are_kept_or_zeros(method, peak):
    x = ramp(peak)
    found = restored(x, method, -2)
    assert np.all((found == 0) | (np.sign(found) == np.sign(x)))
    assert np.all(np.abs(found - x) <= peak)
    if peak == 1e-30 and method not in ("q4_0", "q4_0_transpose", "sfp8"):
        assert np.max(np.abs(found)) == pytest.approx(peak, 1e-6)
    elif peak < TINY:
        assert np.all(found == 0)


@pytest.mark.parametrize("method", ["int4", "int8", "sfp8", "nf4"])
@pytest.mark.parametrize("peak", [1e30, 8e37, 1e38, 3.4e38])
def test_huge_groups_are_kept(method, peak):
    x = ramp(peak)
    np.testing.assert_allclose(restored(x, method, -2), x, atol=0.16 * peak)


@pytest.mark.parametrize("method", ["q4_0", "q4_0_transpose"])
def test_denormal_float16_scales(method):
    # Peaks of quarters of the smallest denormal number, times 8: ties of the scale's rounding.
    peaks = 8 * 2.0**-24 * np.arange(0, 64, 0.25).reshape(128, 2, 1)
    x = np.float32(peaks * np.linspace(-1, 1, 32)).reshape(128, 64)
    x = x if method == "q4_0" else x.T
    values, scale = peft.quantize(x, method)
    assert_numpys(x, method, values, scale)
    assert_same_bits(dequantize_compiled(values, scale), numpy_dequantize(values, scale))


@pytest.mark.parametrize("peak", [1e-36, 2e-36, 7.9e-36, 8.1e-36])
def test_nibbles_of_q4_0_down_to_1e_36(peak):
    x = np.tile(np.float32(peak * np.linspace(-1, 1, 64)), (128, 1))
    assert_numpys(x, "q4_0", *peft.quantize(x, "q4_0"))


@pytest.mark.parametrize("method", ["q4_0", "q4_0_transpose"])
def test_scales_beyond_float16(method):
    x = np.ones((128, 64), np.float32)
    assert float(peft.quantize(np.float32(8 * 65519) * x, method)[1][0, 0]) == -65504
    with pytest.raises(ValueError, match=r"at most 65504.*Scale the weight down"):
        peft.quantize(np.float32(8 * 65520) * x, method)
    with pytest.raises(ValueError, match=r"at most 65504.*Scale the weight down"):
        peft.simulate_quantize(np.float32(8 * 65520) * x, method)
    quantize_compiled(np.float32(8 * 65520) * x, method=method)


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
@every_method
def test_nan_and_infinity(method, number):
    for place in ((0, 0), (7, 9), (127, 63)):
        x = np.asarray(messy()).copy()
        x[place] = number
        for function in (peft.quantize, peft.simulate_quantize):
            with pytest.raises(ValueError, match=r"NaN or infinity cannot be .*Mend it first"):
                function(x, method)
    quantize_compiled(x, method=method)
    simulate_compiled(x, method=method)


# --- What is taken -------------------------------------------------------------------------------


@st.composite
def channels(draw):
    """Draws a method with a scale per channel, a shape, and axes in any order and of any sign."""
    shape = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    places = st.integers(-len(shape), len(shape) - 1)
    axes = draw(st.lists(places, min_size=1, unique_by=lambda axis: axis % len(shape)))
    return draw(st.sampled_from(CHANNELS)), tuple(shape), tuple(axes)


@settings(max_examples=6, deadline=None)
@given(channels())
def test_any_contracted_axes(case):
    method, shape, axes = case
    x = np.random.default_rng(shape).normal(size=shape).astype(np.float32)
    values, scale = peft.quantize(x, method, axes)
    assert_numpys(x, method, values, scale, axes)
    contracted = {axis % len(shape) for axis in axes}
    assert scale.shape == tuple(1 if i in contracted else n for i, n in enumerate(shape))


@pytest.mark.parametrize("method", CHANNELS)
def test_axes_by_default_are_those_of_a_dense_layer(method):
    x = messy()
    for axes in (-2, 0, [0], (-2,), {-2}, np.array([0]), (0, -2)):
        assert_same_bits(peft.quantize(x, method, axes), peft.quantize(x, method))
    for shape in ((4,), (2, 3, 4), ()):
        for function in (peft.quantize, peft.simulate_quantize):
            with pytest.raises(ValueError, match="Pass `axes`, the contracted ones"):
                function(np.ones(shape, np.float32), method)


@pytest.mark.parametrize("axes", [2, -3, (0, 2), (0.5,), "0"], ids=repr)
@pytest.mark.parametrize("method", CHANNELS)
def test_axes_that_are_none(method, axes):
    with pytest.raises(ValueError, match="does not name axes of a weight of shape"):
        peft.quantize(np.ones((4, 6), np.float32), method, axes)


@pytest.mark.parametrize("method", CHANNELS)
def test_without_a_contracted_axis_there_is_no_channel(method):
    with pytest.raises(ValueError, match=r"contracts no axis .*Choose a method with blocks"):
        peft.quantize(np.ones((4, 6), np.float32), method, ())


@pytest.mark.parametrize("axis", [np.int64(0), np.int32(-2)], ids=repr)
def test_an_axis_may_be_numpys(axis):
    assert_same_bits(peft.quantize(messy(), "int8", axis), peft.quantize(messy(), "int8"))


@pytest.mark.parametrize("method", BLOCKS)
def test_block_methods_take_no_axes(method):
    for axes in (-2, (0,), ()):
        for function in (peft.quantize, peft.simulate_quantize):
            with pytest.raises(ValueError, match=r"has no meaning. Leave it out"):
                function(np.ones((64, 64), np.float32), method, axes)


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("method", BLOCKS)
def test_blocks_of_any_rank(method, rank):
    axis, length = BLOCKS[method]
    shape = [2, 3, 4][:rank]
    if rank < -axis:
        with pytest.raises(ValueError, match="do not divide the shape"):
            peft.quantize(np.ones((length,), np.float32), method)
        return
    shape[axis] = 2 * length
    x = np.random.default_rng(rank).normal(size=shape).astype(np.float32)
    values, scale = peft.quantize(x, method)
    assert_numpys(x, method, values, scale)
    assert_same_bits(dequantize_compiled(values, scale), numpy_dequantize(values, scale))
    for wrong in (1, length - 1, length + 16, 2 * length + 1):
        shape[axis] = wrong
        for function in (peft.quantize, peft.simulate_quantize):
            with pytest.raises(ValueError, match=r"do not divide the shape.*INT4, INT8, SFP8"):
                function(np.ones(shape, np.float32), method)


def test_q4_0_transpose_is_q4_0_of_the_transpose():
    x = messy(shape=(2, 64, 96))
    values, scale = peft.quantize(x, "q4_0_transpose")
    turned, turned_scale = peft.quantize(x.swapaxes(-1, -2), "q4_0")
    np.testing.assert_array_equal(numpy_codes(values), numpy_codes(turned).swapaxes(-1, -2))
    assert_same_bits(scale, np.asarray(turned_scale).swapaxes(-1, -2))


def test_methods_are_strings_too():
    for method in peft.QuantizationMethod:
        assert peft.QuantizationMethod(method.value.upper()) is method
        assert peft.QuantizationMethod[method.name] is method
        names = (method, method.value, method.name, method.name.title())
        assert_same_bits(*([peft.quantize(messy(), name) for name in names[:2]]))
        assert_same_bits(*([peft.simulate_quantize(messy(), name) for name in names[2:]]))
    assert {method.value for method in peft.QuantizationMethod} == {"none", *METHODS}
    assert {m.value for m in peft.QuantizationMethod if m.per_channel} == set(CHANNELS)


@pytest.mark.parametrize("name", ["q4", "q4-0", "", " int4", None, 4, b"int4"], ids=repr)
def test_unknown_methods(name):
    for function in (peft.quantize, peft.simulate_quantize):
        with pytest.raises(ValueError, match=r"is no quantization method. There are .*'nf4'"):
            function(messy(), name)


@pytest.mark.parametrize(
    ("x", "shown"),
    [
        (np.ones((64, 64), np.int8), "int8"),
        (np.ones((64, 64), bool), "bool"),
        (np.ones((64, 64), np.complex64), "complex64"),
        (np.ones((0, 64), np.float32), "float32"),
        (np.ones((64, 0), np.float32), "float32"),
    ],
    ids=lambda x: str(getattr(x, "dtype", "")),
)
@every_method
def test_only_floats_are_quantized(method, x, shown):
    for function in (peft.quantize, peft.simulate_quantize):
        with pytest.raises(ValueError, match=rf"got {shown}\[\d+, \d+\]. Leave other"):
            function(x, method)


@every_method
def test_stored_values_are_not_quantized_again(method):
    values, _ = peft.quantize(messy(), method)
    for stored in (values, {str(values.layout): values.array}):
        for function in (peft.quantize, peft.simulate_quantize):
            with pytest.raises(ValueError, match=r"(?s)quantized already.*Dequantize them first"):
                function(stored, "int4")


@every_dtype
@pytest.mark.parametrize("method", ["q4_0", "int8"])
def test_arrays_of_any_kind(method, dtype):
    x = messy(dtype)
    expected = peft.quantize(x.astype(np.float32), method)
    for array in (x, jnp.asarray(x)):
        assert_same_bits(peft.quantize(array, method), expected)


@pytest.mark.parametrize("method", ["q4_0", "int8"])
def test_float64(method):
    x = messy()
    expected = peft.quantize(x, method)
    assert_same_bits(peft.quantize(x.astype(np.float64), method), expected)
    with jax.enable_x64(True):
        wide = jnp.asarray(x, jnp.float64)
        assert_same_bits(peft.quantize(wide, method), expected)
        simulated = peft.simulate_quantize(wide, method)
        assert_same_bits(simulated, numpy_dequantize(*expected).astype(np.float64))


@every_dtype
def test_none_is_the_identity(dtype):
    x = jnp.asarray(messy(dtype)).at[0, 0].set(np.nan)
    values, scale = peft.quantize(x, "none")
    assert values is x
    assert (scale.shape, scale.dtype) == ((1, 1), dtype)
    assert_same_bits(peft.dequantize(values, scale, dtype), x)
    assert peft.simulate_quantize(x, "none", (0, 1)) is x
    assert_same_bits(simulate_compiled(x, method="none"), x)
    _, pull = jax.vjp(lambda x: peft.simulate_quantize(x, "none"), x)
    assert_same_bits(pull(x)[0], x)


# --- Scales and names say everything -------------------------------------------------------------


def test_a_scale_says_what_it_scales():
    rng = np.random.default_rng(0)
    x = rng.integers(-127, 128, (4, 6)).astype(np.int8)
    shapes = (1, 1), (1, 6), (4, 1), (4, 6), (2, 6), (4, 3), (2, 2), (1, 3)
    scales = [rng.normal(size=shape).astype(np.float32) for shape in shapes]
    scales += [scale.astype(np.float16) for scale in scales]

    def expected(scale):
        blocks = np.ones([n // m for n, m in zip(x.shape, scale.shape, strict=True)], np.float32)
        return x.astype(np.float32) * np.kron(scale.astype(np.float32), blocks)

    def every(x, dtype):
        return [peft.dequantize(x, scale, dtype) for scale in scales]

    for values in (x, jnp.asarray(x, jnp.int32)):
        assert_same_bits(
            jax.jit(every, static_argnums=1)(values, jnp.float32), [*map(expected, scales)]
        )
    assert_same_bits(peft.dequantize(x, scales[6]), expected(scales[6]))
    rounded = dequantize_compiled(x, scales[6], dtype=jnp.bfloat16)
    assert_same_bits(rounded, expected(scales[6]).astype(jnp.bfloat16))


@pytest.mark.parametrize("shape", [(), (6,), (1, 1, 1), (3, 6), (4, 4), (8, 6), (0, 6), (4, 12)])
def test_scales_that_do_not_fit(shape):
    values, _ = peft.quantize(np.ones((4, 6), np.float32), "int4")
    for stored in (values, np.ones((4, 6), np.int8)):
        with pytest.raises(ValueError, match=r"does not fit.*Keep each scale with its values"):
            peft.dequantize(stored, np.ones(shape, np.float32))


@every_method
def test_names_of_leaves_are_all_that_dequantize_needs(method):
    values, scale = peft.quantize(messy(), method)
    tree = {"layer": {"kernel": values, "scale": scale}}
    saved = {
        "/".join(key.key for key in path): np.asarray(leaf)
        for path, leaf in jax.tree.leaves_with_path(tree)
    }
    assert sorted(saved) == [f"layer/kernel/{values.layout}", "layer/scale"]
    kernel = {path.split("/")[2]: leaf for path, leaf in saved.items() if path.count("/") == 2}
    expected = dequantize_compiled(values, scale)
    assert_same_bits(dequantize_compiled(kernel, saved["layer/scale"]), expected)
    assert_same_bits(dequantize_compiled(kernel, saved["layer/scale"]), expected)


def test_methods_that_are_unknown_here():
    stored = peft.StoredValues(Layout("int5", -2, 8), np.zeros((4, 6), np.uint8))
    with pytest.raises(ValueError, match="'int5', which is no method known here"):
        peft.dequantize(stored, np.ones((1, 1), np.float32))


# --- Simulation ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "dtype"),
    partly_slow(
        [(method, dtype) for method in METHODS for dtype in DTYPES],
        lambda pair: (list(METHODS).index(pair[0]) - DTYPES.index(pair[1])) % 3 == 0,
    ),
)
def test_simulation_is_storing_and_restoring(method, dtype):
    x = messy(dtype)
    stored = peft.quantize(x.astype(np.float32), method)
    expected = numpy_dequantize(*stored).astype(dtype)
    assert_same_bits(peft.simulate_quantize(x, method), expected)

    @jax.jit
    def both(x):
        stored = peft.quantize(x, method)
        return stored, peft.dequantize(*stored, dtype=dtype), peft.simulate_quantize(x, method)

    assert_same_bits(both(x), (stored, expected, expected))


def test_simulation_takes_axes():
    x, axes = messy(shape=(3, 128, 64)), (0, -1)
    expected = numpy_dequantize(*peft.quantize(x, "int8", axes))
    assert_same_bits(peft.simulate_quantize(x, "int8", axes), expected)
    assert_same_bits(simulate_compiled(x, method="int8", axes=axes), expected)


@pytest.mark.parametrize(
    ("method", "dtype"),
    partly_slow(
        [(method, dtype) for method in METHODS for dtype in DTYPES],
        lambda pair: (METHODS.index(pair[0]) - DTYPES.index(pair[1])) % 3 == 0,
    ),
)
def test_the_derivative_is_the_identity(method, dtype):
    x, tangent = messy(dtype), messy(dtype, seed=1)
    expected = peft.simulate_quantize(x, method)
    found = jax.jvp(lambda x: peft.simulate_quantize(x, method), (x,), (tangent,))
    assert_same_bits(found, (expected, tangent))
    y, pull = jax.vjp(lambda x: peft.simulate_quantize(x, method), x)
    assert_same_bits((y, *pull(tangent)), (expected, tangent))


@every_method
def test_derivatives_in_a_loss(method):
    x, weights = messy(shape=(2, 128, 64)), messy(shape=(2, 128, 64), seed=1)

    def linear(x, weights):
        return jnp.sum(weights * peft.simulate_quantize(x, method))

    def square(x):
        return jnp.sum(peft.simulate_quantize(x, method) ** 2)

    @jax.jit
    @jax.vmap
    def derivatives(x, weights):
        curved = jax.jvp(jax.grad(square), (x,), (weights,))
        straight = jax.jvp(jax.grad(linear), (x, weights), (weights, jnp.zeros_like(weights)))
        return straight, curved, jax.grad(jax.checkpoint(linear))(x, weights)

    expected = np.stack([peft.simulate_quantize(slice_, method) for slice_ in x])
    straight, curved, again = derivatives(x, weights)
    assert_same_bits(straight, (weights, np.zeros_like(weights)))
    assert_same_bits(curved, (2 * expected, 2 * weights))
    assert_same_bits(again, weights)

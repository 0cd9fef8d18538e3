"""Statistics of calibration and their ranges, against numpy: exact counts, exhaustive search."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from peft_jax.quantsim import _grid as grid
from peft_jax.quantsim import _ranges as ranges
from peft_jax.quantsim import _statistics as statistics

pytestmark = pytest.mark.optimized

BINS, HALF = statistics.BINS, statistics.BINS // 2
METHODS = ranges.METHODS
fold = jax.jit(statistics.fold, static_argnums=0)
every_kind = pytest.mark.parametrize("kind", statistics.STATISTICS)
every_shape = pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])


def draw(shape, seed=0, spread=1.0):
    rng = np.random.default_rng(seed)
    return (rng.normal(size=shape) * np.exp(spread * rng.normal(size=shape))).astype(np.float32)


def of_batches(kind, batches, layer=0, layers=1):
    """One state for all batches of (C, N), as within a step."""
    state = statistics.empty(kind, layers, len(batches[0]))
    for batch in batches:
        state = fold(kind, state, np.int32(layer), batch)
    return jax.tree.map(np.asarray, state)


def merged(kind, batches):
    """A state for each batch, summed up on the host."""
    total = None
    for batch in batches:
        total = statistics.merge(kind, total, of_batches(kind, [batch]))
    return total


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for name in expected:
        np.testing.assert_array_equal(actual[name], expected[name], err_msg=name)


def numpy_exponent(values):
    """The smallest from -126 on for which the bins reach beyond every magnitude, by trying all."""
    peak = np.max(np.abs(values), initial=0)
    return next(e for e in range(-126, 128) if np.ldexp(np.float64(HALF), e) > peak)


def numpy_counts(values, exponent):
    """By numpy's histogram; where bins have no exact edges in float64 there is nothing to test."""
    edges = np.ldexp(np.arange(-HALF, HALF + 1, dtype=np.float64), exponent)
    return np.histogram(np.float64(values), edges)[0]


# --- Statistics ----------------------------------------------------------------------------------

TINY = 2.0**-126  # smaller magnitudes count as zeros, on every device
finite = st.one_of(
    st.floats(-10, 10, width=32, allow_subnormal=False),
    st.floats(-(2.0**127), 2.0**127, width=32, allow_subnormal=False),
    st.integers(-126, 127).map(lambda e: float(2.0**e)),
    st.integers(-126, 127).map(lambda e: -float(2.0**e)),
)
drawn = hnp.arrays(np.float32, (2, 12), elements=finite)


@given(values=drawn)
@settings(max_examples=60, deadline=None)
def test_histograms_are_numpys(values):
    total = of_batches("histogram", [values])
    assert total["counts"].dtype == np.int32
    for group, row in enumerate(values):
        exponent = numpy_exponent(row)
        assert total["exponent"][0, group] == exponent
        np.testing.assert_array_equal(total["counts"][0, group], numpy_counts(row, exponent))
    assert_same(statistics.of_array("histogram", values), total)


@given(
    values=drawn,
    batch_of=hnp.arrays(np.int8, 12, elements=st.integers(0, 3)),
    order=st.permutations(range(4)),
    associated=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_histograms_do_not_depend_on_batches(values, batch_of, order, associated):
    batches = [np.where(batch_of == i, values, np.nan) for i in order]  # NaN is left out
    expected = statistics.of_array("histogram", values)
    summed = merged("histogram", batches)
    if associated:
        halves = merged("histogram", batches[:2]), merged("histogram", batches[2:])
        summed = statistics.merge("histogram", *halves)
    assert summed["counts"].dtype == np.int64
    for actual in (summed, of_batches("histogram", batches)):
        del actual["finite"]
        assert_same(actual, {name: expected[name] for name in actual})


@every_kind
@pytest.mark.parametrize("seed", range(3))
def test_batches_of_any_size_sum_up(kind, seed):
    values = draw((3, 4000), seed, spread=3)
    values[1] *= 1e-30
    values[2, :2000] = 0
    expected = statistics.of_array(kind, values)
    batches = np.split(values, [7, 8, 1000], axis=1)
    for order in (batches, batches[::-1]):
        assert_same(of_batches(kind, order), expected)
        assert_same(merged(kind, order), expected)


@every_kind
def test_layers_of_a_stack_are_apart(kind):
    """As inside a scan over layers, which of them is known to the program alone."""
    values = draw((3, 2, 50))

    @jax.jit
    def scanned(values):
        def step(state, layer):
            return statistics.fold(kind, state, *layer), None

        start = statistics.empty(kind, 4, 2)
        return jax.lax.scan(step, start, (jnp.array([2, 0, 2]), values))[0]

    state = jax.tree.map(np.asarray, scanned(values))
    np.testing.assert_array_equal(state["seen"], [True, False, True, False])
    nothing = jax.tree.map(np.asarray, statistics.empty(kind, 1, 2))
    expected = {
        0: statistics.of_array(kind, values[1]),
        2: statistics.of_array(kind, np.concatenate([values[0], values[2]], 1)),
    }
    for layer in range(4):
        alone = {name: array[layer : layer + 1] for name, array in state.items()}
        assert_same(alone, expected.get(layer, nothing))


@every_kind
@pytest.mark.parametrize("odd", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_flagged_and_left_out(kind, odd):
    values = draw((2, 30))
    with_odd = np.insert(values, 4, odd, axis=1)
    with_odd[1, 4] = 0.5
    flagged, on_host = of_batches(kind, [with_odd]), statistics.of_array(kind, with_odd)
    assert not flagged["finite"].any()
    assert_same(on_host, flagged)
    left = statistics.of_array(kind, values)
    for name in flagged.keys() - {"finite", "seen"}:
        np.testing.assert_array_equal(flagged[name][0, 0], left[name][0, 0])
    total = statistics.merge(kind, merged(kind, [values]), flagged)
    assert not total["finite"].any()


@every_kind
def test_nothing_seen_is_no_values(kind):
    start = jax.tree.map(np.asarray, statistics.empty(kind, 2, 3))
    same = of_batches(kind, [np.zeros((3, 0), np.float32)], layers=2)
    assert_same(same, start)
    assert not start["seen"].any()
    values = of_batches(kind, [draw((3, 9))], layers=2)
    assert_same(statistics.merge(kind, statistics.merge(kind, None, start), values), values)


@every_kind
def test_narrow_floats_are_read_as_float32(kind):
    values = jnp.asarray(draw((2, 40))).astype(jnp.bfloat16)
    expected = statistics.of_array(kind, np.asarray(values.astype(jnp.float32)))
    assert_same(of_batches(kind, [values]), expected)
    assert_same(statistics.of_array(kind, values), expected)


def test_subnormals_count_as_zeros():
    values = np.float32([[-1e-40, 1e-40, -0.0, -TINY]])
    total = statistics.of_array("histogram", values)
    np.testing.assert_array_equal(total["counts"][0, 0, [HALF - 1, HALF]], [1, 3])
    state = of_batches("histogram", [values])
    np.testing.assert_array_equal(state["counts"], total["counts"])


def test_values_that_underflow_beside_large_ones_keep_their_sign():
    small = np.float32([[-TINY, TINY, -1e-30, 1e-30]])
    large = np.float32([[2.0**120]])
    expected = of_batches("histogram", [np.concatenate([small, large], 1)])
    np.testing.assert_array_equal(expected["counts"][0, 0, [HALF - 1, HALF]], [2, 2])
    for batches in ([small, large], [large, small]):
        assert_same(of_batches("histogram", batches), expected)
        assert_same(merged("histogram", batches), expected)


@pytest.mark.parametrize("method", METHODS)
def test_accumulating_leaves_its_operands(method):
    first, second = (of_batches("histogram", [draw((1, 9), i) * 4**i]) for i in range(2))
    before = [{name: array.copy() for name, array in of.items()} for of in (first, second)]
    setting = {"momentum": 0.5} if method == "moving_average" else {}
    total = METHODS[method].accumulate(None, first, **setting)
    kept = {name: array.copy() for name, array in total.items()}
    METHODS[method].accumulate(total, second, **setting)
    for actual, expected in ((first, before[0]), (second, before[1]), (total, kept)):
        assert_same(actual, expected)


def test_sums_exceed_the_counts_of_devices():
    state = of_batches("histogram", [np.ones((1, 5), np.float32)])
    state["counts"] = state["counts"] * np.int32(2**28)
    total = statistics.merge("histogram", statistics.merge("histogram", None, state), state)
    assert total["counts"].sum() == 2 * 5 * 2**28


def test_counts_beyond_int32_are_refused():
    state = of_batches("histogram", [np.ones((1, 5), np.float32)])
    state["counts"] = state["counts"] * np.int32(-1)
    with pytest.raises(ValueError, match=r"2\*\*31 values or more.*smaller batches"):
        statistics.merge("histogram", None, state)


# --- Ranges --------------------------------------------------------------------------------------


def range_of(method, values, bitwidth=8, symmetric=False, **settings):
    row = METHODS[method]
    total = statistics.of_array(row.statistic, values)
    low, high = row.range(total, bitwidth, symmetric, **settings)
    assert low.shape == high.shape == (1, len(values))
    assert low.dtype == high.dtype == np.float32
    return low[0], high[0]


def numpy_error(values, low, high, bitwidth, symmetric):
    """The mean squared error of a grid, in float64."""
    low, high = (np.float32(end) for end in (low, high))
    scale, offset = map(np.float64, grid.scale_and_offset(low, high, bitwidth, symmetric))
    code = np.clip(np.rint(values / scale) - offset, 0, 2**bitwidth - 1)
    return np.mean(((code + offset) * scale - values) ** 2)


@every_shape
@pytest.mark.parametrize(
    ("method", "setting"), [("min_max", {}), ("percentile", {"percentile": 100})]
)
def test_min_max_and_the_last_percentile_cover_all(method, setting, symmetric):
    values = draw((5, 333))
    values[3] = np.abs(values[3])
    values[4] = -1.5
    low, high = range_of(method, values, 8, symmetric, **setting)
    np.testing.assert_array_equal(low, values.min(1))
    np.testing.assert_array_equal(high, values.max(1))


@pytest.mark.parametrize("cut", [1, 5, 40])
@pytest.mark.parametrize("count", [400, 1000])
def test_percentiles_leave_out_as_many_at_each_end(count, cut):
    values = np.sort(draw((6, count)), 1)
    low, high = range_of("percentile", values, percentile=100 - 100 * cut / count)
    for row, left, right in zip(values, low, high, strict=True):
        width = 2.0 ** numpy_exponent(row)
        assert left <= row[cut] < left + width
        assert right - width <= row[-1 - cut] < right
    mirrored = range_of("percentile", -values, percentile=100 - 100 * cut / count)
    np.testing.assert_allclose(-mirrored[0], high, rtol=1e-6)
    np.testing.assert_allclose(-mirrored[1], low, rtol=1e-6)


def test_percentiles_of_few_values_cut_none():
    values = draw((3, 32))
    low, high = range_of("percentile", values, percentile=97)
    np.testing.assert_array_equal(low, values.min(1))
    np.testing.assert_array_equal(high, values.max(1))


def centred(values):
    """Values moved to the centres of their bins, so that a histogram loses nothing."""
    width = 2.0 ** numpy_exponent(values)
    return np.float32((np.floor(values / width) + 0.5) * width)


RATIOS = np.arange(1, 101) / 100


def least_error(values, pairs, bitwidth, symmetric):
    low, high = min(values.min(), 0), max(values.max(), 0)
    return min(numpy_error(values, low * a, high * b, bitwidth, symmetric) for a, b in pairs)


@every_shape
@pytest.mark.parametrize("bitwidth", [2, 3, 4, 8])
def test_mse_is_an_exhaustive_search(bitwidth, symmetric):
    rng = np.random.default_rng(bitwidth)
    for _ in range(3):
        values = centred(rng.normal(size=800) * np.exp(0.5 * rng.normal(size=800)))
        low, high = (end[0] for end in range_of("mse", values[None], bitwidth, symmetric))
        least = least_error(values, zip(RATIOS, RATIOS, strict=True), bitwidth, symmetric)
        assert numpy_error(values, low, high, bitwidth, symmetric) <= least * (1 + 1e-4)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("bitwidth", [3, 4, 5])
def test_mse_cuts_each_end_by_itself(bitwidth, sign):
    """One end after the other finds nearly the best of all pairs."""
    rng = np.random.default_rng(bitwidth)
    lopsided = np.append(rng.uniform(-2, 2, 3000), 6)
    values = centred(sign * lopsided)
    low, high = (end[0] for end in range_of("mse", values[None], bitwidth))
    found = numpy_error(values, low, high, bitwidth, False)
    pairs = itertools.product(RATIOS[4::5], RATIOS[4::5])
    assert found <= 1.03 * least_error(values, pairs, bitwidth, False)
    assert found < 0.9 * least_error(values, zip(RATIOS, RATIOS, strict=True), bitwidth, False)


def test_centres_of_bins_lie_no_farther_out_than_values():
    values = np.float32([[1.0, 1.0, 1.0], [-1.0, 0.3, 1.0]])
    total = statistics.of_array("histogram", values)
    unit = np.ldexp(1.0, total["exponent"][0])
    points, weights = ranges._occupied(total["counts"][0], unit, values.min(1), values.max(1))
    np.testing.assert_array_equal(points[0, weights[0] > 0], [1])
    np.testing.assert_array_equal(points[1, [0, 2]], [-1 + unit[1] / 2, 1])
    np.testing.assert_allclose(weights.sum(1), 1, rtol=1e-6)


@every_shape
@pytest.mark.parametrize("bitwidth", [2, 4, 8, 16])
def test_mse_does_no_worse_than_min_max(bitwidth, symmetric):
    values = draw((8, 2000), spread=0.7)
    values[6] = np.abs(values[6])
    values[7] = np.maximum(values[7], 0)
    chosen = zip(*range_of("mse", values, bitwidth, symmetric), strict=True)
    plain = zip(*range_of("min_max", values, bitwidth, symmetric), strict=True)
    for row, ours, theirs in zip(values, chosen, plain, strict=True):
        width = 2.0 ** numpy_exponent(row)
        worst = numpy_error(row, *theirs, bitwidth, symmetric)
        found = numpy_error(row, *ours, bitwidth, symmetric)
        assert np.sqrt(found) <= 1.01 * np.sqrt(worst) + width
        if bitwidth <= 4:
            assert found < 0.9 * worst


@every_shape
@pytest.mark.parametrize("value", [0.0, 1.5, -1.5, 1e-20])
def test_mse_of_one_value_is_exact_where_min_max_is(value, symmetric):
    values = np.full((1, 20), value, np.float32)
    found = numpy_error(values, *range_of("mse", values, 8, symmetric), 8, symmetric)
    plain = numpy_error(values, *range_of("min_max", values, 8, symmetric), 8, symmetric)
    assert found <= plain


def test_ranges_are_those_of_each_group_and_layer():
    values = draw((2, 3, 200))
    state = statistics.empty("histogram", 3, 3)
    for layer, index in ((0, 2), (1, 0)):
        state = fold("histogram", state, np.int32(index), values[layer])
    total = statistics.merge("histogram", None, jax.tree.map(np.asarray, state))
    for method, setting in (("mse", {}), ("percentile", {"percentile": 98.0})):
        low, high = METHODS[method].range(total, 4, False, **setting)
        for layer, index in ((0, 2), (1, 0)):
            alone = range_of(method, values[layer], 4, False, **setting)
            np.testing.assert_array_equal([low[index], high[index]], alone)
        assert np.all(low[1] == np.inf)
        assert np.all(high[1] == -np.inf)


@pytest.mark.parametrize("method", METHODS)
def test_ranges_of_arrays_take_groups_in_parts(method, monkeypatch):
    values = draw((23, 40))
    setting = {"percentile": 90.0} if method == "percentile" else {}
    whole = range_of(method, values, 4, True, **setting)
    monkeypatch.setattr(ranges, "GROUPS", 7)
    parts = ranges.range_of_array(method, values, 4, True, **setting)
    for ours, theirs in zip(parts, whole, strict=True):
        np.testing.assert_array_equal(ours, theirs[None])


@pytest.mark.parametrize("momentum", [0.9, 0.25])
def test_moving_averages_follow_the_formula(momentum):
    batches = [draw((2, 20), seed) for seed in range(4)]
    accumulate = METHODS["moving_average"].accumulate
    total = None
    for batch in batches:
        total = accumulate(total, of_batches("extremes", [batch]), momentum=momentum)
    low, high = METHODS["moving_average"].range(total, 8, False)
    for actual, ends in ((low, np.min), (high, np.max)):
        expected = ends(np.float64(batches[0]), 1)
        for batch in batches[1:]:
            expected = momentum * expected + (1 - momentum) * ends(np.float64(batch), 1)
        np.testing.assert_allclose(actual[0], expected, rtol=1e-5)


def test_moving_averages_start_where_a_layer_is_first_seen():
    first = of_batches("extremes", [np.float32([[-1, 1]])], layer=0, layers=2)
    second = of_batches("extremes", [np.float32([[-3, 5]])], layer=1, layers=2)
    accumulate = METHODS["moving_average"].accumulate
    total = accumulate(accumulate(None, first, momentum=0.5), second, momentum=0.5)
    np.testing.assert_array_equal(total["min"], [[-1], [-3]])
    np.testing.assert_array_equal(total["max"], [[1], [5]])
    total = accumulate(total, first, momentum=0.5)
    np.testing.assert_array_equal(total["max"], [[1], [5]])
    total = accumulate(total, second | {"max": np.float32([[-np.inf], [7]])}, momentum=0.5)
    np.testing.assert_array_equal(total["max"], [[1], [6]])
    assert total["seen"].all()

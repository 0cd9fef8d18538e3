"""Grids, ranges and gradients against AIMET's quantizers, and moving averages against torch's."""

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from aimet_peer import affine, analyzers

from peft_jax.quantsim._grid import fake_quantize, grid_range, scale_and_offset
from peft_jax.quantsim._ranges import METHODS
from peft_jax.quantsim._statistics import of_array

Array = np.ndarray[Any, Any]

SHAPE = (8, 12)
SHARING = {"tensor": (1, 1), "channel": (8, 1), "input": (1, 12), "block": (8, 3), "tile": (4, 6)}
every_bitwidth = pytest.mark.parametrize("bitwidth", range(2, 17))
every_kind = pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
every_sharing = pytest.mark.parametrize("sharing", SHARING)


def arrays() -> dict[str, Array]:
    rng = np.random.default_rng(0)
    normal = rng.normal(size=SHAPE)
    found = {
        "normal": normal,
        "scattered": normal * np.exp(3 * rng.normal(size=SHAPE)),
        "positive": np.abs(normal) + 0.1,
        "negative": -np.abs(normal),
        "relu": np.maximum(normal, 0),
        "one": np.full(SHAPE, 1.7),
        "minus one": np.full(SHAPE, -0.3),
        "zero": np.zeros(SHAPE),
        "mostly zero": np.where(normal > 1.5, normal, 0),
        "tiny": normal * 1e-9,
        "narrow": normal * 2.0 ** rng.uniform(-24, -8, (8, 1)),  # about the narrowest grids
        "huge": normal * 1e30,
        "whole": np.rint(normal * 20),
    }
    return {name: np.float32(array) for name, array in found.items()}


ARRAYS = arrays()
every_array = pytest.mark.parametrize("array", ARRAYS.values(), ids=ARRAYS.keys())


def groups(x: Array, shape: tuple[int, ...]) -> Array:
    """The values that each scale serves: (scales, values)."""
    split = [part for n, m in zip(x.shape, shape, strict=True) for part in (m, n // m)]
    order = (*range(0, len(split), 2), *range(1, len(split), 2))
    return x.reshape(split).transpose(order).reshape(int(np.prod(shape)), -1)


def our_grid(x: Array, shape: tuple[int, ...], bitwidth: int, symmetric: bool) -> Any:
    total = of_array("extremes", groups(x, shape))
    ends = METHODS["min_max"].range(total, bitwidth, symmetric)
    return [leaf.reshape(shape) for leaf in scale_and_offset(*ends, bitwidth, symmetric)]


def blocks_of(shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """AIMET's block size; scales that lie along whole axes have none."""
    whole = all(m in (1, n) for n, m in zip(SHAPE, shape, strict=True))
    return None if whole else tuple(n // m for n, m in zip(SHAPE, shape, strict=True))


def their_quantizer(x: Array, shape: tuple[int, ...], bitwidth: int, symmetric: bool) -> Any:
    quantizer = affine.QuantizeDequantize(
        shape, bitwidth=bitwidth, symmetric=symmetric, block_size=blocks_of(shape)
    )
    with quantizer.compute_encodings():
        quantizer(torch.tensor(x))
    return quantizer


def as_numpy(tensor: Any) -> Array:
    return np.asarray(tensor.detach().as_subclass(torch.Tensor).numpy())


# --- Encodings -----------------------------------------------------------------------------------


@every_kind
@every_sharing
@every_array
def test_encodings_of_all_bitwidths_are_aimets_bit_for_bit(array, sharing, symmetric):
    shape = SHARING[sharing]
    for bitwidth in range(2, 17):
        theirs = their_quantizer(array, shape, bitwidth, symmetric)
        scale, offset = our_grid(array, shape, bitwidth, symmetric)
        low, high = grid_range(scale, offset, bitwidth)
        signed = as_numpy(theirs.get_offset()) + theirs.qmin  # AIMET's codes begin at `qmin`
        np.testing.assert_array_equal(scale, as_numpy(theirs.get_scale()), err_msg=f"{bitwidth}")
        np.testing.assert_array_equal(offset, signed, err_msg=f"{bitwidth}")
        np.testing.assert_array_equal(low, as_numpy(theirs.get_min()), err_msg=f"{bitwidth}")
        np.testing.assert_array_equal(high, as_numpy(theirs.get_max()), err_msg=f"{bitwidth}")


# --- Values --------------------------------------------------------------------------------------
# AIMET has two ways. Without gradients torch multiplies by 1/scale, as we do; with gradients, and
# in blocks, it divides, which differs only where that puts a value across the middle of two codes.


@every_kind
@pytest.mark.parametrize("sharing", ["tensor", "channel", "input"])
@every_array
def test_values_are_aimets_bit_for_bit(array, sharing, symmetric):
    shape = SHARING[sharing]
    for bitwidth in (2, 4, 8, 16):
        quantizer = their_quantizer(array, shape, bitwidth, symmetric)
        with torch.no_grad():
            theirs = as_numpy(quantizer(torch.tensor(array)))
        scale, offset = our_grid(array, shape, bitwidth, symmetric)
        ours = np.asarray(fake_quantize(jnp.asarray(array), scale, offset, bitwidth))
        np.testing.assert_array_equal(ours, theirs, err_msg=f"{bitwidth}")


@every_kind
@every_sharing
@every_array
def test_values_are_aimets_but_for_middles(array, sharing, symmetric):
    shape = SHARING[sharing]
    for bitwidth in (2, 4, 8, 16):
        quantizer = their_quantizer(array, shape, bitwidth, symmetric)
        theirs = as_numpy(quantizer(torch.tensor(array)))
        scale, offset = our_grid(array, shape, bitwidth, symmetric)
        ours = np.asarray(fake_quantize(jnp.asarray(array), scale, offset, bitwidth))
        repeated = np.kron(scale, np.ones([n // m for n, m in zip(SHAPE, shape, strict=True)]))
        ratio = np.float64(array) / repeated
        middle = np.abs(np.abs(ratio - np.rint(ratio)) - 0.5) <= 2.0**-22 * np.abs(ratio)
        np.testing.assert_array_equal(ours[~middle], theirs[~middle], err_msg=f"{bitwidth}")
        assert np.all(np.abs(ours - theirs) <= 1.001 * repeated)


@every_kind
@pytest.mark.parametrize("bitwidth", [8, 12, 16])
def test_values_in_bfloat16_are_aimets(bitwidth, symmetric):
    """Of fewer bits AIMET computes in bfloat16 itself."""
    narrow = torch.tensor(ARRAYS["normal"]).to(torch.bfloat16)
    wide = as_numpy(narrow.float())
    quantizer = their_quantizer(wide, (8, 1), bitwidth, symmetric)
    theirs = quantizer(narrow)
    scale, offset = our_grid(wide, (8, 1), bitwidth, symmetric)
    ours = fake_quantize(jnp.asarray(wide).astype(jnp.bfloat16), scale, offset, bitwidth)
    assert theirs.dtype == torch.bfloat16
    np.testing.assert_array_equal(np.asarray(ours.astype(jnp.float32)), as_numpy(theirs.float()))


# --- Gradients -----------------------------------------------------------------------------------


@every_kind
@every_sharing
@pytest.mark.parametrize("bitwidth", [2, 4, 8])
def test_gradients_are_aimets(bitwidth, sharing, symmetric):
    array, shape = ARRAYS["scattered"], SHARING[sharing]
    cotangent = ARRAYS["normal"]
    low, high = (0.4 * end.reshape(shape) for end in _ends(array, shape))  # the rest is clipped
    leaves = scale_and_offset(low, high, bitwidth, symmetric)
    inputs = [torch.tensor(leaf, requires_grad=True) for leaf in (array, *leaves)]
    out = affine.quantize_dequantize(*inputs, bitwidth, block_size=blocks_of(shape))
    out.backward(torch.tensor(cotangent))
    _, back = jax.vjp(
        lambda *of: fake_quantize(*of, bitwidth), *(jnp.asarray(leaf) for leaf in (array, *leaves))
    )
    for ours, theirs in zip(back(jnp.asarray(cotangent)), inputs, strict=True):
        size = float(theirs.grad.abs().max()) + 1
        np.testing.assert_allclose(ours, theirs.grad.numpy(), rtol=1e-4, atol=1e-5 * size)


def _ends(array: Array, shape: tuple[int, ...]) -> tuple[Array, Array]:
    rows = groups(array, shape)
    return rows.min(1), rows.max(1)


# --- Ranges --------------------------------------------------------------------------------------


@pytest.mark.parametrize("percentile", [99.9, 99.0, 90.0])
@pytest.mark.parametrize("kind", ["normal", "heavy", "positive"])
def test_percentiles_are_aimets_within_a_bin_of_either(kind, percentile):
    values = np.random.default_rng(0).normal(size=(3, 20011))  # no percentage of it is whole
    if kind == "heavy":
        values *= np.abs(values)
    if kind == "positive":
        values = np.abs(values)
    values = np.float32(values)
    analyzer = analyzers.PercentileEncodingAnalyzer((3, 1), percentile=percentile)
    analyzer.update_stats(torch.tensor(values))
    theirs = [as_numpy(end)[:, 0] for end in analyzer.compute_encodings(255, False)]
    total = of_array("histogram", values)
    ours = METHODS["percentile"].range(total, 8, False, percentile=percentile)
    width = (values.max(1) - values.min(1)) / 2048 + 2.0 ** total["exponent"][0]
    assert np.all(np.abs(np.minimum(ours[0][0], 0) - theirs[0]) <= width)
    assert np.all(np.abs(np.maximum(ours[1][0], 0) - theirs[1]) <= width)


@every_kind
@pytest.mark.parametrize("bitwidth", [2, 3, 4, 8])
def test_mse_errs_as_little_as_aimets_search(bitwidth, symmetric):
    """Both try some ranges only, not the same ones; AIMET's here without its weight on clipping."""
    rng = np.random.default_rng(1)
    values = np.float32(rng.normal(size=(4, 5000)) * np.exp(0.5 * rng.normal(size=(4, 5000))))
    analyzer = analyzers.SqnrEncodingAnalyzer((4, 1), gamma=1.0)
    analyzer.update_stats(torch.tensor(values))
    theirs = [as_numpy(end) for end in analyzer.compute_encodings(2**bitwidth - 1, symmetric)]
    total = of_array("histogram", values)
    ours = [end.T for end in METHODS["mse"].range(total, bitwidth, symmetric)]
    errors = []
    for low, high in (ours, theirs):
        scale, offset = scale_and_offset(low, high, bitwidth, symmetric)
        away = np.asarray(fake_quantize(jnp.asarray(values), scale, offset, bitwidth)) - values
        errors.append(np.mean(np.float64(away) ** 2, 1))
    assert np.all(errors[0] <= 1.05 * errors[1])
    assert np.mean(errors[0]) <= 1.02 * np.mean(errors[1])


@pytest.mark.parametrize("momentum", [0.99, 0.9, 0.5])
def test_moving_averages_are_torchs(momentum):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its place is to change
        from torch.ao.quantization import MovingAverageMinMaxObserver
    observer = MovingAverageMinMaxObserver(averaging_constant=1 - momentum)
    method, total = METHODS["moving_average"], None
    for seed in range(6):
        batch = np.float32(np.random.default_rng(seed).normal(size=(1, 40)) + seed)
        observer(torch.tensor(batch))
        total = method.accumulate(total, of_array("extremes", batch), momentum=momentum)
    low, high = method.range(total, 8, False)
    np.testing.assert_array_equal(low[0, 0], observer.min_val.numpy())
    np.testing.assert_array_equal(high[0, 0], observer.max_val.numpy())

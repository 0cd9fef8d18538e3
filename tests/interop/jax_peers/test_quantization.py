"""The formats that others read: Q4_0 of `gguf` bit for bit, and the methods of `gemma.peft`."""

import functools
import importlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import peft_jax as peft

Array = np.ndarray[Any, Any]

quantize = {"eager": peft.quantize, "jit": jax.jit(peft.quantize, static_argnums=(1, 2))}
simulate = {
    "eager": peft.simulate_quantize,
    "jit": jax.jit(peft.simulate_quantize, static_argnums=(1, 2)),
}
eager_and_jit = pytest.mark.parametrize("how", ["eager", "jit"])


def codes_of(values: peft.StoredValues) -> Array:
    """The codes in stored values: low bits first, then high bits, along the packed axis."""
    array, axis = np.asarray(values.array), values.layout.axis
    return array if axis is None else np.concatenate([array & 15, array >> 4], axis)


def assert_same_bits(actual: Any, expected: Any) -> None:
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
    kind = f"u{actual.itemsize}"
    np.testing.assert_array_equal(actual.view(kind), expected.view(kind))


# --- Q4_0 and gguf -------------------------------------------------------------------------------

SIZE = 2**20  # values of each kind
COLUMNS = 4096


def blocks(kind: str) -> Array:
    """Values of one kind, in blocks of 32 along the last axis."""
    rng = np.random.default_rng(list(kind.encode()))
    x = rng.normal(size=(SIZE // 32, 32))
    scattered = 10 ** rng.uniform(-1, 1, (SIZE // 32, 1))
    match kind:
        case "normal":
            x *= 0.02
        case "uniform":
            x = rng.uniform(-1, 1, x.shape) * scattered
        case "negative":
            x = -np.abs(x) * scattered
        case "positive":
            x = np.abs(x) * scattered
        case "whole numbers":  # both signs of the largest are there: the first one leads
            x = rng.integers(-8, 9, x.shape).astype(float)
        case "halves":
            x = rng.integers(-16, 17, x.shape) / 2
        case "quarters of a power of two":
            x = rng.integers(-32, 33, x.shape) * 2.0 ** rng.integers(-12, 12, (SIZE // 32, 1))
        case "near ties":  # where one rounding less gives another nibble
            d = np.float32(rng.uniform(0.1, 1, (SIZE // 32, 1)))
            x = np.float32(rng.integers(-7, 8, x.shape) - 0.5) * d
            x = (x.view(np.int32) + rng.integers(-4, 5, x.shape, np.int32)).view(np.float32)
            x[:, :1] = -8 * d
        case "few bits":  # of float16: many ties, after rounding too
            x = x.astype(np.float16).astype(float)
        case "many magnitudes":
            x *= 10 ** rng.uniform(-30, 4.5, (SIZE // 32, 1))
        case "many magnitudes in a block":
            x *= 10 ** rng.uniform(-20, 4, x.shape)
        case "one large":
            x[:, 7] *= 1e4
        case "denormal scales":
            x *= 8 * 2.0 ** rng.uniform(-28, -13, (SIZE // 32, 1))
        case "ties of denormal scales":
            x = rng.integers(-8, 9, x.shape) * 2.0**-24 * rng.integers(0, 65, (SIZE // 32, 1)) / 4
        case "largest scales":
            x = np.clip(x, -4, 4) * 131008 * rng.uniform(0.9, 1, (SIZE // 32, 1))
        case "zero blocks":
            x *= rng.integers(0, 2, (SIZE // 32, 1)) == 1
        case "mostly zeros":
            x *= rng.uniform(size=x.shape) < 0.02
        case "one value":
            x = np.broadcast_to(x[:, :1], x.shape)
    # No -0: in a block of zeros, gguf takes its sign for the scale's, which GGML's C code does not.
    return np.where(x == 0, 0, np.float32(x)).reshape(-1, COLUMNS)


KINDS = (
    "normal",
    "uniform",
    "negative",
    "positive",
    "whole numbers",
    "halves",
    "quarters of a power of two",
    "near ties",
    "few bits",
    "many magnitudes",
    "many magnitudes in a block",
    "one large",
    "denormal scales",
    "ties of denormal scales",
    "largest scales",
    "zero blocks",
    "mostly zeros",
    "one value",
)


def of_gguf(x: Array) -> tuple[Array, Array, Array]:
    """Nibbles and scales of `gguf`, and its dequantized values."""
    gguf = pytest.importorskip("gguf")
    q4_0 = gguf.GGMLQuantizationType.Q4_0
    with np.errstate(all="ignore"):
        data = gguf.quants.quantize(x, q4_0)
    block = data.reshape(*x.shape[:-1], x.shape[-1] // 32, 18)
    packed = block[..., 2:]
    nibbles = np.concatenate([packed & 15, packed >> 4], -1).reshape(x.shape)
    scale = np.ascontiguousarray(block[..., :2]).view(np.float16)[..., 0]
    return nibbles, scale, gguf.quants.dequantize(data, q4_0)


@eager_and_jit
@pytest.mark.parametrize("kind", KINDS)
def test_q4_0_is_that_of_gguf(kind: str, how: str) -> None:
    x = blocks(kind)
    nibbles, scale, restored = of_gguf(x)
    values, found = quantize[how](x, "q4_0")
    np.testing.assert_array_equal(codes_of(values), nibbles)
    assert_same_bits(found, scale)
    assert_same_bits(peft.dequantize(values, found), restored)
    assert_same_bits(simulate[how](x, "q4_0"), restored)


@eager_and_jit
def test_q4_0_of_tiny_values(how: str) -> None:
    rng = np.random.default_rng(0)
    x = rng.uniform(-1, 1, (SIZE // 32, 32)) * 10 ** rng.uniform(-46, -34, (SIZE // 32, 1))
    x = np.float32(x).reshape(-1, COLUMNS)
    nibbles, scale, restored = of_gguf(x)
    values, found = quantize[how](x, "q4_0")
    np.testing.assert_array_equal(peft.dequantize(values, found), restored)
    np.testing.assert_array_equal(found, scale)
    large = np.repeat(np.max(np.abs(x.reshape(-1, 32)), -1) >= 1e-36, 32).reshape(x.shape)
    np.testing.assert_array_equal(codes_of(values)[large], nibbles[large])


@eager_and_jit
def test_q4_0_of_negative_zeros(how: str) -> None:
    x = np.full((32, COLUMNS), -0.0, np.float32)
    values, found = quantize[how](x, "q4_0")
    np.testing.assert_array_equal(codes_of(values), of_gguf(x)[0])
    np.testing.assert_array_equal(found, of_gguf(x)[1])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@eager_and_jit
def test_q4_0_of_short_floats(dtype: Any, how: str) -> None:
    x = blocks("uniform").astype(dtype)
    nibbles, scale, restored = of_gguf(x.astype(np.float32))
    values, found = quantize[how](x, "q4_0")
    np.testing.assert_array_equal(codes_of(values), nibbles)
    assert_same_bits(found, scale)
    assert_same_bits(simulate[how](x, "q4_0"), restored.astype(dtype))


@eager_and_jit
@pytest.mark.parametrize("kind", ["uniform", "whole numbers", "denormal scales"])
def test_q4_0_transpose_is_that_of_the_transpose(kind: str, how: str) -> None:
    x = blocks(kind).reshape(2, -1, COLUMNS)
    nibbles, scale, restored = (array.swapaxes(-1, -2) for array in of_gguf(x))
    values, found = quantize[how](np.ascontiguousarray(x.swapaxes(-1, -2)), "q4_0_transpose")
    np.testing.assert_array_equal(codes_of(values), nibbles)
    assert_same_bits(np.ascontiguousarray(found), np.ascontiguousarray(scale))
    assert_same_bits(peft.dequantize(values, found), np.ascontiguousarray(restored))


# --- gemma.peft ----------------------------------------------------------------------------------


def theirs(private: str = "") -> Any:
    """`gemma.peft`, or the module of it in which `uniform_quantize` is."""
    pytest.importorskip("gemma")
    return importlib.import_module(f"gemma.peft{private}")


def channels(shape: tuple[int, ...], spread: float = 1.0, seed: int = 0) -> Array:
    """Values of many magnitudes; each channel, the last axis, has its own."""
    rng = np.random.default_rng((*shape, seed))
    x = rng.normal(size=shape) * 10 ** rng.uniform(-spread, 0, shape)
    return np.float32(x * 10 ** rng.uniform(-2, 2, shape[-1]))


def assert_close(actual: Any, expected: Any, axes: tuple[int, ...], most: float = 0) -> None:
    """Within 1e-6 of the largest value that shares the scale, but for `most` of them."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.dtype == expected.dtype
    peak = np.max(np.abs(expected), axes, keepdims=True)
    assert np.mean(~(np.abs(actual - expected) <= 1e-6 * peak)) <= most


LAYERS = {
    "dense": ((512, 2048), (0,)),
    "heads in": ((8, 256, 64), (1,)),
    "heads out": ((8, 64, 256), (0, 1)),
    "gates": ((2, 256, 512), (2,)),
    "keys and values": ((2, 4, 256, 32), (2,)),
}
every_layer = pytest.mark.parametrize(("shape", "axes"), LAYERS.values(), ids=LAYERS)


@eager_and_jit
@every_layer
@pytest.mark.parametrize(("method", "bits"), [("int4", 4), ("int8", 8)])
def test_integers_are_those_of_gemma(
    method: str, bits: int, shape: tuple[int, ...], axes: tuple[int, ...], how: str
) -> None:
    utils = theirs("._quantization_utils")
    x = channels(shape)
    uniform = functools.partial(
        utils.uniform_quantize,
        bitwidth=bits,
        granularity=utils.QuantizationGranularity.PER_CHANNEL,
        dtype=jnp.int8,
        axis_to_reduce=axes,
    )
    kernel, reciprocal = (jax.jit(uniform) if how == "jit" else uniform)(x)
    values, scale = quantize[how](x, method, axes)
    offset = 8 if bits == 4 else 0
    np.testing.assert_array_equal(codes_of(values).astype(int) - offset, kernel)
    np.testing.assert_allclose(scale * reciprocal, np.ones(scale.shape), rtol=1e-6)
    assert_close(peft.dequantize(values, scale), kernel / reciprocal, axes)


@eager_and_jit
@pytest.mark.parametrize("method", ["int4", "int8"])
@pytest.mark.parametrize("shape", [(1024, 1024), (4, 128, 256)], ids=str)
def test_simulated_integers_are_those_of_gemma(
    shape: tuple[int, ...], method: str, how: str
) -> None:
    x, axes = channels(shape), tuple(range(len(shape) - 1))
    simulated = functools.partial(theirs().simulate_quantize, method=method)
    expected = (jax.jit(simulated) if how == "jit" else simulated)(x)
    assert_close(simulate[how](x, method, axes), expected, axes)


@eager_and_jit
@pytest.mark.parametrize("spread", [1.0, 9.0])
@pytest.mark.parametrize("shape", [(1024, 1024), (4, 128, 256)], ids=str)
def test_sfp8_is_that_of_gemma(shape: tuple[int, ...], spread: float, how: str) -> None:
    x, axes = channels(shape, spread), tuple(range(len(shape) - 1))
    simulated = functools.partial(theirs().simulate_quantize, method="SFP8")
    expected = (jax.jit(simulated) if how == "jit" else simulated)(x)
    # Their logarithms and powers are approximate: a value on a tie may go the other way.
    assert_close(simulate[how](x, "sfp8", axes), expected, axes, most=4e-6)


def test_every_number_of_sfp8_is_that_of_gemma() -> None:
    # Near every number and every tie, but on no tie.
    sizes = 2.0 ** np.arange(-26, 1)[:, None] * (1 + (np.arange(64) + 0.3) / 64)
    x = np.float32([1.875, 0, *(sign * size for size in sizes[sizes < 1.875] for sign in (1, -1))])
    expected = theirs().simulate_quantize(x[:, None], "SFP8")
    found = simulate["eager"](x[:, None], "sfp8")
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert len(np.unique(found)) == 1 + 2 * (116 + 4)  # 0, and each size from 2^-20 on and below


@eager_and_jit
@pytest.mark.parametrize("method", ["Q4_0", "Q4_0_TRANSPOSE"])
def test_simulated_q4_0_is_that_of_gemma(method: str, how: str) -> None:
    x = blocks("uniform").reshape(2, -1, COLUMNS)
    simulated = functools.partial(theirs().simulate_quantize, method=method)
    expected = (jax.jit(simulated) if how == "jit" else simulated)(x)
    np.testing.assert_array_equal(simulate[how](x, method), expected)


@pytest.mark.parametrize("method", ["INT4", "INT8", "SFP8", "Q4_0", "Q4_0_TRANSPOSE"])
def test_gradients_are_those_of_gemma(method: str) -> None:
    x, weights = channels((64, 64)), channels((64, 64), seed=1)
    ours, other = (
        jax.grad(lambda x, f=f: jnp.sum(f(x, method) * weights))(x)
        for f in (peft.simulate_quantize, theirs().simulate_quantize)
    )
    np.testing.assert_array_equal(ours, other)


@pytest.mark.parametrize("method", ["INT4", "INT8", "SFP8", "Q4_0"])
def test_zero_channels_are_zeros_here(method: str) -> None:
    x = channels((64, 64))
    x[:, 32:] = 0
    found = np.asarray(peft.simulate_quantize(x, method))
    assert not np.any(found[:, 32:])
    expected = np.asarray(theirs().simulate_quantize(x, method))
    assert_close(found[:, :32], expected[:, :32], (0,))
    if method in ("INT4", "INT8"):
        assert np.all(np.isnan(expected[:, 32:]))

"""Products with stored weights: numbers against numpy, programs of every platform, and memory."""

import dataclasses
import functools
import math

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from helpers import WRAPPERS, intercepting, key_of, numbers, partly_slow, rounding, scattered

import peft_jax as peft
from peft_jax._numerics import (
    METHODS,
    Layout,
    StoredValues,
    pack,
    quantized_einsum,
    quantized_rows,
    unpack,
)

CHANNELS = tuple(name for name, method in METHODS.items() if method.block is None)
BLOCKS = tuple(name for name in METHODS if name not in CHANNELS)
PACKED = tuple(name for name, method in METHODS.items() if method.bits == 4)
ROWS = (1, 2, 16, 65, 200)
every_method = pytest.mark.parametrize("method", METHODS)


# --- The same in numpy ---------------------------------------------------------------------------


def numpy_dequantize(values, scale):
    """The weight in float64; what number a code stands for is tested in `test_quantize`."""
    layout, codes = values.layout, np.asarray(values.array)
    if layout.axis is not None:
        pair = np.concatenate([codes & 15, codes >> 4], axis=layout.axis)
        codes = np.take(pair, np.arange(values.shape[layout.axis]), axis=layout.axis)
    table = np.asarray(layout.row.values(jnp.arange(256).astype(codes.dtype)), np.float64)
    weight, factors = table[codes.astype(np.uint8)], np.asarray(scale, np.float64)
    for axis, length in enumerate(weight.shape):
        factors = np.repeat(factors, length // factors.shape[axis], axis=axis)
    return weight * factors


def drawn(shape, dtype=jnp.float32, seed=0):
    return numbers(*shape, seed=seed).astype(dtype)


def stored(shape, method, axes=(0,), packed=None):
    """A stored weight, packed along an axis."""
    values, scale = peft.quantize(drawn(shape), method, axes if method in CHANNELS else None)
    if packed is not None:
        codes = unpack(values.array, values.layout).astype(jnp.int32)
        values = StoredValues(Layout(method, packed, shape[packed]), pack(codes, packed))
    return values, scale


def off(found, expected):
    """The largest error, as a part of the largest number."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape
    assert np.all(np.isfinite(found))
    largest = np.max(np.abs(expected), initial=1e-30)
    return np.max(np.abs(found - expected), initial=0) / largest


def check_product(equation, x, values, scale, rounded=0.0):
    """The product and its derivative by the input, up to the rounding of their sums in float32.

    ``rounded`` is the step to which dtypes of 16 bits round what was summed in float32.
    """

    @jax.jit
    def run(x, values, scale):
        y, vjp = jax.vjp(lambda x: quantized_einsum(equation, x, values, scale), x)
        dy = jnp.asarray(scattered(y.size, 0.5).reshape(y.shape)).astype(y.dtype)
        return y, dy, vjp(dy)[0]

    y, dy, dx = run(x, values, scale)
    assert y.dtype == dx.dtype == x.dtype
    weight, x64 = numpy_dequantize(values, scale), np.asarray(x, np.float64)
    expected = np.einsum(equation, x64, weight, optimize=True)
    terms = equation.replace("->", ",").replace(" ", "").split(",")
    if "..." in equation:
        terms = [term.replace("...", "XYZ"[: x.ndim - len(terms[0]) + 3]) for term in terms]
    left, right, out = terms
    dy64 = np.asarray(dy, np.float64)
    summed = "".join(c for c in left if c in right + out)
    dx64 = np.einsum(f"{out},{right}->{summed}", dy64, weight, optimize=True)
    lengths = dict(zip(left + right, x.shape + weight.shape, strict=True))

    def terms_of(inputs, output):
        return math.prod(lengths[c] for c in set(inputs) - set(output))

    dx64 = np.broadcast_to(dx64.reshape([lengths[c] if c in summed else 1 for c in left]), x.shape)
    for found, exact, count in (
        (y, expected, terms_of(left + right, out)),
        (dx, dx64, terms_of(out + right, left)),
    ):
        tolerance = rounding(count)
        assert off(found, exact) <= tolerance + rounded
        if rounded:
            error = np.abs(np.asarray(found, np.float64) - exact)
            assert np.all(error <= rounded * np.abs(exact) + tolerance * np.max(np.abs(exact)))


# --- Numbers -------------------------------------------------------------------------------------

# The weight's letters in brackets: the last axis is 96 long, the one before 192, others 3; t is
# the rows.
EQUATIONS = (
    "ti,io->to",
    "ti,oi->to",
    "it,io->ot",
    "...i,io->...o",
    "tnh,nhd->td",
    "htn,nhd->dt",
    "td,dnh->tnh",
    "td,ndh->nth",
    "td,nhd->thn",
    "ti,aibc->tcab",
    "tgi,gio->tgo",
    "tgi,igo->gto",
    "tgi,iog->tgo",
    "tghi,ghio->htgo",
    "tij,gijo->tgo",
    "ti,kio->to",
    "bti,io->bo",
)
PAIRS = tuple(
    (equation, tuple(METHODS)[(i + j) % len(METHODS)], ROWS[(i + j) % len(ROWS)])
    for i, equation in enumerate(EQUATIONS)
    for j in (0, 3)
)


@pytest.mark.slow
@pytest.mark.parametrize(("equation", "method", "rows"), PAIRS)
def test_products_and_their_derivatives(equation, method, rows):
    left, right = equation.split("->")[0].split(",")
    shape = (*(3,) * (len(right) - 2), 192, 96)
    lengths = {"t": rows, "b": 2, **dict(zip(right, shape, strict=True))}
    contracted = [i for i, c in enumerate(right) if c in left and c not in equation.split(">")[1]]
    values, scale = stored(shape, method, contracted)
    free = left.replace("...", "t")
    check_product(equation, drawn([lengths[c] for c in free]), values, scale)


@pytest.mark.optimized
@pytest.mark.parametrize(
    ("method", "rows"),
    partly_slow(
        [(method, rows) for i, method in enumerate(METHODS) for rows in (1, (16, 65, 200)[i % 3])],
        lambda pair: (tuple(METHODS).index(pair[0]) % 2 == 0) == (pair[1] == 1),
    ),
)
def test_rows_of_input(method, rows):
    check_product("ti,io->to", drawn((rows, 1088)), *stored((1088, 1056), method))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "rows", "packed"),
    [
        ((7, 5), 3, 0),
        ((7, 5), 3, 1),
        ((1, 6), 1, 1),
        ((6, 1), 1, 0),
        ((2, 2), 1, 0),
        ((514, 31), 1, 0),
        ((31, 514), 2, 1),
        ((1030, 130), 65, 0),
        ((130, 1030), 65, 1),
        ((2050, 18), 65, 0),
        ((18, 8194), 2, 1),
        ((513, 513), 65, 0),
    ],
    ids=str,
)
def test_odd_sizes(shape, rows, packed):
    values = stored(shape, "int4", packed=packed)
    check_product("ti,io->to", drawn((rows, shape[0])), *values)


@pytest.mark.parametrize("method", ["int8", "sfp8"])
def test_odd_sizes_of_bytes(method):
    check_product("ti,io->to", drawn((65, 1031)), *stored((1031, 131), method))


@pytest.mark.parametrize("packed", [0, 1, -1])
@pytest.mark.parametrize("method", ["int4", "q4_0", "nf4"])
def test_packed_along_any_axis(method, packed):
    rows = ROWS[(packed + METHODS[method].offset) % len(ROWS)]
    values = stored((4, 64, 96), method, packed=packed)
    check_product("td,dnh->tnh", drawn((rows, 4)), *values)


@pytest.mark.parametrize("axes", [(0,), (1,), (0, 1)])
@pytest.mark.parametrize("method", CHANNELS)
def test_scales_of_rows_of_columns_and_of_the_whole(method, axes):
    rows = 1 if method == "int4" else 16
    check_product("ti,io->to", drawn((rows, 256)), *stored((256, 128), method, axes))


@pytest.mark.parametrize("rows", [1, 2])
def test_a_scale_for_every_value(rows):
    values, scale = stored((96, 4), "int8")
    check_product("ti,io->to", drawn((rows, 96)), values, jnp.tile(scale, (96, 1)))


@pytest.mark.optimized
@pytest.mark.parametrize(
    ("method", "shape"),
    partly_slow(
        [(method, shape) for method in METHODS for shape in ((4096, 64), (128, 4096))],
        lambda pair: (tuple(METHODS).index(pair[0]) % 2 == 0) == (pair[1] == (4096, 64)),
    ),
)
def test_sums_of_4096_products(method, shape):
    """jaxlib 0.10.2 sums unpacked int8 wrongly on CPU where the sum is compiled with it."""
    rows = 1 if shape[0] == 4096 else 3
    check_product("ti,io->to", drawn((rows, shape[0])), *stored(shape, method))


@pytest.mark.parametrize("rows", [1, 16])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("method", ["int8", "q4_0"])
def test_sums_of_16_bits_are_those_of_float32(method, dtype, rows):
    """Each output is rounded once."""
    step = float(jnp.finfo(dtype).eps) / 2
    x = drawn((rows, 1024), dtype)
    check_product("ti,io->to", x, *stored((1024, 64), method), rounded=1.01 * step)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_dtype_of_the_output(dtype):
    values, scale = stored((64, 32), "int4")
    x = drawn((3, 64), jnp.bfloat16)
    y, dx = jax.jit(
        lambda x: jax.vjp(lambda x: quantized_einsum("ti,io->to", x, values, scale, dtype=dtype), x)
    )(x)
    assert y.dtype == dtype
    expected = np.asarray(x, np.float64) @ numpy_dequantize(values, scale)
    assert off(y, expected) < rounding(64) + (0 if dtype == jnp.float32 else 2**-8)
    assert dx(y)[0].dtype == x.dtype


@every_method
def test_no_rows(method):
    values, scale = stored((64, 32), method)
    x = jnp.zeros((0, 64))

    @jax.jit
    def run(x, scale):
        y, vjp = jax.vjp(lambda x, s: quantized_einsum("ti,io->to", x, values, s), x, scale)
        return y, *vjp(y)

    y, dx, dscale = run(x, scale)
    assert (y.shape, dx.shape) == ((0, 32), (0, 64))
    np.testing.assert_array_equal(dscale, jnp.zeros_like(scale))


@pytest.mark.parametrize(
    ("equation", "x", "weight"),
    [
        ("tgi,gio->tgo", (3, 2, 64), (1, 64, 32)),
        ("tgi,gio->tgo", (3, 1, 64), (2, 64, 32)),
        ("ti,io->to", (3, 1), (64, 32)),
        ("ti,oi->to", (3, 64), (32, 1)),
    ],
)
def test_letters_of_length_one_broadcast(equation, x, weight):
    """As `jnp.einsum` has it."""
    values, scale = stored(weight, "int4", axes=(1,))
    x = drawn(x)
    found = jax.jit(lambda x: quantized_einsum(equation, x, values, scale))(x)
    expected = np.einsum(equation, np.asarray(x, np.float64), numpy_dequantize(values, scale))
    assert off(found, expected) < rounding(64)


@pytest.mark.parametrize(
    ("equation", "method"),
    [
        ("ti,io->to", "int4"),
        ("ti,io->to", "q4_0"),
        ("ti,io->to", "nf4"),
        ("ti,io->tio", "sfp8"),
        ("tij,ij->tij", "q4_0"),
        ("tii,io->to", "int8"),
        ("tii,io->to", "q4_0"),
    ],
)
def test_derivatives_by_the_scale(equation, method):
    left = equation.split(",")[0]
    x = drawn([{"t": 3, "i": 64, "j": 32}[c] for c in left])
    values, scale = stored((64, 32), method)
    scale = scale.astype(jnp.float32)

    def plain(x, scale):
        return jnp.einsum(equation, x, peft.dequantize(values, scale))

    def found(x, scale):
        return quantized_einsum(equation, x, values, scale)

    def derivatives(run, x, scale):
        y, vjp = jax.vjp(run, x, scale)
        return y, *vjp(jnp.cos(y)), jax.jvp(run, (x, scale), (jnp.cos(x), jnp.sin(scale)))[1]

    @jax.jit
    def both(x, scale):
        return derivatives(found, x, scale), derivatives(plain, x, scale)

    for a, b in zip(*both(x, scale), strict=True):
        assert off(a, b) < 2 * rounding(64)  # a sum, and the derivative of one through it


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("method", METHODS)
def test_rows_of_a_table(method, axis):
    shape = (128, 64)
    packed = axis if method in PACKED else None
    values, scale = stored(shape, method, axes=(axis,), packed=packed)
    ids = jnp.asarray([[0, 63, 64], [127, -1, 5]])
    found = jax.jit(lambda ids: quantized_rows(values, scale, ids, jnp.float32))(ids)
    expected = numpy_dequantize(values, scale)[np.asarray(ids)]
    assert off(found, expected) <= jnp.finfo(jnp.float32).eps  # a product, and no sum


@pytest.mark.parametrize("shape", [(5,), (1, 5), (64, 33), (3, 1)])
def test_scales_that_do_not_fit(shape):
    values, _ = stored((64, 32), "int4")
    with pytest.raises(ValueError, match="does not fit values of shape"):
        quantized_einsum("ti,io->to", jnp.ones((3, 64)), values, jnp.ones(shape))


# --- Programs ------------------------------------------------------------------------------------


def inference(x, values, scale):
    return quantized_einsum("ti,io->to", x, values, scale)


def with_gradient(x, values, scale):
    y, vjp = jax.vjp(functools.partial(inference, values=values, scale=scale), x)
    return y, vjp(jnp.tanh(y))


def abstract(tree):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


def large(method, rows=16, width=1024):
    """The types of a product that is worth tiles."""
    weight = jax.ShapeDtypeStruct((width, width), jnp.float32)
    return (
        jax.ShapeDtypeStruct((rows, width), jnp.float32),
        *jax.eval_shape(lambda weight: peft.quantize(weight, method), weight),
    )


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
@every_method
def test_programs_for_every_platform(method, platform):
    """By the platform that is lowered for, not by the one that runs: a loop over tiles on CPU."""
    for function in (inference, with_gradient):
        exported = jax.export.export(jax.jit(function), platforms=[platform])(*large(method))
        assert exported.platforms == (platform,)
        assert ("stablehlo.while" in exported.mlir_module()) == (platform == "cpu")


def test_one_program_for_all_platforms():
    values = stored((256, 128), "int4")
    x = drawn((16, 256))
    export = jax.export.export(jax.jit(with_gradient), platforms=["cpu", "cuda", "tpu"])
    found, expected = export(*abstract((x, *values))).call(x, *values), with_gradient(x, *values)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert off(a, b) < 2 * rounding(256)  # a sum, and a sum of functions of it


class Chain(nn.Module):
    """Layers of one kind, each of 512 x 512 weights, with tanh between."""

    kind: str
    layers: int

    @nn.compact
    def __call__(self, x):
        for _ in range(self.layers):
            x = nn.tanh(self.layer(x)).reshape(x.shape)
        return x

    def layer(self, x):
        if self.kind == "einsum":
            return nn.Einsum((8, 64, 512), "tnh,nhd->td")(x.reshape(-1, 8, 64))
        if self.kind == "einsum out":
            return nn.Einsum((512, 8, 64), "td,dnh->tnh")(x)
        if self.kind == "general":
            return nn.DenseGeneral(512, axis=(-2, -1))(x.reshape(-1, 8, 64))
        if self.kind == "conv":
            return nn.Conv(512, (1,))(x)
        if self.kind == "attend":
            return nn.Embed(512, 512).attend(x)
        return nn.Dense(512)(x)


STORING = {
    nn.Dense: peft.Int4Dense,
    nn.Einsum: peft.Int4Einsum,
    nn.DenseGeneral: peft.Int4DenseGeneral,
    nn.Conv: peft.Int4Conv,
    nn.Embed: peft.Int4Embed,
}


@dataclasses.dataclass(frozen=True)
class QLoRA:
    """A rule that puts adapters over stored values; none of them for no method."""

    method: str | None

    def __call__(self, module):
        if type(module) not in STORING:
            return module
        if self.method is not None:
            module = STORING[type(module)](wrapped=module, method=self.method)
        _, inside = module.unwrap() if self.method is not None else (None, module)
        return WRAPPERS[type(inside)](rank=4, wrapped=module)


def temporaries(kind, layers, method, rows=8):
    """The bytes that a training step of the adapters needs beside its arguments and results."""
    model, x = Chain(kind, layers), jax.ShapeDtypeStruct((rows, 512), jnp.float32)
    rule = QLoRA(method)
    with intercepting(rule):
        params = jax.eval_shape(lambda x: model.init(key_of(0), x), x)["params"]
    base, lora = peft.split_params(params)

    def loss(lora, base, x):
        with intercepting(rule):
            return jnp.mean(model.apply({"params": peft.merge_params(base, lora)}, x) ** 2)

    step = jax.jit(jax.value_and_grad(loss)).lower(lora, base, x).compile()
    return step.memory_analysis().temp_size_in_bytes


WEIGHT = 512 * 512 * 4  # bytes of one dequantized layer
KEPT = [
    *(("dense", method) for method in METHODS),
    ("einsum", "int4"),
    ("einsum out", "q4_0"),
    ("general", "q4_0"),
    ("conv", "int8"),
    ("attend", "int4"),
    ("attend", "q4_0"),
]


@pytest.mark.parametrize(("kind", "method"), partly_slow(KEPT, KEPT[::3]))
def test_no_layer_keeps_its_dequantized_weight(kind, method):
    """Temporaries of a QLoRA step grow with the activations of further layers alone."""
    few, many = (temporaries(kind, layers, method) for layers in (2, 6))
    assert (many - few) / 4 < WEIGHT / 8


@pytest.mark.parametrize(
    ("method", "rows"), [(method, (1, 16, 256)[i % 3]) for i, method in enumerate(METHODS)]
)
@pytest.mark.optimized
def test_no_product_holds_the_dequantized_weight(method, rows):
    """On CPU, neither forward nor backward needs as much as the weight in floats."""
    program = jax.jit(with_gradient).lower(*large(method, rows, width=2048)).compile()
    assert program.memory_analysis().temp_size_in_bytes < 2048 * 2048 * 4 * 3 / 4

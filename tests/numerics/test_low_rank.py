import contextlib
import itertools
import math
import re
import string

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import partly_slow
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from peft_jax._numerics import delta, low_rank_product, matricize, unmatricize

pytestmark = pytest.mark.optimized

DENSE = ("...i,ir->...r", "...r,ro->...o")
CASES = {
    "dense": ((2, 3, 5), (5, 2), (2, 4), *DENSE),
    "dense, one axis": ((5,), (5, 2), (2, 4), *DENSE),
    "dense, no tokens": ((0, 3, 5), (5, 2), (2, 4), *DENSE),
    "wide rank": ((2, 3, 2), (2, 7), (7, 1), *DENSE),
    "heads out": ((2, 3, 5), (5, 2), (2, 4, 3), "bti,ir->btr", "btr,rnh->btnh"),
    "heads in": ((2, 3, 4, 5), (4, 5, 2), (2, 6), "btnh,nhr->btr", "btr,rd->btd"),
    "heads swapped": ((2, 4, 3, 5), (5, 4, 2), (2, 6), "bnth,hnr->btr", "btr,rd->tbd"),
    "batch": ((2, 3, 4, 5), (4, 5, 2), (4, 2, 6), "btgi,gir->btgr", "btgr,gro->btgo"),
    "batch in a": ((2, 3, 4, 5), (4, 5, 2), (2, 6), "btgi,gir->btgr", "btgr,ro->btgo"),
    "contracted first": ((5, 2, 3), (5, 2), (2, 4), "ibt,ir->btr", "btr,ro->obt"),
    "repeated": ((3, 3, 5), (5, 2), (2, 4), "ttd,dr->tr", "tr,ro->to"),
    "summed": ((2, 3, 5), (5, 2), (2, 4), "bti,ir->br", "br,ro->bo"),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def whole_numbers(shape, seed):
    """Small whole numbers in float32: every product and sum below is exact, in any order."""
    return np.random.default_rng(seed).integers(-3, 4, shape).astype(np.float32)


def arrays_of(case):
    return tuple(jnp.asarray(whole_numbers(shape, seed)) for seed, shape in enumerate(case[:3]))


def product_of(case):
    return lambda x, a, b: low_rank_product(x, a, b, *case[3:])


def einsum_of(case):
    first, second = case[3:]
    return lambda x, a, b: jnp.einsum(second, jnp.einsum(first, x, a), b)


def numpy_product(x, a, b, first, second):
    x, a, b = (np.asarray(array, np.float64) for array in (x, a, b))
    return np.einsum(second, np.einsum(first, x, a), b)


def loss_of(product):
    """A loss whose cotangent differs from place to place; exact for whole numbers."""

    def loss(x, a, b):
        y = product(x, a, b)
        return jnp.sum(y * (jnp.arange(y.size, dtype=y.dtype) % 5 - 2).reshape(y.shape))

    return loss


def gradients_of(product):
    return jax.grad(loss_of(product), argnums=(0, 1, 2))


def assert_same(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


# --- Any equation --------------------------------------------------------------------------------


@st.composite
def equations(draw):
    """Draws `(x, a, b, first, second)` with axes of every role, in any order."""
    letters = iter(string.ascii_lowercase)
    roles = {
        role: [next(letters) for _ in range(draw(st.integers(0, most)))]
        for role, most in {"tokens": 3, "contracted": 2, "batch": 2, "out": 2, "alone": 1}.items()
    }
    roles["rank"] = [next(letters)]
    size = dict.fromkeys(string.ascii_lowercase, 1) | {
        letter: draw(st.integers(1, 4)) for letter in itertools.chain(*roles.values())
    }
    repeated = roles["contracted"][:1] if draw(st.booleans()) else []

    def shuffled(*names):
        return "".join(draw(st.permutations([letter for name in names for letter in roles[name]])))

    x = draw(st.permutations([*shuffled("tokens", "contracted", "batch", "alone"), *repeated]))
    x, a, b = "".join(x), shuffled("contracted", "batch", "rank"), shuffled("rank", "out")
    hidden, y = shuffled("tokens", "batch", "rank"), shuffled("tokens", "batch", "out")
    shapes = [[size[letter] for letter in term] for term in (x, a, b)]
    if draw(st.booleans()):
        more = draw(st.lists(st.integers(1, 3), max_size=2))
        x, hidden, y, shapes[0] = f"...{x}", f"...{hidden}", f"...{y}", more + shapes[0]
    arrays = [whole_numbers(shape, seed) for seed, shape in enumerate(shapes)]
    return (*arrays, f"{x},{a}->{hidden}", f"{hidden},{b}->{y}")


@settings(max_examples=15, deadline=None)
@given(equations())
def test_any_equation_is_numpys(case):
    *arrays, first, second = case
    expected = numpy_product(*arrays, first, second).astype(np.float32)
    assert_same(jax.jit(product_of(case))(*arrays), expected)
    assert_same_as_einsum(case, gradients_of, *arrays)


@every_case
def test_eager_and_compiled(case):
    x, a, b = arrays_of(case)
    expected = numpy_product(x, a, b, *case[3:]).astype(np.float32)
    assert_same(product_of(case)(x, a, b), expected)
    assert_same(jax.jit(product_of(case))(x, a, b), expected)
    with jax.disable_jit():
        assert_same(product_of(case)(x, a, b), expected)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_the_dtype_stays(dtype):
    arrays = [array.astype(dtype) for array in arrays_of(CASES["dense"])]
    y, pull = jax.vjp(product_of(CASES["dense"]), *arrays)
    assert {y.dtype, *(gradient.dtype for gradient in pull(y))} == {jnp.dtype(dtype)}


def test_precision_reaches_both_products():
    x, a, b = arrays_of(CASES["dense"])
    product = jax.jit(lambda *arrays: low_rank_product(*arrays, *DENSE, precision="highest"))
    text = product.lower(x, a, b).as_text()
    assert len(re.findall(r"dot_general.*precision = \[HIGHEST, HIGHEST\]", text)) == 2


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((2, 3, 5), (4, 2), (2, 4)), "i is 5 and 4"),
        (((2, 3, 5), (5, 2), (3, 4)), "r is 2 and 3"),
        (((2, 3, 5), (5, 2, 1), (2, 4)), "has 3 axes"),
    ],
)
def test_shapes_that_do_not_fit(shapes, message):
    x, a, b = (jnp.zeros(shape) for shape in shapes)
    with pytest.raises(ValueError, match=message):
        low_rank_product(x, a, b, *DENSE)


# --- Transformations -----------------------------------------------------------------------------


def assert_same_as_einsum(case, transform, *arrays):
    """Compiles `transform` of the product and of the plain einsums as one program."""
    product, einsum = product_of(case), einsum_of(case)
    both = jax.jit(lambda *arrays: (transform(product)(*arrays), transform(einsum)(*arrays)))
    assert_same(*both(*arrays))


@every_case
def test_gradients(case):
    assert_same_as_einsum(case, gradients_of, *arrays_of(case))


@pytest.mark.parametrize("name", partly_slow(list(CASES), list(CASES)[::2]))
def test_second_derivatives(name):
    case = CASES[name]

    def along_ones(product):
        return lambda *arrays: jax.jvp(
            gradients_of(product), arrays, jax.tree.map(jnp.ones_like, arrays)
        )

    assert_same_as_einsum(case, along_ones, *arrays_of(case))


def test_gradients_without_jit():
    case = CASES["heads in"]
    expected = gradients_of(einsum_of(case))(*arrays_of(case))
    assert_same(gradients_of(product_of(case))(*arrays_of(case)), expected)
    assert_same(gradients_of(jax.checkpoint(product_of(case)))(*arrays_of(case)), expected)


MAPPED = {
    "all": ((True, True, True), 0),
    "not x": ((False, True, True), -1),
    "not a": ((True, False, True), -1),
}


@pytest.mark.parametrize(
    ("name", "how"),
    partly_slow(
        [(name, how) for name in CASES for how in MAPPED],
        lambda pair: (list(CASES).index(pair[0]) - list(MAPPED).index(pair[1])) % 3 == 0,
    ),
)
def test_vmap(name, how):
    case, (mapped, axis) = CASES[name], MAPPED[how]
    arrays = [
        np.stack([array, 2 * array, 1 - array], axis) if is_mapped else array
        for array, is_mapped in zip(map(np.asarray, arrays_of(case)), mapped, strict=True)
    ]
    axes = tuple(axis if is_mapped else None for is_mapped in mapped)
    assert_same_as_einsum(case, lambda product: jax.vmap(gradients_of(product), axes), *arrays)


@pytest.mark.parametrize("wrap", [lambda body: body, jax.checkpoint], ids=["plain", "remat"])
def test_scan(wrap):
    x, a, b = (jnp.asarray(whole_numbers(shape, 0)) for shape in ((2, 3, 4), (3, 4, 2), (3, 2, 4)))

    def chain(product):
        def run(x, a, b):
            return jax.lax.scan(wrap(lambda h, ab: (product(h, *ab), None)), x, (a, b))[0]

        return jax.jit(gradients_of(run))

    case = CASES["dense"]
    assert_same(chain(product_of(case))(x, a, b), chain(einsum_of(case))(x, a, b))


def test_traced_once_for_many_steps():
    traces = []

    @jax.jit
    def step(x, a, b):
        traces.append(None)
        return gradients_of(product_of(CASES["dense"]))(x, a, b)

    for _ in range(3):
        step(*arrays_of(CASES["dense"]))
    assert len(traces) == 1


# --- Meshes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("context", [True, False])
def test_sharded_tokens(kind, context):
    mesh = jax.make_mesh((2, 2), ("data", "sequence"), axis_types=(kind, kind))
    case = CASES["dense"]
    x, a, b = jnp.asarray(whole_numbers((2, 4, 5), 0)), *arrays_of(case)[1:]
    expected = product_of(case)(x, a, b), gradients_of(product_of(case))(x, a, b)
    tokens = NamedSharding(mesh, PartitionSpec("data", "sequence"))
    with jax.set_mesh(mesh) if context else contextlib.nullcontext():
        x = jax.device_put(x, tokens)
        a, b = jax.device_put((a, b), NamedSharding(mesh, PartitionSpec()))
        y = jax.jit(product_of(case))(x, a, b)
        pulled = jax.jit(lambda x, a, b, y: jax.vjp(product_of(case), x, a, b)[1](y))(x, a, b, y)
    assert_same(y, expected[0])
    assert_same(pulled, jax.vjp(einsum_of(case), *map(np.asarray, (x, a, b)))[1](expected[0]))


def test_shard_map():
    mesh = jax.make_mesh((2, 2), ("data", "sequence"), axis_types=(AxisType.Auto,) * 2)
    case = CASES["dense"]
    x, a, b = jnp.asarray(whole_numbers((2, 4, 5), 0)), *arrays_of(case)[1:]
    tokens = PartitionSpec("data", "sequence")
    mapped = jax.shard_map(
        product_of(case),
        mesh=mesh,
        in_specs=(tokens, PartitionSpec(), PartitionSpec()),
        out_specs=tokens,
    )
    assert_same(jax.jit(mapped)(x, a, b), product_of(case)(x, a, b))
    expected = gradients_of(product_of(case))(x, a, b)
    assert_same(jax.jit(gradients_of(mapped))(x, a, b), expected)


# --- What is lowered, where ----------------------------------------------------------------------


DOT = re.compile(r"stablehlo.dot_general[^,]*,[^,]*(, .*dims = .*) :")


def exported(product, platforms):
    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((8, 16, 64), (64, 4), (4, 64))]

    def loss(x, a, b):
        return jnp.sum(product(x, a, b) ** 2)

    step = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
    return jax.export.export(step, platforms=platforms)(*shapes).mlir_module()


@pytest.mark.parametrize("platform", ["cuda", "rocm", "tpu"])
def test_accelerators_keep_the_axes(platform):
    text = exported(product_of(CASES["dense"]), [platform])
    plain = exported(einsum_of(CASES["dense"]), [platform])
    assert re.findall(DOT, text) == re.findall(DOT, plain)
    assert text.count("stablehlo.dot_general") == 6
    assert not re.search("case|reshape|optimization_barrier", text)


def test_several_platforms_in_one_program():
    program = exported(product_of(CASES["dense"]), ["cpu", "cuda"])
    assert "stablehlo.case" in program


def test_cpu_merges_the_tokens():
    text = exported(product_of(CASES["dense"]), ["cpu"])
    assert "stablehlo.case" not in text
    products = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    assert all("128x" in line and "8x16x" not in line for line in products)


def test_cpu_transposes_no_tokens_and_branches_nowhere():
    x, a, b = jnp.ones((8, 16, 64)), jnp.ones((64, 4)), jnp.ones((4, 64))
    step = jax.jit(jax.grad(lambda *t: jnp.sum(product_of(CASES["dense"])(*t) ** 2), (0, 1, 2)))
    text = step.lower(x, a, b).compile().as_text()
    assert "conditional(" not in text
    moved = re.findall(r"f32\[([\d,]+)\]\S* (?:transpose|copy)\(", text)
    assert all(np.prod([int(n) for n in shape.split(",")]) <= 64 * 4 for shape in moved)
    # The gradient of `a` has the rank for its rows too: wide rows take nine times as long.
    assert not re.search(r"f32\[64,4\]\{1,0\} dot\(", text)


def test_unknown_sizes_can_be_exported():
    tokens = jax.export.symbolic_shape("n, t")
    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((*tokens, 5), (5, 2), (2, 4))]
    for platform in ("cpu", "tpu"):
        step = jax.jit(gradients_of(product_of(CASES["dense"])))
        program = jax.export.export(step, platforms=[platform])(*shapes)
        if platform == "cpu":
            arrays = arrays_of(CASES["dense"])
            assert_same(program.call(*arrays), step(*arrays))


def test_only_inputs_and_the_hidden_product_are_kept():
    x, a, b = jnp.ones((2, 3, 50)), jnp.ones((50, 4)), jnp.ones((4, 60))
    kept = jax.tree.leaves(jax.vjp(product_of(CASES["dense"]), x, a, b)[1])
    assert sum(array.size for array in kept) <= x.size + a.size + b.size + 2 * 3 * 4


@pytest.mark.parametrize("layers", [1, 4])
def test_a_step_computes_two_forwards_and_the_adapters(layers):
    tokens, width, rank = (4, 32), 128, 4
    kernel, a, b = jnp.ones((width, width)), jnp.ones((width, rank)), jnp.ones((rank, width))

    def loss(x, adapters, kernels):
        for kernel, (a, b) in zip(kernels, adapters, strict=True):
            x = x @ kernel + low_rank_product(x, a, b, *DENSE)
        return jnp.sum(x**2)

    step = jax.jit(jax.grad(loss, argnums=(0, 1)))
    arguments = jnp.ones((*tokens, width)), [(a, b)] * layers, [kernel] * layers
    flops = step.lower(*arguments).compile().cost_analysis()["flops"]
    forward = 2 * tokens[0] * tokens[1] * width * width
    adapter = 6 * tokens[0] * tokens[1] * 2 * width * rank
    assert flops == pytest.approx(layers * (2 * forward + adapter), rel=0.02)


def test_a_step_on_cpu_copies_nothing_as_large_as_the_tokens():
    tokens, width, rank, layers = (8, 128), 512, 8, 2
    shapes = [(layers, width, width), (layers, width, rank), (layers, rank, width)]
    kernels, a, b = (jnp.zeros(shape) for shape in shapes)
    x = jnp.zeros((*tokens, width))

    def copied(product):
        def loss(ab, kernels, x):
            for layer in range(layers):
                x = jnp.tanh(x @ kernels[layer] + product(x, ab[0][layer], ab[1][layer]))
            return jnp.sum(x**2)

        text = jax.jit(jax.grad(loss)).lower((a, b), kernels, x).compile().as_text()
        shapes = re.findall(r"= f32\[([\d,]+)\]\S* (?:transpose|copy)\(", text)
        return max(math.prod(map(int, shape.split(","))) for shape in shapes)

    assert copied(product_of(CASES["dense"])) < 8 * 128 * rank
    assert copied(einsum_of(CASES["dense"])) == 8 * 128 * width  # what three axes cost


# --- The weight delta ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shapes", "equation", "scaling"),
    [
        (((5, 2), (2, 4)), "ir,ro->io", 0.5),
        (((4, 5, 2), (2, 6)), "nhr,rd->nhd", 2.0),
        (((4, 5, 2), (4, 2, 6)), "gir,gro->gio", 2.0),
        (((3, 5, 2), (3, 2, 4)), "...ir,...ro->...io", np.array([0.5, 1.0, 2.0])),
        (((3, 2, 5, 2), (3, 2, 2, 4)), "...ir,...ro->...io", np.array([0.5, 1.0, 2.0])),
        (((3, 2, 5, 2), (3, 2, 2, 4)), "...ir,...ro->...io", np.arange(6.0).reshape(3, 2)),
    ],
)
def test_delta(shapes, equation, scaling):
    a, b = (whole_numbers(shape, seed) for seed, shape in enumerate(shapes))
    product = np.einsum(equation, a.astype(np.float64), b.astype(np.float64))
    factor = np.reshape(scaling, np.shape(scaling) + (1,) * (product.ndim - np.ndim(scaling)))
    found = delta(jnp.asarray(a), jnp.asarray(b), equation, scaling)
    assert found.dtype == jnp.float32
    assert_same(found, (product * factor).astype(np.float32))


def test_delta_computes_in_float32_or_wider():
    a = jnp.full((1, 3), 1 / 3, jnp.bfloat16)
    b = jnp.full((3, 1), 1 / 3, jnp.bfloat16)
    found = delta(a, b, "ir,ro->io", 1.0)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, 3 * float(a[0, 0]) ** 2, rtol=1e-6)
    with jax.enable_x64(True):
        wide = jnp.ones((2, 2), jnp.float64)
        assert delta(wide, wide, "ir,ro->io", 1.0).dtype == jnp.float64


def test_the_delta_is_the_product():
    x, a, b = arrays_of(CASES["heads out"])
    kernel = delta(a, b, "ir,rnh->inh", 1.0)
    assert_same(product_of(CASES["heads out"])(x, a, b), jnp.einsum("bti,inh->btnh", x, kernel))


# --- The matrix inside a kernel ------------------------------------------------------------------


@given(st.permutations(range(5)), st.integers(0, 5), st.integers(0, 5))
def test_unmatricize_is_the_inverse(order, first, second):
    first, second = sorted((first, second))
    groups = tuple(order[:first]), tuple(order[first:second]), tuple(order[second:])
    inputs, outputs, batch = groups
    shape = (2, 3, 4, 5, 6)
    kernel = np.arange(720.0).reshape(shape)
    matrices = matricize(kernel, inputs, outputs, batch)
    assert matrices.shape == tuple(
        int(np.prod([shape[axis] for axis in axes])) for axes in (batch, inputs, outputs)
    )
    assert_same(unmatricize(matrices, shape, inputs, outputs, batch), kernel)


def test_the_matrix_maps_inputs_to_outputs():
    x, kernel = whole_numbers((4, 5), 0), whole_numbers((5, 3, 4, 2), 1)
    matrix = matricize(jnp.asarray(kernel), inputs=(2, 0), outputs=(1, 3), batch=())
    expected = np.einsum("ni,idno->do", x, kernel)
    assert_same((x.reshape(-1) @ matrix[0]).reshape(3, 2), expected)

"""Functions of a lazy weight are those of its dense sum, and products with it are not dense."""

import dataclasses
import functools
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, key_of, loss_of, numbers, partly_slow

from peft_jax._numerics import Factor, Term, frame, is_lazy, lazy_weight

RANK, SCALING = 2, 0.5


@dataclasses.dataclass(frozen=True)
class Case:
    """A function of a weight and of an input.

    Attributes:
      run: the function.
      weight: shape of the weight.
      x: shape of the input, or the input itself.
      a: axes of ``a``; by default all but the last.
      b: axes of ``b``.
      at_weight: operations that need the dense weight.
    """

    run: Callable
    weight: tuple
    x: object
    a: tuple = None
    b: tuple = None
    at_weight: tuple = ()
    dtype: object = jnp.float32

    @property
    def axes(self):
        last = len(self.weight) - 1
        a = tuple(range(last)) if self.a is None else self.a
        return a, (last,) if self.b is None else self.b

    @property
    def input(self):
        return numbers(*self.x) if isinstance(self.x, tuple) else self.x

    def arrays(self):
        draw = functools.partial(numbers, seed=1)
        a, b = ((*(self.weight[i] for i in axes), RANK) for axes in self.axes)
        arrays = {"w": draw(*self.weight), "a": draw(*a), "b": numbers(*b, seed=2)}
        return jax.tree.map(lambda x: x.astype(self.dtype), arrays)

    def lazy(self, arrays, **fields):
        a, b = (Factor(arrays[name], axes) for name, axes in zip("ab", self.axes, strict=True))
        return lazy_weight(arrays["w"], "w", [Term(a, b, SCALING, **fields)])

    def dense(self, arrays):
        letters = "abcdefgh"
        (a, b), out = self.axes, letters[: len(self.weight)]
        terms = ["".join(letters[i] for i in axes) + "Z" for axes in (a, b)]
        both = "".join(c for c in out if c in terms[0] + terms[1])
        change = jnp.einsum(f"{terms[0]},{terms[1]}->{both}", arrays["a"], arrays["b"])
        return arrays["w"] + SCALING * change


def norm(w):
    return w / jnp.linalg.norm(w, axis=0, keepdims=True)


@jax.custom_vjp
def clipped_product(x, w):
    return x @ w


clipped_product.defvjp(lambda x, w: (x @ w, (x, w)), lambda kept, g: (g @ kept[1].T, kept[0].T @ g))


MESH, SPEC = jax.make_mesh((1,), ("axis",)), jax.sharding.PartitionSpec()


def closing_over(custom):
    """The product inside a function with a derivative of its own by x alone."""

    def run(w, x):
        product = custom(lambda x: x @ w)
        if custom is jax.custom_vjp:
            product.defvjp(lambda x: (x @ w, None), lambda _, g: (g @ w.T,))
        else:
            product.defjvp(lambda primals, tangents: (primals[0] @ w, tangents[0] @ w))
        return product(x)

    return run


def returning(w):
    function = jax.custom_jvp(lambda x: w.T)
    function.defjvp(lambda primals, tangents: (w.T, jnp.zeros_like(w.T)))
    return function


def python_loop(w, x):
    for i in range(w.shape[0]):
        x = jnp.tanh(x @ w[i])
    return x


def scanned(w, x):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), x.sum()), x, w)


def closed_over(w, x):
    return jax.lax.scan(lambda x, i: (jnp.tanh(x @ w), None), x, jnp.arange(3))[0]


def indexed_in_a_scan(w, x):
    return jax.lax.scan(lambda x, i: (jnp.tanh(x @ w[i]), None), x, jnp.arange(3))[0]


def convolution(w, x, **options):
    options = {"window_strides": (1,), "padding": "SAME", **options}
    return jax.lax.conv_general_dilated(x, w, dimension_numbers=("NWC", "WIO", "NWC"), **options)


def grad_inside(w, x):
    return jax.grad(lambda x: jnp.sum(jnp.tanh(x @ w)))(x)


IDS = jnp.asarray([[0, 3, 6], [6, 1, 0]])
CASES = {
    "matmul": Case(lambda w, x: x @ w, (4, 5), (3, 4)),
    "weight first": Case(lambda w, x: w @ x, (4, 5), (5, 3), (1,), (0,)),
    "transposed": Case(lambda w, x: x @ w.T, (4, 5), (3, 5), (1,), (0,)),
    "jnp.dot in jit": Case(lambda w, x: jax.jit(jnp.dot)(x, w), (4, 5), (3, 4)),
    "jit that closes over it": Case(lambda w, x: jax.jit(lambda x: x @ w)(x), (4, 5), (3, 4)),
    "three axes": Case(
        lambda w, x: jnp.einsum("btd,dnh->btnh", x, w), (4, 2, 3), (2, 3, 4), (0,), (1, 2)
    ),
    "contracted in the middle": Case(
        lambda w, x: jnp.einsum("btnh,nhd->btd", x, w), (2, 3, 4), (2, 3, 2, 3), (0, 1), (2,)
    ),
    "batch in both": Case(
        lambda w, x: jnp.einsum("ebd,edh->ebh", x, w), (3, 4, 5), (3, 2, 4), (0, 1), (0, 2)
    ),
    "batch in a alone": Case(
        lambda w, x: jnp.einsum("ebd,edh->ebh", x, w), (3, 4, 5), (3, 2, 4), (0, 1), (2,)
    ),
    "capitals and digits as pi0": Case(
        lambda w, x: jnp.einsum("bsd,ckdh->cbskh", x, w), (2, 3, 4, 5), (2, 3, 4), (2,), (0, 1, 3)
    ),
    "factors swapped": Case(lambda w, x: x @ w, (4, 5), (3, 4), (1,), (0,)),
    "cast": Case(
        lambda w, x: x @ w.astype(jnp.bfloat16), (4, 5), numbers(3, 4).astype(jnp.bfloat16)
    ),
    "preferred element type": Case(
        lambda w, x: jax.lax.dot(x, w, preferred_element_type=jnp.float32),
        (4, 5),
        numbers(3, 4).astype(jnp.bfloat16),
        dtype=jnp.bfloat16,
    ),
    "kept flat, reshaped": Case(
        lambda w, x: jnp.einsum("bd,dnh->bnh", x, w.reshape(4, 2, 3)), (4, 6), (3, 4)
    ),
    "kept apart, flattened": Case(
        lambda w, x: x @ w.reshape(4, 6), (4, 2, 3), (3, 4), (0,), (1, 2)
    ),
    "axes of length one": Case(lambda w, x: x @ w[None, :, None].reshape(4, 5), (4, 5), (3, 4)),
    "merged across factors": Case(
        lambda w, x: x @ w.reshape(-1), (4, 5), (3, 20), at_weight=("reshape",)
    ),
    "split by index": Case(lambda w, x: (x @ w[0]) * (x @ w[1]), (2, 4, 5), (3, 4), (0, 1), (0, 2)),
    "split by jnp.split": Case(
        lambda w, x: jnp.multiply(*(x @ part for part in jnp.split(w, 2, -1))), (4, 6), (3, 4)
    ),
    "columns": Case(lambda w, x: x @ w[:, 1:5:2], (4, 6), (3, 4)),
    "rows": Case(lambda w, x: x @ w[1:4], (6, 5), (2, 3)),
    "a dynamic slice": Case(
        lambda w, x: x @ jax.lax.dynamic_slice(w, (jnp.int32(1), jnp.int32(2)), (4, 3)),
        (6, 5),
        (2, 4),
    ),
    "scaled": Case(lambda w, x: x @ (-w * 2 / 3), (4, 5), (3, 4)),
    "scaled by columns": Case(lambda w, x: x @ (w * jnp.arange(5.0)[None]), (4, 5), (3, 4)),
    "scaled by rows": Case(lambda w, x: x @ (w / jnp.arange(1.0, 5)[:, None]), (4, 5), (3, 4)),
    "flipped": Case(lambda w, x: x @ w[::-1], (4, 5), (3, 4)),
    "multiplied and summed": Case(lambda w, x: jnp.sum(x[:, :, None] * w[None], 1), (4, 5), (3, 4)),
    "attention vector as GATv2": Case(
        lambda w, x: jnp.sum(jnp.tanh(x) * w[None], -1), (2, 5), (3, 2, 5), (0, 1), (0,)
    ),
    "sum of two views": Case(lambda w, x: x @ (w + w.T), (4, 4), (3, 4)),
    "difference": Case(lambda w, x: x @ (2 * w - w[::-1]), (4, 4), (3, 4)),
    "concatenated outputs": Case(
        lambda w, x: jnp.tanh(x @ jnp.concatenate([w, jnp.ones((4, 2)), 3 * w], 1)), (4, 5), (3, 4)
    ),
    "concatenated inputs": Case(
        lambda w, x: x @ jnp.concatenate([w, jnp.ones((2, 5)), w]), (4, 5), (3, 10)
    ),
    "a slice of a concatenation": Case(
        lambda w, x: x @ jnp.concatenate([w, jnp.ones((4, 2)), w], 1)[:, 3:9], (4, 5), (3, 4)
    ),
    "a stack, flattened": Case(
        lambda w, x: x @ jnp.stack([w, w], 1).reshape(4, 10), (4, 5), (3, 4)
    ),
    "complex of two": Case(
        lambda w, x: jnp.abs(x.astype(complex) @ jax.lax.complex(w[0], w[1])),
        (2, 4, 5),
        (3, 4),
        (0, 1),
        (0, 2),
    ),
    "complex by hand": Case(
        lambda w, x: jnp.abs(
            x.astype(complex) @ (w[0].astype(complex) + 1j * w[1].astype(complex))
        ),
        (2, 4, 5),
        (3, 4),
        (0, 1),
        (0, 2),
    ),
    "lookup": Case(lambda w, x: w[x], (7, 5), IDS),
    "jnp.take": Case(lambda w, x: jnp.take(w, x, axis=0), (7, 5), IDS),
    "lookup by a tuple": Case(lambda w, x: w[(x,)], (7, 5), IDS),
    "lookup under vmap": Case(lambda w, x: jax.vmap(lambda i: w[i])(x), (7, 5), IDS[0]),
    "tied": Case(lambda w, x: jnp.tanh(w[x]) @ w.T, (7, 5), IDS),
    "convolution": Case(convolution, (3, 4, 6), (2, 8, 4)),
    "strides, dilation": Case(
        functools.partial(convolution, window_strides=(2,), rhs_dilation=(2,), padding="VALID"),
        (3, 4, 6),
        (2, 9, 4),
    ),
    "groups": Case(functools.partial(convolution, feature_group_count=2), (3, 2, 6), (2, 8, 4)),
    "depthwise": Case(functools.partial(convolution, feature_group_count=4), (3, 1, 8), (2, 8, 4)),
    "convolution by its transpose": Case(
        lambda w, x: convolution(w.swapaxes(1, 2), x), (3, 4, 6), (2, 8, 6)
    ),
    "transposed convolution": Case(
        lambda w, x: jax.lax.conv_transpose(x, w, (2,), "SAME"), (3, 4, 6), (2, 5, 4)
    ),
    "its kernel transposed too": Case(
        lambda w, x: jax.lax.conv_transpose(x, w, (2,), "SAME", transpose_kernel=True),
        (3, 6, 4),
        (2, 5, 4),
    ),
    "ragged dot": Case(
        lambda w, x: jax.lax.ragged_dot(x, w, jnp.asarray([2, 0, 3])),
        (3, 4, 5),
        (5, 4),
        (0, 1),
        (0, 2),
    ),
    "ragged dot, one a for all": Case(
        lambda w, x: jax.lax.ragged_dot(x, w, jnp.asarray([2, 0, 3])),
        (3, 4, 5),
        (5, 4),
        (1,),
        (0, 2),
    ),
    "a Python loop": Case(python_loop, (3, 4, 4), (2, 4), (0, 1), (0, 2)),
    "scanned over": Case(scanned, (3, 4, 4), (2, 4), (0, 1), (0, 2)),
    "scanned over, one a for all": Case(scanned, (3, 4, 4), (2, 4), (1,), (0, 2)),
    "closed over by a scan": Case(closed_over, (4, 4), (2, 4)),
    "indexed in a scan": Case(indexed_in_a_scan, (3, 4, 4), (2, 4), (0, 1), (0, 2)),
    "checkpoint": Case(
        lambda w, x: jax.checkpoint(lambda w, x: jnp.tanh(x @ w))(w, x), (4, 5), (3, 4)
    ),
    "checkpoint that closes over it": Case(
        lambda w, x: jax.checkpoint(lambda x: jnp.tanh(x @ w))(x), (4, 5), (3, 4)
    ),
    "vmap": Case(lambda w, x: jax.vmap(lambda x: x @ w)(x), (4, 5), (3, 4)),
    "vmap over the weight": Case(
        lambda w, x: jax.vmap(lambda w, x: x @ w)(w, x), (3, 4, 5), (3, 2, 4), (0, 1), (0, 2)
    ),
    "gradient inside": Case(grad_inside, (4, 5), (3, 4)),
    "custom derivative beside": Case(lambda w, x: jax.nn.relu(jax.nn.silu(x) @ w), (4, 5), (3, 4)),
    "custom derivative of both": Case(
        lambda w, x: clipped_product(x, w), (4, 5), (3, 4), at_weight=("custom_vjp",)
    ),
    "custom vjp that closes over it": Case(closing_over(jax.custom_vjp), (4, 5), (3, 4)),
    "custom jvp that closes over it": Case(closing_over(jax.custom_jvp), (4, 5), (3, 4)),
    "custom jvp that returns it": Case(
        lambda w, x: x @ returning(w)(x).T,
        (4, 5),
        (3, 4),
        at_weight=("custom_jvp",),
    ),
    "shard_map that closes over it": Case(
        lambda w, x: jax.shard_map(lambda x: x @ w, mesh=MESH, in_specs=(SPEC,), out_specs=SPEC)(x),
        (4, 5),
        (3, 4),
    ),
    "argument of shard_map": Case(
        lambda w, x: jax.shard_map(
            lambda x, w: x @ w, mesh=MESH, in_specs=(SPEC, SPEC), out_specs=SPEC
        )(x, w),
        (4, 5),
        (3, 4),
        at_weight=("shard_map",),
    ),
    "a tile": Case(lambda w, x: x @ jnp.tile(w, (1, 2)), (4, 5), (3, 4)),
    "repeated": Case(lambda w, x: x @ jnp.repeat(w, 2, 1), (4, 5), (3, 4)),
    "norm": Case(lambda w, x: x @ norm(w), (4, 5), (3, 4), at_weight=("mul", "div")),
    "masked": Case(lambda w, x: x @ (w * jnp.eye(4)), (4, 4), (3, 4), at_weight=("dot_general",)),
    "an added array": Case(lambda w, x: x + w[:3], (4, 5), (3, 5), at_weight=("add",)),
    "two factors": Case(lambda w, x: x @ (w @ w.T), (4, 5), (3, 4), at_weight=("dot_general",)),
    "cond": Case(
        lambda w, x: jax.lax.cond(x[0, 0] > 0, lambda: x @ w, lambda: -(x @ w)),
        (4, 5),
        (3, 4),
        at_weight=("cond",),
    ),
    "while": Case(
        lambda w, x: jax.lax.while_loop(
            lambda c: c[0] < 3, lambda c: (c[0] + 1, jnp.tanh(c[1] @ w)), (0, x)
        )[1],
        (4, 4),
        (3, 4),
        at_weight=("while",),
    ),
    "returned": Case(lambda w, x: (x, w.T), (4, 5), (3, 4), at_weight=("output",)),
    "Python on values": Case(lambda w, x: x @ w if w.ndim == 2 else x, (4, 5), (3, 4)),
    "no numbers": Case(lambda w, x: x @ w, (4, 0), (3, 4)),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
# Without reverse mode, or with derivatives by x alone.
ONE_WAY = (
    "while",
    "custom vjp that closes over it",
    "custom jvp that closes over it",
    "custom jvp that returns it",
)


def run(case, arrays, x, record=None, **fields):
    with frame(record) as opened:
        return opened.plain(case.run(opened.lazy(case.lazy(arrays, **fields)), x))


@pytest.mark.parametrize("name", partly_slow(list(CASES), list(CASES)[::2]))
def test_any_function_is_that_of_the_dense_sum(name):
    case = CASES[name]
    arrays, x = case.arrays(), case.input
    record = []

    def lazy(arrays, x):
        return run(case, arrays, x, record)

    def dense(arrays, x):
        return case.run(case.dense(arrays).astype(case.dtype), x)

    tolerance = 3e-2 if jnp.bfloat16 in (case.dtype,) or name == "cast" else 1e-5
    found, expected = jax.jit(lambda *given: (lazy(*given), dense(*given)))(arrays, x)
    assert_close(found, expected, tolerance)
    needed = {use.operation for use in record if use.roles is None}
    assert needed == set(case.at_weight), record
    if name in ONE_WAY:
        return

    def gradient(function):
        return jax.grad(lambda arrays, x: loss_of(function(arrays, x)))

    both = jax.jit(lambda *given: (gradient(lazy)(*given), gradient(dense)(*given)))
    assert_close(*both(arrays, x), 10 * tolerance)


@pytest.mark.parametrize("name", ["matmul", "columns", "lookup", "python loop", "scanned over"])
def test_eager_operations_are_those_of_the_dense_sum(name):
    case = CASES.get(name, CASES["a Python loop"])
    arrays, x = case.arrays(), case.input
    assert_close(run(case, arrays, x), case.run(case.dense(arrays), x))


# --- Terms ---------------------------------------------------------------------------------------


def decomposed(case, arrays):
    """A weight with a plain adapter, and with two whose sums have gains; and the dense one."""
    a_axes, b_axes = case.axes
    along = b_axes or (len(case.weight) - 1,)
    lengths = [case.weight[axis] for axis in along]
    terms, dense = [], arrays["w"]
    for i in range(3):
        a, b = (arrays[name] + i for name in "ab")
        gain = 1 + 0.1 * numbers(*lengths, seed=i).astype(case.dtype) if i else None
        factor = None if gain is None else Factor(gain[..., None], along)
        terms.append(Term(Factor(a, a_axes), Factor(b, b_axes), SCALING, factor))
        whole = case.dense({"w": arrays["w"], "a": a, "b": b})
        if gain is None:
            dense = whole
        else:
            missing = [axis for axis in range(len(case.weight)) if axis not in along]
            dense = dense + jnp.expand_dims(gain, missing) * whole - arrays["w"]
    return lazy_weight(arrays["w"], "w", terms), dense


LINEAR = {name: case for name, case in CASES.items() if case.dtype == jnp.float32}
QUICK = (
    "three axes",
    "batch in a alone",
    "transposed",
    "groups",
    "ragged dot",
    "tied",
    "a stack, flattened",
)


@pytest.mark.parametrize("name", partly_slow(list(LINEAR), QUICK))
def test_several_adapters_with_gains(name):
    case = CASES[name]
    arrays, x = case.arrays(), case.input

    @jax.jit
    def both(arrays, x):
        weight, dense = decomposed(case, arrays)
        with frame() as opened:
            found = opened.plain(case.run(opened.lazy(weight), x))
        return found, case.run(dense, x)

    found, expected = both(arrays, x)
    assert_close(found, expected, 3e-2 if name == "cast" else 2e-5)


def test_dropout_acts_on_the_input_of_each_product_alone():
    """The mean over many masks is the product; masks differ between products, and repeat by key."""
    case = CASES["matmul"]
    arrays = case.arrays()
    x = jnp.ones((512, 4))

    def twice(key):
        with frame() as opened:
            w = opened.lazy(case.lazy(arrays, key=key, rate=0.5))
            return x @ w, x @ w

    one, two = jax.jit(twice)(key_of(0))
    again, _ = jax.jit(twice)(key_of(0))
    chex.assert_trees_all_equal(one, again)
    assert np.any(np.asarray(one != two))
    rows = {tuple(row) for row in np.round(np.asarray(one - x @ arrays["w"]), 4).tolist()}
    assert len(rows) == 2**4  # a mask of four inputs
    many = jax.jit(jax.vmap(lambda key: twice(key)[0]))(jax.random.split(key_of(1), 200))
    expected = x @ case.dense(arrays)
    assert_close(jnp.mean(many, (0, 1)), expected[0], 0.1)


def test_dropout_draws_anew_in_each_step_of_a_loop():
    arrays = CASES["closed over by a scan"].arrays()

    def outputs(key):
        with frame() as opened:
            w = opened.lazy(CASES["matmul"].lazy(arrays | {"b": arrays["b"]}, key=key, rate=0.5))
            return jax.lax.scan(lambda c, _: (c, jnp.ones((1, 4)) @ w), 0, None, length=20)[1]

    found = np.asarray(outputs(key_of(0)))
    assert len({tuple(row) for row in np.round(found[:, 0], 4).tolist()}) > 4


# --- Cost ----------------------------------------------------------------------------------------


COUNTED = {
    "matmul": lambda w, x: jnp.tanh(x @ w),
    "einsum": lambda w, x: jnp.einsum("td,dnh->tnh", x, w.reshape(64, 4, 16)),
    "transposed": lambda w, x: x @ w.T,
    "split": lambda w, x: (x @ w[:, :32]) * (x @ w[:, 32:]),
    "scan": lambda w, x: jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, None, length=3)[0],
    "checkpoint": lambda w, x: jax.checkpoint(lambda x: jnp.tanh(x @ w))(x),
}


@pytest.mark.optimized
@pytest.mark.parametrize("name", COUNTED)
def test_a_step_takes_the_flops_of_the_low_rank_product(name):
    """Forward, the input's gradient, and products with factors of rank 1: no dense gradient."""
    function, width, tokens = COUNTED[name], 64, 256
    w, a, b, x = numbers(width, width), numbers(width, 1), numbers(width, 1), numbers(tokens, width)

    def adapted(a, b, x):
        with frame() as opened:
            term = Term(Factor(a, (0,)), Factor(b, (1,)))
            return jnp.sum(
                jnp.sin(opened.plain(function(opened.lazy(lazy_weight(w, "w", [term])), x)))
            )

    def plain(x):
        return jnp.sum(jnp.sin(function(w, x)))

    def flops(function, *args):
        return jax.jit(function).lower(*args).compile().cost_analysis()["flops"]

    step = flops(jax.grad(adapted, (0, 1, 2)), a, b, x)
    base = flops(jax.grad(plain), x)
    products = 3 if name == "scan" else 2 if name == "split" else 1
    # x·a, h·b, and a gradient for each of x, h, a, b: 2 * tokens * width each, of rank 1. What is
    # recomputed, x·a and h·b, comes once more.
    low_rank = products * (8 if name == "checkpoint" else 6) * 2 * tokens * width
    elementwise = products * 4 * tokens * width  # sums of terms, and of their gradients
    assert step <= base + low_rank + elementwise


# --- Frames --------------------------------------------------------------------------------------


def test_transformations_around_a_frame():
    case = CASES["matmul"]
    arrays = case.arrays()

    def row(x, arrays):
        return run(case, arrays, x)

    x = case.input
    expected = x @ case.dense(arrays)
    assert_close(jax.vmap(row, (0, None))(x, arrays), expected)
    jacobian = jax.jit(jax.jacobian(row))(x[0], arrays)
    assert_close(jacobian, case.dense(arrays).T)


def test_nested_frames_and_values_that_leave():
    case = CASES["matmul"]
    arrays, x = case.arrays(), case.input
    with frame() as outer:
        w = outer.lazy(case.lazy(arrays))
        with outer.nested() as inner:
            y = inner.plain(x @ w)
        assert is_lazy(w)
        assert is_lazy(w.T[0])
        assert not is_lazy(y)
    assert_close(y, x @ case.dense(arrays))


@pytest.mark.parametrize("custom", [jax.custom_jvp, jax.custom_vjp, jax.checkpoint, jax.jit])
def test_dense_weights_do_not_outlive_the_trace_that_made_them(custom):
    """The same weight is needed dense inside of a function that closes over it, and after it."""
    case = CASES["matmul"]
    arrays, x = case.arrays(), case.input

    def function(w, x):
        inside = custom(lambda x: x @ jnp.tanh(w))
        if custom is jax.custom_jvp:
            inside.defjvp(lambda primals, tangents: (inside(primals[0]), tangents[0] @ jnp.tanh(w)))
        if custom is jax.custom_vjp:
            inside.defvjp(lambda x: (x @ jnp.tanh(w), None), lambda _, g: (g @ jnp.tanh(w).T,))
        return inside(x) + x @ jnp.tanh(w)

    def lazy(arrays, x):
        with frame() as opened:
            return opened.plain(function(opened.lazy(case.lazy(arrays)), x))

    expected = function(case.dense(arrays), x)
    assert_close(jax.jit(lazy)(arrays, x), expected)
    assert_close(lazy(arrays, x), expected)


def test_python_looks_at_values():
    case = CASES["matmul"]
    arrays = case.arrays()
    dense = case.dense(arrays)
    with frame() as opened:
        w = opened.lazy(case.lazy(arrays))
        assert_close(jnp.asarray(np.asarray(w)), dense)
        assert bool(w[0, 0] > 0) == bool(dense[0, 0] > 0)
        assert float(w[0, 0]) == pytest.approx(float(dense[0, 0]), rel=1e-5)
        assert "float32[4, 5]" in repr(w)
        assert "w" in repr(w)


def test_one_program_for_many_calls():
    case = CASES["scanned over"]
    arrays, x = case.arrays(), case.input
    traces = []

    @jax.jit
    def step(arrays, x):
        traces.append(None)
        return run(case, arrays, x)

    for i in range(3):
        step(jax.tree.map(lambda leaf, i=i: leaf + i, arrays), x)
    assert len(traces) == 1

"""Facts about JAX that its documentation does not promise, each on a small program.

A test that fails here names what a new release changed, and the one function to change.
"""

import functools
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import Primitive as JaxPrimitive
from jax.extend.core.primitives import custom_jvp_call_p, custom_vjp_call_p, jit_p, remat_p

from peft_jax._numerics import (
    CALLS,
    ShapedArray,
    Trace,
    Tracer,
    branches_of,
    called,
    cond_p,
    consts_of,
    current_trace,
    define_bilinear,
    define_derivative,
    is_recomputed,
    is_traced,
    is_unknown,
    is_zero,
    jit_context,
    new_primitive,
    programs_in,
    read,
    run_checkpointed,
    run_equation,
    run_program,
    scan_body,
    scan_p,
    scan_split,
    set_current_trace,
    set_jit_context,
    takes_a_slice,
    while_p,
    while_programs,
    while_split,
)

X = jnp.arange(1.0, 7.0).reshape(2, 3)
TABLE = np.arange(6.0, dtype=np.float32).reshape(2, 3)  # a constant of programs


def equations(function, *args):
    """The equations of a program and of all programs in it."""

    def inside(program):
        for equation in program.eqns:
            yield equation
            for other in programs_in(equation):
                yield from inside(other)

    return list(inside(jax.make_jaxpr(function)(*args)))


def only(primitive, function, *args):
    (equation,) = (e for e in equations(function, *args) if e.primitive is primitive)
    return equation


# --- Traced programs -----------------------------------------------------------------------------


def run(program, args):
    """What the functions under test say a program does, step by step."""
    variables = [*program.constvars, *program.invars]
    known = dict(zip(variables, [*consts_of(program), *args], strict=True))
    for equation in program.eqns:
        operands = [read(atom, known) for atom in equation.invars]
        known.update(zip(equation.outvars, run_equation(equation, operands), strict=True))
    return [read(atom, known) for atom in program.outvars]


def test_programs_run_step_by_step_as_whole():
    """Constants, literals and equations with several results are where they are looked for."""

    def function(x):
        values, indices = jax.lax.top_k(x + TABLE, 2)
        return values * 2.0, indices, 5

    program = jax.make_jaxpr(function)(X)
    assert len(consts_of(program)) == 1
    for results in (run(program, [X]), run_program(program, [X])):
        for got, expected in zip(results, function(X), strict=True):
            np.testing.assert_array_equal(got, expected)


def test_each_program_says_how_many_constants_it_has():
    """Open or closed, one class or two: `constvars` and `consts_of` are of one length."""
    programs = [
        jax.make_jaxpr(lambda x: x + TABLE)(X),
        *(program for equation in equations(everything, X) for program in programs_in(equation)),
    ]
    assert len(programs) > len(CALLS)
    for program in programs:
        assert len(program.constvars) == len(consts_of(program))


def twice(x):
    return x + x


@jax.custom_jvp
def with_jvp(x):
    return twice(x)


with_jvp.defjvp(lambda primals, tangents: (with_jvp(*primals), tangents[0]))


@jax.custom_vjp
def with_vjp(x):
    return twice(x)


with_vjp.defvjp(lambda x: (with_vjp(x), None), lambda _, cotangent: (cotangent,))


def everything(x):
    x = with_vjp(with_jvp(jax.checkpoint(jax.jit(twice))(x)))
    x, _ = jax.lax.scan(lambda x, y: (x + y, None), x, jnp.ones((4, 2, 3)))
    x = jax.lax.while_loop(lambda x: x.sum() < 0, twice, x)
    return jax.lax.cond(x.sum() < 0, twice, jnp.sin, x)


@pytest.mark.parametrize(
    ("primitive", "function"),
    [
        (jit_p, jax.jit(twice)),
        (remat_p, jax.checkpoint(twice)),
        (custom_jvp_call_p, with_jvp),
        (custom_vjp_call_p, with_vjp),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_calls_name_the_program_that_they_run(primitive, function):
    equation = only(primitive, function, X)
    (result,) = run(called(equation), [X])
    np.testing.assert_array_equal(result, 2 * X)
    (found,) = programs_in(equation)
    assert [e.primitive.name for e in found.eqns] == ["add"]


def test_what_a_backward_pass_computes_again_is_marked():
    loss = jax.checkpoint(lambda x: jnp.sum(jnp.sin(jnp.sin(x))))
    assert [is_recomputed(e) for e in equations(loss, X) if e.primitive is remat_p] == [False]
    again = [is_recomputed(e) for e in equations(jax.grad(loss), X)]
    assert again.count(True) == 1


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("derivative", [False, True])
def test_scan_says_which_operands_are_constants_and_carried(derivative, batched):
    """Also once jax.vmap and jax.jvp have built the scan anew, which nests its flat trees."""

    def function(x, weight):
        def body(carry, row):
            total, steps = carry
            return (jnp.sin(total * weight) + row, steps + 1), total

        return jax.lax.scan(body, (x[0], 0), x)

    args = (X, jnp.arange(3.0))
    if derivative:
        plain, args = function, (args, args)
        function = lambda primals, tangents: jax.jvp(plain, primals, tangents)  # noqa: E731
    if batched:
        function, args = jax.vmap(function), jax.tree.map(lambda x: jnp.stack([x, x]), args)
    equation = only(scan_p, function, *args)
    factor = 2 if derivative else 1
    consts, carried = scan_split(equation.params)
    assert (consts, carried) == (factor, factor + 1)
    shapes = [atom.aval.shape for atom in equation.invars]
    row = (2, 3) if batched else (3,)
    assert shapes[:consts] == [row] * factor
    assert sorted(shapes[consts : consts + carried]) == sorted([row] * factor + [()])
    assert shapes[consts + carried :] == [(2, *row)] * factor
    assert len(equation.outvars) == carried + factor
    body, options = scan_body(equation.params)
    assert len(body.invars) == len(equation.invars)
    assert options == {"length": 2, "reverse": False, "unroll": 1}


def test_the_program_of_a_checkpoint_runs():
    function = jax.checkpoint(lambda x: jnp.tanh(x) * 2)
    equation = only(remat_p, function, X)
    np.testing.assert_allclose(run_checkpointed(equation.params["jaxpr"], [X]), [function(X)])
    assert {"prevent_cse", "policy"} <= set(equation.params)


# --- Traces --------------------------------------------------------------------------------------


class Watching(Trace):
    """A trace that hands everything on, and remembers it."""

    def __init__(self, parent):
        super().__init__()
        self.parent, self.seen, self.requires_low = parent, [], False

    def stage_value(self, value):
        return self.parent.stage_value(value)

    def process_primitive(self, primitive, args, params, /):
        self.seen.append((primitive.name, args))
        with set_current_trace(self.parent):
            return primitive.bind(*(getattr(arg, "value", arg) for arg in args), **params)

    def process_custom_jvp_call(self, primitive, fun, jvp, args, /, **params):
        self.seen.append((primitive.name, args))
        return self.parent.process_custom_jvp_call(primitive, fun, jvp, args, **params)

    def process_custom_vjp_call(self, primitive, fun, fwd, bwd, args, /, **params):
        self.seen.append((primitive.name, args))
        return self.parent.process_custom_vjp_call(primitive, fun, fwd, bwd, args, **params)


class Held(Tracer):
    __slots__ = ("value",)

    def __init__(self, trace, value):
        super().__init__(trace, jax.typeof(value))
        self.value = value


def test_what_a_trace_is_asked_for():
    """`Frame` hands on to its parent what it does not know; a new name here wants a look."""
    asked = {name for name in dir(Trace) if name.startswith("process_")}
    assert asked <= {
        "process_call",  # until jax 0.11
        "process_custom_jvp_call",
        "process_custom_vjp_call",
        "process_primitive",
    }


@pytest.mark.parametrize("around", [lambda f: f, jax.jit, jax.vmap], ids=["eager", "jit", "vmap"])
def test_a_trace_of_ours_meets_every_operation(around):
    seen = []

    def function(x):
        trace = Watching(current_trace())
        with set_current_trace(trace):
            held = Held(trace, x)
            y = jax.lax.add(jax.lax.tanh(held), jax.nn.relu(x))
        assert current_trace() is trace.parent
        seen.extend(name for name, _ in trace.seen)
        assert any(isinstance(arg, Held) for _, args in trace.seen for arg in args)
        return y

    np.testing.assert_allclose(around(function)(X), jnp.tanh(X) + jax.nn.relu(X), rtol=1e-6)
    assert {"tanh", "add", "custom_jvp_call"} <= set(seen)


def test_values_that_no_trace_knows_are_lowered():
    class Known(Held):
        __slots__ = ()

        def full_lower(self):
            return self.value

    assert float(jnp.sum(Known(Watching(current_trace()), X))) == float(X.sum())


def test_while_says_which_operands_only_its_condition_or_body_reads():
    def function(x, bound, step, more):
        return jax.lax.while_loop(lambda x: x.sum() < bound, lambda x: x + step * more, x)

    equation = only(while_p, function, X, jnp.float32(3), jnp.ones((2, 3)), jnp.ones((2, 3)))
    assert while_split(equation) == (1, 2)
    assert [atom.aval.shape for atom in equation.invars] == [(), (2, 3), (2, 3), (2, 3)]
    condition, body = while_programs(equation)
    assert (len(condition.invars), len(body.invars)) == (2, 3)


def test_cond_has_a_branch_for_each_index():
    def function(x):
        return jax.lax.switch(jnp.int32(x[0, 0]), [twice, jnp.sin, jnp.cos], x)

    branches, platforms = branches_of(only(cond_p, function, X))
    assert [branch.eqns[0].primitive.name for branch in branches] == ["add", "sin", "cos"]
    assert platforms is None


def test_cond_by_platform_names_the_platforms_of_each_branch():
    def function(x):
        return jax.lax.platform_dependent(x, cpu=twice, cuda=jnp.sin, default=jnp.cos)

    branches, platforms = branches_of(only(cond_p, function, X))
    assert platforms == (("cpu",), ("cuda",), None)
    assert len(branches) == 3


def test_equations_run_in_the_context_they_were_traced_in():
    def function(x):
        with jax.default_matmul_precision("highest"):
            return x @ x.T

    program = jax.make_jaxpr(function)(X)
    again = jax.make_jaxpr(lambda x: run(program, [x]))(X)
    assert str(again.eqns[0].params) == str(program.eqns[0].params)
    with jax.threefry_partitionable(False):
        key = jax.random.key(3)
        drawing = jax.make_jaxpr(lambda key: jax.random.bits(key, (5,)))(key)
        expected = run_program(drawing, [key])[0]
    with jax.threefry_partitionable(True):
        np.testing.assert_array_equal(run(drawing, [key])[0], expected)


# --- New primitives ------------------------------------------------------------------------------


def product_type(x, y, *, factor):
    return ShapedArray(x.shape, x.dtype)


def batched_product(operands, axes, *, factor):
    (x, y), (first, second) = operands, axes
    assert first is not None or second is not None
    size = x.shape[first] if first is not None else y.shape[second]
    x, y = (
        jnp.broadcast_to(operand, (size, *operand.shape))
        if axis is None
        else jnp.moveaxis(operand, axis, 0)
        for operand, axis in zip(operands, axes, strict=True)
    )
    return product_p.bind(x, y, factor=factor), 0


def product(x, y, *, factor):
    return factor * x * y


product_p = new_primitive(
    "test_product",
    product,
    output_type=product_type,
    batch=batched_product,
    lowered=lambda x, y, *, factor: product(x, y, factor=factor) + 1000,
    on_cpu=product,
)
define_bilinear(
    product_p,
    lambda cotangent, x, y, *, factor: product_p.bind(cotangent, y, factor=factor),
    lambda cotangent, x, y, *, factor: product_p.bind(x, cotangent, factor=factor),
)
times3 = functools.partial(product_p.bind, factor=3.0)


def test_a_primitive_runs_eagerly_compiled_and_batched():
    assert isinstance(product_p, JaxPrimitive)
    for function in (times3, jax.jit(times3), jax.vmap(times3, in_axes=(1, 1), out_axes=1)):
        np.testing.assert_array_equal(function(X, X), 3 * X * X)
    np.testing.assert_array_equal(jax.vmap(times3, (0, None))(X, X[1]), 3 * X * X[1:])
    assert [e.primitive for e in jax.make_jaxpr(times3)(X, X).eqns] == [product_p]


def test_a_primitive_is_lowered_for_the_platform_of_the_program():
    def lowered(platform):
        exported = jax.export.export(
            jax.jit(times3),
            platforms=[platform],
            disabled_checks=[jax.export.DisabledSafetyCheck.custom_call("*")],
        )(X, X)
        return exported.mlir_module()

    assert "1.000000e+03" not in lowered("cpu")
    assert "1.000000e+03" in lowered("cuda")


def test_a_bilinear_primitive_has_derivatives_of_any_order():
    loss = lambda x, y: jnp.sum(jnp.sin(times3(x, y)))  # noqa: E731
    plain = lambda x, y: jnp.sum(jnp.sin(3.0 * x * y))  # noqa: E731
    y = X + 1
    for got, expected in zip(
        jax.grad(loss, (0, 1))(X, y), jax.grad(plain, (0, 1))(X, y), strict=True
    ):
        np.testing.assert_allclose(got, expected, rtol=1e-5)
    np.testing.assert_allclose(
        jax.hessian(loss)(X, y), jax.hessian(plain)(X, y), rtol=1e-5, atol=1e-4
    )


seen = []


def scaled_jvp(primals, tangents):
    seen.append([is_zero(tangent) for tangent in tangents])
    x, factor = primals
    return scaled_p.bind(x, factor), scaled_p.bind(tangents[0], factor)


def scaled_transpose(cotangent, x, factor):
    seen.append([is_zero(cotangent), is_unknown(x), is_unknown(factor)])
    assert x.aval.shape == cotangent.shape
    return scaled_p.bind(cotangent, factor), None


scaled_p = new_primitive(
    "test_scaled",
    lambda x, factor: x * factor,
    output_type=lambda x, factor: x,
    batch=lambda operands, axes: (scaled_p.bind(*operands), axes[0]),
    lowered=lambda x, factor: x * factor,
)
define_derivative(scaled_p, scaled_jvp, scaled_transpose)


def test_derivative_rules_learn_which_tangents_are_zero_and_which_operands_are_unknown():
    seen.clear()
    gradient = jax.grad(lambda x: jnp.sum(scaled_p.bind(x, jnp.float32(3))))(X)
    np.testing.assert_array_equal(gradient, jnp.full(X.shape, 3.0))
    assert seen == [[False, True], [False, True, False]]
    np.testing.assert_array_equal(jax.jit(scaled_p.bind)(X, jnp.float32(2)), 2 * X)


# --- Tracing -------------------------------------------------------------------------------------


def test_traced_values_are_told():
    told = []

    def see(x):
        told.append(is_traced(x))
        return x

    see(X)
    see(np.ones(3))
    see(jax.ShapeDtypeStruct((3,), "float32"))
    for trace in (jax.jit, jax.vmap, jax.grad, jax.checkpoint):
        trace(lambda x: see(x).sum() if x.ndim else see(x))(X[0, 0] if trace is jax.grad else X)
    jax.eval_shape(see, X)
    assert told == [False] * 3 + [True] * 5


def test_jit_keys_its_caches_by_a_context():
    context, traced = jit_context(None), []

    @jax.jit
    def function(x):
        traced.append(context.value)
        return x

    function(X)
    set_jit_context(context, "other")
    assert context.value == "other"
    function(X)
    function(X)
    values = []
    thread = threading.Thread(target=lambda: values.append(context.value))
    thread.start()
    thread.join()
    set_jit_context(context, None)
    function(X)
    assert traced == [None, "other"]
    assert values == [None]


def test_the_slices_of_a_loop_are_told_to_a_policy():
    """What slices a row off a stack, in a scan over indices, under jax.checkpoint."""
    stack, asked = jnp.ones((4, 3)), []

    def policy(primitive, *types, **params):
        asked.append((takes_a_slice(primitive), types[0].shape))
        return not takes_a_slice(primitive)

    @functools.partial(jax.checkpoint, policy=policy, prevent_cse=False)
    def body(x, index):
        return jnp.sin(x * stack[index]), None

    def loss(x):
        return jax.lax.scan(body, x, jnp.arange(4))[0].sum()

    jax.eval_shape(jax.grad(loss), jnp.ones(3))
    sliced = [shape for slicing, shape in asked if slicing]
    assert sliced
    assert set(sliced) <= {(4, 3), (1, 3)}
    assert not any(shape == (4, 3) for slicing, shape in asked if not slicing)

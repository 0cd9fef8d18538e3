import functools
import re
from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.extend.core.primitives import call_p, closed_call_p
from jax.sharding import NamedSharding, PartitionSpec

from peft_jax._surgery import folded, note

LAYERS, ROWS, FEATURES, BINS = 4, 8, 6, 64
SITE = "layers/in"
X = jnp.asarray(np.random.default_rng(0).integers(-4, 5, (ROWS, FEATURES)), jnp.float32)

# --- What is folded, and what is recorded --------------------------------------------------------


def noted_sites(function, *args):
    """The sites in the text of a function's program."""
    return set(re.findall(r"site=([\w/]+)", str(jax.make_jaxpr(function)(*args))))


def statistics():
    """Extremes and histogram of each layer."""
    return {
        "min": jnp.full(LAYERS, jnp.inf),
        "max": jnp.full(LAYERS, -jnp.inf),
        "counts": jnp.zeros((LAYERS, BINS), jnp.int32),
    }


def fold(site, state, index, x):
    assert site == SITE
    bins = jnp.clip(x.astype(jnp.int32) + BINS // 2, 0, BINS - 1)
    return {
        "min": state["min"].at[index].min(jnp.min(x)),
        "max": state["max"].at[index].max(jnp.max(x)),
        "counts": state["counts"].at[index, bins.reshape(-1)].add(1),
    }


def numpy_statistics(record):
    state = jax.tree.map(np.array, statistics())
    for index, x in record:
        inside = np.clip(x, -BINS // 2, BINS // 2 - 1)
        state["min"][index] = min(state["min"][index], x.min())
        state["max"][index] = max(state["max"][index], x.max())
        state["counts"][index] += np.histogram(inside, BINS, (-BINS // 2, BINS // 2))[0]
    return state


def noting(x, index):
    return note(x, index, SITE)


def unnoted(x, index):
    return x


def recorded(case):
    """What a case returns, and index and array of each note, by calls out of the program."""
    record = []

    def see(x, index):
        jax.debug.callback(lambda x, index: record.append((int(index), np.array(x))), x, index)
        return x

    outputs = jax.block_until_ready(jax.jit(functools.partial(case, see))(X))
    jax.effects_barrier()
    return outputs, record


def assert_same(tree, expected):
    jax.tree.map(np.testing.assert_array_equal, tree, expected)


# --- Functions that note, whatever lies around ----------------------------------------------------
# Whole numbers throughout, so that every compiled program computes the same bits.


def step(see, x, index):
    """A layer: what it sees depends on the layer and on all layers before."""
    return jnp.roll(see(x, index), 1, axis=-1) + index.astype(jnp.float32)


def plain(see, x):
    return step(see, 2 * x, jnp.int32(1)) - see(x, jnp.int32(3))


def jit_in_jit(see, x):
    inner = jax.jit(lambda x, index: step(see, x, index))
    return jax.jit(lambda x: inner(inner(x, jnp.int32(0)), jnp.int32(2)))(x)


def calls(primitive, constants, see, x):
    program = jax.make_jaxpr(lambda x: step(see, x, jnp.int32(1)))(x)
    parameter = program if constants else program.jaxpr
    return primitive.bind(x, **primitive.get_bind_params({"call_jaxpr": parameter}))[0]


def checkpoint(see, x):
    return jax.checkpoint(lambda x: step(see, x, jnp.int32(1)))(x)


def over_layers(see, x, **options):
    def body(x, index):
        y = step(see, x, index)
        return y, y.sum()

    return jax.lax.scan(body, x, jnp.arange(LAYERS), **options)


def over_time(see, x):
    def body(carry, row):
        return carry + see(carry * row, jnp.int32(2)), carry

    return jax.lax.scan(body, jnp.ones(FEATURES), x % 2)


def scan_in_scan(see, x):
    def body(x, index):
        return jax.lax.scan(lambda x, k: (step(see, x - k, index), None), x, jnp.arange(3.0))

    return jax.lax.scan(body, x, jnp.arange(LAYERS))[0]


def scan_without_values(see, x):
    return jax.lax.scan(lambda x, _: (step(see, x, jnp.int32(1)), None), x, None, length=3)


def vmap_shared_index(see, x):
    return jax.vmap(lambda row: step(see, row, jnp.int32(2)), in_axes=1, out_axes=1)(x)


def vmap_own_index(see, x):
    return jax.vmap(functools.partial(step, see), (1, 0))(x[:, :LAYERS], jnp.arange(LAYERS))


def vmap_index_alone(see, x):
    return jax.vmap(lambda index: step(see, x, index))(jnp.arange(LAYERS))


def vmap_of_vmap(see, x):
    """Two batched axes of the index, and one of x between them."""

    def inner(rows, indices):
        return jax.vmap(lambda row: jax.vmap(lambda i: step(see, row, i))(indices))(rows)

    return jax.vmap(inner)(x.reshape(2, 4, -1), jnp.arange(LAYERS).reshape(2, 2))


def vmap_stacks_then_shared(see, x):
    def stack(x):
        return jax.vmap(functools.partial(step, see))(x, jnp.arange(LAYERS))

    return jax.vmap(stack, in_axes=2)(x.reshape(LAYERS, 2, -1))


def vmap_of_scan(see, x):
    return jax.vmap(lambda row: over_layers(see, row))(x)


def scan_of_vmap(see, x):
    def body(x, index):
        return jax.vmap(lambda row: step(see, row, index))(x), None

    return jax.lax.scan(body, x, jnp.arange(LAYERS))


def while_loop(see, x):
    def body(carry):
        index, x = carry
        return index + 1, step(see, x, index)

    return jax.lax.while_loop(lambda carry: carry[0] < x[0, 0] * 0 + 3, body, (0, x))


def fori_loop(see, x):
    return jax.lax.fori_loop(1, LAYERS, lambda index, x: step(see, x, jnp.int32(index)), x)


def cond(taken, see, x):
    return jax.lax.cond(
        (x.sum() < 1000) == taken, lambda x: step(see, x, jnp.int32(1)), lambda x: 2 * x, x
    )


def switch(see, x):
    branches = [functools.partial(lambda k, x: step(see, x - k, jnp.int32(k)), k) for k in range(3)]
    return jax.lax.scan(lambda x, i: (jax.lax.switch(i, branches, x), None), x, jnp.arange(3)[::-1])


def by_platform(see, x):
    return jax.lax.platform_dependent(
        x,
        cpu=lambda x: step(see, x, jnp.int32(1)),
        cuda=lambda x: step(see, 3 * x, jnp.int32(2)),
        default=lambda x: 2 * x,
    )


def default_platform(see, x):
    return jax.lax.platform_dependent(
        x, tpu=lambda x: 2 * x, default=lambda x: step(see, x, jnp.int32(1))
    )


def custom_jvp(see, x):
    @jax.custom_jvp
    def function(x):
        return step(see, jax.nn.relu(x), jnp.int32(1))

    function.defjvp(lambda primals, tangents: (function(*primals), tangents[0]))
    return jax.nn.relu(see(function(x), jnp.int32(0)))


def custom_vjp(see, x):
    @jax.custom_vjp
    def function(x):
        return step(see, x, jnp.int32(3))

    function.defvjp(lambda x: (function(x), None), lambda _, cotangent: (cotangent,))
    return function(x)


def gradient(see, x):
    return jax.value_and_grad(lambda x: jnp.sum(step(see, x * x, jnp.int32(1)) ** 2))(x)


def gradient_of_scan(see, x):
    return jax.grad(lambda x: jnp.sum(over_layers(see, x % 2 * x)[0] ** 2))(x)


KERNELS = np.random.default_rng(1).integers(-1, 2, (LAYERS, FEATURES, FEATURES))


class Layer(nn.Module):
    """A linear layer that knows which of its stack it is."""

    see: Callable

    @nn.compact
    def __call__(self, x, _=None):
        kernel = self.param("kernel", nn.initializers.zeros, (FEATURES, FEATURES))
        index = self.param("index", lambda key: jnp.int32(0))
        return self.see(x, index) @ kernel, x


def parameters(layers):
    kernels, indices = jnp.asarray(KERNELS, jnp.float32), jnp.arange(LAYERS)
    return {"params": {"kernel": kernels[layers], "index": indices[layers]}}


stacked = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}


def scanned(see, layer, **lift):
    """A stack of layers. Flax 0.12.12 takes a callback in a scan for a variable that varies."""
    return nn.scan(layer, check_constancy_invariants=see is noting, **lift)(see)


def flax_scan(see, x):
    return scanned(see, Layer, length=LAYERS, **stacked).apply(parameters(slice(None)), x)


def flax_remat(see, x):
    return nn.remat(Layer)(see).apply(parameters(2), x)


def flax_scan_of_remat(see, x):
    layers = scanned(see, nn.remat(Layer), length=LAYERS, **stacked)
    return layers.apply(parameters(slice(None)), x)


def flax_scan_over_time(see, x):
    shared = {"variable_broadcast": "params", "split_rngs": {"params": False}}
    return scanned(see, Layer, **shared).apply(parameters(3), x[0], x)


def flax_vmap(see, x):
    layers = nn.vmap(Layer, in_axes=None, axis_size=LAYERS, **stacked)
    return layers(see).apply(parameters(slice(None)), x)


CASES = {
    "plain": plain,
    "jit in jit": jit_in_jit,
    "call": functools.partial(calls, call_p, False),
    "closed call": functools.partial(calls, closed_call_p, True),
    "checkpoint": checkpoint,
    "over layers": over_layers,
    "over layers, reversed": functools.partial(over_layers, reverse=True),
    "over layers, unrolled": functools.partial(over_layers, unroll=3),
    "over time": over_time,
    "scan in scan": scan_in_scan,
    "scan without values": scan_without_values,
    "vmap, shared index": vmap_shared_index,
    "vmap, own index": vmap_own_index,
    "vmap, index alone": vmap_index_alone,
    "vmap of vmap": vmap_of_vmap,
    "vmap, stacks then shared": vmap_stacks_then_shared,
    "vmap of scan": vmap_of_scan,
    "scan of vmap": scan_of_vmap,
    "while loop": while_loop,
    "fori loop": fori_loop,
    "cond, taken": functools.partial(cond, True),
    "cond, not taken": functools.partial(cond, False),
    "switch": switch,
    "by platform": by_platform,
    "default platform": default_platform,
    "custom_jvp": custom_jvp,
    "custom_vjp": custom_vjp,
    "gradient": gradient,
    "gradient of scan": gradient_of_scan,
    "nn.scan": flax_scan,
    "nn.remat": flax_remat,
    "nn.scan of nn.remat": flax_scan_of_remat,
    "nn.scan over time": flax_scan_over_time,
    "nn.vmap": flax_vmap,
}
COMPOSED = {  # of what other cases have
    "call",
    "gradient of scan",
    "nn.scan of nn.remat",
    "over layers, reversed",
    "over layers, unrolled",
    "scan of vmap",
    "vmap of scan",
}
every_case = pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=name, marks=[pytest.mark.slow] * (name in COMPOSED))
        for name, case in CASES.items()
    ],
)


@every_case
def test_state_is_that_of_the_values_seen(case):
    expected, record = recorded(case)
    run = jax.jit(folded(functools.partial(case, noting), fold))
    outputs, state = run({SITE: statistics()}, X)
    assert_same(outputs, expected)
    assert_same(state, {SITE: numpy_statistics(record)})
    assert bool(record) == (case is not CASES["cond, not taken"])


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_programs_without_a_site_of_the_state_stay_as_they_are(case):
    noted = functools.partial(case, noting)
    start = {"elsewhere": jnp.zeros(3)}
    plain = jax.make_jaxpr(noted)(X)
    again, (_, state) = jax.make_jaxpr(folded(noted, fold), return_shape=True)(start, X)
    assert [e.primitive for e in again.eqns] == [e.primitive for e in plain.eqns]
    assert state.keys() == start.keys()
    assert noted_sites(noted, jax.ShapeDtypeStruct(X.shape, X.dtype)) == {SITE}


def keep(site, state, index, x):
    return state


@pytest.mark.parametrize("case", [plain, over_layers, vmap_own_index])
def test_values_are_those_of_the_function_bit_for_bit(case):
    x = jax.random.normal(jax.random.key(0), X.shape)
    expected = functools.partial(case, unnoted)(x)
    assert_same(functools.partial(case, noting)(x), expected)
    outputs, _ = folded(functools.partial(case, noting), keep)({SITE: jnp.zeros(2)}, x)
    assert_same(outputs, expected)


# --- Properties of folding -----------------------------------------------------------------------


def write_down(site, state, index, x):
    """A state that is a list: how many notes there were, and the index of each."""
    length, indices = state
    return length + 1, indices.at[length].set(index)


def indices_noted(function, *args):
    start = {SITE: (0, jnp.zeros(32, jnp.int32))}
    _, state = jax.jit(folded(function, write_down))(start, *args)
    length, indices = state[SITE]
    return indices[:length].tolist()


def test_notes_are_folded_in_program_order():
    def function(x):
        x = noting(x, 3)
        x, _ = over_layers(noting, x, reverse=True)
        x = jax.jit(lambda x: noting(noting(x, 0), 2))(x)
        x = while_loop(noting, x)
        x = jax.vmap(noting)(x[1][:3], jnp.array([2, 0, 1]))
        return noting(x, 1)

    assert indices_noted(function, X) == [3, 3, 2, 1, 0, 0, 2, 0, 1, 2, 2, 0, 1, 1]


def test_stacks_of_stacks_are_folded_row_by_row():
    indices = jnp.arange(6).reshape(2, 3)
    assert indices_noted(jax.vmap(jax.vmap(noting)), jnp.zeros((2, 3, 5)), indices) == [*range(6)]


def layers(x, lift):
    def body(x, index):
        return jnp.sin(noting(jnp.sin(x), index)), None

    return jax.lax.scan(lift(body), x, jnp.arange(LAYERS))[0].sum()


@pytest.mark.parametrize(
    "loss",
    [
        functools.partial(layers, lift=jax.checkpoint),
        jax.checkpoint(functools.partial(layers, lift=lambda body: body)),
        jax.jit(functools.partial(layers, lift=jax.checkpoint)),
    ],
    ids=["checkpoint in scan", "scan in checkpoint", "in jit"],
)
def test_what_is_computed_again_for_gradients_is_not_folded_again(loss):
    assert indices_noted(jax.grad(loss), X) == [*range(LAYERS)]


def test_branches_for_other_platforms_are_not_compiled():
    def function(x):
        return jax.lax.platform_dependent(x, tpu=jnp.cos, default=lambda x: noting(jnp.sin(x), 0))

    program = jax.jit(folded(function, keep)).lower({SITE: 0}, X).as_text()
    assert "stablehlo.sine" in program
    assert "stablehlo.cosine" not in program


def test_vmap_puts_its_axes_first():
    shapes = []

    def fold(site, state, index, x):
        shapes.append((index.shape, x.shape))
        return state

    def stack(x):
        return jax.vmap(noting)(x, jnp.arange(2))

    axes = jax.vmap(jax.vmap(noting, (1, None), 1), (1, None), 1)
    jax.eval_shape(folded(axes, fold), {SITE: 0}, jnp.zeros((3, 4, 5)), 0)
    jax.eval_shape(folded(jax.vmap(stack, 1), fold), {SITE: 0}, jnp.zeros((2, 3, 4, 5)))
    assert shapes == [((), (4, 5, 3)), ((), (3, 4, 5))]


def test_layers_that_share_an_input_compute_it_once():
    """`out_axes=None` refuses what is batched."""
    same = jax.vmap(lambda index: noting(X, index), out_axes=None)
    np.testing.assert_array_equal(same(jnp.arange(LAYERS)), X)
    assert indices_noted(same, jnp.arange(LAYERS)) == [*range(LAYERS)]


def test_a_note_is_the_identity():
    for x in (
        X,
        X.astype(jnp.bfloat16),
        jnp.arange(3),
        jnp.array([True]),
        np.ones(2, np.float32),
        1.5,
    ):
        for same in noting(x, 0), jax.jit(noting)(x, 0):
            np.testing.assert_array_equal(same, x)
            chex.assert_trees_all_equal_shapes_and_dtypes(same, jnp.asarray(x))


def test_its_derivative_is_the_identity():
    def function(x):
        return noting(x, 2)

    np.testing.assert_array_equal(jax.jvp(function, (X,), (3 * X,))[1], 3 * X)
    np.testing.assert_array_equal(jax.vjp(function, X)[1](2 * X)[0], 2 * X)
    np.testing.assert_array_equal(jax.linear_transpose(function, X)(2 * X)[0], 2 * X)
    slopes = jax.vmap(jax.grad(lambda x, index: 3 * noting(x, index)))(X[0], jnp.arange(FEATURES))
    np.testing.assert_array_equal(slopes, 3 * np.ones(FEATURES))


def test_arguments_results_and_states_are_trees():
    def function(x, options):
        y = note(x["a"] * options.scale, jnp.uint8(1), "first")
        return {"y": y, "none": None}, note(options.shift, 0, "second")

    class Options(NamedTuple):
        scale: float
        shift: jax.Array

    def fold(site, state, index, x):
        return {"sum": state["sum"] + x.sum(), "of": (state["of"][0] + index,)}

    empty = {"sum": 0.0, "of": (0,)}
    args = {"a": np.arange(3.0), "unused": None}, Options(2.5, jnp.ones(2))
    outputs, state = folded(function, fold)({"first": empty, "second": empty}, *args)
    assert_same(outputs, ({"y": np.array([0, 2.5, 5], np.float32), "none": None}, np.ones(2)))
    assert_same(state, {"first": {"sum": 7.5, "of": (1,)}, "second": {"sum": 2.0, "of": (0,)}})


def test_what_a_function_closes_over_may_be_traced():
    @jax.jit
    def run(x, weight):
        def function(x):
            return jax.lax.cond(x.sum() < 1000, lambda x: noting(x * weight, 0), lambda x: x, x)

        return folded(function, lambda site, state, index, x: state + (x * weight).sum())(
            {SITE: 0.0}, x
        )

    outputs, state = run(X, jnp.float32(2))
    assert_same((outputs, state), (2 * X, {SITE: 4 * X.sum()}))


def test_python_numbers_are_states_inside_loops():
    """Their types are weak, those of the fold are not."""
    start = {SITE: {"max": -jnp.inf, "length": 0}}

    def fold(site, state, index, x):
        return {"max": jnp.maximum(state["max"], x.max()), "length": 1 + state["length"]}

    for case in over_layers, while_loop, functools.partial(cond, True), vmap_own_index:
        _, state = jax.eval_shape(folded(functools.partial(case, noting), fold), start, X)
        assert {name: leaf.dtype for name, leaf in state[SITE].items()} == {
            "max": jnp.float32,
            "length": jnp.int32,
        }


def test_random_numbers_stay_the_same():
    def function(key):
        return noting(jax.random.normal(key, (4,)), 0)

    for key in jax.random.key(1), jax.random.PRNGKey(1):
        outputs, _ = folded(function, keep)({SITE: 0}, key)
        np.testing.assert_array_equal(outputs, function(key))


def test_equal_shapes_are_traced_once():
    chex.clear_trace_counter()

    @chex.assert_max_traces(1)
    def function(x):
        return over_layers(noting, x)

    run = jax.jit(folded(function, chex.assert_max_traces(2)(fold)))
    state = {SITE: jax.tree.map(jnp.array, jax.tree.map(np.array, statistics()))}
    for _ in range(3):
        _, state = run(state, X)


def test_the_context_of_each_run_counts():
    """As a function meets it, were it called: traces of an earlier context are not taken for it."""
    sites = ["a"]

    def function(x):
        return note(x, 0, sites[0])

    run = folded(function, lambda site, state, index, x: state + 1)
    assert run({"a": 0, "b": 0}, X)[1] == {"a": 1, "b": 0}
    sites[0] = "b"
    assert run({"a": 0, "b": 0}, X)[1] == {"a": 0, "b": 1}
    assert noted_sites(function, X) == {"b"}


@pytest.mark.parametrize(
    ("case", "spec"),
    [
        (over_layers, ("rows",)),
        (vmap_own_index, (None, "columns")),
        (flax_scan, ("rows", "columns")),
    ],
)
def test_sharded_inputs_fold_to_the_same_state(case, spec):
    mesh = jax.make_mesh((4, 2), ("rows", "columns"), (jax.sharding.AxisType.Auto,) * 2)
    x = jax.device_put(X, NamedSharding(mesh, PartitionSpec(*spec)))
    run = jax.jit(folded(functools.partial(case, noting), fold))
    assert_same(run({SITE: statistics()}, x), run({SITE: statistics()}, X))


# --- What is refused -----------------------------------------------------------------------------


def in_shard_map(x):
    mesh = jax.make_mesh((8,), ("rows",), (jax.sharding.AxisType.Auto,))
    spec = PartitionSpec("rows")
    return jax.shard_map(lambda x: noting(2 * x, 1), mesh=mesh, in_specs=spec, out_specs=spec)(x)


def in_linear_solve(x):
    solve = functools.partial(jax.lax.custom_linear_solve, solve=lambda matvec, b: b / 2)
    return solve(lambda x: noting(2 * x, 0), x, transpose_solve=lambda vecmat, b: b / 2)


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (in_shard_map, "shard_map"),
        (lambda x: jax.jit(in_shard_map)(x), "shard_map"),
        (in_linear_solve, "custom_linear_solve"),
    ],
)
def test_transformations_that_hide_values_are_refused(function, name):
    message = rf"{name} holds notes of \['layers/in'\].*Leave these layers out"
    with pytest.raises(ValueError, match=message):
        folded(function, fold)({SITE: statistics()}, X)
    outputs, _ = folded(function, fold)({"elsewhere": 0}, X)
    np.testing.assert_array_equal(outputs, function(X))
    assert noted_sites(function, X) == {SITE}


def test_conditions_of_while_loops_are_refused():
    def function(x):
        return jax.lax.while_loop(lambda x: noting(x, 0).sum() < 1000, lambda x: x + 100, x)

    with pytest.raises(ValueError, match=r"condition of a while loop notes \['layers/in'\].*body"):
        folded(function, fold)({SITE: statistics()}, X)
    outputs, _ = folded(function, fold)({}, X)
    np.testing.assert_array_equal(outputs, function(X))


@pytest.mark.parametrize("index", [0.0, jnp.arange(2), True])
def test_an_index_is_one_integer(index):
    with pytest.raises(ValueError, match=r"one integer, got (float32|int32|bool).*'layers/in'"):
        noting(X, index)


@pytest.mark.parametrize(
    "change",
    [lambda x: x.astype(jnp.bfloat16), lambda x: x[None], lambda x: (x,), lambda x: {"x": x}],
)
@pytest.mark.parametrize("case", [plain, over_layers, vmap_own_index])
def test_a_fold_keeps_the_form_of_a_state(case, change):
    with pytest.raises(ValueError, match=r"state of 'layers/in'.*Keep the structure"):
        jax.eval_shape(
            folded(functools.partial(case, noting), lambda site, state, *_: change(state)),
            {SITE: jnp.zeros(3)},
            X,
        )

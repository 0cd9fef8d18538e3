"""`add_weighted_adapter`: every type is its formula in float64, on every kind of layer."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.core import FrozenDict, freeze
from helpers import adapter_leaves, assert_close, initialise, key_of, numbers
from hypothesis import given, settings
from hypothesis import strategies as st

import peft_jax as peft
from peft_jax import LoraSpec
from peft_jax._numerics import elected_mean, keep_largest, keep_random, rescaled
from peft_jax.adapters import add_weighted_adapter

DENSE = LoraSpec("kernel", "ir,ro->io", 2)
INPUTS, OUTPUTS = 6, 5
WEIGHTS, SCALINGS = (0.7, -1.5, 2.0), (0.5, 3.0, 1.25)
KEY = key_of(3)

SEPARATE = ["linear", "ties", "dare_linear", "dare_ties", "magnitude_prune"]
DECOMPOSED = ["svd", "ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd"]
TYPES = ["cat", *SEPARATE, *DECOMPOSED]
DRAWN = [name for name in TYPES if name.startswith("dare")]
DETERMINED = [name for name in TYPES if name not in DRAWN]


def types(*fast, slow=()):
    """These types, and further ones in the slow tests."""
    others = [pytest.param(name, marks=pytest.mark.slow) for name in slow if name not in fast]
    return pytest.mark.parametrize("combination_type", [*fast, *others])


def eager(adapters, weights, specs, combination_type, **options):
    """With a density of a half, and a key for those that draw."""
    options = {"density": 0.5, "key": KEY, **options}
    return add_weighted_adapter(
        adapters, weights, specs=specs, combination_type=combination_type, **options
    )


def combine(adapters, weights, specs, combination_type, key=KEY, **options):
    """The same, compiled in one program."""
    made = []

    @jax.jit
    def run(adapters, key):
        lora, new = eager(adapters, weights, specs, combination_type, key=key, **options)
        made.append(new)
        return lora

    return run(adapters, key), made[0]


def tree(seed, rank=2, inputs=INPUTS, outputs=OUTPUTS):
    leaves = {"a": numbers(inputs, rank, seed=seed), "b": numbers(rank, outputs, seed=seed + 50)}
    return {"x": {"lora": leaves}}


def spec_of(rank=2, scaling=1.0):
    return {"x/lora": dataclasses.replace(DENSE, rank=rank, scaling=scaling)}


def three(rank=2):
    return [tree(i, rank) for i in range(3)], [spec_of(rank, s) for s in SCALINGS]


def wide(array):
    return np.asarray(array, np.float64)


def factors(tree):
    leaves = tree["x"]["lora"]
    return wide(leaves["a"]), wide(leaves["b"])


def product(tree):
    a, b = factors(tree)
    return a @ b


def exact_sum(trees, weights, specs):
    return sum(
        w * spec["x/lora"].scaling * product(tree)
        for tree, w, spec in zip(trees, weights, specs, strict=True)
    )


def best(matrix, rank):
    u, s, v = np.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ v[:rank]


def close(actual, expected, tolerance=2e-5):
    assert np.max(np.abs(actual - expected)) <= tolerance * np.max(np.abs(expected))


# --- The formulas, in float64 --------------------------------------------------------------------


def largest(array, density):
    flat = array.reshape(-1)
    kept = sorted(range(flat.size), key=lambda i: -abs(flat[i]))[: int(density * flat.size)]
    return np.array([x if i in kept else 0.0 for i, x in enumerate(flat)]).reshape(array.shape)


def elected(arrays, weights, majority):
    """Place by place, as the paper says it."""
    result = np.zeros(arrays[0].shape)
    for place in np.ndindex(result.shape):
        column = [array[place] for array in arrays]
        votes = sum(np.sign(x) if majority == "frequency" else x for x in column)
        sign = 1 if votes >= 0 else -1
        agreed = [w * x for w, x in zip(weights, column, strict=True) if np.sign(x) == sign]
        result[place] = sum(agreed) / max(len(agreed), 1)
    return result


def summed(arrays, weights, majority):
    return sum(w * x for w, x in zip(weights, arrays, strict=True))


def expected_product(combination_type, pairs, weights, scalings, rank, majority="total", kept=None):
    """``a·b`` of the result.

    Args:
      combination_type: of the result.
      pairs: ``a`` and ``b`` of each adapter.
      weights: of each.
      scalings: of each.
      rank: of the result.
      majority: as in `add_weighted_adapter`.
      kept: for the types that draw, what was kept of each: ``a`` and ``b``, or the change.
    """
    merge = elected if "ties" in combination_type else summed
    trims = "ties" in combination_type or "magnitude" in combination_type
    trim = functools.partial(largest, density=0.5) if trims else lambda x: x
    if combination_type.endswith("svd"):
        changes = [s * a @ b for (a, b), s in zip(pairs, scalings, strict=True)]
        merged = merge([trim(x) for x in changes] if kept is None else kept, weights, majority)
        return best(merged, rank)
    products = np.asarray(weights) * np.asarray(scalings)
    root, sign = np.sqrt(np.abs(products)), np.sign(products)
    if kept is None:
        kept = [(trim(a), trim(b)) for a, b in pairs]
    a = merge([a for a, _ in kept], sign * root, majority)
    b = merge([b for _, b in kept], root, majority)
    return a @ b


@pytest.mark.parametrize(
    ("combination_type", "majority"),
    [
        *((name, "total") for name in DETERMINED if name != "cat"),
        ("ties", "frequency"),
        ("ties_svd", "frequency"),
    ],
)
def test_every_type_is_its_formula(combination_type, majority):
    trees, specs = three()
    lora, _ = combine(trees, WEIGHTS, specs, combination_type, majority_sign_method=majority)
    pairs = [factors(tree) for tree in trees]
    expected = expected_product(combination_type, pairs, WEIGHTS, SCALINGS, 2, majority)
    close(product(lora), expected)


@types("dare_ties", "dare_ties_svd", slow=DRAWN)
def test_what_is_drawn_is_merged_by_the_formula(combination_type):
    """A weight of one for a single adapter, of zero for the others, shows what is kept of it."""
    trees, specs = three()
    own = {"linear": "dare_linear", "svd": "dare_linear_svd"}
    alone = own["svd" if combination_type.endswith("svd") else "linear"]
    kept = []
    for i, spec in enumerate(specs):
        one = [float(i == j) for j in range(3)]
        lora, _ = combine(trees, one, specs, alone, svd_rank=OUTPUTS)
        root = np.sqrt(spec["x/lora"].scaling)
        a, b = factors(lora)
        kept.append(a @ b if alone.endswith("svd") else (a / root, b / root))
    for tree, found in zip(trees, kept, strict=True):
        if not alone.endswith("svd"):
            for before, after in zip(factors(tree), found, strict=True):
                is_zero = np.abs(after) < 1e-6
                np.testing.assert_allclose(after, np.where(is_zero, 0, before / 0.5), atol=1e-5)
                assert 0 < np.sum(is_zero) < is_zero.size
    if alone.endswith("svd"):  # what the decomposition has left of zeros is not zero
        kept = [np.where(np.abs(change) < 1e-5, 0, change) for change in kept]
    lora, _ = combine(trees, WEIGHTS, specs, combination_type, svd_rank=2)
    pairs = [factors(tree) for tree in trees]
    expected = expected_product(combination_type, pairs, WEIGHTS, SCALINGS, 2, kept=kept)
    close(product(lora), expected, 1e-4)


def test_a_drawn_combination_is_right_in_the_mean():
    trees, specs = three()

    def combined(key):
        lora, _ = eager(trees, WEIGHTS, specs, "dare_linear_svd", svd_rank=5, key=key)
        return lora["x"]["lora"]["a"] @ lora["x"]["lora"]["b"]

    found = wide(jax.jit(jax.vmap(combined))(jax.random.split(KEY, 4000)))
    error = np.std(found, axis=0) / np.sqrt(len(found))
    assert np.max(np.abs(np.mean(found, axis=0) - exact_sum(trees, WEIGHTS, specs)) / error) < 5


def test_draws_depend_on_the_key_and_the_layer():
    trees = [{"x": tree["x"], "y": tree["x"]} for tree in three()[0]]
    specs = {f"{name}/lora": DENSE for name in "xy"}
    first, again, other = (
        combine(trees, WEIGHTS, specs, "dare_linear", key=key_of(seed))[0] for seed in (0, 0, 1)
    )
    chex.assert_trees_all_equal(first, again)
    for one, two in ((first["x"], other["x"]), (first["x"], first["y"])):
        assert not np.array_equal(one["lora"]["a"], two["lora"]["a"])


def test_sparsifiers_of_given_masks():
    vectors = numbers(3, 40)
    mask = np.random.default_rng(0).random((3, 40)) < 0.3
    close(wide(rescaled(vectors, jnp.asarray(mask), 0.3)), wide(vectors) * mask / 0.3)

    kept = keep_largest(vectors, 0.3, None)
    for row, found in zip(wide(vectors), wide(kept), strict=True):
        np.testing.assert_array_equal(found, largest(row, 0.3))
    equal = keep_largest(jnp.ones((1, 7)), 0.5, None)
    np.testing.assert_array_equal(equal, [[1, 1, 1, 0, 0, 0, 0]])  # exactly as many as it says
    for density in (1.0, 0.01):
        found = keep_largest(vectors[:, :9], density, None)
        np.testing.assert_array_equal(found, wide(vectors[:, :9]) * (density == 1))
    np.testing.assert_array_equal(keep_random(vectors, 1.0, KEY), vectors)

    drawn = wide(keep_random(jnp.ones((1, 20_000)), 0.3, KEY))
    np.testing.assert_allclose(np.unique(drawn), [0, 1 / 0.3], rtol=1e-6)
    assert abs(np.mean(drawn > 0) - 0.3) < 5 * np.sqrt(0.3 * 0.7 / 20_000)


def test_an_even_vote_is_for_the_plus():
    vectors = jnp.asarray([[1.0, -1.0, 0.0, 3.0], [-1.0, 1.0, 0.0, -1.0], [0.0, 0.0, 0.0, -1.0]])
    weights = jnp.asarray([1.0, 10.0, 100.0])
    total = elected_mean(vectors, weights, "total")
    np.testing.assert_allclose(total, [1.0, 10.0, 0.0, 3.0])
    frequency = elected_mean(vectors, weights, "frequency")
    np.testing.assert_allclose(frequency, [1.0, 10.0, 0.0, -55.0])


# --- Exact sums, and the best of a rank ----------------------------------------------------------


@settings(max_examples=8, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 4), st.floats(-3, 3), st.floats(-2, 2)), min_size=1, max_size=4
    ),
    st.integers(1, 7),
)
def test_cat_is_the_sum_and_svd_the_best_for_it(members, svd_rank):
    ranks, weights, scalings = zip(*members, strict=True)
    trees = [tree(i, rank) for i, rank in enumerate(ranks)]
    specs = [spec_of(rank, s) for rank, s in zip(ranks, scalings, strict=True)]
    expected = exact_sum(trees, weights, specs)

    def default(trees):
        return eager(trees, weights, specs, "svd").lora

    tolerance = 1e-5 * max(1.0, *(abs(w * s) for w, s in zip(weights, scalings, strict=True))) * 50

    joined, joined_specs = combine(trees, weights, specs, "cat")
    np.testing.assert_allclose(product(joined), expected, atol=tolerance)
    assert joined_specs["x/lora"].rank == sum(ranks) == joined["x"]["lora"]["a"].shape[1]

    decomposed, new = combine(trees, weights, specs, "svd", svd_rank=svd_rank)
    assert new["x/lora"].rank == svd_rank == decomposed["x"]["lora"]["b"].shape[0]
    # Where two singular values are close, which of them is kept hardly matters.
    values = np.linalg.svd(expected, compute_uv=False)
    error = np.linalg.norm(product(decomposed) - expected)
    assert error <= np.linalg.norm(values[svd_rank:]) + 5 * tolerance

    assert jax.eval_shape(default, trees)["x"]["lora"]["a"].shape == (INPUTS, max(ranks))


def test_svd_is_that_of_numpy():
    trees, specs = three()
    expected = best(exact_sum(trees, WEIGHTS, specs), 3)
    lora, _ = combine(trees, WEIGHTS, specs, "svd", svd_rank=3, svd_full_matrices=False)
    close(product(lora), expected)
    a, b = factors(lora)
    np.testing.assert_allclose(a.T @ a, np.eye(3), atol=1e-5)
    values = np.linalg.svd(expected, compute_uv=False)[:3]
    np.testing.assert_allclose(np.linalg.norm(b, axis=1), values, rtol=1e-5)


def test_svd_does_not_form_the_change():
    trees = [tree(i, 2, 61, 67) for i in range(2)]

    def text(combination_type):
        return str(
            jax.make_jaxpr(
                lambda trees: eager(trees, [1, 2], spec_of(), combination_type, svd_rank=2)[0]
            )(trees)
        )

    assert not any(shape in text("svd") for shape in ("[61,67]", "[67,61]"))
    assert "[67,61]" in text("ties_svd")


@pytest.mark.parametrize("quantile", [0.6, 0.95, 1.0])
def test_clamp_cuts_at_the_quantile(quantile):
    trees, specs = three()
    u, s, v = np.linalg.svd(exact_sum(trees, WEIGHTS, specs).T, full_matrices=False)
    a, b = v[:2].T, (u[:, :2] * s[:2]).T
    lora, _ = combine(trees, WEIGHTS, specs, "svd", svd_clamp=quantile)
    # LAPACK chooses the signs, which the quantile depends on: those of the matrix (out, in).
    bound = np.quantile(np.concatenate([a.reshape(-1), b.reshape(-1)]), quantile)
    for found, expected in zip(factors(lora), (a, b), strict=True):
        np.testing.assert_allclose(found, np.clip(expected, -bound, bound), atol=2e-5)


def test_a_negative_quantile_cuts_to_zero():
    trees, specs = three()
    lora, _ = combine(trees, WEIGHTS, specs, "svd", svd_clamp=0.01)
    assert not np.any(product(lora))


# --- Weights -------------------------------------------------------------------------------------


@types("linear", "cat", "svd", "dare_ties", slow=TYPES)
def test_one_adapter_is_scaled_by_its_weight(combination_type):
    trees, specs = three()
    weights = [2.5, -0.8]

    @jax.jit
    def all_of_them(trees):
        return [
            eager(trees, [weight], specs[:1], combination_type, density=1.0).lora
            for weight in weights
        ]

    for weight, lora in zip(weights, all_of_them(trees[:1]), strict=True):
        np.testing.assert_allclose(product(lora), weight * 0.5 * product(trees[0]), atol=1e-5)


@types("linear", "svd", "dare_ties", slow=TYPES)
def test_negated_weights_negate_the_product(combination_type):
    trees, specs = three()

    @jax.jit
    def both(trees):
        return [
            eager(trees, [sign * w for w in WEIGHTS], specs, combination_type).lora
            for sign in (1, -1)
        ]

    plus, minus = both(trees)
    close(product(minus), -product(plus))


@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray, lambda w: tuple(map(np.float32, w))])
def test_weights_may_be_arrays_of_numbers(kind):
    trees, specs = three()
    expected, _ = combine(trees, WEIGHTS, specs, "linear")
    found, _ = combine(trees, kind(WEIGHTS), specs, "linear")
    assert_close(found, expected)


# --- Kinds of layers, stacks and batches ---------------------------------------------------------

STACKED = "...ir,...ro->...io"
KINDS = {
    # spec; shapes of a and b; how each is a matrix (in, r) or (r, out)
    "heads out": (
        LoraSpec("kernel", "ir,rnh->inh", 2),
        ((6, 2), (2, 2, 3)),
        ("ir->ir", "rnh->rnh"),
    ),
    "heads in": (
        LoraSpec("kernel", "nhr,rd->nhd", 2),
        ((2, 3, 2), (2, 6)),
        ("nhr->nhr", "rd->rd"),
    ),
    "heads first": (
        LoraSpec("w", "dr,nrh->ndh", 2),
        ((6, 2), (2, 2, 3)),
        ("dr->dr", "nrh->rnh"),
    ),
    "inputs the other way round": (
        LoraSpec("w", "yxr,ro->xoy", 2),
        ((3, 4, 2), (2, 5)),
        ("yxr->xyr", "ro->ro"),
    ),
    "conv": (
        LoraSpec("kernel", "xyir,ro->xyio", 2),
        ((2, 2, 3, 2), (2, 5)),
        ("xyir->xyir", "ro->ro"),
    ),
    "embedding": (
        LoraSpec("embedding", "vr,rf->vf", 2),
        ((7, 2), (2, 5)),
        ("vr->vr", "rf->rf"),
    ),
    "batch in a alone": (
        LoraSpec("kernel", "gir,ro->gio", 2),
        ((3, 4, 2), (2, 5)),
        ("gir->gir", "ro->ro"),
    ),
}
SLICED = {
    # spec of the whole, and of one slice; shapes of a and b; the axes, outermost first, along which
    # a, b and the kernel are sliced
    "stacked": (LoraSpec("kernel", STACKED, 2), DENSE, ((3, 6, 2), (3, 2, 5)), [(0, 0, 0)]),
    "stacked at 1": (
        LoraSpec("kernel", STACKED, 2, stack_axes=(1,)),
        DENSE,
        ((6, 3, 2), (2, 3, 5)),
        [(1, 1, 1)],
    ),
    "stacked at the end": (
        LoraSpec("kernel", STACKED, 2, stack_axes=(-1,)),
        DENSE,
        ((6, 2, 3), (2, 5, 3)),
        [(-1, -1, -1)],
    ),
    "stacked twice": (
        LoraSpec("kernel", STACKED, 2, stack_axes=(1, 0)),
        DENSE,
        ((4, 6, 3, 2), (4, 2, 3, 5)),
        [(0, 0, 0), (1, 1, 1)],
    ),
    "batch": (
        LoraSpec("kernel", "gir,gro->gio", 2),
        DENSE,
        ((3, 6, 2), (3, 2, 5)),
        [(0, 0, 0)],
    ),
    "batch inside": (
        LoraSpec("kernel", "igr,gro->igo", 2),
        DENSE,
        ((6, 3, 2), (3, 2, 5)),
        [(1, 0, 1)],
    ),
    "batch in a stack": (
        LoraSpec("kernel", "...gir,...rgo->...gio", 2, stack_axes=(1,)),
        DENSE,
        ((3, 4, 6, 2), (2, 4, 3, 5)),
        [(1, 1, 1), (0, 1, 0)],
    ),
}


def trees_of(shapes, count=2):
    return [
        {"x": {"lora": {"a": numbers(*shapes[0], seed=i), "b": numbers(*shapes[1], seed=i + 50)}}}
        for i in range(count)
    ]


def change(lora, specs, shape):
    """What an adapter adds to a kernel of zeros."""
    (spec,) = specs.values()
    params = {"x": {spec.param: jnp.zeros(shape), **lora["x"]}}
    return peft.fuse_params(params, specs=specs)["x"][spec.param]


@types("ties", "svd", slow=["linear", "cat", "magnitude_prune_svd"])
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_every_kind_of_layer_is_combined_as_its_matrix(kind, combination_type):
    spec, shapes, layouts = kind
    specs = [{"x/lora": dataclasses.replace(spec, scaling=s)} for s in SCALINGS[:2]]
    trees = trees_of(shapes)

    def pair(tree):
        leaves = tree["x"]["lora"]
        a, b = (np.einsum(how, wide(leaves[n])) for n, how in zip("ab", layouts, strict=True))
        return a.reshape(-1, a.shape[-1]), b.reshape(b.shape[0], -1)

    lora, new = combine(trees, WEIGHTS[:2], specs, combination_type)
    pairs = [pair(tree) for tree in trees]
    if combination_type == "cat":
        expected = sum(
            w * s * a @ b for (a, b), w, s in zip(pairs, WEIGHTS, SCALINGS, strict=False)
        )
    else:
        expected = expected_product(combination_type, pairs, WEIGHTS[:2], SCALINGS[:2], 2)
    a, b = pair(lora)
    close(a @ b, expected)
    assert new["x/lora"].equation == spec.equation
    rank = 4 if combination_type == "cat" else 2
    assert (new["x/lora"].rank, new["x/lora"].scaling, new["x/lora"].alpha) == (rank, 1, rank)


@types("ties", slow=["svd", "linear", "cat", "magnitude_prune_svd"])
@pytest.mark.parametrize("kind", SLICED.values(), ids=SLICED)
def test_layers_of_a_stack_and_indices_of_a_batch_are_combined_apart(kind, combination_type):
    whole, one, shapes, axes = kind
    trees = trees_of(shapes)
    specs = [{"x/lora": dataclasses.replace(whole, scaling=s)} for s in SCALINGS[:2]]
    slice_specs = [{"x/lora": dataclasses.replace(one, scaling=s)} for s in SCALINGS[:2]]
    lengths, shape = [], shapes[0]
    for at, _, _ in axes:
        lengths.append(shape[at])
        shape = np.delete(shape, at)
    full = np.zeros((INPUTS, OUTPUTS))
    for length, (_, _, at) in reversed(list(zip(lengths, axes, strict=True))):
        full = np.repeat(np.expand_dims(full, at if at >= 0 else full.ndim), length, at)

    def cut(array, operand, index):
        for number, at in zip(index, axes, strict=True):
            array = array.take(number, at[operand])
        return array

    def sliced(tree, index):
        leaves = tree["x"]["lora"]
        return {"x": {"lora": {"a": cut(leaves["a"], 0, index), "b": cut(leaves["b"], 1, index)}}}

    @jax.jit
    def both(trees):
        lora, new = eager(trees, WEIGHTS[:2], specs, combination_type)
        found = change(lora, new, full.shape)
        apart = {}
        for index in (tuple(0 for _ in lengths), tuple(length - 1 for length in lengths)):
            own = [sliced(tree, index) for tree in trees]
            lora, new = eager(own, WEIGHTS[:2], slice_specs, combination_type)
            apart[index] = change(lora, new, (INPUTS, OUTPUTS))
        return found, apart

    found, apart = both(trees)
    for index, expected in apart.items():
        close(cut(wide(found), 2, index), wide(expected))


# --- Whole models --------------------------------------------------------------------------------


class Net(nn.Module):
    """Layers of several kinds, one of them stacked."""

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(11, 8, name="embed")(tokens)
        x = nn.Conv(8, (3,), name="conv")(x)
        x = nn.DenseGeneral((2, 4), name="query")(x)
        x = nn.DenseGeneral(8, axis=(-2, -1), name="out")(x)
        stacked = nn.scan(Step, variable_axes={"params": 1}, split_rngs={"params": True}, length=3)
        x, _ = stacked(name="layers")(x)
        return nn.Dense(5, name="head")(x)


class Step(nn.Module):
    @nn.compact
    def __call__(self, x):
        return jnp.tanh(nn.Dense(8, name="dense")(x)), None


TOKENS = np.arange(10, dtype=np.int32).reshape(2, 5)
CONFIGS = [
    {"r": 2, "lora_alpha": 3, "target_modules": ["embed", "conv", "query", "dense", "head"]},
    {
        "r": 3,
        "lora_alpha": 5,
        "use_rslora": True,
        "target_modules": ["embed", "query", "out", "dense", "head"],
        "rank_pattern": {"query": 2, "head": 1},
        "alpha_pattern": {"head": 7},
    },
]


@functools.cache
def nets(**more):
    """The base, and two adapters for it, of different targets, ranks and scalings."""
    base = initialise(Net(), TOKENS)["params"]
    trees, specs = [], []
    for i, fields in enumerate(CONFIGS):
        model = peft.get_peft_model(Net(), peft.LoraConfig(**{**fields, **more}))
        specs.append(peft.lora_specs(model, TOKENS))
        shapes = jax.eval_shape(lambda m=model: m.init(key_of(1), TOKENS))["params"]
        leaves, structure = jax.tree.flatten(peft.split_params(shapes).lora)
        drawn = [numbers(*leaf.shape, seed=100 * i + j) for j, leaf in enumerate(leaves)]
        trees.append(jax.tree.unflatten(structure, drawn))
    return base, trees, specs


def all_changes(bias, combination_type, weights, **options):
    """What the adapters change in a base of zeros, what the result does; and the latter's specs."""
    base, trees, specs = nets(lora_bias=bias)
    made = {}

    @jax.jit
    def run(base, trees):
        lora, made["specs"] = eager(trees, weights, specs, combination_type, **options)
        zeros = jax.tree.map(jnp.zeros_like, base)
        pairs = zip((*trees, lora), (*specs, made["specs"]), strict=True)
        return [peft.fuse_params(peft.merge_params(zeros, lora), specs=own) for lora, own in pairs]

    one, two, found = jax.tree.map(wide, run(base, trees))
    return one, two, found, made["specs"]


@pytest.mark.parametrize("bias", [pytest.param(False, marks=pytest.mark.slow), True])
def test_cat_fuses_to_the_sum_of_all_changes(bias):
    one, two, found, specs = all_changes(bias, "cat", [1.5, -0.5])
    assert_close(found, jax.tree.map(lambda x, y: 1.5 * x - 0.5 * y, one, two))
    assert np.any(found["head"]["bias"]) == bias
    assert {path.split("/")[-2]: spec.rank for path, spec in specs.items()} == {
        "embed": 5,
        "conv": 2,
        "query": 4,
        "out": 3,
        "dense": 5,
        "head": 3,
    }


def test_svd_of_a_model_is_the_best_of_its_rank():
    one, two, found, specs = all_changes(True, "svd", [1.0, 2.0], svd_rank=2)
    for path, shape in (("embed", (11, 8)), ("conv", (24, 8)), ("query", (8, 8)), ("head", (8, 5))):
        leaf = "embedding" if path == "embed" else "kernel"
        # An embedding's bias joins its table, whose change is none of a rank.
        total = one[path][leaf] + 2 * two[path][leaf] if path in two else one[path][leaf]
        if path != "embed":
            close(found[path][leaf].reshape(shape), best(total.reshape(shape), 2))
    layers, total = (
        found["layers"]["dense"],
        jax.tree.map(lambda x, y: x + 2 * y, one["layers"]["dense"], two["layers"]["dense"]),
    )
    for layer in range(3):
        close(layers["kernel"][:, layer], best(total["kernel"][:, layer], 2))
    close(layers["bias"], total["bias"])
    assert specs["conv/lora"].bias == "bias"


def test_biases_are_made_sparse_layer_by_layer():
    spec = LoraSpec("kernel", STACKED, 2, 0.5, stack_axes=(1,), bias="bias")
    trees = trees_of(((6, 3, 2), (2, 3, 5)))
    biases = [numbers(5, 3, seed=7 + i) for i in range(2)]
    for tree_of, bias in zip(trees, biases, strict=True):
        tree_of["x"]["lora"]["bias"] = bias
    lora, _ = combine(trees, [1.0, -2.0], {"x/lora": spec}, "ties", density=0.6)
    for layer in range(3):
        columns = [largest(0.5 * wide(bias)[:, layer], 0.6) for bias in biases]
        expected = elected(columns, [1.0, -2.0], "total")
        close(wide(lora["x"]["lora"]["bias"])[:, layer], expected)


@types("linear", "svd", "ties", slow=DETERMINED)
def test_an_adapter_that_lacks_a_layer_counts_as_zero(combination_type):
    trees, specs = three()
    lacking = [{**tree, "y": tree["x"]} for tree in trees[:2]] + [trees[2]]
    zero = jax.tree.map(jnp.zeros_like, trees[2]["x"])
    filled = [*lacking[:2], {**trees[2], "y": zero}]
    both = [{**spec, "y/lora": spec["x/lora"]} for spec in specs]

    @jax.jit
    def combined(lacking, filled):
        found, _ = eager(lacking, WEIGHTS, [*both[:2], specs[2]], combination_type)
        return found, eager(filled, WEIGHTS, both, combination_type).lora

    found, expected = combined(lacking, filled)
    for name in "xy":
        close(product({"x": found[name]}), product({"x": expected[name]}))


def test_the_result_is_what_a_config_says():
    """Rank and alpha patterns without rsLoRA load it again."""
    base, trees, specs = nets()
    lora, new = combine(trees, [1.0, 1.0], specs, "cat")
    ranks = {path.split("/")[-2]: spec.rank for path, spec in new.items()}
    config = peft.LoraConfig(
        r=1, lora_alpha=1, target_modules=list(ranks), rank_pattern=ranks, alpha_pattern=ranks
    )
    model = peft.get_peft_model(Net(), config)
    assert peft.lora_specs(model, TOKENS) == new

    @jax.jit
    def answers(base, lora):
        merged = peft.merge_params(base, lora)
        fused = peft.fuse_params(merged, specs=new)
        return model.apply({"params": merged}, TOKENS), Net().apply({"params": fused}, TOKENS)

    assert_close(*answers(base, lora))


@types("svd", "dare_ties", slow=TYPES)
def test_compiled_and_not_it_is_the_same(combination_type):
    trees, specs = three()
    run = functools.partial(eager, weights=WEIGHTS, specs=specs, combination_type=combination_type)
    lora, _ = run(trees)
    compiled_lora, _ = combine(trees, WEIGHTS, specs, combination_type)
    chex.assert_trees_all_close(lora, compiled_lora, rtol=1e-5, atol=1e-5)
    shapes = jax.eval_shape(lambda trees: run(trees).lora, trees)
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, lora)


# --- Trees ---------------------------------------------------------------------------------------


def test_names_fall_away():
    trees, specs = three()
    french = [{"x": {"lora.french": trees[0]["x"]["lora"]}}, trees[1]]
    one_dict = {"x/lora.french": specs[0]["x/lora"], **specs[1]}
    lora, new = combine(french, [1.0, 2.0], one_dict, "cat")
    expected = combine(trees[:2], [1.0, 2.0], specs[:2], "cat")
    chex.assert_trees_all_equal(lora, expected[0])
    assert new == expected[1]


def test_adapters_of_one_weight_meet_whatever_they_are_called():
    """Which kernel of a module is `lora` depends on which of them are adapted."""
    (one, two, three_), _ = three()
    first, second = (dataclasses.replace(DENSE, param=name) for name in ("w1", "w2"))
    both = {"x": {"lora": one["x"]["lora"], "lora_w2": two["x"]["lora"]}}
    lora, new = combine(
        [both, three_],
        [1.0, 1.0],
        [{"x/lora": first, "x/lora_w2": second}, {"x/lora": second}],
        "cat",
    )
    assert {path: (spec.param, spec.rank) for path, spec in new.items()} == {
        "x/lora": ("w1", 2),
        "x/lora_w2": ("w2", 4),
    }
    close(product({"x": {"lora": lora["x"]["lora_w2"]}}), product(two) + product(three_))

    _, apart = combine([one, two], [1.0, 1.0], [{"x/lora": first}, {"x/lora": second}], "cat")
    assert {path: spec.param for path, spec in apart.items()} == {
        "x/lora_w1": "w1",
        "x/lora_w2": "w2",
    }


def test_containers_stay_and_join():
    (one, two, _), _ = three()
    left = freeze({"blocks": [one, {}], "only_left": one})
    right = {"blocks": [two, two], "only_right": (two,)}
    specs = {
        f"{path}/x/lora": DENSE for path in ("blocks/0", "blocks/1", "only_left", "only_right/0")
    }
    lora, new = combine([left, right], [1.0, 2.0], specs, "cat")
    assert isinstance(lora, FrozenDict)
    assert isinstance(lora["blocks"], type(left["blocks"]))
    assert isinstance(lora["only_right"], tuple)
    assert lora["blocks"][0]["x"]["lora"]["a"].shape == (INPUTS, 4)
    assert {path: spec.rank for path, spec in new.items()} == {
        path: 4 if path == "blocks/0/x/lora" else 2 for path in specs
    }


def test_boxes_stay_and_dtypes_are_promoted():
    (one, two, _), _ = three()
    leaves = one["x"]["lora"]
    boxed = {"x": {"lora": {"a": nn.Partitioned(leaves["a"], ("rows", None)), "b": leaves["b"]}}}
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), [boxed, two])
    lora, _ = combine(half, [1.0, 1.0], spec_of(), "cat")
    assert isinstance(lora["x"]["lora"]["a"], nn.Partitioned)
    assert lora["x"]["lora"]["a"].names == ("rows", None)
    assert lora["x"]["lora"]["a"].value.dtype == lora["x"]["lora"]["b"].dtype == jnp.bfloat16
    mixed, _ = combine([half[0], two], [1.0, 1.0], spec_of(), "cat")
    assert mixed["x"]["lora"]["b"].dtype == jnp.float32


@pytest.mark.parametrize("kind", [jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit])
@pytest.mark.parametrize("combination_type", ["svd", "ties"])
def test_arrays_on_several_devices(combination_type, kind):
    trees = [tree(i, 2, 8, 5) for i in range(2)]
    mesh = jax.make_mesh((4,), ("model",), axis_types=(kind,), devices=jax.devices()[:4])
    rows, whole = (
        jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*names))
        for names in (("model",), ())
    )
    spread = jax.device_put(trees, [{"x": {"lora": {"a": rows, "b": whole}}}] * 2)
    found, _ = eager(spread, [1.0, -2.0], spec_of(), combination_type)
    expected, _ = combine(trees, [1.0, -2.0], spec_of(), combination_type)
    close(product(jax.device_get(found)), product(expected))
    assert found["x"]["lora"]["a"].sharding.is_equivalent_to(rows, 2)


def test_an_adapter_that_stands_alone():
    spec = {"LoRADenseAdapter_0": LoraSpec(None, "ir,ro->io", 2)}
    trees = [{"LoRADenseAdapter_0": tree(i)["x"]["lora"]} for i in range(2)]
    lora, new = combine(trees, [1.0, 1.0], spec, "cat")
    assert adapter_leaves(new, lora)["LoRADenseAdapter_0"]["a"].shape == (INPUTS, 4)


def test_progress_shows_a_bar(capsys):
    trees, specs = three()
    eager(trees, WEIGHTS, specs, "linear", progress=True)
    assert "combine (linear)" in capsys.readouterr().err


# --- What is refused -----------------------------------------------------------------------------

LEAVES = tree(0)["x"]["lora"]
REFUSED = {
    # arguments instead of the right ones, and the error
    "a type": ({"combination_type": "tie"}, "'tie' is none of .* Close names: .*'ties'"),
    "a type of no name": ({"combination_type": 3}, "combination_type=3 is none of"),
    "no adapters": ({"adapters": []}, "a list of one or more trees, got a list of 0"),
    "one tree": ({"adapters": tree(0)}, "a list of one or more trees, got a dict"),
    "a weight too few": ({"weights": [1.0]}, "2 adapters, 1 weights, specs: 2"),
    "a spec too many": ({"specs": [spec_of()] * 3}, "2 adapters, 2 weights, specs: 3"),
    "specs of no kind": ({"specs": 1}, "specs: a int"),
    "infinity": ({"weights": [1.0, np.inf]}, r"list of finite numbers.*\[1.0, inf\]"),
    "a word": ({"weights": [1.0, "two"]}, "list of finite numbers"),
    "truth": ({"weights": [1.0, True]}, "list of finite numbers"),
    "one weight": ({"weights": 1.0}, "list of finite numbers, .* got 1.0"),
    "no spec": ({"specs": {"y/lora": DENSE}}, r"adapters\[0\] has no spec for 'x/lora'. Close"),
    "plain specs": ({"specs": {"x/lora": {}}}, r"of adapters\[0\] they are .*from_dict"),
    "a leaf": ({"adapters": [tree(0), 1.0]}, r"adapters\[1\] is a float, no tree"),
    "empty": ({"adapters": [tree(0), {}]}, r"adapters\[1\] holds no adapter"),
    "trained copies": (
        {"adapters": [tree(0), {**tree(1), "norm": {"scale": jnp.ones(3)}}]},
        r"adapters\[1\] holds 1 parameters that are no adapters, such as \['norm/scale'\]"
        ".*modules_to_save.*split_params",
    ),
    "no density": ({"combination_type": "ties", "density": None}, "'ties' keeps .* give `density`"),
    "a density of 0": ({"density": 0.0}, r"density, in \(0, 1\] or None, got 0.0"),
    "a density of 2": ({"density": 2}, r"density, in \(0, 1\] or None, got 2"),
    "a quantile": ({"svd_clamp": 1.5}, r"svd_clamp, a quantile in \(0, 1\] or None, got 1.5"),
    "no rank": ({"svd_rank": 0}, "svd_rank, a positive integer or None, got 0"),
    "half a rank": ({"svd_rank": 1.5}, "svd_rank, a positive integer or None, got 1.5"),
    "a vote": ({"majority_sign_method": "most"}, "majority_sign_method, one of .*, got 'most'"),
    "no key": ({"combination_type": "dare_ties", "key": None}, "'dare_ties' draws .* got None"),
    "a seed": ({"combination_type": "dare_linear", "key": 3}, "needs `key`, one key .*; got 3"),
    "ranks": (
        {"adapters": [tree(0), tree(1, 3)], "specs": [spec_of(), spec_of(3)]},
        r"'linear' .* adapters\[1\], 'x/lora' have the ranks \[2, 3\]. Use 'svd' or 'cat'",
    ),
    "ranks of ties": (
        {
            "adapters": [tree(0), tree(1, 3)],
            "specs": [spec_of(), spec_of(3)],
            "combination_type": "ties",
        },
        "Use 'ties_svd' or 'cat'",
    ),
    "a rank the spec does not say": ({"specs": spec_of(3)}, r"adapters\[0\], 'x/lora' has the sha"),
    "axes the spec does not say": (
        {"specs": {"x/lora": LoraSpec("w", "ir,rnh->inh", 2)}},
        "which do not fit its spec: equation 'ir,rnh->inh'",
    ),
    "DoRA": (
        {
            "adapters": [{"x": {"lora": {**LEAVES, "magnitude": jnp.ones(5)}}}] * 2,
            "specs": {"x/lora": dataclasses.replace(DENSE, variant="dora")},
        },
        r"adapters\[0\], 'x/lora' is one of DoRA.*not linear.*unfuse_params",
    ),
    "a magnitude": (
        {"adapters": [{"x": {"lora": {**LEAVES, "magnitude": jnp.ones(5)}}}] * 2},
        r"holds \{.*magnitude.*needs floating-point arrays \['a', 'b'\]",
    ),
    "no bias": (
        {"specs": {"x/lora": dataclasses.replace(DENSE, bias="bias")}},
        r"needs floating-point arrays \['a', 'b', 'bias'\]",
    ),
    "a bias of another length": (
        {
            "adapters": [{"x": {"lora": {**LEAVES, "bias": jnp.ones(4)}}}] * 2,
            "specs": {"x/lora": dataclasses.replace(DENSE, bias="bias")},
        },
        r"'bias': \(4,\).*do not fit",
    ),
    "integers": (
        {"adapters": [jax.tree.map(lambda x: x.astype(jnp.int32), tree(0))] * 2},
        "'a': 'int32'.*needs floating-point arrays",
    ),
    "shapes": (
        {"adapters": [jax.eval_shape(lambda: tree(0))] * 2},
        "a of .* is ShapeDtypeStruct, no array",
    ),
    "rows": (
        {
            "adapters": [{"x": {"lora_tokens": {"rows": jnp.ones((2, 5))}}}] * 2,
            "specs": {
                "x/lora_tokens": LoraSpec(
                    "embedding", "vr,rf->vf", 2, variant="tokens", tokens=(1, 2)
                )
            },
        },
        "'x/lora_tokens' holds rows that stand in place .* fuse one adapter's rows",
    ),
    "another model": (
        {"adapters": [tree(0), tree(1, inputs=4)]},
        "are of different models: the lengths of the weight",
    ),
    "another equation": (
        {"specs": [spec_of(), {"x/lora": dataclasses.replace(DENSE, equation="ir,rp->ip")}]},
        "the equation of the weight are ir,ro->io and ir,rp->ip",
    ),
    "two of one weight": (
        {
            "adapters": [{"x": {"lora": LEAVES, "lora.french": LEAVES}}, tree(1)],
            "specs": {"x/lora": DENSE, "x/lora.french": DENSE},
        },
        r"'x/lora' and 'x/lora.french' of adapters\[0\] change one weight",
    ),
    "two biases": (
        {
            "adapters": [{"x": {"lora": {**LEAVES, "bias": jnp.ones(5)}}}] * 2,
            "specs": [{"x/lora": dataclasses.replace(DENSE, bias=name)} for name in ("b", "c")],
        },
        r"join different parameters, \['b', 'c'\]",
    ),
    "another tree": (
        {
            "adapters": [{"x": [tree(0)]}, {"x": [tree(0)] * 2}],
            "specs": {f"x/{i}/x/lora": DENSE for i in range(2)},
        },
        "'x' is a list of 1 in one adapter and a list of 2",
    ),
}


@pytest.mark.parametrize(("arguments", "error"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused(arguments, error):
    good = {
        "adapters": [tree(0), tree(1)],
        "weights": [1.0, 2.0],
        "specs": [spec_of(), spec_of()],
        "combination_type": "linear",
        "density": 0.5,
    }
    add_weighted_adapter(**good)
    with pytest.raises(ValueError, match=f"(?s){error}"):
        add_weighted_adapter(**{**good, **arguments})

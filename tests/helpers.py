"""What several test files share: arrays, and the properties that every adapted model has."""

import contextlib
import dataclasses
from typing import Any, NamedTuple

import chex
import jax
import jax.extend.random
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import traverse_util
from flax.core import meta

import peft_jax as peft
from peft_jax import quantsim

RANK = 2
WRAPPERS = {
    nn.Dense: peft.LoRADense,
    nn.Einsum: peft.LoRAEinsum,
    nn.DenseGeneral: peft.LoRADenseGeneral,
    nn.Conv: peft.LoRAConv,
    nn.ConvTranspose: peft.LoRAConv,
    nn.Embed: peft.LoRAEmbed,
}
STORING = {
    nn.Dense: peft.Int4Dense,
    nn.Einsum: peft.Int4Einsum,
    nn.DenseGeneral: peft.Int4DenseGeneral,
    nn.Conv: peft.Int4Conv,
    nn.ConvTranspose: peft.Int4Conv,
    nn.Embed: peft.Int4Embed,
}
SIMULATING = {
    nn.Dense: peft.SimulateQuantizedDense,
    nn.Einsum: peft.SimulateQuantizedEinsum,
    nn.DenseGeneral: peft.SimulateQuantizedDenseGeneral,
    nn.Conv: peft.SimulateQuantizedConv,
    nn.ConvTranspose: peft.SimulateQuantizedConv,
    nn.Embed: peft.SimulateQuantizedEmbed,
}


@dataclasses.dataclass(frozen=True)
class Adapt:
    """A rule that adapts the layers of the given types, each by the wrapper made for it."""

    types: tuple[type[nn.Module], ...] = tuple(WRAPPERS)
    rank: int = RANK
    alpha: float | None = None
    dropout: float = 0.0

    def __call__(self, module):
        if type(module) not in self.types:
            return module
        wrapper = WRAPPERS[type(module)]
        return wrapper(rank=self.rank, alpha=self.alpha, dropout=self.dropout, wrapped=module)


@dataclasses.dataclass(frozen=True)
class AdaptWeights:
    """A rule that adapts modules of the given types at their weights."""

    types: tuple[type[nn.Module], ...]
    params: tuple[str, ...] | None = None
    rank: int = RANK
    alpha: float | None = None

    def __call__(self, module):
        if type(module) not in self.types:
            return module
        return peft.LoRAWeight(rank=self.rank, alpha=self.alpha, params=self.params, wrapped=module)


def partly_slow(cases, quick, **options):
    """Cases as parameters: `make test` runs those in ``quick``, `make test-slow` the others.

    Args:
      cases: a list of values; or a dict of them by the name of each, in which ``quick`` has names.
      quick: a container of cases, or a function from a case to whether it is quick.
      **options: of ``pytest.param``.
    """
    is_quick = quick if callable(quick) else lambda case: case in quick
    named = cases.items() if isinstance(cases, dict) else [(case, case) for case in cases]
    ids = (lambda name: {"id": name}) if isinstance(cases, dict) else lambda name: {}
    return [
        pytest.param(
            *(value if isinstance(value, tuple) else (value,)),
            marks=() if is_quick(name) else pytest.mark.slow,
            **ids(name),
            **options,
        )
        for name, value in named
    ]


def numbers(*shape, seed=0):
    """An array of normal numbers in float32."""
    draw = np.random.default_rng((*shape, seed)).normal(size=shape)
    return jnp.asarray(draw, jnp.float32)


def shapes(tree):
    return jax.tree.map(jnp.shape, tree)


def intercepting(rule):
    """The context in which a rule is active; none for None."""
    return contextlib.nullcontext() if rule is None else peft.ModuleInterceptor(rule)


def hashed(x):
    """A bijection of uint32 that scatters (constants of Wellons' hash prospector)."""
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))


def counted(key, shape):
    """A number for each place, which depends on the key."""
    steps = jax.lax.iota(jnp.uint32, int(np.prod(shape))) * np.uint32(0x9E3779B9)
    return hashed(hashed(steps + key) ^ key).reshape(shape)


# Keys of JAX take a quarter of a second to compile wherever a layer is initialised, for sequences
# that parallel devices need; the tests need numbers without a pattern.
HASHED = jax.extend.random.define_prng_impl(
    key_shape=(1,),
    seed=lambda seed: hashed(jnp.asarray(seed).astype(jnp.uint32).reshape(1)),
    split=lambda key, shape: counted(key, (*shape, 1)),
    random_bits=lambda key, width, shape: counted(key, shape).astype(f"uint{width}"),
    fold_in=lambda key, data: hashed(key ^ hashed(jnp.asarray(data).astype(jnp.uint32) + 1)),
    name="hashed",
    tag="hash",
)


def key_of(seed):
    """A key whose numbers take little code, so that programs compile faster."""
    return jax.random.key(seed, impl=HASHED)


def scattered(size, seed):
    """Numbers between -1 and 1 without a pattern; a program needs no random numbers for them."""
    return np.sin(np.arange(1, size + 1, dtype=np.float32) * np.float32(1.7 + 0.1 * seed) + seed)


def encodings_by_path(tree):
    """The encodings in a tree, by slashed path."""
    leaves = jax.tree.leaves_with_path(tree, is_leaf=lambda x: isinstance(x, quantsim.Encoding))
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def nested_encodings(flat):
    """A tree of what `encodings_by_path` gives."""
    return traverse_util.unflatten_dict(flat, sep="/")


def randomised(lora, seed=0):
    """Adapters of the same shapes and dtypes, with scattered numbers in ``a`` and ``b``."""
    leaves, tree = jax.tree.flatten(lora)
    drawn = [
        jnp.asarray(scattered(leaf.size, seed + i).reshape(leaf.shape), leaf.dtype)
        for i, leaf in enumerate(leaves)
    ]
    return jax.tree.unflatten(tree, drawn)


def rounding(terms, dtype=jnp.float32):
    """How far two sums of so many products may lie apart, as a part of the largest sum.

    Rounding a partial sum of ``k`` terms of random sign errs by ``eps / sqrt(12)`` of its size,
    which is that of ``sqrt(k)`` terms; over ``n`` additions, one after the other, that makes an
    error of ``eps * sqrt(n / 24)`` of the sum. Five times as much, for the worst of many sums, is
    ``eps * sqrt(n)``; both sides have one, whatever their order. The products, and factors applied
    before or after the sum, have ``4 * eps``.
    """
    return float(jnp.finfo(dtype).eps) * (2 * np.sqrt(terms) + 4)


def assert_rounded(actual, expected, terms):
    """Arrays computed in float32 are the expected ones, up to sums of so many products."""
    bound = rounding(terms) * np.max(np.abs(expected), initial=0)
    np.testing.assert_allclose(np.asarray(actual, np.float64), expected, rtol=0, atol=bound)


def assert_close(actual, expected, tolerance=1e-5):
    """Each array differs by at most ``tolerance`` of the largest number expected in it."""
    chex.assert_trees_all_equal_shapes_and_dtypes(actual, expected)

    def compare(path, actual, expected):
        actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
        assert np.all(np.isfinite(actual)), f"not finite at {jax.tree_util.keystr(path)}"
        error = np.max(np.abs(actual - expected), initial=0)
        scale = np.max(np.abs(expected), initial=1e-30)
        assert error <= tolerance * scale, (
            f"{jax.tree_util.keystr(path)}: off by {error} where the largest number is {scale}"
        )

    jax.tree_util.tree_map_with_path(compare, actual, expected)


def loss_of(outputs):
    """A number to which every place of every output contributes with a factor of its own."""

    def weigh(output):
        factors = jnp.asarray(scattered(output.size, 0.5).reshape(output.shape))
        return jnp.sum(output.astype(jnp.float32) * factors)

    return sum(weigh(leaf) for leaf in jax.tree.leaves(outputs))


def initialise(model, *inputs, rule=None, seed=0, **kwargs):
    """The variables of a model; compiled, so that its outputs are not computed."""
    with intercepting(rule):
        return jax.jit(lambda: model.init(key_of(seed), *inputs, **kwargs))()


def adapter_leaves(specs, lora):
    """The arrays of each adapter, by its slashed path."""

    def at(path):
        branch = lora
        for part in path.split("/"):
            branch = branch[part]
        return meta.unbox(branch)

    return {path: at(path) for path in specs}


def expected_kernel(kernel, adapter, equation, scaling=1.0):
    """``W + scaling * a·b``, computed by numpy in float64."""
    kernel, a, b = (np.asarray(array, np.float64) for array in (kernel, adapter["a"], adapter["b"]))
    return kernel + scaling * np.einsum(equation, a, b)


class Adapted(NamedTuple):
    """What `check_adapts` found: initial parameters, specs, and what came of random adapters."""

    params: Any
    specs: dict[str, peft.LoraSpec]
    random: Any
    fused: Any
    output: Any


def check_adapts(
    model,
    rule,
    *inputs,
    plain=None,
    rngs=None,
    method=None,
    compare_gradients=True,
    compare_start=chex.assert_trees_all_equal,
    **kwargs,
):
    """Checks what must hold for every adapted model, in one compiled program.

    The base starts as in the plain model, and so does the output. With random adapters, output and
    gradients are those of the plain model on fused weights, and every array of every adapter has a
    gradient.

    Args:
      model: the model; ``rule`` adapts it, or None where it is written with adapters.
      rule: from modules to modules.
      *inputs: arrays, or anything else that is passed as it is.
      plain: the model without adapters, where ``model`` is written with them.
      rngs: of each call, besides that of the parameters.
      method: the method to run.
      compare_gradients: whether gradients are compared with those through the fused weights.
      compare_start: compares the output at the start with that of the plain model.
      **kwargs: passed as they are.
    """
    plain = model if plain is None else plain
    is_array = [isinstance(value, jax.Array) for value in inputs]
    arrays = [value for value, array in zip(inputs, is_array, strict=True) if array]
    rngs = {} if rngs is None else rngs
    with intercepting(rule):
        specs = peft.lora_specs(
            model, *inputs, method=method, rngs={"params": key_of(0), **rngs}, **kwargs
        )
    assert specs, "nothing was adapted"

    def everything(key, arrays):
        given = iter(arrays)
        args = [
            next(given) if array else value for value, array in zip(inputs, is_array, strict=True)
        ]

        def init(model):
            return dict(model.init({"params": key, **rngs}, *args, method=method, **kwargs))

        def run(model, params):
            return model.apply(
                {**others, "params": params}, *args, method=method, rngs=rngs, **kwargs
            )

        others = init(plain)
        base = others.pop("params")
        before = run(plain, base)
        with intercepting(rule):
            params = init(model)["params"]
            start = run(model, params)
        kept, lora = peft.split_params(params)
        random = randomised(lora)

        def adapted(lora):
            with intercepting(rule):
                output = run(model, peft.merge_params(kept, lora))
            return loss_of(output), output

        def on_fused(lora):
            fused = peft.fuse_params(peft.merge_params(kept, lora), specs=specs)
            output = run(plain, fused)
            return loss_of(output), (output, fused)

        (_, output), gradient = jax.value_and_grad(adapted, has_aux=True)(random)
        if compare_gradients:
            through_fusion = jax.value_and_grad(on_fused, has_aux=True)
            (_, (expected, fused)), fused_gradient = through_fusion(random)
        else:
            (_, (expected, fused)), fused_gradient = on_fused(random), None
        return (
            Adapted(params, {}, random, fused, output),
            (base, kept, before, start),
            (gradient, expected, fused_gradient),
        )

    found, (base, kept, before, start), (gradient, expected, fused_gradient) = jax.jit(everything)(
        key_of(0), arrays
    )
    chex.assert_trees_all_equal(base, kept)
    compare_start(before, start)
    for path, leaf in jax.tree.leaves_with_path(gradient):
        assert np.any(np.asarray(leaf) != 0), f"no gradient at {jax.tree_util.keystr(path)}"
    assert_close(found.output, expected)
    if compare_gradients:
        assert_close(gradient, fused_gradient)
    assert jax.tree.structure(found.fused) == jax.tree.structure(base)
    for path, arrays_of in adapter_leaves(specs, found.random).items():
        assert set(arrays_of) == {"a", "b"}, path
    return found._replace(specs=specs)

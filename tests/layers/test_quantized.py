"""Layers whose weight is stored in few bits, or trained as if it were."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import chex
import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from helpers import (
    SIMULATING,
    STORING,
    Adapt,
    AdaptWeights,
    assert_close,
    intercepting,
    key_of,
    loss_of,
    numbers,
    partly_slow,
    randomised,
)

import peft_jax as peft
from peft_jax import QuantizationMethod, StoredValues

METHODS = ("int4", "int8", "q4_0", "q4_0_transpose", "sfp8", "nf4")
every_method = pytest.mark.parametrize("method", METHODS)
some_methods = pytest.mark.parametrize("method", partly_slow(METHODS, ("int4", "q4_0_transpose")))


@dataclasses.dataclass(frozen=True)
class Wrap:
    """A rule that wraps the layers of the given types by the wrappers of a table."""

    method: str = "int4"
    types: tuple[type[nn.Module], ...] = tuple(STORING)
    simulating: bool = False

    def __call__(self, module):
        if type(module) not in self.types:
            return module
        wrapper = (SIMULATING if self.simulating else STORING)[type(module)]
        return wrapper(wrapped=module, method=self.method)


Simulate = functools.partial(Wrap, simulating=True)


# --- One layer of each kind ----------------------------------------------------------------------

LAYERS = {
    "dense": lambda: nn.Dense(32, name="dense"),
    "einsum": lambda: nn.Einsum((2, 64, 32), "btnh,nhd->btd", name="einsum"),
    "general": lambda: nn.DenseGeneral(32, axis=(-2, -1), name="general"),
    "conv": lambda: nn.Conv(32, (3,), name="conv"),
    "embed": lambda: nn.Embed(64, 32, name="embed"),
}
MASK = np.tril(np.ones((2, 64, 32), np.float32))
X = numbers(1, 3, 2, 64)
IDS = np.asarray([[0, 3, 63], [31, 32, 0]])


class Layers(nn.Module):
    """One layer of each kind, on the same input; ``wrap`` goes around each."""

    wrap: Callable[[nn.Module], nn.Module] = lambda layer: layer

    @nn.compact
    def __call__(self, x):
        def layer(name):
            return self.wrap(LAYERS[name]())

        embed = layer("embed")
        return {
            "dense": layer("dense")(x),
            "einsum": layer("einsum")(x),
            "general": layer("general")(x),
            "conv": layer("conv")(x),
            "embed": embed(jnp.asarray(IDS)),
            "attend": embed.attend(x[..., :32]),
        }


class Step(nn.Module):
    """`Layers` as the body of a scan."""

    wrap: Callable[[nn.Module], nn.Module] = lambda layer: layer

    @nn.compact
    def __call__(self, carry, x):
        return carry, Layers(self.wrap, name="layers")(x)


class Scanned(nn.Module):
    """`Layers` twice, stacked along an axis."""

    axis: int = 0

    @nn.compact
    def __call__(self, x):
        scan = nn.scan(
            Step,
            variable_axes={"params": self.axis},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=2,
        )
        return scan(name="steps")(None, x)[1]


@dataclasses.dataclass(frozen=True, eq=False)
class Given:
    """A model, its arguments, numbers for its parameters, and what the library knows of them."""

    model: nn.Module
    inputs: tuple[Any, ...]
    method: Any
    params: Any
    specs: Any
    lora: Any

    def run(self, params, inputs=None, **kwargs):
        inputs = self.inputs if inputs is None else inputs
        return self.model.apply({"params": params}, *inputs, method=self.method, **kwargs)

    def quantized(self, method):
        """The parameters, stored, and what the stored ones stand for, in the same dtype."""
        return stored_and_back(self, method)


@functools.cache
def stored_and_back(case, method):
    kernels = flax.traverse_util.flatten_dict(case.params, sep="/")
    dtype = next(kernels[path].dtype for path in case.specs)

    @jax.jit
    def run(params):
        stored = peft.quantize_checkpoint(params, method=method, specs=case.specs)
        return stored, peft.dequantize_checkpoint(stored, dtype=dtype)

    return run(case.params)


def drawn(tree):
    """Numbers for every array of a tree of shapes; two layers of one shape get others."""
    leaves, structure = jax.tree.flatten(tree)
    arrays = [numbers(*leaf.shape, seed=i).astype(leaf.dtype) for i, leaf in enumerate(leaves)]
    return jax.tree.unflatten(structure, arrays)


ADAPT = Adapt()


def given(model, *inputs, method=None, adapt=ADAPT):
    """What the tests need of a model, found without running it."""

    def init():
        return model.init(key_of(0), *inputs, method=method)["params"]

    params = drawn(jax.eval_shape(init))
    lora = {}
    if adapt is not None:
        with intercepting(adapt):
            lora = randomised(peft.split_params(jax.eval_shape(init)).lora)
    specs = peft.layer_specs(model, *inputs, method=method)
    return Given(model, inputs, method, params, specs, lora)


@functools.cache
def given_layers(scanned):
    return given(Scanned() if scanned else Layers(), X)


def everything(case, rule, adapt, params, lora, inputs):
    """Outputs under adapters, and the gradients of the adapters and of the inputs."""
    floats = [i for i, x in enumerate(inputs) if jnp.issubdtype(x.dtype, jnp.floating)]

    def loss(lora, given):
        given = dict(zip(floats, given, strict=True))
        args = [given.get(i, x) for i, x in enumerate(inputs)]
        with intercepting(rule), intercepting(adapt):
            output = case.run(peft.merge_params(params, lora), args)
        return loss_of(output), output

    gradient = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    (_, output), (dlora, dinputs) = gradient(lora, [inputs[i] for i in floats])
    return {"output": output, "lora": dlora, "inputs": dinputs}


@functools.cache
def reference(case, adapt):
    """`everything` of the plain model; one program for all methods."""
    return jax.jit(functools.partial(everything, case, None, adapt))


def check_stored(case, method, *, adapt=ADAPT, run=jax.jit, tolerance=1e-5, rule=None):
    """The model on stored values is the plain one on what they stand for."""
    stored, dequantized = case.quantized(method)
    rule = Wrap(method) if rule is None else rule
    found = run(functools.partial(everything, case, rule, adapt))(stored, case.lora, case.inputs)
    expected = reference(case, adapt)(dequantized, case.lora, case.inputs)
    assert_close(found, expected, tolerance)
    empty = any(x.size == 0 for x in case.inputs)
    for path, leaf in () if empty else jax.tree.leaves_with_path(found["lora"]):
        assert np.any(np.asarray(leaf) != 0), f"no gradient at {jax.tree_util.keystr(path)}"
    return found


@pytest.mark.parametrize(
    ("method", "how"),
    partly_slow(
        [(method, how) for method in METHODS for how in ("jit", "scan")],
        lambda pair: METHODS.index(pair[0]) % 2 == (pair[1] == "scan"),
    ),
)
def test_every_method_and_layer(method, how):
    check_stored(given_layers(how == "scan"), method)


@pytest.mark.parametrize("method", ["int4", pytest.param("sfp8", marks=pytest.mark.slow)])
def test_outside_of_jit(method):
    """Operation by operation, in the first of which the product is one program."""
    case = given_layers(False)
    stored, dequantized = case.quantized(method)
    expected = jax.jit(case.run)(dequantized)
    with peft.ModuleInterceptor(Wrap(method)):
        assert_close(case.run(stored), expected)


@some_methods
def test_gradients_outside_of_jit(method):
    check_stored(given_dense(), method, run=lambda function: function)


@functools.cache
def given_dense():
    return given(nn.Dense(32), numbers(3, 64))


@pytest.mark.optimized
def test_at_full_optimization():
    """XLA's own level, at which users compile, and where it merges and contracts."""
    check_stored(given_layers(False), "nf4")


@pytest.mark.parametrize("method", partly_slow(["int4", "q4_0", "sfp8"], ["q4_0"]))
def test_a_wrapper_by_hand_is_the_interceptors(method):
    """In a model's code, with adapters outside and inside of the stored weight."""
    case = given_layers(False)
    stored, _ = case.quantized(method)
    params = peft.merge_params(stored, case.lora)
    store, adapt = Wrap(method), Adapt()

    @jax.jit
    def run(params):
        with peft.ModuleInterceptor(store), peft.ModuleInterceptor(adapt):
            inside = case.run(params)
        with peft.ModuleInterceptor(adapt), peft.ModuleInterceptor(store):
            outside = case.run(params)
        with peft.ModuleInterceptor(adapt):
            mixed = Layers(store).apply({"params": params}, X)
        hands = [
            Layers(wrap).apply({"params": params}, X)
            for wrap in (Chain((store, adapt)), Chain((adapt, store)))
        ]
        return inside, [outside, mixed, *hands]

    expected, others = run(params)
    for found in others:
        chex.assert_trees_all_equal(found, expected)


@dataclasses.dataclass(frozen=True)
class Chain:
    """One rule after the other."""

    rules: tuple[Callable[[nn.Module], nn.Module], ...]

    def __call__(self, module):
        wrapper = [rule(module) for rule in self.rules]
        inner, outer = (type(wrapped) for wrapped in wrapper)
        fields = [
            {
                field.name: getattr(wrapped, field.name)
                for field in dataclasses.fields(wrapped)
                if field.name not in ("wrapped", "parent", "name")
            }
            for wrapped in wrapper
        ]
        return outer(wrapped=inner(wrapped=module, **fields[0]), **fields[1])


# --- Initialization ------------------------------------------------------------------------------


class Biased(nn.Module):
    """Layers with parameters beside their kernels."""

    wrap: Callable[[nn.Module], nn.Module] = lambda layer: layer

    @nn.compact
    def __call__(self, x):
        noise = nn.initializers.normal()
        dense = nn.Dense(32, bias_init=noise)
        einsum = nn.Einsum((2, 64, 32), "btnh,nhd->btd", bias_init=noise)
        general = nn.DenseGeneral(32, axis=(-2, -1), bias_init=noise)
        conv = nn.Conv(32, (3,), bias_init=noise)
        layers = [self.wrap(layer)(x) for layer in (dense, einsum, general, conv)]
        return layers, self.wrap(nn.Embed(64, 32))(jnp.asarray(IDS))


@some_methods
def test_init_stores_what_the_layer_draws(method):
    """Bits and scales are those of `quantize_checkpoint`; all other numbers are the layer's own."""
    rule, specs = Wrap(method), peft.layer_specs(Biased(), X)

    @jax.jit
    def init(key):
        plain = Biased().init(key, X)["params"]
        with peft.ModuleInterceptor(rule):
            found = Biased().init(key, X)["params"]
        return found, peft.quantize_checkpoint(plain, method=method, specs=specs)

    found, expected = init(key_of(0))
    chex.assert_trees_all_equal(found, expected)
    assert isinstance(found["Dense_0"]["kernel"], StoredValues)
    assert np.any(np.asarray(found["Dense_0"]["bias"]) != 0)


def test_init_under_adapters():
    """Adapters start as on the float base, and the output is the one of the stored values."""
    case, rule = given_layers(False), Wrap()

    @jax.jit
    def init(key):
        with peft.ModuleInterceptor(Adapt()):
            plain = peft.split_params(Layers().init(key, X)["params"])
            with peft.ModuleInterceptor(rule):
                output, variables = Layers().init_with_output(key, X)
                return plain, output, variables["params"], case.run(variables["params"])

    (base, lora), output, params, again = init(key_of(0))
    stored = peft.quantize_checkpoint(base, method="int4", specs=case.specs)
    chex.assert_trees_all_equal(tuple(peft.split_params(params)), (stored, lora))
    assert_close(output, again)


@pytest.mark.parametrize("box", [nn.with_partitioning, nn.with_logical_partitioning])
@some_methods
def test_partitioning_carries_over(method, box):
    """The scale is spread as the kernel is, but for axes along which numbers share one."""
    layer = nn.Dense(64, kernel_init=box(nn.initializers.lecun_normal(), ("in", "out")))
    x = numbers(3, 128)
    with peft.ModuleInterceptor(Wrap(method)):
        params = jax.jit(lambda: layer.init(key_of(0), x))()["params"]
        y = jax.jit(layer.apply)({"params": params}, x)
        unboxed = layer.apply({"params": nn.unbox(params)}, x)
    kernel, scale = params["kernel"], params["scale"]
    assert type(kernel) is type(scale)
    assert kernel.names == ("in", "out")
    assert isinstance(kernel.value, StoredValues)
    pairs = zip(scale.value.shape, kernel.value.shape, ("in", "out"), strict=True)
    assert scale.names == tuple(name if m == n else None for m, n, name in pairs)
    specs = nn.get_partition_spec(params)
    assert jax.tree.leaves(specs["kernel"]) == [jax.sharding.PartitionSpec("in", "out")]
    dequantized = peft.dequantize_checkpoint(nn.unbox(params))
    assert_close(y, layer.apply({"params": dequantized}, x))
    assert_close(unboxed, y)


# --- The layer's forward stays its own -----------------------------------------------------------


def attention():
    return nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=16, out_features=12)


BF16, F16 = jnp.bfloat16, jnp.float16
FORWARDS = {
    "no bias": (nn.Dense(6, use_bias=False), numbers(3, 8)),
    "a vector": (nn.Dense(6), numbers(8)),
    "one row": (nn.Dense(6), numbers(1, 8)),
    "no rows": (nn.Dense(6), numbers(0, 8)),
    "one feature": (nn.Dense(1), numbers(3, 1)),
    "odd sizes": (nn.Dense(5), numbers(3, 7)),
    "precision": (nn.Dense(6, precision="highest"), numbers(3, 8)),
    "attention": (attention(), numbers(2, 3, 8)),
    "heads out": (nn.DenseGeneral((2, 5)), numbers(3, 8)),
    "batch axes": (nn.DenseGeneral(5, axis=-1, batch_dims=(0,)), numbers(2, 3, 8)),
    "axes around": (nn.DenseGeneral((5, 3), axis=(0, -1)), numbers(2, 3, 4)),
    "einsum, batch axis": (nn.Einsum((3, 8, 5), "bnd,ndh->bnh"), numbers(2, 3, 8)),
    "einsum, batch axis last": (
        nn.Einsum((4, 5, 3), "bgi,iog->bgo", use_bias=False),
        numbers(2, 3, 4),
    ),
    "einsum, ellipsis": (nn.Einsum((8, 5), "...i,io->...o"), numbers(2, 3, 8)),
    "einsum, spaces": (nn.Einsum((8, 5), " b t i, i o -> b t o "), numbers(2, 3, 8)),
    "einsum, bias in front": (nn.Einsum((2, 8, 5), "btd,cdf->cbtf"), numbers(2, 3, 8)),
    "einsum, ellipsis, bias in front": (nn.Einsum((2, 8, 5), "...d,cdf->c...f"), numbers(2, 3, 8)),
    "einsum, tokens summed": (nn.Einsum((4, 5), "bti,io->bo"), numbers(2, 3, 4)),
    "einsum, kernel alone": (nn.Einsum((4, 5, 3), "bi,iok->bo", use_bias=False), numbers(2, 4)),
    "einsum, a batch axis of one in the kernel": (
        nn.Einsum((1, 4, 5), "bnd,ndh->bnh", use_bias=False),
        numbers(2, 3, 4),
    ),
    "einsum, a batch axis of one in the input": (
        nn.Einsum((3, 4, 5), "bnd,ndh->bnh", use_bias=False),
        numbers(2, 1, 4),
    ),
    "einsum, outer": (nn.Einsum((4, 32), "b,do->bdo", use_bias=False), numbers(3), "q4_0"),
    "einsum, elementwise": (
        nn.Einsum((4, 32), "bij,ij->bij", use_bias=False),
        numbers(3, 4, 32),
        "q4_0",
    ),
    "conv, groups": (nn.Conv(6, (3,), feature_group_count=2), numbers(2, 8, 4)),
    "conv, depthwise": (nn.Conv(8, (3,), feature_group_count=4), numbers(2, 8, 4)),
    "conv, strides, dilation": (
        nn.Conv(6, (3, 2), strides=(2, 1), kernel_dilation=2, padding=((2, 0), 1)),
        numbers(2, 9, 8, 4),
    ),
    "conv, circular": (nn.Conv(6, (4,), padding="CIRCULAR"), numbers(2, 8, 4)),
    "conv, causal": (nn.Conv(6, (4,), padding="CAUSAL"), numbers(2, 8, 4)),
    "conv, precision": (nn.Conv(6, (4,), precision="highest"), numbers(2, 8, 4)),
    "conv, mask": (nn.Conv(6, (2,), mask=MASK[:, :4, :6]), numbers(2, 8, 4)),
    "conv transpose": (nn.ConvTranspose(6, (3,), strides=(2,)), numbers(2, 5, 4)),
    "conv transpose, kernel too": (
        nn.ConvTranspose(6, (3,), strides=(2,), transpose_kernel=True),
        numbers(2, 5, 4),
    ),
    "embed, one row": (nn.Embed(1, 5), jnp.asarray([[0, 0]])),
    "embed, one id": (nn.Embed(7, 5), jnp.asarray(3)),
    "embed, no ids": (nn.Embed(7, 5), jnp.zeros((0, 2), jnp.int32)),
    "embed, bytes": (nn.Embed(300, 5), jnp.asarray([3, 255], jnp.uint8)),
    "bfloat16": (nn.Dense(6, dtype=BF16), numbers(3, 8)),
    "bfloat16 inputs": (nn.Dense(6, dtype=jnp.float32), numbers(3, 8).astype(BF16)),
    "bfloat16 parameters": (nn.Dense(6, dtype=jnp.float32, param_dtype=BF16), numbers(3, 8)),
    "bfloat16 throughout": (nn.Dense(6, dtype=BF16, param_dtype=BF16), numbers(3, 8).astype(BF16)),
    "float16": (nn.Dense(6, dtype=F16, param_dtype=F16), numbers(3, 8)),
    "einsum, bfloat16": (nn.Einsum((8, 5), "bi,io->bo", dtype=BF16), numbers(3, 8)),
    "einsum, bfloat16 to float32": (
        nn.Einsum(
            (8, 5), "bi,io->bo", dtype=BF16, preferred_element_type=jnp.float32, use_bias=False
        ),
        numbers(3, 8),
    ),
    "general, bfloat16": (nn.DenseGeneral((2, 5), dtype=BF16), numbers(3, 8)),
    "conv, bfloat16": (nn.Conv(6, (2,), dtype=BF16), numbers(2, 8, 4)),
    "conv, float16 parameters": (nn.Conv(6, (2,), dtype=F16, param_dtype=F16), numbers(2, 8, 4)),
    "embed, bfloat16": (nn.Embed(7, 5, dtype=BF16), jnp.asarray([3, 1])),
    "embed, float16 parameters": (nn.Embed(7, 5, param_dtype=F16), jnp.asarray([3, 1])),
}
COARSE = {jnp.dtype(BF16): 2e-2, jnp.dtype(F16): 4e-3}


def tolerance_of(*trees):
    """By the coarsest dtype in the trees."""
    found = [COARSE.get(leaf.dtype, 1e-5) for leaf in jax.tree.leaves(trees)]
    return max(found)


@pytest.mark.parametrize("name", partly_slow(list(FORWARDS), list(FORWARDS)[::5]))
def test_forwards(name):
    layer, x, *method = FORWARDS[name]
    case = given(layer, x)
    output = jax.eval_shape(case.run, case.params)
    computed = [] if getattr(layer, "dtype", None) is None else [jnp.zeros((), layer.dtype)]
    check_stored(
        case, *method or ["int4"], tolerance=tolerance_of(case.params, x, output, *computed)
    )


def lookup_and_attend(embed, ids, query):
    return embed(ids), embed.attend(query)


@pytest.mark.parametrize("dtype", [None, BF16])
@every_method
def test_lookups(method, dtype):
    """Ids that are not there give NaN, negative ones count from the end, as in `jnp.take`."""
    embed = nn.Embed(64, 32, dtype=dtype)
    ids = jnp.asarray([0, 31, 32, 63, 64, 1000, -1, -64, -65])
    table = peft.quantize_checkpoint(
        {"embedding": numbers(64, 32)}, method=method, specs=peft.layer_specs(embed, ids)
    )
    with peft.ModuleInterceptor(Wrap(method)):
        found = jax.jit(embed.apply)({"params": table}, ids)
    expected = jax.jit(embed.apply)({"params": peft.dequantize_checkpoint(table)}, ids)
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(np.float32(found), np.float32(expected))


class Tied(nn.Module):
    """Reads the table of an embedding, and calls its layers twice."""

    @nn.compact
    def __call__(self, ids):
        embed, dense = nn.Embed(7, 6, name="embed"), nn.Dense(6, name="dense")
        x = dense(nn.tanh(dense(embed(ids))))
        return x @ embed.embedding.T, embed.attend(x), jnp.take(embed.embedding, ids, axis=0)


def test_models_that_read_the_table_themselves():
    check_stored(given(Tied(), jnp.asarray([[0, 6], [3, 3]])), "int4")


class Seen:
    """A product that notes the weights it was given."""

    def __init__(self, product):
        self.product, self.weights = product, []

    def __call__(self, x, weight, *args, **kwargs):
        self.weights.append(weight)
        return 2 * self.product(x, weight, *args, **kwargs)


DOT, CONV = jax.lax.dot_general, jax.lax.conv_general_dilated
INJECTED = {
    "dense": (lambda seen: nn.Dense(5, dot_general=seen), DOT, (3, 4)),
    "dense, class": (lambda seen: nn.Dense(5, dot_general_cls=lambda: seen), DOT, (3, 4)),
    "general": (lambda seen: nn.DenseGeneral(5, dot_general=seen), DOT, (3, 4)),
    "general, class": (
        lambda seen: nn.DenseGeneral(5, dot_general_cls=lambda: seen),
        DOT,
        (3, 4),
    ),
    "conv": (lambda seen: nn.Conv(5, (2,), conv_general_dilated=seen), CONV, (2, 6, 4)),
    "conv, class": (
        lambda seen: nn.Conv(5, (2,), conv_general_dilated_cls=lambda: seen),
        CONV,
        (2, 6, 4),
    ),
}


@pytest.mark.parametrize("name", INJECTED)
def test_injected_products_see_the_weight(name):
    make, product, shape = INJECTED[name]
    seen, plain = Seen(product), Seen(product)
    case, other = given(make(seen), numbers(*shape), adapt=None), make(plain)
    stored, dequantized = case.quantized("int4")
    with peft.ModuleInterceptor(Wrap()):
        y = case.run(stored)
    expected = other.apply({"params": dequantized}, numbers(*shape))
    np.testing.assert_array_equal(y, expected)
    np.testing.assert_array_equal(seen.weights[-1], plain.weights[-1])
    check_stored(given(make(Seen(product)), numbers(*shape)), "int4")


@pytest.mark.parametrize("kind", ["dense", "einsum", "conv", "embed", "attend"])
def test_injected_promotion_holds(kind):
    calls = []

    def halved(*arrays, dtype=None, inexact=True):
        calls.append(arrays)
        return [None if array is None else array / 2 for array in arrays]

    layers = {
        "dense": (nn.Dense(5, promote_dtype=halved), numbers(3, 4)),
        "einsum": (nn.Einsum((4, 5), "bi,io->bo", promote_dtype=halved), numbers(3, 4)),
        "conv": (nn.Conv(5, (2,), promote_dtype=halved), numbers(2, 6, 4)),
        "embed": (nn.Embed(4, 5, promote_dtype=halved), jnp.asarray([1, 3])),
        "attend": (nn.Embed(5, 4, promote_dtype=halved), numbers(3, 4)),
    }
    layer, x = layers[kind]
    case = given(layer, x, method=nn.Embed.attend if kind == "attend" else None)
    calls.clear()
    check_stored(case, "int4")
    assert calls


class Scaled(nn.Dense):
    """A subclass with a forward of its own."""

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features))
        bias = self.param("bias", self.bias_init, (self.features,))
        return 3 * (x @ kernel) + bias[None]


class Like(nn.Dense):
    """Flax's forward under another name."""


class Inner(nn.Dense):
    """A subclass that changes what goes into Flax's forward."""

    def __call__(self, x):
        return super().__call__(2 * x)


class Custom(nn.Module):
    """A layer that the library is told of."""

    @nn.compact
    def __call__(self, factor, x):
        w = self.param("weights", nn.initializers.normal(), (4, 3, 5))
        return factor[0] * jnp.einsum("bi,ino->bno", x, w)


for _type in (Scaled, Like, Inner):
    peft.register_layer(_type, like=nn.Dense)
peft.register_layer(Custom, param="weights", equation="bi,ino->bno", input="x")


@dataclasses.dataclass(frozen=True)
class WrapIn:
    """A rule of one wrapper for one type."""

    wrapper: type[nn.Module]
    type: type[nn.Module]
    method: str = "int4"

    def __call__(self, module):
        if type(module) is not self.type:
            return module
        return self.wrapper(wrapped=module, method=self.method)


@pytest.mark.parametrize("layer", [Scaled(5), Like(5), Inner(5)], ids=lambda layer: type(layer))
def test_subclasses_keep_their_forward(layer):
    case = given(layer, numbers(3, 4))
    check_stored(case, "int4", adapt=None, rule=WrapIn(peft.Int4Dense, type(layer)))


@pytest.mark.parametrize("wrapper", [peft.Int4Einsum, peft.Int4Dense])
def test_registered_layers(wrapper):
    case = given(Custom(), numbers(1), numbers(3, 4))
    check_stored(case, "int4", adapt=None, rule=WrapIn(wrapper, Custom))


@pytest.mark.parametrize("method", ["q4_0_transpose", "sfp8"])
def test_adapters_at_the_weight(method):
    """`LoRAWeight` adds to the weight that the stored values stand for."""
    adapt = AdaptWeights(tuple(STORING))
    check_stored(given(Layers(), X, adapt=adapt), method, adapt=adapt)


def test_adapters_at_the_weights_of_a_whole_model():
    adapt = AdaptWeights((Layers,))
    check_stored(given(Layers(), X, adapt=adapt), "int4", adapt=adapt)


# --- Lifted transforms, shared layers, trees -----------------------------------------------------


class Lifted(nn.Module):
    """`Layers` under transforms of Flax."""

    @nn.compact
    def __call__(self, x):
        return {
            "remat": nn.remat(Layers)(name="remat")(x),
            "jit": nn.jit(Layers)(name="jit")(x),
            "each": nn.remat(nn.Dense)(32, name="each")(x),
        }


class Mapped(nn.Module):
    """A layer for each index, and one for all."""

    shared: bool

    @nn.compact
    def __call__(self, x):
        mapped = nn.vmap(
            Layers,
            variable_axes={"params": None if self.shared else 0},
            split_rngs={"params": not self.shared},
            axis_size=2,
        )
        return mapped(name="mapped")(x)


LIFTED = {
    "remat, jit": (Lifted(), X),
    "vmap": (Mapped(False), jnp.stack([X, 2 * X])),
    "vmap, shared": (Mapped(True), jnp.stack([X, 2 * X])),
    "scan along axis 1": (Scanned(1), X),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "method"), [*((name, "int4") for name in LIFTED), ("scan along axis 1", "q4_0")]
)
def test_lifted_layers(name, method):
    model, x = LIFTED[name]
    check_stored(given(model, x), method)


@pytest.mark.slow
@pytest.mark.parametrize(("axis", "method"), [(0, "int4"), (1, "nf4")])
def test_init_in_a_scan_stores_each_layer(method, axis):
    """What the body stores, stacked by the scan, is what the model reads."""
    model = Scanned(axis)

    @jax.jit
    def init(key):
        plain = model.init(key, X)["params"]
        with peft.ModuleInterceptor(Wrap(method)):
            return plain, model.apply(model.init(key, X), X)

    plain, y = init(key_of(0))
    expected = peft.quantize_checkpoint(plain, method=method, specs=peft.layer_specs(model, X))
    dequantized = peft.dequantize_checkpoint(expected)
    assert_close(y, jax.jit(model.apply)({"params": dequantized}, X))


@pytest.mark.parametrize("freeze", [lambda tree: tree, flax.core.freeze], ids=["dict", "frozen"])
def test_values_read_back_as_plain_dicts(freeze):
    """As a checkpoint gives them that is restored without a target."""
    case = given_layers(False)
    stored, _ = case.quantized("int4")
    plain = jax.tree.map(
        lambda leaf: {str(leaf.layout): leaf.array} if isinstance(leaf, StoredValues) else leaf,
        stored,
        is_leaf=lambda leaf: isinstance(leaf, StoredValues),
    )

    @jax.jit
    def run(params, stored):
        with peft.ModuleInterceptor(Wrap()):
            return case.run(params), case.run(stored)

    chex.assert_trees_all_equal(*run(freeze(plain), stored))


# --- Transforms of JAX ---------------------------------------------------------------------------


def applied(case, rule, params, x):
    with intercepting(rule), intercepting(Adapt()):
        return case.run(peft.merge_params(params, case.lora), (x,))


def tree_tanh(tree):
    return jax.tree.map(jnp.tanh, tree)


def batched(run, params, x):
    return jax.vmap(functools.partial(run, params))(jnp.stack([x, 2 * x, x - 1]))


def stacked(run, params, x):
    pair = jax.tree.map(lambda leaf: jnp.stack([leaf, jnp.roll(leaf, 1, 0)]), params)
    return jax.vmap(run)(pair, jnp.stack([x, 2 * x])), jax.vmap(run, in_axes=(0, None))(pair, x)


def stacked_gradient(run, params, x):
    pair = jax.tree.map(lambda leaf: jnp.stack([leaf, jnp.roll(leaf, 1, 0)]), params)
    gradient = jax.grad(lambda x, params: loss_of(tree_tanh(run(params, x))))
    return jax.vmap(gradient, in_axes=(None, 0))(x, pair), jax.vmap(gradient)(
        jnp.stack([x, 2 * x]), pair
    )


def forward(run, params, x):
    return jax.jvp(functools.partial(run, params), (x,), (jnp.cos(x),))


def hessian(run, params, x):
    gradient = jax.grad(lambda x: loss_of(tree_tanh(run(params, x))))
    return jax.grad(lambda x: jnp.vdot(gradient(x), jnp.cos(x)))(x)


def jacobian(run, params, x):
    direction = jnp.cos(x)
    return jax.jacfwd(lambda t: tree_tanh(run(params, x + t * direction)))(jnp.float32(0.3))


def checkpointed(run, params, x):
    run = jax.checkpoint(run)
    return jax.grad(lambda x: loss_of(tree_tanh(run(params, x))))(x)


def linearized(run, params, x):
    y, tangent = jax.linearize(functools.partial(run, params), x)
    return y, tangent(jnp.cos(x)), jax.linear_transpose(tangent, x)(y)


TRANSFORMS = (
    batched,
    stacked,
    stacked_gradient,
    forward,
    hessian,
    jacobian,
    checkpointed,
    linearized,
)


@pytest.mark.parametrize(
    ("transform", "method"),
    partly_slow(
        [(transform, ("int4", "q4_0", "sfp8")[i % 3]) for i, transform in enumerate(TRANSFORMS)],
        lambda pair: TRANSFORMS.index(pair[0]) % 2 == 1,
    ),
)
def test_transforms(transform, method):
    case, rule = given_layers(False), Wrap(method)
    stored, dequantized = case.quantized(method)
    if transform in (stacked, stacked_gradient):  # rolled along the axis of their blocks
        stored = {name: dict(layer) for name, layer in stored.items()}

    @jax.jit
    def both(stored, dequantized, x):
        found = transform(functools.partial(applied, case, rule), stored, x)
        if transform not in (stacked, stacked_gradient):
            plain = functools.partial(applied, case, None)
            return found, transform(plain, dequantized, x)

        def whole(params, x):
            return applied(case, None, peft.dequantize_checkpoint(params), x)

        return found, transform(whole, stored, x)

    assert_close(*both(stored, dequantized, X))


def with_scales(stored, scales):
    flat = flax.traverse_util.flatten_dict(stored)
    return flax.traverse_util.unflatten_dict({**flat, **scales})


@pytest.mark.parametrize("method", ["int4", "q4_0", "sfp8"])
def test_gradients_of_scales(method):
    case = given_layers(False)
    stored, _ = case.quantized(method)
    flat = flax.traverse_util.flatten_dict(stored)
    scales = {path: leaf for path, leaf in flat.items() if path[-1] == "scale"}
    assert len(scales) == 5

    @jax.jit
    def both(scales):
        def of_stored(scales):
            with peft.ModuleInterceptor(Wrap(method)):
                return loss_of(case.run(with_scales(stored, scales)))

        def of_weights(scales):
            return loss_of(case.run(peft.dequantize_checkpoint(with_scales(stored, scales))))

        return jax.grad(of_stored)(scales), jax.grad(of_weights)(scales)

    assert_close(*both(scales), 2e-3 if method.startswith("q4_0") else 1e-5)


# --- Training ------------------------------------------------------------------------------------


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(32, name="out")(nn.tanh(nn.Dense(64, name="hidden")(x)))


def test_steps_are_traced_once_and_equal_rules_share_programs():
    case = given(Net(), numbers(4, 64))
    stored, _ = case.quantized("int4")

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(lora, stored, x):
        def loss(lora):
            return loss_of(case.run(peft.merge_params(stored, lora), (x,)))

        return jax.tree.map(lambda a, g: a - 0.01 * g, lora, jax.grad(loss)(lora))

    lora = case.lora
    for _ in range(3):
        with peft.ModuleInterceptor(Wrap("int4")), peft.ModuleInterceptor(Adapt()):
            lora = step(lora, stored, case.inputs[0])
    assert Wrap("int4") == Wrap("int4")
    assert peft.Int4Dense(nn.Dense(3), method="int4") == peft.Int4Dense(
        nn.Dense(3), method=QuantizationMethod.INT4
    )


TARGET = numbers(8, 32)


def trained(loss, params):
    """Parameters and losses of a few plain steps, compiled as one."""

    @jax.jit
    def run(params):
        def step(params, _):
            value, gradient = jax.value_and_grad(loss)(params)
            return jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient), value

        return jax.lax.scan(step, params, length=20)

    return run(params)


@every_method
def test_training_on_a_quantized_base(method):
    """The loss falls, and the base does not change."""
    case = given(nn.Dense(32), numbers(8, 64))
    stored, _ = case.quantized(method)
    lora = {"lora": {"a": case.lora["lora"]["a"], "b": jnp.zeros((2, 32))}}

    def loss(lora):
        with peft.ModuleInterceptor(Wrap(method)), peft.ModuleInterceptor(Adapt()):
            y = case.run(peft.merge_params(stored, lora))
        return jnp.mean((y / 8 - TARGET) ** 2) * 32

    before = jax.tree.map(np.array, stored)
    lora, losses = trained(loss, lora)
    assert losses[-1] < 0.8 * losses[0]
    params = peft.merge_params(stored, lora)
    chex.assert_trees_all_equal(peft.split_params(params).original, before)


@pytest.mark.slow
@every_method
def test_training_under_simulation(method):
    """The loss falls, and the trained weights, stored, compute what was simulated."""
    case = given(nn.Dense(32), numbers(8, 64), adapt=None)

    def simulated(params):
        with peft.ModuleInterceptor(Simulate(method)):
            return case.run(params)

    def loss(params):
        return jnp.mean((simulated(params) / 8 - TARGET) ** 2) * 32

    params, losses = trained(loss, case.params)
    assert losses[-1] < 0.8 * losses[0]
    stored = peft.quantize_checkpoint(params, method=method, specs=case.specs)
    expected = simulated(params)
    chex.assert_trees_all_equal(case.run(peft.dequantize_checkpoint(stored)), expected)
    with peft.ModuleInterceptor(Wrap(method)):
        assert_close(case.run(stored), expected)


# --- Simulation ----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "scanned"), [*((method, False) for method in METHODS), ("int4", True), ("nf4", True)]
)
def test_simulation_is_the_plain_layer_on_simulated_weights(method, scanned):
    """Gradients pass straight through: those of the weights are the plain layer's, at them."""
    case, rule = given_layers(scanned), Simulate(method)
    _, dequantized = case.quantized(method)

    def gradients(rule, params, x):
        with intercepting(rule):
            y, vjp = jax.vjp(lambda params, x: case.run(params, (x,)), params, x)
        return y, vjp(y)

    found = jax.jit(functools.partial(gradients, rule))(case.params, X)
    assert_close(found, plain_gradients(scanned)(dequantized, X))


@functools.cache
def plain_gradients(scanned):
    case = given_layers(scanned)

    @jax.jit
    def run(params, x):
        y, vjp = jax.vjp(lambda params, x: case.run(params, (x,)), params, x)
        return y, vjp(y)

    return run


def test_simulating_nothing_changes_nothing():
    case = given_layers(False)

    @jax.jit
    def both(params):
        with peft.ModuleInterceptor(Simulate("none")):
            simulated = case.run(params)
        return simulated, case.run(params), Layers(Simulate("none")).apply({"params": params}, X)

    found, expected, by_hand = both(case.params)
    chex.assert_trees_all_equal(found, expected)
    chex.assert_trees_all_equal(by_hand, expected)


def test_init_under_simulation_is_the_plain_one():
    @jax.jit
    def init(key):
        with peft.ModuleInterceptor(Simulate("int4")):
            found = Layers().init(key, X)
        return found, Layers().init(key, X)

    chex.assert_trees_all_equal(*init(key_of(0)))


@pytest.mark.parametrize("storing_outside", [True, False])
@pytest.mark.parametrize("adapted", [True, False])
def test_stored_values_then_simulation_then_adapters(storing_outside, adapted):
    """In this order, however the statements nest."""
    case = given_layers(False)
    stored, dequantized = case.quantized("int8")
    store, simulate, adapt = Wrap("int8"), Simulate("int4"), Adapt() if adapted else None
    rules = (store, simulate) if storing_outside else (simulate, store)

    @jax.jit
    def both(stored, dequantized, lora):
        with intercepting(adapt), intercepting(rules[0]), intercepting(rules[1]):
            found = case.run(peft.merge_params(stored, lora) if adapted else stored)
        with intercepting(simulate), intercepting(adapt):
            expected = case.run(peft.merge_params(dequantized, lora) if adapted else dequantized)
        return found, expected

    assert_close(*both(stored, dequantized, case.lora))


# --- What is refused -----------------------------------------------------------------------------


def stored_net(method="int4"):
    case = given(Net(), numbers(4, 64))
    return case, case.quantized(method)[0]


def refused(rule, params, message, error=ValueError):
    x = jnp.ones((4, 64))
    with pytest.raises(error, match=message), intercepting(rule):
        Net().apply({"params": params}, x)


def unread(method, path):
    """The error of a model without any rule: packed bytes have not the shape that Flax expects."""
    if method in ("int8", "sfp8"):
        return f"at '{path}' reads stored {method} values", ValueError
    return f'in "/{path}", the given initializer', flax.errors.ScopeParamShapeError


@every_method
def test_stored_values_without_a_wrapper_are_refused(method):
    _, stored = stored_net(method)
    refused(None, stored, *unread(method, "hidden"))


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("method", ["int4", "int8"])
def test_every_kind_refuses_what_it_cannot_read(method, name):
    case = given_layers(False)
    stored, dequantized = case.quantized(method)
    message, error = unread(method, name)
    with pytest.raises(error, match=message):
        case.run({**dequantized, name: stored[name]})


@pytest.mark.parametrize("rule", [Adapt(), AdaptWeights((nn.Dense,)), Simulate("int4")])
def test_other_rules_do_not_read_stored_values(rule):
    case, stored = stored_net()
    params = stored if isinstance(rule, Wrap) else peft.merge_params(stored, case.lora)
    refused(rule, params, "'hidden/kernel' holds stored int4 values, which Dense does not read")


@pytest.mark.parametrize(("held", "read"), [("int4", "int8"), ("q4_0", "q4_0_transpose")])
def test_wrappers_read_the_values_of_their_method(held, read):
    _, stored = stored_net(held)
    message = f"'hidden/kernel' holds stored {held} values, but Int4Dense reads those of {read}"
    refused(Wrap(read), stored, message)


def test_float_kernels_are_refused():
    case, _ = stored_net()
    message = r"'hidden/kernel' holds float32\[64, 64\], but Int4Dense reads stored int4 values"
    refused(Wrap(), case.params, message)


BROKEN = {
    "no scale": (
        lambda layer: {name: value for name, value in layer.items() if name != "scale"},
        "'hidden/kernel' holds stored values without their scale",
    ),
    "a scale of another shape": (
        lambda layer: {**layer, "scale": jnp.ones((1, 63))},
        r"'hidden/kernel': A scale of shape \(1, 63\) does not fit values of shape \(64, 64\)",
    ),
    "a scale of other axes": (
        lambda layer: {**layer, "scale": jnp.ones((64,))},
        "'hidden/kernel': A scale of shape",
    ),
    "values of another shape": (
        lambda layer: (
            peft.quantize_checkpoint({"kernel": jnp.ones((32, 64))}, method="int4")
            | {"bias": layer["bias"]}
        ),
        r"'hidden/kernel' holds stored values of shape \(32, 64\), but Dense needs \(64, 64\)",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_layers_are_refused(name):
    broken, message = BROKEN[name]
    _, stored = stored_net()
    refused(Wrap(), {**stored, "hidden": broken(stored["hidden"])}, message)


@pytest.mark.parametrize("name", LAYERS)
def test_wrong_shapes_of_every_kind(name):
    case = given_layers(False)
    stored, _ = case.quantized("int4")
    layer = dict(stored[name])
    param = "embedding" if name == "embed" else "kernel"
    layer[param], layer["scale"] = peft.quantize(jnp.ones((7, 3)), "int4")
    with pytest.raises(ValueError), peft.ModuleInterceptor(Wrap()):
        case.run({**stored, name: layer})


@pytest.mark.parametrize("wrapper", STORING.values())
def test_wrappers_of_stored_values_have_a_method(wrapper):
    with pytest.raises(ValueError, match="which the method NONE does not make"):
        wrapper(wrapped=nn.Dense(3), method="none")
    with pytest.raises(ValueError, match="'int5' is no quantization method"):
        wrapper(wrapped=nn.Dense(3), method="int5")


@pytest.mark.parametrize("simulating", [False, True])
def test_wrappers_refuse_what_they_do_not_know(simulating):
    table = SIMULATING if simulating else STORING
    with pytest.raises(ValueError, match="LayerNorm is not registered"):
        table[nn.Dense](wrapped=nn.LayerNorm(), method="int4")
    with pytest.raises(ValueError, match=f"Use {table[nn.Conv].__name__}"):
        table[nn.Dense](wrapped=nn.Conv(3, (2,)), method="int4")
    with pytest.raises(ValueError, match=f"Use {table[nn.Embed].__name__}"):
        table[nn.Conv](wrapped=nn.Embed(3, 2), method="int4")
    with pytest.raises(ValueError, match="wrapped is the module to wrap"):
        table[nn.Dense](wrapped=3, method="int4")


def test_two_wrappers_on_one_layer_are_refused():
    _, stored = stored_net()
    with peft.ModuleInterceptor(WrapIn(peft.Int4Dense, nn.Dense)):
        refused(Wrap(), stored, r"'hidden'.*gets 2 named 'stored values'")


def test_blocks_that_do_not_fit_are_refused_at_init():
    with (
        pytest.raises(ValueError, match="'layers_0/kernel': Q4_0 has blocks of 32 along axis -1"),
        peft.ModuleInterceptor(Wrap("q4_0")),
    ):
        nn.Sequential([nn.Dense(33)]).init(key_of(0), jnp.ones((3, 64)))


def test_fusing_into_stored_values_is_refused():
    case, stored = stored_net()
    with peft.ModuleInterceptor(Adapt()):
        specs = peft.lora_specs(Net(), *case.inputs)
    params = peft.merge_params(stored, case.lora)
    with pytest.raises(ValueError, match="hidden"):
        peft.fuse_params(params, specs=specs)
    with pytest.raises(ValueError, match="hidden"):
        peft.unfuse_params(stored, lora=case.lora)


class Normalised(nn.Module):
    norm: type[nn.Module]

    @nn.compact
    def __call__(self, x):
        layer = nn.Dense(6, name="dense")
        if self.norm is nn.SpectralNorm:
            return nn.SpectralNorm(layer)(x, update_stats=False)
        return nn.WeightNorm(layer)(x)


@pytest.mark.parametrize("rule", [Wrap("int8"), Adapt()])
@pytest.mark.parametrize("norm", [nn.WeightNorm, nn.SpectralNorm])
def test_norms_of_weights_refuse_stored_values(norm, rule):
    """They would normalise what is stored."""
    model, x = Normalised(norm), numbers(3, 8)
    variables = jax.jit(lambda: model.init(key_of(0), x))()
    stored = peft.quantize_checkpoint(variables["params"], method="int8", select=r"dense/kernel$")
    message = f"'dense/kernel' holds values stored in few bits, which {norm.__name__}"
    with pytest.raises(ValueError, match=message), peft.ModuleInterceptor(rule):
        model.apply({**variables, "params": stored}, x)

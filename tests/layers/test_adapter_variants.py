"""DoRA, rsLoRA, LoRA bias and dropout on every kind of layer, against formulas in float64."""

import dataclasses
import functools
import json
import math
from typing import Any

import chex
import flax
import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
import pytest
from flax import linen as nn
from helpers import RANK, SIMULATING, STORING, WRAPPERS, assert_close, key_of, numbers, scattered

import peft_jax as peft

slow = pytest.mark.slow
METHODS = ("int4", "int8", "q4_0", "q4_0_transpose", "sfp8", "nf4")
VARIANTS = {
    "dora": {"use_dora": True},
    "dora, rslora": {"use_dora": True, "use_rslora": True},
    "bias": {"lora_bias": True},
    "bias, rslora": {"lora_bias": True, "use_rslora": True},
    "dora, bias": {"use_dora": True, "lora_bias": True},
}


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """A layer and its input; the change of its kernel and the kernel's outputs, by letters."""

    layer: nn.Module
    inputs: tuple[Any, ...]
    delta: str = "ir,ro->io"
    outputs: str = "o"
    param: str = "kernel"
    method: Any = None
    wrapper: Any = None

    def wrapped(self, *, around=lambda layer: layer, **fields):
        wrapper = self.wrapper or WRAPPERS[type(self.layer)]
        return wrapper(**{"rank": RANK, "alpha": 3, "wrapped": around(self.layer), **fields})


def einsum(equation, kernel, x, delta, outputs, **fields):
    return Case(nn.Einsum(kernel, equation, **fields), (numbers(*x),), delta, outputs)


def general(x, delta, outputs, *args, **fields):
    return Case(nn.DenseGeneral(*args, **fields), (numbers(*x),), delta, outputs)


def conv(x, window, *args, **fields):
    delta = f"{window}ir,ro->{window}io"
    return Case(nn.Conv(*args, **fields), (numbers(*x),), delta)


def transposed(x, *args, delta="xir,ro->xio", **fields):
    return Case(nn.ConvTranspose(*args, **fields), (numbers(*x),), delta)


def attend(embed, query):
    return embed.attend(query)


def lookup_and_attend(embed, ids, query):
    return embed(ids), embed.attend(query)


IDS = jnp.asarray([[0, 3, 6], [6, 1, 0]])
TRIANGLE = np.tril(np.ones((3, 4, 6), np.float32))
EMBED = {"delta": "vr,rf->vf", "outputs": "f", "param": "embedding"}

CASES = {
    "dense": Case(nn.Dense(5), (numbers(2, 3, 4),)),
    "dense on a vector": Case(nn.Dense(5), (numbers(4),)),
    "dense, square": Case(nn.Dense(4), (numbers(3, 4),)),
    "dense, one feature": Case(nn.Dense(1), (numbers(3, 1),)),
    "dense, no bias": Case(nn.Dense(5, use_bias=False), (numbers(3, 4),)),
    "heads from one": einsum("...i,nio->...no", (3, 4, 5), (2, 4), "ir,rno->nio", "no"),
    "a matrix for each place": einsum("bti,tio->bto", (3, 4, 5), (2, 3, 4), "tir,ro->tio", "to"),
    "heads out": einsum("btd,dnh->btnh", (4, 3, 5), (2, 3, 4), "dr,rnh->dnh", "nh"),
    "heads in": einsum("btnh,nhd->btd", (3, 5, 4), (2, 2, 3, 5), "nhr,rd->nhd", "d"),
    "queries, keys, values": einsum(
        "bsd,3dnh->bsnh".replace("3", "k"), (3, 4, 2, 5), (2, 3, 4), "dr,rknh->kdnh", "nh"
    ),
    "outputs in another order": einsum("bd,dnh->hbn", (4, 3, 5), (2, 4), "dr,rnh->dnh", "hn"),
    "batch axis last": einsum("bgi,iog->bgo", (4, 5, 3), (2, 3, 4), "igr,ro->iog", "go"),
    "batch axis moved": einsum("bnd,ndh->nbh", (3, 4, 5), (2, 3, 4), "ndr,rh->ndh", "nh"),
    "two batch axes, all square": einsum(
        "bnmd,nmdh->bnmh", (2, 2, 2, 2), (2, 2, 2, 2), "nmdr,rh->nmdh", "nmh"
    ),
    "a batch axis of one": einsum("bnd,ndh->bnh", (1, 4, 5), (2, 3, 4), "ndr,rh->ndh", "nh"),
    "tokens summed": einsum("bti,io->bo", (4, 5), (2, 3, 4), "ir,ro->io", "o"),
    "output turned": einsum("bi,io->ob", (4, 5), (2, 4), "ir,ro->io", "o"),
    "no output axis": einsum("bij,ij->b", (4, 5), (3, 4, 5), "ijr,r->ij", "", use_bias=False),
    "batch axes alone": einsum("bij,ij->bij", (4, 5), (3, 4, 5), "ijr,r->ij", "ij"),
    "general, several features": general((2, 3, 4), "ir,rno->ino", "no", (3, 5)),
    "general, several axes": general((2, 3, 4), "ijr,ro->ijo", "o", 5, axis=(-2, -1)),
    "general, axes around": general((2, 3, 4), "ijr,rop->ijop", "op", (5, 3), axis=(0, -1)),
    "general, batch": general((2, 3, 4), "gir,gro->gio", "go", 5, batch_dims=(0,)),
    "general, two batch axes": general(
        (2, 3, 4, 5), "ghir,ghrop->ghiop", "ghop", (2, 3), axis=-2, batch_dims=(0, 1)
    ),
    "conv": conv((2, 8, 4), "x", 6, (3,)),
    "conv, strides and dilation": conv(
        (2, 9, 8, 4), "xy", 6, (3, 2), strides=(2, 1), kernel_dilation=2
    ),
    "conv, groups": conv((2, 8, 4), "x", 6, (3,), feature_group_count=2),
    "conv, depthwise, causal": conv(
        (2, 8, 4), "x", 8, (3,), feature_group_count=4, padding="CAUSAL"
    ),
    "conv, input dilated": conv((2, 8, 4), "x", 6, (3,), input_dilation=2, padding=1),
    "conv, mask": conv((2, 8, 4), "x", 6, (3,), mask=TRIANGLE),
    "transposed": transposed((2, 5, 4), 6, (3,), strides=(2,)),
    "transposed, mask": transposed((2, 5, 4), 6, (3,), mask=TRIANGLE),
    "transposed kernel": transposed((2, 5, 4), 6, (3,), transpose_kernel=True, delta="xir,ro->xoi"),
    "embed": Case(nn.Embed(7, 5), (IDS,), **EMBED),
    "attend": Case(nn.Embed(7, 5), (numbers(2, 5),), method=attend, **EMBED),
    "lookup and attend": Case(
        nn.Embed(7, 5), (IDS, numbers(2, 3, 5)), method=lookup_and_attend, **EMBED
    ),
    "at the weight": Case(nn.Dense(5), (numbers(2, 3, 4),), wrapper=peft.LoRAWeight),
    "embed at the weight": Case(nn.Embed(7, 5), (IDS,), wrapper=peft.LoRAWeight, **EMBED),
}
KINDS = (
    "dense",
    "heads in",
    "a matrix for each place",
    "outputs in another order",
    "general, two batch axes",
    "conv, groups",
    "conv, mask",
    "transposed kernel",
    "lookup and attend",
    "at the weight",
)
SLOW_KINDS = ("a matrix for each place", "outputs in another order")
FAST = {(name, "dora") for name in KINDS if name not in SLOW_KINDS} | {
    ("a batch axis of one", "dora"),
    ("dense", "bias, rslora"),
    ("outputs in another order", "dora, bias"),
}
CROSSED = [
    pytest.param(
        case,
        variant,
        id=f"{name}: {kind}",
        marks=() if (name, kind) in FAST else slow,
    )
    for name, case in CASES.items()
    for kind, variant in VARIANTS.items()
    if case.wrapper is None or "lora_bias" not in variant
]
every_crossing = pytest.mark.parametrize(("case", "variant"), CROSSED)


# --- What the papers say, in float64 -------------------------------------------------------------


def norm_of(kernel, letters, outputs):
    """Of the kernel for each output; its axes are those of the outputs, in their order."""
    total = jnp.einsum(f"{letters},{letters}->{outputs}", kernel, kernel)
    return jnp.sqrt(total)


def reference_kernel(kernel, adapter, case, scaling):
    """``W + s·ab``, or ``m · (W + s·ab) / n`` where ``n`` is a constant."""
    letters = case.delta.split("->")[1]
    total = kernel + scaling * jnp.einsum(case.delta, adapter["a"], adapter["b"])
    if "magnitude" not in adapter:
        return total
    n = jax.lax.stop_gradient(norm_of(total, letters, case.outputs))
    return jnp.einsum(f"{letters},{case.outputs}->{letters}", total, adapter["magnitude"] / n)


def weighed(outputs):
    """A number to which every place of every output contributes with a factor of its own."""
    return sum(
        jnp.sum(y * jnp.asarray(scattered(y.size, 0.5).reshape(y.shape), y.dtype))
        for y in jax.tree.leaves(outputs)
    )


def reference(case, base, adapters, scaling, layer=None):
    """Kernel, outputs, and gradient of `weighed` by the adapters, in float64.

    Several adapters change the kernel by the sum of what each changes it by.
    """
    layer = layer or case.layer
    if getattr(layer, "mask", None) is not None:
        layer = layer.clone(mask=np.asarray(layer.mask, np.float64))
    as_float64 = functools.partial(jax.tree.map, lambda x: np.asarray(x, np.float64))

    def run(adapters, base, inputs):
        params = dict(base)
        kernels = [reference_kernel(base[case.param], each, case, scaling) for each in adapters]
        kernel = base[case.param] + sum(each - base[case.param] for each in kernels)
        biases = [each["bias"] for each in adapters if "bias" in each]
        if biases and case.param == "embedding":
            kernel = kernel + scaling * sum(biases)[None]
        elif biases and "bias" in params:
            params["bias"] = params["bias"] + scaling * sum(biases)
        params[case.param] = kernel
        y = layer.apply({"params": params}, *inputs, method=case.method)
        if biases and case.param != "embedding" and "bias" not in base:
            y = (
                y + scaling * sum(biases)[(None,) * (y.ndim - 1)]
                if case.outputs
                else y + scaling * sum(biases)
            )
        return weighed(y), (kernel, y)

    with jax.enable_x64(True):
        inputs = tuple(
            np.asarray(x, np.float64) if jnp.issubdtype(x.dtype, jnp.floating) else np.asarray(x)
            for x in case.inputs
        )
        grad = jax.jit(jax.grad(run, has_aux=True))
        gradient, (kernel, y) = grad(as_float64(adapters), as_float64(base), inputs)
        narrow = functools.partial(jax.tree.map, lambda x: np.asarray(x, np.float32))
        return narrow(kernel), narrow(y), narrow(gradient)


def scaling_of(variant, rank=RANK, alpha=3):
    return alpha / (math.sqrt(rank) if variant.get("use_rslora") else rank)


def drawn(lora, seed=0):
    """Adapters with scattered numbers; magnitudes and biases are neither ones nor zeros."""
    leaves, tree = jax.tree.flatten(lora)
    values = [
        jnp.asarray(scattered(x.size, seed + i).reshape(x.shape), x.dtype)
        for i, x in enumerate(leaves)
    ]
    return jax.tree.unflatten(tree, values)


def as_arrays(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float32), tree)


@dataclasses.dataclass(frozen=True)
class Everything:
    """What one compiled program found of an adapted layer."""

    params: Any
    plain: Any
    start: Any
    lora: Any
    output: Any
    gradient: Any
    fused: Any
    on_fused: Any
    back: Any


def run_everything(case, model, *, fusing=True):
    """Identity, output, gradient, fusion and its inverse, with drawn adapters."""

    def run(params):
        return model.apply({"params": params}, *case.inputs, method=case.method)

    specs = peft.lora_specs(model, *case.inputs, method=case.method)
    specs = {
        k: peft.LoraSpec.from_dict(json.loads(json.dumps(s.to_dict()))) for k, s in specs.items()
    }

    @jax.jit
    def program():
        params = model.init(key_of(0), *case.inputs, method=case.method)["params"]
        base, lora = peft.split_params(params)
        dense = peft.dequantize_checkpoint(base)
        plain = case.layer.apply({"params": dense}, *case.inputs, method=case.method)
        random = drawn(lora)

        def loss(lora):
            y = run(peft.merge_params(base, lora))
            return weighed(y), y

        gradient, output = jax.grad(loss, has_aux=True)(random)
        fused = on_fused = back = None
        if fusing:
            fused = peft.fuse_params(peft.merge_params(dense, random), specs=specs)
            on_fused = case.layer.apply({"params": fused}, *case.inputs, method=case.method)
            back = peft.unfuse_params(fused, original=dense, lora=random, specs=specs)
        return params, plain, run(params), random, output, gradient, fused, on_fused, back

    return specs, Everything(*program())


def cancellation(case, kernel, adapter, scaling):
    """By how much the terms of ``|W|² + 2 s<W, ab> + |s ab|²`` may exceed their sum.

    DoRA computes its norm so, and loses as many digits where ``W`` and ``s·ab`` all but cancel.
    """
    change = scaling * jnp.einsum(case.delta, adapter["a"], adapter["b"])
    norms = [
        norm_of(x, case.delta.split("->")[1], case.outputs)
        for x in (kernel, change, kernel + change)
    ]
    return float(jnp.max((norms[0] + norms[1]) ** 2 / norms[2] ** 2))


def check(case, model, variant, scaling=None, tolerance=2e-5):
    """All the properties of one adapted layer against the reference."""
    base_layer = case.layer
    fusing = "lora_bias" not in variant or getattr(base_layer, "use_bias", True)
    specs, found = run_everything(case, model, fusing=fusing)
    base, _ = peft.split_params(found.params)
    dense = peft.dequantize_checkpoint(base)
    assert_close(found.start, found.plain, 1e-5)
    adapters = list(found.lora.values())
    scaling = scaling or scaling_of(variant)
    kernel, output, gradient = reference(case, dense, adapters, scaling)
    for adapter in adapters:
        if "magnitude" in adapter:
            lost = cancellation(case, dense[case.param], adapter, scaling)
            tolerance = max(tolerance, 1e-5 * lost)
    assert_close(found.output, output, tolerance)
    assert_close(as_arrays(list(found.gradient.values())), gradient, tolerance)
    if fusing:
        assert_close(found.fused[case.param], kernel, 1e-5)
        assert_close(found.output, found.on_fused, tolerance)
        chex.assert_trees_all_equal(found.back, peft.merge_params(dense, found.lora))
    return specs, found


# --- One layer of each kind ----------------------------------------------------------------------


@every_crossing
def test_identity_output_gradients_and_fusion(case, variant):
    specs, found = check(case, case.wrapped(**variant), variant)
    (spec,) = specs.values()
    assert spec.scaling == pytest.approx(scaling_of(variant))
    assert spec.variant == ("dora" if variant.get("use_dora") else "lora")
    sizes = dict(zip(case.delta.split("->")[1], found.params[case.param].shape, strict=True))
    per_output = tuple(sizes[c] for c in case.outputs)
    for name in ("magnitude", "bias"):
        if name in found.params["lora"]:
            assert found.params["lora"][name].shape == per_output
    if "magnitude" in found.params["lora"]:
        norm = norm_of(found.params[case.param], "".join(sizes), case.outputs)
        assert_close(found.params["lora"]["magnitude"], norm, 1e-5)
    if "bias" in found.params["lora"]:
        assert not np.any(found.params["lora"]["bias"])


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize(("rank", "alpha"), [(1, 3), (4, 16.0), (3, None), (2, -1)])
def test_scaling(rank, alpha, use_rslora):
    layer = peft.LoRADense(rank=rank, alpha=alpha, use_rslora=use_rslora, wrapped=nn.Dense(5))
    (spec,) = peft.lora_specs(layer, CASES["dense"].inputs[0]).values()
    over = math.sqrt(rank) if use_rslora else rank
    assert spec.scaling == (1.0 if alpha is None else pytest.approx(alpha / over))
    assert (spec.rank, spec.alpha) == (rank, alpha)


@pytest.mark.parametrize(
    "case", [case for case in CASES.values() if hasattr(case.layer, "use_bias")][:3]
)
def test_a_bias_is_not_fused_into_a_layer_without_one(case):
    bare = dataclasses.replace(case, layer=case.layer.clone(use_bias=False))
    model = bare.wrapped(lora_bias=True)
    specs = peft.lora_specs(model, *case.inputs)
    params = model.init(key_of(0), *case.inputs)["params"]
    with pytest.raises(ValueError, match=r"'lora' has a bias of shape .*use_bias=True"):
        peft.fuse_params(params, specs=specs)


# --- Several adapters on one layer ---------------------------------------------------------------

TWO = {
    "dora, dora": ({"use_dora": True}, {"use_dora": True}),
    "dora, lora": ({"use_dora": True}, {}),
    "dora, bias": ({"use_dora": True}, {"lora_bias": True}),
}
FAST_PAIRS = {
    ("dense", "dora, dora"),
    ("lookup and attend", "dora, bias"),
    ("conv, mask", "dora, dora"),
    ("heads in", "dora, lora"),
}


@pytest.mark.parametrize(
    ("case", "pair"),
    [
        pytest.param(
            CASES[name],
            pair,
            id=f"{name}: {kind}",
            marks=() if (name, kind) in FAST_PAIRS else slow,
        )
        for name in KINDS
        for kind, pair in TWO.items()
    ],
)
def test_two_adapters_add_what_each_changes(case, pair):
    if case.wrapper is not None and any("lora_bias" in variant for variant in pair):
        pytest.skip("LoRAWeight has no bias")
    first, second = pair
    inner = case.wrapped(**first)
    wrapper = case.wrapper or WRAPPERS[type(case.layer)]
    model = wrapper(rank=RANK, alpha=3, adapter_name="two", wrapped=inner, **second)
    _, found = check(case, model, first | second)
    assert found.params.keys() >= {"lora", "lora.two"}


# --- Stored and simulated bases ------------------------------------------------------------------

STORED_CASES = {
    "dense": Case(nn.Dense(64), (numbers(3, 64),)),
    "heads in": einsum("btnh,nhd->btd", (2, 64, 64), (2, 3, 2, 64), "nhr,rd->nhd", "d"),
    "a matrix for each": einsum("bti,tio->bto", (2, 64, 64), (2, 2, 64), "tir,ro->tio", "to"),
    "general": general((2, 2, 64), "gir,gro->gio", "go", 64, batch_dims=(0,)),
    "conv": conv((2, 6, 64), "x", 64, (3,)),
    "embed": Case(nn.Embed(64, 64), (IDS, numbers(2, 64)), method=lookup_and_attend, **EMBED),
}


@pytest.mark.parametrize(
    "variant",
    [
        pytest.param({"use_dora": True}, id="dora"),
        pytest.param({"lora_bias": True}, id="bias", marks=slow),
    ],
)
@pytest.mark.parametrize(
    ("name", "method"),
    [
        pytest.param(
            name,
            method,
            id=f"{name}, {method}",
            marks=() if i % len(METHODS) == j else slow,
        )
        for i, name in enumerate(STORED_CASES)
        for j, method in enumerate(METHODS)
    ],
)
def test_on_stored_weights(name, method, variant):
    case = STORED_CASES[name]
    store = functools.partial(_stored, method=method)
    check(case, case.wrapped(around=store, **variant), variant, tolerance=5e-5)


def _stored(layer, method):
    return STORING[type(layer)](wrapped=layer, method=method)


@pytest.mark.parametrize("method", ["int8", pytest.param("q4_0", marks=slow)])
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in ("dense", "embed") else slow) for name in STORED_CASES],
)
def test_on_simulated_weights(name, method):
    """The magnitude and the norm are those of the weight that the layer computes with."""
    case = STORED_CASES[name]
    simulate = SIMULATING[type(case.layer)](wrapped=case.layer, method=method)
    model = case.wrapped(around=lambda layer: simulate, use_dora=True)

    @jax.jit
    def program():
        params = model.init(key_of(0), *case.inputs, method=case.method)["params"]
        base, lora = peft.split_params(params)

        def run(model, params):
            return model.apply({"params": params}, *case.inputs, method=case.method)

        spec = peft.layer_specs(case.layer, *case.inputs, method=case.method)[case.param]
        axes = None if method.startswith(("q4_0", "nf4")) else spec.axes  # blocks have axes already
        kernel = peft.simulate_quantize(base[case.param], method, axes=axes)
        start, plain = run(model, params), run(simulate, base)
        random = drawn(lora)
        return base, kernel, start, plain, random, run(model, peft.merge_params(base, random))

    base, kernel, start, plain, random, output = program()
    assert_close(start, plain)
    simulated = dict(base) | {case.param: kernel}
    _, expected, _ = reference(case, simulated, [random["lora"]], 1.5)
    assert_close(output, expected, 5e-5)


# --- dtypes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype", [jnp.bfloat16, pytest.param(jnp.float16, marks=slow)], ids=("bfloat16", "float16")
)
@pytest.mark.parametrize(
    "param_dtype", [pytest.param("float32", marks=slow), None], ids=("wide", "narrow")
)
@pytest.mark.parametrize(
    "variant",
    [{"use_dora": True}, pytest.param({"lora_bias": True}, marks=slow)],
    ids=("dora", "bias"),
)
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(CASES[name], id=name, marks=() if i % 3 == 0 else slow)
        for i, name in enumerate(("dense", *KINDS[1:-2], "at the weight", "lookup and attend"))
    ],
)
def test_the_layers_dtype_is_kept(case, variant, param_dtype, dtype):
    """Also where parameters, the bias among them, are as narrow as the computation."""
    if case.wrapper is not None and "lora_bias" in variant:
        pytest.skip("LoRAWeight has no bias")
    layer = case.layer.clone(dtype=dtype, param_dtype=param_dtype or dtype)
    if getattr(layer, "mask", None) is not None:
        layer = layer.clone(mask=jnp.asarray(layer.mask, param_dtype or dtype))
    narrow = dataclasses.replace(
        case,
        layer=layer,
        inputs=tuple(
            x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x for x in case.inputs
        ),
    )
    model = narrow.wrapped(**variant)

    def program():
        params = model.init(key_of(0), *narrow.inputs, method=case.method)["params"]
        base, lora = peft.split_params(params)
        plain = layer.apply({"params": base}, *narrow.inputs, method=case.method)
        start = model.apply({"params": params}, *narrow.inputs, method=case.method)

        def loss(lora):
            params = peft.merge_params(base, lora)
            y = model.apply({"params": params}, *narrow.inputs, method=case.method)
            return weighed(jax.tree.map(lambda y: y.astype(jnp.float32), y))

        return params, plain, start, jax.grad(loss)(lora)

    params, plain, start, gradient = jax.eval_shape(program)
    chex.assert_trees_all_equal_shapes_and_dtypes(start, plain)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(params["lora"]))
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(gradient))
    if param_dtype is None and case in (CASES["dense"], CASES["lookup and attend"]):
        params, plain, start, _ = jax.jit(program)()
        assert_close(start, plain, 2e-2)


# --- Zeros ---------------------------------------------------------------------------------------

ZEROS = {"all": (slice(None), slice(None)), "a column": (slice(None), 1), "a row": (1,)}


@pytest.mark.parametrize("at_weight", [False, True], ids=("beside", "at the weight"))
def test_zero_columns_give_numbers(at_weight):
    """A column of zeros has no direction: output and gradient are finite all the same."""
    x = CASES["dense"].inputs[0]
    wrapper = peft.LoRAWeight if at_weight else peft.LoRADense
    model = wrapper(rank=RANK, use_dora=True, wrapped=nn.Dense(5, use_bias=False))

    @jax.jit
    def program(kernel, b):
        a = model.init(key_of(0), x)["params"]["lora"]["a"]
        magnitude = jnp.linalg.norm(kernel, axis=0)
        lora = {"a": a, "b": b, "magnitude": magnitude}

        def loss(lora, kernel):
            y = model.apply({"params": {"kernel": kernel, "lora": lora}}, x)
            return weighed(y), y

        return jax.grad(loss, argnums=(0, 1), has_aux=True)(lora, kernel)

    for zeroed in ZEROS.values():
        kernel = numbers(4, 5).at[zeroed].set(0)
        for b in (jnp.zeros((RANK, 5)), numbers(RANK, 5).at[:, 1].set(0)):
            gradient, y = program(kernel, b)
            chex.assert_tree_all_finite((gradient, y))
            if not np.any(b):
                assert_close(y, x @ kernel)


def test_a_layer_drawn_as_zeros_starts_at_zero():
    for case in (CASES["dense"], CASES["conv, groups"]):
        layer = case.layer.clone(kernel_init=nn.initializers.zeros)
        model = WRAPPERS[type(layer)](rank=RANK, use_dora=True, wrapped=layer)
        y, variables = jax.jit(model.init_with_output)(key_of(0), *case.inputs)
        assert not np.any(y)
        assert not np.any(variables["params"]["lora"]["magnitude"])


# --- Dropout -------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", [{"use_dora": True}, {"lora_bias": True}], ids=("dora", "bias"))
@pytest.mark.parametrize(
    "name",
    ["dense", *(pytest.param(n, marks=slow) for n in ("conv, groups", "lookup and attend"))],
)
def test_dropout_drops_the_adapters_product_alone(name, variant):
    """The mean over masks is the output without dropout; the rest does not drop."""
    case = CASES[name]
    model = case.wrapped(dropout=0.5, **variant)

    def run(params, rng=None):
        rngs = None if rng is None else {"dropout": rng}
        return model.apply({"params": params}, *case.inputs, method=case.method, rngs=rngs)

    @jax.jit
    def program():
        params = model.init(key_of(0), *case.inputs, method=case.method)["params"]
        base, lora = peft.split_params(params)
        random = peft.merge_params(base, drawn(lora))
        rngs = jax.random.split(key_of(1), 3000)
        mean = jax.tree.map(lambda y: y.mean(0), jax.vmap(lambda rng: run(random, rng))(rngs))
        still = {**random, "lora": {**random["lora"], "b": 0 * random["lora"]["b"]}}
        return run(random), mean, run(random, key_of(2)), run(still), run(still, key_of(2))

    sure, mean, dropped, still, still_dropped = program()
    assert_close(mean, sure, 0.1)
    assert_close(still_dropped, still)
    for y, other in zip(jax.tree.leaves(dropped), jax.tree.leaves(sure), strict=True):
        assert np.any(np.abs(y - other) > 1e-3)


# --- Lifted transforms ---------------------------------------------------------------------------


class Body(nn.Module):
    """One of every kind of layer, adapted, on a carry of shape ``(2, 4)``."""

    variant: Any
    plain: bool = False
    whole: bool = True

    @nn.compact
    def __call__(self, x, _=None):
        def adapted(layer):
            if self.plain:
                return layer
            return WRAPPERS[type(layer)](rank=RANK, alpha=3, wrapped=layer, **self.variant)

        x = adapted(nn.Dense(4, name="dense"))(x)
        if not self.whole:
            return jnp.tanh(x), None
        x = x + adapted(nn.Einsum((3, 4, 4), "bi,nio->bo", name="einsum"))(x)
        x = x + adapted(nn.DenseGeneral(4, batch_dims=(0,), name="general"))(x)
        x = x + adapted(nn.Conv(4, (2,), feature_group_count=2, name="conv"))(x)
        embed = adapted(nn.Embed(4, 4, name="embed"))
        return jnp.tanh((embed.attend(x) + embed(jnp.arange(2))) / 64), None  # not saturated


class Lifted(nn.Module):
    """`Body` under a lifted transform."""

    how: str
    variant: Any
    plain: bool = False
    whole: bool = True

    @nn.compact
    def __call__(self, x):
        lift = {
            "plain": lambda: Body,
            "remat": lambda: nn.remat(Body),
            "jit": lambda: nn.jit(Body),
            "vmap": lambda: nn.vmap(
                Body,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=None,
                axis_size=2,
            ),
            **{
                f"scan {axis}": lambda axis=axis: nn.scan(
                    Body, variable_axes={"params": axis}, split_rngs={"params": True}, length=3
                )
                for axis in (0, 1)
            },
            "scan of remat": lambda: nn.scan(
                nn.remat(Body), variable_axes={"params": 0}, split_rngs={"params": True}, length=3
            ),
        }
        return lift[self.how]()(self.variant, self.plain, self.whole, name="body")(x, None)[0]


ALL = {"use_dora": True, "lora_bias": True, "use_rslora": True}


@pytest.mark.parametrize(
    ("how", "variant", "whole"),
    [
        pytest.param("scan 1", ALL, False, id="scan 1, all, one layer"),
        pytest.param("scan of remat", {"use_dora": True}, False, id="remat, dora, one layer"),
        pytest.param("vmap", {"use_dora": True}, False, id="vmap, dora, one layer"),
        *(
            pytest.param(how, variant, True, id=f"{how}, {kind}", marks=slow)
            for how in ("remat", "jit", "vmap", "scan 0", "scan 1", "scan of remat")
            for kind, variant in {
                "dora": {"use_dora": True},
                "bias": {"lora_bias": True},
                "all": ALL,
            }.items()
        ),
    ],
)
def test_under_lifted_transforms(how, variant, whole):
    variant = flax.core.freeze(variant)
    model, plain = (Lifted(how, variant, plain, whole) for plain in (False, True))
    x = numbers(2, 4)
    specs = peft.lora_specs(model, x)
    assert {spec.variant for spec in specs.values()} == (
        {"dora"} if variant.get("use_dora") else {"lora"}
    )

    @jax.jit
    def program():
        params = model.init(key_of(0), x)["params"]
        base, lora = peft.split_params(params)
        start, before = model.apply({"params": params}, x), plain.apply({"params": base}, x)
        random = drawn(lora)

        def adapted(lora):
            return weighed(model.apply({"params": peft.merge_params(base, lora)}, x))

        def fused(lora):
            fused = peft.fuse_params(peft.merge_params(base, lora), specs=specs)
            return weighed(plain.apply({"params": fused}, x)), fused

        value, gradient = jax.value_and_grad(adapted)(random)
        expected, tree = fused(random)
        back = peft.unfuse_params(tree, original=base, lora=random, specs=specs)
        return base, random, start, before, value, expected, gradient, back

    base, random, start, before, value, expected, gradient, back = program()
    assert_close(start, before, 1e-5)
    assert_close(value, expected, 1e-4)
    chex.assert_trees_all_equal(back, peft.merge_params(base, random))
    for path, leaf in jax.tree.leaves_with_path(gradient):
        assert np.any(np.asarray(leaf) != 0), jax.tree_util.keystr(path)


@pytest.mark.parametrize("feature_axes", [-1, 0, pytest.param(None, marks=slow)])
def test_dora_under_weight_norm(feature_axes):
    check_normalised(
        lambda layer: nn.WeightNorm(layer, feature_axes=feature_axes), lambda norm, x: norm(x)
    )


def test_dora_under_spectral_norm():
    check_normalised(nn.SpectralNorm, lambda norm, x: norm(x, update_stats=False))


@dataclasses.dataclass(frozen=True)
class Dora:
    """A rule that puts DoRA on every Dense."""

    def __call__(self, module):
        if type(module) is not nn.Dense:
            return module
        return peft.LoRADense(rank=RANK, alpha=3, use_dora=True, wrapped=module)


def check_normalised(norm, call):
    """The magnitude starts as the norm of the stored kernel, and joins it before normalisation."""

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return call(norm(nn.Dense(5, name="dense")), x)

    model, x = Model(), CASES["dense"].inputs[0]
    with peft.ModuleInterceptor(Dora()):
        specs = peft.lora_specs(model, x)

    @jax.jit
    def program():
        plain = model.init(key_of(0), x)
        before = model.apply(plain, x)
        with peft.ModuleInterceptor(Dora()):
            variables = model.init(key_of(0), x)
            start = model.apply(variables, x)
        base, lora = peft.split_params(variables["params"])
        random = peft.merge_params(base, drawn(lora))
        with peft.ModuleInterceptor(Dora()):
            output = model.apply({**variables, "params": random}, x)
        fused = peft.fuse_params(random, specs=specs)
        same = peft.fuse_params(variables["params"], specs=specs)
        return (
            variables["params"],
            base,
            same,
            before,
            start,
            output,
            model.apply({**variables, "params": fused}, x),
        )

    params, base, same, before, start, output, on_fused = program()
    assert_close(start, before)
    assert_close(output, on_fused)
    dense = params["dense"]
    assert_close(dense["lora"]["magnitude"], jnp.linalg.norm(dense["kernel"], axis=0))
    assert_close(same, base)


# --- JAX's transforms ----------------------------------------------------------------------------


def test_vmap_over_adapters_and_forward_derivatives():
    """A batch of adapters on one base."""
    case = CASES["dense"]
    model = case.wrapped(use_dora=True)
    params = jax.jit(lambda: model.init(key_of(0), *case.inputs)["params"])()
    base, lora = peft.split_params(params)
    adapters = [drawn(lora, seed) for seed in range(3)]
    batch = jax.tree.map(lambda *x: jnp.stack(x), *adapters)

    def loss(lora):
        return weighed(model.apply({"params": peft.merge_params(base, lora)}, *case.inputs))

    at_once = jax.jit(jax.vmap(jax.value_and_grad(loss)))(batch)
    alone = jax.jit(jax.value_and_grad(loss))
    one_by_one = [alone(lora) for lora in adapters]
    assert_close(at_once, jax.tree.map(lambda *x: jnp.stack(x), *one_by_one), 1e-5)
    tangent = drawn(lora, 7)
    forward = jax.jit(lambda x, t: jax.jvp(loss, (x,), (t,))[1])(adapters[0], tangent)
    products = jax.tree.map(lambda g, t: jnp.sum(g * t), one_by_one[0][1], tangent)
    assert float(forward) == pytest.approx(float(sum(jax.tree.leaves(products))), rel=1e-4)


def test_float64():
    with jax.enable_x64(True):
        x = np.asarray(numbers(3, 4), np.float64)
        layer = nn.Dense(5, param_dtype=jnp.float64)
        model = peft.LoRADense(
            rank=RANK, alpha=3, use_dora=True, param_dtype=jnp.float64, wrapped=layer
        )
        y, variables = jax.eval_shape(lambda x: model.init_with_output(key_of(0), x), x)
        params = variables["params"]
        assert y.dtype == jnp.float64
        assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float64)}


# --- What a step costs ---------------------------------------------------------------------------

TOKENS, WIDTH = 512, 512


class Chain(nn.Module):
    """Three products, so that the cotangent of the input is needed in two."""

    variant: Any

    @nn.compact
    def __call__(self, x):
        for _ in range(3):
            x = peft.LoRADense(rank=8, alpha=16, wrapped=nn.Dense(WIDTH), **dict(self.variant))(x)
        return x


@functools.cache
def compiled_step(variant=(), tokens=TOKENS):
    model, x = Chain(variant), jax.ShapeDtypeStruct((tokens, WIDTH), jnp.float32)
    params = jax.eval_shape(model.init, key_of(0), x)["params"]
    base, lora = peft.split_params(params)

    def loss(lora, base, x):
        return jnp.mean(model.apply({"params": peft.merge_params(base, lora)}, x) ** 2)

    return jax.jit(jax.value_and_grad(loss)).lower(lora, base, x).compile()


DORA = (("use_dora", True),)


@pytest.mark.optimized
def test_a_step_of_dora_takes_few_more_operations():
    dora, lora = (compiled_step(variant).cost_analysis()["flops"] for variant in (DORA, ()))
    assert dora <= 1.15 * lora, f"{dora / lora:.3f} times as many"


@pytest.mark.xfail(
    jaxlib.version.__version_info__ < (0, 10, 2),
    reason="XLA of jaxlib before 0.10.2 forms the squares of the weight and of its change on CPU",
)
@pytest.mark.optimized
def test_a_step_of_dora_keeps_nothing_of_the_size_of_a_weight():
    """At few tokens, temporaries are activations and factors; a kernel is many times larger."""
    dora, lora = (compiled_step(variant, 2).memory_analysis() for variant in (DORA, ()))
    kernel = 4 * WIDTH * WIDTH
    assert dora.temp_size_in_bytes < lora.temp_size_in_bytes + kernel // 4


@functools.cache
def stored_step(use_dora, depth, method):
    """A step over layers whose weights are stored in few bits, at few tokens."""

    class Stored(nn.Module):
        @nn.compact
        def __call__(self, x):
            for _ in range(depth):
                layer = peft.Int4Dense(wrapped=nn.Dense(WIDTH), method=method)
                x = peft.LoRADense(rank=8, alpha=16, use_dora=use_dora, wrapped=layer)(x)
            return x

    model, x = Stored(), jax.ShapeDtypeStruct((2, WIDTH), jnp.float32)
    base, lora = peft.split_params(jax.eval_shape(model.init, key_of(0), x)["params"])

    def loss(lora, base, x):
        return jnp.mean(model.apply({"params": peft.merge_params(base, lora)}, x) ** 2)

    return jax.jit(jax.value_and_grad(loss)).lower(lora, base, x).compile()


@pytest.mark.parametrize(
    "method", ["nf4", *(pytest.param(m, marks=slow) for m in ("int4", "int8", "q4_0", "sfp8"))]
)
@pytest.mark.optimized
def test_dora_on_stored_weights_keeps_no_dequantized_weights(method):
    """Temporaries do not grow by a dequantized weight with each layer."""
    few, many = (
        stored_step(True, depth, method).memory_analysis().temp_size_in_bytes for depth in (2, 6)
    )
    assert many - few < 4 * WIDTH * WIDTH * 4 // 4, f"{(many - few) / 4:.0f} bytes for each layer"

"""Every kind of layer, wrapped by hand and by an interceptor."""

import dataclasses
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from helpers import (
    RANK,
    WRAPPERS,
    Adapt,
    assert_close,
    assert_rounded,
    check_adapts,
    expected_kernel,
    initialise,
    intercepting,
    key_of,
    loss_of,
    numbers,
    partly_slow,
    randomised,
    shapes,
)

import peft_jax as peft


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """A layer, its arguments, and the layout of its adapter."""

    layer: nn.Module
    inputs: tuple[Any, ...]
    a: tuple[int, ...]
    b: tuple[int, ...]
    delta: str
    param: str = "kernel"
    method: Any = None


def einsum(equation, kernel, x, a, b, delta, at_call=False, **fields):
    layer = nn.Einsum(kernel, None if at_call else equation, **fields)
    inputs = (numbers(*x), equation) if at_call else (numbers(*x),)
    return Case(layer, inputs, a, b, delta)


def general(x, a, b, delta, *args, **fields):
    return Case(nn.DenseGeneral(*args, **fields), (numbers(*x),), a, b, delta)


CONV1, CONV2 = "xir,ro->xio", "xyir,ro->xyio"


def conv(x, a, b, delta, *args, **fields):
    return Case(nn.Conv(*args, **fields), (numbers(*x),), a, b, delta)


def transposed(x, a, b, delta, *args, **fields):
    return Case(nn.ConvTranspose(*args, **fields), (numbers(*x),), a, b, delta)


def lookup_and_attend(embed, ids, query):
    return embed(ids), embed.attend(query)


IDS = jnp.asarray([[0, 3, 6], [6, 1, 0]])
TRIANGLE = np.tril(np.ones((3, 4, 6), np.float32))

DENSE = {
    "dense": Case(nn.Dense(5), (numbers(2, 3, 4),), (4, 2), (2, 5), "ir,ro->io"),
    "dense on a vector": Case(nn.Dense(5), (numbers(4),), (4, 2), (2, 5), "ir,ro->io"),
    "dense, square, no bias": Case(
        nn.Dense(4, use_bias=False), (numbers(3, 4),), (4, 2), (2, 4), "ir,ro->io"
    ),
    "dense, one feature": Case(nn.Dense(1), (numbers(3, 1),), (1, 2), (2, 1), "ir,ro->io"),
    "dense, many tokens": Case(nn.Dense(3), (numbers(40, 4),), (4, 2), (2, 3), "ir,ro->io"),
}
EINSUM = {
    "heads out": einsum("btd,dnh->btnh", (4, 3, 5), (2, 3, 4), (4, 2), (2, 3, 5), "dr,rnh->dnh"),
    "heads in": einsum("btnh,nhd->btd", (3, 5, 4), (2, 2, 3, 5), (3, 5, 2), (2, 4), "nhr,rd->nhd"),
    "at call": einsum(
        "btd,dnh->btnh", (4, 3, 5), (2, 3, 4), (4, 2), (2, 3, 5), "dr,rnh->dnh", at_call=True
    ),
    "at call, spaces, ellipsis": einsum(
        "... d, df -> ... f", (4, 5), (2, 3, 4), (4, 2), (2, 5), "dr,rf->df", at_call=True
    ),
    "stacked outputs": einsum(
        "btd,cdf->cbtf", (2, 4, 5), (2, 3, 4), (4, 2), (2, 2, 5), "dr,rcf->cdf", use_bias=False
    ),
    "batch axis": einsum("bnd,ndh->bnh", (3, 4, 5), (2, 3, 4), (3, 4, 2), (2, 5), "ndr,rh->ndh"),
    "batch axis last, order kept": einsum(
        "bgi,iog->bgo", (4, 5, 3), (2, 3, 4), (4, 3, 2), (2, 5), "igr,ro->iog", use_bias=False
    ),
    "batch axis moved": einsum(
        "bnd,ndh->nbh", (3, 4, 5), (2, 3, 4), (3, 4, 2), (2, 5), "ndr,rh->ndh", use_bias=False
    ),
    "two batch axes, all square": einsum(
        "bnmd,nmdh->bnmh",
        (2, 2, 2, 2),
        (2, 2, 2, 2),
        (2, 2, 2, 2),
        (2, 2),
        "nmdr,rh->nmdh",
        use_bias=False,
    ),
    "kernel alone": einsum(
        "bi,iok->bo", (4, 5, 3), (2, 4), (4, 2), (2, 5, 3), "ir,rok->iok", use_bias=False
    ),
    "kernel alone, first": einsum(
        "bi,kio->bo", (3, 4, 5), (2, 4), (4, 2), (2, 3, 5), "ir,rko->kio", use_bias=False
    ),
    "the letter r": einsum("br,ro->bo", (4, 5), (2, 4), (4, 2), (2, 5), "ra,ao->ro"),
    "capitals": einsum("BTR,RO->BTO", (4, 5), (2, 3, 4), (4, 2), (2, 5), "Rr,rO->RO"),
    "output turned": einsum(
        "bi,io->ob", (4, 5), (2, 4), (4, 2), (2, 5), "ir,ro->io", use_bias=False
    ),
    "tokens summed": einsum(
        "bti,io->bo", (4, 5), (2, 3, 4), (4, 2), (2, 5), "ir,ro->io", use_bias=False
    ),
    "tokens in the middle": einsum("bti,io->bto", (4, 4), (4, 4, 4), (4, 2), (2, 4), "ir,ro->io"),
    # jnp.einsum stretches axes of length one.
    "a batch axis of one in the kernel": einsum(
        "bnd,ndh->bnh", (1, 4, 5), (2, 3, 4), (1, 4, 2), (2, 5), "ndr,rh->ndh", use_bias=False
    ),
    "a batch axis of one in the input": einsum(
        "bnd,ndh->bnh", (3, 4, 5), (2, 1, 4), (3, 4, 2), (2, 5), "ndr,rh->ndh", use_bias=False
    ),
    "no input axis": einsum(
        "b,do->bdo", (4, 5), (3,), (2,), (2, 4, 5), "r,rdo->do", use_bias=False
    ),
    "no output axis": einsum(
        "bij,ij->b", (4, 5), (3, 4, 5), (4, 5, 2), (2,), "ijr,r->ij", use_bias=False
    ),
    "batch axes alone": einsum(
        "bij,ij->bij", (4, 5), (3, 4, 5), (4, 5, 2), (2,), "ijr,r->ij", use_bias=False
    ),
}
DENSE_GENERAL = {
    "features 5": general((2, 3, 4), (4, 2), (2, 5), "ir,ro->io", 5),
    "several features": general((2, 3, 4), (4, 2), (2, 3, 5), "ir,rno->ino", (3, 5)),
    "several axes": general((2, 3, 4), (3, 4, 2), (2, 5), "ijr,ro->ijo", features=5, axis=(-2, -1)),
    # Flax sorts the axes, whatever their order.
    "axes turned": general((2, 3, 4), (3, 4, 2), (2, 5), "ijr,ro->ijo", features=5, axis=(-1, 1)),
    "axes turned, square": general(
        (2, 3, 3), (3, 3, 2), (2, 5), "ijr,ro->ijo", features=5, axis=(2, 1)
    ),
    "an axis in the middle": general((2, 3, 4), (3, 2), (2, 5), "ir,ro->io", features=5, axis=1),
    "axes around": general(
        (2, 3, 4), (2, 4, 2), (2, 5, 3), "ijr,rop->ijop", features=[5, 3], axis=[0, -1]
    ),
    "every axis": general((3, 4), (3, 4, 2), (2, 5), "ijr,ro->ijo", 5, axis=(0, 1)),
    "batch": general((2, 3, 4), (2, 4, 2), (2, 2, 5), "gir,gro->gio", features=5, batch_dims=(0,)),
    "batch, axis in the middle": general(
        (2, 3, 4), (2, 3, 2), (2, 2, 5), "gir,gro->gio", features=5, axis=(1,), batch_dims=(0,)
    ),
    "two batch axes": general(
        (2, 3, 4, 5),
        (2, 3, 4, 2),
        (2, 3, 2, 2, 3),
        "ghir,ghrop->ghiop",
        features=(2, 3),
        axis=-2,
        batch_dims=(0, 1),
    ),
    "numbers of numpy": general(
        (2, 3, 4),
        (2, 4, 2),
        (2, 2, 5),
        "gir,gro->gio",
        np.int64(5),
        axis=np.int64(-1),
        batch_dims=0,
    ),
    "batch axes turned": general(
        (2, 3, 4, 5),
        (2, 3, 5, 2),
        (2, 3, 2, 6),
        "ghir,ghro->ghio",
        features=6,
        batch_dims=(1, 0),
    ),
}
CONV = {
    "conv 1d": conv((2, 8, 4), (3, 4, 2), (2, 6), CONV1, 6, (3,)),
    "conv 1d, window an integer": conv((2, 8, 4), (3, 4, 2), (2, 6), CONV1, 6, 3),
    "conv 2d": conv((2, 5, 6, 4), (3, 2, 4, 2), (2, 6), CONV2, 6, (3, 2)),
    "conv 3d, window 1": conv(
        (1, 2, 3, 2, 4), (1, 1, 1, 4, 2), (2, 6), "xyzir,ro->xyzio", 6, (1, 1, 1)
    ),
    "one example": conv((8, 4), (3, 4, 2), (2, 6), CONV1, 6, (3,)),
    "several batch axes": conv((2, 3, 8, 4), (3, 4, 2), (2, 6), CONV1, 6, (3,)),
    "strides, dilation": conv(
        (2, 9, 8, 4),
        (3, 2, 4, 2),
        (2, 6),
        CONV2,
        6,
        (3, 2),
        strides=(2, 1),
        kernel_dilation=2,
        use_bias=False,
    ),
    "input dilation": conv(
        (2, 8, 4), (3, 4, 2), (2, 6), CONV1, 6, (3,), input_dilation=2, strides=None, padding=1
    ),
    "groups": conv((2, 8, 4), (3, 2, 2), (2, 6), CONV1, 6, (3,), feature_group_count=2),
    "groups, strides, 2d": conv(
        (2, 6, 5, 4),
        (3, 3, 2, 2),
        (2, 6),
        CONV2,
        6,
        (3, 3),
        feature_group_count=2,
        strides=2,
        padding="VALID",
    ),
    "depthwise": conv((2, 8, 4), (3, 1, 2), (2, 8), CONV1, 8, (3,), feature_group_count=4),
    "circular": conv((2, 8, 4), (4, 4, 2), (2, 6), CONV1, 6, (4,), padding="CIRCULAR"),
    "reflect": conv((2, 8, 4), (3, 4, 2), (2, 6), CONV1, 6, (3,), padding="REFLECT"),
    "causal, dilated": conv(
        (2, 8, 4), (3, 4, 2), (2, 6), CONV1, 6, (3,), padding="CAUSAL", kernel_dilation=2
    ),
    "valid": conv((2, 8, 4), (3, 4, 2), (2, 6), CONV1, 6, (3,), padding="VALID"),
    "padding in numbers": conv(
        (2, 8, 7, 4), (3, 2, 4, 2), (2, 6), CONV2, 6, (3, 2), padding=((2, 0), 1)
    ),
    "mask": conv((2, 8, 4), (3, 4, 2), (2, 6), CONV1, 6, (3,), mask=TRIANGLE),
}
CONV_TRANSPOSE = {
    "transposed": transposed((2, 5, 4), (3, 4, 2), (2, 6), CONV1, 6, (3,)),
    "transposed, strides": transposed(
        (2, 5, 4, 4), (3, 2, 4, 2), (2, 6), CONV2, 6, (3, 2), strides=(2, 3), padding="VALID"
    ),
    "transposed, dilation": transposed(
        (2, 5, 4), (3, 4, 2), (2, 6), CONV1, 6, 3, kernel_dilation=2
    ),
    "transposed, circular": transposed(
        (2, 6, 4), (3, 4, 2), (2, 6), CONV1, 6, (3,), strides=(2,), padding="CIRCULAR"
    ),
    "transposed, mask": transposed((2, 5, 4), (3, 4, 2), (2, 6), CONV1, 6, (3,), mask=TRIANGLE),
    "transposed kernel": transposed(
        (2, 5, 4), (3, 4, 2), (2, 6), "xir,ro->xoi", 6, (3,), transpose_kernel=True, strides=(2,)
    ),
}
EMBED = {
    "embed": Case(nn.Embed(7, 5), (IDS,), (7, 2), (2, 5), "vr,rf->vf", "embedding"),
    "one id": Case(nn.Embed(7, 5), (IDS[0, 1],), (7, 2), (2, 5), "vr,rf->vf", "embedding"),
    "vocabulary of one": Case(nn.Embed(1, 5), (IDS,), (1, 2), (2, 5), "vr,rf->vf", "embedding"),
    "attend": Case(
        nn.Embed(7, 5), (numbers(2, 5),), (7, 2), (2, 5), "vr,rf->vf", "embedding", nn.Embed.attend
    ),
    "lookup and attend": Case(
        nn.Embed(7, 5),
        (IDS, numbers(2, 3, 5)),
        (7, 2),
        (2, 5),
        "vr,rf->vf",
        "embedding",
        lookup_and_attend,
    ),
}
CASES = DENSE | EINSUM | DENSE_GENERAL | CONV | CONV_TRANSPOSE | EMBED
# One of each kind, where every case would say no more.
KINDS = {
    name: CASES[name]
    for name in (
        "dense",
        "heads in",
        "batch axis",
        "two batch axes",
        "groups",
        "mask",
        "transposed",
        "transposed kernel",
        "lookup and attend",
    )
}
every_kind = pytest.mark.parametrize("case", KINDS.values(), ids=KINDS)
some_kinds = pytest.mark.parametrize(
    "case", partly_slow(KINDS, ("dense", "two batch axes", "groups"))
)
QUICK = {
    *KINDS,
    "dense on a vector",
    "at call, spaces, ellipsis",
    "batch axis moved",
    "kernel alone",
    "a batch axis of one in the kernel",
    "no output axis",
    "batch axes alone",
    "axes around",
    "numbers of numpy",
    "strides, dilation",
    "circular",
    "causal, dilated",
    "transposed, strides",
}
every_case = pytest.mark.parametrize("case", partly_slow(CASES, QUICK))


def wrapped(case, **fields):
    return WRAPPERS[type(case.layer)](**{"rank": RANK, "wrapped": case.layer, **fields})


def apply(model, params, case, rule=None, **kwargs):
    with intercepting(rule):
        return model.apply({"params": params}, *case.inputs, method=case.method, **kwargs)


# --- The contract --------------------------------------------------------------------------------


@every_case
def test_layout_identity_gradients_and_fusion(case):
    found = check_adapts(
        case.layer,
        Adapt(alpha=3),
        *case.inputs,
        method=case.method,
        compare_gradients=case in KINDS.values(),
    )
    assert found.params["lora"].keys() == {"a", "b"}
    assert found.params["lora"]["a"].shape == case.a
    assert found.params["lora"]["b"].shape == case.b
    chex.assert_trees_all_equal(found.params["lora"]["b"], jnp.zeros(case.b))
    assert np.all(np.asarray(found.params["lora"]["a"]) != 0)

    assert found.specs.keys() == {"lora"}
    spec = found.specs["lora"]
    assert (spec.param, spec.rank, spec.scaling, spec.alpha) == (case.param, RANK, 1.5, 3)
    assert spec.stack_axes == ()
    expected = expected_kernel(found.params[case.param], found.random["lora"], case.delta, 1.5)
    assert_rounded(found.fused[case.param], expected, RANK)


@pytest.mark.optimized
@every_kind
def test_gradients_at_full_optimization(case):
    """XLA's own level of optimization, at which users compile, changes no gradient."""
    model = wrapped(case, alpha=3)
    base, lora = peft.split_params(initialise(model, *case.inputs, method=case.method)["params"])
    random, x = randomised(lora), case.inputs[0]

    def gradient(lora, x):
        inputs = (x, *case.inputs[1:])
        params = peft.merge_params(base, lora)
        return loss_of(model.apply({"params": params}, *inputs, method=case.method))

    quick = {"xla_backend_optimization_level": 0}
    found, expected = (
        jax.jit(jax.grad(gradient), compiler_options=options)(random, x)
        for options in (None, quick)
    )
    assert_close(found, expected)


@some_kinds
def test_a_wrapper_by_hand_is_the_interceptors(case):
    """The same parameters at the same paths, and the same outputs, bit for bit."""
    by_hand, rule = wrapped(case, alpha=3), Adapt(alpha=3)

    @jax.jit
    def both():
        params = initialise(by_hand, *case.inputs, method=case.method)["params"]
        found = initialise(case.layer, *case.inputs, rule=rule, method=case.method)["params"]
        base, lora = peft.split_params(params)
        random = peft.merge_params(base, randomised(lora))
        return (params, apply(by_hand, random, case)), (
            found,
            apply(case.layer, random, case, rule),
        )

    chex.assert_trees_all_equal(*both())
    with peft.ModuleInterceptor(rule):
        specs = peft.lora_specs(case.layer, *case.inputs, method=case.method)
    assert peft.lora_specs(by_hand, *case.inputs, method=case.method) == specs


@some_kinds
def test_a_wrapper_inside_a_model(case):
    """In `@nn.compact`, in `setup` and as a field, paths are those of the plain model."""
    fields = {
        field.name: getattr(case.layer, field.name)
        for field in dataclasses.fields(case.layer)
        if field.name not in ("parent", "name")
    }
    run = case.method or (lambda layer, *args: layer(*args))

    def make(rank, **named):
        layer = type(case.layer)(**fields, **named)
        return layer if rank is None else wrapped(case, wrapped=layer, rank=rank)

    class Setup(nn.Module):
        rank: int | None

        def setup(self):
            self.layer = make(self.rank)

        def __call__(self, *args):
            return run(self.layer, *args)

    class Model(nn.Module):
        rank: int | None
        field: nn.Module

        @nn.compact
        def __call__(self, *args):
            layers = (make(self.rank), make(self.rank, name="named"), self.field)
            return *(run(layer, *args) for layer in layers), Setup(self.rank)(*args)

    plain, model = (Model(rank, make(rank)) for rank in (None, RANK))
    found = check_adapts(model, None, *case.inputs, plain=plain, compare_gradients=False)
    assert len(found.specs) == 4
    with peft.ModuleInterceptor(Adapt()):
        assert peft.lora_specs(plain, *case.inputs) == found.specs


@pytest.mark.parametrize(
    ("alpha", "scaling"), [(None, 1.0), (1, 0.5), (16.0, 8.0), (0, 0.0), (-2, -1.0)]
)
def test_scaling_is_alpha_over_rank(alpha, scaling):
    case = CASES["dense"]
    model = wrapped(case, alpha=alpha)
    params = initialise(model, *case.inputs)["params"]
    params["lora"] = randomised(params["lora"])
    x, a, b = case.inputs[0], params["lora"]["a"], params["lora"]["b"]
    plain = apply(case.layer, {"kernel": params["kernel"], "bias": params["bias"]}, case)
    expected = np.asarray(plain, np.float64) + scaling * (
        np.asarray(x, np.float64) @ np.asarray(a, np.float64) @ np.asarray(b, np.float64)
    )
    assert_close(apply(model, params, case), np.asarray(expected, np.float32))
    assert peft.lora_specs(model, *case.inputs)["lora"].scaling == scaling


ADAPTERS = {
    "dense": (peft.LoRADenseAdapter(rank=RANK, features=5, alpha=3), "...i,ir,ro->...o"),
    "dense, as many features": (peft.LoRADenseAdapter(rank=RANK), "...i,ir,ro->...o"),
    "einsum": (
        peft.LoRAEinsumAdapter(rank=RANK, einsum_str="btnh,nhd->btd", shape=(3, 4, 5), alpha=3),
        "btnh,nhr,rd->btd",
    ),
    "einsum, batch": (
        peft.LoRAEinsumAdapter(rank=RANK, einsum_str="btnh,nhd->btnd", shape=(3, 4, 5)),
        "btnh,nhr,rd->btnd",
    ),
    "dense general": (
        peft.LoRADenseGeneralAdapter(rank=RANK, features=(5, 6), axis=(-1, -2)),
        "btnh,nhr,rde->btde",
    ),
    "dense general, batch": (
        peft.LoRADenseGeneralAdapter(rank=RANK, features=5, batch_dims=(0,)),
        "btnh,bhr,brd->btnd",
    ),
}


@pytest.mark.parametrize(("adapter", "equation"), ADAPTERS.values(), ids=ADAPTERS)
def test_an_adapter_alone_is_the_product(adapter, equation):
    x = numbers(2, 2, 3, 4)
    params = adapter.init(key_of(0), x)["params"]
    assert params.keys() == {"a", "b"}
    chex.assert_trees_all_equal(params["b"], jnp.zeros_like(params["b"]))
    params = randomised(params)
    arrays = [np.asarray(array, np.float64) for array in (x, params["a"], params["b"])]
    scaling = 1.0 if adapter.alpha is None else adapter.alpha / adapter.rank
    expected = np.asarray(scaling * np.einsum(equation, *arrays), np.float32)
    assert_close(adapter.apply({"params": params}, x), expected)


@pytest.mark.parametrize("groups", [1, 2])
def test_a_conv_adapter_alone_is_a_conv_of_the_delta(groups):
    x = numbers(2, 8, 4)
    fields = {"features": 6, "kernel_size": (3,), "feature_group_count": groups, "padding": "SAME"}
    adapter = peft.LoRAConvAdapter(rank=RANK, alpha=1, **fields)
    params = randomised(adapter.init(key_of(0), x)["params"])
    kernel = 0.5 * jnp.einsum("xir,ro->xio", params["a"], params["b"])
    expected = nn.Conv(**fields, use_bias=False).apply({"params": {"kernel": kernel}}, x)
    assert_close(adapter.apply({"params": params}, x), expected)


def test_an_embed_adapter_alone_looks_up_and_attends():
    adapter = peft.LoRAEmbedAdapter(rank=RANK, num_embeddings=7, features=5, alpha=1)
    params = randomised(adapter.init(key_of(0), IDS)["params"])
    table = 0.5 * params["a"] @ params["b"]
    query = numbers(3, 5)
    assert_close(adapter.apply({"params": params}, IDS), table[IDS])
    assert_close(adapter.apply({"params": params}, query, method="attend"), query @ table.T)


def test_an_adapter_written_beside_a_layer():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(4)(x) + peft.LoRADenseAdapter(rank=3)(x)

    x = numbers(2, 4)
    params = Model().init(key_of(0), x)["params"]
    base, lora = peft.split_params(params)
    assert shapes(base) == {"Dense_0": {"bias": (4,), "kernel": (4, 4)}}
    assert shapes(lora) == {"LoRADenseAdapter_0": {"a": (4, 3), "b": (3, 4)}}
    plain = nn.Dense(4).apply({"params": base["Dense_0"]}, x)
    chex.assert_trees_all_equal(Model().apply({"params": params}, x), plain)


# --- Dtypes --------------------------------------------------------------------------------------


def with_fields(case, **fields):
    return dataclasses.replace(case, layer=case.layer.clone(**fields))


@pytest.mark.parametrize("stored", [jnp.float32, jnp.bfloat16])
@some_kinds
def test_bfloat16_stays(case, stored):
    """The output keeps the layer's dtype, the adapter has its own, and nothing is float64."""
    case = with_fields(case, dtype=jnp.bfloat16, param_dtype=stored)
    if case.layer.__dict__.get("mask") is not None:
        case = with_fields(case, mask=case.layer.mask.astype(stored))
    model = wrapped(case, alpha=3)
    specs = peft.lora_specs(model, *case.inputs, method=case.method)

    @jax.jit
    def everything():
        base, lora = peft.split_params(
            initialise(model, *case.inputs, method=case.method)["params"]
        )
        params = peft.merge_params(base, randomised(lora))
        fused = peft.fuse_params(params, specs=specs)
        outputs = [apply(case.layer, base, case), apply(model, params, case)]
        return base, lora, fused, *outputs, apply(case.layer, fused, case)

    base, lora, fused, plain, adapted, on_fused = everything()
    assert dtypes((base, fused)) == {jnp.dtype(stored)}
    assert dtypes(lora) == {jnp.dtype(jnp.float32)}
    assert dtypes((plain, adapted, on_fused)) == {jnp.dtype(jnp.bfloat16)}
    # The two round at different places, by 2^-9 of each number.
    assert_close(adapted, on_fused, 2e-2)


def dtypes(tree):
    return {leaf.dtype for leaf in jax.tree.leaves(tree)}


@pytest.mark.parametrize("name", ["dense", "heads in", "several axes", "conv 1d", "embed"])
def test_param_dtype_and_dtype_are_the_adapters_own(name):
    case = CASES[name]
    model = wrapped(case, param_dtype=jnp.bfloat16, dtype=jnp.bfloat16)
    params = initialise(model, *case.inputs)["params"]
    assert {leaf.dtype for leaf in params["lora"].values()} == {jnp.dtype(jnp.bfloat16)}
    assert params[case.param].dtype == jnp.float32
    params["lora"] = randomised(params["lora"])
    y = apply(model, params, case)
    assert y.dtype == jnp.float32
    specs = peft.lora_specs(model, *case.inputs)
    on_fused = apply(case.layer, peft.fuse_params(params, specs=specs), case)
    plain = apply(case.layer, peft.split_params(params).original, case)
    assert_close(y - plain, on_fused - plain, 2e-2)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_inputs_of_half_width_promote_as_the_layer_promotes(dtype):
    """Without `dtype`, Flax promotes the input to the kernel's dtype; so does the adapter."""
    x = numbers(2, 4).astype(dtype)
    model = peft.LoRADense(rank=RANK, wrapped=nn.Dense(5))
    with jax.numpy_dtype_promotion("standard"):
        y = model.apply(model.init(key_of(0), x), x)
        assert y.dtype == nn.Dense(5).init_with_output(key_of(0), x)[0].dtype


# --- Dropout -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dense", "heads in", "batch", "groups", "transposed", "embed"])
def test_dropout_by_the_usual_rules(name):
    """On with a "dropout" rng, off without one or with `deterministic`; unbiased."""
    case = CASES[name]
    model = wrapped(case, dropout=0.5)
    params = initialise(model, *case.inputs)["params"]
    params["lora"] = randomised(params["lora"])
    off = apply(wrapped(case), params, case)
    chex.assert_trees_all_equal(apply(model, params, case), off)
    rngs = {"dropout": key_of(2)}
    on = apply(model, params, case, rngs=rngs)
    assert np.any(np.asarray(on != off))
    chex.assert_trees_all_equal(apply(model, params, case, rngs=rngs), on)
    chex.assert_trees_all_equal(apply(model, params, case, rngs=rngs, deterministic=True), off)
    field_off = wrapped(case, dropout=0.5, deterministic=True)
    chex.assert_trees_all_equal(apply(field_off, params, case, rngs=rngs), off)
    chex.assert_trees_all_equal(apply(field_off, params, case, rngs=rngs, deterministic=False), on)
    with pytest.raises(Exception, match="dropout"):
        apply(model, params, case, deterministic=False)


def test_dropout_is_unbiased_and_drops_inputs_at_its_rate():
    """With `a` and `b` the identity, the adapter's output is the dropped input."""
    model = peft.LoRADenseAdapter(rank=50, dropout=0.2)
    x = jnp.ones((200, 50))
    params = {"a": jnp.eye(50), "b": jnp.eye(50)}
    y = np.asarray(model.apply({"params": params}, x, rngs={"dropout": key_of(0)}))
    assert set(np.unique(y)) == {0.0, np.float32(1.25)}
    assert abs(np.mean(y == 0) - 0.2) < 0.02


def test_the_bases_dropout_masks_stay_bit_for_bit():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dropout(0.5, deterministic=False)(nn.Dense(6)(x))
            x = nn.Dense(6, name="last")(x)
            noise = jax.random.normal(self.make_rng("noise"), x.shape)
            return nn.Dropout(0.5, deterministic=False)(x), noise

    x = numbers(3, 4)
    rngs = {"dropout": key_of(1), "noise": key_of(2)}

    @jax.jit
    def run(params):
        return Model().apply({"params": params}, x, rngs=rngs)

    def init(rule):
        with intercepting(rule):
            return jax.jit(lambda: Model().init({"params": key_of(0), **rngs}, x))()["params"]

    params = init(None)
    plain = run(params)
    for rule in (Adapt(), Adapt(dropout=0.5)):
        adapted = init(rule)
        chex.assert_trees_all_equal(peft.split_params(adapted).original, params)
        with peft.ModuleInterceptor(rule):
            chex.assert_trees_all_equal(run(adapted), plain)


def test_two_layers_drop_by_masks_of_their_own():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(50)(x), nn.Dense(50)(x)

    x = jnp.ones((1, 50))
    with peft.ModuleInterceptor(Adapt(rank=50, dropout=0.5)):
        params = Model().init(key_of(0), x)["params"]
        for layer in params.values():
            layer["kernel"] = jnp.zeros((50, 50))
            layer["lora"] = {"a": jnp.eye(50), "b": jnp.eye(50)}
        first, second = Model().apply({"params": params}, x, rngs={"dropout": key_of(0)})
    assert np.any(np.asarray(first != second))


# --- Initial values ------------------------------------------------------------------------------


def fill(value):
    return lambda key, shape, dtype: jnp.full(shape, value, dtype)


@every_kind
def test_initializers_are_the_users(case):
    model = wrapped(case, a_init=fill(2.0), b_init=fill(3.0))
    lora = initialise(model, *case.inputs, method=case.method)["params"]["lora"]
    chex.assert_trees_all_equal(lora, {"a": jnp.full(case.a, 2.0), "b": jnp.full(case.b, 3.0)})


FAN_IN = {
    "dense": (nn.Dense(3), numbers(2, 300), 300),
    "einsum, two input axes": (
        nn.Einsum((20, 15, 3), "bnh,nhd->bd"),
        numbers(2, 20, 15),
        300,
    ),
    "einsum, a batch axis": (nn.Einsum((40, 15, 3), "bnh,nhd->bnd"), numbers(2, 40, 15), 15),
    "einsum, the batch axis last": (
        nn.Einsum((15, 3, 40), "bnh,hdn->bnd", use_bias=False),
        numbers(2, 40, 15),
        15,
    ),
    "dense general, batch": (nn.DenseGeneral(3, batch_dims=(0,)), numbers(40, 2, 15), 15),
    "conv": (nn.Conv(3, (3, 5)), numbers(1, 6, 6, 20), 300),
    "conv, groups": (nn.Conv(4, (3, 5), feature_group_count=2), numbers(1, 6, 6, 40), 300),
    "embed": (nn.Embed(300, 3), IDS, 300),
}


@pytest.mark.parametrize(("layer", "x", "fan_in"), FAN_IN.values(), ids=FAN_IN)
def test_fan_in_counts_input_axes_only(layer, x, fan_in):
    """`a` is uniform with the variance 2 / fan-in: bounded by ``sqrt(6 / fan_in)``."""
    model = WRAPPERS[type(layer)](rank=16, wrapped=layer)
    a = np.asarray(model.init(key_of(0), x)["params"]["lora"]["a"])
    bound = np.sqrt(6 / fan_in)
    assert np.max(np.abs(a)) <= bound
    assert np.max(np.abs(a)) > 0.97 * bound
    assert abs(np.var(a) / (2 / fan_in) - 1) < 0.15


def test_batch_indices_draw_by_themselves():
    layer = nn.Einsum((3, 4, 5), "bnd,ndh->bnh")
    a = initialise(peft.LoRAEinsum(rank=2, wrapped=layer), numbers(2, 3, 4))["params"]["lora"]["a"]
    assert len(np.unique(np.asarray(a))) == a.size


# --- Partitioning --------------------------------------------------------------------------------


def partitioned(*names):
    return nn.with_partitioning(nn.initializers.lecun_normal(), names)


def logical(*names):
    return nn.with_logical_partitioning(nn.initializers.lecun_normal(), names)


@pytest.mark.parametrize("boxed", [partitioned, logical])
@pytest.mark.parametrize("by_hand", [True, False])
def test_partitioning_carries_over(boxed, by_hand):
    layers = {
        "dense": (nn.Dense(5, kernel_init=boxed("in", "out")), numbers(2, 4)),
        "einsum": (
            nn.Einsum((3, 4, 5), "btnh,nhd->btnd", kernel_init=boxed("heads", "in", "out")),
            numbers(2, 2, 3, 4),
        ),
        "conv": (nn.Conv(5, (3,), kernel_init=boxed(None, "in", "out")), numbers(2, 6, 4)),
        "embed": (nn.Embed(7, 5, embedding_init=boxed("vocab", "embed")), IDS),
    }
    expected = {
        "dense": (("in", None), (None, "out")),
        "einsum": (("heads", "in", None), (None, "out")),
        "conv": ((None, "in", None), (None, "out")),
        "embed": (("vocab", None), (None, "embed")),
    }
    for name, (layer, x) in layers.items():
        model = WRAPPERS[type(layer)](rank=RANK, wrapped=layer) if by_hand else layer
        rule = None if by_hand else Adapt()
        params = initialise(model, x, rule=rule)["params"]
        kernel = params["embedding" if name == "embed" else "kernel"]
        for leaf, names in zip(("a", "b"), expected[name], strict=True):
            box = params["lora"][leaf]
            assert type(box) is type(kernel), name
            assert box.names == names, name
        with intercepting(rule):
            fused = peft.fuse_params(params, specs=peft.lora_specs(model, x))
        chex.assert_trees_all_equal(fused, peft.split_params(params).original)


@pytest.mark.parametrize("boxed", [partitioned, logical])
@pytest.mark.parametrize("axis", [0, 1])  # Flax itself misplaces the name for -1
def test_partitioning_carries_over_under_scan(boxed, axis):
    class Body(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.Dense(4, kernel_init=boxed("in", "out"), name="dense")(x), None

    stack = nn.scan(
        Body,
        variable_axes={"params": axis},
        split_rngs={"params": True},
        length=3,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )
    found = check_adapts(stack(), Adapt(), numbers(2, 4), None)
    dense = found.params["dense"]
    names = {"kernel": ["in", "out"], "a": ["in", None], "b": [None, "out"]}
    for name, expected in names.items():
        expected.insert(axis, "layers")
        box = dense["kernel"] if name == "kernel" else dense["lora"][name]
        assert box.names == tuple(expected), name
    assert jax.tree.leaves(dense["lora"]["a"])[0].shape[axis] == 3


def test_partition_specs_of_the_adapted_tree():
    layer = nn.Dense(5, kernel_init=partitioned("in", "out"))
    params = initialise(layer, numbers(2, 4), rule=Adapt())["params"]
    specs = nn.get_partition_spec(params)
    assert specs["lora"] == {
        "a": jax.sharding.PartitionSpec("in", None),
        "b": jax.sharding.PartitionSpec(None, "out"),
    }
    assert specs["kernel"] == jax.sharding.PartitionSpec("in", "out")


# --- Products of the layer's own -----------------------------------------------------------------


def twice(product):
    return lambda *args, **kwargs: 2 * product(*args, **kwargs)


def halved(*arrays, **kwargs):
    return [None if array is None else array / 2 for array in arrays]


INJECTED = {
    "dot_general": (nn.Dense(5, dot_general=twice(jax.lax.dot_general)), (2, 4)),
    "dot_general_cls": (
        nn.DenseGeneral(5, dot_general_cls=lambda: twice(jax.lax.dot_general)),
        (2, 4),
    ),
    "promote_dtype": (nn.Einsum((4, 5), "...i,io->...o", promote_dtype=halved), (2, 4)),
    "conv_general_dilated": (
        nn.Conv(3, (2,), conv_general_dilated=twice(jax.lax.conv_general_dilated)),
        (2, 5, 4),
    ),
}


@pytest.mark.parametrize(("layer", "shape"), INJECTED.values(), ids=INJECTED)
def test_an_injected_product_stays_the_layers_own(layer, shape):
    """The adapter joins the weight, for what is beside an unknown product would not be scaled."""
    check_adapts(layer, Adapt(), numbers(*shape))

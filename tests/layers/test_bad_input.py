"""Bad input: a `ValueError` with the rule, the value, the path and the remedy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from helpers import RANK, Adapt, initialise, key_of, numbers

import peft_jax as peft

X = numbers(2, 3, 4)
WRAPPERS = {
    "LoRADense": (peft.LoRADense, lambda: nn.Dense(5)),
    "LoRAEinsum": (peft.LoRAEinsum, lambda: nn.Einsum((4, 5), "btd,df->btf")),
    "LoRADenseGeneral": (peft.LoRADenseGeneral, lambda: nn.DenseGeneral(5)),
    "LoRAConv": (peft.LoRAConv, lambda: nn.Conv(5, (3,))),
    "LoRAEmbed": (peft.LoRAEmbed, lambda: nn.Embed(7, 5)),
    "LoRAWeight": (peft.LoRAWeight, lambda: nn.Dense(5)),
}
every_wrapper = pytest.mark.parametrize("name", WRAPPERS)
FIELDS = [
    *(("rank", value) for value in (0, -1, 2.0, 2.5, True, "2", None, (2,), float("nan"))),
    *(("alpha", value) for value in ("8", True, (8,), float("nan"), float("inf"), 1j)),
    *(("dropout", value) for value in (-0.1, 1.0, 2, "0.1", None, True, float("nan"))),
]


@pytest.mark.parametrize(("field", "value"), FIELDS, ids=str)
def test_fields_of_adapters_and_wrappers(field, value):
    """Refused when the wrapper or the adapter is built, with its name, the field and the value."""
    for name, (wrapper, layer) in WRAPPERS.items():
        with pytest.raises(ValueError, match=rf"{name}\.{field}") as error:
            wrapper(**{"rank": RANK, field: value}, wrapped=layer())
        assert repr(value) in str(error.value)
    with pytest.raises(ValueError, match=rf"LoRADenseAdapter\.{field}"):
        peft.LoRADenseAdapter(**{"rank": RANK, field: value})


@pytest.mark.parametrize("rank", [1, np.int64(2), np.int32(3)])
def test_ranks_that_are_integers(rank):
    a = initialise(peft.LoRADense(rank=rank, wrapped=nn.Dense(5)), X)["params"]["lora"]["a"]
    assert a.shape == (4, int(rank))


def test_a_rank_beyond_the_layers():
    """A rank above the layer's sizes wastes parameters, but is no error."""
    params = initialise(peft.LoRADense(rank=9, wrapped=nn.Dense(5)), X)["params"]
    assert params["lora"]["b"].shape == (9, 5)


@every_wrapper
@pytest.mark.parametrize("wrapped", [nn.Dense, None, "dense"], ids=str)
def test_what_is_wrapped_is_a_module(name, wrapped):
    with pytest.raises(ValueError, match=rf"{name}\.wrapped is the module to wrap"):
        WRAPPERS[name][0](rank=RANK, wrapped=wrapped)


PRODUCTS = {"LoRADense", "LoRAEinsum", "LoRADenseGeneral"}


@pytest.mark.parametrize("name", [name for name in WRAPPERS if name != "LoRAWeight"])
@pytest.mark.parametrize("of", [name for name in WRAPPERS if name != "LoRAWeight"])
def test_a_wrapper_of_another_kind_of_layer(name, of):
    """Refused with the names of both and of the wrapper that fits; all products are one kind."""
    wrapper, layer = WRAPPERS[name][0], WRAPPERS[of][1]()
    if name == of or {name, of} <= PRODUCTS:
        wrapper(rank=RANK, wrapped=layer)
        return
    remedy = "LoRADense" if of in PRODUCTS else of
    with pytest.raises(ValueError, match=rf"{name} adapts.*not {type(layer).__name__}.*{remedy}"):
        wrapper(rank=RANK, wrapped=layer)


class Unknown(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x @ self.param("w", nn.initializers.ones, (4, 4))


@pytest.mark.parametrize("name", [name for name in WRAPPERS if name != "LoRAWeight"])
@pytest.mark.parametrize("module", [Unknown(), nn.LayerNorm(), nn.ConvLocal(3, (2,))], ids=type)
def test_an_unknown_module(name, module):
    cls = type(module).__name__
    with pytest.raises(
        ValueError, match=rf"{name} .*{cls} is not registered.*register_layer\({cls}.*LoRAWeight"
    ):
        WRAPPERS[name][0](rank=RANK, wrapped=module)


EQUATIONS = {
    "an ellipsis in the weight": ("bd,...df->bf", (4, 5), "kernel.*ellipsis"),
    "three operands": ("bd,df,f->bf", (4, 5), "two operands"),
    "one operand": ("bd->bd", (4, 5), "two operands"),
    "a letter twice in the kernel": ("bd,dd->bd", (4, 4), "'d' stands twice in the kernel"),
    "a letter twice in the output": ("bd,df->bff", (4, 5), "'f' stands twice in the output"),
    "a lost output letter": ("bd,df->bg", (4, 5), "output axis 'g'"),
    "a lost ellipsis": ("bd,df->...f", (4, 5), "ellipsis that the input lacks"),
    "no output": ("bd,df", (4, 5), "names its output"),
    "no kernel": ("bd,->bd", (), "without axes"),
    "figures for letters": ("b1,1f->bf", (4, 5), "named by letters"),
    "too few axes": ("btd,df->btf", (4, 5, 6), r"\(4, 5, 6\)"),
    "too many axes": ("btd,dnf->btnf", (4, 5), r"\(4, 5\)"),
    "an ellipsis twice": ("...d...,df->...f", (4, 5), "..."),
    "dots that are no ellipsis": ("..d,df->..f", (4, 5), "letters"),
}


@pytest.mark.parametrize(("equation", "shape", "match"), EQUATIONS.values(), ids=EQUATIONS)
def test_an_equation_without_a_delta(equation, shape, match):
    """Refused when the layer is built, with the equation."""
    for build in (
        lambda: peft.LoRAEinsum(rank=RANK, wrapped=nn.Einsum(shape, equation)),
        lambda: peft.LoRAEinsumAdapter(rank=RANK, einsum_str=equation, shape=shape),
    ):
        with pytest.raises(ValueError, match=match) as error:
            build()
        assert equation in str(error.value)


@pytest.mark.parametrize("name", ["an ellipsis in the weight", "a letter twice in the kernel"])
def test_an_equation_at_call_time(name):
    """Refused when the layer is called, before anything is stored."""
    equation, shape, match = EQUATIONS[name]
    model = peft.LoRAEinsum(rank=RANK, wrapped=nn.Einsum(shape, use_bias=False))
    with pytest.raises(ValueError, match=match):
        model.init(key_of(0), numbers(2, 4), equation)


def test_an_equation_that_is_no_string():
    with pytest.raises(ValueError, match=r"3 \(int\)|string"):
        peft.LoRAEinsumAdapter(rank=RANK, einsum_str=3, shape=(4, 5))


def test_an_einsum_without_an_equation_or_with_two():
    for declared, given in ((None, ()), ("btd,df->btf", ("btd,df->btf",))):
        model = peft.LoRAEinsum(rank=RANK, wrapped=nn.Einsum((4, 5), declared))
        with pytest.raises(ValueError, match=r"einsum_str|equation"):
            model.init(key_of(0), X, *given)


def test_an_input_that_does_not_fit_the_adapter():
    adapter = peft.LoRADenseAdapter(rank=RANK, features=5)
    params = adapter.init(key_of(0), X)
    with pytest.raises(ValueError, match=r"'a' of shape \(4, 2\).*\(6, 2\)"):
        adapter.apply(params, numbers(2, 6))
    general = peft.LoRADenseGeneralAdapter(rank=RANK, features=5, axis=-4)
    with pytest.raises(ValueError, match=r"Axis -4.*3 axes"):
        general.init(key_of(0), X)
    with pytest.raises(ValueError):
        peft.LoRAEinsumAdapter(rank=RANK, einsum_str="btd,df->btf", shape=(5, 6)).init(key_of(0), X)


class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(5, name="head")(nn.Dense(4, name="body")(x))


class Normed(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.WeightNorm(nn.Dense(5, name="head"))(x)


@pytest.mark.parametrize("model", [Model(), Normed()], ids=["plain", "weight norm"])
def test_adapters_of_another_rank(model):
    params = initialise(model, X, rule=Adapt(rank=2))["params"]
    with (
        peft.ModuleInterceptor(Adapt(rank=3)),
        pytest.raises(ValueError, match=r"head/lora|body/lora.*\(4, 2\).*rank 3"),
    ):
        model.apply({"params": params}, X)


@pytest.mark.parametrize("model", [Model(), Normed()], ids=["plain", "weight norm"])
def test_missing_adapters(model):
    params = initialise(model, X)["params"]
    with (
        peft.ModuleInterceptor(Adapt()),
        pytest.raises(ValueError, match=r"no adapter at '(head|body)/lora'.*merge_params"),
    ):
        model.apply({"params": params}, X)


@pytest.mark.parametrize("half", ["a", "b"])
def test_half_an_adapter(half):
    params = initialise(Model(), X, rule=Adapt())["params"]
    del params["head"]["lora"][half]
    with (
        peft.ModuleInterceptor(Adapt()),
        pytest.raises(ValueError, match="head"),
    ):
        Model().apply({"params": params}, X)


def test_a_name_that_is_taken():
    class Taken(nn.Module):
        @nn.compact
        def __call__(self, x):
            return x @ self.param("kernel", nn.initializers.ones, (4, 4)) + nn.Dense(
                4, name="lora"
            )(x)

    with pytest.raises(ValueError, match="'lora'"):
        peft.LoRAWeight(rank=RANK, params=["kernel"], wrapped=Taken()).init(key_of(0), X)


def test_a_wrapper_called_outside_of_a_model():
    with pytest.raises(ValueError, match=r"outside of init and apply|unbound"):
        peft.LoRADense(rank=RANK, wrapped=nn.Dense(5))(X)


def test_a_name_for_a_wrapper_of_a_named_layer():
    class Named(nn.Module):
        @nn.compact
        def __call__(self, x):
            return peft.LoRADense(rank=RANK, wrapped=nn.Dense(4, name="inner"), name="outer")(x)

    with pytest.raises(ValueError, match=r"outer.*inner"):
        Named().init(key_of(0), X)


@pytest.mark.parametrize("returned", [None, 3, nn.Dense], ids=str)
def test_a_rule_that_returns_no_module(returned):
    with (
        peft.ModuleInterceptor(lambda module: returned),
        pytest.raises(ValueError, match="replace_fn returns a module"),
    ):
        nn.Dense(5).init(key_of(0), X)


@pytest.mark.parametrize("rule", [None, 3, "rule"])
def test_a_rule_that_is_no_function(rule):
    with pytest.raises(ValueError, match="function from modules to modules"):
        peft.ModuleInterceptor(rule)


def test_a_rule_that_is_not_hashable():
    class Rule:
        __hash__ = None

        def __call__(self, module):
            return module

    with pytest.raises(ValueError, match="hashable"), peft.ModuleInterceptor(Rule()):
        pass


@pytest.mark.parametrize(
    "model",
    [nn.Dense, {"kernel": 0}, None, nn.Dense(5).bind({})],
    ids=["type", "tree", "None", "bound"],
)
def test_lora_specs_of_no_model(model):
    with pytest.raises(ValueError, match="unbound Linen module"):
        peft.lora_specs(model, X)


def test_a_mask_of_another_shape_keeps_flaxs_error():
    layer = nn.Conv(5, (3,), mask=np.ones((3, 4, 4), np.float32))
    with pytest.raises(ValueError, match="Mask"):
        peft.LoRAConv(rank=RANK, wrapped=layer).init(key_of(0), X)


@pytest.mark.parametrize("transposed", [False, True])
def test_dropout_where_the_adapter_joins_the_weight(transposed):
    """A masked kernel, or a transposed one: there is no `x·a` that dropout could act on."""
    if transposed:
        layer = nn.ConvTranspose(5, (3,), transpose_kernel=True)
    else:
        layer = nn.Conv(5, (3,), mask=np.ones((3, 4, 5), np.float32))
    model = peft.LoRAConv(rank=RANK, dropout=0.5, wrapped=layer)
    with pytest.raises(ValueError, match=r"[Dd]ropout.*0\.5"):
        model.init(key_of(0), X)


SPECS = {
    "rank": ({"rank": 0}, "rank = 0"),
    "scaling": ({"scaling": float("nan")}, "scaling = nan"),
    "equation": ({"equation": "ir,so->io"}, "ir,so->io"),
    "no equation": ({"equation": "ir"}, "'ir'"),
    "variant": ({"variant": "vera"}, "vera"),
    "param": ({"param": 3}, "param = 3"),
}


@pytest.mark.parametrize(("change", "match"), SPECS.values(), ids=SPECS)
def test_specs_that_no_adapter_has(change, match):
    good = {"param": "kernel", "equation": "ir,ro->io", "rank": 2}
    assert peft.LoraSpec.from_dict(good) == peft.LoraSpec(**good)
    with pytest.raises(ValueError, match=match):
        peft.LoraSpec(**{**good, **change})
    with pytest.raises(ValueError, match=r"unknown here.*colour"):
        peft.LoraSpec.from_dict({**good, "colour": "red"})
    with pytest.raises(ValueError, match=r"missing.*rank"):
        peft.LoraSpec.from_dict({"param": "kernel", "equation": "ir,ro->io"})


def test_nothing_is_half_done_after_an_error():
    """An exception inside leaves no rule active and no state behind."""
    params = initialise(Model(), X)["params"]
    before = Model().apply({"params": params}, X)
    with pytest.raises(ValueError, match="no adapter"), peft.ModuleInterceptor(Adapt()):
        Model().apply({"params": params}, X)
    with pytest.raises(RuntimeError, match="on purpose"), peft.ModuleInterceptor(Adapt()):
        raise RuntimeError("on purpose")
    assert jnp.array_equal(Model().apply({"params": params}, X), before)
    assert jax.tree.structure(initialise(Model(), X)["params"]) == jax.tree.structure(params)


def twice(variables):
    return jax.tree.map(lambda leaf: 2 * leaf, variables)


@pytest.mark.parametrize(
    "layer",
    [
        nn.WeightNorm(peft.LoRADense(rank=2, wrapped=nn.Dense(4))),
        nn.map_variables(peft.LoRADense, "params", trans_in_fn=twice, init=True)(
            rank=2, wrapped=nn.Dense(4)
        ),
        nn.map_variables(nn.remat(peft.LoRADense), "params", trans_in_fn=twice, init=True)(
            rank=2, wrapped=nn.Dense(4)
        ),
    ],
    ids=["a wrapper under a norm", "parameters that are mapped", "mapped around a remat"],
)
def test_adapters_where_parameters_are_not_those_that_are_stored(layer):
    with pytest.raises(ValueError, match=r"nn\.map_variables.*ModuleInterceptor"):
        layer.init(key_of(0), X)

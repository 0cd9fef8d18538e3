"""Module types that users register."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from helpers import RANK, check_adapts, initialise, numbers, shapes

import peft_jax as peft
from peft_jax._surgery import layer_kinds


@pytest.fixture(autouse=True)
def _restored():
    """Whatever a test registers is forgotten after it."""
    before = dict(layer_kinds._LAYERS)
    yield
    layer_kinds._LAYERS.clear()
    layer_kinds._LAYERS.update(before)


X = numbers(2, 3, 4)


def adapt(*types, wrapper=peft.LoRAEinsum):
    return lambda module: wrapper(rank=RANK, wrapped=module) if type(module) in types else module


def make_type(equation="btd,dnh->btnh", shape=(4, 2, 5), name="w"):
    """A new module type each time, so that nothing is known of it."""

    class Product(nn.Module):
        @nn.compact
        def __call__(self, x):
            w = self.param(name, nn.initializers.lecun_normal(), shape)
            return jnp.einsum(equation, x, w) + 1.0

    return Product


class EquationFirst(nn.Module):
    """An einsum whose equation is the first argument, its input the second."""

    shape: tuple[int, ...]

    @nn.compact
    def __call__(self, eqn, x, /, *, scale=1.0):
        w = self.param("w", nn.initializers.lecun_normal(), self.shape)
        return jnp.einsum(eqn, x * scale, w)


class Swapped(nn.Module):
    """Several arguments, of which the input is neither the first nor always given by position."""

    features: int

    @nn.compact
    def __call__(self, mask, *, hidden):
        w = self.param("w", nn.initializers.lecun_normal(), (self.features, hidden.shape[-1]))
        return jnp.einsum("...i,oi->...o", hidden, w) + mask


class Renamed(nn.Dense):
    """A subclass whose forward is its parent's."""


class Other(nn.Dense):
    """A subclass whose forward is its own."""

    def __call__(self, inputs):
        return nn.relu(super().__call__(inputs))


@pytest.mark.parametrize("wrapper", [peft.LoRAEinsum, peft.LoRADense, peft.LoRADenseGeneral])
def test_a_string(wrapper):
    cls = make_type()
    assert peft.register_layer(cls, param="w", equation="btd,dnh->btnh") is cls
    found = check_adapts(cls(), adapt(cls, wrapper=wrapper), X, compare_gradients=False)
    assert shapes(found.params) == {"w": (4, 2, 5), "lora": {"a": (4, 2), "b": (2, 2, 5)}}
    assert found.specs["lora"].param == "w"


def test_a_function_of_the_call():
    def equation(module, eqn, x, scale=1.0):
        assert isinstance(module, EquationFirst)
        return eqn

    peft.register_layer(EquationFirst, param="w", equation=equation, input="x")
    found = check_adapts(
        EquationFirst((3, 4, 5)), adapt(EquationFirst), "btd,ndh->btnh", X, compare_gradients=False
    )
    assert shapes(found.params["lora"]) == {"a": (4, 2), "b": (2, 3, 5)}


def test_a_function_for_the_input():
    """The product's input is not an argument, but made from some."""
    peft.register_layer(
        EquationFirst,
        param="w",
        equation=lambda module, eqn, x, scale=1.0: eqn,
        input=lambda module, eqn, x, scale=1.0: x * scale,
    )
    check_adapts(
        EquationFirst((4, 5)),
        adapt(EquationFirst),
        "btd,df->btf",
        X,
        scale=3.0,
        compare_gradients=False,
    )


def test_an_input_by_name():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return Swapped(5)(jnp.ones((2, 3, 5)), hidden=x)

    peft.register_layer(Swapped, param="w", equation="...i,oi->...o", input="hidden")
    found = check_adapts(Model(), adapt(Swapped), X)
    assert shapes(found.params["Swapped_0"]["lora"]) == {"a": (4, 2), "b": (2, 5)}


def test_a_type_like_another():
    x = numbers(2, 4)
    peft.register_layer(Renamed, like=nn.Dense)
    found = check_adapts(Renamed(5), adapt(Renamed, wrapper=peft.LoRADense), x)
    assert shapes(found.params["lora"]) == {"a": (4, 2), "b": (2, 5)}

    class Table(nn.Embed):
        pass

    peft.register_layer(Table, like=nn.Embed)
    ids = jnp.asarray([1, 2], jnp.int32)
    check_adapts(Table(7, 5), adapt(Table, wrapper=peft.LoRAEmbed), ids, compare_gradients=False)

    class Window(nn.Conv):
        pass

    peft.register_layer(Window, like=nn.Conv)
    model = Window(4, (3,), padding="CIRCULAR", feature_group_count=2)
    check_adapts(model, adapt(Window, wrapper=peft.LoRAConv), X, compare_gradients=False)


@pytest.mark.parametrize("cls", [Renamed, Other])
def test_a_subclass_is_not_its_parent(cls):
    """The error names both remedies; a rule with `isinstance` meets it when the model runs."""
    remedies = rf"{cls.__name__}.*register_layer\({cls.__name__}, like=nn\.Dense\).*LoRAWeight"
    with pytest.raises(ValueError, match=remedies):
        peft.LoRADense(rank=RANK, wrapped=cls(5))

    def rule(module):
        if isinstance(module, nn.Dense):
            return peft.LoRADense(rank=RANK, wrapped=module)
        return module

    with pytest.raises(ValueError, match=remedies):
        initialise(nn.Sequential([nn.Dense(4), cls(5)]), X, rule=rule)


def test_a_registered_subclass_leaves_its_own_subclasses_alone():
    class Further(Renamed):
        pass

    peft.register_layer(Renamed, like=nn.Dense)
    with pytest.raises(ValueError, match=r"like=nn.Renamed|like=Renamed"):
        peft.LoRADense(rank=RANK, wrapped=Further(5))


def test_registering_again_replaces():
    cls = make_type("btd,df->btf", (4, 5))
    peft.register_layer(cls, param="w", equation="btd,df->btf")
    first = initialise(cls(), X, rule=adapt(cls))["params"]
    assert shapes(first["lora"]) == {"a": (4, 2), "b": (2, 5)}
    cls = make_type("btd,td->bt", (3, 4))
    peft.register_layer(cls, param="kernel", equation="btd,df->btf")
    peft.register_layer(cls, param="w", equation="btd,td->bt")
    found = check_adapts(cls(), adapt(cls), X, compare_gradients=False)
    assert shapes(found.params["lora"]) == {"a": (3, 4, 2), "b": (2,)}


def test_a_lifted_class_is_the_class_inside():
    cls = make_type("btd,df->btf", (4, 4))
    peft.register_layer(cls, param="w", equation="btd,df->btf")

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.remat(cls)(name="inside")(x)

    found = check_adapts(Model(), adapt(cls), X, compare_gradients=False)
    assert found.specs.keys() == {"inside/lora"}


def test_a_registered_layer_at_its_weight_keeps_its_layout():
    cls = make_type("bnd,ndh->bnh", (3, 4, 5))
    peft.register_layer(cls, param="w", equation="bnd,ndh->bnh")
    params = initialise(peft.LoRAWeight(rank=RANK, wrapped=cls()), X)["params"]
    assert shapes(params["lora"]) == {"a": (3, 4, 2), "b": (2, 5)}


BAD = {
    "no type": (("dense",), {"equation": "...i,io->...o"}, "subclass of nn.Module.*'dense'"),
    "an instance": ((nn.Dense(4),), {"equation": "...i,io->...o"}, "subclass of nn.Module"),
    "no equation": ((Other,), {}, "Other.*needs the layer's equation"),
    "like and more": ((Other,), {"like": nn.Dense, "equation": "...i,io->...o"}, "not both"),
    "like an unknown": ((Other,), {"like": nn.LayerNorm}, "LayerNorm.*not registered.*Dense"),
    "an unknown argument": (
        (Other,),
        {"equation": "...i,io->...o", "input": "hidden"},
        r"no argument 'hidden'; it has \['inputs'\]",
    ),
    "an equation without a delta": ((Other,), {"equation": "bi,ii->bi"}, "'i' stands twice"),
    "an equation that is no string": ((Other,), {"equation": 3}, "equation"),
    "a param that is no name": (
        (Other,),
        {"equation": "...i,io->...o", "param": 3},
        "param",
    ),
}


@pytest.mark.parametrize(("args", "kwargs", "match"), BAD.values(), ids=BAD)
def test_bad_registrations_raise_and_change_nothing(args, kwargs, match):
    before = dict(layer_kinds._LAYERS)
    with pytest.raises(ValueError, match=match):
        peft.register_layer(*args, **kwargs)
    assert before == layer_kinds._LAYERS


WRONG = {
    "another parameter": ({"param": "v"}, "'v'.*does not have|no parameter 'v'"),
    "another output": ({"equation": "btd,dnh->bthn"}, r"\(2, 3, 2, 5\).*\(2, 3, 5, 2\)"),
    "another kernel": ({"equation": "btd,df->btf"}, r"\(4, 2, 5\)"),
}


@pytest.mark.parametrize(("change", "match"), WRONG.values(), ids=WRONG)
def test_a_registration_that_does_not_fit_raises(change, match):
    cls = make_type()
    peft.register_layer(cls, **{"param": "w", "equation": "btd,dnh->btnh", **change})
    with pytest.raises(ValueError, match=match):
        initialise(cls(), X, rule=adapt(cls))


def test_a_layer_that_returns_no_array_raises():
    class Pair(nn.Module):
        @nn.compact
        def __call__(self, x):
            return x @ self.param("w", nn.initializers.ones, (4, 4)), x

    peft.register_layer(Pair, param="w", equation="...i,io->...o")
    with pytest.raises(ValueError, match=r"Pair.*tuple.*LoRAWeight"):
        initialise(Pair(), X, rule=adapt(Pair))


def test_one_adapter_serves_one_layout():
    """A layer called with two equations whose deltas differ is refused, not answered wrongly."""

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            layer = nn.Einsum((4, 4, 4), name="layer", use_bias=False)
            return layer(x, "btd,dnh->btnh"), layer(x, "btd,ndh->btnh")

    with pytest.raises(ValueError, match=r"layer.*one adapter cannot serve both"):
        initialise(Model(), X, rule=adapt(nn.Einsum))

    class Same(nn.Module):
        @nn.compact
        def __call__(self, x):
            layer = nn.Einsum((4, 5), name="layer")
            return layer(x, "btd,df->btf"), layer(x[0], "td,df->tf")

    check_adapts(Same(), adapt(nn.Einsum), X, compare_gradients=False)


def test_the_equation_may_be_computed():
    """A module that builds its equation from its fields."""

    class Grouped(nn.Module):
        grouped: bool

        @nn.compact
        def __call__(self, x):
            kernel = self.param("kernel", nn.initializers.lecun_normal(), (3, 4, 5))
            return jnp.einsum(equation_of(self, x), x, kernel)

    def equation_of(module, x):
        return "bgi,gio->bgo" if module.grouped else "bti,gio->btgo"

    peft.register_layer(Grouped, equation=equation_of)
    for grouped, b in ((True, (2, 5)), (False, (2, 3, 5))):
        found = check_adapts(Grouped(grouped), adapt(Grouped), X, compare_gradients=False)
        assert found.params["lora"]["b"].shape == b
        assert np.all(np.asarray(found.random["lora"]["b"]) != 0)

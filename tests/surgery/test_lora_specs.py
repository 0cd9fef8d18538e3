"""`lora_specs`: which adapters run, told without making an array."""

import dataclasses
import json

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from helpers import key_of

import peft_jax as peft
from peft_jax import LoraSpec

KEY = key_of(0)
X = np.ones((2, 4), np.float32)


def lora(layer, **fields):
    return peft.LoRADense(rank=2, wrapped=layer, **fields)


@dataclasses.dataclass(frozen=True)
class Adapt:
    """The fitting wrapper on every layer of these types."""

    alpha: float | None = None
    types: tuple = (nn.Dense,)

    def __call__(self, module):
        if type(module) not in self.types:
            return module
        kind = {nn.Embed: peft.LoRAEmbed, nn.Conv: peft.LoRAConv}.get(type(module), peft.LoRADense)
        return kind(rank=2, alpha=self.alpha, wrapped=module)


LORA = peft.ModuleInterceptor(Adapt())
DENSE = LoraSpec("kernel", "ir,ro->io", 2)


def pattern(spec):
    """The spec's equation up to the choice of letters."""
    letters = spec.equation.replace("...", "")
    return tuple(letters.index(c) for c in letters), spec.equation.count("...")


class Written(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        assert train is True or train is False, "a Python bool must arrive as it is"
        x = lora(nn.Dense(4), alpha=8)(x)
        x = nn.BatchNorm(use_running_average=not train)(x)
        x = nn.Dropout(0.5, deterministic=not train)(x)
        if train:
            x = lora(nn.Dense(3, name="training_only"))(x)
        return x


def test_layers_written_into_the_model():
    first = {"Dense_0/lora": LoraSpec("kernel", "ir,ro->io", 2, 4.0, 8)}
    assert peft.lora_specs(Written(), X) == first
    assert peft.lora_specs(Written(), X, train=False) == first
    rngs = {"params": KEY, "dropout": KEY}
    both = first | {"training_only/lora": DENSE}
    assert peft.lora_specs(Written(), X, True, rngs=rngs) == both
    assert peft.lora_specs(Written(), X, train=True, rngs=rngs) == both


ABSTRACT = {
    "numpy": X,
    "jax": jnp.asarray(X),
    "abstract": jax.ShapeDtypeStruct((2, 4), jnp.float32),
}


@pytest.mark.parametrize("x", ABSTRACT.values(), ids=ABSTRACT)
def test_arrays_and_shapes_give_the_same_specs(x):
    assert peft.lora_specs(lora(nn.Dense(3)), x) == {"lora": DENSE}
    assert peft.lora_specs(lora(nn.Dense(3)), inputs=x) == {"lora": DENSE}


def test_other_arguments_pass_as_they_are():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, batch, *, scale, mode, function, options):
            assert (scale, mode, options) == (2, "fast", {"deep": [True, None, 1.5]})
            assert type(options["deep"][0]) is bool
            assert isinstance(batch["x"], jax.core.Tracer)
            assert batch["mask"] is None
            return function(lora(nn.Dense(3))(batch["x"]))

    batch = {"x": jax.ShapeDtypeStruct((1, 4), jnp.float32), "mask": None}
    options = {"deep": [True, None, 1.5]}
    specs = peft.lora_specs(Model(), batch, scale=2, mode="fast", function=nn.relu, options=options)
    assert specs == {"Dense_0/lora": DENSE}


class TwoMethods(nn.Module):
    def setup(self):
        self.encoder = nn.Dense(4)
        self.decoder = nn.Dense(3)

    def __call__(self, x):
        return self.decoder(self.encode(x))

    def encode(self, x, *, scale=1):
        return self.encoder(x) * scale


METHODS = ["encode", TwoMethods.encode, lambda module, x: module.encoder(x)]


@pytest.mark.parametrize("method", METHODS, ids=["name", "function", "lambda"])
def test_methods(method):
    with LORA:
        assert peft.lora_specs(TwoMethods(), X, method=method) == {"encoder/lora": DENSE}
        assert len(peft.lora_specs(TwoMethods(), X)) == 2
        scaled = peft.lora_specs(TwoMethods(), X, method="encode", scale=2)
    assert scaled == {"encoder/lora": DENSE}


def test_interceptors_active_and_gone():
    with LORA:
        inside = peft.lora_specs(TwoMethods(), X)
    assert set(inside) == {"encoder/lora", "decoder/lora"}
    assert peft.lora_specs(TwoMethods(), X) == {}
    with peft.ModuleInterceptor(Adapt(alpha=1)):
        alpha = peft.lora_specs(TwoMethods(), X)["encoder/lora"]
    assert alpha == LoraSpec("kernel", "ir,ro->io", 2, 0.5, 1)


def test_adapters_that_stand_alone():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return peft.LoRADenseAdapter(rank=2)(x) + peft.LoRADenseAdapter(rank=3, name="lora")(x)

    specs = peft.lora_specs(Model(), X)
    assert specs == {
        "LoRADenseAdapter_0": LoraSpec(None, "ir,ro->io", 2),
        "lora": LoraSpec(None, "ir,ro->io", 3),
    }
    with pytest.raises(ValueError, match="stands alone"):
        peft.fuse_params(Model().init(KEY, X)["params"], specs=specs)


def test_an_adapter_as_the_whole_model():
    specs = peft.lora_specs(peft.LoRADenseAdapter(rank=2), X)
    assert list(specs.values()) == [LoraSpec(None, "ir,ro->io", 2)]


TOKENS = np.zeros((2, 3), np.int32)
KINDS = {
    # layer, input: letters of the delta, up to their names
    "Dense": (nn.Dense(3), X, "ir,ro->io"),
    "Embed": (nn.Embed(7, 4), TOKENS, "vr,rf->vf"),
    "Conv": (nn.Conv(3, (2, 2)), np.ones((1, 4, 4, 2), np.float32), "xyir,ro->xyio"),
    "DenseGeneral": (nn.DenseGeneral((2, 3)), X, "ir,ron->ion"),
    "heads": (
        nn.DenseGeneral(3, axis=(-2, -1), batch_dims=(0,)),
        np.ones((2, 4, 5), np.float32),
        "bhdr,bro->bhdo",
    ),
    "Einsum": (nn.Einsum((2, 4, 3), "bi,nio->bno"), X, "ir,rno->nio"),
}


@pytest.mark.parametrize(("layer", "x", "equation"), KINDS.values(), ids=KINDS)
def test_equations_of_each_kind(layer, x, equation):
    with peft.ModuleInterceptor(Adapt(types=(type(layer),))):
        specs = peft.lora_specs(layer, x)
        shapes = jax.eval_shape(lambda: layer.init(KEY, x))["params"]
    (path,) = specs
    spec = specs[path]
    assert path == "lora"
    assert spec.param == ("embedding" if isinstance(layer, nn.Embed) else "kernel")
    assert pattern(spec) == pattern(LoraSpec("kernel", equation, 2))
    delta = np.einsum(spec.equation, *(np.zeros(shapes["lora"][name].shape) for name in "ab"))
    assert delta.shape == shapes[spec.param].shape


class Stacked(nn.Module):
    """Layers stacked by lifted transforms, along any axis, once or twice."""

    axes: tuple

    @nn.compact
    def __call__(self, x):
        block = Block
        for length, axis in self.axes:
            block = nn.scan(
                block,
                variable_axes={"params": axis},
                split_rngs={"params": True},
                length=length,
                methods=["__call__"],
            )
        return block(name="blocks")(x, None)[0]


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.Dense(4)(x), None


STACKS = {
    "axis 0": (((3, 0),), (0,)),
    "axis 1": (((3, 1),), (1,)),
    "last axis": (((3, -1),), (-1,)),
    "axis 0 of axis 1": (((3, 1), (2, 0)), (1, 0)),
    "axis 2 of axis 0": (((3, 0), (2, 2)), (0, 2)),
}


@pytest.mark.parametrize(("axes", "stack_axes"), STACKS.values(), ids=STACKS)
def test_stacks_are_named_with_their_axes(axes, stack_axes):
    with LORA:
        specs = peft.lora_specs(Stacked(axes), X)
    assert specs == {
        "blocks/Dense_0/lora": LoraSpec("kernel", "...ir,...ro->...io", 2, stack_axes=stack_axes)
    }


def test_vmapped_layers_are_stacked():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            many = nn.vmap(
                nn.Dense,
                variable_axes={"params": 1},
                split_rngs={"params": True},
                in_axes=None,
                axis_size=3,
            )
            return many(3, name="many")(x)

    with LORA:
        specs = peft.lora_specs(Model(), X)
    stacked = dataclasses.replace(DENSE, equation="...ir,...ro->...io", stack_axes=(1,))
    assert specs == {"many/lora": stacked}


class TwoKernels(nn.Module):
    @nn.compact
    def __call__(self, x):
        first = self.param("first", nn.initializers.ones, (4, 5))
        second = self.param("second", nn.initializers.ones, (5, 4))
        third = self.param("third", nn.initializers.ones, (2, 4, 4))
        return jnp.einsum("bi,nio->bo", x @ first @ second, third)


def test_keys_are_unique_where_a_module_holds_several_kernels():
    model = peft.LoRAWeight(rank=2, wrapped=TwoKernels())
    specs = peft.lora_specs(model, X)
    assert {path: spec.param for path, spec in specs.items()} == {
        "lora": "first",
        "lora_second": "second",
        "lora_third": "third",
    }
    params = jax.eval_shape(lambda: model.init(KEY, X))["params"]
    assert set(params) == {"first", "second", "third", *specs}


def test_keys_are_those_of_the_parameter_tree():
    model = TwoMethods()
    with LORA:
        specs = peft.lora_specs(model, X)
        params = jax.eval_shape(lambda: model.init(KEY, X))["params"]
    adapters = flax.traverse_util.flatten_dict(peft.split_params(params).lora, sep="/")
    assert {path.rpartition("/")[0] for path in adapters} == set(specs)


def test_specs_are_json():
    with LORA:
        specs = peft.lora_specs(Stacked(((3, 1),)), X)
    text = json.dumps({path: spec.to_dict() for path, spec in specs.items()})
    assert {path: LoraSpec.from_dict(spec) for path, spec in json.loads(text).items()} == specs


# --- No arithmetic, no state ---------------------------------------------------------------------


def test_no_array_is_made():
    """The kernel alone would take 40 gigabytes, the embedding 400."""

    class Model(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            return nn.Dense(100_000)(nn.Embed(1_000_000, 100_000)(tokens))

    with (
        peft.ModuleInterceptor(Adapt(types=(nn.Dense, nn.Embed))),
        count_compilations() as compiled,
    ):
        specs = peft.lora_specs(Model(), jax.ShapeDtypeStruct((8, 1000), jnp.int32))
    assert set(specs) == {"Dense_0/lora", "Embed_0/lora"}
    assert compiled == []


class count_compilations:
    """Collects the names of jax's own events of compilation."""

    def __enter__(self):
        self.events = []
        jax.monitoring.register_event_duration_secs_listener(self.note)
        return self.events

    def __exit__(self, *_):
        jax.monitoring.unregister_event_duration_listener(self.note)

    def note(self, event, seconds, **_):
        if "backend_compile" in event:
            self.events.append(event)


def test_what_counts_compilations_sees_them():
    with count_compilations() as compiled:
        jax.jit(lambda x: x * 7 - 3)(np.ones(11))
    assert compiled != []


class Failing(nn.Module):
    written: bool

    @nn.compact
    def __call__(self, x):
        layer = nn.Dense(3)
        (lora(layer) if self.written else layer)(x)
        raise RuntimeError("the user's own error")


def test_an_exception_does_not_leave_the_recording_on():
    with pytest.raises(RuntimeError, match="own error"):
        peft.lora_specs(Failing(True), X)
    with LORA, pytest.raises(RuntimeError, match="own error"):
        peft.lora_specs(Failing(False), X)
    params = lora(nn.Dense(3)).init(KEY, X)["params"]
    assert all(isinstance(leaf, jax.Array) for leaf in params["lora"].values())
    assert set(nn.Dense(3).init(KEY, X)["params"]) == {"kernel", "bias"}


def test_a_jitted_init_is_not_mistaken_for_the_recording():
    model = lora(nn.Dense(3))
    init = jax.jit(lambda key: model.init(key, X))
    for _ in range(2):
        assert peft.lora_specs(model, X) == {"lora": DENSE}
        params = init(KEY)["params"]
        assert jax.tree.map(jnp.shape, params["lora"]) == {"a": (4, 2), "b": (2, 3)}

    class Calls(nn.Module):
        @nn.compact
        def __call__(self, x):
            nn.jit(Block, methods=["__call__"])(name="block")(x, None)
            return x

    for _ in range(2):
        with LORA:
            assert set(peft.lora_specs(Calls(), X)) == {"block/Dense_0/lora"}
            params = jax.eval_shape(lambda: Calls().init(KEY, X))["params"]
        assert params["block"]["Dense_0"]["lora"]["a"].shape == (4, 2)


def test_specs_inside_of_jit_and_of_a_module():
    found = {}

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            found["inside"] = peft.lora_specs(lora(nn.Dense(3, parent=None), parent=None), x)
            return lora(nn.Dense(3))(x)

    @jax.jit
    def init(x):
        found["jit"] = peft.lora_specs(lora(nn.Dense(3)), x)
        return Model().init(KEY, x)

    params = init(X)["params"]
    assert found == {"inside": {"lora": DENSE}, "jit": {"lora": DENSE}}
    assert jax.tree.map(jnp.shape, params["Dense_0"]["lora"]) == {"a": (4, 2), "b": (2, 3)}


def test_the_models_own_random_streams():
    class Noisy(nn.Module):
        @nn.compact
        def __call__(self, x):
            noise = jax.random.normal(self.make_rng("noise"), x.shape)
            return lora(nn.Dense(3), dropout=0.5)(x + noise)

    rngs = {"params": KEY, "noise": KEY, "dropout": KEY}
    assert peft.lora_specs(Noisy(), X, rngs=rngs) == {"Dense_0/lora": DENSE}
    assert peft.lora_specs(Noisy(), X, rngs=key_of(1)) == {"Dense_0/lora": DENSE}
    old_key = jax.random.PRNGKey(0)
    assert peft.lora_specs(Noisy(), X, rngs=old_key) == {"Dense_0/lora": DENSE}


def test_partitioned_kernels_have_specs_too():
    init = nn.with_partitioning(nn.initializers.ones, ("x", "y"))
    assert peft.lora_specs(lora(nn.Dense(3, kernel_init=init)), X) == {"lora": DENSE}
    with LORA:
        assert peft.lora_specs(nn.Dense(3, kernel_init=init), X) == {"lora": DENSE}


@pytest.mark.parametrize("model", [None, {"kernel": X}, nn.Dense, lambda x: x])
def test_what_is_no_model_is_refused(model):
    with pytest.raises(ValueError, match="takes an unbound Linen module"):
        peft.lora_specs(model, X)


def test_a_bound_model_is_refused():
    bound = nn.Dense(3).bind({"params": {}})
    with pytest.raises(ValueError, match="that is bound"):
        peft.lora_specs(bound, X)

"""`layer_specs`: which axes each weight's layer contracts and is stacked along, told by a trace."""

import contextlib
import functools
import json

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from helpers import Adapt, AdaptWeights, key_of, numbers

import peft_jax as peft
from peft_jax import LayerSpec

KEY = key_of(0)
X = np.ones((2, 4), np.float32)
DENSE = LayerSpec("...i,io->...o", "dense")


def params_of(model, *inputs, **kwargs):
    """The shapes of a model's parameters."""
    return jax.eval_shape(lambda: model.init(KEY, *inputs, **kwargs))["params"]


def flat(tree):
    return flax.traverse_util.flatten_dict(tree, sep="/")


def scale_shapes(params, specs):
    """Shapes of the scales for each output channel, by the path of the weight."""
    quantize = functools.partial(peft.quantize_checkpoint, method="int8", specs=specs)
    small = flat(jax.eval_shape(quantize, params))
    return {path: small["/".join((*path.split("/")[:-1], "scale"))].shape for path in specs}


# --- Every kind of layer -------------------------------------------------------------------------


class EinsumCall(nn.Module):
    """An equation that is an argument of the call."""

    @nn.compact
    def __call__(self, x):
        return nn.Einsum((3, 5, 4), name="layer")(x, einsum_str="bi,noi->bon")


class Table(nn.Module):
    """An embedding that is read as a matrix only."""

    @nn.compact
    def __call__(self, x):
        return nn.Embed(7, 4, name="layer").attend(x)


class Custom(nn.Module):
    """A layer that the library is told of."""

    @nn.compact
    def __call__(self, scale, x):
        w = self.param("weights", nn.initializers.normal(), (4, 3, 5))
        return scale * jnp.einsum("bi,ino->bno", x, w)


class CustomCall(nn.Module):
    @nn.compact
    def __call__(self, x, equation="bi,oi->bo"):
        return jnp.einsum(equation, x, self.param("w", nn.initializers.normal(), (5, 4)))


class Like(nn.Dense):
    """Flax's forward under another name."""


peft.register_layer(Custom, param="weights", equation="bi,ino->bno", input="x")
peft.register_layer(
    CustomCall, param="w", equation=lambda module, x, equation="bi,oi->bo": equation
)
peft.register_layer(Like, like=nn.Dense)

# Module, inputs: for each weight the kind of its layer and the shape of its scale, which is one
# along the contracted axes.
KINDS = {
    "Dense": (nn.Dense(3), (X,), {"kernel": ("dense", (1, 3))}),
    "Dense without bias": (nn.Dense(3, use_bias=False), (X[0],), {"kernel": ("dense", (1, 3))}),
    "Einsum": (
        nn.Einsum((2, 4, 3), "bi,nio->bno", use_bias=False),
        (X,),
        {"kernel": ("einsum", (2, 1, 3))},
    ),
    "Einsum over two": (
        nn.Einsum((2, 4, 3), "bni,nio->bo", use_bias=False),
        (numbers(5, 2, 4),),
        {"kernel": ("einsum", (1, 1, 3))},
    ),
    "Einsum over a batch": (
        nn.Einsum((2, 4, 3), "bni,nio->bno", use_bias=False),
        (numbers(5, 2, 4),),
        {"kernel": ("einsum", (2, 1, 3))},
    ),
    "Einsum by the call": (EinsumCall(), (X,), {"layer/kernel": ("einsum", (3, 5, 1))}),
    "DenseGeneral": (
        nn.DenseGeneral((3, 5), axis=(-2, -1)),
        (numbers(2, 4, 6),),
        {"kernel": ("dense_general", (1, 1, 3, 5))},
    ),
    "DenseGeneral over a batch": (
        nn.DenseGeneral(3, axis=(-1,), batch_dims=(0,)),
        (numbers(2, 5, 4),),
        {"kernel": ("dense_general", (2, 1, 3))},
    ),
    "Conv": (
        nn.Conv(6, (3, 2), padding="VALID"),
        (numbers(1, 3, 2, 4),),
        {"kernel": ("conv", (1, 1, 1, 6))},
    ),
    "Conv in groups": (
        nn.Conv(6, (3,), feature_group_count=2),
        (numbers(1, 5, 4),),
        {"kernel": ("conv", (1, 1, 6))},
    ),
    "ConvTranspose": (
        nn.ConvTranspose(6, (3,)),
        (numbers(1, 5, 4),),
        {"kernel": ("conv", (1, 1, 6))},
    ),
    "ConvTranspose, transposed": (
        nn.ConvTranspose(6, (3,), transpose_kernel=True),
        (numbers(1, 5, 4),),
        {"kernel": ("conv", (1, 6, 1))},
    ),
    "Embed": (nn.Embed(7, 4), (np.arange(7),), {"embedding": ("embed", (1, 4))}),
    "Embed, attending": (Table(), (X,), {"layer/embedding": ("embed", (1, 4))}),
    "attention": (
        nn.MultiHeadDotProductAttention(num_heads=2, out_features=6),
        (numbers(1, 3, 8),),
        {
            "query/kernel": ("dense_general", (1, 2, 4)),
            "key/kernel": ("dense_general", (1, 2, 4)),
            "value/kernel": ("dense_general", (1, 2, 4)),
            "out/kernel": ("dense_general", (1, 1, 6)),
        },
    ),
    "registered": (Custom(), (2.0, X), {"weights": ("einsum", (1, 3, 5))}),
    "registered with a function": (CustomCall(), (X,), {"w": ("einsum", (5, 1))}),
    "registered like another": (Like(3), (X,), {"kernel": ("dense", (1, 3))}),
}


@pytest.mark.parametrize(("model", "inputs", "expected"), KINDS.values(), ids=KINDS)
def test_every_kind_of_layer(model, inputs, expected):
    specs = peft.layer_specs(model, *inputs)
    assert {path: spec.kind for path, spec in specs.items()} == {
        path: kind for path, (kind, _) in expected.items()
    }
    params = params_of(model, *inputs)
    assert set(specs) <= set(flat(params))
    assert scale_shapes(params, specs) == {path: scale for path, (_, scale) in expected.items()}
    for path, spec in specs.items():
        weight, scale = flat(params)[path].shape, expected[path][1]
        contracted = {i - len(weight) for i, n in enumerate(scale) if n == 1 != weight[i]}
        assert contracted == set(spec.axes)
        assert spec.stack_axes == ()


# Those whose output is linear in every place of the weight.
MEETING = [
    name
    for name in KINDS
    if not name.startswith(("attention", "Embed", "ConvT", "Conv in", "registered like", "Dense w"))
]


@pytest.mark.parametrize("name", MEETING)
def test_weights_along_contracted_axes_meet_in_the_same_outputs(name):
    """Along other axes, weights belong to different outputs: one scale each, after the product."""
    model, inputs, _ = KINDS[name]
    ((path, spec),) = peft.layer_specs(model, *inputs).items()
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), params_of(model, *inputs))

    @jax.jit
    @jax.jacobian
    def slopes(weight):
        filled = flax.traverse_util.unflatten_dict({**flat(params), path: weight}, sep="/")
        return model.apply({"params": filled}, *inputs)

    weight = flat(params)[path]
    reached = np.asarray(slopes(weight)) != 0
    reached = reached.reshape(-1, *weight.shape)
    for axis in range(weight.ndim):
        rows = np.moveaxis(reached, axis + 1, 0)
        meet = all(np.array_equal(row, rows[0]) for row in rows)
        assert meet == (axis - weight.ndim in spec.axes), (axis, spec)


def test_equations_are_those_of_the_layers():
    given = peft.layer_specs(nn.Einsum((2, 4, 3), "bi,nio->bno"), X)
    assert given == {"kernel": LayerSpec("bi,nio->bno", "einsum")}
    assert peft.layer_specs(nn.Dense(3), X) == {"kernel": DENSE}
    assert peft.layer_specs(EinsumCall(), X)["layer/kernel"].equation == "bi,noi->bon"


class Unknown(nn.Module):
    @nn.compact
    def __call__(self, x):
        class Sub(nn.Dense):
            pass

        x = Sub(4, name="subclass")(x) + self.param("kernel", nn.initializers.zeros, (4, 4))[:2]
        return nn.Dense(4, name="known")(nn.LayerNorm()(x))


def test_layers_that_are_not_known_are_left_out():
    assert peft.layer_specs(Unknown(), X) == {"known/kernel": DENSE}


class Normalised(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.WeightNorm(nn.Dense(4, name="weight_norm"))(x)
        x = nn.SpectralNorm(nn.Dense(4, name="spectral_norm"))(x, update_stats=False)
        return nn.Dense(4, name="plain")(x)


def test_normalised_weights_are_left_out():
    """What is stored there is not what the layer multiplies with."""
    specs = peft.layer_specs(Normalised(), X)
    assert specs == {"plain/kernel": DENSE}
    params = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), params_of(Normalised(), X))
    small = peft.quantize_checkpoint(params, method="int8", specs=specs)
    assert small["weight_norm"]["kernel"] is params["weight_norm"]["kernel"]


# --- Models --------------------------------------------------------------------------------------


class Model(nn.Module):
    """Layers in compact methods and in `setup`, one of them called twice."""

    def setup(self):
        self.embed = nn.Embed(7, 4)
        self.layers = [nn.Dense(4) for _ in range(2)]
        self.head = Head()

    def __call__(self, tokens, train=False):
        assert train is True or train is False, "a Python bool must arrive as it is"
        x = self.encode(tokens)
        x = self.layers[0](x) if train else x
        return self.embed.attend(self.head(x))

    def encode(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = nn.gelu(layer(x))
        return x


class Head(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.MultiHeadDotProductAttention(2, name="attention")(x)
        return nn.Einsum((4, 4), "btd,de->bte", name="einsum")(nn.LayerNorm()(x))


TOKENS = np.zeros((2, 3), np.int32)


def test_paths_are_those_of_the_parameter_tree():
    specs = peft.layer_specs(Model(), TOKENS)
    weights = {
        path
        for path, leaf in flat(params_of(Model(), TOKENS)).items()
        if path.endswith(("/kernel", "/embedding"))
    }
    assert len(weights) == 8
    assert set(specs) == weights
    assert scale_shapes(params_of(Model(), TOKENS), specs)["head/attention/out/kernel"] == (1, 1, 4)


def test_arguments():
    every = peft.layer_specs(Model(), TOKENS)
    abstract = jax.ShapeDtypeStruct(TOKENS.shape, TOKENS.dtype)
    assert peft.layer_specs(Model(), abstract) == every
    assert peft.layer_specs(Model(), tokens=jnp.asarray(TOKENS), train=True) == every
    rngs = {"params": KEY, "dropout": KEY}
    assert peft.layer_specs(Model(), TOKENS, True, rngs=rngs) == every
    for method in ("encode", Model.encode, lambda model, tokens: model.encode(tokens)):
        some = peft.layer_specs(Model(), TOKENS, method=method)
        assert set(some) == {"embed/embedding", "layers_0/kernel", "layers_1/kernel"}
        assert some.items() <= every.items()


def test_boxes_do_not_matter():
    init = nn.with_partitioning(nn.initializers.ones, ("x", "y"))
    logical = nn.with_logical_partitioning(nn.initializers.ones, ("x", "y"))
    for boxed in (init, logical):
        assert peft.layer_specs(nn.Dense(3, kernel_init=boxed), X) == {"kernel": DENSE}


def store(module):
    return peft.Int4Dense(wrapped=module) if type(module) is nn.Dense else module


def simulate(module):
    wrapper = peft.SimulateQuantizedDense
    return wrapper(wrapped=module, method="int8") if type(module) is nn.Dense else module


RULES = {
    "LoRA": [Adapt()],
    "LoRA at weights": [AdaptWeights((nn.Dense, nn.Einsum))],
    "Int4": [store],
    "simulation": [simulate],
    "LoRA around Int4": [store, Adapt()],
    "Int4 around LoRA": [Adapt(), store],
    "all": [simulate, store, Adapt()],
}


@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
def test_inside_of_active_interceptors(rules):
    """The specs are those of the plain model, whose checkpoint they are for."""
    expected = peft.layer_specs(Model(), TOKENS)
    with contexts(rules):
        assert peft.layer_specs(Model(), TOKENS) == expected
        if rules == RULES["Int4"]:
            params = params_of(Model(), TOKENS)
            assert params["layers_0"]["kernel"].method == "int4", "the rule still acts elsewhere"
    assert peft.layer_specs(Model(), TOKENS) == expected


def contexts(rules):
    stack = contextlib.ExitStack()
    for rule in rules:
        stack.enter_context(peft.ModuleInterceptor(rule))
    return stack


class Written(nn.Module):
    """Wrappers that are a part of the model."""

    wrapped: bool

    @nn.compact
    def __call__(self, x):
        def make(wrap, layer):
            return wrap(layer) if self.wrapped else layer

        def lora(layer):
            return peft.LoRADense(rank=2, wrapped=layer)

        x = make(lora, nn.Dense(4, name="lora"))(x)
        x = make(store, nn.Dense(4, name="int4"))(x)
        x = make(simulate, nn.Dense(4, name="simulated"))(x)
        x = make(lambda layer: lora(store(layer)), nn.Dense(4, name="both"))(x)
        return nn.Dense(4, name="plain")(x)


def test_wrappers_written_into_the_model():
    names = ("lora", "int4", "simulated", "both", "plain")
    assert peft.layer_specs(Written(True), X) == {f"{name}/kernel": DENSE for name in names}
    assert peft.layer_specs(Written(False), X) == peft.layer_specs(Written(True), X)


def test_adapters_have_no_layer_specs():
    class Alone(nn.Module):
        @nn.compact
        def __call__(self, x):
            return peft.LoRADenseAdapter(rank=2)(x)

    assert peft.layer_specs(Alone(), X) == {}


# --- Lifted transforms ---------------------------------------------------------------------------


class Step(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        y = nn.Einsum((2, 4, 3), "bi,nio->bno", name="einsum")(x)
        return x, nn.Dense(5, name="dense")(y)


class Lifted(nn.Module):
    lift: object

    @nn.compact
    def __call__(self, x):
        return self.lift()(name="lifted")(x, None)


def stacking(lift, *axes, **fields):
    """The transform, once for each axis; lengths 6, 7, ... tell the stacks apart."""
    cls = Step
    for i, axis in enumerate(axes):
        length = {"length" if lift is nn.scan else "axis_size": 6 + i}
        cls = lift(
            cls,
            variable_axes={"params": axis},
            split_rngs={"params": True},
            in_axes=nn.broadcast if lift is nn.scan else None,
            **length,
            **fields,
        )
    return cls


def shared():
    fields = {"variable_broadcast": "params", "split_rngs": {"params": False}, "length": 3}
    return nn.scan(Step, in_axes=nn.broadcast, **fields)


LIFTS = {
    "scan 0": (lambda: stacking(nn.scan, 0), (0,)),
    "scan 1": (lambda: stacking(nn.scan, 1), (1,)),
    "scan -1": (lambda: stacking(nn.scan, -1), (-1,)),
    "scan 0 of scan 1": (lambda: stacking(nn.scan, 1, 0), (1, 0)),
    "scan -1 of scan 0": (lambda: stacking(nn.scan, 0, -1), (0, -1)),
    "vmap 0": (lambda: stacking(nn.vmap, 0), (0,)),
    "vmap -1": (lambda: stacking(nn.vmap, -1), (-1,)),
    "remat": (lambda: nn.remat(Step), ()),
    "jit": (lambda: nn.jit(Step), ()),
    "jit of remat of scan": (lambda: nn.jit(nn.remat(stacking(nn.scan, 1))), (1,)),
    "shared": (shared, ()),
}


@pytest.mark.parametrize(("lift", "axes"), LIFTS.values(), ids=LIFTS)
def test_lifted_layers(lift, axes):
    """Paths and equations are those of the plain layer; scales are too, beside the stack's axes."""
    model = Lifted(lift)
    specs = peft.layer_specs(model, X)
    plain = peft.layer_specs(Step(), X)
    assert specs == {
        f"lifted/{path}": LayerSpec(spec.equation, spec.kind, axes) for path, spec in plain.items()
    }
    params = params_of(model, X)
    found = scale_shapes(params, specs)
    lengths = range(6, 6 + len(axes))
    for path, shape in scale_shapes(params_of(Step(), X), plain).items():
        expected = list(shape)
        for axis, length in zip(axes, lengths, strict=True):
            expected.insert(axis % (len(expected) + 1), length)
        assert found[f"lifted/{path}"] == tuple(expected)
    with peft.ModuleInterceptor(store), peft.ModuleInterceptor(Adapt()):
        assert peft.layer_specs(model, X) == specs


# --- Specs as data -------------------------------------------------------------------------------


def test_specs_are_json():
    specs = peft.layer_specs(Lifted(LIFTS["scan -1 of scan 0"][0]), X)
    text = json.dumps({path: spec.to_dict() for path, spec in specs.items()})
    read = {path: LayerSpec.from_dict(spec) for path, spec in json.loads(text).items()}
    assert read == specs
    assert {hash(spec) for spec in read.values()} == {hash(spec) for spec in specs.values()}


def test_fields_are_normalised():
    spec = LayerSpec("bi,io->bo", stack_axes=[np.int64(1)])
    assert spec == LayerSpec("bi,io->bo", "einsum", (1,))
    assert type(spec.stack_axes[0]) is int
    assert spec.axes == (-2,)
    assert LayerSpec("bhd,hdo->bo").axes == (-3, -2)
    assert LayerSpec("...v,vf->...f").axes == (-2,)


BAD = {
    "no equation": ({"equation": "dense"}, r"output.*'dense'"),
    "no string": ({"equation": 3}, "An equation is a string"),
    "kernel twice": ({"equation": "bi,ii->bi"}, "'i' stands twice"),
    "kernel unnamed": ({"equation": "bi,...io->bo"}, "ellipsis"),
    "kind": ({"kind": 3}, "LayerSpec.kind = 3"),
    "one axis": ({"stack_axes": 0}, "LayerSpec.stack_axes = 0"),
    "no axes": ({"stack_axes": None}, "LayerSpec.stack_axes = None"),
    "letters": ({"stack_axes": "01"}, "LayerSpec.stack_axes = '01'"),
    "fractions": ({"stack_axes": [0.0]}, r"LayerSpec.stack_axes = \[0.0\]"),
    "truths": ({"stack_axes": [True]}, r"LayerSpec.stack_axes = \[True\]"),
    "unknown": ({"rank": 2}, r"unknown here: \['rank'\]"),
}


@pytest.mark.parametrize(("fields", "message"), BAD.values(), ids=BAD)
def test_bad_fields_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        LayerSpec.from_dict({**DENSE.to_dict(), **fields})


def test_bad_dicts_are_refused():
    with pytest.raises(ValueError, match=r"missing: \['equation'\]"):
        LayerSpec.from_dict({"kind": "dense"})
    with pytest.raises(ValueError, match="takes a dict, got list"):
        LayerSpec.from_dict([DENSE.to_dict()])


# --- No arrays, no state -------------------------------------------------------------------------


def test_no_array_is_made():
    """The kernel alone would take 40 gigabytes, the embedding 400."""

    class Giant(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            return nn.Dense(100_000)(nn.Embed(1_000_000, 100_000)(tokens))

    before = {id(array) for array in jax.live_arrays()}
    specs = peft.layer_specs(Giant(), jax.ShapeDtypeStruct((8, 1000), jnp.int32))
    assert set(specs) == {"Dense_0/kernel", "Embed_0/embedding"}
    assert {id(array) for array in jax.live_arrays()} <= before


def test_nothing_stays_recorded():
    class Failing(nn.Module):
        @nn.compact
        def __call__(self, x):
            nn.Dense(3)(x)
            raise RuntimeError("the user's own error")

    with pytest.raises(RuntimeError, match="own error"):
        peft.layer_specs(Failing(), X)
    params = params_of(nn.Dense(3), X)
    assert set(params) == {"kernel", "bias"}
    assert all(type(leaf) is jax.ShapeDtypeStruct for leaf in params.values())


def test_a_compiled_init_is_not_mistaken_for_the_recording():
    model = Lifted(LIFTS["jit"][0])
    init = jax.jit(lambda: model.init(key_of(0), X)["params"])
    for _ in range(2):
        assert set(peft.layer_specs(model, X)) == {"lifted/einsum/kernel", "lifted/dense/kernel"}
        assert init()["lifted"]["dense"]["kernel"].shape == (3, 5)


def test_specs_inside_of_jit_and_of_a_module():
    found = {}

    class Outer(nn.Module):
        @nn.compact
        def __call__(self, x):
            found["module"] = peft.layer_specs(nn.Dense(3, parent=None), x)
            return nn.Dense(3)(x)

    @jax.jit
    def init(x):
        found["jit"] = peft.layer_specs(nn.Dense(3), x)
        return Outer().init(KEY, x)

    jax.eval_shape(init, X)
    assert found == {"jit": {"kernel": DENSE}, "module": {"kernel": DENSE}}


@pytest.mark.parametrize("model", [None, {"kernel": X}, nn.Dense, lambda x: x])
def test_what_is_no_model_is_refused(model):
    with pytest.raises(ValueError, match="layer_specs takes an unbound Linen module"):
        peft.layer_specs(model, X)


def test_a_bound_model_is_refused():
    with pytest.raises(ValueError, match="that is bound"):
        peft.layer_specs(nn.Dense(3).bind({"params": {}}), X)

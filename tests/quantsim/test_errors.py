"""Bad input to the quantization flow: a `ValueError` that says where, what, and what to do.

Nothing is written or changed by a call that is refused.
"""

import copy
import dataclasses
import functools
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from helpers import key_of, numbers

import peft_jax as peft
from peft_jax import quantsim
from peft_jax.quantsim import Quantizer, QuantizerRule, SimulationConfig

X = numbers(8, 4)
NOTHING = SimulationConfig(None, None, None, None, None, None)
WEIGHTS = dataclasses.replace(NOTHING, weights=Quantizer(8, symmetric=True))


class Net(nn.Module):
    width: int = 6

    @nn.compact
    def __call__(self, x):
        return nn.Dense(4, name="two")(nn.relu(nn.Dense(self.width, name="one")(x)))


class Flow(NamedTuple):
    """A model, simulated and calibrated: the base alone, and with its adapter."""

    model: nn.Module
    params: Any
    sim: quantsim.SimulatedModel
    base: Any
    encodings: Any
    metadata: quantsim.AdapterMetadata


@functools.cache
def flow(width=6):
    lora = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["one"], init_lora_weights=False)
    model = peft.get_peft_model(Net(width), lora)
    params = jax.jit(lambda: model.init(key_of(0), X))()["params"]
    sim = quantsim.simulate(model)
    with peft.disable_adapters():
        base = quantsim.compute_encodings(sim, params, [X])
    base = quantsim.freeze(base)
    encodings = quantsim.compute_encodings(sim, params, [X], encodings=base)
    metadata = quantsim.adapter_metadata(peft.lora_specs(model, X))
    return Flow(model, params, sim, base, encodings, metadata)


@functools.cache
def specs_of(rank=2, alpha=4, targets=("one",)):
    lora = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets))
    return peft.lora_specs(peft.get_peft_model(Net(), lora), X)


def metadata_of(**options):
    return quantsim.adapter_metadata(specs_of(**options))


def configured(*rules, **fields):
    """The model of `flow` under another configuration."""
    return quantsim.simulate(flow().model, SimulationConfig(**fields, rules=rules))


def computed(sim=None, params=None, batches=None, **options):
    return quantsim.compute_encodings(
        flow().sim if sim is None else sim,
        flow().params if params is None else params,
        [X] if batches is None else batches,
        **options,
    )


def run(encodings, sim=None, params=None):
    params = flow().params if params is None else params
    return (sim or flow().sim).apply({"params": params}, X, encodings=encodings)


def flat(encodings):
    return flatten_dict(
        encodings, sep="/", is_leaf=lambda _, node: isinstance(node, quantsim.Encoding)
    )


def nested(found):
    return unflatten_dict(found, sep="/")


def altered(path, **fields):
    """The encodings of `flow`, of which one has other fields."""
    found = flat(flow().encodings)
    return nested({**found, path: found[path].replace(**fields)})


def without(path):
    return nested({other: e for other, e in flat(flow().encodings).items() if other != path})


def with_param(path, function):
    """The parameters of `flow`, of which one is another."""
    found = flatten_dict(flow().params, sep="/")
    return nested({**found, path: function(found[path])})


@pytest.fixture
def refuses(tmp_path):
    """Checks that a call raises a ValueError with these texts, and leaves all as it was."""
    kept = tmp_path / "kept"
    kept.write_bytes(b"as it was")
    given = flow()
    before = copy.deepcopy(jax.tree.map(np.asarray, (given.params, given.encodings, given.base)))

    def check(call, *texts):
        with pytest.raises(ValueError) as error:
            call()
        for text in texts:
            assert str(text) in str(error.value)
        assert len(str(error.value)) > 20
        assert [file.name for file in tmp_path.iterdir()] == ["kept"]
        assert kept.read_bytes() == b"as it was"
        chex.assert_trees_all_equal((given.params, given.encodings, given.base), before)

    return check


# --- Configurations ------------------------------------------------------------------------------

NUMBERS = (None, "8", True, [8], 8.0, float("nan"), np.array([8]))
FIELDS = [
    *(("bitwidth", {"bitwidth": value}) for value in (-8, 0, 1, 17, 32, *NUMBERS)),
    *(("symmetric", {"symmetric": value}) for value in (None, 1, "yes", [True])),
    *(("granularity", {"granularity": value}) for value in (None, "row", 1, ["tensor"], "TENSOR")),
    *(("calibration", {"calibration": value}) for value in (None, "max", 1, ["mse"])),
    *(("percentile", {"percentile": v}) for v in (None, "99", True, 50, 100.1, float("nan"))),
    *(("momentum", {"momentum": v}) for v in (None, "0.9", True, 0, 1, 1.5, float("nan"))),
    *(("range", {"range": v}) for v in (3, "ab", (-1,), (1, 2), (-2, -1), (0, 0), (2, -1))),
    *(("range", {"range": v}) for v in (("a", "b"), (None, 1), (-float("inf"), 0), (0, 1e300))),
    *(("range", {"range": v}) for v in ((-1, float("nan")), (False, True), (-1, 0, 1))),
    ("block_size", {"granularity": "block"}),
    ("block_size", {"block_size": 4}),
    *(
        ("block_size", {"granularity": "block", "block_size": value})
        for value in (0, -1, 2.0, True, "2", [2])
    ),
    *(
        ("axis", {"granularity": "block", "block_size": 2, "axis": value})
        for value in (0, 1, "x", -1.0, True)
    ),
    ("axis", {"axis": -1}),
    ("calibration", {"method": "int4", "calibration": "mse"}),
    ("range", {"method": "int4", "range": (-1, 1)}),
    ("method", {"method": "nf4"}),
    ("method", {"method": "none"}),
]


@pytest.mark.parametrize(("field", "options"), FIELDS, ids=str)
def test_fields_of_quantizers(field, options, refuses):
    value = options.get(field)
    refuses(lambda: Quantizer(**options), f"Quantizer.{field}", repr(value), "it ")


SETTLED = ({"bitwidth": 5}, {"granularity": "block", "block_size": 16}, {"axis": -3})


@pytest.mark.parametrize("options", SETTLED, ids=str)
@pytest.mark.parametrize("method", ["int4", "int8", "q4_0"])
def test_a_method_is_not_overruled_in_silence(method, options, refuses):
    """What it settles may be said as it is, and no otherwise."""
    refuses(lambda: Quantizer(method=method, **options), f"{method!r}")


@pytest.mark.parametrize("method", ["int3", 4, ["int4"]])
def test_methods_that_are_none(method, refuses):
    refuses(lambda: Quantizer(method=method), repr(method), "int4", "q4_0")


CONFIGURATIONS = {
    "pattern": (lambda: QuantizerRule(3, None), ("pattern", "3")),
    "empty pattern": (lambda: QuantizerRule("", None), ("pattern", "''")),
    "patterns": (lambda: QuantizerRule(["*"], None), ("pattern", "['*']")),
    "bits": (lambda: QuantizerRule("*", 8), ("quantizer", "8")),
    "field": (lambda: SimulationConfig(weights=8), ("SimulationConfig.weights", "8")),
    "name": (lambda: SimulationConfig(inputs="int8"), ("SimulationConfig.inputs", "'int8'")),
    "class": (lambda: SimulationConfig(outputs=Quantizer), ("SimulationConfig.outputs",)),
    "rule": (lambda: SimulationConfig(rules=QuantizerRule("*", None)), ("rules is a list",)),
    "text": (lambda: SimulationConfig(rules="*"), ("rules is a list", "'*'")),
    "none": (lambda: SimulationConfig(rules=None), ("rules is a list", "None")),
    "texts": (lambda: SimulationConfig(rules=["*"]), ("holds QuantizerRules", "'*'")),
    "dict": (lambda: SimulationConfig(rules={"*": None}), ("QuantizerRules",)),
    "with": (lambda: SimulationConfig().with_rules("*"), ("QuantizerRules", "'*'")),
    "model": (lambda: quantsim.simulate(None), ("an unbound Linen module", "NoneType")),
    "type": (lambda: quantsim.simulate(Net), ("an unbound Linen module", "type")),
    "function": (lambda: quantsim.simulate(lambda x: x), ("an unbound Linen module", "function")),
    "twice": (lambda: quantsim.simulate(flow().sim), ("an unbound Linen module", "simulated")),
    "bound": (
        lambda: quantsim.simulate(flow().model.bind({"params": flow().params})),
        ("an unbound Linen module", "bound"),
    ),
    "quantizer": (
        lambda: quantsim.simulate(flow().model, Quantizer(8)),
        ("takes a SimulationConfig", "Quantizer"),
    ),
    "options": (lambda: quantsim.simulate(flow().model, {}), ("takes a SimulationConfig", "dict")),
}


@pytest.mark.parametrize(("call", "texts"), CONFIGURATIONS.values(), ids=CONFIGURATIONS)
def test_configurations(call, texts, refuses):
    refuses(call, *texts)


RULES = {
    "nothing": ((QuantizerRule("*/tree", None),), {}, ("'*/tree'", "matches nothing", "kernel")),
    "one of two": (
        (QuantizerRule("*/kernel", None), QuantizerRule("one/kernels", Quantizer(4))),
        {},
        ("'one/kernels'", "matches nothing", "one/kernel"),
    ),
    "blocks": (
        (),
        {"weights": Quantizer(granularity="block", block_size=5)},
        ("'one/kernel'", "blocks of 5", "axis of 4", "block_size", "QuantizerRule"),
    ),
    "blocks of inputs": (
        (QuantizerRule("two/input", Quantizer(granularity="block", block_size=4)),),
        {},
        ("'two/input'", "blocks of 4", "axis of 6", "block_size"),
    ),
    "blocks of scalings": (
        (),
        {"adapter_scaling": Quantizer(granularity="block", block_size=2)},
        ("'one/lora/scaling'", "blocks of 2", "axis of 1"),
    ),
    "axes": (
        (),
        {"weights": Quantizer(granularity="block", block_size=2, axis=-3)},
        ("'one/kernel'", "(4, 6)", "no axis -3", "QuantizerRule"),
    ),
    "axes of inputs": (
        (),
        {"inputs": Quantizer(granularity="block", block_size=2, axis=-2)},
        ("'one/input'", "-2"),
    ),
    "methods of inputs": (
        (),
        {"inputs": Quantizer(method="int4")},
        ("'one/input'", "for weights", "bitwidth"),
    ),
    "methods of outputs": (
        (),
        {"outputs": Quantizer(method="int8")},
        ("'one/output'", "for weights", "bitwidth"),
    ),
    "methods of hidden": (
        (),
        {"adapter_hidden": Quantizer(method="int8")},
        ("'one/lora/hidden'", "for weights"),
    ),
    "methods of scalings": (
        (),
        {"adapter_scaling": Quantizer(method="int8")},
        ("'one/lora/scaling'", "for weights"),
    ),
    "methods of biases": (
        (QuantizerRule("one/bias", Quantizer(method="int4")),),
        {},
        ("one/bias", "INT4"),
    ),
    "blocks of methods": (
        (),
        {"weights": Quantizer(method="q4_0")},
        ("'one/kernel'", "blocks of 32", "axis of 6"),
    ),
}


@pytest.mark.parametrize(("rules", "fields", "texts"), RULES.values(), ids=RULES)
def test_rules_that_do_not_fit(rules, fields, texts, refuses):
    refuses(lambda: computed(configured(*rules, **fields)), *texts)


# --- Calibration ---------------------------------------------------------------------------------


def disabled(**options):
    with peft.disable_adapters():
        return computed(**options)


def all_frozen():
    return quantsim.freeze(flow().encodings, adapters=True)


CALIBRATIONS = {
    "no batches": (lambda: computed(batches=[]), ("no batches", "at least one")),
    "no batches left": (lambda: computed(batches=iter(())), ("no batches", "at least one")),
    "all frozen": (
        lambda: computed(encodings=all_frozen()),
        ("nothing to calibrate", "10 sites", "10 of those are frozen", "unfreeze"),
    ),
    "base frozen, adapters disabled": (
        lambda: disabled(encodings=flow().base),
        ("nothing to calibrate", "6 of those are frozen", "enable the adapters"),
    ),
    "config of nothing": (
        lambda: computed(quantsim.simulate(flow().model, NOTHING)),
        ("nothing to calibrate", "0 sites", "configuration"),
    ),
    "adapters alone, disabled": (
        lambda: disabled(
            sim=quantsim.simulate(
                flow().model, dataclasses.replace(NOTHING, adapter_weights=Quantizer(8))
            )
        ),
        ("nothing to calibrate", "2 sites", "0 run", "enable the adapters"),
    ),
    "empty batches": (
        lambda: computed(batches=[X[:0], X[:0]]),
        ("Nothing was seen", "'one/input'", "QuantizerRule"),
    ),
    "a model": (lambda: computed(flow().model), ("quantsim.simulate", "PeftModel")),
    "an array": (lambda: computed(batches=X), ("iterable of batches", "Write [batch]")),
    "a dict": (lambda: computed(batches={"x": X}), ("iterable of batches", "dict", "[batch]")),
    "text": (lambda: computed(batches="abc"), ("iterable of batches", "str", "[batch]")),
    "no iterable": (
        lambda: quantsim.compute_encodings(flow().sim, flow().params, None),
        ("iterable of batches", "None"),
    ),
    "a number": (lambda: computed(batches=3), ("iterable of batches", "int")),
    "no parameters": (lambda: computed(params={}), ("'default'", "init")),
    "arrays for encodings": (
        lambda: computed(encodings=flow().params),
        ("'one/", "ArrayImpl", "compute_encodings"),
    ),
    "a list of encodings": (lambda: computed(encodings=[]), ("list", "compute_encodings")),
    "text for encodings": (lambda: computed(encodings="x"), ("str", "compute_encodings")),
    "a function that runs nothing": (
        lambda: computed(forward_fn=lambda model, params, batch: batch),
        ("nothing to calibrate", "0 sites"),
    ),
    "a function that runs the model itself": (
        lambda: computed(forward_fn=lambda _, params, x: flow().model.apply({"params": params}, x)),
        ("nothing to calibrate", "0 sites"),
    ),
    "a function that is none": (lambda: computed(forward_fn=3), ("forward_fn", "3")),
}


@pytest.mark.parametrize(("call", "texts"), CALIBRATIONS.values(), ids=CALIBRATIONS)
def test_calibrating_nothing(call, texts, refuses):
    refuses(call, *texts)


@pytest.mark.parametrize(
    "value", [np.nan, *(pytest.param(end, marks=pytest.mark.slow) for end in (np.inf, -np.inf))]
)
@pytest.mark.parametrize("number", [pytest.param(0, marks=pytest.mark.slow), 2])
@pytest.mark.parametrize(
    "calibration",
    ["min_max", "mse"]
    + [pytest.param(name, marks=pytest.mark.slow) for name in ("percentile", "moving_average")],
)
def test_batches_that_are_not_finite(value, number, calibration, refuses):
    batches = [X, X, X]
    batches[number] = X.at[1, 2].set(value)
    sim = quantsim.simulate(
        flow().model, dataclasses.replace(NOTHING, inputs=Quantizer(8, calibration=calibration))
    )
    refuses(
        lambda: computed(sim, batches=batches),
        "NaN or infinity",
        "'one/input'",
        f"batch {number}",
        "no encodings were computed",
    )


@pytest.mark.parametrize("value", [np.nan, -np.inf])
@pytest.mark.parametrize(
    ("path", "named"),
    [
        ("two/kernel", "'two/kernel'"),
        ("one/lora/b", "'one/lora/b'"),
        ("two/bias", "'two/output'"),
    ],
)
def test_parameters_that_are_not_finite(value, path, named, refuses):
    """Of a parameter that is not simulated, what it flows into is named."""
    params = with_param(path, lambda leaf: leaf.at[(0,) * leaf.ndim].set(value))
    refuses(lambda: computed(params=params), "NaN or infinity", named, "Mend")


def test_frozen_encodings_of_another_quantizer(refuses):
    sim = configured(weights=Quantizer(4))
    refuses(
        lambda: computed(sim, encodings=flow().base),
        "frozen encoding of 'one/kernel'",
        "bitwidth=8",
        "bitwidth=4",
        "Unfreeze",
    )
    found = computed(sim, encodings=quantsim.unfreeze(flow().base))
    assert found["one"]["kernel"].bitwidth == 4


def test_frozen_encodings_of_another_model(refuses):
    refuses(
        lambda: computed(encodings=flow(8).base),
        "frozen encoding of 'one/kernel'",
        "(1, 8)",
        "(1, 6)",
    )


def test_sites_that_no_batch_reaches(refuses):
    class Branching(nn.Module):
        @nn.compact
        def __call__(self, x):
            one, two = nn.Dense(4, name="one"), nn.Dense(4, name="two")
            if self.is_initializing():
                return one(x) + two(x)
            return nn.cond(x[0, 0] > 0, lambda _, x: one(x), lambda _, x: two(x), self, x)

    model = Branching()
    params = jax.jit(lambda: model.init(key_of(0), X))()["params"]
    sim = quantsim.simulate(model, dataclasses.replace(NOTHING, inputs=Quantizer(8)))
    refuses(
        lambda: quantsim.compute_encodings(sim, params, [jnp.abs(X)]),
        "Nothing was seen",
        "'two/input'",
        "QuantizerRule('two/input', None)",
    )


# --- Running -------------------------------------------------------------------------------------

ENCODINGS = {
    "none": (lambda: None, ("takes encodings=", "compute_encodings")),
    "empty": (dict, ("'one/input'", "no encoding", "QuantizerRule('one/input', None)")),
    "arrays": (lambda: flow().params, ("'one/", "ArrayImpl", "compute_encodings")),
    "list": (lambda: [flow().encodings], ("list", "compute_encodings")),
    "base alone": (lambda: flow().base, ("'one/lora/a'", "no encoding", "compute_encodings")),
    "no kernel": (lambda: without("two/kernel"), ("'two/kernel'", "no encoding")),
    "no hidden": (lambda: without("one/lora/hidden"), ("'one/lora/hidden'", "no encoding")),
    "another module": (
        lambda: {**flow().encodings, "three": flow().encodings["two"]},
        ("'three'", "lack", "two"),
    ),
    "another model": (lambda: flow(8).encodings, ("'one/kernel'", "(1, 8)")),
    "scales": (
        lambda: altered("two/kernel", scale=jnp.ones((1, 3)), offset=jnp.ones((1, 3))),
        ("'two/kernel'", "(1, 3)"),
    ),
    "one scale for channels": (
        lambda: altered("two/kernel", scale=jnp.ones((1, 1)), offset=jnp.ones((1, 1))),
        ("'two/kernel'", "(1, 1)"),
    ),
    "axes": (
        lambda: altered("two/kernel", scale=jnp.ones(4), offset=jnp.ones(4)),
        ("'two/kernel'", "(4,)"),
    ),
    "offsets": (
        lambda: altered("two/kernel", offset=jnp.ones((1, 1))),
        ("'two/kernel'", "(1, 4)", "(1, 1)"),
    ),
    "scales of inputs": (
        lambda: altered("two/input", scale=jnp.ones((1, 5)), offset=jnp.ones((1, 5))),
        ("'two/input'", "5"),
    ),
    "blocks for a tensor": (
        lambda: altered("two/input", scale=jnp.ones((1, 3)), offset=jnp.ones((1, 3))),
        ("'two/input'", "3"),
    ),
    "mask": (lambda: quantsim.learnable_mask(flow().encodings), ("'one/", "encoding")),
    "no scale": (lambda: altered("two/kernel", scale=None), ("'two/kernel'",)),
}


@pytest.mark.parametrize(("encodings", "texts"), ENCODINGS.values(), ids=ENCODINGS)
def test_encodings_that_do_not_fit(encodings, texts, refuses):
    refuses(lambda: run(encodings()), *texts)


def test_a_configuration_that_changed(refuses):
    sim = configured(inputs=Quantizer(4))
    for encodings in (flow().encodings, quantsim.freeze(flow().encodings)):
        refuses(
            lambda encodings=encodings: run(encodings, sim),
            "encoding of 'one/input'",
            "bitwidth=8",
            "bitwidth=4",
            "compute_encodings",
        )


VARIABLES = {"none": None, "empty": {}, "parameters": lambda: flow().params}


@pytest.mark.parametrize("variables", VARIABLES.values(), ids=VARIABLES)
def test_variables_that_are_none(variables, refuses):
    variables = variables() if callable(variables) else variables
    refuses(lambda: flow().sim.apply(variables, X, encodings=flow().encodings), "param")


class Outer(nn.Module):
    inner: nn.Module

    @nn.compact
    def __call__(self, x):
        return self.inner(x)


BOUND = {
    "called": lambda sim, params: sim(X),
    "bound": lambda sim, params: sim.bind({"params": params})(X),
    "inside apply": lambda sim, params: Outer(sim).apply({"params": {"inner": params}}, X),
    "inside init": lambda sim, params: Outer(sim).init(key_of(0), X),
    "in a sequence": lambda sim, params: nn.Sequential([sim]).init(key_of(0), X),
    "lifted": lambda sim, params: nn.jit(Outer)(sim).init(key_of(0), X),
    "adapted": lambda sim, params: peft.get_peft_model(
        sim, peft.LoraConfig(target_modules=["one"])
    ).apply({"params": params}, X),
}


@pytest.mark.parametrize("call", BOUND.values(), ids=BOUND)
def test_models_that_are_bound_or_inside_others(call, refuses):
    refuses(
        lambda: call(flow().sim, flow().params),
        "sim.apply({'params': params}, ..., encodings=encodings)",
        "Simulate the whole model",
    )


class Normalised(nn.Module):
    kind: type = nn.WeightNorm

    @nn.compact
    def __call__(self, x):
        options = {} if self.kind is nn.WeightNorm else {"update_stats": False}
        x = self.kind(nn.Dense(4, name="one"))(x, **options)
        return nn.Dense(4, name="two")(x)


@pytest.mark.parametrize("kind", [nn.WeightNorm, nn.SpectralNorm])
def test_layers_inside_maps_of_variables(kind, refuses):
    model = Normalised(kind)
    variables = jax.jit(lambda: model.init(key_of(0), X))()

    def forward(model, params, x):
        return model.apply({**variables, "params": params}, x)

    def simulated(config):
        sim, params = quantsim.simulate(model, config), variables["params"]
        encodings = quantsim.compute_encodings(sim, params, [X], forward_fn=forward)
        return sim.apply(variables, X, encodings=encodings)

    refuses(lambda: simulated(WEIGHTS), "nn.WeightNorm", "QuantizerRule(", "None)")
    refuses(lambda: simulated(None), "nn.WeightNorm", "QuantizerRule(", "None)")
    rule = QuantizerRule("*one/*", None)
    assert np.all(np.isfinite(simulated(SimulationConfig(rules=(rule,)))))


def test_banks_of_adapters(refuses):
    """Rows that each have an adapter of their own are no one model to calibrate."""
    given = flow()
    base = peft.split_params(given.params)[0]
    bank = peft.stack_adapters({"one": peft.get_adapter(given.params)}, specs=specs_of())
    sim = quantsim.simulate(peft.MultiAdapterModel(wrapped=Net()), WEIGHTS)

    def forward(model, params, x):
        return model.apply(
            {"params": bank.merge(params)}, x, adapters=bank.select(["one"] * len(x))
        )

    refuses(
        lambda: quantsim.compute_encodings(sim, base, [X], forward_fn=forward),
        "'one'",
        "knows no banks",
        "one after the other",
    )


# --- Encodings -----------------------------------------------------------------------------------


def of_adapters():
    return nested({p: e for p, e in flat(flow().encodings).items() if e.of_adapter})


NOTHING_TO_FREEZE = {
    "empty": lambda change: change({}),
    "no kind": lambda change: change(flow().encodings, parameters=False, activations=False),
    "of the base": lambda change: change(of_adapters(), adapters=False),
}


@pytest.mark.parametrize("change", [quantsim.freeze, quantsim.unfreeze])
@pytest.mark.parametrize("call", NOTHING_TO_FREEZE.values(), ids=NOTHING_TO_FREEZE)
def test_freezing_nothing(change, call, refuses):
    texts = (f"no encodings to {change.__name__}", "parameters=", "compute_encodings")
    refuses(lambda: call(change), *texts)


@pytest.mark.parametrize("function", [quantsim.freeze, quantsim.unfreeze, quantsim.learnable_mask])
@pytest.mark.parametrize("value", [None, 3, "x", [], {"a": 1}, {"a": {"b": np.ones(2)}}], ids=repr)
def test_trees_that_are_no_encodings(function, value, refuses):
    refuses(lambda: function(value), "tree of encodings", "compute_encodings")


INTEGERS = {
    "no parameters": (lambda: ({}, flow().encodings), ("one/kernel",)),
    "none": (lambda: (None, flow().encodings), ("one/kernel",)),
    "one layer": (lambda: ({"two": flow().params["two"]}, flow().encodings), ("one/",)),
    "another model": (lambda: (flow(8).params, flow().encodings), ("one/kernel", "(1, 6)")),
    "no encodings": (lambda: (flow().params, None), ("compute_encodings",)),
    "arrays": (lambda: (flow().params, flow().params), ("compute_encodings",)),
    "integers already": (
        lambda: (quantsim.integer_params(flow().params, flow().encodings), flow().encodings),
        ("one/kernel", "int8"),
    ),
    "NaN": (
        lambda: (with_param("two/kernel", lambda k: k * jnp.nan), flow().encodings),
        ("two/kernel", "NaN"),
    ),
}


@pytest.mark.parametrize(("given", "texts"), INTEGERS.values(), ids=INTEGERS)
def test_integers_of_what_is_not_there(given, texts, refuses):
    params, encodings = given()
    refuses(lambda: quantsim.integer_params(params, encodings), *texts)


@pytest.mark.parametrize("bitwidth", [1, 17, True, "8", None, [8], 8.5])
def test_grids_of_other_bitwidths(bitwidth, refuses):
    one = jnp.ones((1, 1))
    refuses(lambda: quantsim.fake_quantize(X, one, -one, bitwidth), "bit", repr(bitwidth))


# --- Exports -------------------------------------------------------------------------------------

EXPORTS = {
    "before calibration": (lambda: (flow().params, {}), ("no encodings of the base", "compute")),
    "adapters alone": (lambda: (flow().params, of_adapters()), ("no encodings of the base",)),
    "no encodings": (lambda: (flow().params, None), ("NoneType", "compute_encodings")),
    "arrays": (lambda: (flow().params, flow().params), ("'one/", "compute_encodings")),
    "exchanged": (lambda: (flow().encodings, flow().params), ("compute_encodings",)),
    "no parameters": (lambda: ({}, flow().encodings), ("'one/kernel'", "nothing there")),
    "variables": (
        lambda: ({"params": flow().params}, flow().encodings),
        ("'one/kernel'", "nothing there"),
    ),
    "another width": (
        lambda: (flow(8).params, flow().encodings),
        ("'one/kernel'", "(1, 6)", "(4, 8)", "computed with"),
    ),
    "shapes alone": (
        lambda: (jax.eval_shape(lambda: flow().params), flow().encodings),
        ("'one/kernel'",),
    ),
    "mask": (
        lambda: (flow().params, quantsim.learnable_mask(flow().encodings)),
        ("'one/",),
    ),
    **{
        f"{field} of {value}": (
            lambda field=field, value=value: (
                flow().params,
                altered("two/kernel", **{field: jnp.full((1, 4), value)}),
            ),
            ("'two/kernel'", field),
        )
        for field, value in (
            *(("scale", value) for value in (np.nan, np.inf, 0.0, -1.0)),
            *(("offset", value) for value in (np.nan, np.inf, -500.0, 3.0, -127.0)),
        )
    },
    "offsets of another shape": (
        lambda: (flow().params, altered("two/kernel", offset=jnp.zeros((1, 1)))),
        ("'two/kernel'", "(1, 4)", "(1, 1)"),
    ),
    "NaN of an input": (
        lambda: (flow().params, altered("two/input", scale=jnp.full((1, 1), np.nan))),
        ("'two/input'", "finite"),
    ),
}


@pytest.mark.parametrize("integers", [False, True])
@pytest.mark.parametrize(("given", "texts"), EXPORTS.values(), ids=EXPORTS)
def test_exports_of_the_base(given, texts, integers, refuses, tmp_path):
    params, encodings = given()
    refuses(lambda: quantsim.export_base(tmp_path, params, encodings, integers=integers), *texts)


def renamed(text, other):
    return nested({path.replace(text, other): e for path, e in flat(flow().encodings).items()})


ADAPTERS = {
    "before calibration": (
        {"encodings": lambda: flow().base},
        ("'default'", "no encodings", "compute_encodings", "enabled"),
    ),
    "no encodings": ({"encodings": dict}, ("'default'", "no encodings")),
    "another adapter's encodings": (
        {"encodings": lambda: renamed("/lora/", "/lora.x/")},
        ("'default'", "no encodings"),
    ),
    "another layer's encodings": (
        {"encodings": lambda: renamed("one/lora", "two/lora")},
        ("'default'", "no encodings", "one/lora"),
    ),
    "another name": ({"adapter_name": "second"}, ("'second'", "['default']")),
    "no name": ({"adapter_name": None}, ("None", "['default']")),
    "no adapter": (
        {"params": lambda: peft.split_params(flow().params)[0]},
        ("no adapter 'default'", "[]"),
    ),
    "NaN": (
        {"encodings": lambda: altered("one/lora/a", scale=jnp.full((1, 1), np.nan))},
        ("one/lora/a", "finite"),
    ),
    "ranks": (
        {"metadata": lambda: metadata_of(rank=3)},
        ("'one/lora/a'", "(4, 2)", "rank 3", "anew"),
    ),
    "paths": (
        {"metadata": lambda: metadata_of(targets=("two",))},
        ("lacks ['two/lora/a', 'two/lora/b']", "besides ['one/lora/a', 'one/lora/b']"),
    ),
    "more paths": (
        {"metadata": lambda: metadata_of(targets=("one", "two"))},
        ("lacks ['two/lora/a', 'two/lora/b']",),
    ),
    "metadata of another kind": ({"metadata": dict}, ("AdapterMetadata", "dict")),
}


@pytest.mark.parametrize(("options", "texts"), ADAPTERS.values(), ids=ADAPTERS)
def test_exports_of_adapters(options, texts, refuses, tmp_path):
    options = {key: value() if callable(value) else value for key, value in options.items()}
    given = {"params": flow().params, "encodings": flow().encodings, **options}
    refuses(lambda: quantsim.export_adapter(tmp_path, prefix="x", **given), *texts)


@pytest.mark.parametrize("prefix", ["", "a/b", ".", "/", "a\0b", 3, None, b"a"], ids=repr)
def test_prefixes(prefix, refuses, tmp_path):
    given = flow()
    for export in (quantsim.export_base, quantsim.export_adapter):
        refuses(
            lambda export=export: export(tmp_path, given.params, given.encodings, prefix=prefix),
            "prefix",
            repr(prefix),
        )


def test_a_prefix_that_is_too_long(tmp_path):
    """The system refuses it; nothing is left behind."""
    given = flow()
    for length in (244, 300):
        with pytest.raises((OSError, ValueError)):
            quantsim.export_base(tmp_path, given.params, given.encodings, prefix="a" * length)
        assert not [*tmp_path.iterdir()], length


@pytest.mark.parametrize("directory", ["nothing", "kept", 3, None])
def test_directories(directory, refuses, tmp_path):
    given = flow()
    where = tmp_path / directory if isinstance(directory, str) else directory
    for export in (quantsim.export_base, quantsim.export_adapter):
        refuses(
            lambda export=export: export(where, given.params, given.encodings, prefix="x"),
            "directory",
            directory,
        )


# --- Adapters ------------------------------------------------------------------------------------


def lora():
    return peft.get_adapter(flow().params)


USES = {
    "none": ({"source": lambda: None}, ("adapters of one name",)),
    "number": ({"source": lambda: 3}, ("adapters of one name",)),
    "empty": ({"source": dict}, ("adapters of one name", "[]")),
    "base": ({"source": lambda: peft.split_params(flow().params)[0]}, ("adapters of one name",)),
    "two names": (
        {"source": lambda: peft.add_adapter(flow().params, lora(), "x")},
        ("adapters of one name", "x"),
    ),
    "ranks": ({"metadata": lambda: metadata_of(rank=3)}, ("'one/lora/a'", "(4, 2)", "rank 3")),
    "paths": (
        {"metadata": lambda: metadata_of(targets=("two",))},
        ("lacks ['two/lora/a', 'two/lora/b']", "besides ['one/lora/a'", "same layers"),
    ),
    "more paths": (
        {"metadata": lambda: metadata_of(targets=("one", "two"))},
        ("lacks ['two/lora/a', 'two/lora/b']",),
    ),
    "another name": ({"adapter_name": "x"}, ("'x'", "['default']")),
    "a name with a dot": ({"adapter_name": "a.b"}, ("'a.b'", "dots")),
    "metadata of another kind": ({"metadata": dict}, ("AdapterMetadata", "dict")),
    "no metadata": ({"metadata": lambda: None}, ("AdapterMetadata", "None")),
    "parameters of nothing": ({"params": dict}, ("'one'",)),
    "inputs": ({"source": lambda: changed("a", (9, 2))}, ("one/lora", "(9, 2)")),
    "outputs": ({"source": lambda: changed("b", (2, 7))}, ("one/lora", "(2, 7)")),
    "transposed": ({"source": lambda: changed("b", (6, 2))}, ("one/lora", "(6, 2)")),
}


def changed(leaf, shape):
    return {"one": {"lora": {**lora()["one"]["lora"], leaf: jnp.ones(shape)}}}


@pytest.mark.parametrize(("options", "texts"), USES.values(), ids=USES)
def test_adapters_that_are_not_the_models(options, texts, refuses):
    options = {key: value() if callable(value) else value for key, value in options.items()}
    given = {"params": flow().params, "source": lora(), "metadata": flow().metadata, **options}
    refuses(lambda: quantsim.use_adapter(**given), *texts)


def test_a_file_of_another_scaling(tmp_path):
    """Both factors, and where, are told."""
    given = flow()
    path, _ = quantsim.export_adapter(
        tmp_path, given.params, given.encodings, prefix="one", metadata=given.metadata
    )
    with pytest.raises(ValueError, match=r"one\.safetensors.*'one/lora/a'.*2\.0.*4\.0.*Scale `b`"):
        quantsim.use_adapter(given.params, path, metadata_of(alpha=8))
    with pytest.raises(ValueError, match=r"one\.safetensors.*'one/lora/a'.*rank 3"):
        quantsim.use_adapter(given.params, path, metadata_of(rank=3))
    with pytest.raises(ValueError, match=r"one\.safetensors.*two/lora/a"):
        quantsim.use_adapter(given.params, path, metadata_of(targets=("two",)))


@pytest.mark.parametrize("specs", [{}, None, 3, {"one/lora": {}}], ids=repr)
def test_metadata_of_no_adapters(specs, refuses):
    refuses(lambda: quantsim.adapter_metadata(specs), "lora_specs")


def test_metadata_of_a_plain_model(refuses):
    refuses(
        lambda: quantsim.adapter_metadata(peft.lora_specs(Net(), X)), "no adapters", "lora_specs"
    )


def test_metadata_of_another_name(refuses):
    refuses(lambda: flow().metadata.layers("x"), "'x'", "['default']")
    refuses(lambda: flow().metadata.check(lora(), "x"), "'x'", "['default']")
    refuses(lambda: flow().metadata.check(None), "one/lora/a", "lacks")


@pytest.mark.parametrize("model", [None, lambda: flow().model, lambda: Net()], ids=["0", "1", "2"])
def test_sites_of_a_model_that_is_not_simulated(model, refuses):
    refuses(lambda: quantsim.find_sites(model and model(), X), "quantsim.simulate")


@pytest.mark.parametrize("sites", [None, [], lambda: flow().sim, {}], ids=["0", "1", "2", "3"])
def test_encodings_for_sites_that_are_none(sites, tmp_path):
    given = flow()
    _, path = quantsim.export_base(tmp_path, given.params, given.encodings)
    with pytest.raises(ValueError, match=r"site"):
        quantsim.load_encodings(path, sites() if callable(sites) else sites)


def test_encodings_of_another_model_in_a_file(tmp_path):
    given = flow()
    _, path = quantsim.export_base(tmp_path, given.params, given.encodings)
    with pytest.raises(ValueError, match=r"base\.encodings.*'one/kernel'.*8 numbers"):
        quantsim.load_encodings(path, quantsim.find_sites(flow(8).sim, X))
    with pytest.raises(ValueError, match=r"base\.encodings.*'one/kernel'.*bw 8.*4"):
        quantsim.load_encodings(path, quantsim.find_sites(configured(weights=Quantizer(4)), X))


# --- What would be silent ------------------------------------------------------------------------


def test_integers_in_the_place_of_weights(refuses):
    """Codes are for a runtime: the simulation computes with floats."""
    given = flow()
    codes = quantsim.integer_params(given.params, given.encodings)

    def run():
        return given.sim.apply({"params": codes}, X, encodings=given.encodings)

    refuses(run, "one/kernel", "int8", "floats")
    refuses(lambda: computed(params=codes), "one/", "int8", "floats")


def test_parameters_that_an_adapter_trained_in_place(refuses):
    """They are the base's, which is exported once."""
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["one"], modules_to_save=["two"])
    params = peft.add_adapter(peft.split_params(flow().params)[0], lora())
    trained = peft.get_adapter(params, config=config)
    assert "two" in trained
    use = functools.partial(quantsim.use_adapter, flow().params, trained, flow().metadata)
    refuses(use, "two/kernel", "has besides")


def test_a_scaling_beyond_its_grid(refuses):
    """A number that is known before anything runs is never clipped in silence."""
    sim = configured(adapter_scaling=Quantizer(16, range=(0, 1)))
    refuses(lambda: computed(sim, encodings=flow().base), "one/lora/scaling", "is 2.0", "range")
    inside = computed(
        configured(adapter_scaling=Quantizer(16, range=(0, 2))), encodings=flow().base
    )
    assert inside["one"]["lora"]["scaling"].max == pytest.approx(2.0)


def test_frozen_grids_of_another_scaling(refuses):
    given = flow()
    config = peft.LoraConfig(r=2, lora_alpha=8, target_modules=["one"], init_lora_weights=False)
    other = quantsim.simulate(peft.get_peft_model(Net(), config))
    frozen = quantsim.freeze(given.encodings, parameters=False, adapters=True)
    refuses(lambda: computed(other, encodings=frozen), "one/lora/scaling", "is 4.0")


def test_an_adapter_in_the_place_of_the_base(tmp_path):
    given = flow()
    quantsim.export_base(tmp_path, given.params, given.encodings, prefix="same")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=r"same\.safetensors.*holds the base.*another prefix"):
        quantsim.export_adapter(tmp_path, given.params, given.encodings, prefix="same")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_file_without_scalings(tmp_path):
    given = flow()
    path, _ = quantsim.export_adapter(tmp_path, given.params, given.encodings, prefix="one")
    with pytest.raises(ValueError, match=r"one\.safetensors.*scalings.*metadata="):
        quantsim.use_adapter(given.params, path, given.metadata)


class Enclosing(nn.Module):
    @nn.compact
    def __call__(self, x):
        return Inner(name="inner")(x)


class Inner(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="output")(x)


def test_a_submodule_with_the_name_of_a_site(refuses):
    model = Enclosing()
    params = model.init(key_of(0), X)["params"]
    rules = (QuantizerRule("inner/output", Quantizer(8)),)
    sim = quantsim.simulate(model, SimulationConfig(rules=rules))
    refuses(lambda: quantsim.compute_encodings(sim, params, [X]), "inner/output", "submodule")
    plain = quantsim.compute_encodings(quantsim.simulate(model), params, [X])
    assert set(plain["inner"]["output"]) == {"input", "kernel", "output"}


def test_an_export_beside_the_grid(tmp_path, refuses):
    """Somebody forgot to compute encodings for the adapter that came."""
    given = flow()
    larger = jax.tree.map(lambda leaf: 50 * leaf, lora())
    params = quantsim.use_adapter(given.params, larger, given.metadata)

    def export():
        quantsim.export_adapter(tmp_path, params, given.encodings, prefix="other")

    refuses(export, "one/lora/a", "its grid ends at", "compute_encodings")


def test_an_adapter_without_a_width():
    """`b` starts as zeros."""
    given = flow()
    zeros = jax.tree.map(jnp.zeros_like, lora())
    params = quantsim.use_adapter(given.params, zeros, given.metadata)
    with pytest.warns(UserWarning, match="all zeros.*fixed range"):
        computed(params=params, encodings=given.base)


# --- Trees and bars ------------------------------------------------------------------------------


def test_trees_are_merged_where_they_share_no_path(refuses):
    """The base's and an adapter's, from files of their own."""
    given = flow()
    adapter = {"one": {"lora": given.encodings["one"]["lora"]}}
    chex.assert_trees_all_equal(quantsim.merge_encodings(given.base, adapter), given.encodings)
    refuses(lambda: quantsim.merge_encodings(given.base, given.encodings), "one/input")


def test_a_bar_counts_the_batches(capsys):
    """And none is shown unless it is asked for."""
    computed(batches=[X, X, X])
    assert capsys.readouterr().err == ""
    computed(batches=[X, X, X], progress=True)
    assert "calibrating: 3 batches" in capsys.readouterr().err

"""Layer replication: larger models made of a smaller one's layers, whose weights they share."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import serialization
from flax.core import FrozenDict, meta
from helpers import assert_close, key_of, numbers, partly_slow

import peft_jax as peft
from peft_jax.adapters import SharedStack, replicate_layers
from peft_jax.initializers import init_lora_weights

RANGES = [[0, 4], [2, 5]]
LAYERS = (0, 1, 2, 3, 2, 3, 4)
KEY = key_of(0)
X = numbers(4, 16)
CONFIG = peft.LoraConfig(r=2, target_modules=["q"], layer_replication=RANGES)
PLAIN_CONFIG = dataclasses.replace(CONFIG, layer_replication=None)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        shift = self.param("shift", nn.initializers.ones, (1, x.shape[-1]))
        h = nn.Dense(x.shape[-1], name="p")(x + shift)
        return x + nn.Dense(x.shape[-1], name="q")(jnp.tanh(h)), None


class Named(nn.Module):
    num_layers: int

    @nn.compact
    def __call__(self, x):
        for i in range(self.num_layers):
            x, _ = Block(name=f"layers_{i}")(x)
        return nn.Dense(3, name="head")(x)


class Scanned(nn.Module):
    num_layers: int
    axis: int = 0
    block: Any = Block
    lift: Any = nn.scan

    @nn.compact
    def __call__(self, x):
        layers = self.lift(
            self.block,
            variable_axes={"params": self.axis},
            split_rngs={"params": True},
            length=self.num_layers,
        )
        x, _ = layers(name="layers")(x, None)
        return nn.Dense(3, name="head")(x)


def drawn(model, x=X):
    """Parameters of the model, also those that start as zeros, without a program to draw them."""
    leaves, tree = jax.tree.flatten(jax.eval_shape(model.init, KEY, x)["params"])
    return jax.tree.unflatten(
        tree, [0.3 * numbers(*leaf.shape, seed=i) for i, leaf in enumerate(leaves)]
    )


def run(model, params, x=X):
    return model.apply({"params": params}, x)


def assert_same(pair, *args, tolerance=1e-5):
    """Both results of a function, from one program."""
    assert_close(*jax.jit(pair)(*args), tolerance)


def loss_of(model, x=X):
    def loss(lora, base):
        return jnp.mean(model.apply({"params": peft.merge_params(base, lora)}, x) ** 2)

    return loss


# --- Layers with names of their own --------------------------------------------------------------


def layer(number):
    return {"q": {"kernel": jnp.full((2, 2), number, jnp.float32), "bias": jnp.zeros(2)}}


def number_of(layer):
    return int(layer["q"]["kernel"][0, 0])


FORMS = {
    "stem": ({"net": {f"h_{i}": layer(i) for i in range(5)}}, "h", lambda t, i: t["net"][f"h_{i}"]),
    "digits": ({"h": {str(i): layer(i) for i in range(5)}}, "h", lambda t, i: t["h"][str(i)]),
    "integers": ({"h": {i: layer(i) for i in range(5)}}, "h", lambda t, i: t["h"][i]),
    "list": ({"h": [layer(i) for i in range(5)]}, "h", lambda t, i: t["h"][i]),
    "tuple": ({"h": tuple(layer(i) for i in range(5))}, "h", lambda t, i: t["h"][i]),
    "frozen": (
        FrozenDict({"net": {"h": {str(i): layer(i) for i in range(5)}}}),
        "net.h",
        lambda t, i: t["net"]["h"][str(i)],
    ),
}


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_layers_with_an_index_share_their_arrays(form, named):
    params, pattern, get = FORMS[form]
    big = replicate_layers(params, RANGES, pattern=pattern if named else None)
    assert type(big) is type(params)
    assert [number_of(get(big, i)) for i in range(7)] == list(LAYERS)
    with pytest.raises((KeyError, IndexError)):
        get(big, 7)
    for place, index in enumerate(LAYERS):
        assert get(big, place)["q"]["kernel"] is get(params, index)["q"]["kernel"]
    pointers = [get(big, i)["q"]["kernel"].unsafe_buffer_pointer() for i in range(7)]
    assert pointers[4:6] == pointers[2:4]
    assert len(set(pointers)) == 5


def test_containers_are_not_shared():
    big = replicate_layers({f"h_{i}": layer(i) for i in range(5)}, RANGES)
    big["h_4"]["q"]["kernel"] = None
    assert big["h_2"]["q"]["kernel"] is not None


def test_what_lies_beside_the_layers_stays():
    params = drawn(Named(5))
    big = replicate_layers(params, RANGES)
    assert set(big) == {"head", *(f"layers_{i}" for i in range(7))}
    assert big["head"]["kernel"] is params["head"]["kernel"]


def test_boxes_and_stored_values_are_shared():
    class Boxed(nn.Module):
        @nn.compact
        def __call__(self, x):
            for i in range(5):
                kernel_init = nn.with_partitioning(nn.initializers.lecun_normal(), ("in", "out"))
                x = nn.Dense(16, kernel_init=kernel_init, name=f"layers_{i}")(x)
            return x

    params = drawn(Boxed())
    big = replicate_layers(params, RANGES)
    assert big["layers_4"]["kernel"] is params["layers_2"]["kernel"]
    values, scale = peft.quantize(numbers(4, 4), "int8", axes=0)
    stored = {f"h_{i}": {"kernel": values, "scale": scale} for i in range(5)}
    big = replicate_layers(stored, RANGES)
    assert big["h_4"]["kernel"] is values
    assert big["h_4"]["scale"] is scale


def test_a_replicated_model_is_the_one_that_is_built_by_hand():
    def both(params):
        x = X
        for index in LAYERS:
            x, _ = Block().apply({"params": params[f"layers_{index}"]}, x)
        by_hand = nn.Dense(3).apply({"params": params["head"]}, x)
        return run(Named(7), replicate_layers(params, RANGES, pattern="layers")), by_hand

    assert_same(both, drawn(Named(5)))


def test_each_layer_has_adapters_of_its_own():
    params = drawn(peft.get_peft_model(Named(5), PLAIN_CONFIG))
    big = replicate_layers(params, RANGES)
    adapters = [big[f"layers_{i}"]["q"]["lora"] for i in range(7)]
    assert_close(adapters[2], adapters[4])
    assert len({adapter["a"].unsafe_buffer_pointer() for adapter in adapters}) == 7

    larger = peft.get_peft_model(Named(7), PLAIN_CONFIG)
    base, lora = peft.split_params(big)
    grads = jax.jit(jax.grad(loss_of(larger)))(lora, base)
    assert not np.allclose(grads["layers_2"]["q"]["lora"]["b"], grads["layers_4"]["q"]["lora"]["b"])


def test_replicas_are_fused_each_by_its_own_adapter():
    larger = peft.get_peft_model(Named(7), PLAIN_CONFIG)
    specs = peft.lora_specs(larger, X)
    lora = peft.split_params(drawn(larger)).lora

    def both(base, lora):
        params = peft.merge_params(replicate_layers(base, RANGES), lora)
        fused = peft.fuse_params(params, specs=specs)
        return run(Named(7), fused), run(larger, params)

    assert_same(both, drawn(Named(5)), lora, tolerance=1e-4)


def test_replicating_twice_composes():
    params = {f"h_{i}": layer(i) for i in range(5)}
    twice = replicate_layers(replicate_layers(params, RANGES), [[3, 7], [0, 1]])
    assert [number_of(twice[f"h_{i}"]) for i in range(5)] == [3, 2, 3, 4, 0]
    stacked = {"h": {"w": jnp.arange(5.0)}}
    twice = replicate_layers(stacked, RANGES, pattern="h")
    twice = replicate_layers(twice, [[3, 7], [0, 1]], pattern="h")
    assert twice["h"]["w"].value is stacked["h"]["w"]
    assert meta.unbox(twice)["h"]["w"].tolist() == [3, 2, 3, 4, 0]


def test_all_families_that_the_pattern_names():
    tree = {side: {f"layers_{i}": layer(i) for i in range(5)} for side in ("encoder", "decoder")}
    both = replicate_layers(tree, RANGES, pattern="layers")
    assert [len(both[side]) for side in tree] == [7, 7]
    one = replicate_layers(tree, RANGES, pattern="encoder/layers")
    assert [len(one[side]) for side in tree] == [7, 5]


BAD = {
    "several families": ({"encoder": [layer(0)] * 5, "decoder": [layer(0)] * 5}, RANGES, None),
    "no families of more than 4 layers": ({"h": [layer(0)] * 3}, RANGES, None),
    r"have this name.*'h' \(5 layers\)": ({"h": [layer(0)] * 5}, RANGES, "layers"),
    "up to layer 4, but 'h' has 3 layers": ({"h": [layer(0)] * 3}, RANGES, "h"),
    r"indices \[0, 2\]": ({"h_0": layer(0), "h_2": layer(0)}, [[0, 1]], "h"),
    "lies something at": ({"h": [*[layer(0)] * 5, jnp.zeros(2)]}, RANGES, "h"),
    "no stack of layers along axis 0": ({"h": {"a": jnp.zeros(5), "b": jnp.zeros(4)}}, RANGES, "h"),
    r"shapes are \{'h/a': \(\)": ({"h": {"a": jnp.zeros(())}}, RANGES, "h"),
    "up to layer 4, but 'h' has 4 layers": ({"h": {"a": jnp.zeros(4)}}, RANGES, "h"),
    "takes a parameter tree": (jnp.zeros(3), RANGES, None),
    "pattern is a regular expression": ({"h": [layer(0)] * 5}, RANGES, "("),
    r"such as \[\[0, 4\], \[2, 5\]\], got \[\]": ({"h": [layer(0)] * 5}, [], "h"),
    r"got \[\[2, 2\]\]": ({"h": [layer(0)] * 5}, [[2, 2]], "h"),
    r"got \[\[-1, 2\]\]": ({"h": [layer(0)] * 5}, [[-1, 2]], "h"),
    r"got \[0, 4\]": ({"h": [layer(0)] * 5}, [0, 4], "h"),
    r"got '0-4'": ({"h": [layer(0)] * 5}, "0-4", "h"),
    r"got \[\[0, 1\.5\]\]": ({"h": [layer(0)] * 5}, [[0, 1.5]], "h"),
    r"got None": ({"h": [layer(0)] * 5}, None, "h"),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(message):
    params, ranges, pattern = BAD[message]
    with pytest.raises(ValueError, match=message):
        replicate_layers(params, ranges, pattern=pattern)


# --- Stacked layers ------------------------------------------------------------------------------


def test_a_stack_is_kept_as_it_is():
    params = drawn(Scanned(5))
    big = replicate_layers(params, RANGES, pattern="layers")
    for kept, shared in zip(
        jax.tree.leaves(params["layers"]), jax.tree.leaves(big["layers"]), strict=True
    ):
        assert kept is shared
    assert big["layers"]["q"]["kernel"].layers == LAYERS
    assert meta.unbox(big)["layers"]["q"]["kernel"].shape == (7, 16, 16)
    assert big["head"]["kernel"] is params["head"]["kernel"]


class Groups(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        x, _ = Scanned(3, name="group")(x), None
        return nn.Dense(16)(x), None


class InGroups(nn.Module):
    """Layers stacked inside stacked groups: the layers lie along axis 1."""

    num_layers: int

    @nn.compact
    def __call__(self, x):
        lift = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}

        class Group(nn.Module):
            number: int

            @nn.compact
            def __call__(self, x, _):
                return nn.scan(Block, length=self.number, **lift)(name="layers")(x, None)

        return nn.scan(Group, length=3, **lift)(self.num_layers, name="groups")(x, None)[0]


class ByFunction(nn.Module):
    num_layers: int

    @nn.compact
    def __call__(self, x):
        def body(module, x, train):
            assert train is True
            return Block(name="layers")(x)[0], None

        lift = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
        scan = nn.scan(body, length=self.num_layers, in_axes=nn.broadcast, **lift)
        return scan(self, x, True)[0]


def outside(lift):
    return lambda *args, **kwargs: lift(nn.scan(*args, **kwargs))


STACKS = {
    "scan": Scanned(5),
    "scan along the last axis": Scanned(5, axis=-1),
    "remat": Scanned(5, block=nn.remat(Block, prevent_cse=False)),
    "jit": Scanned(5, block=nn.jit(Block)),
    "remat outside": Scanned(5, lift=outside(nn.remat)),
    "groups": Scanned(5, block=Groups),
    "in groups": InGroups(5),
}


def assert_like_the_longer_stack(model, config=CONFIG, base=None, x=X):
    """Values, and gradients by the adapters, are those on the stack that is written out."""
    larger = peft.get_peft_model(model, config)
    plain = dataclasses.replace(config, layer_replication=None)
    by_hand = peft.get_peft_model(model.clone(num_layers=7), plain)
    own, lora = peft.split_params(drawn(larger, x))
    base = own if base is None else base

    def both(lora, base):
        ours = jax.value_and_grad(loss_of(larger, x))(lora, base)
        return ours, jax.value_and_grad(loss_of(by_hand, x))(lora, meta.unbox(base))

    assert_same(both, lora, base)


@pytest.mark.parametrize("name", partly_slow(list(STACKS), list(STACKS)[::2]))
def test_a_shared_stack_is_the_longer_stack(name):
    assert_like_the_longer_stack(STACKS[name])


def test_plain_flax_reads_a_shared_stack():
    base = replicate_layers(drawn(Scanned(5)), RANGES, pattern="layers")
    assert_same(lambda base: (run(Scanned(7), base), run(Scanned(7), meta.unbox(base))), base)


def test_a_scanned_function_with_arguments_that_are_no_arrays():
    assert_like_the_longer_stack(ByFunction(5))


def test_adapters_on_a_stack_are_written_out():
    model = peft.get_peft_model(Scanned(5), PLAIN_CONFIG)
    params = drawn(model)
    big = replicate_layers(params, RANGES, pattern="layers")
    a = big["layers"]["q"]["lora"]["a"]
    assert a.shape == (7, 16, 2)
    np.testing.assert_array_equal(a, params["layers"]["q"]["lora"]["a"][jnp.array(LAYERS)])


VARIANTS = {
    "dora": {"use_dora": True},
    "lora_bias": {"lora_bias": True},
    "all-linear": {"target_modules": "all-linear"},
    "parameters": {"target_modules": None, "target_parameters": ["q.kernel"]},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_on_a_shared_stack(variant):
    assert_like_the_longer_stack(Scanned(5), dataclasses.replace(CONFIG, **VARIANTS[variant]))


def test_the_magnitude_starts_as_each_layers_own_norm():
    larger = peft.get_peft_model(Scanned(5), dataclasses.replace(CONFIG, use_dora=True))
    params = jax.jit(larger.init)(KEY, X)["params"]["layers"]["q"]
    norms = jnp.linalg.norm(meta.unbox(params["kernel"]), axis=1)
    assert_close(params["lora"]["magnitude"], norms)


@dataclasses.dataclass(frozen=True)
class Quantized:
    method: str

    def __call__(self, module):
        if isinstance(module, nn.Dense) and "layers" in module.scope.path:
            return peft.Int4Dense(wrapped=module, method=self.method)
        return module


@pytest.mark.slow
@pytest.mark.parametrize(("method", "axis"), [("int4", 1), ("nf4", 0)])
def test_a_quantized_stack(method, axis):
    x, model = numbers(4, 64), Scanned(5, axis=axis)
    small = peft.quantize_checkpoint(
        drawn(model, x),
        method=method,
        specs=peft.layer_specs(model, x),
        select=lambda path, *_: path.startswith("layers") and path.endswith("kernel"),
    )
    base = replicate_layers(small, RANGES, pattern="layers", axis=axis)
    assert base["layers"]["q"]["kernel"].value is small["layers"]["q"]["kernel"]
    with peft.ModuleInterceptor(Quantized(method)):
        assert_like_the_longer_stack(model, base=base, x=x)


@pytest.mark.parametrize("block", [Block, nn.remat(Block, prevent_cse=False)])
@pytest.mark.optimized
def test_memory_holds_one_stack(block):
    """Neither forwards nor backwards is a stack of 7 layers made out of the 5."""
    x, model, stack = numbers(4, 64), Scanned(5, block=block), 5 * 2 * 64 * 64 * 4
    larger = peft.get_peft_model(model, CONFIG)
    by_hand = peft.get_peft_model(model.clone(num_layers=7), PLAIN_CONFIG)
    base, lora = peft.split_params(drawn(larger, x))
    long = jax.eval_shape(meta.unbox, base)
    ours = jax.jit(jax.value_and_grad(loss_of(larger, x))).lower(lora, base).compile()
    theirs = jax.jit(jax.value_and_grad(loss_of(by_hand, x))).lower(lora, long).compile()
    assert "f32[7,64,64]" not in ours.as_text()
    assert "f32[7,64,64]" in theirs.as_text()
    ours, theirs = ours.memory_analysis(), theirs.memory_analysis()
    assert theirs.argument_size_in_bytes - ours.argument_size_in_bytes > 0.4 * stack
    assert ours.temp_size_in_bytes < theirs.temp_size_in_bytes + 0.02 * stack
    assert ours.temp_size_in_bytes < stack


def test_one_program_serves_equal_arrangements():
    larger = peft.get_peft_model(Scanned(5), CONFIG)
    traced = []

    @jax.jit
    def forward(params):
        traced.append(None)
        return larger.apply({"params": params}, X)

    params = drawn(larger)
    forward(params)
    forward(jax.tree.map(lambda leaf: leaf.copy(), params))
    assert len(traced) == 1


@pytest.mark.slow
def test_no_tracer_outlives_the_call():
    larger = peft.get_peft_model(Scanned(5), CONFIG)
    params = drawn(larger)
    with jax.checking_leaks():
        jax.eval_shape(jax.grad(loss_of(larger)), *reversed(peft.split_params(params)))


def test_a_jitted_layer_reads_the_stack_of_the_call():
    """A program that jit has kept does not keep the stack that it was made with."""
    larger = peft.get_peft_model(Scanned(5, block=nn.jit(Block)), CONFIG)
    params = drawn(larger)
    doubled = jax.tree.map(lambda leaf: 2 * leaf, params)
    forward = jax.jit(lambda params, doubled: (run(larger, params), run(larger, doubled)))
    first, second = forward(params, doubled)
    assert not np.allclose(first, second)
    assert_close(second, forward(doubled, params)[0])


def test_the_whole_tree_can_be_differentiated():
    def both(big):
        def loss(params):
            return jnp.sum(run(Scanned(7), params) ** 2)

        ours = jax.grad(loss)(big)["layers"]["q"]["kernel"].value
        by_hand = jax.grad(loss)(meta.unbox(big))["layers"]["q"]["kernel"]
        return ours, jnp.zeros((5, 16, 16)).at[jnp.array(LAYERS)].add(by_hand)

    big = replicate_layers(drawn(Scanned(5)), RANGES, pattern="layers")
    assert_same(both, big, tolerance=1e-4)


def test_partitioning_carries_over():
    class Part(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            kernel_init = nn.with_partitioning(nn.initializers.lecun_normal(), ("in", "out"))
            return nn.Dense(16, kernel_init=kernel_init, name="q")(x), None

    def scan(*args, **kwargs):
        return nn.scan(*args, metadata_params={nn.PARTITION_NAME: "layers"}, **kwargs)

    larger = peft.get_peft_model(Scanned(5, block=Part, lift=scan), CONFIG)
    params = drawn(larger)
    specs = nn.get_partition_spec(params)["layers"]["q"]
    assert specs["kernel"] == jax.sharding.PartitionSpec("layers", "in", "out")
    assert specs["lora"]["a"] == jax.sharding.PartitionSpec("layers", "in", None)
    assert jax.eval_shape(lambda params: run(larger, params), params).shape == (4, 3)


def test_a_shared_stack_is_saved_and_restored():
    big = replicate_layers(drawn(Scanned(5)), RANGES, pattern="layers")
    state = serialization.to_bytes(big)
    zeros = jax.tree.map(np.zeros_like, big)
    restored = serialization.from_bytes(zeros, state)
    assert jax.tree.structure(restored) == jax.tree.structure(big)
    jax.tree.map(np.testing.assert_array_equal, restored, big)
    other = replicate_layers(drawn(Scanned(5)), [[0, 5]], pattern="layers")
    with pytest.raises(ValueError, match="replicated by the same ranges"):
        serialization.from_bytes(other, state)


def test_layers_under_a_norm_are_refused():
    class Normed(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.WeightNorm(nn.Dense(16, name="q"))(x), None

    model = Scanned(5, block=Normed)
    with pytest.raises(ValueError, match=r"WeightNorm normalises parameters.*Write out the stack"):
        drawn(peft.get_peft_model(model, CONFIG))


def test_shapes_of_another_model_are_refused():
    config = dataclasses.replace(CONFIG, target_modules=None, target_parameters=["q.kernel"])
    larger = peft.get_peft_model(Scanned(5), config)
    params = drawn(larger)
    params["layers"]["q"]["kernel"] = SharedStack(jnp.zeros((5, 8, 16)), LAYERS, 0)
    with pytest.raises(ValueError, match=r"of shape \(8, 16\), but Dense needs \(16, 16\)"):
        run(larger, params)


# --- `layer_replication` in the config -----------------------------------------------------------


@pytest.mark.parametrize("model", [Named(5), Scanned(5)])
def test_the_config_does_it_in_one_step(model):
    larger = peft.get_peft_model(model, CONFIG)
    assert (larger.num_layers, model.num_layers) == (7, 5)

    @jax.jit
    def everything(key):
        y, variables = larger.init_with_output(key, X)
        base, lora = peft.split_params(variables["params"])
        expected = replicate_layers(model.init(key, X)["params"], RANGES, pattern="layers")
        plain = run(model.clone(num_layers=7), expected)
        return base, expected, lora, (y, run(larger, variables["params"]), plain)

    base, expected, lora, outputs = everything(KEY)
    assert jax.tree.structure(base) == jax.tree.structure(expected)
    assert_close(base, expected)
    assert_close(outputs[0], outputs[1])
    assert_close(outputs[0], outputs[2])
    draws = [a for a in map(np.asarray, jax.tree.leaves(lora)) if a.any()]
    draws = draws[0] if isinstance(model, Scanned) else draws
    assert len(draws) == 7
    assert not any(np.allclose(draws[i], draws[j]) for i in range(7) for j in range(i))
    assert len(peft.lora_specs(larger, X)) == (1 if isinstance(model, Scanned) else 7)


def test_initialisers_and_fusing_on_a_shared_stack():
    larger, plain = peft.get_peft_model(Scanned(5), CONFIG), Scanned(7)
    pretrained = replicate_layers(drawn(Scanned(5)), RANGES, pattern="layers")
    specs = peft.lora_specs(larger, X)
    base, lora = init_lora_weights(pretrained, specs, KEY, method="pissa")
    trained = jax.tree.map(lambda leaf: leaf + 0.1 * numbers(*leaf.shape), lora)

    @jax.jit
    def both(pretrained, base, lora, trained):
        start = run(larger, peft.merge_params(base, lora)), run(plain, pretrained)
        params = peft.merge_params(pretrained, trained)
        fused = peft.fuse_params(params, specs=specs)
        return start, (run(plain, fused), run(larger, params)), fused

    *pairs, fused = both(pretrained, base, lora, trained)
    for pair in pairs:
        assert_close(*pair, tolerance=1e-3)
    assert fused["layers"]["q"]["kernel"].shape == (7, 16, 16)
    assert fused["layers"]["p"]["kernel"].value.shape == (5, 16, 16)  # shared as before


def test_training_brings_the_loss_down(relaxed_promotion):
    larger = peft.get_peft_model(Scanned(5), dataclasses.replace(CONFIG, target_modules=["p", "q"]))
    base, lora = peft.split_params(drawn(larger))
    optimizer, loss = optax.adam(1e-2), loss_of(larger)

    @jax.jit
    def train(lora, base):
        def step(state, _):
            lora, moments = state
            value, grads = jax.value_and_grad(loss)(lora, base)
            updates, moments = optimizer.update(grads, moments)
            return (optax.apply_updates(lora, updates), moments), value

        return jax.lax.scan(step, (lora, optimizer.init(lora)), length=40)[1]

    values = train(lora, base)
    assert values[-1] < 0.2 * values[0]


@dataclasses.dataclass(frozen=True)
class Frozen:
    n_layer: int = 5
    block_size: int = 64


class Plain:
    def __init__(self):
        self.num_hidden_layers = 5
        self.hidden_size = 16


class Layers(nn.Module):
    number: int

    @nn.compact
    def __call__(self, x):
        for i in range(self.number):
            x = nn.Dense(16, name=str(i))(x)
        return x


class Bert(nn.Module):
    """Laid out as those of transformers: a config that all modules hold, layers by number."""

    config: Any

    def setup(self):
        config = self.config
        for name in ("n_layer", "num_layers", "num_hidden_layers"):
            if hasattr(config, name):
                number = getattr(config, name)
            elif isinstance(config, dict | FrozenDict) and name in config:
                number = config[name]
        self.layer = Layers(number)
        self.pooler = nn.Dense(3)

    def encode(self, x):
        return self.layer(x)

    def __call__(self, x):
        return self.pooler(self.encode(x))


@pytest.mark.parametrize(
    "config", [Frozen(), Plain(), {"num_hidden_layers": 5}, FrozenDict({"n_layer": 5})]
)
def test_the_number_of_layers_stands_in_a_config(config):
    before = repr(config), dict(getattr(config, "__dict__", {}))
    peft_config = dataclasses.replace(CONFIG, target_modules=["0", "4", "6"])
    model = peft.get_peft_model(Bert(config), peft_config)
    assert type(model.config) is type(config)
    assert before == (repr(config), dict(getattr(config, "__dict__", {})))
    params = drawn(model)
    assert sorted(params["layer"]) == [str(i) for i in range(7)]
    for method in ("encode", Bert.encode):
        part = jax.eval_shape(lambda: model.init(KEY, X, method=method))["params"]  # noqa: B023
        assert list(part) == ["layer"]


def test_layers_of_the_config_share_buffers():
    config = dataclasses.replace(CONFIG, target_modules=["0", "4", "6"])
    params = peft.get_peft_model(Bert({"num_layers": 5}), config).init(KEY, X)["params"]["layer"]
    for place, index in enumerate(LAYERS):
        first = params[str(LAYERS.index(index))]
        assert params[str(place)]["kernel"] is first["kernel"]
    assert params["4"]["lora"]["a"] is not params["2"].get("lora")


@pytest.mark.parametrize("model", [Named(5), Scanned(5)])
def test_as_many_layers_as_there_were(model):
    ranges = [[3, 5], [0, 3]]
    larger = peft.get_peft_model(model, dataclasses.replace(CONFIG, layer_replication=ranges))

    def both(key):
        base = peft.split_params(larger.init(key, X)["params"]).original
        small = model.init(key, X)["params"]
        return base, replicate_layers(small, ranges, pattern="layers")

    assert_same(both, KEY)


class Two(nn.Module):
    encoder_layers: int = 5
    decoder_layers: int = 5

    def __call__(self, x):
        return x


class Unused(nn.Module):
    depth: int = 5

    @nn.compact
    def __call__(self, x):
        return nn.Dense(16, name="q")(x)


class Odd(nn.Module):
    num_layers: int = 5

    @nn.compact
    def __call__(self, x):
        for i in range(self.num_layers):
            x = nn.Dense(16, name=f"layer{'abcdefg'[i]}")(x)
        return x


class Wide(nn.Module):
    num_layers: int = 5

    @nn.compact
    def __call__(self, x):
        return nn.Dense(2 * self.num_layers, name="q")(x)


UNCLEAR = {
    r"2 of its attributes.*'encoder_layers': 5.*Build the model": Two(),
    r"0 of its attributes may be that number, above 4: \{'num_layers': 4\}": Named(4),
    "0 of its attributes": nn.Dense(3),
    "same parameters with depth = 5 and 7": Unused(),
    r"has others than .*not by an index": Odd(),
    r"shape \(.*10,?\) in a model of 5 layers, and \(.*14": Wide(),
}


@pytest.mark.parametrize("message", UNCLEAR)
def test_models_whose_layers_are_unclear(message):
    with pytest.raises(ValueError, match=message):
        drawn(peft.get_peft_model(UNCLEAR[message], CONFIG))


def test_a_part_of_another_module_is_not_made_larger():
    class Outer(nn.Module):
        @nn.compact
        def __call__(self, x):
            return peft.get_peft_model(Named(5), CONFIG)(x)

    with pytest.raises(ValueError, match="part of another module"):
        drawn(Outer())


def test_an_adapted_part_runs_on_a_shared_stack():
    class Outer(nn.Module):
        number: int

        @nn.compact
        def __call__(self, x):
            model = peft.get_peft_model(Scanned(self.number, name="body"), PLAIN_CONFIG)
            return nn.Dense(2, name="top")(model(x))

    big = replicate_layers(drawn(Outer(5)), RANGES, pattern="body/layers")
    assert_same(lambda big: (run(Outer(7), big), run(Outer(7), meta.unbox(big))), big)

"""`get_peft_model` over models as people write them, and every entry of a config on them."""

import concurrent.futures
import copy
import dataclasses
import functools
import pickle
from collections.abc import Sequence
from typing import Any

import chex
import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from helpers import (
    assert_close,
    key_of,
    loss_of,
    numbers,
    partly_slow,
    randomised,
    rounding,
    shapes,
)

import peft_jax as peft

WIDTH, LENGTH = 8, 12
IDS = np.asarray([[0, 3, 11], [7, 1, 0]])
X = numbers(2, 3, WIDTH)


# --- Models, each written in another way ---------------------------------------------------------


class Block(nn.Module):
    """In ``@nn.compact``, with a layer that is called twice."""

    width: int = WIDTH

    @nn.compact
    def __call__(self, x, _=None):
        up = nn.Dense(self.width, name="up")
        return x + nn.Dense(self.width, name="down")(jnp.tanh(up(up(x)))), None


class Compact(nn.Module):
    """Blocks ``layers_0`` and ``layers_1``, an embedding and a head."""

    depth: int = 2
    config: Any = None

    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(LENGTH, WIDTH, name="embed")(ids)
        for i in range(self.depth):
            x, _ = Block(name=f"layers_{i}")(x)
        return nn.Dense(LENGTH, name="head")(x)


class Layers(nn.Module):
    """Modules whose names are indices: ``layers/0/up``."""

    depth: int = 3

    @nn.compact
    def __call__(self, x):
        for i in range(self.depth):
            x, _ = Block(name=str(i))(x)
        return x


class Numbered(nn.Module):
    """Layers at ``layers/0``, ``layers/1``, ..."""

    depth: int = 3

    @nn.compact
    def __call__(self, ids):
        return nn.Dense(LENGTH, name="head")(
            Layers(self.depth, name="layers")(nn.Embed(LENGTH, WIDTH, name="embed")(ids))
        )


class Setup(nn.Module):
    """Layers made in ``setup``, one of them shared, in a list and in a dict; several methods."""

    tied: bool = True

    def setup(self):
        self.embed = nn.Embed(LENGTH, WIDTH)
        self.blocks = [Block(), Block()]
        self.heads = {"one": nn.Dense(4), "two": nn.Dense(4)}
        self.shared = nn.Dense(WIDTH)

    def encode(self, ids):
        x = self.shared(self.embed(ids))
        for block in self.blocks:
            x, _ = block(x)
        return self.shared(x)

    def decode(self, x):
        return self.embed.attend(x)

    def __call__(self, ids):
        x = self.encode(ids)
        return self.decode(x), self.heads["one"](x) + self.heads["two"](x)


class Inherited(Setup):
    pass


class Small(nn.Module):
    """A tied embedding, and a layer that is called twice."""

    def setup(self):
        self.embed = nn.Embed(LENGTH, WIDTH)
        self.shared = nn.Dense(WIDTH)

    def __call__(self, ids):
        return self.embed.attend(self.shared(jnp.tanh(self.shared(self.embed(ids)))))


class Shared(nn.Module):
    """One module in two places of a tree that is written by fields."""

    inner: nn.Module

    def setup(self):
        self.outer = nn.Dense(WIDTH)

    def __call__(self, x):
        return self.outer(self.inner(self.outer(self.inner(x))))


class Stacked(nn.Module):
    """Blocks stacked by a scan, maybe each rematerialised."""

    axis: int = 0
    remat: bool = False

    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(LENGTH, WIDTH, name="embed")(ids)
        block = nn.remat(Block) if self.remat else Block
        scan = nn.scan(
            block, variable_axes={"params": self.axis}, split_rngs={"params": True}, length=2
        )
        return nn.Dense(LENGTH, name="head")(scan(name="layers")(x, None)[0])


class Attention(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.remat(nn.MultiHeadDotProductAttention)(2, name="attn")(x)
        return nn.LayerNorm(name="norm")(x)


class Convolutions(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(WIDTH, (3,), feature_group_count=2, name="conv")(x)
        return nn.Sequential([nn.Dense(4), jnp.tanh, nn.Dense(4)], name="mlp")(x)


class Recurrent(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.RNN(nn.GRUCell(WIDTH), name="rnn")(x)


class Experts(nn.Module):
    """A weight with an axis of experts, and a matrix, beside a layer."""

    @nn.compact
    def __call__(self, x):
        w = self.param("w", nn.initializers.normal(1.0), (3, WIDTH, 5))
        v = self.param("v", nn.initializers.normal(1.0), (5, WIDTH))
        gate = jax.nn.softmax(nn.Dense(3, name="gate")(x))
        return jnp.einsum("btd,edh,bte->bth", x, w, gate) @ v


class ExpertsInSetup(nn.Module):
    def setup(self):
        self.w = self.param("w", nn.initializers.normal(1.0), (3, WIDTH, 5))
        self.v = self.param("v", nn.initializers.normal(1.0), (5, WIDTH))
        self.gate = nn.Dense(3)

    def __call__(self, x):
        return jnp.einsum("btd,edh,bte->bth", x, self.w, jax.nn.softmax(self.gate(x))) @ self.v


class Mixture(nn.Module):
    in_setup: bool = False

    @nn.compact
    def __call__(self, x):
        experts = ExpertsInSetup if self.in_setup else Experts
        return nn.Dense(4, name="out")(experts(name="moe")(x))


MODELS = {
    "compact": (Compact(), IDS),
    "numbered": (Numbered(), IDS),
    "setup": (Setup(), IDS),
    "shared": (Shared(nn.Dense(WIDTH)), X),
    "scan 0": (Stacked(), IDS),
    "scan 1, remat": (Stacked(1, True), IDS),
    "attention": (Attention(), X),
    "convolutions": (Convolutions(), X),
    "recurrent": (Recurrent(), X),
    "a layer": (nn.Dense(5), X),
    "model in model": (Shared(Shared(nn.Dense(WIDTH))), X),
}


# --- Properties ----------------------------------------------------------------------------------


@dataclasses.dataclass
class Found:
    """What `check` found."""

    params: Any
    specs: dict[str, peft.LoraSpec]

    @property
    def places(self):
        return {path.rpartition("/")[0] for path in self.specs}


def adapt(model, adapter_name="default", **fields):
    return peft.get_peft_model(model, peft.LoraConfig(**fields), adapter_name)


def check(model, adapted, *inputs, method=None, identity=True):
    """The base is the plain model's, and fused equals adapted for drawn adapters.

    It is the same bit for bit, but for what XLA fuses with the drawing, such as DoRA's norms.
    """
    specs = peft.lora_specs(adapted, *inputs, method=method)

    @jax.jit
    def program():
        plain = model.init(key_of(0), *inputs, method=method)["params"]
        params = adapted.init(key_of(0), *inputs, method=method)["params"]
        base, lora = peft.split_params(params)
        random = peft.merge_params(base, randomised(lora))
        fused = peft.fuse_params(random, specs=specs)

        def run(model, params):
            return model.apply({"params": params}, *inputs, method=method)

        outputs = run(model, plain), run(adapted, params), run(adapted, random), run(model, fused)
        return plain, base, params, outputs

    plain, base, params, (before, start, output, on_fused) = program()
    assert_close(plain, base, rounding(1) if "dora" in str(specs) else 0)
    if identity:
        assert_close(start, before, 1e-5)
    assert_close(output, on_fused, 1e-4)
    differs = [
        np.any(np.abs(y - z) > 1e-4)
        for y, z in zip(jax.tree.leaves(output), jax.tree.leaves(before), strict=True)
    ]
    assert any(differs)
    return Found(params, specs)


def initialised(model, *inputs, **kwargs):
    return jax.eval_shape(functools.partial(model.init, **kwargs), key_of(0), *inputs)["params"]


def places(adapted, *inputs):
    """Where adapters lie, by an abstract init."""
    params = initialised(adapted, *inputs)
    return {
        path.rpartition("/")[0]
        for path in flatten(params)
        if path.rpartition("/")[2].startswith("lora")
    }


def flatten(tree):
    """Paths of the branches that hold leaves."""
    found = set()
    for path, _ in jax.tree.leaves_with_path(tree):
        names = [str(getattr(key, "key", getattr(key, "idx", None))) for key in path]
        found |= {"/".join(names[:-1])}
    return found


OTHERS = ("compact", "numbered", "convolutions", "scan 0", "recurrent", "model in model")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n in OTHERS else ()) for n in MODELS]
)
def test_every_model_keeps_its_paths_and_fuses(name):
    model, x = MODELS[name]
    target = ".*" if name == "a layer" else "all-linear"
    found = check(model, adapt(model, r=2, target_modules=target), x)
    expected = {
        "compact": {f"layers_{i}/{n}" for i in (0, 1) for n in ("up", "down")},
        "numbered": {f"layers/{i}/{n}" for i in (0, 1, 2) for n in ("up", "down")},
        "setup": {"heads_one", "heads_two", "shared"}
        | {f"blocks_{i}/{n}" for i in (0, 1) for n in ("up", "down")},
        "shared": {"inner", "outer"},
        "scan 0": {"layers/up", "layers/down"},
        "scan 1, remat": {"layers/up", "layers/down"},
        "attention": {f"attn/{n}" for n in ("query", "key", "value", "out")},
        "convolutions": {"Dense_0", "Dense_1"},
        "recurrent": {f"GRUCell_0/{n}" for n in ("in", "ir", "iz", "hn", "hr", "hz")},
        "a layer": {""},
        "model in model": {"inner/inner", "inner/outer", "outer"},
    }
    assert found.places == expected[name]


@pytest.mark.parametrize(
    ("fields", "inputs"),
    [
        ({"use_dora": True, "use_rslora": True}, "shared"),
        pytest.param({"lora_bias": True}, "setup", marks=pytest.mark.slow),
        pytest.param({"use_dora": True}, "scan 1, remat", marks=pytest.mark.slow),
        pytest.param({"use_dora": True}, "attention", marks=pytest.mark.slow),
        pytest.param({"lora_bias": True}, "scan 0", marks=pytest.mark.slow),
        pytest.param({"lora_dropout": 0.5}, "numbered", marks=pytest.mark.slow),
    ],
)
def test_variants_by_config(fields, inputs):
    model, x = MODELS[inputs]
    check(model, adapt(model, r=2, target_modules="all-linear", **fields), x)


# --- target_modules and exclude_modules ----------------------------------------------------------

UP = {f"layers_{i}/up" for i in (0, 1)}
DOWN = {f"layers_{i}/down" for i in (0, 1)}


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (["up"], UP),
        (("up", "down"), UP | DOWN),
        ({"layers_0.up"}, {"layers_0/up"}),
        (["layers_1/up", "head"], {"layers_1/up", "head"}),
        (["embed"], {"embed"}),
        (r".*\.(up|down)", UP | DOWN),
        (r"layers_1\..*", {"layers_1/up", "layers_1/down"}),
        ("head", {"head"}),
        (r".*embed|head", {"embed", "head"}),
        ("all-linear", UP | DOWN),
        ("ALL-LINEAR", UP | DOWN),
    ],
)
def test_target_modules(target, expected):
    assert places(adapt(Compact(), target_modules=target), IDS) == expected


@pytest.mark.parametrize(
    ("target", "exclude", "expected"),
    [
        (["up", "down"], ["layers_0/down"], UP | {"layers_1/down"}),
        ("all-linear", r"layers_0\..*", {"layers_1/up", "layers_1/down"}),
        ("all-linear", ["up"], DOWN),
        ("all-linear", ["head"], UP | DOWN),
    ],
)
def test_exclude_modules(target, exclude, expected):
    adapted = adapt(Compact(), target_modules=target, exclude_modules=exclude)
    assert places(adapted, IDS) == expected


class Square(nn.Module):
    """A language model whose width is the length of its vocabulary."""

    tied: bool = False

    @nn.compact
    def __call__(self, ids):
        embed = nn.Embed(WIDTH, WIDTH, name="embed")
        x = nn.Dense(WIDTH, name="up")(embed(ids))
        x = nn.Dense(WIDTH, name="down")(x)
        return embed.attend(x) if self.tied else nn.Dense(WIDTH, name="head")(x)


def test_the_output_layer_is_left_out_where_all_layers_are_as_wide():
    ids = IDS % WIDTH
    found = check(Square(), adapt(Square(), r=2, target_modules="all-linear"), ids)
    assert found.places == {"up", "down"}


def test_a_missing_adapter_of_another_layer_raises_there_too():
    """Only one layer is the output layer: two without an adapter are one too many."""
    adapted = adapt(Square(), r=2, target_modules="all-linear")
    params = jax.jit(adapted.init)(key_of(0), IDS % WIDTH)["params"]
    del params["up"]["lora"]
    with pytest.raises(ValueError, match="no adapter"):
        adapted.apply({"params": params}, IDS % WIDTH)


def test_without_an_embedding_nothing_is_left_out():
    model = nn.Sequential([nn.Dense(4), nn.Dense(4)])
    assert places(adapt(model, target_modules="all-linear"), X) == {"layers_0", "layers_1"}


@pytest.mark.parametrize("as_dict", [False, True])
def test_modules_by_the_models_type(as_dict):
    @dataclasses.dataclass(frozen=True)
    class Config:
        model_type: str = "llama"

    class Llama(nn.Module):
        config: Any

        @nn.compact
        def __call__(self, x):
            return sum(nn.Dense(4, name=f"{n}_proj")(x) for n in "qkv")

    config = nn.FrozenDict({"model_type": "llama"}) if as_dict else Config()
    assert places(adapt(Llama(config)), X) == {"q_proj", "v_proj"}
    with pytest.raises(ValueError, match=r"model type 'lama' .*llama.*name modules"):
        adapt(Llama(flax.core.freeze({"model_type": "lama"})))
    with pytest.raises(ValueError, match=r"config.model_type, which this model lacks"):
        adapt(Block())


# --- Layers, ranks, alphas -----------------------------------------------------------------------


@pytest.mark.parametrize("model", [Compact(3), Numbered(3)], ids=("layers_0", "layers/0"))
@pytest.mark.parametrize(
    ("fields", "indices"),
    [
        ({"layers_to_transform": 1}, {1}),
        ({"layers_to_transform": 0}, {0}),
        ({"layers_to_transform": [0, 2]}, {0, 2}),
        ({"layers_to_transform": [2], "layers_pattern": "layers"}, {2}),
        ({"layers_to_transform": [2], "layers_pattern": ["layers"]}, {2}),
        ({"layers_to_transform": []}, {0, 1, 2}),
        ({"layers_to_transform": None}, {0, 1, 2}),
    ],
)
def test_layers_to_transform(model, fields, indices):
    name = "layers_{}" if isinstance(model, Compact) else "layers/{}"
    expected = {f"{name.format(i)}/up" for i in indices}
    assert places(adapt(model, target_modules=["up"], **fields), IDS) == expected
    if fields["layers_to_transform"] not in (None, []):
        everything = adapt(model, target_modules="all-linear", **fields)
        names = {f"{name.format(i)}/{n}" for i in indices for n in ("up", "down")}
        assert places(everything, IDS) == names


def test_a_whole_path_holds_whatever_the_layers():
    adapted = adapt(
        Compact(3), target_modules=["up", "layers_2.down", "head"], layers_to_transform=[0]
    )
    assert places(adapted, IDS) == {"layers_0/up", "layers_2/down", "head"}


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("target", [["up"], "all-linear"])
@pytest.mark.parametrize("layers", [0, [0, 1]])
def test_layers_of_a_stack_raise(target, layers, remat):
    adapted = adapt(Stacked(remat=remat), target_modules=target, layers_to_transform=layers)
    with pytest.raises(
        ValueError, match=r"layers_to_transform = .*'layers/\w+' stands for a stack"
    ):
        initialised(adapted, IDS)


def test_an_empty_list_of_layers_means_all_of_a_stack():
    adapted = adapt(Stacked(), target_modules=["up"], layers_to_transform=[])
    assert places(adapted, IDS) == {"layers/up"}


def test_patterns_of_rank_and_alpha():
    adapted = adapt(
        Compact(),
        r=2,
        lora_alpha=6,
        use_rslora=True,
        target_modules="all-linear",
        rank_pattern={"layers_0.up": 4, "down": 3, r"layers_\d.down": 5},
        alpha_pattern={"layers_1/down": 1, "layers_0.*": 9},
    )
    specs = peft.lora_specs(adapted, IDS)
    found = {path.removesuffix("/lora"): (s.rank, s.alpha) for path, s in specs.items()}
    assert found == {
        "layers_0/up": (4, 9),
        "layers_0/down": (3, 9),
        "layers_1/up": (2, 6),
        "layers_1/down": (3, 1),
    }
    for spec in specs.values():
        assert spec.scaling == pytest.approx(spec.alpha / spec.rank**0.5)


# --- Entries that match nothing ------------------------------------------------------------------

NOTHING = {
    "target_modules": (
        {"target_modules": ["up", "dwn"]},
        r"target_modules: .*'dwn' \(closest: 'down'",
    ),
    "a regex": ({"target_modules": r".*\.upp"}, r"target_modules: .*upp"),
    "a path": (
        {"target_modules": ["layers_2/up"]},
        r"target_modules: .*'layers_2/up'.*layers_[01].up",
    ),
    "exclude_modules": (
        {"target_modules": ["up"], "exclude_modules": ["hed"]},
        r"exclude_modules: .*'hed' \(closest: .*'head'",
    ),
    "excluded": (
        {"target_modules": ["up", "head"], "exclude_modules": ["head"]},
        r"target_modules: .*'head' .*exclude_modules leaves out",
    ),
    "modules_to_save": (
        {"target_modules": ["up"], "modules_to_save": ["hed"]},
        r"modules_to_save: .*'hed' \(closest: .*'head'",
    ),
    "rank_pattern": (
        {"target_modules": ["up"], "rank_pattern": {"dwn": 3}},
        r"rank_pattern: .*'dwn' \(closest: .*'down'",
    ),
    "rank_pattern of another layer": (
        {"target_modules": ["up"], "rank_pattern": {"down": 3}},
        r"rank_pattern: .*'down' .*got no adapter",
    ),
    "alpha_pattern": (
        {"target_modules": "all-linear", "alpha_pattern": {"q": 3}},
        r"alpha_pattern: .*'q'",
    ),
    "layers_to_transform": (
        {"target_modules": ["up"], "layers_to_transform": [1, 2]},
        r"layers_to_transform: no layer of index \[2\].*\[0, 1\]",
    ),
    "layers_pattern": (
        {"target_modules": ["up"], "layers_to_transform": [1], "layers_pattern": "blocks"},
        r"layers_pattern has 'blocks'",
    ),
    "target_parameters": (
        {"target_modules": ["up"], "target_parameters": ["moe.w"]},
        r"target_parameters: .*'moe.w'",
    ),
    "trainable_token_indices": (
        {"target_modules": ["up"], "trainable_token_indices": {"embd": [0]}},
        r"trainable_token_indices: .*'embd' \(closest: 'embed'",
    ),
}


@pytest.mark.parametrize(("fields", "match"), NOTHING.values(), ids=NOTHING)
def test_an_entry_that_matches_nothing_raises_at_init_and_at_apply(fields, match):
    adapted = adapt(Compact(), **fields)
    with pytest.raises(ValueError, match=match):
        initialised(adapted, IDS)
    base = initialised(adapt(Compact(), target_modules=["up"]), IDS)
    with pytest.raises(ValueError, match=match):
        jax.eval_shape(adapted.apply, {"params": base}, IDS)


@pytest.mark.parametrize("target", [["up"], "all-linear", r".*up"])
def test_a_plain_base_raises_at_apply(target):
    base = initialised(Compact(), IDS)
    adapted = adapt(Compact(), target_modules=target)
    with pytest.raises(ValueError, match=r"no adapter named 'default'.*merge_params"):
        jax.eval_shape(adapted.apply, {"params": base}, IDS)


def test_another_rank_and_a_missing_adapter_raise_at_apply():
    params = initialised(adapt(Compact(), target_modules=["up", "down"]), IDS)
    with pytest.raises(ValueError, match=r"'layers_0/up/lora' .*rank 2 .* needs"):
        jax.eval_shape(
            adapt(Compact(), r=2, target_modules=["up", "down"]).apply, {"params": params}, IDS
        )
    del params["layers_1"]["down"]["lora"]
    for target in (["up", "down"], "all-linear"):
        with pytest.raises(ValueError, match="no adapter at 'layers_1/down/lora'"):
            jax.eval_shape(adapt(Compact(), target_modules=target).apply, {"params": params}, IDS)


def test_entries_are_judged_by_the_whole_tree_and_not_by_one_call():
    """A method that runs a part of the model needs no other part."""
    model = Setup()
    adapted = adapt(model, r=2, target_modules=["shared", "heads_one"])
    params = initialised(adapted, IDS)
    whole = jax.eval_shape(functools.partial(model.apply, method="encode"), {"params": params}, IDS)
    for method in ("encode", Setup.encode, lambda m, ids: m.encode(ids)):
        run = functools.partial(adapted.apply, method=method)
        assert jax.eval_shape(run, {"params": params}, IDS).shape == whole.shape


def test_inside_a_larger_model_the_output_layer_and_the_table_are_found():
    """Paths of the config are those of the adapted model, wherever it lies."""

    class Outer(nn.Module):
        inner: nn.Module

        @nn.compact
        def __call__(self, ids):
            return nn.Dense(3, name="top")(self.inner(ids))

    for config in ({"target_modules": "all-linear"}, {"target_modules": ["up", "down"]}):
        fields = {"r": 2, "trainable_token_indices": [1], **config}
        model = Outer(adapt(Compact(), **fields))
        alone, params = (
            initialised(adapt(Compact(), **fields), IDS),
            initialised(model, IDS),
        )
        assert shapes(params["inner"]) == shapes(alone)
        assert "lora" not in params["top"]
        jax.eval_shape(model.apply, {"params": params}, IDS)


class Scale(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x @ self.param("w", nn.initializers.ones, (WIDTH, WIDTH))


class Unregistered(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(4, name="dense")(Scale(name="own")(x))


@pytest.mark.parametrize(("target", "name"), [(["own"], "Scale"), (r"own|dense", "Scale")])
def test_a_module_that_is_not_registered_raises_with_the_remedy(target, name):
    with pytest.raises(ValueError, match=rf"'own', a {name}, .*register_layer\({name}"):
        initialised(adapt(Unregistered(), target_modules=target), X)


# --- Parameters without a layer ------------------------------------------------------------------


@pytest.mark.parametrize(
    "in_setup", [pytest.param(False, marks=pytest.mark.slow), True], ids=("compact", "setup")
)
@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"target_parameters": ["moe.w"]}, {"moe/lora": (3, WIDTH, 2)}),
        ({"target_parameters": ["v", "moe/w"], "use_dora": True}, {"moe/lora", "moe/lora_v"}),
        (
            {"target_parameters": ["w"], "target_modules": ["gate", "out"]},
            {"moe/lora", "moe/gate/lora", "out/lora"},
        ),
        ({"target_parameters": ["out.kernel", "w"]}, {"out/lora", "moe/lora"}),
    ],
)
def test_target_parameters(fields, expected, in_setup):
    model = Mixture(in_setup)
    fields = {"target_modules": [], "r": 2, **fields}
    found = check(model, adapt(model, **fields), X)
    assert found.specs.keys() == (set(expected))
    if isinstance(expected, dict):
        assert found.params["moe"]["lora"]["a"].shape == expected["moe/lora"]
        assert found.params["moe"]["lora"]["b"].shape == (3, 2, 5)


@pytest.mark.parametrize("name", ["out.bias", "bias"])
def test_a_parameter_of_one_axis_raises(name):
    adapted = adapt(Mixture(), target_modules=[], target_parameters=[name])
    with pytest.raises(ValueError, match=r"target_parameters .*two axes"):
        initialised(adapted, X)


def test_every_named_parameter_got_an_adapter_or_raises():
    """A second matrix of a registered layer is no layer's weight; it is not passed over."""

    class TwoMatrices(nn.Module):
        @nn.compact
        def __call__(self, x):
            w = self.param("w", nn.initializers.ones, (WIDTH, WIDTH))
            return x @ w + jnp.sum(self.param("extra", nn.initializers.ones, (2, 2)))

    peft.register_layer(TwoMatrices, param="w", equation="...i,io->...o")

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return TwoMatrices(name="two")(x)

    adapted = adapt(Model(), r=2, target_modules=[], target_parameters=["two.w", "two.extra"])
    check(Model(), adapted, X)
    assert places(adapted, X) == {"two"}
    assert len(peft.lora_specs(adapted, X)) == 2


@pytest.mark.parametrize("wrapper", ["stored", "simulated"])
def test_target_parameters_beside_quantized_layers(wrapper):
    model = Mixture()
    adapted = adapt(model, r=2, target_modules=["gate"], target_parameters=["w"])
    rule = Around(wrapper)
    with peft.ModuleInterceptor(rule):
        y, variables = jax.eval_shape(lambda: adapted.init_with_output(key_of(0), X))
    assert variables["params"]["moe"].keys() == {"w", "v", "gate", "lora"}
    assert y.shape == (2, 3, 4)
    if wrapper == "stored":
        assert isinstance(variables["params"]["out"]["kernel"], peft.StoredValues)


@dataclasses.dataclass(frozen=True)
class Around:
    """Storage or simulation around every Dense."""

    how: str

    def __call__(self, module):
        if type(module) is not nn.Dense:
            return module
        if self.how == "stored":
            return peft.Int4Dense(wrapped=module, method="int8")
        return peft.SimulateQuantizedDense(wrapped=module, method="int8")


# --- Rows of an embedding ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"trainable_token_indices": [0, 11]}, {"embed/lora_tokens"}),
        ({"trainable_token_indices": {"embed": [3, 0]}}, {"embed/lora_tokens"}),
        (
            {"trainable_token_indices": [1], "target_modules": ["embed"], "use_dora": True},
            {"embed/lora", "embed/lora_tokens"},
        ),
        (
            {"trainable_token_indices": [1], "target_modules": ["embed", "shared"]},
            {"embed/lora", "embed/lora_tokens", "shared/lora"},
        ),
    ],
)
def test_trainable_token_indices(fields, expected):
    """In lookups and in `attend` of the tied head."""
    model = Small()
    fields = {"r": 2, "target_modules": ["shared"], **fields}
    if fields["target_modules"] == ["shared"]:
        expected = expected | {"shared/lora"}
    found = check(model, adapt(model, **fields), IDS)
    assert found.specs.keys() == expected
    rows = found.params["embed"]["lora_tokens"]["rows"]
    tokens = found.specs["embed/lora_tokens"].tokens
    chex.assert_trees_all_equal(rows, found.params["embed"]["embedding"][jnp.asarray(tokens)])


class Table(nn.Module):
    """An embedding of so many rows, and a layer."""

    rows: int = LENGTH

    @nn.compact
    def __call__(self, ids):
        return nn.Dense(4, name="dense")(nn.Embed(self.rows, WIDTH, name="embed")(ids))


@pytest.mark.parametrize(
    ("rows", "tokens", "ids"),
    [
        (300, [1, 290], np.asarray([[1, 2]], np.uint8)),
        (LENGTH, [1, 11], np.asarray([[-1, 0, 1]], np.int32)),  # from the end, as jnp.take counts
        (1, [0], np.asarray([[0, 5]], np.int32)),  # nn.Embed ignores the indices then
    ],
    ids=("narrow integers", "negative", "vocabulary of one"),
)
def test_rows_are_found_as_the_embedding_finds_them(rows, tokens, ids):
    model = Table(rows)
    adapted = adapt(model, r=2, target_modules=["dense"], trainable_token_indices=tokens)
    check(model, adapted, ids)


def test_rows_are_not_taken_off_without_the_original():
    """The rows of the base cannot be told from the fused table."""
    model = adapt(Table(), r=2, target_modules=["dense"], trainable_token_indices=[1])
    params = jax.jit(model.init)(key_of(0), IDS)["params"]
    specs = peft.lora_specs(model, IDS)
    base, lora = peft.split_params(params)
    random = randomised(lora)
    fused = peft.fuse_params(peft.merge_params(base, random), specs=specs)
    back = peft.unfuse_params(fused, original=base, lora=random, specs=specs)
    chex.assert_trees_all_equal(back, peft.merge_params(base, random))
    with pytest.raises(ValueError, match=r"unfuse_params: .*embed/lora_tokens.*original"):
        peft.unfuse_params(fused, lora=random, specs=specs)


@pytest.mark.parametrize(
    ("tokens", "match"),
    [
        ([LENGTH], rf"holds \[{LENGTH}\].*'embed' has rows 0 to {LENGTH - 1}"),
        ({"dense": [1]}, r"names 'dense', a Dense"),
    ],
)
def test_rows_that_are_not_there_raise(tokens, match):
    adapted = adapt(Table(), target_modules=["dense"], trainable_token_indices=tokens)
    with pytest.raises(ValueError, match=match):
        initialised(adapted, IDS)


def test_a_list_of_rows_needs_one_embedding():
    class Model(nn.Module):
        names: Sequence[str] = ("words", "places")

        @nn.compact
        def __call__(self, ids):
            x = sum(nn.Embed(LENGTH, WIDTH, name=name)(ids) for name in self.names)
            return nn.Dense(4, name="dense")(x)

    fields = {"target_modules": ["dense"], "trainable_token_indices": [1]}
    with pytest.raises(ValueError, match=r"\['places', 'words'\].*Name one"):
        initialised(adapt(Model(), **fields), IDS)
    params = initialised(adapt(Model(("embed_tokens", "places")), **fields), IDS)
    assert "lora_tokens" in params["embed_tokens"]
    assert "lora_tokens" not in params["places"]


# --- Modules that are trained whole, and first values --------------------------------------------


def test_modules_to_save_get_no_adapter():
    for target, saved, expected in (
        ("all-linear", ["head", "layers_0"], {"layers_1/up", "layers_1/down"}),
        (["up", "down"], ["layers_1.down"], UP | {"layers_0/down"}),
        (r".*", ["embed", "head", "layers_."], None),
    ):
        adapted = adapt(Compact(), target_modules=target, modules_to_save=saved)
        if expected is None:
            with pytest.raises(ValueError, match="LoraConfig"):
                initialised(adapted, IDS)
        else:
            assert places(adapted, IDS) == expected


@pytest.mark.parametrize(
    "first",
    [True, *(pytest.param(f, marks=pytest.mark.slow) for f in ("gaussian", False)), "orthogonal"],
)
def test_first_values(first):
    model = Small()
    adapted = adapt(
        model,
        r=4,
        target_modules=["shared", "embed"],
        init_lora_weights=first,
        use_dora=first != False,  # noqa: E712
    )
    found = check(model, adapted, IDS, identity=first is not False)
    shared, embed = (found.params[name]["lora"] for name in ("shared", "embed"))
    for lora in (shared, embed):
        product = np.asarray(lora["a"] @ lora["b"])
        assert np.any(np.abs(product) > 1e-3) if first is False else np.all(np.abs(product) < 1e-6)
        assert np.any(lora["a"]) or np.any(lora["b"])
    if first == "gaussian":
        assert np.std(shared["a"]) == pytest.approx(1 / 4, rel=0.5)


# --- Several adapters on one model ---------------------------------------------------------------

PAIRS = {
    "by name": ({"target_modules": ["shared"]}, {"target_modules": ["shared", "embed"], "r": 3}),
    "dora, dora": (
        {"target_modules": ["shared"], "use_dora": True},
        {"target_modules": ["shared"], "use_dora": True},
    ),
    "all-linear": ({"target_modules": "all-linear"}, {"target_modules": "all-linear"}),
    "tokens": (
        {"target_modules": ["shared"], "trainable_token_indices": [1]},
        {"target_modules": ["shared"]},
    ),
    "tokens of two tables": (
        {"target_modules": ["shared"], "trainable_token_indices": [1]},
        {"target_modules": ["shared"], "trainable_token_indices": [2, 3]},
    ),
    "tokens by name": (
        {"target_modules": ["shared"], "trainable_token_indices": {"embed": [1]}},
        {"target_modules": ["shared"], "trainable_token_indices": {"embed": [2]}},
    ),
}


@pytest.mark.parametrize(("first", "second"), partly_slow(PAIRS, list(PAIRS)[::2]))
def test_two_adapters(first, second):
    model = Small()
    one = adapt(model, **{"r": 2, **first})
    two = adapt(one, "two", **{"r": 2, **second})
    found = check(model, two, IDS)
    assert found.params["shared"].keys() == {"kernel", "bias", "lora", "lora.two"}


def test_two_adapters_on_parameters():
    model = Mixture()
    fields = {"r": 2, "target_modules": [], "target_parameters": ["w"]}
    found = check(model, adapt(adapt(model, **fields), "two", **fields), X)
    assert found.specs.keys() == {"moe/lora", "moe/lora.two"}


def test_one_name_twice_raises():
    once = adapt(Small(), target_modules=["shared"])
    with pytest.raises(ValueError, match=r"has an adapter named 'default' already"):
        adapt(once, target_modules=["shared"])


# --- Methods, attributes, other ways to call -----------------------------------------------------


@pytest.fixture(scope="module")
def bound_setup():
    """A model with methods, its adapter drawn at random, and the plain model on fused weights."""
    model = Inherited()
    adapted = adapt(model, r=2, target_modules="all-linear")
    params = jax.jit(adapted.init)(key_of(0), IDS)["params"]
    base, lora = peft.split_params(params)
    params = peft.merge_params(base, randomised(lora))
    return model, adapted, params, peft.fuse_params(params, specs=peft.lora_specs(adapted, IDS))


HIDDEN = numbers(2, 3, WIDTH)
METHODS = {
    "name": ("encode", IDS),
    "of the class": (Inherited.encode, IDS),
    "of the parent": (Setup.encode, IDS),
    "partial": (functools.partial(Setup.encode), IDS),
    "lambda": (lambda m, ids: m.encode(ids), IDS),
    "submodule": (lambda m, x: m.shared(x), HIDDEN),
    "in a list": (lambda m, x: m.blocks[1](x)[0], HIDDEN),
    "in a dict": (lambda m, x: m.heads["two"](x), HIDDEN),
    "nested": (lambda m, ids: m.heads["one"](m.shared(m.embed(ids))), IDS),
    "method of a submodule": (lambda m, x: m.embed.attend(x), HIDDEN),
}


@pytest.mark.parametrize(("method", "x"), METHODS.values(), ids=METHODS)
def test_every_method_runs_adapted(bound_setup, method, x):
    model, adapted, params, fused = bound_setup
    run = jax.jit(functools.partial(adapted.apply, method=method))
    plain = jax.jit(functools.partial(model.apply, method=method))
    assert_close(run({"params": params}, x), plain({"params": fused}, x), 1e-4)


def test_bound_models_run_adapted(bound_setup):
    model, adapted, params, fused = bound_setup
    bound, plain = adapted.bind({"params": params}), model.bind({"params": fused})
    assert_close(bound.shared(HIDDEN), plain.shared(HIDDEN), 1e-4)
    assert_close(bound.blocks[0](HIDDEN)[0], plain.blocks[0](HIDDEN)[0], 1e-4)
    module, variables = bound.shared.unbind()
    assert_close(module.apply(variables, HIDDEN), plain.shared(HIDDEN), 1e-4)


def test_attributes_are_the_models():
    class Model(nn.Module):
        features: int = 3
        base_path: str = "here"
        structure: int = 5

        @property
        def double(self):
            return 2 * self.features

        @nn.compact
        def __call__(self, x):
            return nn.Dense(self.features, name="d")(x)

    adapted = adapt(Model(), target_modules=["d"])
    assert (adapted.features, adapted.double) == (3, 6)
    assert (adapted.base_path, adapted.structure) == ("here", 5)
    with pytest.raises(AttributeError, match="nothing"):
        _ = adapted.nothing


def test_frozen_trees_and_other_collections():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            x = nn.BatchNorm(use_running_average=not train, name="norm")(x)
            x = nn.Dropout(0.5, deterministic=not train)(nn.Dense(4, name="dense")(x))
            self.sow("intermediates", "x", x)
            return x

    adapted = adapt(Model(), r=2, target_modules="all-linear", lora_dropout=0.1)
    variables = jax.eval_shape(adapted.init, key_of(0), X)
    assert variables.keys() == {"params", "batch_stats"}
    run = functools.partial(
        adapted.apply, train=True, mutable=["batch_stats"], rngs={"dropout": key_of(1)}
    )
    y, state = jax.eval_shape(run, variables, X)
    assert state.keys() == {"batch_stats"}
    frozen, _ = jax.eval_shape(run, flax.core.freeze(variables), X)
    assert frozen.shape == y.shape == (2, 3, 4)


@pytest.mark.slow
def test_lazy_init_tabulate_and_copies():
    adapted = adapt(Compact(), target_modules="all-linear", rank_pattern={"up": 3})
    lazy = adapted.lazy_init(key_of(0), jax.ShapeDtypeStruct(IDS.shape, jnp.int32))
    assert shapes(lazy["params"]) == shapes(initialised(adapted, IDS))
    assert "layers_0/up" in adapted.tabulate(key_of(0), IDS)
    for twin in (pickle.loads(pickle.dumps(adapted)), copy.deepcopy(adapted), adapted.clone()):
        assert twin == adapted
        assert hash(twin) == hash(adapted)
    assert "rank_pattern={'up': 3}" in repr(adapted)


def test_the_repr_of_a_bound_model_ends():
    adapted = adapt(Setup(), target_modules=["shared"])
    bound = adapted.bind({"params": jax.jit(adapted.init)(key_of(0), IDS)["params"]})
    assert len(repr(bound)) < 20_000
    assert len(repr(bound.shared)) < 20_000


@pytest.mark.parametrize(
    ("model", "config", "match"),
    [
        (Compact, peft.LoraConfig(target_modules=["up"]), "takes a Linen module, got"),
        (None, peft.LoraConfig(target_modules=["up"]), "takes a Linen module, got NoneType"),
        (Compact(), {"target_modules": ["up"]}, "LoraConfig.from_dict"),
        (Compact(), None, "takes a LoraConfig, got NoneType"),
    ],
)
def test_wrong_arguments(model, config, match):
    with pytest.raises(ValueError, match=match):
        peft.get_peft_model(model, config)


@pytest.mark.parametrize("name", ["", "a.b", "a/b", None, 3])
def test_wrong_names_of_adapters(name):
    with pytest.raises(ValueError, match="adapter_name is a name without dots"):
        peft.get_peft_model(Compact(), peft.LoraConfig(target_modules=["up"]), name)


# --- JAX around it -------------------------------------------------------------------------------


def test_equal_configs_trace_once():
    params = jax.jit(adapt(Compact(), target_modules="all-linear").init)(key_of(0), IDS)["params"]
    chex.clear_trace_counter()

    @functools.partial(jax.jit, static_argnums=0)
    @chex.assert_max_traces(n=1)
    def run(model, params, ids):
        return model.apply({"params": params}, ids)

    for _ in range(3):
        config = peft.LoraConfig(target_modules="all-linear", rank_pattern={"up": 8})
        run(peft.get_peft_model(Compact(), config), params, IDS)


def test_a_model_is_traced_once_by_each_call():
    """What a config means is not found out anew by `apply`."""
    calls = []

    class Model(nn.Module):
        @nn.compact
        def __call__(self, ids):
            calls.append(1)
            return nn.Dense(LENGTH, name="head")(
                nn.Dense(WIDTH, name="up")(nn.Embed(LENGTH, WIDTH, name="embed")(ids))
            )

    adapted = adapt(Model(), target_modules="all-linear", trainable_token_indices=[1])
    params = initialised(adapted, IDS)
    assert len(calls) <= 2
    calls.clear()
    jax.eval_shape(adapted.apply, {"params": params}, IDS)
    assert len(calls) == 1


def test_jit_grad_vmap_and_scan():
    model = Compact()
    adapted = adapt(model, r=2, target_modules="all-linear", use_dora=True)
    base, lora = peft.split_params(jax.jit(adapted.init)(key_of(0), IDS)["params"])
    random = randomised(lora)

    def loss(lora, ids):
        return loss_of(adapted.apply({"params": peft.merge_params(base, lora)}, ids))

    @jax.jit
    def program():
        one_by_one = [jax.value_and_grad(loss)(random, ids[None]) for ids in IDS]
        at_once = jax.vmap(jax.value_and_grad(loss), in_axes=(None, 0))(random, IDS[:, None])
        scanned = jax.lax.map(functools.partial(loss, random), jnp.asarray(IDS[:, None]))
        return one_by_one, at_once, scanned

    one_by_one, at_once, scanned = program()
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *one_by_one)
    assert_close(at_once, stacked, 1e-4)
    assert_close(scanned, stacked[0], 1e-4)


def test_inside_lifted_transforms():
    """An adapted model as the body of a scan and of a vmap."""

    class Body(nn.Module):
        config: Any

        @nn.compact
        def __call__(self, x, _=None):
            inner = Block(name="inner")
            if self.config is not None:
                inner = peft.get_peft_model(inner, self.config)
            return inner(x)[0], None

    class Outer(nn.Module):
        config: Any = None

        @nn.compact
        def __call__(self, x):
            scan = nn.scan(Body, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
            return scan(self.config, name="layers")(x, None)[0]

    config = peft.LoraConfig(r=2, target_modules=["up", "down"])
    found = check(Outer(), Outer(config), X)
    assert {spec.stack_axes for spec in found.specs.values()} == {(0,)}


@pytest.mark.parametrize(
    ("how", "use_dora"),
    [
        ("stored", True),
        pytest.param("stored", False, marks=pytest.mark.slow),
        pytest.param("simulated", True, marks=pytest.mark.slow),
        pytest.param("simulated", False, marks=pytest.mark.slow),
    ],
)
def test_with_quantization_around(how, use_dora):
    """The adapted model under an interceptor, and an adapted model of wrapped layers, agree."""
    adapted = adapt(Compact(), r=2, target_modules="all-linear", use_dora=use_dora)
    specs = peft.lora_specs(adapted, IDS)

    @jax.jit
    def program():
        with peft.ModuleInterceptor(Around(how)):
            params = adapted.init(key_of(0), IDS)["params"]
        base, lora = peft.split_params(params)
        random = peft.merge_params(base, randomised(lora))

        def start(model, params):
            with peft.ModuleInterceptor(Around(how)):
                return model.apply({"params": params}, IDS)

        fused = on_fused = None
        if how == "stored":
            fused = peft.fuse_params(peft.dequantize_checkpoint(random), specs=specs)
            on_fused = Compact().apply({"params": fused}, IDS)
        return start(Compact(), base), start(adapted, params), start(adapted, random), on_fused

    before, start, output, on_fused = program()
    assert_close(start, before)
    assert np.any(np.abs(output - before) > 1e-3)
    if on_fused is not None:
        assert_close(output, on_fused, 1e-4)


def test_threads_do_not_see_each_other():
    """Configs at once on one model, in eight threads."""
    model = Compact()
    wanted = [{"up"}, {"down"}, {"up", "down"}, {"head"}] * 4

    def run(names):
        return {path.rpartition("/")[2] for path in places(adapt(model, target_modules=names), IDS)}

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert list(pool.map(run, wanted)) == wanted


def test_nothing_leaks_after_an_exception():
    class Failing(nn.Module):
        @nn.compact
        def __call__(self, x, fail=False):
            x = nn.Dense(4, name="dense")(x)
            if fail:
                raise RuntimeError("on purpose")
            return x

    adapted = adapt(Failing(), r=2, target_modules=["dense"])
    params = jax.jit(adapted.init)(key_of(0), X)["params"]
    with pytest.raises(RuntimeError, match="on purpose"):
        adapted.apply({"params": params}, X, fail=True)
    with pytest.raises(RuntimeError, match="on purpose"):
        adapted.init(key_of(0), X, fail=True)
    assert initialised(Failing(), X).keys() == {"dense"}
    assert "lora" not in initialised(Failing(), X)["dense"]
    assert "lora" in initialised(adapted, X)["dense"]


def test_a_model_on_parameters_of_its_own_is_left_alone():
    """As tied heads do: `self.dense.apply` with a kernel that is the embedding's."""

    class Tied(nn.Module):
        def setup(self):
            self.embed = nn.Embed(LENGTH, WIDTH)
            self.dense = nn.Dense(WIDTH)
            self.head = nn.Dense(LENGTH, use_bias=False)

        def __call__(self, ids):
            x = self.dense(self.embed(ids))
            kernel = self.embed.variables["params"]["embedding"].T
            return self.head.apply({"params": {"kernel": kernel}}, x)

    found = check(Tied(), adapt(Tied(), r=2, target_modules="all-linear"), IDS)
    assert found.places == {"dense"}

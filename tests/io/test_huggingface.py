"""Adapters are saved as Hugging Face's peft lays them out, and loaded whole or not at all."""

import dataclasses
import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from helpers import assert_rounded, key_of, randomised
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import peft_jax as peft
from peft_jax import load_adapter, save_adapter
from peft_jax.io.huggingface.module_names import Renames

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        q = nn.DenseGeneral((2, 3), name="query")(nn.LayerNorm(name="norm")(x))
        k = nn.Einsum((2, 3, 6), "btd,nhd->btnh", name="key")(x)
        return x + nn.DenseGeneral(6, axis=(-2, -1), name="out")(jnp.tanh(q) * k), None


class Model(nn.Module):
    """A table, three blocks with heads in axes of their own, and a head."""

    scan: int | None = None
    flat: bool = False

    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(11, 6, name="table")(ids)
        if self.flat:
            return nn.Dense(4, name="head")(nn.Dense(6, name="fc")(x))
        if self.scan is None:
            for i in range(3):
                x, _ = Block(name=f"layers_{i}")(x)
        else:
            lift = {"variable_axes": {"params": self.scan}, "split_rngs": {"params": True}}
            x, _ = nn.scan(Block, length=3, **lift)(name="layers")(x, None)
        return nn.Dense(4, name="head")(x)


IDS = np.arange(10).reshape(2, 5)
TARGETS = ["query", "key", "out", "table"]
FLAT = Model(flat=True)


@dataclasses.dataclass(frozen=True)
class Case:
    """An adapted model: its config, specs, and what it trains, with scattered numbers."""

    model: object
    config: object
    specs: dict
    lora: dict

    def save(self, path, **changes):
        given = {"config": self.config, "specs": self.specs, **changes}
        save_adapter(path, given.pop("lora", self.lora), **given)


def adapted(model=FLAT, inputs=IDS, dtype=None, **options):
    if model is not FLAT or inputs is not IDS:
        return made(model, inputs, dtype, options)
    key = (str(dtype), json.dumps(options))
    if key not in KEPT:
        KEPT[key] = made(model, inputs, dtype, options)
    return KEPT[key]


KEPT = {}


def made(model, inputs, dtype, options):
    config = peft.LoraConfig(**{"r": 2, "lora_alpha": 5, **options})
    adapted_model = peft.get_peft_model(model, config)
    params = jax.eval_shape(lambda: adapted_model.init(key_of(0), inputs))["params"]
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, dtype or leaf.dtype), params)
    mask = flatten_dict(peft.trainable_mask(params, config))
    flat = flatten_dict(randomised(params))
    lora = unflatten_dict({path: leaf for path, leaf in flat.items() if mask[path]})
    return Case(adapted_model, config, peft.lora_specs(adapted_model, inputs), lora)


def tensors_of(path):
    return safetensors.numpy.load_file(path / TENSORS)


def rewritten(path, change, config=None):
    """Saves the tensors again as another program would, and the config with changes."""
    found = tensors_of(path)
    safetensors.numpy.save_file(change(found) or found, path / TENSORS, {"format": "pt"})
    data = json.loads((path / CONFIG).read_text())
    (path / CONFIG).write_text(json.dumps({**data, **(config or {})}))


def assert_same(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for (path, value), other in zip(
        jax.tree.leaves_with_path(expected), jax.tree.leaves(actual), strict=True
    ):
        assert other.dtype == value.dtype, path
        np.testing.assert_array_equal(other, value, err_msg=str(path))


def file_bytes(path):
    return {name: (path / name).read_bytes() for name in sorted(os.listdir(path))}


# --- Layouts -------------------------------------------------------------------------------------

PLAIN = {"target_modules": ["fc", "table"]}
CASES = {
    "plain": (FLAT, PLAIN),
    "rslora": (FLAT, {**PLAIN, "use_rslora": True}),
    "dora": (FLAT, {**PLAIN, "use_dora": True}),
    "lora bias": (FLAT, {"target_modules": ["fc"], "lora_bias": True}),
    "patterns": (FLAT, {**PLAIN, "rank_pattern": {"fc": 3}, "alpha_pattern": {"t.*": 7}}),
    "all-linear": (FLAT, {"target_modules": "all-linear"}),
    "expression": (FLAT, {"target_modules": "f."}),
    "saved": (FLAT, {"target_modules": ["fc"], "modules_to_save": ["head", "table"]}),
    "biases": (FLAT, {"target_modules": ["fc"], "bias": "all"}),
    "biases of adapted": (FLAT, {"target_modules": ["fc"], "bias": "lora_only"}),
    "rows": (FLAT, {"target_modules": ["fc"], "trainable_token_indices": [7, 2]}),
    "heads": (Model(), {"target_modules": TARGETS}),
    "heads, dora": (Model(), {"target_modules": TARGETS, "use_dora": True}),
    "heads, lora bias": (Model(), {"target_modules": TARGETS[:3], "lora_bias": True}),
    "heads, biases": (Model(), {"target_modules": TARGETS[:3], "bias": "lora_only"}),
    "layers": (Model(), {"target_modules": ["out"], "layers_to_transform": [0, 2]}),
}


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, "float32") for name in CASES), ("dora", "bfloat16")]
)
def test_what_is_saved_is_loaded(name, dtype, tmp_path):
    """With specs and without, bit for bit; and saved once more it is the same file."""
    case = adapted(CASES[name][0], dtype=dtype, **CASES[name][1])
    case.save(tmp_path / "first")
    for specs in (None, case.specs):
        lora, config = load_adapter(tmp_path / "first", specs=specs)
        assert_same(lora, case.lora)
        case.save(tmp_path / "second", lora=lora, config=config)
        assert file_bytes(tmp_path / "second") == file_bytes(tmp_path / "first")
    assert peft.lora_specs(peft.get_peft_model(case.model.wrapped, config), IDS) == case.specs


@pytest.mark.parametrize("scan", [0, 1, -1])
def test_stacked_layers_have_a_tensor_each(scan, tmp_path):
    """Stacked along any axis, or one by one: the same files."""
    case = adapted(Model(), target_modules=TARGETS, use_dora=True)
    case.save(tmp_path / "one by one", renames={"layers_{}": "blocks.{}"})
    stacked = adapted(Model(scan=scan), target_modules=TARGETS, use_dora=True)
    layers = [case.lora[f"layers_{i}"] for i in range(3)]
    lora = {"table": case.lora["table"]}
    flat = [flatten_dict(layer) for layer in layers]
    lora["layers"] = unflatten_dict(
        {path: jnp.stack([one[path] for one in flat], scan) for path in flat[0]}
    )
    stacked.save(tmp_path / "stacked", lora=lora, renames={"layers": "blocks.{}"})
    one, other = tensors_of(tmp_path / "one by one"), tensors_of(tmp_path / "stacked")
    assert sorted(one) == sorted(other)
    for key in one:
        np.testing.assert_array_equal(one[key], other[key], err_msg=key)
    read, config = load_adapter(tmp_path / "stacked")
    assert_same(read, lora)
    assert set(config.target_modules) == {*(f"layers.{t}" for t in TARGETS[:3]), "table"}
    read, _ = load_adapter(
        tmp_path / "one by one", specs=stacked.specs, renames={"layers": "blocks.{}"}
    )
    assert_same(read, lora)


EQUATIONS = {
    "...i,io->...o": (5, 4),
    "...i,oi->...o": (4, 5),
    "btd,ndh->btnh": (2, 5, 3),
    "btd,dnh->btnh": (5, 2, 3),
    "btd,hnd->btnh": (3, 2, 5),
    "btnh,nhd->btd": (2, 3, 5),
    "btnh,dnh->btd": (5, 2, 3),
    "btd,zndh->btznh": (2, 2, 5, 3),
    "bij,oijp->bpo": (4, 2, 3, 5),
}


@pytest.mark.parametrize("equation", EQUATIONS)
@pytest.mark.parametrize("use_dora", [False, True])
def test_any_equation_is_a_linear_layer(equation, use_dora, tmp_path):
    """Theirs maps joined inputs to joined outputs as the change of the kernel does."""
    shape = EQUATIONS[equation]
    inputs, rest = equation.split(",")
    kernel, outputs = rest.split("->")
    sizes = dict(zip(kernel, shape, strict=True))
    x = np.random.default_rng(0).normal(
        size=tuple(sizes.get(c, 2) for c in inputs.replace("...", "b"))
    )

    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Einsum(shape, equation, use_bias=False, name="proj")(x)

    case = adapted(Layer(), jnp.asarray(x, jnp.float32), target_modules=["proj"], use_dora=use_dora)
    case.save(tmp_path / "a")
    found = tensors_of(tmp_path / "a")
    a, b = (found[f"{PREFIX}proj.lora_{half}.weight"] for half in "AB")
    (spec,) = case.specs.values()
    lora = case.lora["proj"]["lora"]
    change = np.einsum(spec.equation, lora["a"], lora["b"])
    expected = np.einsum(equation, x, change)
    summed = [c for c in kernel if c in inputs and c not in outputs]
    # Inputs are joined in the order of the kernel, outputs in that of the output.
    free = [i for i, c in enumerate(inputs.replace("...", "b")) if c not in summed]
    order = free + [inputs.replace("...", "b").index(c) for c in summed]
    joined = x.transpose(order).reshape(*(x.shape[i] for i in free), -1)
    y = (joined @ a.T @ b.T).reshape(expected.shape)
    assert_rounded(y, expected, x.size)
    if use_dora:
        magnitude = found[f"{PREFIX}proj.lora_magnitude_vector"]
        np.testing.assert_array_equal(magnitude, np.ravel(lora["magnitude"]))
    assert_same(load_adapter(tmp_path / "a")[0], case.lora)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Einsum((2, 5, 3), "btnd,ndh->btnh", name="proj"), (2, 4, 2, 5)),
        (nn.DenseGeneral(3, batch_dims=0, name="proj"), (2, 4, 5)),
    ],
    ids=["Einsum", "DenseGeneral"],
)
def test_a_matrix_for_each_head_has_no_form(layer, shape, tmp_path):
    model = nn.Sequential([layer])
    case = adapted(model, jnp.zeros(shape), target_modules=["layers_0"])
    with pytest.raises(ValueError, match=r"layers_0/lora.*matrix for each index.*orbax"):
        case.save(tmp_path / "a")
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("window", [(3,), (3, 2), (2, 1, 3)])
def test_convolutions(window, tmp_path):
    model = nn.Sequential([nn.Conv(4, window)])
    case = adapted(
        model, jnp.zeros((1, *(5,) * len(window), 6)), target_modules=["layers_0"], use_dora=True
    )
    case.save(tmp_path / "a")
    found = tensors_of(tmp_path / "a")
    lora = case.lora["layers_0"]["lora"]
    np.testing.assert_array_equal(
        found[f"{PREFIX}layers_0.lora_A.weight"], np.moveaxis(lora["a"], (-1, -2), (0, 1))
    )
    ones = (1,) * len(window)
    assert found[f"{PREFIX}layers_0.lora_B.weight"].shape == (4, 2, *ones)
    assert found[f"{PREFIX}layers_0.lora_magnitude_vector"].shape == (1, 4, *ones)
    rewritten(tmp_path / "a", lambda found: None)  # without our metadata
    assert_same(load_adapter(tmp_path / "a")[0], case.lora)


def test_specs_without_shapes(tmp_path):
    """Those of another file; arrays say the shape where each axis of theirs is one of ours."""
    case = adapted(**PLAIN, use_dora=True)
    specs = {path: dataclasses.replace(spec, shape=None) for path, spec in case.specs.items()}
    case.save(tmp_path / "a", specs=specs)
    assert_same(load_adapter(tmp_path / "a")[0], case.lora)
    assert_same(load_adapter(tmp_path / "a", specs=specs)[0], case.lora)
    case = adapted(Model(scan=1), target_modules=TARGETS)
    specs = {path: dataclasses.replace(spec, shape=None) for path, spec in case.specs.items()}
    case.save(tmp_path / "b", specs=specs, renames={"layers": "layers.{}"})
    assert_same(load_adapter(tmp_path / "b")[0], case.lora)
    with pytest.raises(ValueError, match=r"layers/key/lora.*says no shape"):
        load_adapter(tmp_path / "b", specs=specs)


def test_parameters_of_the_model_itself(tmp_path):
    class Shifted(nn.Module):
        @nn.compact
        def __call__(self, x):
            bias = self.param("bias", nn.initializers.zeros, (4,))
            return nn.Dense(4, name="fc")(x) + bias[None]

    case = adapted(Shifted(), jnp.zeros((1, 3)), target_modules=["fc"], bias="all")
    case.save(tmp_path / "a")
    assert f"{PREFIX}bias" in tensors_of(tmp_path / "a")
    assert_same(load_adapter(tmp_path / "a")[0], case.lora)
    rewritten(tmp_path / "a", lambda found: None)
    assert_same(load_adapter(tmp_path / "a")[0], case.lora)


def test_metadata_and_inference_mode(tmp_path):
    adapted(**PLAIN).save(tmp_path / "a")
    with safetensors.safe_open(tmp_path / "a" / TENSORS, "np") as file:
        metadata = file.metadata()
    assert metadata["format"] == "pt"
    specs = json.loads(metadata["peft_jax.specs"])
    assert peft.LoraSpec.from_dict(specs["fc/lora"]).scaling == 2.5
    assert json.loads((tmp_path / "a" / CONFIG).read_text())["inference_mode"] is True


def test_names_of_whole_parameters_by_the_base(tmp_path):
    """Of files without our metadata: a table is no kernel, and heads have axes of their own."""
    model = Model()
    case = adapted(model, target_modules=["out"], modules_to_save=["query", "table", "norm"])
    specs = {**case.specs, **peft.layer_specs(model, IDS)}
    case.save(tmp_path / "a", specs=specs)
    rewritten(tmp_path / "a", lambda found: None)
    base = jax.eval_shape(lambda: model.init(key_of(0), IDS))["params"]
    assert_same(load_adapter(tmp_path / "a", specs=specs, base=base)[0], case.lora)
    with pytest.raises(ValueError, match="base="):
        load_adapter(tmp_path / "a", specs=specs)


def test_whole_weights_of_many_axes_need_their_layer_spec(tmp_path):
    model = Model()
    case = adapted(model, target_modules=["out"], modules_to_save=["query", "key"])
    with pytest.raises(ValueError, match=r"query/kernel.*LayerSpec"):
        case.save(tmp_path / "a")
    specs = {**case.specs, **peft.layer_specs(model, IDS)}
    case.save(tmp_path / "a", specs=specs)
    found = tensors_of(tmp_path / "a")
    query, key = (case.lora["layers_1"][name] for name in ("query", "key"))
    names = [f"{PREFIX}layers_1.{name}." for name in ("query", "key")]
    np.testing.assert_array_equal(found[f"{names[0]}weight"], query["kernel"].reshape(6, 6).T)
    np.testing.assert_array_equal(found[f"{names[0]}bias"], query["bias"].ravel())
    np.testing.assert_array_equal(found[f"{names[1]}weight"], key["kernel"].reshape(6, 6))
    assert_same(load_adapter(tmp_path / "a")[0], case.lora)


def test_named_adapters_lose_their_name(tmp_path):
    case = adapted(**PLAIN)
    french = {module: {"lora.french": own["lora"]} for module, own in case.lora.items()}
    specs = {f"{path}.french": spec for path, spec in case.specs.items()}
    case.save(tmp_path / "a", lora=french, specs=specs)
    assert_same(load_adapter(tmp_path / "a")[0], case.lora)
    assert_same(load_adapter(tmp_path / "a", adapter_name="french")[0], french)
    both = {module: {**case.lora[module], **french[module]} for module in french}
    with pytest.raises(ValueError, match=r"\['default', 'french'\]"):
        case.save(tmp_path / "b", lora=both)
    case.save(tmp_path / "b", lora=both, specs={**specs, **case.specs}, adapter_name="french")
    assert file_bytes(tmp_path / "a") == file_bytes(tmp_path / "b")
    lora, _ = load_adapter(tmp_path / "b", specs={**specs, **case.specs}, adapter_name="french")
    assert_same(lora, french)
    with pytest.raises(ValueError, match="no adapter named 'german'"):
        case.save(tmp_path / "c", adapter_name="german")


def test_dtypes(tmp_path):
    case = adapted(**PLAIN, dtype="bfloat16")
    case.save(tmp_path / "a")
    lora, _ = load_adapter(tmp_path / "a", dtype=jnp.float32)
    assert_same(lora, jax.tree.map(lambda leaf: leaf.astype(jnp.float32), case.lora))
    with pytest.raises(ValueError, match="int32 is no dtype of floats"):
        load_adapter(tmp_path / "a", dtype="int32")
    rewritten(tmp_path / "a", lambda found: {k: v.astype(np.float64) for k, v in found.items()})
    with pytest.raises(ValueError, match=r"float64.*jax_enable_x64"):
        load_adapter(tmp_path / "a")
    assert_same(load_adapter(tmp_path / "a", dtype=jnp.bfloat16)[0], case.lora)
    rewritten(tmp_path / "a", lambda found: {k: v.astype(np.int32) for k, v in found.items()})
    with pytest.raises(ValueError, match=r"lora_A.weight' is of int32, and no float"):
        load_adapter(tmp_path / "a")


# --- Renames -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("table", "path", "name"),
    [
        ({}, "a/b_0/c", "a.b_0.c"),
        ({"b_{}": "model.b.{}"}, "a/b_12/c", "a.model.b.12.c"),
        ({"b_{}": "b.{}", "b_{}/c": "x.{}.y"}, "b_0/c/b_1/d", "x.0.y.b.1.d"),
        ({"b_{}": "b.{}", "b_1": "first"}, "b_1/b_2", "first.b.2"),
        ({"{}_{}": "{}.{}"}, "layer_3", "layer.3"),
        ({"a": "x.y"}, "a/ab/a", "x.y.ab.x.y"),
        ({"a/b": "x"}, "a/a/b/b", "a.x.b"),
        ({"a.b": "x"}, "c/a.b", "c.x"),
    ],
)
def test_renames_lead_there_and_back(table, path, name):
    renames, path, name = Renames(table), tuple(path.split("/")), tuple(name.split("."))
    assert renames.forward(path).at(()) == name
    assert Renames(table).backward(name)[:2] == (path, ())
    renames.check_used()


def test_numbers_of_layers_go_behind_the_others():
    renames = Renames({"h_{}/stack": "h.{}.layers.{}"})
    name = renames.forward(("h_3", "stack", "q"))
    assert (name.places, name.at((7,))) == (1, ("h", "3", "layers", "7", "q"))
    assert renames.backward(("h", "3", "layers", "7", "q"))[:2] == (("h_3", "stack", "q"), (7,))


@pytest.mark.parametrize(
    ("table", "match"),
    [
        ({"a": "b/c"}, "parts with dots"),
        ({"a": "b..c"}, "parts with dots"),
        ({"/a": "b"}, "slashes between"),
        ({"": "b"}, "slashes between"),
        ({"a_{}": "b"}, "two layers get one name"),
        ({"a": 3}, "strings"),
        ({"{}{}{}": "{}{}{}"}, "at most 2"),
        ([("a", "b")], "a dict"),
    ],
)
def test_tables_that_are_no_renames(table, match):
    with pytest.raises(ValueError, match=match):
        Renames(table)


@pytest.mark.parametrize(
    ("table", "name"),
    [
        ({"a": "x", "b": "x"}, "x"),
        ({"q": "q_proj"}, "q"),
        ({"layers": "layers.{}"}, "layers"),
    ],
)
def test_tables_that_do_not_lead_back(table, name):
    with pytest.raises(ValueError, match=r"renames lead.*specs="):
        Renames(table).backward(tuple(name.split(".")))


def test_renames_of_a_model(tmp_path):
    """The config is written in their names, and read in ours; other files need no specs."""
    case = adapted(**PLAIN, rank_pattern={"fc": 3}, modules_to_save=["head"])
    renames = {"fc": "model.up_proj", "table": "model.embed", "head": "lm_head"}
    case.save(tmp_path / "a", renames=renames)
    data = json.loads((tmp_path / "a" / CONFIG).read_text())
    assert sorted(data["target_modules"]) == ["model.embed", "model.up_proj"]
    assert data["rank_pattern"] == {"model.up_proj": 3}
    assert data["modules_to_save"] == ["lm_head"]
    assert f"{PREFIX}model.up_proj.lora_A.weight" in tensors_of(tmp_path / "a")
    rewritten(tmp_path / "a", lambda found: None)
    lora, config = load_adapter(tmp_path / "a", renames=renames)
    assert_same(lora, case.lora)
    assert (set(config.target_modules), config.rank_pattern) == ({"fc", "table"}, {"fc": 3})
    assert config.modules_to_save == ("head",)
    lora, _ = load_adapter(tmp_path / "a", renames=renames, specs=case.specs)
    assert_same(lora, case.lora)
    lora, config = load_adapter(tmp_path / "a")
    assert set(lora["model"]) == {"up_proj", "embed"}


def test_ranks_by_whole_names_where_one_ends_as_another(tmp_path):
    class Outer(nn.Module):
        @nn.compact
        def __call__(self, ids):
            x = nn.Dense(6, name="fc")(Model(flat=True, name="inner")(ids))
            return nn.Dense(5, name="a_fc")(x)

    patterns = {"rank_pattern": {"inner.fc": 4}, "alpha_pattern": {"a_fc": 1}}
    case = adapted(Outer(), target_modules="all-linear", **patterns)
    renames = {"inner/fc": "inner.x.fc", "fc": "x.fc"}
    case.save(tmp_path / "a", renames=renames)
    lora, config = load_adapter(tmp_path / "a")
    assert_same(lora, case.lora)
    assert peft.lora_specs(peft.get_peft_model(Outer(), config), IDS) == case.specs


@pytest.mark.parametrize(
    ("renames", "match"),
    [
        ({"fcc": "x"}, r"\['fcc'\].*'fc'"),
        ({"fc": "x", "table": "x", "head/kernel": "y"}, "head/kernel"),
        ({"fc": "x.{}"}, "'fc/lora'.*counts 1"),
        ({"fc": ""}, "'fc/lora'.*itself is the layer"),
    ],
)
def test_renames_that_do_not_fit(renames, match, tmp_path):
    with pytest.raises(ValueError, match=match):
        adapted(**PLAIN).save(tmp_path / "a", renames=renames)
    assert not os.listdir(tmp_path)


def test_names_that_meet(tmp_path):
    class Two(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(4, name="b")(nn.Dense(4, name="a")(x))

    case = adapted(Two(), jnp.zeros((1, 4)), target_modules=["a", "b"])
    with pytest.raises(ValueError, match="of 'a/lora' and of 'b/lora'"):
        case.save(tmp_path / "a", renames={"a": "x", "b": "x"})


def test_stacked_layers_need_a_place_for_their_number(tmp_path):
    case = adapted(Model(scan=0), target_modules=["out"])
    with pytest.raises(ValueError, match=r"'layers/out/lora'.*renames.*layers\.\{\}"):
        case.save(tmp_path / "a")


# --- What is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"r": 4}, "'fc/lora': rank 4 for 2"),
        ({"lora_alpha": 4}, "'fc/lora': lora_alpha 4.*2 for 2.5"),
        ({"use_rslora": True}, "'fc/lora'.*use_rslora True"),
        ({"rank_pattern": {"fc": 1}}, "'fc/lora': rank 1 for 2"),
        ({"alpha_pattern": {"table": 1}}, "'table/lora': lora_alpha 1"),
        ({"use_dora": True}, "'table/lora': use_dora True"),
        ({"lora_bias": True}, "lora_bias True"),
        ({"target_modules": ["fc"]}, "'table/lora': no adapter there"),
        ({"target_modules": ["fc", "table", "head"]}, "'head' names nothing"),
        ({"modules_to_save": ["head"]}, "modules_to_save 'head' names nothing"),
        ({"trainable_token_indices": [1]}, "there are no rows"),
        ({"bias": "all"}, "no bias is in the tree"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_a_config_that_disagrees_is_refused(change, match, tmp_path):
    """A scaling would be lost, or something would not be trained on."""
    case = adapted(**PLAIN)
    config = dataclasses.replace(case.config, **change)
    with pytest.raises(ValueError, match=match):
        case.save(tmp_path / "a", config=config)
    assert not os.listdir(tmp_path)
    case.save(tmp_path / "a")
    if "names nothing" not in match and "bias is in" not in match:
        rewritten(tmp_path / "a", lambda found: None, {**change})
        with pytest.raises(ValueError, match="config for spec"):
            load_adapter(tmp_path / "a", specs=case.specs)


def without(path):
    def change(lora):
        flat = flatten_dict(lora, sep="/")
        del flat[path]
        return unflatten_dict(flat, sep="/")

    return change


def changed(path, value):
    return lambda lora: unflatten_dict({**flatten_dict(lora, sep="/"), path: value}, sep="/")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda lora: {}, "no adapter"),
        (lambda lora: {"fc": lora["fc"]}, "'table/lora' has no arrays"),
        (changed("other/lora", {"a": jnp.ones((2, 2)), "b": jnp.ones((2, 2))}), "'other/lora' has"),
        (changed("fc/lora/a", jnp.ones((5, 2))), "'fc/lora/a' has shape"),
        (changed("fc/lora/a", jnp.ones((6, 2), jnp.int8)), "is of int8, and no float"),
        (changed("fc/lora/bias", jnp.ones(6)), "'fc/lora/bias' is not in its spec"),
        (changed("head/kernel", jnp.ones((6, 4))), "'head/kernel': not trained"),
        (without("fc/lora/b"), "'fc/lora' has no arrays"),
        (lambda lora: {"lora": lora["fc"]["lora"]}, "'lora' has no spec"),
    ],
)
def test_trees_that_do_not_fit_are_not_saved(change, match, tmp_path):
    case = adapted(**PLAIN)
    with pytest.raises(ValueError, match=match):
        case.save(tmp_path / "a", lora=change(case.lora))
    assert not os.listdir(tmp_path)


def test_the_model_itself_has_no_name(tmp_path):
    model = nn.Dense(3)
    with peft.ModuleInterceptor(lambda m: peft.LoRADense(rank=2, wrapped=m)):
        params = model.init(key_of(0), jnp.zeros((1, 4)))["params"]
        specs = peft.lora_specs(model, jnp.zeros((1, 4)))
    lora = peft.split_params(params).lora
    config = peft.LoraConfig(r=2, lora_alpha=2, target_modules=["x"])
    with pytest.raises(ValueError, match="the model itself is the layer"):
        save_adapter(tmp_path / "a", lora, config=config, specs=specs)


A, B = f"{PREFIX}fc.lora_A.weight", f"{PREFIX}fc.lora_B.weight"


def dropped(*keys):
    return lambda found: {k: v for k, v in found.items() if k not in keys}


@pytest.mark.parametrize("by_specs", [True, False], ids=["specs", "names alone"])
@pytest.mark.parametrize(
    ("change", "match"),
    [
        (dropped(A), "fc.*lora_A.weight"),
        (dropped(B), "fc.*lora_B.weight"),
        (lambda f: {**f, A: f[A][:1]}, "fc"),
        (lambda f: {**f, A: f[A][:1], B: f[B][:, :1]}, "fc"),
        (lambda f: {**f, A: f[A][0]}, "fc"),
        (lambda f: {**f, A: f[A][:, :0]}, "fc"),
        (lambda f: {**f, f"{PREFIX}fc.lora_C.weight": f[A]}, "lora_C"),
        (lambda f: {**f, f"{PREFIX}head.weight": f[A]}, "head"),
        (lambda f: {**f, f"{PREFIX}head.lora_A.weight": f[A]}, "head"),
        (lambda f: {**f, f"{PREFIX}fc.lora_magnitude_vector": np.ones(6, np.float32)}, "fc"),
        (lambda f: {**f, f"{PREFIX}fc.lora_B.bias": np.ones(6, np.float32)}, "fc"),
        (lambda f: {**f, "fc.lora_A.weight": f[A]}, "names of tensors"),
        (lambda f: {**f, f"{PREFIX}..lora_A.weight": f[A]}, "names of tensors"),
        (lambda f: {**f, f"{PREFIX}a/../../b.lora_A.weight": f[A]}, "names of tensors"),
        (lambda f: {**f, f"{PREFIX}lora_A.weight": f[A]}, "names of tensors"),
        (lambda f: {**f, A: f[A].astype(np.int32)}, "no float"),
        (lambda f: {**f, f"{PREFIX}fc.token_adapter.trainable_tokens_delta": f[A]}, "fc"),
    ],
)
def test_files_that_do_not_fit_are_not_loaded(change, match, by_specs, tmp_path):
    case = adapted(**PLAIN)
    case.save(tmp_path / "a")
    rewritten(tmp_path / "a", change)
    with pytest.raises(ValueError, match=match) as error:
        load_adapter(tmp_path / "a", specs=case.specs if by_specs else None)
    assert str(tmp_path) in str(error.value)


def test_all_names_are_told(tmp_path):
    case = adapted(Model(), target_modules=["out"])
    case.save(tmp_path / "a")
    rewritten(tmp_path / "a", lambda found: {k: v for k, v in found.items() if "layers_1" in k})
    with pytest.raises(ValueError, match=r"layers_0.*is missing.*layers_2.*is missing"):
        load_adapter(tmp_path / "a", specs=case.specs)


def test_specs_of_another_model(tmp_path):
    case, other = adapted(**PLAIN), adapted(Model(), target_modules=["out"])
    case.save(tmp_path / "a")
    with pytest.raises(ValueError, match=r"layers_0.out.*missing.*surplus"):
        load_adapter(tmp_path / "a", specs=other.specs)
    specs = {k: dataclasses.replace(s, scaling=1.0) for k, s in case.specs.items()}
    with pytest.raises(ValueError, match="lora_alpha 5"):
        load_adapter(tmp_path / "a", specs=specs)
    with pytest.raises(ValueError, match="from paths to a LoraSpec"):
        load_adapter(tmp_path / "a", specs={"fc/lora": {"rank": 2}})


@pytest.mark.parametrize(
    ("file", "text", "match"),
    [
        (CONFIG, None, "No config could be read"),
        (CONFIG, b"{", "No config could be read"),
        (CONFIG, b"[" * 100_000, "No config could be read"),
        (CONFIG, b'{"peft_type": "IA3"}', "peft_type"),
        (CONFIG, b'{"r": 0}', "LoraConfig.r"),
        (TENSORS, None, "cannot be read"),
        (TENSORS, b"", "no safetensors file"),
    ],
)
def test_broken_pairs(file, text, match, tmp_path):
    adapted(**PLAIN).save(tmp_path / "a")
    if text is None:
        (tmp_path / "a" / file).unlink()
    else:
        (tmp_path / "a" / file).write_bytes(text)
    with pytest.raises(ValueError, match=match):
        load_adapter(tmp_path / "a")


def test_pickled_files_are_not_read(tmp_path):
    adapted(**PLAIN).save(tmp_path / "a")
    (tmp_path / "a" / TENSORS).rename(tmp_path / "a" / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"adapter_model.bin.*pickled.*safe_serialization=True"):
        load_adapter(tmp_path / "a")


def test_no_directory(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="no directory"):
        adapted(**PLAIN).save(tmp_path / "file")
    with pytest.raises(ValueError, match="No config could be read"):
        load_adapter(tmp_path / "missing")


# --- Whole or not at all -------------------------------------------------------------------------


def test_other_files_stay(tmp_path):
    case = adapted(**PLAIN)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "README.md").write_text("mine")
    for _ in range(2):
        case.save(tmp_path / "a")
        assert sorted(os.listdir(tmp_path / "a")) == ["README.md", CONFIG, TENSORS]
    case.save(tmp_path / "deep" / "er" / "a")
    assert_same(load_adapter(tmp_path / "deep" / "er" / "a")[0], case.lora)


@pytest.mark.parametrize("failing", range(1, 5))
@pytest.mark.parametrize("is_new", [True, False])
@pytest.mark.parametrize("once", [True, False])
def test_a_failure_leaves_one_adapter_or_the_other(failing, is_new, once, tmp_path, monkeypatch):
    """Whichever of the replacements fails; a pair that is mixed nonetheless is told."""
    case, other = adapted(**PLAIN), adapted(**PLAIN, lora_alpha=7, use_dora=True)
    path, calls, replace = tmp_path / "a", [], os.replace
    if not is_new:
        case.save(path)

    def burn(*args):
        calls.append(args)
        if len(calls) == failing or (len(calls) > failing and not once):
            raise OSError("the disk burns")
        replace(*args)

    monkeypatch.setattr(os, "replace", burn)
    try:
        other.save(path)
    except OSError:
        expected = case
    else:
        expected = other
    monkeypatch.undo()
    if is_new and expected is case:
        assert not os.listdir(tmp_path)
        return
    assert sorted(os.listdir(path)) == [CONFIG, TENSORS]
    if failing == 4 and not once and not is_new:  # nor could the first file be put back
        with pytest.raises(ValueError, match=r"saved with another adapter_config.json"):
            load_adapter(path)
    else:
        assert_same(load_adapter(path)[0], expected.lora)


def test_a_mixed_pair_is_told(tmp_path):
    adapted(**PLAIN).save(tmp_path / "a")
    adapted(**PLAIN, lora_alpha=7).save(tmp_path / "b")
    shutil.copy(tmp_path / "b" / CONFIG, tmp_path / "a" / CONFIG)
    with pytest.raises(ValueError, match=r"saved with another adapter_config.json"):
        load_adapter(tmp_path / "a")


def test_bookkeeping_may_change(tmp_path):
    case = adapted(**PLAIN)
    case.save(tmp_path / "a")
    data = json.loads((tmp_path / "a" / CONFIG).read_text())
    changes = {"base_model_name_or_path": "gpt2", "task_type": "CAUSAL_LM", "revision": "main"}
    (tmp_path / "a" / CONFIG).write_text(json.dumps({**data, **changes}, sort_keys=True))
    lora, config = load_adapter(tmp_path / "a")
    assert_same(lora, case.lora)
    assert config.base_model_name_or_path == "gpt2"


# --- Hostile files -------------------------------------------------------------------------------

quick = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@quick
@given(st.data())
def test_flipped_bytes(tmp_path, data):
    path = tmp_path / "a"
    if not path.exists():
        adapted(**PLAIN).save(path)
        shutil.copytree(path, tmp_path / "kept")
    name = data.draw(st.sampled_from([TENSORS, CONFIG]))
    text = bytearray((tmp_path / "kept" / name).read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        text[data.draw(st.integers(0, len(text) - 1))] = data.draw(st.integers(0, 255))
    shutil.copytree(tmp_path / "kept", path, dirs_exist_ok=True)
    (path / name).write_bytes(text)
    try:
        lora, _ = load_adapter(path)
    except ValueError:
        return
    assert set(lora) == {"fc", "table"}


JUNK = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=4)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)


@quick
@given(st.sampled_from(["specs", "whole", "renames"]), st.data())
def test_strange_metadata(tmp_path, field, data):
    path = tmp_path / "a"
    if not path.exists():
        adapted(**PLAIN, modules_to_save=["head"]).save(tmp_path / "kept")
        shutil.copytree(tmp_path / "kept", path)
    tensors = tensors_of(tmp_path / "kept")
    with safetensors.safe_open(tmp_path / "kept" / TENSORS, "np") as file:
        metadata = file.metadata()
    value = json.loads(metadata[f"peft_jax.{field}"])
    key = data.draw(st.sampled_from([*value, "fc/lora", "../x", "a//b", "x"]))
    inner = value.get(key)
    if isinstance(inner, dict) and data.draw(st.booleans()):
        name = data.draw(st.sampled_from(list(inner)))
        huge = st.lists(st.integers(-(2**70), 2**70), max_size=4)
        value[key] = {**inner, name: data.draw(st.one_of(JUNK, huge))}
    else:
        value[key] = data.draw(JUNK)
    metadata[f"peft_jax.{field}"] = json.dumps(value)
    safetensors.numpy.save_file(tensors, path / TENSORS, metadata)
    try:
        lora, _ = load_adapter(path)
    except ValueError:
        return
    for leaf, original in zip(
        jax.tree.leaves(lora), jax.tree.leaves(load_adapter(tmp_path / "kept")[0]), strict=True
    ):
        assert leaf.shape == original.shape


def test_a_stack_of_very_many_layers(tmp_path):
    case = adapted(Model(scan=0), target_modules=["out"])
    case.save(tmp_path / "a", renames={"layers": "layers.{}"})
    (spec,) = case.specs.values()
    many = dataclasses.replace(spec, shape=(2**40, *spec.shape[1:]))
    with pytest.raises(ValueError, match="does not fit the file"):
        load_adapter(tmp_path / "a", specs={"layers/out/lora": many})

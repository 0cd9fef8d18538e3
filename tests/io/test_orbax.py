"""Checkpoints of orbax: what is saved comes back, on any devices, or not at all."""

import json
import shutil

import chex
import flax
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import linen as nn
from flax.core import meta
from helpers import key_of, numbers
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

import peft_jax as peft
from peft_jax.io.orbax.checkpoint import restore_orbax, save_orbax

X = numbers(2, 8)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(4, name="out")(nn.Dense(8, name="hidden")(x))


CONFIG = peft.LoraConfig(
    r=2, lora_alpha=3, target_modules=["hidden", "out"], rank_pattern={"out": 4}, use_rslora=True
)


def trained(seed=0):
    """An adapted model's parameters, and the specs."""
    model = peft.get_peft_model(Net(), CONFIG)
    shapes = jax.eval_shape(lambda: model.init(key_of(0), X))["params"]
    return drawn(shapes, seed), peft.lora_specs(model, X)


def drawn(tree, seed=0):
    leaves, structure = jax.tree.flatten(tree)
    filled = [
        numbers(*leaf.shape, seed=seed + i).astype(leaf.dtype) for i, leaf in enumerate(leaves)
    ]
    return jax.tree.unflatten(structure, filled)


def abstract(tree):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


def assert_same(actual, expected):
    """The same containers, nodes and bits."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    chex.assert_trees_all_equal_shapes_and_dtypes(actual, expected)
    chex.assert_trees_all_equal(actual, expected)


def on_mesh(spec, *shape):
    names = ("x", "y")[: len(shape)]
    devices = jax.devices()[: int(np.prod(shape))]
    mesh = jax.make_mesh(
        shape, names, devices=devices, axis_types=(jax.sharding.AxisType.Auto,) * len(shape)
    )
    return NamedSharding(mesh, spec)


# --- What comes back -----------------------------------------------------------------------------


def test_adapters_with_specs_and_config(tmp_path):
    params, specs = trained()
    _, lora = peft.split_params(params)
    save_orbax(tmp_path / "lora", lora, specs=specs, config=CONFIG)
    tree, found, config = restore_orbax(tmp_path / "lora")
    assert_same(tree, lora)
    assert found == specs
    assert {path: spec.to_dict() for path, spec in found.items()} == {
        path: spec.to_dict() for path, spec in specs.items()
    }
    assert config == CONFIG
    assert [file.name for file in tmp_path.iterdir()] == ["lora"]


def test_whole_trees_without_specs(tmp_path):
    params, specs = trained()
    save_orbax(str(tmp_path / "a" / "b"), params)
    tree, found, config = restore_orbax(str(tmp_path / "a" / "b"))
    assert_same(tree, params)
    assert found is None
    assert config is None
    fused = peft.fuse_params(tree, specs=specs)
    chex.assert_trees_all_equal(fused, peft.fuse_params(params, specs=specs))


def test_containers_dtypes_and_names(tmp_path):
    adapter = {"a": jnp.ones((3, 2), jnp.bfloat16), "b": jnp.ones((2, 4), jnp.float16)}
    tree = flax.core.freeze(
        {
            "blocks": [{"lora": adapter}, {}, {"lora.french": adapter}],
            "pair": (jnp.arange(3), None, {"x": jnp.array(True)}),
            "module.with dots/ä": {"scalar": jnp.float32(2.5), "small": jnp.ones(3, jnp.int4)},
            "empty": {},
        }
    )
    save_orbax(tmp_path / "x", tree)
    read, _, _ = restore_orbax(tmp_path / "x")
    assert_same(read, tree)
    assert type(read) is flax.core.FrozenDict
    plain = {key: value for key, value in flax.core.unfreeze(tree).items() if key != "empty"}
    read, _, _ = restore_orbax(tmp_path / "x", like=abstract(plain))
    assert_same(read, plain)


def test_arrays_of_numpy_come_back_as_those_of_jax(tmp_path):
    tree = {"w": np.arange(6, dtype=np.float32).reshape(2, 3), "i": np.int32(7)}
    save_orbax(tmp_path / "x", tree)
    read, _, _ = restore_orbax(tmp_path / "x")
    assert_same(read, jax.tree.map(jnp.asarray, tree))
    save_orbax(tmp_path / "wide", {"w": np.ones(3)})
    with pytest.raises(ValueError, match="'w' is of float64, and would come back as float32"):
        restore_orbax(tmp_path / "wide")
    narrow, _, _ = restore_orbax(tmp_path / "wide", dtype=jnp.float32)
    assert_same(narrow, {"w": jnp.ones(3)})


def test_orbax_alone_reads_the_arrays(tmp_path):
    params, _ = trained()
    save_orbax(tmp_path / "x", {"layers": [params]})
    with ocp.StandardCheckpointer() as checkpointer:
        read = checkpointer.restore(tmp_path / "x" / "params")
    chex.assert_trees_all_equal(read, {"layers": {"0": params}})


# --- Devices -------------------------------------------------------------------------------------

LAYOUTS = {
    "one sharding": lambda tree: on_mesh(P("y", "x"), 2, 2),
    "a tree": lambda tree: {
        "hidden": {"kernel": on_mesh(P("y", "x"), 2, 2), "lora": on_mesh(P(), 2, 2)},
        "out": on_mesh(P("x"), 2),
    },
    "one device": lambda tree: SingleDeviceSharding(jax.devices()[5]),
}


def spread():
    sharding = on_mesh(P("x"), 4)
    tree = {
        "hidden": {
            "kernel": numbers(8, 4),
            "lora": {"a": numbers(8, 4), "b": numbers(4, 4).astype(jnp.bfloat16)},
        },
        "out": numbers(4, 8),
    }
    return jax.tree.map(lambda leaf: jax.device_put(leaf, sharding), tree)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_onto_another_mesh(tmp_path, layout):
    tree = spread()
    save_orbax(tmp_path / "x", tree)
    shardings = LAYOUTS[layout](tree)
    read, _, _ = restore_orbax(tmp_path / "x", shardings=shardings)
    assert_same(read, tree)
    full = jax.tree.broadcast(shardings, tree)

    def check(leaf, sharding):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)

    jax.tree.map(check, read, full)
    like = jax.tree.map(
        lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s), tree, full
    )
    read, _, _ = restore_orbax(tmp_path / "x", like=like)
    assert_same(read, tree)
    jax.tree.map(check, read, full)


def test_without_shardings_arrays_come_to_the_default_device(tmp_path):
    save_orbax(tmp_path / "x", spread())
    for like in (None, abstract(spread())):
        read, _, _ = restore_orbax(tmp_path / "x", like=like)
        assert {leaf.sharding for leaf in jax.tree.leaves(read)} == {
            SingleDeviceSharding(jax.devices()[0])
        }


@pytest.mark.parametrize(
    ("shardings", "message"),
    [
        ({"hidden": on_mesh(P(), 2), "out": "x"}, "shardings hold a str at 'out'"),
        ({"hidden": on_mesh(P(), 2)}, r"Arrays without one: \['out'\]"),
        ({"hidden": on_mesh(P(), 2), "out": on_mesh(P(), 2), "x": on_mesh(P(), 2)}, r"\['x'\]"),
        (on_mesh(P(None, None, "x"), 2), "of shape .* cannot be spread as"),
        (on_mesh(P("x"), 3), "of shape .* cannot be spread as"),
    ],
)
def test_shardings_that_do_not_fit(tmp_path, shardings, message):
    save_orbax(tmp_path / "x", spread())
    with pytest.raises(ValueError, match=message):
        restore_orbax(tmp_path / "x", shardings=shardings)


# --- Stored values, boxes, shared stacks ---------------------------------------------------------


@pytest.mark.parametrize("method", ["int4", "int8", "q4_0_transpose", "sfp8"])
def test_stored_weights(tmp_path, method):
    kernel = jax.device_put(numbers(64, 64), on_mesh(P(None, "x"), 4))
    params = {"x": {"kernel": kernel, "bias": jnp.ones(64)}}
    small = peft.quantize_checkpoint(params, method=method)
    save_orbax(tmp_path / "x", small)
    read, _, _ = restore_orbax(tmp_path / "x")
    assert_same(read, small)
    assert isinstance(read["x"]["kernel"], peft.StoredValues)
    chex.assert_trees_all_equal(peft.dequantize_checkpoint(read), peft.dequantize_checkpoint(small))
    half, _, _ = restore_orbax(
        tmp_path / "x", dtype=jnp.bfloat16, like=abstract(small), shardings=on_mesh(P(), 2)
    )
    assert half["x"]["bias"].dtype == jnp.bfloat16
    assert_same(half["x"]["kernel"], small["x"]["kernel"])
    assert_same(half["x"]["scale"], small["x"]["scale"])


def test_boxes_are_put_back_by_a_target(tmp_path):
    model = peft.LoRADense(rank=2, wrapped=nn.Dense(4))
    box = nn.Partitioned(numbers(8, 4), names=(None, "x"))
    lora = {"a": nn.Partitioned(numbers(8, 2), names=(None, None)), "b": numbers(2, 4)}
    params = {"kernel": box, "bias": jnp.ones(4), "lora": lora}
    specs = peft.lora_specs(model, X)
    save_orbax(tmp_path / "x", params, specs=specs)
    plain, _, _ = restore_orbax(tmp_path / "x")
    assert_same(plain, meta.unbox(params))
    mesh = on_mesh(P(), 2).mesh
    with jax.set_mesh(mesh):  # where boxes would constrain what is in them
        boxed, _, _ = restore_orbax(tmp_path / "x", like=abstract(params))
    assert_same(boxed, params)
    shardings = nn.get_sharding(params, mesh)
    read, _, _ = restore_orbax(tmp_path / "x", like=params, shardings=shardings)
    assert_same(read, params)
    assert read["kernel"].value.sharding.spec == P(None, "x")


def replicated(ranges=((0, 2), (1, 3)), method=None):
    """A stack of layers that a larger model shares."""
    stack = {"layers": {"kernel": numbers(3, 64, 64), "bias": numbers(3, 64)}}
    if method is not None:
        specs = {"layers/kernel": peft.LayerSpec("...i,io->...o", "dense", (0,))}
        stack = peft.quantize_checkpoint(stack, method=method, specs=specs)
    return peft.replicate_layers(stack, [list(pair) for pair in ranges], pattern="layers")


@pytest.mark.parametrize("method", [None, "q4_0"])
def test_shared_stacks_are_saved_once(tmp_path, method):
    params = replicated(method=method)
    kernel = params["layers"]["kernel"]
    assert isinstance(kernel, peft.SharedStack)
    save_orbax(tmp_path / "x", params)
    for like in (None, abstract(params)):
        read, _, _ = restore_orbax(tmp_path / "x", like=like)
        assert_same(read, params)
        assert read["layers"]["kernel"].layers == (0, 1, 1, 2)
    with ocp.StandardCheckpointer() as checkpointer:
        held = checkpointer.restore(tmp_path / "x" / "params")
    assert {leaf.shape[0] for leaf in jax.tree.leaves(held)} == {3}
    with pytest.raises(ValueError, match=r"is a stack read by \(layers, axis\) \(\(0, 1, 1, 2\)"):
        restore_orbax(tmp_path / "x", like=abstract(replicated(((0, 1), (0, 3)), method)))
    alone = jax.tree.map(
        lambda box: box.value, params, is_leaf=lambda node: isinstance(node, peft.SharedStack)
    )
    with pytest.raises(ValueError, match=r"\(\(0, 1, 1, 2\), 0\) .* and None in `like`"):
        restore_orbax(tmp_path / "x", like=alone)


def test_floats_in_another_dtype(tmp_path):
    tree = {"w": numbers(4, 4), "h": numbers(4).astype(jnp.bfloat16), "i": jnp.arange(3)}
    save_orbax(tmp_path / "x", tree)
    read, _, _ = restore_orbax(tmp_path / "x", dtype="bfloat16")
    assert_same(read, {**tree, "w": tree["w"].astype(jnp.bfloat16)})
    for dtype, message in (("int8", "not a floating dtype"), ("nonsense", "is no dtype")):
        with pytest.raises(ValueError, match=message):
            restore_orbax(tmp_path / "x", dtype=dtype)


# --- What is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tree", "arguments", "message"),
    [
        ({}, {}, "without arrays in it is nothing to save"),
        ({"a": [{}, None]}, {}, "without arrays in it is nothing to save"),
        (jnp.ones(3), {}, "nothing to save"),
        ({"a": {"b": 1.0}}, {}, "'a/b' is no array of numbers, but of the type float"),
        ({"a": np.array("x")}, {}, "'a' is no array of numbers"),
        ({"a": jax.ShapeDtypeStruct((2,), jnp.float32)}, {}, "'a' is no array of numbers"),
        ({"a": jax.random.key(0)}, {}, "'a' is no array of numbers"),
        ({"a": jnp.ones((0, 3))}, {}, r"'a' has the shape \(0, 3\)"),
        ({"a": {1: jnp.ones(3)}}, {}, "The dict at 'a' has the key 1"),
        ({"a": {"b": jnp.ones(3)}, "a.b": jnp.ones(3)}, {}, "'a.b' and 'a/b' would be one array"),
        ({"a": jnp.ones(3)}, {"specs": {"lora": "x"}}, "specs map the slashed path"),
        ({"a": jnp.ones(3)}, {"specs": trained()[1]}, "of different models"),
        ({"a": jnp.ones(3)}, {"config": {"r": 2}}, "config is a LoraConfig, got dict"),
        (
            {"a": jnp.ones(3)},
            {"config": peft.LoraConfig(auto_mapping={"x": float("nan")})},
            "auto_mapping and LoraConfig.megatron_config hold dicts",
        ),
    ],
)
def test_nothing_is_written_of_bad_input(tmp_path, tree, arguments, message):
    with pytest.raises(ValueError, match=message):
        save_orbax(tmp_path / "x", tree, **arguments)
    assert not list(tmp_path.iterdir())


def test_inside_jit_nothing_is_written(tmp_path):
    with pytest.raises(ValueError, match="'w' is no array of numbers"):
        jax.jit(lambda w: save_orbax(tmp_path / "x", {"w": w}))(jnp.ones(3))
    assert not list(tmp_path.iterdir())


def test_a_taken_path(tmp_path):
    save_orbax(tmp_path / "x", {"w": jnp.zeros(3)})
    with pytest.raises(ValueError, match=r"x' exists already.* force=True"):
        save_orbax(tmp_path / "x", {"w": jnp.ones(3)})
    assert_same(restore_orbax(tmp_path / "x")[0], {"w": jnp.zeros(3)})
    save_orbax(tmp_path / "x", {"w": jnp.ones(3)}, force=True)
    assert_same(restore_orbax(tmp_path / "x")[0], {"w": jnp.ones(3)})
    save_orbax(tmp_path / "x", {"v": jnp.ones(3)}, force=True)
    assert [file.name for file in tmp_path.iterdir()] == ["x"]


def test_what_is_no_checkpoint_is_not_deleted(tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter").write_text("mine")
    for name, message in (("file", "is a file"), ("home", "something else than a checkpoint")):
        with pytest.raises(ValueError, match=message):
            save_orbax(tmp_path / name, {"w": jnp.ones(3)}, force=True)
    assert (tmp_path / "home" / "letter").read_text() == "mine"


def test_a_failed_save_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    save_orbax(tmp_path / "x", {"w": jnp.zeros(3)})

    def full(self, directory, *args, **kwargs):
        directory.with_name(f"{directory.name}.orbax-checkpoint-tmp").mkdir()
        raise OSError("no space left")

    monkeypatch.setattr(ocp.Checkpointer, "save", full)
    for name, force in (("x", True), ("y", False)):
        with pytest.raises(OSError, match="no space left"):
            save_orbax(tmp_path / name, {"w": jnp.ones(3)}, force=force)
    assert [file.name for file in tmp_path.iterdir()] == ["x"]
    assert_same(restore_orbax(tmp_path / "x")[0], {"w": jnp.zeros(3)})


LIKE = {"a": {"w": jnp.ones((2, 3)), "v": jnp.ones(2, jnp.bfloat16)}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"v": None}, r"Only in the checkpoint: \['a/v'\]; only in `like`: \[\]"),
        ({"u": jnp.ones(2)}, r"only in `like`: \['a/u'\]"),
        ({"w": jnp.ones((3, 2))}, r"'a/w' has the shape \(2, 3\) .* and \(3, 2\) in `like`"),
        ({"w": 1.0}, r"'a/w' has the shape \(2, 3\) .* and None in `like`"),
        ({"v": jnp.ones(2)}, "'a/v' is of bfloat16 .* and of float32 in `like`"),
    ],
)
def test_another_structure(tmp_path, change, message):
    save_orbax(tmp_path / "x", LIKE)
    with pytest.raises(ValueError, match=message):
        restore_orbax(tmp_path / "x", like={"a": {**LIKE["a"], **change}})


def saved(directory):
    params, specs = trained()
    save_orbax(directory, peft.split_params(params)[1], specs=specs, config=CONFIG)
    return directory


@pytest.mark.parametrize("item", ["params", "structure", "specs", "config"])
def test_a_missing_item(tmp_path, item):
    shutil.rmtree(saved(tmp_path / "x") / item)
    with pytest.raises(ValueError, match=rf"/x'.*{item}"):
        restore_orbax(tmp_path / "x")


def test_what_save_orbax_did_not_write(tmp_path):
    with pytest.raises(ValueError, match="is no checkpoint of save_orbax"):
        restore_orbax(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="is no checkpoint of save_orbax"):
        restore_orbax(saved(tmp_path / "x") / "params")
    (tmp_path / "x" / "optimizer").mkdir()
    with pytest.raises(ValueError, match=r"holds \['optimizer'\], which save_orbax did not write"):
        restore_orbax(tmp_path / "x")
    with pytest.raises(ValueError, match="A checkpoint has a path, got 3"):
        restore_orbax(3)


def edited(path, edit):
    data = json.loads(path.read_text())
    path.write_text(json.dumps(edit(data)))


@pytest.mark.parametrize(
    ("item", "edit"),
    [
        ("structure", lambda data: {**data, "version": 2}),
        ("structure", lambda data: {**data, "format": "other"}),
        ("structure", lambda data: {**data, "more": 1}),
        ("structure", lambda data: {**data, "items": ["optimizer"]}),
        ("structure", lambda data: {**data, "tree": {"dict": {"a": {"array": {"shape": [-1]}}}}}),
        ("structure", lambda data: {**data, "tree": {"code": {}}}),
        ("structure", lambda data: []),
        ("specs", lambda data: {name: {**spec, "more": 1} for name, spec in data.items()}),
        ("specs", lambda data: dict(list(data.items())[1:])),
        ("specs", lambda data: [1]),
        ("config", lambda data: {**data, "r": -1}),
        ("config", lambda data: 3),
    ],
)
def test_damaged_json(tmp_path, item, edit):
    edited(saved(tmp_path / "x") / item / "metadata", edit)
    with pytest.raises(ValueError, match=rf"the item '{item}' of the checkpoint '.*/x' is damaged"):
        restore_orbax(tmp_path / "x")


def test_damaged_arrays(tmp_path):
    saved(tmp_path / "x")
    lost = {"dict": {"w": {"array": {"shape": [2], "dtype": "float32"}}}}
    edited(
        tmp_path / "x" / "structure" / "metadata",
        lambda data: {**data, "tree": lost, "items": ["config"]},
    )
    shutil.rmtree(tmp_path / "x" / "specs")
    with pytest.raises(ValueError, match=r"the item 'params' of the checkpoint .* is damaged"):
        restore_orbax(tmp_path / "x")
    saved(tmp_path / "y")
    for file in (tmp_path / "y" / "params").rglob("*"):
        if file.is_file() and file.parent.name == "d":
            file.write_bytes(file.read_bytes()[:10])
    with pytest.raises(ValueError, match=r"the item 'params' of the checkpoint .* is damaged"):
        restore_orbax(tmp_path / "y")

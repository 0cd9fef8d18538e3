"""GGUF files that `export_gguf` writes, opened by the reader of the package `gguf`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import peft_jax as peft

gguf = pytest.importorskip("gguf")


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        return x + nn.Dense(64)(nn.relu(nn.Dense(128)(nn.LayerNorm()(x)))), None


class Model(nn.Module):
    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(96, 64, name="tokens")(ids)
        x = nn.MultiHeadDotProductAttention(2, name="attention")(x)
        stack = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        x, _ = stack(name="blocks")(x, None)
        return nn.Dense(32, param_dtype=jnp.bfloat16, name="head")(x)


IDS = jnp.arange(10).reshape(2, 5)


def trained():
    """Parameters with numbers everywhere, biases too."""
    params = Model().init(jax.random.key(0), IDS)["params"]
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(0)
    drawn = [jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype) for leaf in leaves]
    return jax.tree.unflatten(tree, drawn)


def at(tree, path):
    for part in path.split("/"):
        tree = tree[part]
    return np.asarray(tree, np.float32)


def read(path):
    """Names, types and dequantized values of the tensors in a file."""
    return {
        tensor.name: (
            tensor.tensor_type.name,
            gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32),
        )
        for tensor in gguf.GGUFReader(path).tensors
    }


def as_outputs_and_inputs(weight, spec):
    """A weight as torch and llama.cpp have it: outputs are rows, inputs are columns."""
    depth = len(spec.stack_axes)
    inputs = sorted(axis % (weight.ndim - depth) + depth for axis in spec.axes)
    outputs = [axis for axis in range(depth, weight.ndim) if axis not in inputs]
    matrix = weight.transpose([*range(depth), *outputs, *inputs])
    rows = np.prod([weight.shape[axis] for axis in outputs], dtype=int)
    return matrix.reshape(*weight.shape[:depth], rows, -1)


def expected(weight, spec, method):
    if spec is None or spec.kind == "embed":
        transposed = method == "q4_0_transpose" and spec is not None
        return np.swapaxes(weight, -1, -2) if transposed else weight
    if method == "q4_0":  # blocks along the outputs: no axis moves
        return weight
    return as_outputs_and_inputs(weight, spec)


@pytest.mark.parametrize("method", ["q4_0", "q4_0_transpose", None])
def test_a_reader_finds_the_same_weights(tmp_path, method):
    params, specs = trained(), peft.layer_specs(Model(), IDS)
    # Attention's inner axes are too short for blocks of the heads.
    taken = [path for path in specs if method == "q4_0" or "attention" not in path]
    stored = params
    if method is not None:
        stored = peft.quantize_checkpoint(
            params, method=method, specs=specs, select=lambda path: path in taken
        )
    names = peft.export_gguf(stored, tmp_path / "model.gguf", specs)
    found, restored = read(tmp_path / "model.gguf"), peft.dequantize_checkpoint(stored)
    assert set(names.values()) == set(found)
    assert {path for path in names if found[names[path]][0] == "Q4_0"} == (
        set(taken) if method else set()
    )
    for path, name in names.items():
        spec = specs.get(path)
        used = method if path in taken else None
        np.testing.assert_array_equal(found[name][1], expected(at(restored, path), spec, used))
    assert found["head.bias"][0] == "BF16"
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


def test_the_bytes_are_those_of_gguf_itself(tmp_path):
    kernel = np.random.default_rng(1).normal(size=(128, 96)).astype(np.float32)
    stored = peft.quantize_checkpoint({"kernel": jnp.asarray(kernel)}, method="q4_0_transpose")
    specs = {"kernel": peft.LayerSpec("...i,io->...o", "dense")}
    peft.export_gguf(stored, tmp_path / "one.gguf", specs)
    (tensor,) = gguf.GGUFReader(tmp_path / "one.gguf").tensors
    theirs = gguf.quants.quantize(np.ascontiguousarray(kernel.T), tensor.tensor_type)
    np.testing.assert_array_equal(tensor.data.reshape(theirs.shape), theirs)


def test_names(tmp_path):
    params = {
        "a": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)},
        "count": jnp.ones((), "int32"),
    }
    by_table = peft.export_gguf(params, tmp_path / "x.gguf", names={"a/kernel": "blk.0.weight"})
    assert by_table == {"a/kernel": "blk.0.weight", "a/bias": "a.bias", "count": "count"}
    assert set(read_names(tmp_path / "x.gguf")) == set(by_table.values())
    by_function = peft.export_gguf(params, tmp_path / "x.gguf", names=lambda path: path[-5:])
    assert set(read_names(tmp_path / "x.gguf")) == set(by_function.values())


def read_names(path):
    return [tensor.name for tensor in gguf.GGUFReader(path).tensors]


@pytest.mark.parametrize(
    ("params", "arguments", "message"),
    [
        ({"kernel": "int4"}, {}, "'kernel' is stored as int4, which is no format of GGML's"),
        ({"a": {"lora": ("a", "b")}}, {}, "without adapters, but there are .*a/lora"),
        ({"a": "float"}, {"names": {"b": "c"}}, r"not there: \['b'\]. Close paths: \['a'\]"),
        ({"a": "float"}, {"names": lambda path: 64 * "x"}, "a string of 1 to 63 bytes"),
        ({"a": "float", "b": "float"}, {"names": lambda path: "x"}, "'b' and 'a' would both"),
        ({"a": "float"}, {"specs": {"b": peft.LayerSpec("...i,io->...o")}}, r"not hold: \['b'\]"),
        ({"a": "five axes"}, {}, "'a' has 5 axes, and GGUF knows 4"),
    ],
)
def test_bad_input_leaves_no_file(tmp_path, params, arguments, message):
    kernel = jnp.ones((64, 32))

    def made(value):
        if isinstance(value, dict):
            return {name: made(inner) for name, inner in value.items()}
        if isinstance(value, tuple):
            return {"a": jnp.ones((4, 2)), "b": jnp.ones((2, 4))}
        return jnp.ones((1, 1, 1, 1, 2)) if value == "five axes" else kernel

    tree = made(params)
    if params.get("kernel") == "int4":
        tree = peft.quantize_checkpoint({"kernel": kernel}, method="int4")
    with pytest.raises(ValueError, match=message):
        peft.export_gguf(tree, tmp_path / "x.gguf", **arguments)
    assert not list(tmp_path.iterdir())

"""Adapters that `export_gguf_adapter` writes: what llama.cpp checks and computes with them."""

import chex
import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import peft_jax as peft
from peft_jax.io.gguf.load_adapter import load_gguf_adapter
from peft_jax.io.gguf.save_adapter import export_gguf_adapter

gguf = pytest.importorskip("gguf")


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        x = nn.MultiHeadDotProductAttention(4, qkv_features=16, name="attention")(x)
        return x + nn.Dense(12, name="down")(nn.relu(nn.Dense(24, name="up")(x))), None


class Model(nn.Module):
    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(19, 12, name="table")(ids)
        x, _ = Block(name="first")(x)
        for name, axis in (("stack", 0), ("other", 1)):
            stack = nn.scan(
                Block, variable_axes={"params": axis}, split_rngs={"params": True}, length=3
            )
            x, _ = stack(name=name)(x, None)
        return nn.Dense(19, name="head")(x)


IDS = jnp.arange(10).reshape(2, 5)
TARGETS = ["table", "query", "key", "out", "up", "down", "head"]
INNER = {
    "attention/query/kernel": "attn_q",
    "attention/key/kernel": "attn_k",
    "attention/out/kernel": "attn_output",
    "up/kernel": "ffn_up",
    "down/kernel": "ffn_down",
}
NAMES = {
    "table/embedding": "token_embd.weight",
    "head/kernel": "output.weight",
    **{f"first/{path}": f"blk.0.{name}.weight" for path, name in INNER.items()},
    **{f"stack/{path}": f"one.{{}}.{name}.weight" for path, name in INNER.items()},
    **{f"other/{path}": f"two.{{}}.{name}.weight" for path, name in INNER.items()},
}
CONFIGS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {
        "rank_pattern": {"up": 5, "first.attention.query": 2},
        "alpha_pattern": {"key": 1, "table": 7.3},
    },
}


def adapted(config="plain", dtype=jnp.float32, seed=0):
    """Adapters with numbers everywhere, their specs, and kernels of zeros."""
    config = peft.LoraConfig(r=3, lora_alpha=8, target_modules=TARGETS, **CONFIGS[config])
    model = peft.get_peft_model(Model(), config)
    specs = peft.lora_specs(model, IDS)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), IDS))["params"]
    base, lora = peft.split_params(shapes)
    rng = np.random.default_rng(seed)
    lora = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), dtype), lora)
    return lora, specs, jax.tree.map(lambda leaf: np.zeros(leaf.shape), base)


def read(path):
    """The metadata of a file, and its tensors in numpy's order."""
    reader = gguf.GGUFReader(path)
    fields = {key: field.contents() for key, field in reader.fields.items()}
    types = {key: field.types for key, field in reader.fields.items()}
    tensors = {}
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        assert values.shape == tuple(tensor.shape[::-1])
        tensors[tensor.name] = values.astype(np.float64)
    return fields, types, tensors


def check_as_llama_does(path, base, architecture):
    """The checks of llama.cpp's ``llama_adapter_lora_init_impl`` (src/llama-adapter.cpp).

    There, lengths are in GGML's order, ``ne``: numpy's, reversed.

    Args:
      path: of the file.
      base: shapes of the base's tensors, in GGML's order.
      architecture: of the base.
    """
    fields, types, tensors = read(path)
    assert fields["general.type"] == "adapter"
    assert fields["general.architecture"] == architecture
    assert fields["adapter.type"] == "lora"
    assert types["adapter.lora.alpha"] == [gguf.GGUFValueType.FLOAT32]
    ends = (".lora_a", ".lora_b")
    assert all(name.endswith(ends) for name in tensors)
    for name in {name[: -len(ends[0])] for name in tensors}:
        a, b = (tensors[name + end].shape[::-1] for end in ends)
        assert name in base
        if name.endswith("token_embd.weight"):
            assert base[name][0] == b[1]
            assert base[name][1] == a[1]
        else:
            assert base[name][0] == a[0]
            assert base[name][1] == b[1]
            assert a[1] == b[0]
        assert base[name][2:] == a[2:] == b[2:]  # what ggml_mul_mat(_id) needs


def llama_delta(path, name):
    """What llama.cpp adds to a tensor of its (``build_lora_mm``, ``build_inp_embd``), in float64.

    ``get_scale``: alpha by the rank, that is ``b->ne[0]``, in float32. Rows are outputs; of the
    table, tokens.
    """
    fields, _, tensors = read(path)
    a, b = tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]
    scale = float(np.float32(fields["adapter.lora.alpha"]) / np.float32(b.shape[-1]))
    product = a @ b.T if name.endswith("token_embd.weight") else b @ a
    return scale * product


def exact_deltas(lora, specs):
    """The change of each kernel in float64, by the path of its adapter."""
    flat = flax.traverse_util.flatten_dict(lora, sep="/")
    deltas = {}
    for path, spec in specs.items():
        a, b = (np.asarray(flat[f"{path}/{x}"], np.float64) for x in "ab")
        axes = spec.stack_axes
        if axes:
            a, b = np.moveaxis(a, axes[0], 0), np.moveaxis(b, axes[0], 0)
        deltas[path] = spec.scaling * np.einsum(spec.equation, a, b)
    return deltas


def as_rows_of_outputs(delta, spec):
    """A layer's kernel as ``(out, in)``; heads are joined."""
    if spec.kind == "embed":
        return delta
    _, inputs, outputs = spec.matrix_axes
    rows = int(np.prod([delta.shape[i] for i in outputs]))
    return delta.transpose(*outputs, *inputs).reshape(rows, -1)


def base_shapes(base, specs, names=NAMES):
    """GGML's shapes of the base's tensors that are adapted."""
    flat = flax.traverse_util.flatten_dict(base, sep="/")
    shapes = {}
    for path, spec in specs.items():
        weight = f"{path.rpartition('/')[0]}/{spec.param}"
        kernel = flat[weight]
        layers = [kernel] if not spec.stack_axes else np.moveaxis(kernel, spec.stack_axes[0], 0)
        for i, layer in enumerate(layers):
            name = names[weight].replace("{}", str(i))
            shapes[name] = as_rows_of_outputs(layer, spec).shape[::-1]
    return shapes


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_what_llama_cpp_computes(tmp_path, config, dtype):
    lora, specs, base = adapted(config)
    path = tmp_path / "x.gguf"
    found = export_gguf_adapter(
        lora, path, specs=specs, names=NAMES, architecture="llama", dtype=dtype
    )
    check_as_llama_does(path, base_shapes(base, specs), "llama")
    tolerance = {"float32": 3e-7, "float16": 2e-3, "bfloat16": 2e-2}[dtype]
    deltas = exact_deltas(lora, specs)
    assert set(found) == set(specs)
    for adapter, names in found.items():
        spec = specs[adapter]
        layers = deltas[adapter] if spec.stack_axes else [deltas[adapter]]
        assert len(layers) == len(names)
        for layer, name in zip(layers, names, strict=True):
            expected = as_rows_of_outputs(layer, spec)
            error = np.abs(llama_delta(path, name) - expected).max()
            assert error <= tolerance * np.abs(expected).max(), name
    assert [file.name for file in tmp_path.iterdir()] == ["x.gguf"]


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("alpha", [None, 8, 0.1])
def test_back_again(tmp_path, config, alpha):
    lora, specs, _ = adapted(config)
    path = tmp_path / "x.gguf"
    arguments = {"specs": specs, "names": NAMES, "permute_heads": {"blk.*.attn_[qk].weight": 4}}
    export_gguf_adapter(lora, path, architecture="llama", alpha=alpha, **arguments)
    back, found = load_gguf_adapter(path, architecture="llama", **arguments)
    assert found == specs
    chex.assert_trees_all_close(back, lora, rtol=3e-7)
    for x in "ab" if (config, alpha) in (("plain", None), ("plain", 8), ("rslora", None)) else "a":
        chex.assert_trees_all_equal(*(only(tree, x) for tree in (back, lora)))


def only(tree, name):
    flat = flax.traverse_util.flatten_dict(tree, sep="/")
    return {path: leaf for path, leaf in flat.items() if path.endswith(f"/{name}")}


def test_the_alpha_of_the_file(tmp_path):
    lora, specs, _ = adapted("patterns")
    path = tmp_path / "x.gguf"
    arguments = {"specs": specs, "names": NAMES, "architecture": "llama"}
    export_gguf_adapter(lora, path, **arguments)
    assert read(path)[0]["adapter.lora.alpha"] == 8  # that of most
    export_gguf_adapter(lora, path, alpha=32, **arguments)
    assert read(path)[0]["adapter.lora.alpha"] == 32
    bfloat16, specs, _ = adapted(dtype=jnp.bfloat16)
    export_gguf_adapter(bfloat16, path, specs=specs, names=NAMES, architecture="llama")
    wide, _ = load_gguf_adapter(path, specs=specs, names=NAMES)
    chex.assert_trees_all_equal(wide, jax.tree.map(lambda x: x.astype(jnp.float32), bfloat16))


def converted(weight, heads):
    """How llama.cpp's ``LlamaModel.permute`` (convert_hf_to_gguf.py) reorders the rows of a weight.

    Row ``j`` of the first half of a head goes to place ``2 j``, that of the second to ``2 j + 1``.
    """
    rows = len(weight) // heads
    order = []
    for head in range(heads):
        for j in range(rows // 2):
            order += [head * rows + j, head * rows + rows // 2 + j]
    return weight[order]


def test_rows_are_reordered_as_those_of_the_base(tmp_path):
    lora, specs, _ = adapted()
    path = tmp_path / "x.gguf"
    heads = {"blk.*.attn_q.weight": 4, "blk.0.attn_k.weight": 2}
    export_gguf_adapter(
        lora, path, specs=specs, names=NAMES, architecture="llama", permute_heads=heads
    )
    deltas = exact_deltas(lora, specs)
    for name, count in (("query", 4), ("key", 2), ("out", None)):
        adapter = f"first/attention/{name}/lora"
        expected = as_rows_of_outputs(deltas[adapter], specs[adapter])
        expected = expected if count is None else converted(expected, count)
        tensor = NAMES[f"first/attention/{name}/kernel"]
        np.testing.assert_allclose(llama_delta(path, tensor), expected, rtol=1e-5, atol=1e-5)


class Experts(nn.Module):
    """Experts as one einsum, and as a lift of a layer."""

    @nn.compact
    def __call__(self, x):
        x = jnp.broadcast_to(x, (4, *x.shape))
        x = nn.Einsum((4, 6, 8), "e...i,eio->e...o", use_bias=False, name="einsum")(x)
        lifted = nn.vmap(
            nn.Dense, variable_axes={"params": 0}, split_rngs={"params": True}, axis_size=4
        )
        return lifted(6, use_bias=False, name="lifted")(x)


def test_experts(tmp_path):
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["einsum", "lifted"])
    model = peft.get_peft_model(Experts(), config)
    x = jnp.ones((3, 6))
    specs = peft.lora_specs(model, x)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), x))["params"]
    rng = np.random.default_rng(0)
    lora = jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32),
        peft.split_params(shapes).lora,
    )
    names = {
        "einsum/kernel": "blk.0.ffn_up_exps.weight",
        "lifted/kernel": "blk.0.ffn_down_exps.weight",
    }
    path = tmp_path / "x.gguf"
    export_gguf_adapter(lora, path, specs=specs, names=names, architecture="llama")
    base = {"blk.0.ffn_up_exps.weight": (6, 8, 4), "blk.0.ffn_down_exps.weight": (8, 6, 4)}
    check_as_llama_does(path, base, "llama")
    deltas = exact_deltas(lora, specs)
    for adapter, name in (("einsum/lora", "ffn_up_exps"), ("lifted/lora", "ffn_down_exps")):
        found = llama_delta(path, f"blk.0.{name}.weight").swapaxes(-1, -2)
        np.testing.assert_allclose(found, deltas[adapter], rtol=1e-5, atol=1e-5)
    back, _ = load_gguf_adapter(path, specs=specs, names=names)
    chex.assert_trees_all_equal(back, lora)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0"])
def test_files_of_another_writer(tmp_path, kind):
    """As convert_lora_to_gguf.py writes them: alpha, types, and blocks where they fit."""
    rng = np.random.default_rng(0)
    a, b = (rng.normal(size=shape).astype(np.float32) for shape in ((32, 64), (96, 32)))
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, 16.0)
    writer.add_file_type(0)
    writer.add_quantization_version(2)
    stored = gguf.GGMLQuantizationType[kind]
    for name, array in (("lora_a", a), ("lora_b", b)):
        data = gguf.quants.quantize(array, stored)
        writer.add_tensor(f"blk.0.attn_q.weight.{name}", data, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    spec = peft.LoraSpec("kernel", "ir,ro->io", 32, 0.5, 16.0)
    lora, _ = load_gguf_adapter(
        tmp_path / "x.gguf",
        specs={"q/lora": spec},
        names={"q/kernel": "blk.0.attn_q.weight"},
        dtype=jnp.float32,
    )
    _, _, tensors = read(tmp_path / "x.gguf")
    np.testing.assert_array_equal(lora["q"]["lora"]["a"].T, tensors["blk.0.attn_q.weight.lora_a"])
    np.testing.assert_array_equal(lora["q"]["lora"]["b"].T, tensors["blk.0.attn_q.weight.lora_b"])

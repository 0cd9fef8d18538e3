"""`fuse`, `extract`, `merge`, `convert` and `diff`, against the library and against numpy."""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from cli_files import (
    factors,
    fail,
    flax_checkpoint,
    llama_adapter,
    numbers,
    run,
    succeed,
    torch_checkpoint,
    write_adapter,
    write_sharded,
)
from flax.traverse_util import flatten_dict
from helpers import key_of, partly_slow, randomised, rounding
from safetensors.numpy import load_file, save_file

import peft_jax as peft
from peft_jax.adapters import COMBINATIONS, add_weighted_adapter
from peft_jax.io import save_adapter, save_orbax
from peft_jax.io.any_adapter import load
from peft_jax.io.checkpoints import read as reading
from peft_jax.io.checkpoints.open import open_checkpoint


def names_of(tree, separator):
    return {separator.join(p): np.asarray(x) for p, x in flatten_dict(tree).items()}


def read(path):
    with open_checkpoint(path) as checkpoint:
        return {name: checkpoint.read(name) for name in checkpoint.names}


SUMS = rounding(8)


def assert_near(found, expected, tolerance=SUMS):
    assert set(found) == set(expected)
    for name, array in expected.items():
        assert found[name].dtype == array.dtype, name
        difference = np.abs(found[name].astype(np.float64) - array.astype(np.float64))
        assert np.max(difference, initial=0) <= tolerance * np.max(np.abs(array)), name


# --- fuse ----------------------------------------------------------------------------------------


class Model(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(20, 16, name="embed")(tokens)
        x = nn.DenseGeneral((2, 8), name="query")(x)
        x = nn.DenseGeneral(16, axis=(-2, -1), name="out")(x)
        x = nn.Conv(16, (3,), name="conv")(x)
        return nn.Dense(5, name="head")(x)


SLOW = pytest.mark.slow
TOKENS = jnp.zeros((1, 6), jnp.int32)
TOLERANCE = {np.dtype(np.float32): 1e-6, np.dtype(np.float64): 1e-14}
TOLERANCE |= {np.dtype(np.float16): 1e-3, np.dtype(ml_dtypes.bfloat16): 8e-3}  # the last bit
LAYERS = ["embed", "query", "out", "conv"]
VARIANTS = {
    "patterns": {"rank_pattern": {"query": 3}, "alpha_pattern": {"out": 5}, "use_rslora": True},
    "dora": {"use_dora": True, "target_modules": ["embed", "query", "out"]},
    "bias": {"lora_bias": True, "target_modules": ["query", "out", "head"]},
    "saved": {"modules_to_save": ["head"], "bias": "all", "target_modules": ["query"]},
    "rows": {"trainable_token_indices": [3, 7], "target_modules": ["query", "embed"]},
}


@pytest.fixture(scope="module")
def base():
    return jax.jit(Model().init)(key_of(0), TOKENS)["params"]


def adapted(base, **fields):
    """A config, specs, adapters of scattered numbers, and the fused tree."""
    config = peft.LoraConfig(**({"r": 2, "lora_alpha": 6, "target_modules": LAYERS} | fields))
    model = peft.get_peft_model(Model(), config)
    specs = peft.lora_specs(model, TOKENS)
    _, lora = peft.init_lora_weights(base, specs, key_of(1), config=config)
    lora = randomised(lora)
    fused = peft.fuse_params(peft.merge_params(base, lora), specs=specs)
    if config.modules_to_save:
        trained = randomised({"head": base["head"], "query": {"bias": base["query"]["bias"]}}, 5)
        lora = lora | {"head": trained["head"]}
        lora["query"] = lora["query"] | trained["query"]
        fused = fused | {"head": trained["head"]}
        fused["query"] = fused["query"] | trained["query"]
    return config, specs, lora, fused


@pytest.mark.parametrize("variant", partly_slow(list(VARIANTS), ("patterns", "dora")))
def test_fuse_is_fuse_params(variant, base, tmp_path, capsys, monkeypatch):
    """With an adapter in Hugging Face's layout, with our specs in it and without, and in orbax."""
    monkeypatch.setattr(reading, "CHUNK_BYTES", 400)  # slices of six rows
    config, specs, lora, fused = adapted(base, **VARIANTS[variant])
    save_adapter(tmp_path / "ours", lora, config=config, specs=specs)
    save_orbax(tmp_path / "orbax", lora, specs=specs, config=config)
    (tmp_path / "theirs").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / "theirs" / name).write_bytes((tmp_path / "ours" / name).read_bytes())
    file = tmp_path / "theirs" / "adapter_model.safetensors"
    save_file(load_file(file), file)  # without metadata
    for separator, adapter in (("/", "ours"), (".", "theirs"), ("/", "orbax")):
        save_file(names_of(base, separator), tmp_path / "base.safetensors")
        output = tmp_path / "fused.safetensors"
        succeed(
            capsys, "fuse", tmp_path / "base.safetensors", tmp_path / adapter, output, "--force"
        )
        assert_near(load_file(output), names_of(fused, separator))


def test_fuse_with_renames(base, tmp_path, capsys):
    """The file has torch's names, and leads back to ours."""
    config, specs, lora, fused = adapted(base, target_modules=["query", "out"])
    renames = {"query": "model.self_attn.q_proj", "out": "model.self_attn.o_proj"}
    save_adapter(tmp_path / "adapter", lora, config=config, specs=specs, renames=renames)
    save_file(names_of(base, "/"), tmp_path / "base.safetensors")
    output = tmp_path / "fused.safetensors"
    succeed(capsys, "fuse", tmp_path / "base.safetensors", tmp_path / "adapter", output)
    assert_near(load_file(output), names_of(fused, "/"))


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, ml_dtypes.bfloat16])
def test_fuse_in_torch_layout(dtype, tmp_path, capsys):
    """``W + alpha / r * B·A``, in float64 by numpy, rounded once; in shards."""
    tensors = {name: array.astype(dtype) for name, array in torch_checkpoint().items()}
    write_sharded(tmp_path / "base", tensors)
    arrays = llama_adapter()
    write_adapter(
        tmp_path / "adapter", arrays, r=4, lora_alpha=6, target_modules=["q_proj", "up_proj"]
    )
    succeed(capsys, "fuse", tmp_path / "base", tmp_path / "adapter", tmp_path / "fused")
    expected = dict(tensors)
    for name in (key.removesuffix(".lora_A.weight") for key in arrays if "lora_A" in key):
        a, b = (arrays[f"{name}.lora_{x}.weight"].astype(np.float64) for x in "AB")
        weight = tensors[f"{name}.weight"].astype(np.float64) + 1.5 * b @ a
        expected[f"{name}.weight"] = weight.astype(dtype)
    assert_near(read(tmp_path / "fused"), expected, TOLERANCE[np.dtype(dtype)])
    assert (tmp_path / "fused" / "config.json").exists()


def test_fuse_of_everything_torch_has(tmp_path, capsys):
    """DoRA, biases, embeddings, convolutions, transposed layers, parameters trained whole, rows."""
    tensors = {
        "fc.weight": numbers(12, 8),
        "fc.bias": numbers(12),
        "conv.weight": numbers(6, 8, 3, 5),
        "gpt.weight": numbers(8, 8, seed=1),
        "head.weight": numbers(4, 8),
        "table.weight": numbers(20, 8),
    }
    save_file(tensors, tmp_path / "base.safetensors")

    def fused(arrays, **config):
        names = sorted({name.partition(".")[0] for name in arrays})
        fields = {"r": 2, "lora_alpha": 3, "target_modules": names} | config
        write_adapter(tmp_path / "adapter", arrays, **fields)
        output = tmp_path / "fused.safetensors"
        succeed(
            capsys, "fuse", tmp_path / "base.safetensors", tmp_path / "adapter", output, "--force"
        )
        found = load_file(output)
        changed = {name for name in tensors if not np.array_equal(found[name], tensors[name])}
        return found, changed

    linear = factors("fc", 8, 12, 2)
    a, b = linear["fc.lora_A.weight"], linear["fc.lora_B.weight"]
    direction = tensors["fc.weight"] + 1.5 * b @ a
    magnitude = np.abs(numbers(12, seed=3))
    found, changed = fused(
        linear | {"fc.lora_magnitude_vector": magnitude}, use_dora=True, lora_bias=False
    )
    norms = np.linalg.norm(direction, axis=1, keepdims=True)
    assert changed == {"fc.weight"}
    assert np.allclose(found["fc.weight"], magnitude[:, None] * direction / norms, atol=1e-5)

    found, changed = fused(linear | {"fc.lora_B.bias": numbers(12, seed=4)}, lora_bias=True)
    assert changed == {"fc.weight", "fc.bias"}
    expected = tensors["fc.bias"] + 1.5 * numbers(12, seed=4)
    assert np.allclose(found["fc.bias"], expected, atol=1e-6)

    window = {"conv.lora_A.weight": numbers(2, 8, 3, 5), "conv.lora_B.weight": numbers(6, 2, 1, 1)}
    found, changed = fused(window)
    change = np.einsum("rihw,orab->oihw", *window.values())
    assert changed == {"conv.weight"}
    assert np.allclose(found["conv.weight"], tensors["conv.weight"] + 1.5 * change, atol=1e-5)

    square = factors("gpt", 8, 8, 2)
    found, _ = fused(square, fan_in_fan_out=True, use_rslora=True)
    change = 3 / np.sqrt(2) * (square["gpt.lora_B.weight"] @ square["gpt.lora_A.weight"]).T
    assert np.allclose(found["gpt.weight"], tensors["gpt.weight"] + change, atol=1e-5)

    pair = {"table.lora_embedding_A": numbers(2, 20), "table.lora_embedding_B": numbers(8, 2)}
    whole = {"head.weight": numbers(4, 8, seed=9)}
    found, changed = fused(pair | whole, modules_to_save=["head"], target_modules=["table"])
    change = 1.5 * (pair["table.lora_embedding_B"] @ pair["table.lora_embedding_A"]).T
    assert changed == {"table.weight", "head.weight"}
    assert np.allclose(found["table.weight"], tensors["table.weight"] + change, atol=1e-5)
    assert np.array_equal(found["head.weight"], numbers(4, 8, seed=9))

    rows = {"table.token_adapter.trainable_tokens_delta": numbers(2, 8, seed=7)}
    found, changed = fused(
        rows, trainable_token_indices={"table": [5, 2]}, target_modules=["table"]
    )
    assert changed == {"table.weight"}
    assert np.array_equal(found["table.weight"][[5, 2]], numbers(2, 8, seed=7))


def test_fuse_refuses_what_does_not_fit(tmp_path, capsys):
    save_file(torch_checkpoint(), tmp_path / "base.safetensors")
    output = tmp_path / "fused.safetensors"
    wrong = {
        "name": factors("model.layers.7.self_attn.q_proj", 64, 64, 2),
        "width": factors("model.layers.0.self_attn.q_proj", 32, 64, 2),
        "norm": factors("model.norm", 64, 64, 2),
    }
    for label, arrays in wrong.items():
        adapter = write_adapter(tmp_path / label, arrays, r=2, target_modules=".*")
        error = fail(capsys, "fuse", tmp_path / "base.safetensors", adapter, output)
        assert "model." in error
    succeed(
        capsys, "quantize", tmp_path / "base.safetensors", tmp_path / "small.safetensors",
        "--method", "int8",
    )  # fmt: skip
    adapter = write_adapter(tmp_path / "good", llama_adapter(), r=4, target_modules=".*")
    error = fail(capsys, "fuse", tmp_path / "small.safetensors", adapter, output)
    assert "dequantize_checkpoint" in error
    assert not output.exists()


# --- extract -------------------------------------------------------------------------------------


def tuned(tensors, size=0.1):
    return {
        name: (x + size * numbers(*x.shape, seed=99)).astype(x.dtype) if x.ndim == 2 else x
        for name, x in tensors.items()
    }


@pytest.mark.parametrize("svd", ["exact", "randomized"])
@pytest.mark.parametrize("checkpoint", [torch_checkpoint, flax_checkpoint])
def test_extract_then_fuse_at_full_rank(checkpoint, svd, tmp_path, capsys):
    base, output = checkpoint(), tmp_path / "fused.safetensors"
    save_file(base, tmp_path / "base.safetensors")
    save_file(tuned(base), tmp_path / "tuned.safetensors")
    out = succeed(
        capsys, "extract", tmp_path / "base.safetensors", tmp_path / "tuned.safetensors",
        tmp_path / "adapter", "--rank", 1000, "--svd", svd,
    )  # fmt: skip
    assert out.count("100.00%") == sum(array.ndim == 2 for array in base.values())
    succeed(capsys, "fuse", tmp_path / "base.safetensors", tmp_path / "adapter", output)
    assert_near(load_file(output), tuned(base))
    loaded = load(tmp_path / "adapter")  # and the library reads it
    assert len(loaded.specs) == out.count("100.00%")
    assert all(spec.scaling == 1 for spec in loaded.specs.values())


@pytest.mark.parametrize("svd", ["exact", "randomized"])
def test_extract_is_the_best_of_its_rank(svd, tmp_path, capsys):
    """Eckart and Young: what is left has the singular values beyond the rank."""
    base = {"q.weight": numbers(60, 40), "v.weight": numbers(30, 40), "q.bias": numbers(60)}
    decay = np.exp(-np.arange(40))
    change = np.linalg.qr(numbers(60, 40, seed=1))[0] * decay @ np.linalg.qr(numbers(40, 40))[0]
    new = base | {"q.weight": (base["q.weight"] + change).astype(np.float32)}
    new["q.bias"] = base["q.bias"] + 1
    for name, tensors in (("base", base), ("tuned", new)):
        save_file(tensors, tmp_path / f"{name}.safetensors")
    status, out, err = run(
        capsys, "extract", tmp_path / "base.safetensors", tmp_path / "tuned.safetensors",
        tmp_path / "adapter", "--rank", 3, "--svd", svd,
    )  # fmt: skip
    assert status == 0
    assert "q.bias" in err
    arrays = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert set(arrays) == {f"base_model.model.q.lora_{x}.weight" for x in "AB"}
    a, b = (arrays[f"base_model.model.q.lora_{x}.weight"].astype(np.float64) for x in "AB")
    left = np.linalg.norm(new["q.weight"] - base["q.weight"] - b @ a)
    assert left == pytest.approx(np.linalg.norm(decay[3:]), rel=1e-3)
    kept = np.linalg.norm(decay[:3]) / np.linalg.norm(decay)
    assert f"{100 * kept:.2f}%" in out


def test_extract_of_some_modules(tmp_path, capsys):
    base = torch_checkpoint()
    save_file(base, tmp_path / "base.safetensors")
    save_file(tuned(base), tmp_path / "tuned.safetensors")

    def extracted(*arguments):
        succeed(
            capsys, "extract", tmp_path / "base.safetensors", tmp_path / "tuned.safetensors",
            tmp_path / "adapter", "--rank", 2, "--force", *arguments,
        )  # fmt: skip
        config = peft.LoraConfig.from_pretrained(tmp_path / "adapter")
        names = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
        return config, {n.removeprefix("base_model.model.").partition(".lora_")[0] for n in names}

    config, modules = extracted("--target-modules", "q_proj", "up_proj")
    assert set(config.target_modules) == {"q_proj", "up_proj"}
    assert modules == {
        f"model.layers.{layer}.{name}"
        for layer in (0, 1)
        for name in ("self_attn.q_proj", "mlp.up_proj")
    }
    config, modules = extracted("--target-modules", r".*\.1\..*v_proj")
    assert set(config.target_modules) == modules == {"model.layers.1.self_attn.v_proj"}
    error = fail(
        capsys, "extract", tmp_path / "base.safetensors", tmp_path / "tuned.safetensors",
        tmp_path / "adapter", "--rank", 2, "--force", "--target-modules", "q_proj", "k_proj",
    )  # fmt: skip
    assert "k_proj" in error


def test_extract_refuses(tmp_path, capsys):
    """Equal checkpoints, other tensors, other shapes, NaN."""
    base = torch_checkpoint()
    name = "model.layers.0.self_attn.q_proj.weight"
    others = {
        "equal": base,
        "fewer": {n: x for n, x in base.items() if n != name},
        "wider": base | {name: numbers(64, 65)},
        "nan": base | {name: base[name] * np.nan},
    }
    save_file(base, tmp_path / "base.safetensors")
    for label, tensors in others.items():
        save_file(tensors, tmp_path / f"{label}.safetensors")
        fail(
            capsys, "extract", tmp_path / "base.safetensors", tmp_path / f"{label}.safetensors",
            tmp_path / "adapter", "--rank", 2,
        )  # fmt: skip
    assert not (tmp_path / "adapter").exists()


# --- merge ---------------------------------------------------------------------------------------


@pytest.fixture
def pair(tmp_path):
    """Two adapters of one model, in the layout of Hugging Face."""
    fields = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "up_proj"]}
    first = write_adapter(tmp_path / "first", llama_adapter(), **fields)
    arrays = {name: numbers(*x.shape, seed=50) for name, x in llama_adapter().items()}
    second = write_adapter(tmp_path / "second", arrays, **fields | {"lora_alpha": 2})
    return first, second


@pytest.mark.parametrize(
    "kind",
    [
        kind if kind in ("svd", "cat", "ties", "dare_linear") else pytest.param(kind, marks=SLOW)
        for kind in COMBINATIONS
    ],
)
def test_merge_is_add_weighted_adapter(kind, pair, tmp_path, capsys):
    settings = [] if kind in ("svd", "cat", "linear") else ["--density", 0.5]
    succeed(
        capsys, "merge", *pair, "--weights", 0.7, -0.3, "--type", kind,
        "--output", tmp_path / "merged", "--seed", 3, *settings,
    )  # fmt: skip
    found, parts = load(tmp_path / "merged"), [load(path) for path in pair]
    lora, specs = add_weighted_adapter(
        [part.lora for part in parts],
        [0.7, -0.3],
        specs=[part.specs for part in parts],
        combination_type=kind,
        density=0.5 if settings else None,
        key=jax.random.key(3),
    )
    assert jax.tree.all(jax.tree.map(np.array_equal, found.lora, lora))
    assert found.specs == specs


def test_merge_of_svd_is_the_sum_where_the_rank_suffices(pair, tmp_path, capsys):
    succeed(
        capsys, "merge", *pair, "--weights", 0.7, 0.3, "--rank", 8, "--output", tmp_path / "merged"
    )
    found = load_file(tmp_path / "merged" / "adapter_model.safetensors")
    parts = [load_file(path / "adapter_model.safetensors") for path in pair]
    for name in (key.removesuffix(".lora_A.weight") for key in found if "lora_A" in key):
        merged = found[f"{name}.lora_B.weight"] @ found[f"{name}.lora_A.weight"]
        products = [part[f"{name}.lora_B.weight"] @ part[f"{name}.lora_A.weight"] for part in parts]
        expected = 0.7 * 1.5 * products[0] + 0.3 * 0.5 * products[1]
        assert np.allclose(merged, expected, atol=1e-4)


def test_merge_refuses(pair, tmp_path, capsys):
    for arguments in (
        ["--weights", 1],
        ["--weights", 1, 1, "--type", "soup"],
        ["--weights", 1, "nan"],
        ["--weights", 1, 1, "--type", "ties", "--density", 2],
    ):
        fail(capsys, "merge", *pair, "--output", tmp_path / "merged", *arguments)
    assert not (tmp_path / "merged").exists()


# --- convert -------------------------------------------------------------------------------------


def test_convert_there_and_back(pair, tmp_path, capsys):
    there, back = tmp_path / "orbax", tmp_path / "back"
    succeed(capsys, "convert", pair[0], there, "--to", "orbax")
    succeed(capsys, "convert", there, back, "--to", "huggingface")
    assert run(capsys, "diff", pair[0], there)[0] == 0
    before, after = (load_file(path / "adapter_model.safetensors") for path in (pair[0], back))
    assert_near(after, before, 0)
    configs = [peft.LoraConfig.from_pretrained(path) for path in (pair[0], back)]
    assert configs[0].r == configs[1].r
    assert configs[0].lora_alpha == configs[1].lora_alpha


def test_convert_with_renames(base, tmp_path, capsys):
    config, specs, lora, _ = adapted(base, target_modules=["query", "out"])
    save_orbax(tmp_path / "orbax", lora, specs=specs, config=config)
    renames = tmp_path / "renames.json"
    renames.write_text(json.dumps({"query": "attn.q_proj", "out": "attn.o_proj"}))
    command = ["convert", tmp_path / "orbax", tmp_path / "hf", "--to", "huggingface"]
    succeed(capsys, *command, "--renames", renames)
    names = load_file(tmp_path / "hf" / "adapter_model.safetensors")
    assert "base_model.model.attn.q_proj.lora_A.weight" in names
    found = load(tmp_path / "hf")  # the table travels with the file
    assert jax.tree.all(jax.tree.map(np.array_equal, found.lora, lora))
    for text in ("{", "[]", '{"query": 3}', '{"nobody": "x"}'):
        renames.write_text(text)
        fail(capsys, *command, "--force", "--renames", renames)
    assert "base_model.model.attn.q_proj.lora_A.weight" in names


# --- diff ----------------------------------------------------------------------------------------


def test_diff_of_checkpoints(tmp_path, capsys):
    """Of one in torch's shards and one in orbax's tree; numbers by numpy in float64."""
    base = torch_checkpoint()
    name = "model.layers.0.mlp.up_proj.weight"
    other = base | {name: base[name] + np.float32(0.5) * numbers(192, 64, seed=77)}
    other["model.norm.weight"] = base["model.norm.weight"].astype(np.float64)
    other["extra"] = other.pop("lm_head.weight")
    write_sharded(tmp_path / "a", base)
    save_file(other, tmp_path / "b.safetensors")
    assert run(capsys, "diff", tmp_path / "a", tmp_path / "a")[0] == 0
    status, out, _ = run(capsys, "diff", tmp_path / "a", tmp_path / "b.safetensors", "--json")
    report = json.loads(out)
    assert status == 1
    assert (report["only_in_a"], report["only_in_b"]) == (["lm_head.weight"], ["extra"])
    (row,) = [row for row in report["rows"] if row["name"] == name]
    x, y = base[name].astype(np.float64), other[name].astype(np.float64)
    norms = np.linalg.norm(x), np.linalg.norm(y)
    assert row["norm_a"] == pytest.approx(norms[0])
    assert row["relative_difference"] == pytest.approx(np.linalg.norm(x - y) / max(norms))
    assert row["cosine"] == pytest.approx(np.sum(x * y) / np.prod(norms))
    different = {row["name"] for row in report["rows"] if not row["equal"]}
    assert different == {name, "model.norm.weight"}
    status, out, _ = run(capsys, "diff", tmp_path / "a", tmp_path / "b.safetensors")
    assert status == 1
    assert name in out


def test_diff_of_adapters(pair, tmp_path, capsys):
    """By what they add, whatever the factors are."""
    arrays = llama_adapter()
    turn = np.linalg.qr(numbers(4, 4, dtype=np.float64))[0].astype(np.float32)
    other = {
        name: 2 * turn @ x if "lora_A" in name else x @ turn.T * np.float32(0.75)
        for name, x in arrays.items()
    }
    same = write_adapter(
        tmp_path / "same", other, r=4, lora_alpha=4, target_modules=["q_proj", "up_proj"]
    )
    assert run(capsys, "diff", pair[0], same)[0] == 1  # in their last bits
    assert run(capsys, "diff", pair[0], same, "--tolerance", 1e-5)[0] == 0
    status, out, _ = run(capsys, "diff", *pair, "--json")
    assert status == 1
    for row in json.loads(out)["rows"]:
        deltas = []
        for path, scaling in zip(pair, (1.5, 0.5), strict=True):
            found = load_file(path / "adapter_model.safetensors")
            a, b = (
                found[f"base_model.model.{row['name']}.lora_{x}.weight"].astype(np.float64)
                for x in "AB"
            )
            deltas.append(scaling * b @ a)
        norms = [np.linalg.norm(delta) for delta in deltas]
        assert row["norm_a"] == pytest.approx(norms[0], rel=1e-12)
        assert row["norm_b"] == pytest.approx(norms[1], rel=1e-12)
        relative = np.linalg.norm(deltas[0] - deltas[1]) / max(norms)
        assert row["relative_difference"] == pytest.approx(relative, rel=1e-9)
        assert row["cosine"] == pytest.approx(np.sum(deltas[0] * deltas[1]) / np.prod(norms))


def test_diff_is_at_a_loss(pair, tmp_path, capsys):
    save_file(torch_checkpoint(), tmp_path / "base.safetensors")
    fail(capsys, "diff", pair[0], tmp_path / "base.safetensors")
    fail(capsys, "diff", pair[0], tmp_path / "none")
    fail(capsys, "diff", *pair, "--tolerance", "nan")


def test_diff_of_numbers_that_are_not_finite(tmp_path, capsys):
    x = np.array([[1.0, np.nan, np.inf]], np.float32)
    save_file({"x": x}, tmp_path / "a.safetensors")
    save_file({"x": np.nan_to_num(x)}, tmp_path / "b.safetensors")
    assert run(capsys, "diff", tmp_path / "a.safetensors", tmp_path / "a.safetensors")[0] == 0
    status, out, _ = run(
        capsys, "diff", tmp_path / "a.safetensors", tmp_path / "b.safetensors", "--json"
    )
    assert status == 1
    assert json.loads(out, parse_constant=pytest.fail)["rows"][0]["norm_a"] is None

"""`peft-jax quantize`: what the library makes of the whole tree, in slices and little memory."""

import dataclasses
import json
import shutil
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from cli_files import (
    fail,
    flax_checkpoint,
    listing,
    numbers,
    succeed,
    torch_checkpoint,
    write_sharded,
)
from flax import serialization
from flax.traverse_util import flatten_dict, unflatten_dict
from helpers import key_of, partly_slow
from safetensors.numpy import load_file, save_file

import peft_jax as peft
from peft_jax.io.checkpoints import quantize as encoding
from peft_jax.io.checkpoints.open import open_checkpoint
from peft_jax.io.files.safetensors import TensorStream, write_safetensors

METHODS = ("q4_0", "q4_0_transpose", "int4", "int8", "nf4", "sfp8")


def tree_of(tensors, separator="/"):
    paths = {tuple(name.split(separator)): jnp.asarray(array) for name, array in tensors.items()}
    return unflatten_dict(paths)


def flat(tree, separator="/"):
    leaves = flatten_dict(serialization.to_state_dict(tree))
    return {separator.join(path): np.asarray(leaf) for path, leaf in leaves.items()}


def assert_same(found, expected):
    assert set(found) == set(expected)
    for name, array in expected.items():
        assert found[name].dtype == array.dtype, name
        assert found[name].shape == array.shape, name
        assert np.array_equal(found[name], array), name


def checked_against_the_library(tensors, method, tmp_path, capsys):
    save_file(tensors, tmp_path / "in.safetensors")
    output = tmp_path / "out.safetensors"
    succeed(capsys, "quantize", tmp_path / "in.safetensors", output, "--method", method)
    expected = flat(peft.quantize_checkpoint(tree_of(tensors), method=method))
    assert_same(load_file(output), expected)


@pytest.mark.parametrize("method", partly_slow(list(METHODS), list(METHODS)[::2]))
def test_leaf_for_leaf_as_quantize_checkpoint(method, tmp_path, capsys):
    tensors = {
        "a/kernel": numbers(192, 64),
        "a/bias": numbers(64),
        "half/kernel": numbers(192, 64, dtype=ml_dtypes.bfloat16),
        "half/scale": numbers(64),  # the name that a scale would have
        "embed/embedding": numbers(64, 64),
        "norm/scale": numbers(64),
    }
    if method in ("int4", "q4_0"):
        tensors |= {"odd/kernel": numbers(65, 64), "row/kernel": numbers(1, 32)}
    if method == "q4_0":
        tensors["stack/kernel"] = numbers(3, 33, 64)
    checked_against_the_library(tensors, method, tmp_path, capsys)


@pytest.mark.parametrize("method", METHODS)
def test_slices_of_rows_change_nothing(method, tmp_path, capsys, monkeypatch):
    """Blocks lie across the middle, where bytes are divided, and across the ends of slices."""
    monkeypatch.setattr(encoding, "_CHUNK", 64 * 40)
    checked_against_the_library({"a/kernel": numbers(192, 64)}, method, tmp_path, capsys)


@pytest.mark.parametrize(
    "method",
    ["q4_0_transpose", *(pytest.param(m, marks=pytest.mark.slow) for m in ("q4_0", "int4", "nf4"))],
)
def test_torch_layout_has_blocks_along_the_inputs(method, tmp_path, capsys, monkeypatch):
    """Equal to what the transposed kernel becomes by the method with blocks along the inputs."""
    monkeypatch.setattr(encoding, "_CHUNK", 60 * 192)
    tensors = {"fc.weight": numbers(96, 192)}
    save_file(tensors, tmp_path / "in.safetensors")
    output = tmp_path / "out.safetensors"
    succeed(capsys, "quantize", tmp_path / "in.safetensors", output, "--method", method)
    found = tree_of(load_file(output), ".")
    along_inputs = "q4_0_transpose" if method == "q4_0" else method
    for name, weight in tensors.items():
        layer = found[name.split(".")[0]]
        values, scale = peft.quantize(jnp.asarray(weight.T), along_inputs)
        assert np.array_equal(layer["scale"], scale.T)
        stored = peft.dequantize(layer["weight"], layer["scale"])
        assert np.array_equal(stored, peft.dequantize(values, scale).T)
    names = {next(iter(layer["weight"])).partition("_axis")[0] for layer in found.values()}
    assert names == {"q4_0" if method == "q4_0_transpose" else method}
    restored = peft.dequantize_checkpoint(found)
    assert restored["fc"]["weight"].shape == (96, 192)


@dataclasses.dataclass(frozen=True)
class Store:
    method: str

    def __call__(self, module):
        if isinstance(module, nn.Dense):
            return peft.Int4Dense(wrapped=module, method=self.method)
        return module


class Classifier(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(32, name="head")(nn.relu(nn.Dense(64, name="hidden")(x)))


@pytest.mark.parametrize("format", ["safetensors", "orbax"])
def test_the_output_runs_in_stored_layers(format, tmp_path, capsys):
    x = jnp.asarray(numbers(3, 64))
    params = Classifier().init(key_of(0), x)["params"]
    save_file(flat(params), tmp_path / "in.safetensors")
    output = tmp_path / "out"
    succeed(
        capsys, "quantize", tmp_path / "in.safetensors", output, "--method", "int4",
        "--format", format,
    )  # fmt: skip
    with open_checkpoint(output) as checkpoint:
        stored = tree_of({name: checkpoint.read(name) for name in checkpoint.names})
    with peft.ModuleInterceptor(Store("int4")):
        answers = Classifier().apply({"params": stored}, x)
        expected = Classifier().apply(
            {"params": peft.quantize_checkpoint(params, method="int4")}, x
        )
    assert np.array_equal(answers, expected)


def test_what_is_taken_by_default_of_torch(tmp_path, capsys):
    write_sharded(tmp_path / "in", torch_checkpoint())
    succeed(capsys, "quantize", tmp_path / "in", tmp_path / "out", "--method", "int8")
    with open_checkpoint(tmp_path / "out") as out:
        stored = {name.rpartition(".")[0] for name in out.names if name.endswith(".int8")}
        matrices = {name for name, array in torch_checkpoint().items() if array.ndim == 2}
        assert stored == matrices - {"model.embed_tokens.weight"}
        kept = {name: out.read(name) for name in out.names if name in torch_checkpoint()}
        assert set(kept) == set(torch_checkpoint()) - stored
        assert all(np.array_equal(array, torch_checkpoint()[name]) for name, array in kept.items())
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    before = json.loads((tmp_path / "in" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(before["weight_map"].values())
    for name, file in index["weight_map"].items():
        assert name in load_file(tmp_path / "out" / file)
    assert (tmp_path / "out" / "config.json").read_text() == '{"model_type": "made-up"}'


def test_include_exclude_and_layout(tmp_path, capsys):
    save_file(flax_checkpoint(), tmp_path / "in.safetensors")
    output = tmp_path / "out.safetensors"

    def taken(*arguments):
        succeed(
            capsys, "quantize", tmp_path / "in.safetensors", output, "--method", "int8", "--force",
            *arguments,
        )  # fmt: skip
        return {name.removesuffix("/int8") for name in load_file(output) if name.endswith("int8")}

    kernels = {name for name in flax_checkpoint() if name.endswith("kernel")}
    assert taken() == kernels
    assert taken("--exclude", "lm_head|_1/") == {
        "layers_0/q_proj/kernel",
        "layers_0/up_proj/kernel",
    }
    assert taken("--include", "embed|q_proj", "--exclude", "layers_0") == {
        "embed/embedding",
        "layers_1/q_proj/kernel",
    }
    taken("--layout", "torch")
    assert load_file(output)["layers_0/up_proj/scale"].shape == (64, 1)


def test_errors_name_the_weight_and_the_remedy(tmp_path, capsys):
    tensors = flax_checkpoint() | {"odd/kernel": numbers(10, 31), "heads/kernel": numbers(8, 2, 4)}
    file, output = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    save_file(tensors, file)
    before = listing(tmp_path)
    error = fail(capsys, "quantize", file, output, "--method", "q4_0", "--exclude", "heads")
    assert "odd/kernel" in error
    assert "--exclude" in error
    assert "heads/kernel" in fail(
        capsys, "quantize", file, output, "--method", "int4", "--exclude", "odd"
    )
    for arguments in (["--include", "nothing"], ["--exclude", "kernel"], ["--exclude", "typo"]):
        fail(capsys, "quantize", file, output, "--method", "int8", *arguments)
    fail(capsys, "quantize", file, output, "--method", "int8", "--include", "(")
    fail(capsys, "quantize", file, output, "--method", "int8", "--format", "orbax")
    assert listing(tmp_path) == before
    save_file(flax_checkpoint(), file)
    succeed(capsys, "quantize", file, output, "--method", "int8")
    again = fail(capsys, "quantize", output, tmp_path / "again.safetensors", "--method", "int8")
    assert "already" in again


def test_a_tree_of_orbax_keeps_its_containers(tmp_path, capsys):
    """Lists stay lists, and every array is where it was."""
    layers = [{"kernel": jnp.asarray(numbers(32, 8, seed=i))} for i in range(11)]
    tree = {"params": {"layers": layers, "norm": {"scale": jnp.ones(8, jnp.bfloat16)}}}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "in", tree)
    succeed(capsys, "quantize", tmp_path / "in", tmp_path / "out", "--method", "int8")
    with ocp.StandardCheckpointer() as checkpointer:
        found = checkpointer.restore(tmp_path / "out")
    expected = serialization.to_state_dict(peft.quantize_checkpoint(tree["params"], method="int8"))
    assert isinstance(found["params"]["layers"], list)
    found = serialization.to_state_dict(found["params"])
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    assert jax.tree.all(jax.tree.map(np.array_equal, found, expected))


# --- Memory --------------------------------------------------------------------------------------

_MEASURED = r"""
import re, sys
from peft_jax.cli import main
status = main(sys.argv[1:])
assert status == 0, status
print(re.search(r"VmHWM:\s+(\d+) kB", open("/proc/self/status").read()).group(1))
"""


def big_file(path, rows, columns, tensors):
    """Floats of random bits, but for one that keeps them below two in size."""

    def chunks(seed):
        draw = np.random.default_rng(seed)
        for start in range(0, rows, 512):
            bits = draw.integers(0, 2**32, (min(512, rows - start), columns), dtype=np.uint32)
            yield (bits & np.uint32(0xBFFFFFFF)).view(np.float32)

    write_safetensors(
        path,
        {
            f"l{i}/kernel": TensorStream(
                np.dtype(np.float32), (rows, columns), lambda i=i: chunks(i)
            )
            for i in range(tensors)
        },
    )


def peak_memory(*arguments):
    """Bytes that a process of its own holds at most.

    Not by `getrusage`, which counts what the process held that started it.
    """
    done = subprocess.run(
        [sys.executable, "-c", _MEASURED, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=True,
    )
    return 1024 * int(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_memory_does_not_grow_with_the_tensor(tmp_path):
    """Half a gigabyte in one tensor."""
    file, output = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    big_file(file, 16384, 8192, 1)
    assert peak_memory("quantize", file, output, "--method", "q4_0") < 0.8e9
    assert output.stat().st_size == pytest.approx(file.stat().st_size * 4.5 / 32, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["q4_0", "int8"])
def test_four_gigabytes_in_less_than_one_and_a_half(method, tmp_path):
    free = shutil.disk_usage(tmp_path).free
    if free < 8e9:
        pytest.skip(f"{free / 1e9:.1f} GB of disk are free, and this takes up to 8")
    file, output = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    try:
        big_file(file, 32768, 8192, 4)
        assert file.stat().st_size >= 4 * 2**30
        assert peak_memory("quantize", file, output, "--method", method) < 1.5e9
        with open_checkpoint(file) as before, open_checkpoint(output) as after:
            rows = jnp.asarray(before.read_rows("l3/kernel", 0, 64))
            if method == "q4_0":  # whose blocks lie within rows
                _, scale = peft.quantize(rows, method)
                assert np.array_equal(after.read_rows("l3/scale", 0, 64), scale)
            else:
                error = rows - peft.dequantize(
                    {"int8": after.read_rows("l3/kernel/int8", 0, 64)}, after.read("l3/scale")
                )
                assert np.max(np.abs(error)) <= 0.51 * np.max(after.read("l3/scale"))
    finally:
        file.unlink(missing_ok=True)
        output.unlink(missing_ok=True)

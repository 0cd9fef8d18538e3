"""The command line as a whole, `inspect`, and what all commands promise."""

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import pytest
from cli_files import (
    fail,
    flax_checkpoint,
    listing,
    llama_adapter,
    numbers,
    run,
    succeed,
    torch_checkpoint,
    write_adapter,
    write_sharded,
)
from flax.traverse_util import unflatten_dict
from helpers import partly_slow
from safetensors.numpy import save_file

import peft_jax
from peft_jax.cli import COMMANDS, main

COMMAND = [sys.executable, "-m", "peft_jax"]


@pytest.fixture
def base(tmp_path):
    save_file(flax_checkpoint(), tmp_path / "base.safetensors")
    return tmp_path / "base.safetensors"


@pytest.fixture
def adapter(tmp_path):
    config = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "up_proj"]}
    return write_adapter(tmp_path / "adapter", llama_adapter(), **config)


# --- Help and version ----------------------------------------------------------------------------


def test_help_imports_no_jax():
    """Of the command line's own files; the package's `__init__` is left out."""
    package = str(Path(peft_jax.__file__).parent)
    code = f"""
import sys, types
package = types.ModuleType("peft_jax")
package.__path__ = [{package!r}]
sys.modules["peft_jax"] = package
from peft_jax.cli import main
for arguments in (["--help"], ["--version"], ["fuse", "--help"]):
    try:
        main(arguments)
    except SystemExit as ended:
        assert ended.code == 0
    assert not {{"jax", "flax", "numpy", "rich"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "quantize" in done.stdout
    assert "peft-jax 0." in done.stdout


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_every_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as ended:
        main([command.name, "--help"])
    text = capsys.readouterr().out
    assert ended.value.code == 0
    for example in command.examples:
        assert f"peft-jax {command.name} {example}" in text


def test_as_a_process(base, tmp_path):
    """`python -m peft_jax`: JSON on stdout, errors on stderr, and statuses."""
    shown = subprocess.run(
        [*COMMAND, "inspect", str(base), "--json"], capture_output=True, text=True, check=True
    )
    assert json.loads(shown.stdout)["total"]["tensors"] == len(flax_checkpoint())
    failed = subprocess.run(
        [*COMMAND, "inspect", str(tmp_path / "none")], capture_output=True, text=True, check=False
    )
    assert failed.returncode == 2
    assert failed.stdout == ""
    assert len(failed.stderr.splitlines()) == 1


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_is_a_bar_on_a_terminal_and_lines_elsewhere(base, tmp_path, capsys, monkeypatch):
    command = ["quantize", str(base), str(tmp_path / "out.safetensors"), "--method", "int8"]
    assert "quantize: 100% of " in run(capsys, *command)[2]
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert main([*command, "--force"]) == 0
    assert "0%|" in sys.stderr.getvalue()


# --- inspect -------------------------------------------------------------------------------------


def as_orbax(path, tensors):
    tree = unflatten_dict({tuple(name.split("/")): array for name, array in tensors.items()})
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, tree)
    return path


@pytest.mark.parametrize("form", ["file", "directory", "sharded", "index", "orbax"])
def test_inspect_checkpoint(form, tmp_path, capsys):
    tensors, path = flax_checkpoint(), tmp_path / "model"
    if form == "orbax":
        as_orbax(path, tensors)
    elif form in ("sharded", "index"):
        write_sharded(path, tensors)
        path = path / "model.safetensors.index.json" if form == "index" else path
    else:
        path.mkdir()
        save_file(tensors, path / "model.safetensors")
        path = path / "model.safetensors" if form == "file" else path
    report = json.loads(succeed(capsys, "inspect", path, "--json"))
    found = {
        f"{layer['name']}/{leaf}": (tuple(tensor["shape"]), tensor["dtype"], tensor["bytes"])
        for layer in report["layers"]
        for leaf, tensor in layer["tensors"].items()
    }
    assert found == {n: (x.shape, str(x.dtype), x.nbytes) for n, x in tensors.items()}
    assert report["total"]["bytes"] == sum(x.nbytes for x in tensors.values())
    assert report["total"]["parameters"] == sum(x.size for x in tensors.values())
    table = succeed(capsys, "inspect", path)
    assert "layers_1/up_proj" in table
    assert "64x192" in table


def test_inspect_adapter(adapter, capsys):
    report = json.loads(succeed(capsys, "inspect", adapter, "--json"))
    tensors = llama_adapter()
    assert len(report["layers"]) == 4
    for layer in report["layers"]:
        a = tensors[f"{layer['name']}.lora_A.weight"].astype(np.float64)
        b = tensors[f"{layer['name']}.lora_B.weight"].astype(np.float64)
        assert (layer["rank"], layer["alpha"], layer["scaling"]) == (4, 8, 2)
        assert layer["delta_norm"] == pytest.approx(np.linalg.norm(2 * b @ a), rel=1e-12)
        assert layer["bytes"] == 4 * (a.size + b.size)
    assert "self_attn.q_proj" in succeed(capsys, "inspect", adapter)


def test_inspect_stored_values_and_adapters_in_a_tree(tmp_path, capsys):
    tensors = {
        "q/kernel/int4_axis-2_len64": np.zeros((32, 8), np.uint8),
        "q/scale": np.zeros((1, 8), np.float32),
        "q/lora/a": np.zeros((64, 3), np.float32),
        "q/lora/b": np.zeros((3, 8), np.float32),
    }
    save_file(tensors, tmp_path / "x.safetensors")
    (layer,) = json.loads(succeed(capsys, "inspect", tmp_path / "x.safetensors", "--json"))[
        "layers"
    ]
    assert layer["rank"] == 3
    assert layer["tensors"]["kernel"]["shape"] == [64, 8]
    assert layer["tensors"]["kernel"]["dtype"] == "int4"
    assert layer["tensors"]["kernel"]["bytes"] == 256


def test_names_with_control_characters_do_not_reach_the_terminal(tmp_path, capsys):
    save_file({"a\x1b[31m/kernel": np.zeros(2, np.float32)}, tmp_path / "x.safetensors")
    assert "\x1b" not in succeed(capsys, "inspect", tmp_path / "x.safetensors")


@pytest.mark.parametrize("layers", [2, 30])
def test_plot(layers, tmp_path, capsys):
    """Of few layers and of many, some of which change nothing."""
    tensors = {}
    for layer in range(layers):
        for kind in ("q_proj", "v_proj"):
            name = f"layers.{layer}.{kind}"
            tensors[f"{name}.lora_A.weight"] = numbers(3, 8, seed=layer)
            tensors[f"{name}.lora_B.weight"] = numbers(8, 3, seed=layer) * (layer % 2)
    folder = write_adapter(tmp_path / "adapter", tensors, r=3, target_modules=["q_proj", "v_proj"])
    picture = tmp_path / "picture.png"
    out = succeed(capsys, "inspect", folder, "--json", "--plot", picture)
    assert json.loads(out)["total"]["layers"] == 2 * layers
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "--force" in fail(capsys, "inspect", folder, "--plot", picture)
    assert "png" in fail(capsys, "inspect", folder, "--plot", tmp_path / "picture.xyz")


def test_plot_of_weights_and_of_nothing(base, tmp_path, capsys):
    succeed(capsys, "inspect", base, "--plot", tmp_path / "weights.png")
    zeros = {"q.lora_A.weight": np.ones((2, 4), np.float32)}
    zeros["q.lora_B.weight"] = np.zeros((4, 2), np.float32)
    folder = write_adapter(tmp_path / "zeros", zeros, r=2, target_modules=["q"])
    succeed(capsys, "inspect", folder, "--plot", tmp_path / "zeros.png")
    for picture in ("weights.png", "zeros.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")


def test_numbers_that_are_not_finite(tmp_path, capsys):
    """JSON knows none; and they have no spectrum."""
    arrays = llama_adapter()
    arrays["model.layers.0.mlp.up_proj.lora_A.weight"][1, 2] = np.nan
    folder = write_adapter(tmp_path / "adapter", arrays, r=4, target_modules=["q_proj", "up_proj"])
    report = json.loads(succeed(capsys, "inspect", folder, "--json"), parse_constant=pytest.fail)
    norms = {layer["name"]: layer["delta_norm"] for layer in report["layers"]}
    assert [name for name, norm in norms.items() if norm is None] == ["model.layers.0.mlp.up_proj"]
    status, _, err = run(capsys, "inspect", folder, "--plot", tmp_path / "picture.png")
    assert status == 2
    assert "up_proj" in err
    assert not (tmp_path / "picture.png").exists()
    assert run(capsys, "diff", folder, folder)[0] == 0


def test_plot_without_matplotlib(base, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    error = fail(capsys, "inspect", base, "--plot", tmp_path / "x.png")
    assert "pip install 'peft_jax[demo]'" in error


# --- Errors --------------------------------------------------------------------------------------


def _index(weight_map):
    return {"model.safetensors.index.json": json.dumps({"weight_map": weight_map}).encode()}


BROKEN = {
    "empty": b"",
    "short": b"\x05\x00",
    "long header": (10**15).to_bytes(8, "little") + b"{}",
    "no JSON": (4).to_bytes(8, "little") + b"oops",
    "pickle": b"PK\x03\x04" + bytes(50),
}
DIRECTORIES = {
    "nothing": {},
    "two files": {"a.safetensors": b"", "b.safetensors": b""},
    "missing shard": _index({"w": "none.safetensors"}),
    "shard elsewhere": _index({"w": "../base.safetensors"}),
    "number for a shard": _index({"w": 3}),
    "list for an index": {"model.safetensors.index.json": b"[]"},
    "deep index": {"model.safetensors.index.json": b"[" * 100_000},
    "broken orbax": {"_METADATA": b"{"},
    "config alone": {"adapter_config.json": b'{"peft_type": "LORA", "r": 2}'},
    "tensors alone": {"adapter_model.safetensors": b""},
    "config of no JSON": {"adapter_config.json": b"{", "adapter_model.safetensors": b""},
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_broken_files(content, base, tmp_path, capsys):
    file, output = tmp_path / "broken.safetensors", tmp_path / "output"
    file.write_bytes(content)
    before = listing(tmp_path)
    fail(capsys, "inspect", file)
    fail(capsys, "quantize", file, output, "--method", "int8")
    fail(capsys, "extract", base, file, output, "--rank", 2)
    fail(capsys, "diff", base, file)
    assert listing(tmp_path) == before


@pytest.mark.parametrize("files", DIRECTORIES.values(), ids=DIRECTORIES)
def test_broken_directories(files, base, tmp_path, capsys):
    folder, output = tmp_path / "broken", tmp_path / "output"
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    before = listing(tmp_path)
    fail(capsys, "inspect", folder)
    fail(capsys, "fuse", base, folder, output)
    fail(capsys, "convert", folder, output, "--to", "orbax")
    fail(capsys, "merge", folder, folder, "--weights", 1, 1, "--output", output)
    assert listing(tmp_path) == before


def test_a_truncated_file_is_refused_at_any_length(base, tmp_path, capsys):
    whole = base.read_bytes()
    for length in (7, 8, 100, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut.safetensors").write_bytes(whole[:length])
        fail(capsys, "inspect", tmp_path / "cut.safetensors")


def test_adapters_that_disagree_with_their_config(base, tmp_path, capsys):
    tensors = llama_adapter()
    good = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "up_proj"]}
    name = "model.layers.0.mlp.up_proj"
    bad = {
        "rank": (tensors, good | {"r": 5}),
        "half": ({k: v for k, v in tensors.items() if k != f"{name}.lora_B.weight"}, good),
        "dora": (tensors, good | {"use_dora": True}),
        "shape": (tensors | {f"{name}.lora_B.weight": numbers(192, 3)}, good),
        "unknown": (tensors | {f"{name}.lora_C.weight": numbers(192, 3)}, good),
    }
    for label, (arrays, config) in bad.items():
        folder = write_adapter(tmp_path / label, arrays, **config)
        fail(capsys, "inspect", folder)
        fail(capsys, "fuse", base, folder, tmp_path / "output")
    assert not (tmp_path / "output").exists()


def test_wrong_arguments_end_with_2(base, tmp_path, capsys):
    for arguments in (
        [],
        ["quantize", str(base), "out"],
        ["quantize", str(base), "out", "--method", "int5"],
        ["extract", str(base), str(base), "out", "--rank", "0"],
        ["fry", str(base)],
    ):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 2


# --- Outputs -------------------------------------------------------------------------------------


def writing_commands(base, adapter, output):
    """Arguments that write, by command."""
    return {
        "fuse": ["fuse", base, adapter, output],
        "extract": ["extract", base, base.with_name("tuned.safetensors"), output, "--rank", 2],
        "quantize": ["quantize", base, output, "--method", "int8"],
        "merge": ["merge", adapter, adapter, "--weights", 0.5, 0.5, "--output", output],
        "convert": ["convert", adapter, output, "--to", "orbax"],
    }


@pytest.mark.parametrize("name", ["fuse", "extract", "quantize", "merge", "convert"])
def test_outputs_are_not_overwritten_and_dry_runs_write_nothing(name, adapter, tmp_path, capsys):
    base, output = tmp_path / "base.safetensors", tmp_path / "output"
    save_file(torch_checkpoint(), base)
    save_file({n: x + 1 for n, x in torch_checkpoint().items()}, tmp_path / "tuned.safetensors")
    command = writing_commands(base, adapter, output)[name]
    before = listing(tmp_path)
    out = succeed(capsys, *command, "--dry-run")
    assert f"would write {output}" in out
    assert listing(tmp_path) == before

    succeed(capsys, *command)
    written = listing(output)
    assert written
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        {"base.safetensors", "tuned.safetensors", "adapter", "output"}
    )
    assert "--force" in fail(capsys, *command)
    assert listing(output) == written
    (output / "README.md").write_text("of an older version")
    succeed(capsys, *command, "--force")
    assert not (output / "README.md").exists()


def test_what_force_does_not_replace(base, adapter, tmp_path, capsys):
    """Inputs, directories that hold them, and directories with a stranger's files."""
    before = listing(tmp_path)
    for output in (base, tmp_path, tmp_path / "none" / "output"):
        fail(capsys, "quantize", base, output, "--method", "int8", "--force")
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.pdf").write_bytes(b"precious")
    fail(capsys, "quantize", base, other, "--method", "int8", "--force")
    fail(capsys, "fuse", base, adapter, adapter / "adapter_model.safetensors")
    assert {p: c for p, c in listing(tmp_path).items() if p.parent != other} == before
    assert (other / "thesis.pdf").read_bytes() == b"precious"


def test_an_error_in_the_middle_leaves_nothing(base, tmp_path, capsys):
    tensors = flax_checkpoint()
    tensors["lm_head/kernel"][3, 5] = np.nan
    save_file(tensors, tmp_path / "nan.safetensors")
    output, before = tmp_path / "small.safetensors", listing(tmp_path)
    for method in ("int8", "q4_0", "nf4"):
        error = fail(capsys, "quantize", tmp_path / "nan.safetensors", output, "--method", method)
        assert "lm_head/kernel" in error
        assert "NaN" in error
    assert listing(tmp_path) == before


@pytest.mark.parametrize("format", ["safetensors", "orbax"])
def test_ctrl_c_in_the_middle_leaves_nothing(format, base, tmp_path, capsys, monkeypatch):
    """And what was there before stays."""
    from peft_jax.io.checkpoints import quantize as encoding

    output = tmp_path / "small"
    command = ["quantize", base, output, "--method", "int8", "--format", format, "--force"]
    succeed(capsys, *command)
    before, calls = listing(tmp_path), []

    def interrupt(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return encode(*arguments)

    encode = encoding.encode
    monkeypatch.setattr(encoding, "encode", interrupt)
    status, _, err = run(capsys, *command)
    assert status == 130
    assert "interrupted" in err
    assert listing(tmp_path) == before


@pytest.mark.parametrize(
    ("number", "status"),
    partly_slow([(signal.SIGINT, 130), (signal.SIGTERM, 143)], [(signal.SIGTERM, 143)]),
)
def test_a_process_that_is_stopped_leaves_nothing(number, status, tmp_path):
    """The signal comes while the second tensor is quantized."""
    tensors = {f"l{i}/kernel": np.ones((64, 64), np.float32) for i in range(4)}
    save_file(tensors, tmp_path / "base.safetensors")
    program = f"""
import os, signal, sys
from peft_jax.cli import main
from peft_jax.io.checkpoints import quantize as encoding

# What a shell starts in the background ignores the signal, and passes that on.
signal.signal(signal.SIGINT, signal.default_int_handler)

def encode(*arguments, encode=encoding.encode, calls=[]):
    calls.append(arguments)
    if len(calls) == 2:
        assert len(os.listdir()) == 2  # what is written lies beside its place
        os.kill(os.getpid(), {number})
    return encode(*arguments)

encoding.encode = encode
sys.exit(main(["quantize", "base.safetensors", "small.safetensors", "--method", "nf4"]))
"""
    command = [sys.executable, "-c", program]
    process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert process.returncode == status, process.stderr
    assert "Traceback" not in process.stderr
    assert os.listdir(tmp_path) == ["base.safetensors"]

"""Checkpoints and adapters on disk, small, for the tests of the command line."""

import json

import numpy as np
from safetensors.numpy import save_file

from peft_jax.cli import main

PREFIX = "base_model.model."


def run(capsys, *arguments):
    """Exit status, stdout and stderr of a command."""
    capsys.readouterr()
    status = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def succeed(capsys, *arguments):
    """The stdout of a command that succeeds."""
    status, out, err = run(capsys, *arguments)
    assert status == 0, err
    return out


def fail(capsys, *arguments):
    """The one line on stderr of a command that fails."""
    status, _, err = run(capsys, *arguments)
    lines = [line for line in err.splitlines() if "% of " not in line]
    assert status == 2, err
    assert len(lines) == 1, err
    assert "Traceback" not in err
    return lines[0]


def listing(folder):
    """Every file below a folder, with its bytes."""
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def numbers(*shape, seed=0, dtype=np.float32):
    return np.random.default_rng((*shape, seed)).normal(size=shape).astype(dtype)


def write_sharded(folder, tensors, shards=2):
    """A checkpoint as Hugging Face lays it out, in several files."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {
        name: f"model-{i % shards + 1:05d}-of-{shards:05d}.safetensors"
        for i, name in enumerate(tensors)
    }
    for file in set(files.values()):
        own = {name: array for name, array in tensors.items() if files[name] == file}
        save_file(own, folder / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text('{"model_type": "made-up"}')
    return folder


def write_adapter(folder, tensors, **config):
    """An adapter as Hugging Face's peft saves it."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {PREFIX + name: array for name, array in tensors.items()},
        folder / "adapter_model.safetensors",
        {"format": "pt"},
    )
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **config}))
    return folder


def factors(module, inputs, outputs, rank, seed=0, dtype=np.float32):
    """The tensors of one linear module."""
    return {
        f"{module}.lora_A.weight": numbers(rank, inputs, seed=seed, dtype=dtype),
        f"{module}.lora_B.weight": numbers(outputs, rank, seed=seed + 1, dtype=dtype),
    }


def torch_checkpoint():
    """Names and layout of a small Llama in torch."""
    shapes = {
        "model.embed_tokens.weight": (96, 64),
        "model.norm.weight": (64,),
        "lm_head.weight": (96, 64),
    }
    for layer in range(2):
        name = f"model.layers.{layer}"
        shapes |= {
            f"{name}.self_attn.q_proj.weight": (64, 64),
            f"{name}.self_attn.q_proj.bias": (64,),
            f"{name}.self_attn.v_proj.weight": (32, 64),
            f"{name}.mlp.up_proj.weight": (192, 64),
            f"{name}.input_layernorm.weight": (64,),
        }
    return {name: numbers(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}


def flax_checkpoint():
    """Names and layout of a small model in Flax."""
    shapes = {
        "embed/embedding": (96, 64),
        "norm/scale": (64,),
        "lm_head/kernel": (64, 96),
    }
    for layer in range(2):
        name = f"layers_{layer}"
        shapes |= {
            f"{name}/q_proj/kernel": (64, 64),
            f"{name}/q_proj/bias": (64,),
            f"{name}/up_proj/kernel": (64, 192),
        }
    return {name: numbers(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}


def llama_adapter(rank=4):
    """Adapters for `torch_checkpoint`."""
    tensors = {}
    for layer in range(2):
        name = f"model.layers.{layer}"
        tensors |= factors(f"{name}.self_attn.q_proj", 64, 64, rank, seed=10 * layer)
        tensors |= factors(f"{name}.mlp.up_proj", 64, 192, rank, seed=10 * layer + 2)
    return tensors

"""The command line on models of `transformers`, adapters of `peft` and files of `gguf`."""

import gguf
import numpy as np
import pytest
from peers import VOCAB, hf, hf_peft, torch
from safetensors.numpy import load_file

from peft_jax.cli import main

MODELS = {
    "llama": lambda: hf.LlamaForCausalLM(
        hf.LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            attention_bias=True,
            tie_word_embeddings=False,
        )
    ),
    "gpt2": lambda: hf.GPT2LMHeadModel(
        hf.GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=2, n_positions=16)
    ),
}
ADAPTERS = {
    "patterns": (
        "llama",
        {
            "target_modules": ["q_proj", "v_proj", "down_proj"],
            "rank_pattern": {"v_proj": 2},
            "alpha_pattern": {"layers.1.self_attn.q_proj": 3},
            "use_rslora": True,
        },
    ),
    "dora": ("llama", {"target_modules": "all-linear", "use_dora": True}),
    "bias": ("llama", {"target_modules": ["q_proj", "k_proj"], "lora_bias": True}),
    "tables": (
        "llama",
        {"target_modules": ["embed_tokens", "o_proj"], "modules_to_save": ["lm_head"]},
    ),
    "conv1d": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "conv1d dora": ("gpt2", {"target_modules": ["c_fc"], "fan_in_fan_out": True, "use_dora": True}),
}
IDS = torch.arange(12).reshape(2, 6) % VOCAB


def draw(parameters, scale=0.3):
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(scale * torch.randn_like(parameter))


def saved(tmp_path, name, **fields):
    """A base in shards, an adapter of random numbers, and the logits of both together."""
    model = MODELS[name]().eval()
    model.save_pretrained(tmp_path / "base", max_shard_size="20KB", safe_serialization=True)
    assert (tmp_path / "base" / "model.safetensors.index.json").exists()
    config = hf_peft.LoraConfig(**({"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM"} | fields))
    adapted = hf_peft.get_peft_model(model, config).eval()
    draw([p for n, p in adapted.named_parameters() if "lora_" in n or "modules_to_save" in n])
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    with torch.no_grad():
        return type(model), adapted(IDS).logits.numpy(), adapted


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_fuse_is_what_peft_computes(adapter, tmp_path):
    name, fields = ADAPTERS[adapter]
    kind, expected, _ = saved(tmp_path, name, **fields)
    paths = [str(tmp_path / part) for part in ("base", "adapter", "fused")]
    assert main(["fuse", *paths]) == 0
    fused = kind.from_pretrained(paths[-1]).eval()
    with torch.no_grad():
        found = fused(IDS).logits.numpy()
    assert np.max(np.abs(found - expected)) < 1e-5 * np.max(np.abs(expected))


@pytest.mark.parametrize("name", MODELS)
def test_peft_loads_what_extract_writes(name, tmp_path):
    targets = "all-linear" if name == "llama" else ["c_attn", "c_proj", "c_fc"]
    kind, expected, adapted = saved(tmp_path, name, target_modules=targets)
    adapted.merge_and_unload().save_pretrained(tmp_path / "tuned", max_shard_size="20KB")
    paths = [str(tmp_path / part) for part in ("base", "tuned", "extracted")]
    layout = ["--fan-in-fan-out"] if name == "gpt2" else []
    assert main(["extract", *paths, "--rank", "4", *layout]) == 0
    if layout:
        assert main(["extract", *paths, "--rank", "4", "--force"]) == 2
        assert main(["quantize", paths[0], str(tmp_path / "q"), "--method", "int8"]) == 2
    base = kind.from_pretrained(paths[0])
    again = hf_peft.PeftModel.from_pretrained(base, paths[-1]).eval()
    with torch.no_grad():
        found = again(IDS).logits.numpy()
    assert np.max(np.abs(found - expected)) < 1e-4 * np.max(np.abs(expected))


def test_merge_and_diff_of_adapters_of_peft(tmp_path):
    """With a scaling of one, which peft counts twice in combinations by SVD."""
    fields = {"target_modules": ["q_proj", "v_proj"], "lora_alpha": 4}
    _, _, adapted = saved(tmp_path, "llama", **fields)
    adapted.add_adapter("other", adapted.peft_config["default"])
    draw([p for n, p in adapted.named_parameters() if "lora_" in n])
    adapted.add_weighted_adapter(["default", "other"], [0.7, -0.3], "both", "svd", svd_rank=8)
    for parameter in adapted.parameters():
        parameter.data = parameter.data.contiguous()
    adapted.save_pretrained(tmp_path / "saved")
    paths = [str(tmp_path / "saved"), str(tmp_path / "saved" / "other"), str(tmp_path / "merged")]
    command = ["merge", *paths[:2], "--weights", "0.7", "-0.3", "--rank", "8", "--output", paths[2]]
    assert main(command) == 0
    both = str(tmp_path / "saved" / "both")
    assert main(["diff", paths[2], both, "--tolerance", "1e-5"]) == 0
    assert main(["diff", paths[0], both]) == 1


# --- GGUF ----------------------------------------------------------------------------------------


def reordered(rows, heads):
    """Of each head, the rows of its first half and of its second in turn, as llama.cpp has them."""
    halves = rows.reshape(heads, 2, len(rows) // heads // 2, -1)
    return halves.swapaxes(1, 2).reshape(rows.shape)


def test_convert_to_gguf_and_back(tmp_path, capsys):
    targets = ["q_proj", "k_proj", "down_proj"]
    saved(tmp_path, "llama", target_modules=targets)
    adapter, file = str(tmp_path / "adapter"), str(tmp_path / "adapter.gguf")
    heads = ["--permute-heads", "4", "2"]
    command = ["convert", adapter, file, "--to", "gguf", "--architecture", "llama"]
    assert main(command) == 0
    assert "--permute-heads" in capsys.readouterr().err
    assert main([*command, *heads, "--force"]) == 0
    assert "--permute-heads" not in capsys.readouterr().err
    reader = gguf.GGUFReader(file)
    found = {tensor.name: tensor.data for tensor in reader.tensors}
    theirs = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    names = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "mlp.down_proj": "ffn_down",
    }
    for layer in range(2):
        for ours, name in names.items():
            prefix = f"base_model.model.model.layers.{layer}.{ours}"
            a, b = (theirs[f"{prefix}.lora_{x}.weight"] for x in "AB")
            count = {"attn_q": 4, "attn_k": 2}.get(name)
            b = b if count is None else reordered(b, count)
            assert np.array_equal(found.pop(f"blk.{layer}.{name}.weight.lora_a"), a)
            assert np.array_equal(found.pop(f"blk.{layer}.{name}.weight.lora_b"), b)
    assert not found
    assert float(reader.get_field("adapter.lora.alpha").contents()) == 6

    renames = tmp_path / "renames.json"
    renames.write_text(
        '{"blk/{}": "model.layers.{}", "attn_q": "self_attn.q_proj", '
        '"attn_k": "self_attn.k_proj", "ffn_down": "mlp.down_proj"}'
    )
    back = ["convert", file, str(tmp_path / "back"), "--to", "huggingface", *heads]
    assert main([*back, "--renames", str(renames)]) == 0
    assert main(["diff", adapter, str(tmp_path / "back")]) == 0
    assert main(["inspect", file]) == 0


def test_convert_to_gguf_refuses(tmp_path, capsys):
    saved(tmp_path, "llama", target_modules=["q_proj"], use_dora=True)
    command = ["convert", str(tmp_path / "adapter"), str(tmp_path / "x.gguf"), "--to", "gguf"]
    for arguments in ([], ["--architecture", "lama"], ["--architecture", "gpt2"]):
        assert main([*command, *arguments]) == 2
    assert not (tmp_path / "x.gguf").exists()

"""Adapters go from Hugging Face's peft to this library and back as files."""

import dataclasses
import functools
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

import peft_jax as peft
from peft_jax import load_adapter, save_adapter

torch = pytest.importorskip("torch")
hf_peft = pytest.importorskip("peft")
pytest.importorskip("transformers")
from peers import (  # noqa: E402 (it needs the three above)
    IDS,
    PEERS,
    Pair,
    Peer,
    adapted,
    assert_close,
    gpt2_peer,
    net_peer,
    randomize,
    their_model,
)
from safetensors.numpy import load_file  # noqa: E402
from test_lora_config import carried_experts, experts_peer  # noqa: E402

Options = dict[str, Any]
GPT2, BERT, LLAMA = (PEERS[name] for name in ("gpt2", "bert", "llama"))
UNTIED, NET = gpt2_peer(tie_word_embeddings=False), net_peer()
TOKENS = [int(token) for token in IDS[0, :3]]

CASES: dict[str, tuple[Peer, Options]] = {
    "gpt2": (GPT2, {"target_modules": ["c_attn", "mlp.c_proj"]}),
    "bert": (BERT, {"target_modules": ["query", "value"]}),
    "llama": (LLAMA, {"target_modules": ["q_proj", "v_proj"]}),
    "all linear": (LLAMA, {"target_modules": "all-linear"}),
    "rslora": (BERT, {"target_modules": ["query"], "use_rslora": True, "lora_alpha": 5}),
    "dora": (GPT2, {"target_modules": ["c_attn", "wpe"], "use_dora": True}),
    "patterns": (
        LLAMA,
        {
            "target_modules": ["q_proj", "down_proj"],
            "rank_pattern": {"q_proj": 3, "model.layers.1.mlp.down_proj": 5},
            "alpha_pattern": {r".*\.0\.self_attn\.q_proj": 7, "down_proj": 1.5},
        },
    ),
    "lora bias": (BERT, {"target_modules": ["query"], "lora_bias": True}),
    "saved head": (LLAMA, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "saved norm and layers": (
        GPT2,
        {"target_modules": ["c_attn"], "modules_to_save": ["ln_f", "c_fc"]},
    ),
    "bias of all": (BERT, {"target_modules": ["query"], "bias": "all"}),
    "saved norm": (LLAMA, {"target_modules": ["v_proj"], "modules_to_save": ["model.norm"]}),
    "saved table": (UNTIED, {"target_modules": ["c_attn"], "modules_to_save": ["wpe"]}),
    "bias and saved": (
        GPT2,
        {"target_modules": ["c_attn"], "bias": "all", "modules_to_save": ["mlp"]},
    ),
    "tables": (UNTIED, {"target_modules": ["c_attn", "wte", "wpe"]}),
    "tables of bert": (BERT, {"target_modules": ["word_embeddings", "key"], "use_dora": True}),
    "embed_tokens": (LLAMA, {"target_modules": ["q_proj", "embed_tokens"]}),
    "rows": (LLAMA, {"target_modules": ["q_proj"], "trainable_token_indices": TOKENS}),
    "rows by name": (
        UNTIED,
        {"target_modules": ["c_attn"], "trainable_token_indices": {"wte": TOKENS[::-1]}},
    ),
    "convolutions, lora bias": (NET, {"target_modules": ["conv", "fc"], "lora_bias": True}),
    "convolutions": (NET, {"target_modules": ["conv", "fc", "table"], "use_dora": True}),
}
every_case = pytest.mark.parametrize("name", CASES)


@functools.cache
def case(name: str) -> Pair:
    """A model of `peft` whose trained parameters are drawn anew, with nothing left at zero."""
    peer, options = CASES[name]
    return adapted(peer, **{"r": 4, "lora_alpha": 6, **options})


def saved_by_peft(pair: Pair, folder: Path) -> Path:
    with warnings.catch_warnings():  # of embeddings that it saves too
        warnings.simplefilter("ignore", UserWarning)
        pair.theirs.save_pretrained(folder)
    return folder


def adapter_of(pair: Pair) -> Any:
    """What is trained, out of all parameters."""
    mask = flatten_dict(peft.trainable_mask(pair.params, pair.config), sep="/")
    return unflatten_dict({k: v for k, v in pair.flat.items() if mask[k]}, sep="/")


def with_adapter(pair: Pair, lora: Any) -> Any:
    """The parameters of the plain model with an adapter's laid over them."""
    flat = {**pair.peer.base, **flatten_dict(lora, sep="/")}
    return unflatten_dict(flat, sep="/")


def assert_same_logits(pair: Pair, model: Any, params: Any) -> None:
    ours = jax.jit(lambda params: pair.peer.our_logits(model, params))(params)
    theirs = pair.peer.their_logits(pair.theirs).detach().numpy()
    assert_close(ours, theirs)


@every_case
@pytest.mark.parametrize("by_specs", [True, False], ids=["specs", "names alone"])
def test_what_peft_saved_is_loaded(name: str, by_specs: bool, tmp_path: Path) -> None:
    pair = case(name)
    specs = pair.specs if by_specs else None
    base = unflatten_dict(pair.peer.base, sep="/")
    lora, config = load_adapter(saved_by_peft(pair, tmp_path), specs=specs, base=base)
    expected = flatten_dict(adapter_of(pair), sep="/")
    found = flatten_dict(lora, sep="/")
    assert set(expected) <= set(found)
    for path, value in expected.items():
        np.testing.assert_array_equal(found[path], value, err_msg=path)
    model = peft.get_peft_model(pair.peer.ours, config)
    assert_same_logits(pair, model, with_adapter(pair, lora))


TRAINED = ["gpt2", "bert", "llama", "rslora", "dora", "patterns", "lora bias", "saved head"]


@pytest.mark.parametrize("name", TRAINED)
def test_what_peft_trained_is_loaded(name: str, tmp_path: Path) -> None:
    peer, options = CASES[name]
    theirs = their_model(peer, **{"r": 4, "lora_alpha": 6, **options})
    trained = [value for value in theirs.parameters() if value.requires_grad]
    optimizer, before = torch.optim.Adam(trained, lr=0.02), peer.their_logits(theirs).detach()
    for _ in range(4):
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(peer.their_logits(theirs), torch.ones_like(before)).backward()
        optimizer.step()
    after = peer.their_logits(theirs).detach()
    assert (after - before).abs().max() > 0.1
    theirs.save_pretrained(tmp_path)
    base = unflatten_dict(peer.base, sep="/")
    lora, config = load_adapter(tmp_path, base=base)
    model, params = peft.get_peft_model(peer.ours, config), peft.add_adapter(base, lora)
    ours = jax.jit(lambda params: peer.our_logits(model, params))(params)
    assert_close(ours, after.numpy())


@every_case
def test_what_is_saved_is_loaded_by_peft(name: str, tmp_path: Path) -> None:
    pair = case(name)
    save_adapter(tmp_path / "a", adapter_of(pair), config=pair.config, specs=pair.specs)
    model = pair.peer.torch_model()
    theirs = hf_peft.PeftModel.from_pretrained(model, tmp_path / "a").eval()
    result = theirs.load_adapter(tmp_path / "a", adapter_name="default")
    assert not result.unexpected_keys
    assert not result.missing_keys
    expected = {k: v for k, v in pair.theirs.named_parameters() if "original_module" not in k}
    for key, value in theirs.named_parameters():
        if "original_module" not in key:
            np.testing.assert_array_equal(value.detach(), expected[key].detach(), err_msg=key)
    logits = pair.peer.their_logits(theirs).detach().numpy()
    np.testing.assert_allclose(logits, pair.peer.their_logits(pair.theirs).detach(), rtol=1e-5)


@every_case
def test_files_are_those_of_peft(name: str, tmp_path: Path) -> None:
    """Tensor by tensor, and saved once more byte by byte, but for peft's copies."""
    pair = case(name)
    theirs = load_file(saved_by_peft(pair, tmp_path / "theirs") / "adapter_model.safetensors")
    if pair.config.modules_to_save:  # its copies, where it writes all biases
        theirs = {k: v for k, v in theirs.items() if not any(mark in k for mark in COPIES)}
    lora, config = load_adapter(
        tmp_path / "theirs", specs=pair.specs, base=unflatten_dict(pair.peer.base, sep="/")
    )
    for folder in ("first", "second"):
        save_adapter(tmp_path / folder, lora, config=config, specs=pair.specs)
        lora, config = load_adapter(tmp_path / folder)
    first, second = (tmp_path / folder for folder in ("first", "second"))
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (first / file).read_bytes() == (second / file).read_bytes()
    ours = load_file(first / "adapter_model.safetensors")
    assert sorted(ours) == sorted(theirs)
    for key, value in theirs.items():
        np.testing.assert_array_equal(ours[key], value, err_msg=key)


COPIES = (".original_module.", ".modules_to_save.")


# --- Models that are laid out otherwise ----------------------------------------------------------

WIDTH, DEPTH, SPLIT = 6, 3, (2, 3)


class TorchBlock(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn = torch.nn.Module()
        for name in ("q_proj", "k_proj", "o_proj"):
            setattr(self.self_attn, name, torch.nn.Linear(WIDTH, WIDTH))
        self.norm = torch.nn.LayerNorm(WIDTH, eps=1e-6)

    def forward(self, x: Any) -> Any:
        attn = self.self_attn
        return x + attn.o_proj(torch.tanh(attn.q_proj(self.norm(x))) * attn.k_proj(x))


class TorchHeads(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = torch.nn.Module()
        self.model.layers = torch.nn.ModuleList(TorchBlock() for _ in range(DEPTH))
        self.score = torch.nn.Linear(WIDTH, 4)

    def forward(self, x: Any) -> Any:
        for layer in self.model.layers:
            x = layer(x)
        return self.score(x)


class FlaxBlock(nn.Module):
    """As `TorchBlock`, with heads in axes of their own."""

    @nn.compact
    def __call__(self, x: Any, _: Any = None) -> Any:
        q = nn.DenseGeneral(SPLIT, name="query")(nn.LayerNorm(name="norm")(x))
        k = nn.Einsum((*SPLIT, WIDTH), "btd,nhd->btnh", bias_init=BIAS, name="key")(x)
        return x + nn.DenseGeneral(WIDTH, axis=(-2, -1), name="out")(jnp.tanh(q) * k), None


BIAS = nn.initializers.zeros


class FlaxHeads(nn.Module):
    scan: bool

    @nn.compact
    def __call__(self, x: Any) -> Any:
        if self.scan:
            lift = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
            x, _ = nn.scan(FlaxBlock, length=DEPTH, **lift)(name="layers")(x, None)
        else:
            for i in range(DEPTH):
                x, _ = FlaxBlock(name=f"layers_{i}")(x)
        return nn.Dense(4, name="head")(x)


HEADS = {
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "out": "self_attn.o_proj",
    "head": "score",
}


def heads_base(torch_model: Any, scan: bool) -> Any:
    """The parameters of the torch model in the Flax model's layout."""
    state = {key: value.numpy() for key, value in torch_model.state_dict().items()}
    shapes = {
        "query/kernel": (WIDTH, *SPLIT),
        "query/bias": SPLIT,
        "key/kernel": (*SPLIT, WIDTH),
        "key/bias": SPLIT,
        "out/kernel": (*SPLIT, WIDTH),
        "out/bias": (WIDTH,),
    }
    layers = []
    for i in range(DEPTH):
        prefix, layer = f"model.layers.{i}.", {}
        for path, shape in shapes.items():
            module, leaf = path.split("/")
            name = prefix + HEADS[module] + (".bias" if leaf == "bias" else ".weight")
            turned = leaf == "kernel" and module != "key"  # whose einsum has outputs first
            layer[path] = (state[name].T if turned else state[name]).reshape(shape)
        layer["norm/scale"] = state[f"{prefix}norm.weight"]
        layer["norm/bias"] = state[f"{prefix}norm.bias"]
        layers.append(unflatten_dict(layer, sep="/"))
    if scan:
        base = {"layers": jax.tree.map(lambda *leaves: np.stack(leaves), *layers)}
    else:
        base = {f"layers_{i}": layer for i, layer in enumerate(layers)}
    base["head"] = {"kernel": state["score.weight"].T, "bias": state["score.bias"]}
    return jax.tree.map(jnp.asarray, base)


@pytest.mark.parametrize("scan", [True, False], ids=["scanned", "one by one"])
@pytest.mark.parametrize(
    "options", [{}, {"use_dora": True}, {"lora_bias": True, "modules_to_save": ["score"]}], ids=str
)
def test_heads_and_stacked_layers(scan: bool, options: Options, tmp_path: Path) -> None:
    """Axes of heads are joined there, and layers are one array here."""
    torch.manual_seed(0)
    plain = TorchHeads()
    base = heads_base(plain, scan)
    config = hf_peft.LoraConfig(
        r=2, lora_alpha=7, target_modules=["q_proj", "k_proj", "o_proj"], **options
    )
    theirs = hf_peft.get_peft_model(plain, config).eval()
    randomize(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    x = np.random.default_rng(0).normal(size=(2, 5, WIDTH)).astype(np.float32)
    renames = {("layers" if scan else "layers_{}"): "model.layers.{}", **HEADS}
    if "modules_to_save" not in options:
        del renames["head"]  # a rename that matches nothing is an error

    model = FlaxHeads(scan)
    options = {k: ["head"] if k == "modules_to_save" else v for k, v in options.items()}
    ours = peft.LoraConfig(r=2, lora_alpha=7, target_modules=["query", "key", "out"], **options)
    specs = peft.lora_specs(peft.get_peft_model(model, ours), x)
    lora, read = load_adapter(tmp_path / "theirs", specs=specs, renames=renames)
    adapted_model = peft.get_peft_model(model, read)
    params = unflatten_dict({**flatten_dict(base, sep="/"), **flatten_dict(lora, sep="/")}, sep="/")
    expected = theirs(torch.tensor(x)).detach().numpy()
    assert_close(adapted_model.apply({"params": params}, x), expected)

    save_adapter(tmp_path / "ours", lora, config=ours, specs=specs, renames=renames)
    loaded = TorchHeads()
    loaded.load_state_dict({k: torch.tensor(np.asarray(v)) for k, v in plain_state(theirs).items()})
    again = hf_peft.PeftModel.from_pretrained(loaded, tmp_path / "ours").eval()
    result = again.load_adapter(tmp_path / "ours", adapter_name="default")
    assert not result.unexpected_keys
    assert not result.missing_keys
    np.testing.assert_allclose(again(torch.tensor(x)).detach(), expected, rtol=1e-5, atol=1e-5)


def plain_state(model: Any) -> dict[str, Any]:
    """The weights beneath the adapters."""
    found = {}
    for key, value in model.base_model.model.state_dict().items():
        if "lora_" not in key and "modules_to_save" not in key:
            found[key.replace(".base_layer", "").replace(".original_module", "")] = value
    return found


@pytest.mark.parametrize(
    "options",
    [
        {"target_parameters": ["experts.up"]},
        {"target_parameters": ["up", "mix"], "target_modules": ["gate"], "use_rslora": True},
        {
            "target_parameters": ["experts.mix", "experts.down", "experts.up"],
            "rank_pattern": {"experts.up": 3, r"moe\.experts\.mix": 2},
            "alpha_pattern": {".*experts.down": 7, r".*experts\..*": 1.5},
        },
    ],
    ids=lambda options: "+".join(options["target_parameters"]),
)
def test_parameters_of_experts(options: Options, tmp_path: Path) -> None:
    pair = adapted(experts_peer(), **{"target_modules": [], "r": 4, **options})
    pair = dataclasses.replace(pair, flat=carried_experts(pair))
    pair.theirs.save_pretrained(tmp_path / "theirs")
    lora, config = load_adapter(tmp_path / "theirs", specs=pair.specs)
    found = flatten_dict(lora, sep="/")
    for path in found:
        np.testing.assert_array_equal(found[path], pair.flat[path], err_msg=path)
    assert_same_logits(pair, peft.get_peft_model(pair.peer.ours, config), with_adapter(pair, lora))
    if len(options["target_parameters"]) == 1:
        alone, _ = load_adapter(tmp_path / "theirs")
        assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), lora, alone))

    # Here the order of the entries says how torch's module registers its parameters.
    entries = options["target_parameters"]
    entries = [entry for name in ("up", "down", "mix") for entry in entries if name in entry]
    config = dataclasses.replace(config, target_parameters=entries)
    save_adapter(tmp_path / "ours", lora, config=config, specs=pair.specs)
    theirs, ours = (
        load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("theirs", "ours")
    )
    assert sorted(theirs) == sorted(ours)
    for key, value in theirs.items():
        np.testing.assert_array_equal(ours[key], value, err_msg=key)
    again = hf_peft.PeftModel.from_pretrained(pair.peer.torch_model(), tmp_path / "ours").eval()
    logits = pair.peer.their_logits(again).detach().numpy()
    np.testing.assert_allclose(logits, pair.peer.their_logits(pair.theirs).detach(), rtol=1e-5)


class OutputsFirst(torch.nn.Module):
    """The same experts with matrices (experts, out, in), which is what `peft` takes them for."""

    def __init__(self, experts: Any) -> None:
        super().__init__()
        self.up, self.down = (
            torch.nn.Parameter(matrices.detach().mT.contiguous())
            for matrices in (experts.up, experts.down)
        )
        self.mix = experts.mix

    def forward(self, x: Any) -> Any:
        hidden = torch.tanh(torch.einsum("bi,emi->bem", x, self.up))
        y = torch.einsum("bem,eom->beo", hidden, self.down)
        return torch.einsum("beo,mo->bem", y, self.mix)


def test_experts_with_outputs_first_have_the_same_file(tmp_path: Path) -> None:
    options: Options = {"target_modules": [], "target_parameters": ["up", "down"], "r": 4}
    pair = adapted(experts_peer(), **options)
    model = pair.peer.torch_model()
    model.moe.experts = OutputsFirst(model.moe.experts)
    theirs = hf_peft.get_peft_model(model, hf_peft.LoraConfig(**options)).eval()
    randomize(theirs)
    theirs.save_pretrained(tmp_path)
    lora, config = load_adapter(tmp_path, specs=pair.specs)
    ours = peft.get_peft_model(pair.peer.ours, config)
    pair = dataclasses.replace(pair, theirs=theirs)
    assert_same_logits(pair, ours, with_adapter(pair, lora))

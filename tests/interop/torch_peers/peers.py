"""The same small random models in torch and Flax, and adapters of `peft` read as this library's.

Modules have the same names in both, with dots here and slashes there. Torch keeps outputs first (a
Linear's weight is (out, in), but GPT-2's Conv1D's (in, out)), Flax the other way round: a weight of
two axes is transposed, but for tables.
"""

import copy
import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

import peft_jax as peft

torch = pytest.importorskip("torch")
hf = pytest.importorskip("transformers")
hf_peft = pytest.importorskip("peft")
torch.set_num_threads(1)  # models are tiny, and cores shared

gpt2 = hf.models.gpt2.modeling_flax_gpt2

# GPT-2 has a layer of its own, whose kernel is (out, in).
peft.register_layer(gpt2.FlaxConv1D, param="kernel", equation="...i,oi->...o", bias="bias")

VOCAB, HIDDEN, LAYERS, HEADS = 64, 32, 2, 2
BATCH, LENGTH = 2, 6
IDS = np.random.default_rng(0).integers(3, VOCAB, (BATCH, LENGTH))
MASK = np.ones((BATCH, LENGTH), np.int32)
POSITIONS = np.tile(np.arange(LENGTH), (BATCH, 1))

Flat = dict[str, Any]


@dataclasses.dataclass(frozen=True, eq=False)
class Peer:
    """One model in both libraries.

    Attributes:
      theirs: makes the torch model; its weights are drawn later.
      ours: the Linen module.
      inputs: of the Linen module.
      torch_inputs: of the torch model.
      output: reads the logits from what either returns.
      settings: fields that every config for this model needs.
      groups: number of groups by the dotted name of a convolution.
    """

    theirs: Callable[[], Any]
    ours: nn.Module
    inputs: tuple[Any, ...]
    torch_inputs: Mapping[str, Any]
    output: Callable[[Any], Any] = lambda y: y.logits
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    groups: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def _torch(self) -> Any:
        model = self.theirs().eval()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for value in model.parameters():
                value.add_(0.2 * torch.randn(value.shape, generator=generator))
        return model

    def torch_model(self) -> Any:
        """A torch model of one's own, with the weights that all of them have."""
        return copy.deepcopy(self._torch)

    @functools.cached_property
    def shapes(self) -> Flat:
        """Shapes of the Linen module's parameters."""
        return shapes_of(self.ours, self.inputs)

    @functools.cached_property
    def base(self) -> Flat:
        return carried(self, self._torch)

    def their_logits(self, model: Any) -> Any:
        return self.output(model(**self.torch_inputs))

    def our_logits(self, module: nn.Module, params: Any) -> Any:
        return self.output(module.apply({"params": params}, *self.inputs))


def shapes_of(module: nn.Module, inputs: tuple[Any, ...]) -> Flat:
    made = jax.eval_shape(lambda: module.init(jax.random.key(0), *inputs))["params"]
    return {path: leaf.shape for path, leaf in flatten_dict(made, sep="/").items()}


# --- From torch to Flax --------------------------------------------------------------------------

_LEAVES = {
    f"/(?P<module>.*?)/{name}": leaf
    for name, leaf in {
        "lora_A/default/weight": "lora/a",
        "lora_B/default/weight": "lora/b",
        "lora_B/default/bias": "lora/bias",
        "lora_embedding_A/default": "lora/a",
        "lora_embedding_B/default": "lora/b",
        "lora_magnitude_vector/default/weight": "lora/magnitude",
        "trainable_tokens_delta/default": "lora_tokens/rows",
    }.items()
}
# What wrappers put between the name of a module and that of its parameter. The copy that
# `modules_to_save` trains comes after the original.
_BETWEEN = re.compile(r"\.(base_layer|original_module|token_adapter|modules_to_save\.default)\b")
_NAMES = {"weight": ("kernel", "embedding", "scale", "weight"), "bias": ("bias",)}


def _array(tensor: Any) -> np.ndarray:
    return tensor.detach().numpy().copy()


def _weight(value: np.ndarray, leaf: str) -> np.ndarray:
    if leaf != "kernel":
        return value
    return value.T if value.ndim == 2 else np.moveaxis(value, (0, 1), (-1, -2))


def _adapter(value: np.ndarray, leaf: str, groups: int) -> np.ndarray:
    if leaf in ("lora/bias", "lora/magnitude"):
        return value.reshape(-1)
    if value.ndim == 2:
        return value if leaf == "lora_tokens/rows" else value.T
    if leaf == "lora/a":
        rows = np.split(value, groups)  # each group's part of the rank reads its own inputs
        own = [np.split(row, groups, axis=1)[i] for i, row in enumerate(rows)]
        return np.moveaxis(np.concatenate(own), (0, 1), (-1, -2))
    blocks = np.split(value.reshape(value.shape[:2]).T, groups, axis=1)
    zero = np.zeros_like(blocks[0])
    return np.block([[x if i == j else zero for j in range(groups)] for i, x in enumerate(blocks)])


def flax_leaf(peer: Peer, name: str) -> str | None:
    """Where a parameter of a torch model, adapted or not, lies in Flax; None: nowhere.

    Heads that are tied to an embedding have no parameters in Flax.
    """
    name = _BETWEEN.sub("", f".{name.removeprefix('base_model.model.')}").replace(".", "/")
    above, _, own = name[1:].rpartition("/")
    for pattern, leaf in _LEAVES.items():
        if found := re.fullmatch(pattern, name):
            above, own = found["module"], leaf
    paths = [f"{above}/{leaf}".strip("/") for leaf in _NAMES.get(own, (own,))]
    if own in _LEAVES.values():
        return paths[0] if any(path.startswith(f"{above}/") for path in peer.shapes) else None
    return next((path for path in paths if path in peer.shapes), None)


def carried(peer: Peer, model: Any, read: Callable[[Any], Any] = lambda value: value) -> Flat:
    """All parameters of a torch model in Flax's layout, by slashed path.

    Args:
      peer: the model.
      model: of torch, adapted or not.
      read: what to take of each parameter; None: leave it out.
    """
    found = {}
    for name, value in model.named_parameters(remove_duplicate=False):
        path, tensor = flax_leaf(peer, name), read(value)
        if path is None or tensor is None:
            continue
        above, _, leaf = path.rpartition("/")
        adapter = "/".join((above.rpartition("/")[2], leaf))
        if adapter in _LEAVES.values():
            module = above.rpartition("/")[0].replace("/", ".")
            found[path] = _adapter(_array(tensor), adapter, peer.groups.get(module, 1))
        else:
            found[path] = _weight(_array(tensor), leaf)
    return {path: jnp.asarray(value) for path, value in found.items()}


# --- Adapted models ------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Pair:
    """A model adapted by both libraries, under the same config, with the same weights.

    Attributes:
      peer: the plain model.
      theirs: adapted by `peft`.
      ours: adapted by this library.
      config: of this library.
      flat: all parameters of ``theirs`` in Flax's layout, by slashed path.
    """

    peer: Peer
    theirs: Any
    ours: nn.Module
    config: peft.LoraConfig
    flat: Flat

    @property
    def params(self) -> Any:
        return unflatten_dict(self.flat, sep="/")

    @functools.cached_property
    def specs(self) -> Any:
        return peft.lora_specs(self.ours, *self.peer.inputs)

    def logits(self) -> tuple[Any, Any]:
        """Ours and theirs."""
        theirs = _array(self.peer.their_logits(self.theirs))
        return jax.jit(lambda params: self.peer.our_logits(self.ours, params))(self.params), theirs


def their_model(peer: Peer, **options: Any) -> Any:
    """The torch model, adapted by `peft`, with the adapters' first values."""
    config = hf_peft.LoraConfig(**{**peer.settings, **options})
    return hf_peft.get_peft_model(peer.torch_model(), config).eval()


def our_model(peer: Peer, **options: Any) -> Any:
    return peft.get_peft_model(peer.ours, peft.LoraConfig(**{**peer.settings, **options}))


def randomize(model: Any) -> None:
    """Draws all that is trained anew, so that nothing is left zero. Magnitudes stay positive."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "magnitude" in name:
                value.mul_(0.5 + torch.rand(value.shape, generator=generator))
            elif value.requires_grad:
                value.copy_(0.3 * torch.randn(value.shape, generator=generator))


def keep_groups_apart(model: Any, peer: Peer) -> None:
    """Zeroes what an adapter of `peft` reads of other groups, as no weight of the layer could."""
    with torch.no_grad():
        for name, groups in peer.groups.items():
            layer = model.base_model.model.get_submodule(name)
            if not hasattr(layer, "lora_A"):
                continue
            for i, rows in enumerate(layer.lora_A["default"].weight.chunk(groups)):
                for j, columns in enumerate(rows.chunk(groups, dim=1)):
                    columns.mul_(i == j)


def adapted(peer: Peer, **options: Any) -> Pair:
    theirs, ours = their_model(peer, **options), our_model(peer, **options)
    randomize(theirs)
    keep_groups_apart(theirs, peer)
    return Pair(peer, theirs, ours, ours.peft_config, carried(peer, theirs))


# --- What is compared ----------------------------------------------------------------------------


def assert_close(actual: Any, expected: Any, tolerance: float = 1e-4) -> None:
    """Relative to the largest value."""
    scale = float(np.max(np.abs(expected)))
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance * scale)


def assert_all_close(actual: Flat, expected: Flat, tolerance: float = 1e-4) -> None:
    """Every array of two flat trees."""
    assert sorted(actual) == sorted(expected)
    for path, value in expected.items():
        assert actual[path].shape == value.shape, path
        assert_close(actual[path], value, tolerance)


# --- Models of `transformers` --------------------------------------------------------------------


def _sizes(layers: int) -> Flat:
    return {
        "hidden_size": HIDDEN,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "intermediate_size": 48,
        "vocab_size": VOCAB,
        "max_position_embeddings": 40,  # of Llama in Flax, at least 2 * HIDDEN / HEADS
        "attn_implementation": "eager",
    }


_TORCH_INPUTS = {"input_ids": torch.tensor(IDS), "attention_mask": torch.tensor(MASK)}


def gpt2_peer(layers: int = LAYERS, **settings: Any) -> Peer:
    fields = {"n_positions": 16, "n_embd": HIDDEN, "n_layer": layers, "n_head": HEADS, **settings}
    config = hf.GPT2Config(vocab_size=VOCAB, attn_implementation="eager", **fields)
    return Peer(
        lambda: hf.GPT2LMHeadModel(config),
        hf.FlaxGPT2LMHeadModel.module_class(config),
        (IDS, MASK, POSITIONS),
        _TORCH_INPUTS,
        settings={"fan_in_fan_out": True},
    )


def bert_peer(layers: int = LAYERS) -> Peer:
    config = hf.BertConfig(**_sizes(layers))
    return Peer(
        lambda: hf.BertForMaskedLM(config),
        hf.FlaxBertForMaskedLM.module_class(config),
        (IDS, MASK, np.zeros_like(IDS), POSITIONS, np.ones((layers, HEADS), np.float32)),
        _TORCH_INPUTS,
    )


def classifier_peer(labels: int) -> Peer:
    config = hf.BertConfig(**_sizes(LAYERS), num_labels=labels)
    return Peer(
        lambda: hf.BertForSequenceClassification(config),
        hf.FlaxBertForSequenceClassification.module_class(config),
        (IDS, MASK, np.zeros_like(IDS), POSITIONS, np.ones((LAYERS, HEADS), np.float32)),
        _TORCH_INPUTS,
    )


def llama_peer(layers: int = LAYERS) -> Peer:
    config = hf.LlamaConfig(**_sizes(layers))
    return Peer(
        lambda: hf.LlamaForCausalLM(config),
        hf.FlaxLlamaForCausalLM.module_class(config),
        (IDS, MASK, POSITIONS),
        _TORCH_INPUTS,
    )


PEERS = {"gpt2": gpt2_peer(), "bert": bert_peer(), "llama": llama_peer()}


# --- A model with images and words ---------------------------------------------------------------

GROUPS = 2


class TorchNet(torch.nn.Module):
    """Two convolutions, the second with groups, an embedding and a linear layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3 * width, 4 * width, 3, padding=1)
        self.grouped = torch.nn.Conv2d(4 * width, 6 * width, 3, stride=2, groups=GROUPS)
        self.table = torch.nn.Embedding(20, 6 * width)
        self.fc = torch.nn.Linear(6 * width, 5 * width)

    def forward(self, image: Any, words: Any) -> Any:
        x = self.grouped(torch.tanh(self.conv(image))).mean((-2, -1))
        return self.fc(torch.tanh(x) + self.table(words).mean(-2))


class FlaxNet(nn.Module):
    """As `TorchNet`."""

    width: int

    @nn.compact
    def __call__(self, image: Any, words: Any) -> Any:
        width, window = self.width, (3, 3)
        x = nn.Conv(4 * width, window, padding=1, name="conv")(image)
        grouped = {"strides": 2, "padding": "VALID", "feature_group_count": GROUPS}
        x = nn.Conv(6 * width, window, name="grouped", **grouped)(jnp.tanh(x)).mean((-3, -2))
        x = jnp.tanh(x) + nn.Embed(20, 6 * width, name="table")(words).mean(-2)
        return nn.Dense(5 * width, name="fc")(x)


def net_peer(width: int = 2) -> Peer:
    rng = np.random.default_rng(1)
    image = rng.normal(size=(BATCH, 9, 8, 3 * width)).astype(np.float32)
    words = rng.integers(0, 20, (BATCH, 4))
    return Peer(
        lambda: TorchNet(width),
        FlaxNet(width),
        (image, words),
        {"image": torch.tensor(np.moveaxis(image, -1, 1)), "words": torch.tensor(words)},
        output=lambda y: y,
        groups={"grouped": GROUPS},
    )

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
gpt2 = hf.models.gpt2.modeling_flax_gpt2

# GPT-2 has a layer of its own, whose kernel is (out, in).
peft.register_layer(gpt2.FlaxConv1D, param="kernel", equation="...i,oi->...o")

VOCAB, HIDDEN, LAYERS, HEADS = 64, 32, 3, 2
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
        run = jax.jit(
            lambda params: self.output(module.apply({"params": params}, *self.inputs)),
            compiler_options={"xla_backend_optimization_level": 0},  # it compiles far sooner
        )
        return run(params)


def shapes_of(module: nn.Module, inputs: tuple[Any, ...]) -> Flat:
    made = jax.eval_shape(lambda: module.init(jax.random.key(0), *inputs))["params"]
    return {path: leaf.shape for path, leaf in flatten_dict(made, sep="/").items()}


# --- From torch to Flax --------------------------------------------------------------------------

_ADAPTER = r"^(?P<module>.*)\.{}$"
_LEAVES = {
    _ADAPTER.format(name): leaf
    for name, leaf in {
        r"lora_A\.default\.weight": "lora/a",
        r"lora_B\.default\.weight": "lora/b",
        r"lora_B\.default\.bias": "lora/bias",
        r"lora_embedding_A\.default": "lora/a",
        r"lora_embedding_B\.default": "lora/b",
        r"lora_magnitude_vector\.default\.weight": "lora/magnitude",
        r"token_adapter\.trainable_tokens_delta\.default": "lora_tokens/rows",
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
    name = name.removeprefix("base_model.model.")
    for pattern, leaf in _LEAVES.items():
        if found := re.match(pattern, name):
            return f"{_BETWEEN.sub('', found['module'])}.{leaf}".replace(".", "/")
    above, _, own = f".{_BETWEEN.sub('', name)}".rpartition(".")
    paths = [f"{above}.{leaf}".strip(".").replace(".", "/") for leaf in _NAMES.get(own, (own,))]
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
        return self.peer.our_logits(self.ours, self.params), theirs


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


def adapted(peer: Peer, **options: Any) -> Pair:
    theirs, ours = their_model(peer, **options), our_model(peer, **options)
    randomize(theirs)
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

_SIZES = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": 48,
    "vocab_size": VOCAB,
    "max_position_embeddings": 40,  # of Llama in Flax, at least 2 * HIDDEN / HEADS
    "attn_implementation": "eager",
}


def gpt2_peer(**settings: Any) -> Peer:
    fields = {"n_positions": 16, "n_embd": HIDDEN, "n_layer": LAYERS, "n_head": HEADS, **settings}
    config = hf.GPT2Config(vocab_size=VOCAB, attn_implementation="eager", **fields)
    return Peer(
        lambda: hf.GPT2LMHeadModel(config),
        hf.FlaxGPT2LMHeadModel.module_class(config),
        (IDS, MASK, POSITIONS),
        {"input_ids": torch.tensor(IDS), "attention_mask": torch.tensor(MASK)},
        settings={"fan_in_fan_out": True},
    )


def bert_peer() -> Peer:
    config = hf.BertConfig(**_SIZES)
    return Peer(
        lambda: hf.BertForMaskedLM(config),
        hf.FlaxBertForMaskedLM.module_class(config),
        (IDS, MASK, np.zeros_like(IDS), POSITIONS, np.ones((LAYERS, HEADS), np.float32)),
        {"input_ids": torch.tensor(IDS), "attention_mask": torch.tensor(MASK)},
    )


def llama_peer() -> Peer:
    config = hf.LlamaConfig(**_SIZES)
    return Peer(
        lambda: hf.LlamaForCausalLM(config),
        hf.FlaxLlamaForCausalLM.module_class(config),
        (IDS, MASK, POSITIONS),
        {"input_ids": torch.tensor(IDS), "attention_mask": torch.tensor(MASK)},
    )


GPT2, BERT, LLAMA = gpt2_peer(), bert_peer(), llama_peer()
PEERS = {"gpt2": GPT2, "bert": BERT, "llama": LLAMA}

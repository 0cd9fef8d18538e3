"""Several adapters of one model against Hugging Face's peft: mixed batches, and which act."""

import contextlib
import dataclasses
import functools
from typing import Any

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

import peft_jax as peft

torch = pytest.importorskip("torch")
hf_peft = pytest.importorskip("peft")
pytest.importorskip("transformers")
from peers import (  # noqa: E402 (it needs the three above)
    BATCH,
    IDS,
    LENGTH,
    MASK,
    PEERS,
    Peer,
    assert_all_close,
    assert_close,
    carried,
    randomize,
)

ROWS = ["one", "__base__", "three", "two", "__base__", "one"]
TARGETS = {
    "gpt2": (["c_attn", "wte"], ["mlp.c_proj", "c_attn"], ["c_fc"]),
    "bert": (["query", "value"], ["key", "output.dense"], ["word_embeddings", "query"]),
    "llama": (["q_proj", "v_proj"], ["down_proj", "q_proj"], ["up_proj", "embed_tokens"]),
}


def settings(name: str) -> dict[str, dict[str, Any]]:
    """Three adapters of different ranks, targets and scalings."""
    one, two, three = TARGETS[name]
    return {
        "one": {"r": 2, "lora_alpha": 3, "target_modules": one},
        "two": {"r": 4, "lora_alpha": 2, "use_rslora": True, "target_modules": two},
        "three": {"r": 3, "lora_alpha": 6, "target_modules": three},
    }


@dataclasses.dataclass(frozen=True, eq=False)
class Three:
    """A model with three adapters in both libraries.

    Attributes:
      peer: the plain model.
      theirs: adapted by `peft`.
      ours: adapted by this library.
      loras: the adapters, carried over.
      configs: of this library.
    """

    peer: Peer
    theirs: Any
    ours: Any
    loras: dict[str, Any]
    configs: dict[str, peft.LoraConfig]

    @functools.cached_property
    def base(self) -> Any:
        return unflatten_dict(self.peer.base, sep="/")

    @functools.cached_property
    def params(self) -> Any:
        params = self.base
        for name, lora in self.loras.items():
            params = peft.add_adapter(params, lora, name)
        return params

    @functools.cached_property
    def specs(self) -> Any:
        return peft.lora_specs(self.ours, *self.peer.inputs)

    def our_logits(self, model: Any, params: Any) -> Any:
        return jax.jit(lambda params: self.peer.our_logits(model, params))(params)

    def their_logits(self) -> Any:
        with torch.no_grad():
            return self.peer.their_logits(self.theirs).numpy()


def three(name: str) -> Three:
    peer = PEERS[name]
    options = {key: {**peer.settings, **own} for key, own in settings(name).items()}
    (first, given), *others = options.items()
    theirs = hf_peft.get_peft_model(peer.torch_model(), hf_peft.LoraConfig(**given), first)
    ours = peft.get_peft_model(peer.ours, peft.LoraConfig(**given), first)
    for key, given in others:
        theirs.add_adapter(key, hf_peft.LoraConfig(**given))
        ours = ours.add_adapter(key, peft.LoraConfig(**given))
    theirs.base_model.set_adapter([*options])
    randomize(theirs)
    loras = {key: their_adapter(peer, theirs, key) for key in options}
    return Three(peer, theirs.eval(), ours, loras, ours.peft_configs)


def their_adapter(peer: Peer, model: Any, name: str) -> Any:
    """One of their adapters as a tree of this library."""

    class Named:
        """Their model as if it had this adapter alone, under the name ``default``."""

        @staticmethod
        def named_parameters(**options: Any) -> Any:
            for path, value in model.named_parameters(**options):
                parts = path.split(".")
                if "lora_" in path and name in parts:
                    parts[len(parts) - 1 - parts[::-1].index(name)] = "default"
                    yield ".".join(parts), value

    return unflatten_dict(carried(peer, Named), sep="/")


MODELS = {name: functools.cache(functools.partial(three, name)) for name in TARGETS}


@pytest.fixture(params=TARGETS)
def given(request: Any) -> Three:
    return MODELS[request.param]()


def rows_of(array: Any) -> Any:
    """Inputs of a batch, for as many rows as have adapters."""
    return np.concatenate([array] * (len(ROWS) // BATCH))


def test_mixed_batches(given: Three) -> None:
    """Each row with an adapter of its own; theirs runs one product for each adapter."""
    ids = np.random.default_rng(3).integers(3, 60, (len(ROWS), LENGTH))
    inputs = tuple(
        ids if value is IDS else rows_of(value) if np.shape(value) == IDS.shape else value
        for value in given.peer.inputs
    )
    assert inputs[0] is ids
    with torch.no_grad():
        expected = given.theirs(
            input_ids=torch.tensor(ids),
            attention_mask=torch.tensor(rows_of(MASK)),
            adapter_names=ROWS,
        ).logits.numpy()
    own = {
        key: peft.lora_specs(peft.get_peft_model(given.peer.ours, config), *given.peer.inputs)
        for key, config in given.configs.items()
    }
    bank = peft.stack_adapters(given.loras, specs=own)
    model = peft.MultiAdapterModel(wrapped=given.peer.ours)
    chosen = bank.select([None if row == "__base__" else row for row in ROWS])
    run = jax.jit(lambda p, s: model.apply({"params": p}, *inputs, adapters=s).logits)
    logits = run(bank.merge(given.base), chosen)
    assert_close(logits, expected)
    plain = run(bank.merge(given.base), bank.select([None] * len(ROWS)))
    assert_close(plain[1], expected[1])
    assert np.max(np.abs(plain[0] - expected[0])) > 1e-2


@pytest.mark.parametrize("names", ["two", ["one", "three"], []], ids=str)
def test_active_adapters(given: Three, names: Any) -> None:
    given.theirs.base_model.set_adapter(names or "one")
    with contextlib.nullcontext() if names else given.theirs.disable_adapter():
        expected = given.their_logits()
    ours = given.ours.set_adapter(names)
    assert_close(given.our_logits(ours, given.params), expected)
    if not names:
        with peft.disable_adapters():
            assert_close(given.our_logits(given.ours, given.params), expected)


@pytest.mark.parametrize("names", [["two"], ["three", "one"]], ids=str)
def test_merged_weights(names: Any) -> None:
    given = three("gpt2" if len(names) == 1 else "llama")
    expected = carried(given.peer, given.theirs.merge_and_unload(adapter_names=names))
    module, merged = given.ours.merge_and_unload(
        given.params, specs=given.specs, adapter_names=names, safe_merge=True
    )
    assert module == given.peer.ours
    assert_all_close(flatten_dict(merged, sep="/"), expected)


def test_deleted_adapters() -> None:
    given = three("bert")
    given.theirs.delete_adapter("two")
    given.theirs.base_model.set_adapter(["one", "three"])
    model, params = given.ours.delete_adapter(given.params, "two")
    assert [*given.theirs.peft_config] == [*model.peft_configs] == ["one", "three"]
    assert_close(given.our_logits(model, params), given.their_logits())
    expected = carried(given.peer, given.theirs.unload())
    plain, left = model.unload(params)
    assert plain == given.peer.ours
    assert_all_close(flatten_dict(left, sep="/"), expected, 0)

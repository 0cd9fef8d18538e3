"""The Flax models of `transformers` take LoRA through the interceptor, train and fuse.

The models are small and random. Each is initialized, trained and fused once (`story`); the tests
look at one property each. Keys are of a kind that compiles fast, for initializing is most of it.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax.traverse_util import flatten_dict

import peft_jax as peft

hf = pytest.importorskip("transformers")
bert = hf.models.bert.modeling_flax_bert
gpt2 = hf.models.gpt2.modeling_flax_gpt2
llama = hf.models.llama.modeling_flax_llama
vit = hf.models.vit.modeling_flax_vit

# GPT-2 has a layer of its own, whose kernel is (out, in).
peft.register_layer(gpt2.FlaxConv1D, equation="...i,oi->...o", bias="bias")

WRAPPERS = {
    nn.Dense: peft.LoRADense,
    gpt2.FlaxConv1D: peft.LoRADense,
    nn.Conv: peft.LoRAConv,
    nn.Embed: peft.LoRAEmbed,
}
STEPS = 6
RANK = 2
VOCAB = 40
BATCH, LENGTH = 2, 6

IDS = np.random.default_rng(0).integers(3, VOCAB, (BATCH, LENGTH))
MASK = np.ones((BATCH, LENGTH), np.int32)
POSITIONS = np.tile(np.arange(LENGTH), (BATCH, 1))
IMAGES = np.random.default_rng(1).normal(size=(BATCH, 8, 8, 3)).astype(np.float32)
SOUND = np.random.default_rng(2).normal(size=(BATCH, 4, 16)).astype(np.float32)

SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
SEQ2SEQ_SIZES = {
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A model of `transformers`.

    Attributes:
      model: its class.
      config: its configuration.
      inputs: what its Linen module is called with.
      input_shape: what its wrapper is built for; None: as the class chooses.
      tied: the embedding that the head reads too; LoRA on it is a test of its own.
      frozen: an adapter that the model itself keeps gradients from.
      remat: whether its layers are checkpointed.
    """

    model: type
    config: Callable[[], Any]
    inputs: tuple[np.ndarray, ...]
    input_shape: tuple[int, ...] | None = (1, LENGTH)
    tied: str | None = None
    frozen: tuple[str, ...] = ()
    remat: bool = False

    def build(self, **config: Any) -> Any:
        """The wrapper around the Linen module, without parameters."""
        settings = self.config()
        settings.update(config)
        shape = {} if self.input_shape is None else {"input_shape": self.input_shape}
        model = self.model(settings, _do_init=False, **shape)
        if self.remat:
            model.enable_gradient_checkpointing()
        return model


BERT = Case(
    hf.FlaxBertForMaskedLM,
    lambda: hf.BertConfig(
        initializer_range=0.2, vocab_size=VOCAB, max_position_embeddings=16, **SIZES
    ),
    (IDS, MASK, np.zeros_like(IDS), POSITIONS, np.ones((2, 2), np.float32)),
    tied="word_embeddings",
)
WHISPER = Case(
    hf.FlaxWhisperForConditionalGeneration,
    lambda: hf.WhisperConfig(
        init_std=0.2,
        vocab_size=VOCAB,
        num_mel_bins=4,
        max_source_positions=8,
        max_target_positions=16,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        begin_suppress_tokens=None,
        **SEQ2SEQ_SIZES,
    ),
    (SOUND, IDS, MASK, POSITIONS),
    input_shape=(1, 4, 16),
    tied="embed_tokens",
    frozen=("model/encoder/embed_positions/lora",),
)
CASES = {
    "gpt2": Case(
        hf.FlaxGPT2LMHeadModel,
        lambda: hf.GPT2Config(
            initializer_range=0.2, vocab_size=VOCAB, n_positions=16, n_embd=16, n_layer=2, n_head=2
        ),
        (IDS, MASK, POSITIONS),
        tied="wte",
    ),
    "bert": BERT,
    "bert, checkpointed": dataclasses.replace(BERT, remat=True),
    "llama": Case(
        hf.FlaxLlamaForCausalLM,
        lambda: hf.LlamaConfig(
            initializer_range=0.2, vocab_size=VOCAB, max_position_embeddings=16, **SIZES
        ),
        (IDS, MASK, POSITIONS),
    ),
    "bart": Case(
        hf.FlaxBartForConditionalGeneration,
        lambda: hf.BartConfig(
            init_std=0.2, vocab_size=VOCAB, max_position_embeddings=16, **SEQ2SEQ_SIZES
        ),
        (IDS, MASK, IDS, MASK, POSITIONS, POSITIONS),
        tied="shared",
    ),
    "whisper": WHISPER,
    "whisper, checkpointed": dataclasses.replace(WHISPER, remat=True),
    "vit": Case(
        hf.FlaxViTForImageClassification,
        lambda: hf.ViTConfig(
            initializer_range=0.2, image_size=8, patch_size=4, num_labels=5, **SIZES
        ),
        (IMAGES,),
        input_shape=None,
    ),
}
every_model = pytest.mark.parametrize("name", CASES)


@dataclasses.dataclass(frozen=True)
class Adapt:
    """LoRA on every layer of the four kinds, but for layers of these names."""

    without: tuple[str | None, ...] = ()
    dropout: float = 0.0

    def __call__(self, module: nn.Module) -> nn.Module:
        wrapper = WRAPPERS.get(type(module))
        if wrapper is None or module.name in self.without:
            return module
        return wrapper(rank=RANK, alpha=3.0, dropout=self.dropout, wrapped=module)


@dataclasses.dataclass(frozen=True)
class AtWeight:
    """LoRA at the weights of every module of one class."""

    kind: type
    params: tuple[str, ...] | None = None

    def __call__(self, module: nn.Module) -> nn.Module:
        if isinstance(module, self.kind):
            return peft.LoRAWeight(rank=RANK, alpha=3.0, wrapped=module, params=self.params)
        return module


def key(seed: int = 0) -> jax.Array:
    return jax.random.key(seed, impl="unsafe_rbg")


def initialized(module: nn.Module, inputs: tuple[np.ndarray, ...]) -> Any:
    return jax.jit(lambda key: module.init(key, *inputs)["params"])(key())


def logits_of(module: nn.Module, inputs: tuple[np.ndarray, ...]) -> Callable[..., jax.Array]:
    return jax.jit(lambda params: module.apply({"params": params}, *inputs).logits)


def noisy(lora: Any) -> Any:
    """Adapters as after training: no zeros in `b`."""
    leaves, treedef = jax.tree.flatten(lora)
    rng = np.random.default_rng(3)
    noise = [jnp.asarray(0.1 * rng.normal(size=leaf.shape), leaf.dtype) for leaf in leaves]
    return jax.tree.unflatten(treedef, [a + b for a, b in zip(leaves, noise, strict=True)])


def assert_close(actual: Any, expected: Any) -> None:
    """1e-5, relative to the largest value of each array."""

    def check(actual: jax.Array, expected: jax.Array) -> None:
        np.testing.assert_allclose(
            actual, expected, rtol=1e-5, atol=1e-5 * float(np.max(np.abs(expected)))
        )

    jax.tree.map(check, actual, expected)


def slashed(tree: Any) -> dict[str, jax.Array]:
    return flatten_dict(tree, sep="/")


def kernels(params: Any, *, without: tuple[str | None, ...] = ()) -> set[str]:
    """Paths of the adapters that kernels and embeddings of a plain tree shall get."""
    paths = [path.split("/") for path in slashed(params)]
    return {
        "/".join((*path[:-1], "lora"))
        for path in paths
        if path[-1] in ("kernel", "embedding") and path[-2] not in without
    }


@dataclasses.dataclass(frozen=True)
class Story:
    """What became of a model: made, adapted, trained, fused."""

    module: nn.Module
    rule: Adapt
    plain: Any
    base: Any
    lora: Any
    specs: dict[str, peft.LoraSpec]
    logits: Callable[..., jax.Array]
    losses: list[float]
    grads: list[Any]
    traces: int
    trained: Any


@functools.cache
def story(name: str) -> Story:
    case = CASES[name]
    module, rule = case.build().module, Adapt(without=(case.tied,))
    plain = initialized(module, case.inputs)
    with peft.ModuleInterceptor(rule):
        params = initialized(module, case.inputs)
        specs = peft.lora_specs(module, *case.inputs)
    base, lora = peft.split_params(params)

    optimizer = optax.adam(3e-2)

    traces = 0

    @jax.jit
    def step(base: Any, lora: Any, state: Any) -> tuple[Any, ...]:
        nonlocal traces
        traces += 1

        def loss(lora: Any) -> jax.Array:
            params = peft.merge_params(base, lora)
            logits = module.apply({"params": params}, *case.inputs).logits
            labels = IDS[:, 0] if logits.ndim == 2 else IDS
            labels = labels % logits.shape[-1]
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        value, grads = jax.value_and_grad(loss)(lora)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(lora, updates), state, value, grads

    trained, state = lora, optimizer.init(lora)
    losses, grads = [], []
    for _ in range(STEPS):
        with peft.ModuleInterceptor(Adapt(without=(case.tied,))):  # an equal rule, built anew
            trained, state, value, grad = step(base, trained, state)
        losses.append(float(value))
        grads.append(grad)
    logits = logits_of(module, case.inputs)
    return Story(module, rule, plain, base, lora, specs, logits, losses, grads, traces, trained)


# --- What an adapted model is --------------------------------------------------------------------


@every_model
def test_every_layer_is_adapted_at_its_own_path(name: str) -> None:
    told = story(name)
    expected = kernels(told.plain, without=(CASES[name].tied,))
    assert len(expected) >= 8
    assert set(told.specs) == expected
    leaves = {f"{path}/{leaf}" for path in expected for leaf in "ab"}
    assert set(slashed(told.lora)) == leaves


@every_model
def test_initial_values_of_the_base_are_those_of_the_plain_model(name: str) -> None:
    told = story(name)
    chex.assert_trees_all_equal_structs(told.base, told.plain)
    chex.assert_trees_all_equal(told.base, told.plain)


@every_model
def test_nothing_changes_at_the_start(name: str) -> None:
    told = story(name)
    expected = told.logits(told.plain)
    with peft.ModuleInterceptor(told.rule):
        actual = told.logits(peft.merge_params(told.plain, told.lora))
    assert_close(actual, expected)


@every_model
def test_the_loss_falls(name: str) -> None:
    losses = story(name).losses
    assert np.all(np.isfinite(losses))
    assert losses[-1] < 0.8 * losses[0]


@every_model
def test_steps_under_equal_rules_are_traced_once(name: str) -> None:
    assert story(name).traces == 1


@every_model
def test_gradients_reach_every_adapter(name: str) -> None:
    told = story(name)
    first, last = slashed(told.grads[0]), slashed(told.grads[-1])
    for path in told.specs:
        reached = path not in CASES[name].frozen
        assert bool(jnp.any(first[f"{path}/b"] != 0)) == reached, path
        assert bool(jnp.any(last[f"{path}/a"] != 0)) == reached, path
        assert bool(jnp.any(last[f"{path}/b"] != 0)) == reached, path


@every_model
def test_the_plain_model_gives_the_same_answers_on_fused_weights(name: str) -> None:
    told = story(name)
    params = peft.merge_params(told.base, told.trained)
    with peft.ModuleInterceptor(told.rule):
        expected = told.logits(params)
    fused = peft.fuse_params(params, specs=told.specs)
    chex.assert_trees_all_equal_shapes_and_dtypes(fused, told.plain)
    assert_close(told.logits(fused), expected)
    assert not np.allclose(told.logits(told.plain), expected, rtol=1e-2)


@every_model
def test_fused_weights_are_taken_apart_again(name: str) -> None:
    told = story(name)
    fused = peft.fuse_params(peft.merge_params(told.base, told.trained), specs=told.specs)
    back = peft.unfuse_params(fused, lora=told.trained, specs=told.specs)
    assert_close(peft.split_params(back).original, told.base)
    exactly = peft.unfuse_params(fused, original=told.base, lora=told.trained, specs=told.specs)
    chex.assert_trees_all_equal(exactly, peft.merge_params(told.base, told.trained))


@pytest.mark.parametrize("name", ["gpt2", "whisper", "vit"])
def test_adapters_are_recovered_from_fused_weights(name: str) -> None:
    told = story(name)
    fused = peft.fuse_params(peft.merge_params(told.base, told.trained), specs=told.specs)
    found = peft.unfuse_params(fused, original=told.base, specs=told.specs, rank=RANK)
    chex.assert_trees_all_equal_shapes(peft.split_params(found).lora, told.trained)
    assert_close(peft.fuse_params(found, specs=told.specs), fused)


@pytest.mark.parametrize("name", ["bert, checkpointed", "vit"])
def test_dropout_masks_of_the_base_stay(name: str) -> None:
    told, inputs = story(name), CASES[name].inputs

    @jax.jit
    def logits(params: Any) -> jax.Array:
        rngs = {"dropout": key(5)}
        variables = {"params": params}
        return told.module.apply(variables, *inputs, deterministic=False, rngs=rngs).logits

    expected = logits(told.plain)
    rule = dataclasses.replace(told.rule, dropout=0.5)
    with peft.ModuleInterceptor(rule):
        start = logits(peft.merge_params(told.base, told.lora))
        trained = logits(peft.merge_params(told.base, told.trained))
    with peft.ModuleInterceptor(told.rule):
        undropped = logits(peft.merge_params(told.base, told.trained))
    assert_close(start, expected)
    assert not np.allclose(trained, undropped, rtol=1e-2)


@pytest.mark.parametrize("name", ["bert", "whisper"])
def test_checkpointing_changes_nothing(name: str) -> None:
    told, checkpointed = story(name), story(f"{name}, checkpointed")
    assert told.specs == checkpointed.specs
    chex.assert_trees_all_equal(told.lora, checkpointed.lora)
    np.testing.assert_allclose(told.losses, checkpointed.losses, rtol=1e-5)


def test_checkpointed_layers_are_recomputed_with_their_adapters() -> None:
    told = story("bert, checkpointed")
    params = peft.merge_params(told.base, told.trained)
    with peft.ModuleInterceptor(told.rule):
        jaxpr = jax.make_jaxpr(jax.grad(lambda params: told.logits(params).sum()))(params)
    assert "remat" in str(jaxpr) or "checkpoint" in str(jaxpr)


# --- Heads tied to embeddings --------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.tied])
def test_tied_heads_have_no_parameters_and_no_adapter(name: str) -> None:
    told = story(name)
    with peft.ModuleInterceptor(Adapt()):
        specs = peft.lora_specs(told.module, *CASES[name].inputs)
    assert set(specs) == kernels(told.plain)
    assert not any("lm_head" in path or "decoder/kernel" in path for path in slashed(told.lora))


@pytest.mark.parametrize(
    ("name", "table", "head"),
    [
        ("gpt2", "transformer/wte", "lm_head"),
        ("bart", "model/shared", "lm_head"),
    ],
)
def test_an_adapted_embedding_leaves_the_head_that_is_tied_to_it_alone(
    name: str, table: str, head: str
) -> None:
    # The head reads the stored table by `.variables`: it keeps the pretrained one, as in an untied
    # model with the adapted table below and the pretrained one on top.
    case, told = CASES[name], story(name)
    with peft.ModuleInterceptor(Adapt()):
        params = initialized(told.module, case.inputs)
        specs = peft.lora_specs(told.module, *case.inputs)
        base, lora = peft.split_params(params)
        params = peft.merge_params(base, noisy(lora))
        expected = told.logits(params)
    fused = peft.fuse_params(params, specs=specs)
    untied = case.build(tie_word_embeddings=False).module
    kernel = slashed(base)[f"{table}/embedding"].T
    assert_close(logits_of(untied, case.inputs)({**fused, head: {"kernel": kernel}}), expected)


# --- Adapters at the weight ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "rule", "expected"),
    [
        ("gpt2", AtWeight(gpt2.FlaxGPT2MLP), 4),
        ("bert", AtWeight(bert.FlaxBertAttention), 8),
        ("bert, checkpointed", AtWeight(bert.FlaxBertAttention), 8),
        ("bert, checkpointed", AtWeight(bert.FlaxBertLayer, ("query/kernel", "value/kernel")), 4),
        ("llama", AtWeight(llama.FlaxLlamaDecoderLayer), 14),
        ("vit", AtWeight(vit.FlaxViTEmbeddings), 3),
        ("vit", AtWeight(vit.FlaxViTForImageClassificationModule, ("projection/kernel",)), 1),
    ],
)
def test_modules_are_adapted_at_their_weights(name: str, rule: AtWeight, expected: int) -> None:
    told, inputs = story(name), CASES[name].inputs
    with peft.ModuleInterceptor(rule):
        params = initialized(told.module, inputs)
        specs = peft.lora_specs(told.module, *inputs)
        base, lora = peft.split_params(params)
        params = peft.merge_params(base, noisy(lora))
        start = told.logits(peft.merge_params(base, lora))
        adapted = told.logits(params)
        grads = jax.grad(lambda params: jnp.square(told.logits(params)).sum())(params)
    assert len(specs) == expected
    chex.assert_trees_all_equal(base, told.plain)
    assert_close(start, told.logits(told.plain))
    assert_close(told.logits(peft.fuse_params(params, specs=specs)), adapted)
    assert not np.allclose(adapted, start, rtol=1e-3)
    for path, grad in slashed(peft.split_params(grads).lora).items():
        assert bool(jnp.any(grad != 0)), path


# --- Through the wrappers of `transformers` ------------------------------------------------------


def wrapper_call(model: Any, inputs: tuple[np.ndarray, ...], params: Any) -> jax.Array:
    names = ("input_ids", "attention_mask")
    if isinstance(model, hf.FlaxBartForConditionalGeneration):
        names += ("decoder_input_ids",)
    given = dict(zip(names, inputs, strict=False))
    return jax.jit(lambda params: model(**given, params=params).logits)(params)


@pytest.mark.parametrize("name", ["gpt2", "bert, checkpointed", "bart"])
def test_the_model_itself_is_called_with_adapters(name: str) -> None:
    case, told = CASES[name], story(name)
    model, params = case.build(), peft.merge_params(told.base, told.trained)
    with peft.ModuleInterceptor(told.rule):
        expected = told.logits(params)
        assert_close(wrapper_call(model, case.inputs, params), expected)
    fused = peft.fuse_params(params, specs=told.specs)
    assert_close(wrapper_call(model, case.inputs, fused), expected)


def test_the_model_itself_makes_the_adapters() -> None:
    case, told = CASES["gpt2"], story("gpt2")
    init = jax.jit(lambda key: case.build().init_weights(key, (1, LENGTH)))
    plain = init(key())
    with peft.ModuleInterceptor(told.rule):
        params = init(key())
    chex.assert_trees_all_equal(peft.split_params(params).original, plain)
    chex.assert_trees_all_equal_shapes(peft.split_params(params).lora, told.lora)


def test_the_model_itself_holds_the_adapters() -> None:
    case, told = CASES["gpt2"], story("gpt2")
    model = case.model(case.config(), input_shape=(1, LENGTH), seed=0)
    base = model.params
    with peft.ModuleInterceptor(told.rule):
        with pytest.raises(ValueError, match="hold no adapter at 'transformer/"):
            model(IDS)
        params = peft.merge_params(base, told.trained)
        model.params = params
        expected = model(IDS).logits
    model.params = peft.fuse_params(params, specs=told.specs)
    assert_close(model(IDS).logits, expected)


@pytest.mark.parametrize("name", ["gpt2", "bart", "whisper"])
def test_generated_text_is_that_of_the_fused_model(name: str) -> None:
    # Text after a sound is made from `encode` and `decode`, functions that run on the bound model.
    case, told = CASES[name], story(name)
    model = case.build()

    @jax.jit
    def generate(params: Any) -> jax.Array:
        return model.generate(
            case.inputs[0], params=params, max_length=LENGTH + 5, do_sample=False, num_beams=1
        ).sequences

    params = peft.merge_params(told.base, told.trained)
    with peft.ModuleInterceptor(told.rule):
        adapted = generate(params)
    np.testing.assert_array_equal(generate(peft.fuse_params(params, specs=told.specs)), adapted)
    assert not np.array_equal(generate(told.plain), adapted)

"""EVA and CorDA look at data as Hugging Face's peft does."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import peft as hf
import pytest
import torch
from flax import linen as nn
from peft.tuners.lora import corda as hf_corda
from peft.utils.incremental_pca import IncrementalPCA

import peft_jax as peft

SIZES = {"first": (12, 16), "second": (16, 16), "third": (16, 6)}


class Torch(torch.nn.Module):
    def __init__(self):
        super().__init__()
        for name, (inputs, outputs) in SIZES.items():
            setattr(self, name, torch.nn.Linear(inputs, outputs))

    def forward(self, x):
        return self.third(torch.tanh(self.second(torch.tanh(self.first(x)))))


class Flax(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = jnp.tanh(nn.Dense(16, name="first")(x))
        return nn.Dense(6, name="third")(jnp.tanh(nn.Dense(16, name="second")(x)))


@pytest.fixture
def twins():
    """Both models with the same weights, and batches of falling variance."""
    torch.manual_seed(0)
    model = Torch()
    params = {
        name: {
            "kernel": jnp.asarray(getattr(model, name).weight.detach().numpy().T),
            "bias": jnp.asarray(getattr(model, name).bias.detach().numpy()),
        }
        for name in SIZES
    }
    rng = np.random.default_rng(0)
    decay = 2.0 ** -np.arange(12)
    batches = [(rng.normal(size=(200, 12)) * decay).astype(np.float32) for _ in range(4)]
    return model, params, batches


def settings_of(rho, tau, whiten=False):
    fields = {"r": 2, "target_modules": list(SIZES), "init_lora_weights": "eva"}
    eva = {"rho": rho, "whiten": whiten, "tau": tau}
    theirs = hf.LoraConfig(**fields, eva_config=hf.EvaConfig(**eva))
    return theirs, peft.LoraConfig(**fields, eva_config=peft.EvaConfig(**eva))


def cosines(found, expected):
    lengths = np.linalg.norm(found, axis=1) * np.linalg.norm(expected, axis=1)
    return np.abs(np.sum(found * expected, axis=1)) / lengths


@pytest.mark.parametrize("rho", [1.0, 2.0])
def test_ranks_and_directions_are_those_of_peft(twins, rho):
    """peft stops each layer by itself, so that the directions agree as far as they have settled."""
    model, params, batches = twins
    theirs, ours = settings_of(rho, tau=0.999)
    expected = hf.tuners.lora.eva.get_eva_state_dict(
        model,
        [torch.from_numpy(batch) for batch in batches],
        theirs,
        forward_fn=lambda model, inputs: model(inputs),
        prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=None,
        show_progress_bar=False,
    )
    found = peft.get_eva_state_dict(Flax(), params, itertools.cycle(batches), ours)
    for name, components in expected.items():
        state = np.asarray(found[f"{name}/lora"])
        assert state.shape == components.shape
        assert cosines(state, components.numpy()).min() > 0.98


@pytest.mark.parametrize("whiten", [False, True])
def test_components_are_those_of_pefts_incremental_analysis(twins, whiten):
    model, params, batches = twins
    _, ours = settings_of(1.0, tau=1.0, whiten=whiten)
    found = peft.get_eva_state_dict(Flax(), params, batches, ours)
    analyses = {name: IncrementalPCA(n_components=2) for name in SIZES}
    for batch in batches:
        x = torch.from_numpy(batch)
        for name, analysis in analyses.items():
            analysis.partial_fit(x.detach())
            x = torch.tanh(getattr(model, name)(x))
    for name, analysis in analyses.items():
        expected = analysis.components_
        if whiten:
            expected = expected / analysis.singular_values_.sqrt().reshape(-1, 1)
        state, expected = np.asarray(found[f"{name}/lora"]), expected.numpy()
        signs = np.sign(np.sum(state * expected, axis=1, keepdims=True))
        np.testing.assert_allclose(state * signs, expected, atol=1e-4)


@pytest.mark.parametrize("mode", ["ipm", "kpm"])
def test_corda_from_data_gives_the_same_product_and_base(twins, mode):
    model, params, batches = twins
    fields = {"r": 2, "lora_alpha": 4, "target_modules": list(SIZES), "init_lora_weights": "corda"}
    config = hf.LoraConfig(
        **fields, corda_config=hf.tuners.lora.config.CordaConfig(corda_method=mode)
    )

    def run_model():
        for batch in batches:
            model(torch.from_numpy(batch)[None])

    hf_corda.preprocess_corda(model, config, run_model=run_model)
    adapted = hf.get_peft_model(model, config)

    ours = peft.LoraConfig(**fields, corda_config=peft.CordaConfig(corda_method=mode))
    specs = peft.lora_specs(peft.get_peft_model(Flax(), ours), batches[0][None])
    covariances = peft.collect_covariances(
        Flax(), params, [batch[None] for batch in batches], ours, specs=specs
    )
    base, lora = peft.init_lora_weights(
        params,
        specs,
        jax.random.key(0),
        method="corda",
        config=ours.corda_config,
        statistics=covariances,
    )
    for name in SIZES:
        layer = getattr(adapted.base_model.model, name)
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        product = (b @ a).detach().numpy().T
        found = np.asarray(lora[name]["lora"]["a"] @ lora[name]["lora"]["b"])
        scale = np.abs(product).max()
        np.testing.assert_allclose(found / scale, product / scale, atol=1e-3)
        residual = layer.base_layer.weight.detach().numpy().T
        np.testing.assert_allclose(base[name]["kernel"], residual, atol=1e-3 * scale)

"""What version 0.1 wrote, before the package had wings, loads and gives the numbers of then.

tests/data/version_0_1 has an adapter in Hugging Face's layout, specs of adapters and layers (JSON),
an orbax checkpoint (4-bit base and adapters, with specs and config), encodings in AIMET's schema
with the metadata of the adapters, and a pickle. arrays.npz has the base and what the adapted model
gave.
"""

import json
import pickle
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import linen as nn
from flax.traverse_util import unflatten_dict
from helpers import assert_close

import peft_jax as peft
from peft_jax import quantsim

DATA = Path(__file__).parents[1] / "data" / "version_0_1"


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        h = nn.DenseGeneral((2, 4), name="query")(x)
        h = nn.DenseGeneral(8, axis=(-2, -1), name="out")(nn.tanh(h))
        return x + nn.Dense(8, name="up")(h)


class Model(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(11, 8, name="embed")(tokens)
        for i in range(2):
            x = Block(name=f"layers_{i}")(x)
        return nn.Dense(3, name="head")(x)


@pytest.fixture(scope="module")
def arrays():
    return dict(np.load(DATA / "arrays.npz"))


@pytest.fixture(scope="module")
def base(arrays):
    flat = {name: leaf for name, leaf in arrays.items() if name.startswith("base/")}
    return unflatten_dict({tuple(name.split("/")[1:]): leaf for name, leaf in flat.items()})


@pytest.fixture(scope="module")
def specs():
    data = json.loads((DATA / "specs.json").read_text())
    return {name: peft.LoraSpec.from_dict(spec) for name, spec in data.items()}


@pytest.fixture(scope="module")
def layer_specs():
    data = json.loads((DATA / "layer_specs.json").read_text())
    return {name: peft.LayerSpec.from_dict(spec) for name, spec in data.items()}


@pytest.fixture(scope="module")
def config():
    return peft.LoraConfig(
        r=2,
        lora_alpha=4,
        target_modules="all-linear",
        use_rslora=True,
        use_dora=True,
        rank_pattern={"up": 3},
    )


@pytest.fixture(scope="module")
def model(config):
    return peft.get_peft_model(Model(), config)


def outputs(model, params, tokens):
    return jax.jit(model.apply)({"params": params}, tokens)


def test_specs_are_those_of_the_model(model, specs, layer_specs, arrays):
    assert peft.lora_specs(model, arrays["tokens"]) == specs
    assert peft.layer_specs(Model(), arrays["tokens"]) == layer_specs


def test_adapter(base, specs, arrays):
    lora, config = peft.load_adapter(DATA / "adapter", specs=specs)
    model = peft.get_peft_model(Model(), config)  # with the targets that the file names
    adapted = outputs(model, peft.merge_params(base, lora), arrays["tokens"])
    assert_close(adapted, arrays["outputs"], 1e-5)


def test_orbax_checkpoint(model, config, base, specs, layer_specs, arrays):
    tree, *saved = peft.restore_orbax(DATA / "orbax")
    assert saved == [specs, config]
    stored, lora = peft.split_params(tree)
    again = peft.quantize_checkpoint(base, method="int4", specs=layer_specs)
    jax.tree.map(np.testing.assert_array_equal, stored, again)
    adapted = outputs(model, peft.merge_params(base, lora), arrays["tokens"])
    assert_close(adapted, arrays["outputs"], 1e-5)


def test_encodings(base, arrays):
    adapted = peft.get_peft_model(
        Model(), peft.LoraConfig(r=2, lora_alpha=4, target_modules=["up", "head"])
    )
    sim = quantsim.simulate(adapted, quantsim.SimulationConfig())
    tokens = arrays["tokens"]
    metadata = quantsim.AdapterMetadata.load(DATA / "metadata.json")
    assert metadata == quantsim.adapter_metadata(peft.lora_specs(adapted, tokens))
    sites = quantsim.find_sites(sim, tokens)
    files = [DATA / "encodings" / f"{part}.encodings" for part in ("base", "adapter")]
    encodings = quantsim.merge_encodings(*(quantsim.load_encodings(f, sites) for f in files))
    params = adapted.init(jax.random.key(0), tokens)["params"]
    params = peft.merge_params(base, peft.split_params(params)[1])
    params = quantsim.use_adapter(params, DATA / "encodings" / "adapter.safetensors", metadata)
    found = jax.jit(sim.apply)({"params": params}, tokens, encodings=encodings)
    # A number on the edge between two codes may fall to either side: a step of the output's grid.
    expected = np.load(DATA / "simulated.npz")["outputs"]
    step = (expected.max() - expected.min()) / 255
    np.testing.assert_allclose(found, expected, rtol=0, atol=1.001 * step)


def test_pickle(specs, layer_specs, config):
    kept = pickle.loads((DATA / "objects.pickle").read_bytes())
    assert (kept["specs"], kept["layer_specs"]) == (specs, layer_specs)
    assert kept["config"] == config
    assert hash(kept["config"]) == hash(config)
    assert kept["method"] is peft.QuantizationMethod.Q4_0
    assert (kept["eva"], kept["loftq"]) == (peft.EvaConfig(), peft.LoftQConfig())
    assert isinstance(kept["stored"]["kernel"], peft.StoredValues)
    assert isinstance(kept["bank"], peft.AdapterBank)
    assert isinstance(kept["stack"], peft.SharedStack)
    assert "default" in str(kept["status"])
    assert "layers_0/up" in str(kept["summary"])


def test_what_is_pickled_now_loads_where_hashes_of_strings_differ(config):
    hash(config)
    again = pickle.loads(pickle.dumps(config))
    assert "_hash" not in vars(again)
    assert again == config

"""Files and flow of quantized adapters against AIMET's, for the same model and the same inputs."""

import dataclasses
import functools
import json
from typing import Any

import aimet_peer as aimet
import jax.numpy as jnp
import numpy as np
import peft as hf_peft
import pytest
import torch
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

import peft_jax as peft
from peft_jax import quantsim
from peft_jax.quantsim import Quantizer, SimulationConfig

# What AIMET and torch call within their own exports is deprecated by themselves.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:To copy construct from a tensor:UserWarning"),
]
Flat = dict[str, Any]
NOTHING = SimulationConfig(None, None, None, None, None, None)
SHAPE, BLOCK = (8, 6), 2


# --- Entries -------------------------------------------------------------------------------------

SHARING = {
    "tensor": ((), None),
    "channel": ((1, SHAPE[1]), None),
    "block": ((SHAPE[0] // BLOCK, SHAPE[1]), (BLOCK, 1)),
}
WEIGHT = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
WEIGHTS = {"normal": WEIGHT, "positive": np.abs(WEIGHT), "negative": -np.abs(WEIGHT)}


def their_entry(array: Any, quantizer: Any) -> Flat:
    """What AIMET writes of a quantizer, calibrated on one array."""
    tensor = torch.tensor(np.asarray(array))
    with quantizer.compute_encodings():
        quantizer(tensor)
    # Which axis has the blocks follows from the shape of what is quantized.
    encoding = quantizer.get_encodings()._hint_input_shape(tensor.shape)
    return encoding.to_qnn_encoding_dict("1.0.0")


def our_entries(path: Any) -> Flat:
    data = json.loads(path.read_bytes())
    entries = [*data["activation_encodings"], *data["param_encodings"]]
    return {entry.pop("name"): entry for entry in entries}


@pytest.mark.parametrize("bitwidth", [2, 4, 8, 16])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
@pytest.mark.parametrize("granularity", SHARING)
def test_entries_of_weights(bitwidth, symmetric, signed, granularity, tmp_path):
    """Key by key; AIMET writes those of a signed quantizer as it does those of an unsigned one."""
    shape, block_size = SHARING[granularity]
    own = Quantizer(
        bitwidth,
        symmetric=symmetric,
        granularity=granularity,
        block_size=BLOCK if block_size else None,
    )
    sim = quantsim.simulate(nn.Dense(SHAPE[1]), dataclasses.replace(NOTHING, weights=own))
    for weight in WEIGHTS.values():
        params = {"kernel": jnp.asarray(weight), "bias": jnp.zeros(SHAPE[1])}
        encodings = quantsim.compute_encodings(sim, params, [jnp.ones((1, SHAPE[0]))])
        entries = our_entries(quantsim.export_base(tmp_path, params, encodings)[1])
        theirs = aimet.affine.QuantizeDequantize(shape, bitwidth, symmetric, block_size=block_size)
        theirs.signed = signed
        assert entries == {"kernel": their_entry(weight, theirs)}


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_entries_of_inputs(symmetric, granularity, tmp_path):
    """Channels lie along the last axis. AIMET has no entries for blocks alone, without channels."""
    own = Quantizer(8, symmetric=symmetric, granularity=granularity)
    sim = quantsim.simulate(nn.Dense(2), dataclasses.replace(NOTHING, inputs=own))
    params = {"kernel": jnp.ones((SHAPE[1], 2)), "bias": jnp.zeros(2)}
    batches = [jnp.asarray(WEIGHT[:3]), jnp.asarray(WEIGHT[3:])]
    encodings = quantsim.compute_encodings(sim, params, batches)
    entries = our_entries(quantsim.export_base(tmp_path, params, encodings)[1])
    theirs = aimet.affine.QuantizeDequantize(SHARING[granularity][0], 8, symmetric)
    assert entries == {"input": their_entry(WEIGHT, theirs)}


# --- The flow ------------------------------------------------------------------------------------


class TorchNet(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = torch.nn.Linear(4, 6), torch.nn.Linear(6, 4)
        self.relu = torch.nn.ReLU()

    def forward(self, x: Any) -> Any:
        return self.two(self.relu(self.one(x)))


class FlaxNet(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        return nn.Dense(4, name="two")(nn.relu(nn.Dense(6, name="one")(x)))


NAMES = {
    "one/kernel": "one.base_layer.weight",
    "one/bias": "one.base_layer.bias",
    "one/lora/a": "one.lora_A.0.weight",
    "one/lora/b": "one.lora_B.0.weight",
    "two/kernel": "two.weight",
    "two/bias": "two.bias",
}
SETTINGS = {"r": 2, "lora_alpha": 4, "target_modules": ["one"], "init_lora_weights": False}
CONFIG = SimulationConfig(adapter_weights=Quantizer(8, symmetric=True, granularity="channel"))
IN_ALL = np.random.default_rng(1).normal(size=(16, 4)).astype(np.float32)


@dataclasses.dataclass(frozen=True, eq=False)
class Both:
    """The two-layer model with an adapter in both libraries, calibrated by both."""

    theirs: Any
    directory: Any
    flat: Flat
    base: Any
    encodings: Any

    @property
    def params(self) -> Any:
        return unflatten_dict({k: jnp.asarray(v) for k, v in self.flat.items()}, sep="/")

    def module(self, path: str) -> Any:
        """AIMET's module of one of our parameters."""
        return self.theirs.model.get_submodule(f"base_model.model.{NAMES[path].rpartition('.')[0]}")


@functools.cache
def adapted() -> nn.Module:
    return peft.get_peft_model(FlaxNet(), peft.LoraConfig(**SETTINGS))


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("aimet")
    model = hf_peft.get_peft_model(TorchNet(), hf_peft.LoraConfig(**SETTINGS)).eval()
    aimet.lora.replace_lora_layers_with_quantizable_layers(model)
    metadata = aimet.lora.track_lora_meta_data(model, str(directory), "meta")
    tensors = dict(model.named_parameters())
    flat = {
        path: np.ascontiguousarray(tensors[f"base_model.model.{name}"].detach().numpy().T)
        for path, name in NAMES.items()
    }
    x = torch.tensor(IN_ALL)
    scheme = aimet.defs.QuantScheme.min_max
    theirs = aimet.quantsim.QuantizationSimModel(model, x, quant_scheme=scheme)
    theirs.compute_encodings(lambda model, _: model(x), None)
    theirs.export(str(directory), "model", dummy_input=x)
    assert set(metadata) == {"default"}

    sim = quantsim.simulate(adapted(), CONFIG)
    params = unflatten_dict({path: jnp.asarray(array) for path, array in flat.items()}, sep="/")
    batches = [jnp.asarray(IN_ALL[:5]), jnp.asarray(IN_ALL[5:])]
    with peft.disable_adapters():
        base = quantsim.compute_encodings(sim, params, batches)
    base = quantsim.freeze(base)
    encodings = quantsim.compute_encodings(sim, params, batches, encodings=base)
    return Both(theirs, directory, flat, base, encodings)


def ours_flat(encodings: Any) -> Flat:
    is_one = lambda _, node: isinstance(node, quantsim.Encoding)  # noqa: E731
    return flatten_dict(encodings, sep="/", is_leaf=is_one)


def assert_same_grid(ours: Any, theirs: Any, tolerance: float = 0.0) -> None:
    """Scales, row after row, and offsets for codes from 0."""
    entry = theirs.to_qnn_encoding_dict("1.0.0")
    assert (ours.bitwidth, ours.symmetric) == (entry["bw"], entry["is_sym"])
    np.testing.assert_allclose(np.ravel(ours.scale), np.float32(entry["scale"]), rtol=tolerance)
    np.testing.assert_array_equal(np.ravel(ours.offset), entry["offset"])


PARAMETERS = [path for path in NAMES if not path.endswith("bias")]


@pytest.mark.parametrize("path", PARAMETERS)
def test_encodings_of_parameters(path, both):
    theirs = both.module(path).param_quantizers["weight"].get_encodings()
    assert_same_grid(ours_flat(both.encodings)[path], theirs)


def test_the_encoding_of_the_models_input(both):
    theirs = both.module("one/kernel").input_quantizers[0].get_encodings()
    assert_same_grid(ours_flat(both.encodings)["one/input"], theirs)


def test_the_encoding_of_the_scaling(both):
    (multiply,) = (
        module for name, module in both.theirs.model.named_modules() if name.endswith("mul_scale")
    )
    theirs = multiply.input_quantizers[1].get_encodings()
    assert_same_grid(ours_flat(both.encodings)["one/lora/scaling"], theirs)


def their_grid(values: Any) -> Any:
    """AIMET's encoding for these values, as a layer's output has it."""
    quantizer = aimet.affine.QuantizeDequantize((), 8, False)
    with quantizer.compute_encodings():
        quantizer(values)
    return quantizer.get_encodings()


def test_encodings_of_what_flows_between_layers(both):
    """From what torch computes with AIMET's weights: watched values pass as they are.

    Those of the base are of the base alone; those of the adapter follow frozen ones, which act.
    """

    def weight(path: str) -> Any:
        module = both.module(path)
        return module.param_quantizers["weight"](module.weight)

    with torch.no_grad():
        x, bias = torch.tensor(IN_ALL), {p: torch.tensor(both.flat[f"{p}/bias"]) for p in NUMBERS}
        one = x @ weight("one/kernel").T + bias["one"]
        seen = torch.relu(one)
        two = seen @ weight("two/kernel").T + bias["two"]
        given = both.module("one/kernel").input_quantizers[0](x)
        hidden = given @ weight("one/lora/a").T
        values = {
            "one/input": x,
            "one/output": one,
            "two/input": seen,
            "two/output": two,
            "one/lora/hidden": hidden,
        }
        found = ours_flat(both.encodings)
        for path, value in values.items():
            assert_same_grid(found[path], their_grid(value), 1e-5)
    assert set(found) == {*values, *PARAMETERS, "one/lora/scaling"}


NUMBERS = ("one", "two")


# --- Files ---------------------------------------------------------------------------------------


def their_document(both: Both) -> Flat:
    """What AIMET's export wrote, of which names of the parameters are ours.

    A parameter of AIMET's layers is called as in torch, or as it is in the ONNX model.
    """
    data = json.loads((both.directory / "model.encodings").read_bytes())
    names = {f"base_model.model.{name}": path for path, name in NAMES.items()}
    found = [
        {**entry, "name": names[entry["name"]]}
        for entry in data["param_encodings"]
        if entry["name"] in names
    ]
    first = both.module("one/kernel").input_quantizers[0].get_encodings()
    inputs = [
        {**entry, "name": "one/input"}
        for entry in data["activation_encodings"]
        if {k: v for k, v in entry.items() if k != "name"} == first.to_qnn_encoding_dict("1.0.0")
    ]
    return {**data, "param_encodings": found, "activation_encodings": inputs[:1]}


def test_documents_of_aimet_are_read(both, tmp_path):
    """With all that AIMET writes beside the two lists."""
    path = tmp_path / "theirs.encodings"
    document = their_document(both)
    path.write_text(json.dumps(document))
    assert {"version", "producer"} <= set(document)
    sim = quantsim.simulate(adapted(), CONFIG)
    read = ours_flat(quantsim.load_encodings(path, quantsim.find_sites(sim, jnp.asarray(IN_ALL))))
    assert set(read) == {*PARAMETERS, "one/input"}
    expected = ours_flat(both.encodings)
    for name, encoding in read.items():
        assert encoding.quantizer == expected[name].quantizer
        np.testing.assert_array_equal(encoding.scale, expected[name].scale)
        np.testing.assert_array_equal(encoding.offset, expected[name].offset)


def test_entries_of_the_two_exports(both, tmp_path):
    """Key by key, where both libraries quantize the same array."""
    params = both.params
    files = [
        quantsim.export_base(tmp_path, params, both.encodings)[1],
        quantsim.export_adapter(tmp_path, params, both.encodings, prefix="one")[1],
    ]
    ours = {name: entry for path in files for name, entry in our_entries(path).items()}
    document = their_document(both)
    theirs = {
        entry["name"]: {k: v for k, v in entry.items() if k != "name"}
        for key in ("activation_encodings", "param_encodings")
        for entry in document[key]
    }
    assert set(theirs) == {*PARAMETERS, "one/input"}
    assert {name: ours[name] for name in theirs} == theirs

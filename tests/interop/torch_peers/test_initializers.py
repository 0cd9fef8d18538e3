"""Adapters start as those of `peft` of Hugging Face (torch) do, for the same weights.

Signs of singular vectors are free, so what is compared is the product of the factors, and the base
that is left. Torch keeps outputs first; see test_peft_torch.
"""

import dataclasses
import math
import sys
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from peft_jax import LoraSpec, dequantize, quantize
from peft_jax._config import CordaConfig, LoftQConfig
from peft_jax.initializers import init_lora_weights, subtract_mutated_init

torch = pytest.importorskip("torch")
hf_peft = pytest.importorskip("peft")

Array = np.ndarray
IN, OUT, RANK, ALPHA = 64, 40, 4, 6.0
SPEC = LoraSpec("kernel", "ir,ro->io", RANK, ALPHA / RANK, ALPHA, kind="dense")
CONV = LoraSpec("kernel", "xyir,ro->xyio", RANK, ALPHA / RANK, ALPHA, kind="conv")
EMBED = LoraSpec("embedding", "vr,rf->vf", RANK, ALPHA / RANK, ALPHA, kind="embed")
KEY = jax.random.key(0)


def weight() -> Array:
    """Of a Linear, with singular values that fall off, so that the first are told apart."""
    rng = np.random.default_rng(0)
    left, right = (np.linalg.qr(rng.normal(size=(n, OUT)))[0] for n in (OUT, IN))
    return (left * 2.0 ** -np.arange(OUT) @ right.T).astype(np.float32)


def model_of(layer: Any) -> Any:
    model = torch.nn.Module()
    model.add_module("layer", layer)
    model.forward = layer.forward
    return model


def linear() -> Any:
    layer = torch.nn.Linear(IN, OUT)
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(weight()))
    return layer


def adapted(layer: Any, method: bool | str, **config: Any) -> Any:
    """The layer of torch with its adapter."""
    settings = hf_peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=["layer"], init_lora_weights=method, **config
    )
    return hf_peft.get_peft_model(model_of(layer), settings)


def read(tensor: Any) -> Array:
    return tensor.detach().numpy().copy()


def parts(model: Any) -> tuple[Array, Array, Array]:
    """The base and the factors of torch, inputs first."""
    layer = model.base_model.model.layer
    factors = (layer.lora_A["default"].weight, layer.lora_B["default"].weight)
    return tuple(read(tensor).T for tensor in (layer.base_layer.weight, *factors))


def ours(method: bool | str, spec: LoraSpec = SPEC, kernel: Any = None, **given: Any) -> Any:
    base = {spec.param: jnp.asarray(weight().T if kernel is None else kernel)}
    new, lora = init_lora_weights(base, {"lora": spec}, KEY, method=method, **given)
    return new[spec.param], lora["lora"]["a"], lora["lora"]["b"]


def assert_close(actual: Any, expected: Any, tolerance: float = 1e-5) -> None:
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * np.abs(expected).max())


def assert_same(found: Any, expected: Any, tolerance: float = 1e-5) -> None:
    """The same base, and the same product of the factors."""
    product = expected[1] @ expected[2]
    assert_close(found[1] @ found[2], product, tolerance)
    scale = max(np.abs(expected[0]).max(), np.abs(product).max())
    np.testing.assert_allclose(found[0], expected[0], rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("method", ["pissa", "pissa_niter_16", "olora"])
def test_decompositions_are_the_same(method: str) -> None:
    assert_same(ours(method), parts(adapted(linear(), method)))


def test_factors_of_pissa_are_as_long() -> None:
    """What divides by the scaling divides both factors alike."""
    (_, a, b), (_, their_a, their_b) = ours("pissa"), parts(adapted(linear(), "pissa"))
    assert_close(np.abs(a), np.abs(their_a), 1e-4)
    assert_close(np.abs(b), np.abs(their_b), 1e-4)


@pytest.mark.parametrize("corda_method", ["ipm", "kpm"])
def test_corda_is_the_same(corda_method: str, monkeypatch: Any) -> None:
    # It imports `attr` for this alone, without depending on it.
    stand_in = types.SimpleNamespace(dataclass=dataclasses.dataclass)
    monkeypatch.setitem(sys.modules, "attr", stand_in)
    from peft.tuners.lora.corda import preprocess_corda

    rng = np.random.default_rng(1)
    x = (rng.normal(size=(256, IN)) * np.linspace(0.5, 2, IN)).astype(np.float32)
    kernel = rng.normal(size=(OUT, IN)).astype(np.float32)
    layer = linear()
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(kernel))
    model = model_of(layer)
    settings = hf_peft.LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        target_modules=["layer"],
        init_lora_weights="corda",
        corda_config=hf_peft.tuners.lora.config.CordaConfig(corda_method=corda_method),
    )
    preprocess_corda(model, settings, run_model=lambda: model.layer(torch.from_numpy(x)))
    expected = parts(hf_peft.get_peft_model(model, settings))
    scaled = x / abs(x.max())
    found = ours(
        "corda",
        kernel=kernel.T,
        config=CordaConfig(corda_method=corda_method),
        statistics={"lora": scaled.T @ scaled},
    )
    assert_same(found, expected, 1e-4)


def test_products_of_orthogonal_factors_are_zero_and_as_long() -> None:
    spec = LoraSpec("kernel", "ir,ro->io", 32)
    kernel = np.zeros((256, 200), np.float32)
    _, a, b = ours("orthogonal", spec, kernel)
    settings = hf_peft.LoraConfig(r=32, target_modules=["layer"], init_lora_weights="orthogonal")
    model = hf_peft.get_peft_model(model_of(torch.nn.Linear(256, 200)), settings)
    _, their_a, their_b = parts(model)
    for one, other in ((a, b), (their_a, their_b)):
        np.testing.assert_allclose(one @ other, 0, atol=1e-5)
    for one, other in ((a, their_a), (b, their_b)):
        np.testing.assert_allclose(np.std(one), np.std(other), rtol=0.05)


class OnCpu(torch.Tensor):
    """Stays on the CPU. LoftQ of `peft` sends weights to an accelerator, also if there is none."""

    def to(self, *args: Any, **kwargs: Any) -> Any:
        return self


def bitsandbytes(method: str) -> Any:
    """What LoftQ of `peft` uses of bitsandbytes, around the quantizer of this library."""

    class Params4bit:
        def __init__(self, x: Any, **settings: Any) -> None:
            self.data, self.quant_state = quantize(jnp.asarray(x.numpy().T), method)

        def to(self, device: str) -> Any:
            return self

    def dequantize_4bit(values: Any, scale: Any) -> Any:
        return torch.from_numpy(np.array(dequantize(values, scale)).T.copy())

    module: Any = types.ModuleType("bitsandbytes")
    module.nn = types.SimpleNamespace(Params4bit=Params4bit)
    module.functional = types.SimpleNamespace(dequantize_4bit=dequantize_4bit)
    return module


@pytest.mark.parametrize("iterations", [1, 3])
@pytest.mark.parametrize("method", ["nf4", "q4_0", "int8"])
def test_loftq_takes_the_same_turns(method: str, iterations: int, monkeypatch: Any) -> None:
    """Its iteration, around one quantizer; its scaling must be 1 to be exact."""
    from peft.utils import loftq_utils

    monkeypatch.setattr(loftq_utils, "is_bnb_available", lambda: True)
    monkeypatch.setattr(loftq_utils, "is_bnb_4bit_available", lambda: True)
    monkeypatch.setitem(sys.modules, "bitsandbytes", bitsandbytes(method))
    kernel = np.random.default_rng(0).normal(size=(IN, 96)).astype(np.float32)
    weight = torch.from_numpy(kernel.T.copy()).as_subclass(OnCpu)
    base, lora_a, lora_b = loftq_utils.loftq_init(weight, 4, RANK, iterations)
    config = LoftQConfig(method=method, loftq_iter=iterations)
    found = ours("loftq", SPEC, kernel, config=config)
    assert_close(found[0], read(base).T)
    assert_close(SPEC.scaling * found[1] @ found[2], read(lora_a).T @ read(lora_b).T, 1e-4)


@pytest.mark.parametrize("method", [True, "gaussian"])
def test_random_numbers_of_linear_layers_have_the_same_range(method: bool | str) -> None:
    _, a, b = ours(method, kernel=np.zeros((256, 200), np.float32))
    _, their_a, their_b = parts(adapted(torch.nn.Linear(256, 200), method))
    np.testing.assert_allclose(np.std(a), np.std(their_a), rtol=0.1)
    if method is True:
        for array in (a, their_a):
            assert 0.98 / 16 < np.abs(array).max() <= 1 / 16 + 1e-7
    assert not b.any()
    assert not their_b.any()


def test_random_numbers_of_convolutions_have_the_same_range() -> None:
    _, a, _ = ours(True, CONV, np.zeros((3, 3, 16, 8), np.float32))
    model = adapted(torch.nn.Conv2d(16, 8, 3), True)
    their_a = read(model.base_model.model.layer.lora_A["default"].weight)
    for array in (np.asarray(a), their_a):
        assert 0.95 / 12 < np.abs(array).max() <= 1 / 12 + 1e-7
        np.testing.assert_allclose(np.std(array), 1 / 12 / math.sqrt(3), rtol=0.1)


@pytest.mark.parametrize("method", [True, "gaussian", False])
def test_random_numbers_of_tables_have_the_same_range(method: bool | str) -> None:
    _, a, b = ours(method, EMBED, np.zeros((300, 250), np.float32))
    layer = adapted(torch.nn.Embedding(300, 250), method).base_model.model.layer
    factors = (layer.lora_embedding_A["default"], layer.lora_embedding_B["default"])
    for array, other in zip((a, b), map(read, factors), strict=True):
        np.testing.assert_allclose(np.std(array), np.std(other), rtol=0.1, atol=1e-9)


def test_trained_adapters_become_the_same_plain_ones() -> None:
    settings = hf_peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=["layer"], init_lora_weights="pissa"
    )
    model = hf_peft.get_peft_model(model_of(linear()), settings, adapter_name="pissa_init")
    layer = model.base_model.model.layer
    initial = [read(factors["pissa_init"].weight) for factors in (layer.lora_A, layer.lora_B)]
    rng = np.random.default_rng(2)
    trained = [(x + rng.normal(size=x.shape)).astype(np.float32) for x in initial]
    names = [f"base_model.model.layer.lora_{name}.weight" for name in "AB"]
    state = dict(zip(names, map(torch.from_numpy, trained), strict=True))
    plain = model.base_model.subtract_mutated_init(state, "pissa_init", {})

    def tree(a: Array, b: Array) -> dict[str, Any]:
        return {"lora": {"a": jnp.asarray(a.T), "b": jnp.asarray(b.T)}}

    found, specs = subtract_mutated_init(tree(*initial), tree(*trained), {"lora": SPEC})
    expected = tree(*map(read, plain.values()))
    for name in "ab":
        np.testing.assert_array_equal(found["lora"][name], expected["lora"][name])
    assert (specs["lora"].rank, specs["lora"].alpha) == (2 * RANK, 2 * ALPHA)
    assert specs["lora"].scaling == SPEC.scaling

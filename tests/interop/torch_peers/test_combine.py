"""`add_weighted_adapter` makes what Hugging Face's peft makes, but where peft is wrong.

Adapters of one tiny model are combined by both. What is compared is the change of each weight,
scaling and all: factors of one product are many. Torch keeps outputs first.
"""

import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import peft_jax as peft
from peft_jax import LoraSpec
from peft_jax.adapters import add_weighted_adapter

torch = pytest.importorskip("torch")
hf_peft = pytest.importorskip("peft")

SIZES = {"first": (12, 7), "second": (12, 7), "third": (7, 12)}
LAYERS = list(SIZES)
UNSCALED = {"r": 4, "lora_alpha": 4, "target_modules": LAYERS}
WEIGHTS = [1.5, 0.5, 0.75]
# What is drawn differs between the libraries.
EQUAL_TYPES = ["cat", "linear", "ties", "magnitude_prune", "svd", "ties_svd", "magnitude_prune_svd"]

Changes = dict[str, np.ndarray]

# Compiled in a third of the time.


class Net(torch.nn.Module):
    """Layers that are adapted, and never run."""

    def __init__(self) -> None:
        super().__init__()
        for name, (inputs, outputs) in SIZES.items():
            setattr(self, name, torch.nn.Linear(inputs, outputs))


class Adapters:
    """Random adapters of one model, in both libraries.

    Attributes:
      model: adapted by peft, with an adapter ``0``, ``1``, ... for each config.
      names: of the adapters.
      trees: the same adapters as trees of this library.
      specs: theirs.
    """

    def __init__(self, *configs: dict[str, Any]) -> None:
        self.names = [str(i) for i in range(len(configs))]
        first, *others = (hf_peft.LoraConfig(**config) for config in configs)
        self.model = hf_peft.get_peft_model(Net(), first, adapter_name="0")
        for name, config in zip(self.names[1:], others, strict=True):
            self.model.add_adapter(name, config)
        with torch.no_grad():
            for name, value in self.model.named_parameters():
                if "lora_" in name:
                    value.copy_(torch.randn(value.shape))
        self.trees, self.specs = [], []
        for name in self.names:
            tree, specs = {}, {}
            for layer in LAYERS:
                module = getattr(self.model.base_model.model, layer)
                if name not in getattr(module, "lora_A", {}):
                    continue
                a, b = module.lora_A[name], module.lora_B[name]
                leaves = {"a": array(a.weight).T, "b": array(b.weight).T}
                if b.bias is not None:
                    leaves["bias"] = array(b.bias)
                tree[layer] = {"lora": leaves}
                specs[f"{layer}/lora"] = LoraSpec(
                    "kernel",
                    "ir,ro->io",
                    module.r[name],
                    module.scaling[name],
                    bias=None if b.bias is None else "bias",
                )
            self.trees.append(tree)
            self.specs.append(specs)

    def theirs(self, weights: list[float], combination_type: str, **options: Any) -> Changes:
        """What the adapter that peft makes of them adds to each kernel, (in, out)."""
        model = self.model
        if "made" in model.peft_config:
            model.delete_adapter("made")
        model.add_weighted_adapter(
            self.names, weights, "made", combination_type=combination_type, **options
        )
        modules = {layer: getattr(model.base_model.model, layer) for layer in LAYERS}
        return {
            layer: array(module.get_delta_weight("made")).T
            for layer, module in modules.items()
            if "made" in getattr(module, "lora_A", {})
        }

    def ours(self, weights: list[float], combination_type: str, **options: Any) -> Changes:
        def run(trees: Any) -> Any:
            lora, specs = add_weighted_adapter(
                trees,
                weights,
                specs=self.specs,
                combination_type=combination_type,
                key=jax.random.key(0),
                **options,
            )
            return {layer: changed(tree, specs, layer) for layer, tree in lora.items()}

        return jax.tree.map(np.asarray, jax.jit(run)(self.trees))

    def exact(self, weights: list[float]) -> Changes:
        """``sum_i w_i s_i a_i·b_i`` in float64."""
        return {
            layer: sum(
                weight * specs[f"{layer}/lora"].scaling * np.float64(leaves["a"]) @ leaves["b"]
                for tree, specs, weight in zip(self.trees, self.specs, weights, strict=True)
                if layer in tree
                for leaves in [tree[layer]["lora"]]
            )
            for layer in LAYERS
            if any(layer in tree for tree in self.trees)
        }


def array(tensor: Any) -> np.ndarray:
    return tensor.detach().numpy()


def changed(tree: Any, specs: Any, layer: str) -> Any:
    zeros = {layer: {"kernel": jnp.zeros(SIZES[layer]), **tree}}
    if "bias" in tree["lora"]:
        zeros[layer]["bias"] = jnp.zeros(SIZES[layer][1])
    own = {f"{layer}/lora": specs[f"{layer}/lora"]}
    return peft.fuse_params(zeros, specs=own)[layer]["kernel"]


def are_close(one: Changes, two: Changes, tolerance: float = 1e-4) -> bool:
    assert one.keys() == two.keys()
    return all(
        np.max(np.abs(one[layer] - two[layer])) <= tolerance * np.max(np.abs(two[layer]))
        for layer in one
    )


def best(matrix: np.ndarray, rank: int) -> np.ndarray:
    u, s, v = np.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ v[:rank]


# --- The same ------------------------------------------------------------------------------------


@pytest.mark.parametrize("majority", ["total", "frequency"])
@pytest.mark.parametrize("combination_type", EQUAL_TYPES)
def test_every_type_that_draws_nothing_is_that_of_peft(
    combination_type: str, majority: str
) -> None:
    adapters = Adapters(UNSCALED, UNSCALED, UNSCALED)
    options = {"density": 0.6, "majority_sign_method": majority}
    found = adapters.ours(WEIGHTS, combination_type, **options)
    assert are_close(found, adapters.theirs(WEIGHTS, combination_type, **options))


@pytest.mark.parametrize("combination_type", EQUAL_TYPES)
@pytest.mark.parametrize("use_rslora", [False, True])
def test_the_scaling_counts_as_in_peft(combination_type: str, use_rslora: bool) -> None:
    adapters = Adapters(
        {**UNSCALED, "lora_alpha": 6, "use_rslora": use_rslora}, {**UNSCALED, "lora_alpha": 1}
    )
    found = adapters.ours([1.5, 0.5], combination_type, density=0.6)
    expected = adapters.theirs([1.5, 0.5], combination_type, density=0.6)
    if use_rslora:  # of peft's result too, which keeps the flag and an alpha that is the rank
        rank = 8 if combination_type == "cat" else 4
        expected = {layer: value / math.sqrt(rank) for layer, value in expected.items()}
    assert are_close(found, expected)


@pytest.mark.parametrize("combination_type", EQUAL_TYPES)
def test_adapters_of_different_layers_are_combined_as_by_peft(combination_type: str) -> None:
    adapters = Adapters(
        {**UNSCALED, "target_modules": ["first", "second"]},
        {**UNSCALED, "target_modules": ["second", "third"]},
    )
    found = adapters.ours([1.5, 0.5], combination_type, density=0.6)
    assert are_close(found, adapters.theirs([1.5, 0.5], combination_type, density=0.6))


@pytest.mark.parametrize("combination_type", ["svd", "ties_svd"])
@pytest.mark.parametrize("full", [True, False])
def test_the_rank_of_a_decomposition_is_that_of_peft(combination_type: str, full: bool) -> None:
    adapters = Adapters(UNSCALED, UNSCALED)
    options = {"svd_rank": 2, "density": 0.6, "svd_full_matrices": full}
    found = adapters.ours([1.5, 0.5], combination_type, **options)
    assert are_close(found, adapters.theirs([1.5, 0.5], combination_type, **options))


def test_clamping_is_that_of_peft() -> None:
    """Up to the signs of singular vectors, which are free, and on which the quantile depends."""
    adapters = Adapters(UNSCALED, UNSCALED)
    rank, quantile = 3, 0.9
    options = {"svd_rank": rank, "svd_clamp": quantile}
    found = [made([1.5, 0.5], "svd", **options) for made in (adapters.ours, adapters.theirs)]
    for layer, change in adapters.exact([1.5, 0.5]).items():
        u, s, v = np.linalg.svd(change, full_matrices=False)
        clamped = []
        for signs in itertools.product([1, -1], repeat=rank):
            a, b = u[:, :rank] * signs, (signs * s[:rank])[:, None] * v[:rank]
            bound = np.quantile(np.concatenate([a.reshape(-1), b.reshape(-1)]), quantile)
            clamped.append(np.clip(a, -bound, bound) @ np.clip(b, -bound, bound))
        for made in found:
            assert any(np.allclose(made[layer], each, rtol=0, atol=1e-3) for each in clamped)


@pytest.mark.parametrize("combination_type", EQUAL_TYPES)
def test_negative_weights_are_those_of_peft(combination_type: str) -> None:
    adapters = Adapters(UNSCALED, UNSCALED)
    found = adapters.ours([1.5, -0.5], combination_type, density=0.6)
    assert are_close(found, adapters.theirs([1.5, -0.5], combination_type, density=0.6))


@pytest.mark.parametrize("combination_type", ["linear", "svd"])
def test_a_single_adapter_is_subtracted_by_both(combination_type: str) -> None:
    adapters = Adapters({**UNSCALED, "lora_alpha": 6})
    exact = adapters.exact([-0.8])
    assert are_close(adapters.ours([-0.8], combination_type), exact)
    assert are_close(adapters.theirs([-0.8], combination_type), exact)


@pytest.mark.parametrize("combination_type", ["dare_linear", "dare_ties"])
def test_a_density_of_one_drops_nothing(combination_type: str) -> None:
    adapters = Adapters(UNSCALED, UNSCALED)
    found = adapters.ours([1.5, 0.5], combination_type, density=1.0)
    with pytest.warns(UserWarning, match="no pruning"):
        expected = adapters.theirs([1.5, 0.5], combination_type, density=1.0)
    assert are_close(found, expected)


def test_many_draws_of_dare_have_the_mean_of_what_is_kept_whole() -> None:
    """Each is divided by the density. Ours are cheaper to draw, and so more."""
    adapters = Adapters(UNSCALED, UNSCALED)
    exact = adapters.exact([1.0, 2.0])["third"]
    options = {"density": 0.5, "svd_rank": 7}

    def ours(key: Any) -> Any:
        lora, _ = add_weighted_adapter(
            adapters.trees,
            [1.0, 2.0],
            specs=adapters.specs,
            combination_type="dare_linear_svd",
            key=key,
            **options,
        )
        return lora["third"]["lora"]["a"] @ lora["third"]["lora"]["b"]

    found = np.mean(jax.jit(jax.vmap(ours))(jax.random.split(jax.random.key(0), 3000)), axis=0)
    theirs = np.mean(
        [adapters.theirs([1.0, 2.0], "dare_linear_svd", **options)["third"] for _ in range(200)],
        axis=0,
    )
    assert np.linalg.norm(found - exact) < 0.05 * np.linalg.norm(exact)
    assert np.linalg.norm(theirs - exact) < 0.1 * np.linalg.norm(exact)


# --- Where peft is wrong -------------------------------------------------------------------------


def test_peft_ignores_the_rank_wanted_of_a_single_adapter() -> None:
    adapters = Adapters(UNSCALED)
    exact = adapters.exact([1.5])
    found = adapters.ours([1.5], "svd", svd_rank=2)
    assert are_close(found, {layer: best(value, 2) for layer, value in exact.items()})
    assert are_close(adapters.theirs([1.5], "svd", svd_rank=2), exact)


def test_peft_scales_the_result_of_rslora_by_the_root_of_its_rank() -> None:
    """Its config keeps ``use_rslora``, with an alpha that is the rank."""
    rslora = {**UNSCALED, "lora_alpha": 6, "use_rslora": True}
    adapters = Adapters(rslora, rslora)
    exact = adapters.exact([1.5, 0.5])
    assert are_close(adapters.ours([1.5, 0.5], "cat"), exact)
    theirs = adapters.theirs([1.5, 0.5], "cat")
    assert are_close(theirs, {layer: value * math.sqrt(8) for layer, value in exact.items()})


def test_peft_judges_patterns_of_rank_by_the_largest() -> None:
    """Two adapters with ranks that are equal in every layer are refused, or fail."""
    patterned = {**UNSCALED, "rank_pattern": {"second": 2}, "alpha_pattern": {"second": 3}}
    adapters = Adapters(patterned, {**patterned, "lora_alpha": 7})
    for combination_type in ("cat", "svd"):
        exact = adapters.exact([1.5, -0.5])
        if combination_type == "svd":
            exact = {x: best(y, 2 if x == "second" else 4) for x, y in exact.items()}
        assert are_close(adapters.ours([1.5, -0.5], combination_type), exact)
    plain = {**UNSCALED, "r": 2, "rank_pattern": {"first": 4, "third": 5}}
    small = {
        **UNSCALED,
        "r": 2,
        "rank_pattern": {"first": 4},
        "target_modules": ["first", "second"],
    }
    unequal = Adapters(plain, small)
    with pytest.raises(ValueError, match="same r value"):
        unequal.theirs([1.0, 1.0], "linear")
    assert unequal.ours([1.0, 1.0], "linear").keys() == SIZES.keys()


def test_peft_loses_the_biases() -> None:
    config = {**UNSCALED, "lora_bias": True}
    adapters = Adapters(config, config)
    lora, specs = add_weighted_adapter(
        adapters.trees, [1.5, -0.5], specs=adapters.specs, combination_type="cat"
    )
    adapters.theirs([1.5, -0.5], "cat")
    for layer in LAYERS:
        one, two = (tree[layer]["lora"]["bias"] for tree in adapters.trees)
        np.testing.assert_allclose(lora[layer]["lora"]["bias"], 1.5 * one - 0.5 * two, rtol=1e-5)
        assert specs[f"{layer}/lora"].bias == "bias"
        module = getattr(adapters.model.base_model.model, layer)
        assert not np.any(array(module.lora_B["made"].bias))


def test_dora_is_refused_where_peft_loses_the_magnitude() -> None:
    config = {**UNSCALED, "use_dora": True}
    adapters = Adapters(config, config)
    module = adapters.model.base_model.model.first
    trees, specs = adapters.trees, adapters.specs
    for i, name in enumerate(adapters.names):
        magnitude = module.lora_magnitude_vector[name].weight
        trees[i] = {"first": {"lora": {**trees[i]["first"]["lora"], "magnitude": array(magnitude)}}}
        specs[i] = {"first/lora": LoraSpec("kernel", "ir,ro->io", 4, variant="dora")}
    with pytest.raises(ValueError, match="'first/lora' is one of DoRA"):
        adapters.ours([1.0, 1.0], "cat")

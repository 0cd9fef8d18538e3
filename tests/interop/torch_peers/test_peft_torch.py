"""The same numbers as `peft` of Hugging Face (torch), for the same weights, rank and alpha.

Torch keeps outputs first: a Linear's weight is (out, in), a convolution's (out, in, *window), and
`lora_A` and `lora_B` likewise, while an Embedding's weight is (vocab, features).
"""

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import peft_jax as peft

torch = pytest.importorskip("torch")
hf_peft = pytest.importorskip("peft")

Array = np.ndarray
RANK, GROUPS = 4, 2


def channels_last(x: Array) -> Array:
    """Torch puts the channels of an image before its places, Flax after them."""
    return np.moveaxis(x, 1, -1)


def kernel_of(weight: Array) -> Array:
    """A Linear's weight as Flax's kernel."""
    return weight.T


def window_kernel_of(weight: Array) -> Array:
    """A convolution's weight, (out, in, *window), as Flax's (*window, in, out)."""
    return np.moveaxis(weight, (0, 1), (-1, -2))


def pointwise_of(weight: Array) -> Array:
    """`lora_B` of a convolution, (out, r, 1, 1), as `b`."""
    return weight.reshape(weight.shape[:2]).T


def same(x: Array) -> Array:
    return x


def transposed(x: Array) -> Array:
    return x.T


def by_group(index: int) -> slice:
    """One group's part of the rank."""
    return slice(index * RANK // GROUPS, (index + 1) * RANK // GROUPS)


def grouped_a_of(weight: Array) -> Array:
    """Each group's part of `lora_A`, (r, in, *window), which reads its group's inputs alone."""
    parts = np.split(weight, GROUPS, axis=1)
    rows = [part[by_group(i)] for i, part in enumerate(parts)]
    return window_kernel_of(np.concatenate(rows))


def grouped_b_of(weight: Array) -> Array:
    """Each group's part of `lora_B`, (out, r / groups, 1, 1), in its block of `b`."""
    b = np.zeros((RANK, weight.shape[0]), weight.dtype)
    for i, columns in enumerate(np.split(pointwise_of(weight), GROUPS, axis=1)):
        width = columns.shape[1]
        b[by_group(i), i * width : (i + 1) * width] = columns
    return b


@dataclasses.dataclass(frozen=True)
class Case:
    """One layer in both libraries, and how weights, inputs and outputs of torch read in Flax."""

    theirs: Callable[[], Any]
    ours: Callable[[], nn.Module]
    wrapper: type
    x: Callable[[np.random.Generator], Array]
    param: str = "kernel"
    names: tuple[str, str] = ("lora_A.default.weight", "lora_B.default.weight")
    kernel: Callable[[Array], Array] = kernel_of
    a: Callable[[Array], Array] = kernel_of
    b: Callable[[Array], Array] = kernel_of
    io: Callable[[Array], Array] = same
    groups: int = 1


def normal(*shape: int) -> Callable[[np.random.Generator], Array]:
    return lambda rng: rng.normal(size=shape).astype(np.float32)


def conv2d(**settings: Any) -> Case:
    """A 3x3 convolution of 4 channels to 6."""
    groups = settings.get("groups", 1)
    return Case(
        theirs=lambda: torch.nn.Conv2d(4, 6, 3, padding=1, **settings),
        ours=lambda: nn.Conv(
            6,
            (3, 3),
            padding=1,
            strides=settings.get("stride", 1),
            feature_group_count=groups,
        ),
        wrapper=peft.LoRAConv,
        x=normal(2, 4, 7, 8),
        kernel=window_kernel_of,
        a=window_kernel_of if groups == 1 else grouped_a_of,
        b=pointwise_of if groups == 1 else grouped_b_of,
        io=channels_last,
        groups=groups,
    )


CASES = {
    "Linear": Case(
        lambda: torch.nn.Linear(6, 5), lambda: nn.Dense(5), peft.LoRADense, normal(2, 3, 6)
    ),
    "Linear without bias": Case(
        lambda: torch.nn.Linear(6, 5, bias=False),
        lambda: nn.Dense(5, use_bias=False),
        peft.LoRADense,
        normal(2, 6),
    ),
    "Conv1d": Case(
        lambda: torch.nn.Conv1d(4, 6, 3, padding=1),
        lambda: nn.Conv(6, (3,), padding=1),
        peft.LoRAConv,
        normal(2, 4, 7),
        kernel=window_kernel_of,
        a=window_kernel_of,
        b=pointwise_of,
        io=channels_last,
    ),
    "Conv2d": conv2d(),
    "Conv2d with strides": conv2d(stride=2),
    "Conv2d with groups": conv2d(groups=GROUPS),
    "Embedding": Case(
        lambda: torch.nn.Embedding(9, 5),
        lambda: nn.Embed(9, 5),
        peft.LoRAEmbed,
        lambda rng: rng.integers(0, 9, (2, 6)),
        param="embedding",
        names=("lora_embedding_A.default", "lora_embedding_B.default"),
        kernel=same,
        a=transposed,
        b=transposed,
    ),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
every_alpha = pytest.mark.parametrize("alpha", [None, 1, 6.0])


class Model(torch.nn.Module):
    """One layer with a name, as `target_modules` wants it."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Any) -> Any:
        return self.layer(x)


def torch_model(case: Case, alpha: float | None) -> Any:
    """The adapted torch model, with random weights in all places."""
    config = hf_peft.LoraConfig(
        r=RANK, lora_alpha=RANK if alpha is None else alpha, target_modules=["layer"]
    )
    with warnings.catch_warnings():  # of convolutions with groups, which it cannot merge
        warnings.filterwarnings("ignore", "LoRA adapter added to ConvNd layer with groups > 1")
        model = hf_peft.get_peft_model(Model(case.theirs()), config)
    rng = np.random.default_rng(0)
    with torch.no_grad():
        for _, value in sorted(model.named_parameters()):
            value.copy_(torch.from_numpy(rng.normal(size=value.shape).astype(np.float32)))
        if case.groups > 1:
            _keep_groups_apart(parameter(model, case.names[0]))
    return model


def _keep_groups_apart(lora_a: Any) -> None:
    """Has each group's part of the rank read its own inputs, as the layer's kernel does.

    Otherwise `peft`'s adapter mixes groups: no kernel of the layer could hold that change.
    """
    width = lora_a.shape[1] // GROUPS
    for i in range(GROUPS):
        for j in range(GROUPS):
            if i != j:
                lora_a[by_group(i), j * width : (j + 1) * width] = 0


def parameter(model: Any, name: str) -> Any:
    return dict(model.named_parameters())[f"base_model.model.layer.{name}"]


def array(tensor: Any) -> Array:
    return tensor.detach().numpy().copy()


def flax_params(case: Case, model: Any) -> dict[str, Any]:
    """The torch model's weights as parameters of the Flax layer."""
    layer = model.base_model.model.layer.base_layer
    params = {case.param: case.kernel(array(layer.weight))}
    if getattr(layer, "bias", None) is not None:
        params["bias"] = array(layer.bias)
    a, b = (array(parameter(model, name)) for name in case.names)
    return jax.tree.map(jnp.asarray, {**params, "lora": {"a": case.a(a), "b": case.b(b)}})


def inputs(case: Case) -> tuple[Any, jax.Array]:
    x = case.x(np.random.default_rng(1))
    return torch.from_numpy(x), jnp.asarray(case.io(x))


def assert_close(actual: Any, expected: Any) -> None:
    scale = float(np.max(np.abs(expected)))
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5 * scale)


@every_case
def test_adapters_have_the_same_number_of_parameters(case: Case) -> None:
    layer = case.wrapper(rank=RANK, wrapped=case.ours())
    params = layer.init(jax.random.key(0), inputs(case)[1])["params"]
    expected = flax_params(case, torch_model(case, None))
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, expected)


@every_alpha
@every_case
def test_outputs_are_the_same(case: Case, alpha: float | None) -> None:
    model = torch_model(case, alpha)
    layer = case.wrapper(rank=RANK, alpha=alpha, wrapped=case.ours())
    x_torch, x = inputs(case)
    y = layer.apply({"params": flax_params(case, model)}, x)
    assert_close(y, case.io(array(model(x_torch))))


@every_case
def test_gradients_are_the_same(case: Case) -> None:
    model = torch_model(case, 6.0)
    layer = case.wrapper(rank=RANK, alpha=6.0, wrapped=case.ours())
    x_torch, x = inputs(case)
    params = flax_params(case, model)
    base, lora = peft.split_params(params)

    torch.sin(model(x_torch)).sum().backward()
    grads = jax.grad(
        lambda lora: jnp.sin(layer.apply({"params": peft.merge_params(base, lora)}, x)).sum()
    )(lora)["lora"]

    for name, torch_name, read in zip("ab", case.names, (case.a, case.b), strict=True):
        expected = read(array(parameter(model, torch_name).grad))
        actual = grads[name]
        if case.groups > 1 and name == "b":  # outside its blocks, torch has no such parameter
            actual = np.where(params["lora"]["b"] != 0, actual, 0)
        assert_close(actual, expected)


@every_alpha
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.groups == 1])
def test_merged_weights_are_the_same(name: str, alpha: float | None) -> None:
    case = CASES[name]
    model = torch_model(case, alpha)
    layer = case.wrapper(rank=RANK, alpha=alpha, wrapped=case.ours())
    specs = peft.lora_specs(layer, inputs(case)[1])
    fused = peft.fuse_params(flax_params(case, model), specs=specs)
    merged = model.merge_and_unload()
    assert_close(fused[case.param], case.kernel(array(merged.layer.weight)))
    if "bias" in fused:
        np.testing.assert_array_equal(fused["bias"], array(merged.layer.bias))


def test_groups_are_merged_here_and_not_there() -> None:
    case = CASES["Conv2d with groups"]
    model = torch_model(case, 6.0)
    layer = case.wrapper(rank=RANK, alpha=6.0, wrapped=case.ours())
    x_torch, x = inputs(case)
    specs = peft.lora_specs(layer, x)
    fused = peft.fuse_params(flax_params(case, model), specs=specs)
    y = case.ours().apply({"params": fused}, x)
    assert_close(y, case.io(array(model(x_torch))))
    with pytest.raises(NotImplementedError, match="groups > 1"):
        model.merge_and_unload()

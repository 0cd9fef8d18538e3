"""The same numbers and the same trees as `gemma.peft`, the library that this one follows."""

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import peft_jax as peft

pytest.importorskip("gemma")
theirs = importlib.import_module("gemma.peft")

RANK = 3


@dataclasses.dataclass(frozen=True)
class Case:
    """One layer, wrapped by both libraries.

    Attributes:
      wrapper: the wrapper's name, the same in both.
      layer: makes the layer.
      x: shape of its input.
      adapter: fields of the adapter alone.
    """

    wrapper: str
    layer: Callable[[], nn.Module]
    x: tuple[int, ...]
    adapter: dict[str, Any]

    def models(self) -> tuple[nn.Module, nn.Module]:
        """The wrapped layer of this library, and theirs."""
        ours = getattr(peft, self.wrapper)(rank=RANK, wrapped=self.layer())
        fields = {"rank": RANK, "wrapped": self.layer(), "dtype": jnp.float32}
        return ours, getattr(theirs, self.wrapper)(**fields)

    def adapters(self) -> tuple[nn.Module, nn.Module]:
        """The adapter alone of this library, and theirs."""
        name = f"{self.wrapper}Adapter"
        return (
            getattr(peft, name)(rank=RANK, **self.adapter),
            getattr(theirs, name)(rank=RANK, dtype=jnp.float32, **self.adapter),
        )


def einsum(equation: str, shape: tuple[int, ...], x: tuple[int, ...]) -> Case:
    fields = {"einsum_str": equation, "shape": shape}
    return Case("LoRAEinsum", lambda: nn.Einsum(**fields, use_bias=False), x, fields)


def dense_general(x: tuple[int, ...], **fields: Any) -> Case:
    return Case("LoRADenseGeneral", lambda: nn.DenseGeneral(**fields), x, fields)


CASES = {
    "dense": Case("LoRADense", lambda: nn.Dense(5), (2, 4, 6), {"features": 5}),
    "einsum in": einsum("BTD,NDH->BTNH", (2, 6, 4), (2, 3, 6)),
    "einsum out": einsum("BTNH,NHD->BTD", (2, 4, 6), (2, 3, 2, 4)),
    "einsum batch": einsum("BNI,NIO->BNO", (3, 4, 5), (2, 3, 4)),
    "einsum stacked": einsum("BSD,KDNH->BSKNH", (2, 6, 2, 3), (2, 3, 6)),
    "general out": dense_general((2, 4, 6), features=(2, 3), axis=-1, batch_dims=()),
    "general in": dense_general((2, 4, 2, 3), features=5, axis=(-2, -1), batch_dims=()),
    "general batch": dense_general((3, 4, 6), features=(2, 5), axis=-1, batch_dims=(0,)),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def filled(params: Any, seed: int = 0) -> Any:
    """The same tree of random values."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), params)


def data(case: Case) -> jax.Array:
    return jnp.asarray(np.random.default_rng(7).normal(size=case.x), jnp.float32)


def assert_close(actual: Any, expected: Any) -> None:
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-5)


def outputs_and_grads(model: nn.Module, params: Any, x: jax.Array) -> tuple[jax.Array, Any]:
    def loss(params: Any) -> tuple[jax.Array, jax.Array]:
        y = model.apply({"params": params}, x)
        return jnp.sin(y).sum(), y

    (_, y), grads = jax.value_and_grad(loss, has_aux=True)(params)
    return y, grads


# --- Layers --------------------------------------------------------------------------------------


@every_case
def test_wrappers_have_the_same_tree(case: Case) -> None:
    ours, other = (model.init(jax.random.key(0), data(case)) for model in case.models())
    chex.assert_trees_all_equal_shapes_and_dtypes(ours, other)


@every_case
def test_wrappers_compute_the_same(case: Case) -> None:
    ours, other = case.models()
    params = filled(ours.init(jax.random.key(0), data(case))["params"])
    actual = outputs_and_grads(ours, params, data(case))
    assert_close(actual, outputs_and_grads(other, params, data(case)))


@every_case
def test_adapters_compute_the_same(case: Case) -> None:
    ours, other = case.adapters()
    params = filled(ours.init(jax.random.key(0), data(case))["params"])
    assert set(params) == {"a", "b"}
    actual = outputs_and_grads(ours, params, data(case))
    assert_close(actual, outputs_and_grads(other, params, data(case)))


# --- Trees ---------------------------------------------------------------------------------------

# The example of their README.
PARAMS = {
    "dense": {"kernel": 0, "bias": 1, "lora": {"a": 0, "b": 1}},
    "other": 0,
}


def test_trees_split_as_in_their_readme() -> None:
    original, lora = peft.split_params(PARAMS)
    assert original == {"dense": {"kernel": 0, "bias": 1}, "other": 0}
    assert lora == {"dense": {"lora": {"a": 0, "b": 1}}}


def test_trees_split_and_merge_alike() -> None:
    model = MLP()
    with peft.ModuleInterceptor(ours_on_dense):
        params = model.init(jax.random.key(0), X)["params"]
    for tree in (PARAMS, params):
        ours, other = peft.split_params(tree), theirs.split_params(tree)
        assert ours._fields == other._fields
        chex.assert_trees_all_equal(ours.original, other.original)
        chex.assert_trees_all_equal(ours.lora, other.lora)
        chex.assert_trees_all_equal(peft.merge_params(*other), theirs.merge_params(*ours))
        chex.assert_trees_all_equal(peft.merge_params(*other), tree)


# --- Surgery -------------------------------------------------------------------------------------

X = jnp.asarray(np.random.default_rng(8).normal(size=(2, 6)), jnp.float32)


class MLP(nn.Module):
    """Two layers, made in the call."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(5)(nn.relu(nn.Dense(4, name="first")(x)))


class SetupMLP(nn.Module):
    """Two layers, made in `setup`."""

    def setup(self) -> None:
        self.first = nn.Dense(4)
        self.second = nn.Dense(5)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.second(nn.relu(self.first(x)))


every_model = pytest.mark.parametrize("model", [MLP(), SetupMLP()], ids=["compact", "setup"])


def ours_on_dense(module: nn.Module) -> nn.Module:
    if type(module) is nn.Dense:
        return peft.LoRADense(rank=RANK, wrapped=module)
    return module


def theirs_on_dense(module: nn.Module) -> nn.Module:
    if type(module) is nn.Dense:
        return theirs.LoRADense(rank=RANK, wrapped=module, dtype=jnp.float32)
    return module


def adapted(interceptor: Any, model: nn.Module) -> tuple[Any, jax.Array]:
    """Shapes of the parameters under an interceptor, and the output for filled ones."""
    with interceptor:
        params = model.init(jax.random.key(0), X)["params"]
    params = filled(params)
    with interceptor:
        return jax.tree.map(jnp.shape, params), model.apply({"params": params}, X)


@every_model
def test_interceptors_do_the_same(model: nn.Module) -> None:
    ours = adapted(peft.ModuleInterceptor(ours_on_dense), model)
    other = adapted(theirs.ModuleInterceptor(theirs_on_dense), model)
    assert ours[0] == other[0]
    assert_close(ours[1], other[1])


@every_model
def test_their_wrappers_work_under_our_interceptor(model: nn.Module) -> None:
    ours = adapted(peft.ModuleInterceptor(ours_on_dense), model)
    other = adapted(peft.ModuleInterceptor(theirs_on_dense), model)
    assert ours[0] == other[0]
    assert_close(ours[1], other[1])


@every_model
def test_our_wrappers_work_under_their_interceptor(model: nn.Module) -> None:
    ours = adapted(peft.ModuleInterceptor(ours_on_dense), model)
    other = adapted(theirs.ModuleInterceptor(ours_on_dense), model)
    assert ours[0] == other[0]
    assert_close(ours[1], other[1])


def test_their_wrappers_leave_the_initial_values_of_the_base() -> None:
    plain = MLP().init(jax.random.key(0), X)["params"]
    with peft.ModuleInterceptor(theirs_on_dense):
        params = MLP().init(jax.random.key(0), X)["params"]
    chex.assert_trees_all_equal(theirs.split_params(params).original, plain)


def test_their_wrappers_are_called_under_jit_and_grad() -> None:
    with peft.ModuleInterceptor(theirs_on_dense):
        params = filled(MLP().init(jax.random.key(0), X)["params"])

    @jax.jit
    def grads(params: Any) -> Any:
        return jax.grad(lambda params: jnp.sin(MLP().apply({"params": params}, X)).sum())(params)

    with peft.ModuleInterceptor(theirs_on_dense):
        other = grads(params)
    with peft.ModuleInterceptor(ours_on_dense):
        assert_close(other, grads(params))

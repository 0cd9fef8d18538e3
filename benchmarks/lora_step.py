"""Times one training step of LoRA: ours against other libraries, full tuning and a frozen model.

The model is a chain of Dense layers, each with a nonlinearity; a step is forward, backward and an
SGD update of what the row trains. All rows run in one process, in a new order each round, so that
whatever else the machine does slows them alike. The figures to watch: ours at least 1.4 times
faster than the other libraries, and at most 1.25 times the frozen model's step.
"""

import argparse
import random
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

ACTIVATIONS = {"gelu": nn.gelu, "relu": nn.relu, "silu": nn.silu, "tanh": jnp.tanh}


class Chain(nn.Module):
    """Dense layers of one width, a nonlinearity after each."""

    width: int
    layers: int
    activation: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for _ in range(self.layers):
            x = ACTIVATIONS[self.activation](nn.Dense(self.width)(x))
        return x


class Step(NamedTuple):
    """A compiled step and what it is called with."""

    compiled: Any
    arguments: tuple[Any, ...]

    def seconds(self) -> float:
        start = time.perf_counter()
        jax.block_until_ready(self.compiled(*self.arguments))
        return time.perf_counter() - start

    def gigaflops(self) -> float:
        return self.compiled.cost_analysis()["flops"] / 1e9


# --- The rows ------------------------------------------------------------------------------------


def ours(model: nn.Module, rank: int, x: jax.Array) -> Step:
    import peft_jax as peft

    def adapt(module: nn.Module) -> nn.Module:
        return peft.LoRADense(rank=rank, wrapped=module) if type(module) is nn.Dense else module

    with peft.ModuleInterceptor(adapt):
        return training_step(model, x, trains=is_adapter)


def gemma_peft(model: nn.Module, rank: int, x: jax.Array) -> Step:
    from gemma import peft

    def adapt(module: nn.Module) -> nn.Module:
        return peft.LoRADense(rank=rank, wrapped=module) if type(module) is nn.Dense else module

    with peft.ModuleInterceptor(adapt):
        return training_step(model, x, trains=is_adapter)


def qwix_lora(model: nn.Module, rank: int, x: jax.Array) -> Step:
    import qwix

    provider = qwix.LoraProvider(module_path=".*", rank=rank, alpha=rank)
    return training_step(qwix.apply_lora_to_model(model, provider), x, trains=is_adapter)


def full_tuning(model: nn.Module, rank: int, x: jax.Array) -> Step:
    return training_step(model, x, trains=lambda path: True)


def frozen(model: nn.Module, rank: int, x: jax.Array) -> Step:
    """Forward and backward through frozen layers, to the gradient of the input."""
    params = model.init(jax.random.key(1), x)["params"]
    step = jax.jit(jax.value_and_grad(lambda x, params: loss_of(model, params, x)))
    return Step(step.lower(x, params).compile(), (x, params))


ROWS: dict[str, Callable[[nn.Module, int, jax.Array], Step]] = {
    "LoRA, peft_jax": ours,
    "LoRA, gemma.peft": gemma_peft,
    "LoRA, qwix": qwix_lora,
    "full fine-tuning": full_tuning,
    "frozen model": frozen,
}


# --- A step --------------------------------------------------------------------------------------


def is_adapter(path: tuple[str, ...]) -> bool:
    """Whether a parameter is an adapter's, in any of the libraries."""
    return any("lora" in name for name in path)


def loss_of(model: nn.Module, params: Any, x: jax.Array) -> jax.Array:
    return jnp.mean((model.apply({"params": params}, x) - 1) ** 2)


def training_step(
    model: nn.Module, x: jax.Array, trains: Callable[[tuple[str, ...]], bool]
) -> Step:
    params = flatten_dict(model.init(jax.random.key(1), x)["params"])
    trained = {path: leaf for path, leaf in params.items() if trains(path)}
    kept = {path: leaf for path, leaf in params.items() if path not in trained}
    optimizer = optax.sgd(1e-3)

    def loss(trained: Any, kept: Any, x: jax.Array) -> jax.Array:
        return loss_of(model, unflatten_dict(trained | kept), x)

    def step(trained: Any, state: Any, kept: Any, x: jax.Array) -> Any:
        value, gradient = jax.value_and_grad(loss)(trained, kept, x)
        updates, state = optimizer.update(gradient, state)
        return value, optax.apply_updates(trained, updates), state

    arguments = (trained, optimizer.init(trained), kept, x)
    return Step(jax.jit(step).lower(*arguments).compile(), arguments)


# --- The table -----------------------------------------------------------------------------------


def build(options: argparse.Namespace) -> dict[str, Step | None]:
    """Compiles every row; None where its library is not installed."""
    model = Chain(options.width, options.layers, options.activation)
    x = jax.random.normal(jax.random.key(0), (options.batch, options.length, options.width))
    steps: dict[str, Step | None] = {}
    for name, row in ROWS.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # gemma.peft asks for float64
                steps[name] = row(model, options.rank, x)
        except ModuleNotFoundError:
            steps[name] = None
    return steps


def medians(steps: dict[str, Step], repeats: int) -> dict[str, float]:
    """The median seconds of each step, after one call that is not counted."""
    spent: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step.seconds()
    for _ in range(repeats):
        for name, step in random.sample(list(steps.items()), len(steps)):
            spent[name].append(step.seconds())
    return {name: statistics.median(seconds) for name, seconds in spent.items()}


def print_table(steps: dict[str, Step | None], seconds: dict[str, float]) -> None:
    own, base = seconds["LoRA, peft_jax"], seconds["frozen model"]
    print(f"{'step':18} {'ms':>8} {'/ ours':>8} {'/ frozen':>9} {'GFLOP':>8}")
    for name, step in steps.items():
        if step is None:
            print(f"{name:18} {'not installed':>36}")
            continue
        spent = seconds[name]
        ratios = f"{spent / own:8.2f} {spent / base:9.2f}"
        print(f"{name:18} {1e3 * spent:8.2f} {ratios} {step.gigaflops():8.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=50, help="rounds to take the median of")
    parser.add_argument("--batch", type=int, default=8, help="sequences in a batch")
    parser.add_argument("--length", type=int, default=128, help="tokens in a sequence")
    parser.add_argument("--width", type=int, default=512, help="features of every layer")
    parser.add_argument("--layers", type=int, default=4, help="Dense layers")
    parser.add_argument("--rank", type=int, default=8, help="rank of the adapters")
    parser.add_argument("--activation", choices=ACTIVATIONS, default="gelu")
    options = parser.parse_args()

    steps = build(options)
    installed = {name: step for name, step in steps.items() if step is not None}
    print_table(steps, medians(installed, options.repeats))


if __name__ == "__main__":
    main()

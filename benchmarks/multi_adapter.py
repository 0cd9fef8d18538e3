"""Times a batch over many adapters, and the training of many adapters, in one run each.

Serving: one batch, whose examples have 1, 4, 16 or 64 adapters of rank 8, against the same model
with one adapter for all examples; for many tokens an example, and for one (decoding). Beside it
stands the same in torch, by `adapter_names` of Hugging Face's `peft`, where it is installed.

Training: a step of 8 adapters at once, each on its own batch and with its own optimizer state,
against 8 steps one after the other.

All rows of a table run in one process, in turns, so that whatever else the machine does slows them
alike. The figures to watch: serving 16 and 64 adapters at most 1.15 times the one adapter; training
at once at least 1.3 times faster with 512 tokens each, and 1.6 times with 64.
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

import peft_jax as peft


class Chain(nn.Module):
    """Dense layers of one width, a nonlinearity after each."""

    width: int
    layers: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for i in range(self.layers):
            x = nn.gelu(nn.Dense(self.width, name=f"layer_{i}")(x))
        return x


def drawn(tree: Any, seed: int) -> Any:
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    pairs = zip(leaves, keys, strict=True)
    return structure.unflatten([0.1 * jax.random.normal(k, x.shape, x.dtype) for x, k in pairs])


def adapted(args: argparse.Namespace) -> tuple[Any, Any, Any, Any]:
    """A model with one adapter, the base's parameters, the adapter's and its specs."""
    config = peft.LoraConfig(r=args.rank, target_modules=r"layer_\d+")
    model = peft.get_peft_model(Chain(args.width, args.layers), config)
    x = jnp.zeros((1, 1, args.width))
    base, lora = peft.split_params(jax.jit(model.init)(jax.random.key(0), x)["params"])
    return model, base, lora, peft.lora_specs(model, x)


def medians(runs: dict[Any, Callable[[], Any]], repeats: int) -> dict[Any, float]:
    """The median time of each function, which are run in turns."""
    seconds: dict[Any, list[float]] = {name: [] for name in runs}
    for _ in range(repeats + 2):
        for name in random.sample(list(runs), len(runs)):
            start = time.perf_counter()
            jax.block_until_ready(runs[name]())
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times[2:]) for name, times in seconds.items()}


# --- Serving -------------------------------------------------------------------------------------


def serve(args: argparse.Namespace, tokens: int) -> None:
    model, base, lora, specs = adapted(args)
    x = jax.random.normal(jax.random.key(1), (args.examples, tokens, args.width))
    one = jax.jit(lambda params, x: model.apply({"params": params}, x))
    many = peft.MultiAdapterModel(wrapped=Chain(args.width, args.layers))
    banked = jax.jit(lambda params, x, chosen: many.apply({"params": params}, x, adapters=chosen))
    params = peft.merge_params(base, drawn(lora, 0))
    runs: dict[Any, Callable[[], Any]] = {"one": lambda: one(params, x)}
    flops = {"one": one.lower(params, x).compile().cost_analysis()["flops"]}
    for number in args.adapters:
        bank = peft.stack_adapters([drawn(lora, i) for i in range(number)], specs=specs)
        given = bank.merge(base), x, bank.select([str(i % number) for i in range(args.examples)])
        runs[number] = lambda given=given: banked(*given)
        flops[number] = banked.lower(*given).compile().cost_analysis()["flops"]
    theirs = torch_runs(args, tokens)
    times = medians(runs | theirs, args.repeats)
    print(
        f"{args.examples} examples of {tokens} tokens: {times['one'] * 1e3:.2f} ms for one adapter"
    )
    for number in args.adapters:
        line = f"{number:>4} adapters: {times[number] / times['one']:.2f} by time"
        line += f", {flops[number] / flops['one']:.3f} by operations"
        if theirs:
            line += f"; peft's adapter_names {times['torch', number] / times['torch', 0]:.2f}"
            line += f" times its one adapter, {times['torch', number] / times[number]:.1f} ours"
        print(line)


def torch_runs(args: argparse.Namespace, tokens: int) -> dict[Any, Callable[[], Any]]:
    """The same in torch; nothing where it is not installed."""
    try:
        import peft as theirs
        import torch
    except ImportError:
        return {}
    layers = [torch.nn.Linear(args.width, args.width) for _ in range(args.layers)]
    chain = torch.nn.Sequential(*(part for layer in layers for part in (layer, torch.nn.GELU())))
    config = theirs.LoraConfig(
        r=args.rank,
        target_modules=[str(2 * i) for i in range(args.layers)],
        init_lora_weights=False,
    )
    model = theirs.get_peft_model(chain, config, adapter_name="0")
    for i in range(1, max(args.adapters)):
        model.add_adapter(str(i), config)
    model.eval()
    x = torch.randn(args.examples, tokens, args.width)

    def run(names: list[str] | None) -> Any:
        with torch.inference_mode():
            return model(x) if names is None else model(x, adapter_names=names)

    runs: dict[Any, Callable[[], Any]] = {("torch", 0): lambda: run(None)}
    for number in args.adapters:
        names = [str(i % number) for i in range(args.examples)]
        runs["torch", number] = lambda names=names: run(names)
    return runs


# --- Training ------------------------------------------------------------------------------------


def train(args: argparse.Namespace, tokens: int) -> None:
    model, base, lora, specs = adapted(args)
    optimizer = optax.adam(1e-3)
    number = args.trained
    x = jax.random.normal(jax.random.key(1), (number, 1, tokens, args.width))

    @jax.jit
    def alone(lora: Any, state: Any, base: Any, x: jax.Array) -> Any:
        def loss(lora: Any) -> jax.Array:
            y = model.apply({"params": peft.merge_params(base, lora)}, x)
            return jnp.mean(jnp.square(y - 1))

        value, gradients = jax.value_and_grad(loss)(lora)
        updates, state = optimizer.update(gradients, state, lora)
        return optax.apply_updates(lora, updates), state, value

    loras = [drawn(lora, i) for i in range(number)]
    states = [optimizer.init(lora) for lora in loras]

    def in_turn() -> Any:
        return [alone(loras[i], states[i], base, x[i]) for i in range(number)]

    bank = peft.stack_adapters(loras, specs=specs)
    each = peft.per_adapter(optimizer, bank.axes)
    many = peft.MultiAdapterModel(wrapped=Chain(args.width, args.layers))

    def losses(params: Any, chosen: Any, base: Any, x: jax.Array) -> jax.Array:
        merged = {"params": peft.merge_params(base, params)}
        y = many.apply(merged, x.reshape(-1, *x.shape[2:]), adapters=chosen)
        return jnp.mean(jnp.square(y - 1).reshape(x.shape[0], -1), axis=1)

    def step(at_once: int | None) -> Callable[..., Any]:
        @jax.jit
        def together(params: Any, state: Any, chosen: Any, base: Any, x: jax.Array) -> Any:
            gradients_of = peft.adapter_value_and_grad(
                lambda params, chosen, x: losses(params, chosen, base, x),
                bank.axes,
                at_once=at_once,
            )
            values, gradients = gradients_of(params, chosen, x)
            updates, state = each.update(gradients, state, params)
            return optax.apply_updates(params, updates), state, values

        return together

    runs: dict[Any, Callable[[], Any]] = {"in turn": in_turn}
    state, chosen = each.init(bank.params), bank.each()
    for at_once in (1, 2, 4, 8):
        run = step(at_once)
        runs[at_once] = lambda run=run: run(bank.params, state, chosen, base, x)
    times = medians(runs, args.repeats)
    print(f"{number} adapters, {tokens} tokens each: {times['in turn'] * 1e3:.1f} ms in turn")
    for at_once in (1, 2, 4, 8):
        print(f"{at_once:>4} at once: {times['in turn'] / times[at_once]:.2f} times faster")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--examples", type=int, default=64)
    parser.add_argument("--tokens", type=int, nargs="*", default=[64, 16, 1])
    parser.add_argument("--adapters", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--trained", type=int, default=8)
    parser.add_argument("--trained-tokens", type=int, nargs="*", default=[512, 64])
    parser.add_argument("--repeats", type=int, default=20)
    args = parser.parse_args()
    print(f"{args.layers} x {args.width}, rank {args.rank}")
    for tokens in args.tokens:
        serve(args, tokens)
    for tokens in args.trained_tokens:
        train(args, tokens)


if __name__ == "__main__":
    main()

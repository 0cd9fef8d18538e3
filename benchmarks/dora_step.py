"""Times one training step of DoRA against one of LoRA, at the same rank, in one run.

The model is a chain of Dense layers; a step is forward, backward and the gradient of the adapters.
Both rows run in one process, in turns, so that whatever else the machine does slows them alike.
The figure to watch: the step of DoRA at most 1.15 times that of LoRA, by operations and by time,
from 512 tokens on. Fewer tokens are shown too: there the norm of the weights, which does not shrink
with the tokens, weighs more.
"""

import argparse
import random
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

import peft_jax as peft


class Chain(nn.Module):
    """Dense layers of one width, a nonlinearity after each."""

    width: int
    layers: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for _ in range(self.layers):
            x = nn.gelu(nn.Dense(self.width)(x))
        return x


def compiled_step(args: argparse.Namespace, tokens: int, *, use_dora: bool) -> tuple[Any, tuple]:
    """A compiled step and what it is called with."""
    config = peft.LoraConfig(r=args.rank, target_modules="all-linear", use_dora=use_dora)
    model = peft.get_peft_model(Chain(args.width, args.layers), config)
    x = jax.random.normal(jax.random.key(0), (1, tokens, args.width), jnp.dtype(args.dtype))
    params = model.init(jax.random.key(1), x)["params"]
    base, lora = peft.split_params(params)
    base = jax.tree.map(lambda leaf: leaf.astype(args.dtype), base)

    def loss(lora: Any, base: Any, x: jax.Array) -> jax.Array:
        y = model.apply({"params": peft.merge_params(base, lora)}, x)
        return jnp.mean(jnp.square(y.astype(jnp.float32) - 1))

    arguments = (lora, base, x)
    return jax.jit(jax.value_and_grad(loss)).lower(*arguments).compile(), arguments


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 512, 1024])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--repeats", type=int, default=30)
    args = parser.parse_args()
    print(f"{args.layers} x {args.width}, rank {args.rank}, {args.dtype}")
    print(f"{'tokens':>8}{'DoRA / LoRA by operations':>28}{'by time':>10}{'temporaries':>14}")
    for tokens in args.tokens:
        steps = {dora: compiled_step(args, tokens, use_dora=dora) for dora in (False, True)}
        seconds: dict[bool, list[float]] = {False: [], True: []}
        for _ in range(args.repeats + 2):
            for dora in random.sample([False, True], 2):
                compiled, arguments = steps[dora]
                start = time.perf_counter()
                jax.block_until_ready(compiled(*arguments))
                seconds[dora].append(time.perf_counter() - start)
        lora, dora = (statistics.median(seconds[use][2:]) for use in (False, True))
        flops = [steps[use][0].cost_analysis()["flops"] for use in (False, True)]
        memory = [steps[u][0].memory_analysis().temp_size_in_bytes for u in (False, True)]
        print(
            f"{tokens:>8}{flops[1] / flops[0]:>28.3f}{dora / lora:>10.2f}"
            f"{memory[1] / memory[0]:>14.2f}"
        )


if __name__ == "__main__":
    main()

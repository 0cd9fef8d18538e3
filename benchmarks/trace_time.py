"""Times the tracing of a transformer: plain, under LoRA by ours, and by gemma.peft.

Tracing is the Python side of `jax.jit`: no array is made and nothing is compiled. All rows run in
one process, interleaved, in a new order each round, so that whatever else the machine does slows
them alike. The figure to watch: ours at most twice the plain trace.
"""

import argparse
import cProfile
import dataclasses
import pstats
import random
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn


class Block(nn.Module):
    """Attention of four projections and a two-layer MLP, each behind a norm."""

    width: int
    heads: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        split = (*x.shape[:-1], self.heads, self.width // self.heads)
        y = nn.LayerNorm(name="norm_1")(x)
        q, k, v = (nn.Dense(self.width, name=n)(y).reshape(split) for n in ("q", "k", "v"))
        y = nn.dot_product_attention(q, k, v).reshape(x.shape)
        x = x + nn.Dense(self.width, name="o")(y)
        y = nn.gelu(nn.Dense(4 * self.width, name="up")(nn.LayerNorm(name="norm_2")(x)))
        return x + nn.Dense(self.width, name="down")(y)


class Transformer(nn.Module):
    """A stack of blocks between an embedding and a projection to its vocabulary."""

    layers: int = 24
    width: int = 64
    heads: int = 4
    vocabulary: int = 128

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = nn.Embed(self.vocabulary, self.width)(tokens)
        for _ in range(self.layers):
            x = Block(self.width, self.heads)(x)
        return nn.Dense(self.vocabulary, name="head")(nn.LayerNorm()(x))


@dataclasses.dataclass(frozen=True)
class Adapt:
    """LoRA of one rank on every Dense layer, by the library given."""

    library: Any
    rank: int = 4

    def __call__(self, module: nn.Module) -> nn.Module:
        if type(module) is not nn.Dense:
            return module
        return self.library.LoRADense(rank=self.rank, wrapped=module)


Trace = Callable[[], Any]


def plain(model: nn.Module, tokens: jax.Array) -> Trace:
    return trace_of(model, tokens)


def ours(model: nn.Module, tokens: jax.Array) -> Trace:
    import peft_jax as peft

    return adapted(peft, model, tokens)


def config(model: nn.Module, tokens: jax.Array) -> Trace:
    import peft_jax as peft

    chosen = peft.LoraConfig(r=4, target_modules="all-linear", rank_pattern={"up": 2})
    return trace_of(peft.get_peft_model(model, chosen), tokens)


def gemma_peft(model: nn.Module, tokens: jax.Array) -> Trace:
    from gemma import peft

    return adapted(peft, model, tokens)


ROWS: dict[str, Callable[[nn.Module, jax.Array], Trace]] = {
    "plain": plain,
    "LoRA, peft_jax": ours,
    "get_peft_model": config,
    "LoRA, gemma.peft": gemma_peft,
}


def trace_of(model: nn.Module, tokens: jax.Array) -> Trace:
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)
    # A new function each time, so that jax's caches never answer.
    return lambda: jax.make_jaxpr(lambda params, tokens: model.apply(params, tokens))(
        params, tokens
    )


def adapted(library: Any, model: nn.Module, tokens: jax.Array) -> Trace:
    with library.ModuleInterceptor(Adapt(library)):
        trace = trace_of(model, tokens)

    def traced() -> Any:
        with library.ModuleInterceptor(Adapt(library)):
            return trace()

    return traced


def seconds(trace: Trace) -> float:
    """Of the processor, not of the clock: other work on the machine does not count."""
    start = time.process_time()
    trace()
    return time.process_time() - start


def rows(model: nn.Module, tokens: jax.Array) -> dict[str, Trace | None]:
    """A trace for each row, run once; None where its library is not installed."""
    found: dict[str, Trace | None] = {}
    for name, row in ROWS.items():
        try:
            found[name] = trace = row(model, tokens)
        except ModuleNotFoundError:
            found[name] = None
        else:
            trace()
    return found


def measure(model: nn.Module, tokens: jax.Array, rounds: int) -> dict[str, float | None]:
    """Median seconds of each row."""
    traces = rows(model, tokens)
    times: dict[str, list[float]] = {name: [] for name in traces}
    for _ in range(rounds):
        for name in random.sample(list(traces), len(traces)):
            if (trace := traces[name]) is not None:
                times[name].append(seconds(trace))
    return {name: statistics.median(found) if found else None for name, found in times.items()}


def profile(trace: Trace, lines: int) -> None:
    """Where the time of one trace goes, by the time inside each function."""
    profiler = cProfile.Profile()
    profiler.runcall(trace)
    pstats.Stats(profiler).sort_stats("tottime").print_stats(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=24, help="blocks of the transformer")
    parser.add_argument("--rounds", type=int, default=9, help="traces of each row")
    parser.add_argument("--seed", type=int, default=0, help="of the order of the rows")
    parser.add_argument("--profile", type=int, default=0, help="lines of our profile to print")
    options = parser.parse_args()
    random.seed(options.seed)

    warnings.simplefilter("ignore")  # gemma.peft asks for float64
    model, tokens = Transformer(options.layers), jnp.zeros((2, 16), jnp.int32)
    times = measure(model, tokens, options.rounds)
    reference = times["plain"]
    print(f"{options.layers} blocks, median of {options.rounds} interleaved traces")
    for name, found in times.items():
        if found is None:
            print(f"{name:20} not installed")
        else:
            print(f"{name:20} {found * 1e3:8.1f} ms  {found / reference:5.2f}x")
    if options.profile:
        profile(rows(model, tokens)["get_peft_model"], options.profile)


if __name__ == "__main__":
    main()

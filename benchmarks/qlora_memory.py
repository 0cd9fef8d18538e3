"""Counts the temporaries of a QLoRA step against the number of layers: ours and qwix's.

The model is a chain of Dense layers of one width, a nonlinearity after each; a step is the loss
and its gradient with respect to the adapters. Nothing runs and no array is made: the step is
compiled, and the compiler says what it would allocate. The figure to watch: the growth with each
layer, as a part of what the layer takes dequantized, is that of the activations alone, which is
the growth of the float model under LoRA.
"""

import argparse
import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

import peft_jax as peft

Temporaries = Callable[[nn.Module, jax.ShapeDtypeStruct], int]


class Chain(nn.Module):
    """Dense layers of one width, a nonlinearity after each."""

    width: int
    layers: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for _ in range(self.layers):
            x = nn.gelu(nn.Dense(self.width)(x))
        return x


# --- The rows ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Adapt:
    """LoRA on every Dense layer, whose kernel is stored by the method."""

    rank: int
    method: str

    def __call__(self, module: nn.Module) -> nn.Module:
        if type(module) is not nn.Dense:
            return module
        if self.method != FLOAT:
            module = peft.Int4Dense(wrapped=module, method=self.method)
        return peft.LoRADense(rank=self.rank, wrapped=module)


def ours(model: nn.Module, x: jax.ShapeDtypeStruct, rank: int, method: str) -> int:
    with peft.ModuleInterceptor(Adapt(rank, method)):
        return temporaries(model, x)


def qwix_lora(model: nn.Module, x: jax.ShapeDtypeStruct, rank: int, method: str) -> int:
    import qwix

    stored = None if method == FLOAT else method
    provider = qwix.LoraProvider(module_path=".*", rank=rank, alpha=rank, weight_qtype=stored)
    return temporaries(qwix.apply_lora_to_model(model, provider), x)


FLOAT = "none"
LIBRARIES = {
    "peft_jax": (ours, [method.value for method in peft.QuantizationMethod]),
    "qwix": (qwix_lora, [FLOAT, "int4", "int8", "nf4"]),
}


def rows(rank: int) -> dict[str, Temporaries]:
    return {
        f"{library:9} {'float32' if method == FLOAT else method}": functools.partial(
            row, rank=rank, method=method
        )
        for library, (row, methods) in LIBRARIES.items()
        for method in methods
    }


# --- A step --------------------------------------------------------------------------------------


def temporaries(model: nn.Module, x: jax.ShapeDtypeStruct) -> int:
    """Bytes that the compiled step allocates beside its arguments and results."""
    params = flatten_dict(jax.eval_shape(model.init, jax.random.key(0), x)["params"])
    trained = {p: leaf for p, leaf in params.items() if any("lora" in name for name in p)}
    kept = {path: leaf for path, leaf in params.items() if path not in trained}

    def loss(trained: Any, kept: Any, x: jax.Array) -> jax.Array:
        y = model.apply({"params": unflatten_dict(trained | kept)}, x)
        return jnp.mean((y - 1) ** 2)

    step = jax.jit(jax.value_and_grad(loss))
    return step.lower(trained, kept, x).compile().memory_analysis().temp_size_in_bytes


# --- The table -----------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 2, 4, 8], help="Dense layers")
    parser.add_argument("--width", type=int, default=1792, help="features of every layer")
    parser.add_argument("--tokens", type=int, default=64, help="rows of the input")
    parser.add_argument("--rank", type=int, default=8, help="rank of the adapters")
    options = parser.parse_args()

    x = jax.ShapeDtypeStruct((options.tokens, options.width), jnp.float32)
    weight = 4 * options.width**2
    print(f"Temporaries in MB; a layer takes {weight / 1e6:.1f} MB dequantized, and growth is what")
    print("each further layer adds, as a part of that, from one column to the next.\n")
    heads = "".join(f"{f'{n} layers':>11}" for n in options.layers)
    print(f"{'step':24}{heads}   growth")
    for name, row in rows(options.rank).items():
        try:
            found = [row(Chain(options.width, n), x) for n in options.layers]
        except ModuleNotFoundError:
            print(f"{name:24} not installed")
            continue
        steps = itertools.pairwise(zip(options.layers, found, strict=True))
        growth = [f"{(b - a) / (m - n) / weight:.2f}" for (n, a), (m, b) in steps]
        print(
            f"{name:24}"
            + "".join(f"{size / 1e6:11.2f}" for size in found)
            + f"   {' '.join(growth)}"
        )


if __name__ == "__main__":
    main()

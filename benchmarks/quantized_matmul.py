"""Times a Dense layer whose kernel is stored in few bits: ours, gemma.peft's and qwix's.

Every layer is jitted and takes its parameters as arguments; before it is timed, its output is
checked against the weight that its own stored values stand for. All rows run in one process, in a
new order each round, so that whatever else the machine does slows them alike, and no row finds its
weight in the cache; a ratio is the median of the ratios within the rounds. The figures to watch
come last: on CPU, at batch 1 at least 8 times faster than each peer with as many bits; at batch 16
not slower than nn.Dense; at batch 256 at most 1.1 times nn.Dense with a scale for each block, and
0.7 times with one for each channel.
"""

import argparse
import functools
import random
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

import peft_jax as peft

Params = dict[str, jax.Array]


class Row(NamedTuple):
    """A line of the table."""

    library: str
    method: str


class Layer(NamedTuple):
    """A layer, what it is called with, and the weight that this stands for."""

    module: nn.Module
    params: Any
    weight: Callable[[], jax.Array]


# --- The rows ------------------------------------------------------------------------------------


def plain(params: Params) -> Layer:
    return Layer(dense(params), params, lambda: params["kernel"])


def ours(params: Params, method: str) -> Layer:
    stored = peft.quantize_checkpoint(params, method=method)
    module = peft.Int4Dense(wrapped=dense(params), method=method)
    return Layer(module, stored, lambda: peft.dequantize(stored["kernel"], stored["scale"]))


def gemma_peft(params: Params, method: str) -> Layer:
    from gemma import peft

    stored = peft.quantize(
        params, method=method, checkpoint_kernel_key="kernel", in_place_keys=True
    )
    module = peft.IntDense(wrapped=dense(params, dtype=jnp.float32), dtype=method)
    return Layer(module, stored, lambda: stored["kernel"].astype(jnp.float32) / stored["scale"])


def qwix_ptq(params: Params, method: str) -> Layer:
    import qwix

    rule = qwix.QuantizationRule(module_path=".*", weight_qtype=method)
    module = qwix.quantize_model(dense(params), qwix.PtqProvider([rule]))
    x = jnp.zeros((1, params["kernel"].shape[0]))
    template = jax.eval_shape(module.init, jax.random.key(0), x)["params"]
    stored = qwix.quantize_params(params, template)
    return Layer(module, stored, lambda: qwix.dequantize(stored["kernel"].array))


def dense(params: Params, **options: Any) -> nn.Dense:
    return nn.Dense(params["kernel"].shape[1], **options)


OWN, FLOAT = "peft_jax", Row("nn.Dense", "float32")
METHODS = [method.value for method in peft.QuantizationMethod if method.value != "none"]
PEERS = {"gemma.peft": gemma_peft, "qwix": qwix_ptq}
ROWS: dict[Row, Callable[[Params], Layer]] = {
    FLOAT: plain,
    **{Row(OWN, method): functools.partial(ours, method=method) for method in METHODS},
    **{
        Row(library, method): functools.partial(peer, method=method)
        for library, peer in PEERS.items()
        for method in ("int4", "int8")
    },
}


def build(inputs: int, outputs: int) -> dict[Row, Layer]:
    """The layers of the libraries that are installed, of one float layer."""
    kernel = jax.random.normal(jax.random.key(0), (inputs, outputs)) / inputs**0.5
    params = {"kernel": kernel, "bias": jnp.linspace(-1, 1, outputs)}
    layers: dict[Row, Layer] = {}
    for row, make in ROWS.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # gemma.peft asks for float64
                layers[row] = make(params)
        except ModuleNotFoundError:
            print(f"{' '.join(row)}: not installed")
    return layers


# --- Time ----------------------------------------------------------------------------------------

Seconds = dict[Row, list[float]]


def measure(layers: dict[Row, Layer], batch: int, rounds: int) -> Seconds:
    """Seconds of each row in each round."""
    width = layers[FLOAT].params["kernel"].shape[0]
    x = jax.random.normal(jax.random.key(1), (batch, width))
    calls = {row: checked(row, layer, x) for row, layer in layers.items()}
    spent: Seconds = {row: [] for row in calls}
    for _ in range(rounds):
        for row, call in random.sample(list(calls.items()), len(calls)):
            start = time.perf_counter()
            jax.block_until_ready(call())
            spent[row].append(time.perf_counter() - start)
    return spent


def checked(row: Row, layer: Layer, x: jax.Array) -> Callable[[], jax.Array]:
    """A call of the compiled layer, whose result is right."""
    run = jax.jit(lambda params, x: layer.module.apply({"params": params}, x))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        y = np.asarray(run(layer.params, x))
    expected = np.asarray(x) @ np.asarray(layer.weight()) + np.asarray(layer.params["bias"])
    error = np.abs(y - expected).max() / np.abs(expected).max()
    if not error < 1e-5:
        raise ValueError(
            f"{' '.join(row)} at batch {len(x)} is off by {error:.1e} of the largest output: its "
            "time says nothing."
        )
    return lambda: run(layer.params, x)


def ratio(spent: Seconds, row: Row, base: Row) -> float:
    """How many times longer one row takes than another, in the median round."""
    pairs = zip(spent[row], spent[base], strict=True)
    return statistics.median(seconds / reference for seconds, reference in pairs)


# --- What must be reached ------------------------------------------------------------------------


class Target(NamedTuple):
    """A bound on a ratio."""

    value: float
    bound: float
    at_least: bool

    def __str__(self) -> str:
        reached = self.value >= self.bound if self.at_least else self.value <= self.bound
        words = "at least" if self.at_least else "at most"
        return (
            f"{self.value:.2f}, {words} {self.bound:g}: {'reached' if reached else 'NOT REACHED'}"
        )


def one_row(spent: Seconds, method: str) -> Target | None:
    bits = "int8" if method in ("int8", "sfp8") else "int4"
    peers = [Row(library, bits) for library in PEERS if Row(library, bits) in spent]
    if not peers:
        return None
    return Target(min(ratio(spent, peer, Row(OWN, method)) for peer in peers), 8, True)


def few_rows(spent: Seconds, method: str) -> Target:
    return Target(ratio(spent, Row(OWN, method), FLOAT), 1, False)


def many_rows(spent: Seconds, method: str) -> Target:
    bound = 0.7 if peft.QuantizationMethod(method).per_channel else 1.1
    return Target(ratio(spent, Row(OWN, method), FLOAT), bound, False)


TARGETS: dict[int, tuple[str, Callable[[Seconds, str], Target | None]]] = {
    1: ("time of the faster peer / ours", one_row),
    16: ("time / nn.Dense", few_rows),
    256: ("time / nn.Dense", many_rows),
}


# --- The tables ----------------------------------------------------------------------------------


def print_times(spent: dict[int, Seconds]) -> None:
    print(f"{'':26}" + "".join(f"{f'batch {batch}':>19}" for batch in spent))
    print(f"{'layer':26}" + f"{'ms':>10}{'/ Dense':>9}" * len(spent))
    for row in next(iter(spent.values())):
        cells = [
            f"{1e3 * statistics.median(seconds[row]):10.2f}{ratio(seconds, row, FLOAT):9.2f}"
            for seconds in spent.values()
        ]
        print(f"{row.library:11}{row.method:15}" + "".join(cells))


def print_targets(spent: dict[int, Seconds]) -> None:
    for batch, (text, target) in TARGETS.items():
        if batch not in spent:
            continue
        print(f"\nbatch {batch}: {text}")
        for method in METHODS:
            print(f"  {method:15} {target(spent[batch], method) or 'no peer is installed'}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--inputs", type=int, default=4096, help="input features")
    parser.add_argument("--outputs", type=int, default=4096, help="output features")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16, 256], help="input rows")
    parser.add_argument("--repeats", type=int, default=30, help="rounds to take the median of")
    options = parser.parse_args()

    layers = build(options.inputs, options.outputs)
    spent = {batch: measure(layers, batch, options.repeats) for batch in options.batches}
    print_times(spent)
    print_targets(spent)


if __name__ == "__main__":
    main()

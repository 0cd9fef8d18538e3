"""Times `quantize_checkpoint` against gguf's own quantizer, and looks at the memory that it takes.

Both read the same float32 kernels; the Q4_0 values of the first are compared before anything is
timed. All rows run in one process, in a new order each round, so that whatever else the machine
does slows them alike; a ratio is the median of the ratios within the rounds. Memory: the arrays
alive while kernels are stored one after the other, and the temporaries of storing one. The figures
to watch: Q4_0 at least 3 times as fast as gguf, and arrays and temporaries that take no more than
the input, the output and one kernel.
"""

import argparse
import random
import statistics
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

import peft_jax as peft

Params = dict[str, dict[str, Any]]
Seconds = dict[str, list[float]]

METHODS = [method.value for method in peft.QuantizationMethod if method.value != "none"]
Q4_0 = "q4_0"
GGUF = f"gguf {Q4_0}"


def draw(kernels: int, rows: int, columns: int) -> Params:
    keys = jax.random.split(jax.random.key(0), kernels)
    draws = [0.02 * jax.random.normal(key, (rows, columns)) for key in keys]
    return {f"layer_{i}": {"kernel": kernel} for i, kernel in enumerate(draws)}


def total(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


# --- Speed ---------------------------------------------------------------------------------------


def runs(params: Params) -> dict[str, Callable[[], Any]]:
    """What is timed, by name; gguf's where it is installed."""
    found: dict[str, Callable[[], Any]] = {}
    try:
        found[GGUF] = gguf_run(params)
    except ModuleNotFoundError:
        print("gguf: not installed")
    for method in METHODS:
        found[f"peft_jax {method}"] = lambda method=method: jax.block_until_ready(
            peft.quantize_checkpoint(params, method=method)
        )
    return found


def gguf_run(params: Params) -> Callable[[], Any]:
    from gguf import GGMLQuantizationType, quants

    theirs = GGMLQuantizationType.Q4_0
    arrays = [np.asarray(layer["kernel"]) for layer in params.values()]
    first = quants.dequantize(quants.quantize(arrays[0], theirs), theirs)
    if not np.array_equal(first, peft.simulate_quantize(arrays[0], Q4_0)):
        raise ValueError("Q4_0 is not that of gguf: its time says nothing.")
    return lambda: [quants.quantize(array, theirs) for array in arrays]


def measure(calls: dict[str, Callable[[], Any]], rounds: int) -> Seconds:
    """Seconds of each row in each round, after one call that is not counted."""
    spent: Seconds = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(rounds):
        for name, call in random.sample(list(calls.items()), len(calls)):
            start = time.perf_counter()
            call()
            spent[name].append(time.perf_counter() - start)
    return spent


def print_speed(spent: Seconds, size: int) -> None:
    print(f"{'quantizer':26}{'ms':>8}{'GB/s':>8}{'/ gguf':>8}")
    for name, seconds in spent.items():
        median = statistics.median(seconds)
        cells = f"{1e3 * median:8.0f}{size / median / 1e9:8.2f}"
        if GGUF in spent:
            pairs = zip(spent[GGUF], seconds, strict=True)
            faster = statistics.median(theirs / own for theirs, own in pairs)
            cells += f"{faster:8.2f}"
            if name == f"peft_jax {Q4_0}":
                cells += f"  at least 3: {'reached' if faster >= 3 else 'NOT REACHED'}"
        print(f"{name:26}{cells}")


# --- Memory --------------------------------------------------------------------------------------


def print_memory(params: Params) -> None:
    kernel = next(iter(params.values()))["kernel"]
    names = ("input", "output", "arrays", "temporaries", "bound")
    print(f"\n{'MB':16}" + "".join(f"{name:>12}" for name in names))
    for method in METHODS:
        before = alive() - total(params)
        small, most = watched(lambda method=method: peft.quantize_checkpoint(params, method=method))
        arrays, temporary = most - before, temporaries(kernel, method)
        bound = total(params) + total(small) + total(kernel)
        sizes = (total(params), total(small), arrays, temporary, bound)
        reached = "reached" if arrays + temporary <= bound else "NOT REACHED"
        print(f"{method:16}" + "".join(f"{size / 1e6:12.1f}" for size in sizes) + f"  {reached}")
    print("arrays: the most that were alive; bound: input + output + one kernel")


def alive() -> int:
    return sum(array.nbytes for array in jax.live_arrays())


def watched(run: Callable[[], Any]) -> tuple[Any, int]:
    """A result, and the most bytes in arrays that were seen on the way to it."""
    done, seen = threading.Event(), [alive()]

    def watch() -> None:
        while not done.wait(1e-3):
            seen.append(alive())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        result = jax.block_until_ready(run())
    finally:
        done.set()
        watcher.join()
    return result, max(*seen, alive())


def temporaries(kernel: jax.Array, method: str) -> int:
    """Bytes that storing one kernel allocates beside itself and the result."""
    x = jax.ShapeDtypeStruct(kernel.shape, kernel.dtype)
    run = jax.jit(lambda x: peft.quantize(x, method))
    return run.lower(x).compile().memory_analysis().temp_size_in_bytes


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kernels", type=int, default=8, help="how many weights")
    parser.add_argument("--rows", type=int, default=2048, help="of a kernel")
    parser.add_argument("--columns", type=int, default=4096, help="of a kernel")
    parser.add_argument("--repeats", type=int, default=5, help="rounds to take the median of")
    options = parser.parse_args()

    params = draw(options.kernels, options.rows, options.columns)
    print_speed(measure(runs(params), options.repeats), total(params))
    print_memory(params)


if __name__ == "__main__":
    main()

"""`peft-jax diff`."""

from __future__ import annotations

import argparse
import json
import math
from typing import Any

import numpy as np

from peft_jax._numerics import product_dot, product_norm
from peft_jax.cli._screen import Progress, in_order, print_table, say
from peft_jax.io.any_adapter import read_adapter
from peft_jax.io.checkpoints.open import open_checkpoint
from peft_jax.io.checkpoints.read import Checkpoint, paired_chunks
from peft_jax.io.files.formats import Array, adapter_format
from peft_jax.io.huggingface.pairs import HuggingFaceAdapter, Module, described

EQUAL, DIFFERENT = 0, 1


def run(options: argparse.Namespace) -> int:
    """Compares two adapters or two checkpoints; see the exit statuses above."""
    if not options.tolerance >= 0:
        raise ValueError(f"--tolerance is a number from 0 on, got {options.tolerance}.")
    for path in (options.a, options.b):
        if not path.exists():
            raise ValueError(f"There is no {str(path)!r}.")
    kinds = [adapter_format(path) is not None for path in (options.a, options.b)]
    if kinds[0] != kinds[1]:
        which = options.a if kinds[0] else options.b
        raise ValueError(
            f"{str(which)!r} is an adapter and the other is none. Compare two of a kind."
        )
    if kinds[0]:
        report = compare_adapters(
            read_adapter(options.a), read_adapter(options.b), options.tolerance
        )
    else:
        with open_checkpoint(options.a) as a, open_checkpoint(options.b) as b:
            report = compare_checkpoints(a, b, options.tolerance)
    report = {"a": str(options.a), "b": str(options.b), **report}
    if options.json:
        say(json.dumps(report, indent=2))
    else:
        _show(report)
    return EQUAL if report["equal"] else DIFFERENT


def _report(kind: str, rows: list[dict[str, Any]], only: tuple[Any, Any]) -> dict[str, Any]:
    rows = in_order(rows, lambda row: row["name"])
    equal = not any(only) and all(row["equal"] for row in rows)
    return {
        "kind": kind,
        "equal": equal,
        "rows": rows,
        "only_in_a": in_order(only[0]),
        "only_in_b": in_order(only[1]),
    }


def _row(
    name: str, sizes: tuple[float, float, float], dot: float, tolerance: float, note: str = ""
) -> dict[str, Any]:
    """One comparison, of the norms of both and of their difference.

    The relative difference is that to the larger of both; None stands for a number that is not
    finite, or for the cosine where one of both is zero.
    """
    a, b, difference = sizes
    larger = max(a, b)
    relative = difference / larger if larger else 0.0
    cosine = min(max(dot / (a * b), -1.0), 1.0) if a * b else None
    return {
        "name": name,
        "norm_a": _finite(a),
        "norm_b": _finite(b),
        "relative_difference": _finite(relative),
        "cosine": None if cosine is None else _finite(cosine),
        "equal": not note and (difference == 0 or relative <= tolerance),
        "note": note,
    }


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


# --- Checkpoints ---------------------------------------------------------------------------------


def compare_checkpoints(a: Checkpoint, b: Checkpoint, tolerance: float = 0.0) -> dict[str, Any]:
    """Tensor by tensor, as plain data. Slashes and dots in names are one.

    Args:
      a: a checkpoint.
      b: another.
      tolerance: relative differences up to this are none.
    """
    names_a = {".".join(a.path_of(name)): name for name in a.names}
    names_b = {".".join(b.path_of(name)): name for name in b.names}
    both = [name for name in names_a if name in names_b]
    rows = []
    with Progress("diff", sum(a.nbytes(names_a[name]) for name in both)) as progress:
        for name in both:
            rows.append(_compared(name, (a, names_a[name]), (b, names_b[name]), tolerance))
            progress.update(a.nbytes(names_a[name]))
    only = (
        [names_a[name] for name in names_a if name not in names_b],
        [names_b[name] for name in names_b if name not in names_a],
    )
    return _report("checkpoints", rows, only)


def _compared(
    name: str, a: tuple[Checkpoint, str], b: tuple[Checkpoint, str], tolerance: float
) -> dict[str, Any]:
    shapes = a[0].shape(a[1]), b[0].shape(b[1])
    if shapes[0] != shapes[1]:
        return _row(
            name, (np.nan, np.nan, np.nan), 0, tolerance, f"shapes {shapes[0]}, {shapes[1]}"
        )
    squares, dot, same = np.zeros(3), 0.0, True
    for x, y in paired_chunks(a[0], b[0], a[1], b[1]):
        same = same and x.dtype == y.dtype and x.tobytes() == y.tobytes()
        for start in range(0, x.size, 2**20):
            left, right = (v.reshape(-1)[start : start + 2**20] for v in (x, y))
            left, right = left.astype(np.float64), right.astype(np.float64)
            with np.errstate(all="ignore"):  # numbers that are not finite
                squares += [left @ left, right @ right, np.sum(np.square(left - right))]
                dot += float(left @ right)
    dtypes = a[0].dtype(a[1]), b[0].dtype(b[1])
    note = "" if dtypes[0] == dtypes[1] else f"dtypes {dtypes[0]}, {dtypes[1]}"
    row = _row(name, _triple(np.sqrt(squares)), dot, tolerance, note)
    return row | {"equal": True} if same else row


def _triple(values: Array) -> tuple[float, float, float]:
    first, second, third = map(float, values)
    return first, second, third


# --- Adapters ------------------------------------------------------------------------------------


def compare_adapters(
    a: HuggingFaceAdapter, b: HuggingFaceAdapter, tolerance: float = 0.0
) -> dict[str, Any]:
    """Layer by layer what the adapters add to weights, ``scaling * b·a``, as plain data.

    Magnitudes, biases and parameters trained in place are rows of their own.

    Args:
      a: an adapter.
      b: another.
      tolerance: relative differences up to this are none.
    """
    values_a, values_b = _values(a), _values(b)
    both = [name for name in values_a if name in values_b]
    rows = [_compared_modules(name, values_a[name], values_b[name], tolerance) for name in both]
    only = (
        [name for name in values_a if name not in values_b],
        [name for name in values_b if name not in values_a],
    )
    report = _report("adapters", rows, only)
    variants = [described(adapter.config) for adapter in (a, b)]
    return report | {"variants": variants}


def _values(adapter: HuggingFaceAdapter) -> dict[str, Any]:
    """What is compared: the factors of each module, and plain arrays."""
    found: dict[str, Any] = dict(adapter.whole)
    for name, module in adapter.modules.items():
        if "a" in module.arrays:
            found[name] = module
        for part in ("magnitude", "bias", "rows"):
            if part in module.arrays:
                factor = module.scaling if part == "bias" else 1.0
                array = module.arrays[part].astype(np.float64) * factor
                label = f"{module.name} ({part})"
                found[label] = array.reshape(-1) if part == "magnitude" else array
    return found


def _compared_modules(name: str, a: Any, b: Any, tolerance: float) -> dict[str, Any]:
    left, right = _pair(a), _pair(b)
    shapes = [(len(pair[0]), pair[1].shape[1]) for pair in (left, right)]
    if shapes[0] != shapes[1]:
        return _row(
            name, (np.nan, np.nan, np.nan), 0, tolerance, f"shapes {shapes[0]}, {shapes[1]}"
        )
    same = all(np.array_equal(x, y, equal_nan=True) for x, y in zip(left, right, strict=True))
    difference = (
        np.concatenate([left[0], -right[0]], axis=1),
        np.concatenate([left[1], right[1]]),
    )
    sizes = (
        product_norm(*left),
        product_norm(*right),
        0.0 if same else product_norm(*difference),
    )
    row = _row(name, sizes, product_dot(left, right), tolerance)
    ranks = [value.rank if isinstance(value, Module) else None for value in (a, b)]
    return row | ({"ranks": ranks} if ranks[0] is not None else {})


def _pair(value: Any) -> tuple[Array, Array]:
    """Factors of what is compared; an array is its own."""
    if isinstance(value, Module):
        return value.factors
    array = np.asarray(value, np.float64).reshape(-1, 1)
    return array, np.ones((1, 1))


# --- The table -----------------------------------------------------------------------------------


def _show(report: dict[str, Any]) -> None:
    different = [row for row in report["rows"] if not row["equal"]]
    keys = ("norm_a", "norm_b", "relative_difference", "cosine")
    titles = ("norm in A", "norm in B", "relative difference", "cosine")
    rows = [[row["name"], *(_number(row[key]) for key in keys), row["note"]] for row in different]
    if rows:
        print_table(("what differs", *titles, ""), rows, titles)
    for name in report["only_in_a"]:
        say(f"only in {report['a']}: {name}")
    for name in report["only_in_b"]:
        say(f"only in {report['b']}: {name}")
    alike = len(report["rows"]) - len(different)
    say(f"{alike} of {len(report['rows'])} that both hold are equal")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"

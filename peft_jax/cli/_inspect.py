"""`peft-jax inspect`."""

from __future__ import annotations

import argparse
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np

from peft_jax._numerics import norm, product_norm
from peft_jax.cli._report import shown_shape
from peft_jax.cli._screen import in_order, print_table, readable, say, warn
from peft_jax.io.any_adapter import read_adapter
from peft_jax.io.checkpoints.open import open_checkpoint
from peft_jax.io.checkpoints.read import Checkpoint
from peft_jax.io.files.atomic import check_output
from peft_jax.io.files.formats import adapter_format
from peft_jax.io.huggingface.pairs import HuggingFaceAdapter, Module, described

_STORED = re.compile(r"(?P<method>[a-z][a-z0-9_]*?)_axis(?P<axis>-?\d+)_len(?P<length>\d+)")
_PLAIN = ("int8", "sfp8")
_OF_ADAPTERS = ("a", "b", "magnitude", "bias", "rows")


def run(options: argparse.Namespace) -> int:
    """Shows the layers of a checkpoint or an adapter."""
    if options.plot is not None:
        check_output(options.plot, [options.path], options.force)
        from peft_jax.cli._plot import check_plot

        check_plot(options.plot)
    if not options.path.exists():
        raise ValueError(f"There is no {str(options.path)!r}.")
    found = adapter_format(options.path)
    if found is not None:
        adapter = read_adapter(options.path)
        report = report_adapter(options.path, found, adapter)
    else:
        with open_checkpoint(options.path) as checkpoint:
            report = report_checkpoint(checkpoint)
    if options.json:
        say(json.dumps(report, indent=2))
    else:
        _show(report)
    if options.plot is not None:
        from peft_jax.cli._plot import draw_adapter, draw_checkpoint

        if found is not None:
            draw_adapter(adapter, options.plot)
        else:
            with open_checkpoint(options.path) as checkpoint:
                draw_checkpoint(checkpoint, options.plot)
        warn("inspect", f"wrote {options.plot}")
    return 0


def _tensor(
    shape: tuple[int, ...], dtype: np.dtype[Any], size: int | None = None
) -> dict[str, Any]:
    count = int(np.prod(shape, dtype=np.int64))
    held = count * dtype.itemsize if size is None else size
    return {"shape": list(shape), "dtype": str(dtype), "parameters": count, "bytes": held}


# --- Adapters ------------------------------------------------------------------------------------


def report_adapter(path: Path, format: str, adapter: HuggingFaceAdapter) -> dict[str, Any]:
    """What is known of an adapter, as plain data."""
    layers = [_module(module) for module in adapter.modules.values()]
    for name, array in adapter.whole.items():
        layer, _, leaf = name.rpartition(".")
        tensors = {leaf: _tensor(array.shape, array.dtype)}
        layers.append({"name": layer, "kind": "whole", "tensors": tensors, **_sums(tensors)})
    return {
        "path": str(path),
        "kind": "adapter",
        "format": format,
        "variant": described(adapter.config),
        "layers": in_order(layers, lambda layer: layer["name"]),
        "total": _total(layers),
    }


def _module(module: Module) -> dict[str, Any]:
    tensors = {name: _tensor(array.shape, array.dtype) for name, array in module.arrays.items()}
    is_rows = "rows" in module.arrays
    size = norm(module.arrays["rows"]) if is_rows else product_norm(*module.factors)
    return {
        "name": module.name,
        "kind": "rows" if is_rows else "adapter",
        "tensors": tensors,
        "rank": module.rank,
        "alpha": None if is_rows else module.alpha,
        "scaling": None if is_rows else module.scaling,
        "delta_norm": size if math.isfinite(size) else None,
        **_sums(tensors),
    }


def _sums(tensors: dict[str, dict[str, Any]]) -> dict[str, int]:
    return {key: sum(tensor[key] for tensor in tensors.values()) for key in ("parameters", "bytes")}


def _total(layers: list[dict[str, Any]]) -> dict[str, int]:
    return {
        "layers": len(layers),
        "tensors": sum(len(layer["tensors"]) for layer in layers),
        "parameters": sum(layer["parameters"] for layer in layers),
        "bytes": sum(layer["bytes"] for layer in layers),
    }


# --- Checkpoints ---------------------------------------------------------------------------------


def report_checkpoint(checkpoint: Checkpoint) -> dict[str, Any]:
    """What is known of a checkpoint, as plain data; only its headers are read."""
    grouped: dict[str, dict[str, dict[str, Any]]] = {}
    for name in checkpoint.names:
        layer, leaf, tensor = _placed(checkpoint, name)
        grouped.setdefault(layer, {})[leaf] = tensor
    layers = []
    for layer, tensors in grouped.items():
        ranks = {
            t["shape"][-1] for leaf, t in tensors.items() if leaf.endswith("/a") and t["shape"]
        }
        layers.append(
            {"name": layer, "tensors": tensors, "rank": max(ranks, default=None), **_sums(tensors)}
        )
    return {
        "path": str(checkpoint.path),
        "kind": "checkpoint",
        "format": checkpoint.format,
        "layers": in_order(layers, lambda layer: layer["name"]),
        "total": _total(layers),
    }


def _placed(checkpoint: Checkpoint, name: str) -> tuple[str, str, dict[str, Any]]:
    """The layer of a tensor, what it is there, and its shape, dtype and bytes."""
    path = checkpoint.path_of(name)
    shape, dtype = checkpoint.shape(name), checkpoint.dtype(name)
    tensor = _tensor(shape, dtype)
    stored = _STORED.fullmatch(path[-1])
    if len(path) > 1 and (stored or path[-1] in _PLAIN):
        values = list(shape)
        if stored and -len(shape) <= int(stored["axis"]) < len(shape):
            values[int(stored["axis"])] = int(stored["length"])
        tensor = _tensor(tuple(values), dtype, tensor["bytes"])
        tensor["dtype"] = stored["method"] if stored else path[-1]
        return checkpoint.separator.join(path[:-2]), path[-2], tensor
    if len(path) > 1 and path[-1] in _OF_ADAPTERS and path[-2].startswith("lora"):
        return checkpoint.separator.join(path[:-2]), f"{path[-2]}/{path[-1]}", tensor
    return checkpoint.separator.join(path[:-1]), path[-1], tensor


# --- The table -----------------------------------------------------------------------------------


def _show(report: dict[str, Any]) -> None:
    total, is_adapter = report["total"], report["kind"] == "adapter"
    columns = ["layer", "tensors", "dtype", "rank"]
    columns += ["alpha", "scaling", "norm of b·a"] if is_adapter else []
    columns += ["parameters", "bytes"]
    rows = []
    for layer in report["layers"]:
        tensors = layer["tensors"]
        shapes = ", ".join(f"{leaf} {shown_shape(t['shape'])}" for leaf, t in tensors.items())
        dtypes = ", ".join(dict.fromkeys(t["dtype"] for t in tensors.values()))
        row = [layer["name"] or "(the root)", shapes, dtypes, _number(layer.get("rank"))]
        if is_adapter:
            row += [_number(layer.get(key)) for key in ("alpha", "scaling", "delta_norm")]
        rows.append([*row, f"{layer['parameters']:,d}", f"{layer['bytes']:,d}"])
    print_table(columns, rows, columns[3:])
    say(
        f"{report['format']} {report['kind']}"
        + (f" ({report['variant']})" if is_adapter else "")
        + f": {total['layers']} layers, {total['tensors']} tensors, {total['parameters']:,d} "
        f"parameters, {readable(total['bytes'])}"
    )


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"

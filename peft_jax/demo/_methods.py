"""The size and the accuracy of a model, stored by each quantization method."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
from flax import traverse_util
from rich.table import Table

import peft_jax as peft
from peft_jax.demo._digits import Digits
from peft_jax.demo._training import Params, Training

METHODS = tuple(method.value for method in peft.QuantizationMethod)


def fitting(params: Params, specs: dict[str, peft.LayerSpec], method: str) -> frozenset[str]:
    """The slashed paths of the weights in `specs` whose shape a method's blocks divide."""
    axis, length = peft.QuantizationMethod(method).block or (-1, 1)
    flat = traverse_util.flatten_dict(params, sep="/")
    return frozenset(path for path in specs if flat[path].shape[axis] % length == 0)


def nbytes(params: Any) -> int:
    """The bytes of parameters, scales of stored values included."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(params))


def table_of_methods(
    model: nn.Module, training: Training, digits: Digits, among: Sequence[int]
) -> Table:
    """Compares quantization methods on the plain model of a training."""
    params = training.trainable
    specs = peft.layer_specs(model, digits.images[:1])
    table = Table("stored as", title=f"The model of {training.name}, in fewer bits")
    for column in ("weights stored", "parameters", "ratio", "accuracy"):
        table.add_column(column, justify="right")
    for method in METHODS:
        weights = fitting(params, specs, method) if method != "none" else frozenset()
        stored = peft.quantize_checkpoint(
            params, method=method, specs=specs, select=weights.__contains__
        )
        restored = dataclasses.replace(training, trainable=peft.dequantize_checkpoint(stored))
        table.add_row(
            "float32" if method == "none" else method.upper(),
            f"{len(weights)} of {len(specs)}",
            f"{nbytes(stored) / 1024:.0f} KiB",
            f"{nbytes(params) / nbytes(stored):.1f}x",
            f"{restored.accuracy(digits, among):.1%}",
        )
    return table

"""GGUF, the format of llama.cpp, written by the package `gguf`."""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import ml_dtypes
import numpy as np
from flax.core import meta

from peft_jax._numerics import StoredValues, as_stored, layer_axes, unpack
from peft_jax._spec import LayerSpec, parse_equation
from peft_jax._trees import adapter_paths, children, is_branch, stored_weights
from peft_jax.io.gguf.write import FileTensor, check_names, write_gguf

_BLOCK = 32
_MOST_AXES = 4


def export_gguf(
    params: Any,
    path: str | os.PathLike[str],
    specs: Mapping[str, LayerSpec] | None = None,
    *,
    names: Mapping[str, str] | Callable[[str], str] | None = None,
    architecture: str = "peft_jax",
) -> dict[str, str]:
    """Writes parameters to a GGUF file: Q4_0 weights as they are stored, floats as floats.

    A reader's dequantized values are those of `dequantize`. GGML's blocks lie along the last axis
    of a tensor, which for a product is the input: a weight is written as ``(outputs, inputs)``,
    axes of a group merged, as torch and llama.cpp have it, where its blocks lie so. That is the
    case for ``Q4_0_TRANSPOSE`` in a Dense layer. Where they do not (``Q4_0`` there), only the axis
    of the blocks goes last and the others keep their order. Embeddings stay ``(rows, features)``,
    stack axes come first, and weights without a spec stay as they are, but for the blocks.

    Args:
      params: a parameter tree, maybe from `quantize_checkpoint`, without adapters.
      path: of the file; written beside it and moved into place when complete.
      specs: from `layer_specs`: the equations of the weights.
      names: from slashed paths to the names of tensors, or a function that does so. Paths that a
        mapping leaves out, and all by default, are written with dots for slashes.
      architecture: the file's ``general.architecture``.

    Returns:
      From each parameter's slashed path to the name of its tensor.

    Raises:
      ValueError: on values stored by methods that GGML does not know, adapters, names that are
        unknown, too long or taken, and where the package ``gguf`` is missing. No file is left then.
    """
    tensors = list(_tensors(params, specs))
    table = _named([tensor.path for tensor in tensors], names)
    in_file = [
        FileTensor(table[t.path], t.file_shape, t.file_dtype, t.type, t.data) for t in tensors
    ]
    write_gguf(path, architecture, in_file, caller="export_gguf")
    return table


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """One tensor of the file, which is read from the device when it is written.

    Attributes:
      path: of the parameter.
      value: the parameter, stored or in floats.
      scale: of stored values.
      order: its axes in the order of the file.
      shape: in the file, axes merged.
    """

    path: str
    value: Any
    scale: Any
    order: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def type(self) -> str:
        """The name of GGML's type; empty where the dtype says it."""
        if self.scale is not None:
            return "Q4_0"
        return "BF16" if self.value.dtype == ml_dtypes.bfloat16 else ""

    @property
    def file_shape(self) -> tuple[int, ...]:
        """In bytes along the last axis, for types that numpy does not have."""
        if self.type == "Q4_0":
            return (*self.shape[:-1], self.shape[-1] // _BLOCK * (_BLOCK // 2 + 2))
        return (*self.shape[:-1], 2 * self.shape[-1]) if self.type else self.shape

    @property
    def file_dtype(self) -> np.dtype[Any]:
        """The dtype of the data."""
        return np.dtype(np.uint8) if self.type else np.dtype(self.value.dtype)

    def data(self) -> np.ndarray[Any, Any]:
        """The tensor as it stands in the file."""
        if self.scale is None:
            array = np.asarray(jax.device_get(self.value)).transpose(self.order)
            array = np.ascontiguousarray(array.reshape(self.shape))
            return array.view(np.uint8) if self.type else array
        codes = np.asarray(jax.device_get(unpack(self.value.array, self.value.layout)))
        codes = codes.transpose(self.order).reshape(-1, _BLOCK)
        scale = np.asarray(jax.device_get(self.scale)).transpose(self.order).reshape(-1, 1)
        low, high = codes[:, : _BLOCK // 2], codes[:, _BLOCK // 2 :]
        blocks = np.concatenate([scale.view(np.uint8), low | high << 4], axis=1)
        return blocks.reshape(self.file_shape)


def _tensors(params: Any, specs: Mapping[str, LayerSpec] | None) -> Iterator[_Tensor]:
    adapters = adapter_paths(params)
    if adapters:
        raise ValueError(
            f"export_gguf writes a model without adapters, but there are {adapters[:3]}. Fuse them "
            "(`peft.fuse_params`) or take them off (`peft.split_params`)."
        )
    stored = {"/".join(path): pair for path, pair in stored_weights(params)}
    scales = {id(scale) for _, scale in stored.values()}
    leaves = {
        path: leaf for path, leaf in _leaves(params, ()) if path in stored or id(leaf) not in scales
    }
    unknown = sorted(set(specs or {}) - set(leaves))
    if unknown:
        raise ValueError(
            f"export_gguf: specs name weights that the tree does not hold: {unknown}. Take them "
            "from the model that made the parameters."
        )
    for path, leaf in leaves.items():
        value, scale = meta.unbox(leaf), None
        if path in stored:
            value, scale = _checked(path, as_stored(value), meta.unbox(stored[path][1]))
        order, shape = _orientation(value, scale, (specs or {}).get(path))
        if len(shape) > _MOST_AXES:
            raise ValueError(
                f"'{path}' has {len(shape)} axes, and GGUF knows {_MOST_AXES}. Give its spec, by "
                "which axes are merged, or leave it out."
            )
        yield _Tensor(path, value, scale, order, shape)


def _leaves(tree: Any, path: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    if as_stored(meta.unbox(tree)) is not None or not is_branch(tree):
        yield "/".join(path), tree
        return
    for key, value in children(tree):
        yield from _leaves(value, (*path, str(key)))


def _checked(path: str, value: StoredValues | None, scale: Any) -> tuple[StoredValues, Any]:
    assert value is not None
    if value.layout.row.block not in ((-1, _BLOCK), (-2, _BLOCK)) or scale.dtype != np.float16:
        raise ValueError(
            f"'{path}' is stored as {value.method}, which is no format of GGML's. Quantize to "
            "'q4_0' or 'q4_0_transpose', or turn it back by `peft.dequantize_checkpoint`."
        )
    return value, scale


def _orientation(
    value: Any, scale: Any, spec: LayerSpec | None
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The order of a weight's axes in the file, and its shape there."""
    shape = tuple(value.shape)
    own = layer_axes(len(shape), spec.stack_axes if spec else ())
    stack = [axis for axis in range(len(shape)) if axis not in own]
    block = None
    if scale is not None:
        block = next(i for i, n in enumerate(shape) if n != scale.shape[i])
    if spec is not None and spec.kind != "embed":
        equation = parse_equation(spec.equation)
        groups = [
            [own[equation.kernel.index(c)] for c in letters]
            for letters in (equation.batch, equation.produced, equation.contracted)
        ]
        batch, outputs, inputs = groups
        if block is None or inputs[-1:] == [block]:
            lengths = [math.prod(shape[axis] for axis in group) for group in (outputs, inputs)]
            kept = [shape[axis] for axis in (*stack, *batch)]
            return (*stack, *batch, *outputs, *inputs), (*kept, *lengths)
    order = [*stack, *(axis for axis in own if axis != block)]
    if block is not None:
        order.append(block)
    return tuple(order), tuple(shape[axis] for axis in order) or (1,)


def _named(paths: list[str], names: Any) -> dict[str, str]:
    if isinstance(names, Mapping):
        unknown = sorted(set(names) - set(paths))
        if unknown:
            close = difflib.get_close_matches(str(unknown[0]), paths, 3, 0.0)
            raise ValueError(
                f"export_gguf: names for parameters that are not there: {unknown}. Close paths: "
                f"{close}."
            )
        given: Mapping[str, str] = names
        table = {path: given.get(path, path.replace("/", ".")) for path in paths}
    else:
        table = {path: names(path) if names else path.replace("/", ".") for path in paths}
    check_names(table.items(), "export_gguf")
    return table

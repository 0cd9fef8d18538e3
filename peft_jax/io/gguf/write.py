"""What writers of GGUF files share: the package `gguf`, the names of tensors, whole files."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from peft_jax.io.files.atomic import replacing

LONGEST_NAME = 63  # of GGML's 64 bytes the last ends the name


@dataclasses.dataclass(frozen=True)
class FileTensor:
    """One tensor of a file.

    Attributes:
      name: in the file.
      shape: in numpy's order, which is GGML's reversed; in bytes along the last axis where ``type``
        is given.
      dtype: of the data.
      type: the name of GGML's type; empty where the dtype says it.
      data: makes the array when it is written.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    type: str
    data: Callable[[], np.ndarray[Any, Any]]


def write_gguf(
    path: str | os.PathLike[str],
    architecture: str,
    tensors: Sequence[FileTensor],
    *,
    caller: str,
    fields: Mapping[str, str | float] | None = None,
) -> None:
    """Writes a file as a whole or not at all.

    Args:
      path: of the file.
      architecture: ``general.architecture``.
      tensors: in the order of the file; each is made when its turn comes.
      caller: for error messages.
      fields: metadata; numbers are written as float32.

    Raises:
      ValueError: where the package ``gguf`` is missing, or the file would lie in no directory.
    """
    gguf = _package(caller)
    with replacing(path) as file:
        writer = gguf.GGUFWriter(file.name, architecture)
        with contextlib.closing(writer):
            for key, value in (fields or {}).items():
                add = writer.add_string if isinstance(value, str) else writer.add_float32
                add(key, value)
            for tensor in tensors:
                writer.add_tensor_info(
                    tensor.name,
                    tensor.shape,
                    tensor.dtype,
                    math.prod(tensor.shape) * tensor.dtype.itemsize,
                    raw_dtype=getattr(gguf.GGMLQuantizationType, tensor.type, None),
                )
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for tensor in tensors:  # one at a time
                writer.write_tensor_data(tensor.data())


def _package(caller: str) -> Any:
    try:
        import gguf
    except ImportError as error:
        raise ValueError(
            f"{caller} needs the package `gguf`. Install it by `pip install 'peft_jax[gguf]'`."
        ) from error
    return gguf


def check_names(named: Iterable[tuple[str, Any]], caller: str, suffix: str = "") -> None:
    """Whether tensors can have these names.

    Args:
      named: pairs of a parameter's path and the name of its tensor.
      caller: for error messages.
      suffix: what comes behind each name in the file.
    """
    taken: dict[str, str] = {}
    longest = LONGEST_NAME - len(suffix)
    for path, name in named:
        if not isinstance(name, str) or not 0 < len(name.encode()) <= longest:
            raise ValueError(
                f"{caller}: '{path}' would be named {name!r}; a tensor's name is a string of 1 "
                f"to {longest} bytes. Give another by `names=`."
            )
        if name in taken:
            raise ValueError(
                f"{caller}: '{path}' and '{taken[name]}' would both be named {name!r}. Give "
                "another by `names=`."
            )
        taken[name] = path

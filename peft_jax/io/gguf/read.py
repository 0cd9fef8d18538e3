"""The reader of GGUF files: it believes no count and no offset before the file's size bears it out.

A file is, all little-endian: ``GGUF``, a version, the numbers of tensors and of fields; the fields
(key, type, value); for each tensor its name, its lengths (fastest first), type and offset; and
from the next multiple of the alignment on the tensors, one behind the other.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import ml_dtypes
import numpy as np

from peft_jax.io.gguf.write import LONGEST_NAME

Array = np.ndarray[Any, Any]

_MAGIC, _VERSIONS = b"GGUF", (2, 3)
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q"}
_SCALARS |= {12: "d"}
_STRING, _ARRAY = 8, 9
_LONGEST_STRING = 1 << 20
_MOST_AXES = 4
_ALIGNMENT = 32
_LEAST_FIELD, _LEAST_TENSOR = 8 + 1 + 4 + 1, 8 + 1 + 4 + 8 + 4 + 8


@dataclasses.dataclass(frozen=True)
class _Type:
    """A type of GGML's: how many numbers make a block, of how many bytes, and how it is read."""

    name: str
    block: int
    bytes: int
    dtype: np.dtype[Any]


_TYPES = {
    0: _Type("F32", 1, 4, np.dtype("<f4")),
    1: _Type("F16", 1, 2, np.dtype("<f2")),
    8: _Type("Q8_0", 32, 34, np.dtype(np.float32)),
    30: _Type("BF16", 1, 2, np.dtype(ml_dtypes.bfloat16)),
}


@dataclasses.dataclass(frozen=True)
class _Tensor:
    shape: tuple[int, ...]
    type: _Type
    start: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) // self.type.block * self.type.bytes


@dataclasses.dataclass(frozen=True)
class GGUFFile:
    """An open file.

    Attributes:
      path: of the file.
      fields: single values among the metadata, by their keys; None for arrays and long strings.
      tensors: by their names; shapes are in numpy's order.
    """

    path: str
    fields: Mapping[str, Any]
    tensors: Mapping[str, _Tensor]
    _file: BinaryIO

    def read(self, name: str) -> Array:
        """A tensor in its own dtype; Q8_0 in float32."""
        tensor = self.tensors[name]
        self._file.seek(tensor.start)
        data = self._file.read(tensor.nbytes)
        if len(data) != tensor.nbytes:
            raise ValueError(f"The GGUF file {self.path!r} was cut while it was read.")
        if tensor.type.block == 1:
            return np.frombuffer(data, tensor.type.dtype).reshape(tensor.shape)
        blocks = np.frombuffer(data, [("scale", "<f2"), ("codes", "i1", tensor.type.block)])
        values = blocks["codes"].astype(np.float32) * blocks["scale"].astype(np.float32)[:, None]
        return values.reshape(tensor.shape)


@contextlib.contextmanager
def opened(path: str | os.PathLike[str]) -> Iterator[GGUFFile]:
    """Reads the metadata of a file, and keeps it open.

    Raises:
      ValueError: where it cannot be read, or is not a whole GGUF file of version 2 or 3 with
        tensors of the types F32, F16, BF16 and Q8_0, one behind the other.
    """
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(Path(path).open("rb"))
        except (OSError, TypeError, ValueError) as error:
            raise ValueError(f"No GGUF file could be read from {path!r}: {error}.") from error
        reader = _Reader(str(path), file, os.fstat(file.fileno()).st_size)
        yield reader.header()


@dataclasses.dataclass
class _Reader:
    path: str
    file: BinaryIO
    size: int
    place: int = 0

    def refuse(self, what: str) -> NoReturn:
        raise ValueError(
            f"{self.path!r} is no GGUF file that can be read: {what}. Fetch it anew, or convert it "
            "again."
        )

    def take(self, count: int) -> bytes:
        self.skip(count)
        return self.file.read(count)

    def skip(self, count: int, ahead: bool = False) -> None:
        """Moves on, where so many bytes are there."""
        if count > self.size - self.place:
            self.refuse(
                f"it ends at byte {self.size}, and at {self.place} {count} more are to come"
            )
        self.place += count
        if ahead:
            self.file.seek(self.place)

    def number(self, format: str) -> Any:
        (value,) = struct.unpack(f"<{format}", self.take(struct.calcsize(f"<{format}")))
        return value

    def text(self, longest: int) -> str:
        length = self.number("Q")
        if length > longest:
            self.refuse(f"the name at byte {self.place} is {length} bytes long")
        try:
            return self.take(length).decode()
        except UnicodeDecodeError:
            self.refuse(f"what ends at byte {self.place} is not UTF-8")

    def header(self) -> GGUFFile:
        if self.size < len(_MAGIC) or self.take(len(_MAGIC)) != _MAGIC:
            self.refuse("it does not begin with 'GGUF'")
        version = self.number("I")
        if version not in _VERSIONS:
            bytes_swapped = " (big-endian)" if version and version & 0xFFFF == 0 else ""
            self.refuse(f"its version is {version}{bytes_swapped}, and read are {_VERSIONS}")
        tensors, fields = self.number("Q"), self.number("Q")
        left = self.size - self.place
        if tensors * _LEAST_TENSOR + fields * _LEAST_FIELD > left:
            self.refuse(f"{tensors} tensors and {fields} fields do not fit into {left} bytes")
        found: dict[str, Any] = {}
        for _ in range(fields):
            key = self.text(_LONGEST_STRING)
            if key in found:
                self.refuse(f"the field {key!r} is there twice")
            found[key] = self.value(self.number("I"))
        return GGUFFile(self.path, found, self.tensors(tensors, self.alignment(found)), self.file)

    def value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            length = self.number("Q")
            if length > _LONGEST_STRING:
                return self.skip(length, ahead=True)
            self.place -= 8
            self.file.seek(self.place)
            return self.text(_LONGEST_STRING)
        if kind != _ARRAY:
            self.refuse(f"a field has the type {kind}")
        kind, count = self.number("I"), self.number("Q")
        if kind in _SCALARS:
            return self.skip(count * struct.calcsize(f"<{_SCALARS[kind]}"), ahead=True)
        if kind != _STRING:
            self.refuse(f"an array has elements of the type {kind}")
        if count * 8 > self.size - self.place:
            self.refuse(f"an array of {count} strings is longer than the file")
        for _ in range(count):
            self.skip(self.number("Q"), ahead=True)
        return None

    def alignment(self, fields: Mapping[str, Any]) -> int:
        alignment = fields.get("general.alignment", _ALIGNMENT)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            self.refuse(f"its alignment is {alignment!r}, which is no power of two")
        return alignment

    def tensors(self, count: int, alignment: int) -> dict[str, _Tensor]:
        infos: dict[str, tuple[tuple[int, ...], _Type, int]] = {}
        for _ in range(count):
            name = self.text(LONGEST_NAME)
            if name in infos:
                self.refuse(f"the tensor {name!r} is there twice")
            infos[name] = self.info(name)
        start = expected = self.place + -self.place % alignment
        found: dict[str, _Tensor] = {}
        for name, (shape, kind, offset) in infos.items():
            tensor = found[name] = _Tensor(shape, kind, start + offset)
            if tensor.start != expected or tensor.start + tensor.nbytes > self.size:
                self.refuse(
                    f"the tensor {name!r} of {tensor.nbytes} bytes begins at {tensor.start} rather "
                    f"than at {expected}, or goes beyond the file's end at {self.size}"
                )
            expected = tensor.start + tensor.nbytes + -tensor.nbytes % alignment
        return found

    def info(self, name: str) -> tuple[tuple[int, ...], _Type, int]:
        axes = self.number("I")
        if not 1 <= axes <= _MOST_AXES:
            self.refuse(f"the tensor {name!r} has {axes} axes")
        shape = tuple(self.number("Q") for _ in range(axes))[::-1]
        number, offset = self.number("I"), self.number("Q")
        if number not in _TYPES:
            names = sorted(kind.name for kind in _TYPES.values())
            self.refuse(f"the tensor {name!r} is of GGML's type {number}, and read are {names}")
        kind = _TYPES[number]
        if 0 in shape or shape[-1] % kind.block:
            self.refuse(f"the tensor {name!r} of type {kind.name} has the shape {shape}")
        return shape, kind, offset

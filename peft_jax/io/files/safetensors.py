"""Safetensors files, read and written tensor by tensor, so that memory holds one at a time.

The format: eight bytes with the header's length, little-endian; the header; and the tensors, row
after row. See https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import difflib
import io
import math
import os
import stat
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from peft_jax.io.files.atomic import replacing
from peft_jax.io.files.safetensors_header import (
    LONGEST_HEADER,
    METADATA,
    Entry,
    checked_dtype,
    data_order,
    read_header,
    written_header,
)

Array = np.ndarray[Any, Any]
StrPath = str | os.PathLike[str]

_LENGTH_BYTES = 8
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_PICKLE_STARTS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


class TensorStream(NamedTuple):
    """A tensor that is made while it is written.

    Attributes:
      dtype: of its elements.
      shape: its lengths.
      chunks: makes arrays of this dtype, which row after row, one after another, are the tensor.
    """

    dtype: Any
    shape: tuple[int, ...]
    chunks: Callable[[], Iterable[Any]]


class SafetensorsFile:
    """A file of tensors, each read when it is asked for. A context manager.

    The header is checked whole before anything is allocated: every tensor lies within the file,
    they leave no hole and do not overlap, and their lengths agree with dtype and shape. Reads are
    those of an ordinary file, without a memory map; threads may share one.

    Raises:
      ValueError: with the file and the tensor, where the file is not of this format, is truncated,
        or holds pickled objects, which are never read.
    """

    def __init__(self, path: StrPath) -> None:
        self.path = Path(path)
        self._lock = threading.Lock()
        try:
            self._file = _opened(self.path)
            try:
                size = os.fstat(self._file.fileno()).st_size
                header = _header(self._file, size)
                self._start = _LENGTH_BYTES + len(header)
                self._metadata, self._entries = read_header(header, size - self._start)
            except BaseException:
                self._file.close()
                raise
        except ValueError as error:
            raise ValueError(f"{str(self.path)!r}: {error}.") from error

    def __enter__(self) -> SafetensorsFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file; reads raise from then on."""
        self._file.close()

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the tensors, in the order of their data."""
        return tuple(self._entries)

    @property
    def metadata(self) -> dict[str, str]:
        """The texts under ``__metadata__``."""
        return dict(self._metadata)

    def shape(self, name: str) -> tuple[int, ...]:
        """The lengths of a tensor."""
        return self._entry(name).shape

    def dtype(self, name: str) -> np.dtype[Any]:
        """The dtype of a tensor; one of ``ml_dtypes`` for what numpy lacks."""
        return self._entry(name).dtype

    def nbytes(self, name: str) -> int:
        """The length of a tensor in bytes."""
        entry = self._entry(name)
        return entry.stop - entry.start

    def read(self, name: str) -> Array:
        """A tensor, read from the file.

        Raises:
          ValueError: where there is no such tensor, or the file has become shorter.
        """
        entry = self._entry(name)
        return self._read(name, entry, entry.start, entry.shape)

    def read_rows(self, name: str, start: int, stop: int) -> Array:
        """The rows ``[start, stop)`` of a tensor along its first axis, and no others.

        Raises:
          ValueError: where there is no such tensor, or it lacks these rows.
        """
        entry = self._entry(name)
        if not entry.shape or not 0 <= start <= stop <= entry.shape[0]:
            raise ValueError(
                f"{str(self.path)!r}: tensor {name!r} of shape {entry.shape} has no rows "
                f"{start}:{stop}."
            )
        row = math.prod(entry.shape[1:]) * entry.dtype.itemsize
        return self._read(name, entry, entry.start + start * row, (stop - start, *entry.shape[1:]))

    def _entry(self, name: str) -> Entry:
        if name not in self._entries:
            close = difflib.get_close_matches(str(name), self._entries, 3, 0.0)
            raise ValueError(f"{str(self.path)!r} has no tensor {name!r}; close names: {close}.")
        return self._entries[name]

    def _read(self, name: str, entry: Entry, start: int, shape: tuple[int, ...]) -> Array:
        array = np.empty(shape, entry.dtype)
        values = array.reshape(-1).view(np.uint8)
        with self._lock:
            complete = _filled(self._file, self._start + start, memoryview(values.data))
        if not complete:
            raise ValueError(f"{str(self.path)!r} ends within tensor {name!r}: it is truncated.")
        if entry.dtype == np.bool_ and np.any(values > 1):
            raise ValueError(f"{str(self.path)!r}: tensor {name!r} has truth values but 0 and 1.")
        return array


def write_safetensors(
    path: StrPath, tensors: Mapping[str, Any], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes tensors one after another, as the safetensors library lays them out.

    That is by dtype, the widest first, then by name. The file appears whole or not at all: it is
    written beside its place, and moved there when complete.

    Args:
      path: of the file; an old one is replaced.
      tensors: from names to arrays, or to ``(dtype, shape, chunks)``; see `TensorStream`.
      metadata: texts for ``__metadata__``.

    Raises:
      ValueError: on names, dtypes, shapes or texts that the format does not know, or chunks that
        are not what was announced.
    """
    try:
        streams = {name: _stream(name, tensor) for name, tensor in tensors.items()}
        order = data_order({name: stream.dtype for name, stream in streams.items()})
        header = written_header({name: streams[name][:2] for name in order}, metadata)
        with replacing(path) as file:
            file.write(len(header).to_bytes(_LENGTH_BYTES, "little"))
            file.write(header)
            for name in order:
                _write_tensor(file, name, streams[name])
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)!r} was not written: {error}.") from error


# --- Reading -------------------------------------------------------------------------------------


_PICKLE = (
    "it holds pickled objects, which can run any code when they are read. Save them as safetensors "
    "where they come from: `save_pretrained(..., safe_serialization=True)` or "
    "`safetensors.torch.save_file`"
)


def _opened(path: Path) -> io.FileIO:
    if path.suffix.lower() in _PICKLED:
        raise ValueError(_PICKLE)
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise ValueError("it is no regular file")
        return io.FileIO(path, "r")
    except OSError as error:
        raise ValueError(f"it cannot be read ({error.strerror})") from error


def _filled(file: io.FileIO, start: int, target: memoryview) -> bool:
    """Whether the file holds so many bytes from there on, which are in the target then."""
    file.seek(start)
    while target:
        count = file.readinto(target)
        if not count:
            return False
        target = target[count:]
    return True


def _header(file: io.FileIO, size: int) -> bytes:
    first = bytearray(min(size, _LENGTH_BYTES))
    _filled(file, 0, memoryview(first))
    length, room = int.from_bytes(first, "little"), size - _LENGTH_BYTES
    if not 2 <= length <= min(room, LONGEST_HEADER):
        if bytes(first).startswith(_PICKLE_STARTS):
            raise ValueError(_PICKLE)
        raise ValueError(
            f"this is no safetensors file, or a truncated one: of {size} bytes {length} would be "
            "the header"
        )
    header = bytearray(length)
    if not _filled(file, _LENGTH_BYTES, memoryview(header)):
        raise ValueError("the file ends within its header")
    return bytes(header)


# --- Writing -------------------------------------------------------------------------------------


def _stream(name: Any, tensor: Any) -> TensorStream:
    if not isinstance(name, str) or name == METADATA:
        raise ValueError(f"a tensor cannot be named {name!r}")
    if isinstance(tensor, tuple):
        dtype, shape, chunks = tensor
    else:
        array = tensor if hasattr(tensor, "dtype") else np.asarray(tensor)
        dtype, shape, chunks = array.dtype, array.shape, lambda: (array,)
    return TensorStream(checked_dtype(name, dtype), tuple(map(int, shape)), chunks)


def _write_tensor(file: BinaryIO, name: str, stream: TensorStream) -> None:
    left = math.prod(stream.shape) * stream.dtype.itemsize
    for chunk in stream.chunks():
        array = np.asarray(chunk)
        array = np.ascontiguousarray(array, array.dtype.newbyteorder("<")).reshape(-1)
        left -= array.nbytes
        if array.dtype != stream.dtype or left < 0:
            raise ValueError(
                f"tensor {name!r} was announced as {stream.dtype} of shape {stream.shape}; what "
                f"comes is {array.dtype}, {max(-left, 0)} bytes too long"
            )
        file.write(array.view(np.uint8).data)
    if left:
        raise ValueError(f"tensor {name!r} of shape {stream.shape} ends {left} bytes early")

"""Headers of safetensors files: a JSON object from names to ``{"dtype", "shape", "data_offsets"}``.

Texts lie under ``__metadata__``; offsets count from the end of the header. Nothing here touches a
file, so errors name the tensor alone. See https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

METADATA = "__metadata__"
LONGEST_HEADER = 100_000_000
_MOST_AXES = 32
_MOST_ELEMENTS = 2**48
_ALIGNMENT = 8

# In the order in which the safetensors library lays out the data of a file: the widest first.
_DTYPES: Mapping[str, np.dtype[Any]] = {
    "U64": np.dtype("<u8"),
    "I64": np.dtype("<i8"),
    "F64": np.dtype("<f8"),
    "C64": np.dtype("<c8"),
    "F32": np.dtype("<f4"),
    "U32": np.dtype("<u4"),
    "I32": np.dtype("<i4"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype("<f2"),
    "U16": np.dtype("<u2"),
    "I16": np.dtype("<i2"),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I8": np.dtype("<i1"),
    "U8": np.dtype("<u1"),
    "BOOL": np.dtype(np.bool_),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_PLACES = {dtype: place for place, dtype in enumerate(_NAMES)}


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor of a file.

    Attributes:
      dtype: of its elements.
      shape: its lengths.
      start: of its bytes in the data section.
      stop: where they end.
    """

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    start: int
    stop: int


def data_order(types: Mapping[str, np.dtype[Any]]) -> list[str]:
    """The names of tensors in the order of their data: by dtype, the widest first, then by name."""
    return sorted(types, key=lambda name: (_PLACES[types[name]], name.encode()))


def checked_dtype(name: str, dtype: Any) -> np.dtype[Any]:
    """A dtype as files have it, little-endian.

    Raises:
      ValueError: where the format has no such dtype.
    """
    dtype = np.dtype(dtype).newbyteorder("<")
    if dtype not in _NAMES:
        raise ValueError(
            f"tensor {name!r} has the dtype {dtype}, which safetensors files do not hold; they "
            f"hold {sorted(map(str, _NAMES))}"
        )
    return dtype


def written_header(
    tensors: Mapping[str, tuple[np.dtype[Any], tuple[int, ...]]], metadata: Mapping[str, str] | None
) -> bytes:
    """The header of tensors whose data lie in the order of the mapping. Inverse of `read_header`.

    Raises:
      ValueError: on metadata that are no texts, and where the header becomes too long.
    """
    header: dict[str, Any] = {}
    if metadata is not None:
        if not all(isinstance(text, str) for pair in metadata.items() for text in pair):
            raise ValueError(f"metadata are texts by name, got {metadata!r}")
        header[METADATA] = dict(metadata)
    end = 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": shape, "data_offsets": (start, end)}
    try:
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"a name or text is no Unicode: {error}") from error
    if len(text) > LONGEST_HEADER - _ALIGNMENT:
        raise ValueError(
            f"names and metadata take {len(text)} bytes, and {LONGEST_HEADER} are allowed; write "
            "several files"
        )
    return text + b" " * (-len(text) % _ALIGNMENT)


def read_header(header: bytes, room: int) -> tuple[dict[str, str], dict[str, Entry]]:
    """Metadata and tensors of a header, in the order of their data.

    Args:
      header: its bytes.
      room: length of the data section in bytes, which the tensors fill without holes.

    Raises:
      ValueError: on anything that the format does not allow.
    """
    if not header.startswith(b"{"):
        raise ValueError("the header is no JSON object")
    try:
        data = json.loads(
            header.decode(),
            object_pairs_hook=_unique,
            parse_float=_no_integer,
            parse_constant=_no_integer,
        )
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the header is not as the format has it: {error}") from error
    metadata = data.pop(METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError(f"{METADATA} is no object of texts")
    found = {name: _entry(name, value) for name, value in data.items()}
    entries = dict(sorted(found.items(), key=lambda item: (item[1].start, item[1].stop)))
    end = 0
    for name, entry in entries.items():
        if entry.start != end:
            raise ValueError(
                f"the data of tensor {name!r} start at byte {entry.start}, but those before it end "
                f"at {end}: tensors leave no holes and do not overlap"
            )
        end = entry.stop
    if end != room:
        raise ValueError(
            f"its tensors take {end} bytes, and the file has {room} for them: it is truncated, or "
            "something is appended"
        )
    return metadata, entries


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        (twin, _), *_ = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {twin!r} stands twice")
    return made


def _no_integer(text: str) -> Any:
    raise ValueError(f"{text[:40]} is no integer")


def _is_length(value: Any) -> bool:
    return type(value) is int and value >= 0


def _entry(name: str, value: Any) -> Entry:
    """One tensor, checked by itself."""
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"tensor {name!r} needs dtype, shape and data_offsets, and nothing else")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise ValueError(
            f"tensor {name!r} has the dtype {str(dtype)[:40]!r}; known are {list(_DTYPES)}"
        )
    if not isinstance(shape, list) or len(shape) > _MOST_AXES or not all(map(_is_length, shape)):
        raise ValueError(f"tensor {name!r} has a shape that is no list of lengths")
    # Beside an axis of length zero the others would fit any bytes, but no array.
    if math.prod(max(length, 1) for length in shape) > _MOST_ELEMENTS:
        raise ValueError(f"tensor {name!r} has a shape that is larger than an array can be")
    pair = isinstance(offsets, list) and len(offsets) == 2 and all(map(_is_length, offsets))
    if not pair or offsets[1] - offsets[0] != math.prod(shape) * _DTYPES[dtype].itemsize:
        raise ValueError(
            f"tensor {name!r} of shape {shape} and dtype {dtype} has data_offsets that do not say "
            "where so many bytes start and end"
        )
    return Entry(_DTYPES[dtype], tuple(shape), *offsets)

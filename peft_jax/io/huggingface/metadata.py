"""What travels with the tensors of an adapter in the metadata of their file, as JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from peft_jax._spec import LayerSpec, LoraSpec

_FORMAT = ("format", "pt")  # which transformers asks for
_SPECS, _WHOLE = "peft_jax.specs", "peft_jax.whole"
_RENAMES, _CONFIG = "peft_jax.renames", "peft_jax.config"


@dataclasses.dataclass(frozen=True)
class Metadata:
    """What arrays, names and the config do not say.

    Attributes:
      specs: of adapters, by slashed path.
      whole: for each parameter that was trained whole its shape, and its `LayerSpec` or None.
      renames: as they were given.
      config: checksum of the config that was saved with the tensors.
    """

    specs: Mapping[str, LoraSpec]
    whole: Mapping[str, tuple[tuple[int, ...], LayerSpec | None]]
    renames: Mapping[str, str]
    config: str

    def to_texts(self) -> dict[str, str]:
        """As texts, for a safetensors file. Inverse of `from_texts`."""
        whole = {
            path: {"shape": list(shape), "spec": None if spec is None else spec.to_dict()}
            for path, (shape, spec) in self.whole.items()
        }
        specs = {path: spec.to_dict() for path, spec in self.specs.items()}
        texts = {_SPECS: specs, _WHOLE: whole}
        return {
            _FORMAT[0]: _FORMAT[1],
            _CONFIG: self.config,
            _RENAMES: json.dumps(dict(self.renames)),  # in the order given
            **{name: json.dumps(data, sort_keys=True) for name, data in texts.items()},
        }

    @classmethod
    def from_texts(cls, texts: Mapping[str, str]) -> Metadata | None:
        """Reads what `to_texts` wrote; None where there is nothing of it.

        Raises:
          ValueError: where it is not whole, or not of this form.
        """
        names = (_SPECS, _WHOLE, _RENAMES, _CONFIG)
        if not any(name in texts for name in names):
            return None
        missing = [name for name in names if name not in texts]
        if missing:
            raise ValueError(f"its metadata lack {missing}")
        try:
            specs, whole, renames = (json.loads(texts[name]) for name in names[:3])
            return cls(
                {_path(path): LoraSpec.from_dict(spec) for path, spec in specs.items()},
                {_path(path): _whole(entry) for path, entry in whole.items()},
                dict(renames),
                texts[_CONFIG],
            )
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ValueError(f"its metadata of peft_jax cannot be read: {error}") from error


def _path(path: str) -> str:
    if any(part in ("", ".", "..") for part in path.split("/")):
        raise ValueError(f"{path!r} is no path in a tree")
    return path


def _whole(entry: Mapping[str, Any]) -> tuple[tuple[int, ...], LayerSpec | None]:
    shape, spec = entry["shape"], entry["spec"]
    if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError(f"{shape!r} is no shape")
    return tuple(shape), None if spec is None else LayerSpec.from_dict(spec)

"""What adapters with specs do to the tensors of a checkpoint in Flax's names."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from peft_jax._spec import LoraSpec
from peft_jax._trees import adapter_paths, at, outside_adapters
from peft_jax.io.checkpoints.fuse import Change, fused_layer, fusing
from peft_jax.io.checkpoints.read import Checkpoint
from peft_jax.io.files.formats import Array


def speaks_of(specs: Mapping[str, LoraSpec], checkpoint: Checkpoint) -> bool:
    """Whether the parameters that the specs name are tensors of the checkpoint."""
    names = _by_path(checkpoint)
    places = (f"{path.rpartition('/')[0]}/{spec.param}" for path, spec in specs.items())
    return all(place.lstrip("/") in names for place in places)


def changes_by_specs(
    lora: Any, specs: Mapping[str, LoraSpec], checkpoint: Checkpoint
) -> dict[str, Change]:
    """For each tensor that the adapters change, a function from the old one to the new.

    Raises:
      ValueError: with the path, where adapters, specs and checkpoint do not fit together.
    """
    names = _by_path(checkpoint)
    found = dict(outside_adapters(lora))
    changes: dict[str, Change] = {}
    for path, value in found.items():
        if path not in names:
            raise _missing(path, checkpoint)
        changes[names[path]] = _replaced(np.asarray(value))
    for layer in _layers(lora, specs):
        for param in layer.params:
            place = layer.place(param)
            if place not in names:
                raise _missing(place, checkpoint)
            before = changes.get(names[place])
            changes[names[place]] = _fused(checkpoint, names, layer, param, before)
    return changes


class _Layer(NamedTuple):
    """The adapters that lie in one place.

    Attributes:
      path: of the place.
      adapters: by name.
      specs: likewise.
    """

    path: str
    adapters: dict[str, Any]
    specs: dict[str, LoraSpec]

    @property
    def params(self) -> list[str]:
        """The parameters that the adapters change."""
        found = (name for spec in self.specs.values() for name in (spec.param, spec.bias))
        return [name for name in dict.fromkeys(found) if name is not None]

    def place(self, param: str) -> str:
        """The path of a parameter."""
        return f"{self.path}/{param}".lstrip("/")

    def changing(self, param: str) -> _Layer:
        """With the adapters alone that change a parameter."""
        own = {name: s for name, s in self.specs.items() if param in (s.param, s.bias)}
        return _Layer(self.path, {name: self.adapters[name] for name in own}, own)


def _layers(lora: Any, specs: Mapping[str, LoraSpec]) -> list[_Layer]:
    found: dict[str, _Layer] = {}
    for path in adapter_paths(lora):
        if path not in specs or specs[path].param is None:
            raise ValueError(f"The adapter at {path!r} has no spec that names a parameter.")
        above, _, name = path.rpartition("/")
        layer = found.setdefault(above, _Layer(above, {}, {}))
        layer.adapters[name] = dict(at(lora, path))
        layer.specs[name] = specs[path]
    return list(found.values())


def _by_path(checkpoint: Checkpoint) -> dict[str, str]:
    paths = {name: checkpoint.path_of(name) for name in checkpoint.names}
    whole = all(path[0] == "params" for path in paths.values())
    return {"/".join(path[whole:]): name for name, path in paths.items()}


def _missing(path: str, checkpoint: Checkpoint) -> ValueError:
    return ValueError(
        f"The adapter changes {path!r}, which {str(checkpoint.path)!r} lacks. Take the checkpoint "
        "that it was trained for."
    )


def _replaced(value: Array) -> Change:
    return Change(lambda old: value.reshape(old.shape).astype(old.dtype))


def _fused(
    checkpoint: Checkpoint,
    names: Mapping[str, str],
    layer: _Layer,
    param: str,
    before: Change | None,
) -> Change:
    """The change of one parameter by all adapters; what else they change is read too."""
    own = layer.changing(param)
    if len(own.specs) == 1:
        ((name, spec),) = own.specs.items()
        if spec.param == param != spec.bias and spec.variant != "tokens":
            alone = dataclasses.replace(spec, param="kernel", bias=None, shape=None)
            arrays = {key: np.asarray(x) for key, x in own.adapters[name].items() if key != "bias"}
            return fusing(alone, arrays).after(before)

    def change(old: Array) -> Array:
        arrays = {
            name: checkpoint.read(names[layer.place(name)]) for name in own.params if name != param
        }
        arrays[param] = old
        return fused_layer({**arrays, **own.adapters}, own.specs, param)

    return Change(change).after(before)

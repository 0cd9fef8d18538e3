"""What all adapters of a simulated model have in common: names, paths, ranks, alphas."""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax.core import meta

from peft_jax._named import adapter_names, add_adapter, get_adapter, rename_adapter
from peft_jax._names import DEFAULT, check_adapter_name, named_as
from peft_jax._specs import LoraSpec
from peft_jax._trees import children, is_branch
from peft_jax.io._replacing import replacing
from peft_jax.io._safetensors import SafetensorsFile

_FORMAT, _VERSION = "peft_jax.adapter_metadata", 1
ADAPTER_KEY = "adapter"


@dataclasses.dataclass(frozen=True)
class AdapterLayer:
    """One layer's adapter: where its arrays lie, and what multiplies their product.

    Attributes:
      a: path of ``a`` in the parameters.
      b: path of ``b``.
      rank: length of the rank axis.
      alpha: as the config says it; None: the scaling is 1.
      scaling: factor of ``x·a·b``.
    """

    a: str
    b: str
    rank: int
    alpha: float | None
    scaling: float


@dataclasses.dataclass(frozen=True)
class AdapterMetadata:
    """The adapters of a model, by name, and of each the layers, by the path of their adapter.

    Attributes:
      adapters: ``{"default": {"block_0/query/lora": AdapterLayer(...)}}``.
    """

    adapters: Mapping[str, Mapping[str, AdapterLayer]]

    @property
    def names(self) -> tuple[str, ...]:
        """Of the adapters."""
        return tuple(self.adapters)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, fit for JSON. Inverse of `from_dict`."""
        layers = {
            name: {path: dataclasses.asdict(layer) for path, layer in sorted(found.items())}
            for name, found in sorted(self.adapters.items())
        }
        return {"format": _FORMAT, "version": _VERSION, "adapters": layers}

    @classmethod
    def from_dict(cls, data: Any) -> AdapterMetadata:
        """Reads what `to_dict` wrote.

        Raises:
          ValueError: on anything else.
        """
        if not isinstance(data, Mapping) or data.get("format") != _FORMAT:
            raise ValueError(f"This is no metadata of adapters: its format is not {_FORMAT!r}.")
        if data.get("version") != _VERSION:
            raise ValueError(f"Metadata of version {data.get('version')!r}, not {_VERSION}.")
        try:
            return cls(
                {
                    name: {path: AdapterLayer(**layer) for path, layer in found.items()}
                    for name, found in data["adapters"].items()
                }
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"The metadata of adapters lack something: {error}.") from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes JSON, whole or not at all."""
        text = json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"
        with replacing(path) as file:
            file.write(text.encode())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> AdapterMetadata:
        """Reads JSON.

        Raises:
          ValueError: with the file, where it holds anything else.
        """
        try:
            return cls.from_dict(json.loads(Path(path).read_bytes()))
        except ValueError as error:
            raise ValueError(f"{os.fspath(path)!r}: {error}") from error

    def layers(self, adapter_name: str) -> Mapping[str, AdapterLayer]:
        """The layers of one adapter.

        Raises:
          ValueError: where there is none of this name.
        """
        if adapter_name not in self.adapters:
            raise ValueError(
                f"The metadata know no adapter {adapter_name!r}; they know {[*self.adapters]}."
            )
        return self.adapters[adapter_name]

    def check(self, lora: Any, adapter_name: str = DEFAULT) -> None:
        """Refuses an adapter that is not made like the one of this name.

        Args:
          lora: a tree with the adapters of one name.
          adapter_name: in the metadata.

        Raises:
          ValueError: with the paths that are missing or surplus, or the ranks that differ.
        """
        known, found = self.layers(adapter_name), _shapes(lora)
        own = {layer.a for layer in known.values()} | {layer.b for layer in known.values()}
        missing, surplus = sorted(own - set(found)), sorted(set(found) - own)
        if missing or surplus:
            close = difflib.get_close_matches(surplus[0], missing, 2, 0.0) if surplus else []
            raise ValueError(
                f"The adapter is not made like {adapter_name!r} of the metadata: it lacks "
                f"{missing[:5]}, and has besides {surplus[:5]} (close to {close}). "
                "Give an adapter of the same layers, or make the model and its metadata anew."
            )
        for path, layer in known.items():
            rank = found[layer.a][-1] if found[layer.a] else None
            if rank != layer.rank or layer.rank not in found[layer.b]:
                raise ValueError(
                    f"The adapter at '{path}' has a of shape {found[layer.a]} and b of shape "
                    f"{found[layer.b]}, but the metadata say rank {layer.rank}. Give an adapter of "
                    "this rank, or make the model and its metadata anew."
                )


def adapter_metadata(specs: Mapping[str, LoraSpec]) -> AdapterMetadata:
    """The metadata of a model's adapters, from `lora_specs`.

    Raises:
      ValueError: where there are none with ``a`` and ``b``.
    """
    adapters: dict[str, dict[str, AdapterLayer]] = {}
    for path, spec in specs.items():
        if spec.variant == "tokens":
            continue
        layer = AdapterLayer(f"{path}/a", f"{path}/b", spec.rank, spec.alpha, spec.scaling)
        adapters.setdefault(named_as(path.rpartition("/")[2]), {})[path] = layer
    if not adapters:
        raise ValueError(
            "There are no adapters in these specs. Give `peft.lora_specs(model, *inputs)` of an "
            "adapted model."
        )
    return AdapterMetadata(adapters)


def use_adapter(
    params: Any,
    source: Any,
    metadata: AdapterMetadata,
    *,
    adapter_name: str = DEFAULT,
) -> Any:
    """The parameters with another adapter in the place of the one of this name.

    Args:
      params: of the adapted model.
      source: a tree of adapters (from training, or `peft.load_adapter`), or the path of a file that
        `export_adapter` wrote.
      metadata: of the model's adapters, to which the new one has to conform.
      adapter_name: of the adapter that makes way.

    Raises:
      ValueError: where paths, ranks or (of a file) scalings differ from the metadata.
    """
    check_adapter_name("use_adapter", adapter_name)
    if isinstance(source, str | os.PathLike):
        lora = _read(source, metadata, adapter_name)
    else:
        names = adapter_names(source)
        lora = get_adapter(source, names[0]) if names else source
        if len(names) != 1:
            raise ValueError(
                f"use_adapter takes a tree with the adapters of one name, got the names {[*names]}."
            )
        lora = rename_adapter(lora, adapter_name)
        metadata.check(lora, adapter_name)
    return add_adapter(params, rename_adapter(lora, DEFAULT), adapter_name, replace=True)


def _read(
    path: str | os.PathLike[str], metadata: AdapterMetadata, adapter_name: str
) -> dict[str, Any]:
    with SafetensorsFile(path) as file:
        lora: dict[str, Any] = {}
        for name in file.names:
            *parents, leaf = name.split("/")
            here = lora
            for parent in parents:
                here = here.setdefault(parent, {})
                if not isinstance(here, dict):
                    raise ValueError(f"{os.fspath(path)!r}: {name!r} lies inside another tensor.")
            here[leaf] = file.read(name)
        text = file.metadata.get(ADAPTER_KEY)
    try:
        lora = rename_adapter(lora, adapter_name)
        metadata.check(lora, adapter_name)
        _check_scalings(text, metadata.layers(adapter_name))
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)!r}: {error}") from error
    return lora


def scalings_text(layers: Mapping[str, AdapterLayer]) -> str:
    """What of an adapter's metadata goes beside its arrays: scalings, by path of ``a``."""
    return json.dumps(
        {nameless(layer.a): layer.scaling for layer in layers.values()}, sort_keys=True
    )


def _check_scalings(text: str | None, layers: Mapping[str, AdapterLayer]) -> None:
    if text is None:
        return
    expected = {nameless(layer.a): layer.scaling for layer in layers.values()}
    found = json.loads(text)
    for path, scaling in expected.items():
        if found.get(path) != scaling:
            raise ValueError(
                f"the adapter at '{path}' was trained with the scaling {found.get(path)}, but the "
                f"metadata say {scaling}. Scale `b` by the quotient, or make the model anew."
            )


def nameless(path: str) -> str:
    """A path of an adapter's array, without the name of the adapter."""
    *parents, adapter, leaf = path.split("/")
    return "/".join((*parents, adapter.partition(".")[0], leaf))


def _shapes(tree: Any, path: tuple[str, ...] = ()) -> dict[str, tuple[int, ...]]:
    """Shapes of the arrays ``a`` and ``b``, by path."""
    if not is_branch(tree):
        return {"/".join(path): np.shape(meta.unbox(tree))} if path and path[-1] in "ab" else {}
    found: dict[str, tuple[int, ...]] = {}
    for key, value in children(tree):
        found |= _shapes(value, (*path, str(key)))
    return found

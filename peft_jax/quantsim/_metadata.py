"""What all adapters of a simulated model have in common: names, paths, ranks, alphas."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta

from peft_jax._model import adapter_names, add_adapter, rename_adapter
from peft_jax._numerics import stack_back, stack_first
from peft_jax._spec import LoraSpec, is_number
from peft_jax._trees import DEFAULT, check_adapter_name, children, is_branch, named_as
from peft_jax.io.files.atomic import replacing
from peft_jax.io.files.safetensors import SafetensorsFile
from peft_jax.quantsim._encoding import nested


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_shape(value: Any) -> bool:
    return isinstance(value, tuple | list) and all(map(_is_count, value))


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
      shapes: of the adapter's arrays, by their names, with the axes of a stack.
    """

    a: str
    b: str
    rank: int
    alpha: float | None
    scaling: float
    shapes: Mapping[str, tuple[int, ...]]

    def __post_init__(self) -> None:
        allowed = {
            "a": isinstance(self.a, str) and self.a.endswith("/a"),
            "b": isinstance(self.b, str) and self.b == f"{str(self.a)[:-1]}b",
            "rank": _is_count(self.rank) and self.rank > 0,
            "alpha": self.alpha is None or is_number(self.alpha),
            "scaling": is_number(self.scaling),
            "shapes": isinstance(self.shapes, Mapping)
            and {"a", "b"} <= set(self.shapes)
            and all(map(_is_shape, self.shapes.values())),
        }
        for field, is_allowed in allowed.items():
            if not is_allowed:
                raise ValueError(
                    f"AdapterLayer.{field} = {getattr(self, field)!r} is not allowed: a and b are "
                    "the paths of an adapter's arrays, rank a positive integer, alpha a number or "
                    "None, scaling a number, shapes those of a and b and what else there is."
                )
        shapes = {name: tuple(shape) for name, shape in self.shapes.items()}
        object.__setattr__(self, "shapes", shapes)


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
            raise ValueError(f"The metadata of adapters are not complete: {error}.") from error

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
        except (ValueError, RecursionError) as error:
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
        known, found = self.layers(adapter_name), dict(_leaves(lora))
        own = {
            f"{path}/{name}": (shape, layer.rank)
            for path, layer in known.items()
            for name, shape in layer.shapes.items()
        }
        self.check_paths(own, found, adapter_name)
        for path, (shape, rank) in own.items():
            dtype, is_shape = found[path].dtype, np.shape(found[path])
            if is_shape != shape or not jnp.issubdtype(dtype, jnp.floating):
                raise ValueError(
                    f"The adapter's array '{path}' is {dtype} of shape {is_shape}, but the "
                    f"metadata say floats of {shape}, for rank {rank}. Give an adapter of this "
                    "rank and these layers, or make the model and its metadata anew."
                )

    def check_paths(self, own: Collection[str], found: Collection[str], name: str) -> None:
        """Refuses paths of arrays that are not those of the adapter of this name."""
        missing, surplus = sorted(set(own) - set(found)), sorted(set(found) - set(own))
        if missing or surplus:
            raise ValueError(
                f"The adapter is not made like {name!r} of the metadata: it lacks {missing[:5]}, "
                f"and has besides {surplus[:5]}. Give an adapter of the same layers and variant, "
                "or make the model and its metadata anew."
            )


def check_metadata(caller: str, metadata: Any) -> None:
    """Refuses anything but metadata."""
    if not isinstance(metadata, AdapterMetadata):
        raise ValueError(
            f"{caller} takes AdapterMetadata from `quantsim.adapter_metadata`, got "
            f"{type(metadata).__name__}."
        )


def adapter_metadata(specs: Mapping[str, LoraSpec]) -> AdapterMetadata:
    """The metadata of a model's adapters, from `lora_specs`.

    Raises:
      ValueError: where there are none with ``a`` and ``b``.
    """
    if not isinstance(specs, Mapping) or not all(isinstance(s, LoraSpec) for s in specs.values()):
        raise ValueError("adapter_metadata takes specs from `peft.lora_specs(model, *inputs)`.")
    adapters: dict[str, dict[str, AdapterLayer]] = {}
    for path, spec in specs.items():
        if spec.variant == "tokens":
            continue
        arrays = f"{path}/a", f"{path}/b"
        layer = AdapterLayer(*arrays, spec.rank, spec.alpha, spec.scaling, _shapes_of(path, spec))
        adapters.setdefault(named_as(path.rpartition("/")[2]), {})[path] = layer
    if not adapters:
        raise ValueError(
            "There are no adapters in these specs. Give `peft.lora_specs(model, *inputs)` of an "
            "adapted model."
        )
    return AdapterMetadata(adapters)


def _shapes_of(path: str, spec: LoraSpec) -> dict[str, tuple[int, ...]]:
    """The shapes of an adapter's arrays."""
    if spec.shape is None:
        raise ValueError(
            f"The spec of '{path}' does not say the shape of its weight. Take specs from "
            "`peft.lora_specs(model, *inputs)`."
        )
    letters = {"a": spec.letters[0], "b": spec.letters[1]}
    letters |= {"magnitude": spec.output_letters} if spec.variant == "dora" else {}
    letters |= {"bias": spec.output_letters} if spec.bias is not None else {}
    kernel = spec.letters[2]
    depth = len(spec.shape) - len(kernel)
    axes = spec.stack_axes or (0,) * depth
    first = _moved(stack_first, spec.shape, axes)
    sizes = dict(zip(kernel, first[depth:], strict=True))
    return {
        name: _moved(stack_back, first[:depth] + tuple(sizes.get(c, spec.rank) for c in own), axes)
        for name, own in letters.items()
    }


def _moved(move: Any, shape: tuple[int, ...], axes: tuple[int, ...]) -> tuple[int, ...]:
    like = jax.ShapeDtypeStruct(shape, jnp.float32)
    return jax.eval_shape(lambda array: move(array, axes), like).shape


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
    check_metadata("use_adapter", metadata)
    if isinstance(source, str | os.PathLike):
        lora = _read(source, metadata, adapter_name)
    else:
        names = adapter_names(source)
        if len(names) != 1:
            raise ValueError(
                f"use_adapter takes a tree with the adapters of one name, got the names {[*names]}."
            )
        lora = rename_adapter(source, adapter_name)
        metadata.check(lora, adapter_name)
    return add_adapter(params, rename_adapter(lora, DEFAULT), adapter_name, replace=True)


def _read(
    path: str | os.PathLike[str], metadata: AdapterMetadata, adapter_name: str
) -> dict[str, Any]:
    own = [
        f"{adapter}/{leaf}"
        for adapter, layer in metadata.layers(adapter_name).items()
        for leaf in layer.shapes
    ]
    with SafetensorsFile(path) as file:
        try:
            metadata.check_paths({nameless(name) for name in own}, file.names, adapter_name)
            lora = nested({name: file.read(nameless(name)) for name in own})
            metadata.check(lora, adapter_name)
            _check_scalings(file.metadata.get(ADAPTER_KEY), metadata.layers(adapter_name))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{os.fspath(path)!r}: {error}") from error
    return lora


def scalings_text(layers: Mapping[str, AdapterLayer]) -> str:
    """What of an adapter's metadata goes beside its arrays: scalings, by path of ``a``."""
    return json.dumps(
        {nameless(layer.a): layer.scaling for layer in layers.values()}, sort_keys=True
    )


def _check_scalings(text: str | None, layers: Mapping[str, AdapterLayer]) -> None:
    if text is None:
        raise ValueError(
            "the scalings of this adapter are not known. Export it with metadata=..., or give its "
            "tree instead of the file"
        )
    expected = {nameless(layer.a): layer.scaling for layer in layers.values()}
    found = json.loads(text)
    if not isinstance(found, dict):
        raise ValueError(f"its metadata {ADAPTER_KEY!r} hold no scalings")
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


def _leaves(tree: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """All arrays of a tree, by path."""
    tree = meta.unbox(tree)
    if not is_branch(tree):
        yield "/".join(path), tree if hasattr(tree, "dtype") else np.asarray(tree)
        return
    for key, value in children(tree):
        yield from _leaves(value, (*path, str(key)))

"""A table of the adapters that a model and its parameters hold."""

from __future__ import annotations

import dataclasses
import io
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax.core import meta
from rich.console import Console
from rich.table import Table

from peft_jax._config import LoraConfig
from peft_jax._names import named_as
from peft_jax._peft_model import PeftModel
from peft_jax._targets import alpha_of, rank_of
from peft_jax._trees import Layer, Path, map_layers


@dataclasses.dataclass(frozen=True)
class AdapterRow:
    """One adapter of a model.

    Attributes:
      name: of the adapter.
      active: whether it acts; None where the model does not know of it.
      layers: in how many places of the tree it lies.
      ranks: those that occur, in order, by the config.
      scalings: likewise.
      variants: which of ``lora``, ``dora`` and ``tokens`` occur.
      parameters: how many numbers it holds.
      bytes: of its arrays.
      dtypes: of its arrays.
      in_place: what it trains beside its arrays: ``modules_to_save``, ``bias``.
    """

    name: str
    active: bool | None
    layers: int
    ranks: tuple[int, ...]
    scalings: tuple[float, ...]
    variants: tuple[str, ...]
    parameters: int
    bytes: int
    dtypes: tuple[str, ...]
    in_place: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class AdapterStatus:
    """What `adapter_status` returns; ``print`` shows a table.

    Attributes:
      rows: one for each adapter, of the model's and then of the others in the parameters.
    """

    rows: tuple[AdapterRow, ...]

    def __str__(self) -> str:
        table = Table(
            "adapter", "active", "layers", "rank", "scaling", "variant", "parameters", "bytes",
            "dtype", "trained in place",
        )  # fmt: skip
        for row in self.rows:
            active = {True: "yes", False: "no", None: "not the model's"}[row.active]
            table.add_row(
                row.name, active, str(row.layers), _listed(row.ranks),
                _listed(f"{scaling:.4g}" for scaling in row.scalings), _listed(row.variants),
                f"{row.parameters:,d}", f"{row.bytes:,d}", _listed(row.dtypes),
                _listed(row.in_place),
            )  # fmt: skip
        console = Console(width=160, file=io.StringIO(), color_system=None, force_jupyter=False)
        console.print(table)
        return console.file.getvalue()  # type: ignore[attr-defined]


def adapter_status(model: PeftModel, params: Any) -> AdapterStatus:
    """Every adapter of a model: whether it acts, where it lies, how large it is.

    Example::

      print(peft.adapter_status(model, params))

    Args:
      model: from `get_peft_model`.
      params: of the model. Adapters that they lack count no layers; those that the model does not
        know of are listed too.

    Raises:
      ValueError: where ``model`` has no adapters.
    """
    if not isinstance(model, PeftModel):
        raise ValueError(
            f"adapter_status takes a model from `get_peft_model`, got {type(model).__name__}."
        )
    found: dict[str, list[tuple[Path, Mapping[str, Any]]]] = {
        name: [] for name in model.peft_configs
    }

    def note(path: Path, rest: Layer, adapters: Layer) -> Layer:
        for branch, adapter in adapters.items():
            found.setdefault(named_as(branch), []).append((path, adapter))
        return rest

    map_layers(params, note)
    configs, active = model.peft_configs, model.active_adapters
    return AdapterStatus(
        tuple(
            _row(name, name in active if name in configs else None, configs.get(name), places)
            for name, places in found.items()
        )
    )


def _row(
    name: str,
    active: bool | None,
    config: LoraConfig | None,
    places: list[tuple[Path, Mapping[str, Any]]],
) -> AdapterRow:
    arrays = [meta.unbox(leaf) for _, adapter in places for leaf in adapter.values()]
    products = [(path, adapter) for path, adapter in places if "a" in adapter]
    ranks: set[int] = set()
    scalings: set[float] = set()
    in_place: list[str] = []
    if config is not None:
        for path, _ in products:
            rank = rank_of(config, path)
            ranks.add(rank)
            scalings.add(alpha_of(config, path) / (math.sqrt(rank) if config.use_rslora else rank))
        in_place += [f"modules_to_save={list(config.modules_to_save or ())}"] * bool(
            config.modules_to_save
        )
        in_place += [f"bias={config.bias!r}"] * (config.bias != "none")
    return AdapterRow(
        name=name,
        active=active,
        layers=len(places),
        ranks=tuple(sorted(ranks)),
        scalings=tuple(sorted(scalings)),
        variants=tuple(sorted({_variant(adapter) for _, adapter in places})),
        parameters=sum(math.prod(array.shape) for array in arrays),
        bytes=sum(math.prod(array.shape) * jnp.dtype(array.dtype).itemsize for array in arrays),
        dtypes=tuple(sorted({str(jnp.dtype(array.dtype)) for array in arrays})),
        in_place=tuple(in_place),
    )


def _variant(adapter: Mapping[str, Any]) -> str:
    if "rows" in adapter:
        return "tokens"
    return "dora" if "magnitude" in adapter else "lora"


def _listed(values: Any) -> str:
    return ", ".join(map(str, values))

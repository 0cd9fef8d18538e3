"""How adapters of Hugging Face's peft stand around modules, and so make their names longer."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Mapping

from peft_jax._config import LoraConfig, matches
from peft_jax._spec import LoraSpec
from peft_jax.io.huggingface.config import Named
from peft_jax.io.huggingface.layout import Stack, TensorLayout
from peft_jax.io.huggingface.module_names import Path

PREFIX = "base_model.model."
BASE_LAYER = "base_layer"

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Placed:
    """An adapter, or a parameter that is trained whole, in our tree and in the file.

    Attributes:
      path: of the adapter, or of the parameter.
      spec: of the adapter; None: a whole parameter.
      stack: of the layers that are one array here.
      layouts: of one layer's arrays.
      ours: the names here.
      theirs: the names there, one for each layer.
    """

    path: Path
    spec: LoraSpec | None
    stack: Stack
    layouts: tuple[TensorLayout, ...]
    ours: Named
    theirs: tuple[Named, ...]


class Nesting:
    """The modules around which adapters stand.

    An adapter of a module stands around it, so that its own parameters lie in ``base_layer``. One
    of a parameter does so too, and around those of other parameters of the module; what lies in the
    module has ``base_layer`` in its name once for each.

    Args:
      items: all adapters and whole parameters.
      config: with ``target_parameters``, in the order in which torch's module registers them.
      named_theirs: whether the config speaks in their names.
      shapes: of the tensors in a file that peft wrote, which does not keep that order: it is the
        one that fits. None: the config's.

    Raises:
      ValueError: where several orders fit.
    """

    def __init__(
        self,
        items: Iterable[Placed],
        config: LoraConfig,
        named_theirs: bool,
        shapes: Mapping[str, Shape] | None = None,
    ) -> None:
        found: dict[Path, list[tuple[int, str]]] = {}
        layouts: dict[Path, tuple[TensorLayout, ...]] = {}
        self._adapted: set[Path] = set()
        for item in items:
            for named in item.theirs:
                if named.by_parameter:
                    said = named if named_theirs else item.ours
                    place = _place(config, ".".join(said.path))
                    found.setdefault(named.module, []).append((place, named.param))
                    layouts[named.path] = item.layouts
                elif item.spec is not None and item.spec.variant != "tokens":
                    self._adapted.add(named.module)
        self._inside = {
            module: [param for _, param in sorted(rows)] for module, rows in found.items()
        }
        for module, params in self._inside.items():
            if shapes is not None and len(params) > 1:
                self._inside[module] = self._fitting(module, layouts, shapes)

    def parts(self, item: Placed, named: Named) -> list[str]:
        """The module's name, as adapters around it and around the modules above leave it."""
        parts = self._above(named.module)
        around = self._inside.get(named.module, [])
        if item.spec is None:
            return parts + [BASE_LAYER] * (len(around) + (named.module in self._adapted))
        if named.by_parameter:
            return parts + [BASE_LAYER] * (len(around) - 1 - around.index(named.param))
        return parts

    def _above(self, module: Path) -> list[str]:
        parts: list[str] = []
        for depth, part in enumerate(module):
            parts += [BASE_LAYER] * len(self._inside.get(module[:depth], ()))
            parts.append(part)
        return parts

    def _fitting(
        self,
        module: Path,
        layouts: Mapping[Path, tuple[TensorLayout, ...]],
        shapes: Mapping[str, Shape],
    ) -> list[str]:
        """The order of a module's parameters with which the tensors have the right shapes."""
        params, above = self._inside[module], self._above(module)

        def fits(order: tuple[str, ...]) -> bool:
            for level, param in enumerate(reversed(order)):
                parts = [*above, *[BASE_LAYER] * level]
                for layout in layouts[(*module, param)]:
                    key = PREFIX + ".".join((*parts, layout.suffix))
                    if shapes.get(key) != layout.their_shape:
                        return False
            return True

        orders = [order for order in itertools.permutations(params) if fits(order)]
        if len(orders) > 1:
            raise ValueError(
                f"the adapters of {params} in {'.'.join(module)!r} have tensors of the same "
                "shapes, and their names do not tell them apart. Let peft save one adapter for each"
            )
        return list(orders[0]) if orders else params


def _place(config: LoraConfig, dotted: str) -> int:
    """Of the first entry of ``target_parameters`` that names a parameter."""
    entries = tuple(config.target_parameters or ())
    return next((i for i, entry in enumerate(entries) if matches((entry,), dotted)), len(entries))

"""Which tensors of Hugging Face's peft stand for which arrays here."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

from peft_jax._config import LoraConfig
from peft_jax._spec import LayerSpec, LoraSpec
from peft_jax.io.huggingface.config import Named, by_parameter
from peft_jax.io.huggingface.layout import (
    Stack,
    TensorLayout,
    adapter_layouts,
    stack_and_sizes,
    weight_layout,
)
from peft_jax.io.huggingface.module_names import Name, Path, Renames
from peft_jax.io.huggingface.nesting import BASE_LAYER, PREFIX, Nesting, Placed

_MOST_ERRORS = 10

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of a file: of which array, and of which layer of its stack."""

    item: Placed
    layer: int
    layout: TensorLayout


def collected(errors: list[str], rule: str) -> None:
    """Raises one error for several, of which the first ten are told."""
    if errors:
        more = f" and {len(errors) - _MOST_ERRORS} more" if len(errors) > _MOST_ERRORS else ""
        raise ValueError(f"{rule}: " + "; ".join(errors[:_MOST_ERRORS]) + more + ".")


class Placement:
    """Places adapters and whole parameters under the names that they have there.

    Args:
      config: says which adapters are of ``target_parameters``.
      named_theirs: whether the config speaks in their names, rather than in ours.
      renames: from our paths to their names.
      specs: a `LoraSpec` for each adapter, a `LayerSpec` for some of the weights.
      most: how many layers there may be in all; None: as many as arrays have.
    """

    def __init__(
        self,
        config: LoraConfig,
        named_theirs: bool,
        renames: Renames,
        specs: Mapping[str, Any],
        most: int | None = None,
    ) -> None:
        self.config, self.named_theirs, self.renames = config, named_theirs, renames
        self.specs, self.most = specs, most
        self.items: list[Placed] = []
        self.errors: list[str] = []

    def adapter(self, path: str, arrays: Mapping[str, Shape] | None = None) -> None:
        """Places one adapter; what is wrong with it is noted."""
        spec = self.specs[path]
        try:
            self.items.append(self._adapter(tuple(path.split("/")), spec, arrays))
        except ValueError as error:
            self.errors.append(f"'{path}': {error}")

    def whole(self, path: str, shape: Shape) -> None:
        """Places one parameter that is trained whole."""
        try:
            self.items.append(self._whole(tuple(path.split("/")), shape))
        except ValueError as error:
            self.errors.append(f"'{path}': {error}")

    def tensors(self, shapes: Mapping[str, Shape] | None = None) -> dict[str, Tensor]:
        """The tensors of all that was placed, by their keys.

        Args:
          shapes: of the tensors in a file, as in `Nesting`.

        Raises:
          ValueError: with what is wrong with any of it, and where two have one key.
        """
        collected(self.errors, "no name or layout of Hugging Face's stands for")
        nesting = Nesting(self.items, self.config, self.named_theirs, shapes)
        found: dict[str, Tensor] = {}
        errors = []
        for item in self.items:
            for layer, named in enumerate(item.theirs):
                parts = nesting.parts(item, named)
                for layout in item.layouts:
                    key = PREFIX + ".".join((*parts, layout.suffix))
                    if key in found:
                        twins = "/".join(found[key].item.path), "/".join(item.path)
                        errors.append(f"{key!r} of '{twins[0]}' and of '{twins[1]}'")
                    found[key] = Tensor(item, layer, layout)
        collected(
            errors,
            "several arrays would get one name; give each its own by renames, of which a key may "
            "end in the name of a parameter ({'attn/query_kernel': 'attn.q_proj'})",
        )
        return found

    def _adapter(self, path: Path, spec: LoraSpec, arrays: Mapping[str, Shape] | None) -> Placed:
        if spec.param is None:
            raise ValueError("it stands alone, beside no weight, and has no name there")
        stack, sizes = stack_and_sizes(spec, arrays)
        module, param = path[:-1], spec.param
        name = self.renames.forward((*module, param))
        bare = spec.kind == "experts"
        names = self._filled(name, stack)
        theirs = []
        for parts in names:
            whole_module = parts if name.takes_last and not bare else parts[:-1]
            theirs.append((whole_module, parts[-1] if bare else "weight"))
        if not all(module for module, _ in theirs):
            raise ValueError("the model itself is the layer, and has no name there")
        asked = theirs[0] if self.named_theirs else (module, param)
        parameter = spec.variant != "tokens" and by_parameter(self.config, *asked, spec.kind)
        layouts = adapter_layouts(spec, sizes, by_parameter=parameter)
        return Placed(
            path,
            spec,
            stack,
            tuple(layouts),
            Named(module, param, parameter),
            tuple(Named(module, param, parameter) for module, param in theirs),
        )

    def _whole(self, path: Path, shape: Shape) -> Placed:
        module, leaf = path[:-1], path[-1]
        name = self.renames.forward(path)
        spec = self.specs.get("/".join(path))
        if not isinstance(spec, LayerSpec):
            beside = (item for item in self.items if item.ours.module == module)
            spec = next((i.spec for i in beside if i.spec and i.ours.param == leaf), None)
            if spec is not None and spec.variant == "tokens":
                spec = None
        if spec is None:
            depth = name.places
            if depth > len(shape):
                raise ValueError(f"its shape {shape} has no axes for {depth} numbers of layers")
            _, layout = weight_layout(leaf, shape[depth:], None)
            stack = Stack(shape[:depth], (0,) * depth)
        else:
            stack, layout = weight_layout(leaf, shape, spec)
        names = self._filled(name, stack)
        if name.takes_last:
            layout = dataclasses.replace(layout, suffix=names[0][-1])
        theirs = tuple(Named(parts[:-1], layout.suffix, False) for parts in names)
        return Placed(path, None, stack, (layout,), Named(module, leaf, False), theirs)

    def _filled(self, name: Name, stack: Stack) -> list[Path]:
        if name.places != len(stack.lengths):
            raise ValueError(
                f"its layers are stacked along {len(stack.lengths)} axes, and its name there, "
                f"{name.pattern!r}, counts {name.places}. Say where "
                "the number of a layer goes by renames, such as {'layers': 'layers.{}'}"
            )
        count = math.prod(stack.lengths)
        if min(stack.lengths, default=1) < 1 or (self.most is not None and count > self.most):
            raise ValueError(f"its stack of {stack.lengths} layers does not fit the file")
        return [name.at(index) for index in stack.indices]


# --- Names of which the model is not known -------------------------------------------------------

_ADAPTER_ENDS = (
    *("lora_A.weight", "lora_B.weight", "lora_B.bias", "lora_magnitude_vector"),
    *("lora_embedding_A", "lora_embedding_B", "token_adapter.trainable_tokens_delta"),
)


@dataclasses.dataclass(frozen=True)
class Key:
    """A tensor's name, taken apart.

    Attributes:
      module: that it is about, without what adapters put between.
      end: how it ends: an adapter's array, or the name of a parameter.
    """

    module: Path
    end: str

    @property
    def of_adapter(self) -> bool:
        """Whether it is no whole parameter."""
        return self.end in _ADAPTER_ENDS


def read_keys(names: Iterable[str]) -> dict[str, Key]:
    """The keys of a file taken apart, without copies of what is there under another key.

    Raises:
      ValueError: with the names that are none of peft's.
    """
    found: dict[str, Key] = {}
    errors = []
    for name in names:
        parts = tuple(name.removeprefix(PREFIX).split("."))
        strange = any(
            not part or not part.isprintable() or set(part) & set("/\\") for part in parts
        )
        end = next((end for end in _ADAPTER_ENDS if name.endswith(f".{end}")), parts[-1])
        module = parts[: len(parts) - len(end.split("."))]
        if not name.startswith(PREFIX) or strange or (not module and end in _ADAPTER_ENDS):
            errors.append(repr(name))
            continue
        found[name] = Key(tuple(part for part in module if part != BASE_LAYER), end)
    collected(errors, f"names of tensors are {PREFIX!r}, a module and what is of it, dots between")
    plain = {(key.module, key.end) for key in found.values()}
    return {name: key for name, key in found.items() if not _is_copy(key, plain)}


def _is_copy(key: Key, plain: set[tuple[Path, str]]) -> bool:
    """Whether a parameter that is trained whole is there under its own name too.

    With the biases of all layers peft writes those of its copies as well.
    """
    for mark, length in (("original_module", 1), ("modules_to_save", 2)):
        if mark in key.module and not key.of_adapter:
            place = key.module.index(mark)
            return (key.module[:place] + key.module[place + length :], key.end) in plain
    return False

"""Adapters at the weights of any module and of the modules inside it."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
from flax.core import meta
from flax.errors import NameInUseError
from flax.typing import Array

from peft_jax._layers.adapter_variants import Settings, weight_change
from peft_jax._layers.lora_norm import NORMS, around_norm
from peft_jax._layers.lora_rules import AdapterRule
from peft_jax._numerics import as_stored, weight_shape
from peft_jax._spec import weight_equation
from peft_jax._surgery import Call, Proceed, find_layer, special_call
from peft_jax._trees import is_adapter


@dataclasses.dataclass(frozen=True)
class LoRAWeightRule(AdapterRule):
    """Adapters at the weights of a module and of the modules inside it."""

    covers_children: ClassVar[bool] = True
    settings: Settings
    params: tuple[str, ...] | None

    def _names(self, path: tuple[str, ...], name: str) -> bool:
        if self.params is None:
            return True
        full = "/".join((*path, name))
        return any(full == entry or full.endswith("/" + entry) for entry in self.params)

    def concerns(self, call: Call) -> bool:
        if self.params is None:
            return True
        layer = find_layer(call.module)
        return layer is None or self._names(call.module.scope.path, layer.param)

    def at_weight(self, call: Call) -> bool:
        return True

    def change(self, call: Call, name: str, value: Any) -> Array | None:
        path = call.module.scope.path
        if not self._names(path, name) or not isinstance(value, jax.Array):
            return None
        if value.ndim < 2:
            if self.params is None:
                return None
            raise ValueError(
                f"LoRAWeight(params={self.params}) names '{'/'.join((*path, name))}', which has "
                f"shape {value.shape}: a low-rank change needs two axes or more. Leave it out."
            )
        layer = find_layer(call.module)
        if layer is None or layer.param != name:
            return weight_change(
                self.settings, call, name, value, weight_equation(value.ndim), None
            )
        return weight_change(self.settings, call, name, value, layer.equation(call), layer.kind)

    def around(self, call: Call, proceed: Proceed) -> Any:
        try:
            y = proceed(call)
        except NameInUseError as error:
            raise ValueError(
                f"{type(call.module).__name__} at '{call.path}' has a child or a parameter named "
                "'lora' or 'lora_<parameter>', as its adapters are. Rename the module's own."
            ) from error
        if call.method == "__call__":
            self._check_used(call)
        return y

    def _check_used(self, call: Call) -> None:
        found = _kernels(call.module.variables.get("params", {}))
        self._check_names(call, found)
        if call.module.is_initializing() and not any(adapted for _, adapted in found):
            raise ValueError(
                f"LoRAWeight found nothing to adapt in {type(call.module).__name__} at "
                f"'{call.path}': its parameters of two or more axes are "
                f"{[path for path, _ in found]}. Wrap the module that reads the parameter, before "
                "it is first used."
            )

    def _check_names(self, call: Call, found: list[tuple[str, bool]]) -> None:
        base = call.module.scope.path
        for entry in self.params or ():
            paths = ["/".join((*base, path)) for path, _ in found]
            if not any(path == entry or path.endswith("/" + entry) for path in paths):
                close = difflib.get_close_matches(entry, [path for path, _ in found], 3, 0.0)
                raise ValueError(
                    f"LoRAWeight(params={self.params}): {entry!r} is no parameter of two or more "
                    f"axes of {type(call.module).__name__} at '{call.path}'. Close names: {close}."
                )


def _kernels(params: Mapping[str, Any], prefix: str = "") -> list[tuple[str, bool]]:
    """Paths of the parameters of two or more axes, and whether an adapter lies beside each."""
    found: list[tuple[str, bool]] = []
    adapted = any(is_adapter(name, value) for name, value in params.items())
    for name, value in params.items():
        if is_adapter(name, value):
            continue
        if isinstance(value, Mapping) and as_stored(value) is None:
            found += _kernels(value, f"{prefix}{name}/")
        elif len(weight_shape(meta.unbox(value))) >= 2:
            found.append((prefix + name, adapted))
    return found


for _norm in NORMS:
    special_call(_norm, around_norm)

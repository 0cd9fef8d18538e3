"""Where adapters and scales lie in a parameter tree, told from what is the user's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import linen as nn
from flax.core import meta

__all__ = [
    "BANK",
    "DEFAULT",
    "LORA",
    "TOKENS",
    "adapter_name",
    "check_adapter_name",
    "is_adapter",
    "is_bank",
    "named_as",
    "scale_name",
    "unused_scale_name",
]


LORA = "lora"
TOKENS = "lora_tokens"
DEFAULT = "default"
BANK = "bank"
_FIRST = "_peft_jax_first_adapter"


def is_adapter(name: str, branch: Any) -> bool:
    """Whether a branch of a parameter tree is an adapter, rather than a user's own ``lora``.

    An adapter is named ``lora`` or ``lora_<parameter>``, with ``.<name>`` behind it if it has a
    name of its own (or is a ``LoRA...Adapter`` that stands alone). It holds the two arrays ``a``
    and ``b``, which share an axis, the rank: the last of ``a``; and maybe ``magnitude`` and
    ``bias``, and nothing else. Or it is named ``lora_tokens`` and holds ``rows`` alone.
    """
    if not isinstance(name, str):
        return False
    named = name == LORA or name.startswith((f"{LORA}_", f"{LORA}.")) or _stands_alone(name)
    if not named or not isinstance(branch, Mapping):
        return False
    if set(branch) == {"rows"}:
        return name.partition(".")[0] == TOKENS and not isinstance(branch["rows"], Mapping)
    if not {"a", "b"} <= set(branch) <= {"a", "b", "magnitude", "bias"}:
        return False
    if any(isinstance(branch[leaf], Mapping | list | tuple) for leaf in branch):
        return False
    a, b = (np.shape(meta.unbox(branch[leaf])) for leaf in ("a", "b"))
    return not (a and b) or a[-1] in b


SCALE = "scale"


def scale_name(param: str, layer: Mapping[str, Any]) -> str | None:
    """Under which name the scale of stored values lies beside them; None where there is none.

    It is ``scale``, or ``scale_<parameter>`` where that is taken: by another stored parameter, or
    by a parameter of the module's own.
    """
    return next((name for name in (f"{SCALE}_{param}", SCALE) if name in layer), None)


def unused_scale_name(param: str, layer: Mapping[str, Any]) -> str:
    """The name for a new scale; see `scale_name`."""
    return f"{SCALE}_{param}" if SCALE in layer else SCALE


def _stands_alone(name: str) -> bool:
    kind = name.rstrip("0123456789")
    return name.startswith("LoRA") and kind.endswith("Adapter_") and kind != name


def named_as(branch: str) -> str:
    """The name of the adapter that lies under this name: ``french`` of ``lora.french``."""
    return branch.partition(".")[2] or DEFAULT


def is_bank(name: str, branch: Any) -> bool:
    """Whether a branch of a parameter tree is a bank of adapters; see `stack_adapters`."""
    return isinstance(name, str) and named_as(name) == BANK and isinstance(branch, Mapping)


def check_adapter_name(owner: str, name: object) -> None:
    """Refuses a name that could not stand in a path."""
    if not isinstance(name, str) or not name or set(name) & set("/."):
        raise ValueError(f"{owner}.adapter_name is a name without dots and slashes, got {name!r}.")
    if name == BANK:
        raise ValueError(
            f"{owner}.adapter_name = {BANK!r} is where `stack_adapters` puts its bank."
        )


def adapter_name(module: nn.Module, param: str, name: str = DEFAULT) -> str:
    """Where an adapter of one parameter lies, in the scope that holds the parameter.

    It is ``lora``. Where the scope holds several kernels, it is ``lora_<parameter>`` for those
    beyond the module's first, and for those of modules that share the scope of another. Adapters
    with a name of their own have it behind: ``lora.french``.
    """
    scope = module.scope
    assert scope is not None
    own = "" if name == DEFAULT else f".{name}"
    specific = f"{LORA}_{param}{own}"
    if scope.has_variable("params", specific):
        return specific
    if param != "kernel" and _shares_scope(module):
        return specific
    first = module.__dict__.setdefault(_FIRST, param)
    return f"{LORA}{own}" if first == param else specific


def _shares_scope(module: nn.Module) -> bool:
    """Whether the module lives in the scope of a module of another name (``nn.share_scope``)."""
    scope, parent = module.scope, module.parent
    assert scope is not None
    if isinstance(parent, nn.Module):
        return parent.scope == scope
    return scope.name is not None and module.name not in (None, scope.name)

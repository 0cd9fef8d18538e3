"""Whether a config and the adapters in a parameter tree speak of the same layers."""

from __future__ import annotations

from typing import Any

from peft_jax._config import LoraConfig, check_entries, is_all_linear, selects, selects_parameter
from peft_jax._trees import (
    TOKENS,
    children,
    containers,
    is_adapter,
    is_branch,
    named_adapters,
    slashed,
)


def check_adapted(config: LoraConfig, params: Any, adapter_name: str, *, at_init: bool) -> None:
    """Every entry of the config matches something in a whole parameter tree."""
    tree = list(containers(params))
    adapted = [path for path, layer in tree if named_adapters(layer, adapter_name)]
    parameters = [
        (*path, str(key))
        for path, layer in tree
        for key, value in children(layer)
        if not is_branch(value) and not is_adapter(key, value)
    ]
    if not at_init:
        if not adapted:
            raise ValueError(
                f"The parameters hold no adapter named {adapter_name!r}. Initialize this model by "
                "its own `init`, or add adapters to the base's parameters by `peft.merge_params`."
            )
        adapted += [path for path, _ in tree if not is_all_linear(config) and selects(config, path)]
    targeted = [path for path in adapted if selects(config, path)]
    check_entries(config, [path for path, _ in tree], targeted, parameters)
    if not at_init:
        _refuse_unused(config, tree, adapter_name)


def _refuse_unused(config: LoraConfig, tree: list[tuple[Any, Any]], adapter_name: str) -> None:
    """Adapters that a config by names means no layer by."""
    if is_all_linear(config):
        return
    for path, layer in tree:
        names = named_adapters(layer, adapter_name)
        by_name = selects(config, path) or any(
            selects_parameter(config, (*path, str(key))) for key in layer
        )
        by_tokens = config.trainable_token_indices is not None
        unused = [n for n in names if not (by_tokens if n.startswith(TOKENS) else by_name)]
        if unused:
            raise ValueError(
                f"The parameters hold an adapter at '{slashed((*path, unused[0]))}', which this "
                "config means no layer by, so that it would take no part. Give the config that it "
                "was made by, or take it off; if it is another's, give this one an adapter_name."
            )

"""What saving and loading share: which specs are meant, and whether the config agrees."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft_jax._config import LoraConfig
from peft_jax._spec import LayerSpec, LoraSpec
from peft_jax._trees import named_as
from peft_jax.io.huggingface.config import Named, disagreements, trains, unmatched
from peft_jax.io.huggingface.keys import collected
from peft_jax.io.huggingface.module_names import Path
from peft_jax.io.huggingface.nesting import Placed

TENSORS_FILE = "adapter_model.safetensors"
_TABLES = (("embed_tokens",), ("lm_head",))


def without_names(specs: Mapping[str, Any], adapter_name: str) -> dict[str, Any]:
    """Specs by paths without the adapters' name: of adapters of this name, if there are several."""
    if not isinstance(specs, Mapping):
        raise ValueError(f"specs are a dict from paths to specs, got {type(specs).__name__}.")
    wrong = [p for p, s in specs.items() if not isinstance(s, LoraSpec | LayerSpec)]
    if wrong or not all(isinstance(path, str) for path in specs):
        raise ValueError(
            f"specs are from paths to a LoraSpec or LayerSpec; others are at {wrong[:3]}."
        )
    parts = {path: path.rpartition("/") for path in specs}
    names = {named_as(parts[path][2]) for path, s in specs.items() if isinstance(s, LoraSpec)}
    found: dict[str, Any] = {}
    for path, spec in specs.items():
        above, slash, last = parts[path]
        if not isinstance(spec, LoraSpec):
            found[path] = spec
        elif len(names) == 1 or named_as(last) == adapter_name:
            found[f"{above}{slash}{last.partition('.')[0]}"] = spec
    return found


def check_config(config: LoraConfig, items: list[Placed], *, theirs: bool) -> None:
    """The config says of every adapter what its spec says, and trains what is trained.

    Args:
      config: in their names or in ours.
      items: all that is in the tree or in the file.
      theirs: whether the config is in their names. Then it may name modules that are not there, as
        in peft.

    Raises:
      ValueError: with all that differs.
    """
    errors: list[str] = []
    adapters: list[Named] = []
    whole: list[tuple[str, ...]] = []
    beside: dict[Path, list[Placed]] = {}
    for item in items:
        if item.spec is not None:
            beside.setdefault(item.ours.module, []).append(item)
    for item in items:
        named, path = item.theirs if theirs else (item.ours,), "/".join(item.path)
        if item.spec is None:
            own = [(*one.module, one.param) for one in named]
            adapted = beside.get(item.ours.module, [])
            is_trained = all(trains(config, one, adapted=bool(adapted)) for one in own)
            if not is_trained and not _is_table(item, adapted):
                errors.append(f"'{path}': not trained (modules_to_save, bias)")
            whole += own
            continue
        if item.spec.variant != "tokens":
            adapters += named
        for one in named:
            errors += [f"'{path}': {said}" for said in disagreements(config, one, item.spec)]
    lone = unmatched(config, None if theirs else adapters, whole)
    errors += [f"{entry} names nothing here" for entry in lone]
    if not theirs and config.bias != "none" and not any(path[-1] == "bias" for path in whole):
        errors.append(f"bias {config.bias!r}, but no bias is in the tree")
    if config.trainable_token_indices and not any(
        item.spec is not None and item.spec.variant == "tokens" for item in items
    ):
        errors.append("trainable_token_indices, but there are no rows")
    collected(
        errors,
        "the config says otherwise than arrays and specs (config for spec); give the config that "
        "the adapters were made by, and beside them in the tree what it trains whole",
    )


def _is_table(item: Placed, adapters: list[Placed]) -> bool:
    """Whether it is the weight of an embedding that peft saves with what adapts or resized it."""
    return item.theirs[0].module[-1:] in _TABLES or any(
        one.spec is not None and one.spec.kind == "embed" and one.ours.param == item.ours.param
        for one in adapters
    )


def both_names(items: list[Placed], *, to_theirs: bool) -> tuple[Any, Any]:
    """Names of adapters and of modules trained whole, on one side and on the other."""
    adapters: list[Any] = []
    whole: list[Any] = []
    for item in items:
        for theirs in item.theirs:
            pair = (item.ours, theirs) if to_theirs else (theirs, item.ours)
            if item.spec is not None:
                adapters.append((*pair, item.spec))
            else:
                whole.append((pair[0].module, pair[1].module))
    return adapters, whole

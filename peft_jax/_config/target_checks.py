"""Errors about entries of a `LoraConfig` that match nothing in a model."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from peft_jax._config.lora_config import LoraConfig
from peft_jax._config.targets import (
    MODULE_FORM,
    PATTERN_FORM,
    Path,
    chosen_layers,
    compiled,
    dotted_path,
    in_layers,
    is_all_linear,
    layer_index,
    left_out_by,
    path_ends,
    selects,
    selects_parameter,
)

__all__ = [
    "check_entries",
    "check_saved",
]


def check_entries(
    config: LoraConfig,
    modules: Iterable[Path],
    targeted: Iterable[Path],
    parameters: Iterable[Path],
) -> None:
    """Refuses a config with an entry that matches nothing in a model.

    Args:
      config: as the user wrote it. Names that `with_targets` filled in are entries like all others;
        where ``target_modules`` is None, they are not checked one by one.
      modules: paths of all modules, containers included.
      targeted: paths of the modules that got an adapter.
      parameters: paths of all parameters.

    Raises:
      ValueError: naming the first field with such entries, the entries and the closest names of the
        model; or where nothing got an adapter at all.
    """
    modules, targeted, parameters = tuple(modules), tuple(targeted), tuple(parameters)
    adapted = tuple(path for path in parameters if selects_parameter(config, path))
    tokens = config.trainable_token_indices
    _check_layers(config, modules, targeted)
    if not is_all_linear(config):
        _check_names(config, "target_modules", config.target_modules, targeted, modules)
    _check_names(config, "target_parameters", config.target_parameters, adapted, parameters)
    if not targeted and not adapted:
        raise ValueError(
            f"LoraConfig.target_modules = {config.target_modules!r} adapts no module: each is left "
            "out by another field or takes no adapter. Name modules that do; there are "
            f"{_some(map(dotted_path, modules))}."
        )
    _check_names(config, "exclude_modules", config.exclude_modules, modules, modules)
    _check_names(config, "modules_to_save", config.modules_to_save, modules, modules, MODULE_FORM)
    for field in ("rank_pattern", "alpha_pattern"):
        keys, paths = tuple(getattr(config, field)), targeted + adapted
        _check_names(config, field, keys, paths, modules + parameters, PATTERN_FORM)
    keys = tuple(tokens) if isinstance(tokens, Mapping) else ()
    _check_names(config, "trainable_token_indices", keys, modules, modules)


def _some(names: Iterable[str], count: int = 8) -> str:
    listed = sorted(set(names) - {""})
    more = f" and {len(listed) - count} more" if len(listed) > count else ""
    return (", ".join(map(repr, listed[:count])) + more) or "none"


def _close(entry: str, paths: Iterable[Path]) -> str:
    """The closest names, each made of as many of a path's last names as the entry has."""
    plain = re.sub(r"[^\w.]", "", entry.replace("/", ".")).strip(".")
    length = plain.count(".") + 1
    ends = {dotted_path(path[-length:]) for path in paths if path and not path[-1].isdigit()}
    close = difflib.get_close_matches(plain, sorted(ends), 3, 0.5)
    return f"closest: {', '.join(map(repr, close))}" if close else f"there are {_some(ends)}"


def _matcher(entries: Any, entry: str, form: str | None) -> Callable[[str], Any]:
    if form is not None:
        return lambda dotted: compiled(form, (entry,))[0].match(dotted)
    if isinstance(entries, str):
        return re.compile(entry).fullmatch
    end = entry.replace("/", ".")
    return lambda dotted: dotted == end or dotted.endswith(f".{end}")


def _check_names(
    config: LoraConfig,
    field: str,
    entries: Collection[str] | str | None,
    matchable: Iterable[Path],
    everything: Iterable[Path],
    form: str | None = None,
) -> None:
    """Raises where an entry matches none of the matchable paths.

    Entries are names, or a string that is an expression for whole paths; with a ``form``, names
    that stand in this expression. The error looks among everything for what was meant.
    """
    listed = [entries] if isinstance(entries, str) else list(entries or ())
    paths = [dotted_path(path) for path in matchable] if listed else []
    # A plain name matches itself in every form, so that thousands of names are soon checked.
    ends = set() if isinstance(entries, str) else {end for path in paths for end in path_ends(path)}
    missing = []
    for entry in listed:
        is_plain = re.fullmatch(r"[\w./-]+", entry) is not None
        matches = _matcher(entries, entry, form)
        if not (is_plain and entry.replace("/", ".") in ends) and not any(map(matches, paths)):
            missing.append((entry, matches))
    if missing:
        notes = [
            f"{entry!r} ({_note(config, field, entry, matches, tuple(everything))})"
            for entry, matches in missing[:3]
        ]
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ValueError(
            f"LoraConfig.{field}: every entry must match, and nothing is matched by "
            f"{', '.join(notes)}{more}. Correct them or leave them out."
        )


def _note(
    config: LoraConfig,
    field: str,
    entry: str,
    matches: Callable[[str], Any],
    everything: tuple[Path, ...],
) -> str:
    meant = next((path for path in everything if matches(dotted_path(path))), None)
    if meant is None:
        return _close(entry, everything)
    is_parameter = field == "target_parameters"
    field_at_work = left_out_by(config, meant[:-1] if is_parameter else meant)
    if field_at_work is None and not is_parameter and not in_layers(config, meant):
        field_at_work = "layers_to_transform"
    why = f"{field_at_work} leaves out" if field_at_work else "got no adapter"
    return f"there is {dotted_path(meant)!r}, which {why}"


def _check_layers(
    config: LoraConfig, modules: tuple[Path, ...], targeted: tuple[Path, ...]
) -> None:
    """Raises where an index of a layer, or a name that stands before one, is that of no layer."""
    layers, patterns = chosen_layers(config), config.layers_pattern or ()
    if not layers:
        return
    anywhere = dataclasses.replace(config, layers_to_transform=None, layers_pattern=None)
    named = [path for path in modules if config.target_modules and selects(anywhere, path)]
    adapted = targeted or named
    if not adapted and config.target_modules != ():
        return  # then target_modules is to blame
    for pattern in (patterns,) if isinstance(patterns, str) else patterns:
        if all(layer_index(path, pattern) is None for path in adapted):
            raise ValueError(
                f"LoraConfig.layers_pattern has {pattern!r}, after which no index stands in the "
                f"paths of the layers to adapt; there are {_some(map(dotted_path, adapted))}."
            )
    indices = {layer_index(path, patterns) for path in adapted}
    absent = [index for index in layers if index not in indices]
    if not absent:
        return
    there = sorted({index for path in named if (index := layer_index(path, patterns)) is not None})
    if there:
        raise ValueError(
            f"LoraConfig.layers_to_transform: no layer of index {absent} got an adapter. "
            f"target_modules names modules at the indices {there}: choose among these."
        )
    raise ValueError(
        f"LoraConfig.layers_to_transform = {absent}: no index stands in the paths of the layers "
        f"to adapt ({_some(map(dotted_path, adapted))}). Layers that nn.scan stacks are one module "
        "without an index: leave layers_to_transform out to adapt them all."
    )


def check_saved(config: LoraConfig, modules: Iterable[Path]) -> None:
    """Refuses ``modules_to_save`` with an entry that matches no module; see `check_entries`."""
    paths = list(modules)
    _check_names(config, "modules_to_save", config.modules_to_save, paths, paths, MODULE_FORM)

"""Which modules and parameters a `LoraConfig` names, by the rules of Hugging Face's peft.

A path is a tuple of names such as ``("transformer", "h", "0", "attn", "c_attn")``. Nothing here
knows a model; paths are all there is.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from peft_jax._config.lora_config import LoraConfig

__all__ = [
    "PATTERN_FORM",
    "TARGETS_BY_MODEL_TYPE",
    "alpha_of",
    "is_all_linear",
    "is_saved",
    "layer_index",
    "matches",
    "rank_of",
    "scaling_of",
    "selects",
    "selects_parameter",
    "tokens_of",
    "with_targets",
]


Path = tuple[str, ...]

_QV = ("q_proj", "v_proj")
_QUERY_VALUE = ("query", "value")
_FUSED = ("query_key_value",)

# What is adapted where a config names no modules, by the model's `config.model_type`.
TARGETS_BY_MODEL_TYPE: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("t5", "mt5"), ("q", "v")),
    **dict.fromkeys(("bart", "opt", "gptj", "gpt_neo", "llama", "llama4", "mistral"), _QV),
    **dict.fromkeys(("mixtral", "stablelm", "gemma", "gemma2", "gemma3_text"), _QV),
    **dict.fromkeys(("qwen2", "qwen3"), _QV),
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "electra", "layoutlm"), _QUERY_VALUE),
    **dict.fromkeys(("bloom", "gpt_neox", "chatglm", "falcon"), _FUSED),
    **dict.fromkeys(("RefinedWebModel", "RefinedWeb"), _FUSED),
    **dict.fromkeys(("gpt2", "gpt_bigcode"), ("c_attn",)),
    "blip-2": ("q", "v", "q_proj", "v_proj"),
    "btlm": ("c_proj", "c_attn"),
    "codegen": ("qkv_proj",),
    "deberta": ("in_proj",),
    "deberta-v2": ("query_proj", "value_proj"),
    "mpt": ("Wqkv",),
    "phi": ("q_proj", "v_proj", "fc1", "fc2"),
    "rwkv": ("key", "value", "receptance", "output"),
    "rwkv7": ("r_proj", "k_proj", "v_proj", "o_proj", "key", "value"),
}


def with_targets(config: LoraConfig, model_type: str | None) -> LoraConfig:
    """The config with its ``target_modules``, by the model's type where it names none.

    Args:
      config: left as it is where it has ``target_modules`` or ``target_parameters``.
      model_type: the model's ``config.model_type``; None: the model says none.

    Raises:
      ValueError: where the type is missing or unknown.
    """
    if config.target_modules is not None or config.target_parameters:
        return config
    remedy = "name modules in target_modules, or pass target_modules='all-linear'"
    if model_type is None:
        raise ValueError(
            "LoraConfig.target_modules = None chooses modules by the model's config.model_type, "
            f"which this model lacks: {remedy}."
        )
    if model_type not in TARGETS_BY_MODEL_TYPE:
        close = difflib.get_close_matches(str(model_type), TARGETS_BY_MODEL_TYPE, 3, 0.4)
        raise ValueError(
            f"LoraConfig.target_modules = None, and no modules are known for the model type "
            f"{model_type!r} (close to it: {close}): {remedy}."
        )
    return dataclasses.replace(config, target_modules=TARGETS_BY_MODEL_TYPE[model_type])


# --- How entries match paths ---------------------------------------------------------------------


MODULE_FORM = r"(^|.*\.){}($|\..*)"
PATTERN_FORM = r"(.*\.)?({})$"
# `layers.0.`: the last such; else `layers_0.`: the first. Paths get a dot in front.
_INDEX_FORMS = (r".*\.(?:{})\.(\d+)\.", r".*?\.(?:{})_(\d+)\.")


def dotted_path(path: Iterable[str]) -> str:
    return ".".join(path)


@functools.lru_cache(maxsize=256)
def _with_dots(entries: tuple[str, ...]) -> frozenset[str]:
    return frozenset(entry.replace("/", ".") for entry in entries)


def path_ends(dotted: str) -> Iterator[str]:
    """The path, and what follows each of its dots."""
    yield dotted
    for dot in re.finditer(r"\.", dotted):
        yield dotted[dot.end() :]


@functools.lru_cache(maxsize=1024)
def compiled(form: str, patterns: tuple[str, ...]) -> tuple[re.Pattern[str], ...]:
    """Each pattern inside the form; kept, as `re` itself forgets all but a few hundred."""
    return tuple(re.compile(form.format(pattern.replace("/", "."))) for pattern in patterns)


def matches(entries: Collection[str] | str, dotted: str) -> bool:
    """A list names the path or its end from a dot on; a string is an expression for all of it."""
    if isinstance(entries, str):
        return re.fullmatch(entries, dotted) is not None
    return not _with_dots(tuple(entries)).isdisjoint(path_ends(dotted))


def layer_index(path: Path, patterns: Collection[str] | str | None = None) -> int | None:
    """The index of the layer that a module belongs to.

    The last name but one's own that is an integer and follows a name that a pattern matches
    (``model.layers.3.q``: 3); else the first name such as ``layers_3`` whose stem a pattern
    matches. The module's own name, such as ``Dense_0``, never counts.

    Args:
      path: the module's path.
      patterns: a name or names of what holds the layers, as regular expressions; None: any.
    """
    given = (patterns,) if isinstance(patterns, str) else tuple(patterns or ())
    dotted = f".{dotted_path(path)}"
    for form in _INDEX_FORMS:
        for pattern in compiled(form, given if any(given) else ("[^.]+",)):
            if found := pattern.match(dotted):
                return int(found.group(pattern.groups))
    return None


def chosen_layers(config: LoraConfig) -> tuple[int, ...]:
    layers = config.layers_to_transform
    return (layers,) if isinstance(layers, int) else tuple(layers or ())


def in_layers(config: LoraConfig, path: Path) -> bool:
    layers = chosen_layers(config)
    return not layers or layer_index(path, config.layers_pattern) in layers


def left_out_by(config: LoraConfig, path: Path) -> str | None:
    """The field that keeps adapters from a module, whatever else names it."""
    if config.exclude_modules and matches(config.exclude_modules, dotted_path(path)):
        return "exclude_modules"
    return "modules_to_save" if is_saved(config, path) else None


# --- What a config says of a path ----------------------------------------------------------------


def is_all_linear(config: LoraConfig) -> bool:
    """Whether the config adapts every linear layer rather than layers by name."""
    return config.target_modules == "all-linear"


def is_saved(config: LoraConfig, path: Path) -> bool:
    """Whether ``modules_to_save`` names a module, or one that it lies in."""
    dotted = dotted_path(path)
    entries = tuple(config.modules_to_save or ())
    return any(pattern.match(dotted) for pattern in compiled(MODULE_FORM, entries))


def selects(config: LoraConfig, path: Path) -> bool:
    """Whether the config adapts the module at a path, as far as its path says.

    For ``all-linear`` that is every path that is not left out; the caller knows the kinds of
    layers. An entry that is the whole path holds whatever ``layers_to_transform`` says.

    Raises:
      ValueError: where ``target_modules`` is None and there are no ``target_parameters``.
    """
    target, dotted = config.target_modules, dotted_path(path)
    if target is None and not config.target_parameters:
        raise ValueError(
            "LoraConfig.target_modules = None names no modules: name them, or let "
            "with_targets choose them by the model's type."
        )
    if not target or left_out_by(config, path):
        return False
    if is_all_linear(config):
        return in_layers(config, path)
    if not matches(target, dotted):
        return False
    is_whole = isinstance(target, str) or dotted in _with_dots(tuple(target))
    return is_whole or in_layers(config, path)


def selects_parameter(config: LoraConfig, path: Path) -> bool:
    """Whether ``target_parameters`` names a parameter whose module is not left out."""
    named = matches(config.target_parameters or (), dotted_path(path))
    return named and left_out_by(config, path[:-1]) is None


def _of_pattern(pattern: Mapping[str, Any], path: Path, default: Any) -> Any:
    dotted = dotted_path(path)
    for key, expression in zip(pattern, compiled(PATTERN_FORM, tuple(pattern)), strict=True):
        if expression.match(dotted):
            return pattern[key]
    return default


def rank_of(config: LoraConfig, path: Path) -> int:
    """The rank at a module or parameter: by the first key of ``rank_pattern`` that matches."""
    return _of_pattern(config.rank_pattern, path, config.r)


def alpha_of(config: LoraConfig, path: Path) -> float:
    """Alpha at a module or parameter: by the first key of ``alpha_pattern`` that matches."""
    return _of_pattern(config.alpha_pattern, path, config.lora_alpha)


def scaling_of(config: LoraConfig, path: Path) -> float:
    """``alpha / r`` at a module or parameter, or ``alpha / sqrt(r)`` for rsLoRA."""
    rank = rank_of(config, path)
    return alpha_of(config, path) / (math.sqrt(rank) if config.use_rslora else rank)


def tokens_of(config: LoraConfig, path: Path, *, is_table: bool) -> tuple[int, ...]:
    """The rows that ``trainable_token_indices`` names of the embedding at a path.

    Args:
      config: names rows, of embeddings by name or of the one that the model has.
      path: of a module.
      is_table: whether that is the embedding which a plain list is about.
    """
    tokens = config.trainable_token_indices
    if not isinstance(tokens, Mapping):
        return tuple(tokens or ()) if is_table else ()
    dotted = dotted_path(path)
    named = [key for key in tokens if matches((key,), dotted)]
    return tuple(dict.fromkeys(token for key in named for token in tokens[key]))

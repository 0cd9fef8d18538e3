"""What the fields of a config may hold: a reader for each kind of value, and their contradictions.

A reader takes the value given and returns it as it is kept (lists as tuples, numbers as Python's),
or raises a ValueError that says in words what the field holds.
"""

from __future__ import annotations

import difflib
import enum
import math
import numbers
import operator
import re
import reprlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

Reader = Callable[[Any], Any]

ALL_LINEAR = "all-linear"
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 200
_SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxset = _SHORT.maxfrozenset = _SHORT.maxdict = 12


def shown(value: Any) -> str:
    """The value as it was written, shortened where it is long."""
    return _SHORT.repr(value)


def closest(name: Any, names: Iterable[str]) -> str:
    """``; the closest is 'x'``, or nothing where no name is close."""
    by_lower = {name.lower(): name for name in names}
    close = difflib.get_close_matches(str(name).lower(), list(by_lower), 1)
    return f"; the closest is {by_lower[close[0]]!r}" if close else ""


def read_fields(config: Any, readers: Mapping[str, Reader]) -> None:
    """Brings every field of a frozen dataclass into the form in which it is kept.

    Raises:
      ValueError: on a value that the field does not take; the text starts with ``Class.field``.
    """
    for name, reader in readers.items():
        value = getattr(config, name)
        try:
            kept = reader(value)
        except ValueError as error:
            raise ValueError(
                f"{type(config).__name__}.{name} = {shown(value)} is not allowed: {error}."
            ) from error
        object.__setattr__(config, name, kept)


def flag(value: Any) -> bool:
    """True or False."""
    if not isinstance(value, bool):
        raise ValueError("it is True or False")
    return value


def text(value: Any) -> str:
    """A string."""
    if not isinstance(value, str):
        raise ValueError("it is a string")
    return value


def integer(at_least: int | None = None) -> Reader:
    """An integer, numpy's too, but no bool."""
    words = "it is an integer" + ("" if at_least is None else f" of at least {at_least}")

    def read(value: Any) -> int:
        if isinstance(value, bool) or not hasattr(value, "__index__"):
            raise ValueError(words)
        try:
            kept = operator.index(value)
        except TypeError:  # an array that holds no single integer has `__index__` too
            raise ValueError(words) from None
        if at_least is not None and kept < at_least:
            raise ValueError(words)
        return kept

    return read


def number(words: str, allows: Callable[[float], bool] = math.isfinite) -> Reader:
    """A finite number, numpy's too, but no bool; an integer stays one."""

    def read(value: Any) -> float:
        if not isinstance(value, numbers.Real) or isinstance(value, bool):
            raise ValueError(f"it is {words}")
        try:
            as_float = float(value)
        except OverflowError:  # an integer beyond all floats
            as_float = math.inf
        if not math.isfinite(as_float) or not allows(as_float):
            raise ValueError(f"it is {words}")
        return int(value) if isinstance(value, numbers.Integral) else as_float

    return read


def _check_compiles(value: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{value!r} is no regular expression ({error})") from error


def regex(value: Any) -> str:
    """A regular expression that serves as a part of a larger one."""
    _check_compiles(text(value), f"(?:{value})")
    return value


def path_regex(value: str) -> str:
    """A regular expression for whole paths."""
    if not value:
        raise ValueError("an empty string names no module; give a list of names")
    _check_compiles(value, value)
    return value


def path_regex_or_all(value: str) -> str:
    """A regular expression for whole paths, or ``all-linear`` in any case."""
    return ALL_LINEAR if value.lower() == ALL_LINEAR else path_regex(value)


def list_of(reader: Reader, words: str, distinct: bool = False) -> Reader:
    """A list, tuple or set, each entry by ``reader``; kept as a tuple, a set in sorted order."""

    def read(value: Any) -> tuple[Any, ...]:
        if not isinstance(value, list | tuple | set | frozenset):
            remedy = f"; write [{value!r}]" if isinstance(value, str) else ""
            raise ValueError(f"it is {words}{remedy}")
        kept = tuple(map(reader, value))
        if distinct and len(set(kept)) < len(kept):
            raise ValueError(f"it is {words}, each once")
        return tuple(sorted(kept)) if isinstance(value, set | frozenset) else kept

    return read


def _name(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError(f"its entries are names, which {value!r} is not")
    return value


def name_regex(value: Any) -> str:
    """A name that is matched as a regular expression."""
    return regex(_name(value))


def optional(reader: Reader) -> Reader:
    """None, or what ``reader`` reads."""
    return lambda value: None if value is None else reader(value)


def default(value_of_none: Any, reader: Reader) -> Reader:
    """None for a default value, or what ``reader`` reads."""
    return lambda value: reader(value_of_none if value is None else value)


def _string_or(of_list: Reader, of_string: Reader) -> Reader:
    return lambda value: of_string(value) if isinstance(value, str) else of_list(value)


names = list_of(_name, "a list of names")
name_regexes = list_of(name_regex, "a list of names")
regex_or_regexes = _string_or(list_of(name_regex, "a name or a list of names"), regex)
_modules = list_of(_name, "a list of names, or a string with a regular expression")
modules = _string_or(_modules, path_regex)
modules_or_all = _string_or(_modules, path_regex_or_all)


def index_or_indices(value: Any) -> Any:
    """An index from 0 on, or a list of them."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        return list_of(integer(0), "an integer of at least 0, or a list of such")(value)
    return integer(0)(value)


def mapping(value: Any) -> dict[str, Any]:
    """A dict whose keys are strings."""
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise ValueError("it is a dict with strings as keys")
    return dict(value)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return list(map(_plain, value)) if isinstance(value, list | tuple) else value


def json_dict(value: Any) -> dict[str, Any]:
    """A dict of data, kept as JSON keeps it: a copy, with lists for tuples."""
    return _plain(mapping(value))


def dict_of(value_reader: Reader, key_reader: Reader = _name) -> Reader:
    """A dict by readers of its keys and values."""

    def read(value: Any) -> dict[str, Any]:
        kept = {}
        for key, item in mapping(value).items():
            try:
                kept[key_reader(key)] = value_reader(item)
            except ValueError as error:
                raise ValueError(f"at {key!r}, {error}") from error
        return kept

    return read


def tokens(value: Any) -> Any:
    """A list of token indices, or a dict from names of embeddings to such lists."""
    indices = list_of(integer(0), "a list of token indices, or a dict of such lists", distinct=True)
    return dict_of(indices)(value) if isinstance(value, Mapping) else indices(value)


def _range(value: Any) -> tuple[int, int]:
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise ValueError(f"its entries are pairs [start, end), which {value!r} is not")
    start, end = map(integer(0), value)
    if start >= end:
        raise ValueError(f"start lies before end, which it does not in {value!r}")
    return start, end


ranges = list_of(_range, "a list of pairs [start, end)")


def choice(options: Iterable[str]) -> Reader:
    """One of some strings, or members of an enumeration of strings."""
    by_name = {str(getattr(option, "value", option)): option for option in options}

    def read(value: Any) -> str:
        name = value.value if isinstance(value, enum.Enum) else value
        if not isinstance(name, str) or name not in by_name:
            raise ValueError(f"it is one of {list(by_name)}{closest(name, by_name)}")
        return by_name[name]

    return read


def only(default: Any, remedy: str = "") -> Reader:
    """The default value and no other: the option is not built."""

    def read(value: Any) -> Any:
        if type(value) is not type(default) or value != default:
            raise ValueError(f"it is not built here, and passes as {default!r} alone{remedy}")
        return value

    return read


def data(cls: Any) -> Reader:
    """A dataclass of plain data, or a dict of its fields; an empty dict stands for None."""
    fields = list(cls.__dataclass_fields__)

    def read(value: Any) -> Any:
        if value is None or isinstance(value, cls):
            return value
        if not isinstance(value, Mapping):
            raise ValueError(f"it is a {cls.__name__}, a dict of its fields, or None")
        unknown = [key for key in value if key not in fields]
        if unknown:
            raise ValueError(
                f"a {cls.__name__} has the fields {fields}, not {unknown[0]!r}"
                + closest(unknown[0], fields)
            )
        try:
            return cls(**value) if value else None
        except ValueError as error:
            raise ValueError(str(error).removesuffix(".")) from error

    return read


_INITIALISERS = ("gaussian", "orthogonal", "pissa", "olora", "loftq", "eva", "corda")


def initialiser(value: Any) -> bool | str:
    """True, False, or the name of an initialiser, with its number of iterations for PiSSA."""
    is_name = isinstance(value, str) and (
        value in _INITIALISERS or re.fullmatch(r"pissa_niter_[0-9]+", value) is not None
    )
    if not isinstance(value, bool) and not is_name:
        raise ValueError(
            f"it is True, False or one of {[*_INITIALISERS, 'pissa_niter_N']}"
            + closest(value, (*_INITIALISERS, "pissa_niter_16", "True", "False"))
        )
    return value


def _dotted(entries: Any) -> set[str]:
    listed = entries is not None and not isinstance(entries, str)
    return {entry.replace("/", ".") for entry in entries} if listed else set()


def _is_regex(config: Any) -> bool:
    return isinstance(config.target_modules, str) and config.target_modules != ALL_LINEAR


def _unused(initialiser: str) -> tuple[str, Callable[[Any], bool], str]:
    field = f"{initialiser}_config"
    return (
        field,
        lambda c: getattr(c, field) is not None and c.init_lora_weights != initialiser,
        f"goes with init_lora_weights='{initialiser}' alone; set that, or {field}=None",
    )


# The field that is named, whether it contradicts another, and how the error goes on.
CONTRADICTIONS: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    *(
        (
            field,
            lambda c, field=field: _is_regex(c) and getattr(c, field) is not None,
            "goes with a list of target_modules or 'all-linear'; where target_modules is a regular "
            "expression, write the layers into it",
        )
        for field in ("layers_to_transform", "layers_pattern")
    ),
    (
        "layers_pattern",
        lambda c: bool(c.layers_pattern) and c.layers_to_transform in (None, ()),
        "says where the index stands that layers_to_transform asks for; give that too",
    ),
    (
        "lora_bias",
        lambda c: c.lora_bias and c.use_dora,
        "does not go with use_dora; set one of them to False",
    ),
    (
        "lora_bias",
        lambda c: c.lora_bias and not isinstance(c.init_lora_weights, bool),
        "goes with init_lora_weights=True or False alone, as the others change the layer's weight "
        "and not its bias",
    ),
    (
        "loftq_config",
        lambda c: c.loftq_config is None and c.init_lora_weights == "loftq",
        "leaves open how init_lora_weights='loftq' quantizes; give a LoftQConfig()",
    ),
    *map(_unused, ("loftq", "eva", "corda")),
    (
        "r",
        lambda c: c.init_lora_weights == "orthogonal" and c.r % 2 == 1,
        "is odd, and init_lora_weights='orthogonal' gives one half of the rank to each factor; "
        "take an even rank",
    ),
    (
        "rank_pattern",
        lambda c: (
            c.init_lora_weights == "orthogonal" and any(r % 2 for r in c.rank_pattern.values())
        ),
        "has an odd rank, and init_lora_weights='orthogonal' gives one half of the rank to each "
        "factor; take even ranks",
    ),
    (
        "use_dora",
        lambda c: c.use_dora and bool(c.megatron_config),
        "does not go with megatron_config; leave that out, as it means nothing on JAX",
    ),
    (
        "target_parameters",
        lambda c: bool(c.target_parameters) and c.lora_dropout > 0,
        "goes without lora_dropout: a parameter has no input of its own to drop; set it to 0",
    ),
    (
        "target_parameters",
        lambda c: bool(c.target_parameters) and c.lora_bias,
        "goes without lora_bias: a parameter has no output of its own; set it to False",
    ),
    (
        "target_modules",
        lambda c: c.target_modules == () and not c.target_parameters,
        "names nothing to adapt, nor does target_parameters; name modules, or pass 'all-linear'",
    ),
    (
        "modules_to_save",
        lambda c: bool(_dotted(c.modules_to_save) & _dotted(c.target_modules)),
        "has an entry that stands in target_modules too; a module is adapted or trained whole",
    ),
    (
        "trainable_token_indices",
        lambda c: (
            isinstance(c.trainable_token_indices, dict)
            and bool(_dotted(c.modules_to_save) & _dotted(c.trainable_token_indices))
        ),
        "has an entry that stands in modules_to_save too, which trains all its rows; keep one",
    ),
)

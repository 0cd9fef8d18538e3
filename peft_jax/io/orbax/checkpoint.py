"""Checkpoints of orbax: a tree of parameters, and beside it its specs and its config."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from etils import epath
from jax.experimental import multihost_utils

from peft_jax._config import LoraConfig
from peft_jax._spec import LoraSpec
from peft_jax._trees import Path, check_specs, filled, leaves, nested, slashed
from peft_jax.io.orbax.target import check_like, dtypes_of, places_of
from peft_jax.io.orbax.trees import abstract, described

_FORMAT, _VERSION = "peft_jax", 1
_PARAMS, _STRUCTURE, _SPECS, _CONFIG = "params", "structure", "specs", "config"
_OF_ORBAX = frozenset({"descriptor"})


def save_orbax(
    path: str | os.PathLike[str],
    tree: Any,
    *,
    specs: Mapping[str, LoraSpec] | None = None,
    config: LoraConfig | None = None,
    force: bool = False,
) -> None:
    """Saves adapters, or a whole parameter tree, as an orbax checkpoint. Inverse: `restore_orbax`.

    The checkpoint is a directory of orbax's "composite" kind, committed as a whole, with the items
    ``params`` (the arrays, as nested dicts: orbax alone can read them too), ``structure`` (JSON:
    which containers the arrays lie in, which values are stored in few bits, which layers a
    `SharedStack` stands for), and, where they are given, ``specs`` and ``config`` (JSON).

    Arrays are saved in their dtypes and as they are spread over devices, a shared stack once. Boxes
    of partitioning (``nn.Partitioned``) are saved as what they hold. In a run of several processes
    each calls this with the same path, on storage that all of them see; each writes the shards
    that it holds.

    Args:
      path: of the directory, which must not exist.
      tree: nested dicts, FrozenDicts, lists and tuples of arrays; keys are strings.
      specs: from `lora_specs`, for every adapter in the tree.
      config: by which the model was adapted.
      force: whether a checkpoint at the path is replaced. The old one stays in place until the new
        one is complete; both are renamed then, and killed in between they are still beside it,
        as ``<name>.peft_jax_old`` and ``<name>.peft_jax_new``.

    Raises:
      ValueError: where the path is taken, the tree holds no arrays or something that is no array,
        specs and adapters do not fit, or the config is no JSON. Nothing is written then.
    """
    target = _location(path)
    items = _items(tree, specs, config)
    flat = dict(leaves(tree))
    _check_names(tree, flat)
    _check_free(target, force)
    arrays = nested(flat)
    if not target.exists():
        _write(target, arrays, items, force=False)
        return
    fresh = target.with_name(f"{target.name}.peft_jax_new")
    _write(fresh, arrays, items, force=True)
    if jax.process_index() == 0:
        old = target.with_name(f"{target.name}.peft_jax_old")
        if old.exists():
            old.rmtree()
        target.rename(old)
        fresh.rename(target)
        old.rmtree()
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("peft_jax.save_orbax")


def restore_orbax(
    path: str | os.PathLike[str],
    *,
    like: Any = None,
    shardings: Any = None,
    dtype: Any = None,
) -> tuple[Any, dict[str, LoraSpec] | None, LoraConfig | None]:
    """Reads what `save_orbax` wrote, onto any devices.

    Without ``like`` the tree has the containers that it was saved from (named tuples are tuples),
    `StoredValues` and `SharedStack` included, and no other boxes.

    Args:
      path: of the checkpoint.
      like: a tree of the same structure, whose leaves have a shape and a dtype (arrays, or what
        ``jax.eval_shape`` makes): its containers and boxes, and the shardings of its leaves where
        they have some, are those of the result.
      shardings: a ``jax.sharding.Sharding`` for all arrays; or a tree of them, in which one may
        stand for everything below its place. It goes before that of ``like``. Without either,
        arrays come to the default device; in a run of several processes, to that of each.
      dtype: a floating dtype for all floating arrays, but the scales of stored values. None: that
        in which each was saved.

    Returns:
      ``(tree, specs, config)``; the latter two are None where none were saved. Arrays are
      ``jax.Array``, those that were numpy's too.

    Raises:
      ValueError: where there is no such checkpoint, an item is missing, damaged, or not from
        `save_orbax`; where ``like`` lacks arrays, has others, or has them in another shape or
        dtype; or where a sharding does not fit. Nothing is restored then.
    """
    source = _location(path)
    structure, specs, config = _read_items(source)
    target = structure if like is None else like
    saved = dict(leaves(structure))
    wanted = dtypes_of(structure, saved, dtype)
    if like is not None:
        check_like(str(source), structure, saved, like, wanted)
    places = places_of(str(source), saved, dict(leaves(target)), shardings)
    structs = {
        place: jax.ShapeDtypeStruct(leaf.shape, wanted[place], sharding=places[place])
        for place, leaf in saved.items()
    }
    with _reading(source, _PARAMS):
        arrays = dict(leaves(_read(source, _PARAMS, nested(structs))))
    for place, array in arrays.items():
        if array.dtype != wanted[place]:
            raise ValueError(
                f"restore_orbax: '{slashed(place)}' is of {wanted[place]}, and would come back as "
                f"{array.dtype}. Enable 64 bits (`jax_enable_x64`), or give `dtype=`."
            )
    return filled(target, arrays), specs, config


def _location(path: str | os.PathLike[str]) -> epath.Path:
    if not isinstance(path, str | os.PathLike):
        raise ValueError(f"A checkpoint has a path, got {path!r:.200}.")
    is_remote = "://" in os.fspath(path)
    return epath.Path(path) if is_remote else epath.Path(os.path.realpath(path))


# --- Saving --------------------------------------------------------------------------------------


def _items(
    tree: Any, specs: Mapping[str, LoraSpec] | None, config: LoraConfig | None
) -> dict[str, Any]:
    """What is saved as JSON, by the names of items."""
    if config is not None and not isinstance(config, LoraConfig):
        raise ValueError(
            f"save_orbax: config is a LoraConfig, got {type(config).__name__}. Read plain data by "
            "`peft.LoraConfig.from_dict`."
        )
    check_specs(tree, specs, "save_orbax")
    items: dict[str, Any] = {}
    if specs is not None:
        items[_SPECS] = {name: spec.to_dict() for name, spec in specs.items()}
    if config is not None:
        items[_CONFIG] = config.to_dict()
    items[_STRUCTURE] = {
        "format": _FORMAT,
        "version": _VERSION,
        "items": sorted(items),
        "tree": described(tree),
    }
    try:
        json.dumps(items, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            "save_orbax: LoraConfig.auto_mapping and LoraConfig.megatron_config hold dicts, lists, "
            f"strings, finite numbers, booleans and None where they are saved: {error}."
        ) from error
    return items


def _check_names(tree: Any, flat: Mapping[Path, Any]) -> None:
    if not flat or () in flat:
        raise ValueError(
            f"save_orbax: a {type(tree).__name__} without arrays in it is nothing to save. Give "
            "parameters, or the adapters that `peft.split_params` returns."
        )
    joined: dict[str, Path] = {}
    for path in flat:
        twin = joined.setdefault(".".join(path), path)
        if twin != path:
            raise ValueError(
                f"save_orbax: '{slashed(path)}' and '{slashed(twin)}' would be one array in a "
                "checkpoint of orbax's, which joins keys by dots. Rename one of them."
            )


def _check_free(target: epath.Path, force: bool) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise ValueError(f"save_orbax: {str(target)!r} is a file. Give another path.")
    if not force:
        raise ValueError(
            f"save_orbax: {str(target)!r} exists already. Give another path, or force=True to "
            "replace the checkpoint there."
        )
    if not (target / _STRUCTURE).is_dir() and any(target.iterdir()):
        raise ValueError(
            f"save_orbax: {str(target)!r} holds something else than a checkpoint of save_orbax, "
            "which is not deleted. Give another path."
        )


def _write(target: epath.Path, arrays: Any, items: Mapping[str, Any], *, force: bool) -> None:
    import orbax.checkpoint as ocp  # here, since it takes as long to import as jax and flax do

    arguments = {name: ocp.args.JsonSave(data) for name, data in items.items()}
    arguments[_PARAMS] = ocp.args.StandardSave(arrays)
    there = _partial(target)
    try:
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
            checkpointer.save(target, ocp.args.Composite(**arguments), force=force)
    except BaseException:
        if jax.process_index() == 0:
            for partial in _partial(target) - there:
                partial.rmtree()
        raise


def _partial(target: epath.Path) -> set[epath.Path]:
    """Directories in which orbax has begun to write the target."""
    beside = target.parent.iterdir() if target.parent.is_dir() else ()
    return {file for file in beside if file.name.startswith(f"{target.name}.orbax-checkpoint-tmp")}


# --- Restoring -----------------------------------------------------------------------------------


@contextlib.contextmanager
def _reading(source: epath.Path, item: str) -> Iterator[None]:
    """Turns whatever goes wrong on damaged files into one error."""
    try:
        yield
    except Exception as error:
        raise ValueError(
            f"restore_orbax: the item {item!r} of the checkpoint {str(source)!r} is damaged, or "
            f"not from save_orbax: {error} Restore another checkpoint."
        ) from error


def _read_items(
    source: epath.Path,
) -> tuple[Any, dict[str, LoraSpec] | None, LoraConfig | None]:
    there = {file.name for file in source.iterdir() if file.is_dir()} if source.is_dir() else set()
    if not {_PARAMS, _STRUCTURE} <= there:
        raise ValueError(
            f"restore_orbax: {str(source)!r} is no checkpoint of save_orbax: there are no items "
            f"{sorted({_PARAMS, _STRUCTURE} - there)}. Give the path that was given to save_orbax; "
            "other checkpoints of orbax's are read by orbax itself."
        )
    with _reading(source, _STRUCTURE):
        data = _read(source, _STRUCTURE)
        if set(data) != {"format", "version", "items", "tree"} or data["format"] != _FORMAT:
            raise ValueError(f"it holds {sorted(data)}.")
        if data["version"] != _VERSION:
            raise ValueError(f"it is of version {data['version']!r}, known is {_VERSION}.")
        items = set(data["items"])
        if not items <= {_SPECS, _CONFIG}:
            raise ValueError(f"it names the items {sorted(items)}.")
        structure = abstract(data["tree"])
    known = items | {_PARAMS, _STRUCTURE}
    missing, foreign = sorted(known - there), sorted(there - known - _OF_ORBAX)
    if missing or foreign:
        raise ValueError(
            f"restore_orbax: the checkpoint {str(source)!r} lacks the items {missing} and holds "
            f"{foreign}, which save_orbax did not write. Restore it as it was saved."
        )
    specs = config = None
    if _SPECS in items:
        with _reading(source, _SPECS):
            read = _read(source, _SPECS)
            specs = {name: LoraSpec.from_dict(spec) for name, spec in read.items()}
            check_specs(structure, specs, "restore_orbax")
    if _CONFIG in items:
        with _reading(source, _CONFIG):
            config = LoraConfig.from_dict(_read(source, _CONFIG))
    return structure, specs, config


def _read(source: epath.Path, item: str, structs: Any = None) -> Any:
    """One item: arrays as ``structs`` has them, or else JSON."""
    import orbax.checkpoint as ocp

    arguments = ocp.args.JsonRestore() if structs is None else ocp.args.StandardRestore(structs)
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        return checkpointer.restore(source, ocp.args.Composite(**{item: arguments}))[item]

"""`peft-jax convert`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import jax

from peft_jax.cli._merge import tree_streams
from peft_jax.cli._report import would_write
from peft_jax.cli._screen import readable, say, warn
from peft_jax.io import export_gguf_adapter, save_adapter, save_orbax
from peft_jax.io.any_adapter import Loaded, load, tensor_names
from peft_jax.io.files.atomic import check_output, new_output
from peft_jax.io.files.formats import GGUF, HUGGINGFACE, ORBAX

_ARCHITECTURE = "peft_jax"


def run(options: argparse.Namespace) -> int:
    """Writes an adapter in another format."""
    check_output(options.output, [options.input], options.force)
    renames = None if options.renames is None else _read_renames(options.renames)
    heads = _heads(options.permute_heads)
    to_gguf = options.to == GGUF
    if options.architecture is not None and not to_gguf:
        raise ValueError("--architecture goes with --to gguf.")
    loaded = load(options.input, None if to_gguf else heads)
    if options.dry_run:
        would_write(options.output, tree_streams(loaded.lora))
        return 0
    with new_output(options.output) as place:
        _WRITERS[options.to](place, loaded, renames, options)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(loaded.lora))
    say(f"wrote {options.output}: {len(loaded.specs)} adapted layers, {readable(size)}")
    return 0


def _read_renames(path: Path) -> dict[str, str]:
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"--renames {str(path)!r} is no file of JSON: {error}.") from error
    if not isinstance(table, dict) or not all(isinstance(name, str) for name in table.values()):
        raise ValueError(
            f"--renames {str(path)!r} is no object of strings, such as "
            '{"layers_{}": "model.layers.{}"}.'
        )
    return table


def _heads(counts: list[int] | None) -> dict[str, int] | None:
    if counts is None:
        return None
    return {"blk.*.attn_q.weight": counts[0], "blk.*.attn_k.weight": counts[1]}


def _to_huggingface(
    place: Path, loaded: Loaded, renames: Mapping[str, str] | None, _: argparse.Namespace
) -> None:
    save_adapter(
        place,
        loaded.lora,
        config=loaded.config,
        specs=loaded.specs,
        renames=loaded.renames if renames is None else renames,
    )


def _to_orbax(
    place: Path, loaded: Loaded, renames: Mapping[str, str] | None, _: argparse.Namespace
) -> None:
    if renames is not None:
        raise ValueError("orbax keeps the paths of the tree: --renames has no meaning there.")
    save_orbax(place, loaded.lora, specs=loaded.specs, config=loaded.config)


def _to_gguf(
    place: Path,
    loaded: Loaded,
    renames: Mapping[str, str] | None,
    options: argparse.Namespace,
) -> None:
    if options.architecture is None:
        warn("convert", "tensors keep the model's own names; for llama.cpp give --architecture")
    names, table = tensor_names(
        loaded.renames if renames is None else renames, options.architecture
    )
    export_gguf_adapter(
        loaded.lora,
        place,
        specs=loaded.specs,
        names=names,
        architecture=options.architecture or _ARCHITECTURE,
        permute_heads=_heads_used(loaded, names, _heads(options.permute_heads)),
    )
    table.check_used()


def _heads_used(
    loaded: Loaded, names: Callable[[str], str], heads: Mapping[str, int] | None
) -> dict[str, int] | None:
    """The patterns of `--permute-heads` that an adapter has tensors for: it may lack some."""
    paths = [f"{path.rpartition('/')[0]}/{spec.param}" for path, spec in loaded.specs.items()]
    ends = {names(path).rpartition(".weight")[0].rpartition(".")[2] for path in paths}
    if heads is None:
        if ends & {"attn_q", "attn_k"}:
            warn(
                "convert",
                "rows of attn_q and attn_k stay in order; if the base's GGUF file was converted "
                "from Hugging Face's Llama, pass --permute-heads",
            )
        return None
    used = {pattern: n for pattern, n in heads.items() if pattern.split(".")[2] in ends}
    if not used:
        raise ValueError("--permute-heads is about attn_q and attn_k, which the adapter lacks.")
    return used


_WRITERS = {HUGGINGFACE: _to_huggingface, ORBAX: _to_orbax, GGUF: _to_gguf}

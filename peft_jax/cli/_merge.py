"""`peft-jax merge`."""

from __future__ import annotations

import argparse
from typing import Any

import jax
import numpy as np

from peft_jax._trees import adapter_paths, at
from peft_jax.adapters import COMBINATIONS, add_weighted_adapter
from peft_jax.cli._report import would_write
from peft_jax.cli._screen import readable, say
from peft_jax.io import save_adapter
from peft_jax.io.any_adapter import config_for, load, with_base
from peft_jax.io.files.atomic import check_output, new_output
from peft_jax.io.files.safetensors import TensorStream


def run(options: argparse.Namespace) -> int:
    """Makes one adapter of several."""
    if len(options.weights) != len(options.adapters):
        raise ValueError(
            f"There are {len(options.adapters)} adapters and {len(options.weights)} weights. Give "
            "one for each."
        )
    if options.type not in COMBINATIONS:
        raise ValueError(f"--type {options.type!r} is none of {', '.join(COMBINATIONS)}.")
    check_output(options.output, options.adapters, options.force)
    loaded = [load(path) for path in options.adapters]
    tables = [one.renames for one in loaded]
    if any(table != tables[0] for table in tables):
        raise ValueError(
            "The adapters were saved under different renames, and are of one model nevertheless? "
            f"Save them alike: {tables}."
        )
    lora, specs = add_weighted_adapter(
        [one.lora for one in loaded],
        options.weights,
        specs=[one.specs for one in loaded],
        combination_type=options.type,
        svd_rank=options.rank,
        density=options.density,
        majority_sign_method=options.majority_sign,
        key=jax.random.key(options.seed),
    )
    if options.dry_run:
        would_write(options.output, tree_streams(lora))
        return 0
    config = with_base(config_for(specs), loaded[0].config)
    with new_output(options.output) as place:
        save_adapter(place, lora, config=config, specs=specs, renames=tables[0] or None)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(lora))
    say(f"wrote {options.output}: {len(specs)} layers of {len(loaded)} adapters, {readable(size)}")
    return 0


def tree_streams(lora: Any) -> dict[str, TensorStream]:
    """The arrays of the adapters of a tree, by their slashed paths, to be listed."""
    return {
        f"{path}/{name}": TensorStream(np.dtype(array.dtype), array.shape, tuple)
        for path in adapter_paths(lora)
        for name, array in at(lora, path).items()
    }

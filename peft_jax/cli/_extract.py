"""`peft-jax extract`."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from peft_jax._config import LoraConfig, matches
from peft_jax._numerics import approximated, norm
from peft_jax.cli._quantize import some
from peft_jax.cli._report import announced, factor_names, would_write, write_adapter
from peft_jax.cli._screen import Progress, print_table, warn
from peft_jax.io.checkpoints.fuse import WEIGHTS, Layers
from peft_jax.io.checkpoints.open import open_checkpoint
from peft_jax.io.checkpoints.read import Checkpoint, check_torch_layout, paired_chunks
from peft_jax.io.files.atomic import check_output
from peft_jax.io.files.formats import Array, is_embedding


class _Target(NamedTuple):
    """A matrix that differs.

    Attributes:
      module: its dotted name.
      tensor: the name of its weight.
      turned: whether the weight is ``(in, out)``.
      is_embedding: whether it is a table of embeddings.
    """

    module: str
    tensor: str
    turned: bool
    is_embedding: bool


def run(options: argparse.Namespace) -> int:
    """Makes an adapter of the difference of two checkpoints."""
    inputs = [options.base, options.tuned]
    check_output(options.output, inputs, options.force)
    with open_checkpoint(options.base) as base, open_checkpoint(options.tuned) as tuned:
        _check_alike(base, tuned)
        matrices = _matrices(base, options.fan_in_fan_out)
        chosen = _chosen(matrices, options.target_modules)
        differing = _differing(base, tuned)
        targets = [target for target in chosen if target.tensor in differing]
        left = sorted(differing - {target.tensor for target in targets})
        if not targets:
            raise ValueError(
                f"No matrix of {str(options.base)!r} differs from that of {str(options.tuned)!r}"
                f"{' in these modules' if options.target_modules else ''}: there is nothing to "
                "extract."
            )
        ranks = {t.module: min(options.rank, *base.shape(t.tensor)) for t in targets}
        if options.dry_run:
            would_write(options.output, announced(_shapes(base, targets, ranks)))
            _tell(left)
            return 0
        tensors, rows = _factors(base, tuned, targets, ranks, options)
    config = _config(targets, ranks, matrices, options)
    write_adapter(options.output, tensors, config, inputs, options)
    print_table(("module", "rank", "norm of the difference", "kept"), rows, ("rank", "kept"))
    _tell(left)
    return 0


def _tell(left: Sequence[str]) -> None:
    """Names the tensors that differ and that the adapter does not change."""
    if left:
        warn("extract", f"{len(left)} tensors differ and are not in the adapter: {some(left)}")


def _check_alike(base: Checkpoint, tuned: Checkpoint) -> None:
    if set(base.names) != set(tuned.names):
        only = [sorted(set(a.names) - set(b.names))[:3] for a, b in ((base, tuned), (tuned, base))]
        raise ValueError(
            f"The checkpoints hold different tensors: {only[0]} are in the first alone, {only[1]} "
            "in the second."
        )
    for name in base.names:
        if base.shape(name) != tuned.shape(name):
            raise ValueError(
                f"{name!r} has shape {base.shape(name)} in one checkpoint and "
                f"{tuned.shape(name)} in the other."
            )


def _matrices(base: Checkpoint, fan_in_fan_out: bool) -> list[_Target]:
    targets = []
    for module, tensors in Layers.of(base).tensors.items():
        for leaf in WEIGHTS:
            if leaf in tensors and len(base.shape(tensors[leaf])) == 2:
                named = leaf == "weight" and is_embedding(module.split("."))
                is_table = leaf == "embedding" or named
                turned = leaf != "weight" or is_table or fan_in_fan_out
                if not turned:
                    check_torch_layout(base, tensors[leaf], "--fan-in-fan-out")
                targets.append(_Target(module, tensors[leaf], turned, is_table))
    return targets


def _chosen(matrices: Sequence[_Target], names: Sequence[str] | None) -> list[_Target]:
    if not names:
        return list(matrices)
    listed = [target for target in matrices if matches(names, target.module)]
    unused = [
        name for name in names if not any(matches([name], target.module) for target in matrices)
    ]
    if not unused:
        return listed
    if len(names) == 1:
        try:
            found = [target for target in matrices if matches(names[0], target.module)]
        except re.error as error:
            raise ValueError(f"--target-modules {names[0]!r}: {error}.") from error
        if found:
            return found
    raise ValueError(
        f"--target-modules {unused}: no module with a matrix is called so. There are "
        f"{some([target.module for target in matrices])}."
    )


def _differing(base: Checkpoint, tuned: Checkpoint) -> set[str]:
    """The tensors whose numbers are not the same."""
    found = set()
    with Progress("extract: compare", base.total_bytes) as progress:
        for name in base.names:
            if any(not np.array_equal(*pair) for pair in paired_chunks(base, tuned, name)):
                found.add(name)
            progress.update(base.nbytes(name))
    return found


def _shapes(
    base: Checkpoint, targets: Iterable[_Target], ranks: Mapping[str, int]
) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for target in targets:
        outputs, inputs = _turned(base.shape(target.tensor), target)
        a, b = factor_names(target.module, target.is_embedding)
        shapes |= {a: (ranks[target.module], inputs), b: (outputs, ranks[target.module])}
    return shapes


def _turned(shape: tuple[int, ...], target: _Target) -> tuple[int, ...]:
    return shape[::-1] if target.turned else shape


def _factors(
    base: Checkpoint,
    tuned: Checkpoint,
    targets: Sequence[_Target],
    ranks: Mapping[str, int],
    options: argparse.Namespace,
) -> tuple[dict[str, Array], list[list[str]]]:
    tensors: dict[str, Array] = {}
    rows = []
    total = sum(base.nbytes(target.tensor) for target in targets)
    with Progress("extract: decompose", total) as progress:
        for place, target in enumerate(targets):
            difference = _difference(base, tuned, target.tensor)
            seed = options.seed + place if options.svd == "randomized" else None
            matrix = difference.T if target.turned else difference
            left, right, kept = approximated(matrix, ranks[target.module], seed)
            a, b = factor_names(target.module, target.is_embedding)
            tensors |= {a: right, b: left}
            size = norm(difference)
            rows.append([target.module, str(len(right)), f"{size:.4g}", f"{100 * kept:.2f}%"])
            progress.update(base.nbytes(target.tensor))
    return tensors, rows


def _difference(base: Checkpoint, tuned: Checkpoint, name: str) -> Array:
    old, new = base.read(name), tuned.read(name)
    dtype = np.float64 if np.float64 in (old.dtype, new.dtype) else np.float32
    difference = np.subtract(new, old, dtype=dtype, casting="unsafe")
    if not np.all(np.isfinite(difference)):
        raise ValueError(f"{name!r} holds NaN or infinity, which has no decomposition.")
    return difference


def _config(
    targets: Sequence[_Target],
    ranks: Mapping[str, int],
    matrices: Sequence[_Target],
    options: argparse.Namespace,
) -> LoraConfig:
    """A scaling of one everywhere: alpha is the rank."""
    largest = max(ranks.values())
    smaller: dict[str, Any] = {
        f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank != largest
    }
    names = {target.module for target in targets}
    ends = {name.rpartition(".")[2] for name in names}
    by_end = {t.module for t in matrices if t.module.rpartition(".")[2] in ends}
    return LoraConfig(
        r=largest,
        lora_alpha=largest,
        fan_in_fan_out=options.fan_in_fan_out,
        target_modules=sorted(ends if by_end == names else names),
        rank_pattern=smaller,
        alpha_pattern=dict(smaller),
        base_model_name_or_path=str(options.base),
        inference_mode=True,
    )

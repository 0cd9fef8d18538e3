"""`peft-jax quantize`."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence

from peft_jax._numerics import QuantizationMethod
from peft_jax._trees import with_stored
from peft_jax.cli._report import write_checkpoint
from peft_jax.cli._screen import warn
from peft_jax.io.checkpoints.open import open_checkpoint
from peft_jax.io.checkpoints.quantize import Encoding
from peft_jax.io.checkpoints.read import Checkpoint, check_torch_layout, flattened, nested
from peft_jax.io.checkpoints.write import NewCheckpoint
from peft_jax.io.files.formats import is_embedding
from peft_jax.io.files.safetensors import TensorStream

_STORED = re.compile(r"(q4_0|q4_0_transpose|int4|int8|nf4|sfp8)(_axis-?\d+_len\d+)?")


def run(options: argparse.Namespace) -> int:
    """Stores the weights of a checkpoint in few bits."""
    method = QuantizationMethod(options.method)
    with open_checkpoint(options.input) as source:
        names = chosen(source, _pattern(options.include), _pattern(options.exclude))
        encodings = {
            name: Encoding.of(
                source, name, method, inputs_last=is_torch(source, name, options.layout)
            )
            for name in names
        }
        tensors, origins = stored(source, encodings)
        new = NewCheckpoint(source, tensors, origins)
        write_checkpoint(new, options.output, options.format, [options.input], options)
        left = [n for n in source.names if n not in encodings and len(source.shape(n)) >= 2]
        if left:
            warn("quantize", f"{len(left)} of two or more axes stay as they are: {some(left)}")
    return 0


def _pattern(text: str | None) -> re.Pattern[str] | None:
    try:
        return None if text is None else re.compile(text)
    except re.error as error:
        raise ValueError(f"{text!r} is no regular expression: {error}.") from error


def chosen(
    source: Checkpoint, include: re.Pattern[str] | None, exclude: re.Pattern[str] | None
) -> list[str]:
    """Names of the weights that are stored in few bits."""
    already = [name for name in source.names if _STORED.fullmatch(source.path_of(name)[-1])]
    if already:
        raise ValueError(
            f"{str(source.path)!r} holds values that are stored in few bits already: "
            f"{some(already)}. Take the checkpoint that they were made from."
        )
    matrices = [n for n in source.names if len(source.shape(n)) >= 2]
    if include is not None:
        names = [name for name in matrices if include.search(name)]
    else:
        names = [name for name in matrices if _is_weight(source, name)]
    if exclude is not None:
        if not any(map(exclude.search, source.names)):
            raise ValueError(f"--exclude {exclude.pattern!r} matches no name: {some(matrices)}.")
        names = [name for name in names if not exclude.search(name)]
    if not names:
        raise ValueError(
            f"There is nothing to quantize in {str(source.path)!r}. Choose by --include among "
            f"{some(matrices)}."
        )
    return names


def _is_weight(source: Checkpoint, name: str) -> bool:
    *path, last = source.path_of(name)
    return last == "kernel" or (
        last == "weight" and len(source.shape(name)) == 2 and not is_embedding(path)
    )


def is_torch(source: Checkpoint, name: str, layout: str) -> bool:
    """Whether a weight is ``(out, in)``."""
    if layout != "auto":
        return layout == "torch"
    is_weight = source.path_of(name)[-1] == "weight"
    if is_weight:
        check_torch_layout(source, name, "--layout flax, or leave it out by --exclude")
    return is_weight


def stored(
    source: Checkpoint, encodings: Mapping[str, Encoding]
) -> tuple[dict[str, TensorStream], dict[str, str]]:
    """The tensors of the new checkpoint, and the old one of each, named as the library does it."""
    path_of = {name: source.path_of(name) for name in source.names}
    tree = nested({path: name for name, path in path_of.items()})
    places = {
        path_of[name]: ({str(encoding.layout): (name, encoding.values)}, (name, encoding.scale))
        for name, encoding in encodings.items()
    }
    tensors: dict[str, TensorStream] = {}
    origins: dict[str, str] = {}
    for path, leaf in flattened(with_stored(tree, places)):
        name, stream = leaf if isinstance(leaf, tuple) else (leaf, source.stream(leaf))
        new = source.separator.join(path)
        tensors[new], origins[new] = stream, name
    return tensors, origins


def some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")

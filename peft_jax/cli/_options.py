"""The table of commands: what each is called, what it takes, and examples. No jax."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Command:
    """One command; the module of its name, with an underscore in front, has its `run`.

    Attributes:
      name: on the command line.
      summary: one line.
      details: what its help says beyond that.
      examples: arguments, without the name of the program and of the command.
      arguments: adds its arguments to a parser.
    """

    name: str
    summary: str
    details: str
    examples: Sequence[str]
    arguments: Callable[[argparse.ArgumentParser], None]


_CHECKPOINTS = """\
A checkpoint is a safetensors file, a directory with one such file or with shards and their
model.safetensors.index.json, or a directory of orbax."""

_OUTPUT = """\
OUTPUT is written beside its place and moved there when it is complete. A name that ends in
.safetensors is one file; any other is a directory like the input's: shards stay shards, and small
files beside them (config.json, the tokenizer) are copied."""


def _writes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--force", action="store_true", help="replace OUTPUT if it is there")
    parser.add_argument(
        "--dry-run", action="store_true", help="say what would be written, and write nothing"
    )


def _format(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--format",
        choices=("safetensors", "orbax"),
        help="of OUTPUT; without it, that of the input",
    )


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a positive integer, got {text!r}")
    return int(text)


def _inspect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", type=Path, metavar="PATH", help="a checkpoint or an adapter")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument(
        "--plot", type=Path, metavar="FILE.png", help="draw norms and spectra of each layer"
    )
    parser.add_argument("--force", action="store_true", help="replace FILE.png if it is there")


def _fuse(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("base", type=Path, metavar="BASE", help="a checkpoint")
    parser.add_argument("adapter", type=Path, metavar="ADAPTER", help="an adapter")
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="the fused checkpoint")
    _format(parser)
    _writes(parser)


def _extract(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("base", type=Path, metavar="BASE", help="a checkpoint")
    parser.add_argument("tuned", type=Path, metavar="TUNED", help="the same, fine-tuned")
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="directory of the adapter")
    parser.add_argument(
        "--rank", type=_positive, required=True, metavar="R", help="rank of the adapter"
    )
    parser.add_argument(
        "--target-modules",
        nargs="+",
        metavar="NAME",
        help="modules that are adapted: names, ends of dotted names, or one regular expression; "
        "without it, all with a matrix that differs",
    )
    parser.add_argument(
        "--fan-in-fan-out",
        action="store_true",
        help="a `weight` is (in, out), as in GPT-2's Conv1D, rather than (out, in)",
    )
    parser.add_argument(
        "--svd",
        choices=("exact", "randomized"),
        default="exact",
        help="randomized is faster for large matrices and small ranks (default: exact)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the randomized decomposition")
    _writes(parser)


def _quantize(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("input", type=Path, metavar="INPUT", help="a checkpoint")
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="the quantized checkpoint")
    parser.add_argument(
        "--method",
        required=True,
        choices=("q4_0", "q4_0_transpose", "int4", "int8", "nf4", "sfp8"),
        help="how weights are stored",
    )
    parser.add_argument(
        "--include",
        metavar="REGEX",
        help="take the weights of two axes in whose name it is found, whatever they are called",
    )
    parser.add_argument(
        "--exclude", metavar="REGEX", help="leave out the weights in whose name it is found"
    )
    parser.add_argument(
        "--layout",
        choices=("auto", "flax", "torch"),
        default="auto",
        help="whether matrices are (in, out) or (out, in) (default: auto, by their names)",
    )
    _format(parser)
    _writes(parser)


def _merge(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapters", type=Path, nargs="+", metavar="ADAPTER", help="adapters")
    parser.add_argument(
        "--weights", type=float, nargs="+", metavar="W", required=True, help="one for each adapter"
    )
    parser.add_argument(
        "--type",
        default="svd",
        metavar="TYPE",
        help="of the combination: svd, linear, cat, ties, dare_linear, dare_ties, "
        "magnitude_prune, and ties_svd, dare_linear_svd, dare_ties_svd, magnitude_prune_svd "
        "(default: svd)",
    )
    parser.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="directory of the merged adapter"
    )
    parser.add_argument(
        "--rank", type=_positive, metavar="R", help="of combinations by SVD (default: the largest)"
    )
    parser.add_argument(
        "--density", type=float, metavar="D", help="the part of values that is kept, of ties, dare"
    )
    parser.add_argument(
        "--majority-sign", choices=("total", "frequency"), default="total", help="of ties"
    )
    parser.add_argument("--seed", type=int, default=0, help="of what dare drops")
    _writes(parser)


def _convert(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("input", type=Path, metavar="INPUT", help="an adapter")
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="where it is written")
    parser.add_argument("--to", required=True, choices=("huggingface", "orbax", "gguf"))
    parser.add_argument(
        "--renames",
        type=Path,
        metavar="FILE.json",
        help="a JSON object: parts of paths here, and of the dotted names in the file",
    )
    parser.add_argument(
        "--architecture",
        metavar="NAME",
        help="of GGUF: that of the base model, such as llama; Hugging Face's names of modules "
        "become llama.cpp's",
    )
    parser.add_argument(
        "--permute-heads",
        type=_positive,
        nargs=2,
        metavar=("Q", "KV"),
        help="of GGUF: numbers of heads, where the base's attn_q and attn_k were reordered, as "
        "llama.cpp's converter does for Llama",
    )
    _writes(parser)


def _diff(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("a", type=Path, metavar="A", help="a checkpoint or an adapter")
    parser.add_argument("b", type=Path, metavar="B", help="another of the same kind")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument(
        "--tolerance",
        type=float,
        default=0.0,
        metavar="T",
        help="relative differences up to T count as none (default: 0)",
    )


COMMANDS = (
    Command(
        "inspect",
        "shows the layers of a checkpoint or an adapter",
        f"{_CHECKPOINTS}\nAn adapter is a directory of Hugging Face's layout, of orbax, or a GGUF "
        "file.",
        ("model.safetensors", "adapter/ --json", "adapter/ --plot spectra.png"),
        _inspect,
    ),
    Command(
        "fuse",
        "adds an adapter to the weights of a checkpoint",
        f"{_CHECKPOINTS}\nWeights are `....weight`, (out, in), or `.../kernel`, (in, out). Sums "
        f"are taken in float32 and rounded once.\n\n{_OUTPUT}",
        ("model/ adapter/ fused/", "base.safetensors adapter/ fused.safetensors --dry-run"),
        _fuse,
    ),
    Command(
        "extract",
        "makes an adapter of the difference of two checkpoints",
        f"{_CHECKPOINTS}\nThe adapter is the best of its rank for each matrix (SVD), in Hugging "
        "Face's layout, and\nit says how much of each difference it keeps.",
        (
            "base/ tuned/ adapter/ --rank 16",
            "base/ tuned/ adapter/ --rank 8 --target-modules q_proj v_proj --svd randomized",
        ),
        _extract,
    ),
    Command(
        "quantize",
        "stores the weights of a checkpoint in few bits",
        f"""{_CHECKPOINTS}

Without --include, every `kernel` of Flax is taken, and every `weight` of two axes of torch but
those of modules named as embeddings are (emb, embed..., ..._embed..., wte, wpe, shared): norms,
biases and embeddings stay. A weight W becomes W/<method and packing>, with its scale beside it, as
`peft.quantize_checkpoint` names them: read as nested dicts, the file is a tree for `Int4Dense`.

Layout. A `kernel` is (in, out): q4_0 has blocks of 32 along its last axis, q4_0_transpose and nf4
along the inputs, the others one scale for each output. A `weight` is taken for torch's (out, in)
and stays so: blocks and scales always run along its inputs, the last axis. So both q4_0 and
q4_0_transpose make the blocks that llama.cpp reads, and are stored as q4_0. --layout says so of
all weights, whatever their names: GPT-2's Conv1D, for one, is (in, out).

{_OUTPUT}""",
        (
            "model/ small/ --method q4_0",
            "params.safetensors small.safetensors --method int4 --exclude lm_head",
            "checkpoint/ small/ --method nf4 --include 'attn|mlp' --format orbax",
        ),
        _quantize,
    ),
    Command(
        "merge",
        "makes one adapter of several, weighted",
        "As `peft.add_weighted_adapter`; the adapters are of one model.",
        (
            "english/ french/ --weights 0.7 0.3 --output both/",
            "a/ b/ --weights 1 1 --type ties --density 0.5 --output merged/",
        ),
        _merge,
    ),
    Command(
        "convert",
        "writes an adapter in another format",
        """\
The format of INPUT is found out: Hugging Face's directory, orbax or GGUF.

--renames has parts of paths on the left, with slashes, and on the right what stands for them in
dotted names, as in `peft.save_adapter`: {"layers_{}": "model.layers.{}"}.
Those that an adapter was saved with are kept. For llama.cpp give --architecture, and also
--permute-heads if the GGUF file of the base was converted from Hugging Face's Llama.""",
        (
            "adapter/ adapter.gguf --to gguf --architecture llama --permute-heads 32 8",
            "adapter/ checkpoint/ --to orbax",
            "checkpoint/ adapter/ --to huggingface --renames names.json",
        ),
        _convert,
    ),
    Command(
        "diff",
        "compares two adapters or two checkpoints",
        f"{_CHECKPOINTS}\nAdapters are compared by what they add to weights: norms, relative "
        "difference, cosine.\nThe exit status is 0 if they are equal, 1 if they differ, 2 on "
        "errors.",
        ("base/ tuned/", "adapter/ other/ --json", "a.safetensors b.safetensors --tolerance 1e-6"),
        _diff,
    ),
)

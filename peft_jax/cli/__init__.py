"""The command line: checkpoints and adapters on disk, tensor by tensor.

    peft-jax --help

A command reads and writes one tensor after another, so that a checkpoint may be larger than memory.
Nothing of JAX is imported before a command runs.
"""

from peft_jax.cli._main import main
from peft_jax.cli._options import COMMANDS

__all__ = ["COMMANDS", "main"]

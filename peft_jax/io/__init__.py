"""Files of other formats."""

from peft_jax.io._gguf import export_gguf

__all__ = ["export_gguf"]

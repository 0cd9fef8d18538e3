"""Files: adapters in the layouts of Hugging Face, orbax and llama.cpp, and whole checkpoints."""

from peft_jax.io._adapter_loading import load_adapter
from peft_jax.io._adapter_saving import save_adapter
from peft_jax.io._gguf import export_gguf
from peft_jax.io._gguf_adapter import export_gguf_adapter
from peft_jax.io._gguf_adapter_load import load_gguf_adapter
from peft_jax.io._orbax import restore_orbax, save_orbax

__all__ = [
    "export_gguf",
    "export_gguf_adapter",
    "load_adapter",
    "load_gguf_adapter",
    "restore_orbax",
    "save_adapter",
    "save_orbax",
]

"""Files: adapters in the layouts of Hugging Face, orbax and llama.cpp, and whole checkpoints."""

from peft_jax.io import former_modules as former_modules
from peft_jax.io.gguf.load_adapter import load_gguf_adapter
from peft_jax.io.gguf.save_adapter import export_gguf_adapter
from peft_jax.io.gguf.save_model import export_gguf
from peft_jax.io.huggingface.load import load_adapter
from peft_jax.io.huggingface.save import save_adapter
from peft_jax.io.orbax.checkpoint import restore_orbax, save_orbax

__all__ = [
    "export_gguf",
    "export_gguf_adapter",
    "load_adapter",
    "load_gguf_adapter",
    "restore_orbax",
    "save_adapter",
    "save_orbax",
]

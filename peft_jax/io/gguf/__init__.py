"""GGUF: models and adapters for llama.cpp."""

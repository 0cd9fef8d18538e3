"""Adapters and models in orbax checkpoints."""

"""Larger models made of a smaller one's layers, whose weights they share."""

from peft_jax._replication._layers import replicate_layers
from peft_jax._replication._model import (
    Replication,
    given,
    replicated_model,
    with_adapters_of,
)
from peft_jax._replication._reading import reading_rules
from peft_jax._replication._shared import SharedStack

__all__ = [
    "Replication",
    "SharedStack",
    "given",
    "reading_rules",
    "replicate_layers",
    "replicated_model",
    "with_adapters_of",
]

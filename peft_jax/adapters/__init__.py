"""Operations on adapters and on the trees they lie in: trees in, trees out."""

from peft_jax._replication import SharedStack, replicate_layers
from peft_jax.adapters._bank import AdapterBank, stack_adapters
from peft_jax.adapters._bank_model import MultiAdapterModel
from peft_jax.adapters._selection import Selection

__all__ = [
    "AdapterBank",
    "MultiAdapterModel",
    "Selection",
    "SharedStack",
    "replicate_layers",
    "stack_adapters",
]

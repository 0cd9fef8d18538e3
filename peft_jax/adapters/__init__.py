"""Operations on adapters and on the trees they lie in: trees in, trees out."""

from peft_jax._replication import SharedStack, replicate_layers

__all__ = ["SharedStack", "replicate_layers"]

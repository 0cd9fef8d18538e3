"""How adapters start: from random numbers, from the weights, or from what the layers see."""

from peft_jax.initializers._covariances import collect_covariances
from peft_jax.initializers._eva import (
    EvaInitialized,
    get_eva_state_dict,
    initialize_lora_eva_weights,
    redistribute_ranks,
)
from peft_jax.initializers._init import InitializedParams, init_lora_weights
from peft_jax.initializers._replace import replace_lora_weights_loftq
from peft_jax.initializers._subtract import subtract_mutated_init

__all__ = [
    "EvaInitialized",
    "InitializedParams",
    "collect_covariances",
    "get_eva_state_dict",
    "init_lora_weights",
    "initialize_lora_eva_weights",
    "redistribute_ranks",
    "replace_lora_weights_loftq",
    "subtract_mutated_init",
]

"""The demo: a small transformer learns some handwritten digits, and LoRA adapts it to the others.

    python -m peft_jax.demo --help

The data are scikit-learn's 8x8 digits, so nothing is downloaded. The model is an ordinary Linen
model that knows nothing of adapters: `ModuleInterceptor` puts them in from outside. What this needs
beyond the library, the extra `demo` installs: `pip install "peft_jax[demo]"`.
"""

from peft_jax.demo._adaptation import Adaptation, adapt, logits_of, new_adapters, table_of
from peft_jax.demo._checks import check_fusing, check_saving, read_adapter, write_adapter
from peft_jax.demo._command import main
from peft_jax.demo._digits import NEW_DIGITS, OLD_DIGITS, Digits, load_digits
from peft_jax.demo._methods import fitting, table_of_methods
from peft_jax.demo._model import DigitTransformer
from peft_jax.demo._rules import LoRARule, StorageRule
from peft_jax.demo._training import Training, draw_losses, start_training, time_steps, train

__all__ = [
    "NEW_DIGITS",
    "OLD_DIGITS",
    "Adaptation",
    "DigitTransformer",
    "Digits",
    "LoRARule",
    "StorageRule",
    "Training",
    "adapt",
    "check_fusing",
    "check_saving",
    "draw_losses",
    "fitting",
    "load_digits",
    "logits_of",
    "main",
    "new_adapters",
    "read_adapter",
    "start_training",
    "table_of",
    "table_of_methods",
    "time_steps",
    "train",
    "write_adapter",
]

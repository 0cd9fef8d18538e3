"""What a user chooses: `LoraConfig`, its parts, and which modules it targets. Python alone."""

from peft_jax._config.initializer_configs import *
from peft_jax._config.lora_config import *
from peft_jax._config.target_checks import *
from peft_jax._config.targets import *

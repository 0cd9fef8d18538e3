"""Equations and specs, as strings and numbers. Python alone."""

from peft_jax._spec.equation import *
from peft_jax._spec.lora_spec import *

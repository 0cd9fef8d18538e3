"""Weights that are not formed, frames in which functions meet them, and how they are used."""

from peft_jax._numerics.lazy.frames import *
from peft_jax._numerics.lazy.tracer import *
from peft_jax._numerics.lazy.uses import *
from peft_jax._numerics.lazy.weight import *

"""Modules and their calls: interceptors, rules, abstract runs."""

from peft_jax._surgery.abstract_runs import *
from peft_jax._surgery.active import *
from peft_jax._surgery.flax_internals import *
from peft_jax._surgery.harvest import *
from peft_jax._surgery.initial_values import *
from peft_jax._surgery.interceptor import *
from peft_jax._surgery.layer_kinds import *
from peft_jax._surgery.rules import *
from peft_jax._surgery.spec_boxes import *
from peft_jax._surgery.wrapper import *

"""`python -m peft_jax.demo`."""

from peft_jax.demo._command import main

main()

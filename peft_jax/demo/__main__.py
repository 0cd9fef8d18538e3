"""`python -m peft_jax.demo`."""

from peft_jax.demo import main

main()

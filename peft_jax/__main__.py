"""`python -m peft_jax`."""

from peft_jax.cli import main

if __name__ == "__main__":
    raise SystemExit(main())

"""The command line."""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from peft_jax.demo._adaptation import adapt, table_of
from peft_jax.demo._checks import check_fusing, check_saving
from peft_jax.demo._digits import NEW_DIGITS, load_digits
from peft_jax.demo._methods import table_of_methods
from peft_jax.demo._model import DigitTransformer
from peft_jax.demo._training import draw_losses


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""

    def positive(text: str) -> int:
        if int(text) < 1:
            raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
        return int(text)

    parser = argparse.ArgumentParser(
        prog="python -m peft_jax.demo",
        description="Teaches a small transformer the digits 0 to 4, and the others by LoRA.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--rank", type=positive, default=8, help="rank of the adapters")
    parser.add_argument("--steps", type=positive, default=200, help="steps of adaptation")
    parser.add_argument("--seed", type=int, default=0, help="of the data, weights and batches")
    parser.add_argument("--out", type=Path, default="out/demo", help="folder to write into")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the demo with the arguments of the command line, or those given."""
    options, started = parse(arguments), time.perf_counter()
    options.out.mkdir(parents=True, exist_ok=True)
    train_digits, test_digits = load_digits(options.seed)
    model = DigitTransformer(heads=3)  # heads of 32 features, which the blocks of Q4_0 divide
    adaptation = adapt(model, train_digits, options.rank, options.steps, options.seed)

    console = Console()
    console.print(table_of(adaptation, train_digits, test_digits))
    console.print(table_of_methods(model, adaptation.full, test_digits, NEW_DIGITS))
    picture, adapter = options.out / "losses.png", options.out / "adapter.safetensors"
    trainings = (adaptation.lora, adaptation.qlora, adaptation.full)
    draw_losses(trainings, "Learning the digits 5 to 9").savefig(picture)
    for line in (
        check_fusing(adaptation, test_digits),
        check_saving(adapter, adaptation, test_digits),
        f"loss curves: {picture}",
        f"all in {time.perf_counter() - started:.0f} seconds",
    ):
        console.print(f"[green]✓[/] {line}", highlight=False, soft_wrap=True)

"""The demo: a small transformer learns some handwritten digits, and LoRA adapts it to the others.

    python -m peft_jax.demo --help

The data are scikit-learn's 8x8 digits, so nothing is downloaded. The model is an ordinary Linen
model that knows nothing of adapters: `ModuleInterceptor` puts them in from outside. What this needs
beyond the library, the extra `demo` installs: `pip install "peft_jax[demo]"`.
"""

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax
from flax import traverse_util
from jax import Array
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from safetensors import safe_open
from safetensors.numpy import save_file
from sklearn import datasets
from tqdm import tqdm

import peft_jax as peft

Params = dict[str, Any]
Specs = dict[str, peft.LoraSpec]
Logits = Callable[[Params, Params, Array], Any]  # of trainable and frozen parameters, and images

OLD_DIGITS = (0, 1, 2, 3, 4)
NEW_DIGITS = (5, 6, 7, 8, 9)
PRETRAINING_STEPS = 150
BATCH = 128
TOLERANCE = 1e-5  # of fused logits, relative to the largest


class Block(nn.Module):
    """Attention and a two-layer perceptron, each after a LayerNorm and beside a residual path."""

    heads: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps `(batch, tokens, width)` to the same shape."""
        width = x.shape[-1]
        attention = nn.MultiHeadDotProductAttention(self.heads, name="attention")
        x = x + attention(nn.LayerNorm(name="attention_norm")(x))
        hidden = nn.Dense(4 * width, name="up")(nn.LayerNorm(name="mlp_norm")(x))
        return x + nn.Dense(width, name="down")(nn.gelu(hidden))


class DigitTransformer(nn.Module):
    """Classifies 8x8 images, of which every 2x2 patch is a token.

    Attributes:
      width: features of a token.
      depth: number of blocks.
      heads: attention heads of a block.
      classes: number of classes.
    """

    width: int = 96
    depth: int = 2
    heads: int = 4
    classes: int = 10

    @nn.compact
    def __call__(self, images: Array) -> Array:
        """Maps images `(batch, 8, 8)` to logits `(batch, classes)`."""
        patches = images.reshape(-1, 4, 2, 4, 2).swapaxes(2, 3).reshape(-1, 16, 4)
        x = nn.Dense(self.width, name="patch")(patches)
        x = x + self.param("position", nn.initializers.normal(0.02), (1, *x.shape[1:]))
        for index in range(self.depth):
            x = Block(self.heads, name=f"block_{index}")(x)
        x = nn.LayerNorm(name="norm")(x).mean(axis=1)
        return nn.Dense(self.classes, name="head")(x)


@dataclasses.dataclass(frozen=True)
class LoRARule:
    """Gives an adapter to every Dense and DenseGeneral layer, but not to those named in `skip`.

    A frozen dataclass compares by value: a jitted function that opens an interceptor with an equal
    rule is not traced again, while a lambda written anew for each step would be a new program.

    Attributes:
      rank: rank of every adapter.
      alpha: an adapter is scaled by `alpha / rank`.
      skip: names of layers that stay as they are.
    """

    rank: int
    alpha: float = 16.0
    skip: tuple[str, ...] = ("patch",)

    def __call__(self, module: nn.Module) -> nn.Module:
        """Returns the layer with its adapter, or the module as it is."""
        wrappers = {nn.Dense: peft.LoRADense, nn.DenseGeneral: peft.LoRADenseGeneral}
        wrapper = wrappers.get(type(module))
        if wrapper is None or module.name in self.skip:
            return module
        return wrapper(rank=self.rank, alpha=self.alpha, wrapped=module)


@dataclasses.dataclass(frozen=True)
class Digits:
    """Images `(n, 8, 8)` with values from 0 to 1, and their labels `(n,)`."""

    images: np.ndarray
    labels: np.ndarray

    def take(self, index: np.ndarray) -> "Digits":
        """The images at `index`, or where it is true."""
        return Digits(self.images[index], self.labels[index])

    def only(self, digits: Sequence[int]) -> "Digits":
        """The images of some digits."""
        return self.take(np.isin(self.labels, digits))


def load_digits(seed: int) -> tuple[Digits, Digits]:
    """Returns images to train on, and a fifth of all, held out, to judge by."""
    images, labels = datasets.load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32).reshape(-1, 8, 8)
    digits = Digits(images, labels.astype(np.int32))
    order = np.random.default_rng(seed).permutation(len(labels))
    held_out = len(order) // 5
    return digits.take(order[held_out:]), digits.take(order[:held_out])


@dataclasses.dataclass(frozen=True)
class Training:
    """A model in training, be it pretraining, LoRA or full fine-tuning.

    Attributes:
      name: of this training, in its progress bar and in the picture.
      logits: gives the answers from `trainable`, `frozen` and images.
      step: the jitted step; see `start_training`.
      trainable: the parameters that gradients are taken of.
      frozen: the others.
      state: the optimizer's.
      losses: of every step so far.
    """

    name: str
    logits: Logits
    step: Callable[..., tuple[Params, optax.OptState, Array]]
    trainable: Params
    frozen: Params
    state: optax.OptState
    losses: tuple[float, ...] = ()

    def run_step(self, batch: Digits) -> tuple[Params, optax.OptState, Array]:
        """The parameters, the optimizer's state and the loss after one more batch."""
        return self.step(self.trainable, self.frozen, self.state, batch.images, batch.labels)

    def answers(self, digits: Digits) -> np.ndarray:
        """The logits `(n, classes)` of some images."""
        return np.asarray(jax.jit(self.logits)(self.trainable, self.frozen, digits.images))

    def accuracy(self, digits: Digits, among: Sequence[int]) -> float:
        """The share of right answers among images of some digits, each judged by its top logit."""
        right = self.answers(digits).argmax(-1) == digits.labels
        return float(right[np.isin(digits.labels, among)].mean())


def start_training(
    name: str,
    logits: Logits,
    trainable: Params,
    frozen: Params,
    learning_rate: float,
) -> Training:
    """Prepares training `trainable`, and nothing else, with Adam."""
    optimizer = optax.adam(learning_rate)

    def loss_of(trainable: Params, frozen: Params, images: Array, labels: Array) -> Array:
        scores = logits(trainable, frozen, images)
        return optax.softmax_cross_entropy_with_integer_labels(scores, labels).mean()

    @jax.jit
    def step(
        trainable: Params, frozen: Params, state: optax.OptState, images: Array, labels: Array
    ) -> tuple[Params, optax.OptState, Array]:
        loss, gradients = jax.value_and_grad(loss_of)(trainable, frozen, images, labels)
        updates, state = optimizer.update(gradients, state, trainable)
        return optax.apply_updates(trainable, updates), state, loss

    return Training(name, logits, step, trainable, frozen, optimizer.init(trainable))


def train(training: Training, digits: Digits, steps: int, seed: int) -> Training:
    """Returns the training after some more steps, each on a random batch of `digits`."""
    rng = np.random.default_rng(seed)
    with tqdm(range(steps), desc=f"{training.name:<16}", unit="step", mininterval=0.5) as bar:
        for _ in bar:
            batch = digits.take(rng.integers(len(digits.labels), size=BATCH))
            trainable, state, loss = training.run_step(batch)
            losses = (*training.losses, float(loss))
            training = dataclasses.replace(
                training, trainable=trainable, state=state, losses=losses
            )
            bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
    return training


def time_steps(trainings: Sequence[Training], digits: Digits, rounds: int = 30) -> list[float]:
    """The median milliseconds of a step of each training; they take turns, to be fair."""
    times: list[list[float]] = [[] for _ in trainings]
    batch = digits.take(np.arange(BATCH))
    for _ in tqdm(range(rounds), desc=f"{'timing':<16}", unit="round", mininterval=0.5):
        for training, measured in zip(trainings, times, strict=True):
            start = time.perf_counter()
            jax.block_until_ready(training.run_step(batch))
            measured.append(1e3 * (time.perf_counter() - start))
    return [statistics.median(measured) for measured in times]


def write_adapter(path: Path, lora: Params, specs: Specs) -> None:
    """Writes the adapter's arrays by their slashed paths, and with them what arrays cannot say."""
    flat = traverse_util.flatten_dict(lora, sep="/")
    described = json.dumps({name: spec.to_dict() for name, spec in specs.items()})
    arrays = {name: np.asarray(array) for name, array in flat.items()}
    save_file(arrays, path, metadata={"specs": described})


def read_adapter(path: Path) -> tuple[Params, Specs]:
    """The inverse of `write_adapter`."""
    with safe_open(path, framework="numpy") as file:
        names = file.keys()
        arrays = {name: file.get_tensor(name) for name in names}
        described = json.loads(file.metadata()["specs"])
    specs = {name: peft.LoraSpec.from_dict(spec) for name, spec in described.items()}
    return traverse_util.unflatten_dict(arrays, sep="/"), specs


def draw_losses(trainings: Sequence[Training], title: str) -> Figure:
    """Draws losses over steps: every step pale, the mean of the fifteen around it strong."""
    figure = Figure(figsize=(7, 4), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    for number, training in enumerate(trainings):
        steps = len(training.losses)
        window = min(15, steps)
        mean = np.convolve(training.losses, np.full(window, 1 / window), mode="valid")
        middle = window // 2 + 1
        axes.plot(range(1, steps + 1), training.losses, color=f"C{number}", alpha=0.2, linewidth=1)
        axes.plot(np.arange(len(mean)) + middle, mean, color=f"C{number}", label=training.name)
    axes.set(title=title, xlabel="step", ylabel="cross-entropy of a batch", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


@dataclasses.dataclass(frozen=True)
class Adaptation:
    """A pretrained model, adapted in two ways.

    Attributes:
      base: the pretrained model.
      lora: the model whose adapters were trained.
      full: the model of which everything was trained.
      specs: what each adapter does to its kernel.
    """

    base: Training
    lora: Training
    full: Training
    specs: Specs


def adapt(model: nn.Module, digits: Digits, rank: int, steps: int, seed: int) -> Adaptation:
    """Trains `model` on the old digits, then adapts it to the new ones by LoRA and in full."""
    rule, key, example = LoRARule(rank), jax.random.key(seed), digits.images[:1]
    old_digits, new_digits = digits.only(OLD_DIGITS), digits.only(NEW_DIGITS)

    def plain_logits(params: Params, frozen: Params, images: Array) -> Any:
        return model.apply({"params": params}, images)

    def lora_logits(lora: Params, base: Params, images: Array) -> Any:
        with peft.ModuleInterceptor(rule):
            return model.apply({"params": peft.merge_params(base, lora)}, images)

    initialize = jax.jit(model.init)
    params = initialize(key, example)["params"]
    base = start_training("pretraining", plain_logits, params, {}, learning_rate=1e-3)
    base = train(base, old_digits, PRETRAINING_STEPS, seed)

    with peft.ModuleInterceptor(rule):
        _, adapters = peft.split_params(initialize(key, example)["params"])
        specs = peft.lora_specs(model, example)
    lora = start_training("LoRA", lora_logits, adapters, base.trainable, learning_rate=2e-3)
    lora = train(lora, new_digits, steps, seed)

    full = start_training("full fine-tuning", plain_logits, base.trainable, {}, learning_rate=1e-3)
    full = train(full, new_digits, steps, seed)
    return Adaptation(base, lora, full, specs)


def table_of(adaptation: Adaptation, train_digits: Digits, test_digits: Digits) -> Table:
    """Compares both ways: sizes, accuracies on digits that no training saw, time of a step."""
    base, lora, full = adaptation.base, adaptation.lora, adaptation.full
    whole, adapters = (
        sum(leaf.size for leaf in jax.tree.leaves(tree))
        for tree in (base.trainable, lora.trainable)
    )
    modules = {path[:-1] for path in traverse_util.flatten_dict(base.trainable)}
    share = adapters / (whole + adapters)
    table = Table("", title="A model of the digits 0 to 4 learns the digits 5 to 9")
    table.add_column("LoRA", justify="right")
    table.add_column("full fine-tuning", justify="right")
    of_all = (f"{adapters:,} of {whole + adapters:,}", f"{whole:,} of {whole:,}")
    table.add_row("trainable parameters of all", *of_all)
    table.add_row("", f"{share:.1%}", "100.0%")
    table.add_row("matched modules of all", f"{len(adaptation.specs)} of {len(modules)}", "-")

    taken_off = dataclasses.replace(base, trainable=lora.frozen)
    for name, digits in (("5 to 9", NEW_DIGITS), ("0 to 4", OLD_DIGITS)):
        before, by_lora, by_full, without = (
            f"{training.accuracy(test_digits, among=digits):.1%}"
            for training in (base, lora, full, taken_off)
        )
        table.add_section()
        table.add_row(f"accuracy on {name} before", before, before)
        table.add_row("after", by_lora, by_full)
        table.add_row("after, adapters taken off", without, "-")
    table.add_section()
    times = time_steps((lora, full), train_digits)
    table.add_row("time of a step", *(f"{time:.1f} ms" for time in times))
    return table


def check_fusing(adaptation: Adaptation, digits: Digits) -> str:
    """Checks that the plain model on fused parameters answers as the adapted model does."""
    base, lora = adaptation.base, adaptation.lora
    params = peft.merge_params(lora.frozen, lora.trainable)
    fused = peft.fuse_params(params, specs=adaptation.specs)
    plain = dataclasses.replace(base, trainable=fused).answers(digits)
    adapted = lora.answers(digits)
    difference = np.abs(plain - adapted).max() / np.abs(adapted).max()
    same = (plain.argmax(-1) == adapted.argmax(-1)).all()
    if not same or difference > TOLERANCE:
        raise SystemExit(f"The fused model answers differently: logits by {difference:.1e}.")
    return f"fused into the plain model: same classes, logits within {difference:.0e} (relative)"


def check_saving(path: Path, adaptation: Adaptation, digits: Digits) -> str:
    """Saves the adapter, loads it back, and checks that it answers as before."""
    lora = adaptation.lora
    write_adapter(path, lora.trainable, adaptation.specs)
    loaded, specs = read_adapter(path)
    answers = dataclasses.replace(lora, trainable=loaded).answers(digits)
    if specs != adaptation.specs or not np.array_equal(answers, lora.answers(digits)):
        raise SystemExit(f"The adapter loaded from {path} is not the one that was saved.")
    return f"saved and loaded back, same answers: {path} ({path.stat().st_size / 1024:.0f} KiB)"


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
    adaptation = adapt(DigitTransformer(), train_digits, options.rank, options.steps, options.seed)

    console = Console()
    console.print(table_of(adaptation, train_digits, test_digits))
    picture, adapter = options.out / "losses.png", options.out / "adapter.safetensors"
    trainings = (adaptation.lora, adaptation.full)
    draw_losses(trainings, "Learning the digits 5 to 9").savefig(picture)
    for line in (
        check_fusing(adaptation, test_digits),
        check_saving(adapter, adaptation, test_digits),
        f"loss curves: {picture}",
        f"all in {time.perf_counter() - started:.0f} seconds",
    ):
        console.print(f"[green]✓[/] {line}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()

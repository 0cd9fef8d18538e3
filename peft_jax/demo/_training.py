"""A training loop with Adam, and the picture of its losses."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
import optax
from jax import Array
from tqdm import tqdm

from peft_jax.demo._digits import Digits

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Params = dict[str, Any]
Logits = Callable[[Params, Params, Array], Any]  # of trainable and frozen parameters, and images

BATCH = 128


@dataclasses.dataclass(frozen=True)
class Training:
    """A model in training, be it pretraining, LoRA, QLoRA or full fine-tuning.

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


def draw_losses(trainings: Sequence[Training], title: str) -> "Figure":
    """Draws losses over steps: every step pale, the mean of the fifteen around it strong."""
    from matplotlib.figure import Figure

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

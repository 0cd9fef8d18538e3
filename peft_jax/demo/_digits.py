"""Scikit-learn's handwritten digits."""

import dataclasses
from collections.abc import Sequence

import numpy as np

OLD_DIGITS = (0, 1, 2, 3, 4)
NEW_DIGITS = (5, 6, 7, 8, 9)


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
    from sklearn import datasets  # here: it imports for as long as all else together

    images, labels = datasets.load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32).reshape(-1, 8, 8)
    digits = Digits(images, labels.astype(np.int32))
    order = np.random.default_rng(seed).permutation(len(labels))
    held_out = len(order) // 5
    return digits.take(order[held_out:]), digits.take(order[:held_out])

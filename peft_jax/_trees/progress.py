"""Progress of long work on trees, of batches and of files."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

__all__ = ["progress_bar"]


def progress_bar(
    items: Iterable[Any] | None, description: str, *, shown: bool, **options: Any
) -> Any:
    """A bar of tqdm around ``items``; without items one that is updated by hand.

    Args:
      items: what is worked through, or None.
      description: a word or two in front of the bar.
      shown: whether anything is printed.
      **options: of tqdm.
    """
    from tqdm import tqdm  # here, so that `import peft_jax` does not pay for it

    return tqdm(items, description, disable=not shown, **options)

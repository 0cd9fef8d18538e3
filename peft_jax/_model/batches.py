"""Batches of data, and how a model is run on one of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from flax import linen as nn
from flax.errors import ScopeCollectionNotFound

__all__ = [
    "Forward",
    "arguments",
    "batches_of",
    "default_forward",
]


Forward = Callable[[Any, Any], Any]


def default_forward(model: nn.Module) -> Forward:
    """Runs a model on batches that are dicts of arguments, tuples of them, or the only one.

    Of a dict the entry ``labels`` is left out.
    """

    def forward(params: Any, batch: Any) -> Any:
        args, kwargs = arguments(batch)
        try:
            return model.apply({"params": params}, *args, **kwargs)
        except (TypeError, ScopeCollectionNotFound) as error:
            raise ValueError(
                f"The model does not take this batch by itself ({error}). A batch is a dict of the "
                "model's arguments, a tuple of them, or the only one; for anything else, and for "
                "further collections, pass forward_fn(model, params, batch)."
            ) from error

    return forward


def arguments(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of the model that a batch holds; see `default_forward`."""
    if isinstance(batch, Mapping):
        return (), {key: value for key, value in batch.items() if key != "labels"}
    return (tuple(batch), {}) if isinstance(batch, list | tuple) else ((batch,), {})


def batches_of(dataloader: Iterable[Any]) -> Iterator[Any]:
    """The batches.

    Raises:
      ValueError: where there are none.
    """
    if isinstance(dataloader, Mapping | str) or hasattr(dataloader, "shape"):
        raise ValueError(
            f"The dataloader is an iterable of batches, got one {type(dataloader).__name__}. Write "
            "[batch]."
        )
    empty = True
    for batch in dataloader:
        empty = False
        yield batch
    if empty:
        raise ValueError("The dataloader holds no batches. Give at least one.")

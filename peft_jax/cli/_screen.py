"""Outputs: whole or not at all, never over what is there, and what they would be."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text
from tqdm import tqdm


def say(text: str) -> None:
    """One line on stdout."""
    print(text)


def warn(command: str, text: str) -> None:
    """One line on stderr."""
    print(f"{command}: {text}", file=sys.stderr)


def readable(count: float) -> str:
    """A number of bytes, with a unit: ``3.2 MB``."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def printable(name: str) -> str:
    """A name as a terminal may see it."""
    return name if name.isprintable() else ascii(name)[1:-1]


def in_order(values: Iterable[Any], name: Callable[[Any], str] = str) -> list[Any]:
    """Values by their names, in which numbers count as such: layer 2 before layer 10."""

    def key(value: Any) -> list[tuple[bool, int, str]]:
        parts = re.split(r"(\d+)", name(value))
        return [(not p.isdecimal(), int(p) if p.isdecimal() else 0, p) for p in parts]

    return sorted(values, key=key)


def print_table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[str] = ()
) -> None:
    """A table on stdout, as wide as its contents unless a terminal is narrower.

    Args:
      columns: their titles.
      rows: their texts.
      numbers: titles of the columns that are aligned at the right.
    """
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        side = "right" if column in numbers else "left"
        table.add_column(column, justify=side, overflow="fold")  # type: ignore[arg-type]
    for row in rows:
        table.add_row(*(Text(printable(text)) for text in row))
    console = Console(width=None if sys.stdout.isatty() else 10_000, highlight=False)
    console.print(table)


class Progress:
    """How far the work is: a bar on a terminal, a line for each tenth elsewhere; on stderr."""

    def __init__(self, verb: str, total: int) -> None:
        self._verb, self._total, self._done, self._tenths = verb, total, 0, 0
        self._bar = None
        if sys.stderr.isatty():
            self._bar = tqdm(
                total=total, desc=verb, unit="B", unit_scale=True, leave=False, file=sys.stderr
            )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def update(self, count: int) -> None:
        """So many bytes more are done."""
        if self._bar is not None:
            self._bar.update(count)
            return
        self._done += count
        tenths = min(10 * self._done // max(self._total, 1), 10)
        if tenths > self._tenths:
            self._tenths = tenths
            warn(self._verb, f"{10 * tenths}% of {readable(self._total)}")

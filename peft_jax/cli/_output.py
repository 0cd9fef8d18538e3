"""Outputs: whole or not at all, never over what is there, and what they would be."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import sys
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text
from tqdm import tqdm

_OURS = (".safetensors", ".json", ".txt", ".model", ".jinja", ".md", ".spm", ".vocab", ".gguf")


def check_output(output: Path, inputs: Sequence[Path], force: bool) -> None:
    """Refuses an output that would take the place of something it should not.

    Raises:
      ValueError: where it is there and ``force`` is not given, or is an input or holds one, or is
        a directory with files of other kinds, or lies in no directory.
    """
    place = output.resolve()
    for source in inputs:
        if place == source.resolve() or place in source.resolve().parents:
            raise ValueError(
                f"OUTPUT {str(output)!r} is the input {str(source)!r} or holds it. Name another."
            )
    if not place.parent.is_dir():
        raise ValueError(
            f"OUTPUT {str(output)!r} lies in no directory. Make {str(place.parent)!r}."
        )
    if not os.path.lexists(output):
        return
    if not force:
        raise ValueError(f"{str(output)!r} is there already. Pass --force to replace it.")
    if output.is_dir() and not _is_replaceable(output):
        raise ValueError(
            f"{str(output)!r} is a directory with other files than checkpoints and adapters have. "
            "Remove it yourself, or name another."
        )


def _is_replaceable(directory: Path) -> bool:
    if any((directory / name).exists() for name in ("_METADATA", "_CHECKPOINT_METADATA")):
        return True
    return all(path.is_file() and path.suffix in _OURS for path in directory.iterdir())


@contextlib.contextmanager
def new_output(output: Path) -> Iterator[Path]:
    """A path to write a file or a directory at, which takes the output's place at the end.

    Until then it has another name in the same directory; it is removed on an error. What is at the
    output's place is replaced; see `check_output`.
    """
    mark = uuid.uuid4().hex
    temporary = output.with_name(f".{output.name[:100]}.{mark}{output.suffix}")
    before = output.with_name(f".{output.name[:100]}.{mark}.before")
    try:
        try:
            yield temporary
        except ValueError as error:
            raise ValueError(str(error).replace(str(temporary), str(output))) from error
        moved = output.is_dir() and not output.is_symlink()
        if moved:
            os.replace(output, before)
        try:
            os.replace(temporary, output)
        except BaseException:
            if moved:
                os.replace(before, output)
            raise
        _remove(before)
    finally:
        for path in output.parent.glob(f".*{mark}*"):  # those that orbax makes beside it too
            if path != before:
                _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


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

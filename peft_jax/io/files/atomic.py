"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

_OURS = (".safetensors", ".json", ".txt", ".model", ".jinja", ".md", ".spm", ".vocab", ".gguf")


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A file to write, which takes the place of ``path`` where the block ends without an error.

    Until then it has another name in the same directory; it is removed on an error.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name[:100]}.{uuid.uuid4().hex}")
    try:
        try:
            file = temporary.open("xb")
        except (FileNotFoundError, NotADirectoryError) as error:
            raise ValueError(f"{str(path)!r} lies in no directory: {error.strerror}.") from error
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing_both(first: Path, second: Path) -> Iterator[tuple[Path, Path]]:
    """Paths to write two files at, which take the places of both where the block ends, or of none.

    Each is beside its place until then. (A loss of power between the two moves can still part
    them.)
    """
    mark, paths = uuid.uuid4().hex, (first, second)
    new = [path.with_name(f".{path.name[:100]}.{mark}.new") for path in paths]
    old = [path.with_name(f".{path.name[:100]}.{mark}.old") for path in paths]
    try:
        yield new[0], new[1]
        for path, kept in zip(paths, old, strict=True):
            if path.exists():
                shutil.copy2(path, kept)
        try:
            for path, written in zip(paths, new, strict=True):
                os.replace(written, path)
            sync(first.parent)
        except BaseException:
            for path, kept in zip(paths, old, strict=True):
                if kept.exists():
                    os.rename(kept, path)
                else:
                    path.unlink(missing_ok=True)
            raise
    finally:
        for path in (*new, *old):
            path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Makes a file, or the names in a directory, outlast a loss of power."""
    with contextlib.suppress(PermissionError):  # systems that open no directories
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


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

"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


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

"""From the slashed paths of a model here to the dotted names of its twin in torch, and back."""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import re
from collections.abc import Iterable, Mapping
from typing import Any

Path = tuple[str, ...]

_PLACE = "{}"
_MOST_PLACES = 2  # in one part, so that matching takes no time to speak of
_MOST_SEEN = 1000
_LAYER = "\0"  # stands in a name where the index of a stacked layer goes


@dataclasses.dataclass(frozen=True)
class Name:
    """A dotted name with a place for each index of a stacked layer.

    Attributes:
      parts: of the name.
      takes_last: whether a rename speaks of the last part of our path.
    """

    parts: Path
    takes_last: bool

    @property
    def places(self) -> int:
        """How many indices are needed."""
        return sum(part.count(_LAYER) for part in self.parts)

    @property
    def pattern(self) -> str:
        """The dotted name, with ``{}`` where indices go."""
        return ".".join(self.parts).replace(_LAYER, _PLACE)

    def at(self, indices: Iterable[int]) -> Path:
        """The parts of the name of one layer."""
        left = iter(indices)
        return tuple(re.sub(_LAYER, lambda _: str(next(left)), part) for part in self.parts)


@dataclasses.dataclass(frozen=True)
class _Rename:
    """One row of the table: a run of parts of our paths, and the run that it becomes."""

    ours: str
    theirs: str

    @property
    def our_parts(self) -> Path:
        return tuple(self.ours.split("/"))

    @property
    def their_parts(self) -> Path:
        return tuple(self.theirs.split(".")) if self.theirs else ()

    @property
    def layers(self) -> int:
        return self.theirs.count(_PLACE) - self.ours.count(_PLACE)


class Renames:
    """A table of renames, which remembers which rows were of use; see `save_adapter`.

    Raises:
      ValueError: on a table that is none, or a row that would lose part of our path.
    """

    def __init__(self, table: Mapping[str, str] | None) -> None:
        if table is not None and not isinstance(table, Mapping):
            raise ValueError(f"renames are a dict from our paths to names, got {table!r}.")
        self.table = dict(table or {})
        self._rows = [_checked(ours, theirs) for ours, theirs in self.table.items()]
        self._used: set[str] = set()
        self._seen: set[str] = set()

    def forward(self, path: Path) -> Name:
        """Their name of one of our paths: at each place the longest run of the table counts."""
        parts, taken = _walk(path, self._longest_of_ours, self._our_row)
        self._seen.add("/".join(path))
        return Name(parts, taken)

    def backward(self, name: Path) -> tuple[Path, tuple[int, ...], bool]:
        """Our path of one of their names, and the indices of stacked layers in it.

        And whether a rename speaks of the last part of the name.

        Raises:
          ValueError: where the table does not lead back.
        """
        indices: list[int] = []

        def row(rename: _Rename, found: list[str]) -> Path:
            own = len(found) - rename.layers
            indices.extend(map(int, found[own:]))
            return _filled(rename.our_parts, found[:own])

        path, taken = _walk(name, self._longest_of_theirs, row)
        self._seen.add(".".join(name))
        back = self.forward(path)
        if back.places != len(indices) or back.at(indices) != name:
            raise ValueError(
                f"renames lead from {'.'.join(name)!r} to '{'/'.join(path)}', and from there to "
                f"{back.pattern!r}: they do not tell our path. "
                "Give the specs of the model (`specs=peft.lora_specs(...)`), by which our paths "
                "are known."
            )
        return path, tuple(indices), taken

    def check_used(self) -> None:
        """Refuses a table with rows that matched nothing.

        Raises:
          ValueError: with the rows, and paths or names that are close to them.
        """
        unused = [row for row in self._rows if row.ours not in self._used]
        if unused:
            seen = itertools.islice(self._seen, _MOST_SEEN)
            runs = {run for path in seen for run in _runs(path)}
            close = {row.ours: difflib.get_close_matches(row.ours, runs, 3) for row in unused}
            raise ValueError(
                f"renames name what is not there: {[row.ours for row in unused]}. Close to them: "
                f"{close}. Keys are parts of our paths with slashes between, values parts of their "
                "names with dots."
            )

    def _our_row(self, rename: _Rename, found: list[str]) -> Path:
        return _filled(rename.their_parts, [*found, *[_LAYER] * rename.layers])

    def _longest_of_ours(self, path: Path, place: int) -> Any:
        return self._longest(path, place, [(row.our_parts, row, 0) for row in self._rows])

    def _longest_of_theirs(self, path: Path, place: int) -> Any:
        rows = [(row.their_parts, row, row.layers) for row in self._rows if row.theirs]
        found = self._longest(path, place, rows)
        if found is not None and sum(parts == found[0] for parts, *_ in rows) > 1:
            raise ValueError(
                f"renames lead to {'.'.join(found[0])!r} from several of our paths, of which the "
                "names alone do not tell the right one. Give the specs of the model "
                "(`specs=peft.lora_specs(...)`)."
            )
        return found

    def _longest(self, path: Path, place: int, rows: list[tuple[Path, _Rename, int]]) -> Any:
        """The run that matches at a place, its row, and what stands in its places.

        Of those as many as the number says, from the last on, are indices of layers.
        """
        best = None
        for parts, row, layers in rows:
            found = _match(parts, path[place : place + len(parts)])
            if found is not None and all(map(str.isdecimal, found[len(found) - layers :])):
                weight = (len(parts), len("".join(parts).replace(_PLACE, "")))
                if best is None or weight > best[0]:
                    best = (weight, (parts, row, found))
        if best is None:
            return None
        self._used.add(best[1][1].ours)
        return best[1]


def _walk(path: Path, longest: Any, replaced: Any) -> tuple[Path, bool]:
    """Replaces run after run; and whether the last part of the path was in one."""
    parts: list[str] = []
    place, taken = 0, False
    while place < len(path):
        found = longest(path, place)
        taken = found is not None
        if found is None:
            parts.append(path[place])
            place += 1
        else:
            run, row, values = found
            parts.extend(replaced(row, values))
            place += len(run)
    return tuple(parts), taken


def _match(pattern: Path, parts: Path) -> list[str] | None:
    """What stands in the places of a pattern, if it matches these parts."""
    if len(pattern) != len(parts):
        return None
    found: list[str] = []
    for one, part in zip(pattern, parts, strict=True):
        match = re.fullmatch("(.+?)".join(map(re.escape, one.split(_PLACE))), part, re.DOTALL)
        if match is None:
            return None
        found.extend(match.groups())
    return found


def _filled(parts: Path, values: list[str]) -> Path:
    left = iter(values)
    pieces = [part.split(_PLACE) for part in parts]
    return tuple(first + "".join(next(left) + piece for piece in rest) for first, *rest in pieces)


def _runs(path: str) -> Iterable[str]:
    separator = "/" if "/" in path else "."
    parts = path.split(separator)
    for start in range(len(parts)):
        for stop in range(start + 1, len(parts) + 1):
            yield separator.join(parts[start:stop])


def _checked(ours: Any, theirs: Any) -> _Rename:
    def wrong(rule: str) -> ValueError:
        return ValueError(f"renames: {ours!r}: {theirs!r} is no rename: {rule}.")

    if not isinstance(ours, str) or not isinstance(theirs, str):
        raise wrong("keys and values are strings")
    row = _Rename(ours, theirs)
    if not all(row.our_parts) or not all(row.their_parts) or "/" in theirs or _LAYER in theirs:
        raise wrong("a key is parts of a path with slashes between, a value parts with dots")
    if any(part.count(_PLACE) > _MOST_PLACES for part in (*row.our_parts, *row.their_parts)):
        raise wrong(f"a part holds at most {_MOST_PLACES} {{}}")
    if row.layers < 0:
        raise wrong("of each {} on our side there is one on theirs, or two layers get one name")
    return row

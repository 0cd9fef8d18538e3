"""The nine floors: imports point down, through faces, and name only what is public elsewhere."""

import ast
import functools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = Path(__file__).parents[1] / "peft_jax"

# From top to bottom, as in docs/architecture.md. A wing imports only from floors below its own.
FLOORS = (
    ("demo", "__main__"),
    ("cli", "quantsim", "__init__"),
    ("io", "initializers", "adapters"),
    ("_model",),
    ("_layers",),
    ("_surgery",),
    ("_trees",),
    ("_numerics",),
    ("_spec", "_config"),
)
FLOOR_OF = {wing: floor for floor, wings in enumerate(FLOORS) for wing in wings}
# What a wing may not import, besides the wings above it.
FOREIGN = {
    "_spec": {"jax", "jaxlib", "flax", "optax"},
    "_config": {"jax", "jaxlib", "flax", "optax"},
    "_numerics": {"flax", "optax"},
}
# What libraries export and do not document, by its dotted name (or the end of it) or as the name of
# any attribute, and the one file in which it may stand.
UNDOCUMENTED = {
    Path("_numerics/jax_internals.py"): {
        "jax.core",
        "jax.extend",
        "jax.interpreters",
        "jax.make_user_context",
    },
    Path("_surgery/flax_internals.py"): {
        "__module__",
        "debug_path",
        "flax.core.Scope",
        "flax.core.lift",
        "flax.core.scope",
        "invalid",
        "mutable_variables",
        "push",
        "rng_counters",
        "rngs",
        "scope.root",
        "temporary",
    },
}
FILES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))


class Import(NamedTuple):
    """``from module import name``, or ``import module`` with no name."""

    module: tuple[str, ...]
    name: str | None
    line: int


@functools.cache
def parsed(file: Path) -> ast.Module:
    """Each file is read once, whatever the number of tests."""
    return ast.parse((PACKAGE / file).read_text())


@functools.cache
def imports(file: Path) -> tuple[Import, ...]:
    """All imports of a file, those inside of functions too."""
    return tuple(imports_in(parsed(file), (PACKAGE.name, *file.parent.parts)))


def imports_in(tree: ast.Module, package: tuple[str, ...]) -> Iterator[Import]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(tuple(alias.name.split(".")), None, node.lineno)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else ()
            module = start + (tuple(node.module.split(".")) if node.module else ())
            for alias in node.names:
                yield Import(module, alias.name, node.lineno)


def wing_of(file: Path) -> str:
    """`io/gguf/names.py` stands in the wing `io`, `__init__.py` at the root in `__init__`."""
    return file.parts[0].removesuffix(".py")


def target(found: Import) -> Path | None:
    """The file of the package that an import runs; None for other libraries."""
    if found.module[0] != PACKAGE.name:
        return None
    inside = Path(*found.module[1:])
    candidates = [inside / "__init__.py", inside.with_suffix(".py") if inside.name else inside]
    if found.name is not None:
        candidates = [inside / found.name / "__init__.py", inside / f"{found.name}.py", *candidates]
    return next(candidate for candidate in candidates if candidate in FILES)


def face_of(file: Path) -> Path:
    """The file through which other wings import what stands in ``file``.

    That is the `__init__.py` of a private wing. In a public wing it is the file itself, unless
    its name, or that of a folder around it, is private: then it is the nearest face above.
    """
    parts = file.parts
    private = next((i for i, part in enumerate(parts) if part[0] == "_" and part[1] != "_"), None)
    if private is None:
        return file
    if private == 0 and len(parts) > 1:
        return Path(parts[0], "__init__.py")
    return Path(*parts[:private], "__init__.py")


def circle(files: list[Path]) -> list[Path]:
    """A circle of imports among the files, if there is one."""
    finished: set[Path] = set()

    def visit(file: Path, trail: list[Path]) -> list[Path]:
        if file in trail:
            return [*trail[trail.index(file) :], file]
        if file in finished:
            return []
        for found in imports(file):
            other = target(found)
            if other is not None and other != file:
                around = visit(other, [*trail, file])
                if around:
                    return around
        finished.add(file)
        return []

    return next(filter(None, (visit(file, []) for file in files)), [])


@pytest.mark.parametrize("wing", sorted(FLOOR_OF))
def test_imports_point_down_and_go_through_faces(wing):
    for file in (file for file in FILES if wing_of(file) == wing):
        for found in imports(file):
            where = f"{file}:{found.line}"
            library = found.module[0]
            assert library not in FOREIGN.get(wing, ()), f"{where}: {wing} imports {library}."
            other = target(found)
            if other is None or wing_of(other) == wing:
                continue
            below = FLOOR_OF[wing_of(other)] > FLOOR_OF[wing]
            assert below, f"{where} imports {other}, which does not lie below {wing}."
            face = face_of(other)
            assert other == face, f"{where} imports {other} past its face, {face}."


TESTS = Path(__file__).parent


def test_tests_import_faces_or_files_of_the_wing_that_they_mirror():
    tests = [test for test in TESTS.rglob("*.py") if "interop" not in test.parts]
    for test in tests:
        mirrored = test.relative_to(TESTS).parts[0]
        for found in imports_in(ast.parse(test.read_text()), ()):
            if not found.module or found.module[0] != PACKAGE.name:
                continue
            other = target(found)
            is_own = wing_of(other).removeprefix("_") == mirrored
            assert other == face_of(other) or is_own, f"{test}:{found.line} imports {other}."


def test_every_file_stands_in_a_wing():
    for file in FILES:
        assert wing_of(file) in FLOOR_OF, f"{file}: give {wing_of(file)!r} a floor in FLOORS."
    root = {file.name for file in FILES if len(file.parts) == 1}
    assert root == {"__init__.py", "__main__.py"}


def test_files_of_private_wings_carry_no_underscore():
    for file in FILES:
        if file.parts[0].startswith("_") and len(file.parts) > 1:
            private = [part for part in file.parts[1:] if part[0] == "_" and part != "__init__.py"]
            assert not private, f"{file} stands in a private wing already."


def test_imports_make_no_circles():
    around = circle(FILES)
    assert not around, " -> ".join(map(str, around))


@pytest.mark.parametrize("wing", sorted(wing for wing in FLOOR_OF if wing[:2] != "__"))
def test_faces_only_re_export(wing):
    faces = [file for file in FILES if wing_of(file) == wing and file.name == "__init__.py"]
    for file in (*faces, Path("__init__.py")):
        for node in parsed(file).body:
            docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            dunder = isinstance(node, ast.Assign) and all(
                isinstance(name, ast.Name) and name.id[:2] == "__" for name in node.targets
            )
            allowed = docstring or dunder or isinstance(node, ast.Import | ast.ImportFrom)
            assert allowed, f"{file}:{node.lineno} does more than re-export: {ast.unparse(node)}"


def test_other_libraries_are_used_by_their_public_names():
    """`nn._x` and `jax._src` are private, however they are reached."""
    roots = {"jax", "jnp", "lax", "nn", "flax", "optax", "orbax"}
    for file in FILES:
        for found in imports(file):
            if found.module[0] not in {PACKAGE.name, "__future__"}:
                parts = (*found.module, found.name or "")
                private = [part for part in parts if part.startswith("_")]
                assert not private, f"{file}:{found.line} imports {'.'.join(parts)}."
        for node in ast.walk(parsed(file)):
            if isinstance(node, ast.Attribute) and node.attr[0] == "_" and node.attr[1] != "_":
                start = node.value
                while isinstance(start, ast.Attribute):
                    start = start.value
                named = isinstance(start, ast.Name) and start.id in roots
                assert not named, f"{file}:{node.lineno} uses {ast.unparse(node)}."


def test_what_is_undocumented_stands_in_one_file():
    for file in FILES:
        used: set[str] = set()
        for found in imports(file):
            parts = (*found.module, *filter(None, [found.name]))
            used |= {".".join(parts[:end]) for end in (2, 3)}
        for node in ast.walk(parsed(file)):
            if isinstance(node, ast.Attribute):
                name = ast.unparse(node)
                used |= {name, ".".join(name.split(".")[-2:]), node.attr}
        for home in UNDOCUMENTED.keys() - {file}:
            found_here = used & UNDOCUMENTED[home]
            assert not found_here, f"{file} uses {found_here}: give it a function in {home}."


LOADED = """
import sys
import flax.linen, jax, optax
before = set(sys.modules)
import peft_jax
print(*sorted(set(sys.modules) - before))
"""


def test_an_import_loads_nothing_beside_jax_flax_and_optax():
    """Orbax takes as long to import as jax; the command line and quantsim are asked for by name."""
    run = subprocess.run([sys.executable, "-c", LOADED], capture_output=True, text=True, check=True)
    loaded = run.stdout.split()
    libraries = {name.partition(".")[0] for name in loaded} - sys.stdlib_module_names
    assert libraries <= {PACKAGE.name, "jax", "numpy"}
    wings = {name.split(".")[1] for name in loaded if name.startswith(f"{PACKAGE.name}.")}
    assert not wings & {"cli", "demo", "quantsim"}


def test_what_the_tests_read_is_what_python_imports():
    source = "from . import x\nfrom ..y import z\ndef f():\n  import jax.numpy"
    found = list(imports_in(ast.parse(source), ("pkg", "io")))
    assert [one[:2] for one in found] == [
        (("pkg", "io"), "x"),
        (("pkg", "y"), "z"),
        (("jax", "numpy"), None),
    ]
    assert face_of(Path("_trees/paths.py")) == Path("_trees/__init__.py")
    assert face_of(Path("quantsim/_grid.py")) == Path("quantsim/__init__.py")
    assert face_of(Path("io/files/atomic.py")) == Path("io/files/atomic.py")

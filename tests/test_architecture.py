"""The order of the rooms: imports point down, and only public names of other libraries are used."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "peft_jax"

# From top to bottom; a room imports only from lines below its own. The package's `__init__` is a
# room too: the demo above it uses the package as everyone does.
FLOORS = (
    ("__main__",),
    ("cli", "demo"),
    ("__init__",),
    ("quantsim",),
    ("io",),
    ("adapters",),
    ("initializers",),
    ("_status",),
    ("_summary",),
    ("_peft_model",),
    ("_several",),
    ("_named",),
    ("_adapted_checks",),
    ("_trainable",),
    ("_replication",),
    ("_bank_rule",),
    ("_targeting",),
    ("_tokens",),
    ("_first_values",),
    ("_target_checks",),
    ("_targets",),
    ("_config",),
    ("_config_parts",),
    ("_config_checks",),
    ("_model",),
    ("_unfuse",),
    ("_params",),
    ("_checkpoint",),
    ("_stored_trees",),
    ("_lora",),
    ("_weight_rule",),
    ("_lora_rules",),
    ("_placed",),
    ("_normalised",),
    ("_adapters",),
    ("_adapter",),
    ("_quantized",),
    ("_quantized_rules",),
    ("_wrapper",),
    ("_spec_box",),
    ("_interceptor",),
    ("_host",),
    ("_reading",),
    ("_retraced",),
    ("_state",),
    ("_rules",),
    ("_registry",),
    ("_flax_internals",),
    ("_trees",),
    ("_matrices",),
    ("_stacked",),
    ("_low_rank",),
    ("_magnitude",),
    ("_weight",),
    ("_quantized_dot",),
    ("_products",),
    ("_tiled_einsum",),
    ("_tiles",),
    ("_quantize",),
    ("_placement",),
    ("_einsum",),
    ("_stored",),
    ("_methods",),
    ("_names",),
    ("_jax_internals",),
    ("_specs",),
    ("_equation",),
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
ARRAYS_ONLY = {
    "_einsum",
    "_jax_internals",
    "_low_rank",
    "_magnitude",
    "_methods",
    "_placement",
    "_products",
    "_quantize",
    "_quantized_dot",
    "_stored",
    "_tiled_einsum",
    "_tiles",
    "_weight",
}
# What libraries export and do not document, by its dotted name (or the end of it) or as the name of
# any attribute, and the room in which it may stand.
UNDOCUMENTED = {
    "_jax_internals": (
        "jax.core",
        "jax.extend",
        "jax.interpreters",
        "jax.make_user_context",
    ),
    "_flax_internals": (
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
    ),
}
FILES = sorted(PACKAGE.rglob("*.py"))


def room_of(path: Path) -> str:
    """`peft_jax/io/files.py` stands in the room `io`, `peft_jax/_lora.py` in `_lora`."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_names(source: str, package: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """Yields every name that `source`, a module of `package`, imports: `("jax", "numpy")`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (tuple(alias.name.split(".")) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else ()
            module = tuple(node.module.split(".")) if node.module else ()
            yield from (start + module + (alias.name,) for alias in node.names)


def imports_of(path: Path) -> set[tuple[str, ...]]:
    package = path.relative_to(PACKAGE.parent).parent.parts
    return set(imported_names(path.read_text(), package))


def rooms_imported_by(path: Path) -> set[str]:
    """The rooms that a file looks into; a public name of the package is found in its `__init__`."""
    own = {name[1:] for name in imports_of(path) if name[0] == PACKAGE.name}
    return {name[0] if name and name[0] in FLOOR_OF else "__init__" for name in own}


def name_of(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_point_down(path):
    room = room_of(path)
    assert room in FLOOR_OF, f"{name_of(path)} has no place in FLOORS: give {room!r} a floor here."
    for other in rooms_imported_by(path) - {room}:
        below = FLOOR_OF[other] > FLOOR_OF[room]
        assert below, f"{name_of(path)} imports {other}, which does not lie below {room}."


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_other_libraries_are_used_by_their_public_names(path):
    for name in imports_of(path):
        if name[0] not in {PACKAGE.name, "__future__"}:
            private = [part for part in name if part.startswith("_")]
            assert not private, f"{name_of(path)} imports {'.'.join(name)}, which is private."


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_no_private_attributes_of_other_libraries(path):
    """`nn._x` and `jax._src` are private, however they are reached."""
    roots = {"jax", "jnp", "lax", "nn", "flax", "optax", "orbax"}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_"):
            start = node.value
            while isinstance(start, ast.Attribute):
                start = start.value
            named = isinstance(start, ast.Name) and start.id in roots
            dunder = node.attr.startswith("__")
            assert dunder or not named, f"{name_of(path)}:{node.lineno} uses {ast.unparse(node)}."


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_what_is_undocumented_stands_in_one_file(path):
    used = {".".join(name[:end]) for name in imports_of(path) for end in (2, 3)}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute):
            name = ast.unparse(node)
            used |= {name, ".".join(name.split(".")[-2:]), node.attr}
    for room in UNDOCUMENTED.keys() - {room_of(path)}:
        found = used & set(UNDOCUMENTED[room])
        assert not found, f"{name_of(path)} uses {found}: give it a function in {room}.py."


@pytest.mark.parametrize("room", ["_equation", "_specs"])
def test_plain_data_knows_no_array_library(room):
    libraries = {name[0] for name in imports_of(PACKAGE / f"{room}.py")}
    assert not libraries & {"jax", "jaxlib", "flax", "optax"}


@pytest.mark.parametrize(
    "path", [path for path in FILES if room_of(path) in ARRAYS_ONLY], ids=name_of
)
def test_rooms_of_arrays_know_no_modules(path):
    assert "flax" not in {name[0] for name in imports_of(path)}


def test_the_package_only_re_exports():
    statements = ast.parse((PACKAGE / "__init__.py").read_text()).body
    for node in statements:
        docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        dunder = isinstance(node, ast.Assign) and all(
            isinstance(target, ast.Name) and target.id.startswith("__") for target in node.targets
        )
        allowed = docstring or dunder or isinstance(node, ast.Import | ast.ImportFrom)
        assert allowed, f"__init__.py:{node.lineno} does more than re-export: {ast.unparse(node)}"


def test_relative_imports_resolve():
    names = set(imported_names("from . import _lora\nfrom .._params import split", ("pkg", "io")))
    assert names == {("pkg", "io", "_lora"), ("pkg", "_params", "split")}


def test_the_readme_names_every_room():
    readme = (PACKAGE.parent / "README.md").read_text()
    listing = readme.split("## How it is built")[1].split("\ntests/")[0]
    listed = set(re.findall(r"^  (\w+)(?:\.py|/) ", listing, re.MULTILINE))
    assert listed == {room_of(path) for path in FILES}

"""The rooms of the package, and that imports between them point one way."""

from __future__ import annotations

import ast
import graphlib
from pathlib import Path

import pytest

import cifar_jax

PACKAGE = Path(cifar_jax.__file__).parent
# From the ground up; all that is not listed is a command, at the top.
ROOMS = ["errors", "options", "system", "config", "cli", "data", "layout", "networks"]
ROOMS += ["torch_reference", "state_dicts", "steps", "parity", "checkpoints", "identify", "scoring"]
ROOMS += ["training"]


def imported(path: Path) -> set[str]:
    """The modules that ``path`` imports anywhere, and ``module.name`` for each imported name."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None, "imports are absolute"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


MODULES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
}
IMPORTS = {module: imported(path) for module, path in MODULES.items()}
ROOM_OF = {module: module.split(".")[1] for module in MODULES if module != "cifar_jax"}


def level(module: str) -> int:
    room = ROOM_OF[module]
    return ROOMS.index(room) if room in ROOMS else len(ROOMS)


def test_imports_point_to_lower_rooms() -> None:
    upwards = [
        f"{module} imports {name}"
        for module in ROOM_OF
        for name in IMPORTS[module] & ROOM_OF.keys()
        if ROOM_OF[name] != ROOM_OF[module] and level(name) >= level(module)
    ]
    assert not upwards


def test_no_modules_import_each_other() -> None:
    """Not even late, or for types alone."""
    graph = {module: IMPORTS[module] & ROOM_OF.keys() - {module} for module in ROOM_OF}
    tuple(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError


@pytest.mark.parametrize(
    ("library", "only"),
    [("torch", "cifar_jax.torch_reference"), ("tensorflow", "cifar_jax.data.input_pipeline")],
)
def test_slow_libraries_are_imported_in_one_place(library: str, only: str) -> None:
    users = {
        module
        for module, names in IMPORTS.items()
        if any(name.split(".")[0] == library for name in names)
    }
    assert users == {only}

"""Imports point one way, and names of Transformers that are not public stand in three files."""

import ast
from pathlib import Path

import pytest


PACKAGE = Path(__file__).parents[1] / "transformers_msd"
LAYERS = [
    {"compat"},
    {"configuration_msd", "costs", "provenance", "stats"},
    {"calibration", "tree"},
    {"modeling_msd", "verify", "cache", "committed", "outputs"},
    {"fixed_cache"},
    {"runtime"},
    {"convert", "target", "emission"},
    {"sampling"},
    {"drafters"},
    {"support", "gate"},
    {"decoding"},
    {"hook"},
    {"__init__", "tuning"},
    {"trainer"},
    {"bench"},
    {"cli"},
]
LEVEL = {module: level for level, modules in enumerate(LAYERS) for module in modules}
FILES = sorted(PACKAGE.rglob("*.py"))


def module_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_modules(path: Path) -> set[str]:
    """Modules of this package that a file imports at its top level, its type annotations aside."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "transformers_msd":
            found.add((node.module.split(".") + ["__init__"])[1])
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_downward(path: Path) -> None:
    own = module_of(path)
    for module in imported_modules(path) - {own}:
        assert LEVEL[module] < LEVEL[own], f"{own} imports {module}"
    if own not in ("trainer", "bench", "cli"):
        assert not any(name in path.read_text() for name in ("import trl", "from trl", "from datasets"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_the_hook_replaces_names_of_transformers(path: Path) -> None:
    uses = [
        node
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "setattr"
    ]
    assert not uses or path.name == "hook.py"


def test_files_are_short_enough_to_read() -> None:
    lengths = {path.name: len(path.read_text().splitlines()) for path in FILES}
    assert {name: length for name, length in lengths.items() if length > 350} == {}

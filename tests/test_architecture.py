"""The house as its own imports draw it: folders in one order, no circle, and names that are not ours in few places."""

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import transformers_msd
from transformers_msd.compat import TRAINER_NAMES


PACKAGE = Path(__file__).parents[1] / "transformers_msd"
FILES = sorted(PACKAGE.rglob("*.py"))
# Folders, and files at the root: each imports only what stands before it, or what stands in it.
ORDER = [
    {"compat"},
    {"costs", "traits"},
    {"trees"},
    {"models", "caches"},
    {"call"},
    {"target", "tracing"},
    {"drafters"},
    {"decoding"},
    {"hook"},
    {"__init__"},
    {"tuning"},
    {"trainer"},
    {"bench"},
    {"cli"},
]
LEVEL = {room: level for level, rooms in enumerate(ORDER) for room in rooms}
# Packages of the extras, and what of ours needs them.
SERVING = ("fastapi", "openai", "uvicorn")
EXTRAS = ("accelerate", "datasets", "evaluate", "matplotlib", "peft", "psutil", "rich", "trl", *SERVING)
NEED_EXTRAS = ("trainer", "bench", "cli")
# Where names of Transformers that are not public may be used; compat.py knows all of them.
PRIVATE = ("compat", "hook", "target", "caches")

PUBLIC = {
    "AutoDraftModel": "models.auto",
    "BlockDraftConfig": "models.block.configuration_block",
    "BlockDraftModel": "models.block.modeling_block",
    "CallInputs": "drafters.base",
    "Caption": "drafters.ensemble.views",
    "Committed": "target.committed",
    "Eagle3Config": "models.eagle3.configuration_eagle3",
    "Eagle3DraftModel": "models.eagle3.modeling_eagle3",
    "EnsembleDrafter": "drafters.ensemble.drafter",
    "HiViSConfig": "models.hivis.configuration_hivis",
    "HiViSDraftModel": "models.hivis.modeling_hivis",
    "MSDConfig": "models.msd.configuration_msd",
    "MSDDraftModel": "models.msd.modeling_msd",
    "Multimodal": "drafters.ensemble.views",
    "NgramDrafter": "drafters.ngrams",
    "Pooled": "drafters.ensemble.views",
    "Prompts": "drafters.ensemble.views",
    "SpeculativeDecoderOnlyOutput": "call.outputs",
    "SpeculativeStats": "call.stats",
    "SpeculativeTrace": "tracing.trace",
    "StaticRuntime": "drafters.runtime",
    "Target": "target.target",
    "TextOnly": "drafters.ensemble.views",
    "TokenTree": "trees.tree",
    "TreeAssistant": "drafters.base",
    "TreeCandidateGenerator": "drafters.base",
    "TreeConfig": "trees.tree",
    "VLMDrafter": "drafters.vlm",
    "ViSpecConfig": "models.vispec.configuration_vispec",
    "ViSpecDraftModel": "models.vispec.modeling_vispec",
    "ViewPrompt": "drafters.ensemble.views",
    "attach": "drafters.attached",
    "convert_msd_checkpoint": "models.msd.convert_msd",
    "detach": "drafters.attached",
    "disable": "hook",
    "enable": "hook",
    "speculative_trace": "tracing.trace",
}


def module_of(path: Path) -> str:
    """Name of a file's module inside the package, "" for the package itself."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str:
    return module.split(".")[0] or "__init__"


MODULES = {module_of(path): ast.parse(path.read_text()) for path in FILES}


def imports_of(tree: ast.AST) -> Iterator[tuple[str, ast.stmt]]:
    """All modules that a file imports anywhere, within functions and for annotations, too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            for alias in node.names:
                yield f"{node.module}.{alias.name}", node
        elif isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node


def own_imports(module: str) -> set[str]:
    """Modules of this package that a module imports."""
    found = set()
    for name, _ in imports_of(MODULES[module]):
        if name.split(".")[0] == "transformers_msd":
            name = name.partition(".")[2]
            while name not in MODULES:  # a name inside a module
                name = name.rpartition(".")[0]
            found.add(name)
    return found - {module}


@pytest.mark.parametrize("module", MODULES)
def test_signatures_have_types(module: str) -> None:
    for node in ast.walk(MODULES[module]):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            own = node.args
            named = [*own.posonlyargs, *own.args, *own.kwonlyargs, *filter(None, (own.vararg, own.kwarg))]
            untyped = [one.arg for one in named if one.annotation is None and one.arg not in ("self", "cls")]
            assert not untyped, f"{node.name} of {module}: {untyped}"
            assert node.returns is not None, f"{node.name} of {module} returns what?"


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_one_way(module: str) -> None:
    for other in own_imports(module):
        ours, theirs = room_of(module), room_of(other)
        assert ours == theirs or LEVEL[theirs] < LEVEL[ours], f"{module or 'the package'} imports {other}"


def test_no_file_imports_itself_by_way_of_others() -> None:
    rest = {module: own_imports(module) for module in MODULES}
    # A package is loaded before what is in it, but for the names that it takes from there.
    while free := [module for module, others in rest.items() if not others & rest.keys()]:
        for module in free:
            del rest[module]
    assert not rest


@pytest.mark.parametrize("module", MODULES)
def test_only_extras_are_imported_late_or_at_all_by_what_needs_them(module: str) -> None:
    tree = MODULES[module]
    top = {id(node) for node in tree.body}
    for name, node in imports_of(tree):
        package, *rest = name.split(".")
        assert package not in EXTRAS or room_of(module) in NEED_EXTRAS, f"{module} imports {name}"
        if id(node) not in top:
            is_extra = package in EXTRAS or (package == "transformers_msd" and rest[0] in NEED_EXTRAS)
            assert is_extra, f"{module} imports {name} within a function"


@functools.cache
def names_of_our_own() -> set[str]:
    """Attributes that the package assigns, and functions and classes that it defines."""
    nodes = [node for tree in MODULES.values() for node in ast.walk(tree)]
    assigned = {node.attr for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)}
    return assigned | {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}


@pytest.mark.parametrize("module", MODULES)
def test_private_names_of_others_stand_where_the_canary_knows_of_them(module: str) -> None:
    if room_of(module) in PRIVATE:
        return
    foreign = {
        node.attr
        for node in ast.walk(MODULES[module])
        if isinstance(node, ast.Attribute)
        and re.match(r"_[a-z]", node.attr)
        and not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"))
    }
    # What the trainers override or read; others are looked at by the canary on the import of the package.
    known = (
        {name.attribute or name.path.split(".")[-1] for name in TRAINER_NAMES} if module[:7] == "trainer" else set()
    )
    assert not foreign - names_of_our_own() - known


@pytest.mark.parametrize("module", MODULES)
def test_only_the_hook_replaces_names_of_transformers(module: str) -> None:
    uses = [
        node
        for node in ast.walk(MODULES[module])
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "setattr"
    ]
    assert not uses or module == "hook"


def test_draft_models_know_no_drafter() -> None:
    for module in MODULES:
        if room_of(module) == "models":
            assert {room_of(other) for other in own_imports(module)} <= {"compat", "models", "traits", "trees"}


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_are_importable_from_the_package(name: str) -> None:
    value = getattr(transformers_msd, name)
    assert value.__module__ == f"transformers_msd.{PUBLIC[name]}"


def test_the_package_promises_no_other_names() -> None:
    assert sorted(transformers_msd.__all__) == sorted(PUBLIC)


def test_the_root_holds_six_files_at_most() -> None:
    assert len([path for path in PACKAGE.iterdir() if path.is_file()]) <= 6


def test_files_are_short_enough_to_read() -> None:
    lengths = {module_of(path): len(path.read_text().splitlines()) for path in FILES}
    assert {module: length for module, length in lengths.items() if length > 300} == {}


def draw_house() -> str:
    """Draw the rooms in their order, with what each imports and what it says of itself."""
    lines = []
    for rooms in ORDER:
        for room in sorted(rooms):
            modules = [module for module in MODULES if room_of(module) == room]
            others = {room_of(other) for module in modules for other in own_imports(module)} - {room}
            below = ", ".join(sorted(others, key=lambda other: (LEVEL[other], other)))
            about = ast.get_docstring(MODULES["" if room == "__init__" else room]).split("\n")[0]
            name = f"{room}.py" if (PACKAGE / f"{room}.py").exists() else f"{room}/"
            lines.append(f"{name:<12} {about}\n{'':<12} <- {below or 'nothing'}")
    return "\n".join(lines)


def test_the_documentation_draws_the_house_as_it_is() -> None:
    page = (PACKAGE.parent / "docs/how_it_works.md").read_text()
    assert draw_house() in page, f"docs/how_it_works.md should hold:\n{draw_house()}"

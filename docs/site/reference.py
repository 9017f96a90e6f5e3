"""The reference, read off parsers, dataclasses and `__all__`."""

import argparse
import importlib
import pkgutil
import re
from collections.abc import Iterable
from dataclasses import MISSING, Field, fields
from inspect import get_annotations
from pathlib import Path
from typing import Any

import transformers_msd
from transformers_msd import cli, trainer
from transformers_msd.bench.settings import BenchArguments
from transformers_msd.cli.options import CommandParser
from transformers_msd.trainer.configuration import MSDTrainingConfig
from transformers_msd.trainer.recipe import HUB_FIELDS, DraftArguments


# Which page of the reference has the public names of a folder of the package; all others are on the last.
API = {
    "models": ("Draft models", ("models",)),
    "drafters": ("Drafters", ("drafters",)),
    "calls": ("Calls and trees", ()),
}


class RecordingParser(CommandParser):
    """Remembers the options of a command in their order."""

    def __init__(self, **kwargs: Any) -> None:
        self.recorded: list[argparse.Action] = []
        super().__init__(**kwargs)

    def add_argument(self, *names: str, **kwargs: Any) -> argparse.Action:
        self.recorded.append(super().add_argument(*names, **kwargs))
        return self.recorded[-1]


def pages(recipes: Iterable[Path]) -> dict[str, str]:
    """Write the pages, by name."""
    return {"command_line": command_line(), "recipes": recipe_fields(recipes), "trainer": trainer_page(), **api()}


def api() -> dict[str, str]:
    """List the public names of the package, by the folder that they are from."""
    listed: dict[str, list[str]] = {page: [] for page in API}
    for name in transformers_msd.__all__:
        folder = getattr(transformers_msd, name).__module__.split(".")[1]
        page = next((page for page, (_, folders) in API.items() if folder in folders), list(API)[-1])
        listed[page].append(f"::: transformers_msd.{name}")
    return {page: "\n\n".join([f"# {API[page][0]}", *names]) + "\n" for page, names in listed.items()}


def trainer_page() -> str:
    """List the public names of the trainer."""
    # What the trainers have in common is said of their base.
    names = [f"::: transformers_msd.trainer.{name}" for name in (*trainer.__all__, "base.DraftTrainer")]
    return "\n\n".join(["# Trainers", "From `transformers_msd.trainer`; it needs the extra `train`.", *names]) + "\n"


def command_line() -> str:
    """Describe every command with its options."""
    parser = argparse.ArgumentParser(prog="transformers-msd")
    subparsers = parser.add_subparsers(parser_class=RecordingParser)
    helps: dict[str, str] = {}
    for module in pkgutil.iter_modules(cli.__path__):
        command = None if module.name == "__main__" else importlib.import_module(f"{cli.__name__}.{module.name}")
        if hasattr(command, "add_parser"):
            before = set(subparsers.choices)
            command.add_parser(subparsers)
            helps |= dict.fromkeys(set(subparsers.choices) - before, command.__doc__.partition(": ")[2])
    parts = [
        "# Command line",
        "Options are written with underscores or dashes. `transformers-msd COMMAND --help` prints what stands here.",
    ]
    for name, command in sorted(subparsers.choices.items()):
        parts += [f"## transformers-msd {name}", sentence(command.description or helps[name])]
        options = [action for action in command.recorded if action.dest != "help"]
        if name == "bench":
            parts.append(field_table(fields(BenchArguments), "--"))
        if name == "train":
            parts.append("The fields, and recipes to begin with: [Recipes](recipes.md).")
        if options:
            parts.append(option_table(options))
    return "\n\n".join(parts) + "\n"


def recipe_fields(recipes: Iterable[Path]) -> str:
    """Describe the fields of recipes, and show those in a clone."""
    own = list(get_annotations(MSDTrainingConfig))
    training = {field.name: field for field in fields(MSDTrainingConfig)}
    drafts = {field.name for field in fields(DraftArguments)}
    parts = [
        "# Recipes",
        "A recipe is a YAML file of these fields, read by `transformers-msd train --config` "
        "([Training a draft](../training.md#2-a-recipe)).",
        "## What is trained, on what",
        field_table(fields(DraftArguments)),
        "## How it is trained",
        "Fields of `MSDTrainingConfig`, the longer words on each in its "
        "[reference](trainer.md#transformers_msd.trainer.MSDTrainingConfig).",
        field_table(training[name] for name in own),
        "## Of TRL and Transformers",
        "`MSDTrainingConfig` has all fields of TRL's `SFTConfig`. These may also stand in a recipe from the Hub; the "
        "others are taken from files on this machine and the command line alone.",
        field_table(field for name, field in training.items() if name in HUB_FIELDS - drafts - {*own}),
        "## Recipes in a clone",
        "They lie in `training/recipes`.",
    ]
    for recipe in recipes:
        parts += [f"### {recipe.name}", f"```yaml\n{recipe.read_text().rstrip()}\n```"]
    return "\n\n".join(parts) + "\n"


def option_table(options: Iterable[argparse.Action]) -> str:
    """Write options of a command as a table."""
    rows = []
    for option in options:
        name = option.option_strings[-1] if option.option_strings else option.dest.upper()
        default = "Required." if option.required else default_of(option.default)
        about = with_choices(option.help, option.choices)
        rows.append((f"`{name} ...`" if option.nargs == "+" else f"`{name}`", f"{about} {default}"))
    return table(("option", "what it is"), rows)


def field_table(own: Iterable[Field], prefix: str = "") -> str:
    """Write fields of a dataclass as a table."""
    rows = []
    for field in own:
        factory = field.default_factory
        default = field.default if factory is MISSING else factory()
        default = "Required." if default is MISSING else default_of(default)
        about = with_choices(field.metadata.get("help"), field.metadata.get("choices"))
        rows.append((f"`{prefix}{field.name}`", f"{about} {default}"))
    return table(("option" if prefix else "field", "what it is"), rows)


def with_choices(text: str | None, choices: Iterable[Any] | None) -> str:
    """Join a help text and the choices that it does not name."""
    text = sentence(text or "")
    missing = [f"`{choice}`" for choice in choices or () if f"`{choice}`" not in text]
    return f"{text} One of {', '.join(missing)}." if missing else text


def default_of(value: Any) -> str:
    """Say a default as it would be written in a recipe or on a command line."""
    if value is None or value == []:
        return ""
    if isinstance(value, list):
        value = " ".join(map(str, value))
    return f"Default `{str(value).lower() if isinstance(value, bool) else getattr(value, 'value', value)}`."


def sentence(text: str) -> str:
    """Write a help text as a sentence on one line, its options as code."""
    text = re.sub(r"(?<!`)(--\w+)", r"`\1`", " ".join(text.split()).replace("%%", "%"))
    if not text:
        return ""
    start = text[0].upper() if text.split()[0].isalpha() else text[0]
    return start + text[1:] + ("" if text[-1] in ".!?" else ".")


def table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """Write a table in Markdown."""
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.strip().replace("|", "\\|") for cell in line) + " |" for line in lines)

"""Options of commands: what they may be, and what a wrong name may have meant."""

import argparse
import difflib
from collections.abc import Iterable, Sequence
from dataclasses import fields
from typing import Any, NoReturn


def positive(text: str) -> int:
    """Read a whole number above 0."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return value


def names_of(options: Sequence[str]) -> list[str]:
    """List the names of the options on a command line, without dashes and values."""
    return [option[2:].partition("=")[0] for option in options if option.startswith("--")]


def check_names(names: Iterable[str], known: Iterable[str], what: str) -> None:
    """
    Raise a `ValueError` for a name that is not known, with the nearest that is.

    Args:
        names (`Iterable[str]`):
            Names that were given.
        known (`Iterable[str]`):
            Names there are.
        what (`str`):
            What those are, as `option of tune`.
    """
    known = sorted(known)
    for name in names:
        if name not in known:
            parts = [other for other in known if name.endswith(f"_{other}") or other.startswith(f"{name}_")]
            # A slip of the pen; else a name that was longer or shorter; else what is left.
            typos, others = (difflib.get_close_matches(name, known, 1, cutoff) for cutoff in (0.85, 0.55))
            near = [*typos, *parts, *others]
            way_out = f"Did you mean `{near[0]}`?" if near else "`--help` lists them all."
            raise ValueError(f"`{name}` is no {what}. {way_out}")


def check_fields(options: Sequence[str], classes: Iterable[type], what: str, others: Iterable[str] = ()) -> None:
    """
    Raise a `ValueError` for a name on a command line, or in the recipe it names, that is no field of some dataclasses.

    Args:
        options (`Sequence[str]`):
            The command line.
        classes (`Iterable[type]`):
            The dataclasses.
        what (`str`):
            What their fields are.
        others (`Iterable[str]`, *optional*):
            What is known besides.
    """
    from transformers_msd.trainer.recipe import read_recipe

    known = {"config", "help", *others, *(field.name for each in classes for field in fields(each))}
    names = names_of(options)
    if "--config" in options[:-1]:
        names += read_recipe(options[options.index("--config") + 1])
    # `--no_name` is how a flag is turned off.
    check_names([name if name in known else name.removeprefix("no_") for name in names], known, what)


class CommandParser(argparse.ArgumentParser):
    """Parses the options of one command, by their whole names."""

    def __init__(self, **kwargs: Any) -> None:
        self._names: list[str] = []
        super().__init__(allow_abbrev=False, **kwargs)

    def add_argument(self, *names: str, **kwargs: Any) -> argparse.Action:
        self._names += names_of(names)
        return super().add_argument(*names, **kwargs)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message.rstrip('.')}. `--help` lists all options.\n")

    def parse_known_args(
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        # Before what is required is missed: under a wrong name it is.
        if not self.get_default("takes_rest"):
            try:
                check_names(names_of(args or ()), self._names, f"option of {self.prog}")
            except ValueError as error:
                self.error(str(error))
        return super().parse_known_args(args, namespace)

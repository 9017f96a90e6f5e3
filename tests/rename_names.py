"""
A program: takes every name away that the canary looks at, and gives every function other parameters, one at a time;
prints what importing the package anew then says.
"""

import pkgutil
import sys
from importlib import import_module
from typing import Any

from transformers_msd.compat import NAMES, TRAINER_NAMES


def unload() -> None:
    """Let the package be as if it had never been imported."""
    if hook := sys.modules.get("transformers_msd.hook"):
        hook.disable()
    for name in [name for name in sys.modules if name.split(".")[0] == "transformers_msd"]:
        del sys.modules[name]


def import_and_tell(module: str) -> str:
    """Import a module of the package; return what an `ImportError` says."""
    try:
        import_module(module)
    except ImportError as error:
        return str(error)
    return "nothing"


def other_parameters(self: Any, something_else: Any) -> None:
    """Stand in for a function."""


if __name__ == "__main__":
    for module, names in (("transformers_msd", NAMES), ("transformers_msd.trainer", TRAINER_NAMES)):
        for name in names:
            path, _, attribute = name.path.replace(":", ".").rpartition(".")
            parent = pkgutil.resolve_name(path)
            # A class that lacks it would have it from the next in line.
            owners = parent.__mro__[:-1] if isinstance(parent, type) else (parent,)
            unload()
            originals = {owner: vars(owner)[attribute] for owner in owners if attribute in vars(owner)}
            for owner in originals:
                delattr(owner, attribute)
            print(f"{name.path}|{import_and_tell(module)}")
            if name.parameters is not None or name.attribute is not None:
                for owner in originals:
                    setattr(owner, attribute, other_parameters)
                print(f"{name.path}|{import_and_tell(module)}")
            for owner, original in originals.items():
                setattr(owner, attribute, original)
        assert import_and_tell(module) == "nothing"

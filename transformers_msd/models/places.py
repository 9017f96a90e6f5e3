"""Where models, drafts and data are loaded from: a place on this machine, or a repository on the Hub."""

from pathlib import Path


# Of files; no repository ends in one.
_SUFFIXES = {".json", ".jsonl", ".parquet", ".safetensors", ".bin", ".yaml", ".yml"}


def check_place(name: str, what: str) -> None:
    """
    Raise a `ValueError` for the name of a place on this machine where nothing is, so that the Hub is not asked for it.

    Args:
        name (`str`):
            A path, or a repository as `name` or `org/name`.
        what (`str`):
            What the name is for.
    """
    is_path = name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).suffix in _SUFFIXES
    if is_path and not Path(name).exists():
        raise ValueError(f"`{what}` must be a path or a repository on the Hub, got {name!r}, where nothing is.")

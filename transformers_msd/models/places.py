"""Where models, drafts and data are loaded from, a place here or a repository on the Hub, and what must be there."""

from pathlib import Path

from torch import nn
from transformers import PreTrainedModel


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


def check_output(folder: str | Path, what: str, **kept: str | None) -> None:
    """
    Raise a `ValueError` for a place that can't be a folder to write to, or where what is read would be written over.

    Args:
        folder (`str` or `Path`):
            Where something is to be written.
        what (`str`):
            What the place is called.
        kept (`str`, *optional*):
            Folders or repositories whose files must stay, by what is in them.
    """
    place = Path(folder).absolute()
    for path in (place, *place.parents):
        if path.exists() and not path.is_dir():
            where = "which is" if path == place else f"below {path},"
            raise ValueError(f"`{what}` must be a folder, new or not, got {folder}, {where} a file. Choose another.")
    for content, name in kept.items():
        if name is not None and place.exists() and Path(name).exists() and place.samefile(name):
            raise ValueError(
                f"`{what}` must not be the folder of the {content}, whose weights would be replaced, got {folder}. "
                "Choose another."
            )


def check_finite(draft: PreTrainedModel, name: str) -> None:
    """Raise a `ValueError` if weights that were loaded from `name` are NaN or infinite."""
    # Quantised ones are none of PyTorch's own type, and finite.
    plain = [(key, value) for key, value in draft.named_parameters() if type(value) is nn.Parameter]
    wrong = [key for key, value in plain if not value.is_meta and not value.isfinite().all()]
    if wrong:
        raise ValueError(
            f"Weights of a draft must be finite, got NaN or inf in {', '.join(wrong[:3])} of {name}. Load an earlier "
            "checkpoint, or train it again."
        )

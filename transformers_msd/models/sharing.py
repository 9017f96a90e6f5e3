"""What lets a repository be named in `generate`, so that nobody has to import anything: `custom_generate`."""

from pathlib import Path
from typing import Any

from transformers_msd.models.places import check_output


# What Transformers looks for (its documentation, "Custom generation methods").
FOLDER = "custom_generate"
_GENERATE = '''"""
Drafts for a model with the draft named below, so that it answers sooner: the same tokens, by transformers-msd.

    model.generate(**inputs, custom_generate="THIS REPOSITORY", trust_remote_code=True)
"""

from inspect import signature
from pathlib import Path
from weakref import WeakKeyDictionary

from transformers import GenerationMixin
from transformers_msd import AutoDraftModel


DRAFT = {draft!r}
drafts = WeakKeyDictionary()


def generate(*inputs, model, assistant_model=None, **arguments):
    if assistant_model is None:
        if model not in drafts:
            if Path(DRAFT).is_absolute() and not Path(DRAFT).is_dir():
                raise ValueError(
                    f"The draft must be where it was saved, got nothing in {{DRAFT}}. Name its place as `DRAFT` in "
                    "`custom_generate/generate.py`, or save it again with `custom_generate=True`."
                )
            drafts[model] = AutoDraftModel.from_pretrained(DRAFT, model)
        assistant_model = drafts[model]
    # Of `generate` itself all parameters come, also those that were not given.
    own = signature(GenerationMixin.generate).parameters
    given = {{name: value for name, value in arguments.items() if value is not None or name not in own}}
    # Not `model.generate`, which may be this function.
    return type(model).generate(model, *inputs, assistant_model=assistant_model, **given)
'''


def check_custom_generate(custom_generate: Any, is_uploaded: bool = False) -> None:
    """Raise a `ValueError` for what names no draft, and where it would be written after an upload."""
    if not isinstance(custom_generate, bool | str | Path | None) or custom_generate == "":
        raise ValueError(
            "`custom_generate` must be true or false, or the repository or folder that the draft is loaded from, got "
            f"{custom_generate!r}. `True` is the one it is saved to."
        )
    if custom_generate and is_uploaded:
        raise ValueError(
            "`custom_generate` must be written before the draft is uploaded, got `push_to_hub=True` with it. Call "
            "`draft.push_to_hub(repo_id, custom_generate=True)`."
        )


def write_custom_generate(folder: str | Path, draft: str | Path) -> None:
    """
    Write `custom_generate/generate.py` and its requirements.

    Args:
        folder (`str` or `Path`):
            Folder of a draft, or of its target, as it will be a repository.
        draft (`str` or `Path`):
            Repository, or folder as a `Path`, that the draft is loaded from.
    """
    check_output(folder, "folder")
    if not isinstance(draft, str | Path) or draft == "":
        raise ValueError(f"`draft` must be the repository or folder that it is loaded from, got {draft!r}. Name it.")
    place = Path(folder, FOLDER)
    place.mkdir(parents=True, exist_ok=True)
    name = draft if isinstance(draft, str) else str(Path(draft).absolute())
    (place / "generate.py").write_text(_GENERATE.format(draft=name), encoding="utf-8")
    (place / "requirements.txt").write_text("transformers-msd\n")

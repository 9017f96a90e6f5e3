"""What lets a repository be named in `generate`, so that nobody has to import anything: `custom_generate`."""

from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel


# What Transformers looks for (its documentation, "Custom generation methods").
FOLDER = "custom_generate"
_GENERATE = '''"""
Drafts for a model with {draft}, so that it answers sooner: the same tokens, by transformers-msd.

    model.generate(**inputs, custom_generate="THIS REPOSITORY", trust_remote_code=True)
"""

from weakref import WeakKeyDictionary

from transformers_msd import MSDDraftModel


DRAFT = {draft!r}
drafts = WeakKeyDictionary()


def generate(model, assistant_model=None, **arguments):
    if assistant_model is None:
        if model not in drafts:
            drafts[model] = MSDDraftModel.from_pretrained(DRAFT, dtype=model.dtype).to(model.device).eval()
        assistant_model = drafts[model]
    given = {{name: value for name, value in arguments.items() if value is not None}}
    # Not `model.generate`, which may be this function.
    return type(model).generate(model, assistant_model=assistant_model, **given)
'''


def write_custom_generate(folder: str | Path, draft: str) -> None:
    """
    Write `custom_generate/generate.py` and its requirements.

    Args:
        folder (`str` or `Path`):
            Folder of a draft, or of its target, as it will be a repository.
        draft (`str`):
            Repository or folder that the draft is loaded from.
    """
    place = Path(folder, FOLDER)
    place.mkdir(parents=True, exist_ok=True)
    (place / "generate.py").write_text(_GENERATE.format(draft=draft))
    (place / "requirements.txt").write_text(f"transformers-msd>={version('transformers-msd')}\n")


class SharedDraft(PreTrainedModel):
    """A draft that can be saved with what lets `generate` name its repository."""

    def save_pretrained(
        self, save_directory: str | Path, *args: Any, custom_generate: bool | str = False, **kwargs: Any
    ) -> None:
        """
        Save the draft as Transformers saves any model.

        Args:
            save_directory (`str` or `Path`):
                Folder to save to.
            args:
                As in [`~transformers.PreTrainedModel.save_pretrained`].
            custom_generate (`bool` or `str`, *optional*, defaults to `False`):
                Whether to write `custom_generate/generate.py` beside it, by which `generate(custom_generate=folder,
                trust_remote_code=True)` drafts without an import. A string is the repository, or the folder, that it
                will load the draft from; `save_directory` by default.
            kwargs:
                As in [`~transformers.PreTrainedModel.save_pretrained`].
        """
        if custom_generate and kwargs.get("push_to_hub"):
            raise ValueError(
                "`custom_generate` must be written before the draft is uploaded, got `push_to_hub=True` with it. Call "
                "`draft.push_to_hub(repo_id, custom_generate=True)`."
            )
        super().save_pretrained(save_directory, *args, **kwargs)
        if custom_generate:
            place = custom_generate if isinstance(custom_generate, str) else str(Path(save_directory).absolute())
            write_custom_generate(save_directory, place)

    def push_to_hub(self, repo_id: str, *, custom_generate: bool = False, **kwargs: Any) -> str:
        """
        Upload the draft as Transformers uploads any model.

        Args:
            repo_id (`str`):
                Repository to upload to.
            custom_generate (`bool`, *optional*, defaults to `False`):
                Whether to upload `custom_generate/generate.py`, too, by which `generate(custom_generate=repo_id,
                trust_remote_code=True)` drafts without an import.
            kwargs:
                As in [`~transformers.PreTrainedModel.push_to_hub`].
        """
        if not custom_generate:
            return super().push_to_hub(repo_id, **kwargs)
        # It saves by a method of the draft, and uploads what that leaves.
        self.save_pretrained = partial(self.save_pretrained, custom_generate=repo_id)
        try:
            return super().push_to_hub(repo_id, **kwargs)
        finally:
            del self.save_pretrained

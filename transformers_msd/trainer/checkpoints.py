"""Checkpoints that are whole: a run that is killed, or a disk that is full, leaves broken ones behind."""

import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


logger = logging.getLogger(__name__)
# Transformers writes it last.
_LAST_FILE = "trainer_state.json"


def is_whole(checkpoint: Path) -> bool:
    """Tell whether a checkpoint was written to its end."""
    try:
        json.loads((checkpoint / _LAST_FILE).read_text())
    except (OSError, ValueError):
        return False
    return True


def last_checkpoint(output_dir: Path) -> str | None:
    """Return the newest whole checkpoint of a run, or None if there is none."""
    checkpoints = sorted(output_dir.glob("checkpoint-*"), key=lambda path: int(path.name.removeprefix("checkpoint-")))
    for checkpoint in reversed(checkpoints):
        if is_whole(checkpoint):
            return str(checkpoint)
        logger.warning("%s was not written to its end. It is left where it is, and an older one is used.", checkpoint)
    return None


@contextmanager
def remove_if_broken(checkpoint: Path) -> Iterator[None]:
    """
    Remove the checkpoint that the body writes if it can't be written.

    Raises:
        OSError: If the body raises while it writes.
    """
    try:
        yield
    except Exception as error:  # safetensors and torch.save have errors of their own
        if is_whole(checkpoint):
            raise
        shutil.rmtree(checkpoint, ignore_errors=True)
        raise OSError(
            f"The checkpoint could not be written ({error}). What there was of it, in {checkpoint}, was removed; "
            "those before it are whole. Make room and go on with `resume_from_checkpoint=True`."
        ) from error

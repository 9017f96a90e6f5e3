"""Checkpoints that are whole: a run that is killed, or a disk that is full, leaves broken ones behind."""

import json
import logging
import re
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open


logger = logging.getLogger(__name__)
# Transformers writes it last.
_LAST_FILE = "trainer_state.json"
_NAME = re.compile(r"checkpoint-(\d+)")


def is_whole(checkpoint: Path) -> bool:
    """Tell whether a checkpoint was written to its end, and all its files are."""
    try:
        json.loads((checkpoint / _LAST_FILE).read_text())
        for file in checkpoint.glob("*.safetensors"):
            with safe_open(file, framework="pt"):
                pass
    except (OSError, ValueError, SafetensorError):
        return False
    # torch.save writes archives, whose table of contents comes last.
    pickles = [file for suffix in (".pt", ".pth", ".bin") for file in checkpoint.glob(f"*{suffix}")]
    return all(zipfile.is_zipfile(file) for file in pickles)


def check_whole(checkpoint: Path) -> None:
    """Raise a `ValueError` for a checkpoint that is not there, or was not written to its end."""
    if not is_whole(checkpoint):
        raise ValueError(
            f"{checkpoint} is no whole checkpoint. Name another, or say `resume_from_checkpoint=True` for the newest "
            "whole one."
        )


def last_checkpoint(output_dir: Path) -> str | None:
    """Return the newest whole checkpoint of a run, or None if there is none."""
    found = [(_NAME.fullmatch(path.name), path) for path in output_dir.glob("checkpoint-*") if path.is_dir()]
    for _, checkpoint in sorted([(int(match[1]), path) for match, path in found if match], reverse=True):
        if is_whole(checkpoint):
            return str(checkpoint)
        logger.warning("%s was not written to its end. It is left where it is, and an older one is used.", checkpoint)
    logger.warning("There is no whole checkpoint in %s: training begins anew.", output_dir)
    return None


def tell_what_is_missing(checkpoint: Path) -> None:
    """Warn of states that a checkpoint lacks, without which training goes on otherwise than it would have."""
    if any(checkpoint.glob("global_step*")) or any(checkpoint.glob("*_0")):
        return  # of DeepSpeed or FSDP, in folders of their own
    missing = [name for name in ("optimizer", "scheduler", "rng_state") if not any(checkpoint.glob(f"{name}*"))]
    if missing:
        logger.warning(
            "%s has no state of %s: training goes on with a new one, and its curve will differ.",
            checkpoint,
            ", ".join(missing),
        )


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

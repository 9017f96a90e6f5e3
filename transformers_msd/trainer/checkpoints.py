"""Checkpoints that are whole: a run that is killed, or a disk that is full, leaves broken ones behind."""

import json
import logging
import re
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedConfig
from transformers.utils import CONFIG_NAME

from transformers_msd.models.configuration import UNSAID
from transformers_msd.models.files import read_config


logger = logging.getLogger(__name__)
# Transformers writes it last.
_LAST_FILE = "trainer_state.json"
# What is raised where a config makes no draft.
_MAKES_NONE = (AttributeError, LookupError, StrictDataclassError, TypeError, ValueError)
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


def check_whole(checkpoint: str | Path) -> None:
    """Raise a `ValueError` for a checkpoint that is not there, or was not written to its end."""
    if not isinstance(checkpoint, str | Path) or not str(checkpoint):
        raise ValueError(
            f"`resume_from_checkpoint` must be a folder, or true for the newest whole checkpoint, got {checkpoint!r}. "
            "Leave it out to begin anew."
        )
    if not is_whole(Path(checkpoint)):
        raise ValueError(
            f"{checkpoint} is no whole checkpoint. Name another, or say `resume_from_checkpoint=True` for the newest "
            "whole one."
        )


def check_same_draft(checkpoint: Path, config: PreTrainedConfig) -> None:
    """
    Raise a `ValueError` unless a checkpoint is of the draft that is trained, as far as it holds a config.

    Args:
        checkpoint (`Path`):
            Folder of the checkpoint.
        config (`PreTrainedConfig`):
            Config of the draft that would go on from it.
    """
    file = checkpoint / CONFIG_NAME
    if not file.exists():
        return  # as some of FSDP and DeepSpeed are
    saved = read_config(checkpoint)
    theirs, ours = {"model_type": saved.get("model_type")}, {"model_type": config.model_type}
    if theirs == ours:
        ours = _compared(config.to_dict(), type(config))
        try:
            theirs = _compared(saved, type(config))
        except _MAKES_NONE as error:
            raise ValueError(
                f"{file} must be as it was saved, the config of a draft, got what makes none: "
                f"{' '.join(str(error).split())}. Name another checkpoint."
            ) from error
    names = sorted(name for name in theirs | ours if theirs.get(name) != ours.get(name))
    if names:
        expected, got = ({name: fields.get(name) for name in names} for fields in (theirs, ours))
        raise ValueError(
            f"The draft must be the one of {checkpoint} to go on from there, of {expected}, got {got}. Make it as it "
            "was, or train a new one in another `output_dir`."
        )


def _compared(fields: dict[str, Any], config_class: type[PreTrainedConfig]) -> dict[str, Any]:
    """List what a config says of what a draft computes, what is left out by its default, by whole names."""
    compared, waiting = {}, [("", json.loads(config_class.from_dict(fields).to_json_string(use_diff=False)))]
    while waiting:
        prefix, fields = waiting.pop()
        for name in fields.keys() - UNSAID:
            if isinstance(value := fields[name], dict):
                waiting.append((f"{prefix}{name}.", value))
            else:
                compared[prefix + name] = value
    return compared


def check_checkpoint(checkpoint: str | Path, config: PreTrainedConfig) -> None:
    """Raise a `ValueError` for a checkpoint that a draft of a config can't go on from, and warn of what it lacks."""
    check_whole(checkpoint)
    check_same_draft(Path(checkpoint), config)
    tell_what_is_missing(Path(checkpoint))


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

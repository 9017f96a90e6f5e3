"""Costs of pairs on this machine, as `transformers-msd tune` measured them: files below the Hugging Face folder."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from huggingface_hub.constants import HF_HOME
from transformers import PreTrainedModel
from transformers.utils import logging

from transformers_msd.compat import attention_of
from transformers_msd.costs.rounds import Costs


logger = logging.get_logger(__name__)


def costs_path(drafts: Sequence[PreTrainedModel], target: PreTrainedModel, device: torch.device | None = None) -> Path:
    """
    Return the file for a target and the models that draft for it.

    Args:
        drafts (`Sequence[PreTrainedModel]`):
            The models that draft; without weights will do.
        target ([`~transformers.PreTrainedModel`]):
            The target; without weights will do, if the device is given.
        device (`torch.device`, *optional*):
            The device that was measured, by default that of the target.
    """
    names = [f"{model.config.name_or_path} {model.num_parameters()}" for model in (*drafts, target)]
    names += conditions(target, device or target.device)
    digest = hashlib.sha256("\n".join(names).encode()).hexdigest()[:16]
    return _folder() / f"{digest}.json"


def conditions(target: PreTrainedModel, device: torch.device) -> list[str]:
    """Name what the costs of a pair hold for: dtype, attention, and a GPU, or a CPU by the threads that compute."""
    machine = f"{device.type} of {torch.get_num_threads()} threads"
    if device.type == "cuda":
        machine = torch.cuda.get_device_name(device)
    return [str(target.dtype), attention_of(target.config), machine]


def _folder() -> Path:
    return Path(HF_HOME) / "transformers_msd" / "costs_by_batch"


def save_costs(measured: Sequence[Costs], drafts: Sequence[PreTrainedModel], target: PreTrainedModel) -> Path:
    """Save what was measured with several batch sizes, 1 among them, and return the file."""
    path = costs_path(drafts, target)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps([asdict(costs) for costs in measured], indent=1) + "\n")
    unfinished.replace(path)  # whole or not there
    return path


def load_costs(drafts: Sequence[PreTrainedModel], target: PreTrainedModel) -> list[Costs] | None:
    """Load what was measured with a pair on this machine; None where nothing was, or the file is broken."""
    if not _folder().exists():  # names and sizes of models need not be looked up
        return None
    try:
        return read_costs(costs_path(drafts, target))
    except ValueError as error:
        logger.warning_once(str(error))
        return None


def read_costs(path: Path) -> list[Costs] | None:
    """
    Read what was saved, None where nothing was.

    Raises:
        ValueError: If the file holds no costs.
    """
    if not path.exists():
        return None
    try:
        measured = [Costs(**costs) for costs in json.loads(path.read_text())]
        measured[0]  # there is one
    except (IndexError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} holds no costs ({error}), and is not read. Measure again: `transformers-msd tune`."
        ) from None
    return measured

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
from transformers_msd.costs.sizing import Sizing


logger = logging.get_logger(__name__)


def costs_path(drafts: Sequence[PreTrainedModel], target: PreTrainedModel) -> Path:
    """Return the file for a target and the models that draft for it, on the device the target is on."""
    device = target.device
    machine = f"{device.type} of {torch.get_num_threads()} threads"
    if device.type == "cuda":
        machine = torch.cuda.get_device_name(device)
    names = [f"{model.config.name_or_path} {model.num_parameters()}" for model in (*drafts, target)]
    names += [str(target.dtype), attention_of(target.config), machine]
    digest = hashlib.sha256("\n".join(names).encode()).hexdigest()[:16]
    return _folder() / f"{digest}.json"


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


def load_sizing(drafts: Sequence[PreTrainedModel], target: PreTrainedModel) -> Sizing | None:
    """Make the sizing of a call from what was measured; None where nothing was, or the file is broken."""
    if not _folder().exists():  # names and sizes of models need not be looked up
        return None
    path = costs_path(drafts, target)
    if not path.exists():
        return None
    try:
        return Sizing([Costs(**costs) for costs in json.loads(path.read_text())])
    except (IndexError, TypeError, ValueError) as error:
        logger.warning_once(
            f"{path} holds no costs ({error}), and is not read. Measure again: `transformers-msd tune`."
        )
        return None

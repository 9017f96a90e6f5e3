"""Drafts that can't be trained are told, and training that learns nothing, or nothing that is a number, ends."""

import math

import torch
from accelerate import Accelerator
from torch import nn

from transformers_msd.models.base import FeatureDraftModel
from transformers_msd.models.hivis.modeling_hivis import HiViSDraftModel
from transformers_msd.models.vispec.modeling_vispec import ViSpecDraftModel


# The share of rows without a token to learn from, among what is logged.
UNSUPERVISED = "rows_without_supervision"
_WAY_OUT = "Lower `learning_rate`, train in float32 or bfloat16, and look at the rows; checkpoints before are whole."


def check_trainable(draft: FeatureDraftModel) -> None:
    """Raise a `ValueError` for a draft whose training, and so what it read there, is not known here."""
    name, config_class = type(draft).__name__, type(draft.config).__name__
    if isinstance(draft, HiViSDraftModel | ViSpecDraftModel):
        raise ValueError(
            f"`model` must be one that is trained here, got {name}, which is only loaded. Make an "
            "`MSDDraftModel(MSDConfig.from_target(target.config))`."
        )
    new = f"Train a new one: `{config_class}.from_target(target.config)`."
    if draft.reads_axes:
        raise ValueError(
            f"A draft of one axis of positions can be trained, got a {name} with "
            f"`mrope_section={draft.config.mrope_section}`. {new}"
        )
    if draft.get_input_embeddings() is not None:
        raise ValueError(
            f"A draft that reads the target's embeddings can be trained, got a {name} with `own_embeddings=True`. "
            f"{new}"
        )


def check_means(means: dict[str, float], step: int, max_length: int | None, is_training: bool) -> None:
    """
    Raise a `ValueError` where nothing was learned, or nothing that is finite; forget what tells of no fault.

    Args:
        means (`dict[str, float]`):
            What is to be logged, the share of rows without supervision among it.
        step (`int`):
            Step of the optimizer.
        max_length (`int`, *optional*):
            Where rows are cut.
        is_training (`bool`):
            Whether the rows were trained on. Those that a draft is evaluated on end nothing by having no answer.
    """
    share = means.pop(UNSUPERVISED, 0.0)
    if share == 1 and is_training:
        raise ValueError(
            f"No row up to step {step} holds a token to learn from: their answers are cut at "
            f"`max_length={max_length}`, or empty. Raise `max_length`, or choose other rows."
        )
    if share:
        means[UNSUPERVISED] = share
    wrong = sorted(name for name, mean in means.items() if not math.isfinite(mean))
    if wrong:
        raise ValueError(
            f"{', '.join(wrong)} are not finite at step {step}, and neither is what was learned since. {_WAY_OUT}"
        )


def check_weights(model: nn.Module, accelerator: Accelerator, step: int) -> None:
    """Raise a `ValueError`, in all processes, before weights are saved that are not finite."""
    parameters = [parameter.detach() for parameter in model.parameters() if parameter.requires_grad]
    parts = [parameter.to_local() if hasattr(parameter, "to_local") else parameter for parameter in parameters]
    wrong = torch.tensor(sum(not part.isfinite().all() for part in parts), device=accelerator.device)
    if accelerator.reduce(wrong, reduction="sum") > 0:
        raise ValueError(f"Weights of the draft are not finite at step {step}, and are not saved. {_WAY_OUT}")

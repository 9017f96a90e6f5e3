"""What a draft model reads of the arguments of a call."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from transformers_msd.compat import CACHE_NAMES
from transformers_msd.traits.tokens import visual_token_ids


# Inputs of a forward that belong to the target's own run.
_NOT_PROMPT = (*CACHE_NAMES, "inputs_embeds", "position_ids", "labels", "use_cache", "logits_to_keep")


def prompt_ids(arguments: Mapping[str, Any]) -> torch.Tensor | None:
    """Return the ids of the prompt among the arguments of `generate`."""
    ids = arguments.get("input_ids", arguments.get("inputs"))
    return ids if torch.is_tensor(ids) and ids.ndim == 2 and ids.shape[1] > 0 and not ids.is_floating_point() else None


def prompt_of(model: PreTrainedModel, target: PreTrainedModel, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """
    Choose from the arguments of `generate` what a draft reads of the prompt.

    A draft without pictures gets the text around them, padded on the left.
    """
    names = set(inspect.signature(type(model).forward).parameters) - set(_NOT_PROMPT)
    inputs = {name: value for name, value in arguments.items() if name in names and torch.is_tensor(value)}
    inputs["input_ids"] = ids = prompt_ids(arguments)
    mask = inputs.get("attention_mask")
    inputs["attention_mask"] = mask = torch.ones_like(ids) if mask is None else mask[:, -ids.shape[1] :]
    if visual_token_ids(model.config):
        return inputs
    visual = torch.isin(ids, torch.tensor(visual_token_ids(target.config), dtype=ids.dtype, device=ids.device))
    kept = mask.bool() & ~visual
    order = kept.int().sort(dim=1, stable=True).indices[:, -max(int(kept.sum(-1).max()), 1) :]
    kept = kept.gather(1, order)
    return {"input_ids": ids.gather(1, order).masked_fill(~kept, 0), "attention_mask": kept.to(mask.dtype)}

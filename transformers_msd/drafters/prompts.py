"""What a draft model reads of the arguments of a call."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from transformers_msd.compat import CACHE_NAMES
from transformers_msd.traits.refusal import Refusal
from transformers_msd.traits.support import TOKEN_TYPES
from transformers_msd.traits.tokens import is_of_pictures, visual_token_ids, visual_token_mask


# What tells how many prompts a call has.
_PROMPTS = ("inputs_embeds", "input_ids", "inputs")
# Inputs of a forward that belong to the target's own run.
_NOT_PROMPT = (*CACHE_NAMES, "inputs_embeds", "position_ids", "labels", "use_cache", "logits_to_keep")


def prompt_ids(arguments: Mapping[str, Any]) -> torch.Tensor | None:
    """Return the ids of the prompt among the arguments of `generate`."""
    ids = arguments.get("input_ids")
    ids = arguments.get("inputs") if ids is None else ids
    return ids if torch.is_tensor(ids) and ids.ndim == 2 and ids.shape[1] > 0 and not ids.is_floating_point() else None


def check_prompt(draft_inputs: Any) -> None:
    """Raise a `ValueError` for `draft_inputs` that are no prompts as a processor makes them."""
    ids = prompt_ids(draft_inputs) if isinstance(draft_inputs, Mapping) and "input_ids" in draft_inputs else None
    if ids is None:
        raise ValueError(
            "`draft_inputs` must be what a processor makes of prompts, with `input_ids` of shape `(batch_size, "
            f"sequence_length)`, got {_described(draft_inputs)}. Ask it for `return_tensors='pt'`."
        )
    mask = draft_inputs.get("attention_mask")
    if mask is not None and (not torch.is_tensor(mask) or mask.shape != ids.shape):
        raise ValueError(
            f"`attention_mask` of `draft_inputs` must have the shape of `input_ids`, {tuple(ids.shape)}, got "
            f"{_described(mask)}. Take both from one call of the processor."
        )


def check_batch(draft_inputs: Mapping[str, Any], arguments: Mapping[str, Any]) -> None:
    """Raise a [`Refusal`] unless `draft_inputs` hold a prompt for each of the call."""
    prompts = next((arguments[name] for name in _PROMPTS if torch.is_tensor(arguments.get(name))), None)
    found, expected = len(draft_inputs["input_ids"]), 1 if prompts is None else len(prompts)
    if found != expected:
        raise Refusal(
            f"`draft_inputs` must hold as many prompts as the call, {expected}, got {found}. Make a drafter for each "
            "call."
        )


def check_pictures(model: PreTrainedModel, target: PreTrainedModel, arguments: Mapping[str, Any]) -> None:
    """Raise a [`Refusal`] for pictures in places that a draft takes for text."""
    ours, theirs = (set(visual_token_ids(each.config)) for each in (model, target))
    if has_pictures(arguments) and ours and not ours & theirs:
        raise Refusal(
            f"A draft must have the target's tokens for pictures, {sorted(theirs)}, got {sorted(ours)}. Pass what its "
            "own processor makes of the prompt: `draft_inputs=...`."
        )


def has_pictures(arguments: Mapping[str, Any]) -> bool:
    """Tell whether there are pictures or videos among the arguments of `generate`."""
    return any(is_of_pictures(name) and torch.is_tensor(value) for name, value in arguments.items())


def _described(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{name}: {_described(each)}' for name, each in value.items())}}}"
    return f"a tensor of shape {tuple(value.shape)}" if torch.is_tensor(value) else repr(value)


def prompt_of(
    model: PreTrainedModel, target: PreTrainedModel, arguments: Mapping[str, Any], num_new: int | None = None
) -> dict[str, Any]:
    """
    Choose from the arguments of `generate` what a draft reads of the prompt.

    A draft without pictures gets the text around them, padded on the left.

    Args:
        model (`PreTrainedModel`):
            The draft.
        target (`PreTrainedModel`):
            The target.
        arguments (`dict[str, Any]`):
            The keyword arguments of `generate`.
        num_new (`int`, *optional*):
            Columns of the prompt that a cache lacks; all of them without one. Pictures of the call stand in these, and
            those before, which the cache alone has seen, are masked.
    """
    takes = (type(model).forward, type(model).prepare_inputs_for_generation)  # some hand on what they do not name
    names = {name for method in takes for name in inspect.signature(method).parameters} - {*_NOT_PROMPT}
    inputs = {name: value for name, value in arguments.items() if name in names and torch.is_tensor(value)}
    inputs["input_ids"] = ids = prompt_ids(arguments)
    mask = inputs.get("attention_mask")
    inputs["attention_mask"] = mask = torch.ones_like(ids) if mask is None else mask[:, -ids.shape[1] :]
    visual = visual_token_mask(ids, visual_token_ids(target.config))
    if visual_token_ids(model.config):
        if num_new is None or not any(map(is_of_pictures, inputs)):
            return inputs
        seen = visual & (torch.arange(ids.shape[1], device=ids.device) < ids.shape[1] - num_new)
        grown = {name: inputs[name] for name in ("input_ids", "attention_mask", *TOKEN_TYPES) if name in inputs}
        return inputs | {name: value.masked_fill(seen, 0) for name, value in grown.items()}
    kept = mask.bool() & ~visual
    order = kept.int().sort(dim=1, stable=True).indices[:, -max(int(kept.sum(-1).max()), 1) :]
    kept = kept.gather(1, order)
    return {"input_ids": ids.gather(1, order).masked_fill(~kept, 0), "attention_mask": kept.to(mask.dtype)}

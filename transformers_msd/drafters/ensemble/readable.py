"""What views can read: tokens, and pictures that a model encodes by itself."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from transformers_msd.traits.refusal import Refusal


# Inputs that say what pictures are, for a model that encodes them, and those that only some models take.
ENCODED = ("pixel_values", "image_sizes", "image_grid_thw")
_TAKEN_BY_SOME = ("pixel_attention_mask",)
_COLLECTING = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def check_no_video(inputs: Mapping[str, Any]) -> None:
    """Raise a [`Refusal`] for what views can't read."""
    if inputs.get("pixel_values_videos") is not None:
        raise Refusal("Views read pictures, got `pixel_values_videos`. Use `VLMDrafter`, or drop the video.")


def check_ids(ids: Any, name: str) -> None:
    """Raise a `ValueError` for what is no sequence of tokens."""
    if not isinstance(ids, list | tuple) or not all(type(token_id) is int and token_id >= 0 for token_id in ids):
        raise ValueError(f"`{name}` must hold ids of tokens, got {ids!r}. Encode the text by the draft's tokenizer.")


def check_encodes(model: PreTrainedModel, inputs: Mapping[str, Any], error: type[ValueError] = ValueError) -> None:
    """
    Raise an error unless a model can be asked what it makes of the pictures of a call.

    Args:
        model (`PreTrainedModel`):
            The draft model.
        inputs (`dict[str, Any]`):
            Prompts as for `generate`.
        error (`type[ValueError]`, *optional*, defaults to `ValueError`):
            Class of the error.
    """
    get_features, lack = getattr(model, "get_image_features", None), "has none"
    if get_features is not None:
        parameters = inspect.signature(get_features).parameters.values()
        needed = [one.name for one in parameters if one.default is one.empty and one.kind not in _COLLECTING]
        missing = [name for name in needed if name not in ENCODED or inputs.get(name) is None]
        if not missing:
            return
        lack = f"needs {missing}, too"
    raise error(_lacking(model, lack))


def encode(model: PreTrainedModel, inputs: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    """
    Return what a model makes of each picture, of shape `(num_tokens, hidden_size)`.

    Args:
        model (`PreTrainedModel`):
            The draft model.
        inputs (`dict[str, torch.Tensor]`):
            Prompts as for `generate`, with pictures, on its device.
    """
    check_encodes(model, inputs)
    named = inspect.signature(model.get_image_features).parameters
    names = (*ENCODED, *(name for name in _TAKEN_BY_SOME if name in named))
    vision = {name: inputs[name] for name in names if name in inputs}
    vision["pixel_values"] = vision["pixel_values"].to(model.dtype)
    features = model.get_image_features(**vision, return_dict=True).pooler_output
    if features is None:
        raise ValueError(_lacking(model, "gives what several of its layers read"))
    return [picture.flatten(0, -2) for picture in features]


def _lacking(model: PreTrainedModel, lack: str) -> str:
    return (
        f"Views ask a draft for its pictures by `get_image_features`, got {type(model).__name__}, which {lack}. Use "
        "`VLMDrafter`, another draft, or the view `text_only` alone."
    )

"""Tokens that mean something to a model: special ones, and those that stand for pictures."""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from transformers_msd.compat import PIXELS


def special_token_ids(config: PreTrainedConfig) -> dict[str, Any]:
    """Find the eos, bos and pad ids of a model, which its config holds at the top or in the text part."""
    levels = [level.to_dict() for level in (config, config.get_text_config())]
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {name: next((level[name] for level in levels if level.get(name) is not None), None) for name in names}


def visual_token_ids(config: PreTrainedConfig) -> list[int]:
    """List the ids that stand for image and video features in a model's prompts."""
    # Text configs have neither name, image-only ones lack the second; the names map to each config's own spelling.
    tower = getattr(config, "vision_config", None)  # where Phi-4-multimodal names it
    ids = [getattr(part, name, None) for part in (config, tower) for name in ("image_token_id", "video_token_id")]
    return [token_id for token_id in dict.fromkeys(ids) if token_id is not None]


def is_of_pictures(name: str) -> bool:
    """Tell by its name whether an input of a model holds pictures or videos."""
    return "pixel_values" in name or name in PIXELS


def encoded_token_ids(config: PreTrainedConfig) -> list[int]:
    """List the ids for which a model runs its towers in any forward: those that configs of its towers hold."""
    names = {"vision_config": "image_token_id", "audio_config": "audio_token_id"}
    towers = ((getattr(config, tower, None), name) for tower, name in names.items())
    ids = [getattr(tower, name, None) for tower, name in towers]
    return [token_id for token_id in ids if token_id is not None]


def visual_token_mask(input_ids: torch.Tensor, visual_token_ids: list[int]) -> torch.Tensor:
    """
    Mark the tokens that stand for image and video features.

    Args:
        input_ids (`torch.Tensor` of shape `(batch_size, sequence_length)`):
            Prompt of the target, every image expanded to its number of features by the processor.
        visual_token_ids (`list[int]`):
            Ids of the placeholders, as in `MSDConfig.visual_token_ids`.
    """
    return torch.isin(input_ids, torch.tensor(visual_token_ids, dtype=input_ids.dtype, device=input_ids.device))


def is_embedded_token(inputs_embeds: torch.Tensor, table: nn.Module) -> torch.Tensor:
    """Tell which rows of `inputs_embeds` `(batch_size, num_rows, hidden_size)` are embeddings of tokens."""

    def hashes(rows: torch.Tensor) -> torch.Tensor:
        # Rows are compared by a sum over their bits, exact whatever the order of summation.
        bits = rows.detach().contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[rows.element_size()])
        weights = torch.arange(1, 2 * bits.shape[-1], 2, device=bits.device) * 0x1E3779B97F4A7C15
        return (bits.long() * weights).sum(-1)

    # Called, not looked into: it may scale what it looks up.
    tokens = torch.arange(len(table.weight), device=inputs_embeds.device)
    known = torch.cat([hashes(table(ids).to(inputs_embeds.device)) for ids in tokens.split(1024)])
    return torch.isin(hashes(inputs_embeds.to(table.weight.dtype)), known)

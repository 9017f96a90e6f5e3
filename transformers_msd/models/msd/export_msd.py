"""Writes MSD drafts as SGLang reads those of EAGLE."""

from typing import Any

import torch
from transformers import PreTrainedConfig

from transformers_msd.models.msd.modeling_msd import MSDDraftModel
from transformers_msd.models.published import check_kept, layer_fields, llama_losses, renamed, rope_fields
from transformers_msd.traits.tokens import visual_token_ids


def msd_weights(draft: MSDDraftModel) -> dict[str, torch.Tensor]:
    """Name the weights of a draft as EAGLE does, with a bias of zeros where it has none, which is read in any case."""
    weights = renamed(draft.state_dict(), {"model.": ""})
    return {"fc.bias": torch.zeros_like(weights["fc.weight"][:, 0])} | weights


def msd_config(draft: MSDDraftModel, target_config: PreTrainedConfig) -> dict[str, Any]:
    """
    Make `config.json` as SGLang's reader of EAGLE takes it.

    Args:
        draft ([`MSDDraftModel`]):
            The draft.
        target_config (`PreTrainedConfig`):
            Config of the target.

    Raises:
        ValueError: If the reader has no place for something that the draft has.
    """
    config, text_config = draft.config, draft.config.get_text_config()
    check_kept(
        "sglang",
        llama_losses(text_config)
        | {
            # They would be placeholders, and fused with features.
            "rows of pictures": bool(config.visual_token_ids or visual_token_ids(target_config)),
            "`input_layernorm`": config.input_layernorm,
            "its own head": config.draft_vocab_size is not None,
        },
    )
    return {
        "architectures": ["LlamaForCausalLMEagle"],
        **layer_fields(text_config),
        **rope_fields(text_config),
        "tie_word_embeddings": False,
    }


__all__ = ["msd_config", "msd_weights"]

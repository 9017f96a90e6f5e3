"""Writes block drafts as the engines read them: those of DFlash, and of DSpark, in the format of speculators."""

from typing import Any

import torch
from transformers import PreTrainedConfig

from transformers_msd.models.block.modeling_block import BlockDraftModel
from transformers_msd.models.published import (
    check_kept,
    layer_fields,
    layers_read,
    reads_last,
    renamed,
    rope_fields,
    speculators_fields,
    token_maps,
)


_NAMES = {
    "model.layers.": "layers.",
    "head.": "lm_head.",
    "edge_from.": "markov_head.markov_w1.",
    "edge_to.": "markov_head.markov_w2.",
}


def block_weights(draft: BlockDraftModel) -> dict[str, torch.Tensor]:
    """Name the weights of a draft as speculators does, with what leads from its tokens to the target's and back."""
    weights = renamed(draft.state_dict(), _NAMES)
    if draft.head is None:
        return weights
    token_ids = weights.pop("draft_token_ids")
    if draft.edge_to is not None:
        weights["markov_head.markov_w2.weight"] = draft.edge_to.weight[token_ids]
    return weights | token_maps(token_ids, draft.config.get_text_config().vocab_size)


def block_config(draft: BlockDraftModel, target_model: str, target_config: PreTrainedConfig) -> dict[str, Any]:
    """
    Make `config.json` in the format of speculators: of DSpark where a row says the token behind its place or a token
    adds to the scores of those that follow, else of DFlash.

    Args:
        draft ([`BlockDraftModel`]):
            The draft.
        target_model (`str`):
            Folder or Hub repository of the target, by which the engines find it.
        target_config (`PreTrainedConfig`):
            Its config.

    Raises:
        ValueError: If the format has no place for something that the draft has.
    """
    config, text_config = draft.config, draft.config.get_text_config()
    check_kept(
        "speculators",
        {
            "rows that read the feature (`reads_feature`)": config.reads_feature,
            "rows that see those before them alone (`causal`)": config.causal,
            "a mask of its own (`mask_token_id`)": config.mask_token_id is None,
            f"visual rows {config.visual_rows} (`visual_rows`)": config.visual_rows != "kept",
            f"layers of {text_config.model_type}": text_config.model_type != "qwen3",
            "hidden states behind the target's last norm": reads_last(draft, target_config),
        },
    )
    kind = "dspark" if config.predicts_next or config.edge_rank else "dflash"
    published = {
        **speculators_fields(kind, config.num_levels, target_model, target_config),
        "architectures": ["DSparkDraftModel" if kind == "dspark" else "DFlashDraftModel"],
        "transformer_layer_config": layer_fields(text_config) | rope_fields(text_config),
        "draft_vocab_size": config.draft_vocab_size or text_config.vocab_size,
        "target_hidden_size": text_config.hidden_size,
        "aux_hidden_state_layer_ids": layers_read(draft, target_config),
        "block_size": config.block_size,
        "mask_token_id": config.mask_token_id,
        "sample_from_anchor": config.predicts_next,
        "sliding_window_non_causal": False,
        "tie_word_embeddings": False,
    }
    if kind == "dspark":
        published |= {
            "markov_rank": config.edge_rank,
            "markov_head_type": "vanilla",
            "enable_confidence_head": False,
            "confidence_head_with_markov": False,
        }
    return published


__all__ = ["block_config", "block_weights"]

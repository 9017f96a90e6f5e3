"""Writes block drafts as the engines read them: those of DFlash, 1 and 2, and of DSpark, in speculators' format."""

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
    "edge_gate.": "markov_head.gate_proj.",
}
_OF_SELECTOR = {
    "markov_head.markov_w1.weight": "candidate_selector.predecessor_codebook",
    "markov_head.markov_w2.weight": "candidate_selector.successor_codebook",
    "edge_row.": "candidate_selector.hidden_projection.",
}
_ARCHITECTURES = {"dflash": "DFlashDraftModel", "dflash2": "DFlash2DraftModel", "dspark": "DSparkDraftModel"}
_SELECTED = 16  # tokens of a level that the engines score by edges


def block_weights(draft: BlockDraftModel) -> dict[str, torch.Tensor]:
    """Name the weights of a draft as speculators does, with what leads from its tokens to the target's and back."""
    weights = renamed(draft.state_dict(), _NAMES)
    if draft.edge_row is not None:  # codebooks are tensors there, and no tables
        return renamed(weights, _OF_SELECTOR)
    if draft.head is None:
        return weights
    token_ids = weights.pop("draft_token_ids")
    if draft.edge_to is not None:
        weights["markov_head.markov_w2.weight"] = draft.edge_to.weight[token_ids]
    return weights | token_maps(token_ids, draft.config.get_text_config().vocab_size)


def block_config(draft: BlockDraftModel, target_model: str, target_config: PreTrainedConfig) -> dict[str, Any]:
    """
    Make `config.json` in the format of speculators: of DFlash 2 where blocks are convolved, of DSpark where a token
    adds to the scores of those that follow or a row says the token behind its place, else of DFlash.

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
    is_second = config.edge_type == "bilinear" or config.conv_kernel_size > 0
    windows = {window for _, window in config.layer_sights} - {None}
    is_causal = [causal for causal, window in config.layer_sights if window is not None]
    check_kept(
        "speculators",
        {
            "rows that read the feature (`reads_feature`)": config.reads_feature,
            "rows that see those before them alone (`causal`)": any(
                causal for causal, window in config.layer_sights if window is None
            )
            or len({*is_causal}) > 1,
            "windows of several sizes (`windows`)": len(windows) > 1,
            "edges or convolutions of DFlash 2 alone (`edge_type`, `conv_kernel_size`)": is_second
            and not (config.edge_type == "bilinear" and config.conv_kernel_size),
            "fewer tokens, of DFlash 2 (`draft_vocab_size`)": is_second and draft.head is not None,
            "rows that say the next token, of DFlash 2 (`predicts_next`)": is_second and config.predicts_next,
            "scales of its own (`embedding_scale`, `output_multiplier`, `final_logit_softcapping`)": bool(
                {config.embedding_scale, config.output_multiplier} - {None, 1.0} or config.final_logit_softcapping
            ),
            "a mask of its own (`mask_token_id`)": config.mask_token_id is None,
            f"visual rows {config.visual_rows} (`visual_rows`)": config.visual_rows != "kept",
            f"layers of {text_config.model_type}": text_config.model_type != "qwen3",
            "hidden states behind the target's last norm": reads_last(draft, target_config),
        },
    )
    kind = "dspark" if config.predicts_next or config.edge_rank else "dflash"
    kind = "dflash2" if is_second else kind
    layers = layer_fields(text_config) | rope_fields(text_config)
    if windows:
        layers |= {
            "layer_types": ["sliding_attention" if window else "full_attention" for _, window in config.layer_sights],
            "sliding_window": windows.pop(),
            "use_sliding_window": True,
        }
    published = {
        **speculators_fields(kind, config.num_levels, target_model, target_config),
        "architectures": [_ARCHITECTURES[kind]],
        "transformer_layer_config": layers,
        "draft_vocab_size": config.draft_vocab_size or text_config.vocab_size,
        "target_hidden_size": text_config.hidden_size,
        "aux_hidden_state_layer_ids": layers_read(draft, target_config),
        "block_size": config.block_size,
        "mask_token_id": config.mask_token_id,
        "sample_from_anchor": config.predicts_next,
        "sliding_window_non_causal": not any(is_causal),
        "tie_word_embeddings": False,
    }
    if kind == "dspark":
        published |= {
            "markov_rank": config.edge_rank,
            "markov_head_type": config.edge_type,
            "enable_confidence_head": False,
            "confidence_head_with_markov": False,
        }
    if kind == "dflash2":
        published |= {
            "conv_kernel_size": config.conv_kernel_size,
            "conv_group_size": config.conv_group_size,
            "selector_rank": config.edge_rank,
            "selector_top_k": _SELECTED,
        }
    return published


__all__ = ["block_config", "block_weights"]

"""Writes EAGLE-3 drafts as the engines read them."""

from typing import Any

import torch
from transformers import PreTrainedConfig

from transformers_msd.models.eagle3.modeling_eagle3 import Eagle3DraftModel
from transformers_msd.models.published import (
    check_kept,
    layer_fields,
    layers_read,
    llama_losses,
    reads_last,
    renamed,
    rope_fields,
    speculators_fields,
    token_maps,
)


_NAMES = {
    "speculators": {"model.layers.": "layers.", "head.": "lm_head."},
    "sglang": {"model.layers.0.": "midlayer.", "head.": "lm_head."},
}


def eagle3_weights(draft: Eagle3DraftModel, layout: str) -> dict[str, torch.Tensor]:
    """
    Name the weights of a draft as a layout does, with what leads from its tokens to the target's and back.

    Args:
        draft ([`Eagle3DraftModel`]):
            The draft.
        layout (`str`):
            `"speculators"` or `"sglang"`.
    """
    weights = renamed(draft.state_dict(), _NAMES[layout])
    token_ids, vocab_size = weights.pop("draft_token_ids"), draft.config.get_text_config().vocab_size
    # speculators has no place for a map where all tokens are drafted.
    if layout == "sglang" or len(token_ids) < vocab_size:
        weights |= token_maps(token_ids, vocab_size)
    return weights


def speculators_config(draft: Eagle3DraftModel, target_model: str, target_config: PreTrainedConfig) -> dict[str, Any]:
    """
    Make `config.json` in the format of speculators.

    Args:
        draft ([`Eagle3DraftModel`]):
            The draft.
        target_model (`str`):
            Folder or Hub repository of the target, by which the engines find it.
        target_config (`PreTrainedConfig`):
            Its config.

    Raises:
        ValueError: If the draft's layer is one that the format does not know.
    """
    text_config = draft.config.get_text_config()
    layers = layers_read(draft, target_config)
    check_kept(
        "speculators",
        {
            f"layers of {text_config.model_type}": text_config.model_type not in ("llama", "qwen3"),
            "another width than the target's": draft.config.target_hidden_size != text_config.hidden_size,
            "biases of the MLP": getattr(text_config, "mlp_bias", False),
            "hidden states behind the target's last norm": reads_last(draft, target_config),
        },
    )
    return {
        **speculators_fields("eagle3", draft.tree_config.depth, target_model, target_config),
        "architectures": ["Eagle3Speculator"],
        "transformer_layer_config": layer_fields(text_config) | _rope_fields(draft),
        "draft_vocab_size": draft.head.out_features,
        "target_hidden_size": draft.config.target_hidden_size,
        "eagle_aux_hidden_state_layer_ids": layers,
        "embed_requires_grad": draft.config.own_embeddings,
        "norm_before_residual": draft.config.norm_before_residual,
        "norm_before_fc": draft.config.norm_before_fc,
        "fc_norm": draft.config.fc_norm,
        "norm_output": draft.config.norm_output,
        "tie_word_embeddings": False,
    }


def sglang_config(draft: Eagle3DraftModel, target_config: PreTrainedConfig) -> dict[str, Any]:
    """
    Make `config.json` as SGLang's reader of EAGLE-3 takes it, which is SpecForge's.

    Args:
        draft ([`Eagle3DraftModel`]):
            The draft.
        target_config (`PreTrainedConfig`):
            Config of the target.

    Raises:
        ValueError: If the reader has no place for something that the draft has.
    """
    config, text_config = draft.config, draft.config.get_text_config()
    layers = layers_read(draft, target_config)
    is_scaled = text_config.rope_parameters["rope_type"] != "default"
    check_kept(
        "sglang",
        llama_losses(text_config)
        | {
            # It wants another norm of them than vLLM and speculators.
            "layers behind the first": text_config.num_hidden_layers > 1,
            "`norm_before_residual`": config.norm_before_residual,
            "`norm_before_fc`": config.norm_before_fc,
            "positions on axes that are scaled besides": config.mrope_section is not None and is_scaled,
            # It puts the target's in their place, wherever these fit.
            "its own embeddings": config.own_embeddings and config.target_hidden_size == text_config.hidden_size,
            "the target's embeddings, read as hidden states": min(layers) == 0,
            "hidden states behind the target's last norm": reads_last(draft, target_config),
        },
    )
    return {
        "architectures": ["LlamaForCausalLMEagle3"],
        **layer_fields(text_config),
        **_rope_fields(draft),
        "draft_vocab_size": draft.head.out_features,
        "target_hidden_size": draft.config.target_hidden_size,
        "num_aux_hidden_states": len(layers),
        # Outputs of layers are counted, one less.
        "eagle_config": {
            "use_aux_hidden_state": True,
            "eagle_aux_hidden_state_layer_ids": [layer - 1 for layer in layers],
        },
        "bias": False,
        "norm_before_residual": False,
        "fc_norm": config.fc_norm,
        "norm_output": config.norm_output,
        "tie_word_embeddings": False,
    }


def _rope_fields(draft: Eagle3DraftModel) -> dict[str, Any]:
    config = draft.config
    return rope_fields(config.get_text_config(), config.mrope_section, config.mrope_interleaved)


__all__ = ["eagle3_weights", "sglang_config", "speculators_config"]

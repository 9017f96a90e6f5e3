"""Turns published EAGLE-3 checkpoints into ours."""

import re
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, PreTrainedConfig, Qwen2Config, Qwen3Config

from transformers_msd.models.configuration import check_target_config
from transformers_msd.models.eagle3.configuration_eagle3 import Eagle3Config
from transformers_msd.models.eagle3.modeling_eagle3 import Eagle3DraftModel
from transformers_msd.models.files import find_folder, read_config, read_flag, read_rope, read_weights
from transformers_msd.models.published import EXPORTER, draft_token_ids, fill_draft, renamed
from transformers_msd.traits.tokens import special_token_ids, visual_token_ids


# Embeddings are mostly the target's, rotary frequencies follow from the config, and what the maps say is kept as ids.
_DROPPED = re.compile(r"embed_tokens\.weight|(.*\.)?rotary_emb\.inv_freq|d2t|t2d")
_TEXT_FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rms_norm_eps",
    "hidden_act",
    "max_position_embeddings",
)
_NAMES = {"midlayer.": "model.layers.0.", "layers.": "model.layers.", "lm_head.": "head."}


def is_eagle3(weights: dict[str, torch.Tensor]) -> bool:
    """Tell whether weights are those of an EAGLE-3 draft: only its layer has a norm of the feature."""
    return any(key.endswith(".hidden_norm.weight") for key in weights)


def load_eagle3_checkpoint(
    path_or_repo_id: str | Path, target_config: PreTrainedConfig, weights: dict[str, torch.Tensor] | None = None
) -> Eagle3DraftModel:
    """
    Load an EAGLE-3 checkpoint as a draft for a target: of SafeAILab, AngelSlim or SpecForge (`midlayer.*`), or in the
    format of speculators (`layers.0.*`).

    Of several layers only the first reads embeddings and features side by side, as in speculators and vLLM. Copies of
    the target's embeddings are dropped; those of a draft of another width, or that were trained, are kept, and every
    other tensor must have its place.

    Args:
        path_or_repo_id (`str` or `Path`):
            Folder, or repository on the Hub, with `config.json` and its weights.
        target_config (`PreTrainedConfig`):
            Config of the target.
        weights (`dict[str, torch.Tensor]`, *optional*):
            What its files hold, where they have been read.

    Raises:
        ValueError: If it is no such checkpoint, or belongs to another target.
    """
    check_target_config(target_config)
    folder = find_folder(path_or_repo_id)
    published = read_config(folder)
    weights = read_weights(folder) if weights is None else weights
    weights = {key.removeprefix("model."): value for key, value in weights.items()}
    if not is_eagle3(weights):
        raise ValueError(
            f"The weights in {folder} must be those of an EAGLE-3 draft, got none named `hidden_norm`. Load other "
            "drafts by `AutoDraftModel`."
        )
    token_ids = draft_token_ids(folder, weights, target_config.get_text_config().vocab_size)
    config = _draft_config(folder, published, weights, target_config, token_ids)
    own = {key: value for key, value in weights.items() if not _DROPPED.fullmatch(key)}
    own["draft_token_ids"] = token_ids
    if config.own_embeddings:
        own["embed_tokens.weight"] = weights["embed_tokens.weight"]
    return fill_draft(Eagle3DraftModel(config), renamed(own, _NAMES), folder)


def _draft_config(
    folder: Path,
    published: dict[str, Any],
    weights: dict[str, torch.Tensor],
    target_config: PreTrainedConfig,
    token_ids: torch.Tensor,
) -> Eagle3Config:
    text, target_text = published.get("transformer_layer_config", published), target_config.get_text_config()
    is_of_speculators = "transformer_layer_config" in published
    num_layers = len({key.split(".")[1] for key in weights if key.startswith("layers.")}) or 1
    theirs = published.get("target_hidden_size") or text["hidden_size"]
    if theirs != target_text.hidden_size:
        raise ValueError(
            f"The draft in {folder} is {text['hidden_size']} wide and reads a target of {theirs}, got one of "
            f"{target_text.hidden_size}. Pass the target that it was trained for."
        )
    owns = theirs != text["hidden_size"] or read_flag(folder / "config.json", published, "embed_requires_grad")
    if owns and "embed_tokens.weight" not in weights:
        raise ValueError(
            f"The draft in {folder} must hold its embeddings, `embed_tokens.weight`, got none: it is of another width "
            "than its target, or was trained with its own (`embed_requires_grad`). Copy the folder again."
        )
    file = folder / "config.json"
    if is_of_speculators and published.get("norm_before_residual") is None:
        raise ValueError(
            f"{file} must say `norm_before_residual`, got nothing, of which readers make different things. Add what "
            "the draft was trained with."
        )
    if is_of_speculators and text.get("num_hidden_layers", num_layers) != num_layers:
        raise ValueError(
            f"The weights in {folder} must be those of its config, of {text['num_hidden_layers']} layers, got those "
            f"of {num_layers}. Copy the folder again."
        )
    if "sliding_attention" in (text.get("layer_types") or ()) and text.get("sliding_window"):
        raise ValueError(
            f"The layers of an EAGLE-3 draft must see everything, got some in {folder} that see a window of "
            f"{text['sliding_window']}, which is not supported."
        )
    rope = _rope_parameters(published, text)
    section, interleaved = rope.pop("mrope_section", None), rope.pop("mrope_interleaved", False)
    fields = {name: text[name] for name in _TEXT_FIELDS if text.get(name) is not None}
    config_class = _layer_class(weights)
    if config_class is Qwen2Config:  # it has no such field of itself
        fields.setdefault("head_dim", fields["hidden_size"] // fields["num_attention_heads"])
    text_config = config_class(
        **fields | special_token_ids(target_config),
        vocab_size=target_text.vocab_size,
        num_hidden_layers=num_layers,
        attention_bias=any(key.endswith("q_proj.bias") for key in weights),
        rope_parameters=rope,
        tie_word_embeddings=False,
    )
    vocab_size = target_text.vocab_size
    return Eagle3Config(
        text_config=text_config,
        feature_layers=_feature_layers(published, target_text.num_hidden_layers),
        target_hidden_size=theirs,
        own_embeddings=owns,
        draft_vocab_size=None if len(token_ids) == vocab_size else len(token_ids),
        norm_before_residual=read_flag(file, published, "norm_before_residual"),
        fc_norm=any(key.startswith("fc_norm.") for key in weights),
        norm_before_fc="input_norm.weight" in weights,
        norm_output=read_flag(file, published, "norm_output"),
        visual_token_ids=visual_token_ids(target_config),
        mrope_section=section,
        mrope_interleaved=interleaved,
    )


def _layer_class(weights: dict[str, torch.Tensor]) -> type[PreTrainedConfig]:
    """Choose the layer: Qwen3 norms queries and keys, Qwen2 has biases there and of values, Llama has all or none."""
    ends = {key.partition(".self_attn.")[2] for key in weights}
    if "q_norm.weight" in ends:
        return Qwen3Config
    return Qwen2Config if "q_proj.bias" in ends and "o_proj.bias" not in ends else LlamaConfig


def _feature_layers(published: dict[str, Any], num_layers: int) -> list[int]:
    """Layers as `output_hidden_states` numbers them; some configs count outputs of layers, one less."""
    given = published.get("eagle_aux_hidden_state_layer_ids")
    if given is None:
        given = (published.get("eagle_config") or {}).get("eagle_aux_hidden_state_layer_ids")
        given = published.get("aux_hidden_states_layer_ids") if given is None else given
        given = None if given is None else [layer + 1 for layer in given]
    layers = given or [2, num_layers // 2, num_layers - 3]
    if not all(isinstance(layer, int) and 0 <= layer < num_layers for layer in layers):
        raise ValueError(
            f"The draft reads hidden states {layers} of its target, got one of {num_layers} layers. Pass the target "
            "that it was trained for."
        )
    return layers


def _rope_parameters(published: dict[str, Any], text: dict[str, Any]) -> dict[str, Any]:
    """Settings of the positions, with `mrope_section` and `mrope_interleaved` where they have several axes."""
    scaling = read_rope(text)
    if scaling["rope_type"] == "mrope":
        scaling["rope_type"] = "default"
    if published.get("exported_by") == EXPORTER:
        return scaling
    # What trained them does not read all of this. AngelSlim's axes take turns, and where there is one axis the base is
    # the default; SpecForge's lie in chunks, of that base.
    trainer, has_axes = published.get("architectures"), bool(scaling.get("mrope_section"))
    if trainer == ["Eagle3LlamaForCausalLM"] or (trainer == ["LlamaForCausalLMEagle3"] and has_axes):
        scaling["mrope_interleaved"] = trainer == ["Eagle3LlamaForCausalLM"]
        if not (scaling["mrope_interleaved"] and has_axes):
            scaling["rope_theta"] = 10000.0
    return scaling


__all__ = ["is_eagle3", "load_eagle3_checkpoint"]

"""Turns published MSD checkpoints into ours."""

import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, PreTrainedConfig, Qwen2Config

from transformers_msd.models.configuration import check_target_config
from transformers_msd.models.files import find_folder, read_config, read_rope, read_weights
from transformers_msd.models.msd.configuration_msd import MSDConfig
from transformers_msd.models.msd.modeling_msd import MSDDraftModel
from transformers_msd.models.published import fill_draft
from transformers_msd.traits.decoders import check_decoder
from transformers_msd.traits.tokens import special_token_ids, visual_token_ids


# The draft shares the target's embeddings, and rotary frequencies follow from the config.
_DROPPED = re.compile(r"embed_tokens\.weight|(.*\.)?rotary_emb\.inv_freq")
_TEXT_FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "rms_norm_eps",
    "hidden_act",
    "max_position_embeddings",
)
# How positions may be scaled: in no way that changes with their number.
_ROPES = ("default", "linear", "llama3", "yarn")


def convert_msd_checkpoint(
    path_or_repo_id: str | Path, target_config: PreTrainedConfig, weights: dict[str, torch.Tensor] | None = None
) -> MSDDraftModel:
    """
    Load a checkpoint in the published layout, for example `lucylyn/MSD-LLaVA1.5-7B`, as a draft for a target. A draft
    of ours is loaded as it is.

    The published drafts were trained with copies of the target's embeddings, of another vocabulary size than the
    target has in Transformers; these copies are dropped. Every other weight must have its place.

    Args:
        path_or_repo_id (`str` or `Path`):
            Folder, or repository on the Hub, with `config.json` and `model.safetensors` or `pytorch_model.bin`.
        target_config (`PreTrainedConfig`):
            Config of the target.
        weights (`dict[str, torch.Tensor]`, *optional*):
            What its files hold, where they have been read.
    """
    check_target_config(target_config)
    folder = find_folder(path_or_repo_id)
    published = read_config(folder)
    if published.get("model_type") == MSDConfig.model_type:
        return _load_ours(folder, target_config)
    weights = read_own_weights(folder, weights)
    return fill_draft(MSDDraftModel(_draft_config(published, weights, target_config)), _named(weights), folder)


def read_own_weights(folder: Path, weights: dict[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
    """Read the weights of a published draft, unless they are given, without copies of what its target has."""
    weights = read_weights(folder) if weights is None else weights
    return {key: value for key, value in weights.items() if not _DROPPED.fullmatch(key)}


def eagle_layer(
    published: dict[str, Any], weights: dict[str, torch.Tensor], target_config: PreTrainedConfig
) -> PreTrainedConfig:
    """
    Make the config of the layer that the code of EAGLE-1 (arXiv 2401.15077) makes, and those who build on it: heads
    and biases as the tensors have them, and positions on one axis.

    Args:
        published (`dict[str, Any]`):
            Config of the published draft.
        weights (`dict[str, torch.Tensor]`):
            Its weights.
        target_config (`PreTrainedConfig`):
            Config of the target.

    Raises:
        ValueError: If no layer can be made of it, or the target is of another width.
    """
    target_text = target_config.get_text_config()
    theirs, names = target_text.to_dict(), target_text.attribute_map
    known = {name: theirs.get(names.get(name, name)) for name in _TEXT_FIELDS} | {"num_hidden_layers": 1} | published
    fields = {name: known[name] for name in _TEXT_FIELDS if known.get(name) is not None}
    config_class = Qwen2Config if "layers.0.self_attn.q_proj.bias" in weights else LlamaConfig
    base = special_token_ids(target_config) | {"vocab_size": target_text.vocab_size, "tie_word_embeddings": False}
    fields |= _read_heads(weights, fields.get("num_attention_heads"))
    check_decoder(config_class, base, fields)
    fields["rope_parameters"] = _read_positions(published)
    size = fields["hidden_size"]
    if size != target_text.hidden_size:
        raise ValueError(
            f"The draft is {size} wide and reads a target as wide, got one of {target_text.hidden_size}. Pass the "
            "target that it was trained for."
        )
    return config_class(**base, **fields)


def _read_heads(weights: dict[str, torch.Tensor], num_heads: Any) -> dict[str, int]:
    """Read the size of heads, and how many are those of keys, off tensors that have so many heads."""
    tensors = [weights.get(f"layers.0.self_attn.{name}_proj.weight") for name in "qk"]
    if not isinstance(num_heads, int) or num_heads < 1 or any(own is None or not own.ndim for own in tensors):
        return {}
    of_queries, of_keys = map(len, tensors)
    head_dim = of_queries // num_heads
    if not of_keys or of_queries % of_keys or of_queries % num_heads or of_keys % head_dim:
        return {}
    return {"head_dim": head_dim, "num_key_value_heads": of_keys // head_dim}


def _read_positions(published: dict[str, Any]) -> dict[str, Any]:
    """Read how positions are turned, which the published code reads of the draft's own config, and on one axis."""
    text = published.get("text_config")  # where it is the config of a target, cut
    read = read_rope((text if isinstance(text, dict) else {}) | published)
    rope = {name: value for name, value in read.items() if not name.startswith("mrope_")}
    if rope["rope_type"] == "mrope":
        rope["rope_type"] = "default"
    if rope["rope_type"] not in _ROPES:
        raise ValueError(
            f"The positions of a published draft must be scaled as in {', '.join(_ROPES)}, got {rope}, which is not "
            "supported."
        )
    return rope


def _load_ours(folder: Path, target_config: PreTrainedConfig) -> MSDDraftModel:
    draft = MSDDraftModel.from_pretrained(folder)
    text_config = draft.config.get_text_config()
    # Raises unless they are the target's.
    MSDConfig.from_target(target_config, hidden_size=text_config.hidden_size, vocab_size=text_config.vocab_size)
    return draft.eval()


def _draft_config(
    published: dict[str, Any], weights: dict[str, torch.Tensor], target_config: PreTrainedConfig
) -> MSDConfig:
    own = {
        # The published code reads this name and takes a missing one as true; some that have one say they have none.
        "fc_bias": published.get("bias", True) or "fc.bias" in weights,
        "input_layernorm": "layers.0.input_layernorm.weight" in weights,
        "visual_token_ids": visual_token_ids(target_config),
    }
    # EAGLE's code makes a layer of its own kind, whatever the target's is.
    config = MSDConfig(text_config=eagle_layer(published, weights, target_config), **own)
    names = _named(weights).keys()
    if _names(config) != names:
        with suppress(ValueError):  # which would tell of settings that nobody made
            other = _of_targets_kind(published, weights, target_config, own)
            return other if _names(other) == names else config
    return config


def _of_targets_kind(
    published: dict[str, Any],
    weights: dict[str, torch.Tensor],
    target_config: PreTrainedConfig,
    own: dict[str, Any],
) -> MSDConfig:
    """Make the config of a draft of layers of the target's own kind, as some train them."""
    target_text = target_config.get_text_config()
    known, heads = target_text.to_dict(), _read_heads(weights, published.get("num_attention_heads"))
    fields = {name: published[name] for name in _TEXT_FIELDS if name in published} | heads
    fields = {"num_hidden_layers": 1} | {name: value for name, value in fields.items() if name in known}
    theirs = known.get("rope_parameters") or {}
    if "rope_type" in theirs:  # some say it for each kind of layer
        fields["rope_parameters"] = theirs | _read_positions(published)
    return MSDConfig.from_target(target_config, **fields, **own)


def _names(config: MSDConfig) -> set[str]:
    with torch.device("meta"):
        return set(MSDDraftModel(config).state_dict())


def _named(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key if key.startswith("fc.") else f"model.{key}": value for key, value in weights.items()}


__all__ = ["convert_msd_checkpoint", "eagle_layer", "read_own_weights"]

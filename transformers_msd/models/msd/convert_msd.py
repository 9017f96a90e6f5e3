"""Turns published MSD checkpoints into ours."""

import re
from pathlib import Path

import torch
from transformers import PreTrainedConfig

from transformers_msd.models.configuration import check_target_config
from transformers_msd.models.msd.configuration_msd import MSDConfig
from transformers_msd.models.msd.modeling_msd import MSDDraftModel
from transformers_msd.models.places import check_finite
from transformers_msd.models.published import cast_weights, check_weights, find_folder, read_config, read_weights


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


def convert_msd_checkpoint(path_or_repo_id: str | Path, target_config: PreTrainedConfig) -> MSDDraftModel:
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
    """
    check_target_config(target_config)
    folder = find_folder(path_or_repo_id)
    published = read_config(folder)
    if published.get("model_type") == MSDConfig.model_type:
        return _load_ours(folder, target_config)
    weights = {key: value for key, value in read_weights(folder).items() if not _DROPPED.fullmatch(key)}

    draft = MSDDraftModel(_draft_config(published, weights, target_config))
    weights = {key if key.startswith("fc.") else f"model.{key}": value for key, value in weights.items()}
    check_weights(folder, weights, draft.state_dict())
    draft = cast_weights(draft, weights["fc.weight"].dtype)
    draft.load_state_dict(weights)
    check_finite(draft, str(path_or_repo_id))
    return draft.eval()


def _load_ours(folder: Path, target_config: PreTrainedConfig) -> MSDDraftModel:
    draft = MSDDraftModel.from_pretrained(folder)
    text_config = draft.config.get_text_config()
    # Raises unless they are the target's.
    MSDConfig.from_target(target_config, hidden_size=text_config.hidden_size, vocab_size=text_config.vocab_size)
    return draft.eval()


def _draft_config(published: dict, weights: dict[str, torch.Tensor], target_config: PreTrainedConfig) -> MSDConfig:
    fields = {name: published[name] for name in _TEXT_FIELDS if name in published}
    if "rope_theta" in published:
        rope_parameters = target_config.get_text_config().rope_parameters
        fields["rope_parameters"] = {**rope_parameters, "rope_theta": published["rope_theta"]}
    return MSDConfig.from_target(
        target_config,
        **{"num_hidden_layers": 1, **fields},
        # The published code reads this name and takes a missing one as true; some that have one say they have none.
        fc_bias=published.get("bias", True) or "fc.bias" in weights,
        input_layernorm="layers.0.input_layernorm.weight" in weights,
    )


__all__ = ["convert_msd_checkpoint"]

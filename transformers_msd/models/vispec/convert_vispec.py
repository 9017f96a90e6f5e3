"""Turns published ViSpec checkpoints into ours."""

from pathlib import Path

import torch
from transformers import PreTrainedConfig

from transformers_msd.models.configuration import check_target_config
from transformers_msd.models.files import find_folder, read_config
from transformers_msd.models.msd.convert_msd import eagle_layer, read_own_weights
from transformers_msd.models.published import fill_draft, renamed
from transformers_msd.models.vispec.configuration_vispec import ViSpecConfig
from transformers_msd.models.vispec.modeling_vispec import ViSpecDraftModel
from transformers_msd.traits.tokens import visual_token_ids


_NAMES = {"layers.": "model.layers.", "imadpt.": "adaptor.", "img_fc.": "image_fc."}


def is_vispec(weights: dict[str, torch.Tensor]) -> bool:
    """Tell whether weights are those of a ViSpec draft: only it has an adaptor of pictures."""
    return any(key.startswith("imadpt.") for key in weights)


def load_vispec_checkpoint(
    path_or_repo_id: str | Path, target_config: PreTrainedConfig, weights: dict[str, torch.Tensor] | None = None
) -> ViSpecDraftModel:
    """
    Load a ViSpec checkpoint as a draft for a target.

    Copies of the target's embeddings are dropped; every other tensor must have its place.

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
    weights = read_own_weights(folder, weights)
    queries = weights.get("imadpt.q")
    if queries is None or queries.ndim != 3:
        raise ValueError(
            "A ViSpec draft must hold its queries, `imadpt.q` of shape `(num_queries, num_heads, head_dim)`, got "
            f"{'none' if queries is None else tuple(queries.shape)} in {folder}. Copy the folder again."
        )
    config = ViSpecConfig(
        text_config=eagle_layer(read_config(folder), weights, target_config),
        visual_token_ids=visual_token_ids(target_config),
        fc_bias="fc.bias" in weights,
        input_layernorm="layers.0.input_layernorm.weight" in weights,
        num_queries=len(queries),
        adaptor_bias="imadpt.k_proj.bias" in weights,
    )
    return fill_draft(ViSpecDraftModel(config), renamed(weights, _NAMES), folder)


__all__ = ["is_vispec", "load_vispec_checkpoint"]

"""Turns published HiViS checkpoints into ours."""

from pathlib import Path

import torch
from transformers import PreTrainedConfig

from transformers_msd.models.configuration import check_target_config
from transformers_msd.models.files import find_folder, read_config
from transformers_msd.models.hivis.configuration_hivis import HiViSConfig
from transformers_msd.models.hivis.modeling_hivis import HiViSDraftModel
from transformers_msd.models.msd.convert_msd import eagle_layer, read_own_weights
from transformers_msd.models.published import fill_draft
from transformers_msd.traits.tokens import visual_token_ids


def is_hivis(weights: dict[str, torch.Tensor]) -> bool:
    """Tell whether weights are those of a HiViS draft: only its `fc` reads three vectors."""
    fc = weights.get("fc.weight")
    return "residual" in weights or (fc is not None and fc.shape[-1] == 3 * len(fc))


def load_hivis_checkpoint(
    path_or_repo_id: str | Path, target_config: PreTrainedConfig, weights: dict[str, torch.Tensor] | None = None
) -> HiViSDraftModel:
    """
    Load a HiViS checkpoint as a draft for a target.

    Copies of the target's embeddings are dropped; every other tensor must have its place. What `fc` makes of the
    vectors of each depth is computed once.

    Args:
        path_or_repo_id (`str` or `Path`):
            Folder, or repository on the Hub, with `config.json` and its weights.
        target_config (`PreTrainedConfig`):
            Config of the target, by which it is known what is left out with a picture.
        weights (`dict[str, torch.Tensor]`, *optional*):
            What its files hold, where they have been read.

    Raises:
        ValueError: If it is no such checkpoint, or belongs to another target.
    """
    check_target_config(target_config)
    folder = find_folder(path_or_repo_id)
    weights = read_own_weights(folder, weights)
    layer = eagle_layer(read_config(folder), weights, target_config)
    weights = _fold(weights, layer.hidden_size, folder)
    # Where a token opens each picture, it goes with it, as do the one that closes it and the next.
    is_framed = getattr(target_config, "vision_start_token_id", None) is not None
    config = HiViSConfig(
        text_config=layer,
        visual_token_ids=visual_token_ids(target_config),
        num_biases=len(weights["biases"]),
        tokens_before=1 if is_framed else 0,
        tokens_behind=2 if is_framed else 0,
        renumbers=not is_framed,
        input_layernorm="layers.0.input_layernorm.weight" in weights,
    )
    own = {key if key in ("fc.weight", "biases") else f"model.{key}": value for key, value in weights.items()}
    return fill_draft(HiViSDraftModel(config), own, folder)


def _fold(weights: dict[str, torch.Tensor], size: int, folder: Path) -> dict[str, torch.Tensor]:
    """Replace the vectors of each depth, which all rows of it read, by what `fc` makes of them."""
    vectors, fc, bias = (weights.get(name) for name in ("residual", "fc.weight", "fc.bias"))
    if vectors is None:
        raise ValueError(
            f"A HiViS draft must hold the vectors of each depth as `residual`, got {sorted(weights)} in {folder}. "
            "Those of earlier versions are not supported."
        )
    number = len(vectors) if vectors.ndim else 1
    shapes = {"residual": (number, size), "fc.weight": (size, 3 * size), "fc.bias": (size,)}
    wrong = {
        name: f"expected {shape}, got {tuple(weights[name].shape) if name in weights else 'none'}"
        for name, shape in shapes.items()
        if (name in weights or name == "fc.weight") and tuple(getattr(weights.get(name), "shape", ())) != shape
    }
    if wrong:
        raise ValueError(
            f"The weights in {folder} do not have the sizes of a HiViS draft for this target: {wrong}. Check that the "
            "target is the one the draft was trained for."
        )
    folded = vectors.float() @ fc[:, 2 * size :].float().T
    folded = folded if bias is None else folded + bias.float()
    rest = {name: value for name, value in weights.items() if name not in shapes}
    return rest | {"fc.weight": fc[:, : 2 * size], "biases": folded.to(fc.dtype)}


__all__ = ["is_hivis", "load_hivis_checkpoint"]

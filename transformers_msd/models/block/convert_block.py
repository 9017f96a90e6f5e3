"""Turns published block drafts of DFlash's layout into ours."""

from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, PreTrainedConfig, Qwen3Config

from transformers_msd.models.block.configuration_block import BlockDraftConfig
from transformers_msd.models.block.modeling_block import BlockDraftModel
from transformers_msd.models.configuration import check_target_config
from transformers_msd.models.published import fill_draft, find_folder, read_config, read_weights, renamed
from transformers_msd.traits.tokens import special_token_ids, visual_token_ids


_TEXT_FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rms_norm_eps",
    "hidden_act",
    "max_position_embeddings",
    "attention_bias",
)
# Settings of drafts of this family that compute something else.
_NOT_READ = ("draft_shift", "mrope_section", "conv_kernel_size", "selector_rank")
_WANTED = ("rope_is_neox_style",)  # or what is rotated lies in pairs


def is_dflash(weights: dict[str, torch.Tensor]) -> bool:
    """Tell whether weights are those of a block draft: only it has one norm of what is fused for all of its layers."""
    return any(key.removeprefix("model.") == "hidden_norm.weight" for key in weights)


def load_dflash_checkpoint(
    path_or_repo_id: str | Path, target_config: PreTrainedConfig, weights: dict[str, torch.Tensor] | None = None
) -> BlockDraftModel:
    """
    Load a block draft of DFlash's layout (arXiv 2602.06036), JetSpec's among them, as a draft for a target.

    Args:
        path_or_repo_id (`str` or `Path`):
            Folder, or repository on the Hub, with `config.json` and its weights.
        target_config (`PreTrainedConfig`):
            Config of the target.
        weights (`dict[str, torch.Tensor]`, *optional*):
            What its files hold, where they have been read.

    Raises:
        ValueError: If it is no such checkpoint, belongs to another target, or computes what is not supported: another
            width than the target's, layers that see a window, convolutions or candidate selectors (DFlash 2).
    """
    check_target_config(target_config)
    folder = find_folder(path_or_repo_id)
    published = read_config(folder)
    weights = read_weights(folder) if weights is None else weights
    weights = {key.removeprefix("model."): value for key, value in weights.items()}
    if not is_dflash(weights) or "fc.weight" not in weights:
        raise ValueError(
            f"The weights in {folder} must be those of a block draft, got none named `fc` and `hidden_norm`. Load "
            "other drafts by `AutoDraftModel`."
        )
    draft = BlockDraftModel(_draft_config(folder, published, weights, target_config))
    return fill_draft(draft, renamed(weights, {"layers.": "model.layers."}), folder)


def _draft_config(
    folder: Path, published: dict[str, Any], weights: dict[str, torch.Tensor], target_config: PreTrainedConfig
) -> BlockDraftConfig:
    own, target_text = published.get("dflash_config") or {}, target_config.get_text_config()
    size, num_layers = target_text.hidden_size, target_text.num_hidden_layers
    theirs = {
        "hidden_size": published.get("hidden_size"),
        "target_hidden_size": own.get("target_hidden_size", size),
        "num_target_layers": published.get("num_target_layers", num_layers),
    }
    if theirs != {"hidden_size": size, "target_hidden_size": size, "num_target_layers": num_layers}:
        raise ValueError(
            f"The draft in {folder} must be as wide as its target and made for one of as many layers, {size} and "
            f"{num_layers}, got {theirs}. Pass the target that it was trained for."
        )
    scaling = dict(published.get("rope_parameters") or published.get("rope_scaling") or {})
    settings = published | scaling | own
    unknown = [name for name in _NOT_READ if settings.get(name)]
    unknown += [f"{name}=false" for name in _WANTED if not settings.get(name, True)]
    if unknown:
        raise ValueError(f"A block draft must do without {', '.join(unknown)}, got {folder}, which is not supported.")
    missing = [name for name, place in (("block_size", published), ("mask_token_id", own)) if name not in place]
    if missing:
        raise ValueError(f"{folder / 'config.json'} must say {' and '.join(missing)}, got nothing. Copy it again.")
    num_read = weights["fc.weight"].shape[1] // size
    outputs = own.get("target_layer_ids")
    if outputs is None:
        outputs = [round(1 + place * (num_layers - 4) / max(num_read - 1, 1)) for place in range(num_read)]
    if not all(isinstance(layer, int) and 0 <= layer < num_layers for layer in outputs):
        raise ValueError(
            f"The draft reads layers {outputs} of its target, got one of {num_layers}. Pass the target that it was "
            "trained for."
        )
    scaling["rope_type"] = scaling.pop("type", None) or scaling.get("rope_type") or "default"
    scaling["rope_theta"] = scaling.get("rope_theta") or published.get("rope_theta") or 10000.0
    # Qwen3's layer has norms of queries and keys besides.
    has_norms = any(key.endswith("q_norm.weight") for key in weights)
    windows = ("layer_types", "sliding_window", "use_sliding_window") if has_norms else ()
    text_config = (Qwen3Config if has_norms else LlamaConfig)(
        **{name: published[name] for name in (*_TEXT_FIELDS, *windows) if published.get(name) is not None},
        **special_token_ids(target_config),
        vocab_size=target_text.vocab_size,
        rope_parameters=scaling,
        tie_word_embeddings=False,
    )
    return BlockDraftConfig(
        text_config=text_config,
        # They name outputs of layers, one less.
        feature_layers=[layer + 1 for layer in outputs],
        block_size=published["block_size"],
        causal=bool(own.get("causal_head") or own.get("causal")),
        predicts_next=False,
        mask_token_id=own["mask_token_id"],
        visual_token_ids=visual_token_ids(target_config),
    )


__all__ = ["is_dflash", "load_dflash_checkpoint"]

"""Turns published block drafts, of DFlash's and of DSpark's layouts, into ours."""

import re
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, PreTrainedConfig, Qwen3Config

from transformers_msd.models.block.configuration_block import EDGE_TYPES, BlockDraftConfig
from transformers_msd.models.block.modeling_block import BlockDraftModel
from transformers_msd.models.configuration import check_target_config
from transformers_msd.models.files import find_folder, read_config, read_rope, read_weights
from transformers_msd.models.published import draft_token_ids, fill_draft, renamed
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
_NOT_READ = (
    *("attention_sink_bias", "draft_shift", "dspark_bonus_anchor", "enable_qwen35_gated_q_proj"),
    *("log_snr_conditioning", "mrope_section", "swa_window_size", "use_swa"),
)
# Embeddings are the target's, rotary frequencies follow from the config, what the maps say is kept as ids, and how
# sure a draft is of each token its trees tell by their scores.
_DROPPED = re.compile(
    r"embed_tokens\.weight|verifier_(lm_head|norm)\.weight|confidence_head\..*|(.*\.)?rotary_emb\.inv_freq|d2t|t2d"
)
_NAMES = {
    "layers.": "model.layers.",
    "lm_head.": "head.",
    "markov_head.markov_w1.": "edge_from.",
    "markov_head.markov_w2.": "edge_to.",
    "markov_head.gate_proj.": "edge_gate.",
    "candidate_selector.predecessor_codebook.": "edge_from.",
    "candidate_selector.successor_codebook.": "edge_to.",
    "candidate_selector.hidden_projection.": "edge_row.",
}
_CODEBOOK = re.compile(r"candidate_selector\.(predecessor|successor)_codebook")
_ROTATED = re.compile(r"layers\.\d+\.self_attn\.[qk]_(proj|norm)\.(weight|bias)")


def is_dflash(weights: dict[str, torch.Tensor]) -> bool:
    """Tell whether weights are those of a block draft: only it has one norm of what is fused for all of its layers."""
    return any(key.removeprefix("model.") == "hidden_norm.weight" for key in weights)


def load_dflash_checkpoint(
    path_or_repo_id: str | Path, target_config: PreTrainedConfig, weights: dict[str, torch.Tensor] | None = None
) -> BlockDraftModel:
    """
    Load a block draft as a draft for a target: of the layouts of DFlash (arXiv 2602.06036), JetSpec's among them, of
    DFlash 2 (github.com/z-lab/dflash) or of DSpark (arXiv 2607.05147), as their makers published them or in the format
    of speculators.

    Copies of the target's embeddings and head are dropped, and so is DSpark's confidence head; a head of fewer tokens
    is kept. Every other tensor must have its place.

    Args:
        path_or_repo_id (`str` or `Path`):
            Folder, or repository on the Hub, with `config.json` and its weights.
        target_config (`PreTrainedConfig`):
            Config of the target.
        weights (`dict[str, torch.Tensor]`, *optional*):
            What its files hold, where they have been read.

    Raises:
        ValueError: If it is no such checkpoint, belongs to another target, or computes what is not supported: another
            width than the target's, Markov heads that remember more than the token before.
    """
    check_target_config(target_config)
    folder = find_folder(path_or_repo_id)
    published = read_config(folder)
    weights = read_weights(folder) if weights is None else weights
    weights = {key.removeprefix("model."): value for key, value in weights.items()}
    # Codebooks are named as tensors, or as the weights of a table.
    weights = {f"{key}.weight" if _CODEBOOK.fullmatch(key) else key: value for key, value in weights.items()}
    if not is_dflash(weights) or "fc.weight" not in weights:
        raise ValueError(
            f"The weights in {folder} must be those of a block draft, got none named `fc` and `hidden_norm`. Load "
            "other drafts by `AutoDraftModel`."
        )
    settings = _settings(published, weights)
    draft = BlockDraftModel(_draft_config(folder, settings, weights, target_config))
    own = {key: value for key, value in weights.items() if not _DROPPED.fullmatch(key)}
    vocab_size = target_config.get_text_config().vocab_size
    if draft.head is not None:
        own["draft_token_ids"] = token_ids = draft_token_ids(folder, weights, vocab_size)
        if (edges := own.get("markov_head.markov_w2.weight")) is not None and len(edges) == len(token_ids):
            own["markov_head.markov_w2.weight"] = edges.new_zeros(vocab_size, edges.shape[1])
            own["markov_head.markov_w2.weight"][token_ids] = edges
    elif len(own.get("lm_head.weight", ())) == vocab_size:
        del own["lm_head.weight"]
    if settings["rotates_pairs"]:
        head_dim = draft.config.get_text_config().head_dim
        own = {key: _halved(value, head_dim) if _ROTATED.fullmatch(key) else value for key, value in own.items()}
    return fill_draft(draft, renamed(own, _NAMES), folder)


def _halved(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Put what is rotated together, two values side by side, into the two halves of each head."""
    if len(weight) % head_dim:
        return weight  # of another size than the config says, which is told where it is filled in
    return torch.cat([weight.unflatten(0, (-1, head_dim))[:, start::2] for start in (0, 1)], dim=1).flatten(0, 1)


def _settings(published: dict[str, Any], weights: dict[str, torch.Tensor]) -> dict[str, Any]:
    """What a config says, wherever it says it, and what it leaves to its reader."""
    own = published.get("dflash_config") or {}
    layers = published.get("transformer_layer_config") or {}
    parts = ({name: value for name, value in part.items() if value is not None} for part in (published, layers, own))
    settings = {name: value for part in parts for name, value in part.items()}
    scaling = read_rope(settings)
    edges = weights.get("markov_head.markov_w1.weight")
    edge_rank = 0 if edges is None else edges.shape[-1]
    makers = [*(published.get("architectures") or ()), settings.get("projector_type")]
    names = " ".join(map(str, [*makers, published.get("speculators_model_type")])).lower()
    return (
        scaling
        | settings
        | {
            "edge_rank": settings.get("selector_rank") or settings.get("markov_rank", edge_rank),
            "predicts_next": bool(settings.get("sample_from_anchor", "dspark" in names or edges is not None)),
            # Liquid's drafts do, whether their configs say it or not.
            "rotates_pairs": not settings.get("rope_is_neox_style", "lfm" not in names),
            "is_of_speculators": bool(layers),
            "rope_parameters": scaling,
        }
    )


def _draft_config(
    folder: Path, settings: dict[str, Any], weights: dict[str, torch.Tensor], target_config: PreTrainedConfig
) -> BlockDraftConfig:
    target_text = target_config.get_text_config()
    size, num_layers, vocab_size = target_text.hidden_size, target_text.num_hidden_layers, target_text.vocab_size
    theirs = {
        "hidden_size": settings.get("hidden_size"),
        "target_hidden_size": settings.get("target_hidden_size") or size,
        "num_target_layers": settings.get("num_target_layers", num_layers),
    }
    if theirs != {"hidden_size": size, "target_hidden_size": size, "num_target_layers": num_layers}:
        raise ValueError(
            f"The draft in {folder} must be as wide as its target and made for one of as many layers, {size} and "
            f"{num_layers}, got {theirs}. Pass the target that it was trained for."
        )
    unknown = [name for name in _NOT_READ if settings.get(name)]
    edge_type = "bilinear" if settings.get("selector_rank") else settings.get("markov_head_type", "vanilla")
    if settings["edge_rank"] and edge_type not in EDGE_TYPES:
        unknown.append(f"markov_head_type={edge_type}")
    layers = _feature_layers(settings, weights["fc.weight"].shape[1] // size, num_layers)
    if num_layers in layers and settings["predicts_next"]:  # DSpark's are trained on what its layers put out
        unknown.append("the last layer before the target's norm")
    if unknown:
        raise ValueError(f"A block draft must do without {', '.join(unknown)}, got {folder}, which is not supported.")
    needed = ["block_size", "mask_token_id"]
    if settings["is_of_speculators"]:
        needed.append("aux_hidden_state_layer_ids")
    missing = [name for name in needed if settings.get(name) is None]
    if missing:
        raise ValueError(f"{folder / 'config.json'} must say {' and '.join(missing)}, got nothing. Copy it again.")
    # Qwen3's layer has norms of queries and keys besides.
    norm = next((value for key, value in weights.items() if key.endswith("q_norm.weight")), None)
    fields = {name: settings[name] for name in _TEXT_FIELDS if settings.get(name) is not None}
    if norm is not None:
        fields["head_dim"] = len(norm)
    text_config = (LlamaConfig if norm is None else Qwen3Config)(
        **fields,
        **special_token_ids(target_config),
        vocab_size=vocab_size,
        rope_parameters=settings["rope_parameters"],
        tie_word_embeddings=False,
    )
    causal, windows = _sights(folder, settings, text_config.num_hidden_layers)
    known = settings.get("draft_vocab_size") or vocab_size
    return BlockDraftConfig(
        text_config=text_config,
        feature_layers=layers,
        block_size=settings["block_size"],
        causal=causal if len({*causal}) > 1 else causal[0],
        windows=windows if any(windows) else None,
        predicts_next=settings["predicts_next"],
        mask_token_id=settings["mask_token_id"],
        draft_vocab_size=None if known == vocab_size else known,
        edge_rank=settings["edge_rank"],
        edge_type=edge_type if settings["edge_rank"] else "vanilla",
        conv_kernel_size=settings.get("conv_kernel_size", 0),
        conv_group_size=settings.get("conv_group_size", 16),
        embedding_scale=settings.get("input_embedding_scale", 1.0),
        output_multiplier=settings.get("output_multiplier", 1.0),
        final_logit_softcapping=settings.get("final_logit_softcapping") or None,
        visual_token_ids=visual_token_ids(target_config),
    )


def _sights(folder: Path, settings: dict[str, Any], num_layers: int) -> tuple[list[bool], list[int | None]]:
    """Whether rows of each layer see those before them alone, and how far they see."""
    fields = ("layer_types", "max_window_layers", "use_sliding_window")
    given = {name: settings[name] for name in fields if name in settings}
    window = settings.get("sliding_window")
    read = Qwen3Config(num_hidden_layers=num_layers, sliding_window=window, **given)
    is_sliding = [kind == "sliding_attention" for kind in read.layer_types]
    if any(is_sliding) and not read.sliding_window:
        raise ValueError(
            f"{folder / 'config.json'} must say how far layers of `sliding_attention` see, got "
            f"`sliding_window={window}` and `use_sliding_window={settings.get('use_sliding_window')}`. Set the one to "
            "what the draft was trained with, and the other to true."
        )
    windows = [read.sliding_window if own else None for own in is_sliding]
    if settings["is_of_speculators"]:
        is_open = settings.get("sliding_window_non_causal", "selector_rank" in settings)
        return [window is not None and not is_open for window in windows], windows
    names = ("is_causal", "causal_head", "causal", "dflash_query_causal")
    causal = next((settings[name] for name in names if name in settings), None)
    if not isinstance(causal, bool | None):
        raise TypeError(f"whether rows see those before them alone is {causal!r}")
    return is_sliding if causal is None else [causal] * num_layers, windows


def _feature_layers(settings: dict[str, Any], num_read: int, num_layers: int) -> list[int]:
    """Layers as `output_hidden_states` numbers them; but for speculators, configs name outputs of layers, one less."""
    given = settings.get("aux_hidden_state_layer_ids" if settings["is_of_speculators"] else "target_layer_ids")
    if given is None:
        given = [round(1 + place * (num_layers - 4) / max(num_read - 1, 1)) for place in range(num_read)]
    first = 0 if settings["is_of_speculators"] else -1  # the embeddings
    if not all(isinstance(layer, int) and first <= layer < num_layers for layer in given):
        raise ValueError(
            f"The draft reads layers {given} of its target, got one of {num_layers}. Pass the target that it was "
            "trained for."
        )
    return [layer - first for layer in given]


__all__ = ["is_dflash", "load_dflash_checkpoint"]

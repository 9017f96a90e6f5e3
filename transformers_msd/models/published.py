"""Drafts as others published them: where their weights go, and what is written in the words of their configs."""

from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from transformers_msd.models.files import quantised_error
from transformers_msd.models.places import check_finite


# What we write ourselves names us as `exported_by`, and means what it says.
EXPORTER = "transformers-msd"
_MOST_NAMES = 8  # that an error lists
_SPECULATORS_VERSION = "0.9.0"  # whose keys they are
_LAYER_FIELDS = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "rms_norm_eps",
    "max_position_embeddings",
    "attention_bias",
    "mlp_bias",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)


def check_weights(folder: Path, weights: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Raise a `ValueError` unless every weight has its place, and every place a weight."""
    missing, unexpected = sorted(expected.keys() - weights.keys()), sorted(weights.keys() - expected.keys())
    if missing or unexpected:
        raise ValueError(
            f"The weights in {folder} do not make a draft for this target: missing {_first(missing)}, unexpected "
            f"{_first(unexpected)}. Check that the target is of the model family the draft was trained for."
        )
    wrong = {
        key: f"expected {tuple(expected[key].shape)}, got {tuple(value.shape)}"
        for key, value in weights.items()
        if value.shape != expected[key].shape
    }
    if wrong:
        raise ValueError(
            f"The weights in {folder} do not have the sizes its `config.json` and the target say: "
            f"{_first(wrong)}. Check that the target is the one the draft was trained for."
        )
    for key, value in weights.items():
        if expected[key].is_floating_point() and not (value.is_floating_point() and value.itemsize > 1):
            raise quantised_error(key, folder, value.dtype)


def _first(found: list[str] | dict[str, str]) -> str:
    more = len(found) - _MOST_NAMES
    some = found[:_MOST_NAMES] if isinstance(found, list) else dict(islice(found.items(), _MOST_NAMES))
    return f"{some}{f' and {more} more' if more > 0 else ''}"


def fill_draft(draft: PreTrainedModel, weights: dict[str, torch.Tensor], folder: Path) -> PreTrainedModel:
    """Put weights into a draft, each in its place and of the dtype that it has in `folder`, and make it ready."""
    check_weights(folder, weights, draft.state_dict())
    draft = cast_weights(draft, weights["fc.weight"].dtype)
    draft.load_state_dict(weights)
    check_finite(draft, str(folder))
    return draft.eval()


def draft_token_ids(folder: Path, weights: dict[str, torch.Tensor], vocab_size: int) -> torch.Tensor:
    """Ids of the target that the rows of the draft's head stand for: `d2t` holds how much larger they are."""
    if "lm_head.weight" not in weights:
        raise ValueError(
            f"The draft in {folder} must hold a head of its own, got no `lm_head.weight`. Copy the folder again."
        )
    num_tokens = len(weights["lm_head.weight"])
    offsets, known = weights.get("d2t"), weights.get("t2d")
    if offsets is None and num_tokens == vocab_size:
        return torch.arange(vocab_size)
    if offsets is None or offsets.shape != (num_tokens,):
        given = "none" if offsets is None else f"numbers of shape {tuple(offsets.shape)}"
        raise ValueError(
            f"The draft in {folder} must say by `d2t` which of the target's {vocab_size} tokens the {num_tokens} rows "
            f"of its head are, got {given}. Pass the target it is "
            "for, or copy the folder again."
        )
    token_ids = torch.arange(num_tokens) + offsets.long()
    is_ordered = bool((token_ids[1:] > token_ids[:-1]).all())
    agrees = known is None or torch.equal(known.nonzero()[:, 0], token_ids)
    if not is_ordered or not agrees or not 0 <= int(token_ids[0]) <= int(token_ids[-1]) < vocab_size:
        raise ValueError(
            f"`d2t` in {folder} must hold offsets that lead to ascending tokens of the target, those of `t2d`, got "
            f"{token_ids[:3].tolist()} to {int(token_ids[-1])} of {vocab_size}. Copy the folder again."
        )
    return token_ids


def cast_weights(draft: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Give a draft's weights a dtype, and leave the frequencies of its positions as precise as they are."""
    for weight in draft.parameters():
        if type(weight) is nn.Parameter and weight.is_floating_point():
            weight.data = weight.data.to(dtype)
    return draft


def renamed(weights: dict[str, torch.Tensor], names: dict[str, str]) -> dict[str, torch.Tensor]:
    """Give weights other names, by what these begin with."""

    def name_of(key: str) -> str:
        return next((new + key.removeprefix(old) for old, new in names.items() if key.startswith(old)), key)

    names = [name_of(key) for key in weights]
    if len({*names}) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"The weights of a draft must have one place each, got several for {twice}. Copy them again.")
    return dict(zip(names, weights.values(), strict=True))


def layer_fields(text_config: PreTrainedConfig) -> dict[str, Any]:
    """Sizes and kind of a draft's layers, as configs of text models name them."""
    fields = text_config.to_dict()
    return {name: fields[name] for name in _LAYER_FIELDS if name in fields}


def rope_fields(
    text_config: PreTrainedConfig, mrope_section: list[int] | None = None, mrope_interleaved: bool = False
) -> dict[str, Any]:
    """
    Settings of a draft's positions, where readers of Transformers 4 look and where those of Transformers 5 do.

    Args:
        text_config (`PreTrainedConfig`):
            Config of the draft's layers.
        mrope_section (`list[int]`, *optional*):
            Frequencies of each axis, of positions that have three.
        mrope_interleaved (`bool`, *optional*, defaults to `False`):
            Whether the axes take turns.
    """
    rope = {name: value for name, value in text_config.rope_parameters.items() if not name.startswith("mrope_")}
    if mrope_section is not None:
        rope |= {"mrope_section": mrope_section, "mrope_interleaved": mrope_interleaved}
    scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
    is_plain = scaling == {"rope_type": "default"}
    return {
        "rope_theta": rope["rope_theta"],
        "rope_scaling": None if is_plain else scaling,
        "rope_parameters": rope,
    }


def llama_losses(text_config: PreTrainedConfig) -> dict[str, bool]:
    """What layers have that a reader of plain Llama layers has no place for, and whether these have it."""
    return {
        f"layers of {text_config.model_type}": text_config.model_type != "llama",
        "biases of the attention": getattr(text_config, "attention_bias", False),
        "biases of the MLP": getattr(text_config, "mlp_bias", False),
        f"the activation {text_config.hidden_act}": text_config.hidden_act != "silu",
    }


def check_kept(layout: str, losses: dict[str, bool]) -> None:
    """Raise a `ValueError` that names what a layout would lose of a draft, unless that is nothing."""
    lost = [name for name, is_lost in losses.items() if is_lost]
    if lost:
        raise ValueError(
            f"A draft must be one that `{layout}` can hold, got one of which it would lose {', '.join(lost)}. Keep it "
            "in our own layout, or train one without."
        )


def layers_read(draft: Any, target_config: PreTrainedConfig) -> list[int]:
    """List the hidden states that a draft reads, counted from the target's embeddings on."""
    return [layer % (target_config.get_text_config().num_hidden_layers + 1) for layer in draft.feature_layers]


def reads_last(draft: Any, target_config: PreTrainedConfig) -> bool:
    """Tell whether a draft reads the target's last hidden state, which stands behind a norm."""
    return target_config.get_text_config().num_hidden_layers in layers_read(draft, target_config)


def token_maps(token_ids: torch.Tensor, vocab_size: int) -> dict[str, torch.Tensor]:
    """Lead from the tokens of a draft, the ascending `token_ids` of its target, to the target's and back."""
    return {
        "d2t": token_ids - torch.arange(len(token_ids), device=token_ids.device),
        "t2d": torch.isin(torch.arange(vocab_size, device=token_ids.device), token_ids),
    }


def speculators_fields(
    algorithm: str, num_tokens: int, target_model: str, target_config: PreTrainedConfig
) -> dict[str, Any]:
    """
    Say in the format of speculators how a draft is used.

    Args:
        algorithm (`str`):
            What it calls the kind of draft.
        num_tokens (`int`):
            Tokens to draft in a round.
        target_model (`str`):
            Folder or Hub repository of the target, by which the engines find it.
        target_config (`PreTrainedConfig`):
            Its config.
    """
    proposal = {"proposal_type": "greedy", "speculative_tokens": num_tokens}
    return {
        "speculators_model_type": algorithm,
        "speculators_version": _SPECULATORS_VERSION,
        "speculators_config": {
            "algorithm": algorithm,
            "default_proposal_method": "greedy",
            "proposal_methods": [proposal | {"verifier_accept_k": 1, "accept_tolerance": 0.0}],
            "verifier": {"name_or_path": target_model, "architectures": target_config.architectures or []},
        },
    }

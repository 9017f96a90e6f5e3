"""Which kind of decoder layer a draft on a target's features is made of."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoModel, DynamicCache, LlamaConfig, PreTrainedConfig
from transformers.cache_utils import DynamicLayer

from transformers_msd.compat import CACHE


# What `MSDDraftModel` takes out of a decoder, and passes to it.
_PARTS = ("embed_tokens", "layers", "norm")
# Sizes that a model may take below 1 without a word.
_SIZES = ("num_hidden_layers", "intermediate_size", "num_key_value_heads", "max_position_embeddings")
_ARGUMENTS = {"inputs_embeds", "attention_mask", "position_ids", "use_cache", CACHE}


def decoder_layer_of(text_config: PreTrainedConfig) -> tuple[type[PreTrainedConfig], dict[str, Any]]:
    """
    Choose the config of a single decoder layer of a target's shape.

    Args:
        text_config (`PreTrainedConfig`):
            Text config of the target.

    Returns:
        `tuple[type[PreTrainedConfig], dict[str, Any]]`: The class of the target's text config, or Llama's where a
        layer of the target's kind can't stand alone, and its fields.
    """
    # The types of the layers follow from their number.
    fields = {name: value for name, value in text_config.to_dict().items() if name not in ("dtype", "layer_types")}
    if _can_draft(type(text_config), fields):
        return type(text_config), fields
    size, vocab_size = _number(text_config, "hidden_size"), _number(text_config, "vocab_size")
    if size is None or vocab_size is None or size % 2:
        raise ValueError(
            f"A draft needs the `hidden_size` and `vocab_size` of its target, an even one and any, got {size} and "
            f"{vocab_size} in {type(text_config).__name__}. Pass the config of a decoder of tokens."
        )
    # Rotary embeddings want heads of an even size.
    most_heads = _number(text_config, "num_attention_heads") or max(size // 64, 1)
    num_heads = next(number for number in range(most_heads, 0, -1) if size % (2 * number) == 0)
    num_key_value_heads = _number(text_config, "num_key_value_heads") or num_heads
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=size,
        intermediate_size=_number(text_config, "intermediate_size") or 4 * size,
        num_attention_heads=num_heads,
        num_key_value_heads=num_key_value_heads if num_heads % num_key_value_heads == 0 else num_heads,
        max_position_embeddings=_number(text_config, "max_position_embeddings") or 2048,
        initializer_range=fields.get("initializer_range") or 0.02,
    )
    return LlamaConfig, {name: value for name, value in config.to_dict().items() if name != "dtype"}


def check_decoder(
    config_class: type[PreTrainedConfig], fields: Mapping[str, Any], overrides: Mapping[str, Any]
) -> None:
    """
    Raise a `ValueError` for overrides of which no decoder can be made; trying takes no memory.

    Args:
        config_class (`type[PreTrainedConfig]`):
            Class of the decoder's config.
        fields (`dict[str, Any]`):
            Its fields.
        overrides (`dict[str, Any]`):
            What a user sets instead of some of them.
    """
    try:
        config = config_class(**{**fields, **overrides})
        with torch.device("meta"):
            AutoModel.from_config(config)
        wrong = [name for name in _SIZES if isinstance(size := overrides.get(name), int) and size < 1]
        num_heads, num_shared = (_number(config, name) for name in ("num_attention_heads", "num_key_value_heads"))
        reason = f"{', '.join(wrong)} must be at least 1" if wrong else None
        if not wrong and num_heads and num_shared and num_heads % num_shared:
            reason = f"{num_heads} heads can't share {num_shared} of keys and values"
    except Exception as error:  # whatever a config or a model has against them
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
    if reason is not None:
        raise ValueError(f"Overrides must make a decoder, got {dict(overrides)} ({reason}). Leave out what differs.")


def _can_draft(config_class: type[PreTrainedConfig], fields: dict[str, Any]) -> bool:
    """Tell whether a model of one such layer has what a draft needs; it takes no memory."""
    try:
        config = config_class(**fields | {"num_hidden_layers": 1})
        with torch.device("meta"):
            model = AutoModel.from_config(config)
    except Exception:  # whatever a config or a model has against a single layer
        return False
    has_parts = all(hasattr(model, name) for name in _PARTS) and len(model.layers) == 1
    has_parts = has_parts and hasattr(model.layers[0], "input_layernorm")
    is_full = all(type(layer) is DynamicLayer for layer in DynamicCache(config=config).layers)
    return has_parts and is_full and set(inspect.signature(type(model).forward).parameters) >= _ARGUMENTS


def _number(config: PreTrainedConfig, name: str) -> int | None:
    """Read a number that some configs give for each layer, or refuse to give for all, and some don't have."""
    try:
        value = getattr(config, name)
    except Exception:  # not an `AttributeError` alone
        return None
    if isinstance(value, list | tuple):
        value = value[-1] if value else None
    return value if isinstance(value, int) else None

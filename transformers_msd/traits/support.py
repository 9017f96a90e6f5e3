"""Which models can run a tree of tokens, and how far: facts about a model, told by its config and class."""

import dis
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import LinearAttentionCacheLayerMixin
from transformers.generation import GenerationMixin

from transformers_msd.compat import (
    CACHE_NAMES,
    PREPARE_INPUTS,
    attention_of,
    is_stateful,
    makes_own_cache,
    prefills_itself,
    update_model_kwargs_of,
)
from transformers_msd.traits.refusal import Refusal
from transformers_msd.traits.tokens import is_of_pictures, visual_token_ids
from transformers_msd.traits.windows import layer_windows, takes_masks_by_type


# What a row of a tree needs of inputs that grow with the answer.
TOKEN_TYPES = ("token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids")


def unsupported_fact(model: PreTrainedModel) -> str | None:
    """
    State what keeps a model from running trees, as the end of a sentence that begins with its name; `None` if nothing.

    Args:
        model (`PreTrainedModel`):
            A target or a draft.
    """
    if model.config.is_encoder_decoder:
        return "has an encoder and a decoder, and drafting serves decoders alone"
    if not model.can_generate():
        return "has no head that says tokens"
    if is_stateful(model) and not keeps_states(model.config):
        return "has a recurrent state of its own, which can't take back rejected tokens"
    config, parameters = model.config.get_text_config(), inspect.signature(type(model).forward).parameters
    if getattr(config, "is_decoder", None) is False and _asks_whether_it_decodes(model):
        return "is set up as no decoder (`is_decoder=False`), and keeps no cache"
    if not any(name in parameters for name in CACHE_NAMES):
        return "takes no cache in its forward"
    if makes_own_cache(model):
        return "makes a cache of its own, in which nothing is known to be taken back"
    if prefills_itself(model):
        return "runs its prompt by a method of its own (`_prefill`)"
    if "position_ids" not in parameters:
        return "takes no `position_ids` in its forward, and counts columns of the cache instead"
    if not any(_ropes(config)) and _makes_own_positions(model):
        return "makes positions of its own, of token ids, where they are embedded"
    if getattr(config, "alibi", False):
        return "has attention biases by columns of the cache (`alibi=True`), and the nodes of a tree lie side by side"
    if getattr(config, "cross_attention_layers", None):
        return "has layers of cross-attention, whose rows in the cache are no tokens"
    if len({window for _, window in layer_windows(model.config)}) > 1 and not takes_masks_by_type(model):
        return "has layers that see more of the sequence than others, and takes one mask for all of them"
    grown = _inputs_grown_by(model)
    if grown:
        return f"makes more of its inputs after each token than drafting knows of: {', '.join(grown)}"
    return unready_fact(model)


def keeps_states(config: PreTrainedConfig) -> bool:
    """Tell whether layers of a model keep a state in place of rows, recurrent or of a convolution."""
    layers = DynamicCache(config=config.get_text_config(decoder=True)).layers
    return any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in layers)


def features_fact(model: PreTrainedModel) -> str | None:
    """State what keeps a target from having a feature for each token, as [`unsupported_fact`] does."""
    if getattr(model.config.get_text_config(), "altup_num_inputs", 1) > 1:
        return "has several hidden states for each token (`altup_num_inputs`), and drafting reads one"
    if _runs_layers_again(model):
        return "runs layers more than once in a forward, and tells no state behind the last of them"
    return None


def unready_fact(model: PreTrainedModel) -> str | None:
    """State what keeps a model of a supported kind from running trees as it is now, as [`unsupported_fact`] does."""
    implementation = attention_of(model.config)
    if implementation not in ("sdpa", "eager"):
        return (
            f"runs {implementation!r} attention, which can't carry the 4-D mask of a tree: load it with "
            '`attn_implementation="sdpa"`'
        )
    if _keeps_no_cache(model):
        return "keeps no cache while it trains with gradient checkpointing: call its `eval()`"
    if any(map(_drops, model.modules() if model.training else ())):
        return "drops at random while it trains, and so says otherwise in trees than step by step: call its `eval()`"
    # PEFT puts its own method on a model that it has learned rows for.
    owner = getattr(getattr(model, "prepare_inputs_for_generation", None), "__self__", model)
    if getattr(getattr(owner, "active_peft_config", None), "is_prompt_learning", False):
        return "begins with learned rows (PEFT prompt learning), which its cache holds and no token stands for"
    adapters = getattr(owner, "peft_config", None) or getattr(model, "peft_config", None) or {}
    if any(getattr(adapter, "alora_invocation_tokens", None) for adapter in adapters.values()):
        return (
            "is adapted from some tokens on (PEFT's aLoRA), counted from the end of a forward, where a tree has others"
        )
    return None


def _drops(module: nn.Module) -> bool:
    """Tell whether a module has dropout that is on: one of PyTorch's own, or a chance that its forward hands on."""
    if not module.training:
        return False
    own = [module.p] if isinstance(module, nn.Dropout) else []
    return any(p > 0 for p in own + [p for name, p in vars(module).items() if "drop" in name and type(p) is float])


def is_multimodal(config: PreTrainedConfig) -> bool:
    """Tell whether a model reads pictures."""
    return type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING


def unwrapped(model: nn.Module) -> nn.Module:
    """Return a draft without what PEFT or `torch.compile` put around it; adapters stay, they lie inside."""
    while not isinstance(model, PreTrainedModel):
        inner = getattr(model, "_orig_mod", None)
        if inner is None and hasattr(model, "get_base_model"):
            if model.active_peft_config.is_prompt_learning:
                raise ValueError(
                    f"A draft must read tokens alone, got {type(model).__name__} with learned rows before them (PEFT "
                    "prompt learning). Pass the model without them, or one with LoRA."
                )
            inner = model.get_base_model()
        if inner is None:
            raise ValueError(f"`draft_vlm` must be a `PreTrainedModel`, got {type(model).__name__}.")
        model = inner
    return model


def _runs_layers_again(model: PreTrainedModel) -> bool:
    """Tell whether a decoder goes through its layers in several loops: Transformers counts their states but once."""
    instructions = dis.get_instructions(inspect.unwrap(type(model.get_decoder()).forward))
    return sum(one.argval == "layers" for one in instructions) > 1


def _asks_whether_it_decodes(model: PreTrainedModel) -> bool:
    """Tell whether a model, or one inside it, looks at `is_decoder` when it runs: some configs have it for nothing."""
    classes = {type(part) for part in model.modules() if isinstance(part, PreTrainedModel)}
    return any("is_decoder" in inspect.unwrap(one.forward).__code__.co_names for one in classes)


def _keeps_no_cache(model: PreTrainedModel) -> bool:
    """Tell whether a model trains in such a way that it keeps no cache."""
    return model.training and any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def _makes_own_positions(model: PreTrainedModel) -> bool:
    """Tell whether a model, or one inside it, does something to `position_ids` by their name before a forward."""
    classes = {type(part) for part in model.modules() if isinstance(part, GenerationMixin)}
    prepares = {inspect.unwrap(one.prepare_inputs_for_generation) for one in classes} - {PREPARE_INPUTS}
    return any("position_ids" in prepare.__code__.co_consts for prepare in prepares)


def _inputs_grown_by(model: PreTrainedModel) -> list[str]:
    """Names of inputs that a model's own `_update_model_kwargs_for_generation` mentions, token types left out."""
    update = update_model_kwargs_of(type(model))
    if update is update_model_kwargs_of(GenerationMixin):
        return []
    constants = inspect.unwrap(update).__code__.co_consts
    names = {name for name in constants if isinstance(name, str) and name.isidentifier()}
    return sorted(names - {*TOKEN_TYPES, "use_cache"})


def check_reach(
    model: PreTrainedModel,
    model_kwargs: Mapping[str, Any],
    prompt_length: int,
    num_steps: int | None,
    num_nodes: int,
    is_fixed: bool,
) -> None:
    """
    Raise a [`Refusal`] where a call reaches so far that what a model computes for a token depends on the tokens or
    columns behind it.

    Args:
        model (`PreTrainedModel`):
            The target.
        model_kwargs (`dict[str, Any]`):
            Keyword arguments that `generate` prepared for its forward passes.
        prompt_length (`int`):
            Columns of the prompt.
        num_steps (`int`, *optional*):
            Most new tokens; without it there is no limit.
        num_nodes (`int`):
            Most nodes of a tree.
        is_fixed (`bool`):
            Whether the target's cache has more columns than tokens.
    """
    config = model.config.get_text_config()
    reach = float("inf") if num_steps is None else prompt_length + num_steps - 1
    way_out = "Ask for fewer tokens, or generate without `assistant_model`."
    for rope in _ropes(config):
        if "dynamic" in rope["rope_type"] and reach > config.max_position_embeddings:
            raise Refusal(
                f"The rotary embedding of {type(model).__name__} scales with the longest position beyond "
                f"{config.max_position_embeddings} tokens (`rope_type='dynamic'`), so that a draft would change it, "
                f"got {prompt_length} tokens and up to {num_steps} new ones. {way_out}"
            )
        if rope["rope_type"] == "longrope":
            mask = model_kwargs.get("attention_mask")
            shortest = prompt_length if mask is None or mask.ndim != 2 else int(mask.sum(-1).min())
            switch = rope.get("original_max_position_embeddings") or config.original_max_position_embeddings
            if shortest <= switch < reach:
                raise Refusal(
                    f"The rotary embedding of {type(model).__name__} changes for all rows at once after {switch} "
                    f"tokens (`rope_type='longrope'`), so that a draft would change it early, got {prompt_length} "
                    f"tokens and up to {num_steps} new ones. {way_out}"
                )
    window = _column_window(config)
    if window is not None and (is_fixed or reach + num_nodes > window):
        raise Refusal(
            f"Attention of {type(model).__name__} sees a window of {window} columns, and the nodes of a tree lie side "
            f"by side, got {prompt_length} tokens, up to {num_steps} new ones, trees of {num_nodes} nodes"
            f"{' and a cache of fixed width' if is_fixed else ''}. {way_out}"
        )


def check_padding(model: PreTrainedModel, arguments: Mapping[str, Any]) -> None:
    """Raise a [`Refusal`] for padded prompts of a model that puts pictures in its cache without tokens for them."""
    mask = arguments.get("attention_mask")
    takes_pictures = any(map(is_of_pictures, inspect.signature(type(model).forward).parameters))
    if takes_pictures and not visual_token_ids(model.config) and mask is not None and not mask.all():
        raise Refusal(
            f"{type(model).__name__} has no tokens for pictures: its cache may hold more columns than "
            "`attention_mask`, which pads a prompt. Pass prompts of one length, or generate without `assistant_model`."
        )


def dtype_of(model: PreTrainedModel) -> torch.dtype:
    """Return the dtype in which a model computes on tokens: a vision tower before it may have another."""
    dtype = model.get_input_embeddings().weight.dtype
    return dtype if dtype.is_floating_point else model.dtype


def device_of(model: PreTrainedModel) -> torch.device:
    """Return the device on which a model takes tokens: weights that are offloaded are on none until they run."""
    table = model.get_input_embeddings()
    if not table.weight.is_meta:
        return table.weight.device
    return torch.device(getattr(getattr(table, "_hf_hook", None), "execution_device", None) or "cpu")


def last_learned_position(config: PreTrainedConfig) -> int | None:
    """Return the last position that a model has an embedding for, where positions have embeddings."""
    config = config.get_text_config()
    if any(_ropes(config)):
        return None
    length = getattr(config, "max_position_embeddings", None)
    return None if length is None else length - 1


def _ropes(config: PreTrainedConfig) -> Iterator[Mapping[str, Any]]:
    """Rotary embeddings of a model: one, or one for each type of layers."""
    parameters = getattr(config, "rope_parameters", None) or {}
    for rope in [parameters, *parameters.values()]:
        if isinstance(rope, Mapping) and rope.get("rope_type"):
            yield rope


def _column_window(config: PreTrainedConfig) -> int | None:
    """Columns that attention over a full cache sees, where it does not see all of them."""
    if "local" in (getattr(config, "attention_layers", None) or ()):
        return config.window_size
    return getattr(config, "keep_window_size", None)

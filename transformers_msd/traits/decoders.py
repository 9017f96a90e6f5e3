"""Which kind of decoder layer a draft on a target's features is made of."""

import importlib
import inspect
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, DynamicCache, LlamaConfig, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.generation import GenerationMixin
from transformers.models.auto.modeling_auto import MODEL_MAPPING

from transformers_msd.compat import CACHE


# Sizes that a model may take below 1 without a word.
_SIZES = ("num_hidden_layers", "intermediate_size", "num_key_value_heads", "max_position_embeddings")
# Factors of embeddings, which reach a draft multiplied.
_SCALES = ("embedding_multiplier", "embedding_scale")
# What a target's config says of how it is loaded, and what follows from the number of layers.
_NOT_OF_LAYERS = ("dtype", "quantization_config", "auto_map", "architectures", "layer_types")


def make_decoder(config: PreTrainedConfig, keeps_first_norm: bool = True) -> PreTrainedModel:
    """
    Make the layers of a text config, without embeddings before and without a norm behind them.

    Args:
        config (`PreTrainedConfig`):
            Config of a text model, also of one that is known as a part of a larger model alone.
        keeps_first_norm (`bool`, *optional*, defaults to `True`):
            Whether the first layer has its input norm.

    Raises:
        ValueError: If the model does not consist of embeddings, `layers` that see everything, and a norm.
    """
    way_out = "Make its config with `MSDConfig.from_target(target.config)`."
    kinds = {type(layer) for layer in DynamicCache(config=config).layers} - {DynamicLayer}
    if kinds:
        names = ", ".join(sorted(kind.__name__ for kind in kinds))
        raise ValueError(
            f"Layers of a draft must see everything, and keep no state, got {type(config).__name__}, whose cache has "
            f"layers of {names}. {way_out}"
        )
    if type(config) in MODEL_MAPPING:
        # A text config may name a dtype of its own.
        model = AutoModel.from_config(config, dtype=torch.get_default_dtype())
    else:
        model = _text_model_class(config)(config)
    embeddings = model.get_input_embeddings()
    names = {child: name for name, child in model.named_children()}
    # By its name, or else by its size.
    norms = [name for child, name in names.items() if name == "norm"] or [
        name
        for child, name in names.items()
        if child is not embeddings and getattr(getattr(child, "weight", None), "shape", None) == (config.hidden_size,)
    ]
    if embeddings not in names or len(norms) != 1 or not isinstance(getattr(model, "layers", None), nn.ModuleList):
        raise ValueError(
            f"A draft is made of a text model of embeddings, `layers` and a norm, got {type(model).__name__} with "
            f"{', '.join(names.values())}. {way_out}"
        )
    delattr(model, names[embeddings])
    model.set_submodule(norms[0], nn.Identity())
    if not keeps_first_norm:
        first = model.layers[0]
        if not hasattr(first, "input_layernorm"):
            raise ValueError(
                "`input_layernorm` must be True where layers have no such norm to leave out, got False with "
                f"{type(first).__name__}. Leave it out of the config."
            )
        first.input_layernorm = nn.Identity()
    return model


def decoder_layers_of(
    text_config: PreTrainedConfig, num_layers: int = 1
) -> tuple[type[PreTrainedConfig], dict[str, Any]]:
    """
    Choose the config of decoder layers of a target's kind and shape that see everything.

    Args:
        text_config (`PreTrainedConfig`):
            Text config of the target.
        num_layers (`int`, *optional*, defaults to 1):
            Number of layers.

    Returns:
        `tuple[type[PreTrainedConfig], dict[str, Any]]`: The class of the target's text config, or Llama's where
        layers of the target's kind can't stand alone, and its fields.
    """
    lists = _per_layer(text_config)
    for fields in _candidates(text_config, lists, num_layers):
        if _can_draft(type(text_config), fields, lists):
            return type(text_config), fields
    return LlamaConfig, llama_layers_of(text_config, num_layers)


def llama_layers_of(text_config: PreTrainedConfig, num_layers: int = 1) -> dict[str, Any]:
    """
    Choose the fields of a Llama config of a target's sizes.

    Args:
        text_config (`PreTrainedConfig`):
            Text config of the target.
        num_layers (`int`, *optional*, defaults to 1):
            Number of layers.
    """
    size, vocab_size = number_of(text_config, "hidden_size"), number_of(text_config, "vocab_size")
    if size is None or vocab_size is None or size % 2:
        raise ValueError(
            f"A draft needs the `hidden_size` and `vocab_size` of its target, an even one and any, got {size} and "
            f"{vocab_size} in {type(text_config).__name__}. Pass the config of a decoder of tokens."
        )
    # Rotary embeddings want heads of an even size.
    most_heads = number_of(text_config, "num_attention_heads") or max(size // 64, 1)
    num_heads = next(number for number in range(most_heads, 0, -1) if size % (2 * number) == 0)
    num_key_value_heads = number_of(text_config, "num_key_value_heads") or num_heads
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=size,
        num_hidden_layers=num_layers,
        intermediate_size=number_of(text_config, "intermediate_size") or 4 * size,
        num_attention_heads=num_heads,
        num_key_value_heads=num_key_value_heads if num_heads % num_key_value_heads == 0 else num_heads,
        max_position_embeddings=number_of(text_config, "max_position_embeddings") or 2048,
        initializer_range=getattr(text_config, "initializer_range", None) or 0.02,
    )
    return {name: value for name, value in config.to_dict().items() if name != "dtype"}


def llama_shape_of(text_config: PreTrainedConfig) -> dict[str, Any]:
    """Take over heads, norms and the base of positions, where a target's are as Llama has them."""
    fields: dict[str, Any] = {}
    if isinstance(eps := getattr(text_config, "rms_norm_eps", None), float):
        fields["rms_norm_eps"] = eps
    names = ("head_dim", "num_attention_heads", "num_key_value_heads")
    head_dim, num_heads, num_shared = sizes = [number_of(text_config, name) or 0 for name in names]
    # Llama's config wants heads that would fill the width, whatever their size.
    if all(sizes) and head_dim % 2 == text_config.hidden_size % num_heads == num_heads % num_shared == 0:
        fields |= dict(zip(names, sizes, strict=True))
    rope = getattr(text_config, "rope_parameters", None) or {}
    rope = rope.get("full_attention") or rope  # some say it for each kind of layer
    if isinstance(theta := rope.get("rope_theta"), int | float):
        fields["rope_parameters"] = {"rope_type": "default", "rope_theta": theta}
    return fields


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
            make_decoder(config)
        wrong = [name for name in _SIZES if isinstance(size := overrides.get(name), int) and size < 1]
        num_heads, num_shared = (number_of(config, name) for name in ("num_attention_heads", "num_key_value_heads"))
        reason = f"{', '.join(wrong)} must be at least 1" if wrong else None
        if not wrong and num_heads and num_shared and num_heads % num_shared:
            reason = f"{num_heads} heads can't share {num_shared} of keys and values"
    except Exception as error:  # whatever a config or a model has against them
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
    if reason is not None:
        raise ValueError(f"Overrides must make a decoder, got {dict(overrides)} ({reason}). Leave out what differs.")


def _per_layer(config: PreTrainedConfig) -> dict[str, Any]:
    """Fields of a config that are lists of something for each layer."""
    most = number_of(config, "num_hidden_layers")
    others = ("_id", "_ids", "architectures")
    return {
        name: value
        for name, value in config.to_dict().items()
        if isinstance(value, list | tuple) and len(value) == most and not name.endswith(others)
    }


def _candidates(text_config: PreTrainedConfig, lists: Mapping[str, Any], num_layers: int) -> Iterator[dict[str, Any]]:
    """
    List fields of a few layers of a target's kind: what its class makes of so few, then such as see everything,
    then each kind of layer that the target has.
    """
    whole = {name: value for name, value in text_config.to_dict().items() if name not in (*lists, *_NOT_OF_LAYERS)}
    own = whole.pop("per_layer_config", None) or {}
    whole |= {"num_hidden_layers": num_layers} | {name: 1.0 for name in _SCALES if whole.get(name) is not None}
    if "use_bidirectional_attention" in whole:
        whole["use_bidirectional_attention"] = None  # a draft has not seen what it predicts
    yield whole
    if "layer_types" in lists:
        yield whole | {"layer_types": ["full_attention"] * num_layers}
    elif whole.get("sliding_window") is not None:
        yield whole | {"sliding_window": None}
    seen = []
    for place in reversed(range(number_of(text_config, "num_hidden_layers") or 0)):
        cut = {name: [value[place]] * num_layers for name, value in lists.items()}
        if own:
            settings = own.get(place, own.get(str(place), {}))
            cut["per_layer_config"] = dict.fromkeys(range(num_layers), settings)
        if cut and cut not in seen:
            seen.append(cut)
            yield whole | cut


def _can_draft(config_class: type[PreTrainedConfig], fields: dict[str, Any], lists: Mapping[str, Any]) -> bool:
    """Tell whether a model of such layers has what a draft needs, and can be loaded again; it takes no memory."""
    try:
        if type(AutoConfig.for_model(config_class.model_type)) is not config_class:
            return False
        config = config_class(**fields)
        # What a class makes of its own where a list was left out must be something that the target has.
        for name in lists.keys() - fields.keys():
            if any(one not in lists[name] for one in getattr(config, name) or ()):
                return False
        with torch.device("meta"):
            model = make_decoder(config).to(torch.bfloat16)  # the only dtype that experts take there
            inputs = {
                "inputs_embeds": torch.zeros(1, 2, config.hidden_size, dtype=torch.bfloat16),
                "attention_mask": torch.zeros(1, 1, 2, 2, dtype=torch.bfloat16),
                "position_ids": torch.zeros(1, 2, dtype=torch.long),
                CACHE: DynamicCache(config=config),
            }
            if not {*inputs, "use_cache"} <= {*inspect.signature(type(model).forward).parameters}:
                return False
            with suppress(NotImplementedError):  # it looks at values, which are none here
                model(**inputs, use_cache=True)
        # The model of a few is all of it, with a tower for pictures.
        is_whole = all(name.startswith("layers.") for name, _ in model.named_parameters())
        return is_whole and len(model.layers) == fields["num_hidden_layers"] and model.supports_gradient_checkpointing
    except Exception:  # whatever a config or a model has against such layers
        return False


def _text_model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """Find the text model of a config that `AutoModel` does not know, in the module beside it."""
    module = importlib.import_module(type(config).__module__.replace("configuration_", "modeling_"))
    for found in vars(module).values():
        is_model = inspect.isclass(found) and issubclass(found, PreTrainedModel) and found.config_class is type(config)
        is_text = is_model and not issubclass(found, GenerationMixin)
        if is_text and "inputs_embeds" in inspect.signature(found.forward).parameters:
            return found
    raise ValueError(
        f"A draft is made of a text model, got {type(config).__name__}, which is the config of none. Make its config "
        "with `MSDConfig.from_target(target.config)`."
    )


def number_of(config: PreTrainedConfig, name: str) -> int | None:
    """
    Read a number that some configs give for each layer, or refuse to give for all, and some don't have.

    Args:
        config (`PreTrainedConfig`):
            Config of a text model.
        name (`str`):
            Name of the field.
    """
    try:
        value = getattr(config, name)
    except Exception:  # not an `AttributeError` alone
        return None
    if isinstance(value, list | tuple):
        value = value[-1] if value else None
    return value if isinstance(value, int) else None

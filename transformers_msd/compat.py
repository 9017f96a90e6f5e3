"""
What differs between the supported versions of Transformers, and the canary that looks at it on import.

The canary looks at every name that this package wraps, overrides or reads although any release may change it.
"""

import copy
import inspect
import pkgutil
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module
from itertools import groupby
from types import FunctionType
from typing import Any

import torch
from packaging.specifiers import SpecifierSet
from torch import nn
from transformers import Cache, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.generation import CompileConfig, GenerationMixin


# The versions that the tests ran on; pyproject.toml says the same.
SUPPORTED = {"datasets": ">=4.8", "torch": ">=2.13", "transformers": ">=5.23,<5.25", "trl": ">=1.16,<1.17"}


@dataclass(frozen=True)
class Name:
    """
    A name that this package wraps, overrides or reads although it is not its own and no public one.

    Args:
        path (`str`):
            Where it is, as `package.module:Class.name`.
        parameters (`str`, *optional*):
            Parameters of the function that it names, `one|other` where versions call a parameter differently.
        attribute (`str`, *optional*):
            What is needed is not the function itself but an attribute of other objects that it uses.
    """

    path: str
    parameters: str | None = None
    attribute: str | None = None

    def __str__(self) -> str:
        name = self.path.replace(":", ".")
        if self.attribute is not None:
            return f"`{self.attribute}`, which `{name}` uses"
        return f"`{name}`" if self.parameters is None else f"`{name}({self.parameters})`"

    @property
    def package(self) -> str:
        """The package whose version decides."""
        return self.path.partition(":")[0].partition(".")[0]

    def is_there(self) -> bool:
        """Tell whether the installed package has it as expected."""
        try:
            value = pkgutil.resolve_name(self.path)
        except (ImportError, AttributeError):
            return False
        if self.attribute is not None:
            code = getattr(inspect.unwrap(value), "__code__", None)
            return code is not None and self.attribute in code.co_names + code.co_consts
        if self.parameters is None or not callable(value):
            return self.parameters is None
        found = list(inspect.signature(value).parameters)
        expected = [parameter.split("|") for parameter in self.parameters.split(", ")]
        return len(found) == len(expected) and all(a in b for a, b in zip(found, expected, strict=True))


_MIXIN = "transformers.generation:GenerationMixin"
_DECODES = "self, input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus, streamer"
NAMES = (
    Name(
        f"{_MIXIN}.generate",
        "self, inputs, generation_config, logits_processor, stopping_criteria, prefix_allowed_tokens_fn, synced_gpus, "
        "assistant_model, streamer, negative_prompt_ids, negative_prompt_attention_mask, custom_generate, kwargs",
    ),
    Name(
        f"{_MIXIN}._validate_generation_mode",
        "self, generation_mode, generation_config, generation_mode_kwargs",
    ),
    Name(
        f"{_MIXIN}._assisted_decoding",
        f"{_DECODES}, inputs_tensor, assistant_model, assistant_tokenizer, tokenizer, model_kwargs",
    ),
    Name(f"{_MIXIN}._sample", f"{_DECODES}, model_kwargs"),
    Name(f"{_MIXIN}._prefill", "self, input_ids, generation_config, model_kwargs, is_first_iteration"),
    Name(f"{_MIXIN}._optimize_model_for_decode", "self"),
    Name(f"{_MIXIN}._supports_default_dynamic_cache"),
    Name(f"{_MIXIN}._valid_auto_compile_criteria", "self, model_kwargs, generation_config"),
    Name(
        f"{_MIXIN}.prepare_inputs_for_generation",
        "self, input_ids, next_sequence_length, past_key_values|cache, attention_mask, inputs_embeds, "
        "is_first_iteration, kwargs",
    ),
    Name(f"{_MIXIN}._prepare_multimodal_encoder_kwargs_for_generation", "self, model_kwargs"),
    Name(f"{_MIXIN}._supports_mm_encoder_outputs", "self"),
    Name(
        f"{_MIXIN}._update_model_kwargs_for_generation",
        "self, outputs, model_kwargs, is_encoder_decoder, num_new_tokens",
    ),
    Name(f"{_MIXIN}.generate", attribute="_mask_length"),
    Name(f"{_MIXIN}._prepare_special_tokens", attribute="_pad_token_tensor"),
    Name(f"{_MIXIN}._prepare_cache_for_generation", attribute="_is_user_defined"),
    Name("transformers:GenerationConfig._get_default_generation_params"),
    Name("transformers.generation:CompileConfig._compile_all_devices"),
    Name("transformers:PreTrainedModel._is_stateful"),
    Name("transformers:PreTrainedConfig._attn_implementation"),
    Name("transformers.cache_utils:DynamicLayer.update", "self, key_states, value_states, args, kwargs"),
    Name("transformers.cache_utils:StaticLayer.update", "self, key_states, value_states, args, kwargs"),
    Name("transformers.cache_utils:StaticLayer.__init__", "self, max_cache_len, kwargs"),
    Name("transformers.cache_utils:DynamicSlidingWindowLayer.__init__", attribute="cumulative_length"),
    Name("transformers.cache_utils:StaticSlidingWindowLayer.__init__", attribute="cumulative_length_int"),
    Name("transformers.cache_utils:get_layer_types_and_kwargs", "config"),
    Name("transformers.integrations.sdpa_attention:sdpa_attention_forward"),
    Name("transformers.modeling_utils:ALL_ATTENTION_FUNCTIONS"),
    Name("transformers.utils:output_capturing._hook_installation_lock"),
    Name("transformers.utils:output_capturing.install_all_output_capturing_hooks", "model, prefix"),
    Name(
        "transformers.utils:output_capturing.maybe_install_capturing_hooks",
        attribute="_output_capturing_hooks_installed",
    ),
    Name("torch:_dynamo.mark_static_address", "t, guard"),
)
TRAINER_NAMES = (
    Name("trl:SFTTrainer._set_signature_columns_if_needed", attribute="_signature_columns"),
    Name("trl:SFTTrainer.__init__", attribute="_metrics"),
    Name("trl:SFTTrainer._get_train_sampler", "self, train_dataset"),
    Name("trl:SFTTrainer._save_checkpoint", "self, model, trial"),
    Name("trl:SFTTrainer._load_from_checkpoint", "self, resume_from_checkpoint, model"),
    Name("trl:SFTTrainer._load_best_model", "self"),
    Name("trl:SFTTrainer._tag_names"),
    Name("trl:SFTTrainer._name"),
    Name("trl:SFTTrainer.create_model_card", "self, model_name, dataset_name, tags"),
    Name("trl.trainer.sft_trainer:DataCollatorForVisionLanguageModeling"),
    Name("trl.chat_template_utils:get_training_chat_template", "processing_class, tokenizer"),
    Name("trl.chat_template_utils:has_generation_markers", "chat_template"),
    Name("trl.data_utils:prepare_multimodal_messages", "messages, images"),
    Name("trl.cli.accelerate_config:resolve_accelerate_config_argument", "launch_args"),
    Name("datasets:Dataset.__init__", attribute="_fingerprint"),
    Name("transformers:LlavaProcessor._get_num_multimodal_tokens", "self, image_sizes, kwargs"),
)


def check_names(names: Iterable[Name]) -> None:
    """Raise an `ImportError` for names that are gone or have other parameters; warn of versions never tested."""
    errors = []
    for package, own in groupby(sorted(names, key=lambda name: name.package), lambda name: name.package):
        version, supported = import_module(package).__version__, f"{package}{SUPPORTED[package]}"
        way_out = f"transformers-msd works with {supported}: `pip install '{supported}'`."
        missing = [str(name) for name in own if not name.is_there()]
        if missing:
            errors.append(f"{package} {version} lacks {'; '.join(missing)}. {way_out}")
        elif not SpecifierSet(SUPPORTED[package]).contains(version, prereleases=True):
            warnings.warn(
                f"Tests never ran on {package} {version}, although it lacks nothing that is needed. {way_out}",
                stacklevel=2,
            )
    if errors:
        raise ImportError(" ".join(errors))


check_names(NAMES)

# What a cache is called by `generate`, by models, and in what they return: the old name, and what it is today.
CACHE_NAMES = ("past_key_values", "cache")
# What a model takes pictures and videos as.
PIXELS = ("pixel_values", "pixel_values_images", "pixel_values_videos", "image_patches")
PREPARE_INPUTS = inspect.unwrap(pkgutil.resolve_name(f"{_MIXIN}.prepare_inputs_for_generation"))
CACHE = next(name for name in CACHE_NAMES if name in inspect.signature(PREPARE_INPUTS).parameters)


def cache_of(arguments: Mapping[str, Any]) -> Cache | None:
    """Return the cache among arguments, whichever its name. Both at once raise a `ValueError`."""
    caches = [arguments[name] for name in CACHE_NAMES if arguments.get(name) is not None]
    if len(caches) > 1:
        raise ValueError("`cache` is the new name of `past_key_values`, got both. Pass one of them.")
    return caches[0] if caches else None


def current_names(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Call the cache among arguments by the name it has today, where it comes by the old one."""
    cache = cache_of(arguments)
    named = {CACHE if name == CACHE_NAMES[0] else name: value for name, value in arguments.items()}
    return named if cache is None else named | {CACHE: cache}


def encode_pictures(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """
    Run the vision tower on the pictures of a forward, as `generate` does before its prefill.

    The forward then asks the text model alone for hidden states. Transformers 5.24 would hand the same choice of
    layers to the vision tower, which would lose those that the text model reads.

    Args:
        model (`torch.nn.Module`):
            A multimodal model, or any other.
        inputs (`dict[str, Any]`):
            Arguments of its forward.

    Returns:
        `dict[str, Any]`: The arguments with what the tower made of the pictures in their place.
    """
    if not any(name in inputs for name in PIXELS) or not model._supports_mm_encoder_outputs():
        return dict(inputs)
    encoded = model._prepare_multimodal_encoder_kwargs_for_generation(dict(inputs))["mm_encoder_outputs"]
    if not encoded:  # Fuyu has no tower, and reads its patches in the forward
        return dict(inputs)
    rest = {name: value for name, value in inputs.items() if name not in PIXELS}
    return rest | {"mm_encoder_outputs": encoded}


def attention_of(config: PreTrainedConfig) -> str:
    """Name the implementation of attention that the text part of a model uses."""
    return config.get_text_config()._attn_implementation


def is_stateful(model: PreTrainedModel) -> bool:
    """Tell whether a model has a recurrent state, which can't take tokens back."""
    return model._is_stateful


def makes_own_cache(model: PreTrainedModel) -> bool:
    """Tell whether `generate` leaves it to a model to make its cache."""
    return not model._supports_default_dynamic_cache()


def prefills_itself(model: PreTrainedModel) -> bool:
    """Tell whether a model runs prompts by a method of its own."""
    return type(model)._prefill is not GenerationMixin._prefill


def update_model_kwargs_of(model_class: type[GenerationMixin]) -> FunctionType:
    """Return the method by which a class of models changes the arguments of its forward after each token."""
    return model_class._update_model_kwargs_for_generation


def pad_token_id_of(generation_config: GenerationConfig) -> int:
    """Return the token that `generate`, which prepared these settings, puts behind ended rows."""
    pad_token = generation_config._pad_token_tensor
    return 0 if pad_token is None else int(pad_token)


def default_settings() -> dict[str, Any]:
    """Return what `generate` fills in where a setting was not made."""
    return GenerationConfig._get_default_generation_params()


def num_prompt_columns(
    input_ids: torch.Tensor, cache: Cache, model_kwargs: Mapping[str, Any], generation_config: GenerationConfig
) -> int:
    """
    Count the columns that a cache has once `generate`, which prepared all of these, has run the prompt.

    Args:
        input_ids (`torch.Tensor` of shape `(batch_size, sequence_length)`):
            Ids of the whole prompt, or of what is new in it.
        cache (`Cache`):
            The cache before that.
        model_kwargs (`dict[str, Any]`):
            Further arguments of the forward.
        generation_config (`GenerationConfig`):
            Settings of the call.
    """
    num_cached = int(cache.get_seq_length())
    embeds, mask = model_kwargs.get("inputs_embeds"), model_kwargs.get("attention_mask")
    length = (input_ids if embeds is None else embeds).shape[1]
    is_whole = embeds is not None or length == (generation_config._mask_length if mask is None else mask.shape[1])
    # A prompt that is in the cache already is run once more.
    return length if is_whole and length != num_cached else num_cached + length


def compiles_by_itself(model: PreTrainedModel, cache: Cache, generation_config: GenerationConfig) -> bool:
    """Tell whether plain `generate` compiles a model's forward with this cache and these settings."""
    return GenerationMixin._valid_auto_compile_criteria(model, {CACHE: cache}, generation_config)


def can_be_compiled(model: PreTrainedModel, generation_config: GenerationConfig) -> bool:
    """Tell whether plain `generate` would compile a model's forward, were its cache static, whatever its device."""
    generation_config = copy.copy(generation_config)
    generation_config.compile_config = copy.copy(generation_config.compile_config or CompileConfig())
    generation_config.compile_config._compile_all_devices = True
    return compiles_by_itself(model, _AnyStaticCache(), generation_config)


class _AnyStaticCache:
    is_compileable = True


def stock_drafting_error(assistant: Any) -> AttributeError:
    """Make the error with which a draft of ours lacks what Transformers' own way of drafting asks it for."""
    return AttributeError(
        f"{type(assistant).__name__} drafts by `transformers_msd` alone: call `transformers_msd.enable()`, and pass "
        "it as it is."
    )

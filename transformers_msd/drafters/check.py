"""What drafting can't do, told before anything runs."""

from collections.abc import Iterable
from typing import Any

from transformers import DynamicCache, GenerationConfig, PreTrainedModel
from transformers.generation import (
    AlternatingCodebooksLogitsProcessor,
    ClassifierFreeGuidanceLogitsProcessor,
    LogitsProcessor,
    SynthIDTextWatermarkLogitsProcessor,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)
from transformers.generation.configuration_utils import (
    GenerationMode,
    SynthIDTextWatermarkingConfig,
)

from transformers_msd.caches.check import LAYERS, check_cache
from transformers_msd.compat import cache_of, default_settings
from transformers_msd.models.base import FeatureDraftModel
from transformers_msd.target.probing import states_fact
from transformers_msd.traits.refusal import Refusal
from transformers_msd.traits.support import check_padding, features_fact, keeps_states, unsupported_fact


# These remember earlier calls, or run the model themselves, and so would be wrong at the nodes of a tree.
STATEFUL_PROCESSORS = (
    AlternatingCodebooksLogitsProcessor,
    ClassifierFreeGuidanceLogitsProcessor,
    SynthIDTextWatermarkLogitsProcessor,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)
# Of a call that passes an assistant, and of one whose target has one attached.
SERVED = (GenerationMode.ASSISTED_GENERATION, GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
# Other ways to draft, each of which would take the place of the assistant.
OTHER_WAYS = ("prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp", "speculation_type")
# What Transformers' own assistants are set by.
OTHER_SETTINGS = (
    "num_assistant_tokens",
    "num_assistant_tokens_schedule",
    "assistant_confidence_threshold",
    "max_matching_ngram_size",
    "assistant_lookbehind",
    "target_lookbehind",
)
WAY_OUT = "generate without `assistant_model`."


def check_call(
    model: PreTrainedModel,
    generation_mode: GenerationMode,
    generation_config: GenerationConfig,
    arguments: dict[str, Any],
    generation_mode_kwargs: dict[str, Any],
) -> None:
    """
    Raise a [`Refusal`] for a call that drafting can't serve.

    Args:
        model (`PreTrainedModel`):
            The target.
        generation_mode (`GenerationMode`):
            Mode of the call.
        generation_config (`GenerationConfig`):
            Settings of the call, defaults filled in.
        arguments (`dict[str, Any]`):
            The keyword arguments of `generate` as the user passed them.
        generation_mode_kwargs (`dict[str, Any]`):
            What `generate` passes to the decoding method besides model inputs.
    """
    if generation_mode not in SERVED:
        raise Refusal(
            f"Drafting serves greedy decoding and sampling, got {generation_mode.value}. Set `num_beams=1` and "
            f"leave `penalty_alpha` and `dola_layers` unset, or {WAY_OUT}"
        )
    fact = unsupported_fact(model) or features_fact(model) or states_fact(model)
    if fact is not None:
        raise Refusal(f"{type(model).__name__} {fact}. Otherwise, {WAY_OUT}")
    check_padding(model, arguments)
    _check_ways(generation_config, arguments)
    _check_settings(generation_config, arguments, generation_mode_kwargs)
    _check_processors(arguments.get("logits_processor") or ())
    if generation_config.cache_implementation not in (None, "dynamic", "static"):
        raise Refusal(
            "Drafting needs a dynamic or static cache on the target's device, got "
            f"`cache_implementation={generation_config.cache_implementation!r}`. Leave it unset, or {WAY_OUT}"
        )
    check_cache(DynamicCache(config=model.config.get_text_config(decoder=True)))
    cache = cache_of(arguments)
    if cache is not None:
        check_cache(cache)


def check_asked(processors: Iterable[LogitsProcessor], batch_size: int) -> None:
    """
    Raise a [`Refusal`] for processors of which nobody said that they keep nothing, where rows would come to them at
    other steps than in plain decoding.

    Args:
        processors (`LogitsProcessorList`):
            All processors of a call that passed no draft.
        batch_size (`int`):
            Sequences of the call.
    """
    others = sorted(type(own).__name__ for own in processors if not type(own).__module__.startswith("transformers."))
    if batch_size > 1 and others:
        raise Refusal(
            f"Logits processors of other packages may keep a state between steps, got {', '.join(others)} for "
            "several sequences. Pass one sequence, or the draft as `assistant_model` if they keep none."
        )


def check_draft(model: PreTrainedModel) -> None:
    """
    Raise a `ValueError` for a model that can't draft as a model of its own.

    Args:
        model (`PreTrainedModel`):
            The draft.
    """
    name = type(model).__name__
    if isinstance(model, FeatureDraftModel):
        raise ValueError(
            f"{name} drafts from the target's features: pass it as `assistant_model`, not to a drafter of models of "
            "their own."
        )
    fact = unsupported_fact(model)
    if fact is None:
        layers = {type(layer) for layer in DynamicCache(config=model.config.get_text_config(decoder=True)).layers}
        if wrong := sorted(layer.__name__ for layer in layers - LAYERS[DynamicCache]):
            fact = f"has a cache of {', '.join(wrong)}, which can't take rows back"
    if fact is None and keeps_states(model.config):
        fact = "has a recurrent state, which can't stand at the nodes of a tree"
    if fact is not None:
        raise ValueError(f"The draft, {name}, {fact}. Choose another draft.")
    check_device(model)


def check_device(draft: PreTrainedModel) -> None:
    """Raise a `ValueError` for a draft whose weights are elsewhere until it runs."""
    if any(parameter.is_meta for parameter in draft.parameters()):
        raise ValueError(
            f"A draft must have its weights on a device, got {type(draft).__name__} that is offloaded. Load it "
            "without `device_map` or `cpu_offload`: it is small."
        )


def _check_ways(generation_config: GenerationConfig, arguments: dict[str, Any]) -> None:
    for name in OTHER_WAYS:
        value = getattr(generation_config, name)
        if value not in (None, False):
            raise Refusal(f"A call drafts in one way, got `assistant_model` and `{name}={value!r}`. Drop one of them.")
    # As passed, without the defaults that some models fill in before they call `generate`.
    given, defaults = arguments.get("generation_config"), default_settings()
    for name in OTHER_SETTINGS:
        value, settled = arguments.get(name), getattr(given, name, None)
        if value is None and settled != defaults.get(name):
            value = settled
        if value is not None:
            raise Refusal(
                f"`{name}` is for Transformers' own assistants, and a draft of trees has a `tree_config`, got "
                f"`{name}={value!r}`. Drop it, and set `draft.tree_config = TreeConfig(num_nodes=..., depth=...)`."
            )


def _check_settings(
    generation_config: GenerationConfig, arguments: dict[str, Any], generation_mode_kwargs: dict[str, Any]
) -> None:
    if generation_config.use_cache is not None and not generation_config.use_cache:
        raise Refusal(
            f"Drafting needs the cache, got `use_cache={generation_config.use_cache}`. Leave it unset, or {WAY_OUT}"
        )
    if getattr(generation_config, "dola_layers", None) is not None:
        raise Refusal(
            "DoLa contrasts layers, and drafting serves greedy decoding and sampling alone, got "
            f"`dola_layers={generation_config.dola_layers!r}`. Leave it unset, or {WAY_OUT}"
        )
    if arguments.get("adapter_names") is not None:
        raise Refusal(
            "Drafting takes rows that have ended out of the batch, and PEFT's `adapter_names` would stay, got "
            f"`adapter_names={arguments['adapter_names']!r}`. Generate for each adapter alone, or {WAY_OUT}"
        )
    prompts = (arguments.get(name) for name in ("input_ids", "inputs_embeds"))
    if generation_config.prefill_chunk_size is not None and all(prompt is not None for prompt in prompts):
        raise Refusal(
            "Transformers does not chunk `inputs_embeds` beside `input_ids`, got "
            f"`prefill_chunk_size={generation_config.prefill_chunk_size}`. Leave it unset, or pass one of them."
        )
    if generation_config.output_attentions:
        raise Refusal(
            "Drafting can't return attentions: a tree's rows attend to other columns than plain decoding's. Drop "
            f"`output_attentions`, or {WAY_OUT}"
        )
    if generation_config.assistant_ensemble_weight is not None:
        raise Refusal(
            f"`assistant_ensemble_weight={generation_config.assistant_ensemble_weight}` changes the target's "
            "distribution, and drafting here never does. Leave it unset."
        )
    if generation_mode_kwargs.get("synced_gpus"):
        raise Refusal(
            "Drafting can't keep the processes of a sharded target in step yet, got `synced_gpus=True`. Generate on "
            f"an unsharded copy, or {WAY_OUT}"
        )
    if generation_mode_kwargs.get("assistant_tokenizer") is not None:
        raise Refusal("A draft shares the target's tokens: drop `assistant_tokenizer`.")
    if generation_config.guidance_scale not in (None, 1):
        raise Refusal(
            "Classifier-free guidance keeps a cache of its own between steps, got `guidance_scale="
            f"{generation_config.guidance_scale}`. Leave it unset, or {WAY_OUT}"
        )
    if isinstance(generation_config.watermarking_config, SynthIDTextWatermarkingConfig):
        raise Refusal(f"SynthID watermarking keeps a state between steps. Leave it unset, or {WAY_OUT}")


def _check_processors(processors: Iterable[LogitsProcessor]) -> None:
    stateful = sorted(
        type(processor).__name__ for processor in processors if isinstance(processor, STATEFUL_PROCESSORS)
    )
    if stateful:
        raise Refusal(
            f"Logits processors must keep no state between steps, got {', '.join(stateful)}. Drop them, or {WAY_OUT}"
        )

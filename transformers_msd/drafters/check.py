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

from transformers_msd.caches.check import check_cache
from transformers_msd.compat import attention_of, cache_of, is_stateful


# These remember earlier calls, or run the model themselves, and so would be wrong at the nodes of a tree.
STATEFUL_PROCESSORS = (
    AlternatingCodebooksLogitsProcessor,
    ClassifierFreeGuidanceLogitsProcessor,
    SynthIDTextWatermarkLogitsProcessor,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
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
    Raise a `ValueError` for a call that drafting can't serve.

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
    if generation_mode != GenerationMode.ASSISTED_GENERATION:
        raise ValueError(
            f"Drafting serves greedy decoding and sampling, got {generation_mode.value}. Set `num_beams=1` and "
            f"leave `penalty_alpha` and `dola_layers` unset, or {WAY_OUT}"
        )
    _check_model(model)
    _check_settings(generation_config, generation_mode_kwargs)
    _check_processors(arguments.get("logits_processor") or ())
    if generation_config.cache_implementation not in (None, "dynamic", "static"):
        raise ValueError(
            "Drafting needs a dynamic or static cache on the target's device, got "
            f"`cache_implementation={generation_config.cache_implementation!r}`. Leave it unset, or {WAY_OUT}"
        )
    cache = cache_of(arguments)
    check_cache(cache if cache is not None else DynamicCache(config=model.config.get_text_config(decoder=True)))


def _check_model(model: PreTrainedModel) -> None:
    if model.config.is_encoder_decoder:
        raise ValueError(f"Drafting needs a decoder-only target, got {type(model).__name__}. Instead, {WAY_OUT}")
    if is_stateful(model):
        raise ValueError(
            f"{type(model).__name__} has a recurrent state, which can't take back rejected tokens. Instead, {WAY_OUT}"
        )
    implementation = attention_of(model.config)
    if implementation not in ("sdpa", "eager"):
        raise ValueError(
            f"The target verifies a tree under a 4-D mask, which {implementation!r} attention can't carry. Load it "
            f'with `attn_implementation="sdpa"`, or {WAY_OUT}'
        )


def _check_settings(generation_config: GenerationConfig, generation_mode_kwargs: dict[str, Any]) -> None:
    if generation_config.use_cache is False:
        raise ValueError(f"Drafting needs the cache, got `use_cache=False`. Leave it unset, or {WAY_OUT}")
    if generation_config.output_attentions:
        raise ValueError(
            "Drafting can't return attentions: a tree's rows attend to other columns than plain decoding's. Drop "
            f"`output_attentions`, or {WAY_OUT}"
        )
    if generation_config.assistant_ensemble_weight is not None:
        raise ValueError(
            f"`assistant_ensemble_weight={generation_config.assistant_ensemble_weight}` changes the target's "
            "distribution, and drafting here never does. Leave it unset."
        )
    if generation_mode_kwargs.get("synced_gpus"):
        raise ValueError(
            "Drafting can't keep the processes of a sharded target in step yet, got `synced_gpus=True`. Generate on "
            f"an unsharded copy, or {WAY_OUT}"
        )
    if generation_mode_kwargs.get("assistant_tokenizer") is not None:
        raise ValueError("A draft shares the target's tokens: drop `assistant_tokenizer`.")
    if generation_config.guidance_scale not in (None, 1):
        raise ValueError(
            "Classifier-free guidance keeps a cache of its own between steps, got `guidance_scale="
            f"{generation_config.guidance_scale}`. Leave it unset, or {WAY_OUT}"
        )
    if isinstance(generation_config.watermarking_config, SynthIDTextWatermarkingConfig):
        raise ValueError(f"SynthID watermarking keeps a state between steps. Leave it unset, or {WAY_OUT}")


def _check_processors(processors: Iterable[LogitsProcessor]) -> None:
    stateful = sorted(
        type(processor).__name__ for processor in processors if isinstance(processor, STATEFUL_PROCESSORS)
    )
    if stateful:
        raise ValueError(
            f"Logits processors must keep no state between steps, got {', '.join(stateful)}. Drop them, or {WAY_OUT}"
        )

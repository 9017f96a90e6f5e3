"""Which classes a config asks for, and prompts as `generate` takes them."""

from typing import Any

from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    BatchEncoding,
    BatchFeature,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)

from transformers_msd.models.msd.configuration_msd import MSDConfig


def is_multimodal(config: PreTrainedConfig) -> bool:
    """Tell whether a model reads pictures."""
    return type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING


def auto_class(config: PreTrainedConfig) -> type:
    """Return the auto class that makes the model of a config: a target, a draft VLM, or a draft of MSD."""
    if isinstance(config, MSDConfig):
        return AutoModel
    return AutoModelForImageTextToText if is_multimodal(config) else AutoModelForCausalLM


def load_processor(name: str) -> ProcessorMixin | PreTrainedTokenizerBase:
    """Load the processor of a model, or the tokenizer of one for text alone, with a token to pad with."""
    multimodal = is_multimodal(AutoConfig.from_pretrained(name))
    processor = (AutoProcessor if multimodal else AutoTokenizer).from_pretrained(name)
    tokenizer = processor.tokenizer if multimodal else processor
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return processor


def encode_prompts(
    processor: ProcessorMixin | PreTrainedTokenizerBase, prompts: list[list[dict[str, Any]]]
) -> BatchFeature | BatchEncoding:
    """
    Turn prompts, each given as its messages with pictures in their places, into one left-padded batch.

    Special tokens are those that a user's call of `apply_chat_template` gives.
    """
    if isinstance(processor, ProcessorMixin):
        padding = {"processor_kwargs": {"padding": True, "padding_side": "left"}}
    else:
        padding = {"padding": True, "tokenizer_kwargs": {"padding_side": "left"}}
    return processor.apply_chat_template(
        prompts, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", **padding
    )

"""Which classes a config asks for, and prompts as `generate` takes them."""

from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoProcessor,
    AutoTokenizer,
    BatchEncoding,
    BatchFeature,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from trl.chat_template_utils import get_training_chat_template, has_generation_markers

from transformers_msd.traits.support import is_multimodal


def device_of(name: str | None) -> str:
    """
    Return the device of a name, or the one there is.

    Raises:
        ValueError: If this machine, or this build of PyTorch, has no such device.
    """
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        raise ValueError(f"`device` must be one of this machine, got {name!r}: {str(error).splitlines()[0]}") from None
    return name


def check_dtype(name: str, field: str) -> None:
    """Raise a `ValueError` unless a name is `auto` or a floating-point dtype of PyTorch."""
    dtype = getattr(torch, name, None)
    if name != "auto" and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"`{field}` must be `auto` or a floating-point dtype of torch, as `bfloat16`, got {name!r}.")


def load_processor(name: str) -> ProcessorMixin | PreTrainedTokenizerBase:
    """Load the processor of a model, or the tokenizer of one for text alone, with a token to pad with."""
    multimodal = is_multimodal(AutoConfig.from_pretrained(name))
    try:
        processor = (AutoProcessor if multimodal else AutoTokenizer).from_pretrained(name)
    except (ImportError, OSError, TypeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"{name} must hold the {'processor' if multimodal else 'tokenizer'} of its model: {reason}"
        ) from None
    tokenizer = processor.tokenizer if multimodal else processor
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return processor


def check_template(processor: ProcessorMixin | PreTrainedTokenizerBase) -> None:
    """Raise a `ValueError` unless a chat template tells the assistant's tokens, or TRL knows how it would."""
    if processor.chat_template is None:
        raise ValueError(
            "The processor must have a chat template, got none. Take that of the target's instruct model."
        )
    if has_generation_markers(processor.chat_template):
        return
    try:
        get_training_chat_template(processor)
    except ValueError:
        raise ValueError(
            "The chat template must mark the assistant's turns, by `{% generation %}` before and "
            "`{% endgeneration %}` after what it says. Add both to the processor's `chat_template`, or set "
            "`assistant_only_loss: false`."
        ) from None


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

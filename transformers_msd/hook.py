"""
How `generate` comes here: three methods of `GenerationMixin`, wrapped. No other file replaces anything.

A call with one of our assistants takes our path, every other call Transformers' own.
"""

import functools
import inspect
from contextvars import ContextVar
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation import GenerationMixin, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.configuration_utils import GenerationMode

from transformers_msd.compat import CACHE, current_names
from transformers_msd.decoding import tree_decoding
from transformers_msd.drafters import assistant_for
from transformers_msd.drafters.base import ChecksTarget, as_chains
from transformers_msd.drafters.check import check_call
from transformers_msd.drafters.runtime import open_captures
from transformers_msd.target.capturing import capturing
from transformers_msd.traits.support import keeps_states


_generate = GenerationMixin.generate
_validate_generation_mode = GenerationMixin._validate_generation_mode
_assisted_decoding = GenerationMixin._assisted_decoding

_PARAMETERS = tuple(inspect.signature(_generate).parameters)

# The call's own arguments: `generate` encodes the pictures and drops them before it comes to decoding.
_arguments: ContextVar[dict[str, Any] | None] = ContextVar("transformers_msd_arguments", default=None)


@functools.wraps(_generate)
def generate(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
    arguments = dict(zip(_PARAMETERS, (self, *args), strict=False)) | kwargs
    assistant_model = arguments.get("assistant_model")
    if assistant_for(assistant_model) is None:
        is_class = isinstance(assistant_model, type)
        if assistant_model is not None and (is_class or not hasattr(assistant_model, "config")):
            got = f"the class {assistant_model.__name__}" if is_class else type(assistant_model).__name__
            raise ValueError(
                "`assistant_model` must be a model, or an object with a method `candidate_generator`, got "
                f"{got}. Load a folder by `MSDDraftModel.from_pretrained`."
            )
        return _generate(self, *args, **kwargs)
    del arguments["self"]
    token = _arguments.set(current_names(arguments))
    try:
        with capturing(self):
            return _generate(self, *args, **current_names(kwargs))
    finally:
        _arguments.reset(token)


@functools.wraps(_validate_generation_mode)
def validate_generation_mode(
    self: PreTrainedModel,
    generation_mode: GenerationMode,
    generation_config: GenerationConfig,
    generation_mode_kwargs: dict[str, Any],
) -> None:
    assistant_model = generation_mode_kwargs.get("assistant_model")
    assistant = assistant_for(assistant_model)
    if assistant is None:
        is_headless = isinstance(assistant_model, PreTrainedModel) and not assistant_model.can_generate()
        if is_headless and generation_config.speculation_type is None:
            raise ValueError(
                f"`assistant_model` must say tokens, got {type(assistant_model).__name__}, which has no head. Load it "
                "with one, by `AutoModelForCausalLM` say."
            )
        return _validate_generation_mode(self, generation_mode, generation_config, generation_mode_kwargs)
    arguments = _arguments.get()
    if arguments is None:
        raise ValueError(
            "`generate` was replaced after `transformers_msd` had wrapped it, so that a draft can't see the call. "
            "Import `transformers_msd` after whatever replaces it."
        )
    check_call(self, generation_mode, generation_config, arguments, generation_mode_kwargs)
    if isinstance(assistant, ChecksTarget):
        assistant.check_target(self, arguments)
    # All else is as in the plain call that gives the same tokens.
    plain_mode = GenerationMode.SAMPLE if generation_config.do_sample else GenerationMode.GREEDY_SEARCH
    plain_kwargs = {name: value for name, value in generation_mode_kwargs.items() if name != "assistant_model"}
    return _validate_generation_mode(self, plain_mode, generation_config, plain_kwargs)


@functools.wraps(_assisted_decoding)
def assisted_decoding(
    self: PreTrainedModel,
    input_ids: torch.Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    **kwargs: Any,
) -> Any:
    assistant = assistant_for(kwargs.get("assistant_model"))
    if assistant is None:
        return _assisted_decoding(self, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs)
    if keeps_states(self.config):
        assistant = as_chains(assistant, type(self).__name__)
    # What belongs to assistants with a tokenizer of their own and to encoders; `check_call` has seen `synced_gpus`.
    dropped = ("assistant_model", "assistant_tokenizer", "tokenizer", "inputs_tensor", "synced_gpus")
    with (
        self._optimize_model_for_decode(),
        open_captures(assistant, self, kwargs[CACHE], generation_config) as captures,
    ):
        return tree_decoding(
            self,
            input_ids,
            logits_processor,
            stopping_criteria,
            generation_config,
            assistant=assistant,
            arguments=_arguments.get() or {},
            captures=captures,
            **{name: value for name, value in kwargs.items() if name not in dropped},
        )


_REPLACED = {
    "generate": (_generate, generate),
    "_validate_generation_mode": (_validate_generation_mode, validate_generation_mode),
    "_assisted_decoding": (_assisted_decoding, assisted_decoding),
}


def enable() -> None:
    """Let `generate` take our assistants. Importing `transformers_msd` does it; safe to call again."""
    for name, (original, replacement) in _REPLACED.items():
        if vars(GenerationMixin)[name] is original:
            setattr(GenerationMixin, name, replacement)


def disable() -> None:
    """Put Transformers' own methods back, except where somebody has wrapped ours since."""
    for name, (original, replacement) in _REPLACED.items():
        if vars(GenerationMixin)[name] is replacement:
            setattr(GenerationMixin, name, original)

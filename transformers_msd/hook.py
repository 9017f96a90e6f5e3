"""
How `generate` comes here: four methods of `GenerationMixin`, wrapped. No other file replaces anything.

A call with one of our assistants takes our path, every other call Transformers' own. Where a draft is attached to the
target, a call stays plain up to its decoding: whatever turns out to stand against drafting, it just goes on.
"""

import functools
import inspect
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation import GenerationMixin, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.configuration_utils import GenerationMode

from transformers_msd.compat import CACHE, current_names
from transformers_msd.decoding import tree_decoding
from transformers_msd.drafters import assistant_for
from transformers_msd.drafters.attached import Attachment, attachment_of
from transformers_msd.drafters.base import ChecksTarget, TreeAssistant, as_chains
from transformers_msd.drafters.check import check_asked, check_call
from transformers_msd.drafters.runtime import open_captures
from transformers_msd.target.capturing import capturing
from transformers_msd.traits.refusal import Refusal
from transformers_msd.traits.support import keeps_states


_generate = GenerationMixin.generate
_validate_generation_mode = GenerationMixin._validate_generation_mode
_assisted_decoding = GenerationMixin._assisted_decoding
_sample = GenerationMixin._sample

_PARAMETERS = tuple(inspect.signature(_generate).parameters)


@dataclass
class _Call:
    """
    A call that drafts.

    Args:
        arguments (`dict[str, Any]`):
            Its own arguments: `generate` encodes the pictures and drops them before it comes to decoding.
        attachment (`Attachment`, *optional*):
            What drafts where the call passed nothing; taken out once something stands against it.
    """

    arguments: dict[str, Any]
    attachment: Attachment | None = None

    def go_on_without(self, model: PreTrainedModel, refusal: Refusal) -> None:
        """Let an attached draft rest for this call, unless it is another call, inside of it, that was refused."""
        if refusal.has_left:
            raise refusal
        self.attachment.tell(model, refusal)
        self.attachment = None


# The innermost `generate` under way, `None` where it drafts nothing.
_call: ContextVar[_Call | None] = ContextVar("transformers_msd_call", default=None)


@functools.wraps(_generate)
def generate(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
    arguments = dict(zip(_PARAMETERS, (self, *args), strict=False)) | kwargs
    assistant_model, outer = arguments.get("assistant_model"), _call.get()
    del arguments["self"]
    if assistant_for(assistant_model) is None:
        is_class = isinstance(assistant_model, type)
        if assistant_model is not None and (is_class or not hasattr(assistant_model, "config")):
            got = f"the class {assistant_model.__name__}" if is_class else type(assistant_model).__name__
            raise ValueError(
                "`assistant_model` must be a model, or an object with a method `candidate_generator`, got "
                f"{got}. Load a folder by `MSDDraftModel.from_pretrained`."
            )
        attachment = None
        # A draft's own calls are plain, and a decoding method that was passed comes back here if it wants to.
        if assistant_model is None and arguments.get("custom_generate") is None and outer is None:
            attachment = attachment_of(self)
        if attachment is not None:
            arguments["assistant_model"] = attachment.assistant_model
        if attachment is None and outer is None:
            return _generate(self, *args, **kwargs)
        token = _call.set(None if attachment is None else _Call(current_names(arguments), attachment))
        try:
            return _generate(self, *args, **kwargs)
        finally:
            _call.reset(token)
    token = _call.set(_Call(current_names(arguments)))
    try:
        with capturing(self):
            return _generate(self, *args, **current_names(kwargs))
    except Refusal as refusal:
        refusal.has_left = True
        raise
    finally:
        _call.reset(token)


@functools.wraps(_validate_generation_mode)
def validate_generation_mode(
    self: PreTrainedModel,
    generation_mode: GenerationMode,
    generation_config: GenerationConfig,
    generation_mode_kwargs: dict[str, Any],
) -> None:
    assistant_model = generation_mode_kwargs.get("assistant_model")
    assistant, call = assistant_for(assistant_model), _call.get()
    if assistant is None:
        is_headless = isinstance(assistant_model, PreTrainedModel) and not assistant_model.can_generate()
        if is_headless and generation_config.speculation_type is None:
            raise ValueError(
                f"`assistant_model` must say tokens, got {type(assistant_model).__name__}, which has no head. Load it "
                "with one, by `AutoModelForCausalLM` say."
            )
        _validate_generation_mode(self, generation_mode, generation_config, generation_mode_kwargs)
        if call is None or call.attachment is None:
            return
        if generation_mode == GenerationMode.ASSISTED_GENERATION:  # the call drafts in another way
            call.attachment = None
            return
        try:
            if type(self)._sample is not GenerationMixin._sample:
                raise Refusal("It decodes by a method of its own.")
            assistant = assistant_for(call.attachment.assistant_model)
            _check(self, assistant, generation_mode, generation_config, call.arguments, generation_mode_kwargs)
        except Refusal as refusal:
            call.go_on_without(self, refusal)
        return
    if call is None:
        raise ValueError(
            "`generate` was replaced after `transformers_msd` had wrapped it, so that a draft can't see the call. "
            "Import `transformers_msd` after whatever replaces it."
        )
    _check(self, assistant, generation_mode, generation_config, call.arguments, generation_mode_kwargs)
    # All else is as in the plain call that gives the same tokens.
    plain_mode = GenerationMode.SAMPLE if generation_config.do_sample else GenerationMode.GREEDY_SEARCH
    plain_kwargs = {name: value for name, value in generation_mode_kwargs.items() if name != "assistant_model"}
    return _validate_generation_mode(self, plain_mode, generation_config, plain_kwargs)


def _check(
    model: PreTrainedModel,
    assistant: TreeAssistant,
    generation_mode: GenerationMode,
    generation_config: GenerationConfig,
    arguments: dict[str, Any],
    generation_mode_kwargs: dict[str, Any],
) -> None:
    check_call(model, generation_mode, generation_config, arguments, generation_mode_kwargs)
    if isinstance(assistant, ChecksTarget):
        assistant.check_target(model, arguments)


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
    return _draft(
        self, assistant, input_ids, logits_processor, stopping_criteria, generation_config, _call.get(), **kwargs
    )


@functools.wraps(_sample)
def sample(
    self: PreTrainedModel,
    input_ids: torch.Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    *args: Any,
    **kwargs: Any,
) -> Any:
    call = _call.get()
    inputs = (input_ids, logits_processor, stopping_criteria, generation_config)
    if call is not None and call.attachment is not None:
        assistant = assistant_for(call.attachment.assistant_model)
        try:
            check_asked(logits_processor, len(input_ids))
            with capturing(self):
                return _draft(self, assistant, *inputs, call, **kwargs)
        except Refusal as refusal:
            call.go_on_without(self, refusal)
    return _sample(self, *inputs, *args, **kwargs)


def _draft(
    model: PreTrainedModel,
    assistant: TreeAssistant,
    input_ids: torch.Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    call: _Call | None,
    **kwargs: Any,
) -> Any:
    if keeps_states(model.config):
        assistant = as_chains(assistant, type(model).__name__)
    # What belongs to assistants with a tokenizer of their own and to encoders; `check_call` has seen `synced_gpus`.
    dropped = ("assistant_model", "assistant_tokenizer", "tokenizer", "inputs_tensor", "synced_gpus")
    with (
        model._optimize_model_for_decode(),
        open_captures(assistant, model, kwargs[CACHE], generation_config) as captures,
    ):
        return tree_decoding(
            model,
            input_ids,
            logits_processor,
            stopping_criteria,
            generation_config,
            assistant=assistant,
            arguments={} if call is None else call.arguments,
            captures=captures,
            **{name: value for name, value in kwargs.items() if name not in dropped},
        )


_REPLACED = {
    "generate": (_generate, generate),
    "_validate_generation_mode": (_validate_generation_mode, validate_generation_mode),
    "_assisted_decoding": (_assisted_decoding, assisted_decoding),
    "_sample": (_sample, sample),
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

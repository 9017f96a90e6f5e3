"""Drafts attached to targets: each `generate` of such a target uses its draft, whoever calls it."""

import inspect
import re
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn
from transformers import PreTrainedModel
from transformers.generation import GenerationMixin
from transformers.utils import logging

from transformers_msd.drafters.assistants import assistant_for
from transformers_msd.drafters.base import ChecksTarget
from transformers_msd.traits.refusal import Refusal
from transformers_msd.traits.support import features_fact, unready_fact, unsupported_fact


logger = logging.get_logger(__name__)


@dataclass
class Attachment:
    """
    A draft that stays with a target.

    Args:
        assistant_model (`Any`):
            What drafts, as `generate` takes it.
    """

    assistant_model: Any
    _told: set[str] = field(default_factory=set)

    def tell(self, model: PreTrainedModel, refusal: Refusal) -> None:
        """Warn that a call goes on without the draft, once for each reason: numbers make no other reason."""
        reason = re.sub(r"\d+", "", str(refusal))
        if reason not in self._told:
            self._told.add(reason)
            logger.warning(f"{type(model).__name__} generates without the draft attached to it. {refusal}")


# Targets are not kept by it, and carry nothing of it when they are saved or copied.
_attachments: WeakKeyDictionary[nn.Module, Attachment] = WeakKeyDictionary()


def attachment_of(model: nn.Module) -> Attachment | None:
    """Return what is attached to a target, if anything is."""
    return _attachments.get(model)


def attach(target: nn.Module, assistant_model: Any) -> None:
    """
    Let every `generate` of a target use a draft, also where the call can't be edited: in a pipeline, an evaluation
    harness, a trainer that samples, a server.

    Tokens stay those of plain `generate`. An `assistant_model` that a call passes comes first, as does another way to
    draft (`prompt_lookup_num_tokens`, ...). A call that drafting can't serve, of beam search say, runs as it would
    without a draft, and a warning says why, once for each reason. Weights that a trainer changes under the draft cost
    accepted tokens, never other tokens. Calls that run meanwhile go on as they began.

    Args:
        target (`torch.nn.Module`):
            A model with `generate`, also one inside PEFT's, `torch.compile`'s or `DistributedDataParallel`'s. It is
            not kept alive; the draft is, as long as the target.
        assistant_model (`Any`):
            What drafts, as `generate` takes it: a draft model, [`VLMDrafter`], [`NgramDrafter`], [`StaticRuntime`]
            ... It takes the place of one attached before.

    Raises:
        ValueError: If nothing drafts for this target, or this draft does not fit it.
    """
    assistant = assistant_for(assistant_model)
    if assistant is None:
        raise ValueError(
            "`assistant_model` must be a draft of this library, or an object with a method `candidate_generator`, got "
            f"{type(assistant_model).__name__}. Wrap a model of another kind in `VLMDrafter`."
        )
    models = _generating(target)
    for model in models:
        fact = unsupported_fact(model) or features_fact(model)
        # What a model is set to may be set otherwise when it is called.
        if fact is not None and fact != unready_fact(model):
            raise ValueError(f"{type(model).__name__} {fact}. No draft can be attached to it.")
        if isinstance(assistant, ChecksTarget):
            with suppress(Refusal):  # it misses the prompt, which each call will have
                assistant.check_target(model, {})
    for model in models:
        _attachments[model] = Attachment(assistant_model)


def detach(target: nn.Module) -> None:
    """
    Let a target generate as before [`attach`]. Without a draft attached to it, nothing happens.

    Args:
        target (`torch.nn.Module`):
            The target, or what is around it.
    """
    for model in _generating(target):
        _attachments.pop(model, None)


def _generating(target: nn.Module) -> list[PreTrainedModel]:
    """Find the models that decode when a target generates: itself, or the one inside that it hands its prompt to."""
    model = target
    while not isinstance(model, PreTrainedModel):
        if hasattr(model, "get_base_model"):
            model = model.get_base_model()
        else:
            inner = next((name for name in ("_orig_mod", "module") if hasattr(model, name)), None)
            if inner is None:
                raise ValueError(f"`target` must be a `PreTrainedModel`, got {type(model).__name__}.")
            model = getattr(model, inner)
    if inspect.unwrap(type(model).generate) is inspect.unwrap(GenerationMixin.generate):
        return [model]
    parts = [part for part in model.modules() if isinstance(part, GenerationMixin) and part is not model]
    return [part for part in parts if part.can_generate()] or [model]

"""Assistants around another."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NoReturn

from transformers import PreTrainedModel

from transformers_msd.compat import stock_drafting_error
from transformers_msd.drafters.assistants import assistant_for
from transformers_msd.drafters.base import CallInputs, ChecksTarget, TreeCandidateGenerator, models_of, tree_config_of
from transformers_msd.target.target import Target
from transformers_msd.trees.tree import TreeConfig


class Wrapped:
    """
    An assistant that lets another draft, and as it stands changes nothing about it.

    Args:
        assistant (`Any`):
            What drafts: anything that `generate` takes as `assistant_model` to draft trees.

    Raises:
        ValueError: If it is no assistant.
    """

    def __init__(self, assistant: Any) -> None:
        found = assistant_for(assistant)
        if found is None:
            raise ValueError(
                "Expected an `MSDDraftModel` or an object with a method `candidate_generator`, got "
                f"{type(assistant).__name__}. Wrap a model of another kind in `VLMDrafter`."
            )
        self.assistant = found

    @property
    def tree_config(self) -> TreeConfig | None:
        """Tree of what drafts, where it has any."""
        return tree_config_of(self.assistant)

    @property
    def models(self) -> tuple[PreTrainedModel, ...]:
        """Models of what drafts, where it has any."""
        return models_of(self.assistant)

    @property
    def config(self) -> NoReturn:
        """None: Transformers' own way of drafting asks for it first."""
        raise stock_drafting_error(self)

    def candidate_generator(self, target: Target, inputs: CallInputs) -> TreeCandidateGenerator:
        """Make the candidate generator of one call, which the call alone holds."""
        return self.assistant.candidate_generator(target, inputs)

    def check_target(self, target: PreTrainedModel, arguments: Mapping[str, Any]) -> None:
        """Raise a `ValueError` if the assistant can't draft for this model, called with these arguments."""
        if isinstance(self.assistant, ChecksTarget):
            self.assistant.check_target(target, arguments)


class Ungated(Wrapped):
    """An assistant that is tried in every round, whether it pays or not, and alone: what it is worth by itself."""

    @property
    def tree_config(self) -> TreeConfig:
        """Tree of what drafts, without a gate and without n-grams."""
        return replace(super().tree_config or TreeConfig(), gate=False, ngrams=False)

    def candidate_generator(self, target: Target, inputs: CallInputs) -> TreeCandidateGenerator:
        candidates = super().candidate_generator(target, inputs)
        if candidates.measured is None:
            candidates.sizing = None
        return candidates

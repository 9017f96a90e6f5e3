"""Drafting with a small model of its own: any language model or VLM of the target's vocabulary (Spec-LLaVA)."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from transformers_msd.configuration_msd import visual_token_ids
from transformers_msd.drafters.base import CallInputs
from transformers_msd.drafters.model import DraftModel, ModelCandidateGenerator
from transformers_msd.target import Target
from transformers_msd.tree import TreeConfig


# Models of one tokenizer pad their vocabularies to different multiples.
MOST_PADDING = 512
# Inputs of a forward that belong to the target's own run.
_NOT_PROMPT = ("past_key_values", "inputs_embeds", "position_ids", "labels", "use_cache", "logits_to_keep")


class VLMDrafter:
    """
    Drafts with a small independent model, which sees the same prompt and the same pictures (Spec-LLaVA, arXiv
    2509.11961).

    ```python
    >>> target.generate(**inputs, assistant_model=VLMDrafter(small_model))
    ```

    Args:
        draft_vlm ([`~transformers.PreTrainedModel`]):
            A VLM or language model with the target's tokens. One without pictures drafts from the text alone.
        draft_inputs (`dict[str, Any]`, *optional*):
            What the draft's own processor makes of the prompt, where it differs from the target's. They belong to one
            prompt: make a drafter for each call, the model is shared.
        tree_config ([`TreeConfig`], *optional*):
            Tree to draft, 32 nodes by default.
    """

    def __init__(
        self,
        draft_vlm: PreTrainedModel,
        draft_inputs: Mapping[str, Any] | None = None,
        tree_config: TreeConfig | None = None,
    ) -> None:
        self.draft_vlm = draft_vlm
        self.draft_inputs = draft_inputs
        self.tree_config = tree_config or TreeConfig(num_nodes=32, depth=6, top_k=4)

    def candidate_generator(self, target: Target, inputs: CallInputs) -> "VLMCandidateGenerator":
        """Make the candidate generator of one `generate` call."""
        return VLMCandidateGenerator(self, target, inputs)

    def check_target(self, target: PreTrainedModel, arguments: Mapping[str, Any]) -> None:
        """
        Raise a `ValueError` unless the draft shares the target's vocabulary and can read the prompt.

        Args:
            target (`PreTrainedModel`):
                Model to draft for.
            arguments (`dict[str, Any]`):
                The keyword arguments of `generate`.
        """
        check_draft(self.draft_vlm, target, self.draft_inputs, arguments)


def check_draft(
    draft: PreTrainedModel,
    target: PreTrainedModel,
    draft_inputs: Mapping[str, Any] | None,
    arguments: Mapping[str, Any],
) -> None:
    """Raise a `ValueError` unless a draft model shares the target's vocabulary and can read the prompt of a call."""
    ours, theirs = (model.config.get_text_config().vocab_size for model in (draft, target))
    if abs(ours - theirs) > MOST_PADDING:
        raise ValueError(
            f"The draft must have the target's vocabulary, got {ours} tokens for the draft and {theirs} for "
            f"{type(target).__name__}. Choose a draft of the same tokenizer."
        )
    if draft_inputs is None and prompt_ids(arguments) is None:
        raise ValueError(
            "A draft model can't read `inputs_embeds` of the target, got no `input_ids`. Pass them, too, or what the "
            "draft's processor makes of the prompt: `draft_inputs=...`."
        )


def prompt_ids(arguments: Mapping[str, Any]) -> torch.Tensor | None:
    """Return the ids of the prompt among the arguments of `generate`."""
    ids = arguments.get("input_ids", arguments.get("inputs"))
    return ids if torch.is_tensor(ids) and ids.ndim == 2 and ids.shape[1] > 0 and not ids.is_floating_point() else None


def prompt_of(model: PreTrainedModel, target: PreTrainedModel, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """
    Choose from the arguments of `generate` what a draft reads of the prompt.

    A draft without pictures gets the text around them, padded on the left.
    """
    names = set(inspect.signature(type(model).forward).parameters) - set(_NOT_PROMPT)
    inputs = {name: value for name, value in arguments.items() if name in names and torch.is_tensor(value)}
    inputs["input_ids"] = ids = prompt_ids(arguments)
    mask = inputs.get("attention_mask")
    inputs["attention_mask"] = mask = torch.ones_like(ids) if mask is None else mask[:, -ids.shape[1] :]
    if visual_token_ids(model.config):
        return inputs
    visual = torch.isin(ids, torch.tensor(visual_token_ids(target.config), dtype=ids.dtype, device=ids.device))
    kept = mask.bool() & ~visual
    order = kept.int().sort(dim=1, stable=True).indices[:, -max(int(kept.sum(-1).max()), 1) :]
    kept = kept.gather(1, order)
    return {"input_ids": ids.gather(1, order).masked_fill(~kept, 0), "attention_mask": kept.to(mask.dtype)}


class VLMCandidateGenerator(ModelCandidateGenerator):
    """
    Grows trees with one independent model.

    Args:
        drafter ([`VLMDrafter`]):
            Model and settings.
        target ([`Target`]):
            The target of the call.
        inputs ([`CallInputs`]):
            Inputs of the call.
    """

    def __init__(self, drafter: VLMDrafter, target: Target, inputs: CallInputs) -> None:
        super().__init__([drafter.draft_vlm], [], drafter.tree_config, target, inputs)
        self._drafter = drafter

    def start(self, batch_size: int) -> list[DraftModel]:
        inputs = self._drafter.draft_inputs
        if inputs is None:
            inputs = prompt_of(self._drafter.draft_vlm, self._target.model, self._inputs.arguments)
        num_prompts = len(inputs["input_ids"])
        if batch_size % num_prompts:
            raise ValueError(
                f"`draft_inputs` must hold as many prompts as the call, got {num_prompts} for {batch_size} rows."
            )
        return [DraftModel.start(self._drafter.draft_vlm, inputs, batch_size // num_prompts)]

"""Drafting with a small model of its own: any language model or VLM of the target's vocabulary (Spec-LLaVA)."""

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedModel

from transformers_msd.drafters.model import ModelDrafter
from transformers_msd.trees.tree import TreeConfig


class VLMDrafter(ModelDrafter):
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
        super().__init__([draft_vlm], draft_inputs, tree_config)

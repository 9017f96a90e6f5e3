"""What drafts with a model on the target's features."""

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedModel

from transformers_msd.drafters.base import CallInputs
from transformers_msd.drafters.block_candidates import BlockCandidateGenerator
from transformers_msd.drafters.check import check_device
from transformers_msd.drafters.msd_candidates import MSDCandidateGenerator
from transformers_msd.drafters.prompts import prompt_ids
from transformers_msd.models.base import FeatureDraftModel
from transformers_msd.models.block.modeling_block import BlockDraftModel
from transformers_msd.models.configuration import checked_tree
from transformers_msd.target.target import Target
from transformers_msd.traits.refusal import Refusal
from transformers_msd.traits.support import unready_fact
from transformers_msd.trees.tree import TreeConfig


class MSDDrafter:
    """
    Drafts with an [`MSDDraftModel`] or another draft on features, which `generate` also takes as it is.

    Args:
        draft ([`FeatureDraftModel`]):
            The draft model.
        tree_config ([`TreeConfig`], *optional*):
            Tree to draft, the draft's own by default.
    """

    def __init__(self, draft: FeatureDraftModel, tree_config: TreeConfig | None = None) -> None:
        self.draft = draft
        self._tree_config = None if tree_config is None else TreeConfig.checked(tree_config)

    @property
    def tree_config(self) -> TreeConfig:
        """Tree to draft."""
        return self._tree_config or self.draft.tree_config

    @tree_config.setter
    def tree_config(self, tree_config: TreeConfig) -> None:
        self._tree_config = TreeConfig.checked(tree_config)

    @property
    def models(self) -> tuple[FeatureDraftModel]:
        """The draft model."""
        return (self.draft,)

    def candidate_generator(self, target: Target, inputs: CallInputs) -> "MSDCandidateGenerator":
        """Make the candidate generator of one call."""
        by_blocks = isinstance(self.draft, BlockDraftModel)
        generator = BlockCandidateGenerator if by_blocks else MSDCandidateGenerator
        return generator(self.draft, self.tree_config, target, inputs)

    def check_target(self, target: PreTrainedModel, arguments: Mapping[str, Any]) -> None:
        """
        Raise a `ValueError` unless the draft can read the target's features, knows which tokens it drafts, and says as
        many of them one after the other as the tree is deep.

        Args:
            target (`PreTrainedModel`):
                Model to draft for.
            arguments (`dict[str, Any]`):
                The keyword arguments of `generate`.
        """
        fact = unready_fact(self.draft)
        if fact is not None:
            raise ValueError(f"The draft, {type(self.draft).__name__}, {fact}.")
        check_device(self.draft)
        self.draft.check_target(target)
        if self.draft.needs_tokens:
            raise ValueError(
                f"The {self.draft.head.out_features} tokens of the draft must be chosen before it drafts, got "
                "none. Train it with `MSDTrainer`, or call `choose_tokens`."
            )
        if self.draft.get_input_embeddings() is not None and prompt_ids(arguments) is None:
            raise Refusal(
                "A draft that has embeddings of its own needs `input_ids`, got `inputs_embeds` alone. Pass both."
            )
        checked_tree(self.tree_config, self.draft.most_levels)

"""What a draft reads of the rows that the target hands over."""

from dataclasses import replace

import torch

from transformers_msd.models.base import FeatureDraftModel
from transformers_msd.target.committed import Committed
from transformers_msd.target.target import Target
from transformers_msd.traits.scales import scales_embeddings
from transformers_msd.trees.host import keep_rows


def beside(features: torch.Tensor, context: torch.Tensor | None) -> torch.Tensor:
    """Put what is read with each feature, `(batch_size, m)`, behind those `(batch_size, n, hidden_size)`, if any."""
    if context is None:
        return features
    context = context.to(features)[:, None].expand(-1, features.shape[1], -1)
    return torch.cat([features, context], dim=-1)


class Reader:
    """
    Makes of committed rows those that a draft reads, as its training made them.

    Args:
        draft ([`FeatureDraftModel`]):
            The draft model.
        target ([`Target`]):
            The target of the call.
    """

    def __init__(self, draft: FeatureDraftModel, target: Target) -> None:
        self._draft, self._target = draft, target
        # Whether embeddings are others than the target's layers read.
        scale = draft.embedding_scale
        self._looks_up = scale is not None and (scale != 1 or scales_embeddings(target.model))
        # Of each sequence: rows of the target that the draft has none for, and what is read with each feature.
        self.starts: torch.Tensor | None = None
        self.context: torch.Tensor | None = None
        # Whether the first row of each pairs a token with the feature of a visual one.
        self.begins_visual: torch.Tensor = target.begins_visual

    def read(self, committed: Committed, is_prompt: bool, num_before: torch.Tensor | None) -> Committed:
        """
        Make the rows that the draft reads.

        Args:
            committed (`Committed`):
                Rows of the target.
            is_prompt (`bool`):
                Whether visual rows may be among them.
            num_before (`torch.Tensor` of shape `(batch_size,)`, *optional*):
                Rows that the draft has read; none of any sequence when it is not given.
        """
        if num_before is None:
            self.starts = committed.position_ids[:, 0]
        committed = self._embed(committed, is_prompt)
        if is_prompt:
            committed = self._pool(committed, None if num_before is not None else self.begins_visual)
        else:
            committed = replace(committed, features=beside(committed.features, self.context))
        if self._draft.renumbers:
            places = torch.arange(committed.token_ids.shape[1], device=committed.lengths.device)
            if num_before is not None:
                places = places + num_before.to(places.device)[:, None]
            committed = replace(committed, position_ids=places.expand_as(committed.position_ids))
        return committed

    def keep_sequences(self, kept: list[bool]) -> None:
        """Forget sequences that have ended."""
        self.starts = None if self.starts is None else keep_rows(self.starts, kept)
        self.begins_visual = keep_rows(self.begins_visual, kept)
        self.context = None if self.context is None else keep_rows(self.context, kept)

    def _embed(self, committed: Committed, is_prompt: bool) -> Committed:
        """Give rows the embeddings that the draft reads, where these are not those of the target's rows."""
        draft, owns = self._draft, self._draft.get_input_embeddings() is not None
        if not owns and not self._looks_up and not (is_prompt and draft.reads_placeholders):
            return committed
        unnamed = (draft.config.visual_token_ids or [0])[0]
        embeds = draft.embed(committed.token_ids.where(committed.token_ids >= 0, unnamed), self._target)
        embeds, is_visual = embeds.to(committed.inputs_embeds.device), committed.visual_mask[..., None]
        if not draft.reads_placeholders:
            embeds = committed.inputs_embeds.where(is_visual, embeds)
        elif not owns and not self._looks_up:
            embeds = embeds.where(is_visual, committed.inputs_embeds)
        return replace(committed, inputs_embeds=embeds)

    def _pool(self, committed: Committed, begins_visual: torch.Tensor | None) -> Committed:
        draft = self._draft
        if not draft.pools:
            return committed
        rows = torch.arange(committed.token_ids.shape[1], device=committed.lengths.device)
        changed, kept, self.context = draft.pool(
            committed.inputs_embeds,
            committed.features,
            committed.position_ids,
            committed.visual_mask,
            rows < committed.lengths[:, None],
            self.context,
            begins_visual,
        )
        pooled = replace(committed, **changed).pack(kept)
        self.starts = self.starts + committed.lengths - pooled.lengths
        return pooled

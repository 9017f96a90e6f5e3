"""Drafting with an MSD head: a tree grown on the target's features (arXiv 2505.14260, EAGLE-2 arXiv 2406.16858)."""

from dataclasses import dataclass, replace

import torch
from transformers import DynamicCache

from transformers_msd.cache import keep_rows, make_room
from transformers_msd.calibration import load_sizing
from transformers_msd.drafters.base import CallInputs, TreeCandidateGenerator
from transformers_msd.modeling_msd import MSDDraftModel, pool_visual_rows
from transformers_msd.target import Committed, Target
from transformers_msd.tree import TokenTree, grow_tree, take_rows, tree_attention_mask


@dataclass(frozen=True)
class _Carried:
    cache: DynamicCache
    lengths: torch.Tensor
    starts: torch.Tensor
    pending: Committed
    weights: int


class MSDCandidateGenerator(TreeCandidateGenerator):
    """
    Grows trees with an [`MSDDraftModel`].

    The draft's cache holds one row for each row of the target's cache, fewer where it pools visual ones. A round first
    adds the rows committed since the round before, whose last prediction gives the children of the root, then the rows
    of the tree, which it drops again.

    Args:
        draft ([`MSDDraftModel`]):
            The draft model.
        target ([`Target`]):
            The target of the call, which lends its embeddings and head.
        inputs ([`CallInputs`]):
            Inputs of the call.
    """

    def __init__(self, draft: MSDDraftModel, target: Target, inputs: CallInputs) -> None:
        self._draft = draft
        # Looked up once: each look at these properties walks the parameters.
        self._device, self._dtype = draft.device, draft.dtype
        self._target = target
        self._sampler = inputs.sampler
        self.sizing = load_sizing([draft], target.model)
        self._cache = DynamicCache(config=draft.config.get_text_config())
        self._lengths: torch.Tensor | None = None
        self._pending: Committed | None = None
        carried = inputs.carried
        if isinstance(carried, _Carried) and carried.weights == self._draft.fc.weight.data_ptr():
            self._cache, self._pending = carried.cache, carried.pending
            self._lengths, self._starts = carried.lengths, carried.starts
            self._host_lengths = self._lengths.tolist()

    def draft(self, committed: Committed) -> TokenTree:
        sizing = self.sizing_for(committed)
        # Visual rows stand in the prompt alone, which comes with the first rows of a call.
        is_prompt = self._lengths is None or self._pending is not None
        if self._pending is not None:
            committed, self._pending = self._pending.join(committed), None
        if is_prompt:
            committed = self._pool(committed)
        last_rows = committed.last_rows[:, None]
        hidden = take_rows(self._extend(committed), last_rows)  # (batch, 1, hidden)
        position_ids = committed.position_ids.gather(1, last_rows)
        num_columns = self._cache.get_seq_length()
        columns = torch.arange(num_columns, device=hidden.device) < self._lengths.to(hidden.device)[:, None]
        depth = 0

        def expand(token_ids: torch.Tensor, slots: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
            nonlocal hidden, depth
            depth += 1
            hidden = self._forward(
                inputs_embeds=self._target.embed(token_ids),
                features=take_rows(hidden, slots),
                attention_mask=tree_attention_mask(columns, visible, hidden.dtype),
                position_ids=(position_ids + depth).expand_as(token_ids),
            )
            return self._rank(hidden, depth)

        log_probs = self._rank(hidden, depth)[:, 0]
        tree = grow_tree(self._draft.tree_config, committed.root_token_ids, log_probs, expand, sizing)
        keep_rows(self._cache, num_columns, self._lengths, None, num_columns)
        return tree

    def carry(self, committed: Committed, target: Target) -> _Carried:
        if self._pending is not None:
            committed = self._pending.join(committed)
        if self._lengths is None:
            self._start(committed)
        # A row that ran ahead of the end of the call may have drafted on more than the target kept.
        lengths = torch.minimum(self._lengths, target.num_real_rows - self._starts - committed.lengths)
        return _Carried(self._cache, lengths, self._starts, committed, self._draft.fc.weight.data_ptr())

    def _start(self, committed: Committed) -> None:
        self._lengths = torch.zeros_like(committed.lengths)
        self._host_lengths = [0] * len(committed.lengths)
        # Rows of the target that the draft has none for.
        self._starts = committed.position_ids[:, 0]

    def _pool(self, committed: Committed) -> Committed:
        """Pool the visual rows of a prompt as in training."""
        if self._lengths is None:
            self._start(committed)
        if self._draft.config.visual_pool_size == 1:
            return committed
        rows = torch.arange(committed.token_ids.shape[1], device=committed.lengths.device)
        inputs_embeds, features, kept = pool_visual_rows(
            self._draft.config,
            committed.inputs_embeds,
            committed.features,
            committed.visual_mask,
            rows < committed.lengths[:, None],
        )
        pooled = replace(committed, inputs_embeds=inputs_embeds, features=features).pack(kept)
        self._starts = self._starts + committed.lengths - pooled.lengths
        return pooled

    def _extend(self, committed: Committed) -> torch.Tensor:
        """Add committed rows to the draft's cache; fillers behind the last row of a sequence are overwritten later."""
        num_columns = self._cache.get_seq_length()
        batch_size, num_rows = committed.token_ids.shape
        attention_mask = None
        if batch_size > 1 and num_columns > 0:
            rows = torch.arange(num_rows, device=committed.token_ids.device)
            columns = torch.arange(num_columns, device=rows.device) < self._lengths[:, None]
            visible = (rows <= rows[:, None]).expand(batch_size, -1, -1)
            attention_mask = tree_attention_mask(columns, visible, self._dtype)
        hidden = self._forward(
            inputs_embeds=committed.inputs_embeds,
            features=committed.features,
            visual_mask=committed.visual_mask,
            attention_mask=attention_mask,
            position_ids=committed.position_ids,
        )
        self._host_lengths = [
            before + new for before, new in zip(self._host_lengths, committed.host_lengths, strict=True)
        ]
        make_room(self._cache)
        if batch_size > 1:
            rows = torch.arange(num_rows, device=self._lengths.device).expand(batch_size, -1)
            keep_rows(self._cache, num_columns, self._lengths, rows, max(self._host_lengths))
        self._lengths = self._lengths + committed.lengths
        return hidden

    def _forward(self, **inputs: torch.Tensor | None) -> torch.Tensor:
        """Run the draft in its own dtype and on its own device."""
        inputs = {
            name: value.to(self._device, self._dtype if value.is_floating_point() else None)
            for name, value in inputs.items()
            if value is not None
        }
        return self._draft(**inputs, past_key_values=self._cache, use_cache=True).last_hidden_state

    def _rank(self, hidden: torch.Tensor, depth: int) -> torch.Tensor:
        """Rank all tokens after nodes of one depth by their predicted features `(batch_size, nodes, hidden_size)`."""
        return self._sampler.rank(self._draft.logits(hidden, self._target.logits), depth)

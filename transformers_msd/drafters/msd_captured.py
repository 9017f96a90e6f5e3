"""A round of drafting on the target's features, on tensors whose shapes follow from the settings alone."""

import torch
from transformers import DynamicCache
from transformers.generation import LogitsProcessor

from transformers_msd.caches.fixed import fixed_attention_mask
from transformers_msd.call.sampling import coupled_log_probs
from transformers_msd.drafters.reading import beside
from transformers_msd.models.base import FeatureDraftModel
from transformers_msd.target.target import Target
from transformers_msd.trees.growing import grow_tree
from transformers_msd.trees.masks import causal_mask, take_rows
from transformers_msd.trees.tree import TreeConfig


def draft_trees(
    draft: FeatureDraftModel,
    target: Target,
    config: TreeConfig,
    cache: DynamicCache,
    starts: torch.Tensor,
    lengths: torch.Tensor,
    inputs_embeds: torch.Tensor,
    features: torch.Tensor,
    context: torch.Tensor | None,
    position_ids: torch.Tensor,
    next_positions: torch.Tensor,
    counts: torch.Tensor,
    root_token_ids: torch.Tensor,
    noise: torch.Tensor | None,
    warpers: tuple[LogitsProcessor, ...],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Add committed rows to the cache of a [`FixedRoom`] and grow trees behind them: what a round of drafting is.

    Args:
        draft ([`FeatureDraftModel`]):
            The draft model.
        target ([`Target`]):
            Lends its embeddings and head, where the draft has none.
        config ([`TreeConfig`]):
            The trees.
        cache (`DynamicCache`):
            Cache of the room.
        starts (`torch.Tensor` of shape `(batch_size,)`):
            Of the room: where the next rows are written.
        lengths (`torch.Tensor` of shape `(batch_size,)`):
            Rows of each sequence that are settled.
        inputs_embeds (`torch.Tensor` of shape `(batch_size, num_rows, hidden_size)`):
            Of the committed rows, fillers behind them, as in [`Committed`].
        features (`torch.Tensor` of shape `(batch_size, num_rows, num_layers * hidden_size)`):
            The same, and the context behind them, where there is one.
        context (`torch.Tensor` of shape `(batch_size, context_size)`, *optional*):
            What is read with each feature.
        position_ids (`torch.Tensor` of shape `(batch_size, num_rows)`):
            The same, or those on three axes, of shape `(3, batch_size, num_rows)`.
        next_positions (`torch.Tensor` of shape `(batch_size, 1)` or `(3, batch_size, 1)`):
            Positions behind the last of them, from where all that is drafted goes on alike.
        counts (`torch.Tensor` of shape `(batch_size,)`):
            How many there are.
        root_token_ids (`torch.Tensor` of shape `(batch_size,)`):
            Tokens emitted last.
        noise (`torch.Tensor` of shape `(batch_size, depth + 1, vocab_size)`, *optional*):
            Noise of the round, by which tokens are picked.
        warpers (`tuple[LogitsProcessor, ...]`):
            Row-wise processors of the call.

    Returns:
        Tokens, parents and scores of a [`TokenTree`], each of shape `(batch_size, num_nodes)`.
    """
    width = cache.layers[0].keys.shape[2]

    def forward(
        inputs_embeds: torch.Tensor,
        features: torch.Tensor,
        position_ids: torch.Tensor,
        lengths: torch.Tensor,
        visible: torch.Tensor,
    ) -> torch.Tensor:
        starts.copy_(lengths + (visible.shape[2] - visible.shape[1]))
        return draft(
            inputs_embeds=inputs_embeds.to(features.dtype),
            features=features,
            attention_mask=fixed_attention_mask(lengths, visible, width, features.dtype),
            position_ids=position_ids,
            cache=cache,
            use_cache=True,
        ).last_hidden_state

    def rank(hidden: torch.Tensor, depth: int) -> torch.Tensor:
        logits = draft.logits(hidden, target)
        return coupled_log_probs(logits, None if noise is None else noise[:, depth], warpers)

    batch_size, num_rows = position_ids.shape[-2:]
    causal = causal_mask(batch_size, num_rows, position_ids.device)
    last_rows = (counts - 1).clamp(min=0)[:, None]
    hidden = take_rows(forward(inputs_embeds, draft.fuse(features), position_ids, lengths, causal), last_rows)
    depth = 0

    def expand(token_ids: torch.Tensor, slots: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
        nonlocal hidden, depth
        places = (next_positions + depth).expand(*next_positions.shape[:-1], token_ids.shape[1])
        depth += 1
        features = draft.deepen(beside(take_rows(hidden, slots), context), depth)
        hidden = forward(draft.embed(token_ids, target), features, places, lengths + counts, visible)
        return rank(hidden, depth)

    tree = grow_tree(config, root_token_ids, rank(hidden, 0)[:, 0], expand, fixed=True)
    return tree.token_ids, tree.parents, tree.scores

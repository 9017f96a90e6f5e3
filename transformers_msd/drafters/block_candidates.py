"""Trees of which all levels are said in one forward: DDTree (arXiv 2604.12989), JetSpec (2606.18394)."""

import torch
from transformers import DynamicCache
from transformers.generation import LogitsProcessor, TemperatureLogitsWarper

from transformers_msd.caches.fixed import fixed_attention_mask
from transformers_msd.call.sampling import coupled_log_probs
from transformers_msd.costs.rounds import forward_cost
from transformers_msd.costs.sizing import Sizing
from transformers_msd.drafters.msd_candidates import MSDCandidateGenerator
from transformers_msd.models.block.modeling_block import BlockDraftModel
from transformers_msd.target.committed import Committed
from transformers_msd.target.target import Target
from transformers_msd.trees.growing import grow_tree
from transformers_msd.trees.masks import take_rows
from transformers_msd.trees.tree import TokenTree, TreeConfig


# Tokens of a level that may become children, for each that does, where parents add something to their scores.
SHORTLIST = 4


def draft_blocks(
    draft: BlockDraftModel,
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
    Add committed rows to the cache of a [`FixedRoom`] and grow trees from one block behind them.

    Args:
        draft ([`BlockDraftModel`]):
            The draft model.
        target, config, cache, starts, lengths, inputs_embeds, features, context, position_ids, next_positions, counts,
        root_token_ids, noise, warpers:
            As [`draft_trees`] has them; positions have one axis here.

    Returns:
        Tokens, parents and scores of a [`TokenTree`], each of shape `(batch_size, num_nodes)`.
    """
    width = cache.layers[0].keys.shape[2]
    starts.copy_(lengths)
    features = draft.fuse(features)
    draft.remember(features, position_ids, cache)
    lengths = lengths + counts
    last = take_rows(features, (counts - 1).clamp(min=0)[:, None])[:, 0]
    rows = _block(draft, target, root_token_ids, last, config.depth)
    starts.copy_(lengths)
    masks, places = [], torch.arange(width, device=rows.device)
    for (_, window), visible in zip(draft.sights, draft.visible(rows.shape[1], rows.device), strict=True):
        visible, seen = visible.expand(len(rows), -1, -1), None
        if window is not None:
            seen, visible = window.sees(places, visible, lengths, starts)
        masks.append(fixed_attention_mask(lengths, visible, width, features.dtype, seen))
    hidden = draft(
        inputs_embeds=rows,
        attention_masks=masks,
        position_ids=next_positions + torch.arange(rows.shape[1], device=rows.device),
        cache=cache,
    ).last_hidden_state
    levels = draft.levels(hidden, config.depth)
    logits = draft.logits(levels, target)
    tree = _grow_from(draft, config, root_token_ids, levels, logits, noise, warpers, fixed=True)
    return tree.token_ids, tree.parents, tree.scores


class BlockCandidateGenerator(MSDCandidateGenerator):
    """
    Grows trees from what a block says of each level.

    The draft's cache holds keys and values of the target's rows. A round adds those that have come to stand, and the
    rows of a block, which it drops again.
    """

    _draft_trees = staticmethod(draft_blocks)

    def _grow(self, committed: Committed, sizing: Sizing | None) -> TokenTree:
        features = take_rows(self._extend(committed), committed.last_rows.to(self._device)[:, None])[:, 0]
        draft, config = self._draft, self._tree_config
        rows = _block(draft, self._target, committed.root_token_ids, features, config.depth)
        num_rows = rows.shape[1]
        masks = [
            self._room.mask(visible.expand(len(rows), -1, -1), self._dtype, window)
            for (_, window), visible in zip(draft.sights, draft.visible(num_rows, self._device), strict=True)
        ]
        next_positions = self._next_positions(committed)
        places = next_positions + torch.arange(num_rows, device=next_positions.device)
        hidden = draft(
            inputs_embeds=rows,
            attention_masks=masks,
            position_ids=places.to(self._device),
            cache=self._cache,
        ).last_hidden_state
        levels = draft.levels(hidden, config.depth)
        read = levels if draft.head is not None else levels.to(self._target.device)
        logits = draft.logits(read, self._target).to(self._target.device)
        noise, warpers = self._sampler.noise_of_round(config.depth), self._sampler.draft_warpers
        return _grow_from(draft, config, committed.root_token_ids, levels, logits, noise, warpers, sizing)

    def _extend(self, committed: Committed) -> torch.Tensor:
        """Add committed rows to the draft's cache, and return what it reads of them."""
        if self._room is not None:
            self._room.place(committed.token_ids.shape[1])
        features = self._draft.fuse(committed.features.to(self._device, self._dtype))
        self._draft.remember(features, committed.position_ids.to(self._device), self._cache)
        if self._room is None:
            self._open_room(committed.lengths, committed.host_lengths)
        else:
            self._room.extend(committed.lengths.to(self._device), committed.host_lengths)
        return features

    @property
    def _num_drafted_rows(self) -> int:
        return self._draft.config.block_size

    def assumed_draft_cost(self, batch_size: int, depth: int, device_type: str) -> float:
        num_layers = self._draft.config.get_text_config().num_hidden_layers
        # Its layers are read once, by all rows of the block.
        num_rows = batch_size * self._draft.config.block_size
        rows_cost = forward_cost(num_rows, device_type) / forward_cost(batch_size, device_type)
        return max(num_layers * self.assumed_level(device_type), self._least_level) * rows_cost


def _block(
    draft: BlockDraftModel, target: Target, root_token_ids: torch.Tensor, features: torch.Tensor, num_levels: int
) -> torch.Tensor:
    """Make the rows of blocks, of shape `(batch_size, num_rows, hidden_size)`, where `features` before them are."""
    token_ids, mask = root_token_ids[:, None], draft.config.mask_token_id
    if mask is None:
        return draft.block(draft.embed(token_ids, target)[:, 0].to(features), features, num_levels, None)
    embeds = draft.embed(torch.cat([token_ids, torch.full_like(token_ids, mask)], dim=1), target).to(features)
    return draft.block(embeds[:, 0], features, num_levels, embeds[0, 1])


def _grow_from(
    draft: BlockDraftModel,
    config: TreeConfig,
    root_token_ids: torch.Tensor,
    levels: torch.Tensor,
    logits: torch.Tensor,
    noise: torch.Tensor | None,
    warpers: tuple[LogitsProcessor, ...],
    sizing: Sizing | None = None,
    fixed: bool = False,
) -> TokenTree:
    """
    Grow trees whose levels are known beforehand.

    A node's score is what the block says of its token at its level, whatever its path, and what its parent adds to
    that, normalised over the tokens of the level that come into question.

    Args:
        draft ([`BlockDraftModel`]):
            Says what a parent adds.
        config ([`TreeConfig`]):
            The trees.
        root_token_ids (`torch.Tensor` of shape `(batch_size,)`):
            Tokens of the roots.
        levels (`torch.Tensor` of shape `(batch_size, depth, hidden_size)`):
            What a head reads of each level.
        logits (`torch.Tensor` of shape `(batch_size, depth, vocab_size)`):
            Logits of the tokens of each level.
        noise (`torch.Tensor` of shape `(batch_size, depth + 1, vocab_size)`, *optional*):
            Noise of the round; greedy without it.
        warpers (`tuple[LogitsProcessor, ...]`):
            Row-wise processors of the call.
        sizing, fixed:
            As [`grow_tree`] has them.
    """
    batch_size, depth, vocab_size = logits.shape
    rows = logits.flatten(0, 1)[:, None]
    noise = None if noise is None else noise[:, :depth].flatten(0, 1)
    log_probs = coupled_log_probs(rows, noise, warpers).view(batch_size, depth, vocab_size)
    most = config.top_k if config.topology is None else 1 + max(rank for path in config.topology for rank in path)
    most *= 1 if draft.edge_to is None else SHORTLIST
    log_probs, known = log_probs.topk(min(most, vocab_size))  # (batch, depth, shortlist)
    # What is said of each level after each token of the level before: `(batch, depth, parents, shortlist)`.
    after = log_probs[:, :, None].expand(-1, -1, known.shape[2], -1)
    if draft.edge_to is not None:
        temperature = next((own.temperature for own in warpers if type(own) is TemperatureLogitsWarper), 1.0)
        roots = root_token_ids.to(known)[:, None, None].expand(-1, 1, known.shape[2])
        parents = torch.cat([roots, known[:, :-1]], dim=1).to(draft.device)
        tails = draft.edge_to.weight[known.to(draft.device)].transpose(2, 3)
        edges = draft.edges_from(parents, levels.to(draft.device)[:, :, None]) @ tails
        after = (after + edges.to(after) / temperature).log_softmax(-1)
    after_places = after[:, 1:].flatten(1, 2)

    def expand(places: torch.Tensor, slots: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
        return take_rows(after_places, places)

    return grow_tree(config, root_token_ids, after[:, 0, 0], expand, sizing, fixed, known)


__all__ = ["BlockCandidateGenerator", "draft_blocks"]
